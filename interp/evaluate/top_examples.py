"""What makes a dictionary's latents fire: their strongest and weaker contexts, what they write, and what they match.

All statistics leave special tokens out.
"""

import importlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.decompose import effect_on_logits
from interp.core.errors import DataError
from interp.core.result import Provenance, Result, token_names
from interp.core.site import Site
from interp.data.tokens import TokenBlock
from interp.dictionaries.base import Dictionary
from interp.evaluate.contexts import Contexts
from interp.evaluate.dictionary import place_of
from interp.evaluate.matching import label_matches
from interp.evaluate.reading import Reading, encoded_in_parts, side_by_side

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

    from interp.core.manager import HookManager

__all__ = ["TopExamples", "top_examples"]

_PER_OCTAVE, _LOWEST, _BINS = 4, -16, 128  # histogram bins: 2^(-16), 2^(-15.75), … 2^16
_WRITERS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
_DEFAULT, _LISTED = 100, 10  # latents to choose; tokens at each end of what one writes
_COLUMNS = ("ids", "mask", "special", "doc", "pos")


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class TopExamples(Result):
    """Contexts, statistics, writes and best matches of some latents.

    Attributes:
        site: TransformerLens' name of the site.
        n_tokens: tokens that count: real and not special.
        latents: which latents.
        firing: on how many tokens each latent of the dictionary was positive.
        largest: largest activation of each chosen latent; 0 where it never fired.
        mean_activation: mean of its positive activations; NaN where there are none.
        histogram: its positive activations by size.
        edges: borders of the histogram's bins, four to an octave; the outermost hold what lies beyond them.
        ids: the tokens of each context, the one with the largest activation in the middle; −1 beyond the document.
        activations: the latent's activation at each of them; NaN at special tokens and beyond the document.
        band: of each context, an index into `bands`; −1 where there is no further context.
        doc: index of its document in the text.
        pos: position of its middle token in the document.
        raised, lowered: tokens whose logits a unit of the latent raises or lowers most; none off the residual stream.
        raised_by, lowered_by: by how much, at σ = 1, against the mean over the vocabulary; where the dictionary
            normalises tokens, at a deviation of 1.
        label: what the latent matches best: "token 'x'", or a label's value where the text has labels; "" for nothing.
        f1, precision, recall: of "the latent is positive" for that.
        chance: largest F1 that anything reached in 20 shuffles of the tokens against the activations.
        claimed: whether (f1 − chance) / (1 − chance) ≥ 0.2: only then is the match more than luck.
        names: text of every token id above.
    """

    title: ClassVar[str] = "Latents"
    bands: ClassVar[tuple[str, ...]] = ("strongest", "around the median", "around the weakest tenth")
    site: str
    n_tokens: int
    latents: Int[Tensor, "n"]
    firing: Int[Tensor, "d_sae"]
    largest: Float[Tensor, "n"]
    mean_activation: Float[Tensor, "n"]
    histogram: Int[Tensor, "n bin"]
    edges: Float[Tensor, "edge"]
    ids: Int[Tensor, "n example window"]
    activations: Float[Tensor, "n example window"]
    band: Int[Tensor, "n example"]
    doc: Int[Tensor, "n example"]
    pos: Int[Tensor, "n example"]
    raised: Int[Tensor, "n listed"]
    raised_by: Float[Tensor, "n listed"]
    lowered: Int[Tensor, "n listed"]
    lowered_by: Float[Tensor, "n listed"]
    label: list[str]
    f1: Float[Tensor, "n"]
    precision: Float[Tensor, "n"]
    recall: Float[Tensor, "n"]
    chance: Float[Tensor, "n"]
    claimed: Bool[Tensor, "n"]
    names: dict[int, str]

    @property
    def density(self) -> Float[Tensor, "d_sae"]:
        """Share of tokens on which each latent of the dictionary was positive."""
        return self.firing.double() / self.n_tokens

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per latent and context; the middle token is between the bars of `context`."""
        import pandas as pd

        rows, middle = [], self.ids.shape[2] // 2
        for i, latent in enumerate(self.latents.tolist()):
            known = {"latent": latent, "density": float(self.density[latent]), "label": self._claim(i)}
            for e in (self.band[i] >= 0).nonzero()[:, 0].tolist():
                words = ["" if t < 0 else self.names[t] for t in self.ids[i, e].tolist()]
                row = {**known, "band": self.bands[int(self.band[i, e])], "token": words[middle]}
                row |= {"activation": float(self.activations[i, e, middle])}
                words[middle] = f"|{words[middle]}|"
                rows.append({**row, "context": "".join(words), "doc": int(self.doc[i, e]), "pos": int(self.pos[i, e])})
        return pd.DataFrame(rows)

    def plot(self) -> "plotly.graph_objects.Figure":
        """Return how many latents of the whole dictionary fire how often; those that never did are left out."""
        figures = importlib.import_module("interp.report.figures")
        log = self.density[self.firing > 0].log10()
        low = math.floor(float(log.min()) * 4) if len(log) else -4
        counts = torch.bincount((log * 4).floor().long().clamp(max=-1) - low, minlength=-low)
        labels = figures.Axis("log10 of the share of tokens", [f"{(low + i) / 4:g}" for i in range(len(counts))])
        dead = int((self.firing == 0).sum())
        title = f"How often the latents of {self.site} fire ({dead} never did)"
        return figures.bars(counts, labels=labels, title=title, value="latents")

    def summary(self) -> str:
        """Say of each latent how often it fires, what it matches and where it is strongest; ten at most."""
        lines = [f"{self.site}: {len(self.latents)} latents on {self.n_tokens:,} tokens (special ones left out)"]
        for i, latent in enumerate(self.latents.tolist()[:10]):
            what = f"; {self._claim(i)} (F1 {self.f1[i]:.2f})" if self.claimed[i] else ""
            best = "".join(self.names[t] for t in self.ids[i, 0].tolist() if t >= 0) if self.band[i, 0] == 0 else ""
            where = f"; {best!r}" if best else ""
            lines.append(
                f"latent {latent}: density {self.density[latent]:.2g}, up to {self.largest[i]:.3g}{what}{where}"
            )
        return "\n".join(lines + ["…"] * (len(self.latents) > 10))

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write a page to look through: search, sort, contexts, writes; see `interp.report.dictionary_page`.

        Args:
            path: File to write; parent folders are made, an existing file is replaced in one step.

        Returns:
            The path written.
        """
        written: Path = importlib.import_module("interp.report.dictionary_page").write_dictionary_page(path, self)
        return written

    def _repr_html_(self) -> str:
        return str(importlib.import_module("interp.report.dictionary_page").framed_page(self))

    def _claim(self, i: int) -> str:
        return self.label[i] if bool(self.claimed[i]) else ""


def top_examples(
    hm: "HookManager",
    dictionary: Dictionary,
    data: Any,
    *,
    latents: Sequence[int] | int | None = None,
    site: str | Site | None = None,
    n_examples: int = 10,
    context: int = 10,
    max_tokens: int = 200_000,
) -> TopExamples:
    """Find the contexts in which latents fire, from the strongest to weak ones, and what the latents match.

    One pass over the text, up to the site; a second one when the latents are to be chosen. Memory, in bytes: for each
    chosen latent `(n_examples + 40) · (2 · context + 1) · 12`, plus 16 for each time it fires, 8 for each token and
    label, and about 256 MiB for the latents of a part of a block.

    Args:
        hm: the manager of the model.
        dictionary: a dictionary of raw activations, on the model's device.
        data: a `TokenSource`; whatever `Documents` takes, in rows of 128 tokens; or `LabelledTokens` of the small
            world, whose labels are then matched too.
        latents: which; or how many to choose, 100 for None: a quarter of them the ones with the largest activations,
            the others spread evenly from the rarest to the densest of those that fire.
        site: where the dictionary acts; None for where it was trained.
        n_examples: strongest contexts of each latent; up to six weaker ones come on top.
        context: tokens on each side of the strongest one.
        max_tokens: how many tokens to run, special ones and pads included; whole blocks are run.

    Returns:
        The latents' contexts and statistics; tensors are on the host. `to_html` writes them as a page.

    Raises:
        DataError: a latent that is not there, no latent that fires, or text without tokens that count.
        ConfigError: a site that the dictionary does not fit, or that is not known.

    Source: strongest and weaker contexts as in Bricken et al. 2023, "Towards Monosemanticity"; matching by F1 as in
    Makelov et al. 2024 (2405.08366). Departures: weaker contexts come from a random sample of 40, and a match is
    claimed only above shuffled labels.
    """
    place = place_of(hm, dictionary, site)
    if n_examples < 1 or context < 0 or max_tokens < 1:
        raise DataError(f"n_examples={n_examples}, context={context}, max_tokens={max_tokens}: at least 1, 0 and 1")
    text = Reading(hm, data, max_tokens)
    wanted = _DEFAULT if latents is None else latents
    if isinstance(wanted, int):
        chosen = _spread(*_scan(hm, dictionary, text, place), wanted)
    else:
        chosen = _checked(wanted, dictionary)
    watch = _Watch(chosen.to(hm.device), dictionary.cfg.d_sae, n_examples, context)
    for block, keep, labels in text.blocks("looking at latents"):
        x = side_by_side(hm.run(block.inputs, read=[place], logits="none")[place.name], place)
        for part, active in encoded_in_parts(dictionary, x):
            columns = {name: codes[part] for name, codes in labels.items()}
            rows = replace(block, position_ids=None, **{name: getattr(block, name)[part] for name in _COLUMNS})
            watch.add(active, keep[part], rows, columns)
    if watch.n == 0:
        raise DataError(f"{text.describe()} has no token that counts; give more text")
    found = {**watch.figures(hm), **_writes(hm, dictionary, place, chosen)}
    shown = torch.cat([found[name].flatten() for name in ("ids", "raised", "lowered")]).unique()
    shown = shown[shown >= 0]
    settings = {"site": place.name, "n_examples": n_examples, "context": context, "max_tokens": max_tokens}
    return TopExamples(
        site=place.name,
        latents=chosen,
        names=dict(zip(shown.tolist(), token_names(hm, shown), strict=True)),
        provenance=Provenance.of(hm, settings={**settings, "special_tokens": "left out", "text": text.describe()}),
        **found,
    )


def _checked(latents: Sequence[int], dictionary: Dictionary) -> Int[Tensor, "n"]:
    chosen, d_sae = [int(i) for i in latents], dictionary.cfg.d_sae
    wrong = [i for i in chosen if not 0 <= i < d_sae]
    if not chosen or wrong or len(set(chosen)) < len(chosen):
        what = f"has no latent {wrong[0]}" if wrong else "was asked for no latents, or for one twice"
        raise DataError(f"this dictionary {what}; give different numbers from 0 to {d_sae - 1}")
    return torch.tensor(chosen)


def _scan(
    hm: "HookManager", dictionary: Dictionary, text: Reading, place: Site
) -> tuple[Int[Tensor, "d_sae"], Float[Tensor, "d_sae"]]:
    """On how many tokens each latent fires, and how strongly at most."""
    firing = torch.zeros(dictionary.cfg.d_sae, dtype=torch.long, device=hm.device)
    largest = firing.float()
    for block, keep, _ in text.blocks("choosing latents"):
        x = side_by_side(hm.run(block.inputs, read=[place], logits="none")[place.name], place)
        for part, active in encoded_in_parts(dictionary, x):
            active = active.float().masked_fill(~keep[part][..., None].to(x.device), 0)
            firing += (active > 0).sum((0, 1))
            largest = torch.maximum(largest, active.amax((0, 1)))
    return firing.cpu(), largest.cpu()


def _spread(firing: Int[Tensor, "d_sae"], largest: Float[Tensor, "d_sae"], n: int) -> Int[Tensor, "n"]:
    """Some of the latents that fire: the strongest, and a walk from the rarest to the densest of the others."""
    if n < 1:
        raise DataError(f"latents={n}: choose at least one")
    alive = (firing > 0).nonzero()[:, 0]
    if not len(alive):
        raise DataError("no latent of this dictionary fires on this text; name the ones to look at, or give more text")
    if len(alive) <= n:
        return alive
    by_size = alive[largest[alive].argsort(descending=True, stable=True)]
    rest = by_size[n // 4 :].sort().values
    rest = rest[firing[rest].argsort(stable=True)]
    steps = torch.linspace(0, len(rest) - 1, n - n // 4, dtype=torch.float64).round().long()
    return torch.cat([by_size[: n // 4], rest[steps]]).sort().values


def _writes(
    hm: "HookManager", dictionary: Dictionary, place: Site, chosen: Int[Tensor, "n"]
) -> dict[str, Float[Tensor, "n listed"] | Int[Tensor, "n listed"]]:
    """What one unit of each latent adds to the logits, by way of the residual stream."""
    parts: list[tuple[Tensor, ...]] = []
    listed = min(_LISTED, hm.d_vocab) if place.kind in _WRITERS else 0
    with torch.no_grad():
        for some in chosen.split(64):
            unit = torch.zeros(len(some), dictionary.cfg.d_sae, device=hm.device, dtype=dictionary.W_dec.dtype)
            unit[torch.arange(len(some)), some] = 1
            rows = dictionary.decode_own(unit) - dictionary.decode_own(torch.zeros_like(unit))
            effect = effect_on_logits(hm, rows).cpu() if listed else torch.zeros(len(some), 1)
            parts.append((*effect.topk(listed), *(-effect).topk(listed)))
    up, raised, down, lowered = (torch.cat(column) for column in zip(*parts, strict=True))
    return {"raised": raised, "raised_by": up, "lowered": lowered, "lowered_by": -down}


class _Watch:
    """Everything that is gathered about the chosen latents in one pass."""

    def __init__(self, chosen: Int[Tensor, "n"], d_sae: int, n_examples: int, context: int) -> None:
        n, device = len(chosen), chosen.device
        self.chosen, self.n = chosen, 0
        self.firing = torch.zeros(d_sae, dtype=torch.long, device=device)
        self.largest, self.total = torch.zeros(n, device=device), torch.zeros(n, dtype=torch.float64, device=device)
        self.histogram = torch.zeros(n * _BINS, dtype=torch.long, device=device)
        self.contexts = Contexts(n, n_examples, context, device)
        self.tokens: list[Tensor] = []
        self.labels: dict[str, list[Tensor]] = {}
        self.fired: list[tuple[Tensor, Tensor]] = []

    def add(
        self,
        active: Float[Tensor, "row pos d_sae"],
        keep: Bool[Tensor, "row pos"],
        rows: TokenBlock,
        labels: Mapping[str, Tensor],
    ) -> None:
        """Take in the latents of some rows."""
        counted = keep.to(active.device)
        active = active.float().clamp_min(0).masked_fill(~counted[..., None], 0).flatten(0, 1)
        self.firing += (active > 0).sum(0)
        mine = active.index_select(1, self.chosen)
        self.largest, self.total = torch.maximum(self.largest, mine.amax(0)), self.total + mine.double().sum(0)
        token, latent = (mine > 0).nonzero().T
        bins = (_PER_OCTAVE * (mine[token, latent].log2() - _LOWEST)).floor().long().clamp(0, _BINS - 1)
        self.histogram += torch.bincount(latent * _BINS + bins, minlength=len(self.histogram))
        self.contexts.offer(mine, rows)
        number = counted.flatten().cumsum(0) - 1 + self.n
        self.fired.append((number[token].cpu(), latent.cpu()))
        self.tokens.append(rows.ids[keep])
        for name, codes in labels.items():
            self.labels.setdefault(name, []).append(codes[keep])
        self.n += int(keep.sum())

    def figures(self, hm: "HookManager") -> dict[str, Any]:
        """Statistics, contexts and matches, on the host."""
        histogram = self.histogram.view(-1, _BINS).cpu()
        token, latent = (torch.cat(column) for column in zip(*self.fired, strict=True))
        labels = {name: torch.cat(parts) for name, parts in self.labels.items()}
        return {
            "n_tokens": self.n,
            "firing": self.firing.cpu(),
            "largest": self.largest.cpu(),
            "mean_activation": (self.total.cpu() / histogram.sum(1)).float(),
            "histogram": histogram,
            "edges": torch.exp2(torch.arange(_BINS + 1) / _PER_OCTAVE + _LOWEST),
            **self.contexts.tables(),
            **label_matches(hm, token, latent, ids=torch.cat(self.tokens), labels=labels, n=len(self.chosen)),
        }
