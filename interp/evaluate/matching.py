"""What a unit stands for: the label that says best when it fires, and the best match that luck would give."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.result import token_names
from interp.testbed.text import label_values

if TYPE_CHECKING:
    from interp.core.manager import HookManager

__all__ = ["Matches", "best_matches", "best_units", "label_matches", "named_labels", "value_name"]

_ABOVE_CHANCE = 0.2
_TABLE = 1 << 24  # entries of a table of latents and values that is held at once: 128 MiB
# Codes of these labels mean something only within a task, or say how the text was drawn; "open" is most of all tokens.
_UNNAMED, _OPEN = ("template", "held_out"), ("answer", 0)


@dataclass(frozen=True, eq=False)
class Matches:
    """What each of `n` units matches best.

    Attributes:
        column: index of the column of labels; −1 for a unit that matches nothing at all.
        value: the code in that column; −1 likewise.
        f1: 2 · hits / (tokens on which the unit fires + tokens that have the value).
        precision: hits / tokens on which the unit fires.
        recall: hits / tokens that have the value.
        chance: the largest F1 of any column and value in any of the shuffles.
    """

    column: Int[Tensor, "n"]
    value: Int[Tensor, "n"]
    f1: Float[Tensor, "n"]
    precision: Float[Tensor, "n"]
    recall: Float[Tensor, "n"]
    chance: Float[Tensor, "n"]

    @property
    def claimed(self) -> Bool[Tensor, "n"]:
        """Whether (f1 − chance) / (1 − chance) ≥ 0.2: only then is a match more than luck."""
        return (self.f1 > self.chance) & (self.f1 - self.chance >= _ABOVE_CHANCE * (1 - self.chance))

    def places(self) -> tuple[list[int], list[int]]:
        """`column` and `value` as plain numbers."""
        return self.column.tolist(), self.value.tolist()


def best_matches(
    token: Int[Tensor, "firing"],
    unit: Int[Tensor, "firing"],
    columns: Mapping[str, Int[Tensor, "token"]],
    *,
    n: int,
    shuffles: int = 20,
    seed: int = 0,
) -> Matches:
    """Find, for each unit that fires or does not, the label and value that says best when; and what luck would find.

    Luck is the same search after the tokens' labels were permuted, all columns alike: frequencies and what labels
    have to do with each other stay as they are, what they have to do with the units is gone.

    Args:
        token: on which token, of those that count, each firing was.
        unit: of which unit it was, from 0 to n − 1.
        columns: name → code of every token that counts, −1 where the label does not apply. Of equal F1, the earlier
            column and the smaller code are taken.
        n: number of units.
        shuffles: permutations.
        seed: of the permutations.

    Returns:
        The best match of each unit, on the host.

    Source: F1 between a latent's active set and an attribute as in Makelov et al. 2024 (2405.08366). Departure: it is
    told apart from what shuffled labels reach.
    """
    order = unit.argsort(stable=True)
    token, unit = token[order], unit[order]
    fired = torch.bincount(unit, minlength=n)
    found = [_best(token, unit, fired, codes) for codes in columns.values()]
    f1, value, hits, total = (torch.stack(part) for part in zip(*found, strict=True))
    column = f1.argmax(0, keepdim=True)
    f1, value, hits, total = (part.gather(0, column)[0] for part in (f1, value, hits, total))
    chance, draw = torch.zeros(n), torch.Generator().manual_seed(seed)
    for _ in range(shuffles):
        moved = torch.randperm(len(next(iter(columns.values()))), generator=draw)[token]
        for codes in columns.values():
            chance = torch.maximum(chance, _best(moved, unit, fired, codes)[0])
    none = f1 == 0
    return Matches(
        column=column[0].masked_fill(none, -1),
        value=value.masked_fill(none, -1),
        f1=f1,
        precision=hits / fired.clamp_min(1),
        recall=hits / total.clamp_min(1),
        chance=chance,
    )


def label_matches(
    hm: "HookManager",
    token: Int[Tensor, "firing"],
    unit: Int[Tensor, "firing"],
    *,
    ids: Int[Tensor, "token"],
    labels: Mapping[str, Int[Tensor, "token"]],
    n: int,
) -> dict[str, Any]:
    """Match units with the tokens themselves and with the small world's labels of them.

    Args:
        hm: the manager whose tokenizer names tokens.
        token: on which token, of those that count, each firing was.
        unit: of which unit it was, from 0 to n − 1.
        ids: the tokens that count.
        labels: the code of each of them, by the label's name.
        n: number of units.

    Returns:
        `label`, `f1`, `precision`, `recall`, `chance` and `claimed` as `TopExamples` has them.
    """
    columns = {"token": ids, **named_labels(labels)}
    found = best_matches(token, unit, columns, n=n)
    texts = token_names(hm, found.value.clamp(min=0))
    names = list(columns)
    label = [value_name(names[c], v, t) if v >= 0 else "" for c, v, t in zip(*found.places(), texts, strict=True)]
    return {"label": label, **{x: getattr(found, x) for x in ("f1", "precision", "recall", "chance", "claimed")}}


def named_labels(labels: Mapping[str, Int[Tensor, "*token"]]) -> dict[str, Int[Tensor, "*token"]]:
    """The labels whose codes say something that a unit may stand for.

    Args:
        labels: name → code of every token.

    Returns:
        The same without labels that hold within a task only or say how text was drawn, and without "open", which
        most tokens are.
    """
    kept = {name: codes for name, codes in labels.items() if name not in _UNNAMED}
    return {
        name: codes.masked_fill(codes == _OPEN[1], -1) if name == _OPEN[0] else codes for name, codes in kept.items()
    }


def value_name(name: str, value: int, token: str = "") -> str:
    """Say what a label's code is.

    Args:
        name: of the label, or "token".
        value: the code.
        token: text of a token, where the label is "token".
    """
    if name == "token":
        return f"token {token!r}"
    values = label_values(name)
    return f"{name} {values[value] if values else value}"


def best_units(
    token: Int[Tensor, "firing"], unit: Int[Tensor, "firing"], codes: Int[Tensor, "token"], *, n: int
) -> tuple[Float[Tensor, "value"], Int[Tensor, "value"]]:
    """Find, for each value of one label, the unit whose firing says best where it is.

    Args:
        token: on which token each firing was.
        unit: of which unit it was, from 0 to n − 1.
        codes: of every token; −1 where the label does not apply.
        n: number of units.

    Returns:
        The largest F1 of any unit, and which unit has it (of equal ones the first), for each code from 0 on.
    """
    order = unit.argsort(stable=True)
    token, unit = token[order], unit[order]
    fired = torch.bincount(unit, minlength=n)
    width = max(int(codes.max()), 0) + 1
    best, which = torch.full((width,), -1.0), torch.zeros(width, dtype=torch.long)
    for first, hits, total in _tables(token, unit, fired, codes):
        f1 = 2 * hits / (fired[first : first + len(hits), None] + total).clamp_min(1)
        most, at = f1.max(0)
        which = torch.where(most > best, at + first, which)
        best = torch.maximum(most, best)
    return best, which


def _best(token: Tensor, unit: Tensor, fired: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of one column: each unit's best F1, the value that has it, hits, and tokens with that value."""
    parts = []
    for first, hits, total in _tables(token, unit, fired, codes):
        best = (2 * hits / (fired[first : first + len(hits), None] + total).clamp_min(1)).max(1)
        parts.append((best.values, best.indices, hits.gather(1, best.indices[:, None])[:, 0], total[best.indices]))
    f1, value, hits, totals = (torch.cat(part) for part in zip(*parts, strict=True))
    return f1, value, hits, totals


def _tables(token: Tensor, unit: Tensor, fired: Tensor, codes: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Some units at a time, of firings in their order: the first, hits [unit value], and tokens with each value."""
    # Column 0 of a table is for tokens that have no value; every code stands one further on.
    width = max(int(codes.max()), 0) + 2
    total = torch.bincount(codes + 1, minlength=width)[1:]
    step = max(1, _TABLE // width)
    for first in range(0, len(fired), step):
        count = min(step, len(fired) - first)
        mine = slice(*torch.searchsorted(unit, torch.tensor([first, first + count])).tolist())
        places = (unit[mine] - first) * width + codes[token[mine]] + 1
        yield first, torch.bincount(places, minlength=count * width).view(count, width)[:, 1:], total
