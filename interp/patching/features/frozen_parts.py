"""Norms and attention of one block, held as a run had them, and held against what the model computed."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.errors import ModelError
from interp.patching.features.frozen import FrozenAttention, FrozenNorm

if TYPE_CHECKING:
    from interp.core.manager import HookManager

__all__ = ["CLOSE", "attention_sites", "check_formula", "frozen_attention", "frozen_norm", "wide"]

CLOSE = 1e-3
"""How far a formula may be off what the model computed, relative to the largest value and 1."""


def wide(x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Return a tensor in fp32, or in fp64 if it is."""
    return x if x.dtype == torch.float64 else x.float()


def attention_sites(hm: "HookManager", layer: int) -> list[str]:
    """The activations of one prompt that `frozen_attention` wants."""
    names = [f"{layer}.{kind}" for kind in ("resid_pre", "pattern", "attn_out", "ln1.scale", "ln1_post.scale")]
    return [name for name in names if hm.atlas.has(name)]


def frozen_norm(hm: "HookManager", layer: int | None, part: str, values: Mapping[str, Tensor]) -> FrozenNorm:
    """Return a norm with the σ that a run had.

    Args:
        hm: the model.
        layer: block; None for the final norm.
        part: "ln1", "ln1_post", "ln2" or "ln_final".
        values: activations of one prompt by short name.
    """
    weights, name = hm.weights.norm_weights(layer, part), part if layer is None else f"{layer}.{part}"
    scale = values[f"{name}.scale"]
    return FrozenNorm(scale, weights.gain.to(scale), weights.bias.to(scale), weights.kind == "LN")


def frozen_attention(hm: "HookManager", layer: int, values: Mapping[str, Tensor]) -> FrozenAttention | None:
    """Return attention with the patterns that a run had; None for a block without.

    Args:
        hm: the model.
        layer: block.
        values: activations of one prompt by short name; `attention_sites` says which.

    Raises:
        ModelError: it is not what the model computed: something else stands in between.
    """
    out = values.get(f"{layer}.attn_out")
    if out is None:
        return None
    if f"{layer}.pattern" not in values:
        raise ModelError(f"block {layer} of {hm.map.family} has attention without a pattern, which cannot be frozen")
    w, pattern = hm.weights[layer], values[f"{layer}.pattern"]
    norm = frozen_norm(hm, layer, "ln1", values) if f"{layer}.ln1.scale" in values else None
    post = frozen_norm(hm, layer, "ln1_post", values) if hm.map.attn_out == "ln1_post" else None
    made = FrozenAttention(
        norm=norm,
        post=post,
        pattern=pattern,
        W_V=w.W_V.to(pattern),
        b_V=w.b_V.to(pattern),
        W_O=w.W_O.to(pattern),
        b_O=w.b_O.to(pattern),
        factor=hm.map.residual_multiplier,
    )
    check_formula(hm, layer, "attention", made.forward(values[f"{layer}.resid_pre"]), out)
    return made


def check_formula(
    hm: "HookManager", layer: int, what: str, ours: Float[Tensor, "*n"], theirs: Float[Tensor, "*n"]
) -> None:
    """Refuse a formula that is not what the model computed.

    Args:
        hm: the model.
        layer, what: for the message.
        ours, theirs: by formula, and as read.

    Raises:
        ModelError: they differ.
    """
    off, size = float((ours - theirs).abs().max()), max(1.0, float(theirs.abs().max()))
    exact = hm.dtype in (torch.float32, torch.float64)
    if not off <= (CLOSE if exact else 5e-2) * size:
        raise ModelError(
            f"{what} of block {layer} of {hm.map.family} is not what frozen norms and patterns give (off by "
            f"{off:.1e}): something else stands in between, so that attributions would not add up; this family is not "
            "supported"
        )
