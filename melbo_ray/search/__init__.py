"""The search for the base vector and for the chain."""
