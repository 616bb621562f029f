"""Ablations that are no other prompt: Gaussian noise, and the constant that hurts least."""

import pytest
import torch
from torch import Tensor

from interp.core.errors import ConfigError, DataError
from interp.core.intervention import Add
from interp.core.site import Site
from interp.core.where import Where
from interp.data.pair_tokens import PairTokens
from interp.data.pairs import PromptPairs
from interp.patching.activation import activation_patch
from interp.patching.noise import noise_at
from interp.patching.optimal import optimal_values
from interp.patching.options import PatchOptions
from tests.families import manager
from tests.model.test_patching import close, ragged


def same_form(*numbers: tuple[int, int]) -> PromptPairs:
    """Pairs of one form, one for each two numbers of words."""
    clean, corrupted = ([f"w1 w{a} w6 w{b}" for a, b in numbers], [f"w1 w{b} w6 w{a}" for a, b in numbers])
    return PromptPairs.make(clean, corrupted, [" w10"] * len(numbers), [" w11"] * len(numbers))


def noise_of(tokens: PairTokens, site: str, base: Tensor, *, seed: int = 0, n_draws: int = 3) -> Tensor:
    special = torch.zeros_like(tokens.clean.mask)
    return noise_at(Site(site), base, tokens.clean.mask, special, scale=2.0, n_draws=n_draws, seed=seed).draws


@pytest.mark.parametrize("engine", ["auto", "naive"])
def test_gaussian_is_the_mean_of_edits_made_by_hand(engine: str) -> None:
    hm, pairs = manager("Gemma2"), ragged()
    tokens = pairs.tokens(hm)
    options = PatchOptions(by="pos_head", ablation="gaussian", noise=2.0, n_draws=3, seed=5, engine=engine)
    found = activation_patch(hm, pairs, sites=["0.z", "1.z"], pos=[1, -1], options=options)
    assert found.mode == "noise" and found.patched.shape == (2, 2 * hm.n_heads, 4)
    assert found.provenance.settings["noise"] == 2.0 and found.provenance.settings["n_draws"] == 3
    assert "noise added" in found.heading()
    run, special = hm.run(tokens.clean, read=["0.z", "1.z"]), hm.special_mask(tokens.clean.ids)
    for site, column, pos, head in (("0.z", 1, 1, 1), ("1.z", hm.n_heads + 2, -1, 2)):
        noise = noise_at(Site(site), run[site], tokens.clean.mask, special, scale=2.0, n_draws=3, seed=5)
        counted = run[site][tokens.clean.mask & ~special]
        assert noise.sigma == pytest.approx(float(((counted - counted.mean()) ** 2).mean() ** 0.5), rel=1e-5)
        where = Where(pos=pos, head=head)
        runs = [hm.run(tokens.clean, write=[Add(site, d, where=where)], logits="last") for d in noise.draws]
        by_hand = torch.stack([tokens.logit_diff(run) for run in runs]).mean(0)
        close(found.patched[int(site[0]), column], by_hand)
        assert float((by_hand - found.clean).abs().max()) > 1e-3


def test_noise_has_the_size_it_says_and_is_the_token_s_own() -> None:
    hm, pairs = manager("GPT2"), ragged()
    left, right = (pairs.tokens(hm, side=side) for side in ("left", "right"))
    drawn = {}
    for name, tokens in (("left", left), ("right", right)):
        base = hm.run(tokens.clean, read=["1.resid_mid"])["1.resid_mid"]
        drawn[name] = noise_of(tokens, "1.resid_mid", base, n_draws=400)
        assert not bool(drawn[name][:, ~tokens.clean.mask].any())
        sigma = float(base[tokens.clean.mask].std(correction=0))
        assert float(drawn[name][:, tokens.clean.mask].std()) == pytest.approx(2 * sigma, rel=0.01)
    close(drawn["left"][:, left.clean.mask], drawn["right"][:, right.clean.mask])
    again = noise_of(right, "1.resid_mid", base, n_draws=400)
    assert torch.equal(again, drawn["right"])
    assert not torch.equal(noise_of(right, "1.resid_mid", base, seed=1, n_draws=400), again)
    assert not torch.equal(noise_of(right, "0.resid_mid", base, n_draws=400), again), "each site has its own noise"
    assert float((again[0] * again[1]).mean().abs()) < 0.05 * float((again[0] ** 2).mean()), "draws are independent"


def test_a_site_s_values_do_not_depend_on_what_else_is_patched_and_a_constant_gets_no_noise() -> None:
    hm, pairs = manager("GPT2"), ragged()
    options = PatchOptions(by="site", ablation="gaussian", n_draws=2)
    several = activation_patch(hm, pairs, sites=["0.mlp_out", "1.mlp_out"], metric="kl", options=options)
    one = activation_patch(hm, pairs, sites=["1.mlp_out"], metric="kl", options=options)
    close(several.patched[1], one.patched[0])
    assert bool((one.patched > 1e-4).all())
    base = torch.ones(2, 3, 4)
    mask = torch.ones(2, 3, dtype=torch.bool)
    flat = noise_at(Site("0.mlp_out"), base, mask, ~mask, scale=3.0, n_draws=2, seed=0)
    assert flat.sigma == 0 and not bool(flat.draws.any())


def test_the_optimal_constant_by_name_is_the_one_fitted_on_the_other_pairs() -> None:
    hm = manager("GPT2")
    fit, measured = same_form((2, 3), (4, 5), (7, 8)), same_form((9, 4), (3, 12))
    by_name = activation_patch(
        hm, measured, sites=["1.z"], metric="kl", options=PatchOptions(ablation="optimal", fit_on=fit)
    )
    values = optimal_values(hm, fit, ["1.z"])
    given = PatchOptions(ablation="given", values=values)
    by_hand = activation_patch(hm, measured, sites=["1.z"], metric="kl", options=given)
    close(by_name.patched, by_hand.patched)
    assert "optimal constant" in by_name.heading() and float(by_name.effect.abs().max()) > 1e-4
    mixed = same_form((9, 4), (4, 5))
    with pytest.raises(DataError, match=r"clean prompt 1 .*also in fit_on"):
        activation_patch(hm, mixed, sites=["1.z"], options=PatchOptions(ablation="optimal", fit_on=fit))
    with pytest.raises(ConfigError, match="by='pos'"):
        activation_patch(hm, measured, sites="resid_pre", options=PatchOptions(ablation="optimal", fit_on=fit))
    with pytest.raises(ConfigError, match="leave pos out"):
        activation_patch(hm, measured, sites=["1.z"], pos=2, options=PatchOptions(ablation="optimal", fit_on=fit))


@pytest.mark.usefixtures("unchecked")
def test_settings_of_another_ablation_are_refused() -> None:
    fit = same_form((2, 3))
    for wrong, says in (
        ({"noise": 2.0}, "is for ablation='gaussian'"),
        ({"n_draws": 2, "ablation": "zero"}, "is for ablation='gaussian'"),
        ({"seed": 1}, "is for ablation='gaussian'"),
        ({"ablation": "gaussian", "noise": 0.0}, "above 0"),
        ({"ablation": "gaussian", "noise": float("nan")}, "above 0"),
        ({"ablation": "gaussian", "noise": "big"}, "above 0"),
        ({"ablation": "gaussian", "n_draws": 0}, "whole number"),
        ({"ablation": "gaussian", "seed": 1.5}, "whole number"),
        ({"ablation": "gaussian", "mode": "denoise"}, "use mode='noise'"),
        ({"ablation": "gaussian", "by": "latent", "dictionary": object()}, "latents are patched"),
        ({"ablation": "optimal"}, "needs fit_on"),
        ({"ablation": "optimal", "fit_on": fit, "by": "span"}, "by='head' or 'site'"),
        ({"ablation": "optimal", "fit_on": ["w1"]}, "expected PromptPairs"),
        ({"fit_on": fit}, "is for ablation='optimal'"),
    ):
        with pytest.raises(ConfigError, match=says):
            PatchOptions(**wrong)
    with pytest.raises(DataError, match="has axes batch n_heads pos src"):
        activation_patch(manager("GPT2"), same_form((2, 3)), sites="pattern", options=PatchOptions(ablation="gaussian"))
