"""The labels of the small world's tokens, and its split, held to what the passages say when they are read."""

import functools
import re
from collections import defaultdict
from collections.abc import Iterator

import pytest
import torch

from interp.testbed import lexicon, world
from interp.testbed.lists import functions
from interp.testbed.text import TASKS, Document, Text, label_values
from interp.testbed.tokenizer import vocabulary
from interp.testbed.words import LABELS, Case, held_out
from tests.world_reader import (
    AGREEING,
    DISLIKED,
    LIKED,
    NAMES,
    PLURALS,
    PRONOUNS,
    RELATIONS,
    SINGULARS,
    VELIC,
    Reading,
    columns,
    depths,
    drawn,
    list_pairs,
    possible,
    read,
    unseen_wording,
    value_of,
    words_of,
)

DOCUMENTS = {"fact": 900, "functions": 500}
WORDED = [name for name in TASKS if name != "repeat"]
each_task = pytest.mark.parametrize("task", TASKS)
each_part = pytest.mark.parametrize("out", [False, True], ids=["training", "held out"])


@functools.cache
def cases(task: str, out: bool) -> tuple[Case, ...]:
    documents = drawn(DOCUMENTS.get(task, 120) // (2 if out else 1), task, held_out=out)
    return tuple(case for document in documents for case in document.cases)


@functools.cache
def readings(task: str, out: bool) -> tuple[tuple[Case, Reading], ...]:
    """Cases with what their prompts say; random segments of the whole vocabulary are not text, and read elsewhere."""
    found = () if task == "repeat" and not out else cases(task, out)
    return tuple((case, read(task, case.prompt, case.template)) for case in found)


def role_names(case: Case) -> list[str]:
    return [label_values("role")[code] for code in columns(case)["role"]]


def some() -> Iterator[Case]:
    for task in TASKS:
        for out in (False, True):
            yield from cases(task, out)[:50]


def tokens_with(label: str) -> Iterator[tuple[Case, str, str, int]]:
    """Case, bare word, role and code of every token of `some`, but of random ones."""
    for case in some():
        if case.task != "repeat":
            for w, role, code in zip(case.words, role_names(case), columns(case)[label], strict=True):
                yield case, w.text.strip(), role, code


# -- what is asked ----------------------------------------------------------------------------------------------------


@each_part
@each_task
def test_what_the_text_says_is_the_answer(task: str, out: bool) -> None:
    for case, reading in readings(task, out):
        assert frozenset(case.answers) == reading.right, case.text
        assert case.words[case.answer].text in reading.right
        assert case.foils and not reading.right & set(case.foils)
        assert set(case.foils) <= set(vocabulary()) and len(set(case.foils)) == len(case.foils)
        assert columns(case)["answer"][case.answer] == 1


def test_brackets_all_close_in_order_and_nothing_is_left_open() -> None:
    for case in (*cases("brackets", False), *cases("brackets", True)):
        assert depths(case.text)[-1] == 0
        before = depths(case.prompt)
        assert before[-1] > 0 and max(before) <= 4
        assert all(code == 1 for code in columns(case)["answer"][case.answer :])
        assert not any(columns(case)["answer"][: case.answer])


def test_years_end_after_they_begin_in_one_century() -> None:
    for case in (*cases("years", False), *cases("years", True)):
        (begin, end) = re.findall(r"\d{4}", case.text)
        assert begin[:2] == end[:2] and begin[2:] < end[2:]


# -- held out ---------------------------------------------------------------------------------------------------------


@each_part
@pytest.mark.parametrize("task", [name for name in WORDED if name != "fact"])
def test_the_combination_that_a_text_holds_lies_in_its_part(task: str, out: bool) -> None:
    for case, reading in readings(task, out):
        assert reading.combination[0] == task
        assert held_out(*_key(reading), one_in=reading.one_in) == out, case.text
        assert case.held_out == out


def _key(reading: Reading) -> tuple[object, ...]:
    if reading.combination[0] != "repeat":
        return reading.combination
    return ("repeat", *(vocabulary().index(f" {w}") for w in reading.combination[1:]))


@pytest.mark.parametrize("task", WORDED)
def test_no_held_out_combination_occurs_in_training_text(task: str) -> None:
    parts = [{reading.combination for _, reading in readings(task, out)} for out in (False, True)]
    assert all(len(part) >= 4 for part in parts), "every task has both parts"
    assert not parts[0] & parts[1]


def test_training_documents_of_all_tasks_hold_no_held_out_combination() -> None:
    """The stream that models are trained on, not one task's draws."""
    seen: dict[str, int] = defaultdict(int)
    for document in drawn(2000):
        for case in document.cases:
            seen[case.task] += 1
            if case.task not in ("repeat", "fact"):
                reading = read(case.task, case.prompt, case.template)
                assert not held_out(*reading.combination, one_in=reading.one_in), case.text
    assert set(seen) == set(TASKS) and min(seen.values()) > 60


def test_random_segments_are_held_out_by_their_tokens() -> None:
    for out in (False, True):
        for case in cases("repeat", out):
            ids = Document([case]).ids()[1:-1]
            segment = ids[: next(i for i in range(1, len(ids)) if ids[i] == ids[0])]
            assert held_out("repeat", *segment) == out


def test_every_input_that_a_training_list_shows_is_of_training() -> None:
    """Held-out questions too stand after examples from training alone."""
    for out in (False, True):
        for case, reading in readings("functions", out):
            name = reading.combination[1]
            shown, _ = list_pairs(case.prompt, case.template)
            assert not any(held_out("functions", name, x, case.template) for x, _ in shown)


def test_each_fact_has_exactly_one_wording_that_training_lacks() -> None:
    wordings: dict[bool, dict[tuple[str, str], set[str]]] = {False: defaultdict(set), True: defaultdict(set)}
    skeletons: dict[int, set[str]] = defaultdict(set)
    for out in (False, True):
        for case, reading in readings("fact", out):
            _, relation, subject, wording = reading.combination
            value = value_of(str(relation), str(subject))
            skeleton = re.sub(rf"\b{value}\b", "Y", re.sub(rf"\b{subject}\b", "X", case.text))
            wordings[out][str(relation), str(subject)].add(skeleton)
            skeletons[case.template].add(skeleton)
            assert (wording == unseen_wording(str(relation), str(subject), held_out)) == out
    assert all(len(found) == 1 for found in skeletons.values()), "a template is one wording"
    assert len({found for (found,) in map(tuple, skeletons.values())}) == len(skeletons) == 25
    assert len(wordings[True]) > 200 and len(wordings[False]) == 2 * 80 + 3 * 28
    for fact, kept in wordings[True].items():
        assert len(kept) == 1
        assert not kept & wordings[False][fact]
    assert sum(len(found) == 4 for found in wordings[False].values()) > 100, "enough draws to see all four"


def test_every_input_occurs_under_several_functions() -> None:
    under: dict[str, set[str]] = defaultdict(set)
    for case, reading in readings("functions", False):
        examples, asked = list_pairs(case.prompt, case.template)
        for x in (*(x for x, _ in examples), asked):
            under[x].add(str(reading.combination[1]))
    assert len(under) > 300
    assert sum(len(found) >= 2 for found in under.values()) > 0.8 * len(under)
    # Velic words have two functions; everything else has three at least.
    for domain in ("noun", "verb", "adjective", "country", "person", "velic"):
        table = functions(domain)
        assert len(table) >= (2 if domain == "velic" else 3)
        assert len({tuple(outputs) for outputs in table.values()}) == 1, "all have one kind's inputs"
        for x in next(iter(table.values())):
            apart = {name for name in table if any(not held_out("functions", name, x, i) for i in range(6))}
            assert len(apart) >= 2 and under.get(x, set()) <= apart


# -- labels -----------------------------------------------------------------------------------------------------------


def test_every_token_has_every_label_and_codes_have_names() -> None:
    for case in list(some())[::3]:
        document = Document([case])
        found = document.labelled()
        assert found.ids.tolist() == document.ids()
        assert list(found.labels) == list(LABELS)
        for name, codes in found.labels.items():
            assert codes.shape == found.ids.shape and codes.dtype == torch.int64
            assert codes[0] == codes[-1] == -1, "BOS and EOS have no labels"
            values = label_values(name)
            assert int(codes.min()) >= -1 and (not values or int(codes.max()) < len(values))
        inside = {name: codes[1:-1] for name, codes in found.labels.items()}
        for name, code in (("task", list(TASKS).index(case.task)), ("template", case.template)):
            assert set(inside[name].tolist()) == {code}
        assert set(inside["held_out"].tolist()) == {int(case.held_out)}
        assert int(inside["role"].min()) >= 0 and int(inside["answer"].min()) >= 0


def test_every_value_of_every_label_occurs_but_for_rare_words() -> None:
    seen: dict[str, set[int]] = defaultdict(set)
    for case in (*some(), *cases("functions", False)):
        for name, codes in columns(case).items():
            seen[name].update(codes)
    for name in LABELS:
        missing = set(range(len(label_values(name)))) - seen[name]
        assert len(missing) < 0.1 * len(label_values(name)) if name == "concept" else not missing, name


@each_part
@pytest.mark.parametrize("task", WORDED)
def test_roles_are_at_the_words_that_the_text_gives_them(task: str, out: bool) -> None:
    for case, reading in readings(task, out):
        roles = role_names(case)
        assert roles[case.answer] == reading.ends_as
        for role, words in reading.places.items():
            found = [w.text for w, r in zip(case.words[: case.answer], roles, strict=False) if r == role]
            assert [text.removeprefix(" ") for text in found] == words, (role, case.text)


def test_names_and_pronouns_and_nothing_else_have_a_gender() -> None:
    for case, word, role, code in tokens_with("gender"):
        expected = -1
        if word in NAMES:
            expected = int(word in lexicon.MALE)
        elif role == "pronoun":
            expected = PRONOUNS[word]
        assert code == expected, (word, role, case.text)


def test_number_is_that_of_things_and_of_what_agrees_with_them() -> None:
    units = {"day": 0, "days": 1, "month": 0, "months": 1}
    for case, word, role, code in tokens_with("number"):
        if word == "sheep" and role != "word":
            assert code in (0, 1)
            continue
        expected = -1
        if role != "word":
            expected = 0 if word in PLURALS else 1 if word in SINGULARS else units.get(word, -1)
            expected = AGREEING[word] if case.task == "agreement" and role == "verb" else expected
        if case.task == "velic" and word.endswith("s") and word not in PLURALS and role != "word":
            expected = 0  # "walks" stands after a singular subject
        assert code == expected, (word, role, case.text)
    for case, reading in (*readings("agreement", False), *readings("agreement", True)):
        roles, numbers = role_names(case), columns(case)["number"]
        assert numbers[roles.index("subject")] == numbers[case.answer]
        assert numbers[case.answer] == AGREEING[min(reading.right).strip()]


def test_concepts_are_the_words_that_tokens_are_forms_of() -> None:
    forms = {base: {base} for base in label_values("concept")}
    for noun in lexicon.NOUNS:
        forms[noun.singular].add(noun.plural)
    for verb in lexicon.VERBS:
        forms[verb.base] |= {verb.past, verb.gerund, verb.third}
    for adjective in lexicon.ADJECTIVES:
        forms[adjective.base].add(adjective.comparative)
    for base, velic in VELIC.items():
        forms[base].add(velic)
    for case, word, role, code in tokens_with("concept"):
        if code >= 0:
            assert word in forms[label_values("concept")[code]]
        else:
            assert role == "word" or word not in forms, (word, role, case.text)


def test_words_are_of_the_language_that_they_are_written_in() -> None:
    velic = set(VELIC.values())
    for case, word, _, code in tokens_with("language"):
        assert code == (1 if word in velic else 0 if word.isalpha() else -1), (word, case.text)


def test_sentiment_has_the_sign_of_the_opinion_from_the_opinion_on() -> None:
    for case, reading in (*readings("sentiment", False), *readings("sentiment", True)):
        (opinion,) = reading.places["opinion"]
        texts, codes = [w.text.strip() for w in case.words], columns(case)["sentiment"]
        assert (opinion in LIKED) != (opinion in DISLIKED)
        assert (texts[case.answer] in LIKED) == (opinion in LIKED)
        at = texts.index(opinion)
        assert set(codes[:at]) <= {-1} and set(codes[at:]) == {int(opinion in LIKED)}
    others = {code for case, *_, code in tokens_with("sentiment") if case.task != "sentiment"}
    assert others == {-1}


def test_a_passage_is_about_the_topic_of_its_place_and_thing() -> None:
    topic_of = {place: topic for topic, places in world.PLACES.items() for place in places}
    topic_of |= {noun.singular: noun.topic for noun in lexicon.NOUNS}
    for case in (case for task in ("ioi", "pronoun") for case in cases(task, False)):
        roles = role_names(case)
        scene = [w.text.strip() for w, role in zip(case.words, roles, strict=True) if role in ("place", "object")]
        (code,) = set(columns(case)["topic"])
        assert {topic_of[word] for word in scene} <= {label_values("topic")[code]}
    assert {code for case, *_, code in tokens_with("topic") if case.task not in ("ioi", "pronoun")} == {-1}


def test_lists_say_their_function_from_the_first_output_on() -> None:
    for case, reading in (*readings("functions", False), *readings("functions", True)):
        found, roles = columns(case), role_names(case)
        start = roles.index("output")
        code = label_values("function").index(str(reading.combination[1]))
        assert set(found["function"][:start]) == {-1} and set(found["function"][start:]) == {code}
        for role in ("input", "output"):
            pairs = [index for index, r in zip(found["index"], roles, strict=True) if r == role]
            assert pairs == list(range(len(reading.places["input"])))


def test_an_output_is_decided_once_the_pairs_before_leave_one() -> None:
    """After "sheep -> sheep" alone a list may go on with plurals or with copies."""
    ambiguous = 0
    for seed in range(60):
        (case,) = Text(f"sheep {seed}", tasks=["functions"]).document(0).cases
        ambiguous += _check_decided(case)
    for case, _ in readings("functions", False):
        ambiguous += _check_decided(case)
    assert ambiguous > 0, "one list at least opens with a pair of two functions"


def _check_decided(case: Case) -> int:
    examples, asked = list_pairs(case.prompt, case.template)
    inputs = [*(x for x, _ in examples), asked]
    left = [len(set(possible(examples[:i], x).values())) for i, x in enumerate(inputs)]
    decided = [c for c, r in zip(columns(case)["answer"], role_names(case), strict=True) if r == "output"]
    assert decided == [int(n == 1) for n in left], case.text
    assert left[0] > 1 and left[-1] == 1
    return int(left[1] > 1)


def test_depth_counts_the_brackets_that_are_open() -> None:
    for case in (*cases("brackets", False), *cases("brackets", True)):
        found, text, expected = depths(case.text), "", []
        for w in case.words:
            text = (text + w.text).removeprefix(" ")
            expected.append(found[len(text) - 1])
        assert columns(case)["depth"] == expected
    assert {code for case, *_, code in tokens_with("depth") if case.task != "brackets"} == {-1}


@each_part
def test_a_random_segment_comes_back_with_its_period(out: bool) -> None:
    periods = set()
    for case in cases("repeat", out):
        ids, found = Document([case]).ids()[1:-1], columns(case)
        period = next(i for i in range(1, len(ids)) if ids[i] == ids[0])
        assert len(set(ids[:period])) == period and min(ids) >= 6
        assert ids[period:] == ids[:-period]
        assert found["index"] == [i % period for i in range(len(ids))]
        assert found["copy"] == [i // period for i in range(len(ids))]
        # Where the first copy ends cannot be foreseen.
        assert found["answer"] == [int(i > period) for i in range(len(ids))]
        assert period + 2 <= len(ids) <= min(120, 5 * period)
        periods.add(period)
    assert min(periods) <= 5 and max(periods) > 45


# -- what is true -----------------------------------------------------------------------------------------------------


def test_what_stands_before_a_decided_token_decides_it() -> None:
    """Passages that begin alike go on alike where the label says so; one wording begins another, and is known."""
    decided: dict[str, set[str]] = defaultdict(set)
    follows: dict[str, set[str]] = defaultdict(set)
    times: dict[str, int] = defaultdict(int)
    every = [case for task in WORDED for out in (False, True) for case in cases(task, out)]
    for case in (*every, *(case for document in drawn(2000) for case in document.cases)):
        if case.task in ("years", "repeat"):
            continue
        before = ""
        for w in case.words:
            follows[before].add(w.text)
            if w.labels.get("answer") == 1:
                decided[before].add(w.text)
                times[before] += 1
            before += w.text
    assert sum(n > 1 for n in times.values()) > 800, "enough passages begin alike"
    assert all(len(found) == 1 for found in decided.values())
    open_too = {re.sub(r"^ \w+", "X", before) for before, found in decided.items() if follows[before] != found}
    # "Mary lives in Oslo" and "Mary lives in the country of Norway".
    assert open_too == {"X lives in"}


CITY = (
    r"(\w+) lives in (\w+)\.",
    r"The home of (\w+) is in (\w+)\.",
    r"meet (\w+), travel to (\w+)\.",
    r"(\w+) has a house in the city of (\w+)\.",
)
JOB = (
    r"(\w+) (?:works|goes to work) as a (\w+)\.",
    r"The job of (\w+) is (\w+)\.",
    r"Ask (\w+), who is a (\w+)\.",
    r"<\|assistant\|> (\w+) is a (\w+)\.",
)


def test_the_whole_text_agrees_on_where_people_live_and_what_they_do() -> None:
    relations = ("city", "job", "country", "tongue")
    said: dict[str, dict[str, set[str]]] = {relation: defaultdict(set) for relation in relations}
    texts = [document.text for document in drawn(2000)]
    texts += [case.text for task in ("fact", "choice", "two_hop") for out in (False, True) for case in cases(task, out)]
    for text in texts:
        for relation, patterns in (("city", CITY), ("job", JOB)):
            for pattern in patterns:
                for person, value in re.findall(pattern, text):
                    said[relation][person].add(value)
        for person, a, b, letter in re.findall(
            r"Where does (\w+) live\? Options: A (\w+), B (\w+)\. Answer: ([AB])\.", text
        ):
            said["city"][person].add(a if letter == "A" else b)
        for person, value in re.findall(r"(\w+) (?:lives in the country of|is) ([A-Z]\w+)\.", text):
            said["country"][person].add(value)
        for person, value in re.findall(r"(?:neighbours of|At home) (\w+) (?:speak|reads newspapers in) (\w+)\.", text):
            said["tongue"][person].add(value)
    for case, reading in readings("functions", False):
        if reading.combination[1] in ("city", "job"):
            for person, value in list_pairs(case.prompt, case.template)[0]:
                said[str(reading.combination[1])][person].add(value)
    assert said["city"].keys() == said["job"].keys() == NAMES
    for person, values in said["city"].items():
        assert values == {world.lives_in(person).capital}
    for person, values in said["job"].items():
        assert values == {world.works_as(person)}
    countries = {country.capital: country for country in lexicon.COUNTRIES}
    for person in NAMES & said["country"].keys():
        assert said["country"][person] == {countries[min(said["city"][person])].name}
    for person, values in said["tongue"].items():
        assert values == {countries[min(said["city"][person])].language}
    assert len(said["tongue"]) > 70 and len(NAMES & said["country"].keys()) > 70


def test_cities_and_jobs_are_dealt_out_evenly_and_velic_words_differ() -> None:
    for relation, values in (("city", [c.capital for c in lexicon.COUNTRIES]), ("job", list(lexicon.JOBS))):
        counts = [sum(value_of(relation, person) == value for person in NAMES) for value in values]
        assert max(counts) - min(counts) <= 1 and sum(counts) == 80
    assert len(set(VELIC.values())) == len(VELIC)
    assert not set(VELIC.values()) & {word for case in cases("ioi", False) for word in words_of(case.text)}
    assert set(RELATIONS[:2]) == {"city", "job"}
