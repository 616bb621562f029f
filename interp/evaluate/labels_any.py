"""Which labels of the small world some dictionary of several finds.

The dictionary is chosen as its latent is: on the rows to choose by. So is that of each control, among as many of its
kind: a union of many directions without meaning finds more than one of them, and that is what the count is held to.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.errors import ConfigError, DataError
from interp.evaluate.labels import CONTROLS, LabelScores, ends_of, interval_of_found

if TYPE_CHECKING:
    import pandas

__all__ = ["LabelsOfAny", "labels_found_by_any"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class LabelsOfAny(LabelScores):
    """How well some latent of some dictionary says where each value of each label is; else as `LabelScores`.

    Attributes:
        dictionaries: their names.
        dictionary: of each value, which of them says it best, on the tokens to choose by.
    """

    title: ClassVar[str] = "Labels of the small world, by any dictionary"
    dictionaries: list[str]
    dictionary: Int[Tensor, "value"]

    def figures(self) -> dict[str, float]:
        """The counts, by the names that `interp.evaluate.definitions` has for them."""
        said = super().figures()
        names = ("", "_in_context", *(f"_{name}" for name in CONTROLS))
        return {f"labels_found_by_any{name}": said[f"labels_found{name}"] for name in names}

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per value, the best found first, with the dictionary that finds it."""
        order = self.f1.argsort(descending=True, stable=True)
        frame = super().to_frame()
        frame.insert(1, "dictionary", [self.dictionaries[i] for i in self.dictionary[order].tolist()])
        return frame

    def summary(self) -> str:
        """Say how many values are found, and by the controls."""
        said, (low, high) = self.figures(), self.found_interval
        start = "labels_found_by_any"
        others = ", ".join(f"{name} {said[f'{start}_{name}']:.0f}" for name in CONTROLS)
        return (
            f"any of {len(self.dictionaries)}: {said[start]:.0f} of {len(self.names)} label values are found with "
            f"F1 ≥ 0.8 (95 % interval {low:.0f} to {high:.0f}); {said[f'{start}_in_context']:.0f} of them no set of "
            f"tokens finds; controls, chosen and scored alike: {others}"
        )


def labels_found_by_any(scores: Mapping[str, LabelScores], *, seed: int = 0) -> LabelsOfAny:
    """Find which labels some dictionary finds, the dictionary chosen on the rows that its latent was chosen on.

    Args:
        scores: name → labels of one dictionary, all on the same rows. Give each dictionary at one site a seed of its
            own there: else its random directions are those of the others, and the control has fewer than it says.
        seed: of the bootstrap.

    Returns:
        For each value the scores of the one latent chosen; each control as the best of its kind, chosen alike. What
        tokens tell does not depend on dictionaries. Rows are resampled with the choice left as it is.

    Raises:
        ConfigError: no dictionary.
        DataError: dictionaries that were scored on different rows.

    Source: none; the split of the rows is that of `label_scores`.
    """
    if not scores:
        raise ConfigError("no dictionary was given; give the label scores of at least one, by name")
    held = list(scores.values())
    first = held[0]
    for name, one in scores.items():
        same = one.names == first.names and one.by_row[2].equal(first.by_row[2]) and one.n_fit == first.n_fit
        if not same:
            raise DataError(
                f"{name} was scored on other rows than {next(iter(scores))}: {len(one.names)} values on {one.n_tokens} "
                f"tokens, {len(first.names)} on {first.n_tokens}; give label_scores the same text for all"
            )
    which = torch.stack([one.chosen_f1 for one in held]).argmax(0)  # of equal ones the first
    at = torch.arange(len(which))
    taken = {
        name: torch.stack([getattr(one, name) for one in held])[which, at]
        for name in ("latent", "level", "f1", "precision", "recall", "chosen_f1")
    }
    by_row = torch.stack([one.by_row for one in held], 1)[:, which, at]
    shuffles = torch.stack([_best(part) for part in torch.stack([one.shuffles for one in held], 1)])
    shuffled = shuffles[:, 1].amax(0)
    random, pca = (_best(torch.stack([_pair(one, name) for one in held])) for name in ("random", "pca"))
    low, high = ends_of(by_row)
    settings = {"dictionaries": list(scores), "sites": [one.site for one in held], **first.provenance.settings}
    return LabelsOfAny(
        dictionaries=list(scores),
        dictionary=which,
        site=", ".join(dict.fromkeys(one.site for one in held)),
        n_fit=first.n_fit,
        n_tokens=first.n_tokens,
        n_rows=first.n_rows,
        names=first.names,
        pair=first.pair,
        count=first.count,
        low=low,
        high=high,
        shuffled=shuffled,
        random=random[1],
        pca=pca[1],
        tokens=first.tokens,
        found_interval=interval_of_found(by_row, shuffled, torch.Generator().manual_seed(seed)),
        by_row=by_row,
        shuffles=shuffles,
        chosen_random=random[0],
        chosen_pca=pca[0],
        provenance=replace(first.provenance, settings=settings, seed=seed),
        **taken,
    )


def _pair(one: LabelScores, name: str) -> Float[Tensor, "2 value"]:
    return torch.stack([getattr(one, f"chosen_{name}").double(), getattr(one, name).double()])


def _best(scored: Float[Tensor, "dictionary 2 value"]) -> Float[Tensor, "2 value"]:
    """Of each value, F1 to choose by and F1 scored, both of the dictionary with the largest to choose by."""
    which = scored[:, 0].argmax(0)
    return scored[which, :, torch.arange(len(which))].T
