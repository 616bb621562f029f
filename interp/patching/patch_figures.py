"""Figures of a patching sweep that show more than its grid: entries of patterns, and single examples."""

from typing import TYPE_CHECKING

from interp.core.errors import DataError

if TYPE_CHECKING:
    import plotly.graph_objects

    from interp.patching.result import PatchResult

__all__ = ["entry_maps", "example_strip"]

_PANELS, _COLUMNS = 6, 64


def entry_maps(result: "PatchResult") -> "plotly.graph_objects.Figure":
    """Draw destinations × sources, a panel for each site or head; where there are many, those with the strongest entry.

    Args:
        result: one direction and one metric.
    """
    from interp.report.panels import heat_panels

    clear, n_src = result.gap_is_clear, len(result.keys)
    values = result.normalized() if clear else result.effect.mean(-1)
    grids = values.unflatten(1, (-1, n_src, result.heads)).movedim(-1, 1).flatten(0, 1)
    by_head = result.axis.endswith("head")
    names = [f"{site} {h}" if by_head else site for site in result.sites for h in range(result.heads)]
    strongest = grids.nan_to_num(0.0).abs().flatten(1).amax(1).argsort(descending=True, stable=True)
    kept = sorted(strongest[:_PANELS].tolist())
    more = f", {len(kept)} of {len(names)} with the strongest entry" if len(kept) < len(names) else ""
    share = "share of the gap lost" if result.mode == "noise" else "share of the gap restored"
    return heat_panels(
        {names[i]: grids[i] for i in kept},
        rows=_destinations(result),
        across="source position",
        title=result.heading() + more,
        value=share if clear else f"mean effect on {result.metrics[0]}",
    )


def _destinations(result: "PatchResult") -> list[str]:
    """Labels of the rows."""
    firsts = result.columns[:: len(result.keys) * result.heads]
    end = f" ← {result.keys[0]}" + (" · 0" if result.axis.endswith("head") else "")
    return [label.removesuffix(end) for label in firsts]


def example_strip(result: "PatchResult") -> "plotly.graph_objects.Figure":
    """Draw every example's effect, and each column's mean with its 95 % bootstrap interval.

    Args:
        result: one direction, one metric and one site.

    Raises:
        DataError: more columns than can be told apart.
    """
    from interp.report.figures import Axis
    from interp.report.strip import strip

    if len(result.columns) > _COLUMNS:
        raise DataError(
            f"{result.sites[0]} has {len(result.columns)} columns, and a strip shows up to {_COLUMNS}; use plot() "
            "without a site, or patch fewer (pos=…)"
        )
    low, high = result.interval()
    return strip(
        result.effect[0],
        low[0],
        high[0],
        groups=Axis(f"{result.axis} of {result.sites[0]}", result.columns),
        title=result.heading(),
        value=f"effect on {result.metrics[0]}",
    )
