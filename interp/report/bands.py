"""Lines with intervals: figures over layers or sizes, each with how well it is known."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from interp.core.errors import ShapeError
from interp.report.figures import Axis, line, plain

if TYPE_CHECKING:
    import plotly.graph_objects

__all__ = ["band_lines"]


def band_lines(
    series: Mapping[str, Float[Tensor, "n 3"]],
    *,
    x: Axis,
    title: str = "",
    value: str = "value",
    reference: float | None = None,
    reference_is: str = "",
) -> "plotly.graph_objects.Figure":
    """Draw one line per named series, with its interval at every point.

    Args:
        series: Name → estimates with their lower and upper bounds; NaN leaves a gap.
        x: The horizontal axis.
        title: Heading of the figure.
        value: What the values are, with their unit.
        reference: A height to mark with a dotted line, such as chance.
        reference_is: What stands at it; empty for nothing.

    Returns:
        The figure.

    Raises:
        DataError: No series.
        ShapeError: Series that are not [n 3] or differ in length, or labels that do not fit.
    """
    wrong = {name: tuple(held.shape) for name, held in series.items() if held.ndim != 2 or held.shape[1] != 3}
    if wrong:
        raise ShapeError(f"series are [n 3]: estimate, lower and upper bound; got {wrong}")
    figure = line({name: held[:, 0] for name, held in series.items()}, x=x, title=title, value=value)
    for trace, held in zip(figure.data, series.values(), strict=True):
        middle, low, high = held.double().cpu().unbind(1)
        trace.error_y = {
            "type": "data",
            "array": (high - middle).clamp(min=0).nan_to_num(0.0).tolist(),
            "arrayminus": (middle - low).clamp(min=0).nan_to_num(0.0).tolist(),
            "thickness": 1,
            "width": 3,
        }
    if reference is not None:
        figure.add_hline(y=reference, line={"dash": "dot", "width": 1, "color": "#7b808a"}, **_note(reference_is))
    return figure


def _note(text: str) -> dict[str, object]:
    if not text:
        return {}
    font = {"size": 11, "color": "#7b808a"}
    return {"annotation": {"text": plain(text), "font": font}, "annotation_position": "bottom right"}
