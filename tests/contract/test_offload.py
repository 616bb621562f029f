"""A model whose weights accelerate moves in only while a module runs."""

import pytest
import torch
from accelerate import cpu_offload

import interp
from tests.families import make, manager, tokens


def test_an_offloaded_model_reads_edits_and_stops_early_like_the_whole_one() -> None:
    hm, whole, ids = interp.HookManager.load(_offloaded()), manager("Llama"), tokens()
    read = ["1.resid_post", "0.z", "1.pattern"]
    ours, theirs = hm.run(ids, read=read), whole.run(ids, read=read)
    for site in read:
        assert torch.equal(ours[site], theirs[site])
    write = [interp.Ablate("1.mlp_out")]
    assert torch.equal(hm.run(ids, write=write).logits, whole.run(ids, write=write).logits)


def test_an_offloaded_norm_is_refused_by_name_and_its_output_is_not() -> None:
    hm = interp.HookManager.load(_offloaded())
    with pytest.raises(interp.ModelError, match=r"input_layernorm.*offloaded"):
        hm.run(tokens(), read=["0.ln1.scale"])
    assert torch.equal(
        hm.run(tokens(), read=["0.ln1.out"])["0.ln1.out"],
        manager("Llama").run(tokens(), read=["0.ln1.out"])["0.ln1.out"],
    )


def _offloaded() -> torch.nn.Module:
    return cpu_offload(make("Llama"), execution_device=torch.device("cpu"))
