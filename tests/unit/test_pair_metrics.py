"""`Metric` of pairs: variants of the examples, few columns, ranks and divergences, against plain formulas."""

import pytest
import torch
import torch.nn.functional as F

from interp.core.errors import DataError, ShapeError
from interp.data.pair_tokens import PairTokens

PAIRS, VOCAB = 3, 17


def pairs() -> PairTokens:
    ids = torch.randint(0, VOCAB, (PAIRS, 4))
    answers, foils = torch.tensor([[2, 3], [4, 5], [6, 2]]), torch.tensor([[7], [8], [9]])
    return PairTokens.of_ids(ids, ids.flip(1), answers, foils)


@pytest.mark.parametrize("kind", ["logit_diff", "prob_diff", "log_prob", "rank", "kl"])
def test_variants_of_the_examples_in_any_order_get_what_each_alone_gets(kind: str) -> None:
    logits = torch.randn(5, PAIRS, VOCAB, dtype=torch.float64)
    reference = torch.randn(PAIRS, VOCAB, dtype=torch.float64) if kind == "kl" else None
    metric = pairs().metric(kind, reference=reference)
    alone = torch.stack([metric(variant[:, None]) for variant in logits])
    rows = torch.arange(PAIRS).repeat(5)
    order = torch.randperm(len(rows))
    given = logits.reshape(-1, VOCAB)
    given = given if metric.columns is None else given[:, metric.columns]
    found = metric.of(given[order], rows[order])
    torch.testing.assert_close(found, alone.reshape(-1)[order])


def test_a_logit_difference_looks_at_the_answers_and_foils_alone_and_says_its_coefficients() -> None:
    metric = pairs().metric()
    assert metric.columns is not None and metric.columns.tolist() == [2, 3, 4, 5, 6, 7, 8, 9]
    assert metric.weights is not None
    logits = torch.randn(PAIRS, 1, VOCAB)
    expected = torch.stack(
        [logits[i, 0, [a, b]].mean() - logits[i, 0, f] for i, (a, b, f) in enumerate([(2, 3, 7), (4, 5, 8), (6, 2, 9)])]
    )
    torch.testing.assert_close(metric(logits), expected)
    torch.testing.assert_close((logits[:, 0, metric.columns] * metric.weights).sum(1), expected)
    shifted = logits + torch.tensor([1.0, 5.0, -3.0])[:, None, None]
    torch.testing.assert_close(metric(shifted), expected, atol=1e-5, rtol=0)


def test_rank_counts_the_tokens_above_the_best_answer() -> None:
    logits = torch.zeros(PAIRS, 1, VOCAB)
    logits[0, 0, [2, 10, 11]] = torch.tensor([1.0, 2.0, 3.0])
    logits[1, 0, 5] = 4.0
    logits[2, 0] = torch.arange(VOCAB, dtype=torch.float32)
    assert pairs().metric("rank")(logits).tolist() == [2.0, 0.0, 10.0]


def test_divergence_from_the_reference_is_that_of_torch_and_zero_from_itself() -> None:
    reference, logits = torch.randn(PAIRS, VOCAB), torch.randn(PAIRS, 1, VOCAB)
    expected = F.kl_div(logits[:, 0].log_softmax(-1), reference.softmax(-1), reduction="none").sum(-1)
    metric = pairs().metric("kl", reference=reference)
    torch.testing.assert_close(metric(logits), expected)
    torch.testing.assert_close(metric(reference[:, None]), torch.zeros(PAIRS), atol=1e-6, rtol=0)


@pytest.mark.usefixtures("unchecked")
def test_a_metric_refuses_what_it_cannot_be() -> None:
    with pytest.raises(DataError, match="'kl' needs reference logits"):
        pairs().metric("kl")
    with pytest.raises(DataError, match="'rank' takes no reference"):
        pairs().metric("rank", reference=torch.zeros(PAIRS, VOCAB))
    with pytest.raises(DataError, match="did you mean 'logit_diff'"):
        pairs().metric("logit_dif")
    with pytest.raises(ShapeError, match=r"expected \[pair d_vocab\] for 3 pairs"):
        pairs().metric("kl", reference=torch.zeros(2, VOCAB))
    with pytest.raises(DataError, match="is token 6, outside the vocabulary 0 … 5"):
        pairs().metric("rank")(torch.zeros(PAIRS, 1, 6))
