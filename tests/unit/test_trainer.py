"""The trainer on planted activations, going on from a state, signals, and configuration."""

import itertools
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn.functional import normalize

from interp.core.errors import ConfigError, DataError
from interp.core.settings import describe_faults
from interp.data.store import Batch
from interp.dictionaries.base import Losses
from interp.dictionaries.objective import Objective
from interp.dictionaries.topk import TopKConfig, TopKSAE
from interp.train.config import DictionaryOptions, TrainConfig, TrainOptions
from interp.train.signals import StopSignals
from interp.train.trainer import DictionaryFit, TrainingError, default_lr, deterministic, train_dictionary

D, ATOMS, ACTIVE, BATCH = 32, 64, 3, 512


def planted(seed: int = 71) -> tuple[Tensor, Iterator[Batch]]:
    """Atoms [ATOMS D] of norm 1, and endless batches of sums of three of them, scaled and shifted.

    The seed is not one that a trainer is given here: its first decoder rows would be the atoms themselves.
    """
    generator = torch.Generator().manual_seed(seed)
    atoms = normalize(torch.randn(ATOMS, D, generator=generator), dim=1)

    def batches() -> Iterator[Batch]:
        while True:
            index = torch.rand(BATCH, ATOMS, generator=generator).topk(ACTIVE).indices
            size = 1 + torch.rand(BATCH, ACTIVE, generator=generator)
            yield Batch(x=7 * torch.zeros(BATCH, ATOMS).scatter(1, index, size) @ atoms + 0.5)

    return atoms, batches()


def mmcs(atoms: Tensor, rows: Tensor) -> float:
    """Mean, over atoms, of the largest cosine with a decoder row."""
    return float((atoms @ normalize(rows, dim=1).T).max(dim=1).values.mean())


def options(**changes: object) -> TrainOptions:
    return TrainOptions.model_validate({"tokens": 20 * BATCH, "batch_size": BATCH, "lr": 1e-2, **changes})


def fresh(k: int = ACTIVE) -> TopKSAE:
    return TopKSAE(TopKConfig(d_in=D, d_sae=ATOMS, k=k))


def test_a_planted_dictionary_of_64_atoms_is_recovered() -> None:
    atoms, batches = planted()
    sae = fresh()
    training = train_dictionary(batches, sae, options(tokens=200_000), progress=False)
    assert mmcs(atoms, sae.W_dec) > 0.95
    assert training.last["fvu"] < 0.1 and training.last["l0"] == pytest.approx(ACTIVE, abs=0.1)
    # The scale that training used is folded: the SAE is of raw activations, whose norm is far from √d.
    x = next(batches).x
    assert float((x - sae(x)).pow(2).sum() / (x - x.mean(0)).pow(2).sum()) < 0.1
    assert abs(training.scale - 1) > 0.3
    # Null control: the same measure on activations without atoms.
    noise = (Batch(x=torch.randn(BATCH, D)) for _ in itertools.count())
    control = fresh()
    train_dictionary(noise, control, options(tokens=50_000), progress=False)
    assert mmcs(atoms, control.W_dec) < 0.7


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    def weights(name: str, seed: int) -> bytes:
        sae = fresh()
        train_dictionary(planted()[1], sae, options(dead_after=2000), seed=seed, progress=False)
        return (sae.save(tmp_path / name) / "sae_weights.safetensors").read_bytes()

    assert weights("a", 3) == weights("b", 3)
    assert weights("a", 3) != weights("c", 4)


def test_rows_outside_the_mask_change_nothing() -> None:
    def fit(value: float) -> Tensor:
        mask = torch.arange(BATCH) % 3 > 0
        marked = (
            Batch(x=torch.where(mask[:, None], b.x, torch.tensor(value)), mask=mask)
            for b in itertools.islice(planted()[1], 25)
        )
        sae = fresh()
        train_dictionary(marked, sae, options(), progress=False)
        return sae.W_dec.detach()

    torch.testing.assert_close(fit(0.0), fit(1e3), rtol=1e-3, atol=1e-5)


class Sunk(TopKSAE):
    """A TopK SAE half of whose latents start too low to fire."""

    def init_from(self, x: Tensor, *, seed: int, target: Tensor | None = None) -> None:
        super().init_from(x, seed=seed, target=target)
        with torch.no_grad():
            self.b_enc[: self.cfg.d_sae // 2] -= 4.0


def test_dead_latents_are_counted_in_tokens_and_auxk_revives_them() -> None:
    def dead(aux_coef: float) -> list[float]:
        sae = Sunk(TopKConfig(d_in=D, d_sae=128, k=ACTIVE), Objective(aux_coef=aux_coef))
        run = options(tokens=100_000, dead_after=10_000, lr=3e-3, log_every=5)
        lines: list[dict[str, int | float]] = []
        train_dictionary(planted()[1], sae, run, log=lines.append, progress=False)
        assert all(line["dead"] == 0 for line in lines if line["tokens"] <= 10_000)
        return [line["dead"] for line in lines]

    without, revived = dead(0.0), dead(1 / 32)
    assert min(without[5:]) >= 0.5
    assert max(revived) >= 0.5 and revived[-1] < 0.3


def test_a_loss_that_is_no_number_stops_training_and_names_step_and_site() -> None:
    def poisoned() -> Iterator[Batch]:
        for i, batch in enumerate(planted()[1]):
            yield Batch(x=batch.x * float("inf")) if i == 40 else batch

    with pytest.raises(TrainingError, match=r"at step 41 on 3\.resid_post, with lr 0\.01; nothing was saved"):
        train_dictionary(
            poisoned(), fresh(), options(tokens=60 * BATCH, log_every=7), name="3.resid_post", progress=False
        )


def test_a_loss_that_becomes_no_number_at_the_last_step_is_noticed_too() -> None:
    def poisoned() -> Iterator[Batch]:
        for i, batch in enumerate(itertools.islice(planted()[1], 50)):
            yield Batch(x=batch.x * float("nan")) if i == 49 else batch

    with pytest.raises(TrainingError, match="at step 50"):
        train_dictionary(poisoned(), fresh(), options(tokens=10**6, log_every=1000), progress=False)


def test_training_ends_at_its_tokens_or_when_asked_or_when_batches_run_out() -> None:
    asked = iter([False] * 5 + [True, True])
    stopped = train_dictionary(planted()[1], fresh(), options(), should_stop=lambda: next(asked), progress=False)
    assert (stopped.steps, stopped.stopped) == (5, True) and stopped.last["step"] == 5
    whole = train_dictionary(planted()[1], fresh(), options(), progress=False)
    assert (whole.steps, whole.tokens, whole.stopped) == (20, 20 * BATCH, False)
    short = train_dictionary(itertools.islice(planted()[1], 3), fresh(), options(), progress=False)
    assert (short.steps, short.stopped) == (3, False)
    with pytest.raises(DataError, match="no batch of activations"):
        train_dictionary([], fresh(), options(), progress=False)


def test_the_step_size_rises_stays_and_falls() -> None:
    lines: list[dict[str, int | float]] = []
    run = options(tokens=100 * BATCH, lr=1e-3, warmup=0.1, decay=0.2, log_every=1)
    train_dictionary(planted()[1], fresh(), run, log=lines.append, progress=False)
    lr = [line["lr"] for line in lines]
    assert lr[:10] == sorted(lr[:10]) and 0 < lr[0] < 1e-4
    assert set(lr[11:80]) == {1e-3}
    assert lr[80:] == sorted(lr[80:], reverse=True) and 0 < lr[-1] < 1e-4
    assert default_lr(2**14) == 2e-4 and default_lr(2**12) == 4e-4


def test_determinism_is_restored_after_the_block_even_by_an_error() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    with pytest.raises(KeyError), deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
        raise KeyError
    assert torch.are_deterministic_algorithms_enabled() == before


# -- going on from a state ----------------------------------------------------------------------------------------


class Drawing(TopKSAE):
    """A TopK SAE whose loss draws random numbers, with latents that start too low to fire."""

    def init_from(self, x: Tensor, *, seed: int, target: Tensor | None = None) -> None:
        super().init_from(x, seed=seed, target=target)
        with torch.no_grad():
            self.b_enc[: self.cfg.d_sae // 2] -= 4.0

    def loss(self, batch: Batch, *, dead: Tensor | None = None) -> Losses:
        noise = 0.01 * torch.randn(batch.x.shape)
        return super().loss(Batch(x=batch.x + noise, mask=batch.mask), dead=dead)


def drawing() -> Drawing:
    return Drawing(TopKConfig(d_in=D, d_sae=ATOMS, k=ACTIVE))


STEPS = 50
FIT = {"tokens": STEPS * BATCH - 100, "dead_after": 5 * BATCH, "log_every": 7, "checkpoint_every": 1}


def ends(fit: DictionaryFit, lines: list[dict[str, Any]]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    fit.finish()
    timeless = [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in lines]
    return dict(fit.dictionary.state_dict()), timeless


def test_a_fit_that_goes_on_from_any_step_ends_with_the_same_bits_and_metrics() -> None:
    batches = list(itertools.islice(planted()[1], STEPS))
    lines: list[dict[str, Any]] = []
    saved: dict[int, tuple[str, dict[str, Tensor], int, int]] = {}
    fit = DictionaryFit(drawing(), options(**FIT), seed=5)

    def save() -> None:
        tensors = {name: value.clone() for name, value in fit.tensors().items()}
        saved[fit.steps] = json.dumps(fit.record()), tensors, len(lines), fit.ahead

    fit.run(batches, log=lines.append, save=save, progress=False)
    weights, metrics = ends(fit, lines)
    assert sorted(saved) == list(range(1, STEPS + 1)) and fit.steps == STEPS
    assert [line["step"] for line in metrics] == [7, 14, 21, 28, 35, 42, 49, 50]
    # The first weights come from 16,384 tokens, so that 32 batches are taken before the first step.
    assert {step: ahead for step, (*_, ahead) in saved.items() if ahead} == {s: 32 - s for s in range(1, 32)}
    assert max(line["dead"] for line in metrics) > 0.2 and any(line["aux"] > 0 for line in metrics)
    for step in (1, 6, 7, 20, 31, 32, 40, 49, 50):
        record, tensors, told, _ = saved[step]
        torch.manual_seed(step)
        again = DictionaryFit(drawing(), options(**FIT), seed=5)
        again.restore(json.loads(record), tensors)
        more = lines[:told]
        again.run(batches[step:], log=more.append, progress=False)
        found, told_again = ends(again, more)
        assert all(torch.equal(found[name], weights[name]) for name in weights), f"from step {step}"
        assert told_again == metrics, f"from step {step}"
        assert again.resumed_at == step * BATCH


@pytest.mark.parametrize(
    "left_out", ["weights.W_dec", "exp_avg.W_enc", "exp_avg_sq.b_enc", "sums", "last_fired", "rng.cpu"]
)
def test_everything_in_a_state_counts(left_out: str) -> None:
    batches = list(itertools.islice(planted()[1], STEPS))
    lines: list[dict[str, Any]] = []
    states: list[tuple[dict[str, Any], dict[str, Tensor]]] = []
    fit = DictionaryFit(drawing(), options(**{**FIT, "checkpoint_every": 24}))
    fit.run(
        batches,
        log=lines.append,
        save=lambda: states.append((fit.record(), {k: v.clone() for k, v in fit.tensors().items()})),
        progress=False,
    )
    whole = ends(fit, lines)
    record, tensors = states[0]
    tensors[left_out] = torch.get_rng_state() if left_out == "rng.cpu" else torch.zeros_like(tensors[left_out])
    more = [line for line in lines if line["step"] <= 24]
    again = DictionaryFit(drawing(), options(**FIT))
    again.restore(record, tensors)
    again.run(batches[24:], log=more.append, progress=False)
    other = ends(again, more)
    assert other[1] != whole[1] or not all(torch.equal(other[0][n], w) for n, w in whole[0].items())


def test_the_random_numbers_of_the_caller_are_left_alone_and_have_no_effect() -> None:
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        sae = drawing()
        train_dictionary(itertools.islice(planted()[1], 10), sae, options(), progress=False)
        assert torch.equal(torch.get_rng_state(), before)
        found.append(sae.W_dec.detach().clone())
    assert torch.equal(*found)


def test_nothing_is_saved_of_a_fit_whose_loss_is_no_number() -> None:
    batches = list(itertools.islice(planted()[1], 50))
    batches[44] = Batch(x=batches[44].x * float("nan"))
    saved: list[int] = []
    fit = DictionaryFit(fresh(), options(**{**FIT, "checkpoint_every": 4, "log_every": 1000}))
    with pytest.raises(TrainingError, match=r"at step 45 .*nothing was saved after it"):
        fit.run(batches, save=lambda: saved.append(fit.steps), progress=False)
    assert saved == list(range(4, 45, 4))


def test_a_state_is_saved_when_due_when_wanted_and_at_the_end() -> None:
    def saved(every: int | None, wanted: int | None = None, stop: int | None = None) -> list[int]:
        fit = DictionaryFit(fresh(), options(tokens=25 * BATCH, checkpoint_every=every))
        steps: list[int] = []
        fit.run(
            planted()[1],
            save=lambda: steps.append(fit.steps),
            save_wanted=lambda: fit.steps == wanted,
            should_stop=lambda: fit.steps == stop,
            progress=False,
        )
        return steps

    assert saved(10) == [10, 20, 25]
    assert saved(0) == [25] and saved(0, wanted=3) == [3, 25] and saved(10, wanted=10) == [10, 20, 25]
    assert saved(10, stop=13) == [10, 13]
    # By default a tenth of all steps; of long runs, as many as take 10M tokens.
    assert saved(None) == [*range(2, 25, 2), 25]
    assert TrainOptions(tokens=10**9, batch_size=2000).checkpoint_steps == 5000
    assert TrainOptions(tokens=5000, batch_size=1000, buffer_tokens=2000).checkpoint_steps == 1


# -- signals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_sets_a_flag_and_the_second_interrupts(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    told: list[str] = []
    with pytest.raises(KeyboardInterrupt), StopSignals(told.append) as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop() and stop.name == number.name and told == [number.name]
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_sigusr1_asks_for_a_save_and_does_not_stop() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    told: list[str] = []
    with StopSignals(save=told.append) as stop:
        assert not stop.save_wanted()
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGUSR1)
            assert stop.save_wanted() and not stop.save_wanted() and not stop()
    assert told == ["SIGUSR1"] * 2 and signal.getsignal(signal.SIGUSR1) is before
    with StopSignals():
        assert signal.getsignal(signal.SIGUSR1) is before


def test_a_message_that_cannot_be_written_does_not_keep_a_signal_from_acting() -> None:
    def tell(name: str) -> None:
        raise RuntimeError("reentrant call inside a writer")

    with StopSignals(tell, save=tell) as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop() and stop.save_wanted()


# -- settings -------------------------------------------------------------------------------------------------------


REQUIRED = {"model": "m", "site": "3.resid_post", "data": "d", "out": "o"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sit": "1.z"}, "unknown setting 'sit'; did you mean 'site'"),
        ({"dictionary": {"d_sea": 4}}, r"unknown setting 'dictionary\.d_sea'; did you mean 'd_sae'"),
        ({"dictionary": {"k": 100, "d_sae": 64}}, "dictionary: k is 100, more than the 64 latents"),
        ({"train": {"lr": -1}}, r"train\.lr: Input should be greater than 0, got -1"),
        ({"train": {"warmup": 0.6, "decay": 0.5}}, "at most 1 together"),
        ({"train": {"buffer_tokens": 10}}, "at least two batches"),
        ({"site": "3.residpost"}, "site: unknown site '3.residpost'.*did you mean 'resid_post'"),
    ],
)
def test_settings_that_do_not_do_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TrainConfig.model_validate({**REQUIRED, **change})
    import re

    assert re.search(message, describe_faults(caught.value, TrainConfig))


def test_a_configuration_survives_yaml_where_1e_4_is_a_string(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("model: m\nsite: 3.resid_post\ndata: d\nout: o\ntrain: {lr: 1e-4}\n", encoding="utf-8")
    cfg = TrainConfig.from_yaml(path)
    assert cfg.train.lr == 1e-4
    path.write_text(cfg.to_yaml(), encoding="utf-8")
    assert TrainConfig.from_yaml(path) == cfg
    for text, message in (("- a", "holds a list"), ("a: [", "is not YAML"), ("site: 1.z", "model is missing")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=message):
            TrainConfig.from_yaml(path)
    with pytest.raises(ConfigError, match=r"did you mean 'a\.yaml'"):
        TrainConfig.from_yaml(tmp_path / "b.yaml")


@pytest.mark.parametrize(
    ("given", "d_in", "sizes"),
    [
        ({}, 64, (512, 16)),
        ({}, 128, (1024, 32)),
        ({}, 4096, (32768, 32)),
        ({}, 2, (16, 1)),
        ({"d_sae": 4}, 64, (4, 4)),
        ({"d_sae": 4096, "k": 40}, 64, (4096, 40)),
    ],
)
def test_the_dictionarys_size_follows_from_the_sites_width(
    given: dict[str, int], d_in: int, sizes: tuple[int, int]
) -> None:
    assert DictionaryOptions.model_validate(given).sizes(d_in) == sizes
    cfg = TrainConfig.model_validate({**REQUIRED, "dictionary": given}).sized(d_in)
    assert (cfg.dictionary.d_sae, cfg.dictionary.k) == sizes and cfg.sized(7) == cfg


def test_more_active_latents_than_the_default_gives_are_refused() -> None:
    with pytest.raises(ConfigError, match="k is 100, more than the 64 latents that d_in 8 gives"):
        DictionaryOptions(k=100).sizes(8)


def test_every_setting_says_what_it_is() -> None:
    def bare(model: type, path: str = "") -> list[str]:
        found = []
        for name, field in model.model_fields.items():  # type: ignore[attr-defined]
            inner = field.annotation
            if isinstance(inner, type) and hasattr(inner, "model_fields"):
                found += bare(inner, f"{path}{name}.")
            elif not field.description:
                found.append(path + name)
        return found

    assert bare(TrainConfig) == []
