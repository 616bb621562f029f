"""Points with names: one figure against another."""

import html
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from interp.core.errors import ShapeError
from interp.report.figures import dressed, plain

if TYPE_CHECKING:
    import plotly.graph_objects

__all__ = ["scatter"]


def scatter(
    x_values: Float[Tensor, " n"],
    y_values: Float[Tensor, " n"],
    *,
    names: Sequence[str],
    x: str,
    y: str,
    title: str = "",
) -> "plotly.graph_objects.Figure":
    """Draw one named point per pair of values, with the line on which both are equal.

    Args:
        x_values: The horizontal places; points with a NaN are left out.
        y_values: The vertical places.
        names: What each point is, for its hover box.
        x: What the horizontal axis is, with its unit.
        y: What the vertical axis is, with its unit.
        title: Heading of the figure.

    Returns:
        The figure.

    Raises:
        ShapeError: Values or names of different numbers.
    """
    import plotly.graph_objects as go

    if not len(x_values) == len(y_values) == len(names):
        raise ShapeError(f"{len(x_values)} x, {len(y_values)} y and {len(names)} names; give one of each per point")
    across, up = x_values.detach().double().cpu().tolist(), y_values.detach().double().cpu().tolist()
    hover = f"%{{text}}<br>{html.escape(x)}: %{{x:.4g}}<br>{html.escape(y)}: %{{y:.4g}}<extra></extra>"
    figure = go.Figure()
    drawn = [v for pair in zip(across, up, strict=True) for v in pair if all(map(math.isfinite, pair))]
    if drawn:
        ends = [min(*drawn, 0.0), max(*drawn, 0.0)]
        figure.add_scatter(x=ends, y=ends, mode="lines", line={"width": 1, "dash": "dot"}, hoverinfo="skip")
    figure.add_scatter(
        x=across, y=up, mode="markers", text=[plain(name) for name in names], marker={"size": 7}, hovertemplate=hover
    )
    dressed(figure, title)
    figure.update_layout(height=420, showlegend=False)
    figure.update_xaxes(title={"text": plain(x), "standoff": 10})
    figure.update_yaxes(title={"text": plain(y), "standoff": 10})
    return figure
