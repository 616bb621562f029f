"""The plain model under hand-made hooks: an oracle that goes neither through the library nor through TransformerLens.

For every family a `Layout`, written by hand from the model's source, names the modules whose inputs and outputs are the
sites of a block. A fused projection is described by the columns that belong to each head, so that one rule reads,
edits and differentiates every site.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from unittest import mock

import torch
import transformers as tf
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.families import FAMILIES, make

EditFn = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Layout:
    """Where one family keeps the parts of a block; paths are relative to the block.

    Attributes:
        blocks: Path of the list of blocks.
        qkv: The three projections, or the one fused projection.
        fused: "" (three projections), "concat" (q | k | v) or "groups" (per key-value head: its queries, k, v).
        o: The projection whose input is z.
        attn_out: The module whose output is added to the residual stream after attention.
        mlp_out: The module whose output is added to the residual stream after the MLP.
        post: The projection whose input is mlp.hook_post; "" where experts have none.
        multiplier: Whether the config's residual_multiplier scales both outputs.
    """

    blocks: str
    qkv: tuple[str, ...]
    fused: str
    o: str
    attn_out: str
    mlp_out: str
    post: str
    multiplier: bool = False


def _llama(o: str = "o_proj", attn_out: str = "self_attn", mlp_out: str = "mlp", post: str = "mlp.down_proj") -> Layout:
    qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    return Layout("model.layers", qkv, "", f"self_attn.{o}", attn_out, mlp_out, post)


def _gpt2() -> Layout:
    return Layout("transformer.h", ("attn.c_attn",), "concat", "attn.c_proj", "attn", "mlp", "mlp.c_proj")


def _fused_groups(blocks: str, attn: str, attn_out: str, mlp_out: str) -> Layout:
    qkv = (f"{attn}.query_key_value",)
    return Layout(blocks, qkv, "groups", f"{attn}.dense", attn_out, mlp_out, "mlp.dense_4h_to_h")


_MOE = _llama(post="")
_SANDWICH = _llama(attn_out="post_attention_layernorm", mlp_out="post_feedforward_layernorm")
_NEOX = _fused_groups("gpt_neox.layers", "attention", "attention", "mlp")
_FALCON = _fused_groups("transformer.h", "self_attention", "self_attention", "mlp")
_NEO = tuple(f"attn.attention.{x}_proj" for x in "qkv")
_J = tuple(f"attn.{x}_proj" for x in "qkv")

LAYOUTS: dict[str, Layout] = {
    "GPT2": _gpt2(),
    "GPTNeo": Layout("transformer.h", _NEO, "", "attn.attention.out_proj", "attn", "mlp", "mlp.c_proj"),
    "GPTJ": Layout("transformer.h", _J, "", "attn.out_proj", "attn", "mlp", "mlp.fc_out"),
    "GPTNeoX": _NEOX,
    "GPTNeoXSequential": _NEOX,
    "OPT": Layout("model.decoder.layers", _llama().qkv, "", "self_attn.out_proj", "self_attn", "fc2", "fc2"),
    "Bloom": _fused_groups("transformer.h", "self_attention", "self_attention.dense", "mlp.dense_4h_to_h"),
    "Falcon": _FALCON,
    "FalconNew": _FALCON,
    "Llama": _llama(),
    "Mistral": _llama(),
    "Mixtral": _MOE,
    "Qwen2": _llama(),
    "Qwen3": _llama(),
    "Gemma": _llama(),
    "Gemma2": _SANDWICH,
    "Gemma3": _SANDWICH,
    "Gemma3Multimodal": replace(_SANDWICH, blocks="model.language_model.layers"),
    "Phi": _llama(o="dense", post="mlp.fc2"),
    "Phi3": replace(_llama(), qkv=("self_attn.qkv_proj",), fused="concat"),
    "Olmo": _llama(),
    "Olmo2": _SANDWICH,
    "Granite": replace(_llama(), multiplier=True),
    "StableLm": _llama(),
    "Starcoder2": _llama(post="mlp.c_proj"),
    "Cohere": _llama(),
    "Qwen2Moe": _MOE,
    "GPTBigCode": _gpt2(),
    "GptOss": _MOE,
}


class Point(NamedTuple):
    """One site of one layer: the input or output of a module, some of its columns, times a scale."""

    path: str
    side: str
    columns: Tensor | None = None
    scale: float = 1.0


class Heads(NamedTuple):
    """Query heads, key-value heads and the width of a head."""

    n: int
    kv: int
    d: int


def heads_of(name: str) -> Heads:
    """Head counts of a family, read off its config by hand."""
    config = FAMILIES[name]()
    config = getattr(config, "text_config", config)
    n = config.num_attention_heads
    d = getattr(config, "head_dim", None) or config.hidden_size // n
    kv = getattr(config, "num_key_value_heads", None) or n
    if name == "FalconNew":
        kv = config.num_kv_heads
    if name in ("Falcon", "GPTBigCode"):
        kv = 1
    return Heads(n, kv, d)


def _fused_columns(layout: Layout, heads: Heads) -> dict[str, Tensor]:
    n, kv, d = heads
    if layout.fused == "concat":
        q, k, v = torch.arange((n + 2 * kv) * d).split([n * d, kv * d, kv * d])
        return {"q": q.view(n, d), "k": k.view(kv, d), "v": v.view(kv, d)}
    grid = torch.arange((n + 2 * kv) * d).view(kv, n // kv + 2, d)
    return {"q": grid[:, :-2].reshape(n, d), "k": grid[:, -2], "v": grid[:, -1]}


def point(name: str, kind: str, layer: int) -> Point:
    """The point of a family for a site kind, such as ("GPT2", "z", 1)."""
    layout, heads = LAYOUTS[name], heads_of(name)
    block = f"{layout.blocks}.{layer}"
    config = FAMILIES[name]()
    scale = config.residual_multiplier if layout.multiplier else 1.0
    if kind in ("q", "k", "v"):
        if layout.fused:
            return Point(f"{block}.{layout.qkv[0]}", "out", _fused_columns(layout, heads)[kind])
        count = heads.n if kind == "q" else heads.kv
        return Point(f"{block}.{layout.qkv['qkv'.index(kind)]}", "out", torch.arange(count * heads.d).view(count, -1))
    return {
        "resid_pre": Point(block, "in"),
        "resid_post": Point(block, "out"),
        "attn_out": Point(f"{block}.{layout.attn_out}", "out", scale=scale),
        "mlp_out": Point(f"{block}.{layout.mlp_out}", "out", scale=scale),
        "z": Point(f"{block}.{layout.o}", "in", torch.arange(heads.n * heads.d).view(heads.n, heads.d)),
        "mlp_post": Point(f"{block}.{layout.post}", "in"),
    }[kind]


def kinds(name: str) -> list[str]:
    """Site kinds that a family's layout covers."""
    found = ["resid_pre", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z"]
    return [*found, "mlp_post"] if LAYOUTS[name].post else found


class PlainRun(NamedTuple):
    """Logits [batch pos d_vocab], values and gradients by (kind, layer)."""

    logits: Tensor
    values: dict[tuple[str, int], Tensor]
    grads: dict[tuple[str, int], Tensor]


def model_inputs(model: PreTrainedModel, ids: Tensor, mask: Tensor | None) -> dict[str, Any]:
    """Keyword arguments of one plain forward: positions come from the mask, and neither is passed without padding."""
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if mask is not None:
        inputs["attention_mask"] = mask.long()
        if "position_ids" in inspect.signature(model.forward).parameters:
            inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return inputs


def run(
    name: str,
    model: PreTrainedModel,
    ids: Tensor,
    *,
    read: Sequence[tuple[str, int]] = (),
    write: Mapping[tuple[str, int], EditFn] | None = None,
    mask: Tensor | None = None,
    metric: Callable[[Tensor], Tensor] | None = None,
) -> PlainRun:
    """One forward of the untouched model with hand-made hooks.

    Args:
        name: The family.
        model: Its model.
        ids: Token ids [batch pos].
        read: (kind, layer) pairs to keep.
        write: An edit of the TransformerLens-shaped value by (kind, layer).
        mask: True at real tokens [batch pos]; None passes no mask.
        metric: logits -> a scalar, whose gradient by every value read is returned.
    """
    flat: dict[tuple[str, int], Tensor] = {}
    handles = []
    for key in {*read, *(write or {})}:
        edit = (write or {}).get(key)
        handles.append(_hook(model, point(name, *key), ids.shape, functools.partial(flat.__setitem__, key), edit))
    try:
        with torch.set_grad_enabled(metric is not None):
            logits = model(**model_inputs(model, ids, mask)).logits
    finally:
        for handle in handles:
            handle.remove()
    values = {key: _value(flat[key].detach(), point(name, *key)) for key in read}
    grads: dict[tuple[str, int], Tensor] = {}
    if metric is not None:
        found = torch.autograd.grad(metric(logits), [flat[key] for key in read])
        for key, grad in zip(read, found, strict=True):
            at = point(name, *key)
            grads[key] = _value(grad, at._replace(scale=1.0 / at.scale))
    return PlainRun(logits.detach(), values, grads)


def _value(flat: Tensor, at: Point) -> Tensor:
    part = flat if at.columns is None else flat[..., at.columns]
    return part.clone() if at.scale == 1.0 else part * at.scale


def _hook(
    model: PreTrainedModel, at: Point, shape: torch.Size, keep: Callable[[Tensor], None], edit: EditFn | None
) -> torch.utils.hooks.RemovableHandle:
    def visit(tensor: Tensor) -> Tensor:
        # OPT runs its MLP on [batch * pos, d]; Falcon adds into an output in place after the hook.
        flat = tensor.reshape(*shape, -1).clone()
        if edit is not None:
            new = edit(_value(flat, at)) / at.scale
            if at.columns is None:
                flat = new
            else:
                flat = flat.clone()
                flat[..., at.columns] = new
        keep(flat)
        return flat.reshape(tensor.shape).clone()

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (visit(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": visit(kwargs["hidden_states"])}

    def after(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        return (visit(out[0]), *out[1:]) if isinstance(out, tuple) else visit(out)

    module = model.get_submodule(at.path)
    if at.side == "in":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)


@functools.cache
def eager_model(name: str) -> PreTrainedModel:
    """The family's model of seed 0 under its own eager attention."""
    model = tf.AutoModelForCausalLM.from_config(FAMILIES[name](), attn_implementation="eager", dtype=torch.float32)
    model.load_state_dict(make(name).state_dict())
    return model.eval()


def eager_attentions(name: str, ids: Tensor, mask: Tensor | None = None) -> list[Tensor]:
    """Patterns [batch head query key] by layer, as the model's own eager attention gives them."""
    model = eager_model(name)
    with torch.no_grad():
        return list(model(**model_inputs(model, ids, mask), output_attentions=True).attentions)


def run_patched(name: str, ids: Tensor, layer: int, edit: Callable[[list[Tensor]], list[Tensor]]) -> Tensor:
    """Logits of the eager model with (module, q, k, v) of one layer edited inside its own attention function.

    Args:
        name: The family.
        ids: Token ids [batch pos].
        layer: Which layer.
        edit: Takes and returns the list [module, query, key, value, …], tensors of shape [batch head pos d_head].

    Returns:
        Logits [batch pos d_vocab].
    """
    model = eager_model(name)
    attention = model.get_submodule(f"{LAYOUTS[name].blocks}.{layer}.{LAYOUTS[name].o.rsplit('.', 1)[0]}")
    home = sys.modules[type(attention).__module__]
    original = vars(home)["eager_attention_forward"]

    def patched(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if module is not attention:
            return original(module, *args, **kwargs)
        return original(*edit([module, *args]), **kwargs)

    with mock.patch.object(home, "eager_attention_forward", patched), torch.no_grad():
        return model(ids, use_cache=False).logits
