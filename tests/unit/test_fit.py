"""Linear fits against scipy and the formulas written out: batches, scales, offsets, few examples, separable ones."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from interp.core.errors import DataError, ShapeError
from interp.core.fit import Linear, auroc, lda, ledoit_wolf, logistic, mass_mean, principal


def examples(n: int, d: int, seed: int = 0, *fit: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    y = torch.rand(*fit, n, generator=draw) > 0.6
    y[..., 0], y[..., 1] = True, False
    mixing = torch.randn(d, d, generator=draw)
    return torch.randn(*fit, n, d, generator=draw) @ mixing + 0.7 * y[..., None] * torch.randn(d, generator=draw), y


def by_scipy(x: Tensor, y: Tensor, l2: float, c: Tensor) -> Linear:
    """The objective written out, minimised by L-BFGS."""
    x, sign = x.double(), torch.where(y, 1.0, -1.0).double()
    mean = (c[:, None] * x).sum(0) / c.sum()
    scale = ((c[:, None] * (x - mean) ** 2).sum() / (c.sum() * x.shape[1])).sqrt()
    z = (x - mean) / scale

    def loss(flat: Any) -> tuple[float, Any]:
        w = torch.tensor(flat, requires_grad=True)
        value = (c * torch.nn.functional.softplus(-sign * (z @ w[:-1] + w[-1]))).sum() + l2 / 2 * w[:-1] @ w[:-1]
        (gradient,) = torch.autograd.grad(value, w)
        return float(value.detach()), gradient.numpy()

    start = torch.zeros(x.shape[1] + 1, dtype=torch.float64).numpy()
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 5000, "ftol": 1e-15, "gtol": 1e-9})
    w = torch.tensor(found.x)
    weight = w[:-1] / scale
    return Linear(weight, w[-1] - weight @ mean)


def same(a: Linear, b: Linear, x: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a.scores(x), b.scores(x), atol=atol, rtol=atol)


@pytest.mark.parametrize(("n", "d"), [(60, 5), (20, 40), (30, 30)])
@pytest.mark.parametrize("balanced", [True, False])
def test_logistic_finds_the_optimum_that_scipy_finds(n: int, d: int, balanced: bool) -> None:
    x, y = examples(n, d)
    c = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    given = c.clone()
    if balanced:
        half = c.sum() / 2
        given = torch.where(y, c * half / c[y].sum(), c * half / c[~y].sum())
    same(logistic(x, y, l2=0.3, balanced=balanced, weights=c), by_scipy(x, y, 0.3, given), x, 1e-4)


@pytest.mark.parametrize("fit", [logistic, lda, mass_mean])
@pytest.mark.parametrize(("n", "d"), [(50, 6), (12, 30)])
def test_a_batch_of_fits_is_each_of_them(fit: Callable[..., Linear], n: int, d: int) -> None:
    x, y = examples(n, d, 2, 3)
    many = fit(x, y)
    assert many.weight.shape == (3, d) and many.bias.shape == (3,)
    for i in range(3):
        one = fit(x[i], y[i])
        torch.testing.assert_close(many.weight[i], one.weight, atol=1e-8, rtol=1e-6)
        torch.testing.assert_close(many.bias[i], one.bias, atol=1e-8, rtol=1e-6)
    shared = fit(x, y[0])  # one list of labels for all
    torch.testing.assert_close(shared.weight[0], many.weight[0], atol=1e-8, rtol=1e-6)


def test_repeated_examples_are_weights() -> None:
    x, y = examples(30, 4)
    times = torch.randint(0, 4, (30,), generator=torch.Generator().manual_seed(3))
    times[:2] = 1
    rows = torch.arange(30).repeat_interleave(times)
    for balanced in (True, False):
        weighted = logistic(x, y, weights=times.double(), balanced=balanced)
        same(weighted, logistic(x[rows], y[rows], balanced=balanced), x, 1e-7)
    assert float((weighted.weight - logistic(x, y).weight).abs().max()) > 1e-3


@pytest.mark.parametrize("fit", [logistic, lda, mass_mean])
@pytest.mark.parametrize("n", [40, 8])
def test_scores_do_not_change_with_units_offset_or_basis(fit: Callable[..., Linear], n: int) -> None:
    x, y = examples(n, 10)
    x = x.double()
    turn = torch.linalg.qr(torch.randn(10, 10, dtype=torch.float64))[0]
    plain = fit(x, y).scores(x)
    for other in (x * 1e4, x * 1e-4, x + 1e3, x @ turn):
        moved = fit(other, y)
        torch.testing.assert_close(moved.scores(other), plain, atol=1e-5, rtol=1e-5)


def test_separable_classes_and_tiny_penalties_have_an_optimum_that_is_reached() -> None:
    x = torch.tensor([[-1.0, 0.3], [-2.0, -0.1], [1.0, 0.2], [2.0, -0.2]])
    y = torch.tensor([False, False, True, True])
    for l2 in (1.0, 1e-3, 1e-6):
        found = logistic(x, y, l2=l2)
        margins = torch.where(y, 1.0, -1.0) * found.scores(x)
        assert bool((margins > 0).all()) and bool(found.weight.isfinite().all())
        # The optimum's own condition: the penalty's pull is that of the examples.
        scale = (x.double() - x.double().mean(0)).square().mean().sqrt()
        pull = (torch.sigmoid(-margins) * torch.where(y, 1.0, -1.0))[:, None] * (x.double() - x.double().mean(0))
        torch.testing.assert_close(l2 * found.weight * scale**2, pull.sum(0), atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("fit", [logistic, lda, mass_mean])
def test_half_precision_is_read_in_double(fit: Callable[..., Linear]) -> None:
    x, y = examples(40, 6)
    low = x.bfloat16()
    torch.testing.assert_close(fit(low, y).weight, fit(low.double(), y).weight)
    assert fit(low, y).weight.dtype == torch.float64


def test_lda_is_the_inverse_of_the_shrunk_covariance_times_the_difference() -> None:
    for n, d in ((40, 6), (7, 20)):
        x, y = examples(n, d)
        x = x.double()
        one, zero = x[y].mean(0), x[~y].mean(0)
        within = torch.where(y[:, None], x - one, x - zero)
        cov = within.T @ within / n
        for s in (0.2, 1.0):
            shrunk = (1 - s) * cov + s * cov.trace() / d * torch.eye(d, dtype=torch.float64)
            found = lda(x, y, shrinkage=s)
            torch.testing.assert_close(found.weight, torch.linalg.inv(shrunk) @ (one - zero), atol=1e-8, rtol=1e-6)
            assert float(found.scores((one + zero)[None] / 2).abs()) < 1e-8
        share = ledoit_wolf(within)
        torch.testing.assert_close(lda(x, y).weight, lda(x, y, shrinkage=float(share)).weight, atol=1e-8, rtol=1e-6)


def test_ledoit_wolf_is_its_formula_and_knows_much_from_little_data() -> None:
    for n, d in ((50, 5), (6, 12)):
        x = examples(n, d)[0].double()
        x = x - x.mean(0)
        cov, eye = x.T @ x / n, torch.eye(d, dtype=torch.float64)
        m = cov.trace() / d
        far = ((cov - m * eye) ** 2).sum()
        noise = sum(((row.outer(row) - cov) ** 2).sum() for row in x) / n**2
        torch.testing.assert_close(ledoit_wolf(x), torch.minimum(noise, far) / far)
    draw = torch.Generator().manual_seed(0)
    long = torch.randn(4000, 4, generator=draw) * torch.tensor([1.0, 2.0, 4.0, 8.0])
    assert float(ledoit_wolf(long)) < 0.01 < 0.2 < float(ledoit_wolf(torch.randn(10, 50, generator=draw)))
    assert float(ledoit_wolf(torch.eye(3))) == 1.0  # round already: nothing to tell apart


def test_mass_mean_is_the_pseudo_inverse_times_the_difference() -> None:
    for n, d in ((40, 6), (7, 20)):
        x, y = examples(n, d)
        x = x.double()
        one, zero = x[y].mean(0), x[~y].mean(0)
        within = torch.where(y[:, None], x - one, x - zero)
        inverse = torch.linalg.pinv(within.T @ within / n, hermitian=True, rtol=1e-9)
        torch.testing.assert_close(mass_mean(x, y).weight, inverse @ (one - zero), atol=1e-7, rtol=1e-5)


def test_classes_of_one_covariance_are_told_apart_by_the_optimal_direction() -> None:
    draw = torch.Generator().manual_seed(5)
    spread = torch.tensor([20.0, 1.0, 0.5, 2.0], dtype=torch.float64)
    gap = torch.tensor([3.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    y = torch.arange(4000) % 2 == 0
    x = torch.randn(4000, 4, generator=draw, dtype=torch.float64) * spread + y[:, None] * gap
    best = gap / spread**2
    for fit in (lda, mass_mean, logistic):
        w = fit(x, y).weight
        assert float(torch.cosine_similarity(w, best, dim=0)) > 0.99
    assert float(torch.cosine_similarity(gap, best, dim=0)) < 0.8  # the difference of means alone is not it


def test_principal_is_the_first_right_singular_vector() -> None:
    for n, d in ((30, 6), (5, 20)):
        x = examples(n, d, 1)[0] + 3.0
        v, share = principal(x)
        _, values, right = torch.linalg.svd(x.double(), full_matrices=False)
        assert abs(float(v @ right[0])) == pytest.approx(1.0, abs=1e-10)
        assert float(share) == pytest.approx(float(values[0] ** 2 / values.square().sum()))
    many, shares = principal(torch.stack([x, 2 * x]))
    assert many.shape == (2, 20) and float(shares[0]) == pytest.approx(float(shares[1]))


def test_auroc_counts_pairs_and_ties_as_half() -> None:
    draw = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 5, (2, 40), generator=draw).float()
    truth = torch.rand(40, generator=draw) > 0.5
    found = auroc(scores, truth)
    for row, value in zip(scores, found, strict=True):
        a, b = row[truth][:, None], row[~truth][None]
        assert float(value) == pytest.approx(float(((a > b).float() + 0.5 * (a == b).float()).mean()))
    assert math.isnan(float(auroc(scores[0], torch.ones(40, dtype=torch.bool))))


@pytest.mark.usefixtures("unchecked")
def test_bad_data_is_refused_by_name() -> None:
    x, y = examples(10, 3)
    for fit in (logistic, lda, mass_mean):
        with pytest.raises(ShapeError, match="do not line up"):
            fit(x, y[:4])
        with pytest.raises(DataError, match="one class alone"):
            fit(x, torch.ones(10, dtype=torch.bool))
        with pytest.raises(DataError, match="NaN or infinity"):
            fit(x / 0, y)
    with pytest.raises(DataError, match="l2=0"):
        logistic(x, y, l2=0.0)
    with pytest.raises(DataError, match="shrinkage=0"):
        lda(x, y, shrinkage=0.0)
    for fit in (lda, mass_mean):
        with pytest.raises(DataError, match="no variance"):
            fit(y[:, None].float() * torch.ones(1, 3), y)
    with pytest.raises(DataError, match="all zero"):
        principal(torch.zeros(3, 4))
    with pytest.raises(DataError, match="NaN"):
        auroc(torch.tensor([0.0, math.nan]), torch.tensor([True, False]))
