"""Strips: every example as a dot, beside the mean of its group and how well that is known."""

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.errors import DataError, ShapeError
from interp.report.figures import Axis, dressed, plain

if TYPE_CHECKING:
    import plotly.graph_objects

__all__ = ["strip"]

_DOT, _MEAN, _INK = "rgba(31,111,201,0.45)", "#d9640f", "#7b808a"
# How far dots of one group stand apart, in groups.
_SPREAD = 0.5


def strip(
    values: Float[Tensor, "group example"],
    low: Float[Tensor, " group"],
    high: Float[Tensor, " group"],
    *,
    groups: Axis,
    examples: Sequence[str] = (),
    title: str = "",
    value: str = "value",
) -> "plotly.graph_objects.Figure":
    """Draw a dot for each example of each group, and each group's mean with its interval.

    Args:
        values: The numbers; NaN are left out, and groups that hold one have no mean.
        low, high: Bounds of the means.
        groups: The horizontal axis.
        examples: Names of the examples, for the hover box; by default their numbers.
        title: Heading of the figure.
        value: What the numbers are, with their unit.

    Returns:
        The figure.

    Raises:
        DataError: No value.
        ShapeError: Bounds or labels that do not fit the values.
    """
    import plotly.graph_objects as go

    n, count = values.shape
    if not n or not count:
        raise DataError(f"strip() was given no values: {n} groups of {count} examples")
    names, labels = list(examples) or [str(i) for i in range(count)], list(groups.labels) or [str(i) for i in range(n)]
    for what, given, expected in (
        ("low", low, n),
        ("high", high, n),
        ("groups", labels, n),
        ("examples", names, count),
    ):
        if len(given) != expected:
            raise ShapeError(f"{what} has {len(given)} entries; values are [{n} {count}] [group example]")
    host = values.detach().double().cpu()
    mean = host.mean(1)
    # Each example keeps its place in every group, so that one can be followed by eye.
    shift = torch.linspace(-_SPREAD / 2, _SPREAD / 2, count) if count > 1 else torch.zeros(1)
    shown = [f"{plain(label)}<br>example {plain(name)}" for label in labels for name in names]
    tail = "<br>" + html.escape(value) + ": %{y:.4g}<extra></extra>"
    figure = go.Figure()
    figure.add_scatter(
        x=(torch.arange(n)[:, None] + shift).flatten().tolist(),
        y=host.flatten().tolist(),
        mode="markers",
        marker={"size": 5, "color": _DOT},
        customdata=shown,
        hovertemplate="%{customdata}" + tail,
    )
    bounds = [[plain(label), a, b] for label, a, b in zip(labels, low.tolist(), high.tolist(), strict=True)]
    above, below = (high.cpu() - mean).tolist(), (mean - low.cpu()).tolist()
    figure.add_scatter(
        x=list(range(n)),
        y=mean.tolist(),
        mode="markers",
        marker={"size": 9, "color": _MEAN, "symbol": "diamond"},
        error_y={"type": "data", "array": above, "arrayminus": below, "thickness": 1.6, "width": 5, "color": _MEAN},
        customdata=bounds,
        hovertemplate="%{customdata[0]}<br>mean: %{y:.4g} [%{customdata[1]:.4g}, %{customdata[2]:.4g}]<extra></extra>",
    )
    figure.add_hline(y=0, line={"dash": "dot", "width": 1, "color": _INK})
    dressed(figure, title)
    figure.update_layout(height=380, showlegend=False, hovermode="closest")
    ticks = {"tickvals": list(range(n)), "ticktext": [plain(label) for label in labels]}
    figure.update_xaxes(title={"text": plain(groups.title)}, showgrid=False, **ticks)
    figure.update_yaxes(title={"text": plain(value), "standoff": 10})
    return figure
