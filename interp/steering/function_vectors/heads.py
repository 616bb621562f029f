"""What heads write at the last token of in-context prompts, on average."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.errors import WhereError
from interp.core.manager import HookManager
from interp.core.site import Site
from interp.data.pairs import PromptPairs
from interp.steering.function_vectors.options import chunks

__all__ = ["HeadMeans", "head_vectors", "mean_head_activations"]


@dataclass(frozen=True, eq=False)
class HeadMeans:
    """Means over prompts, at the last token.

    Attributes:
        z: each head's output before the output projection.
        written: what `head_vectors` multiplies by the output weights: z, or z / σ where a norm stands between heads and
            stream.
        resid: the residual stream after each block.
    """

    z: Float[Tensor, "layer n_heads d_head"]
    written: Float[Tensor, "layer n_heads d_head"]
    resid: Float[Tensor, "layer d_model"]


@torch.no_grad()
def mean_head_activations(hm: HookManager, pairs: PromptPairs, *, batch_size: int = 32) -> HeadMeans:
    """Return the mean activation of every head at the last token of clean prompts.

    Memory: batch_size · n_layers · (n_heads d_head + d_model) values, beside the forward.

    Args:
        hm: the model.
        pairs: the prompts, such as those of `icl_pairs`.
        batch_size: prompts per forward.

    Returns:
        The means, in fp32 on the host.

    Raises:
        SiteError: a block without attention heads.

    Source: Todd et al. (2023), arXiv 2310.15213, §2.3, eq. 2.
    """
    layers = range(hm.n_layers)
    normed = hm.map.attn_out == "ln1_post"
    kinds = ["z", "resid_post", *(["ln1_post.scale"] if normed else [])]
    read = [Site(f"{layer}.{kind}").at(pos=-1) for kind in kinds for layer in layers]
    total: dict[str, Tensor] = {}
    for part in chunks(pairs, batch_size):
        out = hm.run(part.tokens(hm, side="left", same_length=False).clean, read=read)
        for layer in layers:
            z = out[f"{layer}.z"].float()
            held = {"z": z, "resid": out[f"{layer}.resid_post"].float()}
            if normed:
                held["written"] = z / out[f"{layer}.ln1_post.scale"].float().reshape(-1, 1, 1)
            for name, x in held.items():
                key = f"{layer}.{name}"
                total[key] = total.get(key, 0.0) + x.double().sum(0)
    stacked = {
        name: torch.stack([total[f"{layer}.{name}"].cpu() for layer in layers]).div(len(pairs)).float()
        for name in ("z", "resid", *(["written"] if normed else []))
    }
    return HeadMeans(stacked["z"], stacked.get("written", stacked["z"]), stacked["resid"])


def head_vectors(
    hm: HookManager, written: Float[Tensor, "layer n_heads d_head"], heads: list[tuple[int, int]]
) -> Float[Tensor, "head d_model"]:
    """Return what heads add to the residual stream: their mean output times their own rows of W_O, without its bias.

    A norm behind the heads (Gemma 2, OLMo 2) is a linear map once each prompt's σ is held as it was; it is applied
    without its bias. Granite's residual multiplier is in.

    Args:
        hm: the model.
        written: `HeadMeans.written`.
        heads: (layer, query head) pairs.

    Raises:
        WhereError: a head that the model does not have.
    """
    n_layers, n_heads = written.shape[:2]
    rows = []
    for layer, head in heads:
        if not (0 <= layer < n_layers and 0 <= head < n_heads):
            raise WhereError(f"head {(layer, head)}: this model has layers 0–{n_layers - 1} and heads 0–{n_heads - 1}")
        w = hm.weights[layer].W_O[head].float().cpu()
        row = written[layer, head] @ w
        if hm.map.attn_out == "ln1_post":
            spec, norm = hm.atlas.norm("ln1_post", layer), hm.weights.norm_weights(layer, "ln1_post")
            row = spec.centre(row) * norm.gain.float().cpu()
        else:
            row = row * hm.map.residual_multiplier
        rows.append(row)
    return torch.stack(rows) if rows else torch.zeros(0, hm.d_model)
