"""Tiny random models of many families, made so that a bug shows.

Fresh models hide mistakes: gains are 1, biases 0, patterns uniform, windows longer than the text. Here every gain and
bias is perturbed, activations are of unit scale, query and key weights are scaled until patterns are far from uniform,
sliding windows are shorter than the twelve tokens of `tokens()`, soft-caps and residual multipliers bite.
"""

import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from interp.core.manager import HookManager

VOCAB = 120
WINDOW = 5
LENGTH = 12

_IDS = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_BASE = {**_IDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_GQA = {**_BASE, "num_key_value_heads": 2}
_WIDE = {**_GQA, "head_dim": 12}
_GPT = {**_IDS, "n_embd": 32, "n_head": 4, "n_positions": 64}
_BLOOM = {**_IDS, "hidden_size": 32, "n_layer": 2, "n_head": 4}
_FALCON = {**_IDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_MOE = {**_GQA, "num_experts_per_tok": 2, "num_experts": 4}


def _gemma3_text() -> PreTrainedConfig:
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    return tf.Gemma3TextConfig(
        **{**_WIDE, "num_hidden_layers": 3},
        sliding_window=WINDOW,
        query_pre_attn_scalar=12,
        layer_types=layers,
    )


def _gemma3_multimodal() -> PreTrainedConfig:
    vision = tf.SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    return tf.Gemma3Config(
        text_config=_gemma3_text().to_dict(),
        vision_config=vision.to_dict(),
        mm_tokens_per_image=4,
        boi_token_index=VOCAB,
        eoi_token_index=VOCAB + 1,
        image_token_index=VOCAB + 2,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "GPT2": lambda: tf.GPT2Config(**_GPT, n_layer=3),
    "GPTNeo": lambda: tf.GPTNeoConfig(
        **_IDS,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=WINDOW,
    ),
    "GPTJ": lambda: tf.GPTJConfig(**_GPT, n_layer=2, rotary_dim=4),
    "GPTNeoX": lambda: tf.GPTNeoXConfig(**_BASE),
    "GPTNeoXSequential": lambda: tf.GPTNeoXConfig(**_BASE, use_parallel_residual=False),
    "OPT": lambda: tf.OPTConfig(
        **_IDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, word_embed_proj_dim=32
    ),
    "Bloom": lambda: tf.BloomConfig(**_BLOOM),
    "Falcon": lambda: tf.FalconConfig(**_FALCON),
    "FalconNew": lambda: tf.FalconConfig(**_FALCON, num_kv_heads=2, new_decoder_architecture=True),
    "Llama": lambda: tf.LlamaConfig(**{**_GQA, "num_hidden_layers": 3}),
    "Mistral": lambda: tf.MistralConfig(**_GQA, sliding_window=WINDOW),
    "Mixtral": lambda: tf.MixtralConfig(**_GQA, num_local_experts=4),
    "Qwen2": lambda: tf.Qwen2Config(**_GQA),
    "Qwen3": lambda: tf.Qwen3Config(**_WIDE),
    "Gemma": lambda: tf.GemmaConfig(**_WIDE),
    "Gemma2": lambda: tf.Gemma2Config(
        **_WIDE,
        sliding_window=WINDOW,
        query_pre_attn_scalar=12,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "Gemma3": _gemma3_text,
    "Gemma3Multimodal": _gemma3_multimodal,
    "Phi": lambda: tf.PhiConfig(**_BASE),
    "Phi3": lambda: tf.Phi3Config(**_GQA),
    "Olmo": lambda: tf.OlmoConfig(**_GQA),
    "Olmo2": lambda: tf.Olmo2Config(**_GQA),
    "Granite": lambda: tf.GraniteConfig(
        **_GQA, residual_multiplier=0.22, embedding_multiplier=12.0, attention_multiplier=0.1, logits_scaling=8.0
    ),
    "StableLm": lambda: tf.StableLmConfig(**_GQA),
    "Starcoder2": lambda: tf.Starcoder2Config(**_GQA),
    "Cohere": lambda: tf.CohereConfig(**_GQA),
    "Qwen2Moe": lambda: tf.Qwen2MoeConfig(**_MOE, moe_intermediate_size=16, shared_expert_intermediate_size=16),
    "GPTBigCode": lambda: tf.GPTBigCodeConfig(**_GPT, n_layer=2),
    "GptOss": lambda: tf.GptOssConfig(
        **{**_WIDE, "num_hidden_layers": 2}, num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW
    ),
}

_QUERY_KEY = ("q_proj", "k_proj", "c_attn", "query_key_value", "qkv_proj", ".query")
_FULL_SCALE = ("embed_tokens", "wte", "wpe", "embed_in", "embed_positions", "word_embeddings", "lm_head", "embed_out")


def _perturb(model: PreTrainedModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed + 1)
    # GPT-Neo does not divide its scores by sqrt(d_head), Granite multiplies them by a small number.
    sharpness = {"gpt_neo": 0.8, "granite": 3.0}.get(model.config.model_type, 1.6)
    # Granite multiplies embeddings by 12 and what a block adds by 0.22: unit embeddings would drown the blocks.
    embedding = 0.05 if model.config.model_type == "granite" else 0.5
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.add_(0.25 * noise)
        elif parameter.ndim == 3 or "bias" in name:
            parameter.copy_(noise * 0.2)
        elif any(part in name for part in _FULL_SCALE):
            parameter.copy_(noise * (0.5 if "lm_head" in name else embedding))
        else:
            scale = sharpness if any(part in name for part in _QUERY_KEY) else 0.8
            parameter.copy_(noise * scale / min(parameter.shape) ** 0.5)


def make(name: str, seed: int = 0) -> PreTrainedModel:
    """Build a tiny random model of one family, in fp32 on the CPU, in eval mode.

    Args:
        name: A key of `FAMILIES`.
        seed: Seeds initialisation and perturbation; the global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = tf.AutoModelForCausalLM.from_config(FAMILIES[name](), dtype=torch.float32).eval()
        _perturb(model, seed)
    model.generation_config.pad_token_id = 0
    return model


def tokens(batch: int = 2, pos: int = LENGTH, seed: int = 0) -> Tensor:
    """Random ids [batch pos] without the special token 0."""
    return torch.randint(1, VOCAB, (batch, pos), generator=torch.Generator().manual_seed(seed))


@functools.cache
def _tokenizer_folder() -> tempfile.TemporaryDirectory[str]:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "w0")
    folder = tempfile.TemporaryDirectory(prefix="interp-tokenizer-")
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder.name)
    return folder


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the words w0 .. w119 (w0 = bos = eos = pad = unk), loaded from disk as TransformerBridge needs."""
    return tf.AutoTokenizer.from_pretrained(str(Path(_tokenizer_folder().name)))


@functools.cache
def manager(name: str) -> HookManager:
    """The HookManager of one family's model of seed 0, built once per process."""
    return HookManager.load(make(name), word_tokenizer())


def paddings(ids: Tensor, pads: int = 4) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the side, ids and mask [batch pos] (True = real token) of a batch whose row 0 has pads on that side."""
    short = ids[0, : ids.shape[1] - pads]
    for side in ("left", "right"):
        padded, mask = torch.zeros_like(ids), torch.ones_like(ids, dtype=torch.bool)
        padded[1:] = ids[1:]
        span = slice(pads, None) if side == "left" else slice(None, ids.shape[1] - pads)
        padded[0, span] = short
        mask[0] = False
        mask[0, span] = True
        yield side, padded, mask


__all__ = ["FAMILIES", "LENGTH", "VOCAB", "WINDOW", "make", "manager", "paddings", "tokens", "word_tokenizer"]
