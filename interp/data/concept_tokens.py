"""`ConceptTokens`: rows of tokens with the class of one concept beside each token that is read."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp.core.errors import DataError
from interp.core.frame import Frame
from interp.core.text import Tokens, special_mask
from interp.core.where import Where
from interp.data.same_text import whole_texts

__all__ = ["NOT_READ", "ConceptTokens"]

NOT_READ = -1
"""The label of a token that no fit looks at."""


@dataclass(frozen=True, eq=False, repr=False)
class ConceptTokens:
    """Tokens ready to run, with the class of each token that is read.

    Args:
        tokens: the rows.
        labels: code of each token's class, -1 where it is not read.
        classes: names of the codes.
        groups: number of the group of each row; a split keeps groups whole.
        pairs: rows with one number are a pair that differs in the concept alone; None where there are none.
        name: what the concept is called.
        notes: what a reader of results should know.

    Raises:
        DataError: shapes that do not line up, unknown codes, a label at a pad, or fewer than two classes.
    """

    tokens: Tokens
    labels: Int[Tensor, "row pos"]
    classes: tuple[str, ...]
    groups: Int[Tensor, " row"]
    pairs: Int[Tensor, " row"] | None = None
    name: str = "concept"
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        shape, n = tuple(self.tokens.ids.shape), len(self.tokens)
        if tuple(self.labels.shape) != shape:
            raise DataError(f"labels {tuple(self.labels.shape)} are one per token {shape} [row pos]")
        for what, given in (("groups", self.groups), ("pairs", self.pairs)):
            if given is not None and tuple(given.shape) != (n,):
                raise DataError(f"{what} {tuple(given.shape)} are one per row [{n}]")
        if len(self.classes) < 2:
            raise DataError(f"{self.name!r} has the classes {self.classes}; there must be at least two to tell apart")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < NOT_READ or high >= len(self.classes):
            raise DataError(f"labels go from {low} to {high}; expected -1 (not read) to {len(self.classes) - 1}")
        if bool((self.labels[~self.tokens.mask] != NOT_READ).any()):
            raise DataError("a pad has a label; give -1 there")
        if high == NOT_READ:
            raise DataError(f"no token of {self.name!r} has a label, so nothing would be read")

    @classmethod
    def of_rows(
        cls,
        tokens: Tokens,
        label: Int[Tensor, " row"],
        *,
        where: Where,
        frame: Frame,
        classes: Sequence[str],
        groups: Int[Tensor, " row"],
        pairs: Int[Tensor, " row"] | None = None,
        name: str = "concept",
    ) -> "ConceptTokens":
        """Return rows that have one class each, read where a rule says.

        Args:
            tokens: the rows.
            label: code of each row's class.
            where: the token rule; special tokens are left out unless it names positions.
            frame: of the rows (`frame_of`), which says what `where` selects.
            classes, groups, pairs, name: as for the class.

        Raises:
            DataError: as for the class, or a row in which nothing is read.
        """
        chosen = where.columns(frame)
        if not _names_positions(where):
            chosen = chosen & ~special_mask(tokens.tokenizer, tokens.ids)
        empty = (~chosen.any(1)).nonzero()[:, 0].tolist()
        if empty:
            text = tokens.str_tokens[empty[0]] if tokens.tokenizer is not None else tokens.ids[empty[0]].tolist()
            raise DataError(f"{where!r} reads no token of row {empty[0]} ({text}); {len(empty)} rows are so")
        labels = torch.where(chosen, label[:, None], NOT_READ)
        return cls(tokens, labels, tuple(classes), groups, pairs, name)

    def __repr__(self) -> str:
        counts = ", ".join(f"{int((self.labels == i).sum())} {name}" for i, name in enumerate(self.classes[:6]))
        more = ", …" if len(self.classes) > 6 else ""
        pairs = ", in pairs" if self.pairs is not None else ""
        groups = len(self.groups.unique())
        return f"ConceptTokens({self.name!r}: {len(self)} rows, {groups} groups{pairs}; read {counts}{more})"

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, rows: Int[Tensor, " n"]) -> "ConceptTokens":
        """Return some of the rows, in this order."""
        pairs = None if self.pairs is None else self.pairs[rows]
        return replace(
            self, tokens=self.tokens.take(rows), labels=self.labels[rows], groups=self.groups[rows], pairs=pairs
        )

    def split(self, share: float = 0.3, *, seed: int = 0) -> tuple["ConceptTokens", "ConceptTokens"]:
        """Return two parts that share no group, and no text: to fit on, and held out.

        Args:
            share: of the groups, held out; at least one group on either side.
            seed: of the draw.

        Raises:
            DataError: a share outside (0, 1), or one group alone.
        """
        if not 0 < share < 1:
            raise DataError(f"share={share!r}: expected a share between 0 and 1 to hold out")
        groups = whole_texts(self).groups
        known = groups.unique()
        if len(known) < 2:
            raise DataError(f"all rows of {self.name!r} are of one group, so none can be held out; give groups")
        order = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))]
        n = min(max(1, round(share * len(known))), len(known) - 1)
        held = torch.isin(groups, order[:n])
        return self.take((~held).nonzero()[:, 0]), self.take(held.nonzero()[:, 0])

    def binary(self, positive: str | int) -> "ConceptTokens":
        """Return one class against the others.

        Args:
            positive: its name or code.

        Raises:
            DataError: no such class.
        """
        code = self.classes.index(positive) if positive in self.classes else positive
        if not isinstance(code, int) or not 0 <= code < len(self.classes):
            raise DataError(f"{self.name!r} has no class {positive!r}; its classes are {', '.join(self.classes)}")
        labels = torch.where(self.labels == NOT_READ, NOT_READ, (self.labels == code).long())
        return replace(
            self, labels=labels, classes=("other", self.classes[code]), name=f"{self.name} = {self.classes[code]}"
        )

    def shuffled(self, *, seed: int = 0) -> "ConceptTokens":
        """Return the same tokens with labels that say nothing: the null that every fit is held to.

        In pairs the two labels are exchanged or not, at random. Rows of one class each are given each other's classes.
        Where a row holds several classes, the labels of all read tokens are permuted.

        Args:
            seed: of the draw.

        Raises:
            DataError: one pair alone: exchanged or not, its difference is the true one.
        """
        draw = torch.Generator().manual_seed(seed)
        read = self.labels != NOT_READ
        top = self.labels.max(1).values
        plain = bool((torch.where(read, self.labels, top[:, None]) == top[:, None]).all())
        if not plain:
            values = self.labels[read]
            return replace(
                self, labels=self.labels.masked_scatter(read, values[torch.randperm(len(values), generator=draw)])
            )
        if self.pairs is not None and len(self.classes) == 2:
            known, at = self.pairs.unique(return_inverse=True)
            if len(known) < 2:
                raise DataError(f"{self.name!r} is one pair, whose labels cannot be shuffled; give two pairs at least")
            # Exactly half of the pairs change sides: a direction fitted on most of them would still be the true one.
            order = torch.randperm(len(known), generator=draw)
            flip = torch.zeros(len(known), dtype=torch.bool)
            flip[order[: len(known) // 2]] = True
            new = torch.where(flip[at], 1 - top, top)
        else:
            # Among the rows that are read: one in which nothing is has no class to give.
            rows = (top != NOT_READ).nonzero()[:, 0]
            new = top.clone()
            new[rows] = top[rows[torch.randperm(len(rows), generator=draw)]]
        return replace(self, labels=torch.where(read, new[:, None], NOT_READ))

    @property
    def read(self) -> Bool[Tensor, "row pos"]:
        """True at tokens that are read."""
        return self.labels != NOT_READ


def _names_positions(where: Any) -> bool:
    named = where.pos is not None or where.name is not None or where.tokens is not None or where.phase == "last_prompt"
    return bool(named or any(_names_positions(w) for w in where.any_of))
