"""A minimal reader and writer of GGUF files: what control vectors need of them, and nothing of models.

Source: the GGUF specification, version 3 (github.com/ggml-org/ggml, docs/gguf.md). Tensors are F32 or F16; other types,
big-endian files and other versions than 2 and 3 are refused by name.
"""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from interp.core.disk import atomic_write
from interp.core.errors import ArtifactError

__all__ = ["GGUF", "read_gguf", "write_gguf"]

_MAGIC, _VERSION, _ALIGNMENT = b"GGUF", 3, 32
# Value types by their number: a scalar's format, or None for strings (8) and arrays (9).
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY, _UINT32 = 8, 9, 4
_TENSORS: dict[int, np.dtype[Any]] = {0: np.dtype("<f4"), 1: np.dtype("<f2")}
_MOST = 1 << 20  # of anything counted: a control vector has a few hundred tensors


class GGUF(NamedTuple):
    """What a file holds: its keys and values, and its tensors in fp32."""

    fields: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


class _Bytes:
    """The bytes of a file, read from front to back and never beyond their end."""

    def __init__(self, data: bytes, path: Path) -> None:
        self.data, self.at, self.path = data, 0, path

    def take(self, n: int) -> bytes:
        if n < 0 or self.at + n > len(self.data):
            raise ArtifactError(f"{self.path} ends at byte {len(self.data)}, within its header; copy it again")
        part = self.data[self.at : self.at + n]
        self.at += n
        return part

    def number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]

    def count(self, what: str) -> int:
        n = int(self.number("Q"))
        if n > _MOST:
            raise ArtifactError(f"{self.path} says that it has {n} {what}; no control vector has, so it is damaged")
        return n

    def text(self) -> str:
        try:
            return self.take(self.count("bytes in a name")).decode("utf-8")
        except UnicodeDecodeError as err:
            raise ArtifactError(f"{self.path} holds a name that is not UTF-8, so it is damaged") from err

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY and depth < 4:
            inner, n = int(self.number("I")), self.count("items in a list")
            return [self.value(inner, depth + 1) for _ in range(n)]
        raise ArtifactError(f"{self.path} holds a value of the unknown type {kind}, so it is damaged")


def read_gguf(path: Path) -> GGUF:
    """Read a small GGUF file whole.

    Args:
        path: the file; it is read into memory.

    Raises:
        ArtifactError: no such file, another format or version, a damaged one, or tensors that are not F32 or F16.
    """
    try:
        file = _Bytes(path.read_bytes(), path)
    except OSError as err:
        raise ArtifactError(f"{path} cannot be read ({err})") from err
    if file.data[:4] != _MAGIC:
        raise ArtifactError(f"{path} is no GGUF file: it begins with {file.data[:4]!r}")
    file.at = 4
    version = int(file.number("I"))
    if version not in (2, _VERSION):
        kind = "big-endian" if version & 0xFFFF == 0 else f"of version {version}"
        raise ArtifactError(f"{path} is a GGUF file {kind}; versions 2 and 3, little-endian, are read")
    n_tensors, n_fields = file.count("tensors"), file.count("fields")
    fields: dict[str, Any] = {}
    for _ in range(n_fields):
        key = file.text()
        if key in fields:
            raise ArtifactError(f"{path} has two fields {key!r}, so it is damaged")
        fields[key] = file.value(int(file.number("I")))
    entries = []
    for _ in range(n_tensors):
        name, n_dims = file.text(), int(file.number("I"))
        if n_dims > 4:
            raise ArtifactError(f"{path}: the tensor {name!r} has {n_dims} dimensions, so the file is damaged")
        shape = [int(file.number("Q")) for _ in range(n_dims)]
        entries.append((name, shape, int(file.number("I")), int(file.number("Q"))))
    alignment = fields.get("general.alignment", _ALIGNMENT)
    if isinstance(alignment, bool) or not isinstance(alignment, int) or not 0 < alignment <= _MOST:
        raise ArtifactError(f"{path} has general.alignment={alignment!r}, so it is damaged")
    start = _padded(file.at, alignment)
    return GGUF(fields, {name: _tensor(file, start, *entry) for name, *entry in _unique(entries, path)})


def _unique(entries: list[Any], path: Path) -> list[Any]:
    if len({name for name, *_ in entries}) != len(entries):
        raise ArtifactError(f"{path} has two tensors of one name, so it is damaged")
    return entries


def _tensor(file: _Bytes, start: int, shape: list[int], kind: int, offset: int) -> Tensor:
    if kind not in _TENSORS:
        raise ArtifactError(f"{file.path} holds a tensor of GGML type {kind}; F32 (0) and F16 (1) are read")
    n = 1
    for size in shape:
        n *= size
    kept, begin = _TENSORS[kind], start + offset
    if begin + n * kept.itemsize > len(file.data):
        raise ArtifactError(f"{file.path} ends within its tensors; copy it again")
    values = np.frombuffer(file.data, kept, count=n, offset=begin).astype(np.float32)
    return torch.from_numpy(values.reshape(shape[::-1]).copy())  # the first size is the fastest axis


def write_gguf(path: Path, fields: Mapping[str, str | int], tensors: Mapping[str, Tensor]) -> Path:
    """Write texts, whole numbers (as uint32) and tensors (as F32); the file appears whole or not at all.

    Args:
        path: the file; one that is there is replaced.
        fields: keys and values; "general.architecture" is expected first.
        tensors: names and values.

    Raises:
        ArtifactError: the file cannot be written.
    """
    head = [_MAGIC, struct.pack("<IQQ", _VERSION, len(tensors), len(fields))]
    for key, value in fields.items():
        kind = (
            struct.pack("<I", _STRING) + _text(value) if isinstance(value, str) else struct.pack("<II", _UINT32, value)
        )
        head.append(_text(key) + kind)
    body, offset = [], 0
    for name, tensor in tensors.items():
        held = tensor.detach().cpu().float().contiguous().numpy().astype("<f4").tobytes()
        sizes = tuple(tensor.shape)[::-1]
        head.append(_text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, 0, offset))
        body.append(held.ljust(_padded(len(held), _ALIGNMENT), b"\0"))
        offset += len(body[-1])
    front = b"".join(head)
    try:
        return atomic_write(path, front.ljust(_padded(len(front), _ALIGNMENT), b"\0") + b"".join(body))
    except OSError as err:
        raise ArtifactError(f"{path} cannot be written: {err.strerror}; make room, or choose another path") from err


def _text(value: str) -> bytes:
    data = value.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _padded(n: int, alignment: int) -> int:
    return -(-n // alignment) * alignment
