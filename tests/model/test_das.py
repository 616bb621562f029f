"""Distributed alignment search on a model whose variable lies in a known plane; its gradient, controls and records."""

import json
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor

from interp.core.errors import ConfigError, DataError, ModelError, ShapeError, WhereError
from interp.core.manager import HookManager
from interp.core.reinit import reinitialised
from interp.core.result import Result
from interp.core.subspace import random_basis
from interp.core.where import Where
from interp.data.pair_tokens import PairTokens
from interp.patching.subspaces.das import DAS, DASOptions, fit_boundless_das, fit_das
from interp.patching.subspaces.fitting import Boundary, Rotation, _surrogate, split_rows, train
from interp.patching.subspaces.interchange import Interchange, Labels
from interp.testbed.nano import NanoOptions, nano
from interp.testbed.tasks import task_pairs

KINDS, OTHERS, D = 3, 4, 8
SITE = "0.resid_post"
FAST = DASOptions(epochs=26, lr=0.1, batch_size=36, controls=(), progress=False)


def planted() -> tuple[HookManager, PairTokens, Tensor]:
    """A linear model, all ordered pairs of other kind, and the plane.

    Token 4a + b puts the a-th corner of a triangle into a plane and the b-th of a simplex into three other dimensions;
    the logits of tokens 0 … 2 read the plane.
    """
    options = NanoOptions(
        d_vocab=KINDS * OTHERS, n_layers=1, d_model=D, n_heads=1, d_mlp=0, norm="none", positions="none", bias=False
    )
    model = nano(options)
    frame = random_basis(D, D, seed=3)
    kind = torch.eye(KINDS) - 1 / KINDS
    plane = torch.linalg.svd(kind).Vh[:2]  # [2 3]: the triangle in its own plane
    other = torch.linalg.svd(torch.eye(OTHERS) - 1 / OTHERS).Vh[:3]
    token = torch.arange(KINDS * OTHERS)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        embedded = plane.T[token // OTHERS] @ frame[:2] + 2 * other.T[token % OTHERS] @ frame[2:5]
        model.model.embed_tokens.weight.copy_(embedded)
        model.lm_head.weight[:KINDS] = 8 * plane.T @ frame[:2]
    both = torch.cartesian_prod(token, token)
    both = both[both[:, 0] // OTHERS != both[:, 1] // OTHERS]
    pairs = PairTokens.of_ids(both[:, :1], both[:, 1:], both[:, 0] // OTHERS, both[:, 1] // OTHERS)
    return HookManager.load(model), pairs, frame[:2]


def overlap(found: Tensor, truth: Tensor) -> list[float]:
    """Cosines of the principal angles, largest first."""
    return torch.linalg.svdvals(found @ truth.T).tolist()


# Fits of many steps run without the type checker, which would take most of their time; shorter ones have it.
quick = pytest.mark.usefixtures("unchecked")


@pytest.fixture(scope="module")
def fitted() -> DAS:
    hm, pairs, _ = planted()
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        return _fit(hm, pairs)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def _fit(hm: HookManager, pairs: PairTokens) -> DAS:
    return fit_das(hm, pairs, SITE, k=2, options=DASOptions(epochs=26, lr=0.1, batch_size=36, progress=False))


def test_the_planted_plane_is_found_and_holds_on_pairs_it_has_not_seen(fitted: DAS) -> None:
    _, pairs, plane = planted()
    assert min(overlap(fitted.basis, plane)) > 0.97
    assert fitted.iia["held out"].mean == 1.0 == fitted.iia["whole site"].mean
    assert fitted.k == 2 and len(fitted.test) == round(len(pairs) / 4) == len(fitted.hits["held out"])
    assert fitted.loss[-1] < 0.1 < fitted.loss[0]


def test_every_control_fails_where_the_fit_succeeds(fitted: DAS) -> None:
    iia = {name: e.mean for name, e in fitted.iia.items()}
    assert iia["no patch"] == 0.0 and iia["random, same size"] < 0.5
    # Labels of other pairs: one in three is right by chance, and no subspace of the plane gives the rest.
    assert iia["labels of other pairs"] < 0.6 and iia["random weights"] < 0.85
    assert fitted.plot().data[0].y[0] == 1.0


@quick
def test_a_subspace_that_is_too_small_or_too_large() -> None:
    hm, pairs, plane = planted()
    one = fit_das(hm, pairs, SITE, k=1, options=FAST)
    assert overlap(one.basis, plane)[0] > 0.9 and one.iia["held out"].mean < 0.6
    every = fit_das(hm, pairs, SITE, k=D, options=DASOptions(epochs=1, batch_size=99, controls=(), progress=False))
    assert torch.equal(every.hits["held out"], every.hits["whole site"])


@quick
def test_labels_of_a_causal_model_can_be_given() -> None:
    hm, pairs, plane = planted()
    base, source = pairs.answer_ids[:, 0], pairs.foil_ids[:, 0]
    # The causal model of nothing: interchange leaves the answer as it was, and doing nothing is then always right.
    idle = fit_das(hm, pairs, SITE, k=1, labels=base, options=FAST)
    assert idle.iia["held out"].mean == 1.0 == idle.iia["no patch"].mean
    assert overlap(idle.basis, plane)[0] < 0.2
    again = fit_das(hm, pairs, SITE, k=2, labels=source, options=FAST)
    assert min(overlap(again.basis, plane)) > 0.97


@quick
def test_held_out_pairs_are_the_ones_named_and_no_fit_sees_them() -> None:
    hm, pairs, _ = planted()
    held = [i for i in range(len(pairs)) if int(pairs.clean.ids[i, 0]) == 4]
    found = fit_das(hm, pairs, SITE, k=2, held_out=held, options=FAST)
    assert found.test.tolist() == held and found.iia["held out"].mean == 1.0
    # The same bytes whatever the held-out pairs' labels are: nothing of them reaches the fit.
    wrong = pairs.foil_ids[:, 0].clone()
    wrong[held] = (wrong[held] + 1) % KINDS
    other = fit_das(hm, pairs, SITE, k=2, held_out=held, labels=wrong, options=FAST)
    assert torch.equal(other.basis, found.basis) and other.iia["held out"].mean < 0.6


@quick
def test_a_boundless_fit_finds_the_plane_and_its_size() -> None:
    hm, pairs, plane = planted()
    options = DASOptions(epochs=60, lr=0.05, batch_size=36, controls=("random",), progress=False)
    found = fit_boundless_das(hm, pairs, SITE, options=options, temperature=(3.0, 0.1), penalty=4.0)
    assert found.k == 2 and min(overlap(found.basis, plane)) > 0.97
    assert found.iia["held out"].mean == 1.0
    assert (
        len(found.boundary) == len(found.loss) and found.boundary[0] == 0.5 and "boundless, 2 of 8" in found.summary()
    )
    free = fit_boundless_das(hm, pairs, SITE, options=FAST, temperature=(3.0, 0.1), penalty=0.0)
    assert free.k >= 5 and free.iia["held out"].mean == 1.0


def test_a_boundary_is_its_formula() -> None:
    boundary = Boundary(4, seed=0, device=torch.device("cpu"), temperature=(50.0, 0.1), lr=1e-2, penalty=2.0)
    places = torch.tensor([0.5, 1.5, 2.5, 3.5])
    torch.testing.assert_close(boundary.mask(0.7), torch.sigmoid((0.5 * 4 - places) / 0.7))
    assert (boundary.mask(0.01) > 0.5).tolist() == [True, True, False, False] and len(boundary.final()) == 2
    assert boundary.mask(50.0).std() < 0.02  # at first every dimension counts about half
    _, weights, price = boundary.current(1.0)
    assert price is not None and float(price.detach()) == 1.0 and weights is not None
    torch.testing.assert_close(weights, boundary.mask(0.1))


@pytest.mark.parametrize("loss", ["cross_entropy", "logit_diff"])
def test_the_gradient_is_that_of_finite_differences(loss: str) -> None:
    model = nano(NanoOptions(d_vocab=9, d_model=6, n_heads=2, init_std=0.5, embed_std=1.0), seed=4).double()
    hm = HookManager.load(model)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 9, (2, 4, 5), generator=draw)
    pairs = PairTokens.of_ids(ids[0], ids[1], torch.tensor([1, 2, 3, 4]), torch.tensor([5, 6, 7, 8]))
    task = Interchange.of(hm, pairs, "0.resid_post", where=Where(pos=[1, 3]), batch_size=4)
    labels, rows = Labels.of(task.pairs), torch.tensor([3, 0, 2])
    options = DASOptions(loss=loss, progress=False)
    boundary = Boundary(6, seed=1, device=torch.device("cpu"), temperature=(2.0, 1.0), lr=1e-2, penalty=0.3)
    boundary.weight = boundary.weight.detach().double().requires_grad_(True)
    boundary.share = boundary.share.detach().double().requires_grad_(True)
    _, made = _surrogate(task, labels, rows, boundary.current(0.4), options)
    parameters = [boundary.weight, boundary.share]
    found = torch.autograd.grad(made, parameters)

    def value() -> float:
        with torch.no_grad():
            current = boundary.current(0.4)
        assert current[2] is not None
        return _surrogate(task, labels, rows, current, options)[0] + float(current[2])

    for parameter, gradient in zip(parameters, found, strict=True):
        for at in range(0, parameter.numel(), 5):
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter.view(-1)[at] += sign * 1e-5
                    ends.append(value())
                    parameter.view(-1)[at] -= sign * 1e-5
            assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(float(gradient.flatten()[at]), abs=1e-6)
    assert all(p.grad is None for p in model.parameters())


def test_the_model_is_left_as_it_was_and_the_seed_decides_the_bytes() -> None:
    hm, pairs, _ = planted()
    before = {name: p.clone() for name, p in hm.model.named_parameters()}
    few = DASOptions(epochs=1, progress=False)
    first, second = (fit_das(hm, pairs, SITE, k=2, options=few) for _ in range(2))
    assert torch.equal(first.basis, second.basis) and first.loss == second.loss
    assert all(torch.equal(first.hits[name], second.hits[name]) for name in first.hits)
    assert not torch.equal(fit_das(hm, pairs, SITE, k=2, options=DASOptions(epochs=1, seed=1)).basis, first.basis)
    for name, p in hm.model.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None and p.requires_grad
    torch.testing.assert_close(first.basis @ first.basis.T, torch.eye(2), atol=1e-5, rtol=0)


def test_it_is_saved_without_the_model_and_patches_again(fitted: DAS, tmp_path: Path) -> None:
    hm, pairs, _ = planted()
    again = Result.load(fitted.save(tmp_path / "das"))
    assert isinstance(again, DAS) and torch.equal(again.basis, fitted.basis) and again.iia == fitted.iia
    assert json.loads((tmp_path / "das" / "result.json").read_text())["class"] == "interp.patching.subspaces.das.DAS"
    source = hm.run(pairs.corrupted, read=[SITE])
    out = hm.run(pairs.clean, write=[again.as_intervention(source)], logits="last")
    hits = Labels.of(pairs).hit(out.logits[:, 0], torch.arange(len(pairs)))
    assert torch.equal(hits[fitted.test].float(), fitted.hits["held out"])
    assert "labels of other pairs" in fitted.to_html(tmp_path / "das.html").read_text()
    assert len(fitted.to_frame()) == len(fitted.hits)


def test_an_interrupt_keeps_what_was_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    hm, pairs, _ = planted()
    calls: list[int] = []
    plain = Rotation.current

    def current(self: Rotation, done: float) -> Any:
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return plain(self, done)

    monkeypatch.setattr(Rotation, "current", current)
    found = fit_das(hm, pairs, SITE, k=2, options=DASOptions(progress=False))
    assert found.stopped and len(found.loss) == 6 and "interrupted" in found.summary()
    assert "random, same size" in found.hits and "random weights" not in found.hits


def test_random_weights_are_another_model_of_the_same_config() -> None:
    hm, pairs, _ = planted()
    one, two, other = (reinitialised(hm, seed=s) for s in (0, 0, 1))
    logits = [m.run(pairs.clean, logits="last").logits for m in (hm, one, two, other)]
    assert torch.equal(logits[1], logits[2])
    assert not torch.equal(logits[1], logits[3]) and not torch.equal(logits[0], logits[1])
    assert one.config.to_dict() == hm.config.to_dict() and "random weights" in one.name
    state = torch.get_rng_state()
    reinitialised(hm)
    assert torch.equal(torch.get_rng_state(), state)


@quick
def test_the_testbed_carries_number_in_few_directions() -> None:
    hm, pairs = HookManager.load("testbed"), task_pairs("agreement", 64)
    options = DASOptions(epochs=6, batch_size=16, controls=("random",), progress=False)
    found = fit_das(hm, pairs, "3.resid_post", k=4, options=options)
    iia = {name: e.mean for name, e in found.iia.items()}
    assert iia["whole site"] == 1.0 and iia["no patch"] == 0.0
    assert iia["held out"] > 0.7 > 0.2 > iia["random, same size"]


# -- refusals -----------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_the_fit_and_names_the_step() -> None:
    hm, pairs, _ = planted()
    task = Interchange.of(hm, pairs, SITE, where="end")
    rotation = Rotation(2, D, seed=0, device=torch.device("cpu"))
    task.hm.model.lm_head.weight.data[0] = float("nan")
    with pytest.raises(ModelError, match=r"0\.resid_post is nan at step 0"):
        train(task, Labels.of(pairs), torch.arange(8), rotation, options=FAST, step=lambda: None)


@pytest.mark.usefixtures("unchecked")
def test_bad_settings_are_refused_before_anything_is_fitted() -> None:
    hm, pairs, _ = planted()
    for k in (0, D + 1, True, 1.5):
        with pytest.raises(ShapeError, match="expected 1 to 8"):
            fit_das(hm, pairs, SITE, k=k)  # type: ignore[arg-type]
    for setting in ({"controls": ("placebo",)}, {"loss": "mse"}, {"epochs": 0}, {"lr": 0.0}, {"held_out": 1.0}):
        with pytest.raises(ConfigError):
            DASOptions(**setting)
    with pytest.raises(ConfigError, match="temperature"):
        fit_boundless_das(hm, pairs, SITE, temperature=(50.0, 0.0))
    for held in ([], [len(pairs)], range(len(pairs))):
        with pytest.raises(DataError, match="held out"):
            fit_das(hm, pairs, SITE, k=1, held_out=held)
    with pytest.raises(ShapeError, match="one token id per pair"):
        fit_das(hm, pairs, SITE, k=1, labels=torch.tensor([1]))
    with pytest.raises(ShapeError, match="one token id per pair"):
        fit_das(hm, pairs, SITE, k=1, labels=torch.ones(len(pairs)))
    alone = PairTokens(pairs.clean, pairs.corrupted, pairs.answers, ((),) * len(pairs))
    with pytest.raises(DataError, match="no foils"):
        fit_das(hm, alone, SITE, k=1)
    placed = fit_das(hm, pairs, SITE, k=1, where=Where(pos=0), options=DASOptions(epochs=1, controls=()))
    with pytest.raises(WhereError, match="say where it acts"):
        placed.as_intervention(torch.zeros(D))
    assert placed.as_intervention(torch.zeros(D), where=Where(pos=0)).basis is placed.basis


def test_a_split_is_seeded_and_disjoint() -> None:
    seen, test = split_rows(20, None, DASOptions(held_out=0.3, seed=2))
    assert len(test) == 6 and sorted([*seen.tolist(), *test.tolist()]) == list(range(20))
    assert torch.equal(test, split_rows(20, None, DASOptions(held_out=0.3, seed=2))[1])
    assert not torch.equal(test, split_rows(20, None, DASOptions(held_out=0.3, seed=3))[1])
