"""Steering sweeps on models whose answer is known in closed form: slopes, KL, controls, limits, rows of doses."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from interp.core.direction import Direction, Dose, SiteScale
from interp.core.errors import ConfigError, DataError, WhereError
from interp.core.intervention import Add, Intervention
from interp.core.manager import HookManager
from interp.core.metrics import loss_per_token
from interp.core.result import Provenance, Result
from interp.core.where import Where
from interp.data.pair_tokens import PairTokens
from interp.steering.evaluating.calibrate import calibrate, token_kl
from interp.steering.evaluating.dose_rows import blocks, read_doses
from interp.steering.evaluating.fluency import generated_perplexity
from interp.steering.evaluating.lines import random_like
from interp.steering.evaluating.sweep import steering_sweep
from interp.steering.evaluating.sweep_options import Limits, SweepOptions
from interp.steering.evaluating.sweep_result import SteeringSweep
from interp.testbed.nano import NanoOptions, nano
from interp.testbed.tasks import task_pairs

V, D, T, N = 12, 8, 5, 8
DOSES = [-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5]
BARE = SweepOptions(n_generated=0, controls=0, progress=False)
SITE = "0.resid_post"


def linear_model(*, embedding: float = 1.0) -> HookManager:
    """One layer that does nothing, no norm: logits are W_U (W_E[token] + what steering adds)."""
    model: Any = nano(
        NanoOptions(d_vocab=V, n_ctx=32, n_layers=1, d_model=D, n_heads=1, d_head=4, d_mlp=0, norm="none", bias=False)
    )
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(embedding * torch.randn(V, D, generator=draw))
        model.lm_head.weight.copy_(torch.randn(V, D, generator=draw))
    return HookManager.load(model)


def unembedding(hm: HookManager) -> Tensor:
    return hm.model.lm_head.weight.detach()


def by_hand(hm: HookManager, vector: Tensor, *, site: str = SITE, **more: Any) -> Direction:
    return Direction({site: vector}, method="by hand", model=Provenance.of(hm), name="planted", **more)


def pairs_of(answers: Sequence[int], foils: Sequence[int]) -> PairTokens:
    ids = torch.randint(V, (len(answers), T), generator=torch.Generator().manual_seed(1))
    return PairTokens.of_ids(ids, ids, torch.tensor(answers), torch.tensor(foils))


@pytest.fixture(scope="module")
def linear() -> HookManager:
    return linear_model()


@pytest.fixture(scope="module")
def testbed() -> HookManager:
    return HookManager.load("testbed")


# -- effects and slopes --------------------------------------------------------------------------------------------


def test_the_slope_of_a_linear_model_is_the_direction_read_by_the_unembedding(linear: HookManager) -> None:
    v = torch.randn(D)
    pairs = pairs_of(list(range(N)), [(i + 1) % V for i in range(N)])
    sweep = steering_sweep(linear, by_hand(linear, v), pairs, doses=DOSES, options=BARE)
    rate = (unembedding(linear)[pairs.answer_ids[:, 0]] - unembedding(linear)[pairs.foil_ids[:, 0]]) @ v
    torch.testing.assert_close(sweep.slopes().per_sample, rate, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(sweep.effect, torch.tensor(DOSES)[:, None] * rate, atol=2e-5, rtol=1e-4)
    expected = (sweep.base + torch.tensor(DOSES)[:, None] * rate > 0).float().mean(1)
    torch.testing.assert_close(sweep.accuracy, expected)


@pytest.mark.parametrize("against", [0, 3, 8])
def test_the_anti_steerable_share_is_that_of_the_planted_signs(linear: HookManager, against: int) -> None:
    w = unembedding(linear)
    v = w[0] - w[1]  # what makes token 0 likelier than 1, and 1 less likely than 0
    answers, foils = [0] * (N - against) + [1] * against, [1] * (N - against) + [0] * against
    sweep = steering_sweep(linear, by_hand(linear, v), pairs_of(answers, foils), doses=DOSES, options=BARE)
    found = sweep.slopes()
    assert found.anti_steerable.mean == against / N
    assert float(found.mean.mean) == pytest.approx(float(v @ v) * (N - 2 * against) / N, rel=1e-4, abs=1e-4)
    still = replace(sweep, effect=torch.zeros_like(sweep.effect)).slopes()
    assert still.anti_steerable.mean == 0, "what does not move goes no wrong way"


def test_a_dose_of_zero_changes_nothing_at_all(testbed: HookManager) -> None:
    v = torch.randn(testbed.d_model)
    pairs = task_pairs("sentiment", 9)
    sweep = steering_sweep(testbed, by_hand(testbed, v, site="2.resid_post"), pairs, doses=DOSES, options=BARE)
    at = DOSES.index(0.0)
    assert (sweep.effect[at] == 0).all() and sweep.kl[at] == 0 and sweep.kl_high[at] == 0
    assert sweep.loss_change[at] == 0
    others = torch.tensor([d != 0 for d in DOSES])
    assert (sweep.effect[others].abs() > 0).all() and (sweep.kl[others] > 0).all(), "the others do change something"


def test_doses_as_rows_are_the_doses_one_by_one(testbed: HookManager) -> None:
    pairs = task_pairs("sentiment", 5).tokens(testbed, same_length=False)
    assert not bool(pairs.clean.mask.all()), "rows with pads are the harder case"
    direction = by_hand(testbed, 3 * torch.randn(testbed.d_model), site="1.resid_post")
    mask = torch.rand(pairs.clean.mask.shape) < 0.6
    mask[:, 0] = True
    for where in (None, Where(mask=mask) | Where(pos=torch.arange(5) % 3)):
        n = 0 if where is None else 2
        usual = SweepOptions(n_generated=n, max_new_tokens=2, controls=0, progress=False, where=where)
        one, rows = (
            steering_sweep(testbed, direction, pairs, doses=[-2.0, 0.5, 1.0], options=replace(usual, batch_size=size))
            for size in (1, 8)
        )
        for name in ("effect", "kl", "kl_high", "loss_change", "perplexity"):
            torch.testing.assert_close(getattr(rows, name), getattr(one, name), atol=2e-4, rtol=1e-4)
        assert rows.texts == one.texts
        edits = [Add("1.resid_post", direction["1.resid_post"], where=where or Where())]
        metric = pairs.metric()
        plain = metric(testbed.run(pairs.clean, write=edits, logits="last"))
        torch.testing.assert_close(rows.base + rows.effect[2], plain, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("batch_size", [3, 64])
def test_answers_of_the_forwards_of_the_kl_are_those_of_forwards_of_their_own(
    testbed: HookManager, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = task_pairs("sentiment", 5).tokens(testbed, same_length=False)
    assert not bool(pairs.clean.mask.all())
    direction = by_hand(testbed, 3 * torch.randn(testbed.d_model), site="1.resid_post")
    found, forwards = [], []
    plain = HookManager.run
    for text in (None, pairs.clean):
        calls: list[Any] = []
        monkeypatch.setattr(HookManager, "run", lambda *a, calls=calls, **k: (calls.append(k), plain(*a, **k))[1])
        options = replace(BARE, text=text, batch_size=batch_size)
        found.append(steering_sweep(testbed, direction, pairs, doses=[-2.0, 0.0, 1.0], options=options))
        forwards.append(len(calls))
    for name in ("base", "effect", "kl", "loss_change"):
        torch.testing.assert_close(getattr(found[0], name), getattr(found[1], name), atol=1e-6, rtol=1e-6)
    assert forwards[0] < forwards[1] and (found[0].effect[1] == 0).all() and (found[0].effect[2] != 0).all()


def test_every_prompt_meets_every_dose_once() -> None:
    for n_rows, n_doses, at_once in ((3, 7, 64), (5, 4, 11), (9, 2, 4), (1, 1, 1)):
        met = [p for b in blocks(n_rows, n_doses, at_once) for p in zip(b.rows.tolist(), b.doses.tolist(), strict=True)]
        assert sorted(met) == [(r, d) for r in range(n_rows) for d in range(n_doses)]
        assert max(len(b.rows) for b in blocks(n_rows, n_doses, at_once)) <= at_once


class Mapped:
    """Something that steers, but not by one dose per row; keeps the doses that it was asked for."""

    def __init__(self, vector: Tensor) -> None:
        self.vector, self.asked = vector, list[Any]()

    def as_interventions(self, dose: Any = 1.0, *, where: Where | None = None) -> list[Intervention]:
        self.asked.append(dose)
        return [Add(SITE, self.vector, scale=dose, where=where or Where())]


def test_what_takes_one_dose_at_a_time_runs_one_by_one(linear: HookManager) -> None:
    v = torch.randn(D)
    pairs, mapped = pairs_of([0, 1, 2], [3, 4, 5]), Mapped(v)
    sweep = steering_sweep(
        linear, {"map": mapped, "vector": by_hand(linear, v)}, pairs, doses=[-1.0, 2.0], options=BARE
    )
    torch.testing.assert_close(sweep.effect[sweep.cells("map")], sweep.effect[sweep.cells("vector")])
    assert all(isinstance(dose, float) for dose in mapped.asked)


def test_an_ablation_is_measured_once_and_is_a_projection(linear: HookManager) -> None:
    v = torch.randn(D)
    direction, pairs = by_hand(linear, v, operation="ablate"), pairs_of([0, 1, 2], [3, 4, 5])
    sweep = steering_sweep(linear, direction, pairs, doses=DOSES, options=replace(BARE, n_generated=2))
    assert sweep.doses.tolist() == [1.0] and len(sweep.texts[0]) == 2, "a model without a tokenizer generates too"
    last = linear.model.model.embed_tokens.weight.detach()[pairs.clean.ids[:, -1]]
    u = v / v.norm()
    taken = -(last @ u)[:, None] * u
    w = unembedding(linear)
    change = ((w[pairs.answer_ids[:, 0]] - w[pairs.foil_ids[:, 0]]) * taken).sum(1)
    torch.testing.assert_close(sweep.effect[0], change, atol=1e-5, rtol=1e-4)


def test_a_unit_of_doses_is_that_of_the_fit(linear: HookManager) -> None:
    v, pairs = torch.randn(D), pairs_of([0, 1], [2, 3])
    direction = by_hand(linear, v, scale={SITE: SiteScale(5.0, 2.0)})
    sigma = steering_sweep(linear, direction, pairs, doses=[Dose(1.0, "sigma"), Dose(3.0, "sigma")], options=BARE)
    raw = steering_sweep(linear, direction, pairs, doses=[2 / float(v.norm()), 6 / float(v.norm())], options=BARE)
    torch.testing.assert_close(sigma.effect, raw.effect)
    assert sigma.unit == "sigma"
    control = random_like(direction, seed=3)
    moved = [direction.as_interventions(Dose(1.0, "sigma"))[0], control.as_interventions(Dose(1.0, "sigma"))[0]]
    sizes = [float(e.vector.norm()) * float(e.scale) for e in moved]  # type: ignore[attr-defined]
    assert sizes == pytest.approx([2.0, 2.0]), "a control moves as far as the direction, in every unit"


def test_random_directions_have_no_slope_and_the_planted_one_has(linear: HookManager) -> None:
    w = unembedding(linear)
    pairs = pairs_of([0] * N, [1] * N)
    options = SweepOptions(n_generated=0, controls=24, progress=False)
    sweep = steering_sweep(linear, by_hand(linear, w[0] - w[1]), pairs, doses=[-1.0, 0.0, 1.0], options=options)
    slopes = torch.tensor([sweep.slopes(*line).mean.mean for line in sweep.lines[1:]])
    assert len(slopes) == 24
    error = float(slopes.std() / 24**0.5)
    assert abs(float(slopes.mean())) < 3 * error, "the mean over random directions is nothing"
    assert sweep.slopes().mean.low > float(slopes.max())


# -- KL and calibration --------------------------------------------------------------------------------------------


def test_the_kl_of_a_dose_is_that_of_the_closed_form() -> None:
    hm = linear_model(embedding=0.0)
    v = torch.zeros(D)
    v[0] = 1.0
    with torch.no_grad():
        hm.model.lm_head.weight[:, 0] = torch.tensor([1.0, -1.0] * (V // 2))
    # From uniform logits to ± c: KL = log cosh c at every token.
    doses = [0.25, 1.0, 2.0]
    sweep = steering_sweep(hm, by_hand(hm, v), pairs_of([0, 2], [1, 3]), doses=doses, options=BARE)
    expected = torch.tensor(doses).double().cosh().log().float()
    torch.testing.assert_close(sweep.kl, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(sweep.kl_high, expected, atol=1e-6, rtol=1e-5)
    for target in (0.001, 0.1, 1.5, 0.6):
        if target < math.log(2):
            dose = calibrate(hm, by_hand(hm, v), pairs_of([0], [1]).clean, kl=target, tolerance=1e-3)
            assert float(dose.value) == pytest.approx(math.acosh(math.exp(target)), rel=5e-3)


def test_a_dose_that_no_kl_meets_is_refused_with_what_was_reached(linear: HookManager) -> None:
    with torch.no_grad():
        flat = linear_model(embedding=0.0)
        flat.model.lm_head.weight[:, 0] = 1.0  # adds the same to every logit
    v = torch.zeros(D)
    v[0] = 1.0
    with pytest.raises(DataError, match="reached"):
        calibrate(flat, by_hand(flat, v), pairs_of([0], [1]).clean)
    with pytest.raises(ConfigError, match="expected kl > 0"):
        calibrate(linear, by_hand(linear, v), pairs_of([0], [1]).clean, kl=0.0)


def test_a_calibrated_dose_has_the_quantile_asked_for_when_it_is_measured_again(testbed: HookManager) -> None:
    texts = [p.text for p in task_pairs("sentiment", 12).clean]
    direction = by_hand(testbed, torch.randn(testbed.d_model), site="1.resid_post")
    for where, quantile in ((None, 0.95), (Where(pos=slice(4, None)), 0.4)):
        dose = calibrate(testbed, direction, texts, kl=0.2, quantile=quantile, where=where)
        again = token_kl(testbed, direction, texts, dose=dose, where=where)
        assert float(again.quantile(quantile)) == pytest.approx(0.2, rel=0.03)
    assert dose.unit == "raw" and float(dose.value) > 0


# -- side effects --------------------------------------------------------------------------------------------------


def test_perplexity_is_of_the_generated_tokens_alone_under_the_unsteered_model(testbed: HookManager) -> None:
    prompts = ["The film was", "Review: the lesson was lovely. Sentiment:"]
    edit = Add("2.resid_post", 30 * torch.randn(testbed.d_model))
    made = testbed.generate(prompts, max_new_tokens=4, write=[edit])
    found = generated_perplexity(testbed, made)
    assert made.tokens is not None and made.mask is not None
    for row in range(2):
        real = made.mask[row]
        ids = made.tokens[row][real][None]
        new = int(made.mask[row, made.prompt_length :].sum())
        logprobs = testbed.model(ids).logits[0].log_softmax(-1)
        losses = [-float(logprobs[i - 1, ids[0, i]].detach()) for i in range(ids.shape[1] - new, ids.shape[1])]
        assert float(found[row]) == pytest.approx(math.exp(sum(losses) / new), rel=1e-3)
    apart = torch.cat([generated_perplexity(testbed, made, batch_size=1)])
    torch.testing.assert_close(apart, found, rtol=1e-4, atol=1e-4)


def test_loss_and_questions_on_the_side_are_those_of_steered_runs(testbed: HookManager) -> None:
    v = 20 * torch.randn(testbed.d_model)
    text, asked = ["Review: the lesson was lovely.", "The film was dull."], task_pairs("agreement", 10)
    options = SweepOptions(text=text, questions=asked, n_generated=0, controls=0, progress=False)
    direction = by_hand(testbed, v, site="2.resid_post")
    sweep = steering_sweep(testbed, direction, task_pairs("sentiment", 3), doses=[1.0], options=options)
    tokens = testbed.to_tokens(text)
    edits = [Add("2.resid_post", v)]
    means = []
    for write in ([], edits):
        losses, counts = loss_per_token(testbed.run(tokens, write=write).logits, tokens.ids, tokens.mask)
        means.append(float(losses.sum() / counts.sum()))
    assert float(sweep.loss_change[0]) == pytest.approx(means[1] - means[0], rel=1e-3)
    pairs = asked.tokens(testbed)
    right = (pairs.metric()(testbed.run(pairs.clean, write=edits, logits="last")) > 0).float().mean()
    assert float(sweep.question_accuracy[0]) == pytest.approx(float(right))
    assert sweep.base_question_accuracy - float(right) == pytest.approx(sweep.records()[0]["question_accuracy_drop"])


def test_a_dose_that_breaks_the_model_is_flagged_and_not_chosen(testbed: HookManager) -> None:
    v = torch.randn(testbed.d_model)
    options = SweepOptions(n_generated=3, max_new_tokens=8, controls=0, progress=False)
    direction = by_hand(testbed, v, site="1.resid_post")
    sweep = steering_sweep(testbed, direction, task_pairs("sentiment", 6), doses=[0.0, 0.05, 50.0], options=options)
    assert sweep.failed[:2] == ["", ""] and "kl" in sweep.failed[2] and "perplexity" in sweep.failed[2]
    assert sweep.best().dose in (0.0, pytest.approx(0.05))
    assert sweep.best(max_kl=math.inf).dose == float(sweep.doses[sweep.effect.mean(1).argmax()])
    loose = SweepOptions(
        n_generated=3,
        max_new_tokens=8,
        controls=0,
        progress=False,
        limits=Limits(kl=math.inf, perplexity=math.inf, repetition=0.0),
    )
    assert not any(steering_sweep(testbed, direction, task_pairs("sentiment", 6), doses=[50.0], options=loose).failed)
    with pytest.raises(DataError, match="none of 3 cells"):
        sweep.best(max_kl=-1.0)


# -- the result ----------------------------------------------------------------------------------------------------


def test_what_was_done_before_an_interrupt_is_kept(linear: HookManager) -> None:
    class Stops(Mapped):
        def as_interventions(self, dose: Any = 1.0, *, where: Where | None = None) -> list[Intervention]:
            if dose == 2.0:
                raise KeyboardInterrupt
            return super().as_interventions(dose, where=where)

    v, pairs = torch.randn(D), pairs_of([0, 1], [2, 3])
    both: dict[str, Any] = {"first": by_hand(linear, v), "second": Stops(v)}
    sweep = steering_sweep(linear, both, pairs, doses=[1.0, 2.0], options=BARE)
    assert sweep.steers == ["first", "first"] and not bool(sweep.effect.isnan().any())
    assert any("stopped: 1 of 2" in note for note in sweep.notes)
    with pytest.raises(KeyboardInterrupt):
        steering_sweep(linear, Stops(v), pairs, doses=[1.0, 2.0], options=BARE)


def test_a_sweep_is_a_table_three_figures_and_a_folder(testbed: HookManager, tmp_path: Path) -> None:
    direction = Direction(
        {f"{layer}.resid_post": torch.randn(testbed.d_model) for layer in (0, 1)},
        method="by hand",
        model=Provenance.of(testbed),
        name="two sites",
    )
    options = SweepOptions(n_generated=2, max_new_tokens=3, controls=1, progress=False)
    sweep = steering_sweep(testbed, direction, task_pairs("sentiment", 5), doses=[-1.0, 0.0, 1.0], options=options)
    table = sweep.to_frame()
    assert len(table) == len(sweep) == 12 and table["control"].sum() == 6
    assert {"slope", "anti_steerable", "kl", "perplexity", "distinct_2", "compression", "passed"} <= set(table.columns)
    assert table["effect_low"].le(table["effect"] + 1e-9).all()
    for kind, against in (("doses", "kl"), ("trade_off", "kl"), ("trade_off", "perplexity"), ("sites", "kl")):
        figure = sweep.plot(kind=kind, against=against)
        assert figure.data
    assert sweep.plot(kind="sites").data[0].z.__len__() == 2
    back = Result.load(sweep.save(tmp_path / "sweep"))
    assert isinstance(back, SteeringSweep) and back.texts == sweep.texts
    torch.testing.assert_close(back.effect, sweep.effect)
    assert back.summary() == sweep.summary() and "random directions" in sweep.summary()
    sweep.to_html(tmp_path / "sweep.html")


def test_plain_prompts_are_only_continued(testbed: HookManager) -> None:
    direction = by_hand(testbed, torch.randn(testbed.d_model), site="1.resid_post")
    options = SweepOptions(max_new_tokens=3, controls=0, progress=False)
    sweep = steering_sweep(testbed, direction, ["The film was", "The lesson"], doses=[0.0, 1.0], options=options)
    assert sweep.effect.shape == (2, 0) and sweep.perplexity.isfinite().all()
    assert sweep.texts[0] == sweep.base_texts and sweep.prompts[0] == "The film was"
    assert math.isnan(sweep.records()[0]["effect"]) and sweep.summary()
    drawn = sweep.plot()
    assert drawn.layout.yaxis.title.text.startswith("KL") and drawn.data[0].y == tuple(sweep.kl.tolist())
    assert [t for t, _ in sweep.page_parts()] == ["What it says"] and len(sweep.said()) == 2 * 3
    with pytest.raises(DataError, match="plain prompts"):
        sweep.plot(kind="sites")


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_swept_is_refused_by_name(linear: HookManager) -> None:
    v, pairs = torch.randn(D), pairs_of([0, 1], [2, 3])
    direction = by_hand(linear, v)
    bad: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ConfigError, "one unit", {"doses": [1.0, Dose(1.0, "rms")]}),
        (ConfigError, "each once", {"doses": [1.0, 1.0]}),
        (ConfigError, "no dose at all", {"doses": []}),
        (ConfigError, "has no as_interventions", {"steers": {"x": 3}}),
        (ConfigError, "nothing that steers", {"steers": {}}),
        (ConfigError, "measured in any case", {"options": SweepOptions(metric="kl")}),
        (WhereError, "rows of its own", {"options": SweepOptions(where=Where(rows=0), n_generated=0)}),
    ]
    for kind, words, changed in bad:
        given: dict[str, Any] = {"steers": direction, "doses": [1.0], "options": BARE} | changed
        with pytest.raises(kind, match=words):
            steering_sweep(linear, given.pop("steers"), pairs, **given)
    with pytest.raises(ConfigError, match="whole number"):
        SweepOptions(controls=-1)
    assert read_doses(Dose(torch.tensor([1.0, 2.0]), "rms")).values.tolist() == [1.0, 2.0]
