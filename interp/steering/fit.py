"""`fit_direction`: directions in closed form, every method through one call."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.direction import Direction, SiteScale, measure_scale
from interp.core.errors import ConfigError, DataError, nearest
from interp.core.manager import HookManager
from interp.core.result import Provenance
from interp.core.site import Site
from interp.core.where import Where
from interp.data.concept_tokens import ConceptTokens
from interp.data.contrast import Contrast
from interp.data.gather import Gathered, gather
from interp.data.pairs import PromptPairs

__all__ = ["METHODS", "concept_tokens", "fit_direction"]


class Solved(NamedTuple):
    """What a method finds at one site: the vector, and figures of its fit."""

    vector: Float[Tensor, "*features"]
    stats: Mapping[str, float] = {}


def fit_direction(
    hm: HookManager,
    data: Contrast | ConceptTokens | PromptPairs,
    sites: Sequence[Site | str] | Site | str,
    *,
    method: str = "mean_difference",
    where: Where | None = None,
    pool: str = "each",
    seed: int = 0,
    batch_size: int = 32,
) -> Direction:
    """Fit a direction at sites from texts with and without a concept.

    Args:
        hm: the model.
        data: the texts; of prompt pairs the clean ones have the concept.
        sites: names or globs; each gets a vector of its own.
        method: one of `METHODS`.
        where: the token rule, as for `Contrast.tokens`; tokens that are labelled already have their own.
        pool: what one example is, as for `gather`.
        seed: of methods that draw.
        batch_size: rows per forward.

    Returns:
        The direction, in the units of the activation, with the scale of the examples along it.

    Raises:
        ConfigError: an unknown method.
        DataError: data that the method cannot be fitted on.
    """
    if method not in METHODS:
        raise ConfigError(f"method={method!r}: {nearest(method, METHODS) or 'expected one of ' + ', '.join(METHODS)}")
    tokens = concept_tokens(hm, data, where=where)
    held = gather(hm, tokens, sites, pool=pool, batch_size=batch_size)
    vectors: dict[str, Tensor] = {}
    scale: dict[str, SiteScale] = {}
    stats: dict[str, Mapping[str, float]] = {}
    for site, examples in held.items():
        solved = METHODS[method](examples, torch.Generator().manual_seed(seed))
        vectors[site], stats[site] = solved.vector, solved.stats
        scale[site] = measure_scale(examples.x, solved.vector, positive=examples.y == 1)
    settings: dict[str, Any] = {"method": method, "where": repr(where), "pool": pool, "sites": list(held)}
    return Direction(
        vectors=vectors,
        method=method,
        model=Provenance.of(
            hm, settings=settings, data=(tokens.tokens.ids, tokens.tokens.mask, tokens.labels), seed=seed
        ),
        read_at=repr(Where(pos=-1) if where is None else where),
        scale=scale,
        stats=stats,
        name=tokens.name,
        folded=hm.is_folded,
        notes=tokens.notes,
    )


def concept_tokens(
    hm: HookManager, data: Contrast | ConceptTokens | PromptPairs, *, where: Where | None = None
) -> ConceptTokens:
    """Return any form of concept data as tokens with two classes.

    Raises:
        DataError: tokens that have labels already and a rule beside, or more than two classes.
    """
    if isinstance(data, ConceptTokens):
        if where is not None:
            raise DataError("these tokens say themselves which of them are read; leave where=… out")
        if len(data.classes) != 2:
            raise DataError(f"{data.name!r} has the classes {', '.join(data.classes)}; choose one with .binary(…)")
        return data
    contrast = Contrast.of_pairs(data) if isinstance(data, PromptPairs) else data
    return contrast.tokens(hm, where=where)


def _mean_difference(examples: Gathered, draw: torch.Generator) -> Solved:
    return Solved(examples.of_class(1).mean(0) - examples.of_class(0).mean(0))


def _random(examples: Gathered, draw: torch.Generator) -> Solved:
    """A direction at random with the length of the difference of means: what a dose alone does."""
    difference = _mean_difference(examples, draw).vector
    vector = torch.randn(difference.shape, generator=draw)
    return Solved(vector * difference.norm() / vector.norm())


METHODS: Mapping[str, Callable[[Gathered, torch.Generator], Solved]] = {
    "mean_difference": _mean_difference,
    "random": _random,
}
"""Methods by name, each a function of the examples at one site."""
