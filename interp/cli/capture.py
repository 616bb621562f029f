"""`interp capture`: the activations of a text to a folder, by one process or many; can be stopped and resumed."""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from pydantic import Field, field_validator, model_validator

from interp.cli.lines import read_line, refuse, tell, value_on
from interp.core.errors import ArtifactError, ConfigError
from interp.core.settings import Settings, read_yaml
from interp.core.site import Site
from interp.data.capture import CaptureOptions
from interp.data.manifest import SETTINGS
from interp.train.config import TextOptions

if TYPE_CHECKING:
    from interp.core.manager import HookManager
    from interp.data.capture import Captured, CapturePlan
    from interp.data.remote import Uploaded, Uploader
    from interp.data.tokens import TokenSource

__all__ = ["CaptureConfig", "CaptureLine", "main"]

_STOPPED = 143
_SPLIT_TOKENS = 8192  # per forward of a model that is split among processes, where rows are not given
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
    send_to: str | None = Field(
        default=None,
        description="URL of a folder, such as s3://bucket/store or gcs://bucket/store, that whole shards are sent to "
        "while others are captured",
    )
    keep_local: bool = Field(
        default=True, description="keep shards in out that have been sent; else only their records stay"
    )
    device: str | None = Field(
        default=None,
        description="cpu, cuda, cuda:1, …; by default where the model loads, under torchrun the rank's GPU",
    )
    device_map: str | None = Field(
        default=None, description="as in transformers, such as auto: layers on all GPUs of this process, then the CPU"
    )
    tensor_parallel: bool = Field(
        default=False, description="the processes of this torchrun hold one model together, each a part of every weight"
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None, description="of the model; by default the checkpoint's"
    )
    text: CaptureText = CaptureText()
    store: CaptureOptions = CaptureOptions()

    @model_validator(mode="after")
    def _held_one_way(self) -> "CaptureConfig":
        if self.tensor_parallel and (self.device is not None or self.device_map is not None):
            raise ValueError("tensor_parallel puts each part where it belongs: leave device and device_map out")
        return self

    @model_validator(mode="after")
    def _kept_somewhere(self) -> "CaptureConfig":
        if not self.keep_local and self.send_to is None:
            raise ValueError("keep_local is off and send_to is not given: the shards would be kept nowhere")
        return self

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
        line = read_line(CaptureLine, CaptureConfig, argv, prog="interp capture", stand_in=_STAND_IN, given=_given)
    except ConfigError as err:
        return refuse(str(err))
    return _run(line.settings(), line)


def _run(cfg: CaptureConfig, line: CaptureLine) -> int:
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    # One of several may come first: whoever it is begins the store, the others join it.
    resume = line.resume or world > 1
    if cfg.send_to is not None and rank == 0:
        from interp.data.remote import check_destination

        check_destination(cfg.out, cfg.send_to)
    hm, tokens = _opened(cfg, resume=resume, loud=rank == 0)
    if line.dry_run:
        return _estimated(cfg, hm, tokens, as_json=line.json_output)
    report, told, signal = _captured(cfg, hm, tokens, resume=resume, loud=rank == 0)
    stopped = report.status == "stopped" or (told is not None and told.status == "stopped")
    if stopped:
        way_on = f"`interp capture --resume --out {shlex.quote(cfg.out)}`"
        sends = "" if cfg.send_to is None else ", and sends what is left"
        tell(f"stopped by {signal}; whole shards are kept, {way_on} goes on{sends}")
    if rank == 0:
        said = _record(report, told)
        sys.stdout.write(f"{json.dumps(said, indent=1) if line.json_output else _summary(cfg, report, told)}\n")
    return _STOPPED if stopped else 0


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

    device, split = cfg.device, cfg.tensor_parallel
    if device is None and "LOCAL_RANK" in os.environ and not split and cfg.device_map is None:
        import torch

        device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else None
    how = {"tp_plan": "auto"} if split else None
    hm = HookManager.load(cfg.model, dtype=cfg.dtype, device=device, device_map=cfg.device_map, model_kwargs=how)

    def source(rows: int) -> "TokenSource":
        text = TextOptions.model_validate({**cfg.text.model_dump(exclude={"part"}), "rows": rows})
        return token_source(cfg.data, text, hm.tokenizer, part=cfg.text.part)

    if cfg.text.rows is not None:
        return hm, source(cfg.text.rows)
    if resume and (Path(cfg.out) / MANIFEST).is_file():
        return hm, source(Manifest.read(Path(cfg.out)).text.rows)
    if split:
        # Each process would find another number, and they would wait for each other for ever.
        return hm, source(max(1, _SPLIT_TOKENS // cfg.text.ctx))
    rows = fastest_rows(hm, source(1), cfg.sites)
    if loud:
        tell(f"{rows} rows of {cfg.text.ctx} tokens per forward are the fastest here")
    return hm, source(rows)


def _captured(
    cfg: CaptureConfig, hm: "HookManager", tokens: "TokenSource", *, resume: bool, loud: bool
) -> tuple["Captured", "Uploaded | None", str | None]:
    from interp.data.capture import capture, plan_capture
    from interp.train.signals import StopSignals

    names: list[str] = []
    if loud:
        _begun(cfg, hm, tokens)
    elif cfg.tensor_parallel:
        plan_capture(hm, tokens, list(cfg.sites), cfg.store)  # as the first process does: weights are read together
    with StopSignals(names.append, save=names.append) as stop:
        # A cluster's warning (SIGUSR1) is a reason to stop too: every whole shard is a checkpoint.
        sending = _Sending(cfg if loud else None, lambda: stop() or bool(names))
        with sending:
            report = capture(
                hm,
                tokens,
                list(cfg.sites),
                cfg.out,
                cfg.store,
                resume=resume,
                should_stop=sending.should_stop,
                progress=loud,
            )
        if loud:
            _write_settings(cfg)
        told = sending.ended(report)
    return report, told, names[0] if names else None


def _begun(cfg: CaptureConfig, hm: "HookManager", tokens: "TokenSource") -> None:
    """Settings, as soon as nothing is wrong with them, so that `--resume --out` knows them however this ends."""
    from interp.data.capture import plan_capture
    from interp.data.manifest import MANIFEST, Manifest

    out = Path(cfg.out)
    new = not (out.is_dir() and any(out.iterdir())) and not out.is_file()
    plan = plan_capture(hm, tokens, list(cfg.sites), cfg.store) if new or cfg.tensor_parallel else None
    if cfg.send_to is not None and (new or (out / MANIFEST).is_file()):
        from interp.data.remote import check_destination

        check_destination(out, cfg.send_to, Manifest.read(out) if plan is None else plan.manifest)
    if new:
        _write_settings(cfg)


class _Sending:
    """What is sent while a capture runs, if anything is to be."""

    def __init__(self, cfg: CaptureConfig | None, stop: Callable[[], bool]) -> None:
        self.stop, self.said = stop, False
        self.url, self.keep = (None, True) if cfg is None else (cfg.send_to, cfg.keep_local)
        self.out = "" if cfg is None else cfg.out
        self.uploader: Uploader | None = None

    def __enter__(self) -> "_Sending":
        if self.url is not None:
            from interp.data.remote import Uploader

            self.uploader = Uploader(self.out, self.url, keep_local=self.keep)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None and self.uploader is not None:
            with suppress(Exception):  # the capture's own error is the one to be heard
                self.uploader.drop()

    def should_stop(self) -> bool:
        """Whether the capture should end: also when what it makes cannot be sent, and is not to stay here."""
        fault = None if self.uploader is None else self.uploader.fault
        if fault is not None and not self.said:
            self.said = True
            tell(f"sending has failed; {'the capture goes on' if self.keep else 'the capture ends'}: {fault}")
        return self.stop() or (fault is not None and not self.keep)

    def ended(self, report: "Captured") -> "Uploaded | None":
        """Send what is left, unless a signal says to stop."""
        if self.uploader is None:
            return None
        try:
            if report.status == "stopped":
                return self.uploader.drop()
            return self.uploader.finish(should_stop=self.stop, progress=True)
        except ArtifactError as err:
            state = "all of the store is" if report.status == "complete" else "whole shards are"
            way_on = f"`interp capture --resume --out {shlex.quote(self.out)}` sends the rest"
            raise ArtifactError(f"{err}; {state} in {self.out}, and {way_on}") from err


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


def _record(report: "Captured", told: "Uploaded | None") -> dict[str, Any]:
    return {
        "out": str(report.folder),
        "status": report.status,
        "rows": report.rows,
        "tokens": report.tokens,
        "bytes": report.bytes,
        "seconds": report.seconds,
        "tokens_per_s": report.tokens / max(report.seconds, 1e-9),
        "busy": report.busy,
        "sent": None if told is None else asdict(told),
    }


def _summary(cfg: CaptureConfig, report: "Captured", told: "Uploaded | None") -> str:
    speed, size = report.tokens / max(report.seconds, 1e-9), report.bytes / 1e9
    share = ", ".join(f"{name} {value:.0%}" for name, value in report.busy.items())
    out, took = str(report.folder), f"in {report.seconds:.1f} s: {speed:,.0f} tokens/s; busy: {share}"
    lines = [f"{report.tokens:,} tokens ({size:.2f} GB) {took}"]
    if cfg.keep_local:
        lines.append(f"{out}: interp.ActivationStore.open({out!r})")
    if told is not None:
        lines.append(told.summary())
        if told.status in ("partial", "others"):
            lines[-1] += f"; `interp store send {shlex.quote(out)} {shlex.quote(told.url)}` sends what is left, if any"
        elif told.status == "complete":
            lines.append(f"{told.url}: interp.data.remote.open_remote({told.url!r}, CACHE)")
    return "\n".join(lines)
