"""`ActivationStore`: the activations of many tokens, shuffled, as the batches that dictionaries are trained on."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.errors import ConfigError, DataError
from interp.core.site import Site
from interp.data.tokens import TokenBlock, TokenSource

if TYPE_CHECKING:
    from interp.core.manager import HookManager

__all__ = ["ActivationStore", "Batch"]


@dataclass(frozen=True)
class Batch:
    """Some tokens' activations, and what a loss may want to know about them.

    Attributes:
        x: activations that a dictionary reads.
        target: activations that it should give; None where that is `x` itself.
        grad: gradient of a loss with respect to `x`.
        tokens: token ids.
        positions: position of each token in its document; −1 at added special tokens.
        mask: False where a row should not count.
    """

    x: Float[Tensor, "token d_in"]
    target: Float[Tensor, "token d_out"] | None = None
    grad: Float[Tensor, "token d_in"] | None = None
    tokens: Int[Tensor, "token"] | None = None
    positions: Int[Tensor, "token"] | None = None
    mask: Bool[Tensor, "token"] | None = None


class ActivationStore:
    """Streams activations of a model's tokens through a shuffling buffer, without a disk.

    The model runs no further than the last site and computes no logits. Special tokens are left out. The buffer is
    filled, half of it is served in a random order, the freed rows are filled again: nothing is ever copied as a whole.

    Memory, in bytes, with `d` the sum of the sites' widths: `buffer_tokens · (d · size(dtype) + 16)` for the buffer,
    `batch_size · (d · size(dtype) + 16)` for a batch, and `2 · rows · ctx · d · size(model dtype)` for one forward.

    Args:
        hm: the manager whose model gives the activations.
        tokens: the tokens to run.
        sites: one site or several, all read in one pass; each must have one feature axis.
        batch_size: tokens per batch.
        buffer_tokens: tokens in the buffer; at least two batches.
        dtype: dtype in which activations are kept.
        seed: of the shuffling.
        repeat: start over when the text ends; else the last batch may be smaller.

    Raises:
        ConfigError: a buffer that is too small, or a site with heads.
    """

    def __init__(
        self,
        hm: "HookManager",
        tokens: TokenSource,
        sites: str | Site | Sequence[str | Site],
        *,
        batch_size: int = 4096,
        buffer_tokens: int = 131072,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        repeat: bool = False,
    ) -> None:
        given = [sites] if isinstance(sites, str | Site) else list(sites)
        self.hm, self.tokens, self.sites = hm, tokens, [Site(site) for site in given]
        if batch_size < 1 or buffer_tokens < 2 * batch_size:
            raise ConfigError(
                f"buffer of {buffer_tokens} tokens for batches of {batch_size}: it must hold at least two batches "
                f"to mix them; set buffer_tokens ≥ {2 * max(batch_size, 1)}"
            )
        for site in self.sites:
            if len(site.axes) != 3 or site.where is not None:
                raise ConfigError(
                    f"{site} has axes {site.axes}; a store keeps one vector a token: "
                    "choose a whole site of shape [batch pos d], such as '3.resid_post'"
                )
        self.batch_size, self.buffer_tokens, self.dtype = batch_size, buffer_tokens, dtype
        self.seed, self.repeat = seed, repeat

    def batches(
        self,
        *,
        x: str | Site | None = None,
        target: str | Site | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Iterator[Batch]:
        """Yield shuffled batches; every call starts from the first document with the same seed.

        Args:
            x: the site that the dictionary reads; may be left out when the store has one site.
            target: the site that it should give; by default the same.
            should_stop: asked before each forward; when it says True, no more batches come.

        Raises:
            ConfigError: a site that the store does not read, or `x` left out among several.
            DataError: the text has no token that counts.
        """
        if x is None and len(self.sites) > 1:
            raise ConfigError(f"this store reads {[s.short for s in self.sites]}; say which one is x")
        reads = self._place(self.sites[0] if x is None else x)
        gives = None if target is None else self._place(target)
        for rows in self._shuffled(should_stop or _never):
            yield rows.batch(reads, gives)

    def batches_by_site(self) -> Iterator[Mapping[str, Batch]]:
        """Yield, for each batch of tokens, a `Batch` per site under the site's short name."""
        names = [site.short for site in self.sites]
        for rows in self._shuffled(_never):
            yield {name: rows.batch(i, None) for i, name in enumerate(names)}

    def describe(self) -> dict[str, object]:
        """What was decided about tokens and shuffling, for a run's record."""
        return {
            "tokens": self.tokens.describe(),
            "sites": [site.name for site in self.sites],
            "buffer_tokens": self.buffer_tokens,
            "batch_size": self.batch_size,
            "special_tokens": "left out",
            "seed": self.seed,
        }

    def _place(self, site: str | Site) -> int:
        if Site(site) not in self.sites:
            raise ConfigError(f"this store reads {[s.short for s in self.sites]}, not {Site(site).short}")
        return self.sites.index(Site(site))

    def _shuffled(self, should_stop: Callable[[], bool]) -> Iterator["_Rows"]:
        order = torch.Generator().manual_seed(self.seed)
        captured = self._captured()
        serve = self.buffer_tokens // 2 // self.batch_size * self.batch_size
        buffer, spare, free = None, None, torch.arange(self.buffer_tokens)
        while True:
            filled = 0
            while filled < len(free):
                if should_stop():
                    return
                rows = next(captured, None) if spare is None else spare
                if rows is None:
                    break
                buffer = rows.empty(self.buffer_tokens, self.dtype) if buffer is None else buffer
                taken = min(len(rows), len(free) - filled)
                buffer.write(free[filled : filled + taken], rows, taken)
                spare = rows.after(taken) if taken < len(rows) else None
                filled += taken
            if buffer is None:
                raise DataError(f"{self.tokens.documents.describe()} has only special tokens; give text")
            ended = filled < len(free)
            held = torch.ones(self.buffer_tokens, dtype=torch.bool)
            held[free[filled:]] = False
            mixed = held.nonzero().flatten()
            mixed = mixed[torch.randperm(len(mixed), generator=order)]
            free = mixed if ended else mixed[:serve]
            for index in free.split(self.batch_size):
                yield buffer.gather(index)
            if ended:
                return

    def _captured(self) -> Iterator["_Rows"]:
        again = True
        while again:
            again = False
            for block in self.tokens.blocks():
                keep = (block.mask & ~block.special).flatten().nonzero().flatten()
                if len(keep):
                    again = self.repeat
                    yield self._capture(block, keep)

    def _capture(self, block: TokenBlock, keep: Int[Tensor, "token"]) -> "_Rows":
        run = self.hm.run(block.inputs, read=self.sites, logits="none")
        there = keep.to(self.hm.device)
        values = [run[site.name].flatten(0, 1).index_select(0, there) for site in self.sites]
        return _Rows(values, block.ids.flatten()[keep], block.pos.flatten()[keep])


def _never() -> bool:
    return False


@dataclass
class _Rows:
    """Rows of several sites with their tokens: what a forward gives, and what the buffer holds."""

    values: list[Tensor]
    tokens: Tensor
    positions: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def empty(self, n: int, dtype: torch.dtype) -> "_Rows":
        """Room for `n` rows like these."""
        values = [torch.empty(n, v.shape[1], dtype=dtype, device=v.device) for v in self.values]
        return _Rows(values, self.tokens.new_empty(n), self.positions.new_empty(n))

    def write(self, slots: Int[Tensor, "token"], rows: "_Rows", n: int) -> None:
        """Put the first `n` of other rows into these slots."""
        for mine, theirs in zip(self.values, rows.values, strict=True):
            mine.index_copy_(0, slots.to(mine.device), theirs[:n].to(mine.dtype))
        self.tokens[slots], self.positions[slots] = rows.tokens[:n], rows.positions[:n]

    def after(self, n: int) -> "_Rows":
        """All rows but the first `n`."""
        return _Rows([v[n:] for v in self.values], self.tokens[n:], self.positions[n:])

    def gather(self, index: Int[Tensor, "token"]) -> "_Rows":
        """These rows, copied."""
        values = [v.index_select(0, index.to(v.device)) for v in self.values]
        return _Rows(values, self.tokens.index_select(0, index), self.positions.index_select(0, index))

    def batch(self, x: int, target: int | None) -> Batch:
        """As the item that a loss takes."""
        return Batch(
            x=self.values[x],
            target=None if target is None else self.values[target],
            tokens=self.tokens,
            positions=self.positions,
            mask=torch.ones(len(self), dtype=torch.bool, device=self.values[x].device),
        )
