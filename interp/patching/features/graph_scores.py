"""Influence in an attribution graph, what pruning keeps, and how much of the answer the graph explains: tensors alone.

A graph is a matrix [target source]: its rows are features, then logits; its columns features, then errors, then
tokens. Entry [t, s] is what s adds to t, signed; influence looks at sizes.

Source: Ameisen et al. (2025), "Circuit Tracing: Revealing Computational Graphs in Language Models", appendix on graph
pruning, in the form of circuit-tracer (github.com/decoderesearch/circuit-tracer). Departure: influence is summed over
as many steps as the graph is deep, without asking the device whether it is over.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.core.errors import DataError

__all__ = ["Kept", "completeness_score", "influence_of", "normalized_rows", "prune", "replacement_score"]

_TINY = 1e-10


@dataclass(frozen=True, eq=False)
class Kept:
    """What pruning leaves of a graph.

    Attributes:
        nodes: features, errors and tokens that stay; logits always do.
        edges: entries that stay.
    """

    nodes: Bool[Tensor, " source"]
    edges: Bool[Tensor, "target source"]


def normalized_rows(adjacency: Float[Tensor, "target source"]) -> Float[Tensor, "target source"]:
    """Return |A| with rows that sum to 1: the share of each source in what a target gets; rows of zeros stay so."""
    size = adjacency.abs()
    return size / size.sum(1, keepdim=True).clamp_min(_TINY)


def influence_of(
    shares: Float[Tensor, "target source"], weights: Float[Tensor, " logit"], depth: int
) -> Float[Tensor, " source"]:
    """Return Σ_k |A|^k of the logits: how much of them goes through each source, on all ways.

    Args:
        shares: from `normalized_rows`; features come first in rows and columns.
        weights: of the logits.
        depth: longest way: layers + 1.
    """
    n = shares.shape[0] - len(weights)
    step = weights @ shares[n:]
    total = step
    for _ in range(depth):
        step = step[:n] @ shares[:n]
        total = total + step
    return total


def prune(
    adjacency: Float[Tensor, "target source"],
    weights: Float[Tensor, " logit"],
    *,
    n_tokens: int,
    depth: int,
    node_share: float = 0.8,
    edge_share: float = 0.98,
) -> Kept:
    """Keep the nodes, then the edges, that hold a share of all influence; tokens stay, loose ends go.

    Args:
        adjacency: the graph.
        weights: of the logits.
        n_tokens: how many of the last columns are tokens.
        depth: longest way.
        node_share: share of the nodes' influence that is kept.
        edge_share: share of the edges' influence that is kept, after the nodes.

    Raises:
        DataError: shares outside 0 to 1.
    """
    if not (0 <= node_share <= 1 and 0 <= edge_share <= 1):
        raise DataError(f"node_share={node_share}, edge_share={edge_share}: expected shares from 0 to 1")
    n_sources, n = adjacency.shape[1], adjacency.shape[0] - len(weights)
    found = influence_of(normalized_rows(adjacency), weights, depth)
    nodes = _largest(found, node_share)
    nodes[n_sources - n_tokens :] = True
    rows = torch.cat([nodes[:n], nodes.new_ones(len(weights))])
    rest = normalized_rows(adjacency * nodes * rows[:, None])
    reached = torch.cat([influence_of(rest, weights, depth)[:n], weights])
    scores = rest * reached[:, None]
    edges = _largest(scores.flatten(), edge_share).reshape(scores.shape) & (scores > 0)
    # As often as the graph is deep: taking a node out can leave another without a way.
    for _ in range(depth + 1):
        out = edges.any(0)
        into = edges.any(1)[:n]
        nodes[: n_sources - n_tokens] &= out[: n_sources - n_tokens]
        nodes[:n] &= into
        rows = torch.cat([nodes[:n], nodes.new_ones(len(weights))])
        edges &= nodes & rows[:, None]
    return Kept(nodes, edges)


def replacement_score(influence: Float[Tensor, " source"], n_features: int, n_tokens: int) -> float:
    """Return tokens' influence / (tokens' + errors'): the share of the logits that goes through features to the end.

    Args:
        influence: of every source.
        n_features, n_tokens: how many of the first columns are features, of the last tokens.
    """
    tokens = float(influence[len(influence) - n_tokens :].sum())
    errors = float(influence[n_features : len(influence) - n_tokens].sum())
    return tokens / max(tokens + errors, _TINY)


def completeness_score(
    shares: Float[Tensor, "target source"],
    influence: Float[Tensor, " source"],
    weights: Float[Tensor, " logit"],
    n_tokens: int,
) -> float:
    """Return the share of what nodes get that is no error, each node counted by its influence.

    Args:
        shares: from `normalized_rows`.
        influence: of every source.
        weights: of the logits.
        n_tokens: how many of the last columns are tokens.
    """
    n, n_sources = shares.shape[0] - len(weights), shares.shape[1]
    counted = torch.cat([influence[:n], weights])
    errors = shares[:, n : n_sources - n_tokens].sum(1)
    got = shares.sum(1) > 0
    return float(((1 - errors) * counted)[got].sum() / counted[got].sum().clamp_min(_TINY))


def _largest(scores: Float[Tensor, " n"], share: float) -> Bool[Tensor, " n"]:
    """The fewest entries that hold a share of the sum."""
    order = scores.argsort(descending=True, stable=True)
    held = scores[order].double().cumsum(0)
    total = held[-1:].clamp_min(_TINY)
    # An entry is needed while those before it hold less than the share.
    needed = torch.cat([held.new_zeros(1), held[:-1]]) < share * total
    kept = torch.zeros_like(scores, dtype=torch.bool)
    return kept.scatter(0, order, needed)
