"""torch and transformers: a language model, steered. Knows no study."""
