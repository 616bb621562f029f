"""What is asked about: tokens, or differences of tokens, as weights of a few logits per example."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.errors import DataError, ShapeError
from interp.core.manager import HookManager
from interp.core.metrics import Metric
from interp.core.result import token_names
from interp.core.text import Tokens
from interp.data.pair_tokens import PairTokens
from interp.data.pairs import PromptPairs

__all__ = ["Target", "pairs_of", "read_target"]


@dataclass(frozen=True, eq=False)
class Target:
    """A number that is linear in the logits, for each example.

    Args:
        name: what results call it.
        columns: the tokens it looks at, each once.
        weights: how it weighs their logits.
    """

    name: str
    columns: Int[Tensor, " column"]
    weights: Float[Tensor, "example column"]

    def of(self, logits: Float[Tensor, "example column"]) -> Float[Tensor, " example"]:
        """Return the number, from the logits of `columns`."""
        used = self.weights.to(logits)
        return torch.where(used == 0, 0.0, logits * used).sum(1)


def pairs_of(hm: HookManager, data: Any) -> PairTokens | None:
    """Return prompt pairs as tokens, and None for anything else."""
    if isinstance(data, PromptPairs):
        return data.tokens(hm)
    return data if isinstance(data, PairTokens) else None


def read_target(hm: HookManager, tokens: Tokens, target: Any, pairs: PairTokens | None = None) -> Target:
    """Return what was asked about these examples.

    Args:
        hm: the model.
        tokens: the examples.
        target: a token (id or text), ids [example], a pair (token, token) whose logit difference is meant, or a
            `Metric` that is linear in the logits; for prompt pairs also a metric's name, and None for "logit_diff".
        pairs: the prompt pairs, where the examples are theirs.

    Raises:
        DataError: no target, a metric that is not linear, or a token outside the vocabulary.
        ShapeError: ids, or a metric, of another number of examples.
    """
    n = len(tokens)
    if pairs is not None and (target is None or isinstance(target, str)):
        target = pairs.metric(target or "logit_diff")
    if target is None:
        raise DataError(
            "no target was given: text needs target=token, or target=(token, other) for their difference; prompt pairs "
            "bring their own"
        )
    if isinstance(target, Metric):
        found = _of_metric(target, n)
    elif isinstance(target, tuple):
        found = _difference(hm, target, n)
    else:
        ids, name = _ids(hm, target, n)
        found = _weighted([(ids, 1.0)], f"logit of {name}")
    largest = int(found.columns.max())
    if int(found.columns.min()) < 0 or largest >= hm.d_vocab:
        raise DataError(f"target holds token {largest}; expected ids 0 … {hm.d_vocab - 1}")
    return found


def _of_metric(metric: Metric, n: int) -> Target:
    if metric.weights is None or metric.columns is None:
        raise DataError(
            f"metric {metric.name!r} is not linear in the logits, so it is no sum of contributions; use "
            "'logit_diff', or a Metric with weights"
        )
    if metric.n != n:
        raise ShapeError(f"the metric is of {metric.n} examples and these are {n}; run exactly its examples")
    return Target(metric.name, metric.columns, metric.weights)


def _difference(hm: HookManager, target: tuple[Any, ...], n: int) -> Target:
    if len(target) != 2:
        raise DataError(f"target holds {len(target)} entries; expected (token, other), whose difference is meant")
    (first, name), (second, other) = (_ids(hm, part, n) for part in target)
    return _weighted([(first, 1.0), (second, -1.0)], f"logit of {name} − {other}")


def _ids(hm: HookManager, target: Any, n: int) -> tuple[Int[Tensor, " n"], str]:
    if isinstance(target, str):
        target = hm.to_single_token(target)
    if isinstance(target, Tensor) and target.ndim == 1 and not target.is_floating_point():
        if len(target) != n:
            raise ShapeError(f"target has {len(target)} ids and there are {n} examples; give one each")
        return target.detach().cpu().long(), "a token each"
    whole = isinstance(target, int) and not isinstance(target, bool)
    if not whole:
        what = f"{tuple(target.shape)} {target.dtype}" if isinstance(target, Tensor) else f"{target!r}"
        raise DataError(f"target {what}: expected a token id, its text, ids [example], a pair of these, or a Metric")
    if not 0 <= target < hm.d_vocab:
        raise DataError(f"target {target}: expected a token id 0 … {hm.d_vocab - 1}")
    return torch.full((n,), target), repr(token_names(hm, torch.tensor([target]))[0])


def _weighted(parts: list[tuple[Tensor, float]], name: str) -> Target:
    columns = torch.cat([ids for ids, _ in parts]).unique()
    weights = torch.zeros(len(parts[0][0]), len(columns))
    for ids, sign in parts:
        weights.scatter_add_(1, torch.searchsorted(columns, ids)[:, None], torch.full((len(ids), 1), sign))
    return Target(name, columns, weights)
