"""`HeadEffects`: the table of causal indirect effects, head by head, with its intervals."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.errors import DataError, nearest
from interp.core.result import Result
from interp.core.stats import bootstrap_bounds, sign_flip_p

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

__all__ = ["HeadEffects"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class HeadEffects(Result):
    """How much each head's mean output raises the answer in prompts that do not show the function.

    Attributes:
        tasks: their names.
        patched: log-probability of the answer with one head replaced, in nats; NaN where it was not measured.
        clean: log-probability of the answer in the prompts with true shots.
        corrupted: the same in the corrupted prompts as they are.
        z: each task's mean head outputs at the last token.
        written: the same as `head_vectors` takes them.
        resid: each task's mean residual stream after each block, at the last token.
        solved: how many validation items the model solves, in words.
        corruption: what took the function out of the prompts.
        n_shots: shots of a prompt.
        notes: what a reader should know.
    """

    title: ClassVar[str] = "Causal indirect effects of heads"
    tasks: list[str]
    patched: Float[Tensor, "task trial layer n_heads"]
    clean: Float[Tensor, "task trial"]
    corrupted: Float[Tensor, "task trial"]
    z: Float[Tensor, "task layer n_heads d_head"]
    written: Float[Tensor, "task layer n_heads d_head"]
    resid: Float[Tensor, "task layer d_model"]
    solved: list[str]
    corruption: str
    n_shots: int
    notes: list[str] = field(default_factory=list)

    @property
    def effects(self) -> Float[Tensor, "task trial layer n_heads"]:
        """The change of the answer's probability, CIE."""
        return self.patched.exp() - self.corrupted.exp()[..., None, None]

    @property
    def log_effects(self) -> Float[Tensor, "task trial layer n_heads"]:
        """The change of the answer's log-probability, in nats."""
        return self.patched - self.corrupted[..., None, None]

    @property
    def by_task(self) -> Float[Tensor, "task layer n_heads"]:
        """The mean effect over the trials of each task, AIE."""
        return self.effects.nanmean(1)

    @cached_property
    def aie(self) -> Float[Tensor, "layer n_heads"]:
        """The mean effect over tasks: what ranks heads."""
        return self.by_task.nanmean(0)

    @property
    def room(self) -> Float[Tensor, " task"]:
        """p(answer) with true shots − p(answer) in the corrupted prompts: what all heads together could bring back."""
        return (self.clean.exp() - self.corrupted.exp()).nanmean(1)

    def of(self, task: str) -> "HeadEffects":
        """Return one task's effects."""
        i = self.index(task)
        names = ("patched", "clean", "corrupted", "z", "written", "resid")
        held = {name: getattr(self, name)[i : i + 1] for name in names}
        rest = {"tasks": [task], "solved": [self.solved[i]], "corruption": self.corruption, "n_shots": self.n_shots}
        return HeadEffects(provenance=self.provenance, **held, **rest, notes=self.notes)  # type: ignore[arg-type]

    def index(self, task: str) -> int:
        """Return where a task stands.

        Raises:
            DataError: it is none of these.
        """
        if task not in self.tasks:
            raise DataError(
                f"no effects of {task!r}; {nearest(task, self.tasks) or 'they are of ' + ', '.join(self.tasks)}"
            )
        return self.tasks.index(task)

    def top(self, n: int) -> list[tuple[int, int]]:
        """Return the n heads of the largest mean effect over tasks, as (layer, head); those not measured are left out.

        Args:
            n: how many.
        """
        flat = self.aie.flatten()
        order = flat.nan_to_num(-torch.inf).argsort(descending=True, stable=True)
        kept = [i for i in order.tolist() if not bool(flat[i].isnan())][:n]
        return [divmod(i, self.aie.shape[1]) for i in kept]

    def interval(self, *, n_bootstrap: int = 1000, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Return the 95 % bootstrap interval of the mean effect over trials of all tasks, [layer n_heads] each."""
        return bootstrap_bounds(self._pooled(), n_bootstrap=n_bootstrap, seed=seed)

    def p_values(self, *, n_flips: int = 9999, seed: int = 0) -> Float[Tensor, "layer n_heads"]:
        """Return the sign-flip p of each head's mean effect; not corrected for the number of heads."""
        values = self._pooled()
        found = sign_flip_p(values, n_flips=n_flips, seed=seed)
        return torch.where(values.isnan().any(-1), torch.nan, found)

    def _pooled(self) -> Float[Tensor, "layer n_heads trial"]:
        return self.effects.flatten(0, 1).movedim(0, -1)

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per head: the mean over tasks with interval and p, and each task's own mean."""
        import pandas as pd

        layers, heads = self.aie.shape
        low, high = self.interval()
        columns = {
            "aie": self.aie,
            "low": low,
            "high": high,
            "p": self.p_values(),
            "aie_log_prob": self.log_effects.nanmean(1).nanmean(0),
        }
        several = {name: self.by_task[i] for i, name in enumerate(self.tasks)} if len(self.tasks) > 1 else {}
        places = [divmod(i, heads) for i in range(layers * heads)]
        frame = {"layer": [layer for layer, _ in places], "head": [head for _, head in places]}
        return pd.DataFrame(frame | {name: x.flatten().tolist() for name, x in (columns | several).items()})

    def plot(self, *, task: str | None = None) -> "plotly.graph_objects.Figure":
        """Draw the effects as layers × heads.

        Args:
            task: one of `tasks`; None takes the mean over them.
        """
        from interp.report.figures import Axis, heatmap

        values = self.aie if task is None else self.by_task[self.index(task)]
        what = (self.tasks[0] if len(self.tasks) == 1 else f"{len(self.tasks)} tasks") if task is None else task
        title = f"Average indirect effect of heads: {what}"
        value = "change of p(answer)"
        return heatmap(values, rows=Axis("layer"), columns=Axis("head"), title=title, value=value, diverging=True)

    def summary(self) -> str:
        """Name the strongest heads, and what there was to bring back."""
        n = self.patched.shape[1]
        best = ", ".join(f"L{layer}H{head} {float(self.aie[layer, head]):+.3f}" for layer, head in self.top(5))
        prob = [float(x.exp().nanmean()) for x in (self.clean, self.corrupted)]
        lines = [
            f"{len(self.tasks)} tasks × {n} trials, {self.n_shots} shots, corruption {self.corruption!r}",
            f"p(answer) {prob[0]:.3f} with true shots, {prob[1]:.3f} without",
            f"largest mean effects: {best}",
        ]
        return "\n".join([*lines, *self.notes])
