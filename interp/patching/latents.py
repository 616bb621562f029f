"""The cells of a patching grid at one site that are latents of a dictionary, or of a transcoder that writes there."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.errors import ConfigError, ShapeError
from interp.core.manager import HookManager
from interp.core.site import Site
from interp.core.sweep_cells import Cells
from interp.dictionaries.base import Dictionary, Transcoder
from interp.dictionaries.processed import check_bound
from interp.patching.options import PatchOptions
from interp.patching.places import Places

__all__ = ["latent_cells", "read_sites"]


def read_sites(hm: HookManager, sites: Sequence[Site], options: PatchOptions) -> Mapping[Site, Site]:
    """Return, for each site whose latents are patched, the site that the dictionary reads; nothing for other columns.

    Args:
        hm: the model.
        sites: the sites that are edited.
        options: the dictionary, and what it reads where that is said.

    Raises:
        ConfigError: a transcoder that does not say what it reads, or that writes elsewhere than is patched.
    """
    if options.by != "latent":
        return {}
    dictionary = options.dictionary
    if isinstance(dictionary, Dictionary):
        check_bound(dictionary, hm)
    reads, writes = options.reads, None
    if isinstance(dictionary, Transcoder):
        reads = reads or dictionary.cfg.metadata.get("hook_name")
        writes = dictionary.cfg.metadata.get("hook_name_out")
        if reads is None:
            raise ConfigError(
                "by='latent': this transcoder does not say what it reads; give PatchOptions(reads=…), such as "
                "reads='1.mlp.in', or set its cfg.metadata['hook_name']"
            )
    if reads is None:
        return {site: site for site in sites}
    read, site = Site(reads), sites[0]
    elsewhere = writes is not None and Site(writes) != site
    if len(sites) > 1 or elsewhere:
        shown = ", ".join(s.short for s in sites)
        what = Site(writes).short if writes is not None else "one site"
        raise ConfigError(f"by='latent': the dictionary reads {read.short} and writes {what}; sites are {shown}")
    if (read.layer or 0) > (site.layer or 0):
        raise ConfigError(f"by='latent': the dictionary reads {read.short}, which comes after {site.short}")
    hm.atlas.point(read)
    return {site: read}


def latent_cells(
    site: Site,
    value: Float[Tensor, "batch pos *d"],
    base: Float[Tensor, "batch pos *d"],
    places: Places,
    *,
    dictionary: Any,
    latents: Sequence[int] | None,
    width: int,
) -> tuple[Cells, list[str]]:
    """Return cells that give one latent of a dictionary its value in another run, and leave the rest as it is.

    The activation changes by (latent there − latent here) times the latent's direction, so what the dictionary does not
    explain stays; with a transcoder so does what it reads, and what it lets past its latents. Memory: latents of both
    runs, [batch pos latents].

    Args:
        site: the site that the dictionary writes: the one it reads, but for a transcoder.
        value: what the dictionary reads, in the other run.
        base: the same in the run that is edited.
        places: the places.
        dictionary: the dictionary.
        latents: which of its latents; None for all.
        width: of the last axis of the site that is written.

    Raises:
        ShapeError: a dictionary of another width, or latents that it does not have.
    """
    d_sae = dictionary.W_dec.shape[0]
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
