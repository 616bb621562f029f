"""Maps of features: closed forms on distributions that are known, an oracle by hand, and the edit that applies them."""

import pytest
import torch
from torch import Tensor

from interp.core.errors import ConfigError, DataError, ShapeError
from interp.core.fit import auroc
from interp.core.frame import Frame
from interp.core.place import Place
from interp.core.site import Site
from interp.core.where import Where
from interp.core.within import AffineWithin
from interp.steering.trained.maps import FeatureMaps, coupling, fit_maps, gap, separation


def normals(n: int, mean: Tensor, std: Tensor, seed: int) -> Tensor:
    """n draws a feature."""
    return mean + std * torch.randn(n, len(mean), generator=torch.Generator().manual_seed(seed))


MEANS, STDS = torch.tensor([0.0, 3.0, -2.0, 40.0]), torch.tensor([1.0, 0.2, 5.0, 0.5])
OTHER_MEANS, OTHER_STDS = torch.tensor([1.0, 3.0, 2.0, -40.0]), torch.tensor([2.0, 0.2, 0.5, 3.0])


@pytest.mark.parametrize(("n", "m"), [(6000, 6000), (6000, 4500)])
@pytest.mark.parametrize("kind", ["linear", "gaussian"])
def test_normal_features_get_the_map_between_normals(kind: str, n: int, m: int) -> None:
    x, y = normals(n, MEANS, STDS, 0), normals(m, OTHER_MEANS, OTHER_STDS, 1)
    maps = fit_maps(x, y, kind=kind)
    factor = OTHER_STDS / STDS
    torch.testing.assert_close(maps.factor.float(), factor, rtol=0.04, atol=0)
    # How well a line is known at x = 0, far from where the data is.
    known = 6 * OTHER_STDS * (1 / n + 1 / m) ** 0.5 + 0.04 * factor * MEANS.abs()
    assert bool(((maps.shift - (OTHER_MEANS - factor * MEANS)).abs() < known).all())
    moved = maps(x.double())
    torch.testing.assert_close(moved.mean(0).float(), y.mean(0), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(moved.std(0).float(), y.std(0), rtol=0.01, atol=0)
    assert gap(moved, y) < 0.1 < 1 < gap(x, y)


def test_a_null_map_is_the_identity() -> None:
    x = normals(300, MEANS, STDS, 0)
    for kind in ("linear", "mean", "gaussian"):
        maps = fit_maps(x, x[torch.randperm(300)], kind=kind)
        torch.testing.assert_close(maps.factor, torch.ones(4).double())
        assert float(maps.shift.abs().max()) < 1e-9
    assert torch.equal(fit_maps(x, x, kind="aura").factor, torch.ones(4).double())


def test_two_humps_get_the_least_squares_line_through_their_sorted_values() -> None:
    # Source at ±1 with shares ½, target at 0 (¼), 1 (½) and 8 (¼): in order, −1 goes to 0 and 1, 1 to 1 and 8.
    x = torch.tensor([-1.0, 1.0]).repeat(20)[:, None]
    y = torch.tensor([0.0, 1.0, 1.0, 8.0]).repeat(10)[:, None]
    maps = fit_maps(x, y, kind="linear")
    # At −1 the mean is ½ and at 1 it is 4½: the line through both.
    torch.testing.assert_close(maps.factor, torch.tensor([2.0]).double())
    torch.testing.assert_close(maps.shift, torch.tensor([2.5]).double())
    # Two means and two standard deviations say something else.
    assert not torch.allclose(fit_maps(x, y, kind="gaussian").factor, maps.factor, rtol=0.1)


@pytest.mark.parametrize(("n", "m"), [(12, 12), (6, 4), (1, 7), (5, 3)])
def test_a_coupling_moves_every_share_in_order(n: int, m: int) -> None:
    found = coupling(n, m)
    plan = torch.zeros(n, m).double().index_put((found.i, found.j), found.weight, accumulate=True)
    torch.testing.assert_close(plan.sum(1), torch.full((n,), 1 / n).double())
    torch.testing.assert_close(plan.sum(0), torch.full((m,), 1 / m).double())
    assert bool((found.i.diff() >= 0).all()) and bool((found.j.diff() >= 0).all())
    # The same as repeating each number until both sides have as many.
    x, y = torch.randn(n, 2).double(), torch.randn(m, 2).double()
    if min(n, m) > 1:
        one = fit_maps(x, y, kind="linear")
        other = fit_maps(x.repeat(m, 1), y.repeat(n, 1), kind="linear")
        torch.testing.assert_close(one.factor, other.factor)
        torch.testing.assert_close(one.shift, other.shift)


def test_the_line_is_the_one_that_a_solver_finds() -> None:
    x, y = torch.rand(50, 1).double(), torch.randn(50, 1).abs().double()
    maps = fit_maps(x, y, kind="linear")
    design = torch.cat([x.sort(0).values, torch.ones(50, 1).double()], 1)
    solved = torch.linalg.lstsq(design, y.sort(0).values).solution[:, 0]
    torch.testing.assert_close(torch.stack([maps.factor[0], maps.shift[0]]), solved)
    # In the order of the examples it would be another line, which says nothing.
    unsorted = torch.linalg.lstsq(torch.cat([x, torch.ones(50, 1).double()], 1), y).solution[:, 0]
    assert float(solved[0]) > 1 > float(unsorted[0].abs())


def test_aura_dampens_by_how_well_a_feature_tells_the_source() -> None:
    x = torch.tensor([[3.0, 0.0, 1.0], [4.0, 1.0, 1.0]])
    y = torch.tensor([[1.0, 2.0, 1.0], [3.0, 3.0, 1.0]])
    # Pairs won of 4: 3 and a tie; none; all ties.
    torch.testing.assert_close(separation(x, y), torch.tensor([0.875, 0.0, 0.5]).double())
    maps = fit_maps(x, y, kind="aura")
    torch.testing.assert_close(maps.factor, torch.tensor([0.25, 1.0, 1.0]).double())
    assert not bool(maps.shift.any())
    x, y = torch.randn(30, 5).round(decimals=1), torch.randn(40, 5).round(decimals=1)
    truth = torch.tensor([True] * 30 + [False] * 40).expand(5, -1)
    torch.testing.assert_close(separation(x, y), auroc(torch.cat([x, y]).T, truth))


def test_constant_features_are_left_alone() -> None:
    x = torch.cat([torch.full((10, 1), 7.0), torch.randn(10, 1)], 1)
    x[0, 0] = torch.nextafter(torch.tensor(7.0), torch.tensor(8.0))  # what rounding leaves
    y = torch.randn(8, 2)
    for kind in ("linear", "gaussian"):
        maps = fit_maps(x, y, kind=kind)
        assert float(maps.factor[0]) == 1 and float(maps.shift[0]) == 0 and float(maps.factor[1]) != 1
    assert float(fit_maps(x, y, kind="mean").shift[0]) == pytest.approx(float(y[:, 0].mean()) - 7, abs=1e-5)


def test_a_map_stops_where_the_source_was_never_seen() -> None:
    x, y = torch.linspace(-1, 1, 11)[:, None], torch.linspace(4, 8, 11)[:, None]
    maps = fit_maps(x, y, kind="linear")
    asked = torch.tensor([[-1.01], [-1.0], [0.0], [1.0], [1.01]]).double()
    torch.testing.assert_close(maps(asked)[:, 0], torch.tensor([-1.01, 4.0, 6.0, 8.0, 1.01]).double())
    inner = fit_maps(x, y, kind="linear", support=(0.25, 0.75))
    assert inner.low is not None and inner.high is not None
    assert torch.cat([inner.low, inner.high]).tolist() == pytest.approx([-0.501, 0.501], abs=2e-5)
    other = fit_maps(x, y, kind="linear", support=(0.13, 1.0)).low
    assert other is not None
    torch.testing.assert_close(other, torch.quantile(x.double(), 0.13, dim=0), atol=2e-3, rtol=0)
    everywhere = fit_maps(x, y, kind="linear", support=None)
    assert everywhere.low is None and float(everywhere(torch.tensor([[2.0]]).double())) == pytest.approx(10.0)
    assert fit_maps(x, y, kind="mean").low is None


def placed(batch: int, pos: int, where: Where | None = None) -> Place:
    frame = Frame(ids=None, mask=None, batch=batch, length=pos, prompt_length=pos)
    return Place(Site("0.resid_post"), frame, where or Where())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_edit_maps_inside_its_range_by_a_share(dtype: torch.dtype) -> None:
    x = torch.randn(3, 4, 5).to(dtype)
    factor, shift, low, high = torch.rand(5) + 0.5, torch.randn(5), torch.full((5,), -0.8), torch.full((5,), 0.9)
    maps = FeatureMaps(factor, shift, low, high)
    whole = AffineWithin("0.resid_post", factor, shift, low, high).edit(x, placed(3, 4))
    mapped = maps(x.float().flatten(0, 1)).reshape(x.shape)
    assert torch.equal(whole, mapped.to(dtype))
    half = AffineWithin("0.resid_post", factor, shift, low, high, strength=0.5).edit(x, placed(3, 4))
    torch.testing.assert_close(half.float(), (x.float() + mapped) / 2, atol=2e-2, rtol=1e-2)
    none = AffineWithin("0.resid_post", factor, shift, low, high, strength=0.0)
    assert torch.equal(none.edit(x, placed(3, 4)), x) and none.may_do_nothing
    shares = torch.tensor([0.0, 0.5, 1.0])
    rows = AffineWithin("0.resid_post", factor, shift, low, high, strength=shares).edit(x, placed(3, 4))
    for row, alone in enumerate((x, half, whole)):
        assert torch.equal(rows[row], alone[row])


@pytest.mark.usefixtures("unchecked")
def test_what_is_wrong_is_refused() -> None:
    x = torch.randn(4, 2)
    with pytest.raises(ConfigError, match="did you mean 'linear'"):
        fit_maps(x, x, kind="liner")
    with pytest.raises(ConfigError, match="two quantiles"):
        fit_maps(x, x, kind="linear", support=(0.9, 0.1))
    with pytest.raises(DataError, match="1 source and 4 target"):
        fit_maps(x[:1], x, kind="linear")
    with pytest.raises(ShapeError, match=r"\[n d\] and \[m d\]"):
        fit_maps(x, x[:, :1], kind="mean")
    with pytest.raises(ShapeError, match="low"):
        AffineWithin("0.resid_post", torch.ones(3), torch.zeros(3), low=torch.zeros(2))
    with pytest.raises(ShapeError, match="NaN"):
        AffineWithin("0.resid_post", torch.ones(3), torch.full((3,), torch.nan))
    with pytest.raises(ShapeError, match="finite"):
        AffineWithin("0.resid_post", torch.ones(3), torch.zeros(3), strength=float("inf"))
