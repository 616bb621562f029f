"""The card of a testbed model: what it can and cannot do, and which heads do it. Measured, never written by hand."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.intervention import Ablate
from interp.core.manager import HookManager
from interp.core.result import Provenance, Result
from interp.core.site import Site
from interp.core.where import Where
from interp.evaluate.tasks import TaskScores, repeat_loss, task_scores, text_loss
from interp.probing.induction import InductionScores, induction_scores

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

__all__ = ["WorldCard", "world_card"]

_INDUCTION = 0.3  # heads from this score on are ablated together
_FAILS = 0.9


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class WorldCard(Result):
    """What a model of the small world can do.

    Attributes:
        parameters: of the model, tied weights counted once.
        loss: nats per token on fresh text from training combinations, position 0 of each row left out.
        scores: every task on held-out combinations.
        repeat_first, repeat_second: nats per token on the first and second copy of random tokens.
        repeat_ablated: the second copy's, with the heads of `ablated` mean-ablated together.
        ablated: (layer, head) of all heads whose induction score is at least 0.3.
        heads: scores of every head.
    """

    title: ClassVar[str] = "Card of a model of the small world"
    parameters: int
    loss: float
    scores: TaskScores
    repeat_first: float
    repeat_second: float
    repeat_ablated: float
    ablated: list[tuple[int, int]]
    heads: InductionScores

    def to_frame(self) -> "pandas.DataFrame":
        """One row a task."""
        return self.scores.to_frame()

    def plot(self) -> "plotly.graph_objects.Figure":
        """Accuracy of each task beside chance."""
        return self.scores.plot()

    def summary(self) -> str:
        """The card as text."""
        return f"{self._opening()}\n\n{self.scores.summary()}\n\n{self.heads.summary()}"

    def to_markdown(self) -> str:
        """The card as a page of Markdown, the model card of its folder."""
        scores, name = self.scores, self.provenance.model
        rows = ["| task | accuracy | against foils | chance | logit difference |", "| --- | --- | --- | --- | --- |"]
        columns = (scores.accuracy, scores.choice_accuracy, scores.chance, scores.logit_diff)
        for task, *figures in zip(scores.tasks, *(column.tolist() for column in columns), strict=True):
            rows.append(f"| {task} | " + " | ".join(f"{figure:.2f}" for figure in figures) + " |")
        heads = ["| head | induction | duplicate | previous token |", "| --- | --- | --- | --- |"]
        kinds = (self.heads.induction, self.heads.duplicate, self.heads.previous_token)
        for layer, head in _strong(self.heads):
            heads.append(f"| L{layer}H{head} | " + " | ".join(f"{float(k[layer, head]):.2f}" for k in kinds) + " |")
        return "\n".join(
            [
                f"# {name}",
                "",
                "A language model of the small world, trained from nothing on its text alone. Measured by",
                f"`interp testbed card --model {name} --markdown`; a test measures it again.",
                "",
                self._opening(),
                "",
                f"Each task was asked {scores.n} times on combinations that training text never has. Accuracy is over",
                "the whole vocabulary; logit difference is the mean of right answers minus the mean of foils.",
                "",
                *rows,
                "",
                self._cannot(),
                "",
                f"Heads with a score of at least {_INDUCTION}, on repeated random tokens:",
                "",
                *heads,
            ]
        )

    def _opening(self) -> str:
        names = ", ".join(f"L{layer}H{head}" for layer, head in self.ablated) or "none"
        return (
            f"{self.parameters:,} parameters; {self.loss:.3f} nats per token on fresh text. Random tokens that repeat: "
            f"{self.repeat_first:.2f} nats on the first copy, {self.repeat_second:.2f} on the second, "
            f"{self.repeat_ablated:.2f} with the induction heads ({names}) mean-ablated together."
        )

    def _cannot(self) -> str:
        pairs = zip(self.scores.tasks, self.scores.accuracy.tolist(), strict=True)
        weak = [f"{name} ({figure:.2f})" for name, figure in pairs if figure < _FAILS]
        told = ", ".join(weak) if weak else "none"
        return f"Below {_FAILS} on held-out combinations, exact answer over the whole vocabulary: {told}."


def world_card(hm: HookManager, *, n: int = 200, seed: int = 0) -> WorldCard:
    """Measure a model of the small world.

    Args:
        hm: a model with the testbed's vocabulary, such as `HookManager.load("testbed")`.
        n: held-out examples of each task; a quarter as many rows for the losses.
        seed: of everything that is drawn.

    Raises:
        DataError: the model has another vocabulary.
        ConfigError: no examples.
    """
    heads = induction_scores(hm, seq_len=40, n_seqs=20, seed=seed)
    found = [(layer, head) for layer, head in _strong(heads) if float(heads.induction[layer, head]) >= _INDUCTION]
    n_rows = max(1, n // 4)
    plain = repeat_loss(hm, n=n_rows, seed=seed)
    ablated = plain
    if found:
        write = [Ablate(Site(f"{layer}.z"), "mean", where=Where(head=head)) for layer, head in found]
        ablated = repeat_loss(hm, n=n_rows, seed=seed, write=write)
    return WorldCard(
        provenance=Provenance.of(hm, settings={"n": n}, seed=seed),
        parameters=sum(p.numel() for p in hm.root.parameters()),
        loss=text_loss(hm, rows=n_rows, seed=seed),
        scores=task_scores(hm, n=n, seed=seed),
        repeat_first=plain.first,
        repeat_second=plain.second,
        repeat_ablated=ablated.second,
        ablated=found,
        heads=heads,
    )


def _strong(heads: InductionScores) -> list[tuple[int, int]]:
    """Heads with any score of at least 0.3, by layer and head."""
    best: Float[Tensor, "layer n_heads"] = torch.stack([heads.induction, heads.duplicate, heads.previous_token]).amax(0)
    return [(int(layer), int(head)) for layer, head in (best >= _INDUCTION).nonzero().tolist()]
