"""Optimisers beside Adam: each step by its formula, what a resume keeps of each, and the schedules of lr."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from interp.core.errors import ConfigError
from interp.dictionaries.options import DictionaryOptions
from interp.train import optimizers
from interp.train.config import TrainOptions
from interp.train.optimizers import OptimizerName, check_optimizer, default_lr, make_stepper, state_bytes
from interp.train.trainer import DictionaryFit, train_dictionary
from tests.unit.test_trainer import ATOMS, BATCH, D, fresh, mmcs, planted

NAMES: tuple[OptimizerName, ...] = ("adam", "muon", "signsgd", "adam8bit")


def there(name: OptimizerName) -> None:
    """Skip where the machine has not what the optimiser needs."""
    try:
        check_optimizer(name)
    except ConfigError as err:
        pytest.skip(str(err))


class Weights(nn.Module):
    """A matrix large enough for several blocks of 8-bit state, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.W = nn.Parameter(torch.randn(48, 80, generator=generator))
        self.b = nn.Parameter(torch.randn(80, generator=generator))

    def take(self, seed: int) -> None:
        """Give both a gradient."""
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            p.grad = torch.randn(p.shape, generator=generator)


def stepped(name: OptimizerName, steps: int, lr: float = 0.01) -> Weights:
    made = Weights()
    stepper = make_stepper(made, name, lr=1.0)  # which each step's own goes before
    for seed in range(steps):
        made.take(seed)
        stepper.step(lr)
        assert made.W.grad is None and made.b.grad is None
    return made


def by_adam(steps: int, lr: float = 0.01) -> Weights:
    made = Weights()
    adam = torch.optim.Adam(made.parameters(), lr=lr, betas=(0.9, 0.999), fused=True)
    for seed in range(steps):
        made.take(seed)
        adam.step()
    return made


class NoReading(TorchDispatchMode):
    """Within it, what a GPU would have to wait for is an error: a value on the host, a shape that depends on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        assert not any(part in name for part in ("_local_scalar_dense", "is_nonzero", "aten::equal", "nonzero")), name
        return func(*args, **(kwargs or {}))


# -- steps ------------------------------------------------------------------------------------------------------------


def test_adam_is_torchs_to_the_bit() -> None:
    ours, theirs = stepped("adam", 5), by_adam(5)
    assert torch.equal(ours.W, theirs.W) and torch.equal(ours.b, theirs.b)


def test_signs_are_of_the_running_mean_of_gradients() -> None:
    made, plain = stepped("signsgd", 6, lr=0.02), Weights()
    mean = {name: torch.zeros_like(p) for name, p in plain.named_parameters()}
    for seed in range(6):
        plain.take(seed)
        for name, p in plain.named_parameters():
            assert p.grad is not None
            mean[name] = 0.95 * mean[name] + 0.05 * p.grad
            p.data -= 0.02 * mean[name].sign()
    torch.testing.assert_close(made.W, plain.W)
    torch.testing.assert_close(made.b, plain.b)


def test_muon_turns_every_singular_value_of_a_matrix_alike_and_leaves_the_rest_to_adam() -> None:
    there("muon")
    made, before = stepped("muon", 1, lr=0.01), Weights()
    before.take(0)
    assert before.W.grad is not None
    u, _, v = torch.linalg.svd(before.W.grad, full_matrices=False)
    moved = (before.W - made.W).detach()
    update = moved / (0.01 * 0.2 * 80**0.5)
    # Five steps of Newton and Schulz bring the singular values to about 1.
    inside = u.T @ update @ v.T
    assert float((inside - torch.diag(inside.diagonal())).abs().max()) < 0.05
    assert 0.6 < float(inside.diagonal().min()) <= float(inside.diagonal().max()) < 1.3
    # In root mean square a weight moves by 0.2 lr: √80 · √48 / √(48 · 80) is 1.
    assert float(moved.pow(2).mean().sqrt()) == pytest.approx(0.2 * 0.01, rel=0.15)
    assert torch.equal(stepped("muon", 4).b, by_adam(4).b)


def test_moments_in_8_bits_step_as_adam_does_but_for_rounding() -> None:
    there("adam8bit")
    made, exact = stepped("adam8bit", 8), by_adam(8)
    moved = float((exact.W - Weights().W).detach().norm())
    assert 0 < float((made.W - exact.W).detach().norm()) < 0.05 * moved
    assert torch.equal(made.b, exact.b)  # what is no matrix is left to Adam


@pytest.mark.parametrize("name", NAMES)
def test_a_step_waits_for_nothing(name: OptimizerName) -> None:
    there(name)
    made = Weights()
    stepper = make_stepper(made, name, lr=0.01)
    for seed in range(3):
        made.take(seed)
        with NoReading():
            stepper.step(0.01)
    with pytest.raises(AssertionError), NoReading():
        bool(made.b.detach().sum() > 0)


@pytest.mark.parametrize("name", NAMES)
def test_the_state_takes_the_bytes_that_the_plan_counts(name: OptimizerName) -> None:
    there(name)
    made = nn.Module()
    made.W = nn.Parameter(torch.zeros(256, 512))
    stepper = make_stepper(made, name, lr=0.1)
    made.W.grad = torch.ones(256, 512)
    stepper.step(0.1)
    held = sum(v.numel() * v.element_size() for v in stepper.tensors({"W": made.W}).values())
    assert held / made.W.numel() == pytest.approx(state_bytes(name), rel=0.02)


# -- trainings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "lr"), [("muon", 4e-2), ("signsgd", 3e-3), ("adam8bit", 1e-2)])
def test_each_recovers_a_planted_dictionary(name: OptimizerName, lr: float) -> None:
    there(name)
    atoms, batches = planted()
    sae = fresh()
    options = TrainOptions(tokens=100_000, batch_size=BATCH, lr=lr, optimizer=name)
    training = train_dictionary(batches, sae, options, progress=False)
    assert training.last["fvu"] < 0.15
    assert mmcs(atoms, sae.W_dec) > 0.93
    # Null control: too few steps leave the rows where they were drawn.
    control = fresh()
    train_dictionary(planted()[1], control, options.model_copy(update={"tokens": 2 * BATCH}), progress=False)
    assert mmcs(atoms, control.W_dec) < 0.7


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
@pytest.mark.parametrize("name", NAMES)
def test_a_fit_that_was_killed_goes_on_to_the_same_bits(name: OptimizerName, kind: Any, tmp_path: Path) -> None:
    there(name)
    d_sae = 160  # so that 8-bit state has more than one block

    def begun() -> DictionaryFit:
        made = DictionaryOptions(kind=kind, d_sae=d_sae, k=3).make(D)
        options = TrainOptions(
            tokens=12 * BATCH, batch_size=BATCH, lr=1e-2, optimizer=name, dead_after=2000, ema=0.9, schedule="cosine"
        )
        return DictionaryFit(made, options, seed=3)

    batches = list(itertools.islice(planted()[1], 12))
    whole = begun()
    whole.run(iter(batches), progress=False)
    killed = begun()
    killed.run(iter(batches), should_stop=lambda: killed.steps == 7, progress=False)
    # What is drawn for the first weights comes from all batches, so those that follow are the rest.
    save_file(killed.tensors(), tmp_path / "state.safetensors")
    record, rest = killed.record(), batches[7:]

    def gone_on(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        fit = begun()
        fit.restore(record, tensors)
        fit.run(iter(rest), progress=False)
        fit.finish()
        return {name: v.clone() for name, v in fit.dictionary.state_dict().items()}

    saved = load_file(tmp_path / "state.safetensors")
    whole.finish()
    expected = whole.dictionary.state_dict()
    found = gone_on(saved)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    # The comparison sees each thing that the optimiser keeps of the encoder, and the average.
    kinds = {key.partition(".")[0] for key in saved if key.endswith(".W_enc")} - {"weights"}
    assert len(kinds) > 1 and "average" in kinds
    for kept in sorted(kinds):
        lost = {k: (torch.zeros_like(v) if k == f"{kept}.W_enc" else v) for k, v in saved.items()}
        assert not torch.equal(gone_on(lost)["W_enc"], expected["W_enc"]), kept


def test_what_an_optimiser_needs_is_named_before_anything_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"2\.9 on, and this is {torch.__version__.split('+')[0]}"):
        DictionaryFit(fresh(), TrainOptions(optimizer="muon"))
    with pytest.raises(ConfigError, match="pip install bitsandbytes"):
        DictionaryFit(fresh(), TrainOptions(optimizer="adam8bit"))
    DictionaryFit(fresh(), TrainOptions(optimizer="signsgd"))
    with pytest.raises(ValidationError, match="optimizer"):
        TrainOptions.model_validate({"optimizer": "sgd"})


def test_step_sizes_by_default() -> None:
    assert default_lr(2**14) == 2e-4 == default_lr(2**14, "adam8bit")
    assert default_lr(2**12, "signsgd") == pytest.approx(4e-4 / 3)
    assert default_lr(2**12, "muon") == default_lr(2**20, "muon") == 2e-3
    for name in ("adam", "signsgd"):
        assert DictionaryFit(fresh(), TrainOptions(optimizer=name)).lr == default_lr(ATOMS, name)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_end_of_the_schedule_falls_as_it_says(schedule: Any) -> None:
    run = TrainOptions(
        tokens=100 * BATCH, batch_size=BATCH, lr=1e-3, warmup=0.1, decay=0.4, log_every=1, schedule=schedule
    )
    lines: list[dict[str, Any]] = []
    one = next(planted()[1])
    train_dictionary(itertools.repeat(one), fresh(), run, log=lines.append, progress=False)
    factors = [line["lr"] / 1e-3 for line in lines]
    for step, factor in enumerate(factors):
        left = min(1.0, (100 - step) / 40)
        down = left if schedule == "linear" else 0.5 + 0.5 * math.cos(math.pi * (1 - left))
        assert factor == pytest.approx(min((step + 0.5) / 10, 1.0, down), abs=1e-12)
    assert factors[80] == pytest.approx(0.5) and min(factors) > 0


def test_trackers_are_of_a_run_with_a_folder() -> None:
    with pytest.raises(ConfigError, match="train_job"):
        train_dictionary(planted()[1], fresh(), TrainOptions(track=("tensorboard",)), progress=False)
    with pytest.raises(ValidationError, match="give each once"):
        TrainOptions(track=("wandb", "wandb"))


def test_a_gradient_that_never_comes_leaves_no_state() -> None:
    made = Weights()
    stepper = make_stepper(made, "signsgd", lr=0.1)
    made.W.grad = torch.ones_like(made.W)
    stepper.step(0.1)
    assert set(stepper.tensors(dict(made.named_parameters()))) == {"momentum.W"}
    assert torch.equal(made.b, Weights().b)
