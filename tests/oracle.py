"""TransformerLens as an oracle: what `TransformerBridge.run_with_cache` reads on the same weights.

`KNOWN_DIFFERENCES` lists where TransformerLens is at fault or means another tensor; a test holds that every one of them
is still there, so that the list cannot outlive its reasons.
"""

import copy
import functools
import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.families import FAMILIES, make, tokens

UNAVAILABLE: dict[str, str] = {
    "FalconNew": "TransformerLens splits the fused projection of Falcon's new decoder layout with the sizes of the "
    "multi-query layout and fails while it boots",
}
"""Families that TransformerLens cannot boot, with the reason; the hand-made hooks of `contract/plain.py` cover them."""

_PATTERN_AS_SCORES = "TransformerLens fires hook_attn_scores with the weights after the softmax: it equals hook_pattern"
_COHERE_ROTARY = (
    "TransformerLens rotates halves as Llama does, with the interleaved angles of Cohere, which pairs neighbours; "
    "its queries and keys, patterns and everything after the first attention differ from the model's"
)

KNOWN_DIFFERENCES: dict[tuple[str, str], str] = {
    ("GPTNeo", "attn_scores"): _PATTERN_AS_SCORES,
    ("GPTJ", "attn_scores"): _PATTERN_AS_SCORES,
    ("OPT", "attn_scores"): _PATTERN_AS_SCORES,
    ("Bloom", "attn_in"): "TransformerLens gives what attention reads after its norm (ln1's output); on the other "
    "families, and here, hook_attn_in is before it",
    ("Cohere", "*"): _COHERE_ROTARY,
}
"""(family, site kind, or "*" for all of them) -> why TransformerLens and the library differ there."""


def _features(bridge: Any) -> None:
    """Turn on the hooks that are off by default, where the family has them."""
    for name in ("set_use_attn_result", "set_use_attn_in", "set_use_hook_mlp_in"):
        try:
            getattr(bridge, name)(True)
        except NotImplementedError:
            continue


def bridge_cache(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """Activations by TransformerLens name, from a bridge over a deep copy of the model (booting rewrites a model).

    Args:
        model: The plain model; it is left alone.
        ids: Token ids [batch pos], unpadded.
    """
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        bridge = build_bridge_from_module(
            twin,
            type(model).__name__,
            hf_config=twin.config,
            tokenizer=None,
            dtype=torch.float32,
            device="cpu",
            model_name="tiny",
        )
        _features(bridge)
        logits, cache = bridge.run_with_cache(ids)
    return {**{name: cache[name].clone() for name in cache}, "logits": logits}


@functools.cache
def family_cache(name: str) -> dict[str, Tensor]:
    """`bridge_cache` of one family's model of seed 0 on `tokens()`."""
    if name in UNAVAILABLE:
        return {}
    return bridge_cache(make(name), tokens())


def difference(name: str, kind: str) -> tuple[str, str] | None:
    """The entry of `KNOWN_DIFFERENCES` that covers a site kind of a family, or None."""
    return next((key for key in ((name, kind), (name, "*"), ("*", kind)) if key in KNOWN_DIFFERENCES), None)


def their_name(name: str, hook: str) -> str:
    """TransformerLens' name of a hook: it calls OLMo 2's norms on the sublayers' outputs ln1 and ln2."""
    return hook.replace("ln1_post", "ln1").replace("ln2_post", "ln2") if name == "Olmo2" else hook


def families() -> list[str]:
    """Families that TransformerLens can boot."""
    return [name for name in FAMILIES if name not in UNAVAILABLE]
