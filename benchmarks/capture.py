"""What it costs to capture activations, to memory and to a disk, beside the bare model and beside other toolkits.

    python benchmarks/capture.py [--quick] [--json] [--only FIGURE …] [--peers PYTHON …] [--device cuda]

Figures of one residual at mid-depth ("theirs ÷ ours": above 1, ours is faster), each for a random GPT-2 of 12 layers ×
d 512 at contexts of 1,024 and 128 tokens (`_ctx1024`, `_ctx128`), and for the testbed at 128 (`_testbed`):

    memory_vs_floor    the bare backbone cut after the block, its residual kept ÷ one round of `ActivationStore.stream`:
                       a buffer filled, half of it served
    disk_vs_floor      that, or writing the bytes to a file if it is slower ÷ `interp.capture` in bfloat16
    vs_bridge          `TransformerBridge.run_with_cache(names_filter, stop_at_layer)` ÷ ours to memory
    vs_saelens_store   SAELens' `ActivationsStore`, the same round of a buffer ÷ ours to memory
    vs_saelens_runner  SAELens' `CacheActivationsRunner` ÷ ours to disk, both in float32
    vs_nnsight         a trace that stops after the block ÷ ours to memory
    vs_interp_engine   the eager backend, which cannot stop ÷ ours to memory
    peak_memory        what memory grows by, above the cut model at work ÷ what our documentation says

and of the parts:

    write_vs_disk      `ShardWriter` ÷ `file.write` and fsync of as many bytes; SAELens is `save_to_disk` of an Array2D
    read_gbps          shuffled batches of a store that the system holds in memory; `gather` takes rows of one tensor
    all_residuals_latency, midlayer_stop
                       every residual ÷ `model(ids)` in case B (12 layers × d 64, 1 × 8 tokens); one residual ÷ the cut
                       backbone in case A (6 layers × d 384, 8 × 128 tokens)

Rounds are interleaved, each contender has a process of its own, a new one every four rounds; models have one thread;
ids are made before, nobody tokenises. What stays in memory is compared by CPU seconds. Whatever meets the disk is
compared by wall time, for ours writes in a thread of its own, so the machine must be quiet. With `--device cuda` all is
wall time until the device is done, of bfloat16 models at 1,024 tokens.
"""

import argparse
import json
import math
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import capture_peers as peers
import engine  # noqa: F401  sets the number of threads, so before torch
from capture_disk import run_read, run_write
from capture_peers import Contender, Setting, Worker, timed
from engine import SEED, SHORTEST, Call, row
from figures import Found, interleaved, machine_and_versions, ratios_of

os.environ.update(peers.QUIET)
Times = dict[str, tuple[float, float]]  # contender → CPU and wall seconds of one round
FRESH = 4  # rounds after which each contender has a new process
CLOSE = {"ours": 0.005, "peers": 0.05}  # how far apart mean squares may be; a store's batch is half of the tokens

SETTINGS = {
    "ctx1024": Setting("gpt2", 12, 512, 8192, ctx=1024, rows=2, blocks=4),
    "ctx128": Setting("gpt2", 12, 512, 8192, ctx=128, rows=16, blocks=4),
    "testbed": Setting("testbed", 4, 128, 1321, ctx=128, rows=32, blocks=16),
}
ON_CUDA = {
    "gpt2_ctx1024": Setting("gpt2", 12, 768, 50257, 1024, rows=32, blocks=8, dtype="bfloat16", device="cuda"),
    "llama_ctx1024": Setting("llama", 16, 2048, 128256, 1024, rows=16, blocks=8, dtype="bfloat16", device="cuda"),
}
CASES = {
    "A": Setting("gpt2", 6, 384, 50257, ctx=128, rows=8, blocks=1),
    "B": Setting("gpt2", 12, 64, 8192, ctx=8, rows=1, blocks=1),
    "B_llama": Setting("llama", 12, 64, 8192, ctx=8, rows=1, blocks=1),
    "C": Setting("llama", 6, 384, 512, ctx=1024, rows=2, blocks=1),
}


@dataclass(frozen=True)
class Ratio:
    """A figure of a setting: seconds of one contender ÷ ours.

    Args:
        theirs: the contenders; of several the slowest counts.
        ours: what they are divided by.
        bounds: what it should be at least, by setting.
        disk: whether the disk has a part in it, so that wall time counts.
    """

    theirs: tuple[str, ...]
    ours: str
    bounds: tuple[float, float, float] = (1.0, 1.0, 1.0)
    disk: bool = False


RATIOS = {
    "memory_vs_floor": Ratio(("floor",), "memory", (0.95, 0.95, 0.95)),
    "disk_vs_floor": Ratio(("floor", "raw_disk"), "disk", (0.9, 0.9, 0.9), disk=True),
    "vs_bridge": Ratio(("bridge",), "memory", (1.6, 1.15, 1.15)),
    "vs_saelens_store": Ratio(("saelens_store",), "memory"),
    "vs_saelens_store_hf": Ratio(("saelens_store_hf",), "memory"),
    "vs_saelens_runner": Ratio(("saelens_runner",), "disk_float32", (2.0, 1.15, 3.0), disk=True),
    "vs_saelens_runner_hf": Ratio(("saelens_runner_hf",), "disk_float32", disk=True),
    "vs_nnsight": Ratio(("nnsight",), "memory"),
    "vs_interp_engine": Ratio(("interp_engine",), "memory"),
}
LATENCIES = {
    "all_residuals_latency": ("B", "ours_all", "model", 1.05),
    "midlayer_stop": ("A", "ours_mid", "cut", 1.08),
}
PARTS = ("peak_memory", "write_vs_disk", "read_gbps")


def wanted(options: argparse.Namespace, setting: str) -> dict[str, Ratio]:
    """The ratios of a setting that were asked for."""
    only = options.only
    return {name: r for name, r in RATIOS.items() if not only or {name, f"{name}_{setting}"} & set(only)}


def needed(ratios: dict[str, Ratio]) -> set[str]:
    """Everybody that some ratios are about."""
    return {"floor", "again"} | {c for r in ratios.values() for c in (*r.theirs, r.ours)} if ratios else set()


def run_setting(name: str, setting: Setting, options: argparse.Namespace, there: dict[str, Worker]) -> Found:
    """Measure one setting, everybody in every round but the peers, which are slow."""
    ratios, found = wanted(options, name), Found({}, [])
    skipped = dict.fromkeys(needed(ratios) - set(there), "no python has it")
    calls = [c for c in sorted(there) if c in needed(ratios)]
    truth = there["floor"].ask(setting, options.folder)["mean_square"]
    for c in set(calls) - {"floor", "raw_disk"}:
        if fault := checked(
            there[c].ask(setting, options.folder), truth, CLOSE["peers" if c in peers.PEERS else "ours"]
        ):
            skipped[c] = fault
            if c in peers.OURS:
                sys.exit(f"{c} at {name}: {fault}")
    draw, rounds = random.Random(SEED), options.rounds or (3 if options.quick else 15)
    with_peers = set(draw.sample(range(rounds), min(rounds, 2 if options.quick else 7)))
    times: list[Times] = []
    for number in range(rounds):
        if number and number % FRESH == 0:
            there |= {c: there[c].anew() for c in calls}
        order = [c for c in calls if c not in skipped and (c in peers.OURS or number in with_peers)]
        times.append({})
        for c in draw.sample(order, len(order)):
            answer = there[c].ask(setting, options.folder)
            if "error" in answer:
                skipped[c] = answer["error"]
            else:
                times[-1][c] = (answer["cpu"], answer["wall"])
        print(f"{name} {number + 1}/{rounds}", file=sys.stderr)
    times = [{c: t for c, t in one.items() if c not in skipped} for one in times]
    found.lines += describe(name, setting, times)
    found.lines += [f"  {peer:<18}SKIPPED: {why}" for peer, why in skipped.items()]
    for figure, ratio in ratios.items():
        clock = int(ratio.disk or setting.device == "cuda")
        least = ratio.bounds[list(SETTINGS).index(name) if name in SETTINGS else 0]
        found.ratio(f"{figure}_{name}", compared(times, ratio.theirs, ratio.ours, clock), least)
        if ratio.theirs[0] in peers.PEERS and (beside := compared(times, ratio.theirs, "floor", clock)):
            by_floor = found.figures[f"{figure}_{name}_floor"] = statistics.median(beside)
            found.lines[-1] += f"; ÷ floor {by_floor:.3f}"
    return found


def checked(answer: dict[str, Any], truth: float, close: float) -> str | None:
    """Why a contender's first pass does not count; None where it captured what the floor did."""
    if "error" in answer:
        return str(answer["error"])
    apart = abs(answer["mean_square"] / truth - 1)
    return None if apart <= close else f"the mean square of what it captured is {apart:.1%} away from the floor's"


def compared(times: list[Times], theirs: tuple[str, ...], ours: str, clock: int) -> list[float]:
    """Round by round, theirs ÷ ours."""
    whole = [one for one in times if {*theirs, ours} <= set(one)]
    return [max(one[c][clock] for c in theirs) / one[ours][clock] for one in whole]


def describe(name: str, setting: Setting, times: list[Times]) -> list[str]:
    """What was captured, what it takes at least, and what everybody took."""
    seconds, on_disk = statistics.median(one["floor"][1] for one in times), peers.stored_bytes(setting)
    work, per_second = peers.flops(setting), setting.tokens / seconds
    lines = [
        f"\n{name}: {setting.model}, {setting.n_layers} layers × d {setting.d_model}, {setting.dtype}, output of block "
        f"{setting.layer}; {setting.tokens} tokens in {setting.blocks} forwards of {setting.rows} × {setting.ctx}",
        f"  a token takes at least {work / 1e6:.1f} MFLOP and {on_disk} bytes on the disk; at the floor's speed "
        f"{work * per_second / 1e9:.0f} GFLOP/s and {on_disk * per_second / 1e6:.1f} MB/s",
        f"  {'':<18}{'CPU s':>9}{'wall s':>9}{'tokens/s':>11}   by wall",
    ]
    for c in sorted({c for one in times for c in one}):
        cpu, wall = (statistics.median(one[c][clock] for one in times if c in one) for clock in (0, 1))
        lines.append(f"  {c:<18}{cpu:9.3f}{wall:9.3f}{setting.tokens / wall:11.0f}")
    return [*lines, row("again ÷ floor", compared(times, ("again",), "floor", int(setting.device == "cuda")))]


def run_latency(options: argparse.Namespace) -> Found:
    """The table of single calls: bare model, cut backbone, and ours with nothing, all and one residual read."""
    found = Found({}, [])
    for case, setting in options.cases.items():
        times = interleaved(latency_calls(setting), options.rounds or (5 if options.quick else 31))
        size = f"{setting.n_layers} layers × d {setting.d_model}, {setting.rows} × {setting.ctx}"
        base = f"model(ids), {1000 * statistics.median(times['model']):.2f} ms"
        found.lines += ["", f"latency, case {case}: {setting.model}, {size}; ÷ {base}"]
        for name in list(times)[1:]:
            values = ratios_of(times[name], times["model"])
            found.figures[f"latency_{case}_{name}"] = statistics.median(values)
            found.lines.append(row(name, values))
        for figure, (where, top, bottom, bound) in LATENCIES.items():
            if where == case and (not options.only or figure in options.only):
                found.ratio(figure, ratios_of(times[top], times[bottom]), bound, most=True)
    return found


def latency_calls(setting: Setting) -> dict[str, Callable[[], float]]:
    """Seconds per call of each contender; short calls are repeated."""
    from interp import HookManager

    model, ids = peers.build(setting)
    ids, clock = ids.to(setting.device), int(setting.device == "cuda")
    bare, backbone, hm = peers.twin_of(model), peers.cut(model, setting.layer), HookManager.load(model)
    calls: dict[str, Call] = {
        "model": lambda: bare(ids),
        "again": lambda: bare(ids),
        "cut": lambda: backbone(ids, use_cache=False),
        "ours_nothing": lambda: hm.run(ids),
        "ours_all": lambda: hm.run(ids, read="*.resid_post"),
        "ours_mid": lambda: hm.run(ids, read=setting.site),
    }

    def seconds(call: Call, repeats: int) -> float:
        return timed(Contender(lambda: [call() for _ in range(repeats)][-1], float), setting.device)[clock]

    seconds(bare_call := calls["model"], 2)
    repeats = max(1, math.ceil(SHORTEST / seconds(bare_call, 1)))
    return {name: lambda c=call: seconds(c, repeats) / repeats for name, call in calls.items()}  # type: ignore[misc]


def run_peak(name: str, setting: Setting, options: argparse.Namespace) -> Found:
    """Peak memory of ours above that of the cut model at work, each in a fresh process, ÷ what is documented."""
    found, item = Found({}, []), 4 if setting.dtype == "float32" else 2
    forward, size = setting.rows * setting.ctx, peers.batch_size(setting)
    documented = {
        "memory": (setting.tokens + size) * (setting.d_model * item + 16) + 2 * forward * setting.d_model * item,
        "disk": 9 * forward * peers.stored_bytes(setting),
    }
    for kind, expected in documented.items():
        command = [sys.executable, __file__, "--peak", kind, json.dumps(asdict(setting)), str(options.folder)]
        freed = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}  # so that the system has back what is freed
        ended = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **freed})
        if ended.returncode:
            sys.exit(ended.stderr)
        grown = json.loads(ended.stdout.splitlines()[-1])
        name_of, ratio = f"peak_memory_{kind}_{name}", grown / expected
        found.figures[name_of] = ratio
        sizes = f"{grown / 1e6:.1f} MB above the cut model, documented {expected / 1e6:.1f} MB"
        verdict = "held" if ratio <= 1.2 else "MISSED"
        found.lines.append(f"{name_of}: at most 1.2 {verdict}\n  {'':<18}{ratio:8.3f}  {sizes}")
    return found


def peak_of(kind: str, setting: Setting, folder: Path) -> None:
    """In a process of its own: how many bytes the peak of ours lies above the peak of one bare forward."""
    model, ids = peers.build(setting)
    one, first = replace(setting, blocks=1), ids[: setting.rows]
    backbone = peers.cut(model, setting.layer)
    bare = peers.keeping(one, first, lambda batch: backbone(batch, use_cache=False))

    def made(of: Setting, rows: Any) -> Contender:
        if kind == "memory":
            return peers.to_memory(of, model, rows, folder)
        return peers.to_disk(of, model, rows, folder, "bfloat16")

    timed(made(one, first), setting.device)  # what is imported and allocated once is no buffer
    ours = made(setting, ids)
    at_work, with_ours = (peak(contender, setting.device) for contender in (bare, ours))
    print(json.dumps(max(0, with_ours - at_work)))


def peak(contender: Contender, device: str) -> int:
    """The most bytes that the process, or the GPU, held during a pass."""
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        timed(contender, device)
        return int(torch.cuda.max_memory_allocated())
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    timed(contender, device)
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


def measure(options: argparse.Namespace, there: dict[str, Worker]) -> dict[str, float]:
    """Everything that was asked for; what is known is printed as it comes."""
    only, more = set(options.only or [*RATIOS, *LATENCIES, *PARTS]), []
    runs: list[Callable[[], Found]] = []
    for name, setting in options.settings.items():
        if wanted(options, name):
            runs.append(partial(run_setting, name, setting, options, there))
        if "peak_memory" in only and not (options.quick and name == "testbed"):
            runs.append(partial(run_peak, name, setting, options))
    parts = {run_latency: set(LATENCIES), run_write: {"write_vs_disk"}, run_read: {"read_gbps"}}
    runs += [partial(run, options) for run, figures in parts.items() if figures & only]
    for run in runs:
        more.append(run())
        print("\n".join(more[-1].lines), file=sys.stderr if options.json else sys.stdout, flush=True)
    return {name: value for found in more for name, value in found.figures.items()}


def sized(options: argparse.Namespace) -> None:
    """Choose the settings by device and time."""
    of, by = ON_CUDA if options.device == "cuda" else SETTINGS, 2 if options.quick else 1
    options.settings = {name: replace(s, blocks=s.blocks // by, rows=s.rows // by) for name, s in of.items()}
    options.cases = {name: replace(case, device=options.device) for name, case in CASES.items()}
    if options.quick:  # the testbed's context is 128 too
        options.settings = {name: s for name, s in options.settings.items() if name != "ctx128"}
        options.cases = {name: options.cases[name] for name in ("A", "B")}
    if options.tiny:
        tiny: dict[str, Any] = {"d_model": 64, "n_layers": 2, "d_vocab": 512}
        for name, s in options.settings.items():
            options.settings[name] = replace(s, rows=2, blocks=4, **({} if s.model == "testbed" else tiny))
        options.cases = {name: replace(case, **tiny, ctx=8) for name, case in options.cases.items()}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="end within 3 minutes: less text and rounds")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes, to try the script out")
    parser.add_argument("--json", action="store_true", help="print figures, machine and versions as JSON, nothing else")
    plain = [*RATIOS, *LATENCIES, *PARTS]
    names = [*plain, *(f"{name}_{setting}" for name in RATIOS for setting in (*SETTINGS, *ON_CUDA))]
    shown = f"of {', '.join(plain)}; with _ctx1024 and so on appended, of that setting alone"
    parser.add_argument("--only", nargs="+", choices=names, metavar="FIGURE", help=shown)
    parser.add_argument("--rounds", type=int, help="rounds of every figure")
    parser.add_argument("--peers", nargs="+", default=[], metavar="PYTHON", help="of further peers; 'none' for no peer")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        peak_of(options.peak[0], Setting(**json.loads(options.peak[1])), Path(options.peak[2]))
        return
    sized(options)
    if missing := [python for python in options.peers if python != "none" and not shutil.which(python)]:
        parser.error(f"--peers: there is no python at {missing[0]}")
    asked = {c for name in options.settings for c in needed(wanted(options, name))}
    alone = options.peers == ["none"]
    there = peers.workers_for(asked - set(peers.PEERS) if alone else asked, [sys.executable, *options.peers])
    versions = {c: str(worker.version) for c, worker in there.items() if c in peers.PEERS}
    versions |= {name: metadata.version(name) for name in ("torch", "transformers")}
    where = {"machine": machine(options), "versions": versions | {"python": platform.python_version()}}
    if not options.json:
        print(where["machine"], ", ".join(f"{k} {v}" for k, v in versions.items()), sep="\n", flush=True)
    with tempfile.TemporaryDirectory(prefix="capture-", dir=options.folder) as folder:
        options.folder = Path(folder)
        figures = measure(options, there)
    for worker in there.values():
        worker.close()
    if options.json:
        print(json.dumps({"figures": figures, **where}, indent=1))


def machine(options: argparse.Namespace) -> str:
    """What it was measured on."""
    if options.device != "cuda":
        return machine_and_versions()[0]
    import torch

    return machine_and_versions(gpu=torch.cuda.get_device_name())[0]


if __name__ == "__main__":
    main()
