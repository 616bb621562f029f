"""From edge scores to circuits: the n highest, those above a threshold, greedily from the logits, or whole nodes.

Scores are a matrix [sender receiver]. "Signed" takes the largest scores first, which needs a method whose positive
scores mean that an edge helps the metric; "absolute" takes the largest magnitudes first, edges that hurt included.
Edges without a score (NaN) are never chosen. Ties fall to the earlier edge in [sender receiver] order.

Source: Hanna et al. (2024), arXiv 2403.17806, §2.2, for top-n and greedy selection.
"""

import heapq
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.errors import DataError, ShapeError
from interp.patching.circuits.circuit import Circuit
from interp.patching.graph import Graph

__all__ = [
    "counts_of",
    "edge_order",
    "edges_above",
    "greedy_edges",
    "random_edges",
    "random_like",
    "top_edges",
    "top_nodes",
]


def edge_order(
    graph: Graph, scores: Float[Tensor, "sender receiver"], *, absolute: bool = True
) -> Int[Tensor, "edge two"]:
    """Return the edges that have a score, best first.

    Args:
        graph: the graph.
        scores: a number per edge; entries outside the graph are not looked at.
        absolute: rank by magnitude.

    Returns:
        Rows and columns of the edges.

    Raises:
        ShapeError: scores of another shape.
    """
    ranked = _ranked(graph, scores, absolute)
    known = graph.allowed & ~ranked.isnan()
    places = known.nonzero()
    return places[ranked[known].argsort(descending=True, stable=True)]


def top_edges(
    graph: Graph, scores: Float[Tensor, "sender receiver"], n: int, *, absolute: bool = True, prune: bool = True
) -> Circuit:
    """Return the circuit of the n edges with the highest scores.

    Args:
        graph: the graph.
        scores: a number per edge.
        n: how many edges, before pruning.
        absolute: rank by magnitude.
        prune: leave out dead ends.

    Raises:
        ShapeError: scores of another shape.
        DataError: fewer than n edges have a score.
    """
    order = edge_order(graph, scores, absolute=absolute)
    _enough(n, len(order))
    edges = torch.zeros_like(graph.allowed)
    edges[tuple(order[:n].T)] = True
    return _made(graph, edges, scores, f"top {n:,} edges, {'absolute' if absolute else 'signed'}", prune)


def edges_above(
    graph: Graph,
    scores: Float[Tensor, "sender receiver"],
    threshold: float,
    *,
    absolute: bool = True,
    prune: bool = True,
) -> Circuit:
    """Return the circuit of the edges whose score is at least a threshold; arguments as for `top_edges`."""
    if threshold != threshold:
        raise DataError("threshold=nan: no score is at least that; give a number")
    edges = graph.allowed & (_ranked(graph, scores, absolute) >= threshold)
    return _made(graph, edges, scores, f"{'|score|' if absolute else 'score'} ≥ {threshold:.4g}", prune)


def greedy_edges(
    graph: Graph, scores: Float[Tensor, "sender receiver"], n: int, *, absolute: bool = True, prune: bool = True
) -> Circuit:
    """Return n edges taken one at a time, each the best of those that lead into what has been taken already.

    It begins at the logits; an edge makes its sender's own inputs available. So every edge leads to the logits, and a
    high score deep in the model counts once something above it was taken. Arguments as for `top_edges`.
    """
    ranked = _ranked(graph, scores, absolute)
    _enough(n, int((graph.allowed & ~ranked.isnan()).sum()))
    values, feeds = ranked.tolist(), graph.feeds
    candidates: list[tuple[float, int, int]] = []
    opened, reached = torch.zeros(len(graph.receivers), dtype=torch.bool), set()

    def offer(column: int) -> None:
        if not opened[column]:
            opened[column] = True
            for row in graph.allowed[:, column].nonzero().flatten().tolist():
                if values[row][column] == values[row][column]:
                    heapq.heappush(candidates, (-values[row][column], row, column))

    offer(len(graph.receivers) - 1)
    edges = torch.zeros_like(graph.allowed)
    for _ in range(n):
        if not candidates:
            break
        _, row, column = heapq.heappop(candidates)
        edges[row, column] = True
        if row not in reached:
            reached.add(row)
            for other in feeds[:, row].nonzero().flatten().tolist():
                offer(other)
    return _made(graph, edges, scores, f"greedy {n:,} edges, {'absolute' if absolute else 'signed'}", prune)


def top_nodes(graph: Graph, scores: Float[Tensor, " sender"], n: int, *, absolute: bool = True) -> Circuit:
    """Return the circuit of all edges between the n nodes with the highest scores, the input and the logits.

    Args:
        graph: the graph.
        scores: a number per sender; that of the input is not looked at.
        n: how many heads and MLPs.
        absolute: rank by magnitude.

    Raises:
        ShapeError: not one score per sender.
        DataError: fewer than n nodes have a score.
    """
    if tuple(scores.shape) != (len(graph.senders),):
        raise ShapeError(f"node scores {tuple(scores.shape)}: this graph has [sender] = [{len(graph.senders)}]")
    ranked = scores.detach().cpu().double()
    ranked = (ranked.abs() if absolute else ranked).nan_to_num(nan=-torch.inf)
    ranked[0] = -torch.inf
    _enough(n, int((ranked > -torch.inf).sum()), "nodes")
    chosen = ranked.argsort(descending=True, stable=True)[:n].tolist()
    return Circuit.of_nodes(graph, [graph.senders[row].name for row in chosen], name=f"top {n:,} nodes").pruned()


def random_edges(graph: Graph, n: int, *, seed: int = 0) -> Circuit:
    """Return n edges drawn at random, dead ends included: the null of a selection of n edges.

    Args:
        graph: the graph.
        n: how many.
        seed: of the draw; with one seed a larger draw holds the smaller ones.
    """
    _enough(n, graph.n_edges)
    places = graph.allowed.nonzero()
    chosen = places[torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))[:n]]
    edges = torch.zeros_like(graph.allowed)
    edges[tuple(chosen.T)] = True
    return Circuit(graph, edges, f"{n:,} random edges, seed {seed}")


def random_like(circuit: Circuit, *, seed: int = 0) -> Circuit:
    """Return a circuit of the same shape with other heads: each layer's heads are exchanged at random.

    It has as many edges between the same layers and of the same kinds (q, k, v), so it differs in nothing but in which
    heads they belong to. MLPs, the input and the logits stay. Under grouped queries whole groups are exchanged, and
    heads inside them.

    Args:
        circuit: the circuit.
        seed: of the exchange.
    """
    graph, draw = circuit.graph, torch.Generator().manual_seed(seed)
    group = graph.n_heads // graph.n_kv_heads
    rows, columns = torch.arange(len(graph.senders)), torch.arange(len(graph.receivers))
    for layer in range(graph.n_layers):
        groups = torch.randperm(graph.n_kv_heads, generator=draw)
        heads = [int(g) * group + torch.randperm(group, generator=draw) for g in groups]
        order = torch.cat(heads)
        for old, new in enumerate(order.tolist()):
            rows[graph.sender(f"a{layer}.h{old}")] = graph.sender(f"a{layer}.h{new}")
            columns[graph.receiver(f"a{layer}.h{old}<q>")] = graph.receiver(f"a{layer}.h{new}<q>")
        for old, new in enumerate(groups.tolist()):
            for kind in "kv":
                columns[graph.receiver(f"a{layer}.h{old}<{kind}>")] = graph.receiver(f"a{layer}.h{new}<{kind}>")
    edges = torch.zeros_like(circuit.edges)
    places = circuit.edges.nonzero()
    edges[rows[places[:, 0]], columns[places[:, 1]]] = True
    return Circuit(graph, edges, f"{circuit.name}, other heads, seed {seed}")


def counts_of(graph: Graph, fractions: Sequence[float]) -> list[int]:
    """Return how many edges each fraction of the graph is: rounded, at least one."""
    rising = all(not isinstance(f, str) and 0 < f <= 1 for f in fractions) and list(fractions) == sorted(set(fractions))
    if not rising or not len(fractions):
        raise DataError(f"fractions {list(fractions)}: expected rising numbers above 0 and up to 1")
    return [max(1, round(f * graph.n_edges)) for f in fractions]


def _ranked(graph: Graph, scores: Tensor, absolute: bool) -> Float[Tensor, "sender receiver"]:
    if scores.shape != graph.allowed.shape:
        raise ShapeError(
            f"scores {tuple(scores.shape)}: this graph has [sender receiver] = {list(graph.allowed.shape)}"
        )
    ranked = scores.detach().cpu().double()
    return ranked.abs() if absolute else ranked


def _enough(n: int, known: int, what: str = "edges") -> None:
    if type(n) is not int or not 0 <= n <= known:
        raise DataError(f"{n!r} {what} of {known} that have a score: expected a whole number from 0 to {known}")


def _made(graph: Graph, edges: Bool[Tensor, "sender receiver"], scores: Tensor, name: str, prune: bool) -> Circuit:
    made = Circuit(graph, edges, name, scores=scores.detach().cpu().float())
    return made.pruned() if prune else made
