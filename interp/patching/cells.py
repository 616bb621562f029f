"""The cells of a patching grid at one site: places × heads, neurons, or the latents of a dictionary."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.errors import ShapeError
from interp.core.site import Site
from interp.core.sweep_cells import Cells
from interp.patching.places import Places

__all__ = ["grid_cells", "latent_cells"]

_HEAD_AXES = ("n_heads", "n_kv_heads")


def grid_cells(site: Site, value: Tensor, base: Tensor, places: Places, by: str) -> tuple[Cells, list[str]]:
    """Return the cells of one site, place by place, and within a place part by part.

    Args:
        site: the site.
        value: what is put there, broadcastable to base.
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
    return Cells.replacing(site, value, columns, base=base, heads=heads, units=units), parts


def latent_cells(
    site: Site, value: Float[Tensor, "batch pos d"], base: Float[Tensor, "batch pos d"], places: Places, *given: Any
) -> tuple[Cells, list[str]]:
    """Return cells that give one latent of a dictionary its value in another run, and leave the rest as it is.

    The activation changes by (latent there − latent here) times the latent's direction, so what the dictionary does not
    explain stays. Memory: latents of both runs, [batch pos latents].

    Args:
        site: the site that the dictionary reads and writes.
        value: the other run's activation.
        base: the activation of the run that is edited.
        places: the places.
        given: the dictionary, and which of its latents (None for all).

    Raises:
        ShapeError: a dictionary of another width, or one that writes elsewhere than it reads.
    """
    dictionary: Any = given[0]
    latents: Sequence[int] | None = given[1]
    d_sae, width = dictionary.W_dec.shape[0], base.shape[-1]
    chosen = torch.arange(d_sae) if latents is None else torch.as_tensor(latents)
    whole = chosen.ndim == 1 and chosen.dtype == torch.long and len(chosen) > 0
    if not whole or int(chosen.min()) < 0 or int(chosen.max()) >= d_sae:
        raise ShapeError(f"latents={latents!r}: the dictionary has latents 0 … {d_sae - 1}")
    with torch.no_grad():
        there, here = dictionary.encode(value), dictionary.encode(base)
        written = dictionary.decode(here[:1, :1]).shape[-1]
        if site.kind != "z" and written != width:
            raise ShapeError(f"the dictionary writes {written} numbers, and {site.short} has {width}")
        delta = (there - here)[..., chosen.to(here.device)]
        nothing = dictionary.decode(torch.zeros_like(here[0, :1]))

    @torch.no_grad()
    def new(x: Tensor, pick: Tensor, first: int) -> Tensor:
        which = chosen[pick % len(chosen)].to(x.device)
        one = torch.zeros(len(which), d_sae, device=x.device, dtype=x.dtype)
        one[torch.arange(len(which)), which] = 1.0
        direction = dictionary.decode(one) - nothing
        change = delta[:, first : first + x.shape[2]].index_select(2, (pick % len(chosen)).to(x.device))
        moved = change.permute(2, 0, 1)[..., None] * direction[:, None, None]
        return x + moved.reshape(x.shape).to(x.dtype)

    differs = (delta != 0).permute(2, 0, 1).cpu()
    columns = (places.columns[:, None] & differs[None]).flatten(0, 1)
    return Cells(site, columns, new), [str(i) for i in chosen.tolist()]
