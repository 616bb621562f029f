"""To and from circuit-tracer's folders of transcoders: one file for each layer, and `config.yaml`."""

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from interp.core.disk import appear
from interp.core.errors import ArtifactError, ConfigError
from interp.dictionaries.base import Dictionary, Transcoder
from interp.dictionaries.foreign import RAW_MODEL, assembled, layer_in, read_settings, read_tensors, shapes_in, vacant
from interp.dictionaries.jumprelu import JumpReLUTranscoder
from interp.dictionaries.standard import ReLUTranscoder
from interp.dictionaries.topk_transcoder import TopKTranscoder

__all__ = ["CONFIG", "from_circuit_tracer", "layers_in", "site_hooks", "to_circuit_tracer", "write_config"]

CONFIG = "config.yaml"

_LAYER = re.compile(r"layer_(\d+)\.safetensors")
_THRESHOLD = "activation_function.threshold"
_TOPK = (
    "circuit-tracer's topk keeps the k largest pre-activations also where they are negative, and latents here are 0 or "
    "more: it would be another function"
)


def layers_in(folder: str | Path) -> list[int]:
    """The layers that have a file in a folder.

    Args:
        folder: with `layer_0.safetensors` and so on.
    """
    names = (_LAYER.fullmatch(path.name) for path in Path(folder).iterdir())
    return sorted(int(name[1]) for name in names if name)


def from_circuit_tracer(folder: str | Path, layer: int | None = None) -> Transcoder:
    """Read the transcoder of one layer from a folder that circuit-tracer reads.

    Args:
        folder: with `layer_0.safetensors` and so on, and `config.yaml`; or one of these files.
        layer: which; may be left out where the folder holds one, or the file is given.

    Returns:
        A ReLU or JumpReLU transcoder, with or without a skip connection, and its sites in the metadata.

    Raises:
        ArtifactError: no such layer, a damaged file, or a function that cannot be followed.

    Source: circuit-tracer 0.5, `SingleLayerTranscoder`; its W_enc is ours transposed.
    """
    path, layer = _file_of(Path(folder), layer)
    beside = path.parent / CONFIG
    cfg = read_settings(beside) if beside.is_file() else {}
    came = shapes_in(path)
    if "k" in came or cfg.get("activation") == "topk":
        raise ArtifactError(f"{path} holds a TopK transcoder, which cannot be loaded: {_TOPK}")
    if len(came.get("W_enc", ())) != 2:
        raise ArtifactError(f"{path} holds no W_enc of two axes; expected W_enc and W_dec [d_sae d_model]")
    n, d = came["W_enc"]
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (n, d), "W_dec": (n, d), "b_enc": (n,), "b_dec": (d,)}
    # Told to be ReLU, it is one with whatever thresholds it has.
    jumps, skip = _THRESHOLD in came, "W_skip" in came
    shapes |= {_THRESHOLD: (n,)} if jumps else {}
    shapes |= {"W_skip": (d, d)} if skip else {}
    weights = read_tensors(path, shapes)
    weights["W_enc"] = weights["W_enc"].T
    settings: dict[str, Any] = {"d_out": d, "metadata": _metadata(cfg, layer)}
    threshold = weights.pop(_THRESHOLD, None)
    if threshold is None or cfg.get("activation") == "relu":
        name = "skip_transcoder" if skip else "transcoder"
        return assembled(ReLUTranscoder, {**settings, "architecture": name}, weights, path)
    if bool((threshold < 0).any()):
        raise ArtifactError(f"{path} has thresholds below 0, so that latents may be negative; here they are 0 or more")
    name = "jumprelu_skip_transcoder" if skip else "jumprelu_transcoder"
    weights["threshold"] = threshold
    return assembled(JumpReLUTranscoder, {**settings, "architecture": name}, weights, path)


def to_circuit_tracer(
    transcoders: Mapping[int, Transcoder],
    folder: str | Path,
    *,
    model: str | None = None,
    feature_input_hook: str | None = None,
    feature_output_hook: str | None = None,
    scan: str | None = None,
) -> Path:
    """Write transcoders as a folder that circuit-tracer loads by its absolute path.

    It replaces every MLP of a model, so that there must be one for each layer from 0, all of the same sizes. It leaves
    the latents of the first position out, whichever token stands there.

    Args:
        transcoders: of each layer; ReLU or JumpReLU, or what becomes one when it is saved.
        folder: where; it must not be there, or be empty.
        model: its name; by default from the transcoders' metadata.
        feature_input_hook: what they read, such as `mlp.hook_in`; by default from their metadata.
        feature_output_hook: what they reconstruct, such as `hook_mlp_out`; by default from their metadata.
        scan: name of the set among Neuronpedia's features; by default the folder's.

    Returns:
        The folder, which is there whole or not at all.

    Raises:
        ArtifactError: a transcoder that the format cannot hold, or a folder that is in use.
        ConfigError: missing layers, sizes that differ, or sites that are not known.
    """
    made = fit_for_tracing(transcoders)
    if len({t.has_skip for t in made}) > 1:
        raise ConfigError("circuit-tracer takes a set with a skip connection in every layer, or in none")
    if not made or len({t.cfg.d_sae for t in made}) > 1:
        raise ConfigError(f"circuit-tracer takes one number of latents, got {[t.cfg.d_sae for t in made]}")
    hooks = site_hooks(made, feature_input_hook, feature_output_hook)
    target = vacant(folder)

    def write(draft: Path) -> None:
        from safetensors.torch import save_file

        for layer, transcoder in enumerate(made):
            state = {"W_enc": transcoder.W_enc.T, "W_dec": transcoder.W_dec}
            state |= {"b_enc": transcoder.b_enc, "b_dec": transcoder.b_dec}
            if isinstance(transcoder, JumpReLUTranscoder):
                state[_THRESHOLD] = thresholds_of(transcoder)
            if transcoder.has_skip:
                state["W_skip"] = transcoder.W_skip
            held = {name: value.detach().cpu().contiguous() for name, value in state.items()}
            save_file(held, draft / f"layer_{layer}.safetensors")
        name = model or made[0].cfg.metadata.get("model_name")
        write_config(draft, "transcoder_set", hooks, model=name, scan=scan or target.name)

    return appear(target, write)


def fit_for_tracing(transcoders: Mapping[int, Transcoder]) -> list[ReLUTranscoder | JumpReLUTranscoder]:
    """The transcoders of layers 0, 1, …, as what circuit-tracer can compute.

    Args:
        transcoders: of each layer.

    Raises:
        ArtifactError: a transcoder that it cannot compute.
        ConfigError: missing layers, or widths that differ.
    """
    if sorted(transcoders) != list(range(len(transcoders))) or not transcoders:
        raise ConfigError(
            f"got transcoders of layers {sorted(transcoders)}; circuit-tracer replaces every MLP: give one for each "
            "layer of the model, from 0"
        )
    found: list[ReLUTranscoder | JumpReLUTranscoder] = []
    for layer in sorted(transcoders):
        given: Dictionary = transcoders[layer]
        if isinstance(given, TopKTranscoder):
            raise ArtifactError(f"layer {layer} has a TopK transcoder, which cannot be written: {_TOPK}")
        made = given if isinstance(given, ReLUTranscoder | JumpReLUTranscoder) else given.frozen()
        if not isinstance(made, ReLUTranscoder | JumpReLUTranscoder):
            raise ArtifactError(f"layer {layer} has a {type(given).__name__}; expected a ReLU or JumpReLU transcoder")
        if (how := made.cfg.normalize_activations) != "none":
            raise ArtifactError(
                f"circuit-tracer cannot say normalize_activations={how!r} (layer {layer}); keep it in SAELens' format"
            )
        found.append(made)
    if len(widths := {width for t in found for width in (t.cfg.d_in, t.d_out)}) > 1:
        raise ConfigError(f"circuit-tracer takes transcoders of one width, the model's; got {sorted(widths)}")
    return found


def thresholds_of(transcoder: JumpReLUTranscoder) -> Tensor:
    """The thresholds of latents that are positive only: below 0 there is none."""
    return torch.clamp(transcoder.threshold.detach(), min=0)


def site_hooks(
    transcoders: list[ReLUTranscoder | JumpReLUTranscoder], reads: str | None, gives: str | None
) -> tuple[str, str]:
    """The names of the sites that transcoders read and reconstruct, without their layers.

    Args:
        transcoders: of layers 0, 1, ….
        reads, gives: names to take instead of those in the metadata.

    Raises:
        ConfigError: they are not known, or not the same in each layer.
    """
    found = []
    for given, key, option in ((reads, "hook_name", "input"), (gives, "hook_name_out", "output")):
        names = [str(t.cfg.metadata.get(key) or "") for t in transcoders]
        parts = {name.partition(f"blocks.{layer_in(name)}.")[2] for name in names}
        if given is None and any(layer_in(name) != layer for layer, name in enumerate(names) if name):
            raise ConfigError(
                f"the transcoders of layers 0 to {len(names) - 1} say {key}={names}; give each its own layer"
            )
        if given is None and (len(parts) != 1 or parts == {""}):
            raise ConfigError(f"the transcoders say {key}={names}; give feature_{option}_hook, such as mlp.hook_in")
        found.append(given if given is not None else parts.pop())
    return found[0], found[1]


def write_config(folder: Path, kind: str, hooks: tuple[str, str], *, model: str | None, scan: str) -> None:
    """Write circuit-tracer's `config.yaml`.

    Args:
        folder: that is being written.
        kind: `transcoder_set` or `cross_layer_transcoder`.
        hooks: what is read, and what is reconstructed.
        model: its name, where it is known.
        scan: name of the set.
    """
    import yaml

    settings = {"feature_input_hook": hooks[0], "feature_output_hook": hooks[1], "model_kind": kind}
    settings |= {"model_name": str(model)} if model else {}
    (folder / CONFIG).write_text(yaml.safe_dump({**settings, "scan": scan}), encoding="utf-8")


def _file_of(path: Path, layer: int | None) -> tuple[Path, int]:
    """The file of a layer, and the layer."""
    if path.is_file():
        named = _LAYER.fullmatch(path.name)
        if named is None and layer is None:
            raise ArtifactError(f"{path} does not say its layer; name it layer_3.safetensors, or give layer=3")
        return path, layer if layer is not None else int(named[1] if named else 0)
    if not path.is_dir():
        raise ArtifactError(f"there is no folder {path}")
    listed = read_settings(path / CONFIG).get("transcoders") if (path / CONFIG).is_file() else None
    if isinstance(listed, list):
        if layer is None or not 0 <= layer < len(listed):
            raise ArtifactError(f"{path / CONFIG} lists transcoders of layers 0 to {len(listed) - 1}; give layer=3")
        return _inside(path, str(listed[layer])), layer
    layers = layers_in(path)
    if layer is None and len(layers) == 1:
        layer = layers[0]
    if layer not in layers:
        held = f"layers {', '.join(map(str, layers))}" if layers else "no layer_0.safetensors or other layer"
        asked = "which one is not said" if layer is None else f"not {layer}"
        raise ArtifactError(f"{path} holds {held}, {asked}; give interp.Transcoder.load the file of a layer")
    return path / f"layer_{layer}.safetensors", layer


def _inside(folder: Path, name: str) -> Path:
    """A file that `config.yaml` names, which must lie in the folder."""
    parts = PurePosixPath(name)
    if "://" in name or parts.is_absolute() or ".." in parts.parts or "\\" in name:
        raise ArtifactError(
            f"{folder / CONFIG} names {name!r}, which lies outside the folder and is not followed; give that file"
        )
    if parts.suffix != ".safetensors":
        raise ArtifactError(f"{folder / CONFIG} names {name!r}; only safetensors files are read")
    return folder / parts


def _metadata(cfg: Mapping[str, Any], layer: int) -> dict[str, Any]:
    found: dict[str, Any] = {"loaded_format": "circuit-tracer", "model_from_pretrained_kwargs": dict(RAW_MODEL)}
    for key, ours in (("feature_input_hook", "hook_name"), ("feature_output_hook", "hook_name_out")):
        if isinstance(cfg.get(key), str):
            found[ours] = f"blocks.{layer}.{cfg[key]}"
    for key, ours in (("model_name", "model_name"), ("scan", "scan")):
        if isinstance(cfg.get(key), str):
            found[ours] = cfg[key]
    return found
