"""Files and folders that are there whole or not at all, and what tells two of them apart."""

import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["appear", "atomic_write", "clear_drafts", "differences", "digest", "sync", "weights_digest", "write_json"]

_SAMPLED = 64  # values of each weight matrix by which a model is known again


def atomic_write(path: str | os.PathLike[str], data: str | bytes) -> Path:
    """Write a file so that a reader sees the old content or the new, never a part.

    Args:
        path: File to write; parent folders are made.
        data: Its whole content; text is written as UTF-8.

    Returns:
        The path.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data.encode("utf-8") if isinstance(data, str) else data)
        # mkstemp makes files private; give this one the permissions any new file would have.
        mask = os.umask(0)
        os.umask(mask)
        Path(draft).chmod(0o666 & ~mask)
        Path(draft).replace(target)
    finally:
        Path(draft).unlink(missing_ok=True)
    return target


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write, or replace, a file that holds one JSON object."""
    atomic_write(path, json.dumps(dict(record), indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def appear(place: Path, write: Callable[[Path], Any]) -> Path:
    """Write a folder beside its place and rename it, so that it is there whole or not at all.

    Args:
        place: the folder to be; one that is there is replaced.
        write: called with the empty folder to fill.

    Returns:
        The folder.
    """
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


def clear_drafts(folder: Path, names: Iterable[str], *, patterns: Iterable[str] = (), inside: bool = True) -> None:
    """Remove what somebody who was killed had begun to write; other files are left alone.

    Others may be at work in the folder: what vanishes meanwhile is no error.

    Args:
        folder: where to look.
        names: of the files and folders that are written beside their place.
        patterns: regular expressions of further such names.
        inside: look into its folders too.
    """
    draft = re.compile(rf"\.({'|'.join([*map(re.escape, names), *patterns])})\..*\.tmp")
    for root, folders, files in os.walk(folder):
        for name in [name for name in folders if draft.fullmatch(name)]:
            shutil.rmtree(Path(root) / name, ignore_errors=True)
        for name in [name for name in files if draft.fullmatch(name)]:
            (Path(root) / name).unlink(missing_ok=True)
        folders[:] = [name for name in folders if inside and not draft.fullmatch(name)]


def differences(before: Any, now: Any, path: str = "") -> Iterator[str]:
    """Name each setting that differs, with both values.

    Args:
        before, now: plain JSON.
        path: of the part that is compared.
    """
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in {**before, **now}:
            yield from differences(before.get(name), now.get(name), f"{path}.{name}" if path else name)
    elif before != now:
        yield f"{path} was {before!r}, now {now!r}"


def digest(*parts: Tensor | str) -> str:
    """The first 16 hex digits of the SHA-256 of tensors, with their shapes and dtypes, and texts."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            total.update(f"{tuple(part.shape)} {part.dtype}".encode())
            total.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            total.update(part.encode())
    return total.hexdigest()[:16]


def weights_digest(module: torch.nn.Module) -> str:
    """The digest of a few values, evenly spread, of every weight that is not on the meta device.

    Of a model that several processes hold together, all of them must ask.
    """
    wholes = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in module.parameters() if not p.is_meta)
    flats = (p.detach().flatten() for p in wholes)
    return digest(*(flat[:: max(1, len(flat) // _SAMPLED)][:_SAMPLED] for flat in flats))


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, written to the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
