"""Reading other libraries' files: what they hold is checked before a dictionary is made of it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor

from interp.core.errors import ArtifactError
from interp.dictionaries.base import Dictionary
from interp.dictionaries.folder import not_followed

__all__ = ["RAW_MODEL", "assembled", "layer_in", "read_settings", "read_tensors", "shapes_in", "vacant", "whole_number"]

# In SAELens' words: of the model as it is, with no norm folded in and nothing centred.
RAW_MODEL = {"center_unembed": False, "center_writing_weights": False, "fold_ln": False}

_LARGEST = 2**20  # bytes of a settings file; real ones have a few hundred

_D = TypeVar("_D", bound=Dictionary)


def read_settings(path: Path) -> dict[str, Any]:
    """Read a file of settings, JSON or YAML by its suffix.

    Args:
        path: the file.

    Raises:
        ArtifactError: it is missing, too large for settings, damaged, or no mapping.
    """
    import yaml

    try:
        if path.stat().st_size > _LARGEST:
            raise ArtifactError(f"{path} has {path.stat().st_size:,} bytes; settings have fewer than {_LARGEST:,}")
        text = path.read_text(encoding="utf-8")
        found = yaml.safe_load(text) if path.suffix in (".yaml", ".yml") else json.loads(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as err:
        raise ArtifactError(f"{path} cannot be read ({' '.join(str(err).split())}); get it again") from err
    if not isinstance(found, dict):
        raise ArtifactError(f"{path} holds a {type(found).__name__}; expected names with values")
    return found


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a safetensors file, from its header alone.

    Args:
        path: the file.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as err:
        raise ArtifactError(f"{path} cannot be read ({err}); get it again") from err


def read_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]], *, more: bool = False) -> dict[str, Tensor]:
    """Read tensors of known shapes from a safetensors file, all in the widest of their dtypes.

    Args:
        path: the file.
        shapes: what it must hold.
        more: whether it may hold others too, which are left where they are.

    Returns:
        The tensors, on the CPU.

    Raises:
        ArtifactError: the file is damaged, a tensor is missing, has another shape or whole numbers, or is not known.
    """
    from safetensors import safe_open

    came = shapes_in(path)
    if missing := shapes.keys() - came.keys():
        raise ArtifactError(
            f"{path} lacks {', '.join(sorted(missing))}; it holds {', '.join(sorted(came)) or 'nothing'}"
        )
    if not more and (unknown := came.keys() - shapes.keys()):
        raise ArtifactError(f"{path} holds {', '.join(sorted(unknown))}, whose part in the function is not known")
    for name, shape in shapes.items():
        if came[name] != shape:
            raise ArtifactError(f"{path} holds {name} {list(came[name])}; expected {list(shape)} beside the others")
    with safe_open(path, framework="pt", device="cpu") as file:
        held = {name: file.get_tensor(name) for name in shapes}
    dtype = torch.float16 if all(value.dtype == torch.float16 for value in held.values()) else torch.bfloat16
    for name, value in held.items():
        if not value.dtype.is_floating_point or value.dtype.itemsize < 2:
            raise ArtifactError(f"{path} holds {name} as {value.dtype}; expected float64, float32, float16 or bfloat16")
        dtype = torch.promote_types(dtype, value.dtype)
    return {name: value.to(dtype) for name, value in held.items()}


def assembled(made: type[_D], settings: Mapping[str, Any], weights: Mapping[str, Tensor], path: Path) -> _D:
    """Make a dictionary of tensors that have been checked.

    Args:
        made: its class.
        settings: as in a `cfg.json`; d_in, d_sae and dtype follow from the weights.
        weights: by the names of its parameters.
        path: where they were read, for errors.

    Returns:
        The dictionary in evaluation mode and without gradients.

    Raises:
        ArtifactError: settings that the class cannot follow.
    """
    d_in, d_sae = weights["W_enc"].shape
    sizes = {"d_in": d_in, "d_sae": d_sae, "dtype": str(weights["W_enc"].dtype).removeprefix("torch.")}
    try:
        with torch.device("meta"):
            dictionary = made.from_cfg({**sizes, **settings})
    except ValidationError as err:
        raise ArtifactError(f"{path}: {not_followed(err)}") from err
    held = {name: value.contiguous() for name, value in weights.items()}
    dictionary.load_state_dict(held, assign=True)
    return dictionary.eval().requires_grad_(False)  # type: ignore[return-value]


def vacant(folder: str | Path) -> Path:
    """A folder that can be written without losing another; its parents are made.

    Args:
        folder: to be.

    Raises:
        ArtifactError: it is a file, or holds something.
    """
    path = Path(folder)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ArtifactError(f"{path} is there already, and nothing is overwritten; remove it, or give another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def whole_number(settings: Mapping[str, Any], name: str, path: Path) -> int:
    """A setting that counts something.

    Args:
        settings: the settings.
        name: which.
        path: where they were read, for errors.

    Raises:
        ArtifactError: it is missing, or no whole number above 0.
    """
    value = settings.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArtifactError(f"{path} says {name}={value!r}; expected a whole number above 0")
    return value


def layer_in(name: str) -> int | None:
    """The layer in the name of a site such as `blocks.3.hook_mlp_out`; None where it has none."""
    parts = name.split(".")
    return int(parts[1]) if len(parts) > 2 and parts[0] == "blocks" and parts[1].isdecimal() else None
