"""Exact sparse maths for dictionaries: one dense product, then only the entries that are active."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from interp.core.errors import ConfigError, ShapeError

__all__ = ["Codes", "decode_codes", "encode_topk"]

# Bytes of pre-activations that exist at a time. On a CPU they should stay in its cache between the product and the
# selection; on a GPU a chunk must be large enough to keep it busy.
_CHUNK_BYTES = {"cpu": 2**25, "cuda": 2**28}
# Latents taken at a time on a CPU: few enough that turning their encoder gradient round happens in cache, and that
# a sum over them is exact to a few units in the last place.
_LATENTS = 256


class _ByLatent:
    """The entries of `index` [token k] in the order of their latents: which they are, and where each latent's begin."""

    def __init__(self, index: Tensor, d_sae: int) -> None:
        self.index, self.d_sae = index, d_sae
        self._order: tuple[Tensor, Tensor] | None = None

    def order(self) -> tuple[Tensor, Tensor]:
        """Positions in `index.flatten()`, sorted, and the d_sae + 1 bounds of each latent's; made once, when wanted."""
        if self._order is None:
            # Stable, so that each sum has one order and one result.
            latents, entries = self.index.flatten().sort(stable=True)
            bounds = torch.arange(self.d_sae + 1, device=latents.device)
            self._order = entries, torch.searchsorted(latents, bounds)
        return self._order


@dataclass(frozen=True)
class Codes:
    """A few latents per token.

    Attributes:
        values: their pre-activations, with gradients to what they were made of; 0, without one, where fewer than k
            latents were allowed.
        index: which latents they are, in no order.
        by_latent: the same entries by latent, shared by the gradients of encoder and decoder.
    """

    values: Float[Tensor, "token k"]
    index: Int[Tensor, "token k"]
    by_latent: _ByLatent


def encode_topk(
    x: Float[Tensor, "token d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, "d_sae"],
    *,
    k: int,
    centre: Float[Tensor, "d_in"] | None = None,
    scale: Float[Tensor, "d_sae"] | None = None,
    dead: Bool[Tensor, "d_sae"] | None = None,
    k_dead: int = 0,
) -> tuple[Codes, Codes | None]:
    """Return each token's k largest pre-activations (x − centre) W_enc + b_enc, and its largest among dead latents.

    The dense product is made once, without a graph, `rows` tokens at a time: rows = max(1, C // (d_sae · size(dtype)))
    with C = 32 MiB on a CPU and 256 MiB on a GPU. So memory grows with `rows · d_sae` (three times that with `scale`
    and `dead`) plus a few numbers per entry, not with token × d_sae. The gradients visit only the entries:

        dW_enc[:, n] = Σ over entries (t, n) of g · (x_t − centre)
        db_enc[n] = Σ over entries (t, n) of g
        dcentre = −W_enc db_enc
        dx_t = Σ over entries (t, n) of g · W_enc[:, n]

    dx only when `x` wants it; it then copies W_enc once. Each sum has one order, that of the tokens. No size depends on
    what the data hold, so a GPU need not wait for the host.

    Args:
        x: activations.
        W_enc: encoder directions, one per column.
        b_enc: encoder biases.
        k: latents per token.
        centre: subtracted from each token first; None for 0.
        scale: latents are chosen by pre-activation times this; no gradient passes the choice.
        dead: latents among which a second choice is made; None for no such choice.
        k_dead: latents per token of the second choice.

    Returns:
        The codes, and those among dead latents or None.

    Raises:
        ShapeError: activations of another width.
        ConfigError: a k outside 1 … d_sae.

    Source: Gao et al. 2024 (2406.04093), §2.3, and appendix A.2 for dead latents.
    """
    d_in, d_sae = W_enc.shape
    if x.ndim != 2 or x.shape[1] != d_in:
        raise ShapeError(f"activations of shape {tuple(x.shape)} for an encoder of d_in {d_in}; give [token {d_in}]")
    if not 0 < k <= d_sae or (dead is not None and not 0 < k_dead <= d_sae):
        raise ConfigError(f"k is {k} and k_dead {k_dead} for {d_sae} latents; each must be from 1 to {d_sae}")
    centred = x.detach() if centre is None else x.detach() - centre.detach()
    picked, revived = _pick(centred, W_enc, b_enc, k, scale, dead, k_dead)

    def codes(values: Tensor, index: Tensor) -> Codes:
        by_latent = _ByLatent(index, d_sae)
        made: Tensor = _Encode.apply(x, W_enc, b_enc, centre, centred, values, by_latent)
        return Codes(made.masked_fill(values.isneginf(), 0), index, by_latent)

    return codes(*picked), None if revived is None else codes(*revived)


def decode_codes(
    values: Float[Tensor, "token k"], codes: Codes, W_dec: Float[Tensor, "d_sae d_out"]
) -> Float[Tensor, "token d_out"]:
    """Return Σ over a token's entries of value · W_dec[latent].

    Gradients visit only the entries: dvalue = g_t · W_dec[n], and dW_dec[n] = Σ over entries (t, n) of value · g_t.

    Args:
        values: of the latents in `codes`, whatever was made of `codes.values`.
        codes: which latents they are.
        W_dec: decoder directions, one per row.

    Returns:
        The sums, in the order of the entries.
    """
    # PyTorch's own gradient with respect to the values is a dot product per entry, as it should be. That with respect
    # to the rows would order the entries anew, which the encoder's gradient has to do anyway.
    out = F.embedding_bag(codes.index, W_dec.detach(), per_sample_weights=values, mode="sum")
    made: Tensor = _DecoderGradient.apply(out, W_dec, values.detach(), codes.by_latent)
    return made


@torch.no_grad()
def _pick(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, scale: Tensor | None, dead: Tensor | None, k_dead: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
    """Values and latents of the largest pre-activations, and of the largest among dead latents (−∞: not one)."""
    rows = max(1, _CHUNK_BYTES.get(x.device.type, 2**28) // (W_enc.shape[1] * x.element_size()))
    chunk = x.new_empty(min(rows, len(x)), W_enc.shape[1])
    picked, revived = [], []
    for part in x.split(rows):
        pre = torch.addmm(b_enc, part, W_enc, out=chunk[: len(part)])
        score = pre if scale is None else pre * scale
        index = score.topk(k, dim=-1, sorted=False).indices
        picked.append((pre.gather(-1, index), index))
        if dead is not None:
            best, index = score.masked_fill(~dead, -torch.inf).topk(k_dead, dim=-1, sorted=False)
            revived.append((pre.gather(-1, index).masked_fill(best.isneginf(), -torch.inf), index))

    def joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        values, index = zip(*parts, strict=True)
        return torch.cat(values), torch.cat(index)

    return joined(picked), joined(revived) if revived else None


class _Encode(torch.autograd.Function):
    """Gives values that were already made; backwards, what encoder, centre and input had to do with them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        centre: Tensor | None,
        centred: Tensor,
        values: Tensor,
        by_latent: _ByLatent,
    ) -> Tensor:
        ctx.save_for_backward(W_enc, centred)
        ctx.by_latent = by_latent
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        W_enc, centred = ctx.saved_tensors
        for_x, for_weight, for_bias, for_centre = ctx.needs_input_grad[:4]
        weight = _summed(centred, grad, ctx.by_latent, turned=True) if for_weight else None
        bias = _counted(grad, ctx.by_latent) if for_bias or for_centre else None
        centre = -_product(W_enc, bias) if for_centre and bias is not None else None
        x = None
        if for_x:
            x = F.embedding_bag(ctx.by_latent.index, W_enc.T.contiguous(), per_sample_weights=grad, mode="sum")
        return x, weight, bias if for_bias else None, centre, None, None, None


class _DecoderGradient(torch.autograd.Function):
    """Passes a reconstruction through; backwards, gives the decoder's rows their gradient."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, W_dec: Tensor, values: Tensor, by_latent: _ByLatent) -> Tensor:
        ctx.save_for_backward(values)
        ctx.by_latent = by_latent
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (values,) = ctx.saved_tensors
        weight = _summed(grad.contiguous(), values, ctx.by_latent) if ctx.needs_input_grad[1] else None
        return grad, weight, None, None


def _summed(rows: Tensor, values: Tensor, by_latent: _ByLatent, *, turned: bool = False) -> Tensor:
    """For each latent, the sum over its entries of value times the token's row: [d_sae d], or turned, [d d_sae]."""
    entries, bounds = by_latent.order()
    tokens, weights = entries // values.shape[1], values.flatten()[entries]
    if not turned:
        return F.embedding_bag(tokens, rows, bounds[:-1], per_sample_weights=weights, mode="sum")
    d_sae, on_cpu = by_latent.d_sae, rows.device.type == "cpu"
    width = _LATENTS if on_cpu else d_sae
    starts = range(0, d_sae, width)
    # Bounds of the chunks, known on the host only where that costs nothing.
    cuts = [*bounds[::width].tolist()[: len(starts)], len(entries)] if on_cpu else [0, len(entries)]
    out = rows.new_empty(rows.shape[1], d_sae)
    for start, low, high in zip(starts, cuts, cuts[1:], strict=False):
        end = min(start + width, d_sae)
        part = F.embedding_bag(
            tokens[low:high], rows, bounds[start:end] - low, per_sample_weights=weights[low:high], mode="sum"
        )
        out[:, start:end] = part.T
    return out


def _counted(values: Tensor, by_latent: _ByLatent) -> Tensor:
    """For each latent, the sum over its entries of the values: [d_sae]."""
    entries, bounds = by_latent.order()
    return F.embedding_bag(entries, values.reshape(-1, 1), bounds[:-1], mode="sum")[:, 0]


def _product(weight: Tensor, vector: Tensor) -> Tensor:
    """weight [d d_sae] times vector [d_sae], summed in blocks on a CPU, whose own product adds one by one."""
    if weight.device.type != "cpu":
        return weight @ vector
    parts = zip(weight.split(_LATENTS, dim=1), vector.split(_LATENTS), strict=True)
    return torch.stack([columns @ part for columns, part in parts]).sum(0)
