"""`interp store`: what a folder of captured activations holds, whether it is sound, and how to mend it."""

import json
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import BaseModel, ConfigDict, Field

from interp.core.errors import ArtifactError

__all__ = ["StoreOptions", "main"]

_FAILED = 1


class StoreOptions(BaseModel):
    """Look at a folder of captured activations.

    info: what it holds. verify: read every byte and compare it with its checksum. repair: remove damaged shards, which
    `interp capture --resume` then makes again.
    """

    model_config = ConfigDict(extra="forbid")

    action: Annotated[Literal["info", "verify", "repair"], tyro.conf.Positional] = Field(description="what to do")
    store: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")] = Field(
        description="the folder that `interp capture` wrote"
    )
    json_output: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = Field(
        default=False, description="print one JSON object on stdout, and nothing else there"
    )


def main(argv: list[str]) -> int:
    """Look at a store.

    Args:
        argv: The arguments after `interp store`.

    Returns:
        The exit code: 0 sound, 1 damaged or not there, 2 bad usage.

    Raises:
        InterpError: There is no store.
    """
    options = tyro.cli(StoreOptions, prog="interp store", args=argv)
    record = _info(options.store)
    if options.action == "info":
        _say(record, options.json_output, _described(record))
        return 0
    faults = _faults(options.store, record)
    if options.action == "repair":
        for name in faults:
            shutil.rmtree(options.store / "shards" / name)
    told = [fault for found in faults.values() for fault in found]
    told += [f"shard {name} is missing" for name in record["missing"]]
    way_on = f"`interp capture --resume --out {options.store}` makes them again"
    if options.action == "repair" and faults:
        told.append(f"removed {', '.join(faults)}; {way_on}")
    elif faults:
        told.append(f"`interp store repair {options.store}` removes what is damaged; {way_on}")
    sound = f"{options.store}: {record['shards']} shards, every byte as it was written"
    _say({**record, "faults": told}, options.json_output, "\n".join(told) or sound)
    return _FAILED if (faults and options.action == "verify") or record["missing"] else 0


def _info(folder: Path) -> dict[str, Any]:
    """What manifest and shard records say."""
    from interp.data.manifest import SHARDS, Manifest, read_complete
    from interp.data.shard import read_record, record_bytes, shard_name

    manifest, complete = Manifest.read(folder), read_complete(folder)
    names = sorted(p.name for p in (folder / SHARDS).glob("[0-9]*") if p.name.isdecimal())
    totals = {"rows": 0, "tokens": 0, "bytes": 0}
    errors: dict[str, float] = {}
    for name in names:
        try:
            record = read_record(folder / SHARDS / name)
        except ArtifactError:
            continue
        totals["rows"] += int(record["rows"])
        totals["tokens"] += int(record["tokens"])
        totals["bytes"] += record_bytes(record)
        for site, held in record.get("error", {}).items():
            errors[site] = max(errors.get(site, 0.0), held["fvu"])
    wanted = [] if complete is None else [shard_name(n) for n in range(complete["units"])]
    return {
        "store": str(folder),
        "complete": complete is not None,
        "shards": len(names),
        "missing": sorted(set(wanted) - set(names)),
        **totals,
        "worst_fvu_of_int8": errors,
        "manifest": manifest.model_dump(mode="json"),
    }


def _faults(folder: Path, record: dict[str, Any]) -> dict[str, list[str]]:
    """What is wrong with each damaged shard."""
    from interp.data.manifest import SHARDS, Manifest
    from interp.data.shard import Shard

    manifest, found = Manifest.read(folder), {}
    for path in sorted(p for p in (folder / SHARDS).glob("[0-9]*") if p.name.isdecimal()):
        try:
            faults = list(Shard(path, manifest.shapes, manifest.dtype).check())
        except ArtifactError as err:
            faults = [str(err)]
        if faults:
            found[path.name] = faults
    return found


def _described(record: dict[str, Any]) -> str:
    made = record["manifest"]
    text, state = made["text"], "complete" if record["complete"] else "being written, or left unfinished"
    sites = ", ".join(f"{site['name']} {tuple(site['shape'])}" for site in made["sites"])
    lines = [
        f"{record['store']}: {state}",
        f"model     {made['model']} ({made['model_dtype']}, config {made['config_hash']})",
        f"sites     {sites}, kept as {made['dtype']}" + (", with gradients of the loss" if made["gradient"] else ""),
        f"text      {text['source']} ({text['part']}), rows of {text['ctx']}, {text['packing']}, BOS {text['bos']}",
        f"holds     {record['tokens']:,} tokens and {record['rows'] - record['tokens']:,} special ones in "
        f"{record['shards']:,} shards, {record['bytes'] / 1e9:.2f} GB",
    ]
    lines += [
        f"int8      worst FVU of {site} in a shard: {fvu:.2e}" for site, fvu in record["worst_fvu_of_int8"].items()
    ]
    lines += [f"missing   shard {name}" for name in record["missing"]]
    return "\n".join(lines)


def _say(record: dict[str, Any], as_json: bool, text: str) -> None:
    sys.stdout.write(f"{json.dumps(record, indent=1) if as_json else text}\n")
