"""TransformerLens, the only place that imports it: its architecture adapters are the map, its bridge an exit.

Names used here exist in TransformerLens 3.9 and 4.x.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from interp.core.errors import ModelError
from interp.core.modelmap import ModelMap

__all__ = ["map_of", "to_transformer_lens"]

# Post-norms that TransformerLens' map calls ln1 and ln2 (OLMo 2 and its kin normalise only what a sublayer puts out).
_POST_NORM_PATHS = ("post_attention_layernorm", "post_feedforward_layernorm")
_ADDED_INSIDE = {"bloom"}  # the attention and MLP modules of these families already add the residual
_GROUPED_QKV = {"gpt_neox": "per_head", "bloom": "per_head"}
_INSIDE = {"gpt_neo", "gptj", "bloom", "codegen", "mpt", "falcon"}  # attention without transformers' interface
_ROTATED_INSIDE = {"gptj", "codegen"}  # and whose rotated queries and keys nothing of torch's names
_ROUTERS = {"gpt_oss": "router"}  # mixtures whose router TransformerLens' map leaves out
_QK_NORM_HEADS_FIRST = {"gemma3_text": True, "stablelm": True, "qwen3": False, "qwen3_moe": False}
_NOT_ROTARY = {"gpt2", "gpt_neo", "opt", "bloom", "gpt_bigcode", "mpt"}


def _adapter(config: Any, architecture: str) -> Any:
    """TransformerLens' adapter for a Hugging Face config; nothing of the user's objects is changed."""
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf
    from transformer_lens.model_bridge.sources.transformers import determine_architecture_from_hf_config

    config = copy.deepcopy(config)
    config.architectures = [architecture]
    try:
        name = determine_architecture_from_hf_config(config)
        return ArchitectureAdapterFactory.select_architecture_adapter(
            build_bridge_config_from_hf(config, name, architecture, torch.float32)
        )
    except Exception as err:
        raise ModelError(
            f"TransformerLens has no map for {architecture} ({type(err).__name__}: {str(err)[:200]}); "
            "give your own with load(model, tokenizer, map=interp.ModelMap(…))"
        ) from err


def _walk(components: Any, prefix: str = "") -> Iterator[tuple[str, str | None, Any]]:
    for name, component in components.items():
        yield prefix + name, getattr(component, "name", None), component
        yield from _walk(getattr(component, "submodules", None) or {}, f"{prefix}{name}.")


def _paths(adapter: Any, model: nn.Module) -> dict[str, str]:
    """Part → path template, for the parts that exist in the model."""
    mapping = dict(_walk_paths(adapter))
    blocks = mapping.pop("blocks", None)
    if blocks is None:
        raise ModelError(f"TransformerLens' map of {type(model).__name__} has no blocks; give load(…, map=ModelMap(…))")
    paths = {}
    for part, path in mapping.items():
        if part.startswith("blocks."):
            part, path = part.removeprefix("blocks."), f"{blocks}.{{layer}}.{path}"
        if _anywhere(model, path, blocks):
            paths[part] = path
    paths["block"] = f"{blocks}.{{layer}}"
    return paths


def _walk_paths(adapter: Any) -> Iterator[tuple[str, str]]:
    """Part → path, that of a block's part relative to its block."""
    known: dict[str, str] = {}
    for part, name, _ in _walk(adapter.component_mapping):
        parent = part.rpartition(".")[0]
        if part == "blocks" or "." not in part:
            known[part] = str(name)
        else:
            above = known.get(parent, "") if parent != "blocks" else ""
            known[part] = ".".join(p for p in (above, None if name is None else str(name)) if p)
        yield part, known[part]


def _anywhere(model: nn.Module, template: str, blocks: str) -> bool:
    """Whether the path exists, in at least one block."""
    layers = range(len(model.get_submodule(blocks))) if "{layer}" in template else (0,)  # type: ignore[arg-type]
    for layer in layers:
        path = template.format(layer=layer)
        if path.endswith("."):
            continue
        try:
            model.get_submodule(path)
            return True
        except AttributeError:
            continue
    return False


def map_of(model: nn.Module) -> ModelMap:
    """Return the map of a Hugging Face causal LM; the model may be on the meta device.

    Raises:
        ModelError: TransformerLens has no adapter for the architecture, or the model is no decoder.
    """
    adapter = _adapter(model.config, type(model).__name__)
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    paths = _paths(adapter, model)
    family = config.model_type
    block_class = type(adapter.component_mapping["blocks"]).__name__
    paths = _renamed(paths, family)
    parallel = _is_parallel(config, family, block_class)
    first = {part: model.get_submodule(path.format(layer=_first_layer(model, path))) for part, path in paths.items()}
    n_heads = _attribute(config, "num_attention_heads", "n_head", "num_heads")
    n_kv_heads = _n_kv_heads(config, family, n_heads)
    d_model = _attribute(config, "hidden_size", "n_embd", "d_model")
    d_head = _in_features(first["attn.o"]) // n_heads if "attn.o" in first else d_model // n_heads
    attn_out, mlp_out = _added_parts(paths, family)
    return ModelMap(
        family=family,
        n_layers=len(model.get_submodule(paths["block"].removesuffix(".{layer}"))),  # type: ignore[arg-type]
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_head=d_head,
        d_vocab=config.vocab_size,
        d_mlp=_in_features(first["mlp.out"]) if "mlp.out" in first else None,
        paths=paths,
        attn_out=attn_out,
        mlp_out=mlp_out,
        residual_multiplier=float(getattr(config, "residual_multiplier", None) or 1.0),
        parallel=parallel,
        qkv_layout=_qkv_layout(config, family) if "attn.qkv" in paths else None,
        attention="inside" if family in _INSIDE else "tap",
        rotary=_is_rotary(config, family),
        qk_norm_heads_first=_QK_NORM_HEADS_FIRST.get(family),
        reasons=_reasons(config, family, paths, parallel),
    )


def _renamed(paths: dict[str, str], family: str) -> dict[str, str]:
    """Give parts the names that this project's definitions need."""
    for part in ("ln1", "ln2"):
        post_only = f"{part}_post" not in paths and family not in ("bloom",)
        is_post = paths.get(part, "").endswith(_POST_NORM_PATHS[part == "ln2"])
        no_pre = not any(p.endswith(("input_layernorm", "pre_feedforward_layernorm")) for p in paths.values())
        if post_only and is_post and no_pre:
            paths[f"{part}_post"] = paths.pop(part)
    if "mlp.gate" in paths and paths["mlp.gate"].endswith((".gate", ".router")):
        paths["mlp.router"] = paths.pop("mlp.gate")
        paths = {p: v for p, v in paths.items() if not p.startswith("mlp.") or p == "mlp.router"}
    mlp = paths.get("mlp", paths["block"])
    if "mlp.out" not in paths and "mlp.router" not in paths and family in _ROUTERS:
        paths["mlp.router"] = f"{mlp}.{_ROUTERS[family]}"
    if family in ("phi3", "glm", "glm4") and "mlp.out" in paths:
        paths["mlp.gate_up"] = f"{mlp}.gate_up_proj"
    if paths.get("mlp") == paths["block"] or paths.get("mlp", "").endswith("."):
        del paths["mlp"]
    if "attn.qkv" in paths:
        for part in ("attn.q", "attn.k", "attn.v"):
            paths.pop(part, None)
    return paths


def _first_layer(model: nn.Module, path: str) -> int:
    if "{layer}" not in path:
        return 0
    for layer in range(len(model.get_submodule(path.split(".{layer}")[0]))):  # type: ignore[arg-type]
        try:
            model.get_submodule(path.format(layer=layer))
            return layer
        except AttributeError:
            continue
    raise ModelError(f"no block has a module at {path!r}")


def _attribute(config: Any, *names: str) -> int:
    for name in names:
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    raise ModelError(f"{type(config).__name__} has none of {', '.join(names)}; give load(…, map=interp.ModelMap(…))")


def _in_features(module: nn.Module) -> int:
    """Inputs of a Linear or of a GPT-2 Conv1D (whose weight is [in, out])."""
    features = getattr(module, "in_features", None)
    return int(features if features is not None else module.weight.shape[0])  # type: ignore[index]


def _n_kv_heads(config: Any, family: str, n_heads: int) -> int:
    if family == "falcon":
        if config.new_decoder_architecture:
            return int(config.num_kv_heads)
        return 1 if config.multi_query else n_heads
    if family == "gpt_bigcode":
        return 1 if config.multi_query else n_heads
    return int(getattr(config, "num_key_value_heads", None) or n_heads)


def _is_parallel(config: Any, family: str, block_class: str) -> bool:
    if family == "falcon":
        return bool(config.new_decoder_architecture or config.parallel_attn)
    declared = getattr(config, "use_parallel_residual", None)
    return bool(declared) if declared is not None else "Parallel" in block_class


def _qkv_layout(config: Any, family: str) -> str:
    if family == "falcon":
        if config.new_decoder_architecture:
            return "grouped"
        return "concat" if config.multi_query else "per_head"
    if family == "gpt_bigcode":
        return "concat" if config.multi_query else "per_head"
    return _GROUPED_QKV.get(family, "concat")


def _is_rotary(config: Any, family: str) -> bool:
    return family not in _NOT_ROTARY and not (family == "falcon" and bool(getattr(config, "alibi", False)))


def _added_parts(paths: dict[str, str], family: str) -> tuple[str, str]:
    if family in _ADDED_INSIDE:
        return "attn.o", "mlp.out"
    attn = "ln1_post" if "ln1_post" in paths else "attn"
    mlp = "ln2_post" if "ln2_post" in paths else "mlp" if "mlp" in paths else "mlp.out"
    return attn, mlp


def _reasons(config: Any, family: str, paths: dict[str, str], parallel: bool) -> dict[str, str]:
    """Why sites are absent, in the words of the error."""
    reasons: dict[str, str] = {}
    if parallel:
        reasons["resid_mid"] = "its attention and MLP run in parallel on resid_pre, so there is no stream between them"
    if "ln2" not in paths and parallel:
        reasons["ln2"] = reasons["mlp_in"] = "its MLP reads attention's norm; use ln1 or resid_pre"
    if "ln1" not in paths and "ln1_post" in paths:
        reasons["ln1"] = "it has no norm before attention; the norm on attention's output is ln1_post"
        reasons["ln2"] = "it has no norm before the MLP; the norm on the MLP's output is ln2_post"
    if "mlp.out" not in paths:
        why = "its MLP is a mixture of experts whose weights are 3-D parameters, not modules that hooks can reach"
        reasons.update(dict.fromkeys(("mlp_pre", "mlp_pre_linear", "mlp_post"), why))
    if not _is_rotary(config, family):
        reasons["rot_q"] = reasons["rot_k"] = "it does not rotate queries and keys; use q and k"
    if family in _ROTATED_INSIDE:
        reasons["rot_q"] = reasons["rot_k"] = "it rotates and multiplies them inside its attention module; use q and k"
    if getattr(config, "do_layer_norm_before", True) is False:
        why = "its norms sit on the residual stream itself (do_layer_norm_before=False)"
        reasons.update(dict.fromkeys(("ln1", "ln2", "attn_in", "mlp_in", "resid_mid"), why))
    if "mlp.gate" not in paths and "mlp.gate_up" not in paths:
        reasons.setdefault("mlp_pre_linear", "its MLP is not gated; use mlp_pre")
    if "mlp" not in paths:
        reasons["mlp.in"] = "its MLP is no module of its own; use ln2.out"
    return reasons


def to_transformer_lens(model: nn.Module, tokenizer: Any) -> Any:
    """Return a `TransformerBridge` over a copy of the model that shares its tensors; the model itself stays as it is.

    Raises:
        ModelError: TransformerLens has no adapter for the architecture.
    """
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    _adapter(model.config, type(model).__name__)
    shared: dict[int, Any] = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    twin = copy.deepcopy(model, shared)
    config: Any = twin.config
    config.architectures = [type(model).__name__]
    if tokenizer is not None:
        # TransformerLens reads these of a tokenizer that was loaded from disk; one made in memory lacks them.
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.init_kwargs.setdefault("name_or_path", "")
        tokenizer.init_kwargs.setdefault("add_bos_token", True)
    return build_bridge_from_module(
        twin,
        type(model).__name__,
        hf_config=config,
        tokenizer=tokenizer,
        dtype=next(model.parameters()).dtype,
        device=str(next(model.parameters()).device),
        model_name=str(getattr(config, "_name_or_path", "") or type(model).__name__),
    )
