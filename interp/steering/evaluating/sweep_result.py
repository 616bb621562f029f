"""`SteeringSweep`: what every dose of every steering does, and what it costs."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.core.errors import DataError, nearest
from interp.core.result import Result
from interp.core.stats import Estimate, bootstrap

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

__all__ = ["FIGURES", "BestDose", "Slopes", "SteeringSweep", "least_squares_slopes"]

FIGURES = ("doses", "trade_off", "sites")
"""Effect against dose; effect against side effects; sites × doses."""


class Slopes(NamedTuple):
    """How the metric of each sample changes per unit of dose, by least squares over the doses of a sweep.

    Attributes:
        per_sample: one slope per sample.
        mean: mean slope, with its interval over samples.
        anti_steerable: share of samples whose slope is below 0, with its interval.
    """

    per_sample: Float[Tensor, " sample"]
    mean: Estimate
    anti_steerable: Estimate


class BestDose(NamedTuple):
    """The cell of a sweep that was chosen, and its figures."""

    steers: str
    site: str
    dose: float
    effect: float
    kl: float
    perplexity: float


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class SteeringSweep(Result):
    """Effects and side effects of steering; a cell is one steering at one site with one dose.

    What was not measured is NaN, or empty.

    Attributes:
        steers: name of what steers, by cell.
        sites: where it acts, by cell.
        doses: how much, by cell.
        unit: of the doses.
        control: whether the cell is of a random direction.
        metric: name of the metric.
        base: the metric of the unsteered model, per prompt.
        effect: its change, per prompt.
        signed: whether the metric is above 0 where the answer is preferred, so that there is an accuracy.
        kl: mean KL(unsteered ‖ steered) per token of the text, in nats.
        kl_high: its 95 % quantile over tokens.
        kl_on: what the text was.
        loss_change: change of the loss on it, in nats per token.
        perplexity: of what was generated, under the unsteered model, per generation prompt.
        base_perplexity: the same of what the unsteered model generates.
        distinct: different 1-, 2- and 3-grams / all of them, per generation prompt.
        base_distinct: of the unsteered model.
        compression: compressed / plain bytes of each text.
        base_compression: of the unsteered model.
        question_accuracy: share of the side questions that are answered right.
        base_question_accuracy: of the unsteered model.
        prompts: what texts continue.
        texts: what was generated, by cell and prompt.
        base_texts: by the unsteered model.
        failed: names of the limits that each cell broke, joined by ", "; "" where it passed.
        limits: the limits.
        notes: what a reader should know.
    """

    title: ClassVar[str] = "Steering sweep"
    steers: list[str]
    sites: list[str]
    doses: Float[Tensor, " cell"]
    unit: str
    control: Bool[Tensor, " cell"]
    metric: str
    base: Float[Tensor, " sample"]
    effect: Float[Tensor, "cell sample"]
    signed: bool
    kl: Float[Tensor, " cell"]
    kl_high: Float[Tensor, " cell"]
    kl_on: str
    loss_change: Float[Tensor, " cell"]
    perplexity: Float[Tensor, "cell prompt"]
    base_perplexity: Float[Tensor, " prompt"]
    distinct: Float[Tensor, "cell prompt n"]
    base_distinct: Float[Tensor, "prompt n"]
    compression: Float[Tensor, "cell prompt"]
    base_compression: Float[Tensor, " prompt"]
    question_accuracy: Float[Tensor, " cell"]
    base_question_accuracy: float
    prompts: list[str]
    texts: list[list[str]]
    base_texts: list[str]
    failed: list[str]
    limits: dict[str, float]
    notes: list[str] = field(default_factory=list)

    # -- values -------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.steers)

    @property
    def lines(self) -> list[tuple[str, str]]:
        """What steers and where: the cells that differ in the dose alone."""
        return list(dict.fromkeys(zip(self.steers, self.sites, strict=True)))

    def cells(self, steers: str | None = None, site: str | None = None) -> list[int]:
        """Return the numbers of the cells of one line, in the order of their doses.

        Args:
            steers: its name; may be left out where there is one apart from controls.
            site: its site; may be left out where there is one.

        Raises:
            DataError: no such cells, or several lines.
        """
        lines = [
            pair
            for pair in self.lines
            if (steers is None or pair[0] == steers)
            and (site is None or pair[1] == site)
            and (steers is not None or pair not in self._controls)
        ]
        if len(lines) != 1:
            asked = f"steers={steers!r}, site={site!r}"
            known = "; ".join(f"{a} at {b}" for a, b in self.lines)
            hint = nearest(steers or "", self.steers) or f"this sweep holds {known}"
            raise DataError(f"{asked} is {len(lines)} lines of this sweep, expected one; {hint}")
        return self._line(lines[0])

    def slopes(self, steers: str | None = None, site: str | None = None) -> Slopes:
        """Return the slope of each prompt's metric over the doses of one line; arguments as for `cells`.

        A slope is of the doses that were swept: choose them where the effect is still linear, such as −1.5 to 1.5.

        Raises:
            DataError: as for `cells`, or fewer than two doses.

        Source: Tan et al. (2024), "Analyzing the Generalization and Reliability of Steering Vectors", arXiv
            2407.12404, §3: steerability is this slope of the logit difference, and a prompt with a slope below 0 is
            anti-steerable. They count per prompt, as here.
        """
        cells = self.cells(steers, site)
        if len(cells) < 2:
            raise DataError("a slope needs two doses at least")
        values = least_squares_slopes(self.doses[cells], self.effect[cells])
        return Slopes(values, bootstrap(values), bootstrap((values < 0).double()))

    def estimate(self, cell: int) -> Estimate:
        """Return the mean effect of a cell with its interval over prompts."""
        return bootstrap(self.effect[cell])

    @property
    def accuracy(self) -> Float[Tensor, " cell"]:
        """Share of prompts whose metric is above 0; NaN where the metric has no such sign."""
        if not self.signed or not len(self.base):
            return torch.full((len(self),), torch.nan)
        return ((self.base + self.effect) > 0).float().mean(1).masked_fill(self.effect.isnan().any(1), torch.nan)

    def best(
        self, *, max_kl: float | None = None, max_perplexity: float | None = None, steers: str | None = None
    ) -> BestDose:
        """Return the cell with the largest mean effect that breaks no limit; controls are left out.

        Choose on other prompts than those that the result is reported on.

        Args:
            max_kl: mean KL per token, instead of the sweep's limits.
            max_perplexity: geometric mean over prompts, instead of the sweep's limits.
            steers: among the cells of this one alone.

        Raises:
            DataError: every cell breaks a limit; says which.
        """
        own = max_kl is None and max_perplexity is None
        ok = ~self.control
        if steers is not None:
            ok &= torch.tensor([name == steers for name in self.steers])
        considered = int(ok.sum())
        if own:
            ok &= torch.tensor([not names for names in self.failed])
        if max_kl is not None:
            ok &= self.kl <= max_kl
        if max_perplexity is not None:
            ok &= self.mean_perplexity <= max_perplexity
        mean = self.effect.mean(1) if self.effect.shape[1] else torch.full((len(self),), torch.nan)
        chosen = torch.where(ok & ~mean.isnan(), mean, -torch.inf)
        if not bool((chosen > -torch.inf).any()):
            limits = self.limits if own else {"max_kl": max_kl, "max_perplexity": max_perplexity}
            raise DataError(
                f"none of {considered} cells keeps to {limits} with an effect that was measured; try smaller doses, or "
                "other limits"
            )
        at = int(chosen.argmax())
        where = (self.steers[at], self.sites[at], float(self.doses[at]))
        return BestDose(*where, float(mean[at]), float(self.kl[at]), float(self.mean_perplexity[at]))

    @property
    def mean_perplexity(self) -> Float[Tensor, " cell"]:
        """Geometric mean of the perplexity over generation prompts."""
        return self.perplexity.log().mean(1).exp()

    @property
    def _controls(self) -> set[tuple[str, str]]:
        pairs = zip(self.steers, self.sites, self.control.tolist(), strict=True)
        return {(a, b) for a, b, random in pairs if random}

    def _line(self, line: tuple[str, str]) -> list[int]:
        cells = [i for i, pair in enumerate(zip(self.steers, self.sites, strict=True)) if pair == line]
        return sorted(cells, key=lambda i: float(self.doses[i]))

    # -- how it shows -------------------------------------------------------------------------------------------

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per cell."""
        import pandas as pd

        return pd.DataFrame(self.records())

    def records(self) -> list[dict[str, Any]]:
        """Return one record per cell: effect with its interval, the slope of its line, side effects, limits broken."""
        slopes: dict[tuple[str, str], Slopes | None] = {}
        for line in self.lines:
            several = len(self._line(line)) > 1 and self.effect.shape[1] > 0
            slopes[line] = self.slopes(*line) if several else None
        return [self._record(i, slopes[self.steers[i], self.sites[i]]) for i in range(len(self))]

    def _record(self, i: int, slopes: Slopes | None) -> dict[str, Any]:
        nothing = Estimate(*[float("nan")] * 3)
        effect = self.estimate(i)
        mean, anti = (nothing, nothing) if slopes is None else slopes[1:]
        distinct = self.distinct[i].nanmean(0).tolist()
        return {
            "steers": self.steers[i],
            "site": self.sites[i],
            "dose": float(self.doses[i]),
            "unit": self.unit,
            "control": bool(self.control[i]),
            "effect": effect.mean,
            "effect_low": effect.low,
            "effect_high": effect.high,
            "accuracy": float(self.accuracy[i]),
            "slope": mean.mean,
            "slope_low": mean.low,
            "slope_high": mean.high,
            "anti_steerable": anti.mean,
            "anti_steerable_low": anti.low,
            "anti_steerable_high": anti.high,
            "kl": float(self.kl[i]),
            "kl_q95": float(self.kl_high[i]),
            "loss_change": float(self.loss_change[i]),
            "perplexity": float(self.mean_perplexity[i]),
            "distinct_1": distinct[0],
            "distinct_2": distinct[1],
            "distinct_3": distinct[2],
            "compression": float(self.compression[i].nanmean()),
            "question_accuracy_drop": self.base_question_accuracy - float(self.question_accuracy[i]),
            "passed": not self.failed[i],
            "failed": self.failed[i],
        }

    def plot(self, *, kind: str = "doses", against: str = "perplexity") -> "plotly.graph_objects.Figure":
        """Draw the sweep.

        Args:
            kind: one of `FIGURES`. "doses": mean effect against dose with 95 % intervals, controls in grey, and faint
                lines of single prompts where one thing steers at one site; of plain prompts the KL instead.
                "trade_off": effect against a side effect, a point per dose; cells that break no limit are filled.
                "sites": effect by site and dose, cells that break a limit marked.
            against: for "trade_off": "perplexity", "kl" or "loss_change".

        Raises:
            DataError: another name, or nothing measured that it shows.
        """
        from interp.steering.evaluating.sweep_figures import draw

        return draw(self, kind, against)

    def page_parts(self) -> "list[tuple[str, pandas.DataFrame | plotly.graph_objects.Figure]]":
        """Return the trade-off, the map of sites, and what was generated."""
        parts: list[tuple[str, Any]] = []
        if self.effect.shape[1] and not bool(self.perplexity.isnan().all()):
            parts.append(("", self.plot(kind="trade_off")))
        if self.effect.shape[1] and len({site for _, site in self.lines}) > 1:
            parts.append(("", self.plot(kind="sites")))
        if self.prompts:
            parts.append(("What it says", self.said()))
        return parts

    def said(self) -> "pandas.DataFrame":
        """Return what was generated: a row per prompt and cell, the unsteered model's first, controls left out."""
        import pandas as pd

        rows = []
        for number, prompt in enumerate(self.prompts):
            rows.append(
                {"prompt": prompt, "steers": "nothing", "site": "", "dose": 0.0, "text": self.base_texts[number]}
            )
            for cell, texts in enumerate(self.texts):
                if not bool(self.control[cell]) and texts:
                    where = {"steers": self.steers[cell], "site": self.sites[cell], "dose": float(self.doses[cell])}
                    rows.append({"prompt": prompt, **where, "text": texts[number], "breaks": self.failed[cell]})
        return pd.DataFrame(rows).fillna("")

    def summary(self) -> str:
        """Give each line's slope, anti-steerable share and best dose, the controls, and the notes."""
        lines = [f"{len(self)} cells on {len(self.base)} prompts; effect on {self.metric}, doses in {self.unit}"]
        for name, site in (pair for pair in self.lines if pair not in self._controls):
            lines.append(self._line_summary(name, site))
        controls = [self.slopes(*pair) for pair in self._controls if len(self._line(pair)) > 1 and len(self.base)]
        if controls:
            values = torch.tensor([s.mean.mean for s in controls])
            lines.append(f"{len(controls)} random directions of equal length: mean slope {bootstrap(values)}")
        broken = [i for i, names in enumerate(self.failed) if names and not self.control[i]]
        for i in broken[:6]:
            lines.append(f"{self.steers[i]} at {self.sites[i]}, dose {float(self.doses[i]):g}: breaks {self.failed[i]}")
        if len(broken) > 6:
            lines.append(f"… and {len(broken) - 6} more cells break a limit")
        return "\n".join([*lines, *self.notes])

    def _line_summary(self, name: str, site: str) -> str:
        cells = self._line((name, site))
        parts = []
        if len(cells) > 1 and len(self.base):
            slopes = self.slopes(name, site)
            parts = [f"slope {slopes.mean} per {self.unit}", f"anti-steerable {slopes.anti_steerable.mean:.0%}"]
        kept = [i for i in cells if not self.failed[i]]
        if kept and len(self.base):
            top = max(kept, key=lambda i: float(self.effect[i].mean()))
            parts.append(f"most within limits {self.estimate(top)} at {float(self.doses[top]):g}")
        return f"{name} at {site}: " + "; ".join(parts or ["see the table"])


def least_squares_slopes(
    doses: Float[Tensor, " dose"], values: Float[Tensor, "dose sample"]
) -> Float[Tensor, " sample"]:
    """Return the least-squares slope of each sample's values over doses.

    Args:
        doses: at least two different ones.
        values: of each sample; a sample with a NaN gets NaN.
    """
    x = doses.double() - doses.double().mean()
    return ((x @ values.double()) / (x @ x)).float()
