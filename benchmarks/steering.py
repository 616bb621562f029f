"""What steering costs: tokens per second of a steered generation beside the model's own.

    python benchmarks/steering.py [--quick] [--json] [--only FIGURE …]

Figures:

    steered_mid_b1, steered_mid_b8   tokens/s of `hm.generate` with a vector added at mid-depth to what shapes the
                                     answer ÷ tokens/s of the unsteered model's own `generate` with the same arguments
                                     and KV cache; GPT-2 small's shape, 1 and 8 prompts of 16 tokens, 64 new ones
    steered_all_b1, steered_all_b8   the same with a vector at every layer
    …_aa                             the unsteered model's ÷ its own: what the measurement itself makes of nothing

Rounds are interleaved in an order drawn anew; medians of per-round ratios with their 95 % interval. CPU seconds on one
thread, where they are what the latency would be on an idle core. Weights are random. `aie_speedup` is in
steering_aie.py.
"""

import argparse
import contextlib
import json
import sys
import time
from typing import Any

import torch
from engine import SEED  # sets the number of threads, so before torch
from figures import Found, interleaved, machine_and_versions, ratios_of
from patching import model
from steering_aie import figures as aie_figures

LEAST = 0.95
PROMPT, NEW = 16, 64


def generation_figures(rounds: int, batches: tuple[int, ...]) -> Found:
    """Time steered generations beside the bare model's."""
    from interp.core.direction import Direction
    from interp.core.manager import HookManager
    from interp.core.where import Where

    bare = model()
    hm = HookManager.load(bare)
    draw = torch.Generator().manual_seed(SEED)
    where = Where.last_prompt() | Where.generated()
    sites = [f"{layer}.resid_post" for layer in range(hm.n_layers)]
    vectors = {site: torch.randn(hm.d_model, generator=draw) * 0.1 for site in sites}
    direction = Direction.of(hm, vectors)
    cases = {"mid": direction.at(sites[hm.n_layers // 2]), "all": direction}
    result = Found({}, [])
    for batch in batches:
        ids = torch.randint(1, 50000, (batch, PROMPT), generator=draw)
        own = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

        def plain(ids: torch.Tensor = ids, own: dict[str, Any] = own) -> float:
            begin = time.process_time()
            with torch.no_grad():
                made = bare.generate(ids, attention_mask=torch.ones_like(ids), **own)
            assert made.shape[1] == PROMPT + NEW
            return ids.shape[0] * NEW / (time.process_time() - begin)

        def steered(name: str, ids: torch.Tensor = ids) -> float:
            begin = time.process_time()
            made = hm.generate(
                ids,
                max_new_tokens=NEW,
                write=cases[name].as_interventions(where=where),
                generation_kwargs={"eos_token_id": None},
            )
            assert made.tokens is not None and made.tokens.shape[1] == PROMPT + NEW
            return ids.shape[0] * NEW / (time.process_time() - begin)

        calls = {"plain": plain, "again": plain} | {name: lambda name=name: steered(name) for name in cases}
        speeds = interleaved(calls, rounds)
        for name in cases:
            result.ratio(f"steered_{name}_b{batch}", ratios_of(speeds[name], speeds["plain"]), LEAST)
        result.ratio(f"steered_b{batch}_aa", ratios_of(speeds["again"], speeds["plain"]))
        middle = sorted(speeds["plain"])[rounds // 2]
        result.lines.append(f"  unsteered, {batch} prompts: {middle:.1f} tokens/s")
    return result


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, one prompt alone")
    parser.add_argument("--json", action="store_true", help="print figures, machine and versions as JSON, nothing else")
    known = ["steered_generate", "aie_speedup"]
    parser.add_argument("--only", nargs="+", choices=known, metavar="FIGURE", help=f"of {', '.join(known)}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine, versions = machine_and_versions("torch", "transformers")
    if not options.json:
        print(machine, ", ".join(f"{k} {v}" for k, v in versions.items()), sep="\n", flush=True)
    figures: dict[str, float] = {}
    for name in options.only or known:
        with contextlib.redirect_stdout(sys.stderr):
            if name == "steered_generate":
                found = generation_figures(5 if options.quick else 6, (1,) if options.quick else (1, 8))
            else:
                found = aie_figures(quick=options.quick)
        figures |= found.figures
        print("\n" + "\n".join(found.lines), file=sys.stderr if options.json else sys.stdout, flush=True)
    if options.json:
        print(json.dumps({"figures": figures, "machine": machine, "versions": versions}, indent=1))


if __name__ == "__main__":
    main()
