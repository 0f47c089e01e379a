"""The evaluations, one module a question."""
