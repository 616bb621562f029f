"""Concepts of the small world as texts, with the words that show each: what methods of steering are compared on."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from interp.core.errors import ConfigError, DataError, nearest
from interp.data.concept import Concept
from interp.data.contrast import Contrast
from interp.data.prompt import Prompt
from interp.testbed import lexicon
from interp.testbed.tasks import draw_cases
from interp.testbed.text import label_values
from interp.testbed.words import Case, join

__all__ = ["WORLD_CONCEPTS", "world_concepts", "world_openings"]


class _Kind(NamedTuple):
    """One concept: the label that says it, the tasks whose passages have it, and its words."""

    label: str
    value: str
    tasks: tuple[str, ...]
    others: tuple[str, ...]
    words: tuple[str, ...]
    opposite: tuple[str, ...]


def _of_topic(topic: str, *, other: bool) -> tuple[str, ...]:
    return tuple(w for n in lexicon.NOUNS if (n.topic != topic) == other for w in (n.singular, n.plural))


_SHE, _HE = ("she", "her", *lexicon.FEMALE), ("he", "him", "his", *lexicon.MALE)
_PLURAL = (*(n.plural for n in lexicon.NOUNS if n.plural != n.singular), "are", "were", "have")
_SINGULAR = (*(n.singular for n in lexicon.NOUNS if n.plural != n.singular), "is", "was", "has")

WORLD_CONCEPTS: Mapping[str, _Kind] = {
    "liking": _Kind("sentiment", "positive", ("sentiment",), (), lexicon.VALENCED[1], lexicon.VALENCED[-1]),
    "female": _Kind("gender", "female", ("pronoun",), (), _SHE, _HE),
    "plural": _Kind("number", "plural", ("agreement",), (), _PLURAL, _SINGULAR),
    "Velic": _Kind(
        "language", "Velic", ("velic",), ("agreement", "pronoun", "fact"), tuple(lexicon.velic_words().values()), ()
    ),
    "music": _Kind(
        "topic", "music", ("pronoun", "ioi"), (), _of_topic("music", other=False), _of_topic("music", other=True)
    ),
}
"""The concepts by name: liking, female and plural have an opposite in every passage; Velic is told by single words."""


_OPENING = ("agreement", "pronoun", "sentiment", "ioi", "fact", "years", "two_hop", "chain")
_TOLD = {"gender", "number", "sentiment", "concept"}


def world_concepts(
    names: Sequence[str] = ("liking", "female", "plural", "Velic"), *, n: int = 60, n_held_out: int = 40, seed: int = 0
) -> list[Concept]:
    """Return concepts of the small world as texts with and without them.

    A passage has the concept where every token with its label says so, and lacks it where none does. Passages that say
    both (a singular subject beside a plural thing) are hard negatives where their subject lacks it, else left out. What
    is held out is drawn from combinations that training text never has, where the task keeps any.

    Args:
        names: keys of `WORLD_CONCEPTS`.
        n: texts of either side to fit on.
        n_held_out: texts of either side to judge by.
        seed: of the draw.

    Raises:
        ConfigError: an unknown concept.
        DataError: too few passages of a concept; ask for fewer.
    """
    made = []
    for name in names:
        if name not in WORLD_CONCEPTS:
            hint = nearest(name, WORLD_CONCEPTS) or "there are " + ", ".join(WORLD_CONCEPTS)
            raise ConfigError(f"the small world has no concept {name!r}; {hint}")
        kind, used = WORLD_CONCEPTS[name], set[str]()
        fit, _ = _sides(kind, n, seed=seed, held_out=False, used=used)
        held, hard = _sides(kind, n_held_out, seed=seed, held_out=True, used=used)
        made.append(
            Concept(
                name=name,
                fit=Contrast.make(*fit, paired=False, name=name),
                held_out=Contrast.make(*held, paired=False, name=name),
                hard=tuple(Prompt(text) for text in hard),
                words=kind.words,
                opposite=kind.opposite,
            )
        )
    return made


def world_openings(n: int = 12, *, seed: int = 0) -> list[str]:
    """Return beginnings of passages of several tasks, two or three words that say nothing of any concept: prompts.

    Args:
        n: how many, all different.
        seed: of the draw.

    Raises:
        DataError: more than there are.
    """
    found: dict[str, None] = {}
    for round_ in range(40):
        for task in _OPENING:
            case = draw_cases(task, 1, seed=1000 * seed + round_)[0]
            opening = case.words[: 2 + round_ % 2]
            if not any(set(w.labels) & _TOLD for w in opening):
                found[join(opening)] = None
        if len(found) >= n:
            return list(found)[:n]
    raise DataError(f"there are {len(found)} openings; ask for no more than those")


def _sides(
    kind: _Kind, n: int, *, seed: int, held_out: bool, used: set[str]
) -> tuple[tuple[list[str], list[str]], list[str]]:
    """Texts with and without a concept, each new, and hard negatives, of which there may be none."""
    sides: tuple[dict[str, None], dict[str, None]] = ({}, {})
    hard: dict[str, None] = {}
    code = label_values(kind.label).index(kind.value)
    for task in (*kind.tasks, *kind.others):
        for case in draw_cases(task, 10 * n, seed=seed, held_out=held_out):
            if min(map(len, sides)) >= n and not kind.others and (len(hard) >= n or not held_out):
                break
            text = join(case.words)
            if text in used:
                continue
            says, subject = _said(case, kind.label)
            if task in kind.others or code not in says:
                sides[1][text] = None
            elif says == {code} or kind.others:
                sides[0][text] = None
            elif subject not in (None, code):
                hard[text] = None
    if kind.others:  # as many of each of the other tasks
        sides = (sides[0], dict.fromkeys(list(sides[1])[:: max(1, len(sides[1]) // n)]))
    if min(map(len, sides)) < n:
        raise DataError(
            f"only {[len(s) for s in sides]} passages with and without {kind.value!r}; ask for fewer than {n}"
        )
    chosen = ([*sides[0]][:n], [*sides[1]][:n])
    used.update(chosen[0], chosen[1])
    return chosen, [*hard][:n]


def _said(case: Case, label: str) -> tuple[set[int], int | None]:
    """What the words of a passage say of a label, and what its subject says."""
    subject_role = label_values("role").index("subject")
    start, code = case.since.get(label, (len(case.words), -1))
    says, subject = set[int](), None
    for i, given in enumerate(case.words):
        found = given.labels.get(label, code if i >= start else case.labels.get(label))
        if found is not None:
            says.add(found)
            if given.labels.get("role") == subject_role and subject is None:
                subject = found
    return says, subject
