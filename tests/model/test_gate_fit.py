"""Fitting a gate: planted thresholds are found, a shuffled condition is not, and the gate scores as its fit did."""

import pytest
import torch

from interp.core.conditional import Gated
from interp.core.errors import ConfigError, DataError
from interp.core.fit import auroc
from interp.core.gate import Gate
from interp.core.intervention import Add
from interp.core.manager import HookManager
from interp.core.where import Where
from interp.data.contrast import Contrast
from interp.steering.acting.gate import GateFit, best_threshold, fit_gate, roc
from interp.steering.fitting.fit import fit_direction
from interp.steering.fitting.measure import measure_direction
from interp.testbed.tasks import task_pairs

GOOD = (
    *("wonderful", "excellent", "lovely", "great", "perfect", "charming"),
    *("brilliant", "delightful", "superb", "pleasant"),
)
SITES = ["0.resid_post", "2.resid_post", "3.resid_post"]


@pytest.fixture(scope="module")
def hm() -> HookManager:
    return HookManager.load("testbed")


@pytest.fixture(scope="module")
def data() -> Contrast:
    return Contrast.of_pairs(
        task_pairs("sentiment", 40), positive=lambda pair: any(word in pair.clean.text for word in GOOD)
    )


def test_the_best_threshold_is_that_of_a_search_over_all() -> None:
    draw = torch.Generator().manual_seed(0)
    for n in (2, 3, 10, 57):
        scores = torch.randn(n, generator=draw).mul(4).round() / 4  # with ties
        truth = torch.rand(n, generator=draw) < 0.4
        truth[0], truth[1] = True, False
        at, f1 = best_threshold(scores, truth)
        tried = [float(v) + e for v in scores for e in (-0.01, 0.01)]

        def of(t: float, scores: torch.Tensor = scores, truth: torch.Tensor = truth) -> float:
            on = scores > t
            return float(2 * (on & truth).sum() / (on.sum() + truth.sum()))

        assert f1 == pytest.approx(of(at)) == pytest.approx(max(of(t) for t in tried))
    assert best_threshold(torch.tensor([0.0, 1.0, 3.0, 9.0]), torch.tensor([False, False, True, True])) == (2.0, 1.0)


def test_the_area_under_the_curve_is_the_auroc() -> None:
    scores = torch.randn(60).mul(3).round()
    truth = torch.rand(60) < 0.5
    x, y = roc(scores, truth)
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert float(torch.trapezoid(y, x)) == pytest.approx(float(auroc(scores, truth)), abs=1e-6)


def test_a_condition_that_the_model_holds_is_told_on_rows_it_was_not_fitted_on(
    hm: HookManager, data: Contrast, tmp_path: object
) -> None:
    d = fit_direction(hm, data, SITES)
    fit = fit_gate(hm, data, d, reduce="last")
    assert fit.sites == SITES and len(fit.to_frame()) == 3
    best = fit.sites.index(fit.best)
    assert float(fit.held_out_auroc[best]) > 0.95 and float(fit.held_out_f1[best]) > 0.9
    assert sum(fit.rows) == len(data) and fit.best in fit.summary()
    gate = fit.gate(d)
    assert isinstance(gate, Gate) and gate.threshold == float(fit.threshold[best])
    tokens = data.tokens(hm, where=Where()).tokens
    out = hm.run(tokens, logits="last", write=[Gated(Add("3.mlp_out", torch.ones(hm.d_model)), gate)])
    truth = torch.arange(len(data)) < len(data.positive)
    assert float((out.gates[gate].open == truth).float().mean()) > 0.9
    assert GateFit.load(fit.save(f"{tmp_path}/fit")).summary() == fit.summary()
    assert len(fit.plot().data) == 3


def test_labels_that_say_nothing_give_a_gate_that_tells_nothing(hm: HookManager, data: Contrast) -> None:
    told = []
    for seed in range(3):
        tokens = data.tokens(hm).shuffled(seed=seed)
        found = fit_gate(hm, tokens, fit_direction(hm, data, "0.resid_post"), reduce="last", seed=seed)
        told.append(float(found.held_out_auroc[0]))
    assert sum(told) / 3 < 0.75


def test_the_side_of_a_condition_is_found(hm: HookManager, data: Contrast) -> None:
    d = fit_direction(hm, data, "3.resid_post")
    one, other = (fit_gate(hm, data, x, reduce="last") for x in (d, -d))
    assert bool(one.above[0]) and not bool(other.above[0])
    torch.testing.assert_close(one.threshold, -other.threshold)
    torch.testing.assert_close(one.held_out_auroc, other.held_out_auroc)
    function = fit_gate(hm, data, lambda x: x @ d.unit("3.resid_post"), "3.resid_post", reduce="last")
    torch.testing.assert_close(function.threshold, one.threshold)


def test_what_cannot_be_fitted_is_refused(hm: HookManager, data: Contrast) -> None:
    d = fit_direction(hm, data, "3.resid_post")
    with pytest.raises(ConfigError, match="says not where"):
        fit_gate(hm, data, lambda x: x[..., 0])
    fit = fit_gate(hm, data, d, reduce="last", where=Where(pos=[-1, -2]))
    with pytest.raises(ConfigError, match="was fitted on"):
        fit.gate(d)
    with pytest.raises(ConfigError, match="was not fitted"):
        fit.gate(d, "1.resid_post", where=Where(pos=[-1, -2]))
    both = data.tokens(hm, where=Where())
    mixed = both.labels.clone()
    mixed[0, both.read[0].nonzero()[0]] = 0
    from dataclasses import replace

    with pytest.raises(DataError, match="several classes"):
        fit_gate(hm, replace(both, labels=mixed), d)


def test_a_measured_direction_has_the_scale_that_a_fit_has(hm: HookManager, data: Contrast) -> None:
    d = fit_direction(hm, data, "3.resid_post")
    again = measure_direction(hm, 2 * d + d, data)
    assert again.scale["3.resid_post"] == pytest.approx(d.scale["3.resid_post"], rel=1e-4)
