"""The cells of a patching grid at one site: places × heads or neurons."""

import torch
from torch import Tensor

from interp.core.site import Site
from interp.core.sweep_cells import Cells
from interp.patching.places import Places

__all__ = ["grid_cells"]

_HEAD_AXES = ("n_heads", "n_kv_heads")


def grid_cells(site: Site, value: Tensor | None, base: Tensor, places: Places, by: str) -> tuple[Cells, list[str]]:
    """Return the cells of one site, place by place, and within a place part by part.

    Args:
        site: the site.
        value: what is put there, broadcastable to base; None keeps every cell, for a caller who gives its own values.
        base: the activation of the run that is edited.
        places: the places.
        by: one of `interp.patching.options.BY`.

    Returns:
        The cells and the label of each part.
    """
    heads = units = None
    parts = [""]
    n = len(places.columns)
    if by in ("head", "pos_head", "span_head"):
        size = base.shape[next(i for i, axis in enumerate(site.axes) if axis in _HEAD_AXES)]
        heads, parts = torch.arange(size).repeat(n), [str(h) for h in range(size)]
    elif by == "neuron":
        size = base.shape[-1]
        units, parts = torch.arange(size).repeat(n), [str(u) for u in range(size)]
    columns = places.columns.repeat_interleave(len(parts), 0)
    if value is None:
        return Cells.replacing(site, base, columns, heads=heads, units=units), parts
    return Cells.replacing(site, value, columns, base=base, heads=heads, units=units), parts
