"""Causal tracing: the cells are those of one forward each, and a fact that one layer moves is found there."""

import pytest
import torch

from interp.core.errors import ConfigError, DataError
from interp.core.intervention import Replace
from interp.core.result import Result
from interp.core.where import Where
from interp.data.pairs import PromptPairs
from interp.patching.causal_trace import CausalTrace, causal_trace
from tests.families import manager
from tests.model.test_first_hour import TEXT, induction_model


def facts() -> PromptPairs:
    """Two prompts of unequal length with a named subject."""
    clean = ["w1 {subject:w5 w8} w6 w7", "w3 w4 {subject:w9} w2 w7 w6 w11"]
    return PromptPairs.make(clean, clean, [" w10", " w12"], marked=True)


def test_every_cell_is_one_noised_run_with_its_states_put_back() -> None:
    hm, pairs = manager("Llama"), facts()
    tokens = pairs.tokens(hm).clean
    found = causal_trace(hm, pairs, window=2, n_noise=1, seed=4)
    assert found.restored.shape == (3, hm.n_layers, 7, 2)
    span = tokens.spans["subject"]
    clean = hm.run(tokens, read=["embed", "*.resid_post", "*.mlp_out", "*.attn_out"], logits="last")
    sigma = clean["embed"][span].std()
    noise = 3 * sigma * torch.randn(3, hm.d_model, generator=torch.Generator().manual_seed(4))
    embed = clean["embed"].clone()
    embed[span] += noise
    start = Replace("embed", embed)

    def probability(*edits: Replace) -> torch.Tensor:
        logits = hm.run(tokens, write=[start, *edits], logits="last").logits[:, 0]
        return logits.softmax(-1)[[0, 1], [10, 12]]

    torch.testing.assert_close(found.noised, probability(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.clean, clean.logits[:, 0].softmax(-1)[[0, 1], [10, 12]], atol=1e-5, rtol=1e-4)
    for kind, name, layer, pos, window in (
        (0, "resid_post", 1, 2, [1]),
        (1, "mlp_out", 1, 3, [0, 1]),
        (2, "attn_out", 0, 4, [0]),
        (2, "attn_out", 2, 3, [1, 2]),
    ):
        edits = [Replace(f"{at}.{name}", clean, where=Where(pos=pos)) for at in window]
        torch.testing.assert_close(found.restored[kind, layer, pos], probability(*edits), atol=1e-5, rtol=1e-4)
    assert torch.equal(found.indirect_effect[:, :, 5:, 0], torch.zeros(3, hm.n_layers, 2)), "row 0 has five tokens"


def test_a_fact_that_one_layer_moves_is_found_where_it_moves() -> None:
    hm = induction_model()
    words = TEXT.split()
    marked = " ".join(f"{{subject:{w}}}" if i == 2 else w for i, w in enumerate(words))
    pairs = PromptPairs.make([marked], [marked], [f" {words[2]}"], marked=True)
    found = causal_trace(hm, pairs, kinds=["resid_post", "attn_out"], window=1, n_noise=24)
    te, ie = float(found.total_effect.mean()), found.indirect_effect.mean(-1)
    last = len(words) - 1
    assert te > 0.15
    for kind, layer, pos in ((0, 0, 2), (0, 1, last), (1, 1, last)):
        assert abs(float(ie[kind, layer, pos]) - te) < 0.1 * te, (kind, layer, pos)
        ie[kind, layer, pos] = 0.0
    assert float(ie.abs().max()) < 0.35 * te, "nothing else carries it"


def test_a_trace_survives_saving_and_says_what_it_found(tmp_path) -> None:  # type: ignore[no-untyped-def]
    result = causal_trace(manager("GPT2"), facts(), n_noise=2, window=3)
    loaded = Result.load(result.save(tmp_path / "t"))
    assert isinstance(loaded, CausalTrace) and loaded.summary() == result.summary()
    assert "MLP, 3 layers: most at layer" in result.summary() and len(result.plot().data) == 3
    frame = loaded.to_frame()
    assert len(frame) == result.restored.numel() and frame.equals(result.to_frame())
    again = causal_trace(manager("GPT2"), facts(), n_noise=2, window=3)
    assert torch.equal(again.restored, result.restored)


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_traced_is_refused() -> None:
    hm = manager("GPT2")
    with pytest.raises(DataError, match="no span 'person'"):
        causal_trace(hm, facts(), subject="person")
    with pytest.raises(ConfigError, match="window=0"):
        causal_trace(hm, facts(), window=0)
    with pytest.raises(ConfigError, match="expected some of resid_post"):
        causal_trace(hm, facts(), kinds=["z"])
