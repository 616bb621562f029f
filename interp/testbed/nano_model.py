"""The nano model: one small transformer with many switches, as a Hugging Face `PreTrainedModel`.

This file is transformers model code: its imports, its names (those of Llama's modules) and the signatures of its
forwards are those that transformers expects. `interp.testbed.nano` makes and loads these models.

The extra key k′ and value v′ (`sink`) need no extra column. With s_t = scale · q·(k_t − k′) and p the softmax of
(s_0, …, s_T, 0), the output v′ + Σ p_t (v_t − v′) is that of a softmax over one slot more, which is (k′, v′). So the
attention is given k − k′ and v − v′ and a sink of logit 0, as GPT-OSS has sinks; v′ is added afterwards.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from interp.core.modelmap import ModelMap
from interp.testbed.nano_options import NanoOptions

__all__ = [
    "NanoAttention",
    "NanoBlock",
    "NanoConfig",
    "NanoForCausalLM",
    "NanoMLP",
    "NanoModel",
    "eager_attention_forward",
]


class NanoConfig(PreTrainedConfig):
    """The settings of `NanoOptions`, resolved, under their own names and under those of transformers."""

    model_type = "interp_nano"
    keys_to_ignore_at_inference = ("past_key_values",)
    attribute_map = {  # noqa: RUF012 (transformers' own name and form)
        "vocab_size": "d_vocab",
        "max_position_embeddings": "n_ctx",
        "num_hidden_layers": "n_layers",
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "head_dim": "d_head",
        "intermediate_size": "d_mlp",
        "hidden_act": "act",
        "tie_word_embeddings": "tied",
        "initializer_range": "init_std",
    }

    def __init__(self, **settings: Any) -> None:
        settings = {self.attribute_map.get(name, name): value for name, value in settings.items()}
        own = {name: settings.pop(name) for name in NanoOptions.names() if name in settings}
        for name, value in NanoOptions(**own).resolved().items():
            setattr(self, name, value)
        settings.setdefault("use_cache", True)
        super().__init__(**settings)

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what is written to config.json: every setting, so that a changed default changes no saved model."""
        return {**super().to_diff_dict(), **{name: getattr(self, name) for name in NanoOptions.names()}}


def _linear(d_in: int, d_out: int, *, bias: bool, std: float) -> nn.Linear:
    layer = nn.Linear(d_in, d_out, bias=bias)
    layer.init_std = std  # type: ignore[assignment]  # read by _init_weights
    return layer


def _norm(config: NanoConfig) -> nn.Module:
    if config.norm == "none":
        return nn.Identity()
    kind = nn.LayerNorm if config.norm == "layer" else nn.RMSNorm
    return kind(config.d_model, eps=config.norm_eps, elementwise_affine=config.norm_gain)


def eager_attention_forward(
    module: nn.Module,
    query: Float[Tensor, "batch n_heads pos d_head"],
    key: Float[Tensor, "batch n_kv_heads src d_head"],
    value: Float[Tensor, "batch n_kv_heads src d_head"],
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    s_aux: Float[Tensor, " n_heads"] | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch pos n_heads d_head"], Float[Tensor, "batch n_heads pos src"]]:
    """Return the heads' outputs and the pattern, by the formula.

    Args:
        module: the attention module, which knows how many queries share a key.
        query, key, value: after rotary.
        attention_mask: additive, or None where everything may be seen.
        scaling: multiplies q·k.
        dropout: unused; nano models have none.
        s_aux: logit per head of a sink that takes a share of the softmax and has value 0.
        kwargs: what other kernels take.

    Returns:
        z and the pattern; rows of the pattern sum to 1, or to less where there is a sink.
    """
    groups: Any = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[2]]
    wide = scores.float()
    if s_aux is not None:
        column = s_aux.float().reshape(1, -1, 1, 1).expand(*wide.shape[:3], 1)
        wide = torch.cat([wide, column], dim=-1)
    pattern = wide.softmax(-1)[..., : key.shape[2]].to(query.dtype)
    return torch.matmul(pattern, value).transpose(1, 2).contiguous(), pattern


class NanoAttention(nn.Module):
    """Attention with grouped keys, any position scheme, and an optional learned extra key and value per head."""

    def __init__(self, config: NanoConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim: int = config.d_head
        self.num_key_value_groups: int = config.n_heads // config.n_kv_heads
        self.scaling: float = config.attention_scale
        self.is_causal = True
        d, wide, narrow = config.d_model, config.n_heads * config.d_head, config.n_kv_heads * config.d_head
        self.q_proj = _linear(d, wide, bias=config.bias, std=config.init_std)
        self.k_proj = _linear(d, narrow, bias=config.bias, std=config.init_std)
        self.v_proj = _linear(d, narrow, bias=config.bias, std=config.init_std)
        self.o_proj = _linear(wide, d, bias=config.bias, std=config.out_std)
        # The name tells `folded()` that rows of the pattern do not sum to 1.
        empty = [torch.empty(config.n_kv_heads, config.d_head) if config.sink else None for _ in range(2)]
        self.sink_key, self.sink_value = (None if x is None else nn.Parameter(x) for x in empty)

    def forward(
        self,
        hidden_states: Float[Tensor, "batch pos d_model"],
        attention_mask: Tensor | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
        position_term: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "batch pos d_model"], Tensor | None]:
        """Return what attention adds to the stream, and the pattern where the kernel gives one.

        Args:
            hidden_states: what values are read from; queries and keys too, with `position_term` added.
            attention_mask: in the form of the kernel.
            rotation: cos and sin [batch-or-1 pos d_head] of rotary positions.
            position_term: [batch-or-1 pos d_model] of shortformer positions.
            past_key_values: the cache.
            kwargs: passed to the kernel.
        """
        placed = hidden_states if position_term is None else hidden_states + position_term
        query = self._heads(self.q_proj(placed))
        key, value = self._heads(self.k_proj(placed)), self._heads(self.v_proj(hidden_states))
        if rotation is not None:
            query, key = _rotated(query, *rotation), _rotated(key, *rotation)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        extra = None
        if self.sink_key is not None and self.sink_value is not None:
            key, value = key - self.sink_key[:, None], value - self.sink_value[:, None]
            extra = self.sink_value.repeat_interleave(self.num_key_value_groups, dim=0)
            kwargs["s_aux"] = extra.new_zeros(extra.shape[0])
        kernel: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        z, pattern = kernel(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        if extra is not None:
            z = z + extra
        return self.o_proj(z.flatten(2)), pattern

    def _heads(self, x: Float[Tensor, "batch pos wide"]) -> Float[Tensor, "batch heads pos d_head"]:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def _rotated(x: Float[Tensor, "batch heads pos d_head"], cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (i, i + d_head/2) turned by the angle of their position."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


class NanoMLP(nn.Module):
    """A plain, gated or bilinear MLP."""

    def __init__(self, config: NanoConfig) -> None:
        super().__init__()
        d, d_mlp, plain = config.d_model, config.d_mlp, config.mlp == "plain"
        self.gate_proj = None if plain else _linear(d, d_mlp, bias=False, std=config.init_std)
        self.up_proj = _linear(d, d_mlp, bias=config.bias and plain, std=config.init_std)
        self.down_proj = _linear(d_mlp, d, bias=config.bias, std=config.out_std)
        self.act_fn = nn.Identity() if config.mlp == "bilinear" else ACT2FN[config.act]

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Return what the MLP adds to the stream."""
        if self.gate_proj is None:
            return self.down_proj(self.act_fn(self.up_proj(x)))
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class NanoBlock(nn.Module):
    """Attention, then the MLP if there is one; each reads the stream through a norm and adds to it."""

    def __init__(self, config: NanoConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = _norm(config)
        self.self_attn = NanoAttention(config, layer_idx)
        self.post_attention_layernorm = _norm(config) if config.d_mlp else None
        self.mlp = NanoMLP(config) if config.d_mlp else None

    def forward(
        self, hidden_states: Float[Tensor, "batch pos d_model"], **kwargs: Any
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return the residual stream after the block; `kwargs` are the attention's."""
        x = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        if self.mlp is None or self.post_attention_layernorm is None:
            return x
        return x + self.mlp(self.post_attention_layernorm(x))


class _NanoPreTrained(PreTrainedModel):
    """What transformers asks of every model class of a family."""

    config_class = NanoConfig
    base_model_prefix = "model"
    _no_split_modules = ("NanoBlock",)
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": NanoBlock, "attentions": NanoAttention}  # noqa: RUF012

    def _sdpa_can_dispatch(self, is_init_check: bool = False) -> bool:
        if self.config.sink:
            raise ValueError("SDPA knows no sinks: load a nano model with sink=True with attn_implementation='eager'")
        return bool(super()._sdpa_can_dispatch(is_init_check))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.init_std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.embed_std)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm) and module.weight is not None:
            init.ones_(module.weight)
            if isinstance(module, nn.LayerNorm):
                init.zeros_(module.bias)
        elif isinstance(module, NanoAttention) and module.sink_key is not None:
            init.normal_(module.sink_key, std=self.config.init_std)
            init.normal_(module.sink_value, std=self.config.init_std)


class NanoModel(_NanoPreTrained):
    """The residual stream from token ids to the last norm."""

    def __init__(self, config: NanoConfig) -> None:
        super().__init__(config)
        table = config.positions in ("learned", "shortformer")
        self.embed_tokens = nn.Embedding(config.d_vocab, config.d_model)
        self.embed_positions = nn.Embedding(config.n_ctx, config.d_model) if table else None
        self.layers = nn.ModuleList(NanoBlock(config, layer) for layer in range(config.n_layers))
        self.norm = _norm(config)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "rows pos"] | None = None,
        past_key_values: Any = None,
        inputs_embeds: Float[Tensor, "batch pos d_model"] | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the stream after the last norm; arguments as everywhere in transformers."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, and not both")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            start = 0 if past_key_values is None else int(past_key_values.get_seq_length())
            position_ids = torch.arange(start, start + x.shape[1], device=x.device)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        where: dict[str, Any] = {}
        if self.embed_positions is not None:
            positions = self.embed_positions(position_ids)
            if self.config.positions == "learned":
                x = x + positions
            else:
                where["position_term"] = positions
        elif self.config.positions == "rotary":
            where["rotation"] = self._rotation(position_ids, x)
        for layer in self.layers:
            x = layer(x, attention_mask=mask, past_key_values=past_key_values, **where, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=past_key_values)

    def _rotation(self, position_ids: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        d = self.config.d_head
        pairs = torch.arange(0, d, 2, device=like.device, dtype=torch.float32)
        angles = position_ids[..., None].float() * self.config.rotary_base ** (-pairs / d)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


class NanoForCausalLM(_NanoPreTrained, GenerationMixin):
    """A nano model with its unembedding; `HookManager.load(model)` takes it as it is."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: NanoConfig) -> None:
        super().__init__(config)
        self.model = NanoModel(config)
        self.lm_head = _linear(config.d_model, config.d_vocab_out, bias=config.unembed_bias, std=config.init_std)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "rows pos"] | None = None,
        past_key_values: Any = None,
        inputs_embeds: Float[Tensor, "batch pos d_model"] | None = None,
        labels: Int[Tensor, "batch pos"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Int[Tensor, " kept"] = 0,
        **kwargs: Any,
    ) -> Any:
        """Return logits [batch pos d_vocab_out], and the mean next-token loss in nats where labels are given."""
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.d_vocab_out, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )

    def interp_map(self) -> ModelMap:
        """Return where the parts of this model are."""
        c = self.config
        return ModelMap(
            family=c.model_type,
            n_layers=c.n_layers,
            d_model=c.d_model,
            n_heads=c.n_heads,
            n_kv_heads=c.n_kv_heads,
            d_head=c.d_head,
            d_vocab=c.d_vocab,
            d_mlp=c.d_mlp or None,
            paths=_paths(c),
            rotary=c.positions == "rotary",
            reasons=_reasons(c),
        )


def _paths(config: NanoConfig) -> dict[str, str]:
    block = "model.layers.{layer}"
    paths = {"embed": "model.embed_tokens", "unembed": "lm_head", "block": block, "attn": f"{block}.self_attn"}
    paths |= {f"attn.{part}": f"{block}.self_attn.{part}_proj" for part in "qkvo"}
    if config.positions in ("learned", "shortformer"):
        paths["pos_embed"] = "model.embed_positions"
    if config.norm != "none":
        paths |= {"ln1": f"{block}.input_layernorm", "ln_final": "model.norm"}
    if config.d_mlp:
        paths |= {"mlp": f"{block}.mlp", "mlp.in": f"{block}.mlp.up_proj", "mlp.out": f"{block}.mlp.down_proj"}
        if config.norm != "none":
            paths["ln2"] = f"{block}.post_attention_layernorm"
        if config.mlp != "plain":
            paths["mlp.gate"] = f"{block}.mlp.gate_proj"
    return paths


def _reasons(config: NanoConfig) -> dict[str, str]:
    """Why sites are absent, in the words of the error."""
    reasons: dict[str, str] = {}
    if config.positions != "rotary":
        reasons["rot_q"] = reasons["rot_k"] = "it does not rotate queries and keys; use q and k"
    elif config.sink:
        reasons["rot_k"] = "its attention is given keys relative to its learned extra key; use k"
    if not config.d_mlp:
        why = "it is attention-only (d_mlp=0)"
        kinds = ("mlp_in", "mlp.in", "mlp_pre", "mlp_pre_linear", "mlp_post", "mlp_out", "ln2")
        reasons.update(dict.fromkeys(kinds, why))
        reasons["resid_mid"] = f"{why}: nothing stands between attention and resid_post; use resid_post"
    elif config.mlp == "plain":
        reasons["mlp_pre_linear"] = "its MLP is not gated; use mlp_pre"
    if config.norm == "none":
        for kind, use in (("ln1", "resid_pre"), ("ln2", "resid_mid"), ("ln_final", "the last resid_post")):
            reasons.setdefault(kind, f"it has no norms (norm='none'); use {use}")
        reasons["attn_in"] = "it has no norms (norm='none'): attention reads the stream itself; use resid_pre"
        reasons.setdefault("mlp_in", "it has no norms (norm='none'): the MLP reads the stream itself; use resid_mid")
    return reasons


AutoConfig.register(NanoConfig.model_type, NanoConfig, exist_ok=True)
AutoModelForCausalLM.register(NanoConfig, NanoForCausalLM, exist_ok=True)
