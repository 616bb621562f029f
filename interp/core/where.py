"""`Where`: which positions, heads and rows of a site are meant."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp.core.errors import WhereError

if TYPE_CHECKING:
    from interp.core.frame import Frame

__all__ = ["Where"]

_PHASES = ("prompt", "last_prompt", "generated")


@dataclass(frozen=True, eq=False)
class Where:
    """Which positions, heads and rows of a site an edit or a read is about; empty means all of them.

    Positions are absolute: they are counted in each row's own tokens, whatever the padding, and stay the same under
    a KV cache. All conditions given must hold together; `a | b` is where either holds.

    Args:
        pos: an integer, a list, a range or a slice of positions. 0 is the row's first real token; negative counts
            back from the last real token of the prompt. A LongTensor [batch] or [batch, n] gives each row its own.
        head: a head or a list of them; key/value heads at `k`, `v` and `rot_k`, query heads elsewhere.
        rows: a batch row, a list or a slice of them.
        src: key positions of `pattern` and `attn_scores`, in the forms of `pos`.
        mask: BoolTensor [batch, pos] in the columns of the padded batch.
        tokens: a token id or a list: the positions that hold one of them.
        name: a named span of the batch, or several (where any of them is), as given by `hm.chat` or `Tokens.spans`.
        phase: "prompt", "last_prompt" or "generated"; see `Where.prompt()` and its siblings.

    Raises:
        WhereError: a field of the wrong type (at once), or a place outside the batch (when it runs).
    """

    pos: Any = None
    head: Any = None
    rows: Any = None
    src: Any = None
    mask: Any = None
    tokens: Any = None
    name: Any = None
    phase: str | None = None
    any_of: tuple["Where", ...] = ()

    def __post_init__(self) -> None:
        for field in ("pos", "src"):
            object.__setattr__(self, field, _positions(field, getattr(self, field)))
        for field in ("head", "rows", "tokens"):
            object.__setattr__(self, field, _whole_numbers(field, getattr(self, field)))
        if self.mask is not None and not (isinstance(self.mask, Tensor) and self.mask.dtype == torch.bool):
            what = f"a {self.mask.dtype} tensor" if isinstance(self.mask, Tensor) else type(self.mask).__name__
            raise WhereError(f"Where(mask=…) needs a bool tensor [batch, pos], got {what}")
        if self.mask is not None and self.mask.ndim != 2:
            raise WhereError(f"Where(mask=…) needs shape [batch, pos], got {tuple(self.mask.shape)}")
        if self.name is not None:
            names = (self.name,) if isinstance(self.name, str) else self.name
            if not isinstance(names, list | tuple) or not names or not all(isinstance(n, str) for n in names):
                raise WhereError(f"Where(name={self.name!r}): expected the name of a span, or a list of names")
            object.__setattr__(self, "name", tuple(names))
        if self.phase is not None and self.phase not in _PHASES:
            raise WhereError(f"Where(phase={self.phase!r}): expected one of {', '.join(_PHASES)}")
        fields = (self.pos, self.head, self.rows, self.src, self.mask, self.tokens, self.name, self.phase)
        object.__setattr__(self, "_key", (*(_hashable(f) for f in fields), self.any_of))

    @staticmethod
    def prompt() -> "Where":
        """Every real token of the prompt."""
        return Where(phase="prompt")

    @staticmethod
    def last_prompt() -> "Where":
        """The last real token of the prompt: the one whose output is the first generated token."""
        return Where(phase="last_prompt")

    @staticmethod
    def generated() -> "Where":
        """Every token generated after the prompt.

        The first generated token is predicted at `last_prompt()`: write `Where.last_prompt() | Where.generated()` to
        act on everything that shapes the answer.
        """
        return Where(phase="generated")

    def __or__(self, other: "Where") -> "Where":
        if not isinstance(other, Where):
            return NotImplemented
        return Where(any_of=(*(self.any_of or (self,)), *(other.any_of or (other,))))

    @property
    def is_all(self) -> bool:
        """Whether nothing is restricted."""
        return self._key == Where._EMPTY

    @property
    def flattens(self) -> bool:
        """Whether a read has one axis for rows and positions, because rows may give different numbers of them."""
        return any(field is not None for field in (self.mask, self.tokens, self.name, self.phase))

    @property
    def selects_positions(self) -> bool:
        """Whether positions (not only heads or rows) are restricted."""
        return self.pos is not None or self.flattens or any(w.selects_positions for w in self.any_of)

    @property
    def selects_rows(self) -> bool:
        """Whether rows are restricted."""
        return self.rows is not None or any(w.selects_rows for w in self.any_of)

    @property
    def needs_generation(self) -> bool:
        """Whether this can only select tokens that `generate` makes."""
        if self.any_of:
            return all(w.needs_generation for w in self.any_of)
        return self.phase == "generated"

    def columns(self, frame: "Frame") -> Bool[Tensor, "batch total"]:
        """Return which columns, up to `frame.total`, are selected; pads never are."""
        mask = frame.known_mask()
        if self.any_of:
            return frame.memo(("any", self), lambda: torch.stack([w.columns(frame) for w in self.any_of]).any(0))
        return frame.memo(("columns", self), lambda: self._columns(frame, mask))

    def _columns(self, frame: "Frame", mask: Tensor) -> Bool[Tensor, "batch total"]:
        chosen = mask.clone()
        if self.pos is not None:
            chosen &= _at(self.pos, frame, "pos", self.row_mask(frame))
        if self.mask is not None:
            chosen &= self._user_mask(frame)
        if self.tokens is not None:
            ids = frame.known_ids()
            chosen &= torch.isin(ids, torch.tensor(_listed(self.tokens), dtype=ids.dtype))
        if self.name is not None:
            chosen &= torch.stack([_span(name, frame) for name in self.name]).any(0)
        if self.phase is not None:
            chosen &= _phase(self.phase, frame)
        return chosen & self.row_mask(frame)[:, None]

    def _user_mask(self, frame: "Frame") -> Bool[Tensor, "batch total"]:
        given = self.mask.cpu()
        if given.shape[0] == frame.n_rows:
            given = given[frame.row0 : frame.row0 + frame.batch]
        expected = (frame.batch, frame.prompt_length)
        if given.shape[0] not in (1, frame.batch) or given.shape[1] not in (frame.prompt_length, frame.total):
            raise WhereError(f"Where(mask=…) has shape {tuple(self.mask.shape)}; this batch is {expected} [batch, pos]")
        given = given.expand(frame.batch, -1)
        given = frame.moved(given) if given.shape[1] == frame.prompt_length else given
        full = torch.zeros(frame.batch, max(frame.total, given.shape[1]), dtype=torch.bool)
        full[:, : given.shape[1]] = given
        return full[:, : frame.total]

    def row_mask(self, frame: "Frame") -> Bool[Tensor, " batch"]:
        """Return which rows of the current (part of the) batch are selected."""
        chosen = torch.ones(frame.batch, dtype=torch.bool)
        if self.rows is None:
            return chosen
        every = torch.zeros(frame.n_rows, dtype=torch.bool)
        if isinstance(self.rows, slice):
            every[self.rows] = True
        else:
            every[_indices(self.rows, frame.n_rows, "row", "rows in this batch")] = True
        return every[frame.row0 : frame.row0 + frame.batch]

    def src_columns(self, frame: "Frame") -> Bool[Tensor, "batch total"] | None:
        """Return which key columns are selected, or None for all of them."""
        return None if self.src is None else _at(self.src, frame, "src")

    def heads(self, n: int, site: str) -> list[int] | None:
        """Return the selected head indices out of `n`, or None for all of them."""
        if self.head is None:
            return None
        if isinstance(self.head, slice):
            return list(range(n))[self.head]
        return _indices(self.head, n, "head", f"heads at {site}").tolist()

    def asked_columns(self, frame: "Frame") -> Int[Tensor, "batch n"]:
        """Return the column of each position in the order asked, those that do not exist yet included."""
        return _absolute(self.pos, frame, "pos", self.row_mask(frame))

    def read_columns(self, frame: "Frame") -> Int[Tensor, "batch n"]:
        """Return the columns of a read slice, the same number in every row.

        Raises:
            WhereError: rows would give different numbers of positions.
        """
        return frame.memo(("read", self), lambda: self._read_columns(frame))

    def _read_columns(self, frame: "Frame") -> Int[Tensor, "batch n"]:
        if isinstance(self.pos, slice):
            chosen = _at(self.pos, frame, "pos") & frame.known_mask()
            counts = chosen.sum(dim=1)
            if int(counts.min()) != int(counts.max()):
                raise WhereError(
                    f"the slice {_show(self.pos)} gives rows of different lengths ({counts.tolist()}); "
                    "read every position and use out.mask, or give a list of positions"
                )
            return chosen.nonzero()[:, 1].view(frame.batch, -1)
        return _absolute(self.pos, frame, "pos")

    def describe(self) -> str:
        """The restrictions as they were written, such as `pos=-1, head=1`."""
        if self.any_of:
            return " | ".join(f"Where({w.describe()})" for w in self.any_of)
        fields = ("pos", "head", "rows", "src", "mask", "tokens", "name", "phase")
        return ", ".join(f"{f}={_show(getattr(self, f))}" for f in fields if getattr(self, f) is not None)

    def __repr__(self) -> str:
        return f"Where({self.describe()})"

    _key: ClassVar[tuple[Any, ...]]
    _EMPTY: ClassVar[tuple[Any, ...]] = (*(None,) * 8, ())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Where) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def _hashable(value: Any) -> Any:
    if isinstance(value, Tensor):
        by_identity = value.device.type != "cpu" or value.numel() > 512  # hashing contents must not wait or crawl
        return id(value) if by_identity else (tuple(value.shape), tuple(value.flatten().tolist()))
    if isinstance(value, slice):
        return ("slice", value.start, value.stop, value.step)
    return value


def _show(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"<{str(value.dtype).removeprefix('torch.')} {list(value.shape)}>"
    if isinstance(value, slice):
        return f"{'' if value.start is None else value.start}:{'' if value.stop is None else value.stop}"
    return repr(list(value)) if isinstance(value, tuple) else repr(value)


def _positions(field: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.dtype.is_floating_point or value.dtype in (torch.bool, torch.complex64) or value.ndim not in (1, 2):
            raise WhereError(
                f"Where({field}=…): a tensor of positions is whole numbers of shape [batch] or [batch, n], "
                f"got {value.dtype} {tuple(value.shape)}; for a bool tensor use mask=…"
            )
        return value.detach().cpu()
    return _whole_numbers(field, value)


def _whole_numbers(field: str, value: Any) -> Any:
    """Normalise to None, int, slice or a tuple of ints."""
    if value is None:
        return value
    if isinstance(value, slice):
        whole = all(
            b is None or (hasattr(b, "__index__") and not isinstance(b, bool)) for b in (value.start, value.stop)
        )
        if not whole or not (value.step is None or (isinstance(value.step, int) and value.step > 0)):
            raise WhereError(f"Where({field}={value!r}): a slice needs whole numbers and a step of at least 1")
        return value
    if type(value).__module__ == "numpy" and getattr(value, "ndim", 0) == 1:
        value = value.tolist()
    if isinstance(value, bool):
        raise WhereError(f"Where({field}={value!r}): expected a whole number, got a bool")
    if hasattr(value, "__index__") and not isinstance(value, Tensor):
        return int(value)
    if isinstance(value, Sequence | range | Tensor | set | frozenset) and not isinstance(value, str):
        items = value.tolist() if isinstance(value, Tensor) else list(value)
        if isinstance(items, int):
            return items
        if not items:
            raise WhereError(f"Where({field}=[]) selects nothing; leave it out to select all")
        if all(hasattr(i, "__index__") and not isinstance(i, bool) for i in items):
            return tuple(int(i) for i in items)
    raise WhereError(f"Where({field}={value!r}): expected a whole number, a list of them or a slice")


def _listed(value: int | tuple[int, ...]) -> list[int]:
    return [value] if isinstance(value, int) else list(value)


def _indices(value: int | tuple[int, ...], n: int, word: str, place: str) -> Int[Tensor, " n"]:
    index = torch.tensor(_listed(value))
    bad = (index < -n) | (index >= n)
    if bad.any():
        raise WhereError(f"{word} {int(index[bad][0])} does not exist: there are {n} {place} (0 to {n - 1})")
    return index % n


def _rows_of(value: Tensor, frame: "Frame", field: str) -> Int[Tensor, "batch n"]:
    if value.shape[0] == frame.n_rows:
        value = value[frame.row0 : frame.row0 + frame.batch]
    if value.shape[0] != frame.batch:
        raise WhereError(f"Where({field}=…) gives positions for {value.shape[0]} rows; this batch has {frame.n_rows}")
    return value.long().reshape(frame.batch, -1)


def _absolute(
    value: Any, frame: "Frame", field: str, rows: Bool[Tensor, " batch"] | None = None
) -> Int[Tensor, "batch n"]:
    """Turn positions in each row's own tokens into columns; rows that are not meant may lack them."""
    if isinstance(value, Tensor):
        given = _rows_of(value, frame, field)
    else:
        given = torch.tensor(_listed(value)).expand(frame.batch, -1)
    lengths = frame.lengths()[:, None]
    places = torch.where(given >= 0, given, lengths + given)
    bad = (places < 0) | ((places >= lengths) & (not frame.generating))
    bad = bad if rows is None else bad & rows[:, None]
    if bad.any():
        row, place = (int(i) for i in bad.nonzero()[0])
        length = int(lengths[row])
        raise WhereError(
            f"position {int(given[row, place])} is outside row {row + frame.row0}, which has {length} tokens "
            f"(0 to {length - 1}, or -1 to -{length})"
        )
    return _to_columns(places, frame, slice(None))


def _at(
    value: Any, frame: "Frame", field: str, rows: Bool[Tensor, " batch"] | None = None
) -> Bool[Tensor, "batch total"]:
    """Which columns positions stand for; those that generation has not reached yet are left out."""
    chosen = torch.zeros(frame.batch, frame.total, dtype=torch.bool)
    if not isinstance(value, slice):
        for row, columns in enumerate(_absolute(value, frame, field, rows).tolist()):
            chosen[row, [c for c in columns if c < frame.total]] = True
        return chosen
    made = max(0, frame.total - frame.prompt_length)
    for row, length in enumerate(frame.lengths().tolist()):
        places = torch.tensor(range(length + made)[_of_prompt(value, length)], dtype=torch.long)
        columns = _to_columns(places[None], frame, slice(row, row + 1))[0]
        chosen[row, columns[columns < frame.total]] = True
    return chosen


def _to_columns(places: Int[Tensor, "rows n"], frame: "Frame", rows: slice) -> Int[Tensor, "rows n"]:
    """The columns of some rows' k-th real tokens: of the prompt first, then of what is generated after it."""
    lengths = frame.lengths()[rows, None]
    known = frame.token_columns()[rows].gather(1, places.clamp(min=0, max=frame.prompt_length - 1))
    return torch.where(places < lengths, known, frame.prompt_length + places - lengths)


def _of_prompt(value: slice, length: int) -> slice:
    """A slice whose negative ends count from the prompt's end, though a generation goes on."""

    def end(bound: int | None) -> int | None:
        return None if bound is None else max(0, length + bound) if bound < 0 else bound

    return slice(end(value.start), end(value.stop), value.step)


def _span(name: str, frame: "Frame") -> Bool[Tensor, "batch total"]:
    if name not in frame.spans:
        known = ", ".join(repr(s) for s in frame.spans) or "none"
        raise WhereError(f"this batch has no span named {name!r}; its spans are: {known}")
    span = frame.spans[name][frame.row0 : frame.row0 + frame.batch]
    full = torch.zeros(frame.batch, max(frame.total, span.shape[1]), dtype=torch.bool)
    full[:, : span.shape[1]] = span
    return full[:, : frame.total]


def _phase(phase: str, frame: "Frame") -> Bool[Tensor, "batch total"]:
    column = torch.arange(frame.total)[None].expand(frame.batch, -1)
    tests: dict[str, Callable[[], Tensor]] = {
        "prompt": lambda: column < frame.prompt_length,
        "last_prompt": lambda: column == frame.ends()[:, None],
        "generated": lambda: column >= frame.prompt_length,
    }
    return tests[phase]()
