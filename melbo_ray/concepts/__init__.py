"""Concepts and presets as data, their loader, and detectors of concepts in texts."""
