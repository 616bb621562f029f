"""`interp train`: a sparse dictionary on a site of a model, with one command that can be stopped and resumed."""

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from pydantic import Field

from interp.cli.lines import read_line, refuse, tell, value_on
from interp.core.errors import ConfigError
from interp.core.resources import resource
from interp.core.settings import read_yaml
from interp.train.config import TrainConfig

if TYPE_CHECKING:
    from interp.train.job import JobReport, Plan, SweepReport

__all__ = ["TrainOptionsLine", "main"]

_STOPPED = 143
_DIGITS = {"l0": 2, "fvu": 4, "ce_recovered": 4, "dead": 3}


_BUILT_IN = "configs/sae-testbed.yaml"
_STAND_IN = {"model": "-", "site": "0.resid_post", "data": "-", "out": "-"}


class TrainOptionsLine(TrainConfig):
    """Train a sparse dictionary on a site of a model.

    `interp train [CONFIG.yaml] [OPTIONS]`: settings on the line go before those of the file. With neither a file nor
    --model and --data, the model, text and settings that come with the library are used.
    """

    config: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = Field(
        default=None, description="YAML file with any of these settings; the word --config may be left out"
    )
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = Field(
        default=False,
        description="go on with the run in --out that was stopped or killed, with the settings that it was begun with",
    )
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = Field(
        default=False,
        description="print the resolved configuration with token, parameter and memory estimates, and stop",
    )
    json_output: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = Field(
        default=False, description="print one JSON object on stdout, and nothing else there"
    )
    force: Annotated[bool, tyro.conf.FlagCreatePairsOff] = Field(default=False, description="replace the run in --out")

    def settings(self) -> TrainConfig:
        """The configuration, without what belongs to the command line alone."""
        return TrainConfig.model_validate({name: getattr(self, name) for name in TrainConfig.model_fields})


def main(argv: list[str]) -> int:
    """Train, or say what training would take.

    Args:
        argv: The arguments after `interp train`.

    Returns:
        The exit code: 0 done, 2 bad usage, 143 stopped by a signal, with what was trained saved.

    Raises:
        InterpError: The job failed.
    """
    if {"--force", "--resume"} <= set(argv):
        return refuse("--force replaces a run and --resume goes on with it; give one of them")
    try:
        line = read_line(TrainOptionsLine, TrainConfig, argv, prog="interp train", stand_in=_STAND_IN, given=_given)
    except ConfigError as err:
        return refuse(str(err))
    cfg = line.settings()
    from interp.train.job import plan_job, train_job, train_sweep
    from interp.train.world import follows, started

    if follows():
        return _followed(cfg, line)
    # Without torchrun, as if as many processes were started as are needed.
    most = max(started(), cfg.train.shards) if line.dry_run else None
    plan = plan_job(cfg, force=line.force, resume=line.resume, processes=most)
    if line.dry_run:
        record = {"config": cfg.model_dump(mode="json"), "estimates": plan.to_dict()}
        text = json.dumps(record, indent=1) if line.json_output else f"{cfg.to_yaml()}\n{_estimates(plan)}"
        sys.stdout.write(f"{text}\n")
        return 0
    if cfg.sweep.any:
        swept = train_sweep(cfg, force=line.force, resume=line.resume, tell=tell)
        sys.stdout.write(f"{json.dumps(swept.to_dict(), indent=1) if line.json_output else _table(swept)}\n")
        report = next(iter(swept.members.values()))
    else:
        report = train_job(cfg, force=line.force, resume=line.resume, tell=tell)
        if line.json_output:
            sys.stdout.write(json.dumps(report.to_dict(), indent=1) + "\n")
        elif report.evaluation is not None:
            sys.stdout.write(f"{report.evaluation.summary()}\n{_where_to_look(report.out, cfg)}\n")
    if report.status == "stopped":
        tell(_stopped(report, Path(cfg.out)))
        return _STOPPED
    return 0


def _followed(cfg: TrainConfig, line: TrainOptionsLine) -> int:
    """What the other processes of a torchrun do: train along, and say nothing but what went wrong in them alone."""
    from interp.train.job import train_job, train_sweep
    from interp.train.world import ElsewhereError

    if line.dry_run:
        return 0
    try:
        if cfg.sweep.any:
            status = train_sweep(cfg, force=line.force, resume=line.resume).status
        else:
            status = train_job(cfg, force=line.force, resume=line.resume).status
    except ElsewhereError:
        return 1
    return _STOPPED if status == "stopped" else 0


def _given(path: str | None, words: list[str]) -> dict[str, Any]:
    """The settings of the config file, or of the run to go on with, or of the packaged one."""
    if path is not None:
        return read_yaml(path)
    on_line = {word.partition("=")[0] for word in words}
    if on_line & {"-h", "--help"}:
        return {}
    built_in = {} if on_line & {"--model", "--data"} else read_yaml(resource(_BUILT_IN))
    if "--start" in on_line:
        built_in.pop("dictionary", None)  # its sizes are those of the one that is gone on from
    out = value_on(words, "--out") or built_in.get("out")
    if "--resume" in on_line and out is not None:
        from interp.train.runfolder import RunFolder

        return RunFolder.settings(out)
    return built_in


def _estimates(plan: "Plan") -> str:
    sizes = {"dictionary": plan.dictionary_bytes, "buffer": plan.buffer_bytes, "model": plan.model_bytes}
    memory = ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in sizes.items())
    many = f"{plan.dictionaries} dictionaries" if plan.dictionaries > 1 else "the dictionary"
    counts = f"{plan.parameters:,} in {many} (d_in {plan.d_in}), {plan.model_parameters:,} in the model"
    each = "" if plan.processes == 1 else f" in each of {plan.processes} processes"
    each += "" if plan.shards == 1 else f", {plan.d_sae // plan.shards:,} latents in each of {plan.shards} shards"
    return (
        f"tokens      {plan.tokens:,} in {plan.steps:,} steps, lr {plan.lr:.2g}\n"
        f"latents     {plan.d_sae:,}, of which {plan.k} may be active per token\n"
        f"parameters  {counts}\nmemory      {memory}{each}\n"
        f"disk        {plan.checkpoint_bytes / 2**20:,.0f} MiB for a checkpoint, twice that while it is replaced"
    )


def _table(report: "SweepReport") -> str:
    from interp.train.runfolder import SWEEP

    if report.status == "stopped":
        return ""
    shown = report.to_frame()[["name", "l0", "fvu", "ce_recovered", "dead"]]
    numbers = {name: (lambda value, d=digits: f"{value:.{d}f}") for name, digits in _DIGITS.items()}
    return (
        f"{shown.to_string(index=False, formatters=numbers)}\n"
        f"{report.out}: a run folder for each; all figures in {SWEEP[0]}, their picture in {SWEEP[1]}"
    )


def _where_to_look(out: Path, cfg: TrainConfig) -> str:
    name = "SAE" if cfg.dictionary.form == "sae" else "Transcoder"
    return (
        f"the dictionary is in {out}: interp.{name}.load({str(out)!r}), or sae_lens.SAE.load_from_disk({str(out)!r}); "
        "its figures in evaluation.json, the course of training in metrics.jsonl"
    )


def _stopped(report: "JobReport", out: Path) -> str:
    way_on = f"`interp train --resume --out {shlex.quote(str(out))}`"
    if not report.training.steps:
        return f"stopped by {report.signal} before the first step; nothing was trained. {way_on} begins"
    after = f"stopped by {report.signal} after {report.training.tokens:,} tokens"
    if not report.training.stopped:
        return f"{after}, the last ones; the dictionary is in {report.out}, not measured. {way_on} measures it"
    return f"{after}; {way_on} goes on from there. The dictionary so far is in {report.out}, not measured"
