"""Stopping cleanly, and saving on the way: signals set flags that the work looks at."""

import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

__all__ = ["StopSignals"]


class StopSignals:
    """Within the block, the first SIGINT or SIGTERM sets a flag; a second one interrupts at once.

    Calling it says whether to stop. Outside the main thread, where Python delivers no signals, it never says so.

    Args:
        tell: called with the signal's name when the first one arrives.
        save: called with the name of each SIGUSR1 that arrives; `save_wanted` then says so once. Without it that signal
            does what it did before.
    """

    def __init__(self, tell: Callable[[str], None] | None = None, *, save: Callable[[str], None] | None = None) -> None:
        self.name: str | None = None
        self._tell, self._save = tell, save
        self._wanted = False
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        return self.name is not None

    def save_wanted(self) -> bool:
        """Whether SIGUSR1 has arrived since this was last asked."""
        # Not in one line: a signal that arrives between reading and clearing would be lost.
        if not self._wanted:
            return False
        self._wanted = False
        return True

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            handlers: dict[int, Any] = dict.fromkeys((signal.SIGINT, signal.SIGTERM), self._arrived)
            # Windows has no such signal.
            if self._save is not None and hasattr(signal, "SIGUSR1"):
                handlers[signal.SIGUSR1] = self._asked
            for number, handler in handlers.items():
                self._before[number] = signal.signal(number, handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
        _say(self._tell, self.name)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        self._wanted = True
        _say(self._save, signal.Signals(number).name)


def _say(tell: Callable[[str], None] | None, name: str) -> None:
    # A signal that arrives while a line is being written cannot write another: better silent than an end to the work.
    if tell is not None:
        with suppress(RuntimeError):
            tell(name)
