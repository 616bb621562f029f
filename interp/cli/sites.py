"""`interp sites`: what can be read and edited in a model."""

import json
import sys
from typing import Annotated

import tyro
from pydantic import BaseModel, ConfigDict, Field

__all__ = ["SitesOptions", "main"]


class SitesOptions(BaseModel):
    """List the sites of a model with shapes and definitions, from its config alone: no weights are loaded."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = Field(
        description="a folder, or a name on the Hugging Face hub"
    )
    pattern: Annotated[str, tyro.conf.arg(metavar="GLOB")] = Field(
        "*", description="a glob over site names, such as '*.resid_post' or '2.*'"
    )
    json_output: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = Field(
        False, description="print one JSON list of {site, short, shape, definition} instead of a table"
    )


def main(argv: list[str]) -> int:
    """Print the sites of a model.

    Args:
        argv: The arguments after `interp sites`.

    Returns:
        The exit code, 0.

    Raises:
        InterpError: The model or the pattern is unknown.
    """
    options = tyro.cli(SitesOptions, prog="interp sites", args=argv)
    from interp.core.manager import sites_of

    table = sites_of(options.model, pattern=options.pattern)
    text = json.dumps(table.rows, indent=1, ensure_ascii=False) if options.json_output else str(table)
    sys.stdout.write(text + "\n")
    return 0
