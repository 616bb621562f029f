"""What a measurement hands back: typed values, a table, a figure, a page, and where they came from."""

import dataclasses
import hashlib
import importlib
import json
import math
import os
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from interp.core.errors import ArtifactError
from interp.core.text import str_tokens

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

    from interp.core.manager import HookManager

__all__ = ["FORMAT", "Provenance", "Result", "token_names"]

_R = TypeVar("_R", bound="Result")

FORMAT = 1
_JSON_NAME = "result.json"
_TENSOR_NAME = "tensors.safetensors"
# These say how a config was written, not what the model computes.
_VOLATILE_CONFIG = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")


@dataclass(frozen=True)
class Provenance:
    """Where a result came from: model, data, settings and the versions of what computed it.

    Attributes:
        model: Name or path the model was loaded by.
        revision: Revision of the checkpoint, None when it has none.
        config_hash: First 16 hex digits of the SHA-256 of the model's configuration.
        data_hash: The same of the token ids and their mask, None when no data was given.
        seed: Seed of whatever was drawn, None when nothing was.
        settings: The call's arguments that decide the outcome.
        versions: Versions of interp, torch and transformers.
    """

    model: str
    revision: str | None = None
    config_hash: str | None = None
    data_hash: str | None = None
    seed: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        hm: "HookManager",
        *,
        settings: Mapping[str, Any] | None = None,
        data: Sequence[Tensor] = (),
        seed: int | None = None,
    ) -> "Provenance":
        """Describe a call on a model.

        Args:
            hm: The manager whose model was measured.
            settings: Arguments of the call; values that are not plain JSON are recorded by their `str`.
            data: Tensors that were the input, in order (token ids, masks).
            seed: Seed of whatever was drawn.

        Returns:
            The provenance, without touching the device beyond copying `data` to the host.
        """
        config = {k: v for k, v in hm.config.to_dict().items() if k not in _VOLATILE_CONFIG}
        return cls(
            model=str(hm.name),
            revision=hm.revision,
            config_hash=_digest(json.dumps(config, sort_keys=True, default=str).encode()),
            data_hash=_digest(*(_tensor_bytes(t) for t in data)) if data else None,
            seed=seed,
            settings=json.loads(json.dumps(dict(settings or {}), default=str)),
            versions=_versions(),
        )


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Result(ABC):
    """A frozen record of one measurement.

    A subclass is decorated `@dataclass(frozen=True, eq=False, repr=False, kw_only=True)`, declares its values as typed
    fields (tensors, numbers, strings, lists, tuples, dicts of them), and writes `to_frame`, `plot` and `summary`.
    """

    title: ClassVar[str] = "Result"
    provenance: Provenance

    @abstractmethod
    def to_frame(self) -> "pandas.DataFrame":
        """Return the values as a tidy table: one observation a row."""

    @abstractmethod
    def plot(self) -> "plotly.graph_objects.Figure":
        """Return the figure of this result."""

    @abstractmethod
    def summary(self) -> str:
        """Say in a few lines what was found, on what."""

    def page_parts(self) -> "list[tuple[str, pandas.DataFrame | plotly.graph_objects.Figure]]":
        """Return what the page shows after its first figure: headings with further figures or tables."""
        return []

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write a page that holds everything it shows and asks nothing of the network.

        Args:
            path: File to write; parent folders are made, an existing file is replaced in one step.

        Returns:
            The path written.
        """
        # By name: `core` may not depend on `report`, and plotly is not loaded before it is wanted.
        write_result = importlib.import_module("interp.report.html").write_result
        return Path(write_result(self, path))

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the result, without the model, as `result.json` and `tensors.safetensors`.

        Args:
            folder: Folder to write; it appears complete or not at all.
            overwrite: Replace a result that is already there.

        Returns:
            The folder.

        Raises:
            ArtifactError: The folder holds something, or a field cannot be stored.
        """
        target = Path(folder)
        _refuse_overwriting(target, overwrite)
        tensors: dict[str, Tensor] = {}
        body = {f.name: _encode(getattr(self, f.name), f.name, tensors) for f in dataclasses.fields(self)}
        record = {"format": FORMAT, "class": _class_name(type(self)), "fields": body}
        from safetensors.torch import save_file

        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
        draft.mkdir()
        try:
            (draft / _JSON_NAME).write_text(json.dumps(record, indent=1, allow_nan=False), encoding="utf-8")
            save_file(tensors, draft / _TENSOR_NAME)
            _swap_in(draft, target)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return target

    @classmethod
    def load(cls: type[_R], folder: str | os.PathLike[str]) -> _R:
        """Read a result that `save` wrote; no model is needed.

        Args:
            folder: The folder.

        Returns:
            The result. `Result.load` gives back whichever class was saved; a subclass's `load` only its own.

        Raises:
            ArtifactError: No result is there, or it is of another class, format or set of fields.
        """
        record = _read_record(Path(folder))
        found = _find_class(str(record["class"]), cls, Path(folder))
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(Path(folder) / _TENSOR_NAME)
        except (OSError, SafetensorError) as err:
            raise ArtifactError(f"{folder}: {_TENSOR_NAME} cannot be read ({err}); save the result again") from err
        expected = {f.name for f in dataclasses.fields(found)}
        if expected != set(record["fields"]):
            odd = ", ".join(sorted(expected ^ set(record["fields"])))
            raise ArtifactError(f"{folder}: a {found.__name__} with other fields than this version's ({odd})")
        try:
            return found(**{name: _decode(value, tensors) for name, value in record["fields"].items()})
        except (TypeError, ValueError) as err:
            raise ArtifactError(f"{folder}: {_JSON_NAME} is damaged ({err}); save the result again") from err

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self.summary()}"

    def _repr_html_(self) -> str:
        return str(importlib.import_module("interp.report.html").summary_fragment(self))


def token_names(hm: "HookManager", ids: Int[Tensor, "*n"]) -> list[str]:
    """Return the text of each token for tables and figures, flat; the ids themselves where there is no tokenizer.

    Args:
        hm: The model.
        ids: Token ids of any shape.
    """
    flat = ids.reshape(1, -1)
    return [str(i) for i in flat[0].tolist()] if hm.tokenizer is None else str_tokens(hm.tokenizer, flat)[0]


def _digest(*parts: bytes) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "big") + part)
    return total.hexdigest()[:16]


def _tensor_bytes(tensor: Tensor) -> bytes:
    host = tensor.detach().cpu().contiguous()
    return str((tuple(host.shape), str(host.dtype))).encode() + host.reshape(-1).view(torch.uint8).numpy().tobytes()


def _versions() -> dict[str, str]:
    found = {}
    for name in ("interp", "torch", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _class_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _refuse_overwriting(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ArtifactError(f"{target} is a file; a result is saved as a folder: choose another path")
    held = sorted(p.name for p in target.iterdir())
    if not held or (overwrite and set(held) <= {_JSON_NAME, _TENSOR_NAME}):
        return
    what = "a result" if _JSON_NAME in held else "other files (" + ", ".join(held[:4]) + ")"
    hint = "pass overwrite=True to replace it" if what == "a result" and not overwrite else "choose another folder"
    raise ArtifactError(f"{target} already holds {what}; {hint}")


def _swap_in(draft: Path, target: Path) -> None:
    if not target.exists():
        draft.rename(target)
        return
    old = target.with_name(f".{target.name}.{uuid.uuid4().hex}.old")
    target.rename(old)
    draft.rename(target)
    shutil.rmtree(old)


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        # A copy: safetensors refuses storage that two tensors share.
        tensors[path] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"$tensor": path}
    if isinstance(value, Provenance):
        return {"$provenance": _encode(dataclasses.asdict(value), path, tensors)}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": str(value)}
    if isinstance(value, tuple | list):
        items = [_encode(v, f"{path}.{i}", tensors) for i, v in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, Mapping):
        keys = [_encode(k, f"{path}.k{i}", tensors) for i, k in enumerate(value)]
        held = [_encode(v, f"{path}.{i}", tensors) for i, v in enumerate(value.values())]
        return {"$dict": [list(pair) for pair in zip(keys, held, strict=True)]}
    raise ArtifactError(
        f"field {path} holds a {type(value).__name__}, which a result cannot store; "
        "use tensors, numbers, strings, lists, tuples and dicts of them"
    )


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "$tensor":
        if held not in tensors:
            raise ArtifactError(
                f"{_TENSOR_NAME} lacks the tensor {held!r} that {_JSON_NAME} names; save the result again"
            )
        return tensors[held]
    if kind == "$tuple":
        return tuple(_decode(v, tensors) for v in held)
    if kind == "$float":
        return float(held)
    if kind == "$provenance":
        return Provenance(**_decode(held, tensors))
    return {_decode(k, tensors): _decode(v, tensors) for k, v in held}


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / _JSON_NAME
    if not path.is_file():
        held = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) if folder.is_dir() else "no such folder"
        raise ArtifactError(
            f"{folder} holds no {_JSON_NAME} ({held or 'it is empty'}); give the folder that save() wrote"
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as err:
        raise ArtifactError(f"{path} is not valid JSON ({err}); save the result again") from err
    if not isinstance(record, dict) or not {"format", "class", "fields"} <= record.keys():
        raise ArtifactError(f"{path} is not the record of a result; give the folder that save() wrote")
    if record["format"] != FORMAT:
        raise ArtifactError(
            f"{path} has format {record['format']!r}, this version reads {FORMAT}; use the version that wrote it"
        )
    return record


def _subclasses(cls: type[Result]) -> Iterator[type[Result]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _subclasses(child)


def _find_class(name: str, wanted: type[_R], folder: Path) -> type[_R]:
    module = name.rpartition(".")[0]
    # A file may only name classes of this package, or ones that the reader has imported: loading runs no foreign code.
    if module.startswith("interp."):
        try:
            importlib.import_module(module)
        except ImportError as err:
            raise ArtifactError(f"{folder} holds a {name}, which this version of interp does not have") from err
    found = [c for c in _subclasses(Result) if _class_name(c) == name]  # type: ignore[type-abstract]
    if not found:
        raise ArtifactError(f"{folder} holds a {name}, which is not imported; import its module first")
    if not issubclass(found[-1], wanted):
        raise ArtifactError(
            f"{folder} holds a {name}, not a {wanted.__name__}; use {name.rpartition('.')[2]}.load or Result.load"
        )
    return found[-1]
