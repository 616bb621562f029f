"""Where the columns of a patching sweep lie: positions or named spans of both prompts of every pair, made to match."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp.core.errors import DataError, WhereError, nearest
from interp.core.frame import Frame
from interp.core.passes import frame_of
from interp.core.text import Tokens, str_tokens
from interp.core.where import Where

__all__ = ["Places", "check_lengths", "grouped", "key_columns", "position_places", "span_places"]


@dataclass(frozen=True, eq=False)
class Places:
    """The places of a sweep in one run, and where their counterparts lie in the other.

    Args:
        labels: of each place.
        columns: the columns of the edited run that belong to each place.
        other: for each column of the edited run, the column of the other run whose activation belongs there.
    """

    labels: list[str]
    columns: Bool[Tensor, "place batch pos"]
    other: Int[Tensor, "batch pos"]

    def from_other(self, x: Tensor, axis: int = 1) -> Tensor:
        """Return the other run's activation laid out as the edited run's columns.

        Args:
            x: [batch …], its position axis at `axis`.
            axis: 1, or 2 for pattern and attn_scores, whose keys `interp.patching.entries.align_keys` lays out.
        """
        width = torch.arange(self.other.shape[1])
        if x.shape[axis] == len(width) and bool((self.other == width).all()):
            return x
        shape = [1] * x.ndim
        shape[0], shape[axis] = self.other.shape
        size = list(x.shape)
        size[axis] = self.other.shape[1]
        return x.gather(axis, self.other.to(x.device).reshape(shape).expand(size))


def position_places(edited: Tokens, other: Tokens, pos: Any, tokenizer: Any) -> Places:
    """Return one place for each position, counted from each row's first token, or back from its last.

    Args:
        edited: the run that is edited.
        other: the other one, as long row by row.
        pos: an integer, a list of them, or None for all.
        tokenizer: for labels; None shows ids.

    Raises:
        WhereError: positions that no row has.
    """
    frame, longest = frame_of(edited, 0, len(edited)), int(edited.lengths.max())
    chosen = list(range(longest)) if pos is None else list(pos) if isinstance(pos, Iterable) else [pos]
    whole = all(isinstance(p, Integral) and not isinstance(p, bool) for p in chosen)
    if not chosen or not whole or not all(-longest <= p < longest for p in chosen):
        raise WhereError(
            f"pos={pos!r}: expected whole numbers; the prompts have positions 0 … {longest - 1} (or −{longest} … −1), "
            "and named places are patched with by='span'"
        )
    even = bool((edited.lengths == longest).all())
    chosen = [int(p) % longest if even else int(p) for p in chosen]
    columns = torch.stack([_at(frame, p) for p in chosen])
    labels = [_label(p, columns[i], edited, other, tokenizer) for i, p in enumerate(chosen)]
    return Places(labels, columns, key_columns(edited, other))


def span_places(edited: Tokens, other: Tokens, names: Sequence[str] | None) -> Places:
    """Return one place for each named span; its k-th token corresponds to the k-th of the other prompt's span.

    Args:
        edited: the run that is edited.
        other: the other one; rows may differ in length outside the spans.
        names: the spans; None takes those that both sides have.

    Raises:
        DataError: no such span, or one with more tokens on one side of a pair than on the other.
    """
    known = [name for name in edited.spans if name in other.spans]
    chosen = known if names is None else list(names)
    wrong = next((name for name in chosen if name not in known), None)
    if wrong is not None or not chosen:
        hint = nearest(str(wrong), known) or f"they have {', '.join(known) or 'none'}"
        raise DataError(f"the pairs have no span {wrong!r} on both sides; {hint}")
    match = torch.zeros_like(edited.ids)
    for name in chosen:
        mine, theirs = edited.spans[name], other.spans[name]
        odd = (mine.sum(1) != theirs.sum(1)).nonzero()[:, 0]
        if len(odd):
            row = int(odd[0])
            raise DataError(
                f"span {name!r} of pair {row} has {int(mine[row].sum())} tokens in one prompt and "
                f"{int(theirs[row].sum())} in the other, so its tokens do not correspond; reword the pair"
            )
        match[mine] = theirs.nonzero()[:, 1]
    return Places(chosen, torch.stack([edited.spans[name].cpu() for name in chosen]), match.cpu())


def grouped(places: Places) -> Places:
    """Return all places as one."""
    return Places([""], places.columns.any(0, keepdim=True), places.other)


def check_lengths(tokenizer: Any, clean: Tokens, corrupted: Tokens) -> None:
    """Refuse pairs whose prompts differ in length, where positions would not correspond.

    Raises:
        DataError: shows both tokenisations.
    """
    for row, (a, b) in enumerate(zip(clean.lengths.tolist(), corrupted.lengths.tolist(), strict=True)):
        if a != b:
            shown = [" | ".join(_names(tokenizer, t.ids[row][t.mask[row]])) for t in (clean, corrupted)]
            raise DataError(
                f"the prompts of pair {row} differ in length: {a} and {b} tokens, so positions would not correspond.\n"
                f"  clean:     {shown[0]}\n  corrupted: {shown[1]}\nReword them to one length, or patch by='span'."
            )


def key_columns(edited: Tokens, other: Tokens) -> Int[Tensor, "batch pos"]:
    """Return, for each column, the other run's column of the same token number; pads get column 0."""
    rank = (edited.mask.long().cumsum(1) - 1).clamp(min=0).cpu()
    first = other.mask.int().argmax(1, keepdim=True).cpu()
    return torch.where(edited.mask.cpu(), rank + first, 0)


def _at(frame: Frame, pos: int) -> Bool[Tensor, "batch pos"]:
    """One position of every row that is long enough for it."""
    has = frame.lengths() > (pos if pos >= 0 else -pos - 1)
    return Where(pos=pos, rows=has.nonzero()[:, 0].tolist()).columns(frame)


def _label(pos: int, columns: Tensor, edited: Tokens, other: Tokens, tokenizer: Any) -> str:
    names = []
    match = key_columns(edited, other)
    for ids in (other.ids.cpu().gather(1, match)[columns], edited.ids.cpu()[columns]):
        names.append(_names(tokenizer, ids.unique()))
    if len(names[0]) != 1 or len(names[1]) != 1:
        return str(pos)
    return f"{pos}: {names[0][0]}" if names[0] == names[1] else f"{pos}: {names[0][0]} → {names[1][0]}"


def _names(tokenizer: Any, ids: Int[Tensor, " n"]) -> list[str]:
    return [str(i) for i in ids.tolist()] if tokenizer is None else str_tokens(tokenizer, ids[None])[0]
