"""Figures of steering: effect against dose, effect against side effects, sites by doses."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor

from interp.core.errors import DataError, ShapeError
from interp.report.figures import Axis, dressed, heatmap, plain

if TYPE_CHECKING:
    import plotly.graph_objects

__all__ = ["DoseLine", "dose_response", "marked_map", "trade_off"]

_WAYS = ["#1f6fc9", "#d9640f", "#2a9d6f", "#a14fb5", "#c9a21f", "#5b6472"]
_CONTROL, _FAINT = "#9aa0aa", "rgba(127,127,127,0.22)"
_MOST_SAMPLES = 60
_MARK = "×"
# Whole numbers at the ticks: plotly's own say "2" for 20.
_TICKS = [m * 10.0**k for k in range(-6, 13) for m in (1, 2, 5)]
_LOG = {"type": "log", "tickvals": _TICKS, "ticktext": [f"{tick:,.15g}" for tick in _TICKS]}


class DoseLine(NamedTuple):
    """One line of a figure: what steers at one site, at all its doses.

    Attributes:
        name: what it is called.
        doses: the doses, in order.
        mean: the mean effect at each.
        low: lower bounds of the means.
        high: upper bounds.
        control: whether it is of a random direction.
        flagged: whether each dose breaks a limit.
        cost: a side effect of each dose; empty where the figure shows none.
        samples: the effect on each sample; empty for none.
    """

    name: str
    doses: Float[Tensor, " dose"]
    mean: Float[Tensor, " dose"]
    low: Float[Tensor, " dose"]
    high: Float[Tensor, " dose"]
    control: bool
    flagged: Bool[Tensor, " dose"]
    cost: Float[Tensor, "*dose"]
    samples: Float[Tensor, "dose sample"]


def dose_response(
    lines: Sequence[DoseLine], *, unit: str, value: str, title: str = ""
) -> "plotly.graph_objects.Figure":
    """Draw the mean effect of each line against dose, with intervals; controls in grey, single samples faint.

    Doses that break a limit are crosses, and the legend says so.

    Args:
        lines: at least one.
        unit: of the doses.
        value: what the effect is, with its unit.
        title: heading of the figure.

    Raises:
        DataError: no line.
    """
    import plotly.graph_objects as go

    if not lines:
        raise DataError("dose_response() was given no lines; give at least one")
    figure = go.Figure()
    for one in lines:
        _add_samples(figure, one)
    looks: dict[str, dict[str, Any]] = {}
    for one, colour in _coloured(lines):
        mean = one.mean.double()
        drawn = {"width": 1 if one.control else 2, "color": colour, "dash": "dot" if one.control else "solid"}
        looks[_group(one)] = {"mode": "lines+markers", "line": drawn, "marker": {"size": 6, "color": colour}}
        figure.add_scatter(
            x=one.doses.tolist(),
            y=mean.tolist(),
            name=plain(one.name),
            legendgroup=_group(one),
            showlegend=False,
            hovertext=plain(one.name),
            mode="lines+markers",
            line=drawn,
            marker={"size": 6, "color": colour, "symbol": ["x" if f else "circle" for f in one.flagged.tolist()]},
            error_y={
                "type": "data",
                "array": (one.high.double() - mean).tolist(),
                "arrayminus": (mean - one.low.double()).tolist(),
                "thickness": 1,
                "width": 3,
            },
        )
    _explain(figure, looks, lines, "x")
    dressed(figure, title)
    figure.add_hline(y=0, line={"dash": "dot", "width": 1, "color": _CONTROL})
    figure.update_layout(height=420, hovermode="closest")
    figure.update_xaxes(title={"text": f"dose ({plain(unit)})", "standoff": 10})
    figure.update_yaxes(title={"text": plain(value), "standoff": 10})
    return figure


def _add_samples(figure: "plotly.graph_objects.Figure", one: DoseLine) -> None:
    """Lines of single samples as one trace, with gaps between them."""
    count = one.samples.shape[1]
    if not count:
        return
    step = -(-count // _MOST_SAMPLES)
    x: list[float | None] = []
    y: list[float | None] = []
    for sample in one.samples.T[::step].tolist():
        x += [*one.doses.tolist(), None]
        y += [*sample, None]
    figure.add_scatter(
        x=x,
        y=y,
        mode="lines",
        line={"width": 1, "color": _FAINT},
        name=f"single prompts of {plain(one.name)}",
        hoverinfo="skip",
    )


def _coloured(lines: Sequence[DoseLine]) -> list[tuple[DoseLine, str]]:
    """The lines in the order that they are drawn in, controls first, each with its colour."""
    own = [line for line in lines if not line.control]
    return [(line, _CONTROL) for line in lines if line.control] + list(zip(own, cycle(_WAYS), strict=False))


def _group(one: DoseLine) -> str:
    # Of many random directions the legend needs one; the pointer tells each by its name.
    return "random directions" if one.control else plain(one.name)


def _explain(
    figure: "plotly.graph_objects.Figure", looks: Mapping[str, Mapping[str, Any]], lines: Sequence[DoseLine], mark: str
) -> None:
    """What the legend shows, on traces of its own (of points it would show the mark of the first): names, and marks."""
    for group, look in looks.items():
        figure.add_scatter(x=[None], y=[None], name=group, legendgroup=group, hoverinfo="skip", **look)
    if any(bool(one.flagged.any()) for one in lines):
        marker = {"size": 7, "color": _CONTROL, "symbol": mark}
        name = "breaks a limit"
        figure.add_scatter(x=[None], y=[None], mode="markers", marker=marker, name=name, hoverinfo="skip")


def _add_frontier(figure: "plotly.graph_objects.Figure", lines: Sequence[DoseLine]) -> None:
    points = [
        pair
        for one in lines
        if not one.control
        for pair in zip(one.cost.double().tolist(), one.mean.double().tolist(), strict=True)
    ]
    front = _frontier(points)
    figure.add_scatter(
        x=[x for x, _ in front],
        y=[y for _, y in front],
        mode="lines",
        line={"width": 1, "dash": "dot", "color": _CONTROL},
        name="frontier",
        hoverinfo="skip",
    )


def trade_off(
    lines: Sequence[DoseLine],
    *,
    cost: str,
    value: str,
    baseline: float = math.nan,
    log: bool = False,
    title: str = "",
) -> "plotly.graph_objects.Figure":
    """Draw the mean effect of every dose against what it costs; the frontier joins those that no other beats.

    Filled points keep to all limits, open ones do not.

    Args:
        lines: at least one, with a cost.
        cost: what the horizontal axis is, with its unit; less is better.
        value: what the effect is, with its unit.
        baseline: the cost of no steering, marked where it is a number.
        log: whether costs are ratios, such as a perplexity, and so on a logarithmic axis.
        title: heading of the figure.

    Raises:
        DataError: no line.
        ShapeError: a line without a cost for each dose.
    """
    import plotly.graph_objects as go

    if not lines:
        raise DataError("trade_off() was given no lines; give at least one")
    figure = go.Figure()
    looks: dict[str, dict[str, Any]] = {}
    for one, colour in _coloured(lines):
        if one.cost.shape != one.doses.shape:
            raise ShapeError(f"{one.name!r} has {tuple(one.cost.shape)} costs for {len(one.doses)} doses")
        size = 6 if one.control else 9
        symbols = ["circle-open" if f else "circle" for f in one.flagged.tolist()]
        looks[_group(one)] = {"mode": "markers", "marker": {"size": size, "color": colour}}
        figure.add_scatter(
            x=one.cost.double().tolist(),
            y=one.mean.double().tolist(),
            name=plain(one.name),
            legendgroup=_group(one),
            showlegend=False,
            mode="markers",
            marker={"size": size, "color": colour, "symbol": symbols},
            error_y={
                "type": "data",
                "array": (one.high - one.mean).double().tolist(),
                "arrayminus": (one.mean - one.low).double().tolist(),
                "thickness": 1,
                "width": 0,
            },
            text=[f"dose {dose:g}" for dose in one.doses.tolist()],
            hovertemplate=f"{plain(one.name)}, %{{text}}<br>%{{x:.4g}}, %{{y:.4g}}<extra></extra>",
        )
    _add_frontier(figure, lines)
    _explain(figure, looks, lines, "circle-open")
    dressed(figure, title)
    if math.isfinite(baseline):
        plumb = {"dash": "dash", "width": 1, "color": _CONTROL}
        figure.add_vline(x=baseline, line=plumb)
        figure.add_scatter(x=[None], y=[None], mode="lines", line=plumb, name="unsteered", hoverinfo="skip")
    figure.update_layout(height=420, hovermode="closest")
    figure.update_xaxes(title={"text": plain(cost), "standoff": 10}, **(_LOG if log else {}))
    figure.update_layout(margin_t=92 if sum(trace.showlegend is not False for trace in figure.data) > 5 else 56)
    figure.update_yaxes(title={"text": plain(value), "standoff": 10})
    return figure


def marked_map(
    values: Float[Tensor, "site dose"],
    flagged: Bool[Tensor, "site dose"],
    *,
    sites: Sequence[str],
    doses: Axis,
    value: str,
    title: str = "",
) -> "plotly.graph_objects.Figure":
    """Draw sites × doses with a cross in every flagged cell.

    Args:
        values: the effects; NaN cells stay empty.
        flagged: cells that break a limit.
        sites: labels of the rows.
        doses: the horizontal axis.
        value: what the numbers are, with their unit.
        title: heading of the figure.

    Raises:
        ShapeError: flags or labels that do not fit the values.
    """
    if values.shape != flagged.shape:
        raise ShapeError(f"values {tuple(values.shape)} and flags {tuple(flagged.shape)} must have one shape")
    text = [[_MARK if f else "" for f in row] for row in flagged.tolist()]
    return heatmap(values, rows=Axis("", sites), columns=doses, title=title, value=value, text=text, diverging=True)


def _frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points that no other has both a lower cost and a larger effect than, in order of cost."""
    found: list[tuple[float, float]] = []
    for x, y in sorted((p for p in points if all(map(math.isfinite, p))), key=lambda p: (p[0], -p[1])):
        if not found or y > found[-1][1]:
            found.append((x, y))
    return found
