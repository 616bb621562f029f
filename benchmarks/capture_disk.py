"""What the parts of a store cost that meet the disk: writing shards, and reading shuffled batches."""

import argparse
import os
import shutil
import statistics
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import capture_peers as peers
from engine import row
from figures import Found, interleaved, ratios_of


def run_write(options: argparse.Namespace) -> Found:
    """Write as many bytes in every way, and wait until they are on the disk (SAELens does not)."""
    import torch

    from interp.data.codec import codec_named
    from interp.data.shard import ShardWriter

    rows, d, key = 8192, 512, ("values", "blocks.5.hook_resid_post")
    blocks = 1 if options.tiny else 8 if options.quick else 32
    x, known, data = torch.randn(rows, d).bfloat16(), columns(rows), os.urandom(rows * (2 * d + 17))
    wide = torch.randn(len(data) * blocks // (4 * d * 128), 128, d)

    def ours(place: Path) -> None:
        shard = ShardWriter(place, {key: codec_named("bfloat16")})
        for _ in range(blocks):
            shard.append(known, {key: x})
        shard.close({})

    def saelens(place: Path) -> None:
        from datasets import Array2D, Dataset, Features

        made = Dataset.from_dict({"x": wide}, features=Features({"x": Array2D((128, d), "float32")}))
        made.save_to_disk(str(place), num_shards=1)

    def rate(write: Callable[[Path], None], size: int) -> float:
        place = options.folder / uuid.uuid4().hex
        start = time.perf_counter()
        write(place)
        found = size / (time.perf_counter() - start) / 1e9
        shutil.rmtree(place) if place.is_dir() else place.unlink()
        return found

    size, raw = len(data) * blocks, lambda place: peers.write_raw(place, data, blocks)
    ways: dict[str, Callable[[], float]] = {"ours": lambda: rate(ours, size), "raw": lambda: rate(raw, size)}
    if options.peers != ["none"]:
        ways["saelens"] = lambda: rate(saelens, wide.numel() * 4)
    rates = interleaved(ways, options.rounds or (3 if options.quick else 15))
    found = Found({}, ["", f"writing {size / 1e6:.0f} MB; GB/s by wall time"])
    for name, values in rates.items():
        found.figures[f"write_gbps_{name}"] = statistics.median(values)
        found.lines.append(row(name, values))
    found.ratio("write_vs_disk", ratios_of(rates["ours"], rates["raw"]), 0.8)
    if "saelens" in rates:
        found.ratio("write_vs_saelens", ratios_of(rates["ours"], rates["saelens"]), 5.0)
    return found


def run_read(options: argparse.Namespace) -> Found:
    """Read all shuffled batches of a store, over and over, so that the system holds it in memory."""
    import torch

    from interp.data.store import ActivationStore

    rows, d, size, n_shards = 65536, 512, 4096, 2 if options.tiny else 4 if options.quick else 16
    part = torch.randn(rows, d).bfloat16()
    whole, folder = part.repeat(n_shards, 1), options.folder / "store"
    make_store(folder, part, n_shards)
    store = ActivationStore.open(folder, batch_size=size)

    def rate(batches: Iterable[Any]) -> float:
        start, served = time.perf_counter(), 0
        for batch in batches:
            served += batch.numel() * 2
        return served / (time.perf_counter() - start) / 1e9

    ways: dict[str, Callable[[], float]] = {
        "ours": lambda: rate(batch.x for batch in store.batches()),
        "gather": lambda: rate(whole.index_select(0, i) for i in torch.randperm(len(whole)).split(size)),
    }
    rates = interleaved(ways, options.rounds or (5 if options.quick else 15))
    shutil.rmtree(folder)
    head = f"reading {whole.numel() * 2 / 1e9:.2f} GB in shuffled batches of {size} × {d} bfloat16; GB/s by wall time"
    found = Found({"gather_gbps": statistics.median(rates["gather"])}, ["", head])
    found.lines += [row(name, values) for name, values in rates.items()]
    found.ratio("read_gbps", rates["ours"], min(5.0, 0.7 * found.figures["gather_gbps"]))
    found.ratio("read_vs_gather", ratios_of(rates["ours"], rates["gather"]))
    return found


def make_store(folder: Path, part: Any, n_shards: int) -> None:
    """A store whose shards all hold the same rows [row d]."""
    from interp import HookManager
    from interp.core.disk import write_json
    from interp.data.capture import plan_capture
    from interp.data.codec import codec_named
    from interp.data.manifest import MANIFEST, SHARDS
    from interp.data.shard import ShardWriter, shard_name

    setting = peers.Setting("gpt2", 2, part.shape[1], 512, ctx=128, rows=1, blocks=1)
    model, ids = peers.build(setting)
    manifest = plan_capture(HookManager.load(model), peers.our_text(setting, ids), setting.site).manifest
    folder.mkdir()
    write_json(folder / MANIFEST, manifest.model_dump(mode="json"))
    key = ("values", setting.site)
    for number in range(n_shards):
        shard = ShardWriter(folder / SHARDS / shard_name(number), {key: codec_named("bfloat16")})
        shard.append(columns(len(part)), {key: part})
        shard.close({"first_document": number, "end_document": number + 1})


def columns(n: int) -> dict[str, Any]:
    """What is known of `n` rows."""
    import torch

    ids = torch.arange(n)
    return {"ids": ids, "document": ids, "position": ids, "special": torch.zeros(n, dtype=torch.bool)}
