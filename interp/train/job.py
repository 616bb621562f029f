"""The main job: text → tokens → activations → trained, measured, saved dictionaries."""

import dataclasses
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from interp.core.errors import ConfigError, InterpError
from interp.core.manager import sites_of
from interp.data.remotefolder import RemoteFolder
from interp.evaluate.dictionary import DictionaryEvaluation
from interp.train.activations import CACHE, vector_site
from interp.train.config import TrainConfig
from interp.train.optimizers import check_optimizer, default_lr, state_bytes
from interp.train.runfolder import SWEEP, RunFolder
from interp.train.session import Session
from interp.train.signals import StopSignals
from interp.train.start import followed
from interp.train.trackers import check_trackers
from interp.train.trainer import Training, TrainingError
from interp.train.world import Agreed, ElsewhereError, World, check_processes, started

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

__all__ = ["JobReport", "Plan", "SweepReport", "plan_job", "train_job", "train_sweep"]

Status = Literal["finished", "stopped"]


@dataclass(frozen=True)
class Plan:
    """What a job would take, from the configurations alone.

    Attributes:
        tokens: tokens to train on.
        steps: optimiser steps.
        dictionaries: that are trained together.
        parameters: of all dictionaries.
        processes: that train together; all bytes of memory are those of one of them.
        shards: processes among which the latents of each dictionary are.
        model_parameters: of the language model.
        d_in: width of the site; this and the next three are those of the first dictionary.
        d_sae: latents.
        k: latents that may be active per token, where that is set.
        lr: step size.
        dictionary_bytes: weights, their average, gradients, the optimiser's state, and one batch of pre-activations
            with its gradient.
        buffer_bytes: the shuffling buffer.
        model_bytes: the language model's weights.
        checkpoint_bytes: at most, what a state to resume from takes on disk; for a moment there are two.
    """

    tokens: int
    steps: int
    dictionaries: int
    parameters: int
    model_parameters: int
    d_in: int
    d_sae: int
    k: int
    lr: float
    dictionary_bytes: int
    buffer_bytes: int
    model_bytes: int
    checkpoint_bytes: int
    processes: int = 1
    shards: int = 1

    def to_dict(self) -> dict[str, int | float]:
        """As plain numbers."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class JobReport:
    """How a job ended.

    Attributes:
        out: the run folder.
        status: "finished", or "stopped" by a signal: then the dictionary is saved as far as it was trained, and not
            measured.
        training: what the fit came to.
        evaluation: the figures on held-out text; None when stopped.
        signal: the name of the signal that stopped it.
    """

    out: Path
    status: Status
    training: Training
    evaluation: DictionaryEvaluation | None
    signal: str | None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, with the main figures at the top."""
        figures = {} if self.evaluation is None else self.evaluation.scalars()
        record = {"out": str(self.out), "status": self.status, "signal": self.signal, **figures}
        done = self.training
        return {**record, "steps": done.steps, "tokens": done.tokens, "tokens_per_s": done.tokens_per_s}


@dataclass(frozen=True)
class SweepReport:
    """How a sweep ended.

    Attributes:
        out: its folder, with one run folder for each dictionary.
        status: "finished", or "stopped" by a signal: then nothing was measured.
        members: how each dictionary's training ended, by name.
        signal: the name of the signal that stopped it.
    """

    out: Path
    status: Status
    members: dict[str, JobReport]
    signal: str | None

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per dictionary: `name`, what was swept, and the figures on held-out text."""
        import pandas as pd

        rows = []
        for name, report in self.members.items():
            figures = {} if report.evaluation is None else report.evaluation.scalars()
            intervals = figures.pop("intervals", {})
            margins = {
                f"{key}_{end}": pair[i] for key, pair in intervals.items() for i, end in enumerate(("low", "high"))
            }
            rows.append({"name": name, **figures, **margins})
        return pd.DataFrame(rows)

    def plot(self) -> "plotly.graph_objects.Figure":
        """Draw L0 against FVU and against CE recovered, a point per dictionary, with 95 % intervals."""
        from interp.report.sweep import pareto

        return pareto(self.to_frame())

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        members = {name: report.to_dict() for name, report in self.members.items()}
        return {"out": str(self.out), "status": self.status, "signal": self.signal, "members": members}


def plan_job(cfg: TrainConfig, *, force: bool = False, resume: bool = False, processes: int | None = None) -> Plan:
    """Check a configuration and estimate what the job takes, without loading weights or touching a file.

    Args:
        cfg: the configuration.
        force: allow an output folder that holds a run.
        resume: expect one that holds a run to go on with.
        processes: that will train; by default those that torchrun has started.

    Raises:
        InterpError: the model, sites, sizes or output folder do not do.
    """
    processes, shards = started() if processes is None else processes, cfg.train.shards
    check_processes(processes, cfg.train)
    _check_folder(RunFolder(cfg.out), force=force, resume=resume)
    _check_means(cfg, processes)
    table = sites_of(cfg.model)
    shapes = {site: row["shape"] for site, row in zip(table.sites, table.rows, strict=True)}
    if cfg.store_is_remote:
        RemoteFolder(str(cfg.store))  # known, with its package there
    from interp.core.loading import skeleton

    weights = sum(p.numel() for p in skeleton(cfg.model).parameters())
    size, options, members = 4 if cfg.dtype in (None, "float32") else 2, cfg.train, list(cfg.members().values())
    widths: dict[str, int] = {}
    parameters = numbers = step = here = 0
    first: TrainConfig | None = None
    for one in members:
        _, d_in = vector_site(one.site, shapes)
        d_out = d_in if one.target is None else vector_site(one.target, shapes)[1]
        widths |= {one.site: d_in} | ({} if one.target is None else {one.target: d_out})
        one = followed(one, d_in, d_out)
        first = first or one.sized(d_in)
        d_sae, _ = one.dictionary.sizes(d_in)
        skip = d_in * d_out if one.dictionary.form == "skip_transcoder" else 0
        parameters += d_sae * (d_in + d_out + 1) + d_out + skip
        here += d_sae // shards * (d_in + d_out + 1) + d_out + skip
        numbers += 8 * d_sae
        step = max(step, 8 * options.batch_size * shards // processes * (d_sae // shards))
        if processes > 1:
            with torch.device("meta"):
                one.dictionary.make(d_in, d_out).check_split(processes // shards, shards)
    width = sum(widths.values())
    waiting = options.buffer_tokens if cfg.downstream.loss == "none" else 0  # whole rows of text are not shuffled
    buffer = waiting * (4 * width + 16)
    spare = cfg.text.rows * cfg.text.ctx * (size * width + 16) if waiting else 0
    assert first is not None
    d_sae, k = first.dictionary.d_sae or 0, first.dictionary.k or 0
    held = 4 + state_bytes(options.optimizer) + (0 if options.ema is None else 4)
    return Plan(
        tokens=options.tokens,
        steps=options.steps,
        dictionaries=len(members),
        parameters=parameters,
        model_parameters=weights,
        d_in=widths[members[0].site],
        d_sae=d_sae,
        k=k,
        lr=first.train.lr or default_lr(d_sae, options.optimizer),
        dictionary_bytes=(held + 4) * here + step,
        buffer_bytes=buffer,
        model_bytes=weights * size,
        checkpoint_bytes=held * parameters + numbers + buffer + 16 * waiting + spare,
        processes=processes,
        shards=shards,
    )


def train_job(
    cfg: TrainConfig,
    *,
    force: bool = False,
    resume: bool = False,
    progress: bool = True,
    tell: Callable[[str], None] | None = None,
) -> JobReport:
    """Train a dictionary as configured and write its run folder.

    Ctrl-C or SIGTERM ends the training after the current step, SIGUSR1 does not; all three save a state to resume from,
    and so does every `train.checkpoint_every`-th step. A resumed run ends with the same weights, to the bit, as one
    that was left alone, on the same machine with as many threads.

    The processes of a torchrun train together, each on its part of every batch and, with `train.shards`, each its part
    of the dictionary: weights are those of one process but for rounding. The first of them writes, measures and tells;
    states go with any number of processes. All must see the output folder; to the others no evaluation is given.

    Args:
        cfg: the configuration.
        force: replace an earlier run in the output folder.
        resume: go on with the run in it; all settings that decide the outcome must be as they were.
        progress: show a progress bar on stderr.
        tell: called with short messages on what happens.

    Returns:
        The folder, how it ended, and the figures on held-out documents.

    Raises:
        ConfigError: among others, a resume with other settings, weights, text, device or thread count; names them.
        InterpError: something does not do; a folder that was begun has no `cfg.json` and so does not load.
    """
    if cfg.sweep.any:
        raise ConfigError("this configuration sweeps over several dictionaries; give it to train_sweep")
    return next(iter(_run(cfg, force=force, resume=resume, progress=progress, tell=tell).members.values()))


def train_sweep(
    cfg: TrainConfig,
    *,
    force: bool = False,
    resume: bool = False,
    progress: bool = True,
    tell: Callable[[str], None] | None = None,
) -> SweepReport:
    """Train every dictionary of a sweep on one pass of the model, and write their run folders, a table and a page.

    Each has its own optimiser and metrics; all read the same tokens in the same order. Signals, states and `resume` are
    those of `train_job`, of all dictionaries together.

    Args:
        cfg: the configuration; `sweep` says what is swept.
        force, resume, progress, tell: as for `train_job`.

    Returns:
        How each ended.

    Raises:
        ConfigError: nothing is swept, or as for `train_job`.
        InterpError: as for `train_job`.
    """
    if not cfg.sweep.any:
        raise ConfigError("nothing is swept; give sweep.k, sweep.site, …, or use train_job")
    return _run(cfg, force=force, resume=resume, progress=progress, tell=tell)


def _run(
    cfg: TrainConfig, *, force: bool, resume: bool, progress: bool, tell: Callable[[str], None] | None
) -> SweepReport:
    _check_means(cfg, started())
    with World.joined(cfg.train, cfg.device) as world:
        say = tell if tell is not None and world.first else _silent
        return _run_in(world, cfg, force=force, resume=resume, progress=progress and world.first, say=say)


def _run_in(
    world: World, cfg: TrainConfig, *, force: bool, resume: bool, progress: bool, say: Callable[[str], None]
) -> SweepReport:
    folder, phase = world.folder(cfg.out), _Phase(say)
    world.together(lambda: _check_folder(folder, force=force, resume=resume))
    with StopSignals(phase.stopping, save=phase.saving) as signals:
        stop = Agreed(signals, world.control)
        session = world.together(lambda: Session(cfg, folder, stop, world))
        anew = force or folder.holds_alone(CACHE)
        resumed_at = world.together(lambda: session.go_on(say) if resume else session.begin(force=anew))
        record = {**session.origin(), "resumed_at_step": resumed_at}
        folder.provenance({**record, "status": "running"})
        say(_beginning(session, resumed_at))
        try:
            trainings = session.train(progress)
            phase.trained = True
            evaluations = None if stop() else session.measured(progress) if world.first else []
            if not world.first:
                session.remove_cache()
            finished = world.told(evaluations is not None)  # the others wait here for the first
        except BaseException as err:
            # What went wrong is to be heard, even if the disk is so full that this cannot be written either.
            with suppress(InterpError):
                folder.provenance({**record, "status": "failed", "signal": stop.name})
            if isinstance(err, TrainingError) and not world.first:
                raise ElsewhereError(str(err)) from err  # all have found the same
            raise
        finally:
            session.close()
        status: Status = "finished" if finished else "stopped"
        members = {}
        for number, (member, training) in enumerate(zip(session.members, trainings, strict=True)):
            evaluation = evaluations[number] if evaluations else None
            members[member.name] = JobReport(member.folder.path, status, training, evaluation, stop.name)
            if member.name:
                own = {**record, "settings": member.cfg.model_dump(mode="json"), "seed": member.cfg.seed}
                own |= {"signal": stop.name, **dataclasses.asdict(training), "status": status}
                member.folder.provenance(own)
        report = SweepReport(folder.path, status, members, stop.name)
        ended = {**record, "signal": stop.name, **dataclasses.asdict(trainings[0])}
        if not finished:
            folder.provenance({**ended, "status": "stopped"})
        elif world.first:
            if cfg.sweep.any:
                _write_table(report, folder)
            folder.finish(ended)
            session.remove_cache()
        return report


def _beginning(session: Session, resumed_at: int) -> str:
    cfg, first = session.cfg, session.members[0]
    todo = f"{cfg.train.tokens:,} tokens" + (f", from step {resumed_at:,} on" if resumed_at else "")
    todo += f", starting from {cfg.start}" if cfg.start and not resumed_at else ""
    if len(session.members) > 1:
        where = ", ".join(site.short for site in session.sites)
        return f"training {len(session.members)} dictionaries on {where} of {session.hm.name}: {todo}"
    options = first.cfg.dictionary
    size = f"{first.dictionary.cfg.d_sae:,} latents" + (f" (k {options.k})" if options.has_k else "")
    shown = first.site.name if first.target is None else f"{first.site.name} → {first.target.name}"
    return f"training {size} on {shown} of {session.hm.name}: {todo}"


def _write_table(report: SweepReport, folder: RunFolder) -> None:
    from interp.report.sweep import sweep_page

    table = report.to_frame()
    folder.write(SWEEP[0], table.to_csv(index=False))
    folder.write(SWEEP[1], sweep_page(table))


class _Phase:
    """What a signal means depends on what is being done."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.trained = say, False

    def stopping(self, name: str) -> None:
        self.say(f"{name}: stopping" + ("" if self.trained else " after this step, and saving"))

    def saving(self, name: str) -> None:
        done = "the training is done and saved" if self.trained else "saving a checkpoint after this step, and going on"
        self.say(f"{name}: {done}")


def _silent(message: str) -> None:
    pass


def _check_folder(folder: RunFolder, *, force: bool, resume: bool) -> None:
    if force and resume:
        raise ConfigError("force replaces a run and resume goes on with it: give one of them")
    if resume:
        folder.check_resume()
    else:
        folder.check(force=force or folder.holds_alone(CACHE))


def _check_means(cfg: TrainConfig, processes: int) -> None:
    """Refuse what this machine, or so many processes, cannot do."""
    check_optimizer(cfg.train.optimizer)
    check_trackers(cfg.train.track)
    if processes > 1 and cfg.downstream.loss != "none":
        raise ConfigError(
            f"downstream.loss {cfg.downstream.loss} takes whole rows of text in one process, and there are {processes};"
            " start one"
        )
    if cfg.train.shards > 1 and cfg.start is not None:
        raise ConfigError("a training that goes on from a dictionary takes it whole: give train.shards 1")
