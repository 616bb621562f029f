"""Scores against planted atoms equal those of SAELens' own evaluation on the same dictionary and data."""

from typing import Any

import pytest
import torch
from torch import Tensor

from interp.dictionaries.interop import to_sae_lens
from interp.dictionaries.topk import TopKSAE
from interp.evaluate.planted import PlantedWorld, planted_scores

# SAELens imports a module that TransformerLens has moved.
pytestmark = pytest.mark.filterwarnings("ignore:The 'utils' module has been deprecated:DeprecationWarning")


class Given(torch.nn.Module):
    """Codes that are at hand, a batch at a time, where SAELens wants a generator of them."""

    def __init__(self, codes: Tensor) -> None:
        super().__init__()
        self.codes, self.at = codes, 0

    def sample(self, n: int) -> Tensor:
        self.at += n
        return self.codes[self.at - n : self.at]


def random_sae(d: int, d_sae: int, k: int, atoms: Tensor) -> TopKSAE:
    """Some atoms, moved a little, and random rows; a latent that never fires; rows of several norms."""
    sae = TopKSAE.from_cfg({"architecture": "topk", "d_in": d, "d_sae": d_sae, "k": k})
    rows = torch.randn(d_sae, d) / d**0.5
    rows[: d_sae // 2] = atoms[: d_sae // 2] + 0.3 * rows[: d_sae // 2]
    with torch.no_grad():
        sae.W_dec.copy_(rows * (torch.rand(d_sae, 1) + 0.5))
        sae.W_enc.copy_(rows.T)
        sae.b_enc.copy_(-0.1 * torch.rand(d_sae))
        sae.b_enc[3] = -100
        sae.b_dec.copy_(torch.randn(d) / 10)
    return sae.requires_grad_(False)


@pytest.mark.parametrize("structure", ["independent", "pairs", "hierarchy"])
@pytest.mark.parametrize("sizes", [(30, 16, 20, 4), (12, 24, 40, 6)])
def test_each_score_equals_the_one_of_sae_lens_that_its_description_names(
    structure: Any, sizes: tuple[int, int, int, int]
) -> None:
    from sae_lens.synthetic import FeatureDictionary, eval_sae_on_synthetic_data

    n_atoms, d, d_sae, k = sizes
    world = PlantedWorld(n_atoms, d, density=0.15, structure=structure, seed=5)
    x, codes = world.sample(3000, seed=7)
    atoms = torch.cat([world.atoms, world.atoms])
    sae = random_sae(d, d_sae, k, atoms)
    truth = FeatureDictionary(n_atoms, d, bias=False, initializer=None)
    with torch.no_grad():
        truth.feature_vectors.copy_(world.atoms)
    generator: Any = Given(codes)
    theirs = eval_sae_on_synthetic_data(to_sae_lens(sae), truth, generator, num_samples=3000, batch_size=700)
    ours = planted_scores(sae, world.atoms, codes, x)
    pairs = {
        "mcc": theirs.mcc,
        "uniqueness": theirs.uniqueness,
        "precision": theirs.classification.precision,
        "recall": theirs.classification.recall,
        "f1": theirs.classification.f1_score,
        "norm_ratio": theirs.shrinkage,
        "explained_variance": theirs.explained_variance,
        "dead": theirs.dead_latents,
        "l0": theirs.sae_l0,
        "true_l0": theirs.true_l0,
    }
    for name, value in pairs.items():
        assert getattr(ours, name) == pytest.approx(value, abs=1e-5), name
    # Figures that are 0 or 1 under any definition would be no test.
    assert ours.dead >= 1 and ours.uniqueness < 1 and ours.mcc < 0.99 and 0 < ours.f1 < 0.9
    assert len({round(x, 3) for x in (ours.precision, ours.recall, ours.f1, ours.atom_f1)}) == 4
    assert abs(ours.shrinkage - ours.norm_ratio) > 0.01
