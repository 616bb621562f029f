"""What the effects of all heads take beside one forward per head and trial, at GPT-2 small's shape.

The loop is the published one: for each trial and head one forward of the plain model with batch 1 and a hook on the
output projection that puts the head's mean in its place at the last token. It is timed on a drawn sample of heads and
scaled. Both give the same probabilities, which is checked first, and the same means go into both.

    python benchmarks/steering_aie.py [--quick]
"""

import random
import sys
import time
from collections.abc import Callable
from typing import Any

import engine  # noqa: F401  sets the number of threads, so before torch
import torch
from figures import Found, interleaved, ratios_of
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from interp.core.manager import HookManager
from interp.core.metrics import Metric
from interp.core.sweep import Sweep
from interp.core.text import Tokens
from interp.steering.function_vectors.effects import head_cells

LAYERS, HEADS, D, POS = 12, 12, 768, 80
SAMPLE, SEED = 6, 0


def model() -> HookManager:
    """GPT-2 small's shape with random weights, gains and biases away from their defaults."""
    torch.manual_seed(SEED)
    made = GPT2LMHeadModel(GPT2Config(n_layer=LAYERS, n_head=HEADS, n_embd=D, bos_token_id=0, eos_token_id=0)).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim == 1 or "attn.c_attn" in name:
                parameter += 0.05 * torch.randn(parameter.shape)
    return HookManager.load(made)


def prompts(trials: int) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts of ten shots' length [trial pos], answers [trial], and a mean for each head [layer head d_head]."""
    draw = torch.Generator().manual_seed(SEED + 1)
    ids = torch.randint(1, 50_000, (trials, POS), generator=draw)
    answers = torch.randint(1, 50_000, (trials,), generator=draw)
    return ids, answers, 0.3 * torch.randn(LAYERS, HEADS, D // HEADS, generator=draw)


def ours(hm: HookManager, ids: Tensor, answers: Tensor, z: Tensor) -> Tensor:
    """Probabilities [trial layer head] through the sweep."""

    def of(logits: Tensor, rows: Tensor) -> Tensor:
        return logits.log_softmax(-1).gather(-1, answers[rows][:, None])[:, 0]

    tokens = Tokens(ids, torch.ones_like(ids, dtype=torch.bool))
    sweep = Sweep(hm, tokens, head_cells(hm, tokens, z), [Metric("log_prob", of, len(ids))])
    found = torch.full((len(sweep), len(ids)), torch.nan)
    for done in sweep:
        found[done.cells] = done.values[0]
    return found.T.unflatten(1, (LAYERS, HEADS)).exp()


@torch.no_grad()
def one_by_one(plain: Any, ids: Tensor, answers: Tensor, z: Tensor, heads: list[tuple[int, int]]) -> Tensor:
    """Probabilities [trial head] of some heads, one forward each."""
    found, size = torch.zeros(len(ids), len(heads)), D // HEADS
    for n, (layer, head) in enumerate(heads):

        def put(module: Any, args: tuple[Tensor], layer: int = layer, head: int = head) -> tuple[Tensor]:
            x = args[0].clone()
            x[:, -1, head * size : (head + 1) * size] = z[layer, head]
            return (x,)

        handle = plain.transformer.h[layer].attn.c_proj.register_forward_pre_hook(put)
        for trial in range(len(ids)):
            logits = plain(ids[trial : trial + 1], use_cache=False).logits[0, -1]
            found[trial, n] = logits.softmax(-1)[answers[trial]]
        handle.remove()
    return found


def figures(rounds: int = 3, quick: bool = False) -> Found:
    """Measure `aie_speedup`, the loop ÷ ours.

    Args:
        rounds: rounds of the timing, after one that is not counted.
        quick: 8 trials, not 25; the loop is timed on 2 of them, not 4.
    """
    hm = model()
    n_trials, trials = (8, 2) if quick else (25, 4)
    ids, answers, z = prompts(n_trials)
    every = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
    sample = random.Random(SEED).sample(every, SAMPLE)
    mine = ours(hm, ids, answers, z)
    wanted = one_by_one(hm.model, ids[:trials], answers[:trials], z, sample)
    got = torch.stack([mine[:trials, layer, head] for layer, head in sample], 1)
    off = float(((got - wanted) / wanted).abs().max())
    if not off < 1e-3:
        raise SystemExit(f"the probabilities are not the same: off by {off:.1e} of themselves")

    def timed(call: Callable[[], Any], times: float = 1.0) -> Callable[[], float]:
        def measure() -> float:
            start = time.process_time()
            call()
            return times * (time.process_time() - start)

        return measure

    scale = len(every) / len(sample) * n_trials / trials
    calls = {
        "loop": timed(lambda: one_by_one(hm.model, ids[:trials], answers[:trials], z, sample), scale),
        "ours": timed(lambda: ours(hm, ids, answers, z)),
    }
    times = interleaved(calls, rounds)
    found = Found({}, [f"{n_trials} trials of {POS} tokens, {len(every)} heads; the same to {off:.0e} of themselves"])
    found.ratio("aie_speedup", ratios_of(times["loop"], times["ours"]), 8.0)
    return found


if __name__ == "__main__":
    for line in figures(quick="--quick" in sys.argv[1:]).lines:
        print(line)
