"""`interp patch`: an exact activation-patching sweep; can be stopped and resumed."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from pydantic import Field, model_validator

from interp.cli.lines import read_line, refuse, tell, value_on
from interp.cli.pairs import PairsConfig, open_pairs
from interp.cli.results import LineFlags, ResultFolder, open_model, say, settings_in, term_interrupts, write_result
from interp.core.errors import ConfigError, InterpError
from interp.core.settings import read_yaml

if TYPE_CHECKING:
    from interp.core.manager import HookManager
    from interp.data.pairs import PromptPairs
    from interp.patching.result import PatchResult

__all__ = ["PatchConfig", "PatchLine", "main"]

_STOPPED = 143
_STAND_IN = {"model": "-", "out": "-"}
_PARTIAL = "partial.safetensors"

_By = Literal["pos", "head", "pos_head", "neuron", "span", "span_head", "dest_src", "dest_src_head", "site"]


class PatchConfig(PairsConfig):
    """Patch one place after another, exactly."""

    sites: list[str] = Field(
        default=["z"], min_length=1, description="a kind of site such as z or resid_pre (every layer), sites or globs"
    )
    by: _By | None = Field(
        default=None,
        description="what is patched at a time; by default heads where the sites have them, else positions",
    )
    pos: list[int] | None = Field(
        default=None, description="positions, counted from each prompt's first token or (negative) back from its last"
    )
    spans: list[str] | None = Field(default=None, description="for by: span and span_head, their names; by default all")
    mode: Literal["denoise", "noise", "both"] | None = Field(
        default=None,
        description="denoise puts clean activations into the corrupted run, noise others into the clean run; by "
        "default denoise, and noise for an ablation that is no other prompt",
    )
    ablation: Literal["resample", "mean", "zero", "gaussian", "optimal"] = Field(
        default="resample",
        description="what is put there: the other prompt's activation, a mean, nothing, the activation with noise "
        "added, or the constant that hurts least (fitted on the task's other split; by: head or site)",
    )
    noise: float | None = Field(
        default=None, gt=0, description="for gaussian, in standard deviations of the site's activation; by default 3"
    )
    n_draws: int | None = Field(default=None, gt=0, description="for gaussian, draws that a cell is the mean of; 10")
    noise_seed: int | None = Field(default=None, ge=0, description="for gaussian, of the draws; by default 0")
    metrics: list[str] = Field(
        default=["logit_diff"], min_length=1, description="any of logit_diff, prob_diff, log_prob, rank, kl"
    )
    engine: Literal["auto", "wavefront", "layers", "naive"] = Field(
        default="auto", description="how the sweep runs; naive is one forward per cell"
    )
    budget_mib: int | None = Field(
        default=None, gt=0, description="memory for a call of a block, in MiB; by default from what is free"
    )

    @model_validator(mode="after")
    def _spans_fit(self) -> "PatchConfig":
        if self.spans is not None and self.by not in ("span", "span_head"):
            raise ValueError("spans are for by: span or span_head")
        return self

    @model_validator(mode="after")
    def _ablation_fits(self) -> "PatchConfig":
        noisy = [name for name in ("noise", "n_draws", "noise_seed") if getattr(self, name) is not None]
        if noisy and self.ablation != "gaussian":
            raise ValueError(f"{noisy[0]} is for ablation: gaussian")
        if self.ablation == "optimal" and self.pairs.file is not None:
            raise ValueError("ablation: optimal fits on the other split of a task's words; give pairs.task, no file")
        if self.ablation == "optimal" and (self.by not in (None, "head", "site") or self.pos is not None):
            raise ValueError("ablation: optimal is one constant for all positions; give by: head or site, and no pos")
        return self


class PatchLine(PatchConfig, LineFlags):
    """Patch one place after another and measure each time what the model answers: exact, without a forward per cell.

    `interp patch [CONFIG.yaml] [OPTIONS]`: settings on the line go before those of the file. Writes every cell and
    example to cells.csv, a heat map, and the result itself.
    """

    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = Field(
        default=False, description="go on with the sweep in --out that was stopped or killed"
    )

    def settings(self) -> PatchConfig:
        """The configuration, without what belongs to the command line alone."""
        return PatchConfig.model_validate({name: getattr(self, name) for name in PatchConfig.model_fields})


def main(argv: list[str]) -> int:
    """Run a sweep, or say what it would be.

    Args:
        argv: The arguments after `interp patch`.

    Returns:
        The exit code: 0 done, 2 bad usage, 143 stopped by a signal, with what was done kept.

    Raises:
        InterpError: The sweep failed.
    """
    if {"--force", "--resume"} <= set(argv):
        return refuse("--force replaces results and --resume goes on with them; give one of them")
    try:
        line = read_line(PatchLine, PatchConfig, argv, prog="interp patch", stand_in=_STAND_IN, given=_given)
        cfg = line.settings()
        folder = ResultFolder(cfg.out, force=line.force, resume=line.resume)
    except ConfigError as err:
        return refuse(str(err))
    if line.resume and (folder.path / "result").is_dir() and not (folder.path / _PARTIAL).exists():
        return refuse(f"--resume: the sweep in --out {cfg.out} is done; --force in its place makes it again")
    hm = open_model(cfg)
    pairs = open_pairs(hm, cfg.pairs, bos=cfg.bos)
    if line.dry_run:
        return _described(hm, pairs, cfg, as_json=line.json_output)
    folder.begin(cfg)
    partial = folder.path / _PARTIAL
    try:
        with term_interrupts():
            found = _swept(hm, pairs, cfg, partial)
    except KeyboardInterrupt:
        tell(f"stopped; what is done is kept, `interp patch --resume --out {shlex.quote(cfg.out)}` goes on")
        return _STOPPED
    except InterpError:
        folder.give_up()
        raise
    files = write_result(folder, found, "cells.csv", "patching.html")
    partial.unlink(missing_ok=True)
    record = {"out": cfg.out, "cells": found.unchanged.numel(), "notes": found.notes, "files": [str(f) for f in files]}
    say("\n".join([found.summary(), *map(str, files)]), record, as_json=line.json_output)
    return 0


def _given(path: str | None, words: list[str]) -> dict[str, Any]:
    """The settings of the config file, or of the sweep to go on with."""
    if path is not None:
        return read_yaml(path)
    out = value_on(words, "--out")
    return settings_in(out) if "--resume" in words and out is not None else {}


def _described(hm: "HookManager", pairs: "PromptPairs", cfg: PatchConfig, *, as_json: bool) -> int:
    names = [f"*.{name}" if "." not in name and "*" not in name else name for name in cfg.sites]
    sites = [site.short for name in names for site in hm.atlas.expand(name)]
    lengths = sorted({int(n) for n in pairs.tokens(hm, bos=cfg.bos).clean.lengths})
    record = {"config": cfg.model_dump(mode="json"), "sites": sites, "pairs": len(pairs), "lengths": lengths}
    shown = ", ".join(sites[:8]) + (", …" if len(sites) > 8 else "")
    text = f"{cfg.to_yaml()}\n{len(sites)} sites ({shown}); {len(pairs)} pairs of {pairs.name}, of {lengths} tokens"
    say(text, record, as_json=as_json)
    return 0


def _swept(hm: "HookManager", pairs: "PromptPairs", cfg: PatchConfig, partial: Path) -> "PatchResult":
    from interp.patching.activation import activation_patch
    from interp.patching.options import PatchOptions

    fit_on = None
    if cfg.ablation == "optimal":
        other = cfg.pairs.model_copy(update={"held_out": not cfg.pairs.held_out})
        fit_on = open_pairs(hm, other, bos=cfg.bos).tokens(hm, bos=cfg.bos)
    options = PatchOptions(
        by=cfg.by,
        mode=cfg.mode,
        ablation=cfg.ablation,
        noise=cfg.noise,
        n_draws=cfg.n_draws,
        seed=cfg.noise_seed,
        fit_on=fit_on,
        spans=cfg.spans,
        engine=cfg.engine,
        budget_bytes=None if cfg.budget_mib is None else cfg.budget_mib * 2**20,
        resume=partial,
    )
    sites = cfg.sites[0] if len(cfg.sites) == 1 else cfg.sites
    metric = cfg.metrics[0] if len(cfg.metrics) == 1 else cfg.metrics
    tokens = pairs.tokens(hm, bos=cfg.bos)
    return activation_patch(hm, tokens, sites=sites, metric=metric, pos=cfg.pos, options=options)
