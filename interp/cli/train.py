"""`interp train`: a sparse dictionary on a site of a model, with one command."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from pydantic import Field, ValidationError

from interp.core.errors import ConfigError
from interp.train.config import TrainConfig, describe_faults, read_yaml

if TYPE_CHECKING:
    from interp.train.job import JobReport, Plan

__all__ = ["TrainOptionsLine", "main"]

_BAD_USAGE, _STOPPED = 2, 143


class TrainOptionsLine(TrainConfig):
    """Train a sparse dictionary on a site of a model; settings on the line go before those of --config."""

    config: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = Field(
        default=None, description="YAML file with any of these settings"
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
    try:
        line = tyro.cli(TrainOptionsLine, prog="interp train", args=argv, default=_default(_config_file(argv)))
        cfg = line.settings()
    except ValidationError as err:
        return _refuse(describe_faults(err, TrainConfig))
    except ConfigError as err:
        return _refuse(str(err))
    from interp.train.job import plan_job, train_job

    plan = plan_job(cfg, force=line.force)
    if line.dry_run:
        record = {"config": cfg.model_dump(mode="json"), "estimates": plan.to_dict()}
        text = json.dumps(record, indent=1) if line.json_output else f"{cfg.to_yaml()}\n{_estimates(plan)}"
        sys.stdout.write(f"{text}\n")
        return 0
    report = train_job(cfg, force=line.force, tell=_tell)
    if line.json_output:
        sys.stdout.write(json.dumps(report.to_dict(), indent=1) + "\n")
    elif report.evaluation is not None:
        sys.stdout.write(f"{report.evaluation.summary()}\n{_where_to_look(report.out)}\n")
    if report.status == "stopped":
        _tell(_stopped(report))
        return _STOPPED
    return 0


def _config_file(argv: list[str]) -> str | None:
    """The value of --config, which decides the defaults that the rest of the line is read with."""
    for word, following in zip(argv, [*argv[1:], None], strict=True):
        if word == "--config":
            return following
        if word.startswith("--config="):
            return word.partition("=")[2]
    return None


def _default(path: str | None) -> TrainOptionsLine:
    """The settings of a config file; what it leaves out, and the line must give, is marked missing."""
    given = {} if path is None else read_yaml(path)
    required = {name for name, field in TrainConfig.model_fields.items() if field.is_required()}
    # A stand-in for what is missing lets the rest be checked; it is never used.
    stand_in = {"model": "-", "site": "0.resid_post", "data": "-", "out": "-"}
    checked = TrainConfig.model_validate({**{name: stand_in[name] for name in required - given.keys()}, **given})
    values: dict[str, Any] = {name: getattr(checked, name) for name in TrainConfig.model_fields}
    values.update(dict.fromkeys(required - given.keys(), tyro.MISSING))
    return TrainOptionsLine.model_construct(**values)


def _estimates(plan: "Plan") -> str:
    sizes = {"dictionary": plan.dictionary_bytes, "buffer": plan.buffer_bytes, "model": plan.model_bytes}
    memory = ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in sizes.items())
    counts = f"{plan.parameters:,} in the dictionary (d_in {plan.d_in}), {plan.model_parameters:,} in the model"
    return (
        f"tokens      {plan.tokens:,} in {plan.steps:,} steps, lr {plan.lr:.2g}\n"
        f"parameters  {counts}\nmemory      {memory}"
    )


def _where_to_look(out: Path) -> str:
    return (
        f"the dictionary is in {out}: interp.SAE.load({str(out)!r}), or sae_lens.SAE.load_from_disk({str(out)!r}); "
        "its figures in evaluation.json, the course of training in metrics.jsonl"
    )


def _stopped(report: "JobReport") -> str:
    if not report.training.steps:
        return f"stopped by {report.signal} before the first step; nothing was trained"
    return (
        f"stopped by {report.signal} after {report.training.tokens:,} tokens; the dictionary as far as it was trained "
        f"is in {report.out}, not measured. Training cannot be resumed"
    )


def _tell(message: str) -> None:
    sys.stderr.write(f"{message}\n")


def _refuse(message: str) -> int:
    sys.stderr.write(f"error: {message}\n")
    return _BAD_USAGE
