"""The engine on an accelerator: the same numbers, results where they were asked for, and no waiting on the way."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import interp
from tests.families import make, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("unchecked"),
]
FAMILIES = ("GPT2", "Llama", "Gemma2", "GPTNeoX", "Bloom")


@contextmanager
def no_waiting() -> Iterator[None]:
    """Any point where the host waits for the GPU is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_reads_what_the_cpu_reads(family: str) -> None:
    here, there = interp.HookManager.load(make(family)), interp.HookManager.load(make(family).cuda())
    read = [site.short for site in here.sites() if site.kind != "attn_scores"]
    ours, theirs = here.run(tokens(), read=read), there.run(tokens(), read=read, to="cpu")
    for site in read:
        assert theirs[site].device.type == "cpu"
        torch.testing.assert_close(theirs[site], ours[site], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_on_gpu_tokens_never_waits_for_the_gpu(family: str) -> None:
    hm = interp.HookManager.load(make(family).cuda())
    ids = tokens().cuda()
    read = ["*.resid_post", "*.z", "*.pattern", "*.ln1.scale"]
    hm.run(ids, read=read)  # norms are identified and kernels chosen once
    with no_waiting():
        hm.run(ids, read=read)


def test_edits_on_a_gpu_wait_once_and_equal_those_on_the_cpu() -> None:
    here, there = interp.HookManager.load(make("Llama")), interp.HookManager.load(make("Llama").cuda())
    vector = torch.ones(here.d_model)
    write = [interp.Add("1.resid_post", vector, where=interp.Where(pos=[2, -1]))]
    ours, theirs = here.run(tokens(), write=write).logits, there.run(tokens(), write=write).logits
    torch.testing.assert_close(theirs.cpu(), ours, atol=2e-3, rtol=2e-3)


def test_generation_on_a_gpu_is_the_same_with_and_without_the_cache() -> None:
    hm = interp.HookManager.load(make("Gemma2").cuda())
    write = [interp.Add("0.resid_post", torch.ones(hm.d_model), where=interp.Where.generated())]
    cached = hm.generate(tokens(), max_new_tokens=6, write=write)
    whole = hm.generate(tokens(), max_new_tokens=6, write=write, use_cache=False)
    assert cached.tokens is not None and whole.tokens is not None
    assert torch.equal(cached.tokens, whole.tokens)
