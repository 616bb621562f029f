"""Metrics on tensors, against closed forms and torch's own losses."""

import math

import pytest
import torch
import torch.nn.functional as F

from interp.core.errors import DataError, ShapeError
from interp.core.metrics import answer_logits, kl_divergence, logit_diff, loss_per_token, prob_diff, rank_of

BATCH, POS, VOCAB = 3, 5, 7


def _logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(BATCH, POS, VOCAB, generator=torch.Generator().manual_seed(seed))


def test_logit_diff_without_padding_reads_the_last_position() -> None:
    logits = _logits()
    assert torch.equal(logit_diff(logits, 2, 5), logits[:, -1, 2] - logits[:, -1, 5])
    assert torch.equal(logit_diff(logits, 2, 5, pos=1), logits[:, 1, 2] - logits[:, 1, 5])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pos", [-2, -1, 0, 1])
def test_positions_count_each_rows_own_real_tokens(side: str, pos: int) -> None:
    logits, lengths = _logits(), [2, 5, 3]
    mask = torch.zeros(BATCH, POS, dtype=torch.bool)
    picked = []
    for row, n in enumerate(lengths):
        first = POS - n if side == "left" else 0
        mask[row, first : first + n] = True
        picked.append(logits[row, first + (pos if pos >= 0 else n + pos)])
    assert torch.equal(answer_logits(logits, pos=pos, mask=mask), torch.stack(picked))


def test_each_row_may_have_its_own_answer() -> None:
    logits, right, wrong = _logits(), torch.tensor([0, 1, 2]), torch.tensor([6, 5, 4])
    rows = torch.arange(BATCH)
    assert torch.equal(logit_diff(logits, right, wrong), logits[rows, -1, right] - logits[rows, -1, wrong])
    probs = logits[:, -1].softmax(-1)
    assert torch.allclose(prob_diff(logits, right, wrong), probs[rows, right] - probs[rows, wrong])


def test_rank_counts_the_tokens_above() -> None:
    logits = _logits()
    order = logits[:, -1].argsort(-1, descending=True)
    for rank in range(VOCAB):
        assert rank_of(logits, order[:, rank]).tolist() == [rank] * BATCH


def test_half_precision_logits_are_compared_in_fp32() -> None:
    logits = torch.zeros(1, 1, 2, dtype=torch.bfloat16)
    logits[0, 0, 0] = 256.0
    logits[0, 0, 1] = 0.5
    assert logit_diff(logits, 0, 1).tolist() == [255.5]


def test_an_answer_in_words_is_refused_with_the_way_to_its_id() -> None:
    with pytest.raises(DataError, match=r"hm\.to_single_token\(' Paris'\)"):
        logit_diff(_logits(), " Paris", 3)
    with pytest.raises(DataError, match="outside the vocabulary 0 … 6"):
        logit_diff(_logits(), 7, 3)
    with pytest.raises(DataError, match="outside the vocabulary"):
        logit_diff(_logits(), 0, torch.tensor([0, 0, -1]))
    with pytest.raises(ShapeError, match=r"\[batch\] = \[3\]"):
        logit_diff(_logits(), torch.tensor([1, 2]), 3)
    with pytest.raises(ShapeError, match="give mask"):
        logit_diff(_logits(), 1, 2, mask=torch.ones(BATCH, POS + 1, dtype=torch.bool))
    mask = torch.ones(BATCH, POS, dtype=torch.bool)
    mask[1, 2:] = False
    with pytest.raises(DataError, match="row 1 has 2 tokens"):
        logit_diff(_logits(), 1, 2, pos=2, mask=mask)


def test_kl_is_zero_only_at_the_reference_and_agrees_with_torch() -> None:
    p, q = _logits(1), _logits(2)
    assert torch.allclose(kl_divergence(p, p), torch.zeros(BATCH, POS))
    expected = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    assert torch.allclose(kl_divergence(q, p), expected, atol=1e-6) and bool((expected > 0.1).all())
    assert torch.allclose(kl_divergence(q + 3.0, p - 1.0), expected, atol=1e-5)


def test_kl_and_its_gradient_stay_finite_where_the_reference_rules_a_token_out() -> None:
    q = _logits().requires_grad_()
    reference = _logits(3)
    reference[..., 0] = -math.inf
    value = kl_divergence(q, reference)
    (gradient,) = torch.autograd.grad(value.sum(), q)
    assert bool(value.isfinite().all()) and bool(gradient.isfinite().all())
    assert torch.allclose(gradient, q.softmax(-1) - reference.softmax(-1), atol=1e-6)


def test_loss_per_token_is_cross_entropy_shifted_by_one() -> None:
    logits, ids = _logits(), torch.randint(0, VOCAB, (BATCH, POS))
    losses, counts = loss_per_token(logits, ids)
    expected = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    assert torch.allclose(losses, expected) and bool(counts.all())
    uniform, _ = loss_per_token(torch.zeros(BATCH, POS, VOCAB), ids)
    assert torch.allclose(uniform, torch.full((BATCH, POS - 1), math.log(VOCAB)))


def test_losses_outside_the_mask_are_zero_even_where_logits_are_nan_and_so_are_their_gradients() -> None:
    logits, ids = _logits(), torch.randint(0, VOCAB, (BATCH, POS))
    mask = torch.ones(BATCH, POS, dtype=torch.bool)
    mask[0, :2] = False
    mask[1, 3:] = False
    logits[~mask] = math.nan
    logits.requires_grad_()
    losses, counts = loss_per_token(logits, ids, mask)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert counts.sum(1).tolist() == [2, 2, 4]
    assert torch.equal(losses[~counts], torch.zeros(int((~counts).sum()))) and bool((losses[counts] > 0).all())
    assert bool(gradient.isfinite().all()) and float(gradient[:, :-1][counts].abs().min()) > 0
