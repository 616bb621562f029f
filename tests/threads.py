"""Processes that are threads of one: each sees the others as `Ranks`, whose sums and gatherings are exact."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from interp.data.ranks import ONE, Ranks
from interp.dictionaries.across import Across

_T = TypeVar("_T")
_WAIT = 30.0


class Table:
    """Where the members of a group lay down what they have for each other."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=_WAIT)
        self.held: list[Any] = [None] * size

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.held[rank] = value
        self.barrier.wait()
        found = list(self.held)
        self.barrier.wait()
        return found


@dataclass(frozen=True)
class Threads(Ranks):
    """One member of such a group."""

    table: Table = field(default_factory=lambda: Table(1))

    def add(self, x: Tensor) -> Tensor:
        parts = self.table.exchange(self.rank, x.detach().clone())
        assert len({(part.shape, part.dtype) for part in parts}) == 1, "they called different things"
        return x.copy_(torch.stack(parts).sum(0))

    def gather(self, x: Tensor) -> list[Tensor]:
        return [part.clone() for part in self.table.exchange(self.rank, x.detach().clone())]

    def gather_on_first(self, x: Tensor) -> list[Tensor] | None:
        parts = self.gather(x)
        return parts if self.rank == 0 else None

    def give(self, x: Tensor, source: int) -> Tensor:
        return x.copy_(self.table.exchange(self.rank, x.detach().clone())[source])


def together(tokens: int, latents: int, work: Callable[[Across], _T]) -> list[_T]:
    """What each of tokens × latents processes gives that do the same work; an error of one is raised."""
    size = tokens * latents
    every, rows, columns = Table(size), [Table(latents) for _ in range(tokens)], [Table(tokens) for _ in range(latents)]
    found: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        t, s = divmod(rank, latents)
        across = Across(
            Threads(t, tokens, table=columns[s]) if tokens > 1 else ONE,
            Threads(s, latents, table=rows[t]) if latents > 1 else ONE,
            Threads(rank, size, table=every) if size > 1 else ONE,
        )
        try:
            found[rank] = work(across)
        except BaseException as err:  # noqa: BLE001 - raised below
            errors.append(err)
            for table in [every, *rows, *columns]:
                table.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    broken = [err for err in errors if not isinstance(err, threading.BrokenBarrierError)]
    if errors:
        raise (broken or errors)[0]
    return found
