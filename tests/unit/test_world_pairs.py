"""Examples and pairs of the small world's tasks: both prompts of a pair are read, and each has its own right answer."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from interp.core.errors import ConfigError
from interp.data.pairs import PromptPairs
from interp.testbed.tasks import case_tokens, draw_cases, task_pairs, token_ids
from interp.testbed.text import TASKS, Document, label_values
from interp.testbed.tokenizer import build_tokenizer, vocabulary
from interp.testbed.words import Case
from tests.world_reader import MALE, NAMES, columns, read, words_of

N = 12
each_task = pytest.mark.parametrize("task", TASKS)
each_part = pytest.mark.parametrize("held_out", [False, True], ids=["training", "held out"])


@functools.cache
def tokenizer() -> Any:
    return build_tokenizer()


@functools.cache
def pairs(task: str, held_out: bool = True) -> PromptPairs:
    return task_pairs(task, N, held_out=held_out)


def shown(ids: torch.Tensor) -> list[str]:
    return [vocabulary()[i].removeprefix(" ") for i in ids.tolist()]


# -- pairs ------------------------------------------------------------------------------------------------------------


@each_part
@each_task
def test_no_pair_has_a_problem_under_the_tokenizer(task: str, held_out: bool) -> None:
    assert pairs(task, held_out).problems(tokenizer()) == []
    made = pairs(task, held_out).tokens(tokenizer())
    assert torch.equal(made.clean.lengths, made.corrupted.lengths)
    assert bool((made.clean.ids != made.corrupted.ids).any(1).all())
    assert all(len(ids) == 1 for row in (*made.answers, *made.foils) for ids in row), "answers are one token each"


@each_part
@each_task
def test_both_prompts_of_a_pair_have_the_answers_that_they_say(task: str, held_out: bool) -> None:
    for pair in pairs(task, held_out):
        clean, corrupted = (
            read(task, prompt.text, int(pair.meta["template"])) for prompt in (pair.clean, pair.corrupted)
        )
        assert clean.right == set(pair.answers)
        assert clean.right != corrupted.right
        assert pair.foils and not clean.right & set(pair.foils)
        if task != "years":  # there every year up to the start is a foil, and the twin's start is 01
            assert corrupted.right == set(pair.foils)
        else:
            start = min(int(year) for year in pair.answers)
            assert set(pair.foils) == {f"{year:02d}" for year in range(start)}
            assert corrupted.right == {f"{year:02d}" for year in range(2, 100)}
        if task == "fact":
            assert clean.combination[1] == corrupted.combination[1]


@each_task
def test_the_twin_differs_as_little_as_its_task_says(task: str) -> None:
    """Tokens in which the two prompts differ: the name named again, one bracket, the subject, …"""
    most = {"ioi": 1, "pronoun": 1, "agreement": 1, "sentiment": 1, "years": 1, "calendar": 1, "recall": 1}
    most |= {"chain": 1, "brackets": 1, "choice": 2, "two_hop": 1, "fact": 2}
    made = pairs(task).tokens(tokenizer())
    differ = (made.clean.ids != made.corrupted.ids).sum(1)
    assert int(differ.min()) >= 1
    if task in most:
        assert int(differ.max()) <= most[task]


def test_the_twins_are_what_their_tasks_say() -> None:
    for pair in pairs("ioi"):
        names = [[w for w in words_of(side.text) if w in NAMES] for side in (pair.clean, pair.corrupted)]
        assert names[0][:2] == names[1][:2] and {names[0][2], names[1][2]} == set(names[0][:2])
    for pair in pairs("pronoun"):
        genders = [[w in MALE for w in words_of(side.text) if w in NAMES] for side in (pair.clean, pair.corrupted)]
        assert genders[0] == [not male for male in genders[1]]
    for pair in pairs("two_hop"):
        assert all(read("two_hop", side.text).combination[0] == "two_hop" for side in (pair.clean, pair.corrupted))
    for pair in pairs("functions"):
        templates = int(pair.meta["template"])
        clean, corrupted = (read("functions", side.text, templates) for side in (pair.clean, pair.corrupted))
        assert clean.places["input"] == corrupted.places["input"]
        assert clean.combination[1] != corrupted.combination[1]


@each_part
@each_task
def test_spans_hold_the_words_of_their_roles(task: str, held_out: bool) -> None:
    made, examples = pairs(task, held_out).tokens(tokenizer()), pairs(task, held_out)
    for row, pair in enumerate(examples):
        for tokens, prompt in ((made.clean, pair.clean), (made.corrupted, pair.corrupted)):
            reading = read(task, prompt.text, int(pair.meta["template"]))
            found = {role: shown(tokens.ids[row][mask[row]]) for role, mask in tokens.spans.items() if mask[row].any()}
            for role, words in reading.places.items():
                # The twin of indirect objects keeps the first mentions' names, so that positions correspond.
                if task == "ioi" and prompt is pair.corrupted:
                    continue
                assert found.pop(role, []) == words, (role, prompt.text)
            assert found.pop("end") == [shown(tokens.ids[row][tokens.mask[row]])[-1]]
            assert set(found) <= set(label_values("role")) - {"word", "separator", "random"}


def test_spans_are_the_labels_of_the_cases() -> None:
    """Every named role, at the very positions that the labels give it."""
    for task in TASKS:
        made = pairs(task).tokens(tokenizer())
        for row, case in enumerate(draw_cases(task, N)):
            roles = [label_values("role")[code] for code in columns(case)["role"][: case.answer]]
            for role, mask in made.clean.spans.items():
                places = mask[row].nonzero()[:, 0].tolist()
                expected = [len(roles)] if role == "end" else [i + 1 for i, r in enumerate(roles) if r == role]
                assert places == expected, (task, role)


@each_task
def test_pairs_are_the_same_for_the_same_seed_and_no_other(task: str) -> None:
    same, other = task_pairs(task, 6, seed=3), task_pairs(task, 6, seed=4)
    assert task_pairs(task, 6, seed=3) == same
    assert same != other and same.clean != task_pairs(task, 6, seed=3, held_out=False).clean
    assert task_pairs(task, 4, seed=3).clean == same.clean[:4], "more pairs keep those that there were"


@each_task
def test_pairs_come_back_from_disk(task: str, tmp_path: Path) -> None:
    path = pairs(task).save(tmp_path / "pairs.json")
    assert PromptPairs.load(path) == pairs(task)


def test_meta_says_where_a_pair_is_from() -> None:
    found = pairs("ioi")
    assert found.name == "ioi" and set(found.group("variant")) == {"ABBA", "BABA"}
    for pair, case in zip(found, draw_cases("ioi", N), strict=True):
        expected = {"task": "ioi", "variant": case.variant, "template": case.template, "held_out": True}
        assert pair.meta == expected and pair.clean.text == case.prompt


# -- cases ------------------------------------------------------------------------------------------------------------


@each_part
@each_task
def test_cases_that_are_asked_lie_in_their_part_and_can_be_read(task: str, held_out: bool) -> None:
    encode = tokenizer()
    for case in draw_cases(task, N, held_out=held_out):
        assert case.held_out == held_out and case.task == task
        assert encode(case.text).input_ids == Document([case]).ids()[:-1]
        assert len(set(case.foils)) == len(case.foils) and not set(case.foils) & set(case.answers)
        assert frozenset(case.answers) == read(task, case.prompt, case.template).right


@each_task
def test_prompts_end_before_their_answers(task: str) -> None:
    found = draw_cases(task, 8)
    tokens, whole = case_tokens(found), case_tokens(found, whole=True)
    assert tokens.bos and bool((tokens.ids[:, 0] == 0).all()) and bool((tokens.ids[~tokens.mask] == 2).all())
    for case, row, mask, ids, real in zip(found, tokens.ids, tokens.mask, whole.ids, whole.mask, strict=True):
        assert row[mask].tolist() == tokenizer()(case.prompt).input_ids
        assert ids[real].tolist() == Document([case]).ids()[:-1]
        assert int(ids[int(mask.sum())]) in token_ids(case.answers).tolist()


def test_cases_are_the_same_for_the_same_seed() -> None:
    def texts(found: list[Case]) -> list[str]:
        return [case.text for case in found]

    assert texts(draw_cases("velic", 5, seed=1)) == texts(draw_cases("velic", 9, seed=1))[:5]
    assert texts(draw_cases("velic", 5, seed=1)) != texts(draw_cases("velic", 5, seed=2))


def test_tokens_of_texts_are_those_of_the_vocabulary() -> None:
    texts = [" Mary", "42", " (", ".", " 7"]
    assert [vocabulary()[i] for i in token_ids(texts).tolist()] == texts
    assert token_ids([]).tolist() == []


def test_what_cannot_be_drawn_is_refused() -> None:
    for draw in (draw_cases, task_pairs):
        with pytest.raises(ConfigError, match="no task 'agreemnt'; did you mean 'agreement'"):
            draw("agreemnt", 3)
        with pytest.raises(ConfigError, match="n is 0; at least one example is needed"):
            draw("ioi", 0)
