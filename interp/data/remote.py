"""Stores of activations on any file system that fsspec knows: sent there beside a capture, read through a local cache.

What lies there is laid out as on a disk. The manifest goes first, each shard's files before its record, complete.json
last: a shard without a record is not there, so a reader never sees half of one.
"""

import functools
import math
import threading
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm

from interp.core.errors import ArtifactError, ConfigError
from interp.data.ahead import Ahead
from interp.data.manifest import COMPLETE, MANIFEST, SHARDS, Manifest, read_complete
from interp.data.remotecache import ShardCache
from interp.data.remotefolder import RemoteFolder, checked_record, lock, refuse_other
from interp.data.shard import RECORD, Shard, checksum, record_bytes, shard_name
from interp.data.store import Rows, StreamState, check_sizes
from interp.data.stored import BLOCK, StoredActivations
from interp.data.storefolder import StoreFolder

__all__ = ["RemoteStore", "Uploaded", "Uploader", "check_destination", "open_remote", "upload_store"]

_LOOK = 0.5  # seconds between two looks for shards that have become whole
_CACHE_BYTES = 10 * 2**30


@dataclass(frozen=True)
class Uploaded:
    """How far a store has been sent.

    Attributes:
        url: where it lies.
        status: "complete", "partial" while it is still being captured, "stopped" when it was asked to, or "others"
            when another process is sending it.
        shards: sent by this call.
        bytes: of them.
        there: shards that were there already.
    """

    url: str
    status: Literal["complete", "partial", "stopped", "others"]
    shards: int = 0
    bytes: int = 0
    there: int = 0

    def summary(self) -> str:
        """In one line."""
        if self.status == "others":
            return f"{self.url}: another process is sending"
        state = {"complete": "all of the store is there", "partial": "the store is not complete yet"}
        there = f", {self.there:,} were there" if self.there else ""
        said = state.get(self.status, "stopped; the rest is still to be sent")
        return f"{self.url}: sent {self.shards:,} shards ({self.bytes / 1e9:.2f} GB){there}; {said}"


class _Upload:
    """Sends the whole shards of a folder that are not there yet."""

    def __init__(self, folder: Path, url: str, *, keep_local: bool = True) -> None:
        self.folder, self.keep_local, self.remote = folder, keep_local, RemoteFolder(url)
        _refuse_itself(folder, self.remote)
        self.store, self.done = StoreFolder(folder), set[int]()
        self.told = Uploaded(self.remote.url, "partial")
        self._there: dict[int, bytes] = {}

    def begin(self) -> None:
        """Send the manifest, or check the one that is there; then see which shards are."""
        self.manifest = Manifest.read(self.folder)
        if not _refuse_others(self.remote, self.manifest, self.folder):
            self.remote.write((self.folder / MANIFEST).read_bytes(), MANIFEST)
        self._there = dict(self.remote.records(self.remote.whole()))

    def pending(self) -> list[int]:
        """Shards that are whole here and have not been looked at."""
        return [number for number in self.store.whole() if number not in self.done]

    def send(self, number: int) -> int:
        """Send a shard, if it is not there; gives its bytes."""
        place, name = self.store.place(number), shard_name(number)
        try:
            text = (place / RECORD).read_bytes()
        except FileNotFoundError:
            return 0  # dropped since, as one beyond the end of the text is
        record = checked_record(text, self.manifest, str(place))
        size = record_bytes(record)
        if self._is_there(number, record):
            self.told = replace(self.told, there=self.told.there + 1)
        else:
            try:
                self._files(place, number, record)
            except FileNotFoundError as err:
                # Another uploader of the same folder may have sent it, and removed what it sent.
                self._there.update(self.remote.records([number] if number in self.remote.whole() else []))
                if not self._is_there(number, record):
                    raise ArtifactError(
                        f"{err.filename} is missing, and {self.remote.url} lacks this shard; remove {place}, and "
                        "`interp capture --resume` makes it again"
                    ) from err
            else:
                self.remote.write(text, SHARDS, name, RECORD)
                self.told = replace(self.told, shards=self.told.shards + 1, bytes=self.told.bytes + size)
        if not self.keep_local:
            self._strip(place, name, record)
        self.done.add(number)
        return size

    def close(self) -> None:
        """Send complete.json, when all that it speaks of has been sent."""
        complete = read_complete(self.folder)
        if complete is not None and set(range(int(complete["units"]))) <= self.done:
            self.remote.write((self.folder / COMPLETE).read_bytes(), COMPLETE)
            self.told = replace(self.told, status="complete")

    def _is_there(self, number: int, record: Mapping[str, Any]) -> bool:
        raw = self._there.get(number)
        return raw is not None and checked_record(raw, self.manifest, self.remote.url)["files"] == record["files"]

    def _files(self, place: Path, number: int, record: Mapping[str, Any]) -> None:
        name = shard_name(number)
        if number in self._there:  # with other content: from here on it is not there
            self.remote.remove(SHARDS, name, RECORD)
        for file, held in record["files"].items():
            if (total := checksum(place / file)) != held["crc32"]:
                raise ArtifactError(
                    f"{place / file}: checksum {total:08x}, its record says {held['crc32']:08x}; `interp store repair` "
                    "drops damaged shards, and `interp capture --resume` makes them again"
                )
            self.remote.send(place / file, held["bytes"], SHARDS, name, file)

    def _strip(self, place: Path, name: str, record: Mapping[str, Any]) -> None:
        """Remove a shard's files here, once they are known to be there; its record stays, so that it counts as made."""
        if not any((place / file).exists() for file in record["files"]):
            return  # they were, at an earlier time
        for file, held in record["files"].items():
            size = self.remote.tried(functools.partial(self.remote.size, SHARDS, name, file), "be looked at")
            if size != held["bytes"]:
                raise ArtifactError(
                    f"{self.remote.path(SHARDS, name, file)} has {size} bytes, {held['bytes']} were sent; nothing was "
                    f"removed here. Remove {self.remote.path(SHARDS, name, RECORD)} and send the shard again"
                )
        for file in record["files"]:
            (place / file).unlink(missing_ok=True)


def check_destination(folder: str | Path, url: str | Path, manifest: Manifest | None = None) -> str:
    """Refuse a URL that a store could not be sent to, before there is any; a small file is written there and removed.

    Args:
        folder: where the store is, or will be.
        url: as for `upload_store`.
        manifest: what the store will be, as far as that is known.

    Returns:
        The URL in full.

    Raises:
        ArtifactError: it cannot be reached, or written, or holds something else.
        ConfigError: its file system is not known, or needs a package; or it is the folder itself.
    """
    remote = RemoteFolder(str(url))
    _refuse_itself(Path(folder), remote)
    _refuse_others(remote, manifest, Path(folder))
    name, made, path = f".{uuid.uuid4().hex}.tmp", list[str](), remote.root
    while path and not remote.objects and not remote.tried(functools.partial(remote.fs.exists, path), "be looked at"):
        made.append(path)
        path = path.rpartition("/")[0]
    remote.write(b"", name)
    remote.remove(name)
    for made_here in made:
        with suppress(OSError):  # somebody may have put something there
            remote.fs.rmdir(made_here)
    return remote.url


def _refuse_itself(folder: Path, remote: RemoteFolder) -> None:
    here, there = folder.absolute(), Path(remote.root)
    if remote.url.startswith("file:") and (here == there or here in there.parents or there in here.parents):
        raise ConfigError(f"{remote.url} and {folder} lie in each other; send the store to a folder of its own")


def _refuse_others(remote: RemoteFolder, manifest: Manifest | None, folder: Path) -> bool:
    """Refuse a place that holds something else than this store; tells whether it holds it."""
    there = remote.manifest()
    if there is None and (held := remote.names()):
        raise ArtifactError(f"{remote.url} holds {', '.join(held[:4])}, which is no store; choose another")
    if there is not None and manifest is not None:
        refuse_other(there, manifest, f"the store at {remote.url}", str(folder))
    return there is not None


def upload_store(
    folder: str | Path,
    url: str | Path,
    *,
    should_stop: Callable[[], bool] | None = None,
    progress: bool = True,
) -> Uploaded:
    """Copy what is whole of a store, and not there yet, to another file system; may be called again to go on.

    A shard is there when the record there has the same checksums; every file's checksum is taken before it is sent,
    and its length afterwards. One shard's files are replaced where the record there says something else.

    Args:
        folder: the store; may be still being written.
        url: a folder of its own on any file system that fsspec knows: "s3://bucket/folder", "gcs://…", a path. Keys
            and endpoints come from fsspec's own configuration.
        should_stop: asked before each shard.
        progress: show a progress bar on stderr.

    Returns:
        What was sent, and whether all of the store is there.

    Raises:
        ArtifactError: no store, a damaged shard, another store at the URL, or a transfer that failed five times.
        ConfigError: the URL's file system is not known, or needs a package.
    """
    upload = _Upload(Path(folder), str(url))
    upload.begin()
    numbers = upload.pending()
    with tqdm(total=len(numbers), unit="shard", desc="sending", disable=not progress) as bar:
        for number in numbers:
            if should_stop is not None and should_stop():
                return replace(upload.told, status="stopped")
            upload.send(number)
            bar.update()
    upload.close()
    return upload.told


class Uploader:
    """Sends the shards of a store as they become whole, in a thread beside the capture that writes them.

        with Uploader("store", "s3://bucket/store", keep_local=False):
            capture(hm, tokens, sites, "store")

    Of several processes on a machine or a shared disk that have one for a folder, one at a time sends, by a lock; when
    it ends, another goes on.

    Args:
        folder: the store; it need not be begun yet.
        url: as for `upload_store`.
        keep_local: keep shards that have been sent; else only their records stay, so that the capture knows them as
            made. They are removed when all of a shard's files have been found there in full length. The disk still
            fills where the capture is faster than the transfer.

    Raises:
        ConfigError: the URL's file system is not known, or needs a package.
    """

    def __init__(self, folder: str | Path, url: str | Path, *, keep_local: bool = True) -> None:
        self._upload = _Upload(Path(folder), str(url), keep_local=keep_local)
        self._finishing, self._dropped = threading.Event(), threading.Event()
        self._fault: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def fault(self) -> BaseException | None:
        """What ended the sending before its time; `finish` raises it."""
        return self._fault

    def finish(self, *, should_stop: Callable[[], bool] | None = None, progress: bool = False) -> Uploaded:
        """Wait until all that is whole has been sent; call it when the capture has ended.

        Args:
            should_stop: asked now and then; when it says True, sending ends after the shard that is under way.
            progress: show a progress bar on stderr.

        Raises:
            ArtifactError: what `upload_store` would raise.
        """
        self._finishing.set()
        waiting = len(self._upload.pending()) if progress else 0
        with tqdm(total=waiting, unit="shard", desc="sending", disable=not waiting) as bar:
            while self._thread.is_alive():
                self._thread.join(_LOOK)
                bar.update(waiting - len(self._upload.pending()) - bar.n if waiting else 0)
                if should_stop is not None and should_stop():
                    self._dropped.set()
        if self._fault is not None:
            raise self._fault
        return self._upload.told

    def drop(self) -> Uploaded:
        """End after the shard that is under way; what else is whole stays to be sent by another call."""
        self._dropped.set()
        return self.finish()

    def __enter__(self) -> "Uploader":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.finish()
            return
        self._dropped.set()
        self._finishing.set()
        self._thread.join()

    def _run(self) -> None:
        folder = self._upload.folder
        try:
            while not (folder / MANIFEST).is_file() and not self._finishing.wait(_LOOK):
                pass
            if self._dropped.is_set():
                return
            Manifest.read(folder)  # or says that there is none
            (folder / "locks").mkdir(exist_ok=True)
            with (folder / "locks" / "sender").open("ab") as held:
                while not lock(held, wait=False):
                    if self._finishing.wait(_LOOK):
                        self._upload.told = replace(self._upload.told, status="others")
                        return
                self._send()
        except BaseException as err:  # noqa: BLE001 - it is raised where the upload is waited for
            self._fault = err

    def _send(self) -> None:
        self._upload.begin()
        while True:
            last = self._finishing.is_set()  # asked before the look, or a shard could become whole in between
            for number in self._upload.pending():
                if self._dropped.is_set():
                    self._upload.told = replace(self._upload.told, status="stopped")
                    return
                self._upload.send(number)
            if last:
                break
            self._finishing.wait(_LOOK)
        self._upload.close()


class RemoteStore(StoredActivations):
    """A store on another file system, read through a folder that keeps the shards last used; made by `open_remote`.

    Attributes:
        url: where it lies.
        pin: gather batches in pinned memory, as in `StoredActivations`; may be set at any time.
    """

    _reading: "_Reading | None" = None

    def __init__(
        self,
        url: str | Path,
        cache: str | Path,
        *,
        cache_bytes: int = _CACHE_BYTES,
        batch_size: int = 4096,
        buffer_tokens: int = 131072,
        seed: int = 0,
        repeat: bool = False,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        check_sizes(batch_size, buffer_tokens)
        self._cache = ShardCache(RemoteFolder(str(url)), Path(cache), cache_bytes)
        self.url = self._cache.remote.url
        self._cache.begin()
        super().__init__(
            cache, batch_size=batch_size, buffer_tokens=buffer_tokens, seed=seed, repeat=repeat, share=share
        )

    @property
    def fetched_bytes(self) -> int:
        """Bytes of shards that have been downloaded by this reader."""
        return self._cache.fetched

    def refresh(self) -> int:
        """Take in the shards that have become whole there since; gives how many are new.

        Raises:
            ArtifactError: none is whole yet, or one is damaged.
        """
        self._cache.update(self.manifest)
        return super().refresh()

    def gather(self, index: Int[Tensor, "n"]) -> Rows:
        """Return rows by their numbers, which must rise."""
        cuts = torch.searchsorted(index, self.offsets).tolist()
        wanted = [n for n, low, high in zip(self.numbers, cuts, cuts[1:], strict=False) if low < high]
        for number in wanted:
            self._cache.touch(number)
        with self._cache.wanting(wanted):
            return super().gather(index)

    def remove_cache(self) -> None:
        """Remove the cache's folder, when nothing is to be read any more."""
        self._cache.clear()

    def describe(self) -> dict[str, object]:
        """What was decided about tokens and shuffling, for a run's record."""
        return {**super().describe(), "store": self.url}

    def _whole(self) -> list[int]:
        return sorted(self._cache.records)

    def _shard(self, number: int) -> Shard:
        there: Callable[[], AbstractContextManager[None]] = functools.partial(self._cache.there, number)
        shard = Shard(
            self._cache.place(number),
            self.manifest.shapes,
            self.manifest.dtype,
            record=self._cache.records[number],
            there=there,
        )
        self._cache.shards[number] = shard
        return shard

    def _window(self, now: Sequence[int], following: Sequence[int]) -> None:
        if self._reading is None:  # of the copy that a stream has: it goes when the stream is let go
            self._reading = _Reading(self._cache)
        self._reading.at(now, following)

    def _stream(self, should_stop: Callable[[], bool], state: StreamState | None) -> Any:
        # A shard with b of B blocks is in a window of w blocks with probability 1 − (1 − b/B)^w, about.
        blocks = torch.tensor([math.ceil(shard.rows / BLOCK) for shard in self.shards], dtype=torch.double)
        sizes = torch.tensor([record_bytes(shard.record) for shard in self.shards], dtype=torch.double)
        window = 2 * max(1, self.buffer_tokens // BLOCK)  # batches hold rows left of the window before, too
        need = float((sizes * (1 - (1 - blocks / blocks.sum()) ** window)).sum())
        if need > self._cache.limit:
            warnings.warn(
                f"batches of {self.url} are drawn among buffer_tokens={self.buffer_tokens:,} rows, which lie in shards "
                f"of about {need:,.0f} bytes together; cache_bytes={self._cache.limit:,} holds less, so shards are "
                "downloaded again for each batch: raise cache_bytes or lower buffer_tokens",
                stacklevel=3,
            )
        return super()._stream(should_stop, state)


class _Reading:
    """Where a stream is: while a window of it is served, a thread fetches what that lacks, then what the next needs."""

    def __init__(self, cache: ShardCache) -> None:
        self.cache = cache
        self.ahead: Ahead[int] | None = None

    def at(self, now: Sequence[int], following: Sequence[int]) -> None:
        # The thread must not hold this, or it would never be let go; the one before ends after the shard it is at.
        self.ahead = Ahead(self.cache.ahead(self, now, following), len(now) + len(following) + 1)


def open_remote(
    url: str | Path,
    cache: str | Path,
    *,
    cache_bytes: int = _CACHE_BYTES,
    batch_size: int = 4096,
    buffer_tokens: int = 131072,
    seed: int = 0,
    repeat: bool = False,
    share: tuple[int, int] = (0, 1),
) -> RemoteStore:
    """Open a store on another file system; batches are those of the same store on a disk, to the bit.

    The records of all shards are fetched at once, a shard when a row of it is first looked at: whole, checked against
    its checksums, and kept until others need its place. While a shuffled window is served, a thread fetches the shards
    of the next, one at a time, as far as the cache has room: shards of two windows should fit in it together, as rows
    are left of one for the next, and of three to read ahead; less than two is warned of. What is mapped stays readable
    after it was removed from the cache, and takes room until it is let go.

    Args:
        url: where `upload_store` or `Uploader` has sent it; may be still being written.
        cache: a folder for this store's shards; empty, or this store's from an earlier time. Any number of processes
            may use it at once.
        cache_bytes: of shards that may lie there; at least the largest shard.
        batch_size, buffer_tokens, seed, repeat, share: as for `StoredActivations`.

    Returns:
        A `StoredActivations`.

    Raises:
        ArtifactError: no store, no whole shard, a damaged one, a folder that holds something else, or a transfer that
            failed five times.
        ConfigError: a URL, a cache, a buffer or a share that cannot be.
    """
    return RemoteStore(
        url,
        cache,
        cache_bytes=cache_bytes,
        batch_size=batch_size,
        buffer_tokens=buffer_tokens,
        seed=seed,
        repeat=repeat,
        share=share,
    )
