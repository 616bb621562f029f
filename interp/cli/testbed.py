"""`interp testbed`: the small world and its models: describe, sample, tasks, pairs, card, rebuild."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Card", "Describe", "Pairs", "Rebuild", "Sample", "Tasks", "main"]

_STOPPED = 143
_Name = Literal["testbed", "testbed-llama"]
_Flag = tyro.conf.FlagCreatePairsOff


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid")

    json_output: Annotated[bool, tyro.conf.arg(name="json"), _Flag] = Field(
        default=False, description="print one JSON value on stdout, and nothing else there"
    )


class Describe(_Options):
    """Say what the small world holds, how its tokens are labelled, and which models come with it."""


class Tasks(_Options):
    """List the tasks: what each asks, which combinations are held out, and an example."""


class Sample(_Options):
    """Print documents of the world's text, or their tokens with all labels."""

    n: int = Field(default=5, gt=0, description="documents")
    task: str | None = Field(default=None, description="only this task; by default all")
    seed: int = Field(default=0, ge=0, description="of the text")
    held_out: Annotated[bool, _Flag] = Field(
        default=False, description="combinations that training text never has, instead of those it has"
    )
    labels: Annotated[bool, _Flag] = Field(default=False, description="one line a token, with every label that applies")


class Pairs(_Options):
    """Write clean and corrupted prompts of a task as a JSON file that `interp.PromptPairs.load` reads."""

    task: str = Field(description="name of the task; `interp testbed tasks` lists them")
    out: Path = Field(description="file to write; it must not be there yet")
    n: int = Field(default=100, gt=0, description="pairs")
    seed: int = Field(default=0, ge=0, description="of the draw")
    training: Annotated[bool, _Flag] = Field(
        default=False, description="training combinations instead of held-out ones"
    )


class Card(_Options):
    """Measure what a model of the world can do: every task against chance, induction, loss."""

    model: str = Field(default="testbed", description="testbed, testbed-llama, or a folder of a model of this world")
    n: int = Field(default=200, gt=0, description="held-out examples of each task")
    seed: int = Field(default=0, ge=0, description="of everything drawn")
    markdown: Annotated[bool, _Flag] = Field(default=False, description="print the card as Markdown")


class Rebuild(_Options):
    """Train a packaged model again from nothing, by its own configuration, and keep checkpoints on the way."""

    out: Path = Field(description="folder to write; it must not hold anything yet")
    model: _Name = Field(default="testbed", description="which of the two")
    steps: int | None = Field(default=None, gt=0, description="stop the schedule after so many steps; by default all")
    resume: Annotated[bool, _Flag] = Field(default=False, description="go on from the state in --out")
    dry_run: Annotated[bool, _Flag] = Field(default=False, description="print the configuration and stop")


_VERBS: dict[str, type[_Options]] = {
    "describe": Describe,
    "tasks": Tasks,
    "sample": Sample,
    "pairs": Pairs,
    "card": Card,
    "rebuild": Rebuild,
}


def main(argv: list[str]) -> int:
    """Run one of the testbed's commands.

    Args:
        argv: The arguments after `interp testbed`.

    Returns:
        The exit code: 0 done, 2 bad usage, 143 stopped by a signal with a state to resume from.

    Raises:
        InterpError: The command failed.
    """
    options: Any = tyro.extras.subcommand_cli_from_dict(dict(_VERBS), prog="interp testbed", args=argv)
    run: dict[type[_Options], Callable[[Any], int]] = {
        Describe: _describe,
        Tasks: _tasks,
        Sample: _sample,
        Pairs: _pairs,
        Card: _card,
        Rebuild: _rebuild,
    }
    return run[type(options)](options)


def _show(options: _Options, value: Any, text: str) -> int:
    sys.stdout.write((json.dumps(value, indent=1, ensure_ascii=False) if options.json_output else text) + "\n")
    return 0


def _describe(options: Describe) -> int:
    from interp.core.loading import PACKAGED
    from interp.testbed.text import TASKS, label_values
    from interp.testbed.tokenizer import vocabulary
    from interp.testbed.words import LABELS

    labels = [{"label": n, "meaning": found.meaning, "values": list(label_values(n))} for n, found in LABELS.items()]
    record = {"models": list(PACKAGED), "tokens": len(vocabulary()), "tasks": list(TASKS), "labels": labels}
    width = max(map(len, LABELS))
    lines = [
        f"The small world: {len(TASKS)} tasks in {len(vocabulary()):,} tokens; endless documents, by seed and number.",
        f"models   {', '.join(PACKAGED)}   (interp.HookManager.load takes these names)",
        f"tasks    {', '.join(TASKS)}",
        "labels of every token:",
        *(f"  {name:<{width}}  {found.meaning}{_values(label_values(name))}" for name, found in LABELS.items()),
    ]
    return _show(options, record, "\n".join(lines))


def _values(values: tuple[str, ...]) -> str:
    if not values:
        return ""
    shown = ", ".join(values[:6]) + (f", … ({len(values)} in all)" if len(values) > 6 else "")
    return f": {shown}"


def _tasks(options: Tasks) -> int:
    from interp.testbed.tasks import draw_cases
    from interp.testbed.text import TASKS

    rows = []
    for task in TASKS.values():
        case = draw_cases(task.name, 1, seed=1)[0]
        example = {"prompt": case.prompt, "answers": list(case.answers[:3])}
        rows.append({"task": task.name, "asks": task.description, "held_out_by": task.held_out_by, **example})
    lines = [
        f"{row['task']:<10} {row['asks']}\n{'':10} held out by {row['held_out_by']}\n{'':10} {_one_line(row)}"
        for row in rows
    ]
    return _show(options, rows, "\n".join(lines))


def _one_line(row: dict[str, Any]) -> str:
    prompt = row["prompt"].replace("\n", "⏎")
    return f"{prompt if len(prompt) < 90 else '…' + prompt[-88:]} →{row['answers'][0]}"


def _sample(options: Sample) -> int:
    from interp.testbed.text import Text

    tasks = None if options.task is None else [options.task]
    text = Text(options.seed, held_out=options.held_out, tasks=tasks)
    documents = list(text.documents(options.n))
    if not options.labels:
        return _show(options, [d.text for d in documents], "\n\n".join(d.text for d in documents))
    frames = [d.labelled().to_frame() for d in documents]
    rows = [
        [{str(k): v for k, v in row.items() if v is not None and v == v} for row in frame.to_dict("records")]
        for frame in frames
    ]
    lines = ["\n".join(_labelled(row) for row in document) for document in rows]
    return _show(options, rows, "\n\n".join(lines))


def _labelled(row: dict[str, Any]) -> str:
    token = json.dumps(row["token"], ensure_ascii=False)
    said = ", ".join(f"{k} {int(v) if isinstance(v, float) else v}" for k, v in row.items() if k != "token")
    return f"{token:<16} {said}"


def _pairs(options: Pairs) -> int:
    from interp.core.errors import ArtifactError
    from interp.testbed.tasks import task_pairs

    if options.out.exists():
        raise ArtifactError(f"{options.out} is there already; choose another file")
    pairs = task_pairs(options.task, options.n, seed=options.seed, held_out=not options.training)
    pairs.save(options.out)
    return _show(options, {"out": str(options.out), "pairs": len(pairs)}, f"{len(pairs)} pairs in {options.out}")


def _card(options: Card) -> int:
    from interp.core.manager import HookManager
    from interp.probing.card import world_card

    card = world_card(HookManager.load(options.model), n=options.n, seed=options.seed)
    record = {
        "model": options.model,
        "parameters": card.parameters,
        "loss": card.loss,
        "repeat": [card.repeat_first, card.repeat_second, card.repeat_ablated],
        "tasks": card.to_frame().to_dict("records"),
    }
    return _show(options, record, card.to_markdown() if options.markdown else card.summary())


def _rebuild(options: Rebuild) -> int:
    from interp.train.build_testbed import BuildConfig, build_testbed

    cfg = BuildConfig.packaged(options.model)
    if options.steps is not None:
        cfg = cfg.shortened(options.steps)
    if options.dry_run:
        return _show(options, cfg.model_dump(mode="json"), cfg.to_yaml())
    training = build_testbed(cfg, options.out, resume=options.resume)
    record = {"out": str(options.out), "steps": training.steps, "tokens": training.tokens, "stopped": training.stopped}
    where = f"the model is in {options.out / 'final'}, checkpoints in {options.out / 'checkpoints'}"
    _show(options, record, training.summary() if training.stopped else f"{training.summary()}\n{where}")
    return _STOPPED if training.stopped else 0
