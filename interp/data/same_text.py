"""Rows of one text: known by their tokens, and kept on one side of every split."""

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from interp.core.text import Tokens

if TYPE_CHECKING:
    from interp.data.concept_tokens import ConceptTokens

__all__ = ["row_keys", "whole_texts"]

_FEWEST = 3  # groups that a split into fit, validation and test needs


def row_keys(tokens: Tokens) -> Int[Tensor, " row"]:
    """Return a number for each row that rows of the same tokens share, whatever their padding.

    Args:
        tokens: the rows.
    """
    rows = (ids[mask].tolist() for ids, mask in zip(tokens.ids.cpu(), tokens.mask.cpu(), strict=True))
    found = [hashlib.sha256(repr(row).encode()).digest()[:8] for row in rows]
    return torch.tensor([int.from_bytes(key, "big", signed=True) for key in found], dtype=torch.long)


def whole_texts(data: "ConceptTokens") -> "ConceptTokens":
    """Return data in which groups that share a text are one group, so that no text is on two sides of a split.

    A text that stands twice would be fitted on and then judged by. Where the groups would become fewer than three, they
    are left, and a note says so.

    Args:
        data: labelled tokens.
    """
    keys, groups = row_keys(data.tokens).tolist(), data.groups.tolist()
    parent = {group: group for group in groups}

    def root(group: int) -> int:
        while parent[group] != group:
            parent[group] = parent[parent[group]]
            group = parent[group]
        return group

    first: dict[int, int] = {}
    for key, group in zip(keys, groups, strict=True):
        a, b = root(first.setdefault(key, group)), root(group)
        parent[max(a, b)] = min(a, b)
    merged = [root(group) for group in groups]
    if merged == groups:
        return data
    twice = sum(count > 1 for count in torch.tensor(keys).unique(return_counts=True)[1].tolist())
    if len(set(merged)) < _FEWEST <= len(set(groups)):
        note = f"{twice} texts stand in several rows, which tie all groups together: what is held out is also fitted on"
        return replace(data, notes=(*data.notes, note))
    note = f"{twice} texts stand in several rows; groups that share one count as one"
    return replace(data, groups=torch.tensor(merged), notes=(*data.notes, note))
