"""`PathPatchResult`: what senders do to a metric through receivers, and by which definition of "direct"."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.core.result import Result
from interp.core.stats import bootstrap_bounds, sign_flip_p

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

__all__ = ["DIRECT", "PathPatchResult"]

DIRECT = {
    "heads_frozen": "all heads held to the base run; MLPs and norms recomputed, so direct includes paths through MLPs",
    "all_frozen": "all heads and MLPs held to the base run; norms recomputed",
    "linear": "all heads, MLPs and the σ of norms held to the base run",
}
"""The definitions of "direct": what is held while a sender's change travels to the receivers."""

_MIN_ERRORS = 3.0


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class PathPatchResult(Result):
    """What each sender, or group of them, does to a metric through each group of receivers, per example.

    Attributes:
        senders: Labels of the senders: the rows.
        receivers: Labels of the groups of receivers: the columns.
        nodes: Names of the receivers of each group.
        layers: Layer of each sender; −1 for the input, −2 for a group.
        heads: Head of each sender; −1 for an MLP or the input, −2 for a group.
        direct: Which definition of "direct", a key of `DIRECT`.
        mode: "noise" (clean run, corrupted values put in) or "denoise" (corrupted run, clean values put in).
        metric: Name of the metric.
        patched: The metric with the path patched.
        base: The metric of the run that is patched.
        source: The metric of the run that values come from.
        blocked: Where there is no path from sender to receivers, or the sender is equal on both prompts everywhere.
    """

    title: ClassVar[str] = "Path patching"
    senders: list[str]
    receivers: list[str]
    nodes: list[list[str]]
    layers: list[int]
    heads: list[int]
    direct: str
    mode: str
    metric: str
    patched: Float[Tensor, "sender receiver batch"]
    base: Float[Tensor, " batch"]
    source: Float[Tensor, " batch"]
    blocked: Bool[Tensor, "sender receiver"]

    @property
    def definition(self) -> str:
        """What "direct" means here, in words."""
        return DIRECT[self.direct]

    @property
    def effect(self) -> Float[Tensor, "sender receiver batch"]:
        """Patched − base, in the metric's units, per example; exactly 0 where nothing could arrive."""
        return self.patched - self.base

    @property
    def gap(self) -> float:
        """Mean of source − base, in the metric's units."""
        return float((self.source - self.base).mean())

    @property
    def gap_is_clear(self) -> bool:
        """Whether the gap can be divided by: above rounding and, with several examples, above 3 standard errors."""
        gaps = (self.source - self.base).double()
        size = max(float(self.source.abs().max()), float(self.base.abs().max()), 1.0)
        error = float(gaps.std() / len(gaps) ** 0.5) if len(gaps) > 1 else 0.0
        return abs(float(gaps.mean())) > max(1e-5 * size, _MIN_ERRORS * error)

    def normalized(self) -> Float[Tensor, "sender receiver"]:
        """Return mean effect / mean gap: 0 is the base run, 1 the source run; NaN where the gap is not clear."""
        mean = self.effect.mean(-1)
        return mean / self.gap if self.gap_is_clear else torch.full_like(mean, torch.nan)

    def interval(
        self, *, n_bootstrap: int = 1000, seed: int = 0
    ) -> tuple[Float[Tensor, "sender receiver"], Float[Tensor, "sender receiver"]]:
        """Return the 95 % bootstrap bounds of the mean effect over examples.

        Args:
            n_bootstrap: resamples.
            seed: of the resampling.
        """
        return bootstrap_bounds(self.effect, n_bootstrap=n_bootstrap, seed=seed)

    def p_values(self) -> Float[Tensor, "sender receiver"]:
        """Return the two-sided sign-flip p of a mean effect of zero, not corrected for how many there are."""
        return sign_flip_p(self.effect)

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per sender, receiver and example."""
        import pandas as pd

        effect = self.effect
        rows = [
            {
                "sender": sender,
                "receiver": receiver,
                "direct": self.direct,
                "example": b,
                "patched": float(self.patched[s, r, b]),
                "effect": float(effect[s, r, b]),
                "blocked": bool(self.blocked[s, r]),
            }
            for s, sender in enumerate(self.senders)
            for r, receiver in enumerate(self.receivers)
            for b in range(effect.shape[2])
        ]
        return pd.DataFrame(rows)

    def plot(self) -> "plotly.graph_objects.Figure":
        """Draw layer × head where each sender is one head or MLP and there is one group of receivers, else all cells.

        The share of the gap where that is clear, else the raw effect; the title says which definition of "direct".
        """
        from interp.report.figures import Axis, heatmap

        shown = self.normalized() if self.gap_is_clear else self.effect.mean(-1)
        value = "share of the gap" if self.gap_is_clear else f"mean effect on {self.metric}"
        title = f"Path patching ({self.mode}), direct: {self.direct}"
        once = len(set(zip(self.layers, self.heads, strict=True))) == len(self.senders)
        if len(self.receivers) > 1 or not once or min(self.layers) < 0:
            rows, columns = Axis("sender", self.senders), Axis("receivers", self.receivers)
            return heatmap(shown, rows=rows, columns=columns, title=title, value=value, diverging=True)
        width = max(max(self.heads) + 1, 0)
        has_mlp = -1 in self.heads
        grid = torch.full((max(self.layers) + 1, width + has_mlp), torch.nan)
        for cell, layer, head in zip(shown[:, 0].tolist(), self.layers, self.heads, strict=True):
            grid[layer, head if head >= 0 else width] = cell
        labels = [str(h) for h in range(width)] + ["MLP"] * has_mlp
        return heatmap(
            grid,
            rows=Axis("layer", [str(layer) for layer in range(len(grid))]),
            columns=Axis("head", labels),
            title=f"{title}, into {self.receivers[0]}",
            value=value,
            diverging=True,
        )

    def summary(self) -> str:
        """Give both baselines, the definition and the strongest paths."""
        run, other = ("clean", "corrupted") if self.mode == "noise" else ("corrupted", "clean")
        mean = self.effect.mean(-1)
        low, high = self.interval()
        lines = [
            f"direct = {self.direct}: {self.definition}",
            f"{self.metric}: {run} run (base) {float(self.base.mean()):.4g}, with values of the {other} run; that run "
            f"itself {float(self.source.mean()):.4g} ({len(self.base)} examples)",
        ]
        for cell in mean.abs().flatten().topk(min(5, mean.numel())).indices.tolist():
            s, r = divmod(cell, len(self.receivers))
            if float(mean[s, r]) == 0.0:
                continue
            share = f", {float(mean[s, r]) / self.gap:.0%} of the gap" if self.gap_is_clear else ""
            bounds = f"[{float(low[s, r]):+.4g}, {float(high[s, r]):+.4g}]"
            lines.append(f"{self.senders[s]} → {self.receivers[r]}: {float(mean[s, r]):+.4g} {bounds}{share}")
        if not self.gap_is_clear:
            lines.append("the gap between the prompts is not clear of zero, so nothing is divided by it")
        if bool(self.blocked.any()):
            lines.append(f"{int(self.blocked.sum())} of {self.blocked.numel()} paths carry nothing: exactly 0")
        return "\n".join(lines)
