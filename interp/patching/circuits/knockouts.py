"""What is left of a circuit, or of the model, when parts of the circuit go: completeness and minimality.

Source: Wang et al. (2022), arXiv 2211.00593, §4.2 and §4.3. Departures: what is knocked out is edges or all edges of a
node, not heads at positions; sets are drawn, not searched for.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.errors import DataError
from interp.core.metrics import Metric
from interp.core.result import Result
from interp.core.stats import Estimate, bootstrap
from interp.data.pair_tokens import PairTokens
from interp.data.pairs import PromptPairs
from interp.patching.circuits.circuit import Circuit
from interp.patching.circuits.evaluate_circuit import CircuitRuns, EdgeAblation
from interp.patching.circuits.faithfulness import baselines, faithfulness, provenance_of

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

    from interp.core.manager import HookManager

__all__ = ["Completeness", "Minimality", "completeness", "minimality"]


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
