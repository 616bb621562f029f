"""`PairTokens`: prompt pairs as one tokenizer sees them, with spans as masks and answers as token ids."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.errors import DataError, nearest
from interp.core.inputs import read_inputs
from interp.core.metrics import Metric
from interp.core.run import Run
from interp.core.text import Tokens
from interp.data.pair_metrics import pair_metric
from interp.data.prompt import END

__all__ = ["PairTokens", "with_spans"]

Candidates = tuple[tuple[int, ...], ...]
"""The token ids of each answer, or foil, of one pair."""


@dataclass(frozen=True, eq=False)
class PairTokens:
    """Pairs ready to run: both sides as `Tokens`, and the token ids of answers and foils.

    Spans of either side are named as in the prompts; "end" is the last token of each prompt. Metrics use the first
    token of each answer and foil; several answers that begin with one token count once.

    Args:
        clean: the clean prompts.
        corrupted: the corrupted ones, in the same order; their padded width may differ.
        answers: for each pair, the token ids of each answer.
        foils: the same; a pair may have none.
        notes: what a reader of results should know.
        meta: facts of each pair; empty for none.
        name: what the data is called.

    Raises:
        DataError: counts that differ, a pair without an answer, an answer without tokens, or one that is a foil too.
    """

    clean: Tokens
    corrupted: Tokens
    answers: tuple[Candidates, ...]
    foils: tuple[Candidates, ...]
    notes: tuple[str, ...] = ()
    meta: tuple[Mapping[str, Any], ...] = ()
    name: str = "pairs"

    def __post_init__(self) -> None:
        counts = {"clean": len(self.clean), "corrupted": len(self.corrupted), "answers": len(self.answers)}
        counts |= {"foils": len(self.foils)} | ({"meta": len(self.meta)} if self.meta else {})
        if len(set(counts.values())) > 1:
            raise DataError(f"pairs need one of each: {', '.join(f'{n} {what}' for what, n in counts.items())}")
        for i, (answers, foils) in enumerate(zip(self.answers, self.foils, strict=True)):
            if not answers or not all(answers) or not all(foils):
                raise DataError(f"pair {i} has no answer, or an answer or foil without tokens: {answers}, {foils}")
            both = set(answers) & set(foils)
            if both:
                raise DataError(f"pair {i}: {min(both)} is an answer and a foil; change one")

    @classmethod
    def of_ids(
        cls,
        clean: Any,
        corrupted: Any,
        answers: Int[Tensor, "pair *n"],
        foils: Int[Tensor, "pair *m"] | None = None,
        *,
        name: str = "pairs",
    ) -> "PairTokens":
        """Return pairs given as token ids, for models without a tokenizer.

        Args:
            clean: ids [pair pos], lists of ids, or `Tokens`.
            corrupted: the same.
            answers: one token for each pair [pair], or several [pair n].
            foils: the same, or None for none.
            name: what the data is called.

        Raises:
            DataError: what `PairTokens` refuses.
        """
        sides = [with_spans(read_inputs(None, side, bos=None, mask=None), {}) for side in (clean, corrupted)]
        none: list[Candidates] = [()] * len(sides[0])
        held = [none if ids is None else _one_token_each(ids) for ids in (answers, foils)]
        return cls(sides[0], sides[1], tuple(held[0]), tuple(held[1]), name=name)

    def __len__(self) -> int:
        return len(self.answers)

    @cached_property
    def answer_ids(self) -> Int[Tensor, "pair n_answers"]:
        """The first token of each answer, 0 where `answer_mask` is False."""
        return _first_tokens(self.answers)[0]

    @cached_property
    def answer_mask(self) -> Bool[Tensor, "pair n_answers"]:
        """True where there is an answer."""
        return _first_tokens(self.answers)[1]

    @cached_property
    def foil_ids(self) -> Int[Tensor, "pair n_foils"]:
        """The first token of each foil, 0 where `foil_mask` is False."""
        return _first_tokens(self.foils)[0]

    @cached_property
    def foil_mask(self) -> Bool[Tensor, "pair n_foils"]:
        """True where there is a foil."""
        return _first_tokens(self.foils)[1]

    def positions(self, name: str, *, side: str = "clean") -> Int[Tensor, "pair n"]:
        """Return where a span is, counted in each row's own tokens: what `Where(pos=…)` takes.

        Args:
            name: the span.
            side: "clean" or "corrupted".

        Raises:
            DataError: no such span, or one that has more tokens in some rows than in others.
        """
        if side not in ("clean", "corrupted"):
            raise DataError(f"side={side!r}: expected 'clean' or 'corrupted'")
        tokens: Tokens = getattr(self, side)
        if name not in tokens.spans:
            hint = nearest(name, tokens.spans) or f"the spans are: {', '.join(tokens.spans)}"
            raise DataError(f"the {side} prompts have no span {name!r}; {hint}")
        span = tokens.spans[name]
        counts = span.sum(1)
        if int(counts.min()) != int(counts.max()):
            few, many = int(counts.argmin()), int(counts.argmax())
            raise DataError(
                f"span {name!r} has {int(counts[few])} tokens in pair {few} and {int(counts[many])} in pair {many}; "
                "use Where(name=…), or pairs where it has one length"
            )
        place = tokens.mask.long().cumsum(1) - 1
        return place[span].reshape(len(self), -1)

    def forms(self, fact: str | None = "template") -> Int[Tensor, " pair"]:
        """Number the pairs by their form, 0 for the first: pairs of one form share a mean.

        Args:
            fact: the fact in `meta` that says a pair's form; None, or a fact that no pair has, takes all as one.
        """
        if fact is None or not self.meta:
            return torch.zeros(len(self), dtype=torch.long)
        values = [str(facts[fact]) if fact in facts else None for facts in self.meta]
        known = {value: i for i, value in enumerate(dict.fromkeys(values))}
        return torch.tensor([known[value] for value in values])

    def check_first_tokens(self) -> None:
        """Refuse pairs whose answers and foils cannot be told apart by their first tokens.

        Raises:
            DataError: an answer and a foil begin with one token.
        """
        for i, (answers, foils) in enumerate(zip(self.answers, self.foils, strict=True)):
            both = {a[0] for a in answers} & {f[0] for f in foils}
            if both:
                raise DataError(
                    f"pair {i}: token {min(both)} begins an answer and a foil, so first tokens do not tell them apart; "
                    "change one, or score whole answers with pair_accuracy(…, full=True)"
                )

    def check_foils(self) -> None:
        """Refuse pairs without foils.

        Raises:
            DataError: names the first one.
        """
        row = next((i for i, foils in enumerate(self.foils) if not foils), None)
        if row is not None:
            raise DataError(f"pair {row} has no foils to compare with; use log_prob, or give foils")

    # -- metrics ------------------------------------------------------------------------------------------------

    def metric(self, kind: str = "logit_diff", *, reference: Float[Tensor, "pair d_vocab"] | None = None) -> Metric:
        """Return one of these pairs' metrics by name; called on a run of them it gives one number per pair.

        - "logit_diff": mean logit of the answers − mean logit of the foils.
        - "prob_diff": Σ p(answer) − Σ p(foil).
        - "log_prob": log Σ p(answer), in nats; needs no foils.
        - "rank": how many tokens have a larger logit than the best answer; needs no foils, has no gradient.
        - "kl": KL(reference ‖ run) over the vocabulary, in nats.

        All look at each row's last real token and at the first token of each answer and foil.

        Args:
            kind: the name.
            reference: for "kl", the logits of the distribution that is right, such as the clean run's.

        Raises:
            DataError: another name, or pairs that lack what it compares.

        Source: logit difference as in Wang et al. (2022), arXiv 2211.00593, §2, where several answers or foils count
        by the mean of their logits; probability difference as in Hanna et al. (2023), arXiv 2305.00586, §2.
        """
        return pair_metric(self, kind, reference=reference)

    def logit_diff(
        self, out: Run | Float[Tensor, "pair pos d_vocab"], *, mask: Bool[Tensor, "pair width"] | None = None
    ) -> Float[Tensor, " pair"]:
        """Return `metric("logit_diff")` of a run of these pairs."""
        return self.metric("logit_diff")(out, mask=mask)


def with_spans(tokens: Tokens, spans: Mapping[str, Bool[Tensor, "pair pos"]]) -> Tokens:
    """Return the same tokens with these spans added, and "end" at each row's last real token.

    Args:
        tokens: a padded batch.
        spans: masks over its columns, by name.
    """
    end = tokens.mask & (tokens.mask.long().cumsum(1) == tokens.lengths[:, None])
    return replace(tokens, spans={**tokens.spans, **spans, END: end})


def _one_token_each(ids: Int[Tensor, "pair *n"]) -> list[Candidates]:
    return [tuple((i,) for i in row) for row in ids.reshape(len(ids), -1).tolist()]


def _first_tokens(candidates: Sequence[Candidates]) -> tuple[Tensor, Tensor]:
    first = [list(dict.fromkeys(c[0] for c in held)) for held in candidates]
    width = max(map(len, first))
    ids = torch.zeros(len(candidates), width, dtype=torch.long)
    mask = torch.zeros(len(candidates), width, dtype=torch.bool)
    for row, held in enumerate(first):
        ids[row, : len(held)] = torch.tensor(held, dtype=torch.long)
        mask[row, : len(held)] = True
    return ids, mask
