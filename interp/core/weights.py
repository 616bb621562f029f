"""Weights per head in TransformerLens' layout, for every family: views on the model's own parameters."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interp.core.errors import ModelError, SiteError, WhereError, nearest
from interp.core.points import Atlas
from interp.core.views import fused_rows, linear_weight

__all__ = ["Factored", "LayerWeights", "NormWeights", "Weights", "readable"]

_NORM_PLACES = {
    "ln1": "pre",
    "ln2": "pre",
    "ln1_post": "post",
    "ln2_post": "post",
    "q_norm": "head",
    "k_norm": "head",
    "ln_final": "final",
}


@dataclass(frozen=True)
class Factored:
    """A low-rank matrix `left @ right`, kept as its factors.

    Args:
        left: [d_model d_head].
        right: [d_head d_model].
    """

    left: Float[Tensor, "rows rank"]
    right: Float[Tensor, "rank columns"]

    @property
    def product(self) -> Float[Tensor, "rows columns"]:
        """The whole matrix."""
        return self.left @ self.right


@dataclass(frozen=True)
class NormWeights:
    """The parameters of one norm: y = (x − μ)/σ · gain + bias, σ = √(mean((x − μ)²) + eps).

    Args:
        kind: "LN" (centred) or "RMS" (μ = 0).
        eps: added to the mean square, in squared units of the input.
        gain: what the normalised value is multiplied by: 1 + weight where the family stores it so (Gemma), ones where
            the norm has no weights.
        bias: zeros where there is none.
        place: "pre" (a sublayer reads it), "post" (on a sublayer's output), "head" (queries or keys) or "final".
    """

    kind: str
    eps: float
    gain: Float[Tensor, "*heads d"]
    bias: Float[Tensor, "*heads d"]
    place: str


class LayerWeights:
    """The weights of one block, in TransformerLens' layout (`x @ W`); a bias that the model lacks reads as zeros.

    All are detached and share memory with the model, except queries of Falcon's grouped layout, which are a copy. They
    are the raw parameters: no norm gain, residual multiplier or rotary is multiplied in.
    """

    def __init__(self, atlas: Atlas, layer: int) -> None:
        self._atlas = atlas
        self._map = atlas.map
        self.layer = layer

    def __repr__(self) -> str:
        return f"LayerWeights({self._map.family}, layer {self.layer})"

    @property
    def W_Q(self) -> Float[Tensor, "n_heads d_model d_head"]:
        """Query weights per head."""
        return self._heads("q", "weight")

    @property
    def W_K(self) -> Float[Tensor, "n_kv_heads d_model d_head"]:
        """Key weights per key/value head."""
        return self._heads("k", "weight")

    @property
    def W_V(self) -> Float[Tensor, "n_kv_heads d_model d_head"]:
        """Value weights per key/value head."""
        return self._heads("v", "weight")

    @property
    def W_O(self) -> Float[Tensor, "n_heads d_head d_model"]:
        """Output weights per head."""
        weight = self._matrix("attn.o")
        return weight.unflatten(0, (self._map.n_heads, -1))

    @property
    def b_Q(self) -> Float[Tensor, "n_heads d_head"]:
        """Query biases."""
        return self._heads("q", "bias")

    @property
    def b_K(self) -> Float[Tensor, "n_kv_heads d_head"]:
        """Key biases."""
        return self._heads("k", "bias")

    @property
    def b_V(self) -> Float[Tensor, "n_kv_heads d_head"]:
        """Value biases."""
        return self._heads("v", "bias")

    @property
    def b_O(self) -> Float[Tensor, " d_model"]:
        """Bias of the output projection."""
        return self._bias("attn.o")

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        """Weights into the neurons; the linear half, where the MLP is gated."""
        return self._mlp_in("mlp.in", 1, self._matrix)

    @property
    def W_gate(self) -> Float[Tensor, "d_model d_mlp"]:
        """Weights into the gate (the half that goes through the activation function) of a gated MLP."""
        self._check_gated()
        return self._mlp_in("mlp.gate", 0, self._matrix)

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        """Weights out of the neurons."""
        return self._matrix("mlp.out")

    @property
    def b_in(self) -> Float[Tensor, " d_mlp"]:
        """Bias of `W_in`."""
        return self._mlp_in("mlp.in", 1, self._bias)

    @property
    def b_gate(self) -> Float[Tensor, " d_mlp"]:
        """Bias of `W_gate`."""
        self._check_gated()
        return self._mlp_in("mlp.gate", 0, self._bias)

    @property
    def b_out(self) -> Float[Tensor, " d_model"]:
        """Bias of `W_out`."""
        return self._bias("mlp.out")

    def _module(self, part: str) -> tuple[nn.Module, str]:
        module = self._map.module(self._atlas.model, part, self.layer)
        if module is None:
            raise ModelError(f"block {self.layer} of {self._map.family} has no weights for {part!r}: {self._why(part)}")
        return module, self._map.path(part, self.layer)

    def _why(self, part: str) -> str:
        if part.startswith("mlp") and self._map.d_mlp is None:
            return str(self._map.reasons.get("mlp_post", "its MLP is a mixture of experts"))
        return "its blocks have no such part, or this block is of another kind"

    def _matrix(self, part: str) -> Float[Tensor, "d_in d_out"]:
        module, path = self._module(part)
        readable(module, path)
        return linear_weight(module).detach()

    def _bias(self, part: str) -> Float[Tensor, " d_out"]:
        module, path = self._module(part)
        weight = readable(module, path)
        bias = getattr(module, "bias", None)
        return bias.detach() if isinstance(bias, Tensor) else weight.new_zeros(linear_weight(module).shape[1])

    def _heads(self, kind: str, what: str) -> Tensor:
        """One of q, k, v, cut out of its projection: rows of [out in] or entries of [out], in head order."""
        m = self._map
        part = f"attn.{kind}" if m.qkv_layout is None else "attn.qkv"
        n = m.n_heads if kind == "q" else m.n_kv_heads
        by_row = self._matrix(part).T if what == "weight" else self._bias(part)
        rows = torch.arange(n * m.d_head)
        if m.qkv_layout is not None:
            rows = fused_rows(m.qkv_layout, m.n_heads, m.n_kv_heads, m.d_head)["qkv".index(kind)]
        elif len(by_row) != len(rows):
            raise ModelError(
                f"{m.path(part, self.layer)!r} has {len(by_row)} outputs where {n} heads × {m.d_head} were expected: "
                "it holds more than heads (a gate?); take its weight from hm.model"
            )
        return _cut(by_row, rows, m.d_head)

    def _mlp_in(self, part: str, half: int, get: Any) -> Tensor:
        if not self._map.has("mlp.gate_up"):
            return get(part)
        return get("mlp.gate_up").chunk(2, dim=-1)[half]

    def _check_gated(self) -> None:
        m = self._map
        if m.d_mlp is not None and not (m.has("mlp.gate") or m.has("mlp.gate_up")):
            raise ModelError(f"the MLP of {m.family} is not gated, so it has no W_gate; its weights are W_in and W_out")


class Weights:
    """The weights of a model in TransformerLens' layout: `hm.weights[3].W_Q`, `hm.weights.W_U`.

    Args:
        model: the model.
        atlas: its sites.
    """

    def __init__(self, model: nn.Module, atlas: Atlas) -> None:
        self._model = model
        self._atlas = atlas
        self._map = atlas.map

    def __getitem__(self, layer: int) -> LayerWeights:
        """Return the weights of one block.

        Raises:
            SiteError: there is no such layer.
        """
        n = self._map.n_layers
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < n:
            raise SiteError(f"weights[{layer!r}]: this model has layers 0 to {n - 1}; count from the first one")
        return LayerWeights(self._atlas, layer)

    def __len__(self) -> int:
        return self._map.n_layers

    def __iter__(self) -> Iterator[LayerWeights]:
        return (self[layer] for layer in range(len(self)))

    def __repr__(self) -> str:
        tied = "; W_E and W_U are one tensor, editing one edits both" if self.tied else ""
        return (
            f"Weights({self._map.family}, {len(self)} layers; weights[layer].W_Q, .W_E, .W_U, .norm_weights(…){tied})"
        )

    @property
    def tied(self) -> bool:
        """Whether `W_U` is `W_E` transposed in memory, so that an edit of one is an edit of the other."""
        embed, unembed = (self._map.module(self._model, part) for part in ("embed", "unembed"))
        first, second = getattr(embed, "weight", None), getattr(unembed, "weight", None)
        return first is not None and second is not None and first.data_ptr() == second.data_ptr()

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """Token embedding, as stored: Gemma's √d and Granite's multiplier are not in it."""
        return self._table("embed")

    @property
    def W_pos(self) -> Float[Tensor, "n_ctx d_model"]:
        """Learned position embedding; row p is that of position p (OPT's two rows before them are left out)."""
        if not self._map.has("pos_embed"):
            raise ModelError(f"{self._map.family} learns no position embedding (rotary or ALiBi), so it has no W_pos")
        module = self._map.module(self._model, "pos_embed")
        return self._table("pos_embed")[int(getattr(module, "offset", 0)) :]

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """Unembedding; without soft-cap and logit scale."""
        module, path = self._module("unembed")
        readable(module, path)
        return self._check_width(linear_weight(module).detach(), 0, path)

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """Bias of the unembedding; zeros where there is none."""
        module, path = self._module("unembed")
        weight, bias = readable(module, path), getattr(module, "bias", None)
        return bias.detach() if isinstance(bias, Tensor) else weight.new_zeros(weight.shape[0])

    def stack(self, name: str) -> Float[Tensor, "layer *shape"]:
        """Return one kind of weight from every block, copied: `stack("W_Q")` is [layer n_heads d_model d_head].

        Raises:
            ModelError: a block lacks it, or the name is none of a block's weights.
        """
        known = [k for k in vars(LayerWeights) if k.startswith(("W_", "b_"))]
        if name not in known:
            raise ModelError(f"a block has no {name!r}; {nearest(name, known) or 'it has ' + ', '.join(known)}")
        return torch.stack([getattr(self[layer], name) for layer in range(len(self))])

    def OV(self, layer: int, head: int) -> Factored:
        """Return the OV circuit W_V W_O of a head, [d_model d_model] as factors: what it writes per unit it reads.

        Args:
            layer: the block.
            head: query head; its key/value head is head // (n_heads // n_kv_heads).

        Raises:
            SiteError, WhereError: there is no such layer or head.

        Source: Elhage et al. (2021), "A Mathematical Framework for Transformer Circuits". Departure: biases and norm
        gains are left out; take `hm.folded().weights` to have the gains in.
        """
        block = self[layer]
        return Factored(block.W_V[self._group(head)], block.W_O[head])

    def QK(self, layer: int, head: int) -> Factored:
        """Return the QK circuit W_Q W_Kᵀ of a head, [d_model d_model] as factors: query's stream × key's stream.

        Args:
            layer: the block.
            head: query head; its key/value head is head // (n_heads // n_kv_heads).

        Raises:
            SiteError, WhereError: there is no such layer or head.

        Source: Elhage et al. (2021). Departures: biases, norm gains, 1/√d_head, rotary and q/k-norms are left out; with
        rotary it is the circuit at distance 0.
        """
        block = self[layer]
        kv = self._group(head)
        return Factored(block.W_Q[head], block.W_K[kv].T)

    def norm_weights(self, layer: int | None, part: str) -> NormWeights:
        """Return the parameters of a norm.

        Args:
            layer: the block; None for "ln_final".
            part: "ln1", "ln2", "ln1_post", "ln2_post", "q_norm", "k_norm" or "ln_final".

        Raises:
            ModelError: the block has no such norm, or it follows no known formula.
        """
        if part not in _NORM_PLACES:
            raise ModelError(f"{part!r} is no norm; expected one of {', '.join(_NORM_PLACES)}")
        if part != "ln_final":
            self[layer]  # type: ignore[index]  # says which layers there are
        name = f"attn.{part}" if _NORM_PLACES[part] == "head" else part
        module, path = self._module(name, None if part == "ln_final" else layer)
        spec = self._atlas.norm(name, None if part == "ln_final" else layer)
        weight = getattr(module, "weight", None)
        like = readable(module, path) if isinstance(weight, Tensor) else torch.ones(spec.dim, device=self.W_E.device)
        gain, bias = spec.gain(module), spec.bias(module)
        return NormWeights(
            kind=spec.kind,
            eps=spec.eps,
            gain=(torch.ones_like(like) if gain is None else gain).detach(),
            bias=(torch.zeros_like(like) if bias is None else bias).detach(),
            place=_NORM_PLACES[part],
        )

    def _group(self, head: int) -> int:
        m = self._map
        if isinstance(head, bool) or not isinstance(head, int) or not 0 <= head < m.n_heads:
            raise WhereError(f"head {head!r}: this model has query heads 0 to {m.n_heads - 1}")
        return head // (m.n_heads // m.n_kv_heads)

    def _module(self, part: str, layer: int | None = None) -> tuple[nn.Module, str]:
        path = self._map.path(part, layer)
        module = self._map.module(self._model, part, layer)
        if module is None:
            raise ModelError(f"this {self._map.family} model has no {part!r} at {path!r}")
        return module, path

    def _table(self, part: str) -> Float[Tensor, "rows d_model"]:
        module, path = self._module(part)
        return self._check_width(readable(module, path).detach(), 1, path)

    def _check_width(self, x: Tensor, axis: int, path: str) -> Tensor:
        if x.shape[axis] != self._map.d_model:
            raise ModelError(
                f"{path!r} is {tuple(x.shape)} wide, not d_model {self._map.d_model}: a projection lies between it and "
                "the residual stream; take it from hm.model"
            )
        return x


def readable(module: nn.Module, path: str) -> Float[Tensor, "*shape"]:
    """Return a module's `weight` parameter as it is, if it holds plain numbers that are the whole truth.

    Args:
        module: the module.
        path: its path, for the message.

    Raises:
        ModelError: it has no weight, is quantised, lies on the meta device, or carries an adapter that is not merged.
    """
    if hasattr(module, "base_layer") and not getattr(module, "merged", False):
        raise ModelError(f"{path!r} carries an adapter ({type(module).__name__}); merge it first (merge_and_unload())")
    weight: Any = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise ModelError(f"{path!r} ({type(module).__name__}) has no weight tensor (quantised?); load it unquantised")
    if weight.device.type == "meta":
        raise ModelError(f"{path!r} is on the meta device: it was not loaded, or is offloaded; load it into memory")
    plain = type(weight) in (Tensor, nn.Parameter)
    if not plain or not weight.is_floating_point() or weight.element_size() < 2:
        raise ModelError(
            f"{path!r} ({type(module).__name__}) holds {weight.dtype} {tuple(weight.shape)} ({type(weight).__name__}), "
            "not plain floating-point numbers (quantised?); load the model unquantised"
        )
    return weight


def _cut(x: Float[Tensor, "rows *d_in"], rows: Int[Tensor, " n"], d_head: int) -> Float[Tensor, "heads *d_in d_head"]:
    """Cut rows into heads, the head's rows last: a view wherever the heads lie at even distances."""
    starts = rows[::d_head]
    first = int(starts[0])
    step = int(starts[1]) - first if len(starts) > 1 else d_head
    if not torch.equal(starts, first + step * torch.arange(len(starts))):
        return x[rows.to(x.device)].unflatten(0, (-1, d_head)).movedim(1, -1)
    return x[first:].unfold(0, d_head, step)[: len(starts)]
