"""`fit_direction`: directions in closed form, every method through one call."""

import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
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
from interp.steering.fitting.methods import METHODS, OF_VARIANCE, PAIRED, solve

__all__ = ["METHODS", "check_method", "concept_tokens", "direction_of", "fit_direction", "relabelled", "telling"]

# Below this cosine with the difference of means a component of variance is about something else.
_ASTRAY = 0.5


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

    Methods: "mean_difference" (CAA's, which keeps its length), "pca" (first singular vector of the differences of
    pairs, not centred), "pca_centred" (to compare with: centring takes the concept off), "lat" (of normalised
    differences of random pairs), "logistic", "mass_mean" and "lda" (inverse covariance within the classes times the
    difference of means; the latter shrunk), "random", and "shuffled" (difference of means under labels that say
    nothing). Every vector points to the class with the concept, except the last two, and has the length of the
    difference of means: a raw dose is one size of edit, whatever the method.

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
        The direction, in the units of the activation, with the scale of the examples along it; `stats` as in
        `interp.steering.fitting.methods.diagnose`, "explained" (share of the sum of squares) of methods of variance.

    Warns:
        UserWarning: a method of variance gives a vector whose cosine with the difference of means is below 0.5.

    Raises:
        ConfigError: an unknown method.
        DataError: data that the method cannot be fitted on.

    Source: Rimsky et al., arXiv 2312.06681 (mean_difference); Zou et al., arXiv 2310.01405 (lat; departure: no
        centring, and the sign is that of the labels); Marks and Tegmark, arXiv 2310.06824 (mass_mean).
    """
    tokens = concept_tokens(hm, data, where=where)
    check_method(method, tokens)
    held = gather(hm, tokens, sites, pool=pool, batch_size=batch_size)
    tokens, held = telling(tokens, held)
    return direction_of(hm, tokens, held, method=method, where=where, pool=pool, seed=seed)


def telling(tokens: ConceptTokens, held: Mapping[str, Gathered]) -> tuple[ConceptTokens, Mapping[str, Gathered]]:
    """Return the sites where the two classes differ, with a note in the data on those that are left out.

    Before the first attention every text that ends in one token looks alike there; that need not stop the other sites.
    Where no site tells them apart all are returned, and the fit says what is wrong.

    Args:
        tokens: the data.
        held: its examples, by site.
    """
    alike = [
        s for s, e in held.items() if bool((e.of_class(1).double().mean(0) == e.of_class(0).double().mean(0)).all())
    ]
    if not alike or len(alike) == len(held):
        return tokens, held
    note = f"left out: {', '.join(alike)}, where both classes have one mean activation"
    return replace(tokens, notes=(*tokens.notes, note)), {s: e for s, e in held.items() if s not in alike}


def direction_of(
    hm: HookManager,
    tokens: ConceptTokens,
    held: Mapping[str, Gathered],
    *,
    method: str,
    where: Where | None = None,
    pool: str = "each",
    seed: int = 0,
) -> Direction:
    """Fit a direction on activations that were gathered already; as `fit_direction`.

    Args:
        hm: the model that they are of.
        tokens: the data that they are of.
        held: examples by site.
        method, where, pool, seed: as for `fit_direction`.
    """
    blind = tokens.shuffled(seed=seed) if method == "shuffled" else tokens
    vectors: dict[str, Tensor] = {}
    scale: dict[str, SiteScale] = {}
    stats: dict[str, Mapping[str, float]] = {}
    for site, examples in held.items():
        draw = torch.Generator().manual_seed(zlib.crc32(f"{seed} {site}".encode()))
        seen = relabelled(examples, blind, pool) if blind is not tokens else examples
        try:
            found = solve(seen, method, draw)
        except DataError as err:
            raise DataError(f"{site}: {err}") from None
        vectors[site], stats[site] = found.vector, found.stats
        if blind is not tokens:
            vectors[site] = found.vector * _length(examples) / found.vector.norm()
        scale[site] = measure_scale(examples.x, found.vector, positive=examples.y == 1)
    _warn_astray(method, stats)
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


def check_method(method: str, tokens: ConceptTokens) -> None:
    """Refuse a method that is unknown or that these data cannot be used for.

    Raises:
        ConfigError: an unknown method.
        DataError: one class alone, or no pairs where the method needs them.
    """
    if method not in METHODS:
        raise ConfigError(f"method={method!r}: {nearest(method, METHODS) or 'expected one of ' + ', '.join(METHODS)}")
    for code, name in enumerate(tokens.classes):
        if not bool((tokens.labels == code).any()):
            raise DataError(f"{tokens.name!r} has no token of the class {name!r}; a direction needs both")
    if method in PAIRED and tokens.pairs is None:
        others = ", ".join(m for m in METHODS if m not in PAIRED)
        raise DataError(f"method={method!r} needs pairs, and {tokens.name!r} has none; use one of {others}")


def relabelled(examples: Gathered, tokens: ConceptTokens, pool: str) -> Gathered:
    """Return the same examples with the labels of other `ConceptTokens`, in which the same tokens are read."""
    y = tokens.labels[tokens.read] if pool == "each" else tokens.labels.max(1).values
    return replace(examples, y=y)


def concept_tokens(
    hm: HookManager, data: Contrast | ConceptTokens | PromptPairs, *, where: Where | None = None
) -> ConceptTokens:
    """Return any form of concept data as tokens with two classes.

    Raises:
        DataError: something else, tokens that have labels already and a rule beside, or more than two classes.
    """
    if isinstance(data, ConceptTokens):
        if where is not None:
            raise DataError("these tokens say themselves which of them are read; leave where=… out")
        if len(data.classes) != 2:
            raise DataError(f"{data.name!r} has the classes {', '.join(data.classes)}; choose one with .binary(…)")
        return data
    contrast = Contrast.of_pairs(data) if isinstance(data, PromptPairs) else data
    if not isinstance(contrast, Contrast):
        raise DataError(
            f"data is {type(data).__name__}; give a Contrast (Contrast.make(positive, negative)), PromptPairs or "
            "ConceptTokens"
        )
    return contrast.tokens(hm, where=where)


def _length(examples: Gathered) -> Tensor:
    return (examples.of_class(1).mean(0) - examples.of_class(0).mean(0)).norm()


def _warn_astray(method: str, stats: Mapping[str, Mapping[str, float]]) -> None:
    low = [f"{site} {held['cosine']:.2f}" for site, held in stats.items() if abs(held["cosine"]) < _ASTRAY]
    if method not in OF_VARIANCE or not low:
        return
    why = "it centres the differences of pairs, which takes off what they have in common, the concept" * (
        method == "pca_centred"
    )
    warnings.warn(
        f"method={method!r} found something else than the concept: its cosine with the difference of means is "
        f"{', '.join(low[:6])}{', …' if len(low) > 6 else ''}; "
        f"{why or 'another axis varies more'}. Use mean_difference, or lda",
        stacklevel=4,
    )
