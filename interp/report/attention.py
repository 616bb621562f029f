"""Attention patterns, head by head: hover a token to see what it attends to."""

import base64
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.errors import DataError, ShapeError
from interp.core.result import token_names
from interp.report.html import View, json_block, render, visible

if TYPE_CHECKING:
    from interp.core.manager import HookManager

__all__ = ["attention_view", "show_attention"]

# Two bytes per entry of the lower triangle: the page stays below about 20 MB.
MOST_ENTRIES = 14_000_000
_STEPS = 65535


def show_attention(
    hm: "HookManager",
    text: Any,
    *,
    layer: int,
    heads: Sequence[int] | None = None,
) -> View:
    """Show the attention patterns of one layer on one text.

    Args:
        hm: The model.
        text: One text, or its tokens as one row; whatever `hm.run` takes.
        layer: Which layer.
        heads: Which heads; None shows all.

    Returns:
        A view: it displays itself in a notebook, `to_html(path)` writes a page that needs no network.

    Raises:
        DataError: More than one text, or more entries than a page can hold.
        SiteError: The model has no such pattern.
    """
    out = hm.run(text, read=[f"{layer}.pattern"])
    pattern, tokens = out[f"{layer}.pattern"], out.tokens
    if tokens is None or out.mask is None or tokens.shape[0] != 1:
        raise DataError(f"show_attention takes one text, got {len(pattern)}; show them one by one")
    keep = out.mask[0].to(pattern.device).nonzero()[:, 0]
    pattern = pattern[0].index_select(1, keep).index_select(2, keep)
    ids = tokens[0].to(keep.device)[keep]
    sink = "BOS" if bool(hm.special_mask(ids[:1])[0]) else "first token"
    return attention_view(token_names(hm, ids), pattern, layer=layer, heads=heads, sink=sink)


def attention_view(
    tokens: Sequence[str],
    pattern: Float[Tensor, "n_heads pos pos"],
    *,
    layer: int,
    heads: Sequence[int] | None = None,
    sink: str = "first token",
) -> View:
    """Show attention patterns that are already at hand.

    Args:
        tokens: Text of each position.
        pattern: Attention weights [n_heads query key], causal, each in [0, 1].
        layer: Layer they come from, for the heading.
        heads: Which heads; None shows all.
        sink: What the first token is called by the switch that hides it.

    Returns:
        A view of them.

    Raises:
        ShapeError: Patterns that do not fit the tokens.
        DataError: A head that is not there, or more entries than a page can hold.
    """
    n_heads, width, _ = pattern.shape
    if len(tokens) != width:
        raise ShapeError(f"{len(tokens)} tokens for patterns {tuple(pattern.shape)}; give one token per position")
    chosen = list(range(n_heads)) if heads is None else [int(h) for h in heads]
    if not chosen or not all(0 <= h < n_heads for h in chosen):
        raise DataError(f"heads={list(chosen)}: the layer has heads 0 … {n_heads - 1}; name at least one of them")
    entries = len(chosen) * width * (width + 1) // 2
    if entries > MOST_ENTRIES:
        raise DataError(
            f"{len(chosen)} heads × {width} tokens are {entries:,} weights, more than a page holds; shorten the text"
        )
    weights = pattern.detach().index_select(0, torch.tensor(chosen, device=pattern.device)).float().cpu()
    title = f"Attention in layer {layer}"
    data = {
        "tokens": [visible(t) for t in tokens],
        "breaks": [t.count("\n") for t in tokens],
        "heads": chosen,
        "weights": _packed(weights),
    }
    fragment = render("attention.html.j2", {"data": json_block(data), "sink": sink, "title": title})
    height = 470 + 96 * -(-len(chosen) // 8) + 26 * (width // 60)
    return View(title, fragment, _as_text(title, tokens, weights, chosen), height=height)


def _packed(weights: Float[Tensor, "head pos pos"]) -> str:
    """Return the lower triangles, row by row, as base64 of little-endian 16-bit shares of 1."""
    q, k = torch.tril_indices(weights.shape[1], weights.shape[2])
    shares = (weights[:, q, k].nan_to_num(0.0).clamp(0, 1) * _STEPS).round().to(torch.int32)
    return base64.b64encode(shares.numpy().astype("<u2").tobytes()).decode("ascii")


def _as_text(title: str, tokens: Sequence[str], weights: Float[Tensor, "head pos pos"], heads: Sequence[Any]) -> str:
    strongest = weights[:, -1].max(-1)
    lines = [
        f"  head {head}: {visible(tokens[-1])!r} attends most to {visible(tokens[int(k)])!r} ({float(w):.2f})"
        for head, w, k in zip(heads, strongest.values, strongest.indices, strict=True)
    ]
    return "\n".join([title, *lines])
