"""The stage that writes: rows come from the model's thread, and go to the disk in one of their own."""

import queue
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interp.core.errors import ArtifactError
from interp.data.codec import Codec
from interp.data.shard import ShardWriter
from interp.data.storefolder import Claim

__all__ = ["Writer"]

_SHORT = 0.1  # seconds between two looks at whether the other side is still there


class Writer:
    """Writes shards, one after the other, in a thread of its own; what goes wrong there is raised at the next call.

    From a GPU, rows are copied on a stream of their own to pinned memory, which the thread waits for: the model's
    stream never does.

    Args:
        depth: blocks of rows that may wait.

    Attributes:
        rows, tokens: written so far, in whole shards and the one under way.
        seconds: for which the disk, checksums and encoding have kept the thread busy.
    """

    def __init__(self, depth: int) -> None:
        self.rows = self.tokens = 0
        self.seconds = 0.0
        self._work: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
        self._fault: BaseException | None = None
        self._ended = threading.Event()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def begin(self, place: Path, codecs: Mapping[tuple[str, str], Codec], claim: Claim) -> None:
        """Begin a shard; its claim is released when it is whole."""
        self._put("begin", (place, codecs, claim))

    def append(self, columns: Mapping[str, Tensor], values: Mapping[tuple[str, str], Tensor]) -> None:
        """Add rows to it."""
        self._put("rows", (columns, *self._to_host(values)))

    def end(self, record: Mapping[str, Any]) -> None:
        """Put it in its place."""
        self._put("end", record)

    def finish(self) -> None:
        """Wait until all has been written.

        Raises:
            ArtifactError: it could not be.
        """
        self._put("stop", None)
        self._thread.join()
        self._check()

    def drop(self) -> None:
        """End the thread; a shard that is not whole is dropped."""
        self._ended.set()
        self._thread.join()

    def _put(self, what: str, item: Any) -> None:
        while True:
            self._check()
            try:
                self._work.put((what, item), timeout=_SHORT)
            except queue.Full:
                continue
            return

    def _check(self) -> None:
        if isinstance(self._fault, OSError):
            fault = self._fault.strerror or str(self._fault)
            raise ArtifactError(
                f"a shard cannot be written: {fault}; make room, or choose another disk. Whole shards stay, and "
                "`interp capture --resume` goes on"
            ) from self._fault
        if self._fault is not None:
            raise self._fault

    def _to_host(
        self, values: Mapping[tuple[str, str], Tensor]
    ) -> tuple[dict[tuple[str, str], Tensor], list[torch.cuda.Event]]:
        found, events = {}, []
        for key, value in values.items():
            if value.device.type != "cuda":
                found[key] = value.cpu()
                continue
            side = self._streams.setdefault(value.device, torch.cuda.Stream(value.device))
            side.wait_stream(torch.cuda.current_stream(value.device))
            found[key] = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            with torch.cuda.stream(side):
                found[key].copy_(value, non_blocking=True)
                value.record_stream(side)
                events.append(side.record_event())
        return found, events

    def _run(self) -> None:
        shard: ShardWriter | None = None
        claim: Claim | None = None
        try:
            while not self._ended.is_set():
                try:
                    what, item = self._work.get(timeout=_SHORT)
                except queue.Empty:
                    continue
                started = time.perf_counter()
                if what == "stop":
                    return
                if what == "begin":
                    place, codecs, claim = item
                    shard = ShardWriter(place, codecs)
                elif what == "rows" and shard is not None:
                    columns, values, events = item
                    for event in events:
                        event.synchronize()
                    started = time.perf_counter()
                    shard.append(columns, values)
                    self.rows += len(columns["ids"])
                    self.tokens += int((columns["special"] == 0).sum())
                elif what == "end" and shard is not None and claim is not None:
                    shard.close(item)
                    claim.release()
                    shard = claim = None
                self.seconds += time.perf_counter() - started
        except BaseException as err:  # noqa: BLE001 - it is raised where rows come from
            self._fault = err
        finally:
            if shard is not None:
                shard.drop()
            if claim is not None:
                claim.release()
