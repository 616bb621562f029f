"""AUROC, accuracy and d with intervals: against the plain formulas, resampled groups, weights and ties."""

import math

import pytest
import torch

from interp.core.errors import DataError, ShapeError
from interp.core.fit import auroc
from interp.core.separation import separation


def drawn(n: int, gap: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    truth = torch.arange(n) % 3 == 0
    return torch.randn(n, generator=draw) + gap * truth, truth


def test_figures_are_those_of_the_plain_formulas() -> None:
    scores, truth = drawn(90, 1.0)
    for values in (scores, (2 * scores).round()):  # with ties too
        found = separation(values, truth, threshold=0.3)
        assert found.auroc.mean == pytest.approx(float(auroc(values, truth)))
        right = [(values[truth] > 0.3).double().mean(), (values[~truth] <= 0.3).double().mean()]
        assert found.accuracy.mean == pytest.approx(float(sum(right)) / 2)
        one, zero = values[truth].double(), values[~truth].double()
        pooled = (one.var(unbiased=False) * len(one) + zero.var(unbiased=False) * len(zero)) / len(values)
        assert found.d.mean == pytest.approx(float((one.mean() - zero.mean()) / pooled.sqrt()))
        for figure in found:
            assert figure.low <= figure.mean <= figure.high


def test_an_interval_covers_the_truth_and_says_how_few_groups_there_are() -> None:
    truth_auroc = 0.5 * (1 + math.erf(1.0 / 2))  # of unit normals one apart
    hits = 0
    for seed in range(20):
        scores, truth = drawn(120, 1.0, seed)
        found = separation(scores, truth, n_bootstrap=200).auroc
        hits += found.low <= truth_auroc <= found.high
    assert hits >= 16
    # Ten copies of each example are no more evidence than one, if groups say so.
    scores, truth = drawn(60, 1.0)
    once = separation(scores, truth).auroc
    groups = torch.arange(60).repeat(10)
    copies = separation(scores.repeat(10), truth.repeat(10), groups=groups).auroc
    naive = separation(scores.repeat(10), truth.repeat(10)).auroc
    assert copies.high - copies.low == pytest.approx(once.high - once.low, rel=0.15)
    assert naive.high - naive.low < 0.5 * (once.high - once.low)


def test_order_does_not_matter_and_one_group_has_no_interval() -> None:
    scores, truth = drawn(40, 1.0)
    order = torch.randperm(40)
    a, b = (separation(scores[o], truth[o], groups=(torch.arange(40) // 4)[o]) for o in (torch.arange(40), order))
    assert a == b
    one = separation(scores, truth, groups=torch.zeros(40, dtype=torch.long)).auroc
    assert one.mean == a.auroc.mean and math.isnan(one.low)
    assert math.isnan(separation(scores, truth, n_bootstrap=0).d.high)


@pytest.mark.usefixtures("unchecked")
def test_bad_scores_are_refused() -> None:
    scores, truth = drawn(9, 1.0)
    with pytest.raises(ShapeError, match="one list each"):
        separation(scores, truth[:4])
    with pytest.raises(DataError, match="one class alone"):
        separation(scores, torch.zeros(9, dtype=torch.bool))
    with pytest.raises(DataError, match="NaN"):
        separation(scores / 0 * 0, truth)
