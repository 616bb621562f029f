"""Which labels of the small world a dictionary's latents find: the truth about every token of its text is known.

A label's latent is chosen on one half of the rows and scored on the other: the best of a thousand latents is too good
on the tokens that it was chosen by. Beside it stand what labels of other rows reach, what as many directions of other
kinds reach that fire as often, and what the token alone tells.
"""

import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.errors import DataError
from interp.core.result import Provenance, Result
from interp.core.site import Site
from interp.dictionaries.base import Dictionary
from interp.evaluate.matching import best_units, named_labels, value_name
from interp.evaluate.noise import ratio_interval
from interp.evaluate.place import place_of
from interp.evaluate.reading import Reading, encoded_in_parts
from interp.testbed.text import LabelledTokens
from interp.testbed.tokenizer import vocabulary
from interp.testbed.words import SPECIAL

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

    from interp.core.manager import HookManager

__all__ = ["CONTROLS", "LabelScores", "label_scores", "of_the_world"]

CONTROLS = ("shuffled", "random", "pca", "tokens")
_FOUND, _ABOVE_CHANCE = 0.8, 0.2
_SHIFTS, _DRAWS = 5, 200
_DIRECTIONS = 64  # directions whose values on all tokens are held at once


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class LabelScores(Result):
    """How well some latent says where each value of each label is. Tensors have an entry per value.

    A value is *found* where f1 ≥ 0.8 and (f1 − shuffled) / (1 − shuffled) ≥ 0.2.

    Attributes:
        site: TransformerLens' name of the site.
        n_fit: tokens of the rows that latents were chosen on.
        n_tokens: tokens of the rows that they were scored on.
        n_rows: how many those are; the independent units of the intervals.
        names: label and value, such as "role place".
        count: scored tokens that have it.
        latent: the latent that says it best, on the tokens to choose by.
        f1: 2 · hits / (tokens on which it fires + tokens that have the value), on the scored tokens.
        precision: hits / tokens on which it fires.
        recall: hits / tokens that have the value.
        low, high: 95 % interval of `f1`, by the delta method over rows.
        chosen_f1: F1 on the tokens to choose by, which is too high.
        shuffled: the largest F1 in five repetitions with the labels of other rows, latents chosen anew.
        random: F1 of as many random directions, each firing as often as a latent, chosen and scored alike.
        pca: the same of principal components, with both signs.
        tokens: F1 of the best set of tokens, from the tokens to choose by: what can be told without context.
        found_interval: 95 % interval of the number of found values, from 200 bootstrap samples of the rows.
    """

    title: ClassVar[str] = "Labels of the small world"
    site: str
    n_fit: int
    n_tokens: int
    n_rows: int
    names: list[str]
    count: Int[Tensor, "value"]
    latent: Int[Tensor, "value"]
    f1: Float[Tensor, "value"]
    precision: Float[Tensor, "value"]
    recall: Float[Tensor, "value"]
    low: Float[Tensor, "value"]
    high: Float[Tensor, "value"]
    chosen_f1: Float[Tensor, "value"]
    shuffled: Float[Tensor, "value"]
    random: Float[Tensor, "value"]
    pca: Float[Tensor, "value"]
    tokens: Float[Tensor, "value"]
    found_interval: tuple[float, float]

    @property
    def found(self) -> Bool[Tensor, "value"]:
        """Which values are found."""
        return (self.f1 >= _FOUND) & (self.f1 - self.shuffled >= _ABOVE_CHANCE * (1 - self.shuffled))

    @property
    def in_context(self) -> Bool[Tensor, "value"]:
        """Which of them no set of tokens finds."""
        return self.found & (self.tokens < _FOUND)

    def figures(self) -> dict[str, float]:
        """The counts, by the names that `interp.evaluate.definitions` has for them."""
        controls = {f"labels_found_{name}": float((getattr(self, name) >= _FOUND).sum()) for name in CONTROLS}
        return {
            "labels_tested": float(len(self.names)),
            "labels_found": float(self.found.sum()),
            "labels_found_in_context": float(self.in_context.sum()),
            "labelled_latents": float(len(self.latent[self.found].unique())),
            "label_f1": float(self.f1.mean()),
            **controls,
        }

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per value, the best found first."""
        import pandas as pd

        order = self.f1.argsort(descending=True, stable=True)
        columns = ("count", "latent", "f1", "low", "high", "precision", "recall", "chosen_f1", *CONTROLS, "found")
        held = {name: getattr(self, name)[order].tolist() for name in columns}
        return pd.DataFrame({"label": [self.names[i] for i in order.tolist()], **held})

    def plot(self) -> "plotly.graph_objects.Figure":
        """Return the F1 of every value, the best found first, with those of the controls in the same order."""
        figures = importlib.import_module("interp.report.figures")
        order = self.f1.argsort(descending=True, stable=True)
        lines = {"latents": self.f1[order], **{name: getattr(self, name)[order] for name in CONTROLS}}
        return figures.line(lines, x=figures.Axis("values, best found first"), title=self.title, value="F1")

    def summary(self) -> str:
        """Say how many values are found, and by the controls."""
        said = self.figures()
        low, high = self.found_interval
        others = ", ".join(f"{name} {said[f'labels_found_{name}']:.0f}" for name in CONTROLS)
        return (
            f"{self.site}: {said['labels_found']:.0f} of {len(self.names)} label values are found with F1 ≥ {_FOUND} "
            f"(95 % interval {low:.0f} to {high:.0f}), by {said['labelled_latents']:.0f} latents; "
            f"{said['labels_found_in_context']:.0f} of them no set of tokens finds\n"
            f"controls: {others}; chosen on {self.n_fit:,} tokens, scored on {self.n_tokens:,} others in "
            f"{self.n_rows:,} rows"
        )


@dataclass(frozen=True)
class _Tokens:
    """The tokens that count, and what is known of each."""

    ids: Int[Tensor, "token"]
    row: Int[Tensor, "token"]
    x: Float[Tensor, "token d"]
    labels: Mapping[str, Int[Tensor, "token"]]
    shifted: Sequence[Mapping[str, Int[Tensor, "token"]]]

    @property
    def fit(self) -> Bool[Tensor, "token"]:
        """Those to choose by: of every other row."""
        return self.row % 2 == 0


@dataclass(frozen=True)
class _Units:
    """On which token each firing was, and of which of `n` units."""

    token: Int[Tensor, "firing"]
    unit: Int[Tensor, "firing"]
    n: int


@dataclass(frozen=True)
class _Scored:
    """Of each value: hits, firings and tokens that have it, by scored row; and what they were chosen by."""

    hits: Float[Tensor, "value row"]
    fires: Float[Tensor, "value row"]
    has: Float[Tensor, "value row"]
    unit: Int[Tensor, "value"]
    chosen_f1: Float[Tensor, "value"]

    def f1(self) -> Float[Tensor, "value"]:
        return 2 * self.hits.sum(1) / (self.fires + self.has).sum(1).clamp_min(1)


@torch.no_grad()
def label_scores(
    hm: "HookManager",
    dictionary: Dictionary,
    labelled: LabelledTokens,
    site: str | Site | None = None,
    *,
    min_tokens: int = 30,
    seed: int = 0,
) -> LabelScores:
    """Measure which labels of the small world's text some latent finds, against four controls.

    In this world every word is one token, and a label that holds for a passage is on each of its tokens; so F1 is over
    tokens, and a latent that fires once in a passage does not find what the passage is. Labels "template" and
    "held_out" are left out, and so is "open". Memory, in bytes: 4 · tokens · (d_in + 64) and 16 for each firing.

    Args:
        hm: the manager of a model of the small world.
        dictionary: on the model's device.
        labelled: rows of text that it was not trained on, [row pos]; at least four.
        site: where it acts; None for where it was trained.
        min_tokens: values with fewer tokens in either half are left out.
        seed: of the random directions and of the bootstrap.

    Returns:
        Scores of every value, on the rows that nothing was chosen by.

    Raises:
        ConfigError: the dictionary does not fit the site.
        DataError: fewer than four rows, or no value with enough tokens.

    Source: F1 of a latent for an attribute as in Makelov et al. 2024 (2405.08366). Departures: chosen and scored on
    different text; the controls.
    """
    place = place_of(hm, dictionary, site)
    if labelled.ids.ndim != 2 or len(labelled.ids) < 4:
        raise DataError(f"labelled tokens of shape {tuple(labelled.ids.shape)}; give four rows or more, [row pos]")
    text, units = _read(hm, dictionary, labelled, place)
    values = _values(text, min_tokens)
    if not values:
        raise DataError(f"no label has a value with {min_tokens} tokens in each half; give more rows")
    draw = torch.Generator().manual_seed(seed)
    found = _scores(text, text.labels, values, units)
    f1 = found.f1()
    shuffled = torch.stack([_scores(text, labels, values, units).f1() for labels in text.shifted]).amax(0)
    often = torch.bincount(units.unit[text.fit[units.token]], minlength=units.n)
    random = torch.randn(units.n, text.x.shape[1], generator=draw)
    ends = [ratio_interval(2 * a, b) for a, b in zip(found.hits, found.fires + found.has, strict=True)]
    low, high = torch.tensor(ends).T
    claimed = shuffled + _ABOVE_CHANCE * (1 - shuffled)
    return LabelScores(
        site=place.name,
        n_fit=int(text.fit.sum()),
        n_tokens=int((~text.fit).sum()),
        n_rows=found.hits.shape[1],
        names=[value_name(name, value) for name, value in values],
        count=found.has.sum(1).long(),
        latent=found.unit,
        f1=f1,
        precision=found.hits.sum(1) / found.fires.sum(1).clamp_min(1),
        recall=found.hits.sum(1) / found.has.sum(1).clamp_min(1),
        low=low,
        high=high,
        chosen_f1=found.chosen_f1,
        shuffled=shuffled,
        random=_scores(text, text.labels, values, _fired(text, random, often)).f1(),
        pca=_scores(text, text.labels, values, _fired(text, *_components(text, often, draw))).f1(),
        tokens=_of_tokens(text, values),
        found_interval=_bootstrap(found, claimed.clamp_min(_FOUND), draw),
        provenance=Provenance.of(
            hm, settings={"site": place.name, "min_tokens": min_tokens, "rows": list(labelled.ids.shape)}, seed=seed
        ),
    )


def _read(hm: "HookManager", dictionary: Dictionary, labelled: LabelledTokens, place: Site) -> tuple[_Tokens, _Units]:
    """Run the text once; labels of other rows are those of rows that are a whole number of pairs further on."""
    rows = len(labelled.ids) // 2 * 2
    grid = named_labels({name: codes[:rows] for name, codes in labelled.labels.items()})
    cut = LabelledTokens(labelled.ids[:rows], {})
    reading, n = Reading(hm, cut, cut.ids.numel()), 0
    kept, xs, fired = list[Tensor](), list[Tensor](), list[tuple[Tensor, Tensor]]()
    for block, keep, _ in reading.blocks("matching labels"):
        x = hm.run(block.inputs, read=[place], logits="none")[place.name]
        for part, latents in encoded_in_parts(dictionary, x):
            active = latents[keep[part].to(x.device)] > 0
            token, unit = active.nonzero().T.cpu()
            fired.append((token + n, unit))
            n += len(active)
        xs.append(x[keep.to(x.device)].float().cpu())
        kept.append(keep)
    keep = torch.cat(kept)
    shifts = sorted({2 * max(1, rows // 2 * (i + 1) // (_SHIFTS + 1)) for i in range(_SHIFTS)})
    shifted = [{name: codes.roll(shift, 0)[keep] for name, codes in grid.items()} for shift in shifts]
    row = torch.arange(rows)[:, None].expand_as(keep)[keep]
    labels = {name: codes[keep] for name, codes in grid.items()}
    token, unit = (torch.cat(column) for column in zip(*fired, strict=True))
    return _Tokens(cut.ids[keep], row, torch.cat(xs), labels, shifted), _Units(token, unit, dictionary.cfg.d_sae)


def _values(text: _Tokens, least: int) -> list[tuple[str, int]]:
    """Label and code of the values with enough tokens in each half."""
    found = []
    for name, codes in text.labels.items():
        width = max(int(codes.max()), 0) + 2
        counts = [torch.bincount(codes[half] + 1, minlength=width)[1:] for half in (text.fit, ~text.fit)]
        found += [(name, value) for value in (torch.minimum(*counts) >= least).nonzero()[:, 0].tolist()]
    return found


def _scores(text: _Tokens, labels: Mapping[str, Tensor], values: list[tuple[str, int]], units: _Units) -> _Scored:
    """Choose a unit for each value on one half of the rows, and count on the other."""
    mine = text.fit[units.token]
    number = text.fit.cumsum(0) - 1
    token, unit = number[units.token[mine]], units.unit[mine]
    best = {name: best_units(token, unit, codes[text.fit], n=units.n) for name, codes in labels.items()}
    order = units.unit[~mine].argsort(stable=True)
    others, sorted_units = units.token[~mine][order], units.unit[~mine][order]
    ends = torch.searchsorted(sorted_units, torch.arange(units.n + 1)).tolist()
    chosen = [int(best[name][1][value]) for name, value in values]
    firing = (others[ends[u] : ends[u + 1]] for u in chosen)
    hits, fires, has = _by_row(text, labels, values, firing)
    f1 = torch.stack([best[name][0][value] for name, value in values])
    return _Scored(hits, fires, has, torch.tensor(chosen), f1)


def _by_row(
    text: _Tokens, labels: Mapping[str, Tensor], values: list[tuple[str, int]], firing: Iterator[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Hits, firings and tokens that have the value, of each value by scored row; from the tokens where it fires."""
    rows = int(text.row.max()) // 2 + 1
    scored = ~text.fit

    def counted(at: Tensor) -> Tensor:
        return torch.bincount(text.row[at] // 2, minlength=rows)

    parts = []
    for (name, value), tokens in zip(values, firing, strict=True):
        codes = labels[name]
        has = (scored & (codes == value)).nonzero()[:, 0]
        parts.append(torch.stack([counted(tokens[codes[tokens] == value]), counted(tokens), counted(has)]))
    hits, fires, has = torch.stack(parts, 1).double()
    return hits, fires, has


def _fired(text: _Tokens, directions: Float[Tensor, "n d"], often: Int[Tensor, "n"]) -> _Units:
    """Directions as units that fire above a threshold, which each passes `often` times on the tokens to choose by."""
    x = text.x - text.x[text.fit].mean(0)
    parts = []
    for first in range(0, len(directions), _DIRECTIONS):
        some = slice(first, first + _DIRECTIONS)
        height, k = x @ directions[some].T, often[some]
        ranked = height[text.fit].sort(0, descending=True).values
        threshold = ranked.gather(0, (k[None] - 1).clamp_min(0))[0].masked_fill(k == 0, math.inf)
        token, unit = (height >= threshold).nonzero().T
        parts.append((token, unit + first))
    token, unit = (torch.cat(column) for column in zip(*parts, strict=True))
    return _Units(token, unit, len(directions))


def _components(text: _Tokens, often: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Principal components with both signs, as many as there are latents, each with some latent's frequency."""
    x = text.x[text.fit].double()
    axes = torch.linalg.eigh(torch.cov(x.T)).eigenvectors.flip(1).T.float()
    signed = torch.stack([axes, -axes], 1).flatten(0, 1)
    number = torch.arange(len(often)) % len(signed)
    return signed[number], often[torch.randperm(len(often), generator=draw)]


def _of_tokens(text: _Tokens, values: list[tuple[str, int]]) -> Float[Tensor, "value"]:
    """F1 of the set of tokens that best says each value: those that have it most often, as many as do best."""
    n = int(text.ids.max()) + 1
    fired = torch.bincount(text.ids[text.fit], minlength=n)
    sets = []
    for name, value in values:
        hits = torch.bincount(text.ids[text.fit & (text.labels[name] == value)], minlength=n)
        order = (hits / fired.clamp_min(1)).argsort(descending=True, stable=True)
        f1 = 2 * hits[order].cumsum(0) / (fired[order].cumsum(0) + hits.sum()).clamp_min(1)
        chosen = torch.zeros(n, dtype=torch.bool)
        chosen[order[: int(f1.argmax()) + 1]] = True
        sets.append(chosen)
    scored = ~text.fit
    firing = ((scored & chosen[text.ids]).nonzero()[:, 0] for chosen in sets)
    hits, fires, has = _by_row(text, text.labels, values, firing)
    return 2 * hits.sum(1) / (fires + has).sum(1).clamp_min(1)


def _bootstrap(found: _Scored, least: Tensor, draw: torch.Generator) -> tuple[float, float]:
    """Percentile interval of the number of values whose F1 reaches what it must, rows drawn with replacement."""
    rows = found.hits.shape[1]
    counts = []
    for _ in range(_DRAWS):
        weights = torch.bincount(torch.randint(rows, (rows,), generator=draw), minlength=rows).double()
        f1 = 2 * (found.hits @ weights) / ((found.fires + found.has) @ weights).clamp_min(1)
        counts.append(float((f1 >= least).sum()))
    low, high = torch.tensor(counts).quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def of_the_world(hm: "HookManager") -> bool:
    """Whether a model reads the small world's tokens."""
    return hm.d_vocab == len(vocabulary()) and getattr(hm.tokenizer, "bos_token", None) == SPECIAL[0]
