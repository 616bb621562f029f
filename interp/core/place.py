"""`Place`: one site in one forward pass, and how selections and values line up with its tensor."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp.core.errors import ShapeError, WhereError
from interp.core.frame import Frame
from interp.core.site import Site
from interp.core.where import Where

__all__ = ["KEY_SITES", "Place", "first_column"]

KEY_SITES = ("rot_k",)
"""Sites whose position axis runs over keys, cached ones included."""


def first_column(site: Site, frame: Frame, n: int) -> int:
    """Return the column that a site's position axis of length n begins at; keys end at the newest token."""
    return max(0, frame.total - n) if site.kind in KEY_SITES else frame.offset


@dataclass(frozen=True)
class Place:
    """A site, the tokens that the current forward holds, and the selection of one edit there."""

    site: Site
    frame: Frame
    where: Where
    decisions: Mapping[Any, Any] = field(default_factory=dict)
    """What gates decided in this run; see `interp.core.gate`."""

    def columns(self, n: int) -> slice:
        """Which columns the site's position axis of length n covers."""
        first = first_column(self.site, self.frame, n)
        return slice(first, first + n)

    def select(self, x: Tensor) -> Bool[Tensor, "..."] | None:
        """Return what the edit may change, broadcastable to x, or None for everything.

        Raises:
            WhereError: a head, row or position that does not exist.
        """
        axes, frame, where = self.site.axes, self.frame, self.where
        heads = self._heads(x)
        chosen, _, everything = self.covered(x.shape[axes.index("pos")])
        if everything and where.src is None and heads is None:
            return None
        shape = [1] * x.ndim
        shape[0], shape[axes.index("pos")] = chosen.shape
        mask = chosen.reshape(shape)
        if heads is not None:
            axis = self._head_axis()
            on = torch.zeros(x.shape[axis], dtype=torch.bool)
            on[heads] = True
            mask = mask & on.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
        src = where.src_columns(frame)
        if src is not None:
            if "src" not in axes:
                raise WhereError(
                    f"Where(src=…) is for pattern and attn_scores; {self.site.short} has axes {' '.join(axes)}"
                )
            src = src[:, max(0, frame.total - x.shape[-1]) :]
            mask = mask & src.reshape(src.shape[0], *[1] * (x.ndim - 2), src.shape[1])
        return mask.to(x.device, non_blocking=True)

    def covered(self, n: int) -> tuple[Bool[Tensor, "batch pos"], bool, bool]:
        """Return which of the site's n positions are selected, whether any is, and whether all are.

        Decided on the CPU, once a forward for all sites that share the selection.
        """
        columns, where, frame = self.columns(n), self.where, self.frame

        def find() -> tuple[Tensor, bool, bool]:
            chosen = where.columns(frame)[:, columns]
            return chosen, bool(chosen.any()), bool(chosen.all())

        return frame.memo(("covered", columns.start, columns.stop, where), find)

    def _head_axis(self) -> int:
        return next(i for i, axis in enumerate(self.site.axes) if axis in ("n_heads", "n_kv_heads"))

    def _heads(self, x: Tensor) -> list[int] | None:
        return None if self.where.head is None else self.where.heads(x.shape[self._head_axis()], self.site.short)

    def fit(self, value: Any, x: Tensor, who: str) -> Tensor:
        """Return a value broadcastable to x; see the text of `interp.core.intervention` for the shapes.

        Raises:
            ShapeError: no reading of its shape fits the site.
        """
        if not isinstance(value, Tensor):
            value = value[Site(self.site.short)]
        plain = value.shape == x.shape[2:] and self.site.axes[1] == "pos" and self.where.head is None
        if plain and value.dtype == x.dtype and value.device == x.device:
            return value  # one value for every row and position, as steering adds at every step
        value = value.to(device=x.device, dtype=x.dtype, non_blocking=True)
        if self.site.axes[1] != "pos":
            return self._fit_square(value, x, who)
        features = tuple(x.shape[2:])
        options = [value]
        if len(features) == 2 and (value.ndim == 1 or (isinstance(self.where.head, int) and value.ndim > 1)):
            options.append(value.unsqueeze(-2))  # the head axis left out
        found = [placed for v in options if (placed := self._lead(v, x, features)) is not None]
        whole = f"{list(features)}, [batch, {', '.join(map(str, features))}] or {list(x.shape)}"
        if len(found) == 1 or (found and torch.equal(*(f.broadcast_to(x.shape) for f in found))):
            return found[0]
        if found:
            raise ShapeError(
                f"{who} at {self.site.short}: shape {tuple(value.shape)} reads in two ways here; give {whole}"
            )
        raise ShapeError(
            f"{who} at {self.site.short}: got shape {tuple(value.shape)}; the activation is {tuple(x.shape)} "
            f"[{' '.join(self.site.axes)}], so give {whole}"
        )

    def _lead(self, value: Tensor, x: Tensor, features: tuple[int, ...]) -> Tensor | None:
        """Line up leading axes: none, [batch], [batch, pos] or [batch, n selected]; None when it does not fit."""
        frame, n_features = self.frame, len(features)
        lead, tail = value.shape[: value.ndim - n_features], value.shape[value.ndim - n_features :]
        if value.ndim < n_features or any(t not in (1, f) for t, f in zip(tail, features, strict=True)):
            return None
        if not lead:
            return value
        if len(lead) > 2 or lead[0] not in (1, frame.n_rows):
            return None
        if lead[0] == frame.n_rows:
            value = value[frame.row0 : frame.row0 + frame.batch]
        if len(lead) == 1:
            return value.unsqueeze(1)
        if lead[1] == 1:
            return value
        columns = self.columns(x.shape[1])
        if lead[1] in (frame.prompt_length, frame.total):
            moved = lead[1] == frame.prompt_length and value.shape[0] == frame.batch
            part = (frame.moved(value) if moved else value)[:, columns]
            if part.shape[1] == x.shape[1]:
                return part
            outside = self.where.columns(frame)[:, columns][:, part.shape[1] :]
            if bool(outside.any()):
                raise ShapeError(
                    f"at {self.site.short}: values are given for {lead[1]} positions, but position {frame.total - 1} "
                    "is edited too; restrict the edit with where=Where.prompt()"
                )
            return torch.cat([part, x.new_zeros(part.shape[0], x.shape[1] - part.shape[1], *part.shape[2:])], dim=1)
        rank = self._ranks(lead[1], columns)
        if rank is None:
            return None
        rank = rank.to(value.device)
        index = rank.reshape(*rank.shape, *[1] * n_features).expand(*rank.shape, *value.shape[2:])
        return value.expand(frame.batch, *value.shape[1:]).gather(1, index)

    def _ranks(self, n: int, columns: slice) -> Int[Tensor, "batch pos"] | None:
        """For each column, which of n values per row is meant for it; None when the selection is not of n."""
        where, frame = self.where, self.frame
        width = columns.stop - columns.start
        if isinstance(where.pos, tuple | Tensor) and not where.flattens:  # values come in the order of the positions
            asked = where.asked_columns(frame) - columns.start
            if asked.shape[1] != n:
                return None
            inside = (asked >= 0) & (asked < width)
            ranks = torch.zeros(frame.batch, width + 1, dtype=torch.long)
            ranks.scatter_(1, torch.where(inside, asked, width), torch.arange(n).expand(frame.batch, -1))
            return ranks[:, :width]
        chosen = where.columns(frame)[:, columns]
        counts = chosen.sum(1)
        return (chosen.cumsum(1) - 1).clamp(min=0) if bool(((counts == n) | (counts == 0)).all()) else None

    def _fit_square(self, value: Tensor, x: Tensor, who: str) -> Tensor:
        """Values for pattern and attn_scores: [pos src], with heads, whole, or [batch pos src] for one head."""
        if value.ndim == 4 and value.shape[0] == self.frame.n_rows:
            value = value[self.frame.row0 : self.frame.row0 + self.frame.batch]
        per_row = value.ndim == 3 and isinstance(self.where.head, int) and value.shape[0] == self.frame.n_rows
        if per_row and value.shape[0] == x.shape[1] > 1:
            raise ShapeError(
                f"{who} at {self.site.short}: shape {tuple(value.shape)} reads in two ways here ([batch pos src] or "
                "[n_heads pos src]); give [batch, 1, pos, src] or the whole"
            )
        if per_row:
            value = value[self.frame.row0 : self.frame.row0 + self.frame.batch, None]
        try:
            torch.broadcast_shapes(value.shape, x.shape)
            fits = value.ndim <= 4 and all(
                v in (1, n) for v, n in zip(value.shape[::-1], tuple(x.shape)[::-1], strict=False)
            )
        except RuntimeError:
            fits = False
        if not fits:
            raise ShapeError(
                f"{who} at {self.site.short}: got {tuple(value.shape)}; the activation is {tuple(x.shape)} "
                f"[{' '.join(self.site.axes)}]"
            )
        return value

    def per_row(self, value: Any, x: Tensor, who: str) -> Any:
        """Return a coefficient as a number, or as a tensor [batch, 1, …] when there is one per row."""
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value if not isinstance(value, Tensor) else value.to(x.device, x.dtype)
        frame = self.frame
        if value.shape[0] != frame.n_rows:
            raise ShapeError(
                f"{who} at {self.site.short}: a coefficient per row has {value.shape[0]} values; the batch has "
                f"{frame.n_rows} rows"
            )
        part = value[frame.row0 : frame.row0 + frame.batch].to(x.device, x.dtype, non_blocking=True)
        return part.reshape(-1, *[1] * (x.ndim - 1))

    def needs_width(self, value: Tensor, x: Tensor, who: str) -> None:
        """Refuse a direction or matrix whose last axis is not the site's."""
        if value.shape[-1] != x.shape[-1]:
            raise ShapeError(
                f"{who} at {self.site.short}: width {value.shape[-1]}, but the activation's last axis is {x.shape[-1]} "
                f"[{' '.join(self.site.axes)}]"
            )

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean over selected, non-pad rows and positions, the other axes kept."""
        axis = self.site.axes.index("pos")
        chosen = self.where.columns(self.frame)[:, self.columns(x.shape[axis])]
        n = int(chosen.sum())
        if n == 0:
            return x
        weight = chosen.to(x.device).reshape(
            [x.shape[0] if i == 0 else x.shape[axis] if i == axis else 1 for i in range(x.ndim)]
        )
        total = (
            torch.where(weight, x, torch.zeros((), device=x.device, dtype=x.dtype)).float().sum((0, axis), keepdim=True)
        )
        return (total / n).to(x.dtype)

    def derangement(self, seed: int) -> Int[Tensor, " batch"]:
        """Return a permutation of the rows without fixed points: a seeded cyclic shift of a seeded order."""
        n = self.frame.batch
        if n < 2:
            raise WhereError(
                "Ablate('resample') takes another row's activation, but this batch has one row; use Replace"
            )
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        perm = torch.empty(n, dtype=torch.long)
        perm[order] = order.roll(1)
        return perm
