"""Scores against planted atoms: dictionaries that know them, half of them, or none; and the worlds themselves."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from interp.core.errors import ConfigError, DataError, ShapeError
from interp.core.result import Result
from interp.dictionaries.topk import TopKSAE
from interp.evaluate.planted import PlantedScores, PlantedWorld, planted_scores


def sae_of(rows: Tensor, *, bias: float = -1e-3) -> TopKSAE:
    """Latents ReLU(x · row + bias), decoded by the rows."""
    d_sae, d_in = rows.shape
    found = TopKSAE.from_cfg({"architecture": "topk", "d_in": d_in, "d_sae": d_sae, "k": d_sae})
    with torch.no_grad():
        found.W_enc.copy_(rows.T)
        found.W_dec.copy_(rows)
        found.b_enc.fill_(bias)
    return found.requires_grad_(False)


def scored(world: PlantedWorld, sae: TopKSAE, n: int = 4000) -> PlantedScores:
    x, codes = world.sample(n, seed=1)
    return planted_scores(sae, world.atoms, codes, x)


@pytest.mark.parametrize("structure", ["independent", "pairs", "hierarchy"])
def test_a_dictionary_of_the_atoms_scores_one_whatever_their_order_and_scale(structure: Any) -> None:
    world = PlantedWorld(16, 24, structure=structure)
    order = torch.randperm(16)
    sae = sae_of(world.atoms[order])
    with torch.no_grad():
        sae.W_dec.mul_(4)
        sae.W_enc.div_(4)
        sae.b_enc.div_(4)
    found = scored(world, sae)
    for name in ("mmcs", "coverage", "mcc", "uniqueness", "precision", "recall", "f1", "atom_f1"):
        assert getattr(found, name) == pytest.approx(1, abs=1e-6), name
    assert found.shrinkage == pytest.approx(1, abs=2e-3) and found.norm_ratio == pytest.approx(1, abs=0.05)
    assert found.explained_variance > 0.999 and found.dead == 0 and found.l0 == found.true_l0
    assert torch.equal(order[found.matched], torch.arange(16)) and torch.equal(found.nearest, order)


def test_half_of_the_atoms_a_latent_twice_and_one_that_never_fires() -> None:
    world = PlantedWorld(8, 12)
    rows = torch.cat([world.atoms[:4], world.atoms[:1], -world.atoms[7:]])
    found = scored(world, sae_of(rows), n=20_000)
    assert found.mmcs == pytest.approx(1) and found.uniqueness == 5 / 6 and found.dead == 1
    # The pair of atom 0's second latent is some atom it has cosine 0 with: five of six pairs are whole.
    assert found.mcc == pytest.approx(5 / 6, abs=1e-6) and found.coverage == pytest.approx(5 / 8, abs=1e-6)
    assert found.latent_f1.tolist() == pytest.approx([1, 1, 1, 1, 1, 0])
    assert found.latent_recall.tolist()[5] == 0 and found.f1 == pytest.approx(5 / 6)
    assert int((found.matched >= 0).sum()) == 6 and int(found.cosine.isnan().sum()) == 2
    # Atoms are orthonormal: each has an eighth of the variance, and atom 0 is written twice, which is as bad as never.
    assert found.explained_variance == pytest.approx(3 / 8, abs=0.05)


def test_shrinkage_precision_and_recall_are_what_was_built() -> None:
    world = PlantedWorld(6, 6, density=0.2)
    found = scored(world, sae_of(world.atoms, bias=-0.5), n=30_000)
    # Magnitudes are even on 0.5 … 1.5: half is taken off a mean of 1.
    assert found.shrinkage == pytest.approx(0.5, abs=0.01) and found.recall == pytest.approx(1)
    late = scored(world, sae_of(world.atoms, bias=-1.0), n=30_000)
    # Those above 1 alone fire, a quarter of 1.25 left.
    assert late.recall == pytest.approx(0.5, abs=0.02) and late.precision == 1
    assert late.shrinkage == pytest.approx(0.2, abs=0.01) and late.f1 == pytest.approx(2 / 3, abs=0.02)
    always = scored(world, sae_of(world.atoms, bias=1.0), n=30_000)
    assert always.recall == 1 and always.precision == pytest.approx(0.2, abs=0.01) and always.l0 == 6


def test_random_directions_score_what_chance_gives() -> None:
    world = PlantedWorld(64, 64, seed=5)
    found = scored(world, sae_of(torch.linalg.qr(torch.randn(64, 64)).Q, bias=-0.3))
    # |cos| of a random direction with its nearest of 64: about √(2 ln 64 / 64) = 0.36; matched it is less.
    assert found.mmcs == pytest.approx(0.33, abs=0.04) and 0.2 < found.mcc < found.mmcs
    assert found.f1 < 0.5 < scored(world, sae_of(world.atoms)).f1


def test_the_parts_in_which_latents_are_made_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    world = PlantedWorld(10, 8, noise=0.1, seed=5)
    sae = sae_of(torch.randn(12, 8))
    expected = scored(world, sae, n=300)
    monkeypatch.setattr("interp.evaluate.reading._MOST_LATENTS", 12 * 7)
    found = scored(world, sae, n=300)
    frames = [found.to_frame(), expected.to_frame()]
    assert frames[0]["value"].tolist() == pytest.approx(frames[1]["value"].tolist())
    turn = torch.linalg.qr(torch.randn(8, 8)).Q
    x, codes = world.sample(300, seed=1)
    turned = planted_scores(sae_of(sae.W_dec @ turn), world.atoms @ turn, codes, x @ turn)
    assert turned.to_frame()["value"].tolist() == pytest.approx(frames[1]["value"].tolist(), abs=0.01)
    assert turned.mcc == pytest.approx(expected.mcc, abs=1e-6)


def test_the_interval_of_the_explained_variance_holds_the_truth() -> None:
    world = PlantedWorld(8, 8, noise=0.2)
    sae = sae_of(world.atoms, bias=-0.3)
    truth, held = scored(world, sae, n=100_000).explained_variance, 0
    for seed in range(40):
        x, codes = world.sample(800, seed=seed + 10)
        low, high = planted_scores(sae, world.atoms, codes, x).intervals["explained_variance"]
        held += low <= truth <= high
    assert held >= 33  # 38 are expected, with a standard deviation of 1.4


# -- worlds -----------------------------------------------------------------------------------------------------------


def test_independent_atoms_come_at_their_density_and_make_up_the_activation() -> None:
    world = PlantedWorld(20, 30, density=0.1, seed=3)
    x, codes = world.sample(20_000, seed=0)
    on = (codes > 0).double()
    assert torch.allclose(on.mean(0), torch.full((20,), 0.1).double(), atol=0.01)
    assert float((torch.corrcoef(on.T) - torch.eye(20)).abs().max()) < 0.04
    assert codes[codes > 0].min() >= 0.5 and codes.max() <= 1.5
    assert torch.allclose(x @ world.atoms.T, codes, atol=1e-5)
    assert torch.allclose(world.atoms @ world.atoms.T, torch.eye(20), atol=1e-5)


def test_pairs_have_the_correlation_and_children_the_parent_that_were_asked_for() -> None:
    pairs = PlantedWorld(4, 4, density=0.2, structure="pairs", coupling=0.6).sample(50_000, seed=0)[1] > 0
    table = torch.corrcoef(pairs.double().T)
    assert float(table[0, 1]) == pytest.approx(0.6, abs=0.02) == pytest.approx(float(table[2, 3]), abs=0.02)
    assert abs(float(table[0, 2])) < 0.02 and torch.allclose(
        pairs.double().mean(0), torch.tensor(0.2).double(), atol=0.01
    )
    tree = PlantedWorld(4, 4, density=0.3, structure="hierarchy", coupling=0.4).sample(50_000, seed=0)[1] > 0
    assert not bool((tree[:, 1] & ~tree[:, 0]).any()) and not bool((tree[:, 3] & ~tree[:, 2]).any())
    assert float(tree[tree[:, 0], 1].double().mean()) == pytest.approx(0.4, abs=0.02)


def test_noise_has_its_size_more_atoms_than_dimensions_have_norm_one_and_seeds_decide() -> None:
    world = PlantedWorld(40, 10, noise=0.3)
    x, codes = world.sample(5000, seed=2)
    assert float((x - codes @ world.atoms).std()) == pytest.approx(0.3, abs=0.01)
    assert torch.allclose(world.atoms.norm(dim=1), torch.ones(40))
    assert torch.equal(world.sample(50, seed=2)[0], PlantedWorld(40, 10, noise=0.3).sample(50, seed=2)[0])
    assert not torch.equal(world.atoms, PlantedWorld(40, 10, seed=1).atoms)
    assert not torch.equal(world.sample(50, seed=3)[0], world.sample(50, seed=2)[0])


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_together_is_refused() -> None:
    world = PlantedWorld(6, 4)
    x, codes = world.sample(20, seed=0)
    sae = sae_of(torch.randn(5, 4))
    with pytest.raises(ShapeError, match=r"expected \[n d\]"):
        planted_scores(sae, world.atoms, codes[:, :5], x)
    with pytest.raises(ShapeError, match="d_in 3"):
        planted_scores(sae_of(torch.randn(5, 3)), world.atoms, codes, x)
    with pytest.raises(DataError, match="x are NaN or infinite at 1 places"):
        planted_scores(sae, world.atoms, codes, x.index_put((torch.tensor(3), torch.tensor(1)), torch.tensor(math.nan)))
    with pytest.raises(DataError, match="a code is below 0"):
        planted_scores(sae, world.atoms, -codes - 1, x)
    with pytest.raises(DataError, match="that do not differ"):
        planted_scores(sae, world.atoms, codes, torch.ones_like(x))
    faults: list[dict[str, Any]] = [{"density": 0.0}, {"coupling": 2.0}, {"structure": "tree"}, {"structure": "pairs"}]
    for wrong in faults:
        with pytest.raises(ConfigError):
            PlantedWorld(5, 4, **wrong)


def test_the_table_the_picture_and_the_folder_hold_it_all(tmp_path) -> None:  # type: ignore[no-untyped-def]
    found = scored(PlantedWorld(6, 4, seed=5), sae_of(torch.randn(5, 4)), n=100)
    frame = found.to_frame().set_index("figure")
    assert frame.loc["mcc", "value"] == found.mcc and len(found.plot().data[0].y) == 6
    loaded = Result.load(found.save(tmp_path / "planted"))
    assert loaded.summary() == found.summary()
