"""Reads prompts of the small world by regular expressions: what is right to say next, and which combination it is.

An oracle beside the generator: it sees the text alone, and knows the lexicon, the calendar and arithmetic. What it
knows of persons (city, job) it takes from `interp.testbed.world`, which a test holds to what the text says.
"""

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import jaxtyping

from interp.testbed import lexicon, world
from interp.testbed.text import Document, Text
from interp.testbed.words import Case

FEMALE, MALE = set(lexicon.FEMALE), set(lexicon.MALE)
NAMES = FEMALE | MALE
PLURALS = {noun.singular: noun.plural for noun in lexicon.NOUNS}
SINGULARS = {noun.plural: noun.singular for noun in lexicon.NOUNS}
COUNTRIES = {country.name: country for country in lexicon.COUNTRIES}
THIRD = {verb.third: verb.base for verb in lexicon.VERBS}
VELIC = lexicon.velic_words()
ENGLISH = {velic: english for english, velic in VELIC.items()}
PRONOUNS = {"she": 0, "he": 1, "her": 0, "him": 1, "his": 1}
AGREEING = {"is": 0, "are": 1, "was": 0, "were": 1, "has": 0, "have": 1}
LIKED = {"positive", "loved", "glad", "recommend", "success", *lexicon.VALENCED[1]}
DISLIKED = {"negative", "hated", "angry", "avoid", "failure", *lexicon.VALENCED[-1]}
WEEK = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
YEAR = tuple(
    "January February March April May June July August September October November December".split()  # noqa: SIM905
)
COUNTS = {n: i for i, n in enumerate("one two three four five six seven eight nine ten eleven".split(), 1)}  # noqa: SIM905
CLOSING = {"(": ")", "[": "]", "{": "}"}
RELATIONS = ("city", "job", "capital", "language", "continent")


@dataclass(frozen=True)
class Reading:
    """What a prompt says.

    Attributes:
        right: every right next word, its leading space included.
        combination: what decides whether it is held out, its task first.
        one_in: how many combinations one held-out one stands among.
        places: role → the words of the prompt that have it, in order.
        ends_as: role of the answer.
    """

    right: frozenset[str]
    combination: tuple[object, ...]
    places: Mapping[str, list[str]] = field(default_factory=dict)
    ends_as: str = ""
    one_in: int = 8


@functools.cache
def drawn(n: int, task: str | None = None, *, held_out: bool = False) -> tuple[Document, ...]:
    """Documents of the packaged models' training text, or of one task; drawn once for all tests that ask.

    The run-time checker rests meanwhile: it would take most of the time, and smaller draws are made under it.
    """
    with _unchecked():
        return tuple(Text(1, held_out=held_out, tasks=task if task is None else [task]).documents(n))


@functools.cache
def columns(case: Case) -> dict[str, list[int]]:
    """The labels of a passage's words, by label; BOS and EOS are left out."""
    with _unchecked():
        return {name: codes.tolist()[1:-1] for name, codes in Document([case]).labelled().labels.items()}


@contextmanager
def _unchecked() -> Iterator[None]:
    was = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", was)


def read(task: str, prompt: str, template: int = 0) -> Reading:
    """Read a prompt of a task.

    Args:
        task: name of the task.
        prompt: the text before the answer.
        template: number of its frame; where a combination holds the frame, it is told and not read.
    """
    return _READERS[task](prompt, template)


def words_of(text: str) -> list[str]:
    """The words of a text, without signs and numbers."""
    return re.findall(r"[A-Za-z]+", text)


def _one(pattern: str, text: str) -> tuple[str, ...]:
    """The groups of the only match."""
    (match,) = re.finditer(pattern, text)
    return match.groups()


def _said(*words: str) -> frozenset[str]:
    return frozenset(f" {w}" for w in words)


def _ioi(prompt: str, template: int) -> Reading:
    a, b, again = (w for w in words_of(prompt) if w in NAMES)
    io = b if again == a else a
    assert again in (a, b) and a != b
    places = {"io": [io], "s1": [again], "s2": [again]}
    return Reading(_said(io), ("ioi", *sorted((a, b))), places, "io2")


def _pronoun(prompt: str, template: int) -> Reading:
    (name,) = (w for w in words_of(prompt) if w in NAMES)
    end = words_of(prompt)[-1]
    possessive = end in ("in", "with", "loves")
    receives = end in ("to", "see", "like")
    pair = ("her", "his") if possessive else ("her", "him") if receives else ("she", "he")
    return Reading(_said(pair[name in MALE]), ("pronoun", name, template), {"name": [name]}, "pronoun")


def _agreement(prompt: str, template: int) -> Reading:
    subject, attractor = re.findall(r"the ([a-z]+)", prompt)[:2]
    plural = subject in SINGULARS
    perfect, past = prompt.startswith("For a year"), prompt.startswith("Yesterday")
    pair = ("has", "have") if perfect else ("was", "were") if past else ("is", "are")
    key = ("agreement", *(SINGULARS.get(noun, noun) for noun in (subject, attractor)))
    return Reading(_said(pair[plural]), key, {"subject": [subject], "attractor": [attractor]}, "verb")


_REACTIONS = (
    ("Sentiment:", "negative", "positive"),
    ("felt", "angry", "glad"),
    ("will", "avoid", "recommend"),
    ("was a", "failure", "success"),
    ("", "hated", "loved"),
)


def _sentiment(prompt: str, template: int) -> Reading:
    (opinion,) = (w for w in words_of(prompt) if w in LIKED | DISLIKED)
    _, bad, good = next(entry for entry in _REACTIONS if prompt.endswith(entry[0]))
    right = _said(good if opinion in LIKED else bad)
    return Reading(right, ("sentiment", opinion, template), {"opinion": [opinion]}, "reaction", one_in=5)


def _recall(prompt: str, template: int) -> Reading:
    if prompt.startswith("The list is:"):
        entries, asked = _one(r"^The list is: (.*)\. The ([a-z]+) word is$", prompt)
        values = entries.split(", ")
        value = values[("first", "second", "third", "fourth").index(asked)]
        return Reading(_said(value), ("recall", "list", value), {"value": values, "ordinal": [asked]}, "value")
    held = dict(re.findall(r"([A-Z][a-z]+) has the ([a-z]+)", prompt))
    (asked,) = _one(r"\. ([A-Z][a-z]+) has the$", prompt)
    places = {"key": list(held), "value": list(held.values()), "query": [asked]}
    return Reading(_said(held[asked]), ("recall", asked, held[asked]), places, "value")


def _chain(prompt: str, template: int) -> Reading:
    inside = dict(re.findall(r"The ([a-z]+) is in the ([a-z]+)\.", prompt))
    (asked,) = _one(r"to find the ([a-z]+) go to the$", prompt)
    place = inside[inside[asked]]
    return Reading(_said(place), ("chain", asked, place), {"query": [asked]}, "place")


def value_of(relation: str, subject: str) -> str:
    """What is true of a person or a country."""
    if relation == "city":
        return world.lives_in(subject).capital
    return world.works_as(subject) if relation == "job" else str(getattr(COUNTRIES[subject], relation))


def unseen_wording(relation: str, subject: str, held_out: Callable[..., bool]) -> int:
    """Which wording of a fact is kept out of training: the first of three that a checksum chooses, else the fourth."""
    chosen = [i for i in range(3) if held_out("fact", relation, subject, i, one_in=3)]
    return [*chosen, 3][0]


def _fact(prompt: str, template: int) -> Reading:
    relation = RELATIONS[template // 5]
    known = NAMES if template < 10 else COUNTRIES.keys()
    subjects = [w for w in words_of(prompt) if w in known]
    assert len(set(subjects)) == 1
    key = ("fact", relation, subjects[0], template % 5)
    return Reading(_said(value_of(relation, subjects[0])), key, {"subject": subjects}, "value")


def _two_hop(prompt: str, template: int) -> Reading:
    (name,) = (w for w in words_of(prompt) if w in NAMES)
    (country,) = (c for c in lexicon.COUNTRIES if c.capital == value_of("city", name))
    right = country.name if "country" in prompt else country.language
    return Reading(_said(right), ("two_hop", name), {"subject": [name]}, "value")


def _years(prompt: str, template: int) -> Reading:
    century, start, again = _one(r"(\d\d)(\d\d)\D+(\d\d)$", prompt)
    assert century == again
    right = frozenset(f"{year:02d}" for year in range(int(start) + 1, 100))
    places = {"century": [century, century], "start_year": [start]}
    return Reading(right, ("years", int(century) - 11, int(start)), places, "end_year")


def _calendar(prompt: str, template: int) -> Reading:
    later = r"^If it is (?P<start>\w+) now, then in (?P<n>\w+) (?P<unit>\w+) it will be$"
    match = re.fullmatch(r"(?P<n>\w+) (?P<unit>\w+) (?P<way>after|before) (?P<start>\w+) (comes|was)", prompt)
    found = (match or re.fullmatch(later, prompt)).groupdict()  # type: ignore[union-attr]
    cycle = WEEK if found["unit"].startswith("day") else YEAR
    n, start = COUNTS[found["n"]], cycle.index(found["start"])
    assert found["unit"].endswith("s") == (n > 1)
    step = -n if found.get("way") == "before" else n
    key = ("calendar", "days" if cycle is WEEK else "months", template, n, start)
    places = {"count": [found["n"]], "unit": [found["unit"]], "start": [found["start"]]}
    return Reading(_said(cycle[(start + step) % len(cycle)]), key, places, "result")


def _velic(prompt: str, template: int) -> Reading:
    if match := re.fullmatch(r"The Velic word for (\w+) is", prompt):
        base = match[1]
        return Reading(_said(VELIC[base]), ("velic", base, template), {"source": [base]}, "translation")
    if match := re.fullmatch(r"In Velic, (\w+) means", prompt):
        base = ENGLISH[match[1]]
        return Reading(_said(base), ("velic", base, template), {"source": [match[1]]}, "translation")
    if match := re.fullmatch(r"The (\w+) (\w+) (\w+) the (\w+)\. In Velic: (\w+) (\w+) (\w+)", prompt):
        quality, subject, verb, thing, *translated = match.groups()
        assert translated == [VELIC[w] for w in (subject, quality, thing)]
        places = {"source": [quality, subject, verb, thing], "translation": translated}
        return Reading(_said(VELIC[THIRD[verb]]), ("velic", subject, THIRD[verb]), places, "translation")
    source = r"Velic: (\w+) (\w+) (\w+) (\w+)\. English: the (\w+) (\w+)"
    subject, quality, thing, verb, *translated = _one(source, prompt)
    assert translated == [ENGLISH[quality], ENGLISH[subject]]
    (third,) = (third for third, base in THIRD.items() if base == ENGLISH[verb])
    places = {"source": [subject, quality, thing, verb], "translation": translated}
    return Reading(_said(third), ("velic", ENGLISH[subject], ENGLISH[verb]), places, "translation")


def _choice(prompt: str, template: int) -> Reading:
    a, b = _one(r"Options: A (\w+), B (\w+)\.", prompt)
    if match := re.match(r"Where does (\w+) live\?", prompt):
        asked = match[1]
        right = value_of("city", asked)
        key: tuple[str, ...] = (asked,)
    else:
        thing, right, asked = _one(r"The (\w+) is (\w+)\. Which colour is the (\w+)\?", prompt)
        assert thing == asked
        key = (asked, right)
    assert (a == right) != (b == right)
    wrong = b if a == right else a
    right_letter = "A" if a == right else "B"
    return Reading(_said(right_letter), ("choice", *key, wrong), {"query": [asked], "option": [a, b]}, "letter")


_PAIR = (
    r"Q: (\w+)\nA: (\w+)\n",
    r"(\w+) -> (\w+);",
    r"in: (\w+) out: (\w+)\n",
    r"(\w+) = (\w+),",
    r"Input: (\w+)\nOutput: (\w+)\n\n",
    r"(\w+) becomes (\w+)\.",
)
_ASKED = (r"Q: (\w+)\nA:", r" (\w+) ->", r"in: (\w+) out:", r" (\w+) =", r"Input: (\w+)\nOutput:", r" (\w+) becomes")


@functools.cache
def tables() -> tuple[tuple[str, Mapping[str, str]], ...]:
    """Every function of the lists but "copy": its name, and input → output for one kind of input."""
    verbs = [v for v in lexicon.VERBS if v.base not in {a.base for a in lexicon.ADJECTIVES}]
    adjectives = lexicon.ADJECTIVES
    bases = [[n.singular for n in lexicon.NOUNS], [v.base for v in verbs], [a.base for a in adjectives]]
    return (
        ("plural", PLURALS),
        ("category", {n.singular: n.category for n in lexicon.NOUNS}),
        *(("translate", {base: VELIC[base] for base in group}) for group in bases),
        ("past", {v.base: v.past for v in verbs}),
        ("gerund", {v.base: v.gerund for v in verbs}),
        ("third", {v.base: v.third for v in verbs}),
        ("antonym", {a.base: a.antonym for a in adjectives}),
        ("comparative", {a.base: a.comparative for a in adjectives}),
        *((name, {x: value_of(name, x) for x in COUNTRIES}) for name in ("capital", "language", "continent")),
        *((name, {x: value_of(name, x) for x in NAMES}) for name in ("city", "job")),
        ("to_english", ENGLISH),
    )


def list_pairs(prompt: str, template: int) -> tuple[list[tuple[str, str]], str]:
    """The examples of a list, and the input that is asked about."""
    (asked,) = _one(f"{_ASKED[template]}$", prompt)
    return re.findall(_PAIR[template], prompt), asked


def possible(examples: list[tuple[str, str]], asked: str) -> dict[str, str]:
    """The functions that all examples follow, with their outputs for another input."""
    inputs = [x for x, _ in examples] + [asked]
    found = {name: table for name, table in tables() if all(x in table for x in inputs)}
    followed = {name: table[asked] for name, table in found.items() if all(table[x] == y for x, y in examples)}
    copies = all(x == y for x, y in examples) and "antonym" not in found  # adjectives are never copied
    return followed | ({"copy": asked} if copies else {})


def _functions(prompt: str, template: int) -> Reading:
    examples, asked = list_pairs(prompt, template)
    ((name, output),) = possible(examples, asked).items()
    places = {"input": [*(x for x, _ in examples), asked], "output": [y for _, y in examples]}
    return Reading(_said(output), ("functions", name, asked, template), places, "output")


def depths(text: str) -> list[int]:
    """The brackets open after each character; refuses what closes wrongly."""
    stack, found = "", []
    for sign in text:
        if sign in CLOSING:
            stack += CLOSING[sign]
        elif sign in CLOSING.values():
            assert stack[-1] == sign
            stack = stack[:-1]
        found.append(len(stack))
    return found


def _brackets(prompt: str, template: int) -> Reading:
    (signs,) = _one(r"^Close: (.*) =$", prompt)
    stack: list[str] = []
    for sign in signs.split(" "):
        if sign in CLOSING:
            stack.append(CLOSING[sign])
        else:
            assert stack.pop() == sign
    rest = " ".join(stack[::-1])
    places = {kind: [s for s in signs.split(" ") if (s in CLOSING) == (kind == "open")] for kind in ("open", "close")}
    return Reading(_said(stack[-1]), ("brackets", f"{prompt} {rest}."), places, "close")


def _repeat(prompt: str, template: int) -> Reading:
    said = prompt.split(" ")
    period = next(i for i in range(1, len(said)) if said[i] == said[0])
    assert said[period:] == said[:-period]
    return Reading(_said(said[-period]), ("repeat", *said[:period]), {}, "random")


_READERS: dict[str, Callable[[str, int], Reading]] = {
    "ioi": _ioi,
    "fact": _fact,
    "functions": _functions,
    "agreement": _agreement,
    "sentiment": _sentiment,
    "pronoun": _pronoun,
    "years": _years,
    "recall": _recall,
    "chain": _chain,
    "choice": _choice,
    "velic": _velic,
    "calendar": _calendar,
    "two_hop": _two_hop,
    "brackets": _brackets,
    "repeat": _repeat,
}
