"""Examples of each task: as cases, as tokens ready for a run, and as clean and corrupted prompts."""

import random
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from interp.core.errors import ConfigError
from interp.core.text import Tokens, pad_rows
from interp.data.pairs import PromptPairs
from interp.data.prompt import Pair, Prompt
from interp.testbed.text import Document, label_values, task_named, text_ids
from interp.testbed.words import Case, join

__all__ = ["case_tokens", "draw_cases", "task_pairs", "token_ids"]

_PAD = 2
_NOT_NAMED = ("word", "separator", "random")  # roles that are no place of their own


def draw_cases(task: str, n: int, *, seed: int = 0, held_out: bool = True) -> list[Case]:
    """Draw examples of a task, the same for the same seed.

    Args:
        task: name of the task.
        n: examples.
        seed: of the draw.
        held_out: from the combinations that training text never has; else from those that it may have. Random
            segments are of words alone, which text gives back; those of training text are of any tokens.

    Raises:
        ConfigError: an unknown task, or no examples asked for.
    """
    found = task_named(task)
    if n < 1:
        raise ConfigError(f"n is {n}; at least one example is needed")
    draw = random.Random(f"cases/{task}/{seed}/{held_out}")
    return [(found.ask or found.draw)(draw, held_out) for _ in range(n)]


def case_tokens(cases: Iterable[Case], *, whole: bool = False) -> Tokens:
    """The prompts of cases as one padded batch, each from BOS to the token before its answer.

    Args:
        cases: examples of any tasks.
        whole: the whole passages instead, answers included.

    Returns:
        Tokens with pads on the right.
    """
    rows = [Document([case]).ids()[: -1 if whole else case.answer + 1] for case in cases]
    ids, mask = pad_rows(rows, _PAD)
    return Tokens(ids, mask, bos=True)


def token_ids(texts: Sequence[str]) -> Int[Tensor, " text"]:
    """The tokens of texts that are one token each, spaces included."""
    table = text_ids()
    return torch.tensor([table[text] for text in texts], dtype=torch.long)


def task_pairs(task: str, n: int = 100, *, seed: int = 0, held_out: bool = True) -> PromptPairs:
    """Draw clean prompts of a task, each with a corrupted twin of equal length that has another answer.

    What the twin differs in is the task's own: the person named again (ioi), the subject of a fact, the function of a
    list, … Foils are the twin's answers; for "years" they are all years up to the start. Every role is a named place
    ("io", "s1", "s2", "subject", …), and `meta` says task, variant, template and held_out.

    Args:
        task: name of the task; `interp testbed tasks` lists them.
        n: pairs.
        seed: of the draw.
        held_out: from the combinations that training text never has. The twin's own combination may be another.

    Raises:
        ConfigError: an unknown task, or no pairs asked for.
    """
    found, pairs = task_named(task), []
    draw = random.Random(f"twins/{task}/{seed}/{held_out}")
    for case in draw_cases(task, n, seed=seed, held_out=held_out):
        twin = found.corrupt(case, draw)
        foils = case.foils if len(case.answers) > 1 else tuple(t for t in twin.answers if t not in case.answers)
        meta = {"task": task, "variant": case.variant, "template": case.template, "held_out": case.held_out}
        pairs.append(Pair(_prompt(case), _prompt(twin), case.answers, foils, meta))
    return PromptPairs(tuple(pairs), task)


def _prompt(case: Case) -> Prompt:
    """The text before the answer, with the place of every role."""
    roles = label_values("role")
    spans: dict[str, list[tuple[int, int]]] = {}
    at = -int(case.words[0].text.startswith(" "))  # the first leading space is not written
    for given in case.words[: case.answer]:
        begin, at = at, at + len(given.text)
        role = roles[given.labels.get("role", 0)]
        if role not in _NOT_NAMED:
            spans.setdefault(role, []).append((begin + given.text.startswith(" "), at))
    return Prompt(join(case.words[: case.answer]), spans)
