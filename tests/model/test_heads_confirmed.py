"""Heads that patching finds on training combinations are needed on held-out ones, and their neighbours are not."""

import pytest
import torch

import interp
from interp.core.manager import HookManager
from interp.patching import PatchOptions, activation_patch


@pytest.fixture(scope="module")
def testbed() -> HookManager:
    return HookManager.load("testbed")


# Repeats differ in length, so no position has a mean.
@pytest.mark.parametrize(("task", "ablation"), [("ioi", "mean"), ("fact", "mean"), ("repeat", "zero")])
def test_heads_found_by_patching_are_confirmed_by_ablation_on_held_out_prompts(
    testbed: HookManager, task: str, ablation: str
) -> None:
    hm = testbed
    seen, held_out = (interp.model_pairs(hm, task, 24, held_out=apart) for apart in (False, True))
    share = activation_patch(hm, seen, sites="z", progress=False).normalized()
    found = share > 0.1
    assert 1 <= int(found.sum()) <= 6
    # Another edit, on other words.
    lost = activation_patch(hm, held_out, sites="z", options=PatchOptions(ablation=ablation), progress=False)
    effect, p = lost.normalized(), lost.p_values()
    neighbours = found.any(1, keepdim=True) & ~found
    assert bool(neighbours.any())
    assert float(effect[found].min()) > 0.05 and float(effect[found].min()) > 3 * float(effect[neighbours].abs().max())
    assert float(p[found].max()) < 0.01
    # All together: without them little of the difference is left, without as many others of their layers nearly all is.
    generator = torch.Generator().manual_seed(0)
    order = (
        torch.rand(share.shape, generator=generator).masked_fill(~neighbours, -1.0).flatten().argsort(descending=True)
    )
    others = torch.zeros_like(found).flatten()
    others[order[: min(int(found.sum()), int(neighbours.sum()))]] = True
    left = [without(hm, held_out, heads.reshape(found.shape)) for heads in (found, others)]
    assert left[0] < 0.5 and left[1] > 0.9


def without(hm: HookManager, pairs: interp.PromptPairs, heads: torch.Tensor) -> float:
    """The share of the clean − corrupted difference that is left with heads held at their other prompt's values."""
    tokens = pairs.tokens(hm)
    layers = [i for i in range(len(heads)) if bool(heads[i].any())]
    other = hm.run(tokens.corrupted, read=[f"{i}.z" for i in layers], logits="last")
    edits = [
        interp.Replace(f"{i}.z", other, where=interp.Where(head=heads[i].nonzero()[:, 0].tolist())) for i in layers
    ]
    metric = tokens.metric()
    clean, corrupted = (float(metric(r).mean()) for r in (hm.run(tokens.clean, logits="last"), other))
    return (float(metric(hm.run(tokens.clean, write=edits, logits="last")).mean()) - corrupted) / (clean - corrupted)
