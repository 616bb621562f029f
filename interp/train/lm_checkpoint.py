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
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from interp.core.disk import appear, clear_drafts, write_json
from interp.core.errors import ArtifactError
from interp.train.checkpoint import STEP_NAMES, SavedState, StateFolder, step_folders, step_name
from interp.train.runfolder import METRICS, SPEED, append_line, cut_back, forget_after, refuse_held

__all__ = ["LMFolder", "SavedState", "load_checkpoints", "step_folders"]

PROVENANCE, CHECKPOINTS, FINAL = "provenance.json", "checkpoints", "final"
_HELD = {"step", "tokens", "since", "data", "metrics_bytes", "settings"}


class LMFolder:
    """Writes the folder of one training; see the module's text for what lies where.

    Args:
        path: the folder. Nothing is touched before `begin` or `go_on`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        anew = "leave resume out to begin a training in an empty folder"
        self._states = StateFolder(self.path, held=_HELD, anew=anew)

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
        nothing = self._states.only_begun()
        refuse_held(self.path, "give resume=True to go on with the training in it", allowed=nothing)

    def saved(self) -> SavedState:
        """Read the latest state to resume from.

        Raises:
            ArtifactError: there is none, or it is damaged.
        """
        return self._states.latest()

    def go_on(self, state: SavedState) -> None:
        """Take the folder back to how it was at a state: later lines and checkpoints go, to be made again.

        Args:
            state: what the training goes on from.

        Raises:
            ArtifactError: the metrics are shorter than they were.
        """
        step, settings = state.record["step"], state.record["settings"]
        cut_back(self.path / METRICS, state.record["metrics_bytes"])
        forget_after(self.path / SPEED, step)
        gone = [path for at, path in step_folders(self.path / CHECKPOINTS) if at > step]
        self._states.keep(step)
        if step < settings["options"]["steps"]:
            gone.append(self.path / FINAL)
        for folder in gone:
            shutil.rmtree(folder, ignore_errors=True)
        self._clear_drafts()

    def save_state(self, state: SavedState) -> None:
        """Save what the training goes on from; the state before it is removed afterwards."""
        self._states.save(state)

    def save_model(self, hm: Any, step: int | None = None) -> Path:
        """Save the model and its tokenizer as a Hugging Face folder.

        Args:
            hm: the model's `HookManager`.
            step: steps taken, for a checkpoint; None is the end.

        Returns:
            The folder.
        """
        place = self.path / FINAL if step is None else self.path / CHECKPOINTS / step_name(step)
        place.parent.mkdir(exist_ok=True)

        def write(draft: Path) -> None:
            with _no_other_bars():
                hm.model.save_pretrained(draft)
            if hm.tokenizer is not None:
                hm.tokenizer.save_pretrained(draft)

        return appear(place, write)

    def provenance(self, record: Mapping[str, Any]) -> None:
        """Write, or replace, the record of what the run is and how it ended."""
        write_json(self.path / PROVENANCE, record)

    def log(self, line: Mapping[str, Any], name: str = METRICS) -> None:
        """Append a line to `metrics.jsonl`, or to another file."""
        append_line(self.path / name, line)

    def _clear_drafts(self) -> None:
        clear_drafts(self.path, (FINAL, PROVENANCE, SPEED), patterns=[STEP_NAMES])

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
