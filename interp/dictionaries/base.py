"""What every sparse dictionary is: `encode`, `decode`, `loss`, and a folder that SAELens reads."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from interp.core.disk import atomic_write
from interp.core.errors import ArtifactError, ConfigError, ShapeError, nearest
from interp.data.store import Batch
from interp.dictionaries.across import ALONE, Across

__all__ = [
    "ARCHITECTURES",
    "CFG",
    "SAE",
    "WEIGHTS",
    "Dictionary",
    "DictionaryConfig",
    "Losses",
    "Transcoder",
    "TranscoderConfig",
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


_D = TypeVar("_D", bound="Dictionary")


class DictionaryConfig(BaseModel):
    """What SAELens' `cfg.json` says of every dictionary."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    architecture: str = Field(description="SAELens' name of the architecture")
    d_in: int = Field(gt=0, description="width of the activations, dimensions")
    d_sae: int = Field(gt=0, description="number of latents")
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = Field(
        default="float32", description="dtype of the weights"
    )
    apply_b_dec_to_input: bool = Field(default=True, description="subtract b_dec before encoding")
    normalize_activations: Literal["none"] = Field(
        default="none", description="scaling at run time; ours is folded instead"
    )
    reshape_activations: Literal["none"] = Field(default="none", description="reshaping at run time")
    metadata: dict[str, Any] = Field(default_factory=dict, description="model, site and data; see SAELens")


@dataclass(frozen=True)
class Losses:
    """What a loss gives for one batch; nothing here has been copied to the host.

    Attributes:
        total: what is minimised.
        fvu: share of the batch's variance that the reconstruction misses, detached.
        aux: auxiliary loss before its coefficient, detached.
        penalty: sparsity penalty before its coefficient, detached.
        l0: mean number of active latents per token.
        fired: in how many of the batch's tokens each latent was active.
    """

    total: Float[Tensor, ""]
    fvu: Float[Tensor, ""]
    aux: Float[Tensor, ""]
    penalty: Float[Tensor, ""]
    l0: Float[Tensor, ""]
    fired: Int[Tensor, "d_sae"]


class Dictionary(nn.Module, ABC):
    """A sparse dictionary of directions: `W_enc` [d_in d_sae], `W_dec` [d_sae d_out], `b_enc` and `b_dec`.

    Latents and reconstructions are those of *raw* activations; whatever scaling training used is folded in.
    """

    W_enc: nn.Parameter
    W_dec: nn.Parameter
    b_enc: nn.Parameter
    b_dec: nn.Parameter
    W_skip: nn.Parameter
    across: Across = ALONE
    """The processes that train it."""

    def __init__(self, cfg: DictionaryConfig) -> None:
        super().__init__()
        self.cfg = cfg

    @property
    def d_out(self) -> int:
        """Width of what it reconstructs."""
        return int(getattr(self.cfg, "d_out", self.cfg.d_in))

    @property
    def has_skip(self) -> bool:
        """Whether `W_skip` [d_out d_in] takes the input past the latents."""
        return "skip" in self.cfg.architecture

    @abstractmethod
    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the latents of some activations."""

    @abstractmethod
    def decode(self, latents: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_out"]:
        """Return the activations that some latents stand for."""

    @abstractmethod
    def loss(self, batch: Batch, *, dead: Bool[Tensor, "d_sae"] | None = None) -> Losses:
        """Return the training loss of a batch.

        Args:
            batch: activations, and a target where it differs.
            dead: latents that have not fired for long; None when none can be dead yet.
        """

    @abstractmethod
    def init_from(
        self, x: Float[Tensor, "token d_in"], *, seed: int, target: Float[Tensor, "token d_out"] | None = None
    ) -> None:
        """Set the first weights.

        Args:
            x: a sample of the activations, as the loss will see them.
            seed: of what is drawn.
            target: of the same tokens, where it is not `x`.
        """

    @abstractmethod
    def fold_scale(self, scale: float, target_scale: float | None = None) -> None:
        """Turn a dictionary of `scale · x` and `target_scale · target` into the same one of `x` and `target`, in place.

        Args:
            scale: of the input.
            target_scale: of what it reconstructs; by default the same.
        """

    def check_split(self, tokens: int, latents: int) -> None:
        """Refuse to be trained by processes that it cannot be split among.

        Args:
            tokens: among how many a batch's tokens are.
            latents: among how many the latents are.

        Raises:
            ConfigError: says why.
        """
        if self.cfg.d_sae % latents:
            raise ConfigError(f"{self.cfg.d_sae} latents in {latents} shards: d_sae must be a multiple of train.shards")

    def join(self, across: Across) -> None:
        """Be trained by several processes from here on; of its latents, only those of this process stay.

        Afterwards `init_from`, or a saved state, must give it weights. What saves or measures it wants the whole again.

        Raises:
            ConfigError: as for `check_split`.
        """
        self.check_split(across.tokens.size, across.latents.size)
        across.take(self)
        self.across = across

    def at(self, done: float) -> None:
        """Be told which share of the training is done, before each step; nothing by default."""

    def frozen(self) -> "Dictionary":
        """Return the dictionary that is saved once training has ended, of an architecture that SAELens knows."""
        return self

    def before_step(self) -> None:
        """Change gradients before the optimiser's step; nothing by default."""

    def after_step(self) -> None:
        """Restore constraints after the optimiser's step; nothing by default."""

    def extra_repr(self) -> str:
        """Sizes, settings and the site it was trained on, for printing."""
        settings = self.cfg.model_dump(include={"d_in", "d_sae", "d_out", "k", "dtype"})
        shown = ", ".join(f"{name}={value}" for name, value in settings.items())
        return f"{shown}, site={self.cfg.metadata.get('hook_name', 'unknown')}"

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Return the reconstruction decode(encode(x)), with what `W_skip` adds."""
        x = self._check_input(x)
        return self.reconstructed(self.encode(x), x)

    def reconstructed(
        self, latents: Float[Tensor, "*batch d_sae"], x: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch d_out"]:
        """Return what latents stand for, with what `W_skip` makes of the input."""
        made = self.decode(latents)
        return made + x.to(made.dtype) @ self.W_skip.T if self.has_skip else made

    def save(self, folder: str | Path, *, notes: Mapping[str, Any] | None = None) -> Path:
        """Write SAELens' inference folder: `sae_weights.safetensors`, then `cfg.json`, each atomically.

        Args:
            folder: where to write; made if it is missing.
            notes: metadata to add, such as `hook_name` and `model_name`.

        Returns:
            The folder; `sae_lens.SAE.load_from_disk` reads it too.
        """
        from safetensors.torch import save

        made, target = self.frozen(), Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        state = {name: value.detach().cpu().contiguous() for name, value in made.state_dict().items()}
        # Weights first: a folder that has a cfg.json is whole.
        atomic_write(target / WEIGHTS, save(state))
        # SAELens takes a file without this version for one of its own from before 6.0, and converts it.
        version = metadata.version("sae-lens")
        written = {"sae_lens_version": version, "sae_lens_training_version": None, **made.cfg.metadata, **(notes or {})}
        record = {**made.cfg.model_dump(), "device": "cpu", "metadata": written}
        atomic_write(target / CFG, json.dumps(record, indent=1, sort_keys=True) + "\n")
        return target

    @classmethod
    def load(cls: type[_D], folder: str | Path, *, device: str | torch.device = "cpu") -> _D:
        """Read a folder that `save` or SAELens wrote; the class follows from its architecture.

        Args:
            folder: a run folder, or any folder with `cfg.json` and `sae_weights.safetensors`.
            device: where to put the weights.

        Raises:
            ArtifactError: no dictionary is there, it is damaged, or it is one that this class cannot be.
        """
        path = Path(folder)
        cfg = _read_cfg(path)
        found = _class_of(str(cfg["architecture"]), path)
        if not issubclass(found, cls):
            raise ArtifactError(f"{path} holds a {found.__name__}, not a {cls.__name__}; use {found.__name__}.load")
        try:
            dictionary = cast("_D", found.from_cfg(cfg))
        except ValidationError as err:
            faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in err.errors())
            raise ArtifactError(f"{path / CFG}: settings that cannot be followed: {faults}") from err
        dictionary.load_state_dict(_read_weights(path, dictionary))
        return dictionary.to(device).eval().requires_grad_(False)

    @classmethod
    @abstractmethod
    def from_cfg(cls, cfg: Mapping[str, Any]) -> "Dictionary":
        """Make an untrained dictionary from the settings in a `cfg.json`."""

    def _check_input(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.cfg.d_in:
            raise ShapeError(f"activations of shape {tuple(x.shape)} for a dictionary of d_in {self.cfg.d_in}")
        return x.to(self.W_enc.dtype)


class SAE(Dictionary):
    """A dictionary that reconstructs the activations it reads; `SAE.load(folder)` gives the right architecture."""


class TranscoderConfig(DictionaryConfig):
    """SAELens' settings of a transcoder."""

    d_out: int = Field(gt=0, description="width of what is reconstructed, dimensions")
    apply_b_dec_to_input: Literal[False] = Field(default=False, description="b_dec is of another space than the input")


class Transcoder(Dictionary):
    """A dictionary that reconstructs what a module makes of the activations it reads, such as an MLP's output."""

    cfg: TranscoderConfig


def _read_cfg(folder: Path) -> dict[str, Any]:
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


def _class_of(architecture: str, folder: Path) -> type[Dictionary]:
    if architecture not in ARCHITECTURES:
        hint = nearest(architecture, ARCHITECTURES) or f"known: {', '.join(sorted(ARCHITECTURES))}"
        raise ArtifactError(f"{folder} holds a {architecture!r} dictionary, which cannot be loaded; {hint}")
    module, name = ARCHITECTURES[architecture]
    found: type[Dictionary] = getattr(import_module(module), name)
    return found


def _read_weights(folder: Path, dictionary: Dictionary) -> dict[str, Tensor]:
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
