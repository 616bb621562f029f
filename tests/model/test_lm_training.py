"""The small language models' trainer on tiny models: what it learns, what its steps are, and that it can be resumed."""

import functools
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

import tests.source as repo
from interp.core.errors import ArtifactError, ConfigError, DataError, InterpError, ModelError
from interp.core.intervention import Ablate, Edit
from interp.core.manager import HookManager
from interp.core.where import Where
from interp.data.tokens import TokenSource
from interp.train.common import TrainingError
from interp.train.lm import LMBatch, LMOptions, LMTraining, TextData, load_checkpoints, train_lm
from interp.train.lm_fit import LMFit
from tests.death import Death, Killed
from tests.families import word_tokenizer

VOCAB, ROWS, POS = 16, 4, 12
_IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def gpt2(*, seed: int = 0, dropout: float = 0.0, layers: int = 1, tokenizer: Any = None) -> HookManager:
    """A fresh GPT-2 of width 16 with two heads; its unembedding is its embedding."""
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    vocab = VOCAB if tokenizer is None else len(tokenizer)
    config = tf.GPT2Config(vocab_size=vocab, n_embd=16, n_head=2, n_layer=layers, n_positions=32, **drops, **_IDS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return HookManager.load(tf.GPT2LMHeadModel(config), tokenizer)


def llama() -> HookManager:
    """A fresh Llama with an unembedding of its own."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = tf.LlamaConfig(vocab_size=VOCAB, tie_word_embeddings=False, **sizes, **_IDS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return HookManager.load(tf.LlamaForCausalLM(config))


class Rows:
    """Batches drawn by a function from a generator seeded with their number."""

    def __init__(self, draw: Callable[[torch.Generator], Any], name: str = "rows", n: int = 10**9) -> None:
        self.draw, self.name, self.n = draw, name, n

    def batches(self, state: Mapping[str, Any] | None) -> Iterator[tuple[Any, dict[str, Any]]]:
        for number in range(0 if state is None else state["next"], self.n):
            yield self.draw(torch.Generator().manual_seed(number)), {"next": number + 1}

    def describe(self) -> dict[str, Any]:
        return {"kind": self.name}


def uniform(generator: torch.Generator) -> LMBatch:
    return LMBatch(torch.randint(0, VOCAB, (ROWS, POS), generator=generator))


def cycle(generator: torch.Generator) -> LMBatch:
    """Each token is the one before, plus 1 modulo the vocabulary."""
    return LMBatch((torch.randint(0, VOCAB, (ROWS, 1), generator=generator) + torch.arange(POS)) % VOCAB)


def options(**changes: Any) -> LMOptions:
    return LMOptions.model_validate({"steps": 10, "lr": 1e-2, "resume_every": 0, "log_every": 5, **changes})


def weights(hm: HookManager) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in hm.model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def trained(draw: Callable[[torch.Generator], Any] = uniform, *, dropout: float = 0.0, **changes: Any) -> Any:
    """The weights and the result of a training of the standard model."""
    hm = gpt2(dropout=dropout)
    arguments = {name: changes.pop(name) for name in ("measures", "write", "seed", "out") if name in changes}
    result = train_lm(hm, Rows(draw), options(**changes), **arguments)
    return weights(hm), result


# -- what it learns ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [gpt2, llama])
def test_what_can_be_foreseen_is_learnt_and_what_cannot_is_not(make: Callable[[], HookManager]) -> None:
    run = options(steps=80, lr=2e-2, log_every=20)
    learnt = train_lm(make(), Rows(cycle), run)
    assert learnt.losses[0] > 1.0 and learnt.losses[-1] < 0.05
    # Null control: independent uniform tokens, never the same twice, leave log V.
    noise = train_lm(make(), Rows(uniform), run)
    assert bool(((noise.losses - math.log(VOCAB)).abs() < 0.15).all())
    assert abs(float(noise.losses[-1]) - math.log(VOCAB)) < 0.05


# -- what its steps are -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [gpt2, llama])
def test_the_steps_are_those_of_a_plain_loop_bit_for_bit(make: Callable[[], HookManager]) -> None:
    hm, plain = make(), make().model.train()
    run = options(steps=6, lr=3e-2, warmup_steps=2, weight_decay=0.3, betas=(0.8, 0.95), grad_clip=0.7, log_every=1)
    result = train_lm(hm, Rows(uniform), run)
    matrices = [p for p in plain.parameters() if p.ndim > 1]
    vectors = [p for p in plain.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=1.0, betas=(0.8, 0.95), fused=True)
    losses, norms = [], []
    for step, (batch, _) in enumerate(itertools.islice(Rows(uniform).batches(None), 6)):
        cosine = 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 2) / 4)) / 2
        for group in adam.param_groups:
            group["lr"] = 3e-2 * ((step + 1) / 3 if step < 2 else cosine)
        loss = plain(batch.ids, labels=batch.ids, use_cache=False).loss
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.7)))
        adam.step()
        adam.zero_grad()
        losses.append(float(loss.detach()))
    assert result.losses.tolist() == losses and result.tokens == 6 * ROWS * (POS - 1)
    assert max(norms) > 0.7  # else the clipping was not tried
    assert same(weights(hm), weights(HookManager.load(plain)))


def test_tied_weights_are_trained_once_and_untied_ones_apart() -> None:
    for hm, tied in ((gpt2(), True), (llama(), False)):
        fit = LMFit(hm, options())
        held = [p for group in fit.optimizer.param_groups for p in group["params"]]
        assert len(held) == len({id(p) for p in held}) == len(list(hm.model.parameters()))
        assert (hm.model.get_output_embeddings().weight is hm.model.get_input_embeddings().weight) == tied
        assert [all(p.ndim >= 2 for p in g["params"]) for g in fit.optimizer.param_groups] == [True, False]


def test_parameters_that_require_no_gradient_stay_as_they_are() -> None:
    hm = gpt2()
    hm.model.transformer.h[0].mlp.requires_grad_(False)
    before = weights(hm)
    train_lm(hm, Rows(uniform), options())
    changed = {name for name, value in weights(hm).items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ".mlp." not in name}


def test_tokens_that_weigh_nothing_have_no_effect() -> None:
    def weighted(late: Callable[[Tensor], Tensor], value: float) -> Callable[[torch.Generator], LMBatch]:
        def draw(generator: torch.Generator) -> LMBatch:
            ids = uniform(generator).ids
            weight = torch.ones(ids.shape)
            weight[:, 8:] = value
            return LMBatch(torch.cat([ids[:, :8], late(ids[:, 8:])], 1), weight)

        return draw

    def keep(ids: Tensor) -> Tensor:
        return ids

    def other(ids: Tensor) -> Tensor:
        return (ids + 3) % VOCAB

    (a, first), (b, _), (c, _) = (
        trained(weighted(keep, 0.0)),
        trained(weighted(other, 0.0)),
        trained(weighted(other, 1.0)),
    )
    assert same(a, b) and not same(b, c)
    assert first.tokens == 10 * ROWS * 7
    # Weights that are all alike are no weights, whatever their size.
    (d, _), (e, _) = trained(weighted(keep, 1.0)), trained()
    for name, value in d.items():
        torch.testing.assert_close(value, e[name], rtol=1e-3, atol=1e-4)


def test_an_edit_acts_in_every_step_with_its_gradient_and_not_afterwards() -> None:
    clamp = Ablate("0.z", where=Where(head=1))
    hm = gpt2()
    before = weights(hm)
    result = train_lm(hm, Rows(uniform), options(log_every=1, weight_decay=0.0), write=clamp)
    after = weights(hm)
    rows = {name: after[name] - before[name] for name in after}
    out, qkv = (
        rows["transformer.h.0.attn.c_proj.weight"],
        rows["transformer.h.0.attn.c_attn.weight"].unflatten(1, (3, 2, 8)),
    )
    assert not bool(out[8:].any()) and not bool(qkv[:, :, 1].any())
    assert bool(out[:8].any(dim=1).all()) and bool(qkv[:, :, 0].any())
    # The first loss is that of the model without this head.
    ids = next(Rows(uniform).batches(None))[0].ids
    fresh = gpt2()
    with torch.no_grad():
        fresh.model.transformer.h[0].attn.c_proj.weight[8:] = 0
        assert float(fresh.model(ids, labels=ids).loss) == pytest.approx(float(result.losses[0]), abs=1e-6)
    assert bool(hm.run(ids, read="0.z")["0.z"][:, :, 1].any())
    with torch.no_grad():
        assert torch.equal(hm.run(ids).logits, hm.model(ids, use_cache=False).logits)
    # Null control: without the edit the same weights move.
    free, _ = trained(weight_decay=0.0)
    assert bool((free["transformer.h.0.attn.c_proj.weight"] - before["transformer.h.0.attn.c_proj.weight"])[8:].any())


def test_without_edits_no_hook_is_attached(monkeypatch: pytest.MonkeyPatch) -> None:
    hm = gpt2()
    seen: list[int] = []

    def count(hm: HookManager) -> float:
        return 0.0

    hm.model.transformer.h[0].register_forward_hook(
        lambda module, args, output: seen.append(sum(len(m._forward_hooks) for m in hm.model.modules()))
    )
    monkeypatch.setattr(HookManager, "hooked", lambda *args, **kwargs: pytest.fail("hooked"))
    train_lm(hm, Rows(uniform), options(), measures={"nothing": count})
    assert set(seen) == {1}


# -- measures ---------------------------------------------------------------------------------------------------


def test_measures_see_the_model_at_their_step_in_eval_mode_and_change_nothing() -> None:
    seen: list[tuple[bool, float]] = []
    ids = torch.arange(POS)[None]

    def meddling(hm: HookManager) -> Any:
        seen.append((hm.model.training, float(torch.rand(()))))
        logits = hm.model(ids).logits
        logits.logsumexp(-1).sum().backward()
        hm.run(ids, read="0.z")
        return {"norm": logits.norm(), "nan": math.nan}

    plain, _ = trained(dropout=0.2)
    measured, result = trained(dropout=0.2, measure_every=4, measures={"m": meddling, "one": lambda hm: 1})
    assert same(plain, measured)
    assert result.measure_steps.tolist() == [0, 4, 8, 10]
    assert [training for training, _ in seen] == [False] * 4 and len({drawn for _, drawn in seen}) == 1
    assert len(set(result.measures["m.norm"].tolist())) == 4 and result.measures["one"].tolist() == [1.0] * 4
    assert bool(result.measures["m.nan"].isnan().all())
    with torch.no_grad():
        assert float(result.measures["m.norm"][0]) == float(gpt2().model.eval()(ids).logits.norm())
    only_at_the_end = trained(measures={"one": lambda hm: 1})[1]
    assert only_at_the_end.measure_steps.tolist() == [10]


def test_the_model_and_the_random_numbers_of_the_caller_are_left_in_order() -> None:
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    hm, handler = gpt2(dropout=0.2), signal.getsignal(signal.SIGINT)
    with pytest.raises(DataError, match="ended before step 4"):  # in the midst of the steps
        train_lm(hm, Rows(uniform, n=3), options())
    assert not hm.model.training
    with pytest.raises(ZeroDivisionError):
        train_lm(hm, Rows(uniform), options(), measures={"bad": lambda hm: 1 / 0})
    assert torch.equal(torch.rand(3), wanted)
    assert not hm.model.training and all(p.grad is None for p in hm.model.parameters())
    assert not torch.are_deterministic_algorithms_enabled()
    assert signal.getsignal(signal.SIGINT) is handler


# -- what it leaves behind --------------------------------------------------------------------------------------


def test_every_checkpoint_loads_and_is_the_model_of_its_step(tmp_path: Path) -> None:
    kept: dict[int, Tensor] = {}
    ids = torch.arange(POS)[None]
    hm = gpt2(tokenizer=word_tokenizer())
    every = options(measure_every=2, checkpoint_every=4, checkpoints=(0, 2, 8), resume_every=100)

    def look(hm: HookManager) -> float:
        kept[2 * len(kept)] = hm.run(ids).logits
        return 0.0

    result = train_lm(hm, Rows(uniform), every, out=tmp_path / "run", measures={"look": look})
    found = load_checkpoints(tmp_path / "run")
    assert [step for step, _ in found] == [0, 2, 4, 8, 10] and found[-1][1].name == "final"
    for step, path in found:
        loaded = HookManager.load(path)
        assert torch.equal(loaded.run(ids).logits, kept[step])
        assert loaded.tokenizer.get_vocab() == hm.tokenizer.get_vocab()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == result.losses.tolist()
    assert {name for line in lines if "loss" in line for name in line} == {"step", "tokens", "loss", "lr", "grad_norm"}
    record = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert record["status"] == "finished" and record["settings"]["options"] == every.model_dump(mode="json")
    assert record["settings"]["threads"] == torch.get_num_threads() and record["versions"]["torch"]
    assert (tmp_path / "run" / "speed.jsonl").exists()


def test_the_bar_shows_tokens_loss_and_speed_and_checkpoints_do_not_tear_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trained(checkpoint_every=5, out=tmp_path / "run")
    shown = capfd.readouterr()
    assert "440 tok, loss 2." in shown.err and "tok/s" in shown.err and "10/10" in shown.err
    assert "shards" not in shown.err and not shown.out


# -- stopping and going on --------------------------------------------------------------------------------------


STEPS = 14
RUN = {"steps": STEPS, "measure_every": 7, "checkpoint_every": 3, "resume_every": 4}
TEXTS = [" ".join(f"w{1 + (7 * i + j) % 100}" for j in range(5 + 5 * i % 17)) for i in range(40)]


def resumable(out: Path, *, stop: signal.Signals | None = None, resume: bool = False, **changes: Any) -> LMTraining:
    """A training on text, with dropout, that may send itself a signal after step 7."""
    arguments = {"seed": changes.pop("seed", 0)}
    hm = gpt2(seed=9 if resume else 0, dropout=0.1, tokenizer=word_tokenizer())
    data = TextData(TokenSource(changes.pop("texts", TEXTS), word_tokenizer(), ctx=POS, rows=ROWS, bos=True))
    calls = itertools.count(7 if resume else 0, 7)

    def measure(hm: HookManager) -> float:
        if next(calls) == 7 and stop is not None:
            os.kill(os.getpid(), stop)
        return float(hm.run(torch.arange(POS)[None]).logits.norm())

    return train_lm(
        hm, data, options(**RUN, **changes), out=out, measures={"norm": measure}, resume=resume, **arguments
    )


def held(out: Path) -> dict[str, bytes]:
    """All that a run must leave alike: every file but the speed, and the record, which tells of signals."""
    files = {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
    return {name: data for name, data in files.items() if name not in ("speed.jsonl", "provenance.json")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    resumable(out)
    return out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_training_that_was_stopped_by_a_signal_goes_on_to_the_same_bytes(
    whole: Path, tmp_path: Path, number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    half = resumable(out, stop=number)
    assert (half.steps, half.stopped, half.signal) == (7, True, number.name)
    said = capfd.readouterr().err
    assert f"{number.name}: stopping after this step" in said and f"resume=True in {out}" in said
    assert [p.name for p in (out / "resume").iterdir()] == ["step-00000007"] and not (out / "final").exists()
    assert json.loads((out / "provenance.json").read_text())["status"] == "stopped"
    rest = resumable(out, resume=True)
    assert (rest.steps, rest.stopped, rest.signal) == (STEPS, False, None)
    assert held(out) == held(whole)
    lines = (whole / "metrics.jsonl").read_text().splitlines()
    assert rest.losses.tolist() == [json.loads(line)["loss"] for line in lines if "loss" in line]
    # Once more there is nothing to do, and nothing changes.
    again = resumable(out, resume=True)
    assert again.steps == STEPS and held(out) == held(whole)
    assert again.measures["norm"].tolist() == rest.measures["norm"].tolist()


def test_a_training_that_was_stopped_before_its_first_step_does_not_measure_it_twice(tmp_path: Path) -> None:
    def run(out: Path, *, stop: bool = False, resume: bool = False) -> LMTraining:
        def measure(hm: HookManager) -> float:
            if stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return 0.0

        every = options(steps=2, measure_every=1, checkpoints=(0,))
        return train_lm(gpt2(), Rows(uniform), every, out=out, measures={"m": measure}, resume=resume)

    run(tmp_path / "whole")
    assert run(tmp_path / "stopped", stop=True).steps == 0
    assert run(tmp_path / "stopped", resume=True).measure_steps.tolist() == [0, 1, 2]
    assert held(tmp_path / "stopped") == held(tmp_path / "whole")


def test_the_comparison_of_bytes_sees_dropout_data_and_seed(whole: Path, tmp_path: Path) -> None:
    resumable(tmp_path / "seed", seed=1)
    resumable(tmp_path / "texts", texts=TEXTS[1:])
    final = "final/model.safetensors"
    assert len({held(out)[final] for out in (whole, tmp_path / "seed", tmp_path / "texts")}) == 3
    assert {"metrics.jsonl", final, "resume/step-00000014/state.safetensors"} < held(whole).keys()


def small(out: Path, hm: HookManager, *, resume: bool = False) -> None:
    hm.model.load_state_dict(gpt2_weights(seed=int(resume)))
    run = options(steps=2, log_every=1, checkpoints=(1,), resume_every=1)
    train_lm(hm, Rows(uniform), run, out=out, resume=resume)


@functools.cache
def gpt2_weights(seed: int) -> dict[str, Tensor]:
    return gpt2(seed=seed).model.state_dict()


def test_a_run_that_died_at_any_change_of_a_folder_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hm = gpt2(dropout=0.1)
    with monkeypatch.context() as patch:
        calls = Death(patch, last=10**9)
        small(tmp_path / "whole", hm)
    assert calls.calls > 25
    begun_anew = 0
    for last in range(1, calls.calls + 1):
        out = tmp_path / str(last)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            Death(patch, last=last)
            small(out, hm)
        try:
            small(out, hm, resume=True)
        except ArtifactError:
            small(out, hm)
            begun_anew += 1
        assert held(out) == held(tmp_path / "whole"), f"after {last} changes"
        assert not [path for path in out.rglob(".*") if path.name.startswith(".")]
    # Only before the first state was whole: the folder, that of states, the draft, its rename.
    assert begun_anew == 4


LONG = {"steps": 60, "log_every": 2, "checkpoint_every": 20, "resume_every": 4}


def kill_loop(folder: Path) -> None:
    """Run in a process of its own: kill three children that train, at random moments, and let a fourth finish."""
    draw, out = random.Random(0), folder / "run"
    metrics = out / "metrics.jsonl"
    for kills in range(4):
        resume = (out / "resume").is_dir()
        child = os.fork()
        if child == 0:
            hm = gpt2(seed=kills, dropout=0.1)
            train_lm(hm, Rows(cycle), options(**LONG), out=out, resume=resume)
            os._exit(0)
        if kills < 3:
            enough = 700 + (metrics.stat().st_size if metrics.exists() else 0)
            while not metrics.exists() or metrics.stat().st_size < enough:
                time.sleep(0.001)
            time.sleep(draw.uniform(0, 0.05))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) == (kills < 3) and (status == 0) == (kills == 3), status


@pytest.mark.slow
def test_killed_processes_leave_what_another_goes_on_from_to_the_bytes_of_one_that_was_left_alone(
    tmp_path: Path,
) -> None:
    code = f"import pathlib, tests.model.test_lm_training as t; t.kill_loop(pathlib.Path({str(tmp_path / 'killed')!r}))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repo.REPO)}
    (tmp_path / "killed").mkdir()
    process = subprocess.Popen([sys.executable, "-c", code], cwd=repo.REPO, env=environment, stderr=subprocess.PIPE)
    train_lm(gpt2(dropout=0.1), Rows(cycle), options(**LONG), out=tmp_path / "alone")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()[-2000:]
    assert held(tmp_path / "killed" / "run") == held(tmp_path / "alone")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 5e-3}, r"options\.lr was 0\.01, now 0\.005"),
        ({"steps": STEPS + 1}, r"options\.steps was 14, now 15"),
        ({"seed": 3}, "seed was 0, now 3"),
        ({"texts": TEXTS[:-1]}, "data.source was 'a list of 40 texts', now 'a list of 39 texts'"),
        ({"texts": [TEXTS[1], *TEXTS[1:]]}, "first_batch was"),
    ],
)
def test_a_resume_with_other_settings_is_refused_and_touches_nothing(
    whole: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    settings = {**RUN, **{k: v for k, v in change.items() if k in RUN}}
    before = held(out)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ConfigError, match=message):
        patch.setattr(sys.modules[__name__], "RUN", settings)
        resumable(out, resume=True, **{k: v for k, v in change.items() if k not in RUN})
    assert held(out) == before


def test_a_resume_with_another_thread_count_model_or_edit_is_refused(tmp_path: Path) -> None:
    def run(hm: HookManager, resume: bool = True, **arguments: Any) -> None:
        train_lm(hm, Rows(uniform), options(steps=2), out=tmp_path / "run", resume=resume, **arguments)

    run(gpt2(), resume=False, write=Edit("0.z", torch.tanh))
    with pytest.raises(ConfigError, match=r"model was .*parameters was"):
        run(gpt2(layers=2), write=Edit("0.z", torch.tanh))
    with pytest.raises(ConfigError, match=r"write was .*tanh.*now .*sigmoid"):
        run(gpt2(), write=Edit("0.z", torch.sigmoid))
    with pytest.raises(ConfigError, match=r"measures was \[\], now \['m'\]"):
        run(gpt2(), write=Edit("0.z", torch.tanh), measures={"m": lambda hm: 0})
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.raises(ConfigError, match=f"threads was {threads}, now {threads + 1}"):
            run(gpt2(), write=Edit("0.z", torch.tanh))
    finally:
        torch.set_num_threads(threads)
    run(gpt2(), write=Edit("0.z", torch.tanh))


# -- what is refused --------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_training_and_leaves_what_was_saved(tmp_path: Path) -> None:
    hm = gpt2()
    calls = itertools.count()  # the first is the trial of the first batch

    def poison(module: Any, args: Any, output: Tensor) -> Tensor:
        return output * math.nan if next(calls) == 8 else output

    hm.model.lm_head.register_forward_hook(poison)
    run = options(steps=20, log_every=20, checkpoint_every=3, resume_every=3)
    with pytest.raises(TrainingError, match=r"NaN or infinite at step 8, with lr 0\.01; what was saved before stays"):
        train_lm(hm, Rows(uniform), run, out=tmp_path / "run")
    assert [step for step, _ in load_checkpoints(tmp_path / "run")] == [3, 6]
    assert [p.name for p in (tmp_path / "run" / "resume").iterdir()] == ["step-00000006"]
    assert json.loads((tmp_path / "run" / "provenance.json").read_text())["status"] == "failed"
    resumed = train_lm(gpt2(), Rows(uniform), run, out=tmp_path / "run", resume=True)
    assert (
        resumed.losses.tolist()
        == train_lm(gpt2(), Rows(uniform), run.model_copy(update={"checkpoint_every": 0})).losses.tolist()
    )


def test_a_folder_that_holds_something_is_refused_before_any_step(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    hm = gpt2()
    before = weights(hm)
    with pytest.raises(ArtifactError, match=r"already holds mine\.txt"):
        train_lm(hm, Rows(uniform), options(), out=tmp_path)
    with pytest.raises(ArtifactError, match="no state to resume from"):
        train_lm(hm, Rows(uniform), options(), out=tmp_path, resume=True)
    assert same(before, weights(hm)) and [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def of(ids: Any, weight: Any = None, positions: Any = None) -> Callable[[torch.Generator], LMBatch]:
    return lambda generator: LMBatch(ids, weight, positions)


ONES = torch.ones(2, 4, dtype=torch.long)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (of(ONES * VOCAB), "step 1: token id 16 is outside the vocabulary"),
        (of(ONES[:, :1]), "step 1: rows of one token predict nothing"),
        (of(ONES.repeat(1, 9)), "step 1: 36 tokens, but this model has 32 learned positions"),
        (of(ONES.float()), r"step 1: token ids are whole numbers, got torch\.float32"),
        (of([[1, 2]]), "step 1: the stream gave a LMBatch whose ids are a list; expected a tensor"),
        (of(ONES, torch.ones(2, 3)), r"step 1: weight is \(2, 3\); expected the shape of the ids, \(2, 4\)"),
        (of(ONES, -torch.ones(2, 4)), "step 1: weights must be finite and at least 0"),
        (of(ONES, torch.eye(2, 4)[:1].repeat(2, 1)), "step 1: weights must be .* with one above 0 after column 0"),
        (of(ONES, torch.full((2, 4), math.nan)), "step 1: weights must be finite"),
        (of(ONES, None, ONES[:1]), r"step 1: position_ids is \(1, 4\)"),
        (lambda generator: "text", "step 1: the stream gave a str whose ids are a NoneType"),
    ],
)
def test_batches_that_do_not_fit_are_refused_before_a_folder_is_made(draw: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        train_lm(gpt2(), Rows(draw), options(), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Stateless:
    """Yields batches without their state, or with one that is no JSON."""

    def __init__(self, *held: Any) -> None:
        self.held = held

    def batches(self, state: Mapping[str, Any] | None) -> Iterator[Any]:
        yield from self.held

    def describe(self) -> dict[str, Any]:
        return {"kind": torch.float32} if len(self.held) == 2 else {}


BATCH = LMBatch(ONES)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"resume": True}, ConfigError, "resume=True needs the folder"),
        ({"options": options(checkpoint_every=2)}, ConfigError, "checkpoints need a folder"),
        ({"measures": {"loss": len}}, ConfigError, "a measure cannot be called 'loss'"),
        ({"measures": {"m": 3}}, ConfigError, "measure 'm' is a int; expected a function"),
        ({"measures": {"m": lambda hm: "high"}}, DataError, "measure 'm' gave str; expected a number"),
        ({"measures": {"m": lambda hm: {"a": 1, "b": None}}}, DataError, "measure 'm' gave NoneType, int; expected"),
        ({"write": Ablate("7.z")}, InterpError, "7.z"),
        ({"data": Rows(uniform, n=7)}, DataError, "the data ended before step 8 of 10"),
        ({"data": Rows(uniform, n=0)}, DataError, "the data holds no batch"),
        ({"data": Stateless(BATCH)}, DataError, "step 1: the stream gave a LMBatch; expected a batch and a dict"),
        ({"data": Stateless((BATCH, {"at": ONES}))}, DataError, "the state of the data must be plain JSON"),
        ({"data": Stateless((BATCH, {}), (BATCH, {}))}, DataError, r"describe\(\) of the data must be plain JSON"),
    ],
)
def test_arguments_that_do_not_do_are_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"data": Rows(uniform), "options": options(), **changes}
    with pytest.raises(error, match=message):
        train_lm(gpt2(), arguments.pop("data"), arguments.pop("options"), **arguments)


def test_models_that_cannot_be_trained_are_refused(tmp_path: Path) -> None:
    half, frozen = gpt2(), gpt2()
    half.model.to(torch.bfloat16)
    frozen.model.requires_grad_(False)
    with pytest.raises(ModelError, match=r"weights are torch\.bfloat16; they are trained in float32"):
        train_lm(half, Rows(uniform), options())
    with pytest.raises(ModelError, match="no parameter of GPT2LMHeadModel requires gradients"):
        train_lm(frozen, Rows(uniform), options(), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_packed_documents_are_trained_apart() -> None:
    """Two documents in a row teach what they teach in rows of their own, in a model without learned positions."""

    def packed(generator: torch.Generator) -> LMBatch:
        ids = torch.randint(0, VOCAB, (2, 12), generator=generator)
        positions = torch.arange(6).repeat(2).expand(2, 12)
        return LMBatch(ids, (positions > 0).float(), positions)

    def apart(generator: torch.Generator) -> LMBatch:
        return LMBatch(packed(generator).ids.reshape(4, 6))

    together, alone, seeing = llama(), llama(), llama()
    run = options(steps=3, log_every=1)
    a = train_lm(together, Rows(packed), run)
    b = train_lm(alone, Rows(apart), run)
    torch.testing.assert_close(a.losses, b.losses, rtol=1e-5, atol=1e-6)
    c = train_lm(seeing, Rows(lambda g: LMBatch(packed(g).ids, packed(g).weight)), run)
    assert float((c.losses - b.losses).abs().max()) > 1e-4
