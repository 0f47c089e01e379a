"""The concepts and presets as data, their loader, and detectors of a concept in a text."""
