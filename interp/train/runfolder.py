"""The folder of one run: its configuration, where it came from, its metrics, what was trained, its evaluation.

    config.yaml           the settings
    provenance.json       model, data, settings, versions, and how the run ended
    metrics.jsonl         losses and counts by step: the same bytes for the same run, stopped and resumed or not
    speed.jsonl           tokens per second by step
    evaluation.json       figures on held-out text
    sweep.csv, sweep.html of a sweep, whose dictionaries have such folders of their own in it: all figures
    cfg.json, sae_weights.safetensors   the dictionary
    resume/               a state to resume from, until the run is finished
    tensorboard/, wandb/, wandb.json    of trackers, where the settings ask for them

`cfg.json`, without which nothing loads, is written last by the dictionary itself, and is the first to go when an old
run is replaced or resumed: so a folder that was not finished does not look whole.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from interp.core.disk import atomic_write, clear_drafts, write_json
from interp.core.errors import ArtifactError
from interp.core.settings import read_yaml
from interp.dictionaries.folder import CFG, WEIGHTS
from interp.train.checkpoint import STEP_NAMES, SavedState, StateFolder

__all__ = [
    "METRICS",
    "SPEED",
    "SWEEP",
    "RunFolder",
    "append_line",
    "cut_back",
    "forget_after",
    "refuse_held",
]

METRICS, SPEED = "metrics.jsonl", "speed.jsonl"
SWEEP = ("sweep.csv", "sweep.html")
_CONFIG, _PROVENANCE, _EVALUATION = "config.yaml", "provenance.json", "evaluation.json"
# Wall time is no part of what a run must leave alike.
_TIMED = "tokens_per_s"


class RunFolder:
    """Writes the folder of one run; see the module's text for what lies where.

    Args:
        path: the folder. Nothing is touched before `begin` or `go_on`.
    """

    FILES = (CFG, WEIGHTS, _EVALUATION, METRICS, SPEED, _PROVENANCE, _CONFIG, *SWEEP)
    HELD = ("step", "tokens", "members", "stream", "settings", "versions", "config")

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._states = StateFolder(self.path, held=self.HELD, anew="leave --resume out to begin a run")

    def check(self, *, force: bool = False) -> None:
        """Refuse a path that a new run may not be written to; touches nothing.

        Args:
            force: allow an earlier run in it.

        Raises:
            ArtifactError: the folder holds something and `force` is off, or the path is a file.
        """
        way_out = "--force to replace the run"
        if self._states.steps() and not self._finished():
            way_out = f"--resume to go on with the run, or {way_out}"
        refuse_held(self.path, way_out, allowed=force or self._states.only_begun())

    def begin(self, state: SavedState, config: str, *, force: bool = False) -> None:
        """Make the folder, and first of all in it a state to resume from.

        Args:
            state: the one before the first step.
            config: the settings, as YAML.
            force: replace the files of an earlier run; other files are left alone.

        Raises:
            ArtifactError: as for `check`, or the folder cannot be written.
        """
        self.check(force=force)
        self._clear()
        self._states.save(state)
        self.config(config)

    def begin_in(self, config: str) -> None:
        """Make the folder of a dictionary that is trained with others, whose folder holds the states of all.

        Args:
            config: its settings, as YAML.

        Raises:
            ArtifactError: the folder cannot be written.
        """
        self._clear()
        self.config(config)

    def _clear(self) -> None:
        with self.writing():
            self.path.mkdir(parents=True, exist_ok=True)
            for name in [name for name in self.FILES if (self.path / name).exists()]:
                (self.path / name).unlink()
            self._states.clear()
            clear_drafts(self.path, self.FILES, patterns=[STEP_NAMES])

    def check_resume(self) -> int:
        """Return the step after which the run would go on.

        Raises:
            ArtifactError: there is no state to resume from, or the run is finished.
        """
        if self._finished():
            # A kill may have come between the last record and this.
            self._states.clear()
            raise ArtifactError(f"the run in {self.path} is finished; there is nothing to resume")
        return self._states.check()

    def saved(self) -> SavedState:
        """Read the state to resume from.

        Raises:
            ArtifactError: as for `check_resume`, or it is damaged.
        """
        self.check_resume()
        return self._states.latest()

    def cut_back(self, step: int, metrics_bytes: int, config: str) -> None:
        """Take metrics and dictionary back to how they were at a state: what came later goes, to be made again.

        Args:
            step: of the state.
            metrics_bytes: the size of the metrics then.
            config: the settings, as YAML; those that do not decide the outcome may have changed.

        Raises:
            ArtifactError: the metrics are shorter than they were, or the folder cannot be written.
        """
        with self.writing():
            self.path.mkdir(parents=True, exist_ok=True)  # it may have been killed before it was made
        cut_back(self.path / METRICS, metrics_bytes)
        with self.writing():
            for name in (CFG, WEIGHTS, _EVALUATION, *SWEEP):
                (self.path / name).unlink(missing_ok=True)
            forget_after(self.path / SPEED, step)
            clear_drafts(self.path, self.FILES, patterns=[STEP_NAMES])
        self.config(config)

    def go_on(self, step: int, config: str) -> None:
        """Keep the state of a step alone, and write the settings.

        Raises:
            ArtifactError: the folder cannot be written.
        """
        with self.writing():
            self._states.keep(step)
        self.config(config)

    def save_state(self, state: SavedState) -> None:
        """Save what the run goes on from; the state before it is removed afterwards.

        Raises:
            ArtifactError: it cannot be written; says which state is still there.
        """
        self._states.save(state)

    def write(self, name: str, text: str) -> None:
        """Write a further file of `FILES`."""
        with self.writing():
            atomic_write(self.path / name, text)

    def finish(self, record: Mapping[str, Any]) -> None:
        """Write the last record of what the run is, then remove the state to resume from."""
        self.provenance({**record, "status": "finished"})
        self._states.clear()

    def holds_alone(self, name: str) -> bool:
        """Whether the folder holds nothing but something of a name."""
        return self.path.is_dir() and [path.name for path in self.path.iterdir()] == [name]

    @staticmethod
    def settings(path: str | Path) -> dict[str, Any]:
        """Read the settings of the run in a folder, to resume it.

        Raises:
            ArtifactError: there is no run.
            ConfigError: its settings are not YAML.
        """
        run = RunFolder(path)
        if (run.path / _CONFIG).is_file():
            return read_yaml(run.path / _CONFIG)
        # It was killed between the two.
        return dict(run.saved().record["config"])

    def config(self, text: str) -> None:
        """Write the settings."""
        with self.writing():
            atomic_write(self.path / _CONFIG, text)

    def provenance(self, record: Mapping[str, Any]) -> None:
        """Write, or replace, the record of what the run is and how it ended."""
        with self.writing():
            write_json(self.path / _PROVENANCE, record)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Write the figures."""
        with self.writing():
            write_json(self.path / _EVALUATION, record)

    def log(self, line: Mapping[str, int | float]) -> None:
        """Append a line of metrics; how fast it went is a line of its own file."""
        with self.writing():
            append_line(self.path / METRICS, {name: value for name, value in line.items() if name != _TIMED})
            append_line(self.path / SPEED, {name: line[name] for name in ("step", _TIMED) if name in line})

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Within the block, what cannot be written to the folder is an error that says so.

        Raises:
            ArtifactError: names the folder and the fault.
        """
        try:
            yield
        except OSError as err:
            fault = err.strerror or str(err)
            raise ArtifactError(f"{self.path} cannot be written: {fault}; make room, or choose another folder") from err

    def metrics_bytes(self) -> int:
        """The size of the metrics so far."""
        return _size(self.path / METRICS)

    def lines(self) -> list[dict[str, int | float]]:
        """The lines that were logged, with how fast it went."""
        speeds = {line["step"]: line for line in _read_lines(self.path / SPEED)}
        return [{**line, **speeds.get(line["step"], {})} for line in _read_lines(self.path / METRICS)]

    def _finished(self) -> bool:
        try:
            record = json.loads((self.path / _PROVENANCE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(record, dict) and record.get("status") == "finished"


def refuse_held(path: str | Path, way_out: str, *, allowed: bool = False) -> None:
    """Refuse a path that a run may not be written to; touches nothing.

    Args:
        path: the folder to be.
        way_out: what else than choosing another folder can be done about one that holds something.
        allowed: whether it may hold something.

    Raises:
        ArtifactError: the folder holds something, or the path is a file.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"{folder} is a file; a run is a folder: choose another path")
    held = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    if held and not allowed:
        shown = ", ".join(held[:4]) + (", …" if len(held) > 4 else "")
        raise ArtifactError(f"{folder} already holds {shown}; choose another folder, or {way_out}")


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Append one JSON object as a line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(dict(line)) + "\n")


def cut_back(path: Path, size: int) -> None:
    """Cut a file of lines back to the size that it had.

    Args:
        path: the file; one of no bytes may be missing.
        size: in bytes.

    Raises:
        ArtifactError: it is shorter than that.
    """
    if (held := _size(path)) < size:
        raise ArtifactError(f"{path} has {held} bytes, fewer than the {size} when the state was saved; restore it")
    if held > size:
        with path.open("r+b") as lines:
            lines.truncate(size)


def forget_after(path: Path, step: int) -> None:
    """Remove the lines of later steps from a file of JSON lines, and a last line that a kill cut off.

    Args:
        path: the file, which may be missing.
        step: the last one whose lines stay.
    """
    if path.exists():
        whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
        atomic_write(path, "".join(line for line in whole if json.loads(line)["step"] <= step))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _read_lines(path: Path) -> list[dict[str, int | float]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
