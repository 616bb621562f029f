"""Processes that work on one thing together, and the few things that they tell each other."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

__all__ = ["ONE", "Ranks"]


@dataclass(frozen=True)
class Ranks:
    """Some processes, of which this is one; every one of them must make the same calls in the same order.

    A process alone calls nothing, so what it computes is what it would without this. Tensors on a GPU go over its own
    channel; those on the CPU, and plain numbers, never make a GPU wait.

    Attributes:
        rank: the number of this process among them.
        size: how many they are.
        group: torch.distributed's group of them; None for all that were started.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    def sum(self, x: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """Return the sum of all processes' tensors, without gradients; the same bits in each."""
        return x if self.size == 1 else self.add(x.detach().clone())

    def add(self, x: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """Add the others' tensors to this one's, in place."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(x, group=self.group)
        return x

    def count(self, n: int) -> int:
        """Return the sum of all processes' numbers."""
        return n if self.size == 1 else int(self.sum(torch.tensor(n)))

    def most(self, x: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """Return the largest of all processes' numbers, element by element."""
        if self.size == 1:
            return x
        import torch.distributed as dist

        found = x.detach().clone()
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.group)
        return found

    def gather(self, x: Shaped[Tensor, "..."]) -> list[Shaped[Tensor, "..."]]:
        """Return each process' tensor, without gradients; they may differ in the length of their first axis."""
        if self.size == 1:
            return [x]
        lengths = [int(n) for n in self._alike(torch.tensor(len(x)))]
        if max(lengths) == len(x):
            padded = x.detach().contiguous()
        else:
            padded = x.new_zeros(max(lengths), *x.shape[1:])
            padded[: len(x)] = x.detach()
        if max(lengths) == 0:
            return [x.detach()] * self.size
        return [found[:n] for found, n in zip(self._alike(padded), lengths, strict=True)]

    def _alike(self, x: Tensor) -> list[Tensor]:
        import torch.distributed as dist

        found = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(found, x, group=self.group)
        return found

    def gather_on_first(self, x: Shaped[Tensor, "..."]) -> list[Shaped[Tensor, "..."]] | None:
        """Return each process' tensor in the first of them, on the CPU; None in the others. All are of one shape."""
        if self.size == 1:
            return [x.detach().cpu()]
        import torch.distributed as dist

        mine = x.detach().cpu().contiguous()
        found = [torch.empty_like(mine) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(mine, found, dst=self._place(0), group=self.group)
        return found

    def give(self, x: Shaped[Tensor, "..."], source: int) -> Shaped[Tensor, "..."]:
        """Replace a tensor, in place, by that of one of the processes."""
        if self.size > 1:
            import torch.distributed as dist

            dist.broadcast(x, src=self._place(source), group=self.group)
        return x

    def _place(self, rank: int) -> int:
        """What torch.distributed calls one of them."""
        import torch.distributed as dist

        return rank if self.group is None else dist.get_global_rank(self.group, rank)


ONE = Ranks()
"""A process alone."""
