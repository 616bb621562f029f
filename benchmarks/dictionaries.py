"""What it costs to train sparse dictionaries, beside SAELens and beside the products that nobody can do without.

    python benchmarks/dictionaries.py [--quick] [--json] [--only FIGURE …] [--peers all|none] [--device cuda]

Figures of one training step (forward, backward, optimiser, constraints), SAELens' seconds ÷ ours, at d_in 768, d_sae
12288, batch 1024, 32 active latents:

    topk_vs_saelens, batchtopk_vs_saelens     at least 3
    jumprelu_vs_saelens                       at least 1.5
    standard_vs_saelens                       half of all latents active, as early in training; at least 1.15
    standard_sparse_vs_saelens, gated_vs_saelens, gated_dense_vs_saelens, matryoshka_vs_saelens, auxk_vs_saelens
                                              no bound; matryoshka is BatchTopK with prefixes, auxk TopK with 5 % dead
    …_vs_floor                                matrix products alone ÷ ours: 1 for sparse steps, 5 or 7 for dense ones

and of whole trainings of a TopK SAE (k 32) at mid-depth of a random GPT-2 of 12 layers × d 384 with d_sae 32 · d, as
the config for GPT-2 small has it (on a GPU of its full width), or (small) of 12 layers × d 512 with d_sae 4096, where
the model takes most of the time whoever trains:

    main_job_vs_saelens_ctx256, _ctx1024, _small_ctx256
                                              model, shuffling and steps: SAELens' seconds ÷ ours for as many tokens;
                                              at least 1.8 at ctx 256 and 2.3 at ctx 1024, no bound for the small one
    main_job_amdahl_…                         the bare model alone ÷ ours: what a step of no cost would come to is 1
    eight_in_one_pass                         8 fits on one stream ÷ (model alone + 8 × steps alone); at most 1.05

The optimiser runs with a step size that changes nothing, so that every round is the same step. All contenders of a step
hold the same weights and read the same batch; in float64, every loss and gradient must first be equal to ours, else the
script ends with an error. Rounds are interleaved, in CPU seconds of one thread; with `--device cuda` in wall seconds
until the device is done. Each contender that trains a whole job has a process of its own.
"""

import argparse
import gc
import json
import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import engine  # noqa: F401  sets the number of threads, so before torch
import torch
from dictionaries_peers import EIGHT, Job, Worker, saelens_sae, saelens_trainer
from engine import SEED, Call, clocked, row
from figures import Found, interleaved, machine_and_versions, ratios_of
from torch import Tensor

Size = tuple[int, int, int]  # d_in, d_sae, batch
FULL, QUICK, TINY = (768, 12288, 1024), (512, 4096, 512), (32, 256, 64)
K, DEAD, STILL = 32, 0.05, 1e-12  # STILL: Adam's step size
CLOSE = 1e-6  # of the norm, in float64


@dataclass(frozen=True)
class Case:
    """A dictionary whose training step is timed.

    Args:
        kind: of `DictionaryOptions`, or "matryoshka".
        sparse: whether K latents are active per token, else what a random half comes to.
        products: dense ones that no such step can avoid.
        bound: what SAELens ÷ ours should be at least.
        dead: whether some latents are dead, so that AuxK is part of the step.
        differs: parameters whose gradient SAELens defines in another way.
    """

    kind: str
    sparse: bool = True
    products: int = 1
    bound: float | None = None
    dead: bool = False
    differs: tuple[str, ...] = ()

    @property
    def chooses(self) -> bool:
        """Whether a number of latents is set."""
        return self.kind in ("topk", "batchtopk", "matryoshka")


# SAELens lets the decoder learn from the gate's own reconstruction, where the paper and ours do not.
_DECODER = ("W_dec", "b_dec")
CASES = {
    "topk": Case("topk", bound=3.0),
    "batchtopk": Case("batchtopk", bound=3.0),
    "jumprelu": Case("jumprelu", bound=1.5),
    "standard": Case("standard", sparse=False, products=5, bound=1.15),
    "standard_sparse": Case("standard"),
    "gated": Case("gated", differs=_DECODER),
    "gated_dense": Case("gated", sparse=False, products=7, differs=_DECODER),
    "matryoshka": Case("matryoshka"),
    "auxk": Case("topk", dead=True),
}
# Half the width of configs/sae-gpt2-small-l8.yaml, in its proportions; then one whose dictionary costs next to nothing.
JOBS = {
    "ctx256": Job("gpt2", 12, 384, 8192, ctx=256, rows=8, blocks=0, d_sae=12288),
    "ctx1024": Job("gpt2", 12, 384, 8192, ctx=1024, rows=2, blocks=0, d_sae=12288),
    "small_ctx256": Job("gpt2", 12, 512, 8192, ctx=256, rows=8, blocks=0),
}
EIGHT_JOB = Job("gpt2", 12, 512, 8192, ctx=256, rows=8, blocks=0, train=16384)
EIGHT_BOUND = 1.05
JOB_BOUNDS = {"ctx256": 1.8, "ctx1024": 2.3}
FIGURES = [f"{name}_vs_saelens" for name in CASES] + [f"main_job_vs_saelens_{name}" for name in JOBS]


# -- one step -------------------------------------------------------------------------------------------------------


def our_sae(case: Case, size: Size, x: Tensor) -> Any:
    """A dictionary whose weights are far from any symmetry, with as many active latents as the case says."""
    from interp.dictionaries.options import DictionaryOptions

    d_in, d_sae, _ = size
    options: dict[str, Any] = {"kind": case.kind, "d_sae": d_sae, "k": K, "sparsity_warmup": 0}
    if case.kind == "matryoshka":
        options |= {"kind": "batchtopk", "prefixes": (d_sae // 16, d_sae // 8, d_sae // 4, d_sae // 2)}
    sae: Any = DictionaryOptions(**options).make(d_in).to(x.device)
    generator = torch.Generator().manual_seed(SEED)
    sae.init_from(x, seed=SEED)
    with torch.no_grad():
        sae.W_enc.add_(torch.randn(d_in, d_sae, generator=generator).to(x), alpha=0.3 / d_in**0.5)
        sae._bias.add_(torch.randn(d_sae, generator=generator).to(x), alpha=0.1)
        pre = (x - sae.b_dec) @ sae.W_enc + sae._bias
        if case.kind == "gated":
            sae.b_mag.copy_(sae._bias)
        if case.sparse and not case.chooses:
            least = pre.flatten().sort().values[-K * len(x)]
            if case.kind == "jumprelu":
                sae.threshold.fill_(least)
            else:
                sae._bias.sub_(least)
    return sae


def our_step(case: Case, sae: Any, x: Tensor) -> Call:
    """One step of `DictionaryFit`."""
    from interp.data.store import Batch
    from interp.train.config import TrainOptions
    from interp.train.trainer import DictionaryFit

    fit = DictionaryFit(sae, TrainOptions(tokens=10**9, batch_size=len(x), lr=STILL), seed=SEED)
    batch, dead = Batch(x=x), dead_latents(sae)
    if not case.dead:
        return lambda: fit.step(batch)
    fit.tokens = 2 * fit.options.dead_after_tokens
    last_fired = torch.where(dead, 0, fit.tokens)

    def step() -> None:
        fit.last_fired = last_fired
        fit.step(batch)

    return step


def saelens_step(case: Case, sae: Any, x: Tensor, *, sparse: bool = False) -> Call:
    """One step of SAELens' trainer."""
    theirs = saelens_sae(sae, case.kind, sparse=sparse)
    trainer, dead = saelens_trainer(theirs, iter(()), len(x), 10**9, lr=STILL), dead_latents(sae)

    def step() -> None:
        if case.dead:
            trainer.n_forward_passes_since_fired.masked_fill_(dead, 2.0 * trainer.cfg.dead_feature_window)
        trainer.step(x)

    return step


def dense_step(case: Case, sae: Any, x: Tensor) -> Call:
    """The same TopK step as one writes it down first: plain matrices and autograd, fused Adam."""
    adam = torch.optim.Adam(sae.parameters(), lr=STILL, fused=True)

    def step() -> None:
        pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
        values, index = pre.topk(sae.cfg.k, dim=-1, sorted=False)
        latents = torch.zeros_like(pre).scatter(-1, index, values.relu())
        error = x - latents @ sae.W_dec - sae.b_dec
        (error.pow(2).sum() / (x - x.mean(0)).pow(2).sum()).backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        adam.step()
        adam.zero_grad()

    return step


def products(case: Case, sae: Any, x: Tensor) -> Call:
    """The matrix products that a step of its kind needs: encoding, and where all latents count the others."""
    W_enc, W_dec = sae.W_enc.detach().clone(), sae.W_dec.detach().clone()

    def sparse() -> None:
        _ = x @ W_enc

    def dense() -> None:
        latents = x @ W_enc
        for _ in range((case.products - 3) // 2):
            _, _ = latents @ W_dec, x @ W_dec.T  # the reconstruction; what latents get of its gradient
        _, _ = latents.T @ x, x.T @ latents  # what decoder and encoder get

    return sparse if case.products == 1 else dense


def adam_alone(sae: Any) -> Call:
    """Clipping and fused Adam, on parameters of these sizes."""
    parameters = [torch.zeros_like(p, requires_grad=True) for p in sae.parameters()]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    adam = torch.optim.Adam(parameters, lr=STILL, fused=True)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()

    return step


def dead_latents(sae: Any) -> Tensor:
    """Which latents are dead where some are."""
    drawn = torch.rand(sae.cfg.d_sae, generator=torch.Generator().manual_seed(SEED))
    return (drawn < DEAD).to(sae.W_enc.device)


def check_equal(name: str, case: Case, sae: Any, x: Tensor) -> None:
    """End with an error unless SAELens' loss and gradients are ours, times what they should be, in float64."""
    from sae_lens.saes.sae import TrainStepInput

    from interp.data.store import Batch

    theirs, x = saelens_sae(sae, case.kind, dtype="float64"), x.double()
    ours = our_sae(case, (x.shape[1], sae.cfg.d_sae, len(x)), x.float())
    ours.load_state_dict(sae.state_dict())
    total = ours.double().loss(Batch(x=x)).total
    total.backward()
    weights = {key: value.value for key, value in theirs.get_coefficients().items()}
    step = TrainStepInput(
        sae_in=x, coefficients=weights, dead_neuron_mask=None, n_training_steps=1, is_logging_step=False
    )
    loss = theirs.training_forward_pass(step).loss
    loss.backward()
    # Theirs is a mean over tokens, and a sum over prefixes; ours a mean over prefixes, and where a number of latents
    # is set also a share of the variance.
    factor = 1.0 + len(sae.objective.prefixes)
    factor *= float((x - x.mean(0)).pow(2).sum()) / len(x) if sae.terms.loss == "fvu" else 1.0
    expected: dict[str, Any] = {"loss": total.detach(), **{n: p.grad for n, p in ours.named_parameters()}}
    found: dict[str, Any] = {"loss": loss.detach(), **{n: p.grad for n, p in theirs.named_parameters()}}
    if set(expected) != set(found):
        sys.exit(f"{name}: SAELens has gradients of {sorted(found)}, ours of {sorted(expected)}")
    for part in sorted(set(found) - set(case.differs)):
        apart = float((found[part] / factor - expected[part]).norm() / expected[part].norm().clamp_min(1e-300))
        if not apart <= CLOSE:
            sys.exit(f"{name}: SAELens' {part} is {apart:.1e} of its norm away from ours, more than {CLOSE:g}")


def active_of(sae: Any, x: Tensor) -> float:
    """Mean number of active latents per token in a training step."""
    from interp.data.store import Batch

    with torch.no_grad():
        return float(sae.loss(Batch(x=x)).l0)


def step_flops(case: Case, size: Size, active: float) -> float:
    """Floating-point operations of the products of a step: 2 B d N + 8 B k d, or 2 B d N of each dense one."""
    d_in, d_sae, batch = size
    one = 2.0 * batch * d_in * d_sae
    return case.products * one + (8.0 * batch * active * d_in if case.products == 1 else 0.0)


def run_step(name: str, options: argparse.Namespace) -> Found:
    """Measure one kind of step."""
    case, size, found = CASES[name], options.size, Found({}, [])
    d_in, d_sae, batch = size
    torch.manual_seed(SEED)
    x = torch.randn(batch, d_in).to(options.device)
    twins = {key: our_sae(case, size, x) for key in ("ours", "again")}
    sae, with_peers = twins["ours"], options.peers == "all"
    if with_peers and not case.dead:
        check_equal(name, case, sae, x)
    active = active_of(sae, x)
    calls = {key: our_step(case, twin, x) for key, twin in twins.items()}
    calls |= {"floor": products(case, sae, x), "adam": adam_alone(sae)}
    if with_peers:
        calls["saelens"] = saelens_step(case, sae, x)
    if name == "topk":
        calls["dense"] = dense_step(case, our_sae(case, size, x), x)
        if with_peers:
            calls["saelens_sparse"] = saelens_step(case, sae, x, sparse=True)
    clock = int(options.device == "cuda")
    wraps: dict[str, Callable[[], float]] = {
        key: lambda call=call: clocked(call, options.device)[clock]  # type: ignore[misc]
        for key, call in calls.items()
    }
    gc.collect()
    gc.freeze()  # what is imported need not be looked through before each call
    times = interleaved(wraps, options.rounds or (2 if options.tiny else 3 if options.quick else 15))
    gc.unfreeze()
    middle = {key: statistics.median(values) for key, values in times.items()}
    found.figures[f"{name}_seconds"] = middle["ours"]
    work = step_flops(case, size, active)
    found.lines += [
        f"\n{name}: one step at d_in {d_in}, d_sae {d_sae}, batch {batch}; {active:.1f} latents active per token",
        f"  ours {1000 * middle['ours']:.1f} ms, floor {1000 * middle['floor']:.1f} ms; {work / 1e9:.1f} GFLOP "
        f"in {case.products} dense product{'s' if case.products > 1 else ''} and its entries: "
        f"{work / middle['ours'] / 1e9:.0f} GFLOP/s",
    ]
    for key in times:
        if key not in ("ours", "floor", "saelens"):
            found.lines.append(row(f"{key} ÷ ours", ratios_of(times[key], times["ours"])))
            found.figures[f"{name}_{key}"] = statistics.median(ratios_of(times[key], times["ours"]))
    if with_peers:
        found.ratio(f"{name}_vs_saelens", ratios_of(times["saelens"], times["ours"]), case.bound)
        by_floor = found.figures[f"{name}_saelens_vs_floor"] = middle["saelens"] / middle["floor"]
        found.lines[-1] += f"; ÷ floor {by_floor:.3f}"
    found.ratio(f"{name}_vs_floor", ratios_of(times["floor"], times["ours"]))
    return found


# -- whole jobs -----------------------------------------------------------------------------------------------------


def run_jobs(job: Job, contenders: list[str], options: argparse.Namespace) -> tuple[dict[str, list[Any]], list[str]]:
    """Run a job by each contender, round by round, once they are warm; also who was left out, and why."""
    there, draw = options.workers, random.Random(SEED)
    for name in contenders:
        if name not in there:  # to try the script out, one process will do
            there[name] = next(iter(there.values())) if options.tiny and there else Worker()
    answers: dict[str, list[Any]] = {name: [] for name in contenders}
    rounds, skipped = options.rounds or (1 if options.tiny else 2 if options.quick else 5), {}
    for number in range(rounds):
        order = [name for name in contenders if name not in skipped]
        for name in draw.sample(order, len(order)):
            answer = there[name].ask(name, job.with_text())
            if "error" not in answer:
                answers[name].append(answer)
            elif name == "saelens":
                skipped[name] = answer["error"]
            else:
                sys.exit(f"{name} of a job: {answer['error']}")
        print(f"{', '.join(contenders)} at ctx {job.ctx}: {number + 1}/{rounds}", file=sys.stderr)
    found = {name: values for name, values in answers.items() if name not in skipped}
    return found, [f"  {name:<18}SKIPPED: {why}" for name, why in skipped.items()]


def seconds_of(answers: list[Any], options: argparse.Namespace) -> list[float]:
    """By the clock that counts."""
    return [float(answer["wall" if options.device == "cuda" else "cpu"]) for answer in answers]


def run_main_job(name: str, options: argparse.Namespace) -> Found:
    """Measure one whole training."""
    job, found = options.jobs[name], Found({}, [])
    contenders = [
        "lm",
        *([] if options.quick else ["lm_again"]),
        "ours",
        *(["saelens"] if options.peers == "all" else []),
    ]
    answers, skipped = run_jobs(job, contenders, options)
    times = {c: seconds_of(values, options) for c, values in answers.items()}
    found.lines += [
        f"\nmain_job at {name}: {job.n_layers} layers × d {job.d_model}, output of block {job.layer}; "
        f"{job.train} tokens in {job.steps} steps of {job.batch}, forwards of {job.rows} × {job.ctx}, "
        f"a buffer of {job.buffer}, d_sae {job.d_sae}, k {job.k}",
        f"  {'':<18}{'CPU s':>9}{'wall s':>9}{'tokens/s':>11}   by wall",
        *(job_line(c, job, values) for c, values in answers.items()),
        *skipped,
    ]
    if "lm_again" in times:
        found.lines.append(row("lm_again ÷ lm", ratios_of(times["lm_again"], times["lm"])))
    found.figures[f"tokens_per_s_{name}"] = job.train / statistics.median(v["wall"] for v in answers["ours"])
    share = ratios_of(times["lm"], times["ours"])
    found.ratio(f"main_job_amdahl_{name}", share)
    if "saelens" in times:
        found.ratio(f"main_job_vs_saelens_{name}", ratios_of(times["saelens"], times["ours"]), JOB_BOUNDS.get(name))
        most = statistics.median(ratios_of(times["saelens"], times["lm"]))
        found.figures[f"main_job_saelens_vs_lm_{name}"] = most
        found.lines[-1] += f"; with steps of no cost it would be {most:.3f}"
        found.lines.append(same_fvu(name, answers, found))
    return found


def job_line(contender: str, job: Job, answers: list[Any]) -> str:
    """What a contender took."""
    cpu, wall = (statistics.median(answer[clock] for answer in answers) for clock in ("cpu", "wall"))
    return f"  {contender:<18}{cpu:9.3f}{wall:9.3f}{job.train / wall:11.0f}"


def same_fvu(name: str, answers: dict[str, list[Any]], found: Found) -> str:
    """Both FVUs on held-out tokens, and whether they agree."""
    ours, theirs = (statistics.median(a["fvu"] for a in answers[c]) for c in ("ours", "saelens"))
    found.figures |= {f"main_job_fvu_{name}": ours, f"main_job_fvu_saelens_{name}": theirs}
    apart = ours / theirs - 1
    said = "they agree to 1 %" if abs(apart) <= 0.01 else "they do NOT agree to 1 %"
    return f"  FVU on held-out tokens: ours {ours:.4f}, SAELens {theirs:.4f}; {said} ({apart:+.2%})"


def run_eight_in_one_pass(options: argparse.Namespace) -> Found:
    """Eight fits on one stream, beside the model alone and eight times the steps of one fit alone."""
    job, found = options.eight_job, Found({}, [])
    answers, _ = run_jobs(job, ["lm", "step", "eight"], options)
    times = {c: seconds_of(values, options) for c, values in answers.items()}
    parts = [lm + EIGHT * step for lm, step in zip(times["lm"], times["step"], strict=True)]
    found.lines += [
        f"\neight_in_one_pass: {EIGHT} fits of d_sae {job.d_sae} by hand; {job.train} tokens of ctx {job.ctx}",
        f"  {'':<18}{'CPU s':>9}{'wall s':>9}{'tokens/s':>11}   by wall",
        *(job_line(c, job, values) for c, values in answers.items()),
        f"  FVU on held-out tokens of the first fit: {answers['eight'][-1]['fvu']:.4f}",
    ]
    found.ratio("eight_in_one_pass", ratios_of(times["eight"], parts), EIGHT_BOUND, most=True)
    alone = [EIGHT * (lm + step) for lm, step in zip(times["lm"], times["step"], strict=True)]
    found.figures["eight_in_one_pass_vs_alone"] = statistics.median(ratios_of(alone, times["eight"]))
    found.lines[-1] += f"; eight passes would take {found.figures['eight_in_one_pass_vs_alone']:.2f} times as long"
    return found


# -- the report -----------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Everything that was asked for; what is known is printed as it comes."""
    figures: dict[str, float] = {}
    runs: list[tuple[str, Callable[[], Found]]] = []
    for name in CASES:
        runs.append((f"{name}_vs_saelens", lambda name=name: run_step(name, options)))  # type: ignore[misc]
    for name in options.jobs:
        runs.append((f"main_job_vs_saelens_{name}", lambda name=name: run_main_job(name, options)))  # type: ignore[misc]
    runs.append(("eight_in_one_pass", lambda: run_eight_in_one_pass(options)))
    for figure, run in runs:
        if not options.only or figure in options.only:
            found = run()
            figures |= found.figures
            print("\n".join(found.lines), file=sys.stderr if options.json else sys.stdout, flush=True)
    return figures


def sized(options: argparse.Namespace) -> None:
    """Choose sizes by device and time."""
    options.size = tuple(options.size or (TINY if options.tiny else QUICK if options.quick else FULL))
    jobs = {name: replace(job, device=options.device) for name, job in {**JOBS, "eight": EIGHT_JOB}.items()}
    if options.device == "cuda" or options.quick or options.tiny:
        jobs.pop("small_ctx256")  # sizes are others there
    if options.device == "cuda":
        large: dict[str, Any] = {"d_model": 768, "d_sae": 24576, "batch": 4096, "buffer": 131072, "dtype": "bfloat16"}
        jobs = {name: replace(job, **large, rows=32768 // job.ctx, train=2**20) for name, job in jobs.items()}
    elif options.quick:
        # No fewer tokens than `train_dictionary` takes for its first weights.
        few = {"d_model": 256, "d_sae": 2048, "train": 16384, "buffer": 8192, "batch": 1024}
        jobs = {name: replace(job, **few) for name, job in jobs.items() if name != "ctx1024"}
    if options.tiny:
        small: dict[str, Any] = {"n_layers": 2, "d_model": 64, "d_vocab": 512, "d_sae": 256, "k": 8, "batch": 512}
        jobs = {name: replace(job, **small, rows=4, train=16384, buffer=4096) for name, job in jobs.items()}
        jobs.pop("ctx1024", None)
    options.eight_job = jobs.pop("eight")
    options.jobs = jobs


def main() -> None:
    """Parse, check, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="end within 3 minutes: smaller sizes, fewer rounds")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes, to try the script out")
    parser.add_argument("--json", action="store_true", help="print figures, machine and versions as JSON, nothing else")
    names = [*FIGURES, "eight_in_one_pass"]
    parser.add_argument("--only", nargs="+", choices=names, metavar="FIGURE", help=f"of {', '.join(names)}")
    parser.add_argument("--size", type=int, nargs=3, metavar=("D_IN", "D_SAE", "BATCH"), help="of steps")
    parser.add_argument("--rounds", type=int, help="rounds of every figure")
    parser.add_argument("--peers", choices=("all", "none"), default="all", help="'none' leaves SAELens out")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    sized(options)
    torch.set_num_threads(1)
    named = ["torch", "transformers", *(["sae-lens", "transformer-lens"] if options.peers == "all" else [])]
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else ""
    machine, versions = machine_and_versions(*named, gpu=gpu)
    if not options.json:
        print(machine, ", ".join(f"{k} {v}" for k, v in versions.items()), sep="\n", flush=True)
    options.workers = {}
    figures = measure(options)
    for worker in set(options.workers.values()):
        worker.close()
    if options.json:
        print(json.dumps({"figures": figures, "machine": machine, "versions": versions}, indent=1))


if __name__ == "__main__":
    main()
