"""Circuits in other tools' files: the JSON of EAP-IG (and of the MIB circuit track), and GraphML."""

import json
import os
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import torch

from interp.core.disk import atomic_write
from interp.core.errors import ArtifactError, DataError, SiteError
from interp.patching.circuits.circuit import Circuit
from interp.patching.graph import Graph

__all__ = ["load_eap_ig", "write_eap_ig", "write_graphml"]


def write_eap_ig(circuit: Circuit, path: str | os.PathLike[str], *, d_model: int = 0) -> Path:
    """Write a circuit as EAP-IG's `Graph.to_json` does: every edge of the model, with its score and whether it is in.

    Under grouped queries an edge into a key or value head is written once for each query head of its group, for that
    tool counts them so. An edge without a score gets 1 where it is in the circuit and 0 where not.

    Args:
        circuit: the circuit.
        path: the file.
        d_model: width of the model, which the file's header names.

    Raises:
        DataError: a model with blocks that have no MLP, which that format cannot say.

    Source: github.com/hannamw/EAP-IG, src/eap/graph.py (the format alone).
    """
    graph = circuit.graph
    if not all(graph.mlps):
        raise DataError("EAP-IG's format knows no block without an MLP; use circuit.save or write_graphml")
    cfg = {"n_layers": graph.n_layers, "n_heads": graph.n_heads, "parallel_attn_mlp": graph.parallel}
    chosen = {*circuit.nodes, "logits"}
    nodes = {name: {"in_graph": name in chosen} for name in (*(n.name for n in graph.senders), "logits")}
    edges: dict[str, dict[str, Any]] = {}
    for column, row in graph.allowed.T.nonzero().tolist():
        inside = bool(circuit.edges[row, column])
        score = float("nan") if circuit.scores is None else float(circuit.scores[row, column])
        value = {"score": score if score == score else float(inside), "in_graph": inside}
        for name in _ungrouped(graph, column):
            edges[f"{graph.senders[row].name}->{name}"] = value
    record = {"cfg": {**cfg, "d_model": d_model}, "nodes": nodes, "edges": edges}
    return atomic_write(path, json.dumps(record, allow_nan=False))


def load_eap_ig(path: str | os.PathLike[str], graph: Graph, *, name: str = "") -> Circuit:
    """Read a circuit that EAP-IG wrote.

    Under grouped queries an edge into a key or value head is in the circuit where one of its copies is, and has the
    sum of their scores: that is the score of changing them all.

    Args:
        path: the file.
        graph: the graph of the model that it is about.
        name: what to call it; by default the file's name.

    Raises:
        ArtifactError: no such file, another format, or another model's sizes.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        cfg, held = record["cfg"], record["edges"]
        items = [(str(edge), bool(one["in_graph"]), float(one.get("score", 0.0))) for edge, one in held.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        raise ArtifactError(f"{path} is no circuit of EAP-IG ({type(err).__name__}: {err})") from err
    want = (graph.n_layers, graph.n_heads, graph.parallel)
    have = (cfg.get("n_layers"), cfg.get("n_heads"), bool(cfg.get("parallel_attn_mlp")))
    if have != want:
        raise ArtifactError(f"{path} is about (layers, heads, parallel) = {have}, and this model has {want}")
    edges, scores = torch.zeros_like(graph.allowed), torch.zeros(graph.allowed.shape)
    for edge, inside, score in items:
        try:
            place = graph.edge(_grouped(graph, edge))
        except SiteError as err:
            raise ArtifactError(f"{path} names an edge that this model lacks: {err}") from err
        edges[place] |= inside
        scores[place] += score
    return Circuit(graph, edges, name or Path(path).stem, scores=scores)


def write_graphml(circuit: Circuit, path: str | os.PathLike[str]) -> Path:
    """Write a circuit as GraphML, for Gephi, yEd, Cytoscape or networkx.

    Nodes are the input, heads, MLPs and the logits, with kind, layer, head and role; edges say what they are read as
    (q, k, v, mlp, logits) and have the score, where there is one.

    Args:
        circuit: the circuit.
        path: the file.
    """
    root = ET.Element("graphml", xmlns="http://graphml.graphdrawing.org/xmlns")
    keys = {"kind": "string", "layer": "int", "head": "int", "role": "string"}
    for name, kind in keys.items():
        ET.SubElement(root, "key", {"id": name, "for": "node", "attr.name": name, "attr.type": kind})
    for name, kind in {"reads": "string", "score": "double"}.items():
        ET.SubElement(root, "key", {"id": name, "for": "edge", "attr.name": name, "attr.type": kind})
    body = ET.SubElement(root, "graph", id=_xml(circuit.name), edgedefault="directed")
    chosen, graph = set(circuit.nodes), circuit.graph
    for node in (*graph.senders, graph.receivers[-1]):
        if node.name in chosen:
            one = ET.SubElement(body, "node", id=node.name)
            facts = {"kind": node.kind, "layer": node.layer, "head": node.head}
            for key, value in {**facts, "role": _xml(circuit.roles.get(node.name, ""))}.items():
                ET.SubElement(one, "data", key=key).text = str(value)
    for number, (column, row) in enumerate(circuit.edges.T.nonzero().tolist()):
        receiver = graph.receivers[column]
        for target in _targets(graph, column):
            ends = {"source": graph.senders[row].name, "target": target}
            edge = ET.SubElement(body, "edge", {"id": f"e{number}.{target}", **ends})
            ET.SubElement(edge, "data", key="reads").text = receiver.kind
            score = float("nan") if circuit.scores is None else float(circuit.scores[row, column])
            if score == score:
                ET.SubElement(edge, "data", key="score").text = repr(score)
    ET.indent(root, " ")
    return atomic_write(path, ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n")


def _targets(graph: Graph, column: int) -> list[str]:
    """The nodes that a receiver belongs to; a key head belongs to each head of its group."""
    found = [graph.senders[row].name for row in graph.feeds[column].nonzero().flatten().tolist()]
    return found or ["logits"]


def _ungrouped(graph: Graph, column: int) -> list[str]:
    kind = graph.receivers[column].kind
    if kind not in ("k", "v"):
        return [graph.receivers[column].name]
    return [f"{name}<{kind}>" for name in _targets(graph, column)]


def _grouped(graph: Graph, edge: str) -> str:
    """An edge of ours for one that counts a key and value head per query head."""
    sender, _, receiver = edge.partition("->")
    node, _, kind = receiver.partition("<")
    if kind not in ("k>", "v>"):
        return edge
    layer, _, head = node.partition(".h")
    group = graph.n_heads // graph.n_kv_heads
    return f"{sender}->{layer}.h{int(head) // group if head.isdigit() else head}<{kind}"


def _xml(text: str) -> str:
    """Text without what XML cannot hold."""
    return "".join(c for c in text if c in "\t\n\r" or c.isprintable())
