"""What `patch`, `attribute` and `circuit` have in common: a model and prompts of a task."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from interp.cli.results import ModelConfig
from interp.core.settings import Settings

if TYPE_CHECKING:
    from interp.core.manager import HookManager
    from interp.data.pairs import PromptPairs

__all__ = ["MetricName", "PairsConfig", "PairsOptions", "open_pairs"]


_USUAL = "ioi"


class PairsOptions(Settings):
    """Which prompts."""

    task: str | None = Field(
        default=None,
        description="a task that the model's tokenizer takes, such as facts; an unknown one lists them; by default ioi",
    )
    file: str | None = Field(default=None, description="a file that PromptPairs.save wrote, instead of a task")
    n: int = Field(default=32, gt=0, description="pairs; of a file, the first so many")
    seed: int = Field(default=0, ge=0, description="of the draw")
    held_out: bool = Field(default=False, description="of the task's words and templates that are kept apart")

    @model_validator(mode="after")
    def _one_source(self) -> "PairsOptions":
        if self.task is not None and self.file is not None:
            raise ValueError("give either task or file")
        return self


class PairsConfig(ModelConfig):
    """A model, its prompts, and where results go."""

    pairs: PairsOptions = PairsOptions()


MetricName = Literal["logit_diff", "prob_diff", "log_prob"]
"""The metrics of pairs that have a gradient and need no reference."""


def open_pairs(hm: "HookManager", options: PairsOptions, *, bos: bool | None = None) -> "PromptPairs":
    """Return the prompts of a configuration, checked with the model's tokenizer.

    Raises:
        ConfigError: a task that the model cannot be asked.
        ArtifactError: a file that holds no pairs.
        DataError: pairs that cannot be used.
    """
    from interp.data.pairs import PromptPairs
    from interp.testbed.model_tasks import model_pairs

    if options.file is not None:
        held = PromptPairs.load(options.file)
        pairs = held[: options.n]
    else:
        pairs = model_pairs(hm, options.task or _USUAL, options.n, seed=options.seed, held_out=options.held_out)
    pairs.check(hm, bos=bos)
    return pairs
