"""The loop that fits a dictionary to batches of activations, and all that its next step depends on."""

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from interp.core.errors import ConfigError, DataError
from interp.data.store import Batch
from interp.dictionaries.base import Dictionary, Losses, Transcoder
from interp.train.average import WeightAverage
from interp.train.checkpoint import random_states, restore_random_states
from interp.train.common import Training, TrainingError, deterministic, own_randomness
from interp.train.config import TrainOptions
from interp.train.normalization import Whitening, normalize_at_run_time
from interp.train.optimizers import default_lr, make_stepper
from interp.train.start import bring_to_norm
from interp.train.world import gathered, own_part

__all__ = [
    "DictionaryFit",
    "Training",
    "TrainingError",
    "default_lr",
    "deterministic",
    "run_fits",
    "train_dictionary",
]

_SAMPLE_TOKENS = 16_384  # what the first weights and the scale are taken from

_Log = Callable[[dict[str, int | float]], None]


def train_dictionary(
    batches: Iterable[Batch],
    dictionary: Dictionary,
    options: TrainOptions,
    *,
    seed: int = 0,
    log: _Log | None = None,
    should_stop: Callable[[], bool] | None = None,
    progress: bool = True,
    name: str = "",
) -> Training:
    """Fit a dictionary, in place, and fold the input scale, so that it acts on raw activations.

    Nothing is copied to the host but one line of metrics every `options.log_every` steps; that is also when a loss that
    is not finite is noticed. With the same batches, seed and thread count, the weights are the same to the bit (on a
    GPU only with `options.deterministic`). `interp.train.job.train_job` saves checkpoints and resumes.

    Args:
        batches: activations; the fit ends after `options.tokens` tokens, or earlier when there are no more.
        dictionary: an untrained dictionary on its device; its first weights are drawn here.
        options: how to fit.
        seed: of the first weights, and of what the loss may draw.
        log: called with each line of metrics: step, tokens, fvu, l0, aux, penalty, dead (shares), lr, tokens_per_s.
        should_stop: asked before each step; when it says True, the fit ends there and `stopped` is set.
        progress: show a progress bar on stderr.
        name: of the site, for the bar and for errors.

    Returns:
        Steps, tokens, scale and the last metrics; the dictionary itself is changed in place.

    Raises:
        ConfigError: the optimiser is not there, or `options.track` is set: there is no run folder to track.
        DataError: no batch came.
        TrainingError: the loss is not finite; the message names the step and the site.
    """
    if options.track:
        raise ConfigError(f"track is {options.track}, which train_job knows of; here log is called with each line")
    fit = DictionaryFit(dictionary, options, seed=seed, name=name)
    fit.run(batches, log=log, should_stop=should_stop, progress=progress)
    return fit.finish()


class DictionaryFit:
    """One fit: optimiser, counters, and sums since the last report, all on the dictionary's device.

    Args:
        dictionary: an untrained dictionary on its device; its weights are drawn, or restored, here. One that several
            processes train is fitted by each of them, on batches of as many rows; all counts are of all rows.
        options: how to fit.
        seed: of the first weights, and of what the loss may draw.
        name: of the site, for the bar and for errors.
        trained: the dictionary is one of raw activations that has been trained; it is scaled, and nothing is drawn.
    """

    def __init__(
        self, dictionary: Dictionary, options: TrainOptions, *, seed: int = 0, name: str = "", trained: bool = False
    ) -> None:
        self.dictionary, self.options = dictionary.train().requires_grad_(True), options
        self.seed, self.name, self.trained = seed, name, trained
        self.across, self.device = dictionary.across, dictionary.W_enc.device
        self.lr = default_lr(dictionary.cfg.d_sae, options.optimizer) if options.lr is None else options.lr
        self.optimizer = make_stepper(dictionary, options.optimizer, lr=self.lr)
        self.average = None if options.ema is None else WeightAverage(options.ema)
        self.steps, self.tokens, self.lr_now = 0, 0, 0.0
        self.scale = self.target_scale = 1.0
        self.whitening: Whitening | None = None
        normalize_at_run_time(dictionary, options.normalize, trained=trained)
        self.last_fired = torch.zeros(dictionary.W_enc.shape[1], dtype=torch.long, device=self.device)
        self.first_bad = torch.full((), -1, dtype=torch.long, device=self.device)
        self.sums = torch.zeros(4, device=self.device)
        self.beyond, self.beyond_sum = "", torch.zeros((), device=self.device)
        self.reported = 0
        self.last: dict[str, int | float] = {}
        self.began = self.marked = time.perf_counter()
        self.resumed_at = self.marked_tokens = 0
        self._ahead: list[Batch] = []
        self._random: dict[str, Tensor] = {}
        self.stopped = False

    @property
    def site(self) -> str:
        """The site's name for messages."""
        return self.name or "the site"

    @property
    def complete(self) -> bool:
        """Whether all tokens have been seen."""
        return self.tokens >= self.options.tokens

    @property
    def ahead(self) -> int:
        """Batches that were taken for the first weights and have not been trained on yet."""
        return len(self._ahead)

    def run(
        self,
        batches: Iterable[Batch],
        *,
        log: _Log | None = None,
        save: Callable[[], None] | None = None,
        save_wanted: Callable[[], bool] | None = None,
        should_stop: Callable[[], bool] | None = None,
        progress: bool = True,
    ) -> None:
        """Take steps until all tokens have been seen, the batches end, or it is asked to stop.

        Args:
            batches: activations; after `restore`, those that follow the step it went back to.
            log: called with each line of metrics.
            save: called after every `options.checkpoint_steps` steps and at the end, to save what `record` and
                `tensors` give; never when a loss was not finite.
            save_wanted: asked after each step whether to call `save` besides.
            should_stop: asked before each step.
            progress: show a progress bar on stderr.

        Raises:
            DataError: no batch came.
            TrainingError: the loss is not finite.
        """
        logs = None if log is None else [log]
        together = ([batch] for batch in batches)
        run_fits([self], together, logs, save=save, save_wanted=save_wanted, should_stop=should_stop, progress=progress)

    def finish(self) -> Training:
        """Say what the fit came to; the dictionary is then the average, if one is kept, and of raw activations."""
        if self.average is not None:
            self.average.give(self.dictionary)
        if self.whitening is None:
            self.dictionary.fold_scale(self.scale, self.target_scale)
        else:
            white = self.whitening
            self.dictionary.fold_whitening(white.mean, white.forward, white.back, target_scale=self.target_scale)
        self.dictionary.eval().requires_grad_(False)
        return Training(
            steps=self.steps,
            tokens=self.tokens,
            stopped=self.stopped,
            scale=self.scale,
            target_scale=self.target_scale,
            seconds=time.perf_counter() - self.began,
            last=self.last,
            resumed_at=self.resumed_at,
        )

    def record(self) -> dict[str, Any]:
        """Return the counters as plain JSON."""
        names = ("steps", "tokens", "scale", "target_scale", "lr_now", "reported", "last")
        found = {name: getattr(self, name) for name in names}
        return {**found, "beyond": self.beyond} if self.beyond else found

    def tensors(self) -> dict[str, Tensor]:
        """Return, on the CPU and by name, unfolded weights, their average, moments, sums and random states.

        With Adam and no average they take 12 bytes a parameter and 8 a latent. Several processes must ask together; the
        first has the whole.
        """
        found = {f"weights.{name}": value for name, value in self.dictionary.state_dict().items()}
        found |= self.optimizer.tensors(dict(self.dictionary.named_parameters())) | random_states(self.device)
        found |= {} if self.average is None else self.average.tensors()
        found |= {"sums": self.sums, "last_fired": self.last_fired}
        found |= {"beyond_sum": self.beyond_sum} if self.beyond else {}
        found |= {} if self.whitening is None else self.whitening.tensors()
        return gathered(self.across, found)

    @torch.no_grad()
    def restore(self, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go back to what `record` and `tensors` gave, of this dictionary or, split among processes, of the whole."""
        tensors = own_part(self.across, tensors)
        self.steps, self.tokens, self.reported = (int(record[name]) for name in ("steps", "tokens", "reported"))
        self.scale, self.target_scale = float(record["scale"]), float(record["target_scale"])
        self.whitening = Whitening.from_tensors(tensors, self.device)
        self.lr_now, self.last = float(record["lr_now"]), dict(record["last"])
        self.resumed_at = self.marked_tokens = self.tokens
        for name, value in self.dictionary.state_dict().items():
            value.copy_(tensors[f"weights.{name}"])
        self.optimizer.restore(dict(self.dictionary.named_parameters()), tensors)
        if self.average is not None:
            self.average.restore(self.dictionary, tensors)
        self.sums.copy_(tensors["sums"])
        self.last_fired.copy_(tensors["last_fired"])
        if beyond := str(record.get("beyond", "")):
            self.beyond = beyond
            self.beyond_sum.copy_(tensors["beyond_sum"])
        self._random = {name: value for name, value in tensors.items() if name.startswith("rng.")}

    def begin(self, first: Sequence[Batch]) -> None:
        """Take scale or whitening from the first batches, which are trained on afterwards; draw the first weights.

        Raises:
            DataError: there are none.
            TrainingError: activations are all zero, or not finite.
        """
        self._ahead = list(first)
        if not self._ahead:
            raise DataError(f"no batch of activations came for {self.site}; its text has no tokens that count")
        sample = self._sample("x")
        assert sample is not None
        target = self._sample("target")
        how = self.options.normalize
        if how == "mean_norm":
            self.scale = self.target_scale = self._scale_of(sample)
        if how == "whiten":
            self.whitening = Whitening.of(sample)
        if how != "none" and target is not None:
            self.target_scale = self._scale_of(target)
        if self.trained:
            self.dictionary.fold_scale(1 / self.scale, 1 / self.target_scale)
            bring_to_norm(self.dictionary)
            return
        given = None if target is None else target * self.target_scale
        self.dictionary.across = self.across.of_latents()  # each has the whole sample
        self.dictionary.init_from(self._input(sample), seed=self.seed, target=given)
        self.dictionary.across = self.across

    def restore_randomness(self) -> None:
        """Put back the random states of the saved step, if this fit went back to one."""
        if self._random:
            restore_random_states(self._random, self.device)

    def _sample(self, name: str) -> Tensor | None:
        """What the first batches have of inputs or targets, of all processes, at the tokens that count."""
        parts = [
            part if b.mask is None else part[b.mask] for b in self._ahead if (part := getattr(b, name)) is not None
        ]
        if self.across.tokens.size > 1:
            parts = [mine for part in parts for mine in self.across.tokens.gather(part.to(self.device, torch.float32))]
        return None if not parts else torch.cat(parts).to(self.device, torch.float32)

    def _scale_of(self, sample: Tensor) -> float:
        norm = float(sample.norm(dim=-1).double().mean())
        if not 0 < norm < float("inf"):
            raise TrainingError(f"activations at {self.site} have mean norm {norm}; they cannot be scaled")
        return sample.shape[1] ** 0.5 / norm

    def taken(self) -> Batch:
        """The next of the batches that the first weights were drawn from."""
        return self._ahead.pop(0)

    def due(self) -> bool:
        """Whether a state is to be saved after this step."""
        every = self.options.checkpoint_steps
        return every > 0 and self.steps % every == 0

    def step(self, batch: Batch) -> None:
        """One optimiser step."""
        self.dictionary.at(self.tokens / self.options.tokens)
        x = self._input(batch.x)
        target = None if batch.target is None else self._scaled(batch.target, self.target_scale)
        grad = None if batch.grad is None else self._gradient(batch.grad)
        beyond = None if batch.beyond is None else batch.beyond.of(self._output)
        given = replace(batch, x=x, target=target, grad=grad, beyond=beyond)
        losses = self.dictionary.loss(given, dead=self._dead())
        losses.total.backward()
        self.across.sum_gradients(self.dictionary)
        self.dictionary.before_step()
        self.across.clip(self.dictionary, self.options.grad_clip)
        self.lr_now = self.lr * self._schedule()
        self.optimizer.step(self.lr_now)
        self.dictionary.after_step()
        if self.average is not None:
            self.average.update(self.dictionary, self.steps)
        self._count(losses, self.rows(batch))
        if beyond is not None:
            self._count_beyond(beyond.name, losses)

    def rows(self, batch: Batch) -> int:
        """How many rows a batch has in all processes."""
        return len(batch.x) * self.across.tokens.size

    def _input(self, x: Tensor) -> Tensor:
        scaled = self._scaled(x, self.scale)
        return scaled if self.whitening is None else self.whitening.white(scaled)

    def _output(self, made: Tensor) -> Tensor:
        """A reconstruction as the model's own activation."""
        if self.whitening is not None and not isinstance(self.dictionary, Transcoder):
            return self.whitening.raw(made)
        return made / self.target_scale

    def _gradient(self, grad: Tensor) -> Tensor:
        scaled = self._scaled(grad, 1 / self.scale)
        return scaled if self.whitening is None else self.whitening.gradient(scaled)

    def _scaled(self, x: Tensor, scale: float) -> Tensor:
        # From pinned memory nothing waits for the copy; the conversion is the device's.
        return x.to(self.device, non_blocking=True).float() * scale

    def check(self) -> None:
        """Refuse to go on from a loss that is not finite.

        Raises:
            TrainingError: names the first step that had one, and the site.
        """
        if (bad := int(self._first_bad())) >= 0:
            raise TrainingError(
                f"the loss became NaN or infinite at step {bad + 1} on {self.site}, with lr {self.lr:g}; nothing was "
                "saved after it. Lower lr and begin anew, or look for activations that are not finite"
            )

    def report(self, log: _Log | None) -> None:
        """Read the sums since the last report, stop if a loss was not finite, and say how it goes."""
        n = self.steps - self.reported
        if n == 0:
            return
        dead = torch.zeros((), device=self.device) if (mask := self._dead()) is None else mask.float().mean()
        dead = self.across.latents.sum(dead) / self.across.latents.size
        # One copy to the host for all of them.
        found = [*(self.sums / n), dead, self.beyond_sum / n, self._first_bad().float()]
        *values, beyond, bad = torch.stack(found).tolist()
        if bad >= 0:
            self.check()
        now = time.perf_counter()
        speed = (self.tokens - self.marked_tokens) / max(now - self.marked, 1e-9)
        fvu, aux, l0, penalty, dead_share = values
        self.last = {
            "step": self.steps,
            "tokens": self.tokens,
            "fvu": fvu,
            "l0": l0,
            "aux": aux,
            "penalty": penalty,
            **({self.beyond: beyond} if self.beyond else {}),
            "dead": dead_share,
            "lr": self.lr_now,
            "tokens_per_s": speed,
        }
        self.reported, self.marked, self.marked_tokens = self.steps, now, self.tokens
        self.sums.zero_()
        self.beyond_sum.zero_()
        if log is not None:
            log(self.last)

    def _first_bad(self) -> Tensor:
        """The first step at which a loss of any process was not finite; −1 for none."""
        if self.across.alone:
            return self.first_bad
        last = torch.iinfo(torch.long).max
        first = -self.across.every.most(-self.first_bad.masked_fill(self.first_bad < 0, last))
        return first.masked_fill(first == last, -1)

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
        if self.options.schedule == "cosine":
            down = (1 - math.cos(math.pi * min(max(down, 0.0), 1.0))) / 2
        return max(min(1.0, up, down), 0.0)

    @torch.no_grad()
    def _count(self, losses: Losses, n: int) -> None:
        self.first_bad = torch.where((self.first_bad < 0) & ~losses.total.isfinite(), self.steps, self.first_bad)
        self.sums += torch.stack([losses.fvu.float(), losses.aux.float(), losses.l0.float(), losses.penalty.float()])
        self.steps, self.tokens = self.steps + 1, self.tokens + n
        self.last_fired = torch.where(losses.fired > 0, self.tokens, self.last_fired)

    def _count_beyond(self, name: str, losses: Losses) -> None:
        if losses.beyond is None:
            raise ConfigError(
                f"a {type(self.dictionary).__name__} has no loss behind its site, and {name} was asked for; train "
                "another kind, or leave downstream.loss out"
            )
        self.beyond = name
        self.beyond_sum += losses.beyond.float()


def run_fits(
    fits: Sequence[DictionaryFit],
    batches: Iterable[Sequence[Batch]],
    logs: Sequence[_Log] | None = None,
    *,
    save: Callable[[], None] | None = None,
    save_wanted: Callable[[], bool] | None = None,
    should_stop: Callable[[], bool] | None = None,
    progress: bool = True,
) -> None:
    """Take steps of several fits together, one batch each of the same tokens; otherwise as `DictionaryFit.run`.

    Memory: that of every fit, and of one batch.

    Args:
        fits: they have the same number of tokens, batch size and intervals of logs and checkpoints.
        batches: for each step, one batch per fit.
        logs: for each fit, what is called with its lines of metrics.
        save, save_wanted, should_stop, progress: as for `DictionaryFit.run`.

    Raises:
        DataError: no batch came.
        TrainingError: a loss is not finite.
    """
    asked, wanted, stream, first = should_stop or _never, save_wanted or _never, iter(batches), fits[0]
    options = first.options
    bar = tqdm(
        total=options.tokens,
        initial=min(first.tokens, options.tokens),
        unit="tok",
        unit_scale=True,
        desc=first.name if len(fits) == 1 else f"{len(fits)} dictionaries",
        file=sys.stderr,
        disable=not progress,
    )

    def report() -> None:
        for number, fit in enumerate(fits):
            fit.report(None if logs is None else logs[number])
        if first.last:
            fvu, l0, dead = (sum(float(fit.last[name]) for fit in fits) / len(fits) for name in ("fvu", "l0", "dead"))
            bar.set_postfix(fvu=f"{fvu:.3f}", l0=f"{l0:.1f}", dead=f"{dead:.1%}")

    def check() -> None:
        for fit in fits:
            fit.check()

    with deterministic(options.deterministic), own_randomness(first.device, first.seed), bar:
        first.restore_randomness()
        if not first.steps:
            _begin(fits, stream, asked)
        while not (first.complete or asked()):
            given = [fit.taken() for fit in fits] if first.ahead else next(stream, None)
            if given is None:
                break
            for fit, batch in zip(fits, given, strict=True):
                fit.step(batch)
            bar.update(first.rows(given[0]))
            if first.steps % options.log_every == 0:
                report()
            # The end is saved below.
            if save is not None and not first.complete and (first.due() or wanted()):
                check()
                save()
        check()
        if save is not None:
            save()
        stop = asked()  # which is also where processes wait for the one that saves, however long that takes
        report()
        for fit in fits:
            fit.stopped = not fit.complete and stop


def _begin(fits: Sequence[DictionaryFit], stream: Iterator[Sequence[Batch]], asked: Callable[[], bool]) -> None:
    """Draw the first weights of every fit from the first batches, unless it was asked to stop before there are any."""
    held: list[Sequence[Batch]] = []
    wanted = min(_SAMPLE_TOKENS, fits[0].options.tokens)
    while sum(fits[0].rows(given[0]) for given in held) < wanted and (given := next(stream, None)) is not None:
        held.append(given)
    if not held and asked():
        return
    for number, fit in enumerate(fits):
        fit.begin([given[number] for given in held])


def _never() -> bool:
    return False
