"""What trainers need: what a fit came to, one error, algorithms that give the same bits, their own random numbers."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from interp.core.errors import InterpError

__all__ = ["Training", "TrainingError", "deterministic", "own_randomness"]


class TrainingError(InterpError, RuntimeError):
    """A loss that is no longer a number."""


@dataclass(frozen=True)
class Training:
    """What a fit came to.

    Attributes:
        steps: optimiser steps taken.
        tokens: tokens seen.
        stopped: True when it was asked to stop before its end.
        scale: what activations were multiplied by while training; folded into the weights. 1 where they were whitened,
            which is folded too, or normalised one by one.
        target_scale: the same of what is reconstructed, where that is another site's.
        seconds: wall time since the fit was made.
        last: the last line of metrics.
        resumed_at: tokens that an earlier fit, from which this one went on, had seen.
    """

    steps: int
    tokens: int
    stopped: bool
    scale: float
    target_scale: float
    seconds: float
    last: dict[str, int | float]
    resumed_at: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Tokens seen by this fit alone, per second of it."""
        return (self.tokens - self.resumed_at) / max(self.seconds, 1e-9)


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Use only algorithms that give the same bits every time, inside the block.

    Args:
        on: False leaves everything as it is.
    """
    # A module whose attributes are properties, which type checkers do not see.
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    if on:
        # Without it cuBLAS may not be deterministic, and torch refuses to call it; it has no effect on a CPU.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # Nothing here reads memory before writing it, and filling it costs a pass over every tensor.
        memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        if on:
            torch.use_deterministic_algorithms(before[0])
            memory.fill_uninitialized_memory = before[1]


@contextmanager
def own_randomness(device: torch.device, seed: int) -> Iterator[None]:
    """Draw random numbers from a seed inside the block; those of outside go on after it as if it had not been.

    Args:
        device: its generator is set, and the CPU's.
        seed: any whole number of 64 bits.
    """
    devices = [device.index if device.index is not None else 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)
        for index in devices:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield
