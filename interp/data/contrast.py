"""`Contrast`: texts that have a concept and texts that lack it; what directions and probes are fitted on."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from interp.core.errors import DataError, WhereError
from interp.core.passes import frame_of
from interp.core.where import Where
from interp.data.concept_tokens import ConceptTokens
from interp.data.pair_tokenizing import tokenize_prompts
from interp.data.pairs import PromptPairs
from interp.data.prompt import Prompt

__all__ = ["Contrast"]

Groups = tuple[tuple[Any, ...], tuple[Any, ...]]


@dataclass(frozen=True, repr=False)
class Contrast:
    """Texts with a concept and texts without it, independent of any model.

    Make one with `make`, from `PromptPairs` with `of_pairs`, or with a loader of task data.

    Args:
        positive: texts that have the concept.
        negative: texts that lack it.
        paired: whether text i of either side differ in the concept alone.
        groups: what each text of either side belongs to (a template, a source); a split keeps groups whole. None
            puts each pair, or each text, in a group of its own.
        name: what the concept is called in results.

    Raises:
        DataError: a side without texts, pairs that do not match, or groups for other texts.
    """

    positive: tuple[Prompt, ...]
    negative: tuple[Prompt, ...]
    paired: bool = False
    groups: Groups | None = None
    name: str = "concept"

    def __post_init__(self) -> None:
        for side in ("positive", "negative"):
            texts = getattr(self, side)
            if isinstance(texts, str) or not texts:
                raise DataError(f"{self.name!r} needs a list of {side} texts, got {texts!r}")
            wrong = next((type(t) for t in texts if not isinstance(t, Prompt)), None)
            if wrong is not None:
                hint = "Contrast.make takes plain texts" if wrong is str else "expected text or a Prompt"
                raise DataError(f"a {side} text of {self.name!r} is {wrong.__name__}; {hint}")
            object.__setattr__(self, side, tuple(texts))
        n, m = len(self.positive), len(self.negative)
        if self.paired and n != m:
            raise DataError(f"{self.name!r} has {n} positive and {m} negative texts, which cannot be pairs")
        if self.groups is not None:
            held = tuple(tuple(side) for side in self.groups)
            if len(held) != 2 or (len(held[0]), len(held[1])) != (n, m):
                raise DataError(f"groups are one per text of either side: {n} and {m}, got {[len(g) for g in held]}")
            if self.paired and held[0] != held[1]:
                raise DataError("the two texts of a pair belong to one group; give both sides the same groups")
            object.__setattr__(self, "groups", held)

    @classmethod
    def make(
        cls,
        positive: Sequence[str | Prompt],
        negative: Sequence[str | Prompt],
        *,
        paired: bool | None = None,
        groups: Any = None,
        name: str = "concept",
    ) -> "Contrast":
        """Return a contrast of plain lists.

        Args:
            positive: texts with the concept.
            negative: texts without it.
            paired: None takes lists of one length for pairs.
            groups: one list for both sides of pairs, or two lists, of the positive and of the negative texts.
            name: what the concept is called.

        Raises:
            DataError: as for the class.
        """
        if isinstance(positive, str) or isinstance(negative, str):
            raise DataError("positive and negative are lists of texts, one text alone was given; put it in a list")
        if not isinstance(positive, Iterable) or not isinstance(negative, Iterable):
            given = type(negative if isinstance(positive, Iterable) else positive).__name__
            raise DataError(f"positive and negative are lists of texts, got {given}")
        positive, negative = tuple(positive), tuple(negative)
        pairs = len(positive) == len(negative) if paired is None else paired
        if groups is not None:
            two = len(groups) == 2 and all(isinstance(side, list | tuple) for side in groups)
            groups = tuple(tuple(side) for side in (groups if two else (groups, groups)))
        a, b = (tuple(Prompt(t) if isinstance(t, str) else t for t in texts) for texts in (positive, negative))
        return cls(a, b, pairs, groups, name)

    @classmethod
    def of_pairs(
        cls, pairs: PromptPairs, *, name: str | None = None, positive: Callable[[Any], bool] | None = None
    ) -> "Contrast":
        """Return clean prompts as positive and corrupted ones as negative; groups are their templates, where known.

        Args:
            pairs: the pairs.
            name: what the concept is called; the pairs' name by default.
            positive: for each `Pair`, whether its clean prompt has the concept; else its corrupted one does.
        """
        kept = [positive is None or bool(positive(e)) for e in pairs]
        sides = [(e.clean, e.corrupted) if k else (e.corrupted, e.clean) for e, k in zip(pairs, kept, strict=True)]
        forms = [e.meta.get("template") for e in pairs]
        groups = None if any(f is None for f in forms) else (tuple(forms), tuple(forms))
        return cls(tuple(a for a, _ in sides), tuple(b for _, b in sides), True, groups, name or pairs.name)

    def __len__(self) -> int:
        return len(self.positive) + len(self.negative)

    def __repr__(self) -> str:
        pairs = "pairs" if self.paired else "unpaired"
        groups = "" if self.groups is None else f", {len({str(g) for side in self.groups for g in side})} groups"
        shown = repr(self.positive[0].text[:60]), repr(self.negative[0].text[:60])
        counts = f"{len(self.positive)} positive, {len(self.negative)} negative, {pairs}{groups}"
        return f"Contrast({self.name!r}: {counts}; such as {shown[0]} and {shown[1]})"

    def head(self, n: int) -> "Contrast":
        """Return the first n texts of either side.

        Raises:
            DataError: n is below 1.
        """
        if n < 1:
            raise DataError(f"head({n}): expected at least one text of either side")
        groups = None if self.groups is None else (self.groups[0][:n], self.groups[1][:n])
        return replace(self, positive=self.positive[:n], negative=self.negative[:n], groups=groups)

    def swap(self) -> "Contrast":
        """Return the contrast with its sides exchanged."""
        groups = None if self.groups is None else (self.groups[1], self.groups[0])
        return replace(self, positive=self.negative, negative=self.positive, groups=groups)

    def tokens(
        self, hm: Any, *, where: Where | None = None, side: str = "right", bos: bool | None = None
    ) -> ConceptTokens:
        """Return the texts as tokens with the class of each position that is read: 1 positive, 0 negative.

        Args:
            hm: a `HookManager`, or a tokenizer.
            where: the token rule: which positions of each text are read. The last token by default; `Where()` takes
                every token that is not special; a position that is named is taken, special or not.
            side: where pads go.
            bos: as in `HookManager.to_tokens`.

        Raises:
            DataError: no tokenizer, texts that do not fit the model, or one in which nothing is read.
            WhereError: a rule that is no `Where`.
        """
        rule = Where(pos=-1) if where is None else where
        if not isinstance(rule, Where):
            raise WhereError(f"where={rule!r}: expected a Where, as Where(pos=-1)")
        if rule.needs_generation:
            raise DataError(f"{rule!r} selects generated tokens, and these are texts; read them with a prompt's rule")
        tokenizer = hm.tokenizer if hasattr(hm, "to_tokens") else hm
        tokens = tokenize_prompts(tokenizer, (*self.positive, *self.negative), bos=bos, side=side)
        if hasattr(hm, "to_tokens"):
            hm.to_tokens(tokens)
        n, m = len(self.positive), len(self.negative)
        label = torch.tensor([1] * n + [0] * m)
        return ConceptTokens.of_rows(
            tokens,
            label,
            where=rule,
            frame=frame_of(tokens, 0, n + m),
            classes=("negative", "positive"),
            groups=self._group_numbers(),
            pairs=torch.tensor([*range(n), *range(n)]) if self.paired else None,
            name=self.name,
        )

    def _group_numbers(self) -> Int[Tensor, " text"]:
        n, m = len(self.positive), len(self.negative)
        if self.groups is None:
            return torch.tensor([*range(n), *(range(m) if self.paired else range(n, n + m))])
        values = [str(g) for side in self.groups for g in side]
        known = {value: i for i, value in enumerate(dict.fromkeys(values))}
        return torch.tensor([known[value] for value in values])
