"""Building the testbed's language models: text of the small world → tokenizer, model, training, a packaged folder."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, model_validator

from interp.core.manager import HookManager
from interp.core.resources import resource
from interp.core.settings import Settings
from interp.evaluate.tasks import repeat_loss, task_scores
from interp.testbed.text import Text
from interp.testbed.tokenizer import build_tokenizer, vocabulary
from interp.train.lm import train_lm
from interp.train.lm_config import LMOptions
from interp.train.lm_data import LMBatch
from interp.train.lm_result import LMTraining

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["BuildConfig", "ModelShape", "WorldData", "build_testbed", "new_model", "package", "task_measures"]

_SPECIAL_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


class ModelShape(Settings):
    """The architecture of a testbed model."""

    family: Literal["gpt2", "llama"] = Field(
        description="gpt2: LayerNorm, learned positions, GELU; llama: RMSNorm, rotary positions, SwiGLU, GQA"
    )
    n_layers: int = Field(default=4, gt=0, description="blocks")
    d_model: int = Field(default=128, gt=0, description="width of the residual stream")
    n_heads: int = Field(default=4, gt=0, description="query heads per layer")
    n_kv_heads: int | None = Field(default=None, gt=0, description="key and value heads per layer; llama only")
    d_mlp: int = Field(default=512, gt=0, description="neurons per layer")
    ctx: int = Field(default=128, ge=128, description="tokens that the model can take; questions need up to 128")
    init_std: float = Field(default=0.06, gt=0, description="standard deviation of the first weights")

    @model_validator(mode="after")
    def _fits(self) -> "ModelShape":
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}")
        if self.n_kv_heads is not None and (self.family == "gpt2" or self.n_heads % self.n_kv_heads):
            raise ValueError(f"n_kv_heads {self.n_kv_heads}: a divisor of n_heads {self.n_heads}, and for llama alone")
        return self


class BuildConfig(Settings):
    """Everything that decides a testbed model's weights."""

    model: ModelShape
    rows: int = Field(default=32, gt=0, description="rows of `ctx` tokens per step")
    open_weight: float = Field(
        default=0.2, ge=0, description="weight in the loss of tokens that nothing before decides; others weigh 1"
    )
    text_seed: int = Field(default=1, ge=0, description="of the text")
    seed: int = Field(default=0, ge=0, description="of the first weights")
    train: LMOptions

    @classmethod
    def packaged(cls, name: str) -> "BuildConfig":
        """The configuration of a packaged model.

        Args:
            name: "testbed" or "testbed-llama".
        """
        return cls.from_yaml(resource(f"configs/{name}.yaml"))

    def shortened(self, steps: int) -> "BuildConfig":
        """The same with a schedule of fewer steps; warmup, measures and checkpoints that lie beyond are left out.

        Args:
            steps: in all.
        """
        train = self.train.model_dump()
        kept = [step for step in self.train.checkpoints if step <= steps]
        train |= {"steps": steps, "warmup_steps": min(self.train.warmup_steps, steps - 1), "checkpoints": kept}
        return self.model_copy(update={"train": LMOptions.model_validate(train)})


class WorldData:
    """Rows of the small world's training text, without end; its state is the number of the next document.

    Args:
        rows: rows per batch.
        ctx: tokens per row.
        seed: of the text.
        open_weight: weight, in the loss, of tokens that nothing before decides; that of decided ones is 1. What is best
            to predict stays the same, as what stands before says whether the next token is decided; less of the
            gradient is noise.
    """

    def __init__(self, rows: int, ctx: int, *, seed: int, open_weight: float = 1.0) -> None:
        self.rows, self.ctx, self.seed, self.open_weight = rows, ctx, seed, open_weight
        self._text = Text(seed)

    def batches(self, state: Mapping[str, Any] | None) -> Iterator[tuple[LMBatch, dict[str, Any]]]:
        """Yield batches, each with the number of the document that the next one begins with."""
        at = 0 if state is None else int(state["document"])
        while True:
            ids, decided, at = self._text.rows(self.rows, self.ctx, start=at)
            weight = None if self.open_weight == 1 else torch.where(decided, 1.0, self.open_weight)
            yield LMBatch(ids, weight), {"document": at}

    def describe(self) -> dict[str, Any]:
        """What the stream is."""
        return {
            "kind": "small world",
            "rows": self.rows,
            "ctx": self.ctx,
            "seed": self.seed,
            "open_weight": self.open_weight,
        }


def new_model(shape: ModelShape, *, seed: int) -> "PreTrainedModel":
    """A model of the testbed's vocabulary with fresh weights.

    Args:
        shape: its architecture.
        seed: of the weights.
    """
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if shape.family == "gpt2":
            off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
            sizes = {"n_layer": shape.n_layers, "n_embd": shape.d_model, "n_head": shape.n_heads}
            gpt2 = transformers.GPT2Config(
                vocab_size=len(vocabulary()),
                n_positions=shape.ctx,
                n_inner=shape.d_mlp,
                initializer_range=shape.init_std,
                **sizes,
                **off,
                **_SPECIAL_IDS,
            )
            return transformers.GPT2LMHeadModel(gpt2)
        llama = transformers.LlamaConfig(
            vocab_size=len(vocabulary()),
            hidden_size=shape.d_model,
            intermediate_size=shape.d_mlp,
            num_hidden_layers=shape.n_layers,
            num_attention_heads=shape.n_heads,
            num_key_value_heads=shape.n_kv_heads or shape.n_heads,
            max_position_embeddings=shape.ctx,
            tie_word_embeddings=True,
            initializer_range=shape.init_std,
            **_SPECIAL_IDS,
        )
        return transformers.LlamaForCausalLM(llama)


def task_measures(hm: HookManager) -> dict[str, float]:
    """What the course of training shows: held-out accuracy of each task and the loss on repeats, from few examples."""
    scores = task_scores(hm, n=50)
    repeats = repeat_loss(hm, n=40)
    found = dict(zip(scores.tasks, scores.choice_accuracy.tolist(), strict=True))
    return {**found, "repeat_first_nats": repeats.first, "repeat_second_nats": repeats.second}


def build_testbed(cfg: BuildConfig, out: str | Path, *, resume: bool = False) -> LMTraining:
    """Train a testbed model from nothing; the same configuration gives the same bytes on one CPU thread.

    Args:
        cfg: see `BuildConfig`; those of the packaged models are `BuildConfig.packaged(name)`.
        out: folder to write: checkpoints, metrics, and in `final/` a Hugging Face folder with its tokenizer.
        resume: go on from the state in `out`.

    Returns:
        The course of the training.

    Raises:
        ArtifactError: the folder holds something, or nothing to resume from.
    """
    shape = cfg.model
    hm = HookManager.load(new_model(shape, seed=cfg.seed), build_tokenizer(context=shape.ctx))
    data = WorldData(cfg.rows, shape.ctx, seed=cfg.text_seed, open_weight=cfg.open_weight)
    return train_lm(hm, data, cfg.train, out=out, seed=cfg.seed, measures={"task": task_measures}, resume=resume)


def package(run: str | Path, folder: str | Path) -> Path:
    """Copy what users of a finished run need: the model, its tokenizer and the course of its training.

    Args:
        run: folder that `build_testbed` wrote.
        folder: where to; what is there is replaced.
    """
    source, target = Path(run), Path(folder)
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(source / "final", target)
    for name in ("metrics.jsonl", "provenance.json"):
        shutil.copyfile(source / name, target / name)
    return target
