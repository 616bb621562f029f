"""A prompt with norms' σ and attention patterns held as they were: what is left between MLPs is a linear map.

    stream → norm (σ fixed) → values → pattern (fixed) → W_O → stream

With a transcoder at an MLP, what that writes is Σ latent · W_dec[latent] + b_dec (+ its skip path) + an error that
makes up the difference, and a latent that is active is a linear function of the stream again. All of it is written out
here by formula, forwards and backwards, from the weights: no gradient is taken, so that no graph is kept in memory.

Source: Dunefsky, Chlenski and Nanda (2024), arXiv 2406.11944, §4 and appendix D; Ameisen et al. (2025), "Circuit
Tracing", for errors as nodes. Departure: σ and patterns are those of the model itself, and each layer's formula is
held against what the model computed, so that a family that does something else in between is refused.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.dictionaries.base import Dictionary, Transcoder

if TYPE_CHECKING:
    from interp.core.manager import HookManager

__all__ = ["FrozenAttention", "FrozenModel", "FrozenNorm", "FrozenTranscoder", "read_back", "write_rows"]


@dataclass(frozen=True, eq=False)
class FrozenNorm:
    """A norm whose σ is held: y = (x − μ)/σ ⊙ gain + bias.

    Attributes:
        scale: σ at each position.
        gain: of each dimension.
        bias: zeros where the norm has none.
        centred: whether μ is taken off (LayerNorm) or is 0 (RMSNorm).
    """

    scale: Float[Tensor, "pos 1"]
    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    centred: bool

    def linear(self, x: Float[Tensor, "*n pos d_model"]) -> Float[Tensor, "*n pos d_model"]:
        """Return y without the bias."""
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        return x / self.scale * self.gain

    def back(self, v: Float[Tensor, "*n pos d_model"]) -> Float[Tensor, "*n pos d_model"]:
        """Return the transpose of `linear`, applied to vectors that read y."""
        v = v * self.gain / self.scale
        return v - v.mean(-1, keepdim=True) if self.centred else v

    def at(self, pos: "int | Int[Tensor, ' n']") -> "FrozenNorm":
        """Return the norm at some positions alone."""
        rows = self.scale[pos : pos + 1] if isinstance(pos, int) else self.scale[pos]
        return FrozenNorm(rows, self.gain, self.bias, self.centred)


@dataclass(frozen=True, eq=False)
class FrozenAttention:
    """Attention whose pattern is held, with the norms before and after it.

    Attributes:
        norm: the norm that values read through; None where they read the stream itself.
        post: the norm on attention's output (Gemma 2, OLMo 2); None where there is none.
        pattern: share of each source position in each query position.
        W_V, b_V, W_O, b_O: as in `hm.weights`.
        factor: what the output is multiplied by (Granite's residual multiplier).
    """

    norm: FrozenNorm | None
    post: FrozenNorm | None
    pattern: Float[Tensor, "n_heads pos src"]
    W_V: Float[Tensor, "n_kv_heads d_model d_head"]
    b_V: Float[Tensor, "n_kv_heads d_head"]
    W_O: Float[Tensor, "n_heads d_head d_model"]
    b_O: Float[Tensor, " d_model"]
    factor: float = 1.0

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return len(self.W_O) // len(self.W_V)

    @cached_property
    def constant(self) -> Float[Tensor, "pos d_model"]:
        """What attention adds to a stream of zeros: its biases, and those of its norms."""
        return self.forward(self.b_O.new_zeros(self.pattern.shape[1], len(self.b_O)))

    def values(self, x: Float[Tensor, "pos d_model"]) -> Float[Tensor, "n_heads pos d_head"]:
        """Return each query head's values of a stream; under grouped queries a value head is repeated."""
        read = x if self.norm is None else self.norm.linear(x) + self.norm.bias
        v = torch.einsum("pm,kmd->kpd", read, self.W_V) + self.b_V[:, None]
        return v.repeat_interleave(self.group, 0)

    def forward(self, x: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_model"]:
        """Return what attention adds to a stream; of zeros, its constant part."""
        z = self.pattern @ self.values(x)
        out = torch.einsum("hpd,hdm->pm", z, self.W_O) + self.b_O
        out = out if self.post is None else self.post.linear(out) + self.post.bias
        return out * self.factor

    def heads_read(self, v: Float[Tensor, "*n pos d_model"]) -> Float[Tensor, "*n pos n_heads d_head"]:
        """Return what vectors that read attention's output read of each head's z."""
        v = v * self.factor
        v = v if self.post is None else self.post.back(v)
        return torch.einsum("...pm,hdm->...phd", v, self.W_O)

    def back(
        self, v: Float[Tensor, "n pos d_model"], heads: Float[Tensor, " n_heads"] | None = None
    ) -> Float[Tensor, "n pos d_model"]:
        """Return what vectors that read the output read of the stream before, through every head at once.

        Args:
            v: the vectors.
            heads: 1 for the heads to go through, 0 for the others; None for all.
        """
        z = self.heads_read(v)
        z = z if heads is None else z * heads[:, None]
        moved = torch.einsum("hts,nthd->nshd", self.pattern, z)
        return self._to_stream(moved.unflatten(2, (-1, self.group)).sum(3), "nskd,kmd->nsm")

    def back_by_head(self, v: Float[Tensor, "pos d_model"]) -> Float[Tensor, "n_heads pos d_model"]:
        """Return the same of one vector field, head by head."""
        moved = torch.einsum("hts,thd->hsd", self.pattern, self.heads_read(v))
        return self._to_stream(moved.unflatten(0, (-1, self.group)), "kgsd,kmd->kgsm").flatten(0, 1)

    def _to_stream(self, moved: Tensor, form: str) -> Tensor:
        read = torch.einsum(form, moved, self.W_V)
        return read if self.norm is None else self.norm.back(read)


@dataclass(frozen=True, eq=False)
class FrozenTranscoder:
    """A transcoder at one MLP on one prompt: which latents are active, and what it misses.

    Attributes:
        transcoder: the transcoder.
        norm: from the stream to what it reads; None where it reads the stream.
        pos, latent, value: place, number and activation of every active latent, in order of position.
        pre: pre-activation of each of them; equal to `value`.
        error: what the MLP writes and the transcoder does not.
        x: what it read.
    """

    transcoder: Transcoder
    norm: FrozenNorm | None
    pos: Int[Tensor, " active"]
    latent: Int[Tensor, " active"]
    value: Float[Tensor, " active"]
    error: Float[Tensor, "pos d_model"]
    x: Float[Tensor, "pos d_in"]

    def pre_activation(self, latent: int, pos: int) -> Float[Tensor, ""]:
        """Return the pre-activation of one latent at one position."""
        t = self.transcoder
        return t.space.fixed(self.x[pos]) @ t.W_enc.detach()[:, latent].to(self.x) + t.b_enc.detach()[latent].to(self.x)

    def reads(self, latent: Int[Tensor, " n"], pos: Int[Tensor, " n"]) -> Float[Tensor, "n d_model"]:
        """Return what latents read of the stream at some positions: encoder directions through space and norm."""
        rows = read_back(self.transcoder, latent, self.x)
        return rows if self.norm is None else self.norm.at(pos).back(rows)

    def constants(self, latent: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Return what latents' pre-activations are of a stream of zeros: b_enc, and the norm's bias."""
        t = self.transcoder
        columns = t.W_enc.detach().index_select(1, latent).to(self.x)
        seen = t.space.fixed(self.x.new_zeros(t.cfg.d_in) if self.norm is None else self.norm.bias)
        return seen @ columns + t.b_enc.detach()[latent].to(self.x)

    def writes(self, latent: Int[Tensor, " n"]) -> Float[Tensor, "n d_model"]:
        """Return what one unit of latents writes into the stream."""
        return write_rows(self.transcoder, latent, self.x)

    @cached_property
    def bias(self) -> Float[Tensor, " d_model"]:
        """What it writes where nothing is active and the stream is zeros: b_dec, and the norm's bias through a skip."""
        t = self.transcoder
        made = t.b_dec.detach().to(self.x)
        if t.has_skip:
            seen = t.space.fixed(self.x.new_zeros(t.cfg.d_in) if self.norm is None else self.norm.bias)
            made = made + t.W_skip.detach().to(self.x) @ seen
        return t.target_space.unfixed(made)

    def skip_back(self, v: Float[Tensor, "*n pos d_model"]) -> Float[Tensor, "*n pos d_model"]:
        """Return what vectors that read the output read of the stream before, past the latents."""
        t = self.transcoder
        v = _fixed_back(t, _unfixed_back(t, v) @ t.W_skip.detach().to(v))
        return v if self.norm is None else self.norm.back(v)

    def skip_writes(self, x: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_model"]:
        """Return what the skip path makes of a stream, without its constant part."""
        t = self.transcoder
        read = x if self.norm is None else self.norm.linear(x)
        zero = torch.zeros_like(read[:1])
        seen = t.space.fixed(read) - t.space.fixed(zero)
        return _unfixed_linear(t, seen @ t.W_skip.detach().to(x).T)

    def skip_change(self, x: Float[Tensor, "*n pos d_in"]) -> Float[Tensor, "*n pos d_model"]:
        """Return by how much the skip path's output changes where other activations are read than on the prompt."""
        t = self.transcoder
        change = t.space.fixed(x.to(self.x)) - t.space.fixed(self.x)
        return _unfixed_linear(t, change @ t.W_skip.detach().to(change).T)

    def at(self, pos: int) -> slice:
        """Return which active latents are at a position."""
        first, last = torch.searchsorted(self.pos, torch.tensor([pos, pos + 1], device=self.pos.device)).tolist()
        return slice(first, last)


def read_back(t: Dictionary, latent: Int[Tensor, " n"], like: Tensor) -> Float[Tensor, "n d_in"]:
    """Return what latents read of the model's own activation: W_enc through the dictionary's space.

    Args:
        t: the dictionary.
        latent: which.
        like: whose dtype and device are wanted.
    """
    return _fixed_back(t, t.W_enc.detach().index_select(1, latent).T.to(like))


def write_rows(t: Dictionary, latent: Int[Tensor, " n"], like: Tensor) -> Float[Tensor, "n d_out"]:
    """Return what one unit of latents adds to the model's own activation: W_dec through the dictionary's space.

    Args:
        t: the dictionary.
        latent: which.
        like: whose dtype and device are wanted.
    """
    return _unfixed_linear(t, t.W_dec.detach().index_select(0, latent).to(like))


def _fixed_back(t: Dictionary, v: Tensor) -> Tensor:
    """The transpose of `space.fixed`'s linear part: a mean taken off, then a scale."""
    v = v if t.space.scale is None else v * t.space.scale.to(v)
    return v - v.mean(-1, keepdim=True) if t.space.centred else v


def _unfixed_linear(t: Dictionary, y: Tensor) -> Tensor:
    return t.target_space.unfixed(y) - t.target_space.unfixed(torch.zeros_like(y[..., :1, :]))


def _unfixed_back(t: Dictionary, v: Tensor) -> Tensor:
    v = v if t.target_space.scale is None else v / t.target_space.scale.to(v)
    return v - v.mean(-1, keepdim=True) if t.target_space.read_centred else v


@dataclass(frozen=True, eq=False)
class FrozenModel:
    """A model on one prompt, with σ and patterns held; made by `interp.patching.features.freeze.freeze`.

    A write has a time: the embedding 0, attention of block l 2l + 1, its MLP 2l + 2. A reader at a time sees every
    write of an earlier time: attention of block l reads at 2l + 1, its MLP at 2l + 2 (at 2l + 1 where blocks are
    parallel), the logits at 2 · n_layers + 1.

    Attributes:
        hm: the manager.
        ids: the prompt's tokens, without pads.
        embeddings: what stands at the start of the stream, by name.
        attention: of every block; None in a block without.
        mlp_out: what each MLP added, [layer] → [pos d_model]; None in a block without.
        transcoders: layer → transcoder.
        final: the final norm.
        resid: the stream that left the last block.
        streams: stream that attention of each block read, then that its MLP read.
        logits: of every position.
    """

    hm: "HookManager"
    ids: Int[Tensor, " pos"]
    embeddings: dict[str, Tensor]
    attention: list[FrozenAttention | None]
    mlp_out: list[Tensor | None]
    transcoders: dict[int, FrozenTranscoder]
    final: FrozenNorm | None
    resid: Float[Tensor, "pos d_model"]
    streams: list[tuple[Tensor, Tensor]]
    logits: Float[Tensor, "pos d_vocab"]

    @property
    def n_layers(self) -> int:
        """Blocks."""
        return len(self.attention)

    @property
    def parallel(self) -> bool:
        """Whether a block's attention and MLP read the same stream."""
        return self.hm.map.parallel

    @property
    def last(self) -> int:
        """The time at which the logits read."""
        return 2 * self.n_layers + 1

    def mlp_time(self, layer: int) -> int:
        """The time at which a block's MLP reads."""
        return 2 * layer + (1 if self.parallel else 2)

    def stream(self, time: int) -> Float[Tensor, "pos d_model"]:
        """Return the stream that a reader at a time sees."""
        if time == self.last:
            return self.resid
        attn, mlp = self.streams[(time - 1) // 2]
        return mlp if time % 2 == 0 else attn

    def seed(
        self, time: Int[Tensor, " n"], pos: Int[Tensor, " n"], vector: Float[Tensor, "n d_model"]
    ) -> dict[int, Float[Tensor, "n pos d_model"]]:
        """Return readers of one position each as what `walk` takes.

        Args:
            time: when each reads.
            pos: where.
            vector: what of the stream.
        """
        made = {}
        row = torch.arange(len(vector), device=vector.device)
        for t in time.unique().tolist():
            field = vector.new_zeros(len(vector), len(self.ids), vector.shape[1])
            mine = (time == t).to(vector.device)
            field[row[mine], pos.to(vector.device)[mine]] = vector[mine]
            made[int(t)] = field
        return made

    def walk(
        self, seeds: Mapping[int, Float[Tensor, "n pos d_model"]], heads: Mapping[int, Tensor] | None = None
    ) -> Iterator[tuple[str, int, Float[Tensor, "n pos d_model"]]]:
        """Go backwards through the frozen model; yield, at each place of writing, what is read of it in the end.

        Memory: n · pos · (2 d_model + n_heads · d_head) numbers at a time.

        Args:
            seeds: time → what readers at that time read of the stream.
            heads: block → which of its heads may be gone through, [n_heads] of 0 and 1; blocks that are left out are
                not gone through. None for all heads.

        Yields:
            ("mlp", layer, g), ("attn", layer, g) and at last ("embed", 0, g): a write w at position p of that place
            adds w · g[n, p] to what reader n reads.
        """
        g = torch.zeros_like(next(iter(seeds.values())))
        for layer in reversed(range(self.n_layers)):
            g = _plus(g, seeds.get(2 * layer + 3))
            skipped = None
            if self.mlp_out[layer] is not None:
                yield "mlp", layer, g
                held = self.transcoders.get(layer)
                if held is not None and held.transcoder.has_skip:
                    skipped = held.skip_back(g)
            g = g if self.parallel else _plus(g, skipped)
            g = _plus(g, seeds.get(2 * layer + 2))
            attention = self.attention[layer]
            if attention is not None:
                yield "attn", layer, g
                chosen = None if heads is None else heads.get(layer)
                if heads is None or chosen is not None:
                    g = g + attention.back(g, chosen)
            g = _plus(g, skipped) if self.parallel else g
        yield "embed", 0, _plus(g, seeds.get(1))


def _plus(g: Tensor, more: Tensor | None) -> Tensor:
    return g if more is None else g + more
