"""Training small causal language models: one device, next-token loss, AdamW, exact resume."""

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from interp.core.disk import differences
from interp.core.errors import ConfigError, DataError, ModelError
from interp.core.intervention import Intervention
from interp.core.manager import HookManager
from interp.core.result import Provenance
from interp.train.checkpoint import SavedState
from interp.train.common import deterministic, own_randomness
from interp.train.lm_checkpoint import LMFolder, load_checkpoints
from interp.train.lm_config import LMOptions
from interp.train.lm_data import LMBatch, LMData, TextData
from interp.train.lm_fit import LMFit, checked_batch
from interp.train.lm_result import LINE_FIELDS, LMTraining, columns
from interp.train.lm_settings import next_of, settings_of, try_out
from interp.train.runfolder import SPEED
from interp.train.signals import StopSignals

__all__ = ["LMBatch", "LMData", "LMOptions", "LMTraining", "TextData", "load_checkpoints", "train_lm"]

Measures = Mapping[str, Callable[[HookManager], float | Mapping[str, float]]]


def train_lm(
    hm: HookManager,
    data: LMData,
    options: LMOptions,
    *,
    out: str | Path | None = None,
    seed: int = 0,
    measures: Measures | None = None,
    write: Sequence[Intervention] | Intervention = (),
    resume: bool = False,
) -> LMTraining:
    """Train a causal language model in place on the next-token loss.

    With the same model, data, settings, seed, thread count and library versions, weights and metrics are the same to
    the bit (on a GPU only with `options.deterministic`), also when training was stopped or killed and resumed. Measures
    draw their own random numbers, so that taking one changes nothing else.

    Ctrl-C or SIGTERM ends the training after the current step and saves a state to resume from; a second one interrupts
    at once. A bar on stderr shows tokens, loss and speed; TQDM_DISABLE=1 in the environment of the process hides it.

    Memory: 16 bytes a trained parameter (weight, gradient, AdamW's two moments), 4 a frozen one, the model's
    activations, which grow with layers · row · pos · d_model (and n_heads · pos with an attention that keeps its
    pattern), and 8 · row · pos · d_vocab for logits and their gradient, half as much again inside the loss.

    Args:
        hm: a manager over a float32 model on one device. Parameters that require no gradient are left as they are. The
            model is in train mode during steps, and in eval mode during measures and afterwards.
        data: the stream of batches.
        options: how to fit.
        out: folder to write, as `interp.train.lm_checkpoint` describes; None writes nothing.
        seed: of dropout and of what else the model draws.
        measures: name → a function of `hm` that gives a number, or several by name.
        write: edits that act in every training step, with gradients through them, and nowhere else.
        resume: go on from the state in `out`; everything else must be as it was.

    Returns:
        Losses and measures by step; the model itself is changed in place.

    Raises:
        ConfigError: arguments that contradict one another, or a resume with others than before.
        ModelError: a model that cannot be trained here.
        DataError: a batch that does not fit, a stream that ends early, a measure that gives no number.
        ArtifactError: a folder that holds something, or nothing to resume from.
        TrainingError: a loss or gradient that is not finite; what was saved before stays.

    Source: AdamW is Loshchilov & Hutter 2019 (1711.05101), algorithm 2, as torch has it (decay times lr); gradients are
    clipped by their global norm, Pascanu et al. 2013 (1211.5063), algorithm 1.
    """
    began = time.perf_counter()
    measures, edits = dict(measures or {}), [write] if isinstance(write, Intervention) else list(write)
    _refuse_arguments(options, out, resume, measures)
    folder = None if out is None else LMFolder(out)
    saved = folder.saved() if folder is not None and resume else None
    if folder is not None and saved is None:
        folder.check()
        if not hasattr(hm.model, "save_pretrained"):
            raise ModelError(
                f"{type(hm.model).__name__} has no save_pretrained, so out=… cannot hold it; leave out out"
            )
    with (
        deterministic(options.deterministic),
        own_randomness(hm.device, seed),
        StopSignals(lambda name: _say(f"{name}: stopping after this step")) as stop,
        _left_in_eval_mode(hm),
    ):
        fit = LMFit(hm, options)
        first = try_out(hm, data, edits, seed=seed)
        settings = settings_of(hm, data, options, first=first, seed=seed, measures=list(measures), edits=edits)
        run = _Run(fit, data, settings, folder=folder, measures=measures, edits=edits, stop=stop)
        run.go(saved)
    training = run.training(seconds=time.perf_counter() - began)
    if training.stopped:
        way_on = "nothing was saved, as there is no out folder" if out is None else f"go on with resume=True in {out}"
        _say(f"stopped by {stop.name} after step {training.steps} of {options.steps}; {way_on}")
    return training


class _Run:
    """The loop, with what happens between steps: lines of metrics, measures, checkpoints, states to resume from."""

    def __init__(
        self,
        fit: LMFit,
        data: LMData,
        settings: dict[str, Any],
        *,
        folder: LMFolder | None,
        measures: Measures,
        edits: list[Intervention],
        stop: StopSignals,
    ) -> None:
        self.fit, self.data, self.settings, self.folder = fit, data, settings, folder
        self.hm, self.options, self.measures, self.edits, self.stop = fit.hm, fit.options, measures, edits, stop
        self.position: dict[str, Any] | None = None
        self.lines: list[dict[str, Any]] = []
        self.marked = time.perf_counter(), 0

    def go(self, saved: SavedState | None) -> None:
        """Train from the start, or from a saved state, to the end or until asked to stop."""
        if saved is not None:
            self._restore(saved)
        elif self.folder is not None:
            self.folder.begin(self._state() if self.options.resume_every else None)
        status = "failed"
        self._record("running")
        try:
            with self._bar() as bar:
                if self.fit.step == 0:
                    self._before_the_first()
                self._steps(bar)
            status = "stopped" if self.unfinished else "finished"
        finally:
            self._record(status)

    @property
    def unfinished(self) -> bool:
        """Whether there are steps to take; after `go`, whether a signal ended the training before its last."""
        return self.fit.step < self.options.steps

    def training(self, *, seconds: float) -> LMTraining:
        """Return the course of the training so far."""
        return LMTraining(
            provenance=Provenance.of(self.hm, settings=self.settings, seed=self.settings["seed"]),
            steps=self.fit.step,
            tokens=self.fit.tokens,
            stopped=self.unfinished,
            signal=self.stop.name if self.unfinished else None,
            seconds=seconds,
            **columns(self.lines),
        )

    # -- steps --------------------------------------------------------------------------------------------------

    def _steps(self, bar: "tqdm[Any]") -> None:
        stream = iter(self.data.batches(self.position))
        self.hm.model.train()
        while self.unfinished and not self.stop():
            # One block for many steps: leaving it waits for the device.
            with self.hm.hooked(write=self.edits) if self.edits else nullcontext():
                self._step(stream, bar)
                while not self._pauses() and not self.stop():
                    self._step(stream, bar)
            self._pause(bar)
        if self.unfinished and self.folder is not None:
            self.folder.save_state(self._state())

    def _step(self, stream: Iterator[tuple[Any, dict[str, Any]]], bar: "tqdm[Any]") -> None:
        number = self.fit.step + 1
        held = next_of(stream, number)
        if held is None:
            raise DataError(f"the data ended before step {number} of {self.options.steps}; give more, or repeat it")
        batch, self.position = held
        self.fit.take(checked_batch(self.hm, batch, number))
        bar.update()

    # -- between steps ------------------------------------------------------------------------------------------

    def _due(self, every: int) -> bool:
        return every > 0 and self.fit.step % every == 0

    def _pauses(self) -> bool:
        options, step = self.options, self.fit.step
        every = (options.log_every, options.measure_every, options.checkpoint_every, options.resume_every)
        return not self.unfinished or step in options.checkpoints or any(self._due(n) for n in every)

    def _before_the_first(self) -> None:
        if self.options.measure_every:
            self._measure()
        if self.folder is not None and 0 in self.options.checkpoints:
            self.folder.save_model(self.hm, 0)

    def _pause(self, bar: "tqdm[Any]") -> None:
        """Do what is due after a step; nothing is saved of a model whose loss was not finite."""
        options, step, end = self.options, self.fit.step, not self.unfinished
        self.fit.check()
        if end or self._due(options.log_every):
            self._report(bar)
        if end or self._due(options.measure_every):
            self._measure()
        if self.folder is None:
            return
        if step in options.checkpoints or self._due(options.checkpoint_every):
            self.folder.save_model(self.hm, step)
        if end:
            self.folder.save_model(self.hm)
        if end or self._due(options.resume_every):
            self.folder.save_state(self._state())

    def _report(self, bar: "tqdm[Any]") -> None:
        line = self.fit.report()
        now, (before, tokens) = time.perf_counter(), self.marked
        speed = (self.fit.tokens - tokens) / max(now - before, 1e-9)
        self.marked = now, self.fit.tokens
        self._log(line)
        if self.folder is not None:
            self.folder.log({"step": self.fit.step, "seconds": now - before, "tokens_per_s": speed}, SPEED)
        bar.set_postfix_str(f"{self.fit.tokens:,} tok, loss {line['loss']:.3f}, {speed:,.0f} tok/s")

    def _measure(self) -> None:
        if not self.measures:
            return
        line: dict[str, Any] = {"step": self.fit.step}
        self.hm.model.eval()
        for name, measure in self.measures.items():
            with own_randomness(self.fit.device, self.settings["seed"]):
                line.update(_numbers(name, measure(self.hm)))
        # A measure may have asked for gradients of the weights.
        self.fit.optimizer.zero_grad(set_to_none=True)
        self.hm.model.train()
        self._log(line)

    def _log(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        if self.folder is not None:
            self.folder.log(line)

    # -- state --------------------------------------------------------------------------------------------------

    def _state(self) -> SavedState:
        assert self.folder is not None
        # What is written before the first step is written again by a run that goes on from there.
        size = self.folder.metrics_bytes() if self.fit.step else 0
        record = {**self.fit.record(), "data": self.position, "metrics_bytes": size, "settings": self.settings}
        return SavedState(record, self.fit.tensors())

    def _restore(self, saved: SavedState) -> None:
        assert self.folder is not None
        others = list(differences(saved.record["settings"], self.settings))
        if others:
            raise ConfigError(
                f"the training in {self.folder.path} was begun with other settings: {'; '.join(others)}. Resume with "
                "those it was begun with, or begin anew in another folder"
            )
        self.folder.go_on(saved)
        self.fit.restore(saved.record, saved.tensors)
        self.position, self.lines = saved.record["data"], self.folder.lines()
        self.marked = time.perf_counter(), self.fit.tokens

    def _record(self, status: str) -> None:
        if self.folder is not None:
            origin = dataclasses.asdict(Provenance.of(self.hm, settings=self.settings, seed=self.settings["seed"]))
            done = {"status": status, "signal": self.stop.name, "step": self.fit.step, "tokens": self.fit.tokens}
            self.folder.provenance({**origin, **done})

    def _bar(self) -> "tqdm[Any]":
        return tqdm(total=self.options.steps, initial=self.fit.step, unit="step", desc=self.hm.name, file=sys.stderr)


# -- arguments ------------------------------------------------------------------------------------------------------


def _refuse_arguments(options: LMOptions, out: str | Path | None, resume: bool, measures: Measures) -> None:
    if resume and out is None:
        raise ConfigError("resume=True needs the folder to resume from; give out=…")
    if out is None and (options.checkpoint_every or options.checkpoints):
        raise ConfigError("checkpoints need a folder to lie in; give out=…")
    for name, measure in measures.items():
        if name in LINE_FIELDS:
            raise ConfigError(f"a measure cannot be called {name!r}, as the training's own figures are; rename it")
        if not callable(measure):
            raise ConfigError(f"measure {name!r} is a {type(measure).__name__}; expected a function of a HookManager")


def _numbers(name: str, value: Any) -> dict[str, float | None]:
    """What a measure gave, by name; None for a number that is not finite, which JSON cannot hold."""
    parts = {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, Mapping) else {name: value}
    try:
        numbers = {key: float(part.detach() if isinstance(part, Tensor) else part) for key, part in parts.items()}
    except (TypeError, ValueError) as err:
        kinds = ", ".join(sorted({type(part).__name__ for part in parts.values()}))
        raise DataError(f"measure {name!r} gave {kinds}; expected a number, or a mapping of names to numbers") from err
    return {key: number if math.isfinite(number) else None for key, number in numbers.items()}


@contextmanager
def _left_in_eval_mode(hm: HookManager) -> Iterator[None]:
    try:
        yield
    finally:
        hm.model.eval()
        hm.model.zero_grad(set_to_none=True)


def _say(message: str) -> None:
    tqdm.write(message, file=sys.stderr)
