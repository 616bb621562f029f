"""Contrastive activation addition on the testbed: sentiment steers on held-out prompts, fluently; letters do not help.

The direction is fitted on combinations that training text may hold, read at the word of opinion; what is reported is on
combinations that it never holds.
"""

import pytest
import torch

from interp.core.direction import Direction
from interp.core.manager import HookManager
from interp.core.result import Provenance
from interp.core.where import Where
from interp.data.pairs import PromptPairs
from interp.data.prompt import Pair
from interp.steering.evaluating.ab import ab_evaluation
from interp.steering.evaluating.judges import LocalJudge
from interp.steering.evaluating.lines import random_like
from interp.steering.evaluating.open_ended import OpenEndedOptions, open_ended
from interp.steering.evaluating.sweep import steering_sweep
from interp.steering.evaluating.sweep_options import SweepOptions
from interp.steering.fitting.fit import fit_direction
from interp.testbed.tasks import task_pairs

GOOD = {" positive", " glad", " recommend", " success", " loved"}
SITE = "1.resid_post"


@pytest.fixture(scope="module")
def hm() -> HookManager:
    return HookManager.load("testbed")


def leaning(n: int, *, held_out: bool, seed: int = 0) -> PromptPairs:
    """Sentiment pairs whose clean prompt is the good one, so that every answer leans the same way."""
    pairs = task_pairs("sentiment", n, held_out=held_out, seed=seed)
    return PromptPairs(tuple(p if set(p.answers) <= GOOD else _turned(p) for p in pairs), "good sentiment")


def _turned(pair: Pair) -> Pair:
    return PromptPairs((pair,)).swap(answers=True)[0]


@pytest.fixture(scope="module")
def direction(hm: HookManager) -> Direction:
    return fit_direction(hm, leaning(64, held_out=False), SITE, where=Where(name="opinion"))


@pytest.fixture(scope="module")
def held_out() -> PromptPairs:
    """Good prompts and bad ones, with the good answer wanted for both."""
    pairs = leaning(12, held_out=True)
    return pairs + pairs.swap()


def test_sentiment_steers_on_held_out_prompts_at_a_dose_chosen_on_others(
    hm: HookManager, direction: Direction, held_out: PromptPairs
) -> None:
    said = SweepOptions(
        controls=0, max_new_tokens=8, generate_from=["The film was", "Review: the lesson was"], progress=False
    )
    others = leaning(8, held_out=False, seed=7)
    doses = [-0.5, 0.0, 0.5, 1.0, 2.0]
    best = steering_sweep(hm, direction, others + others.swap(), doses=doses, options=said).best()
    assert best.dose == 1.0, "2 raises the log-odds more, and breaks the text"
    sweep = steering_sweep(hm, direction, held_out, doses=[-0.5, 0.0, 0.5, 1.0], options=said)
    slopes, at = sweep.slopes(), sweep.doses.tolist().index(best.dose)
    assert slopes.mean.low > 2.0 and slopes.anti_steerable.high < 0.1
    assert sweep.estimate(at).low > 2.0
    assert float(sweep.accuracy[1]) == 0.5 and float(sweep.accuracy[at]) > 0.9
    assert not sweep.failed[at] and float(sweep.mean_perplexity[at]) < 2 * float(
        sweep.base_perplexity.log().mean().exp()
    )
    good = ("good", "great", "lovely", "delightful", "charming", "wonderful", "brilliant", "excellent", "perfect")
    assert all(any(word in text for word in good) for text in sweep.texts[at])


def test_random_directions_of_the_same_length_do_not_steer(
    hm: HookManager, direction: Direction, held_out: PromptPairs
) -> None:
    options = SweepOptions(n_generated=0, controls=0, text=["The film was dull."], progress=False)
    doses = [-0.5, 0.5]
    steers = {f"random {seed}": random_like(direction, seed=seed) for seed in range(16)} | {"fitted": direction}
    sweep = steering_sweep(hm, steers, held_out, doses=doses, options=options)
    slopes = torch.tensor([sweep.slopes(name).mean.mean for name in steers])
    null = slopes[:-1]
    # Turning a direction round turns its slope round, so that the mean over random ones is nothing.
    assert abs(float(null.mean())) < 3 * float(null.std()) / len(null) ** 0.5
    assert float(slopes[-1]) > 2 * float(slopes[:-1].abs().max())


def test_generations_are_judged_better_than_unsteered_ones(hm: HookManager, direction: Direction) -> None:
    things = ("film", "lesson", "song", "party", "game", "trip", "story", "play")
    judge = LocalJudge(hm, "{prompt}{text} Sentiment:", yes=" positive", no=" negative", top=1.0)
    options = OpenEndedOptions(max_new_tokens=2, progress=False)
    prompts = [f"Review: the {thing} was" for thing in things]
    found = open_ended(hm, prompts, judge, direction, doses=[-1.0, 0.5, 1.0], options=options)
    best, base = found.chosen(), float(found.overall[0, ~found.chooses].mean())
    assert best.dose == 1.0 and best.score.low > 0.9 > base and not found.missing
    assert float(found.overall[1].mean()) < 0.1, "and the other way round"


def test_the_testbed_answers_choices_with_a_letter_and_prefers_no_option(hm: HookManager) -> None:
    # It learnt the form of these questions, and not their answers: nothing that steers could be held to them.
    found = ab_evaluation(hm, task_pairs("choice", 100, held_out=True))
    record = found.records()[0]
    assert record["mass"] > 0.95 and record["accuracy_low"] < 0.55 and abs(record["log_odds"]) < 0.1


def test_steering_a_letter_shows_as_letter_bias_and_not_as_preference(hm: HookManager) -> None:
    a, b = hm.to_single_token(" A"), hm.to_single_token(" B")
    unembed = hm.model.lm_head.weight.detach()
    letter = Direction({"3.resid_post": unembed[a] - unembed[b]}, method="by hand", model=Provenance.of(hm))
    found = ab_evaluation(hm, task_pairs("choice", 40, held_out=True), letter, doses=[2.0])
    change = found.letter_bias[1] - found.letter_bias[0]
    assert float(change.mean()) > 0.4
    assert float((found.preference[1] - found.preference[0]).mean().abs()) < 0.05 * float(change.mean())
