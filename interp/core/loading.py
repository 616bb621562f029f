"""Loading: a name, a folder or a model in memory → a Hugging Face model, its tokenizer and what is known of them."""

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from interp.core.errors import ModelError
from interp.core.resources import resource

__all__ = ["PACKAGED", "Loaded", "load_model", "skeleton", "to_device", "to_dtype"]

PACKAGED = {"testbed": "data/testbed", "testbed-llama": "data/testbed-llama"}
"""Names of the models that come with the library → where they lie."""


@dataclass(frozen=True)
class Loaded:
    """A model with where it came from."""

    model: nn.Module
    tokenizer: Any
    name: str
    revision: str | None


def to_dtype(dtype: "str | torch.dtype | None") -> "torch.dtype | None":
    """Return a torch dtype from its name.

    Raises:
        ModelError: no such floating-point dtype.
    """
    if dtype is None or isinstance(dtype, torch.dtype):
        found = dtype
    else:
        short = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}
        found = getattr(torch, short.get(str(dtype), str(dtype)), None)
        if not isinstance(found, torch.dtype):
            raise ModelError(f"dtype {dtype!r} is unknown; use 'float32', 'bfloat16' or 'float16'")
    if found is not None and not found.is_floating_point:
        raise ModelError(f"dtype {dtype} is not floating-point; use 'float32', 'bfloat16' or 'float16'")
    return found


def to_device(device: "str | torch.device") -> torch.device:
    """Return a torch device that can be used here, with its index.

    Raises:
        ModelError: there is no such device.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as err:
        raise ModelError(f"there is no device {device!r} here: {str(err).splitlines()[0]}") from err


def load_model(
    source: "str | Path | nn.Module",
    tokenizer: Any,
    *,
    revision: str | None,
    dtype: "str | torch.dtype | None",
    device: "str | torch.device | None",
    device_map: Any,
    model_kwargs: Mapping[str, Any] | None,
    trust_remote_code: bool,
) -> Loaded:
    """Return a model and tokenizer; arguments as for `HookManager.load`.

    Raises:
        ModelError: nothing could be loaded; says how to load from a folder.
    """
    wanted = to_dtype(dtype)
    if isinstance(source, nn.Module):
        if model_kwargs or device_map is not None or revision is not None:
            raise ModelError(
                "model_kwargs, device_map and revision are for loading by name; this model is in memory already"
            )
        model = source
        if next(model.parameters(), None) is None:
            raise ModelError(f"{type(model).__name__} has no parameters, so it is no language model")
        if wanted is not None and next(model.parameters()).dtype != wanted:
            raise ModelError(
                f"this model is in memory as {next(model.parameters()).dtype}; convert it with model.to({wanted})"
            )
        if device is not None and next(model.parameters()).device != to_device(device):
            raise ModelError(
                f"this model is on {next(model.parameters()).device}; move it yourself with model.to({str(device)!r})"
            )
        name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)
        return Loaded(model, tokenizer, name, None)
    if not isinstance(source, str | Path):
        raise ModelError(f"load takes a model name, a folder or a model, got {type(source).__name__}")
    if device is not None and device_map is not None:
        raise ModelError("give device or device_map, not both")
    return _from_pretrained(
        str(source), tokenizer, revision, wanted, device, device_map, dict(model_kwargs or {}), trust_remote_code
    )


def _from_pretrained(
    name: str,
    tokenizer: Any,
    revision: str | None,
    dtype: "torch.dtype | None",
    device: Any,
    device_map: Any,
    model_kwargs: dict[str, Any],
    trust_remote_code: bool,
) -> Loaded:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = _folder_of(name)
    own = _know_own_models(folder)
    shared: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        shared["revision"] = revision
    options = dict(model_kwargs)
    if dtype is not None:
        options["dtype"] = dtype
    if device_map is not None:
        options["device_map"] = device_map
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, **shared, **options)
        if tokenizer is None and not (own and not (Path(folder) / "tokenizer_config.json").is_file()):
            tokenizer = AutoTokenizer.from_pretrained(folder, **shared)
            if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes one up for a folder without
                tokenizer = None
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as err:
        raise ModelError(_cannot_load(name, err)) from err
    if device is not None:
        try:
            model = model.to(device)
        except (RuntimeError, AssertionError) as err:
            raise ModelError(f"cannot move the model to {device!r}: {str(err).splitlines()[0]}") from err
    return Loaded(model.eval(), tokenizer, name, revision or getattr(model.config, "_commit_hash", None))


def _folder_of(name: str) -> str:
    """Where transformers finds a model: the folder of a packaged one, else the name itself, checked if it is a path."""
    if name in PACKAGED:
        return str(resource(PACKAGED[name]))
    path = Path(name)
    if path.is_dir() and not (path / "config.json").exists():
        raise ModelError(
            f"the folder {name!r} holds no config.json; a Hugging Face folder is made by model.save_pretrained"
        )
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_like_path and not path.is_dir():
        raise ModelError(f"there is no folder {name!r} (looked from {Path.cwd().name}/)")
    return name


def _know_own_models(name: str) -> bool:
    """Whether a folder is of one of the testbed's nano models, whose classes transformers is then told of.

    Many of them live on ids alone, so that a folder without a tokenizer is as it should be.
    """
    try:
        config = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # transformers says what is wrong with it
    own = isinstance(config, dict) and config.get("model_type") == "interp_nano"
    if own:
        importlib.import_module("interp.testbed.nano_model")
    return own


def _cannot_load(name: str, err: Exception) -> str:
    text = str(err).strip() or type(err).__name__
    first = text.splitlines()[0][:300].rstrip(".")
    message = f"cannot load {name!r}: {first}"
    if "tokenizer" in str(err).lower() and Path(name).is_dir():
        return f"{message}. Give a tokenizer: load(folder, tokenizer); or load the model yourself and give load(model)"
    if "trust_remote_code" in str(err):
        return f"{message}. It runs code of its own; read that code, then give trust_remote_code=True"
    if not Path(name).is_dir():
        return (
            f"{message}. Without network, give a folder instead: HookManager.load('path/to/folder'), made elsewhere by "
            "model.save_pretrained(folder) and tokenizer.save_pretrained(folder). Packaged: " + ", ".join(PACKAGED)
        )
    return message


def skeleton(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> nn.Module:
    """Return a model built from its config alone, on the meta device: every module, no weights.

    Raises:
        ModelError: no config could be read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = _folder_of(name)
    _know_own_models(folder)
    try:
        config = AutoConfig.from_pretrained(folder, revision=revision or "main", trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as err:
        raise ModelError(_cannot_load(name, err)) from err
