"""Figures of sums: contributions with their intervals, steps to a total, a number along the stream."""

import html
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from interp.core.errors import ShapeError
from interp.report.figures import Axis, dressed, plain

if TYPE_CHECKING:
    import plotly.graph_objects

__all__ = ["contributions", "stack", "waterfall"]

_LESS, _MORE, _SUM, _LINE = "#1f6fc9", "#d9640f", "#5b6472", "#a14fb5"
_ROW = 18

_Bounds = tuple[Float[Tensor, " n"], Float[Tensor, " n"]]


def contributions(
    values: Float[Tensor, " n"], *, labels: Axis, title: str = "", value: str = "value", bounds: _Bounds | None = None
) -> "plotly.graph_objects.Figure":
    """Draw one bar to the right or left per value, the first on top.

    Args:
        values: The lengths.
        labels: One name each.
        title: Heading of the figure.
        value: What the values are, with their unit.
        bounds: Lower and upper bounds of each, drawn as whiskers.

    Returns:
        The figure.

    Raises:
        ShapeError: Labels or bounds that do not fit the values.
    """
    import plotly.graph_objects as go

    lengths, names = _checked(values, labels)
    whiskers: dict[str, Any] = {}
    if bounds is not None:
        low, high = (_checked(bound, labels)[0] for bound in bounds)
        above = [h - x for h, x in zip(high, lengths, strict=True)]
        below = [x - b for b, x in zip(low, lengths, strict=True)]
        error = {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 1, "width": 3}
        whiskers = {"error_x": error}
    figure = go.Figure(
        go.Bar(
            x=lengths,
            y=list(range(len(lengths))),
            orientation="h",
            marker={"color": [_LESS if x < 0 else _MORE for x in lengths]},
            customdata=names,
            hovertemplate="%{customdata}<br>" + html.escape(value) + ": %{x:+.4g}<extra></extra>",
            **whiskers,
        )
    )
    dressed(figure, title)
    figure.update_layout(height=max(240, 120 + _ROW * len(lengths)), bargap=0.25)
    figure.update_xaxes(title={"text": plain(value), "standoff": 10})
    ticks = {"tickvals": list(range(len(names))), "ticktext": names}
    figure.update_yaxes(autorange="reversed", showgrid=False, **ticks)
    return figure


def waterfall(
    values: Float[Tensor, " n"], *, labels: Axis, title: str = "", value: str = "value", total: str = "sum"
) -> "plotly.graph_objects.Figure":
    """Draw values as steps from 0 to their sum.

    Args:
        values: The steps.
        labels: One name each.
        title: Heading of the figure.
        value: What the values are, with their unit.
        total: Name of the last bar, the sum.

    Returns:
        The figure.

    Raises:
        ShapeError: Labels that do not fit the values.
    """
    import plotly.graph_objects as go

    steps, names = _checked(values, labels)
    figure = go.Figure(
        go.Waterfall(
            x=list(range(len(steps) + 1)),
            y=[*steps, 0.0],
            measure=[*["relative"] * len(steps), "total"],
            customdata=[*names, plain(total)],
            hovertemplate="%{customdata}<br>step %{delta:+.4g}, so far %{final:.4g}<extra></extra>",
            decreasing={"marker": {"color": _LESS}},
            increasing={"marker": {"color": _MORE}},
            totals={"marker": {"color": _SUM}},
            connector={"line": {"width": 1, "color": "rgba(127,127,127,0.5)"}},
        )
    )
    dressed(figure, title)
    figure.update_layout(height=400, showlegend=False)
    figure.update_xaxes(tickvals=list(range(len(steps) + 1)), ticktext=[*names, plain(total)], showgrid=False)
    figure.update_yaxes(title={"text": plain(value), "standoff": 10})
    return figure


def stack(
    values: Float[Tensor, " n"],
    steps: Float[Tensor, " n"],
    *,
    labels: Axis,
    title: str = "",
    value: str = "value",
    bounds: _Bounds | None = None,
) -> "plotly.graph_objects.Figure":
    """Draw a number along the stream as a line, and what each place adds to it as bars.

    Args:
        values: The number read after each place.
        steps: What that place adds.
        labels: The places.
        title: Heading of the figure.
        value: What the values are, with their unit.
        bounds: Lower and upper bounds of the line, drawn as a band.

    Returns:
        The figure.

    Raises:
        ShapeError: Labels, steps or bounds that do not fit the values.
    """
    import plotly.graph_objects as go

    heights, names = _checked(values, labels)
    added, _ = _checked(steps, labels)
    at = list(range(len(heights)))
    figure = go.Figure()
    if bounds is not None:
        low, high = (_checked(bound, labels)[0] for bound in bounds)
        band = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
        figure.add_scatter(x=at, y=low, **band)
        figure.add_scatter(x=at, y=high, fill="tonexty", fillcolor="rgba(161,79,181,0.18)", **band)
    figure.add_bar(
        x=at, y=added, name="what it adds", marker={"color": [_LESS if x < 0 else _MORE for x in added]}, opacity=0.75
    )
    figure.add_scatter(
        x=at, y=heights, name="read off the stream", mode="lines+markers", line={"color": _LINE}, marker={"size": 5}
    )
    dressed(figure, title)
    figure.update_layout(height=400, hovermode="x unified", bargap=0.3)
    heading = {"text": plain(labels.title) if labels.title else "", "standoff": 10}
    figure.update_xaxes(title=heading, tickvals=at, ticktext=names, showgrid=False)
    figure.update_yaxes(title={"text": plain(value), "standoff": 10})
    return figure


def _checked(values: Tensor, labels: Axis) -> tuple[list[float], list[str]]:
    if values.ndim != 1 or (labels.labels and len(labels.labels) != len(values)):
        raise ShapeError(f"{len(labels.labels)} labels for values {tuple(values.shape)}; give one per value, or none")
    names = [plain(label) for label in labels.labels] or [str(i) for i in range(len(values))]
    return values.detach().double().cpu().tolist(), names
