"""Two numbers of many things against each other."""

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
    across: Float[Tensor, " n"],
    up: Float[Tensor, " n"],
    *,
    labels: Sequence[str] = (),
    x: str = "",
    y: str = "",
    title: str = "",
) -> "plotly.graph_objects.Figure":
    """Draw one point for each pair of numbers, its label in the hover box.

    Args:
        across: Horizontal values; points with a NaN are left out.
        up: Vertical values, one for each.
        labels: What each point is; empty for none.
        x, y: What the axes count, with their units.
        title: Heading of the figure.

    Returns:
        The figure.

    Raises:
        ShapeError: Values or labels of different number.
    """
    import plotly.graph_objects as go

    if across.shape != up.shape or (labels and len(labels) != len(up)):
        raise ShapeError(
            f"scatter: {len(across)} and {len(up)} values and {len(labels)} labels; give one of each a point"
        )
    figure = go.Figure(
        go.Scatter(
            x=across.detach().double().cpu().tolist(),
            y=up.detach().double().cpu().tolist(),
            mode="markers",
            text=[plain(label) for label in labels] or None,
            hovertemplate="%{text}<br>%{x:.4g}, %{y:.4g}<extra></extra>",
            marker={"size": 6, "opacity": 0.75, "color": "#1f6fc9"},
        )
    )
    dressed(figure, title)
    figure.update_layout(height=420, showlegend=False, hovermode="closest")
    figure.update_xaxes(title={"text": plain(x)}, zeroline=True)
    figure.update_yaxes(title={"text": plain(y)}, zeroline=True)
    return figure
