"""`Readout`: a model's own way from the residual stream to its logits, for any stream and for chosen tokens only."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interp.core.errors import ModelError

if TYPE_CHECKING:
    from interp.core.manager import HookManager

__all__ = ["Readout"]


@dataclass(frozen=True, eq=False)
class Readout:
    """Final norm, unembedding, logit scale and soft-cap of a model, applied to residual streams that are given.

    Make one with `Readout.of(hm)`; `check` compares it with logits of the model itself, and every caller does so once.

    Args:
        family: for messages.
        norm: the final norm's module; None where the family has none.
        unembed: the unembedding.
        scale: what its output is multiplied by (Granite, Cohere).
        cap: the final soft-cap, logits = cap · tanh(logits / cap) (Gemma 2); None for none.
    """

    family: str
    norm: nn.Module | None
    unembed: nn.Linear
    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, hm: "HookManager") -> "Readout":
        """Return the readout of a model.

        Raises:
            ModelError: the family's unembedding is not linear.
        """
        unembed = hm.map.module(hm.root, "unembed")
        if not isinstance(unembed, nn.Linear):
            what = "no unembedding" if unembed is None else f"a {type(unembed).__name__} for an unembedding"
            raise ModelError(f"{hm.map.family} has {what}; reading tokens off the residual stream needs a linear one")
        divisor, factor = getattr(hm.config, "logits_scaling", None), getattr(hm.config, "logit_scale", None)
        scale = (1.0 / float(divisor) if divisor else 1.0) * (float(factor) if factor else 1.0)
        cap = getattr(hm.config, "final_logit_softcapping", None)
        norm = hm.map.module(hm.root, "ln_final")
        return cls(hm.map.family, norm, unembed, scale, float(cap) if cap else None)

    def logits(
        self, resid: Float[Tensor, "*n d_model"], columns: Int[Tensor, " column"] | None = None
    ) -> Float[Tensor, "*n column"]:
        """Return the logits of a residual stream that left the last block.

        Args:
            resid: the stream; gradients flow through it.
            columns: the tokens whose logits are wanted; None for the whole vocabulary. With columns, the work and the
                memory are those of so many tokens.
        """
        weight, bias = self.unembed.weight, self.unembed.bias
        x = resid.to(weight.device)
        x = x if self.norm is None else self.norm(x)
        if columns is None:
            logits = self.unembed(x)
        else:
            at = columns.to(weight.device)
            logits = nn.functional.linear(x, weight.index_select(0, at), None if bias is None else bias[at])
        logits = logits if self.scale == 1.0 else logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def check(self, resid: Float[Tensor, "*n d_model"], logits: Float[Tensor, "*n d_vocab"]) -> None:
        """Refuse a model that does more between its last block and its logits than is known here.

        Args:
            resid: the stream that left the last block, in a run of the model.
            logits: that run's logits at the same places.

        Raises:
            ModelError: they are not what this readout makes of the stream.
        """
        with torch.no_grad():
            off = float((self.logits(resid).to(logits.device).float() - logits.float()).abs().max())
        exact = logits.dtype in (torch.float32, torch.float64)
        tolerance = (1e-4 if exact else 2e-2) * max(1.0, float(logits.abs().max()))
        if not off <= tolerance:
            raise ModelError(
                f"{self.family} does more between its last layer and its logits than norm, unembedding, scale and "
                f"soft-cap (off by {off:.1e}); a logit lens would be wrong here, as whatever else reads its stream"
            )
