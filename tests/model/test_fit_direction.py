"""Directions: planted ones recovered, CAA's own formula, padding and batches, null controls, latents."""

import functools
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from interp.core.errors import ConfigError, DataError, ShapeError, SiteError
from interp.core.manager import HookManager
from interp.core.result import Result
from interp.core.where import Where
from interp.data.concept_tokens import ConceptTokens
from interp.data.contrast import Contrast
from interp.data.gather import Gathered, gather
from interp.dictionaries.standard import StandardConfig, StandardSAE
from interp.steering.fitting.direction_fit import DirectionFit, FitOptions, fit_with_controls
from interp.steering.fitting.fit import METHODS, direction_of, fit_direction
from interp.steering.fitting.latents import best_latent, latent_direction
from interp.steering.fitting.methods import solve
from interp.testbed.tasks import task_pairs
from tests.families import manager

HM = manager("Llama")
FITTED = ("mean_difference", "pca", "pca_centred", "lat", "logistic", "mass_mean", "lda")


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


def noisy(n: int = 4000, d: int = 16, nuisance: float = 30.0) -> tuple[Gathered, Tensor, Tensor]:
    """Pairs with a constant shift in noise of unit size, and one axis that varies far more and means nothing."""
    draw = torch.Generator().manual_seed(0)
    shift = torch.randn(d, generator=draw)
    shift = 3.0 * shift / shift.norm()
    axis = torch.randn(d, generator=draw)
    axis = axis / axis.norm()
    base = torch.randn(n, d, generator=draw) + nuisance * torch.randn(n, 1, generator=draw) * axis
    y = torch.arange(n) < n // 2
    x = base + y[:, None] * shift
    pair = torch.arange(n) % (n // 2)
    return Gathered(x, y.long(), torch.arange(n), pair, pair, ("no", "yes")), shift, axis


def words(n: int = 24, groups: int = 12, paired: bool = True) -> Contrast:
    """Texts whose last word is one of three with the concept, or one of three without it."""
    draw = torch.Generator().manual_seed(1)
    heads = [" ".join(f"w{i}" for i in torch.randint(1, 40, (3,), generator=draw).tolist()) for _ in range(n)]
    sides = [[f"{h} w{first + i % 3}" for i, h in enumerate(heads)] for first in (60, 70)]
    return Contrast.make(*sides, paired=paired, groups=[i % groups for i in range(n)] if paired else None, name="late")


@functools.cache
def small_world() -> HookManager:
    return HookManager.load("testbed")


def caa_pairs() -> Contrast:
    pairs = task_pairs("sentiment", 10)
    return Contrast.of_pairs(pairs)


def test_a_shift_in_noise_is_recovered_and_centred_differences_lose_it() -> None:
    examples, shift, axis = noisy(nuisance=3.0)
    draw = torch.Generator().manual_seed(0)
    found = {m: solve(examples, m, draw).vector for m in METHODS}
    cov = torch.eye(16) + 9.0 * torch.outer(axis, axis)
    best = torch.linalg.solve(cov, shift)  # of the optimal discriminant
    assert cosine(found["mean_difference"], shift) > 0.99
    for method in ("mass_mean", "lda", "logistic"):
        assert cosine(found[method], best) > 0.99
    for method in ("pca_centred", "lat"):  # both follow the nuisance
        assert abs(cosine(found[method], shift)) < 0.5 < 0.95 < abs(cosine(found[method], axis))
    assert abs(cosine(found["random"], shift)) < 0.9
    # With no nuisance that is larger than the shift, the uncentred component is the shift; the centred one is not.
    quiet, shift, _ = noisy(nuisance=0.0)
    assert cosine(solve(quiet, "pca", draw).vector, shift) > 0.99
    assert cosine(solve(quiet, "lat", draw).vector, shift) > 0.95
    assert abs(cosine(solve(quiet, "pca_centred", draw).vector, shift)) < 0.5


def test_a_method_that_misses_the_concept_says_so_by_name() -> None:
    tokens = words().tokens(HM)
    loud, quiet = noisy()[0], noisy(nuisance=0.0)[0]
    for method, examples in (("pca_centred", quiet), ("pca", loud), ("lat", loud)):
        with pytest.warns(UserWarning, match=rf"method='{method}' found something else than the concept.*1.resid_post"):
            direction_of(HM, tokens, {"1.resid_post": examples}, method=method)
    with pytest.warns(UserWarning, match="centres the differences"):
        direction_of(HM, tokens, {"1.resid_post": quiet}, method="pca_centred")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = direction_of(HM, tokens, {"1.resid_post": quiet}, method="pca")
    assert found.stats["1.resid_post"]["cosine"] > 0.99


def test_every_vector_is_as_long_as_the_difference_of_means_and_points_to_the_concept() -> None:
    data, length = words(), None
    for method in METHODS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = fit_direction(HM, data, ["0.resid_post", "1.z"], method=method)
        norms = [float(found[s].norm()) for s in found.sites]
        length = length or norms
        assert norms == pytest.approx(length, rel=1e-5)
        assert found["1.z"].shape == (HM.n_heads, HM.d_head) and found.method == method
        if method in FITTED:
            assert all(s.positive > s.negative for s in found.scale.values())
    assert set(METHODS) == {*FITTED, "random", "shuffled"}
    draws = [fit_direction(HM, data, ["0.resid_post", "1.resid_post"], method="random", seed=s) for s in (0, 0, 1)]
    assert torch.equal(draws[0]["0.resid_post"], draws[1]["0.resid_post"])
    assert not torch.equal(draws[0]["0.resid_post"], draws[2]["0.resid_post"])
    assert abs(cosine(draws[0]["0.resid_post"], draws[0]["1.resid_post"])) < 0.9
    alone = fit_direction(HM, data, "1.resid_post", method="random", seed=0)
    assert torch.equal(alone["1.resid_post"], draws[0]["1.resid_post"])  # whatever other sites are fitted beside


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("batch_size", [1, 32])
def test_the_difference_of_means_is_what_caa_computes(side: str, batch_size: int) -> None:
    hm, data = small_world(), caa_pairs()
    found = fit_direction(hm, data.tokens(hm, side=side), ["1.resid_post", "3.resid_post"], batch_size=batch_size)
    for site in found.sites:  # text by text, pair by pair, the last token
        total = torch.zeros(hm.d_model)
        for positive, negative in zip(data.positive, data.negative, strict=True):
            up, down = (hm.run(p.text, read=[site])[site][0, -1] for p in (positive, negative))
            total += up - down
        torch.testing.assert_close(found[site], total / len(data.positive), atol=1e-5, rtol=1e-5)
    assert float(found["3.resid_post"].norm()) > 0.1


def test_controls_stand_beside_and_the_null_is_chance(tmp_path: Path) -> None:
    fit = fit_with_controls(HM, words(60, 30), ["0.resid_pre", "0.resid_post"], n_controls=4)
    assert fit.kinds.count("direction") == 1 and len(fit.kinds) == 13
    best = fit.best_site()
    assert best.auroc.mean > 0.9 > best.control and best.auroc.low <= best.auroc.mean <= best.auroc.high
    assert fit.held_out(best.site, "accuracy").mean > 0.8 and fit.held_out(best.site, "d").mean > 1.5
    nulls = torch.tensor([fit.held_out(s, kind=k).mean for k in fit.kinds if k.startswith("null") for s in fit.sites])
    assert 0.35 < float(nulls.mean()) < 0.65 and float((nulls - 0.5).abs().max()) < 0.35
    assert fit.n_train[1] + fit.n_held[1] == 30
    again = DirectionFit.load(fit.save(tmp_path / "fit"))
    assert again.summary() == fit.summary() and torch.equal(
        again.direction["0.resid_post"], fit.direction["0.resid_post"]
    )
    assert {"random 0", "shuffled 3"} <= set(fit.controls) and len(fit.plot().data) == 4
    frame = fit.to_frame()
    assert len(frame) == 26 and fit.stats[best.site]["consistency"] > 0 and "consistency" in frame
    edits = fit.controls["random 1"].at("0.resid_post").as_interventions()
    assert float(HM.run("w1 w2", write=edits).logits.isfinite().float().mean()) == 1
    assert set(fit.cosines) == {"pca", "lat", "lda"}


def test_the_null_is_judged_under_shuffled_labels_for_a_shuffled_fit_may_be_the_concept() -> None:
    # Differences of pairs lie along one axis, by one to three of four words: under any labels that axis stands out.
    draw = torch.Generator().manual_seed(2)
    sides: list[list[str]] = [[], []]
    for i in range(40):
        rest = [f"w{j}" for j in torch.randint(1, 40, (3 - i % 3,), generator=draw).tolist()]
        for texts, word in zip(sides, ("w60", "w70"), strict=True):
            texts.append(" ".join([word] * (1 + i % 3) + rest))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = fit_with_controls(
            HM, Contrast.make(*sides), "0.resid_pre", where=Where(), n_controls=4, options=FitOptions(pool="mean")
        )
    found = {k: abs(fit.held_out("0.resid_pre", kind=k).mean - 0.5) for k in fit.kinds}
    assert found["direction"] > 0.45
    assert sum(found[f"shuffled {i}"] for i in range(4)) > 1.2
    assert sum(found[f"null {i}"] for i in range(4)) < 0.8


def test_labels_that_leave_no_difference_do_not_end_the_fit() -> None:
    sides = [[f"w{1 + i} w2 {word}" for i in range(20)] for word in ("w60", "w70")]  # all pairs differ by one vector
    with pytest.warns(UserWarning, match="a control separates"):  # nothing else varies, so any direction does
        fit = fit_with_controls(HM, Contrast.make(*sides), "0.resid_pre", n_controls=2)
    assert fit.best_site().auroc.mean == 1 and fit.stats["0.resid_pre"]["consistency"] == pytest.approx(1)
    with pytest.raises(DataError, match=r"0.resid_pre: the two classes have the same mean"):
        fit_direction(HM, Contrast.make(["w1 w5", "w2 w5"], ["w3 w5", "w4 w5"]), "0.resid_pre")


def test_a_site_where_all_texts_look_alike_is_left_out_and_named() -> None:
    """Every text ends in one token, so the embeddings at the last position are equal."""
    positive = [f"w{i} w5 w2" for i in range(10, 18)]
    data = Contrast.make(positive, [text.replace("w5", "w6") for text in positive])
    found = fit_direction(HM, data, ["0.resid_pre", "1.resid_post"])
    assert found.sites == ["1.resid_post"] and "left out: 0.resid_pre" in found.notes[0]
    torch.testing.assert_close(found["1.resid_post"], fit_direction(HM, data, "1.resid_post")["1.resid_post"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a random model: controls do as well
        judged = fit_with_controls(HM, data, ["0.resid_pre", "1.resid_post"], n_controls=1)
    assert judged.sites == ["1.resid_post"] and any("left out: 0.resid_pre" in note for note in judged.notes)
    with pytest.raises(DataError, match=r"0\.resid_pre: the two classes have the same mean"):
        fit_direction(HM, data, "0.resid_pre")


def test_words_that_mean_nothing_give_a_warning_that_controls_do_as_well() -> None:
    draw = torch.Generator().manual_seed(4)
    sides = [
        [" ".join(f"w{i}" for i in torch.randint(1, 40, (5,), generator=draw).tolist()) for _ in range(40)]
        for _ in "ab"
    ]
    with pytest.warns(UserWarning, match="a control separates held-out examples as well"):
        fit = fit_with_controls(HM, Contrast.make(*sides, name="nothing"), "1.resid_post", n_controls=5)
    assert fit.notes and 0.2 < fit.best_site().auroc.mean < 0.8


def planted_sae(data: ConceptTokens, site: str, **settings: Any) -> tuple[StandardSAE, Tensor]:
    """An SAE whose latent 5 reads and writes the concept."""
    held = gather(HM, data, site)[site]
    v = held.of_class(1).mean(0) - held.of_class(0).mean(0)
    middle = (held.of_class(1).mean(0) + held.of_class(0).mean(0)) / 2
    metadata = {"hook_name": f"blocks.{site[0]}.hook_{site[2:]}"}
    sae = StandardSAE(StandardConfig(d_in=HM.d_model, d_sae=40, metadata=metadata, **settings))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
        sae.W_enc[:, 5] = v / v.norm()
        sae.b_enc[5] = -(middle - sae.b_dec) @ v / v.norm()
        sae.W_dec[5] = 2.0 * v / v.norm()
    return sae.eval(), v


def test_a_latent_s_direction_is_what_one_more_unit_of_it_reconstructs() -> None:
    site = "1.resid_post"
    data = words().tokens(HM)
    x = gather(HM, data, site)[site].x
    for settings in ({}, {"normalize_activations": "layer_norm"}):
        sae, v = planted_sae(data, site, **settings)
        found = latent_direction(HM, sae, 5, data=data)
        more = torch.zeros(40)
        more[5] = 1.0
        with torch.no_grad():
            z = sae.encode(x)
            change = sae.reconstructed(z + more, x) - sae.reconstructed(z, x)
        torch.testing.assert_close(found[site], change.mean(0), atol=1e-5, rtol=1e-5)
        assert cosine(found[site], v) > 0.999
        peak = float(z[:, 5].max())
        assert found.stats[site]["max_activation"] == pytest.approx(peak, rel=1e-5)
        assert found.scale[site].largest == pytest.approx(peak * float(found[site].norm()), rel=1e-5)
    with pytest.raises(ConfigError, match="give data"):
        latent_direction(HM, sae, 5)
    plain, v = planted_sae(data, site)
    torch.testing.assert_close(latent_direction(HM, plain, 5)[site], 2.0 * v / v.norm(), atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="latents 0 to 39"):
        latent_direction(HM, plain, 40)


def test_the_latent_that_tells_the_concept_is_found_and_judged_on_other_groups(tmp_path: Path) -> None:
    site, data = "0.resid_post", words(60, 30)
    sae, _ = planted_sae(data.tokens(HM), site)
    found = best_latent(HM, sae, data, n=3, where=Where(pos=-1))
    assert found.best == 5 and float(found.held[0, 0]) > 0.85
    tokens = data.tokens(HM, where=Where(pos=-1))
    null = best_latent(HM, sae, tokens.shuffled(seed=1), n=1)
    assert float(null.held[0, 0]) < 0.8 < float(found.held[0, 0])
    held = [float(v) for v in found.held[0]]
    assert held[1] <= held[0] <= held[2] and found.n_latents == 40
    assert Result.load(found.save(tmp_path / "l")).summary() == found.summary()
    assert len(found.to_frame()) == 3 and found.plot().data


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_fitted_is_refused_by_name() -> None:
    data, unpaired = words(), words(paired=False)
    with pytest.raises(ConfigError, match="did you mean 'mean_difference'"):
        fit_direction(HM, data, "1.resid_post", method="mean_diff")
    for method in ("pca", "pca_centred"):
        with pytest.raises(DataError, match=f"method='{method}' needs pairs"):
            fit_direction(HM, unpaired, "1.resid_post", method=method)
    tokens = data.tokens(HM)
    with pytest.raises(DataError, match="no token of the class 'positive'"):
        fit_direction(HM, tokens.take((tokens.labels.max(1).values == 0).nonzero()[:, 0]), "1.resid_post")
    same = Contrast.make(["w1 w2", "w3 w4"], ["w1 w2", "w3 w4"])
    with pytest.raises(DataError, match="same mean"):
        fit_direction(HM, same, "1.resid_post")
    with pytest.raises(ConfigError, match="at least 1"):
        fit_with_controls(HM, data, "1.resid_post", n_controls=0)
    with pytest.raises(ConfigError, match="compare='nothing'"):
        FitOptions(compare=("nothing",))
    with pytest.raises(SiteError, match="nothing was fitted"):
        fit_with_controls(HM, data, "0.resid_pre", n_controls=1).held_out("0.resid_post")
    sae, _ = planted_sae(tokens, "1.resid_post")
    with pytest.raises(ConfigError, match="pool='last'"):
        best_latent(HM, sae, data, pool="last")
    with pytest.raises(ShapeError, match="has width"):
        latent_direction(HM, StandardSAE(StandardConfig(d_in=8, d_sae=16)), 0, site="1.resid_post")
    with pytest.raises(SiteError, match="no hook_name"):
        latent_direction(HM, StandardSAE(StandardConfig(d_in=HM.d_model, d_sae=64)), 0)
    assert math.isnan(fit_direction(HM, unpaired, "1.resid_post").stats["1.resid_post"]["consistency"])
