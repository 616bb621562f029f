"""Tasks in sentences about people and things: indirect objects, pronouns, agreement, sentiment, recall, chains."""

import random
from collections.abc import Sequence

from interp.testbed import lexicon, world
from interp.testbed.words import Case, Frame, Task, Word, bare, frames, held_out, until, word

__all__ = ["AGREEMENT", "CHAIN", "IOI", "PRONOUN", "RECALL", "SENTIMENT"]


def _topic(topic: str) -> dict[str, int]:
    return {"topic": lexicon.TOPICS.index(topic)}


def _scene(draw: random.Random) -> tuple[str, dict[str, Word]]:
    """A topic with one of its places and things."""
    topic = draw.choice(lexicon.TOPICS)
    thing = draw.choice([n.singular for n in lexicon.NOUNS if n.topic == topic])
    return topic, {"place": world.plain(draw.choice(world.PLACES[topic])), "object": world.noun(thing)}


# -- indirect objects ---------------------------------------------------------------------------------------------

_IOI = frames(
    "When {a} and {b} went to the {place:place}, {s:s2} gave the {object:object} to {io:!io2}.",
    "Then, {a} and {b} were at the {place:place}. {s:s2} handed the {object:object} to {io:!io2}.",
    "After {a} and {b} left the {place:place}, {s:s2} sent a letter to {io:!io2}.",
    "While {a} and {b} were in the {place:place}, {s:s2} showed the {object:object} to {io:!io2}.",
    "{a} and {b} met at the {place:place}, and {s:s2} offered the {object:object} to {io:!io2}.",
    "Friends {a} and {b} found the {object:object}. At the {place:place} {s:s2} passed it to {io:!io2}.",
    "Yesterday {a} and {b} were at the {place:place}, where {s:s2} read a story to {io:!io2}.",
    "{a} and {b} had a long talk at the {place:place}, and then {s:s2} said goodbye to {io:!io2}.",
    "Because {a} and {b} were late for the {place:place}, {s:s2} lent the {object:object} to {io:!io2}.",
    "At the {place:place} {a} and {b} wanted the {object:object}, so {s:s2} gave it to {io:!io2}.",
    "The {place:place} was empty when {a} and {b} came. {s:s2} told a joke to {io:!io2}.",
    "Once {a} and {b} had the {object:object}, {s:s2} carried it to the {place:place} with {io:!io2}.",
    "In the {place:place} {a} sat beside {b}. Later {s:s2} gave the {object:object} back to {io:!io2}.",
    "{a} saw {b} at the {place:place}. Soon {s:s2} began to speak to {io:!io2}.",
    "Since {a} and {b} like the {place:place}, {s:s2} bought the {object:object} for {io:!io2}.",
)


def _draw_ioi(draw: random.Random, out: bool) -> Case:
    io, s = until(
        lambda: draw.sample(world.PERSONS, 2), lambda pair: held_out("ioi", *sorted(pair)) == out, "pair of names"
    )
    topic, scene = _scene(draw)
    return _ioi(draw.choice(_IOI), draw.choice(("ABBA", "BABA")), (io, s), s, topic, scene, out)


def _ioi(
    frame: Frame, order: str, people: tuple[str, str], s2: str, topic: str, scene: dict[str, Word], out: bool
) -> Case:
    io, s = people
    answer, foil = (io, s) if s2 == s else (s, io)
    first = [world.name(io).having({"role": "io"}), world.name(s).having({"role": "s1"})]
    a, b = first if order == "ABBA" else first[::-1]
    words = frame.fill({"a": a, "b": b, "s": world.name(s2), "io": world.name(answer), **scene})
    state = {"people": people, "s2": s2, "frame": frame, "topic": topic, "scene": scene}
    return Case(
        "ioi", order, frame.index, words, frame.answer, (f" {answer}",), (f" {foil}",), out, _topic(topic), state
    )


def _corrupt_ioi(case: Case, draw: random.Random) -> Case:
    """The other person is the one named again."""
    held = case.state
    io, s = held["people"]
    s2 = io if held["s2"] == s else s
    return _ioi(held["frame"], case.variant, (io, s), s2, held["topic"], held["scene"], case.held_out)


IOI = Task(
    "ioi",
    "indirect objects: of two persons, the one not named again receives something",
    "the two names",
    _draw_ioi,
    _corrupt_ioi,
    _IOI,
    share=12,
)

# -- pronouns -----------------------------------------------------------------------------------------------------

_PRONOUNS = {
    "subject": (word("she", {"gender": "female"}), word("he", {"gender": "male"})),
    "object": (word("her", {"gender": "female"}), word("him", {"gender": "male"})),
    "possessive": (word("her", {"gender": "female"}), word("his", {"gender": "male"})),
}
_PRONOUN = frames(
    "{name:name} went to the {place:place} because {subject:!pronoun} wanted the {object_:object}.",
    "{name:name} lost the {object_:object}, so {subject:!pronoun} was sad.",
    "When {name:name} came home from the {place:place}, {subject:!pronoun} was tired.",
    "{name:name} was happy after {subject:!pronoun} found the {object_:object}.",
    "The {object_:object} is for {name:name}. Please give it to {object:!pronoun}.",
    "{name:name} was at the {place:place}. I did not see {object:!pronoun}.",
    "We know {name:name} well and we like {object:!pronoun}.",
    "{name:name} took the {object_:object} and put it in {possessive:!pronoun} house.",
    "{name:name} went to the {place:place} with {possessive:!pronoun} friend.",
    "Everyone says that {name:name} loves {possessive:!pronoun} work.",
)


def _draw_pronoun(draw: random.Random, out: bool) -> Case:
    person, frame = until(
        lambda: (draw.choice(world.PERSONS), draw.choice(_PRONOUN)),
        lambda pair: held_out("pronoun", pair[0], pair[1].index) == out,
        "name and frame",
    )
    topic, scene = _scene(draw)
    return _pronoun(frame, person, topic, scene, out)


def _pronoun(frame: Frame, person: str, topic: str, scene: dict[str, Word], out: bool) -> Case:
    male = world.gender_of(person) == "male"
    form = next(form for form in _PRONOUNS if form in frame.keys)
    slots = {"name": world.name(person), "place": scene["place"], "object_": scene["object"]}
    words = frame.fill({**slots, **{f: pair[male] for f, pair in _PRONOUNS.items()}})
    right, wrong = (_PRONOUNS[form][male].text, _PRONOUNS[form][not male].text)
    state = {"person": person, "frame": frame, "topic": topic, "scene": scene}
    return Case("pronoun", form, frame.index, words, frame.answer, (right,), (wrong,), out, _topic(topic), state)


def _corrupt_pronoun(case: Case, draw: random.Random) -> Case:
    """A person of the other gender."""
    held = case.state
    others = lexicon.MALE if world.gender_of(held["person"]) == "female" else lexicon.FEMALE
    return _pronoun(held["frame"], draw.choice(others), held["topic"], held["scene"], case.held_out)


PRONOUN = Task(
    "pronoun",
    "gendered pronouns: she, he, her, him, his after a name",
    "the name with the frame",
    _draw_pronoun,
    _corrupt_pronoun,
    _PRONOUN,
    share=9,
    words=tuple(w for pair in _PRONOUNS.values() for w in bare(pair)),
)

# -- subject and verb ---------------------------------------------------------------------------------------------

_AGREEMENT = frames(
    "Today the {subject:subject} {near:preposition} the {attractor:attractor} {present:!verb} {quality:value}.",
    "Yesterday the {subject:subject} {near:preposition} the {attractor:attractor} {past:!verb} {quality:value}.",
    "For a year the {subject:subject} {near:preposition} the {attractor:attractor} {perfect:!verb} been "
    "{quality:value}.",
    "Today the {subject:subject} that {name:name} put {near:preposition} the {attractor:attractor} {present:!verb} "
    "lost.",
    "Yesterday the {subject:subject} that the {attractor:attractor} hid {past:!verb} {quality:value}.",
    "For a year the {subject:subject} of {name:name} and not the {attractor:attractor} {perfect:!verb} been lost.",
)
_NUMBERS = ("singular", "plural")
_VERBS = {
    tense: tuple(word(form, {"number": number}) for form, number in zip(forms, _NUMBERS, strict=True))
    for tense, forms in {"present": ("is", "are"), "past": ("was", "were"), "perfect": ("has", "have")}.items()
}
_PREPOSITIONS = tuple(word(w) for w in ("near", "behind", "under", "beside"))
_COUNTED = tuple(noun.singular for noun in lexicon.NOUNS if noun.singular != noun.plural)


def _draw_agreement(draw: random.Random, out: bool) -> Case:
    subject, attractor = until(
        lambda: draw.sample(_COUNTED, 2), lambda pair: held_out("agreement", *pair) == out, "subject and attractor"
    )
    number, other = draw.choice(_NUMBERS), draw.choice(_NUMBERS)
    slots = {
        "attractor": world.noun(attractor, other),
        "near": draw.choice(_PREPOSITIONS),
        "quality": world.plain(draw.choice(lexicon.ADJECTIVES).base),
        "name": world.name(draw.choice(world.PERSONS)),
    }
    return _agreement(draw.choice(_AGREEMENT), subject, number, other, slots, out)


def _agreement(frame: Frame, subject: str, number: str, other: str, slots: dict[str, Word], out: bool) -> Case:
    tense = next(tense for tense in _VERBS if tense in frame.keys)
    plural = _NUMBERS.index(number)
    verbs = {tense: pair[plural] for tense, pair in _VERBS.items()}
    words = frame.fill({**slots, **verbs, "subject": world.noun(subject, number)})
    right, wrong = _VERBS[tense][plural].text, _VERBS[tense][1 - plural].text
    variant = f"{tense}, attractor {'agrees' if number == other else 'differs'}"
    state = {"frame": frame, "subject": subject, "number": number, "other": other, "slots": slots}
    return Case("agreement", variant, frame.index, words, frame.answer, (right,), (wrong,), out, {}, state)


def _corrupt_agreement(case: Case, draw: random.Random) -> Case:
    """The subject's number is the other one."""
    held = case.state
    number = _NUMBERS[1 - _NUMBERS.index(held["number"])]
    return _agreement(held["frame"], held["subject"], number, held["other"], held["slots"], case.held_out)


AGREEMENT = Task(
    "agreement",
    "the verb agrees with its subject, not with the attractor noun between them",
    "subject with attractor",
    _draw_agreement,
    _corrupt_agreement,
    _AGREEMENT,
    share=9,
    words=(*(w for pair in _VERBS.values() for w in bare(pair)), *bare(_PREPOSITIONS)),
)

# -- sentiment ----------------------------------------------------------------------------------------------------

_SENTIMENT = frames(
    "Review: the {thing:thing} was {opinion:opinion}. Sentiment: {label:!reaction}.",
    "The {thing:thing} was {opinion:opinion}. {name:name} {verb:!reaction} it.",
    "Because the {thing:thing} was {opinion:opinion}, {name:name} felt {mood:!reaction}.",
    "{name:name} thinks that the {thing:thing} is {opinion:opinion}, and so {name:name} will {again:!reaction} it.",
    "Everyone said that the {thing:thing} was {opinion:opinion}. It was a {outcome:!reaction}.",
)
_REACTIONS = {
    "label": ("negative", "positive"),
    "verb": ("hated", "loved"),
    "mood": ("angry", "glad"),
    "again": ("avoid", "recommend"),
    "outcome": ("failure", "success"),
}
_REACTION_WORDS = {
    key: tuple(word(w, {"sentiment": i}) for i, w in enumerate(pair)) for key, pair in _REACTIONS.items()
}
_THINGS = tuple(word(w) for w in ("film", "meal", "hotel", "song", "trip", "game", "story", "show", "party", "lesson"))
_OPINIONS = {
    a: word(a, {"sentiment": "positive" if sign > 0 else "negative", "concept": world.concept(a)})
    for sign in (1, -1)
    for a in lexicon.VALENCED[sign]
}


def _draw_sentiment(draw: random.Random, out: bool) -> Case:
    opinion, frame = until(
        lambda: (draw.choice(list(_OPINIONS)), draw.choice(_SENTIMENT)),
        lambda pair: held_out("sentiment", pair[0], pair[1].index, one_in=5) == out,
        "opinion and frame",
    )
    slots = {"thing": draw.choice(_THINGS), "name": world.name(draw.choice(world.PERSONS))}
    return _sentiment(frame, opinion, slots, out)


def _sentiment(frame: Frame, opinion: str, slots: dict[str, Word], out: bool) -> Case:
    said = _OPINIONS[opinion]
    positive = said.labels["sentiment"]
    kind = next(kind for kind in _REACTIONS if kind in frame.keys)
    reactions = {key: pair[positive] for key, pair in _REACTION_WORDS.items()}
    words = frame.fill({**slots, **reactions, "opinion": said})
    right, wrong = _REACTION_WORDS[kind][positive].text, _REACTION_WORDS[kind][1 - positive].text
    state = {"frame": frame, "opinion": opinion, "slots": slots}
    since = {"sentiment": (next(i for i, w in enumerate(words) if w.text == said.text), positive)}
    return Case("sentiment", kind, frame.index, words, frame.answer, (right,), (wrong,), out, {}, state, since)


def _corrupt_sentiment(case: Case, draw: random.Random) -> Case:
    """The paired statement: an opinion of the opposite sign."""
    held = case.state
    sign = 1 if held["opinion"] in lexicon.VALENCED[-1] else -1
    return _sentiment(held["frame"], draw.choice(lexicon.VALENCED[sign]), held["slots"], case.held_out)


SENTIMENT = Task(
    "sentiment",
    "what follows an opinion has its sign: loved or hated, positive or negative, …",
    "the opinion with the frame",
    _draw_sentiment,
    _corrupt_sentiment,
    _SENTIMENT,
    share=9,
    words=(*(w for pair in _REACTIONS.values() for w in pair), *bare(_THINGS)),
)

# -- recall from a list -------------------------------------------------------------------------------------------

_COUNTS = (2, 3, 4)


def _draw_recall(draw: random.Random, out: bool) -> Case:
    n, by_name = draw.choice(_COUNTS), draw.random() < 0.6
    people, query = draw.sample(world.PERSONS, n), draw.randrange(n)
    things = [n.singular for n in lexicon.NOUNS]
    objects = until(
        lambda: draw.sample(things, n),
        lambda drawn: held_out("recall", people[query] if by_name else "list", drawn[query]) == out,
        "person and thing",
    )
    return _recall(people, objects, query, "by name" if by_name else "by ordinal", out)


def _recall(people: Sequence[str], objects: Sequence[str], query: int, variant: str, out: bool) -> Case:
    entries = [world.noun(o).having({"index": i, "role": "value"}) for i, o in enumerate(objects)]
    if variant == "by name":
        keys = [world.name(p).having({"index": i, "role": "key"}) for i, p in enumerate(people)]
        words: list[Word] = []
        for i, (key, entry) in enumerate(zip(keys, entries, strict=True)):
            words += [*_lead(i, len(keys)), key, *_HAS.fill({}), entry]
        words += [_DOT, world.name(people[query]).having({"role": "query"}), *_HAS.fill({})]
    else:
        words = [*_LIST.fill({})]
        for i, entry in enumerate(entries):
            words += [entry, _COMMA if i < len(entries) - 1 else _DOT]
        ordinal = world.plain(lexicon.ORDINALS[query]).having({"role": "ordinal"})
        words += _ORDINAL.fill({"ordinal": ordinal})
    answer = len(words)
    words += [entries[query].having({"answer": 1, "role": "value"}), _DOT]
    foils = tuple(w.text for i, w in enumerate(entries) if i != query)
    state = {"people": people, "objects": objects, "query": query}
    template = 0 if variant == "by name" else 1
    return Case("recall", variant, template, words, answer, (entries[query].text,), foils, out, {}, state)


_HAS, _LIST, _ORDINAL = frames("has the", "The list is:", "The {ordinal} word is")
_COMMA, _DOT = Word(",", {"role": 0}), Word(".", {"role": 0})
_AND = word("and", {"role": "word"})


def _lead(i: int, n: int) -> list[Word]:
    return [] if i == 0 else [_AND] if n == 2 else [_COMMA, _AND] if i == n - 1 else [_COMMA]


def _corrupt_recall(case: Case, draw: random.Random) -> Case:
    """Another entry of the same list is asked for."""
    held = case.state
    query = draw.choice([i for i in range(len(held["objects"])) if i != held["query"]])
    return _recall(held["people"], held["objects"], query, case.variant, case.held_out)


RECALL = Task(
    "recall",
    "an entry of a list in context, asked for by its owner or its place",
    "the owner, or the list, with the entry",
    _draw_recall,
    _corrupt_recall,
    (_HAS, _LIST, _ORDINAL),
    share=6,
    words=bare([_AND]),
)

# -- chains in context --------------------------------------------------------------------------------------------

_CHAIN = frames(
    "The {thing} is in the {box}. The {box} is in the {place}. The {other} is in the {other_box}. "
    "The {other_box} is in the {other_place}. So to find the {query:query} go to the {answer:!place}.",
    "The {thing} is in the {box}. The {other} is in the {other_box}. The {other_box} is in the {other_place}. "
    "The {box} is in the {place}. So to find the {query:query} go to the {answer:!place}.",
)
_BOXES = tuple(word(w, {"role": "container"}) for w in ("box", "basket", "drawer", "cupboard", "sack", "trunk"))
_ALL_PLACES = tuple(place for places in world.PLACES.values() for place in places)


def _draw_chain(draw: random.Random, out: bool) -> Case:
    things = [n.singular for n in lexicon.NOUNS]
    (thing, other), (place, other_place) = until(
        lambda: (draw.sample(things, 2), draw.sample(_ALL_PLACES, 2)),
        lambda drawn: held_out("chain", drawn[0][0], drawn[1][0]) == out,
        "thing and place",
    )
    boxes = draw.sample(_BOXES, 2)
    return _chain(draw.choice(_CHAIN), (thing, other), (place, other_place), boxes, True, out)


def _chain(
    frame: Frame, things: Sequence[str], places: Sequence[str], boxes: Sequence[Word], first: bool, out: bool
) -> Case:
    wanted = 0 if first else 1
    slots = {
        "thing": world.noun(things[0]).having({"role": "object"}),
        "other": world.noun(things[1]).having({"role": "object"}),
        "place": world.plain(places[0]).having({"role": "place"}),
        "other_place": world.plain(places[1]).having({"role": "place"}),
        "box": boxes[0],
        "other_box": boxes[1],
        "query": world.noun(things[wanted]),
        "answer": world.plain(places[wanted]),
    }
    right, wrong = (f" {places[wanted]}",), (f" {places[1 - wanted]}",)
    state = {"frame": frame, "things": things, "places": places, "boxes": boxes, "first": first}
    return Case("chain", "two links", frame.index, frame.fill(slots), frame.answer, right, wrong, out, {}, state)


def _corrupt_chain(case: Case, draw: random.Random) -> Case:
    """The other thing is asked for."""
    held = case.state
    return _chain(held["frame"], held["things"], held["places"], held["boxes"], not held["first"], case.held_out)


CHAIN = Task(
    "chain",
    "two links in context: the thing named first is in a container, the container in a place",
    "the thing with the place",
    _draw_chain,
    _corrupt_chain,
    _CHAIN,
    share=4,
    words=bare(_BOXES),
)
