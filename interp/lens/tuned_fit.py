"""Fitting a tuned lens: all layers from one forward per batch, each by its own KL to the model's output.

Source: Belrose et al. (2023), arXiv 2303.08112, §3 and the authors' code: SGD with Nesterov momentum 0.9, step size 1
that falls to 0 in a line (given to the optimiser as 1 − momentum, because its momentum sums steps up), weight decay
1e-3, gradients clipped to norm 1, 250 steps; or Adam with AMSGrad. Departures: special tokens and pads do not count;
each layer's gradient is clipped by itself, so that a layer's map does not depend on which others are fitted; there is
no map of the last stream.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from interp.core.disk import weights_digest
from interp.core.errors import ConfigError, DataError
from interp.core.manager import HookManager
from interp.core.metrics import kl_divergence
from interp.core.readout import Readout
from interp.core.result import Provenance
from interp.core.run import Run
from interp.core.settings import Settings
from interp.core.site import Site
from interp.core.text import Tokens
from interp.data.tokens import TokenSource
from interp.lens.capture import checked_readout, last_stream
from interp.lens.tuned_lens import TunedLens
from interp.train.common import TrainingError, deterministic
from interp.train.signals import StopSignals

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["TunedLensOptions", "evaluate_tuned_lens", "fit_tuned_lens"]

# So many logits are made at once, of one layer: rows are taken in chunks of this over the vocabulary's size.
_LOGITS_AT_ONCE = 2**26


class TunedLensOptions(Settings):
    """How a tuned lens is fitted."""

    steps: int = Field(default=250, gt=0, description="optimiser steps, one batch each")
    optimizer: Literal["sgd", "adam"] = Field(default="sgd", description="SGD with Nesterov, or Adam (AMSGrad)")
    lr: float | None = Field(default=None, gt=0, description="step size at the start; None is 1 for sgd, 1e-3 for adam")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="momentum of sgd, first beta of adam")
    weight_decay: float = Field(default=1e-3, ge=0, description="added to the gradient, per unit of weight")
    clip: float = Field(default=1.0, gt=0, description="largest norm of one layer's gradient")
    rows: int = Field(default=16, gt=0, description="rows per batch, where the data is not a TokenSource")
    log_every: int = Field(default=10, gt=0, description="steps between looks at the losses")
    seed: int = Field(default=0, description="of the order of rows, where the data is not a TokenSource")
    deterministic: bool = Field(default=True, description="same seed, same bytes; slower on a GPU")

    @property
    def first_lr(self) -> float:
        """The step size at the start."""
        return (1.0 if self.optimizer == "sgd" else 1e-3) if self.lr is None else self.lr

    def factor(self, step: int) -> float:
        """Return the share of the step size that a step has: Adam's first fifth (at most 1000 steps) rises."""
        warmup = min(1000, self.steps // 5) if self.optimizer == "adam" else 0
        return (step + 1) / (warmup + 1) if step < warmup else (self.steps - step) / (self.steps - warmup)


def fit_tuned_lens(
    hm: HookManager,
    data: Any,
    *,
    options: TunedLensOptions | None = None,
    sites: Sequence[Site | str] | None = None,
    held_out: Any = None,
    start: TunedLens | None = None,
    progress: bool = True,
) -> TunedLens:
    """Fit one affine map per residual site, so that the site read through it says what the model will say.

    One forward per batch gives all sites; then each site is read, and its gradient taken, by itself. Memory: the
    residuals of a batch (sites · rows · length · d_model), 4 tensors of min(rows · length · d_vocab, 2^26) logits, and
    4 (Adam: 6) · sites · d_model² for maps, gradients and moments.

    Ctrl-C (or SIGTERM) ends the fit after the step under way; what was fitted is returned, with `stopped`.

    Args:
        hm: The model; it is left as it is.
        data: A `TokenSource`, begun again where it ends; or whatever `hm.run` takes, whose rows come in another order
            each time round.
        options: How; the authors' settings by default.
        sites: As for `TunedLens.identity`.
        held_out: Data for `evaluate_tuned_lens`; a TokenSource gives its first 2^14 tokens.
        start: A lens to go on from, with new moments.
        progress: Show a bar on stderr when it is a terminal.

    Returns:
        The lens.

    Raises:
        TrainingError: A loss that is no longer a number; names the site and the step.
        DataError: No token that counts.
        ModelError: The model makes its logits in an unknown way, or `start` is of another model.

    Source: see the module's text.
    """
    chosen = options or TunedLensOptions()
    if start is not None and sites is not None:
        raise ConfigError("start=… brings its own sites; leave sites=… out")
    if start is not None:
        start.check(hm)
    begun = start or TunedLens.identity(hm, sites)
    fit = _Fit(hm, begun, chosen)
    batches = _batches(hm, data, chosen.rows, chosen.seed)
    with deterministic(chosen.deterministic), StopSignals() as stopped, _bar(chosen.steps, progress) as bar:
        for inputs, counts in islice(batches, chosen.steps):
            fit.take(inputs, counts)
            bar.update()
            if fit.step % chosen.log_every == 0:
                bar.set_postfix(kl=f"{float(fit.losses[fit.step - 1].mean()):.3f}", refresh=False)
                fit.check()
            if stopped():
                break
    fit.check()
    settings = {**chosen.model_dump(), "sites": begun.sites, "data": _described(data)}
    made = replace(
        begun,
        provenance=Provenance.of(hm, settings=settings, seed=chosen.seed),
        weight=fit.weight.detach().cpu(),
        bias=fit.bias.detach().cpu(),
        steps=begun.steps + fit.step,
        tokens=begun.tokens + fit.tokens,
        stopped=fit.step < chosen.steps,
        losses=torch.cat([begun.losses, fit.losses[: fit.step].cpu()]),
        model_weights=weights_digest(hm.root),
    )
    return made if held_out is None or made.stopped else evaluate_tuned_lens(hm, held_out, made)


def evaluate_tuned_lens(
    hm: HookManager, data: Any, lens: TunedLens, *, max_tokens: int = 2**14, rows: int = 16
) -> TunedLens:
    """Return a lens with its KL on new text, per row, beside that of the logit lens.

    Memory: as for `fit_tuned_lens`, without gradients.

    Args:
        hm: The model.
        data: Text that the lens was not fitted on; as for `fit_tuned_lens`.
        lens: The lens.
        max_tokens: The batch that reaches so many tokens, pads and special ones included, is the last.
        rows: Rows per batch, where the data is not a TokenSource.

    Raises:
        ModelError: A lens of another model.
        DataError: No token that counts.
    """
    lens.check(hm)
    if max_tokens < 1 or rows < 1:
        raise ConfigError(f"max_tokens is {max_tokens} and rows {rows}; expected at least 1 of each")
    last = last_stream(hm)
    ours: list[Tensor] = []
    theirs: list[Tensor] = []
    given = 0
    for inputs, counts in _batches(hm, data, rows, None):
        out = hm.run(inputs, read=[*lens.sites, last])
        with torch.no_grad():
            tuned, plain = _row_means(Readout.of(hm), lens, out, counts)
        ours.append(tuned.cpu())
        theirs.append(plain.cpu())
        given += inputs.ids.numel()
        if given >= max_tokens:
            break
    return replace(lens, kl=torch.cat(ours, 1), kl_logit_lens=torch.cat(theirs, 1))


class _Fit:
    """The maps, their optimiser and the losses so far, all on the device of the unembedding."""

    def __init__(self, hm: HookManager, begun: TunedLens, options: TunedLensOptions) -> None:
        self.hm, self.options, self.sites = hm, options, [Site(name) for name in begun.sites]
        self.readout, self.last = Readout.of(hm), last_stream(hm)
        device = self.readout.unembed.weight.device
        self.weight = begun.weight.to(device, copy=True).requires_grad_()
        self.bias = begun.bias.to(device, copy=True).requires_grad_()
        o, maps = options, [self.weight, self.bias]
        self.optimizer: torch.optim.Optimizer
        if o.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(
                maps, lr=o.first_lr, momentum=o.momentum, nesterov=o.momentum > 0, weight_decay=o.weight_decay
            )
        else:
            betas = (o.momentum, 0.999)
            self.optimizer = torch.optim.Adam(
                maps, lr=o.first_lr, betas=betas, amsgrad=True, weight_decay=o.weight_decay
            )
        self.losses = torch.zeros(o.steps, len(self.sites), device=device)
        self.step = self.tokens = self.checked = 0

    def take(self, inputs: Tokens, counts: Bool[Tensor, "row pos"]) -> None:
        """Take one step; but for the first batch's check of the readout, nothing is read back from the device."""
        first, end = self.step == 0, self.last.at(pos=-1)
        reads = [*self.sites, self.last]
        out = self.hm.run(inputs, read=[*reads, end] if first else reads, logits="last" if first else "none")
        if first:
            checked_readout(self.hm, out, end)
        flat = counts.reshape(-1).nonzero()[:, 0]
        streams, n = [_picked(out[site], flat, self.weight.device) for site in reads], len(flat)
        grads = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        size = max(1, _LOGITS_AT_ONCE // self.hm.d_vocab)
        for begin in range(0, n, size):
            part = slice(begin, begin + size)
            with torch.no_grad():
                final = self.readout.logits(streams[-1][part]).float().log_softmax(-1)
            for i in range(len(self.sites)):
                self._add(i, streams[i][part], final, n, grads)
        self._move(grads)
        self.step, self.tokens = self.step + 1, self.tokens + n

    def _add(
        self,
        i: int,
        stream: Float[Tensor, "token d_model"],
        final: Float[Tensor, "token d_vocab"],
        n: int,
        grads: tuple[Tensor, Tensor],
    ) -> None:
        """Add one site's loss and gradient of one chunk of tokens; the graph is gone with the call."""
        h = stream.float()
        weight, bias = self.weight[i].detach().requires_grad_(), self.bias[i].detach().requires_grad_()
        logits = self.readout.logits((h + h @ weight + bias).to(stream.dtype)).float()
        share = final.exp()
        # KL = Σ p log p − Σ p · logits + log Σ exp(logits), because p sums to 1.
        loss = ((share * final).nan_to_num().sum(-1) - (share * logits).sum(-1) + logits.logsumexp(-1)).sum() / n
        for total, grad in zip(grads, torch.autograd.grad(loss, [weight, bias]), strict=True):
            total[i] += grad
        self.losses[self.step, i] += loss.detach()

    def _move(self, grads: tuple[Tensor, Tensor]) -> None:
        o = self.options
        norm = torch.sqrt(grads[0].pow(2).sum((1, 2)) + grads[1].pow(2).sum(1))
        factor = (o.clip / norm.clamp(min=1e-30)).clamp(max=1.0)
        self.weight.grad, self.bias.grad = grads[0] * factor[:, None, None], grads[1] * factor[:, None]
        scale = 1.0 - o.momentum if o.optimizer == "sgd" else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = o.first_lr * scale * o.factor(self.step)
        self.optimizer.step()

    def check(self) -> None:
        """Refuse losses that are not numbers, among those since the last look.

        Raises:
            TrainingError: names the first one's site and step.
        """
        bad = (~self.losses[self.checked : self.step].isfinite()).nonzero()
        if len(bad):
            step, site = self.checked + int(bad[0, 0]), self.sites[int(bad[0, 1])].short
            raise TrainingError(
                f"the loss of {site} is {float(self.losses[step, int(bad[0, 1])])} at step {step + 1}; lower lr "
                f"({self.options.first_lr}), or look for NaN in the model's stream"
            )
        self.checked = self.step


def _batches(
    hm: HookManager, data: Any, rows: int, seed: int | None
) -> Iterator[tuple[Tokens, Bool[Tensor, "row pos"]]]:
    """Batches with what counts in them, without end; once, in order, without a seed."""
    if isinstance(data, TokenSource):
        yield from _of_source(data, again=seed is not None)
        return
    tokens = hm.to_tokens(data)
    counts = tokens.mask & ~hm.special_mask(tokens.ids)
    if not counts.any():
        raise DataError("no token counts: all of the data are pads or special tokens; give text")
    generator = torch.Generator().manual_seed(seed or 0)
    while True:
        order = torch.arange(len(tokens)) if seed is None else torch.randperm(len(tokens), generator=generator)
        for chosen in order.split(rows):
            if counts[chosen].any():
                spare = tokens.position_ids
                positions = None if spare is None else spare[chosen]
                yield Tokens(tokens.ids[chosen], tokens.mask[chosen], position_ids=positions), counts[chosen]
        if seed is None:
            return


def _of_source(data: TokenSource, *, again: bool) -> Iterator[tuple[Tokens, Bool[Tensor, "row pos"]]]:
    while True:
        any_counts = False
        for block in data.blocks():
            counts = block.mask & ~block.special
            if counts.any():
                any_counts = True
                yield block.inputs, counts
        if not any_counts:
            raise DataError("no token counts: all of the data are pads or special tokens; give text")
        if not again:
            return


def _picked(
    x: Float[Tensor, "row pos d_model"], flat: Int[Tensor, " token"], device: torch.device
) -> Float[Tensor, "token d_model"]:
    return x.flatten(0, 1).index_select(0, flat.to(x.device)).to(device)


def _row_means(
    readout: Readout, lens: TunedLens, out: Run, counts: Bool[Tensor, "row pos"]
) -> tuple[Float[Tensor, "place kept"], Float[Tensor, "place kept"]]:
    """Mean KL of every row with tokens that count, by the tuned lens and by the logit lens."""
    flat, device = counts.reshape(-1).nonzero()[:, 0], readout.unembed.weight.device
    streams = {place: _picked(out[place], flat, device) for place in lens.places}
    # Each token has a place of its own, so that nothing is added up in an order that could differ.
    far = torch.zeros(2, len(streams), counts.numel(), device=device)
    at = flat.to(device)
    size = max(1, _LOGITS_AT_ONCE // readout.unembed.weight.shape[0])
    for begin in range(0, len(flat), size):
        chunk = slice(begin, begin + size)
        final = readout.logits(streams[lens.final][chunk])
        for i, (place, stream) in enumerate(streams.items()):
            for kind, made in enumerate((lens.translate(place, stream[chunk]), stream[chunk])):
                far[kind, i].index_copy_(0, at[chunk], kl_divergence(readout.logits(made), final).float())
    sizes = counts.sum(1).to(device)
    tuned, plain = far.reshape(2, len(streams), *counts.shape).sum(3)[:, :, sizes > 0] / sizes[sizes > 0]
    return tuned, plain


@contextmanager
def _bar(total: int, show: bool) -> "Iterator[tqdm[Any]]":
    from tqdm import tqdm

    # None: only where stderr is a terminal.
    with tqdm(total=total, desc="tuned lens", unit="step", disable=None if show else True) as bar:
        yield bar


def _described(data: Any) -> Any:
    return data.describe() if isinstance(data, TokenSource) else "rows of tokens"
