"""What is measured, without Ray."""
