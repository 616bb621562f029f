"""`interp patch`, `attribute` and `circuit`: files, JSON, refusals, and a sweep that is stopped and goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from interp.cli.main import main
from interp.core.result import Result
from interp.patching.circuits.circuit import Circuit
from interp.patching.estimates.edge_scores import EdgeScores
from interp.patching.result import PatchResult
from interp.testbed.tasks import task_pairs

PAIRS = ["--model", "testbed", "--pairs.task", "ioi", "--pairs.n", "4"]


def test_a_sweep_leaves_a_table_a_page_and_the_result(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "patch"
    assert main(["patch", *PAIRS, "--metrics", "logit_diff", "kl", "--out", str(out), "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    held = PatchResult.load(out / "result")
    assert said["cells"] == held.unchanged.numel() == 16 and held.metrics == ["logit_diff", "kl"]
    assert {p.name for p in out.iterdir()} == {"settings.yaml", "cells.csv", "patching.html", "result"}
    assert (out / "cells.csv").read_text().count("\n") == 1 + 16 * 2 * 4
    assert main(["patch", *PAIRS, "--out", str(out)]) == 2
    assert "give another folder, or --force" in capfd.readouterr().err
    assert main(["patch", *PAIRS, "--out", str(out), "--force"]) == 0
    assert PatchResult.load(out / "result").metrics == ["logit_diff"]


def test_a_stopped_sweep_goes_on_to_the_same_values(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["patch", *PAIRS, "--by", "pos_head", "--engine", "naive"]
    job = subprocess.Popen(
        [sys.executable, "-m", "interp.cli.main", *words, "--out", str(tmp_path / "cut")], stderr=subprocess.PIPE
    )
    # The settings are written once nothing can be wrong any more; the sweep follows at once.
    deadline = time.monotonic() + 60
    while not (tmp_path / "cut" / "settings.yaml").exists() and time.monotonic() < deadline and job.poll() is None:
        time.sleep(0.05)
    time.sleep(0.3)
    os.kill(job.pid, signal.SIGTERM)
    _, err = job.communicate(timeout=60)
    assert job.returncode == 143, err.decode()
    assert "--resume --out" in err.decode() and not (tmp_path / "cut" / "result").exists()
    assert main(["patch", "--resume", "--out", str(tmp_path / "cut")]) == 0
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    resumed, whole = (PatchResult.load(tmp_path / name / "result") for name in ("cut", "whole"))
    assert torch.equal(resumed.patched, whole.patched) and bool(whole.patched.isfinite().all())
    capfd.readouterr()
    assert main(["patch", "--resume", "--out", str(tmp_path / "cut")]) == 2
    assert "is done" in capfd.readouterr().err
    assert main(["patch", "--resume", "--out", str(tmp_path / "nothing")]) == 2
    assert "nothing was begun" in capfd.readouterr().err


def test_scores_of_nodes_are_verified_and_those_of_edges_make_a_circuit(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    nodes, edges, circuit = (tmp_path / name for name in ("nodes", "edges", "circuit"))
    assert main(["attribute", *PAIRS, "--verify", "3", "--out", str(nodes), "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert len(said["top"]) == 10 and (nodes / "verified.csv").is_file()
    assert isinstance(Result.load(nodes / "verified"), Result)
    assert main(["attribute", *PAIRS, "--level", "edges", "--rule", "relp", "--out", str(edges)]) == 0
    scores = EdgeScores.load(edges / "result")
    capfd.readouterr()
    words = ["circuit", *PAIRS, "--scores", str(edges), "--edges", "40", "--knockouts", "2", "--n-random", "1"]
    assert main([*words, "--out", str(circuit), "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    found = Circuit.load(circuit / "circuit.json")
    assert said["edges"] == found.n_edges <= 40 and said["of"] == scores.graph.n_edges
    assert 0.5 < said["faithfulness"] < 1.2
    assert (circuit / "circuit.graphml").is_file() and (circuit / "circuit.eap-ig.json").is_file()


@pytest.mark.parametrize("verb", ["patch", "attribute", "circuit"])
def test_a_dry_run_writes_nothing_and_bad_settings_are_refused(
    verb: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert main([verb, *PAIRS, "--out", out, "--dry-run", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["config"]["pairs"]["task"] == "ioi"
    assert not list(tmp_path.iterdir())
    assert main([verb, "--model", "testbed", "--pairs.task", "iio", "--out", out]) == 1
    assert "did you mean 'ioi'" in capfd.readouterr().err
    assert main([verb, *PAIRS, "--pairs.file", "x.json", "--out", out]) == 2
    assert "give either task or file" in capfd.readouterr().err
    task_pairs("ioi", 3).save(tmp_path / "pairs.json")
    assert (
        main([verb, "--model", "testbed", "--pairs.file", str(tmp_path / "pairs.json"), "--out", out, "--dry-run"]) == 0
    )
    capfd.readouterr()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("all of it")
    assert main([verb, *PAIRS, "--out", str(tmp_path / "mine"), "--force"]) == 2
    assert "was not written by this command" in capfd.readouterr().err
    assert (tmp_path / "mine" / "thesis.tex").exists()
    wrong = {"patch": ["--pos", "99"], "attribute": ["--nodes", "zz"], "circuit": ["--edges", "99999"]}[verb]
    assert main([verb, *PAIRS, *wrong, "--out", out]) == (2 if verb == "circuit" else 1)
    assert not Path(out).exists(), "nothing was measured, so nothing stands in the way of the next try"
    assert main([verb, *PAIRS, "--metric" if verb != "patch" else "--mode", "klx", "--out", out]) == 2


def test_noise_and_the_optimal_constant_are_asked_for_on_the_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    noisy = ["patch", *PAIRS, "--sites", "2.z", "--ablation", "gaussian", "--noise", "2", "--n-draws", "2"]
    assert main([*noisy, "--out", str(tmp_path / "noise")]) == 0
    held = PatchResult.load(tmp_path / "noise" / "result")
    assert held.ablation == "gaussian" and held.provenance.settings["n_draws"] == 2 and held.mode == "noise"
    best = ["patch", *PAIRS, "--sites", "2.mlp_out", "--by", "site", "--ablation", "optimal"]
    assert main([*best, "--out", str(tmp_path / "best")]) == 0
    assert PatchResult.load(tmp_path / "best" / "result").ablation == "optimal"
    capfd.readouterr()
    for words, says in (
        (["--noise", "2"], "noise is for ablation: gaussian"),
        (["--ablation", "optimal", "--by", "pos_head"], "one constant for all positions"),
    ):
        assert main(["patch", *PAIRS, *words, "--out", str(tmp_path / "bad")]) == 2
        assert says in capfd.readouterr().err
