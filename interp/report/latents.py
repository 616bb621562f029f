"""Latents of a dictionary on a text of one's own, token by token."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from markupsafe import Markup

from interp.core.errors import DataError
from interp.core.result import token_names
from interp.core.site import Site
from interp.report.html import View
from interp.report.tokens import show_tokens

if TYPE_CHECKING:
    from interp.core.manager import HookManager

__all__ = ["show_latents"]


def show_latents(
    hm: "HookManager",
    dictionary: Any,
    text: Any,
    latents: Sequence[int] | int,
    *,
    site: str | Site | None = None,
) -> View:
    """Show what latents do on a text of one's own, token by token.

    Args:
        hm: the manager of the model.
        dictionary: a dictionary of raw activations, with `encode` and `cfg`.
        text: whatever `hm.run` takes.
        latents: one latent or several.
        site: where the dictionary acts; None for where it was trained.

    Returns:
        A view, each latent with its own scale; special tokens have no value.

    Raises:
        DataError: no site is known, a latent is not there, or the run had no tokens.
        ShapeError: activations that the dictionary does not read.
    """
    chosen, d_sae = [latents] if isinstance(latents, int) else [int(i) for i in latents], dictionary.cfg.d_sae
    known = site if site is not None else dictionary.cfg.metadata.get("hook_name")
    if known is None:
        raise DataError("the dictionary does not say where it was trained; give site='3.resid_post', or another")
    if not chosen or not all(0 <= i < d_sae for i in chosen):
        raise DataError(f"latents={chosen}: the dictionary has latents 0 … {d_sae - 1}; name at least one of them")
    place = Site(known)
    out = hm.run(text, read=[place], logits="none")
    if out.tokens is None or out.mask is None:
        raise DataError("this forward was given embeddings, so there are no tokens to show; give text or tokens")
    with torch.no_grad():
        # Heads side by side.
        encoded = dictionary.encode(out[place.name].flatten(2).to(dictionary.W_enc.device))
    tokens, mask, special = out.tokens.cpu(), out.mask.cpu(), hm.special_mask(out.tokens).cpu()
    words = [token_names(hm, row[real]) for row, real in zip(tokens, mask, strict=True)]
    views = []
    for latent in chosen:
        values = encoded[..., latent].double().cpu().masked_fill(special, math.nan)
        rows = [row[real].tolist() for row, real in zip(values, mask, strict=True)]
        views.append(show_tokens(words, rows, title=f"latent {latent}"))
    shown = Markup("").join(view.fragment for view in views)
    return View("Latents on a prompt", shown, "\n\n".join(f"{view.title}\n{view}" for view in views))
