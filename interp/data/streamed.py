"""Activations streamed from a model through a shuffling buffer, without a disk."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from interp.core.errors import ConfigError, DataError
from interp.core.run import Run
from interp.core.site import Site
from interp.data.ahead import Ahead
from interp.data.store import ActivationStore, Rows, StreamState, check_sizes, row_sites
from interp.data.tokens import Cursor, TokenBlock, TokenSource

if TYPE_CHECKING:
    from interp.core.manager import HookManager

__all__ = ["StreamedActivations", "counted_rounds", "kept_rows"]

_AHEAD = 4  # blocks of tokens that are made ready while the model runs


class StreamedActivations(ActivationStore):
    """Streams activations of a model's tokens through a shuffling buffer, without a disk.

    The model runs no further than the last site and computes no logits. Special tokens are left out. The buffer is
    filled, half of it is served in a random order, the freed rows are filled again: nothing is ever copied as a whole.

    Memory, in bytes, with `d` the sum of the sites' widths: `buffer_tokens · (d · size(dtype) + 16)` for the buffer,
    `batch_size · (d · size(dtype) + 16)` for a batch, and `2 · rows · ctx · d · size(model dtype)` for one forward.

    Args:
        hm: the manager whose model gives the activations.
        tokens: the tokens to run.
        sites: one site or several, all read in one pass; several feature axes of one, such as heads, become one.
        batch_size: tokens per batch.
        buffer_tokens: tokens in the buffer; at least two batches.
        dtype: dtype in which activations are kept.
        seed: of the shuffling.
        repeat: start over when the text ends; else the last batch may be smaller.

    Raises:
        ConfigError: a buffer that is too small, or a site without a row per token.
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
        check_sizes(batch_size, buffer_tokens)
        self.hm, self.tokens, self.sites = hm, tokens, row_sites(sites)
        self.batch_size, self.buffer_tokens, self.dtype = batch_size, buffer_tokens, dtype
        self.seed, self.repeat = seed, repeat

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

    def _stream(self, should_stop: Callable[[], bool], state: StreamState | None) -> "_Shuffled":
        return _Shuffled(self, should_stop, state)

    def _captured(self, cursor: Cursor | None = None) -> Iterator[tuple["Rows", Cursor]]:
        """Yield what each forward gives at the tokens that count, and where the text stands after it.

        Args:
            cursor: where to begin; None is the first document.
        """
        rounds, ranks = counted_rounds(self.tokens, cursor, repeat=self.repeat), self.ranks
        # Of several processes each runs the model on its own blocks, and all get the rows of every block, in order.
        while some := list(islice(rounds, ranks.size)):
            # Where the text ends before each has one, the others run the last one for nothing.
            mine = self._capture(*some[min(ranks.rank, len(some) - 1)])
            for turn, (block, keep) in enumerate(some):
                rows = mine if turn == ranks.rank else _room(mine, block, keep)
                if ranks.size > 1:
                    for value in rows.values:
                        ranks.give(value.view(torch.uint8), turn)  # bytes, which every channel takes
                yield rows, block.cursor

    def _capture(self, block: TokenBlock, keep: Int[Tensor, "token"]) -> Rows:
        run = self.hm.run(block.inputs, read=self.sites, logits="none")
        return kept_rows(run, self.sites, block, keep, self.hm.device)


def _room(like: Rows, block: TokenBlock, keep: Int[Tensor, "token"]) -> Rows:
    """Room for the rows of a block, beside its tokens."""
    values = [value.new_empty(len(keep), value.shape[1]) for value in like.values]
    return Rows(values, block.ids.flatten()[keep], block.pos.flatten()[keep])


def counted_rounds(
    tokens: TokenSource, cursor: Cursor | None = None, *, repeat: bool = False
) -> Iterator[tuple[TokenBlock, Int[Tensor, "token"]]]:
    """Yield the blocks of a text that have tokens that count, with the places of these among the block's, flattened.

    Args:
        tokens: the text.
        cursor: where to begin; None is the first document.
        repeat: start over when the text ends, if something of it counted.
    """
    # From a cursor on, nothing more may come of a text that has given something before.
    again = cursor is not None and repeat
    while True:
        blocks = Ahead(tokens.blocks(cursor), _AHEAD)
        try:
            for block in blocks:
                keep = (block.mask & ~block.special).flatten().nonzero().flatten()
                if len(keep):
                    again = repeat
                    yield block, keep
        finally:
            blocks.close()
        if not again:
            return
        again, cursor = False, None


def kept_rows(
    run: Run, sites: Sequence[Site], block: TokenBlock, keep: Int[Tensor, "token"], device: torch.device
) -> Rows:
    """Return what a run over a block has read at the tokens that count.

    Args:
        run: with the sites read whole.
        sites: in the order of the values.
        block: the tokens of the run.
        keep: places of those that count, among the flattened ones.
        device: where to put the values.
    """
    read = [run[site.name].flatten(0, 1) for site in sites]  # each on the device of its layer
    values = [x.index_select(0, keep.to(x.device)).flatten(1).to(device) for x in read]
    return Rows(values, block.ids.flatten()[keep], block.pos.flatten()[keep])


class _Shuffled(Iterator[Rows]):
    """The shuffling buffer of one stream: slots, of which some are free, and an order to serve the others in."""

    def __init__(self, store: StreamedActivations, should_stop: Callable[[], bool], state: StreamState | None) -> None:
        self.store, self.should_stop = store, should_stop
        self.generator = torch.Generator().manual_seed(store.seed)
        self.buffer: Rows | None = None
        # The slots of this round in the order they are served, and how many have been; then all are free, and are
        # filled in that order.
        self.order = torch.arange(store.buffer_tokens)
        self.served = store.buffer_tokens
        self.spare: Rows | None = None
        self.cursor: Cursor | None = None
        self.ended = self.stopped = False
        if state is not None and state.record:
            self._restore(state)
        self.source = store._captured(self.cursor)

    def __next__(self) -> "Rows":
        if self.served == len(self.order):
            self._fill()
        if self.buffer is None or self.served == len(self.order):
            raise StopIteration
        index = self.order[self.served : self.served + self.store.batch_size]
        self.served += len(index)
        return self.buffer.gather(self.store.mine(index))

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
        rows = Rows.from_host("buffer", tensors, device)
        self.buffer = rows.empty(self.store.buffer_tokens, self.store.dtype)
        self.buffer.write(tensors["slots"], rows, len(rows))
        self.spare = Rows.from_host("spare", tensors, device) if "spare.tokens" in tensors else None
        self.generator.set_state(tensors["generator"].clone())
        self.order, self.served, self.ended = tensors["order"].clone(), int(record["served"]), bool(record["ended"])
        self.cursor = Cursor(*record["cursor"])

    def _sizes(self) -> dict[str, Any]:
        store = self.store
        names = [site.name for site in store.sites]
        return {"sites": names, "batch_size": store.batch_size, "buffer_tokens": store.buffer_tokens}
