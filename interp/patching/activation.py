"""Activation patching, plain: run the corrupted prompt with one activation of the clean run, everywhere in turn.

Source: Vig et al. (2020), arXiv 2004.12265, and Meng et al. (2022), arXiv 2202.05262 §2, in the form of Heimersheim and
Nanda (2024), arXiv 2404.15255 (denoising with a corrupted prompt instead of noise). One forward per cell.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.core.errors import DataError, ShapeError, SiteError, WhereError
from interp.core.intervention import Replace
from interp.core.manager import HookManager
from interp.core.result import Provenance, Result, token_names
from interp.core.run import Run
from interp.core.site import KINDS, Site
from interp.core.text import Tokens
from interp.core.where import Where
from interp.data.pair_tokens import PairTokens
from interp.data.pairs import PromptPairs

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

__all__ = ["PatchResult", "activation_patch"]

_HEAD_AXES = ("n_heads", "n_kv_heads")
# Below so many standard errors, the gap between the prompts is not told from nothing.
_MIN_ERRORS = 3.0


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class PatchResult(Result):
    """What each patch does to a metric, per example.

    Attributes:
        sites: Short names of the patched sites: the rows.
        axis: What the columns are, "position" or "head".
        columns: Labels of the columns.
        patched: The metric with one cell patched.
        clean: The metric on the clean prompt.
        corrupted: The metric on the corrupted prompt.
        unchanged: Cells whose patch changed no activation at all.
    """

    title: ClassVar[str] = "Activation patching"
    sites: list[str]
    axis: str
    columns: list[str]
    patched: Float[Tensor, "site column batch"]
    clean: Float[Tensor, " batch"]
    corrupted: Float[Tensor, " batch"]
    unchanged: Bool[Tensor, "site column"]

    @property
    def effect(self) -> Float[Tensor, "site column batch"]:
        """Patched − corrupted, in the metric's units, per example."""
        return self.patched - self.corrupted

    @property
    def gap(self) -> float:
        """Mean of clean − corrupted, in the metric's units."""
        return float((self.clean - self.corrupted).mean())

    @property
    def gap_is_clear(self) -> bool:
        """Whether the gap can be divided by: above rounding and, with several examples, above 3 standard errors."""
        gaps = (self.clean - self.corrupted).double()
        size = max(float(self.clean.abs().max()), float(self.corrupted.abs().max()), 1.0)
        error = float(gaps.std() / len(gaps) ** 0.5) if len(gaps) > 1 else 0.0
        return abs(float(gaps.mean())) > max(1e-5 * size, _MIN_ERRORS * error)

    def normalized(self) -> Float[Tensor, "site column"]:
        """Return mean effect / mean gap: 0 is the corrupted run, 1 the clean one; NaN where the gap is not clear."""
        mean = self.effect.mean(-1)
        return mean / self.gap if self.gap_is_clear else torch.full_like(mean, torch.nan)

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per site, column and example."""
        import pandas as pd

        share = self.normalized()
        rows = [
            {
                "site": site,
                self.axis: column,
                "label": self.columns[column],
                "example": example,
                "patched": float(self.patched[s, column, example]),
                "effect": float(self.effect[s, column, example]),
                "normalized_mean": float(share[s, column]),
            }
            for s, site in enumerate(self.sites)
            for column in range(len(self.columns))
            for example in range(self.patched.shape[2])
        ]
        return pd.DataFrame(rows)

    def plot(self) -> "plotly.graph_objects.Figure":
        """Draw sites × columns: the share of the gap restored, or the raw effect where the gap is not clear."""
        from interp.report.figures import Axis, heatmap

        clear = self.gap_is_clear
        return heatmap(
            self.normalized() if clear else self.effect.mean(-1),
            rows=Axis("", self.sites),
            columns=Axis(self.axis, self.columns),
            title="Clean activation into the corrupted run",
            value="share of the gap restored" if clear else "mean effect",
            diverging=True,
        )

    def summary(self) -> str:
        """Give both baselines and the strongest cells."""
        mean = self.effect.mean(-1)
        best = mean.abs().flatten().topk(min(3, mean.numel())).indices.tolist()
        share = self.normalized()
        clean, corrupted = float(self.clean.mean()), float(self.corrupted.mean())
        lines = [f"metric: clean {clean:.4g}, corrupted {corrupted:.4g} ({len(self.clean)} examples)"]
        for cell in best:
            s, c = divmod(cell, len(self.columns))
            if not mean[s, c]:
                continue
            part = f", {float(share[s, c]):.0%} of the gap" if self.gap_is_clear else ""
            lines.append(f"{self.sites[s]}, {self.axis} {self.columns[c]}: {float(mean[s, c]):+.4g}{part}")
        if not self.gap_is_clear:
            lines.append("the gap between the prompts is not clear of zero, so nothing is divided by it")
        if self.unchanged.any():
            lines.append(f"{int(self.unchanged.sum())} of {self.unchanged.numel()} patches changed no activation")
        return "\n".join(lines)


def activation_patch(
    hm: HookManager,
    clean: Any,
    corrupted: Any = None,
    *,
    sites: str | Sequence[Site | str],
    metric: Callable[[Run], Float[Tensor, " batch"]] | None = None,
    pos: int | Sequence[int] | None = None,
    progress: bool = True,
) -> PatchResult:
    """Put each clean activation into the corrupted run, one cell at a time (denoising: is it enough?).

    Sites with a head axis are patched head by head, others position by position. Memory: the clean activations of all
    sites. Cost: sites × columns + 2 forwards.

    Args:
        hm: The model.
        clean: Prompts whose answer is right; whatever `hm.run` takes. Or `PromptPairs` (or `PairTokens`), which hold
            both sides.
        corrupted: As many prompts, each with as many tokens; left out with pairs.
        sites: A kind such as "resid_pre" (every layer), a glob, or sites; all with a head axis or all without.
        metric: Maps a run to one number per example; it sees the logits of the last token, [batch 1 d_vocab]. With
            pairs their logit difference by default.
        pos: Positions from each row's first token, or back from its last. They are the columns of a position grid
            (None takes all); at head sites they are patched together.
        progress: Show a bar on stderr when it is a terminal.

    Returns:
        The metric per cell and example, with both baselines.

    Raises:
        DataError: Prompts of unequal length (both tokenisations are shown), or no corrupted prompts or metric.
        SiteError: Sites with and without heads together.
        ShapeError: A metric that is not one number per example.

    Source: Vig et al. (2020); Meng et al. (2022), §2; exchange the prompts for noising.
    """
    chosen = _sites(hm, sites)
    clean, corrupted, metric = _sides(hm, clean, corrupted, metric)
    clean_tokens, corrupted_tokens = hm.to_tokens(clean), hm.to_tokens(corrupted)
    _check_lengths(hm, clean_tokens, corrupted_tokens)
    source = hm.run(clean_tokens, read=chosen, logits="last")
    start = _measure(metric, source)
    base = _measure(metric, hm.run(corrupted_tokens, logits="last"))
    by_head = _has_heads(chosen[0])
    places = _head_places(hm, chosen[0], pos) if by_head else _position_places(pos, clean_tokens.ids.shape[1])
    patched, unchanged = [], []
    with _bar(len(chosen) * len(places), progress) as step, _quiet():
        for site in chosen:
            for where in places:
                out = hm.run(corrupted_tokens, write=[Replace(site, source, where=where)], logits="last")
                # An edited attention layer runs on the eager kernel, which rounds otherwise: no change is exactly none.
                unchanged.append(any("changed nothing" in note for note in out.notes))
                patched.append(base if unchanged[-1] else _measure(metric, out))
                step()
    shape = (len(chosen), len(places))
    settings = {"sites": [s.short for s in chosen], "pos": pos, "metric": getattr(metric, "__name__", str(metric))}
    labels = [str(w.head) for w in places] if by_head else _labels(hm, clean_tokens, corrupted_tokens, places)
    data = (clean_tokens.ids, corrupted_tokens.ids)
    return PatchResult(
        provenance=Provenance.of(hm, settings=settings, data=data),
        sites=[s.short for s in chosen],
        axis="head" if by_head else "position",
        columns=labels,
        patched=torch.stack(patched).reshape(*shape, -1),
        clean=start,
        corrupted=base,
        unchanged=torch.tensor(unchanged).reshape(shape),
    )


def _sides(hm: HookManager, clean: Any, corrupted: Any, metric: Any) -> tuple[Any, Any, Callable[[Run], Tensor]]:
    """Both sides and the metric, out of pairs where those were given."""
    if isinstance(clean, PromptPairs | PairTokens):
        if corrupted is not None:
            raise DataError("pairs hold their corrupted prompts; give activation_patch(hm, pairs, sites=…)")
        pairs = clean.tokens(hm) if isinstance(clean, PromptPairs) else clean
        return pairs.clean, pairs.corrupted, metric or pairs.metric()
    if corrupted is None or metric is None:
        lacking = "corrupted prompts" if corrupted is None else "metric"
        raise DataError(f"no {lacking} given: give clean and corrupted prompts and a metric=…, or PromptPairs alone")
    return clean, corrupted, metric


def _sites(hm: HookManager, sites: str | Sequence[Site | str]) -> list[Site]:
    names: Sequence[Site | str] = [sites] if isinstance(sites, str) else list(sites)
    names = [f"*.{n}" if isinstance(n, str) and n in KINDS and KINDS[n].in_block else n for n in names]
    chosen = list(dict.fromkeys(site for name in names for site in hm.atlas.expand(name)))
    if not chosen:
        raise SiteError("no sites were given; give a kind such as 'resid_pre', or sites")
    if len({_has_heads(s) for s in chosen}) > 1:
        raise SiteError("some of these sites have a head axis and some do not; patch them in two calls")
    if len({KINDS[s.kind].axes for s in chosen}) > 1 and _has_heads(chosen[0]):
        raise SiteError(
            "these sites have different head axes (query heads, key/value heads); patch them in separate calls"
        )
    return chosen


def _has_heads(site: Site) -> bool:
    return any(axis in _HEAD_AXES for axis in KINDS[site.kind].axes)


def _check_lengths(hm: HookManager, clean: Tokens, corrupted: Tokens) -> None:
    if len(clean) != len(corrupted):
        raise DataError(f"{len(clean)} clean prompts and {len(corrupted)} corrupted ones; give them in pairs")
    for row, (a, b) in enumerate(zip(clean.lengths.tolist(), corrupted.lengths.tolist(), strict=True)):
        if a != b or a != clean.ids.shape[1]:
            shown = [" | ".join(token_names(hm, t.ids[row][t.mask[row]])) for t in (clean, corrupted)]
            why = "differ in length" if a != b else f"are shorter than the longest ({clean.ids.shape[1]} tokens)"
            raise DataError(
                f"the prompts of pair {row} {why}: {a} and {b} tokens, so positions would not correspond.\n"
                f"  clean:     {shown[0]}\n  corrupted: {shown[1]}\nReword them to one length."
            )


def _position_places(pos: int | Sequence[int] | None, width: int) -> list[Where]:
    chosen = range(width) if pos is None else [pos] if isinstance(pos, int) else list(pos)
    wrong = [p for p in chosen if not -width <= p < width]
    if wrong or not chosen:
        raise WhereError(f"pos={pos}: the prompts have positions 0 … {width - 1} (or −{width} … −1)")
    return [Where(pos=p % width) for p in chosen]


def _head_places(hm: HookManager, site: Site, pos: int | Sequence[int] | None) -> list[Where]:
    axes, sizes = KINDS[site.kind].axes, {"n_heads": hm.n_heads, "n_kv_heads": hm.n_kv_heads}
    heads = next(sizes[axis] for axis in axes if axis in sizes)
    chosen = None if pos is None else pos if isinstance(pos, int) else list(pos)
    return [Where(pos=chosen, head=h) for h in range(heads)]


def _labels(hm: HookManager, clean: Tokens, corrupted: Tokens, places: Sequence[Where]) -> list[str]:
    labels = []
    for where in places:
        names = [token_names(hm, t.ids[:, where.pos].unique()) for t in (clean, corrupted)]
        one = len(names[0]) == len(names[1]) == 1
        token = names[0][0] if names[0] == names[1] else f"{names[0][0]} → {names[1][0]}"
        labels.append(f"{where.pos}: {token}" if one else str(where.pos))
    return labels


def _measure(metric: Callable[[Run], Tensor], out: Run) -> Float[Tensor, " batch"]:
    value = metric(out)
    batch = len(out.logits)
    if not isinstance(value, Tensor) or value.shape != (batch,):
        what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ShapeError(
            f"the metric returned {what}; expected one number per example [batch] = [{batch}], such as logit_diff gives"
        )
    return value.detach().float().cpu()


@contextmanager
def _bar(total: int, show: bool) -> Iterator[Callable[[], Any]]:
    from tqdm import tqdm

    # None: only where stderr is a terminal.
    with tqdm(total=total, desc="patching", unit="cell", disable=None if show else True) as bar:
        yield bar.update


@contextmanager
def _quiet() -> Iterator[None]:
    # A patch that changes nothing is counted in the result instead of warned about in every cell.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*changed nothing")
        yield
