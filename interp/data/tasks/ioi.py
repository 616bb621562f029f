"""Indirect object identification: "When Mary and John met at the park, John gave a book to" → " Mary".

Source: the task, its roles and its two corruptions as in Wang et al. (2022), arXiv 2211.00593, §2 and appendix A.
Departure: the sentences are this library's own.
"""

import random

from interp.data.prompt import Pair, Prompt
from interp.data.tasks.bank import Bank
from interp.data.tasks.filling import fill, following, split_templates
from interp.data.tasks.spec import Drawing, TaskSpec
from interp.data.tasks.words import FEMALE, MALE, PLACES, THINGS

__all__ = ["IOI", "TEMPLATES"]

TEMPLATES = (
    "While <A> and <B> were waiting at the <place>, <S> handed a <thing> to",
    "After <A> and <B> met at the <place>, <S> gave a <thing> to",
    "Yesterday <A> and <B> walked to the <place>, and <S> offered a <thing> to",
    "Once <A> and <B> had left the <place>, <S> sent a <thing> to",
    "Because <A> and <B> were bored at the <place>, <S> showed a <thing> to",
    "On Monday <A> and <B> worked at the <place>. Before noon <S> passed a <thing> to",
    "Last week <A> and <B> had lunch near the <place>. Later <S> gave a <thing> to",
    "People say that <A> and <B> met by the <place>, where <S> sold a <thing> to",
    "When <A> and <B> came back from the <place>, <S> brought a <thing> to",
    "In the morning <A> and <B> drove to the <place>. There <S> returned a <thing> to",
    "During the storm <A> and <B> hid in the <place>, and then <S> threw a <thing> to",
    "Since <A> and <B> both liked the <place>, <S> promised a <thing> to",
    "At the party <A> and <B> talked about the <place>. Then <S> gave a <thing> to",
    "As soon as <A> and <B> reached the <place>, <S> delivered a <thing> to",
    "In the evening <A> and <B> cleaned the <place>, and <S> handed a <thing> to",
    "Two days ago <A> and <B> were seen at the <place>, and <S> left a <thing> to",
)


def _prepare(bank: Bank, held_out: bool, corruption: str) -> Drawing:
    names = bank.whole([*FEMALE, *MALE], "names", least=5)
    places, things = bank.whole(PLACES, "places", least=1), bank.whole(THINGS, "things", least=1)
    templates = split_templates(TEMPLATES, held_out)

    def draw_pair(draw: random.Random) -> Pair:
        number, template = draw.choice(templates)
        io, subject, *others = draw.sample(names, 5)
        scene = {"place": draw.choice(places), "thing": draw.choice(things)}
        variant = draw.choice(("ABBA", "BABA"))
        clean = _prompt(template, variant, (io, subject, subject), scene)
        said = {
            "flip": (io, subject, io),
            "random_s2": (io, subject, others[0]),
            "abc": (others[0], others[1], others[2]),
        }[corruption]
        meta = {"task": "ioi", "template": number, "variant": variant, "held_out": held_out, "corruption": corruption}
        corrupted = _prompt(template, variant, said, scene)
        return Pair(clean, corrupted, (f" {io}",), (f" {subject}",), {**meta, "io": io, "s": subject})

    return draw_pair


def _prompt(template: str, variant: str, said: tuple[str, str, str], scene: dict[str, str]) -> Prompt:
    """ABBA names the indirect object first, BABA the subject; `said` are who stands as io, s1 and s2."""
    io, s1, s2 = said
    first = variant == "ABBA"
    words = {**scene, "A": io if first else s1, "B": s1 if first else io, "S": s2}
    spans = {"A": "io" if first else "s1", "B": "s1" if first else "io", "S": "s2", "place": None, "thing": None}
    return following(fill(template, words, spans), "s1", "s1+1")


IOI = TaskSpec(
    "ioi",
    "who is given something: the one of two people who is not named again; corrupted: the other one is named again "
    "('flip'), a third one is ('random_s2'), or all three names are new ('abc')",
    ("flip", "random_s2", "abc"),
    "sentences",
    _prepare,
)
