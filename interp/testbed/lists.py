"""Tasks in lists: functions shown by example, brackets to close, random segments that repeat."""

import random
from collections.abc import Mapping, Sequence
from functools import cache

from interp.testbed import lexicon, world
from interp.testbed.knowledge import facts, velic
from interp.testbed.words import LABELS, Case, Task, Word, frames, held_out, pieces, until, word

__all__ = ["BRACKETS", "FORMATS", "FUNCTIONS", "functions"]

# -- functions in context -----------------------------------------------------------------------------------------

# What stands before an input, between it and its output, and after the output.
FORMATS = (
    ("Q:", "\nA:", "\n"),
    ("", " ->", ";"),
    ("in:", " out:", "\n"),
    ("", " =", ","),
    ("Input:", "\nOutput:", "\n\n"),
    ("", " becomes", "."),
)
_FORMAT_WORDS = frames(*(f"{before}{between}{after}{before}" for before, between, after in FORMATS))
_PAIRS = range(3, 11)  # examples in a list, the question not counted


@cache
def functions(domain: str) -> Mapping[str, Mapping[str, Word]]:
    """The functions over one kind of input: name → input → output. Every input has all of its kind's functions.

    Args:
        domain: "noun", "verb", "adjective", "country", "person" or "velic".
    """
    if domain == "noun":
        table = {
            "plural": {n.singular: world.noun(n.singular, "plural") for n in lexicon.NOUNS},
            "category": {n.singular: world.plain(n.category) for n in lexicon.NOUNS},
            "translate": {n.singular: velic(n.singular) for n in lexicon.NOUNS},
        }
    elif domain == "verb":
        verbs = [v for v in lexicon.VERBS if v.base not in {a.base for a in lexicon.ADJECTIVES}]
        table = {
            form: {v.base: word(getattr(v, form), {"concept": world.concept(v.base)}) for v in verbs}
            for form in ("past", "gerund", "third")
        }
        table["translate"] = {v.base: velic(v.base) for v in verbs}
    elif domain == "adjective":
        adjectives = lexicon.ADJECTIVES
        table = {
            "antonym": {a.base: world.plain(a.antonym) for a in adjectives},
            "comparative": {a.base: word(a.comparative, {"concept": world.concept(a.base)}) for a in adjectives},
            "translate": {a.base: velic(a.base) for a in adjectives},
        }
    elif domain == "country":
        table = {
            relation: {subject: world.plain(value) for subject, value in facts(relation).items()}
            for relation in ("capital", "language", "continent")
        }
    elif domain == "person":
        table = {
            relation: {subject: world.plain(value) for subject, value in facts(relation).items()}
            for relation in ("city", "job")
        }
    else:
        table = {"to_english": {w.text[1:]: world.plain(base) for base, w in _velic_words().items()}}
    # An opposite is an adjective too: beside it, copies would be told apart by comparing every output with its input.
    copies = {} if domain == "adjective" else {"copy": {x: _input(domain, x) for x in next(iter(table.values()))}}
    return {**table, **copies}


@cache
def _velic_words() -> Mapping[str, Word]:
    return {base: velic(base) for base in lexicon.velic_words()}


@cache
def _input(domain: str, x: str) -> Word:
    if domain == "noun":
        return world.noun(x)
    if domain == "velic":
        return next(w for w in _velic_words().values() if w.text == f" {x}")
    return world.name(x) if domain == "person" else world.plain(x)


_DOMAINS = ("noun", "verb", "adjective", "country", "person", "velic")


def _is_out(function: str, x: str, template: int) -> bool:
    return held_out("functions", function, x, template)


def _draw_functions(draw: random.Random, out: bool) -> Case:
    domain, template = draw.choice(_DOMAINS), draw.randrange(len(FORMATS))
    function = draw.choice(list(functions(domain)))
    seen = [x for x in functions(domain)[function] if not _is_out(function, x, template)]
    *shown, query = draw.sample(seen, draw.choice(_PAIRS) + 1)
    if out:
        query = until(
            lambda: draw.choice(list(functions(domain)[function])),
            lambda x: _is_out(function, x, template),
            "input",
        )
    return _functions(domain, function, template, (*shown, query), out)


def _functions(domain: str, function: str, template: int, inputs: Sequence[str], out: bool) -> Case:
    table = functions(domain)
    first, between, after, before = (_signs(text) for text in _around(template))
    words: list[Word] = []
    answer = shown = 0  # where the last output stands, and the first
    meant = list(table)  # what the pairs so far may be examples of: all before the first, two after "sheep -> sheep"
    for i, x in enumerate(inputs):
        outputs = {name: table[name][x].text for name in meant}
        y = table[function][x].having({"role": "output", "index": i, "answer": int(len(set(outputs.values())) == 1)})
        meant = [name for name in meant if outputs[name] == y.text]
        words += [*(before if i else first), _input(domain, x).having({"role": "input", "index": i}), *between]
        answer = len(words)
        shown = shown or answer
        words += [y, *after]
    right = words[answer].text
    foils = dict.fromkeys(values[inputs[-1]].text for values in table.values())
    foils.pop(right, None)
    code = LABELS["function"].values.index(function)
    state = {"domain": domain, "function": function, "inputs": inputs}
    since = {"function": (shown, code)}
    return Case("functions", function, template, words, answer, (right,), tuple(foils), out, {}, state, since)


def _around(template: int) -> tuple[str, str, str, str]:
    """What stands before the first input, between input and output, after an output, and before the other inputs."""
    before, between, after = FORMATS[template]
    return (f" {before}" if before else "", between, after, before)


@cache
def _signs(text: str) -> tuple[Word, ...]:
    return tuple(Word(piece, {"role": _SEPARATOR}) for piece in pieces(text))


_SEPARATOR = word("", {"role": "separator"}).labels["role"]


def _corrupt_functions(case: Case, draw: random.Random) -> Case:
    """The same inputs under another function."""
    held = case.state
    table = functions(held["domain"])
    others = [f for f in table if f != held["function"] and table[f][held["inputs"][-1]].text != case.answers[0]]
    return _functions(held["domain"], draw.choice(others), case.template, held["inputs"], case.held_out)


FUNCTIONS = Task(
    "functions",
    "which function a list of examples follows; every input occurs under several",
    "function and input with the format",
    _draw_functions,
    _corrupt_functions,
    _FORMAT_WORDS,
    share=16,
    prose=False,
)

# -- brackets -----------------------------------------------------------------------------------------------------

_KINDS = ("()", "[]", "{}")
_BRACKETS = frames("Close: =", "( ) [ ]")


def _draw_brackets(draw: random.Random, out: bool) -> Case:
    return until(
        lambda: _brackets(_prefix(draw), out),
        lambda case: held_out("brackets", case.text) == out,
        "string of brackets",
    )


def _prefix(draw: random.Random) -> list[str]:
    """Brackets that open and close in order, at least one left open, four deep at most."""
    length = draw.randint(2, 12)
    stack: list[str] = []
    signs: list[str] = []
    while len(signs) < length or not stack:
        if stack and (len(stack) == 4 or draw.random() < 0.4):
            signs.append(stack.pop())
        else:
            kind = draw.choice(_KINDS)
            stack.append(kind[1])
            signs.append(kind[0])
    return signs


def _brackets(signs: Sequence[str], out: bool) -> Case:
    words, stack = list(_HEAD), []
    for sign in signs:
        if sign in "([{":
            stack.append(_KINDS[[k[0] for k in _KINDS].index(sign)][1])
            words.append(_sign(sign, "open", len(stack), 0))
        else:
            stack.pop()
            words.append(_sign(sign, "close", len(stack), 0))
    words.append(_sign("=", "separator", len(stack), 0))
    answer = len(words)
    right = f" {stack[-1]}"
    while stack:
        sign = stack.pop()
        words.append(_sign(sign, "close", len(stack), 1))
    words.append(_END)
    foils = tuple(f" {kind[1]}" for kind in _KINDS if f" {kind[1]}" != right)
    return Case("brackets", "close", 0, words, answer, (right,), foils, out, {}, {"signs": tuple(signs)})


_HEAD = tuple(Word(piece, {"role": 0, "depth": 0}) for piece in (" Close", ":"))
_END = Word(".", {"role": 0, "depth": 0, "answer": 1})


@cache
def _sign(sign: str, role: str, depth: int, answer: int) -> Word:
    return word(sign, {"role": role, "depth": depth, "answer": answer})


def _corrupt_brackets(case: Case, draw: random.Random) -> Case:
    """The innermost bracket left open is of another kind."""
    signs = list(case.state["signs"])
    stack = []
    for i, sign in enumerate(signs):
        if sign in "([{":
            stack.append(i)
        else:
            stack.pop()
    kind = draw.choice([k for k in _KINDS if k[0] != signs[stack[-1]]])
    signs[stack[-1]] = kind[0]
    return _brackets(signs, case.held_out)


BRACKETS = Task(
    "brackets",
    "close what is still open, innermost first",
    "the string",
    _draw_brackets,
    _corrupt_brackets,
    _BRACKETS,
    share=5,
    prose=False,
    words=tuple("()[]{}"),
)
