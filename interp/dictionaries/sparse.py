"""Dictionaries with an encoder of one layer: what they share, whichever of their pre-activations are latents."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from interp.core.errors import ConfigError, ShapeError
from interp.data.store import Batch
from interp.dictionaries.across import Across
from interp.dictionaries.base import Dictionary, DictionaryConfig, Losses
from interp.dictionaries.initial import first_directions
from interp.dictionaries.kernels import Codes, Entries, decode_codes
from interp.dictionaries.objective import Objective, Terms
from interp.dictionaries.select import Encoder, Score
from interp.dictionaries.space import Context

__all__ = ["Activity", "SparseDictionary", "revived"]

_TINY = 1e-12
# Up to this many times k_aux dead latents, products over all of them cost less than a gather per entry.
_FEW = 3
_ROWS = 256


@dataclass(frozen=True)
class Activity:
    """What the latents of a batch are: at some entries, or at all.

    Attributes:
        values: latents, with gradients; those at the entries of `codes`, or [token d_sae].
        codes: which entries; None for all.
        dead: pre-activations of dead latents that AuxK may use; None where they are still to be made.
        beside: what else the architecture's penalty is made of.
    """

    values: Float[Tensor, "..."]
    codes: Codes | None = None
    dead: Codes | None = None
    beside: tuple[Tensor, ...] = ()

    def decoded(self, W_dec: Float[Tensor, "d_sae d_out"]) -> Float[Tensor, "token d_out"]:
        """Σ latent · W_dec[latent]."""
        return self.values @ W_dec if self.codes is None else decode_codes(self.values, self.codes, W_dec)

    def bands(self, W_dec: Float[Tensor, "d_sae d_out"], widths: Sequence[int]) -> list[Float[Tensor, "token d_out"]]:
        """The same of the latents below the first width, of those from there to the second, …, and of the last ones."""
        if not widths:
            return [self.decoded(W_dec)]
        return [self._band(W_dec, low, high) for low, high in pairwise([0, *widths, len(W_dec)])]

    def _band(self, W_dec: Tensor, low: int, high: int) -> Tensor:
        if self.codes is None:
            return self.values[:, low:high] @ W_dec[low:high]
        entries = self.codes.entries
        inside = (entries.index >= low) & (entries.index < high)
        if inside.device.type != "cpu":  # which would wait for how many there are
            return decode_codes(self.values.masked_fill(~inside, 0), self.codes, W_dec)
        kept = inside.flatten().nonzero()[:, 0]
        values, index = self.values.flatten()[kept], entries.index.flatten()[kept]
        some = Entries(index, entries.d_sae, tokens=entries.tokens_of(kept), n_tokens=entries.n_tokens)
        return decode_codes(values, Codes(values, some), W_dec)

    def fired(self, d_sae: int) -> Int[Tensor, "d_sae"]:
        """In how many tokens each latent is positive."""
        active = self.values.detach() > 0
        if self.codes is None:
            return active.sum(0, dtype=torch.int32).long()  # int64 would be made of every value first
        counts = torch.zeros(d_sae, dtype=torch.long, device=active.device)
        return counts.scatter_add_(0, self.codes.index.flatten(), active.flatten().long())

    def weighted(self, weight: Float[Tensor, "d_sae"]) -> Float[Tensor, "..."]:
        """Each latent times its weight."""
        return self.values * (weight if self.codes is None else weight[self.codes.index])

    def total(self, weight: Float[Tensor, "d_sae"]) -> Float[Tensor, ""]:
        """The sum of all latents, each times its weight."""
        return self.values.sum(0) @ weight if self.codes is None else self.weighted(weight).sum()


class SparseDictionary(Dictionary):
    """A dictionary whose pre-activations are (x − centre) W_enc + b_enc; an architecture says which are latents.

    The training loss is the reconstruction's, plus `objective.sparsity` times the architecture's penalty, plus
    `objective.aux_coef` times AuxK: the share of the error that the best dead latents of each token miss. With
    `objective.prefixes` the reconstruction's loss is the mean over prefixes of the latents and all of them. A batch's
    `beyond` is given the reconstruction of all latents, those of this batch's choice, and added to the
    reconstruction's loss by its weights; penalties and AuxK stay as they are.

    Source: Gao et al. 2024 (2406.04093), appendix A.2, for AuxK; Bussmann et al. 2025 (2503.17547) for prefixes.
    Departures: the AuxK's gradient passes its ReLU as if that were the identity, so that a latent that is negative
    everywhere has one; prefixes are averaged where the paper sums them, so that other weights keep their meaning.

    Args:
        cfg: sizes and SAELens' settings.
        objective: what it is trained to do.
    """

    defaults: ClassVar[Terms] = Terms()

    def __init__(self, cfg: DictionaryConfig, objective: Objective | None = None) -> None:
        super().__init__(cfg)
        self.objective = objective or Objective()
        self.terms = self.objective.terms(self.defaults)
        widest = max(self.objective.prefixes, default=0)
        if widest >= cfg.d_sae:
            raise ConfigError(f"prefixes go up to {widest}; each must be below d_sae, which is {cfg.d_sae}")
        self.warm = 1.0
        dtype = getattr(torch, cfg.dtype)
        d_out = self.d_out
        self.W_enc = nn.Parameter(torch.zeros(cfg.d_in, cfg.d_sae, dtype=dtype))
        self.W_dec = nn.Parameter(torch.zeros(cfg.d_sae, d_out, dtype=dtype))
        self.b_enc = nn.Parameter(torch.zeros(cfg.d_sae, dtype=dtype))
        self.b_dec = nn.Parameter(torch.zeros(d_out, dtype=dtype))
        if self.has_skip:
            self.W_skip = nn.Parameter(torch.zeros(d_out, cfg.d_in, dtype=dtype))

    # -- what an architecture decides -----------------------------------------------------------------------------

    @abstractmethod
    def _activity(self, x: Tensor, batch: Batch, dead: Tensor | None) -> Activity:
        """The latents of a batch, whose masked tokens have been taken out."""

    def _penalty(self, activity: Activity, n_tokens: int) -> Tensor | None:
        """What is added to the loss for latents that are active, before its weight; None for nothing."""
        return None

    def _extra(self, activity: Activity, x: Tensor, target: Tensor, dead: Tensor | None) -> Tensor | None:
        """A further term of the loss; None for nothing."""
        return None

    @property
    def _bias(self) -> Tensor:
        """What is added to pre-activations."""
        return self.b_enc

    # -- training -------------------------------------------------------------------------------------------------

    def at(self, done: float) -> None:
        """Be told which share of the training is done, before each step."""
        self.warm = min(1.0, done / self.objective.sparsity_warmup) if self.objective.sparsity_warmup > 0 else 1.0

    def loss(self, batch: Batch, *, dead: Bool[Tensor, "d_sae"] | None = None) -> Losses:
        """Return the training loss of a batch.

        Args:
            batch: activations; `mask`, where given, leaves rows out (a GPU then waits for their number).
            dead: latents that AuxK trains on the error; None for none.

        Returns:
            The loss; of several processes `total` is this one's share of it, all else is of all tokens.
        """
        across = self.across
        batch = _without_masked(batch)
        seen = self.seen(batch.x.to(self.W_enc.dtype))
        x, context = self.space.own(batch.x.to(self.W_enc.dtype))
        target, n_tokens = self._target(batch, x, context), across.count(len(x))
        if batch.grad is not None:
            batch = replace(batch, grad=context.gradient(batch.grad))
        # Counted on a CPU alone: a GPU would have to wait.
        count = across.latents.count(int(dead.sum())) if dead is not None and dead.device.type == "cpu" else None
        dead = None if count == 0 else dead
        few = count is not None and count <= _FEW * self.k_aux
        with_aux = dead is not None and self.terms.aux_coef > 0
        activity = self._activity(x, batch, dead if with_aux and not few else None)
        rest = across.alike(target - self.b_dec - self._skipped(seen))
        variance = self._variance(target, n_tokens)
        errors: list[Tensor] = []
        for band in activity.bands(self.W_dec, self._widths()):
            errors.append((errors[-1] if errors else rest) - across.over_latents(band))
        squares = torch.stack([error.pow(2).sum() for error in errors])
        total = squares.mean() / (variance if self.terms.loss == "fvu" else max(1, n_tokens))
        none = torch.zeros_like(variance)
        beyond = None
        if batch.beyond is not None:
            made = target - errors[-1]
            made = self.space.unnormalized(made, context) if self.target_space is self.space else made
            total, beyond = batch.beyond.joined(total, made)
        penalty, aux = self._penalty(activity, n_tokens), none
        if penalty is not None:
            penalty = across.over_latents(penalty)
            total = total + self.warm * self.terms.sparsity * penalty
        if (extra := self._extra(activity, x, target, dead)) is not None:
            total = total + extra
        if dead is not None and with_aux:
            guess = (
                self._dead_by_products(x, dead, batch)
                if activity.dead is None
                else self._dead_by_entries(activity.dead)
            )
            aux = _aux(across.over_latents(guess), errors[-1].detach(), dead, across)
            scale = 1.0 if self.terms.loss == "fvu" else variance / max(1, n_tokens)
            total = total + self.terms.aux_coef * scale * aux
        fired = across.tokens.sum(activity.fired(self.W_enc.shape[1]))
        missed, aux, penalty = across.over_tokens(squares[-1], aux, none if penalty is None else penalty)
        return Losses(
            total=total,
            fvu=(missed / variance).detach(),
            aux=aux,
            penalty=penalty,
            l0=across.latents.sum(fired.sum()) / max(1, n_tokens),
            fired=fired,
            beyond=beyond,
        )

    def _variance(self, target: Tensor, n_tokens: int) -> Tensor:
        """Summed over tokens and dimensions."""
        if n_tokens == 0:
            return target.new_ones(())
        tokens = self.across.tokens
        mean = target.mean(0) if tokens.size == 1 else tokens.sum(target.sum(0)) / n_tokens
        return tokens.sum((target - mean).pow(2).sum()).clamp_min(_TINY)

    def _widths(self) -> list[int]:
        """The prefixes, counted from the first latent that is here."""
        mine = self.across.place(self.cfg.d_sae)
        return [min(max(width - mine.start, 0), mine.stop - mine.start) for width in self.objective.prefixes]

    @property
    def k_aux(self) -> int:
        """Dead latents that guess the error of each token."""
        wanted = max(1, self.cfg.d_in // 2) if self.objective.k_aux is None else self.objective.k_aux
        return min(wanted, self.cfg.d_sae)

    @torch.no_grad()
    def init_from(
        self, x: Float[Tensor, "token d_in"], *, seed: int, target: Float[Tensor, "token d_out"] | None = None
    ) -> None:
        """Set b_dec to the target's mean, W_dec to unit rows, W_enc to the multiple of its transpose that fits.

        The rows are `first_directions`, by default random ones. The multiple is the one with the smallest squared error
        on the sample: with y the first reconstruction less b_dec, ⟨target − b_dec, y⟩ / ⟨y, y⟩. So training begins at
        an FVU of 1 at most; many latents that overlap would else begin far above it. Of a transcoder, unit columns of
        W_enc are drawn instead, W_dec's rows are what the linear map that fits the sample best makes of them, and
        b_enc takes the input's mean out.

        Source: Gao et al. 2024 (2406.04093), appendix A.1. Departure: least squares, where they match the norm.
        """
        generator = torch.Generator().manual_seed(seed)
        for parameter in self._of_input():
            parameter.zero_()
        x, context = self.space.own(x)
        target = None if target is None else self._target(Batch(x, target), x, context)
        self.b_dec.copy_((x if target is None else target).double().mean(0))
        mine = self.across.place(self.cfg.d_sae)
        rows = first_directions(x, self.cfg.d_sae, self.objective, generator, place=mine).to(self.W_enc)
        self.W_enc.copy_(rows.T)
        if target is None:
            self.W_dec.copy_(rows)
        else:
            # Else an output's direction would know nothing of the input that it goes with, and the fit be next to 0.
            made = rows.double() @ _linear_map(x.double(), target.double()).to(rows.device)
            self.W_dec.copy_(made / made.norm(dim=-1, keepdim=True).clamp_min(_TINY))
            self._bias.copy_(-(x.double().mean(0) @ self.W_enc.double()))
        if self.has_skip:
            self.W_skip.zero_()
        self._begin()
        goal = x if target is None else target
        x = x.to(self.W_enc.dtype)
        y = self.across.over_latents(self._activity(x, Batch(x), None).decoded(self.W_dec)).double()
        power = y.pow(2).sum()
        # Of what is constant nothing is left to fit.
        fit = ((goal.to(y) - self.b_dec) * y).sum() / torch.where(power > 0, power, 1)
        fit = torch.where(fit > 0, fit, 1).to(self.W_enc)
        self.W_enc.mul_(fit)
        self._bias.mul_(fit)

    def _begin(self) -> None:
        """Set what else an architecture has before training; nothing by default."""

    @torch.no_grad()
    def before_step(self) -> None:
        """Take out of the decoder's gradient what would only change the norm of its rows."""
        if self.terms.unit_norm and self.W_dec.grad is not None:
            # A few rows at a time, which stay in cache between the two.
            for grad, rows in zip(self.W_dec.grad.split(_ROWS), self.W_dec.split(_ROWS), strict=True):
                grad.addcmul_((grad * rows).sum(-1, keepdim=True), rows, value=-1)

    @torch.no_grad()
    def after_step(self) -> None:
        """Bring the decoder's rows back to norm 1."""
        if self.terms.unit_norm:
            self.W_dec.div_(self.W_dec.norm(dim=-1, keepdim=True).clamp_min(_TINY))

    @torch.no_grad()
    def fold_scale(self, scale: float, target_scale: float | None = None) -> None:
        """Turn a dictionary of `scale · x` into the same one of `x`, its latents divided by `scale`, in place."""
        out = scale if target_scale is None else target_scale
        if self.space.normalize != "none" and scale != 1:
            raise ConfigError(
                f"a scale of {scale:g} cannot be folded into a dictionary that normalises each token "
                f"({self.space.normalize}) before; train with normalize {self.space.normalize!r} or 'none'"
            )
        # ReLU, TopK and thresholds commute with a positive factor.
        for parameter in self._of_input():
            parameter.div_(scale)
        self.b_dec.div_(out)
        if out != scale:
            self.W_dec.mul_(scale / out)
        if self.has_skip:
            self.W_skip.mul_(scale / out)

    @torch.no_grad()
    def fold_whitening(
        self,
        mean: Float[Tensor, "d_in"],
        forward: Float[Tensor, "d_in d_in"],
        back: Float[Tensor, "d_in d_in"],
        *,
        target_scale: float = 1.0,
    ) -> None:
        """Turn a dictionary of (x − mean) · forward into the same one of x, its latents unchanged, in place.

        What an SAE reconstructs was whitened with its input; a transcoder's target was multiplied by `target_scale`.
        Decoder rows then have other norms. Sums are in fp64.

        Args:
            mean: of the activations.
            forward: the map that made them white.
            back: its inverse.
            target_scale: of what a transcoder reconstructs.

        Raises:
            ConfigError: tokens are normalised one by one besides.
        """
        if self.space.normalize != "none":
            raise ConfigError(f"whitening cannot be folded into a dictionary that has {self.space.normalize} besides")
        mean, forward, back = (part.double() for part in (mean, forward, back))
        self.W_enc.copy_(forward @ self.W_enc.double())
        if self._centre is None:
            self._move_pre(-(mean @ self.W_enc.double()))
        if self.target_space is self.space:
            self.W_dec.copy_(self.W_dec.double() @ back)
            self.b_dec.copy_(self.b_dec.double() @ back + mean)
            return
        if self.has_skip:
            self.W_skip.copy_(self.W_skip.double() @ forward.T)
            self.b_dec.copy_(self.b_dec.double() - mean @ self.W_skip.double().T)
            self.W_skip.div_(target_scale)
        self.W_dec.div_(target_scale)
        self.b_dec.div_(target_scale)

    def _move_pre(self, shift: Float[Tensor, "d_sae"]) -> None:
        """Add to what pre-activations are without their bias."""
        self._bias.add_(shift.to(self._bias.dtype))

    @torch.no_grad()
    def fold_decoder_norm(self) -> None:
        """Multiply each latent by the norm of its decoder row, which becomes 1; reconstructions stay as they are."""
        norm = self.W_dec.norm(dim=-1).clamp_min(_TINY)
        self.W_dec.div_(norm[:, None])
        self.W_enc.mul_(norm)
        for parameter in self._of_input():
            parameter.mul_(norm)

    def _of_input(self) -> Sequence[Tensor]:
        """What is added to, or compared with, pre-activations, and scales as they do: [d_sae] each."""
        return [self.b_enc]

    # -- inside ---------------------------------------------------------------------------------------------------

    def decode(self, latents: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_out"]:
        """Return the activations that some latents stand for, flat.

        Raises:
            ConfigError: that depends on the activation; `reconstructed` takes it too.
        """
        made = self.decode_own(latents)
        # What a transcoder gives never depends on how its input was seen.
        return self.target_space.alone(made) if self.target_space is self.space else self.target_space.unfixed(made)

    def decode_own(self, latents: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_out"]:
        """Return what some latents stand for in the space of the weights; what an architecture changes."""
        return latents.to(self.W_dec.dtype) @ self.W_dec + self.b_dec

    def _encoder(self, *, score: Score | None = None, dead: Tensor | None = None) -> Encoder:
        return Encoder(
            self.W_enc, self._bias, self._centre, score=score, dead=dead, k_dead=self.k_aux, across=self.across
        )

    @property
    def _centre(self) -> Tensor | None:
        return self.b_dec if self.cfg.apply_b_dec_to_input else None

    def _pre(self, x: Tensor) -> Tensor:
        centre = self._centre
        return (x if centre is None else x - centre) @ self.W_enc + self._bias

    def _target(self, batch: Batch, x: Tensor, context: Context) -> Tensor:
        target = x
        if batch.target is not None:
            target = self.target_seen(batch.target.to(x.dtype))
            target = context.normalized(target) if self.target_space is self.space else target
        if target.shape != (len(x), self.d_out):
            raise ShapeError(
                f"targets of shape {tuple(target.shape)} for a dictionary that gives {self.d_out} dimensions of "
                f"each of {len(x)} tokens; give batch.target [{len(x)} {self.d_out}]"
            )
        return target

    def _skipped(self, x: Tensor) -> Tensor | float:
        return x @ self.W_skip.T if self.has_skip else 0.0

    def _dead_by_entries(self, codes: Codes) -> Tensor:
        """The error as the best dead latents of each token guess it."""
        return decode_codes(revived(codes.values), codes, self.W_dec)

    def _dead_by_products(self, x: Tensor, dead: Tensor, batch: Batch) -> Tensor:
        """The same, by dense products over the dead latents alone."""
        latents = dead.nonzero()[:, 0]
        W_enc, W_dec = self.W_enc.index_select(1, latents), self.W_dec.index_select(0, latents)
        centre = self._centre
        pre = (x if centre is None else x - centre) @ W_enc + self._bias.index_select(0, latents)
        if self.across.latents.count(len(latents)) > self.k_aux:
            score = self._importance(pre.detach(), W_dec.detach(), batch)
            score, best = score.topk(min(self.k_aux, len(latents)), dim=-1, sorted=False)
            kept = pre.gather(-1, best)
            if self.across.latents.size > 1:
                kept = kept.masked_fill(~self.across.best(score, self.k_aux), 0)
            pre = torch.zeros_like(pre).scatter(-1, best, kept)
        return revived(pre) @ W_dec

    def _importance(self, pre: Tensor, W_dec: Tensor, batch: Batch) -> Tensor:
        """What dead latents are chosen by: as all latents are, of which these are some."""
        return pre


def revived(pre: Tensor) -> Tensor:
    """ReLU forwards, for a code is never negative; identity backwards: else nothing would lift the most dead ones."""
    return pre + (pre.relu() - pre).detach()


def _aux(guess: Tensor, error: Tensor, dead: Tensor, across: Across) -> Tensor:
    """The error's share that a guess of it misses; 0 when no latent is dead."""
    share = (error - guess).pow(2).sum() / across.tokens.sum(error.pow(2).sum()).clamp_min(_TINY)
    # A cut-off instead of a branch: asking the host whether any is dead would make a GPU wait.
    return torch.where(across.any_latent(dead) & share.isfinite(), share, torch.zeros_like(share))


def _without_masked(batch: Batch) -> Batch:
    if batch.mask is None:
        return batch
    parts = {name: getattr(batch, name) for name in ("x", "target", "grad", "tokens", "positions")}
    return replace(batch, mask=None, **{n: part[batch.mask] for n, part in parts.items() if part is not None})


def _linear_map(x: Tensor, y: Tensor) -> Tensor:
    """What makes y of x with the smallest squared error, but for their means: [d_in d_out]."""
    x, y = x - x.mean(0), y - y.mean(0)
    square = x.T @ x
    ridge = 1e-6 * square.diagonal().mean().clamp_min(_TINY)
    found: Tensor = torch.linalg.solve(square + ridge * torch.eye(len(square), dtype=x.dtype, device=x.device), x.T @ y)
    return found
