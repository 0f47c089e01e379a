"""The evaluations, one module each, with the self-check."""
