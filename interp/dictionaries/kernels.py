"""Exact sparse maths for dictionaries: what is active is a list of entries, and gradients visit only those."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Codes", "Entries", "decode_codes", "encode_dense", "encode_entries"]

# Latents taken at a time on a CPU: few enough that turning their encoder gradient round happens in cache, and that
# a sum over them is exact to a few units in the last place.
_LATENTS = 256


class Entries:
    """Which latents stand at which tokens, token by token: as many in each, or some in one and none in another.

    Args:
        index: the latents: [token k], or [entry] with `tokens`.
        d_sae: how many latents there are.
        tokens: the token of each entry, which must not fall.
        n_tokens: how many tokens there are; needed with `tokens`.
    """

    def __init__(self, index: Tensor, d_sae: int, *, tokens: Tensor | None = None, n_tokens: int = 0) -> None:
        self.index, self.d_sae = index, d_sae
        self.n_tokens = len(index) if tokens is None else n_tokens
        self.tokens = tokens
        # For `embedding_bag`: where each token's entries begin; None where it sees that from two axes.
        self.bounds = (
            None if tokens is None else torch.searchsorted(tokens, torch.arange(n_tokens, device=index.device))
        )
        self._order: tuple[Tensor, Tensor] | None = None

    def order(self) -> tuple[Tensor, Tensor]:
        """Positions in `index.flatten()`, sorted, and the d_sae + 1 bounds of each latent's; made once, when wanted."""
        if self._order is None:
            # Stable, so that each sum has one order and one result.
            latents, entries = self.index.flatten().sort(stable=True)
            bounds = torch.arange(self.d_sae + 1, device=latents.device)
            self._order = entries, torch.searchsorted(latents, bounds)
        return self._order

    def tokens_of(self, entries: Tensor) -> Tensor:
        """The tokens of some entries, given by their positions in `index.flatten()`."""
        return entries // self.index.shape[1] if self.tokens is None else self.tokens[entries]

    def summed(self, values: Tensor, rows: Tensor) -> Tensor:
        """For each token, the sum over its entries of value times the latent's row: [token d]."""
        return F.embedding_bag(self.index, rows, self.bounds, per_sample_weights=values, mode="sum")


@dataclass(frozen=True)
class Codes:
    """A few latents per token.

    Attributes:
        values: their pre-activations, with gradients to what they were made of; 0, without one, where there were fewer
            latents to choose from.
        entries: which latents they are, in no order within a token; shared by the gradients of encoder and decoder.
    """

    values: Float[Tensor, "..."]
    entries: Entries

    @property
    def index(self) -> Int[Tensor, "..."]:
        """The latent of each value."""
        return self.entries.index


def encode_entries(
    x: Float[Tensor, "token d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, "d_sae"],
    centre: Float[Tensor, "d_in"] | None,
    values: Float[Tensor, "..."],
    entries: Entries,
) -> Codes:
    """Give pre-activations that were already made their gradients, which visit only the entries:

        dW_enc[:, n] = Σ over entries (t, n) of g · (x_t − centre)
        db_enc[n] = Σ over entries (t, n) of g
        dcentre = −W_enc db_enc
        dx_t = Σ over entries (t, n) of g · W_enc[:, n]

    dx only when `x` wants it; it then copies W_enc once. Each sum has one order, that of the tokens.

    Args:
        x: activations.
        W_enc: encoder directions, one per column.
        b_enc: encoder biases.
        centre: what was subtracted from each token first; None for 0.
        values: (x − centre) W_enc + b_enc at the entries; −∞ marks an entry that is none.
        entries: where they are.
    """
    centred = x.detach() if centre is None else x.detach() - centre.detach()
    made: Tensor = _Encode.apply(x, W_enc, b_enc, centre, centred, values, entries)
    return Codes(made.masked_fill(values.isneginf(), 0), entries)


def encode_dense(
    x: Float[Tensor, "token d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, "d_sae"],
    centre: Float[Tensor, "d_in"] | None,
    pre: Float[Tensor, "token d_sae"],
) -> Float[Tensor, "token d_sae"]:
    """Give pre-activations that were already made, all of them, their gradients; dx only when `x` wants it.

    The centre's gradient is −W_enc Σ_t g_t: a product of a matrix and a vector, where subtracting it under autograd
    would cost one of token × d_sae × d_in.

    Args:
        x, W_enc, b_enc, centre: as for `encode_entries`.
        pre: (x − centre) W_enc + b_enc.
    """
    centred = x.detach() if centre is None else x.detach() - centre.detach()
    made: Tensor = _EncodeDense.apply(x, W_enc, b_enc, centre, centred, pre)
    return made


def decode_codes(
    values: Float[Tensor, "..."], codes: Codes, W_dec: Float[Tensor, "d_sae d_out"]
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
    out = codes.entries.summed(values, W_dec.detach())
    made: Tensor = _DecoderGradient.apply(out, W_dec, values.detach(), codes.entries)
    return made


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
        entries: Entries,
    ) -> Tensor:
        ctx.save_for_backward(W_enc, centred)
        ctx.entries = entries
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        W_enc, centred = ctx.saved_tensors
        for_x, for_weight, for_bias, for_centre = ctx.needs_input_grad[:4]
        weight = _summed(centred, grad, ctx.entries, turned=True) if for_weight else None
        bias = _counted(grad, ctx.entries) if for_bias or for_centre else None
        centre = -_product(W_enc, bias) if for_centre and bias is not None else None
        x = ctx.entries.summed(grad, W_enc.T.contiguous()) if for_x else None
        return x, weight, bias if for_bias else None, centre, None, None, None


class _EncodeDense(torch.autograd.Function):
    """The same where all latents may matter."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, centre: Tensor | None, centred: Tensor, pre: Tensor
    ) -> Tensor:
        ctx.save_for_backward(W_enc, centred)
        return pre.view_as(pre)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        W_enc, centred = ctx.saved_tensors
        for_x, for_weight, for_bias, for_centre = ctx.needs_input_grad[:4]
        weight = centred.T @ grad if for_weight else None
        bias = grad.sum(0) if for_bias or for_centre else None
        centre = -_product(W_enc, bias) if for_centre and bias is not None else None
        return grad @ W_enc.T if for_x else None, weight, bias if for_bias else None, centre, None, None


class _DecoderGradient(torch.autograd.Function):
    """Passes a reconstruction through; backwards, gives the decoder's rows their gradient."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, W_dec: Tensor, values: Tensor, entries: Entries) -> Tensor:
        ctx.save_for_backward(values)
        ctx.entries = entries
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (values,) = ctx.saved_tensors
        weight = _summed(grad.contiguous(), values, ctx.entries) if ctx.needs_input_grad[1] else None
        return grad, weight, None, None


def _summed(rows: Tensor, values: Tensor, entries: Entries, *, turned: bool = False) -> Tensor:
    """For each latent, the sum over its entries of value times the token's row: [d_sae d], or turned, [d d_sae]."""
    order, bounds = entries.order()
    tokens, weights = entries.tokens_of(order), values.flatten()[order]
    if not turned:
        return F.embedding_bag(tokens, rows, bounds[:-1], per_sample_weights=weights, mode="sum")
    d_sae, on_cpu = entries.d_sae, rows.device.type == "cpu"
    width = _LATENTS if on_cpu else d_sae
    starts = range(0, d_sae, width)
    # Bounds of the chunks, known on the host only where that costs nothing.
    cuts = [*bounds[::width].tolist()[: len(starts)], len(order)] if on_cpu else [0, len(order)]
    out = rows.new_empty(rows.shape[1], d_sae)
    for start, low, high in zip(starts, cuts, cuts[1:], strict=False):
        end = min(start + width, d_sae)
        part = F.embedding_bag(
            tokens[low:high], rows, bounds[start:end] - low, per_sample_weights=weights[low:high], mode="sum"
        )
        out[:, start:end] = part.T
    return out


def _counted(values: Tensor, entries: Entries) -> Tensor:
    """For each latent, the sum over its entries of the values: [d_sae]."""
    order, bounds = entries.order()
    return F.embedding_bag(order, values.reshape(-1, 1), bounds[:-1], mode="sum")[:, 0]


def _product(weight: Tensor, vector: Tensor) -> Tensor:
    """weight [d d_sae] times vector [d_sae], summed in blocks on a CPU, whose own product adds one by one."""
    if weight.device.type != "cpu":
        return weight @ vector
    parts = zip(weight.split(_LATENTS, dim=1), vector.split(_LATENTS), strict=True)
    return torch.stack([columns @ part for columns, part in parts]).sum(0)
