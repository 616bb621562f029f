"""Numbers that say how a model answered: differentiable, computed in fp32 or better, one per example."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.errors import DataError, ShapeError
from interp.core.run import Run

__all__ = [
    "Metric",
    "answer_logits",
    "kl_divergence",
    "logit_diff",
    "loss_per_token",
    "prob_diff",
    "rank_of",
    "refuse_nan",
]


@dataclass(frozen=True, eq=False)
class Metric:
    """One number per example, from the logits at each row's answer position; says which logits it needs.

    Called on a run it is an ordinary metric; a sweep calls `of` instead, on many variants of the examples at once and
    on the logits of `columns` alone. `PairTokens.metric` makes the usual ones.

    Args:
        name: what results call it, such as "logit_diff".
        of: maps logits [row column], in the order of `columns`, and the example of each row [row] to values [row];
            differentiable, and each row's value depends on that row alone.
        n: examples.
        columns: the tokens it looks at, each once; None for the whole vocabulary.
        weights: where the metric is linear in the logits, its coefficients per example and column; else None.
    """

    name: str
    of: Callable[[Float[Tensor, "row column"], Int[Tensor, " row"]], Float[Tensor, " row"]]
    n: int
    columns: Int[Tensor, " column"] | None = None
    weights: Float[Tensor, "n column"] | None = None

    @property
    def __name__(self) -> str:
        return self.name

    def of_rows(self, rows: Int[Tensor, " row"]) -> "Metric":
        """Return the same metric of some of the examples alone, in the order given.

        Args:
            rows: which examples.
        """

        def of(logits: Tensor, at: Tensor) -> Tensor:
            return self.of(logits, rows.to(at.device).index_select(0, at))

        weights = None if self.weights is None else self.weights[rows.to(self.weights.device)]
        return Metric(self.name, of, len(rows), self.columns, weights)

    def __call__(
        self, out: Run | Float[Tensor, "batch pos d_vocab"], *, mask: Bool[Tensor, "batch width"] | None = None
    ) -> Float[Tensor, " batch"]:
        """Return the metric of a run of exactly these examples.

        Args:
            out: the run (logits "all" or "last"), or its logits.
            mask: as in `answer_logits`; only with a tensor.

        Returns:
            One number per example, in fp32 or better, differentiable.

        Raises:
            ShapeError: a run with another number of rows.
            DataError: a token outside the vocabulary.
        """
        logits = answer_logits(out, mask=mask)
        if len(logits) != self.n:
            raise ShapeError(f"the run has {len(logits)} rows and these are {self.n} pairs; run exactly these pairs")
        if self.columns is not None:
            largest = int(self.columns.max())
            if largest >= logits.shape[1]:
                raise DataError(
                    f"an answer or foil is token {largest}, outside the vocabulary 0 … {logits.shape[1] - 1}"
                )
            logits = logits.index_select(1, self.columns.to(logits.device))
        return self.of(logits, torch.arange(self.n, device=logits.device))


def answer_logits(
    out: Run | Float[Tensor, "batch pos d_vocab"],
    *,
    pos: int = -1,
    mask: Bool[Tensor, "batch width"] | None = None,
) -> Float[Tensor, "batch d_vocab"]:
    """Pick the logits at one position of every row, counted in the row's own real tokens.

    Args:
        out: A run with logits, or logits [batch pos d_vocab].
        pos: 0 is the first real token of each row, -1 the last.
        mask: True where a token is real; only with a tensor (a run knows its own). None means no padding.

    Returns:
        Logits [batch d_vocab], in fp32 or better, attached to the graph.

    Raises:
        DataError: A row has no such position, or the run kept other logits.
        ShapeError: The mask does not belong to these logits.
    """
    if isinstance(out, Run):
        logits, mask = out.logits, out.mask
    else:
        logits = out
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    batch, width = logits.shape[:2]
    if mask is None:
        mask = torch.ones(batch, width, dtype=torch.bool, device=logits.device)
    mask = mask.to(logits.device)
    if width == 1 and mask.shape[1] > 1:
        if pos != -1:
            raise DataError(f'the run kept the last logits only and pos={pos} was asked; run with logits="all"')
        return logits[:, 0]
    if mask.shape != (batch, width):
        raise ShapeError(
            f"mask {tuple(mask.shape)} does not belong to logits {tuple(logits.shape)}; give mask [batch pos]"
        )
    column = _column(mask, pos)
    return logits.gather(1, column[:, None, None].expand(-1, 1, logits.shape[2]))[:, 0]


def logit_diff(
    out: Run | Float[Tensor, "batch pos d_vocab"],
    answer: int | str | Int[Tensor, " n"],
    wrong: int | str | Int[Tensor, " n"],
    *,
    pos: int = -1,
    mask: Bool[Tensor, "batch width"] | None = None,
) -> Float[Tensor, " batch"]:
    """Return logit(answer) − logit(wrong) at one position of every row.

    Args:
        out: A run with logits, or logits [batch pos d_vocab].
        answer: Token id of the right answer, one for all rows or [n = batch]. A string is refused.
        wrong: Token id of the wrong answer, alike.
        pos: Position whose logits are read; -1 is each row's last real token.
        mask: As in `answer_logits`.

    Returns:
        Logit differences [batch], differentiable.

    Raises:
        DataError: An answer is a string or outside the vocabulary, or a row has no such position.
    """
    logits = answer_logits(out, pos=pos, mask=mask)
    return _pick(logits, answer, "answer") - _pick(logits, wrong, "wrong")


def prob_diff(
    out: Run | Float[Tensor, "batch pos d_vocab"],
    answer: int | str | Int[Tensor, " n"],
    wrong: int | str | Int[Tensor, " n"],
    *,
    pos: int = -1,
    mask: Bool[Tensor, "batch width"] | None = None,
) -> Float[Tensor, " batch"]:
    """Return p(answer) − p(wrong) at one position of every row; arguments as in `logit_diff`."""
    probs = answer_logits(out, pos=pos, mask=mask).softmax(-1)
    return _pick(probs, answer, "answer") - _pick(probs, wrong, "wrong")


def rank_of(
    out: Run | Float[Tensor, "batch pos d_vocab"],
    answer: int | str | Int[Tensor, " n"],
    *,
    pos: int = -1,
    mask: Bool[Tensor, "batch width"] | None = None,
) -> Int[Tensor, " batch"]:
    """Return how many tokens have a larger logit than the answer: 0 is the top; arguments as in `logit_diff`."""
    logits = answer_logits(out, pos=pos, mask=mask)
    return (logits > _pick(logits, answer, "answer")[:, None]).sum(-1)


def kl_divergence(
    logits: Float[Tensor, "*place d_vocab"], reference: Float[Tensor, "*place d_vocab"]
) -> Float[Tensor, "*place"]:
    """Return KL(reference ‖ logits), summed over the vocabulary.

    Args:
        logits: Logits of the distribution that is judged.
        reference: Logits of the one it should be, such as the clean model's.

    Returns:
        Nats per place, ≥ 0 up to rounding; a token that the reference rules out (−∞) adds nothing.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    q = logits.to(dtype).log_softmax(-1)
    p = reference.to(dtype).log_softmax(-1)
    weight = p.exp()
    # 0 · (−∞ − x) is NaN; the limit is 0, and both branches must be finite for the gradient.
    ruled_out = weight == 0
    gap = torch.where(ruled_out, 0.0, p) - torch.where(ruled_out, 0.0, q)
    return (weight * gap).sum(-1)


def loss_per_token(
    logits: Float[Tensor, "batch pos d_vocab"],
    ids: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"] | None = None,
) -> tuple[Float[Tensor, "batch next"], Bool[Tensor, "batch next"]]:
    """Return the cross-entropy of every next token and which of them count.

    Args:
        logits: Logits [batch pos d_vocab].
        ids: Token ids [batch pos].
        mask: True where a token is real; None means no padding.

    Returns:
        Losses in nats [batch, pos − 1], entry i being that of token i + 1; and the mask of the same shape, True where
        both tokens are real. Losses outside it are exactly 0, also when the logits there are NaN.
    """
    if mask is None:
        mask = torch.ones_like(ids, dtype=torch.bool)
    mask, ids = mask.to(logits.device), ids.to(logits.device)
    counts = mask[:, :-1] & mask[:, 1:]
    kept = torch.where(counts[..., None], logits[:, :-1], 0.0)
    kept = kept.to(torch.promote_types(logits.dtype, torch.float32))
    losses = -kept.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return torch.where(counts, losses, 0.0), counts


def refuse_nan(values: Float[Tensor, " batch"], name: str, run: str) -> Float[Tensor, " batch"]:
    """Return the metric of a run as it is, if it is made of numbers.

    Args:
        values: the metric, per example.
        name: what it is called.
        run: which run it is of, such as "clean".

    Raises:
        DataError: one of them is NaN; nothing could be compared with it.
    """
    bad = values.isnan().nonzero()
    if len(bad):
        raise DataError(
            f"{name} of the {run} run is NaN for example {int(bad[0, -1])}, so nothing can be compared with it; look "
            "for NaN in the weights, an overflow of the dtype, or a metric that divides by 0"
        )
    return values


def _column(mask: Bool[Tensor, "batch pos"], pos: int) -> Int[Tensor, " batch"]:
    length = mask.sum(1)
    wanted = length + pos if pos < 0 else torch.full_like(length, pos)
    bad = (wanted < 0) | (wanted >= length)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise DataError(
            f"row {row} has {int(length[row])} tokens, so there is no position {pos}; choose one that every row has"
        )
    # The column where the count of real tokens first exceeds the wanted index.
    return (mask.cumsum(1) <= wanted[:, None]).sum(1)


def _pick(
    values: Float[Tensor, "batch d_vocab"], token: int | str | Int[Tensor, " n"], name: str
) -> Float[Tensor, " batch"]:
    if isinstance(token, str):
        raise DataError(f"{name}={token!r} is text and a token id was expected; use hm.to_single_token({token!r})")
    batch, d_vocab = values.shape
    ids = torch.as_tensor(token).long()
    known = ids.device.type == "cpu" and ids.numel() > 0  # looking at ids on a GPU would make the host wait
    if known and not (int(ids.min()) >= 0 and int(ids.max()) < d_vocab):
        raise DataError(f"{name} holds {int(ids.min())} … {int(ids.max())}, outside the vocabulary 0 … {d_vocab - 1}")
    ids = ids.to(values.device)
    if ids.ndim == 0:
        ids = ids.expand(batch)
    if ids.shape != (batch,):
        raise ShapeError(f"{name} has shape {tuple(ids.shape)}; expected one token id or [batch] = [{batch}]")
    return values.gather(1, ids[:, None])[:, 0]
