"""A found circuit, or a ranking of edges, against one that is known.

Source: edge AUROC as in Conmy et al. (2023), arXiv 2304.14997, §4; precision and recall by size. Departure: the score
is the ranking itself, so no threshold has to be swept; ties count one half.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.core.errors import DataError, ShapeError
from interp.core.fit import auroc
from interp.core.result import Provenance, Result
from interp.patching.circuits.circuit import Circuit
from interp.patching.circuits.reference import ReferenceCircuit
from interp.patching.circuits.select_edges import counts_of, edge_order

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

__all__ = ["CircuitMatch", "compare"]

_SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class CircuitMatch(Result):
    """How far a circuit, or a ranking, agrees with a reference.

    Attributes:
        name: the reference.
        edge_auroc: probability that a reference edge outranks another one; NaN where the reference has no edges. Of a
            circuit without scores: of being in it.
        sizes: how many edges are taken, best first.
        precision: share of those that are in the reference.
        recall: share of the reference's edges that are among them.
        node_jaccard: nodes in both ÷ nodes in either (heads and MLPs), for the circuit, or for as many edges as the
            reference has.
        roles: role → (its nodes that were found, all its nodes).
        found: the nodes that were found and are in the reference.
        missing: those of the reference that were not found.
    """

    title: ClassVar[str] = "Circuit against a reference"
    name: str
    edge_auroc: float
    sizes: list[int]
    precision: Float[Tensor, " size"]
    recall: Float[Tensor, " size"]
    node_jaccard: float
    roles: dict[str, list[int]]
    found: list[str]
    missing: list[str]

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per size."""
        import pandas as pd

        columns = {"n_edges": self.sizes, "precision": self.precision.tolist(), "recall": self.recall.tolist()}
        return pd.DataFrame(columns)

    def plot(self) -> "plotly.graph_objects.Figure":
        """Draw precision and recall by size."""
        from interp.report.figures import Axis, line

        return line(
            {"precision": self.precision, "recall": self.recall},
            x=Axis("edges taken", [f"{n:,}" for n in self.sizes]),
            title=f"Edges of {self.name}",
            value="share",
        )

    def summary(self) -> str:
        """Give the AUROC, the nodes in common and the roles that were found."""
        roles = ", ".join(f"{role} {hit} of {n}" for role, (hit, n) in self.roles.items())
        lines = [f"{self.name}: edge AUROC {self.edge_auroc:.3f}, node Jaccard {self.node_jaccard:.3f}"]
        lines += [f"roles found: {roles}"] if roles else []
        return "\n".join(lines + ([f"missing: {', '.join(self.missing[:20])}"] if self.missing else []))


def compare(
    found: Circuit | Float[Tensor, "sender receiver"],
    reference: Circuit | ReferenceCircuit,
    *,
    absolute: bool = True,
    among: Bool[Tensor, "sender receiver"] | None = None,
) -> CircuitMatch:
    """Return how far a circuit, or a matrix of scores, agrees with a reference circuit.

    Args:
        found: a circuit (its scores rank its edges, where it has them) or a number per edge.
        reference: the known circuit, such as `reference_circuit` gives; one without edges is compared by nodes alone
            (those that have a role).
        absolute: rank by magnitude.
        among: the edges that are compared; all by default. For a reference of heads alone, give those between heads,
            for MLPs on the way count as part of an edge there and as nodes here.

    Raises:
        ShapeError: a circuit or scores of another graph.
        DataError: no edge to compare.
    """
    reference = reference.circuit if isinstance(reference, ReferenceCircuit) else reference
    graph = reference.graph
    if isinstance(found, Circuit) and found.graph != graph:
        raise ShapeError(f"{found!r} and {reference!r} are about models of different shapes")
    chosen = graph.allowed if among is None else graph.allowed & among
    if not bool(chosen.any()):
        raise DataError("there is no edge to compare; give another among=…")
    scores = found.edges.float() if isinstance(found, Circuit) else found.detach().cpu()
    if scores.shape != graph.allowed.shape:
        raise ShapeError(f"scores {tuple(scores.shape)}: this graph has [sender receiver] = {list(chosen.shape)}")
    if isinstance(found, Circuit) and found.scores is not None:
        known = found.edges & ~found.scores.isnan()
        size = found.scores.abs() if absolute else found.scores
        scores = torch.where(known, size - size[known].min() + 1.0 if bool(known.any()) else size, scores)
    truth = reference.edges & chosen
    ranked = (scores.abs() if absolute else scores)[chosen].nan_to_num(nan=-torch.inf)
    order = edge_order(graph, scores.masked_fill(~chosen, torch.nan), absolute=absolute)
    hits = truth[tuple(order.T)].double().cumsum(0)
    sizes = sorted({max(1, min(len(order), n * int(chosen.sum()) // graph.n_edges)) for n in counts_of(graph, _SIZES)})
    at = torch.tensor(sizes) - 1
    taken = found
    if not isinstance(taken, Circuit):
        mask = torch.zeros_like(graph.allowed)
        mask[tuple(order[: max(1, int(truth.sum()))].T)] = True
        taken = Circuit(graph, mask)
    ours, theirs = _inner(taken.nodes), _inner([*reference.nodes, *reference.roles])
    return CircuitMatch(
        provenance=reference.provenance or Provenance(model="", settings={"reference": reference.name}),
        name=reference.name,
        edge_auroc=float(auroc(ranked, truth[chosen])),
        sizes=sizes,
        precision=hits[at] / torch.tensor(sizes),
        recall=hits[at] / int(truth.sum()) if bool(truth.any()) else torch.full((len(sizes),), torch.nan),
        node_jaccard=len(ours & theirs) / len(ours | theirs) if ours | theirs else float("nan"),
        roles=_role_hits(reference, ours),
        found=[n.name for n in graph.senders if n.name in ours & theirs],
        missing=[n.name for n in graph.senders if n.name in theirs - ours],
    )


def _inner(nodes: object) -> set[str]:
    return {str(n) for n in nodes if n not in ("input", "logits")}  # type: ignore[attr-defined]


def _role_hits(reference: Circuit, ours: set[str]) -> dict[str, list[int]]:
    roles: dict[str, list[int]] = {}
    for node, role in reference.roles.items():
        hit, n = roles.setdefault(role, [0, 0])
        roles[role] = [hit + (node in ours), n + 1]
    return roles
