"""A/B questions and open-ended generation: letter bias cancels exactly, halves choose and score, gaps are counted."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from interp.core.direction import Direction
from interp.core.errors import ConfigError, DataError
from interp.core.manager import HookManager
from interp.core.result import Provenance, Result
from interp.data.ab_questions import ABQuestion, ABQuestions
from interp.data.pairs import PromptPairs
from interp.steering.evaluating.ab import ABResult, ab_evaluation
from interp.steering.evaluating.judges import Judged, LocalJudge, Missing, Verdict, WordJudge
from interp.steering.evaluating.open_ended import OpenEndedOptions, open_ended
from interp.steering.evaluating.open_ended_result import OpenEnded
from interp.testbed.nano import NanoOptions, nano

SITE = "0.resid_post"


@pytest.fixture(scope="module")
def testbed() -> HookManager:
    return HookManager.load("testbed")


def drawn_lines(found: Result) -> list[Any]:
    """The lines of a figure, without what explains them."""
    return [trace for trace in found.plot().data if trace.error_y.array is not None]


def answering(tokenizer: Any, *, letter: float, content: float) -> HookManager:
    """A model whose logit of " A" over " B" is a bias for the letter, and ± one for what the last token says."""
    model: Any = nano(
        NanoOptions(d_vocab=len(tokenizer), n_ctx=64, n_layers=1, d_model=4, n_heads=1, d_head=4, d_mlp=0, norm="none")
    )
    a, b, cat, dog = (tokenizer(t, add_special_tokens=False).input_ids[-1] for t in (" A", " B", " cat", " dog"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight[:, 0] = letter
        model.model.embed_tokens.weight[cat, 1] = content
        model.model.embed_tokens.weight[dog, 1] = -content
        model.lm_head.weight[a, :2] = 1.0
        model.lm_head.weight[b, :2] = 0.0
    return HookManager.load(model, tokenizer)


def questions(n: int = 6) -> PromptPairs:
    """Prompts that end in " cat" where A matches and in " dog" with the options exchanged; every other one turned."""
    pairs = PromptPairs.make(["I see a cat"] * n, ["I see a dog"] * n, [[" A"]] * n, [[" B"]] * n, name="letters")
    turned = pairs.swap(answers=True)
    return PromptPairs(tuple((turned if i % 2 else pairs)[i] for i in range(n)), "letters")


def by_hand(hm: HookManager, vector: Tensor, site: str = SITE) -> Direction:
    return Direction({site: vector}, method="by hand", model=Provenance.of(hm), name="planted")


# -- A/B -----------------------------------------------------------------------------------------------------------


def test_a_model_that_looks_at_the_letter_alone_scores_exactly_chance(testbed: HookManager) -> None:
    hm = answering(testbed.tokenizer, letter=2.5, content=0.0)
    found = ab_evaluation(hm, questions())
    assert (found.preference == 0).all() and (found.right == 0.5).all() and float(found.accuracy[0]) == 0.5
    assert (found.letter_bias == 2.5).all(), "the bias itself is what is left"


@pytest.mark.parametrize("letter", [0.0, 4.0])
def test_a_preference_for_the_content_comes_back_whatever_the_letter(testbed: HookManager, letter: float) -> None:
    hm = answering(testbed.tokenizer, letter=letter, content=1.5)
    found = ab_evaluation(hm, questions())
    torch.testing.assert_close(found.preference, torch.full((1, 6), 1.5))
    torch.testing.assert_close(found.letter_bias, torch.full((1, 6), letter))
    assert float(found.accuracy[0]) == (1.0 if letter == 0 else 0.5), "a strong letter still wins one order"
    others = len(testbed.tokenizer) - 2
    one_order = math.exp(letter + 1.5) + 1, math.exp(letter - 1.5) + 1
    expected = sum(p / (p + others) for p in one_order) / 2
    assert float(found.mass.mean()) == pytest.approx(expected, rel=1e-3)


def test_steering_a_letter_moves_the_bias_and_no_preference(testbed: HookManager, tmp_path: Path) -> None:
    hm = answering(testbed.tokenizer, letter=0.5, content=1.0)
    towards_a, towards_cat = torch.tensor([1.0, 0, 0, 0]), torch.tensor([0, 0, 1.0, 0])
    doses = [-1.0, 0.0, 2.0]
    both = {"letter": by_hand(hm, towards_a), "nothing": by_hand(hm, towards_cat)}
    found = ab_evaluation(hm, questions(), both, doses=doses, batch_size=7)
    cells = [i for i, name in enumerate(found.steers) if name == "letter"]
    torch.testing.assert_close(found.preference[cells], torch.ones(3, 6))
    torch.testing.assert_close(found.letter_bias[cells], 0.5 + torch.tensor(doses)[:, None].expand(3, 6))
    alone = [i for i, name in enumerate(found.steers) if name == "nothing"]
    assert (found.log_odds[alone] == found.log_odds[0]).all()
    assert len(found.to_frame()) == 7 and found.steers[0] == "unsteered" and len(drawn_lines(found)) == 2
    back = Result.load(found.save(tmp_path / "ab"))
    assert isinstance(back, ABResult) and back.summary() == found.summary()


def test_questions_are_asked_up_to_the_letter_in_the_chat_template(testbed: HookManager) -> None:
    asked = ABQuestions(
        [
            ABQuestion("The shirt is black. Which colour?\n(A) black\n(B) pink", "A", "B"),
            ABQuestion("Where does Felix live?\n(A) Oslo\n(B) Tokyo", "B", "A"),
        ],
        name="facts",
    )
    found = ab_evaluation(testbed, asked, answer=" {letter}")
    a, b = (testbed.to_single_token(letter) for letter in (" A", " B"))
    for order, form in enumerate((asked, asked.swapped())):
        for i, question in enumerate(form):
            tokens = testbed.chat([{"role": "user", "content": question.question}])
            logits = testbed.run(tokens, logits="last").logits[0, 0]
            odds = float(logits[a] - logits[b]) * (1 if question.matching == "A" else -1)
            assert float(found.log_odds[0, order, i]) == pytest.approx(odds, abs=1e-3)
            mass = float(logits.softmax(0)[[a, b]].sum())
            assert float(found.mass[0, order, i]) == pytest.approx(mass, abs=1e-4)
    assert found.first.tolist() == [1.0, -1.0]


def test_what_is_no_ab_question_is_refused(testbed: HookManager) -> None:
    several = PromptPairs.make(["I see a cat"], ["I see a dog"], [[" A", " C"]], [[" B"]])
    with pytest.raises(DataError, match="several answers"):
        ab_evaluation(testbed, several)
    flat = ABQuestions([ABQuestion("Which? (A) x", "A", "B")])
    with pytest.raises(DataError, match="not found once"):
        ab_evaluation(testbed, flat)
    with pytest.raises(DataError, match="nothing steers"):
        ab_evaluation(testbed, questions(2)).plot()


# -- open-ended ----------------------------------------------------------------------------------------------------


def scored(scores: Tensor, chooses: Sequence[bool]) -> OpenEnded:
    """A result with given scores [aspect cell prompt]; the cells are the model alone and doses 1, 2, …"""
    _, cells, n = scores.shape
    return OpenEnded(
        provenance=Provenance("none"),
        steers=["unsteered", *["v"] * (cells - 1)],
        sites=["", *[SITE] * (cells - 1)],
        doses=torch.arange(cells).float(),
        unit="raw",
        control=torch.zeros(cells, dtype=torch.bool),
        aspects=[f"aspect {i}" for i in range(len(scores))],
        scores=scores,
        missing={},
        chooses=torch.tensor(chooses),
        perplexity=torch.ones(cells, n),
        prompts=[str(i) for i in range(n)],
        texts=[[""] * n] * cells,
    )


def test_one_half_of_the_prompts_chooses_and_the_other_scores() -> None:
    nan = math.nan
    scores = torch.tensor([[[2.0, 2.0, 2.0, 2.0], [1.5, 0.5, 0.2, nan], [0.5, 0.5, 1.0, 1.0]]])
    found = scored(scores, [True, True, False, False])
    best = found.chosen()
    assert best.dose == 1.0, "the half that chooses prefers dose 1, though dose 2 is better on the other half"
    assert best.chosen_score.mean == pytest.approx(1.0) and best.score.mean == pytest.approx(0.2)
    assert best.missing == 1
    turned = replace(found, chooses=torch.tensor([False, False, True, True])).chosen()
    assert turned.dose == 2.0 and turned.score.mean == pytest.approx(0.5)
    (line,) = drawn_lines(found)
    assert line.x == (0.0, 1.0, 2.0) and line.y[0] == 2.0, "the model alone stands at dose 0"


def test_a_missing_aspect_makes_the_score_missing_not_zero() -> None:
    nan = math.nan
    both = torch.tensor([[[1.0, 2.0, 0.0, nan]], [[1.0, 1.0, 2.0, 2.0]]])
    overall = scored(both.expand(2, 2, 4), [True, False, True, False]).overall
    assert overall[0, :3].tolist() == pytest.approx([1.0, 4 / 3, 0.0]) and overall[0, 3].isnan()


def test_texts_of_every_dose_are_judged_with_their_prompts(testbed: HookManager, tmp_path: Path) -> None:
    seen: list[Judged] = []

    def judge(items: Sequence[Judged]) -> list[Verdict]:
        seen.extend(items)
        return [Missing("refused") if item.prompt == "The lesson" else float(len(item.text)) for item in items]

    prompts = ["The film was", "The lesson", "Review: the", "Because the game was"]
    direction = by_hand(testbed, 10 * torch.randn(testbed.d_model), "1.resid_post")
    options = OpenEndedOptions(max_new_tokens=3, progress=False, controls=1)
    found = open_ended(testbed, prompts, judge, direction, doses=[0.0, 3.0], options=options)
    assert found.scores.shape == (1, 5, 4) and found.texts[1] == found.texts[0], "a dose of 0 says the same"
    assert [(j.prompt, j.text) for j in seen] == [
        (prompt, text) for texts in found.texts for prompt, text in zip(prompts, texts, strict=True)
    ]
    assert found.missing == {"score: refused": 5} and found.scores[0, :, 1].isnan().all()
    assert int(found.chooses.sum()) == 2
    table = found.to_frame()
    assert (table["missing"] == 1).all() and found.control.tolist() == [False, False, False, True, True]
    assert "5 of 20 scores" in found.summary() and [line.x for line in drawn_lines(found)] == [(0.0, 3.0)] * 2
    back = Result.load(found.save(tmp_path / "open"))
    assert isinstance(back, OpenEnded) and back.summary() == found.summary()


def test_a_local_model_judges_by_the_odds_of_its_answer(testbed: HookManager) -> None:
    judge = LocalJudge(testbed, "{prompt}{text} Sentiment:", yes=" positive", no=" negative", top=1.0)
    items = [Judged("Review: the film was", " wonderful."), Judged("Review: the film was", " boring.")]
    scores = judge(items)
    assert scores[0] > 0.9 and scores[1] < 0.1  # type: ignore[operator]
    logits = testbed.run("Review: the film was wonderful. Sentiment:", logits="last").logits[0, 0]
    both = logits[[judge.yes, judge.no]].softmax(0)
    assert scores[0] == pytest.approx(float(both[0]), abs=1e-5)


@pytest.mark.usefixtures("unchecked")
def test_bad_calls_are_refused(testbed: HookManager) -> None:
    direction = by_hand(testbed, torch.ones(testbed.d_model), "1.resid_post")
    with pytest.raises(ConfigError, match="give a judge"):
        open_ended(testbed, ["The film"], {}, direction, doses=[1.0])
    with pytest.raises(ConfigError, match="choose another name"):
        open_ended(testbed, ["The film"], WordJudge(["x"]), {"unsteered": direction}, doses=[1.0])
    with pytest.raises(ConfigError, match=r"expected '\{text\}'"):
        LocalJudge(testbed, "no place")
    with pytest.raises(DataError, match="two at least"):
        scored(torch.ones(1, 2, 1), [False]).chosen()
