"""Which cells a sweep runs together, how many fit a byte budget, and what share of the naive loop's work is left."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from interp.core.errors import ConfigError

__all__ = ["Sizes", "Wave", "block_weights", "check_budget", "default_budget", "waves"]

# On a CPU larger tensors leave its caches; on a GPU more rows are no faster, and a heat map fills in larger steps.
_CPU_BUDGET = 2**27
_GPU_BUDGET = 2**34


@dataclass(frozen=True)
class Sizes:
    """The sizes that decide how many bytes a branch takes.

    Args:
        batch, length: rows and columns of the batch.
        d_model, n_heads, n_kv_heads, d_head: of the model.
        d_mlp: neurons that a token passes (of all its experts together).
        n_logits: logits that the metrics look at.
        itemsize: bytes of an activation.
    """

    batch: int
    length: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    n_logits: int
    itemsize: int

    def branch_bytes(self, start: int) -> int:
        """Return the bytes that one branch takes at most while a block runs, or while its logits are read.

        batch · bytes · max(block, 4 n_logits), where
        block = (T − p)(8 d_model + 4 n_heads d_head + 4 d_mlp + n_heads T) + 4 T n_heads d_head,
        for T columns of which p are the base run's: the stream before and after, the residual and its norms, queries
        and outputs, the MLP's two or three products, scores (where a kernel makes them), and keys and values of all
        columns repeated for each query head.

        Args:
            start: p.
        """
        own = self.length - start
        heads = self.n_heads * self.d_head
        block = own * (8 * self.d_model + 4 * heads + 4 * self.d_mlp + self.n_heads * self.length)
        block += 4 * self.length * heads
        return self.batch * max(block * self.itemsize, 4 * self.n_logits * max(4, self.itemsize))

    def most(self, start: int, budget_bytes: int) -> int:
        """Return how many branches fit a budget; at least one.

        Args:
            start: the first column of the branches.
            budget_bytes: bytes.
        """
        return max(1, budget_bytes // self.branch_bytes(start))


@dataclass(frozen=True, eq=False)
class Wave:
    """Cells that grow into one batch of branches as the layers pass.

    Args:
        start: the first column that any of them changes; earlier ones are never run again.
        cells: in the order of their layers.
        layers: the block at which each joins.
    """

    start: int
    cells: Int[Tensor, " cell"]
    layers: Int[Tensor, " cell"]

    @property
    def first(self) -> int:
        """The first block that runs."""
        return int(self.layers[0])

    def block_rows(self, n_layers: int) -> int:
        """How many times a branch passes a block."""
        return int((n_layers - self.layers.clamp(min=0)).sum())

    def halves(self) -> "tuple[Wave, Wave]":
        """Return the cells in two parts, for when memory runs out."""
        cut = len(self.cells) // 2
        one, two = (slice(None, cut), slice(cut, None))
        return tuple(Wave(self.start, self.cells[at], self.layers[at]) for at in (one, two))  # type: ignore[return-value]


def waves(
    starts: Int[Tensor, " cell"],
    layers: Int[Tensor, " cell"],
    cells: Int[Tensor, " cell"],
    most: Callable[[int], int],
) -> list[Wave]:
    """Return the waves of a sweep: by start column, then by layer, as many at once as fit.

    Args:
        starts: each cell's first edited column.
        layers: the block at which each joins.
        cells: their numbers.
        most: how many branches fit, for a start column.
    """
    order = sorted(range(len(cells)), key=lambda i: (int(starts[i]), int(layers[i]), int(cells[i])))
    found: list[Wave] = []
    at = 0
    while at < len(order):
        start = int(starts[order[at]])
        same = at
        while same < len(order) and int(starts[order[same]]) == start:
            same += 1
        for begin in range(at, same, most(start)):
            index = torch.tensor(order[begin : min(same, begin + most(start))])
            found.append(Wave(start, cells[index], layers[index]))
        at = same
    return found


def default_budget(device: torch.device) -> int:
    """Return how many bytes a block call may take: half of what a GPU has free, and on a CPU as much as it is fast at.

    Args:
        device: where the blocks run.
    """
    if device.type == "cuda":
        return min(_GPU_BUDGET, torch.cuda.mem_get_info(device)[0] // 2)
    return _CPU_BUDGET


def check_budget(budget_bytes: int | None) -> None:
    """Refuse a budget that is no number of bytes.

    Raises:
        ConfigError: says what came.
    """
    if budget_bytes is not None and (type(budget_bytes) is not int or budget_bytes < 1):
        raise ConfigError(f"budget_bytes={budget_bytes!r}: expected a whole number of bytes ≥ 1, or None")


def block_weights(parameters: Sequence[int]) -> Int[Tensor, " layer"]:
    """Return the weights a token passes in the blocks from each layer on: parameters[l] + … + parameters[L − 1]."""
    return torch.tensor(list(parameters), dtype=torch.long).flip(0).cumsum(0).flip(0)
