"""Figures about circuits: a measure against their size, and two measures against each other."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from interp.core.errors import ShapeError
from interp.report.figures import dressed, plain

if TYPE_CHECKING:
    import plotly.graph_objects

__all__ = ["against", "size_curve"]

_FADED = 0.15


def size_curve(
    lines: Mapping[str, tuple[Float[Tensor, " size"], Float[Tensor, " size"], Float[Tensor, " size"]]],
    share: Float[Tensor, " size"],
    *,
    ends: Mapping[str, float],
    title: str = "",
    value: str = "value",
) -> "plotly.graph_objects.Figure":
    """Draw lines with bands over a logarithmic share of edges.

    Args:
        lines: Name → (values, lower ends, upper ends of the band).
        share: Shares of the edges, above 0.
        ends: Name → a level that is drawn as a thin line, such as the whole model's.
        title: Heading of the figure.
        value: What the values are, with their unit.

    Returns:
        The figure.

    Raises:
        ShapeError: A line with more values than shares, or fewer.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    dressed(figure, title)
    places = share.double().tolist()
    for number, (name, (middle, low, high)) in enumerate(lines.items()):
        if not len(middle) == len(low) == len(high) == len(places):
            raise ShapeError(f"line {name!r} has {len(middle)} values for {len(places)} shares; give one per share")
        colour = figure.layout.colorway[number % len(figure.layout.colorway)]
        band = {"mode": "lines", "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
        figure.add_scatter(x=places, y=low.double().tolist(), **band)
        fill = _faded(colour)
        figure.add_scatter(x=places, y=high.double().tolist(), fill="tonexty", fillcolor=fill, **band)
        figure.add_scatter(
            x=places,
            y=middle.double().tolist(),
            name=plain(name),
            mode="lines+markers",
            line={"width": 2, "color": colour},
            marker={"size": 5},
        )
    for name, level in ends.items():
        if math.isfinite(level):
            figure.add_hline(
                y=level, line={"width": 1, "dash": "dot"}, annotation_text=plain(name), annotation_font_size=10
            )
    ticks = sorted({10.0 ** math.floor(math.log10(p)) for p in places} | {1.0}) if places else [1.0]
    figure.update_layout(height=400, hovermode="x unified")
    labels = [f"{100 * t:g} %" for t in ticks]
    figure.update_xaxes(type="log", tickvals=ticks, ticktext=labels, title={"text": "share of edges", "standoff": 10})
    figure.update_yaxes(title={"text": plain(value), "standoff": 10})
    return figure


def against(
    x: Float[Tensor, " n"],
    y: Float[Tensor, " n"],
    *,
    labels: Sequence[str],
    names: tuple[str, str],
    title: str = "",
) -> "plotly.graph_objects.Figure":
    """Draw one point per label, with the diagonal on which both measures agree.

    Args:
        x: The horizontal measure.
        y: The vertical one.
        labels: What each point is.
        names: What the measures are, with their units.
        title: Heading of the figure.

    Returns:
        The figure.

    Raises:
        ShapeError: Labels that do not fit.
    """
    import plotly.graph_objects as go

    if not len(x) == len(y) == len(labels):
        raise ShapeError(f"{len(x)} and {len(y)} values for {len(labels)} labels; give one of each per point")
    figure = go.Figure()
    dressed(figure, title)
    known = [v for v in [*x.double().tolist(), *y.double().tolist()] if math.isfinite(v)]
    low, high = min(known, default=0.0), max(known, default=1.0)
    figure.add_scatter(
        x=[low, high], y=[low, high], mode="lines", line={"width": 1, "dash": "dot"}, hoverinfo="skip", showlegend=False
    )
    figure.add_scatter(
        x=x.double().tolist(),
        y=y.double().tolist(),
        mode="markers",
        marker={"size": 7, "color": figure.layout.colorway[0], "opacity": 0.8},
        text=[plain(label) for label in labels],
        hovertemplate="%{text}<br>%{x:.4g}, %{y:.4g}<extra></extra>",
        showlegend=False,
    )
    figure.update_layout(height=420)
    figure.update_xaxes(title={"text": plain(names[0]), "standoff": 10})
    figure.update_yaxes(title={"text": plain(names[1]), "standoff": 10})
    return figure


def _faded(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{_FADED})"
