"""What every sparse dictionary is: `encode`, `decode`, `loss`, and a folder that SAELens reads."""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import torch
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from interp.core.disk import atomic_write
from interp.core.errors import ArtifactError, ConfigError, SiteError
from interp.core.site import Site
from interp.data.store import Batch
from interp.dictionaries.across import ALONE, Across
from interp.dictionaries.folder import CFG, WEIGHTS, check_class, read_folder
from interp.dictionaries.space import Context, Normalization, Space, has_heads

if TYPE_CHECKING:
    from interp.core.manager import HookManager

__all__ = [
    "SAE",
    "Dictionary",
    "DictionaryConfig",
    "Losses",
    "Transcoder",
    "TranscoderConfig",
]

_D = TypeVar("_D", bound="Dictionary")

# Settings of a training that should have been folded into the weights before they were saved.
_UNFOLDED = {
    "expected_average_only_in": "means weights of activations times √d_in / (their mean norm), and the folder does not "
    "hold that factor c; multiply W_enc by c, divide W_dec and b_dec by c, and write normalize_activations: none",
    "covariance_whitening": "means weights of whitened activations, and the folder does not hold the whitening; save "
    "the SAE with SAELens' save_inference_model, which folds it",
}


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
    normalize_activations: Normalization = Field(
        default="none", description="what is done to each token at run time; scaling by a constant is folded instead"
    )
    reshape_activations: Literal["none", "hook_z"] = Field(
        default="none", description="hook_z: activations come by head, [n_heads d_head]"
    )
    metadata: dict[str, Any] = Field(default_factory=dict, description="model, site and data; see SAELens")

    @field_validator("normalize_activations", mode="before")
    @classmethod
    def _can_be_followed(cls, value: Any) -> Any:
        if value in _UNFOLDED:
            # SAELens runs such a folder on activations as they are, which is another function than was trained.
            raise ValueError(f"{value!r} {_UNFOLDED[value]}")
        return value

    @property
    def headed(self) -> bool:
        """Whether what it reads comes by head, as its settings or its site say."""
        try:
            return self.reshape_activations == "hook_z" or has_heads(Site(str(self.metadata.get("hook_name"))))
        except SiteError:
            return False


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

    Latents and reconstructions are those of *raw* activations: whatever scaling training used is folded in, and what
    cannot be folded is done in `space`, which says how an activation becomes what the weights are of.
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
        self.set_cfg(cfg)

    def set_cfg(self, cfg: DictionaryConfig) -> None:
        """Take other settings of the same sizes, and see activations as they say."""
        self.cfg = cfg
        self.space = Space(cfg.d_in, headed=cfg.headed, normalize=cfg.normalize_activations)
        # What a transcoder reconstructs is neither reshaped nor normalised, as in SAELens.
        self.target_space = Space(self.d_out) if "transcoder" in cfg.architecture else self.space

    @property
    def d_out(self) -> int:
        """Width of what it reconstructs."""
        return int(getattr(self.cfg, "d_out", self.cfg.d_in))

    @property
    def has_skip(self) -> bool:
        """Whether `W_skip` [d_out d_in] takes the input past the latents."""
        return "skip" in self.cfg.architecture

    @abstractmethod
    def encode(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the latents of some activations, flat or by head."""

    @abstractmethod
    def decode(self, latents: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_out"]:
        """Return the activations that some latents stand for, flat.

        Raises:
            ConfigError: that depends on the activation; `reconstructed` takes it too.
        """

    def decode_own(self, latents: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_out"]:
        """Return what some latents stand for in the space of the weights."""
        return self.decode(latents)

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

    def fold_whitening(
        self,
        mean: Float[Tensor, "d_in"],
        forward: Float[Tensor, "d_in d_in"],
        back: Float[Tensor, "d_in d_in"],
        *,
        target_scale: float = 1.0,
    ) -> None:
        """Turn a dictionary of (x − mean) · forward into the same one of x, in place.

        Args:
            mean: of the activations.
            forward: the map that made them white.
            back: its inverse.
            target_scale: of what a transcoder reconstructs.

        Raises:
            ConfigError: it cannot be folded into this dictionary.
        """
        raise ConfigError(f"a whitening cannot be folded into a {type(self).__name__}; train it with mean_norm")

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
        sees = f", sees activations {said}" if (said := self.space.extra_repr()) else ""
        return f"{shown}, site={self.cfg.metadata.get('hook_name', 'unknown')}{sees}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*made"]:
        """Return the reconstruction decode(encode(x)), with what `W_skip` adds, in the shape that x came in."""
        return self.reconstructed(self.encode(x), x)

    def reconstructed(
        self, latents: Float[Tensor, "*batch d_sae"], x: Float[Tensor, "*shape"]
    ) -> Float[Tensor, "*made"]:
        """Return what latents stand for, with what `W_skip` makes of the input.

        Args:
            latents: those of x, edited or not.
            x: activations of the raw model, flat or by head.

        Returns:
            Activations of the raw model; of an SAE in the shape of x, of a transcoder flat.
        """
        context = self._context(x)
        made = self._skipping(self.decode_own(latents), x)
        return self.target_space.back(made, context)

    def seen(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*batch d_in"]:
        """Return activations in the fixed space, flat; the raw model's own where there is no processed one."""
        return self.space.fixed(x)

    def target_seen(self, target: Float[Tensor, "*shape"]) -> Float[Tensor, "*batch d_out"]:
        """Return what is to be reconstructed in the fixed space, flat: where errors are measured."""
        return self.target_space.fixed(target)

    def reconstructed_seen(
        self, latents: Float[Tensor, "*batch d_sae"], x: Float[Tensor, "*shape"]
    ) -> Float[Tensor, "*batch d_out"]:
        """Return what latents stand for in the fixed space, flat: to be compared with `target_seen`."""
        context = self._context(x)
        return self.target_space.unnormalized(self._skipping(self.decode_own(latents), x), context)

    def _context(self, x: Tensor) -> Context:
        """What is needed to undo what was done to x; of a transcoder nothing, for it gives something else."""
        if self.target_space is not self.space:
            return Context()
        if not self.space.needs_context:
            flat = self.space.flat(x)
            return Context() if flat is x else Context((x.shape[-2], x.shape[-1]))
        return self.space.own(x.to(self.W_dec.dtype))[1]

    def _skipping(self, made: Tensor, x: Tensor) -> Tensor:
        # Past the latents goes what was not normalised, as in SAELens.
        return made + self.space.fixed(x.to(made.dtype)) @ self.W_skip.T if self.has_skip else made

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
        cls: type[_D],
        folder: str | Path,
        *,
        device: str | torch.device = "cpu",
        revision: str | None = None,
        model: "HookManager | Literal['processed'] | None" = None,
    ) -> _D:
        """Read a dictionary of ours or another library's; the class follows from what is there.

        Args:
            folder: a run folder, or any that SAELens wrote; a hookpoint's of sparsify; a layer's file of
                circuit-tracer; each of them on the hub, as `hf://owner/repo/folder`; or `release/id` of SAELens.
            device: where to put the weights.
            revision: branch, tag or commit on the hub; the commit is kept in the metadata.
            model: the manager whose activations it will read, where it was trained on a model that TransformerLens
                processed (see `interp.dictionaries.processed.for_model`); "processed" for one who feeds it activations
                of such a model.

        Raises:
            ArtifactError: no dictionary is there, it is damaged, or it is one that this class cannot be.
            ConfigError: a revision of what has none; or it needs a model, or another one than was given.
        """
        from interp.dictionaries.layouts import find
        from interp.dictionaries.processed import for_model, refuse_unbound

        place = find(folder, revision=revision)
        made = read_folder(place.folder, cls) if place.read is None else place.read()
        check_class(type(made), cls, place.folder)
        dictionary = cast("_D", made)
        dictionary.cfg.metadata.update(place.notes)
        if model is None:
            refuse_unbound(dictionary)
        dictionary = dictionary.to(device).eval().requires_grad_(False)
        return dictionary if model is None or model == "processed" else for_model(dictionary, model)

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
        """What the weights are of, [*batch d_in]."""
        return self.space.own(x.to(self.W_enc.dtype))[0]


class SAE(Dictionary):
    """A dictionary that reconstructs the activations it reads; `SAE.load(folder)` gives the right architecture."""


class TranscoderConfig(DictionaryConfig):
    """SAELens' settings of a transcoder."""

    d_out: int = Field(gt=0, description="width of what is reconstructed, dimensions")
    apply_b_dec_to_input: Literal[False] = Field(default=False, description="b_dec is of another space than the input")
    reshape_activations: Literal["none"] = Field(default="none", description="heads are read side by side")


class Transcoder(Dictionary):
    """A dictionary that reconstructs what a module makes of the activations it reads, such as an MLP's output."""

    cfg: TranscoderConfig
