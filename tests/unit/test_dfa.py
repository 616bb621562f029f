"""DFA and RDFA: exact on several families, planted weights recovered, gradients as an oracle."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from interp.core.errors import ConfigError, DataError, WhereError
from interp.core.manager import HookManager
from interp.core.result import Result
from interp.core.run import Run
from interp.core.site import Site
from interp.dictionaries.heads import head_weights, reading
from interp.dictionaries.options import DictionaryOptions
from interp.evaluate.top_examples import top_examples
from interp.patching.features.dfa import DFA, dfa
from interp.patching.features.rdfa import RDFA, head_latents, rdfa
from interp.testbed.nano import NanoOptions, nano
from tests.families import manager, paddings, tokens

# Learned positions; grouped queries; post-norms and windows; parallel blocks; sinks that take a share.
SOME = ("GPT2", "Llama", "Gemma2", "GPTNeoX", "Qwen3", "GptOss", "Olmo2")
some_families = pytest.mark.parametrize("name", SOME)
LAYER = 1


def sae(hm: HookManager, site: str, *, kind: str = "standard", d_sae: int = 40, seed: int = 0) -> Any:
    """An SAE of a site with random weights, none of which are at rest."""
    width = hm.n_heads * hm.d_head if site.endswith(".z") else hm.d_model
    options: Any = {"kind": kind, "form": "sae", "d_sae": d_sae, "k": 6}
    made: Any = DictionaryOptions(**options).make(width, width)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    made.cfg.metadata["hook_name"] = Site(site).name
    return reading(made, Site(site)).eval().requires_grad_(False)


def off(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max()) if a.shape == b.shape else float("inf")


@some_families
def test_heads_sources_and_the_constant_sum_to_the_pre_activation(name: str) -> None:
    hm = manager(name)
    dictionary = sae(hm, f"{LAYER}.z")
    found = dfa(hm, dictionary, tokens(3), latents=[0, 7, 31])
    z = hm.run(tokens(3), read=[f"{LAYER}.z"])[f"{LAYER}.z"][:, -1].flatten(1)
    pre = ((z - dictionary.b_dec) @ dictionary.W_enc + dictionary.b_enc)[:, [0, 7, 31]]
    assert off(found.by_source.sum((2, 3)) + found.constant, pre) < 1e-5
    assert off(found.by_head.sum(2) + found.constant, pre) < 1e-5
    assert off(found.pre_activation, pre) < 1e-5 and off(found.activation, pre.relu()) < 1e-5
    assert found.rest.abs().max() < 1e-5


@some_families
def test_by_source_is_the_gradient_by_each_value_times_the_value(name: str) -> None:
    """An oracle that knows nothing of heads: autograd through the model, the pattern held."""
    from interp.core.intervention import FreezePattern

    hm = manager(name)
    dictionary = sae(hm, f"{LAYER}.z")

    def pre(out: Run) -> Tensor:
        z = out[f"{LAYER}.z"][:, -2].flatten(1)
        return ((z - dictionary.b_dec) @ dictionary.W_enc)[:, 7]

    site = f"{LAYER}.v"
    out = hm.run(tokens(2), read=[site, f"{LAYER}.z"], write=[FreezePattern(f"{LAYER}.pattern")], grad=pre)
    by_value = (out[site] * out.grad[site]).sum(-1)  # [batch src n_kv_heads]
    found = dfa(hm, dictionary, tokens(2), latents=7, pos=-2)
    grouped = found.by_source[:, 0].unflatten(1, (hm.n_kv_heads, -1)).sum(2)
    assert off(grouped, by_value.transpose(1, 2)) < 1e-5
    assert not found.by_source[..., -1].any(), "nothing comes from the right"


def test_pads_on_either_side_change_nothing() -> None:
    hm = manager("Llama")
    dictionary = sae(hm, f"{LAYER}.z")
    for side, ids, mask in paddings(tokens(2)):
        both = dfa(hm, dictionary, hm.to_tokens(ids, mask=mask), latents=[3, 4])
        alone = dfa(hm, dictionary, ids[:1][mask[:1]][None], latents=[3, 4])
        assert off(both.by_source[0][..., mask[0]], alone.by_source[0]) < 1e-5, side
        assert not both.by_source[0][..., ~mask[0]].any()
        assert both.pos.tolist() == [int(mask[0].nonzero().max()), ids.shape[1] - 1]
        assert len(both.to_frame()) == 2 * hm.n_heads * (int(mask.sum()))
        middle = dfa(hm, dictionary, hm.to_tokens(ids, mask=mask), latents=[3], pos=2)
        assert int(mask[0, : middle.pos[0] + 1].sum()) == 3


def test_a_planted_head_and_word_are_named_and_no_other() -> None:
    hm, dictionary, residual, words = planted()
    found = dfa(hm, dictionary, words, latents=[2, 5])
    # The word 2 stands at position 1; head 1 looks at all four alike and carries it 3-fold.
    expected = torch.zeros(1, 2, 2, 4)
    expected[0, 0, 1, 1] = 3 / 4
    assert off(found.by_source, expected) < 1e-6 and found.pre_activation.tolist() == [[0.75, 0.0]]
    deeper = rdfa(hm, dictionary, residual, words, latent=2)
    strong = deeper.total.abs() > 1e-6
    assert deeper.src[strong].tolist() == [1] and deeper.feature[strong].tolist() == [2]
    assert deeper.by_head[:, strong].tolist() == [[0.0], [0.75]]
    assert not deeper.error.abs().max() > 1e-6 and not deeper.bias.any()


def planted() -> tuple[HookManager, Any, Any, Tensor]:
    """One block without positions: head 1 copies 3 times the word; latents of both dictionaries are words."""
    n, width = 8, 16
    options = NanoOptions(
        d_vocab=n, n_layers=1, d_model=width, n_heads=2, d_head=n, d_mlp=0, norm="none", positions="none", bias=False
    )
    model: Any = nano(options)
    word = torch.eye(width)[:n]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(word)
        model.model.layers[0].self_attn.v_proj.weight[n:] = 3 * word
    hm = HookManager.load(model)
    heads, residual = sae(hm, "0.z", d_sae=n), sae(hm, "0.resid_pre", d_sae=n)
    with torch.no_grad():
        for made in (heads, residual):
            for parameter in made.parameters():
                parameter.zero_()
        heads.W_enc[n:] = torch.eye(n)
        residual.W_enc.copy_(word.T)
        residual.W_dec.copy_(word)
    return hm, heads, residual, torch.tensor([[4, 2, 6, 0]])


@some_families
def test_rdfa_sums_to_the_pre_activation_and_to_dfa_by_head(name: str) -> None:
    hm = manager(name)
    dictionary, residual = sae(hm, f"{LAYER}.z"), sae(hm, f"{LAYER}.resid_pre", seed=1)
    found = rdfa(hm, dictionary, residual, tokens(1), latent=5, pos=-2)
    whole = dfa(hm, dictionary, tokens(1), latents=5, pos=-2)
    total = float(found.total.sum() + found.error.sum() + found.bias.sum()) + found.constant
    assert total == pytest.approx(float(whole.pre_activation), abs=1e-5)
    assert found.pre_activation == pytest.approx(total, abs=1e-5)
    # A source position's parts are what DFA gives it, less the biases inside of values.
    scale = torch.zeros(tokens(1).shape[1]).index_add_(0, found.src, found.total) + found.error + found.bias
    assert off(scale.sum() + found.constant - whole.constant[0], whole.by_source.sum()) < 1e-5
    assert found.total.abs().max() > 1e-2 and found.error.abs().max() > 1e-2


def test_what_a_residual_latent_adds_is_what_taking_it_out_takes_away() -> None:
    """Brute force, at fixed σ and pattern: an RMSNorm is linear then."""
    from interp.core.intervention import Add, FreezePattern, FreezeScale
    from interp.core.where import Where

    hm = manager("Llama")
    dictionary, residual = sae(hm, f"{LAYER}.z"), sae(hm, f"{LAYER}.resid_pre", seed=1)
    found = rdfa(hm, dictionary, residual, tokens(1), latent=5)
    base = hm.run(tokens(1), read=[f"{LAYER}.pattern", f"{LAYER}.ln1.scale"])
    held = [FreezePattern(f"{LAYER}.pattern", base), FreezeScale(f"{LAYER}.ln1.scale", base)]
    for i in found.total.abs().topk(3).indices.tolist():
        vector = -found.activation[i] * residual.W_dec[found.feature[i]]
        gone = Add(f"{LAYER}.resid_pre", vector, where=Where(pos=int(found.src[i])))
        z = hm.run(tokens(1), read=[f"{LAYER}.z"], write=[gone, *held])[f"{LAYER}.z"][0, -1].flatten()
        after = (z - dictionary.b_dec) @ dictionary.W_enc[:, 5] + dictionary.b_enc[5]
        assert found.pre_activation - float(after) == pytest.approx(float(found.total[i]), abs=1e-4)


def test_gated_and_topk_dictionaries_and_a_processed_space_add_up() -> None:
    hm = manager("Llama")
    for kind in ("gated", "topk", "jumprelu"):
        dictionary = sae(hm, f"{LAYER}.z", kind=kind)
        found = dfa(hm, dictionary, tokens(2), latents=range(40))
        assert off(found.by_source.sum((2, 3)) + found.constant, found.pre_activation) < 1e-5
        firing = found.activation > 0
        assert firing.any()
        if kind != "gated":  # whose latents have a magnitude of their own
            assert off(found.activation[firing], found.pre_activation[firing]) < 1e-5
        else:
            assert bool((found.pre_activation[firing] > 0).all())
    dictionary = sae(hm, f"{LAYER}.z")
    dictionary.space.fix(bound="raw", scale=torch.rand(32) + 0.5, shift=torch.randn(32))
    found = dfa(hm, dictionary, tokens(2), latents=range(40))
    assert off(found.activation, found.pre_activation.relu()) < 1e-5


def test_a_value_of_a_sink_is_the_rest() -> None:
    model: Any = nano(NanoOptions(sink=True, d_vocab=120, d_model=32), seed=0)
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.sink_value.normal_()
    hm = HookManager.load(model)
    found = dfa(hm, sae(hm, "1.z"), tokens(1), latents=[3])
    assert found.rest.abs().max() > 1e-2
    assert off(found.by_source.sum(-1) + found.rest, found.by_head) < 1e-6


def test_the_latents_of_a_head_are_those_of_the_largest_share() -> None:
    hm, dictionary, _, _ = planted()
    with torch.no_grad():
        dictionary.W_dec.copy_(torch.eye(8).repeat(1, 2) * torch.linspace(1, 0.1, 8)[:, None])
        dictionary.W_dec[:, 8:] *= torch.linspace(0, 1, 8)[:, None]
    found = head_latents(hm, dictionary, k=8)
    assert found.latents.tolist() == [list(range(8)), list(range(7, -1, -1))]
    assert off(found.share.sum(0)[:1].float(), torch.tensor([1.0 + 0.5])) < 1e-6
    assert off(found.share[0], head_weights(dictionary, 2)[:, 0]) == 0
    with pytest.raises(DataError, match="k=9"):
        head_latents(hm, dictionary, k=9)


def test_latents_that_never_fire_are_left_out_where_examples_say_so() -> None:
    hm = manager("Llama")
    dictionary = sae(hm, f"{LAYER}.z")
    first = int(head_latents(hm, dictionary, k=1).latents[0, 0])
    with torch.no_grad():
        dictionary.b_enc[first] = -100
    texts = [" ".join(f"w{i}" for i in row) for row in tokens(4).tolist()]
    seen = top_examples(hm, dictionary, texts, latents=5, max_tokens=200)
    alive = head_latents(hm, dictionary, k=3, examples=seen)
    assert int(seen.firing[first]) == 0 and first not in alive.latents[0].tolist()
    assert bool((alive.density > 0).all())


def test_results_show_themselves_and_come_back(tmp_path: Path) -> None:
    hm, dictionary, residual, words = planted()
    results: list[Result] = [
        dfa(hm, dictionary, words, latents=[2]),
        rdfa(hm, dictionary, residual, words, latent=2),
        head_latents(hm, dictionary, k=2),
    ]
    for number, result in enumerate(results):
        assert len(result.to_frame()) and result.plot().data
        assert Result.load(result.save(tmp_path / str(number))).summary() == result.summary()
    assert isinstance(results[0], DFA) and "head 1 +0.75; position 1" in results[0].summary()
    assert isinstance(results[1], RDFA) and "+0.75 latent 2 @1" in results[1].summary()


@pytest.mark.usefixtures("unchecked")
def test_other_dictionaries_latents_and_positions_are_refused() -> None:
    hm = manager("Llama")
    dictionary, residual = sae(hm, f"{LAYER}.z"), sae(hm, f"{LAYER}.resid_pre")
    with pytest.raises(ConfigError, match=r"reads 1.resid_pre; DFA takes an SAE of the heads"):
        dfa(hm, residual, tokens(1), latents=0)
    with pytest.raises(DataError, match=r"latents=\[40\]"):
        dfa(hm, dictionary, tokens(1), latents=40)
    with pytest.raises(WhereError, match="pos=12"):
        dfa(hm, dictionary, tokens(1), latents=0, pos=12)
    with pytest.raises(ConfigError, match=r"expected an SAE of 1.resid_pre"):
        rdfa(hm, dictionary, sae(hm, "2.resid_pre"), tokens(1), latent=0)
    with pytest.raises(DataError, match="one prompt, got 2"):
        rdfa(hm, dictionary, residual, tokens(2), latent=0)
    with pytest.raises(DataError, match="pos=-13"):
        rdfa(hm, dictionary, residual, tokens(1), latent=0, pos=-13)
    residual.set_cfg(residual.cfg.model_copy(update={"normalize_activations": "layer_norm"}))
    with pytest.raises(ConfigError, match="normalises each token"):
        rdfa(hm, dictionary, residual, tokens(1), latent=0)
