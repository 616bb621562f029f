"""Trackers get the lines of metrics.jsonl once each, stopped and resumed or not, and never end a training."""

import importlib.machinery
import json
import signal
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from interp.core.errors import ConfigError
from interp.data.store import Batch
from interp.train import trackers
from interp.train.config import TrainConfig, TrainOptions
from interp.train.job import plan_job, train_job, train_sweep
from interp.train.trackers import Trackers, clear_trackers
from interp.train.trainer import DictionaryFit

COMMON: dict[str, Any] = {
    "model": "testbed",
    "site": "1.resid_post",
    "data": "testbed",
    "dictionary": {"d_sae": 64, "k": 4},
    "text": {"ctx": 32, "rows": 8},
    "evaluation": {"tokens": 300, "pca_rank": 0},
}
TRAIN: dict[str, Any] = {
    "tokens": 20 * 128,
    "batch_size": 128,
    "buffer_tokens": 512,
    "checkpoint_every": 5,
    "log_every": 2,
    "deterministic": True,
}


def config(out: Path, *track: str, **more: Any) -> TrainConfig:
    return TrainConfig.model_validate({**COMMON, "out": str(out), "train": {**TRAIN, "track": track}, **more})


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def after(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], None]) -> None:
    """Do something once, when a fit has taken so many steps."""
    taken, done = DictionaryFit.step, list[bool]()

    def stepped(self: DictionaryFit, batch: Batch) -> None:
        taken(self, batch)
        if self.steps == step and not done:
            done.append(True)
            act()

    monkeypatch.setattr(DictionaryFit, "step", stepped)


class DiedError(Exception):
    """As if the process were gone: nothing is saved after it."""


def die() -> None:
    raise DiedError


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without trackers."""
    out = tmp_path_factory.mktemp("plain") / "run"
    train_job(config(out), progress=False)
    return out


# -- a stand-in for wandb ---------------------------------------------------------------------------------------------


class FakeRun:
    """Holds what was logged, as wandb does: a step before the last is passed over."""

    def __init__(self, held: dict[str, Any]) -> None:
        self.held, self.summary = held, held["summary"]

    def log(self, values: dict[str, float], step: int) -> None:
        if step > max([0, *(held for held, _ in self.held["rows"])]):
            self.held["rows"].append((step, values))

    def finish(self) -> None:
        self.held["finished"] += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module `wandb` that keeps runs by id."""
    made: Any = types.ModuleType("wandb")
    made.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    made.runs, made.given = {}, []

    def init(**given: Any) -> FakeRun:
        made.given.append(given)
        empty = {"rows": [], "summary": {}, "finished": 0}
        return FakeRun(made.runs.setdefault(given["id"], empty))

    made.init, made.Settings = init, lambda **given: given
    monkeypatch.setitem(sys.modules, "wandb", made)
    return made


def test_wandb_gets_each_line_once_and_the_figures(tmp_path: Path, wandb: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(DiedError):
        after(patch, 9, die)  # the last state is of step 5, and steps 6 and 8 were logged
        train_job(config(out, "wandb"), progress=False)
    (run,) = wandb.runs.values()
    assert [step for step, _ in run["rows"]] == [2, 4, 6, 8] and run["finished"] == 1
    report = train_job(config(out, "wandb"), resume=True, progress=False)
    assert len(wandb.runs) == 1 and run["finished"] == 2
    sent = [{"step": step, **{k.removeprefix("train/"): v for k, v in values.items()}} for step, values in run["rows"]]
    timed = [line.pop("tokens_per_s") for line in sent]
    assert sent == lines(out) and [line["step"] for line in sent] == list(range(2, 21, 2)) and min(timed) > 0
    assert report.evaluation is not None
    assert run["summary"]["evaluation/fvu"] == report.evaluation.fvu
    assert all(isinstance(value, float) for value in run["summary"].values())
    first = wandb.given[0]
    assert (first["project"], first["name"], first["group"]) == ("interp", "run", None)
    assert first["config"]["dictionary"]["d_sae"] == 64 and first["dir"] == str(out)


def test_a_sweep_has_a_run_for_each_dictionary(tmp_path: Path, wandb: Any) -> None:
    out = tmp_path / "many"
    stale = out / "k-4" / "tensorboard" / "of an earlier run"
    stale.mkdir(parents=True)
    train_sweep(config(out, "wandb", sweep={"k": [4, 8]}), force=True, progress=False)
    assert not stale.exists()
    assert [(g["name"], g["group"], g["reinit"]) for g in wandb.given] == [
        ("k-4", "many", "create_new"),
        ("k-8", "many", "create_new"),
    ]
    for given in wandb.given:
        rows = wandb.runs[given["id"]]["rows"]
        assert [values["train/fvu"] for _, values in rows] == [line["fvu"] for line in lines(out / given["name"])]
        assert given["config"]["dictionary"]["k"] == int(given["name"][2:])


def test_a_tracker_that_fails_is_warned_of_once_and_nothing_else_changes(
    tmp_path: Path, plain: Path, wandb: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: FakeRun, values: Any, step: int) -> None:
        raise OSError("the network is gone")

    monkeypatch.setattr(FakeRun, "log", fail)
    with pytest.warns(UserWarning, match="wandb failed .*the network is gone") as warned:
        report = train_job(config(tmp_path / "a", "wandb"), progress=False)
    assert len(warned) == 1 and report.status == "finished"
    for name in ("sae_weights.safetensors", "metrics.jsonl", "evaluation.json"):
        assert (tmp_path / "a" / name).read_bytes() == (plain / name).read_bytes()


def test_what_cannot_begin_says_so(tmp_path: Path, plain: Path, wandb: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**given: Any) -> None:
        raise RuntimeError("no API key configured")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ConfigError, match=r"wandb cannot begin.*no API key.*WANDB_MODE=offline.*--resume"):
        train_job(config(tmp_path / "run", "wandb"), progress=False)
    # Trackers decide nothing, so the run may go on without, to what it would have been.
    train_job(config(tmp_path / "run"), resume=True, progress=False)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (plain / "metrics.jsonl").read_bytes()


def test_a_missing_package_is_named_before_a_folder_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    for name in ("tensorboard", "wandb"):
        for begin in (plan_job, train_job):
            with pytest.raises(ConfigError, match=f"pip install {name}"):
                begin(config(tmp_path / "run", name))
    assert not (tmp_path / "run").exists()


def test_the_plan_counts_the_average_and_what_the_optimiser_keeps(tmp_path: Path) -> None:
    def planned(**changes: Any) -> Any:
        return plan_job(config(tmp_path / "run").model_copy(update={"train": TrainOptions(**TRAIN, **changes)}))

    adam, averaged, signs = planned(), planned(ema=0.99), planned(optimizer="signsgd")
    for name in ("dictionary_bytes", "checkpoint_bytes"):
        assert getattr(averaged, name) - getattr(adam, name) == 4 * adam.parameters
        assert getattr(signs, name) - getattr(adam, name) == -4 * adam.parameters
    assert signs.lr == pytest.approx(adam.lr / 3) and planned(lr=0.5).lr == 0.5


# -- TensorBoard itself -----------------------------------------------------------------------------------------------


def scalars(out: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0}, purge_orphaned_data=True)
    read.Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def logged(out: Path) -> None:
    """Compare TensorBoard's log with the folder's files."""
    found, rows = scalars(out), lines(out)
    for name in set(rows[0]) - {"step"}:
        assert [step for step, _ in found[f"train/{name}"]] == [row["step"] for row in rows]
        assert [value for _, value in found[f"train/{name}"]] == pytest.approx([row[name] for row in rows], rel=1e-6)
    figures = json.loads((out / "evaluation.json").read_text())
    ((step, fvu),) = found["evaluation/fvu"]
    assert step == 20 and fvu == pytest.approx(figures["fvu"], rel=1e-6)
    assert len(found["train/tokens_per_s"]) == len(rows)


def test_tensorboard_has_the_lines_of_a_run_that_was_killed_and_resumed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(DiedError):
        after(patch, 9, die)
        train_job(config(out, "tensorboard"), progress=False)
    assert [step for step, _ in scalars(out)["train/fvu"]] == [2, 4, 6, 8]
    with monkeypatch.context() as patch:
        after(patch, 13, lambda: signal.raise_signal(signal.SIGTERM))
        assert train_job(config(out, "tensorboard"), resume=True, progress=False).status == "stopped"
    train_job(config(out, "tensorboard"), resume=True, progress=False)
    logged(out)
    # A log that is begun anew holds nothing of the one before.
    clear_trackers(out)
    one = Trackers(("tensorboard",), out, settings={})
    one.log({"step": 3, "fvu": 0.25})
    one.close()
    assert scalars(out) == {"train/fvu": [(3, 0.25)]}


def test_a_new_run_is_another_of_wandbs_and_one_that_goes_on_is_not(tmp_path: Path, wandb: Any) -> None:
    line: dict[str, int | float] = {"step": 2, "fvu": 0.5}
    before: list[dict[str, int | float]] | None
    for before, known in ((None, 1), ([], 1), ([line], 1), (None, 2)):
        if before is None:
            clear_trackers(tmp_path)
        Trackers(("wandb",), tmp_path, settings={}, before=before).close()
        assert len(wandb.runs) == known
    # What wandb had not sent when it was killed comes again.
    assert [run["rows"] for run in wandb.runs.values()] == [[(2, {"train/fvu": 0.5})], []]
    Trackers((), tmp_path, settings={}).log({"step": 1, "fvu": 0.5})


def test_a_tracker_that_was_closed_takes_nothing(tmp_path: Path, wandb: Any) -> None:
    one = Trackers(("wandb",), tmp_path, settings={})
    one.close()
    one.log({"step": 1, "fvu": 0.5})
    one.close()
    (run,) = wandb.runs.values()
    assert run["rows"] == [] and run["finished"] == 1
