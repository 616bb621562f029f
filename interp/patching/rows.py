"""Many variants of a batch as the rows of one forward: each row has values of its own at some positions and heads."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp.core.intervention import Intervention
from interp.core.place import Place
from interp.core.text import Tokens

if TYPE_CHECKING:
    from interp.core.manager import HookManager

__all__ = ["RowEdit", "repeated", "rows_within"]


@dataclass(frozen=True, eq=False)
class RowEdit(Intervention):
    """Give each row of a batch values out of a table, at positions and heads of its own; hold it elsewhere if asked.

    Args:
        value: the table [entry pos *features].
        take: the entry of each row.
        pick: where a row gets it, [row pos] or, at sites with heads, [row pos head].
        hold: what stands where it does not, [entry pos *features]; None leaves what the forward computes.
        hold_take: the entry of `hold` of each row.
    """

    value: Tensor
    take: Int[Tensor, " row"]
    pick: Bool[Tensor, "row pos *head"]
    hold: Tensor | None = None
    hold_take: Int[Tensor, " row"] | None = None

    @property
    def may_do_nothing(self) -> bool:
        """Rows whose value is as it was are counted by the caller."""
        return True

    def edit(self, x: Tensor, place: Place) -> Tensor:
        """Return the rows' own values."""
        part = slice(place.frame.row0, place.frame.row0 + len(x))
        rest = x
        if self.hold is not None and self.hold_take is not None:
            rest = _entries(self.hold, self.hold_take[part], x)
        pick = self.pick[part].to(x.device)
        new = _entries(self.value, self.take[part], x)
        return torch.where(pick[(...,) + (None,) * (x.ndim - pick.ndim)], new, rest)


def _entries(table: Tensor, index: Tensor, like: Tensor) -> Tensor:
    return table.to(like.device).index_select(0, index.to(like.device)).to(like.dtype)


def repeated(tokens: Tokens, times: int) -> Tokens:
    """Return a batch several times over, one copy after another, without its spans."""
    positions = None if tokens.position_ids is None else tokens.position_ids.repeat(times, 1)
    ids, mask = tokens.ids.repeat(times, 1), tokens.mask.repeat(times, 1)
    return replace(tokens, ids=ids, mask=mask, spans={}, position_ids=positions)


def rows_within(hm: "HookManager", width: int, max_bytes: int, *, recorded: int = 0) -> int:
    """Return how many rows of a forward fit a number of bytes, at least one.

    A row is counted as bytes per number × (width × (8 d_model + 3 d_mlp + 2 n_heads width + recorded) + d_vocab).

    Args:
        hm: the model.
        width: positions of a row.
        max_bytes: the budget.
        recorded: numbers that are kept of each position.
    """
    per_position = 8 * hm.d_model + 3 * (hm.d_mlp or 4 * hm.d_model) + 2 * hm.n_heads * width + recorded
    return max(1, max_bytes // (hm.dtype.itemsize * (width * per_position + hm.d_vocab)))
