"""Scrubbing: does the answer survive when every part gets its value from another example that a hypothesis calls equal?

A hypothesis says of each part what it depends on: a label per example. The part's activation is taken from an example
of the same label, or from any example where the part is said not to matter. If the hypothesis is right, the metric
stays what it was.

Source: Chan et al. (2022), "Causal scrubbing: a method for rigorously testing interpretability hypotheses"; loss
recovered as there. Departures: a part's value comes from a plain run of the other example, not from a run whose inputs
are resampled in turn; other examples only, where there is one; metrics of any kind in place of a loss.
"""

import random
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp.core.errors import ConfigError, DataError, ShapeError, nearest
from interp.core.intervention import Intervention
from interp.core.manager import HookManager
from interp.core.metrics import Metric
from interp.core.place import Place
from interp.core.result import Provenance
from interp.core.run import Run
from interp.core.text import Tokens
from interp.data.pair_tokens import PairTokens
from interp.data.pairs import PromptPairs
from interp.patching.graph import Graph
from interp.patching.parts import Part, named_parts, positions
from interp.patching.rows import rows_within
from interp.patching.scrub_result import ScrubResult

__all__ = ["scrub"]

Claim = str | Sequence[Any] | Callable[[Mapping[str, Any]], Any] | None
"""What a part depends on: a fact in `meta`, a label per pair, a function of a pair's `meta`; None for nothing."""

_WORDS = {"heads": "a*", "mlps": "m*", "all": "*"}


def scrub(
    hm: HookManager,
    pairs: PromptPairs | PairTokens,
    hypothesis: Mapping[str, Claim],
    *,
    metric: Metric | str = "logit_diff",
    alone: str = "refuse",
    n_resamples: int = 10,
    seed: int = 0,
    max_bytes: int = 2**30,
) -> ScrubResult:
    """Return how much of a metric on the clean prompts a hypothesis keeps.

    `{"heads": None, "mlps": None, "a5.h5@s2": "s", "a9.h9@end": lambda meta: meta["io"]}` says: only these two heads
    matter, one at S2 and by who S is, the other at the end and by who IO is. A later entry overrules an earlier one
    where both name a part. What no entry names is left alone, the embedding too.

    Each part of each entry (each head of "heads") draws partners of its own, never the example itself. Parts at every
    position take partners of equal length, parts at a place those where it has as many tokens. The baseline draws from
    any example for every part named; parts that do not matter have the same partners in both. Cost: 1 + 2 n_resamples
    forwards of the batch. Memory: max_bytes for a forward, and batch × pos × width numbers for each site named.

    Args:
        hm: the model.
        pairs: the examples; their corrupted prompts are not looked at.
        hypothesis: parts → what they depend on. Parts are `Graph`'s senders ("a5.h5@s2", "m3", "input", "heads@end",
            globs) and streams ("8.resid_post@end"). What they depend on is a fact in `meta`, a list of a label per
            pair, or a function of a pair's `meta`; None says that they do not matter.
        metric: a metric of these pairs, or the name of one.
        alone: an example without a partner is an error ("refuse"), or keeps its own value ("keep").
        n_resamples: draws of partners.
        seed: of the draws.
        max_bytes: for the rows of one forward, as `rows_within` counts them.

    Returns:
        The metric of the model, scrubbed and at random, per example, with the partners.

    Raises:
        ConfigError: an empty hypothesis, an unknown `alone`, or no resamples.
        SiteError: a part that there is not.
        DataError: a fact that pairs lack, labels that are not one per pair, or an example without a partner.
    """
    if not hypothesis or alone not in ("refuse", "keep") or n_resamples < 1:
        raise ConfigError(
            f"{len(hypothesis)} claims, alone={alone!r}, n_resamples={n_resamples}: expected at least one claim, "
            "'refuse' or 'keep', and at least 1"
        )
    tokens = pairs.tokens(hm, same_length=False) if isinstance(pairs, PromptPairs) else pairs
    chosen = tokens.metric(metric) if isinstance(metric, str) else metric
    if chosen.n != len(tokens):
        raise ShapeError(f"the metric is of {chosen.n} examples and these are {len(tokens)} pairs; give one of theirs")
    batch = hm.to_tokens(tokens.clean)
    parts = _parts(hm, tokens, batch, hypothesis)
    rows = min(len(batch), rows_within(hm, batch.ids.shape[1], max_bytes))
    source = hm.run(batch, read=list(dict.fromkeys(p.site for p in parts)), logits="last", batch_size=rows)
    model = chosen(source).float().cpu()
    kept, values, tables = 0, [], []
    for r in _resamples(n_resamples):
        drawn = [part.draw(f"{seed}/{r}", alone) for part in parts]
        anyone = [part.draw(f"{seed}/{r}", alone, free=True) for part in parts]
        kept += sum(int((d == torch.arange(len(d))).sum()) for d in drawn)
        runs = []
        for partners in (drawn, anyone):
            edits = _edits(hm, source, batch, parts, partners)
            runs.append(chosen(hm.run(batch, write=edits, logits="last", batch_size=rows)).float().cpu())
        values.append(torch.stack(runs))
        tables.append(torch.stack(drawn))
    settings = {"hypothesis": {k: _said(v) for k, v in hypothesis.items()}, "metric": chosen.name, "alone": alone}
    scrubbed, baseline = torch.stack(values, dim=1)
    return ScrubResult(
        provenance=Provenance.of(hm, settings=settings | {"n": n_resamples}, data=(batch.ids, batch.mask), seed=seed),
        claims=[f"{name}: {_said(claim)}" for name, claim in hypothesis.items()],
        parts=[part.name for part in parts],
        partners=torch.stack(tables),
        metric=chosen.name,
        model=model,
        scrubbed=scrubbed,
        baseline=baseline,
        kept=kept,
    )


@dataclass(frozen=True, eq=False)
class _Scrubbed:
    """One part, and who may stand in for whom.

    Args:
        name: of the part.
        site: where its value is.
        head: its head; −1 where it is none.
        where: its positions.
        labels: one per example; None where it does not matter.
        sizes: how many positions it has in each example; partners have as many, and at every position equal lengths.
    """

    name: str
    site: str
    head: int
    where: Bool[Tensor, "batch pos"]
    labels: list[Any] | None
    sizes: list[int]

    def draw(self, seed: str, alone: str, *, free: bool = False) -> Int[Tensor, " batch"]:
        """Return a partner for each example: another one that agrees, or any other one."""
        labels = None if free else self.labels
        keys = [(size, None if labels is None else labels[i]) for i, size in enumerate(self.sizes)]
        groups: dict[Any, list[int]] = {}
        for i, key in enumerate(keys):
            groups.setdefault(key, []).append(i)
        source, found = random.Random(f"scrub/{seed}/{self.name}"), []
        for i, key in enumerate(keys):
            others = groups[key]
            if len(others) == 1 and alone == "refuse":
                what = "of equal length" if key[1] is None else f"of equal length and label {key[1]!r}"
                raise DataError(
                    f"example {i} has no partner for {self.name}: it is the only one {what}; give more examples, "
                    "coarser labels, or alone='keep'"
                )
            if len(others) == 1:
                found.append(i)
                continue
            # One of the others, each as likely: those after i move up by one.
            at = source.randrange(len(others) - 1)
            found.append(others[at] if others[at] < i else others[at + 1])
        return torch.tensor(found)

    def columns(self, partners: Int[Tensor, " batch"]) -> Int[Tensor, "batch pos"]:
        """Return where, among all rows × columns, the value of each position is: the k-th place of the partner's."""
        width = self.where.shape[1]
        kth = (~self.where).int().argsort(dim=1, stable=True)  # a row's places first, in order
        rank = (self.where.long().cumsum(1) - 1).clamp(min=0)
        own = torch.arange(self.where.numel()).reshape(self.where.shape)
        return torch.where(self.where, partners[:, None] * width + kth[partners].gather(1, rank), own)


@dataclass(frozen=True, eq=False)
class _Gather(Intervention):
    """Give each position, and head, the value of another row's: value [entry pos *features], index [row pos *head]."""

    value: Tensor
    index: Int[Tensor, "row pos *head"]
    pick: Bool[Tensor, "row pos *head"]

    @property
    def may_do_nothing(self) -> bool:
        """An example may be its own partner."""
        return True

    def edit(self, x: Tensor, place: Place) -> Tensor:
        """Return the other rows' values."""
        part = slice(place.frame.row0, place.frame.row0 + len(x))
        index, pick = self.index[part].to(x.device), self.pick[part].to(x.device)
        table = self.value.to(x.device, x.dtype).flatten(0, 1)
        flat = index.flatten(0, 1)[..., None].expand(-1, *x.shape[2:])
        return torch.where(pick[..., None], table.gather(0, flat).reshape(x.shape), x)


def _parts(hm: HookManager, tokens: PairTokens, batch: Tokens, hypothesis: Mapping[str, Claim]) -> list[_Scrubbed]:
    """Every part of every entry, in order."""
    graph, found = Graph.of(hm), []
    for name, claim in hypothesis.items():
        labels = _labels(tokens, name, claim)
        for part in named_parts(graph.senders, name, _WORDS, "part", streams=graph):
            where = positions(batch, part.place)
            sizes = where.sum(1).tolist()
            found.append(_Scrubbed(part.name, _site(part), part.head, where, labels, sizes))
            hm.atlas.expand(found[-1].site)  # refuses what this model does not have
    return found


def _site(part: Part) -> str:
    if part.kind == "stream":
        return part.site
    return {"input": "0.resid_pre", "head": f"{part.layer}.z", "mlp": f"{part.layer}.mlp_out"}[part.kind]


def _labels(tokens: PairTokens, name: str, claim: Claim) -> list[Any] | None:
    """A label per pair, or None where a part does not matter."""
    if claim is None:
        return None
    if not isinstance(claim, str) and not callable(claim):
        return _one_each(tokens, name, claim.tolist() if isinstance(claim, Tensor) else list(claim))
    if not tokens.meta:
        raise DataError(f"{name!r} asks for facts of the pairs, and these have no meta; give a list of labels")
    if callable(claim):
        return _one_each(tokens, name, [claim(meta) for meta in tokens.meta])
    lacking = next((i for i, meta in enumerate(tokens.meta) if claim not in meta), None)
    if lacking is not None:
        known = tokens.meta[lacking]
        hint = nearest(claim, known) or f"its facts are: {', '.join(known) or 'none'}"
        raise DataError(f"{name!r}: pair {lacking} has no fact {claim!r}; {hint}")
    return [meta[claim] for meta in tokens.meta]


def _one_each(tokens: PairTokens, name: str, labels: list[Any]) -> list[Any]:
    if len(labels) != len(tokens):
        raise DataError(f"{name!r}: {len(labels)} labels for {len(tokens)} pairs; give one for each")
    odd = next((label for label in labels if not isinstance(label, Hashable)), None)
    if odd is not None:
        raise DataError(f"{name!r}: a label is {odd!r}; labels are texts, numbers or tuples, which can be compared")
    return labels


def _said(claim: Claim) -> str:
    if claim is None:
        return "nothing"
    if isinstance(claim, str):
        return claim
    return "a function of meta" if callable(claim) else "given labels"


def _edits(
    hm: HookManager, source: Run, batch: Tokens, parts: list[_Scrubbed], partners: list[Int[Tensor, " batch"]]
) -> list[Intervention]:
    """One edit per site: of each position and head, which row's value it gets; later parts overrule earlier ones."""
    own = torch.arange(batch.ids.numel()).reshape(batch.ids.shape)
    index: dict[str, Tensor] = {}
    pick: dict[str, Tensor] = {}
    for part, drawn in zip(parts, partners, strict=True):
        if part.site not in index:
            heads = source[part.site].shape[2:3] if part.head >= 0 else (1,)
            index[part.site] = own[..., None].repeat(1, 1, *heads)
            pick[part.site] = torch.zeros(*own.shape, *heads, dtype=torch.bool)
        at = max(part.head, 0)
        index[part.site][..., at] = torch.where(part.where, part.columns(drawn), index[part.site][..., at])
        pick[part.site][..., at] |= part.where
    edits: list[Intervention] = []
    for site, chosen in pick.items():
        flat = source[site].ndim == 3
        where, which = (chosen[..., 0], index[site][..., 0]) if flat else (chosen, index[site])
        edits.append(_Gather(site, source[site], which, where))
    return edits


def _resamples(n: int) -> Iterable[int]:
    from tqdm import tqdm

    # None: only where stderr is a terminal.
    return iter(tqdm(range(n), desc="scrubbing", unit="resample", disable=None))
