"""Modular addition with TransformerLens' parameter names: a grokked model, through the nano model and the manager."""

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from interp.core.intervention import Ablate, Replace
from interp.core.manager import HookManager
from interp.core.where import Where
from interp.testbed.nano import from_transformer_lens, to_transformer_lens_names

P = 113
pytestmark = pytest.mark.usefixtures("unchecked")


@cache
def load(real: Path) -> HookManager:
    return HookManager.load(from_transformer_lens(real / "models" / "toy-modadd-rib0"))


@cache
def all_inputs() -> Tensor:
    """Every a, b, = as [12769 3]."""
    a = torch.arange(P)
    return torch.stack([a.repeat_interleave(P), a.repeat(P), torch.full((P * P,), P)], dim=1)


def accuracy(logits: Tensor, ids: Tensor) -> float:
    return float((logits[:, -1].argmax(-1) == (ids[:, 0] + ids[:, 1]) % P).float().mean())


def power(table: Tensor) -> Tensor:
    """Share of a table's variance over residues [p d] at each frequency 1 … (p − 1)/2."""
    found = torch.fft.rfft(table - table.mean(0), dim=0).abs().pow(2).sum(-1)[1:]
    return found / found.sum()


def test_the_sum_is_right_on_all_inputs(real: Path) -> None:
    hm, ids = load(real), all_inputs()
    assert accuracy(hm.run(ids, logits="last").logits, ids) > 0.999
    # Null controls: without attention, and with the numbers' order of the table changed, nothing is left of it.
    off = hm.run(ids, write=[Ablate("0.z", "zero")], logits="last").logits
    assert accuracy(off, ids) < 0.05
    assert accuracy(hm.run((ids + 1) % P, logits="last").logits, ids) < 0.05


def test_the_sum_does_not_depend_on_the_order(real: Path) -> None:
    hm, ids = load(real), all_inputs()[::7]
    turned = hm.run(ids[:, [1, 0, 2]], logits="last").logits[:, -1].argmax(-1)
    assert float((turned == hm.run(ids, logits="last").logits[:, -1].argmax(-1)).float().mean()) > 0.995


def test_the_embedding_lives_on_few_frequencies(real: Path) -> None:
    found = power(load(real).weights.W_E[:P]).sort(descending=True).values
    assert found[:6].sum() > 0.8
    shuffled = power(load(real).weights.W_E[:P][torch.randperm(P)]).sort(descending=True).values
    assert shuffled[:6].sum() < 0.5


def test_a_patched_answer_follows_the_patch(real: Path) -> None:
    hm, ids = load(real), all_inputs()[::29]
    other = ids.roll(5, dims=0)
    stream = hm.run(other, read=["0.resid_mid"])["0.resid_mid"]
    last = hm.run(ids, write=[Replace("0.resid_mid", stream, where=Where(pos=-1))], logits="last").logits
    assert accuracy(last, other) > 0.99


def test_the_weights_are_the_files_own(real: Path) -> None:
    from safetensors.torch import load_file

    file = load_file(real / "models" / "toy-modadd-rib0" / "model.safetensors")
    names = to_transformer_lens_names(load(real).model)
    assert names.keys() == file.keys()
    assert all(torch.equal(names[name], value) for name, value in file.items())
    assert load(real).d_vocab == P + 1 and load(real).config.norm == "none" and load(real).config.act == "relu"
