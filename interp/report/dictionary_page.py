"""A page about one dictionary: its figures, how it was trained, and its latents to search, sort and read.

The page is one file. Its content-security policy names the one style and the one script that it holds by their
hashes, and allows nothing else: nothing is fetched, and no text of a tokenizer or a document can become code.
"""

import base64
import hashlib
import html
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from markupsafe import Markup
from torch import Tensor

from interp.core.disk import atomic_write
from interp.core.errors import ArtifactError, DataError
from interp.core.site import Site
from interp.report.html import json_block, render, visible

if TYPE_CHECKING:
    from interp.evaluate.top_examples import TopExamples

__all__ = [
    "RunRecord",
    "content_hash",
    "cosine_chart",
    "density_chart",
    "dictionary_page",
    "framed_page",
    "write_dictionary_page",
]

_MOST_BYTES = 30 * 2**20
_MOST_POINTS = 400
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 400, 196, 44, 394, 12, 160
_BARS_PER_DECADE, _COSINE_STEP = 4, 0.025
# The first is how the page opens: latents with a plain meaning before dense ones without.
_ORDERS = {
    "f1": "match with a label (F1)",
    "density": "how often it fires",
    "max": "largest activation",
    "mean": "mean when active",
    "logit": "logit it raises most",
    "id": "number",
}


@dataclass(frozen=True)
class RunRecord:
    """What a run folder says of a run; what it does not hold is empty.

    Attributes:
        name: of the folder.
        settings: `config.yaml`.
        provenance: `provenance.json`.
        course: the lines of `metrics.jsonl`.
        figures: `evaluation.json`.
        dictionary: `cfg.json`.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    course: Sequence[Mapping[str, Any]] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    dictionary: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> "RunRecord":
        """Read a run folder; any of its files may be missing.

        Args:
            folder: the folder.

        Raises:
            ArtifactError: a file is there and cannot be read.
        """
        import yaml

        path, held = Path(folder), {}
        for name in ("config.yaml", "provenance.json", "metrics.jsonl", "evaluation.json", "cfg.json"):
            at, read = path / name, {".yaml": yaml.safe_load, ".jsonl": _lines}.get(Path(name).suffix, json.loads)
            try:
                held[name] = read(at.read_text(encoding="utf-8")) if at.is_file() else {}
            except (OSError, ValueError, yaml.YAMLError) as err:
                why = " ".join(str(err).split())
                raise ArtifactError(f"{at} cannot be read ({why}); move it away, or mend it") from err
            if not isinstance(held[name], dict | tuple):
                raise ArtifactError(f"{at} holds a {type(held[name]).__name__}; expected names with values")
        settings, provenance, course, figures, dictionary = held.values()
        return cls(path.name, settings, provenance, tuple(course), figures, dictionary)


def dictionary_page(examples: "TopExamples", *, run: RunRecord | None = None, framed: bool = False) -> str:
    """Return the page as an HTML document.

    Args:
        examples: the latents to show, as `top_examples` gives them.
        run: the run that the dictionary comes from, for figures and curves.
        framed: leave the heading and the outer margin out, for a frame in a notebook.

    Returns:
        The document; it asks nothing of the network.

    Raises:
        DataError: it would be larger than 30 MB.
    """
    record = run or RunRecord("")
    style, script = render("dictionary.css.j2", {}), render("dictionary.js.j2", {})
    density = examples.density.tolist()
    values = {
        "title": f"Dictionary of {Site(examples.site).short} in {Path(examples.provenance.model).name}",
        "subtitle": _subtitle(examples, record),
        "cards": _cards(record.figures),
        "charts": [*_course(record), density_chart(density)],
        "orders": [{"key": key, "name": name} for key, name in _ORDERS.items()],
        "facts": _facts(examples, record),
        "data": json_block(_data(examples, density)),
        "style": style,
        "script": script,
        "style_hash": content_hash(style),
        "script_hash": content_hash(script),
        "framed": framed,
    }
    text = str(render("dictionary.html.j2", values))
    if (size := len(text.encode("utf-8"))) > _MOST_BYTES:
        raise DataError(
            f"the page of {len(examples.latents)} latents would have {size / 2**20:.0f} MB, and a page holds 30; "
            "show fewer latents, fewer examples, or less context"
        )
    return text


def write_dictionary_page(
    path: str | os.PathLike[str], examples: "TopExamples", *, run: RunRecord | None = None
) -> Path:
    """Write the page; an existing file is replaced in one step.

    Args:
        path: file to write; parent folders are made.
        examples, run: as for `dictionary_page`.

    Returns:
        The path.

    Raises:
        DataError: the page would be larger than 30 MB.
    """
    return atomic_write(path, dictionary_page(examples, run=run))


def framed_page(examples: "TopExamples") -> Markup:
    """Return the page in a frame that isolates its script, for a notebook.

    Args:
        examples: the latents to show.
    """
    framed = html.escape(dictionary_page(examples, framed=True))
    style = "width:100%;height:760px;border:0"
    return Markup(f'<iframe sandbox="allow-scripts" title="Latents" style="{style}" srcdoc="{framed}"></iframe>')


def _lines(text: str) -> tuple[Any, ...]:
    lines = text.splitlines()
    # A run that was killed may have left half a line at the end.
    return tuple(json.loads(line) for i, line in enumerate(lines) if i + 1 < len(lines) or line.endswith("}"))


def content_hash(source: str) -> str:
    """Return the name by which a content-security policy allows a style or a script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode("utf-8")).digest()).decode("ascii")


# -- what the page says in words ------------------------------------------------------------------------------------


def _subtitle(examples: "TopExamples", run: RunRecord) -> str:
    known = [str(run.dictionary.get("architecture", "")), f"k {run.dictionary['k']}" if "k" in run.dictionary else ""]
    parts = [" ".join([f"{len(examples.firing):,}", *filter(None, known[:1]), "latents"]), *filter(None, known[1:])]
    if run.provenance.get("tokens"):
        parts.append(f"trained on {run.provenance['tokens']:,} tokens")
    if run.provenance.get("status") not in (None, "finished"):
        parts.append(f"training {run.provenance['status']}")
    shown = f"{len(examples.latents):,} latents shown, on {examples.n_tokens:,} tokens; special tokens left out"
    return " · ".join([*parts, shown])


def _cards(figures: Mapping[str, Any]) -> list[dict[str, str]]:
    """The main figures, each with its margin and something to compare it with."""
    pca = figures.get("pca_rank")
    rank = f"PCA of rank {pca}: "
    beside = {
        "l0": _beside("with special tokens ", figures.get("l0_with_special"), 1),
        "fvu": _beside(rank, figures.get("pca_fvu"))
        or _beside("explained variance ", figures.get("explained_variance")),
        "ce_recovered": _beside(rank, figures.get("pca_ce_recovered"))
        or _beside("against mean ablation ", figures.get("ce_recovered_mean")),
        "ce_sae": _beside("the model's own ", figures.get("ce_clean")) + " nats/token",
        "kl": "nats/token, from the model's own output",
        "dead": f"never fired on {figures.get('n_tokens', 0):,} tokens",
    }
    cards = [
        ("l0", "L0", 1, "Mean number of positive latents per token."),
        ("fvu", "FVU", 4, "Share of the activations' variance that the reconstruction misses."),
        ("ce_recovered", "CE recovered", 4, "Share of the loss between zeros and the model that is won back."),
        ("ce_sae", "Loss with it in place", 3, "Cross-entropy with the reconstruction in the activation's place."),
        ("kl", "KL", 4, "Divergence of the model's output from that with the reconstruction in place."),
        ("dead", "Dead", 3, "Share of latents that were never positive on the text of the evaluation."),
    ]
    return [
        {
            "name": title,
            "value": f"{figures[name]:.1%}" if name == "dead" else f"{figures[name]:.{digits}f}",
            "margin": _margin(figures, name, digits),
            "beside": beside[name],
            "meaning": meaning + (" ± is half of a 95 % interval." if _margin(figures, name, digits) else ""),
        }
        for name, title, digits, meaning in cards
        if figures.get(name) is not None
    ]


def _beside(text: str, value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{text}{value:.{digits}f}"


def _margin(figures: Mapping[str, Any], name: str, digits: int) -> str:
    low, high = (figures.get("intervals") or {}).get(name) or (None, None)
    return "" if low is None or high is None else f"{(high - low) / 2:.{digits}f}"


def _facts(examples: "TopExamples", run: RunRecord) -> list[tuple[str, str]]:
    source = examples.provenance
    known: dict[str, Any] = {"model": source.model, "site": examples.site, "run": run.name}
    known |= {f"contexts: {name}": value for name, value in source.settings.items() if name != "site"}
    known |= dict(_flat(run.settings))
    known |= {f"version of {name}": value for name, value in source.versions.items()}
    known |= {name: run.figures.get(name) for name in ("text", "ce_loss_score", "ce_recovered_mean", "ce_mean")}
    return [(name, str(value)) for name, value in known.items() if value not in (None, "")]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


# -- charts ---------------------------------------------------------------------------------------------------------


def _course(run: RunRecord) -> list[dict[str, Any]]:
    """FVU and L0 over training, with the held-out figures as levels."""
    figures, charts = run.figures, []
    for name, title, log in (("fvu", "FVU in training", True), ("l0", "L0 in training", False)):
        known = [(line.get("tokens"), line.get(name)) for line in run.course]
        points = [(float(x), float(y)) for x, y in known if x is not None and y is not None]
        points = [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not log)]
        if len(points) < 2:
            continue
        levels = [("held", "held out", figures.get(name))]
        levels += [("beside", f"PCA, rank {figures.get('pca_rank')}", figures.get("pca_fvu"))] if name == "fvu" else []
        drawn = [(kind, text, float(at)) for kind, text, at in levels if at is not None and (at > 0 or not log)]
        svg = _curve(points[:: -(-len(points) // _MOST_POINTS)], drawn, label=title, log=log)
        charts.append({"title": title, "note": "log scale" if log else "", "svg": svg})
    return charts


def _curve(
    points: Sequence[tuple[float, float]], levels: Sequence[tuple[str, str, float]], *, label: str, log: bool
) -> Markup:
    values = [y for _, y in points] + [at for _, _, at in levels]
    low, high = (min(values), max(values)) if log else (0.0, max(values) * 1.1)
    ticks = _log_ticks(low, high) if log else _ticks(low, high)
    if log:
        low, high = min(low, ticks[0]), max(high, ticks[-1])
    start, end = 0.0, points[-1][0]

    def down(y: float) -> float:
        share = math.log(y / low) / math.log(high / low) if log else (y - low) / ((high - low) or 1)
        return round(_BOTTOM - (_BOTTOM - _TOP) * share, 1)

    def along(x: float) -> float:
        return round(_LEFT + (_RIGHT - _LEFT) * (x - start) / ((end - start) or 1), 1)

    marks = []
    for kind, text, value in levels:
        # The curve ends just above what is held out, or on it: that label goes below its line, where there is room.
        at = down(value)
        below = kind == "held" and at < _BOTTOM - 16
        marks.append({"kind": kind, "at": at, "text": f"{text} {value:.3g}", "text_at": at + (13 if below else -4)})
    steps = [x for x in _ticks(start, end) if start <= x <= end]
    return _chart(
        label=label,
        y_ticks=[{"at": down(y), "text": f"{y:.3g}"} for y in ticks],
        x_ticks=[{"at": along(x), "text": _short(x)} for x in steps],
        x_title="tokens",
        levels=marks,
        path="M" + "L".join(f"{along(x)} {down(y)}" for x, y in points),
    )


def density_chart(density: Sequence[float]) -> dict[str, Any]:
    """How many latents fire how often, on a log scale: a chart's title, note and SVG."""
    logs = [math.log10(share) for share in density if share > 0]
    low = math.floor(min(logs, default=-1.0))
    counts = [0] * (-low * _BARS_PER_DECADE)
    for value in logs:
        counts[min(int((value - low) * _BARS_PER_DECADE), len(counts) - 1)] += 1
    wide, ticks = (_RIGHT - _LEFT) / max(len(counts), 1), _ticks(0.0, max(counts, default=1) * 1.08)
    top = max(ticks[-1], max(counts, default=1) * 1.08) or 1
    columns = []
    for i, count in enumerate(counts):
        height = round((_BOTTOM - _TOP) * count / top, 1)
        ends = [10 ** (low + (i + step) / _BARS_PER_DECADE) for step in (0, 1)]
        hint = f"{ends[0]:.2g} to {ends[1]:.2g} of the tokens: {count:,} latents"
        place = {"x": round(_LEFT + i * wide + 0.75, 1), "y": round(_BOTTOM - height, 1), "width": round(wide - 1.5, 1)}
        columns += [{**place, "height": height, "hint": hint}] if count else []
    decades = range(low, 1)
    svg = _chart(
        label="How often the latents fire",
        y_ticks=[{"at": round(_BOTTOM - (_BOTTOM - _TOP) * y / top, 1), "text": _short(y)} for y in ticks],
        x_ticks=[
            {
                "at": round(_LEFT + (d - low) * wide * _BARS_PER_DECADE, 1),
                "text": f"{10.0 ** (d + 2):.5f}".rstrip("0").rstrip(".") + " %",
            }
            for d in decades
        ],
        x_title="share of tokens",
        columns=columns,
    )
    silent = sum(share == 0 for share in density)
    note = f"all {len(density):,} latents; {silent:,} never did" if silent else f"all {len(density):,} latents"
    return {"title": "How often latents fire", "note": note, "svg": svg}


def cosine_chart(cosines: Sequence[float]) -> dict[str, Any]:
    """How many latents have a nearest neighbour at which cosine: a chart's title, note and SVG."""
    known = [value for value in cosines if math.isfinite(value)]
    low = min(0.0, math.floor(min(known, default=0.0) * 10) / 10)
    n = round((1 - low) / _COSINE_STEP)
    counts = [0] * n
    for value in known:
        counts[min(max(int((value - low) / _COSINE_STEP), 0), n - 1)] += 1
    wide, top = (_RIGHT - _LEFT) / n, max(counts, default=1) * 1.08 or 1
    columns = []
    for i, count in enumerate(counts):
        height = round((_BOTTOM - _TOP) * count / top, 1)
        ends = [low + (i + step) * _COSINE_STEP for step in (0, 1)]
        place = {"x": round(_LEFT + i * wide + 0.5, 1), "y": round(_BOTTOM - height, 1), "width": round(wide - 1, 1)}
        hint = f"{ends[0]:.2f} to {ends[1]:.2f}: {count:,} latents"
        columns += [{**place, "height": height, "hint": hint}] if count else []
    along = [low + i / 5 * (1 - low) for i in range(6)]
    svg = _chart(
        label="Nearest neighbours",
        y_ticks=[{"at": round(_BOTTOM - (_BOTTOM - _TOP) * y / top, 1), "text": _short(y)} for y in _ticks(0.0, top)],
        x_ticks=[{"at": round(_LEFT + (x - low) / (1 - low) * (_RIGHT - _LEFT), 1), "text": f"{x:.1f}"} for x in along],
        x_title="largest cosine with another latent",
        columns=columns,
    )
    return {"title": "Nearest neighbours in the decoder", "note": f"{len(known):,} latents", "svg": svg}


def _chart(**parts: Any) -> Markup:
    empty: dict[str, Any] = {"columns": [], "levels": [], "path": ""}
    frame = {"width": _WIDTH, "height": _HEIGHT, "left": _LEFT, "right": _RIGHT, "bottom": _BOTTOM}
    return render("dictionary_chart.svg.j2", {**empty, **frame, **parts})


def _ticks(low: float, high: float) -> list[float]:
    """Four or so round numbers from `low` to `high`."""
    span = (high - low) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= 5)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Of 1, 2 and 5 times powers of ten those that surround `low` to `high`, at most six or so."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    every = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    first = max(i for i, tick in enumerate(every) if tick <= low * (1 + 1e-9))
    last = min(i for i, tick in enumerate(every) if tick >= high * (1 - 1e-9))
    shown = every[first : max(last, first + 1) + 1]
    return [shown[0], *shown[1:-1][:: max(1, len(shown) // 6)], shown[-1]] if len(shown) > 7 else shown


def _short(value: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


# -- the latents ----------------------------------------------------------------------------------------------------


def _data(examples: "TopExamples", density: Sequence[float]) -> dict[str, Any]:
    """All that the script shows: tokens once, in a table that contexts point into."""
    table: dict[str, int] = {}
    words = {i: table.setdefault(visible(name), len(table)) for i, name in examples.names.items()}
    latents = [_latent(examples, i, latent, density, words) for i, latent in enumerate(examples.latents.tolist())]
    edges = [_rounded(edge) for edge in examples.edges.tolist()]
    return {"tokens": list(table), "bands": list(examples.bands), "edges": edges, "latents": latents}


def _latent(
    examples: "TopExamples", i: int, latent: int, density: Sequence[float], words: Mapping[int, int]
) -> dict[str, Any]:
    counts = examples.histogram[i].tolist()
    held = [b for b, count in enumerate(counts) if count]
    first, last = (held[0], held[-1] + 1) if held else (0, 0)
    return {
        "id": latent,
        "density": _rounded(density[latent]),
        "max": _rounded(float(examples.largest[i])),
        "mean": _rounded(float(examples.mean_activation[i])),
        "label": visible(examples.label[i]) if examples.label[i] else "",
        "claimed": bool(examples.claimed[i]),
        **{name: _rounded(float(getattr(examples, name)[i])) for name in ("f1", "precision", "recall", "chance")},
        "raised": _pairs(examples.raised[i], examples.raised_by[i], words),
        "lowered": _pairs(examples.lowered[i], examples.lowered_by[i], words),
        "first": first,
        "counts": counts[first:last],
        "contexts": [_context(examples, i, e, words) for e in (examples.band[i] >= 0).nonzero()[:, 0].tolist()],
    }


def _context(examples: "TopExamples", i: int, e: int, words: Mapping[int, int]) -> dict[str, Any]:
    ids, values = examples.ids[i, e].tolist(), examples.activations[i, e].tolist()
    middle = len(ids) // 2
    there = [place for place, token in enumerate(ids) if token >= 0]
    return {
        "band": int(examples.band[i, e]),
        "peak": there.index(middle),
        "tokens": [words[ids[place]] for place in there],
        "values": [_rounded(values[place]) for place in there],
        "doc": int(examples.doc[i, e]),
        "pos": int(examples.pos[i, e]),
    }


def _pairs(ids: Any, by: Float[Tensor, " listed"], words: Mapping[int, int]) -> list[list[Any]]:
    return [[words[token], _rounded(value)] for token, value in zip(ids.tolist(), by.tolist(), strict=True)]


def _rounded(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None
