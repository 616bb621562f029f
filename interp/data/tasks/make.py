"""`make_pairs`: prompt pairs of a task, for any tokenizer."""

import random
from typing import Any

from interp.core.errors import ConfigError, DataError, nearest
from interp.data.pairs import PromptPairs
from interp.data.prompt import Pair
from interp.data.tasks.bank import Bank
from interp.data.tasks.docstring import DOCSTRING
from interp.data.tasks.grammar import AGREEMENT, ATTRACTOR, PRONOUN
from interp.data.tasks.ioi import IOI
from interp.data.tasks.recall import CAPITAL, CHOICE, INDUCTION
from interp.data.tasks.spec import TaskSpec
from interp.data.tasks.years import GREATER_THAN

__all__ = ["TASKS", "make_pairs"]

TASKS: dict[str, TaskSpec] = {
    spec.name: spec
    for spec in (IOI, GREATER_THAN, DOCSTRING, PRONOUN, AGREEMENT, ATTRACTOR, CAPITAL, CHOICE, INDUCTION)
}
# A task counts as exhausted after so many draws in a row that gave nothing new, or so many for each pair in all.
_STALE, _DRAWS = 2000, 50


def make_pairs(
    task: str,
    n: int = 100,
    *,
    hm: Any = None,
    seed: int = 0,
    held_out: bool = False,
    corruption: str | None = None,
) -> PromptPairs:
    """Draw different pairs of a task, the same ones for the same seed, words and tokenizer.

    With `hm` every word that is put into a prompt is one token, pairs have equal lengths, answers are one token each,
    and `pairs.check(hm)` passes. Traps that this keeps out: words that a tokenizer cuts; names that are one token after
    a space and two without (Carol, Judy and Julie under GPT-2: here every name stands after a space); years that are
    one token (1280), and tokenizers that cut no year after its second digit. Every pair's `meta` says task, held_out
    and corruption, and template or variant where a task has them.

    Args:
        task: one of `TASKS`: "ioi", "greater_than", "docstring", "pronoun", "agreement", "agreement_attractor",
            "capital", "multiple_choice", "induction".
        n: pairs.
        hm: the `HookManager`, or tokenizer, that the pairs are for; None keeps every word.
        seed: of the draw.
        held_out: from the sentences, or words, that are kept apart (`TASKS[task].split` says which), so that what was
            found on some prompts can be confirmed on others.
        corruption: one of `TASKS[task].corruptions`, by default the first.

    Raises:
        ConfigError: an unknown task or corruption, or no pairs asked for.
        DataError: the tokenizer does not suit the task, or there are fewer than n different pairs.
    """
    if task not in TASKS:
        raise ConfigError(f"no task {task!r}; {nearest(task, TASKS) or 'the tasks are ' + ', '.join(TASKS)}")
    spec = TASKS[task]
    chosen = corruption or spec.corruptions[0]
    if chosen not in spec.corruptions:
        raise ConfigError(f"{task} has no corruption {chosen!r}; expected one of {', '.join(spec.corruptions)}")
    if n < 1:
        raise ConfigError(f"n is {n}; at least one pair is needed")
    bank = Bank(hm)
    draw_pair = spec.make(bank, held_out, chosen)
    draw = random.Random(f"pairs/{task}/{seed}/{held_out}/{chosen}")
    kept: list[Pair] = []
    seen: set[tuple[str, str]] = set()
    refused, stale, tried = "", 0, 0
    while len(kept) < n and stale < _STALE and tried < n * _DRAWS:
        new: list[Pair] = []
        while len(new) < n - len(kept) and stale < _STALE:
            pair = draw_pair(draw)
            texts = (pair.clean.text, pair.corrupted.text)
            stale = stale + 1 if texts in seen else 0
            if texts not in seen:
                seen.add(texts)
                new.append(pair)
        tried += len(new)
        usable, why = _usable(bank.tokenizer, new)
        kept += usable
        refused = refused or why
    if len(kept) < n:
        hint = f"; the first that was refused: {refused}" if refused else ""
        raise DataError(f"{task} has only {len(kept)} different pairs here and n is {n}; ask for fewer{hint}")
    return PromptPairs(tuple(kept), task)


def _usable(tokenizer: Any, pairs: list[Pair]) -> tuple[list[Pair], str]:
    """The pairs that a tokenizer takes without loss, and what is wrong with the first of the others."""
    if tokenizer is None or not pairs:
        return pairs, ""
    # Remarks on a prompt are about unknown tokens or equal sides.
    found = [p for p in PromptPairs(tuple(pairs)).problems(tokenizer) if p.fatal or p.kind == "prompt"]
    bad = {p.pair for p in found}
    return [pair for i, pair in enumerate(pairs) if i not in bad], found[0].text if found else ""
