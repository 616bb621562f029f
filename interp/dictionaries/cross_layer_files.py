"""The tensors of a cross-layer transcoder, and circuit-tracer's folders of them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.disk import appear
from interp.core.errors import ArtifactError, ConfigError, ShapeError
from interp.dictionaries.base import Transcoder
from interp.dictionaries.circuit_tracer import fit_for_tracing, thresholds_of, write_config
from interp.dictionaries.foreign import read_tensors, shapes_in, vacant
from interp.dictionaries.jumprelu import JumpReLUTranscoder

__all__ = ["CrossLayerWeights", "read_cross_layer", "write_cross_layer"]

_ENCODER = re.compile(r"W_enc_(\d+)\.safetensors")


@dataclass(frozen=True, eq=False)
class CrossLayerWeights:
    """A cross-layer transcoder: the latents of layer i read its site and write to those of layers i, i + 1, ….

    Latents of layer i are z_i = ReLU(π), or π where it is above a threshold, with π = x_i W_enc[i] + b_enc[i]; layer j
    gives Σ_{i ≤ j} z_i W_dec[i][:, j − i] + b_dec[j].

    Source: Ameisen et al. 2025, "Circuit tracing" (transformer-circuits.pub), §"Building an interpretable replacement
    model".

    Attributes:
        W_enc: for each layer, [d_model d_sae].
        b_enc: for each layer, [d_sae].
        W_dec: for each layer i, [d_sae (layers − i) d_model].
        b_dec: for each layer, [d_model].
        threshold: for each layer, [d_sae]; None for ReLU.
    """

    W_enc: Sequence[Float[Tensor, "d_model d_sae"]]
    b_enc: Sequence[Float[Tensor, "d_sae"]]
    W_dec: Sequence[Float[Tensor, "d_sae _ d_model"]]
    b_dec: Sequence[Float[Tensor, "d_model"]]
    threshold: Sequence[Float[Tensor, "d_sae"]] | None = None

    def __post_init__(self) -> None:
        n = len(self.W_enc)
        held = [self.b_enc, self.W_dec, self.b_dec, *([] if self.threshold is None else [self.threshold])]
        if n == 0 or any(len(part) != n for part in held):
            raise ShapeError(f"a cross-layer transcoder of {n} layers with {[len(part) for part in held]} of the rest")
        d, f = self.W_enc[0].shape
        for layer in range(n):
            wanted = [(d, f), (f,), (f, n - layer, d), (d,), (f,)]
            came = [tuple(part[layer].shape) for part in (self.W_enc, *held)]
            if came != wanted[: len(came)]:
                raise ShapeError(
                    f"layer {layer} has W_enc, b_enc, W_dec, b_dec and threshold of shapes {came}; expected {wanted}"
                )
        if self.threshold is not None and any(bool((threshold < 0).any()) for threshold in self.threshold):
            raise ShapeError("thresholds below 0 let latents be negative; here they are 0 or more")

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return len(self.W_enc)

    @classmethod
    def of(cls, transcoders: Mapping[int, Transcoder]) -> "CrossLayerWeights":
        """The same function as transcoders that each write to their own layer, as one whose other blocks are 0.

        Args:
            transcoders: of layers 0, 1, …, all ReLU or all JumpReLU, without skip connections.

        Raises:
            ArtifactError: a transcoder that is neither.
            ConfigError: missing layers, sizes that differ, or a skip connection.
        """
        made = fit_for_tracing(transcoders)
        if any(t.has_skip for t in made):
            raise ConfigError("circuit-tracer's cross-layer folders hold no skip connection; write them layer by layer")
        if any(type(a) is not type(b) or a.cfg.d_sae != b.cfg.d_sae for a, b in pairwise(made)):
            raise ConfigError("a cross-layer transcoder has one activation function and as many latents in each layer")
        blocks = []
        for layer, t in enumerate(made):
            block = t.W_dec.detach().new_zeros(t.cfg.d_sae, len(made) - layer, t.d_out)
            block[:, 0] = t.W_dec.detach()
            blocks.append(block)
        thresholds = [thresholds_of(t) for t in made if isinstance(t, JumpReLUTranscoder)]
        return cls(
            W_enc=[t.W_enc.detach() for t in made],
            b_enc=[t.b_enc.detach() for t in made],
            W_dec=blocks,
            b_dec=[t.b_dec.detach() for t in made],
            threshold=thresholds or None,
        )

    def encode(self, layer: int, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
        """The latents of one layer.

        Args:
            layer: which.
            x: what that layer reads.
        """
        pre = x @ self.W_enc[layer] + self.b_enc[layer]
        return pre.relu() if self.threshold is None else pre * (pre > self.threshold[layer])

    def decode(self, latents: Sequence[Float[Tensor, "*batch d_sae"]]) -> list[Float[Tensor, "*batch d_model"]]:
        """What the latents of all layers give in each layer.

        Args:
            latents: of each layer, for the same tokens.
        """
        if len(latents) != self.n_layers:
            raise ShapeError(f"latents of {len(latents)} layers for a transcoder of {self.n_layers}")
        return [
            torch.stack([latents[i] @ self.W_dec[i][:, j - i] for i in range(j + 1)]).sum(0) + self.b_dec[j]
            for j in range(self.n_layers)
        ]


def write_cross_layer(
    weights: CrossLayerWeights,
    folder: str | Path,
    *,
    feature_input_hook: str,
    feature_output_hook: str,
    model: str | None = None,
    scan: str | None = None,
) -> Path:
    """Write a cross-layer transcoder as a folder that circuit-tracer loads by its absolute path.

    Args:
        weights: its tensors.
        folder: where; it must not be there, or be empty.
        feature_input_hook: what each layer reads, such as `hook_resid_mid`.
        feature_output_hook: what each layer gives, such as `hook_mlp_out`.
        model: its name.
        scan: name of the set among Neuronpedia's features; by default the folder's.

    Returns:
        The folder, which is there whole or not at all.

    Raises:
        ArtifactError: the folder is in use.
    """
    target = vacant(folder)

    def write(draft: Path) -> None:
        from safetensors.torch import save_file

        for i in range(weights.n_layers):
            state = {f"W_enc_{i}": weights.W_enc[i].T, f"b_enc_{i}": weights.b_enc[i], f"b_dec_{i}": weights.b_dec[i]}
            if weights.threshold is not None:
                state[f"threshold_{i}"] = weights.threshold[i]
            for name, held in ((f"W_enc_{i}", state), (f"W_dec_{i}", {f"W_dec_{i}": weights.W_dec[i]})):
                # Cloned, for tensors of a caller may share their memory, which safetensors refuses.
                cloned = {key: value.detach().cpu().contiguous().clone() for key, value in held.items()}
                save_file(cloned, draft / f"{name}.safetensors")
        hooks = (feature_input_hook, feature_output_hook)
        write_config(draft, "cross_layer_transcoder", hooks, model=model, scan=scan or target.name)

    return appear(target, write)


def read_cross_layer(folder: str | Path) -> CrossLayerWeights:
    """Read a cross-layer transcoder from a folder that circuit-tracer reads.

    Args:
        folder: with `W_enc_0.safetensors`, `W_dec_0.safetensors` and so on.

    Returns:
        Its tensors, on the CPU.

    Raises:
        ArtifactError: a file is missing or damaged, or holds tensors of other shapes.

    Source: circuit-tracer 0.5, `CrossLayerTranscoder`; its W_enc is ours transposed.
    """
    path = Path(folder)
    names = [_ENCODER.fullmatch(file.name) for file in path.iterdir()] if path.is_dir() else []
    layers = sorted(int(name[1]) for name in names if name)
    if not layers or layers != list(range(len(layers))):
        raise ArtifactError(f"{path} holds encoders of layers {layers}; expected W_enc_0.safetensors and so on")
    came = shapes_in(path / "W_enc_0.safetensors")
    if len(came.get("W_enc_0", ())) != 2:
        raise ArtifactError(f"{path / 'W_enc_0.safetensors'} holds no W_enc_0 of two axes; expected [d_sae d_model]")
    (f, d), jumps, n = came["W_enc_0"], "threshold_0" in came, len(layers)
    found: dict[str, list[Tensor]] = {"W_enc": [], "b_enc": [], "b_dec": [], "W_dec": [], "threshold": []}
    for i in layers:
        shapes: dict[str, tuple[int, ...]] = {f"W_enc_{i}": (f, d), f"b_enc_{i}": (f,), f"b_dec_{i}": (d,)}
        shapes |= {f"threshold_{i}": (f,)} if jumps else {}
        held = read_tensors(path / f"W_enc_{i}.safetensors", shapes)
        held |= read_tensors(path / f"W_dec_{i}.safetensors", {f"W_dec_{i}": (f, n - i, d)})
        for name in found.keys() - (set() if jumps else {"threshold"}):
            value = held[f"{name}_{i}"]
            found[name].append(value.T if name == "W_enc" else value)
    try:
        threshold = found.pop("threshold") or None
        return CrossLayerWeights(**found, threshold=threshold)
    except ShapeError as err:
        raise ArtifactError(f"{path}: {err}") from err
