"""Named points with intervals both ways: methods by two scores."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from interp.core.errors import DataError
from interp.core.stats import Estimate
from interp.report.figures import dressed, plain

if TYPE_CHECKING:
    import plotly.graph_objects

__all__ = ["quadrants"]

_POINT, _FAINT = "#d9640f", "#7b808a"


def quadrants(
    points: Mapping[str, tuple[Estimate, Estimate]],
    *,
    x: str,
    y: str,
    title: str = "",
    faint: Sequence[str] = (),
) -> "plotly.graph_objects.Figure":
    """Draw one labelled point per name with its two intervals.

    Args:
        points: Name → (horizontal, vertical); a point with a NaN is drawn on the axis of what it lacks.
        x: What the horizontal axis is, with its unit.
        y: What the vertical axis is, with its unit.
        title: Heading of the figure.
        faint: Names that are drawn in grey, such as controls.

    Returns:
        The figure.

    Raises:
        DataError: No points.
    """
    import plotly.graph_objects as go

    if not points:
        raise DataError("quadrants() was given no points; give at least one")
    across = [p[0] for p in points.values() if not math.isnan(p[0].mean)]
    left = min((e.low for e in across), default=0.0)
    figure = go.Figure()
    for name, (first, second) in points.items():
        colour = _FAINT if name in faint else _POINT
        missing = [what for what, e in ((x, first), (y, second)) if math.isnan(e.mean)]
        told = [f"{plain(what)}: {e.mean:.4g} [{e.low:.4g}, {e.high:.4g}]" for what, e in ((x, first), (y, second))]
        told += [f"no {plain(what)}" for what in missing]
        figure.add_scatter(
            x=[left if math.isnan(first.mean) else first.mean],
            y=[0.0 if math.isnan(second.mean) else second.mean],
            error_x=_error(first, colour),
            error_y=_error(second, colour),
            mode="markers+text",
            text=[plain(name)],
            textposition="top center",
            marker={"size": 8, "color": colour, "symbol": "circle-open" if missing else "circle"},
            hovertemplate="<br>".join([plain(name), *told]) + "<extra></extra>",
        )
    dressed(figure, title)
    figure.update_layout(height=460, showlegend=False)
    figure.update_xaxes(title={"text": plain(x), "standoff": 10})
    figure.update_yaxes(title={"text": plain(y), "standoff": 10})
    return figure


def _error(value: Estimate, colour: str) -> dict[str, object]:
    if math.isnan(value.mean):
        return {"visible": False}
    return {
        "type": "data",
        "array": [value.high - value.mean],
        "arrayminus": [value.mean - value.low],
        "thickness": 1,
        "width": 3,
        "color": colour,
    }
