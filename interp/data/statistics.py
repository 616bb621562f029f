"""Statistics of activations in one pass over text: moments, extremes with their places, quantiles, covariance."""

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.errors import ConfigError, SiteError
from interp.core.intervention import Intervention
from interp.core.result import Provenance, Result
from interp.core.site import Site
from interp.core.text import str_tokens
from interp.data.accumulate import NOWHERE, Buckets, Part, State, Statistics
from interp.data.tokens import TokenSource, watched_blocks

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

    from interp.core.manager import HookManager

__all__ = ["CLASSES", "ActivationStatistics", "SiteStatistics", "activation_statistics"]

CLASSES = ("special", "delimiter", "other")
_CHOICES = {"special": (0,), "delimiter": (1,), "other": (2,), "text": (1, 2), "all": (0, 1, 2)}


class SiteStatistics:
    """The statistics of one site over some classes of tokens, in fp64; what too few values decide is NaN.

    Args:
        state, classes: what `Statistics.state` gave, and which of its classes; none are all.
        site, shape, over: short name; axes after batch and position, whose product is d; what the classes are called.

    Attributes:
        n, n_bad: finite values, and NaN or infinite ones, which no other figure counts, [d].
        mean, variance: Σ x / n and Σ(x − mean)² / (n − 1), [d].
        skewness, kurtosis: E(x − mean)^p / σ^p, p = 3 and 4 (a Gaussian has 0 and 3), [d]; NaN where nothing varies.
        largest, largest_at: the value of largest magnitude, with its sign, [d], and its document, position (−1: a
            special token that was added) and token id, [d 3]; −1 throughout where there is none.
        top, top_at: the values of largest magnitude of the site, [k]; document, position, token id, dimension, [k 4].
    """

    def __init__(
        self, state: State, classes: Sequence[int] = (), *, site: str = "", shape: Sequence[int] = (), over: str = ""
    ) -> None:
        chosen = classes or range(len(state["n"]))
        part, *rest = (Part({k: value[c].clone() for k, value in state.items() if value.ndim}) for c in chosen)
        for more in rest:
            part.merge(more)
        self.site, self.shape, self.over, self._state, self._part, n = site, tuple(shape), over, state, part, part["n"]
        variance, taken = part["m2"] / n, part["top_at"][:, 0] != NOWHERE
        self.n: Int[Tensor, "d"] = n
        self.n_bad: Int[Tensor, "d"] = part["n_bad"]
        self.mean: Float[Tensor, "d"] = part["mean"].where(n > 0, math.nan)
        self.variance: Float[Tensor, "d"] = (part["m2"] / (n - 1)).where(n > 1, math.nan)
        self.skewness: Float[Tensor, "d"] = part["m3"] / n / variance.pow(1.5)
        self.kurtosis: Float[Tensor, "d"] = part["m4"] / n / variance.pow(2)
        self.largest: Float[Tensor, "d"] = part["peak"].where(n > 0, math.nan)
        self.largest_at: Int[Tensor, "d 3"] = part["peak_at"].where(n[:, None] > 0, -1)
        self.top: Float[Tensor, "k"] = part["top"][taken]
        self.top_at: Int[Tensor, "k 4"] = part["top_at"][taken]
        self._most = float(self.top[0].abs()) if len(self.top) else math.nan

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """Covariance (n − 1) of the rows that are finite throughout; ConfigError if it was not kept."""
        moment, rows = self._part["comoment"], self._part["rows"]
        if not moment.numel():
            raise ConfigError(f"no covariance of {self.site or 'this site'} was kept; measure with covariance=True")
        return ((moment + moment.T) / 2 / (rows - 1)).where(rows > 1, math.nan)

    def of(self, over: str) -> "SiteStatistics":
        """Return those over "special", "delimiter", "other", "text" (the last two) or "all"; else ConfigError."""
        if over not in _CHOICES or len(self._state["n"]) != len(CLASSES):
            raise ConfigError(f"no {over!r} of {len(self._state['n'])} classes; of three there are {list(_CHOICES)}")
        return SiteStatistics(self._state, _CHOICES[over], site=self.site, shape=self.shape, over=over)

    def quantile(self, q: float, *, magnitude: bool = False, pooled: bool = False) -> Float[Tensor, "*d"]:
        """Return the value of rank ⌊q (n − 1)⌋, from 0, of each dimension; at most `relative_accuracy` of it off.

        With `magnitude`, of |a|; `pooled`, of all dimensions together; ConfigError unless 0 ≤ q ≤ 1. Memory: 8 d B.
        """
        if not 0 <= q <= 1:
            raise ConfigError(f"q={q}: a quantile is asked for by a number from 0 to 1")
        buckets = Buckets(float(self._state["relative_accuracy"]))
        counts, values, half = self._part["counts"], buckets.values(self.n.device), buckets.half
        counts = counts.sum(0) if pooled else counts
        if magnitude:
            both = counts[..., half + 1 :] + counts[..., :half].flip(-1)
            counts, values = torch.cat([counts[..., half : half + 1], both], -1), values[half:]
        below = counts.cumsum(-1, dtype=torch.long)
        n = below[..., -1:]
        at = torch.searchsorted(below, (q * (n - 1).double()).floor().long(), right=True)
        return values[at.clamp_max(len(values) - 1)].where(n > 0, math.nan)[..., 0]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class ActivationStatistics(Result):
    """Statistics of activations by site, class of token and dimension.

    `stats["3.resid_post"]` is a `SiteStatistics` over "text", all tokens but special ones; its `.of(…)` chooses others.

    Attributes:
        sites, shapes: their short names, and their axes after batch and position (heads are flattened).
        states: what `Statistics.state` gave of each.
        n_tokens: tokens of each of `CLASSES`.
        delimiters: token ids that count as delimiters.
    """

    title: ClassVar[str] = "Activation statistics"
    sites: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    states: tuple[dict[str, Tensor], ...]
    n_tokens: tuple[int, ...]
    delimiters: tuple[int, ...]

    def __getitem__(self, site: str | Site | tuple[str, int]) -> SiteStatistics:
        """Return those of one site, by `Site`, name or (kind, layer); SiteError if it was not measured."""
        name = Site(f"{site[1]}.{site[0]}" if isinstance(site, tuple) else site).short
        if name not in self.sites:
            raise SiteError(f"{name} was not measured, add it to sites=[…]; there are {', '.join(self.sites[:12])}")
        at = self.sites.index(name)
        return SiteStatistics(self.states[at], _CHOICES["text"], site=name, shape=self.shapes[at], over="text")

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row for each site, class and dimension: the figures, and the place of the largest |a|."""
        import pandas as pd

        frames, names = [], ("n", "n_bad", "mean", "variance", "skewness", "kurtosis", "largest")
        for found in (self[site].of(name) for site in self.sites for name in CLASSES):
            columns: dict[str, Any] = {"site": found.site, "class": found.over, "dim": range(len(found.n))}
            columns |= {name: getattr(found, name).numpy() for name in names}
            columns |= dict(zip(("doc", "pos", "id"), found.largest_at.T.numpy(), strict=True))
            frames.append(pd.DataFrame({**columns, "median": found.quantile(0.5).numpy()}))
        return pd.concat(frames, ignore_index=True)

    def plot(self) -> "plotly.graph_objects.Figure":
        """Return the largest |a| of each class by site, and the median |a| of "text", on a log scale."""
        figures = importlib.import_module("interp.report.figures")
        lines = {f"largest |a|, {name}": [self[s].of(name)._most for s in self.sites] for name in CLASSES}
        lines["median |a|, text"] = [float(self[s].quantile(0.5, magnitude=True, pooled=True)) for s in self.sites]
        series = {name: torch.tensor(values) for name, values in lines.items()}
        figure = figures.line(series, x=figures.Axis("site", self.sites), title=self.title, value="|a|")
        return figure.update_yaxes(type="log")

    def summary(self) -> str:
        """Say how much was measured, where the largest |a| are, and what was left out."""
        counts = ", ".join(f"{n:,} {name}" for name, n in zip(CLASSES, self.n_tokens, strict=True))
        sites = f"{len(self.sites)} site{'s' * (len(self.sites) > 1)}"
        lines = [f"{sites}, {sum(self.n_tokens):,} tokens ({counts}); special ones are left out unless asked for"]
        for name in CLASSES:
            held = [found for found in (self[site].of(name) for site in self.sites) if len(found.top)]
            for found in sorted(held, key=lambda s: s._most)[-1:]:
                doc, pos, token, dim = found.top_at[0].tolist()
                sizes = f"{found._most:.4g}, median {found.quantile(0.5, magnitude=True, pooled=True):.4g}"
                place = f"{found.site}, dimension {dim} (document {doc}, position {pos}, token {token})"
                lines.append(f"{name}: largest |a| {sizes}, at {place}")
        bad = {site: int(self[site].of("all").n_bad.sum()) for site in self.sites}
        if where := ", ".join(f"{n:,} in {site}" for site, n in bad.items() if n):
            lines.append(f"values that were NaN or infinite are left out of everything: {where}")
        return "\n".join(lines)


def activation_statistics(
    hm: "HookManager",
    tokens: TokenSource,
    sites: str | Site | Sequence[str | Site],
    *,
    max_tokens: int = 100_000,
    covariance: bool = False,
    delimiters: Sequence[int] | None = None,
    write: Sequence[Intervention] = (),
    should_stop: Callable[[], bool] | None = None,
) -> ActivationStatistics:
    """Measure moments, extremes and quantiles of activations in one pass, by class of token; pads never count.

    Tokens are special (BOS, EOS, …), delimiters, or other. One forward per block reads all sites. Memory: what
    `Statistics` says of each, and one block's activations.

    Args:
        hm, tokens: the manager of the model, and the text.
        sites: sites, names or globs, of axes that begin with batch and position.
        max_tokens: how many tokens to run, special ones and pads included; whole blocks are run.
        covariance: whether to keep the covariance of each site and class, [d d].
        delimiters: their token ids; None are tokens that read . , ; : ! ? or a line break, but for white space.
        write: edits under which the model runs; sites are read after them.
        should_stop: asked before each block; when it says True, KeyboardInterrupt is raised.

    Returns:
        The statistics, on the CPU.

    Raises:
        SiteError: an unknown or absent site.
        ConfigError: no site, a slice of one, one without positions, or no tokens asked for.
        DataError: the text has no tokens.
    """
    listed = [sites] if isinstance(sites, str | Site) else sites
    places = list(dict.fromkeys(place for name in listed for place in hm.atlas.expand(name)))
    odd = [place for place in places if place.where is not None or place.axes[:2] != ("batch", "pos")]
    if odd or not places or max_tokens < 1:
        what = f"sites {odd or places}, max_tokens={max_tokens}"
        raise ConfigError(f"{what}; expected whole sites [batch pos …] such as 3.z, at least one, and one token")
    marks = torch.tensor(_delimiters(tokens.tokenizer) if delimiters is None else list(delimiters), dtype=torch.long)
    found: dict[Site, Statistics] = {}
    for block in watched_blocks(tokens, max_tokens, should_stop, doing="statistics"):
        run = hm.run(block.inputs, read=places, write=list(write), logits="none")
        keep = block.mask.flatten().nonzero().flatten()
        classes = (2 - torch.isin(block.ids, marks).long()).masked_fill(block.special, 0)
        named = {"classes": classes, "doc": block.doc, "pos": block.pos, "ids": block.ids}
        columns = {name: column.flatten()[keep] for name, column in named.items()}
        shapes = {place: tuple(run[place].shape[2:]) for place in places}
        found = found or {place: Statistics(math.prod(shapes[place]), covariance=covariance) for place in places}
        for place, statistics in found.items():
            x = run[place].flatten(2).flatten(0, 1)
            statistics.add(x[keep.to(x.device, non_blocking=True)], **columns)
    said: dict[str, Any] = {"sites": [place.name for place in places], "text": tokens.describe()}
    said |= {"write": [repr(edit) for edit in write]} if write else {}
    said |= {"max_tokens": max_tokens, "covariance": covariance, "special_tokens": "a class of their own"}
    states = tuple({name: value.cpu() for name, value in found[place].state().items()} for place in places)
    return ActivationStatistics(
        sites=tuple(place.short for place in places),
        shapes=tuple(shapes[place] for place in places),
        states=states,
        n_tokens=tuple((states[0]["n"] + states[0]["n_bad"])[:, 0].tolist()),
        delimiters=tuple(marks.tolist()),
        provenance=Provenance.of(hm, settings=said),
    )


def _delimiters(tokenizer: Any) -> list[int]:
    """Ids of the tokens that end a clause or a line, by their text."""
    ids = sorted(set(tokenizer.get_vocab().values()))
    texts = zip(ids, str_tokens(tokenizer, torch.tensor([ids]))[0], strict=True)
    return [i for i, text in texts if text.strip() in set(".,;:!?") or ("\n" in text and not text.strip())]
