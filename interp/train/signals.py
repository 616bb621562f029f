"""Stopping cleanly: Ctrl-C and SIGTERM set a flag that the work looks at."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

__all__ = ["StopSignals"]


class StopSignals:
    """Within the block, the first SIGINT or SIGTERM sets a flag; a second one interrupts at once.

    Calling it says whether to stop. Outside the main thread, where Python delivers no signals, it never says so.

    Args:
        tell: called with the signal's name when the first one arrives.
    """

    def __init__(self, tell: Callable[[str], None] | None = None) -> None:
        self.name: str | None = None
        self._tell = tell
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        return self.name is not None

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._arrived)
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
        if self._tell is not None:
            self._tell(self.name)
