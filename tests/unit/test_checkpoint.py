"""The folder of a run and its states: what a kill, a full disk or another run may do to them, and what they may not."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from interp.core.errors import ArtifactError
from interp.dictionaries.topk import TopKConfig, TopKSAE
from interp.train.checkpoint import SavedState, StateFolder
from interp.train.runfolder import RunFolder
from tests.death import Death, Killed


def state(step: int, **changes: Any) -> SavedState:
    members = {"": {"fit": {}, "metrics_bytes": changes.pop("metrics_bytes", 0)}}
    record = {**{key: {} for key in RunFolder.HELD}, "step": step, "members": members, "config": {"a": step}, **changes}
    return SavedState(record, {"weights": torch.full((300,), float(step))})


def sae(bias: float) -> TopKSAE:
    made = TopKSAE(TopKConfig(d_in=4, d_sae=8, k=2))
    with torch.no_grad():
        made.b_enc.fill_(bias)
    return made


def test_a_run_folder_is_never_overwritten_unless_forced_and_then_only_its_own_files(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = RunFolder(folder)
    first.begin(state(0), "a: 1\n")
    first.log({"step": 1, "tokens_per_s": 3.0})
    first.log({"step": 2, "tokens_per_s": 4.0})
    assert [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] == [
        {"step": 1},
        {"step": 2},
    ]
    assert json.loads((folder / "speed.jsonl").read_text().splitlines()[1]) == {"step": 2, "tokens_per_s": 4.0}
    sae(0.0).save(folder)
    (folder / "notes.txt").write_text("mine")
    (folder / ".notes.txt.a.tmp").write_text("mine")
    with pytest.raises(ArtifactError, match=r"already holds .*--resume to go on .*--force"):
        RunFolder(folder).begin(state(0), "a: 1\n")
    again = RunFolder(folder)
    again.begin(state(0), "a: 2\n", force=True)
    assert {p.name for p in folder.iterdir()} == {"config.yaml", "resume", "notes.txt", ".notes.txt.a.tmp"}
    assert RunFolder.settings(folder) == {"a": 2}
    again.finish({})
    with pytest.raises(ArtifactError, match=r"already holds [^-]*--force"):
        RunFolder(folder).check()
    with pytest.raises(ArtifactError, match="is a file"):
        RunFolder(folder / "notes.txt").check(force=True)


def test_a_run_folder_goes_back_to_a_state(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.begin(state(0), "a: 1\n")
    folder.log({"step": 5, "fvu": 0.5, "tokens_per_s": 1.0})
    folder.save_state(state(7, metrics_bytes=folder.metrics_bytes()))
    folder.log({"step": 10, "fvu": 0.4, "tokens_per_s": 1.0})
    sae(0.0).save(folder.path)
    folder.evaluation({"l0": 1})
    for name in (".cfg.json.x.tmp", ".sae_weights.safetensors.y.tmp"):
        (folder.path / name).write_text("half")
    (folder.path / "resume" / ".step-00000010.z.tmp").mkdir()
    again = RunFolder(folder.path)
    assert again.check_resume() == 7
    found = again.saved()
    assert torch.equal(found.tensors["weights"], torch.full((300,), 7.0))
    again.cut_back(7, found.record["members"][""]["metrics_bytes"], "a: 2\n")
    again.go_on(7, "a: 2\n")
    assert {str(p.relative_to(folder.path)) for p in folder.path.rglob("*") if p.is_file()} == {
        "config.yaml",
        "metrics.jsonl",
        "speed.jsonl",
        "resume/step-00000007/state.json",
        "resume/step-00000007/state.safetensors",
    }
    assert not list(folder.path.rglob(".*"))
    assert (folder.path / "metrics.jsonl").read_text() == '{"step": 5, "fvu": 0.5}\n'
    assert json.loads((folder.path / "speed.jsonl").read_text())["step"] == 5
    again.finish({"model": "m"})
    assert not (folder.path / "resume").exists()
    for call in (again.check_resume, again.saved):
        with pytest.raises(ArtifactError, match="is finished; there is nothing to resume"):
            call()
    with pytest.raises(ArtifactError, match="holds no state to resume from; leave --resume out"):
        RunFolder(tmp_path).check_resume()
    with pytest.raises(ArtifactError, match="is no folder"):
        RunFolder(tmp_path / "nowhere").check_resume()


def counted_run(path: Path, *, resume: bool = False) -> None:
    """Four steps that each add one to a weight, in a folder."""
    folder = RunFolder(path)
    if resume:
        found = folder.saved()
        folder.cut_back(found.record["step"], found.record["members"][""]["metrics_bytes"], "a: 1\n")
        folder.go_on(found.record["step"], "a: 1\n")
        step, weight = int(found.record["step"]), found.tensors["weights"].clone()
    else:
        folder.begin(state(0), "a: 1\n")
        step, weight = 0, torch.zeros(300)
    folder.provenance({"status": "running"})
    while step < 4:
        step, weight = step + 1, weight + 1
        folder.log({"step": step, "sum": float(weight.sum()), "tokens_per_s": 1.0})
        folder.save_state(SavedState(state(step, metrics_bytes=folder.metrics_bytes()).record, {"weights": weight}))
    sae(float(weight[0])).save(path)
    folder.evaluation({"l0": float(weight[0])})
    folder.finish({"steps": step})


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_a_run_that_died_at_any_change_of_its_folder_can_be_resumed_to_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted_run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        calls = Death(patch, last=10**9)
        counted_run(tmp_path / "counted")
    assert calls.calls > 30 and files(tmp_path / "counted") == files(tmp_path / "whole")
    anew, finished = 0, 0
    for last in range(1, calls.calls + 1):
        out = tmp_path / str(last)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            Death(patch, last=last)
            counted_run(out)
        try:
            counted_run(out, resume=True)
        except ArtifactError as err:
            finished += "is finished" in str(err)
            anew += "holds no state" in str(err) or "is no folder" in str(err)
            if "is finished" not in str(err):
                counted_run(out)
        assert files(out) == files(tmp_path / "whole"), f"after {last} changes"
        assert {p.name for p in out.iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}
    # Only before the first state was whole there is nothing to go on from; after the last record, nothing to do.
    assert anew == 4 and finished >= 2


def test_a_full_disk_is_named_and_the_state_before_it_survives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.begin(state(0), "a: 1\n")
    folder.save_state(state(3))

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(
            ArtifactError, match=r"step 8 cannot be written .*No space left.*step 3 is whole: make room, then resume"
        ):
            folder.save_state(state(8))
        patch.setattr(Path, "open", full)
        with pytest.raises(ArtifactError, match="No space left"):
            folder.log({"step": 8, "tokens_per_s": 1.0})
    assert RunFolder(folder.path).saved().record["step"] == 3 and not list(folder.path.rglob(".*"))
    folder.save_state(state(8))
    assert RunFolder(folder.path).saved().record["step"] == 8


def test_at_most_one_state_stays_and_the_one_of_a_step_is_written_once(tmp_path: Path) -> None:
    states = StateFolder(tmp_path, held=("step",), anew="begin")
    assert not states.only_begun()
    for step in (3, 3, 11):
        states.save(state(step, tag=[step]))
        assert states.steps() == [step] and states.check() == step
    states.save(state(11, tag="other"))
    assert states.latest().record["tag"] == [11]
    with pytest.raises(ArtifactError, match="lacks data: another version wrote it"):
        StateFolder(tmp_path, held=("step", "data"), anew="begin").latest()
    states.clear()
    assert not (tmp_path / "resume").exists()
