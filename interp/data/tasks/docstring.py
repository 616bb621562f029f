"""Docstring: which parameter a docstring goes on with, in the order of the function's own.

Source: the task and its corruptions as in Heimersheim and Janiak (2023), "A circuit for Python docstrings in a 4-layer
attention-only transformer". Departure: own words; foils are all other names of parameters, and their mean counts.
"""

import random

from interp.data.prompt import Pair, Prompt
from interp.data.tasks.bank import Bank
from interp.data.tasks.filling import fill
from interp.data.tasks.spec import Drawing, TaskSpec
from interp.data.tasks.words import NOUNS, PARAMETERS

__all__ = ["DOCSTRING"]

_TEMPLATE = (
    "def <f>(self, <A_def>, <B_def>, <C_def>, <D_def>):\n"
    '    """<x> <y> <z>\n\n'
    "    :param <A_doc>: <a> <b>\n"
    "    :param <B_doc>: <c> <d>\n"
    "    :param"
)
_NAMED = dict.fromkeys("fxyzabcd")


def _prepare(bank: Bank, held_out: bool, corruption: str) -> Drawing:
    names = bank.whole(PARAMETERS, "names of parameters", least=7, held_out=held_out)
    words = bank.whole((word for word in NOUNS if word not in PARAMETERS), "nouns", least=8)

    def draw_pair(draw: random.Random) -> Pair:
        a, b, c, d, *others = draw.sample(names, 7)
        scene = dict(zip("fxyzabcd", draw.sample(words, 8), strict=True))
        defined, described = (a, b, c, d), (a, b)
        if corruption in ("random_answer", "random_answer_doc"):
            defined = (a, b, others[0], d)
        if corruption in ("random_doc", "random_answer_doc"):
            described = (others[1], others[2])
        clean, corrupted = _prompt(scene, (a, b, c, d), (a, b)), _prompt(scene, defined, described)
        foils = dict.fromkeys((a, b, d, *defined, *described))
        foils.pop(c, None)
        meta = {"task": "docstring", "answer": c, "held_out": held_out, "corruption": corruption}
        return Pair(clean, corrupted, (f" {c}",), tuple(f" {name}" for name in foils), meta)

    return draw_pair


def _prompt(scene: dict[str, str], defined: tuple[str, ...], described: tuple[str, str]) -> Prompt:
    words = dict(zip(("A_def", "B_def", "C_def", "D_def"), defined, strict=True))
    words |= dict(zip(("A_doc", "B_doc"), described, strict=True))
    return fill(_TEMPLATE, {**scene, **words}, _NAMED)


DOCSTRING = TaskSpec(
    "docstring",
    "which parameter a docstring describes third: the function's third; corrupted: that parameter has another name "
    "('random_answer'), the two described are others ('random_doc'), or both ('random_answer_doc')",
    ("random_answer", "random_doc", "random_answer_doc"),
    "names of parameters",
    _prepare,
)
