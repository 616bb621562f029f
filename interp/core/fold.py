"""A copy of a model with norms folded into the weights that read them, and weights centred: the same predictions.

Source: TransformerLens' weight processing (`fold_ln`, `center_writing_weights`, `center_unembed`, `fold_value_biases`),
and the algebra behind it: LayerNorm's gain and bias are linear, and what it centres may be centred before. Departures:
the result is the same Hugging Face class, whose norms are at gain 1; norms on a sublayer's output stay as they are;
a gate that reads a LayerNorm is centred like its other readers; a result whose predictions differ is refused.
"""

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.core.attention import CURRENT
from interp.core.errors import ModelError
from interp.core.modelmap import ModelMap
from interp.core.passes import Caller
from interp.core.points import Atlas
from interp.core.views import linear_weight
from interp.core.weights import Weights, readable

__all__ = ["fold", "untie"]

_MLP_READERS = ("mlp.in", "mlp.gate", "mlp.gate_up")
_EXPERT_READERS = {"gate_proj", "up_proj", "gate_up_proj", "shared_expert_gate"}
_EXPERT_OTHERS = {"down_proj", "gate_up_proj_bias", "down_proj_bias"}


@torch.no_grad()
def fold(model: nn.Module, atlas: Atlas) -> tuple[nn.Module, list[str]]:
    """Return a copy of a model whose norms have no gain or bias and whose weights are centred where that is free.

    Norms before a sublayer and before the unembedding are folded into what reads them. Where every such norm is a
    LayerNorm, weights that write to the residual stream, and those that read a norm, are centred over d_model, so that
    the stream has mean 0. Value biases go into the output bias. The unembedding is centred over the vocabulary, unless
    the logits are soft-capped. Embedding and unembedding are untied first. Memory: a second copy of the weights.

    Args:
        model: a model with plain floating-point weights, in eval mode; it is left as it is.
        atlas: its sites.

    Returns:
        The copy, with log-probabilities equal to the model's up to rounding (this is checked on sixteen random
        tokens), and notes of what was done.

    Raises:
        ModelError: quantised or offloaded weights, a reader of a norm that is not known, or norms on the stream itself.
    """
    if model.training:
        raise ModelError("the model is in train mode; call hm.model.eval() before folding")
    _refuse_norms_on_the_stream(atlas)
    twin = copy.deepcopy(model)
    folding = _Folding(twin, atlas)
    folding.untie()
    for layer in range(atlas.map.n_layers):
        folding.fold_block(layer)
    folding.fold_end()
    folding.center_writing()
    folding.fold_value_biases()
    folding.center_unembedding()
    folding.describe()
    _check_same(model, twin, atlas)
    return twin, folding.notes


class _Folding:
    """The work on the copy; formulas of the norms come from the original's atlas."""

    def __init__(self, twin: nn.Module, atlas: Atlas) -> None:
        self.twin = twin
        self.atlas = atlas
        self.map = atlas.map
        self.notes: list[str] = []
        self.folded: set[str] = set()
        self.new_biases: list[str] = []
        m = self.map
        self.norms = [
            (part, layer)
            for part in ("ln1", "ln2", "ln_final")
            for layer in (range(m.n_layers) if part != "ln_final" else (None,))
            if m.module(twin, part, layer) is not None
        ]
        self.all_centred = all(atlas.norm(*norm).centred for norm in self.norms)

    def module(self, part: str, layer: int | None = None) -> nn.Module | None:
        return self.map.module(self.twin, part, layer)

    def untie(self) -> None:
        if untie(self.twin, self.map):
            self.notes.append("W_E and W_U were one tensor in this model; in the copy they are two")

    # -- norms --------------------------------------------------------------------------------------------------

    def fold_block(self, layer: int) -> None:
        m = self.map
        attention = ["attn.qkv"] if m.qkv_layout is not None else ["attn.q", "attn.k", "attn.v"]
        mlp = [part for part in _MLP_READERS if self.module(part, layer) is not None]
        shared = m.parallel and self.module("ln2", layer) is None
        for norm, readers in (("ln1", attention + (mlp if shared else [])), ("ln2", mlp)):
            found = self._parameters(norm, layer)
            if found is None:
                continue
            for part in readers:
                self._into(part, layer, *found)
            if norm == "ln2" and not mlp:
                self._into_experts(layer, *found)

    def fold_end(self) -> None:
        found = self._parameters("ln_final", None)
        if found is not None:
            self._into("unembed", None, *found)

    def _parameters(self, part: str, layer: int | None) -> tuple[Tensor, Tensor, bool] | None:
        """A norm's gain, bias and whether it centres; in the copy they become 1 and 0. None where there is no norm."""
        module: Any = self.module(part, layer)
        if module is None:
            return None
        self.folded.add(part)
        norm = self.atlas.norm(part, layer)
        gain, bias = norm.gain(module), norm.bias(module)
        like = next(self.twin.parameters())
        wide = _wide(like.device if gain is None else gain.device)
        size = (norm.dim,)
        kept = (
            torch.ones(size, **wide) if gain is None else gain.to(**wide, copy=True),
            torch.zeros(size, **wide) if bias is None else bias.to(**wide, copy=True),
            norm.centred,
        )
        if gain is not None:
            module.weight.fill_(0.0 if norm.plus_one else 1.0)
        if bias is not None:
            bias.zero_()
        return kept

    def _into(self, part: str, layer: int | None, gain: Tensor, bias: Tensor, centred: bool) -> None:
        module = self.module(part, layer)
        if module is None:
            near = "" if layer is None else f"block {layer} of "
            raise ModelError(f"{near}{self.map.family} has a norm but no {part!r} that reads it; it cannot be folded")
        path = self.map.path(part, layer)
        readable(module, path)
        weight = linear_weight(module)
        old = weight.to(**_wide(weight.device))
        gain, bias = gain.to(weight.device), bias.to(weight.device)
        if bool(bias.any()):
            self._add_bias(module, path, bias @ old)
        new = gain[:, None] * old
        weight.copy_(new - new.mean(0) if centred else new)

    def _add_bias(self, module: nn.Module, path: str, extra: Float[Tensor, " d_out"]) -> None:
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor):
            bias.copy_(bias.to(extra) + extra)
        elif isinstance(module, nn.Linear):
            module.bias = nn.Parameter(extra.to(module.weight.dtype), requires_grad=module.weight.requires_grad)
            self.new_biases.append(path)
        else:
            raise ModelError(
                f"{path!r} ({type(module).__name__}) has no bias, and the norm's bias would have to go into one; "
                "this model cannot be folded"
            )

    def _into_experts(self, layer: int, gain: Tensor, bias: Tensor, centred: bool) -> None:
        """A mixture of experts: router, experts' 3-D parameters, shared experts."""
        mlp = self.module("mlp", layer)
        router = self.module("mlp.router", layer)
        if mlp is None or router is None or centred or bool(bias.any()):
            raise ModelError(
                f"block {layer} of {self.map.family}: which weights read ln2 is not known, so it cannot be folded"
            )
        for path, parameter in mlp.named_parameters():
            owner = mlp.get_submodule(path.rpartition(".")[0])
            name = [p for p in path.split(".") if p not in ("weight", "bias")][-1]
            reads = owner is router or name in _EXPERT_READERS
            if not reads and name not in _EXPERT_OTHERS:
                raise ModelError(
                    f"block {layer} of {self.map.family}: whether {path!r} reads ln2 is not known; it cannot be folded"
                )
            if not reads or parameter.ndim < 2:
                continue
            if not parameter.is_floating_point() or parameter.element_size() < 2 or parameter.device.type == "meta":
                raise ModelError(
                    f"block {layer}: {path!r} is {parameter.dtype} on {parameter.device}; load it unquantised"
                )
            axis = 1 if parameter.ndim == 3 and getattr(owner, "is_transposed", False) else parameter.ndim - 1
            shape = [1] * parameter.ndim
            shape[axis] = -1
            factor = gain.to(parameter.device)
            parameter.copy_(parameter.to(factor.dtype) * factor.view(shape))

    # -- centring -----------------------------------------------------------------------------------------------

    def center_writing(self) -> None:
        m = self.map
        post = m.has("ln1_post") or m.has("ln2_post")
        if not self.all_centred or not self.norms or post or m.d_mlp is None:
            self.notes.append(
                "weights that write to the residual stream are as they were: not every norm is a LayerNorm"
            )
            return
        for layer in range(m.n_layers):
            for part in ("attn.o", "mlp.out"):
                module: Any = self.module(part, layer)
                if module is None:
                    raise ModelError(f"block {layer} of {m.family} has no {part!r}; what it writes cannot be centred")
                readable(module, m.path(part, layer))
                _center(linear_weight(module), 1)
                if isinstance(module.bias, Tensor):
                    _center(module.bias, 0)
        if m.has("embed_ln"):
            self.notes.append("embeddings are not centred: a norm with a gain of its own follows them")
        else:
            for part in ("embed", "pos_embed"):
                table: Any = self.module(part)
                if table is not None:
                    _center(table.weight, 1)
        self.notes.append("weights that write to the residual stream are centred over d_model")

    def fold_value_biases(self) -> None:
        """b_V, weighted by a pattern whose rows sum to 1, is a constant: it moves into b_O."""
        m, weights = self.map, Weights(self.twin, Atlas(self.twin, self.map))
        for layer in range(m.n_layers):
            module = self.module("attn.o", layer)
            attention = self.module("attn", layer)
            if module is None or attention is None or not self._has_value_bias(layer):
                continue
            if any("sink" in name for name, _ in attention.named_parameters()):
                continue  # rows of the pattern sum to less than 1
            block = weights[layer]
            b_v, w_o = block.b_V, block.W_O
            wide = _wide(w_o.device)
            per_head = b_v.to(**wide).repeat_interleave(m.n_heads // m.n_kv_heads, dim=0)
            self._add_bias(module, m.path("attn.o", layer), torch.einsum("hd,hdm->m", per_head, w_o.to(**wide)))
            b_v.zero_()
            self.folded.add("b_V")

    def _has_value_bias(self, layer: int) -> bool:
        module = self.module("attn.qkv" if self.map.qkv_layout is not None else "attn.v", layer)
        return isinstance(getattr(module, "bias", None), Tensor)

    def center_unembedding(self) -> None:
        config: Any = getattr(self.twin, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        if getattr(text, "final_logit_softcapping", None):
            self.notes.append("the unembedding is not centred: logits are soft-capped, which a constant would change")
            return
        module: Any = self.module("unembed")
        readable(module, self.map.path("unembed"))
        _center(linear_weight(module), 1)
        if isinstance(getattr(module, "bias", None), Tensor):
            _center(module.bias, 0)
        self.notes.append(
            "the unembedding is centred over the vocabulary: logits are shifted, log-probabilities are not"
        )

    def describe(self) -> None:
        """Add the notes that sum up the whole."""
        norms = [part for part in ("ln1", "ln2", "ln_final") if part in self.folded]
        if norms:
            self.notes.append(f"{', '.join(norms)}: gain and bias folded into the weights that read them")
        left = [part for part in ("ln1_post", "ln2_post", "embed_ln", "attn.q_norm") if self.map.has(part)]
        if left:
            self.notes.append(f"not folded: {', '.join(left)}")
        if "b_V" in self.folded:
            self.notes.append("value biases folded into the output bias")
        if self.new_biases:
            kinds = ", ".join(sorted({path.rpartition(".")[2] for path in self.new_biases}))
            self.notes.append(
                f"biases were added ({kinds}): save_pretrained writes them, from_pretrained would drop them"
            )
        dtype = next(self.twin.parameters()).dtype
        if dtype in (torch.float16, torch.bfloat16):
            self.notes.append(f"folded weights are rounded to {dtype}; load the model in float32 for exact ones")


def untie(model: nn.Module, modelmap: ModelMap) -> bool:
    """Give a model whose embedding and unembedding are one tensor two of them, in place; return whether they were one.

    Args:
        model: the model, or a copy that may be changed.
        modelmap: its map.
    """
    embed: Any = modelmap.module(model, "embed")
    unembed: Any = modelmap.module(model, "unembed")
    if getattr(embed, "weight", None) is not getattr(unembed, "weight", 0):
        return False
    unembed.weight = nn.Parameter(unembed.weight.detach().clone(), requires_grad=unembed.weight.requires_grad)
    config: Any = getattr(model, "config", None)
    if config is not None:
        config.tie_word_embeddings = False
        config.get_text_config().tie_word_embeddings = False
    known: Any = getattr(model, "all_tied_weights_keys", {})
    known.pop(f"{modelmap.path('unembed')}.weight", None)  # else transformers may tie them again
    return True


def _wide(device: torch.device) -> dict[str, Any]:
    """Where and in which dtype to compute: double precision, where the device has it."""
    return {"device": device, "dtype": torch.float32 if device.type == "mps" else torch.float64}


def _center(x: Tensor, axis: int) -> None:
    """Take the mean along an axis off, in place."""
    wide = x.to(**_wide(x.device))
    x.copy_(wide - wide.mean(axis, keepdim=True))


def _refuse_norms_on_the_stream(atlas: Atlas) -> None:
    m = atlas.map
    if "ln1" in m.paths and ("ln1" in m.reasons or "attn_in" in m.reasons) and not m.parallel:
        why = m.reasons.get("ln1") or m.reasons.get("attn_in")
        raise ModelError(f"{m.family} cannot be folded: {why}, so what they add reaches more than one reader")


def _check_same(model: nn.Module, twin: nn.Module, atlas: Atlas) -> None:
    """Refuse a copy that predicts something else: a norm had a reader that is not in the map."""
    generator = torch.Generator().manual_seed(0)
    device = next((atlas.map.module(model, "embed") or model).parameters()).device
    ids = torch.randint(0, atlas.map.d_vocab, (2, 8), generator=generator).to(device)
    token = CURRENT.set(None)  # no hooks of a run that is under way
    try:
        outputs = [Caller(m)(ids, mask=None, position_ids=None, keep=None) for m in (model, twin)]
    finally:
        CURRENT.reset(token)
    old, new = (getattr(o, "logits", o).float().log_softmax(-1) for o in outputs)
    half = next(twin.parameters()).dtype in (torch.float16, torch.bfloat16)
    off = float((old - new).abs().mean() if half else (old - new).abs().max())
    if not off <= (0.3 if half else 1e-2):
        raise ModelError(
            f"{atlas.map.family} cannot be folded: the copy's log-probabilities are off by {off:.1e}: something "
            "that is not in the model's map reads a norm; use the raw model"
        )
