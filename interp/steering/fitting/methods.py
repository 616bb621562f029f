"""Directions of one site from labelled activations: every method as a function of the examples."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.errors import DataError
from interp.core.fit import lda, logistic, mass_mean, principal
from interp.data.gather import Gathered

__all__ = ["METHODS", "OF_VARIANCE", "PAIRED", "Solved", "diagnose", "solve"]

PAIRED = ("pca", "pca_centred")
"""Methods that need pairs."""

OF_VARIANCE = ("lat", "pca", "pca_centred")
"""Methods that follow whatever varies most, which need not be the concept."""


class Solved(NamedTuple):
    """What a method finds at one site: the vector, and figures of its fit."""

    vector: Float[Tensor, "*features"]
    stats: Mapping[str, float] = {}


def solve(examples: Gathered, method: str, draw: torch.Generator) -> Solved:
    """Return a method's direction at one site, with its diagnostics.

    Raises:
        DataError: classes with one mean, or data that the method cannot be fitted on.
    """
    difference = _difference(examples)
    if not float(difference.norm()) > 0:
        raise DataError("the two classes have the same mean activation, so there is no direction between them")
    found = METHODS[method](examples, draw)
    vector = found.vector.reshape(-1).double()
    vector = vector * (difference.norm() / vector.norm())
    stats = {**diagnose(examples, vector), **found.stats}
    return Solved(vector.float().reshape(examples.x.shape[1:]), stats)


def diagnose(examples: Gathered, vector: Float[Tensor, "*features"]) -> dict[str, float]:
    """Return figures that say how good a direction the examples allow.

    Args:
        examples: of one site, with two classes.
        vector: the direction.

    Returns:
        norm: length of the difference of means.
        relative_norm: that over the root mean square norm of the activations.
        cosine: of the vector with the difference of means.
        separation: distance of the class means along the vector over the standard deviation within the classes; NaN
            where they do not vary.
        consistency: mean cosine of the differences of pairs with their mean; NaN without pairs.

    Source: Braun et al., "Understanding (Un)Reliability of Steering Vectors in Language Models", arXiv 2505.22637:
        consistency and separation predict how well a direction steers.
    """
    flat, v = examples.x.reshape(len(examples), -1).double(), vector.reshape(-1).double()
    difference = _difference(examples)
    along = flat @ (v / v.norm())
    y = examples.y == 1
    one, zero = along[y].mean(), along[~y].mean()
    within = float((along - torch.where(y, one, zero)).square().mean().sqrt())
    consistency = math.nan
    if bool((examples.pair >= 0).all()):
        pairs = examples.differences().reshape(-1, flat.shape[1]).double()
        consistency = float(torch.cosine_similarity(pairs, pairs.mean(0, keepdim=True)).mean())
    return {
        "norm": float(difference.norm()),
        "relative_norm": float(difference.norm() / flat.square().sum(1).mean().sqrt()),
        "cosine": float(torch.cosine_similarity(v, difference, dim=0)),
        "separation": float(one - zero) / within if within > 0 else math.nan,
        "consistency": consistency,
    }


def _difference(examples: Gathered) -> Float[Tensor, " d"]:
    """Mean of class 1 minus that of class 0, flat and in double precision."""
    flat = examples.x.reshape(len(examples), -1).double()
    return flat[examples.y == 1].mean(0) - flat[examples.y == 0].mean(0)


def _flat(examples: Gathered) -> tuple[Tensor, Tensor]:
    return examples.x.reshape(len(examples), -1), examples.y == 1


def _towards(vector: Tensor, examples: Gathered) -> Tensor:
    """The vector with the sign that has class 1 ahead; methods of variance have none of their own."""
    return -vector if float(vector @ _difference(examples)) < 0 else vector


def _mean_difference(examples: Gathered, draw: torch.Generator) -> Solved:
    """Mean with the concept minus mean without it; of pairs, the mean of their differences (CAA)."""
    return Solved(_difference(examples))


def _pca(examples: Gathered, draw: torch.Generator) -> Solved:
    """First right singular vector of the differences of pairs, which are not centred."""
    pairs = examples.differences()
    vector, share = principal(pairs.reshape(len(pairs), -1))
    return Solved(_towards(vector, examples), {"explained": float(share)})


def _pca_centred(examples: Gathered, draw: torch.Generator) -> Solved:
    """The same of centred differences: what all pairs have in common is taken off first, so the concept is too."""
    pairs = examples.differences()
    pairs = pairs.reshape(len(pairs), -1)
    vector, share = principal(pairs - pairs.mean(0))
    return Solved(_towards(vector, examples), {"explained": float(share)})


def _lat(examples: Gathered, draw: torch.Generator) -> Solved:
    """Linear artificial tomography: the first component of normalised differences of examples paired at random."""
    flat, _ = _flat(examples)
    order = torch.randperm(len(flat), generator=draw)
    half = len(flat) // 2
    differences = flat[order[:half]].double() - flat[order[half : 2 * half]].double()
    sizes = differences.norm(dim=1, keepdim=True)
    vector, share = principal(differences / sizes.clamp(min=torch.finfo(torch.float64).tiny))
    return Solved(_towards(vector, examples), {"explained": float(share)})


def _logistic(examples: Gathered, draw: torch.Generator) -> Solved:
    """Weights of a logistic regression."""
    x, y = _flat(examples)
    fit = logistic(x, y)
    return Solved(fit.weight, {"train_accuracy": float(((fit.scores(x) > 0) == y).double().mean())})


def _mass_mean(examples: Gathered, draw: torch.Generator) -> Solved:
    """Inverse covariance within the classes times the difference of means."""
    return Solved(mass_mean(*_flat(examples)).weight)


def _lda(examples: Gathered, draw: torch.Generator) -> Solved:
    """The same with the covariance shrunk, as fewer examples than dimensions need it."""
    return Solved(lda(*_flat(examples)).weight)


def _random(examples: Gathered, draw: torch.Generator) -> Solved:
    """A direction at random: what a dose alone does."""
    return Solved(torch.randn(examples.x[0].numel(), generator=draw, dtype=torch.float64))


METHODS: Mapping[str, Callable[[Gathered, torch.Generator], Solved]] = {
    "mean_difference": _mean_difference,
    "pca": _pca,
    "pca_centred": _pca_centred,
    "lat": _lat,
    "logistic": _logistic,
    "mass_mean": _mass_mean,
    "lda": _lda,
    "random": _random,
    "shuffled": _mean_difference,
}
"""Methods by name, each a function of the examples at one site. "shuffled" is given labels that say nothing."""
