"""A process that dies between two changes of the file system, without a process."""

import os
from collections.abc import Callable
from typing import Any

import pytest


class Killed(BaseException):
    """Stands for the end of the process."""


class Death:
    """From its `last`-th change of a folder on, the file system does nothing any more, as for a killed process."""

    CALLS = ("mkdir", "rename", "replace", "rmdir", "unlink", "remove", "chmod", "utime")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, last: int) -> None:
        self.calls, self.last = 0, last
        for name in self.CALLS:
            monkeypatch.setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls >= self.last:
                raise Killed
            return call(*args, **kwargs)

        return counted
