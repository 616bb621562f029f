"""`ABQuestions`: questions with lettered options of which one matches a behaviour, and the contrast they make."""

import json
import os
import random
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from interp.core.errors import DataError
from interp.data.contrast import Contrast
from interp.data.prompt import Prompt

__all__ = ["LETTER", "ABQuestion", "ABQuestions", "ab_contrast"]

LETTER = "letter"
"""The span of a contrast of answers that holds the letter's token: read it with `Where(name="letter")`."""

_ANSWER = re.compile(r"\s*\(?\s*([A-Za-z])\s*\)?\s*\.?\s*")
_OPTION = re.compile(r"(?m)^([ \t]*\(([A-Z])\)[ \t]*)")
_INLINE = re.compile(r"(\(([A-Z])\)[ \t]*)")
# Letters that lean further than this towards one side leave their own difference in the direction.
_LEANING = 0.1


@dataclass(frozen=True)
class ABQuestion:
    """A question with its lettered options, such as "Do you agree?\\n\\nChoices:\\n (A) Yes\\n (B) No".

    Args:
        question: the text with its options.
        matching: letter of the option that matches the behaviour, such as "A"; "(A)" and " (A)" are read too.
        other: letter of an option that does not.
        meta: facts of the question, such as its number or its source.

    Raises:
        DataError: an empty question, something that is no letter, or one letter for both.
    """

    question: str
    matching: str
    other: str
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.question, str) or not self.question.strip():
            raise DataError(f"a question is a text that is not empty, got {self.question!r}")
        for name in ("matching", "other"):
            given = getattr(self, name)
            found = _ANSWER.fullmatch(given) if isinstance(given, str) else None
            if found is None:
                raise DataError(f"{name}={given!r} of {self.question[:50]!r}: expected a letter, as 'A' or '(A)'")
            object.__setattr__(self, name, found[1].upper())
        if self.matching == self.other:
            raise DataError(f"{self.question[:50]!r} has {self.matching} as the matching and as the other answer")

    def swapped(self) -> "ABQuestion":
        """Return the question with the texts of its two options exchanged, so that the letters change sides.

        Raises:
            DataError: options that are not found in the text as "(A) …", each once at a line's start or once in all.
        """
        spans = _options(self.question)
        lost = [letter for letter in (self.matching, self.other) if letter not in spans]
        if lost:
            raise DataError(
                f"the option ({lost[0]}) is not found once in {self.question[-80:]!r}; write options as '(A) …', each "
                "on a line of its own, and an empty line before what follows the last one"
            )
        (a, b), (c, d) = sorted([spans[self.matching], spans[self.other]])
        q = self.question
        text = q[:a] + q[c:d] + q[b:c] + q[a:b] + q[d:]
        return replace(self, question=text, matching=self.other, other=self.matching)


class ABQuestions(Sequence[ABQuestion]):
    """A list of questions about one behaviour.

    Args:
        questions: at least one.
        name: of the behaviour.

    Raises:
        DataError: no questions, or something else among them.
    """

    def __init__(self, questions: Sequence[ABQuestion], *, name: str = "behaviour") -> None:
        self.questions, self.name = tuple(questions), name
        if not self.questions:
            raise DataError(f"{name!r} has no questions; give at least one")
        wrong = next((q for q in self.questions if not isinstance(q, ABQuestion)), None)
        if wrong is not None:
            raise DataError(f"{name!r} holds a {type(wrong).__name__}; expected ABQuestion, or use from_records")

    @classmethod
    def from_records(cls, records: Sequence[Mapping[str, Any]], *, name: str = "behaviour") -> "ABQuestions":
        """Read records {question, answer_matching_behavior, answer_not_matching_behavior}; the rest becomes `meta`.

        Raises:
            DataError: a record without these keys (its number is named), or as for `ABQuestion`.
        """
        keys = ("question", "answer_matching_behavior", "answer_not_matching_behavior")
        held = []
        for i, record in enumerate(records):
            if not isinstance(record, Mapping) or not set(keys) <= set(record):
                what = sorted(record) if isinstance(record, Mapping) else type(record).__name__
                raise DataError(f"record {i} has {what}; expected {', '.join(keys)}")
            question, matching, other = (record[k] for k in keys)
            other = other[0] if isinstance(other, list) and other else other
            rest = {k: v for k, v in record.items() if k not in keys}
            held.append(ABQuestion(question, matching, other, {"number": i, **rest}))
        return cls(held, name=name)

    @classmethod
    def from_json(cls, path: str | os.PathLike[str], *, name: str | None = None) -> "ABQuestions":
        """Read a file of records, a JSON list or one JSON object a line.

        Args:
            path: the file, in the format of CAA and of Anthropic's model-written evaluations.
            name: of the behaviour; the file's name by default.

        Raises:
            DataError: no such file, no JSON, or as for `from_records`.
        """
        file = Path(path)
        try:
            text = file.read_text(encoding="utf-8-sig")
            lines = [line for line in text.split("\n") if line.strip()]  # a text may hold U+2028, which ends no line
            records = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in lines]
        except (OSError, ValueError) as err:
            raise DataError(f"{file} cannot be read as A/B questions ({err}); give a JSON list or JSON lines") from err
        return cls.from_records(records, name=file.stem if name is None else name)

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: Any) -> Any:
        """One question, or the questions of a slice."""
        if isinstance(index, slice):
            return ABQuestions(self.questions[index], name=self.name)
        return self.questions[index]

    def __iter__(self) -> Iterator[ABQuestion]:
        return iter(self.questions)

    def __repr__(self) -> str:
        return f"ABQuestions({self.name!r}, {len(self)} questions, matching letter {self.letters})"

    @property
    def letters(self) -> dict[str, int]:
        """How often each letter is the matching one."""
        held = [q.matching for q in self.questions]
        return {letter: held.count(letter) for letter in sorted(set(held))}

    def swapped(self) -> "ABQuestions":
        """Return every question with the texts of its two options exchanged."""
        return ABQuestions([q.swapped() for q in self.questions], name=self.name)

    def balanced(self, *, seed: int = 0) -> "ABQuestions":
        """Return the questions in their order, as many swapped at random as makes every letter match equally often.

        Raises:
            DataError: options that cannot be found, or letters beyond one pair.
        """
        pairs = {frozenset((q.matching, q.other)) for q in self.questions}
        if len(pairs) != 1:
            raise DataError(f"{self.name!r} has answers of several pairs of letters: {self.letters}; choose one pair")
        first = min(next(iter(pairs)))
        held = [i for i, q in enumerate(self.questions) if q.matching == first]
        rest = [i for i, q in enumerate(self.questions) if q.matching != first]
        excess = abs(len(held) - len(rest)) // 2
        flip = set(random.Random(seed).sample(held if len(held) > len(rest) else rest, excess))
        return ABQuestions([q.swapped() if i in flip else q for i, q in enumerate(self.questions)], name=self.name)

    def split(self, share: float = 0.3, *, seed: int = 0) -> tuple["ABQuestions", "ABQuestions"]:
        """Return two parts: to fit on, and a share held out, each in the order of the whole.

        Raises:
            DataError: a share outside (0, 1), or one question alone.
        """
        if not 0 < share < 1 or len(self) < 2:
            raise DataError(f"share={share!r} of {len(self)} questions: expected a share in (0, 1) and 2 questions")
        n = min(max(1, round(share * len(self))), len(self) - 1)
        held = set(random.Random(seed).sample(range(len(self)), n))
        parts = ([q for i, q in enumerate(self) if (i in held) == out] for out in (False, True))
        kept, out = (ABQuestions(part, name=self.name) for part in parts)
        return kept, out


def ab_contrast(
    questions: ABQuestions,
    hm: Any = None,
    *,
    system: str | None = None,
    swap: bool = False,
    answer: str = "({letter})",
) -> Contrast:
    """Return questions as pairs of texts that end in the matching and in the other answer, as CAA is fitted on.

    The letter of each answer is the span `LETTER`: the position is found in the text, never counted from its end, so
    that it holds for every tokenizer. Each question is a group of its own.

    Args:
        questions: of one behaviour.
        hm: a `HookManager` or a tokenizer: where it has a chat template the question is the user's turn and the answer
            begins the assistant's. A token that holds more than the letter, such as "(A", is taken whole. Without it
            texts are the question, an empty line and the answer.
        system: a system message before each question; needs a chat template.
        swap: add every question once more with its options exchanged: letters then cancel exactly.
        answer: how an answer is written; "{letter}" stands for the letter.

    Warns:
        UserWarning: one letter matches the behaviour more often than the other, which leaves "A" − "B" in the
            difference.

    Raises:
        DataError: an answer without its letter, a system message without a template, or options that are not found.

    Source: Rimsky et al., "Steering Llama 2 via Contrastive Activation Addition", arXiv 2312.06681, §3. Departure: the
        letter's own token is read, where the authors read the last token but one.
    """
    if answer.count("{letter}") != 1:
        raise DataError(f"answer={answer!r}: expected '{{letter}}' in it once")
    tokenizer = hm.tokenizer if hasattr(hm, "to_tokens") else hm
    templated = bool(getattr(tokenizer, "chat_template", None))
    if system is not None and not templated:
        raise DataError("a system message needs a chat template, and there is none; put it into the questions")
    forms = [questions, questions.swapped()] if swap else [questions]
    if not swap:
        _warn_of_letters(questions)
    sides: tuple[list[Prompt], list[Prompt]] = ([], [])
    groups = []
    for form in forms:
        for number, q in enumerate(form):
            groups.append(number)
            lead = _chat_lead(tokenizer, q.question, system) if templated else q.question.rstrip() + "\n\n"
            for texts, letter in zip(sides, (q.matching, q.other), strict=True):
                before, _, after = answer.partition("{letter}")
                begin = len(lead) + len(before)
                text = lead + before + letter + after
                texts.append(Prompt(text, {LETTER: _whole_token(tokenizer, text, begin)}))
    held = tuple(groups)
    return Contrast(tuple(sides[0]), tuple(sides[1]), True, (held, held), questions.name)


def _warn_of_letters(questions: ABQuestions) -> None:
    letters = questions.letters
    leaning = max(letters.values()) / len(questions) - 1 / max(2, len(letters))
    if leaning > _LEANING:
        warnings.warn(
            f"{questions.name!r}: the matching letters are {letters}, so their difference stays in the direction; "
            "use questions.balanced(), or swap=True",
            stacklevel=3,
        )


def _chat_lead(tokenizer: Any, question: str, system: str | None) -> str:
    """The rendered conversation up to where the answer begins; without a BOS that the tokenizer adds itself."""
    from interp.core.text import chat_tokens

    messages = [{"role": "user", "content": question}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    text = chat_tokens(tokenizer, messages).text
    bos = getattr(tokenizer, "bos_token", None) or ""
    adds = bos and list(tokenizer("a").input_ids)[:1] == [tokenizer.bos_token_id]
    return text.removeprefix(bos) if adds else text


def _whole_token(tokenizer: Any, text: str, begin: int) -> tuple[int, int]:
    """Where the token that holds the character at `begin` stands; the character itself without a fast tokenizer."""
    if tokenizer is None or not getattr(tokenizer, "is_fast", False):
        return begin, begin + 1
    for a, b in tokenizer(text, return_offsets_mapping=True)["offset_mapping"]:
        if a <= begin < b:
            return a, b
    return begin, begin + 1


def _options(text: str) -> dict[str, tuple[int, int]]:
    """Where the text of each option stands, for the letters that mark exactly one."""
    marks = list(_OPTION.finditer(text))
    if len({m[2] for m in marks}) < 2:
        marks = list(_INLINE.finditer(text))
    letters = [m[2] for m in marks]
    spans: dict[str, tuple[int, int]] = {}
    one_line = all("\n" not in text[a.end() : b.start()].strip() for a, b in pairwise(marks))
    for i, mark in enumerate(marks):
        stop = marks[i + 1].start() if i + 1 < len(marks) else len(text)
        # What follows an empty line, such as "Answer:", is no part of the last option.
        end = mark.end() + len(re.split(r"\n\s*\n", text[mark.end() : stop])[0].rstrip())
        # Whether a line below the last option belongs to it cannot be told where the others have one line.
        loose = i + 1 == len(marks) and one_line and "\n" in text[mark.end() : end]
        if letters.count(mark[2]) == 1 and not loose:
            spans[mark[2]] = (mark.end(), end)
    return spans
