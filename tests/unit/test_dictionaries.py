"""The contract of every dictionary, kind by kind and form by form: its step is the paper's dense formula's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from interp.core.errors import ArtifactError, ConfigError
from interp.data.store import Batch
from interp.dictionaries import standard
from interp.dictionaries.base import SAE, Dictionary, Transcoder
from interp.dictionaries.folder import CFG, WEIGHTS
from interp.dictionaries.kernels import encode_dense
from interp.dictionaries.options import DictionaryOptions
from tests.dictionaries import (
    CASES,
    D_IN,
    D_OUT,
    D_SAE,
    KINDS,
    TOKENS,
    batch_for,
    dense,
    gradients,
    make,
    off,
    with_aux,
)

each = pytest.mark.parametrize(("kind", "form"), CASES)
WITH_PREFIXES = [(kind, form, p) for kind, form in CASES for p in ((), (5, 20)) if not p or kind != "feature_choice"]


def dead_of(n: int | None) -> Tensor | None:
    return None if n is None else torch.randperm(D_SAE, generator=torch.Generator().manual_seed(3)) < n


def step(made: Any) -> None:
    """One optimiser step as the trainer takes it."""
    optimizer = torch.optim.Adam(made.parameters(), lr=0.1)
    made.loss(batch_for(made)).total.backward()
    made.before_step()
    optimizer.step()
    made.after_step()
    made.zero_grad()


# -- the loss ---------------------------------------------------------------------------------------------------------


# 4: all that AuxK may use; 12: some of the dead, by products over them; 30: by an entry per choice.
@pytest.mark.parametrize("n_dead", [None, 0, 4, 12, 30])
@pytest.mark.parametrize(("kind", "form", "prefixes"), WITH_PREFIXES)
def test_the_loss_and_every_gradient_are_those_of_the_dense_formula(
    kind: str, form: str, prefixes: tuple[int, ...], n_dead: int | None
) -> None:
    dead = dead_of(n_dead)
    for masked, aux in ((False, False), (True, True)):
        made = make(kind, form, prefixes=prefixes)
        made = with_aux(made) if aux else made
        made.warm = 0.6
        batch = batch_for(made, masked=masked)
        batch.x.requires_grad_()
        expected = dense(kind, made, batch, dead)
        wanted = {"total": expected.total} | gradients(made, expected.total, batch.x)
        if kind.startswith("jumprelu"):
            assert int(expected.near.sum()) > 50
        for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
            made = made.to(dtype)
            given = Batch(
                **{n: p if p is None or n == "mask" else p.detach().to(dtype) for n, p in vars(batch).items()}
            )
            given.x.requires_grad_()
            losses = made.loss(given, dead=dead)
            found = {"total": losses.total} | gradients(made, losses.total, given.x)
            assert found.keys() == wanted.keys()
            for name, value in wanted.items():
                assert off(found[name], value) <= bound, (name, dtype, masked)
            for name in ("fvu", "penalty", "aux"):
                mine = getattr(losses, name)
                assert off(mine, getattr(expected, name)) <= bound and not mine.requires_grad, name
            assert losses.fired.dtype == torch.long
            assert torch.equal(losses.fired, (expected.latents > 0).sum(0))
            assert float(losses.l0) == pytest.approx(int(losses.fired.sum()) / len(expected.latents))


@each
@pytest.mark.parametrize("loss", ["mse", "fvu"])
def test_so_it_is_whichever_unit_the_loss_has(kind: str, form: str, loss: str) -> None:
    made = with_aux(make(kind, form, loss=loss))
    batch, dead = batch_for(made, masked=True), dead_of(12)
    expected, found = dense(kind, made, batch, dead).total, made.loss(batch, dead=dead).total
    wanted = gradients(made, expected)
    assert off(found, expected) <= 1e-10
    assert max(off(value, wanted[name]) for name, value in gradients(made, found).items()) <= 1e-10


@pytest.mark.parametrize("penalty", ["l0", "tanh"])
def test_the_thresholds_gradient_is_a_sum_over_what_lies_near_them(penalty: str) -> None:
    kind = f"jumprelu-{penalty}"
    made = make(kind)
    batch, width = batch_for(made), 0.6
    with torch.no_grad():
        pre = (batch.x - made.b_dec) @ made.W_enc + made.b_enc
        z = pre * (pre > made.threshold)
        error, norm = batch.x - z @ made.W_dec - made.b_dec, made.W_dec.norm(dim=1)
        rows, theta = made.W_dec.clone(), made.threshold.tolist()
    expected = torch.zeros(D_SAE, dtype=torch.float64)
    for t in range(TOKENS):
        for n in range(D_SAE):
            if abs(float(pre[t, n]) - theta[n]) >= width / 2:
                continue
            # What one more unit of this latent would do to the loss: 2 (x̂ − x) · W_dec[n], and the penalty.
            pull = -2 * error[t] @ rows[n]
            if penalty == "tanh":
                c = 4 * norm[n]
                pull = pull + c * (1 - (c * z[t, n]).tanh() ** 2)
            expected[n] -= (pull * theta[n] + (1 if penalty == "l0" else 0)) / width
    found = gradients(made, made.loss(batch).total)["threshold"]
    assert off(found, expected / TOKENS) <= 1e-10


@pytest.mark.parametrize("kind", ["standard", "gated", "jumprelu-l0", "jumprelu-tanh"])
@pytest.mark.parametrize("offset", [0.0, -1.5, -50.0])
def test_few_and_many_active_latents_take_two_ways_to_the_same_step(
    monkeypatch: pytest.MonkeyPatch, kind: str, offset: float
) -> None:
    made = with_aux(make(kind, prefixes=(7,)))
    with torch.no_grad():
        made._bias.add_(offset)
    batch, dead, found = batch_for(made), dead_of(12), []
    for share in (0.0, 1.0):
        monkeypatch.setattr(standard, "_SPARSE", share)
        losses = made.loss(batch, dead=dead)
        activity = made._activity(batch.x, batch, None)
        assert (activity.codes is None) == (share == 0 and offset > -50)
        found.append({"total": losses.total, "fired": losses.fired} | gradients(made, losses.total))
    assert bool(found[0]["fired"].any()) == (offset > -50)
    for name, value in found[0].items():
        assert off(found[1][name], value) <= 1e-12, name


@each
def test_the_same_batch_twice_gives_the_same_bytes(kind: str, form: str) -> None:
    made = with_aux(make(kind, form, dtype="float32"))
    batch, dead = batch_for(made), dead_of(30)
    torch.use_deterministic_algorithms(True)
    try:
        one, two = (gradients(made, made.loss(batch, dead=dead).total) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one[name], two[name]) for name in one)


@each
def test_no_gradient_reaches_a_latent_that_has_no_part_and_one_reaches_the_dead(kind: str, form: str) -> None:
    made = with_aux(make(kind, form))
    dead = dead_of(4)
    assert dead is not None
    resting = torch.randperm(D_SAE, generator=torch.Generator().manual_seed(4)) < 15
    resting &= ~dead
    with torch.no_grad():
        made._bias[dead | resting] = -50.0
    batch = batch_for(made, masked=True)
    # Feature Choice gives each latent its tokens, negative as they may be; their ReLU stops the gradient.
    for given, moved in ((None, ~dead & ~resting), (dead, ~resting)):
        losses = made.loss(batch, dead=given)
        assert not bool(losses.fired[dead | resting].any())
        found = gradients(made, losses.total)
        active = (losses.fired > 0) | (moved & dead)
        for name in ("W_enc", "W_dec"):
            size = found[name].abs().sum(0 if name == "W_enc" else 1)
            assert bool((size[resting] == 0).all()) and bool((size[~moved] == 0).all()), name
            # A dead latent that is negative everywhere adds nothing, so its decoder row has nothing to learn from.
            assert bool((size[active & ~dead] > 0).all()), name
        assert bool((found["W_enc"].abs().sum(0)[active] > 0).all())


@each
def test_rows_outside_the_mask_do_not_count(kind: str, form: str) -> None:
    one, two = (with_aux(make(kind, form)) for _ in range(2))
    batch, dead = batch_for(one, masked=True), dead_of(12)
    assert batch.mask is not None and batch.grad is not None and batch.target is not None
    parts: Any = {n: torch.where(batch.mask[:, None], getattr(batch, n), 1e3) for n in ("x", "target", "grad")}
    spoiled = Batch(**parts, mask=batch.mask)
    kept = Batch(x=batch.x[batch.mask], target=batch.target[batch.mask], grad=batch.grad[batch.mask])
    part, whole = one.loss(spoiled, dead=dead), two.loss(kept, dead=dead)
    for name in ("total", "fvu", "aux", "penalty", "l0", "fired"):
        torch.testing.assert_close(getattr(part, name), getattr(whole, name))
    # Nor do they in what a step remembers.
    one.after_step(), two.after_step()
    for name, value in two.state_dict().items():
        torch.testing.assert_close(one.state_dict()[name], value, msg=name)


@each
def test_a_batch_of_which_nothing_counts_changes_nothing(kind: str, form: str) -> None:
    made = make(kind, form)
    step(made)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    losses = made.loss(Batch(**{**vars(batch_for(made, masked=True)), "mask": torch.zeros(TOKENS, dtype=torch.bool)}))
    assert bool(losses.total.isfinite()) and not bool(losses.fired.any()) and float(losses.l0) == 0
    made.after_step()
    usage = before.pop("usage", None)
    for name, value in before.items():
        torch.testing.assert_close(made.state_dict()[name], value, msg=name)
    if usage is not None:
        assert torch.equal(made.usage.argsort(stable=True), usage.argsort(stable=True))


@pytest.mark.parametrize("n_dead", [None, 9, 300])
@pytest.mark.parametrize("kind", ["topk", "gradient_topk", "batchtopk", "feature_choice"])
def test_nothing_as_large_as_all_latents_of_all_tokens_waits_for_the_gradient(kind: str, n_dead: int | None) -> None:
    made = DictionaryOptions(kind=kind, d_sae=400, k=4).make(8)  # type: ignore[arg-type]
    made.init_from(torch.randn(50, 8), seed=0)
    batch = Batch(x=torch.randn(300, 8), grad=torch.randn(300, 8))
    dead = None if n_dead is None else torch.arange(400) < n_dead
    sizes: list[int] = []

    def kept(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with saved_tensors_hooks(kept, lambda tensor: tensor):
        made.loss(batch, dead=dead)
        ours = max(sizes)
        encode_dense(batch.x, made.W_enc, made.b_enc, None, batch.x @ made.W_enc).relu()
    # The weights, and a few entries per token.
    assert ours <= max(8 * 400, 300 * 3 * made.k_aux) < 300 * 400 <= max(sizes)  # type: ignore[operator]


# -- the function -----------------------------------------------------------------------------------------------------


def trained(kind: str, form: str, **settings: Any) -> Any:
    """A dictionary after a step, so that what it keeps of batches is there."""
    made = make(kind, form, **settings)
    step(made)
    return made


@each
@pytest.mark.parametrize("scales", [(3.7, None), (3.7, 0.6)])
def test_folding_the_scale_gives_the_same_function_of_raw_activations(
    kind: str, form: str, scales: tuple[float, float | None]
) -> None:
    if form == "sae" and scales[1] is not None:
        scales = (0.7, None)
    made, x = trained(kind, form), torch.randn(30, D_IN, dtype=torch.float64)
    latents, out = made.encode(scales[0] * x), made(scales[0] * x)
    made.fold_scale(*scales)
    torch.testing.assert_close(made.encode(x), latents / scales[0], rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(made(x), out / (scales[1] or scales[0]), rtol=1e-5, atol=1e-9)
    assert bool(made.encode(x).any())


@each
def test_folding_the_decoders_norm_keeps_the_reconstruction(kind: str, form: str) -> None:
    made = trained(kind, form, unit_norm=False).frozen().requires_grad_(False)
    with torch.no_grad():
        made.W_dec.mul_(torch.linspace(0.3, 3, D_SAE, dtype=torch.float64)[:, None])
    x = torch.randn(30, D_IN, dtype=torch.float64)
    norm, latents, out = made.W_dec.norm(dim=1), made.encode(x), made(x)
    if kind in ("topk", "gradient_topk"):
        # Which latents are largest would change with their scale.
        with pytest.raises(ConfigError, match="norm"):
            made.fold_decoder_norm()
        return
    made.fold_decoder_norm()
    torch.testing.assert_close(made.W_dec.norm(dim=1), torch.ones_like(norm))
    torch.testing.assert_close(made(x), out, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(made.encode(x), latents * norm, rtol=1e-5, atol=1e-9)


@each
def test_what_is_saved_is_the_same_function_and_loads_with_the_same_bits(tmp_path: Path, kind: str, form: str) -> None:
    made, x = (
        trained(kind, form, dtype="float32", unit_norm=kind not in ("standard", "jumprelu-l0")),
        torch.randn(9, D_IN),
    )
    state = {name: value.clone() for name, value in made.state_dict().items()}
    before = made(x)
    torch.testing.assert_close(made.frozen()(x), before, rtol=1e-5, atol=1e-5)
    made.save(tmp_path / "a", notes={"hook_name": "blocks.3.hook_resid_post"})
    assert all(torch.equal(value, state[name]) for name, value in made.state_dict().items()), "saving changed it"
    frozen = made.frozen()
    right, wrong = (SAE, Transcoder) if form == "sae" else (Transcoder, SAE)
    for loader in (right, Dictionary, type(frozen)):
        again: Any = loader.load(tmp_path / "a")
        assert type(again) is type(frozen) and again.cfg.architecture == made.cfg.architecture
        assert again.state_dict().keys() == frozen.state_dict().keys()
        assert all(torch.equal(v, frozen.state_dict()[n]) for n, v in again.state_dict().items())
        assert torch.equal(again(x), frozen(x)) and not again(x).requires_grad
    with pytest.raises(ArtifactError, match=rf"holds a {type(frozen).__name__}, not a {wrong.__name__}"):
        wrong.load(tmp_path / "a")
    assert again.cfg.metadata["hook_name"] == "blocks.3.hook_resid_post"
    again.save(tmp_path / "b")
    for name in (CFG, WEIGHTS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@each
def test_inference_follows_the_formula_token_by_token(kind: str, form: str) -> None:
    made, x = trained(kind, form), torch.randn(2, 5, D_IN, dtype=torch.float64)
    frozen, latents = made.frozen(), made.encode(x)
    for wanted in (True, False):
        other = made.requires_grad_(wanted).train(wanted).frozen()
        assert other.training == wanted and {p.requires_grad for p in other.parameters()} == {wanted}
    torch.testing.assert_close(frozen.decode(frozen.encode(x)) + (x @ made.W_skip.T if made.has_skip else 0), made(x))
    alone = torch.stack([made.encode(x.view(10, -1)[i]) for i in range(10)])
    torch.testing.assert_close(alone, latents.view(10, -1))
    assert bool((latents >= 0).all()) and made(x).shape == (2, 5, D_OUT if form != "sae" else D_IN)
    if kind in ("topk", "gradient_topk"):
        assert int((latents > 0).sum(-1).max()) <= 4


def test_every_kind_is_held_to_this_contract() -> None:
    kinds = DictionaryOptions.model_fields["kind"].annotation.__args__  # type: ignore[union-attr]
    assert {kind.split("-")[0] for kind in KINDS} == set(kinds)
