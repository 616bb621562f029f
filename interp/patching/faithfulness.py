"""How much of a model's metric a circuit keeps: faithfulness, completeness, minimality, over one circuit or a list.

With m(C) the metric's mean over the pairs when only the edges of C carry their own values, N the whole model and ∅ no
edge: faithfulness f(C) = (m(C) − m(∅)) / (m(N) − m(∅)), a ratio of means, not clipped.

Source: Wang et al. (2022), arXiv 2211.00593, §4 (faithfulness, completeness, minimality); Hanna et al. (2024), arXiv
2403.17806, §3, for faithfulness as a share. Departure: what is knocked out is edges or all edges of a node, not heads
at positions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.errors import DataError
from interp.core.metrics import Metric
from interp.core.result import Provenance, Result
from interp.core.stats import Estimate, bootstrap
from interp.data.pair_tokens import PairTokens
from interp.data.pairs import PromptPairs
from interp.patching.circuit import Circuit
from interp.patching.evaluate_circuit import CircuitRuns, EdgeAblation

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

    from interp.core.manager import HookManager

__all__ = [
    "CircuitScores",
    "Completeness",
    "Minimality",
    "baselines",
    "completeness",
    "evaluate_circuits",
    "faithfulness",
    "faithfulness_bounds",
    "gap_is_clear",
    "minimality",
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
    chosen = [circuits] if isinstance(circuits, Circuit) else list(circuits)
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


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Completeness(Result):
    """Whether a circuit holds everything that the model does for the task.

    Attributes:
        rest: the metric of the model without the circuit's edges, m(N∖C).
        knocked: the nodes of each knockout K, drawn from the circuit's own.
        circuit: m(C∖K), per knockout.
        model: m(N∖K), per knockout.
        clean, empty: the ends.
        metric, ablation: names.
    """

    title: ClassVar[str] = "Completeness"
    rest: Float[Tensor, " pair"]
    knocked: list[list[str]]
    circuit: Float[Tensor, "knockout pair"]
    model: Float[Tensor, "knockout pair"]
    clean: Float[Tensor, " pair"]
    empty: Float[Tensor, " pair"]
    metric: str
    ablation: str

    @property
    def rest_faithfulness(self) -> float:
        """What of the gap the model keeps without the circuit: near 0 where the circuit is complete."""
        return float(faithfulness(self.rest, self.clean, self.empty))

    @property
    def incompleteness(self) -> Float[Tensor, " knockout"]:
        """|f(C∖K) − f(N∖K)| of each knockout."""
        ends = (self.clean, self.empty)
        return (faithfulness(self.circuit, *ends) - faithfulness(self.model, *ends)).abs()

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per knockout."""
        import pandas as pd

        ends = (self.clean, self.empty)
        return pd.DataFrame(
            {
                "knockout": [" ".join(k) for k in self.knocked],
                "n_nodes": [len(k) for k in self.knocked],
                "circuit": faithfulness(self.circuit, *ends).tolist(),
                "model": faithfulness(self.model, *ends).tolist(),
                "incompleteness": self.incompleteness.tolist(),
            }
        )

    def plot(self) -> "plotly.graph_objects.Figure":
        """Draw the circuit under each knockout against the model under it."""
        from interp.report.circuit_figures import against

        ends = (self.clean, self.empty)
        return against(
            faithfulness(self.circuit, *ends),
            faithfulness(self.model, *ends),
            labels=[" ".join(k) for k in self.knocked],
            title="Completeness: the same nodes taken from both",
            names=("faithfulness of the circuit without K", "faithfulness of the model without K"),
        )

    def summary(self) -> str:
        """Give what the rest of the model can do, and how far circuit and model part."""
        worst = self.incompleteness
        lines = [baselines(self.metric, self.ablation, self.clean, self.empty)]
        lines.append(
            f"model without the circuit: faithfulness {self.rest_faithfulness:.3f} (0 where nothing is missing)"
        )
        if len(worst):
            at = int(worst.nan_to_num(-1.0).argmax())
            lines.append(
                f"{len(worst)} knockouts of the circuit's own nodes: incompleteness {float(worst.mean()):.3f} on "
                f"average, {float(worst[at]):.3f} at most ({' '.join(self.knocked[at])})"
            )
        return "\n".join(lines)


def completeness(
    hm: "HookManager",
    pairs: PromptPairs | PairTokens,
    circuit: Circuit,
    *,
    metric: str | Metric = "logit_diff",
    ablation: str | EdgeAblation = "patching",
    n_knockouts: int = 20,
    seed: int = 0,
) -> Completeness:
    """Return whether the model still does the task without a circuit, and whether both react alike to knockouts.

    Each knockout takes each node of the circuit (input and logits aside) with probability one half, as in the paper.

    Args:
        hm: the model.
        pairs: the pairs.
        circuit: the circuit.
        metric, ablation: as for `evaluate_circuits`.
        n_knockouts: how many sets of nodes are drawn.
        seed: of the draw.

    Source: Wang et al. (2022), §4.2. Departure: no greedy search for the worst set.
    """
    runs = CircuitRuns(hm, pairs, metric=metric, ablation=ablation)
    nodes = [n for n in circuit.nodes if n not in ("input", "logits")]
    draw = torch.Generator().manual_seed(seed)
    coins = [torch.rand(len(nodes), generator=draw) < 0.5 for _ in range(n_knockouts)]
    knocked = [[n for n, on in zip(nodes, coin.tolist(), strict=True) if on] for coin in coins]
    whole = Circuit.full(runs.graph)
    both = [circuit.without(k) for k in knocked] + [whole.without(k) for k in knocked]
    values = runs.values([whole - circuit, *both])
    return Completeness(
        provenance=provenance_of(runs, {"circuit": circuit.name, "n_knockouts": n_knockouts}, seed=seed),
        rest=values[0],
        knocked=knocked,
        circuit=values[1 : 1 + n_knockouts],
        model=values[1 + n_knockouts :],
        clean=runs.clean,
        empty=runs.empty,
        metric=runs.metric.name,
        ablation=runs.ablation.kind,
    )


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Minimality(Result):
    """What each part of a circuit is good for: how much the circuit loses without it.

    Attributes:
        parts: edges or nodes.
        loss: m(C) − m(C without the part), in the metric's units, per pair.
        gap: m(N) − m(∅), to divide by.
        value: m(C).
        metric, ablation: names.
    """

    title: ClassVar[str] = "Minimality"
    parts: list[str]
    loss: Float[Tensor, "part pair"]
    gap: float
    value: float
    metric: str
    ablation: str

    def estimates(self) -> list[Estimate]:
        """Return each part's mean loss with its 95 % bootstrap interval over pairs."""
        return [bootstrap(one) for one in self.loss]

    def useless(self, share: float = 0.01) -> list[str]:
        """Return the parts without which less than a share of the gap is lost, or gained.

        Args:
            share: of the gap, 0 to 1.
        """
        small = self.loss.double().mean(1).abs() < share * abs(self.gap)
        return [part for part, on in zip(self.parts, small.tolist(), strict=True) if on]

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per part."""
        import pandas as pd

        found = self.estimates()
        return pd.DataFrame(
            {
                "part": self.parts,
                "loss": [e.mean for e in found],
                "low": [e.low for e in found],
                "high": [e.high for e in found],
                "share_of_gap": [e.mean / self.gap if self.gap else math.nan for e in found],
            }
        )

    def plot(self) -> "plotly.graph_objects.Figure":
        """Draw what is lost without each part, the largest first."""
        from interp.report.figures import Axis, bars

        mean = self.loss.double().mean(1)
        order = mean.argsort(descending=True, stable=True)[:64]
        return bars(
            mean[order],
            labels=Axis("", [self.parts[i] for i in order.tolist()]),
            title="What the circuit loses without each part",
            value=f"loss of {self.metric}",
        )

    def summary(self) -> str:
        """Name the parts that matter most and count those that do not."""
        mean = self.loss.double().mean(1)
        order = mean.abs().argsort(descending=True, stable=True)[:5].tolist()
        best = ", ".join(f"{self.parts[i]} {float(mean[i]):+.4g}" for i in order)
        idle = len(self.useless())
        return (
            f"circuit: {self.metric} {self.value:.4g} (removed edges by {self.ablation})\nlost without: {best}\n"
            f"{idle} of {len(self.parts)} parts move less than 1 % of the gap"
        )


def minimality(
    hm: "HookManager",
    pairs: PromptPairs | PairTokens,
    circuit: Circuit,
    *,
    by: str = "node",
    metric: str | Metric = "logit_diff",
    ablation: str | EdgeAblation = "patching",
) -> Minimality:
    """Return what a circuit loses without each of its nodes, or each of its edges.

    Args:
        hm: the model.
        pairs: the pairs.
        circuit: the circuit.
        by: "node" (all edges of it go) or "edge".
        metric, ablation: as for `evaluate_circuits`.

    Raises:
        DataError: another `by`, or a circuit without parts.

    Source: Wang et al. (2022), §4.3. Departure: a part is taken from the whole circuit, not from a chosen subset K.
    """
    if by not in ("node", "edge"):
        raise DataError(f"by={by!r}: expected 'node' or 'edge'")
    if by == "node":
        parts = [n for n in circuit.nodes if n not in ("input", "logits")]
        without = [circuit.without([n]) for n in parts]
    else:
        parts = circuit.names()
        without = [circuit - Circuit.of(circuit.graph, [name]) for name in parts]
    if not parts:
        raise DataError(f"{circuit!r} has no {by}s to take away")
    runs = CircuitRuns(hm, pairs, metric=metric, ablation=ablation)
    values = runs.values([circuit, *without])
    return Minimality(
        provenance=provenance_of(runs, {"circuit": circuit.name, "by": by}),
        parts=parts,
        loss=values[0] - values[1:],
        gap=float(runs.clean.double().mean() - runs.empty.double().mean()),
        value=float(values[0].double().mean()),
        metric=runs.metric.name,
        ablation=runs.ablation.kind,
    )
