"""Labelled words, frames that they fill, and cases: what every passage of the small world is made of."""

import random
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from interp.core.errors import ConfigError
from interp.testbed import lexicon

__all__ = [
    "LABELS",
    "SPECIAL",
    "Case",
    "Frame",
    "Label",
    "Task",
    "Word",
    "bare",
    "frames",
    "held_out",
    "join",
    "pieces",
    "until",
    "word",
]

SPECIAL = ("<|bos|>", "<|eos|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>")

_PIECE = re.compile(r"<\|[a-z]+\|>| ?[^\W\d_]+| ?\d{1,2}| ?[^\w\s]|\s")

_ROLES = (
    "word io s1 s2 io2 name pronoun place object subject attractor verb value event century start_year "
    "end_year input output separator query key thing opinion reaction option letter preposition unit count start "
    "result source translation ordinal open close random container"
).split()

_FUNCTIONS = (
    "plural category translate copy past gerund third antonym comparative capital language continent city "
    "job to_english"
).split()


@dataclass(frozen=True)
class Label:
    """One latent variable that tokens are labelled with.

    Attributes:
        name: of the column.
        meaning: what it says of a token.
        values: names of its codes, in order; empty where a code is a number in its own right.
    """

    name: str
    meaning: str
    values: tuple[str, ...] = ()


_LABELS = (
    Label("task", "the task that the passage belongs to"),  # its values are the registry of tasks, which stands above
    Label("template", "which frame, format or variant of the task, by number"),
    Label("role", "what the token is in its passage", tuple(_ROLES)),
    Label("concept", "the dictionary word that the token is a form of, in either language, by number"),
    Label("gender", "of the person named or meant", ("female", "male")),
    Label(
        "number", "grammatical number of a thing, of days and months, and of a verb that agrees", ("singular", "plural")
    ),
    Label("sentiment", "whether it is said with liking", ("negative", "positive")),
    Label("topic", "what the passage is about", lexicon.TOPICS),
    Label("function", "the function that the list in context follows", tuple(_FUNCTIONS)),
    Label(
        "language", "of a word in a sentence or a list, not of random ones", ("English", lexicon.LANGUAGE_OF_THE_WORLD)
    ),
    Label("index", "position in a list, pair in a list of pairs, or place in a repeated segment; from 0"),
    Label("depth", "brackets open after this token"),
    Label("copy", "which copy of a repeated segment; from 0"),
    Label("answer", "1 where the passage so far and what its task teaches decide the token", ("open", "decided")),
    Label("held_out", "1 in passages whose combination is never in training text", ("training", "held out")),
)
LABELS = {label.name: label for label in _LABELS}


@dataclass(frozen=True, eq=False)
class Word:
    """One token of text, its leading space included, and what it means.

    Attributes:
        text: what is written.
        labels: label → code; what is not said does not apply.
        id: the token itself, where its text alone does not give it back (single bytes in random sequences).
    """

    text: str
    labels: Mapping[str, int] = field(default_factory=dict)
    id: int | None = None

    def having(self, labels: Mapping[str, int | str]) -> "Word":
        """The same word with more labels; values may be given by name."""
        return Word(self.text, {**self.labels, **{name: _code(name, value) for name, value in labels.items()}}, self.id)


def word(text: str, labels: Mapping[str, int | str] | None = None) -> Word:
    """A word written with a leading space.

    Args:
        text: the bare word.
        labels: label → code or name of a value.
    """
    return Word(f" {text}", {name: _code(name, value) for name, value in (labels or {}).items()})


def bare(words: Iterable[Word]) -> tuple[str, ...]:
    """The texts of words without their leading spaces."""
    return tuple(w.text.removeprefix(" ") for w in words)


def _code(name: str, value: int | str) -> int:
    return value if isinstance(value, int) else LABELS[name].values.index(value)


def pieces(text: str) -> list[str]:
    """Cut text as the tokenizer does: words, numbers of two digits at most and signs, each with its leading space."""
    return _PIECE.findall(text)


def held_out(*parts: object, one_in: int = 8) -> bool:
    """Whether a combination is kept out of training text: one in so many are, by a checksum of their names."""
    return zlib.crc32("|".join(map(str, parts)).encode()) % one_in == 0


class Frame:
    """A sentence with slots, such as "{io:io} and {s:s1} went to the {place:place}."

    A slot is `{key}`, which leaves the word its own role, or `{key:role}`; a `!` before the role marks what the text
    before decides (`{io:!io2}`). The last such slot is the answer: a prompt ends before it.

    Args:
        text: the sentence, its words parted by single spaces.
        index: number of the frame in its task.
    """

    def __init__(self, text: str, index: int = 0) -> None:
        self.text, self.index = text, index
        self._parts: list[Word | tuple[str, str, bool]] = []
        rest = text if text.startswith("<|") else f" {text}"
        for literal, slot in re.findall(r"([^{}]*)(?:\{([^}]*)\})?", rest):
            self._parts += [Word(piece, {"role": 0}) for piece in pieces(literal[:-1] if slot else literal)]
            if slot:
                key, _, role = slot.partition(":")
                self._parts.append((key, role.lstrip("!"), role.startswith("!")))
        decided = [i for i, part in enumerate(self._parts) if isinstance(part, tuple) and part[2]]
        self.answer = decided[-1] if decided else -1
        self.keys = tuple(part[0] for part in self._parts if isinstance(part, tuple))

    def fill(self, slots: Mapping[str, Word]) -> list[Word]:
        """The words of the sentence.

        Args:
            slots: key → word.
        """
        return [part if isinstance(part, Word) else _placed(slots[part[0]], part[1], part[2]) for part in self._parts]

    def literals(self) -> list[str]:
        """The words that stand in the frame itself."""
        return [part.text for part in self._parts if isinstance(part, Word)]


def frames(*texts: str) -> tuple[Frame, ...]:
    """Frames, numbered.

    Args:
        texts: as for `Frame`.
    """
    return tuple(Frame(text, i) for i, text in enumerate(texts))


_PLACED: dict[tuple[int, str, bool], tuple[Word, Word]] = {}


def _placed(given: Word, role: str, decided: bool) -> Word:
    """A word in a role; made once for each word, role and state, as text is made of the same few thousand."""
    key = (id(given), role, decided)
    known = _PLACED.get(key)
    if known is not None and known[0] is given:
        return known[1]
    labels: dict[str, int | str] = {"answer": 1} if decided else {}
    made = given.having({**labels, "role": role}) if role else given.having({**labels})
    if len(_PLACED) < 100_000:
        _PLACED[key] = (given, made)
    return made


@dataclass(frozen=True, eq=False)
class Case:
    """One instance of a task: its words, which of them is asked for, and what would be wrong instead.

    Attributes:
        task: name of the task.
        variant: name of the form, such as "ABBA".
        template: number of the frame or format.
        words: the whole passage.
        answer: index of the word that a prompt asks for: it ends before it.
        answers: every right next word; the one written is among them.
        foils: wrong next words.
        held_out: whether its combination never occurs in training text.
        labels: labels that hold for every word, such as the topic.
        state: what the task needs to make the corrupted twin.
        since: label → (index of a word, code): labels that hold from that word on, as nothing before it says so.
    """

    task: str
    variant: str
    template: int
    words: Sequence[Word]
    answer: int
    answers: tuple[str, ...]
    foils: tuple[str, ...]
    held_out: bool
    labels: Mapping[str, int] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)
    since: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The passage as it is read, without the first space."""
        return join(self.words)

    @property
    def prompt(self) -> str:
        """The passage up to the answer."""
        return join(self.words[: self.answer])


def join(words: Sequence[Word]) -> str:
    """Write words as text, without a leading space."""
    return "".join(w.text for w in words).removeprefix(" ")


@dataclass(frozen=True)
class Task:
    """One thing that the world teaches.

    Attributes:
        name: of the task.
        description: what is asked and what decides it.
        held_out_by: which combination is kept out of training text.
        draw: (random source, held out or not) → a case.
        corrupt: (case, random source) → its twin of equal length with another answer, the case's being a foil.
        frames: frames and formats, for the vocabulary and the card.
        share: of the training text's passages.
        prose: whether it reads as a sentence, and may stand beside others in one document.
        words: what it writes besides its frames and the lexicon, each with a space before it.
        ask: as `draw`, for cases that are asked as text: none holds a token that its text does not give back. None
            where `draw` makes no others.
    """

    name: str
    description: str
    held_out_by: str
    draw: Callable[[random.Random, bool], Case]
    corrupt: Callable[[Case, random.Random], Case]
    frames: tuple[Frame, ...]
    share: int
    prose: bool = True
    words: tuple[str, ...] = ()
    ask: Callable[[random.Random, bool], Case] | None = None

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Every text that the task may write as one token, but for the lexicon's words."""
        return (*(text for frame in self.frames for text in frame.literals()), *(f" {w}" for w in self.words))


def until(make: Callable[[], Any], wanted: Callable[[Any], bool], what: str) -> Any:
    """Draw until a combination lies in the wanted part.

    Args:
        make: draws one.
        wanted: says whether it will do.
        what: names it in the error.

    Raises:
        ConfigError: none of 10,000 did.
    """
    for _ in range(10_000):
        drawn = make()
        if wanted(drawn):
            return drawn
    raise ConfigError(f"no {what} was found in 10,000 draws; the world's split leaves none")
