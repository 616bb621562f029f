"""What training does to a dictionary of each kind: constraints, warm-ups, and planted atoms that it has to find."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from interp.core.errors import ConfigError
from interp.data.store import Batch
from interp.dictionaries.options import DictionaryOptions
from tests.dictionaries import ATOMS, BATCH, CASES, D_SAE, KINDS, D, K, batch_for, fitted, make, mmcs

each = pytest.mark.parametrize(("kind", "form"), CASES)
WITH_K = ("topk", "batchtopk", "gradient_topk", "feature_choice")


@each
def test_a_step_keeps_its_constraints(kind: str, form: str) -> None:
    made = make(kind, form)
    optimizer = torch.optim.Adam(made.parameters(), lr=0.3)
    before = made.W_dec.detach().clone()
    for seed in range(3):
        made.loss(batch_for(made, seed=seed)).total.backward()
        made.before_step()
        if made.terms.unit_norm and seed:
            assert float((made.W_dec.grad * made.W_dec.detach()).sum(1).abs().max()) < 1e-10
        optimizer.step()
        optimizer.zero_grad()
        made.after_step()
        norm = made.W_dec.detach().norm(dim=1)
        assert made.terms.unit_norm == (kind != "standard")
        assert bool(((norm - 1).abs() < 1e-12).all()) == (kind != "standard")
    assert float((made.W_dec.detach() - before).abs().max()) > 0.3
    if "jumprelu" in kind:
        with torch.no_grad():
            made.threshold[:5] = -0.2
            above = made.threshold[5:].clone()
        made.after_step()
        assert torch.equal(made.threshold[:5], torch.zeros_like(made.threshold[:5]))
        assert torch.equal(made.threshold[5:], above) and bool((above >= 0).all())


@pytest.mark.parametrize("kind", WITH_K)
def test_k_goes_from_its_start_to_its_end(kind: str) -> None:
    made = make(kind, k_start=20, k_warmup=0.5)
    with torch.no_grad():
        made._bias.add_(50)  # all are positive: what is chosen fires
    batch = batch_for(made)
    for done, k in ((0.0, 20), (0.25, 12), (0.4, 7), (0.5, K), (1.0, K)):
        made.at(done)
        assert made.k_now == k and int(made.loss(batch).fired.sum()) == k * len(batch.x)
    plain = make(kind)
    plain.at(0.0)
    assert plain.k_now == K
    wide = make(kind, k_start=1000, k_warmup=0.5)
    wide.at(0.0)
    assert wide.k_now == D_SAE and bool(wide.loss(batch).total.isfinite())


@pytest.mark.parametrize("kind", ["standard", "gated", "jumprelu-l0", "jumprelu-tanh"])
def test_the_penaltys_weight_rises_over_the_warm_up_and_the_penalty_is_reported_without_it(kind: str) -> None:
    made = make(kind, sparsity=3.0, sparsity_warmup=0.2)
    batch = batch_for(made)

    def total(done: float) -> float:
        made.at(done)
        losses = made.loss(batch)
        assert float(losses.penalty) == penalty
        return float(losses.total.detach())

    penalty = float(made.loss(batch).penalty)
    assert penalty > 0
    for done, share in ((0.05, 0.25), (0.1, 0.5), (0.2, 1.0), (0.9, 1.0)):
        assert total(done) - total(0.0) == pytest.approx(share * 3.0 * penalty)
    at_once = make(kind, sparsity=3.0, sparsity_warmup=0.0)
    at_once.at(0.0)
    assert float(at_once.loss(batch).total.detach()) == pytest.approx(total(1.0))


@each
def test_training_begins_at_the_mean_with_unit_rows_and_no_more_error_than_that(kind: str, form: str) -> None:
    made = make(kind, form, dtype="float32", bandwidth=None)
    batch = batch_for(made, tokens=400)
    other = form != "sae"
    made.init_from(batch.x, seed=5, target=batch.target if other else None)
    reached = batch.target if other else batch.x
    assert reached is not None
    torch.testing.assert_close(made.b_dec, reached.mean(0))
    torch.testing.assert_close(made.W_dec.norm(dim=1), torch.ones(D_SAE))
    # A threshold does not shrink with the encoder, so that the fit to what lies above it is not exact.
    assert float(made.loss(batch).fvu) < (1.001 if "jumprelu" in kind else 1)
    again = make(kind, form, seed=9, dtype="float32", bandwidth=None)
    again.init_from(batch.x, seed=5, target=batch.target if other else None)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in made.state_dict().items())
    again.init_from(batch.x, seed=6, target=batch.target if other else None)
    assert not torch.equal(made.W_dec, again.W_dec)


def test_the_threshold_is_the_mean_of_the_batches_smallest_choices() -> None:
    made, smallest = make("batchtopk"), []
    for seed in range(4):
        batch = batch_for(made, seed=seed)
        pre = ((batch.x - made.b_dec) @ made.W_enc + made.b_enc).detach()
        smallest.append(float(pre.flatten().sort(descending=True).values[K * len(batch.x) - 1]))
        made.loss(batch)
        made.after_step()
    weights = torch.tensor([0.9**i for i in range(4)]).flip(0)
    expected = float((weights * torch.tensor(smallest)).sum() / weights.sum())
    assert float(made.threshold) == pytest.approx(expected, rel=1e-6)
    frozen = made.frozen()
    assert torch.equal(frozen.threshold, made.threshold.expand(D_SAE))
    x = batch_for(made, seed=9).x
    assert int((frozen.encode(x) > 0).sum()) == pytest.approx(K * len(x), rel=0.25)


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ConfigError, match="prefixes go up to 40; each must be below d_sae, which is 40"):
        make("topk", prefixes=(40,))
    for bad in ((5, 5), (0, 3), (9, 4)):
        with pytest.raises(ValueError, match="must rise"):
            DictionaryOptions(prefixes=bad)
    for kind in ("topk", "gated", "gradient_topk", "feature_choice"):
        with pytest.raises(ValueError, match="no name in SAELens"):
            DictionaryOptions(kind=kind, form="transcoder")
    with pytest.raises(ConfigError, match="say which, as target"):
        DictionaryOptions(kind="standard", form="transcoder").make(8)
    with pytest.raises(ValueError, match="feature_choice"):
        DictionaryOptions(kind="feature_choice", prefixes=(3,))


# -- planted atoms ----------------------------------------------------------------------------------------------------


def planted(seed: int = 71) -> tuple[Tensor, Iterator[Batch]]:
    """Unit atoms [ATOMS D], and endless batches in which each is there with probability 4 in 64, of size 1 to 2.

    The gradient points along a few of the atoms, for the kind that wants one.
    """
    generator = torch.Generator().manual_seed(seed)
    atoms = normalize(torch.randn(ATOMS, D, generator=generator), dim=1)

    def batches() -> Iterator[Batch]:
        while True:
            there = torch.rand(BATCH, ATOMS, generator=generator) < 4 / ATOMS
            size = 1 + torch.rand(BATCH, ATOMS, generator=generator)
            grad = torch.randn(BATCH, 8, generator=generator) @ atoms[:8]
            yield Batch(x=7 * (there * size) @ atoms + 0.5, grad=grad)

    return atoms, batches()


@pytest.mark.parametrize("kind", KINDS)
def test_planted_atoms_are_recovered(kind: str) -> None:
    atoms, batches = planted()
    made = fitted(batches, kind)
    assert mmcs(atoms, made) >= 0.95
    # As a dictionary of raw activations, chosen by what it keeps for inference.
    x = next(batches).x
    made = made.frozen()
    assert float((x - made(x)).square().sum() / (x - x.mean(0)).square().sum()) < 0.2
    assert 3.5 < float((made.encode(x) > 0).sum(1).double().mean()) < 5
    # Null control: activations without atoms.
    noise = (Batch(x=torch.randn(BATCH, D), grad=torch.randn(BATCH, D)) for _ in range(60))
    assert mmcs(atoms, fitted(noise, kind, tokens=30_000)) < 0.5


@pytest.mark.parametrize("kind", ["standard", "jumprelu", "batchtopk"])
def test_a_transcoder_begins_with_active_latents_that_say_something_of_its_target(kind: str) -> None:
    generator = torch.Generator().manual_seed(3)
    x = 2 + torch.randn(4096, 64, generator=generator)
    y = (x @ torch.randn(64, 48, generator=generator)).relu()
    options = DictionaryOptions.model_validate({"kind": kind, "form": "transcoder", "d_sae": 256, "k": 16})
    made = options.make(64, 48)
    made.init_from(x, seed=0, target=y)
    losses = made.loss(Batch(x, target=y))
    assert losses.l0 >= 4 and losses.fvu < 0.9
    shuffled = y[torch.randperm(len(y), generator=generator)]
    made.init_from(x, seed=0, target=shuffled)
    assert made.loss(Batch(x, target=shuffled)).fvu > 0.97
