"""Function vectors where the truth is known: a head made by hand, and the functions of the small world."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from interp.core.errors import ConfigError, DataError, ModelError, WhereError
from interp.core.intervention import Add
from interp.core.manager import HookManager
from interp.core.result import Result
from interp.core.where import Where
from interp.data.icl import FunctionTask, icl_pairs
from interp.steering.function_vectors import effects as effects_module
from interp.steering.function_vectors.decode import decode_vector, reconstruct_vector
from interp.steering.function_vectors.effects import head_effects, trial_pairs
from interp.steering.function_vectors.evaluate import evaluate_function_vector
from interp.steering.function_vectors.heads import mean_head_activations
from interp.steering.function_vectors.options import ICLOptions, solved
from interp.steering.function_vectors.vector import compose_function_vectors, function_vector
from interp.testbed.functions import world_functions, world_templates
from tests.hand_built_functions import CARRIER, GAIN, LEAN, code_of, function_model, function_tasks

FEW = ICLOptions(n_trials=6, n_prompts=4, n_shots=3, corruption="others")


def probability(share: Tensor) -> Tensor:
    """p(a's output), from the share of shots that are of a: the hand-built model's own formula."""
    ours, theirs = GAIN * (1 + share), GAIN * (2 - share) + LEAN
    # The output bias of both layers adds as much to the code of either; other tokens' logits have none of it.
    rest = (120 - 24) * torch.exp(torch.tensor(-2 * 0.7 * GAIN))
    total = ours.exp() + theirs.exp() + 11 * (GAIN * share).exp() + 11 * (GAIN * (1 - share)).exp() + rest
    return ours.exp() / total


@pytest.mark.parametrize("n_kv_heads", [2, 1])
def test_the_head_that_carries_the_function_has_the_effect_of_the_formula_and_others_none(n_kv_heads: int) -> None:
    hm, tasks = function_model(n_kv_heads), function_tasks()
    found = head_effects(hm, tasks["a"], options=FEW)
    pairs, _ = trial_pairs(hm, tasks["a"].split(), FEW, 0)
    outputs = [pair.corrupted.text.split()[1::2] for pair in pairs]
    share = torch.tensor([sum(30 <= int(y[1:]) < 42 for y in row) / FEW.n_shots for row in outputs])
    assert 0 < share.mean() < 1
    torch.testing.assert_close(found.corrupted[0].exp(), probability(share), atol=1e-5, rtol=1e-5)
    wanted = probability(torch.ones(())) - probability(share)
    torch.testing.assert_close(found.effects[0, :, *CARRIER], wanted, atol=1e-5, rtol=1e-5)
    others = found.effects[0].clone()
    others[:, *CARRIER] = 0
    assert float(others.abs().max()) < 1e-6
    assert bool((found.effects[0, :, 1] == 0).all()), "heads that already have their mean are not run"
    assert found.top(1) == [CARRIER] and f"L{CARRIER[0]}H{CARRIER[1]}" in found.summary()
    low, high = found.interval()
    assert float(low[CARRIER]) > 0 and float(found.p_values()[CARRIER]) < float(found.p_values()[1, 0]) == 1.0
    torch.testing.assert_close(float(high[1, 1]), 0.0)


def test_the_vector_is_what_the_head_writes_without_the_bias_and_it_does_the_function() -> None:
    hm, tasks = function_model(), function_tasks()
    assert float(hm.weights[0].b_O @ code_of("a")) > 0
    both = head_effects(hm, list(tasks.values()), options=FEW)
    assert both.aie.shape == (2, 2) and both.of("b").tasks == ["b"]
    for name in "ab":
        made = function_vector(hm, tasks[name], heads=1, effects=both, options=FEW)
        assert made.heads == [CARRIER]
        torch.testing.assert_close(made.vector, code_of(name), atol=1e-6, rtol=0)
        two = function_vector(hm, tasks[name], heads=[CARRIER, (1, 0)], layer=0, options=FEW)
        torch.testing.assert_close(two.vector, code_of(name), atol=1e-6, rtol=0)
    a = function_vector(hm, tasks["a"], heads=[CARRIER], layer=0, options=FEW)
    scores = evaluate_function_vector(hm, a, tasks["a"], n_random=2, options=FEW)
    assert scores.accuracy("zero_shot").mean == 1 and scores.accuracy("zero_shot", "none").mean == 0
    assert scores.accuracy("zero_shot", "random heads").mean == 0
    assert float(scores.ceiling.mean()) == 1 and torch.equal(scores.full, scores.right[:, :, 0])
    twice = evaluate_function_vector(hm, a, tasks["a"], n_random=2, options=FEW)
    assert torch.equal(scores.log_prob, twice.log_prob)


@pytest.mark.usefixtures("unchecked")
def test_heads_tasks_and_models_that_do_not_belong_are_refused() -> None:
    (hm, tasks), other = (function_model(), function_tasks()), function_model(1)
    effects = head_effects(hm, tasks["a"], options=FEW)
    for heads, said in (([CARRIER, CARRIER], "stands there twice"), ([0, 1], "list of"), ("all", "list of")):
        with pytest.raises(ConfigError, match=said):
            function_vector(hm, tasks["a"], heads=heads, layer=0, options=FEW)  # type: ignore[arg-type]
    unfit: list[Any] = [[], tasks, "a"]
    for given in unfit:
        with pytest.raises(ConfigError, match="expected a FunctionTask"):
            head_effects(hm, given, options=FEW)
    made = function_vector(hm, tasks["a"], heads=4, layer=0, effects=effects)
    assert made.n_shots == FEW.n_shots and made.heads == [CARRIER] and "only 1 have" in made.notes[0]
    for refused in (
        lambda: function_vector(other, tasks["a"], heads=1, effects=effects, options=FEW),
        lambda: evaluate_function_vector(other, made, tasks["a"], n_random=1),
        lambda: decode_vector(other, made),
        lambda: reconstruct_vector(other, made),
    ):
        with pytest.raises(ModelError, match=r"measure this one|fit one on it"):
            refused()
    with pytest.raises(DataError, match="are among those that the vector was made of"):
        evaluate_function_vector(hm, made, tasks["a"].split(seed=1), n_random=1)
    rebuilt = reconstruct_vector(
        hm, function_vector(hm, tasks["a"], heads=[CARRIER, (1, 0)], layer=0, options=FEW), k=5, steps=2
    )
    assert rebuilt.to_frame()[["layer", "head"]].to_numpy().tolist() == [[-1, -1]]


def test_a_sum_of_vectors_is_the_function_that_its_first_term_is_not() -> None:
    hm, tasks = function_model(), function_tasks()
    a, b = (function_vector(hm, tasks[name], heads=[CARRIER, (0, 0)], layer=0, options=FEW) for name in "ab")
    turned = replace(a, heads=a.heads[::-1], parts=a.parts.flip(0))
    made = compose_function_vectors(b, turned, b)
    torch.testing.assert_close(made.parts, a.parts)
    assert evaluate_function_vector(hm, made, tasks["a"], n_random=1, options=FEW).accuracy().mean == 1
    assert evaluate_function_vector(hm, b, tasks["a"], n_random=1, options=FEW).accuracy().mean == 0


def test_shots_whose_outputs_change_places_still_show_the_function_and_that_is_said() -> None:
    hm, task = function_model(), function_tasks()["a"]
    with pytest.warns(UserWarning, match="every effect is exactly 0"):
        found = head_effects(hm, task, options=replace(FEW, corruption="shuffled"))
    assert bool((found.effects == 0).all()) and float(found.room.abs().max()) < 1e-6
    assert any("next to nothing to bring back" in note for note in found.notes)


def test_a_table_of_zeros_is_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    hm, task = function_model(), function_tasks()["a"]

    def own(hm: HookManager, pairs: object, *, batch_size: int) -> object:
        """The means of one prompt that every trial then is."""
        return mean_head_activations(hm, one)

    options = replace(FEW, n_trials=1, corruption="zero_shot")
    one = icl_pairs(task.split().validation, task.split().train, 1, n_shots=0)
    monkeypatch.setattr(effects_module, "mean_head_activations", own)
    with pytest.warns(UserWarning, match="every effect is exactly 0"):
        found = head_effects(hm, task, options=options)
    assert bool((found.effects == 0).all())


def test_a_stop_keeps_the_tasks_that_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    hm, tasks = function_model(), function_tasks()
    calls: list[int] = []

    def stopping(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return mean_head_activations(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(effects_module, "mean_head_activations", stopping)
    found = head_effects(hm, list(tasks.values()), options=FEW)
    assert found.tasks == ["a"] and found.top(1) == [CARRIER] and "stopped: 50%" in found.summary()


def test_results_come_back_from_disk_and_draw(tmp_path: Path) -> None:
    hm, tasks = function_model(), function_tasks()
    effects = head_effects(hm, list(tasks.values()), options=FEW)
    vector = function_vector(hm, tasks["a"], effects=effects, options=FEW)
    assert not vector.sizes, "one head and one layer: there is nothing to choose"
    scores = evaluate_function_vector(hm, vector, tasks["a"], n_random=2, options=FEW)
    decoded = decode_vector(hm, vector, 3)
    for n, result in enumerate((effects, vector, scores, decoded)):
        again = Result.load(result.save(tmp_path / str(n)))
        assert again.summary() == result.summary() and len(again.to_frame()) == len(result.to_frame()) > 0
        assert result.plot().data
    direction = vector.direction
    assert direction.sites == ["0.resid_post"] and direction.method == "function_vector"
    direction.check(hm)
    (edit,) = vector.as_interventions(2.0)
    assert isinstance(edit, Add) and edit.where == Where.last_prompt()
    assert scores.plot().data and effects.plot(task="b").data


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_is_refused() -> None:
    hm, tasks = function_model(), function_tasks()
    a = tasks["a"]
    with pytest.raises(ConfigError, match="heads=0"):
        function_vector(hm, a, heads=0, options=FEW)
    with pytest.raises(ConfigError, match="layer=2"):
        function_vector(hm, a, heads=[CARRIER], layer=2, options=FEW)
    with pytest.raises(WhereError, match="layers 0–1 and heads 0–1"):
        function_vector(hm, a, heads=[(0, 2)], options=FEW)
    with pytest.raises(DataError, match="solves none of"):
        wrong = FunctionTask("wrong", tuple((x, "w99") for x, _ in a.examples), a.template)
        head_effects(hm, wrong, options=replace(FEW, corruption="shuffled"))
    with pytest.raises(DataError, match="no effects of 'c'"):
        head_effects(hm, a, options=FEW).of("c")
    one = function_vector(hm, a, heads=[CARRIER], layer=0, options=FEW)
    other = function_vector(hm, a, heads=[(0, 0)], layer=0, options=FEW)
    with pytest.raises(DataError, match="different heads"):
        compose_function_vectors(one, one, other)
    with pytest.raises(ModelError, match="different models"):
        compose_function_vectors(one, one, replace(one, provenance=replace(one.provenance, config_hash="no")))
    with pytest.raises(ConfigError, match="n_random=0"):
        evaluate_function_vector(hm, one, a, n_random=0)
    with pytest.raises(ConfigError, match="k=0"):
        decode_vector(hm, one, 0)
    with pytest.raises(ConfigError, match="corruption='other'"):
        ICLOptions(corruption="other")


# -- whole answers -----------------------------------------------------------------------------------------------


def test_whole_answers_are_what_greedy_decoding_gives() -> None:
    hm, tasks = function_model(), function_tasks()
    a, b = (dict(tasks[name].examples) for name in "ab")
    # Two tokens: after a's output the model has no input left, and says what leans most.
    long = FunctionTask("long", tuple((x, f"{a[x]} {b[x]}") for x in a), "{input} {output} ")
    made = function_vector(hm, tasks["a"], heads=[CARRIER], layer=0, options=FEW)
    split = long.split()
    scores = evaluate_function_vector(hm, made, split, n_random=1, options=replace(FEW, corruption="shuffled"))
    assert scores.accuracy("zero_shot").mean == 1 > scores.accuracy("zero_shot", full=True).mean
    prompts = icl_pairs(split.test, split.train, n_shots=0)
    texts = [pair.clean.text for pair in prompts]
    said = hm.generate(texts, max_new_tokens=2, write=made.as_interventions())
    wanted = prompts.tokens(hm).answers
    for row, answers in enumerate(wanted):
        assert bool(scores.full[0, 1, row]) == (tuple(said.new_tokens[row].tolist()) == answers[0])


# -- the small world ---------------------------------------------------------------------------------------------

SHOWN = ("noun_translate", "noun_copy", "verb_copy", "country_copy", "velic_to_english", "country_language")


@pytest.fixture(scope="module")
def world() -> HookManager:
    return HookManager.load("testbed")


@pytest.mark.usefixtures("unchecked")  # four tasks: the type checker would take most of the time
def test_functions_of_the_world_go_from_below_a_fifth_to_nearly_always_and_random_heads_do_not(
    world: HookManager,
) -> None:
    tasks, options = world_functions(), ICLOptions(n_trials=12, n_prompts=24, corruption="others")
    names = SHOWN[:4]
    effects = head_effects(world, [tasks[n] for n in names], options=options)
    assert effects.top(1) == [(3, 0)] and set(effects.top(3)) == {(3, 0), (0, 2), (3, 2)}
    for name in names:
        made = function_vector(world, tasks[name], effects=effects, options=options)
        assert made.plot().data and made.choice.shape == (len(made.sizes), 3)
        scores = evaluate_function_vector(world, made, tasks[name], options=options)
        assert scores.accuracy("zero_shot", "none").mean < 0.2, scores.summary()
        assert scores.accuracy("zero_shot").mean >= 0.6, scores.summary()
        assert scores.accuracy("zero_shot", "random heads").mean < 0.35, scores.summary()
        assert scores.accuracy("others").mean > scores.accuracy("others", "none").mean + 0.2


@pytest.mark.slow
@pytest.mark.parametrize("model", ["testbed", "testbed-llama"])
def test_every_function_of_the_world_in_another_wording_and_on_other_inputs(model: str) -> None:
    hm, tasks, options = HookManager.load(model), world_functions(), ICLOptions(corruption="others")
    effects = head_effects(hm, [tasks[n] for n in tasks], options=options)
    gained, random = [], []
    for task in tasks.values():
        made = function_vector(hm, task, effects=effects, options=options)
        scores = evaluate_function_vector(hm, made, task, options=options, templates=[world_templates()[0]])
        none, worded = scores.accuracy("zero_shot", "none").mean, scores.accuracy(world_templates()[0]).mean
        gained.append(scores.accuracy("zero_shot").mean)
        random.append(scores.accuracy("zero_shot", "random heads").mean - none)
        assert gained[-1] >= 0.6 and worded >= 0.6, scores.summary()
    assert sum(g > 0.95 for g in gained) > 0.8 * len(gained) and abs(sum(random)) < 0.15 * len(random)
    # A vector of nouns does its function on verbs, which its prompts had none of.
    made = function_vector(hm, tasks["noun_translate"], heads=effects.top(2), layer=1, options=options)
    scores = evaluate_function_vector(hm, made, tasks["verb_translate"], options=options)
    assert scores.accuracy("zero_shot").mean >= 0.8 > 0.4 > scores.accuracy("zero_shot", "none").mean


@pytest.mark.usefixtures("unchecked")  # a fit of many steps
def test_a_vector_is_rebuilt_from_its_tokens_and_not_from_one_of_them(world: HookManager) -> None:
    tasks, options = world_functions(), ICLOptions(n_prompts=16)
    heads = [(3, 0), (0, 2)]
    made = function_vector(world, tasks["noun_translate"], heads=heads, layer=0, options=options)
    decoded, words = decode_vector(world, made, 8), {y for _, y in tasks["noun_translate"].examples}
    assert sum(t.strip() in words for t in decoded.tokens) >= 4 and torch.all(decoded.probs.diff() <= 0)
    task = tasks["country_language"]
    made = function_vector(world, task, heads=heads, layer=0, options=options)
    cosines, right = [], []
    for k in (100, 1):
        rebuilt = reconstruct_vector(world, made, k)
        torch.testing.assert_close(rebuilt.vector.norm(), made.vector.norm())
        cosines.append(float(torch.cosine_similarity(rebuilt.vector, made.vector, dim=0)))
        right.append(evaluate_function_vector(world, rebuilt, task, n_random=1, options=options).accuracy().mean)
    assert cosines[0] > 0.7 > 0.2 > cosines[1] and right[0] >= 0.6 > 0.2 > right[1], rebuilt.summary()


def test_solved_says_which_prompts_are_answered(world: HookManager) -> None:
    task = world_functions()["noun_plural"]
    split = task.split()
    shown = icl_pairs(split.test, split.train)
    right = solved(world, shown, batch_size=4)
    said = world.run([p.clean.text for p in shown], logits="last").logits[:, 0].argmax(-1)
    wanted = torch.tensor([answers[0][0] for answers in shown.tokens(world).answers])
    assert torch.equal(right, said == wanted) and bool(right.any())
