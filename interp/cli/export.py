"""`interp export`: trained dictionaries as the folders of another library."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from pydantic import BaseModel, ConfigDict, Field

from interp.cli.lines import tell
from interp.core.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from interp.dictionaries.base import Dictionary, Transcoder

__all__ = ["ExportOptions", "main"]


class ExportOptions(BaseModel):
    """Write dictionaries as another library reads them.

    circuit-tracer: transcoders of all layers of a model as one set. sparsify: TopK SAEs and transcoders. saelens: what
    other libraries wrote; a run's own folder is in that format already.
    """

    model_config = ConfigDict(extra="forbid")

    runs: Annotated[list[str], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = Field(
        min_length=1, description="folders of dictionaries, of any layout that is read, also hf://owner/repo/folder"
    )
    to: Literal["circuit-tracer", "sparsify", "saelens"] = Field(description="whose format")
    out: Path = Field(
        description="folder to write, which must not be there; of several dictionaries, each has one in it"
    )
    model: str | None = Field(default=None, description="circuit-tracer: name of the model; by default as in the runs")
    feature_input_hook: str | None = Field(
        default=None,
        description="circuit-tracer: what transcoders read, such as mlp.hook_in; by default as in the runs",
    )
    feature_output_hook: str | None = Field(
        default=None, description="circuit-tracer: what they give, such as hook_mlp_out; by default as in the runs"
    )
    scan: str | None = Field(default=None, description="circuit-tracer: name of the set on Neuronpedia")
    json_output: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = Field(
        default=False, description="print one JSON object on stdout, and nothing else there"
    )


def main(argv: list[str]) -> int:
    """Write dictionaries as the folders of another library.

    Args:
        argv: The arguments after `interp export`.

    Returns:
        The exit code: 0 done.

    Raises:
        InterpError: A dictionary cannot be read, or the format cannot hold it.
    """
    options = tyro.cli(ExportOptions, prog="interp export", args=argv)
    from interp.dictionaries.base import Dictionary
    from interp.dictionaries.foreign import vacant

    try:
        vacant(options.out)  # before anything is loaded
        dictionaries: list[Dictionary] = []
        for run in options.runs:
            tell(f"loading {run}")
            dictionaries.append(Dictionary.load(run, model="processed"))  # weights and metadata stay as they are
        _write(options, dictionaries)
    except OSError as err:
        raise ArtifactError(f"{options.out} cannot be written: {err.strerror}; give another folder with --out") from err
    said = {"out": str(options.out), "format": options.to, "dictionaries": len(dictionaries)}
    sys.stdout.write(f"{json.dumps(said) if options.json_output else options.out}\n")
    return 0


def _write(options: ExportOptions, dictionaries: "Sequence[Dictionary]") -> None:
    if options.to != "circuit-tracer":
        _one_by_one(options, dictionaries)
        return
    from interp.dictionaries.circuit_tracer import to_circuit_tracer

    to_circuit_tracer(
        _by_layer(options.runs, dictionaries),
        options.out,
        model=options.model,
        feature_input_hook=options.feature_input_hook,
        feature_output_hook=options.feature_output_hook,
        scan=options.scan,
    )


def _by_layer(runs: Sequence[str], dictionaries: "Sequence[Dictionary]") -> "dict[int, Transcoder]":
    from interp.dictionaries.base import Transcoder
    from interp.dictionaries.foreign import layer_in

    found: dict[int, Transcoder] = {}
    for run, dictionary in zip(runs, dictionaries, strict=True):
        if not isinstance(dictionary, Transcoder):
            raise ConfigError(f"{run} is a {type(dictionary).__name__}; circuit-tracer takes transcoders")
        site = str(dictionary.cfg.metadata.get("hook_name"))
        layer = layer_in(site)
        if layer is None:
            raise ConfigError(f"{run} says that it reads {site}, which has no layer; name it in its metadata")
        if layer in found:
            raise ConfigError(f"{run} is of layer {layer}, and so is another; circuit-tracer takes one for each layer")
        found[layer] = dictionary
    return found


def _one_by_one(options: ExportOptions, dictionaries: "Sequence[Dictionary]") -> None:
    from interp.core.disk import appear
    from interp.dictionaries.sparsify import to_sparsify

    names = [Path(run).name for run in options.runs]
    if len(set(names)) < len(names):
        raise ConfigError(f"two of {', '.join(names)} would be written to one folder; export them one at a time")

    def write(dictionary: "Dictionary", place: Path) -> Path:
        return to_sparsify(dictionary, place) if options.to == "sparsify" else appear(place, dictionary.save)

    if len(dictionaries) == 1:
        write(dictionaries[0], options.out)
        return

    def write_all(draft: Path) -> None:
        for name, dictionary in zip(names, dictionaries, strict=True):
            write(dictionary, draft / name)

    appear(options.out, write_all)
