"""The loop that fits a dictionary to batches of activations."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from interp.core.errors import DataError
from interp.data.store import Batch
from interp.dictionaries.base import Dictionary, Losses
from interp.train.common import TrainingError, deterministic
from interp.train.config import TrainOptions

__all__ = ["Training", "TrainingError", "default_lr", "deterministic", "train_dictionary"]

_SAMPLE_TOKENS = 16_384  # what the first weights and the scale are taken from


@dataclass(frozen=True)
class Training:
    """What a fit came to.

    Attributes:
        steps: optimiser steps taken.
        tokens: tokens seen.
        stopped: True when it was asked to stop before its end.
        scale: what activations were multiplied by while training; folded into the weights.
        seconds: wall time of the loop.
        last: the last line of metrics.
    """

    steps: int
    tokens: int
    stopped: bool
    scale: float
    seconds: float
    last: dict[str, int | float]


def default_lr(d_sae: int) -> float:
    """Adam's step size for a dictionary of `d_sae` latents: 2e-4 / √(d_sae / 2^14).

    Source: Gao et al. 2024 (2406.04093), appendix A.3, which finds 1/√n; the constant is the one in common use.
    """
    return 2e-4 / (d_sae / 2**14) ** 0.5


def train_dictionary(
    batches: Iterable[Batch],
    dictionary: Dictionary,
    options: TrainOptions,
    *,
    seed: int = 0,
    log: Callable[[dict[str, int | float]], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    progress: bool = True,
    name: str = "",
) -> Training:
    """Fit a dictionary, in place, and fold the input scale, so that it acts on raw activations.

    Nothing is copied to the host but one line of metrics every `options.log_every` steps; that is also when a loss that
    is not finite is noticed. With the same batches, seed and thread count, the weights are the same to the bit (on a
    GPU only with `options.deterministic`).

    Args:
        batches: activations; the fit ends after `options.tokens` tokens, or earlier when there are no more.
        dictionary: an untrained dictionary on its device; its first weights are drawn here.
        options: how to fit.
        seed: of the first weights.
        log: called with each line of metrics: step, tokens, fvu, l0, aux, dead (shares), lr, tokens_per_s.
        should_stop: asked before each step; when it says True, the fit ends there and `stopped` is set.
        progress: show a progress bar on stderr.
        name: of the site, for the bar and for errors.

    Returns:
        Steps, tokens, scale and the last metrics; the dictionary itself is changed in place.

    Raises:
        DataError: no batch came.
        TrainingError: the loss is not finite; the message names the step and the site.
    """
    with deterministic(options.deterministic):
        fit = _Fit(dictionary, options, name)
        asked = should_stop or (lambda: False)
        stream = fit.start(iter(batches), seed, asked)
        bar = tqdm(total=options.tokens, unit="tok", unit_scale=True, desc=name, file=sys.stderr, disable=not progress)
        with bar:
            for batch in stream:
                if asked():
                    break
                fit.step(batch)
                bar.update(len(batch.x))
                if fit.steps % options.log_every == 0:
                    fit.report(log, bar)
                if fit.tokens >= options.tokens:
                    break
            fit.report(log, bar)
        stopped = fit.tokens < options.tokens and asked()
        dictionary.fold_scale(fit.scale)
    dictionary.eval().requires_grad_(False)
    return Training(fit.steps, fit.tokens, stopped, fit.scale, time.perf_counter() - fit.began, fit.last)


class _Fit:
    """The state of one fit: optimiser, counters, and sums since the last report, all on the dictionary's device."""

    def __init__(self, dictionary: Dictionary, options: TrainOptions, name: str) -> None:
        self.dictionary, self.options = dictionary.train().requires_grad_(True), options
        self.site = name or "the site"
        self.device = dictionary.W_enc.device
        d_sae = dictionary.cfg.d_sae
        self.lr = default_lr(d_sae) if options.lr is None else options.lr
        self.optimizer = torch.optim.Adam(dictionary.parameters(), lr=self.lr, fused=True)
        self.steps, self.tokens, self.scale = 0, 0, 1.0
        self.last_fired = torch.zeros(d_sae, dtype=torch.long, device=self.device)
        self.first_bad = torch.full((), -1, dtype=torch.long, device=self.device)
        self.sums = torch.zeros(3, device=self.device)
        self.reported = 0
        self.last: dict[str, int | float] = {}
        self.began = self.marked = time.perf_counter()
        self.marked_tokens = 0

    def start(self, batches: Iterator[Batch], seed: int, asked: Callable[[], bool]) -> Iterator[Batch]:
        """Draw scale and first weights from the first batches; return all batches, those included."""
        first: list[Batch] = []
        while sum(len(b.x) for b in first) < _SAMPLE_TOKENS and (batch := next(batches, None)) is not None:
            first.append(batch)
        if not first and asked():
            return batches
        if not first:
            raise DataError(f"no batch of activations came for {self.site}; its text has no tokens that count")
        sample = torch.cat([_counted(b) for b in first]).to(self.device, torch.float32)
        if self.options.normalize:
            norm = float(sample.norm(dim=-1).double().mean())
            if not 0 < norm < float("inf"):
                raise TrainingError(f"activations at {self.site} have mean norm {norm}; they cannot be scaled")
            self.scale = sample.shape[1] ** 0.5 / norm
        self.dictionary.init_from(sample * self.scale, seed=seed)
        return chain(first, batches)

    def step(self, batch: Batch) -> None:
        """One optimiser step."""
        x = batch.x.to(self.device, torch.float32) * self.scale
        target = None if batch.target is None else batch.target.to(self.device, torch.float32) * self.scale
        losses = self.dictionary.loss(replace(batch, x=x, target=target), dead=self._dead())
        losses.total.backward()
        self.dictionary.before_step()
        torch.nn.utils.clip_grad_norm_(self.dictionary.parameters(), self.options.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * self._schedule()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.dictionary.after_step()
        self._count(losses, len(x))

    def report(self, log: Callable[[dict[str, int | float]], None] | None, bar: "tqdm[Any]") -> None:
        """Read the sums since the last report, stop if a loss was not finite, and say how it goes."""
        n = self.steps - self.reported
        if n == 0:
            return
        dead = torch.zeros((), device=self.device) if (mask := self._dead()) is None else mask.float().mean()
        *values, bad = torch.stack([*(self.sums / n), dead, self.first_bad.float()]).tolist()
        if bad >= 0:
            raise TrainingError(
                f"the loss became NaN or infinite at step {int(bad) + 1} on {self.site}, with lr "
                f"{self.lr:g}; nothing was saved. Lower lr, or look for activations that are not finite"
            )
        now = time.perf_counter()
        speed = (self.tokens - self.marked_tokens) / max(now - self.marked, 1e-9)
        fvu, aux, l0, dead_share = values
        self.last = {
            "step": self.steps,
            "tokens": self.tokens,
            "fvu": fvu,
            "l0": l0,
            "aux": aux,
            "dead": dead_share,
            "lr": self.optimizer.param_groups[0]["lr"],
            "tokens_per_s": speed,
        }
        self.reported, self.marked, self.marked_tokens = self.steps, now, self.tokens
        self.sums.zero_()
        bar.set_postfix(fvu=f"{fvu:.3f}", l0=f"{l0:.1f}", dead=f"{dead_share:.1%}")
        if log is not None:
            log(self.last)

    def _dead(self) -> Tensor | None:
        """Latents that have not fired for long; None while none can be."""
        if self.tokens <= self.options.dead_after_tokens:
            return None
        return self.tokens - self.last_fired > self.options.dead_after_tokens

    def _schedule(self) -> float:
        """Factor of lr: up over `warmup`, then 1, then down to 0 over `decay`."""
        done = self.tokens / self.options.tokens
        # Half a batch in: neither the first nor the last step is lost to a factor of 0.
        up = (done + 0.5 * self.options.batch_size / self.options.tokens) / max(self.options.warmup, 1e-12)
        down = (1 - done) / max(self.options.decay, 1e-12)
        return max(min(1.0, up, down), 0.0)

    @torch.no_grad()
    def _count(self, losses: Losses, n: int) -> None:
        self.first_bad = torch.where((self.first_bad < 0) & ~losses.total.isfinite(), self.steps, self.first_bad)
        self.sums += torch.stack([losses.fvu.float(), losses.aux.float(), losses.l0.float()])
        self.steps, self.tokens = self.steps + 1, self.tokens + n
        self.last_fired = torch.where(losses.fired > 0, self.tokens, self.last_fired)


def _counted(batch: Batch) -> Float[Tensor, "token d_in"]:
    return batch.x if batch.mask is None else batch.x[batch.mask]
