"""The trainer on planted activations, and everything around it: configuration, run folder, signals."""

import itertools
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn.functional import normalize

from interp.core.errors import ArtifactError, ConfigError, DataError
from interp.data.store import Batch
from interp.dictionaries.topk import TopKConfig, TopKSAE
from interp.train.config import TrainConfig, TrainOptions, describe_faults
from interp.train.runfolder import RunFolder
from interp.train.signals import StopSignals
from interp.train.trainer import TrainingError, default_lr, deterministic, train_dictionary

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

    def init_from(self, x: Tensor, *, seed: int) -> None:
        super().init_from(x, seed=seed)
        with torch.no_grad():
            self.b_enc[: self.cfg.d_sae // 2] -= 4.0


def test_dead_latents_are_counted_in_tokens_and_auxk_revives_them() -> None:
    def dead(aux_coef: float) -> list[float]:
        sae = Sunk(TopKConfig(d_in=D, d_sae=128, k=ACTIVE), aux_coef=aux_coef)
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


def test_a_run_folder_is_never_overwritten_unless_forced_and_then_only_its_own_files(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = RunFolder(folder)
    first.config("a: 1\n")
    first.log({"step": 1.0})
    first.log({"step": 2.0})
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [1.0, 2.0]
    fresh().save(folder)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"already holds .*--force"):
        RunFolder(folder)
    RunFolder(folder, force=True)
    assert [p.name for p in folder.iterdir()] == ["notes.txt"]
    with pytest.raises(ArtifactError, match="is a file"):
        RunFolder(folder / "notes.txt", force=True)
