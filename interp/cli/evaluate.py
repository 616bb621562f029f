"""`interp eval`: measure trained dictionaries in every way that applies, into one table and one page."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from pydantic import Field

from interp.cli.lines import refuse, tell
from interp.cli.runs import OpenRun, TextChoice, expanded, is_elsewhere, open_run, settings_of
from interp.core.errors import ArtifactError

if TYPE_CHECKING:
    from interp.core.manager import HookManager
    from interp.data.tokens import TokenSource
    from interp.evaluate.evaluations import Evaluations

__all__ = ["EvalOptions", "main"]

_DEFAULT_RANK = 32
_TABLE, _RECORD, _PAGE, _LABELS = "evaluations.csv", "evaluations.json", "evaluations.html", "labels.csv"
_ONE = "evaluation.json"

PartName = Literal["core", "geometry", "seeds", "dark_matter", "description_length", "labels"]


class EvalOptions(TextChoice):
    """Measure dictionaries on text they were not trained on: one table, one page, every figure with its definition.

    Writes evaluations.csv, evaluations.json and evaluations.html, and labels.csv where labels are known; without --out,
    evaluation.json in the folder of each run too.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN …]")] = Field(
        description="folders of runs, of sweeps, or of any dictionaries that interp.SAE.load reads, such as "
        "hf://owner/repo/folder"
    )
    only: tuple[PartName, ...] = Field(default=(), description="parts to measure; by default all that apply")
    out: Path | None = Field(default=None, description="folder to write to; by default that of the one run or sweep")
    tokens: int | None = Field(
        default=None, gt=0, description="tokens to run, special ones included; by default as in the run"
    )
    pca_rank: int | None = Field(
        default=None, ge=0, description="rank of the PCA; by default the k of the dictionary, or 32 where it has none"
    )


def main(argv: list[str]) -> int:
    """Measure dictionaries.

    Args:
        argv: The arguments after `interp eval`.

    Returns:
        The exit code: 0 done, 2 bad usage.

    Raises:
        InterpError: The measurement failed.
    """
    options = tyro.cli(EvalOptions, prog="interp eval", args=argv)
    if not options.runs:
        return refuse("name at least one run: interp eval runs/first")
    if options.out is None and len(options.runs) > 1:
        return refuse(f"{len(options.runs)} folders were named; say where the table goes with --out FOLDER")
    out = options.out or options.runs[0]
    if options.out is not None and out.is_file():
        return refuse(f"--out {out} is a file; give a folder")
    if options.out is None and is_elsewhere(out):
        return refuse(f"{out} is no folder on this machine; say where the table goes with --out FOLDER")
    from interp.evaluate.evaluations import joined

    folders, models = expanded(options.runs), dict[tuple[Any, ...], "HookManager"]()
    names = _names(folders)
    runs = {name: open_run(path, options, tell, models=models) for name, path in zip(names, folders, strict=True)}
    said = settings_of(runs)
    found = joined([_measured(group, said, options) for group in _groups(runs, options)], list(runs))
    files = _write(found, out, runs if options.out is None else {})
    if options.json_output:
        text = json.dumps({"out": str(out), "files": [str(path) for path in files], **found.records()}, indent=1)
    else:
        text = "\n".join([found.summary(), *map(str, files)])
    sys.stdout.write(f"{text}\n")
    return 0


def _names(folders: list[Path]) -> list[str]:
    """The folders' names, with as much of their paths as tells them apart."""
    for n in range(1, 1 + max(len(path.resolve().parts) for path in folders)):
        names = ["/".join(path.resolve().parts[-n:]) for path in folders]
        if len(set(names)) == len(names):
            break
    return names


def _groups(runs: Mapping[str, OpenRun], options: EvalOptions) -> list[dict[str, OpenRun]]:
    """Runs of one model that are measured on the same text."""
    found: dict[str, dict[str, OpenRun]] = {}
    for name, run in runs.items():
        key = [id(run.hm), run.tokens("held_out").describe(), run.tokens("train").describe(), _tokens(run, options)]
        found.setdefault(json.dumps(key, default=str), {})[name] = run
    return list(found.values())


def _tokens(run: OpenRun, options: EvalOptions) -> int:
    return options.tokens or (run.cfg.evaluation.tokens if run.cfg is not None else 100_000)


def _measured(runs: dict[str, OpenRun], said: dict[str, tuple[str, int]], options: EvalOptions) -> "Evaluations":
    from interp.evaluate.every import Trained, evaluate_all

    first = next(iter(runs.values()))
    tokens, held_out = _tokens(first, options), first.tokens("held_out")
    tell(f"measuring {', '.join(runs)} on {tokens:,} tokens of {held_out.documents.describe()}")
    trained = {name: Trained(*said[name], pca_rank=_rank(run, options)) for name, run in runs.items()}
    return evaluate_all(
        first.hm,
        {name: run.dictionary for name, run in runs.items()},
        held_out,
        fit_tokens=first.tokens("train"),
        trained=trained,
        only=options.only,
        max_tokens=tokens,
    )


def _rank(run: OpenRun, options: EvalOptions) -> int:
    if options.pca_rank is not None:
        return options.pca_rank
    return int(getattr(run.dictionary.cfg, "k", None) or _DEFAULT_RANK)


def _write(found: "Evaluations", out: Path, runs: Mapping[str, OpenRun]) -> list[Path]:
    from interp.core.disk import atomic_write, write_json

    files = [out / _TABLE, out / _RECORD, out / _PAGE]
    try:
        out.mkdir(parents=True, exist_ok=True)
        atomic_write(files[0], found.to_frame().to_csv(index=False))
        write_json(files[1], found.records())
        found.to_html(files[2])
        if found.labels:
            files.append(atomic_write(out / _LABELS, found.labels_frame().to_csv(index=False)))
        for name, run in runs.items():
            if name in found.core:
                # What `interp show` and the run's own page read.
                text = _said(run.tokens("held_out"))
                write_json(run.folder / _ONE, {**found.core[name], "text": text, "special_tokens": "left out"})
    except OSError as err:
        raise ArtifactError(f"{out} cannot be written: {err.strerror}; give another folder with --out") from err
    return files


def _said(tokens: "TokenSource") -> str:
    documents = tokens.documents
    kept = f"every {documents.hold_out_every}th document" if documents.part == "held_out" else "all documents"
    return f"{kept} of {documents.describe()}"
