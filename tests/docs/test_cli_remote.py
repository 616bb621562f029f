"""Stores at a URL, on the command line: sent while they are captured, looked at, read while a dictionary is trained."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem

import interp.data.remote as remote
import interp.data.remotefolder as remotefolder
import tests.source as source
from interp.cli.main import main
from interp.core.manager import HookManager
from interp.data.manifest import SETTINGS
from tests.docs.captures import SITES, capture_words


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remotefolder, "_WAIT", 0.0)
    monkeypatch.setattr(remote, "_LOOK", 0.02)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The words of a capture, but for where it goes."""
    return capture_words(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def store(job: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captured") / "store"
    assert main([*job, "--out", str(folder)]) == 0
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    """What of a store is sent, or what lies where it was sent to."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name not in (SETTINGS, "end.json", "limit.json")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if p.parent.name != "locks"}


def url_of(folder: Path) -> str:
    return f"file://{folder}"


def run(code: str, **environment: str) -> subprocess.Popen[str]:
    """A process of its own: the code, and then what it says."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=source.REPO,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_shards_are_sent_and_need_not_be_kept(
    job: list[str], store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, there = str(tmp_path / "out"), tmp_path / "there"
    words = ["--out", out, "--send-to", url_of(there), "--no-keep-local"]
    assert main([*job, *words, "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert said["status"] == said["sent"]["status"] == "complete" and said["sent"]["shards"] == 6
    assert said["sent"]["bytes"] == said["bytes"] and tree(there) == tree(store)
    assert {Path(name).name for name in tree(Path(out))} == {"manifest.json", "complete.json", "shard.json"}
    # What was sent away is neither missing nor damaged, and nothing takes it for that.
    for action in ("info", "verify", "repair", "verify"):
        assert main(["store", action, out]) == 0
        assert "6 shards were sent elsewhere" in capfd.readouterr().out
    assert main(["capture", "--resume", "--out", out]) == 0
    told = capfd.readouterr().out
    assert "sent 0 shards" in told and "6 were there; all of the store is there" in told
    assert "open_remote" in told and "ActivationStore.open" not in told
    assert tree(there) == tree(store)


def test_a_stopped_capture_leaves_what_is_unsent_to_a_resume(job: list[str], store: Path, tmp_path: Path) -> None:
    out, there = str(tmp_path / "out"), tmp_path / "there"
    code = (
        "import os, signal, sys, interp.data.capture as c, interp.data.remote as r\n"
        "r._LOOK = 60\n"  # it looks when it begins, and when it is told to end
        "plain, seen = c._Job._captured, []\n"
        "def captured(self, block):\n"
        "    seen.append(1)\n"
        "    if len(seen) == 12: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return plain(self, block)\n"
        "c._Job._captured = captured\n"
        "from interp.cli.main import main\n"
        f"sys.exit(main({[*job, '--out', out, '--send-to', url_of(there), '--no-keep-local']!r}))"
    )
    process = run(code)
    _, told = process.communicate()
    assert process.returncode == 143, told
    assert "stopped by SIGTERM" in told and "goes on, and sends what is left" in told
    whole = {name for name in tree(Path(out)) if name.startswith("shards")}
    assert len(whole) > len({name for name in tree(there) if name.startswith("shards")})
    assert "complete.json" not in tree(there)
    assert main(["capture", "--resume", "--out", out]) == 0
    assert tree(there) == tree(store)
    assert {Path(name).name for name in tree(Path(out))} == {"manifest.json", "complete.json", "shard.json"}


def test_of_two_processes_one_sends_and_waits_for_the_other(job: list[str], store: Path, tmp_path: Path) -> None:
    words = [*job, "--out", str(tmp_path / "out"), "--send-to", url_of(tmp_path / "there")]
    code = (
        "import os, sys, time, interp.data.capture as c\n"
        "plain = c._Job._captured\n"
        "def captured(self, block):\n"
        "    time.sleep(0.5 if os.environ['RANK'] == '1' else 0.02)\n"
        "    return plain(self, block)\n"
        "c._Job._captured = captured\n"
        "from interp.cli.main import main\n"
        f"sys.exit(main({words!r}))"
    )
    both = [run(code, RANK=rank, WORLD_SIZE="2") for rank in "01"]
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert tree(tmp_path / "there") == tree(store)
    assert "all of the store is there" in said[0][0] and not said[1][0]


def test_where_it_cannot_be_sent_is_said_before_any_work(
    job: list[str], store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model is loaded")

    (tmp_path / "file").write_text("a file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo.png").touch()
    before, out = sorted(tmp_path.rglob("*")), str(tmp_path / "out")
    cases = [
        (["--send-to", "nowhere://x"], 1, "Protocol not known: nowhere"),
        (["--send-to", "http://127.0.0.1:9/x"], 1, "cannot be"),
        (["--send-to", str(tmp_path / "file" / "x")], 1, "NotADirectoryError"),
        (["--send-to", url_of(tmp_path / "full")], 1, "holds photo.png, which is no store"),
        (["--send-to", f"{out}/x"], 1, "lie in each other"),
        (["--no-keep-local"], 2, "kept nowhere"),
    ]
    with monkeypatch.context() as patched:
        patched.setattr(HookManager, "load", load)
        for dry in ([], ["--dry-run"]):
            for words, code, message in cases:
                assert main([*job, "--out", out, *words, *dry]) == code, words
                assert message in " ".join(capfd.readouterr().err.replace("│", " ").split()), words
    assert main([*job, "--out", out, "--send-to", url_of(tmp_path / "new"), "--dry-run"]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    # Another store there is known as soon as the model and the text are.
    assert main(["store", "send", str(store), url_of(tmp_path / "there")]) == 0
    assert main([*job, "--out", out, "--send-to", url_of(tmp_path / "there"), "--text.ctx", "12"]) == 1
    assert "another store" in capfd.readouterr().err and not Path(out).exists()


@pytest.mark.parametrize("keep", [True, False])
def test_sending_that_fails_is_said_at_once_and_loses_nothing(
    job: list[str],
    store: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    keep: bool,
) -> None:
    out, there, plain = str(tmp_path / "out"), tmp_path / "there", LocalFileSystem.put_file

    def put(self: Any, here: str, to: str, **kwargs: Any) -> None:
        if "000001" in to:
            raise ConnectionResetError("the network is gone")
        plain(self, here, to, **kwargs)

    words = [*job, "--out", out, "--send-to", url_of(there), *([] if keep else ["--no-keep-local"])]
    with monkeypatch.context() as patched:
        patched.setattr(LocalFileSystem, "put_file", put)
        assert main(words) == 1
    told = capfd.readouterr().err
    assert "ConnectionResetError the network is gone" in told and "interp capture --resume" in told
    assert sorted(p.name for p in (there / "shards").glob("*/shard.json")) == ["shard.json"]
    if keep:
        assert tree(Path(out)) == tree(store)
        assert main(["store", "send", out, url_of(there)]) == 0
    else:
        assert main(["capture", "--resume", "--out", out]) == 0
    assert tree(there) == tree(store)


def test_a_store_is_sent_looked_at_and_verified_at_a_url(
    store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "there"
    url = url_of(there)
    assert main(["store", "send", str(store), url, "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert (said["status"], said["shards"], said["url"]) == ("complete", 6, url) and tree(there) == tree(store)
    assert main(["store", "info", str(store), "--json"]) == 0
    here = json.loads(capfd.readouterr().out)
    assert main(["store", "info", url, "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == {**here, "store": url}
    assert main(["store", "verify", url]) == 0
    told = capfd.readouterr()
    assert "6 shards, every byte as it was written" in told.out and "one file at a time" in told.err
    path = there / "shards" / "000002" / "values.blocks.1.hook_resid_post.bfloat16"
    held = bytearray(path.read_bytes())
    held[100] ^= 4
    path.write_bytes(held)
    (there / "shards" / "000004" / "ids.int32").unlink()
    assert main(["store", "verify", url]) == 1
    told = capfd.readouterr()
    assert f"{path}: {len(held)} bytes, checksum" in told.out and "000004/ids.int32 is missing" in told.out
    for number in (2, 4):
        (there / "shards" / f"00000{number}" / "shard.json").unlink()
    assert main(["store", "verify", url]) == 1
    assert "shard 000002 is missing" in capfd.readouterr().out
    assert main(["store", "send", str(store), url]) == 0
    assert main(["store", "verify", url]) == 0 and tree(there) == tree(store)
    capfd.readouterr()
    for words in (["send", str(store)], ["info", str(store), url], ["repair", url], ["send", url, url]):
        assert main(["store", *words]) == 2
    for words in (["info", url_of(tmp_path)], ["send", str(tmp_path), f"{url}-new"], ["verify", "nowhere://x"]):
        assert main(["store", *words]) == 1
    assert not (tmp_path / "there-new").exists()


def test_a_dictionary_trains_from_a_url_to_the_same_bytes_and_resumes_to_them(
    job: list[str], store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    url = url_of(tmp_path / "there")
    assert main(["store", "send", str(store), url]) == 0
    settings = {"dictionary.d-sae": 48, "dictionary.k": 4, "train.tokens": 3000, "train.batch-size": 100}
    settings |= {"train.buffer-tokens": 400, "train.checkpoint-every": 7, "text.ctx": 16, "evaluation.tokens": 300}
    line = ["train", "--model", job[2], "--site", SITES[0], "--data", job[4]]
    line += [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    assert main([*line, "--store", str(store), "--out", str(tmp_path / "near")]) == 0
    code = (
        "import os, signal, sys, interp.train.trainer as t\n"
        "plain = t.DictionaryFit.step\n"
        "def step(self, batch):\n"
        "    plain(self, batch)\n"
        "    if self.steps == 18: os.kill(os.getpid(), signal.SIGKILL)\n"
        "t.DictionaryFit.step = step\n"
        "from interp.cli.main import main\n"
        f"sys.exit(main({[*line, '--store', url, '--out', str(tmp_path / 'far')]!r}))"
    )
    process = run(code)
    _, told = process.communicate()
    assert process.returncode == -signal.SIGKILL, told
    assert list((tmp_path / "far" / "store-cache" / "shards").iterdir())
    assert main(["train", "--resume", "--out", str(tmp_path / "far")]) == 0
    for name in ("sae_weights.safetensors", "metrics.jsonl", "evaluation.json"):
        assert (tmp_path / "far" / name).read_bytes() == (tmp_path / "near" / name).read_bytes()
    assert not (tmp_path / "far" / "store-cache").exists()
    # A cache of one's own stays; two shards at a time are enough.
    largest = max(sum(p.stat().st_size for p in place.iterdir()) for place in (store / "shards").iterdir())
    words = ["--store-cache", str(tmp_path / "cache"), "--store-cache-bytes", str(2 * largest)]
    assert main([*line, *words, "--store", url, "--out", str(tmp_path / "small")]) == 0
    name = "sae_weights.safetensors"
    assert (tmp_path / "small" / name).read_bytes() == (tmp_path / "near" / name).read_bytes()
    assert list((tmp_path / "cache" / "shards").iterdir())


def test_a_store_at_a_url_that_does_not_do_is_refused_untouched(
    job: list[str], store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    url = url_of(tmp_path / "there")
    assert main(["store", "send", str(store), url]) == 0
    line = ["train", "--data", job[4], "--out", str(tmp_path / "run"), "--text.ctx", "16", "--model", job[2]]
    for words, message in (
        (["--store", url, "--site", "0.resid_post"], "not 0.resid_post"),
        (["--store", url, "--site", SITES[0], "--text.hold-out-every", "7"], "held out"),
        (["--store", f"{url}-new", "--site", SITES[0]], "holds no store of activations"),
        (["--store", "nowhere://x", "--site", SITES[0], "--dry-run"], "Protocol not known: nowhere"),
    ):
        assert main([*line, *words]) == 1
        assert message in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
    # A kill before the run had begun leaves the cache alone: no run stands in the way of another.
    (tmp_path / "run" / "store-cache").mkdir(parents=True)
    assert main([*line, "--store", url, "--site", SITES[0], "--dry-run"]) == 0
    (tmp_path / "there" / "complete.json").unlink()
    assert main([*line, "--store", url, "--site", SITES[0]]) == 1
    assert "is not complete; `interp store send FOLDER" in capfd.readouterr().err
