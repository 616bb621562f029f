"""What a sweep over dictionaries came to: one figure, one page."""

from typing import TYPE_CHECKING

import numpy as np

from interp.core.errors import DataError
from interp.report.figures import dressed, plain
from interp.report.html import Section, page

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

__all__ = ["pareto", "sweep_page"]

_SHOWN = ("name", "l0", "fvu", "ce_recovered", "kl", "dead", "pca_rank", "pca_fvu", "pca_ce_recovered", "n_tokens")
_PANELS = {"fvu": "FVU (lower is better)", "ce_recovered": "CE recovered (higher is better)"}


def pareto(table: "pandas.DataFrame") -> "plotly.graph_objects.Figure":
    """Draw sparsity against reconstruction, a point per dictionary, with 95 % intervals over rows of text.

    A line joins the dictionaries of a site that no other beats in both.

    Args:
        table: a row per dictionary: `name`, `site`, `l0`, `fvu`, `ce_recovered`, these with `_low` and `_high`.

    Raises:
        DataError: no dictionary was measured.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    if not len(table) or "fvu" not in table:
        raise DataError("no dictionary of this sweep was measured; there is nothing to draw")
    figure = make_subplots(rows=1, cols=2, subplot_titles=list(_PANELS.values()), horizontal_spacing=0.12)
    dressed(figure, "")
    ways = figure.layout.colorway
    for column, (what, title) in enumerate(_PANELS.items(), start=1):
        # What one site loses says nothing of another: each has a front of its own.
        for number, (site, group) in enumerate(table.groupby("site", sort=False)):
            colour, name = ways[number % len(ways)], plain(str(site))
            x, y = group["l0"].to_numpy(float), group[what].to_numpy(float)
            spread = [np.nan_to_num(np.abs(group[f"{what}_{end}"].to_numpy(float) - y)) for end in ("high", "low")]
            best = _undominated(x, y if what == "fvu" else -y)
            line = {"width": 1, "dash": "dot", "color": colour}
            front = go.Scatter(x=x[best], y=y[best], mode="lines", line=line, hoverinfo="skip", showlegend=False)
            points = go.Scatter(
                x=x,
                y=y,
                mode="markers",
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                text=[plain(str(one)) for one in group["name"]],
                marker={"size": 9, "color": colour},
                error_y={"type": "data", "array": spread[0], "arrayminus": spread[1], "thickness": 1},
                hovertemplate="%{text}<br>L0 %{x:.2f}<br>%{y:.4f}<extra></extra>",
            )
            figure.add_trace(front, row=1, col=column)
            figure.add_trace(points, row=1, col=column)
        figure.update_xaxes(title_text="L0: active latents per token", row=1, col=column)
        figure.update_yaxes(title_text=title.split(" (")[0], row=1, col=column)
    figure.update_layout(height=440, margin={"t": 80}, legend={"y": 1.12})
    return figure


def sweep_page(table: "pandas.DataFrame") -> str:
    """Return a page with the figure and the table of a sweep, as a whole HTML document."""
    note = "Measured on held-out text; all figures with their 95 % intervals are in sweep.csv beside this page."
    shown = table[[name for name in _SHOWN if name in table]]
    sections = [Section("Sparsity against what is kept", pareto(table)), Section("Figures", shown, note=note)]
    return page("Sweep", sections)


def _undominated(x: "np.ndarray", y: "np.ndarray") -> "np.ndarray":
    """Which points no other has both lower coordinates than, in order of x."""
    order, found, least = np.lexsort((y, x)), [], np.inf
    for i in order:
        if y[i] < least:
            found.append(i)
            least = y[i]
    return np.array(found, dtype=int)
