"""Figures of steering say what their marks and colours mean; a page's long texts can be read."""

import math
from typing import Any

import pandas as pd
import pytest
import torch

from interp.core.stats import Estimate
from interp.report.bands import band_lines
from interp.report.figures import Axis, curves, heatmap
from interp.report.html import Section, page
from interp.report.methods import quadrants
from interp.report.steering import DoseLine, dose_response, marked_map, trade_off

DOSES = torch.tensor([-1.0, 0.0, 1.0])


def one(name: str, *, control: bool = False, flagged: tuple[bool, ...] = (False, False, False)) -> DoseLine:
    mean = torch.tensor([-2.0, 0.0, 2.0])
    cost = torch.tensor([30.0, 2.0, 300.0])
    return DoseLine(name, DOSES, mean, mean - 1, mean + 1, control, torch.tensor(flagged), cost, torch.zeros(3, 0))


LINES = [one("she", flagged=(True, False, False)), one("random 1", control=True), one("random 2", control=True)]


def legend(figure: Any) -> dict[str, object]:
    """Name → mark, of what the legend shows."""
    return {trace.name: trace.marker.symbol for trace in figure.data if trace.showlegend is not False}


def test_the_legend_has_every_name_once_and_explains_the_marks() -> None:
    drawn = dose_response(LINES, unit="raw", value="change")
    assert legend(drawn) == {"random directions": None, "she": None, "breaks a limit": "x"}
    cost = trade_off(LINES, cost="perplexity", value="change", baseline=2.0, log=True)
    assert legend(cost).keys() == {"random directions", "she", "frontier", "breaks a limit", "unsteered"}
    assert legend(cost)["breaks a limit"] == "circle-open"
    (points,) = (trace for trace in cost.data if trace.name == "she" and trace.showlegend is False)
    assert list(points.marker.symbol) == ["circle-open", "circle", "circle"]
    assert cost.layout.xaxis.type == "log"
    assert list(legend(dose_response(LINES[1:], unit="raw", value="change"))) == ["random directions"]


def test_unmarked_cells_are_empty() -> None:
    flagged = torch.tensor([[True, False]])
    drawn = marked_map(torch.ones(1, 2), flagged, sites=["0.resid_post"], doses=Axis("dose", ["1", "2"]), value="x")
    assert [list(row) for row in drawn.data[0].text] == [["×", ""]]
    long = heatmap(torch.ones(1, 1), rows=Axis("", ["adjective - comparative"]), columns=Axis())
    assert long.layout.yaxis.ticktext == ("adjective - comparative",)


def test_a_name_has_one_colour_in_all_panels() -> None:
    layers, values = torch.arange(3), torch.rand(3)
    panels = {task: dict.fromkeys(("vector", "none"), (layers, values)) for task in ("a", "b", "c")}
    drawn = curves(panels)
    colours = {(trace.name, trace.line.color) for trace in drawn.data}
    assert len(colours) == 2 and [t.name for t in drawn.data if t.showlegend] == ["vector", "none"]
    assert drawn.layout.xaxis3.dtick == 1, "no ticks between layers"
    assert curves({"a": {"b": (torch.rand(3), values)}}).layout.xaxis.dtick is None


def test_what_was_not_measured_stands_apart_from_what_was() -> None:
    nothing = Estimate(math.nan, math.nan, math.nan)
    points = {
        "told": (Estimate(0.9, 0.2, 1.0), Estimate(1.0, 0.5, 1.5)),
        "near": (Estimate(0.88, 0.8, 1.0), Estimate(0.98, 0.5, 1.5)),
        "untold": (nothing, Estimate(1.0, 0.5, 1.5)),
    }
    drawn = quadrants(points, x="detection, AUROC", y="steering", faint=["near"])
    places = {trace.text[0]: (trace.x[0], trace.textposition, trace.marker.symbol) for trace in drawn.data}
    assert places["untold"][0] < 0.2, "left of every interval"
    assert places["untold"][2] == "circle-open" and places["told"][2] == "circle"
    assert places["told"][1] != places["near"][1], "names of near points are on different sides"
    assert [note.text for note in drawn.layout.annotations] == ["no detection"]
    assert drawn.layout.title.subtitle.text == "controls in grey"


def test_a_reference_can_have_a_name() -> None:
    held = {"probe": torch.tensor([[0.9, 0.8, 1.0]])}
    drawn = band_lines(held, x=Axis(), reference=0.5, reference_is="<chance>")
    assert [note.text for note in drawn.layout.annotations] == ["&lt;chance&gt;"]
    assert not band_lines(held, x=Axis(), reference=0.5).layout.annotations


@pytest.mark.parametrize("text", ["<td>a text that is long enough to need a line of its own", "short"])
def test_long_texts_of_a_table_are_set_as_text(text: str) -> None:
    written = page("t", [Section("", pd.DataFrame({"dose": [1.0, 2.0], "said": [text, "b"]}))])
    assert written.count('<td class="words">') == (2 if len(text) > 10 else 0)
    assert written.count("<td>1</td>") == 1 and written.count("<td>b</td>") == (0 if len(text) > 10 else 1)
