"""A folder of SAELens' layout: which architecture it holds, its settings and its weights."""

import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from torch import Tensor

from interp.core.errors import ArtifactError, nearest

if TYPE_CHECKING:
    from interp.dictionaries.base import Dictionary

__all__ = [
    "ARCHITECTURES",
    "CFG",
    "WEIGHTS",
    "check_class",
    "class_of",
    "not_followed",
    "read_cfg",
    "read_folder",
    "why_not",
]

CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"

# SAELens' name of an architecture → the class, imported when it is needed.
ARCHITECTURES = {
    "topk": ("interp.dictionaries.topk", "TopKSAE"),
    "standard": ("interp.dictionaries.standard", "StandardSAE"),
    "gated": ("interp.dictionaries.gated", "GatedSAE"),
    "jumprelu": ("interp.dictionaries.jumprelu", "JumpReLUSAE"),
    "transcoder": ("interp.dictionaries.standard", "ReLUTranscoder"),
    "skip_transcoder": ("interp.dictionaries.standard", "ReLUTranscoder"),
    "jumprelu_transcoder": ("interp.dictionaries.jumprelu", "JumpReLUTranscoder"),
    "jumprelu_skip_transcoder": ("interp.dictionaries.jumprelu", "JumpReLUTranscoder"),
}

# What SAELens loads and cannot be loaded here.
_REFUSED = {
    "abstopk": "its latents may be negative, and every measure here takes latents to be 0 or more",
    "matching_pursuit": "it finds latents one after the other, each in what the last left: no encoder gives them",
    "temporal": "it reads a token together with the ones before; latents here are of one position",
    "batchtopk": "that is an SAE in training; SAELens' save_inference_model writes the JumpReLU SAE that it becomes",
}
_REFUSED["matryoshka_batchtopk"] = _REFUSED["batchtopk"]


def read_folder(path: Path, wanted: "type[Dictionary]") -> "Dictionary":
    """Read a dictionary from a folder of SAELens' layout, version 6 or later.

    Args:
        path: the folder.
        wanted: what it must be; what is not is refused before its weights are read.

    Raises:
        ArtifactError: no such dictionary is there, or it is damaged.
    """
    cfg = read_cfg(path)
    architecture = str(cfg["architecture"])
    if architecture not in ARCHITECTURES:
        hint = why_not(architecture)
        raise ArtifactError(f"{path} holds a {architecture!r} dictionary, which cannot be loaded; {hint}")
    found = class_of(architecture)
    check_class(found, wanted, path)
    try:
        dictionary = found.from_cfg(cfg)
    except ValidationError as err:
        raise ArtifactError(f"{path / CFG}: {not_followed(err)}") from err
    except RuntimeError as err:
        sizes = f"d_in {cfg.get('d_in')} and d_sae {cfg.get('d_sae')}"
        raise ArtifactError(f"{path / CFG} says {sizes}, for which there is no memory; is it damaged?") from err
    dictionary.load_state_dict(_read_weights(path, dictionary))
    return dictionary


def read_cfg(folder: Path) -> dict[str, Any]:
    """Read the settings of the dictionary in a folder, which name its architecture.

    Raises:
        ArtifactError: no dictionary is there, or it is damaged.
    """
    path = folder / CFG
    if not path.is_file():
        held = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) if folder.is_dir() else "no such folder"
        raise ArtifactError(f"{folder} holds no {CFG} ({held or 'empty'}); give the folder of a finished run")
    try:
        cfg = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as err:
        raise ArtifactError(f"{path} is not valid JSON ({err}); save the dictionary again") from err
    if not isinstance(cfg, dict) or "architecture" not in cfg:
        raise ArtifactError(f"{path} names no architecture; expected a SAELens folder of version 6 or later")
    cfg.pop("device", None)
    return cfg


def why_not(architecture: str) -> str:
    """Why an architecture of SAELens cannot be loaded here, or which name is near one that it does not have."""
    known = f"known: {', '.join(sorted(ARCHITECTURES))}"
    return _REFUSED.get(architecture) or nearest(architecture, ARCHITECTURES) or known


def check_class(found: "type[Dictionary]", wanted: "type[Dictionary]", folder: Path) -> None:
    """Refuse a dictionary of another class than was asked for.

    Raises:
        ArtifactError: names both.
    """
    if not issubclass(found, wanted):
        raise ArtifactError(f"{folder} holds a {found.__name__}, not a {wanted.__name__}; use {found.__name__}.load")


def class_of(architecture: str) -> "type[Dictionary]":
    """The class of an architecture that is among `ARCHITECTURES`."""
    module, name = ARCHITECTURES[architecture]
    found: type[Dictionary] = getattr(import_module(module), name)
    return found


def not_followed(error: ValidationError) -> str:
    """Say which settings of a dictionary cannot be followed, and why."""
    faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
    return f"settings that cannot be followed: {faults}"


def _read_weights(folder: Path, dictionary: "Dictionary") -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as err:
        raise ArtifactError(f"{path} cannot be read ({err}); save the dictionary again") from err
    expected = {name: tuple(value.shape) for name, value in dictionary.state_dict().items()}
    came = {name: tuple(value.shape) for name, value in weights.items()}
    if came != expected:
        raise ArtifactError(f"{path} holds {came}; its {CFG} says {expected}")
    return weights
