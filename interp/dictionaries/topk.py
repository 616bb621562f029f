"""The TopK sparse autoencoder, and the one that chooses its latents by what they do to the model's loss."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor

from interp.core.errors import ConfigError, DataError
from interp.data.store import Batch
from interp.dictionaries.base import SAE, DictionaryConfig, Losses
from interp.dictionaries.objective import Objective
from interp.dictionaries.select import Score, encode_topk
from interp.dictionaries.sparse import Activity, SparseDictionary

__all__ = ["GradientTopKSAE", "TopKConfig", "TopKSAE"]


class TopKConfig(DictionaryConfig):
    """SAELens' settings of a TopK SAE."""

    architecture: Literal["topk"] = Field(default="topk", description="SAELens' name of the architecture")
    k: int = Field(gt=0, description="latents that may be active per token")
    rescale_acts_by_decoder_norm: bool = Field(
        default=False, description="choose and report latents times the norm of their decoder row"
    )

    @model_validator(mode="after")
    def _k_fits(self) -> "TopKConfig":
        if self.k > self.d_sae:
            raise ValueError(f"k is {self.k}, more than the {self.d_sae} latents of d_sae")
        return self


class TopKSAE(SparseDictionary, SAE):
    """Keeps the k largest pre-activations of each token, at least zero: z = ReLU(TopK((x − b_dec) W_enc + b_enc)).

    Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (2406.04093), §2.3. Departure: b_dec starts at
    the mean, not the geometric median.
    """

    cfg: TopKConfig

    def __init__(self, cfg: TopKConfig, objective: Objective | None = None) -> None:
        super().__init__(cfg, objective)
        self.k_now = cfg.k

    @classmethod
    def from_cfg(cls, cfg: Mapping[str, Any]) -> "TopKSAE":
        """Make an untrained SAE from the settings in a `cfg.json`."""
        return cls(TopKConfig.model_validate(dict(cfg)))

    def at(self, done: float) -> None:
        """Be told which share of the training is done, before each step."""
        super().at(done)
        self.k_now = self.objective.k_at(done, self.cfg.k, self.cfg.d_sae)

    def encode(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the latents of some activations; at most k are positive, the others are 0."""
        pre = self._pre(self._check_input(x))
        pre = pre * self.W_dec.norm(dim=-1) if self.cfg.rescale_acts_by_decoder_norm else pre
        values, index = pre.topk(self.cfg.k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter(-1, index, values.relu())

    def decode_own(self, latents: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        """Return what some latents stand for in the space of the weights."""
        latents = latents.to(self.W_dec.dtype)
        return super().decode_own(
            latents / self.W_dec.norm(dim=-1) if self.cfg.rescale_acts_by_decoder_norm else latents
        )

    def _activity(self, x: Tensor, batch: Batch, dead: Tensor | None) -> Activity:
        codes, revived = encode_topk(x, self._encoder(score=self._score(batch), dead=dead), k=self.k_now)
        return Activity(codes.values.relu(), codes, revived)

    def _score(self, batch: Batch) -> Score | None:
        """What latents are chosen by."""
        if not self.cfg.rescale_acts_by_decoder_norm:
            return None
        # What a latent is multiplied with, its decoder row is divided by: the norm matters for the choice alone.
        norm = self.W_dec.detach().norm(dim=-1)
        return lambda pre, _: pre * norm

    def _importance(self, pre: Tensor, W_dec: Tensor, batch: Batch) -> Tensor:
        return pre * W_dec.norm(dim=-1) if self.cfg.rescale_acts_by_decoder_norm else pre

    def fold_whitening(
        self,
        mean: Float[Tensor, "d_in"],
        forward: Float[Tensor, "d_in d_in"],
        back: Float[Tensor, "d_in d_in"],
        *,
        target_scale: float = 1.0,
    ) -> None:
        """Turn an SAE of whitened activations into the same one of activations, in place; see `SparseDictionary`.

        Where latents were chosen by the norm of their decoder rows, that norm is folded into them first: whitened rows
        have other norms, and the choice must stay.
        """
        if self.cfg.rescale_acts_by_decoder_norm:
            self.fold_decoder_norm()
            self.set_cfg(self.cfg.model_copy(update={"rescale_acts_by_decoder_norm": False}))
        super().fold_whitening(mean, forward, back, target_scale=target_scale)

    def fold_decoder_norm(self) -> None:
        """Multiply each latent by the norm of its decoder row, which becomes 1; reconstructions stay as they are.

        Raises:
            ConfigError: latents are not chosen by what they add, so that others would be the largest.
        """
        if not self.cfg.rescale_acts_by_decoder_norm:
            raise ConfigError("folding the norms of decoder rows changes which latents are the k largest")
        super().fold_decoder_norm()


class GradientTopKSAE(TopKSAE):
    """A g-SAE: while training, latents are chosen by z · (1 + β |W_dec g|), with g the gradient of the model's loss.

    |z_n · (W_dec[n] · g)| is what latent n does to the loss to first order. Only the choice sees the gradient: values
    stay z, and what is saved is a plain TopK SAE, for at inference there is no gradient. That is a gap between training
    and use, which the paper has too. g is divided by the batch's mean ‖g‖, so that β means the same at every site.

    Source: Olmo et al. 2024, "Features that make a difference" (2411.10397): a reproduction, for the paper's β is not
    public. β = 0 is TopK to the bit.

    Args:
        cfg: sizes and SAELens' settings.
        objective: what it is trained to do; `objective.beta` is β.
    """

    def loss(self, batch: Batch, *, dead: Bool[Tensor, "d_sae"] | None = None) -> Losses:
        """Return the training loss of a batch, which must hold gradients of the model's loss.

        Raises:
            DataError: it holds none.
        """
        if batch.grad is None:
            raise DataError(
                "a g-SAE chooses latents by the gradient of the model's loss, and this batch has none; capture with "
                "gradient='loss', or train a TopK SAE"
            )
        return super().loss(batch, dead=dead)

    def _score(self, batch: Batch) -> Score | None:
        if batch.grad is None or self.objective.beta == 0:
            return super()._score(batch)
        grad, W_dec = self._unit_grad(batch.grad), self.W_dec.detach()
        return lambda pre, where: self._by_effect(pre, grad[where], W_dec)

    def _importance(self, pre: Tensor, W_dec: Tensor, batch: Batch) -> Tensor:
        if batch.grad is None or self.objective.beta == 0:
            return super()._importance(pre, W_dec, batch)
        return self._by_effect(pre, self._unit_grad(batch.grad), W_dec)

    def _unit_grad(self, grad: Tensor) -> Tensor:
        """The gradients, of mean norm 1."""
        grad = grad.detach().to(self.W_dec.dtype)
        norms, tokens = grad.norm(dim=-1), self.across.tokens
        mean = norms.mean() if tokens.size == 1 else tokens.sum(norms.sum()) / max(1, tokens.count(len(norms)))
        return grad / mean.clamp_min(torch.finfo(grad.dtype).tiny)

    def _by_effect(self, pre: Tensor, grad: Tensor, W_dec: Tensor) -> Tensor:
        effect = (grad @ W_dec.T).abs_()
        # What is not positive adds nothing, whatever its gradient: it stays behind all that is.
        return torch.where(pre > 0, pre * (1 + self.objective.beta * effect), pre)

    @classmethod
    def from_cfg(cls, cfg: Mapping[str, Any]) -> "TopKSAE":
        """Make an untrained SAE from the settings in a `cfg.json`."""
        raise ConfigError("a g-SAE is saved as the TopK SAE that it is at inference; load that")

    def frozen(self) -> TopKSAE:
        """Return the same SAE as a plain TopK one."""
        made = TopKSAE(self.cfg, self.objective).to(self.W_enc)
        made.load_state_dict(self.state_dict())
        return made.train(self.training).requires_grad_(self.W_enc.requires_grad)
