"""Bars with intervals: a few named quantities side by side, each with how well it is known."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from interp.core.errors import DataError
from interp.core.stats import Estimate
from interp.report.figures import Axis, bars

if TYPE_CHECKING:
    import plotly.graph_objects

__all__ = ["interval_bars"]


def interval_bars(
    values: Sequence[Estimate],
    *,
    labels: Axis,
    title: str = "",
    value: str = "value",
    reference: float | None = None,
) -> "plotly.graph_objects.Figure":
    """Draw one bar per estimate, with its interval.

    Args:
        values: Means with their bounds; NaN stay empty.
        labels: The horizontal axis.
        title: Heading of the figure.
        value: What the values are, with their unit.
        reference: A height to mark with a dotted line, such as chance.

    Returns:
        The figure.

    Raises:
        DataError: No value.
        ShapeError: Labels that do not fit the values.
    """
    import torch

    if not values:
        raise DataError("interval_bars() was given no values; give at least one Estimate")
    figure = bars(torch.tensor([v.mean for v in values]), labels=labels, title=title, value=value)
    above, below = [v.high - v.mean for v in values], [v.mean - v.low for v in values]
    error = {"type": "data", "array": above, "arrayminus": below, "thickness": 1.2, "width": 4, "color": "#7b808a"}
    shown = [[name, v.low, v.high] for name, v in zip(figure.data[0].customdata, values, strict=True)]
    box = "%{customdata[0]}<br>%{y:.4g} [%{customdata[1]:.4g}, %{customdata[2]:.4g}]<extra></extra>"
    figure.update_traces(error_y=error, customdata=shown, hovertemplate=box)
    if reference is not None:
        figure.add_hline(y=reference, line={"dash": "dot", "width": 1, "color": "#7b808a"})
    return figure
