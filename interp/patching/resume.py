"""The file from which a sweep that was stopped goes on: what is done, and a digest of what it is a part of."""

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.disk import atomic_write
from interp.core.errors import ArtifactError

__all__ = ["Progress"]

_KIND = "interp.patching sweep"


class Progress:
    """The values of a sweep while it runs, kept in a file if one is named.

    Args:
        shape: metrics, cells, batch.
        identity: what the sweep is; a file of another one is refused.
        path: the file, or None for memory alone.
        save_every: seconds between two writes.

    Attributes:
        values: NaN where a cell is not done.
        done: which cells are.

    Raises:
        ArtifactError: the file is of another sweep, or damaged.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        identity: dict[str, Any],
        path: str | os.PathLike[str] | None = None,
        save_every: float = 10.0,
    ) -> None:
        self.values: Float[Tensor, "metric cell batch"] = torch.full(shape, torch.nan)
        self.done: Bool[Tensor, " cell"] = torch.zeros(shape[1], dtype=torch.bool)
        self.identity, self.save_every = identity, save_every
        self.path = None if path is None else Path(path)
        self._saved = time.monotonic()
        if self.path is not None and self.path.exists():
            self._load(self.path)

    def add(self, cells: Int[Tensor, " n"], values: Float[Tensor, "metric n batch"]) -> None:
        """Keep finished cells; write the file if it is time."""
        self.values[:, cells] = values
        self.done[cells] = True
        if self.path is not None and time.monotonic() - self._saved >= self.save_every:
            self.save()

    def save(self) -> None:
        """Write the file, in one step."""
        if self.path is None:
            return
        from safetensors.torch import save

        header = {"kind": _KIND, "identity": json.dumps(self.identity, sort_keys=True)}
        atomic_write(self.path, save({"values": self.values, "done": self.done}, metadata=header))
        self._saved = time.monotonic()

    def _load(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, OSError) as err:
            raise ArtifactError(f"resume={path}: cannot be read ({err}); remove it to begin again") from err
        if header.get("kind") != _KIND or {"values", "done"} - held.keys():
            raise ArtifactError(f"resume={path} is no file of a sweep; name another file")
        theirs = json.loads(header["identity"])
        if theirs != self.identity or held["values"].shape != self.values.shape:
            odd = sorted(k for k in theirs.keys() | self.identity if theirs.get(k) != self.identity.get(k))
            raise ArtifactError(
                f"resume={path} is of another sweep (it differs in {', '.join(odd) or 'its shape'}); name another "
                "file, or remove it to begin again"
            )
        self.values, self.done = held["values"], held["done"].bool()
