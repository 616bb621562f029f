"""Path patching: what a sender does to the answer through its direct paths into some receivers alone.

Three passes: the source run gives the senders' values; the base run is made again with those values, everything that
"direct" excludes held to the base run, and the receivers' inputs recorded; the base run is made once more with the
receivers reading those inputs and everything else free.

Source: Wang et al. (2022), arXiv 2211.00593, §3.1 and appendix B; Goldowsky-Dill et al. (2023), arXiv 2304.05969.
Departures: three definitions of "direct" in place of one, see `DIRECT`; key/value heads are receivers in their own
right under grouped queries.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.errors import ConfigError, DataError, ShapeError, SiteError, nearest
from interp.core.intervention import Intervention
from interp.core.manager import HookManager
from interp.core.metrics import Metric, answer_logits, refuse_nan
from interp.core.result import Provenance
from interp.core.run import Run
from interp.core.site import Site
from interp.core.text import Tokens
from interp.data.pair_tokens import PairTokens
from interp.data.pairs import PromptPairs
from interp.patching.graph import Graph
from interp.patching.parts import Part, Parts, check_aligned, positions, read_receivers, read_senders
from interp.patching.path_result import DIRECT, PathPatchResult
from interp.patching.rows import RowEdit, repeated, rows_within

__all__ = ["path_patch"]

_NORMS = ("ln1", "ln1_post", "ln2", "ln2_post")


def path_patch(
    hm: HookManager,
    pairs: PromptPairs | PairTokens,
    *,
    senders: Parts,
    receivers: Parts = "logits",
    direct: str = "heads_frozen",
    metric: Metric | str = "logit_diff",
    mode: str = "noise",
    max_bytes: int = 2**30,
) -> PathPatchResult:
    """Patch the direct paths from senders to receivers, every sender in turn.

    Names are `Graph`'s, with a place after "@": "a9.h9", "m3", "input", "a5.h5@s2" (at a span), "a5.h5@-1"; globs
    ("a3.*"), "heads", "mlps" and "all" stand for many. Receivers are "a9.h9<q>@end", "m10", "logits", or a stream such
    as "8.resid_post". A path that does not exist, or whose sender is equal on both prompts, is exactly 0.

    Cost: 2 forwards, then for every sender one row per example in a shared forward, and as many again for every path
    into a group of receivers but logits. Memory: max_bytes for a forward, and of the base run n_layers × batch × pos ×
    n_heads × d_head numbers (+ d_model for each MLP unless direct is "heads_frozen"), of the source run those of the
    senders' sites.

    Args:
        hm: the model.
        pairs: prompts whose two sides have equal lengths.
        senders: a name, or several: each is patched alone. A mapping of labels to names patches each entry together.
        receivers: a name, or several: patched together. A mapping gives several groups, a column each.
        direct: what is held to the base run on the way to the receivers: "heads_frozen" (all heads; the IOI paper's),
            "all_frozen" (heads and MLPs: an edge of the graph) or "linear" (the σ of norms too: exactly linear up to
            the receiver, and up to a soft-cap for logits).
        metric: a metric of these pairs, or the name of one.
        mode: "noise" runs the clean prompts and puts corrupted values in, "denoise" the other way round.
        max_bytes: for the rows of one forward, as `rows_within` counts them.

    Returns:
        The metric per sender, group of receivers and example, with both baselines and the definition of "direct".

    Raises:
        ConfigError: an unknown `direct` or `mode`.
        SiteError: an unknown sender or receiver, or one that this model does not have.
        DataError: prompts that do not correspond position by position, or an unknown metric or place.
    """
    if direct not in DIRECT:
        hint = nearest(direct, DIRECT) or f"expected one of {', '.join(DIRECT)}"
        raise ConfigError(f"direct={direct!r}: {hint}")
    if mode not in ("noise", "denoise"):
        raise ConfigError(f"mode={mode!r}: expected 'noise' (clean run) or 'denoise' (corrupted run)")
    graph = Graph.of(hm)
    sent, received = read_senders(graph, senders), read_receivers(graph, receivers)
    tokens = pairs.tokens(hm) if isinstance(pairs, PromptPairs) else pairs
    clean, corrupted = hm.to_tokens(tokens.clean), hm.to_tokens(tokens.corrupted)
    check_aligned(clean, corrupted, [p.place for group in (*sent.values(), *received.values()) for p in group])
    chosen = _metric(tokens, metric)
    sides = (clean, corrupted) if mode == "noise" else (corrupted, clean)
    work = _Patching(hm, graph, sides[0], sides[1], direct, max_bytes, list(sent.values()), list(received.values()))
    base, source = work.ends(chosen, mode)
    patched, blocked = work.measure(chosen)
    settings = {"senders": {k: [p.name for p in v] for k, v in sent.items()}, "direct": direct, "mode": mode}
    settings |= {"receivers": {k: [p.name for p in v] for k, v in received.items()}, "metric": chosen.name}
    single = [parts[0] if len(parts) == 1 else None for parts in sent.values()]
    return PathPatchResult(
        provenance=Provenance.of(hm, settings=settings, data=(clean.ids, corrupted.ids)),
        senders=list(sent),
        receivers=list(received),
        nodes=[[p.name for p in parts] for parts in received.values()],
        layers=[-2 if p is None else p.layer for p in single],
        heads=[-2 if p is None else p.head for p in single],
        direct=direct,
        mode=mode,
        metric=chosen.name,
        patched=patched,
        base=base,
        source=source,
        blocked=blocked,
    )


def _metric(tokens: PairTokens, metric: Metric | str) -> Metric:
    chosen = tokens.metric(metric) if isinstance(metric, str) else metric
    if not isinstance(chosen, Metric):
        raise DataError(f"metric={metric!r}: paths are measured by a name or a Metric, such as pairs.metric(…) gives")
    if chosen.n != len(tokens):
        raise ShapeError(f"the metric is of {chosen.n} examples and these are {len(tokens)} pairs; give one of theirs")
    return chosen


@dataclass(eq=False)
class _Patching:
    """One call: both runs, and which rows get what."""

    hm: HookManager
    graph: Graph
    base_tokens: Tokens
    source_tokens: Tokens
    direct: str
    max_bytes: int
    sent: list[list[Part]]
    received: list[list[Part]]

    def __post_init__(self) -> None:
        self.senders = [part for group in self.sent for part in group]
        self.receivers = [part for group in self.received for part in group]
        self.n = len(self.base_tokens)
        width = self.base_tokens.ids.shape[1]
        widths = {"q": self.hm.n_heads * self.hm.d_head, "k": self.hm.n_kv_heads * self.hm.d_head}
        widths["v"] = widths["k"]
        sites = {self._site_of(p): widths.get(p.kind, self.hm.d_model) for p in self.receivers if p.kind != "logits"}
        self.read = list(sites)
        self.rows = rows_within(self.hm, width, self.max_bytes, recorded=sum(sites.values()))

    # -- the two runs -------------------------------------------------------------------------------------------

    @cached_property
    def base(self) -> Run:
        """The run that is patched, with all that is held to it."""
        sites = [f"{layer}.z" for layer in range(self.hm.n_layers)]
        sites += [_sent_from(p) for p in self.senders]
        if self.direct != "heads_frozen":
            sites += [f"{layer}.mlp_out" for layer, mlp in enumerate(self.graph.mlps) if mlp]
        if self.direct == "linear":
            sites += self._scales()
        reads = list(dict.fromkeys(sites))
        return self.hm.run(self.base_tokens, read=reads, logits="last", batch_size=min(self.rows, self.n))

    @cached_property
    def source(self) -> Run:
        """The run that the senders' values come from."""
        reads = list(dict.fromkeys(_sent_from(p) for p in self.senders))
        return self.hm.run(self.source_tokens, read=reads, logits="last", batch_size=min(self.rows, self.n))

    def ends(self, metric: Metric, mode: str) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        """The metric of both runs; refused where it is no number."""
        names = ("clean", "corrupted") if mode == "noise" else ("corrupted", "clean")
        runs = zip((self.base, self.source), names, strict=True)
        base, source = (refuse_nan(metric(run).float().cpu(), metric.name, side) for run, side in runs)
        return base, source

    def _scales(self) -> list[str]:
        """Every σ on the way to a receiver; refused where a norm's formula is not known."""
        m, found = self.hm.map, []
        parts = [(f"{layer}.{norm}.scale", norm, layer) for layer in range(m.n_layers) for norm in _NORMS]
        for name, norm, layer in [*parts, ("ln_final.scale", "ln_final", None)]:
            if m.module(self.hm.root, norm, layer) is not None:
                self.hm.atlas.point(Site(name))
                found.append(name)
        return found

    def _site_of(self, part: Part) -> str:
        """Where a receiver reads."""
        if part.kind == "stream":
            return part.site
        if part.kind != "mlp":
            return f"{part.layer}.{part.kind}"
        for name in (f"{part.layer}.mlp.in", f"{part.layer}.ln2.out"):
            if self.hm.atlas.has(name):
                return name
        raise SiteError(
            f"{self.hm.map.family} does not show what its MLP {part.layer} reads, so it is no receiver here"
        )

    # -- which paths there are ----------------------------------------------------------------------------------

    def _paths(self) -> Bool[Tensor, "sender receiver"]:
        """Whether some sender of a group writes before some receiver of another reads."""
        first = torch.tensor([min(p.wrote for p in group) for group in self.sent])
        last = torch.tensor([max(p.reads(parallel=self.graph.parallel) for p in group) for group in self.received])
        return first[:, None] < last[None, :]

    def _differs(self) -> Bool[Tensor, "sender batch"]:
        """Whether the two runs differ at a group of senders, per example."""
        found = torch.zeros(len(self.sent), self.n, dtype=torch.bool, device=self.hm.device)
        for s, group in enumerate(self.sent):
            for part in group:
                a, b = (run[_sent_from(part)] for run in (self.base, self.source))
                differs = (a != b) if part.kind != "head" else (a[:, :, part.head] != b[:, :, part.head])
                at = positions(self.base_tokens, part.place).to(a.device)
                found[s] |= (differs.any(-1) & at).any(1).to(found.device)
        return found

    # -- measuring ----------------------------------------------------------------------------------------------

    def measure(self, metric: Metric) -> tuple[Float[Tensor, "sender receiver batch"], Bool[Tensor, "sender receiver"]]:
        """Return the patched metric of every cell, and which cells carry nothing."""
        base = metric(self.base).float().cpu()
        differs, paths = self._differs().cpu(), self._paths()
        patched = base.expand(len(self.sent), len(self.received), -1).clone()
        chosen = (paths.any(1) & differs.any(1)).nonzero()[:, 0].tolist()
        for part in self._chunks(chosen, max(1, self.rows // self.n)):
            for s, g, values in self._chunk(part, paths, metric):
                patched[s, g] = torch.where(differs[s], values, patched[s, g])
        return patched, ~paths | ~differs.any(1)[:, None]

    def _chunks(self, chosen: Sequence[int], size: int) -> Iterator[list[int]]:
        from tqdm import tqdm

        # None: only where stderr is a terminal.
        with tqdm(total=len(chosen), desc="paths", unit="sender", disable=None) as bar:
            for start in range(0, len(chosen), size):
                part = list(chosen[start : start + size])
                yield part
                bar.update(len(part))

    def _chunk(
        self, part: list[int], paths: Bool[Tensor, "sender receiver"], metric: Metric
    ) -> Iterator[tuple[int, int, Float[Tensor, " batch"]]]:
        """Some senders as the rows of one forward to the receivers, then every path from them as the rows of others."""
        cells = [(i, g) for g in range(len(self.received)) for i, s in enumerate(part) if bool(paths[s, g])]
        direct = [(i, g) for i, g in cells if self.received[g][0].kind == "logits"]
        free = [cell for cell in cells if cell not in direct]
        sites = list(dict.fromkeys(self._site_of(p) for _, g in free for p in self.received[g]))
        rows = repeated(self.base_tokens, len(part))
        logits, size = "last" if direct else "none", min(self.rows, len(rows))
        seen = self.hm.run(rows, read=sites, write=self._sending(part), logits=logits, batch_size=size)
        if direct:
            values = self._values(seen, metric, len(part))
            yield from ((part[i], g, values[i]) for i, g in direct)
        at_once = max(1, self.rows // self.n)
        for start in range(0, len(free), at_once):
            some = free[start : start + at_once]
            rows = repeated(self.base_tokens, len(some))
            size = min(self.rows, len(rows))
            out = self.hm.run(rows, write=self._receiving(seen, some), logits="last", batch_size=size)
            values = self._values(out, metric, len(some))
            yield from ((part[i], g, v) for (i, g), v in zip(some, values, strict=True))

    def _values(self, out: Run, metric: Metric, times: int) -> Float[Tensor, "sender batch"]:
        logits = answer_logits(out)
        if metric.columns is not None:
            logits = logits.index_select(1, metric.columns.to(logits.device))
        return metric.of(logits, self._example(times).to(logits.device)).float().cpu().reshape(times, self.n)

    def _example(self, times: int) -> Int[Tensor, " row"]:
        """The example of each row."""
        return torch.arange(self.n).repeat(times)

    # -- what rows get ------------------------------------------------------------------------------------------

    def _sending(self, part: list[int]) -> list[Intervention]:
        """The edits of the pass to the receivers: senders from the source run, the rest held as `direct` says."""
        example, hm, width = self._example(len(part)), self.hm, self.base_tokens.ids.shape[1]
        held = [f"{layer}.z" for layer in range(hm.n_layers)]
        if self.direct != "heads_frozen":
            held += [f"{layer}.mlp_out" for layer, mlp in enumerate(self.graph.mlps) if mlp]
        held += self._scales() if self.direct == "linear" else []
        pick: dict[str, Tensor] = {}
        for s, at in enumerate(part):
            for sender in self.sent[at]:
                site, heads = _sent_from(sender), [hm.n_heads] if sender.kind == "head" else []
                where = pick.setdefault(site, torch.zeros(len(part), self.n, width, *heads, dtype=torch.bool))
                on = where[s] if sender.kind != "head" else where[s, :, :, sender.head]
                on |= positions(self.base_tokens, sender.place)
        edits: list[Intervention] = []
        for site in dict.fromkeys((*held, *pick)):
            hold = self.base[site] if site in held else None
            if site in pick:
                value, where = self.source[site], pick[site].flatten(0, 1)
            else:
                value, where = self.base[site], torch.zeros(len(example), width, dtype=torch.bool)
            edits.append(RowEdit(site, value, example, where, hold, example if hold is not None else None))
        return edits

    def _receiving(self, seen: Run, cells: list[tuple[int, int]]) -> list[Intervention]:
        """The edits of the last pass: each cell's rows read what its sender gave its receivers; all else is free."""
        width = self.base_tokens.ids.shape[1]
        take = torch.cat([i * self.n + torch.arange(self.n) for i, _ in cells])
        pick: dict[str, Tensor] = {}
        for c, (_, g) in enumerate(cells):
            for part in self.received[g]:
                site = self._site_of(part)
                heads = list(seen[site].shape[2:3]) if part.kind in ("q", "k", "v") else []
                where = pick.setdefault(site, torch.zeros(len(cells), self.n, width, *heads, dtype=torch.bool))
                on = where[c, :, :, part.head] if heads else where[c]
                on |= positions(self.base_tokens, part.place)
        return [RowEdit(site, seen[site], take, where.flatten(0, 1)) for site, where in pick.items()]


def _sent_from(part: Part) -> str:
    """Where a sender's output is."""
    return {"input": "0.resid_pre", "head": f"{part.layer}.z", "mlp": f"{part.layer}.mlp_out"}[part.kind]
