"""How well a model does the tasks of the small world: accuracy against chance, and the loss on random repeats."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.errors import ConfigError, DataError
from interp.core.intervention import Intervention
from interp.core.manager import HookManager
from interp.core.metrics import loss_per_token
from interp.core.result import Provenance, Result
from interp.testbed.tasks import case_tokens, draw_cases, token_ids
from interp.testbed.text import TASKS, Text, task_named
from interp.testbed.tokenizer import vocabulary
from interp.testbed.words import SPECIAL, Case

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

__all__ = ["RepeatLoss", "TaskScores", "check_vocabulary", "repeat_loss", "task_scores", "text_loss"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class TaskScores(Result):
    """How a model does each task.

    Attributes:
        tasks: names, in order.
        n: examples of each.
        accuracy: share of examples in which the best right answer has a larger logit than every other token.
        choice_accuracy: share in which the best right answer has a larger logit than every foil.
        chance: what guessing among answers and foils would score in `choice_accuracy`.
        logit_diff: mean logit of the right answers minus mean logit of the foils, averaged over examples.
        held_out: whether the examples' combinations are kept out of training text.
    """

    title: ClassVar[str] = "Tasks of the small world"
    tasks: list[str]
    n: int
    accuracy: Float[Tensor, "task"]
    choice_accuracy: Float[Tensor, "task"]
    chance: Float[Tensor, "task"]
    logit_diff: Float[Tensor, "task"]
    held_out: bool

    def to_frame(self) -> "pandas.DataFrame":
        """One row a task."""
        import pandas

        columns = ("accuracy", "choice_accuracy", "chance", "logit_diff")
        return pandas.DataFrame({"task": self.tasks, **{name: getattr(self, name).tolist() for name in columns}})

    def plot(self) -> "plotly.graph_objects.Figure":
        """Accuracy of each task beside chance."""
        from interp.report.figures import Axis, line

        series = {"whole vocabulary": self.accuracy, "against foils": self.choice_accuracy, "chance": self.chance}
        return line(series, x=Axis("task", self.tasks), title=self.title, value="accuracy")

    def summary(self) -> str:
        """The table in lines."""
        part = "held out" if self.held_out else "in training"
        lines = [f"{'task':12} accuracy  against foils (chance)  logit difference     {self.n} examples each, {part}"]
        rows = zip(self.tasks, self.accuracy, self.choice_accuracy, self.chance, self.logit_diff, strict=True)
        lines += [f"{t:12} {a:8.3f}  {c:13.3f} ({ch:.3f})  {d:16.2f}" for t, a, c, ch, d in rows]
        return "\n".join(lines)


def task_scores(
    hm: HookManager,
    *,
    tasks: Sequence[str] | None = None,
    n: int = 200,
    seed: int = 0,
    held_out: bool = True,
    write: Sequence[Intervention] = (),
    batch_size: int = 100,
) -> TaskScores:
    """Ask a model that reads the world's tokens every task's questions.

    Memory: the logits of the last position alone, 4 · batch_size · d_vocab bytes, beside the forward's own.

    Args:
        hm: a model with the testbed's vocabulary.
        tasks: names; by default all.
        n: examples of each.
        seed: of the examples.
        held_out: ask for combinations that training text never has.
        write: edits to make meanwhile; the scores are those of the edited model.
        batch_size: prompts per forward.

    Raises:
        ConfigError: an unknown task, no task, no examples, or no prompt in a batch.
        DataError: the model has another vocabulary.
    """
    chosen = list(TASKS if tasks is None else tasks)
    if not chosen or n < 1 or batch_size < 1:
        what = f"{len(chosen)} tasks, n {n} and batch_size {batch_size}"
        raise ConfigError(f"{what} were given; at least 1 of each is needed (leave `tasks` out for all)")
    for name in chosen:
        task_named(name)
    check_vocabulary(hm)
    rows = []
    for name in chosen:
        cases = draw_cases(name, n, seed=seed, held_out=held_out)
        parts = [_score(hm, cases[i : i + batch_size], write) for i in range(0, n, batch_size)]
        rows.append(torch.cat(parts).double().mean(0).float())
    accuracy, choice, chance, diff = torch.stack(rows).unbind(1)
    settings = {"tasks": chosen, "n": n, "held_out": held_out, "write": [str(w.site) for w in write]}
    return TaskScores(
        provenance=Provenance.of(hm, settings=settings, seed=seed),
        tasks=chosen,
        n=n,
        accuracy=accuracy,
        choice_accuracy=choice,
        chance=chance,
        logit_diff=diff,
        held_out=held_out,
    )


def check_vocabulary(hm: HookManager) -> None:
    """Refuse a model that does not read the world's tokens.

    Raises:
        DataError: the model has another vocabulary.
    """
    size = len(vocabulary())
    if hm.d_vocab != size:
        raise DataError(
            f"{hm.name} has {hm.d_vocab} tokens and the small world {size}; load 'testbed' or 'testbed-llama', or "
            "train a model on this text"
        )


def _score(hm: HookManager, cases: Sequence[Case], write: Sequence[Intervention]) -> Float[Tensor, "case 4"]:
    """Per example: right over all, right over the foils, chance, logit difference."""
    logits = hm.run(case_tokens(cases), logits="last", write=list(write)).logits
    last = logits.reshape(len(cases), -1).float().cpu()
    rows = []
    for case, given in zip(cases, last, strict=True):
        right, wrong = given[token_ids(case.answers)], given[token_ids(case.foils)]
        best = right.max()
        others = given.index_fill(0, token_ids(case.answers), -torch.inf)  # a tie is not a right answer
        chance = len(right) / (len(right) + len(wrong))
        rows.append([float(best > others.max()), float(best > wrong.max()), chance, float(right.mean() - wrong.mean())])
    return torch.tensor(rows)


@dataclass(frozen=True)
class RepeatLoss:
    """Mean loss, in nats per token, on two copies of random tokens.

    Attributes:
        first: on the first copy, its first token left out.
        second: on the second copy, its first token left out: nothing says that the segment ends there.
    """

    first: float
    second: float

    @property
    def ratio(self) -> float:
        """The second loss as a share of the first."""
        return self.second / self.first


def repeat_loss(
    hm: HookManager, *, period: int = 40, n: int = 100, seed: int = 0, write: Sequence[Intervention] = ()
) -> RepeatLoss:
    """Measure what a model gains from having seen a random segment before.

    Args:
        hm: the model.
        period: tokens in one copy, drawn without replacement from the whole vocabulary but the special tokens.
        n: segments.
        seed: of the segments.
        write: edits to make meanwhile, such as ablated heads.

    Raises:
        ConfigError: a period below 2 or of more tokens than there are, or no segments.
        DataError: the model has another vocabulary.
    """
    ordinary = torch.arange(len(SPECIAL), len(vocabulary()))
    if not 2 <= period <= len(ordinary) or n < 1:
        raise ConfigError(
            f"period is {period} and n {n}; 2 to {len(ordinary)} tokens and at least 1 segment are needed"
        )
    check_vocabulary(hm)
    draw = torch.Generator().manual_seed(seed)
    segment = torch.stack([ordinary[torch.randperm(len(ordinary), generator=draw)[:period]] for _ in range(n)])
    ids = torch.cat([torch.zeros(n, 1, dtype=torch.long), segment, segment], 1)
    losses = _losses(hm, ids, write)
    first, second = losses[:, 1:period], losses[:, period + 1 :]
    return RepeatLoss(float(first.mean()), float(second.mean()))


def text_loss(
    hm: HookManager,
    *,
    rows: int = 50,
    ctx: int = 128,
    seed: int = 0,
    held_out: bool = False,
    write: Sequence[Intervention] = (),
) -> float:
    """Mean loss on fresh text of the world, in nats per token; the first token of a row is not predicted.

    Args:
        hm: the model.
        rows: rows of text.
        ctx: tokens per row.
        seed: of the text; told apart from training text's seeds by a word of its own.
        held_out: text of held-out combinations alone.
        write: edits to make meanwhile.

    Raises:
        DataError: the model has another vocabulary.
        ConfigError: no rows, or rows of one token.
    """
    if rows < 1 or ctx < 2:
        raise ConfigError(f"rows is {rows} and ctx {ctx}; at least 1 row of 2 tokens is needed")
    check_vocabulary(hm)
    ids, _, _ = Text(f"fresh {seed}", held_out=held_out).rows(rows, ctx)
    return float(_losses(hm, ids, write).mean())


def _losses(
    hm: HookManager, ids: Int[Tensor, "row pos"], write: Sequence[Intervention]
) -> Float[Tensor, "row pos_less_1"]:
    """The loss of predicting each token but the first, in nats; 4 · row · pos · d_vocab bytes of logits."""
    logits = hm.run(ids, logits="all", write=list(write)).logits
    assert logits is not None
    return loss_per_token(logits, ids)[0].double().cpu()
