"""Language models and steering, on torch and transformers; independent of studies and runs."""
