"""Reads on every family: complete, true to TransformerLens, to hand-made hooks and to the model's own attention."""

import gc
import weakref
from typing import Any

import pytest
import torch

import interp
from interp.core.errors import InterpError
from interp.core.site import Site
from tests.contract import laws, plain
from tests.contract.laws import TOLERANCE
from tests.families import FAMILIES, manager, tokens

pytestmark = pytest.mark.contract
every_family = pytest.mark.parametrize("name", list(FAMILIES))

CORE = ("resid_pre", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z", "pattern", "attn_scores")


@every_family
def test_every_listed_site_can_be_read_with_its_axes(name: str) -> None:
    found = laws.reading(name)
    assert not found.refused
    for site in found.sites:
        value = found.run[site.name]
        assert value.ndim == len(site.axes), site
        assert torch.isfinite(value).all(), site
        assert value.shape[0] == 2, site
        assert not value.requires_grad, site


@every_family
def test_the_core_sites_of_every_layer_are_listed(name: str) -> None:
    listed = {site.short for site in laws.listed(name)}
    assert not {f"{layer}.{kind}" for layer in range(manager(name).n_layers) for kind in CORE} - listed


@every_family
def test_sites_that_a_family_lacks_are_refused_with_a_reason(name: str) -> None:
    hm = manager(name)
    listed = {site.key for site in laws.listed(name)}
    for kind in ("resid_mid", "mlp_pre", "mlp_post", "mlp_pre_linear", "ln2.out", "pattern", "attn_scores", "rot_q"):
        site = Site(f"0.{kind}")
        if site.key not in listed:
            with pytest.raises(InterpError, match=r".{40,}"):
                hm.run(tokens(), read=[site])


@every_family
def test_logits_are_bit_equal_to_the_plain_model_with_and_without_reads(name: str) -> None:
    assert laws.logits_bit_equal(name)


@every_family
def test_the_residual_stream_is_the_sum_of_its_parts(name: str) -> None:
    assert laws.residual_identity(name) <= TOLERANCE


@every_family
def test_pattern_times_v_is_z(name: str) -> None:
    assert laws.pattern_times_v(name) <= TOLERANCE


@every_family
def test_the_softmax_of_the_scores_is_the_pattern(name: str) -> None:
    assert laws.scores_softmax(name) <= TOLERANCE


@every_family
def test_patterns_are_those_of_the_models_own_eager_attention(name: str) -> None:
    assert laws.patterns_against_eager(name) <= TOLERANCE


@every_family
def test_reads_equal_hand_made_hooks_on_the_plain_model(name: str) -> None:
    assert laws.against_plain(name) <= TOLERANCE


@every_family
def test_a_padded_row_reads_as_the_row_alone(name: str) -> None:
    assert laws.padded_as_unpadded(name) <= TOLERANCE


@every_family
def test_a_batch_reads_as_its_rows_and_a_split_batch_as_the_whole(name: str) -> None:
    assert laws.batched_as_single(name) <= TOLERANCE


@every_family
def test_slices_taken_inside_the_hook_equal_slices_of_the_whole(name: str) -> None:
    hm, ids, whole = manager(name), tokens(), laws.reading(name).run
    read = [
        Site("1.z").at(pos=-1, head=1),
        Site("1.resid_post").at(pos=[0, 3]),
        Site("0.q").at(head=[0, 2]),
        Site("0.resid_pre").at(rows=1),
        Site("1.pattern").at(head=2, pos=5),
    ]
    out = hm.run(ids, read=read)
    assert torch.equal(out[read[0]], whole["1.z"][:, -1, 1])
    assert torch.equal(out[read[1]], whole["1.resid_post"][:, [0, 3]])
    assert torch.equal(out[read[2]], whole["0.q"][:, :, [0, 2]])
    assert torch.equal(out[read[3]].reshape(ids.shape[1], -1), whole["0.resid_pre"][1])
    assert laws.largest(out[read[4]], whole["1.pattern"][:, 2, 5]) <= 1e-6


@every_family
def test_reads_own_their_memory(name: str) -> None:
    hm, ids = manager(name), tokens()
    first = hm.run(ids, read=["0.resid_post", "0.z", "0.v"], logits="all")
    kept = {site: first[site].clone() for site in ("0.resid_post", "0.z", "0.v")}
    for site in kept:
        first[site].add_(100.0)
    again = hm.run(ids, read=list(kept), logits="all")
    assert all(torch.equal(again[site], kept[site]) for site in kept)
    assert torch.equal(again.logits, first.logits)


def test_patterns_of_the_tiny_models_are_far_from_uniform() -> None:
    for name in FAMILIES:
        for pattern in plain.eager_attentions(name, tokens()):
            row = pattern[:, :, -1]
            entropy = -(row * row.clamp(min=1e-9).log()).sum(-1).mean()
            assert entropy < 2.3 < torch.tensor(12.0).log(), name


def test_a_sliding_window_shorter_than_the_text_hides_the_first_token() -> None:
    for name in ("Mistral", "Gemma2", "Gemma3", "GPTNeo", "GptOss"):
        masked = [pattern[:, :, -1, 0].abs().max() == 0 for pattern in laws.reading(name).run.stack("pattern")]
        assert any(masked), name


@pytest.mark.parametrize("request_", ["read", "many", "scores", "write", "edit of a pattern", "hooked"])
def test_what_was_read_is_gone_when_it_is_let_go_without_waiting_for_the_collector(request_: str) -> None:
    hm, ids = manager("Llama"), tokens()
    asked: dict[str, dict[str, Any]] = {
        "read": {"read": ["1.resid_post"]},
        "many": {"read": ["*.resid_post", "1.pattern", "0.q", "ln_final.scale", "1.attn_out"]},
        "scores": {"read": ["1.scores"], "logits": "all"},
        "write": {"read": ["1.resid_post"], "write": [interp.Ablate("0.resid_post", "zero")]},
        "edit of a pattern": {"read": ["1.pattern"], "write": [interp.Edit("0.pattern", lambda x: 2 * x)]},
        "hooked": {"read": ["1.resid_post"]},
    }
    gc.collect()
    gc.disable()
    try:
        if request_ == "hooked":
            with torch.no_grad(), hm.hooked(**asked[request_]) as out:
                hm.model(ids)
        else:
            out = hm.run(ids, **asked[request_])
        held = [weakref.ref(value) for value in out._values.values()]
        del out
        assert held and not [ref for ref in held if ref() is not None]
    finally:
        gc.enable()
