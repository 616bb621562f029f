"""Noise between seeds: the threshold against simulation and scipy's own t test, intervals against exact cases."""

import importlib
import math
from typing import Any

import pytest
import torch

from interp.core.errors import ConfigError, DataError
from interp.core.result import Result
from interp.evaluate.noise import ratio_interval, reseed_noise

stats: Any = importlib.import_module("scipy.stats")


def test_two_settings_that_are_the_same_differ_by_more_in_a_twentieth_of_cases() -> None:
    draw = torch.Generator().manual_seed(0)
    passed, n = 0, 1000
    for values in torch.randn(n, 2, 5, generator=draw, dtype=torch.float64).tolist():
        found = reseed_noise({"a": values[0], "b": values[1]})
        passed += abs(found.difference("a", "b")[0]) > found.smallest_difference
    # Binomial of 1000 at 0.05: a standard deviation is 0.0069.
    assert abs(passed / n - 0.05) < 3 * 0.0069


@pytest.mark.parametrize("shift", [0.3, 1.5])
def test_the_threshold_is_that_of_a_t_test_with_pooled_variance(shift: float) -> None:
    draw = torch.Generator().manual_seed(1)
    a, b = torch.randn(6, generator=draw).tolist(), (torch.randn(4, generator=draw) + shift).tolist()
    found = reseed_noise({"a": a, "b": b}, figure="fvu")
    gap, least = found.difference("a", "b")
    theirs = stats.ttest_ind(b, a)
    assert gap / least * stats.t.ppf(0.975, 8) == pytest.approx(theirs.statistic)
    low, high = stats.t.interval(0.95, 5, loc=found.mean[0], scale=stats.sem(a))
    assert found.intervals[0].tolist() == pytest.approx([low, high])
    assert found.n_seeds == 4 and found.dof == 8 and "only 4 seeds" in found.summary()


def test_moving_and_scaling_a_figure_moves_and_scales_what_is_found() -> None:
    values = {"a": [1.0, 1.2, 0.9], "b": [2.0, 2.5, 2.2]}
    plain = reseed_noise(values)
    moved = reseed_noise({k: [10 - 3 * v for v in vs] for k, vs in values.items()})
    assert moved.smallest_difference == pytest.approx(3 * plain.smallest_difference)
    assert moved.mean.tolist() == pytest.approx((10 - 3 * plain.mean).tolist())
    # By hand: sums of squares 0.0467 and 0.1267 on 4 degrees of freedom, t(0.975, 4) = 2.776.
    assert plain.pooled_sd == pytest.approx(math.sqrt((0.14 / 3 + 0.38 / 3) / 4))
    assert plain.smallest_difference == pytest.approx(2.776445 * plain.pooled_sd * math.sqrt(2 / 3))
    assert plain.cv[0] == pytest.approx(math.sqrt(0.14 / 6) / (3.1 / 3))


def test_one_seed_says_nothing_and_equal_seeds_are_pointed_out() -> None:
    one = reseed_noise([0.5])
    assert math.isnan(one.smallest_difference) and math.isnan(float(one.sd[0])) and "noise is unknown" in one.summary()
    same = reseed_noise([0.5] * 6)
    assert same.smallest_difference == 0 and "was the seed used" in same.summary()
    # A setting of one seed borrows the noise of the others.
    both = reseed_noise({"a": [1.0, 2.0, 3.0], "b": [4.0]})
    assert both.n_seeds == 1 and both.smallest_difference == pytest.approx(4.302653 * math.sqrt(2))


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_number_is_refused_by_name() -> None:
    for bad in (math.nan, math.inf):
        with pytest.raises(DataError, match=r"'b' has (nan|inf) for one of its seeds"):
            reseed_noise({"a": [1.0], "b": [1.0, bad]})
    with pytest.raises(DataError, match="'a' has no seed"):
        reseed_noise({"a": []})
    with pytest.raises(DataError, match="no setting"):
        reseed_noise({})
    with pytest.raises(ConfigError, match="no setting 'c'"):
        reseed_noise({"a": [1.0, 2.0]}).difference("a", "c")


def test_the_interval_of_a_ratio_holds_the_truth_in_95_of_100_cases() -> None:
    draw = torch.Generator().manual_seed(2)
    held = 0
    for _ in range(1000):
        whole = torch.rand(60, generator=draw, dtype=torch.float64) + 0.5
        part = whole * (0.3 + 0.2 * torch.randn(60, generator=draw, dtype=torch.float64))
        low, high = ratio_interval(part, whole)
        held += low <= 0.3 <= high
    assert abs(held / 1000 - 0.945) < 0.02
    assert all(math.isnan(end) for end in ratio_interval(torch.ones(1), torch.ones(1)))
    assert ratio_interval(torch.ones(3), torch.ones(3) * 2) == (0.5, 0.5)


def test_the_table_the_picture_and_the_folder_hold_it_all(tmp_path) -> None:  # type: ignore[no-untyped-def]
    found = reseed_noise({"a": [1.0, 2.0], "b": [1.0, 2.0, 4.0]}, figure="loss")
    frame = found.to_frame()
    assert frame["n"].tolist() == [2, 3] and frame["smallest_difference"].tolist() == [found.smallest_difference] * 2
    assert len(found.plot().data) == 2
    loaded = Result.load(found.save(tmp_path / "noise"))
    assert loaded.summary() == found.summary()
