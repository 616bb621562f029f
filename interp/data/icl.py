"""Functions shown by example: tasks of inputs and outputs, their splits, and prompts with some of them as shots."""

import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from interp.core.errors import ArtifactError, ConfigError, DataError, nearest
from interp.data.pairs import PromptPairs
from interp.data.prompt import Pair, Prompt

__all__ = [
    "CORRUPTIONS",
    "QA",
    "FunctionTask",
    "TaskSplits",
    "icl_pairs",
    "load_function_task",
    "load_function_tasks",
    "with_others",
]

QA = "Q: {input}\nA: {output}\n\n"
"""The template of the function vectors paper: one shot; the question is the part before the output."""

CORRUPTIONS = ("shuffled", "others", "zero_shot")
"""What takes the function out of a prompt. shuffled: the shots' outputs change places. others: each shot's output is
drawn from those of all functions that know its input. zero_shot: there are no shots."""


class TaskSplits(NamedTuple):
    """A task in three parts that share no input; `shots` of every prompt come from the first."""

    train: "FunctionTask"
    validation: "FunctionTask"
    test: "FunctionTask"


@dataclass(frozen=True)
class FunctionTask:
    """A function given by its examples.

    Args:
        name: what it is called in results.
        examples: (input, output) pairs, without the spaces that the template puts around them.
        template: the text of one shot, with {input} and {output} once each. A prompt is its shots one after another and
            the template up to the output; spaces that end it belong to the answer, as " Paris".
        others: input → its outputs under other functions; what the corruption "others" draws from.

    Raises:
        DataError: no examples, empty ones, or a template that lacks a place or has one twice.
    """

    name: str
    examples: tuple[tuple[str, str], ...]
    template: str = QA
    others: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        held = tuple(tuple(e) for e in self.examples)
        wrong = next((e for e in held if len(e) != 2 or not all(isinstance(t, str) and t.strip() for t in e)), None)
        if not held or wrong is not None:
            raise DataError(f"task {self.name!r} needs (input, output) texts, got {wrong or 'none at all'}")
        marks = [self.template.count(mark) for mark in ("{input}", "{output}")]
        if marks != [1, 1] or self.template.index("{input}") > self.template.index("{output}"):
            raise DataError(f"template {self.template!r}: expected {{input}} once, and {{output}} once after it")
        object.__setattr__(self, "examples", held)

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def inputs(self) -> list[str]:
        """The inputs, each once, in order."""
        return list(dict.fromkeys(x for x, _ in self.examples))

    def shot(self, x: str, y: str) -> str:
        """Return one example as the template writes it."""
        before, between, after = self._parts()
        return before + x + between + y + after

    def question(self, x: str) -> str:
        """Return the template up to the output, without the spaces before it."""
        before, between, _ = self._parts()
        return (before + x + between).rstrip(" ")

    def answer(self, y: str) -> str:
        """Return an output with the spaces that the template puts before it."""
        between = self._parts()[1]
        return between[len(between.rstrip(" ")) :] + y

    def prompt(self, shots: Sequence[tuple[str, str]], x: str) -> str:
        """Return shots and a question as one text."""
        return "".join(self.shot(*s) for s in shots) + self.question(x)

    def with_template(self, template: str) -> "FunctionTask":
        """Return the same function in another wording, such as "The French for {input} is {output}.\\n"."""
        return replace(self, template=template)

    def split(self, *, validation: float = 0.3, test: float = 0.3, seed: int = 0) -> TaskSplits:
        """Return the task in three parts by input, so that examples of one input stay together.

        Args:
            validation: share of the inputs on which heads, layer and their number are chosen.
            test: share on which they are scored.
            seed: of the draw.

        Raises:
            ConfigError: shares that leave nothing to a part.
            DataError: too few inputs for three parts.
        """
        if not (0 < validation < 1 and 0 < test < 1 and validation + test < 1):
            raise ConfigError(f"validation={validation}, test={test}: expected shares > 0 that leave some for training")
        inputs = self.inputs
        sizes = [max(1, round(share * len(inputs))) for share in (test, validation)]
        if len(inputs) - sum(sizes) < 1:
            raise DataError(f"task {self.name!r} has {len(inputs)} inputs, too few for training, validation and test")
        random.Random(f"split/{self.name}/{seed}").shuffle(inputs)
        at = [0, sizes[0], sum(sizes), len(inputs)]
        parts = [set(inputs[a:b]) for a, b in pairwise(at)]
        made = [self.keep(lambda x, part=part: x in part) for part in parts]  # type: ignore[misc]
        return TaskSplits(made[2], made[1], made[0])

    def keep(self, wanted: Callable[[str], bool]) -> "FunctionTask":
        """Return the examples whose input a function of it wants."""
        return replace(self, examples=tuple(e for e in self.examples if wanted(e[0])))

    def _parts(self) -> tuple[str, str, str]:
        before, rest = self.template.split("{input}")
        between, after = rest.split("{output}")
        return before, between, after


def with_others(tasks: Mapping[str, FunctionTask]) -> dict[str, FunctionTask]:
    """Return tasks that know each other's outputs for the inputs they share.

    Args:
        tasks: the tasks, by name.
    """
    known: dict[str, dict[str, str]] = {}
    for name, task in tasks.items():
        for x, y in task.examples:
            known.setdefault(x, {}).setdefault(name, y)
    made = {}
    for name, task in tasks.items():
        shared = [x for x in task.inputs if len(known[x]) > 1]
        others = {x: tuple(dict.fromkeys(y for n, y in known[x].items() if n != name)) for x in shared}
        made[name] = replace(task, others=others)
    return made


def load_function_task(path: str | os.PathLike[str], *, template: str = QA) -> FunctionTask:
    """Read a task from JSON: a list of {"input": …, "output": …}, named after its file.

    Args:
        path: the file.
        template: the text of one shot.

    Raises:
        ArtifactError: no such file, or one of another form; says which entry.

    Source: the files of Todd et al. (2023), arXiv 2310.15213.
    """
    file = Path(path)
    try:
        held = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as err:
        raise ArtifactError(f"{file} cannot be read as JSON ({err}); give a list of input and output") from err
    if not isinstance(held, list) or not held:
        raise ArtifactError(f"{file} holds a {type(held).__name__}; expected a list of {{input, output}}")
    examples = []
    for i, entry in enumerate(held):
        known = isinstance(entry, dict) and {"input", "output"} <= entry.keys()
        if not known or not all(isinstance(entry[k], str | int) for k in ("input", "output")):
            raise ArtifactError(f"{file}, entry {i}: expected {{input, output}} with a text each, got {entry!r:.80}")
        examples.append((str(entry["input"]).strip(), str(entry["output"]).strip()))
    return FunctionTask(file.stem, tuple(examples), template)


def load_function_tasks(folder: str | os.PathLike[str], *, template: str = QA) -> dict[str, FunctionTask]:
    """Read every JSON file of a folder as a task; tasks that share inputs know each other's outputs.

    Args:
        folder: the folder; those in it are not looked into.
        template: the text of one shot.

    Returns:
        The tasks by name, in alphabetical order.

    Raises:
        ArtifactError: no JSON file, or one of another form.
    """
    files = sorted(Path(folder).glob("*.json"))
    if not files:
        inside = sorted(p.name for p in Path(folder).iterdir() if p.is_dir()) if Path(folder).is_dir() else []
        hint = f"; it holds the folders {', '.join(inside[:6])}" if inside else ""
        raise ArtifactError(f"{folder} holds no JSON file{hint}; give a folder of tasks")
    return with_others({file.stem: load_function_task(file, template=template) for file in files})


def icl_pairs(
    queries: FunctionTask,
    shots: FunctionTask,
    n: int | None = None,
    *,
    n_shots: int = 10,
    corruption: str = "shuffled",
    seed: int = 0,
) -> PromptPairs:
    """Return in-context prompts (clean) with their twins that do not show the function (corrupted).

    Both have one question and the same shots in the same order; the answers are the question's outputs.

    Args:
        queries: what is asked, in the wording of its template.
        shots: where shots come from; the question's own input is left out.
        n: prompts, their questions drawn without repetition as long as there are new ones; None asks each input once,
            in order.
        n_shots: shots of a prompt; 0 makes both sides the question alone.
        corruption: one of `CORRUPTIONS`.
        seed: of the draw.

    Raises:
        ConfigError: an unknown corruption, or counts below their least.
        DataError: too few shots, or shots without outputs of other functions where those are asked for.

    Source: Todd et al. (2023), arXiv 2310.15213, §2.3 ("shuffled"). As there, a shuffled output may keep its place.
    """
    if corruption not in CORRUPTIONS:
        hint = nearest(corruption, CORRUPTIONS) or "expected one of " + ", ".join(CORRUPTIONS)
        raise ConfigError(f"corruption={corruption!r}: {hint}")
    if n_shots < 0 or (n is not None and n < 1):
        raise ConfigError(f"n={n}, n_shots={n_shots}: expected n ≥ 1 (or None) and n_shots ≥ 0")
    pool = [e for e in shots.examples if corruption != "others" or e[0] in shots.others]
    if len({x for x, _ in pool} - {queries.examples[0][0]}) < n_shots:
        what = " with outputs of other functions (see with_others)" if corruption == "others" else ""
        raise DataError(f"task {shots.name!r} has {len(pool)} examples{what} to draw {n_shots} shots from; take fewer")
    draw = random.Random(f"icl/{queries.name}/{seed}")
    inputs = queries.inputs
    outputs = {x: tuple(dict.fromkeys(y for given, y in queries.examples if given == x)) for x in inputs}
    asked = inputs if n is None else [x for _ in range(-(-n // len(inputs))) for x in draw.sample(inputs, len(inputs))]
    made = []
    for x in asked[:n]:
        chosen = _draw_shots(draw, pool, x, n_shots)
        broken = _corrupted(draw, chosen, shots.others, corruption)
        clean, corrupted = (Prompt(queries.prompt(s, x)) for s in (chosen, broken))
        meta = {"task": queries.name, "input": x, "n_shots": n_shots, "corruption": corruption}
        made.append(Pair(clean, corrupted, tuple(queries.answer(y) for y in outputs[x]), (), meta))
    return PromptPairs(tuple(made), queries.name)


def _draw_shots(draw: random.Random, pool: Sequence[tuple[str, str]], x: str, n: int) -> list[tuple[str, str]]:
    """Shots of different inputs, none of them the question's."""
    found: dict[str, tuple[str, str]] = {}
    for shot in draw.sample(pool, len(pool)) if n else ():
        if shot[0] != x:
            found.setdefault(shot[0], shot)
        if len(found) == n:
            break
    if len(found) < n:
        raise DataError(f"only {len(found)} shots have another input than {x!r}, and {n} are needed; take fewer")
    return list(found.values())


def _corrupted(
    draw: random.Random, shots: list[tuple[str, str]], others: Mapping[str, tuple[str, ...]], corruption: str
) -> list[tuple[str, str]]:
    if corruption == "zero_shot":
        return []
    if corruption == "others":
        return [(x, draw.choice((y, *others[x]))) for x, y in shots]
    outputs = [y for _, y in shots]
    draw.shuffle(outputs)
    return [(x, y) for (x, _), y in zip(shots, outputs, strict=True)]
