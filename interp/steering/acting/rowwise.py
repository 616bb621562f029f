"""Another vector and dose for every row of one batch: many steered variants in one forward."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from interp.core.conditional import Gated, KeepNorm
from interp.core.dose import Dose, Steers
from interp.core.errors import ConfigError, DataError
from interp.core.intervention import Add, Intervention
from interp.core.site import Site
from interp.core.where import Where

__all__ = ["rowwise"]

_Row = Steers | Sequence[Steers] | None


def rowwise(
    steers: Sequence[_Row],
    doses: "float | Dose | Sequence[float | Dose]" = 1.0,
    *,
    where: Where | None = None,
) -> list[Intervention]:
    """Return edits that steer each row of a batch by its own; what a row gets is what it would get alone.

    Added vectors are laid together, one edit a site with vectors [batch *features]; other edits are made for their row
    alone. Several that act on one position act one after the other, in the order given: none is dropped.

    Args:
        steers: for each row what steers it, several things, or None for a row that is left as it is.
        doses: one for all, or one per row.
        where: the positions, as for `Direction.as_interventions`; without rows.

    Returns:
        Edits for a batch of exactly these rows, in this order.

    Raises:
        ConfigError: doses for another number of rows, a dose per row within a row, something that does not steer, or
            `where` with rows.
        DataError: no row is steered.
    """
    if hasattr(steers, "as_interventions"):
        raise ConfigError("one thing steers all rows; give a list with what steers each row, or None")
    n = len(steers)
    given = [doses] * n if isinstance(doses, int | float | Dose) else list(doses)
    if len(given) != n:
        raise ConfigError(f"{len(given)} doses for {n} rows; give one for all, or one per row")
    if where is not None and not isinstance(where, Where):
        raise ConfigError(f"where={where!r}: expected a Where, as Where(pos=-1)")
    if where is not None and where.selects_rows:
        raise ConfigError(f"{where!r} selects rows, which are the rows of this list here; leave rows out")
    slots: dict[tuple[str, int], dict[int, Intervention]] = {}
    for row, (steer, dose) in enumerate(zip(steers, given, strict=True)):
        if isinstance(Dose.of(dose).value, Tensor):
            raise ConfigError(f"row {row} has a dose per row; give each row one number")
        several = () if steer is None else (steer,) if hasattr(steer, "as_interventions") else tuple(steer)
        wrong = next((type(s).__name__ for s in several if not hasattr(s, "as_interventions")), None)
        if wrong is not None:
            raise ConfigError(f"row {row} holds {wrong}, which has no as_interventions; give what steers, or None")
        depth: dict[str, int] = {}
        for edit in (e for s in several for e in s.as_interventions(dose, where=where)):
            at = edit.site.short if isinstance(edit.site, Site) else str(edit.site)
            slots.setdefault((at, depth.get(at, 0)), {})[row] = edit
            depth[at] = depth.get(at, 0) + 1
    if not slots:
        raise DataError("no row is steered; give something with as_interventions for one row at least")
    made: list[Intervention] = []
    for (_, _), edits in sorted(slots.items(), key=lambda item: item[0][1]):  # a row's edits in its own order
        made.extend(_together(edits, n))
    return made


def _together(edits: dict[int, Intervention], n: int) -> list[Intervention]:
    """The edits of one site, at most one per row: added vectors with one selection as one edit."""
    made: list[Intervention] = []
    groups: dict[Where, dict[int, Add]] = {}
    for row, edit in edits.items():
        if _plain(edit):
            groups.setdefault(edit.selection, {})[row] = edit  # type: ignore[assignment]
        else:
            made.append(_for_row(edit, row))
    for where, adds in groups.items():
        first = next(iter(adds.values()))
        vectors = first.vector.new_zeros(n, *first.vector.shape)
        scales = torch.zeros(n, dtype=torch.float64)
        for row, add in adds.items():
            vectors[row], scales[row] = add.vector, float(add.scale)
        # A list of one row would be read as one vector for all of them.
        place = where if len(adds) == n > 1 else _rows(where, tuple(adds))
        made.append(replace(first, vector=vectors, scale=scales, where=place))
    return made


def _plain(edit: Intervention) -> bool:
    if not isinstance(edit, Add) or not isinstance(edit.vector, Tensor):
        return False
    one = not isinstance(edit.scale, Tensor) or edit.scale.ndim == 0
    site = Site(edit.site)
    return one and edit.vector.ndim == len(site.axes) - 2 and not edit.where.selects_rows


def _for_row(edit: Intervention, row: int) -> Intervention:
    if isinstance(edit, KeepNorm | Gated):
        return replace(edit, inner=_for_row(edit.inner, row))
    if "where" not in [f.name for f in fields(edit)]:
        raise ConfigError(f"{type(edit).__name__} acts on whole batches and cannot be made for row {row} alone")
    held: Any = edit
    if held.where.selects_rows:
        raise ConfigError(f"{type(edit).__name__} at {Site(edit.site).short} selects rows of its own: {held.where!r}")
    return replace(held, where=_rows(held.where, (row,)))


def _rows(where: Where, rows: tuple[int, ...]) -> Where:
    if where.any_of:
        return Where(any_of=tuple(replace(part, rows=rows) for part in where.any_of))
    return replace(where, rows=rows)
