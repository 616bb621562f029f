"""Head effects are those of the naive loop, and head vectors sum to what attention adds, on every kind of family."""

import pytest
import torch
from torch import Tensor

from interp.core.intervention import Add, Replace
from interp.core.manager import HookManager
from interp.core.site import Site
from interp.core.where import Where
from interp.data.pairs import PromptPairs
from interp.steering.function_vectors.effects import patch_heads
from interp.steering.function_vectors.heads import head_vectors, mean_head_activations
from interp.steering.function_vectors.screen import try_vectors
from tests.families import manager

NAMES = ["GPT2", "GPTNeoX", "Llama", "Qwen3", "Gemma2", "Olmo2", "Granite", "Bloom"]
"""Output biases, parallel blocks, grouped queries, d_head ≠ d_model / n_heads, norms behind the heads, a multiplier."""


def ragged() -> PromptPairs:
    """Prompts of three lengths."""
    texts = ["w1 w5 w6 w7 w2 w9", "w4 w8", "w3 w4 w5 w2 w7 w6 w11 w12", "w9 w8 w7 w6"]
    return PromptPairs.make(texts, [t + " w3" for t in texts], [[" w10"], [" w11", " w17"], [" w12"], [" w13"]])


def naive(hm: HookManager, pairs: PromptPairs, z: Tensor, side: str) -> Tensor:
    """One forward per head with an ordinary edit."""
    tokens = pairs.tokens(hm, side=side, same_length=False)
    metric = tokens.metric("log_prob")
    found = torch.zeros(len(pairs), hm.n_layers, hm.n_heads)
    for layer in range(hm.n_layers):
        for head in range(hm.n_heads):
            edit = Replace(f"{layer}.z", z[layer, head], where=Where(pos=-1, head=head))
            found[:, layer, head] = metric(hm.run(tokens.corrupted, write=[edit], logits="last"))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_effects_of_all_heads_at_once_are_those_of_one_forward_per_head(name: str) -> None:
    hm, pairs = manager(name), ragged()
    means = mean_head_activations(hm, pairs, batch_size=3)
    z = 0.5 * means.z + torch.randn(means.z.shape, generator=torch.Generator().manual_seed(1))
    patched, sides = torch.full((4, hm.n_layers, hm.n_heads), torch.nan), torch.full((2, 4), torch.nan)
    patch_heads(hm, pairs, z, (patched, sides))
    for side in ("left", "right"):
        torch.testing.assert_close(patched.exp(), naive(hm, pairs, z, side).exp(), atol=1e-5, rtol=0)
    assert float((patched - sides[1][:, None, None]).abs().min()) > 0, "every head here does something"


@pytest.mark.parametrize("name", NAMES)
def test_a_head_that_is_given_its_own_value_has_no_effect_at_all(name: str) -> None:
    hm, text = manager(name), "w3 w4 w5 w2"
    pairs = PromptPairs.make([text, text], [text, text], [" w10", " w11"])
    own = hm.run(pairs.tokens(hm).clean, read=[Site(f"{n}.z").at(pos=-1) for n in range(hm.n_layers)])
    z = torch.stack([own[f"{n}.z"][0] for n in range(hm.n_layers)])
    patched, sides = torch.full((2, hm.n_layers, hm.n_heads), torch.nan), torch.full((2, 2), torch.nan)
    patch_heads(hm, pairs, z, (patched, sides))
    assert torch.equal(patched, sides[1][:, None, None].expand_as(patched))


@pytest.mark.parametrize("name", NAMES)
def test_all_heads_together_write_what_attention_adds_but_for_its_bias(name: str) -> None:
    hm, pairs = manager(name), ragged()
    means = mean_head_activations(hm, pairs, batch_size=3)
    tokens = pairs.tokens(hm, same_length=False).clean
    layers = range(hm.n_layers)
    run = hm.run(tokens, read=[Site(f"{n}.attn_out").at(pos=-1) for n in layers])
    for layer in layers:
        block = [(layer, head) for head in range(hm.n_heads)]
        bias = hm.weights[layer].b_O * hm.map.residual_multiplier
        assert name not in ("GPT2", "GPTNeoX", "Bloom") or float(bias.abs().max()) > 0.1
        total = head_vectors(hm, means.written, block).sum(0) + bias
        torch.testing.assert_close(total, run[f"{layer}.attn_out"].mean(0), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["GPT2", "Llama", "Gemma2"])
def test_vectors_tried_together_are_those_added_one_by_one(name: str) -> None:
    hm, pairs = manager(name), ragged()
    layers = list(range(hm.n_layers - 1))
    vectors = torch.randn(3, len(layers), hm.d_model, generator=torch.Generator().manual_seed(2))
    tried = try_vectors(hm, pairs, vectors, layers)
    tokens = pairs.tokens(hm, same_length=False)
    for v in range(3):
        for i, layer in enumerate(layers):
            at = Where.last_prompt()
            out = hm.run(tokens.clean, write=[Add(f"{layer}.resid_post", vectors[v, i], where=at)], logits="last")
            torch.testing.assert_close(tried.log_prob[v, i], tokens.metric("log_prob")(out), atol=1e-4, rtol=1e-4)
            assert torch.equal(tried.right[v, i], (tokens.metric("rank")(out) == 0).float())
    base = hm.run(tokens.clean, logits="last")
    torch.testing.assert_close(tried.base_log_prob, tokens.metric("log_prob")(base), atol=1e-4, rtol=1e-4)
