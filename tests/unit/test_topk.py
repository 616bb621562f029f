"""The TopK SAE against planted truth, closed forms and plain dense formulas."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from interp.core.errors import ArtifactError, ShapeError
from interp.data.store import Batch
from interp.dictionaries.base import SAE, Dictionary
from interp.dictionaries.objective import Objective
from interp.dictionaries.topk import TopKSAE


def random_sae(seed: int = 0, d_in: int = 12, d_sae: int = 40, k: int = 4, **settings: bool | str) -> TopKSAE:
    sae = TopKSAE.from_cfg({"architecture": "topk", "d_in": d_in, "d_sae": d_sae, "k": k, **settings})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return sae


def plain(sae: TopKSAE, x: Tensor) -> Tensor:
    """The latents by the paper's formula, sorting each row by hand."""
    centre = sae.b_dec if sae.cfg.apply_b_dec_to_input else torch.zeros_like(sae.b_dec)
    pre = (x - centre) @ sae.W_enc + sae.b_enc
    if sae.cfg.rescale_acts_by_decoder_norm:
        pre = pre * sae.W_dec.norm(dim=1)
    threshold = pre.sort(dim=-1, descending=True).values[..., sae.cfg.k - 1 : sae.cfg.k]
    return torch.where((pre >= threshold) & (pre > 0), pre, torch.zeros_like(pre))


def dense_loss(sae: TopKSAE, batch: Batch, dead: Tensor | None) -> Tensor:
    """The whole loss by matrices over all latents, for autograd; rows outside the mask are left out first."""
    x, target = batch.x, batch.x if batch.target is None else batch.target
    if batch.mask is not None:
        x, target = x[batch.mask], target[batch.mask]
    pre = (x - sae.b_dec if sae.cfg.apply_b_dec_to_input else x) @ sae.W_enc + sae.b_enc
    score = pre.detach() * (sae.W_dec.detach().norm(dim=1) if sae.cfg.rescale_acts_by_decoder_norm else 1)

    def largest(score: Tensor, k: int) -> Tensor:
        return (score >= score.sort(dim=-1, descending=True).values[:, k - 1 : k]) & score.isfinite()

    error = target - (pre * largest(score, sae.cfg.k)).relu() @ sae.W_dec - sae.b_dec
    fvu = error.pow(2).sum() / (target - target.mean(0)).pow(2).sum()
    if dead is None or not dead.any():
        return fvu
    codes = pre * largest(score.masked_fill(~dead, -math.inf), sae.k_aux)
    guess = (codes + (codes.relu() - codes).detach()) @ sae.W_dec
    return fvu + sae.terms.aux_coef * (error.detach() - guess).pow(2).sum() / error.detach().pow(2).sum()


def batch_of(kind: str, token: int, d_in: int, dtype: torch.dtype) -> Batch:
    x = torch.randn(token, d_in, dtype=dtype)
    target = torch.randn(token, d_in, dtype=dtype) if "target" in kind else None
    return Batch(x=x, target=target, mask=torch.arange(token) % 3 != 1 if "mask" in kind else None)


def step_of(sae: TopKSAE, loss: Tensor) -> dict[str, Tensor]:
    """The loss, and every gradient as the optimiser sees it."""
    sae.zero_grad()
    loss.backward()
    sae.before_step()
    found = {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}
    assert found.keys() == {"W_enc", "W_dec", "b_enc", "b_dec"}
    return {"loss": loss.detach(), **found}


@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-12), ("float32", 1e-6)])
@pytest.mark.parametrize("n_dead", [None, 0, 2, 7, 30, 40])  # 7: dense over the dead; 30: an entry per choice
@pytest.mark.parametrize("kind", ["plain", "target", "mask and target"])
@pytest.mark.parametrize(
    "settings", [{}, {"rescale_acts_by_decoder_norm": True}, {"apply_b_dec_to_input": False}], ids=str
)
def test_a_step_is_that_of_the_dense_formula(
    settings: dict[str, bool], kind: str, n_dead: int | None, dtype: str, bound: float
) -> None:
    sae, batch = random_sae(dtype="float64", **settings), batch_of(kind, 96, 12, torch.float64)
    dead = None if n_dead is None else torch.randperm(40) < n_dead
    expected = step_of(sae, dense_loss(sae, batch, dead))
    sae = sae.to(getattr(torch, dtype))
    found = step_of(sae, sae.loss(cast(batch, sae.W_enc.dtype), dead=dead).total)
    for name, value in expected.items():
        assert float((found[name].double() - value).norm()) <= bound * float(value.norm()), name


@pytest.mark.parametrize(("token", "k", "unit_norm"), [(2, 4, True), (96, 40, True), (96, 1, False)])
def test_so_it_is_for_few_tokens_and_for_the_smallest_and_the_largest_k(token: int, k: int, unit_norm: bool) -> None:
    sae, batch = random_sae(k=k, dtype="float64"), batch_of("plain", token, 12, torch.float64)
    sae.terms, dead = replace(sae.terms, unit_norm=unit_norm), torch.arange(40) < 25
    expected = step_of(sae, dense_loss(sae, batch, dead))
    found = step_of(sae, sae.loss(batch, dead=dead).total)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12, msg=name)


def cast(batch: Batch, dtype: torch.dtype) -> Batch:
    return Batch(x=batch.x.to(dtype), target=None if batch.target is None else batch.target.to(dtype), mask=batch.mask)


def test_one_token_alone_has_no_variance_and_a_finite_loss() -> None:
    sae = random_sae()
    losses = sae.loss(Batch(x=torch.randn(1, 12)), dead=torch.ones(40, dtype=torch.bool))
    losses.total.backward()
    assert bool(losses.total.isfinite())
    assert all(bool(p.grad.isfinite().all()) for p in sae.parameters() if p.grad is not None)


@pytest.mark.parametrize("n_dead", [None, 9, 300])
def test_no_dense_latents_wait_for_the_gradient_and_the_same_step_gives_the_same_bytes(n_dead: int | None) -> None:
    sae, batch = random_sae(d_in=8, d_sae=400), batch_of("mask", 300, 8, torch.float32)
    dead = None if n_dead is None else torch.arange(400) < n_dead
    sizes: list[int] = []

    def kept(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    torch.use_deterministic_algorithms(True)
    try:
        with saved_tensors_hooks(kept, lambda tensor: tensor):
            losses = sae.loss(batch, dead=dead)
        first, second = step_of(sae, losses.total), step_of(sae, sae.loss(batch, dead=dead).total)
    finally:
        torch.use_deterministic_algorithms(False)
    # The weights, and a few entries per token: of 120 000 pre-activations nothing is left.
    assert max(sizes) <= max(8 * 400, 300 * 3 * sae.k_aux)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_firing_is_counted_in_whole_tokens() -> None:
    sae, mask = random_sae(), torch.arange(200) % 3 != 1
    batch = Batch(x=torch.randn(200, 12), mask=mask)
    with torch.no_grad():
        sae.b_enc.sub_(4)  # so that some of the largest are negative, and do not fire
    latents = plain(sae, batch.x) * mask[:, None]
    losses = sae.loss(batch)
    assert losses.fired.dtype == torch.long
    assert torch.equal(losses.fired, torch.bincount(latents.nonzero()[:, 1], minlength=40))
    assert 0 < int(losses.fired.sum()) < 4 * int(mask.sum())


def test_a_gradient_reaches_the_input_where_it_is_wanted() -> None:
    sae, batch = random_sae(dtype="float64"), batch_of("plain", 20, 12, torch.float64)
    batch.x.requires_grad_()
    for dead in (None, torch.arange(40) < 5, torch.arange(40) < 30):
        (ours,) = torch.autograd.grad(sae.loss(batch, dead=dead).total, batch.x)
        (expected,) = torch.autograd.grad(dense_loss(sae, batch, dead), batch.x)
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("settings", [{}, {"apply_b_dec_to_input": False}, {"rescale_acts_by_decoder_norm": True}])
def test_latents_and_reconstruction_follow_the_formula(settings: dict[str, bool]) -> None:
    sae, x = random_sae(**settings), torch.randn(3, 5, 12)
    latents = sae.encode(x)
    torch.testing.assert_close(latents, plain(sae, x))
    assert int((latents != 0).sum(-1).max()) == 4
    rows = sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True) if sae.cfg.rescale_acts_by_decoder_norm else sae.W_dec
    torch.testing.assert_close(sae(x), plain(sae, x) @ rows + sae.b_dec)


@pytest.mark.parametrize("settings", [{}, {"rescale_acts_by_decoder_norm": True}])
def test_the_loss_and_its_gradients_are_those_of_the_dense_formula(settings: dict[str, bool]) -> None:
    sae, x = random_sae(**settings), torch.randn(64, 12)
    losses = sae.loss(Batch(x=x))
    losses.total.backward()
    ours = [p.grad.clone() for p in sae.parameters() if p.grad is not None]
    sae.zero_grad()
    dense = (x - sae(x)).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    dense.backward()
    torch.testing.assert_close(losses.fvu, dense.detach())
    for mine, parameter in zip(ours, sae.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-4, atol=1e-7)
    firing = (sae.encode(x) > 0).sum(0)
    assert torch.equal(losses.fired, firing)
    assert float(losses.l0) == pytest.approx(float(firing.sum()) / 64)


def test_rows_outside_the_mask_do_not_count() -> None:
    sae, x = random_sae(), torch.randn(64, 12)
    mask = torch.arange(64) < 40
    spoiled = torch.where(mask[:, None], x, 1e3 * x)
    dead = torch.arange(40) < 7
    part, whole = sae.loss(Batch(x=spoiled, mask=mask), dead=dead), sae.loss(Batch(x=x[:40]), dead=dead)
    for name in ("total", "fvu", "aux", "l0"):
        torch.testing.assert_close(getattr(part, name), getattr(whole, name))
    assert torch.equal(part.fired, whole.fired)


def test_dead_latents_that_are_negative_everywhere_still_get_an_encoder_gradient() -> None:
    sae, x = random_sae(), torch.randn(64, 12)
    dead = torch.zeros(40, dtype=torch.bool)
    dead[[3, 17]] = True
    with torch.no_grad():
        sae.b_enc[dead] = -50.0
    assert not bool(sae.loss(Batch(x=x)).fired[dead].any())
    sae.loss(Batch(x=x)).total.backward()
    assert sae.W_enc.grad is not None and float(sae.W_enc.grad[:, dead].abs().max()) == 0
    sae.zero_grad()
    sae.loss(Batch(x=x), dead=dead).total.backward()
    assert bool((sae.W_enc.grad[:, dead].abs().sum(0) > 0).all())


def test_auxk_is_the_share_of_the_error_that_the_best_dead_latents_miss() -> None:
    sae, x = random_sae(), torch.randn(64, 12)
    dead = torch.zeros(40, dtype=torch.bool)
    dead[::3] = True
    sae.objective = Objective(k_aux=2)
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    error = (x - sae(x)).detach()
    best = pre.masked_fill(~dead, -math.inf).sort(dim=-1, descending=True).indices[:, :2]
    guess = torch.stack([pre[i, best[i]].relu() @ sae.W_dec[best[i]] for i in range(64)])
    expected = (error - guess).pow(2).sum() / error.pow(2).sum()
    losses = sae.loss(Batch(x=x), dead=dead)
    torch.testing.assert_close(losses.aux, expected.detach())
    torch.testing.assert_close(losses.total.detach(), losses.fvu + losses.aux / 32)


def test_auxk_is_zero_and_finite_without_dead_latents_and_without_an_error() -> None:
    sae, x = random_sae(), torch.randn(16, 12)
    none = torch.zeros(40, dtype=torch.bool)
    assert float(sae.loss(Batch(x=x), dead=none).aux) == 0
    perfect = sae(x).detach()
    losses = sae.loss(Batch(x=x, target=perfect), dead=~none)
    losses.total.backward()
    assert bool(losses.total.isfinite())
    assert all(bool(p.grad.isfinite().all()) for p in sae.parameters() if p.grad is not None)


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_the_first_weights_are_the_multiple_with_the_smallest_error(apply_b_dec_to_input: bool) -> None:
    x = torch.randn(300, 12) @ torch.randn(12, 12) + torch.randn(12)
    # Many latents at a time: the transpose itself would give a reconstruction several times too large.
    sae = random_sae(d_sae=200, k=40, apply_b_dec_to_input=apply_b_dec_to_input)
    sae.init_from(x, seed=1)
    torch.testing.assert_close(sae.b_dec, x.mean(0))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(200))
    factor = (sae.W_enc / sae.W_dec.T).detach()
    torch.testing.assert_close(factor, factor[:1, :1].expand_as(factor))

    def fvu(times: float) -> float:
        other = random_sae(d_sae=200, k=40, apply_b_dec_to_input=apply_b_dec_to_input)
        other.load_state_dict({**sae.state_dict(), "W_enc": sae.W_enc * times})
        return float(other.loss(Batch(x=x)).fvu)

    best = fvu(1)
    assert best < 1 < fvu(1 / float(factor[0, 0]))
    assert best < fvu(1.02) and best < fvu(0.98)


def test_of_constant_activations_the_first_weights_are_finite() -> None:
    sae = random_sae()
    sae.init_from(torch.ones(7, 12), seed=0)
    assert all(bool(p.isfinite().all()) for p in sae.parameters()) and bool(sae.W_enc.any())


def test_folding_the_scale_gives_the_same_reconstruction_of_raw_activations() -> None:
    sae, x = random_sae(), torch.randn(50, 12)
    expected, latents = sae(3.7 * x) / 3.7, sae.encode(3.7 * x)
    sae.fold_scale(3.7)
    torch.testing.assert_close(sae(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.encode(x), latents / 3.7, rtol=1e-5, atol=1e-5)


def test_a_step_keeps_decoder_rows_at_norm_one_and_moves_only_across_them() -> None:
    sae = random_sae()
    sae.after_step()
    sae.loss(Batch(x=torch.randn(64, 12))).total.backward()
    assert sae.W_dec.grad is not None
    rows, before = sae.W_dec.detach(), sae.W_dec.grad.clone()
    assert float((before * rows).sum(1).abs().max()) > 1e-2
    sae.before_step()
    torch.testing.assert_close((sae.W_dec.grad * rows).sum(1), torch.zeros(40), rtol=0, atol=1e-5)
    across = before - (before * rows).sum(1, keepdim=True) * rows
    torch.testing.assert_close(sae.W_dec.grad, across, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        sae.W_dec.add_(torch.randn_like(sae.W_dec))
    sae.after_step()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(40))


@pytest.mark.parametrize("loader", [SAE, TopKSAE, Dictionary])
def test_a_saved_dictionary_loads_as_its_own_class_with_the_same_bits(tmp_path: Path, loader: type[Dictionary]) -> None:
    sae, x = random_sae(rescale_acts_by_decoder_norm=True), torch.randn(9, 12)
    sae.save(tmp_path / "run", notes={"hook_name": "blocks.3.hook_resid_post"})
    again = loader.load(tmp_path / "run")
    assert type(again) is TopKSAE
    assert torch.equal(again(x), sae(x)) and not again(x).requires_grad
    assert again.cfg.metadata["hook_name"] == "blocks.3.hook_resid_post"
    assert not list((tmp_path / "run").glob(".*"))


def test_damaged_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    folder = random_sae().save(tmp_path / "run")
    cfg = json.loads((folder / "cfg.json").read_text())
    with pytest.raises(ArtifactError, match=r"no such folder"):
        SAE.load(tmp_path / "nothing")

    def refuses(change: dict[str, object], message: str) -> None:
        (folder / "cfg.json").write_text(json.dumps({**cfg, **change}))
        with pytest.raises(ArtifactError, match=message):
            SAE.load(folder)

    refuses({"architecture": "topkk"}, "did you mean 'topk'")
    refuses({"normalize_activations": "layer_nrom"}, "normalize_activations")
    refuses({"k": 41}, "more than the 40 latents")
    refuses({"d_sae": 41}, r"holds .* its cfg\.json says")
    (folder / "cfg.json").write_text(json.dumps(cfg))
    (folder / "sae_weights.safetensors").write_bytes(b"xx")
    with pytest.raises(ArtifactError, match=r"cannot be read"):
        SAE.load(folder)
    (folder / "cfg.json").unlink()
    with pytest.raises(ArtifactError, match=r"holds no cfg\.json"):
        SAE.load(folder)


def test_activations_of_another_width_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"shape \(2, 11\) for a dictionary of d_in 12"):
        random_sae().encode(torch.randn(2, 11))
