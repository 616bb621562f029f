"""Linear classifiers in closed or convex form, many at once: what directions and probes are fitted with."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.core.errors import DataError, ShapeError

__all__ = ["Linear", "auroc", "lda", "ledoit_wolf", "logistic", "mass_mean", "principal"]

_STEPS, _HALVINGS = 60, 30
# Of the largest possible change of the loss's gradient per example: below this a step changes no digit that counts.
_TOLERANCE = 1e-9
# Of the largest variance: what varies less is rounding of activations in single precision, not a dimension of the data.
_RANK = 1e-10


class Linear(NamedTuple):
    """A linear score x · weight + bias, one or many."""

    weight: Float[Tensor, "*fit d"]
    bias: Float[Tensor, "*fit"]

    def scores(self, x: Float[Tensor, "*fit n d"]) -> Float[Tensor, "*fit n"]:
        """Return the score of each example, in the precision of the weights."""
        return (x.to(self.weight) @ self.weight[..., None])[..., 0] + self.bias[..., None]


def logistic(
    x: Float[Tensor, "*fit n d"],
    y: Bool[Tensor, "*#fit n"],
    *,
    l2: float | Float[Tensor, "*fit"] = 1.0,
    balanced: bool = True,
    weights: Float[Tensor, "*#fit n"] | None = None,
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
    penalty = torch.as_tensor(l2, dtype=torch.float64, device=x.device)
    if not bool(((penalty > 0) & penalty.isfinite()).all()):
        raise DataError(f"l2={l2!r}: expected a positive number; without a penalty separable classes have no optimum")
    x, y = _ready(x, y)
    c = _example_weights(x, y, balanced, weights)
    mean = (c[..., None] * x).sum(-2, keepdim=True) / c.sum(-1)[..., None, None]
    centred = x - mean
    spread = (c[..., None] * centred.square()).sum((-2, -1)) / (c.sum(-1) * x.shape[-1])
    scale = spread.sqrt().clamp(min=torch.finfo(torch.float64).tiny)[..., None, None]
    scaled, back = _row_space(centred / scale)
    w, b = _newton(scaled, 2.0 * y - 1.0, c, penalty.expand(x.shape[:-2]))
    weight = (w if back is None else (w[..., None, :] @ back)[..., 0, :]) / scale[..., 0]
    return Linear(weight, b - (weight * mean[..., 0, :]).sum(-1))


def _ready(x: Tensor, y: Tensor) -> tuple[Float[Tensor, "*fit n d"], Bool[Tensor, "*fit n"]]:
    """Activations in double precision, and labels for each fit beside them."""
    if x.ndim < 2 or y.shape[-1:] != x.shape[-2:-1] or y.ndim > x.ndim - 1:
        raise ShapeError(f"activations {tuple(x.shape)} [*fit n d] and labels {tuple(y.shape)} [*fit n] do not line up")
    x = x.detach().double()
    if not bool(x.isfinite().all()):
        raise DataError("the activations hold NaN or infinity; leave those examples out first")
    return x, y.to(x.device).expand(x.shape[:-1])


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


def lda(x: Float[Tensor, "*fit n d"], y: Bool[Tensor, "*#fit n"], *, shrinkage: float | None = None) -> Linear:
    """Fit linear discriminants: w = Σ⁻¹ (μ₁ − μ₀), with the covariance within the classes shrunk.

    The covariance of the examples about their own class's mean, in double precision, is shrunk towards the identity
    times its mean variance: (1 − s) Σ + s · tr(Σ) / d · 1. Of fewer examples than dimensions no d × d matrix is made.
    Memory: x in double precision, and min(n, d)² doubles a fit.

    Args:
        x: activations; leading axes are fits of their own.
        y: True where the concept is, one list for all fits or one for each.
        shrinkage: s in (0, 1]; by default that of Ledoit and Wolf for each fit.

    Returns:
        Weights in double precision; the score is 0 half way between the means.

    Raises:
        ShapeError: lists that do not line up.
        DataError: one class alone, NaN or infinite activations, a shrinkage outside (0, 1], or no variance at all.

    Source: Fisher (1936); Ledoit and Wolf (2004), "A well-conditioned estimator for large-dimensional covariance
        matrices", lemma 3.2 and eq. 14.
    """
    if shrinkage is not None and not 0 < shrinkage <= 1:
        raise DataError(f"shrinkage={shrinkage!r}: expected a share in (0, 1]; mass_mean shrinks nothing")
    x, y = _ready(x, y)
    within, gap, middle = _classes(x, y)
    n, d = within.shape[-2:]
    size = within.square().sum((-2, -1)) / (n * d)
    if not bool((size > 0).all()):
        raise DataError("the examples of each class are all alike, so there is no variance to divide by")
    s = ledoit_wolf(within) if shrinkage is None else torch.full_like(size, shrinkage)
    # Exactly 0 happens for examples that are plus and minus one vector; the identity keeps the matrix invertible.
    ridge = (s.clamp(min=_RANK) * size)[..., None]
    a = within * ((1 - s) / n).sqrt()[..., None, None]
    if n >= d:
        matrix = a.mT @ a + torch.diag_embed(ridge.expand(*ridge.shape[:-1], d))
        weight = torch.linalg.solve(matrix, gap[..., None])[..., 0]
    else:
        matrix = a @ a.mT + torch.diag_embed(ridge.expand(*ridge.shape[:-1], n))
        part = torch.linalg.solve(matrix, a @ gap[..., None])
        weight = (gap - (a.mT @ part)[..., 0]) / ridge
    return Linear(weight, -(weight * middle).sum(-1))


def mass_mean(x: Float[Tensor, "*fit n d"], y: Bool[Tensor, "*#fit n"]) -> Linear:
    """Fit mass-mean probes: w = Σ⁺ (μ₁ − μ₀), with the pseudo-inverse of the covariance within the classes.

    Dimensions in which the examples vary by less than 1e-10 of the largest variance are left out, so that with fewer
    examples than dimensions the weight lies in what the examples span. Memory: as for `lda`.

    Args:
        x: activations; leading axes are fits of their own.
        y: True where the concept is, one list for all fits or one for each.

    Returns:
        Weights in double precision; the score is 0 half way between the means.

    Raises:
        ShapeError: lists that do not line up.
        DataError: one class alone, NaN or infinite activations, or no variance at all.

    Source: Marks and Tegmark, "The Geometry of Truth", arXiv 2310.06824, §5.1, the form for data of one distribution.
    """
    x, y = _ready(x, y)
    within, gap, middle = _classes(x, y)
    n, d = within.shape[-2:]
    a = within / math.sqrt(n)
    values, vectors = torch.linalg.eigh(a.mT @ a if n >= d else a @ a.mT)
    top = values[..., -1:]
    if not bool((top > 0).all()):
        raise DataError("the examples of each class are all alike, so there is no variance to divide by")
    # Of a · aᵀ the eigenvectors u stand for aᵀ u / √λ, so that the inverse is divided by λ once more.
    inverse = torch.where(values > _RANK * top, values.pow(-1 if n >= d else -2), 0.0)
    right = gap[..., None] if n >= d else a @ gap[..., None]
    weight = vectors @ (inverse[..., None] * (vectors.mT @ right))
    weight = (weight if n >= d else a.mT @ weight)[..., 0]
    return Linear(weight, -(weight * middle).sum(-1))


def ledoit_wolf(x: Float[Tensor, "*fit n d"]) -> Float[Tensor, "*fit"]:
    """Return how far Ledoit and Wolf shrink the covariance of centred examples, a share of 0 to 1.

    Args:
        x: examples whose mean is zero.

    Source: Ledoit and Wolf (2004), as for `lda`.
    """
    x = x.detach().double()
    n, d = x.shape[-2:]
    mean = x.square().sum((-2, -1)) / (n * d)
    gram = x @ x.mT if n < d else x.mT @ x
    norm2 = gram.square().sum((-2, -1)) / n**2  # of the covariance, whichever of the two products it came from
    far = norm2 - d * mean.square()
    noise = (x.square().sum(-1).square().sum(-1) / n - norm2) / n
    share = noise.clamp(min=0.0).minimum(far) / far
    return torch.where(far > 0, share, torch.ones_like(share)).clamp(0.0, 1.0)


def principal(x: Float[Tensor, "*fit n d"]) -> tuple[Float[Tensor, "*fit d"], Float[Tensor, "*fit"]]:
    """Return the unit vector along which vectors are largest, and its share of their squares; nothing is centred.

    Args:
        x: vectors; leading axes are problems of their own.

    Returns:
        The first right singular vector in double precision, of no particular sign, and its share.

    Raises:
        DataError: NaN or infinite numbers, or zeros alone.
    """
    x = x.detach().double()
    if not bool(x.isfinite().all()):
        raise DataError("the vectors hold NaN or infinity; leave those examples out first")
    n, d = x.shape[-2:]
    values, vectors = torch.linalg.eigh(x.mT @ x if n >= d else x @ x.mT)
    top = vectors[..., -1] if n >= d else (x.mT @ vectors[..., -1:])[..., 0]
    size, total = top.norm(dim=-1, keepdim=True), values.clamp(min=0).sum(-1)
    if not bool((size > 0).all()) or not bool((total > 0).all()):
        raise DataError("the vectors are all zero, so there is no direction in them")
    return top / size, values[..., -1] / total


def _classes(
    x: Float[Tensor, "*fit n d"], y: Bool[Tensor, "*#fit n"]
) -> tuple[Float[Tensor, "*fit n d"], Float[Tensor, "*fit d"], Float[Tensor, "*fit d"]]:
    """Examples about the mean of their class; the difference of the two means, and the point half way."""
    share = [side / side.sum(-1, keepdim=True) for side in (y.double(), (~y).double())]
    if not all(bool(s.isfinite().all()) for s in share):
        raise DataError("a fit has examples of one class alone; give both")
    one, zero = ((s[..., None, :] @ x)[..., 0, :] for s in share)
    within = x - torch.where(y[..., None], one[..., None, :], zero[..., None, :])
    return within, one - zero, (one + zero) / 2


def auroc(scores: Float[Tensor, "*fit n"], truth: Bool[Tensor, "*#fit n"]) -> Float[Tensor, "*fit"]:
    """Return the probability that a true example outranks another one, ties as half; NaN where one kind is missing.

    Args:
        scores: the higher, the likelier.
        truth: True where the concept is, one list for all or one for each.

    Raises:
        ShapeError: lists that do not line up.
        DataError: a score that is NaN.

    Source: Mann and Whitney (1947).
    """
    if truth.shape[-1:] != scores.shape[-1:] or truth.ndim > scores.ndim:
        raise ShapeError(f"scores {tuple(scores.shape)} and truth {tuple(truth.shape)} must have one last axis")
    values = scores.detach().double()
    if bool(values.isnan().any()):
        raise DataError("scores hold NaN; leave those examples out first")
    told = truth.to(values.device)
    if told.ndim == 1:
        return _shares(values[..., told], values[..., ~told])
    rows = zip(
        values.reshape(-1, values.shape[-1]), told.expand(values.shape).reshape(-1, values.shape[-1]), strict=True
    )
    return torch.stack([_shares(row[one], row[~one]) for row, one in rows]).reshape(values.shape[:-1])


def _shares(one: Float[Tensor, "*fit n"], zero: Float[Tensor, "*fit m"]) -> Float[Tensor, "*fit"]:
    """Share of pairs in which the first is larger, ties as half."""
    if not one.shape[-1] or not zero.shape[-1]:
        return one.new_full(one.shape[:-1], torch.nan)
    order, wanted = zero.contiguous().sort(dim=-1).values, one.contiguous()
    below = torch.searchsorted(order, wanted) + torch.searchsorted(order, wanted, right=True)
    return below.double().mean(-1) / (2 * zero.shape[-1])
