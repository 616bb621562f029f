"""A run leaves nothing behind: no hook, no changed weight or config, nothing another manager or thread could see."""

import copy
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import Tensor

from interp.core.errors import HookError
from interp.core.intervention import Add, Edit
from interp.core.manager import HookManager
from interp.core.where import Where
from tests.contract.bad_calls import hooks_on
from tests.families import FAMILIES, make, manager, tokens, word_tokenizer

pytestmark = pytest.mark.contract
every_family = pytest.mark.parametrize("name", list(FAMILIES))
SITES = ("0.resid_pre", "0.z", "ln_final.scale", "1.v", "1.mlp_out")
INSIDE = ("1.pattern", "1.attn_scores")


def reads(name: str) -> list[str]:
    """Sites to read in every test here, the pattern among them where the family gives it."""
    return ["0.resid_post", "1.z", "1.pattern"]


def raising(error: BaseException) -> Callable[[Tensor], Tensor]:
    """An edit function that raises."""

    def fn(x: Tensor) -> Tensor:
        raise error

    return fn


@every_family
@pytest.mark.parametrize("error", [ZeroDivisionError("mine"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_no_hook_is_left_after_an_exception_and_the_next_run_is_right(name: str, error: BaseException) -> None:
    hm, ids = manager(name), tokens()
    want, before = hm.run(ids).logits, hooks_on(hm.model)
    for site in (*SITES, *INSIDE):
        with pytest.raises(type(error)):
            hm.run(ids, read=reads(name), write=[Edit(site, raising(error))], logits="all")
        assert hooks_on(hm.model) == before
        assert torch.equal(hm.run(ids).logits, want)


@every_family
def test_exceptions_in_generate_and_hooked_leave_nothing(name: str) -> None:
    hm, ids = manager(name), tokens(1, 6)
    want, before = hm.run(ids).logits, hooks_on(hm.model)
    calls: list[int] = []

    def third(x: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise ZeroDivisionError("mine")
        return x

    with pytest.raises(ZeroDivisionError):
        hm.generate(ids, max_new_tokens=6, write=[Edit("0.resid_post", third)])
    assert len(calls) == 3
    with pytest.raises(ZeroDivisionError), hm.hooked(write=[Edit("0.resid_post", raising(ZeroDivisionError()))]):
        hm.model(ids)
    with pytest.raises(LookupError), hm.hooked(read=reads(name)):
        raise LookupError("mine")
    assert hooks_on(hm.model) == before
    assert torch.equal(hm.run(ids).logits, want)


@every_family
def test_a_metric_that_raises_leaves_nothing(name: str) -> None:
    hm, ids = manager(name), tokens()
    want, before = hm.run(ids).logits, hooks_on(hm.model)
    flags = [p.requires_grad for p in hm.model.parameters()]

    def metric(out: object) -> Tensor:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError):
        hm.run(ids, read=reads(name), grad=metric)
    assert hooks_on(hm.model) == before
    assert [p.requires_grad for p in hm.model.parameters()] == flags
    assert all(p.grad is None for p in hm.model.parameters())
    assert torch.equal(hm.run(ids).logits, want)


@every_family
def test_loading_and_running_change_neither_keys_nor_weights_nor_config(name: str, tmp_path: Path) -> None:
    model, ids = make(name), tokens()
    keys, config = list(model.state_dict()), copy.deepcopy(model.config.to_dict())
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
    before = hooks_on(model)
    hm = HookManager.load(model, word_tokenizer())
    hm.run(ids, read=reads(name), write=[Add("0.z", torch.ones(hm.n_heads, hm.d_head))], logits="all")
    hm.run(ids, read=["0.resid_post"], grad=lambda out: out.logits[:, -1, 3])
    hm.generate(ids, max_new_tokens=2, read=["0.resid_post"])
    assert hm.model is model
    assert list(model.state_dict()) == keys
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert model.config.to_dict() == config
    assert hooks_on(model) == before
    model.save_pretrained(tmp_path)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(again(ids, use_cache=False).logits, want)
        assert torch.equal(model(ids, use_cache=False).logits, want)


@pytest.mark.parametrize("pair", [("Llama", "Gemma2"), ("GPT2", "Bloom"), ("Llama", "Llama")], ids="-".join)
def test_two_managers_do_not_interfere(pair: tuple[str, str]) -> None:
    first, second = (HookManager.load(make(name), word_tokenizer()) for name in pair)
    ids, vector = tokens(), torch.ones(first.d_model)
    want = second.run(ids, read=["1.resid_post", "1.pattern"], logits="all")
    # Without gradients: with them, a layer whose pattern is read runs our own formula, equal but not to the bit.
    reads = first.hooked(read=["0.resid_post", "0.pattern"], write=[Add("0.resid_post", vector)])
    with torch.no_grad(), reads as live:
        first.model(ids)
        got = second.run(ids, read=["1.resid_post", "1.pattern"], logits="all")
        first.model(ids)
    assert torch.equal(got.logits, want.logits)
    assert torch.equal(got["1.pattern"], want["1.pattern"])
    inside = first.run(ids, read=["0.resid_post"], write=[Add("0.resid_post", vector)])
    assert torch.equal(live["0.resid_post"], inside["0.resid_post"])


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Gemma2", "Bloom", "Falcon"])
def test_threads_each_see_their_own_run_of_one_model(name: str) -> None:
    hm, rounds = manager(name), 25
    batches = [tokens(2, 9, seed=seed) for seed in range(3)]
    writes = [
        [],
        [Add("0.resid_post", torch.ones(hm.d_model))],
        [Add("1.v", torch.ones(hm.n_kv_heads, hm.d_head), scale=-2.0)],
    ]
    read = reads(name)
    want = [hm.run(ids, read=read, write=write, logits="all") for ids, write in zip(batches, writes, strict=True)]
    failures: list[str] = []

    def work(index: int) -> None:
        try:
            for _ in range(rounds):
                out = hm.run(batches[index], read=read, write=writes[index], logits="all")
                same = [torch.equal(out[site], want[index][site]) for site in read]
                if not all([*same, torch.equal(out.logits, want[index].logits)]):
                    failures.append(f"thread {index}: {same}")
        except Exception as err:  # noqa: BLE001 - a thread would swallow it
            failures.append(f"thread {index}: {err!r}")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert not any(hooks_on(hm.model))


def _in_another_thread(work: Callable[[], Tensor]) -> Tensor:
    found: list[Tensor | BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except Exception as err:  # noqa: BLE001 - a thread would swallow it
            found.append(err)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def _plain_logits(hm: HookManager, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return hm.model(ids, use_cache=False).logits


def test_an_open_hooked_block_does_not_reach_into_other_threads() -> None:
    hm, ids, other = manager("Llama"), tokens(), tokens(1, 5, seed=4)
    plain, run = _plain_logits(hm, other), hm.run(other, read=["0.resid_post"])["0.resid_post"]
    with hm.hooked(read=["0.resid_post"], write=[Add("0.resid_post", torch.ones(hm.d_model))]) as live:
        hm.model(ids)
        kept = live["0.resid_post"].clone()
        assert torch.equal(_in_another_thread(lambda: _plain_logits(hm, other)), plain)
        assert torch.equal(_in_another_thread(lambda: hm.run(other, read=["0.resid_post"])["0.resid_post"]), run)
        assert torch.equal(live["0.resid_post"], kept)


def test_a_run_inside_a_hooked_block_of_the_same_model_is_refused_and_the_block_goes_on() -> None:
    hm, ids = manager("Llama"), tokens()
    with hm.hooked(read=["0.resid_post"], write=[Add("0.resid_post", torch.ones(hm.d_model))]) as live:
        hm.model(ids)
        kept = live["0.resid_post"].clone()
        with pytest.raises(HookError, match="hooked"):
            hm.run(tokens(1, 5, seed=4), read=["1.resid_post"])
        assert torch.equal(live["0.resid_post"], kept)
        hm.model(ids)
        assert torch.equal(live["0.resid_post"], kept)


def test_a_generation_does_not_reach_into_other_threads() -> None:
    hm, ids, other = manager("Llama"), tokens(2, 6), tokens(1, 9, seed=4)
    write, plain = [Add("0.resid_post", torch.ones(hm.d_model), where=Where.generated())], _plain_logits(hm, other)
    want = hm.generate(ids, max_new_tokens=4, read=["1.resid_post"], write=write)
    seen: list[Tensor] = []

    def meanwhile(x: Tensor) -> Tensor:
        seen.append(_in_another_thread(lambda: _plain_logits(hm, other)))
        return x

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*changed nothing")
        got = hm.generate(ids, max_new_tokens=4, read=["1.resid_post"], write=[Edit("0.z", meanwhile), *write])
    assert len(seen) == 4
    assert all(torch.equal(logits, plain) for logits in seen)
    assert got.tokens is not None
    assert want.tokens is not None
    assert torch.equal(got.tokens, want.tokens)
    assert torch.equal(got["1.resid_post"], want["1.resid_post"])
