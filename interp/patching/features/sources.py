"""Everything that writes into a frozen stream, as one list; and how much of each write a reader reads in the end."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.patching.features.frozen import FrozenModel, FrozenTranscoder

__all__ = ["KINDS", "Sources", "contributions"]

KINDS = ("embed", "pos_embed", "latent", "error", "mlp", "attn_bias", "b_dec")
"""What a source can be: an embedding, an active latent, what a transcoder misses, an MLP without a transcoder, the
biases of attention (of its norms too), and those of a transcoder."""


@dataclass(frozen=True, eq=False)
class Sources:
    """Every write into a frozen stream: what, where, and how much.

    Attributes:
        kind: index into `KINDS`.
        layer: block; −1 of embeddings.
        pos: position.
        latent: number of a latent; −1 of everything else.
        value: a latent's activation; 1 of everything else.
    """

    kind: Int[Tensor, " source"]
    layer: Int[Tensor, " source"]
    pos: Int[Tensor, " source"]
    latent: Int[Tensor, " source"]
    value: Float[Tensor, " source"]

    def __len__(self) -> int:
        return len(self.kind)

    @classmethod
    def of(cls, frozen: FrozenModel) -> "Sources":
        """List the sources of a prompt: embeddings, then block by block attention's biases and its MLP's parts."""
        n, device = len(frozen.ids), frozen.resid.device
        every, parts = torch.arange(n, device=device), []

        def add(kind: str, layer: int) -> None:
            ones = torch.ones_like(every)
            value = ones.to(frozen.resid)
            parts.append((ones * KINDS.index(kind), ones * layer, every, -ones, value))

        for name in frozen.embeddings:
            add(name, -1)
        for layer in range(frozen.n_layers):
            if frozen.attention[layer] is not None:
                add("attn_bias", layer)
            held = frozen.transcoders.get(layer)
            if held is not None:
                ones = torch.ones_like(held.pos)
                parts.append((ones * KINDS.index("latent"), ones * layer, held.pos, held.latent, held.value))
                add("error", layer)
                add("b_dec", layer)
            elif frozen.mlp_out[layer] is not None:
                add("mlp", layer)
        return cls(*(torch.cat(column) for column in zip(*parts, strict=True)))


def contributions(
    frozen: FrozenModel, seeds: Mapping[int, Float[Tensor, "n pos d_model"]], heads: Mapping[int, Tensor] | None = None
) -> Float[Tensor, "n source"]:
    """Return how much of what each reader reads comes from each source, in the order of `Sources.of`.

    Exactly linear: a row sums to reader · stream. Memory, in numbers: n · source, and what `FrozenModel.walk` takes.

    Args:
        frozen: the model.
        seeds, heads: as for `FrozenModel.walk`; with heads left out, only some of the ways are counted.
    """
    found: dict[tuple[str, int], Tensor] = {}
    for place, layer, g in frozen.walk(seeds, heads):
        found[place, layer] = _at_place(frozen, place, layer, g)
    order = [("embed", 0)]
    for layer in range(frozen.n_layers):
        order += [(place, layer) for place in ("attn", "mlp") if (place, layer) in found]
    return torch.cat([found[key] for key in order], 1)


def _at_place(frozen: FrozenModel, place: str, layer: int, g: Tensor) -> Float[Tensor, "n some"]:
    """The contributions of the sources that write at one place."""
    if place == "embed":
        return torch.cat([_dot(g, write) for write in frozen.embeddings.values()], 1)
    if place == "attn":
        attention = frozen.attention[layer]
        assert attention is not None
        return _dot(g, attention.constant)
    held, out = frozen.transcoders.get(layer), frozen.mlp_out[layer]
    if held is None:
        assert out is not None
        return _dot(g, out)
    return torch.cat([_latents(held, g), _dot(g, held.error), g @ held.bias], 1)


def _dot(g: Tensor, write: Tensor) -> Float[Tensor, "n pos"]:
    return torch.einsum("npm,pm->np", g, write)


def _latents(held: FrozenTranscoder, g: Tensor) -> Float[Tensor, "n active"]:
    """Position by position, for a product over all of them would be n · active · d_model large."""
    counts = torch.bincount(held.pos, minlength=g.shape[1]).tolist()
    rows, values = held.latent.split(counts), held.value.split(counts)
    parts = [
        (g[:, p] @ held.writes(rows[p]).T) * values[p] if counts[p] else g.new_zeros(len(g), 0)
        for p in range(len(counts))
    ]
    return torch.cat(parts, 1)
