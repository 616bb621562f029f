"""Attribution graphs: what a prompt's answer is made of, feature by feature, back to its tokens.

Each node is a sum of what earlier nodes add to it, exactly, once norms' σ and attention patterns are held and what
transcoders miss is a node of its own.

Source: Ameisen et al. (2025), "Circuit Tracing: Revealing Computational Graphs in Language Models"; order and caps as
in circuit-tracer (github.com/decoderesearch/circuit-tracer). Departures: backwards by formula through attention alone,
not through the model; what features beyond the cap add, and what biases add, is kept beside each row, so that rows sum
to what they explain; what a skip transcoder passes on counts for whoever wrote it; features of the first position stay.
"""

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.errors import DataError
from interp.core.result import Provenance, Result, token_names
from interp.dictionaries.base import Transcoder
from interp.patching.features.freeze import freeze
from interp.patching.features.frozen import FrozenModel
from interp.patching.features.graph_scores import (
    Kept,
    completeness_score,
    influence_of,
    normalized_rows,
    prune,
    replacement_score,
)
from interp.patching.features.graph_targets import LogitTargets, logit_targets
from interp.patching.features.sources import KINDS, Sources, contributions

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

    from interp.core.manager import HookManager

__all__ = ["AttributionGraph", "attribution_graph"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class AttributionGraph(Result):
    """Nodes and edges of one prompt: rows are features then logits, columns features, errors, tokens.

    A row of `adjacency`, `constant` and `left_out` sum to `value`: a feature's activation, or a logit.

    Attributes:
        layer, pos, latent: of each feature.
        error_layer, error_pos: of each error: what a transcoder misses, or the whole of an MLP without one.
        error_whole: whether an error is an MLP without a transcoder.
        adjacency: what each source adds to each target, signed.
        constant: what biases add.
        left_out: what active features that are not in the graph add.
        value: of each feature and logit.
        ids, tokens: the prompt.
        target_pos: position of the logits.
        target_names, target_columns, target_coefficients, target_centred, target_prob, target_weight: the logits; see
            `LogitTargets`.
        n_layers: blocks of the model.
        n_active: active features, in the graph or not.
    """

    title: ClassVar[str] = "Attribution graph"
    layer: Int[Tensor, " feature"]
    pos: Int[Tensor, " feature"]
    latent: Int[Tensor, " feature"]
    error_layer: Int[Tensor, " error"]
    error_pos: Int[Tensor, " error"]
    error_whole: Bool[Tensor, " error"]
    adjacency: Float[Tensor, "target source"]
    constant: Float[Tensor, " target"]
    left_out: Float[Tensor, " target"]
    value: Float[Tensor, " target"]
    ids: Int[Tensor, " token"]
    tokens: list[str]
    target_pos: int
    target_names: list[str]
    target_columns: Int[Tensor, "logit column"]
    target_coefficients: Float[Tensor, "logit column"]
    target_centred: Bool[Tensor, " logit"]
    target_prob: Float[Tensor, " logit"]
    target_weight: Float[Tensor, " logit"]
    n_layers: int
    n_active: int

    @property
    def n_features(self) -> int:
        """Features in the graph."""
        return len(self.layer)

    @property
    def targets(self) -> LogitTargets:
        """The logits that are explained."""
        return LogitTargets(
            self.target_names,
            self.target_columns,
            self.target_coefficients,
            self.target_centred,
            self.target_prob,
            self.target_pos,
        )

    @cached_property
    def shares(self) -> Float[Tensor, "target source"]:
        """|A| with rows that sum to 1."""
        return normalized_rows(self.adjacency)

    @cached_property
    def influence(self) -> Float[Tensor, " source"]:
        """How much of the logits goes through each feature, error and token."""
        return influence_of(self.shares, self.target_weight, self.n_layers + 1)

    @property
    def replacement_score(self) -> float:
        """Share of the logits' influence that ends at tokens and not at errors."""
        return replacement_score(self.influence, self.n_features, len(self.tokens))

    @property
    def completeness_score(self) -> float:
        """Share of what nodes get that comes from no error, by their influence."""
        return completeness_score(self.shares, self.influence, self.target_weight, len(self.tokens))

    def prune(self, *, node_share: float = 0.8, edge_share: float = 0.98) -> Kept:
        """Return which nodes and edges hold a share of all influence, as `graph_scores.prune` does."""
        shares = {"node_share": node_share, "edge_share": edge_share}
        return prune(self.adjacency, self.target_weight, n_tokens=len(self.tokens), depth=self.n_layers + 1, **shares)

    def source_label(self, source: int) -> str:
        """Return what a column is, such as "L2 latent 17 @5 'cat'"."""
        n, n_errors = self.n_features, len(self.error_layer)
        if source < n:
            pos, name = int(self.pos[source]), f"L{int(self.layer[source])} latent {int(self.latent[source])}"
        elif source < n + n_errors:
            i = source - n
            what = "MLP" if bool(self.error_whole[i]) else "error"
            pos, name = int(self.error_pos[i]), f"L{int(self.error_layer[i])} {what}"
        else:
            pos, name = source - n - n_errors, "token"
        return f"{name} @{pos} {self.tokens[pos]!r}"

    def target_label(self, target: int) -> str:
        """Return what a row is."""
        n = self.n_features
        return self.source_label(target) if target < n else f"logit {self.target_names[target - n]!r}"

    def find(self, layer: int, latent: int, pos: int) -> int:
        """Return the number of a feature.

        Raises:
            DataError: it is not in the graph.
        """
        found = (self.layer == layer) & (self.latent == latent) & (self.pos == pos % len(self.tokens))
        if not bool(found.any()):
            raise DataError(f"latent {latent} of layer {layer} at position {pos} is not in this graph")
        return int(found.int().argmax())

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per source, the most influential first, with what it adds to the first logit directly."""
        import pandas as pd

        order = self.influence.argsort(descending=True, stable=True).tolist()
        n, n_errors = self.n_features, len(self.error_layer)
        kinds = ["feature"] * n + ["MLP" if w else "error" for w in self.error_whole.tolist()]
        kinds += ["token"] * (self.adjacency.shape[1] - n - n_errors)
        first = self.adjacency[n]
        rows = [
            {
                "node": self.source_label(i),
                "kind": kinds[i],
                "influence": float(self.influence[i]),
                "activation": float(self.value[i]) if i < n else float("nan"),
                "direct": float(first[i]),
            }
            for i in order
        ]
        return pd.DataFrame(rows)

    def plot(self) -> "plotly.graph_objects.Figure":
        """Draw the influence of layers and positions, features and errors apart."""
        from interp.report.figures import Axis, heatmap

        n, n_errors, width = self.n_features, len(self.error_layer), len(self.tokens)
        grid = torch.zeros(2 * self.n_layers + 1, width)
        grid[0] = self.influence[n + n_errors :]
        grid.index_put_((2 * self.layer + 2, self.pos), self.influence[:n], accumulate=True)
        places = (2 * self.error_layer + 1, self.error_pos)
        grid.index_put_(places, self.influence[n : n + n_errors], accumulate=True)
        names = ["tokens"] + [f"L{i} {kind}" for i in range(self.n_layers) for kind in ("errors", "features")]
        return heatmap(
            grid,
            rows=Axis("", names),
            columns=Axis("position", [f"{i}: {t}" for i, t in enumerate(self.tokens)]),
            title=f"Influence on {', '.join(repr(name) for name in self.target_names[:4])}",
            value="influence",
        )

    def summary(self) -> str:
        """Give the scores, the errors' share and the most influential features."""
        errors = float(self.influence[self.n_features : len(self.influence) - len(self.tokens)].sum())
        tokens = float(self.influence[len(self.influence) - len(self.tokens) :].sum())
        lines = [
            f"{self.n_features} of {self.n_active} active features, {len(self.error_layer)} errors, "
            f"{len(self.tokens)} tokens → {', '.join(repr(name) for name in self.target_names[:5])}",
            f"replacement score {self.replacement_score:.3f}, completeness score {self.completeness_score:.3f}; "
            f"{errors / max(errors + tokens, 1e-10):.0%} of the influence ends in errors",
        ]
        best = self.influence[: self.n_features].topk(min(5, self.n_features)).indices.tolist()
        lines += [f"influence {float(self.influence[i]):.3f} {self.source_label(i)}" for i in best]
        return "\n".join(lines)

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write a page to look through: tokens along x, layers along y; see `interp.report.graph_page`.

        Args:
            path: File to write; parent folders are made, an existing file is replaced in one step.

        Returns:
            The path written.
        """
        written: Path = importlib.import_module("interp.report.graph_page").write_graph_page(path, self)
        return written

    def _repr_html_(self) -> str:
        return str(importlib.import_module("interp.report.graph_page").framed_graph(self))


def attribution_graph(
    hm: "HookManager",
    transcoders: Mapping[int, Transcoder],
    tokens: Any,
    *,
    targets: Any = 10,
    pos: int = -1,
    max_features: int = 7500,
    batch_size: int = 256,
    progress: bool = True,
) -> AttributionGraph:
    """Make the attribution graph of one prompt.

    Where more features are active than `max_features`, those with the most influence on the logits come in, in batches,
    ranked anew after each. Memory, in numbers: (max_features + logits) · (active + pos · (layers + 1)) for the rows,
    batch_size · (pos · (2 d_model + n_heads · d_head) + active) for a batch, and what
    `interp.patching.features.freeze.freeze` takes.

    Args:
        hm: the model.
        transcoders: layer → transcoder of its MLP; the MLP of a missing layer is an error node as a whole.
        tokens: one prompt; whatever `hm.run` takes.
        targets: what is explained; see `interp.patching.features.graph_targets.logit_targets`.
        pos: position of the logits.
        max_features: features in the graph, at most.
        batch_size: features taken back at once.
        progress: Show a bar on stderr when it is a terminal.

    Raises:
        DataError: several prompts, nothing to explain, or numbers below 1.
        ConfigError, ModelError: as for `interp.patching.features.freeze.freeze`.

    Source: Ameisen et al. (2025); see the module's text for departures.
    """
    if max_features < 1 or batch_size < 1:
        raise DataError(f"max_features={max_features}, batch_size={batch_size}: each must be 1 or more")
    frozen = freeze(hm, transcoders, tokens)
    wanted = logit_targets(frozen, targets, pos=pos)
    with torch.no_grad():
        sources = Sources.of(frozen)
        vectors, constant = wanted.reads(frozen)
        at = torch.full((len(vectors),), wanted.pos, device=vectors.device)
        split = _Split(frozen, sources)
        logit_rows = split(contributions(frozen, frozen.seed(torch.full_like(at, frozen.last), at, vectors)))
        order, rows = _feature_rows(frozen, sources, split, logit_rows, wanted, (max_features, batch_size), progress)
        stream = frozen.resid[wanted.pos]
        return _assembled(frozen, sources, split, wanted, order, (rows, logit_rows, constant, vectors @ stream))


class _Split:
    """Which columns of `contributions` are features, errors and tokens; biases are summed."""

    def __init__(self, frozen: FrozenModel, sources: Sources) -> None:
        kinds = {name: sources.kind == KINDS.index(name) for name in KINDS}
        self.n = len(frozen.ids)
        self.features = kinds["latent"].nonzero()[:, 0]
        self.errors = (kinds["error"] | kinds["mlp"]).nonzero()[:, 0]
        self.tokens = [kinds[name].nonzero()[:, 0] for name in ("embed", "pos_embed") if bool(kinds[name].any())]
        self.biases = (kinds["attn_bias"] | kinds["b_dec"]).nonzero()[:, 0]

    def __call__(self, found: Float[Tensor, "n all"]) -> Float[Tensor, "n columns"]:
        """Features, errors, tokens, then one column of biases."""
        tokens = sum((found[:, part] for part in self.tokens), start=torch.zeros_like(found[:, : self.n]))
        biases = found[:, self.biases].sum(1, keepdim=True)
        return torch.cat([found[:, self.features], found[:, self.errors], tokens, biases], 1)


def _feature_rows(
    frozen: FrozenModel,
    sources: Sources,
    split: _Split,
    logit_rows: Tensor,
    wanted: LogitTargets,
    limits: tuple[int, int],
    progress: bool,
) -> tuple[Int[Tensor, " feature"], Float[Tensor, "feature columns"]]:
    """The rows of as many features as may be, the most influential first where not all may."""
    from tqdm import tqdm

    n_active, (most, batch_size) = len(split.features), limits
    n = min(n_active, most)
    rows = logit_rows.new_zeros(n, logit_rows.shape[1])
    done = torch.zeros(n_active, dtype=torch.bool, device=rows.device)
    order: list[Tensor] = []
    # None: only where stderr is a terminal.
    with tqdm(total=n, desc="attribution graph", unit="feature", disable=None if progress else True) as bar:
        while (count := sum(map(len, order))) < n:
            size = min(batch_size, n - count)
            if n == n_active:
                batch = torch.arange(count, count + size, device=rows.device)
            else:
                batch = _next(order, rows[:count], logit_rows, wanted, done, frozen.n_layers, size)
            done[batch] = True
            rows[count : count + size] = split(contributions(frozen, _seeds(frozen, sources, split.features[batch])))
            order.append(batch)
            bar.update(size)
    return torch.cat(order) if order else torch.arange(0, device=rows.device), rows


def _next(
    order: list[Tensor],
    rows: Tensor,
    logit_rows: Tensor,
    wanted: LogitTargets,
    done: Tensor,
    depth: int,
    size: int,
) -> Int[Tensor, " batch"]:
    """The features with the most influence by what is known so far, of those that have no row yet."""
    weights = wanted.weights.to(rows)
    step = weights @ normalized_rows(logit_rows[:, :-1])
    total = step
    if order:
        known, shares = torch.cat(order), normalized_rows(rows[:, :-1])
        for _ in range(depth):
            step = step[known] @ shares
            total = total + step
    return total[: len(done)].masked_fill(done, -1).topk(size).indices


def _seeds(frozen: FrozenModel, sources: Sources, chosen: Int[Tensor, " n"]) -> dict[int, Tensor]:
    """Readers of some latents' pre-activations."""
    layer, pos, latent = sources.layer[chosen], sources.pos[chosen], sources.latent[chosen]
    vectors = frozen.resid.new_zeros(len(chosen), frozen.resid.shape[1])
    times = torch.zeros_like(layer)
    for block, held in frozen.transcoders.items():
        mine = (layer == block).nonzero()[:, 0]
        vectors[mine] = held.reads(latent[mine], pos[mine])
        times[mine] = frozen.mlp_time(block)
    return frozen.seed(times, pos, vectors)


def _assembled(
    frozen: FrozenModel,
    sources: Sources,
    split: _Split,
    wanted: LogitTargets,
    order: Int[Tensor, " feature"],
    parts: tuple[Tensor, Tensor, Tensor, Tensor],
) -> AttributionGraph:
    """The graph in the sources' own order: layer by layer, position by position."""
    rows, logit_rows, logit_constant, logit_reads = parts
    inside, place = order.sort()
    every = torch.cat([rows[place], logit_rows])
    n_active = len(split.features)
    others = torch.ones(n_active, dtype=torch.bool, device=every.device)
    others[inside] = False
    chosen, errors = split.features[inside], split.errors
    layer, pos, latent = sources.layer[chosen], sources.pos[chosen], sources.latent[chosen]
    constants = every.new_zeros(len(chosen))
    for block, held in frozen.transcoders.items():
        mine = (layer == block).nonzero()[:, 0]
        constants[mine] = held.constants(latent[mine])
    known = {str(i): t.transcoder.cfg.metadata.get("hook_name") for i, t in sorted(frozen.transcoders.items())}
    settings = {"transcoders": known, "targets": wanted.names, "pos": wanted.pos, "features": len(chosen)}
    tensors = {
        "layer": layer,
        "pos": pos,
        "latent": latent,
        "error_layer": sources.layer[errors],
        "error_pos": sources.pos[errors],
        "error_whole": sources.kind[errors] == KINDS.index("mlp"),
        "adjacency": torch.cat([every[:, inside], every[:, n_active:-1]], 1),
        "constant": every[:, -1] + torch.cat([constants, logit_constant]),
        "left_out": every[:, :n_active][:, others].sum(1),
        "value": torch.cat([sources.value[chosen], logit_reads + logit_constant]),
        "ids": frozen.ids,
    }
    return AttributionGraph(
        provenance=Provenance.of(frozen.hm, settings=settings, data=(frozen.ids,)),
        tokens=token_names(frozen.hm, frozen.ids),
        target_pos=wanted.pos,
        target_names=wanted.names,
        target_columns=wanted.columns,
        target_coefficients=wanted.coefficients,
        target_centred=wanted.centred,
        target_prob=wanted.prob,
        target_weight=wanted.weights,
        n_layers=frozen.n_layers,
        n_active=n_active,
        **{name: x.cpu() for name, x in tensors.items()},
    )
