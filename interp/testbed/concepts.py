"""Labels of the small world as concept data: what probes, directions and detectors are held to a known truth with."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp.core.errors import ConfigError, DataError, nearest
from interp.core.text import Tokens
from interp.data.concept_tokens import NOT_READ, ConceptTokens
from interp.testbed.text import LabelledTokens, Text, label_values
from interp.testbed.tokenizer import vocabulary
from interp.testbed.words import LABELS

if TYPE_CHECKING:
    from interp.core.manager import HookManager

__all__ = ["world_concept"]


def world_concept(
    hm: "HookManager | None",
    label: str,
    n: int = 200,
    ctx: int = 64,
    *,
    classes: Sequence[str] | None = None,
    roles: Sequence[str] | None = None,
    per_class: int | None = 500,
    seed: int = 0,
) -> ConceptTokens:
    """Return text of the small world with the classes of one of its labels beside the tokens that have it.

    Each row begins a document, and is a group of its own: a split keeps the tokens of a row together. The same word is
    in many rows, so a label that the word itself decides (number, language) is told by the token alone; the control
    task of a probe says how much of a score that is.

    Args:
        hm: the model that is to read it, whose vocabulary is checked; None leaves that to the run.
        label: such as sentiment, gender, number, language, function, topic or role.
        n: rows.
        ctx: tokens per row.
        classes: values of the label that are told apart, in the order of their codes; by default all that occur.
        roles: tokens with one of these roles alone.
        per_class: read at most so many tokens of a class, drawn at random; None reads all.
        seed: of the text, and of which tokens are read.

    Raises:
        ConfigError: an unknown label, class or role.
        DataError: fewer than two classes in this text, or a model of another vocabulary.
    """
    names = label_values(label)
    if hm is not None and hm.d_vocab < len(vocabulary()):
        raise DataError(
            f"{hm.name} has {hm.d_vocab} tokens and the small world {len(vocabulary())}; give a testbed model"
        )
    text = Text(seed).labelled_rows(n, ctx)
    codes = text.labels[label]
    read = codes != NOT_READ
    if roles is not None:
        known = LABELS["role"].values
        read &= torch.isin(text.labels["role"], torch.tensor([_code(known, role, "role") for role in roles]))
    present = codes[read].unique().tolist()
    if classes is not None:
        values = names or tuple(str(code) for code in present)
        if isinstance(classes, str) or len(set(classes)) < len(classes):
            raise ConfigError(f"classes={classes!r}: expected a list of values of {label!r}, each once")
        chosen = [_code(values, value, label) if names else int(value) for value in classes]
        present = [code for code in chosen if code in present]
    if len(present) < 2:
        raise DataError(f"{label!r} has {len(present)} of the wanted classes in {n} rows of {ctx}; give more rows")
    draw = torch.Generator().manual_seed(seed)
    labels = torch.full_like(codes, NOT_READ)
    for new, code in enumerate(present):
        labels[_drawn(read & (codes == code), per_class, draw)] = new
    return ConceptTokens(
        tokens=_tokens(hm, text),
        labels=labels,
        classes=tuple(names[code] if names else str(code) for code in present),
        groups=torch.arange(n),
        name=label,
    )


def _code(values: Sequence[str], wanted: str, what: str) -> int:
    if wanted not in values:
        hint = nearest(wanted, values) or "expected any of " + ", ".join(values)
        raise ConfigError(f"there is no {what} {wanted!r}; {hint}")
    return list(values).index(wanted)


def _drawn(at: Bool[Tensor, "row pos"], most: int | None, draw: torch.Generator) -> Bool[Tensor, "row pos"]:
    """Some of the tokens of a class, at random."""
    places = at.nonzero()
    if most is None or len(places) <= most:
        return at
    kept = places[torch.randperm(len(places), generator=draw)[:most]]
    found = torch.zeros_like(at)
    found[kept[:, 0], kept[:, 1]] = True
    return found


def _tokens(hm: Any, text: LabelledTokens) -> Tokens:
    ids: Int[Tensor, "row pos"] = text.ids
    return Tokens(ids, torch.ones_like(ids, dtype=torch.bool), bos=True, tokenizer=None if hm is None else hm.tokenizer)


# The name that was agreed on first. pytest takes an imported function of that name for a test.
