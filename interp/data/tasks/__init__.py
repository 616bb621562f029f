"""Prompt pairs of the field's tasks, as text for any tokenizer."""
