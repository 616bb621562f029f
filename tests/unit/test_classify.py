"""Figures of a classifier: against counting by hand, scipy, and the truth in repeated draws."""

import itertools
import math

import pytest
import torch
from scipy import stats as scipy_stats
from torch import Tensor

from interp.core.classify import METRICS, classify_metrics, group_draws, group_intervals
from interp.core.errors import DataError, ShapeError
from interp.core.fit import auroc


def drawn(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Scores with ties, and two classes that they tell of."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (n,), generator=generator)
    return ((torch.randn(n, generator=generator) + y) * 4).round()[:, None] / 4 - 0.5, y


def by_counting(scores: list[float], y: list[int]) -> dict[str, float]:
    """Every figure from its definition, example by example."""
    said = [int(s > 0) for s in scores]
    tp, tn = (sum(p == t == c for p, t in zip(said, y, strict=True)) for c in (1, 0))
    fp = sum(p > t for p, t in zip(said, y, strict=True))
    fn = sum(p < t for p, t in zip(said, y, strict=True))
    ahead = [
        (a > b) + (a == b) / 2
        for a, s in zip(scores, y, strict=True)
        if s
        for b, t in zip(scores, y, strict=True)
        if not t
    ]
    area, before = 0.0, 0.0
    for cut in sorted(set(scores), reverse=True):
        kept = [t for s, t in zip(scores, y, strict=True) if s >= cut]
        recall = sum(kept) / sum(y)
        area, before = area + (recall - before) * sum(kept) / len(kept), recall
    return {
        "accuracy": (tp + tn) / len(y),
        "balanced_accuracy": (tp / (tp + fn) + tn / (tn + fp)) / 2,
        "auroc": sum(ahead) / len(ahead),
        "average_precision": area,
        "f1": 2 * tp / (2 * tp + fp + fn),
        "mcc": (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)),
    }


@pytest.mark.parametrize("seed", range(3))
def test_each_figure_is_its_definition_counted_by_hand(seed: int) -> None:
    scores, y = drawn(40, seed)
    expected = by_counting(scores[:, 0].tolist(), y.tolist())
    found = dict(zip(METRICS, classify_metrics(scores, y)[0].tolist(), strict=True))
    assert found == pytest.approx(expected)
    assert found["auroc"] == pytest.approx(float(auroc(scores[:, 0], y == 1)))
    ranked = scipy_stats.mannwhitneyu(scores[y == 1, 0], scores[y == 0, 0]).statistic
    assert found["auroc"] == pytest.approx(ranked / int((y == 1).sum() * (y == 0).sum()))
    assert found["mcc"] == pytest.approx(
        float(torch.corrcoef(torch.stack([(scores[:, 0] > 0).float(), y.float()]))[0, 1])
    )


def test_average_precision_is_of_the_scores_and_not_of_what_they_say() -> None:
    scores, y = torch.tensor([[3.0], [2.0], [1.0], [0.5]]), torch.tensor([1, 1, 0, 0])
    kept = dict(zip(METRICS, classify_metrics(scores, y)[0].tolist(), strict=True))
    assert kept["average_precision"] == kept["auroc"] == 1.0 and kept["accuracy"] == 0.5 and kept["mcc"] == 0.0


def test_a_weight_is_that_many_copies_and_no_weight_is_no_example() -> None:
    scores, y = drawn(30)
    weights = torch.randint(0, 4, (5, 30)).float()
    found = classify_metrics(scores, y, weights=weights)
    for row, w in zip(found, weights, strict=True):
        copies = torch.arange(30).repeat_interleave(w.long())
        torch.testing.assert_close(row, classify_metrics(scores[copies], y[copies])[0])


def test_two_classes_with_a_column_each_are_told_alike_and_many_are_means() -> None:
    scores, y = drawn(50)
    both = torch.cat([-scores, scores], 1)
    one, two = (classify_metrics(s, y)[0] for s in (scores, both))
    torch.testing.assert_close(one[[0, 1, 2, 5]], two[[0, 1, 2, 5]])
    codes = torch.randint(3, (60,))
    wide = torch.randn(60, 3) + 2 * torch.nn.functional.one_hot(codes, 3)
    found = dict(zip(METRICS, classify_metrics(wide, codes)[0].tolist(), strict=True))
    assert found["accuracy"] == pytest.approx(float((wide.argmax(1) == codes).double().mean()))
    assert found["auroc"] == pytest.approx(float(auroc(wide.T, torch.stack([codes == c for c in range(3)])).mean()))
    said, true = (torch.nn.functional.one_hot(c, 3).double() for c in (wide.argmax(1), codes))
    said, true = said - said.mean(0), true - true.mean(0)
    assert found["mcc"] == pytest.approx(
        float((said * true).sum() / (said.square().sum() * true.square().sum()).sqrt())
    )


def test_a_class_that_is_not_there_makes_no_figure_and_a_constant_score_is_worth_nothing() -> None:
    found = dict(zip(METRICS, classify_metrics(torch.randn(6, 1), torch.zeros(6).long())[0].tolist(), strict=True))
    assert all(math.isnan(found[name]) for name in ("auroc", "average_precision", "balanced_accuracy", "mcc"))
    flat = dict(
        zip(METRICS, classify_metrics(torch.ones(6, 1), torch.tensor([0, 0, 0, 1, 1, 1]))[0].tolist(), strict=True)
    )
    assert flat["auroc"] == flat["average_precision"] == flat["accuracy"] == 0.5 and flat["mcc"] == 0.0


def test_groups_are_drawn_whole_and_intervals_come_from_the_resamples() -> None:
    group = torch.tensor([4, 4, 9, 9, 9, 2])
    draws = group_draws(group, n_bootstrap=300)
    assert bool((draws[0] == 1).all()) and draws.shape == (301, 6)
    assert bool((draws[:, 0] == draws[:, 1]).all()) and bool((draws[:, 2] == draws[:, 4]).all())
    assert bool((draws[1:, [0, 2, 5]].sum(1) == 3).all()) and draws[1:].mean() == pytest.approx(1.0, abs=0.15)
    values = torch.cat([torch.tensor([5.0]), torch.arange(101.0)])
    assert group_intervals(values).tolist() == [5.0, 2.5, 97.5]
    values[2:60] = torch.nan
    assert bool(group_intervals(values)[1:].isnan().all())


@pytest.mark.slow
def test_intervals_over_groups_cover_the_truth_and_those_over_examples_do_not() -> None:
    """Examples of a group share a shift, so 240 examples are worth some 40."""
    generator = torch.Generator().manual_seed(1)

    def draw(groups: int) -> tuple[Tensor, Tensor, Tensor]:
        group = torch.arange(groups).repeat_interleave(6)
        y = group % 2
        shift = torch.randn(groups, generator=generator)[group] * 1.5
        return (torch.randn(groups * 6, generator=generator) + shift + 1.0 * y - 0.5)[:, None], y, group

    scores, y, _ = draw(40000)
    truth = classify_metrics(scores, y)[0]
    covered = torch.zeros(2, 6)
    for _ in range(200):
        scores, y, group = draw(40)
        for i, units in enumerate((group, torch.arange(len(y)))):
            found = group_intervals(classify_metrics(scores, y, weights=group_draws(units, n_bootstrap=300)))
            covered[i] += ((found[:, 1] <= truth) & (truth <= found[:, 2])).float() / 200
    assert bool((covered[0] > 0.9).all()) and bool((covered[0] < 0.995).all())
    assert bool((covered[1] < 0.85).all())


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_line_up_is_refused() -> None:
    scores, y = drawn(10)
    for wrong, error in itertools.chain(
        [((scores, y[:5], None), ShapeError), ((scores, y + 1, None), ShapeError)],
        [((scores, y, torch.ones(2, 9)), ShapeError), ((scores * torch.nan, y, None), DataError)],
    ):
        with pytest.raises(error):
            classify_metrics(wrong[0], wrong[1], weights=wrong[2])
