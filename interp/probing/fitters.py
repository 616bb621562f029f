"""How a linear probe is fitted: one function per kind, every task, class and penalty of a site in one call."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.core.fit import Linear, logistic

__all__ = ["KINDS", "Kind", "balanced_loss", "fit_kind"]

_BYTES = 2**28  # of examples in double precision that a call of the solver holds
_LITTLE = 1e-2
_SHRINKAGE = (0.9, 0.3, 0.1, 0.01, 0.001)


class Kind(NamedTuple):
    """One way to fit.

    Attributes:
        solve: (x [n d], y [fit n], penalties [choice]) → `Linear` of [fit choice].
        loss: of a signed score; what a penalty is chosen by.
        penalties: the choices; empty for those of the options.
    """

    solve: Callable[[Tensor, Tensor, Tensor], Linear]
    loss: Callable[[Tensor], Tensor]
    penalties: tuple[float, ...] = ()


def fit_kind(
    kind: str, x: Float[Tensor, "n d"], y: Bool[Tensor, "fit n"], penalties: Float[Tensor, " choice"]
) -> Linear:
    """Fit one classifier for each row of labels and each penalty: weights [fit choice d] and biases [fit choice]."""
    return KINDS[kind].solve(x.double(), y, penalties.double())


def balanced_loss(
    kind: str, found: Linear, x: Float[Tensor, "n d"], y: Bool[Tensor, "fit n"]
) -> Float[Tensor, "fit choice"]:
    """Return the kind's loss of each fit at each penalty, both classes counting alike."""
    scores = torch.einsum("fcd,nd->fcn", found.weight, x.double()) + found.bias[..., None]
    sign = torch.where(y, 1.0, -1.0).double()[:, None]
    loss = KINDS[kind].loss(scores * sign)
    return (loss * _halves(y)[:, None]).sum(-1)


def _halves(y: Bool[Tensor, "*fit n"]) -> Float[Tensor, "*fit n"]:
    """Weights of examples under which either class has half."""
    one, zero = y.sum(-1, keepdim=True).double(), (~y).sum(-1, keepdim=True).double()
    return torch.where(y, 0.5 / one, 0.5 / zero)


def _log_loss(margin: Tensor) -> Tensor:
    return torch.nn.functional.softplus(-margin)


def _square_loss(margin: Tensor) -> Tensor:
    return (1 - margin).square()


def _logistic(x: Tensor, y: Tensor, penalties: Tensor) -> Linear:
    n, d = x.shape
    l2 = penalties.repeat(len(y))
    rows = y.repeat_interleave(len(penalties), 0)
    at_once = max(1, _BYTES // (32 * n * d))
    parts = [
        logistic(x.expand(len(some), n, d), some, l2=some_l2)
        for some, some_l2 in zip(rows.split(at_once), l2.split(at_once), strict=True)
    ]
    weight, bias = torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts])
    return Linear(weight.reshape(len(y), -1, d), bias.reshape(len(y), -1))


def _means(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of the class and of the rest, [fit d] each."""
    positive, negative = y.double(), (~y).double()
    return (
        positive @ x / positive.sum(1, keepdim=True),
        negative @ x / negative.sum(1, keepdim=True),
    )


def _between(weight: Float[Tensor, "fit choice d"], one: Tensor, zero: Tensor) -> Linear:
    """The classifier whose border is half-way between the means."""
    return Linear(weight, -(weight * ((one + zero) / 2)[:, None]).sum(-1))


def _mean_difference(x: Tensor, y: Tensor, penalties: Tensor) -> Linear:
    one, zero = _means(x, y)
    return _between((one - zero)[:, None], one, zero)


def _spread(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [fit d] and eigenvectors of the covariance within classes, the two counting alike."""
    one, zero = _means(x, y)
    values, vectors = [], []
    for row, a, b in zip(y, one, zero, strict=True):
        c = _halves(row)
        centred = x - torch.where(row[:, None], a, b)
        found = torch.linalg.eigh((c[:, None] * centred).T @ centred)
        values.append(found.eigenvalues.clamp(min=0))
        vectors.append(found.eigenvectors)
    return torch.stack(values), torch.stack(vectors)


def _discriminant(x: Tensor, y: Tensor, penalties: Tensor) -> Linear:
    """Σ⁻¹ (μ₁ − μ₀), with Σ drawn to its mean eigenvalue by the penalty's share."""
    one, zero = _means(x, y)
    values, vectors = _spread(x, y)
    mean = values.mean(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    drawn = (1 - penalties)[:, None] * values[:, None] + penalties[:, None] * mean[:, None]  # [fit choice d]
    along = torch.einsum("fde,fd->fe", vectors, one - zero)
    return _between(torch.einsum("fce,fde->fcd", along[:, None] / drawn, vectors), one, zero)


def _ridge(x: Tensor, y: Tensor, penalties: Tensor) -> Linear:
    """Least squares on +1 and −1, both classes counting alike; x centred and divided by its root mean square."""
    weights, biases = [], []
    for row in y:
        c = len(x) * _halves(row)
        middle = (c[:, None] * x).mean(0)
        centred = x - middle
        scale = (c[:, None] * centred.square()).mean().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
        centred = centred / scale
        found = torch.linalg.eigh((c[:, None] * centred).T @ centred)
        target = (c * torch.where(row, 1.0, -1.0).double()) @ centred
        shrunk = (found.eigenvectors.T @ target) / (found.eigenvalues.clamp(min=0) + penalties[:, None])
        weight = shrunk @ found.eigenvectors.T / scale
        weights.append(weight)
        biases.append(-(weight @ middle))
    return Linear(torch.stack(weights), torch.stack(biases))


KINDS: Mapping[str, Kind] = {
    "logistic": Kind(_logistic, _log_loss),
    "mean_difference": Kind(_mean_difference, _square_loss, (0.0,)),
    "mass_mean": Kind(_discriminant, _log_loss, (_LITTLE,)),
    "lda": Kind(_discriminant, _log_loss, _SHRINKAGE),
    "ridge": Kind(_ridge, _square_loss),
}
"""Probes by name, all of which count both classes alike. logistic: logistic regression. mean_difference: the difference
of the means. mass_mean: that times the inverse covariance within classes, shrunk by 1 % (Marks and Tegmark 2023, arXiv
2310.06824, §5). lda: the same, shrunk by what is best on the validation part. ridge: least squares."""
