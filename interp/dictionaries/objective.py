"""What a dictionary is trained to do, beside being of some architecture."""

from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from interp.core.settings import Settings

__all__ = ["Objective", "Terms"]

Loss = Literal["fvu", "mse"]


@dataclass(frozen=True)
class Terms:
    """What each architecture has a default of its own for; see `Objective`."""

    loss: Loss = "fvu"
    sparsity: float = 0.0
    aux_coef: float = 1 / 32
    unit_norm: bool = True


class Objective(Settings):
    """The terms of a training loss and the constraints of a step. What is None is the architecture's default."""

    loss: Loss | None = Field(
        default=None,
        description="squared error ÷ the batch's variance (fvu), or summed over dimensions, mean over tokens (mse)",
    )
    sparsity: float | None = Field(default=None, ge=0, description="weight of the architecture's sparsity penalty")
    sparsity_warmup: float = Field(
        default=0.05, ge=0, le=1, description="share of the training over which that weight rises from 0"
    )
    k_aux: int | None = Field(default=None, gt=0, description="dead latents per token in AuxK; by default half of d_in")
    aux_coef: float | None = Field(default=None, ge=0, description="weight of AuxK in the loss (no unit)")
    unit_norm: bool | None = Field(default=None, description="keep decoder rows at norm 1 while training")
    prefixes: tuple[int, ...] = Field(
        default=(), description="Matryoshka: also reconstruct with the first so many latents alone, for each of these"
    )
    init: Literal["random", "data", "subspace"] = Field(
        default="random",
        description="first directions of latents: random ones, of tokens, or random ones where activations lie",
    )
    init_rank: int | None = Field(
        default=None,
        gt=0,
        description="dimensions of that subspace; by default as many as hold 99 % of the variance but for outliers'",
    )
    k_start: int | None = Field(default=None, gt=0, description="TopK: k at the first step")
    k_warmup: float = Field(
        default=0.0, ge=0, le=1, description="share of the training over which k goes from k_start to k"
    )
    beta: float = Field(default=1.0, ge=0, description="g-SAE: weight of the gradient in the choice of latents")
    bandwidth: float | None = Field(
        default=None, gt=0, description="JumpReLU: width of the estimator around a threshold; by default 0.001 · √d_in"
    )
    threshold: float | None = Field(
        default=None, ge=0, description="JumpReLU: first threshold of every latent; by default the bandwidth"
    )
    penalty: Literal["l0", "tanh"] = Field(
        default="l0",
        description="JumpReLU: count of active latents (Gemma Scope), or their tanh(c · z · ‖W_dec‖) (Anthropic)",
    )
    tanh_scale: float = Field(default=4.0, gt=0, description="JumpReLU: c of the tanh penalty")
    pre_act: float = Field(
        default=0.0, ge=0, description="JumpReLU: weight of how far dead latents are below their threshold"
    )
    aux: Literal["dead", "zipf"] = Field(
        default="dead",
        description="BatchTopK: who gets the error in AuxK: dead latents, or all that fire less than their rank should",
    )
    zipf_alpha: float = Field(default=0.5, ge=0, description="exponent of usage by rank; 0 is the same for all")
    zipf_beta: float = Field(default=1.0, ge=0, description="what is added to the rank before")

    @model_validator(mode="after")
    def _prefixes_rise(self) -> "Objective":
        if any(low >= high for low, high in zip((0, *self.prefixes), self.prefixes, strict=False)):
            raise ValueError(f"prefixes {self.prefixes} must rise, from 1 at least")
        return self

    @model_validator(mode="after")
    def _rank_is_of_a_subspace(self) -> "Objective":
        if self.init_rank is not None and self.init != "subspace":
            raise ValueError(f"init_rank is of init subspace, and init is {self.init}: leave it out, or set init")
        return self

    def terms(self, default: Terms) -> Terms:
        """What holds for an architecture with these defaults."""
        return Terms(
            loss=default.loss if self.loss is None else self.loss,
            sparsity=default.sparsity if self.sparsity is None else self.sparsity,
            aux_coef=default.aux_coef if self.aux_coef is None else self.aux_coef,
            unit_norm=default.unit_norm if self.unit_norm is None else self.unit_norm,
        )

    def k_at(self, done: float, k: int, d_sae: int) -> int:
        """The latents per token at some share of the training."""
        if self.k_start is None or self.k_warmup == 0 or done >= self.k_warmup:
            return k
        return min(d_sae, max(1, round(self.k_start + (k - self.k_start) * done / self.k_warmup)))
