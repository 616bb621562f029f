"""Readers of a frozen stream, what each is made of, and how a reader is pulled back through what wrote it.

A reader is a vector at one time and position. What it reads, v · stream + constant, is a sum over the writes before it;
a write that is linear in an earlier stream makes a reader of that stream: through a latent (W_dec · v) W_enc, through a
head A_ts W_OV v, through a skip path W_skipᵀ v, each with the norm in front, whose σ is held.

Source: Dunefsky et al. (2024), arXiv 2406.11944, §4.2 and appendix D.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.errors import DataError
from interp.patching.features.frozen import FrozenAttention, FrozenModel

__all__ = ["PATH_KINDS", "Part", "Reader", "bias_of", "parts_of", "pullback", "reader_of"]

PATH_KINDS = ("latent", "head", "skip", "embed", "pos_embed", "error", "mlp")
"""What a reader's parts can be; the first three can be pulled back further."""


@dataclass(frozen=True, eq=False)
class Reader:
    """What is read of the stream at one time and position.

    Attributes:
        time: when, in the times of `FrozenModel`.
        pos: where.
        vector: what of the stream.
        constant: what is read besides, whatever the stream is.
    """

    time: int
    pos: int
    vector: Float[Tensor, " d_model"]
    constant: Float[Tensor, ""]

    def value(self, frozen: FrozenModel) -> Float[Tensor, ""]:
        """Return what it reads on the prompt."""
        return frozen.stream(self.time)[self.pos] @ self.vector + self.constant


@dataclass(frozen=True, eq=False)
class Part:
    """Several writes of one kind and block that a reader reads.

    Attributes:
        kind: one of `PATH_KINDS`.
        layer: block; −1 of embeddings.
        index: latent or head of each; −1 of everything else.
        pos: position of each: where a head looks, else the reader's own.
        value: what each adds to the reader.
    """

    kind: str
    layer: int
    index: Int[Tensor, " n"]
    pos: Int[Tensor, " n"]
    value: Float[Tensor, " n"]


def reader_of(frozen: FrozenModel, layer: int, latent: int, pos: int) -> Reader:
    """Return the reader whose value is the pre-activation of a latent.

    Args:
        frozen: the model.
        layer, latent, pos: of the latent; pos from the first token.
    """
    held = frozen.transcoders[layer]
    which, at = (torch.tensor([i], device=frozen.resid.device) for i in (latent, pos))
    return Reader(frozen.mlp_time(layer), pos, held.reads(which, at)[0], held.constants(which)[0])


def parts_of(frozen: FrozenModel, reader: Reader) -> Iterator[Part]:
    """Yield what a reader is made of; with `bias_of` and its constant the parts sum to its value."""
    v, pos, device = reader.vector, reader.pos, frozen.resid.device
    none, here = torch.tensor([-1], device=device), torch.tensor([pos], device=device)
    for name, write in frozen.embeddings.items():
        yield Part(name, -1, none, here, (write[pos] @ v)[None])
    for layer in range(frozen.n_layers):
        attention, held, out = frozen.attention[layer], frozen.transcoders.get(layer), frozen.mlp_out[layer]
        if attention is not None and 2 * layer + 1 < reader.time:
            values = attention.values(frozen.stream(2 * layer + 1))[:, : pos + 1]
            carried = attention.pattern[:, pos, : pos + 1] * torch.einsum(
                "hsd,hd->hs", values, _head_reads(attention, v, pos)
            )
            n_heads, n = carried.shape
            heads = torch.arange(n_heads, device=device)[:, None].expand(n_heads, n).flatten()
            yield Part("head", layer, heads, torch.arange(n, device=device).repeat(n_heads), carried.flatten())
        if out is None or 2 * layer + 2 >= reader.time:
            continue
        if held is None:
            yield Part("mlp", layer, none, here, (out[pos] @ v)[None])
            continue
        mine = held.at(pos)
        latents = held.latent[mine]
        yield Part("latent", layer, latents, here.expand_as(latents), held.writes(latents) @ v * held.value[mine])
        yield Part("error", layer, none, here, (held.error[pos] @ v)[None])
        if held.transcoder.has_skip:
            passed = held.skip_writes(frozen.stream(frozen.mlp_time(layer)))[pos]
            yield Part("skip", layer, none, here, (passed @ v)[None])


def bias_of(frozen: FrozenModel, reader: Reader) -> Float[Tensor, ""]:
    """Return what biases of blocks write into what a reader reads; those inside of heads' values are the heads'."""
    total, pos = reader.constant.clone(), reader.pos
    for layer in range(frozen.n_layers):
        attention, held = frozen.attention[layer], frozen.transcoders.get(layer)
        if attention is not None and 2 * layer + 1 < reader.time:
            out = attention.b_O
            if attention.post is not None:
                out = attention.post.at(pos).linear(out[None])[0] + attention.post.bias
            total = total + attention.factor * out @ reader.vector
        if held is not None and 2 * layer + 2 < reader.time:
            total = total + held.bias @ reader.vector
    return total


def pullback(frozen: FrozenModel, reader: Reader, *, through: tuple[str, int, int], pos: int | None = None) -> Reader:
    """Return the reader of an earlier stream whose value is what one write adds to a reader.

    Args:
        frozen: the model.
        reader: what reads the write.
        through: ("latent", layer, latent) of a latent that is active at the reader's position; ("head", layer, head);
            or ("skip", layer, -1) of a skip transcoder.
        pos: for a head, the position that it looks at.

    Raises:
        DataError: no such write is before the reader.
    """
    kind, layer, index = through
    _check(frozen, reader, through, pos)
    v, at = reader.vector, reader.pos
    if kind == "latent":
        inner = reader_of(frozen, layer, index, at)
        which = torch.tensor([index], device=v.device)
        factor = frozen.transcoders[layer].writes(which)[0] @ v
        return Reader(inner.time, at, factor * inner.vector, factor * inner.constant)
    if kind == "skip":
        field = torch.zeros_like(frozen.resid)
        field[at] = v
        return Reader(frozen.mlp_time(layer), at, frozen.transcoders[layer].skip_back(field)[at], v.new_zeros(()))
    attention = frozen.attention[layer]
    assert attention is not None and pos is not None
    share = attention.pattern[index, at, pos]
    z, key = _head_reads(attention, v, at)[index] * share, index // attention.group
    read = attention.W_V[key] @ z
    constant = attention.b_V[key] @ z
    if attention.norm is not None:
        constant = constant + attention.norm.bias @ read
        read = attention.norm.at(pos).back(read[None])[0]
    return Reader(2 * layer + 1, pos, read, constant)


def _head_reads(attention: FrozenAttention, v: Tensor, pos: int) -> Float[Tensor, "n_heads d_head"]:
    """What a vector at a position reads of each head's z there."""
    v = v * attention.factor
    v = v if attention.post is None else attention.post.at(pos).back(v[None])[0]
    return torch.einsum("m,hdm->hd", v, attention.W_O)


def _check(frozen: FrozenModel, reader: Reader, through: tuple[str, int, int], pos: int | None) -> None:
    kind, layer, index = through
    held = frozen.transcoders.get(layer)
    if kind not in PATH_KINDS[:3] or not 0 <= layer < frozen.n_layers:
        raise DataError(f"through={through!r}: expected ('latent', layer, latent), ('head', layer, head) or 'skip'")
    written = 2 * layer + (1 if kind == "head" else 2)
    if written >= reader.time:
        raise DataError(f"through={through!r}: it writes after the reader reads")
    if kind == "head":
        if frozen.attention[layer] is None or not 0 <= index < frozen.hm.n_heads:
            raise DataError(f"through={through!r}: block {layer} has heads 0 to {frozen.hm.n_heads - 1}")
        if pos is None or not 0 <= pos <= reader.pos:
            raise DataError(f"pos={pos}: expected the position that the head looks at, 0 to {reader.pos}")
        return
    if held is None or (kind == "skip" and not held.transcoder.has_skip):
        raise DataError(f"through={through!r}: block {layer} has no such transcoder")
    if kind == "latent" and index not in held.latent[held.at(reader.pos)].tolist():
        raise DataError(f"through={through!r}: that latent is not active at position {reader.pos}")
