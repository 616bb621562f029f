"""Capture from a GPU: rows go through pinned memory on a stream of their own, and are the ones that the model gave."""

from pathlib import Path

import pytest
import torch

from interp.data.capture import CaptureOptions, capture
from interp.data.store import ActivationStore
from interp.data.tokens import TokenSource
from tests.families import make, word_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SITES = ["1.resid_post", "0.z"]


def texts(n: int) -> list[str]:
    draw = torch.Generator().manual_seed(0)
    return [" ".join(f"w{i}" for i in torch.randint(1, 120, (30,), generator=draw).tolist()) for _ in range(n)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8_row"])
def test_what_lies_on_the_disk_is_what_the_model_gave(dtype: str, tmp_path: Path) -> None:
    from interp.core.manager import HookManager

    hm = HookManager.load(make("Llama").cuda(), word_tokenizer())
    tokens = TokenSource(texts(400), word_tokenizer(), ctx=32, rows=8)
    options = CaptureOptions.model_validate({"dtype": dtype, "unit_documents": 100})
    done = capture(hm, tokens, SITES, tmp_path / "store", options, progress=False)
    store = ActivationStore.open(tmp_path / "store")
    assert done.status == "complete" and store.n_rows == done.rows > 10_000
    at = 0
    for number in range(4):
        documents = list(enumerate(texts(400)))[100 * number : 100 * (number + 1)]
        for block in tokens.pack(documents):
            run, keep = hm.run(block.inputs, read=SITES), block.mask.flatten()
            held = store.rows(slice(at, at + int(keep.sum())))
            for site, values in zip(SITES, held.values, strict=True):
                expected = run[site].flatten(0, 1)[keep.cuda()].flatten(1).cpu()
                if dtype == "int8_row":
                    bound = expected.abs().amax(1, keepdim=True) / 127 * 0.501
                    assert bool(((values - expected).abs() <= bound).all())
                else:
                    assert torch.equal(values, expected.to(values.dtype))
            at += len(held)
    assert at == store.n_rows


def test_the_same_capture_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    from interp.core.manager import HookManager

    hm = HookManager.load(make("GPT2").cuda(), word_tokenizer())
    tokens = TokenSource(texts(200), word_tokenizer(), ctx=32, rows=8)
    held = []
    for name in ("a", "b"):
        capture(hm, tokens, SITES, tmp_path / name, CaptureOptions(unit_documents=50), progress=False)
        files = sorted(p for p in (tmp_path / name / "shards").rglob("*") if p.is_file())
        held.append([p.read_bytes() for p in files])
    assert held[0] == held[1]


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_blocks_and_cuda_graphs_give_the_models_own_values_but_for_rounding(mode: str, tmp_path: Path) -> None:
    from interp.core.manager import HookManager

    hm = HookManager.load(make("GPT2").cuda(), word_tokenizer())
    tokens = TokenSource(texts(200), word_tokenizer(), ctx=32, rows=8)
    found = {}
    for how in ("off", mode):
        options = CaptureOptions.model_validate({"dtype": "float32", "unit_documents": 100, "compile": how})
        capture(hm, tokens, ["0.resid_post", "1.resid_post"], tmp_path / how, options, progress=False)
        found[how] = ActivationStore.open(tmp_path / how).rows(slice(None)).values
    for plain, compiled in zip(found["off"], found[mode], strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-4)
