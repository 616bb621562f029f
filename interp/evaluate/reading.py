"""Text as a dictionary is looked at on it: blocks of tokens with those that count, latents of a few rows at a time."""

from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.errors import DataError
from interp.core.site import Site
from interp.data.tokens import Cursor, TokenBlock, TokenSource, token_bar, watched_blocks
from interp.dictionaries.base import Dictionary
from interp.dictionaries.space import has_heads
from interp.testbed.text import LabelledTokens

if TYPE_CHECKING:
    from interp.core.manager import HookManager

__all__ = ["Reading", "counted_blocks", "encoded_in_parts", "rows_at_once", "side_by_side", "site_width"]

_MOST_LATENTS = 1 << 24  # so many numbers of [token d_sae] at once: 64 MiB in fp32
_ROWS = 32  # labelled rows per forward


class Reading:
    """Text as blocks, with the labels of its tokens, if it has any; can be read any number of times.

    Args:
        hm: the manager whose model reads it.
        data: a `TokenSource`; whatever `Documents` takes, in rows of 128 tokens; or `LabelledTokens` in rows.
        max_tokens: special tokens and pads included; the block that reaches it is the last, and whole.

    Raises:
        DataError: labelled tokens that are not in rows.
    """

    def __init__(self, hm: "HookManager", data: Any, max_tokens: int) -> None:
        self.hm, self.max_tokens, self.labelled = hm, max_tokens, data if isinstance(data, LabelledTokens) else None
        if self.labelled is not None and self.labelled.ids.ndim != 2:
            raise DataError(f"labelled tokens have shape {tuple(self.labelled.ids.shape)}; give rows, [row pos]")
        if self.labelled is None:
            self.tokens = data if isinstance(data, TokenSource) else TokenSource(data, hm.tokenizer)

    def describe(self) -> str:
        """A short name of it."""
        if self.labelled is None:
            return str(self.tokens.documents.describe())
        return f"{len(self.labelled.ids)} labelled rows of {self.labelled.ids.shape[1]} tokens"

    def blocks(self, doing: str) -> Iterator[tuple[TokenBlock, Bool[Tensor, "row pos"], Mapping[str, Tensor]]]:
        """Yield blocks, which of their tokens count, and their labels.

        Args:
            doing: what the progress bar says.
        """
        if self.labelled is None:
            for block, keep in counted_blocks(self.tokens, self.max_tokens, doing=doing):
                yield block, keep, {}
            return
        width = self.labelled.ids.shape[1]
        rows = min(len(self.labelled.ids), -(-self.max_tokens // width))
        documents = 0
        with token_bar(rows * width, doing) as bar:
            for part in (slice(start, min(start + _ROWS, rows)) for start in range(0, rows, _ROWS)):
                block = self._block(self.labelled.ids[part], documents)
                documents = int(block.doc.max()) + 1
                yield block, ~block.special, {name: codes[part] for name, codes in self.labelled.labels.items()}
                bar.update(block.ids.numel())

    def _block(self, ids: Int[Tensor, "row pos"], documents: int) -> TokenBlock:
        """Rows that each begin a document, which goes on to the next BOS."""
        bos = getattr(self.hm.tokenizer, "bos_token_id", None)
        starts = ids == (-1 if bos is None else bos)
        starts[:, 0] = True
        at = torch.arange(ids.shape[1]).expand_as(ids)
        pos = at - at.masked_fill(~starts, 0).cummax(1).values - 1
        doc = starts.flatten().cumsum(0).view_as(ids) - 1 + documents
        return TokenBlock(ids, torch.ones_like(starts), self.hm.special_mask(ids), doc, pos, None, Cursor())


def counted_blocks(
    tokens: TokenSource, max_tokens: int, should_stop: Callable[[], bool] | None = None, *, doing: str = ""
) -> Iterator[tuple[TokenBlock, Bool[Tensor, "row pos"]]]:
    """Yield blocks until `max_tokens` have been given, each with the tokens that count: real and not special.

    A progress bar comes up on stderr when this takes more than two seconds.

    Args:
        tokens: the text.
        max_tokens: special tokens and pads included; the block that reaches it is the last, and whole.
        should_stop: asked before each block; when it says True, KeyboardInterrupt is raised.
        doing: what the bar says.
    """
    for block in watched_blocks(tokens, max_tokens, should_stop, doing=doing):
        keep = block.mask & ~block.special
        if bool(keep.any()):
            yield block, keep


def side_by_side(x: Float[Tensor, "row pos *features"], site: Site) -> Float[Tensor, "row pos d"]:
    """Return a site's activations as one vector per token: heads of q, k, v and z side by side."""
    return x.flatten(2) if has_heads(site) else x


def site_width(hm: "HookManager", site: Site) -> int:
    """Return the width of a site's vector, heads side by side."""
    return prod(hm.atlas.shape(site)[2:]) if has_heads(site) else int(hm.atlas.shape(site)[-1])


def encoded_in_parts(
    dictionary: Dictionary, x: Float[Tensor, "row pos d_in"]
) -> Iterator[tuple[slice, Float[Tensor, "part pos d_sae"]]]:
    """Yield the latents of some rows at a time, so that no more than 64 MiB of them (in fp32) are held at once.

    Args:
        dictionary: any dictionary.
        x: activations.

    Returns:
        Which rows, and their latents; at least one row at a time.
    """
    step = rows_at_once(dictionary, x.shape[1])
    for start in range(0, len(x), step):
        part = slice(start, min(start + step, len(x)))
        with torch.no_grad():
            latents = dictionary.encode(x[part])
        yield part, latents


def rows_at_once(dictionary: Dictionary, width: int) -> int:
    """How many rows' latents `encoded_in_parts` holds at once.

    Args:
        dictionary: any dictionary.
        width: positions per row.
    """
    return max(1, _MOST_LATENTS // (width * dictionary.cfg.d_sae))
