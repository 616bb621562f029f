"""What a steering does at each dose: to answers, to the predictions on a text, to what is generated.

Unsteered values are those of forwards of the same shape, row by row, so that a dose of 0 changes them by exactly 0.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.direction import Steers
from interp.core.errors import DataError
from interp.core.inputs import Inputs
from interp.core.manager import HookManager
from interp.core.metrics import Metric, answer_logits, kl_divergence, loss_per_token
from interp.core.text import Tokens
from interp.core.where import Where
from interp.steering.evaluating.dose_rows import Block, Doses, blocks, edits_of, quiet_at_zero, takes_rows
from interp.steering.evaluating.fluency import compression, distinct_n, generated_ids, generated_perplexity, rows_within

__all__ = [
    "AnswerMeasure",
    "Continued",
    "OnText",
    "Sampling",
    "TextMeasure",
    "blocks_for",
    "continue_prompts",
    "prompt_texts",
    "read_text",
]

# Logits of unsteered text are kept up to so many bytes, and computed again beyond.
_HELD_BYTES = 2**28


def read_text(hm: HookManager, text: Inputs) -> Tokens:
    """Return a text as tokens on the CPU."""
    tokens = hm.to_tokens(text)
    if tokens.position_ids is not None:
        raise DataError("packed documents cannot be put on rows of their own; give one document per row")
    return tokens


def prompt_texts(hm: HookManager, given: Inputs, tokens: Tokens) -> list[str]:
    """Return prompts as they were given, or as their tokens read."""
    if isinstance(given, str):
        return [given]
    if isinstance(given, list | tuple) and all(isinstance(text, str) for text in given):
        return list(given)[: len(tokens)]
    rows = [ids[mask].tolist() for ids, mask in zip(tokens.ids.cpu(), tokens.mask.cpu(), strict=True)]
    if hm.tokenizer is None:
        return [str(row) for row in rows]
    return [hm.tokenizer.decode(row, skip_special_tokens=True) for row in rows]


class AnswerMeasure:
    """A metric of each prompt's last token, dose by dose.

    Memory: the last logits of a forward, 4 · batch_size · d_vocab bytes.
    """

    def __init__(
        self, hm: HookManager, tokens: Tokens, metric: Metric, *, where: Where | None, batch_size: int
    ) -> None:
        if metric.n != len(tokens):
            raise DataError(f"the metric is of {metric.n} examples and there are {len(tokens)} prompts")
        self.hm, self.tokens, self.metric, self.where, self.size = hm, tokens, metric, where, batch_size
        self._held: dict[tuple[int, int], Tensor] = {}

    @property
    def base(self) -> Float[Tensor, " sample"]:
        """The metric of the unsteered model."""
        found = [self._base(block, 1) for block in blocks(len(self.tokens), 1, self.size)]
        return torch.cat(found)

    def __call__(self, steers: Steers, doses: Doses) -> Float[Tensor, "dose sample"]:
        """Return the change of the metric from the unsteered model's."""
        n, k = len(self.tokens), len(doses.values)
        effect = torch.full((k, n), math.nan)
        for block in blocks_for(steers, n, k, self.size):
            edits = edits_of(steers, doses, block, where=self.where, n_rows=n)
            with quiet_at_zero(doses, block):
                steered = self._values(block, edits)
            effect[block.doses, block.rows] = steered - self._base(block, k)
        return effect

    def _base(self, block: Block, k: int) -> Tensor:
        key = (int(block.rows[0]), len(block.rows))
        if key not in self._held:
            self._held[key] = self._values(block, [])
        return self._held[key]

    def _values(self, block: Block, edits: Sequence[Any]) -> Tensor:
        logits = answer_logits(self.hm.run(self.tokens.take(block.rows), write=edits, logits="last"))
        return _metric_of(self.metric, logits, block.rows)


def _metric_of(metric: Metric, logits: Float[Tensor, "r d_vocab"], rows: Int[Tensor, " r"]) -> Float[Tensor, " r"]:
    """The metric of examples that stand in other rows."""
    if metric.columns is not None:
        logits = logits.index_select(1, metric.columns.to(logits.device))
    return metric.of(logits, rows.to(logits.device)).detach().float().cpu()


class OnText(NamedTuple):
    """What doses do to predictions on a text: the KL from the unsteered ones at each token, in nats, and the loss.

    Where the text is the prompts themselves, `effect` is the change of their metric, of the same forwards.
    """

    kl: Float[Tensor, "dose token"]
    loss_change: Float[Tensor, " dose"]
    effect: Float[Tensor, "dose sample"] | None = None


class TextMeasure:
    """KL to the unsteered model, and the change of the loss, on a text; with a metric, also what `AnswerMeasure` gives.

    Memory: the logits of a forward, 4 · rows · pos · d_vocab bytes, four times over, with as many rows as keep that
    below 256 MB; and up to 256 MB of unsteered logits that are kept.
    """

    def __init__(
        self, hm: HookManager, tokens: Tokens, *, where: Where | None, batch_size: int, metric: Metric | None = None
    ) -> None:
        self.hm, self.tokens, self.where, self.metric = hm, tokens, where, metric
        self.size = rows_within(hm, tokens.ids.shape[1], batch_size)
        counted = tokens.mask & ~hm.special_mask(tokens.ids)
        self.counted = counted if bool(counted.any()) else tokens.mask
        self._held: dict[tuple[int, int], Tensor] = {}
        self._held_bytes = 0

    def __call__(self, steers: Steers, doses: Doses) -> OnText:
        """Measure every dose."""
        n, k = len(self.tokens), len(doses.values)
        kl: list[list[Tensor]] = [[] for _ in range(k)]
        change, total = torch.zeros(k, dtype=torch.float64), torch.zeros(k, dtype=torch.float64)
        effect = None if self.metric is None else torch.full((k, n), math.nan)
        for block in blocks_for(steers, n, k, self.size):
            part = self.tokens.take(block.rows)
            base = self._base(block, part)
            edits = edits_of(steers, doses, block, where=self.where, n_rows=n)
            with quiet_at_zero(doses, block):
                steered = self.hm.run(part, write=edits, logits="all").logits
            found = kl_divergence(steered, base).cpu()
            after, counts = loss_per_token(steered, part.ids, part.mask)
            before, _ = loss_per_token(base, part.ids, part.mask)
            difference = (after.double() - before.double()).sum(1).cpu()
            change.index_add_(0, block.doses, difference)
            total.index_add_(0, block.doses, counts.sum(1).double().cpu())
            if self.metric is not None and effect is not None:
                now, plain = (
                    _metric_of(self.metric, answer_logits(x, mask=part.mask), block.rows) for x in (steered, base)
                )
                effect[block.doses, block.rows] = now - plain
            counted = self.counted[block.rows]
            for dose in block.doses.unique().tolist():
                at = block.doses == dose
                kl[dose].append(found[at][counted[at]])
        return OnText(torch.stack([torch.cat(parts) for parts in kl]), (change / total).float(), effect)

    def _base(self, block: Block, part: Tokens) -> Tensor:
        key = (int(block.rows[0]), len(block.rows))
        if key in self._held:
            return self._held[key]
        logits = self.hm.run(part, logits="all").logits
        size = logits.numel() * logits.element_size()
        if self._held_bytes + size <= _HELD_BYTES:
            self._held[key] = logits
            self._held_bytes += size
        return logits


class Sampling(NamedTuple):
    """How texts are generated.

    Attributes:
        where: the positions that steering acts on.
        max_new_tokens: per prompt at most.
        temperature: 0 is greedy.
        seed: of the sampling; a row's draws depend on the rows beside it.
        batch_size: rows per forward.
    """

    where: Where | None = None
    max_new_tokens: int = 20
    temperature: float = 0.0
    seed: int = 0
    batch_size: int = 32


class Continued(NamedTuple):
    """What was generated at each dose, and how fluent it is."""

    texts: list[list[str]]
    perplexity: Float[Tensor, "dose prompt"]
    distinct: Float[Tensor, "dose prompt n"]
    compression: Float[Tensor, "dose prompt"]


def continue_prompts(
    hm: HookManager,
    steers: Steers | None,
    tokens: Tokens,
    doses: Doses,
    *,
    how: Sampling,
) -> Continued:
    """Generate from each prompt at each dose, and measure what comes out.

    Args:
        hm: the model; also the one that perplexity is under, without edits.
        steers: what steers; None for the model as it is, at the doses' number.
        tokens: the prompts.
        doses: the doses.
        how: how much is generated, and how.

    Returns:
        Texts, perplexity under the unsteered model, distinct 1-, 2- and 3-grams and compression.
    """
    n, k = len(tokens), len(doses.values)
    texts = [[""] * n for _ in range(k)]
    perplexity, packed = torch.full((k, n), math.nan), torch.full((k, n), math.nan)
    distinct = torch.full((k, n, 3), math.nan)
    for block in blocks_for(steers, n, k, how.batch_size):
        edits = edits_of(steers, doses, block, where=how.where, n_rows=n)
        with quiet_at_zero(doses, block):
            made = hm.generate(
                tokens.take(block.rows),
                max_new_tokens=how.max_new_tokens,
                write=edits,
                temperature=how.temperature,
                seed=how.seed,
            )
        perplexity[block.doses, block.rows] = generated_perplexity(hm, made)
        said = made.text if hm.tokenizer is not None else [str(row) for row in generated_ids(made)]
        for d, r, ids, text in zip(block.doses.tolist(), block.rows.tolist(), generated_ids(made), said, strict=True):
            texts[d][r] = text
            packed[d, r] = compression(text)
            distinct[d, r] = torch.tensor([distinct_n(ids, size) for size in (1, 2, 3)])
    return Continued(texts, perplexity, distinct, packed)


def blocks_for(steers: Steers | None, n_rows: int, n_doses: int, at_once: int) -> list[Block]:
    """Forwards that hold several doses where what steers takes one per row, else one dose each."""
    if steers is None or takes_rows(steers):
        return list(blocks(n_rows, n_doses, at_once))
    return [
        Block(part.rows, torch.full_like(part.doses, dose))
        for dose in range(n_doses)
        for part in blocks(n_rows, 1, at_once)
    ]
