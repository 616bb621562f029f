"""A page about one attribution graph: tokens along x, layers along y, nodes to click through with what goes in and out.

The page is one file. Its content-security policy names the one style and the one script that it holds by their
hashes, and allows nothing else: nothing is fetched, and no text of a tokenizer can become code.
"""

import html
import os
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from interp.core.disk import atomic_write
from interp.core.errors import DataError
from interp.report.dictionary_page import content_hash
from interp.report.html import json_block, render, visible

if TYPE_CHECKING:
    from interp.patching.features.attribution_graph import AttributionGraph

__all__ = ["framed_graph", "graph_page", "write_graph_page"]

_MOST_NODES, _MOST_LINKS = 3000, 30_000
_STEP, _LINE, _PER_LINE = 15, 16, 6  # pixels between nodes of a cell, between its lines; nodes on a line
_GUTTER, _LEAST_COLUMN, _LOGIT_COLUMN, _ROW_GAP, _TOP = 64, 58, 128, 20, 14


def graph_page(
    graph: "AttributionGraph", *, node_share: float = 0.8, edge_share: float = 0.98, framed: bool = False
) -> str:
    """Return the page as an HTML document.

    Args:
        graph: the graph.
        node_share, edge_share: what is shown; as for `AttributionGraph.prune`.
        framed: leave the heading and the outer margin out, for a frame in a notebook.

    Raises:
        DataError: more nodes or edges than a page can show.
    """
    data = _data(graph, node_share, edge_share)
    style, script = render("graph.css.j2", {}), render("graph.js.j2", {})
    names = ", ".join(visible(name) for name in graph.target_names[:5])
    values = {
        "title": f"{graph.title}: {names}{' …' if len(graph.target_names) > 5 else ''}",
        "subtitle": f"{graph.provenance.model} · {len(graph.tokens)} tokens · {graph.n_features:,} of "
        f"{graph.n_active:,} active features in the graph, {_count(data, 'feature'):,} shown",
        "cards": _cards(graph),
        "facts": _facts(graph),
        "data": json_block(data),
        "style": style,
        "script": script,
        "style_hash": content_hash(style),
        "script_hash": content_hash(script),
        "framed": framed,
    }
    return str(render("graph.html.j2", values))


def write_graph_page(
    path: str | os.PathLike[str], graph: "AttributionGraph", *, node_share: float = 0.8, edge_share: float = 0.98
) -> Path:
    """Write the page; an existing file is replaced in one step.

    Args:
        path: file to write; parent folders are made.
        graph, node_share, edge_share: as for `graph_page`.

    Returns:
        The path.

    Raises:
        DataError: as for `graph_page`.
    """
    return atomic_write(path, graph_page(graph, node_share=node_share, edge_share=edge_share))


def framed_graph(graph: "AttributionGraph") -> Markup:
    """Return the page in a frame that isolates its script, for a notebook.

    Args:
        graph: the graph to show.
    """
    framed = html.escape(graph_page(graph, framed=True))
    style = "width:100%;height:760px;border:0"
    return Markup(f'<iframe sandbox="allow-scripts" title="{graph.title}" style="{style}" srcdoc="{framed}"></iframe>')


# -- what the page says in words ------------------------------------------------------------------------------------


def _error_share(graph: "AttributionGraph") -> float:
    return 1.0 - graph.replacement_score


def _cards(graph: "AttributionGraph") -> list[dict[str, str]]:
    """The graph's scores; how much ends in errors always stands there."""
    whole = float(graph.adjacency[graph.n_features :, graph.n_features : -len(graph.tokens)].abs().sum())
    direct = whole / max(float(graph.adjacency[graph.n_features :].abs().sum()), 1e-10)
    return [
        {
            "name": "Ends in errors",
            "value": f"{_error_share(graph):.0%}",
            "beside": f"of the logits' influence; {direct:.0%} of their direct input",
            "meaning": "Share of all ways into the logits that end in what transcoders miss, and not in tokens.",
        },
        {
            "name": "Replacement score",
            "value": f"{graph.replacement_score:.3f}",
            "beside": "tokens / (tokens + errors)",
            "meaning": "Share of all ways into the logits that go through features to the tokens.",
        },
        {
            "name": "Completeness score",
            "value": f"{graph.completeness_score:.3f}",
            "beside": "of what nodes get comes from no error",
            "meaning": "Share of each node's input that is no error, nodes counted by their influence.",
        },
    ]


def _facts(graph: "AttributionGraph") -> list[tuple[str, str]]:
    source = graph.provenance
    known: dict[str, Any] = {"model": source.model, "revision": source.revision, "configuration": source.config_hash}
    known |= {"data": source.data_hash, **source.settings, **{f"{k} version": v for k, v in source.versions.items()}}
    return [(name, visible(str(value))) for name, value in known.items() if value is not None]


def _count(data: dict[str, Any], kind: str) -> int:
    return sum(node["kind"] == kind for node in data["nodes"])


# -- nodes, edges and where they stand -------------------------------------------------------------------------------


def _data(graph: "AttributionGraph", node_share: float, edge_share: float) -> dict[str, Any]:
    kept = graph.prune(node_share=node_share, edge_share=edge_share)
    sources = kept.nodes.nonzero()[:, 0].tolist()
    places = kept.edges.nonzero().tolist()
    if len(sources) > _MOST_NODES or len(places) > _MOST_LINKS:
        raise DataError(
            f"{len(sources):,} nodes and {len(places):,} edges are too many for a page ({_MOST_NODES:,} and "
            f"{_MOST_LINKS:,}); give a smaller node_share or edge_share"
        )
    n, n_sources = graph.n_features, graph.adjacency.shape[1]
    nodes = [_source(graph, i) for i in sources] + [_logit(graph, k) for k in range(len(graph.target_names))]
    at = {source: i for i, source in enumerate(sources)}
    row_of = {
        **{i: at[i] for i in sources if i < n},
        **{n + k: len(sources) + k for k in range(len(graph.target_names))},
    }
    weights = graph.adjacency[kept.edges].tolist()
    links = [[at[s], row_of[t], _rounded(w)] for (t, s), w in zip(places, weights, strict=True)]
    _rank(nodes, [float(graph.influence[i]) for i in sources], n_sources)
    for target, i in row_of.items():
        nodes[i]["input"] = _input(graph, target)
    return {"tokens": [visible(t) for t in graph.tokens], "nodes": nodes, "links": links, **_placed(graph, nodes)}


def _source(graph: "AttributionGraph", i: int) -> dict[str, Any]:
    n, n_errors = graph.n_features, len(graph.error_layer)
    if i < n:
        layer, pos, latent = int(graph.layer[i]), int(graph.pos[i]), int(graph.latent[i])
        name = f"L{layer} latent {latent}"
        return {"kind": "feature", "row": layer + 1, "pos": pos, "name": name, "value": _rounded(float(graph.value[i]))}
    if i < n + n_errors:
        layer, pos = int(graph.error_layer[i - n]), int(graph.error_pos[i - n])
        whole = bool(graph.error_whole[i - n])
        return {"kind": "error", "row": layer + 1, "pos": pos, "name": f"L{layer} {'MLP' if whole else 'error'}"}
    pos = i - n - n_errors
    return {"kind": "token", "row": 0, "pos": pos, "name": visible(graph.tokens[pos])}


def _logit(graph: "AttributionGraph", k: int) -> dict[str, Any]:
    prob = float(graph.target_prob[k])
    return {
        "kind": "logit",
        "row": graph.n_layers + 1,
        "pos": graph.target_pos,
        "name": visible(graph.target_names[k]),
        "value": _rounded(float(graph.value[graph.n_features + k])),
        **({"prob": _rounded(prob)} if prob > 0 else {}),
    }


def _rank(nodes: list[dict[str, Any]], influence: list[float], n_sources: int) -> None:
    """Each node's influence, and the share of it that this one and all stronger ones hold; logits come first."""
    total, held = max(sum(influence), 1e-10), 0.0
    for i in sorted(range(len(influence)), key=lambda i: -influence[i]):
        held += influence[i]
        nodes[i] |= {"influence": _rounded(influence[i]), "rank": _rounded(held / total)}
    for node in nodes[len(influence) :]:
        node |= {"influence": None, "rank": 0.0}


def _input(graph: "AttributionGraph", target: int) -> dict[str, float]:
    """What a node gets from features, tokens, errors, biases, and features that are not in the graph: signed sums."""
    row, n, n_tokens = graph.adjacency[target], graph.n_features, len(graph.tokens)
    errors = row[n : len(row) - n_tokens]
    return {
        "features": _rounded(float(row[:n].sum())),
        "tokens": _rounded(float(row[len(row) - n_tokens :].sum())),
        "errors": _rounded(float(errors.sum())),
        "biases": _rounded(float(graph.constant[target])),
        "not in the graph": _rounded(float(graph.left_out[target])),
        "error share": _rounded(float(errors.abs().sum() / row.abs().sum().clamp_min(1e-10))),
    }


def _placed(graph: "AttributionGraph", nodes: list[dict[str, Any]]) -> dict[str, Any]:
    """Where each node stands: columns as wide and rows as high as their fullest cell."""
    cells: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for node in sorted(nodes, key=lambda node: (node["kind"] == "error", -(node["influence"] or 0.0))):
        cells[node["row"], node["pos"]].append(node)
    columns = [_LEAST_COLUMN] * len(graph.tokens)
    heights = [_LINE] * (graph.n_layers + 2)
    for (row, pos), cell in cells.items():
        per_line = 1 if row == graph.n_layers + 1 else _PER_LINE
        lines = -(-len(cell) // per_line)
        heights[row] = max(heights[row], lines * _LINE)
        wide = _LOGIT_COLUMN if row == graph.n_layers + 1 else min(len(cell), per_line) * _STEP + 14
        columns[pos] = max(columns[pos], wide)
    left = [_GUTTER + sum(columns[:i]) for i in range(len(columns))]
    # The first row is at the bottom.
    total = sum(heights) + _ROW_GAP * len(heights) + 2 * _TOP
    bottom = [total - _TOP - sum(heights[:r]) - _ROW_GAP * r for r in range(len(heights))]
    for (row, pos), cell in cells.items():
        per_line = 1 if row == graph.n_layers + 1 else _PER_LINE
        for i, node in enumerate(cell):
            line, slot = divmod(i, per_line)
            on_line = min(per_line, len(cell) - line * per_line)
            middle = left[pos] + columns[pos] / 2
            node["x"] = left[pos] + 14 if per_line == 1 else round(middle + (slot - (on_line - 1) / 2) * _STEP, 1)
            node["y"] = round(bottom[row] - _LINE / 2 - line * _LINE, 1)
    names = ["tokens", *(f"L{i}" for i in range(graph.n_layers)), "logits"]
    rows = [
        {"name": name, "y": bottom[i] - heights[i] - _ROW_GAP / 2, "height": heights[i] + _ROW_GAP}
        for i, name in enumerate(names)
    ]
    spans = [{"x": x, "width": w} for x, w in zip(left, columns, strict=True)]
    return {"rows": rows, "columns": spans, "width": left[-1] + columns[-1] + 8, "height": total}


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
