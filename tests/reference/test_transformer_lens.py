"""Every site beside TransformerBridge on the same random weights."""

import pytest
import torch

from tests import oracle
from tests.contract import laws, plain
from tests.families import make, tokens

pytestmark = [pytest.mark.reference, pytest.mark.usefixtures("unchecked")]


@pytest.mark.parametrize("name", oracle.families())
def test_every_site_equals_transformer_bridge(name: str) -> None:
    compared = laws.against_transformer_lens(name)
    assert len(compared) >= 20
    wrong = {row.site.short: row.delta for row in compared if row.delta > laws.TOLERANCE and row.known is None}
    assert not wrong


@pytest.mark.parametrize("key", list(oracle.KNOWN_DIFFERENCES))
def test_every_known_difference_is_still_there(key: tuple[str, str]) -> None:
    family, kind = key
    if kind == "attn_scores" and family in laws.OWN_ATTENTION:
        return  # refused here, so there is nothing to compare; the test below shows what TransformerLens gives
    assert any(row.known == key and row.delta > laws.TOLERANCE for row in laws.against_transformer_lens(family))


@pytest.mark.parametrize("name", list(oracle.UNAVAILABLE))
def test_families_called_unavailable_still_fail_to_boot(name: str) -> None:
    with pytest.raises(RuntimeError, match="split"):
        oracle.bridge_cache(make(name), tokens())


@pytest.mark.parametrize("name", ["GPTNeo", "GPTJ", "OPT"])
def test_transformer_lens_gives_the_pattern_as_the_scores_here(name: str) -> None:
    cache = oracle.family_cache(name)
    for layer, pattern in enumerate(plain.eager_attentions(name, tokens())):
        assert laws.largest(cache[f"blocks.{layer}.attn.hook_attn_scores"], pattern) <= 1e-5


def test_transformer_lens_gives_blooms_attn_in_after_the_norm() -> None:
    cache = oracle.family_cache("Bloom")
    assert torch.equal(cache["blocks.0.hook_attn_in"][:, :, 0], cache["blocks.0.ln1.hook_out"])


def test_transformer_lens_rotates_coheres_queries_as_llama_does() -> None:
    from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as neighbours
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as halves

    cache, model, ids = oracle.family_cache("Cohere"), make("Cohere"), tokens()
    q, k = (cache[f"blocks.0.attn.hook_{x}"].transpose(1, 2) for x in "qk")
    cos, sin = model.model.rotary_emb(q, torch.arange(ids.shape[1])[None])
    theirs = cache["blocks.0.attn.hook_rot_q"].transpose(1, 2)
    assert laws.largest(halves(q, k, cos, sin)[0], theirs) <= 1e-6
    assert laws.largest(neighbours(q, k, cos, sin)[0], theirs) > 0.1


def test_booting_the_oracle_leaves_the_model_alone() -> None:
    model, ids = make("Llama"), tokens()
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        keys = list(model.state_dict())
        oracle.bridge_cache(model, ids)
        assert torch.equal(model(ids, use_cache=False).logits, before)
    assert list(model.state_dict()) == keys
