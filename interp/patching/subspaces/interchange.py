"""Interchange at one site: put part of what the corrupted prompt has there into the run of the clean one, and count.

In the terms of Geiger et al. (2024), arXiv 2303.02536, §3: the clean prompt is the base, the corrupted one the source.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.errors import ConfigError, ShapeError, SiteError, WhereError
from interp.core.intervention import Add, Intervention, Replace
from interp.core.manager import HookManager
from interp.core.metrics import Metric, answer_logits
from interp.core.passes import frame_of
from interp.core.site import Site
from interp.core.subspace import ReplaceSubspace
from interp.core.text import Tokens
from interp.core.where import Where
from interp.data.pair_tokens import PairTokens
from interp.data.pairs import PromptPairs

__all__ = ["Interchange", "Labels", "Outcome", "Places", "described"]

Places = str | Where | tuple[str | Where, str | Where]
"""Where an interchange happens: a span's name or a `Where`, for both sides or as (clean, corrupted)."""


class Outcome(NamedTuple):
    """What a patched run of the clean prompts gave, per pair: its logit difference and whether it gave the label."""

    logit_diff: Float[Tensor, " pair"]
    hit: Bool[Tensor, " pair"]


@dataclass(frozen=True, eq=False)
class Labels:
    """What a causal model says that each pair's answer is after the interchange.

    Args:
        columns: every token that is an answer or a label of some pair: the ones that an answer is chosen from.
        wanted: the columns that are right, one or more per pair.
        own: the columns of the clean prompt's own answers.
    """

    columns: Int[Tensor, " column"]
    wanted: Bool[Tensor, "pair column"]
    own: Bool[Tensor, "pair column"]

    @classmethod
    def of(cls, pairs: PairTokens, labels: Int[Tensor, " pair"] | None = None) -> "Labels":
        """Return the labels of pairs.

        Args:
            pairs: the pairs.
            labels: one token per pair; by default each pair's foils, which are the corrupted prompt's own answers.

        Raises:
            DataError: a pair without foils, and no labels.
            ShapeError: labels that are not one whole number per pair.
        """
        if labels is None:
            pairs.check_foils()
            ids, mask = pairs.foil_ids, pairs.foil_mask
        elif labels.shape != (len(pairs),) or labels.is_floating_point():
            raise ShapeError(
                f"labels {tuple(labels.shape)} {labels.dtype}: expected one token id per pair [{len(pairs)}]"
            )
        else:
            ids = labels.long()[:, None].cpu()
            mask = torch.ones_like(ids, dtype=torch.bool)
        held = [pairs.answer_ids[pairs.answer_mask], pairs.foil_ids[pairs.foil_mask], ids[mask]]
        columns = torch.cat(held).unique()
        made = []
        for these, real in ((ids, mask), (pairs.answer_ids, pairs.answer_mask)):
            rows, places = real.nonzero(as_tuple=True)
            made.append(torch.zeros(len(pairs), len(columns), dtype=torch.bool))
            made[-1][rows, torch.searchsorted(columns, these[rows, places])] = True
        return cls(columns, *made)

    def shuffled(self, *, seed: int = 0) -> "Labels":
        """Return each pair's labels given to another pair: nothing in a pair says what its label is."""
        n = len(self.wanted)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        other = torch.empty(n, dtype=torch.long)
        other[order] = order.roll(1)
        return replace(self, wanted=self.wanted[other])

    def hit(self, logits: Float[Tensor, "row d_vocab"], rows: Int[Tensor, " row"]) -> Bool[Tensor, " row"]:
        """Return whether the likeliest of the columns is a label; `rows` says which pairs these are."""
        best = logits.index_select(1, self.columns.to(logits.device)).argmax(1).cpu()
        return self.wanted[rows].gather(1, best[:, None])[:, 0]

    def cross_entropy(self, logits: Float[Tensor, "row d_vocab"], rows: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
        """Return −log Σ p(label) over the whole vocabulary, in nats."""
        log_p = logits.log_softmax(-1).index_select(1, self.columns.to(logits.device))
        return -log_p.masked_fill(~self.wanted[rows].to(logits.device), -torch.inf).logsumexp(1)

    def logit_diff(self, logits: Float[Tensor, "row d_vocab"], rows: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
        """Return mean logit of the clean prompt's own answers − mean logit of the labels."""
        these = logits.index_select(1, self.columns.to(logits.device))
        shares = [m[rows].to(these) / m[rows].sum(1, keepdim=True).to(these) for m in (self.own, self.wanted)]
        used = shares[0] - shares[1]
        return torch.where(used == 0, 0.0, these * used).sum(1)  # a −∞ that is not looked at makes no NaN


@dataclass(frozen=True, eq=False)
class Interchange:
    """Pairs at one site, ready to be patched: what both sides have at the chosen positions, and the pairs' metrics.

    Memory: three vectors per selected position, and the site of one batch.

    Args:
        hm: the model.
        pairs: the pairs.
        site: the site.
        head: the one head that is meant, or None for the whole site, heads side by side.
        places: the clean side's positions.
        clean: what is there, a row per selected position in row-major order, d wide.
        corrupted: the corrupted side's, at the positions that correspond.
        batch_size: pairs per forward.
    """

    hm: HookManager
    pairs: PairTokens
    site: Site
    head: int | None
    places: Bool[Tensor, "pair pos"]
    clean: Float[Tensor, "n d"]
    corrupted: Float[Tensor, "n d"]
    batch_size: int

    @classmethod
    def of(
        cls, hm: HookManager, pairs: PromptPairs | PairTokens, site: Site | str, *, where: Places, batch_size: int = 64
    ) -> "Interchange":
        """Run both sides once and keep what they have there.

        Raises:
            ConfigError: no pairs in a forward.
            SiteError: a site without one position axis, or several sites.
            WhereError: a pair where nothing is selected, or where the sides select different numbers of positions.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size}: expected at least 1 pair per forward")
        made = pairs.tokens(hm, same_length=False) if isinstance(pairs, PromptPairs) else pairs
        sites = hm.atlas.expand(site)
        if len(sites) != 1 or sites[0].axes[1] != "pos" or sites[0].where is not None:
            raise SiteError(
                f"{site!r}: expected one site with positions, such as '3.resid_post'; say where with where=…"
            )
        sides = [
            w if isinstance(w, Where) else Where(name=w) for w in (where if isinstance(where, tuple) else (where,))
        ]
        base, source = sides[0], sides[-1]
        head = _one_head(sites[0], base, source)
        masks = [w.columns(frame_of(t, 0, len(t))) for w, t in ((base, made.clean), (source, made.corrupted))]
        empty = (~masks[0].any(1)).nonzero()
        if len(empty):
            raise WhereError(f"{base!r} selects nothing in the clean prompt of pair {int(empty[0])}")
        if not torch.equal(masks[0].sum(1), masks[1].sum(1)):
            row = int((masks[0].sum(1) != masks[1].sum(1)).nonzero()[0])
            counts = [int(m[row].sum()) for m in masks]
            raise WhereError(
                f"{base!r} selects {counts[0]} positions of the clean prompt of pair {row} and {counts[1]} of the "
                "corrupted one; name as many on both sides"
            )
        held = [
            _kept(hm, t, sites[0], m, head, batch_size)
            for t, m in zip((made.clean, made.corrupted), masks, strict=True)
        ]
        return cls(hm, made, sites[0], head, masks[0], held[0], held[1], batch_size)

    @property
    def width(self) -> int:
        """Dimensions of what is patched."""
        return self.clean.shape[1]

    @cached_property
    def shift(self) -> Float[Tensor, "n d"]:
        """Corrupted − clean, in fp32 or better: what replacing everything would add."""
        precise = torch.promote_types(self.clean.dtype, torch.float32)
        return self.corrupted.to(precise) - self.clean.to(precise)

    @property
    def pair_of(self) -> Int[Tensor, " n"]:
        """The pair that each selected position belongs to."""
        return self.places.nonzero()[:, 0]

    def tokens(self, rows: Int[Tensor, " row"]) -> Tokens:
        """Return the clean prompts of some pairs."""
        return self.pairs.clean.take(rows)

    # -- edits --------------------------------------------------------------------------------------------------

    def where(self, rows: Int[Tensor, " row"]) -> Where:
        """Return the selection, for a run of these pairs' clean prompts."""
        return Where(mask=self.places[rows], head=self.head)

    def subspace(
        self, basis: Float[Tensor, "k d"], weights: Float[Tensor, " k"] | None = None
    ) -> Callable[[Tensor], Intervention]:
        """Return the edit that replaces a subspace, as a function of the pairs that are run."""

        def edit(rows: Tensor) -> Intervention:
            value = self.spread(self.corrupted, rows)
            return ReplaceSubspace(self.site, value, basis, where=self.where(rows), weights=weights)

        return edit

    def whole(self) -> Callable[[Tensor], Intervention]:
        """Return the edit that replaces everything there."""
        return lambda rows: Replace(self.site, self.spread(self.corrupted, rows), where=self.where(rows))

    def added(self, shift: Float[Tensor, "n d"]) -> Callable[[Tensor], Intervention]:
        """Return the edit that adds a vector of its own at each selected position."""
        return lambda rows: Add(self.site, self.spread(shift, rows), where=self.where(rows))

    def same_size(self, basis: Float[Tensor, "k d"], size: Float[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """Return what replacing a subspace would add, made as long at each position as `size` says."""
        part = self.shift @ basis.T.to(self.shift) @ basis.to(self.shift)
        return part * (size.to(part) / part.norm(dim=-1).clamp(min=1e-30))[:, None]

    def spread(self, values: Float[Tensor, "n d"], rows: Int[Tensor, " row"]) -> Tensor:
        """Return values of the selected positions of some pairs in the site's shape, 0 at the others."""
        return self.placed(values[self.held(rows).to(values.device)], rows)

    def placed(self, values: Float[Tensor, "m d"], rows: Int[Tensor, " row"]) -> Tensor:
        """Return the same of values of just these pairs' selected positions."""
        mask = self.places[rows]
        out = values.new_zeros(*mask.shape, values.shape[1])
        out[mask.to(out.device)] = values
        if self.head is None and len(self.site.axes) == 4:
            out = out.unflatten(-1, self.hm.atlas.shape(self.site)[2:])
        return out

    def gathered(self, x: Tensor, rows: Int[Tensor, " row"]) -> Float[Tensor, "m d"]:
        """Return what a tensor in the site's shape, of a run of some pairs, holds at their selected positions."""
        kept = x[self.places[rows].to(x.device)]
        return kept.flatten(1) if self.head is None else kept[:, self.head]

    def held(self, rows: Int[Tensor, " row"]) -> Int[Tensor, " m"]:
        """Return which of the n selected positions belong to some pairs, in the order of these."""
        counts = self.places.sum(1)
        starts = counts.cumsum(0) - counts
        return torch.cat([torch.arange(int(starts[r]), int(starts[r] + counts[r])) for r in rows.tolist()])

    # -- runs ---------------------------------------------------------------------------------------------------

    def outcome(
        self, edit: Callable[[Tensor], Intervention] | None, labels: Labels, *, rows: Int[Tensor, " row"] | None = None
    ) -> Outcome:
        """Run the clean prompts of some pairs, or all, with an edit; without foils logit differences are NaN."""
        return self._outcome(self.tokens, edit, labels, rows)

    def corrupted_outcome(self, labels: Labels) -> Outcome:
        """Run the corrupted prompts as they are."""
        return self._outcome(lambda rows: self.pairs.corrupted.take(rows), None, labels, None)

    def _outcome(
        self,
        tokens: Callable[[Tensor], Tokens],
        edit: Callable[[Tensor], Intervention] | None,
        labels: Labels,
        rows: Tensor | None,
    ) -> Outcome:
        chosen = torch.arange(len(self.pairs)) if rows is None else rows
        metric = self.pairs.metric() if all(self.pairs.foils) else None
        values, hits = [], []
        for part in chosen.split(self.batch_size):
            with warnings.catch_warnings():
                # The same value on both sides is a finding here, not a mistake.
                warnings.filterwarnings("ignore", message=".*changed nothing")
                out = self.hm.run(tokens(part), write=[] if edit is None else [edit(part)], logits="last")
            logits = answer_logits(out)
            hits.append(labels.hit(logits, part))
            values.append(torch.full((len(part),), torch.nan) if metric is None else _of(metric, logits, part))
        return Outcome(torch.cat(values), torch.cat(hits))


def described(where: Places) -> str:
    """Return the places of an interchange as text."""
    sides = where if isinstance(where, tuple) else (where,)
    return " from ".join(w if isinstance(w, str) else repr(w) for w in sides)


def _of(metric: Metric, logits: Tensor, rows: Tensor) -> Tensor:
    if metric.columns is not None:
        logits = logits.index_select(1, metric.columns.to(logits.device))
    return metric.of(logits, rows.to(logits.device)).detach().float().cpu()


def _one_head(site: Site, base: Where, source: Where) -> int | None:
    if source.head is not None and source.head != base.head:
        raise WhereError("the two sides name different heads; give head=… with the clean side's Where")
    if base.head is not None and not isinstance(base.head, int):
        raise WhereError(f"{base!r}: an interchange at {site.short} takes one head, or all of them side by side")
    return base.head


def _kept(
    hm: HookManager, tokens: Tokens, site: Site, mask: Tensor, head: int | None, batch_size: int
) -> Float[Tensor, "n d"]:
    parts = []
    for rows in torch.arange(len(tokens)).split(batch_size):
        found = hm.run(tokens.take(rows), read=[site])[site]
        kept = found[mask[rows].to(found.device)]
        parts.append(kept.flatten(1) if head is None else kept[:, head].clone())
    return torch.cat(parts)
