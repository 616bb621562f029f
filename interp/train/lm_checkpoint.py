"""The folder of a language model's training: metrics, checkpoints, and the state to resume from.

    provenance.json             what is trained, how, on what, and how it ended
    metrics.jsonl               losses and measures by step: the same bytes for the same run
    speed.jsonl                 wall time and tokens per second by step
    checkpoints/step-00000100/  the model after 100 steps, as Hugging Face saves it
    final/                      the model at the end
    resume/step-00000100/       all that the rest of the training depends on

Every folder is written beside its place and renamed, so that one that is there is whole; a state to resume from is
removed only when a later one is there.
"""

import json
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from interp.core.errors import ArtifactError
from interp.core.result import atomic_write
from interp.train.runfolder import METRICS, append_line, refuse_held, write_json

__all__ = ["LMFolder", "SavedState", "load_checkpoints", "step_folders"]

SPEED, PROVENANCE, CHECKPOINTS, FINAL, RESUME = "speed.jsonl", "provenance.json", "checkpoints", "final", "resume"
_STATE, _TENSORS = "state.json", "state.safetensors"
_STEP = re.compile(r"step-(\d{8,})")
_DRAFT = re.compile(r"\.(step-\d+|final|provenance\.json|speed\.jsonl)\..*\.tmp")


@dataclass(frozen=True)
class SavedState:
    """What a training goes on from.

    Attributes:
        record: plain JSON: the step, the state of the data, what the run is.
        tensors: weights, moments and random states by name.
    """

    record: dict[str, Any]
    tensors: dict[str, Tensor]


class LMFolder:
    """Writes the folder of one training; see the module's text for what lies where.

    Args:
        path: the folder. Nothing is touched before `begin` or `go_on`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def begin(self, state: SavedState | None) -> None:
        """Make the folder, and first of all in it a state to resume from.

        Args:
            state: the state before the first step; None to have none.

        Raises:
            ArtifactError: the path is taken, or cannot be written.
        """
        self.check()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._clear_drafts()
            if state is not None:
                self.save_state(state)
        except OSError as err:
            raise ArtifactError(f"{self.path} cannot be written: {err.strerror}; choose another folder") from err

    def check(self) -> None:
        """Refuse a path that a new training may not be written to; touches nothing.

        Raises:
            ArtifactError: the folder holds something, or the path is a file.
        """
        # A run that was killed before its first state was there left nothing else.
        drafts = self.path.is_dir() and {p.name for p in self.path.iterdir()} == {RESUME}
        nothing = drafts and not step_folders(self.path / RESUME)
        refuse_held(self.path, "give resume=True to go on with the training in it", allowed=nothing)

    def saved(self) -> SavedState:
        """Read the latest state to resume from.

        Raises:
            ArtifactError: there is none, or it is damaged.
        """
        states = step_folders(self.path / RESUME)
        if not states:
            missing = "holds no state to resume from" if self.path.is_dir() else "is no folder, so nothing can resume"
            raise ArtifactError(f"{self.path} {missing}; leave resume out to begin a training in an empty folder")
        folder = states[-1][1]
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            record = json.loads((folder / _STATE).read_text(encoding="utf-8"))
            return SavedState(record, load_file(folder / _TENSORS))
        except (OSError, ValueError, SafetensorError) as err:
            raise ArtifactError(f"{folder} cannot be read ({err}); begin the training anew in another folder") from err

    def go_on(self, state: SavedState) -> None:
        """Take the folder back to how it was at a state: later lines and checkpoints go, to be made again.

        Args:
            state: what the training goes on from.

        Raises:
            ArtifactError: the metrics are shorter than they were.
        """
        step, settings = state.record["step"], state.record["settings"]
        metrics, size = self.path / METRICS, state.record["metrics_bytes"]
        if (held := self.metrics_bytes()) < size:
            raise ArtifactError(
                f"{metrics} has {held} bytes, fewer than the {size} when the state was saved; restore it"
            )
        if held > size:
            with metrics.open("r+b") as lines:
                lines.truncate(size)
        speed = self.path / SPEED
        if speed.exists():
            told = [line for line in speed.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
            atomic_write(speed, "".join(line for line in told if json.loads(line)["step"] <= step))
        gone = [path for at, path in step_folders(self.path / CHECKPOINTS) if at > step]
        gone += [path for at, path in step_folders(self.path / RESUME) if at != step]
        if step < settings["options"]["steps"]:
            gone.append(self.path / FINAL)
        for folder in gone:
            shutil.rmtree(folder, ignore_errors=True)
        self._clear_drafts()

    def save_state(self, state: SavedState) -> None:
        """Save what the training goes on from; the state before it is removed afterwards."""
        before = dict(step_folders(self.path / RESUME))
        if state.record["step"] not in before:
            _write_state(self.path / RESUME, state)
            for folder in before.values():
                shutil.rmtree(folder)

    def save_model(self, hm: Any, step: int | None = None) -> Path:
        """Save the model and its tokenizer as a Hugging Face folder.

        Args:
            hm: the model's `HookManager`.
            step: steps taken, for a checkpoint; None is the end.

        Returns:
            The folder.
        """
        place = self.path / FINAL if step is None else self.path / CHECKPOINTS / _name(step)
        place.parent.mkdir(exist_ok=True)

        def write(draft: Path) -> None:
            with _no_other_bars():
                hm.model.save_pretrained(draft)
            if hm.tokenizer is not None:
                hm.tokenizer.save_pretrained(draft)

        return _appear(place, write)

    def provenance(self, record: Mapping[str, Any]) -> None:
        """Write, or replace, the record of what the run is and how it ended."""
        write_json(self.path / PROVENANCE, record)

    def log(self, line: Mapping[str, Any], name: str = METRICS) -> None:
        """Append a line to `metrics.jsonl`, or to another file."""
        append_line(self.path / name, line)

    def _clear_drafts(self) -> None:
        """Remove what a run that was killed had begun to write."""
        for path in [path for path in self.path.rglob(".*.tmp") if _DRAFT.fullmatch(path.name)]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def lines(self) -> list[dict[str, Any]]:
        """Read the metrics so far."""
        file = self.path / METRICS
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []

    def metrics_bytes(self) -> int:
        """The size of the metrics so far."""
        file = self.path / METRICS
        return file.stat().st_size if file.exists() else 0


def load_checkpoints(folder: str | Path) -> list[tuple[int, Path]]:
    """Return the checkpoints of a training by step, to walk along it with `HookManager.load(path)`.

    Args:
        folder: the `out` folder of `train_lm`.

    Returns:
        (steps taken, folder) in order; the last is the end of a training that was finished.

    Raises:
        ArtifactError: there is no checkpoint.
    """
    found = step_folders(Path(folder) / CHECKPOINTS)
    final, record = Path(folder) / FINAL, Path(folder) / PROVENANCE
    if final.is_dir() and record.is_file():
        steps = int(json.loads(record.read_text(encoding="utf-8"))["settings"]["options"]["steps"])
        if steps not in [step for step, _ in found]:
            found.append((steps, final))
    if not found:
        raise ArtifactError(
            f"{folder} holds no checkpoints; give the out folder of train_lm, with checkpoint_every set"
        )
    return found


def step_folders(folder: Path) -> list[tuple[int, Path]]:
    """Return the whole `step-…` folders in a folder with their steps, in order; none if it is not there."""
    held = folder.iterdir() if folder.is_dir() else ()
    return sorted((int(match[1]), path) for path in held if (match := _STEP.fullmatch(path.name)))


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _write_state(folder: Path, state: SavedState) -> Path:
    from safetensors.torch import save_file

    def write(draft: Path) -> None:
        (draft / _STATE).write_text(json.dumps(state.record, indent=1), encoding="utf-8")
        save_file(state.tensors, draft / _TENSORS)

    folder.mkdir(exist_ok=True)
    return _appear(folder / _name(state.record["step"]), write)


@contextmanager
def _no_other_bars() -> Iterator[None]:
    """Keep transformers' bar of each file written from tearing up that of the training."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _appear(place: Path, write: Callable[[Path], Any]) -> Path:
    """Write a folder beside its place and rename it, so that it is there whole or not at all."""
    draft = place.with_name(f".{place.name}.{uuid.uuid4().hex}.tmp")
    draft.mkdir()
    try:
        write(draft)
        if place.is_dir() and any(place.iterdir()):
            shutil.rmtree(place)
        draft.rename(place)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return place
