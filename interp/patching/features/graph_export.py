"""An attribution graph as the file that circuit-tracer's viewer and Neuronpedia read.

Source: the fields of circuit-tracer's graph files (github.com/decoderesearch/circuit-tracer, schema version 1).
Departure: an error is named "error_{layer}_{pos}", for circuit-tracer's "0_{layer}_{pos}" is also the name of a feature
of layer 0.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch

from interp.core.disk import atomic_write
from interp.core.errors import DataError
from interp.patching.features.attribution_graph import AttributionGraph

__all__ = ["graph_record", "to_circuit_tracer_json"]


def graph_record(
    graph: AttributionGraph, *, slug: str, scan: str, node_share: float = 0.8, edge_share: float = 0.98
) -> dict[str, Any]:
    """Return a pruned graph as circuit-tracer writes it: metadata, qParams, nodes and links.

    A feature's number is the Cantor pairing of layer and latent, (a + b)(a + b + 1)/2 + b; weights are signed.
    `influence` is, as there, the share of all influence that this node and all stronger ones hold.

    Args:
        graph: the graph.
        slug: its name.
        scan: name of the set of transcoders, under which a viewer looks features up.
        node_share, edge_share: as for `AttributionGraph.prune`.

    Raises:
        DataError: a logit that is no single token, which the format has no place for.
    """
    if bool((graph.target_coefficients != 0).sum(1).ne(1).any()):
        raise DataError("circuit-tracer's files hold logits of tokens, and this graph explains differences of them")
    kept = graph.prune(node_share=node_share, edge_share=edge_share)
    names, nodes = _nodes(graph, kept.nodes.tolist(), _cumulative(graph))
    n, n_sources = graph.n_features, graph.adjacency.shape[1]
    targets = [names[i] for i in range(n)] + names[n_sources:]
    places = kept.edges.nonzero()
    weights = graph.adjacency[kept.edges].tolist()
    links = [
        {"source": names[source], "target": targets[target], "weight": weight}
        for (target, source), weight in zip(places.tolist(), weights, strict=True)
    ]
    metadata = {
        "slug": slug,
        "scan": scan,
        "transcoder_list": [],
        "prompt_tokens": list(graph.tokens),
        "prompt": "".join(graph.tokens),
        "node_threshold": node_share,
        "schema_version": 1,
    }
    params = {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""}
    return {"metadata": metadata, "qParams": params, "nodes": nodes, "links": links}


def to_circuit_tracer_json(
    graph: AttributionGraph,
    path: str | os.PathLike[str],
    *,
    scan: str,
    node_share: float = 0.8,
    edge_share: float = 0.98,
) -> Path:
    """Write a pruned graph for circuit-tracer's viewer or Neuronpedia; an existing file is replaced in one step.

    Args:
        graph: the graph.
        path: file to write; its stem is the graph's slug.
        scan, node_share, edge_share: as for `graph_record`.

    Returns:
        The path.

    Raises:
        DataError: as for `graph_record`.
    """
    shares = {"node_share": node_share, "edge_share": edge_share}
    record = graph_record(graph, slug=Path(path).stem, scan=scan, **shares)
    return atomic_write(path, json.dumps(record, ensure_ascii=False, allow_nan=False, indent=1) + "\n")


def _cumulative(graph: AttributionGraph) -> list[float]:
    order = graph.influence.argsort(descending=True, stable=True)
    held = graph.influence[order].double().cumsum(0)
    share = torch.zeros_like(held).scatter(0, order, held / held[-1:].clamp_min(1e-10))
    return [float(x) for x in share]


def _nodes(graph: AttributionGraph, kept: list[bool], influence: list[float]) -> tuple[list[str], list[dict[str, Any]]]:
    """Every node's name, and the records of those that stay."""
    n, n_errors = graph.n_features, len(graph.error_layer)
    names, nodes = [], []
    rows = zip(graph.layer.tolist(), graph.latent.tolist(), graph.pos.tolist(), graph.value[:n].tolist(), strict=True)
    for layer, latent, pos, value in rows:
        names.append(f"{layer}_{latent}_{pos}")
        record = _record(names[-1], _cantor(layer, latent), str(layer), pos, "cross layer transcoder")
        nodes.append({**record, "jsNodeId": f"{layer}_{latent}-0", "activation": value})
    for layer, pos in zip(graph.error_layer.tolist(), graph.error_pos.tolist(), strict=True):
        names.append(f"error_{layer}_{pos}")
        record = _record(names[-1], -1, str(layer), pos, "mlp reconstruction error")
        nodes.append({**record, "jsNodeId": f"{layer}_{pos}-0"})
    for pos, token in enumerate(graph.ids.tolist()):
        names.append(f"E_{token}_{pos}")
        nodes.append({**_record(names[-1], pos, "E", pos, "embedding"), "jsNodeId": f"E_{token}-{pos}"})
    found = [{**node, "influence": share} for node, share, stays in zip(nodes, influence, kept, strict=True) if stays]
    assert len(nodes) == len(kept) == n + n_errors + len(graph.tokens)
    for i, name in enumerate(graph.target_names):
        token, prob = int(graph.target_columns[i, 0]), float(graph.target_prob[i])
        layer = str(graph.n_layers + 1)
        names.append(f"{layer}_{token}_{graph.target_pos}")
        record = _record(names[-1], token, layer, graph.target_pos, "logit")
        shown = {"jsNodeId": f"L_{token}-{graph.target_pos}", "clerp": f'Output "{name}" (p={prob:.3f})'}
        found.append({**record, **shown, "token_prob": prob, "is_target_logit": i == 0, "influence": None})
    return names, found


def _record(name: str, feature: int, layer: str, pos: int, kind: str) -> dict[str, Any]:
    return {
        "node_id": name,
        "feature": feature,
        "layer": layer,
        "ctx_idx": pos,
        "feature_type": kind,
        "token_prob": 0.0,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": name,
        "clerp": "",
        "influence": None,
        "activation": None,
    }


def _cantor(a: int, b: int) -> int:
    return (a + b) * (a + b + 1) // 2 + b
