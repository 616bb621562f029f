"""Blocks compiled by torch: what they give, which they are, and what is refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import interp
from interp import CaptureOptions, capture
from interp.core.compiled import CompiledBlocks
from interp.core.site import Site
from interp.data.store import ActivationStore
from interp.data.tokens import TokenSource

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),  # the compiler's own
]


@pytest.fixture(scope="module")
def hm() -> interp.HookManager:
    return interp.HookManager.load("testbed")


@pytest.fixture(scope="module")
def text(hm: interp.HookManager) -> TokenSource:
    sentence = "the cat sat on the mat and looked at the dog . "
    return TokenSource([sentence * (3 + i % 4) for i in range(40)], hm.tokenizer, ctx=32, rows=4)


def test_what_is_captured_is_the_models_own_but_for_rounding(
    hm: interp.HookManager, text: TokenSource, tmp_path: Path
) -> None:
    sites = ["2.resid_post", "1.mlp_out"]
    found = {}
    for mode in ("off", "default"):
        done = capture(hm, text, sites, tmp_path / mode, _options(mode), progress=False)
        assert done.status == "complete"
        store = ActivationStore.open(tmp_path / mode, batch_size=64, buffer_tokens=128)
        found[mode] = [torch.cat(parts) for parts in zip(*(rows.values for rows in store.sequential()), strict=True)]
    for plain, compiled in zip(found["off"], found["default"], strict=True):
        assert compiled.shape == plain.shape
        assert (compiled - plain).abs().max() <= 1e-4 * plain.abs().max()
    # It did run compiled: rounding is other than the model's own somewhere.
    assert any(not torch.equal(*pair) for pair in zip(found["off"], found["default"], strict=True))


def test_afterwards_the_model_is_as_it_was(hm: interp.HookManager) -> None:
    ids = torch.randint(5, 100, (4, 32), generator=torch.Generator().manual_seed(0))
    before = hm.run(ids, read="2.resid_post")["2.resid_post"]
    blocks = CompiledBlocks(hm, [Site("2.resid_post")])
    with pytest.raises(RuntimeError, match="on purpose"), blocks.active():
        raise RuntimeError("on purpose")
    assert not any("forward" in vars(module) for module in hm.model.modules())
    assert torch.equal(hm.run(ids, read="2.resid_post")["2.resid_post"], before)


def test_blocks_are_compiled_up_to_the_last_read_but_for_those_that_are_looked_into(hm: interp.HookManager) -> None:
    assert CompiledBlocks(hm, [Site("2.resid_post")]).layers == [0, 1, 2]
    assert CompiledBlocks(hm, [Site("1.z"), Site("2.resid_pre")]).layers == [0, 2]
    with pytest.raises(interp.ConfigError, match="every block"):
        CompiledBlocks(hm, [Site("0.mlp_post")])


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_mode_a_gradient_and_another_mode_at_resume_are_refused(
    hm: interp.HookManager, text: TokenSource, tmp_path: Path
) -> None:
    with pytest.raises(interp.ConfigError, match="max-autotune"):
        CompiledBlocks(hm, [Site("2.resid_post")], "fast")
    with pytest.raises(interp.ConfigError, match="gradient"):
        capture(hm, text, "1.resid_post", tmp_path / "a", CaptureOptions(compile="default", gradient="loss"))
    capture(hm, text, "1.resid_post", tmp_path / "b", _options("off"), progress=False)
    with pytest.raises(interp.ConfigError, match="compile"):
        capture(hm, text, "1.resid_post", tmp_path / "b", _options("default"), resume=True, progress=False)


def test_a_block_that_cannot_be_compiled_is_named(hm: interp.HookManager, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(forward: Any, **_: Any) -> Any:
        return torch._dynamo.optimize(_broken)(forward)

    monkeypatch.setattr(torch, "compile", refused)
    blocks = CompiledBlocks(hm, [Site("0.resid_post")])
    with pytest.raises(interp.ModelError, match=r"cannot compile.*Leave compile off"), blocks.active():
        hm.run(torch.arange(5, 9)[None], read="0.resid_post")


def _options(mode: Any) -> CaptureOptions:
    return CaptureOptions(dtype="float32", compile=mode, unit_documents=20)


def _broken(graph: nn.Module, inputs: list[torch.Tensor]) -> Any:
    raise RuntimeError("no compiler")
