"""Trained directions and transport maps on a spread of families: gradients against plain ones, edits under a cache."""

import warnings

import pytest
import torch
from torch import Tensor

from interp.core.intervention import Edit
from interp.core.metrics import loss_per_token
from interp.core.run import Run
from interp.core.text import Tokens
from interp.core.tuning import frozen, next_token_losses
from interp.data.concept_tokens import ConceptTokens
from interp.steering.trained.supervised import TrainedOptions, fit_reft_r1, fit_ssv
from interp.steering.trained.transport import fit_transport
from tests.families import manager, paddings, tokens

FAMILIES = ["GPT2", "Gemma2", "Falcon", "OPT", "Mixtral", "Olmo2"]
each_family = pytest.mark.parametrize("name", FAMILIES)


def concept(seed: int = 1) -> ConceptTokens:
    """Six rows, one of them padded on the right; the second half has the concept."""
    ids = tokens(6, seed=seed)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, 8:] = False
    label = (torch.arange(6) >= 3).long()[:, None].expand_as(ids)
    return ConceptTokens(Tokens(ids, mask), torch.where(mask, label, -1), ("without", "with"), torch.arange(6))


@each_family
def test_the_gradient_is_the_plain_one_summed_over_positions(name: str) -> None:
    hm, site = manager(name), "1.resid_pre"
    for _, ids, mask in paddings(tokens(seed=1)):
        counts = mask.clone()
        counts[:, 0] = False
        counts[:, 1:] &= mask[:, :-1]
        v = torch.zeros(hm.d_model, requires_grad=True)
        with frozen(hm.model):
            losses = next_token_losses(hm, Tokens(ids, mask), counts, [Edit(site, v.add)])
            (found,) = torch.autograd.grad(losses.sum(), v)

        def loss(out: Run, real: Tensor = mask) -> Tensor:
            assert out.tokens is not None
            return loss_per_token(out.logits, out.tokens, real)[0].sum(-1)

        plain = hm.run(ids, mask=mask, read=[site], grad=loss, logits="all")
        torch.testing.assert_close(found, (plain.grad[site] * mask[..., None]).sum((0, 1)), atol=1e-4, rtol=1e-3)
        assert plain.metric is not None
        torch.testing.assert_close(losses.detach().sum(), plain.metric.sum(), atol=1e-4, rtol=1e-5)
        assert all(p.grad is None for p in hm.model.parameters())


@each_family
def test_fits_run_and_act_alike_with_and_without_a_cache(name: str) -> None:
    hm, options = manager(name), TrainedOptions(epochs=2, batch_size=3, lr=0.1, progress=False)
    data = concept()
    ssv, r1 = (fit(hm, data, "1.resid_pre", options=options) for fit in (fit_ssv, fit_reft_r1))
    assert ssv.stats["1.resid_pre"]["loss_after"] < ssv.stats["1.resid_pre"]["loss_before"]
    maps = fit_transport(hm, data, ["0.mlp_out", "1.attn_out"], pool="each")
    assert all(maps.after[s] < maps.before[s] for s in maps.sites)
    prompts = Tokens(data.tokens.ids[:2], data.tokens.mask[:2])
    plain = hm.run(prompts, read=["1.resid_post"])["1.resid_post"]
    for steers in (ssv, r1, maps):
        edits = steers.as_interventions(1.0)
        cached, whole = (
            hm.generate(prompts, max_new_tokens=4, write=edits, read=["1.resid_post"], use_cache=c)
            for c in (True, False)
        )
        x, y = cached["1.resid_post"], whole["1.resid_post"]
        real = torch.ones(x.shape[:2], dtype=torch.bool)
        real[0, :4] = False  # generation puts the pads in front
        torch.testing.assert_close(x[real], y[real], atol=1e-3, rtol=1e-3)
        steered = hm.run(prompts, read=["1.resid_post"], write=edits)["1.resid_post"]
        assert float((steered - plain)[data.tokens.mask[:2]].abs().max()) > 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a share of 0 is no mistake
        same = hm.run(prompts, read=["1.resid_post"], write=maps.as_interventions(0.0))["1.resid_post"]
    assert torch.equal(same, plain)
