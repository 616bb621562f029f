"""What edge attribution takes beside a plain implementation: bytes of differences, and time, at GPT-2 small's shape.

The plain one is the published form: an input of its own for every q, k and v head of every layer (`split_qkv`), and one
tensor [batch pos sender d_model] of the differences. Both give the same scores, which is checked first.

    python benchmarks/patching_eap.py
"""

import time
from typing import Any

import engine  # noqa: F401  sets the number of threads, so before torch
import torch
from figures import Found, interleaved, ratios_of
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from interp.core.manager import HookManager
from interp.data.pair_tokens import PairTokens
from interp.patching.estimates.edges import Contraction, edge_attribution
from interp.patching.estimates.streams import Readers, Writers
from interp.patching.graph import Graph

BATCH, POS, LAYERS, HEADS, D = 8, 15, 12, 12, 768


def model() -> HookManager:
    """GPT-2 small's shape with random weights, gains and biases away from their defaults."""
    torch.manual_seed(0)
    made = GPT2LMHeadModel(GPT2Config(n_layer=LAYERS, n_head=HEADS, n_embd=D, bos_token_id=0, eos_token_id=0)).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim == 1 or "attn.c_attn" in name:
                parameter += 0.05 * torch.randn(parameter.shape)
    return HookManager.load(made)


def pairs() -> PairTokens:
    """Prompts of one length that differ at one token."""
    clean = torch.randint(1, 50_000, (BATCH, POS), generator=torch.Generator().manual_seed(1))
    corrupted = clean.clone()
    corrupted[:, 4] += 1
    return PairTokens.of_ids(clean, corrupted, torch.arange(100, 100 + BATCH), torch.arange(300, 300 + BATCH))


class Plain:
    """Edge attribution with split inputs and one tensor of differences, by hand on GPT-2's own weights."""

    def __init__(self, hm: HookManager) -> None:
        self.model: Any = hm.model
        self.n = 1 + LAYERS * (HEADS + 1)
        self.bytes = 0

    def forward(self, ids: Tensor, on_sender: Any, on_receiver: Any) -> Tensor:
        """Run; `on_sender(row, added)` sees what is added, `on_receiver(row, inputs)` the split inputs."""
        table, size = self.model.transformer, D // HEADS
        x = table.wte(ids) + table.wpe(torch.arange(ids.shape[1]))
        on_sender(0, x[:, :, None])
        row, mask = 1, torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        for layer, block in enumerate(table.h):
            weight = block.attn.c_attn.weight.reshape(D, 3, HEADS, size)
            bias = block.attn.c_attn.bias.reshape(3, HEADS, size)
            parts = []
            for kind in range(3):
                own = x[:, :, None].expand(-1, -1, HEADS, -1).clone()
                on_receiver(layer * (3 * HEADS + 1) + kind * HEADS, row, own)
                parts.append(torch.einsum("bthd,dhe->bhte", block.ln_1(own), weight[:, kind]) + bias[kind][:, None])
            scores = (parts[0] @ parts[1].transpose(2, 3)) / size**0.5
            z = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ parts[2]
            added = torch.einsum("bhte,hed->bthd", z, block.attn.c_proj.weight.reshape(HEADS, size, D))
            on_sender(row, added)
            row += HEADS
            x = x + added.sum(2) + block.attn.c_proj.bias
            own = x[:, :, None].clone()
            on_receiver(layer * (3 * HEADS + 1) + 3 * HEADS, row, own)
            out = block.mlp(block.ln_2(own[:, :, 0]))
            on_sender(row, out[:, :, None])
            row += 1
            x = x + out
        own = x[:, :, None].clone()
        on_receiver(LAYERS * (3 * HEADS + 1), row, own)
        return self.model.lm_head(table.ln_f(own[:, -1:, 0]))

    def scores(self, held: PairTokens) -> Tensor:
        """Return the scores [sender receiver], gradients at the corrupted run."""
        delta = torch.zeros(BATCH, POS, self.n, D)
        self.bytes = delta.numel() * delta.element_size()
        total = torch.zeros(self.n, LAYERS * (3 * HEADS + 1) + 1)

        def add(sign: float) -> Any:
            def keep(row: int, added: Tensor) -> None:
                delta[:, :, row : row + added.shape[2]] += sign * added.detach()

            return keep

        def score(column: int, before: int, own: Tensor) -> None:
            if not own.requires_grad:
                return

            def hook(grad: Tensor) -> None:
                found = torch.einsum("btsd,btrd->sr", delta[:, :, :before], grad)
                total[:before, column : column + grad.shape[2]] += found

            own.register_hook(hook)

        def nothing(column: int, before: int, own: Tensor) -> None:
            return None

        with torch.no_grad():
            self.forward(held.clean.ids, add(1.0), nothing)
        logits = self.forward(held.corrupted.ids, add(-1.0), score)
        parameter = self.model.transformer.wte.weight
        torch.autograd.grad(held.metric()(logits).sum(), parameter)
        return total / len(held)


def eap_figures(rounds: int = 3) -> Found:
    """Measure `eap_bytes_ratio` and `eap_time_ratio`, plain ÷ ours.

    Args:
        rounds: rounds of the timing, after one that is not counted.
    """
    hm, held = model(), pairs()
    plain = Plain(hm)
    mine, wanted = edge_attribution(hm, held), plain.scores(held)
    off = float((mine.scores - wanted).abs().max())
    if not off < 1e-4 * float(wanted.abs().max()):
        raise SystemExit(f"the scores are not the same: off by {off:.1e} of {float(wanted.abs().max()):.1e}")
    writers = Writers(hm)
    values = writers.values(hm.run(held.clean, read=writers.reads))
    kept = sum(value.numel() * value.element_size() for value in values.values())
    block = Contraction(writers, Readers(hm, frozen=False), Graph.of(hm)).tokens * writers.n * D * 4
    found = Found({}, [])
    found.figures["eap_bytes_ratio"] = plain.bytes / (kept + block)
    found.figures["eap_bytes_ratio_kept"] = plain.bytes / kept
    found.lines.append(
        f"eap_bytes_ratio: {plain.bytes / 1e6:.1f} MB of differences ÷ {kept / 1e6:.1f} MB kept + {block / 1e6:.1f} MB "
        f"multiplied out = {found.figures['eap_bytes_ratio']:.2f} (kept alone {plain.bytes / kept:.2f}); scores are "
        f"the same to {off:.0e}"
    )

    def timed(call: Any) -> Any:
        def measure() -> float:
            start = time.process_time()
            call()
            return time.process_time() - start

        return measure

    calls = {"plain": timed(lambda: plain.scores(held)), "ours": timed(lambda: edge_attribution(hm, held))}
    times = interleaved(calls, rounds)
    found.ratio("eap_time_ratio", ratios_of(times["plain"], times["ours"]))
    return found


if __name__ == "__main__":
    for line in eap_figures().lines:
        print(line)
