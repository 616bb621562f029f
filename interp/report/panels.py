"""Grids of numbers side by side, on one scale of colours."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from interp.core.errors import DataError, ShapeError
from interp.report.figures import dressed, plain

if TYPE_CHECKING:
    import plotly.graph_objects

__all__ = ["heat_panels"]


def heat_panels(
    panels: Mapping[str, Float[Tensor, "row column"]],
    *,
    rows: Sequence[str],
    across: str = "",
    title: str = "",
    value: str = "value",
) -> "plotly.graph_objects.Figure":
    """Draw grids of one shape side by side; the first row is at the top.

    Args:
        panels: Heading → numbers [row column]; all on one scale of colours, centred on 0.
        rows: Labels of the rows.
        across: What the columns count.
        title: Heading of the figure.
        value: What the numbers are, with their unit.

    Returns:
        The figure.

    Raises:
        DataError: No panel.
        ShapeError: Panels of other shapes than the labels say.
    """
    from plotly.subplots import make_subplots

    if not panels:
        raise DataError("heat_panels() was given no panels; give at least one heading → numbers")
    odd = next((name for name, grid in panels.items() if len(grid) != len(rows)), None)
    if odd is not None:
        raise ShapeError(f"panel {odd!r} has {len(panels[odd])} rows for {len(rows)} labels")
    labels = [f"{i} · {plain(label)}" for i, label in enumerate(rows)]
    figure = make_subplots(rows=1, cols=len(panels), shared_yaxes=True, subplot_titles=[plain(n) for n in panels])
    top = max(float(grid.nan_to_num(0.0).abs().max()) for grid in panels.values()) or 1.0
    for column, grid in enumerate(panels.values(), 1):
        figure.add_heatmap(z=grid.detach().float().cpu().tolist(), y=labels, coloraxis="coloraxis", row=1, col=column)
    dressed(figure, title, value)
    scale = [[0.0, "#1f6fc9"], [0.5, "rgba(127,127,127,0.07)"], [1.0, "#d9640f"]]
    # The panels' headings stand between the title and the plot.
    figure.update_layout(
        height=max(260, 184 + 24 * len(rows)),
        margin_t=88,
        coloraxis={"colorscale": scale, "cmin": -top, "cmax": top, "colorbar": {"thickness": 10, "outlinewidth": 0}},
    )
    figure.update_annotations(font_size=12)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_xaxes(title={"text": plain(across) if across else ""}, showgrid=False)
    return figure
