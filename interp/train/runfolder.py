"""The folder of one run: its configuration, where it came from, its metrics, what was trained, its evaluation."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from interp.core.errors import ArtifactError
from interp.core.result import atomic_write
from interp.dictionaries.base import CFG, WEIGHTS

__all__ = ["METRICS", "RunFolder", "append_line", "refuse_held", "write_json"]

METRICS = "metrics.jsonl"


class RunFolder:
    """Writes `config.yaml`, `provenance.json`, `metrics.jsonl`, `evaluation.json`; the dictionary's files lie beside.

    `cfg.json`, without which nothing loads, is written last by the dictionary itself, and is the first to go when an
    old run is replaced: so a folder that was not finished does not look whole.

    Args:
        path: the folder.
        force: replace the files of an earlier run; other files are left alone.

    Raises:
        ArtifactError: the folder holds something and `force` is off, or the path is a file.
    """

    FILES = (CFG, WEIGHTS, "evaluation.json", METRICS, "provenance.json", "config.yaml")

    def __init__(self, path: str | Path, *, force: bool = False) -> None:
        self.path = Path(path)
        self.check(self.path, force=force)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for name in self.FILES:
                (self.path / name).unlink(missing_ok=True)
        except OSError as err:
            raise ArtifactError(f"{self.path} cannot be written: {err.strerror}; choose another folder") from err

    @staticmethod
    def check(path: str | Path, *, force: bool) -> None:
        """Refuse a path that a run may not be written to; touches nothing.

        Raises:
            ArtifactError: as for the class.
        """
        refuse_held(path, "--force to replace the run", allowed=force)

    def config(self, text: str) -> None:
        """Write the resolved configuration."""
        atomic_write(self.path / "config.yaml", text)

    def provenance(self, record: Mapping[str, Any]) -> None:
        """Write, or replace, the record of what the run is and how it ended."""
        write_json(self.path / "provenance.json", record)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Write the figures."""
        write_json(self.path / "evaluation.json", record)

    def log(self, line: Mapping[str, int | float]) -> None:
        """Append a line of metrics."""
        append_line(self.path / METRICS, line)


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


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write, or replace, a file that holds one JSON object."""
    atomic_write(path, json.dumps(dict(record), indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Append one JSON object as a line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(dict(line)) + "\n")
