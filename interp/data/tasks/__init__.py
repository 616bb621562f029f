"""Prompt pairs of the field's tasks, as text for any tokenizer."""

from interp.data.tasks.make import TASKS, make_pairs
from interp.data.tasks.tables import pairs_from_csv

__all__ = ["TASKS", "make_pairs", "pairs_from_csv"]
