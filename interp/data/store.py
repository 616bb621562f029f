"""`ActivationStore`: the activations of many tokens, shuffled, as the batches that dictionaries are trained on."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.errors import ConfigError, DataError
from interp.core.site import Site
from interp.data.tokens import Cursor, TokenBlock, TokenSource

if TYPE_CHECKING:
    from interp.core.manager import HookManager

__all__ = ["ActivationStore", "Batch", "BatchStream", "StreamState"]

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
    """

    x: Float[Tensor, "token d_in"]
    target: Float[Tensor, "token d_out"] | None = None
    grad: Float[Tensor, "token d_in"] | None = None
    tokens: Int[Tensor, "token"] | None = None
    positions: Int[Tensor, "token"] | None = None
    mask: Bool[Tensor, "token"] | None = None


@dataclass(frozen=True)
class StreamState:
    """Where a stream of batches stands.

    Attributes:
        record: plain JSON; empty before the first batch.
        tensors: on the CPU, by name.
    """

    record: dict[str, Any]
    tensors: dict[str, Tensor]


class ActivationStore:
    """Streams activations of a model's tokens through a shuffling buffer, without a disk.

    The model runs no further than the last site and computes no logits. Special tokens are left out. The buffer is
    filled, half of it is served in a random order, the freed rows are filled again: nothing is ever copied as a whole.

    Memory, in bytes, with `d` the sum of the sites' widths: `buffer_tokens · (d · size(dtype) + 16)` for the buffer,
    `batch_size · (d · size(dtype) + 16)` for a batch, and `2 · rows · ctx · d · size(model dtype)` for one forward.

    Args:
        hm: the manager whose model gives the activations.
        tokens: the tokens to run.
        sites: one site or several, all read in one pass; each must have one feature axis.
        batch_size: tokens per batch.
        buffer_tokens: tokens in the buffer; at least two batches.
        dtype: dtype in which activations are kept.
        seed: of the shuffling.
        repeat: start over when the text ends; else the last batch may be smaller.

    Raises:
        ConfigError: a buffer that is too small, or a site with heads.
    """

    def __init__(
        self,
        hm: "HookManager",
        tokens: TokenSource,
        sites: str | Site | Sequence[str | Site],
        *,
        batch_size: int = 4096,
        buffer_tokens: int = 131072,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        repeat: bool = False,
    ) -> None:
        given = [sites] if isinstance(sites, str | Site) else list(sites)
        self.hm, self.tokens, self.sites = hm, tokens, [Site(site) for site in given]
        if batch_size < 1 or buffer_tokens < 2 * batch_size:
            raise ConfigError(
                f"buffer of {buffer_tokens} tokens for batches of {batch_size}: it must hold at least two batches "
                f"to mix them; set buffer_tokens ≥ {2 * max(batch_size, 1)}"
            )
        for site in self.sites:
            if len(site.axes) != 3 or site.where is not None:
                raise ConfigError(
                    f"{site} has axes {site.axes}; a store keeps one vector a token: "
                    "choose a whole site of shape [batch pos d], such as '3.resid_post'"
                )
        self.batch_size, self.buffer_tokens, self.dtype = batch_size, buffer_tokens, dtype
        self.seed, self.repeat = seed, repeat

    def batches(
        self,
        *,
        x: str | Site | None = None,
        target: str | Site | None = None,
        should_stop: Callable[[], bool] | None = None,
        state: StreamState | None = None,
    ) -> "BatchStream":
        """Return shuffled batches, from the first document with the same seed or from where another stream stood.

        Args:
            x: the site that the dictionary reads; may be left out when the store has one site.
            target: the site that it should give; by default the same.
            should_stop: asked before each forward; when it says True, no more batches come.
            state: what `state()` of a stream of such a store gave: the batches after it come, to the bit.

        Raises:
            ConfigError: a site that the store does not read, `x` left out among several, or a state of a store of other
                sites or sizes.
            DataError: the text has no token that counts; raised when the first batch is taken.
        """
        if x is None and len(self.sites) > 1:
            raise ConfigError(f"this store reads {[s.short for s in self.sites]}; say which one is x")
        reads = self._place(self.sites[0] if x is None else x)
        gives = None if target is None else self._place(target)
        return BatchStream(_Shuffled(self, should_stop or _never, state), reads, gives)

    def batches_by_site(self) -> Iterator[Mapping[str, Batch]]:
        """Yield, for each batch of tokens, a `Batch` per site under the site's short name."""
        names = [site.short for site in self.sites]
        for rows in _Shuffled(self, _never, None):
            yield {name: rows.batch(i, None) for i, name in enumerate(names)}

    def describe(self) -> dict[str, object]:
        """What was decided about tokens and shuffling, for a run's record."""
        return {
            "tokens": self.tokens.describe(),
            "sites": [site.name for site in self.sites],
            "buffer_tokens": self.buffer_tokens,
            "batch_size": self.batch_size,
            "special_tokens": "left out",
            "seed": self.seed,
        }

    def _place(self, site: str | Site) -> int:
        if Site(site) not in self.sites:
            raise ConfigError(f"this store reads {[s.short for s in self.sites]}, not {Site(site).short}")
        return self.sites.index(Site(site))

    def _captured(self, cursor: Cursor | None = None) -> Iterator[tuple["_Rows", Cursor]]:
        """Yield what each forward gives at the tokens that count, and where the text stands after it.

        Args:
            cursor: where to begin; None is the first document.
        """
        # From a cursor on, nothing more may come of a text that has given something before.
        again = cursor is not None and self.repeat
        while True:
            for block in self.tokens.blocks(cursor):
                keep = (block.mask & ~block.special).flatten().nonzero().flatten()
                if len(keep):
                    again = self.repeat
                    yield self._capture(block, keep), block.cursor
            if not again:
                return
            again, cursor = False, None

    def _capture(self, block: TokenBlock, keep: Int[Tensor, "token"]) -> "_Rows":
        run = self.hm.run(block.inputs, read=self.sites, logits="none")
        there = keep.to(self.hm.device)
        values = [run[site.name].flatten(0, 1).index_select(0, there) for site in self.sites]
        return _Rows(values, block.ids.flatten()[keep], block.pos.flatten()[keep])


class BatchStream(Iterator[Batch]):
    """Shuffled batches of a store, which can say at any time all that the following ones depend on."""

    def __init__(self, rows: "_Shuffled", x: int, target: int | None) -> None:
        self._rows, self._x, self._target = rows, x, target

    def __next__(self) -> Batch:
        return next(self._rows).batch(self._x, self._target)

    def state(self) -> StreamState:
        """Where the stream stands after the last batch that it gave.

        It holds the rows that are still to be served, so that nothing has to be run again: at most
        `buffer_tokens · (d · size(dtype) + 32) + rows · ctx · (d · size(model dtype) + 16)` bytes.
        """
        return self._rows.state()


class _Shuffled(Iterator["_Rows"]):
    """The shuffling buffer of one stream: slots, of which some are free, and an order to serve the others in."""

    def __init__(self, store: ActivationStore, should_stop: Callable[[], bool], state: StreamState | None) -> None:
        self.store, self.should_stop = store, should_stop
        self.generator = torch.Generator().manual_seed(store.seed)
        self.buffer: _Rows | None = None
        # The slots of this round in the order they are served, and how many have been; then all are free, and are
        # filled in that order.
        self.order = torch.arange(store.buffer_tokens)
        self.served = store.buffer_tokens
        self.spare: _Rows | None = None
        self.cursor: Cursor | None = None
        self.ended = self.stopped = False
        if state is not None and state.record:
            self._restore(state)
        self.source = store._captured(self.cursor)

    def __next__(self) -> "_Rows":
        if self.served == len(self.order):
            self._fill()
        if self.buffer is None or self.served == len(self.order):
            raise StopIteration
        index = self.order[self.served : self.served + self.store.batch_size]
        self.served += len(index)
        return self.buffer.gather(index)

    def _fill(self) -> None:
        """Fill the free slots and draw what is served next; changes nothing when it is asked to stop on the way."""
        free, filled, spare, cursor = self.order, 0, self.spare, self.cursor
        while filled < len(free) and not self.ended:
            if self.stopped or self.should_stop():
                self.stopped = True
                return
            if spare is None:
                found = next(self.source, None)
                if found is None:
                    break
                spare, cursor = found
            if self.buffer is None:
                self.buffer = spare.empty(len(free), self.store.dtype)
            taken = min(len(spare), len(free) - filled)
            self.buffer.write(free[filled : filled + taken], spare, taken)
            spare = spare.after(taken) if taken < len(spare) else None
            filled += taken
        if self.buffer is None:
            raise DataError(f"{self.store.tokens.documents.describe()} has only special tokens; give text")
        ended = filled < len(free)
        held = torch.full((self.store.buffer_tokens,), not self.ended)
        held[free[filled:]] = False
        mixed = held.nonzero().flatten()
        mixed = mixed[torch.randperm(len(mixed), generator=self.generator)]
        half = self.store.buffer_tokens // 2 // self.store.batch_size * self.store.batch_size
        self.order, self.served = mixed if ended else mixed[:half], 0
        self.spare, self.cursor, self.ended = spare, cursor, ended

    def state(self) -> StreamState:
        if self.buffer is None or self.cursor is None:
            return StreamState({}, {})
        held = torch.full((self.store.buffer_tokens,), not self.ended)
        held[self.order[self.served :]] = True
        held[self.order[: self.served]] = False
        slots = held.nonzero().flatten()
        tensors = {"order": self.order, "slots": slots, "generator": self.generator.get_state()}
        tensors |= self.buffer.to_host("buffer", slots)
        if self.spare is not None:
            tensors |= self.spare.to_host("spare", torch.arange(len(self.spare)))
        record = {**self._sizes(), "served": self.served, "ended": self.ended, "cursor": list(self.cursor)}
        return StreamState(record, tensors)

    def _restore(self, state: StreamState) -> None:
        record, tensors, device = state.record, state.tensors, self.store.hm.device
        was = {name: record.get(name) for name in self._sizes()}
        if was != self._sizes():
            raise ConfigError(f"this state is of a store with {was}; this one has {self._sizes()}")
        rows = _Rows.from_host("buffer", tensors, device)
        self.buffer = rows.empty(self.store.buffer_tokens, self.store.dtype)
        self.buffer.write(tensors["slots"], rows, len(rows))
        self.spare = _Rows.from_host("spare", tensors, device) if "spare.tokens" in tensors else None
        self.generator.set_state(tensors["generator"].clone())
        self.order, self.served, self.ended = tensors["order"].clone(), int(record["served"]), bool(record["ended"])
        self.cursor = Cursor(*record["cursor"])

    def _sizes(self) -> dict[str, Any]:
        store = self.store
        names = [site.name for site in store.sites]
        return {"sites": names, "batch_size": store.batch_size, "buffer_tokens": store.buffer_tokens}


def _never() -> bool:
    return False


@dataclass
class _Rows:
    """Rows of several sites with their tokens: what a forward gives, and what the buffer holds."""

    values: list[Tensor]
    tokens: Tensor
    positions: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def empty(self, n: int, dtype: torch.dtype) -> "_Rows":
        """Room for `n` rows like these."""
        values = [torch.empty(n, v.shape[1], dtype=dtype, device=v.device) for v in self.values]
        return _Rows(values, self.tokens.new_empty(n), self.positions.new_empty(n))

    def write(self, slots: Int[Tensor, "token"], rows: "_Rows", n: int) -> None:
        """Put the first `n` of other rows into these slots."""
        for mine, theirs in zip(self.values, rows.values, strict=True):
            mine.index_copy_(0, slots.to(mine.device), theirs[:n].to(mine.dtype))
        self.tokens[slots], self.positions[slots] = rows.tokens[:n], rows.positions[:n]

    def after(self, n: int) -> "_Rows":
        """All rows but the first `n`."""
        return _Rows([v[n:] for v in self.values], self.tokens[n:], self.positions[n:])

    def gather(self, index: Int[Tensor, "token"]) -> "_Rows":
        """These rows, copied."""
        values = [v.index_select(0, index.to(v.device)) for v in self.values]
        return _Rows(values, self.tokens.index_select(0, index), self.positions.index_select(0, index))

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
    def from_host(name: str, tensors: Mapping[str, Tensor], device: torch.device) -> "_Rows":
        """The rows that `to_host` gave under a name."""
        count = sum(key.startswith(f"{name}.values.") for key in tensors)
        values = [tensors[f"{name}.values.{i}"].to(device) for i in range(count)]
        return _Rows(values, tensors[f"{name}.tokens"], tensors[f"{name}.positions"])

    def batch(self, x: int, target: int | None) -> Batch:
        """As the item that a loss takes."""
        return Batch(
            x=self.values[x],
            target=None if target is None else self.values[target],
            tokens=self.tokens,
            positions=self.positions,
            mask=torch.ones(len(self), dtype=torch.bool, device=self.values[x].device),
        )
