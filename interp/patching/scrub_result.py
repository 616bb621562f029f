"""`ScrubResult`: what a metric was, what a hypothesis kept of it, and what chance does."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.result import Result
from interp.core.stats import Estimate

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

__all__ = ["ScrubResult"]

_MIN_ERRORS = 3.0


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class ScrubResult(Result):
    """A metric of the model, scrubbed, and with every part named taken from any example.

    Attributes:
        claims: What the hypothesis says, in words.
        parts: Every part, heads one by one.
        partners: The example that each part's value was taken from.
        metric: Name of the metric.
        model: The metric of the model itself.
        scrubbed: With values of examples that agree.
        baseline: With values of any example.
        kept: How many values, over all draws and parts, stayed their example's own for want of a partner.
    """

    title: ClassVar[str] = "Scrubbing"
    claims: list[str]
    parts: list[str]
    partners: Int[Tensor, "resample part batch"]
    metric: str
    model: Float[Tensor, " batch"]
    scrubbed: Float[Tensor, "resample batch"]
    baseline: Float[Tensor, "resample batch"]
    kept: int

    @property
    def gap_is_clear(self) -> bool:
        """Whether model − baseline can be divided by: above rounding and above 3 standard errors."""
        gaps = (self.model - self.baseline.mean(0)).double()
        size = max(float(self.model.abs().max()), float(self.baseline.abs().max()), 1.0)
        error = float(gaps.std() / len(gaps) ** 0.5) if len(gaps) > 1 else 0.0
        return abs(float(gaps.mean())) > max(1e-5 * size, _MIN_ERRORS * error)

    def recovered(self, *, n_bootstrap: int = 1000, seed: int = 0) -> Estimate:
        """Return (scrubbed − baseline) / (model − baseline) of means: 1 keeps all, 0 is chance.

        NaN where the gap is not clear. The interval is over examples, each with the mean of its draws; numerator and
        denominator are resampled together.

        Args:
            n_bootstrap: resamples.
            seed: of the resampling.
        """
        if not self.gap_is_clear:
            return Estimate(torch.nan, torch.nan, torch.nan)
        base = self.baseline.double().mean(0)
        parts = torch.stack([self.scrubbed.double().mean(0) - base, self.model.double() - base])
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(len(base), (n_bootstrap, len(base)), generator=generator)
        shares = torch.zeros(n_bootstrap, len(base), dtype=torch.float64)
        shares.scatter_add_(1, drawn, torch.ones(drawn.shape, dtype=torch.float64))
        kept, whole = shares @ parts[0], shares @ parts[1]
        low, high = (kept / whole).nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return Estimate(float(parts[0].mean() / parts[1].mean()), low, high)

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per draw and example."""
        import pandas as pd

        rows = [
            {
                "resample": r,
                "example": b,
                "model": float(self.model[b]),
                "scrubbed": float(self.scrubbed[r, b]),
                "baseline": float(self.baseline[r, b]),
            }
            for r in range(len(self.scrubbed))
            for b in range(len(self.model))
        ]
        return pd.DataFrame(rows)

    def plot(self) -> "plotly.graph_objects.Figure":
        """Draw the mean metric of the model, scrubbed and at chance."""
        from interp.report.figures import Axis, bars

        means = torch.stack([self.model.mean(), self.scrubbed.mean(), self.baseline.mean()])
        return bars(means, labels=Axis("", ["model", "scrubbed", "any example"]), title="Scrubbing", value=self.metric)

    def summary(self) -> str:
        """Give the share recovered with its interval, and what was claimed."""
        found = self.recovered()
        draws = f"{len(self.model)} examples, {len(self.scrubbed)} draws"
        lines = [
            f"{self.metric}: model {float(self.model.mean()):.4g}, scrubbed {float(self.scrubbed.mean()):.4g}, any "
            f"example {float(self.baseline.mean()):.4g} ({draws})"
        ]
        lines.append(
            f"recovered {found.mean:.1%} [{found.low:.1%}, {found.high:.1%}]"
            if self.gap_is_clear
            else "the gap between the model and chance is not clear of zero, so nothing is divided by it"
        )
        lines += [f"claim: {claim}" for claim in self.claims]
        if self.kept:
            lines.append(f"{self.kept} of {self.partners.numel()} values stayed their own, for want of a partner")
        return "\n".join(lines)
