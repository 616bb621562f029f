"""The local cache of a store that lies on another file system: its shards, at most so many bytes of them."""

import json
import os
import shutil
import threading
import time
import uuid
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from interp.core.disk import atomic_write, write_json
from interp.core.errors import ArtifactError, ConfigError, InterpError
from interp.data.manifest import COMPLETE, MANIFEST, SHARDS, Manifest, parse_complete
from interp.data.remotefolder import RemoteFolder, checked_record, lock, refuse_other
from interp.data.shard import RECORD, Shard, checksum, record_bytes, shard_name

__all__ = ["ShardCache"]

_PAUSE = 0.05  # seconds between two looks for room that others are about to fill
_MARK, _RECORDS, _LOCKS = "remote.json", "records", "locks"


class ShardCache:
    """The shards of a store that are on the disk now: at most so many bytes, in use by any number of processes.

    What is where is read off the folder itself, under a lock that all its users take; a shard's time of change says
    when it was last used. A shard on its way takes room from the start, and has a lock of its own while it is fetched:
    so none comes twice, and what a dead process has left is known as such.
    """

    def __init__(self, remote: RemoteFolder, folder: Path, limit: int) -> None:
        self.remote, self.folder, self.limit = remote, folder, limit
        self.records: dict[int, dict[str, Any]] = {}
        self.shards: dict[int, Shard] = {}
        self.fetched = 0
        self._seen: set[int] = set()
        self._wanted: list[frozenset[int]] = []
        self._windows: weakref.WeakKeyDictionary[object, tuple[frozenset[int], ...]] = weakref.WeakKeyDictionary()
        self._one, self._turn = threading.Lock(), threading.Lock()
        self._fetching: dict[int, threading.Lock] = {}

    def begin(self) -> None:
        """Make the folder, or see that it is this store's cache; fetch the manifest."""
        held = sorted(path.name for path in self.folder.iterdir()) if self.folder.is_dir() else []
        if self.folder.exists() and not self.folder.is_dir():
            raise ArtifactError(f"{self.folder} is a file; a cache is a folder: choose another path")
        if held and _MARK not in held:
            raise ArtifactError(f"{self.folder} holds {', '.join(held[:4])} and is no cache; choose an empty folder")
        if held:
            was = json.loads((self.folder / _MARK).read_text(encoding="utf-8")).get("url")
            if was != self.remote.url:
                raise ArtifactError(f"{self.folder} is the cache of {was}, not of {self.remote.url}; choose another")
        raw = self.remote.read(MANIFEST)
        if raw is None:
            raise ArtifactError(f"{self.remote.url} holds no {MANIFEST}; `interp store send FOLDER URL` sends one")
        now = Manifest.parse(raw, f"{self.remote.url}: {MANIFEST}")
        with self._writing():
            for name in (SHARDS, _RECORDS, _LOCKS):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            write_json(self.folder / _MARK, {"url": self.remote.url})
        with self._locked():
            self._drafts()
            if (self.folder / MANIFEST).is_file():
                refuse_other(Manifest.read(self.folder), now, f"what {self.folder} keeps", self.remote.url)
            else:
                atomic_write(self.folder / MANIFEST, raw)

    def update(self, manifest: Manifest) -> None:
        """Fetch what is new: the records of shards, and complete.json."""
        complete = self.remote.read(COMPLETE)
        try:
            units = None if complete is None else int(parse_complete(complete)["units"])
        except ValueError as err:
            raise ArtifactError(f"{self.remote.url}: {COMPLETE} is damaged ({err}); send the store again") from err
        with self._writing():
            if complete is None:
                (self.folder / COMPLETE).unlink(missing_ok=True)
            else:
                atomic_write(self.folder / COMPLETE, complete)
        there = self.remote.whole() if units is None else list(range(units))
        new = [number for number in there if number not in self.records]
        kept = {number: self._kept(number, manifest) for number in new}
        self.records.update({number: record for number, record in kept.items() if record is not None})
        for number, raw in self.remote.records([number for number in new if kept[number] is None]):
            self.records[number] = checked_record(raw, manifest, f"{self.remote.url}, shard {shard_name(number)}")
            with self._writing():
                atomic_write(self._record_path(number), raw)
        largest = max(map(record_bytes, self.records.values()), default=0)
        if largest > self.limit:
            raise ConfigError(
                f"cache_bytes={self.limit:,} holds not even one shard of {self.remote.url}: the largest has "
                f"{largest:,} bytes; set cache_bytes ≥ {largest:,}"
            )

    @contextmanager
    def there(self, number: int) -> Iterator[None]:
        """See to it that a shard is on the disk, and stays while a file of it is mapped."""
        while True:
            with self._locked():
                if self._here(number):
                    yield
                    return
            with self._alone(number):
                if (draft := self._draft(number)) is not None:
                    # Still under the lock that others need to remove it again.
                    with self._arrived(number, draft):
                        yield
                    return

    def ahead(self, key: object, now: Sequence[int], following: Sequence[int]) -> Iterator[int]:
        """Fetch the shards of a reader's window, then of its next, one at a time, as they are needed.

        The window counts until the reader (`key`) tells of another, or is let go: nothing that it reads goes for what
        is fetched ahead. What cannot be fetched is left to whoever needs it, and says so then.
        """
        with self._one:
            self._windows[key] = (frozenset(now), frozenset(following))
        if sum(record_bytes(self.records[number]) for number in set(now)) > self.limit:
            return iter(())
        return self._each(list(dict.fromkeys([*now, *following])))

    def _each(self, numbers: list[int]) -> Iterator[int]:
        for number in numbers:
            try:
                with self._turn, self._alone(number):
                    if (draft := self._draft(number, ahead=True)) is not None:
                        with self._arrived(number, draft):
                            pass
            except InterpError:
                return
            yield number

    def place(self, number: int) -> Path:
        """Where a shard lies, when it is here."""
        return self.folder / SHARDS / shard_name(number)

    def touch(self, number: int) -> None:
        """Say that a shard is in use now."""
        now = time.time_ns()
        with suppress(FileNotFoundError):  # another process may have removed it; what is mapped of it stays
            os.utime(self.place(number), ns=(now, now))

    @contextmanager
    def wanting(self, numbers: Iterable[int]) -> Iterator[None]:
        """Have other shards removed first, as long as there are any."""
        wanted = frozenset(numbers)
        self._wanted.append(wanted)
        try:
            yield
        finally:
            self._wanted.remove(wanted)

    def clear(self) -> None:
        """Remove the folder, when what is read ahead has arrived; nothing can be read through it any more."""
        with self._turn, self._locked():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _kept(self, number: int, manifest: Manifest) -> dict[str, Any] | None:
        path = self._record_path(number)
        try:
            return checked_record(path.read_bytes(), manifest, str(path)) if path.is_file() else None
        except ArtifactError:
            return None  # damaged here: the one there is asked for again

    def _record_path(self, number: int) -> Path:
        return self.folder / _RECORDS / f"{shard_name(number)}.json"

    def _here(self, number: int) -> bool:
        """Whether a shard is on the disk, as it was written; then it counts as used now. Under the lock."""
        place = self.place(number)
        if not place.is_dir() or (number not in self._seen and not _as_written(place, self.records[number])):
            return False
        self._seen.add(number)
        self.touch(number)
        return True

    def _draft(self, number: int, *, ahead: bool = False) -> Path | None:
        """Make room for a shard, and a folder beside its place; None where it is here, or nothing may go for it."""
        while True:
            with self._locked():
                if self._here(number):
                    return None
                self._remove(number)
                for left in (self.folder / SHARDS).glob(f".{shard_name(number)}.*.tmp"):
                    shutil.rmtree(left)  # by somebody who is gone, as this one has the lock
                if self._make_room(number, ahead=ahead):
                    draft = self.place(number).with_name(f".{shard_name(number)}.{uuid.uuid4().hex}.tmp")
                    draft.mkdir()
                    return draft
            if ahead:
                return None
            time.sleep(_PAUSE)  # shards on their way take the room: these can go as soon as they are here

    @contextmanager
    def _arrived(self, number: int, draft: Path) -> Iterator[None]:
        """Fetch a shard and put it in its place; in the block it cannot go."""
        try:
            self._fetch(number, draft)
            with self._locked():
                draft.rename(self.place(number))
                self.fetched += record_bytes(self.records[number])
                self._seen.add(number)
                self.touch(number)
                yield
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _fetch(self, number: int, draft: Path) -> None:
        name, files = shard_name(number), self.records[number]["files"]
        remote, local = [self.remote.path(SHARDS, name, file) for file in files], [draft / file for file in files]

        def get() -> None:
            if remote:
                self.remote.fs.get(remote, [str(path) for path in local])
            for path, held in zip(local, files.values(), strict=True):
                if path.stat().st_size != held["bytes"] or checksum(path) != held["crc32"]:
                    raise OSError(f"{name}/{path.name} did not arrive as its record says")

        self.remote.tried(get, f"be copied to {self.folder} (shard {name})")
        with self._writing():
            (draft / RECORD).write_bytes(self._record_path(number).read_bytes())

    def _make_room(self, new: int, *, ahead: bool) -> bool:
        """Remove shards until another has room: those used longest ago first; none where it would not do.

        Those of next windows go after others, then those of present ones, then those that a batch under way reads; of
        these two the latest read first: it will be wanted again the latest.
        """
        here = {int(p.name): p.stat().st_mtime_ns for p in (self.folder / SHARDS).glob("[0-9]*") if p.name.isdecimal()}
        for gone in set(self.shards) - here.keys():
            self.shards[gone].forget()
        windows = list(self._windows.values())
        now, following = (frozenset[int]().union(*(window[i] for window in windows)) for i in (0, 1))
        wanted, drafts = frozenset[int]().union(*self._wanted), self._drafts()
        rank = {n: 3 if n in wanted else 2 if n in now else 1 if n in following else 0 for n in here}
        sizes = {n: _bytes_in(self.place(n)) for n in here}
        need = sum(sizes.values()) + sum(drafts.values()) + record_bytes(self.records[new])
        may_go = [n for n in here if not ahead or rank[n] < (2 if new in now else 1)]
        if need - sum(sizes[n] for n in may_go) > self.limit:
            return False
        for number in sorted(may_go, key=lambda n: (rank[n], -here[n] if rank[n] > 1 else here[n])):
            if need <= self.limit:
                break
            self._remove(number)
            need -= sizes[number]
        return True

    def _drafts(self) -> dict[int, int]:
        """The bytes that shards on their way will have; what was left by those who are gone is removed."""
        found: dict[int, int] = {}
        for path in (self.folder / SHARDS).glob(".[0-9]*.tmp"):
            number = int(path.name.split(".")[1])
            with (self.folder / _LOCKS / shard_name(number)).open("ab") as held:
                busy = (number in self._fetching and self._fetching[number].locked()) or not lock(held, wait=False)
            if not busy:
                shutil.rmtree(path, ignore_errors=True)
            else:
                found[number] = record_bytes(self.records[number]) if number in self.records else _bytes_in(path)
        return found

    def _remove(self, number: int) -> None:
        place = self.place(number)
        if number in self.shards:
            self.shards[number].forget()
        if place.exists():
            draft = place.with_name(f".{place.name}.{uuid.uuid4().hex}.tmp")
            place.rename(draft)
            shutil.rmtree(draft)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._one, self._writing(), (self.folder / "lock").open("ab") as held:
            lock(held)
            yield

    @contextmanager
    def _alone(self, number: int) -> Iterator[None]:
        """Nobody else fetches a shard; whoever waits for it finds it here afterwards."""
        mine, path = self._fetching.setdefault(number, threading.Lock()), self.folder / _LOCKS / shard_name(number)
        with mine, self._writing(), path.open("ab") as held:
            lock(held)
            yield

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as err:
            raise ArtifactError(
                f"the cache in {self.folder} cannot be written: {err.strerror or err}; make room, lower cache_bytes, "
                "or choose another folder"
            ) from err


def _bytes_in(place: Path) -> int:
    return sum(path.stat().st_size for path in place.iterdir() if path.name != RECORD)


def _as_written(place: Path, record: Mapping[str, Any]) -> bool:
    """Whether a shard from an earlier time is what was fetched: a machine may have gone down before the disk had it."""
    files = [(place / name, held) for name, held in record["files"].items()]
    whole = all(path.is_file() and path.stat().st_size == held["bytes"] for path, held in files)
    return whole and all(checksum(path) == held["crc32"] for path, held in files)
