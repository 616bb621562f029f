"""How much of a model's metric a circuit keeps: its faithfulness, for circuits side by side.

With m(C) the metric's mean over the pairs when only the edges of C carry their own values, N the whole model and ∅ no
edge: faithfulness f(C) = (m(C) − m(∅)) / (m(N) − m(∅)), a ratio of means, not clipped.

Source: Hanna et al. (2024), arXiv 2403.17806, §3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.errors import DataError
from interp.core.metrics import Metric
from interp.core.result import Provenance, Result
from interp.data.pair_tokens import PairTokens
from interp.data.pairs import PromptPairs
from interp.patching.circuits.circuit import Circuit
from interp.patching.circuits.evaluate_circuit import CircuitRuns, EdgeAblation

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

    from interp.core.manager import HookManager

__all__ = [
    "CircuitScores",
    "baselines",
    "evaluate_circuits",
    "faithfulness",
    "faithfulness_bounds",
    "gap_is_clear",
    "provenance_of",
]

# Below so many standard errors, the gap between the whole model and no edge is not told from nothing.
_MIN_ERRORS = 3.0


def faithfulness(
    values: Float[Tensor, "*circuit pair"], clean: Float[Tensor, " pair"], empty: Float[Tensor, " pair"]
) -> Float[Tensor, "*circuit"]:
    """Return (m(C) − m(∅)) / (m(N) − m(∅)), in double precision; NaN where the gap below is not clear of zero.

    Args:
        values: the metric of each circuit on each pair.
        clean: that of the whole model, m(N).
        empty: that without an edge, m(∅).
    """
    low, high = empty.double().mean(), clean.double().mean()
    found = (values.double().mean(-1) - low) / (high - low)
    return found if gap_is_clear(clean, empty) else torch.full_like(found, torch.nan)


def faithfulness_bounds(
    values: Float[Tensor, "*circuit pair"],
    clean: Float[Tensor, " pair"],
    empty: Float[Tensor, " pair"],
    *,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> tuple[Float[Tensor, "*circuit"], Float[Tensor, "*circuit"]]:
    """Return the 95 % percentile interval of `faithfulness`, by drawing pairs again, numerator and denominator alike.

    Args:
        values, clean, empty: as for `faithfulness`.
        n_bootstrap: resamples.
        seed: of the resampling.
    """
    n = values.shape[-1]
    drawn = torch.randint(n, (n_bootstrap, n), generator=torch.Generator().manual_seed(seed))
    shares = torch.zeros(n_bootstrap, n, dtype=torch.float64)
    shares.scatter_add_(1, drawn, torch.full(drawn.shape, 1.0 / n, dtype=torch.float64))
    low, high = shares @ empty.double(), shares @ clean.double()
    found = (values.reshape(-1, n).double() @ shares.T - low) / (high - low)
    at = torch.tensor([0.025, 0.975], dtype=torch.float64)
    below, above = found.quantile(at, dim=1).reshape(2, *values.shape[:-1])
    if not gap_is_clear(clean, empty):
        return torch.full_like(below, torch.nan), torch.full_like(above, torch.nan)
    return below, above


def gap_is_clear(clean: Float[Tensor, " pair"], empty: Float[Tensor, " pair"]) -> bool:
    """Whether m(N) − m(∅) can be divided by: above rounding and, with several pairs, above 3 standard errors."""
    gaps = clean.double() - empty.double()
    size = max(float(clean.abs().max()), float(empty.abs().max()), 1.0)
    error = float(gaps.std() / len(gaps) ** 0.5) if len(gaps) > 1 else 0.0
    return abs(float(gaps.mean())) > max(1e-5 * size, _MIN_ERRORS * error)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class CircuitScores(Result):
    """Circuits side by side.

    Attributes:
        names: what they are called.
        n_edges: how many edges each has.
        n_graph: how many the whole model has.
        values: the metric of each, per pair.
        clean: the metric of the whole model.
        empty: the metric without an edge.
        metric: its name.
        ablation: what removed edges carry.
    """

    title: ClassVar[str] = "Circuits"
    names: list[str]
    n_edges: list[int]
    n_graph: int
    values: Float[Tensor, "circuit pair"]
    clean: Float[Tensor, " pair"]
    empty: Float[Tensor, " pair"]
    metric: str
    ablation: str

    @property
    def faithfulness(self) -> Float[Tensor, " circuit"]:
        """Share of the gap between no edge and the whole model that each circuit keeps."""
        return faithfulness(self.values, self.clean, self.empty)

    def bounds(self) -> tuple[Float[Tensor, " circuit"], Float[Tensor, " circuit"]]:
        """Return the 95 % bootstrap interval of the faithfulness over pairs."""
        return faithfulness_bounds(self.values, self.clean, self.empty)

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per circuit."""
        import pandas as pd

        low, high = self.bounds()
        return pd.DataFrame(
            {
                "circuit": self.names,
                "n_edges": self.n_edges,
                "share_of_edges": [n / self.n_graph for n in self.n_edges],
                "value": self.values.double().mean(1).tolist(),
                "faithfulness": self.faithfulness.tolist(),
                "low": low.tolist(),
                "high": high.tolist(),
            }
        )

    def plot(self) -> "plotly.graph_objects.Figure":
        """Draw each circuit's faithfulness, or its metric where the gap is not clear."""
        from interp.report.figures import Axis, bars

        clear = gap_is_clear(self.clean, self.empty)
        return bars(
            self.faithfulness if clear else self.values.double().mean(1),
            labels=Axis("", self.names),
            title=f"Circuits: {self.metric}, removed edges by {self.ablation}",
            value="faithfulness" if clear else self.metric,
        )

    def summary(self) -> str:
        """Give the baselines and each circuit's share."""
        lines = [baselines(self.metric, self.ablation, self.clean, self.empty)]
        low, high = self.bounds()
        for i, name in enumerate(self.names[:12]):
            share = f"{self.n_edges[i]:,} of {self.n_graph:,} edges"
            f = f"{float(self.faithfulness[i]):.3f} [{float(low[i]):.3f}, {float(high[i]):.3f}]"
            lines.append(f"{name}: {share}, {self.metric} {float(self.values[i].mean()):.4g}, faithfulness {f}")
        return "\n".join(lines)


def baselines(metric: str, ablation: str, clean: Tensor, empty: Tensor) -> str:
    """Say what the two ends of a faithfulness are."""
    ends = f"{metric}: whole model {float(clean.mean()):.4g}, no edge {float(empty.mean()):.4g}"
    text = f"{ends} ({len(clean)} pairs; removed edges by {ablation})"
    return text if gap_is_clear(clean, empty) else f"{text}; the gap is not clear of zero, so nothing is divided by it"


def evaluate_circuits(
    hm: "HookManager",
    pairs: PromptPairs | PairTokens,
    circuits: Circuit | Sequence[Circuit],
    *,
    metric: str | Metric = "logit_diff",
    ablation: str | EdgeAblation = "patching",
    progress: bool = True,
) -> CircuitScores:
    """Return the metric and the faithfulness of circuits, exactly, one forward each.

    Args:
        hm: the model.
        pairs: the pairs.
        circuits: one or several.
        metric: a name that `PairTokens.metric` knows, or a `Metric`.
        ablation: what removed edges carry: "patching", "zero", "mean", "mean_positional", or an `EdgeAblation`.
        progress: show a bar on stderr when it is a terminal.

    Raises:
        ModelError, DataError, ShapeError: as `CircuitRuns`; and no circuit.
    """
    chosen: list[Circuit] = []
    for one in circuits if isinstance(circuits, Sequence) else [circuits]:
        if not isinstance(one, Circuit):
            raise DataError(
                f"{type(one).__name__} is no Circuit; make one with top_edges(…), or take reference.circuit"
            )
        chosen.append(one)
    if not chosen:
        raise DataError("no circuit was given; give one, or several")
    runs = CircuitRuns(hm, pairs, metric=metric, ablation=ablation)
    return CircuitScores(
        provenance=provenance_of(runs, {"circuits": [c.name for c in chosen]}),
        names=[c.name for c in chosen],
        n_edges=[c.n_edges for c in chosen],
        n_graph=runs.graph.n_edges,
        values=runs.values(chosen, progress=progress),
        clean=runs.clean,
        empty=runs.empty,
        metric=runs.metric.name,
        ablation=runs.ablation.kind,
    )


def provenance_of(runs: CircuitRuns, settings: dict[str, object], *, seed: int | None = None) -> Provenance:
    """Return where a measurement of circuits came from."""
    said = {"pairs": runs.pairs.name, "metric": runs.metric.name, "ablation": runs.ablation.kind, **settings}
    return Provenance.of(runs.hm, settings=said, data=(runs.pairs.clean.ids, runs.pairs.corrupted.ids), seed=seed)
