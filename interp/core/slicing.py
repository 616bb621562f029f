"""Slices of activations, taken inside the hook so that only what was asked for is kept."""

from typing import Any

import torch
from torch import Tensor

from interp.core.errors import WhereError
from interp.core.frame import Frame
from interp.core.place import first_column
from interp.core.site import Site
from interp.core.where import Where

__all__ = ["take"]


def take(x: Tensor, site: Site, frame: Frame, rows: Tensor | None = None) -> Tensor:
    """Return the part of an activation that a site's `.at(…)` asks for.

    An integer drops its axis, a list or slice keeps it; a mask, token ids or a phase flatten batch and position into
    one axis [n, …].

    Args:
        x: the whole activation, in the site's axes.
        site: the site with its slice.
        frame: the tokens.
        rows: columns [batch n] that x's position axis holds, if it was computed for the slice's positions only.

    Raises:
        WhereError: the slice does not fit this batch.
    """
    where = site.where
    if where is None or where.is_all:
        return x
    axes = list(site.axes)
    if where.any_of or where.name:
        raise WhereError(f"{site!r}: a read slice takes pos, head, rows, src or mask; for spans and unions use mask=…")
    x, axes = _heads(x, axes, site)
    if where.src is not None:
        x, axes = _src(x, axes, site, frame)
    if where.flattens:
        return _flat(x, axes, site, frame)
    if where.pos is not None:
        x, axes = _positions(x, axes, site, frame, rows)
    if where.rows is not None:
        x = _rows(x, site, frame)
    return x


def _heads(x: Tensor, axes: list[str], site: Site) -> tuple[Tensor, list[str]]:
    where = site.where
    assert where is not None
    if where.head is None:
        return x, axes
    axis = next((i for i, a in enumerate(axes) if a in ("n_heads", "n_kv_heads")), None)
    if axis is None:
        raise WhereError(f"{site!r}: {site.short} has no heads; its axes are {' '.join(site.axes)}")
    index = where.heads(x.shape[axis], site.short)
    assert index is not None
    if isinstance(where.head, int):
        return x.select(axis, index[0]), [a for i, a in enumerate(axes) if i != axis]
    return x.index_select(axis, _index(index, x)), axes


def _index(index: Any, x: Tensor) -> Tensor:
    return torch.as_tensor(index, dtype=torch.long).to(x.device, non_blocking=True)


def _src(x: Tensor, axes: list[str], site: Site, frame: Frame) -> tuple[Tensor, list[str]]:
    where = site.where
    assert where is not None
    if "src" not in axes:
        raise WhereError(f"{site!r}: src=… is for pattern and attn_scores; {site.short} has axes {' '.join(site.axes)}")
    columns = Where(pos=where.src).read_columns(frame)
    axis = axes.index("src")
    assert axis == x.ndim - 1
    index = _index(columns, x).reshape(columns.shape[0], *[1] * (x.ndim - 2), columns.shape[1])
    part = x.gather(axis, index.expand(*x.shape[:-1], columns.shape[1]))
    if isinstance(where.src, int) or (isinstance(where.src, Tensor) and where.src.ndim == 1):
        return part.squeeze(axis), [a for a in axes if a != "src"]
    return part, axes


def _flat(x: Tensor, axes: list[str], site: Site, frame: Frame) -> Tensor:
    where = site.where
    assert where is not None
    axis = axes.index("pos")
    start = first_column(site, frame, x.shape[axis])
    chosen = where.columns(frame)[:, start : start + x.shape[axis]]
    rows, columns = chosen.nonzero(as_tuple=True)
    moved = x.movedim(axis, 1)
    index = rows * moved.shape[1] + columns
    return moved.reshape(-1, *moved.shape[2:]).index_select(0, _index(index, x))


def _positions(x: Tensor, axes: list[str], site: Site, frame: Frame, rows: Tensor | None) -> tuple[Tensor, list[str]]:
    where = site.where
    assert where is not None
    axis = axes.index("pos")
    per_row = isinstance(where.pos, int) or (isinstance(where.pos, Tensor) and where.pos.ndim == 1)
    if rows is not None:
        return (x.squeeze(axis), [a for a in axes if a != "pos"]) if per_row else (x, axes)
    start = first_column(site, frame, x.shape[axis])
    columns = where.read_columns(frame) - start
    if bool(((columns < 0) | (columns >= x.shape[axis])).any()):
        raise WhereError(
            f"{site!r}: this forward holds columns {start} to {start + x.shape[axis] - 1} only; read all and slice"
        )
    if bool((columns == columns[:1]).all()):
        part = x.select(axis, int(columns[0, 0])) if per_row else x.index_select(axis, _index(columns[0], x))
        return part, ([a for a in axes if a != "pos"] if per_row else axes)
    moved = x.movedim(axis, 1)
    index = _index(columns, x).reshape(*columns.shape, *[1] * (moved.ndim - 2)).expand(*columns.shape, *moved.shape[2:])
    part = moved.gather(1, index)
    if per_row:
        return part.squeeze(1), [a for a in axes if a != "pos"]
    return part.movedim(1, axis), axes


def _rows(x: Tensor, site: Site, frame: Frame) -> Tensor:
    where = site.where
    assert where is not None
    rows, whole = where.rows, frame.batch == frame.n_rows
    order = [r % frame.n_rows for r in rows] if isinstance(rows, tuple) else []
    if order and whole:
        return x.index_select(0, _index(order, x))
    if order != sorted(set(order)):
        raise WhereError(
            f"{site!r}: a batch run in parts gives rows in its own order; sort them, or leave batch_size out"
        )
    chosen = where.row_mask(frame).nonzero()[:, 0]
    part = x.index_select(0, _index(chosen, x))
    # A part of a split batch may hold none of the rows; the joined result loses the axis then.
    return part.squeeze(0) if isinstance(rows, int) and whole else part
