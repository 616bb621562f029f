"""The TopK sparse autoencoder, with an auxiliary loss that revives dead latents."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from interp.data.store import Batch
from interp.dictionaries.base import SAE, DictionaryConfig, Losses
from interp.dictionaries.kernels import Codes, decode_codes, encode_topk

__all__ = ["TopKConfig", "TopKSAE"]

_TINY = 1e-12
# Up to this many times k_aux dead latents, products over all of them cost less than a gather per entry.
_FEW = 3


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


class TopKSAE(SAE):
    """Keeps the k largest pre-activations of each token, at least zero: z = ReLU(TopK((x − b_dec) W_enc + b_enc)).

    Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (2406.04093), §2.3 and appendix A.2. The loss
    is the batch's FVU plus `aux_coef` times AuxK. Departures: b_dec starts at the mean, not the geometric median; the
    AuxK's gradient passes its ReLU as if that were the identity, so that a latent that is negative everywhere has one.

    Args:
        cfg: sizes and SAELens' settings.
        k_aux: dead latents that reconstruct the error of each token; by default half of d_in.
        aux_coef: weight of AuxK.
        unit_norm: keep decoder rows at norm 1 while training.
    """

    cfg: TopKConfig

    def __init__(
        self, cfg: TopKConfig, *, k_aux: int | None = None, aux_coef: float = 1 / 32, unit_norm: bool = True
    ) -> None:
        super().__init__(cfg)
        dtype = getattr(torch, cfg.dtype)
        self.k_aux = min(max(1, cfg.d_in // 2) if k_aux is None else k_aux, cfg.d_sae)
        self.aux_coef, self.unit_norm = aux_coef, unit_norm
        self.W_enc = nn.Parameter(torch.zeros(cfg.d_in, cfg.d_sae, dtype=dtype))
        self.W_dec = nn.Parameter(torch.zeros(cfg.d_sae, cfg.d_in, dtype=dtype))
        self.b_enc = nn.Parameter(torch.zeros(cfg.d_sae, dtype=dtype))
        self.b_dec = nn.Parameter(torch.zeros(cfg.d_in, dtype=dtype))

    @classmethod
    def from_cfg(cls, cfg: Mapping[str, Any]) -> "TopKSAE":
        """Make an untrained SAE from the settings in a `cfg.json`."""
        return cls(TopKConfig.model_validate(dict(cfg)))

    @torch.no_grad()
    def init_from(self, x: Float[Tensor, "token d_in"], *, seed: int) -> None:
        """Set b_dec to the mean of `x`, W_dec to random unit rows, W_enc to the multiple of its transpose that fits.

        The multiple is the one with the smallest squared error on `x`: with y the first reconstruction less b_dec by
        the transpose itself, ⟨x − b_dec, y⟩ / ⟨y, y⟩. So training begins at an FVU of 1 at most; many latents that
        overlap would else begin far above it.

        Source: Gao et al. 2024 (2406.04093), appendix A.1. Departure: least squares, where they match the norm.
        """
        rows = torch.randn(self.cfg.d_sae, self.cfg.d_in, generator=torch.Generator().manual_seed(seed))
        rows = (rows / rows.norm(dim=-1, keepdim=True)).to(self.W_dec)
        self.W_dec.copy_(rows)
        self.W_enc.copy_(rows.T)
        self.b_enc.zero_()
        self.b_dec.copy_(x.double().mean(0))
        x = self._check_input(x)
        codes, _ = self._codes(x, None)
        y = decode_codes(codes.values.relu(), codes, self.W_dec).double()
        power = y.pow(2).sum()
        # Of what is constant nothing is left to fit.
        fit = ((x - self.b_dec) * y).sum() / torch.where(power > 0, power, 1)
        self.W_enc.mul_(torch.where(fit > 0, fit, 1).to(self.W_enc))

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the latents of some activations; at most k are positive, the others are 0."""
        pre = self._pre(self._check_input(x))
        values, index = pre.topk(self.cfg.k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter(-1, index, values.relu())

    def decode(self, latents: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        """Return the activations that some latents stand for."""
        return self._unscaled(latents) @ self.W_dec + self.b_dec

    def loss(self, batch: Batch, *, dead: Bool[Tensor, "d_sae"] | None = None) -> Losses:
        """Return FVU + aux_coef · AuxK of a batch.

        Args:
            batch: activations; `mask`, where given, leaves rows out.
            dead: latents that AuxK trains on the error; None for none.
        """
        x = self._check_input(batch.x)
        target = x if batch.target is None else batch.target.to(x.dtype)
        counts = torch.ones_like(x[:, :1]) if batch.mask is None else batch.mask[:, None].to(x.dtype)
        # Counted on a CPU alone: a GPU would have to wait.
        count = int(dead.sum()) if dead is not None and dead.device.type == "cpu" else None
        dead = None if count == 0 else dead
        few = count is not None and count <= _FEW * self.k_aux
        codes, revived = self._codes(x, None if few else dead)
        values = codes.values.relu()
        error = (target - decode_codes(values, codes, self.W_dec) - self.b_dec) * counts
        mean = (target * counts).sum(0) / counts.sum().clamp_min(1)
        fvu = error.pow(2).sum() / ((target - mean) * counts).pow(2).sum().clamp_min(_TINY)
        active = (values.detach() > 0) & (counts > 0)
        fired = torch.zeros(self.cfg.d_sae, dtype=torch.long, device=x.device)
        fired.scatter_add_(0, codes.index.flatten(), active.flatten().long())
        aux = torch.zeros_like(fvu)
        if dead is not None:
            guess = self._guess_by_products(x, dead) if revived is None else self._guess_by_entries(revived)
            aux = self._aux(guess, error.detach(), dead, counts)
        return Losses(
            total=fvu + self.aux_coef * aux,
            fvu=fvu.detach(),
            aux=aux.detach(),
            l0=active.sum() / counts.sum().clamp_min(1),
            fired=fired,
        )

    @torch.no_grad()
    def before_step(self) -> None:
        """Take out of the decoder's gradient what would only change the norm of its rows."""
        if self.unit_norm and self.W_dec.grad is not None:
            along = (self.W_dec.grad * self.W_dec).sum(-1, keepdim=True)
            self.W_dec.grad.addcmul_(along, self.W_dec, value=-1)

    @torch.no_grad()
    def after_step(self) -> None:
        """Bring the decoder's rows back to norm 1."""
        if self.unit_norm:
            self.W_dec.div_(self.W_dec.norm(dim=-1, keepdim=True).clamp_min(_TINY))

    @torch.no_grad()
    def fold_scale(self, scale: float) -> None:
        """Turn an SAE of `scale · x` into the same SAE of `x`: biases, hence latents, are divided by `scale`."""
        # ReLU and TopK commute with a positive factor, so the decoder's rows need not change.
        self.b_enc.div_(scale)
        self.b_dec.div_(scale)

    def _pre(self, x: Tensor) -> Tensor:
        x = x - self.b_dec if self.cfg.apply_b_dec_to_input else x
        pre = x @ self.W_enc + self.b_enc
        return pre * self.W_dec.norm(dim=-1) if self.cfg.rescale_acts_by_decoder_norm else pre

    def _unscaled(self, latents: Tensor) -> Tensor:
        latents = latents.to(self.W_dec.dtype)
        return latents / self.W_dec.norm(dim=-1) if self.cfg.rescale_acts_by_decoder_norm else latents

    def _codes(self, x: Tensor, dead: Tensor | None) -> tuple[Codes, Codes | None]:
        """The k largest pre-activations of each token, and the k_aux largest of dead latents."""
        return encode_topk(
            x,
            self.W_enc,
            self.b_enc,
            k=self.cfg.k,
            centre=self.b_dec if self.cfg.apply_b_dec_to_input else None,
            # What a latent is multiplied with, its decoder row is divided by: the norm matters for the choice alone.
            scale=self.W_dec.detach().norm(dim=-1) if self.cfg.rescale_acts_by_decoder_norm else None,
            dead=dead,
            k_dead=self.k_aux,
        )

    def _guess_by_entries(self, codes: Codes) -> Tensor:
        """The error as the best dead latents of each token guess it."""
        return decode_codes(_revived(codes.values), codes, self.W_dec)

    def _guess_by_products(self, x: Tensor, dead: Tensor) -> Tensor:
        """The same, by dense products over the dead latents alone."""
        latents = dead.nonzero()[:, 0]
        W_enc, W_dec = self.W_enc.index_select(1, latents), self.W_dec.index_select(0, latents)
        pre = (x - self.b_dec if self.cfg.apply_b_dec_to_input else x) @ W_enc + self.b_enc.index_select(0, latents)
        if len(latents) > self.k_aux:
            score = pre.detach() * W_dec.detach().norm(dim=-1) if self.cfg.rescale_acts_by_decoder_norm else pre
            best = score.topk(self.k_aux, dim=-1, sorted=False).indices
            pre = torch.zeros_like(pre).scatter(-1, best, pre.gather(-1, best))
        return _revived(pre) @ W_dec

    def _aux(self, guess: Tensor, error: Tensor, dead: Tensor, counts: Tensor) -> Tensor:
        """The error's share that a guess of it misses; 0 when no latent is dead."""
        missed = (error - guess) * counts
        share = missed.pow(2).sum() / error.pow(2).sum().clamp_min(_TINY)
        # A cut-off instead of a branch: asking the host whether any is dead would make a GPU wait.
        return torch.where(dead.any() & share.isfinite(), share, torch.zeros_like(share))


def _revived(pre: Tensor) -> Tensor:
    # ReLU forwards: a code is never negative. Identity backwards: else nothing would ever lift the most dead ones.
    return pre + (pre.relu() - pre).detach()
