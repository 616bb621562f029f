"""Several dictionaries on one pass of the model: each is what it would be alone, and nothing is lost."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import interp
from interp.cli.main import main as command
from interp.dictionaries.base import SAE, Transcoder
from interp.evaluate.reading import counted_blocks
from interp.train.activations import tokens_of
from interp.train.config import TrainConfig
from interp.train.job import plan_job, train_job, train_sweep
from tests.source import REPO

WEIGHTS = "sae_weights.safetensors"
COMMON: dict[str, Any] = {
    "model": "testbed",
    "site": "1.resid_post",
    "data": "testbed",
    "dictionary": {"d_sae": 96, "k": 4},
    "text": {"ctx": 32, "rows": 8},
    "train": {"tokens": 6000, "batch_size": 128, "buffer_tokens": 1024, "checkpoint_every": 5, "log_every": 10},
    "evaluation": {"tokens": 2000},
}
SWEEP: dict[str, Any] = {"site": ["1.resid_post", "2.resid_post"], "k": [4, 8]}


def config(out: Path, **more: Any) -> TrainConfig:
    return TrainConfig.model_validate({**COMMON, "out": str(out), **more})


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweep") / "run"
    assert train_sweep(config(out, sweep=SWEEP), progress=False).status == "finished"
    return out


def test_each_dictionary_is_what_it_would_be_alone(swept: Path, tmp_path: Path) -> None:
    alone = config(tmp_path / "alone", site="2.resid_post", dictionary={"d_sae": 96, "k": 8})
    report = train_job(alone, progress=False)
    name = "site-2.resid_post_k-8"
    assert (swept / name / WEIGHTS).read_bytes() == (tmp_path / "alone" / WEIGHTS).read_bytes()
    assert (swept / name / "metrics.jsonl").read_bytes() == (tmp_path / "alone" / "metrics.jsonl").read_bytes()
    figures = json.loads((swept / name / "evaluation.json").read_text())
    assert report.evaluation is not None and figures["fvu"] == report.evaluation.fvu
    assert figures["pca_fvu"] == report.evaluation.pca_fvu


def test_the_table_holds_every_dictionary_and_the_page_draws_them(swept: Path) -> None:
    lines = (swept / "sweep.csv").read_text().splitlines()
    names = sorted(line.split(",")[0] for line in lines[1:])
    assert names == sorted(f"site-{site}_k-{k}" for site in SWEEP["site"] for k in SWEEP["k"])
    assert all((swept / name / "cfg.json").is_file() for name in names)
    page = (swept / "sweep.html").read_text()
    assert page.startswith("<!doctype html>") or page.startswith("<!DOCTYPE html>")
    assert all(name in page for name in names)
    assert not (swept / "resume").exists()


def test_a_sweep_that_is_killed_goes_on_to_the_same_bytes(swept: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal, json, sys, interp.train.trainer as t\n"
        "from interp.train.config import TrainConfig\n"
        "from interp.train.job import train_sweep\n"
        "plain = t.DictionaryFit.step\n"
        "def step(self, batch):\n"
        "    plain(self, batch)\n"
        "    if self.steps == 23 and self.name.startswith('site-2'): os.kill(os.getpid(), signal.SIGKILL)\n"
        "t.DictionaryFit.step = step\n"
        "train_sweep(TrainConfig.model_validate(json.loads(sys.argv[1])), progress=False)\n"
    )
    cfg = config(tmp_path / "run", sweep=SWEEP)
    words = [sys.executable, "-c", code, json.dumps(cfg.model_dump(mode="json"))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(words, cwd=REPO, env=environment, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    assert train_sweep(cfg, resume=True, progress=False).status == "finished"
    for name in cfg.members():
        for file in (WEIGHTS, "metrics.jsonl"):
            assert (tmp_path / "run" / name / file).read_bytes() == (swept / name / file).read_bytes()
    assert (tmp_path / "run" / "sweep.csv").read_bytes() == (swept / "sweep.csv").read_bytes()


def test_a_sweep_over_kinds_and_seeds_names_what_cannot_be(tmp_path: Path) -> None:
    cfg = config(tmp_path / "run", sweep={"kind": ["topk", "standard"], "seed": [0, 1]})
    assert list(cfg.members()) == [f"kind-{kind}_seed-{seed}" for kind in ("topk", "standard") for seed in (0, 1)]
    assert [one.seed for one in cfg.members().values()] == [0, 1, 0, 1]
    with pytest.raises(interp.ConfigError, match=r"k-200.*k is 200, more than the 96 latents"):
        config(tmp_path / "run", sweep={"k": [4, 200]}).members()
    with pytest.raises(ValueError, match="each value once"):
        config(tmp_path / "run", sweep={"k": [4, 4]})
    with pytest.raises(interp.ConfigError, match="train_sweep"):
        train_job(cfg)
    with pytest.raises(interp.ConfigError, match="nothing is swept"):
        train_sweep(config(tmp_path / "run"))


def test_the_plan_counts_all_dictionaries(tmp_path: Path) -> None:
    alone, many = plan_job(config(tmp_path / "a")), plan_job(config(tmp_path / "b", sweep=SWEEP))
    assert alone.parameters == 2 * 96 * 128 + 96 + 128
    assert many.dictionaries == 4 and many.parameters == 4 * alone.parameters
    assert many.buffer_bytes == 1024 * (4 * 256 + 16)


TRANSCODER: dict[str, Any] = {
    "site": "2.ln2.normalized",
    "target": "2.mlp_out",
    "dictionary": {"kind": "batchtopk", "form": "skip_transcoder", "d_sae": 96, "k": 4},
}


def test_a_transcoder_learns_what_an_mlp_does_and_says_of_which(tmp_path: Path) -> None:
    report = train_job(config(tmp_path / "run", **TRANSCODER), progress=False)
    assert report.evaluation is not None and report.evaluation.target == "blocks.2.hook_mlp_out"
    made = Transcoder.load(tmp_path / "run")
    assert made.cfg.metadata["hook_name"] == "blocks.2.ln2.hook_normalized"
    assert made.cfg.metadata["hook_name_out"] == "blocks.2.hook_mlp_out"
    assert made.cfg.metadata["training_architecture"] == "batchtopk"
    with pytest.raises(interp.ArtifactError, match="not a SAE"):
        SAE.load(tmp_path / "run")
    # FVU by hand, on the same held-out text.
    hm, parts = interp.HookManager.load("testbed"), []
    held_out = tokens_of(config(tmp_path / "run", **TRANSCODER), hm, "held_out")
    for block, keep in counted_blocks(held_out, 2000):
        run = hm.run(block.inputs, read=["2.ln2.normalized", "2.mlp_out"])
        parts.append((made(run["2.ln2.normalized"])[keep].double(), run["2.mlp_out"][keep].double()))
    guess, y = (torch.cat(found) for found in zip(*parts, strict=True))
    fvu = float((y - guess).pow(2).sum() / (y - y.mean(0)).pow(2).sum())
    assert fvu == pytest.approx(report.evaluation.fvu, rel=1e-6) and fvu < 1


def test_what_a_form_or_a_kind_needs_is_asked_for_before_work_starts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="target is not given"):
        config(tmp_path / "run", dictionary={"kind": "batchtopk", "form": "transcoder"})
    with pytest.raises(ValueError, match="target is given"):
        config(tmp_path / "run", target="2.mlp_out")
    with pytest.raises(ValueError, match="no name in SAELens"):
        config(tmp_path / "run", target="2.mlp_out", dictionary={"kind": "topk", "form": "transcoder"})
    with pytest.raises(interp.ConfigError, match=r"--store\.gradient loss"):
        train_job(config(tmp_path / "run", dictionary={"kind": "gradient_topk", "d_sae": 96, "k": 4}), progress=False)
    assert not (tmp_path / "run").exists()


def test_a_g_sae_trains_on_a_store_with_gradients_and_with_beta_zero_is_topk(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    words = ["--sites", "1.resid_post", "--text.ctx", "32", "--text.rows", "8", "--text.part", "train"]
    words += ["--store.max-tokens", "6000", "--store.dtype", "float32", "--out", store]
    assert command(["capture", "--model", "testbed", "--data", "testbed", *words, "--store.gradient", "loss"]) == 0
    weights = {}
    kinds: dict[str, dict[str, Any]] = {
        "topk": {"kind": "topk"},
        "zero": {"kind": "gradient_topk", "beta": 0.0},
        "g": {"kind": "gradient_topk", "beta": 2.0},
    }
    for name, options in kinds.items():
        cfg = config(tmp_path / name, store=store, dictionary={"d_sae": 96, "k": 4, **options})
        report = train_job(cfg, progress=False)
        assert report.evaluation is not None and 0 < report.evaluation.fvu < 1
        weights[name] = (tmp_path / name / WEIGHTS).read_bytes()
        assert json.loads((tmp_path / name / "cfg.json").read_text())["architecture"] == "topk"
    assert weights["zero"] == weights["topk"] != weights["g"]


def test_the_command_takes_lists_and_prints_a_table(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = [
        "--model",
        "testbed",
        "--site",
        "1.resid_post",
        "--data",
        "testbed",
        "--text.ctx",
        "32",
        "--text.rows",
        "8",
    ]
    words += ["--train.tokens", "2000", "--train.batch-size", "128", "--train.buffer-tokens", "512"]
    words += ["--evaluation.tokens", "1000", "--dictionary.d-sae", "64", "--out", str(tmp_path / "run")]
    assert command(["train", *words, "--sweep.k", "2", "4", "--sweep.kind", "topk", "standard", "--dry-run"]) == 0
    assert "4 dictionaries" in capfd.readouterr().out
    assert command(["train", "--sweep.k", "2", "4", *words, "--dictionary.prefixes", "16", "32"]) == 0
    said = capfd.readouterr().out
    assert "k-2" in said and "k-4" in said and "sweep.html" in said
    assert command(["train", *words, "--resume"]) == 1  # it is finished
    assert command(["eval", str(tmp_path / "run" / "k-4"), "--tokens", "500"]) == 0
