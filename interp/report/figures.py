"""Generic plotly figures in the house's looks: heat map, lines, bars."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

from jaxtyping import Float, Int
from torch import Tensor

from interp.core.errors import DataError, ShapeError
from interp.report.html import visible

if TYPE_CHECKING:
    import plotly.graph_objects

__all__ = ["Axis", "bars", "curves", "dressed", "heatmap", "line", "plain"]

# A grey that is legible on white and on near-black: a figure in a notebook does not know its background.
_INK = "#7b808a"
_GRID = "rgba(127,127,127,0.18)"
_FAINT = "rgba(127,127,127,0.07)"
_SEQUENTIAL = [[0.0, _FAINT], [1.0, "#d9640f"]]
_DIVERGING = [[0.0, "#1f6fc9"], [0.5, _FAINT], [1.0, "#d9640f"]]
_LINES = ["#1f6fc9", "#d9640f", "#2a9d6f", "#a14fb5", "#c9a21f", "#5b6472"]
_CELL, _CELL_WIDTH, _CELL_TEXT, _MOST_TICKS, _TICK_TEXT = 30, 58, 8, 64, 24
# So many cells with text fit a page; a wider figure scrolls.
_FITTING = 16
# Lines of so few points show each of them.
_FEW_POINTS = 40
# An axis of so few whole numbers has a tick at each, and none between.
_FEW_PLACES = 24


@dataclass(frozen=True)
class Axis:
    """One axis of a figure: what it counts, and the label of each place (escaped; empty means 0, 1, 2 …)."""

    title: str = ""
    labels: Sequence[str] = ()


def plain(text: str) -> str:
    """Return text that plotly draws as it is: its pseudo-HTML switched off, unprintable characters made visible."""
    return html.escape(visible(text), quote=False)


def heatmap(
    values: Float[Tensor, "row column"],
    *,
    rows: Axis,
    columns: Axis,
    title: str = "",
    value: str = "value",
    text: Sequence[Sequence[str]] | None = None,
    hover: Sequence[Sequence[str]] | None = None,
    diverging: bool = False,
) -> "plotly.graph_objects.Figure":
    """Draw a grid of numbers; row 0 is at the bottom, as layers are drawn.

    Args:
        values: The numbers [row column]; NaN cells stay empty.
        rows: The vertical axis.
        columns: The horizontal axis.
        title: Heading of the figure.
        value: What the numbers are, with their unit; stands under the title.
        text: Text in the cells; empty for none.
        hover: Further lines of the hover box, `\\n` between them.
        diverging: Centre the colours on 0, for signed values.

    Returns:
        The figure.

    Raises:
        ShapeError: Labels or texts that do not fit the values.
    """
    import plotly.graph_objects as go

    height, width = values.shape
    _fits("rows", rows.labels, height)
    _fits("columns", columns.labels, width)
    for name, grid in (("text", text), ("hover", hover)):
        if grid is not None and [len(row) for row in grid] != [width] * height:
            raise ShapeError(f"{name} must have one string per cell of values [{height} {width}]")
    host = values.detach().float().cpu()
    limit = float(host.nan_to_num(0.0).abs().max()) if host.numel() else 0.0
    top = limit or 1.0
    places = [[f"{_label(rows, r)} · {_label(columns, c)}" for c in range(width)] for r in range(height)]
    extra = [["<br>" + plain_lines(cell) for cell in row] for row in hover] if hover is not None else None
    box = [[places[r][c] + (extra[r][c] if extra else "") for c in range(width)] for r in range(height)]
    cells: dict[str, Any] = {}
    if text is not None:
        shown = [[plain(_short(cell, _CELL_TEXT)) if cell else "" for cell in row] for row in text]
        cells = {"text": shown, "texttemplate": "%{text}", "textfont": {"size": 10}}
    figure = go.Figure(
        go.Heatmap(
            z=host.tolist(),
            customdata=box,
            hovertemplate="%{customdata}<br>" + html.escape(value) + ": %{z:.4g}<extra></extra>",
            colorscale=_DIVERGING if diverging else _SEQUENTIAL,
            zmin=-top if diverging else min(0.0, float(host.nan_to_num(0.0).min())) if host.numel() else 0.0,
            zmax=top,
            xgap=1,
            ygap=1,
            colorbar={"thickness": 10, "outlinewidth": 0},
            **cells,
        )
    )
    dressed(figure, title, value)
    figure.update_layout(height=max(220, 160 + _CELL * height), hovermode="closest")
    if text is not None and width > _FITTING:
        figure.update_layout(width=170 + _CELL_WIDTH * width)
    figure.update_xaxes(**_ticks(columns, width), showgrid=False, constrain="domain")
    figure.update_yaxes(**_ticks(rows, height), showgrid=False)
    return figure


def line(
    series: Mapping[str, Float[Tensor, " n"]], *, x: Axis, title: str = "", value: str = "value"
) -> "plotly.graph_objects.Figure":
    """Draw one line per named series over a shared axis.

    Args:
        series: Name → values; NaN leaves a gap.
        x: The horizontal axis.
        title: Heading of the figure.
        value: What the values are, with their unit.

    Returns:
        The figure.

    Raises:
        DataError: No series.
        ShapeError: Series of different lengths, or labels that do not fit.
    """
    import plotly.graph_objects as go

    if not series:
        raise DataError("line() was given no series; give at least one name → values")
    lengths = {len(values) for values in series.values()}
    if len(lengths) != 1:
        raise ShapeError(f"series have different lengths: { {k: len(v) for k, v in series.items()} }")
    n = lengths.pop()
    _fits("x", x.labels, n)
    figure = go.Figure()
    for number, (name, values) in enumerate(series.items()):
        colour = _LINES[number % len(_LINES)]
        figure.add_scatter(
            x=list(range(n)),
            y=values.detach().float().cpu().tolist(),
            name=plain(name),
            mode="lines+markers" if n <= _FEW_POINTS else "lines",
            line={"width": 2, "color": colour},
            marker={"size": 5},
        )
    dressed(figure, title)
    figure.update_layout(height=360, showlegend=len(series) > 1, hovermode="x unified")
    figure.update_xaxes(**_ticks(x, n))
    figure.update_yaxes(title={"text": plain(value), "standoff": 10})
    return figure


def curves(
    panels: Mapping[str, Mapping[str, tuple[Int[Tensor, " _"] | Float[Tensor, " _"], Float[Tensor, " _"]]]],
    *,
    x: str = "",
    title: str = "",
) -> "plotly.graph_objects.Figure":
    """Draw named series, each at its own places, in panels that stand below one another over one axis.

    A name has one colour and one place in the legend, whatever panels it is in.

    Args:
        panels: Heading of a panel → name of a series → (places, values); NaN leaves a gap.
        x: What the places are, with their unit.
        title: Heading of the figure.

    Returns:
        The figure.

    Raises:
        DataError: No panel.
        ShapeError: A series with more places than values, or fewer.
    """
    from plotly.subplots import make_subplots

    if not panels:
        raise DataError("curves() was given no panels; give at least one heading → {name: (places, values)}")
    for name, (places, values) in ((name, pair) for panel in panels.values() for name, pair in panel.items()):
        if len(places) != len(values):
            raise ShapeError(f"series {name!r} has {len(places)} places for {len(values)} values; give one per value")
    count = len(panels)
    gap = 64 / (160 * count + 64)
    headings = [plain(name) for name in panels]
    figure = make_subplots(rows=count, cols=1, shared_xaxes=True, vertical_spacing=gap / 2, subplot_titles=headings)
    names = dict.fromkeys(name for panel in panels.values() for name in panel)
    colours = dict(zip(names, cycle(_LINES), strict=False))  # on through the panels: they share one legend
    explained: set[str] = set()
    for row, panel in enumerate(panels.values(), 1):
        for name, (places, values) in panel.items():
            told = len(panel) > 1 and name not in explained
            explained |= {name} if told else set()
            figure.add_scatter(
                x=places.detach().cpu().tolist(),
                y=values.detach().double().cpu().tolist(),
                name=plain(name),
                mode="lines+markers" if len(places) <= _FEW_POINTS else "lines",
                line={"width": 2, "color": colours[name]},
                marker={"size": 5},
                legendgroup=plain(name),
                showlegend=told,
                row=row,
                col=1,
            )
    dressed(figure, title)
    figure.update_annotations(font={"size": 12, "color": _INK}, x=0, xanchor="left")
    beside = {"orientation": "v", "x": 1.02, "xanchor": "left", "y": 1, "yanchor": "top"}
    figure.update_layout(height=200 + 160 * count, hovermode="x unified", legend=beside)
    figure.update_xaxes(title={"text": plain(x) if x else "", "standoff": 10}, row=count, col=1)
    every = [places for panel in panels.values() for places, _ in panel.values() if len(places)]
    if every and not any(p.is_floating_point() for p in every):
        span = max(int(p.max()) for p in every) - min(int(p.min()) for p in every)
        figure.update_xaxes(**({"dtick": 1} if span <= _FEW_PLACES else {}))
    return figure


def bars(
    values: Float[Tensor, " n"] | Int[Tensor, " n"], *, labels: Axis, title: str = "", value: str = "value"
) -> "plotly.graph_objects.Figure":
    """Draw one bar per value; negative ones in the other colour.

    Args:
        values: The heights [n].
        labels: The horizontal axis.
        title: Heading of the figure.
        value: What the values are, with their unit.

    Returns:
        The figure.

    Raises:
        ShapeError: Labels that do not fit the values.
    """
    import plotly.graph_objects as go

    _fits("labels", labels.labels, len(values))
    heights = values.detach().double().cpu().tolist()
    colours = [_LINES[0] if h < 0 else _LINES[1] for h in heights]
    names = [_label(labels, i) for i in range(len(heights))]
    hover = "%{customdata}<br>" + html.escape(value) + ": %{y:.4g}<extra></extra>"
    figure = go.Figure(
        go.Bar(x=list(range(len(heights))), y=heights, marker={"color": colours}, customdata=names, hovertemplate=hover)
    )
    dressed(figure, title)
    figure.update_layout(height=360, bargap=0.25)
    figure.update_xaxes(**_ticks(labels, len(heights)), showgrid=False)
    figure.update_yaxes(title={"text": plain(value), "standoff": 10})
    return figure


def plain_lines(text: str) -> str:
    """Return several lines as plotly draws them, each made plain."""
    return "<br>".join(plain(part) for part in text.split("\n"))


def dressed(figure: "plotly.graph_objects.Figure", title: str, subtitle: str = "") -> None:
    """Give a figure the house's looks, and its title."""
    figure.update_layout(
        template="none",
        title={
            "text": plain(title) if title else "",
            "x": 0,
            "xref": "container",
            "xanchor": "left",
            "y": 1,
            "yref": "container",
            "yanchor": "top",
            "font": {"size": 15},
            "pad": {"l": 12, "t": 8},
            "subtitle": {"text": plain(subtitle) if subtitle else "", "font": {"size": 12}},
        },
        font={"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 12, "color": _INK},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 64, "r": 24, "t": 16 + 40 * bool(title) + 16 * bool(subtitle), "b": 64},
        colorway=_LINES,
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": _INK, "activecolor": _LINES[0]},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    )
    figure.update_xaxes(gridcolor=_GRID, zeroline=False, linecolor=_GRID, automargin=True)
    figure.update_yaxes(gridcolor=_GRID, zeroline=False, linecolor=_GRID, automargin=True)


def _label(axis: Axis, index: int) -> str:
    return plain(axis.labels[index]) if axis.labels else str(index)


def _short(text: str, n: int) -> str:
    return text if len(text) <= n else text[: n - 1] + "…"


def _ticks(axis: Axis, n: int) -> dict[str, Any]:
    # Positions are numbers, not categories: two tokens may read the same.
    step = -(-n // _MOST_TICKS) if n else 1
    shown = list(range(0, n, step))
    return {
        "title": {"text": plain(axis.title) if axis.title else "", "standoff": 10},
        "tickvals": shown,
        "ticktext": [plain(_short(axis.labels[i], _TICK_TEXT)) if axis.labels else str(i) for i in shown],
    }


def _fits(name: str, labels: Sequence[str], n: int) -> None:
    if labels and len(labels) != n:
        raise ShapeError(f"{name} has {len(labels)} labels for {n} values; give one per value, or none")
