"""`interp show`: a trained dictionary as one page to look through."""

import json
import sys
from typing import Annotated, Any

import tyro
from pydantic import Field

from interp.cli.lines import refuse, tell
from interp.cli.runs import OpenRun, RunOptions, is_elsewhere, open_run
from interp.core.errors import ArtifactError

__all__ = ["ShowOptions", "main"]


class ShowOptions(RunOptions):
    """Write one HTML file, which needs no network: figures, curves, and latents with what makes them fire."""

    latents: Annotated[str | None, tyro.conf.arg(metavar="77,1203")] = Field(
        default=None, description="which latents; by default a spread of those that fire"
    )
    n: int = Field(default=100, gt=0, description="how many latents, where none are named")
    examples: int = Field(default=10, gt=0, description="strongest contexts of each latent")
    context: int = Field(default=10, ge=0, description="tokens on each side of the strongest one")
    tokens: int = Field(default=200_000, gt=0, description="tokens to run, special ones included")


def main(argv: list[str]) -> int:
    """Write the page of a run.

    Args:
        argv: The arguments after `interp show`.

    Returns:
        The exit code: 0 done, 2 bad usage.

    Raises:
        InterpError: The page could not be made.
    """
    options = tyro.cli(ShowOptions, prog="interp show", args=argv)
    try:
        latents = options.n if options.latents is None else [int(part) for part in options.latents.split(",")]
    except ValueError:
        return refuse(f"--latents {options.latents!r}: expected numbers with commas between them, such as 77,1203")
    if options.out is not None and options.out.is_dir():
        return refuse(f"--out {options.out} is a folder; give the name of a file, such as {options.out}/page.html")
    from interp.evaluate.top_examples import top_examples
    from interp.report.dictionary_page import RunRecord, write_dictionary_page

    record = RunRecord.read(options.run)
    if options.out is None and is_elsewhere(options.run):
        return refuse(f"{options.run} is no folder on this machine; say which file to write with --out")
    run = open_run(options.run, options, tell)
    tell(f"looking at {options.tokens:,} tokens")
    found = top_examples(
        run.hm,
        run.dictionary,
        _text(run, options.tokens),
        latents=latents,
        site=run.site,
        n_examples=options.examples,
        context=options.context,
        max_tokens=options.tokens,
    )
    out = options.out or options.run / "page.html"
    try:
        write_dictionary_page(out, found, run=record)
    except OSError as err:
        raise ArtifactError(f"{out} cannot be written: {err.strerror}; give another file with --out") from err
    said = {"page": str(out), "bytes": out.stat().st_size, "tokens": found.n_tokens, "latents": found.latents.tolist()}
    sys.stdout.write(f"{json.dumps(said) if options.json_output else out}\n")
    return 0


def _text(run: OpenRun, tokens: int) -> Any:
    """The run's text; a model of the small world reads that world's text with all its labels."""
    from interp.evaluate.labels import of_the_world

    if run.data not in (None, "testbed") or not of_the_world(run.hm):
        return run.tokens("held_out")
    from interp.testbed.text import Text
    from interp.train.text import WORLD_TASKS

    return Text("page", tasks=WORLD_TASKS).labelled_rows(-(-tokens // run.text.ctx), run.text.ctx)
