"""`interp eval`: measure a trained dictionary again, beside a PCA of the same size."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from pydantic import BaseModel, ConfigDict, Field

from interp.cli.lines import refuse, tell
from interp.core.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from interp.core.manager import HookManager
    from interp.core.site import Site
    from interp.data.documents import Part
    from interp.data.tokens import TokenSource
    from interp.dictionaries.base import Dictionary
    from interp.train.config import TextOptions, TrainConfig

__all__ = ["EvalOptions", "OpenRun", "RunOptions", "main", "open_run"]

_DEFAULT_RANK = 32


class RunOptions(BaseModel):
    """What `eval` and `show` both take."""

    model_config = ConfigDict(extra="forbid")

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = Field(
        description="the folder of a run, or any dictionary that interp.SAE.load reads, such as hf://owner/repo/folder"
    )
    model: str | None = Field(default=None, description="a folder or name; by default the one it was trained on")
    data: str | None = Field(
        default=None, description="text: a file, a folder, hf://owner/name, or testbed; by default that of the run"
    )
    device: str | None = Field(default=None, description="cpu, cuda, cuda:1, …; by default as in the run")
    out: Path | None = Field(default=None, description="file to write; by default in the run's folder")
    json_output: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = Field(
        default=False, description="print one JSON object on stdout, and nothing else there"
    )


class EvalOptions(RunOptions):
    """Measure a dictionary on text it was not trained on, beside a PCA of the same size, and write evaluation.json."""

    tokens: int | None = Field(
        default=None, gt=0, description="tokens to run, special ones included; by default as in the run"
    )
    pca_rank: int | None = Field(
        default=None, gt=0, description="rank of the PCA; by default the k of the dictionary, or 32 where it has none"
    )


@dataclass(frozen=True)
class OpenRun:
    """A dictionary with its model, and where its text is.

    Attributes:
        folder: of the run.
        hm: the model.
        dictionary: on the model's device.
        site: where it acts.
        cfg: the run's settings; None where the folder has none.
        text: how text becomes rows.
        data: text that was asked for on the command line, instead of the run's own.
    """

    folder: Path
    hm: "HookManager"
    dictionary: "Dictionary"
    site: "Site"
    cfg: "TrainConfig | None"
    text: "TextOptions"
    data: str | None

    def tokens(self, part: "Part") -> "TokenSource":
        """Text to fit on ("train") or to measure on ("held_out"), parted as the run parted it.

        Raises:
            ConfigError: no text is known.
        """
        from interp.train.text import token_source

        own = None if self.cfg is None else self.cfg.data
        apart = self.data if self.data is not None else self.cfg.evaluation.data if self.cfg is not None else None
        named = apart if apart is not None and (part == "held_out" or own is None) else own
        if named is None:
            raise ConfigError(f"{self.folder} does not say what text it was trained on; give --data")
        # Text of its own for the measurement needs no holding out, unless there is no other to fit on.
        whole = apart is not None and own is not None
        return token_source(named, self.text, self.hm.tokenizer, part="all" if whole else part)


def open_run(options: RunOptions, tell: Callable[[str], None]) -> OpenRun:
    """Load a run's dictionary and its model.

    Args:
        options: which run, and what to take instead of what it says.
        tell: called with what is being done.

    Raises:
        ArtifactError: there is no dictionary.
        ConfigError: no model is known, or the dictionary does not fit it.
    """
    from interp.core.manager import HookManager
    from interp.dictionaries.base import Dictionary
    from interp.dictionaries.processed import for_model
    from interp.evaluate.dictionary import place_of
    from interp.train.config import TextOptions, TrainConfig

    # Its model comes later.
    dictionary: Dictionary = Dictionary.load(options.run, model="processed")
    if options.out is None and not options.run.is_dir():
        raise ConfigError(f"{options.run} is no folder on this machine; say which file to write with --out")
    settings = options.run / "config.yaml"
    cfg = TrainConfig.from_yaml(settings) if settings.is_file() else None
    known = dictionary.cfg.metadata
    name = options.model or (cfg.model if cfg is not None else known.get("model_name"))
    if name is None:
        raise ConfigError(f"{options.run} does not say what model it was trained on; give --model")
    tell(f"loading {name}")
    device = options.device or (cfg.device if cfg is not None else None)
    hm = HookManager.load(str(name), dtype=None if cfg is None else cfg.dtype, device=device)
    dictionary = for_model(dictionary.to(hm.device), hm, site=None if cfg is None else cfg.site)
    if cfg is not None:
        text = cfg.text
    else:
        text = TextOptions(ctx=int(known["context_size"])) if known.get("context_size") else TextOptions()
    site = place_of(hm, dictionary, None if cfg is None else cfg.site)
    return OpenRun(options.run, hm, dictionary, site, cfg, text, options.data)


def main(argv: list[str]) -> int:
    """Measure a dictionary.

    Args:
        argv: The arguments after `interp eval`.

    Returns:
        The exit code: 0 done, 2 bad usage.

    Raises:
        InterpError: The measurement failed.
    """
    options = tyro.cli(EvalOptions, prog="interp eval", args=argv)
    if options.out is not None and options.out.is_dir():
        return refuse(
            f"--out {options.out} is a folder; give the name of a file, such as {options.out}/evaluation.json"
        )
    from interp.core.disk import write_json
    from interp.evaluate.baseline import fit_pca
    from interp.evaluate.dictionary import evaluate_dictionary

    run = open_run(options, tell)
    tokens = options.tokens or (run.cfg.evaluation.tokens if run.cfg is not None else 100_000)
    asked = options.pca_rank or getattr(run.dictionary.cfg, "k", None) or _DEFAULT_RANK
    held_out, width = run.tokens("held_out"), run.dictionary.cfg.d_in
    tell(
        f"fitting a PCA of rank {min(asked, width)} on {tokens:,} tokens of {run.tokens('train').documents.describe()}"
    )
    pca = fit_pca(run.hm, run.tokens("train"), run.site, rank=min(asked, width), max_tokens=tokens)
    tell(f"measuring on {tokens:,} tokens of {held_out.documents.describe()}")
    found = evaluate_dictionary(run.hm, run.dictionary, held_out, run.site, max_tokens=tokens, pca=pca)
    out = options.out or options.run / "evaluation.json"
    record: dict[str, Any] = {**found.scalars(), "text": _said(held_out), "special_tokens": "left out"}
    try:
        write_json(out, record)
    except OSError as err:
        raise ArtifactError(f"{out} cannot be written: {err.strerror}; give another file with --out") from err
    text = json.dumps({"out": str(out), **record}, indent=1) if options.json_output else f"{found.summary()}\n{out}"
    sys.stdout.write(f"{text}\n")
    return 0


def _said(tokens: "TokenSource") -> str:
    documents = tokens.documents
    kept = f"every {documents.hold_out_every}th document" if documents.part == "held_out" else "all documents"
    return f"{kept} of {documents.describe()}"
