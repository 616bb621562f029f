"""`SweepOptions`: everything about a steering sweep that has a usual value."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from interp.core.errors import ConfigError, WhereError
from interp.core.inputs import Inputs
from interp.core.metrics import Metric
from interp.core.where import Where
from interp.data.pair_tokens import PairTokens
from interp.data.pairs import PromptPairs

__all__ = ["Limits", "SweepOptions"]


class Limits(NamedTuple):
    """What a dose may cost before its cell is flagged.

    Attributes:
        kl: mean KL per token of the text, in nats.
        perplexity: geometric mean perplexity of what is generated, times that of what the unsteered model generates.
        repetition: mean share of different 2-grams, times that of the unsteered model; below this is flagged.
        questions: drop of the accuracy on side questions.
    """

    kl: float = 0.5
    perplexity: float = 2.0
    repetition: float = 0.5
    questions: float = 0.1


@dataclass(frozen=True)
class SweepOptions:
    """How `steering_sweep` measures; every default is the usual choice.

    Args:
        metric: the metric of the last token, a name that `PairTokens.metric` takes or a `Metric` of these prompts.
            "logit_diff" is the log-odds of answer against foil.
        where: the positions it acts on, in prompts and what follows them; what steers decides by default (for a
            `Direction` every position). With positions of generated tokens, add `Where.last_prompt()`: the first answer
            token is predicted there.
        text: neutral text that KL and loss are measured on; the prompts by default.
        text_where: the positions it acts on in that text, and in the questions; every one by default.
        questions: pairs whose right answers should survive: a drop of their accuracy is a side effect.
        generate_from: prompts to continue; by default the first `n_generated` of the prompts.
        n_generated: how many; 0 generates nothing.
        max_new_tokens: per prompt.
        temperature: 0 is greedy.
        controls: random directions of the same length beside each direction, measured alike; 0 for none.
        together: steer at all sites of a direction at once, instead of site by site.
        limits: what a dose may cost before it is flagged.
        seed: of the random directions and of sampling.
        batch_size: rows per forward; doses and prompts share them.
        progress: show a bar on stderr when it is a terminal.

    Raises:
        ConfigError: numbers that cannot be.
        WhereError: positions that are no `Where`.
    """

    metric: str | Metric = "logit_diff"
    where: Where | None = None
    text: Inputs | None = field(default=None, repr=False)
    text_where: Where | None = None
    questions: PromptPairs | PairTokens | None = field(default=None, repr=False)
    generate_from: Inputs | None = field(default=None, repr=False)
    n_generated: int = 8
    max_new_tokens: int = 20
    temperature: float = 0.0
    controls: int = 2
    together: bool = False
    limits: Limits = field(default_factory=Limits)
    seed: int = 0
    batch_size: int = 64
    progress: bool = True

    def __post_init__(self) -> None:
        for name, least in (("n_generated", 0), ("max_new_tokens", 1), ("controls", 0), ("batch_size", 1)):
            given = getattr(self, name)
            if type(given) is not int or given < least:
                raise ConfigError(f"SweepOptions({name}={given!r}): expected a whole number ≥ {least}")
        for name in ("where", "text_where"):
            if not isinstance(getattr(self, name), Where | None):
                raise WhereError(f"SweepOptions({name}={getattr(self, name)!r}): expected a Where, as Where(pos=-1)")
        for name, limit in self.limits._asdict().items():
            if not isinstance(limit, int | float) or math.isnan(limit) or limit < 0:
                raise ConfigError(f"Limits({name}={limit!r}): expected a number ≥ 0; math.inf switches it off")
