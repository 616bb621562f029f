"""What is true in the small world: who lives where and does what, and every word as a labelled `Word`."""

import random
from functools import cache

from interp.testbed import lexicon
from interp.testbed.words import Word, word

__all__ = ["PERSONS", "PLACES", "concept", "concepts", "gender_of", "lives_in", "name", "noun", "plain", "works_as"]

PERSONS = lexicon.FEMALE + lexicon.MALE

PLACES = {
    "kitchen": ("restaurant", "kitchen", "market"),
    "school": ("school", "library", "office"),
    "garden": ("park", "garden", "farm"),
    "music": ("theatre", "concert", "club"),
    "sport": ("stadium", "gym", "beach"),
    "travel": ("station", "airport", "harbour"),
}


_SINGULAR = frozenset(entry.singular for entry in lexicon.NOUNS)


@cache
def concepts() -> tuple[str, ...]:
    """Every dictionary word, in order; a token's `concept` label counts in this list."""
    words = [noun.singular for noun in lexicon.NOUNS] + [verb.base for verb in lexicon.VERBS]
    words += [adjective.base for adjective in lexicon.ADJECTIVES]
    words += [*PERSONS, *(c.name for c in lexicon.COUNTRIES), *(c.capital for c in lexicon.COUNTRIES)]
    words += [*(c.language for c in lexicon.COUNTRIES), *(c.continent for c in lexicon.COUNTRIES)]
    words += [place for places in PLACES.values() for place in places]
    words += [*lexicon.JOBS, *lexicon.COLOURS, *lexicon.DAYS, *lexicon.MONTHS, *lexicon.NUMBER_WORDS]
    words += [*lexicon.ORDINALS, *lexicon.CATEGORIES, *lexicon.VALENCED[1], *lexicon.VALENCED[-1]]
    return tuple(dict.fromkeys(words))


@cache
def _concept_index() -> dict[str, int]:
    return {w: i for i, w in enumerate(concepts())}


def concept(base: str) -> int:
    """The number of a dictionary word."""
    return _concept_index()[base]


@cache
def plain(base: str) -> Word:
    """A dictionary word in its base form; a noun's is its singular."""
    return noun(base) if base in _SINGULAR else word(base, {"concept": concept(base)})


@cache
def name(person: str) -> Word:
    """A person's name."""
    return word(person, {"concept": concept(person), "gender": gender_of(person), "role": "name"})


@cache
def noun(singular: str, number: str = "singular") -> Word:
    """A noun in one of its two forms."""
    entry = next(n for n in lexicon.NOUNS if n.singular == singular)
    return word(getattr(entry, number), {"concept": concept(singular), "number": number})


def gender_of(person: str) -> str:
    """A person's gender: a label's value."""
    return "female" if person in lexicon.FEMALE else "male"


@cache
def _facts() -> dict[str, tuple[str, str]]:
    """Person → capital and job, dealt out so that each value has as many persons as any other, give or take one."""
    draw = random.Random("facts")
    cities = [c.capital for c in lexicon.COUNTRIES]
    homes, jobs = (_dealt(values, draw) for values in (cities, list(lexicon.JOBS)))
    return dict(zip(PERSONS, zip(homes, jobs, strict=True), strict=True))


def _dealt(values: list[str], draw: random.Random) -> list[str]:
    hand = [values[i % len(values)] for i in range(len(PERSONS))]
    draw.shuffle(hand)
    return hand


def lives_in(person: str) -> lexicon.Country:
    """The country whose capital a person lives in."""
    return next(c for c in lexicon.COUNTRIES if c.capital == _facts()[person][0])


def works_as(person: str) -> str:
    """A person's job."""
    return _facts()[person][1]
