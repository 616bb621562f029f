"""Streaming statistics against exact arithmetic, sorting by hand and `torch.cov`; and merging in any order."""

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import interp.data.accumulate as home
from interp.core.errors import ArtifactError, ConfigError, DataError, ShapeError, SiteError
from interp.core.result import Provenance, Result
from interp.core.site import Site
from interp.data import statistics
from interp.data.accumulate import Statistics
from interp.data.statistics import CLASSES, ActivationStatistics, SiteStatistics

FIGURES = ("mean", "variance", "skewness", "kurtosis")
EXACT = ("n", "n_bad", "peak", "peak_at", "top", "top_at", "counts", "rows")
Columns = dict[str, Tensor]


def columns(n: int, *, n_classes: int = 1) -> Columns:
    """Classes drawn at random; every row has a place of its own, in no order, and its token id is its number."""
    order = torch.randperm(n)
    return {
        "classes": torch.randint(0, n_classes, (n,)),
        "doc": order // 7,
        "pos": order % 7,
        "ids": torch.arange(n),
    }


def fed(x: Tensor, given: Columns, *, sizes: Sequence[int] = (), **options: Any) -> Statistics:
    """Statistics of rows that are added in parts of some sizes."""
    found = Statistics(x.shape[1], **{"n_classes": 1, **options})
    parts = [x.split(list(sizes) or len(x)), *(column.split(list(sizes) or len(x)) for column in given.values())]
    for rows, *more in zip(*parts, strict=True):
        found.add(rows, **dict(zip(given, more, strict=True)))
    return found


def read(found: Statistics, *classes: int) -> SiteStatistics:
    return SiteStatistics(found.state(), classes)


def exact(x: Tensor) -> dict[str, Tensor]:
    """Mean, variance, skewness and kurtosis of each dimension in rational arithmetic, rounded at the very end."""
    rows = []
    for values in x.double().T.tolist():
        numbers = [Fraction(value) for value in values]
        n = len(numbers)
        mean = sum(numbers, Fraction(0)) / n
        m2, m3, m4 = (sum(((v - mean) ** p for v in numbers), Fraction(0)) / n for p in (2, 3, 4))
        rows.append([float(mean), float(m2 * n / (n - 1)), float(m3) / float(m2) ** 1.5, float(m4 / m2**2)])
    return dict(zip(FIGURES, torch.tensor(rows, dtype=torch.float64).T, strict=True))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """What is counted or found is equal; moments agree to 1e-12 of their own scale."""
    for name in EXACT:
        assert torch.equal(a[name], b[name]), name
    sigma = (a["m2"] / a["n"].clamp_min(1)).sqrt()
    for power, name in ((2, "m2"), (3, "m3"), (4, "m4")):
        scale = a["n"] * sigma**power
        assert bool(((a[name] - b[name]).abs() <= 1e-12 * scale).all()), name
    torch.testing.assert_close(a["mean"], b["mean"], rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(a["comoment"], b["comoment"], rtol=1e-12, atol=1e-12 * float(a["comoment"].abs().amax()))


# -- moments ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1e6, -3e8])
@pytest.mark.parametrize("sizes", [(), (1, 1, 7, 100, 91), (150, 50)], ids=str)
def test_moments_are_those_of_exact_arithmetic_at_any_offset(offset: float, sizes: tuple[int, ...]) -> None:
    x = torch.randn(200, 3, dtype=torch.float64).exp() * torch.tensor([1.0, -1.0, 0.01]) + offset
    truth, found = exact(x), read(fed(x, columns(200), sizes=sizes))
    for name in FIGURES:
        torch.testing.assert_close(getattr(found, name), truth[name], rtol=1e-12, atol=0)


def test_raw_sums_would_fail_that_test() -> None:
    x = torch.randn(200, 1, dtype=torch.float64) + 1e6
    raw = ((x * x).mean() - x.mean() ** 2) * 200 / 199
    assert abs(float(raw / exact(x)["variance"]) - 1) > 1e-6


def test_a_coin_has_the_moments_of_the_textbook() -> None:
    x = torch.zeros(1000, 2)
    x[:100, 0] = x[:500, 1] = 1
    found, p = read(fed(x, columns(1000))), torch.tensor([0.1, 0.5], dtype=torch.float64)
    spread = p * (1 - p)
    torch.testing.assert_close(found.mean, p)
    torch.testing.assert_close(found.variance, spread * 1000 / 999)
    torch.testing.assert_close(found.skewness, (1 - 2 * p) / spread.sqrt())
    torch.testing.assert_close(found.kurtosis, (1 - 3 * spread) / spread)


def test_a_mean_that_wanders_far_from_where_it_began_keeps_its_digits() -> None:
    x = torch.cat([torch.full((1, 1), 5e9, dtype=torch.float64), torch.randn(300, 1, dtype=torch.float64) + 1e6])
    found, truth = read(fed(x, columns(301), sizes=[1] * 301)), exact(x)
    for name in FIGURES:
        torch.testing.assert_close(getattr(found, name), truth[name], rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_taken_up_before_anything_is_computed(dtype: torch.dtype) -> None:
    x, given = (100 + torch.randn(300, 4)).to(dtype), columns(300)
    assert all(torch.equal(v, fed(x.double(), given).state()[k]) for k, v in fed(x, given).state().items())


def test_the_covariance_is_that_of_torch_also_far_from_zero_and_after_merging() -> None:
    mixed = torch.randn(400, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64) + 1e6
    given = columns(400, n_classes=3)
    found = fed(mixed, given, sizes=(100, 299, 1), n_classes=3, covariance=True)
    for classes in [(0,), (1, 2), (0, 1, 2)]:
        rows = mixed[torch.isin(given["classes"], torch.tensor(classes))]
        got = read(found, *classes)
        torch.testing.assert_close(got.covariance, torch.cov((rows - 1e6).T), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(got.covariance.diagonal(), got.variance, rtol=1e-12, atol=0)
        assert torch.equal(got.covariance, got.covariance.T)


# -- merging ----------------------------------------------------------------------------------------------------------


def tied(n: int = 120, d: int = 6) -> tuple[Tensor, Columns]:
    """Values with many ties, some of them of one place and of both signs, some not finite."""
    x = torch.randint(-3, 4, (n, d)).double()
    x[torch.rand(n, d) < 0.05] = math.nan
    x[torch.rand(n, d) < 0.02] = -math.inf
    doc, pos = torch.randint(0, 9, (n,)), torch.randint(-1, 4, (n,))
    return x, {"classes": torch.randint(0, 3, (n,)), "doc": doc, "pos": pos, "ids": torch.randint(0, 3, (n,))}


@pytest.mark.parametrize("seed", range(8))
def test_any_split_merged_in_any_order_is_one_pass(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(seed)
    x, given = tied()
    options: dict[str, Any] = {"n_classes": 3, "top": 7, "covariance": True}
    whole = fed(x, given, **options)
    monkeypatch.setattr(home, "_CHUNK", 5 * x.shape[1])
    shuffled = torch.randperm(len(x))
    shards = [
        fed(x[rows], {name: column[rows] for name, column in given.items()}, **options)
        for rows in shuffled.tensor_split(sorted(torch.randint(0, len(x), (5,)).tolist()))
    ]
    while len(shards) > 1:
        into, other = (shards.pop(int(torch.randint(len(shards), ()))) for _ in range(2))
        into.merge(other)
        shards.append(into)
    same(whole.state(), shards[0].state())


def test_the_largest_are_those_of_sorting_by_magnitude_document_position_dimension() -> None:
    x, given = tied()
    found = fed(x, given, n_classes=3, top=7, sizes=(50, 70))
    for c in range(3):
        entries = [
            (-abs(v), int(given["doc"][i]), int(given["pos"][i]), j, int(given["ids"][i]), -v)
            for i in range(len(x))
            for j, v in enumerate(x[i].tolist())
            if int(given["classes"][i]) == c and math.isfinite(v)
        ]
        got, best = read(found, c), sorted(entries)[:7]
        assert got.top.tolist() == [-e[5] for e in best]
        assert got.top_at.tolist() == [[e[1], e[2], e[4], e[3]] for e in best]
        for dim in range(x.shape[1]):
            _, doc, pos, _, token, minus = min(e for e in entries if e[3] == dim)
            assert got.largest[dim] == -minus and got.largest_at[dim].tolist() == [doc, pos, token]


def test_what_is_not_finite_takes_no_place_among_zeros() -> None:
    x, given = torch.tensor([[math.nan, math.nan], [0.0, math.inf], [0.0, 0.0]]), columns(3)
    given |= {"doc": torch.arange(3)}
    for top, at in ((1, [[1, 0]]), (20, [[1, 0], [2, 0], [2, 1]])):
        got = read(fed(x, given, top=top, sizes=(1, 2)))
        assert got.top_at[:, [0, 3]].tolist() == at and got.top.tolist() == [0.0] * len(at)
        assert got.largest_at[:, 0].tolist() == [1, 2]
        whole = read(fed(x, given, top=top))
        assert torch.equal(whole.top_at, got.top_at) and torch.equal(whole.largest_at, got.largest_at)


def test_a_planted_maximum_is_found_with_its_sign_where_it_is() -> None:
    x, given = torch.randn(500, 8), columns(500, n_classes=3)
    x[123, 5] = -80.0
    place = [int(given[name][123]) for name in ("doc", "pos", "ids")]
    found = read(fed(x, given, n_classes=3))
    assert found.largest[5] == found.top[0] == -80
    assert found.largest_at[5].tolist() == place and found.top_at[0].tolist() == [*place, 5]
    assert len(found.top) == 20 and bool((found.top.abs().diff() <= 0).all())


def test_merging_leaves_the_other_alone_and_shares_no_memory_with_it() -> None:
    x, given = tied()
    other, mine = fed(x, given, n_classes=3, covariance=True), Statistics(6, covariance=True)
    before = {name: value.clone() for name, value in other.state().items()}
    mine.merge(other)
    same(mine.state(), before)
    mine.add(x, **given)
    mine.merge(mine)
    assert all(torch.equal(value, before[name]) for name, value in other.state().items())
    assert torch.equal(mine.state()["n"], 4 * before["n"]) and torch.equal(mine.state()["counts"], 4 * before["counts"])


def test_a_state_goes_through_a_file_and_on(tmp_path: Path) -> None:
    x, given = tied()
    halves = [{name: column[part] for name, column in given.items()} for part in (slice(60), slice(60, None))]
    for covariance in (False, True):
        first = fed(x[:60], halves[0], n_classes=3, covariance=covariance, relative_accuracy=0.05)
        save_file(first.state(), tmp_path / "part.safetensors")
        again = Statistics.from_state(load_file(tmp_path / "part.safetensors"))
        before = again.state()
        for found in (first, again):
            found.add(x[60:], **halves[1])
        third = Statistics.from_state(before)
        third.add(x, **given)
        assert torch.equal(before["counts"], load_file(tmp_path / "part.safetensors")["counts"])
        assert all(torch.equal(value, again.state()[name]) for name, value in first.state().items())


# -- quantiles --------------------------------------------------------------------------------------------------------

SHAPES = {
    "heavy tails": lambda n: torch.distributions.Cauchy(0.0, 1.0).sample((n, 3)),
    "one sign": lambda n: -(3 * torch.randn(n, 3)).exp(),
    "with zeros": lambda n: torch.randn(n, 3) * (torch.rand(n, 3) < 0.3),
    "constant": lambda n: torch.full((n, 3), 7.7),
    "whole range": lambda n: 10 ** (12 * torch.rand(n, 3) - 6) * torch.randn(n, 3).sign(),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("accuracy", [0.01, 0.1])
def test_every_quantile_is_within_the_accuracy_of_the_value_of_its_rank(shape: str, accuracy: float) -> None:
    x = SHAPES[shape](1001).double()
    found = read(fed(x, columns(1001), sizes=(1000, 1), relative_accuracy=accuracy))
    for q in (0.0, 0.001, 0.25, 0.5, 0.77, 0.99, 1.0):
        for magnitude in (False, True):
            values = (x.abs() if magnitude else x).clamp(-1e6, 1e6)
            values = values.masked_fill(values.abs() < 1e-6, 0)
            truth = values.sort(dim=0).values[math.floor(q * 1000)]
            got = found.quantile(q, magnitude=magnitude)
            assert bool(((got - truth).abs() <= accuracy * truth.abs() * (1 + 1e-9)).all()), (q, got, truth)
            pooled = values.flatten().sort().values[math.floor(q * 3002)]
            one = found.quantile(q, magnitude=magnitude, pooled=True)
            assert one.ndim == 0 and abs(one - pooled) <= accuracy * abs(pooled) * (1 + 1e-9)


def test_the_accuracy_is_not_much_better_than_promised() -> None:
    x = torch.linspace(1, 2, 5000).double()[:, None]
    found = read(fed(x, columns(5000), relative_accuracy=0.1))
    errors = [abs(float(found.quantile(i / 4999)) / float(x[i]) - 1) for i in range(0, 5000, 50)]
    assert 0.08 < max(errors) <= 0.1


def test_beyond_its_range_the_sketch_says_zero_or_its_last_bucket_and_the_extremes_stay_true() -> None:
    x = torch.tensor([[1e-9, 1e9], [-1e-9, -1e9], [1e-9, 1e9]], dtype=torch.float64)
    found = read(fed(x, columns(3)))
    low, high = found.quantile(0.0).tolist(), found.quantile(1.0).tolist()
    assert low[0] == high[0] == 0 and high[1] == -low[1] == pytest.approx(1e6, rel=0.03)
    assert found.largest.abs().tolist() == [1e-9, 1e9]


# -- what is left out -------------------------------------------------------------------------------------------------


def test_what_is_not_finite_is_counted_apart_and_in_nothing_else() -> None:
    x, given = torch.randn(300, 4, dtype=torch.float64), columns(300)
    x[7, 0] = math.nan
    x[[9, 11], 2] = torch.tensor([math.inf, -math.inf], dtype=torch.float64)
    x[:, 3] = math.nan
    found = read(fed(x, given, sizes=(8, 292), covariance=True))
    assert found.n_bad.tolist() == [1, 0, 2, 300] and found.n.tolist() == [299, 300, 298, 0]
    for dim in range(3):
        truth = exact(x[x[:, dim].isfinite(), dim : dim + 1])
        for name in FIGURES:
            torch.testing.assert_close(getattr(found, name)[dim : dim + 1], truth[name], rtol=1e-12, atol=1e-13)
    assert all(math.isnan(getattr(found, name)[3]) for name in (*FIGURES, "largest"))
    assert math.isnan(found.quantile(0.5)[3]) and found.largest_at[3].tolist() == [-1, -1, -1]
    assert bool(found.top.isfinite().all()) and 3 not in found.top_at[:, 3]
    assert bool(found.covariance.isnan().all()), "no row is finite throughout"
    three = read(fed(x[:, :3], given, covariance=True))
    torch.testing.assert_close(three.covariance, torch.cov(x[x[:, :3].isfinite().all(1), :3].T))


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_values_give_nan(n: int) -> None:
    found = fed(torch.ones(n, 2), columns(n), n_classes=3, covariance=True)
    for got in (read(found), read(found, 2), read(found, 1, 2)):
        seen = int(got.n[0])
        assert bool((got.mean.isnan() == (seen == 0)).all()) and bool(got.quantile(0.5).isnan().all()) == (seen == 0)
        assert all(bool(getattr(got, name).isnan().all()) for name in ("variance", "skewness", "kurtosis"))
        assert bool(got.covariance.isnan().all()) and len(got.top) == len(got.top_at) == 2 * seen


@pytest.mark.parametrize("value", [0.0, 0.1, -1e6 - 1 / 3, 1e200])
def test_what_never_varies_has_no_skewness(value: float) -> None:
    found = read(fed(torch.full((1000, 1), value, dtype=torch.float64), columns(1000), sizes=(1, 333, 666)))
    assert found.mean[0] == value and found.variance[0] < 1e-20
    assert bool(found.skewness.isnan().all()) and bool(found.kurtosis.isnan().all())


def test_classes_are_kept_apart_and_read_together() -> None:
    x, given = torch.randn(300, 2, dtype=torch.float64), columns(300, n_classes=3)
    state = fed(x, given, n_classes=3).state()
    found, before = SiteStatistics(state), {name: value.clone() for name, value in state.items()}
    for over, classes in {"special": [0], "delimiter": [1], "other": [2], "text": [1, 2], "all": [0, 1, 2]}.items():
        rows = x[torch.isin(given["classes"], torch.tensor(classes))]
        got = found.of(over)
        assert got.over == over and got.n.tolist() == [len(rows)] * 2
        torch.testing.assert_close(got.kurtosis, exact(rows)["kurtosis"], rtol=1e-12, atol=0)
        assert torch.equal(got.largest.abs(), rows.abs().amax(0))
    assert all(torch.equal(value, before[name]) for name, value in state.items()), "reading changes nothing"


# -- what it costs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("covariance", [False, True])
@pytest.mark.parametrize(("d", "n_classes", "top", "accuracy"), [(16, 3, 20, 0.01), (5, 1, 3, 0.05)])
def test_memory_is_what_the_docstring_says(d: int, n_classes: int, top: int, accuracy: float, covariance: bool) -> None:
    options: dict[str, Any] = {"n_classes": n_classes, "top": top, "relative_accuracy": accuracy}
    found = fed(torch.randn(99, d), columns(99), covariance=covariance, **options)
    s = math.log((1 + accuracy) / (1 - accuracy))
    buckets = 2 * (math.ceil(math.log(1e6) / s) - math.ceil(math.log(1e-6) / s) + 1) + 1
    assert accuracy != 0.01 or buckets == 2765
    expected = n_classes * (d * (4 * buckets + 88) + 40 * top + 8) + covariance * n_classes * (8 * d * d + 16 * d) + 8
    assert sum(value.numel() * value.element_size() for value in found.state().values()) == expected


def test_adding_never_reads_what_is_on_the_device() -> None:
    found = Statistics(16, covariance=True, n_classes=2)
    for _ in range(2):
        found.add(torch.randn(40, 16, device="meta"), **columns(40, n_classes=2))
    assert {value.device.type for name, value in found.state().items() if value.ndim} == {"meta"}
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(found.state()["n"].any())


# -- bad calls --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"d": 0}, {"n_classes": 0}, {"top": 0}], ids=str)
def test_sizes_below_one_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="≥ 1"):
        Statistics(options.pop("d", 4), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("accuracy", [0.0, 1.0, -0.1, math.nan])
def test_an_accuracy_that_is_no_share_is_refused(accuracy: float) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        Statistics(4, relative_accuracy=accuracy)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(5, 3)},
        {"x": torch.zeros(5)},
        {"x": torch.zeros(5, 4, dtype=torch.long)},
        {"doc": torch.zeros(4, dtype=torch.long)},
        {"ids": torch.zeros(5)},
    ],
    ids=lambda change: f"{next(iter(change))} {tuple(next(iter(change.values())).shape)}",
)
def test_tensors_that_do_not_fit_are_refused_before_anything_is_kept(change: Columns) -> None:
    found = Statistics(4)
    with pytest.raises(ShapeError, match=r"expected floats x \[n 4\]"):
        found.add(**{"x": torch.ones(5, 4), **columns(5), **change})
    assert not found.state()["n"].any()


@pytest.mark.parametrize("wrong", [-1, 3])
def test_a_class_that_is_not_there_is_refused(wrong: int) -> None:
    found = Statistics(2)
    with pytest.raises(DataError, match=rf"classes \[{wrong}\]: expected 0 … 2"):
        found.add(torch.ones(5, 2), **{**columns(5), "classes": torch.tensor([0, 1, 2, wrong, 0])})
    assert not found.state()["n"].any()


def test_more_rows_than_the_sketch_can_count_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(home, "_MOST_ROWS", 15)
    found = fed(torch.ones(10, 2), columns(10))
    for step in (lambda: found.add(torch.ones(6, 2), **columns(6)), lambda: found.merge(found)):
        with pytest.raises(DataError, match="counts to 15"):
            step()
    again = Statistics.from_state(found.state())
    with pytest.raises(DataError, match="16 rows"):
        again.add(torch.ones(6, 2), **columns(6))
    assert torch.equal(found.state()["counts"], again.state()["counts"])


@pytest.mark.parametrize(
    "other", [{"d": 5}, {"n_classes": 2}, {"top": 3}, {"relative_accuracy": 0.02}, {"covariance": True}], ids=str
)
def test_statistics_of_other_settings_are_not_merged(other: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="make both alike"):
        Statistics(4).merge(Statistics(**{"d": 4, **other}))


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state.pop("m3"),
        lambda state: state.update(m3=state["m3"][:, :1]),
        lambda state: state.update(counts=state["counts"].long()),
        lambda state: state.update(n=torch.zeros(())),
        lambda state: state.update(relative_accuracy=torch.tensor(0.02, dtype=torch.float64)),
    ],
)
def test_what_is_no_state_is_refused(damage: Any) -> None:
    state = Statistics(4).state()
    damage(state)
    with pytest.raises(ArtifactError, match="give what state"):
        Statistics.from_state(state)


def test_what_was_not_kept_or_is_not_there_is_an_error_that_says_so() -> None:
    found = read(Statistics(4))
    with pytest.raises(ConfigError, match="covariance=True"):
        _ = found.covariance
    with pytest.raises(ConfigError, match="'text'"):
        found.of("delimiters")
    with pytest.raises(ConfigError, match="1 classes"):
        read(Statistics(4, n_classes=1)).of("text")
    for q in (-0.1, 1.5, math.nan):
        with pytest.raises(ConfigError, match="from 0 to 1"):
            found.quantile(q)


# -- the result -------------------------------------------------------------------------------------------------------


def result() -> tuple[ActivationStatistics, Tensor, Columns]:
    x, given = torch.randn(60, 6), columns(60, n_classes=3)
    given["classes"][given["classes"] == 1] = 2  # no delimiters
    x[3, 4], x[5, 1] = -50, math.nan
    given["classes"][[3, 5]] = 2
    states = tuple(fed(part, given, n_classes=3).state() for part in (x, x[:, :4]))
    counts = tuple(given["classes"].bincount(minlength=3).tolist())
    made = ActivationStatistics(
        sites=("0.resid_post", "1.z"),
        shapes=((6,), (2, 2)),
        states=states,
        n_tokens=counts,
        delimiters=(4, 9),
        provenance=Provenance(model="tiny"),
    )
    return made, x, given


def test_a_result_is_found_by_any_name_of_its_site_without_special_tokens() -> None:
    made, _, given = result()
    for name in ("0.resid_post", "blocks.0.hook_resid_post", Site("0.resid_post"), ("resid_post", 0)):
        found = made[name]
        assert found.over == "text" and int(found.n[0]) == int((given["classes"] > 0).sum())
    assert made["1.z"].shape == (2, 2) and len(made["1.z"].mean) == 4
    assert made["0.resid_post"].largest[4] == -50
    with pytest.raises(SiteError, match=r"1\.resid_post was not measured.*0\.resid_post, 1\.z"):
        made["1.resid_post"]


def test_a_result_says_what_it_found_and_what_it_left_out() -> None:
    made, _, given = result()
    text = made.summary()
    doc, pos, token = (int(given[name][3]) for name in ("doc", "pos", "ids"))
    place = f"document {doc}, position {pos}, token {token}"
    assert f"at 0.resid_post, dimension 4 ({place})" in text and "other: largest |a| 50," in text
    assert "delimiter: " not in text and "0 delimiter" in text and "special: " in text
    assert "NaN or infinite are left out of everything: 1 in 0.resid_post, 1 in 1.z" in text


def test_a_result_comes_back_from_disk_and_lays_itself_out_as_a_table(tmp_path: Path) -> None:
    made, x, given = result()
    again = Result.load(made.save(tmp_path / "r"))
    assert isinstance(again, ActivationStatistics) and again.summary() == made.summary()
    frame = again.to_frame()
    assert len(frame) == (6 + 4) * len(CLASSES) and set(frame["class"]) == set(CLASSES)
    row = frame[(frame.site == "0.resid_post") & (frame["class"] == "other") & (frame.dim == 4)].iloc[0]
    rows = x[given["classes"] == 2, 4].double()
    assert row.n == len(rows) and row["mean"] == pytest.approx(float(rows.mean())) and row.largest == -50
    assert (row.doc, row.pos, row.id) == tuple(int(given[c][3]) for c in ("doc", "pos", "ids"))
    assert bool(frame[frame["class"] == "delimiter"]["mean"].isna().all())


def test_the_figure_has_a_line_for_each_class_and_one_for_the_median() -> None:
    made, x, _ = result()
    lines = {trace.name: list(trace.y) for trace in made.plot().data}
    assert list(lines) == [*(f"largest |a|, {name}" for name in CLASSES), "median |a|, text"]
    assert lines["largest |a|, other"][0] == 50 and math.isnan(lines["largest |a|, delimiter"][0])
    assert lines["median |a|, text"][0] == pytest.approx(float(x.abs().nanmedian()), rel=0.3)


class Pieces:
    """A tokenizer that decodes what it is made of."""

    def __init__(self, pieces: Sequence[str]) -> None:
        self.pieces = pieces

    def get_vocab(self) -> dict[str, int]:
        return {f"{i}": i for i in reversed(range(len(self.pieces)))}

    def convert_ids_to_tokens(self, i: int) -> str:
        return self.pieces[i]

    def decode(self, ids: list[int]) -> str:
        return self.pieces[ids[0]]


def test_delimiters_are_known_by_their_text() -> None:
    yes = [".", " ,", "; ", ":", "!", " ?", "\n", "\n\n", " \r\n", ".\n"]
    no = ["a", "...", ".,", " ", "", "\t", "a.", "-", "\na", "'", "。"]
    assert statistics._delimiters(Pieces(no + yes)) == list(range(len(no), len(no) + len(yes)))
