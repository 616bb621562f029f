"""What a language model's training is made of: settings, loss, text as batches, its folder, its result."""

import json
import math
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from interp.core.errors import ArtifactError, DataError
from interp.core.result import Provenance, Result
from interp.core.settings import describe_faults
from interp.data.tokens import TokenSource
from interp.train.lm_checkpoint import LMFolder, SavedState, load_checkpoints
from interp.train.lm_config import LMOptions, lr_factor
from interp.train.lm_data import LMBatch, LMData, TextData
from interp.train.lm_fit import next_token_loss, own_randomness
from interp.train.lm_result import LMTraining, columns
from tests.families import word_tokenizer

# -- settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 3}, "unknown setting 'step'; did you mean 'steps'"),
        ({"steps": 0}, "steps: Input should be greater than 0, got 0"),
        ({"warmup_steps": 100}, "warmup_steps is 100, expected fewer than the 100 steps"),
        ({"betas": (0.9, 1.0)}, "betas are (0.9, 1.0), expected both from 0 to below 1"),
        ({"checkpoints": (0, 101)}, "checkpoints holds [101], expected steps from 0 to 100"),
        ({"schedule": "step"}, "schedule: Input should be 'cosine', 'linear' or 'constant'"),
        ({"min_lr_ratio": 1.5}, "min_lr_ratio: Input should be less than or equal to 1, got 1.5"),
    ],
)
def test_settings_that_do_not_do_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        LMOptions.model_validate({"steps": 100, **change})
    assert message in describe_faults(caught.value, LMOptions)


def test_every_setting_says_what_it_is_and_all_survive_json() -> None:
    assert all(field.description for field in LMOptions.model_fields.values())
    options = LMOptions(steps=9, checkpoints=(0, 3), betas=(0.8, 0.9))
    assert LMOptions.model_validate_json(options.model_dump_json()) == options


def test_the_step_size_rises_then_falls_to_its_end_and_is_never_zero() -> None:
    def course(schedule: str, end: float = 0.1) -> list[float]:
        options = LMOptions.model_validate(
            {"steps": 110, "warmup_steps": 10, "schedule": schedule, "min_lr_ratio": end}
        )
        return [lr_factor(options, step) for step in range(110)]

    for schedule in ("cosine", "linear", "constant"):
        assert course(schedule)[:11] == pytest.approx([k / 11 for k in range(1, 12)])
        assert min(course(schedule, end=0.0)) > 0
    assert set(course("constant")[10:]) == {1.0}
    # Half way down both are in the middle between 1 and the end; a quarter of the way they differ.
    assert course("linear")[60] == pytest.approx(0.55) and course("linear")[35] == pytest.approx(0.775)
    assert course("cosine")[60] == pytest.approx(0.55)
    assert course("cosine")[35] == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    assert course("cosine")[109] == pytest.approx(0.1, abs=1e-3)
    assert course("cosine")[10:] == sorted(course("cosine")[10:], reverse=True)


# -- the loss ---------------------------------------------------------------------------------------------------


def plain_loss(logits: Tensor, ids: Tensor, weight: Tensor | None) -> float:
    """Σ w · −log p(token | those before) / Σ w, one token after the other."""
    total = counted = 0.0
    for row in range(len(ids)):
        for at in range(1, ids.shape[1]):
            w = 1.0 if weight is None else float(weight[row, at])
            scores = logits[row, at - 1].double()
            total += w * float(scores.logsumexp(0) - scores[ids[row, at]])
            counted += w
    return total / counted


def test_the_loss_is_the_weighted_mean_over_predicted_tokens() -> None:
    logits, ids = torch.randn(3, 5, 11), torch.randint(0, 11, (3, 5))
    weight = torch.rand(3, 5) * (torch.rand(3, 5) > 0.3)
    assert float(next_token_loss(logits, LMBatch(ids))) == pytest.approx(plain_loss(logits, ids, None), rel=1e-6)
    got = float(next_token_loss(logits, LMBatch(ids, weight)))
    assert got == pytest.approx(plain_loss(logits, ids, weight), rel=1e-6)
    # Invariances: the scale of the weights, and whatever stands in column 0.
    assert float(next_token_loss(logits, LMBatch(ids, 7 * weight))) == pytest.approx(got, rel=1e-6)
    weight[:, 0] = 99.0
    assert float(next_token_loss(logits, LMBatch(ids, weight))) == pytest.approx(got, rel=1e-6)
    assert float(next_token_loss(torch.zeros(3, 5, 11), LMBatch(ids))) == pytest.approx(math.log(11))


def test_the_gradient_at_a_place_whose_next_token_weighs_nothing_is_zero() -> None:
    logits, weight = torch.randn(2, 4, 7, requires_grad=True), torch.ones(2, 4)
    weight[1, 2] = 0.0
    next_token_loss(logits, LMBatch(torch.randint(0, 7, (2, 4)), weight)).backward()
    assert logits.grad is not None
    nothing = logits.grad.abs().sum(-1) == 0
    assert nothing.tolist() == [[False, False, False, True], [False, True, False, True]]


# -- text -------------------------------------------------------------------------------------------------------


TEXTS = [" ".join(f"w{1 + (7 * i + j) % 100}" for j in range(3 + 5 * i % 17)) for i in range(30)]


def text_data(packing: str = "concat", *, repeat: bool = True, bos: bool = True) -> TextData:
    return TextData(TokenSource(TEXTS, word_tokenizer(), ctx=16, rows=3, packing=packing, bos=bos), repeat=repeat)


@pytest.mark.parametrize("packing", ["concat", "block_diagonal", "one_doc"])
def test_text_goes_on_from_every_state_over_the_end_of_the_text(packing: str) -> None:
    data = text_data(packing)
    one_epoch = len(list(text_data(packing, repeat=False).batches(None)))
    wanted = list(islice(data.batches(None), one_epoch + 5))
    assert [state["epoch"] for _, state in wanted] == [0] * one_epoch + [1] * 5
    for first, (again, _) in zip(wanted, wanted[one_epoch:], strict=False):
        assert torch.equal(first[0].ids, again.ids)
    for at, (_, state) in enumerate(wanted[:-3]):
        state = json.loads(json.dumps(state))
        for (batch, after), (old, old_after) in zip(data.batches(state), wanted[at + 1 : at + 4], strict=False):
            assert torch.equal(batch.ids, old.ids) and after == old_after
            assert (batch.weight is None) == (old.weight is None)
            assert batch.weight is None or old.weight is None or torch.equal(batch.weight, old.weight)


def test_pads_weigh_nothing_and_full_rows_need_no_weights() -> None:
    for batch, _ in text_data("one_doc", repeat=False).batches(None):
        # BOS and pad are one id here; no text holds it.
        real = batch.ids[:, 1:] != 0
        weight = torch.ones_like(batch.ids[:, 1:]).float() if batch.weight is None else batch.weight[:, 1:]
        assert torch.equal(weight, real.float())
    *whole, (last, _) = text_data(repeat=False).batches(None)
    assert all(batch.weight is None for batch, _ in whole) and last.weight is not None


@pytest.mark.parametrize("bos", [True, False])
def test_documents_apart_are_not_predicted_from_one_another(bos: bool) -> None:
    restarts = 0
    for batch, _ in text_data("block_diagonal", repeat=False, bos=bos).batches(None):
        assert batch.position_ids is not None and batch.weight is not None
        first = batch.position_ids[:, 1:] == 0
        restarts += int(first.sum())
        assert bool((batch.weight[:, 1:][first] == 0).all())
    assert restarts > 20


def test_text_that_is_not_repeated_ends_and_empty_text_is_refused() -> None:
    assert 0 < len(list(text_data(repeat=False).batches(None))) < 30
    empty = TextData(TokenSource([""], word_tokenizer(), ctx=16))
    with pytest.raises(DataError, match="gives no tokens"):
        next(empty.batches(None))
    assert isinstance(empty, LMData) and json.dumps(empty.describe())


# -- the folder -------------------------------------------------------------------------------------------------


def state(step: int, metrics_bytes: int = 0) -> SavedState:
    record = {
        "step": step,
        "tokens": 0,
        "since": 0,
        "data": None,
        "metrics_bytes": metrics_bytes,
        "settings": {"options": {"steps": 100}},
    }
    return SavedState(record, {"x": torch.full((3,), float(step))})


def test_the_latest_state_is_the_one_that_is_read_and_the_only_one_kept(tmp_path: Path) -> None:
    folder = LMFolder(tmp_path / "deep" / "run")
    folder.begin(state(0))
    folder.save_state(state(9))
    folder.save_state(state(10))
    assert [p.name for p in (folder.path / "resume").iterdir()] == ["step-00000010"]
    assert folder.saved().record["step"] == 10 and folder.saved().tensors["x"].tolist() == [10.0] * 3
    # A kill between the two halves of saving leaves both.
    LMFolder.save_state(folder, state(11))
    (folder.path / "resume" / "step-00000010").mkdir()
    assert folder.saved().record["step"] == 11


def test_going_on_takes_back_what_came_after_the_state(tmp_path: Path) -> None:
    folder = LMFolder(tmp_path / "run")
    folder.begin(state(0))
    folder.log({"step": 1})
    folder.log({"step": 1}, "speed.jsonl")
    at_one = state(1, folder.metrics_bytes())
    folder.log({"step": 2})
    with (folder.path / "speed.jsonl").open("a") as file:
        file.write('{"step": 2}\n{"st')  # a line that a kill cut off
    for name in ("checkpoints/step-00000001", "checkpoints/step-00000002", "final", "checkpoints/.step-00000003.a.tmp"):
        (folder.path / name).mkdir(parents=True)
    (folder.path / ".provenance.json.b.tmp").write_text("{")
    (folder.path / "mine.tmp").write_text("mine")
    folder.go_on(at_one)
    assert folder.lines() == [{"step": 1}]
    held = {str(p.relative_to(folder.path)) for p in folder.path.rglob("*")} - {"resume"}
    assert {name for name in held if not name.startswith("resume")} == {
        "checkpoints",
        "checkpoints/step-00000001",
        "metrics.jsonl",
        "mine.tmp",
        "speed.jsonl",
    }
    assert (folder.path / "speed.jsonl").read_text() == '{"step": 1}\n'
    (folder.path / "metrics.jsonl").write_text("")
    with pytest.raises(ArtifactError, match="has 0 bytes, fewer than the 12 "):
        folder.go_on(at_one)


def test_a_folder_that_holds_something_is_refused_and_so_is_one_without_a_state(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"already holds mine\.txt; .* resume=True"):
        LMFolder(tmp_path).begin(state(0))
    with pytest.raises(ArtifactError, match="is a file"):
        LMFolder(tmp_path / "mine.txt").begin(state(0))
    with pytest.raises(ArtifactError, match="holds no state to resume from; leave resume out"):
        LMFolder(tmp_path).saved()
    with pytest.raises(ArtifactError, match="is no folder"):
        LMFolder(tmp_path / "nowhere").saved()
    # What a run left that was killed before its first state was whole is not in the way of another.
    begun = tmp_path / "begun"
    (begun / "resume" / ".step-00000000.abc.tmp").mkdir(parents=True)
    LMFolder(begun).begin(state(0))
    assert LMFolder(begun).saved().record["step"] == 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "state.json").write_text("{"),
        lambda folder: (folder / "state.json").unlink(),
        lambda folder: (folder / "state.json").write_text('{"step": 3}'),
        lambda folder: (folder / "state.safetensors").write_bytes(b"xx"),
    ],
)
def test_a_damaged_state_is_refused(damage: Callable[[Path], Any], tmp_path: Path) -> None:
    folder = LMFolder(tmp_path / "run")
    folder.begin(state(0))
    damage(folder.path / "resume" / "step-00000000")
    with pytest.raises(ArtifactError, match="step-00000000 cannot be read"):
        folder.saved()


def test_checkpoints_come_in_the_order_of_their_steps_with_the_end_last(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no checkpoints"):
        load_checkpoints(tmp_path)
    for step in (20, 3, 100_000_000, 0):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".step-00000005.x.tmp").mkdir()
    (tmp_path / "checkpoints" / "notes").mkdir()
    found = load_checkpoints(tmp_path)
    assert [step for step, _ in found] == [0, 3, 20, 100_000_000]
    assert all(path.name == f"step-{step:08d}" for step, path in found)
    (tmp_path / "final").mkdir()
    (tmp_path / "provenance.json").write_text(json.dumps({"settings": {"options": {"steps": 100_000_007}}}))
    assert load_checkpoints(tmp_path)[-1] == (100_000_007, tmp_path / "final")


# -- randomness and the result ----------------------------------------------------------------------------------


def test_random_numbers_of_inside_follow_the_seed_and_those_of_outside_go_on() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(4)
    torch.manual_seed(5)
    before = torch.rand(2)
    drawn = []
    for seed in (1, 1, 2):
        with own_randomness(torch.device("cpu"), seed):
            drawn.append(torch.rand(3))
    assert torch.equal(torch.cat([before, torch.rand(2)]), wanted)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


LINES: list[dict[str, Any]] = [
    {"step": 0, "task.a": 0.0, "other": 7},
    {"step": 5, "tokens": 50, "loss": 2.5, "lr": 0.1, "grad_norm": 1.0},
    {"step": 10, "tokens": 100, "loss": 1.5, "lr": 0.1, "grad_norm": 1.0},
    {"step": 10, "task.a": 0.5, "task.b": 1.0, "other": None},
]


def training(lines: list[dict[str, Any]] = LINES) -> LMTraining:
    return LMTraining(
        provenance=Provenance(model="m"),
        steps=10,
        tokens=100,
        stopped=True,
        signal="SIGINT",
        seconds=2.0,
        **columns(lines),
    )


def test_a_training_is_a_result_with_a_table_a_figure_and_a_summary(tmp_path: Path) -> None:
    result = training()
    assert (result.loss_steps.tolist(), result.losses.tolist()) == ([5, 10], [2.5, 1.5])
    assert result.measure_steps.tolist() == [0, 10] and list(result.measures) == ["task.a", "other", "task.b"]
    assert math.isnan(result.measures["task.b"][0]) and math.isnan(result.measures["other"][1])
    loaded = Result.load(result.save(tmp_path / "r"))
    assert isinstance(loaded, LMTraining) and loaded.summary() == result.summary()
    frame = result.to_frame()
    assert list(frame.columns) == ["step", "name", "value"] and len(frame) == 2 + 3 * 2
    assert frame[frame["name"] == "task.a"]["value"].tolist() == [0.0, 0.5]
    assert "10 steps, 100 tokens predicted, 2 s, stopped by SIGINT" in result.summary()
    assert "loss 2.500 → 1.500 nats per token" in result.summary() and "task.a: 0 → 0.5" in result.summary()
    drawn = {trace.name: (list(trace.x), trace.yaxis) for trace in result.plot().data}
    assert drawn["loss"] == ([5, 10], "y") and drawn["task.a"] == ([0, 10], "y2")
    assert drawn["task.b"][1] == "y2" and drawn["other"][1] == "y3"
    assert "stopped" not in training([]).summary().replace("stopped by SIGINT", "")
