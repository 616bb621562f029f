"""Stores on other file systems: what is sent, in which order, what is fetched, kept and refused."""

import fcntl
import functools
import itertools
import json
import threading
import time
import uuid
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

import interp.data.remote as remote
import interp.data.remotefolder as remotefolder
from interp.core.errors import ArtifactError, ConfigError, InterpError
from interp.data.codec import codec_named
from interp.data.manifest import Manifest, SiteLayout, TextLayout
from interp.data.remote import RemoteStore, Uploader, check_destination, open_remote, upload_store
from interp.data.shard import ShardWriter
from interp.data.stored import StoredActivations
from interp.data.storefolder import StoreFolder
from interp.data.textloss import LossName

SITES = {"blocks.0.hook_resid_post": (6,), "blocks.1.attn.hook_z": (2, 3)}
SMALL: dict[str, Any] = {"batch_size": 16, "buffer_tokens": 32}


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(remotefolder, "_WAIT", 0.0)
    monkeypatch.setattr(remote, "_LOOK", 0.01)
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture
def url() -> str:
    return f"memory://bucket/{uuid.uuid4().hex}"


@pytest.fixture
def quiet() -> Iterator[None]:
    """For tests whose cache is too small on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "batches of .* are drawn", UserWarning)
        yield


def manifest(dtype: str = "float32", gradient: LossName | None = None, model: str = "tiny") -> Manifest:
    text = TextLayout(
        source="text",
        fingerprint="0" * 16,
        part="all",
        hold_out_every=20,
        ctx=8,
        rows=4,
        packing="concat",
        bos=True,
        tokenizer="1" * 16,
        unit_documents=4,
    )
    return Manifest(
        writer="0.1.0",
        model=model,
        config_hash=model,
        weights="2" * 16,
        model_dtype="float32",
        sites=tuple(SiteLayout(name=name, shape=shape) for name, shape in SITES.items()),
        dtype=dtype,
        gradient=gradient,
        text=text,
    )


def add_shard(folder: Path, number: int, what: Manifest, rows: int | None = None) -> None:
    """One unit of random rows, the first of every eight special; sizes differ from shard to shard."""
    generator = torch.Generator().manual_seed(number)
    rows = 40 + 8 * (number % 3) if rows is None else rows
    codec = codec_named(what.dtype)
    writer = ShardWriter(
        StoreFolder(folder).place(number), {(p, s.name): codec for p in what.parts for s in what.sites}
    )
    special = torch.arange(rows) % 8 == 0
    columns = {
        "ids": torch.arange(rows) + 1000 * number,
        "document": torch.arange(rows) // 16 + 4 * number,
        "position": torch.where(special, -1, torch.arange(rows)),
        "special": special,
    }
    values = {key: torch.randn(rows, 6, generator=generator) for key in writer.codecs}
    writer.append(columns, {key: x if codec.scale else x.to(codec.dtype) for key, x in values.items()})
    writer.close({"first_document": 4 * number, "end_document": 4 * number + 4})


def begin(folder: Path, what: Manifest) -> StoreFolder:
    store = StoreFolder(folder)
    store.begin(what, resume=False, free_unit=False)
    return store


def made(folder: Path, units: int = 6, what: Manifest | None = None, *, complete: bool = True) -> Path:
    what = what or manifest()
    store = begin(folder, what)
    for number in range(units):
        add_shard(folder, number, what)
    if complete:
        store.ends_at(units)
        assert store.finish(units)
    return folder


def sizes(folder: Path) -> list[int]:
    """Bytes of each shard's files, by their records."""
    records = [json.loads((p / "shard.json").read_text()) for p in sorted((folder / "shards").glob("[0-9]*"))]
    return [sum(held["bytes"] for held in record["files"].values()) for record in records]


def on_disk(cache: Path) -> int:
    """Bytes of shards in a cache, drafts included, at a moment when no reader is changing it."""
    with (cache / "lock").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        return sum(p.stat().st_size for p in (cache / "shards").rglob("*") if p.is_file() and p.name != "shard.json")


def tree(root: str) -> dict[str, bytes]:
    fs, path = fsspec.core.url_to_fs(root)
    return {str(name).removeprefix(path): fs.cat_file(name) for name in fs.find(path)}


def sent(folder: Path) -> dict[str, bytes]:
    """What of a local store belongs at the other end."""
    mine = tree(str(folder))
    return {name: data for name, data in mine.items() if not name.startswith("/locks") and name != "/end.json"}


def assert_equal_batches(one: StoredActivations, other: StoredActivations, cache: Path, limit: int) -> int:
    count = 0
    for a, b in zip(one.batches_by_site(), other.batches_by_site(), strict=True):
        for name in a:
            for field in ("x", "grad", "tokens", "positions"):
                mine, theirs = getattr(a[name], field), getattr(b[name], field)
                assert (mine is None) == (theirs is None)
                assert mine is None or torch.equal(mine, theirs)
        assert on_disk(cache) <= limit
        count += 1
    return count


# -- reading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [("float32", "memory"), ("bfloat16", "path"), ("int8_row", "memory"), ("int8_channel", "path")],
)
@pytest.mark.usefixtures("quiet")
def test_batches_are_those_of_the_local_store_to_the_bit(tmp_path: Path, url: str, dtype: str, kind: str) -> None:
    folder = made(tmp_path / "store", what=manifest(dtype, gradient="loss" if dtype == "float32" else None))
    url = url if kind == "memory" else str(tmp_path / "there")
    assert upload_store(folder, url, progress=False).status == "complete"
    limit = 2 * max(sizes(folder))
    local = StoredActivations(folder, **SMALL, seed=3)
    far = open_remote(url, tmp_path / "cache", cache_bytes=limit, **SMALL, seed=3)
    assert isinstance(far, RemoteStore) and far.complete and far.n_rows == local.n_rows
    assert far.fetched_bytes == 0 and on_disk(tmp_path / "cache") == 0  # records alone
    assert assert_equal_batches(local, far, tmp_path / "cache", limit) == -(-local.n_tokens // 16)
    assert far.fetched_bytes > limit  # shards have gone and come
    index = torch.randperm(local.n_rows)
    assert torch.equal(local.rows(index).values[1], far.rows(index).values[1])
    assert torch.equal(local.column("document"), far.column("document"))
    assert torch.equal(local.document(9).values["blocks.1.attn.hook_z"], far.document(9).values["blocks.1.attn.hook_z"])
    for a, b in zip(local.sequential(), far.sequential(), strict=True):
        assert torch.equal(a.values[0], b.values[0])


def test_a_stream_goes_on_from_a_state_of_the_local_store(tmp_path: Path, url: str) -> None:
    folder = made(tmp_path / "store")
    upload_store(folder, url, progress=False)
    local, far = StoredActivations(folder, **SMALL), open_remote(url, tmp_path / "cache", **SMALL)
    x = "0.resid_post"
    stream = local.batches(x=x)
    list(itertools.islice(stream, 5))
    rest = list(far.batches(x=x, state=stream.state()))
    for a, b in zip(stream, rest, strict=True):
        assert torch.equal(a.x, b.x)


def test_what_fits_is_fetched_once_also_by_another_reader(tmp_path: Path, url: str) -> None:
    folder = made(tmp_path / "store")
    upload_store(folder, url, progress=False)
    far = open_remote(url, tmp_path / "cache", cache_bytes=sum(sizes(folder)), **SMALL)
    for _ in range(2):
        list(far.batches(x="0.resid_post"))
    assert far.fetched_bytes == sum(sizes(folder))
    again = open_remote(url, tmp_path / "cache", cache_bytes=sum(sizes(folder)), **SMALL)
    assert_equal_batches(StoredActivations(folder, **SMALL), again, tmp_path / "cache", sum(sizes(folder)))
    assert again.fetched_bytes == 0


def test_the_shard_used_longest_ago_goes_first(tmp_path: Path, url: str) -> None:
    folder = made(tmp_path / "store")
    upload_store(folder, url, progress=False)
    far = open_remote(url, tmp_path / "cache", cache_bytes=3 * max(sizes(folder)), **SMALL)
    starts = far.offsets.tolist()

    def read(number: int) -> None:
        far.rows(torch.tensor([starts[number] + 1]))

    def here() -> set[int]:
        return {int(p.name) for p in (tmp_path / "cache" / "shards").glob("[0-9]*")}

    for number in (0, 1, 2):
        read(number)
    assert here() == {0, 1, 2}
    read(0)
    read(3)
    assert here() == {0, 2, 3}
    # A batch that reads 2 and 4: 2 is the oldest, but wanted.
    far.rows(torch.tensor([starts[2], starts[4]]))
    assert here() == {2, 3, 4}


def test_views_outlive_their_shard_in_the_cache(tmp_path: Path, url: str) -> None:
    folder = made(tmp_path / "store")
    upload_store(folder, url, progress=False)
    far = open_remote(url, tmp_path / "cache", cache_bytes=max(sizes(folder)), batch_size=8, buffer_tokens=16)
    kept = list(far.sequential(counted=False))
    expected = StoredActivations(folder, batch_size=8, buffer_tokens=16).sequential(counted=False)
    for a, b in zip(expected, kept, strict=True):
        assert torch.equal(a.values[0], b.values[0]) and torch.equal(a.tokens, b.tokens)


def test_a_window_that_the_cache_cannot_hold_is_said_and_still_right(tmp_path: Path, url: str) -> None:
    folder = made(tmp_path / "store")
    upload_store(folder, url, progress=False)
    large: dict[str, Any] = {"batch_size": 32, "buffer_tokens": 131072}
    limit = 4 * max(sizes(folder))
    far = open_remote(url, tmp_path / "cache", cache_bytes=limit, **large)
    with pytest.warns(UserWarning, match=r"cache_bytes=[\d,]+ holds less"):
        count = assert_equal_batches(StoredActivations(folder, **large), far, tmp_path / "cache", limit)
    # Each batch reads all six shards; what cannot be held is fetched again, not everything.
    assert far.fetched_bytes < 0.7 * count * sum(sizes(folder))
    roomy = open_remote(url, tmp_path / "roomy", cache_bytes=sum(sizes(folder)), **large)
    list(roomy.batches(x="0.resid_post"))


@pytest.mark.usefixtures("quiet")
def test_readers_at_once_on_one_cache_do_not_disturb_each_other(tmp_path: Path, url: str) -> None:
    folder = made(tmp_path / "store")
    upload_store(folder, url, progress=False)
    expected = [b.x for b in StoredActivations(folder, **SMALL).batches(x="0.resid_post")]
    limit = 2 * max(sizes(folder))
    shared = open_remote(url, tmp_path / "cache", cache_bytes=limit, **SMALL)
    own = open_remote(url, tmp_path / "cache", cache_bytes=limit, **SMALL)
    wrong: list[BaseException] = []

    def read(store: RemoteStore) -> None:
        try:
            found = [b.x for _ in range(2) for b in store.batches(x="0.resid_post")]
            assert all(torch.equal(a, b) for a, b in zip(2 * expected, found, strict=True))
        except BaseException as err:  # noqa: BLE001 - raised below
            wrong.append(err)

    threads = [threading.Thread(target=read, args=(store,)) for store in (shared, shared, own)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong
    assert on_disk(tmp_path / "cache") <= limit


def test_shards_that_become_whole_are_taken_in_and_half_ones_are_not(tmp_path: Path, url: str) -> None:
    folder = made(tmp_path / "store", 2, complete=False)
    assert upload_store(folder, url, progress=False).status == "partial"
    far = open_remote(url, tmp_path / "cache", **SMALL)
    assert not far.complete and far.numbers == [0, 1] and far.refresh() == 0
    MemoryFileSystem().pipe_file(f"{url}/shards/000002/ids.int32", b"half")
    assert far.refresh() == 0
    add_shard(folder, 2, manifest())
    StoreFolder(folder).ends_at(3)
    StoreFolder(folder).finish(3)
    assert upload_store(folder, url, progress=False).status == "complete"
    assert far.refresh() == 1 and far.complete
    assert torch.equal(far.column("ids"), StoredActivations(folder, **SMALL).column("ids"))


def test_an_empty_shard_is_a_shard(tmp_path: Path, url: str) -> None:
    folder = made(tmp_path / "store", 1, complete=False)
    add_shard(folder, 1, manifest(), rows=0)
    add_shard(folder, 2, manifest())
    upload_store(folder, url, progress=False)
    far = open_remote(url, tmp_path / "cache", **SMALL)
    assert torch.equal(far.column("ids"), StoredActivations(folder, **SMALL).column("ids"))


# -- reading ahead ----------------------------------------------------------------------------------------------


class Watch:
    """Notes which shards are fetched, by which thread, and which windows streams have told of."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fetched: list[int] = []
        self.windows: list[tuple[list[int], list[int]]] = []
        self.threads: list[threading.Thread] = []
        self.before: Callable[[int], None] = lambda number: None
        plain, told, watch = MemoryFileSystem.get, RemoteStore._window, self

        def get(fs: Any, there: list[str], here: list[str]) -> None:
            number = int(there[0].split("/")[-2])
            watch.fetched.append(number)
            watch.threads.append(threading.current_thread())
            watch.before(number)
            plain(fs, there, here)

        def window(store: RemoteStore, now: list[int], following: list[int]) -> None:
            watch.windows.append((now, following))
            told(store, now, following)

        monkeypatch.setattr(MemoryFileSystem, "get", get)
        monkeypatch.setattr(RemoteStore, "_window", window)


def until(true: Callable[[], bool]) -> None:
    for _ in range(1000):
        if true():
            return
        threading.Event().wait(0.01)
    raise AssertionError("waited for too long")


def test_the_next_window_is_fetched_while_one_is_served(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A window is one shard. Fetching one ahead waits until the window before it is served, and serving it waits until
    # that has begun: so all of this ends only where the two go side by side, each time.
    folder = made(tmp_path / "store", 10)
    upload_store(folder, url, progress=False)
    limit = 6 * max(sizes(folder))  # a window reads some of those before it, too, as rows are left of them
    far, watch = open_remote(url, tmp_path / "cache", cache_bytes=limit, **SMALL), Watch(monkeypatch)
    began, served, together, plain = set[int](), set[int](), [], RemoteStore.gather

    def before(number: int) -> None:
        began.add(number)
        for now, following in watch.windows:
            if following == [number]:
                until(functools.partial(served.issuperset, now[:1]))
                together.append(number)

    def gather(store: RemoteStore, index: Any) -> Any:
        now, following = watch.windows[-1]
        served.add(now[0])
        until(lambda: set(following) <= began)
        assert all((tmp_path / "cache" / "shards" / f"{n:06d}").is_dir() for n in now)
        return plain(store, index)

    watch.before = before
    monkeypatch.setattr(RemoteStore, "gather", gather)
    assert_equal_batches(StoredActivations(folder, **SMALL), far, tmp_path / "cache", limit)
    order = [now[0] for now, _ in watch.windows]
    assert together == order[1:] and sorted(order) == [*range(10)]
    assert watch.fetched == order and far.fetched_bytes == sum(sizes(folder))  # none twice, as they are needed


@pytest.mark.parametrize("shards", [3, 7, 9])
@pytest.mark.usefixtures("quiet")
def test_what_is_read_ahead_takes_no_room_from_what_is_read(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    # Three shards a window: of the next one as much is fetched as the cache has room for.
    folder = made(tmp_path / "store", 9)
    upload_store(folder, url, progress=False)
    limit, watch = shards * max(sizes(folder)), Watch(monkeypatch)
    large: dict[str, Any] = {"batch_size": 16, "buffer_tokens": 3072, "seed": 1}
    far, plain = open_remote(url, tmp_path / "cache", cache_bytes=limit, **large), RemoteStore.gather

    def gather(store: RemoteStore, index: Any) -> Any:
        count = watch.threads.count(threading.current_thread())
        found = plain(store, index)
        if shards == 9:
            assert all((tmp_path / "cache" / "shards" / f"{n:06d}").is_dir() for n in watch.windows[-1][0])
            assert watch.threads.count(threading.current_thread()) == count  # all was here
        return found

    monkeypatch.setattr(RemoteStore, "gather", gather)
    assert_equal_batches(StoredActivations(folder, **large), far, tmp_path / "cache", limit)
    assert shards < 9 or sorted(watch.fetched) == [*range(9)]


def test_shards_of_no_window_go_first_then_those_of_the_next(tmp_path: Path, url: str) -> None:
    folder, cache = made(tmp_path / "store"), tmp_path / "cache"
    upload_store(folder, url, progress=False)
    far = open_remote(url, cache, cache_bytes=sum(sizes(folder)[:3]), **SMALL)
    starts, one, other = far.offsets.tolist(), threading.Event(), threading.Event()

    def here() -> set[int]:
        return {int(p.name) for p in (cache / "shards").glob("[0-9]*")}

    far.rows(torch.tensor([starts[5]]))
    list(far._cache.ahead(one, [0, 1], [2, 3]))
    assert here() == {0, 1, 2}  # 5 went, and nothing goes for 3
    far.rows(torch.tensor([starts[4]]))
    assert here() == {0, 1, 4}
    list(far._cache.ahead(other, [3], [0]))
    assert here() == {0, 1, 3}  # 4, used last, is the only one that nobody's window has
    del one
    list(far._cache.ahead(other, [2], [0]))
    assert here() == {0, 2, 3}  # of 1 and 3, which nobody has any more, the one used longest ago


def test_what_cannot_be_read_ahead_is_an_error_where_it_is_needed(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made(tmp_path / "store", 6)
    upload_store(folder, url, progress=False)
    expected = [batch.x for batch in StoredActivations(folder, **SMALL).batches(x="0.resid_post")]
    far, watch = open_remote(url, tmp_path / "cache", **SMALL), Watch(monkeypatch)

    def before(number: int) -> None:
        if len(watch.windows) >= 3 and number in watch.windows[2][1]:
            raise ConnectionResetError("the network is gone")

    watch.before, found = before, []
    with pytest.raises(ArtifactError, match=r"cannot be copied to .*: ConnectionResetError the network is gone"):
        for batch in far.batches(x="0.resid_post"):
            found.append(batch.x)
    rows = sum(far.shards[now[0]].tokens for now, _ in watch.windows[:3])
    assert len(found) == rows // 16 > 3
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=False))


def test_reading_ahead_ends_with_its_stream(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made(tmp_path / "store", 9)
    upload_store(folder, url, progress=False)
    before, go = set(threading.enumerate()), threading.Event()
    far, watch = open_remote(url, tmp_path / "cache", batch_size=16, buffer_tokens=3072), Watch(monkeypatch)
    watch.before = lambda number: None if number in watch.windows[0][0] else until(go.is_set)
    stream = far.batches(x="0.resid_post")
    next(stream)
    until(lambda: len(watch.fetched) == 4)
    del stream
    until(lambda: not far._cache._windows)
    go.set()
    until(lambda: set(threading.enumerate()) <= before)
    assert len(watch.fetched) == 4  # of the next three shards the one that was under way
    assert not list((tmp_path / "cache" / "shards").glob(".*"))


def test_readers_at_once_fetch_nothing_twice(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made(tmp_path / "store")
    upload_store(folder, url, progress=False)
    watch, plain = Watch(monkeypatch), StoredActivations(folder, **SMALL)
    watch.before = lambda number: time.sleep(0.02)
    stores = [open_remote(url, tmp_path / "cache", **SMALL) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(lambda store: [b.x for b in store.batches(x="0.resid_post")], stores):
            assert all(torch.equal(a.x, b) for a, b in zip(plain.batches(x="0.resid_post"), found, strict=True))
    assert sorted(watch.fetched) == [*range(6)]
    assert sum(store.fetched_bytes for store in stores) == sum(sizes(folder))


def test_what_a_dead_reader_was_fetching_is_removed_and_what_a_living_one_is_not(tmp_path: Path, url: str) -> None:
    folder, cache = made(tmp_path / "store"), tmp_path / "cache"
    upload_store(folder, url, progress=False)
    open_remote(url, cache, **SMALL)
    dead, living = (cache / "shards" / f".00000{n}.x.tmp" for n in (3, 4))
    for draft in (dead, living):
        draft.mkdir()
        (draft / "ids.int32").write_bytes(b"half")
    with (cache / "locks" / "000004").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        far = open_remote(url, cache, cache_bytes=sum(sizes(folder)[:5]), **SMALL)
        assert not dead.exists() and living.exists()
        # What it will take counts: four others have room beside it, and of five two go.
        starts = far.offsets.tolist()
        for number, left in ((0, 1), (1, 2), (2, 3), (3, 4), (5, 3)):
            far.rows(torch.tensor([starts[number]]))
            assert len(list((cache / "shards").glob("0*"))) == left
    far.rows(torch.tensor([starts[4]]))
    assert not living.exists()


# -- damage and malice ------------------------------------------------------------------------------------------


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize("file", ["ids.int32", "values.blocks.0.hook_resid_post.float32", "special.uint8"])
def test_one_flipped_bit_there_is_found_and_nothing_is_kept(tmp_path: Path, url: str, file: str) -> None:
    folder = made(tmp_path / "store")
    upload_store(folder, url, progress=False)
    fs, place = MemoryFileSystem(), f"{url}/shards/000001/{file}"
    fs.pipe_file(place, flip(fs.cat_file(place), 17))
    far = open_remote(url, tmp_path / "cache", **SMALL)
    far.rows(torch.tensor([0]))
    with pytest.raises(ArtifactError, match=rf"000001/{file} did not arrive as its record says"):
        far.rows(torch.tensor([50]))
    assert [p.name for p in (tmp_path / "cache" / "shards").iterdir()] == ["000000"]


def test_what_was_damaged_on_the_way_is_fetched_again(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made(tmp_path / "store")
    upload_store(folder, url, progress=False)
    plain, calls = MemoryFileSystem.get_file, itertools.count()

    def bad(self: Any, there: str, here: str, *args: Any, **kwargs: Any) -> None:
        plain(self, there, here, *args, **kwargs)
        if next(calls) == 2:
            Path(here).write_bytes(flip(Path(here).read_bytes(), 3))

    monkeypatch.setattr(MemoryFileSystem, "get_file", bad)
    far, local = open_remote(url, tmp_path / "cache", **SMALL), StoredActivations(folder, **SMALL)
    assert_equal_batches(local, far, tmp_path / "cache", 2**30)


@pytest.mark.parametrize("change", [lambda data: data[:-4], lambda data: flip(data, 40)], ids=["cut", "flipped"])
def test_a_cached_shard_that_was_damaged_since_is_fetched_again(
    tmp_path: Path, url: str, change: Callable[[bytes], bytes]
) -> None:
    folder = made(tmp_path / "store")
    upload_store(folder, url, progress=False)
    list(open_remote(url, tmp_path / "cache", **SMALL).batches(x="0.resid_post"))
    cut = tmp_path / "cache" / "shards" / "000002" / "values.blocks.0.hook_resid_post.float32"
    cut.write_bytes(change(cut.read_bytes()))
    far = open_remote(url, tmp_path / "cache", **SMALL)
    assert_equal_batches(StoredActivations(folder, **SMALL), far, tmp_path / "cache", 2**30)
    assert far.fetched_bytes == sizes(folder)[2]


BAD_RECORDS: dict[str, Callable[[dict[str, Any]], None]] = {
    "a path upwards": lambda r: r["files"].update({"../../../evil": {"bytes": 4, "crc32": 0}}),
    "an absolute path": lambda r: r["files"].update({"/tmp/evil": {"bytes": 4, "crc32": 0}}),
    "a path in place of a file": lambda r: r["files"].update({"../ids.int32": r["files"].pop("ids.int32")}),
    "more rows than numbers": lambda r: r.update(rows=r["rows"] + 1),
    "a file too long": lambda r: r["files"]["ids.int32"].update(bytes=2**40),
    "rows that are no number": lambda r: r.update(rows="40"),
    "no files": lambda r: r.pop("files"),
    "a sum that is none": lambda r: r["files"]["ids.int32"].update(crc32=None),
    "fewer than no rows": lambda r: r.update(rows=-1, files={}),
}


@pytest.mark.parametrize("change", BAD_RECORDS.values(), ids=list(BAD_RECORDS))
def test_a_record_that_names_other_files_is_refused(
    tmp_path: Path, url: str, change: Callable[[dict[str, Any]], None]
) -> None:
    folder = made(tmp_path / "store", 2)
    upload_store(folder, url, progress=False)
    fs, place = MemoryFileSystem(), f"{url}/shards/000001/shard.json"
    record = json.loads(fs.cat_file(place))
    record.pop("crc32")
    change(record)
    record["crc32"] = zlib.crc32(json.dumps(record, sort_keys=True).encode())  # whoever means harm can add up, too
    fs.pipe_file(place, json.dumps(record).encode())
    before = {p for p in tmp_path.rglob("*") if "cache" not in p.parts}
    with pytest.raises(ArtifactError, match="shard 000001: the record of a shard"):
        open_remote(url, tmp_path / "cache", **SMALL)
    assert {p for p in tmp_path.rglob("*") if "cache" not in p.parts} == before
    assert not list((tmp_path / "cache" / "shards").iterdir())


def test_names_in_a_listing_that_are_no_shards_are_passed_over(tmp_path: Path, url: str) -> None:
    folder = made(tmp_path / "store", 2, complete=False)
    upload_store(folder, url, progress=False)
    fs = MemoryFileSystem()
    for name in ("../000007", "..", "x/000008", "0000000009", "12", "000001/../../../evil", "٠٠٠٠٠٣"):
        fs.pipe_file(f"{url}/shards/{name}/shard.json", b"{}")
    assert open_remote(url, tmp_path / "cache", **SMALL).numbers == [0, 1]


def test_a_site_of_the_manifest_leads_nowhere(tmp_path: Path, url: str) -> None:
    made(tmp_path / "store", 1)
    upload_store(tmp_path / "store", url, progress=False)
    fs = MemoryFileSystem()
    held = json.loads(fs.cat_file(f"{url}/manifest.json"))
    held["sites"][0]["name"] = "../../../evil"
    fs.pipe_file(f"{url}/manifest.json", json.dumps(held).encode())
    with pytest.raises(InterpError, match="evil"):
        open_remote(url, tmp_path / "cache", **SMALL)


@pytest.mark.parametrize("text", [b"{}", b"[", b'{"units": "9"}', b'{"units": 0}', b"3"])
def test_a_damaged_end_is_refused(tmp_path: Path, url: str, text: bytes) -> None:
    upload_store(made(tmp_path / "store", 1), url, progress=False)
    MemoryFileSystem().pipe_file(f"{url}/complete.json", text)
    with pytest.raises(ArtifactError, match=r"complete\.json is damaged"):
        open_remote(url, tmp_path / "cache", **SMALL)


def test_a_folder_that_is_no_cache_of_this_store_is_refused_untouched(tmp_path: Path, url: str) -> None:
    folder = made(tmp_path / "store")
    upload_store(folder, url, progress=False)
    before = tree(str(folder))
    with pytest.raises(ArtifactError, match="is no cache; choose an empty folder"):
        open_remote(url, folder, **SMALL)
    assert tree(str(folder)) == before
    open_remote(url, tmp_path / "cache", **SMALL)
    other = f"{url}-other"
    upload_store(folder, other, progress=False)
    with pytest.raises(ArtifactError, match=r"is the cache of .*, not of .*-other"):
        open_remote(other, tmp_path / "cache", **SMALL)
    MemoryFileSystem().pipe_file(f"{url}/manifest.json", json.dumps(manifest("float16").model_dump()).encode())
    with pytest.raises(ArtifactError, match=r"another store than .*: dtype was 'float32', now 'float16'"):
        open_remote(url, tmp_path / "cache", **SMALL)


def test_sizes_and_places_that_cannot_be_are_refused(tmp_path: Path, url: str) -> None:
    folder = made(tmp_path / "store")
    with pytest.raises(ArtifactError, match=r"holds no manifest\.json"):
        open_remote(url, tmp_path / "cache", **SMALL)
    upload_store(folder, url, progress=False)
    with pytest.raises(ConfigError, match="holds not even one shard"):
        open_remote(url, tmp_path / "cache", cache_bytes=max(sizes(folder)) - 1, **SMALL)
    with pytest.raises(ConfigError, match="at least two batches"):
        open_remote(url, tmp_path / "new", batch_size=16, buffer_tokens=16)
    assert not (tmp_path / "new").exists()
    with pytest.raises(ConfigError, match="Protocol not known: nowhere; give a URL"):
        upload_store(folder, "nowhere://x", progress=False)


# -- sending ----------------------------------------------------------------------------------------------------


def test_an_upload_goes_on_where_it_was_stopped(tmp_path: Path, url: str) -> None:
    folder = made(tmp_path / "store")
    looks = itertools.count()
    first = upload_store(folder, url, should_stop=lambda: next(looks) == 2, progress=False)
    assert (first.status, first.shards, first.bytes) == ("stopped", 2, sum(sizes(folder)[:2]))
    assert "/complete.json" not in tree(url)
    second = upload_store(folder, url, progress=False)
    assert (second.status, second.shards, second.there) == ("complete", 4, 2)
    assert tree(url) == sent(folder)
    third = upload_store(folder, url, progress=False)
    assert (third.status, third.shards, third.there) == ("complete", 0, 6)


@pytest.mark.parametrize("kind", ["memory", "path"])
def test_the_manifest_goes_first_each_record_after_its_files_and_the_end_last(
    tmp_path: Path, url: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made(tmp_path / "store")
    url = url if kind == "memory" else str(tmp_path / "there")
    fs, root = fsspec.core.url_to_fs(url)
    order: list[str] = []
    plain = {name: getattr(type(fs), name) for name in ("pipe_file", "put_file", "mv")}

    def noted(name: str, place: int) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = plain[name](self, *args, **kwargs)
            order.append(str(args[place]).removeprefix(f"{root}/"))
            return result

        return call

    for name, place in (("pipe_file", 0), ("put_file", 1), ("mv", 1)):
        monkeypatch.setattr(type(fs), name, noted(name, place))
    upload_store(folder, url, progress=False)
    order = [name for name in order if not name.endswith(".tmp")]
    assert order[0] == "manifest.json" and order[-1] == "complete.json"
    assert len(order) == len(set(order)) == len(sent(folder))
    assert tree(url) == sent(folder)
    for number in range(6):
        mine = [name for name in order if name.startswith(f"shards/{number:06d}/")]
        assert len(mine) == 7 and mine[-1].endswith("shard.json")
        assert order.index(mine[-1]) - order.index(mine[0]) == 6


@pytest.mark.parametrize(("error", "tries"), [(ConnectionResetError, 5), (TimeoutError, 5), (PermissionError, 1)])
def test_what_passes_is_tried_again_and_what_does_not_is_said(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch, error: type[OSError], tries: int
) -> None:
    folder, plain, calls = made(tmp_path / "store"), MemoryFileSystem.put_file, itertools.count()
    fails = 10**6

    def put(self: Any, *args: Any, **kwargs: Any) -> Any:
        if 3 <= (call := next(calls)) < 3 + fails:
            raise error(f"no {call}")
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "put_file", put)
    with pytest.raises(ArtifactError, match=rf"cannot be written \(shards/000000/\w+.*\): {error.__name__} no"):
        upload_store(folder, url, progress=False)
    assert next(calls) == 3 + tries
    assert "/shards/000000/shard.json" not in tree(url)
    fails, calls = tries - 1, itertools.count()
    assert upload_store(folder, url, progress=False).status == "complete"
    assert tree(url) == sent(folder)


def test_a_file_that_arrives_short_is_sent_again(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, plain, calls = made(tmp_path / "store"), MemoryFileSystem.put_file, itertools.count()

    def short(self: Any, here: str, there: str, **kwargs: Any) -> None:
        plain(self, here, there, **kwargs)
        if next(calls) == 4:
            self.pipe_file(there, self.cat_file(there)[:-1])

    monkeypatch.setattr(MemoryFileSystem, "put_file", short)
    upload_store(folder, url, progress=False)
    assert tree(url) == sent(folder)


def test_a_damaged_shard_is_not_sent(tmp_path: Path, url: str) -> None:
    folder = made(tmp_path / "store")
    bad = folder / "shards" / "000003" / "position.int32"
    bad.write_bytes(flip(bad.read_bytes(), 9))
    with pytest.raises(ArtifactError, match=r"000003/position\.int32: checksum .*interp store repair"):
        upload_store(folder, url, progress=False)
    there = tree(url)
    assert "/shards/000003/shard.json" not in there and "/shards/000002/shard.json" in there


def test_a_shard_with_other_content_is_replaced_and_another_store_is_not(tmp_path: Path, url: str) -> None:
    folder = made(tmp_path / "store", 3, complete=False)
    upload_store(folder, url, progress=False)
    add_shard(folder, 1, manifest(), rows=24)
    told = upload_store(folder, url, progress=False)
    assert (told.shards, told.there) == (1, 2) and tree(url) == sent(folder)
    before = tree(url)
    other = made(tmp_path / "other", 1, manifest(model="large"))
    with pytest.raises(ArtifactError, match=r"another store than .*config_hash was 'tiny', now 'large'"):
        upload_store(other, url, progress=False)
    assert tree(url) == before
    MemoryFileSystem().pipe_file(f"{url}-full/photo.png", b"x")
    with pytest.raises(ArtifactError, match=r"holds photo\.png, which is no store"):
        upload_store(other, f"{url}-full", progress=False)


@pytest.mark.parametrize("keep_local", [True, False])
def test_an_uploader_sends_while_shards_are_written(tmp_path: Path, url: str, keep_local: bool) -> None:
    reference = made(tmp_path / "reference")
    folder, first = tmp_path / "store", threading.Event()
    with Uploader(folder, url, keep_local=keep_local) as uploader:
        store = begin(folder, manifest())
        for number in range(6):
            add_shard(folder, number, manifest())
            if number == 1:  # it does not wait for the end
                for _ in range(2000):
                    if "/shards/000001/shard.json" in tree(url):
                        first.set()
                        break
                    threading.Event().wait(0.005)
        store.ends_at(6)
        assert store.finish(6)  # the records are enough for the capture to know what is made
    assert first.is_set()
    told = uploader.finish()
    assert (told.status, told.shards, told.bytes) == ("complete", 6, sum(sizes(reference)))
    assert tree(url) == sent(reference)
    left = {p.name for p in (folder / "shards").rglob("*") if p.is_file()}
    assert (left == {"shard.json"}) != keep_local
    assert store.whole() == [*range(6)] and store.tokens_held() == StoredActivations(reference, **SMALL).n_tokens
    assert upload_store(folder, url, progress=False).there == 6
    far = open_remote(url, tmp_path / "cache", **SMALL)
    assert_equal_batches(StoredActivations(reference, **SMALL), far, tmp_path / "cache", 2**30)


def test_an_uploader_says_at_the_end_what_went_wrong(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made(tmp_path / "store")

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a driver's own error")

    monkeypatch.setattr(MemoryFileSystem, "put_file", broken)
    with pytest.raises(ArtifactError, match=r"cannot be written .*: RuntimeError a driver's own error"):
        Uploader(folder, url).finish()
    with pytest.raises(ArtifactError, match=r"holds no manifest\.json"):
        Uploader(tmp_path / "nothing", url).finish()
    with pytest.raises(ZeroDivisionError), Uploader(tmp_path / "nothing", url):
        raise ZeroDivisionError  # the capture's own error is not hidden by the upload's


def test_nothing_is_removed_here_that_is_not_there(tmp_path: Path, url: str) -> None:
    folder = made(tmp_path / "store")
    upload_store(folder, url, progress=False)
    fs, place = MemoryFileSystem(), f"{url}/shards/000002/document.int64"
    fs.pipe_file(place, fs.cat_file(place)[:-8])
    before = sent(folder)
    with pytest.raises(ArtifactError, match="nothing was removed here"):
        Uploader(folder, url, keep_local=False).finish()
    after = sent(folder)
    assert {name for name in before if name not in after} == {
        name for name in before if name.startswith(("/shards/000000", "/shards/000001")) and "shard.json" not in name
    }


def test_a_shard_that_is_nowhere_is_named(tmp_path: Path, url: str) -> None:
    folder = made(tmp_path / "store")
    Uploader(folder, url, keep_local=False).finish()
    fs = MemoryFileSystem()
    fs.rm(f"{url}/shards/000004", recursive=True)
    with pytest.raises(ArtifactError, match=r"000004/ids\.int32 is missing, and .* lacks this shard"):
        upload_store(folder, url, progress=False)


# -- what is told before and after ------------------------------------------------------------------------------


def test_a_place_that_cannot_take_a_store_is_refused_before_there_is_one(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = tmp_path / "far" / "away"
    assert check_destination(tmp_path / "store", new) == f"file://{new}"
    check_destination(tmp_path / "store", url)
    assert not list(tmp_path.iterdir()) and not tree(url)  # looked at, and left as it was
    for place in (tmp_path / "store", tmp_path / "store" / "x", tmp_path):
        with pytest.raises(ConfigError, match="lie in each other"):
            check_destination(tmp_path / "store", place)
    with pytest.raises(ConfigError, match="Protocol not known: nowhere"):
        check_destination(tmp_path / "store", "nowhere://x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / ".manifest.json.1.tmp").touch()
    check_destination(tmp_path / "store", tmp_path / "full")  # a draft of somebody who was killed
    (tmp_path / "full" / "photo.png").touch()
    with pytest.raises(ArtifactError, match=r"holds photo\.png, which is no store"):
        check_destination(tmp_path / "store", tmp_path / "full")
    upload_store(made(tmp_path / "store", 1), url, progress=False)
    check_destination(tmp_path / "store", url, manifest())
    with pytest.raises(ArtifactError, match="another store than"):
        check_destination(tmp_path / "store", url, manifest(model="large"))

    def no(*args: Any) -> None:
        raise PermissionError("read only")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", no)
    with pytest.raises(ArtifactError, match=r"cannot be written .*: PermissionError read only"):
        check_destination(tmp_path / "store", f"{url}-new")


def test_one_uploader_of_a_folder_sends_and_another_takes_over(tmp_path: Path, url: str) -> None:
    folder = made(tmp_path / "store")
    with (folder / "locks" / "sender").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        told = Uploader(folder, url).finish()
        assert told.status == "others" and "another process" in told.summary() and not tree(url)
        waiting = Uploader(folder, url)
        threading.Event().wait(0.05)
        assert not tree(url)
    until(lambda: "/shards/000005/shard.json" in tree(url))
    assert (waiting.finish().status, waiting.finish().shards) == ("complete", 6)


def test_waiting_for_the_last_shards_can_be_stopped(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, plain, stop = made(tmp_path / "store"), MemoryFileSystem.put_file, threading.Event()

    def put(self: Any, here: str, there: str, **kwargs: Any) -> None:
        if "000002" in there:
            stop.set()
            threading.Event().wait(0.05)
        plain(self, here, there, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "put_file", put)
    told = Uploader(folder, url).finish(should_stop=stop.is_set)
    assert (told.status, told.shards) == ("stopped", 3) and "still to be sent" in told.summary()
    told = Uploader(folder, url).finish()
    assert (told.status, told.shards, told.there) == ("complete", 3, 3) and tree(url) == sent(folder)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The URL of a bucket of a server like S3, on this machine."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    kept = dict(fsspec.config.conf)
    address = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    fsspec.config.conf["s3"] = {"endpoint_url": address, "key": "k", "secret": "s"}
    fsspec.filesystem("s3").mkdir("bucket")
    yield "s3://bucket"
    fsspec.config.conf.clear()
    fsspec.config.conf.update(kept)
    server.stop()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_store_goes_to_s3_and_comes_back(tmp_path: Path, bucket: str) -> None:
    folder, url = tmp_path / "store", f"{bucket}/{uuid.uuid4().hex}"
    check_destination(folder, url, manifest())
    reference = made(tmp_path / "reference")
    with Uploader(folder, url, keep_local=False) as uploader:
        made(folder)
    assert uploader.finish().status == "complete" and tree(url) == sent(reference)
    limit = 3 * max(sizes(reference))
    far = open_remote(url, tmp_path / "cache", cache_bytes=limit, **SMALL)
    assert_equal_batches(StoredActivations(reference, **SMALL), far, tmp_path / "cache", limit)
    with pytest.raises(ArtifactError, match="bucket"):
        check_destination(folder, "s3://no-such-bucket/x")


def test_a_store_whose_manifest_is_being_written_is_joined(tmp_path: Path) -> None:
    """What another process has made by then, or left behind when it was killed: locks, shards and a draft."""
    folder = tmp_path / "store"
    (folder / "locks").mkdir(parents=True)
    (folder / "shards").mkdir()
    (folder / f".manifest.json.{uuid.uuid4().hex}.tmp").write_text("{")
    StoreFolder(folder).begin(manifest(), resume=True, free_unit=False)
    assert Manifest.read(folder) == manifest()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".notes.tmp").write_text("mine")
    with pytest.raises(ArtifactError, match=r"holds \.notes\.tmp, which is no store"):
        StoreFolder(tmp_path / "other").begin(manifest(), resume=True, free_unit=False)
