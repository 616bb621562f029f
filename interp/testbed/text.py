"""Text about the small world as a stream of documents, with a label for every token."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp.core.errors import ConfigError, nearest
from interp.testbed.repeats import REPEAT
from interp.testbed.tokenizer import vocabulary
from interp.testbed.worded import WORDED
from interp.testbed.words import LABELS, Case, Task, join

if TYPE_CHECKING:
    import pandas

__all__ = ["TASKS", "WORLD_TASKS", "Document", "LabelledTokens", "Text", "label_values", "task_named", "text_ids"]

TASKS: dict[str, Task] = {**WORDED, REPEAT.name: REPEAT}
# The task whose passages hold random bytes is left out, as bytes do not survive being text.
WORLD_TASKS = tuple(name for name in TASKS if name != REPEAT.name)
_MOST_PASSAGES = 4
_BOS, _EOS = 0, 1
_NONE = -1
_RANDOM = LABELS["role"].values.index("random")


def task_named(name: str) -> Task:
    """A task by its name.

    Raises:
        ConfigError: there is no such task; the nearest name is said.
    """
    if name not in TASKS:
        hint = nearest(name, TASKS) or "tasks: " + ", ".join(TASKS)
        raise ConfigError(f"the world has no task {name!r}; {hint}")
    return TASKS[name]


def label_values(name: str) -> tuple[str, ...]:
    """The names of a label's codes; empty where a code is a number in its own right.

    Raises:
        ConfigError: there is no such label.
    """
    if name not in LABELS:
        hint = nearest(name, LABELS) or "labels: " + ", ".join(LABELS)
        raise ConfigError(f"there is no label {name!r}; {hint}")
    if name == "task":
        return tuple(TASKS)
    if name == "concept":
        from interp.testbed.world import concepts

        return concepts()
    return LABELS[name].values


@dataclass(frozen=True)
class LabelledTokens:
    """Tokens and, beside each, its latent variables.

    Attributes:
        ids: token ids.
        labels: label → code of every token; −1 where the label does not apply. `label_values` names the codes.
    """

    ids: Int[Tensor, "*shape"]
    labels: Mapping[str, Int[Tensor, "*shape"]]

    def to_frame(self) -> "pandas.DataFrame":
        """One row a token: its text and its labels by name (numbers where a code is a number; empty where none)."""
        import pandas

        names = {name: label_values(name) for name in self.labels}
        table: dict[str, list[Any]] = {"token": [vocabulary()[i] for i in self.ids.flatten().tolist()]}
        for name, codes in self.labels.items():
            values = names[name]
            table[name] = [
                None if code == _NONE else values[code] if values else code for code in codes.flatten().tolist()
            ]
        return pandas.DataFrame(table)


@dataclass(frozen=True)
class Document:
    """One document: passages that are read one after the other.

    Attributes:
        cases: the passages, in order.
    """

    cases: Sequence[Case]

    @property
    def text(self) -> str:
        """As it is read; random single bytes of the task "repeat" are shown as the replacement character."""
        return join([w for case in self.cases for w in case.words])

    def ids(self) -> list[int]:
        """Its tokens, from BOS to EOS."""
        table = text_ids()
        body = [table[w.text] if w.id is None else w.id for case in self.cases for w in case.words]
        return [_BOS, *body, _EOS]

    def decided(self) -> list[bool]:
        """For each token whether what stands before decides it."""
        return [False, *(bool(w.labels.get("answer")) for case in self.cases for w in case.words), False]

    def labelled(self) -> LabelledTokens:
        """Its tokens with their labels; BOS and EOS have none."""
        columns: dict[str, list[int]] = {name: [_NONE] for name in LABELS}
        order = list(TASKS)
        for case in self.cases:
            common = {**case.labels, "task": order.index(case.task), "template": case.template}
            common["held_out"] = int(case.held_out)
            for i, given in enumerate(case.words):
                known = {name: code for name, (start, code) in case.since.items() if i >= start}
                # What is not decided by what stands before is open; "answer" applies to every word.
                said: dict[str, int] = {"answer": 0, **common, **known, **given.labels}
                if given.text.strip().isalpha() and said.get("role") != _RANDOM:
                    said.setdefault("language", 0)
                for name, column in columns.items():
                    column.append(said.get(name, _NONE))
        for column in columns.values():
            column.append(_NONE)
        return LabelledTokens(torch.tensor(self.ids()), {n: torch.tensor(c) for n, c in columns.items()})


@cache
def text_ids() -> dict[str, int]:
    """Text of a token → its id, for words; a single byte's id stands before those of longer texts."""
    table: dict[str, int] = {}
    for i, text in enumerate(vocabulary()):
        table.setdefault(text, i)
    return table


class Text:
    """The world's text: document `i` is a function of the seed and `i` alone.

    Args:
        seed: of the draw.
        held_out: draw every passage from the held-out combinations; training text has none of them.
        tasks: names of the tasks to draw from, by default all; their shares stay in proportion.

    Raises:
        ConfigError: an unknown task, or none.
    """

    def __init__(self, seed: int | str = 0, *, held_out: bool = False, tasks: Sequence[str] | None = None) -> None:
        chosen = [task_named(name) for name in (TASKS if tasks is None else tasks)]
        if not chosen:
            raise ConfigError("no tasks were given; leave `tasks` out for all of them")
        self.seed, self.held_out = seed, held_out
        self._chosen, self._shares = chosen, [task.share for task in chosen]
        self._prose = [task for task in chosen if task.prose]

    def document(self, index: int) -> Document:
        """One document: one passage of a list task, or up to four passages of prose."""
        draw = random.Random(f"{self.seed}/{index}")
        (first,) = draw.choices(self._chosen, self._shares)
        tasks = [first]
        if first.prose:
            more = draw.randint(0, _MOST_PASSAGES - 1)
            tasks += draw.choices(self._prose, [task.share for task in self._prose], k=more)
        return Document([task.draw(draw, self.held_out) for task in tasks])

    def documents(self, n: int, *, start: int = 0) -> Iterator[Document]:
        """Documents `start` to `start + n`."""
        return (self.document(i) for i in range(start, start + n))

    def rows(self, n: int, ctx: int, *, start: int = 0) -> tuple[Int[Tensor, "n ctx"], Bool[Tensor, "n ctx"], int]:
        """Rows of tokens, each beginning with a document's BOS and cut at `ctx`.

        Args:
            n: rows.
            ctx: tokens per row.
            start: number of the first document.

        Returns:
            Tokens, for each whether what stands before decides it, and the number of the document to go on with.

        Raises:
            ConfigError: no rows, rows of no tokens, or a document before the first.
        """
        _check_rows(n, ctx, start)
        ids, decided, at = [], [], start
        for _ in range(n):
            row: list[int] = []
            known: list[bool] = []
            while len(row) < ctx:
                document = self.document(at)
                row += document.ids()
                known += document.decided()
                at += 1
            ids.append(row[:ctx])
            decided.append(known[:ctx])
        return torch.tensor(ids), torch.tensor(decided), at

    def labelled_rows(self, n: int, ctx: int, *, start: int = 0) -> LabelledTokens:
        """The same rows with their labels.

        Args:
            n: rows.
            ctx: tokens per row.
            start: number of the first document.

        Raises:
            ConfigError: as for `rows`.
        """
        _check_rows(n, ctx, start)
        rows, at = [], start
        for _ in range(n):
            parts: list[LabelledTokens] = []
            while sum(len(part.ids) for part in parts) < ctx:
                parts.append(self.document(at).labelled())
                at += 1
            rows.append(parts)
        return LabelledTokens(
            torch.stack([torch.cat([part.ids for part in parts])[:ctx] for parts in rows]),
            {
                name: torch.stack([torch.cat([part.labels[name] for part in parts])[:ctx] for parts in rows])
                for name in LABELS
            },
        )


def _check_rows(n: int, ctx: int, start: int) -> None:
    if n < 1 or ctx < 1 or start < 0:
        raise ConfigError(
            f"{n} rows of {ctx} tokens from document {start}: expected at least 1 row of 1 token, from document 0 on"
        )
