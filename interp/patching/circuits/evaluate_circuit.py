"""The metric of a model from which all edges but a circuit's have been taken, exactly and in one forward per circuit.

Source: Hanna et al. (2024), arXiv 2403.17806, §2.3, for the evaluation; Wang et al. (2022), arXiv 2211.00593, §3, for
means by template. Departures: a mean is taken per position, of each sender apart; nothing is clipped.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.errors import DataError, ShapeError, nearest
from interp.core.metrics import Metric, answer_logits
from interp.core.result import token_names
from interp.core.run import Run
from interp.core.text import Tokens
from interp.data.pair_tokens import PairTokens
from interp.data.pairs import PromptPairs
from interp.patching.circuits.circuit import Circuit
from interp.patching.circuits.edge_forward import EdgeModel, EdgePass, Senders

if TYPE_CHECKING:
    from interp.core.manager import HookManager

__all__ = ["ABLATIONS", "CircuitRuns", "EdgeAblation", "edge_effects"]

ABLATIONS = ("patching", "zero", "mean", "mean_positional")


@dataclass(frozen=True)
class EdgeAblation:
    """What a removed edge carries, and how much is done at once.

    Args:
        kind: "patching": what the sender writes on the pair's corrupted prompt; "zero": nothing; "mean": the sender's
            mean over the corrupted prompts of the same template and length, position by position (positions counted
            from each row's first token; `meta` of the pairs must say "template"; a template with one prompt is its
            own mean, which is patching); "mean_positional": the same over all corrupted prompts that reach the
            position.
        batch_size: pairs at once; all by default.
        max_bytes: of the differences of the senders, which decides how many circuits go into one forward.

    Raises:
        DataError: another kind, or sizes that are none.
    """

    kind: str = "patching"
    batch_size: int | None = None
    max_bytes: int = 2**26

    def __post_init__(self) -> None:
        if self.kind not in ABLATIONS:
            hint = nearest(self.kind, ABLATIONS) or f"expected one of {', '.join(ABLATIONS)}"
            raise DataError(f"ablation {self.kind!r}: {hint}")
        if self.batch_size is not None and (type(self.batch_size) is not int or self.batch_size < 1):
            raise DataError(f"batch_size={self.batch_size!r}: expected a whole number of pairs ≥ 1")
        if self.max_bytes < 1:
            raise DataError(f"max_bytes={self.max_bytes}: expected a number of bytes ≥ 1")


class CircuitRuns:
    """One set of pairs on one model, ready to run any circuit on; every measure of circuits goes through it.

    The clean prompts are run; an edge outside the circuit carries the ablation's value. So the full circuit is the
    clean run, and under "patching" the empty one is the corrupted run.

    Memory, per `batch_size` pairs of T positions: 2 · n_layers · pairs · T · d_model numbers of the corrupted run, and
    circuits at once × senders with a removed edge × pairs · T · d_model, which stays below `max_bytes` down to one
    circuit. Means hold templates × T × senders' z, MLP and input outputs. Cost: 2 forwards and one per circuit.

    Args:
        hm: the model.
        pairs: the pairs; clean and corrupted prompts must be of one length for "patching".
        metric: a name that `PairTokens.metric` knows ("kl" is against the clean run), or a `Metric` of these pairs.
        ablation: what removed edges carry.

    Raises:
        ModelError: the model's heads cannot be given inputs of their own; says which.
        DataError: prompts of unequal length, a mean without templates, or an unknown metric or ablation.
    """

    def __init__(
        self,
        hm: "HookManager",
        pairs: PromptPairs | PairTokens,
        *,
        metric: str | Metric = "logit_diff",
        ablation: str | EdgeAblation = "patching",
    ) -> None:
        self.hm = hm
        self.ablation = EdgeAblation(ablation) if isinstance(ablation, str) else ablation
        self.pairs = pairs.tokens(hm) if isinstance(pairs, PromptPairs) else pairs
        if self.ablation.kind == "patching":
            _check_lengths(hm, self.pairs)
        groups = _groups(self.pairs, self.ablation.kind)
        self.model = EdgeModel(hm)
        self.model.check(self.pairs.clean)
        self.graph = self.model.graph
        self.metric = self._metric(metric)
        self._means = None if groups is None else _Means(self, groups)

    def __len__(self) -> int:
        return len(self.pairs)

    @cached_property
    def clean(self) -> Float[Tensor, " pair"]:
        """The metric of the whole model."""
        parts = [self.measured(self.hm.run(c, logits="last"), r) for r, c, _ in self._parts()]
        return torch.cat(parts)

    @cached_property
    def empty(self) -> Float[Tensor, " pair"]:
        """The metric without an edge."""
        return self.values([torch.zeros_like(self.graph.allowed)], progress=False)[0]

    def values(
        self, circuits: Sequence[Circuit | Bool[Tensor, "sender receiver"]], *, progress: bool = True
    ) -> Float[Tensor, "circuit pair"]:
        """Return the metric of each circuit on each pair.

        Args:
            circuits: circuits, or masks over the graph.
            progress: show a bar on stderr when it is a terminal.

        Raises:
            ShapeError: a circuit of another graph.
        """
        masks = [self._mask(c) for c in circuits]
        removed = [self.graph.allowed & ~m for m in masks]
        todo = [i for i, r in enumerate(removed) if bool(r.any())]
        found = torch.zeros(len(masks), len(self), dtype=torch.float32)
        whole = [i for i in range(len(masks)) if i not in set(todo)]
        if whole:
            found[whole] = self.clean
        if not todo:
            return found
        parts = list(self._parts())
        with torch.no_grad(), _bar(len(parts) * len(todo), progress) as step:
            for rows, clean, corrupted in parts:
                carries = self._carries(clean, corrupted, rows)
                for group in self._grouped(todo, removed, clean):
                    found[group, rows.start : rows.stop] = self._run(group, removed, rows, clean, carries)
                    step(len(group))
        return found

    def _run(
        self, group: Sequence[int], removed: Sequence[Tensor], rows: range, clean: Tokens, carries: Senders
    ) -> Float[Tensor, "circuit row"]:
        one = EdgePass(self.model, torch.stack([removed[i] for i in group]), carries, len(rows))
        out = self.hm.run(_repeated(clean, len(group)), write=one.edits(), logits="last")
        return self.measured(out, rows, copies=len(group)).reshape(len(group), -1)

    def measured(self, out: Run, rows: range, *, copies: int = 1) -> Float[Tensor, " row"]:
        """Return the metric of a run of some pairs.

        Args:
            out: the run, with logits "last".
            rows: which pairs it holds, in order.
            copies: how many times it holds them.
        """
        return self._of(self.metric, out, rows, copies)

    @staticmethod
    def _of(metric: Metric, out: Run, rows: range, copies: int) -> Float[Tensor, " row"]:
        logits = answer_logits(out)
        if metric.columns is not None:
            logits = logits.index_select(1, metric.columns.to(logits.device))
        at = torch.arange(rows.start, rows.stop, device=logits.device).repeat(copies)
        return metric.of(logits, at).detach().float().cpu()

    # -- parts --------------------------------------------------------------------------------------------------

    def _metric(self, metric: str | Metric) -> Metric:
        if isinstance(metric, Metric):
            if metric.n != len(self.pairs):
                raise ShapeError(f"the metric {metric.name!r} is of {metric.n} pairs, and these are {len(self.pairs)}")
            return metric
        if not isinstance(metric, str):
            raise DataError(f"metric={metric!r}: circuits are measured by a name or a Metric, such as pairs.metric(…)")
        if metric != "kl":
            return self.pairs.metric(metric)
        logits = [answer_logits(self.hm.run(clean, logits="last")) for _, clean, _ in self._parts()]
        return self.pairs.metric("kl", reference=torch.cat(logits))

    def _mask(self, circuit: Circuit | Tensor) -> Bool[Tensor, "sender receiver"]:
        if isinstance(circuit, Circuit) and circuit.graph != self.graph:
            raise ShapeError(f"{circuit!r} is about a model of another shape than {self.hm!r}")
        mask = circuit.edges if isinstance(circuit, Circuit) else circuit.cpu()
        if mask.shape != self.graph.allowed.shape or mask.dtype != torch.bool:
            raise ShapeError(
                f"a circuit is a mask [sender receiver] = {list(self.graph.allowed.shape)} of True and False, got "
                f"{tuple(mask.shape)} {mask.dtype}"
            )
        return mask

    def _parts(self) -> Iterator[tuple[range, Tokens, Tokens]]:
        n, size = len(self.pairs), self.ablation.batch_size or len(self.pairs)
        for start in range(0, n, size):
            rows = range(start, min(n, start + size))
            yield rows, _rows(self.pairs.clean, rows), _rows(self.pairs.corrupted, rows)

    def _carries(self, clean: Tokens, corrupted: Tokens, rows: range) -> Senders:
        if self.ablation.kind == "zero":
            return {}
        if self._means is not None:
            return self._means.of(clean, rows)
        out = self.hm.run(corrupted, read=self.model.reads)
        return {site: out[site] for site in self.model.reads}

    def _grouped(self, todo: Sequence[int], removed: Sequence[Tensor], clean: Tokens) -> Iterator[list[int]]:
        """Circuits that go into one forward: their differences, logits and streams stay within the budget."""
        tokens, width = clean.ids.numel(), self.hm.d_model
        logits = len(clean) * self.hm.d_vocab
        group: list[int] = []
        used = torch.zeros(len(self.graph.senders), dtype=torch.bool)
        for i in todo:
            grown = used | removed[i].any(1)
            # A stream, what attention and the MLP make of it: as much again as twelve senders.
            bytes_ = 4 * (len(group) + 1) * (tokens * width * (int(grown.sum()) + 12) + logits)
            if group and bytes_ > self.ablation.max_bytes:
                yield group
                group, grown = [], removed[i].any(1)
            group, used = [*group, i], grown
        yield group


class _Means:
    """Means of what each sender writes on the corrupted prompts, by group and position."""

    def __init__(self, runs: CircuitRuns, groups: Int[Tensor, " pair"]) -> None:
        self.groups = groups
        self.sums: dict[str, Tensor] = {}
        n, width = int(groups.max()) + 1, runs.pairs.corrupted.ids.shape[1]
        self.counts = torch.zeros(n * width)
        self.width = width
        model = runs.model
        for rows, _, tokens in runs._parts():
            out = runs.hm.run(tokens, read=model.reads)
            place, real = _places(tokens), tokens.mask
            cell = (groups[rows.start : rows.stop, None] * width + place)[real]
            self.counts.index_add_(0, cell, torch.ones(len(cell)))
            for site in model.reads:
                name, x = _averaged(model, site, out)
                kept = x[real.to(x.device)].float()
                if name not in self.sums:
                    self.sums[name] = kept.new_zeros(n * width, *kept.shape[1:])
                self.sums[name].index_add_(0, cell.to(x.device), kept)

    def of(self, clean: Tokens, rows: range) -> Mapping[str, Tensor]:
        """The means at each position of some clean prompts."""
        cell = self.groups[rows.start : rows.stop, None] * self.width + _places(clean).clamp(max=self.width - 1)
        lacking = clean.mask & ((self.counts[cell] == 0) | (_places(clean) >= self.width))
        if bool(lacking.any()):
            row = rows.start + int(lacking.any(1).nonzero()[0])
            raise DataError(f"pair {row} has positions that no corrupted prompt of its group reaches, so no mean there")
        counts = self.counts[cell].clamp(min=1)
        found = {}
        for name, total in self.sums.items():
            mean = total[cell.to(total.device)]
            found[name] = mean / counts.to(total.device).reshape(*cell.shape, *[1] * (mean.ndim - 2))
        return found


def _averaged(model: EdgeModel, site: str, out: Run) -> tuple[str, Tensor]:
    """What a mean is taken of: z, whose mean is that of what heads write; their outputs where a norm follows."""
    layer, _, kind = site.partition(".")
    if kind != "z" or model.blocks[int(layer)].post is None:
        return site, out[site]
    made = model.blocks[int(layer)].sends(range(model.graph.n_heads), out[site])
    return f"{layer}.heads", made.movedim(0, 2)


def edge_effects(
    runs: CircuitRuns,
    circuit: Circuit | None = None,
    *,
    edges: Bool[Tensor, "sender receiver"] | None = None,
    progress: bool = True,
) -> Float[Tensor, "sender receiver"]:
    """Return how much the metric falls when one edge is removed, for each edge apart: m(C) − m(C without it).

    Exact, one forward's worth of rows per edge; NaN at edges that were not measured.

    Args:
        runs: the pairs, model, metric and ablation.
        circuit: what the edges are removed from; the whole model by default.
        edges: which edges; all of the circuit's by default.
        progress: show a bar on stderr when it is a terminal.

    Returns:
        Means over the pairs, in the metric's units. Positive: the edge helps.

    Source: edge activation patching, as in Conmy et al. (2023), arXiv 2304.14997, without their order of removal.
    """
    base = runs._mask(runs.graph.allowed if circuit is None else circuit)
    chosen = base if edges is None else base & runs._mask(edges)
    places = chosen.nonzero()
    masks = []
    for row, column in places.tolist():
        without = base.clone()
        without[row, column] = False
        masks.append(without)
    effects = torch.full(base.shape, torch.nan)
    if masks:
        found = runs.values([base, *masks], progress=progress).double().mean(1)
        effects[tuple(places.T)] = (found[0] - found[1:]).float()
    return effects


def _check_lengths(hm: "HookManager", pairs: PairTokens) -> None:
    if pairs.clean.ids.shape == pairs.corrupted.ids.shape and torch.equal(pairs.clean.mask, pairs.corrupted.mask):
        return
    sides = (pairs.clean, pairs.corrupted)
    for row, (a, b) in enumerate(zip(pairs.clean.lengths.tolist(), pairs.corrupted.lengths.tolist(), strict=True)):
        if a != b:
            shown = [" | ".join(token_names(hm, t.ids[row][t.mask[row]])) for t in sides]
            raise DataError(
                f"the prompts of pair {row} differ in length, {a} and {b} tokens, so positions would not correspond.\n"
                f"  clean:     {shown[0]}\n  corrupted: {shown[1]}\nReword them to one length, or ablate by means."
            )
    raise DataError("the clean and corrupted prompts are padded on different sides; pad both alike")


def _groups(pairs: PairTokens, kind: str) -> Int[Tensor, " pair"] | None:
    """Which prompts share a mean."""
    if kind not in ("mean", "mean_positional"):
        return None
    if kind == "mean_positional":
        return torch.zeros(len(pairs), dtype=torch.long)
    lacking = next((i for i, m in enumerate(pairs.meta or [{}] * len(pairs)) if "template" not in m), None)
    if lacking is not None:
        raise DataError(
            f"ablation 'mean' is by template, and pair {lacking} says none: put meta={{'template': …}} into the pairs, "
            "or take 'mean_positional', which averages over all of them"
        )
    return torch.stack([pairs.forms(), pairs.corrupted.lengths.cpu()], dim=1).unique(dim=0, return_inverse=True)[1]


def _places(tokens: Tokens) -> Int[Tensor, "batch pos"]:
    return (tokens.mask.long().cumsum(1) - 1).clamp(min=0)


def _rows(tokens: Tokens, rows: range) -> Tokens:
    part = slice(rows.start, rows.stop)
    ids = tokens.position_ids
    return replace(
        tokens,
        ids=tokens.ids[part],
        mask=tokens.mask[part],
        spans={},
        position_ids=None if ids is None else ids[part],
    )


def _repeated(tokens: Tokens, times: int) -> Tokens:
    if times == 1:
        return tokens
    ids = tokens.position_ids
    positions = None if ids is None else ids.repeat(times, 1)
    return replace(tokens, ids=tokens.ids.repeat(times, 1), mask=tokens.mask.repeat(times, 1), position_ids=positions)


@contextmanager
def _bar(total: int, show: bool) -> Iterator[Any]:
    from tqdm import tqdm

    # None: only where stderr is a terminal.
    with tqdm(total=total, desc="circuits", unit="run", disable=None if show else True) as bar:
        yield bar.update
