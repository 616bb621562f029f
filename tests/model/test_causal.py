"""The causal inner product: concepts of a vocabulary made of free factors, and those of the small world."""

from pathlib import Path
from typing import Any

import pytest
import torch

from interp.core.errors import ConfigError, DataError
from interp.core.manager import HookManager
from interp.core.result import Result
from interp.steering.concepts.causal import CausalConcepts, CausalGeometry, causal_concepts, causal_geometry
from interp.testbed.nano import NanoOptions, nano
from interp.testbed.word_pairs import world_word_pairs
from tests.families import VOCAB, manager, tokens, word_tokenizer

K = 6
N = 2**K


def factors() -> torch.Tensor:
    """Every combination of K signs: the covariance over tokens is the identity, exactly."""
    return 2.0 * ((torch.arange(N)[:, None] >> torch.arange(K)) & 1) - 1


def mixing(seed: int) -> torch.Tensor:
    """An invertible map that is far from orthogonal."""
    draw = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(K, K, generator=draw))
    right, _ = torch.linalg.qr(torch.randn(K, K, generator=draw))
    return left @ torch.diag(torch.linspace(0.3, 2.0, K)) @ right


def factored(seed: int, *, norm: str = "rms", extra: int = 0) -> HookManager:
    options = NanoOptions(d_vocab=N + extra, n_layers=1, d_model=K, n_heads=1, d_mlp=0, norm=norm, init_std=0.5)
    model: Any = nano(options)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[:N] = factors() @ mixing(seed)
    return HookManager.load(model)


def pairs_of(factor: int, n: int = 8) -> list[tuple[int, int]]:
    low = [t for t in range(N) if not t >> factor & 1][:n]
    return [(t, t | 1 << factor) for t in low]


# -- closed form -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_free_factors_are_orthogonal_under_every_mixing_and_not_in_plain_space(seed: int) -> None:
    hm = factored(seed)
    found = causal_concepts(hm, {f"f{i}": pairs_of(i) for i in range(K)}, n_random=500)
    torch.testing.assert_close(found.causal, torch.eye(K, dtype=torch.float64), atol=1e-5, rtol=0)
    assert found.off_diagonal("euclidean") > 0.2 > 1e-5 > found.off_diagonal()
    assert not found.raised and not found.dropped
    for loo in found.loo.values():  # a flip is 2, in the units in which a factor's spread is 1
        torch.testing.assert_close(loo, torch.full_like(loo, 2.0), atol=1e-5, rtol=0)


def test_products_of_tokens_do_not_depend_on_the_mixing() -> None:
    a, b = (causal_geometry(factored(seed)) for seed in (0, 1))
    ids = torch.tensor([3, 17, 44])
    held = []
    for geometry in (a, b):
        gamma = geometry.unembedding(ids)
        held.append(geometry.inner(gamma[:, None], gamma[None]))
    torch.testing.assert_close(held[0], held[1], atol=1e-4, rtol=0)
    z = factors()[ids].double()
    torch.testing.assert_close(held[0], z @ z.T, atol=1e-4, rtol=0)
    plain = [g.unembedding(ids) @ g.unembedding(ids).T for g in (a, b)]
    assert float((plain[0] - plain[1]).abs().max()) > 0.5


@pytest.mark.parametrize("norm", ["rms", "layer", "none"])
def test_steering_moves_its_own_factor_and_no_other(norm: str) -> None:
    if norm == "none":
        hm = factored(0, norm=norm)
        with pytest.raises(Exception, match="no final norm"):
            causal_geometry(hm).steer(causal_geometry(hm).concept(pairs_of(2)))
        return
    hm = factored(0, norm=norm)
    geometry = causal_geometry(hm)
    direction = geometry.steer(geometry.concept(pairs_of(2), name="two"))
    assert direction.sites == ["ln_final.out"] and direction.name == "two"
    ids = torch.tensor([[5, 9, 33, 60]])
    before = hm.run(ids, logits="last").logits[0, 0].double()
    after = hm.run(ids, write=direction.as_interventions(0.7), logits="last").logits[0, 0].double()
    torch.testing.assert_close(after - before, 0.7 * factors()[:, 2].double(), atol=1e-5, rtol=0)


def test_whitened_states_and_words_have_the_products_of_the_model() -> None:
    geometry = causal_geometry(factored(0))
    states, gamma = torch.randn(4, K).double(), geometry.unembedding(torch.arange(N))
    torch.testing.assert_close(geometry.whiten_states(states) @ geometry.whiten(gamma).T, states @ gamma.T)
    g = geometry.whiten(gamma)
    torch.testing.assert_close(g.T @ g / N, torch.eye(K, dtype=torch.float64), atol=1e-5, rtol=0)


# -- what is left out --------------------------------------------------------------------------------------------


def test_rows_that_no_token_uses_are_left_out() -> None:
    hm = factored(0, extra=5)
    W: Any = hm.model
    with torch.no_grad():
        W.lm_head.weight[N : N + 2] = 0
        W.lm_head.weight[N + 2 : N + 4] = 40.0
        W.lm_head.weight[N + 4] = torch.linspace(-90, 90, K)
    geometry = causal_geometry(hm, drop=[N + 4])
    assert dict(geometry.dropped) == {"zero": 2, "equal to another": 2, "dropped": 1}
    clean = causal_geometry(factored(0))
    torch.testing.assert_close(geometry.covariance, clean.covariance)
    assert float((causal_geometry(hm).covariance - clean.covariance).abs().max()) > 1
    larger = HookManager.load(nano(NanoOptions(d_vocab=VOCAB + 8, d_model=16)), word_tokenizer())
    assert causal_geometry(larger).dropped == {"not in the tokenizer": 8}


def test_directions_without_variance_have_a_floor() -> None:
    hm = factored(0)
    W: Any = hm.model
    with torch.no_grad():
        flat = factors() @ mixing(0)
        flat[:, 0] = 0
        W.lm_head.weight[:] = flat
    geometry = causal_geometry(hm)
    assert geometry.raised == 1 and bool(geometry.power(-1.0).isfinite().all())
    assert geometry.floor == pytest.approx(1e-6 * float(geometry.values[-1]))


@pytest.mark.parametrize("family", ["Gemma2", "Granite", "Cohere", "GPT2"])
def test_logit_scales_soft_caps_and_norms(family: str) -> None:
    hm = manager(family)
    geometry = causal_geometry(hm)
    g = geometry.whiten(geometry.unembedding(torch.arange(VOCAB)))
    torch.testing.assert_close(g.T.cov(correction=0), torch.eye(hm.d_model, dtype=torch.float64), atol=1e-5, rtol=0)
    concept = geometry.concept([(3, 50), (4, 60), (5, 70)])
    direction = geometry.steer(concept)
    assert bool(direction.notes[1:]) == (family == "Gemma2")
    runs = [hm.run(tokens(), write=w, logits="last") for w in ([], direction.as_interventions(0.5))]
    cap = 3.0 if family == "Gemma2" else None
    plain = [r.logits[:, 0].double() if cap is None else cap * torch.atanh(r.logits[:, 0].double() / cap) for r in runs]
    expected = 0.5 * geometry.inner(geometry.unembedding(torch.arange(len(geometry.kept))), concept.vector)
    change = plain[1] - plain[0]
    if cap is not None:  # where the cap is reached there is no digit left to compare
        near = (runs[0].logits[:, 0].abs() < 0.9 * cap) & (runs[1].logits[:, 0].abs() < 0.9 * cap)
        assert int(near.sum()) > 50
        change, expected = change[near], expected.expand_as(change)[near]
    else:
        expected = expected.expand_as(change)
    torch.testing.assert_close(change, expected, atol=1e-4, rtol=1e-3)


# -- the small world ---------------------------------------------------------------------------------------------

BLOCKS = {
    "singular": "noun",
    "noun": "noun",
    "verb": "verb",
    "adjective": "adjective",
    "country": "country",
    "he": "he",
}


@pytest.fixture(scope="module")
def world() -> CausalConcepts:
    return causal_concepts(HookManager.load("testbed"), world_word_pairs(), n_random=4000)


def test_concepts_of_the_small_world_are_blocks_by_the_words_that_they_share(world: CausalConcepts) -> None:
    kind = [f"{name} alone" if "antonym" in name else BLOCKS[name.split()[0]] for name in world.names]
    same = torch.tensor([[a == b for b in kind] for a in kind]) & ~torch.eye(len(kind), dtype=torch.bool)
    other = torch.tensor([[a != b for b in kind] for a in kind])
    assert float(world.causal[same].min()) > 0.4
    assert float(world.causal[other].abs().mean()) < 0.07 < 0.14 < float(world.euclidean[other].abs().mean())
    assert float(world.causal[other].abs().max()) < 0.3 < 0.5 < float(world.euclidean[other].abs().max())
    assert not any(world.skipped.values())


def test_left_out_pairs_are_told_from_random_ones_unless_there_is_no_concept(world: CausalConcepts) -> None:
    assert world.auroc["adjective - antonym"] < 0.85
    assert min(v for name, v in world.auroc.items() if "antonym" not in name) > 0.95
    hm = HookManager.load("testbed")
    geometry = causal_geometry(hm)
    draw = torch.Generator().manual_seed(1)
    nothing = [
        geometry.concept(
            [(int(a), int(b)) for a, b in torch.randint(300, 1300, (40, 2), generator=draw)], n_random=1000
        )
        for _ in range(8)
    ]
    assert sum(c.auroc for c in nothing) / 8 == pytest.approx(0.5, abs=0.08)


def test_the_result_shows_itself_and_comes_back(world: CausalConcepts, tmp_path: Path) -> None:
    assert "12 concepts" in world.summary() and len(world.to_frame()) == 12
    assert len(world.plot().data[0]["z"]) == 12 and world.plot("euclidean").data
    again = Result.load(world.save(tmp_path / "c"))
    assert isinstance(again, CausalConcepts) and torch.equal(again.causal, world.causal)


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_is_refused() -> None:
    hm = factored(0)
    geometry: CausalGeometry = causal_geometry(hm)
    with pytest.raises(DataError, match="1 usable pairs"):
        geometry.concept([(1, 2)])
    with pytest.raises(DataError, match="differences of 'x' cancel"):
        geometry.concept([(1, 2), (2, 1)], name="x")
    with pytest.raises(DataError, match=r"the pair \(1, 1\)"):
        geometry.concept([(1, 1), (2, 3)])
    with pytest.raises(ConfigError, match="floor=0"):
        causal_geometry(hm, floor=0.0)
    with pytest.raises(DataError, match="token 64 is outside"):
        causal_geometry(hm, drop=[64])
    with pytest.raises(DataError, match="no concepts"):
        causal_concepts(hm, {})
    worded = manager("GPT2")
    with pytest.raises(DataError, match="not single tokens: w1 w2 - w3"):
        causal_geometry(worded).concept([("w1 w2", "w3"), ("w4", "w5")])


@pytest.mark.usefixtures("unchecked")
def test_pairs_that_are_no_pairs_and_no_random_ones_are_refused() -> None:
    geometry = causal_geometry(manager("GPT2"))
    with pytest.raises(DataError, match=r"\(1, 2, 3\) among its pairs"):
        geometry.concept([(1, 2, 3), (4, 5)])  # type: ignore[list-item]
    with pytest.raises(DataError, match="'ab' among its pairs"):
        geometry.concept(["ab", "cd"])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="n_random=0"):
        geometry.concept([(1, 2), (4, 5)], n_random=0)
