"""Pairs of the field's tasks: what each says, under a tokenizer of whole words; splits, corruptions, refusals."""

import functools
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from interp.core.errors import ArtifactError, ConfigError, DataError
from interp.data.pairs import PromptPairs
from interp.data.prompt import Pair, Prompt
from interp.data.tasks import words as lists
from interp.data.tasks.ioi import TEMPLATES
from interp.data.tasks.make import TASKS, make_pairs
from interp.data.tasks.tables import pairs_from_csv
from interp.testbed.model_tasks import model_pairs, model_tasks
from interp.testbed.text import TASKS as WORLD
from interp.testbed.tokenizer import build_tokenizer

PIECES = r" ?[^\W\d_]+| ?\d{1,2}| ?[^\w\s]|\s"


def word_level(texts: list[str]) -> Any:
    """A tokenizer of whole words that knows the words of some texts, each with its leading space."""
    found = [piece for text in texts for piece in re.findall(PIECES, text)]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(["<unk>", " ", *found]))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    return tf.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


def texts_of(pairs: PromptPairs) -> list[str]:
    return [s for e in pairs for s in (e.clean.text, e.corrupted.text, *e.answers, *e.foils)]


def draws() -> list[tuple[str, str, bool]]:
    return [(task, way, out) for task, spec in TASKS.items() for way in spec.corruptions for out in (False, True)]


@functools.cache
def drawn(task: str, way: str, out: bool) -> PromptPairs:
    return make_pairs(task, 60, held_out=out, corruption=way)


@functools.cache
def tokenizer() -> Any:
    every = [text for task, way, out in draws() for text in texts_of(drawn(task, way, out))]
    every += [f" {w}" for name in lists.__all__ for w in getattr(lists, name)]
    return word_level(["the", *every, *(f" {n:02d}" for n in range(100)), *(f"{n:02d}" for n in range(100))])


def words_of(prompt: Prompt, name: str) -> list[str]:
    return [prompt.text[a:b] for a, b in prompt.spans[name]]


@pytest.mark.parametrize(("task", "way", "out"), draws())
def test_pairs_fit_a_tokenizer_of_whole_words(task: str, way: str, out: bool) -> None:
    n = 5 if task == "greater_than" else 15  # its pairs have a hundred answers and foils each
    pairs = make_pairs(task, n, hm=tokenizer(), held_out=out, corruption=way)
    assert len(pairs) == n == len({(e.clean.text, e.corrupted.text) for e in pairs})
    pairs.check(tokenizer())
    made = pairs.tokens(tokenizer())
    assert (made.clean.lengths == made.corrupted.lengths).all()
    assert all(len(ids) == 1 for held in (made.answers, made.foils) for row in held for ids in row)
    assert all(e.meta["task"] == task and e.meta["held_out"] == out and e.meta["corruption"] == way for e in pairs)
    for name in made.clean.spans if task != "multiple_choice" else ():  # the right letter is elsewhere
        assert (made.clean.spans[name] == made.corrupted.spans[name]).all(), f"{name} stands elsewhere"
    assert pairs.examples == make_pairs(task, n, hm=tokenizer(), held_out=out, corruption=way).examples
    assert pairs.examples != make_pairs(task, n, hm=tokenizer(), held_out=out, corruption=way, seed=1).examples


@pytest.mark.parametrize(("task", "way"), [(t, w) for t, spec in TASKS.items() for w in spec.corruptions])
def test_held_out_pairs_share_no_prompt_with_the_others(task: str, way: str) -> None:
    sides = [{e.clean.text for e in drawn(task, way, out)} for out in (False, True)]
    assert not sides[0] & sides[1]
    keys = {"greater_than": "noun", "capital": "subject", "docstring": "answer"}
    key = keys.get(task, "template")
    if task != "induction":
        values = [{e.meta[key] for e in drawn(task, way, out)} for out in (False, True)]
        assert values[0] and values[1] and not values[0] & values[1]


def roles(e: Pair, side: str) -> dict[str, str]:
    prompt: Prompt = getattr(e, side)
    return {name: words_of(prompt, name)[0] for name in prompt.spans}


@pytest.mark.parametrize("way", TASKS["ioi"].corruptions)
def test_ioi_names_the_giver_twice_and_asks_for_the_other(way: str) -> None:
    variants = set()
    for e in drawn("ioi", way, False) + drawn("ioi", way, True):
        clean, corrupted = roles(e, "clean"), roles(e, "corrupted")
        assert (f" {clean['io']}",) == e.answers and (f" {clean['s1']}",) == e.foils
        assert clean["s1"] == clean["s2"] != clean["io"]
        spans = e.clean.spans
        first = "ABBA" if spans["io"][0] < spans["s1"][0] else "BABA"
        assert e.meta["variant"] == first
        variants.add(first)
        assert e.clean.text[spans["s1"][0][1] :].lstrip().startswith(clean["s1+1"]) and clean["s1+1"] != ""
        assert re.search(rf"{clean['s2']} \w+ an? \w+ to$", e.clean.text)
        if way == "flip":
            assert corrupted == {**clean, "s2": clean["io"]}
        elif way == "random_s2":
            assert corrupted["s2"] not in (clean["io"], clean["s1"])
            assert corrupted == {**clean, "s2": corrupted["s2"]}
        else:
            new = [corrupted[name] for name in ("io", "s1", "s2")]
            assert len({*new, clean["io"], clean["s1"]}) == 5
    assert variants == {"ABBA", "BABA"} and len(TEMPLATES) == len(set(TEMPLATES)) >= 15


def test_greater_than_splits_the_years_at_the_start() -> None:
    for e in drawn("greater_than", "first_year", False):
        start = int(words_of(e.clean, "year")[0])
        assert [int(y) for y in e.answers] == list(range(start + 1, 100))
        assert [int(y) for y in e.foils] == list(range(start + 1))
        assert words_of(e.corrupted, "year") == ["01"]
        assert e.clean.text.endswith(f"to the year {words_of(e.clean, 'century')[0]}")
        assert e.corrupted.text == e.clean.text.replace(f"{start:02d} to", "01 to")


@pytest.mark.parametrize("way", TASKS["docstring"].corruptions)
def test_docstrings_go_on_with_the_third_parameter(way: str) -> None:
    for e in drawn("docstring", way, False):
        clean, corrupted = roles(e, "clean"), roles(e, "corrupted")
        assert (f" {clean['C_def']}",) == e.answers
        assert [clean["A_doc"], clean["B_doc"]] == [clean["A_def"], clean["B_def"]]
        assert e.clean.text.count(":param") == 3 and e.clean.text.endswith("\n    :param")
        changed = {name for name in clean if clean[name] != corrupted[name]}
        expected = {"random_answer": {"C_def"}, "random_doc": {"A_doc", "B_doc"}}
        assert changed == expected.get(way, {"C_def", "A_doc", "B_doc"})
        everyone = {*clean.values(), *corrupted.values()} - {clean["C_def"]}
        assert {f.strip() for f in e.foils} == everyone


def test_verbs_and_pronouns_agree_and_the_attractor_does_not() -> None:
    singular, plural = set(lists.PLURALS), set(lists.PLURALS.values())
    for task in ("agreement", "agreement_attractor"):
        for e in drawn(task, "number", False):
            subject, twin = roles(e, "clean"), roles(e, "corrupted")
            many = subject["subject"] in plural
            assert many != (subject["subject"] in singular) and many == (e.meta["variant"] == "plural")
            assert (" are" in e.answers) == many == (" is" in e.foils)
            assert (twin["subject"] in plural) != many
            if task == "agreement_attractor":
                assert (subject["attractor"] in plural) != many and subject["attractor"] == twin["attractor"]
                assert lists.PLURALS.get(subject["attractor"]) != subject["subject"]
    for e in drawn("pronoun", "gender", False):
        women = [roles(e, side)["name"] in lists.FEMALE for side in ("clean", "corrupted")]
        assert women[0] != women[1] and (e.answers == (" she",)) == women[0]
    assert not set(lists.FEMALE) & set(lists.MALE) and not singular & plural


def test_facts_choices_and_repeats_are_what_they_say() -> None:
    for e in drawn("capital", "subject", False):
        countries = [roles(e, side)["subject"] for side in ("clean", "corrupted")]
        assert [f" {lists.CAPITALS[c]}" for c in countries] == [e.answers[0], e.foils[0]]
    letters = set()
    for e in drawn("multiple_choice", "order", False):
        for side, letter in (("clean", e.meta["letter"]), ("corrupted", e.meta["twin_letter"])):
            prompt: Prompt = getattr(e, side)
            options = dict(re.findall(r"^([A-D])\. (\w+)$", prompt.text, re.M))
            right = [key for key, word in options.items() if word in lists.CATEGORIES[str(e.meta["variant"])]]
            assert right == [letter] == words_of(prompt, "letter") and len(set(options.values())) == 4
        assert e.meta["letter"] != e.meta["twin_letter"] and e.answers == (f" {e.meta['letter']}",)
        assert {*e.answers, *e.foils} == {" A", " B", " C", " D"}
        assert sorted(e.clean.text.split()) == sorted(e.corrupted.text.split()), "the same words in another order"
        letters.add(e.meta["letter"])
    assert letters == set("ABCD")
    for one, other in itertools.combinations(lists.CATEGORIES.values(), 2):
        assert not set(one) & set(other), "a word of two kinds makes two options right"
    for e in drawn("induction", "target", False):
        said = e.clean.text.split()
        at = said.index(said[-1])
        assert at < len(said) - 1 and f" {said[at + 1]}" == e.answers[0]
        twin = e.corrupted.text.split()
        assert [i for i, (a, b) in enumerate(zip(said, twin, strict=True)) if a != b] == [at + 1]
        assert f" {twin[at + 1]}" == e.foils[0]


def test_words_that_a_tokenizer_cuts_or_does_not_know_are_left_out() -> None:
    few = ["Mary", "John", "Emma", "Peter", "Lisa", "Paul"]
    scene = [t.replace("<A>", "").replace("<B>", "").replace("<S>", "") for t in TEMPLATES]
    scene = [t.replace("<place>", "park").replace("<thing>", "book") for t in scene]
    known = word_level(["the park book and", *scene, *(f" {name}" for name in few)])
    pairs = make_pairs("ioi", 50, hm=known)
    names = {words_of(e.clean, name)[0] for e in pairs for name in ("io", "s1")}
    assert names == set(few)
    assert {e.meta["template"] % 4 for e in pairs} == {0, 1, 2}
    # A sentence whose words are unknown is left out too.
    fewer = word_level(["the park book and", *(t for i, t in enumerate(scene) if i != 1), *(f" {n}" for n in few)])
    assert 1 not in {e.meta["template"] for e in make_pairs("ioi", 50, hm=fewer)}
    three = word_level(["the park book and", *scene, " Mary", " John", " Emma"])
    with pytest.raises(DataError, match=r"only 3 of \d+ names are one token .* and 5 are needed"):
        make_pairs("ioi", 5, hm=three)
    with pytest.raises(DataError, match="splits no year"):
        make_pairs("greater_than", 5, hm=word_level(["the war siege", *(f" {w}" for w in lists.EVENTS)]))


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'ioi'"):
        make_pairs("io")
    with pytest.raises(ConfigError, match="no corruption 'abd'; expected one of flip, random_s2, abc"):
        make_pairs("ioi", corruption="abd")
    with pytest.raises(ConfigError, match="n is 0"):
        make_pairs("ioi", 0)
    with pytest.raises(DataError, match=r"agreement has only \d+ different pairs here and n is 2000"):
        make_pairs("agreement", 2000)


def test_a_model_says_which_tasks_its_words_allow() -> None:
    world = build_tokenizer()
    assert list(model_tasks(world)) == list(WORLD)
    assert {"ioi", "agreement", "fact", "repeat"} <= set(WORLD)
    assert model_pairs(world, "ioi", 3).examples[0].meta["task"] == "ioi"
    for name in WORLD:
        model_pairs(world, name, 3).check(world)
    with pytest.raises(ConfigError, match="the testbed has no task 'docstring'"):
        model_pairs(world, "docstring", 3)
    assert list(model_tasks(tokenizer())) == list(TASKS)
    assert len(model_pairs(tokenizer(), "docstring", 3)) == 3
    only = word_level(["the In end Now", *(f" {w}" for w in ("is was has are were have", *lists.PLURALS))])
    assert "ioi" not in model_tasks(only)


def test_tables_of_pairs_are_read_by_column_or_by_function(tmp_path: Path) -> None:
    path = tmp_path / "war.csv"
    path.write_text('clean,corrupted,label,note\n"A, b",c d,52,x\ne f,g h,07,y\n', encoding="utf-8-sig")
    pairs = pairs_from_csv(path, answers="label", meta=["note"])
    assert [e.clean.text for e in pairs] == ["A, b", "e f"] and pairs[1].answers == ("07",) and pairs.name == "war"
    assert [e.meta for e in pairs] == [{"note": "x"}, {"note": "y"}] and pairs[0].foils == ()

    def after(row: Any) -> list[str]:
        return [f"{y:02d}" for y in range(int(row["label"]) + 1, 100)]

    swapped = pairs_from_csv(path, clean="corrupted", corrupted="clean", answers=after, foils="label")
    assert swapped[0].answers[0] == "53" and swapped[0].foils == ("52",) and swapped[0].clean.text == "c d"
    with pytest.raises(DataError, match="no column 'lable'; did you mean 'label'"):
        pairs_from_csv(path, answers="lable")
    with pytest.raises(DataError, match="no column 'answer'"):
        pairs_from_csv(path)
    with pytest.raises(KeyError) as caught:
        pairs_from_csv(path, answers=lambda row: row["gone"])
    assert "row 0" in str(caught.value.__notes__)
    with pytest.raises(ArtifactError, match="cannot be read as a table"):
        pairs_from_csv(tmp_path / "none.csv", answers="label")
    path.write_text("clean,corrupted\na,b,c\n")
    with pytest.raises(ArtifactError, match=r"row 0 .* another number of cells"):
        pairs_from_csv(path, answers="clean")
    path.write_text("clean,corrupted\n")
    with pytest.raises(ArtifactError, match="no row below its header"):
        pairs_from_csv(path, answers="clean")
