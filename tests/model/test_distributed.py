"""Two processes train what one does: weights, metrics, states to go on from, and what they say."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
import yaml
from safetensors.torch import load_file
from torch import Tensor

import interp
from interp.cli.main import main as command
from interp.core.errors import ConfigError
from interp.core.resources import resource
from interp.train.config import TrainConfig
from interp.train.job import plan_job
from tests.families import make, word_tokenizer
from tests.model import distributed as worker
from tests.source import REPO

STEPS, BATCH = 20, 256
BOUND = 1e-5
KINDS: dict[str, dict[str, Any]] = {
    "topk": {"kind": "topk", "k": 2, "prefixes": [40]},
    "batchtopk": {"kind": "batchtopk", "k": 2},
    "jumprelu": {"kind": "jumprelu", "pre_act": 0.1, "bandwidth": 0.5, "threshold": 2.0},
}


def texts(n: int) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(3, 20, (n,), generator=generator).tolist()
    return [" ".join(f"w{i}" for i in torch.randint(1, 120, (size,), generator=generator).tolist()) for size in sizes]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a text of fewer tokens than are trained on, and a store of its activations."""
    folder = tmp_path_factory.mktemp("distributed")
    make("Llama").save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts(300)), encoding="utf-8")
    line = f"capture --model {folder}/model --sites 1.resid_post --data {folder}/text.jsonl".split()
    line += ["--text.ctx", "16", "--text.rows", "20", "--text.part", "train", "--store.dtype", "float32"]
    assert command([*line, "--out", str(folder / "store"), "--store.unit-documents", "64"]) == 0
    return folder


def job(base: Path, out: str, kind: str, *, store: bool = False, shards: int = 1, **changes: Any) -> dict[str, Any]:
    train: dict[str, Any] = {"tokens": STEPS * BATCH - 100, "batch_size": BATCH, "buffer_tokens": 1400}
    train |= {"shards": shards, "log_every": 5, "checkpoint_every": 8, "dead_after": 300, "lr": 3e-3}
    return {
        "model": str(base / "model"),
        "site": "1.resid_post",
        "data": str(base / "text.jsonl"),
        "store": str(base / "store") if store else None,
        "out": str(base / out),
        "dictionary": {"d_sae": 256, "aux_coef": 0.03, **KINDS[kind]},
        "text": {"ctx": 16, "rows": 20},
        "train": train,
        "evaluation": {"tokens": 200},
        **changes,
    }


PLAN: dict[str, dict[str, Any]] = {
    "topk": {"kind": "topk"},
    "batchtopk": {"kind": "batchtopk", "store": True},
    "jumprelu": {"kind": "jumprelu"},
    "topk-sharded": {"kind": "topk", "store": True, "shards": 2},
    "batchtopk-sharded": {"kind": "batchtopk", "shards": 2},
    "jumprelu-sharded": {"kind": "jumprelu", "shards": 2},
}
"""Trainings of two processes, each of which one process does too."""
HANDED: dict[str, dict[str, Any]] = {
    "topk-1-to-2": {"kind": "topk"},
    "batchtopk-1-to-2-sharded": {"kind": "batchtopk", "shards": 2},
    "topk-2-to-1": {"kind": "topk"},
    "batchtopk-2-to-1-sharded": {"kind": "batchtopk", "shards": 2},
}
"""Trainings that so many processes begin and so many end."""


@pytest.fixture(scope="module")
def seen(base: Path) -> list[dict[str, Any]]:
    """What the two processes saw of all trainings."""
    jobs: dict[str, Any] = {name: {"cfg": job(base, name, **how)} for name, how in PLAN.items()}
    jobs["topk-sharded"]["small"] = True  # as if no GPU had room for what is measured
    for name, how in HANDED.items():
        alone = {**how, "shards": 1}
        if "1-to-2" in name:
            begun = worker.do({"cfg": job(base, name, **alone), "stop": [9, 0, signal.SIGTERM]})
            assert begun["status"] == "stopped"
            shutil.copytree(base / name, base / f"{name}-begun")
            jobs[name] = {"cfg": job(base, name, **how), "resume": True}
        else:
            jobs[name] = {"cfg": job(base, name, **how), "stop": [9, 1, signal.SIGTERM]}
    jobs["asked-to-save"] = {"cfg": job(base, "saved", "topk"), "stop": [3, 1, signal.SIGUSR1]}
    jobs["asked-to-save"]["cfg"]["train"] |= {"checkpoint_every": 0, "tokens": 6 * BATCH}
    jobs["sweep"] = {"cfg": job(base, "sweep", "topk", shards=2, sweep={"k": [2, 6]})}
    jobs["held"] = {"cfg": job(base, "topk", "topk")}
    jobs["odd"] = {"cfg": job(base, "odd", "topk")}
    jobs["odd"]["cfg"]["train"] |= {"batch_size": 255}
    jobs["spoiled"] = {"cfg": job(base, "spoiled", "topk"), "spoil": [7, 1]}
    (base / "jobs.json").write_text(json.dumps(jobs))
    (base / "cli.yaml").write_text(yaml.safe_dump(job(base, "cli", "topk")))
    script = str(Path(worker.__file__))
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    words = [*run, str(base / "jobs.json"), str(base)]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=240, env=env, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    for name in HANDED:
        if "2-to-1" in name:
            shutil.copytree(base / name, base / f"{name}-begun")
    return [json.loads((base / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def off(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[n] - t).norm() / t.norm().clamp_min(1e-6)) for n, t in theirs.items())


def weights(out: Path) -> dict[str, Tensor]:
    return load_file(out / "sae_weights.safetensors")


def one_process(base: Path, how: dict[str, Any]) -> Path:
    """The same training by this process alone, which all that differ in shards have in common."""
    name = f"{how['kind']}-{'stored' if how.get('store') else 'streamed'}-alone"
    if not (base / name).exists():
        assert worker.do({"cfg": job(base, name, **{**how, "shards": 1})})["status"] == "finished"
    return base / name


@pytest.mark.parametrize("name", PLAN)
def test_two_processes_train_what_one_does(base: Path, seen: list[dict[str, Any]], name: str) -> None:
    assert [found[name]["status"] for found in seen] == ["finished"] * 2
    alone, both = one_process(base, PLAN[name]), base / name
    assert off(weights(both), weights(alone)) < BOUND
    lines, others = (
        [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] for out in (both, alone)
    )
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    for line, other in zip(lines, others, strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-6)
    assert any(line["dead"] > 0 for line in lines) and any(line["aux"] > 0 for line in lines)
    figures, expected = (json.loads((out / "evaluation.json").read_text()) for out in (both, alone))
    assert figures["fvu"] == pytest.approx(expected["fvu"], rel=1e-4)
    assert {p.name for p in both.iterdir()} == {p.name for p in alone.iterdir()}
    assert json.loads((both / "provenance.json").read_text())["processes"] == 2
    assert isinstance(interp.SAE.load(both), interp.SAE)


@pytest.mark.parametrize("name", HANDED)
def test_what_some_processes_begin_others_end(base: Path, seen: list[dict[str, Any]], name: str) -> None:
    how = HANDED[name]
    if "2-to-1" in name:
        # A signal to one of them stops both after the same step; the first alone says so.
        assert [(found[name]["status"], found[name]["signal"]) for found in seen] == [("stopped", "SIGTERM")] * 2
        assert [p.name for p in (base / name / "resume").iterdir()] == ["step-00000009"]
        ended = worker.do({"cfg": job(base, name, **{**how, "shards": 1}), "resume": True})
        assert ended["status"] == "finished" and any("from step 9 on" in line for line in ended["told"])
        assert any("processes" in line for line in ended["told"])
    assert json.loads((base / name / "provenance.json").read_text())["status"] == "finished"
    assert off(weights(base / name), weights(one_process(base, how))) < BOUND


@pytest.mark.parametrize("kind", ["topk-{}", "batchtopk-{}-sharded"])
def test_a_state_does_not_know_how_many_processes_wrote_it(base: Path, seen: list[dict[str, Any]], kind: str) -> None:
    folders = [base / f"{kind.format(way)}-begun" / "resume" / "step-00000009" for way in ("1-to-2", "2-to-1")]
    alone, both = (load_file(folder / "state.safetensors") for folder in folders)
    assert alone.keys() == both.keys()
    for name, value in alone.items():
        assert both[name].shape == value.shape and both[name].dtype == value.dtype
        if name.startswith("stream.") or "rng" in name:
            # The buffer holds the same rows in the same places, whoever has run the model on them.
            assert torch.equal(both[name], value), name
        else:
            torch.testing.assert_close(both[name], value, rtol=1e-3, atol=1e-6)
    assert sum(len(value) for name, value in alone.items() if name == "stream.buffer.values.0") > 500
    records = [json.loads((folder / "state.json").read_text()) for folder in folders]
    assert records[0]["stream"] == records[1]["stream"] and records[0]["settings"] == records[1]["settings"]


def test_the_plan_counts_the_bytes_of_one_process(base: Path) -> None:
    cfg = TrainConfig.model_validate(job(base, "planned", "batchtopk", shards=2))
    alone = plan_job(cfg.model_copy(update={"train": cfg.train.model_copy(update={"shards": 1})}), processes=1)
    for processes, parts in ((2, 1), (8, 4)):
        plan = plan_job(cfg, processes=processes)
        # Half of the latents with their weights, gradients and moments; b_dec whole; its part of the batch.
        assert plan.dictionary_bytes == 16 * (128 * (32 + 32 + 1) + 32) + 8 * (BATCH // parts) * 128
        assert (plan.processes, plan.shards, plan.checkpoint_bytes) == (processes, 2, alone.checkpoint_bytes)
    assert alone.dictionary_bytes == 16 * (256 * (32 + 32 + 1) + 32) + 8 * BATCH * 256
    for update, processes, reason in (
        ({"train": {**cfg.train.model_dump(), "shards": 2}}, 3, "no multiple"),
        ({"train": {**cfg.train.model_dump(), "shards": 3}}, 3, "multiple of train.shards"),
        ({"train": {**cfg.train.model_dump(), "batch_size": 258}}, 8, "give 256"),
        ({"dictionary": {"kind": "feature_choice", "d_sae": 256, "k": 2}}, 2, "train it with one process"),
    ):
        with pytest.raises(ConfigError, match=reason):
            plan_job(TrainConfig.model_validate({**cfg.model_dump(), **update}), processes=processes)


@pytest.mark.parametrize(("shards", "d_sae"), [(1, 16_384), (2, 1_048_576)])
def test_the_lines_for_gemma_on_eight_gpus_are_planned_by_the_formulas(
    shards: int, d_sae: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Per process: 16 bytes a parameter that it holds, 8 a pre-activation of its tokens; the buffer and model whole."""
    d, batch, buffer, parameters = 2304, 4096, 262_144, 2_614_341_888
    tf.Gemma2Config().save_pretrained(tmp_path / "model")
    monkeypatch.setenv("WORLD_SIZE", "8")
    words = ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "run"), "--dry-run", "--json"]
    words += ["--train.shards", str(shards), "--dictionary.d-sae", str(d_sae)]
    assert command(["train", str(resource("configs/sae-gemma-2-2b-l12.yaml")), *words]) == 0
    made = json.loads(capfd.readouterr().out)["estimates"]
    mine = d_sae // shards
    assert (made["processes"], made["shards"], made["model_parameters"]) == (8, shards, parameters)
    assert made["parameters"] == d_sae * (2 * d + 1) + d
    assert made["dictionary_bytes"] == 16 * (mine * (2 * d + 1) + d) + 8 * (batch // (8 // shards)) * mine
    assert made["buffer_bytes"] == buffer * (4 * d + 16) and made["model_bytes"] == 2 * parameters
    assert made["dictionary_bytes"] + made["buffer_bytes"] + made["model_bytes"] < 80e9


def test_a_signal_to_one_process_saves_for_all_and_a_sweep_has_all_its_members(
    base: Path, seen: list[dict[str, Any]]
) -> None:
    assert [found["asked-to-save"]["status"] for found in seen] == ["finished"] * 2
    assert seen[1]["asked-to-save"]["told"] == [] and seen[0]["asked-to-save"]["told"]
    assert [found["sweep"]["status"] for found in seen] == ["finished"] * 2
    assert (base / "sweep" / "sweep.csv").is_file()
    for k in (2, 6):
        sae = interp.SAE.load(base / "sweep" / f"k-{k}")
        assert sae.W_dec.shape == (256, 32) and sae.cfg.model_dump()["k"] == k


def test_what_is_wrong_ends_both_and_one_of_them_says_it(seen: list[dict[str, Any]]) -> None:
    assert [found["held"]["error"] for found in seen] == ["ArtifactError", "ElsewhereError"]
    assert "already holds" in seen[0]["held"]["said"]
    assert seen[1]["odd"]["error"] == "ElsewhereError"
    assert "batch_size is 255" in seen[0]["odd"]["said"] and "give 256" in seen[0]["odd"]["said"]
    # A number that is none came to the second process alone.
    assert [found["spoiled"]["error"] for found in seen] == ["TrainingError", "ElsewhereError"]
    assert "at step 8 " in seen[0]["spoiled"]["said"]


def test_the_command_is_silent_in_all_but_the_first_and_a_shard_is_a_dtensor(seen: list[dict[str, Any]]) -> None:
    assert [found["cli"]["code"] for found in seen] == [0, 0]
    assert "the dictionary is in" in seen[0]["cli"]["stdout"] and seen[1]["cli"]["stdout"] == ""
    assert [found["dtensors"] for found in seen] == [True, True]
