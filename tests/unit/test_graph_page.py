"""The page of an attribution graph, as a file: nothing from outside, hostile tokens inert, the numbers the graph's."""

import base64
import hashlib
import html.parser
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from interp.core.errors import DataError
from interp.core.result import Provenance
from interp.patching.features.attribution_graph import AttributionGraph
from interp.report import graph_page as pages
from interp.report.graph_page import framed_graph, graph_page, write_graph_page

HOSTILE = ["<script>alert(1)</script>", "</script><img src=x onerror=alert(1)>", '" onload="x', "{{ 7*7 }}"]
PLAIN = [" Mary", " gave", " a", " ball"]


def made(tokens: list[str] = PLAIN, *, prob: bool = True) -> AttributionGraph:
    """Three features, errors at two places, four tokens, two logits; by hand."""
    adjacency = torch.zeros(5, 3 + 2 + 4)
    adjacency[0, 5] = 2.0  # L0 latent 7 @0 reads the first token
    adjacency[1, 8], adjacency[1, 3] = 1.0, -1.0  # L0 latent 9 @3 reads the last token and an error
    adjacency[2, 0], adjacency[2, 1] = 3.0, -0.5  # L1 latent 4 @3 reads both
    adjacency[3, 2], adjacency[3, 4] = 4.0, -1.0  # the first logit reads it and an error
    adjacency[4, 1], adjacency[4, 8] = 0.5, 0.25
    constant = torch.tensor([0.0, 0.5, 0.0, 0.25, 0.0])
    return AttributionGraph(
        layer=torch.tensor([0, 0, 1]),
        pos=torch.tensor([0, 3, 3]),
        latent=torch.tensor([7, 9, 4]),
        error_layer=torch.tensor([0, 1]),
        error_pos=torch.tensor([3, 3]),
        error_whole=torch.tensor([False, True]),
        adjacency=adjacency,
        constant=constant,
        left_out=torch.zeros(5),
        value=adjacency.sum(1) + constant,
        ids=torch.arange(4),
        tokens=tokens,
        target_pos=3,
        target_names=[tokens[0], tokens[1]],
        target_columns=torch.tensor([[0], [1]]),
        target_coefficients=torch.ones(2, 1),
        target_centred=torch.ones(2, dtype=torch.bool),
        target_prob=torch.tensor([0.75, 0.25]) if prob else torch.zeros(2),
        target_weight=torch.tensor([0.75, 0.25]),
        n_layers=2,
        n_active=3,
        provenance=Provenance(model="<b>model</b>"),
    )


class Page(html.parser.HTMLParser):
    """What a page holds: its tags, their attributes, and the text of its scripts and style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag if tag in ("script", "style", "title") else self._open
        if tag in ("script", "style", "title"):
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = "" if tag == self._open else self._open

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts[self._open][-1] += data

    @property
    def data(self) -> dict[str, Any]:
        """What the script shows."""
        found: dict[str, Any] = json.loads(self.texts["script"][0])
        return found


def digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@pytest.mark.parametrize("tokens", [PLAIN, HOSTILE], ids=["plain", "hostile"])
def test_the_policy_allows_the_one_style_and_script_and_nothing_is_outside(tokens: list[str]) -> None:
    text = graph_page(made(tokens))
    page = Page(text)
    policy = next(a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv"))
    assert policy is not None and policy.startswith("default-src 'none'")
    assert f"'{digest(page.texts['style'][0])}'" in policy and f"'{digest(page.texts['script'][1])}'" in policy
    assert "unsafe" not in policy and len(page.texts["script"]) == 2
    assert not [t for t, a in page.tags if {"src", "href", "style", "action"} & a.keys()]
    assert not [name for _, a in page.tags for name in a if name.startswith("on")]
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert "<b>model</b>" not in text and "{{" not in text.replace("{{ 7*7 }}", "")
    assert {t for t, _ in page.tags} <= {
        *("html", "head", "meta", "title", "style", "body", "main", "header", "h1", "h2", "p", "section", "div"),
        *("label", "span", "output", "input", "noscript", "article", "svg", "circle", "path", "details", "summary"),
        *("dl", "dt", "dd", "script"),
    }
    assert [node["name"] for node in page.data["nodes"] if node["kind"] == "token"] == page.data["tokens"]


def test_nodes_and_edges_are_those_that_pruning_keeps() -> None:
    graph = made()
    everything = Page(graph_page(graph, node_share=1.0, edge_share=1.0)).data
    kinds = [node["kind"] for node in everything["nodes"]]
    assert [kinds.count(k) for k in ("feature", "error", "token", "logit")] == [3, 2, 4, 2]
    names = [node["name"] for node in everything["nodes"]]
    assert names[:5] == ["L0 latent 7", "L0 latent 9", "L1 latent 4", "L0 error", "L1 MLP"]
    ends = {(names[s], names[t]): w for s, t, w in everything["links"]}
    assert ends["L0 latent 7", "L1 latent 4"] == 3.0 and ends["L1 MLP", " Mary"] == -1.0
    assert len(ends) == int((graph.adjacency != 0).sum())
    fewer = Page(graph_page(graph, node_share=0.5)).data
    kept = graph.prune(node_share=0.5)
    assert len(fewer["nodes"]) == int(kept.nodes.sum()) + 2 and len(fewer["links"]) == int(kept.edges.sum())
    assert len(fewer["nodes"]) < len(everything["nodes"])


def test_errors_are_always_told() -> None:
    graph = made()
    text = graph_page(graph)
    assert f">{1 - graph.replacement_score:.0%}<" in text and "Ends in errors" in text
    last = Page(text).data["nodes"][-2]["input"]
    assert last["errors"] == -1.0 and last["error share"] == 0.2 and last["biases"] == 0.25
    # The summed parts are the whole.
    parts = sum(last[name] for name in ("features", "tokens", "errors", "biases", "not in the graph"))
    assert parts == pytest.approx(float(graph.value[3]))


def test_nodes_stand_over_their_token_and_on_their_layer() -> None:
    data = Page(graph_page(made(), node_share=1.0, edge_share=1.0)).data
    for node in data["nodes"]:
        column, row = data["columns"][node["pos"]], data["rows"][node["row"]]
        assert column["x"] <= node["x"] <= column["x"] + column["width"]
        assert row["y"] <= node["y"] <= row["y"] + row["height"]
    rows = [row["y"] for row in data["rows"]]
    assert rows == sorted(rows, reverse=True) and [r["name"] for r in data["rows"]] == ["tokens", "L0", "L1", "logits"]
    spots = [(node["x"], node["y"]) for node in data["nodes"]]
    assert len(set(spots)) == len(spots)
    assert max(x for x, _ in spots) < data["width"] and max(y for _, y in spots) < data["height"]


def test_the_filter_keeps_the_fewest_nodes_that_hold_a_share() -> None:
    graph = made()
    data = Page(graph_page(graph, node_share=1.0, edge_share=1.0)).data
    ranked = sorted((n for n in data["nodes"] if n["kind"] != "logit"), key=lambda n: n["rank"])
    held = [node["influence"] for node in ranked]
    assert held == sorted(held, reverse=True)
    assert ranked[0]["rank"] == pytest.approx(float(graph.influence.max() / graph.influence.sum()), rel=1e-3)
    assert ranked[-1]["rank"] == pytest.approx(1.0)
    assert all(node["rank"] == 0 for node in data["nodes"] if node["kind"] == "logit")


def test_the_same_graph_gives_the_same_bytes_and_a_frame_is_isolated(tmp_path: Path) -> None:
    first, second = (write_graph_page(tmp_path / name / "g.html", made()) for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes() == made().to_html(tmp_path / "c.html").read_bytes()
    frame = str(framed_graph(made(HOSTILE)))
    assert frame.startswith('<iframe sandbox="allow-scripts"') and "<script" not in frame
    assert str(made()._repr_html_()).startswith("<iframe")


def test_differences_have_no_probability_and_too_much_for_a_page_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "prob" not in Page(graph_page(made(prob=False))).data["nodes"][-1]
    monkeypatch.setattr(pages, "_MOST_LINKS", 2)
    with pytest.raises(DataError, match="too many for a page"):
        graph_page(made())
