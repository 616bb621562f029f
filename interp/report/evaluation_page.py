"""A page about several dictionaries: every figure with its definition, its interval and its noise between seeds.

The page is one file without a script. Its content-security policy names the one style that it holds by its hash and
allows nothing else.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.core.disk import atomic_write
from interp.report.dictionary_page import content_hash, cosine_chart, density_chart
from interp.report.figures import dressed, plain
from interp.report.html import render

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

    from interp.evaluate.evaluations import Evaluations

__all__ = ["evaluation_page", "points", "write_evaluation_page"]

_WIDE, _TALL, _MARGIN = 260, 22, 8
_MOST_CHARTS = 8
_BETTER = {"lower": "lower is better", "higher": "higher is better", "": ""}
_CONTROLS = ("tokens", "shuffled", "random", "pca")


@dataclass(frozen=True)
class _Point:
    """One dictionary's figure."""

    run: str
    value: float
    low: float
    high: float

    @property
    def ends(self) -> tuple[float, float]:
        known = math.isfinite(self.high - self.low)
        return (self.low, self.high) if known else (self.value, self.value)


def write_evaluation_page(path: str | os.PathLike[str], found: "Evaluations") -> Path:
    """Write the page; an existing file is replaced in one step.

    Args:
        path: file to write; parent folders are made.
        found: the figures.

    Returns:
        The path.
    """
    return atomic_write(path, evaluation_page(found))


def evaluation_page(found: "Evaluations") -> str:
    """Return the page as a whole HTML document.

    Args:
        found: the figures.
    """
    style = render("evaluation.css.j2", {})
    table = found.to_frame()
    several = len(found.runs) > 1
    values = {
        "title": "Evaluation of " + (f"{len(found.runs)} dictionaries" if several else found.runs[0]),
        "subtitle": _subtitle(found),
        "notes": [*found.notes, found.left_out],
        "groups": [group for part in found.parts if (group := _group(found, table, part))],
        "charts": list(_charts(found)),
        "labels": [_labels(found, run) for run in _tables(found)],
        "facts": _facts(found),
        "settings": len(set(found.settings)) > 1,
        "noise": any(int(n) > 1 for n in table["n_seeds"]),
        "style": style,
        "style_hash": content_hash(style),
    }
    return str(render("evaluation.html.j2", values))


def points(table: "pandas.DataFrame", *, figures: Sequence[str]) -> "plotly.graph_objects.Figure":
    """Draw figures in panels: a point per dictionary with its 95 % interval, a column per setting.

    Args:
        table: a row per dictionary and figure, as `Evaluations.to_frame` gives them.
        figures: which; all for none.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    shown = list(figures) or list(dict.fromkeys(table["figure"]))
    drawing = make_subplots(rows=1, cols=max(1, len(shown)), subplot_titles=[plain(name) for name in shown])
    dressed(drawing, "")
    for column, name in enumerate(shown, start=1):
        rows = table[table["figure"] == name]
        spread = [(rows[end] - rows["value"]).abs().fillna(0.0).tolist() for end in ("high", "low")]
        drawing.add_trace(
            go.Scatter(
                x=[plain(str(one)) for one in rows["setting"]],
                y=rows["value"].tolist(),
                mode="markers",
                text=[plain(str(one)) for one in rows["run"]],
                marker={"size": 8, "color": drawing.layout.colorway[0]},
                error_y={"type": "data", "array": spread[0], "arrayminus": spread[1], "thickness": 1},
                hovertemplate="%{text}<br>%{y:.4g}<extra></extra>",
                showlegend=False,
            ),
            row=1,
            col=column,
        )
    drawing.update_layout(height=420, margin={"t": 60})
    return drawing


# -- the parts of the page ------------------------------------------------------------------------------------------


def _subtitle(found: "Evaluations") -> str:
    settings, sites = len(set(found.settings)), ", ".join(dict.fromkeys(found.sites))
    counts = [int(n) for n in found.n_tokens.tolist() if n]
    parts = [found.provenance.model, sites, f"{settings} settings" if settings > 1 else found.settings[0]]
    if counts:
        parts.append(f"up to {max(counts):,} tokens, special ones left out")
    return " · ".join(part for part in parts if part)


def _firsts(found: "Evaluations") -> list[str]:
    """The first dictionary of each setting."""
    known: dict[str, str] = {}
    for run, setting in zip(found.runs, found.settings, strict=True):
        known.setdefault(setting, run)
    return list(known.values())


def _group(found: "Evaluations", table: "pandas.DataFrame", part: str) -> dict[str, Any] | None:
    figures = []
    for name, one in found.definitions.items():
        rows = table[table["figure"] == name]
        if one.part != part or not len(rows):
            continue
        lanes = [(str(setting), group) for setting, group in rows.groupby("setting", sort=False)]
        all_points = {setting: _points(group) for setting, group in lanes}
        scale = _scale([p for some in all_points.values() for p in some])
        figures.append(
            {
                "name": name,
                "title": one.title,
                "meaning": one.meaning,
                "unit": one.unit,
                "better": _BETTER[one.better],
                "rows": [_row(s, g, all_points[s], scale, one.digits) for s, g in lanes],
                "low": _number(scale[0], one.digits),
                "high": _number(scale[1], one.digits),
            }
        )
    return {"title": found.parts[part], "figures": figures} if figures else None


def _points(rows: "pandas.DataFrame") -> list[_Point]:
    columns = (rows[name].tolist() for name in ("run", "value", "low", "high"))
    return [_Point(str(run), *ends) for run, *ends in zip(*columns, strict=True) if math.isfinite(ends[0])]


def _scale(some: Sequence[_Point]) -> tuple[float, float]:
    ends = [end for point in some for end in point.ends]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    return low, high


def _row(
    setting: str, rows: "pandas.DataFrame", some: Sequence[_Point], scale: tuple[float, float], digits: int
) -> dict[str, Any]:
    first = rows.iloc[0]
    many = len(some) > 1
    value = float(first["seed_mean"]) if many and math.isfinite(first["seed_mean"]) else _mean(p.value for p in some)
    half = _mean((p.high - p.low) / 2 for p in some)
    counts = sorted({int(n) for n in rows["n_tokens"]})
    digits += digits == 0 and many and any(point.value != some[0].value for point in some)
    return {
        "setting": setting,
        "svg": _lane(some, scale, value if many else None, digits),
        "value": _number(value, digits),
        "margin": _number(half, digits),
        "unit": str(first["unit"]),
        "sd": _number(float(first["seed_sd"]), digits, small=True),
        "cv": "–" if not math.isfinite(first["seed_cv"]) else f"{first['seed_cv']:.1%}",
        "least": _number(float(first["smallest_difference"]), digits, small=True),
        "n_tokens": "–" if counts == [0] else " – ".join(f"{n:,}" for n in dict.fromkeys((counts[0], counts[-1]))),
    }


def _lane(some: Sequence[_Point], scale: tuple[float, float], mean: float | None, digits: int) -> Any:
    """Dots of one setting along the scale that all settings share."""
    low, high = scale

    def along(value: float) -> float:
        share = (value - low) / (high - low) if high > low else 0.5
        return round(_MARGIN + share * (_WIDE - 2 * _MARGIN), 1)

    step = min(4.0, (_TALL - 8) / max(1, len(some)))
    dots = []
    for number, point in enumerate(some):
        left, right = point.ends
        dots.append(
            {
                "x": along(point.value),
                "y": round(_TALL / 2 + (number - (len(some) - 1) / 2) * step, 1),
                "low": along(left),
                "high": along(right),
                "hint": f"{point.run}: {_number(point.value, digits)}"
                + (f" [{_number(left, digits)}, {_number(right, digits)}]" if right > left else ""),
            }
        )
    known = {"width": _WIDE, "height": _TALL, "dots": dots, "mean": None if mean is None else along(mean)}
    return render("evaluation_lane.svg.j2", known)


def _charts(found: "Evaluations") -> Iterator[dict[str, Any]]:
    """How often latents fire, and how near they lie to one another: of the first seed of each setting."""
    runs = _firsts(found)[:_MOST_CHARTS]
    for run in runs:
        if run in found.firing:
            share = (found.firing[run].double() / max(1, found.fired_on[run])).tolist()
            yield {**density_chart(share), "run": run}
        if run in found.nearest:
            yield {**cosine_chart(found.nearest[run].tolist()), "run": run}


def _tables(found: "Evaluations") -> list[str]:
    """Whose labels are shown: several dictionaries together, and the first of each setting."""
    together = [run for run in found.labels if run not in found.runs]
    return [*together, *(run for run in _firsts(found) if run in found.labels)]


def _labels(found: "Evaluations", run: str) -> dict[str, Any]:
    held: Mapping[str, Sequence[Any]] = found.labels[run]
    rows = []
    for i, name in enumerate(held["label"]):
        numbers = {key: float(held[key][i]) for key in ("f1", "low", "high", "precision", "recall", *_CONTROLS)}
        number = int(held["latent"][i])
        rows.append(
            {
                "label": name,
                "count": f"{int(held['count'][i]):,}",
                "latent": f"{held['dictionary'][i]} {number}" if "dictionary" in held else number,
                "found": bool(held["found"][i]),
                "wide": round(100 * numbers["f1"]),
                **{key: _number(value, 2) for key, value in numbers.items()},
            }
        )
    return {"run": run, "rows": rows, "found": sum(row["found"] for row in rows)}


def _facts(found: "Evaluations") -> list[tuple[str, str]]:
    source = found.provenance
    known: dict[str, Any] = {"model": source.model, "revision": source.revision, "configuration": source.config_hash}
    known |= {f"setting: {name}": value for name, value in source.settings.items()}
    known |= {f"version of {name}": value for name, value in source.versions.items()}
    known |= {
        f"{run}": f"{site} · {setting}" + (f" · seed {seed}" if seed >= 0 else "")
        for run, site, setting, seed in zip(found.runs, found.sites, found.settings, found.seeds, strict=True)
    }
    return [(name, str(value)) for name, value in known.items() if value not in (None, "")]


def _mean(values: Iterator[float] | Any) -> float:
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


def _number(value: float, digits: int, *, small: bool = False) -> str:
    if not math.isfinite(value):
        return "–"
    return f"{value:.2g}" if small else f"{value:,.{digits}f}"
