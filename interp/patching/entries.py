"""Single entries of attention patterns and scores as cells: one destination, one source, one head or all of them."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.errors import DataError
from interp.core.run import Run
from interp.core.site import Site
from interp.core.sweep_cells import Cells
from interp.core.text import Tokens
from interp.patching.places import Places, key_columns

__all__ = ["align_keys", "entry_cells", "entry_labels"]


def entry_cells(
    site: Site,
    value: Float[Tensor, "some heads dest src"],
    base: Float[Tensor, "batch n_heads pos src"],
    dest: Places,
    keys: Places,
    *,
    by_head: bool,
) -> tuple[Cells, list[str]]:
    """Return a cell for each destination, each source and, if asked, each head, in that order.

    An entry that is the same in both runs, such as that of a later source, is a cell that changes nothing. Memory:
    2 · cells · batch · pos bytes.

    Args:
        site: pattern or attn_scores.
        value: what is put there, broadcastable to base.
        base: that of the run that is edited.
        dest: the places of the queries, one column in each row.
        keys: the places of the keys, one column in each row.
        by_head: whether heads are patched one by one.

    Returns:
        The cells and the label of each head.
    """
    differs = (value.to(base.device) != base).float().cpu()
    differs = differs if by_head else differs.amax(1, keepdim=True)
    queries, sources = dest.columns.float(), keys.columns.float()
    changed = torch.einsum("pbi,bhij,qbj->pqhb", queries, differs, sources) > 0
    n_dest, n_src, n_heads, batch = changed.shape
    columns = (changed[..., None] & dest.columns[:, None, None]).reshape(-1, batch, base.shape[2])
    src = keys.columns[None, :, None].expand(n_dest, -1, n_heads, -1, -1).reshape(-1, batch, base.shape[3])
    heads = torch.arange(n_heads).repeat(n_dest * n_src) if by_head else None
    parts = [str(h) for h in range(n_heads)] if by_head else [""]
    return Cells.replacing(site, value, columns, heads=heads, src=src), parts


def entry_labels(dest: Places, keys: Places, parts: list[str]) -> list[str]:
    """Return the labels of the cells: destination, source, head."""
    ends = [f" · {part}" if part else "" for part in parts]
    return [f"{d} ← {s}{end}" for d in dest.labels for s in keys.labels for end in ends]


def align_keys(
    values: Mapping[Site, Tensor], base: Mapping[Site, Tensor] | Run, edited: Tokens, other: Tokens
) -> Mapping[Site, Tensor]:
    """Return values of another run whose keys lie in the columns that they have in the edited run.

    Args:
        values: site → the other run's activation; those without keys stay as they are.
        base: the edited run's activations, which pads keep.
        edited: the run that is edited.
        other: the other one.

    Raises:
        DataError: prompts of unequal length, whose keys do not correspond.
    """
    keyed = next((site for site in values if "src" in site.axes), None)
    if keyed is None:
        return values
    odd = (edited.lengths != other.lengths).nonzero()[:, 0].tolist()
    if odd:
        a, b = int(edited.lengths[odd[0]]), int(other.lengths[odd[0]])
        raise DataError(
            f"{keyed.short} has an axis of keys, and the prompts of pair {odd[0]} differ in length ({a} and {b} "
            "tokens), so its keys would not correspond; reword them to one length, or patch q, k, v or z"
        )
    match, real = key_columns(edited, other), edited.mask[:, None, None]

    def aligned(x: Tensor, here: Tensor) -> Tensor:
        index = match.to(x.device)[:, None, None].expand(*x.shape[:3], -1)
        return torch.where(real.to(x.device), x.gather(3, index), here.to(x.device))

    return {site: aligned(x, base[site]) if "src" in site.axes else x for site, x in values.items()}
