"""What is swept: each steering at each of its sites with all doses, and the random directions beside."""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch

from interp.core.direction import Direction, Steers
from interp.core.errors import ConfigError
from interp.core.manager import HookManager
from interp.steering.evaluating.dose_rows import Doses, places_of

__all__ = ["UNSTEERED", "Line", "lines_of", "random_like"]

UNSTEERED = "unsteered"
"""What results call the model as it is."""


class Line(NamedTuple):
    """One steering at one place, at all its doses."""

    name: str
    site: str
    steers: Steers
    doses: Doses
    control: bool


def lines_of(
    hm: HookManager,
    steers: Steers | Mapping[str, Steers],
    doses: Doses,
    *,
    controls: int = 0,
    together: bool = False,
    seed: int = 0,
) -> list[Line]:
    """Return what is swept, site by site, with its controls after it.

    Args:
        hm: the model.
        steers: what steers, or several by name.
        doses: the doses; an ablation is taken once, at dose 1.
        controls: random directions beside each direction, at every site other ones.
        together: keep the sites of a direction together.
        seed: of the random directions.

    Raises:
        ConfigError: nothing that steers, a name that is taken, or two lines of one name at one place.
        ModelError: a direction of another model.
    """
    named = dict(steers) if isinstance(steers, Mapping) else {_name(steers): steers}
    if not named:
        raise ConfigError("there is nothing that steers; give a Direction, or several by name")
    if UNSTEERED in named:
        raise ConfigError(f"{UNSTEERED!r} is what results call the model as it is; choose another name")
    found: list[Line] = []
    for name, one in named.items():
        if not callable(getattr(one, "as_interventions", None)):
            raise ConfigError(f"{name!r} is {type(one).__name__}, which has no as_interventions; give what steers")
        if not isinstance(one, Direction):
            found.append(Line(str(name), places_of(one), one, doses, control=False))
            continue
        one.check(hm)
        own = doses if one.operation != "ablate" else Doses(torch.ones(1, dtype=torch.float64), "raw")
        for part in [one] if together else one.each():
            found.append(Line(str(name), places_of(part), part, own, control=False))
            for number in range(controls):
                random = random_like(part, seed=seed + len(found))
                found.append(Line(f"random {number + 1} of {name}", places_of(part), random, own, control=True))
    taken = [(line.name, line.site) for line in found]
    if len(set(taken)) < len(taken):
        raise ConfigError(f"two lines are called alike: {sorted({t for t in taken if taken.count(t) > 1})}")
    return found


def random_like(direction: Direction, *, seed: int = 0, name: str | None = None) -> Direction:
    """Return a random direction of the same length at each site: the control that every dose is held to.

    A dose of it moves the activation as far as the same dose of the direction does, in every unit.

    Args:
        direction: the direction.
        seed: of the draw.
        name: what it is called.
    """
    draw = torch.Generator().manual_seed(seed)
    vectors = {}
    for site, v in direction.vectors.items():
        random = torch.randn(v.shape, generator=draw)
        vectors[site] = random * (v.norm() / random.norm())
    return replace(direction, vectors=vectors, method="random", stats={}, name=name or f"random of {direction.name}")


def _name(steers: object) -> str:
    name = getattr(steers, "name", None)
    return name if isinstance(name, str) and name else type(steers).__name__
