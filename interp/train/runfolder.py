"""The folder of one run: its configuration, where it came from, its metrics, the dictionary, its evaluation."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from interp.core.errors import ArtifactError
from interp.core.result import atomic_write
from interp.dictionaries.base import CFG, WEIGHTS

__all__ = ["RunFolder"]


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

    FILES = (CFG, WEIGHTS, "evaluation.json", "metrics.jsonl", "provenance.json", "config.yaml")

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
        folder = Path(path)
        if folder.exists() and not folder.is_dir():
            raise ArtifactError(f"{folder} is a file; a run is a folder: choose another path")
        held = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        if held and not force:
            shown = ", ".join(held[:4]) + (", …" if len(held) > 4 else "")
            raise ArtifactError(f"{folder} already holds {shown}; choose another folder, or --force to replace the run")

    def config(self, text: str) -> None:
        """Write the resolved configuration."""
        atomic_write(self.path / "config.yaml", text)

    def provenance(self, record: Mapping[str, Any]) -> None:
        """Write, or replace, the record of what the run is and how it ended."""
        atomic_write(self.path / "provenance.json", _json(record))

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Write the figures."""
        atomic_write(self.path / "evaluation.json", _json(record))

    def log(self, line: Mapping[str, int | float]) -> None:
        """Append a line of metrics."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(line)) + "\n")


def _json(record: Mapping[str, Any]) -> str:
    return json.dumps(dict(record), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
