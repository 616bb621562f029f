"""The settings of a dictionary's training: one pydantic model per concern, units in the descriptions."""

from itertools import product
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from interp.core.errors import ConfigError
from interp.core.settings import Settings, describe_faults
from interp.core.site import Site
from interp.dictionaries.options import DictionaryOptions, Kind
from interp.train.optimizers import OptimizerName
from interp.train.trackers import TrackerName

__all__ = [
    "DictionaryOptions",
    "DownstreamOptions",
    "EvaluationOptions",
    "SweepOptions",
    "TextOptions",
    "TrainConfig",
    "TrainOptions",
]


class TextOptions(Settings):
    """How text becomes rows of tokens."""

    field: str = Field(default="text", description="key that holds the text in JSON lines and datasets")
    split: str = Field(default="train", description="split of a hub dataset")
    ctx: int = Field(default=256, ge=2, description="tokens per row, BOS included")
    rows: int = Field(default=32, gt=0, description="rows per forward pass")
    packing: Literal["concat", "block_diagonal", "one_doc"] = Field(
        default="concat", description="how documents share rows"
    )
    bos: bool | None = Field(
        default=None, description="BOS before each document and row; by default the tokenizer's habit"
    )
    hold_out_every: int = Field(default=20, ge=2, description="every so many documents one is kept for the evaluation")


class TrainOptions(Settings):
    """How the dictionary is fitted."""

    tokens: int = Field(
        default=4_000_000,
        gt=0,
        description="tokens to train on, special ones not counted; the text is repeated as needed",
    )
    batch_size: int = Field(default=2048, gt=0, description="tokens per step")
    buffer_tokens: int = Field(default=131_072, gt=0, description="tokens in the shuffling buffer")
    optimizer: OptimizerName = Field(
        default="adam",
        description="adam; muon (matrices by Muon, the rest by Adam); signsgd (the sign of a momentum: half of Adam's "
        "state); adam8bit (moments in 8 bits; needs bitsandbytes)",
    )
    lr: float | None = Field(
        default=None,
        gt=0,
        description="step size; by default 2e-4 / √(d_sae / 2^14), a third of that for signsgd, 2e-3 for muon",
    )
    warmup: float = Field(default=0.02, ge=0, le=1, description="share of the tokens over which lr rises from 0")
    decay: float = Field(
        default=0.2, ge=0, le=1, description="share of the tokens, at the end, over which lr falls to 0"
    )
    schedule: Literal["linear", "cosine"] = Field(default="linear", description="how lr falls there")
    ema: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="keep an average of the weights, of which this share stays at each step, such as 0.999; it is what "
        "is measured and saved",
    )
    grad_clip: float = Field(default=1.0, gt=0, description="largest norm of the gradient")
    dead_after: int | None = Field(
        default=None,
        gt=0,
        description="tokens without firing after which a latent is dead; by default a tenth of all, at most 10M",
    )
    normalize: Literal["none", "mean_norm", "layer_norm", "whiten"] = Field(
        default="mean_norm",
        description="what is done to activations first: scaled to mean norm √d_in; each token centred and divided by "
        "its deviation (which cannot be folded: the dictionary goes on doing it); whitened (folded when saved)",
    )
    log_every: int = Field(default=50, gt=0, description="steps between two lines of metrics")
    checkpoint_every: int | None = Field(
        default=None,
        ge=0,
        description="steps between two checkpoints to resume from; by default a tenth of all, at most those of 10M "
        "tokens; 0 saves one only when stopped",
    )
    deterministic: bool = Field(default=True, description="same seed, same bytes; slower on a GPU")
    track: tuple[TrackerName, ...] = Field(
        default=(),
        description="where metrics and figures go besides metrics.jsonl: tensorboard (a folder in out), wandb",
    )
    shards: int = Field(
        default=1,
        gt=0,
        description="processes of torchrun that hold one dictionary together, each so many of its latents; of several "
        "such groups, as of several processes with 1, each takes its part of every batch",
    )

    @field_validator("normalize", mode="before")
    @classmethod
    def _was_a_switch(cls, value: Any) -> Any:
        return {True: "mean_norm", False: "none"}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _fits(self) -> "TrainOptions":
        if self.warmup + self.decay > 1:
            raise ValueError(f"warmup {self.warmup} and decay {self.decay} are shares of one run: at most 1 together")
        if self.buffer_tokens < 2 * self.batch_size:
            raise ValueError(f"buffer_tokens is {self.buffer_tokens}; at least two batches of {self.batch_size}")
        if len(set(self.track)) < len(self.track):
            raise ValueError(f"track holds {self.track}: give each once")
        return self

    @property
    def dead_after_tokens(self) -> int:
        """Tokens without firing after which a latent is dead."""
        return min(self.tokens // 10, 10_000_000) if self.dead_after is None else self.dead_after

    @property
    def steps(self) -> int:
        """Optimiser steps in all, where every batch is a whole one."""
        return -(-self.tokens // self.batch_size)

    @property
    def checkpoint_steps(self) -> int:
        """Steps between two checkpoints; 0 for none."""
        if self.checkpoint_every is not None:
            return self.checkpoint_every
        return max(1, min(self.steps // 10, 10_000_000 // self.batch_size))


class DownstreamOptions(Settings):
    """The model's loss with the reconstruction in the activation's place, beside the reconstruction's own loss."""

    loss: Literal["none", "ce", "kl"] = Field(
        default="none",
        description="none; ce: cross-entropy of the text; kl: KL(clean ‖ with the reconstruction), in nats. A batch is "
        "then made of whole rows of text, in their order",
    )
    weight: float = Field(default=1.0, ge=0, description="its weight; 0 only measures it")
    reconstruction: float = Field(
        default=1.0, ge=0, description="weight of the reconstruction's loss; 0 leaves the model's alone (end to end)"
    )
    balance: bool = Field(
        default=True,
        description="bring the model's loss to the size of the reconstruction's at each step, and take the mean of the "
        "two by their weights; else their sum",
    )

    @model_validator(mode="after")
    def _some_weight(self) -> "DownstreamOptions":
        if self.weight + self.reconstruction == 0:
            raise ValueError("weight and reconstruction are both 0, so nothing would be trained; give one of them")
        return self


class EvaluationOptions(Settings):
    """How the trained dictionary is measured, on documents that it was not trained on."""

    tokens: int = Field(default=100_000, gt=0, description="tokens to run, special ones included")
    data: str | None = Field(default=None, description="text to use instead of documents held out of the training text")
    pca_rank: int | None = Field(
        default=None,
        ge=0,
        description="rank of a PCA that is fitted on as many tokens of the training text and measured beside; by "
        "default k, 0 for none",
    )


class SweepOptions(Settings):
    """Settings of which each value is trained, all of them on one pass of the model; empty for none."""

    site: tuple[str, ...] = Field(default=(), description="sites to read")
    target: tuple[str, ...] = Field(default=(), description="what transcoders reconstruct, one for each of the sites")
    kind: tuple[Kind, ...] = Field(default=(), description="architectures")
    d_sae: tuple[int, ...] = Field(default=(), description="numbers of latents")
    k: tuple[int, ...] = Field(default=(), description="numbers of latents that may be active per token")
    sparsity: tuple[float, ...] = Field(default=(), description="weights of the sparsity penalty")
    lr: tuple[float, ...] = Field(default=(), description="step sizes")
    seed: tuple[int, ...] = Field(default=(), description="of the first weights; the order of the text is the seed's")

    @model_validator(mode="after")
    def _distinct(self) -> "SweepOptions":
        for name in type(self).model_fields:
            values = getattr(self, name)
            apart = {Site(value) for value in values} if name == "site" else set(values)
            if len(apart) < len(values) and name != "target":
                raise ValueError(f"{name} holds {values}: give each value once")
        if self.target and len(self.target) != len(self.site):
            raise ValueError(f"{len(self.target)} targets for {len(self.site)} sites; give one target for each site")
        return self

    @property
    def any(self) -> bool:
        """Whether anything is swept."""
        return any(getattr(self, name) for name in type(self).model_fields)


class TrainConfig(Settings):
    """Train a sparse dictionary on a site of a model."""

    model: str = Field(description="a folder, testbed or testbed-llama, or a name on the Hugging Face hub")
    site: str = Field(description="where to read, such as blocks.3.hook_resid_post or 3.resid_post")
    target: str | None = Field(
        default=None, description="what a transcoder reconstructs, such as 3.mlp_out; its site is then 3.ln2.normalized"
    )
    data: str = Field(
        description="text: a .txt, .md or .jsonl file, a folder of them, hf://owner/name, or testbed: the small world's"
    )
    store: str | None = Field(
        default=None,
        description="folder of activations that `interp capture` wrote, or the URL that it sent them to, to train on "
        "instead of running the model; data is then the text to measure on",
    )
    store_cache: str | None = Field(
        default=None,
        description="folder for shards of a store at a URL, kept for later runs; by default store-cache in out, which "
        "goes when the run is finished",
    )
    store_cache_bytes: int = Field(
        default=10 * 2**30,
        gt=0,
        description="bytes of shards that may lie in it; those of three windows of train.buffer_tokens are good",
    )
    start: str | None = Field(
        default=None,
        description="folder of a trained dictionary to go on from, ours or SAELens'; dictionary.kind, d_sae and k are "
        "then its own. What BatchTopK saved goes on as jumprelu, or as batchtopk where that is asked for",
    )
    out: str = Field(description="folder to write; it must not hold anything yet")
    seed: int = Field(default=0, ge=0, description="of the first weights and the shuffling")
    device: str | None = Field(
        default=None,
        description="cpu, cuda, cuda:1, …; by default where the model loads, under torchrun the rank's GPU",
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None, description="of the model; by default the checkpoint's. The dictionary is always float32"
    )
    dictionary: DictionaryOptions = DictionaryOptions()
    text: TextOptions = TextOptions()
    train: TrainOptions = TrainOptions()
    downstream: DownstreamOptions = DownstreamOptions()
    evaluation: EvaluationOptions = EvaluationOptions()
    sweep: SweepOptions = SweepOptions()

    @field_validator("site", "target")
    @classmethod
    def _site_parses(cls, value: str | None) -> str | None:
        if value is not None:
            Site(value)
        return value

    @model_validator(mode="after")
    def _has_target(self) -> "TrainConfig":
        given = self.target is not None or bool(self.sweep.target)
        if given != (self.dictionary.form != "sae"):
            raise ValueError(
                f"dictionary.form is {self.dictionary.form!r} and target is {'given' if given else 'not given'}: a "
                "transcoder needs the site that it reconstructs, an SAE has none but its own"
            )
        if self.dictionary.form == "skip_transcoder" and self.train.normalize == "layer_norm":
            raise ValueError(
                "train.normalize layer_norm: the bypass of a skip transcoder reads activations that are not "
                "normalised; use mean_norm or whiten"
            )
        return self

    @model_validator(mode="after")
    def _has_rows(self) -> "TrainConfig":
        if self.downstream.loss == "none":
            return self
        if self.store is not None:
            raise ValueError(
                f"downstream.loss {self.downstream.loss} runs the model on whole rows of text, and a store holds "
                "tokens without their rows; leave store out"
            )
        if self.train.batch_size < self.text.ctx:
            raise ValueError(
                f"train.batch_size is {self.train.batch_size} and text.ctx {self.text.ctx}: with downstream.loss a "
                "step takes whole rows, so at least one must fit; raise the one or lower the other"
            )
        return self

    @model_validator(mode="after")
    def _draws_nothing(self) -> "TrainConfig":
        if self.start is not None and (self.sweep.seed or self.dictionary.init != "random"):
            raise ValueError(
                "sweep.seed and dictionary.init are of first weights, and with start none are drawn; leave them out"
            )
        return self

    @model_validator(mode="after")
    def _starts_elsewhere(self) -> "TrainConfig":
        if self.start is not None and Path(self.start).resolve() == Path(self.out).resolve():
            raise ValueError(
                f"start and out are both {self.out}: a resume needs what it started from; give another out"
            )
        return self

    def members(self) -> dict[str, "TrainConfig"]:
        """The dictionaries that this trains, by name; one of no name where nothing is swept.

        Raises:
            ConfigError: sizes that do not go together.
        """
        sweep = self.sweep
        if not sweep.any:
            return {"": self}
        sites = [(name, {"site": name}) for name in sweep.site] or [("", {})]
        if sweep.target:
            sites = [(name, {**s, "target": t}) for (name, s), t in zip(sites, sweep.target, strict=True)]
        axes = [[(f"site-{name}" if name else "", change) for name, change in sites]]
        for name in ("kind", "d_sae", "k", "sparsity", "lr", "seed"):
            values = getattr(sweep, name)
            axes.append([(f"{name}-{value}", {name: value}) for value in values] or [("", {})])
        found = {}
        for chosen in product(*axes):
            name = "_".join(part for part, _ in chosen if part)
            found[name] = self._changed({k: v for _, change in chosen for k, v in change.items()}, name)
        return found

    def _changed(self, change: dict[str, Any], name: str) -> "TrainConfig":
        made = self.model_dump(mode="json", exclude={"sweep"})
        for key, value in change.items():
            inside = "train" if key == "lr" else "dictionary" if key in ("kind", "d_sae", "k", "sparsity") else None
            (made if inside is None else made[inside])[key] = value
        try:
            return TrainConfig.model_validate({**made, "out": str(Path(self.out) / name)})
        except ValidationError as err:
            raise ConfigError(f"{name} cannot be: {describe_faults(err, TrainConfig)}") from err

    @property
    def store_is_remote(self) -> bool:
        """Whether the store is read from a URL, through a cache."""
        return self.store is not None and "://" in self.store

    def sized(self, d_in: int) -> "TrainConfig":
        """The same with the dictionary's sizes filled in.

        Args:
            d_in: width of the site.

        Raises:
            ConfigError: more active latents than there are.
        """
        d_sae, k = self.dictionary.sizes(d_in)
        return self.model_copy(update={"dictionary": self.dictionary.model_copy(update={"d_sae": d_sae, "k": k})})
