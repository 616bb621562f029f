"""Activations that lie on a disk: read in any order, shuffled without a copy of the whole."""

import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp.core.errors import ArtifactError, ConfigError, DataError
from interp.core.site import Site
from interp.data.ahead import Ahead
from interp.data.manifest import SHARDS, Manifest, read_complete
from interp.data.shard import COLUMNS, Shard, shard_name, whole_shards
from interp.data.store import ActivationStore, Rows, StreamState, check_sizes

__all__ = ["BLOCK", "StoredActivations", "StoredDocument"]

# Rows that stay together until the last shuffle: long enough for a disk to read them in one go, short enough that many
# come together in a buffer.
BLOCK = 1024
_AHEAD = 2  # batches that are gathered before they are wanted


class StoredDocument(NamedTuple):
    """One document's tokens with their activations, in order.

    Attributes:
        ids: token ids, without added special tokens.
        positions: of each in the document.
        values: site → activations [token, *feature axes].
    """

    ids: Int[Tensor, "token"]
    positions: Int[Tensor, "token"]
    values: dict[str, Tensor]


class StoredActivations(ActivationStore):
    """What `interp.capture` has written to a folder; also while it is being written: whole shards are there to read.

    Batches are shuffled as in a buffer, without one: blocks of 1,024 rows come in an order drawn for each epoch, as
    many as `buffer_tokens` rows at a time, and their rows that count in an order drawn for each such window. Rows are
    gathered from the mapped files when their batch comes, in the order in which they lie there. The order hangs on the
    seed and the shards alone, so a stream goes on anywhere from a state of a few bytes.

    Memory, in bytes: `16 · buffer_tokens + 4 · batch_size · (d · size(dtype) + 16)`, with `d` the sum of the sites'
    widths, and one for each row of the shards that were looked at. What the operating system keeps of the files comes
    on top; it takes that back when it is wanted.

    Args:
        folder: the store.
        batch_size: tokens per batch.
        buffer_tokens: tokens among which each batch is drawn; at least two batches.
        seed: of the shuffling.
        repeat: begin another epoch when one ends; else the last batch may be smaller.
        share: (rank, world_size): of each `world_size` batches in turn, this reader takes number `rank`.
        pin: gather batches in pinned memory, from which a GPU copies without waiting.

    Raises:
        ArtifactError: no store, no whole shard, or a damaged one.
        ConfigError: a buffer or a share that cannot be.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        batch_size: int = 4096,
        buffer_tokens: int = 131072,
        seed: int = 0,
        repeat: bool = False,
        share: tuple[int, int] = (0, 1),
        pin: bool = False,
    ) -> None:
        check_sizes(batch_size, buffer_tokens)
        if not 0 <= share[0] < share[1]:
            raise ConfigError(f"share={share}: expected (rank, world_size) with 0 ≤ rank < world_size")
        self.folder, self.manifest = Path(folder), Manifest.read(Path(folder))
        self.sites = [Site(site.name) for site in self.manifest.sites]
        self.batch_size, self.buffer_tokens, self.seed = batch_size, buffer_tokens, seed
        self.repeat, self.share, self.pin = repeat, share, pin
        self.shards: list[Shard] = []
        self.numbers: list[int] = []
        self.refresh()

    @property
    def complete(self) -> bool:
        """Whether all of it has been written."""
        return read_complete(self.folder) is not None

    @property
    def n_rows(self) -> int:
        """Rows in whole shards, those of special tokens included."""
        return sum(shard.rows for shard in self.shards)

    @property
    def n_tokens(self) -> int:
        """Rows that count: of no special token."""
        return sum(shard.tokens for shard in self.shards)

    def refresh(self) -> int:
        """Take in the shards that have become whole since; gives how many are new. Streams under way go on without.

        Raises:
            ArtifactError: none is whole yet, or one is damaged.
        """
        complete, known = read_complete(self.folder), set(self.numbers)
        last = None if complete is None else int(complete["units"])
        held = self._whole()
        if last is not None and (gone := sorted(set(range(last)) - set(held))):
            raise ArtifactError(
                f"{self.folder} lacks shard {shard_name(gone[0])} of {last}; `interp capture --resume` makes it again"
            )
        fresh = [n for n in held if n not in known and (last is None or n < last)]
        made = [self._shard(n) for n in fresh]
        order = sorted(zip(self.numbers + fresh, self.shards + made, strict=True), key=lambda pair: pair[0])
        if not order:
            raise ArtifactError(f"{self.folder} holds no whole shard yet; wait for the first, or for `interp capture`")
        self.numbers, self.shards = [n for n, _ in order], [shard for _, shard in order]
        self.offsets = torch.tensor([0, *(shard.rows for shard in self.shards)]).cumsum(0)
        return len(fresh)

    def rows(self, index: Int[Tensor, "n"] | Bool[Tensor, "row"] | slice) -> Rows:
        """Return some rows of all sites, special tokens included, by their number in the store.

        Args:
            index: row numbers, in any order; True for each row that is wanted; or a slice, which gives views where it
                lies in one shard.

        Raises:
            DataError: a row that is not there.
        """
        if isinstance(index, slice):
            start, stop, step = index.indices(self.n_rows)
            if step == 1:
                return self._slice(start, max(start, stop))
            return self.rows(torch.tensor(range(start, stop, step), dtype=torch.long))
        if index.dtype == torch.bool:
            if len(index) != self.n_rows:
                raise DataError(f"a mask of {len(index)} rows: the store has {self.n_rows}")
            index = index.nonzero()[:, 0]
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < self.n_rows:
            raise DataError(f"rows from {int(index.min())} to {int(index.max())}: the store has {self.n_rows}")
        order = index.argsort(stable=True)
        found = self.gather(index[order])
        if bool((order[1:] > order[:-1]).all()):
            return found
        return found.gather(order.argsort())

    def gather(self, index: Int[Tensor, "n"]) -> Rows:
        """Return rows by their numbers, which must rise."""
        cuts = torch.searchsorted(index, self.offsets).tolist()
        pieces = [
            (shard, index[low:high] - offset, slice(low, high))
            for shard, offset, low, high in zip(self.shards, self.offsets.tolist(), cuts, cuts[1:], strict=False)
            if low < high
        ]
        given: Any = {"dtype": self.shards[0].codec.given, "pin_memory": self.pin}
        found = [
            [torch.empty(len(index), site.width, **given) for site in self.manifest.sites] for _ in self.manifest.parts
        ]
        ids, positions = (torch.empty(len(index), dtype=COLUMNS[name]) for name in ("ids", "position"))
        for shard, rows, place in pieces:
            # Straight to its place: a piece of its own would be copied once more.
            for part, outs in zip(self.manifest.parts, found, strict=True):
                for site, out in zip(self.manifest.sites, outs, strict=True):
                    shard.select_into(out[place], site.name, rows, part)
            torch.index_select(shard.column("ids"), 0, rows, out=ids[place])
            torch.index_select(shard.column("position"), 0, rows, out=positions[place])
        return Rows(found[0], ids.long(), positions.long(), found[1] if len(found) > 1 else None)

    def sequential(self, *, counted: bool = True, start: int = 0) -> Iterator[Rows]:
        """Yield batches in the order of the store; views of the files wherever a batch has all rows of a stretch.

        Args:
            counted: leave special tokens out.
            start: number of the first row.
        """
        for low in range(start, self.n_rows, self.batch_size):
            high = min(low + self.batch_size, self.n_rows)
            if not counted:
                yield self._slice(low, high)
            elif len(index := self.counted(low, high)):
                yield self.gather(index)

    def counted(self, low: int, high: int) -> Int[Tensor, "n"]:
        """The numbers of the rows from `low` to `high` that count."""
        found, offsets = [], self.offsets.tolist()
        for shard, offset in zip(self.shards, offsets, strict=False):
            first, last = max(low - offset, 0), min(high - offset, shard.rows)
            if first < last:
                found.append(shard.counted[first:last].nonzero()[:, 0] + (offset + first))
        return torch.cat(found) if found else torch.empty(0, dtype=torch.long)

    def column(self, name: str) -> Tensor:
        """What is known of every row: "ids", "document", "position" or, as booleans, "special"; copied together."""
        found = torch.cat([shard.column(name) for shard in self.shards])
        return found.bool() if name == "special" else found

    def document(self, index: int) -> StoredDocument:
        """Return one document, by its index in the source.

        Raises:
            DataError: the store does not hold it.
        """
        for shard in self.shards:
            if shard.record.get("first_document", 0) <= index < shard.record.get("end_document", 0):
                mine = ((shard.column("document") == index) & (shard.column("position") >= 0)).nonzero()[:, 0]
                if len(mine):
                    mine = mine[shard.column("position")[mine].argsort(stable=True)]
                    values = {s.name: shard.select(s.name, mine).unflatten(1, s.shape) for s in self.manifest.sites}
                    ids, positions = (shard.column(name)[mine].long() for name in ("ids", "position"))
                    return StoredDocument(ids, positions, values)
        raise DataError(
            f"{self.folder} holds no document {index}; it was left out, is empty, or comes later in the text"
        )

    def describe(self) -> dict[str, object]:
        """What was decided about tokens and shuffling, for a run's record."""
        return {
            "store": str(self.folder),
            "tokens": self.manifest.text.model_dump(mode="json"),
            "sites": [site.name for site in self.sites],
            "dtype": self.manifest.dtype,
            "shards": len(self.shards),
            "buffer_tokens": self.buffer_tokens,
            "batch_size": self.batch_size,
            "special_tokens": "left out",
            "seed": self.seed,
        }

    def _stream(self, should_stop: Callable[[], bool], state: StreamState | None) -> "_AheadRows":
        return _AheadRows(_ShuffledRows(self, should_stop, state))

    def _whole(self) -> list[int]:
        """The numbers of the shards that can be read, in order."""
        return whole_shards(self.folder)

    def _shard(self, number: int) -> Shard:
        return Shard(self.folder / SHARDS / shard_name(number), self.manifest.shapes, self.manifest.dtype)

    def _window(self, now: list[int], following: list[int]) -> None:
        """Called before a window is served: the shards that it reads, and those of the next one, as they are needed."""

    def _piece(self, shard: Shard, index: Int[Tensor, "n"] | slice) -> Rows:
        parts = [[shard.select(site.name, index, part) for site in self.sites] for part in self.manifest.parts]
        ids, positions = (shard.column(name)[index].long() for name in ("ids", "position"))
        return Rows(parts[0], ids, positions, parts[1] if len(parts) > 1 else None)

    def _slice(self, low: int, high: int) -> Rows:
        pieces = []
        for shard, offset in zip(self.shards, self.offsets.tolist(), strict=False):
            first, last = max(low - offset, 0), min(high - offset, shard.rows)
            if first < last:
                pieces.append(self._piece(shard, slice(first, last)))
        return _joined(pieces) if pieces else self._piece(self.shards[0], slice(0, 0))


def _joined(pieces: list[Rows]) -> Rows:
    if len(pieces) == 1:
        return pieces[0]
    values = [torch.cat(parts) for parts in zip(*(piece.values for piece in pieces), strict=True)]
    gradients = None
    if pieces[0].gradients is not None:
        gradients = [torch.cat(parts) for parts in zip(*(p.gradients or [] for p in pieces), strict=True)]
    tokens, positions = (torch.cat([getattr(p, name) for p in pieces]) for name in ("tokens", "positions"))
    return Rows(values, tokens, positions, gradients)


class _AheadRows(Iterator[Rows]):
    """The same batches, the next ones gathered in a thread while the last one is used; knows where each left off."""

    def __init__(self, rows: "_ShuffledRows") -> None:
        self._state = rows.state()
        self._ahead: Ahead[tuple[Rows, StreamState]] | None = None
        self._rows = rows

    def __next__(self) -> Rows:
        if self._ahead is None:
            # Not before it is wanted: a stream that is only asked for its state needs no thread.
            self._ahead = Ahead(_with_states(self._rows), _AHEAD)
        found, self._state = next(self._ahead)
        return found

    def state(self) -> StreamState:
        return self._state


def _with_states(rows: "_ShuffledRows") -> Iterator[tuple[Rows, StreamState]]:
    # Not a method: a thread that held the stream would keep it from ever being let go.
    for found in rows:
        yield found, rows.state()


class _ShuffledRows(Iterator[Rows]):
    """One stream of shuffled batches: an epoch, a window of blocks in it, and how many of its batches were served."""

    def __init__(self, store: StoredActivations, should_stop: Callable[[], bool], state: StreamState | None) -> None:
        # With the shards that are there now, whatever the store takes in later: others would change the order.
        self.store, self.should_stop, self.shards = copy.copy(store), should_stop, _shards_digest(store)
        self.blocks = _blocks(store)
        self._order_of, self._blocks_order = -1, torch.empty(0, dtype=torch.long)
        self.per_window = max(1, store.buffer_tokens // BLOCK)
        self.epoch, self.window, self.served, self.given = 0, 0, 0, 0
        self.left = torch.empty(0, dtype=torch.long)  # rows of the window before that filled no batch
        if state is not None and state.record:
            self._restore(state)
        self.order = self._drawn()

    def __next__(self) -> Rows:
        store = self.store
        if not store.n_tokens:
            raise DataError(f"{store.folder} holds only special tokens; capture more text")
        while True:
            if self.should_stop():
                raise StopIteration
            index = self._next()
            rank, world_size = store.share
            mine, self.given = self.given % world_size == rank, self.given + 1
            if mine:
                # In the order in which they lie there; numpy's sort is several times as fast as torch's here.
                return store.gather(store.mine(torch.from_numpy(np.sort(index.numpy()))))

    def _next(self) -> Int[Tensor, "n"]:
        size = self.store.batch_size
        while len(self.order) - self.served < size:
            last = (self.window + 1) * self.per_window >= len(self.blocks)
            rest = self.order[self.served :]
            if last and not self.store.repeat:
                if not len(rest):
                    raise StopIteration
                self.served = len(self.order)
                return rest
            self.left, self.served = rest, 0
            self.epoch, self.window = (self.epoch + 1, 0) if last else (self.epoch, self.window + 1)
            self.order = self._drawn()
        index = self.order[self.served : self.served + size]
        self.served += size
        return index

    def state(self) -> StreamState:
        record = {**self._sizes(), "epoch": self.epoch, "window": self.window, "served": self.served}
        return StreamState({**record, "given": self.given}, {"left": self.left.clone()})

    def _drawn(self) -> Int[Tensor, "n"]:
        """The rows of this window that count, with those that were left, in the order they are served."""
        order, low, size = self._epoch_order(self.epoch), self.window * self.per_window, self.per_window
        mine, coming = order[low : low + size], order[low + size : low + 2 * size]
        if not len(coming) and self.store.repeat:
            coming = self._epoch_order(self.epoch + 1)[:size]
        now = torch.cat([self.blocks[mine, 0], self.left])
        self.store._window(*(self._shards_of(rows) for rows in (now, self.blocks[coming, 0])))
        rows = [self.store.counted(low, high) for low, high in self.blocks[mine].tolist()]
        held = torch.cat([self.left, *rows])
        return held[torch.randperm(len(held), generator=_generator(self.store.seed, self.epoch, self.window))]

    def _shards_of(self, rows: Int[Tensor, "n"]) -> list[int]:
        found = torch.searchsorted(self.store.offsets, rows, right=True) - 1
        return [self.store.numbers[i] for i in dict.fromkeys(found.tolist())]

    def _epoch_order(self, epoch: int) -> Int[Tensor, "block"]:
        """The blocks in the order of an epoch: drawn once for all of its windows."""
        if self._order_of != epoch:
            generator = _generator(self.store.seed, epoch)
            self._order_of, self._blocks_order = epoch, torch.randperm(len(self.blocks), generator=generator)
        return self._blocks_order

    def _restore(self, state: StreamState) -> None:
        record = state.record
        was = {name: record.get(name) for name in self._sizes()}
        if was != self._sizes():
            raise ConfigError(f"this state is of a store with {was}; this one has {self._sizes()}")
        self.epoch, self.window, self.served, self.given = (
            int(record[name]) for name in ("epoch", "window", "served", "given")
        )
        self.left = state.tensors["left"].clone()

    def _sizes(self) -> dict[str, Any]:
        store = self.store
        return {
            "sites": [site.name for site in store.sites],
            "batch_size": store.batch_size,
            "buffer_tokens": store.buffer_tokens,
            "seed": store.seed,
            "share": list(store.share),
            "shards": self.shards,
        }


def _shards_digest(store: StoredActivations) -> str:
    """What tells these shards from others."""
    held = [[number, shard.record["files"]] for number, shard in zip(store.numbers, store.shards, strict=True)]
    return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()[:16]


def _blocks(store: StoredActivations) -> Int[Tensor, "block 2"]:
    """First row and end of every block; none crosses a shard."""
    found = []
    for shard, offset in zip(store.shards, store.offsets.tolist(), strict=False):
        starts = torch.arange(0, shard.rows, BLOCK)
        found.append(torch.stack([starts, (starts + BLOCK).clamp(max=shard.rows)], 1) + offset)
    return torch.cat(found)


def _generator(*numbers: int) -> torch.Generator:
    """A generator that follows from some numbers, and from no others."""
    seed = hashlib.sha256("/".join(map(str, numbers)).encode()).digest()[:8]
    return torch.Generator().manual_seed(int.from_bytes(seed, "big") >> 1)
