"""Activation statistics as figures: sizes by site and class of token, and the dimensions that stand out of one site."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.errors import DataError
from interp.report.figures import curves, plain

if TYPE_CHECKING:
    import plotly.graph_objects

__all__ = ["MeasuredSite", "MeasuredSites", "show_dimensions", "show_statistics"]

_CLASSES = ("special", "delimiter", "other")
_ABSOLUTE, _RELATIVE, _OUTLIER = 100.0, 1000.0, 5.0
_RMS, _LARGEST = "root mean square of ‖a‖", "largest |a|"
_RATIO = "largest variance of a dimension / mean variance, without special tokens"
_MEDIAN, _MASSIVE, _OUTLYING = "median |a|, all tokens", "massive from here on", "outlier from here on"
_MARKS = {_MEDIAN: "dot", _MASSIVE: "dash", _OUTLYING: "dash"}  # drawn in grey, beside what is measured
_SYMBOLS = ("diamond-open", "square-open", "circle-open", "line-ew-open")  # open: they may lie on one another
_OWN = "median |a| of the dimension"
_Panels = dict[str, dict[str, tuple[Tensor, Tensor]]]
_Boxes = dict[str, dict[str, list[str]]]  # panel, series → what a hover box says of each place


@runtime_checkable
class MeasuredSite(Protocol):
    """What the figures read of one site's statistics, such as `interp.activation_statistics(…)["3.resid_post"]`.

    Attributes:
        site: what it is called.
        n: finite values of each dimension, [d].
        mean, variance: of each dimension, [d]; the variance with n − 1.
        largest, largest_at: the value of largest magnitude, [d], and its document, position and token id, [d 3].
        top, top_at: the values of largest magnitude of the site, [k]; document, position, token id, dimension, [k 4].
    """

    site: str
    n: Tensor
    mean: Tensor
    variance: Tensor
    largest: Tensor
    largest_at: Tensor
    top: Tensor
    top_at: Tensor

    def of(self, over: str) -> "MeasuredSite":
        """Return those over "special", "delimiter" or "other" tokens, over "text" (the last two), or over "all"."""

    def quantile(self, q: float, *, magnitude: bool = False, pooled: bool = False) -> Tensor:
        """Return a quantile of each dimension; of |a| with `magnitude`, of all dimensions together with `pooled`."""


@runtime_checkable
class MeasuredSites(Protocol):
    """What the figures read of the statistics of several sites, such as those of `interp.activation_statistics`."""

    @property
    def sites(self) -> Sequence[str]:
        """The names of the sites, in the order in which they are drawn."""

    def __getitem__(self, site: str) -> MeasuredSite: ...


def show_statistics(
    stats: MeasuredSites, *, names: Mapping[int, str] | None = None, title: str = "Activations by site"
) -> "plotly.graph_objects.Figure":
    """Draw, site by site, how large activations are in each class of token, and what stands out.

    Three panels, each on a log scale: the root mean square of ‖a‖₂ over the tokens of a class; the largest |a| of a
    class beside the median |a| of the site, with a line from which on a value counts as massive; and the largest
    variance of a dimension over the mean one, with a line from which on a dimension counts as an outlier.

    Args:
        stats: the statistics; a class without tokens at a site has a gap there.
        names: text of token ids, for the hover boxes; others are shown by their number.
        title: heading of the figure.

    Returns:
        The figure.

    Raises:
        DataError: no site; or a class of a site, or a dimension of it, that has tokens but not one finite value.

    Source: massive: Sun et al. 2024 (2402.17762), |a| > 100 and about 1000 times the median |a| of the hidden state;
    outlier dimension: Rudman et al. 2023 (2310.17715), a variance of at least 5 times the mean one. Departures: the
    median is of all tokens that were measured, not of one sequence, and 1000 is taken as it stands; the variance is
    over tokens that are not special, not over sentences.
    """
    if not stats.sites:
        raise DataError("these statistics have no site to draw; measure at least one, such as '*.resid_post'")
    held = [_classes(stats[site]) for site in stats.sites]
    sizes = [_sizes(stats[site].of("all")) for site in stats.sites]
    spreads = [_spread(stats[site].of("text")) for site in stats.sites]
    panels: _Panels = {_RMS: {}, _LARGEST: {}, _RATIO: {}}
    boxes: _Boxes = {_LARGEST: {}, _RATIO: {"largest / mean": [dim for _, dim in spreads]}}
    for name in _CLASSES:
        mine = [found.get(name) for found in held]
        if any(found is not None for found in mine):
            most = [math.nan if found is None else float(found.top[0].abs()) for found in mine]
            panels[_RMS][name] = _series([math.nan if found is None else _rms(found) for found in mine])
            panels[_LARGEST][name] = _series(most)
            boxes[_LARGEST][name] = ["" if found is None else _place(found.top_at[0], names) for found in mine]
    panels[_LARGEST] |= {_MEDIAN: _series([m for m, _ in sizes]), _MASSIVE: _series([bound for _, bound in sizes])}
    panels[_RATIO] = {"largest / mean": _series([r for r, _ in spreads]), _OUTLYING: _series([_OUTLIER] * len(held))}
    figure = curves(panels, x="site", title=title)
    _finish(figure, panels, list(stats.sites), boxes)
    return figure


def show_dimensions(
    found: MeasuredSite, *, top: int = 16, names: Mapping[int, str] | None = None, title: str = ""
) -> "plotly.graph_objects.Figure":
    """Draw the dimensions of a site that reach the largest |a|: how far in each class of token, beside their median.

    Args:
        found: the statistics of the site.
        top: how many dimensions, those with the largest |a| of any token first.
        names: text of token ids, for the hover boxes; others are shown by their number.
        title: heading of the figure; the site's name if empty.

    Returns:
        The figure; the dashed line is the one of `show_statistics`, from which on a value counts as massive.

    Raises:
        DataError: fewer than one dimension asked for, or a class or a dimension that has not one finite value.

    Source: as for `show_statistics`.
    """
    if top < 1:
        raise DataError(f"top={top}: ask for at least one dimension")
    held, whole = _classes(found), found.of("all")
    dims = whole.largest.abs().cpu().argsort(descending=True, stable=True)[:top]
    (median, bound), n = _sizes(whole), len(dims)
    heading = f"largest |a| of {n} of {len(whole.n)} dimensions"
    series = {name: _series(mine.largest.abs().cpu()[dims]) for name, mine in held.items()}
    series |= {_OWN: _series(whole.quantile(0.5, magnitude=True).cpu()[dims])}
    series |= {_MEDIAN: _series([median] * n), _MASSIVE: _series([bound] * n)}
    figure = curves({heading: series}, x="dimension", title=title or found.site)
    boxes = {
        name: [_place([*mine.largest_at[dim].tolist(), dim], names) for dim in dims.tolist()]
        for name, mine in held.items()
    }
    _finish(figure, {heading: series}, [str(dim) for dim in dims.tolist()], {heading: boxes})
    # Dimensions are in order of size: no line leads from one to the next.
    for name, trace in zip([*held, _OWN], figure.data, strict=False):
        symbol = _SYMBOLS[[*_CLASSES, _OWN].index(name)]
        trace.update(mode="markers", marker={"size": 9, "symbol": symbol, "line": {"width": 2}})
    return figure.update_layout(height=440)


def _classes(found: MeasuredSite) -> dict[str, MeasuredSite]:
    """The classes that have tokens; each dimension of them has a finite value."""
    held = {name: found.of(name) for name in _CLASSES}
    present = {name: mine for name, mine in held.items() if bool(mine.n.any())}
    if not present:
        raise DataError(
            f"{found.site or 'the site'} has no finite activation in any class of tokens; measure more text"
        )
    for name, mine in present.items():
        if bad := (mine.n == 0).nonzero().flatten().tolist():
            raise DataError(
                f"dimensions {bad[:8]} of {found.site or 'the site'} have no finite value among {name!r} tokens, so "
                "they have no size to draw; look for what makes them NaN or infinite"
            )
    return present


def _rms(found: MeasuredSite) -> float:
    """The root of the mean squared norm: Σ over dimensions of the second moment, from mean and variance."""
    n = found.n.double()
    around = (found.variance.double() * (n - 1) / n).where(n > 1, 0.0)
    return float((around + found.mean.double().square()).sum().sqrt())


def _sizes(whole: MeasuredSite) -> tuple[float, float]:
    """The median |a| of a site, and from where on a value is massive."""
    median = float(whole.quantile(0.5, magnitude=True, pooled=True))
    return median, max(_ABSOLUTE, _RELATIVE * median)


def _spread(text: MeasuredSite) -> tuple[float, str]:
    """The largest variance over the mean one, and which dimension has it; NaN where nothing varies."""
    variance = text.variance.double()
    mean = float(variance.mean())
    return (float(variance.max()) / mean, f"dimension {int(variance.argmax())}") if mean > 0 else (math.nan, "")


def _series(values: Sequence[float] | Float[Tensor, " n"]) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """Values over 0, 1, 2, …; what a log scale has no place for is a gap."""
    drawn = torch.as_tensor(values, dtype=torch.float64)
    return torch.arange(len(drawn)), drawn.where(drawn > 0, math.nan)


def _place(at: Sequence[int] | Int[Tensor, "4"], names: Mapping[int, str] | None) -> str:
    """Where a value stands: document, position, token id, dimension."""
    doc, pos, token, dim = (int(number) for number in at)
    word = f"token {token}" if names is None or token not in names else repr(names[token])
    where = f"added to document {doc}" if pos < 0 else f"position {pos} of document {doc}"
    return f"dimension {dim}, {word}, {where}"


def _finish(figure: "plotly.graph_objects.Figure", panels: _Panels, labels: Sequence[str], boxes: _Boxes) -> None:
    """Log axes, places by name, one colour and one legend entry a name, and hover boxes that say where a value is."""
    ways, ink, seen = figure.layout.colorway, figure.layout.font.color, set[str]()
    order = [(panel, name) for panel, series in panels.items() for name in series]
    for (panel, name), trace in zip(order, figure.data, strict=True):
        colour = ink if name in _MARKS else ways[_CLASSES.index(name) if name in _CLASSES else len(_CLASSES)]
        trace.update(line={"color": colour, "dash": _MARKS.get(name)}, legendgroup=plain(name))
        trace.update(showlegend=name not in seen, hovertemplate="%{y:.4g}")
        seen.add(name)
        if name in _MARKS:
            trace.update(mode="lines")
        if (said := boxes.get(panel, {}).get(name)) is not None:
            trace.update(customdata=[plain(box) for box in said], hovertemplate="%{y:.4g} at %{customdata}")
    figure.update_xaxes(tickvals=list(range(len(labels))), ticktext=[plain(label) for label in labels])
    figure.update_yaxes(type="log")
