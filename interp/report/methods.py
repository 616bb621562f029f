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
# About the width of a letter, as a share of what the points reach.
_LETTER = 0.0105


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
        points: Name → (horizontal, vertical); a point with a NaN is drawn, open, in a margin that is named so: left of
            all others, or below them.
        x: What the horizontal axis is, with its unit.
        y: What the vertical axis is, with its unit.
        title: Heading of the figure.
        faint: Names that are drawn in grey: controls.

    Returns:
        The figure.

    Raises:
        DataError: No points.
    """
    import plotly.graph_objects as go

    if not points:
        raise DataError("quadrants() was given no points; give at least one")
    (left, across), (below, up) = (_margin([pair[i] for pair in points.values()]) for i in (0, 1))
    at = {
        name: (left if math.isnan(p[0].mean) else p[0].mean, below if math.isnan(p[1].mean) else p[1].mean)
        for name, p in points.items()
    }
    beside = _text_places(at, across, up)
    figure = go.Figure()
    for name, (first, second) in points.items():
        colour = _FAINT if name in faint else _POINT
        missing = [what for what, e in ((x, first), (y, second)) if math.isnan(e.mean)]
        told = [f"{plain(what)}: {e.mean:.4g} [{e.low:.4g}, {e.high:.4g}]" for what, e in ((x, first), (y, second))]
        told += [f"no {plain(what)}" for what in missing]
        figure.add_scatter(
            x=[at[name][0]],
            y=[at[name][1]],
            error_x=_error(first, colour),
            error_y=_error(second, colour),
            mode="markers+text",
            text=[plain(name)],
            textposition=beside[name],
            marker={"size": 8, "color": colour, "symbol": "circle-open" if missing else "circle"},
            hovertemplate="<br>".join([plain(name), *told]) + "<extra></extra>",
        )
    dressed(figure, title, "controls in grey" if set(faint) & set(points) else "")
    for axis, lacks, edge in (("x", 0, left), ("y", 1, below)):
        if any(math.isnan(pair[lacks].mean) for pair in points.values()):
            what = (x, y)[lacks].split(",")[0]
            (figure.add_vline if axis == "x" else figure.add_hline)(
                **{axis: edge},
                line={"dash": "dot", "width": 1, "color": _FAINT},
                annotation={"text": f"no {plain(what)}", "font": {"size": 11, "color": _FAINT}},
                annotation_position="bottom right",
                layer="below",
            )
    figure.update_layout(height=460, showlegend=False)
    figure.update_xaxes(title={"text": plain(x), "standoff": 10})
    figure.update_yaxes(title={"text": plain(y), "standoff": 10})
    return figure


def _margin(values: Sequence[Estimate]) -> tuple[float, float]:
    """Where points without a value stand, and how far the others and their intervals reach."""
    known = [value for value in values if not math.isnan(value.mean)]
    low, high = min((v.low for v in known), default=0.0), max((v.high for v in known), default=1.0)
    reach = high - low or 1.0
    return low - 0.12 * reach, reach


def _text_places(at: Mapping[str, tuple[float, float]], across: float, up: float) -> dict[str, str]:
    """On which side of each point its name is: off its intervals, inside the figure, and off the names of others."""
    right = max(x for x, _ in at.values())
    found: dict[str, str] = {}
    taken: list[tuple[float, float, float]] = []
    for name, (x, y) in sorted(at.items(), key=lambda item: -item[1][1]):
        sides = ("left", "right") if right - x < 0.2 * across else ("right", "left")
        for side, above in ((side, above) for side in sides for above in (True, False)):
            length = _LETTER * len(name) * across
            start = x if side == "right" else x - length
            middle = y + (0.04 if above else -0.04) * up
            free = all(abs(middle - m) > 0.06 * up or start > s + n or s > start + length for s, n, m in taken)
            if free or name not in found:
                found[name] = f"{'top' if above else 'bottom'} {side}"
                place = (start, length, middle)
            if free:
                break
        taken.append(place)
    return found


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
