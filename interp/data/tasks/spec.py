"""`TaskSpec`: what a task is, and how its pairs are drawn."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from interp.data.prompt import Pair
from interp.data.tasks.bank import Bank

__all__ = ["Drawing", "Maker", "TaskSpec"]

Drawing = Callable[[random.Random], Pair]
"""Draws one pair."""

Maker = Callable[[Bank, bool, str], Drawing]
"""Chooses a task's words for a tokenizer, once, for training or held-out prompts and one corruption."""


@dataclass(frozen=True)
class TaskSpec:
    """A task of the field.

    Attributes:
        name: what it is called.
        about: one sentence: what is asked, and what the corrupted prompt differs in.
        corruptions: the ways to corrupt a prompt, the usual one first.
        split: what held-out prompts differ in from the others.
        make: chooses its words and returns a function that draws pairs.
    """

    name: str
    about: str
    corruptions: tuple[str, ...]
    split: str
    make: Maker
