"""`MethodsTable`: methods of steering beside each other, with what they detect, how they steer, and their controls."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.errors import ConfigError
from interp.core.result import Result
from interp.core.stats import Estimate, bootstrap

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

__all__ = ["MethodsTable"]

TASKS = ("detection", "hard", "steering")


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class MethodsTable(Result):
    """How well methods detect and steer concepts. NaN where a method does not do a task, or failed.

    Attributes:
        site: where methods read and act.
        methods: names.
        concepts: names.
        controls: methods that know nothing of the concept.
        detection: AUROC on held-out texts.
        hard: AUROC of held-out positives against hard negatives.
        steering: mean harmonic score, 0 to 2, on the prompts that did not choose the factor.
        concept_score: of it, the concept's part.
        fluency: of it, the fluency's part.
        factor: the chosen factor, in the unit of the comparison or the method's own.
        unsteered: the harmonic score without steering, by concept.
        failed: "concept / method" → why there is nothing.
        examples: "concept / method" → a prompt and what was generated at the chosen factor.
        notes: what a reader should know.
    """

    title: ClassVar[str] = "Methods of steering compared"
    site: str
    methods: list[str]
    concepts: list[str]
    controls: list[str]
    detection: Float[Tensor, "method concept"]
    hard: Float[Tensor, "method concept"]
    steering: Float[Tensor, "method concept"]
    concept_score: Float[Tensor, "method concept"]
    fluency: Float[Tensor, "method concept"]
    factor: Float[Tensor, "method concept"]
    unsteered: Float[Tensor, " concept"]
    failed: dict[str, str]
    examples: dict[str, str]
    notes: tuple[str, ...] = ()

    def __getitem__(self, key: tuple[str, str]) -> Estimate:
        """A method's mean over concepts of a task, with its 95 % interval: `table["lda", "steering"]`."""
        method, task = key
        return bootstrap(self._task(task)[self._row(method)])

    def over_control(self, method: str, task: str = "steering") -> Estimate:
        """Return a method's lead over the better control of each concept, with its 95 % interval over concepts.

        Args:
            method: its name.
            task: "detection", "hard" or "steering".

        Raises:
            ConfigError: unknown names, or a table without controls.
        """
        values = self._task(task)
        controls = [self._row(c) for c in self.controls if c != method]
        if not controls:
            raise ConfigError("no method of this table is a control; compare with 'random' or 'shuffled' among them")
        best = values[controls].nan_to_num(-math.inf).amax(0)
        return bootstrap(torch.where(best.isfinite(), values[self._row(method)] - best, math.nan))

    def beats_control(self, method: str, task: str = "steering") -> bool | None:
        """Say whether that lead's whole interval is above 0; None for a control, or where there is no number."""
        if method in self.controls or not self.controls:
            return None
        lead = self.over_control(method, task)
        return None if math.isnan(lead.mean) else lead.low > 0

    def _task(self, task: str) -> Float[Tensor, "method concept"]:
        if task not in TASKS:
            raise ConfigError(f"task={task!r}: expected one of {', '.join(TASKS)}")
        return {"detection": self.detection, "hard": self.hard, "steering": self.steering}[task]

    def _row(self, method: str) -> int:
        if method not in self.methods:
            raise ConfigError(f"there is no method {method!r}; there are {', '.join(self.methods)}")
        return self.methods.index(method)

    def to_frame(self) -> "pandas.DataFrame":
        """One row per method: means over concepts with their intervals, and whether it beats its control."""
        import pandas

        rows = []
        for i, method in enumerate(self.methods):
            row: dict[str, object] = {"method": method, "control": method in self.controls}
            for task in TASKS:
                found = self[method, task]
                row |= {task: found.mean, f"{task}_low": found.low, f"{task}_high": found.high}
                if task != "hard":
                    row[f"{task}_beats_control"] = self.beats_control(method, task)
            row |= {"concept_score": _mean(self.concept_score[i]), "fluency": _mean(self.fluency[i])}
            row["failed"] = sum(key.endswith(f" / {method}") for key in self.failed)
            rows.append(row)
        return pandas.DataFrame(rows)

    def by_concept(self) -> "pandas.DataFrame":
        """One row per method and concept, with every score."""
        import pandas

        names = ("detection", "hard", "steering", "concept_score", "fluency", "factor")
        return pandas.DataFrame(
            [
                {
                    "concept": concept,
                    "method": method,
                    **{name: float(getattr(self, name)[i, j]) for name in names},
                    "unsteered": float(self.unsteered[j]),
                    "failed": self.failed.get(f"{concept} / {method}", ""),
                }
                for j, concept in enumerate(self.concepts)
                for i, method in enumerate(self.methods)
            ]
        )

    def plot(self) -> "plotly.graph_objects.Figure":
        """Draw detection against steering, a point a method; detection alone where nothing was steered."""
        from interp.report.figures import Axis
        from interp.report.intervals import interval_bars
        from interp.report.methods import quadrants

        if bool(self.steering.isnan().all()):
            held = [self[m, "detection"] for m in self.methods]
            labels = Axis("method", self.methods)
            return interval_bars(held, labels=labels, title=self.title, value="detection AUROC", reference=0.5)
        estimates = {m: (self[m, "detection"], self[m, "steering"]) for m in self.methods}
        return quadrants(estimates, x="detection, AUROC", y="steering, 0 to 2", title=self.title, faint=self.controls)

    def summary(self) -> str:
        """Say which methods are best and which are no better than their control."""
        lines = [f"{len(self.methods)} methods on {len(self.concepts)} concepts at {self.site}"]
        for task in ("detection", "steering"):
            means = {m: self[m, task].mean for m in self.methods}
            known = [m for m in sorted(means, key=lambda m: -means[m]) if not math.isnan(means[m])]
            if not known:
                continue
            behind = [m for m in known if self.beats_control(m, task) is False]
            best = ", ".join(f"{m} {self[m, task]}" for m in known[:3])
            lines.append(f"{task}: {best}" + (f"; no better than a control: {', '.join(behind)}" if behind else ""))
        if not bool(self.unsteered.isnan().all()):
            lines.append(f"unsteered: {_mean(self.unsteered):.3g}")
        if self.failed:
            lines.append(f"not fitted: {', '.join(self.failed)}")
        return "\n".join([*lines, *self.notes])


def _mean(values: Tensor) -> float:
    return float(values.nanmean()) if not bool(values.isnan().all()) else math.nan
