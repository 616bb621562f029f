"""`CircuitCurve`: faithfulness against the size of the circuit, with the areas that sum it up and its null.

Source: Mueller et al. (2025), arXiv 2504.13151 (MIB), §3: CPR = ∫ f dk (higher is better) and CMD = ∫ |1 − f| dk (lower
is better) over the share k of edges, by the trapezoid rule. Departures: both are given for signed and for absolute
ranking (MIB runs CPR with the one and CMD with the other); beside the nominal share, the area over the share that is
left after pruning dead ends, and over log k; KL is summed over the vocabulary, not averaged.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.errors import DataError
from interp.core.metrics import Metric
from interp.core.result import Result
from interp.data.pair_tokens import PairTokens
from interp.data.pairs import PromptPairs
from interp.patching.circuits.circuit import Circuit
from interp.patching.circuits.evaluate_circuit import CircuitRuns, EdgeAblation
from interp.patching.circuits.faithfulness import (
    baselines,
    faithfulness,
    faithfulness_bounds,
    gap_is_clear,
    provenance_of,
)
from interp.patching.circuits.select_edges import counts_of, random_edges, random_like, top_edges

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

    from interp.core.manager import HookManager

__all__ = ["FRACTIONS", "CircuitCurve", "circuit_curve", "curve_area"]

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""The shares of edges at which MIB evaluates circuits."""

RANKINGS = ("absolute", "signed")
_ENOUGH = 0.85


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class CircuitCurve(Result):
    """Circuits of growing size, by signed and by absolute rank of their scores, beside random ones.

    Attributes:
        rankings: the rows of `values`: "absolute", "signed".
        fractions: nominal share of the edges, the columns.
        n_edges: edges asked for at each.
        kept: edges left after pruning, per ranking.
        values: the metric, per pair.
        random: that of as many edges drawn at random, per seed.
        random_kept: edges of those that are left after pruning.
        exchanged: that of the absolute ranking's circuits with the heads of each layer exchanged at random, per seed.
        clean: the metric of the whole model.
        empty: the metric without an edge.
        n_graph: edges of the whole model.
        metric, ablation: names.
    """

    title: ClassVar[str] = "Faithfulness by circuit size"
    rankings: list[str]
    fractions: list[float]
    n_edges: list[int]
    kept: Int[Tensor, "ranking size"]
    values: Float[Tensor, "ranking size pair"]
    random: Float[Tensor, "seed size pair"]
    random_kept: Int[Tensor, "seed size"]
    exchanged: Float[Tensor, "seed size pair"]
    clean: Float[Tensor, " pair"]
    empty: Float[Tensor, " pair"]
    n_graph: int
    metric: str
    ablation: str

    @property
    def faithfulness(self) -> Float[Tensor, "ranking size"]:
        """Share of the gap that each circuit keeps."""
        return faithfulness(self.values, self.clean, self.empty)

    @property
    def random_faithfulness(self) -> Float[Tensor, "seed size"]:
        """The same of as many random edges."""
        return faithfulness(self.random, self.clean, self.empty)

    @property
    def exchanged_faithfulness(self) -> Float[Tensor, "seed size"]:
        """The same of the circuits whose heads were exchanged."""
        return faithfulness(self.exchanged, self.clean, self.empty)

    def cpr(self, ranking: str = "signed", *, over: str = "nominal") -> float:
        """Return ∫ f dk; higher is better, and above 1 where edges that hurt are left out.

        Args:
            ranking: "signed" or "absolute".
            over: "nominal" share of edges, "kept" after pruning, or "log" of the nominal share.
        """
        return self._area(self.faithfulness[self._row(ranking)], self._row(ranking), over)

    def cmd(self, ranking: str = "absolute", *, over: str = "nominal") -> float:
        """Return ∫ |1 − f| dk; lower is better. Arguments as for `cpr`."""
        return self._area((1 - self.faithfulness[self._row(ranking)]).abs(), self._row(ranking), over)

    def smallest(self, ranking: str = "absolute", *, enough: float = _ENOUGH) -> float:
        """Return the smallest nominal share of edges with f ≥ enough; NaN where none is.

        Args:
            ranking: "signed" or "absolute".
            enough: the faithfulness asked for.
        """
        reached = (self.faithfulness[self._row(ranking)] >= enough).nonzero()
        return self.fractions[int(reached[0])] if len(reached) else math.nan

    def areas(self) -> dict[str, dict[str, float]]:
        """Return every area by ranking, and the mean areas of random edges and of exchanged heads."""
        found: dict[str, dict[str, float]] = {}
        for name in self.rankings:
            parts = {f"cpr_{over}": self.cpr(name, over=over) for over in ("nominal", "kept", "log")}
            parts |= {f"cmd_{over}": self.cmd(name, over=over) for over in ("nominal", "kept", "log")}
            found[name] = {**parts, "smallest": self.smallest(name)}
        share = torch.tensor(self.fractions, dtype=torch.float64)
        for name, f in (("random", self.random_faithfulness), ("exchanged", self.exchanged_faithfulness)):
            if len(f):
                areas = [(curve_area(share, one), curve_area(share, (1 - one).abs())) for one in f]
                cpr, cmd = (sum(part) / len(areas) for part in zip(*areas, strict=True))
                found[name] = {"cpr_nominal": cpr, "cmd_nominal": cmd}
        return found

    def lines(self) -> dict[str, tuple[Float[Tensor, " size"], Float[Tensor, " size"]]]:
        """Return each line of the figure as (shares of edges, faithfulness), random circuits by their mean."""
        share, f = torch.tensor(self.fractions), self.faithfulness
        found = {name: (share, f[i]) for i, name in enumerate(self.rankings)}
        for name, null in (
            ("random edges", self.random_faithfulness),
            ("heads exchanged", self.exchanged_faithfulness),
        ):
            if len(null):
                found[name] = (share, null.mean(0))
        return found

    def _row(self, ranking: str) -> int:
        if ranking not in self.rankings:
            raise DataError(f"ranking {ranking!r}: expected one of {', '.join(self.rankings)}")
        return self.rankings.index(ranking)

    def _area(self, f: Tensor, row: int, over: str) -> float:
        if over not in ("nominal", "kept", "log"):
            raise DataError(f"over={over!r}: expected 'nominal', 'kept' or 'log'")
        share = torch.tensor(self.fractions, dtype=torch.float64)
        if over == "kept":
            share = self.kept[row].double() / self.n_graph
        return curve_area(share, f, log=over == "log")

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per ranking (and random seed) and size."""
        import pandas as pd

        rows = []
        nulls = [f"{what} {i}" for what in ("random", "exchanged") for i in range(len(self.random))]
        rankings = [*self.rankings, *nulls]
        values = torch.cat([self.values, self.random, self.exchanged])
        kept = torch.cat([self.kept, self.random_kept, self.kept[:1].expand(len(self.exchanged), -1)])
        low, high = faithfulness_bounds(values, self.clean, self.empty)
        f = faithfulness(values, self.clean, self.empty)
        for r, name in enumerate(rankings):
            for k, share in enumerate(self.fractions):
                row = {"ranking": name, "share": share, "n_edges": self.n_edges[k], "kept": int(kept[r, k])}
                row |= {"value": float(values[r, k].mean()), "faithfulness": float(f[r, k])}
                rows.append(row | {"low": float(low[r, k]), "high": float(high[r, k])})
        return pd.DataFrame(rows)

    def plot(self) -> "plotly.graph_objects.Figure":
        """Draw faithfulness against the share of edges, both rankings with their intervals, and random circuits."""
        from interp.report.circuit_figures import size_curve

        clear = gap_is_clear(self.clean, self.empty)
        lines = {}
        for r, name in enumerate(self.rankings):
            if clear:
                low, high = faithfulness_bounds(self.values[r], self.clean, self.empty)
                lines[name] = (self.faithfulness[r], low, high)
            else:
                mean = self.values[r].double().mean(-1)
                lines[name] = (mean, mean, mean)
        nulls = {"random edges": self.random, "heads exchanged in each layer": self.exchanged}
        for name, values in nulls.items():
            if len(values):
                f = faithfulness(values, self.clean, self.empty) if clear else values.double().mean(-1)
                lines[f"{name}, {len(f)} seeds"] = (f.mean(0), f.min(0).values, f.max(0).values)
        ends = (1.0, 0.0) if clear else (float(self.clean.mean()), float(self.empty.mean()))
        return size_curve(
            lines,
            torch.tensor(self.fractions),
            ends={"whole model": ends[0], "no edge": ends[1]},
            title=f"Faithfulness by circuit size ({self.metric}, removed edges by {self.ablation})",
            value="faithfulness" if clear else self.metric,
        )

    def summary(self) -> str:
        """Give the areas of both rankings and of random circuits, and the smallest circuit that is enough."""
        lines = [baselines(self.metric, self.ablation, self.clean, self.empty)]
        for name, one in self.areas().items():
            text = f"{name}: CPR {one['cpr_nominal']:.3f}, CMD {one['cmd_nominal']:.3f}"
            if "smallest" in one:
                text += f", CMD over log k {one['cmd_log']:.3f}, f ≥ {_ENOUGH} from {one['smallest']:.1%} of the edges"
            lines.append(text.replace("nan%", "no share"))
        return "\n".join(lines)


def curve_area(share: Float[Tensor, " size"], values: Float[Tensor, " size"], *, log: bool = False) -> float:
    """Return the area under a curve by the trapezoid rule, from its first to its last place.

    Args:
        share: places, rising; equal ones (circuits that pruning left equally large) add nothing.
        values: what is integrated.
        log: over log share, divided by its range, so that a constant keeps its value.
    """
    x = share.double().log() if log else share.double()
    area, width = float(torch.trapezoid(values.double(), x)), float(x[-1] - x[0])
    return (area / width if width else math.nan) if log else area


def circuit_curve(
    hm: "HookManager",
    pairs: PromptPairs | PairTokens,
    scores: Float[Tensor, "sender receiver"],
    *,
    fractions: Sequence[float] = FRACTIONS,
    metric: str | Metric = "logit_diff",
    ablation: str | EdgeAblation = "patching",
    n_random: int = 3,
    seed: int = 0,
) -> CircuitCurve:
    """Return the faithfulness of the best-scored edges at each share of the graph, exactly.

    Cost: 2 (1 + n_random) · fractions forwards, fewer where circuits are equal, and 2.

    Args:
        hm: the model.
        pairs: the pairs that circuits are judged on; take others than those that gave the scores.
        scores: a number per edge; for the signed ranking, positive where an edge helps the metric.
        fractions: shares of the graph's edges, rising.
        metric: a name that `PairTokens.metric` knows, or a `Metric`.
        ablation: what removed edges carry.
        n_random: how many random circuits of each kind are the null at each size: as many edges drawn at random, and
            the absolute ranking's own circuit with the heads of each layer exchanged.
        seed: of the first of them.

    Raises:
        DataError: fractions that are none, or edges without a score.
        ModelError, ShapeError: as `CircuitRuns`.
    """
    runs = CircuitRuns(hm, pairs, metric=metric, ablation=ablation)
    counts = counts_of(runs.graph, fractions)
    if len(counts) < 2:
        raise DataError(f"fractions {list(fractions)}: a curve needs two at least; evaluate_circuits takes one circuit")
    chosen = [[top_edges(runs.graph, scores, n, absolute=name == "absolute") for n in counts] for name in RANKINGS]
    chosen += [[random_edges(runs.graph, n, seed=seed + i).pruned() for n in counts] for i in range(n_random)]
    chosen += [[random_like(c, seed=seed + i) for c in chosen[0]] for i in range(n_random)]
    flat: dict[Circuit, int] = {}
    for one in (c for row in chosen for c in row):
        flat.setdefault(one, len(flat))
    found = runs.values(list(flat))
    values = torch.stack([torch.stack([found[flat[c]] for c in row]) for row in chosen])
    kept = torch.tensor([[c.n_edges for c in row] for row in chosen])
    n = len(RANKINGS)
    return CircuitCurve(
        provenance=provenance_of(runs, {"fractions": list(fractions), "n_random": n_random}, seed=seed),
        rankings=list(RANKINGS),
        fractions=[float(f) for f in fractions],
        n_edges=counts,
        kept=kept[:n],
        values=values[:n],
        random=values[n : n + n_random],
        random_kept=kept[n : n + n_random],
        exchanged=values[n + n_random :],
        clean=runs.clean,
        empty=runs.empty,
        n_graph=runs.graph.n_edges,
        metric=runs.metric.name,
        ablation=runs.ablation.kind,
    )
