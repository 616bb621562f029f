"""Edge attribution: what every edge of the graph contributes to a metric, from a few forwards and backwards.

score(u → v) = Σ over positions of (what u adds in the run put in − what it adds in the patched run) · ∂m/∂(v's input),
an estimate of what it does to m to change u's output for v alone.

Source: Syed et al. (2023), arXiv 2310.10348; integrated gradients, graph and names: Hanna et al. (2024), arXiv
2403.17806. Departures: no copies of q, k, v inputs and no [batch pos sender d_model] buffer: heads are kept as z and
receivers as gradients at q, k and v (`interp.patching.estimates.streams`), multiplied out for a few tokens at a time.
Under grouped queries a key/value head is one receiver, whose gradient is that of all its query heads. Their scores on
"patching" are those of `mode="denoise"` with `path=Path("inputs_ig", points="left")`, or with `at="clean"` and no path.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.attribute import Interpolate, Path, gradient_run, gradient_runs, path_of
from interp.core.errors import ConfigError, ModelError
from interp.core.intervention import Intervention
from interp.core.manager import HookManager
from interp.core.metrics import Metric
from interp.core.rules import check_rule, holds_scales, rule_edits
from interp.core.run import Run
from interp.data.pair_tokens import PairTokens
from interp.data.pairs import PromptPairs
from interp.patching.estimates.edge_scores import EdgeScores
from interp.patching.estimates.sides import Part, Sides, group_means, runs_at
from interp.patching.estimates.streams import Readers, Writers
from interp.patching.graph import Graph

__all__ = ["Contraction", "edge_attribution"]

# So many bytes of senders and receivers are multiplied out at a time.
_BLOCK_BYTES = 2**22
# The receivers' gradients of a branch must sum to the branch's own, but for rounding.
_EXACT, _HALF = 1e-3, 5e-2


def edge_attribution(
    hm: HookManager,
    pairs: PromptPairs | PairTokens,
    *,
    rule: str = "plain",
    path: str | Path = "none",
    mode: str = "denoise",
    at: str | None = None,
    metric: str | Metric | Callable[[Run], Tensor] | None = None,
    per_position: bool = False,
) -> EdgeScores:
    """Estimate what patching each edge does to the metric.

    Cost: 2 forwards and 1 backward of the pairs; 2 + m forwards and m backwards with m points on a path of inputs; m
    for each of the 2·n_layers + 1 groups of senders on one of activations. Memory, in numbers per token of a batch of
    rows: what senders add, n_layers·(n_heads·d_head + d_model) + d_model; what receivers get, n_layers·((n_heads +
    2 n_kv_heads)·d_head + 2 d_model) + d_model; and (senders + receivers of a layer)·d_model for the few tokens that
    are multiplied out, 4 MiB in all. With `per_position`, pos·senders·receivers more.

    Args:
        hm: the model.
        pairs: clean and corrupted prompts, as many tokens on either side.
        rule: the backward rule; see `interp.core.rules`.
        path: "none", "inputs_ig", "activations_ig", or a `Path` with its steps and points.
        mode: "denoise" (the clean activation into the corrupted run), "noise" (the other way), "mean" or "zero" (into
            the clean run; means are of the corrupted prompts, by template and position).
        at: where the gradient is taken, "clean", "corrupted" or "both" (their mean); by default at the patched run.
        metric: a name as for `PairTokens.metric`, a `Metric`, or a function of a run; logit differences by default.
        per_position: keep the scores of every column too.

    Raises:
        ConfigError: an unknown rule, path or mode, or ones that exclude each other.
        DataError: prompts whose tokens do not correspond.
        ModelError: a family that reads its stream in a way that is not known here.
    """
    check_rule(rule)
    chosen, sides = path_of(path), Sides.of(hm, pairs, metric=metric, mode=mode)
    places = runs_at(sides, at, chosen.kind)
    if chosen.kind != "none" and sides.inserted is None:
        raise ConfigError(
            f"path={chosen.kind!r} leads to the other prompts' run, and mode={mode!r} has none; use 'none'"
        )
    scorer = _Scorer(hm, sides, rule, Writers(hm), Readers(hm, frozen=holds_scales(rule)))
    graph = Graph.of(hm)
    work = Contraction(scorer.writers, scorer.readers, graph, width=sides.width if per_position else 0)
    means = scorer.means()
    for part in sides.parts(hm):
        graded = {name: scorer.gradient(part, name) for name, _ in places} if chosen.kind == "none" else {}
        runs = {name: graded.get(name) or scorer.plain(part, name) for name in sides.needed}
        delta = scorer.difference(runs, None if means is None else means(part))
        for name, weight in places if graded else ():
            work.add(delta, graded[name], part.mask, weight)
        if chosen.kind == "inputs_ig":
            for weight, run in scorer.along_inputs(part, runs, chosen):
                work.add(delta, run, part.mask, weight)
        if chosen.kind == "activations_ig":
            for site in scorer.writers.rows:
                for share, weight in chosen.places:
                    toward = [Interpolate(site, runs[str(sides.inserted)], share)]
                    work.add({site: delta[site]}, scorer.gradient(part, sides.patched, toward), part.mask, weight)
    return EdgeScores(
        provenance=sides.provenance(hm, {"rule": rule, "path": repr(chosen), "at": at}),
        method=f"attribution: {rule}{'' if chosen.kind == 'none' else ', ' + chosen.kind}, {mode}",
        value=f"estimated change of {sides.metric_name}",
        scores=work.scores(len(sides)),
        by_position=work.by_position(len(sides)),
        sizes=(graph.n_layers, graph.n_heads, graph.n_kv_heads),
        mlps=graph.mlps,
        parallel=graph.parallel,
        examples=len(sides),
    )


@dataclass(frozen=True, eq=False)
class _Scorer:
    """The runs that edge attribution needs."""

    hm: HookManager
    sides: Sides
    rule: str
    writers: Writers
    readers: Readers

    @property
    def reads(self) -> list[str]:
        return list(dict.fromkeys([*self.writers.reads, *self.readers.reads]))

    def plain(self, part: Part, name: str) -> Run:
        """The values of a side; under the rule's edits too, so that sides that are the same differ by exactly 0."""
        return self.hm.run(part.side(name), read=self.writers.reads, write=rule_edits(self.hm, self.rule))

    def gradient(self, part: Part, name: str, write: Sequence[Intervention] = ()) -> Run:
        """The values and gradients of a side."""
        edits = [*write, *self.readers.forks]
        tokens = part.side(name)
        return gradient_run(self.hm, tokens, read=self.reads, metric=part.metric, rule=self.rule, write=edits)

    def along_inputs(self, part: Part, runs: Mapping[str, Run], path: Path) -> Iterator[tuple[float, Run]]:
        """The runs of the path from the patched side's embedding to the other's, one at a time."""
        return gradient_runs(
            self.hm,
            part.side(self.sides.patched),
            toward=runs[str(self.sides.inserted)],
            read=self.reads,
            metric=part.metric,
            rule=self.rule,
            path=path,
            write=self.readers.forks,
        )

    def means(self) -> Callable[[Part], dict[str, Tensor]] | None:
        """For mode "mean", what gives each row its group's mean of what senders add; else None."""
        if self.sides.mode != "mean":
            return None
        parts = self.sides.parts(self.hm)
        return group_means(self.sides, ((part, self.writers.values(self.plain(part, "corrupted"))) for part in parts))

    def difference(self, runs: Mapping[str, Run], means: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """What senders add in the run put in, minus what they add in the patched run."""
        now = self.writers.values(runs[self.sides.patched])
        if means is not None:
            return {name: means[name].to(value) - value for name, value in now.items()}
        if self.sides.inserted is None:
            return {name: -value for name, value in now.items()}
        there = self.writers.values(runs[self.sides.inserted])
        return {name: there[name] - value for name, value in now.items()}


class Contraction:
    """Σ over tokens of ⟨what senders add, gradients of receivers⟩, a few tokens at a time.

    Args:
        writers, readers: the two sides.
        graph: its edges.
        width: columns to keep apart; 0 to sum them.
    """

    def __init__(self, writers: Writers, readers: Readers, graph: Graph, *, width: int = 0) -> None:
        self.writers, self.readers, self.graph = writers, readers, graph
        hm = writers.hm
        shape = (width or 1, len(graph.senders), len(graph.receivers))
        self.total = torch.zeros(shape, dtype=torch.float64)
        self.width = width
        self.off: list[Tensor] = []
        widest = hm.n_heads + 2 * hm.n_kv_heads + 1
        self.tokens = max(1, _BLOCK_BYTES // (4 * hm.d_model * (shape[1] + widest)))

    @torch.no_grad()
    def add(self, delta: Mapping[str, Tensor], run: Run, mask: Bool[Tensor, "row pos"], weight: float) -> None:
        """Add the scores of some rows.

        Args:
            delta: senders' values as `Writers.values` names them; sites that are left out count for nothing.
            run: a run with the receivers' gradients.
            mask: True at real tokens.
            weight: what the scores are multiplied by.
        """
        device = next(iter(delta.values())).device
        part = torch.zeros(self.total.shape, dtype=torch.float32, device=device)
        for at in mask.flatten().nonzero()[:, 0].split(self.tokens):
            self._add_tokens(delta, run, at.to(device), at.to(device) % mask.shape[1], part)
        self.total += weight * part.double().cpu()

    def _add_tokens(self, delta: Mapping[str, Tensor], run: Run, at: Tensor, column: Tensor, part: Tensor) -> None:
        writers, readers, hm = self.writers, self.readers, self.writers.hm
        names = [name for name in writers.rows if name in delta]
        added = torch.cat([writers.block(delta, at, name) for name in names], dim=1)
        first, start = writers.rows[names[0]][0], 0
        for layer in range(hm.n_layers):
            before, heads_end = writers.rows[f"{layer}.z"]
            found, off = readers.attention_block(run, layer, at)
            self.off.append(off)
            self._score(added, found, first, before, start, column, part)
            start += found.shape[1]
            if writers.mlps[layer]:
                until = before if hm.map.parallel else heads_end
                self._score(added, readers.mlp_block(run, layer, at), first, until, start, column, part)
                start += 1
        self._score(added, readers.logits_block(run, at), first, writers.n, start, column, part)

    def _score(
        self,
        added: Float[Tensor, "token some d_model"],
        found: Float[Tensor, "token receiver d_model"],
        first: int,
        until: int,
        start: int,
        column: Int[Tensor, " token"],
        part: Float[Tensor, "pos sender all"],
    ) -> None:
        """Add one block: senders from row `first` up to `until`, receivers from column `start`."""
        count = min(added.shape[1], until - first)
        if count <= 0:
            return
        place = part[:, first : first + count, start : start + found.shape[1]]
        if not self.width:
            place[0] += torch.einsum("tsd,trd->sr", added[:, :count], found)
            return
        place.index_add_(0, column, torch.einsum("tsd,trd->tsr", added[:, :count], found))

    def scores(self, examples: int) -> Float[Tensor, "sender receiver"]:
        """Return the mean over examples of the sum over positions.

        Raises:
            ModelError: the receivers' gradients did not sum to those of their branches.
        """
        hm = self.writers.hm
        off = float(torch.stack(self.off).max()) if self.off else 0.0
        if not off <= (_EXACT if hm.dtype in (torch.float32, torch.float64) else _HALF):
            raise ModelError(
                f"{hm.map.family} does more between its stream and its queries, keys and values than a norm and a "
                f"projection (gradients off by {off:.1e} of their size); edges cannot be told apart there"
            )
        return (self.total.sum(0) / examples).float()

    def by_position(self, examples: int) -> Float[Tensor, "pos sender receiver"] | None:
        """Return the mean over examples by column, or None where columns were not kept."""
        return (self.total / examples).float() if self.width else None
