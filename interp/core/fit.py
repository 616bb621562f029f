"""Linear classifiers in closed or convex form, many at once: what directions and probes are fitted with."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.core.errors import DataError, ShapeError
from interp.core.stats import ranks

__all__ = ["Linear", "auroc", "logistic"]

_STEPS, _HALVINGS = 60, 30
# Of the largest possible change of the loss's gradient per example: below this a step changes no digit that counts.
_TOLERANCE = 1e-9


class Linear(NamedTuple):
    """A linear score x · weight + bias, one or many."""

    weight: Float[Tensor, "*fit d"]
    bias: Float[Tensor, "*fit"]

    def scores(self, x: Float[Tensor, "*fit n d"]) -> Float[Tensor, "*fit n"]:
        """Return the score of each example, in the precision of the weights."""
        return (x.to(self.weight) @ self.weight[..., None])[..., 0] + self.bias[..., None]


def logistic(
    x: Float[Tensor, "*fit n d"],
    y: Bool[Tensor, "*fit n"],
    *,
    l2: float | Float[Tensor, "*fit"] = 1.0,
    balanced: bool = True,
    weights: Float[Tensor, "*fit n"] | None = None,
) -> Linear:
    """Fit logistic regressions with an L2 penalty, by Newton's method to the optimum, in double precision.

    Minimises Σ_i c_i · log(1 + exp(−s_i)) + l2 / 2 · |w|², where s_i is the signed score of example i and x has been
    centred and divided by one number, its root mean square, so that the penalty depends neither on the activation's
    units nor on its basis. The bias has no penalty. Memory: x in double precision, and min(n, d)² doubles a fit.

    Args:
        x: activations; leading axes are fits of their own.
        y: True where the concept is, one list for all fits or one for each.
        l2: the penalty, one for all fits or one for each; at 0 separable classes have no optimum, so it must be
            positive.
        balanced: weigh the classes as if each had half of the examples.
        weights: c of each example, 1 by default; 0 leaves an example out of a fit.

    Returns:
        Weights in units of x, in double precision.

    Raises:
        ShapeError: lists that do not line up.
        DataError: one class alone, NaN or infinite activations, or a penalty that is not positive.
    """
    if x.ndim < 2 or y.shape[-1:] != x.shape[-2:-1] or y.ndim > x.ndim - 1:
        raise ShapeError(f"activations {tuple(x.shape)} [*fit n d] and labels {tuple(y.shape)} [*fit n] do not line up")
    penalty = torch.as_tensor(l2, dtype=torch.float64, device=x.device)
    if not bool(((penalty > 0) & penalty.isfinite()).all()):
        raise DataError(f"l2={l2!r}: expected a positive number; without a penalty separable classes have no optimum")
    x = x.detach().double()
    if not bool(x.isfinite().all()):
        raise DataError("the activations hold NaN or infinity; leave those examples out first")
    y = y.expand(x.shape[:-1])
    c = _example_weights(x, y, balanced, weights)
    mean = (c[..., None] * x).sum(-2, keepdim=True) / c.sum(-1)[..., None, None]
    centred = x - mean
    spread = (c[..., None] * centred.square()).sum((-2, -1)) / (c.sum(-1) * x.shape[-1])
    scale = spread.sqrt().clamp(min=torch.finfo(torch.float64).tiny)[..., None, None]
    scaled, back = _row_space(centred / scale)
    w, b = _newton(scaled, 2.0 * y - 1.0, c, penalty.expand(x.shape[:-2]))
    weight = (w if back is None else (w[..., None, :] @ back)[..., 0, :]) / scale[..., 0]
    return Linear(weight, b - (weight * mean[..., 0, :]).sum(-1))


def _example_weights(x: Tensor, y: Tensor, balanced: bool, weights: Tensor | None) -> Float[Tensor, "*fit n"]:
    c = torch.ones(x.shape[:-1], dtype=x.dtype, device=x.device)
    if weights is not None:
        c = c * weights.to(c).expand(x.shape[:-1])
    positive, negative = (c * y).sum(-1, keepdim=True), (c * ~y).sum(-1, keepdim=True)
    if not bool(((positive > 0) & (negative > 0)).all()):
        raise DataError("a fit has examples of one class alone; give both")
    return c * torch.where(y, 0.5 / positive, 0.5 / negative) * (positive + negative) if balanced else c


def _row_space(x: Float[Tensor, "*fit n d"]) -> tuple[Tensor, Tensor | None]:
    """Fewer columns where there are fewer examples than dimensions: the optimum lies in what the examples span."""
    if x.shape[-2] >= x.shape[-1]:
        return x, None
    q, r = torch.linalg.qr(x.mT)
    return r.mT, q.mT


def _newton(
    x: Float[Tensor, "*fit n k"], sign: Float[Tensor, "*fit n"], c: Float[Tensor, "*fit n"], l2: Float[Tensor, "*fit"]
) -> tuple[Float[Tensor, "*fit k"], Float[Tensor, "*fit"]]:
    """Damped Newton; the last column is the bias, which has no penalty."""
    x = torch.cat([x, torch.ones_like(x[..., :1])], -1)
    penalty = l2[..., None].repeat(*[1] * l2.ndim, x.shape[-1])
    penalty[..., -1] = 0
    w = torch.zeros(*x.shape[:-2], x.shape[-1], dtype=x.dtype, device=x.device)

    def loss(w: Tensor) -> Tensor:
        margin = sign * (x @ w[..., None])[..., 0]
        return (c * torch.nn.functional.softplus(-margin)).sum(-1) + 0.5 * (penalty * w.square()).sum(-1)

    total = c.sum(-1)
    value = loss(w)
    for _ in range(_STEPS):
        p = torch.sigmoid(-sign * (x @ w[..., None])[..., 0])
        gradient = penalty * w - ((c * p * sign)[..., None] * x).sum(-2)
        if bool((gradient.abs().amax(-1) <= _TOLERANCE * total).all()):
            break
        curvature = (c * p * (1 - p))[..., None] * x
        # Far out the sigmoid is flat: a little on the diagonal keeps the bias's own curvature from vanishing.
        hessian = x.mT @ curvature + torch.diag_embed(penalty + 1e-10)
        step = torch.linalg.solve(hessian, gradient[..., None])[..., 0]
        size = torch.ones_like(value)
        for _ in range(_HALVINGS):
            new = loss(w - size[..., None] * step)
            worse = new > value
            if not bool(worse.any()):
                break
            size = torch.where(worse, size / 2, size)
        better = loss(w - size[..., None] * step) <= value
        w = torch.where(better[..., None], w - size[..., None] * step, w)
        value = loss(w)
        if not bool(better.any()):
            break
    return w[..., :-1], w[..., -1]


def auroc(scores: Float[Tensor, "*fit n"], truth: Bool[Tensor, "*fit n"]) -> Float[Tensor, "*fit"]:
    """Return the probability that a true example outranks another one, ties as half; NaN where one kind is missing.

    Args:
        scores: the higher, the likelier.
        truth: True where the concept is, one list for all or one for each.

    Raises:
        ShapeError: lists that do not line up.
        DataError: a score that is NaN.

    Source: Mann and Whitney (1947), as ranks.
    """
    if truth.shape[-1:] != scores.shape[-1:] or truth.ndim > scores.ndim:
        raise ShapeError(f"scores {tuple(scores.shape)} and truth {tuple(truth.shape)} must have one last axis")
    values = scores.detach().double()
    if bool(values.isnan().any()):
        raise DataError("scores hold NaN; leave those examples out first")
    flat = values.reshape(-1, values.shape[-1])
    found = torch.stack([ranks(row) for row in flat]).reshape(values.shape)
    told = truth.expand(values.shape).to(values.device)
    n_true, n_false = told.sum(-1).double(), (~told).sum(-1).double()
    above = (found * told).sum(-1) - n_true * (n_true + 1) / 2
    return above / (n_true * n_false)  # 0 / 0 is NaN
