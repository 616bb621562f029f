"""Which labels of the small world a dictionary's latents find: the truth about every token of its text is known.

A label's latent, and the level above which it counts as firing, are chosen on one half of the rows and scored on the
other: the best of a thousand latents is too good on the tokens that it was chosen by. Beside it stand what labels of
other rows reach, what as many directions of other kinds reach that fire as often, and what the token alone tells.
"""

import importlib
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
from interp.evaluate.reading import Reading, encoded_in_parts, side_by_side
from interp.testbed.text import LabelledTokens
from interp.testbed.tokenizer import vocabulary
from interp.testbed.words import SPECIAL

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

    from interp.core.manager import HookManager

__all__ = ["CONTROLS", "LabelScores", "ends_of", "interval_of_found", "label_scores", "of_the_world"]

CONTROLS = ("shuffled", "random", "pca", "tokens")
LEVELS = (0.0, 0.25, 0.5)
_FOUND, _ABOVE_CHANCE = 0.8, 0.2
_SHIFTS, _DRAWS = 5, 200
_PAIRED, _KINDS, _ROLES, _SAME = "role", ("task", "function", "gender", "number", "sentiment", "topic"), 64, 0.95
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
        names: label and value, such as "role place"; or two, such as "role output, function plural".
        pair: whether it is of two labels.
        count: scored tokens that have it.
        latent: the latent that says it best, on the tokens to choose by.
        level: above which share of its largest activation there it counts as firing: 0, a quarter or a half.
        f1: 2 · hits / (tokens on which it fires + tokens that have the value), on the scored tokens.
        precision: hits / tokens on which it fires.
        recall: hits / tokens that have the value.
        low, high: 95 % interval of `f1`, by the delta method over rows.
        chosen_f1: F1 on the tokens to choose by, which is too high.
        shuffled: the largest F1 in five repetitions with the labels of other rows, latents chosen anew.
        random: F1 of as many random directions as there are latents and levels, each firing as often as one of them,
            chosen and scored alike.
        pca: the same of principal components, with both signs.
        tokens: F1 of the best set of tokens, from the tokens to choose by: what can be told without context.
        found_interval: 95 % interval of the number of found values, from 200 bootstrap samples of the rows.
        by_row: hits, firings, and tokens that have the value, of each value in each scored row; all that follows is
            what a choice between dictionaries needs.
        shuffles: F1 of each of those repetitions, on the tokens to choose by and on the scored ones.
        chosen_random, chosen_pca: as `chosen_f1`, of those directions.
    """

    title: ClassVar[str] = "Labels of the small world"
    site: str
    n_fit: int
    n_tokens: int
    n_rows: int
    names: list[str]
    pair: Bool[Tensor, "value"]
    count: Int[Tensor, "value"]
    latent: Int[Tensor, "value"]
    level: Float[Tensor, "value"]
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
    by_row: Int[Tensor, "3 value row"]
    shuffles: Float[Tensor, "repetition 2 value"]
    chosen_random: Float[Tensor, "value"]
    chosen_pca: Float[Tensor, "value"]

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
            "labels_found_single": float((self.found & ~self.pair).sum()),
            "labels_found_in_context": float(self.in_context.sum()),
            "labelled_latents": float(len(self.latent[self.found].unique())),
            "labels_found_positive": float((self.found & (self.level == 0)).sum()),
            "label_f1": float(self.f1.mean()),
            **controls,
        }

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per value, the best found first."""
        import pandas as pd

        order = self.f1.argsort(descending=True, stable=True)
        columns = (
            "count",
            "latent",
            "level",
            "f1",
            "low",
            "high",
            "precision",
            "recall",
            "chosen_f1",
            *CONTROLS,
            "found",
        )
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

    def both(self) -> Float[Tensor, "2 value"]:
        """F1 on the tokens to choose by, and on the scored ones."""
        return torch.stack([self.chosen_f1.double(), self.f1()])

    def by_row(self) -> Int[Tensor, "3 value row"]:
        return torch.stack([self.hits, self.fires, self.has]).int()


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
    "held_out" are left out, and so is "open". Beside single labels stand pairs of a role with a task, function, gender,
    number, sentiment or topic, unless a pair is about the same as one of its two.
    Memory, in bytes: 4 · tokens · (d_in + 64), and 16 for each firing at each level.

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
    different text; three levels of firing, for weak activations say less; the controls.
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
    shuffles = torch.stack([_scores(text, labels, values, units).both() for labels in text.shifted])
    shuffled = shuffles[:, 1].amax(0)
    often = torch.bincount(units.unit[text.fit[units.token]], minlength=units.n)
    directions = torch.randn(units.n, text.x.shape[1], generator=draw)
    random = _scores(text, text.labels, values, _fired(text, directions, often))
    pca = _scores(text, text.labels, values, _fired(text, *_components(text, often, draw)))
    low, high = ends_of(found.by_row())
    return LabelScores(
        site=place.name,
        n_fit=int(text.fit.sum()),
        n_tokens=int((~text.fit).sum()),
        n_rows=found.hits.shape[1],
        names=[_name(name, value) for name, value in values],
        pair=torch.tensor(["+" in name for name, _ in values]),
        count=found.has.sum(1).long(),
        latent=found.unit % dictionary.cfg.d_sae,
        level=torch.tensor(LEVELS)[found.unit // dictionary.cfg.d_sae],
        f1=found.f1(),
        precision=found.hits.sum(1) / found.fires.sum(1).clamp_min(1),
        recall=found.hits.sum(1) / found.has.sum(1).clamp_min(1),
        low=low,
        high=high,
        chosen_f1=found.chosen_f1,
        shuffled=shuffled,
        random=random.f1(),
        pca=pca.f1(),
        tokens=_of_tokens(text, values),
        found_interval=interval_of_found(found.by_row(), shuffled, draw),
        by_row=found.by_row(),
        shuffles=shuffles,
        chosen_random=random.chosen_f1,
        chosen_pca=pca.chosen_f1,
        provenance=Provenance.of(
            hm, settings={"site": place.name, "min_tokens": min_tokens, "rows": list(labelled.ids.shape)}, seed=seed
        ),
    )


def _read(hm: "HookManager", dictionary: Dictionary, labelled: LabelledTokens, place: Site) -> tuple[_Tokens, _Units]:
    """Run the text once; labels of other rows are those of rows that are a whole number of pairs further on."""
    rows = len(labelled.ids) // 2 * 2
    grid = _with_pairs(named_labels({name: codes[:rows] for name, codes in labelled.labels.items()}))
    cut = LabelledTokens(labelled.ids[:rows], {})
    reading, n = Reading(hm, cut, cut.ids.numel()), 0
    kept, xs, fired = list[Tensor](), list[Tensor](), list[tuple[Tensor, Tensor, Tensor]]()
    for block, keep, _ in reading.blocks("matching labels"):
        x = side_by_side(hm.run(block.inputs, read=[place], logits="none")[place.name], place)
        for part, latents in encoded_in_parts(dictionary, x):
            active = latents[keep[part].to(x.device)].float().cpu()
            token, unit = (active > 0).nonzero().T
            fired.append((token + n, unit, active[token, unit]))
            n += len(active)
        xs.append(x[keep.to(x.device)].float().cpu())
        kept.append(keep)
    keep = torch.cat(kept)
    shifts = sorted({2 * max(1, rows // 2 * (i + 1) // (_SHIFTS + 1)) for i in range(_SHIFTS)})
    shifted = [{name: codes.roll(shift, 0)[keep] for name, codes in grid.items()} for shift in shifts]
    row = torch.arange(rows)[:, None].expand_as(keep)[keep]
    labels = {name: codes[keep] for name, codes in grid.items()}
    text = _Tokens(cut.ids[keep], row, torch.cat(xs), labels, shifted)
    return text, _levelled(text, *(torch.cat(column) for column in zip(*fired, strict=True)), n=dictionary.cfg.d_sae)


def _levelled(text: _Tokens, token: Tensor, latent: Tensor, height: Tensor, *, n: int) -> _Units:
    """Each latent at each level as a unit: it fires above that share of its largest activation on rows to choose by."""
    fit = text.fit[token]
    largest = torch.zeros(n).scatter_reduce(0, latent[fit], height[fit], "amax")
    above = [height > level * largest[latent] for level in LEVELS]
    parts = [(token[high], latent[high] + number * n) for number, high in enumerate(above)]
    tokens, units = (torch.cat(column) for column in zip(*parts, strict=True))
    return _Units(tokens, units, n * len(LEVELS))


def _with_pairs(labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The labels, and what a token is in its passage together with each label of what kind it or its passage is."""
    found = dict(labels)
    role = labels.get(_PAIRED)
    for name in _KINDS if role is not None else ():
        if role is not None and name in labels:
            both = (role >= 0) & (labels[name] >= 0)
            found[f"{_PAIRED}+{name}"] = (labels[name] * _ROLES + role).masked_fill(~both, -1)
    return found


def _name(name: str, code: int) -> str:
    if "+" not in name:
        return value_name(name, code)
    first, other = name.split("+")
    return f"{value_name(first, code % _ROLES)}, {value_name(other, code // _ROLES)}"


def _values(text: _Tokens, least: int) -> list[tuple[str, int]]:
    """Label and code of the values with enough tokens in each half."""
    found = []
    for name, codes in text.labels.items():
        width = max(int(codes.max()), 0) + 2
        counts = [torch.bincount(codes[half] + 1, minlength=width)[1:] for half in (text.fit, ~text.fit)]
        often = counts[0]
        for value in (torch.minimum(*counts) >= least).nonzero()[:, 0].tolist():
            if "+" in name:
                # A pair that is about the same as one of its two says nothing new.
                first, other = name.split("+")
                parts = [(first, value % _ROLES), (other, value // _ROLES)]
                sizes = [int((text.labels[one][text.fit] == code).sum()) for one, code in parts]
                if 2 * int(often[value]) > _SAME * (int(often[value]) + min(sizes)):
                    continue
            found.append((name, value))
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
    n, parts = int(text.fit.sum()), []
    for first in range(0, len(directions), _DIRECTIONS):
        some = slice(first, first + _DIRECTIONS)
        height = directions[some] @ x.T
        known = height[:, text.fit]
        for number, (row, k) in enumerate(zip(known, often[some].tolist(), strict=True)):
            if k:
                token = (height[number] >= row.kthvalue(n + 1 - k).values).nonzero()[:, 0]
                parts.append((token, torch.full_like(token, first + number)))
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


def ends_of(by_row: Int[Tensor, "3 value row"]) -> Float[Tensor, "2 value"]:
    """Return the ends of the 95 % interval of each F1, by the delta method over rows.

    Args:
        by_row: hits, firings, and tokens that have the value.
    """
    hits, fires, has = by_row.double()
    return torch.tensor([ratio_interval(2 * a, b) for a, b in zip(hits, fires + has, strict=True)]).T


def interval_of_found(
    by_row: Int[Tensor, "3 value row"], shuffled: Float[Tensor, "value"], draw: torch.Generator
) -> tuple[float, float]:
    """Return the percentile interval of the number of found values, rows drawn with replacement.

    Args:
        by_row: hits, firings, and tokens that have the value.
        shuffled: the F1 that labels of other rows reach, as in `LabelScores`.
        draw: for the rows.
    """
    hits, fires, has = by_row.double()
    least = (shuffled + _ABOVE_CHANCE * (1 - shuffled)).clamp_min(_FOUND)
    rows = hits.shape[1]
    counts = []
    for _ in range(_DRAWS):
        weights = torch.bincount(torch.randint(rows, (rows,), generator=draw), minlength=rows).double()
        f1 = 2 * (hits @ weights) / ((fires + has) @ weights).clamp_min(1)
        counts.append(float((f1 >= least).sum()))
    low, high = torch.tensor(counts).quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def of_the_world(hm: "HookManager") -> bool:
    """Whether a model reads the small world's tokens."""
    return hm.d_vocab == len(vocabulary()) and getattr(hm.tokenizer, "bos_token", None) == SPECIAL[0]
