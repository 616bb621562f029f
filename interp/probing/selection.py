"""Choosing few units that tell a class: rankings, and the search for the k that do it best together."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.errors import ConfigError, DataError, nearest
from interp.core.fit import Linear, logistic

__all__ = ["RANKINGS", "SEARCHES", "Standard", "choose_units", "rank_units", "refit", "set_losses", "swap_search"]

SEARCHES = ("ranked", "swap", "adaptive")
"""ranked: the k best of the ranking. adaptive: fit many, keep the half with the largest weights, fit again, down to k.
swap: from either of these, or from the previous k's and what helps them most (the best of the three), exchange one unit
for another while that lowers the loss."""

_BYTES = 2**28  # of examples in double precision that a call of the solver holds
_STILL = 1e-6  # of a unit's own size: what varies less is one value with rounding
_BINS = 8
_PATH, _SHRINK, _STEPS = 25, 0.8, 60
_MOST_SWAPS = 100


class Standard(NamedTuple):
    """Units with mean 0 and variance 1 on the examples of the fit.

    Attributes:
        x: the examples, in double precision; 0 for units that are dead.
        alive: which units change at all.
        mean, std: what was taken away and divided by; 1 for dead ones.
    """

    x: Float[Tensor, "n d"]
    alive: Bool[Tensor, " d"]
    mean: Float[Tensor, " d"]
    std: Float[Tensor, " d"]

    @classmethod
    def of(cls, x: Float[Tensor, "n d"]) -> "Standard":
        """Measure the units on these examples."""
        x = x.double()
        mean, std = x.mean(0), x.std(0, unbiased=False)
        alive = std > _STILL * x.square().mean(0).sqrt()
        std = torch.where(alive, std, 1.0)
        return cls((x - mean) / std * alive, alive, mean, std)

    def again(self, x: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
        """Return other examples in the same units."""
        return (x.double() - self.mean) / self.std * self.alive


def rank_units(
    x: Float[Tensor, "n d"], y: Bool[Tensor, " n"], *, method: str = "mean_difference", seed: int = 0
) -> Float[Tensor, " d"]:
    """Return how much each unit tells of a class by itself; −∞ for a unit that never changes, so it is never chosen.

    Args:
        x: activations.
        y: True for the class.
        method: one of `RANKINGS`.
        seed: for random.

    Raises:
        ConfigError: an unknown method.
        DataError: one class alone.

    Source: Gurnee et al. (2023, arXiv 2305.01610), §3 and app. A. Departure: units without variance come last; an F of
    0 / 0 comes first in a plain sort.
    """
    if method not in RANKINGS:
        raise ConfigError(
            f"ranking={method!r}: {nearest(method, RANKINGS) or 'expected one of ' + ', '.join(RANKINGS)}"
        )
    if not bool(y.any()) or bool(y.all()):
        raise DataError("a ranking needs examples of both classes, and these are of one")
    standard = Standard.of(x)
    found = RANKINGS[method](x.double(), standard.x, y, torch.Generator().manual_seed(seed))
    return found.nan_to_num(nan=0.0).masked_fill(~standard.alive, -torch.inf)


def _mean_difference(x: Tensor, z: Tensor, y: Tensor, draw: torch.Generator) -> Tensor:
    return (x[y].mean(0) - x[~y].mean(0)).abs()


def _f(x: Tensor, z: Tensor, y: Tensor, draw: torch.Generator) -> Tensor:
    one, zero = z[y], z[~y]
    within = ((one - one.mean(0)).square().sum(0) + (zero - zero.mean(0)).square().sum(0)) / max(len(z) - 2, 1)
    gap = (one.mean(0) - zero.mean(0)).square() * (len(one) * len(zero) / len(z))
    return gap / within.clamp(min=1e-30)


def _mutual_information(x: Tensor, z: Tensor, y: Tensor, draw: torch.Generator) -> Tensor:
    """In nats, of the class and the unit in bins that hold equally many examples; equal values share a bin."""
    at = torch.linspace(0, 1, _BINS + 1, dtype=torch.float64)[1:-1]
    edges = z.quantile(at, dim=0).T.contiguous()  # [d edge]
    bins = torch.searchsorted(edges, z.T.contiguous())  # [d n]
    cells = torch.zeros(z.shape[1], 2 * _BINS, dtype=torch.float64)
    cells.scatter_add_(1, bins * 2 + y.long(), torch.ones(bins.shape, dtype=torch.float64))
    joint = cells.reshape(-1, _BINS, 2) / len(z)
    apart = joint.sum(1, keepdim=True) * joint.sum(2, keepdim=True)
    return (torch.xlogy(joint, joint) - torch.xlogy(joint, apart)).sum((1, 2))


def _l1(x: Tensor, z: Tensor, y: Tensor, draw: torch.Generator) -> Tensor:
    """The penalty at which a unit enters the lasso path, in shares of the least one at which all are out."""
    c = torch.where(y, 0.5 / y.sum(), 0.5 / (~y).sum()).double()
    sign = torch.where(y, 1.0, -1.0).double()
    rate = 4 / (torch.linalg.matrix_norm(z * c.sqrt()[:, None], 2).square() + 1)
    w, b = torch.zeros(z.shape[1], dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    top = (z.T @ (c * sign * 0.5)).abs().max()
    entered = torch.zeros_like(w)
    for i in range(1, _PATH + 1):
        share = _SHRINK**i
        ahead, ahead_b, last, last_b = w, b, w, b
        for step in range(_STEPS):  # FISTA, from the previous penalty's weights
            p = c * sign * torch.sigmoid(-sign * (z @ ahead + ahead_b))
            moved = ahead + rate * (z.T @ p)
            w = moved.sign() * (moved.abs() - rate * share * top).clamp(min=0)
            b = ahead_b + rate * p.sum()
            momentum = step / (step + 3)
            ahead, ahead_b = w + momentum * (w - last), b + momentum * (b - last_b)
            last, last_b = w, b
        # Those that enter together are told apart by their weight.
        new = (entered == 0) & (w != 0)
        entered = torch.where(new, share + 1e-3 * share * w.abs() / w.abs().max().clamp(min=1e-300), entered)
    return entered


def _logistic(x: Tensor, z: Tensor, y: Tensor, draw: torch.Generator) -> Tensor:
    return logistic(z, y, l2=float(len(z)) ** 0.5).weight.abs()


def _random(x: Tensor, z: Tensor, y: Tensor, draw: torch.Generator) -> Tensor:
    return torch.rand(z.shape[1], generator=draw, dtype=torch.float64)


RANKINGS: Mapping[str, Callable[[Tensor, Tensor, Tensor, torch.Generator], Tensor]] = {
    "mean_difference": _mean_difference,
    "f": _f,
    "mutual_information": _mutual_information,
    "l1": _l1,
    "logistic": _logistic,
    "random": _random,
}
"""Rankings by name. mean_difference: |μ₁ − μ₀|, in the activation's units, so that large units are preferred. f: the
analysis of variance. mutual_information: of class and binned unit. l1: order of the lasso path. logistic: weight among
all units. random: what luck chooses."""


def refit(x: Float[Tensor, "n d"], y: Bool[Tensor, " n"], sets: Int[Tensor, "fit k"], *, l2: float = 1.0) -> Linear:
    """Fit a balanced logistic regression on each set of units.

    Memory: 32 · fit · n · k bytes, in parts of 2^28.

    Args:
        x: standardised activations.
        y: True for the class.
        sets: numbers of the units.
        l2: the penalty.

    Returns:
        Weights [fit k] and biases [fit].
    """
    n, k = len(x), sets.shape[1]
    columns = x.T.contiguous()
    step = max(1, _BYTES // (32 * n * max(k, 1)))
    parts = []
    for some in sets.split(step):
        rows = columns.index_select(0, some.flatten()).reshape(len(some), k, n).mT
        parts.append(logistic(rows, y.expand(len(some), n), l2=l2))
    return Linear(torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts]))


def set_losses(
    x: Float[Tensor, "n d"], y: Bool[Tensor, " n"], sets: Int[Tensor, "fit k"], *, l2: float = 1.0
) -> Float[Tensor, " fit"]:
    """Return the balanced log loss of each set's own fit on the examples that it was fitted on, in nats an example."""
    found = refit(x, y, sets, l2=l2)
    sign = torch.where(y, 1.0, -1.0).double()
    c = torch.where(y, 0.5 / y.sum(), 0.5 / (~y).sum()).double()
    losses = []
    for some, weight, bias in zip(sets.split(256), found.weight.split(256), found.bias.split(256), strict=True):
        dense = torch.zeros(len(some), x.shape[1], dtype=torch.float64).scatter_(1, some, weight)
        scores = dense @ x.T + bias[:, None]
        losses.append((torch.nn.functional.softplus(-scores * sign) * c).sum(1))
    return torch.cat(losses)


def swap_search(
    x: Float[Tensor, "n d"],
    y: Bool[Tensor, " n"],
    start: Int[Tensor, " k"],
    pool: Int[Tensor, " p"],
    *,
    l2: float = 1.0,
) -> tuple[Int[Tensor, " k"], float]:
    """Exchange each unit of a set in turn for the one of a pool that lowers the loss most, until no exchange does.

    One step fits p − k sets at once. The end is a set that no exchange of one unit betters; the best set of all may
    need two at once.

    Args:
        x: standardised activations.
        y: True for the class.
        start: the set to begin with.
        pool: units that may come in.
        l2: the penalty of each fit.

    Returns:
        The set, in ascending order, and its loss in nats an example.
    """
    held, k = start.clone(), len(start)
    loss = float(set_losses(x, y, held[None], l2=l2)[0])
    still, at = 0, 0
    while still < k and at < _MOST_SWAPS * k:
        others = pool[~torch.isin(pool, held)]
        tried = held.repeat(len(others), 1)
        tried[:, at % k] = others
        losses = set_losses(x, y, tried, l2=l2) if len(others) else torch.tensor([torch.inf])
        best = int(losses.argmin())
        still += 1
        if float(losses[best]) < loss - 1e-9:
            # The other places have to be looked at again; this one is as good as it can be.
            held, loss, still = tried[best], float(losses[best]), 1
        at += 1
    return held.sort().values, loss


def choose_units(
    x: Float[Tensor, "n d"],
    y: Bool[Tensor, " n"],
    sizes: Sequence[int],
    score: Float[Tensor, " d"],
    *,
    search: str = "ranked",
    prefilter: int = 50,
    l2: float = 1.0,
) -> list[Int[Tensor, " _"]]:
    """Return the units of each size.

    Args:
        x: standardised activations.
        y: True for the class.
        sizes: how many units, ascending; where fewer are alive, all of these.
        score: the ranking; −∞ is never chosen.
        search: one of `SEARCHES`.
        prefilter: a search looks among so many best-ranked units (four times as many for adaptive), and never among
            fewer than a size asks for.
        l2: the penalty of each fit.

    Raises:
        ConfigError: an unknown search.
        DataError: no unit that changes.
    """
    if search not in SEARCHES:
        raise ConfigError(f"search={search!r}: {nearest(search, SEARCHES) or 'expected one of ' + ', '.join(SEARCHES)}")
    order = score.argsort(descending=True, stable=True)
    order = order[score[order] > -torch.inf]
    if not len(order):
        raise DataError("no unit changes on these examples, so none can be chosen")
    sizes = [min(k, len(order)) for k in sizes]
    if search == "ranked":
        return [order[:k] for k in sizes]
    # From here on units are numbered by their rank, and no others are held.
    near = order[: max(prefilter * (4 if search == "adaptive" else 1), *sizes)]
    x = x[:, near]
    found = _swapped(x, y, sizes, prefilter, l2) if search == "swap" else _adaptive(x, y, sizes, l2)
    return [near[chosen] for chosen in found]


def _swapped(x: Tensor, y: Tensor, sizes: Sequence[int], prefilter: int, l2: float) -> list[Int[Tensor, " _"]]:
    found: list[Tensor] = []
    joint = _adaptive(x, y, sizes, l2)  # finds units that tell only together, which a ranking cannot
    for i, k in enumerate(sizes):
        pool = torch.arange(min(max(prefilter, k), x.shape[1]))
        starts = [pool[:k], joint[i]]
        if found:
            starts.append(_grown(x, y, found[-1], k, pool, l2))
        losses = set_losses(x, y, torch.stack(starts), l2=l2)
        found.append(swap_search(x, y, starts[int(losses.argmin())], pool, l2=l2)[0])
    return found


def _grown(x: Tensor, y: Tensor, held: Tensor, k: int, pool: Tensor, l2: float) -> Int[Tensor, " k"]:
    """The set with units added one by one, each the one that lowers the loss most."""
    while len(held) < k:
        others = pool[~torch.isin(pool, held)]
        tried = torch.cat([held.expand(len(others), -1), others[:, None]], 1)
        held = tried[int(set_losses(x, y, tried, l2=l2).argmin())]
    return held


def _adaptive(x: Tensor, y: Tensor, sizes: Sequence[int], l2: float) -> list[Int[Tensor, " _"]]:
    """Each fit keeps half of its units, those with the largest weights, and stops at each size on its way."""
    found: dict[int, Tensor] = {}
    held = torch.arange(x.shape[1])
    for size in sorted(set(sizes), reverse=True):
        while len(held) > size:
            weight = refit(x, y, held[None], l2=l2).weight[0].abs()
            held = held[weight.argsort(descending=True, stable=True)[: max(size, len(held) // 2)]]
        found[size] = held
    return [found[k] for k in sizes]
