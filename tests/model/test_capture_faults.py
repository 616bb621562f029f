"""Captures that die, stop or meet a full disk, and folders that are damaged or somebody else's."""

import errno
import io
import itertools
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AddedToken

import tests.source as repo
from interp.core.errors import ArtifactError, ConfigError, InterpError
from interp.core.manager import HookManager
from interp.data.codec import codec_named
from interp.data.documents import Documents
from interp.data.shard import Shard, ShardWriter
from interp.data.store import ActivationStore
from interp.data.stored import StoredActivations
from interp.data.storefolder import Claim, StoreFolder
from tests.families import make, manager, word_tokenizer
from tests.store_faults import (
    KILLED_TEXTS,
    KILLED_UNIT,
    SITES,
    drafts,
    nothing_left,
    random_texts,
    source,
    take,
    tree,
    within,
)

TEXTS = random_texts(KILLED_TEXTS)
UNITS = KILLED_TEXTS // KILLED_UNIT
SHARD_NAMES = [f"{number:06d}" for number in range(UNITS)]


def run(folder: Path, **options: Any) -> Any:
    """The capture of the tests below: twelve units."""
    with within(8):
        return take(folder, options.pop("tokens", source(TEXTS)), **{"unit_documents": KILLED_UNIT, **options})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "store"
    assert run(folder).status == "complete"
    assert sorted(path.name for path in (folder / "shards").iterdir()) == SHARD_NAMES
    return folder


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A store that was stopped before its fifth unit or so."""
    assert run(tmp_path / "begun", should_stop=after(20)).status == "stopped"
    assert 1 <= len(shards(tmp_path / "begun")) < UNITS
    return tmp_path / "begun"


def after(asked: int) -> Callable[[], bool]:
    answers = iter([False] * asked)
    return lambda: next(answers, True)


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "shards").glob("[0-9]*"))


def is_part_of(folder: Path, whole: Path) -> bool:
    """Whether each shard of a folder is the whole one's, to the byte."""
    mine, all_of = tree(folder / "shards"), tree(whole / "shards")
    return all(all_of.get(name) == digest for name, digest in mine.items())


# -- stopped, killed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [0, 1, 3, 7, 20, 33])
def test_a_capture_that_is_asked_to_stop_goes_on_to_the_same_bytes(asked: int, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    with nothing_left(out):
        stopped = run(out, should_stop=after(asked))
    assert stopped.status == "stopped" and not (out / "complete.json").exists()
    there = set(shards(out))
    assert is_part_of(out, whole) and len(there) < UNITS
    with nothing_left(out):
        rest = run(out, resume=True)
    assert rest.status == "complete" and tree(out) == tree(whole)
    # Nothing was made twice.
    assert rest.rows == sum(Shard(whole / "shards" / name, {}, "float32").rows for name in set(SHARD_NAMES) - there)


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_captures_leave_what_another_goes_on_from_to_the_same_bytes(
    kills: int, whole: Path, tmp_path: Path
) -> None:
    code = f"import pathlib, tests.store_faults as t\nt.kill_loop(pathlib.Path({str(tmp_path)!r}), {kills})"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repo.REPO)}
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=repo.REPO, env=environment, capture_output=True, timeout=600
    )
    assert process.returncode == 0, process.stderr.decode()[-3000:]
    killed, stores = map(int, (tmp_path / "done").read_text().split())
    assert killed >= kills and stores >= kills // 4
    for number in range(stores):
        out = tmp_path / f"store-{number}"
        assert tree(out) == tree(whole) and not drafts(out), out.name
        assert [path.name for path in (out / "locks").iterdir()] == ["store"]


def test_drafts_of_dead_writers_are_cleaned_and_other_files_are_not(begun: Path, whole: Path) -> None:
    for name in ("shards/.000000.dead.tmp", f"shards/.{SHARD_NAMES[-1]}.dead.tmp", "shards/.000099.dead.tmp"):
        (begun / name).mkdir()
        (begun / name / "ids.int32").write_bytes(b"1234")
    for name in (".manifest.json.dead.tmp", ".complete.json.dead.tmp", ".end.json.dead.tmp"):
        (begun / name).write_text("{")
    (begun / "locks" / "000003").write_text("")
    (begun / ".mine.tmp").write_text("my notes")
    (begun / "notes.txt").write_text("my notes")
    assert run(begun, resume=True).status == "complete"
    assert drafts(begun) == [".mine.tmp"]
    assert set(tree(begun)) - set(tree(whole)) == {".mine.tmp", "notes.txt"}
    assert set(tree(whole).items()) <= set(tree(begun).items())


def test_the_text_may_be_read_by_another_hand_that_finds_its_end_late(whole: Path, begun: Path) -> None:
    # A process that had taken a unit far behind the end has said that the text ends before it.
    (begun / "end.json").write_text(f'{{"units": {UNITS + 5}}}')
    assert run(begun, resume=True).status == "complete" and tree(begun) == tree(whole)


# -- a full disk ------------------------------------------------------------------------------------------------


def size_of(shard: Path) -> int:
    """Bytes of a shard's raw files."""
    return sum(path.stat().st_size for path in shard.iterdir() if path.name != "shard.json")


class FullDisk(io.FileIO):
    """A file of a disk that has so many bytes left."""

    left = 0

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if size > FullDisk.left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        FullDisk.left -= size
        written: int = super().write(data)
        return written


@pytest.mark.parametrize("left", [0, 700, 15_000, 23_000, 60_000, 100_000])
def test_a_full_disk_is_named_and_whole_shards_stay(
    left: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, plain = tmp_path / "store", Path.open

    def opened(self: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        if mode == "wb" and out in self.parents:
            # As the system's own buffered files, which try once more when they are closed.
            return io.BufferedWriter(FullDisk(self, "w"))
        return plain(self, mode, *args, **options)

    monkeypatch.setattr(FullDisk, "left", left)
    with monkeypatch.context() as patch, nothing_left(out), pytest.raises(ArtifactError) as err:
        patch.setattr(Path, "open", opened)
        run(out)
    assert re.search(r"No space left on device; make room.*--resume", str(err.value))
    sizes = [size_of(whole / "shards" / name) for name in SHARD_NAMES]
    fit = sum(total <= left for total in itertools.accumulate(sizes))
    assert is_part_of(out, whole) and shards(out) == SHARD_NAMES[:fit]
    assert err.value.__cause__ is not None
    # The error is still held, and with it what the call had: the same process can go on all the same.
    assert run(out, resume=True).status == "complete" and tree(out) == tree(whole)


def test_a_disk_that_the_kernel_says_is_full_is_named_too(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, plain, appended = tmp_path / "store", ShardWriter.append, list[int]()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def append(self: ShardWriter, *args: Any) -> None:
        appended.append(1)
        if len(appended) == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
        plain(self, *args)

    try:
        with monkeypatch.context() as patch, nothing_left(out), pytest.raises(ArtifactError, match="make room") as err:
            patch.setattr(ShardWriter, "append", append)
            run(out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert shards(out) and is_part_of(out, whole)
    assert run(out, resume=True).status == "complete" and tree(out) == tree(whole)
    del err


@pytest.mark.parametrize("call", ["mkdir", "fsync", "rename", "replace"])
@pytest.mark.parametrize("nth", [1, 5, 20])
def test_whatever_change_of_the_folder_fails_it_is_the_librarys_error(
    call: str, nth: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ENOSPC comes from more calls than write: of folders, and of what the disk had promised."""
    out, plain, calls = tmp_path / "store", getattr(os, call), list[int]()

    def failing(*args: Any, **options: Any) -> Any:
        if call == "mkdir" and Path(args[0]).is_dir():
            return plain(*args, **options)
        calls.append(1)
        if len(calls) >= nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        failed = ""
        try:
            run(out)
        except ArtifactError as err:
            failed = str(err)
    assert "make room" in failed if len(calls) >= nth else not failed
    assert is_part_of(out, whole)
    assert run(out, resume=True).status == "complete" and tree(out) == tree(whole)
    assert not drafts(out)


@pytest.mark.parametrize("fault", [MemoryError("no"), ValueError("no"), TypeError("no"), RuntimeError("no")])
def test_what_goes_wrong_where_rows_are_written_is_raised_and_nothing_hangs(
    fault: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise fault

    with monkeypatch.context() as patch, nothing_left(tmp_path), pytest.raises(type(fault)), within(3):
        patch.setattr(ShardWriter, "append", fail)
        take(tmp_path / "store", source(TEXTS), unit_documents=KILLED_UNIT)
    assert run(tmp_path / "store", resume=True).status == "complete"


def test_what_goes_wrong_in_the_text_or_the_model_leaves_nothing_running(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, plain, runs = tmp_path / "store", HookManager.run, list[int]()

    class Torn(list[str]):
        torn = True

        def __getitem__(self, index: Any) -> Any:
            if self.torn and index == 23:
                raise ValueError("torn")
            return super().__getitem__(index)

    torn = Torn(TEXTS)
    with nothing_left(out), pytest.raises(ValueError, match="torn") as first:
        run(out, tokens=source(torn))

    def fail(self: HookManager, *args: Any, **options: Any) -> Any:
        runs.append(1)
        if len(runs) == 7:
            raise KeyboardInterrupt
        return plain(self, *args, **options)

    with monkeypatch.context() as patch, nothing_left(out), pytest.raises(KeyboardInterrupt) as second:
        patch.setattr(HookManager, "run", fail)
        run(out, resume=True)
    assert is_part_of(out, whole)
    assert run(out, resume=True).status == "complete" and tree(out) == tree(whole)
    del first, second


def test_a_damaged_record_under_resume_is_named_and_leaves_nothing_running(begun: Path) -> None:
    path = begun / "shards" / shards(begun)[0] / "shard.json"
    path.write_text("{")
    with nothing_left(begun), pytest.raises(ArtifactError, match=r"shard\.json cannot be read"):
        run(begun, resume=True)


# -- damage -----------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copied"))


def test_a_flipped_bit_is_found_in_its_file(copied: Path) -> None:
    path = copied / "shards" / "000004" / "values.blocks.1.attn.hook_z.float32"
    raw = bytearray(path.read_bytes())
    raw[1234] ^= 4
    path.write_bytes(raw)
    # Reading does not read everything first; a check does.
    store = ActivationStore.open(copied, batch_size=8, buffer_tokens=64)
    assert [[str(path) in fault for fault in shard.check()] for shard in store.shards] == [
        [True] if number == 4 else [] for number in range(UNITS)
    ]


def test_a_truncated_and_a_missing_shard_are_refused_by_name_and_made_again(copied: Path, whole: Path) -> None:
    path = copied / "shards" / "000004" / "ids.int32"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(
        ArtifactError, match=r"000004/ids\.int32 has \d+ bytes, its record says \d+; `interp store repair"
    ):
        ActivationStore.open(copied)
    shutil.rmtree(copied / "shards" / "000004")
    with pytest.raises(ArtifactError, match=rf"lacks shard 000004 of {UNITS}; `interp capture --resume`"):
        ActivationStore.open(copied)
    again = run(copied, resume=True)
    assert again.status == "complete" and tree(copied) == tree(whole)
    assert again.rows == Shard(whole / "shards" / "000004", {}, "float32").rows


@pytest.mark.parametrize("text", ["", "[]", "5", "{}", '{"units": "x"}', '{"units": null}'])
@pytest.mark.parametrize("name", ["complete.json", "end.json", "manifest.json"])
def test_a_damaged_file_of_the_store_is_refused_by_name(name: str, text: str, copied: Path) -> None:
    (copied / name).write_text(text)
    if name != "end.json":
        with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
            ActivationStore.open(copied)
    with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
        run(copied, resume=True)


def test_what_is_no_store_is_refused_when_it_is_opened(begun: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such folder"):
        ActivationStore.open(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="no store of activations"):
        ActivationStore.open(tmp_path)
    shutil.rmtree(begun / "shards")
    (begun / "shards").mkdir()
    with pytest.raises(ArtifactError, match="no whole shard yet"):
        ActivationStore.open(begun)
    text = (begun / "manifest.json").read_text()
    (begun / "manifest.json").write_text(text.replace('"format": 1', '"format": 2'))
    with pytest.raises(ArtifactError, match="has format 2, this interp reads 1; update"):
        ActivationStore.open(begun)


# -- other settings ---------------------------------------------------------------------------------------------


def other_tokenizer(**special: Any) -> Any:
    tokenizer = word_tokenizer()
    tokenizer.add_tokens([AddedToken("<new>")]) if not special else tokenizer.add_special_tokens(special)
    return tokenizer


def with_tokenizer(tokenizer: Any) -> Any:
    from interp.data.tokens import TokenSource

    return TokenSource(TEXTS, tokenizer, ctx=16, rows=4, bos=True)


JOINED = [TEXTS[0] + TEXTS[1][:2], TEXTS[1][2:], *TEXTS[2:]]

CHANGES: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "weights": (lambda: {"hm": HookManager.load(make("Llama", seed=4), word_tokenizer())}, "weights was"),
    "model": (lambda: {"hm": manager("GPT2")}, "config_hash was"),
    "model_dtype": (
        lambda: {"hm": HookManager.load(make("Llama").to(torch.float64), word_tokenizer())},
        "model_dtype was 'float32', now 'float64'",
    ),
    "dtype": (lambda: {"dtype": "bfloat16"}, "dtype was 'float32', now 'bfloat16'"),
    "gradient": (lambda: {"gradient": "loss"}, "gradient was None, now 'loss'"),
    "sites": (lambda: {"sites": SITES[:1]}, "sites was"),
    "unit": (lambda: {"unit_documents": 6}, r"text\.unit_documents was 5, now 6"),
    "ctx": (lambda: {"tokens": source(TEXTS, ctx=17)}, r"text\.ctx was 16, now 17"),
    "rows": (lambda: {"tokens": source(TEXTS, rows=5)}, r"text\.rows was 4, now 5"),
    "packing": (lambda: {"tokens": source(TEXTS, packing="one_doc")}, r"text\.packing was 'concat', now 'one_doc'"),
    "bos": (lambda: {"tokens": source(TEXTS, bos=False)}, r"text\.bos was True, now False"),
    "part": (lambda: {"tokens": source(Documents(TEXTS, part="train"))}, r"text\.part was 'all', now 'train'"),
    "rank": (lambda: {"tokens": source(Documents(TEXTS, rank=1, world_size=2))}, r"text\."),
    "text": (lambda: {"tokens": source([*TEXTS[:-1], "w1"])}, r"text\.fingerprint was"),
    "middle of the text": (lambda: {"tokens": source([*TEXTS[:30], "w1", *TEXTS[31:]])}, r"text\.fingerprint was"),
    "shorter text": (lambda: {"tokens": source(TEXTS[:-1])}, r"text\.fingerprint was"),
    "where documents end": (lambda: {"tokens": source(JOINED)}, r"text\.fingerprint was"),
    "tokenizer": (lambda: {"tokens": with_tokenizer(other_tokenizer())}, r"text\.tokenizer was"),
    "special token": (
        lambda: {"tokens": with_tokenizer(other_tokenizer(eos_token="w5"))},
        r"text\.tokenizer was",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_resume_with_another_model_text_or_setting_is_refused_and_changes_nothing(what: str, begun: Path) -> None:
    options, message = CHANGES[what]
    before = tree(begun, locks=True)
    with pytest.raises(ConfigError, match=rf"begun with other settings: .*{message}"):
        run(begun, resume=True, **options())
    assert tree(begun, locks=True) == before


def test_the_field_that_holds_the_text_is_part_of_what_the_text_is(tmp_path: Path) -> None:
    rows = [{"text": a, "summary": b} for a, b in zip(TEXTS, TEXTS[::-1], strict=True)]
    run(tmp_path / "store", tokens=source(Documents(rows)), should_stop=after(20))
    with pytest.raises(ConfigError, match="other settings"):
        run(tmp_path / "store", tokens=source(Documents(rows, field="summary")), resume=True)


def test_what_decides_no_byte_may_be_otherwise(begun: Path, whole: Path) -> None:
    manifest = begun / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"writer": "', '"writer": "0.0.'))
    text = manifest.read_text()
    assert run(begun, resume=True, unit_documents=None, unit_bytes=5).status == "complete"
    # Neither is rewritten.
    assert manifest.read_text() == text and tree(begun / "shards") == tree(whole / "shards")


def test_a_store_is_never_written_over(copied: Path, begun: Path) -> None:
    for folder in (copied, begun):
        before = tree(folder, locks=True)
        with pytest.raises(ArtifactError, match=r"already holds .*, or resume to go on with the store"):
            run(folder)
        assert tree(folder, locks=True) == before


FOREIGN = [
    {"notes.txt": "mine"},
    {"manifest.json": '{"name": "my web page"}', "index.html": "mine"},
    {"manifest.json": "", "notes.txt": "mine"},
    {"locks/door": "mine", "notes.txt": "mine"},
    {"shards/000000/notes.txt": "mine"},
]


@pytest.mark.parametrize("files", FOREIGN)
@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_of_somebody_else_is_refused_and_left_alone(
    files: dict[str, str], resume: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    before = sorted(folder.rglob("*"))
    with nothing_left(folder), pytest.raises(ArtifactError):
        run(folder, resume=resume)
    assert sorted(folder.rglob("*")) == before
    assert {name: (folder / name).read_text() for name in files} == files


def test_a_file_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("mine")
    for resume in (False, True):
        with pytest.raises(ArtifactError, match="is a file"):
            run(tmp_path / "store", resume=resume)
    assert (tmp_path / "store").read_text() == "mine"


# -- several at once --------------------------------------------------------------------------------------------


def claimed(folder: Path, number: int) -> Claim:
    """A unit that another process is at; that of the one that held it before is let go."""
    claim = StoreFolder(folder)._claim(number)
    assert claim is not None
    return claim


def later(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def test_a_unit_that_another_is_at_is_left_to_it_and_waited_for(begun: Path, whole: Path) -> None:
    taken = claimed(begun, UNITS - 2)
    assert StoreFolder(begun)._claim(UNITS - 2) is None
    with nothing_left(begun / "shards"):
        first = run(begun, resume=True, should_stop=later(1.5))
    assert first.status != "complete" and not (begun / "complete.json").exists()
    assert set(SHARD_NAMES) - set(shards(begun)) == {SHARD_NAMES[-2]}
    taken.release()
    assert run(begun, resume=True).status == "complete" and tree(begun) == tree(whole)


def test_a_unit_whose_writer_dies_meanwhile_is_made_by_those_who_are_left(
    begun: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lowest = len(shards(begun))
    taken, plain = claimed(begun, lowest), ShardWriter.close

    def close(self: ShardWriter, record: Any) -> None:
        plain(self, record)
        if self.place.name == SHARD_NAMES[-2]:
            taken.release()

    monkeypatch.setattr(ShardWriter, "close", close)
    assert run(begun, resume=True).status == "complete" and tree(begun) == tree(whole)


def test_what_fails_while_others_are_waited_for_is_raised(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C, or a full disk, while the text's thread waits for a unit that another process is at."""
    taken = claimed(begun, UNITS - 2)

    def interrupt(self: ShardWriter, record: Any) -> None:
        time.sleep(0.5)  # the text's thread is at the end by then
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(ArtifactError, match="make room"):
        patch.setattr(ShardWriter, "close", interrupt)
        run(begun, resume=True)
    taken.release()


def test_whoever_finishes_leaves_the_drafts_of_those_who_are_at_work_alone(tmp_path: Path) -> None:
    out, tokens = tmp_path / "store", source(TEXTS)
    take(out, tokens, unit_documents=KILLED_UNIT, max_tokens=60)
    # Another process has run ahead, not knowing yet that the limit is reached before its unit.
    taken = claimed(out, 5)
    writer = ShardWriter(StoreFolder(out).place(5), {("values", "a"): codec_named("float32")})
    take(out, tokens, unit_documents=KILLED_UNIT, max_tokens=120, resume=True)
    assert writer.draft.is_dir(), "the draft of a live writer was removed"
    writer.close({})
    taken.release()


def test_a_limit_holds_while_another_is_at_an_early_unit(tmp_path: Path) -> None:
    out, tokens = tmp_path / "store", source(TEXTS)
    take(out, tokens, unit_documents=KILLED_UNIT, max_tokens=10, should_stop=lambda: True)
    taken = claimed(out, 0)
    with within(8):
        take(out, tokens, unit_documents=KILLED_UNIT, max_tokens=100, resume=True, should_stop=later(1.5))
    taken.release()
    counted = [Shard(out / "shards" / name, {}, "float32").tokens for name in shards(out)]
    # Whatever the first unit gives, those after it were enough.
    assert sum(counted[:-1]) < 100, f"{len(counted)} units with {sum(counted)} tokens for a limit of 100"


def test_a_shard_beyond_the_limit_that_was_removed_in_part_does_not_stop_a_resume(tmp_path: Path) -> None:
    out, tokens = tmp_path / "store", source(TEXTS)
    take(out, tokens, unit_documents=KILLED_UNIT, max_tokens=100)
    before = tree(out)
    # As a process leaves it that is killed while it removes what is too much.
    shutil.copytree(out / "shards" / "000000", out / "shards" / "000009")
    (out / "shards" / "000009" / "shard.json").unlink()
    (out / "complete.json").unlink()
    assert take(out, tokens, unit_documents=KILLED_UNIT, max_tokens=100, resume=True).status == "complete"
    assert tree(out) == before


def test_two_captures_in_one_process_do_not_wait_for_each_other(whole: Path, tmp_path: Path) -> None:
    import threading

    out, done = tmp_path / "store", list[Any]()

    def work() -> None:
        try:
            take(out, source(TEXTS), unit_documents=KILLED_UNIT, resume=True)
            done.append("done")
        except InterpError as err:
            done.append(err)

    threads = [threading.Thread(target=work) for _ in range(2)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert done == ["done", "done"] and time.monotonic() - began < 30
    assert tree(out) == tree(whole) and isinstance(ActivationStore.open(out), StoredActivations)
