"""`Prompt`: a text with named places in it; `Pair`: two prompts with what is right and wrong to say after them."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from interp.core.errors import DataError

__all__ = ["END", "Pair", "Prompt"]

END = "end"
"""The span that every prompt has: its last token, after which the answer is predicted."""

_PIECES = re.compile(r"\{\{|\{(?P<name>[^{}:\s]+):|\}+|\{|[^{}]+")


@dataclass(frozen=True)
class Prompt:
    """A text with named places in it.

    Args:
        text: the prompt.
        spans: name → (begin, end) in characters of the text, or several of them; kept as tuples, in order.

    Raises:
        DataError: an empty text, or a span that is empty, outside the text or named "end".
    """

    text: str
    spans: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_text(self.text, "a prompt")
        if not isinstance(self.spans, Mapping):
            raise DataError(f"spans map names to (begin, end), got {type(self.spans).__name__}: {self.spans!r}")
        spans = {name: _places(name, given, self.text) for name, given in self.spans.items()}
        object.__setattr__(self, "spans", spans)

    @classmethod
    def parse(cls, marked: str) -> "Prompt":
        """Read a text with its places marked, such as "When {io:Mary} and {s1:John} went".

        A name may be marked several times; marks do not nest. A brace of the text is doubled: "{{", "}}". After a
        marked place the first of an odd number of braces closes it: "{{n: {x:1}}}" is "{n: 1}".

        Args:
            marked: the text with its marks.

        Raises:
            DataError: a mark without a name or an end; the message shows where.
        """
        if not isinstance(marked, str):
            raise DataError(f"a marked prompt is a string, got {type(marked).__name__}: {str(marked)[:60]!r}")
        spans: dict[str, list[tuple[int, int]]] = {}
        text, name, begin = "", "", 0
        for piece in _PIECES.finditer(marked):
            found = piece[0]
            if found == "{{":
                text += "{"
            elif piece["name"]:
                if name:
                    raise _unreadable(marked, piece.start(), f"{name!r} is still open, and marks do not nest")
                name, begin = piece["name"], len(text)
            elif found[0] == "}":
                if len(found) % 2 and not name:
                    raise _unreadable(marked, piece.start(), "a brace closes nothing; a brace of the text is '}}'")
                if len(found) % 2:
                    spans.setdefault(name, []).append((begin, len(text)))
                    name = ""
                text += "}" * (len(found) // 2)
            elif found == "{":
                raise _unreadable(marked, piece.start(), "expected {name:text}; a brace of the text is '{{'")
            else:
                text += found
        if name:
            raise _unreadable(marked, len(marked), f"{name!r} is not closed")
        return cls(text, spans)


@dataclass(frozen=True)
class Pair:
    """One example: two prompts, what is right to say after the clean one, and what is wrong.

    Args:
        clean: the prompt whose answer is right.
        corrupted: the prompt it is compared with.
        answers: texts that continue the clean prompt, with their leading space where there is one.
        foils: wrong continuations, often the right ones of the corrupted prompt; may be none.
        meta: facts of the example, such as {"template": "ABBA"}: names → text, numbers, truth values or None.

    Raises:
        DataError: no answer, an empty one, one that is given twice or is a foil too, or facts of another type.
    """

    clean: Prompt
    corrupted: Prompt
    answers: tuple[str, ...]
    foils: tuple[str, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what, texts in (("answer", self.answers), ("foil", self.foils)):
            if not isinstance(texts, tuple | list):
                raise DataError(f"{what}s are a tuple of texts, got {type(texts).__name__}: {texts!r}")
            for text in texts:
                _check_text(text, f"a{'n' if what == 'answer' else ''} {what}")
            if len(set(texts)) < len(texts):
                raise DataError(f"the {what}s {list(texts)} hold one text twice; give each once")
            object.__setattr__(self, f"{what}s", tuple(texts))
        if not self.answers:
            raise DataError(f"no answer was given for {self.clean.text[:60]!r}; give at least one")
        both = set(self.answers) & set(self.foils)
        if both:
            raise DataError(f"{sorted(both)[0]!r} is an answer and a foil of {self.clean.text[:60]!r}; choose one")
        for name, value in self.meta.items():
            known = value is None or isinstance(value, str | bool | int)
            if not isinstance(name, str) or not (known or (isinstance(value, float) and math.isfinite(value))):
                raise DataError(
                    f"meta[{name!r}] is {value!r} ({type(value).__name__}); expected text, a finite number, a truth "
                    "value or None under a name"
                )
        object.__setattr__(self, "meta", dict(self.meta))


def _check_text(text: Any, what: str) -> None:
    if not isinstance(text, str) or not text:
        raise DataError(f"{what} must be a text that is not empty, got {text!r}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as err:
        raise DataError(f"{what} holds half a surrogate pair at {err.start}, which no tokenizer takes") from None


def _places(name: Any, given: Any, text: str) -> tuple[tuple[int, int], ...]:
    if not isinstance(name, str) or not name:
        raise DataError(f"a span is named by a text, got {name!r}")
    if name == END:
        raise DataError(f"{END!r} names the last token of every prompt already; give your span another name")
    one = isinstance(given, Sequence) and len(given) == 2 and all(isinstance(i, int) for i in given)
    places = [given] if one else given
    pairs = isinstance(places, Sequence) and not isinstance(places, str) and len(places) > 0
    if not pairs or not all(isinstance(p, Sequence) and len(p) == 2 and all(type(i) is int for i in p) for p in places):
        raise DataError(f"span {name!r} must be (begin, end) in characters, or several, got {given!r}")
    for begin, end in places:
        if not 0 <= begin < end <= len(text):
            raise DataError(f"span {name!r} ({begin} to {end}) is empty or outside a text of {len(text)} characters")
    return tuple(sorted((begin, end) for begin, end in places))


def _unreadable(marked: str, at: int, why: str) -> DataError:
    before, after = marked[max(0, at - 30) : at], marked[at : at + 30]
    return DataError(f"a marked prompt cannot be read at character {at}, between {before!r} and {after!r}: {why}")
