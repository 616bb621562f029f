"""The folder of a store on a file system of fsspec's.

Nothing that comes from there is taken at its word: names of shards are numbers, names and lengths of files are those
that the manifest asks for, and contents have the checksums of their record.
"""

import functools
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch

from interp.core.errors import ArtifactError, ConfigError
from interp.data.codec import codec_named
from interp.data.manifest import MANIFEST, SHARDS, Manifest
from interp.data.shard import COLUMNS, RECORD, file_name, parse_record, shard_name

__all__ = ["RemoteFolder", "checked_record", "lock", "refuse_other"]

_T = TypeVar("_T")
_S = TypeVar("_S")
_ATTEMPTS, _WAIT = 5, 1.0  # how often a transfer is tried, and seconds before the second time; doubled each time
_TOGETHER = 256  # records that are asked for at once
# Errors that do not pass by themselves.
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError)
# File systems where what is written appears at once, or not at all; elsewhere it is written beside its place.
_OBJECTS = {"abfs", "abfss", "adl", "az", "gcs", "gs", "memory", "oss", "r2", "s3", "s3a"}


class RemoteFolder:
    """The folder of a store on one of fsspec's file systems; transfers that fail are tried again."""

    def __init__(self, url: str) -> None:
        import fsspec

        try:
            self.fs, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as err:
            raise ConfigError(
                f"{url} cannot be reached: {err}; give a URL that fsspec knows, such as 's3://bucket/folder' with "
                "`pip install s3fs`, 'gcs://bucket/folder' with `pip install gcsfs`, or a path"
            ) from err
        self.root = root.rstrip("/")
        self.url = str(self.fs.unstrip_protocol(self.root))
        known = self.fs.protocol
        self.objects = bool(_OBJECTS & ({known} if isinstance(known, str) else set(known)))

    def path(self, *parts: str) -> str:
        """Where something of the folder lies."""
        return "/".join((self.root, *parts))

    def names(self) -> list[str]:
        """What lies in the folder itself; drafts of somebody who was killed do not count."""

        def look() -> list[str]:
            self.fs.invalidate_cache()
            return [str(path).rstrip("/").rpartition("/")[2] for path in self.fs.ls(self.root, detail=False)]

        found = self.tried(look, "be listed", [])
        return [name for name in found if not (name.startswith(".") and name.endswith(".tmp"))]

    def manifest(self) -> Manifest | None:
        """What kind of store lies here; None where none does."""
        raw = self.read(MANIFEST)
        return None if raw is None else Manifest.parse(raw, f"{self.url}: {MANIFEST}")

    def read(self, *parts: str) -> bytes | None:
        """A small file's content; None where there is no such file."""
        place = self.path(*parts)
        return self.tried(lambda: bytes(self.fs.cat_file(place)), f"be read ({'/'.join(parts)})", None)

    def write(self, data: bytes, *parts: str) -> None:
        """Write a small file, which is there whole or not at all."""
        place = self.path(*parts)

        def put() -> None:
            if self.objects:
                self.fs.pipe_file(place, data)
                return
            folder, _, name = place.rpartition("/")
            draft = f"{folder}/.{name}.{uuid.uuid4().hex}.tmp"
            self.fs.makedirs(folder, exist_ok=True)
            self.fs.pipe_file(draft, data)
            self.fs.mv(draft, place)

        self.tried(put, f"be written ({'/'.join(parts)})")

    def send(self, local: Path, size: int, *parts: str) -> None:
        """Copy a file there, and see that it has arrived in full length."""
        place = self.path(*parts)

        def put() -> None:
            if not self.objects:
                self.fs.makedirs(place.rpartition("/")[0], exist_ok=True)
            self.fs.put_file(str(local), place)
            self.fs.invalidate_cache(place.rpartition("/")[0])
            if (there := self.size(*parts)) != size:
                raise OSError(f"{place} has {there} bytes there, {size} were sent")

        self.tried(put, f"be written ({'/'.join(parts)})")

    def size(self, *parts: str) -> int | None:
        """Bytes of a file; None where there is none."""
        try:
            return int(self.fs.info(self.path(*parts))["size"])
        except FileNotFoundError:
            return None

    def remove(self, *parts: str) -> None:
        """Remove a file."""
        self.tried(lambda: self.fs.rm_file(self.path(*parts)), f"be changed ({'/'.join(parts)})")

    def whole(self) -> list[int]:
        """The numbers of the shards that have a record there; other names are none of ours."""
        prefix = self.path(SHARDS) + "/"

        def look() -> list[str]:
            self.fs.invalidate_cache()
            return [str(path).removeprefix(prefix) for path in self.fs.find(self.path(SHARDS))]

        paths = self.tried(look, "be listed", [])
        found = [match for path in paths if (match := re.fullmatch(rf"([0-9]{{6,}})/{re.escape(RECORD)}", path))]
        return sorted(int(match[1]) for match in found if shard_name(int(match[1])) == match[1])

    def records(self, numbers: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """The records of some shards, many at once."""
        for low in range(0, len(numbers), _TOGETHER):
            paths = {n: self.path(SHARDS, shard_name(n), RECORD) for n in numbers[low : low + _TOGETHER]}
            asked = list(paths.values())
            held = self.tried(functools.partial(self.fs.cat, asked), "be read (records of shards)")
            yield from ((number, bytes(held[path])) for number, path in paths.items())

    def tried(self, work: Callable[[], _T], what: str, *absent: _S) -> _T | _S:
        """Do something that may fail in passing, a few times; gives `absent`, if any, where there is no such file."""
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(_WAIT * 2 ** (attempt - 1))
            try:
                return work()
            except Exception as err:  # noqa: BLE001 - drivers have errors of their own, of no common kind
                fault = err
                if absent and isinstance(err, FileNotFoundError):
                    return absent[0]
                if isinstance(err, _LASTING) or "Credentials" in type(err).__name__:
                    break
        raise ArtifactError(
            f"{self.url} cannot {what}: {type(fault).__name__} {fault}; check the URL, your rights and the network, "
            "then go on: what has arrived whole stays"
        ) from fault


def lock(held: BinaryIO, *, wait: bool = True) -> bool:
    """Lock an open file among processes until it is closed, where the system can; False when another has it."""
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(held, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
    return True


def refuse_other(there: Manifest, here: Manifest, what: str, other: str) -> None:
    """Refuse two manifests that stand for different activations."""
    if apart := there.apart_from(here):
        raise ArtifactError(f"{what} is another store than {other}: {'; '.join(apart)}; choose another place")


def checked_record(raw: bytes, manifest: Manifest, where: str) -> dict[str, Any]:
    """Read a record from outside; refused unless its files are those of such a store, by name and length.

    So no name in it leads out of a folder, and no file is mapped beyond its end.
    """
    try:
        record = parse_record(raw)
        rows, files = record["rows"], record["files"]
        int(record["tokens"])
        found = {name: held["bytes"] for name, held in files.items()}
        sums = [held["crc32"] for held in files.values()]
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise ArtifactError(f"{where}: the record of a shard is damaged ({type(err).__name__}: {err})") from err
    wanted = _lengths(manifest, rows) if type(rows) is int and rows >= 0 else {}
    good = found == wanted or (rows == 0 and all(wanted.get(name) == size for name, size in found.items()))
    if not wanted or not good or not all(type(crc) is int for crc in sums) or any(set("/\\") & set(n) for n in found):
        apart = sorted(set(found.items()) ^ set(wanted.items()), key=str)[:4]
        raise ArtifactError(f"{where}: the record of a shard with {rows} rows does not fit its store: {apart}")
    return dict(record)


def _lengths(manifest: Manifest, rows: int) -> dict[str, int]:
    """The files of a shard with so many rows, and their bytes."""
    codec = codec_named(manifest.dtype)
    found = {file_name(n, "", dtype): rows * dtype.itemsize for n, dtype in COLUMNS.items()}
    for part in manifest.parts:
        for site in manifest.sites:
            found[file_name(part, site.name, codec.dtype)] = rows * site.width * codec.dtype.itemsize
            if codec.scale:
                scales = rows if codec.scale == "row" or not rows else site.width
                found[file_name(f"scale-{part}", site.name, torch.float32)] = scales * 4
    return found
