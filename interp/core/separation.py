"""How well scores tell two classes apart: AUROC, accuracy and Cohen's d, with intervals over groups of examples."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.errors import DataError, ShapeError
from interp.core.stats import Estimate

__all__ = ["Separation", "separation"]

# So many weights of resampled examples are held at once.
_DRAWN = 2**20


class Separation(NamedTuple):
    """How well scores tell the classes apart, each figure with its 95 % interval.

    Attributes:
        auroc: probability that an example with the concept outranks one without it, ties as half.
        accuracy: share on the right side of the threshold, as if the classes were equally large.
        d: Cohen's d, the distance of the means over the standard deviation within the classes.
    """

    auroc: Estimate
    accuracy: Estimate
    d: Estimate


def separation(
    scores: Float[Tensor, " n"],
    truth: Bool[Tensor, " n"],
    *,
    threshold: float = 0.0,
    groups: Int[Tensor, " n"] | None = None,
    n_bootstrap: int = 500,
    seed: int = 0,
) -> Separation:
    """Return how well scores tell two classes apart, with percentile intervals over resampled groups.

    Examples of one group (a template, a document) come and go together, so that what they share is not counted as
    evidence many times over. Resamples in which a class is missing are left out; bounds are NaN for a
    single group.
    Memory: 2^20 doubles at a time.

    Args:
        scores: the higher, the likelier the concept.
        truth: True where the concept is.
        threshold: scores above it count as the concept; chosen on other examples.
        groups: number of the group of each example; each is its own by default.
        n_bootstrap: resamples; without any, bounds are NaN.
        seed: of the resampling.

    Raises:
        ShapeError: lists that do not line up.
        DataError: NaN scores, or one class alone.

    Source: Field and Welsh (2007), "Bootstrapping clustered data", the cluster bootstrap.
    """
    if scores.shape != truth.shape or (groups is not None and groups.shape != scores.shape):
        raise ShapeError(f"scores {tuple(scores.shape)}, truth {tuple(truth.shape)} and groups must be one list each")
    if bool(scores.isnan().any()):
        raise DataError("scores hold NaN; leave those examples out first")
    if bool(truth.all()) or not bool(truth.any()):
        raise DataError("these examples are of one class alone, so nothing can be told apart; give both")
    values, order = scores.detach().double().cpu().sort(stable=True)
    told = truth.cpu()[order]
    held = torch.arange(len(values)) if groups is None else groups.cpu()[order]
    _, member, sizes = held.unique(return_inverse=True, return_counts=True)
    n, draw = len(sizes), torch.Generator().manual_seed(seed)
    found = _figures(values, told, torch.ones(1, len(values), dtype=torch.float64), threshold)[:, 0]
    if n < 2 or n_bootstrap < 1:
        return Separation(*(Estimate(float(v), torch.nan, torch.nan) for v in found))
    parts = []
    step = max(1, _DRAWN // len(values))
    for done in range(0, n_bootstrap, step):
        count = min(step, n_bootstrap - done)
        times = torch.zeros(count, n, dtype=torch.float64)
        drawn = torch.randint(n, (count, n), generator=draw)
        times.scatter_add_(1, drawn, torch.ones(count, n, dtype=torch.float64))
        parts.append(_figures(values, told, times[:, member], threshold))
    every = torch.cat(parts, 1)
    every = every[:, ~every.isnan().any(0)]
    if not every.shape[1]:
        return Separation(*(Estimate(float(v), torch.nan, torch.nan) for v in found))
    bounds = every.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=1).T.tolist()
    return Separation(*(Estimate(float(v), *b) for v, b in zip(found, bounds, strict=True)))


def _figures(
    values: Float[Tensor, " n"], told: Bool[Tensor, " n"], weight: Float[Tensor, "draw n"], threshold: float
) -> Float[Tensor, "3 draw"]:
    """AUROC, balanced accuracy and d of weighted examples in rising order; NaN where a class has no weight."""
    one, zero = weight * told, weight * ~told
    n_one, n_zero = one.sum(1), zero.sum(1)
    # Equal scores share one place: what lies below it, and half of what lies in it.
    _, place = values.unique_consecutive(return_inverse=True)
    in_place = torch.zeros(len(weight), int(place[-1]) + 1, dtype=torch.float64).index_add_(1, place, zero)
    below = in_place.cumsum(1) - in_place / 2
    auroc = (one * below[:, place]).sum(1) / (n_one * n_zero)
    above = (values > threshold).double()
    accuracy = ((one @ above) / n_one + (zero @ (1 - above)) / n_zero) / 2
    means = (one @ values) / n_one, (zero @ values) / n_zero
    spread = (one @ values.square() - n_one * means[0] ** 2) + (zero @ values.square() - n_zero * means[1] ** 2)
    d = (means[0] - means[1]) / (spread.clamp(min=0) / (n_one + n_zero)).sqrt()
    return torch.stack([auroc, accuracy, d])
