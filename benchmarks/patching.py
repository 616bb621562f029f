"""What an exact patching sweep costs, beside TransformerLens' loop of one forward per cell.

    python benchmarks/patching.py [--quick] [--json] [--only FIGURE …]

Figures:

    sweep_b1, sweep_b8   every layer × position × head of z, GPT-2 small's shape, 15 tokens, 1 and 8 prompts: wall
                         seconds of `transformer_lens.patching` (on its bridge, over the same weights) ÷ ours
    …_cpu                the same in CPU seconds of both threads
    sweep_max_error      the largest difference of a cell between the two ÷ max(1, the largest logit)
    eap_bytes_ratio      edge attribution: bytes of difference tensors of the published form ÷ ours; `eap_time_ratio`
                         the CPU seconds (patching_eap.py)

The loop is timed on seeded cells, as many in every layer, between the waves of our sweep, and scaled to all 2160; each
figure has the 95 % interval over those cells. `_skipping` is the same where the prompts differ from token 5 on, so that
patches before it change nothing and are not run. Beside each ratio stands that of multiplications alone. Weights are
random; two threads.
"""

import argparse
import contextlib
import io
import json
import random
import statistics
import sys
import time
from typing import Any

import torch
from engine import SEED  # sets the number of threads, so before torch
from figures import Found, machine_and_versions
from patching_eap import eap_figures

BOUNDS = {"sweep_b1": 10.0, "sweep_b8": 4.0}
MOST_ERROR = 1e-5
LENGTH, DIFFERS, RIGHT, WRONG = 15, 5, 1234, 4321


def model() -> Any:
    """GPT-2 small's shape, random weights."""
    import transformers

    torch.manual_seed(SEED)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()


class Theirs:
    """TransformerLens' own function, one cell at a time."""

    def __init__(self, hm: Any, clean: torch.Tensor, corrupted: torch.Tensor) -> None:
        import pandas as pd
        from transformer_lens import patching

        self.frame, self.patching = pd.DataFrame, patching
        self.bridge, self.corrupted = hm.to_transformer_lens(), corrupted
        with torch.no_grad():
            self.cache = self.bridge.run_with_cache(clean)[1]

    def cell(self, layer: int, pos: int, head: int) -> float:
        """The mean logit difference with one head's output at one position patched."""
        index = self.frame([[layer, pos, head]], columns=["layer", "pos", "head"])
        with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
            found = self.patching.generic_activation_patch(
                self.bridge,
                self.corrupted,
                self.cache,
                lambda logits: (logits[:, -1, RIGHT] - logits[:, -1, WRONG]).mean(),
                self.patching.layer_pos_head_vector_patch_setter,
                "z",
                index_df=index,
            )
        return float(found[0])


def our_sweep(hm: Any, clean: torch.Tensor, corrupted: torch.Tensor) -> Any:
    """The same sweep, nothing left out; what both sides share (the two base runs' activations) is read first."""
    from interp.core.metrics import Metric
    from interp.core.sweep import Sweep
    from interp.core.sweep_cells import Cells

    sites = [f"{layer}.z" for layer in range(hm.n_layers)]
    source = hm.run(clean, read=sites)
    columns = torch.zeros(LENGTH * hm.n_heads, *clean.shape, dtype=torch.bool)
    for cell in range(len(columns)):
        columns[cell, :, cell // hm.n_heads] = True
    heads = torch.arange(hm.n_heads).repeat(LENGTH)
    cells = [Cells.replacing(site, source[site], columns, heads=heads) for site in sites]
    metric = Metric("diff", lambda logits, rows: logits[:, 0] - logits[:, 1], len(clean), torch.tensor([RIGHT, WRONG]))
    return Sweep(hm, corrupted, cells, [metric])


class Clock:
    """Wall and CPU seconds, by name."""

    def __init__(self) -> None:
        self.spent: dict[str, list[tuple[float, float]]] = {}

    def time(self, name: str, call: Any) -> Any:
        """Call, and note how long it took."""
        wall, cpu = time.perf_counter(), time.process_time()
        result = call()
        self.spent.setdefault(name, []).append((time.perf_counter() - wall, time.process_time() - cpu))
        return result

    def of(self, *names: str, cpu: bool = False) -> list[float]:
        """The seconds of each call of these names."""
        return [seconds[cpu] for name in names for seconds in self.spent.get(name, [])]


def run_case(hm: Any, batch: int, per_layer: int) -> Found:
    """Time one batch size."""
    draw = torch.Generator().manual_seed(SEED + batch)
    clean, corrupted = (torch.randint(1, 50000, (batch, LENGTH), generator=draw) for _ in range(2))
    theirs, order, clock = Theirs(hm, clean, corrupted), random.Random(SEED), Clock()
    layers = [layer for layer in range(hm.n_layers) for _ in range(per_layer)]
    left = [(layer, order.randrange(LENGTH), order.randrange(hm.n_heads)) for layer in layers]
    order.shuffle(left)
    theirs.cell(*left[0])
    hm.run(corrupted, logits="last")
    sweep = clock.time("begin", lambda: our_sweep(hm, clean, corrupted))
    waves, values, found = sweep.finished(), torch.full((len(sweep),), torch.nan), {}
    done, per_wave = clock.time("wave", lambda: next(waves)), max(1, len(left) // LENGTH)
    starts = []
    while done is not None or left:
        for cell in [left.pop() for _ in range(min(per_wave, len(left)) if done is not None else len(left))]:
            found[cell] = clock.time("theirs", lambda cell=cell: theirs.cell(*cell))
        if done is not None:
            values[done.cells] = done.values[0].mean(1)
            starts.append(int(done.cells[0]) // hm.n_heads % LENGTH)
            done = clock.time("wave", lambda: next(waves, None))
    clock.spent["early"], clock.spent["late"] = [], []
    for start, seconds in zip(starts, clock.spent["wave"], strict=False):  # the last call found no wave
        clock.spent["late" if start >= DIFFERS else "early"].append(seconds)
    return report(hm, sweep, batch, clock, (values, found))


def report(hm: Any, sweep: Any, batch: int, clock: Clock, cells: Any) -> Found:
    """The figures of one batch size."""
    values, found = cells
    name, result = f"sweep_b{batch}", Found({}, [])
    skipped = sum(range(1, LENGTH + 1)) / sum(range(1, LENGTH - DIFFERS + 1))
    whole = (name, ("begin", "early", "late"), 1.0)
    for label, parts, factor in (whole, (f"{name}_skipping", ("begin", "late"), skipped)):
        for cpu in (False, True):
            draw, seconds, mine = random.Random(SEED), clock.of("theirs", cpu=cpu), sum(clock.of(*parts, cpu=cpu))
            means = sorted(statistics.mean(draw.choices(seconds, k=len(seconds))) for _ in range(1000))
            mean = statistics.mean(seconds)
            low, middle, high = (len(sweep) * m / mine for m in (means[25], mean, means[974]))
            full = f"{label}_cpu" if cpu else label
            result.figures |= {full: middle, f"{full}_low": low, f"{full}_high": high}
            bound = BOUNDS.get(full)
            held = "" if bound is None else f" at least {bound:g} {'held' if high >= bound else 'MISSED'}"
            result.lines.append(
                f"{full}:{held}\n  {middle:.1f}  [{low:.1f}, {high:.1f}]  over {len(seconds)} cells; ours "
                f"{mine:.1f} s, the loop {len(sweep) * mean:.0f} s ({mean:.3f} s a cell); multiplications alone "
                f"{sweep.flop_factor() * factor:.1f}"
            )
    at = {cell: values[(cell[0] * LENGTH + cell[1]) * hm.n_heads + cell[2]] for cell in found}
    largest = max(1.0, float(hm.run(sweep.tokens, logits="last").logits.abs().max()))
    error = max(abs(float(at[c]) - found[c]) for c in found) / largest
    result.figures["sweep_max_error"] = error
    result.lines.append(
        f"  {sweep.plan} plan; largest difference of {len(found)} cells ÷ max(1, largest logit): {error:.1e}, at most "
        f"{MOST_ERROR:g} {'held' if error <= MOST_ERROR else 'MISSED'}"
    )
    return result


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one prompt alone")
    parser.add_argument("--json", action="store_true", help="print figures, machine and versions as JSON, nothing else")
    known = [*BOUNDS, "eap"]
    parser.add_argument("--only", nargs="+", choices=known, metavar="FIGURE", help=f"of {', '.join(known)}")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine, versions = machine_and_versions("torch", "transformers", "transformer-lens")
    machine = machine.replace("one OpenMP thread", f"{options.threads} OpenMP threads")
    if not options.json:
        print(machine, ", ".join(f"{k} {v}" for k, v in versions.items()), sep="\n", flush=True)
    from interp.core.manager import HookManager

    figures: dict[str, float] = {}
    for name in options.only or (["sweep_b1"] if options.quick else known):
        with contextlib.redirect_stdout(sys.stderr):
            if name == "eap":
                found = eap_figures()
            else:
                found = run_case(HookManager.load(model()), int(name.removeprefix("sweep_b")), per_layer=5)
        error = max(figures.get("sweep_max_error", 0.0), found.figures.get("sweep_max_error", 0.0))
        figures |= found.figures | {"sweep_max_error": error}
        print("\n" + "\n".join(found.lines), file=sys.stderr if options.json else sys.stdout, flush=True)
    if options.json:
        print(json.dumps({"figures": figures, "machine": machine, "versions": versions}, indent=1))


if __name__ == "__main__":
    main()
