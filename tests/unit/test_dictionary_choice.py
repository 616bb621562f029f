"""Which entries of a batch are latents: BatchTopK, Feature Choice and g-SAE against sorting by hand."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from interp.core.errors import ConfigError, DataError, ShapeError
from interp.data.store import Batch
from interp.dictionaries import select
from interp.dictionaries.batchtopk import zipf_budget
from interp.dictionaries.select import Encoder, encode_batch_topk, encode_columns
from tests.dictionaries import D_IN, D_SAE, batch_for, dense, gradients, make, off

T, D, N = 23, 5, 17


def problem(*, ties: bool = False, scored: bool = False) -> tuple[Tensor, Encoder, Tensor, Tensor]:
    """Activations, an encoder of them, and its pre-activations and scores [T N]; with ties most of them are shared."""
    x, W_enc, b_enc = torch.randn(T, D), torch.randn(D, N), torch.randn(N)
    if ties:
        x, W_enc, b_enc = x.sign(), W_enc.sign(), b_enc.sign()
    weight = torch.linspace(0.5, 2, N).round() if ties else torch.linspace(0.5, 2, N)
    made = Encoder(W_enc.double(), b_enc.double(), score=(lambda pre, _: pre * weight) if scored else None)
    pre = x.double() @ made.W_enc + made.b_enc
    return x.double(), made, pre, pre * weight if scored else pre


def by_sorting(score: Tensor, n: int) -> Tensor:
    """The n largest entries as a mask, of equal ones the first in reading order."""
    order = sorted(range(score.numel()), key=lambda i: (-float(score.flatten()[i]), i))[:n]
    mask = torch.zeros(score.numel(), dtype=torch.bool)
    mask[order] = True
    return mask.view_as(score)


def chosen(codes: Any) -> Tensor:
    mask = torch.zeros(codes.entries.n_tokens, N, dtype=torch.long)
    mask.index_put_((codes.entries.tokens, codes.index), torch.ones_like(codes.index), accumulate=True)
    assert bool((mask <= 1).all())
    return mask.bool()


@pytest.mark.parametrize("rows", [2, 7, 100])
@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n", [0, 1, 40, 200, T * N - 1, T * N])
def test_the_largest_entries_of_a_batch_are_those_of_sorting_it_whatever_the_floor(
    monkeypatch: pytest.MonkeyPatch, n: int, ties: bool, scored: bool, rows: int
) -> None:
    monkeypatch.setattr(select, "_CHUNK_BYTES", {"cpu": rows * N * 8})
    x, encoder, pre, score = problem(ties=ties, scored=scored)
    expected = by_sorting(score, n)
    least = float(score[expected].min()) if n else 0.0
    for floor in (None, -math.inf, least - 1, least - 1e-9, least, least + 1, 1e9):
        codes, revived, found = encode_batch_topk(x, encoder, n=n, floor=floor)
        assert torch.equal(chosen(codes), expected), floor
        assert float(found) == pytest.approx(least) and revived is None
        torch.testing.assert_close(codes.values, pre[expected])


@pytest.mark.parametrize("rows", [2, 100])
@pytest.mark.parametrize("n_dead", [0, 3, 12])
def test_the_second_choice_is_each_tokens_largest_among_the_dead_whatever_the_floor(
    monkeypatch: pytest.MonkeyPatch, n_dead: int, rows: int
) -> None:
    monkeypatch.setattr(select, "_CHUNK_BYTES", {"cpu": rows * N * 8})
    x, encoder, pre, _ = problem()
    dead = torch.randperm(N) < n_dead
    encoder = Encoder(encoder.W_enc, encoder.b_enc, dead=dead, k_dead=5)
    best = pre.masked_fill(~dead, -math.inf).sort(dim=1, descending=True).values[:, : min(5, n_dead)]
    for made in (
        lambda: encode_batch_topk(x, encoder, n=40)[1],
        lambda: encode_batch_topk(x, encoder, n=40, floor=-1.0)[1],
        lambda: encode_batch_topk(x, encoder, n=40, floor=1e9)[1],
        lambda: encode_columns(x, encoder, per_latent=torch.full((N,), 3))[1],
    ):
        revived = made()
        assert revived is not None and revived.values.shape == (T, 5)
        values = revived.values.sort(dim=1, descending=True).values
        held = torch.cat([best, best.new_zeros(T, 5 - best.shape[1])], 1).sort(dim=1, descending=True).values
        torch.testing.assert_close(values, held)


def test_one_token_and_none() -> None:
    x, encoder, pre, _ = problem()
    codes, _, least = encode_batch_topk(x[:1], encoder, n=4, floor=0.1)
    assert torch.equal(codes.index.sort().values, pre[0].topk(4).indices.sort().values)
    assert float(least) == pytest.approx(float(pre[0].topk(4).values[-1]))
    for codes in (
        encode_batch_topk(x[:0], encoder, n=0, floor=0.1)[0],
        encode_columns(x[:0], encoder, per_latent=torch.ones(N, dtype=torch.long))[0],
    ):
        assert codes.values.shape == (0,) and codes.entries.n_tokens == 0


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_chosen_is_refused() -> None:
    x, encoder, _, _ = problem()
    for n in (-1, T * N + 1):
        with pytest.raises(ConfigError, match=rf"{n} entries are to be chosen among {T} tokens"):
            encode_batch_topk(x, encoder, n=n)
    with pytest.raises(ShapeError):
        encode_batch_topk(x[:, 1:], encoder, n=3)
    with pytest.raises(ShapeError):
        encode_columns(x[:, 1:], encoder, per_latent=torch.ones(N))


class _Largest(TorchDispatchMode):
    """The most elements that an operation gave while this was on."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            self.elements = max(self.elements, one.numel() if isinstance(one, Tensor) else 0)
        return out


@pytest.mark.parametrize("floor", [None, 8.0])
def test_choosing_in_a_batch_holds_few_pre_activations_at_a_time(
    monkeypatch: pytest.MonkeyPatch, floor: float | None
) -> None:
    x, encoder = torch.randn(300, 8), Encoder(torch.randn(8, 400), torch.zeros(400))
    monkeypatch.setattr(select, "_CHUNK_BYTES", {"cpu": 7 * 400 * 4})
    with _Largest() as largest:
        encode_batch_topk(x, encoder, n=300, floor=floor)
    # Without a floor each chunk sends as many candidates as are wanted in all.
    assert largest.elements <= (8 * 400 if floor else 300 * -(-300 // 7))
    with _Largest() as teeth:
        encode_columns(x, encoder, per_latent=torch.ones(400, dtype=torch.long))
    assert teeth.elements >= 300 * 400


# -- Feature Choice ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
def test_each_latent_takes_its_largest_tokens_and_exactly_its_budget(ties: bool) -> None:
    x, encoder, pre, score = problem(ties=ties, scored=True)
    budget = torch.arange(N) * 2  # from none to more than there are tokens
    codes, _ = encode_columns(x, encoder, per_latent=budget)
    mask = chosen(codes)
    assert torch.equal(mask.sum(0), budget.clamp(max=T))
    expected = torch.stack([by_sorting(score[:, i], min(T, int(budget[i]))) for i in range(N)], 1)
    assert torch.equal(mask, expected)
    torch.testing.assert_close(codes.values, pre[expected])


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.0), (0.5, 1.0), (1.0, 0.3), (3.0, 0.0)])
@pytest.mark.parametrize(("k", "tokens"), [(1, 1), (4, 1), (3, 7), (4, 512), (40, 9), (39, 100)])
def test_budgets_add_up_to_k_per_token_and_fall_with_usage(alpha: float, beta: float, k: int, tokens: int) -> None:
    made = make("feature_choice", k=k, zipf_alpha=alpha, zipf_beta=beta)
    made.usage.copy_(torch.rand(D_SAE))
    budget = made.budget(tokens)
    assert int(budget.sum()) == k * tokens and int(budget.min()) >= 0 and int(budget.max()) <= tokens
    ranked = budget[made.usage.argsort(descending=True)]
    assert bool((ranked.diff() <= 0).all())
    shares = zipf_budget(D_SAE, float(k * tokens), alpha, beta)
    assert float(shares.sum()) == pytest.approx(k * tokens)
    ranks = torch.arange(1, D_SAE + 1, dtype=torch.float64)
    torch.testing.assert_close(shares / shares[0], ((1 + beta) / (ranks + beta)) ** alpha)
    if float(shares[0]) <= tokens:
        assert float((ranked - shares).abs().max()) < 1


def test_a_latent_that_was_never_given_a_token_is_at_rest_at_inference() -> None:
    made = make("feature_choice", k=1, zipf_alpha=3.0)
    assert bool(made.encode(batch_for(made).x).any()), "an untrained dictionary has no thresholds"
    budget = made.budget(48)
    assert int((budget == 0).sum()) > 5
    losses = made.loss(batch_for(made))
    made.after_step()
    assert not bool(losses.fired[budget == 0].any())
    for one in (made, made.frozen()):
        active = one.encode(batch_for(made).x).any(0)
        # What is chosen lies at its threshold or above.
        assert not bool(active[losses.fired == 0].any()) and bool(active[losses.fired > 1].all())
    made.fold_scale(2.0)
    assert not bool(made.encode(batch_for(made).x / 2)[:, budget == 0].any())


def test_under_used_latents_get_the_error_from_the_first_averages_on() -> None:
    made = make("batchtopk", aux="zipf", zipf_alpha=0.0, zipf_beta=1.0)
    none = torch.zeros(D_SAE, dtype=torch.bool)
    assert made._needy(None) is None
    fired = torch.full((D_SAE,), 4 * 48 // D_SAE + 1)
    fired[:7] = 1
    made._seen, made._fired = (torch.ones(1), torch.ones(1, dtype=torch.bool)), (fired, 48)
    made.after_step()
    # After one batch the averages hold 1 % of it, and it is with 1 % of the budget that they are compared.
    assert torch.equal(made._needy(none), torch.arange(D_SAE) < 7)
    assert torch.equal(made._needy(torch.arange(D_SAE) == 30), (torch.arange(D_SAE) < 7) | (torch.arange(D_SAE) == 30))
    batch = batch_for(made)
    losses = made.loss(batch, dead=none)
    plain = make("batchtopk")
    plain.after_step()
    expected = dense("batchtopk", plain, batch, torch.arange(D_SAE) < 7)
    assert off(losses.total, expected.total) <= 1e-10 and float(losses.aux) > 0
    wanted = gradients(plain, expected.total)
    assert max(off(value, wanted[name]) for name, value in gradients(made, losses.total).items()) <= 1e-10


# -- g-SAE ------------------------------------------------------------------------------------------------------------


def test_without_weight_on_the_gradient_it_is_topk_to_the_bit() -> None:
    first, second = make("gradient_topk", beta=0.0, dtype="float32"), make("topk", dtype="float32")
    optimizers = [torch.optim.Adam(made.parameters(), lr=0.01) for made in (first, second)]
    start = first.W_enc.detach().clone()
    for seed in range(20):
        dead = torch.arange(D_SAE) < seed
        for made, optimizer in zip((first, second), optimizers, strict=True):
            made.loss(batch_for(made, masked=True, seed=seed), dead=dead).total.backward()
            made.before_step()
            optimizer.step()
            optimizer.zero_grad()
            made.after_step()
    assert not torch.equal(first.W_enc, start)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    assert type(first.frozen()) is type(second)


@pytest.mark.parametrize("beta", [1e-3, 1.0, 50.0])
def test_of_two_equal_latents_the_one_along_the_gradient_is_chosen(beta: float) -> None:
    made = make("gradient_topk", beta=beta, k=1)
    batch = batch_for(made)
    assert batch.grad is not None
    along = torch.zeros(D_IN, dtype=torch.float64)
    along[0] = 1
    with torch.no_grad():
        made.W_enc.copy_(made.W_enc[:, :1].expand(-1, D_SAE))
        made.b_enc.fill_(1.0)
        made.W_dec[:, 0] = 0  # across the gradient, all but one
        made.W_dec[23] = -along
        made.W_dec.div_(made.W_dec.norm(dim=1, keepdim=True))
    fired = made.loss(Batch(x=batch.x, grad=batch.grad[:, :1] * along)).fired
    positive = (((batch.x - made.b_dec) @ made.W_enc + made.b_enc)[:, 0] > 0).sum()
    assert int(fired[23]) == int(fired.sum()) == int(positive) > 10
    # Null control: where the gradient points elsewhere, nothing favours it.
    across = torch.zeros(D_IN, dtype=torch.float64)
    across[3] = 1
    assert int(made.loss(Batch(x=batch.x, grad=batch.grad[:, :1] * across)).fired[23]) == 0


def test_the_size_and_the_sign_of_the_gradient_do_not_matter_and_it_gets_no_gradient() -> None:
    made = make("gradient_topk")
    batch = batch_for(made)
    assert batch.grad is not None
    grad = batch.grad.requires_grad_()
    losses = [made.loss(Batch(x=batch.x, grad=factor * grad)) for factor in (1.0, -1e-4, 1e6)]
    assert all(torch.equal(one.fired, losses[0].fired) and off(one.total, losses[0].total) < 1e-12 for one in losses)
    assert torch.autograd.grad(losses[0].total, [grad], allow_unused=True)[0] is None
    assert not torch.equal(losses[0].fired, make("topk").loss(batch).fired)


def test_a_batch_without_gradients_is_refused() -> None:
    for beta in (0.0, 1.0):
        made = make("gradient_topk", beta=beta)
        with pytest.raises(DataError, match="this batch has none"):
            made.loss(Batch(x=batch_for(made).x))
    with pytest.raises(ConfigError, match="saved as the TopK SAE"):
        type(made).from_cfg({"architecture": "topk", "d_in": 4, "d_sae": 8, "k": 2})
