"""Doing the next piece of work while the last one is used."""

import atexit
import queue
import threading
import weakref
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Generic, TypeVar

__all__ = ["Ahead"]

_T = TypeVar("_T")
_SHORT = 0.1  # seconds between two looks at whether anybody still waits


class Ahead(Iterator[_T], Generic[_T]):
    """The items of an iterator in their order, made in a thread of their own, at most `depth` of them ahead.

    What the iterator raises is raised here when its turn comes. `close` ends the thread; so does letting go of it.

    Args:
        items: the iterator; from here on it is the thread's alone.
        depth: items that may wait.
    """

    def __init__(self, items: Iterator[_T], depth: int) -> None:
        self._ready: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=_work, args=(items, self._ready, self._ended), daemon=True)
        self._thread.start()
        _OPEN.add(self)

    # At the end of the interpreter a stream that is still open is closed after its modules have been emptied.
    _empty = queue.Empty

    def __next__(self) -> _T:
        going, item = self._waited()
        if going:
            made: _T = item
            return made
        self.close()
        if isinstance(item, BaseException):
            raise item
        raise StopIteration

    def _waited(self) -> tuple[bool, Any]:
        while not self._ended.is_set():
            try:
                return self._ready.get(timeout=_SHORT)
            except self._empty:
                continue
        return False, None

    def close(self) -> None:
        """End the thread and wait for it; items that waited are dropped."""
        self._ended.set()
        # Room for what it may be waiting to put down.
        with suppress(self._empty):
            while True:
                self._ready.get_nowait()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def __del__(self) -> None:
        self._ended.set()


# A thread that is at work when the interpreter ends may bring the process down.
_OPEN: "weakref.WeakSet[Ahead[Any]]" = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    for ahead in list(_OPEN):
        ahead.close()


_Queue = queue.Queue[tuple[bool, Any]]


def _work(items: Iterator[Any], ready: _Queue, ended: threading.Event) -> None:
    try:
        for item in items:
            if not _put(ready, (True, item), ended):
                return
        _put(ready, (False, None), ended)
    except BaseException as err:  # noqa: BLE001 - it is raised where the items are taken
        _put(ready, (False, err), ended)
    finally:
        close = getattr(items, "close", None)
        if close is not None:
            close()


def _put(ready: _Queue, item: tuple[bool, Any], ended: threading.Event) -> bool:
    """Put an item in when there is room; False when nobody wants it any more."""
    while not ended.is_set():
        try:
            ready.put(item, timeout=_SHORT)
        except queue.Full:
            continue
        return True
    return False
