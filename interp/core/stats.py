"""Statistics of figures that are given per example: bootstrap intervals, sign-flip tests, correlations."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.errors import DataError, ShapeError

__all__ = ["Estimate", "bootstrap", "bootstrap_bounds", "pearson", "ranks", "sign_flip_p", "spearman"]

# So many drawn weights of a bootstrap, or signs of a test, are held at once.
_DRAWN = 2**20


class Estimate(NamedTuple):
    """A mean over examples with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


def bootstrap(values: Float[Tensor, " n"], *, n_bootstrap: int = 1000, seed: int = 0) -> Estimate:
    """Return the mean of values with its percentile interval; NaN are left out, and everything is NaN without values.

    Args:
        values: one per example.
        n_bootstrap: resamples.
        seed: of the resampling; the same one draws the same examples for the same number of values.

    Source: Efron and Tibshirani (1993), "An Introduction to the Bootstrap", §13.3.
    """
    kept = values[~values.isnan()].double()
    if not len(kept):
        return Estimate(math.nan, math.nan, math.nan)
    generator = torch.Generator().manual_seed(seed)
    at_once = max(1, _DRAWN // len(kept))
    means = [
        kept[torch.randint(len(kept), (min(at_once, n_bootstrap - done), len(kept)), generator=generator)].mean(1)
        for done in range(0, n_bootstrap, at_once)
    ]
    low, high = torch.cat(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(float(kept.mean()), low, high)


def bootstrap_bounds(
    values: Float[Tensor, "*cell n"], *, n_bootstrap: int = 1000, seed: int = 0
) -> tuple[Float[Tensor, "*cell"], Float[Tensor, "*cell"]]:
    """Return the 95 % percentile interval of the mean over the last axis, every cell with the same resamples.

    Memory: n_bootstrap doubles a cell, 2^20 of them at a time.

    Args:
        values: one per example in the last axis; a cell with a NaN gets NaN.
        n_bootstrap: resamples.
        seed: of the resampling.

    Returns:
        The lower and the upper bounds, in double precision.

    Raises:
        ShapeError: no examples.
    """
    n = _counted(values)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n, (n_bootstrap, n), generator=generator)
    shares = torch.zeros(n_bootstrap, n, dtype=torch.float64)
    shares.scatter_add_(1, drawn, torch.full(drawn.shape, 1.0 / n, dtype=torch.float64))
    flat = values.detach().double().cpu().reshape(-1, n)
    at = torch.tensor([0.025, 0.975], dtype=torch.float64)
    step = max(1, _DRAWN // n_bootstrap)
    parts = [(part @ shares.T).quantile(at, dim=1) for part in flat.split(step)]
    low, high = torch.cat(parts, dim=1).reshape(2, *values.shape[:-1])
    return low, high


def sign_flip_p(values: Float[Tensor, "*cell n"], *, n_flips: int = 9999, seed: int = 0) -> Float[Tensor, "*cell"]:
    """Return the two-sided p of a mean of zero, by flipping signs: exact where 2^n ≤ n_flips, else by drawn signs.

    Args:
        values: differences, one per example in the last axis, symmetric about zero under the null.
        n_flips: signs drawn at most; all cells share them.
        seed: of the draw.

    Returns:
        For drawn signs (1 + how many means are at least as large) / (1 + n_flips); no smaller than 2^(1 − n).

    Raises:
        ShapeError: no examples.

    Source: Phipson and Smyth (2010), "Permutation P-values should never be zero", for the 1.
    """
    n = _counted(values)
    flat = values.detach().double().cpu().reshape(-1, n)
    seen = flat.mean(1).abs()
    exact = n < 60 and 2**n <= n_flips
    total = 2**n if exact else n_flips
    generator = torch.Generator().manual_seed(seed)
    reached = torch.zeros(len(flat), dtype=torch.long)
    step = max(1, _DRAWN // max(n, len(flat)))
    for done in range(0, total, step):
        count = min(step, total - done)
        if exact:
            bits = torch.arange(done, done + count)[:, None] >> torch.arange(n)
        else:
            bits = torch.randint(2, (count, n), generator=generator)
        means = flat @ (2.0 * (bits & 1).double() - 1.0).T / n
        reached += (means.abs() >= seen[:, None] * (1 - 1e-12)).sum(1)
    p = reached.double() / total if exact else (1.0 + reached.double()) / (1.0 + total)
    return p.masked_fill(flat.isnan().any(1), torch.nan).reshape(values.shape[:-1])


def pearson(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> float:
    """Return the linear correlation of two lists; NaN where one is constant or there are fewer than two.

    Raises:
        ShapeError: lists of different length.
    """
    _same(a, b)
    x, y = (v.detach().double().cpu() - v.detach().double().cpu().mean() for v in (a, b))
    size = float(x.norm() * y.norm())
    return float(x @ y) / size if len(a) > 1 and size > 0 else math.nan


def spearman(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> float:
    """Return the rank correlation of two lists, ties at their mean rank; NaN as for `pearson`."""
    _same(a, b)
    return pearson(ranks(a), ranks(b))


def ranks(values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Return the rank of each value, 1 for the smallest; equal values share the mean of their ranks."""
    flat = values.detach().double().cpu()
    _, group, counts = flat.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts.double() - 1) / 2)[group]


def _counted(values: Tensor) -> int:
    if values.ndim < 1 or values.shape[-1] == 0:
        raise ShapeError(f"got values {tuple(values.shape)}; expected examples in the last axis")
    return int(values.shape[-1])


def _same(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.ndim != 1:
        raise ShapeError(f"a correlation needs two lists of one length, got {tuple(a.shape)} and {tuple(b.shape)}")
    if bool(a.isnan().any()) or bool(b.isnan().any()):
        raise DataError("a correlation of values with NaN among them; leave those examples out first")
