"""Edits on every family: equal to hand-made ones, seen by reads, confined to where they were asked for."""

import pytest
import torch

from interp.core.intervention import Replace
from interp.core.site import Site
from tests.contract import laws, laws_edits
from tests.contract.laws import TOLERANCE
from tests.families import FAMILIES, manager, tokens

pytestmark = pytest.mark.contract
every_family = pytest.mark.parametrize("name", list(FAMILIES))
rotary_families = pytest.mark.parametrize(
    "name", [name for name in FAMILIES if name not in (*laws.NOT_ROTARY, *laws.OWN_ATTENTION)]
)


@every_family
def test_edits_equal_hand_made_hooks_on_the_plain_model(name: str) -> None:
    assert laws_edits.edits_against_plain(name) <= TOLERANCE


@every_family
def test_a_replaced_pattern_is_what_mixes_the_values(name: str) -> None:
    assert laws_edits.pattern_edits(name) <= TOLERANCE


@rotary_families
def test_post_rotary_edits_equal_edits_inside_the_models_attention(name: str) -> None:
    assert laws_edits.rotary_edits(name) <= TOLERANCE


@every_family
def test_core_sites_take_edits_and_the_rest_refuse_with_a_type(name: str) -> None:
    found, refused = laws_edits.writable(name)
    kinds = {site.kind for site in found}
    assert {
        "resid_pre",
        "resid_post",
        "attn_out",
        "mlp_out",
        "q",
        "k",
        "v",
        "z",
        "embed",
        "pattern",
        "attn_scores",
    } <= kinds
    assert all(len(message) > 40 for message in refused.values())


@every_family
def test_patching_clean_into_clean_changes_nothing(name: str) -> None:
    idle = laws_edits.clean_into_clean(name)
    assert idle.same == 0
    assert idle.rounded <= TOLERANCE
    assert not idle.silent


@every_family
def test_an_edit_of_strength_zero_changes_nothing(name: str) -> None:
    idle = laws_edits.zero_strength(name)
    assert idle.same == 0
    assert idle.rounded <= TOLERANCE
    assert not idle.silent


@every_family
def test_reads_see_edits_in_list_order(name: str) -> None:
    assert laws_edits.reads_see_edits(name) <= TOLERANCE


@every_family
def test_an_edit_touches_only_its_where(name: str) -> None:
    inside, outside = laws_edits.touches_only_where(name)
    assert inside > 0.5
    assert outside <= 1e-5


@every_family
def test_gradients_equal_autograd_through_the_plain_model(name: str) -> None:
    assert laws_edits.gradients(name) <= TOLERANCE


@every_family
def test_pattern_gradients_equal_autograd_through_eager_attention(name: str) -> None:
    assert laws_edits.pattern_gradients(name) <= TOLERANCE


@every_family
def test_cached_generation_under_edits_equals_decoding_without_a_cache(name: str) -> None:
    assert laws_edits.generation(name) <= TOLERANCE


@every_family
def test_a_value_that_is_patched_in_stays_the_users(name: str) -> None:
    # A block that adds in place (Falcon's) must not write into the tensor that was handed to Replace.
    hm, ids = manager(name), tokens()
    for site in laws_edits.early(name):
        value = laws_edits.noise(laws.reading(name).run[site.name].shape).abs()
        kept = value.clone()
        hm.run(ids, write=[Replace(site, value)], logits="all")
        assert torch.equal(value, kept), site


@every_family
def test_a_ragged_batch_generates_as_its_rows_alone(name: str) -> None:
    assert laws_edits.ragged_generation(name) <= TOLERANCE


@every_family
def test_gradients_of_slices_are_slices_of_gradients(name: str) -> None:
    hm, ids = manager(name), tokens()
    whole = hm.run(ids, read=["0.z", "1.resid_pre"], grad=lambda out: out.logits[:, -1, 3])
    read = [Site("0.z").at(pos=[2, -1], head=1), Site("1.resid_pre").at(pos=4)]
    part = hm.run(ids, read=read, grad=lambda out: out.logits[:, -1, 3])
    assert laws.largest(part.grad[read[0]], whole.grad["0.z"][:, [2, -1], 1]) <= 1e-6
    assert laws.largest(part.grad[read[1]], whole.grad["1.resid_pre"][:, 4]) <= 1e-6
    assert laws.largest(part[read[0]], whole["0.z"][:, [2, -1], 1]) == 0


def test_the_laws_can_fail() -> None:
    out = laws.reading("Llama").run
    assert laws.largest(out["0.resid_pre"], out["0.resid_post"]) > 0.1
    assert laws.largest(out["0.z"], out["0.z"] * float("nan")) == float("inf")
    assert laws.largest(out["0.z"], out["0.resid_post"]) == float("inf")
