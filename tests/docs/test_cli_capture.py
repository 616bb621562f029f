"""`interp capture` and `interp store`, and training from what they leave: exit codes, errors, and the same bytes."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import interp
import tests.source as source
from interp.cli.main import main
from interp.data.manifest import SETTINGS
from tests.docs.captures import SITES, capture_words


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The words of a capture, but for where it goes."""
    return capture_words(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def store(job: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captured") / "store"
    assert main([*job, "--out", str(folder)]) == 0
    return folder


def tree(folder: Path) -> dict[str, str]:
    """Digests of all files but the settings, which name the folder itself, and locks."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != SETTINGS and p.parent.name != "locks"]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def damaged(store: Path, folder: Path) -> Path:
    """A copy in which one bit of one shard is another."""
    import shutil

    shutil.copytree(store, folder)
    path = folder / "shards" / "000002" / "values.blocks.1.hook_resid_post.bfloat16"
    held = bytearray(path.read_bytes())
    held[100] ^= 4
    path.write_bytes(held)
    return folder


def test_a_capture_prints_json_alone_and_leaves_a_store(
    job: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*job, "--out", str(tmp_path / "store"), "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert said["status"] == "complete" and set(said["busy"]) == {"text", "model", "disk"}
    held = interp.ActivationStore.open(tmp_path / "store")
    assert (held.n_tokens, held.n_rows) == (said["tokens"], said["rows"]) and held.complete
    assert held.n_tokens == 9 * 114
    assert [site.short for site in held.sites] == SITES


def test_a_dry_run_says_bytes_and_time_and_writes_nothing(
    job: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [*job, "--store.max-tokens", "500", "--out", str(tmp_path / "store"), "--dry-run"]
    assert main([*words, "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    # 17 bytes of columns, and bfloat16 of 32 numbers of the residual stream and 32 of the heads.
    assert said["bytes_per_token"] == 17 + 2 * 64 and said["bytes"] == 500 * said["bytes_per_token"]
    assert said["seconds"] == pytest.approx(500 / said["tokens_per_s"])
    assert main(words) == 0
    assert "500 tokens" in capfd.readouterr().out and not list(tmp_path.iterdir())


def test_info_verify_and_repair(store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["store", "info", str(store)]) == 0
    told = capfd.readouterr().out
    assert "complete" in told and "blocks.0.attn.hook_z" in told and "6 shards" in told
    assert main(["store", "verify", str(store)]) == 0
    bad = damaged(store, tmp_path / "bad")
    capfd.readouterr()
    assert main(["store", "verify", str(bad)]) == 1
    told = capfd.readouterr().out
    assert "000002" in told and "checksum" in told and "interp store repair" in told
    assert main(["store", "repair", str(bad), "--json"]) == 0
    assert "removed 000002" in " ".join(json.loads(capfd.readouterr().out)["faults"])
    assert main(["store", "verify", str(bad)]) == 1
    assert "shard 000002 is missing" in capfd.readouterr().out
    assert main(["capture", "--resume", "--out", str(bad)]) == 0
    assert main(["store", "verify", str(bad)]) == 0
    assert tree(bad) == tree(store)


def test_what_is_wrong_is_said_before_anything_is_written(
    job: list[str], store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "new")]
    before = tree(store)
    cases: list[tuple[list[str], int, str]] = [
        ([*job, "--out", str(store)], 1, "resume to go on"),
        ([*job, *out, "--sites", "1.pattern"], 1, "something for each token"),
        ([*job, *out, "--sites", "9.resid_post"], 1, "9.resid_post"),
        ([*job, *out, "--data", "nowhere.jsonl"], 1, "nowhere.jsonl"),
        ([*job, *out, "--store.dtype", "int7"], 2, "int7"),
        ([*job, "--out", str(store), "--resume", "--text.ctx", "12"], 1, "text.ctx was 16, now 12"),
        ([*job, "--out", str(store), "--resume", "--store.max-tokens", "300"], 1, "more than 300"),
        (["store", "info", str(tmp_path)], 1, "no store of activations"),
    ]
    for words, code, message in cases:
        assert main(words) == code, words
        assert message in " ".join(capfd.readouterr().err.replace("│", " ").split()), words
    assert not (tmp_path / "new").exists() and tree(store) == before


def test_a_sigterm_keeps_whole_shards_and_resume_ends_with_the_same_bytes(
    job: list[str], store: Path, tmp_path: Path
) -> None:
    out = str(tmp_path / "store")
    code = (
        "import os, signal, sys, interp.data.capture as c\n"
        "plain, seen = c._Job._captured, []\n"
        "def captured(self, block):\n"
        "    seen.append(1)\n"
        "    if len(seen) == 12: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return plain(self, block)\n"
        "c._Job._captured = captured\n"
        "from interp.cli.main import main\n"
        f"sys.exit(main({[*job, '--out', out]!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=source.REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 143, done.stderr
    assert "stopped by SIGTERM" in done.stderr and "interp capture --resume" in done.stderr
    kept = sorted(p.name for p in (Path(out) / "shards").iterdir())
    assert kept and len(kept) < 6
    assert main(["capture", "--resume", "--out", out]) == 0
    assert tree(Path(out)) == tree(store)


def test_ranks_of_torchrun_give_the_bytes_of_one_process(job: list[str], store: Path, tmp_path: Path) -> None:
    words = [*job, "--out", str(tmp_path / "store")]
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "-m"]
    environment: dict[str, Any] = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*run, "interp.cli.main", *words], cwd=source.REPO, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert tree(tmp_path / "store") == tree(store)
    assert done.stdout.count("tokens/s") == 1


def test_a_dictionary_trains_on_a_store_and_resumes_to_the_bit(
    job: list[str], store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = {"dictionary.d-sae": 48, "dictionary.k": 4, "train.tokens": 3000, "train.batch-size": 100}
    settings |= {"train.buffer-tokens": 400, "train.checkpoint-every": 7, "text.ctx": 16, "evaluation.tokens": 300}
    line = ["train", "--model", job[2], "--site", SITES[0], "--data", job[4], "--store", str(store)]
    line += [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    assert main([*line, "--out", str(tmp_path / "whole"), "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert said["tokens"] == 3000 and 0 < said["fvu"] < 1.5
    code = (
        "import os, signal, sys, interp.train.trainer as t\n"
        "plain = t.DictionaryFit.step\n"
        "def step(self, batch):\n"
        "    plain(self, batch)\n"
        "    if self.steps == 18: os.kill(os.getpid(), signal.SIGKILL)\n"
        "t.DictionaryFit.step = step\n"
        "from interp.cli.main import main\n"
        f"sys.exit(main({[*line, '--out', str(tmp_path / 'killed')]!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=source.REPO, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert main(["train", "--resume", "--out", str(tmp_path / "killed")]) == 0
    name = "sae_weights.safetensors"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_store_of_something_else_is_refused(
    job: list[str], store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = ["train", "--data", job[4], "--store", str(store), "--out", str(tmp_path / "run"), "--text.ctx", "16"]
    for words, message in (
        (["--model", job[2], "--site", "0.resid_post"], "not 0.resid_post"),
        (["--model", job[2], "--site", SITES[0], "--text.hold-out-every", "7"], "held out"),
        (["--model", "testbed", "--site", SITES[0]], "was captured from"),
    ):
        assert main([*line, *words]) == 1
        assert message in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
