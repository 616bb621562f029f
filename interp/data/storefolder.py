"""The folder of a store while it is written: who is at which unit, where the text ends, and what is left to do."""

import errno
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from interp.core.disk import clear_drafts, write_json
from interp.core.errors import ArtifactError, ConfigError
from interp.data.manifest import COMPLETE, MANIFEST, SETTINGS, SHARDS, Manifest, read_complete
from interp.data.shard import RECORD, read_record, record_bytes, shard_name, whole_shards

__all__ = ["Claim", "StoreFolder"]

_LOCKS, _END, _LIMIT = "locks", "end.json", "limit.json"
_PAUSE = 0.2  # seconds between two looks at what others are doing


class Claim:
    """The right to write one unit, until it is released or the process is gone.

    Attributes:
        number: of the unit.
    """

    def __init__(self, number: int, path: Path, held: BinaryIO) -> None:
        self.number, self._path, self._held = number, path, held

    @property
    def held(self) -> bool:
        """Whether it has not been released."""
        return not self._held.closed

    def release(self) -> None:
        """Let others have it."""
        if not self._held.closed:
            self._path.unlink(missing_ok=True)
            self._held.close()


class StoreFolder:
    """Locks, shards and the two ends of a store's folder.

    Locks are advisory ones of the file system (`flock`), which the system drops when a process ends, however it does.

    Args:
        path: the folder. Nothing is touched before `begin`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[int, int] = {}  # tokens that count, of units that are whole or that this process has run
        self._seen: set[int] = set()  # shards that were whole when last looked at

    def place(self, number: int) -> Path:
        """Where a shard lies, or will."""
        return self.path / SHARDS / shard_name(number)

    def begin(self, manifest: Manifest, *, resume: bool, free_unit: bool) -> Manifest:
        """Write the manifest of a new store, or check it against the one that is there.

        Args:
            manifest: what is asked for.
            resume: go on with a store that is there; a new one is begun where there is none.
            free_unit: documents per unit were not asked for: those of the store there do.

        Returns:
            What holds from now on.

        Raises:
            ArtifactError: the folder holds something else.
            ConfigError: it is a store with other settings.
        """
        held = {p.name for p in self.path.iterdir()} - {SETTINGS} if self.path.is_dir() else set()
        # Another process may be writing the manifest at this moment, or was killed while it did.
        held = {name for name in held if not (name.startswith(f".{MANIFEST}.") and name.endswith(".tmp"))}
        if self.path.exists() and not self.path.is_dir():
            raise ArtifactError(f"{self.path} is a file; a store is a folder: choose another path")
        shown = ", ".join(sorted(held)[:4]) + (", …" if len(held) > 4 else "")
        ours = MANIFEST in held or (_LOCKS in held and held <= {_LOCKS, SHARDS})
        if held and not resume:
            way_on = ", or resume to go on with the store" if ours else ""
            raise ArtifactError(f"{self.path} already holds {shown}; choose another folder{way_on}")
        if held and not ours:
            raise ArtifactError(f"{self.path} holds {shown}, which is no store; choose another folder")
        if MANIFEST in held:
            # Before anything is touched.
            self._agreed(manifest, free_unit)
        with self._writing():
            (self.path / _LOCKS).mkdir(parents=True, exist_ok=True)
            with self._lock("store"):
                if (self.path / MANIFEST).is_file():
                    return self._agreed(manifest, free_unit)
                (self.path / SHARDS).mkdir(exist_ok=True)
                write_json(self.path / MANIFEST, manifest.model_dump(mode="json"))
        return manifest

    def _agreed(self, manifest: Manifest, free_unit: bool) -> Manifest:
        """The manifest that is there, if it is what is asked for."""
        there = Manifest.read(self.path)
        if free_unit:
            unit = there.text.unit_documents
            text = manifest.text.model_copy(update={"unit_documents": unit})
            manifest = manifest.model_copy(update={"text": text})
        there.check(manifest, self.path)
        return there

    def whole(self) -> list[int]:
        """The numbers of the shards that are there, in order."""
        return whole_shards(self.path)

    def _whole_so_far(self) -> set[int]:
        """The same as a set; a shard that was whole is not looked into again, so this may be asked at every claim."""
        there = {int(entry.name) for entry in os.scandir(self.path / SHARDS) if entry.name.isdecimal()}
        self._seen = {number for number in there if number in self._seen or self._is_whole(number)}
        return self._seen

    def _is_whole(self, number: int) -> bool:
        return (self.place(number) / RECORD).is_file()

    def tokens_held(self) -> int:
        """Tokens that count in them."""
        return sum(self._tokens(number) for number in self.whole())

    def counts(self, number: int, tokens: int) -> None:
        """Say how many tokens of a unit count, before it is written."""
        self._known[number] = tokens

    def ends_at(self, number: int) -> None:
        """Say that the text has ended before a unit."""
        with self._writing(), self._lock("store"):
            write_json(self.path / _END, {"units": min(number, self._end() or number)})

    def limit(self, max_tokens: int | None) -> int | None:
        """At most how many units the store will have; exactly so many once these are all there. None: nobody can say.

        Args:
            max_tokens: tokens that count after which no further unit is wanted.
        """
        end = self._end()
        if max_tokens is None:
            return end
        whole, total = self._whole_so_far(), 0
        for number in sorted(whole | set(self._known)):
            # Units that others are at can only add to the tokens before this one.
            if total >= max_tokens or (end is not None and number >= end):
                break
            total += self._tokens(number)
            if total >= max_tokens:
                return number + 1 if end is None else min(number + 1, end)
        return end

    def claims(self, limit: Callable[[], int | None], should_stop: Callable[[], bool]) -> Iterator[Claim]:
        """Take one unit after the other that is neither there nor being written, until all of them are there.

        Units that others are writing are waited for at the end: should one of those die, its unit is free again.

        Args:
            limit: the number of units, as far as it is known.
            should_stop: asked while waiting; when it says True, no more come.
        """
        number = 0
        mine: set[int] = set()
        while not should_stop():
            end = limit()
            if end is not None and number >= end:
                missing = set(range(end)) - mine - set(self.whole())
                if not missing:
                    return
                time.sleep(_PAUSE)
                number = min(missing)
            if number not in mine and not self._is_whole(number) and (claim := self._claim(number)) is not None:
                if self._is_whole(number):
                    claim.release()
                else:
                    mine.add(number)
                    clear_drafts(self.path / SHARDS, [shard_name(number)], inside=False)
                    yield claim
            number += 1

    def finish(self, limit: int | None) -> bool:
        """Close the store if all its units are there: what lies beyond is removed; tells whether it is closed.

        Args:
            limit: the number of units.

        Raises:
            ArtifactError: the folder cannot be written.
        """
        if limit is None or (set(range(limit)) - set(self.whole())):
            return False
        with self._writing(), self._lock("store"):
            if limit == 0:
                raise ConfigError(f"{self.path}: the text holds no document to capture; give more text")
            for path in [p for p in (self.path / SHARDS).glob("[0-9]*") if p.name.isdecimal()]:
                if int(path.name) >= limit:
                    # Out of sight first: a kill on the way must not leave half of it there.
                    shutil.rmtree(path.rename(path.with_name(f".{path.name}.{uuid4().hex}.tmp")))
            records = [read_record(self.place(number)) for number in range(limit)]
            totals = {name: sum(int(record[name]) for record in records) for name in ("rows", "tokens")}
            size = sum(map(record_bytes, records))
            write_json(self.path / COMPLETE, {"units": limit, **totals, "bytes": size})
            self._clear()
        return True

    def wants(self, max_tokens: int | None) -> None:
        """Write down how much is wanted; a store that is complete with less is open again.

        Args:
            max_tokens: tokens that count after which no further unit is wanted.

        Raises:
            ConfigError: more was wanted before: units beyond the limit would be thrown away.
        """
        complete = read_complete(self.path)
        with self._writing(), self._lock("store"):
            asked = self._limit_asked()
            if asked is not None and asked[0] == max_tokens:
                return
            if complete is not None and asked == (None,) and complete["tokens"] <= (max_tokens or 0):
                return  # all of the text is there, and it is no more than that
            if asked is not None and max_tokens is not None and (asked[0] is None or max_tokens < asked[0]):
                was = "all of the text" if asked[0] is None else f"{asked[0]:,} tokens"
                raise ConfigError(
                    f"the store in {self.path} was begun for {was}, more than {max_tokens:,}; capture fewer into "
                    "another folder"
                )
            write_json(self.path / _LIMIT, {"max_tokens": max_tokens})
            (self.path / COMPLETE).unlink(missing_ok=True)

    def _limit_asked(self) -> tuple[int | None] | None:
        """The most tokens that were ever asked for; None when the store has only been begun."""
        try:
            return (json.loads((self.path / _LIMIT).read_text(encoding="utf-8"))["max_tokens"],)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as err:
            raise ArtifactError(f"{self.path / _LIMIT} is damaged ({err}); remove it and resume") from err

    def _clear(self) -> None:
        """Remove drafts and locks of writers that are gone; a unit beyond the end may still have one at it."""
        names = {p.name.split(".")[1] for p in (self.path / SHARDS).glob(".*.tmp")}
        for name in names | {p.name for p in (self.path / _LOCKS).iterdir()}:
            if name.isdecimal() and (claim := self._claim(int(name))) is not None:
                clear_drafts(self.path / SHARDS, [name], inside=False)
                claim.release()
        clear_drafts(self.path, [MANIFEST, COMPLETE, _END, _LIMIT], inside=False)

    def _tokens(self, number: int) -> int:
        if number not in self._known:
            self._known[number] = int(read_record(self.place(number))["tokens"])
        return self._known[number]

    def _end(self) -> int | None:
        try:
            return int(json.loads((self.path / _END).read_text(encoding="utf-8"))["units"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as err:
            raise ArtifactError(f"{self.path / _END} is damaged ({err}); remove it and resume") from err

    def _claim(self, number: int) -> Claim | None:
        path = self.path / _LOCKS / shard_name(number)
        with self._writing():
            held = _locked(path, wait=False)
        return None if held is None else Claim(number, path, held)

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        held = _locked(self.path / _LOCKS / name, wait=True)
        try:
            yield
        finally:
            if held is not None:
                held.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as err:
            fault = err.strerror or str(err)
            raise ArtifactError(
                f"{self.path} cannot be written: {fault}; make room, or choose another folder. Whole shards stay, and "
                "`interp capture --resume` goes on"
            ) from err


def _locked(path: Path, *, wait: bool) -> BinaryIO | None:
    """Open and lock a file; None when another holds it and `wait` is off."""
    if sys.platform == "win32":
        raise ArtifactError("stores are written on systems with flock (Linux, macOS); they can be read anywhere")
    import fcntl

    while True:
        held = path.open("ab")
        try:
            fcntl.flock(held, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as err:
            held.close()
            if err.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return None
            raise ArtifactError(
                f"{path} cannot be locked ({err.strerror}); mount the disk with locks (flock), or write elsewhere"
            ) from err
        # Its holder may have removed it between the two: a lock on a name that is gone keeps nobody out.
        try:
            if os.path.samestat(os.fstat(held.fileno()), path.stat()):
                return held
        except FileNotFoundError:
            pass
        held.close()
