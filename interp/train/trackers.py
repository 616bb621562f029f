"""Metrics beside the run's folder: TensorBoard's log in it, and Weights & Biases.

`metrics.jsonl` is always written and what the rest reads. A tracker gets the same lines, and the figures on held-out
text at the end; one that fails is given up with a warning, and the training goes on.
"""

import json
import os
import shutil
import uuid
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from interp.core.disk import write_json
from interp.core.errors import ConfigError

__all__ = ["TrackerName", "Trackers", "check_trackers", "clear_trackers"]

TrackerName = Literal["tensorboard", "wandb"]

_TENSORBOARD, _WANDB = "tensorboard", "wandb.json"
_PROJECT = "interp"


class _Tracker(Protocol):
    def log(self, values: Mapping[str, int | float], step: int) -> None: ...

    def figures(self, values: Mapping[str, int | float], step: int) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """The trackers of one dictionary's run.

    Args:
        names: which.
        folder: the run's folder, which is there. TensorBoard's log goes to `tensorboard/` in it, wandb's files to
            `wandb/`, and the name that wandb knows the run by to `wandb.json`.
        settings: what the run is, for wandb.
        before: the lines of metrics that a resumed run goes on after; None for a new one. What TensorBoard has of later
            steps it passes over. wandb gets them all again and keeps the steps that it has not: for one that is killed
            loses what it has not sent. (A run that was stopped has a last line of its own, which wandb keeps.)
        group: the sweep that the run is one of, for wandb.

    Raises:
        ConfigError: one cannot begin, such as wandb where nobody has logged in.
    """

    def __init__(
        self,
        names: Sequence[TrackerName],
        folder: Path,
        *,
        settings: Mapping[str, Any],
        before: Sequence[Mapping[str, int | float]] | None = None,
        group: str | None = None,
    ) -> None:
        check_trackers(names)
        self._held: dict[str, _Tracker] = {}
        after = None if before is None else int(before[-1]["step"]) if before else 0
        for name in names:
            try:
                if name == "tensorboard":
                    self._held[name] = _TensorBoard(folder / _TENSORBOARD, after)
                else:
                    self._held[name] = _Wandb(folder, settings, before, group)
            except Exception as err:
                self.close()
                raise ConfigError(
                    f"{name} cannot begin: {_said(err)}; "
                    f"{'run wandb login, or set WANDB_MODE=offline, ' if name == 'wandb' else ''}"
                    f"or leave it out of train.track, and go on with --resume"
                ) from err

    def log(self, line: Mapping[str, int | float]) -> None:
        """Send a line of metrics, by its step."""
        self._each("log", _named(line), int(line["step"]))

    def figures(self, record: Mapping[str, Any], step: int) -> None:
        """Send the numbers among the figures on held-out text."""
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        self._each("figures", {f"evaluation/{name}": float(value) for name, value in numbers.items()}, step)

    def close(self) -> None:
        """Let what was sent arrive; nothing can be sent afterwards."""
        self._each("close")
        self._held = {}

    def _each(self, what: str, *given: Any) -> None:
        for name, tracker in list(self._held.items()):
            try:
                getattr(tracker, what)(*given)
            except Exception as err:  # noqa: BLE001 (a training of days is not to end for its log)
                del self._held[name]
                warnings.warn(
                    f"{name} failed and is not tried again in this run: {_said(err)}; metrics.jsonl holds every line",
                    stacklevel=3,
                )


class _TensorBoard:
    def __init__(self, folder: Path, after: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=None if after is None else after + 1)

    def log(self, values: Mapping[str, int | float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a kill may come before the minutes that it would else wait

    def figures(self, values: Mapping[str, int | float], step: int) -> None:
        self.log(values, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        before: Sequence[Mapping[str, int | float]] | None,
        group: str | None,
    ) -> None:
        import wandb

        path = folder / _WANDB
        known = json.loads(path.read_text(encoding="utf-8")) if before is not None and path.exists() else {}
        name = str(known.get("id", uuid.uuid4().hex[:12]))
        write_json(path, {"id": name})
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=folder.name,
            group=group,
            id=name,
            resume="allow",
            reinit="create_new",  # a sweep has several at once
            dir=str(folder),
            config=dict(settings),
            settings=wandb.Settings(console="off", silent=True),
        )
        for line in before or ():
            self.log(_named(line), int(line["step"]))

    def log(self, values: Mapping[str, int | float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def figures(self, values: Mapping[str, int | float], step: int) -> None:
        self._run.summary.update(dict(values))

    def close(self) -> None:
        self._run.finish()


def check_trackers(names: Sequence[TrackerName]) -> None:
    """Refuse trackers whose package is not installed.

    Raises:
        ConfigError: names it.
    """
    for name in names:
        if find_spec(name) is None:
            raise ConfigError(f"train.track holds {name}, which is not installed; pip install {name}, or leave it out")


def clear_trackers(folder: Path) -> None:
    """Remove what trackers know of an earlier run in a folder; what wandb has not sent yet stays in `wandb/`."""
    shutil.rmtree(folder / _TENSORBOARD, ignore_errors=True)
    (folder / _WANDB).unlink(missing_ok=True)


def _named(line: Mapping[str, int | float]) -> dict[str, int | float]:
    return {f"train/{name}": value for name, value in line.items() if name != "step"}


def _said(err: Exception) -> str:
    return " ".join(f"{type(err).__name__}: {err}".split())
