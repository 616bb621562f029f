"""Linear probes: planted directions and closed forms, controls, splits by group, and the labels of the small world."""

import math
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from interp.core.classify import METRICS
from interp.core.direction import Direction
from interp.core.errors import ConfigError, DataError, ModelError, ShapeError, SiteError
from interp.core.manager import HookManager
from interp.core.reinit import reinitialised
from interp.core.result import Result
from interp.core.text import Tokens
from interp.data.concept_tokens import ConceptTokens
from interp.data.contrast import Contrast
from interp.data.gather import gather
from interp.data.same_text import row_keys, whole_texts
from interp.probing.detect import Transfer, detect, transfer
from interp.probing.examples import FIT, TASKS, TEST, Split, control_labels, split_groups
from interp.probing.fitters import KINDS
from interp.probing.linear import ProbeOptions, fit_probe
from interp.probing.result import ProbeResult
from interp.testbed import concepts
from tests.families import manager
from tests.planted_probe import SITE, planted, planted_rows

FEW = ProbeOptions(n_bootstrap=100, l2=(100.0, 10.0, 1.0))


def shifted(n: int, d: int, gap: float, *, seed: int = 0, stretch: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Normal examples whose class 1 is `gap` further along a direction; axis 0 is `stretch` times as wide."""
    draw = torch.Generator().manual_seed(seed)
    v = torch.nn.functional.normalize(torch.randn(d, generator=draw), dim=0)
    y = torch.arange(n) % 2
    noise = torch.randn(n, d, generator=draw)
    noise[:, 0] *= stretch
    return noise + gap * y[:, None] * v, y, v


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_planted_direction_is_found_and_its_score_is_the_closed_form(kind: str) -> None:
    x, y, v = shifted(4000, 8, 2.0)
    data = planted_rows(torch.arange(4000).reshape(400, 10), y.reshape(400, 10))
    found = fit_probe(planted(x), data, SITE, kind=kind, options=FEW)
    assert found.direction().cosine(Direction({SITE: v}, "true", found.provenance))[SITE] > 0.99
    expected = torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor(2.0 / math.sqrt(2.0)))
    _, low, high = found.get("auroc")
    assert low - 0.005 < float(expected) < high + 0.005 and found.get("auroc").mean == pytest.approx(
        float(expected), abs=0.02
    )
    # Each token stands once: what a control learns of the fit's tokens says nothing of the test's.
    assert abs(found.get("accuracy", task="control").mean - 0.5) < 0.06
    assert found.get("selectivity").mean == pytest.approx(0.84 - 0.5, abs=0.08)
    assert abs(found.get("auroc", task="shuffled").mean - 0.5) < 0.06


def test_what_else_varies_turns_the_mean_difference_but_not_the_inverse_covariance() -> None:
    x, y, v = shifted(4000, 8, 1.0, stretch=6.0, seed=3)
    # A shift along the wide axis too: it is most of the difference of means, and tells little.
    x[:, 0] += 3.0 * y
    precision = torch.eye(8)
    precision[0, 0] = 1 / 36
    best = torch.nn.functional.normalize(precision @ (v + 3.0 * torch.eye(8)[0]), dim=0)
    hm, data = planted(x), planted_rows(torch.arange(4000).reshape(400, 10), y.reshape(400, 10))
    along = {k: fit_probe(hm, data, SITE, kind=k, options=FEW).direction().unit(SITE) @ best for k in KINDS}
    assert all(float(along[kind]) > 0.97 for kind in ("lda", "mass_mean", "logistic", "ridge"))
    assert float(along["mean_difference"]) < 0.6


def test_words_that_come_again_are_learnt_by_the_control_and_take_the_selectivity_away() -> None:
    draw = torch.Generator().manual_seed(1)
    words, ids = torch.randn(30, 64, generator=draw), torch.randint(30, (80, 10), generator=draw)
    found = fit_probe(planted(words), planted_rows(ids, ids % 2), SITE, options=FEW)
    assert found.get("accuracy").mean > 0.99 and found.get("accuracy", task="control").mean > 0.99
    assert abs(found.get("selectivity").mean) < 0.02
    assert abs(found.get("auroc", task="shuffled").mean - 0.5) < 0.1


def test_what_tells_only_the_group_is_worth_nothing_on_other_groups() -> None:
    """Five rows repeat each word, and words have classes at random: a split that parts the rows of a word leaks."""
    words = torch.cat([torch.randn(60, 64), torch.zeros(300, 64)])
    ids = torch.arange(60).repeat(5)[:, None].repeat(1, 5)
    y = torch.randint(2, (60,)).repeat(5)[:, None].repeat(1, 5)
    ids[:, 4], y[:, 4] = 60 + torch.arange(300), -1  # a token that is not read makes each row another text
    hm = planted(words)
    whole = fit_probe(hm, planted_rows(ids, y, torch.arange(60).repeat(5)), SITE, options=FEW)
    leaking = fit_probe(hm, planted_rows(ids, y), SITE, options=FEW)
    assert whole.get("accuracy").low < 0.55 < 0.7 < leaking.get("accuracy").low


def test_rows_of_one_text_are_on_one_side_of_a_split_whatever_their_groups() -> None:
    words, y = torch.randn(60, 64), torch.randint(2, (60,)).repeat(5)[:, None].expand(300, 4)
    data = planted_rows(torch.arange(60).repeat(5)[:, None].expand(300, 4), y)
    found = fit_probe(planted(words), data, SITE, options=FEW)
    assert found.get("accuracy").low < 0.55 and any("60 texts stand in several rows" in note for note in found.notes)
    fit, held = data.split(0.3)
    assert not set(fit.tokens.ids[:, 0].tolist()) & set(held.tokens.ids[:, 0].tolist())
    assert len(fit) + len(held) == 300 and 50 < len(held) < 130
    tied = planted_rows(torch.zeros(30, 4, dtype=torch.long), (torch.arange(30) % 2)[:, None].expand(30, 4))
    assert "also fitted on" in whole_texts(tied).notes[-1] and torch.equal(whole_texts(tied).groups, tied.groups)


def test_keys_are_of_the_tokens_and_not_of_their_padding() -> None:
    ids, mask = torch.tensor([[9, 1, 2], [1, 2, 9], [1, 2, 9]]), torch.tensor([[0, 1, 1], [1, 1, 0], [1, 1, 1]]).bool()
    keys = row_keys(Tokens(ids, mask)).tolist()
    assert keys[0] == keys[1] != keys[2]


def test_a_part_of_the_data_is_no_new_data_to_its_probe() -> None:
    x, y, _ = shifted(600, 128, 0.0)  # no concept: only what was fitted on can be told
    ids = torch.arange(600).reshape(300, 2)
    data = planted_rows(ids, y.reshape(300, 2))
    hm = planted(x)
    found = fit_probe(hm, data, SITE, kind="mean_difference", options=FEW)
    for some, held_out in ((data, True), (data.take(torch.arange(200)), True)):
        across = transfer(hm, {"a": found}, {"b": some}, n_bootstrap=20)
        assert across.held_out == [[held_out]] and abs(float(across.table()[0, 0]) - 0.5) < 0.12
    whole = data.take(torch.isin(row_keys(data.tokens), found.fitted_on).nonzero()[:, 0])
    with pytest.raises(DataError, match="fitted on every text"):
        transfer(hm, {"a": found}, {"b": whole})
    with pytest.raises(ConfigError, match="fitted with pool='each', not pool='mean'"):
        transfer(hm, {"a": found}, {"b": data}, pool="mean")


def test_sites_without_a_vector_a_token_are_refused() -> None:
    data = planted_rows(torch.arange(40).reshape(20, 2), (torch.arange(40) % 2).reshape(20, 2))
    hm = planted(torch.randn(40, 8))
    for sites, said in (("0.pattern", "no vector of its own"), ([], "no site")):
        with pytest.raises(SiteError, match=said):
            fit_probe(hm, data, sites, options=FEW)


def test_groups_are_never_in_two_parts_and_each_part_has_each_class() -> None:
    group = torch.randint(40, (500,))
    y = (torch.rand(500) < 0.04).long()
    part = split_groups(group, y, Split(0.3, 0.2, 1))
    assert all(len(part[group == g].unique()) <= 1 for g in range(40))
    assert all(int(((part == p) & (y == c)).sum()) for p in range(3) for c in range(2))
    assert 0.15 < float((part == TEST).double().mean()) < 0.45 < 0.6 > 0.35 < float((part == FIT).double().mean())
    assert torch.equal(part, split_groups(group, y, Split(0.3, 0.2, 1)))
    with pytest.raises(DataError, match="has every class in every part"):
        split_groups(torch.arange(10), (torch.arange(10) == 3).long(), Split())
    with pytest.raises(DataError, match="2 groups cannot be split"):
        split_groups(torch.tensor([0, 1]), torch.tensor([0, 1]), Split())
    with pytest.raises(ConfigError, match="leave something to fit on"):
        split_groups(group, y, Split(0.6, 0.5))


def test_a_control_class_belongs_to_its_word_in_any_data_and_comes_at_the_shares() -> None:
    kinds = torch.randint(5000, (20000,))
    made = control_labels(kinds, [0.2, 0.5, 0.3], seed=4)
    assert torch.equal(made[:100], control_labels(kinds[:100], [0.2, 0.5, 0.3], seed=4))
    assert not torch.equal(made, control_labels(kinds, [0.2, 0.5, 0.3], seed=5))
    torch.testing.assert_close(torch.bincount(made) / 20000, torch.tensor([0.2, 0.5, 0.3]), atol=0.03, rtol=0)
    assert all(len(made[kinds == k].unique()) <= 1 for k in range(0, 5000, 97))


def test_constant_and_dead_features_change_nothing_and_nothing_but_them_is_chance() -> None:
    x, y, _ = shifted(600, 6, 2.0)
    ids, classes = torch.arange(600).reshape(60, 10), y.reshape(60, 10)
    wide = torch.cat([x, torch.zeros(600, 3), torch.full((600, 2), 7.0)], 1)
    for kind in KINDS:
        plain, more = (
            fit_probe(planted(z), planted_rows(ids, classes), SITE, kind=kind, options=FEW) for z in (x, wide)
        )
        assert more.get("auroc").mean == pytest.approx(plain.get("auroc").mean, abs=0.02)
        assert bool(more.weights[SITE].isfinite().all())
        dead = fit_probe(planted(torch.ones(600, 4)), planted_rows(ids, classes), SITE, kind=kind, options=FEW)
        assert dead.get("auroc").mean == 0.5 and bool(dead.values[0, 0].isfinite().all())
    with pytest.raises(ShapeError, match="no direction"):
        dead.direction()


def test_three_classes_are_told_each_by_its_own_score() -> None:
    draw = torch.Generator().manual_seed(2)
    y = torch.arange(1200) % 3
    x = torch.randn(1200, 10, generator=draw) + 4 * torch.nn.functional.one_hot(y, 10)
    hm, ids = planted(x), torch.arange(1200).reshape(120, 10)
    found = fit_probe(hm, planted_rows(ids, y.reshape(120, 10), classes="abc"), SITE, options=FEW)
    assert found.get("accuracy").mean > 0.95 and found.get("mcc").mean > 0.93
    assert abs(found.get("accuracy", task="control").mean - 1 / 3) < 0.08
    for i, name in enumerate("abc"):
        assert float(found.direction(name).unit(SITE)[i]) > 0.7
    assert float((detect(found, x).argmax(1) == y).double().mean()) > 0.95
    with pytest.raises(DataError, match="of which class"):
        found.direction()
    with pytest.raises(DataError, match="no class 'd'"):
        found.direction("d")


def test_a_probe_reads_and_steers_and_its_opposite_is_the_other_class() -> None:
    x, y, _ = shifted(400, 8, 3.0)
    hm, ids = planted(x), torch.arange(400).reshape(40, 10)
    found = fit_probe(hm, planted_rows(ids, y.reshape(40, 10)), SITE, options=FEW)
    scores = detect(found, x)
    by_hand = x @ found.weights[SITE][0].float() + found.biases[SITE][0].float()
    torch.testing.assert_close(scores, by_hand, atol=1e-4, rtol=1e-4)
    direction = found.direction()
    torch.testing.assert_close(detect(direction, x), x @ direction.unit(SITE))
    steered = hm.run(ids[:4], read=[SITE], write=direction.as_interventions(2.0))[SITE]
    norm = float(direction[SITE].norm())
    torch.testing.assert_close(detect(found, steered), detect(found, x[ids[:4]]) + 2 * norm**2, atol=1e-3, rtol=1e-4)
    other = found.direction("absent")
    torch.testing.assert_close(other[SITE], -direction[SITE])
    assert other.scale[SITE].positive == -direction.scale[SITE].negative
    with pytest.raises(SiteError, match="no probe at"):
        detect(found, x, site="0.resid_post")
    with pytest.raises(ShapeError, match="do not end in the detector's features"):
        detect(found, x[:, :5])


def test_features_of_heads_keep_their_shape(tmp_path: Path) -> None:
    hm = manager("Llama")
    texts = [f"w{i} w{j} w1" for i in range(2, 8) for j in range(2, 8)]
    data = Contrast.make(texts[:18], texts[18:], paired=False)
    found = fit_probe(hm, data, ["0.z", "1.resid_post"], options=FEW)
    assert found.weights["0.z"].shape[1:] == (hm.n_heads, hm.d_head)
    assert found.direction().at("0.z")["0.z"].shape == (hm.n_heads, hm.d_head)
    held = gather(hm, data.tokens(hm), "0.z")["0.z"]
    assert detect(found, held.x, site="0.z").shape == (36,)
    assert any("each text" in note for note in found.notes)  # one last token for all: a control of tokens is none
    again = ProbeResult.load(found.save(tmp_path / "probe"))
    assert again.summary() == found.summary() and isinstance(Result.load(tmp_path / "probe"), ProbeResult)
    torch.testing.assert_close(again.direction()["0.z"], found.direction()["0.z"])
    assert len(found.to_frame()) == 2 * (len(TASKS) * len(METRICS) + 1)
    assert len(found.plot().data) == 3


def test_probes_go_over_to_data_of_their_concept_and_are_tried_at_home_on_what_was_held_out() -> None:
    x, y, v = shifted(1200, 16, 2.5)
    u = torch.nn.functional.normalize(torch.linalg.qr(torch.stack([v, torch.ones(16)], 1)).Q[:, 1], dim=0)
    x[800:] += (2.5 * y[800:, None]) * (u - v)  # the last third has another concept
    hm = planted(x)
    parts = {
        name: planted_rows(torch.arange(a, a + 400).reshape(40, 10), y[a : a + 400].reshape(40, 10))
        for name, a in (("a", 0), ("b", 400), ("c", 800))
    }
    probes = {name: fit_probe(hm, data, SITE, options=FEW) for name, data in parts.items()}
    found = transfer(hm, probes, parts, n_bootstrap=50)
    table = found.table()
    assert bool((table[:2, :2] > 0.9).all()) and float(table[2, 2]) > 0.9
    assert bool((table[:2, 2] < 0.7).all()) and bool((table[2, :2] < 0.7).all())
    assert found.held_out == [[i == j for j in range(3)] for i in range(3)]
    assert found.examples[0][0] == probes["a"].sizes[2] and found.examples[0][1] == 400
    torch.testing.assert_close(float(table[0, 0]), probes["a"].get("auroc").mean)
    assert len(found.to_frame()) == 9 * len(METRICS) and found.plot() and "held out" in found.summary()
    with pytest.raises(ModelError, match="is of"):
        transfer(manager("Llama"), probes, parts)
    with pytest.raises(DataError, match="no datasets"):
        transfer(hm, probes, {})


@cache
def world(label: str, n: int = 120) -> tuple[HookManager, ConceptTokens]:
    hm = HookManager.load("testbed")
    return hm, concepts.world_concept(hm, label, n, 64, per_class=150)


def test_labels_of_the_small_world_are_read_above_their_controls() -> None:
    hm, data = world("gender")
    found = fit_probe(hm, data, ["0.resid_post", "2.resid_post"], options=FEW)
    assert found.get("auroc").low > 0.95 and found.get("selectivity").low > 0.1
    assert abs(found.get("auroc", task="shuffled").mean - 0.5) < 0.15


@pytest.mark.slow
def test_a_model_of_random_weights_has_what_words_have_and_no_more() -> None:
    hm, data = world("sentiment", 400)
    trained, random = (
        fit_probe(model, data, ["0.resid_pre", "2.resid_post"], options=FEW).get("auroc", site="2.resid_post")
        for model in (hm, reinitialised(hm))
    )
    assert trained.low > random.high and random.mean < 0.85
    # What is said with liking is a matter of context: the embedding hardly has it, the stream does.
    found = fit_probe(hm, data, ["0.resid_pre", "1.resid_post"], options=FEW)
    assert found.best == "1.resid_post" and found.get("auroc").low > found.get("auroc", site="0.resid_pre").mean + 0.05


@pytest.mark.slow
def test_intervals_of_probes_cover_what_the_probe_reaches_on_endless_data() -> None:
    covered = 0
    for seed in range(60):
        x, y, _ = shifted(400, 4, 1.5, seed=seed)
        data = planted_rows(torch.arange(400).reshape(100, 4), y.reshape(100, 4))
        found = fit_probe(planted(x), data, SITE, options=ProbeOptions(seed=seed, n_bootstrap=200, l2=(10.0,)))
        # The class is further along a direction of its own in every draw, of which `shifted` gives more with the seed.
        more = torch.randn(20000, 4, generator=torch.Generator().manual_seed(10_000 + seed))
        classes = torch.arange(20000) % 2
        v = shifted(2, 4, 1.5, seed=seed)[2]
        truth = float(((detect(found, more + 1.5 * classes[:, None] * v) > 0) == (classes == 1)).double().mean())
        covered += int(found.get("accuracy").low <= truth <= found.get("accuracy").high)
    assert 50 <= covered <= 60


def test_a_concept_of_the_world_says_its_classes_and_refuses_what_is_not_there() -> None:
    data = concepts.world_concept(None, "language", 30, 64, per_class=40, classes=["English", "Velic"])
    assert data.classes == ("English", "Velic") and int(data.read.sum()) <= 80
    assert torch.equal(data.labels, concepts.world_concept(None, "language", 30, 64, per_class=40).labels)
    assert int(concepts.world_concept(None, "number", 60, 64, roles=["verb"]).read.sum()) < 60
    with pytest.raises(ConfigError, match="did you mean 'gender'"):
        concepts.world_concept(None, "gendr")
    with pytest.raises(ConfigError, match="no role"):
        concepts.world_concept(None, "gender", roles=["nobody"])
    with pytest.raises(DataError, match="give a testbed model"):
        concepts.world_concept(manager("Llama"), "gender")


@pytest.mark.usefixtures("unchecked")
def test_wrong_options_are_refused_before_anything_runs() -> None:
    x, y, _ = shifted(100, 4, 1.0)
    hm, data = planted(x), planted_rows(torch.arange(100).reshape(10, 10), y.reshape(10, 10))
    with pytest.raises(ConfigError, match="did you mean 'logistic'"):
        fit_probe(hm, data, SITE, kind="logistics")
    with pytest.raises(ConfigError, match="positive penalties"):
        ProbeOptions(l2=(0.0,))
    found = fit_probe(hm, data, SITE, options=FEW)
    with pytest.raises(ConfigError, match="did you mean 'auroc'"):
        found.get("auroc_")
    with pytest.raises(ConfigError, match="did you mean"):
        found.plot(metric="acuracy")
    assert isinstance(transfer(hm, {"a": found}, {"a": data}), Transfer)
