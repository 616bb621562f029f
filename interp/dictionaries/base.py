"""What every sparse dictionary is: `encode`, `decode`, `loss`, and a folder that SAELens reads."""

import json
import re
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
    "read_cfg",
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
        beyond: the batch's `beyond` of the reconstruction, before its weight, detached; None where it has none.
    """

    total: Float[Tensor, ""]
    fvu: Float[Tensor, ""]
    aux: Float[Tensor, ""]
    penalty: Float[Tensor, ""]
    l0: Float[Tensor, ""]
    fired: Int[Tensor, "d_sae"]
    beyond: Float[Tensor, ""] | None = None


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
            batch: activations, a target where it differs, and `beyond` where what the reconstruction does counts too.
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
        # SAELens takes a file without this version for one of its own from before 6.0, and converts it; what it was
        # loaded from may have been one.
        version = metadata.version("sae-lens")
        written = {"sae_lens_training_version": None, **made.cfg.metadata, **(notes or {}), "sae_lens_version": version}
        record = {**made.cfg.model_dump(), "device": "cpu", "metadata": written}
        atomic_write(target / CFG, json.dumps(record, indent=1, sort_keys=True) + "\n")
        return target

    @classmethod
    def load(
        cls: type[_D], folder: str | Path, *, device: str | torch.device = "cpu", revision: str | None = None
    ) -> _D:
        """Read a dictionary of ours or another library's; the class follows from what is there.

        Args:
            folder: a run folder, or any that SAELens wrote; a hookpoint's of sparsify; a layer's file of
                circuit-tracer; each of them on the hub, as `hf://owner/repo/folder`; or `release/id` of SAELens.
            device: where to put the weights.
            revision: branch, tag or commit on the hub; the commit is kept in the metadata.

        Raises:
            ArtifactError: no dictionary is there, it is damaged, or it is one that this class cannot be.
            ConfigError: a revision of what has none.
        """
        from interp.dictionaries.layouts import find

        place = find(folder, revision=revision)
        path = place.folder
        if place.read is not None:
            return _as(cls, place.read(), path).to(device).eval().requires_grad_(False)
        cfg = read_cfg(path)
        found = _class_of(str(cfg["architecture"]), path)
        _check_class(cls, found, path)
        try:
            dictionary = cast("_D", found.from_cfg(cfg))
        except ValidationError as err:
            faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in err.errors())
            raise ArtifactError(f"{path / CFG}: settings that cannot be followed: {faults}") from err
        except RuntimeError as err:
            sizes = f"d_in {cfg.get('d_in')} and d_sae {cfg.get('d_sae')}"
            raise ArtifactError(f"{path / CFG} says {sizes}, for which there is no memory; is it damaged?") from err
        dictionary.load_state_dict(_read_weights(path, dictionary))
        dictionary.cfg.metadata.update(place.notes)
        return dictionary.to(device).eval().requires_grad_(False)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        folder_in_repo: str = "",
        private: bool = True,
        run: str | Path | None = None,
        revision: str | None = None,
        message: str | None = None,
    ) -> str:
        """Send what `save` writes to the Hugging Face hub, with a model card.

        Args:
            repo_id: `owner/name`; the repository is made if it is missing.
            folder_in_repo: where in it; by default its top.
            private: whether a new repository is private.
            run: the run's folder, whose `evaluation.json` is sent too and told in the card.
            revision: branch to send to; by default the main one.
            message: of the commit.

        Returns:
            What `load` takes to read it again, with its commit.

        Raises:
            ArtifactError: there is no token, or the hub cannot be reached or refuses.
            ConfigError: no such place can be.
        """
        from interp.dictionaries.hub import push_dictionary

        where: dict[str, Any] = {"folder_in_repo": folder_in_repo, "private": private, "run": run}
        return push_dictionary(self, repo_id, **where, revision=revision, message=message)

    def neuronpedia_url(self, latent: int) -> str:
        """The page of a latent on Neuronpedia.

        Args:
            latent: which.

        Raises:
            ArtifactError: the metadata have no `neuronpedia_id`, or one that is not `model/source`.
            ConfigError: no such latent.
        """
        known = self.cfg.metadata.get("neuronpedia_id")
        if known is None:
            raise ArtifactError(
                "this dictionary's metadata have no neuronpedia_id; if it is there, set "
                "cfg.metadata['neuronpedia_id'] = 'model/source', such as 'gpt2-small/8-res-jb'"
            )
        if not isinstance(known, str) or re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", known, re.ASCII) is None:
            raise ArtifactError(f"neuronpedia_id is {known!r}; expected 'model/source', such as 'gpt2-small/8-res-jb'")
        if not 0 <= latent < self.cfg.d_sae:
            raise ConfigError(f"there is no latent {latent}; expected one from 0 to {self.cfg.d_sae - 1}")
        return f"https://www.neuronpedia.org/{known}/{latent}"

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


def _check_class(wanted: type[Dictionary], found: type[Dictionary], folder: Path) -> None:
    if not issubclass(found, wanted):
        raise ArtifactError(f"{folder} holds a {found.__name__}, not a {wanted.__name__}; use {found.__name__}.load")


def _as(wanted: type[_D], dictionary: Dictionary, folder: Path) -> _D:
    _check_class(wanted, type(dictionary), folder)
    return cast("_D", dictionary)


def _class_of(architecture: str, folder: Path) -> type[Dictionary]:
    if architecture not in ARCHITECTURES:
        hint = why_not(architecture)
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
