"""Doses as rows: one forward holds several doses of a steering, each in rows of its own."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.direction import Direction, Dose, Steers
from interp.core.errors import ConfigError, WhereError
from interp.core.intervention import Intervention
from interp.core.site import Site
from interp.core.where import Where

__all__ = ["Block", "Doses", "blocks", "edits_of", "of_rows", "places_of", "quiet_at_zero", "read_doses", "takes_rows"]


class Doses(NamedTuple):
    """Doses of one unit, in the order given."""

    values: Float[Tensor, " dose"]
    unit: str


class Block(NamedTuple):
    """The rows of one forward: the same prompts once for each dose of it."""

    rows: Int[Tensor, " r"]
    doses: Int[Tensor, " r"]


def read_doses(given: Sequence[float | Dose] | Dose) -> Doses:
    """Return doses as numbers of one unit.

    Args:
        given: numbers, which are raw; `Dose`s of one unit each; or one `Dose` that holds [dose] of them.

    Raises:
        ConfigError: none, two units, one dose twice, or something that is no finite number.
    """
    if isinstance(given, Dose) and isinstance(given.value, Tensor):
        each = [Dose.of(Dose(float(v), given.unit)) for v in given.value.flatten().tolist()]
    elif isinstance(given, int | float):
        raise ConfigError(f"doses={given!r}: expected a list of numbers, such as [-1, 0, 1]")
    else:
        each = [Dose.of(d) for d in ([given] if isinstance(given, Dose) else given)]
    units = list(dict.fromkeys(d.unit for d in each))
    if len(units) != 1:
        raise ConfigError(f"doses need one unit, got {', '.join(units) or 'no dose at all'}; sweep units one by one")
    if any(isinstance(d.value, Tensor) for d in each):
        raise ConfigError("a list of doses holds one number each; a sweep puts them on rows itself")
    values = torch.tensor([float(d.value) for d in each], dtype=torch.float64)
    if not bool(values.isfinite().all()) or len(values.unique()) != len(values):
        raise ConfigError(f"doses={values.tolist()}: expected finite numbers, each once")
    return Doses(values, units[0])


def blocks(n_rows: int, n_doses: int, at_once: int) -> Iterator[Block]:
    """Go through prompts × doses in forwards of at most so many rows: as many prompts as fit, then doses.

    Args:
        n_rows: prompts.
        n_doses: doses.
        at_once: rows per forward.
    """
    prompts = min(n_rows, at_once)
    together = max(1, at_once // prompts)
    for rows in torch.arange(n_rows).split(prompts):
        for doses in torch.arange(n_doses).split(together):
            yield Block(rows.repeat(len(doses)), doses.repeat_interleave(len(rows)))


def takes_rows(steers: Steers) -> bool:
    """Whether a steering takes one dose per row; others say so by an attribute `dose_per_row`."""
    if isinstance(steers, Direction):
        return steers.operation != "ablate"
    return bool(getattr(steers, "dose_per_row", False))


def edits_of(
    steers: Steers | None, doses: Doses, block: Block, *, where: Where | None, n_rows: int
) -> list[Intervention]:
    """Return the edits of a block's rows; none where nothing steers.

    Args:
        steers: what steers, or None for the model as it is.
        doses: all doses of the sweep.
        block: which of them, on which prompts.
        where: as for the prompts, all of them; None leaves it to what steers.
        n_rows: how many prompts there are.
    """
    if steers is None:
        return []
    values = doses.values[block.doses]
    value: float | Tensor = values.float() if len(values.unique()) > 1 else float(values[0])
    dose = value if doses.unit == "raw" else Dose(value, doses.unit)
    if where is None:
        return steers.as_interventions(dose)
    return steers.as_interventions(dose, where=of_rows(where, block.rows, n_rows))


def places_of(steers: Steers) -> str:
    """Return the sites that a steering acts at, as a label."""
    sites = steers.sites if isinstance(steers, Direction) else None
    if sites is None:
        sites = list(dict.fromkeys(Site(edit.site).short for edit in steers.as_interventions(1.0)))
    return ", ".join(sites) if len(sites) < 4 else f"{sites[0]} … {sites[-1]} ({len(sites)} sites)"


@contextmanager
def quiet_at_zero(doses: Doses, block: Block) -> Iterator[None]:
    """Keep the engine from warning that a dose of 0 changes nothing."""
    if bool((doses.values[block.doses] != 0).any()):
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*changed nothing.*")
        yield


def of_rows(where: Where, rows: Int[Tensor, " r"], n_rows: int) -> Where:
    """Return the same selection for prompts that stand in other rows.

    Args:
        where: the selection.
        rows: which prompt stands in each row.
        n_rows: how many prompts the selection is about.

    Raises:
        WhereError: it names rows, or is no `Where`.
    """
    if not isinstance(where, Where):
        raise WhereError(f"where={where!r}: expected a Where, as Where(pos=-1) or Where.last_prompt()")
    if where.rows is not None:
        raise WhereError(f"{where!r}: a sweep puts prompts on rows of its own; give the prompts you mean instead")
    if where.any_of:
        return Where(any_of=tuple(of_rows(w, rows, n_rows) for w in where.any_of))
    moved: dict[str, Any] = {
        name: value[rows]
        for name in ("mask", "pos", "src")
        if isinstance(value := getattr(where, name), Tensor) and len(value) == n_rows
    }
    return replace(where, **moved) if moved else where
