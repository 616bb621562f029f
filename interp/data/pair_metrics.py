"""The metrics of prompt pairs, as `Metric`: linear ones look at a few tokens' logits, the others at the vocabulary."""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.errors import DataError, ShapeError, nearest
from interp.core.metrics import Metric, kl_divergence

if TYPE_CHECKING:
    from interp.data.pair_tokens import PairTokens

__all__ = ["KINDS", "pair_metric"]

KINDS = ("logit_diff", "prob_diff", "log_prob", "rank", "kl")


def pair_metric(pairs: "PairTokens", kind: str, *, reference: Float[Tensor, "pair d_vocab"] | None = None) -> Metric:
    """Return a metric of pairs by name; see `PairTokens.metric`, which calls this."""
    if kind not in KINDS:
        raise DataError(f"metric {kind!r}: {nearest(kind, KINDS) or 'expected one of ' + ', '.join(KINDS)}")
    if (kind == "kl") != (reference is not None):
        what = "needs" if kind == "kl" else "takes no"
        raise DataError(f"metric {kind!r} {what} reference logits [pair d_vocab]; 'kl' is KL(reference ‖ run)")
    if kind in ("logit_diff", "prob_diff"):
        pairs.check_foils()
        pairs.check_first_tokens()
    made = {"logit_diff": _logit_diff, "prob_diff": _prob_diff, "log_prob": _log_prob, "rank": _rank}
    if reference is not None:
        return _kl(pairs, reference)
    return made[kind](pairs)


def _logit_diff(pairs: "PairTokens") -> Metric:
    held = [*pairs.answer_ids[pairs.answer_mask].tolist(), *pairs.foil_ids[pairs.foil_mask].tolist()]
    columns = torch.tensor(sorted(set(held)))
    weights = torch.zeros(len(pairs), len(columns))
    for ids, mask, sign in ((pairs.answer_ids, pairs.answer_mask, 1.0), (pairs.foil_ids, pairs.foil_mask, -1.0)):
        at = torch.searchsorted(columns, torch.where(mask, ids, columns[0]))
        weights.scatter_add_(1, at, sign * mask / mask.sum(1, keepdim=True))

    def of(logits: Tensor, rows: Tensor) -> Tensor:
        used = weights.to(logits).index_select(0, rows.to(logits.device))
        # A logit of −∞ that a row does not look at must not make it NaN.
        return torch.where(used == 0, 0.0, logits * used).sum(1)

    return Metric("logit_diff", of, len(pairs), columns, weights)


def _prob_diff(pairs: "PairTokens") -> Metric:
    def of(logits: Tensor, rows: Tensor) -> Tensor:
        probs = logits.softmax(-1)
        right = _picked(probs, rows, pairs.answer_ids, pairs.answer_mask, 0.0).sum(1)
        return right - _picked(probs, rows, pairs.foil_ids, pairs.foil_mask, 0.0).sum(1)

    return Metric("prob_diff", of, len(pairs))


def _log_prob(pairs: "PairTokens") -> Metric:
    def of(logits: Tensor, rows: Tensor) -> Tensor:
        found = _picked(logits.log_softmax(-1), rows, pairs.answer_ids, pairs.answer_mask, -torch.inf)
        return found.logsumexp(1)

    return Metric("log_prob", of, len(pairs))


def _rank(pairs: "PairTokens") -> Metric:
    def of(logits: Tensor, rows: Tensor) -> Tensor:
        best = _picked(logits, rows, pairs.answer_ids, pairs.answer_mask, -torch.inf).max(1).values
        return (logits > best[:, None]).sum(1).to(logits.dtype)

    return Metric("rank", of, len(pairs))


def _kl(pairs: "PairTokens", reference: Float[Tensor, "pair d_vocab"]) -> Metric:
    if reference.ndim != 2 or len(reference) != len(pairs):
        raise ShapeError(f"reference logits {tuple(reference.shape)}; expected [pair d_vocab] for {len(pairs)} pairs")

    def of(logits: Tensor, rows: Tensor) -> Tensor:
        return kl_divergence(logits, reference.to(logits.device).index_select(0, rows.to(logits.device)))

    return Metric("kl", of, len(pairs))


def _picked(
    values: Float[Tensor, "row d_vocab"],
    rows: Int[Tensor, " row"],
    ids: Int[Tensor, "pair n"],
    mask: Bool[Tensor, "pair n"],
    empty: float,
) -> Float[Tensor, "row n"]:
    """The values of each row's own tokens, and `empty` where its pair has fewer."""
    largest = int(ids.max()) if ids.numel() else 0
    if largest >= values.shape[1]:
        raise DataError(f"an answer or foil is token {largest}, outside the vocabulary 0 … {values.shape[1] - 1}")
    at = rows.to(values.device)
    chosen, real = ids.to(values.device).index_select(0, at), mask.to(values.device).index_select(0, at)
    return torch.where(real, values.gather(1, chosen), empty)
