"""The contexts in which latents fire, from the strongest to weak ones, gathered in one pass over the text.

A context is a window of tokens around the one where a latent is most active in a document's piece of a row: at most
one per piece, and none that reads the same as another.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from interp.data.tokens import TokenBlock

__all__ = ["Contexts"]

_QUANTILES, _LOWER, _SAMPLE = (0.5, 0.1), 3, 40  # of the weaker contexts: which, how many of each, out of how many


class Contexts:
    """The strongest contexts of some latents, and a random sample of the others.

    Memory, in bytes: for each latent `(n_examples + 40) · (2 · context + 1) · 12`.

    Args:
        n: number of latents.
        n_examples: strongest contexts of each.
        context: tokens on each side of the strongest one.
        device: where latents come from.
    """

    def __init__(self, n: int, n_examples: int, context: int, device: torch.device) -> None:
        self.n, self.n_examples, self.context = n, n_examples, context
        self.strongest, self.sample = (_Best(n, size, 2 * context + 1, device) for size in (n_examples, _SAMPLE))

    def offer(self, active: Float[Tensor, "token n"], rows: TokenBlock) -> None:
        """Take in some rows of text.

        Args:
            active: how active each latent is at each of their tokens, row after row; 0 where one does not count.
            rows: the rows.
        """
        windows = _Windows(rows, self.context, active.device)
        self.strongest.offer(active, active, windows)
        self.sample.offer(torch.where(active > 0, windows.lot[:, None], 0), active, windows)

    def tables(self) -> dict[str, Tensor]:
        """What was found, on the host: `ids`, `activations`, `band`, `doc` and `pos` as `TopExamples` has them."""
        found = [self._of(i) for i in range(self.n)]
        return {name: torch.stack([one[name] for one in found]) for name in found[0]}

    def _of(self, i: int) -> dict[str, Tensor]:
        """The strongest contexts of one latent, then those of the sample that are nearest to each quantile."""
        best, sample, middle = self.strongest, self.sample, self.context
        values = sample.activations[i, :, middle].masked_fill(sample.rank[i].isneginf(), torch.nan)
        left = ~values.isnan() & ~torch.isin(sample.key[i], best.key[i])
        band, picks = [torch.where(best.rank[i].isneginf(), -1, 0)], []
        for number, quantile in enumerate(_QUANTILES, 1):
            off = (values - values.nanquantile(quantile)).abs().masked_fill(~left, torch.inf)
            near = off.argsort(stable=True)[: min(_LOWER, int(left.sum()))]
            left[near] = False
            picks.append(near[values[near].argsort(descending=True, stable=True)])
            band.append(torch.full_like(near, number))
        chosen, bands = torch.cat(picks), torch.cat(band)
        spare = (0, self.n_examples + _LOWER * len(_QUANTILES) - len(bands))
        found = {"band": F.pad(bands, spare, value=-1).cpu()}
        for name, fill in (("ids", -1), ("activations", math.nan), ("doc", -1), ("pos", -1)):
            held = torch.cat([getattr(best, name)[i], getattr(sample, name)[i][chosen]])
            held = F.pad(held, (0, 0) * (held.ndim - 1) + spare).cpu()
            held[found["band"] < 0] = fill
            found[name] = held
        return found


class _Windows:
    """The surroundings of every token of some rows, each within its document's piece of its row."""

    def __init__(self, rows: TokenBlock, context: int, device: torch.device) -> None:
        ids, doc = rows.ids.to(device), rows.doc.to(device)
        starts = torch.ones_like(ids, dtype=torch.bool)
        starts[:, 1:] = doc[:, 1:] != doc[:, :-1]
        self.piece = starts.flatten().cumsum(0) - 1
        at = torch.arange(ids.numel(), device=device)[:, None] + torch.arange(-context, context + 1, device=device)
        self.near = at.clamp(0, ids.numel() - 1)
        inside = (at == self.near) & (self.piece[self.near] == self.piece[:, None])
        inside &= rows.mask.to(device).flatten()[self.near]
        self.ids = ids.flatten()[self.near].masked_fill(~inside, -1)
        self.silent = ~inside | rows.special.to(device).flatten()[self.near]
        # Windows are told apart by 64 bits: a wrapping sum of their ids, each times an odd number of its place.
        odd = torch.randint(1, 1 << 62, (2 * context + 1,), generator=torch.Generator().manual_seed(1)) * 2 + 1
        self.key = ((self.ids + 2) * odd.to(device)).sum(1)
        # The same text always has the same lot, in (0, 1]: 24 bits, which fp32 holds.
        mixed = (self.key ^ (self.key >> 29)) * -0x40A7B892E31B1A47
        self.lot = (((mixed >> 37) & 0xFFFFFF) + 1).float() / (1 << 24)
        self.doc, self.pos = doc.flatten(), rows.pos.to(device).flatten()


class _Best:
    """For each latent, the contexts of the largest rank so far: one per piece, none that reads like another."""

    def __init__(self, n: int, size: int, width: int, device: torch.device) -> None:
        self.rank = torch.full((n, size), -torch.inf, device=device)
        self.key, self.doc, self.pos = (torch.zeros(n, size, dtype=torch.long, device=device) for _ in range(3))
        self.ids = torch.full((n, size, width), -1, device=device)
        self.activations = torch.full((n, size, width), torch.nan, device=device)

    def offer(self, rank: Float[Tensor, "token n"], active: Float[Tensor, "token n"], windows: _Windows) -> None:
        """Take in some tokens; those of rank 0 are not meant."""
        (many, n), size = rank.shape, self.rank.shape[1]
        piece = windows.piece[:, None].expand(many, n)
        best = rank.new_zeros(int(windows.piece[-1]) + 1, n).scatter_reduce(0, piece, rank, "amax")
        number = torch.arange(many, device=rank.device)[:, None].expand(many, n)
        peak = number.masked_fill((rank != best.gather(0, piece)) | (rank <= 0), many)
        first = torch.full_like(best, many, dtype=torch.long).scatter_reduce(0, piece, peak, "amin").T
        fresh = best.T.masked_fill(first == many, -torch.inf)
        first = first.clamp(max=many - 1)
        keys = torch.cat([self.key, windows.key[first]], 1)
        self.rank, order = _largest(torch.cat([self.rank, fresh], 1), keys, size)
        old, slot, token = order < size, order.clamp(max=size - 1), first.gather(1, (order - size).clamp_min(0))
        near, latent = windows.near[token], torch.arange(n, device=rank.device)[:, None, None]
        seen = active[near, latent].masked_fill(windows.silent[token], torch.nan)
        wide = slot[..., None].expand_as(near)
        self.ids = torch.where(old[..., None], self.ids.gather(1, wide), windows.ids[token])
        self.activations = torch.where(old[..., None], self.activations.gather(1, wide), seen)
        for name in ("key", "doc", "pos"):
            now = torch.where(old, getattr(self, name).gather(1, slot), getattr(windows, name)[token])
            setattr(self, name, now)


def _largest(
    rank: Float[Tensor, "n c"], key: Int[Tensor, "n c"], size: int
) -> tuple[Float[Tensor, "n size"], Int[Tensor, "n size"]]:
    """The largest ranks in order and their places, each key once; of equals the earlier one."""
    order = rank.argsort(dim=1, descending=True, stable=True)
    keys = key.gather(1, order)
    by_key = keys.argsort(dim=1, stable=True)
    again = torch.zeros_like(keys, dtype=torch.bool)
    again[:, 1:] = keys.gather(1, by_key).diff(dim=1) == 0
    repeated = torch.zeros_like(again).scatter(1, by_key, again)
    once = rank.gather(1, order).masked_fill(repeated, -torch.inf)
    kept = once.argsort(dim=1, descending=True, stable=True)[:, :size]
    return once.gather(1, kept), order.gather(1, kept)
