"""A direction on disk: one safetensors file, the vectors as tensors and everything else as JSON in its header."""

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from interp.core.disk import atomic_write
from interp.core.dose import SiteScale
from interp.core.errors import ArtifactError, InterpError
from interp.core.result import Provenance

__all__ = ["FORMAT", "read_direction", "write_direction"]

FORMAT = 1
_KEY = "interp.direction"
_T = TypeVar("_T")
# What the JSON of a damaged or hostile file makes of the code that reads it.
_WRONG = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, InterpError)


def write_direction(
    path: Path, vectors: Mapping[str, Tensor], record: Mapping[str, Any], *, overwrite: bool = False
) -> Path:
    """Write a direction; the file appears complete or not at all.

    Args:
        path: the file.
        vectors: a tensor per site.
        record: the other fields of a `Direction`.
        overwrite: replace a file that is there.

    Raises:
        ArtifactError: a file or a folder is there, or the file cannot be written.
    """
    from safetensors.torch import save

    if path.is_dir():
        raise ArtifactError(
            f"{path} is a folder; a direction is one file: choose a path such as {path}/name.safetensors"
        )
    if path.exists() and not overwrite:
        raise ArtifactError(f"{path} is there already; pass overwrite=True to replace it, or choose another path")
    body = {
        **record,
        "format": FORMAT,
        "model": asdict(record["model"]),
        "scale": {site: [_plain(v) for v in scale] for site, scale in record["scale"].items()},
        "stats": {site: {k: _plain(v) for k, v in held.items()} for site, held in record["stats"].items()},
        "notes": list(record["notes"]),
        "sites": list(vectors),
    }
    text = json.dumps(body, ensure_ascii=False, allow_nan=False)
    data = save({s: v.contiguous() for s, v in vectors.items()}, {_KEY: text})
    try:
        return atomic_write(path, data)
    except OSError as err:
        raise ArtifactError(f"{path} cannot be written: {err.strerror}; make room, or choose another path") from err


def read_direction(path: str | os.PathLike[str], make: Callable[[dict[str, Any]], _T]) -> _T:
    """Read what `write_direction` wrote.

    Args:
        path: the file.
        make: what the fields of a `Direction` are given to.

    Raises:
        ArtifactError: no such file, a damaged one, or one of another kind or format.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            record = json.loads((file.metadata() or {}).get(_KEY, "null"))
            if not isinstance(record, dict) or record.get("format") != FORMAT:
                raise ArtifactError(f"{path} holds no direction of format {FORMAT}; give the file that save() wrote")
            vectors = {site: file.get_tensor(site) for site in record["sites"]}
        return make(
            {
                "vectors": vectors,
                "method": str(record["method"]),
                "model": Provenance(**record["model"]),
                "operation": record["operation"],
                "read_at": str(record["read_at"]),
                "scale": {s: SiteScale(*(_number(v) for v in held)) for s, held in record["scale"].items()},
                "stats": {s: {k: _number(v) for k, v in held.items()} for s, held in record["stats"].items()},
                "name": str(record["name"]),
                "folded": bool(record["folded"]),
                "notes": tuple(str(note) for note in record["notes"]),
            }
        )
    except ArtifactError:
        raise
    except (*_WRONG, SafetensorError) as err:
        raise ArtifactError(f"{path} cannot be read as a direction ({err}); give the file that save() wrote") from err


def _plain(value: float) -> float | str | None:
    """JSON has no NaN and no infinity."""
    if math.isfinite(value):
        return value
    return None if math.isnan(value) else str(value)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
