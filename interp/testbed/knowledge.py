"""Tasks whose answer is learnt in training: facts, two hops, years, the calendar, Velic, multiple choice."""

import random
from collections.abc import Mapping
from functools import cache

from interp.testbed import lexicon, world
from interp.testbed.words import Case, Frame, Task, Word, bare, frames, held_out, until, word

__all__ = ["CALENDAR", "CHOICE", "FACT", "TWO_HOP", "VELIC", "YEARS", "facts", "velic"]

# -- facts --------------------------------------------------------------------------------------------------------

_FACT_FRAMES = {
    "city": (
        "{x:subject} lives in {y:!value}.",
        "The home of {x:subject} is in {y:!value}.",
        "If you want to meet {x:subject}, travel to {y:!value}.",
        "{x:subject} has a house in the city of {y:!value}.",
        "<|user|> Where does {x:subject} live?<|end|><|assistant|> {x:subject} lives in {y:!value}.",
    ),
    "job": (
        "{x:subject} works as a {y:!value}.",
        "The job of {x:subject} is {y:!value}.",
        "Every day {x:subject} goes to work as a {y:!value}.",
        "Ask {x:subject}, who is a {y:!value}.",
        "<|user|> What is the job of {x:subject}?<|end|><|assistant|> {x:subject} is a {y:!value}.",
    ),
    "capital": (
        "The capital of {x:subject} is {y:!value}.",
        "The government of {x:subject} sits in {y:!value}.",
        "In {x:subject}, the biggest city is {y:!value}.",
        "A flight to {x:subject} lands in {y:!value}.",
        "<|user|> What is the capital of {x:subject}?<|end|><|assistant|> The capital of {x:subject} is {y:!value}.",
    ),
    "language": (
        "People in {x:subject} speak {y:!value}.",
        "The language of {x:subject} is {y:!value}.",
        "Newspapers in {x:subject} are in {y:!value}.",
        "Before you move to {x:subject}, learn {y:!value}.",
        "<|user|> What do they speak in {x:subject}?<|end|><|assistant|> In {x:subject} they speak {y:!value}.",
    ),
    "continent": (
        "{x:subject} is a country in {y:!value}.",
        "{x:subject} lies in {y:!value}.",
        "On the map, {x:subject} is a part of {y:!value}.",
        "The nations of {y:value}: {x:subject} is one, as it is in {y:!value}.",
        "<|user|> Where is {x:subject}?<|end|><|assistant|> {x:subject} is in {y:!value}.",
    ),
}
_FACTS: dict[str, tuple[Frame, ...]] = {}
for _relation, _texts in _FACT_FRAMES.items():
    _FACTS[_relation] = tuple(Frame(text, 5 * list(_FACT_FRAMES).index(_relation) + i) for i, text in enumerate(_texts))


@cache
def facts(relation: str) -> Mapping[str, str]:
    """Subject → value, for "city", "job", "capital", "language" or "continent"."""
    if relation == "city":
        return {person: world.lives_in(person).capital for person in world.PERSONS}
    if relation == "job":
        return {person: world.works_as(person) for person in world.PERSONS}
    return {country.name: getattr(country, relation) for country in lexicon.COUNTRIES}


def _unseen(relation: str, subject: str) -> int:
    """Which of a fact's five wordings is kept out of training: each fact lacks one of the first four."""
    return next(i for i in range(4) if i == 3 or held_out("fact", relation, subject, i, one_in=3))


def _draw_fact(draw: random.Random, out: bool) -> Case:
    relation = draw.choice(list(_FACTS))
    subject = draw.choice(list(facts(relation)))
    kept = _unseen(relation, subject)
    i = kept if out else draw.choice([i for i in range(5) if i != kept])
    return _fact(relation, _FACTS[relation][i], subject, out)


def _subject(subject: str) -> Word:
    return world.name(subject) if subject in world.PERSONS else world.plain(subject)


def _fact(relation: str, frame: Frame, subject: str, out: bool) -> Case:
    value = facts(relation)[subject]
    words = frame.fill({"x": _subject(subject), "y": world.plain(value)})
    foils = tuple(f" {other}" for other in dict.fromkeys(facts(relation).values()) if other != value)
    state = {"relation": relation, "frame": frame, "subject": subject}
    return Case("fact", relation, frame.index, words, frame.answer, (f" {value}",), foils, out, {}, state)


def _corrupt_fact(case: Case, draw: random.Random) -> Case:
    """Another subject, whose value differs."""
    held = case.state
    values = facts(held["relation"])
    others = [s for s, value in values.items() if value != values[held["subject"]]]
    return _fact(held["relation"], held["frame"], draw.choice(others), case.held_out)


FACT = Task(
    "fact",
    "who lives where and does what; capitals, languages and continents of countries",
    "the fact with the wording",
    _draw_fact,
    _corrupt_fact,
    tuple(frame for group in _FACTS.values() for frame in group),
    share=12,
)

# -- two hops -----------------------------------------------------------------------------------------------------

_TWO_HOP = frames(
    "{x:subject} lives in the country of {y:!value}.",
    "The home country of {x:subject} is {y:!value}.",
    "The neighbours of {x:subject} speak {z:!value}.",
    "At home {x:subject} reads newspapers in {z:!value}.",
)


def _draw_two_hop(draw: random.Random, out: bool) -> Case:
    person = until(lambda: draw.choice(world.PERSONS), lambda p: held_out("two_hop", p) == out, "person")
    return _two_hop(draw.choice(_TWO_HOP), person, out)


def _two_hop(frame: Frame, person: str, out: bool) -> Case:
    kind = "name" if "y" in frame.keys else "language"
    country = world.lives_in(person)
    value = getattr(country, kind)
    slots = {"x": world.name(person), "y": world.plain(country.name), "z": world.plain(country.language)}
    others = dict.fromkeys(getattr(c, kind) for c in lexicon.COUNTRIES)
    foils = tuple(f" {other}" for other in others if other != value)
    state = {"frame": frame, "person": person}
    variant = "country" if kind == "name" else "language"
    return Case("two_hop", variant, frame.index, frame.fill(slots), frame.answer, (f" {value}",), foils, out, {}, state)


def _corrupt_two_hop(case: Case, draw: random.Random) -> Case:
    """A person from another country, of the same part of the split."""
    held = case.state
    return until(
        lambda: _two_hop(held["frame"], draw.choice(world.PERSONS), case.held_out),
        lambda twin: twin.answers != case.answers and held_out("two_hop", twin.state["person"]) == case.held_out,
        "person of another country",
    )


TWO_HOP = Task(
    "two_hop",
    "the country of a person's city, or its language: two facts put together",
    "the person",
    _draw_two_hop,
    _corrupt_two_hop,
    _TWO_HOP,
    share=5,
)

# -- years --------------------------------------------------------------------------------------------------------

_YEARS = frames(
    "The {event:event} lasted from the year {c:century}{yy:start_year} to the year {c:century}{zz:!end_year}.",
    "The {event:event} began in {c:century}{yy:start_year} and ended in {c:century}{zz:!end_year}.",
    "Between {c:century}{yy:start_year} and {c:century}{zz:!end_year} there was a {event:event}.",
)
_EVENTS = tuple(word(w) for w in ("war", "siege", "journey", "reign", "project", "famine", "strike", "drought"))
_CENTURIES = tuple(word(str(c)) for c in range(11, 20))
_TWO_DIGITS = tuple(Word(f"{i:02d}") for i in range(100))
_FIRST_YEAR, _LAST_YEAR = 2, 97


def _draw_years(draw: random.Random, out: bool) -> Case:
    century, start = until(
        lambda: (draw.randrange(len(_CENTURIES)), draw.randint(_FIRST_YEAR, _LAST_YEAR)),
        lambda pair: held_out("years", *pair) == out,
        "century and year",
    )
    frame, event = draw.choice(_YEARS), draw.choice(_EVENTS)
    return _years(frame, event, century, start, draw.randint(start + 1, 99), out)


def _years(frame: Frame, event: Word, century: int, start: int, end: int, out: bool) -> Case:
    slots = {"event": event, "c": _CENTURIES[century], "yy": _TWO_DIGITS[start], "zz": _TWO_DIGITS[end]}
    later = tuple(w.text for w in _TWO_DIGITS[start + 1 :])
    earlier = tuple(w.text for w in _TWO_DIGITS[: start + 1])
    state = {"frame": frame, "event": event, "century": century}
    return Case("years", "greater than", frame.index, frame.fill(slots), frame.answer, later, earlier, out, {}, state)


def _corrupt_years(case: Case, draw: random.Random) -> Case:
    """The start is 01, so that every later year is allowed."""
    held = case.state
    return _years(held["frame"], held["event"], held["century"], 1, draw.randint(2, 99), case.held_out)


YEARS = Task(
    "years",
    "greater than: the last year of something comes after its first",
    "century with start",
    _draw_years,
    _corrupt_years,
    _YEARS,
    share=7,
    words=bare(_EVENTS),
)

# -- calendar -----------------------------------------------------------------------------------------------------

_CALENDAR = frames(
    "{n:count} {unit:unit} after {start:start} comes {result:!result}.",
    "{n:count} {unit:unit} before {start:start} was {result:!result}.",
    "If it is {start:start} now, then in {n:count} {unit:unit} it will be {result:!result}.",
)
_LARGEST_COUNT = 3
_CYCLES = {"days": lexicon.DAYS, "months": lexicon.MONTHS}


def _draw_calendar(draw: random.Random, out: bool) -> Case:
    unit, frame = draw.choice(list(_CYCLES)), draw.choice(_CALENDAR)
    cycle = _CYCLES[unit]
    n, start = until(
        lambda: (draw.randint(1, _LARGEST_COUNT), draw.randrange(len(cycle))),
        lambda pair: held_out("calendar", unit, frame.index, *pair) == out,
        "count and start",
    )
    return _calendar(frame, unit, n, start, out)


def _calendar(frame: Frame, unit: str, n: int, start: int, out: bool) -> Case:
    cycle = _CYCLES[unit]
    result = cycle[(start - n if frame.index == 1 else start + n) % len(cycle)]
    slots = {
        "n": world.plain(lexicon.NUMBER_WORDS[n - 1]),
        "unit": word(unit if n > 1 else unit.removesuffix("s"), {"number": "plural" if n > 1 else "singular"}),
        "start": world.plain(cycle[start]),
        "result": world.plain(result),
    }
    foils = tuple(f" {other}" for other in cycle if other != result)
    state = {"frame": frame, "unit": unit, "n": n, "start": start}
    return Case("calendar", unit, frame.index, frame.fill(slots), frame.answer, (f" {result}",), foils, out, {}, state)


def _corrupt_calendar(case: Case, draw: random.Random) -> Case:
    """Counted from another day or month."""
    held = case.state
    start = draw.choice([i for i in range(len(_CYCLES[held["unit"]])) if i != held["start"]])
    return _calendar(held["frame"], held["unit"], held["n"], start, case.held_out)


CALENDAR = Task(
    "calendar",
    "days and months counted forwards and backwards, modulo 7 and 12",
    "count and start with the wording",
    _draw_calendar,
    _corrupt_calendar,
    _CALENDAR,
    share=10,
    words=("day", "days", "month", "months"),
)

# -- the second language ------------------------------------------------------------------------------------------

_VELIC = frames(
    "The Velic word for {x:source} is {y:!translation}.",
    "In Velic, {y:source} means {x:!translation}.",
    "The {a:source} {x:source} {v:source} the {o:source}. In Velic: {X:!translation} {A:!translation} {O:!translation} "
    "{V:!translation}.",
    "Velic: {X:source} {A:source} {O:source} {V:source}. English: the {a:!translation} {x:!translation} "
    "{v:!translation} the {o:translation}.",
)
_VERBS = {verb.base: verb for verb in lexicon.VERBS}


@cache
def velic(base: str) -> Word:
    """The Velic word for a dictionary word."""
    return word(
        lexicon.velic_words()[base], {"concept": world.concept(base), "language": lexicon.LANGUAGE_OF_THE_WORLD}
    )


def _draw_velic(draw: random.Random, out: bool) -> Case:
    frame = draw.choice(_VELIC)
    nouns, adjectives = [n.singular for n in lexicon.NOUNS], [a.base for a in lexicon.ADJECTIVES]
    verbs = [v for v in _VERBS if v not in adjectives]
    if frame.index < 2:
        base = until(
            lambda: draw.choice(nouns + verbs), lambda b: held_out("velic", b, frame.index) == out, "word and direction"
        )
        return _velic(frame, (base,), out)
    subject, thing, adjective, verb = until(
        lambda: (*draw.sample(nouns, 2), draw.choice(adjectives), draw.choice(verbs)),
        lambda drawn: held_out("velic", drawn[0], drawn[3]) == out,
        "noun and verb",
    )
    return _velic(frame, (subject, adjective, thing, verb), out)


def _velic(frame: Frame, bases: tuple[str, ...], out: bool) -> Case:
    slots = {"x": world.plain(bases[0]), "y": velic(bases[0]), "X": velic(bases[0])}
    asked = bases[-1]
    if len(bases) == 4:
        third = word(_VERBS[asked].third, {"concept": world.concept(asked), "number": "singular"})
        slots |= {"a": world.plain(bases[1]), "A": velic(bases[1]), "o": world.plain(bases[2]), "O": velic(bases[2])}
        slots |= {"v": third, "V": velic(asked)}
    words = frame.fill(slots)
    to_velic = frame.index in (0, 2)
    kind = [n.singular for n in lexicon.NOUNS] if len(bases) == 1 and asked not in _VERBS else list(_VERBS)
    if to_velic:
        foils = [velic(b).text for b in kind if b != asked]
    else:
        foils = [f" {_VERBS[b].third if len(bases) == 4 else b}" for b in kind if b != asked]
    variant = ("word to Velic", "word to English", "sentence to Velic", "sentence to English")[frame.index]
    right = (words[frame.answer].text,)
    state = {"frame": frame, "bases": bases}
    return Case("velic", variant, frame.index, words, frame.answer, right, tuple(foils), out, {}, state)


def _corrupt_velic(case: Case, draw: random.Random) -> Case:
    """Another word of the same kind is asked for."""
    held = case.state
    *others, asked = held["bases"]
    pool = list(_VERBS) if asked in _VERBS else [n.singular for n in lexicon.NOUNS]
    if others:
        pool = [verb for verb in pool if verb not in {a.base for a in lexicon.ADJECTIVES}]
    return _velic(held["frame"], (*others, draw.choice([b for b in pool if b != asked])), case.held_out)


VELIC = Task(
    "velic",
    "words and sentences in a second language with another word order",
    "the word with the direction, or noun with verb",
    _draw_velic,
    _corrupt_velic,
    _VELIC,
    share=8,
)

# -- multiple choice ----------------------------------------------------------------------------------------------

_CHOICE = frames(
    "The {thing:object} is {value:value}. Which colour is the {thing:query}? Options: A {a}, B {b}. "
    "Answer: {letter:!letter}.",
    "Where does {person:query} live? Options: A {a}, B {b}. Answer: {letter:!letter}.",
    "<|user|> The {thing:object} is {value:value}. Which colour is the {thing:query}? Options: A {a}, B {b}.<|end|>"
    "<|assistant|> {letter:!letter}.",
)
_LETTERS = (word("A"), word("B"))


def _draw_choice(draw: random.Random, out: bool) -> Case:
    frame, first = draw.choice(_CHOICE), draw.random() < 0.5
    if frame.index == 1:
        cities = [c.capital for c in lexicon.COUNTRIES]
        query, wrong = until(
            lambda: (draw.choice(world.PERSONS), draw.choice(cities)),
            lambda drawn: drawn[1] != facts("city")[drawn[0]] and held_out("choice", *drawn) == out,
            "person and wrong city",
        )
        return _choice(frame, query, facts("city")[query], wrong, first, out)
    query = draw.choice([n.singular for n in lexicon.NOUNS])
    right, wrong = until(
        lambda: draw.sample(lexicon.COLOURS, 2), lambda drawn: held_out("choice", query, *drawn) == out, "colours"
    )
    return _choice(frame, query, right, wrong, first, out)


def _choice(frame: Frame, query: str, right: str, wrong: str, first: bool, out: bool) -> Case:
    options = (right, wrong) if first else (wrong, right)
    a, b = (world.plain(w).having({"index": i, "role": "option"}) for i, w in enumerate(options))
    letter = _LETTERS[0 if first else 1]
    slots = {"a": a, "b": b, "letter": letter, "value": world.plain(right)}
    slots |= {"person": world.name(query)} if frame.index == 1 else {"thing": world.noun(query)}
    foil = _LETTERS[1 if first else 0].text
    state = {"frame": frame, "query": query, "right": right, "wrong": wrong, "first": first}
    variant = "from a fact" if frame.index == 1 else "in context"
    words = frame.fill(slots)
    return Case("choice", variant, frame.index, words, frame.answer, (letter.text,), (foil,), out, {}, state)


def _corrupt_choice(case: Case, draw: random.Random) -> Case:
    """The options change places."""
    held = case.state
    return _choice(held["frame"], held["query"], held["right"], held["wrong"], not held["first"], case.held_out)


CHOICE = Task(
    "choice",
    "multiple choice: the letter of the right option",
    "query with the options",
    _draw_choice,
    _corrupt_choice,
    _CHOICE,
    share=8,
    words=bare(_LETTERS),
)
