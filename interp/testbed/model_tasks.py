"""Which tasks a model can be asked, and pairs of them: the testbed's own for its models, texts for every other one."""

from functools import cache
from typing import Any

from interp.core.errors import ConfigError, DataError, nearest
from interp.data.pairs import PromptPairs
from interp.data.tasks.make import TASKS as TEXT_TASKS
from interp.data.tasks.make import make_pairs
from interp.testbed.tasks import task_pairs
from interp.testbed.text import TASKS, task_named
from interp.testbed.tokenizer import build_tokenizer

__all__ = ["model_pairs", "model_tasks"]


def model_tasks(hm: Any) -> dict[str, str]:
    """Return the tasks whose prompts a model's tokenizer takes: name → what is asked.

    That a model can be asked says nothing about its answers; `pair_accuracy` does.

    Args:
        hm: a `HookManager`, or a tokenizer.

    Raises:
        DataError: no tokenizer.
    """
    if _is_of_testbed(_tokenizer(hm)):
        return {name: task_named(name).description for name in TASKS}
    found = {}
    for name, spec in TEXT_TASKS.items():
        try:
            make_pairs(name, 1, hm=hm)
        except DataError:
            continue
        found[name] = spec.about
    return found


def model_pairs(hm: Any, task: str, n: int = 100, *, seed: int = 0, held_out: bool = True) -> PromptPairs:
    """Return pairs of a task in the words that a model knows: `task_pairs` for the testbed, else `make_pairs`.

    Args:
        hm: a `HookManager`, or a tokenizer.
        task: one of `model_tasks(hm)`.
        n: pairs.
        seed: of the draw.
        held_out: from the combinations that are kept apart.

    Raises:
        ConfigError: a task that this model cannot be asked.
        DataError: no tokenizer, or fewer than n different pairs.
    """
    if not _is_of_testbed(_tokenizer(hm)):
        return make_pairs(task, n, hm=hm, seed=seed, held_out=held_out)
    if task not in TASKS:
        hint = nearest(task, TASKS) or "it knows " + ", ".join(TASKS)
        raise ConfigError(f"the testbed has no task {task!r}; {hint}")
    return task_pairs(task, n, seed=seed, held_out=held_out)


def _tokenizer(hm: Any) -> Any:
    tokenizer = hm.tokenizer if hasattr(hm, "to_tokens") else hm
    if tokenizer is None:
        raise DataError(
            "this model was loaded without a tokenizer, so it has no tasks in words; give load(…, tokenizer)"
        )
    return tokenizer


@cache
def _testbed_vocabulary() -> dict[str, int]:
    return dict(build_tokenizer().get_vocab())


def _is_of_testbed(tokenizer: Any) -> bool:
    known = _testbed_vocabulary()
    return len(tokenizer) == len(known) and dict(tokenizer.get_vocab()) == known
