"""A page about one circuit: its layers drawn, its edges to search and sort, a slider over how many are shown.

The page is one file. Its content-security policy names the one style and the one script that it holds by their
hashes, and allows nothing else. The drawing is in the page itself; the script only shows, hides and lists.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Float
from markupsafe import Markup
from torch import Tensor

from interp.core.disk import atomic_write
from interp.core.errors import DataError
from interp.report.dictionary_page import content_hash
from interp.report.html import json_block, render, visible

__all__ = ["MOST_EDGES", "CircuitView", "EdgeRow", "NodeRow", "circuit_page", "size_chart", "write_circuit_page"]

MOST_EDGES = 2000
"""So many edges, the strongest, are on a page; more would be neither drawn nor read."""

_WIDE, _ROW, _MARGIN, _BOX, _TALL, _GAP = 960, 54, 30, 52, 24, 8
_CHART = (440, 230, 46, 12, 12, 44)  # width, height, left, right, top, bottom


@dataclass(frozen=True)
class NodeRow:
    """One node.

    Attributes:
        name: what edges call it.
        label: what stands in its box.
        row: its row in the drawing, 0 at the bottom; rows without nodes take no room.
        column: where in its row, from 0 (left) to 1 (right); boxes that would overlap are moved apart.
        role: what it is said to do; empty for nothing.
        place: in words, such as "layer 3, head 1".
    """

    name: str
    label: str
    row: int
    column: float = 0.5
    role: str = ""
    place: str = ""


@dataclass(frozen=True)
class EdgeRow:
    """One edge.

    Attributes:
        sender: the name of a node.
        targets: names of the nodes that read it; several where they share a key or value head.
        reads: what it is read as, such as "q".
        score: a number, or None.
    """

    sender: str
    targets: tuple[str, ...]
    reads: str
    score: float | None = None


@dataclass(frozen=True, eq=False)
class CircuitView:
    """What a page shows.

    Attributes:
        title: heading of the page.
        subtitle: a line under it.
        nodes: the nodes.
        edges: the edges.
        curve: name of a line → (shares of edges, values), for the chart of a measure by size; empty for none.
        value: what the values of the curve are.
        notes: sentences for the reader.
        facts: where it comes from.
    """

    title: str
    subtitle: str
    nodes: Sequence[NodeRow]
    edges: Sequence[EdgeRow]
    curve: Mapping[str, tuple[Float[Tensor, " size"], Float[Tensor, " size"]]] = field(default_factory=dict)
    value: str = "faithfulness"
    notes: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)


def write_circuit_page(path: str | os.PathLike[str], view: CircuitView) -> Path:
    """Write the page; an existing file is replaced in one step.

    Args:
        path: file to write; parent folders are made.
        view: what it shows.

    Returns:
        The path.
    """
    return atomic_write(path, circuit_page(view))


def circuit_page(view: CircuitView) -> str:
    """Return the page as a whole HTML document.

    Args:
        view: what it shows.

    Raises:
        DataError: an edge between nodes that are not there, or two nodes of one name.
    """
    names = {node.name: i for i, node in enumerate(view.nodes)}
    if len(names) != len(view.nodes):
        raise DataError("two nodes have one name; give each its own")
    unknown = [n for e in view.edges for n in (e.sender, *e.targets) if n not in names]
    if unknown:
        raise DataError(f"an edge names {unknown[0]!r}, which is no node of this page")
    scored = any(e.score is not None for e in view.edges)
    ranked = sorted(view.edges, key=lambda e: -abs(e.score or 0.0)) if scored else list(view.edges)
    shown = ranked[:MOST_EDGES]
    places, height = _places(view.nodes)
    style, script = render("circuit.css.j2", {}), render("circuit.js.j2", {})
    notes = list(view.notes)
    if len(ranked) > len(shown):
        notes.append(f"the {len(shown):,} strongest of {len(ranked):,} edges are on this page")
    data = {
        "nodes": [[visible(n.name), visible(n.role) if n.role else "", visible(n.place)] for n in view.nodes],
        "edges": [[names[e.sender], [names[t] for t in e.targets], e.reads, _known(e.score)] for e in shown],
        "scored": scored,
        "ends": [names.get("input", -1), names.get("logits", -1)],
    }
    values = {
        "title": visible(view.title),
        "subtitle": view.subtitle,
        "notes": notes,
        "boxes": [_box(n, places[n.name]) for n in view.nodes],
        "lines": _lines(shown, places),
        "roles": [visible(role) for role in dict.fromkeys(n.role for n in view.nodes if n.role)],
        "width": _WIDE,
        "height": height,
        "n": len(shown),
        "scored": scored,
        "chart": size_chart(view.curve, view.value) if view.curve else None,
        "facts": [(name, visible(str(value))) for name, value in view.facts.items()],
        "data": json_block(data),
        "style": style,
        "style_hash": content_hash(style),
        "script": script,
        "script_hash": content_hash(script),
    }
    return str(render("circuit.html.j2", values))


def size_chart(lines: Mapping[str, tuple[Float[Tensor, " size"], Float[Tensor, " size"]]], value: str) -> Markup:
    """Draw a measure against the share of edges, on a logarithmic axis.

    Args:
        lines: name → (shares above 0, values); NaN leaves a gap.
        value: what the values are.
    """
    width, height, left, right, top, bottom = _CHART
    shares = [float(x) for xs, _ in lines.values() for x in xs.tolist() if x > 0]
    known = [float(y) for _, ys in lines.values() for y in ys.tolist() if math.isfinite(y)]
    first, last = math.log10(min(shares, default=0.1)), math.log10(max(shares, default=1.0))
    low, high = min([0.0, *known]), max([1.0, *known])
    across, up = max(last - first, 1e-9), max(high - low, 1e-9)

    def at(x: float, y: float) -> tuple[float, float]:
        share = (math.log10(x) - first) / across
        return left + share * (width - left - right), height - bottom - (y - low) / up * (height - top - bottom)

    drawn = []
    for number, (name, (xs, ys)) in enumerate(lines.items()):
        points = [
            at(x, y) for x, y in zip(xs.tolist(), ys.double().tolist(), strict=True) if x > 0 and math.isfinite(y)
        ]
        text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        drawn.append({"name": visible(name), "kind": f"line{number % 4}", "points": text, "dots": points})
    exponents = range(math.ceil(first - 1e-9), math.floor(last + 1e-9) + 1)
    ticks = [{"x": at(10.0**e, low)[0], "text": f"{100 * 10.0**e:g} %"} for e in exponents]
    marks = sorted({round(low, 1), 0.0, 0.5, 1.0, round(high, 1)}) if high - low < 3 else [low, 0.0, high]
    levels = [{"y": at(10.0**first, y)[1], "text": f"{y + 0.0:.3g}"} for y in marks if low <= y <= high]
    frame = {"width": width, "height": height, "left": left, "right": width - right, "bottom": height - bottom}
    return render("circuit_chart.svg.j2", {**frame, "lines": drawn, "ticks": ticks, "levels": levels, "value": value})


def _places(nodes: Sequence[NodeRow]) -> tuple[dict[str, tuple[float, float]], int]:
    """The middle of each box; rows without nodes take no room."""
    rows: dict[int, list[NodeRow]] = {}
    for node in nodes:
        rows.setdefault(node.row, []).append(node)
    height = 2 * _MARGIN + _ROW * max(len(rows) - 1, 0)
    found, first, last = {}, _MARGIN + _BOX / 2, _WIDE - _MARGIN - _BOX / 2
    for number, row in enumerate(sorted(rows)):
        members = sorted(rows[row], key=lambda node: node.column)
        apart = min(_BOX + _GAP, (last - first) / max(len(members) - 1, 1))
        at: list[float] = []
        for node in members:
            wanted = first + node.column * (last - first)
            at.append(max(wanted, at[-1] + apart) if at else wanted)
        for i in range(len(at) - 1, -1, -1):  # back from the right edge, where that was too far
            at[i] = min(at[i], last - (len(at) - 1 - i) * apart)
        for node, x in zip(members, at, strict=True):
            found[node.name] = (x, float(height - _MARGIN - number * _ROW))
    return found, height


def _box(node: NodeRow, at: tuple[float, float]) -> dict[str, Any]:
    title = f"{node.name}, {node.place}" if node.place else node.name
    return {
        "x": round(at[0] - _BOX / 2, 1),
        "y": round(at[1] - _TALL / 2, 1),
        "cx": round(at[0], 1),
        "cy": round(at[1], 1),
        "width": _BOX,
        "height": _TALL,
        "label": visible(node.label),
        "title": visible(f"{title}; {node.role}" if node.role else title),
        "role": bool(node.role),
    }


def _lines(edges: Sequence[EdgeRow], places: Mapping[str, tuple[float, float]]) -> list[dict[str, Any]]:
    largest = max((abs(e.score) for e in edges if _known(e.score) is not None and e.score is not None), default=0.0)
    found = []
    for edge in edges:
        score = _known(edge.score)
        share = abs(score) / largest if score is not None and largest else 0.4
        paths = [_curve(places[edge.sender], places[target]) for target in edge.targets]
        found.append(
            {
                "d": " ".join(paths),
                "width": round(0.7 + 3.3 * share, 2),
                "sign": "minus" if score is not None and score < 0 else "plus",
                "reads": edge.reads if edge.reads in ("q", "k", "v") else "other",
            }
        )
    return found


def _curve(start: tuple[float, float], end: tuple[float, float]) -> str:
    x1, y1, x2, y2 = start[0], start[1] - _TALL / 2, end[0], end[1] + _TALL / 2
    lift = max(12.0, (y1 - y2) / 2)
    return f"M{x1:.1f},{y1:.1f}C{x1:.1f},{y1 - lift:.1f},{x2:.1f},{y2 + lift:.1f},{x2:.1f},{y2:.1f}"


def _known(score: float | None) -> float | None:
    return score if score is not None and math.isfinite(score) else None
