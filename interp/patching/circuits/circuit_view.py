"""A circuit, and its curve, as a page to look through."""

import os
from pathlib import Path

from interp.patching.circuits.circuit import Circuit
from interp.patching.circuits.circuit_curve import CircuitCurve
from interp.patching.graph import Graph, Node

__all__ = ["write_circuit_html"]


def write_circuit_html(
    circuit: Circuit, path: str | os.PathLike[str], *, curve: CircuitCurve | None = None, notes: tuple[str, ...] = ()
) -> Path:
    """Write a self-contained page of a circuit: layers, edges, scores, roles, and faithfulness by size.

    Where the circuit has scores a slider shows its strongest edges first. For a slider over a whole ranking, give the
    circuit of many of its edges, such as `top_edges(graph, scores, 500, prune=False)`.

    Args:
        circuit: the circuit.
        path: file to write; an existing one is replaced in one step.
        curve: its faithfulness by size.
        notes: sentences for the reader.

    Returns:
        The path.
    """
    from interp.report.circuit_page import CircuitView, EdgeRow, NodeRow, write_circuit_page

    graph, chosen = circuit.graph, set(circuit.nodes) | {"input", "logits"}
    mlps = any(node.startswith("m") for node in chosen)
    nodes = [
        NodeRow(n.name, _label(n), _row(n, graph), _column(n, graph, mlps), circuit.roles.get(n.name, ""), _place(n))
        for n in (*graph.senders, graph.receivers[-1])
        if n.name in chosen
    ]
    edges = []
    for column, row in circuit.edges.T.nonzero().tolist():
        fed = tuple(graph.senders[s].name for s in graph.feeds[column].nonzero().flatten().tolist())
        score = None if circuit.scores is None else float(circuit.scores[row, column])
        edges.append(EdgeRow(graph.senders[row].name, fed or ("logits",), graph.receivers[column].kind, score))
    origin = circuit.provenance or (curve.provenance if curve else None)
    facts = {} if origin is None else {"model": origin.model, **{k: str(v) for k, v in origin.settings.items()}}
    view = CircuitView(
        title=circuit.name,
        subtitle=f"{circuit.n_edges:,} of {graph.n_edges:,} edges, {len(circuit.nodes)} nodes",
        nodes=nodes,
        edges=edges,
        curve={} if curve is None else curve.lines(),
        value="faithfulness",
        notes=notes,
        facts=facts,
    )
    return write_circuit_page(path, view)


def _label(node: Node) -> str:
    return f"{node.layer}.{node.head}" if node.kind == "head" else node.name


def _place(node: Node) -> str:
    places = {"head": f"layer {node.layer}, head {node.head}", "mlp": f"layer {node.layer}, MLP"}
    return places.get(node.kind, "")


def _column(node: Node, graph: Graph, mlps: bool) -> float:
    """Heads by their number, MLPs in a column of their own on the right."""
    heads = 0.88 if mlps else 1.0
    if node.kind == "head":
        return heads * (node.head + 0.5) / graph.n_heads
    return 1.0 if node.kind == "mlp" else heads / 2


def _row(node: Node, graph: Graph) -> int:
    if node.kind == "logits":
        return 2 * graph.n_layers + 1
    return 0 if node.kind == "input" else 2 * node.layer + (2 if node.kind == "mlp" else 1)
