"""The gated sparse autoencoder: which latents are active is decided apart from how large they are."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from interp.data.store import Batch
from interp.dictionaries.base import SAE, DictionaryConfig
from interp.dictionaries.objective import Objective, Terms
from interp.dictionaries.sparse import Activity, SparseDictionary
from interp.dictionaries.standard import above

__all__ = ["GatedConfig", "GatedSAE"]


class GatedConfig(DictionaryConfig):
    """SAELens' settings of a gated SAE."""

    architecture: Literal["gated"] = Field(default="gated", description="SAELens' name of the architecture")


class GatedSAE(SparseDictionary, SAE):
    """z = 1[π > 0] · ReLU(e^r_mag · (x − b_dec) W_enc + b_mag), with the gate π = (x − b_dec) W_enc + b_gate.

    The loss adds to the reconstruction's: λ Σ_n ReLU(π_n) ‖W_dec[n]‖, and the squared error of decoding ReLU(π) with a
    decoder that does not learn from it: the gate, which has no gradient of its own, learns from these two.

    Source: Rajamanoharan et al. 2024, "Improving dictionary learning with gated sparse autoencoders" (2404.16014), §3.
    Departure: the penalty has the decoder's norm, as in `StandardSAE`; rows are kept at norm 1, where it is 1.

    Args:
        cfg: sizes and SAELens' settings.
        objective: what it is trained to do.
    """

    cfg: GatedConfig

    def __init__(self, cfg: GatedConfig, objective: Objective | None = None) -> None:
        super().__init__(cfg, objective)
        del self.b_enc  # SAELens has the gate's under its own name
        dtype = self.W_enc.dtype
        self.b_gate, self.b_mag, self.r_mag = (nn.Parameter(torch.zeros(cfg.d_sae, dtype=dtype)) for _ in range(3))

    @property
    def _bias(self) -> Tensor:
        return self.b_gate

    # Squared error and λ = 1 on activations with ‖x‖² = d_in on average; no AuxK.
    defaults: ClassVar[Terms] = Terms(loss="mse", sparsity=1.0, aux_coef=0.0)

    @classmethod
    def from_cfg(cls, cfg: Mapping[str, Any]) -> "GatedSAE":
        """Make an untrained SAE from the settings in a `cfg.json`."""
        return cls(GatedConfig.model_validate(dict(cfg)))

    def encode(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the latents of some activations."""
        gate = self._pre(self._check_input(x))
        return (gate > 0) * self._magnitude(gate)

    def _magnitude(self, gate: Tensor, index: Tensor | None = None) -> Tensor:
        """How large latents are, where their gate is open: both come of one product."""
        b_gate, b_mag, r_mag = (p if index is None else p[index] for p in (self.b_gate, self.b_mag, self.r_mag))
        return ((gate - b_gate) * r_mag.exp() + b_mag).relu()

    def _activity(self, x: Tensor, batch: Batch, dead: Tensor | None) -> Activity:
        gate, codes = above(x, self._encoder(), 0.0)
        magnitude = self._magnitude(gate, None if codes is None else codes.index)
        return Activity((gate.detach() > 0) * magnitude, codes, beside=(gate.relu(),))

    def _penalty(self, activity: Activity, n_tokens: int) -> Tensor:
        (gate,) = activity.beside
        return replace(activity, values=gate).total(self.W_dec.norm(dim=-1)) / max(1, n_tokens)

    def _extra(self, activity: Activity, x: Tensor, target: Tensor, dead: Tensor | None) -> Tensor:
        (gate,) = activity.beside
        guess = self.across.over_latents(replace(activity, values=gate).decoded(self.W_dec.detach()))
        n_tokens = self.across.count(len(x))
        missed = (target - self.b_dec.detach() - guess).pow(2).sum()
        if self.terms.loss == "fvu":
            return missed / self._variance(target, n_tokens)
        return missed / max(1, n_tokens)

    def _move_pre(self, shift: Tensor) -> None:
        self.b_gate.add_(shift.to(self.b_gate.dtype))
        self.b_mag.add_((shift * self.r_mag.double().exp()).to(self.b_mag.dtype))

    def _begin(self) -> None:
        self.r_mag.zero_()

    def _of_input(self) -> Sequence[Tensor]:
        return [self.b_gate, self.b_mag]
