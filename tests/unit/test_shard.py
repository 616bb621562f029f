"""One shard: what was written comes back, what was damaged is found, nothing is copied; and work done ahead."""

import gc
import itertools
import json
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from interp.core.errors import ArtifactError, ConfigError, DataError
from interp.data.ahead import Ahead
from interp.data.codec import CODECS, codec_named
from interp.data.shard import COLUMNS, Shard, ShardWriter
from tests.store_faults import TooLong, within

EIGHT = ["int8_row", "int8_channel"]
RAW = ["float32", "bfloat16", "float16"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- codecs -----------------------------------------------------------------------------------------------------


def rough(n: int = 60, d: int = 24) -> Tensor:
    """Rows and channels from 1e-15 to 1e15, outliers, and some that are zero."""
    x = normal(n, d)
    x *= 10.0 ** torch.linspace(-15, 0, n)[:, None] * 10.0 ** torch.linspace(0, 15, d)[None]
    x[::7], x[:, ::5] = 0.0, 0.0
    x[3, 1], x[4, 2] = -1e17, 3e-17
    return x


@pytest.mark.parametrize(("name", "dim"), [("int8_row", 1), ("int8_channel", 0)])
def test_eight_bits_are_off_by_at_most_half_a_scale(name: str, dim: int) -> None:
    codec, x = codec_named(name), rough()
    coded = codec.encode(x)
    scale = coded["scale"]
    assert coded["values"].dtype == torch.int8 and scale.dtype == torch.float32
    torch.testing.assert_close(scale.double(), x.double().abs().amax(dim) / 127, rtol=1e-6, atol=0)
    apart = scale.unsqueeze(dim).double()
    missed = (codec.decode(coded["values"], scale).double() - x.double()).abs()
    assert bool((missed <= 0.5 * apart * (1 + 1e-4)).all())
    # The bound is met, so it is the scale that was asked for; and the largest number of each uses the last bit.
    assert float((missed / apart.clamp_min(1e-30)).max()) > 0.45
    assert bool((coded["values"].abs().amax(dim) == torch.where(scale > 0, 127, 0)).all())
    empty = scale == 0
    zeros = codec.decode(coded["values"], scale).movedim(1 - dim, 0)[empty]
    assert len(zeros) >= 4 and bool((zeros == 0).all())


@pytest.mark.parametrize("name", RAW)
def test_raw_numbers_are_the_same_bits(name: str) -> None:
    codec = codec_named(name)
    bits = torch.arange(-(2**15), 2**15, 7).to(torch.int16)
    own = bits.view(codec.dtype) if codec.dtype.itemsize == 2 else (bits.int() * 65537).view(torch.float32)
    x = own.view(-1, 1)
    again = codec.decode(codec.encode(x)["values"], None)
    assert again.dtype == codec.dtype and torch.equal(again.view(torch.uint8), x.view(torch.uint8))
    wide = normal(50, 9)
    assert torch.equal(codec.encode(wide)["values"], wide.to(codec.dtype))


@pytest.mark.parametrize("name", list(CODECS))
def test_no_rows_are_rows_too(name: str) -> None:
    codec = codec_named(name)
    coded = codec.encode(torch.empty(0, 5))
    assert coded["values"].shape == (0, 5)
    assert codec.decode(coded["values"], coded.get("scale")).shape == (0, 5)


@pytest.mark.parametrize(("name", "per_row"), [("float32", 20), ("bfloat16", 10), ("int8_row", 9), ("int8_channel", 5)])
def test_a_row_takes_the_bytes_it_is_said_to(name: str, per_row: int, tmp_path: Path) -> None:
    assert codec_named(name).bytes_per_row(5) == per_row
    record = write(tmp_path / "000000", {"a": normal(40, 5)}, name).record
    scales = 20 if name == "int8_channel" else 0
    held = {file: size["bytes"] for file, size in record["files"].items() if ".a." in file}
    assert sum(held.values()) == 40 * per_row + scales


def test_an_unknown_codec_is_refused_with_what_is_near() -> None:
    with pytest.raises(ConfigError, match="did you mean 'int8_row'"):
        codec_named("int8_rows")


# -- shards -----------------------------------------------------------------------------------------------------


def columns_of(n: int) -> dict[str, Tensor]:
    ids = torch.randint(0, 2**31 - 1, (n,), generator=torch.Generator().manual_seed(1))
    position = torch.arange(n) - 1
    return {"ids": ids, "document": torch.arange(n) + 2**40, "position": position, "special": position % 5 == 4}


def write(
    place: Path, values: dict[str, Tensor], dtype: str, *, part: str = "values", cuts: tuple[int, ...] = (7, 8, 30)
) -> Shard:
    """Write a shard in pieces of several sizes, and open it."""
    n = len(next(iter(values.values())))
    writer = ShardWriter(place, {(part, site): codec_named(dtype) for site in values})
    edges = [0, *(cut for cut in cuts if cut < n), n]
    for low, high in itertools.pairwise(edges):
        if low < high:
            piece = {name: column[low:high] for name, column in columns_of(n).items()}
            writer.append(piece, {(part, site): x[low:high] for site, x in values.items()})
        assert not place.exists()
    writer.close({"first_document": 3, "end_document": 5})
    return Shard(place, {site: (x.shape[1],) for site, x in values.items()}, dtype)


@pytest.mark.parametrize("dtype", list(CODECS))
@pytest.mark.parametrize("n", [1, 7, 50])
def test_a_shard_gives_back_what_was_written_in_pieces(dtype: str, n: int, tmp_path: Path) -> None:
    values = {"0.resid_post": normal(n, 6), "1.z": 5 * normal(n, 8, seed=1) + 2}
    shard = write(tmp_path / "000000", values, dtype)
    assert (shard.rows, shard.tokens) == (n, int((~columns_of(n)["special"]).sum()))
    assert shard.record["first_document"] == 3
    for name, column in columns_of(n).items():
        assert shard.column(name).dtype == COLUMNS[name] and torch.equal(shard.column(name), column.to(COLUMNS[name]))
    assert torch.equal(shard.counted, ~columns_of(n)["special"])
    codec = codec_named(dtype)
    for site, x in values.items():
        coded = codec.encode(x)
        whole = codec.decode(coded["values"], coded.get("scale"))
        assert torch.equal(shard.select(site, slice(None)), whole)
        assert shard.raw(site).dtype == codec.dtype and shard.raw(site).shape == x.shape
        # The other site's rows would be far off.
        assert float((whole.float() - x).abs().max()) < 0.2
    assert not [path for path in tmp_path.iterdir() if path.name != "000000"]
    assert not list(shard.check())


@pytest.mark.parametrize("dtype", list(CODECS))
def test_selected_rows_are_those_of_direct_indexing(dtype: str, tmp_path: Path) -> None:
    shard = write(tmp_path / "000000", {"a": normal(50, 6)}, dtype)
    whole = shard.select("a", slice(None)).clone()
    for index in ([0], [49, 0, 3, 3, 17], list(range(49, -1, -1)), []):
        chosen = torch.tensor(index, dtype=torch.long)
        assert torch.equal(shard.select("a", chosen), whole[chosen])
    for piece in (slice(0, 1), slice(13, 50), slice(20, 20), slice(-3, None)):
        assert torch.equal(shard.select("a", piece), whole[piece])


@pytest.mark.parametrize("dtype", EIGHT)
def test_the_measured_error_is_the_error(dtype: str, tmp_path: Path) -> None:
    x = normal(50, 6) + torch.arange(6)
    shard = write(tmp_path / "000000", {"a": x, "b": 100 * normal(50, 4)}, dtype)
    missed = (x - shard.select("a", slice(None))).double()
    error = shard.record["error"]["values.a"]
    assert error["largest"] == pytest.approx(float(missed.abs().max()), rel=1e-6)
    # FVU as everywhere in the library: of the variance about the mean.
    variance = (x.double() - x.double().mean(0)).pow(2).sum()
    assert error["fvu"] == pytest.approx(float(missed.pow(2).sum() / variance), rel=1e-4)
    assert 0 < error["fvu"] < 1e-3 and set(shard.record["error"]) == {"values.a", "values.b"}


def mapped_files(tensor: Tensor) -> list[str]:
    """The files whose mapping holds a tensor's first byte."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *rest = line.split(maxsplit=5)
        low, high = (int(edge, 16) for edge in span.split("-"))
        if low <= tensor.data_ptr() < high and len(rest) == 5:
            found.append(rest[-1])
    return found


@pytest.mark.parametrize("dtype", RAW)
def test_reads_are_views_of_the_mapped_file_and_writing_to_them_leaves_it_alone(dtype: str, tmp_path: Path) -> None:
    x = normal(50, 6)
    shard = write(tmp_path / "000000", {"a": x}, dtype)
    path = tmp_path / "000000" / f"values.a.{dtype}"
    before, piece = path.read_bytes(), shard.select("a", slice(10, 30))
    assert mapped_files(piece) == [str(path)] and str(path) not in mapped_files(piece.clone())
    assert piece.data_ptr() == shard.raw("a").data_ptr() + 10 * 6 * piece.element_size()
    assert shard.column("ids").data_ptr() == shard.column("ids").data_ptr()
    piece.fill_(7.0)
    shard.column("ids").zero_()
    chosen = shard.select("a", torch.tensor([40]))
    chosen.zero_()
    assert path.read_bytes() == before and not list(shard.check())
    again = Shard(tmp_path / "000000", shard.shapes, dtype)
    assert torch.equal(again.select("a", slice(None)), x.to(codec_named(dtype).dtype))
    assert torch.equal(again.column("ids"), columns_of(50)["ids"].int())


def flip(path: Path, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(raw)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8_row", "int8_channel"])
def test_checksums_find_every_flipped_bit_of_every_file(dtype: str, tmp_path: Path) -> None:
    shard, draw = write(tmp_path / "000000", {"a": normal(50, 6), "b": normal(50, 2)}, dtype), random.Random(0)
    files = sorted(path for path in shard.folder.iterdir() if path.name != "shard.json")
    assert {path.name for path in files} == set(shard.record["files"])
    assert len(files) == 4 + (2 if dtype == "bfloat16" else 4)
    for path in files:
        size = 8 * path.stat().st_size
        for bit in (0, size - 1, *draw.sample(range(size), 12)):
            flip(path, bit)
            faults = list(shard.check())
            assert len(faults) == 1 and faults[0].startswith(f"{path}: "), (path.name, bit, faults)
            flip(path, bit)
    assert not list(shard.check())


def test_a_flipped_bit_of_the_record_is_found_too(tmp_path: Path) -> None:
    shard = write(tmp_path / "000000", {"a": normal(50, 6)}, "float32")
    path, draw, unseen, wrong = shard.folder / "shard.json", random.Random(0), list[str](), set[str]()
    text = path.read_text()
    for bit in draw.sample(range(8 * len(text)), 400):
        flip(path, bit)
        try:
            opened = Shard(shard.folder, shard.shapes, "float32")
            if not list(opened.check()):
                place = bit // 8
                unseen.append(text[max(0, place - 12) : place + 8].replace("\n", " "))
        except ArtifactError:
            pass
        except Exception as err:  # noqa: BLE001 - any other kind is a fault of its own
            wrong.add(type(err).__name__)
        flip(path, bit)
    assert not wrong and not unseen, f"raised {wrong}; {len(unseen)} of 400 unseen, such as {unseen[:6]}"


@pytest.mark.parametrize("name", ["values.a.float32", "ids.int32", "special.uint8"])
@pytest.mark.parametrize("change", [-1, -4, 1])
def test_a_file_of_another_length_is_refused_by_name(name: str, change: int, tmp_path: Path) -> None:
    shard = write(tmp_path / "000000", {"a": normal(50, 6)}, "float32")
    path = shard.folder / name
    raw = path.read_bytes()
    path.write_bytes(raw[:change] if change < 0 else raw + b"\0")
    with pytest.raises(ArtifactError, match=rf"{name} has {len(raw) + change} bytes, its record says {len(raw)}"):
        Shard(shard.folder, shard.shapes, "float32")
    path.unlink()
    with pytest.raises(ArtifactError, match=rf"{name} is missing"):
        Shard(shard.folder, shard.shapes, "float32")


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "5", "null", '"rows"', '{"rows": 1}', '{"rows": "x", "tokens": 1, "files": {}}'),
        *('{"rows": 1, "tokens": 1, "files": []}', '{"rows": 1, "tokens": 1, "files": {"a": {}}}'),
    ],
)
def test_a_record_that_is_none_is_refused_by_name(text: str, tmp_path: Path) -> None:
    shard = write(tmp_path / "000000", {"a": normal(50, 6)}, "float32")
    (shard.folder / "shard.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"shard\.json"):
        Shard(shard.folder, shard.shapes, "float32")
    with pytest.raises(ArtifactError, match=r"shard\.json"):
        (shard.folder / "shard.json").unlink()
        Shard(shard.folder, shard.shapes, "float32")


def test_a_record_that_says_more_or_fewer_rows_than_its_files_hold_is_refused(tmp_path: Path) -> None:
    shard = write(tmp_path / "000000", {"a": normal(50, 6)}, "float32")
    record = json.loads((shard.folder / "shard.json").read_text())
    for rows in (49, 51):
        (shard.folder / "shard.json").write_text(json.dumps({**record, "rows": rows}))
        with pytest.raises(ArtifactError, match="000000"):
            Shard(shard.folder, shard.shapes, "float32").select("a", slice(None))


@pytest.mark.parametrize("dtype", list(CODECS))
def test_an_empty_shard_is_a_shard(dtype: str, tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "000004", {("values", "a"): codec_named(dtype)})
    writer.close({})
    shard = Shard(tmp_path / "000004", {"a": (2, 3)}, dtype)
    assert (shard.rows, shard.tokens) == (0, 0) and not list(shard.check())
    assert all(shard.column(name).shape == (0,) for name in COLUMNS) and shard.counted.shape == (0,)
    assert shard.select("a", slice(None)).shape == shard.select("a", torch.empty(0, dtype=torch.long)).shape == (0, 6)


def test_a_part_that_was_not_captured_is_named(tmp_path: Path) -> None:
    shard = write(tmp_path / "000000", {"a": normal(50, 6)}, "float32")
    with pytest.raises(ArtifactError, match=r"no gradient\.a\.float32; it was captured without"):
        shard.select("a", slice(None), "gradient")
    grads = write(tmp_path / "000001", {"a": normal(50, 6)}, "int8_row", part="gradient")
    missed = grads.select("a", slice(None), "gradient") - normal(50, 6)
    assert float(missed.abs().max()) < 0.02 and set(grads.record["error"]) == {"gradient.a"}


def test_a_shard_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    place = tmp_path / "000000"
    writer = ShardWriter(place, {("values", "a"): codec_named("float32")})
    writer.append(columns_of(4), {("values", "a"): normal(4, 6)})
    assert not place.exists() and len(list(tmp_path.iterdir())) == 1
    writer.drop()
    assert not list(tmp_path.iterdir())
    write(place, {"a": normal(50, 6)}, "float32")
    again = write_over(place)
    assert again.rows == 4 and torch.equal(again.select("a", slice(None)), normal(4, 6))
    assert [path.name for path in tmp_path.iterdir()] == ["000000"]


def write_over(place: Path) -> Shard:
    writer = ShardWriter(place, {("values", "a"): codec_named("float32")})
    writer.append(columns_of(4), {("values", "a"): normal(4, 6)})
    writer.close({})
    return Shard(place, {"a": (6,)}, "float32")


# -- work done ahead --------------------------------------------------------------------------------------------


class Counted:
    """Items that know how many of them were made, and that they were closed."""

    def __init__(self, n: int | None = None, fault: BaseException | None = None) -> None:
        self.made, self.closed, self.n, self.fault = 0, False, n, fault

    def __iter__(self) -> Iterator[int]:
        try:
            while self.n is None or self.made < self.n:
                self.made += 1
                yield self.made
            if self.fault is not None:
                raise self.fault
        finally:
            self.closed = True


def gone(ahead: Ahead[Any]) -> bool:
    ahead._thread.join(2)
    return not ahead._thread.is_alive()


def test_items_come_in_their_order_and_only_so_many_ahead() -> None:
    items = Counted(200)
    with within(20):
        ahead = Ahead(iter(items), 3)
        assert [next(ahead) for _ in range(5)] == [1, 2, 3, 4, 5]
        time.sleep(0.3)
        # Three wait, and one is in the thread's hand.
        assert items.made == 5 + 3 + 1
        assert list(ahead) == list(range(6, 201))
        assert next(ahead, None) is None and gone(ahead) and items.closed


@pytest.mark.parametrize("fault", [ValueError("no"), KeyboardInterrupt(), MemoryError()])
def test_what_the_items_raise_is_raised_when_its_turn_comes(fault: BaseException) -> None:
    items = Counted(3, fault)
    with within(20):
        ahead = Ahead(iter(items), 10)
        time.sleep(0.2)
        assert [next(ahead) for _ in range(3)] == [1, 2, 3]
        with pytest.raises(type(fault)) as caught:
            next(ahead)
        assert caught.value is fault and next(ahead, None) is None and gone(ahead)


@pytest.mark.parametrize("taken", [0, 1, 7])
def test_closing_ends_the_thread_and_the_items(taken: int) -> None:
    items = Counted()
    with within(20):
        ahead = Ahead(iter(items), 2)
        for _ in range(taken):
            next(ahead)
        ahead.close()
        assert not ahead._thread.is_alive() and items.closed and next(ahead, None) is None
        ahead.close()


def test_letting_go_ends_the_thread() -> None:
    items = Counted()
    ahead = Ahead(iter(items), 2)
    next(ahead)
    thread = ahead._thread
    del ahead
    gc.collect()
    thread.join(2)
    assert not thread.is_alive() and items.closed


def test_closing_from_elsewhere_wakes_who_waits() -> None:
    blocked = threading.Event()

    def items() -> Iterator[int]:
        blocked.wait(20)
        yield 1

    ahead, got = Ahead(items(), 2), list[Any]()
    waiting = threading.Thread(target=lambda: got.append(next(ahead, None)), daemon=True)
    waiting.start()
    closing = threading.Thread(target=ahead.close, daemon=True)
    closing.start()
    time.sleep(0.05)
    blocked.set()
    closing.join(1)
    waiting.join(1)
    # Woken with what was made, or with nothing.
    alive = waiting.is_alive()
    ahead._ready.put((False, None))
    assert not alive and not closing.is_alive() and got in ([None], [1])


def test_the_watch_over_hangs_has_teeth() -> None:
    with pytest.raises(TooLong), within(0.05):
        time.sleep(5)


def test_numbers_that_float16_does_not_hold_are_refused(tmp_path: Path) -> None:
    x = normal(4, 3)
    x[2, 1] = -7e4
    for rows in (x, x.half()):
        writer = ShardWriter(tmp_path / "000000", {("values", "a"): codec_named("float16")})
        with pytest.raises(DataError, match="65,504"):
            writer.append(columns_of(4), {("values", "a"): rows})
        writer.drop()
    assert not list(tmp_path.iterdir())
