"""`ActivationStore`: the activations of many tokens, shuffled, as the batches that dictionaries are trained on."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.errors import ConfigError
from interp.core.site import Site
from interp.data.beyond import Beyond
from interp.data.ranks import ONE, Ranks

if TYPE_CHECKING:
    from interp.core.manager import HookManager
    from interp.data.stored import StoredActivations
    from interp.data.streamed import StreamedActivations
    from interp.data.tokens import TokenSource

__all__ = ["ActivationStore", "Batch", "BatchStream", "RowStream", "Rows", "StreamState", "row_sites"]

_CHUNK = 16_384  # rows that are copied to the host at once


@dataclass(frozen=True)
class Batch:
    """Some tokens' activations, and what a loss may want to know about them.

    Attributes:
        x: activations that a dictionary reads.
        target: activations that it should give; None where that is `x` itself.
        grad: gradient of a loss with respect to `x`.
        tokens: token ids.
        positions: position of each token in its document; −1 at added special tokens.
        mask: False where a row should not count.
        beyond: a loss of what these tokens' reconstruction does; None where only its distance to the target counts.
    """

    x: Float[Tensor, "token d_in"]
    target: Float[Tensor, "token d_out"] | None = None
    grad: Float[Tensor, "token d_in"] | None = None
    tokens: Int[Tensor, "token"] | None = None
    positions: Int[Tensor, "token"] | None = None
    mask: Bool[Tensor, "token"] | None = None
    beyond: Beyond | None = None


@dataclass(frozen=True)
class StreamState:
    """Where a stream of batches stands.

    Attributes:
        record: plain JSON; empty before the first batch.
        tensors: on the CPU, by name.
    """

    record: dict[str, Any]
    tensors: dict[str, Tensor]


class ActivationStore(ABC):
    """The activations of many tokens at some sites, in shuffled batches: streamed from a model, or stored on a disk.

    `ActivationStore.stream(hm, tokens, sites)` runs the model while batches are taken; `ActivationStore.open(folder)`
    reads what `interp.capture` has written. Both leave special tokens out.

    Attributes:
        sites: what is read, in order.
        batch_size: tokens per batch.
        seed: of the shuffling.
        ranks: processes that read the same batches together; a streamed store's model runs in each of them in turn.
        part: (i, n): of the rows of each batch, this process takes part number i of n.
    """

    sites: list[Site]
    batch_size: int
    seed: int
    ranks: Ranks = ONE
    part: tuple[int, int] = (0, 1)

    @staticmethod
    def stream(
        hm: "HookManager",
        tokens: "TokenSource",
        sites: str | Site | Sequence[str | Site],
        *,
        batch_size: int = 4096,
        buffer_tokens: int = 131072,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        repeat: bool = False,
    ) -> "StreamedActivations":
        """Return a store without a disk; see `StreamedActivations` for the arguments."""
        from interp.data.streamed import StreamedActivations

        return StreamedActivations(
            hm,
            tokens,
            sites,
            batch_size=batch_size,
            buffer_tokens=buffer_tokens,
            dtype=dtype,
            seed=seed,
            repeat=repeat,
        )

    @staticmethod
    def open(
        folder: str | Path,
        *,
        batch_size: int = 4096,
        buffer_tokens: int = 131072,
        seed: int = 0,
        repeat: bool = False,
        share: tuple[int, int] = (0, 1),
        pin: bool = False,
    ) -> "StoredActivations":
        """Return what lies in a folder; see `StoredActivations` for the arguments."""
        from interp.data.stored import StoredActivations

        return StoredActivations(
            folder,
            batch_size=batch_size,
            buffer_tokens=buffer_tokens,
            seed=seed,
            repeat=repeat,
            share=share,
            pin=pin,
        )

    def batches(
        self,
        *,
        x: str | Site | None = None,
        target: str | Site | None = None,
        should_stop: Callable[[], bool] | None = None,
        state: StreamState | None = None,
    ) -> "BatchStream":
        """Return shuffled batches, from the first one with the same seed or from where another stream stood.

        Args:
            x: the site that the dictionary reads; may be left out when the store has one site.
            target: the site that it should give; by default the same.
            should_stop: asked now and then; when it says True, no more batches come.
            state: what `state()` of a stream of such a store gave: the batches after it come, to the bit.

        Raises:
            ConfigError: a site that the store does not read, `x` left out among several, or a state of a store of other
                sites or sizes.
            DataError: no token counts; raised when the first batch is taken.
        """
        if x is None and len(self.sites) > 1:
            raise ConfigError(f"this store reads {[s.short for s in self.sites]}; say which one is x")
        reads = self.place(self.sites[0] if x is None else x)
        gives = None if target is None else self.place(target)
        return BatchStream(self._stream(should_stop or _never, state), reads, gives)

    def batches_by_site(self) -> Iterator[Mapping[str, Batch]]:
        """Yield, for each batch of tokens, a `Batch` per site under the site's short name."""
        names = [site.short for site in self.sites]
        for rows in self._stream(_never, None):
            yield {name: rows.batch(i, None) for i, name in enumerate(names)}

    @abstractmethod
    def describe(self) -> dict[str, object]:
        """What was decided about tokens and shuffling, for a run's record."""

    @abstractmethod
    def _stream(self, should_stop: Callable[[], bool], state: StreamState | None) -> "RowStream":
        """Shuffled rows of all sites, a batch at a time."""

    def mine(self, index: Int[Tensor, "token"]) -> Int[Tensor, "token"]:
        """The part of a batch's rows that this process takes."""
        i, n = self.part
        return index[len(index) * i // n : len(index) * (i + 1) // n]

    def place(self, site: str | Site) -> int:
        """The number of a site among those that the store reads.

        Raises:
            ConfigError: it does not read it.
        """
        if Site(site) not in self.sites:
            raise ConfigError(f"this store reads {[s.short for s in self.sites]}, not {Site(site).short}")
        return self.sites.index(Site(site))


def row_sites(sites: str | Site | Sequence[str | Site]) -> list[Site]:
    """Return sites that have something for each token, which is what a store keeps.

    Raises:
        ConfigError: one is sliced, or has no row per token.
    """
    found = [Site(site) for site in ([sites] if isinstance(sites, str | Site) else sites)]
    for site in found:
        if site.axes[:2] != ("batch", "pos") or site.where is not None:
            raise ConfigError(
                f"{site} has axes {site.axes}; a store keeps whole sites with something for each token: "
                "choose one of shape [batch pos …], such as '3.resid_post'"
            )
    if not found or len(set(found)) < len(found):
        raise ConfigError(f"sites={[s.short for s in found]}: give at least one site, and none twice")
    return found


def check_sizes(batch_size: int, buffer_tokens: int) -> None:
    """Refuse a buffer that could not mix batches.

    Raises:
        ConfigError: it does not hold two of them.
    """
    if batch_size < 1 or buffer_tokens < 2 * batch_size:
        raise ConfigError(
            f"buffer of {buffer_tokens} tokens for batches of {batch_size}: it must hold at least two batches "
            f"to mix them; set buffer_tokens ≥ {2 * max(batch_size, 1)}"
        )


@runtime_checkable
class RowStream(Protocol):
    """Batches of rows that can say where they stand."""

    def __iter__(self) -> "Iterator[Rows]": ...

    def __next__(self) -> "Rows": ...

    def state(self) -> StreamState:
        """All that the following batches depend on."""


class BatchStream(Iterator[Batch]):
    """Shuffled batches of a store, which can say at any time all that the following ones depend on."""

    def __init__(self, rows: RowStream, x: int, target: int | None) -> None:
        self._rows, self._x, self._target = rows, x, target

    def __next__(self) -> Batch:
        return next(self._rows).batch(self._x, self._target)

    def rows(self) -> Iterator["Rows"]:
        """The same batches with all sites of the store."""
        return iter(self._rows)

    def state(self) -> StreamState:
        """Where the stream stands after the last batch that it gave.

        Of a streamed store it holds the rows that are still to be served, so that nothing has to be run again: at most
        `buffer_tokens · (d · size(dtype) + 32) + rows · ctx · (d · size(model dtype) + 16)` bytes. Of a stored one it
        holds at most 8 · batch_size bytes.
        """
        return self._rows.state()


@dataclass
class Rows:
    """Rows of several sites with their tokens: what a forward gives, what a buffer holds, what a shard gives.

    Attributes:
        values: activations of each site, [token d].
        tokens: token ids.
        positions: position of each token in its document; −1 at added special tokens.
        gradients: of a loss with respect to `values`, where they are known.
    """

    values: list[Tensor]
    tokens: Tensor
    positions: Tensor
    gradients: list[Tensor] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def empty(self, n: int, dtype: torch.dtype) -> "Rows":
        """Room for `n` rows like these."""
        values = [torch.empty(n, v.shape[1], dtype=dtype, device=v.device) for v in self.values]
        return Rows(values, self.tokens.new_empty(n), self.positions.new_empty(n))

    def write(self, slots: Int[Tensor, "token"], rows: "Rows", n: int) -> None:
        """Put the first `n` of other rows into these slots."""
        for mine, theirs in zip(self.values, rows.values, strict=True):
            mine.index_copy_(0, slots.to(mine.device), theirs[:n].to(mine.dtype))
        self.tokens[slots], self.positions[slots] = rows.tokens[:n], rows.positions[:n]

    def after(self, n: int) -> "Rows":
        """All rows but the first `n`."""
        return Rows([v[n:] for v in self.values], self.tokens[n:], self.positions[n:])

    def gather(self, index: Int[Tensor, "token"]) -> "Rows":
        """These rows, copied."""
        values = [v.index_select(0, index.to(v.device)) for v in self.values]
        gradients = None
        if self.gradients is not None:
            gradients = [g.index_select(0, index.to(g.device)) for g in self.gradients]
        return Rows(values, self.tokens.index_select(0, index), self.positions.index_select(0, index), gradients)

    def to_host(self, name: str, index: Int[Tensor, "token"]) -> dict[str, Tensor]:
        """Copies of these rows on the CPU, by names that begin with `name`; the device holds no second buffer."""
        found = {f"{name}.tokens": self.tokens.index_select(0, index)}
        found[f"{name}.positions"] = self.positions.index_select(0, index)
        for i, value in enumerate(self.values):
            copy = torch.empty(len(index), value.shape[1], dtype=value.dtype)
            for at, part in enumerate(index.split(_CHUNK)):
                copy[at * _CHUNK : at * _CHUNK + len(part)] = value.index_select(0, part.to(value.device)).cpu()
            found[f"{name}.values.{i}"] = copy
        return found

    @staticmethod
    def from_host(name: str, tensors: Mapping[str, Tensor], device: torch.device) -> "Rows":
        """The rows that `to_host` gave under a name."""
        count = sum(key.startswith(f"{name}.values.") for key in tensors)
        values = [tensors[f"{name}.values.{i}"].to(device) for i in range(count)]
        return Rows(values, tensors[f"{name}.tokens"], tensors[f"{name}.positions"])

    def batch(self, x: int, target: int | None) -> Batch:
        """As the item that a loss takes."""
        return Batch(
            x=self.values[x],
            target=None if target is None else self.values[target],
            grad=None if self.gradients is None else self.gradients[x],
            tokens=self.tokens,
            positions=self.positions,
        )


def _never() -> bool:
    return False
