"""The context form: reads and edits of forwards that the user makes, gradients and training included."""

import pytest
import torch

import interp
from tests.families import make, manager, tokens

FAMILIES = ("GPT2", "Llama", "Falcon", "Bloom", "OPT", "Gemma2", "Granite")
KINDS = ("embed", "0.q", "0.z", "0.pattern", "0.ln1.scale", "0.mlp_post", "0.result", "0.attn_out", "1.resid_pre")


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_a_users_own_forward_are_those_of_run(name: str) -> None:
    hm, ids = manager(name), tokens()
    kinds = [kind for kind in KINDS if hm.atlas.has(kind)]
    want = hm.run(ids, read=kinds, grad=lambda out: out.logits[:, -1, :7].sum(-1)).grad
    with hm.hooked(read=kinds) as live:
        logits = hm.model(ids, use_cache=False).logits
        found = torch.autograd.grad(logits[:, -1, :7].sum(), [live[kind] for kind in kinds])
    for kind, gradient in zip(kinds, found, strict=True):
        torch.testing.assert_close(gradient, want[kind], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_without_gradients_a_block_reads_what_run_reads_to_the_bit(name: str) -> None:
    hm, ids = manager(name), tokens()
    kinds = [kind for kind in KINDS if hm.atlas.has(kind)]
    want = hm.run(ids, read=kinds, logits="all")
    with torch.no_grad(), hm.hooked(read=kinds) as live:
        logits = hm.model(ids, use_cache=False).logits
    assert torch.equal(logits, want.logits)
    for kind in kinds:
        assert torch.equal(live[kind], want[kind])


def test_a_model_can_be_trained_under_an_edit() -> None:
    model = make("Llama").train()
    hm, ids = interp.HookManager.load(model), tokens()
    vector = torch.nn.Parameter(torch.full((hm.d_model,), 0.1))
    parameters = [vector, *model.parameters()]
    optimizer, losses = torch.optim.SGD(parameters, lr=0.05), []
    edit = interp.Edit("1.resid_post", lambda x: x + vector)
    for _ in range(6):
        with hm.hooked(read=["0.resid_post"], write=[edit]) as live:
            loss = model(ids, labels=ids, use_cache=False).loss
            (loss + 0.0 * live["0.resid_post"].sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert float((vector.detach() - 0.1).norm()) > 0


def test_positions_are_absolute_when_the_user_generates_inside_a_block() -> None:
    hm, ids = manager("Llama"), tokens(2, 6)
    edit = interp.Add("0.resid_post", 2.0 * torch.ones(hm.d_model), where=interp.Where(pos=[2, -1]))
    want = hm.generate(ids, max_new_tokens=4, write=[edit], generation_kwargs={"eos_token_id": -1}).tokens
    arguments = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    with hm.hooked(write=[edit]):
        found = hm.model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
    assert want is not None
    assert torch.equal(found, want)


def test_an_unknown_generation_argument_is_a_typed_error() -> None:
    with pytest.raises(interp.DataError, match="frob"):
        manager("Llama").generate(tokens(), generation_kwargs={"frob": 3})
