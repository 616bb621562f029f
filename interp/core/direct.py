"""The direct path: what vectors of the residual stream add to numbers that are linear in the logits, σ held.

The final norm divides by a σ that depends on the whole stream. With σ held as it was in a run, the way from the stream
to the logits before their soft-cap is linear: each part of the stream adds its product with one direction. The same
holds one step further back, through a post-norm whose σ is held, through an output projection, through an attention
pattern; these functions carry the direction back instead of the parts forward, so that no part is ever written out.

Source: Elhage et al. (2021), "A Mathematical Framework for Transformer Circuits"; direct logit attribution as in Wang
et al. (2022), arXiv 2211.00593, §3.1. Departures: the norm's bias, the unembedding's bias, the logit scale and norms on
a sublayer's output are in.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.readout import Readout

if TYPE_CHECKING:
    from interp.core.manager import HookManager

__all__ = ["DirectPath", "before_output", "head_vectors", "wide"]


@dataclass(frozen=True, eq=False)
class DirectPath:
    """The direct path from the stream that leaves the last block to one number per row, σ held.

    number = stream · direction + norm_bias + unembed_bias, in logits before the soft-cap.

    Args:
        direction: what a row's stream is multiplied by: W_U of the row's tokens times logit scale and gain, less its
            mean where the norm takes the mean off, divided by the row's σ.
        norm_bias: what the final norm's bias adds.
        unembed_bias: what the unembedding's bias adds.
        sigma: the final norm's σ of each row; ones where there is no norm.
    """

    direction: Float[Tensor, "row d_model"]
    norm_bias: Float[Tensor, " row"]
    unembed_bias: Float[Tensor, " row"]
    sigma: Float[Tensor, " row"]

    @classmethod
    def of(
        cls,
        hm: "HookManager",
        resid: Float[Tensor, "row d_model"],
        columns: Int[Tensor, " column"],
        weights: Float[Tensor, "row column"],
    ) -> "DirectPath":
        """Return the path of a run's rows.

        Args:
            hm: the model.
            resid: the stream that left the last block, which sets σ.
            columns: the tokens that the number looks at.
            weights: how it weighs their logits.

        Raises:
            ModelError: the unembedding is not linear, or the final norm follows no known formula.
        """
        readout = Readout.of(hm)
        with torch.no_grad():
            unembed, x = readout.unembed, wide(resid)
            at = columns.to(unembed.weight.device)
            rows = wide(unembed.weight.index_select(0, at)).to(x)
            share = weights.to(x) * readout.scale
            direction = share @ rows
            none = direction.new_zeros(len(direction))
            bias = none if unembed.bias is None else share @ unembed.bias.index_select(0, at).to(x)
            if readout.norm is None:
                return cls(direction, none, bias, none + 1.0)
            spec = hm.atlas.norm("ln_final")
            sigma = spec.scale(spec.centre(x))
            gain, norm_bias = spec.gain(readout.norm), spec.bias(readout.norm)
            constant = none if norm_bias is None else direction @ norm_bias.to(x)
            direction = direction if gain is None else direction * gain.to(x)
            return cls(spec.centre(direction) / sigma, constant, bias, sigma[:, 0])

    def of_vectors(self, vectors: Float[Tensor, "*term row d_model"]) -> Float[Tensor, "*term row"]:
        """Return what vectors of the final stream add to each row's number."""
        return (wide(vectors).to(self.direction.device) * self.direction).sum(-1)


def before_output(
    hm: "HookManager",
    layer: int,
    part: str,
    direction: Float[Tensor, "row d_model"],
    scale: Float[Tensor, "row 1"] | None,
) -> tuple[Float[Tensor, "row d_model"], Float[Tensor, " row"]]:
    """Carry a direction back from what a sublayer adds to the stream to what its output projection gives.

    Between the two may stand a norm (Gemma 2, OLMo 2), whose σ is held, or a multiplier (Granite).

    Args:
        hm: the model.
        layer: the block.
        part: "attn" or "mlp".
        direction: what the stream is multiplied by.
        scale: σ of that norm in the run, `ln1_post.scale` or `ln2_post.scale`; None where there is none.

    Returns:
        The direction there, and what the norm's bias adds.
    """
    norm = "ln1_post" if part == "attn" else "ln2_post"
    if (hm.map.attn_out if part == "attn" else hm.map.mlp_out) != norm:
        return direction * hm.map.residual_multiplier, direction.new_zeros(len(direction))
    assert scale is not None
    held = hm.weights.norm_weights(layer, norm)
    back = direction * wide(held.gain).to(direction) / wide(scale).to(direction)
    return hm.atlas.norm(norm, layer).centre(back), direction @ wide(held.bias).to(direction)


def head_vectors(
    hm: "HookManager", layer: int, z: Float[Tensor, "row n_heads d_head"], scale: Float[Tensor, "row 1"] | None
) -> Float[Tensor, "n_heads row d_model"]:
    """Return what outputs of a block's heads, or changes of them, add to the stream; biases are no head's.

    Memory: n_heads · rows · d_model.

    Args:
        hm: the model.
        layer: the block.
        z: the heads' outputs, or their change.
        scale: as for `before_output`: σ of the norm on attention's output, held; None where there is none.
    """
    results = torch.einsum("rhd,hdm->hrm", z, wide(hm.weights[layer].W_O).to(z))
    if hm.map.attn_out != "ln1_post":
        return results * hm.map.residual_multiplier
    assert scale is not None
    gain = wide(hm.weights.norm_weights(layer, "ln1_post").gain).to(z)
    return hm.atlas.norm("ln1_post", layer).centre(results) / wide(scale).to(z) * gain


def wide(x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Return a tensor in fp32, or in double precision where it is in that."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))
