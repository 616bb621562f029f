"""What gradients of a text's activations can be of: one number per row of tokens."""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.core.errors import DataError
from interp.core.metrics import loss_per_token
from interp.core.run import Run

__all__ = ["LOSSES", "LossName"]

LossName = Literal["loss", "entropy", "top_logit"]


def _loss(run: Run, real: Tensor) -> Tensor:
    """The loss of real tokens that follow real ones, in nats."""
    if run.tokens is None:
        raise DataError("the loss of a text needs its tokens")
    losses, _ = loss_per_token(run.logits, run.tokens, real)
    return losses.sum(-1)


def _entropy(run: Run, real: Tensor) -> Tensor:
    """The entropy of the predictions at real tokens, in nats."""
    logprobs = _kept(run, real).log_softmax(-1)
    return _counted(-(logprobs.exp() * logprobs).sum(-1), real)


def _top_logit(run: Run, real: Tensor) -> Tensor:
    """The largest logit at each real token."""
    return _counted(_kept(run, real).amax(-1), real)


def _kept(run: Run, real: Tensor) -> Tensor:
    # What stands at pads may be NaN, and its gradient would be too.
    logits = run.logits.to(torch.promote_types(run.logits.dtype, torch.float32))
    return torch.where(real.to(logits.device)[..., None], logits, 0.0)


def _counted(values: Tensor, real: Tensor) -> Tensor:
    return torch.where(real.to(values.device), values, 0.0).sum(-1)


LOSSES: dict[LossName, Callable[[Run, Bool[Tensor, "row pos"]], Float[Tensor, "row"]]] = {
    "loss": _loss,
    "entropy": _entropy,
    "top_logit": _top_logit,
}
"""Names of what gradients are of → a function of a run and of which tokens are real, summed over each row."""
