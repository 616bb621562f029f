"""What prompts a function vector is made from, and small things that its files share."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from interp.core.errors import ConfigError, DataError, nearest
from interp.core.manager import HookManager
from interp.data.icl import CORRUPTIONS, FunctionTask, TaskSplits
from interp.data.pairs import PromptPairs

__all__ = ["ICLOptions", "Tasks", "last_column", "solved", "splits_of"]

Tasks = FunctionTask | TaskSplits
"""A task, which is then split with seed 0, or one that is split already."""


@dataclass(frozen=True, kw_only=True)
class ICLOptions:
    """What prompts a function is read from and tried on.

    Args:
        n_trials: corrupted prompts per task; the effect of a head is the mean over them.
        n_prompts: prompts that head activations are averaged over.
        n_shots: examples shown in a prompt.
        corruption: one of `CORRUPTIONS`: what takes the function out of a trial's prompt.
        batch_size: prompts per forward.
        engine: how sweeps run; one of `interp.core.sweep.ENGINES`.
        budget_bytes: how much a block call of a sweep may take; None decides from the device.

    Raises:
        ConfigError: a count below 1, or an unknown corruption.
    """

    n_trials: int = 25
    n_prompts: int = 100
    n_shots: int = 10
    corruption: str = "shuffled"
    batch_size: int = 32
    engine: str = "auto"
    budget_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("n_trials", "n_prompts", "n_shots", "batch_size"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name}={value!r}: expected a whole number ≥ 1")
        if self.corruption not in CORRUPTIONS:
            hint = nearest(self.corruption, CORRUPTIONS) or "expected one of " + ", ".join(CORRUPTIONS)
            raise ConfigError(f"corruption={self.corruption!r}: {hint}")

    def settings(self) -> Mapping[str, Any]:
        """Return them as provenance records them."""
        return {k: v for k, v in asdict(self).items() if k not in ("engine", "budget_bytes", "batch_size")}


def splits_of(task: Tasks) -> TaskSplits:
    """Return a task's splits: its own, or those of seed 0.

    Raises:
        ConfigError: something else.
    """
    if not isinstance(task, Tasks):
        raise ConfigError(f"expected a FunctionTask or its splits, got {type(task).__name__} {task!r:.40}")
    return task.split() if isinstance(task, FunctionTask) else task


def last_column(n: int, batch: int, width: int) -> Bool[Tensor, "cell batch pos"]:
    """Return columns of cells that edit the last token of left-padded prompts."""
    columns = torch.zeros(n, batch, width, dtype=torch.bool)
    columns[:, :, -1] = True
    return columns


def solved(hm: HookManager, pairs: PromptPairs, *, batch_size: int = 32) -> Bool[Tensor, " pair"]:
    """Return which clean prompts the model answers: the first token of an answer is its most likely one.

    Args:
        hm: the model.
        pairs: the prompts.
        batch_size: prompts per forward.
    """
    found = []
    for part in chunks(pairs, batch_size):
        tokens = part.tokens(hm, side="left", same_length=False)
        found.append(tokens.metric("rank")(hm.run(tokens.clean, logits="last")).cpu() == 0)
    return torch.cat(found)


def chunks(pairs: PromptPairs, size: int) -> Sequence[PromptPairs]:
    """Return pairs in parts of at most so many."""
    return [pairs[low : low + size] for low in range(0, len(pairs), size)]


def refuse_unsolved(name: str, kept: int, n: int, n_shots: int) -> None:
    """Refuse a task of which the model solves nothing.

    Raises:
        DataError: says so.
    """
    if not kept:
        raise DataError(
            f"the model solves none of {n} validation items of {name!r} with {n_shots} shots, so no head can be said "
            "to carry it; check the template and the leading spaces of answers, or take an easier task"
        )
