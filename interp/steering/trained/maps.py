"""Maps of one feature's activations onto another set's: the fits behind activation transport, on plain tensors."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.errors import ConfigError, DataError, ShapeError, nearest

__all__ = ["KINDS", "FeatureMaps", "coupling", "fit_maps", "gap", "separation"]

# What fp32 activations of a constant feature may differ by, as a share of their size.
_CONSTANT = 1e-6
_MARGIN, _ROUNDING = 1e-3, 1e-5


class FeatureMaps(NamedTuple):
    """One affine map a feature: x → factor · x + shift from low to high, and x elsewhere; in double precision."""

    factor: Float[Tensor, " d"]
    shift: Float[Tensor, " d"]
    low: Float[Tensor, " d"] | None = None
    high: Float[Tensor, " d"] | None = None

    def __call__(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Return activations mapped."""
        mapped = self.factor * x + self.shift
        if self.low is None or self.high is None:
            return mapped
        return torch.where((x >= self.low) & (x <= self.high), mapped, x)


class Coupling(NamedTuple):
    """Which sorted examples of either side belong together: share `weight` of i with j."""

    i: Int[Tensor, " part"]
    j: Int[Tensor, " part"]
    weight: Float[Tensor, " part"]


def coupling(n: int, m: int) -> Coupling:
    """Return the optimal transport of n sorted numbers to m: in order, a share 1/n each against a share 1/m each.

    With n = m the i-th belongs to the i-th. Else shares are split, so that no number is made up or left out.

    Args:
        n: how many there are on one side.
        m: on the other.
    """
    # In units of 1 / (n m), so that the cuts of both sides are whole numbers.
    cuts = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()
    begin = torch.cat([cuts.new_zeros(1), cuts[:-1]])
    return Coupling(begin // m, begin // n, (cuts - begin).double() / (n * m))


def fit_maps(
    x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], *, kind: str, support: tuple[float, float] | None = (0.0, 1.0)
) -> FeatureMaps:
    """Fit one map a feature that takes the activations x to the activations y.

    Features whose x is constant (to 1e-6 of its size) have no slope and are left alone, but for "mean". Memory: 4
    tensors of [n + m, d] doubles.

    Args:
        x: activations of the source.
        y: those of the target; need not be as many.
        kind: one of `KINDS`.
        support: for "linear": the quantiles of x between which the map acts, (0, 1) for all that was seen; None
            everywhere. The range is widened by a thousandth. The other kinds act everywhere.

    Raises:
        ConfigError: an unknown kind, or quantiles that are no range.
        DataError: fewer than two examples of a side.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind={kind!r}: {nearest(kind, KINDS) or 'expected one of ' + ', '.join(KINDS)}")
    if support is not None and not (len(support) == 2 and 0 <= support[0] < support[1] <= 1):
        raise ConfigError(f"support={support!r}: expected two quantiles such as (0.0, 1.0), or None")
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ShapeError(f"activations {tuple(x.shape)} and {tuple(y.shape)} are [n d] and [m d]")
    if min(len(x), len(y)) < 2:
        raise DataError(f"{len(x)} source and {len(y)} target examples: a distribution needs two at least on each side")
    x, y = x.double(), y.double()
    factor, shift = KINDS[kind](x, y)
    if kind == "linear" and support is not None:
        ordered = x.sort(0).values
        low, high = (_quantile(ordered, q) for q in support)
        # The map breaks off at its bounds: an example that lies on one must not fall out of it by rounding.
        margin = _MARGIN * (high - low) + _ROUNDING * x.abs().amax(0)
        return FeatureMaps(factor, shift, low - margin, high + margin)
    return FeatureMaps(factor, shift)


def gap(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> float:
    """Return how far two sets of activations are apart, feature by feature: √(Σ W₂² / Σ var y), 0 where they agree.

    Args:
        x: one set.
        y: the other; its variance is the unit. NaN where it has none.
    """
    x, y = x.double(), y.double()
    i, j, weight = coupling(len(x), len(y))
    apart = x.sort(0).values.index_select(0, i) - y.sort(0).values.index_select(0, j)
    return float(((weight @ apart.square()).sum() / y.var(0, unbiased=False).sum()).sqrt())


def separation(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, " d"]:
    """Return, feature by feature, the probability that an example of x is larger than one of y, ties as half.

    Args:
        x: one set.
        y: the other.
    """
    held, asked = y.T.sort(1).values.contiguous(), x.T.contiguous()
    below = torch.searchsorted(held, asked) + torch.searchsorted(held, asked, right=True)
    return below.double().mean(1) / (2 * len(y))


def _quantile(ordered: Tensor, q: float) -> Tensor:
    """By hand: torch's own refuses more than 2^24 numbers."""
    at = q * (len(ordered) - 1)
    below = int(at)
    above = min(below + 1, len(ordered) - 1)
    return torch.lerp(ordered[below], ordered[above], at - below)


def _alone(constant: Tensor, factor: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    return torch.where(constant, 1.0, factor), torch.where(constant, 0.0, shift)


def _constant(x: Tensor) -> Tensor:
    return x.std(0, unbiased=False) <= _CONSTANT * x.abs().amax(0)


def _linear(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    i, j, weight = coupling(len(x), len(y))
    mean_x, mean_y = x.mean(0), y.mean(0)
    in_order = (x - mean_x).sort(0).values.index_select(0, i)
    covariance = weight @ (in_order * (y - mean_y).sort(0).values.index_select(0, j))
    factor = covariance / x.var(0, unbiased=False)
    return _alone(_constant(x), factor, mean_y - factor * mean_x)


def _mean(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ones_like(x[0]), y.mean(0) - x.mean(0)


def _gaussian(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    factor = y.std(0, unbiased=False) / x.std(0, unbiased=False)
    return _alone(_constant(x), factor, y.mean(0) - factor * x.mean(0))


def _aura(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    auroc = separation(x, y)
    return torch.where(auroc > 0.5, 2 - 2 * auroc, 1.0), torch.zeros_like(auroc)


KINDS: Mapping[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "linear": _linear,
    "mean": _mean,
    "gaussian": _gaussian,
    "aura": _aura,
}
"""Kinds of map by name: factor and shift [d] of activations x [n d] and y [m d].

linear: least squares on the optimal coupling, ω = cov(x, y) / var(x), β = ȳ − ω x̄. mean: x + ȳ − x̄. gaussian:
σ_y / σ_x · (x − x̄) + ȳ. aura: x · (2 − 2 AUROC) where the feature's AUROC for the source exceeds ½.
"""
