"""Agreement of directions: permuted, flipped and scaled copies, closed forms, and scipy and SVD beside."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from interp.core.errors import ConfigError, DataError, ShapeError
from interp.core.result import Result
from interp.dictionaries.topk import TopKSAE
from interp.evaluate import agreement
from interp.evaluate.agreement import best_cosines, decoder_geometry, matched_cosine, mmcs, stability, uniqueness


def sae(W_dec: Tensor, W_enc: Tensor | None = None) -> TopKSAE:
    """An SAE with these weights, whose latents are the ReLU of all pre-activations."""
    d_sae, d_in = W_dec.shape
    found = TopKSAE.from_cfg({"architecture": "topk", "d_in": d_in, "d_sae": d_sae, "k": d_sae})
    with torch.no_grad():
        found.W_dec.copy_(W_dec)
        found.W_enc.copy_(W_dec.T if W_enc is None else W_enc)
    return found.requires_grad_(False)


def cosines(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(a[:, None].double(), b[None].double(), dim=-1)


def test_a_permuted_and_scaled_copy_agrees_wholly_and_a_flipped_one_only_by_magnitude() -> None:
    a = torch.randn(12, 8)
    order = torch.randperm(12)
    b = a[order] * (torch.rand(12, 1) + 0.5)
    assert mmcs(a, b) == pytest.approx((1, 1)) and uniqueness(a, b) == 1
    found = matched_cosine(a, b)
    assert found.mean == pytest.approx(1) and torch.equal(order[found.b], found.a)
    flipped = matched_cosine(a, -b, absolute=True)
    assert flipped.mean == pytest.approx(1) and torch.allclose(flipped.cosine, -torch.ones(12).double())
    assert matched_cosine(a, -b).mean < 0.9 and mmcs(a, -b).forward < 0.95
    assert mmcs(a, -b, absolute=True) == pytest.approx((1, 1))


def test_the_matching_is_the_best_of_all_permutations() -> None:
    a, b = torch.randn(5, 4), torch.randn(7, 4)
    table = cosines(a, b)
    best = max(float(table[range(5), list(order)].mean()) for order in itertools.permutations(range(7), 5))
    found = matched_cosine(a, b)
    assert found.mean == pytest.approx(best) and torch.allclose(found.cosine, table[found.a, found.b])
    # Greedy is not best: it takes each row's nearest, twice if need be.
    assert found.mean < float(table.max(1).values.mean())
    assert matched_cosine(b, a).mean == pytest.approx(best)


@pytest.mark.parametrize("most", [1 << 24, 10])
def test_cosines_do_not_depend_on_the_chunk(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "_MOST_COSINES", most)
    a, b = torch.randn(9, 6), torch.randn(5, 6)
    a[3] = 0
    table = cosines(a, b)
    best, at = best_cosines(a, b)
    assert torch.allclose(best, table.max(1).values) and torch.equal(at, table.max(1).indices)
    forward, backward = mmcs(a, b, absolute=True)
    assert forward == pytest.approx(float(table.abs().max(1).values.mean()))
    assert backward == pytest.approx(float(table.abs().max(0).values.mean()))
    assert uniqueness(a, b) == len(table.abs().argmax(1).unique()) / 9
    geometry = decoder_geometry(sae(a))
    others = cosines(a, a).fill_diagonal_(-2)
    others[:, 3] = -2
    assert torch.allclose(geometry.nearest[:3], others.max(1).values[:3])
    assert torch.equal(geometry.nearest_at[4:], others.max(1).indices[4:]) and geometry.n_zero == 1
    assert math.isnan(float(geometry.nearest[3])) and int(geometry.nearest_at[3]) == -1


def test_random_directions_agree_as_much_as_chance_says() -> None:
    # cos² of two random directions in d dimensions has mean 1 / d: the null of a matching over many.
    a, b = torch.randn(200, 400), torch.randn(200, 400)
    assert 2 / 20 < mmcs(a, b).forward < 3.5 / 20
    assert 1 / 20 < matched_cosine(a, b).mean < mmcs(a, b).forward


def test_stability_between_seeds_knows_a_copy_from_a_stranger() -> None:
    a, b = torch.randn(10, 6), torch.randn(14, 6)
    found = stability({"one": sae(a), "two": sae(a.flip(0)), "other": b})
    assert float(found.mmcs[0, 1]) == pytest.approx(1) == pytest.approx(float(found.matched[1, 0]))
    assert float(found.mmcs[0, 2]) == pytest.approx(mmcs(a, b).forward)
    assert float(found.mmcs[2, 0]) == pytest.approx(mmcs(a, b).backward)
    assert torch.equal(found.matched, found.matched.T) and torch.allclose(found.mmcs.diag(), torch.ones(3).double())
    frame = found.to_frame()
    assert len(frame) == 6 and frame["one"][0] == "one" and frame["other"][0] == "two"
    assert "least" in found.summary() and len(found.plot().data) == 1
    loose = stability({"one": a, "other": b}, match=False)
    assert bool(loose.matched.isnan().all()) and "matched" not in loose.summary()


@pytest.mark.parametrize(("n", "rank"), [(6, 6), (20, 3), (3, 3)])
def test_the_rank_of_equal_directions_is_their_number(n: int, rank: int) -> None:
    basis = torch.linalg.qr(torch.randn(6, 6)).Q[:rank]
    rows = basis.repeat(-(-n // rank), 1)[:n] if n % rank == 0 else basis.repeat(7, 1)[: n - n % rank]
    found = decoder_geometry(sae(rows * torch.linspace(1, 5, len(rows))[:, None]))
    assert found.effective_rank == pytest.approx(rank, rel=1e-4)
    assert found.participation == pytest.approx(rank, rel=1e-4)
    assert torch.allclose(found.norms, torch.linspace(1, 5, len(rows)).double())


def test_the_geometry_is_that_of_svd_and_does_not_turn_with_the_space() -> None:
    W, turn = torch.randn(30, 8), torch.linalg.qr(torch.randn(8, 8)).Q
    E = torch.randn(8, 30)
    E[:, 4] = 0
    found, turned = decoder_geometry(sae(W, E)), decoder_geometry(sae(W @ turn, turn.T @ E))
    values = torch.linalg.svdvals(W.double() / W.double().norm(dim=1, keepdim=True))
    share = values / values.sum()
    assert found.effective_rank == pytest.approx(float((-share * share.log()).sum().exp()), rel=1e-6)
    assert found.participation == pytest.approx(float(values.pow(2).sum() ** 2 / values.pow(4).sum()), rel=1e-6)
    assert turned.effective_rank == pytest.approx(found.effective_rank, rel=1e-5)
    torch.testing.assert_close(turned.nearest, found.nearest, atol=1e-5, rtol=0)
    expected = torch.nn.functional.cosine_similarity(W, E.T, dim=1).double()
    torch.testing.assert_close(found.encoder_cosine[:4], expected[:4], atol=1e-5, rtol=0)
    assert math.isnan(float(found.encoder_cosine[4])) and "effective rank" in found.summary()
    assert len(found.to_frame()) == 30 and sum(found.plot().data[0].y) == 30


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_compared_is_refused_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    a = torch.randn(4, 3)
    with pytest.raises(ShapeError, match="3 and 5 dimensions"):
        mmcs(a, torch.randn(4, 5))
    with pytest.raises(ShapeError, match="at least one row"):
        mmcs(a, torch.empty(0, 3))
    with pytest.raises(DataError, match="1 of 4 directions are NaN or infinite, the first is 2"):
        uniqueness(a, a.index_fill(0, torch.tensor([2]), math.nan))
    with pytest.raises(ConfigError, match="at least two seeds"):
        stability({"one": a})
    monkeypatch.setattr(agreement, "_MOST_MATCHED", 15)
    with pytest.raises(ConfigError, match="take mmcs, which has no limit"):
        matched_cosine(a, a)


def test_results_come_back_from_a_folder(tmp_path) -> None:  # type: ignore[no-untyped-def]
    found = decoder_geometry(sae(torch.randn(5, 4)))
    assert Result.load(found.save(tmp_path / "geometry")).summary() == found.summary()
    both = stability({"a": torch.randn(5, 4), "b": torch.randn(5, 4)})
    assert Result.load(both.save(tmp_path / "stability")).summary() == both.summary()
