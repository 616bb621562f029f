"""The average of the weights: its formula, what it is good for, and that it is what is kept of a training."""

import itertools
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from interp.dictionaries.base import Dictionary
from interp.dictionaries.options import DictionaryOptions
from interp.train.average import WeightAverage
from interp.train.config import TrainOptions
from interp.train.trainer import DictionaryFit, train_dictionary
from tests.unit.test_optimizers import NoReading
from tests.unit.test_trainer import ACTIVE, ATOMS, BATCH, D, fresh, planted


def dictionary(kind: Any = "topk", form: Any = "sae") -> Dictionary:
    return DictionaryOptions(kind=kind, form=form, d_sae=ATOMS, k=ACTIVE).make(D, D)


def options(**changes: object) -> TrainOptions:
    return TrainOptions.model_validate({"tokens": 20 * BATCH, "batch_size": BATCH, "lr": 1e-2, **changes})


def state(made: Dictionary) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in made.state_dict().items()}


def moved(made: Dictionary, to: float) -> None:
    with torch.no_grad():
        for p in made.parameters():
            p.fill_(to)


def test_the_share_that_stays_rises_to_the_decay() -> None:
    made, average = dictionary(), WeightAverage(0.3)
    values, expected = [5.0, 1.0, -2.0, 4.0, 0.5], 0.0
    for step, value in enumerate(values):
        moved(made, value)
        with NoReading():
            average.update(made, step)
        # Of what was before the first step, and of the copy then made, nothing is left.
        stays = 0.0 if step == 0 else min(0.3, (1 + step) / (10 + step))
        expected = stays * expected + (1 - stays) * value
        assert float(average.held["W_enc"][0, 0]) == pytest.approx(expected, rel=1e-6)
    assert (1 + 1) / (10 + 1) < 0.3 < (1 + 4) / (10 + 4)  # both halves were met
    assert set(average.held) == {name for name, _ in made.named_parameters()}


@pytest.mark.parametrize(
    ("kind", "form"), [("topk", "sae"), ("batchtopk", "sae"), ("jumprelu", "skip_transcoder"), ("standard", "sae")]
)
def test_a_decay_of_0_is_no_average_to_the_bit(kind: str, form: str) -> None:
    def trained(ema: float | None) -> dict[str, Tensor]:
        made = dictionary(kind, form)
        batches: Any = planted()[1]
        if form != "sae":
            batches = (type(b)(x=b.x, target=b.x.flip(1)) for b in batches)
        train_dictionary(batches, made, options(ema=ema, dead_after=2000), progress=False)
        return state(made)

    plain, zero, some = trained(None), trained(0.0), trained(0.9)
    assert all(torch.equal(zero[name], value) for name, value in plain.items())
    assert not torch.equal(some["W_enc"], plain["W_enc"])
    # Thresholds and the like are no weights: of them the last stay.
    buffers = [name for name, _ in dictionary(kind, form).named_buffers()]
    assert bool(buffers) == (kind == "batchtopk")
    assert all(torch.equal(some[name], plain[name]) for name in buffers)


def test_the_average_is_nearer_to_the_truth_than_the_last_weights() -> None:
    torch.manual_seed(0)
    made, average = dictionary(), WeightAverage(0.98)
    moved(made, 5.0)
    truth = {name: torch.randn_like(p) for name, p in made.named_parameters()}
    for step in range(400):  # down a bowl whose gradient has as much noise as it has slope at a distance of 1
        with torch.no_grad():
            for name, p in made.named_parameters():
                p.sub_(0.3 * (p - truth[name] + torch.randn_like(p)))
        average.update(made, step)
    for name, p in made.named_parameters():
        last, mean = (float((value - truth[name]).detach().norm()) for value in (p, average.held[name]))
        assert mean < 0.4 * last, name
    # Null control: where weights go one way, the average is behind.
    made, average = dictionary(), WeightAverage(0.98)
    for step in range(100):
        moved(made, float(step))
        average.update(made, step)
    assert float(average.held["b_dec"][0]) < 95


def test_the_training_does_not_see_the_average_and_what_is_kept_is_within_constraints() -> None:
    lines: dict[float | None, list[dict[str, Any]]] = {None: [], 0.9: []}
    fits = {}
    for ema, held in lines.items():
        fit = DictionaryFit(fresh(), options(ema=ema, log_every=1))
        fit.run(planted()[1], log=held.append, progress=False)
        fits[ema] = fit
    timed = [[{k: v for k, v in line.items() if k != "tokens_per_s"} for line in held] for held in lines.values()]
    assert timed[0] == timed[1] and len(timed[0]) == 20
    live, average = state(fits[0.9].dictionary), fits[0.9].average
    assert average is not None and float((average.held["W_dec"].norm(dim=1) - 1).abs().max()) > 1e-4
    fits[0.9].finish()
    kept = fits[0.9].dictionary
    torch.testing.assert_close(kept.W_dec.norm(dim=1), torch.ones(ATOMS))
    # The input's scale is folded into the average, as it is into weights.
    torch.testing.assert_close(kept.b_dec.detach() * fits[0.9].scale, average.held["b_dec"])
    torch.testing.assert_close(kept.W_enc.detach(), average.held["W_enc"])
    assert not torch.allclose(kept.W_enc, live["W_enc"])


def test_a_fit_that_is_stopped_keeps_the_average_and_saves_both() -> None:
    batches = list(itertools.islice(planted()[1], 20))
    fit = DictionaryFit(fresh(), options(ema=0.9))
    fit.run(iter(batches), should_stop=lambda: fit.steps == 8, progress=False)
    saved = fit.tensors()
    assert not torch.equal(saved["weights.W_enc"], saved["average.W_enc"])
    fit.finish()
    assert torch.equal(fit.dictionary.W_enc, saved["average.W_enc"])
    without = DictionaryFit(fresh(), options())
    without.run(iter(batches), should_stop=lambda: without.steps == 8, progress=False)
    assert not any(name.startswith("average.") for name in without.tensors())
    # A fit that never took a step has nothing to average.
    DictionaryFit(fresh(), options(ema=0.9)).finish()


def test_a_decay_is_a_share() -> None:
    for wrong in (-0.1, 1.0):
        with pytest.raises(ValidationError, match="ema"):
            options(ema=wrong)
