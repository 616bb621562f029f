"""Statistics per example: against closed forms, scipy, and by coverage."""

import itertools

import pytest
import torch
from scipy import stats as scipy_stats

from interp.core.errors import DataError, ShapeError
from interp.core.stats import bootstrap, bootstrap_bounds, pearson, ranks, sign_flip_p, spearman


def normals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_interval_of_a_mean_is_that_of_the_normal_for_many_values_and_a_point_for_equal_ones() -> None:
    values = normals(2000)
    found = bootstrap(values, n_bootstrap=4000)
    half = 1.96 * float(values.std()) / 2000**0.5
    assert found.mean == pytest.approx(float(values.mean()), abs=1e-12)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.06)
    assert bootstrap(torch.full((7,), 3.0)) == (3.0, 3.0, 3.0)
    assert str(bootstrap(torch.full((7,), 3.0))) == "3 [3, 3]"


def test_nan_values_are_left_out_and_nothing_at_all_is_nan() -> None:
    values = torch.tensor([1.0, torch.nan, 3.0])
    assert bootstrap(values) == bootstrap(torch.tensor([1.0, 3.0]))
    assert all(v != v for v in bootstrap(torch.tensor([torch.nan])))


def test_bounds_cover_the_true_mean_in_nineteen_of_twenty_cells() -> None:
    low, high = bootstrap_bounds(normals(600, 40) + 1.0)
    assert low.shape == high.shape == (600,)
    covered = float(((low <= 1.0) & (high >= 1.0)).double().mean())
    assert 0.91 < covered < 0.97


def test_bounds_of_a_cell_do_not_depend_on_the_cells_beside_it() -> None:
    values = normals(3, 5, 12)
    low, high = bootstrap_bounds(values, n_bootstrap=300, seed=3)
    one = bootstrap_bounds(values[1, 2], n_bootstrap=300, seed=3)
    assert low.shape == (3, 5)
    assert float(low[1, 2]) == pytest.approx(float(one[0])) and float(high[1, 2]) == pytest.approx(float(one[1]))


def test_the_sign_flip_test_is_exact_for_few_examples() -> None:
    values = torch.tensor([0.5, 1.0, -0.25, 2.0])
    flips = [
        sum(s * v for s, v in zip(signs, values.tolist(), strict=True))
        for signs in itertools.product((1, -1), repeat=4)
    ]
    expected = sum(abs(f) >= 3.25 - 1e-12 for f in flips) / 16
    assert float(sign_flip_p(values)) == pytest.approx(expected)
    assert float(sign_flip_p(torch.ones(5))) == pytest.approx(2**-4)


def test_the_sign_flip_test_agrees_with_the_t_test_on_normal_values_and_sees_an_effect() -> None:
    values = normals(400, 30, seed=1)
    p = sign_flip_p(values, n_flips=1999)
    assert p.shape == (400,)
    expected = torch.from_numpy(scipy_stats.ttest_1samp(values.numpy(), 0, axis=1).pvalue)
    assert float((p - expected).abs().max()) < 0.06
    assert 0.02 < float((p <= 0.05).double().mean()) < 0.08
    assert float(sign_flip_p(normals(30) + 2.0, n_flips=999)) == pytest.approx(0.001)
    assert float(sign_flip_p(torch.zeros(40))) == 1.0


def test_correlations_are_those_of_scipy_ties_included() -> None:
    a, b = normals(50), normals(50, seed=1).round(decimals=0)
    assert pearson(a, b) == pytest.approx(scipy_stats.pearsonr(a.numpy(), b.numpy()).statistic)
    assert spearman(a, b) == pytest.approx(scipy_stats.spearmanr(a.numpy(), b.numpy()).statistic)
    assert ranks(torch.tensor([3.0, 1.0, 3.0, 0.0])).tolist() == [3.5, 2.0, 3.5, 1.0]
    assert spearman(a, a.exp()) == pytest.approx(1.0) and pearson(a, -2 * a + 1) == pytest.approx(-1.0)
    assert pearson(a, torch.ones(50)) != pearson(a, torch.ones(50))


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_list_of_examples_is_refused() -> None:
    with pytest.raises(ShapeError, match="expected examples in the last axis"):
        sign_flip_p(torch.zeros(3, 0))
    with pytest.raises(ShapeError, match="two lists of one length"):
        pearson(torch.zeros(3), torch.zeros(4))
    with pytest.raises(DataError, match="NaN among them"):
        spearman(torch.tensor([1.0, torch.nan]), torch.zeros(2))
