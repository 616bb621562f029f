"""Facts, multiple choice and induction over words.

Sources: capitals as in Meng et al. (2022), arXiv 2202.05262 (facts as subject, relation, object); lettered options as
in Wiegreffe et al. (2024), arXiv 2407.15018; repeated random words as in Olsson et al. (2022), "In-context Learning and
Induction Heads". Departure: own words and sentences.
"""

import random

from interp.core.errors import DataError
from interp.data.prompt import Pair, Prompt
from interp.data.tasks.bank import Bank
from interp.data.tasks.filling import fill, split_templates
from interp.data.tasks.spec import Drawing, TaskSpec
from interp.data.tasks.words import CAPITALS, CATEGORIES, NOUNS

__all__ = ["CAPITAL", "CHOICE", "INDUCTION"]

_CAPITALS = (
    "The capital of <subject> is",
    "The capital city of <subject> is called",
    "If you travel to <subject>, you should see its capital,",
    "The government of <subject> sits in",
)
_QUESTIONS = (
    "Question: Which of these is <kind>?\n<options>Answer:",
    "Which one is <kind>?\n<options>The answer is",
    "Choose <kind> from this list.\n<options>Choice:",
    "Only one of these is <kind>.\n<options>It is",
)
_LETTERS = ("A", "B", "C", "D")
_SEGMENT = 8


def _capitals(bank: Bank, held_out: bool, corruption: str) -> Drawing:
    countries = bank.whole(CAPITALS, "countries", held_out=held_out)
    capitals = set(bank.whole((CAPITALS[country] for country in countries), "capitals"))
    facts = [(country, CAPITALS[country]) for country in countries if CAPITALS[country] in capitals]

    def draw_pair(draw: random.Random) -> Pair:
        number, template = draw.choice(list(enumerate(_CAPITALS)))
        (subject, right), (other, wrong) = draw.sample(facts, 2)
        sides = [fill(template, {"subject": country}) for country in (subject, other)]
        meta = {"task": "capital", "template": number, "subject": subject}
        meta |= {"held_out": held_out, "corruption": corruption}
        return Pair(sides[0], sides[1], (f" {right}",), (f" {wrong}",), meta)

    return draw_pair


def _choices(bank: Bank, held_out: bool, corruption: str) -> Drawing:
    known = set(bank.whole((w for words in CATEGORIES.values() for w in words), "words to choose from", least=8))
    kinds = {kind: [w for w in words if w in known] for kind, words in CATEGORIES.items() if known.intersection(words)}
    if len(kinds) < len(_LETTERS):
        raise DataError(
            f"multiple_choice needs words of 4 kinds and this tokenizer knows {len(kinds)}; use another task"
        )
    templates = split_templates(_QUESTIONS, held_out)

    def draw_pair(draw: random.Random) -> Pair:
        number, template = draw.choice(templates)
        kind, *others = draw.sample(sorted(kinds), 4)
        right, *options = [draw.choice(kinds[k]) for k in (kind, *others)]
        orders = []
        for at in draw.sample(range(4), 2):
            draw.shuffle(options)
            orders.append([*options[:at], right, *options[at:]])
        sides = [_question(template, kind, order, right) for order in orders]
        answer = _LETTERS[orders[0].index(right)]
        wrong = tuple(f" {letter}" for letter in _LETTERS if letter != answer)
        meta = {"task": "multiple_choice", "template": number, "variant": kind, "letter": answer}
        meta |= {"twin_letter": _LETTERS[orders[1].index(right)], "held_out": held_out, "corruption": corruption}
        return Pair(sides[0], sides[1], (f" {answer}",), wrong, meta)

    return draw_pair


def _question(template: str, kind: str, order: list[str], right: str) -> Prompt:
    lines = "".join(f"<{letter}>. <option{letter}>\n" for letter in _LETTERS)
    words = {"kind": kind} | dict(zip(_LETTERS, _LETTERS, strict=True))
    words |= {f"option{letter}": word for letter, word in zip(_LETTERS, order, strict=True)}
    at = order.index(right)
    names = {letter: "letter" if i == at else None for i, letter in enumerate(_LETTERS)}
    names |= {f"option{letter}": "option" if i == at else None for i, letter in enumerate(_LETTERS)}
    return fill(template.replace("<options>", lines), words, {**names, "kind": None})


def _repeats(bank: Bank, held_out: bool, corruption: str) -> Drawing:
    words = bank.whole(NOUNS, "nouns", least=_SEGMENT + 1, held_out=held_out)

    def draw_pair(draw: random.Random) -> Pair:
        *segment, other = draw.sample(words, _SEGMENT + 1)
        # The last word given again is `at`; what followed it the first time is asked for.
        at = draw.randrange(1, _SEGMENT - 1)
        right = segment[at + 1]
        sides = [_twice([*segment[: at + 1], word, *segment[at + 2 :]], at) for word in (right, other)]
        meta = {"task": "induction", "at": at, "held_out": held_out, "corruption": corruption}
        return Pair(sides[0], sides[1], (f" {right}",), (f" {other}",), meta)

    return draw_pair


def _twice(segment: list[str], at: int) -> Prompt:
    slots = [f"<{i}>" for i in range(len(segment))]
    names = {str(i): {at: "previous", at + 1: "target"}.get(i) for i in range(len(segment))}
    first = fill("Words: " + " ".join(slots), {str(i): w for i, w in enumerate(segment)}, names)
    return Prompt(f"{first.text} {' '.join(segment[: at + 1])}", first.spans)


CAPITAL = TaskSpec(
    "capital",
    "which city is a country's capital; corrupted: another country, whose capital is the foil",
    ("subject",),
    "countries",
    _capitals,
)
CHOICE = TaskSpec(
    "multiple_choice",
    "which of four lettered options is of a kind; foils are the other letters; corrupted: the options in another "
    "order, which gives another letter",
    ("order",),
    "questions",
    _choices,
)
INDUCTION = TaskSpec(
    "induction",
    "what followed a word the first time, in eight random words that begin again; corrupted: something else followed",
    ("target",),
    "words",
    _repeats,
)
