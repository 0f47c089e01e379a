"""The base vector and the chain."""
