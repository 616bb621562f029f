"""How many rows a forward should have, found by trying."""

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from interp.core.errors import ConfigError, DataError
from interp.core.site import Site
from interp.data.store import row_sites
from interp.data.tokens import TokenBlock, TokenSource

if TYPE_CHECKING:
    from interp.core.manager import HookManager

__all__ = ["fastest_rows", "forward_speed", "refuse_long_rows"]

_FEWEST, _MOST = 256, 65_536  # tokens per forward between which rows are tried
_TIMES = 3
_AS_GOOD = 0.97  # of the best speed: fewer rows that reach it are taken, as they need less memory


def fastest_rows(
    hm: "HookManager",
    tokens: TokenSource,
    sites: str | Site | Sequence[str | Site],
    *,
    byte_budget: int = 2**31,
) -> int:
    """Return the rows per forward with which most tokens a second are read; of those as good, the fewest.

    Powers of two are tried, three forwards each, from 256 tokens on until speed falls, memory ends, or the activations
    read in one forward are more than `byte_budget`.

    Args:
        hm: the manager of the model.
        tokens: the text; its own `rows` do not matter.
        sites: what is read.
        byte_budget: bytes of activations in one forward, of all sites together.

    Raises:
        DataError: the text has no token.
    """
    places = row_sites(sites)
    width = sum(math.prod(hm.atlas.shape(site)[2:]) for site in places) * hm.dtype.itemsize
    rows, found = max(1, _FEWEST // tokens.ctx), {}
    while rows * tokens.ctx <= _MOST and rows * tokens.ctx * width <= byte_budget:
        speed = forward_speed(hm, tokens, places, rows=rows, forwards=_TIMES)
        if speed is None:
            break
        found[rows] = speed
        if speed < 0.9 * max(found.values()):
            break
        rows *= 2
    if not found:
        return rows
    return min(rows for rows, speed in found.items() if speed >= _AS_GOOD * max(found.values()))


def forward_speed(
    hm: "HookManager", tokens: TokenSource, sites: Sequence[Site], *, rows: int, forwards: int
) -> float | None:
    """Return the tokens a second that forwards of so many rows read, the fastest of a few; None when memory ends.

    Args:
        hm: the manager of the model.
        tokens: the text.
        sites: what is read.
        rows: per forward; the text's first rows are taken, again and again where it has too few.
        forwards: how many are timed, after one that is not.

    Raises:
        DataError: the text has no token.
    """
    block = next(_with_rows(tokens, rows).blocks())
    refuse_long_rows(hm, block)
    again = -(-rows // len(block.ids))
    ids, mask = block.ids.repeat(again, 1)[:rows], block.mask.repeat(again, 1)[:rows]
    best = 0.0
    for number in range(forwards + 1):
        _wait(hm.device)
        began = time.perf_counter()
        run = hm.run(ids, mask=mask, read=list(sites), logits="none")
        _wait(hm.device)
        if any("out of memory" in note for note in run.notes):
            return None
        if number:
            best = max(best, rows * tokens.ctx / (time.perf_counter() - began))
    return best


def refuse_long_rows(hm: "HookManager", block: TokenBlock) -> None:
    """Refuse rows that the model has no positions for, before anything is run.

    Args:
        hm: the manager of the model.
        block: the text's first rows.

    Raises:
        ConfigError: they are too long; says by how much.
    """
    try:
        hm.to_tokens(block.ids[:1], mask=block.mask[:1])
    except DataError as err:
        raise ConfigError(f"with ctx {block.ids.shape[1]} a row is too long: {err}, or lower text.ctx") from err


def _with_rows(tokens: TokenSource, rows: int) -> TokenSource:
    return TokenSource(
        tokens.documents, tokens.tokenizer, ctx=tokens.ctx, rows=rows, packing=tokens.packing, bos=tokens.bos
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
