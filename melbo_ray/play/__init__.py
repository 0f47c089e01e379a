"""A run's vectors at work on any prompt: for a terminal, and for a page on this machine."""
