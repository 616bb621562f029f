"""Gaussian ablation: an activation with noise of its own size added, one draw after another.

Source: Zhang and Nanda (2024), arXiv 2309.16042, §2 (Gaussian noise as a corruption), after Meng et al. (2022), arXiv
2202.05262, §2.1. Departure: there the noise is on the embeddings of the subject alone, here on the cell's activation.
"""

import hashlib
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.errors import DataError
from interp.core.site import Site
from interp.core.sweep_cells import Cells

__all__ = ["Noise", "mean_of_draws", "noise_at", "noisy_cells"]


@dataclass(frozen=True, eq=False)
class Noise:
    """The noise of one site.

    Attributes:
        draws: what is added, draw by draw; 0 on pads.
        sigma: standard deviation of the activation, in its units; the noise has a multiple of it.
    """

    draws: Float[Tensor, "draw batch pos *feature"]
    sigma: float


def noise_at(
    site: Site,
    base: Float[Tensor, "batch pos *feature"],
    real: Bool[Tensor, "batch pos"],
    special: Bool[Tensor, "batch pos"],
    *,
    scale: float,
    n_draws: int,
    seed: int,
) -> Noise:
    """Draw N(0, (scale · σ)²) for every real token, σ one number for the site.

    σ is over all entries of the activation at all tokens, special ones left out: the first token of a prompt is often
    many times as large as any other. A token's noise does not depend on the padding, nor on which other sites are
    patched. Memory: n_draws · activation.

    Args:
        site: the site, whose first axes are batch and position.
        base: its activation in the run that is edited.
        real: True where a token is no pad.
        special: True where it is BOS or the like.
        scale: the noise in σ.
        n_draws: how many draws.
        seed: of the noise.

    Raises:
        DataError: a site without positions as its second axis, such as attention patterns.
    """
    if site.axes[:2] != ("batch", "pos"):
        raise DataError(
            f"ablation='gaussian' adds noise to activations of positions, but {site.short} has axes "
            f"{' '.join(site.axes)}; use ablation='resample' there"
        )
    mask = real.to(base.device)
    counted = mask & ~special.to(base.device)
    sigma = base[counted if bool(counted.any()) else mask].float().std(correction=0)
    number = int.from_bytes(hashlib.sha256(f"{seed} {site.short}".encode()).digest()[:7], "big")
    drawn = torch.randn((n_draws, int(mask.sum()), *base.shape[2:]), generator=torch.Generator().manual_seed(number))
    draws = base.new_zeros((n_draws, *base.shape))
    draws[:, mask] = (drawn.to(base.device) * (scale * sigma)).to(base.dtype)
    return Noise(draws, float(sigma))


def noisy_cells(cells: Cells, noise: Noise) -> Cells:
    """Return the cells once for each draw, one draw of all of them after another, each adding its noise.

    Args:
        cells: the places, heads and units.
        noise: the site's.
    """
    n, count = len(cells), len(noise.draws)

    def new(x: Tensor, pick: Int[Tensor, " n"], first: int) -> Tensor:
        part = noise.draws.narrow(2, first, x.shape[2])
        return x + part.index_select(0, (pick // n).to(part.device)).to(x)

    def again(given: Int[Tensor, " cell"] | None) -> Int[Tensor, " more"] | None:
        return None if given is None else given.repeat(count)

    # An activation that is constant gets no noise, and its cells change nothing.
    columns = cells.columns.repeat(count, 1, 1) & (noise.sigma > 0)
    return Cells(cells.site, columns, new, heads=again(cells.heads), units=again(cells.units))


def mean_of_draws(
    values: Float[Tensor, "metric cells batch"], base: Float[Tensor, "metric batch"], n_sites: int, n_draws: int
) -> Float[Tensor, "metric few batch"]:
    """Return the mean over draws of every cell; one that changed nothing keeps the base's value exactly.

    Args:
        values: site by site, draw by draw, column by column.
        base: without an edit.
        n_sites, n_draws: how many.
    """
    if n_draws == 1:
        return values
    change = values.unflatten(1, (n_sites, n_draws, -1)) - base[:, None, None, None]
    return (base[:, None, None] + change.mean(2)).flatten(1, 2)
