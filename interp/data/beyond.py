"""A loss of what a reconstruction does, such as to the model that goes on from it, beside how near it comes."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Beyond"]

_EPS = 1e-7  # below it a loss in fp32 is rounding


@dataclass(frozen=True)
class Beyond:
    """A loss of a batch's reconstruction, and how it and the reconstruction's own loss are added up.

    With `balance`, both are brought to the size of the reconstruction's loss R and averaged by their weights:
    (r R + w (R / B) B) / (r + w), where R / B is a constant to the gradient. So the total stays R, whatever the
    weights, and what else a training adds, such as a sparsity penalty, keeps its share. Without, it is r R + w B.

    Source: Karvonen 2025 (2503.17272), for the balance, there with r = w = 1.

    Attributes:
        loss: of the reconstruction [token d_out] of all tokens that the batch's mask keeps; a differentiable scalar.
        name: of the loss in metrics.
        weight: w; at 0 the loss is worked out for the metrics alone.
        reconstruction: r; at 0 how near the reconstruction comes has no part in it.
        balance: see above.
    """

    loss: Callable[[Float[Tensor, "token d_out"]], Float[Tensor, ""]]
    name: str = "beyond"
    weight: float = 1.0
    reconstruction: float = 1.0
    balance: bool = False

    def of(self, raw: Callable[[Tensor], Tensor]) -> "Beyond":
        """The same, of reconstructions from which a function makes those that the loss is of."""
        return replace(self, loss=lambda made: self.loss(raw(made)))

    def joined(
        self, reconstruction: Float[Tensor, ""], made: Float[Tensor, "token d_out"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Return the sum of both losses, and this one alone, detached.

        Args:
            reconstruction: R, with its gradient.
            made: the reconstruction, with its gradient.
        """
        value = self.loss(made if self.weight > 0 else made.detach()).to(reconstruction.dtype)
        known, weight, share = value.detach(), self.weight, self.reconstruction
        if self.balance:
            weight, share = weight / (self.weight + share), share / (self.weight + share)
        total = share * reconstruction if share > 0 else torch.zeros_like(reconstruction)
        if self.weight > 0:
            factor = reconstruction.detach() / known.clamp_min(_EPS) if self.balance else 1.0
            total = total + weight * factor * value
        return total, known
