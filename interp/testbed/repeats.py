"""Random tokens that repeat: the task of induction, over the whole vocabulary and with any period."""

import random
from collections.abc import Sequence
from functools import cache

from interp.testbed.tokenizer import vocabulary
from interp.testbed.words import SPECIAL, Case, Task, Word, held_out, until

__all__ = ["REPEAT"]

_SHORTEST, _LONGEST = 3, 50  # tokens in one copy
_MOST = 120  # tokens in all


@cache
def _ordinary() -> tuple[Word, ...]:
    """Every token but the special ones."""
    first = len(SPECIAL)
    return tuple(Word(_shown(text), {"role": 0}, i) for i, text in enumerate(vocabulary()[first:], first))


@cache
def _words() -> tuple[Word, ...]:
    """The tokens that text gives back: words with their leading space."""
    return tuple(w for w in _ordinary() if len(w.text) > 2 and w.text[0] == " " and w.text[1:].isalpha())


def _shown(text: str) -> str:
    return text if text.isascii() else "\N{REPLACEMENT CHARACTER}"


def _draw_repeat(draw: random.Random, out: bool) -> Case:
    if out:
        return _draw_words(draw, out)
    return _drawn(draw, out, _ordinary(), "whole vocabulary")


def _draw_words(draw: random.Random, out: bool) -> Case:
    return _drawn(draw, out, _words(), "words")


def _drawn(draw: random.Random, out: bool, pool: Sequence[Word], variant: str) -> Case:
    segment = until(
        lambda: draw.sample(pool, draw.randint(_SHORTEST, _LONGEST)),
        lambda drawn: held_out("repeat", *(w.id for w in drawn)) == out,
        "segment",
    )
    longest = min(_MOST, 5 * len(segment))
    length = draw.randint(min(len(segment) + 2, longest), longest)
    return _repeat(segment, length, variant, out)


def _repeat(segment: Sequence[Word], length: int, variant: str, out: bool) -> Case:
    period, words = len(segment), []
    for i in range(length):
        copy, at = divmod(i, period)
        # The first token of the second copy is a surprise: nothing says that the segment ends here.
        words.append(segment[at].having({"role": "random", "index": at, "copy": copy, "answer": int(i > period)}))
    right = words[-1].text
    foils = tuple(w.text for w in segment if w.text != right)
    state = {"segment": tuple(segment), "length": length}
    return Case("repeat", variant, 0, words, length - 1, (right,), foils, out, {}, state)


def _corrupt_repeat(case: Case, draw: random.Random) -> Case:
    """Another token stands in every copy at the place that is asked for."""
    segment, length = case.state["segment"], case.state["length"]
    at = (length - 1) % len(segment)
    other = draw.choice([w for w in _words() if w not in segment])
    return _repeat([*segment[:at], other, *segment[at + 1 :]], length, case.variant, case.held_out)


REPEAT = Task(
    "repeat",
    "a random segment, again and again: what followed this token before follows it now",
    "the segment",
    _draw_repeat,
    _corrupt_repeat,
    (),
    share=16,
    prose=False,
    ask=_draw_words,
)
