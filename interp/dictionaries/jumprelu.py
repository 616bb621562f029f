"""Dictionaries with a learned threshold for each latent."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from interp.data.store import Batch
from interp.dictionaries.base import SAE, DictionaryConfig, Transcoder, TranscoderConfig
from interp.dictionaries.objective import Objective, Terms
from interp.dictionaries.sparse import Activity, SparseDictionary
from interp.dictionaries.standard import above

__all__ = [
    "JumpReLUConfig",
    "JumpReLUDictionary",
    "JumpReLUSAE",
    "JumpReLUTranscoder",
    "JumpReLUTranscoderConfig",
]


class JumpReLUConfig(DictionaryConfig):
    """SAELens' settings of a JumpReLU SAE."""

    architecture: Literal["jumprelu"] = Field(default="jumprelu", description="SAELens' name of the architecture")


class JumpReLUTranscoderConfig(TranscoderConfig):
    """SAELens' settings of a JumpReLU transcoder with or without a skip connection."""

    architecture: Literal["jumprelu_transcoder", "jumprelu_skip_transcoder"] = Field(
        default="jumprelu_transcoder", description="SAELens' name of the architecture"
    )


class JumpReLUDictionary(SparseDictionary):
    """Latents are the pre-activations above a threshold of their own: z = π · 1[π > θ], π = (x − centre) W_enc + b_enc.

    The penalty is the mean number of active latents per token, or Σ_n tanh(c z_n ‖W_dec[n]‖). A jump has no gradient;
    within half of the bandwidth ε around θ it is estimated: ∂z/∂θ = −θ/ε and ∂1[π > θ]/∂θ = −1/ε. With the tanh
    penalty the estimate of ∂z also reaches π, as in Anthropic's variant. Thresholds are kept from falling below 0.

    Source: Rajamanoharan et al. 2024, "Jumping ahead" (2407.14435), §§3–4; Conerly et al. 2025, "Circuits updates:
    January 2025" (transformer-circuits.pub) for tanh and `objective.pre_act`. Departures: θ itself is trained, not its
    logarithm, which Adam moves too little; ε and the first θ are 0.001 times √d_in, since activations are scaled to
    that norm where the paper scales them to 1.
    """

    def __init__(self, cfg: DictionaryConfig, objective: Objective | None = None) -> None:
        super().__init__(cfg, objective)
        self.threshold = nn.Parameter(torch.zeros(cfg.d_sae, dtype=self.W_enc.dtype))

    # Squared error and λ = 1 per active latent, on activations with ‖x‖² = d_in on average; no AuxK.
    defaults: ClassVar[Terms] = Terms(loss="mse", sparsity=1.0, aux_coef=0.0)

    @property
    def bandwidth(self) -> float:
        """ε: the width around a threshold in which the jump's gradient is estimated."""
        return self.objective.bandwidth or 1e-3 * self.cfg.d_in**0.5

    def encode(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the latents of some activations."""
        pre = self._pre(self._check_input(x))
        return pre.relu() * (pre > self.threshold)

    def _activity(self, x: Tensor, batch: Batch, dead: Tensor | None) -> Activity:
        edge = self.threshold.detach() - self.bandwidth / 2
        values, codes = above(x, self._encoder(), edge)
        threshold = self.threshold if codes is None else self.threshold[codes.index]
        jumped: Tensor = _Jump.apply(values, threshold, self.bandwidth, self.objective.penalty == "tanh")
        return Activity(jumped, codes, beside=(values, threshold))

    def _penalty(self, activity: Activity, n_tokens: int) -> Tensor:
        values, threshold = activity.beside
        if self.objective.penalty == "l0":
            active: Tensor = _Step.apply(values, threshold, self.bandwidth)
            return active.sum() / max(1, n_tokens)
        scale = self.objective.tanh_scale * self.W_dec.norm(dim=-1)
        return activity.weighted(scale).tanh().sum() / max(1, n_tokens)

    def _extra(self, activity: Activity, x: Tensor, target: Tensor, dead: Tensor | None) -> Tensor | None:
        """How far dead latents are below their thresholds, so that something lifts them."""
        if dead is None or self.objective.pre_act == 0:
            return None
        latents = dead.nonzero()[:, 0]
        centre, W_enc = self._centre, self.W_enc.index_select(1, latents)
        pre = (x if centre is None else x - centre) @ W_enc + self.b_enc.index_select(0, latents)
        below = (self.threshold.index_select(0, latents) - pre).relu() * self.W_dec.index_select(0, latents).norm(
            dim=-1
        )
        below_all = self.across.over_latents(below.sum())
        return self.objective.pre_act * below_all / max(1, self.across.count(len(x)))

    def _begin(self) -> None:
        first = self.objective.threshold
        self.threshold.fill_(self.bandwidth if first is None else first)

    @torch.no_grad()
    def after_step(self) -> None:
        """Bring decoder rows back to norm 1, and thresholds to 0 at least."""
        super().after_step()
        self.threshold.clamp_(min=0)

    def _of_input(self) -> Sequence[Tensor]:
        return [self.b_enc, self.threshold]


class JumpReLUSAE(JumpReLUDictionary, SAE):
    """Keeps pre-activations above a threshold that each latent learns; also what BatchTopK SAEs are at inference.

    Source: Rajamanoharan et al. 2024, "Jumping ahead" (2407.14435), as in `JumpReLUDictionary`.
    """

    cfg: JumpReLUConfig

    @classmethod
    def from_cfg(cls, cfg: Mapping[str, Any]) -> "JumpReLUSAE":
        """Make an untrained SAE from the settings in a `cfg.json`."""
        return cls(JumpReLUConfig.model_validate(dict(cfg)))


class JumpReLUTranscoder(JumpReLUDictionary, Transcoder):
    """A JumpReLU transcoder, with or without a skip connection."""

    cfg: JumpReLUTranscoderConfig

    @classmethod
    def from_cfg(cls, cfg: Mapping[str, Any]) -> "JumpReLUTranscoder":
        """Make an untrained transcoder from the settings in a `cfg.json`."""
        return cls(JumpReLUTranscoderConfig.model_validate(dict(cfg)))


class _Jump(torch.autograd.Function):
    """π · 1[π > θ]."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float, to_input: bool) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth, ctx.to_input = bandwidth, to_input
        return pre * (pre > threshold)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pre, threshold = ctx.saved_tensors
        jump = grad * (threshold / ctx.bandwidth) * _near(pre, threshold, ctx.bandwidth)
        through = grad * (pre > threshold)
        return through + jump if ctx.to_input else through, _reduced(-jump, threshold), None, None


class _Step(torch.autograd.Function):
    """1[π > θ]."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pre, threshold = ctx.saved_tensors
        return None, _reduced(-grad / ctx.bandwidth * _near(pre, threshold, ctx.bandwidth), threshold), None


def _near(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    return ((pre - threshold).abs() < bandwidth / 2).to(pre.dtype)


def _reduced(grad: Tensor, threshold: Tensor) -> Tensor:
    """Of all tokens, where one threshold stands for a latent in all of them."""
    return grad if grad.shape == threshold.shape else grad.sum(0)
