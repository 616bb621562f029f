"""`interp capture`: the activations of a text to a folder, by one process or many; can be stopped and resumed."""

import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from pydantic import Field, ValidationError, field_validator

from interp.cli.lines import config_file, line_with_defaults, refuse, tell, value_on
from interp.core.errors import ArtifactError, ConfigError
from interp.core.settings import Settings, describe_faults, read_yaml
from interp.core.site import Site
from interp.data.capture import CaptureOptions
from interp.data.manifest import SETTINGS
from interp.train.config import TextOptions

if TYPE_CHECKING:
    from interp.core.manager import HookManager
    from interp.data.capture import Captured, CapturePlan
    from interp.data.tokens import TokenSource

__all__ = ["CaptureConfig", "CaptureLine", "main"]

_STOPPED = 143
_STAND_IN = {"model": "-", "sites": ["0.resid_post"], "data": "-", "out": "-"}


class CaptureText(TextOptions):
    """How text becomes rows of tokens."""

    rows: int | None = Field(  # type: ignore[assignment]
        default=None, gt=0, description="rows per forward pass; by default the fastest, found by trying"
    )
    part: Literal["all", "train", "held_out"] = Field(
        default="all", description="which documents: all, or without or with those that an evaluation holds out"
    )


class CaptureConfig(Settings):
    """Write the activations of a text to a folder."""

    model: str = Field(description="a folder, testbed or testbed-llama, or a name on the Hugging Face hub")
    sites: list[str] = Field(
        min_length=1, description="where to read, such as 3.resid_post 3.z: everything with something for each token"
    )
    data: str = Field(
        description="text: a .txt, .md or .jsonl file, a folder of them, hf://owner/name, or testbed: the small world's"
    )
    out: str = Field(description="folder to write")
    device: str | None = Field(
        default=None,
        description="cpu, cuda, cuda:1, …; by default where the model loads, under torchrun the rank's GPU",
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None, description="of the model; by default the checkpoint's"
    )
    text: CaptureText = CaptureText()
    store: CaptureOptions = CaptureOptions()

    @field_validator("sites")
    @classmethod
    def _sites_parse(cls, value: list[str]) -> list[str]:
        for name in value:
            Site(name)
        return value


class CaptureLine(CaptureConfig):
    """Write the activations of a text to a folder.

    `interp capture [CONFIG.yaml] [OPTIONS]`: settings on the line go before those of the file. Several processes may be
    at work on one folder, such as those of `torchrun --no-python interp capture …`: the bytes are the same.
    """

    config: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = Field(
        default=None, description="YAML file with any of these settings; the word --config may be left out"
    )
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = Field(
        default=False, description="go on with the store in --out, or add to it up to a larger --store.max-tokens"
    )
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = Field(
        default=False, description="run a few forwards, print bytes and time for the whole, write nothing"
    )
    json_output: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = Field(
        default=False, description="print one JSON object on stdout, and nothing else there"
    )

    def settings(self) -> CaptureConfig:
        """The configuration, without what belongs to the command line alone."""
        return CaptureConfig.model_validate({name: getattr(self, name) for name in CaptureConfig.model_fields})


def main(argv: list[str]) -> int:
    """Capture, or say what capturing would take.

    Args:
        argv: The arguments after `interp capture`.

    Returns:
        The exit code: 0 done, 2 bad usage, 143 stopped by a signal, with all whole shards kept.

    Raises:
        InterpError: The capture failed.
    """
    try:
        path, words = config_file(argv, CaptureConfig)
        default = line_with_defaults(CaptureLine, CaptureConfig, _given(path, words), _STAND_IN)
        line = tyro.cli(CaptureLine, prog="interp capture", args=words, default=default)
        cfg = line.settings()
    except ValidationError as err:
        return refuse(describe_faults(err, CaptureConfig))
    except ConfigError as err:
        return refuse(str(err))
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    # One of several may come first: whoever it is begins the store, the others join it.
    resume = line.resume or world > 1
    hm, tokens = _opened(cfg, resume=resume, loud=rank == 0)
    if line.dry_run:
        return _estimated(cfg, hm, tokens, as_json=line.json_output)
    report, signal = _captured(cfg, hm, tokens, resume=resume, loud=rank == 0)
    if report.status == "stopped":
        way_on = f"`interp capture --resume --out {shlex.quote(cfg.out)}`"
        tell(f"stopped by {signal}; whole shards are kept, {way_on} goes on")
    if rank == 0:
        said = _record(report)
        sys.stdout.write(f"{json.dumps(said, indent=1) if line.json_output else _summary(report)}\n")
    return _STOPPED if report.status == "stopped" else 0


def _given(path: str | None, words: list[str]) -> dict[str, Any]:
    """The settings of the config file, or of the store to go on with."""
    if path is not None:
        return read_yaml(path)
    on_line = {word.partition("=")[0] for word in words}
    out = value_on(words, "--out")
    held = None if out is None else Path(out) / SETTINGS
    return read_yaml(held) if "--resume" in on_line and held is not None and held.is_file() else {}


def _opened(cfg: CaptureConfig, *, resume: bool, loud: bool) -> tuple["HookManager", "TokenSource"]:
    from interp.core.manager import HookManager
    from interp.data.manifest import MANIFEST, Manifest
    from interp.data.tune import fastest_rows
    from interp.train.text import token_source

    device = cfg.device
    if device is None and "LOCAL_RANK" in os.environ:
        import torch

        device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else None
    hm = HookManager.load(cfg.model, dtype=cfg.dtype, device=device)

    def source(rows: int) -> "TokenSource":
        text = TextOptions.model_validate({**cfg.text.model_dump(exclude={"part"}), "rows": rows})
        return token_source(cfg.data, text, hm.tokenizer, part=cfg.text.part)

    if cfg.text.rows is not None:
        return hm, source(cfg.text.rows)
    if resume and (Path(cfg.out) / MANIFEST).is_file():
        return hm, source(Manifest.read(Path(cfg.out)).text.rows)
    rows = fastest_rows(hm, source(1), cfg.sites)
    if loud:
        tell(f"{rows} rows of {cfg.text.ctx} tokens per forward are the fastest here")
    return hm, source(rows)


def _captured(
    cfg: CaptureConfig, hm: "HookManager", tokens: "TokenSource", *, resume: bool, loud: bool
) -> tuple["Captured", str | None]:
    from interp.data.capture import capture, plan_capture
    from interp.train.signals import StopSignals

    names: list[str] = []
    out = Path(cfg.out)
    if loud and not (out.is_dir() and any(out.iterdir())) and not out.is_file():
        # As soon as nothing is wrong with them, so that `--resume --out` knows them however this ends.
        plan_capture(hm, tokens, list(cfg.sites), cfg.store)
        _write_settings(cfg)
    with StopSignals(names.append, save=names.append) as stop:
        report = capture(
            hm,
            tokens,
            list(cfg.sites),
            cfg.out,
            cfg.store,
            resume=resume,
            # A cluster's warning (SIGUSR1) is a reason to stop too: every whole shard is a checkpoint.
            should_stop=lambda: stop() or bool(names),
            progress=loud,
        )
    if loud:
        _write_settings(cfg)
    return report, names[0] if names else None


def _write_settings(cfg: CaptureConfig) -> None:
    from interp.core.disk import atomic_write

    try:
        atomic_write(Path(cfg.out) / SETTINGS, cfg.to_yaml())
    except OSError as err:
        raise ArtifactError(
            f"{cfg.out} cannot be written: {err.strerror}; make room, or choose another folder"
        ) from err


def _estimated(cfg: CaptureConfig, hm: "HookManager", tokens: "TokenSource", *, as_json: bool) -> int:
    from interp.data.capture import plan_capture
    from interp.data.store import row_sites
    from interp.data.tune import forward_speed

    plan = plan_capture(hm, tokens, list(cfg.sites), cfg.store)
    speed = forward_speed(hm, tokens, row_sites(list(cfg.sites)), rows=tokens.rows, forwards=3)
    total = plan.tokens
    record: dict[str, Any] = {
        "config": cfg.model_dump(mode="json"),
        "bytes_per_token": plan.bytes_per_token,
        "documents_per_shard": plan.manifest.text.unit_documents,
        "rows_per_forward": tokens.rows,
        "tokens_per_s": speed,
        "tokens": total,
        "bytes": None if total is None else total * plan.bytes_per_token,
        "seconds": None if total is None or not speed else total / speed,
        "free_bytes": shutil.disk_usage(_there(Path(cfg.out))).free,
    }
    sys.stdout.write(f"{json.dumps(record, indent=1) if as_json else _estimates(cfg, plan, record)}\n")
    return 0


def _estimates(cfg: CaptureConfig, plan: "CapturePlan", record: dict[str, Any]) -> str:
    speed = record["tokens_per_s"]
    lines = [
        cfg.to_yaml(),
        f"each token  {plan.bytes_per_token:,} bytes in {cfg.store.dtype}",
        f"shards      {record['documents_per_shard']:,} documents each",
        f"speed       {speed:,.0f} tokens/s of the model alone, {record['rows_per_forward']} rows per forward"
        if speed
        else "speed       the model ran out of memory; give fewer --text.rows",
    ]
    if record["tokens"] is None:
        lines.append("in all      until the text ends; --store.max-tokens sets a limit")
    else:
        hours, rest = divmod(int(record["seconds"] or 0), 3600)
        lines.append(
            f"in all      {record['tokens']:,} tokens, {record['bytes'] / 1e9:,.2f} GB, "
            f"about {hours} h {rest // 60} min {rest % 60} s"
        )
    lines.append(f"free        {record['free_bytes'] / 1e9:,.1f} GB on the disk of {cfg.out}")
    return "\n".join(lines)


def _there(path: Path) -> Path:
    """The nearest folder above that exists."""
    return next(p for p in [path.absolute(), *path.absolute().parents] if p.exists())


def _record(report: "Captured") -> dict[str, Any]:
    return {
        "out": str(report.folder),
        "status": report.status,
        "rows": report.rows,
        "tokens": report.tokens,
        "bytes": report.bytes,
        "seconds": report.seconds,
        "tokens_per_s": report.tokens / max(report.seconds, 1e-9),
        "busy": report.busy,
    }


def _summary(report: "Captured") -> str:
    speed, size = report.tokens / max(report.seconds, 1e-9), report.bytes / 1e9
    share = ", ".join(f"{name} {value:.0%}" for name, value in report.busy.items())
    return (
        f"{report.tokens:,} tokens ({size:.2f} GB) in {report.seconds:.1f} s: {speed:,.0f} tokens/s; busy: {share}\n"
        f"{report.folder}: interp.ActivationStore.open({str(report.folder)!r})"
    )
