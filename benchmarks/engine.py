"""What reading activations costs, beside the bare model and beside other toolkits.

    python benchmarks/engine.py [--quick] [--json] [--only FIGURE …] [--peers PYTHON]

Figures (medians of per-round ratios of CPU seconds; each with its 95 % interval and an A/A row):

    midlayer_vs_floor   one residual read at mid-depth ÷ the bare backbone cut off there; 12 layers × d 512, 8 × 256
    run_overhead        `hm.run(ids)` without reads ÷ `model(ids, use_cache=False)`; 12 layers × d 512, 1 × 256
    residuals_latency   every block's residual ÷ `model(ids)`; 12 layers × d 64, 1 × 8 tokens (batch × pos)
    import_s, help_s    CPU seconds of `import interp` and of `interp --help` in a warm process of their own

Rounds are interleaved: every contender once per round, in an order drawn anew. Everything runs on one thread, where CPU
time is what the latency would be on an idle core. Peers run in a worker process, so that what they patch stays there;
`--peers` names the python of another environment that has them. Models are random; the weights do not matter here.
"""

import argparse
import copy
import gc
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

Call = Callable[[], Any]
N_LAYERS, D_VOCAB, SEED = 12, 8192, 0
SHORTEST = 0.05  # seconds that one timing lasts at least: shorter calls are repeated


@dataclass(frozen=True)
class Case:
    """One figure: a model, its input and the residuals that are read.

    Args:
        d_model, batch, pos: sizes.
        layers: blocks whose resid_post is read; the mid-depth figure reads one and stops.
        baseline: what the ratios divide by.
        bound: what the figure should not exceed; it holds when the interval's lower end does.
    """

    d_model: int
    batch: int
    pos: int
    layers: tuple[int, ...]
    baseline: str
    bound: float


CASES = {
    "midlayer_vs_floor": Case(512, 8, 256, (N_LAYERS // 2 - 1,), "bare backbone cut after block 5", 1.05),
    "run_overhead": Case(512, 1, 256, (), "model(ids, use_cache=False)", 1.02),
    "residuals_latency": Case(64, 1, 8, tuple(range(N_LAYERS)), "model(ids)", 1.05),
}
PROCESSES = {
    "import_s": ("import interp", 0.3),
    "help_s": ("import sys; from interp.cli.main import main; sys.exit(main(['--help']))", 0.6),
}


def setup(case: Case) -> tuple[Any, Any]:
    """A random GPT-2 of the case's size, and ids [batch pos]."""
    import torch
    import transformers

    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    config = transformers.GPT2Config(
        vocab_size=D_VOCAB, n_layer=N_LAYERS, n_head=8, n_embd=case.d_model, n_positions=case.pos, **special
    )
    ids = torch.randint(1, D_VOCAB, (case.batch, case.pos))
    return transformers.GPT2LMHeadModel(config).eval().requires_grad_(False), ids


# -- contenders -----------------------------------------------------------------------------------------------------


def bare(case: Case, model: Any, ids: Any) -> Call:
    """The baseline: transformers alone."""
    import torch

    twin = copy.deepcopy(model)
    if len(case.layers) == 1:
        twin = twin.transformer
        twin.h = twin.h[: case.layers[0] + 1]
        twin.ln_f = torch.nn.Identity()
    arguments = {} if len(case.layers) > 1 else {"use_cache": False}
    return lambda: twin(ids, **arguments)


def plain_hooks(case: Case, model: Any, ids: Any) -> Call:
    """The floor of reading everything: one hand-made hook per block that copies the residual."""
    twin, kept = copy.deepcopy(model), []
    for layer in case.layers:
        twin.transformer.h[layer].register_forward_hook(
            lambda module, args, out: kept.append((out[0] if isinstance(out, tuple) else out).detach().clone())
        )

    def call() -> Any:
        kept.clear()
        return twin(ids)

    return call


def ours(case: Case, model: Any, ids: Any) -> Call:
    """`hm.run`."""
    from interp import HookManager

    hm = HookManager.load(model)
    reads = "*.resid_post" if len(case.layers) == N_LAYERS else [f"{layer}.resid_post" for layer in case.layers]
    return lambda: hm.run(ids, read=reads)


def transformer_lens(case: Case, model: Any, ids: Any) -> Call:
    """`TransformerBridge.run_with_cache`, stopping where it can."""
    from interp.core.bridge import to_transformer_lens

    bridge = to_transformer_lens(model, None)
    if not case.layers:
        return lambda: bridge(ids)
    names = [f"blocks.{layer}.hook_resid_post" for layer in case.layers]
    stop = {} if case.layers[-1] == N_LAYERS - 1 else {"stop_at_layer": case.layers[-1] + 1}
    return lambda: bridge.run_with_cache(ids, names_filter=names, **stop)[1][names[-1]]


def nnsight(case: Case, model: Any, ids: Any) -> Call:
    """A trace that saves block outputs, stopping after the last."""
    from nnsight import NNsight

    lm = NNsight(copy.deepcopy(model))
    last = case.layers[-1] if case.layers else N_LAYERS

    def call() -> Any:
        kept: list[Any] = []
        with lm.trace(ids) as tracer:
            for layer in case.layers:
                kept.append(lm.transformer.h[layer].output.save())
            if last < N_LAYERS - 1:
                tracer.stop()
            kept.append(lm.output.save())
        return kept

    return call


def interp_engine(case: Case, model: Any, ids: Any) -> Call:
    """interp-engine's eager backend."""
    import transformers
    from interp_engine import Address, capture
    from interp_engine.model import EagerModel
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(D_VOCAB)}, unk_token="w0"))
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "w0")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)
    engine = EagerModel("gpt2", hf_model=copy.deepcopy(model), tokenizer=tokenizer)
    points = [Address("resid_post", layer) for layer in case.layers]
    return lambda: capture(engine, ids, points)


PEERS = {"transformer_lens": transformer_lens, "nnsight": nnsight, "interp_engine": interp_engine}
DISTRIBUTIONS = {"transformer_lens": "transformer-lens", "nnsight": "nnsight", "interp_engine": "interp-engine"}


# -- timing ---------------------------------------------------------------------------------------------------------


def cpu_seconds(call: Call, repeats: int) -> float:
    """CPU seconds per call, of this process."""
    import torch

    with torch.no_grad():
        start = time.process_time()
        for _ in range(repeats):
            call()
        return (time.process_time() - start) / repeats


def interval(values: list[float]) -> tuple[float, float]:
    """The 95 % interval of the median by order statistics; the whole range where there are fewer than six values."""
    values, n = sorted(values), len(values)
    outside, rank = 0.0, 0
    while rank < n // 2:
        outside += math.comb(n, rank) / 2**n
        if outside > 0.025:
            break
        rank += 1
    low = max(rank - 1, 0)
    return values[low], values[n - 1 - low]


class Worker:
    """Peers in a process of their own, timed when told to."""

    def __init__(self, python: str) -> None:
        command = [python, str(Path(__file__).resolve()), "--worker"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.versions: dict[str, str] = self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline() or '{"error": "the worker ended"}')

    def time(self, figure: str, peer: str, repeats: int) -> float:
        """CPU seconds per call of a peer; NaN where it fails, with the reason on stderr."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([figure, peer, repeats]) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        if "error" in answer:
            sys.stderr.write(f"{peer} at {figure}: {answer['error']}\n")
        return float(answer.get("seconds", math.nan))

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def clocked(call: Call, device: str) -> tuple[float, float, Any]:
    """CPU and wall seconds of a call, until the device is done, and what it gave."""
    import torch

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    gc.collect()
    wait()
    wall, cpu = time.perf_counter(), time.process_time()
    gave = call()
    wait()
    return time.process_time() - cpu, time.perf_counter() - wall, gave


def answering() -> Callable[[Any], None]:
    """How a worker answers: a JSON line on what is stdout now; what libraries print there goes to stderr."""
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(answer: Any) -> None:
        channel.write(json.dumps(answer) + "\n")
        channel.flush()

    return say


def work() -> None:
    """The worker's loop: which peers are here, then one timing per line."""
    say = answering()
    versions = {}
    for peer, distribution in DISTRIBUTIONS.items():
        try:
            versions[peer] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    say(versions)
    calls: dict[tuple[str, str], Call] = {}
    for line in sys.stdin:
        figure, peer, repeats = json.loads(line)
        try:
            if (figure, peer) not in calls:
                calls[figure, peer] = PEERS[peer](CASES[figure], *setup(CASES[figure]))
                cpu_seconds(calls[figure, peer], 1)
            say({"seconds": cpu_seconds(calls[figure, peer], repeats)})
        except Exception as error:  # noqa: BLE001 (whatever a peer raises is its result)
            say({"error": f"{type(error).__name__}: {str(error)[:200]}"})


def measure(figure: str, rounds: int, worker: Worker | None, peer_rounds: int) -> dict[str, list[float]]:
    """Ratios to the baseline, round by round, by contender; "seconds" holds the baseline itself."""
    case = CASES[figure]
    model, ids = setup(case)
    calls = {"baseline": bare(case, model, ids), "again": bare(case, model, ids), "interp": ours(case, model, ids)}
    if len(case.layers) == N_LAYERS:
        calls["plain_hooks"] = plain_hooks(case, model, ids)
    for call in calls.values():
        cpu_seconds(call, 2)
    repeats = max(1, math.ceil(SHORTEST / cpu_seconds(calls["baseline"], 1)))
    draw = random.Random(SEED)
    with_peers = set(draw.sample(range(rounds), min(peer_rounds, rounds)))
    peers = list(worker.versions) if worker is not None else []
    found: dict[str, list[float]] = {"seconds": []}
    for number in range(rounds):
        order = [*calls, *(peers if number in with_peers else [])]
        draw.shuffle(order)
        times = {}
        for name in order:
            if name in calls:
                times[name] = cpu_seconds(calls[name], repeats)
            elif worker is not None:
                times[name] = worker.time(figure, name, repeats)
        base = times.pop("baseline")
        found["seconds"].append(base)
        for name, seconds in times.items():
            if not math.isnan(seconds):
                found.setdefault(name, []).append(seconds / base)
        sys.stderr.write(f"\r{figure} {number + 1}/{rounds} ")
        sys.stderr.flush()
    sys.stderr.write("\n")
    return found


def process_seconds(code: str, rounds: int) -> list[float]:
    """CPU seconds (user + system) of a fresh python that runs a line, after one that warms the caches."""
    import resource

    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    seconds = []
    for _ in range(rounds + 1):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], env=environment, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return seconds[1:]


# -- the report -----------------------------------------------------------------------------------------------------


def row(name: str, values: list[float], unit: str = "") -> str:
    low, high = interval(values)
    return f"  {name:<18}{statistics.median(values):8.3f}{unit}  [{low:.3f}, {high:.3f}]  {len(values)} rounds"


def run_case(figure: str, options: argparse.Namespace, worker: Worker | None) -> tuple[dict[str, float], list[str]]:
    """Measure one ratio; return its figures and the lines that show it."""
    rounds = options.rounds or (7 if options.quick and figure == "midlayer_vs_floor" else 15 if options.quick else 31)
    found = measure(figure, rounds, worker, min(rounds, 2 if options.quick else 9))
    case = CASES[figure]
    figures, low = {figure: statistics.median(found["interp"])}, interval(found["interp"])[0]
    figures |= {f"{figure}_low": low, f"{figure}_high": interval(found["interp"])[1]}
    figures |= {f"{figure}_{name}": statistics.median(v) for name, v in found.items() if name != "interp"}
    verdict = "held" if low <= case.bound else "MISSED"
    lines = [
        f"{figure}: bound {case.bound} {verdict} (by the interval's lower end)",
        f"  baseline: {case.baseline}, {1000 * statistics.median(found['seconds']):.2f} ms of CPU",
        *(row(name, values) for name, values in found.items() if name != "seconds"),
    ]
    return figures, lines


def run_processes(figure: str, options: argparse.Namespace) -> tuple[dict[str, float], list[str]]:
    """Measure one start-up time beside that of python itself."""
    code, bound = PROCESSES[figure]
    rounds = options.rounds or (5 if options.quick else 15)
    seconds, floor = process_seconds(code, rounds), process_seconds("pass", rounds)
    verdict = "held" if interval(seconds)[0] <= bound else "MISSED"
    lines = [f"{figure}: bound {bound} s {verdict}", row("interp", seconds, " s"), row("python alone", floor, " s")]
    return {figure: statistics.median(seconds), f"{figure}_python": statistics.median(floor)}, lines


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="end within 3 minutes: fewer rounds, peers in two of them")
    parser.add_argument("--json", action="store_true", help="print figures, machine and versions as JSON, nothing else")
    parser.add_argument("--only", nargs="+", choices=[*CASES, *PROCESSES], default=[*CASES, *PROCESSES])
    parser.add_argument("--rounds", type=int, help="rounds of every figure")
    parser.add_argument("--peers", default=sys.executable, help="python with the peers in it; 'none' leaves them out")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work()
        return
    ratios = [name for name in options.only if name in CASES]
    worker = Worker(options.peers) if options.peers != "none" and ratios else None
    figures: dict[str, float] = {}
    lines: list[str] = []
    for name in options.only:
        more, shown = run_case(name, options, worker) if name in CASES else run_processes(name, options)
        figures |= more
        lines += shown
    versions = {name: metadata.version(name) for name in ("torch", "transformers")}
    versions |= {"python": platform.python_version(), **(worker.versions if worker is not None else {})}
    if worker is not None:
        worker.close()
    machine = f"{_cpu()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}; one OpenMP thread"
    if options.json:
        print(json.dumps({"figures": figures, "machine": machine, "versions": versions}, indent=1))
    else:
        print("\n".join([machine, ", ".join(f"{k} {v}" for k, v in versions.items()), *lines]))


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


if __name__ == "__main__":
    main()
