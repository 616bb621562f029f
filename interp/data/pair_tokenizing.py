"""From text to `PairTokens`: what answers add to their prompts, which tokens spans hold, what is wrong with a pair."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from interp.core.errors import DataError
from interp.core.text import Tokens, str_tokens, tokenize
from interp.data.pair_tokens import PairTokens, with_spans
from interp.data.prompt import Pair, Prompt

__all__ = ["Problem", "tokenize_pairs", "tokenize_prompts"]


@dataclass(frozen=True)
class Problem:
    """What is wrong with a pair under a tokenizer.

    Attributes:
        pair: which one.
        kind: "prompt", "length", "span" or "answer".
        text: what is wrong, with the tokens where they matter.
        fatal: whether the pair cannot be used.
    """

    pair: int
    kind: str
    text: str
    fatal: bool

    def __str__(self) -> str:
        return f"pair {self.pair}: {self.text}"


def tokenize_pairs(
    tokenizer: Any,
    examples: Sequence[Pair],
    *,
    bos: bool | None = None,
    side: str = "right",
    same_length: bool = True,
    name: str = "pairs",
) -> tuple[PairTokens | None, list[Problem]]:
    """Return pairs as tokens, and what is wrong with them; no tokens where something fatal is.

    An answer's tokens are those that its text adds to its prompt, as the model would read both together. Where the
    prompt's own tokens would change (`17` + `32` read as `1732`), the answer is tokenized alone.

    Args:
        tokenizer: a Hugging Face tokenizer; a fast one if there are spans.
        examples: the pairs.
        bos: as in `tokenize`.
        side: where pads go.
        same_length: whether prompts of different length within a pair are a fatal problem.
        name: what the data is called.

    Raises:
        DataError: no tokenizer, or a slow one and spans.
    """
    work = _Tokenizing(tokenizer, bos)
    texts = [[e.clean.text for e in examples], [e.corrupted.text for e in examples]]
    tokens = [tokenize(tokenizer, side_texts, bos=bos, side=side) for side_texts in texts]
    rows = [_rows(t) for t in tokens]
    candidates = [(*e.answers, *e.foils) for e in examples]
    work.encode([p + c for side_texts in texts for p, cs in zip(side_texts, candidates, strict=True) for c in cs])
    found = [work.pair_of(i, e, rows[0][i], rows[1][i], same_length) for i, e in enumerate(examples)]
    if any(p.fatal for p in work.problems):
        return None, work.problems
    made = PairTokens(
        with_spans(tokens[0], _masks(tokens[0], [f.clean for f in found])),
        with_spans(tokens[1], _masks(tokens[1], [f.corrupted for f in found])),
        answers=tuple(tuple(f.answers) for f in found),
        foils=tuple(tuple(f.foils) for f in found),
        notes=_summed(work.problems, len(examples)),
        meta=tuple(e.meta for e in examples),
        name=name,
    )
    return made, work.problems


def tokenize_prompts(
    tokenizer: Any, prompts: Sequence[Prompt], *, bos: bool | None = None, side: str = "right"
) -> Tokens:
    """Return prompts as one padded batch, with their spans as masks and "end" at each row's last token.

    Args:
        tokenizer: a Hugging Face tokenizer; a fast one if there are spans.
        prompts: the texts.
        bos: as in `tokenize`.
        side: where pads go.

    Raises:
        DataError: no tokenizer, a slow one and spans, or a span that cuts a token or holds none.
    """
    work = _Tokenizing(tokenizer, bos)
    tokens = tokenize(tokenizer, [p.text for p in prompts], bos=bos, side=side)
    held = []
    for work.pair, (prompt, row) in enumerate(zip(prompts, _rows(tokens), strict=True)):
        held.append(work.spans("text", prompt, row))
    if work.problems:
        raise DataError(f"text {work.problems[0].pair}: {work.problems[0].text}")
    return with_spans(tokens, _masks(tokens, held))


class _Found(NamedTuple):
    """One pair under a tokenizer: which of a row's tokens each span holds, and what answers and foils are."""

    clean: dict[str, list[int]]
    corrupted: dict[str, list[int]]
    answers: list[tuple[int, ...]]
    foils: list[tuple[int, ...]]


class _Tokenizing:
    """One look at all pairs: what is found wrong gathers in `problems`."""

    def __init__(self, tokenizer: Any, bos: bool | None) -> None:
        self.tokenizer, self.bos = tokenizer, bos
        self.problems: list[Problem] = []
        self.pair = 0
        self._ids: dict[str, list[int]] = {}

    def encode(self, texts: Sequence[str]) -> None:
        """Tokenize texts, each once."""
        unique = list(dict.fromkeys(texts))
        self._ids = dict(zip(unique, _rows(tokenize(self.tokenizer, unique, bos=self.bos)), strict=True))

    def pair_of(self, i: int, e: Pair, clean: list[int], corrupted: list[int], same_length: bool) -> _Found:
        """Look at one pair, given the tokens of its prompts."""
        self.pair = i
        self.compare(e, clean, corrupted, same_length)
        spans = self.spans("clean", e.clean, clean), self.spans("corrupted", e.corrupted, corrupted)
        for name in sorted(spans[0].keys() & spans[1].keys()):
            if len(spans[0][name]) != len(spans[1][name]):
                counts = f"{len(spans[0][name])} tokens in the clean prompt and {len(spans[1][name])} in the corrupted"
                self.note("span", f"span {name!r} has {counts} one, so what is in it does not correspond")
        answers, foils = ([self.candidate(e, c, clean, corrupted) for c in texts] for texts in (e.answers, e.foils))
        for a, answer in zip(answers, e.answers, strict=True):
            for f, foil in zip(foils, e.foils, strict=True):
                if a == f:
                    same = f"are the same tokens ({self.shown(a)})"
                    self.note("answer", f"answer {answer!r} and foil {foil!r} {same}", fatal=True)
                elif a[:1] == f[:1]:
                    first = (
                        f"begin with one token ({self.shown(a[:1])!r}), which only scores of whole answers tell apart"
                    )
                    self.note("answer", f"answer {answer!r} and foil {foil!r} {first}")
        return _Found(*spans, answers, foils)

    def note(self, kind: str, text: str, *, fatal: bool = False) -> None:
        self.problems.append(Problem(self.pair, kind, text, fatal))

    def shown(self, ids: Sequence[int]) -> str:
        """Tokens as messages show them."""
        return " | ".join(str_tokens(self.tokenizer, torch.tensor([list(ids)]))[0])

    def compare(self, e: Pair, clean: list[int], corrupted: list[int], same_length: bool) -> None:
        """Look at the two prompts."""
        if same_length and len(clean) != len(corrupted):
            both = f"\n  clean:     {self.shown(clean)}\n  corrupted: {self.shown(corrupted)}\n"
            hint = "reword them, or pass same_length=False where positions need not correspond"
            self.note("length", f"{len(clean)} tokens (clean) and {len(corrupted)} (corrupted){both}{hint}", fatal=True)
        if clean == corrupted:
            self.note("prompt", "the clean and the corrupted prompt are the same tokens")
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        for label, prompt, row in (("clean", e.clean, clean), ("corrupted", e.corrupted, corrupted)):
            if unknown in row and str(self.tokenizer.unk_token) not in prompt.text:
                self.note("prompt", f"the {label} prompt has tokens that are unknown: {self.shown(row)}")
        for name in sorted(set(e.clean.spans) ^ set(e.corrupted.spans)):
            where = "clean" if name in e.clean.spans else "corrupted"
            self.note("span", f"span {name!r} is in the {where} prompt only")

    def spans(self, label: str, prompt: Prompt, row: list[int]) -> dict[str, list[int]]:
        """Which of a row's tokens each span of its prompt holds."""
        if not prompt.spans:
            return {}
        if not getattr(self.tokenizer, "is_fast", False):
            raise DataError(
                f"{type(self.tokenizer).__name__} does not say where its tokens stand in the text, which spans need; "
                "load the fast tokenizer, or leave spans out"
            )
        encoded = self.tokenizer(prompt.text, add_special_tokens=self.bos is not False, return_offsets_mapping=True)
        lead = len(row) - len(encoded.input_ids)  # a BOS that was put in front of what the tokenizer gave
        return {
            name: sorted({lead + t for place in places for t in self._under(label, name, prompt.text, place, encoded)})
            for name, places in prompt.spans.items()
        }

    def _under(self, label: str, name: str, text: str, place: Any, encoded: Any) -> list[int]:
        begin, end = place
        under = [t for t, (a, b) in enumerate(encoded["offset_mapping"]) if a < end and b > begin and b > a]
        which = f"span {name!r} of the {label} prompt ({begin} to {end}, {text[begin:end]!r})"
        if not under:
            self.note("span", f"{which} holds no token: {self.shown(encoded.input_ids)}", fatal=True)
        for t in under:
            a, b = encoded["offset_mapping"][t]
            # A token brings its leading space along, which a span need not hold.
            if text[a:begin].strip() or text[end:b].strip():
                cut = f"{which} cuts the token {text[a:b]!r} of {self.shown(encoded.input_ids)}"
                self.note("span", f"{cut}; let it hold whole tokens", fatal=True)
                break
        return under

    def candidate(self, e: Pair, text: str, clean: list[int], corrupted: list[int]) -> tuple[int, ...]:
        """The tokens of an answer or foil."""
        prompt = e.clean.text
        ids = self._continuation(prompt + text, clean)
        other = self._continuation(e.corrupted.text + text, corrupted)
        if not ids:
            whole = self.shown(self._ids[prompt + text])
            ids = list(self.tokenizer(text, add_special_tokens=False).input_ids)
            if not ids or self._ids[prompt + text] == clean:
                self.note("answer", f"{text!r} adds no token to its prompt ({whole})", fatal=True)
            elif prompt != prompt.rstrip():
                hint = "take the space off the prompt's end and put it before the answer"
                self.note("answer", f"{text!r} joins the space that the prompt ends in ({whole}); {hint}", fatal=True)
            else:
                alone = f"so it is tokenized alone: {self.shown(ids)}"
                self.note("answer", f"{text!r} would change the prompt's own tokens ({whole}), {alone}")
        elif other and other != ids:
            what = f"{self.shown(ids)}, and {self.shown(other)} after the corrupted one; the former is used"
            self.note("answer", f"{text!r} is read as {what}")
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        if unknown in ids and str(self.tokenizer.unk_token) not in text:
            hint = "; a leading space is missing?" if text == text.lstrip() else ""
            self.note("answer", f"the tokenizer does not know {text!r}: {self.shown(ids)}{hint}", fatal=True)
        elif len(ids) > 1:
            self.note("answer", f"{text!r} is {len(ids)} tokens ({self.shown(ids)}); metrics use the first")
        if _runs_on(prompt[-1]) and _runs_on(text[0]):
            joined = f"{prompt[-12:] + text!r}; is its leading space missing?"
            self.note("answer", f"{text!r} goes on in the last word of its prompt, {joined}")
        return tuple(ids)

    def _continuation(self, joined: str, row: list[int]) -> list[int]:
        """What a text adds to the tokens of its prompt; nothing where it changes them."""
        whole = self._ids[joined]
        return whole[len(row) :] if whole[: len(row)] == row else []


def _runs_on(char: str) -> bool:
    """Whether a letter belongs to a script that writes words apart (and so has capitals)."""
    return char.isalpha() and char.lower() != char.upper()


def _rows(tokens: Tokens) -> list[list[int]]:
    return [row[mask].tolist() for row, mask in zip(tokens.ids, tokens.mask, strict=True)]


def _masks(tokens: Tokens, held: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
    """Spans given as places in each row's own tokens, as masks over the padded batch."""
    masks = {name: torch.zeros_like(tokens.mask) for spans in held for name in spans}
    for row, spans in enumerate(held):
        columns = tokens.mask[row].nonzero()[:, 0]
        for name, places in spans.items():
            masks[name][row, columns[list(places)]] = True
    return masks


def _summed(problems: Sequence[Problem], n: int) -> tuple[str, ...]:
    """One line for each kind of what is worth knowing: in how many pairs, and the first case."""
    notes = []
    for kind in dict.fromkeys(p.kind for p in problems):
        mine = [p for p in problems if p.kind == kind]
        pairs = len({p.pair for p in mine})
        notes.append(f"{pairs} of {n} pairs have a remark on their {kind}s, such as {mine[0]}")
    return tuple(notes)
