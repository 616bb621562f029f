"""Sparse probes through a model: planted neurons, controls, pruning, latents of a dictionary, neurons of the world."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from interp.core.errors import ConfigError, DataError, SiteError
from interp.core.result import Result
from interp.data.contrast import Contrast
from interp.data.gather import gather
from interp.dictionaries.topk import TopKConfig, TopKSAE
from interp.probing.detect import detect
from interp.probing.linear import ProbeOptions, fit_probe
from interp.probing.sparse import SparseOptions, sparse_probe
from interp.probing.sparse_result import SparseProbes
from tests.families import manager
from tests.planted_probe import SITE, planted, planted_rows

FEW = SparseOptions(n_bootstrap=60, stability=3, table=4)
PLANTED = [30, 120, 180]


def neurons(n: int = 600, d: int = 200, *, gap: float = 2.0) -> tuple[Tensor, Tensor]:
    """ReLU-like units: three fire more for the class, the first twenty never."""
    draw = torch.Generator().manual_seed(5)
    y = torch.arange(n) % 2
    x = torch.randn(n, d, generator=draw)
    x[:, PLANTED] += gap * y[:, None]
    x = x.relu()
    x[:, :20] = 0
    return x, y


def rows(y: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(len(y)).reshape(-1, 10), y.reshape(-1, 10)


def test_planted_neurons_are_found_tested_on_other_groups_and_controls_find_nothing(tmp_path: Path) -> None:
    x, y = neurons()
    found = sparse_probe(planted(x), planted_rows(*rows(y)), SITE, k=(3, 1, 12), options=FEW)
    assert found.k == [1, 3, 12] and found.chosen(3) == PLANTED and set(found.chosen(1)) < set(PLANTED)
    assert found.n_dead == [20] and not set(found.chosen(12)) & set(range(20))
    assert found.get("mcc", 3).low > found.get("mcc", 1).mean > 0.4
    assert found.get("mcc", 3).mean > found.get("mcc", 12).mean - 0.05
    assert abs(found.get("mcc", 3, task="control").mean) < 0.2 > abs(found.get("mcc", 3, task="shuffled").mean)
    assert found.get("selectivity", 3).low > 0.2
    assert float(found.stability[0, 1]) == 1.0 > float(found.stability[0, 2])
    table = found.neurons()
    assert sorted(table["unit"][:3]) == PLANTED and list(table["smallest_k"][:3].isna()) == [False] * 3
    by_hand = x[:, PLANTED] @ found.weights[SITE][1, [found.units[SITE][1].tolist().index(u) for u in PLANTED]].float()
    truth = fit_probe(planted(x[:, PLANTED]), planted_rows(*rows(y)), SITE, options=ProbeOptions(n_bootstrap=0))
    assert float(torch.corrcoef(torch.stack([by_hand, detect(truth, x[:, PLANTED])]))[0, 1]) > 0.99
    again = SparseProbes.load(found.save(tmp_path / "sparse"))
    assert again.summary() == found.summary() and isinstance(Result.load(tmp_path / "sparse"), SparseProbes)
    assert len(again.plot(metric="auroc").data) == 3 and len(again.to_frame()) == 3 * (3 * 6 + 2)


def test_shuffled_labels_have_no_selectivity_and_words_that_come_again_take_it_away() -> None:
    x, y = neurons()
    none = sparse_probe(planted(x), planted_rows(*rows(y)).shuffled(seed=3), SITE, k=(1, 4), options=FEW)
    for k in (1, 4):
        assert none.get("selectivity", k).low < 0 < none.get("selectivity", k).high
        assert abs(none.get("auroc", k).mean - 0.5) < 0.15
    words = torch.eye(24)
    ids = torch.randint(24, (80, 10), generator=torch.Generator().manual_seed(1))
    found = sparse_probe(planted(words), planted_rows(ids, ids % 2), SITE, k=(24,), options=FEW)
    assert found.get("accuracy", 24).mean == found.get("accuracy", 24, task="control").mean == 1.0


def test_pruning_tells_three_neurons_from_a_concept_that_many_hold() -> None:
    x, y = neurons()
    few = sparse_probe(planted(x), planted_rows(*rows(y)), SITE, k=(1,), options=SparseOptions(prune=4, n_bootstrap=0))
    many = torch.randn(600, 200) + 0.9 * y[:, None]
    spread = sparse_probe(
        planted(many), planted_rows(*rows(y)), SITE, k=(1,), options=SparseOptions(prune=4, n_bootstrap=0)
    )
    few_auroc, many_auroc = (f.pruned[SITE][:, 2, 0] for f in (few, spread))
    assert bool((few_auroc[:3] > 0.8).all()) and bool((few_auroc[3:] < 0.65).all())
    assert bool((many_auroc > 0.65).all()) and few.pruned[SITE].shape == (5, 6, 3)


def test_latents_of_a_dictionary_are_units() -> None:
    hm = manager("GPT2")
    dictionary = TopKSAE(TopKConfig(d_in=hm.d_model, d_sae=40, k=8, metadata={"hook_name": "blocks.0.hook_resid_post"}))
    texts = [f"w{i} w{j}" for i in range(2, 10) for j in range(2, 10)]
    data = Contrast.make(texts[:32], texts[32:], paired=False)
    with pytest.raises(DataError, match=r"no unit of 0.resid_post changes"):
        sparse_probe(hm, data, k=(2,), dictionary=dictionary, options=FEW)  # its weights are zero yet
    x = gather(hm, data.tokens(hm), "0.resid_post")["0.resid_post"].x
    dictionary.init_from(x, seed=0)
    found = sparse_probe(hm, data, k=(40,), dictionary=dictionary, options=FEW)
    assert found.sites == ["0.resid_post"] and found.kind == "latent" and found.n_units == [40]
    with torch.no_grad():
        latents = dictionary.encode(x)
    fires = (latents.amax(0) > latents.amin(0)).nonzero()[:, 0].tolist()
    assert set(found.chosen(40)) <= set(fires) and len(found.chosen(40)) + found.n_dead[0] == 40
    with pytest.raises(ConfigError, match="reads one site"):
        sparse_probe(hm, data, ["0.resid_post", "1.resid_post"], dictionary=dictionary)
    with pytest.raises(ConfigError, match="which sites"):
        sparse_probe(hm, data)


@pytest.mark.usefixtures("unchecked")
def test_wrong_sizes_classes_and_names_are_refused() -> None:
    x, y = neurons(120)
    hm, data = planted(x), planted_rows(*rows(y))
    with pytest.raises(ConfigError, match="at least 1"):
        sparse_probe(hm, data, SITE, k=(0, 1))
    with pytest.raises(ConfigError, match="did you mean 'mutual_information'"):
        sparse_probe(hm, data, SITE, ranking="mutual-information")
    with pytest.raises(DataError, match="choose one with"):
        sparse_probe(hm, planted_rows(data.tokens.ids, data.tokens.ids % 3, classes=("a", "b", "c")), SITE, k=(1,))
    with pytest.raises(ConfigError, match="prefilter=0"):
        SparseOptions(prefilter=0)
    found = sparse_probe(hm, data, SITE, k=(1,), options=FEW)
    with pytest.raises(ConfigError, match="k=5 was not tried"):
        found.chosen(5)
    with pytest.raises(SiteError, match="no probe at"):
        found.get(site="0.resid_post")
