"""`interp store`: what a store of captured activations holds, whether it is sound, how to mend it, and sending it."""

import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tyro
from pydantic import BaseModel, ConfigDict, Field

from interp.cli.lines import refuse, tell
from interp.core.errors import ArtifactError

if TYPE_CHECKING:
    from interp.data.manifest import Manifest
    from interp.data.remotefolder import RemoteFolder

__all__ = ["StoreOptions", "main"]

_FAILED, _STOPPED = 1, 143


class StoreOptions(BaseModel):
    """Look at a store of captured activations, or send it.

    info: what it holds. verify: read every byte and compare it with its checksum. repair: remove damaged shards, which
    `interp capture --resume` then makes again. send: copy what is whole, and not there yet, to a URL such as
    s3://bucket/store; may be called again to go on. info and verify take a URL too.
    """

    model_config = ConfigDict(extra="forbid")

    action: Annotated[Literal["info", "verify", "repair", "send"], tyro.conf.Positional] = Field(
        description="what to do"
    )
    store: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")] = Field(
        description="the folder that `interp capture` wrote, or for info and verify a URL"
    )
    to: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="URL")] = Field(
        default=None, description="where to send it"
    )
    json_output: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = Field(
        default=False, description="print one JSON object on stdout, and nothing else there"
    )


def main(argv: list[str]) -> int:
    """Look at a store, or send it.

    Args:
        argv: The arguments after `interp store`.

    Returns:
        The exit code: 0 sound, or sent; 1 damaged or not there, 2 bad usage, 143 stopped by a signal while sending.

    Raises:
        InterpError: There is no store, or it cannot be reached.
    """
    options = tyro.cli(StoreOptions, prog="interp store", args=argv)
    far = "://" in options.store
    if (options.action == "send") != (options.to is not None):
        return refuse("send takes a folder and a URL, the others take one place")
    if far and options.action in ("repair", "send"):
        return refuse(f"{options.action} works on a folder, not on {options.store}; info and verify take a URL")
    if options.to is not None:
        return _sent(options, options.to)
    record, manifest = _info(_far(options.store) if far else _near(Path(options.store)))
    if options.action == "info":
        _say(record, options.json_output, _described(record))
        return 0
    faults = _far_faults(options.store, record) if far else _faults(Path(options.store), manifest)
    if options.action == "repair":
        for name in faults:
            shutil.rmtree(Path(options.store) / "shards" / name)
    told = [fault for found in faults.values() for fault in found]
    told += [f"shard {name} is missing" for name in record["missing"]]
    way_on = f"`interp capture --resume --out {options.store}` makes them again"
    if options.action == "repair" and faults:
        told.append(f"removed {', '.join(faults)}; {way_on}")
    elif far and (faults or record["missing"]):
        told.append(f"remove shard.json of what is damaged there; `interp store send FOLDER {options.store}` mends it")
    elif faults:
        told.append(f"`interp store repair {options.store}` removes what is damaged; {way_on}")
    sound = f"{options.store}: {record['shards'] - record['elsewhere']} shards, every byte as it was written"
    if record["elsewhere"]:
        told.insert(0, f"{sound if not told else options.store}; {_elsewhere(record)}, so they were not read")
    _say({**record, "faults": told}, options.json_output, "\n".join(told) or sound)
    return _FAILED if (faults and options.action == "verify") or record["missing"] else 0


def _sent(options: StoreOptions, url: str) -> int:
    """Send what is whole, until a signal comes."""
    from interp.data.manifest import Manifest
    from interp.data.remote import check_destination, upload_store
    from interp.train.signals import StopSignals

    check_destination(options.store, url, Manifest.read(Path(options.store)))
    with StopSignals() as stop:
        told = upload_store(options.store, url, should_stop=stop)
    _say({"store": options.store, **asdict(told)}, options.json_output, told.summary())
    if told.status == "stopped":
        tell(f"stopped by {stop.name}; the same command goes on")
        return _STOPPED
    return 0


class _Held(NamedTuple):
    """What lies in a folder or at a URL: records by shard, None where damaged; `elsewhere` shards are records alone."""

    where: str
    manifest: "Manifest"
    complete: dict[str, Any] | None
    records: dict[str, dict[str, Any] | None]
    elsewhere: int


def _near(folder: Path) -> _Held:
    from interp.data.manifest import SHARDS, Manifest, read_complete
    from interp.data.shard import read_record

    manifest, complete = Manifest.read(folder), read_complete(folder)
    records: dict[str, dict[str, Any] | None] = {}
    for path in sorted(p for p in (folder / SHARDS).glob("[0-9]*") if p.name.isdecimal()):
        try:
            records[path.name] = read_record(path)
        except ArtifactError:
            records[path.name] = None
    elsewhere = sum(_is_elsewhere(folder / SHARDS / name, held) for name, held in records.items() if held is not None)
    return _Held(str(folder), manifest, complete, records, elsewhere)


def _far(url: str) -> _Held:
    """The same of a URL; nothing but records is fetched."""
    from interp.data.manifest import COMPLETE, parse_complete
    from interp.data.remotefolder import RemoteFolder, checked_record
    from interp.data.shard import shard_name

    remote = RemoteFolder(url)
    manifest, raw = remote.manifest(), remote.read(COMPLETE)
    if manifest is None:
        raise ArtifactError(f"{remote.url} holds no store of activations; `interp store send FOLDER {url}` sends one")
    records: dict[str, dict[str, Any] | None] = {}
    for number, text in remote.records(remote.whole()):
        try:
            records[shard_name(number)] = checked_record(text, manifest, remote.url)
        except ArtifactError:
            records[shard_name(number)] = None
    try:
        complete = None if raw is None else parse_complete(raw)
    except ValueError as err:
        raise ArtifactError(f"{remote.url}: {COMPLETE} is damaged ({err}); send the store again") from err
    return _Held(remote.url, manifest, complete, records, 0)


def _is_elsewhere(place: Path, record: Mapping[str, Any]) -> bool:
    """Whether a shard was sent and not kept here: its record is all that there is of it."""
    return bool(record["files"]) and not any((place / name).exists() for name in record["files"])


def _info(held: _Held) -> tuple[dict[str, Any], "Manifest"]:
    """What manifest and shard records say."""
    from interp.data.shard import record_bytes, shard_name

    where, manifest, complete, records, elsewhere = held
    totals = {"rows": 0, "tokens": 0, "bytes": 0}
    errors: dict[str, float] = {}
    for record in [record for record in records.values() if record is not None]:
        totals["rows"] += int(record["rows"])
        totals["tokens"] += int(record["tokens"])
        totals["bytes"] += record_bytes(record)
        for site, lost in record.get("error", {}).items():
            errors[site] = max(errors.get(site, 0.0), lost["fvu"])
    wanted = [] if complete is None else [shard_name(n) for n in range(complete["units"])]
    record = {
        "store": where,
        "complete": complete is not None,
        "shards": len(records),
        "missing": sorted(set(wanted) - set(records)),
        "elsewhere": elsewhere,
        **totals,
        "worst_fvu_of_int8": errors,
        "manifest": manifest.model_dump(mode="json"),
    }
    return record, manifest


def _far_faults(url: str, record: Mapping[str, Any]) -> dict[str, list[str]]:
    """What is wrong with each damaged shard at a URL; its files are fetched one at a time, and none is kept."""
    from tqdm import tqdm

    from interp.data.manifest import Manifest
    from interp.data.remotefolder import RemoteFolder, checked_record
    from interp.data.shard import shard_name

    remote, manifest = RemoteFolder(url), Manifest.model_validate(record["manifest"])
    tell(f"{remote.url}: {record['bytes'] / 1e9:.2f} GB are downloaded to be read, one file at a time")
    found: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory(prefix="interp-verify-") as folder:
        for number, text in tqdm(remote.records(remote.whole()), total=record["shards"], unit="shard", desc="reading"):
            name = shard_name(number)
            try:
                files = checked_record(text, manifest, f"shard {name}")["files"]
            except ArtifactError as err:
                found[name] = [str(err)]
                continue
            faults = [_file_fault(remote, name, file, held, Path(folder) / "file") for file, held in files.items()]
            if told := [fault for fault in faults if fault is not None]:
                found[name] = told
    return found


def _file_fault(remote: "RemoteFolder", name: str, file: str, held: Mapping[str, int], here: Path) -> str | None:
    """What is wrong with a file at a URL; one that is not as it should be is fetched once more."""
    from interp.data.manifest import SHARDS
    from interp.data.shard import checksum

    place = remote.path(SHARDS, name, file)

    def get() -> bool:
        remote.fs.get_file(place, str(here))
        return True

    for _ in range(2):
        if not remote.tried(get, f"be read ({name}/{file})", False):
            return f"{place} is missing"
        size, total = here.stat().st_size, checksum(here)
        here.unlink()
        if (size, total) == (held["bytes"], held["crc32"]):
            return None
    return f"{place}: {size} bytes, checksum {total:08x}; its record says {held['bytes']}, {held['crc32']:08x}"


def _faults(folder: Path, manifest: "Manifest") -> dict[str, list[str]]:
    """What is wrong with each damaged shard of a folder."""
    from interp.data.manifest import SHARDS
    from interp.data.shard import Shard, read_record

    found: dict[str, list[str]] = {}
    for path in sorted(p for p in (folder / SHARDS).glob("[0-9]*") if p.name.isdecimal()):
        try:
            elsewhere = _is_elsewhere(path, read_record(path))
            faults = [] if elsewhere else list(Shard(path, manifest.shapes, manifest.dtype).check())
        except ArtifactError as err:
            faults = [str(err)]
        if faults:
            found[path.name] = faults
    return found


def _described(record: dict[str, Any]) -> str:
    made = record["manifest"]
    text, state = made["text"], "complete" if record["complete"] else "being written, or left unfinished"
    sites = ", ".join(f"{site['name']} {tuple(site['shape'])}" for site in made["sites"])
    gradients = f", with gradients of the {made['gradient']}" if made["gradient"] else ""
    lines = [
        f"{record['store']}: {state}",
        f"model     {made['model']} ({made['model_dtype']}, config {made['config_hash']})",
        f"sites     {sites}, kept as {made['dtype']}{gradients}",
        f"text      {text['source']} ({text['part']}), rows of {text['ctx']}, {text['packing']}, BOS {text['bos']}",
        f"holds     {record['tokens']:,} tokens and {record['rows'] - record['tokens']:,} special ones in "
        f"{record['shards']:,} shards, {record['bytes'] / 1e9:.2f} GB",
    ]
    lines += [
        f"int8      worst FVU of {site} in a shard: {fvu:.2e}" for site, fvu in record["worst_fvu_of_int8"].items()
    ]
    lines += [f"elsewhere {_elsewhere(record)}"] if record["elsewhere"] else []
    lines += [f"missing   shard {name}" for name in record["missing"]]
    return "\n".join(lines)


def _elsewhere(record: Mapping[str, Any]) -> str:
    return f"the files of {record['elsewhere']} shards were sent elsewhere and not kept here"


def _say(record: dict[str, Any], as_json: bool, text: str) -> None:
    sys.stdout.write(f"{json.dumps(record, indent=1) if as_json else text}\n")
