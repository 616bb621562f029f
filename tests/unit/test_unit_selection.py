"""Choosing units: planted ones among many and dead ones, swaps against every set there is, rankings against scipy."""

import itertools

import pytest
import torch
from scipy import stats as scipy_stats
from torch import Tensor

from interp.core.errors import ConfigError, DataError
from interp.probing.selection import (
    RANKINGS,
    SEARCHES,
    Standard,
    choose_units,
    rank_units,
    refit,
    set_losses,
    swap_search,
)

PLANTED, DEAD = [17, 240, 433], list(range(50, 100))


def neurons(n: int = 400, d: int = 500, *, seed: int = 0, gap: float = 1.2) -> tuple[Tensor, Tensor]:
    """Normal units, three of which fire more for the class, and fifty that hold 0 or another number always."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 2 == 1
    x = torch.randn(n, d, generator=draw)
    x[:, PLANTED] += gap * y[:, None]
    x[:, DEAD] = torch.arange(50.0) * 3
    return x, y


@pytest.mark.parametrize("method", sorted(set(RANKINGS) - {"random"}))
@pytest.mark.parametrize("search", SEARCHES)
def test_three_planted_units_of_five_hundred_are_found_and_dead_ones_never_chosen(method: str, search: str) -> None:
    x, y = neurons()
    score = rank_units(x, y, method=method)
    assert bool((score[DEAD] == -torch.inf).all()) and bool(
        score[~torch.isin(torch.arange(500), torch.tensor(DEAD))].isfinite().all()
    )
    (found,) = choose_units(Standard.of(x).x, y, [3], score, search=search, prefilter=12)
    assert sorted(found.tolist()) == PLANTED
    (everything,) = choose_units(Standard.of(x).x, y, [500], score, search="ranked")
    assert len(everything) == 450 and not set(everything.tolist()) & set(DEAD)


def test_a_unit_that_is_wide_comes_before_one_that_tells_only_by_the_difference_of_means() -> None:
    draw = torch.Generator().manual_seed(3)
    y = torch.arange(600) % 2 == 1
    x = torch.randn(600, 6, generator=draw) * 0.1
    x[:, 4] += 0.5 * y
    x[:, 1] = 40 * torch.randn(600, generator=draw) + 4 * y
    assert int(rank_units(x, y).argmax()) == 1
    assert all(int(rank_units(x, y, method=m).argmax()) == 4 for m in ("f", "mutual_information", "l1", "logistic"))


def test_f_is_that_of_scipy_and_information_that_of_its_table() -> None:
    x, y = torch.randn(200, 5), torch.arange(200) % 3 == 0
    x[:, 2] += 0.7 * y
    f = rank_units(x, y, method="f")
    expected = scipy_stats.f_oneway(x[y].numpy(), x[~y].numpy()).statistic
    torch.testing.assert_close(f, torch.tensor(expected, dtype=torch.float64), atol=1e-4, rtol=1e-4)
    told = torch.stack([y.float(), torch.ones(200), (torch.arange(200) % 2).float()], 1)
    share = float(y.double().mean())
    whole = -share * torch.tensor(share).log() - (1 - share) * torch.tensor(1 - share).log()
    information = rank_units(told, y, method="mutual_information")
    assert information[0] == pytest.approx(float(whole), abs=1e-6) and information[1] == -torch.inf
    assert abs(float(information[2])) < 0.01


@pytest.mark.parametrize("seed", range(4))
def test_swaps_end_at_the_best_of_all_sets(seed: int) -> None:
    """Two units tell only together: either alone is worth little, so a ranking misses them."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.arange(160) % 2 == 1
    x = torch.randn(160, 9, generator=draw)
    x[:, :4] += 0.5 * y[:, None]
    common = 4 * torch.randn(160, generator=draw)
    x[:, 6] += common + 1.0 * y
    x[:, 7] += common - 1.0 * y
    standard, pool = Standard.of(x).x, torch.arange(9)
    for k in (1, 2, 3):
        sets = torch.tensor(list(itertools.combinations(range(9), k)))
        losses = set_losses(standard, y, sets)
        score = rank_units(x, y, method="f")
        (found,) = choose_units(standard, y, [*range(1, k + 1)], score, search="swap", prefilter=9)[-1:]
        assert sorted(found.tolist()) == sets[int(losses.argmin())].tolist()
        start = torch.arange(k)
        _, loss = swap_search(standard, y, start, pool)
        assert float(losses.min()) - 1e-9 <= loss <= float(set_losses(standard, y, start[None])[0])
    ranked = choose_units(standard, y, [2], rank_units(x, y, method="f"))[0]
    assert sorted(found.tolist())[-2:] == [6, 7] and set(ranked.tolist()) != {6, 7}


def test_a_refit_is_the_optimum_of_its_own_units_alone() -> None:
    x, y = neurons(n=120)
    standard = Standard.of(x[:, :40]).x
    sets = torch.tensor([[3, 17, 8], [1, 2, 39]])
    both = refit(standard, y, sets, l2=2.0)
    for i, units in enumerate(sets):
        alone = refit(standard[:, units], y, torch.arange(3)[None], l2=2.0)
        torch.testing.assert_close(both.weight[i], alone.weight[0], atol=1e-7, rtol=1e-6)
    loss = set_losses(standard, y, sets, l2=2.0)
    scores = (standard[:, sets[0]] * both.weight[0]).sum(1) + both.bias[0]
    by_hand = torch.nn.functional.softplus(-scores * (2.0 * y - 1)).mean()
    assert float(loss[0]) == pytest.approx(float(by_hand))


def test_standard_units_have_variance_one_and_dead_ones_are_nothing() -> None:
    x, _ = neurons()
    standard = Standard.of(x)
    assert int((~standard.alive).sum()) == 50 and bool((standard.x[:, DEAD] == 0).all())
    torch.testing.assert_close(standard.x.square().mean(0)[PLANTED], torch.ones(3).double())
    torch.testing.assert_close(standard.again(x), standard.x)
    with_noise = x.clone()
    with_noise[:, DEAD] *= 1 + 1e-7 * torch.randn(400, 50)
    assert int((~Standard.of(with_noise).alive).sum()) == 50  # rounding is no life


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_ranked_or_searched_is_refused() -> None:
    x, y = neurons(n=40, d=500)
    with pytest.raises(ConfigError, match="did you mean 'mutual_information'"):
        rank_units(x, y, method="mutual_info")
    with pytest.raises(DataError, match="both classes"):
        rank_units(x, torch.ones(40, dtype=torch.bool))
    with pytest.raises(ConfigError, match="did you mean 'swap'"):
        choose_units(x, y, [1], torch.ones(500), search="swaps")
    with pytest.raises(DataError, match="no unit changes"):
        choose_units(x, y, [1], torch.full((500,), -torch.inf))
