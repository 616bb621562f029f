"""What a dictionary sees of an activation: the way there and back, and what training folds into the weights."""

import json
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from interp.core.errors import ArtifactError, ConfigError, ShapeError
from interp.core.site import Site
from interp.data.store import Batch
from interp.dictionaries.base import Dictionary, Transcoder
from interp.dictionaries.folder import ARCHITECTURES
from interp.dictionaries.heads import head_weights, reading
from interp.dictionaries.options import DictionaryOptions
from interp.dictionaries.space import Context, Space
from interp.dictionaries.sparse import SparseDictionary
from interp.dictionaries.topk import TopKConfig, TopKSAE
from interp.train.config import TrainConfig, TrainOptions
from interp.train.normalization import Whitening
from interp.train.trainer import DictionaryFit, TrainingError
from tests.dictionaries import CASES, D_IN, D_SAE, K, batch_for, gradients, make, off

HEADS = 3
AT_RUN_TIME = ("layer_norm", "constant_norm_rescale")
HOW = ("none", "mean_norm", "layer_norm", "whiten")
FITS = [(kind, form, how) for kind, form in CASES for how in HOW if (form, how) != ("skip_transcoder", "layer_norm")]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 0.7


def with_norm(made: Any, how: str, **more: Any) -> Any:
    made.set_cfg(made.cfg.model_copy(update={"normalize_activations": how, **more}))
    return made


def by_hand(x: Tensor, how: str) -> tuple[Tensor, Tensor, Tensor]:
    """What SAELens does to a token: what is seen, and what the way back multiplies by and adds."""
    if how == "layer_norm":
        deviation = ((x - x.mean(-1, keepdim=True)).square().sum(-1, keepdim=True) / (x.shape[-1] - 1)).sqrt()
        return (x - x.mean(-1, keepdim=True)) / (deviation + 1e-5), deviation, x.mean(-1, keepdim=True)
    length = x.square().sum(-1, keepdim=True).sqrt()
    return x * x.shape[-1] ** 0.5 / length, length / x.shape[-1] ** 0.5, torch.zeros_like(length)


# -- the space itself -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["none", *AT_RUN_TIME])
@pytest.mark.parametrize("fixed", ["", "centre", "affine"])
@pytest.mark.parametrize("shape", [(5, D_IN), (2, 5, HEADS, D_IN // HEADS)])
def test_the_way_back_undoes_the_way_there(how: Any, fixed: str, shape: tuple[int, ...]) -> None:
    space, x = Space(D_IN, headed=True, normalize=how), drawn(*shape)
    scale, shift = drawn(D_IN, seed=1), drawn(D_IN, seed=2)
    if fixed == "centre":
        space.fix(bound="raw", centred=True)
    if fixed == "affine":
        space.fix(bound="raw", scale=scale, shift=shift)
    flat = x.reshape(*x.shape[: 1 if x.ndim == 2 else 2], D_IN)
    expected = {"": flat, "centre": flat - flat.mean(-1, keepdim=True), "affine": flat * scale + shift}[fixed]
    torch.testing.assert_close(space.fixed(x), expected)
    y, context = space.own(x)
    if how != "none":
        seen, factor, offset = by_hand(expected, how)
        torch.testing.assert_close(y, seen)
        torch.testing.assert_close(space.unnormalized(y + 1, context), (y + 1) * factor + offset)
    # SAELens divides by the deviation plus 1e-5 and multiplies by the deviation.
    torch.testing.assert_close(space.back(y, context), x, atol=1e-4 if how == "layer_norm" else 1e-9, rtol=0)
    assert space.back(y, context).shape == x.shape


def test_nothing_of_a_space_is_saved_and_devices_and_dtypes_follow_the_dictionary() -> None:
    made = make("topk")
    before = made.state_dict().keys()
    made.space.fix(bound="raw", scale=drawn(D_IN), shift=drawn(D_IN))
    assert made.state_dict().keys() == before
    assert made.float().space.scale.dtype == torch.float32
    assert made.target_space is made.space and make("standard", "transcoder").target_space is not made.space


def test_a_token_that_does_not_vary_has_finite_values_and_slopes() -> None:
    for how in AT_RUN_TIME:
        x = torch.zeros(2, D_IN, dtype=torch.float64, requires_grad=True)
        y, context = Space(D_IN, normalize=how).own(x)  # type: ignore[arg-type]
        Space(D_IN).back(y, context).sum().backward()
        assert bool(y.isfinite().all()) and x.grad is not None and bool(x.grad.isfinite().all())


@pytest.mark.usefixtures("unchecked")
def test_another_width_is_refused_by_head_too() -> None:
    for shape in [(4, D_IN + 1), (D_IN // HEADS, HEADS), (2, HEADS, D_IN // HEADS)]:
        with pytest.raises(ShapeError, match=f"dictionary of d_in {D_IN}"):
            Space(D_IN).own(torch.zeros(shape))
    assert Space(D_IN, headed=True).own(torch.zeros(2, HEADS, D_IN // HEADS))[0].shape == (2, D_IN)
    with pytest.raises(ShapeError, match="scale has shape"):
        Space(D_IN).fix(bound="raw", scale=torch.ones(3))


# -- dictionaries go through it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", AT_RUN_TIME)
@pytest.mark.parametrize(("kind", "form"), CASES)
def test_every_dictionary_is_the_plain_one_of_what_it_sees(kind: str, form: str, how: str) -> None:
    plain, made = make(kind, form).frozen(), with_norm(make(kind, form).frozen(), how)
    x = drawn(7, D_IN)
    seen, factor, offset = by_hand(x, how)
    latents = plain.encode(seen)
    torch.testing.assert_close(made.encode(x), latents)
    assert bool(latents.any())
    expected = latents @ plain.W_dec + plain.b_dec
    if form == "sae":
        expected = expected * factor + offset
        with pytest.raises(ConfigError, match=r"reconstructed\(latents, x\)"):
            made.decode(latents)
    else:
        torch.testing.assert_close(made.decode(latents), expected)
        expected = expected + (x @ plain.W_skip.T if plain.has_skip else 0)
    torch.testing.assert_close(made(x), expected)
    torch.testing.assert_close(made.reconstructed(latents, x), expected)


@pytest.mark.parametrize("how", AT_RUN_TIME)
@pytest.mark.parametrize(("kind", "form"), [c for c in CASES if c[1] != "skip_transcoder"])
def test_the_loss_and_its_gradients_are_those_of_what_is_seen(kind: str, form: str, how: str) -> None:
    plain, made = make(kind, form), with_norm(make(kind, form), how)
    batch = batch_for(made, masked=True)
    seen, factor, offset = by_hand(batch.x, how)
    assert batch.target is not None and batch.grad is not None
    target = batch.target
    if form == "sae":
        divisor = factor + 1e-5 if how == "layer_norm" else factor
        target = (target - offset) / divisor
    given = replace(batch, x=seen, target=target, grad=batch.grad * factor)
    ours, theirs = made.loss(batch), plain.loss(given)
    assert torch.equal(ours.fired, theirs.fired)
    assert off(ours.total, theirs.total) < 1e-12
    expected = gradients(plain, theirs.total)
    assert all(off(value, expected[name]) < 1e-9 for name, value in gradients(made, ours.total).items())
    # A batch without a target of its own is its own target, as it is seen.
    if form == "sae":
        alone = replace(batch, target=None)
        assert off(made.loss(alone).total, plain.loss(replace(given, target=None)).total) < 1e-12


def test_heads_are_read_side_by_side_and_given_back_as_they_came() -> None:
    sae, x = with_norm(make("standard"), "none", reshape_activations="hook_z"), drawn(2, 5, HEADS, D_IN // HEADS)
    torch.testing.assert_close(sae.encode(x), make("standard").encode(x.flatten(2)))
    assert sae(x).shape == x.shape and sae(x.flatten(2)).shape == (2, 5, D_IN)
    torch.testing.assert_close(sae(x).flatten(2), sae(x.flatten(2)))
    at = reading(make("topk"), Site("1.z"))
    assert at.cfg.reshape_activations == "hook_z" and at.cfg.metadata == {"hook_name": "blocks.1.attn.hook_z"}
    # SAELens has the setting at z alone.
    for name, form in (("1.q", "sae"), ("1.z", "transcoder")):
        other = reading(make("standard", form), Site(name))
        assert other.cfg.reshape_activations == "none" and other.space.headed
    assert reading(make("topk"), Site("1.resid_post")).cfg == make("topk").cfg


def test_what_an_architecture_changes_is_what_it_decodes_in_its_own_space() -> None:
    for module, name in {*ARCHITECTURES.values(), ("interp.dictionaries.batchtopk", "BatchTopKSAE")}:
        for cls in getattr(import_module(module), name).__mro__:
            if issubclass(cls, SparseDictionary) and cls is not SparseDictionary:
                assert "decode" not in vars(cls), f"{cls.__name__}: override decode_own, which decode goes through"


def test_head_weights_are_shares_of_the_decoder_norm() -> None:
    sae = TopKSAE(TopKConfig(d_in=6, d_sae=4, k=1))
    with torch.no_grad():
        sae.W_dec.copy_(
            torch.tensor([[3.0, 4, 0, 0, 0, 0], [1, 0, 0, 1, 0, -2], [0, 0, 0, 0, 0, 0], [0, 0, 3, 4, 6, -8]])
        )
    expected = torch.tensor([[1.0, 0, 0], [0.25, 0.25, 0.5], [0, 0, 0], [0, 1 / 3, 2 / 3]], dtype=torch.float64)
    torch.testing.assert_close(head_weights(sae, 3), expected)
    random = make("topk")
    torch.testing.assert_close(head_weights(random, 4).sum(1), torch.ones(D_SAE, dtype=torch.float64))
    assert head_weights(random, 4).shape == (D_SAE, 4)
    with pytest.raises(ShapeError, match="are not 5 heads"):
        head_weights(random, 5)


# -- folders ----------------------------------------------------------------------------------------------------------


def saved(folder: Path, change: dict[str, Any], made: Any = None, **notes: Any) -> Path:
    """A dictionary's folder, its settings changed by hand."""
    (make("topk", dtype="float32") if made is None else made).save(folder, notes=notes)
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**cfg, **change}))
    return folder


def test_scalings_that_were_not_folded_are_refused_with_the_reason(tmp_path: Path) -> None:
    for value, why in (("expected_average_only_in", "multiply W_enc by c"), ("covariance_whitening", "whitening")):
        with pytest.raises(ArtifactError, match=why):
            Dictionary.load(saved(tmp_path / value, {"normalize_activations": value}))


def test_run_time_settings_are_saved_and_loaded(tmp_path: Path) -> None:
    made = with_norm(make("topk", dtype="float32"), "layer_norm", reshape_activations="hook_z")
    x = drawn(2, 5, HEADS, D_IN // HEADS).float()
    again = Dictionary.load(made.save(tmp_path))
    assert torch.equal(again(x), made(x)) and again.space.normalize == "layer_norm" and again.space.headed
    assert repr(again).endswith("site=unknown, sees activations heads side by side, layer_norm)")
    assert repr(make("topk")).endswith("site=unknown)")


@pytest.mark.parametrize(
    ("site", "flags", "needed"),
    [
        ("1.hook_resid_pre", {"center_writing_weights": True}, ["center_writing_weights"]),
        ("1.hook_resid_pre", {"fold_ln": True, "center_unembed": True, "fold_value_biases": True}, []),
        ("1.hook_resid_pre", {"center_writing_weights": False, "device": "cpu"}, []),
        ("1.attn.hook_z", {"fold_value_biases": True, "center_writing_weights": True}, ["fold_value_biases"]),
        ("1.ln2.hook_normalized", {"fold_ln": True, "center_writing_weights": True}, ["fold_ln"]),
        ("1.ln2.hook_normalized", {"center_writing_weights": True}, []),
        ("1.ln2.hook_out", {"fold_ln": True}, ["fold_ln"]),
        ("1.mlp.hook_post", {"fold_ln": True, "refactor_factored_attn_matrices": True}, []),
        ("1.attn.hook_q", {"fold_ln": True, "fold_value_biases": True}, []),
    ],
)
def test_only_what_processing_changes_needs_a_model(
    tmp_path: Path, site: str, flags: dict[str, Any], needed: list[str]
) -> None:
    notes = {"hook_name": f"blocks.{site}", "model_from_pretrained_kwargs": flags}
    folder = saved(tmp_path, {}, **notes)
    if needed:
        with pytest.raises(ConfigError, match=rf"processed \({', '.join(needed)}\)") as refused:
            Dictionary.load(folder)
        assert "load(folder, model=hm)" in str(refused.value) and "model='processed'" in str(refused.value)
    else:
        Dictionary.load(folder)
    fed = Dictionary.load(folder, model="processed")
    assert not fed.space.fixed_names
    again = Dictionary.load(fed.save(tmp_path / "again"), model="processed")
    assert again.cfg.metadata["model_from_pretrained_kwargs"] == flags


def test_sites_in_another_basis_and_unknown_ones_are_refused_by_name(tmp_path: Path) -> None:
    for site in ("q", "k", "v", "z"):
        notes = {"refactor_factored_attn_matrices": True, "fold_ln": True}
        folder = saved(tmp_path, {}, hook_name=f"blocks.0.attn.hook_{site}", model_from_pretrained_kwargs=notes)
        with pytest.raises(ConfigError, match=rf"refactor_factored_attn_matrices gives each head .* 0\.{site} "):
            Dictionary.load(folder)
    folder = saved(tmp_path / "b", {}, model_from_pretrained_kwargs={"fold_ln": True})
    with pytest.raises(ConfigError, match=r"processed \(fold_ln\), whose activations at its site"):
        Dictionary.load(folder)
    folder = saved(
        tmp_path / "c", {}, hook_name="blocks.0.attn.hook_result", model_from_pretrained_kwargs={"fold_ln": 1}
    )
    with pytest.raises(ConfigError, match=r"what fold_ln make of 0\.result is not known"):
        Dictionary.load(folder)


# -- what training does, and folds ------------------------------------------------------------------------------------


def batches(made: Any, n: int = 6, tokens: int = 64) -> Iterator[Batch]:
    """Correlated activations far from 0, of rank 9 of 12: three dimensions are sums of others."""
    mix = drawn(D_IN - 3, D_IN, seed=7) * torch.linspace(0.1, 4, D_IN, dtype=torch.float64)
    for seed in range(n):
        x = (drawn(tokens, D_IN - 3, seed=10 + seed) @ mix + 5 * drawn(D_IN, seed=8)).float()
        target = None if not isinstance(made, Transcoder) else 3 * drawn(tokens, made.d_out, seed=50 + seed).float()
        yield Batch(x=x, target=target, grad=drawn(tokens, D_IN, seed=90 + seed).float())


def trained(kind: str, form: str, how: str) -> DictionaryFit:
    """A fit after six steps, before it is folded."""
    # A threshold that latents of six steps are above.
    more: dict[str, Any] = {"bandwidth": 0.01} if kind.startswith("jumprelu") else {}
    made = make(kind, form, dtype="float32", **more)
    options = TrainOptions(tokens=6 * 64, batch_size=64, buffer_tokens=128, normalize=how, lr=1e-3)  # type: ignore[arg-type]
    fit = DictionaryFit(made, options, seed=3)
    fit.run(batches(made), progress=False)
    return fit


@pytest.mark.parametrize(("kind", "form", "how"), FITS)
def test_what_is_saved_is_what_was_trained(tmp_path: Path, kind: str, form: str, how: str) -> None:
    fit = trained(kind, form, how)
    made, x = fit.dictionary, next(batches(fit.dictionary)).x
    with torch.no_grad():
        # By hand: what was trained, in fp64, on what it was trained on.
        wide: Any = make(kind, form)
        wide.set_cfg(made.cfg)
        wide.load_state_dict(made.state_dict())
        white = fit.whitening
        y = x.double() * fit.scale
        y = y if white is None else (y - white.mean.double()) @ white.forward.double()
        latents, expected = wide.encode(y), wide(y)
        expected = expected / fit.target_scale
        if white is not None and form == "sae":
            expected = expected @ torch.linalg.inv(white.forward.double()) + white.mean.double()
        fit.finish()
        again = Dictionary.load(made.save(tmp_path / "run"))
        for one in (made, again):
            near = one(x)
            assert float((near - expected).norm() / expected.norm()) < 1e-5
    assert bool(latents.any())
    assert again.cfg.normalize_activations == ("layer_norm" if how == "layer_norm" else "none")
    assert (fit.whitening is not None) == (how == "whiten")


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("kind", ["topk", "batchtopk", "standard", "gated", "jumprelu-l0"])
def test_latents_of_whitened_activations_stay_when_it_is_folded(kind: str, centred: bool) -> None:
    made, wide = make(kind), make(kind)
    x = torch.cat([b.x for b in batches(made)]).double()
    white = Whitening.of(x)
    for one in (made, wide):
        one.set_cfg(one.cfg.model_copy(update={"apply_b_dec_to_input": centred}))
    mean, forward = white.mean.double(), white.forward.double()
    made.fold_whitening(mean, forward, torch.linalg.inv(forward))
    torch.testing.assert_close(made.encode(x), wide.encode((x - mean) @ forward), atol=1e-6, rtol=1e-6)
    assert bool(made.encode(x).any())


def test_an_sae_that_chooses_by_decoder_norms_keeps_its_choice() -> None:
    plain = make("topk")
    made, wide = (make("topk") for _ in range(2))
    for one in (made, wide):
        one.set_cfg(one.cfg.model_copy(update={"rescale_acts_by_decoder_norm": True}))
    x = torch.cat([b.x for b in batches(made)]).double()
    white = Whitening.of(x)
    mean, forward = white.mean.double(), white.forward.double()
    before = wide.encode((x - mean) @ forward)
    made.fold_whitening(mean, forward, torch.linalg.inv(forward))
    assert not made.cfg.rescale_acts_by_decoder_norm
    torch.testing.assert_close(made.encode(x), before, atol=1e-6, rtol=1e-6)
    assert not torch.equal(plain.encode((x - mean) @ forward) > 0, before > 0), "the choice was by norm"


def test_a_gradient_by_the_whitened_activation_says_of_a_latent_what_the_folded_one_does() -> None:
    made, grad = make("gradient_topk"), drawn(20, D_IN)
    white = Whitening.of(torch.cat([b.x for b in batches(made)]).double())
    effect = white.gradient(grad.float()).double() @ made.W_dec.T
    made.fold_whitening(white.mean.double(), white.forward.double(), white.back.double())
    torch.testing.assert_close(grad @ made.W_dec.T, effect, atol=1e-4, rtol=1e-4)
    # And by differences: L(x) = sin(x) summed.
    x = next(batches(made)).x[:4].double()
    y = ((x - white.mean.double()) @ white.forward.double()).requires_grad_()
    (y @ white.back.double() + white.mean.double()).sin().sum().backward()
    assert y.grad is not None
    torch.testing.assert_close(white.gradient(x.cos().float()).double(), y.grad, atol=1e-3, rtol=1e-3)


def test_a_step_is_given_the_gradient_by_the_whitened_activation() -> None:
    fit = trained("gradient_topk", "sae", "whiten")
    batch, plain, seen = next(batches(fit.dictionary)), fit.dictionary.loss, []

    def loss(batch: Batch, **more: Any) -> Any:
        seen.append(batch)
        return plain(batch, **more)

    fit.dictionary.loss = loss  # type: ignore[method-assign]
    fit.step(batch)
    white = fit.whitening
    assert white is not None and batch.grad is not None
    torch.testing.assert_close(seen[0].grad, batch.grad @ white.back.T)
    torch.testing.assert_close(seen[0].x, (batch.x - white.mean) @ white.forward)


def test_whitened_activations_have_the_same_variance_in_every_direction_that_has_any() -> None:
    x = torch.cat([b.x for b in batches(make("topk"), n=40)]).double()
    white = Whitening.of(x)
    values = torch.linalg.eigvalsh(white.white(x.float()).double().T.cov()).flip(0)
    before = torch.linalg.eigvalsh(x.T.cov()).flip(0)
    assert before[0] / before[8] > 30, "they differ much before"
    torch.testing.assert_close(values[:8], torch.ones(8, dtype=torch.float64), atol=0.02, rtol=0)
    assert float(values[9:].max()) < 1e-3, "directions without variance are not blown up"
    torch.testing.assert_close(white.forward, white.forward.T)
    torch.testing.assert_close(
        white.forward.double() @ white.back.double(), torch.eye(D_IN).double(), atol=1e-3, rtol=0
    )
    for bad in (torch.ones(4, D_IN), torch.full((4, D_IN), torch.nan)):
        with pytest.raises(TrainingError, match="cannot be whitened"):
            Whitening.of(bad)


@pytest.mark.parametrize("kind", ["topk", "gradient_topk"])
@pytest.mark.parametrize("how", ["whiten", "layer_norm"])
def test_a_fit_that_goes_on_ends_with_the_same_bytes(kind: str, how: Any) -> None:
    options = TrainOptions(tokens=12 * 64, batch_size=64, buffer_tokens=128, normalize=how, lr=1e-3)

    def fit() -> DictionaryFit:
        return DictionaryFit(make(kind, dtype="float32"), options, seed=3)

    whole, half = fit(), fit()
    whole.run(batches(whole.dictionary, 12), progress=False)
    half.run(batches(half.dictionary, 12), progress=False)  # its sample is of all 12, as the whole one's
    state: list[Any] = []
    again, stopped = fit(), fit()
    stopped.run(
        batches(stopped.dictionary, 12),
        progress=False,
        save=lambda: state.append((stopped.record(), {n: t.clone() for n, t in stopped.tensors().items()})),
        should_stop=lambda: stopped.steps >= 5,
    )
    again.restore(*state[-1])
    given = list(batches(again.dictionary, 12))[5:]
    again.run(given, progress=False)
    whole.finish(), again.finish()
    assert again.steps == whole.steps == 12
    for name, value in whole.dictionary.state_dict().items():
        assert torch.equal(value, again.dictionary.state_dict()[name]), name


@pytest.mark.parametrize("how", HOW)
def test_training_in_each_space_finds_the_planted_directions(how: Any) -> None:
    atoms = torch.nn.functional.normalize(drawn(24, D_IN, seed=71), dim=1)
    draw = torch.Generator().manual_seed(5)

    def planted() -> Iterator[Batch]:
        while True:
            code = torch.zeros(256, 24, dtype=torch.float64)
            code.scatter_(1, torch.rand(256, 24, generator=draw).topk(2).indices, 1.0)
            yield Batch(x=(7 * code * (1 + torch.rand(256, 24, generator=draw)) @ atoms + 0.5).float())

    made = DictionaryOptions(kind="topk", d_sae=24, k=2).make(D_IN)
    options = TrainOptions(tokens=120 * 256, batch_size=256, buffer_tokens=512, normalize=how, lr=1e-2)
    fit = DictionaryFit(made, options, seed=1)
    fit.run(planted(), progress=False)
    fit.finish()
    x = next(planted()).x
    fvu = float((x - made(x)).square().sum() / (x - x.mean(0)).square().sum())
    assert fvu < 0.35, fvu


def test_settings_of_old_are_read_and_what_cannot_be_is_refused() -> None:
    assert TrainOptions.model_validate({"normalize": True}).normalize == "mean_norm" == TrainOptions().normalize
    assert TrainOptions.model_validate({"normalize": False}).normalize == "none"
    with pytest.raises(ValidationError, match="normalize"):
        TrainOptions.model_validate({"normalize": "white"})
    skip: dict[str, Any] = {"kind": "standard", "form": "skip_transcoder"}
    common = {"model": "testbed", "site": "1.ln2.normalized", "target": "1.mlp_out", "data": "testbed", "out": "x"}
    with pytest.raises(ValidationError, match="bypass of a skip transcoder"):
        TrainConfig.model_validate({**common, "dictionary": skip, "train": {"normalize": "layer_norm"}})
    layer_norm = TrainOptions(normalize="layer_norm")
    with pytest.raises(ConfigError, match="bypass of a skip transcoder"):
        DictionaryFit(make("standard", "skip_transcoder"), layer_norm)
    with pytest.raises(ConfigError, match="normalises each token"):
        DictionaryFit(with_norm(make("topk"), "constant_norm_rescale"), TrainOptions())
    with pytest.raises(ConfigError, match="cannot be folded into a dictionary that normalises"):
        with_norm(make("topk"), "layer_norm").fold_scale(2.0)
    with pytest.raises(ConfigError, match="whitening cannot be folded"):
        with_norm(make("topk"), "layer_norm").fold_whitening(torch.ones(D_IN), torch.eye(D_IN), torch.eye(D_IN))


def test_a_context_without_normalisation_changes_nothing() -> None:
    x = drawn(3, D_IN)
    assert Context().normalized(x) is x and Context().gradient(x) is x and K < D_IN
