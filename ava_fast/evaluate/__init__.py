"""What a model is worth on text that it never saw."""
