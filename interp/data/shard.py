"""One shard of stored activations: raw files that can be mapped, and a record with their sizes and checksums.

000012/shard.json          rows, documents, checksums, the measured error of eight bits
000012/ids.int32           token ids
000012/document.int64      index of each token's document in the source
000012/position.int32      position among its document's own tokens; −1 at added special tokens
000012/special.uint8       1 at BOS, EOS and every other special token
000012/values.SITE.DTYPE   a site's activations, row by row
000012/scale.SITE.float32  with eight bits, the scale of each row or channel
000012/gradient.SITE.DTYPE where gradients were captured
"""

import json
import math
import shutil
import uuid
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from interp.core.disk import sync
from interp.core.errors import ArtifactError, DataError
from interp.data.codec import Codec, codec_named
from interp.data.manifest import SHARDS

__all__ = ["COLUMNS", "Shard", "ShardWriter", "checksum", "record_bytes", "shard_name", "whole_shards"]

RECORD = "shard.json"
# What is known of each row, and how it is written.
COLUMNS: Mapping[str, torch.dtype] = {
    "ids": torch.int32,
    "document": torch.int64,
    "position": torch.int32,
    "special": torch.uint8,
}
_PENDING = 32  # pieces whose checksum may be outstanding
_SUM = "crc32"  # of the record itself
_CHECKED = 1 << 24  # bytes that are read at once for a checksum


def shard_name(number: int) -> str:
    """The name of a shard's folder."""
    return f"{number:06d}"


def whole_shards(store: Path) -> list[int]:
    """The numbers of the shards of a store that have a record, in order: it is written last."""
    held = [path for path in (store / SHARDS).glob("[0-9]*") if path.name.isdecimal()]
    return sorted(int(path.name) for path in held if (path / RECORD).is_file())


def file_name(part: str, name: str, dtype: torch.dtype) -> str:
    """The name of a file of a shard, such as `values.blocks.2.hook_resid_post.bfloat16`."""
    kind = str(dtype).removeprefix("torch.")
    return f"{part}.{name}.{kind}" if name else f"{part}.{kind}"


class ShardWriter:
    """Writes a shard beside its place, a few rows at a time, and puts it there whole.

    Memory: what is appended at once; with a scale per channel, all rows of the shard.

    Args:
        place: the folder to be.
        codecs: the codec of each kind of values, by its file's part and site: ("values", SITE) or ("gradient", SITE).
    """

    def __init__(self, place: Path, codecs: Mapping[tuple[str, str], Codec]) -> None:
        self.place, self.codecs = place, dict(codecs)
        self.draft = place.with_name(f".{place.name}.{uuid.uuid4().hex}.tmp")
        self.rows = 0
        self.counted = 0
        self._files: dict[str, tuple[BinaryIO, list[int]]] = {}
        self._errors: dict[str, _Error] = {}
        self._waiting: dict[tuple[str, str], list[Tensor]] = {}
        self.draft.mkdir(parents=True)
        # Checksums are made while the disk is written: one thread, so that those of a file come in order.
        self._sums = ThreadPoolExecutor(1, thread_name_prefix="checksums")
        self._pending: deque[Future[None]] = deque()

    def append(self, columns: Mapping[str, Tensor], values: Mapping[tuple[str, str], Float[Tensor, "row d"]]) -> None:
        """Write some rows.

        Args:
            columns: what is known of each, by the names in `COLUMNS`, on the CPU.
            values: their activations and gradients by part and site, on the CPU; those that the codec writes as they
                are may come in its dtype.

        Raises:
            OSError: the disk is full, or gone.
        """
        for name, dtype in COLUMNS.items():
            self._write(file_name(name, "", dtype), columns[name].to(dtype))
        for key, rows in values.items():
            if self.codecs[key].scale == "channel":
                self._waiting.setdefault(key, []).append(rows)
            else:
                self._encode(key, rows)
        self.rows += len(columns["ids"])
        self.counted += int((columns["special"] == 0).sum())

    def close(self, record: Mapping[str, Any]) -> None:
        """Finish the files and put the shard in its place; one that is there is replaced.

        Args:
            record: what else its record should say, such as which documents it holds.

        Raises:
            OSError: the disk is full, or gone.
        """
        for key, parts in self._waiting.items():
            self._encode(key, torch.cat(parts))
        self._settle(0)
        self._sums.shutdown()
        files = {name: {"bytes": held[0], "crc32": held[1]} for name, (_, held) in self._files.items()}
        errors = {name: error.figures() for name, error in self._errors.items()}
        said = {"rows": self.rows, "tokens": self.counted, **record, "files": files, "error": errors}
        whole = self.draft / RECORD
        whole.write_text(json.dumps({**said, _SUM: _record_sum(said)}, indent=1) + "\n", encoding="utf-8")
        for file, _ in self._files.values():
            file.close()
        # Side by side: the file system gathers them into one commit.
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(sync, [whole, *(self.draft / name for name in files)]))
        sync(self.draft)
        if self.place.exists():
            shutil.rmtree(self.place)
        self.draft.rename(self.place)
        sync(self.place.parent)

    def drop(self) -> None:
        """Leave nothing behind."""
        self._sums.shutdown(cancel_futures=True)
        for file, _ in self._files.values():
            # What a full disk did not take is tried once more.
            with suppress(OSError):
                file.close()
        shutil.rmtree(self.draft, ignore_errors=True)

    def _encode(self, key: tuple[str, str], rows: Tensor) -> None:
        codec, (part, site) = self.codecs[key], key
        coded = codec.encode(rows)
        if codec.dtype == torch.float16 and bool(coded["values"].isinf().any()):
            raise DataError(f"{part} of {site} are larger than float16 holds (65,504); capture as bfloat16 or float32")
        self._write(file_name(part, site, codec.dtype), coded["values"])
        if codec.scale:
            self._write(file_name(f"scale-{part}", site, torch.float32), coded["scale"])
            self._errors.setdefault(f"{part}.{site}", _Error()).add(
                rows.double(), codec.decode(coded["values"], coded["scale"])
            )

    def _write(self, name: str, values: Tensor) -> None:
        if name not in self._files:
            self._files[name] = ((self.draft / name).open("wb"), [0, 0])
        file, held = self._files[name]
        raw: Any = values.contiguous().flatten().view(torch.uint8).numpy() if values.numel() else b""

        def add() -> None:
            held[1] = zlib.crc32(raw, held[1])

        self._pending.append(self._sums.submit(add))
        file.write(raw)
        held[0] += len(raw)
        self._settle(_PENDING)

    def _settle(self, left: int) -> None:
        """Wait until no more than so many checksums are to be made; what they are of is held till then."""
        while len(self._pending) > left:
            self._pending.popleft().result()


class _Error:
    """What a codec loses of some rows: sums in fp64, about the first rows' mean."""

    def __init__(self) -> None:
        self.n, self.missed, self.largest = 0, 0.0, 0.0
        self.shift = self.sum = self.squares = torch.zeros(0, dtype=torch.float64)

    def add(self, x: Float[Tensor, "row d"], near: Float[Tensor, "row d"]) -> None:
        if not len(x):
            return
        if not self.n:
            self.shift = x.mean(0)
            self.sum, self.squares = torch.zeros_like(self.shift), torch.zeros_like(self.shift)
        missed, moved = x - near, x - self.shift
        self.n += len(x)
        self.missed += float(missed.pow(2).sum())
        self.largest = max(self.largest, float(missed.abs().max()))
        self.sum += moved.sum(0)
        self.squares += moved.pow(2).sum(0)

    def figures(self) -> dict[str, float]:
        """The fraction of variance that is lost (0 where there is none), and the largest error of a number."""
        variance = float((self.squares - self.sum.pow(2) / max(self.n, 1)).sum())
        return {"fvu": self.missed / variance if variance > 0 else 0.0, "largest": self.largest}


class Shard:
    """A shard on the disk, mapped when it is looked at.

    Args:
        folder: where it lies.
        shapes: the feature axes of each site.
        dtype: the codec's name.
        record: what its record says, where the folder may not be there yet; then no file's length is looked at.
        there: entered while a file is mapped; sees to it that the folder is there, and stays meanwhile.

    Raises:
        ArtifactError: its record is missing or damaged, or a file is not as long as it says.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: str,
        *,
        record: Mapping[str, Any] | None = None,
        there: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.folder, self.shapes, self.codec = folder, shapes, codec_named(dtype)
        self.record = read_record(folder) if record is None else dict(record)
        self.rows, self.tokens = int(self.record["rows"]), int(self.record["tokens"])
        self._there = there
        self._mapped: dict[str, Tensor] = {}
        self._columns: dict[str, Tensor] = {}
        self._raw: dict[tuple[str, str], Tensor] = {}
        if record is not None:
            return
        for name, held in self.record["files"].items():
            path = folder / name
            size = path.stat().st_size if path.is_file() else -1
            if size != held["bytes"]:
                found = "is missing" if size < 0 else f"has {size} bytes"
                raise ArtifactError(f"{path} {found}, its record says {held['bytes']}; {_CURE}")

    def column(self, name: str) -> Shaped[Tensor, "row"]:
        """What is known of every row, by a name in `COLUMNS`."""
        found = self._columns.get(name)
        if found is None:
            dtype = COLUMNS[name]
            file = file_name(name, "", dtype)
            found = self._columns[name] = self._map(file, dtype, (self.rows,))
        return found

    @cached_property
    def counted(self) -> Bool[Tensor, "row"]:
        """Which rows are no special tokens."""
        return self.column("special") == 0

    def raw(self, site: str, part: str = "values") -> Tensor:
        """A site's rows as they lie on the disk, [row d], without a copy."""
        found = self._raw.get((site, part))
        if found is None:
            width = math.prod(self.shapes[site])
            name = file_name(part, site, self.codec.dtype)
            found = self._raw[site, part] = self._map(name, self.codec.dtype, (self.rows, width))
        return found

    def select(self, site: str, index: Int[Tensor, "n"] | slice, part: str = "values") -> Float[Tensor, "n d"]:
        """Some rows of a site, decoded; a view of the disk's where nothing has to be."""
        rows, scale = self.raw(site, part), self._scale(site, part)
        mine = rows[index] if isinstance(index, slice) else rows.index_select(0, index)
        if scale is not None and self.codec.scale == "row":
            scale = scale[index] if isinstance(index, slice) else scale.index_select(0, index)
        return self.codec.decode(mine, scale)

    def select_into(self, out: Float[Tensor, "n d"], site: str, index: Int[Tensor, "n"], part: str = "values") -> None:
        """The same, written to where it should go, of the dtype that the codec gives."""
        if self.codec.scale:
            out.copy_(self.select(site, index, part))
        else:
            torch.index_select(self.raw(site, part), 0, index, out=out)

    def forget(self) -> None:
        """Let go of the mapped files, until they are looked at again. Views that were given stay good."""
        self._raw.clear()
        self._columns.clear()
        self._mapped.clear()
        self.__dict__.pop("counted", None)

    def check(self) -> Iterator[str]:
        """Read every file and say which are not what was written."""
        for name, held in self.record["files"].items():
            if (total := checksum(self.folder / name)) != held["crc32"]:
                yield f"{self.folder / name}: checksum {total:08x}, its record says {held['crc32']:08x}"

    def _scale(self, site: str, part: str) -> Tensor | None:
        if not self.codec.scale:
            return None
        width = self.rows if self.codec.scale == "row" else math.prod(self.shapes[site])
        return self._map(file_name(f"scale-{part}", site, torch.float32), torch.float32, (width if self.rows else 0,))

    def _map(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        found = self._mapped.get(name)
        if found is None:
            if name not in self.record["files"]:
                if self.rows:
                    raise ArtifactError(f"{self.folder} has no {name}; it was captured without it")
                return torch.empty(shape, dtype=dtype)
            flat, count = torch.empty(0, dtype=dtype), math.prod(shape)
            if count:
                with self._there():
                    # Private: what is written to such a tensor never reaches the file.
                    flat = torch.from_file(str(self.folder / name), shared=False, size=count, dtype=dtype)
            found = self._mapped[name] = flat.view(shape)
        return found


def checksum(path: Path) -> int:
    """The CRC-32 of a file."""
    total = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHECKED):
            total = zlib.crc32(chunk, total)
    return total


def record_bytes(record: Mapping[str, Any]) -> int:
    """Bytes of a shard's files, by its record."""
    return sum(int(held["bytes"]) for held in record["files"].values())


def _record_sum(record: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


_CURE = "`interp store repair` drops damaged shards, and `interp capture --resume` makes them again"


def read_record(folder: Path) -> dict[str, Any]:
    """Read a shard's record.

    Raises:
        ArtifactError: it is missing, or is not one.
    """
    try:
        return parse_record((folder / RECORD).read_bytes())
    except (OSError, ValueError) as err:
        raise ArtifactError(f"{folder / RECORD} cannot be read ({err}); {_CURE}") from err


def parse_record(raw: bytes) -> dict[str, Any]:
    """Read a shard's record from its text.

    Raises:
        ValueError: it is not what was written.
    """
    record = json.loads(raw)
    if not isinstance(record, dict) or record.pop(_SUM, None) != _record_sum(record):
        raise ValueError("it is not what was written")
    return record
