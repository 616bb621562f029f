"""A loss of what a reconstruction does: its gradient, its weight beside the distance, and fits that go on."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from interp.core.errors import ConfigError
from interp.data.beyond import Beyond
from interp.data.store import Batch
from interp.dictionaries.base import Losses
from interp.dictionaries.topk import TopKConfig, TopKSAE
from interp.train.config import TrainOptions
from interp.train.trainer import DictionaryFit, TrainingError
from tests.dictionaries import CASES, batch_for, make

each = pytest.mark.parametrize(("kind", "form"), CASES)


def kept(batch: Batch) -> Tensor:
    """What a batch's reconstruction is to be, without the rows that the mask leaves out."""
    target = batch.x if batch.target is None else batch.target
    return target if batch.mask is None else target[batch.mask]


def distance(batch: Batch) -> Any:
    """The reconstruction's own loss, as a loss of what it does."""
    return lambda y: (kept(batch) - y).pow(2).sum() / len(y)


def step_of(made: Any, batch: Batch) -> dict[str, Tensor]:
    """Total, loss beyond and gradients of one batch."""
    made.zero_grad()
    losses = made.loss(batch)
    losses.total.backward()
    found = {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}
    return {**found, "total": losses.total.detach(), "beyond": losses.beyond}


def assert_near(found: dict[str, Tensor], wanted: dict[str, Tensor], bound: float = 1e-10) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if name != "beyond":
            assert float((found[name] - value).abs().max()) <= bound * max(1.0, float(value.abs().max())), name


@each
@pytest.mark.parametrize(
    ("weight", "reconstruction", "balance"),
    [(1.0, 0.0, False), (0.75, 0.25, False), (3.0, 2.0, True), (1.0, 0.0, True)],
)
def test_the_distance_itself_as_a_loss_beyond_gives_the_same_step(
    kind: str, form: str, weight: float, reconstruction: float, balance: bool
) -> None:
    made = make(kind, form, loss="mse")
    batch = batch_for(made, masked=form != "sae")
    plain = step_of(made, batch)
    assert plain["beyond"] is None
    beyond = Beyond(distance(batch), weight=weight, reconstruction=reconstruction, balance=balance)
    found = step_of(made, replace(batch, beyond=beyond))
    assert_near(found, plain)
    assert not found["beyond"].requires_grad and float(found["beyond"]) > 0


def test_the_reconstruction_that_it_is_given_is_that_of_all_latents_in_the_targets_own_units() -> None:
    made, seen = make("batchtopk", prefixes=(7, 20)), list[Tensor]()
    batch = batch_for(made)

    def look(y: Tensor) -> Tensor:
        seen.append(y.detach())
        return y.sum()

    losses = made.loss(replace(batch, beyond=Beyond(look).of(lambda made: made / 4.0)))
    error = (batch.x - 4 * seen[0]).pow(2).sum()
    assert float(losses.fvu) == pytest.approx(float(error / (batch.x - batch.x.mean(0)).pow(2).sum()))
    assert float(losses.beyond) == pytest.approx(float(seen[0].sum()))


def test_balance_weighs_both_gradients_at_the_size_of_the_reconstructions_loss() -> None:
    made = make("topk")
    batch = batch_for(made)
    direction = torch.randn(made.d_out, dtype=torch.float64)

    def loss(y: Tensor) -> Tensor:
        return (y @ direction).exp().mean()

    def with_weights(weight: float, reconstruction: float, balance: bool) -> dict[str, Tensor]:
        beyond = Beyond(loss, weight=weight, reconstruction=reconstruction, balance=balance)
        return step_of(made, replace(batch, beyond=beyond))

    own, alone = step_of(made, batch), with_weights(1.0, 0.0, False)
    factor = own["total"] / alone["total"]
    wanted = {name: (2 * own[name] + 6 * factor * alone[name]) / 8 for name in own if name != "beyond"}
    assert_near(with_weights(6.0, 2.0, True), {**wanted, "beyond": alone["beyond"]})
    assert float(wanted["total"]) == pytest.approx(float(own["total"]))
    # Teeth: the two gradients are not alike.
    assert float((own["W_dec"] - factor * alone["W_dec"]).abs().max()) > 1e-3


@each
def test_a_loss_beyond_of_no_weight_changes_no_bit(kind: str, form: str) -> None:
    made = make(kind, form, dtype="float32")
    batch = batch_for(made)
    wild = Beyond(lambda y: (1e3 * y).exp().sum(), weight=0.0)
    plain, found = step_of(made, batch), step_of(made, replace(batch, beyond=wild))
    assert all(torch.equal(found[name], value) for name, value in plain.items() if name != "beyond")


# -- fits -------------------------------------------------------------------------------------------------------

D, BATCH = 16, 64


def batches(beyond: Beyond | None = None, *, seed: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(D, D, generator=generator)
    for _ in itertools.count():
        yield Batch(x=5 * torch.randn(BATCH, D, generator=generator) @ mix + 2.0, beyond=beyond)


def fit_of(*, trained: TopKSAE | None = None, **changes: Any) -> DictionaryFit:
    options = TrainOptions.model_validate({"tokens": 30 * BATCH, "batch_size": BATCH, "lr": 1e-2, **changes})
    sae = TopKSAE(TopKConfig(d_in=D, d_sae=40, k=4)) if trained is None else trained
    return DictionaryFit(sae, options, trained=trained is not None)


def test_metrics_have_a_column_for_it_and_the_weights_of_plain_training_where_it_weighs_nothing() -> None:
    plain, lines = fit_of(), list[Any]()
    plain.run(batches(), progress=False)
    seen = list[float]()

    def loss(y: Tensor) -> Tensor:
        seen.append(float(y.detach().pow(2).mean()))
        return y.pow(2).mean()

    fit = fit_of(log_every=10)
    fit.run(batches(Beyond(loss, "kl", weight=0.0)), log=lines.append, progress=False)
    assert all(torch.equal(v, plain.dictionary.state_dict()[n]) for n, v in fit.dictionary.state_dict().items())
    assert "kl" not in plain.last and [line["kl"] for line in lines] == pytest.approx(
        [sum(seen[i : i + 10]) / 10 for i in (0, 10, 20)], rel=1e-5
    )
    # It sees raw units: what training scales is of norm √D.
    assert seen[-1] > 10
    # Teeth: with a weight the steps are others.
    other = fit_of()
    other.run(batches(Beyond(loss, "kl", weight=0.1)), progress=False)
    assert not torch.equal(other.dictionary.W_dec, plain.dictionary.W_dec)


def test_a_fit_that_goes_on_in_the_middle_of_an_interval_reports_the_same() -> None:
    beyond, lines, again = Beyond(lambda y: y.abs().mean(), "ce"), list[Any](), list[Any]()
    whole, states = fit_of(log_every=10, checkpoint_every=17), list[Any]()
    whole.run(
        batches(beyond),
        log=lines.append,
        save=lambda: states.append((whole.steps, whole.record(), {k: v.clone() for k, v in whole.tensors().items()})),
        progress=False,
    )
    steps, record, tensors = states[0]
    assert steps == 17 and float(tensors["beyond_sum"]) > 0
    rest = fit_of(log_every=10, checkpoint_every=17)
    rest.restore(record, tensors)
    assert rest.record()["beyond"] == "ce" and "beyond_sum" in rest.tensors()
    rest.run(itertools.islice(batches(beyond), 17, None), log=again.append, progress=False)
    assert [line["ce"] for line in again] == [line["ce"] for line in lines[1:]]


def test_a_trained_dictionary_is_scaled_as_its_activations_are_and_begins_where_it_was() -> None:
    first = fit_of(tokens=200 * BATCH)
    first.run(batches(), progress=False)
    first.finish()
    sae: Any = first.dictionary
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    x = next(batches()).x
    reconstructed = sae(x)
    fit = fit_of(trained=sae)
    fit.begin([next(batches())])
    assert abs(fit.scale - 1) > 0.3
    with torch.no_grad():
        assert float((sae(x * fit.scale) / fit.scale - reconstructed).abs().max()) < 1e-3 * float(x.abs().max())
    fit.finish()
    for name, value in sae.state_dict().items():
        assert float((value - before[name]).abs().max()) <= 1e-5 * float(before[name].abs().max()), name
    # It goes on from there: the first step's FVU is that of the trained one, far below where weights are drawn.
    lines = list[Any]()
    goes_on, anew = fit_of(trained=sae, log_every=1), fit_of(log_every=1)
    goes_on.run(itertools.islice(batches(), 1), log=lines.append, progress=False)
    anew.run(itertools.islice(batches(), 1), log=lines.append, progress=False)
    missed = (x - reconstructed).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    assert lines[0]["fvu"] == pytest.approx(float(missed), rel=1e-3) and lines[1]["fvu"] > 1.2 * lines[0]["fvu"]


def test_a_loss_beyond_that_is_no_number_stops_the_fit_and_one_that_is_not_followed_is_refused() -> None:
    with pytest.raises(TrainingError, match="the loss became NaN or infinite at step 1"):
        fit_of().run(batches(Beyond(lambda y: (y * torch.nan).sum())), progress=False)

    class Deaf(TopKSAE):
        def loss(self, batch: Batch, *, dead: Tensor | None = None) -> Losses:
            return super().loss(replace(batch, beyond=None), dead=dead)

    fit = fit_of()
    fit.dictionary = Deaf(TopKConfig(d_in=D, d_sae=40, k=4))
    with pytest.raises(ConfigError, match="a Deaf has no loss behind its site, and kl was asked for"):
        fit.run(batches(Beyond(lambda y: y.sum(), "kl")), progress=False)
