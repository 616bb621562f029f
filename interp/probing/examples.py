"""What a probe is fitted and tested on: examples in three parts that share no group, and the labels of its controls."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp.core.errors import ConfigError, DataError
from interp.core.manager import HookManager
from interp.core.site import Site
from interp.core.where import Where
from interp.data.concept_tokens import ConceptTokens
from interp.data.contrast import Contrast
from interp.data.gather import Gathered, gather
from interp.data.pairs import PromptPairs
from interp.data.same_text import whole_texts

__all__ = ["FIT", "TASKS", "TEST", "VALIDATION", "Examples", "Split", "control_labels", "read_examples", "split_groups"]

FIT, VALIDATION, TEST = 0, 1, 2
"""The parts of a split: what weights are fitted on, what a penalty is chosen on, and what nothing was chosen by."""

TASKS = ("probe", "control", "shuffled")
"""What is fitted: the labels; a random class for each kind of token (or each text); the labels of other examples."""

_TRIES = 50
_FEW_KINDS = 10


class Split(NamedTuple):
    """How examples are parted, by group.

    Attributes:
        test: share of the groups that are held out for the scores.
        validation: share of the groups that a penalty is chosen on.
        seed: of the draw.
    """

    test: float = 0.3
    validation: float = 0.2
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Examples:
    """Examples at every site, with their parts and the labels of every task.

    Attributes:
        held: short site name → activations and labels.
        part: `FIT`, `VALIDATION` or `TEST` of each example.
        labels: class of each example in each of `TASKS`; a task that cannot be made is left out.
        data: the tokens that were read.
        notes: how the control was made, or why it was not.
    """

    held: Mapping[str, Gathered]
    part: Int[Tensor, " n"]
    labels: Mapping[str, Int[Tensor, " n"]]
    data: ConceptTokens
    notes: tuple[str, ...]

    @property
    def first(self) -> Gathered:
        """The examples of the first site; all sites have the same ones but for their activations."""
        return next(iter(self.held.values()))

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Examples to fit on, to choose on, to test on; and groups of the test."""
        test = self.at(TEST)
        return len(self.at(FIT)), len(self.at(VALIDATION)), len(test), len(self.first.group[test].unique())

    def at(self, *parts: int) -> Int[Tensor, " m"]:
        """Numbers of the examples of some parts."""
        return torch.isin(self.part, torch.tensor(parts)).nonzero()[:, 0]


def read_examples(
    hm: HookManager,
    data: Contrast | ConceptTokens | PromptPairs,
    sites: Sequence[Site | str] | Site | str,
    *,
    where: Where | None,
    pool: str,
    split: Split,
    batch_size: int,
) -> Examples:
    """Read the activations of concept data in one pass, part them by group, and make the labels of the controls.

    Args:
        hm: the model.
        data: texts or labelled tokens.
        sites: names or globs.
        where: the token rule of texts; labelled tokens have their own.
        pool: as for `gather`.
        split: shares of the parts.
        batch_size: rows per forward.

    Raises:
        ConfigError: shares that leave a part empty.
        DataError: too few groups for three parts with every class in each.
    """
    tokens = as_tokens(hm, data, where)
    held = gather(hm, tokens, sites, pool=pool, batch_size=batch_size)
    first = next(iter(held.values()))
    part = split_groups(first.group, first.y, split)
    labels = {"probe": first.y}
    kinds, kind_of = _kinds(tokens, first, pool)
    made = _control(kinds, first.y, part, len(first.classes), split.seed)
    notes = [*tokens.notes, f"the control task gives each {kind_of} a random class"]
    if made is None:
        notes[-1] = f"no control task: {int(kinds.max()) + 1} kinds of {kind_of} do not give every class in every part"
    else:
        labels["control"] = made
    shuffled = _read_labels(tokens.shuffled(seed=split.seed), pool)
    if _complete(shuffled, part, len(first.classes)):
        labels["shuffled"] = shuffled
    else:
        notes.append("no shuffled labels: they leave a part without a class")
    return Examples(held, part, labels, tokens, tuple(notes))


def as_tokens(hm: HookManager, data: Contrast | ConceptTokens | PromptPairs, where: Where | None) -> ConceptTokens:
    """Return any form of concept data as labelled tokens, of any number of classes; a text is in one group alone.

    Raises:
        DataError: tokens that have labels already and a rule beside.
    """
    if not isinstance(data, ConceptTokens):
        texts = Contrast.of_pairs(data) if isinstance(data, PromptPairs) else data
        return whole_texts(texts.tokens(hm, where=where))
    if where is not None:
        raise DataError("these tokens say themselves which of them are read; leave where=… out")
    return whole_texts(data)


def split_groups(group: Int[Tensor, " n"], y: Int[Tensor, " n"], split: Split) -> Int[Tensor, " n"]:
    """Return the part of each example: groups are kept whole, and every class is in every part.

    Draws again, up to 50 times, where a part lacks a class.

    Args:
        group: of each example.
        y: its class.
        split: shares of the groups.

    Raises:
        ConfigError: shares that are not positive, or add to 1 or more.
        DataError: fewer than three groups, or no draw in which each part has each class.
    """
    if not (0 < split.test < 1 and 0 < split.validation < 1 and split.test + split.validation < 1):
        raise ConfigError(f"{split}: the shares of test and validation are positive and leave something to fit on")
    known, at = group.unique(return_inverse=True)
    if len(known) < 3:
        raise DataError(f"{len(known)} groups cannot be split into fit, validation and test; give more groups")
    n_test, n_val = (max(1, round(share * len(known))) for share in (split.test, split.validation))
    n_test = min(n_test, len(known) - 2)
    n_val = min(n_val, len(known) - 1 - n_test)
    draw = torch.Generator().manual_seed(split.seed)
    for _ in range(_TRIES):
        order = torch.randperm(len(known), generator=draw)
        of_group = torch.full((len(known),), FIT)
        of_group[order[:n_test]] = TEST
        of_group[order[n_test : n_test + n_val]] = VALIDATION
        part = of_group[at]
        if _complete(part=part, y=y, n_classes=int(y.max()) + 1):
            _assert_disjoint(group, part)
            return part
    counts = [int((y == c).sum()) for c in range(int(y.max()) + 1)]
    raise DataError(
        f"no split of {len(known)} groups has every class in every part (examples of each class: {counts}); give more "
        "groups of the rare class, or other shares"
    )


def control_labels(kind: Int[Tensor, " n"], shares: Sequence[float], *, seed: int = 0) -> Int[Tensor, " n"]:
    """Return a random class for each kind of example: what a probe can learn of a token without learning a concept.

    The class of a kind depends on the seed, the shares and the number of the kind alone, so it is the same in any data.

    Args:
        kind: number of each example's kind, such as its token's id.
        shares: how often each class is drawn.
        seed: of the draw.

    Source: control tasks of Hewitt and Liang (2019, arXiv 1909.03368), §2, with classes drawn at the task's shares.
    """
    draw = torch.Generator().manual_seed(seed)
    drawn = torch.rand(int(kind.max()) + 1, generator=draw, dtype=torch.float64)
    ends = torch.tensor(shares, dtype=torch.float64).cumsum(0)
    return torch.bucketize(drawn, ends[:-1] / ends[-1], right=True)[kind]


def _complete(y: Int[Tensor, " n"], part: Int[Tensor, " n"], n_classes: int) -> bool:
    cells = torch.bincount(part * n_classes + y, minlength=3 * n_classes)
    return bool((cells > 0).all())


def _assert_disjoint(group: Int[Tensor, " n"], part: Int[Tensor, " n"]) -> None:
    pairs = torch.stack([group, part]).unique(dim=1)
    assert pairs.shape[1] == len(group.unique()), "a group is in two parts of a split"


def _control(
    kinds: Int[Tensor, " n"], y: Int[Tensor, " n"], part: Int[Tensor, " n"], n_classes: int, seed: int
) -> Int[Tensor, " n"] | None:
    shares = [float((y == code).double().mean()) for code in range(n_classes)]
    for extra in range(_TRIES):
        made = control_labels(kinds, shares, seed=seed + 7919 * extra)
        if _complete(made, part, n_classes):
            return made
    return None


def _kinds(tokens: ConceptTokens, held: Gathered, pool: str) -> tuple[Int[Tensor, " n"], str]:
    """The kind of each example: its token, or its row's text where all examples end in a few tokens."""
    if pool == "each":
        ids = tokens.tokens.ids[tokens.read]
        if len(ids.unique()) >= _FEW_KINDS:
            return ids, "token"
    texts = tokens.tokens.ids.masked_fill(~tokens.tokens.mask, -1).unique(dim=0, return_inverse=True)[1]
    return texts[held.row], "text"


def _read_labels(tokens: ConceptTokens, pool: str) -> Int[Tensor, " n"]:
    read: Bool[Tensor, "row pos"] = tokens.read
    return tokens.labels[read] if pool == "each" else tokens.labels.max(1).values
