"""The page of a circuit: whole, offline, safe with any text, with every edge drawn and listed."""

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from interp.core.errors import DataError, ShapeError
from interp.core.result import Provenance
from interp.patching.circuits.circuit import Circuit
from interp.patching.circuits.circuit_view import write_circuit_html
from interp.patching.circuits.reference import reference_circuit
from interp.patching.graph import Graph
from interp.report.circuit_figures import against, size_curve
from interp.report.circuit_page import MOST_EDGES, CircuitView, EdgeRow, NodeRow, circuit_page

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "</style><style>main{display:none}",
    "{{ 7*7 }}",
    "a\nb\u202e",
]
VOID = {"meta", "img", "br", "input", "link", "hr"}


class Document(HTMLParser):
    """What a browser would make of a page: its elements, and the text inside them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert not self.open, f"{self.open} are never closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.text.setdefault(self.open[-1] if self.open else "", []).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def data(self) -> dict[str, Any]:
        scripts = zip(self.all("script"), self.text["script"], strict=True)
        return json.loads(next(text for attributes, text in scripts if attributes.get("type") == "application/json"))


def view(names: list[str] | None = None, **changes: Any) -> CircuitView:
    found = ["input", *(names or ["a", "b"]), "logits"]
    nodes = [NodeRow(n, n, i, 0.3 * i, f"role of {n}" if i == 1 else "", n) for i, n in enumerate(found)]
    scores = dict(enumerate((1.0, -4.0, math.nan)))
    edges = [EdgeRow(a, (b,), "q", scores.get(i)) for i, (a, b) in enumerate(pairwise(found))]
    edges.append(EdgeRow("input", (found[1], found[2]), "k", 2.0))
    settings: dict[str, Any] = {"title": found[1], "subtitle": found[1], "nodes": nodes, "edges": edges}
    settings["curve"] = {found[1]: (torch.tensor([0.01, 0.1, 1.0]), torch.tensor([math.nan, 0.4, 1.0]))}
    return CircuitView(**{**settings, "notes": [found[1]], "facts": {found[1]: found[1]}, "value": found[1], **changes})


@pytest.fixture(scope="module")
def page() -> str:
    return circuit_page(view(HOSTILE))


def test_the_policy_allows_the_pages_own_style_and_script_by_hash_and_nothing_else(page: str) -> None:
    document = Document(page)
    policies = [m["content"] for m in document.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1 and policies[0] is not None and "unsafe" not in policies[0] and "http" not in policies[0]
    rules = dict(rule.strip().split(" ", 1) for rule in policies[0].split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    scripts = zip(document.all("script"), document.text["script"], strict=True)
    ours = [text for attributes, text in scripts if attributes.get("type") != "application/json"]
    for name, texts in (("script-src", ours), ("style-src", document.text["style"])):
        (text,) = texts
        assert rules[name] == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_nothing_is_fetched_and_no_text_becomes_code(page: str) -> None:
    document = Document(page)
    assert {tag for tag, _ in document.elements}.isdisjoint({"img", "link", "iframe", "object", "base", "form", "a"})
    for _, attributes in document.elements:
        assert {"src", "href", "action", "style", "srcset"}.isdisjoint(attributes)
        assert not [name for name in attributes if name.startswith("on")]
    assert len(document.all("script")) == 2 and len(document.all("style")) == 1
    assert not re.findall(r"https?://", page)
    assert "innerHTML" not in page and "eval(" not in page
    assert not any(ord(c) in (0x2028, 0x2029, 0x202E) for c in page)


def test_every_node_is_a_button_and_every_edge_is_drawn_the_strongest_first() -> None:
    document = Document(circuit_page(view()))
    boxes = [g for g in document.all("g") if "box" in (g.get("class") or "").split()]
    assert [b["tabindex"] for b in boxes] == ["0"] * 4 and all(b["role"] == "button" for b in boxes)
    assert [b["aria-label"] for b in boxes] == ["input, input", "a, a; role of a", "b, b", "logits, logits"]
    data = document.data()
    assert data["edges"] == [[1, [2], "q", -4.0], [0, [1, 2], "k", 2.0], [0, [1], "q", 1.0], [2, [3], "q", None]]
    assert data["scored"] and data["ends"] == [0, 3] and data["nodes"][1] == ["a", "role of a", "a"]
    lines = document.all("path")
    assert [line["class"] for line in lines] == ["minus q", "plus k", "plus q", "plus q"]
    widths = [float(line["stroke-width"] or 0) for line in lines]
    assert widths[0] == max(widths) and widths[1] > widths[2]
    assert (lines[1]["d"] or "").count("M") == 2, "an edge into a shared key head goes to each of its heads"
    assert next(i for i in document.all("input") if i.get("id") == "many")["max"] == "4"


def test_boxes_of_a_row_do_not_overlap_and_stay_inside() -> None:
    nodes = [NodeRow(f"n{i}", f"n{i}", 0, column) for i, column in enumerate([0.9, 0.91, 0.92, 1.0, 1.0, 0.0, 0.01])]
    document = Document(circuit_page(CircuitView("t", "s", nodes, [])))
    found = [(float(r["x"] or 0), float(r["width"] or 0)) for r in document.all("rect")]
    found.sort()
    assert all(a + w < b for (a, w), (b, _) in pairwise(found)) and found[0][0] >= 0
    width = float((document.all("svg")[0]["viewbox"] or "").split()[2])
    assert found[-1][0] + found[-1][1] <= width
    crowd = [NodeRow(f"n{i}", f"n{i}", 0, i / 40) for i in range(41)]
    wide = Document(circuit_page(CircuitView("t", "s", crowd, [])))
    places = [float(r["x"] or 0) for r in wide.all("rect")]
    assert min(places) >= 0 and max(places) < width and len(set(places)) == 41


def test_a_circuit_without_scores_has_no_slider_and_a_large_one_is_cut_by_score() -> None:
    plain = circuit_page(view(edges=[EdgeRow("input", ("a",), "q"), EdgeRow("a", ("logits",), "v")]))
    document = Document(plain)
    assert not [i for i in document.all("input") if i.get("type") == "range"] and "Score" not in plain
    many = [EdgeRow("input", ("a",), "q", float(i)) for i in range(MOST_EDGES + 5)]
    cut = Document(circuit_page(view(edges=many)))
    scores = [edge[3] for edge in cut.data()["edges"]]
    assert scores == [float(i) for i in range(MOST_EDGES + 4, 4, -1)]
    assert any(f"{MOST_EDGES:,} strongest of {MOST_EDGES + 5:,}" in text for text in cut.text["li"])


def test_nodes_that_are_not_there_are_refused() -> None:
    with pytest.raises(DataError, match="'c'"):
        circuit_page(view(edges=[EdgeRow("a", ("c",), "q")]))
    with pytest.raises(DataError, match="one name"):
        circuit_page(view(nodes=[NodeRow("a", "a", 0), NodeRow("a", "a", 1)], edges=[]))


@pytest.mark.parametrize("grouped", [False, True])
def test_a_circuit_writes_its_page(grouped: bool, tmp_path: Path) -> None:
    graph = Graph(2, 4, 2 if grouped else 4, (True, False))
    scores = torch.arange(graph.allowed.numel()).reshape(graph.allowed.shape).float() - 40
    origin = Provenance(model="m<b>", settings={"n": 3})
    circuit = Circuit(graph, graph.allowed, "all", origin, scores, {"a1.h0": "induction"})
    path = write_circuit_html(circuit, tmp_path / "deep" / "c.html", notes=("a note",))
    document = Document(path.read_text())
    data = document.data()
    assert len(data["edges"]) == graph.n_edges and [n[0] for n in data["nodes"]] == list(circuit.nodes)
    assert {n[0]: n[1] for n in data["nodes"]}["a1.h0"] == "induction"
    names = [n[0] for n in data["nodes"]]
    for sender, targets, kind, score in data["edges"][:40]:
        last = names[targets[-1]]
        head = int(last.split(".h")[1]) // 2 if grouped and kind in "kv" else None
        receiver = f"{last.split('.')[0]}.h{head}" if head is not None else last
        edge = f"{names[sender]}->{receiver}" + (f"<{kind}>" if kind in "qkv" else "")
        assert float(scores[graph.edge(edge)]) == score
    assert circuit_bytes(circuit, tmp_path) == circuit_bytes(circuit, tmp_path), "the same circuit, the same bytes"


def circuit_bytes(circuit: Circuit, folder: Path) -> bytes:
    return write_circuit_html(circuit, folder / "again.html").read_bytes()


def test_a_published_circuit_writes_its_page(tmp_path: Path) -> None:
    found = reference_circuit("ioi-gpt2")
    document = Document(write_circuit_html(found.circuit, tmp_path / "ioi.html", notes=found.notes).read_text())
    assert len(document.data()["edges"]) == 182 and len(document.all("option")) == 8
    assert all(note in document.text["li"] for note in found.notes)


@pytest.mark.usefixtures("unchecked")
def test_figures_refuse_what_does_not_fit() -> None:
    three, two = torch.zeros(3), torch.zeros(2)
    with pytest.raises(ShapeError, match="3 shares"):
        size_curve({"a": (two, two, two)}, torch.tensor([0.1, 0.5, 1.0]), ends={})
    with pytest.raises(ShapeError, match="labels"):
        against(three, three, labels=["a"], names=("x", "y"))
    figure = size_curve({"<b>": (three, three, three)}, torch.tensor([0.1, 0.5, 1.0]), ends={"whole": math.nan})
    assert [trace.name for trace in figure.data if trace.name] == ["&lt;b&gt;"] and not figure.layout.shapes
