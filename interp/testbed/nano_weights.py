"""Nano models from and to weights under TransformerLens' names: `blocks.0.attn.W_Q`, `embed.W_E`, `unembed.W_U`, …"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from interp.core.errors import ArtifactError, ConfigError, nearest
from interp.testbed.nano_options import ACTIVATIONS, NanoOptions

if TYPE_CHECKING:
    from interp.testbed.nano_model import NanoForCausalLM

__all__ = ["from_transformer_lens", "to_transformer_lens_cfg", "to_transformer_lens_names"]

_SAME = ("n_layers", "d_model", "n_heads", "d_head", "n_ctx", "d_vocab")
_NORMS = {None: ("none", True), "LN": ("layer", True), "LNPre": ("layer", False)}
_NORMS |= {"RMS": ("rms", True), "RMSPre": ("rms", False)}
_POSITIONS = {"standard": "learned", "shortformer": "shortformer", "rotary": "rotary", "none": "none"}
# Settings of TransformerLens that change what is computed, and the values of theirs that change nothing.
_ONLY: dict[str, tuple[Any, ...]] = {
    "attention_dir": ("causal",),
    "attn_scores_soft_cap": (-1, 0, None),
    "clip_qkv": (None,),
    "final_rms": (False,),
    "num_experts": (None, 0),
    "output_logits_soft_cap": (-1, 0, None),
    "parallel_attn_mlp": (False,),
    "post_embedding_ln": (False,),
    "rotary_adjacent_pairs": (False,),
    "rotary_scaling_factor": (1, None),
    "scale_attn_by_inverse_layer_idx": (False,),
    "use_NTK_by_parts_rope": (False,),
    "use_attention_sinks": (False,),
    "use_dynamic_ntk_rope": (False,),
    "use_local_attn": (False,),
    "use_logn_attn": (False,),
    "use_normalization_before_and_after": (False,),
    "use_qk_norm": (False,),
    "use_yarn_rope": (False,),
}
# Buffers that TransformerLens saves beside the weights.
_BUFFERS = ("attn.mask", "attn.IGNORE", "attn.rotary_sin", "attn.rotary_cos")


class _Name(NamedTuple):
    """One parameter: here, there, and how to turn one into the other."""

    ours: str
    theirs: str
    there: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]


def from_transformer_lens(
    source: "str | Path | Mapping[str, Tensor]", cfg: Mapping[str, Any] | None = None
) -> "NanoForCausalLM":
    """Make a nano model of weights under TransformerLens' names.

    Args:
        source: a folder with cfg.json and model.safetensors, or the weights by name: `blocks.{l}.attn.W_Q`
            [n_heads d_model d_head], `embed.W_E` [d_vocab d_model], … Buffers among them are passed over.
        cfg: the fields of TransformerLens' config, for weights in memory, or instead of the folder's.

    Returns:
        The model in eval mode, in the weights' dtype, on the CPU. Biases are there where the weights have any.

    Raises:
        ConfigError: the config asks for something that a nano model does not do; names it.
        ArtifactError: a file or weight is missing, unknown or of another shape; names it.

    Source: TransformerLens' parameter names and `HookedTransformerConfig`. Departure: what a gated MLP there adds after
    its product (`b_in`) is moved into `b_out`, which is the same function.
    """
    state, found = _read(source, cfg)
    options = _options(found, state)
    return _filled(options, state)


def to_transformer_lens_names(model: "NanoForCausalLM") -> dict[str, Tensor]:
    """Return the weights of a nano model under TransformerLens' names and in its shapes, as detached copies.

    Args:
        model: a nano model.

    Returns:
        Name → tensor. Grouped keys and values are `_W_K`, `_W_V`, as in TransformerLens; a learned extra key and value,
        which it does not have, are `blocks.{l}.attn.sink_K` and `sink_V` [n_kv_heads d_head].
    """
    state = model.state_dict()
    tied = {"lm_head.weight": state["model.embed_tokens.weight"]}
    return {n.theirs: n.there((tied | state)[n.ours].detach()).clone() for n in _names(model.config)}


def to_transformer_lens_cfg(model: "NanoForCausalLM") -> dict[str, Any]:
    """Return the fields of TransformerLens' config that describe a nano model.

    Args:
        model: a nano model.

    Returns:
        Plain JSON values; with `to_transformer_lens_names` they make the model again. The activation of a bilinear MLP
        is "linear", which TransformerLens' own models do not offer.
    """
    c = model.config
    norm = next(name for name, kind in _NORMS.items() if kind == (c.norm, c.norm_gain or c.norm == "none"))
    cfg: dict[str, Any] = {name: getattr(c, name) for name in _SAME}
    cfg |= {"d_vocab_out": c.d_vocab_out, "attn_only": not c.d_mlp, "d_mlp": c.d_mlp or None}
    cfg |= {"act_fn": "linear" if c.mlp == "bilinear" else c.act, "gated_mlp": c.mlp != "plain"}
    cfg |= {"normalization_type": norm, "eps": c.norm_eps}
    cfg["positional_embedding_type"] = next(name for name, ours in _POSITIONS.items() if ours == c.positions)
    cfg |= {"use_attn_scale": True, "attn_scale": 1.0 / c.attention_scale}
    if c.n_kv_heads != c.n_heads:
        cfg["n_key_value_heads"] = c.n_kv_heads
    if c.positions == "rotary":
        cfg |= {"rotary_dim": c.d_head, "rotary_base": c.rotary_base, "rotary_adjacent_pairs": False}
    return cfg


# -- reading ----------------------------------------------------------------------------------------------------------


def _read(
    source: "str | Path | Mapping[str, Tensor]", cfg: Mapping[str, Any] | None
) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    if not isinstance(source, str | Path):
        if cfg is None:
            raise ConfigError("weights in memory need cfg={…}: n_layers, d_model, n_heads, d_head, n_ctx, d_vocab, …")
        return dict(source), cfg
    folder = Path(source)
    paths = [folder / "model.safetensors", *([] if cfg is not None else [folder / "cfg.json"])]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ArtifactError(
            f"{folder} has no {' and no '.join(missing)}; a folder of TransformerLens weights holds cfg.json and "
            "model.safetensors"
        )
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(paths[0])
        found = cfg if cfg is not None else json.loads(paths[1].read_text(encoding="utf-8"))
    except (SafetensorError, ValueError, OSError) as err:
        raise ArtifactError(f"{folder} cannot be read: {err}; copy it again") from err
    if not isinstance(found, Mapping):
        raise ArtifactError(f"{paths[1]} holds {type(found).__name__}, not the fields of a config; copy it again")
    return state, found


def _options(cfg: Mapping[str, Any], state: Mapping[str, Tensor]) -> NanoOptions:
    lacking = [name for name in _SAME if cfg.get(name) is None]
    if lacking:
        raise ConfigError(f"cfg lacks {', '.join(lacking)}; it has {', '.join(cfg) or 'nothing'}")
    for name, fine in _ONLY.items():
        if name in cfg and cfg[name] not in fine:
            raise ConfigError(f"cfg has {name}={cfg[name]!r}, which a nano model does not do; only {fine[0]!r}")
    if cfg.get("rotary_dim") not in (None, cfg["d_head"]) and cfg.get("positional_embedding_type") == "rotary":
        raise ConfigError(
            f"cfg turns {cfg['rotary_dim']} of d_head={cfg['d_head']} (rotary_dim); a nano model turns all"
        )
    norm, gain = _one_of(_NORMS, cfg, "normalization_type", "LN")
    d_model, scale = cfg["d_model"], float(cfg.get("attn_scale") or -1.0)
    gated, act = bool(cfg.get("gated_mlp")), cfg.get("act_fn") or "relu"
    attn_only = bool(cfg.get("attn_only"))
    if act not in ACTIVATIONS and not attn_only:
        raise ConfigError(f"act_fn={act!r} is not one of {', '.join(ACTIVATIONS)}; {nearest(act, ACTIVATIONS)}")
    out = cfg.get("d_vocab_out")
    layer = "blocks.0."
    biases = ("attn.b_Q", "attn.b_O", "mlp.b_out", "mlp.b_in")
    return NanoOptions(
        **{name: cfg[name] for name in _SAME},
        d_vocab_out=None if out in (None, -1) else out,
        n_kv_heads=cfg.get("n_key_value_heads"),
        d_mlp=0 if attn_only else cfg.get("d_mlp") or 4 * d_model,
        mlp="plain" if not gated else "bilinear" if act == "linear" else "gated",
        act="gelu" if attn_only or (gated and act == "linear") else act,
        norm=norm,
        norm_gain=gain,
        norm_eps=cfg.get("eps") or 1e-5,
        positions=_one_of(_POSITIONS, cfg, "positional_embedding_type", "standard"),
        rotary_base=float(cfg.get("rotary_base") or 10_000.0),
        bias=any(layer + name in state for name in biases),
        unembed_bias="unembed.b_U" in state,
        sink=f"{layer}attn.sink_K" in state,
        attention_scale=1.0 if cfg.get("use_attn_scale") is False else None if scale <= 0 else 1.0 / scale,
    )


def _one_of(words: Mapping[Any, Any], cfg: Mapping[str, Any], name: str, default: str) -> Any:
    value = cfg.get(name, default)
    if value not in words:
        known = ", ".join(map(str, words))
        raise ConfigError(f"cfg has {name}={value!r}, which a nano model does not do; expected one of {known}")
    return words[value]


# -- names ------------------------------------------------------------------------------------------------------------


def _names(config: Any) -> Iterator[_Name]:
    """Every parameter of a nano model."""
    yield _plain("model.embed_tokens.weight", "embed.W_E")
    if config.positions in ("learned", "shortformer"):
        yield _plain("model.embed_positions.weight", "pos_embed.W_pos")
    for layer in range(config.n_layers):
        ours, theirs = f"model.layers.{layer}.", f"blocks.{layer}."
        yield from _norm_names(config, f"{ours}input_layernorm", f"{theirs}ln1")
        yield from _attention_names(config, f"{ours}self_attn.", f"{theirs}attn.")
        if config.d_mlp:
            yield from _norm_names(config, f"{ours}post_attention_layernorm", f"{theirs}ln2")
            yield from _mlp_names(config, f"{ours}mlp.", f"{theirs}mlp.")
    yield from _norm_names(config, "model.norm", "ln_final")
    yield _turned("lm_head.weight", "unembed.W_U")
    if config.unembed_bias:
        yield _plain("lm_head.bias", "unembed.b_U")


def _attention_names(config: Any, ours: str, theirs: str) -> Iterator[_Name]:
    mark = "_" if config.n_kv_heads != config.n_heads else ""  # TransformerLens' name for ungrouped weights
    parts = (("q", config.n_heads, ""), ("k", config.n_kv_heads, mark), ("v", config.n_kv_heads, mark))
    for part, n, sign in parts:
        yield _per_head(f"{ours}{part}_proj.weight", f"{theirs}{sign}W_{part.upper()}", n)
        if config.bias:
            yield _per_head(f"{ours}{part}_proj.bias", f"{theirs}{sign}b_{part.upper()}", n)
    yield _Name(
        f"{ours}o_proj.weight",
        f"{theirs}W_O",
        lambda x: x.T.unflatten(0, (config.n_heads, -1)),
        lambda x: x.flatten(0, 1).T,
    )
    if config.bias:
        yield _plain(f"{ours}o_proj.bias", f"{theirs}b_O")
    if config.sink:
        yield _plain(f"{ours}sink_key", f"{theirs}sink_K")
        yield _plain(f"{ours}sink_value", f"{theirs}sink_V")


def _mlp_names(config: Any, ours: str, theirs: str) -> Iterator[_Name]:
    yield _turned(f"{ours}up_proj.weight", f"{theirs}W_in")
    if config.mlp != "plain":
        yield _turned(f"{ours}gate_proj.weight", f"{theirs}W_gate")
    elif config.bias:
        yield _plain(f"{ours}up_proj.bias", f"{theirs}b_in")
    yield _turned(f"{ours}down_proj.weight", f"{theirs}W_out")
    if config.bias:
        yield _plain(f"{ours}down_proj.bias", f"{theirs}b_out")


def _norm_names(config: Any, ours: str, theirs: str) -> Iterator[_Name]:
    if config.norm != "none" and config.norm_gain:
        yield _plain(f"{ours}.weight", f"{theirs}.w")
        if config.norm == "layer":
            yield _plain(f"{ours}.bias", f"{theirs}.b")


def _plain(ours: str, theirs: str) -> _Name:
    return _Name(ours, theirs, lambda x: x, lambda x: x)


def _per_head(ours: str, theirs: str, n: int) -> _Name:
    """Rows [n·d_head …] here, [n … d_head] there."""
    return _Name(
        ours,
        theirs,
        lambda x: x.unflatten(0, (n, -1)).movedim(1, -1),
        lambda x: x.movedim(-1, 1).flatten(0, 1),
    )


def _turned(ours: str, theirs: str) -> _Name:
    return _Name(ours, theirs, lambda x: x.T, lambda x: x.T)


# -- filling ----------------------------------------------------------------------------------------------------------


def _filled(options: NanoOptions, state: dict[str, Tensor]) -> "NanoForCausalLM":
    from interp.testbed.nano import nano

    model = nano(options)
    names, own = list(_names(model.config)), model.state_dict()
    _fold_gated_bias(model.config, state)
    known = {n.theirs for n in names}
    missing = [name for name in known if name not in state]
    extra = [name for name in state if name not in known and not name.endswith(_BUFFERS)]
    if missing or extra:
        parts = [f"lack {', '.join(sorted(missing))}"] if missing else []
        parts += [f"have {', '.join(sorted(extra))}, which this model has not"] if extra else []
        raise ArtifactError(f"these weights {'; they '.join(parts)}; check that cfg is theirs")
    wanted = {n.theirs: tuple(n.there(own[n.ours]).shape) for n in names}
    wrong = [
        f"{name} is {tuple(state[name].shape)}, expected {shape}"
        for name, shape in wanted.items()
        if tuple(state[name].shape) != shape
    ]
    if wrong:
        raise ArtifactError(f"weights of another shape: {'; '.join(wrong)}; check that cfg is theirs")
    model = model.to(state["embed.W_E"].dtype)
    with torch.no_grad():
        for name in names:
            model.get_parameter(name.ours).copy_(name.back(state[name.theirs]))
    return model


def _fold_gated_bias(config: Any, state: dict[str, Tensor]) -> None:
    """(act(gate) ⊙ in + b_in) W_out + b_out = (act(gate) ⊙ in) W_out + (b_in W_out + b_out)."""
    if config.mlp == "plain" or not config.d_mlp:
        return
    for layer in range(config.n_layers):
        at = f"blocks.{layer}.mlp."
        b_in, w_out, b_out = state.pop(f"{at}b_in", None), state.get(f"{at}W_out"), state.get(f"{at}b_out")
        if b_in is not None and w_out is not None and b_out is not None and b_in.shape[0] == w_out.shape[0]:
            state[f"{at}b_out"] = b_out + b_in @ w_out
