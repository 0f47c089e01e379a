"""A whole run, from a configuration to its summary."""
