"""Views and pages: whole, offline, deterministic, and safe with whatever a tokenizer yields."""

import base64
import json
import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from interp.core.errors import DataError, ShapeError
from interp.report import (
    Axis,
    Section,
    View,
    attention_view,
    bars,
    curves,
    heatmap,
    line,
    page,
    show_tokens,
    write_page,
)
from interp.report.html import json_block, visible

HOSTILE = [
    "<s>",
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "'><b>",
    "&amp;",
    "a\nb",
    "\u202egnp.exe",
    "\u2028",
    "{{ 7*7 }}",
    "<!--",
    "",
]
VOID = {"meta", "img", "br", "input", "link", "hr"}


class Document(HTMLParser):
    """What a browser would make of a page: its elements, the text inside and every reference to elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: dict[str, list[str]] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.text.setdefault(self.open[-1] if self.open else "", []).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]


def _pattern(heads: int, n: int) -> torch.Tensor:
    scores = torch.randn(heads, n, n, generator=torch.Generator().manual_seed(0))
    return scores.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf).softmax(-1)


def _pages() -> dict[str, str]:
    values = torch.linspace(-1, 1, len(HOSTILE))
    tokens = show_tokens(HOSTILE, values, title="<i>title</i>", unit="<u>")
    attention = attention_view(HOSTILE, _pattern(2, len(HOSTILE)), layer=0)
    axis = Axis("<b>x</b>", HOSTILE)
    figures = [
        heatmap(values.expand(2, -1), rows=Axis(), columns=axis, text=[HOSTILE] * 2, hover=[HOSTILE] * 2),
        line({"</script>": values}, x=axis, title="</script>", value="</script>"),
        bars(values, labels=axis, value="</script>"),
        curves({"</script>": {"<b>": (values, values)}}, x="</script>", title="</script>"),
    ]
    table = pd.DataFrame({"<th>": HOSTILE})
    return {
        "tokens": page("<t>", [Section("<h>", tokens)]),
        "attention": page("<t>", [Section("<h>", attention, note="<n>")]),
        "figures": page("<t>", [Section("<h>", f) for f in figures], subtitle="<sub>"),
        "text": page("<t>", [Section("<h>", "\n".join(HOSTILE)), Section("<h>", table, folded=True)]),
    }


@pytest.mark.parametrize("kind", ["tokens", "attention", "figures", "text"])
def test_a_page_is_whole_asks_nothing_of_the_network_and_runs_nothing_of_its_data(kind: str) -> None:
    text = _pages()[kind]
    document = Document(text)
    assert document.open == []
    policies = [m["content"] or "" for m in document.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1 and "default-src 'none'" in policies[0]
    for directive in policies[0].split(";"):
        assert not any(host in directive for host in ("http", "*", "'unsafe-eval'")), directive
    for tag, attrs in document.elements:
        assert not {"src", "href", "srcset", "action", "data"} & attrs.keys(), (tag, attrs)
        assert not any(name.startswith("on") for name in attrs), (tag, attrs)
        assert tag not in {"img", "link", "iframe", "object", "embed", "base", "form"}
    scripts = {"tokens": 0, "attention": 2, "figures": 2 + 2 * 4, "text": 0}[kind]
    assert len(document.all("script")) <= scripts
    assert not any(part.strip() == "alert(1)" for part in document.text.get("script", []))


@pytest.mark.parametrize("kind", ["tokens", "attention", "figures", "text"])
def test_a_page_has_the_same_bytes_each_time(kind: str) -> None:
    assert _pages()[kind] == _pages()[kind]


def test_every_token_is_shown_with_its_value_and_line_breaks_are_kept() -> None:
    tokens, values = [" a", "b\n", "c"], torch.tensor([1.0, -0.5, math.nan])
    view = show_tokens(tokens, values, title="loss", unit="nats")
    document = Document(str(view.fragment))
    spans = [s for s in document.all("span") if (s.get("class") or "").startswith("token")]
    assert [s["title"] for s in spans] == ["' a': 1 nats", "'b⏎': −0.5 nats", "'c': no value"]
    assert [s["style"] for s in spans] == [
        "background:rgba(217,100,15,0.800)",
        "background:rgba(31,111,201,0.400)",
        "background:rgba(217,100,15,0.000)",
    ]
    assert "missing" in (spans[2]["class"] or "")
    assert "".join(document.text["span"] + document.text["div"]).count("⏎") == 1 and "</span>\n<span" in view.fragment
    assert str(view).splitlines()[1].split() == ["b⏎", "-0.5"]
    assert "b⏎" in view._repr_html_()


def test_colours_follow_the_size_of_the_value_and_a_limit_is_shared() -> None:
    def alpha(values: list[float], limit: float | None = None) -> list[float]:
        spans = Document(str(show_tokens(["x"] * len(values), values, limit=limit).fragment)).all("span")
        return [float((s["style"] or "").split(",")[-1][:-1]) for s in spans if "style" in s]

    assert alpha([0.0, 1.0, 2.0, 4.0]) == [0.0, 0.2, 0.4, 0.8]
    assert alpha([0.0, 1.0, 2.0, 4.0], limit=2.0) == [0.0, 0.4, 0.8, 0.8]
    assert alpha([0.0, 0.0]) == [0.0, 0.0]
    assert alpha([math.inf, 1.0]) == [0.8, 0.8]


def test_rows_of_unequal_length_leave_the_padding_out() -> None:
    rows = [["a", "b", "c"], ["d"]]
    grid = torch.tensor([[1.0, 2.0, 3.0], [4.0, 99.0, 99.0]])
    assert str(show_tokens(rows, grid)) == str(show_tokens(rows, [[1.0, 2.0, 3.0], [4.0]]))
    assert "99" not in show_tokens(rows, grid).fragment


def test_values_that_do_not_fit_the_tokens_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"2 rows of 3, 1 tokens"):
        show_tokens([["a", "b", "c"], ["d"]], torch.zeros(2, 4))
    with pytest.raises(ShapeError, match="one per token"):
        show_tokens(["a", "b"], [1.0])
    with pytest.raises(DataError, match="one string"):
        show_tokens("ab", [1.0, 2.0])
    with pytest.raises(DataError, match="no tokens"):
        show_tokens([], [])
    with pytest.raises(DataError, match="above zero"):
        show_tokens(["a"], [1.0], limit=0.0)


def test_the_attention_view_holds_the_patterns_to_sixteen_bits() -> None:
    n, chosen = 7, [2, 0]
    pattern = _pattern(3, n)
    view = attention_view([f"t{i}" for i in range(n)], pattern, layer=4, heads=chosen)
    data = json.loads(view.fragment.split('<script type="application/json">')[1].split("</script>")[0])
    packed = np.frombuffer(base64.b64decode(data["weights"]), dtype="<u2").reshape(2, -1) / 65535
    q, k = torch.tril_indices(n, n)
    assert data["heads"] == chosen and data["tokens"] == [f"t{i}" for i in range(n)]
    assert np.abs(packed - pattern[chosen][:, q, k].numpy()).max() <= 0.51 / 65535


def test_the_attention_view_in_a_notebook_is_its_page_inside_a_frame_without_rights() -> None:
    view = attention_view(HOSTILE, _pattern(1, len(HOSTILE)), layer=0)
    (frame,) = Document(view._repr_html_()).all("iframe")
    assert frame["sandbox"] == "allow-scripts"
    inside = Document(frame["srcdoc"] or "")
    assert inside.open == [] and len(inside.all("script")) == 2
    assert view.fragment in (frame["srcdoc"] or "")


def test_the_attention_view_refuses_what_does_not_fit() -> None:
    with pytest.raises(ShapeError, match="one token per position"):
        attention_view(["a"], _pattern(1, 2), layer=0)
    with pytest.raises(DataError, match=r"heads 0 … 1"):
        attention_view(["a", "b"], _pattern(2, 2), layer=0, heads=[2])
    with pytest.raises(DataError, match="shorten the text"):
        attention_view(["a"] * 2000, torch.zeros(1, 2000, 2000).expand(8, -1, -1), layer=0)


def test_a_figure_draws_token_text_as_it_is() -> None:
    figure = heatmap(torch.eye(2), rows=Axis("layer"), columns=Axis("token", ["<b>x</b>", "a\n"]), value="p")
    assert list(figure.layout.xaxis.ticktext) == ["&lt;b&gt;x&lt;/b&gt;", "a⏎"]
    assert figure.data[0].customdata[0][0] == "0 · &lt;b&gt;x&lt;/b&gt;"
    assert list(figure.layout.yaxis.ticktext) == ["0", "1"]


def test_signed_values_get_colours_centred_on_zero_and_others_start_at_zero() -> None:
    signed = heatmap(torch.tensor([[-1.0, 3.0]]), rows=Axis(), columns=Axis(), diverging=True).data[0]
    assert (signed.zmin, signed.zmax) == (-3.0, 3.0)
    plain = heatmap(torch.tensor([[1.0, math.nan]]), rows=Axis(), columns=Axis()).data[0]
    assert (plain.zmin, plain.zmax) == (0.0, 1.0)


def test_curves_stand_at_their_own_places_each_panel_with_its_own_scale() -> None:
    loss, accuracy = (torch.tensor([1, 2, 30]), torch.tensor([3.0, math.nan, 1.0])), (torch.tensor([30]), torch.ones(1))
    figure = curves({"<loss>": {"train": loss, "held out": accuracy}, "accuracy": {"all": accuracy}}, x="step")
    first, second, third = figure.data
    assert list(first.x) == [1, 2, 30] and math.isnan(first.y[1]) and list(third.x) == [30]
    assert (first.yaxis, second.yaxis, third.yaxis) == ("y", "y", "y2")
    # The panels share one axis, named under the last; a legend tells apart what shares a panel, and only that.
    assert figure.layout.xaxis.matches == "x2" and figure.layout.xaxis2.title.text == "step"
    assert (first.showlegend, second.showlegend, third.showlegend) == (True, True, False)
    assert len({trace.line.color for trace in figure.data}) == 3
    assert [heading.text for heading in figure.layout.annotations] == ["&lt;loss&gt;", "accuracy"]


def test_figures_refuse_labels_and_series_that_do_not_fit() -> None:
    with pytest.raises(ShapeError, match="3 labels for 2 values"):
        heatmap(torch.zeros(2, 2), rows=Axis("", ["a", "b", "c"]), columns=Axis())
    with pytest.raises(ShapeError, match="one string per cell"):
        heatmap(torch.zeros(2, 2), rows=Axis(), columns=Axis(), text=[["a", "b"]])
    with pytest.raises(ShapeError, match="different lengths"):
        line({"a": torch.zeros(2), "b": torch.zeros(3)}, x=Axis())
    with pytest.raises(DataError, match="no series"):
        line({}, x=Axis())
    with pytest.raises(ShapeError, match="'a' has 2 places for 3 values"):
        curves({"p": {"a": (torch.zeros(2), torch.zeros(3))}})
    with pytest.raises(DataError, match="no panels"):
        curves({})
    with pytest.raises(DataError, match="give text, a plotly Figure"):
        page("t", [Section("", 3)])


@pytest.mark.parametrize("token", HOSTILE)
def test_json_in_a_script_element_comes_back_and_cannot_end_it(token: str) -> None:
    block = json_block({"t": [token]})
    assert json.loads(block) == {"t": [token]}
    assert not set("<>&\u2028\u2029") & set(block)


def test_unprintable_characters_are_made_visible() -> None:
    assert visible("a\n\t\r") == "a⏎⇥␍" and visible("") == "∅" and visible(" x") == " x"
    assert visible("\u202e\x00") == "\\u202e\\u0000" and visible("日本 é") == "日本 é"


def test_a_page_is_written_whole_and_a_view_writes_itself(tmp_path: Path) -> None:
    view = show_tokens(["a"], [1.0], title="one")
    assert isinstance(view, View)
    path = view.to_html(tmp_path / "new" / "page.html")
    assert path.read_text(encoding="utf-8") == page("one", [Section("", view)])
    assert len(path.read_bytes()) < 20_000
    figure = write_page(tmp_path / "figure.html", "f", [Section("", bars(torch.ones(2), labels=Axis()))])
    assert len(figure.read_bytes()) < 6_000_000
