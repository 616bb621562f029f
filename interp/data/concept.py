"""`Concept`: a concept's texts to fit on and to judge by, with its hard negatives."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from interp.core.errors import DataError
from interp.core.where import Where
from interp.data.concept_tokens import ConceptTokens
from interp.data.contrast import Contrast
from interp.data.prompt import Prompt

if TYPE_CHECKING:
    from interp.core.manager import HookManager

__all__ = ["Concept"]


@dataclass(frozen=True, eq=False)
class Concept:
    """What a method of detection or steering is given of one concept, and what it is judged by.

    Args:
        name: what it is called.
        fit: texts, or labelled tokens, that methods are fitted on.
        held_out: others that they are judged by.
        hard: texts that look as if they had the concept and lack it; with texts alone.
        where: which tokens of texts are read, by default every one that is not special; labelled tokens say so
            themselves.
        words: tokens that show the concept when a model says them; steering is scored by them where no judge is given.
        opposite: tokens that show its opposite.

    Raises:
        DataError: hard negatives beside labelled tokens, or a word on both sides.
    """

    name: str
    fit: Contrast | ConceptTokens
    held_out: Contrast | ConceptTokens
    hard: tuple[Prompt, ...] = ()
    where: Where | None = None
    words: tuple[str, ...] = ()
    opposite: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.hard and not isinstance(self.held_out, Contrast):
            raise DataError(
                f"{self.name!r}: hard negatives are texts; give the held-out data as a Contrast of texts too"
            )
        both = set(self.words) & set(self.opposite)
        if both:
            raise DataError(f"{self.name!r}: {sorted(both)[0]!r} is a word of the concept and of its opposite")

    @classmethod
    def of(
        cls,
        data: Contrast | ConceptTokens,
        *,
        share: float = 0.4,
        seed: int = 0,
        words: Sequence[str] = (),
        opposite: Sequence[str] = (),
        where: Where | None = None,
        hm: "HookManager | None" = None,
    ) -> "Concept":
        """Return a concept whose held-out part is drawn from its data, groups whole.

        Args:
            data: labelled tokens, or texts.
            share: of the groups, held out.
            seed: of the draw.
            words, opposite, where: as for the class.
            hm: the model, or its tokenizer; needed for texts.

        Raises:
            DataError: texts without a model, or what `ConceptTokens.split` refuses.
        """
        if isinstance(data, Contrast):
            if hm is None:
                raise DataError(f"{data.name!r} is texts, which are split as tokens; give hm=")
            data = data.tokens(hm, where=Where() if where is None else where)
        fit, held_out = data.split(share, seed=seed)
        return cls(data.name, fit, held_out, words=tuple(words), opposite=tuple(opposite))

    def tokens(self, hm: "HookManager", part: str = "fit") -> ConceptTokens:
        """Return a part as tokens with two classes.

        Args:
            hm: the model.
            part: "fit", "held_out", or "hard": the held-out positives against the hard negatives.

        Raises:
            DataError: another part, no hard negatives, or labelled tokens of more classes than two.
        """
        if part not in ("fit", "held_out", "hard"):
            raise DataError(f"part={part!r}: expected 'fit', 'held_out' or 'hard'")
        if part == "hard" and not self.hard:
            raise DataError(f"{self.name!r} has no hard negatives")
        data = self.fit if part == "fit" else self.held_out
        if isinstance(data, Contrast):
            if part == "hard":
                data = Contrast.make(data.positive, self.hard, paired=False, name=self.name)
            return data.tokens(hm, where=Where() if self.where is None else self.where)
        if len(data.classes) != 2:
            raise DataError(f"{self.name!r} has the classes {', '.join(data.classes)}; choose one with .binary(…)")
        return data
