"""What one training step of a TopK SAE costs, beside SAELens and beside the one dense product it cannot do without.

    python benchmarks/sae_step.py [--quick] [--json] [--size D_IN D_SAE BATCH K] [--rounds N] [--peers all|none]

Figures (medians of per-round ratios of CPU seconds; each with its 95 % interval and an A/A row):

    topk_vs_saelens         SAELens' training TopK ÷ ours, with its default settings; at least 3
    topk_vs_saelens_sparse  the same with `use_sparse_activations=True`
    topk_vs_gemm            x @ W_enc alone ÷ ours: the share of the step that no exact TopK can avoid

A step is loss and backward, from weights without gradients to weights with them; the optimiser's step is the same for
everybody and is left out. All contenders hold the same weights and read the same batch, of random tokens none of whose
choices hangs on rounding. Before anything is timed, every loss and gradient must be equal to ours within 1e-5 of its
norm (SAELens' loss is a mean of squares: ours times the batch's variance), else the script ends with an error. `dense`
is the same loss by plain matrices and autograd; `auxk` is our step with 5 % of the latents dead. One thread.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import engine  # sets the number of threads, so before torch
import torch
from engine import SEED, interval, row
from torch import Tensor

SIZE = (768, 12288, 1024, 32)
BOUND = 3.0
CLOSE = 1e-5
DEAD = 0.05
SLOW = ("saelens_sparse", "dense")

Call = Callable[[], Any]
Contender = tuple[Any, Callable[[], Tensor], float]  # module, its loss, and what that is of ours


def ours(size: tuple[int, int, int, int], x: Tensor) -> Any:
    """A TopK SAE whose weights are far from any symmetry."""
    from interp.dictionaries.topk import TopKConfig, TopKSAE

    d_in, d_sae, _, k = size
    sae = TopKSAE(TopKConfig(d_in=d_in, d_sae=d_sae, k=k))
    sae.init_from(x, seed=SEED)
    with torch.no_grad():
        sae.W_enc.add_(torch.randn_like(sae.W_enc), alpha=0.3 / d_in**0.5)
        sae.b_enc.normal_(std=0.1)
    return sae


@torch.no_grad()
def clear_choices(sae: Any, tokens: Tensor, batch: int) -> Tensor:
    """The tokens whose k-th latent is furthest above the next: two ways of rounding choose the same ones."""
    pre = (tokens - sae.b_dec) @ sae.W_enc + sae.b_enc
    best = pre.topk(min(sae.cfg.k + 1, sae.cfg.d_sae), dim=-1).values
    return tokens[(best[:, -2:-1] - best[:, -1:])[:, 0].topk(batch).indices]


def dense_loss(sae: Any, x: Tensor) -> Tensor:
    """FVU, as one writes it down first."""
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    values, index = pre.topk(sae.cfg.k, dim=-1, sorted=False)
    latents = torch.zeros_like(pre).scatter(-1, index, values.relu())
    error = x - latents @ sae.W_dec - sae.b_dec
    return error.pow(2).sum() / (x - x.mean(0)).pow(2).sum()


def saelens(sae: Any, x: Tensor, *, sparse: bool) -> tuple[Any, Callable[[], Tensor]]:
    """SAELens' training SAE with the same weights, and its loss."""
    from sae_lens.saes.sae import TrainStepInput
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    cfg = TopKTrainingSAEConfig(
        d_in=sae.cfg.d_in,
        d_sae=sae.cfg.d_sae,
        k=sae.cfg.k,
        apply_b_dec_to_input=True,
        rescale_acts_by_decoder_norm=False,
        use_sparse_activations=sparse,
    )
    theirs = TopKTrainingSAE(cfg)
    theirs.load_state_dict(sae.state_dict())
    step = TrainStepInput(sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=1, is_logging_step=False)
    return theirs, lambda: theirs.training_forward_pass(step).loss


def contenders(size: tuple[int, int, int, int], peers: bool) -> tuple[dict[str, Contender], Call, Call]:
    """Everyone whose step is timed, the bare product, and our step with dead latents."""
    from interp.data.store import Batch

    d_in, d_sae, batch, _ = size
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    tokens, dead = torch.randn(batch + batch // 4 + 1, d_in), torch.rand(d_sae) < DEAD
    sae = ours(size, tokens)
    x = clear_choices(sae, tokens, batch)
    twin = ours(size, tokens)
    twin.load_state_dict(sae.state_dict())
    found: dict[str, Contender] = {
        "ours": (sae, lambda: sae.loss(Batch(x=x)).total, 1.0),
        "again": (twin, lambda: twin.loss(Batch(x=x)).total, 1.0),
        "dense": (twin, lambda: dense_loss(twin, x), 1.0),
    }
    if peers:
        variance = float((x - x.mean(0)).pow(2).sum()) / batch
        for name, sparse in (("saelens", False), ("saelens_sparse", True)):
            found[name] = (*saelens(sae, x, sparse=sparse), variance)
    weight = sae.W_enc.detach()
    auxk = stepping(sae, lambda: sae.loss(Batch(x=x), dead=dead).total)
    return found, lambda: x @ weight, auxk


def stepping(module: Any, loss: Callable[[], Tensor]) -> Call:
    """A step: gradients dropped, loss, backward."""

    def step() -> Tensor:
        module.zero_grad(set_to_none=True)
        total = loss()
        total.backward()
        return total

    return step


def check_equal(found: dict[str, Contender]) -> None:
    """End with an error unless everybody's loss and gradients are ours, times what they should be."""
    expected: dict[str, Tensor] = {}
    for name, (module, loss, factor) in found.items():
        total = stepping(module, loss)()
        values = {"loss": total.detach(), **{n: p.grad for n, p in module.named_parameters()}}
        values = {n: value.detach() / factor for n, value in values.items()}
        expected = expected or values
        for part, value in values.items():
            apart = float((value - expected[part]).norm() / expected[part].norm())
            if not apart <= CLOSE:
                sys.exit(f"{name}: its {part} is {apart:.1e} of its norm away from ours, more than {CLOSE:g}")
        module.zero_grad(set_to_none=True)


def cpu_seconds(call: Call) -> float:
    """CPU seconds of one call, of this process."""
    start = time.process_time()
    call()
    return time.process_time() - start


def measure(calls: dict[str, Call], rounds: int, slow_rounds: int) -> dict[str, list[float]]:
    """Ratios to our step, round by round; "seconds" holds our step itself."""
    for call in calls.values():
        call()
    draw = random.Random(SEED)
    with_slow = set(draw.sample(range(rounds), min(slow_rounds, rounds)))
    found: dict[str, list[float]] = {"seconds": []}
    for number in range(rounds):
        order = [name for name in calls if name not in SLOW or number in with_slow]
        draw.shuffle(order)
        times = {name: cpu_seconds(calls[name]) for name in order}
        base = times.pop("ours")
        found["seconds"].append(base)
        for name, seconds in times.items():
            found.setdefault(name, []).append(seconds / base)
        sys.stderr.write(f"\rsae_step {number + 1}/{rounds} ")
        sys.stderr.flush()
    sys.stderr.write("\n")
    return found


def report(found: dict[str, list[float]], size: tuple[int, int, int, int]) -> tuple[dict[str, float], list[str]]:
    """The figures and the lines that show them."""
    figures = {f"topk_vs_{name}": statistics.median(v) for name, v in found.items() if name != "seconds"}
    for name, values in found.items():
        if name in ("saelens", "gemm", "again"):
            figures[f"topk_vs_{name}_low"], figures[f"topk_vs_{name}_high"] = interval(values)
    d_in, d_sae, batch, k = size
    lines = [f"one step at d_in {d_in}, d_sae {d_sae}, batch {batch}, k {k}; equal losses and gradients"]
    if "saelens" in found:
        verdict = "held" if interval(found["saelens"])[1] >= BOUND else "MISSED"
        lines.append(f"topk_vs_saelens: at least {BOUND} {verdict} (by the interval's upper end)")
    lines.append(f"  baseline: our step, {1000 * statistics.median(found['seconds']):.2f} ms of CPU")
    lines += [row(name, values) for name, values in found.items() if name != "seconds"]
    return figures, lines


def main() -> None:
    """Parse, check, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="end within 3 minutes: fewer rounds, slow rows in two")
    parser.add_argument("--json", action="store_true", help="print figures, machine and versions as JSON, nothing else")
    parser.add_argument("--size", type=int, nargs=4, default=SIZE, metavar=("D_IN", "D_SAE", "BATCH", "K"))
    parser.add_argument("--rounds", type=int, help="rounds; by default 31, or 9 with --quick")
    parser.add_argument("--peers", choices=("all", "none"), default="all", help="'none' leaves SAELens out")
    options = parser.parse_args()
    size: tuple[int, int, int, int] = tuple(options.size)
    rounds = options.rounds or (9 if options.quick else 31)
    found, gemm, auxk = contenders(size, options.peers == "all")
    check_equal(found)
    calls = {name: stepping(module, loss) for name, (module, loss, _) in found.items()} | {"gemm": gemm, "auxk": auxk}
    figures, lines = report(measure(calls, rounds, 2 if options.quick else 9), size)
    names = ["torch", *(["sae-lens"] if options.peers == "all" else [])]
    versions = {name: metadata.version(name) for name in names} | {"python": platform.python_version()}
    machine = f"{engine._cpu()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}; one OpenMP thread"
    if options.json:
        print(json.dumps({"figures": figures, "machine": machine, "versions": versions}, indent=1))
    else:
        print("\n".join([machine, ", ".join(f"{k} {v}" for k, v in versions.items()), *lines]))


if __name__ == "__main__":
    main()
