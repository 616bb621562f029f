"""Pairs of words of the small world that differ in one concept, each a token with its leading space."""

from interp.testbed import lexicon

__all__ = ["world_word_pairs"]


def world_word_pairs() -> dict[str, tuple[tuple[str, str], ...]]:
    """Return concept → pairs of tokens, such as "singular - plural" → ((" cake", " cakes"), …).

    Words without a form of their own (sheep) are left out, and antonyms stand in one order each, which nothing decides:
    they share no direction. Languages of countries repeat, capitals do not.
    """
    velic = lexicon.velic_words()
    nouns, verbs, adjectives, countries = lexicon.NOUNS, lexicon.VERBS, lexicon.ADJECTIVES, lexicon.COUNTRIES
    tables = {
        "singular - plural": [(n.singular, n.plural) for n in nouns],
        "verb - past": [(v.base, v.past) for v in verbs],
        "verb - gerund": [(v.base, v.gerund) for v in verbs],
        "verb - third person": [(v.base, v.third) for v in verbs],
        "adjective - comparative": [(a.base, a.comparative) for a in adjectives],
        "adjective - antonym": [(a.base, a.antonym) for a in adjectives],
        "noun - Velic": [(n.singular, velic[n.singular]) for n in nouns],
        "verb - Velic": [(v.base, velic[v.base]) for v in verbs],
        "adjective - Velic": [(a.base, velic[a.base]) for a in adjectives],
        "country - capital": [(c.name, c.capital) for c in countries],
        "country - language": [(c.name, c.language) for c in countries],
        "he - she": [("he", "she"), ("him", "her"), ("his", "her")],
    }
    made: dict[str, tuple[tuple[str, str], ...]] = {}
    for name, table in tables.items():
        kept: dict[tuple[str, str], None] = {}
        for a, b in table:
            if a != b and (f" {b}", f" {a}") not in kept:
                kept[f" {a}", f" {b}"] = None
        made[name] = tuple(kept)
    return made
