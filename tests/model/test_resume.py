"""Stopping the main job and going on: the same bytes as if nothing had happened, or a refusal with the reason."""

import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tests.source as repo
from interp.cli.main import main as command
from interp.core.errors import ArtifactError, ConfigError
from interp.data.store import ActivationStore, Batch, StreamState
from interp.data.tokens import TokenSource
from interp.dictionaries.base import Dictionary
from interp.train.config import TrainConfig
from interp.train.job import JobReport, train_job
from interp.train.trainer import DictionaryFit
from tests.families import make, manager, word_tokenizer

SITE = "1.resid_post"


def random_texts(n: int, seed: int = 0) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(3, 20, (n,), generator=generator).tolist()
    rows = [torch.randint(1, 120, (size,), generator=generator).tolist() for size in sizes]
    return [" ".join(f"w{i}" for i in row) for row in rows]


# -- the stream -------------------------------------------------------------------------------------------------


def store(*, texts: int = 30, sites: Any = SITE, **changes: Any) -> ActivationStore:
    tokens = TokenSource(random_texts(texts), word_tokenizer(), ctx=16, rows=4, bos=True)
    return ActivationStore.stream(manager("Llama"), tokens, sites, **{"batch_size": 10, "buffer_tokens": 48, **changes})


def same(a: Batch, b: Batch) -> bool:
    pairs = [(a.x, b.x), (a.target, b.target), (a.tokens, b.tokens), (a.positions, b.positions)]
    return all(x is y is None or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs)


def through_json(state: StreamState) -> StreamState:
    """As a file holds it: nothing in it is shared with the stream."""
    return StreamState(json.loads(json.dumps(state.record)), {k: v.clone() for k, v in state.tensors.items()})


@pytest.mark.parametrize(
    ("repeat", "taken", "changes"),
    [
        (False, 40, {}),
        (True, 80, {}),
        (True, 40, {"dtype": torch.bfloat16, "buffer_tokens": 70, "seed": 3}),
        # The buffer never fills: all of the text is in it.
        (False, 12, {"texts": 8, "buffer_tokens": 500}),
    ],
)
def test_a_stream_goes_on_from_any_batch_to_the_same_bits(repeat: bool, taken: int, changes: dict[str, Any]) -> None:
    stream = store(repeat=repeat, **changes).batches()
    states, batches = [through_json(stream.state())], []
    for batch in itertools.islice(stream, taken):
        batches.append(batch)
        states.append(through_json(stream.state()))
    # With repetition, the text has come round more than once; without, it has ended, with a smaller batch.
    epochs = sum(len(b.x) for b in batches) / sum(len(text.split()) for text in random_texts(changes.get("texts", 30)))
    assert epochs > 2 if repeat and taken == 80 else epochs <= 2
    assert repeat or (epochs == 1 and next(stream, None) is None)
    for at, state in list(enumerate(states))[:: 1 if taken < 20 else 3]:
        rest = list(itertools.islice(store(repeat=repeat, **changes).batches(state=state), taken - at))
        assert len(rest) == len(batches) - at
        assert all(map(same, rest, batches[at:])), f"after {at} batches"
    assert not same(batches[0], batches[1])


def test_a_stream_of_two_sites_goes_on_with_targets() -> None:
    both = store(sites=["0.resid_post", SITE], repeat=True)
    stream = both.batches(x="0.resid_post", target=SITE)
    for _ in range(7):
        next(stream)
    again = both.batches(x="0.resid_post", target=SITE, state=through_json(stream.state()))
    pairs = list(itertools.islice(zip(stream, again, strict=False), 9))
    assert all(same(a, b) and a.target is not None for a, b in pairs)


def test_a_stream_that_was_asked_to_stop_while_it_filled_its_buffer_stands_after_its_last_batch() -> None:
    # A forward gives at most 60 rows, so that filling 200 takes several.
    made = store(repeat=True, buffer_tokens=400)
    whole = list(itertools.islice(made.batches(), 70))
    for allowed in range(1, 18):
        asked = iter([False] * allowed)
        stopping = made.batches(should_stop=lambda asked=asked: next(asked, True))  # type: ignore[misc]
        given = list(stopping)
        assert len(given) % 20 == 0 and next(stopping, None) is None
        rest = itertools.islice(made.batches(state=through_json(stopping.state())), 70 - len(given))
        assert all(map(same, [*given, *rest], whole)), f"stopped after {allowed} questions"


def test_a_stream_holds_what_it_has_not_served_and_no_more_than_it_says() -> None:
    stream = store(repeat=True, buffer_tokens=400).batches()
    largest = 400 * (32 * 4 + 32) + 4 * 16 * (32 * 4 + 16)
    for served in range(1, 60):
        next(stream)
        tensors = dict(stream.state().tensors)
        assert len(tensors["slots"]) == len(tensors["buffer.values.0"]) == 400 - 10 * ((served - 1) % 20 + 1)
        # The generator's own state is of a fixed size.
        tensors.pop("generator")
        assert sum(t.numel() * t.element_size() for t in tensors.values()) <= largest


def test_a_state_of_another_store_is_refused() -> None:
    stream = store().batches()
    next(stream)
    for changes in ({"batch_size": 11}, {"buffer_tokens": 60}, {"sites": "0.resid_post"}):
        with pytest.raises(ConfigError, match="this state is of a store with"):
            store(**changes).batches(state=stream.state())


# -- the job ----------------------------------------------------------------------------------------------------


STEPS, BATCH = 44, 1024


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A small job without `out`: 44 steps, the first weights from 16 batches, AuxK at work, over two epochs."""
    folder = tmp_path_factory.mktemp("resume")
    make("Llama").save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    lines = (json.dumps({"text": text}) for text in random_texts(1800))
    (folder / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    train: dict[str, Any] = {"tokens": STEPS * BATCH - 100, "batch_size": BATCH, "buffer_tokens": 2500, "log_every": 5}
    train |= {"checkpoint_every": 6, "dead_after": 2000, "lr": 3e-3}
    return {
        "model": str(folder / "model"),
        "site": SITE,
        "data": str(folder / "text.jsonl"),
        "dictionary": {"d_sae": 512, "k": 2},
        "text": {"ctx": 16, "rows": 100},
        "train": train,
        "evaluation": {"tokens": 500},
    }


def run(settings: dict[str, Any], out: Path, *, resume: bool = False, told: list[str] | None = None) -> JobReport:
    cfg = TrainConfig.model_validate({**settings, "out": str(out)})
    return train_job(cfg, resume=resume, progress=False, tell=(told if told is not None else []).append)


def held(out: Path) -> dict[str, bytes]:
    """All that a run must leave alike: every file but the speed, and those that name the folder or tell of signals."""
    free = ("speed.jsonl", "provenance.json", "config.yaml")
    return {p.name: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name not in free}


@pytest.fixture(scope="module")
def whole(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run(settings, out).status == "finished"
    assert {p.name for p in out.iterdir()} == {
        "cfg.json",
        "sae_weights.safetensors",
        "config.yaml",
        "evaluation.json",
        "metrics.jsonl",
        "provenance.json",
        "speed.jsonl",
    }
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 15, 20, 25, 30, 35, 40, 44]
    assert any(line["dead"] > 0 for line in lines) and any(line["aux"] > 0 for line in lines)
    return out


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], None]) -> None:
    """Do something right after an optimiser step."""
    plain = DictionaryFit.step

    def stepped(self: DictionaryFit, batch: Batch) -> None:
        plain(self, batch)
        if self.steps == step:
            act()

    monkeypatch.setattr(DictionaryFit, "step", stepped)


def send(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "step"), [(signal.SIGTERM, 3), (signal.SIGINT, 17), (signal.SIGTERM, 30), (signal.SIGINT, STEPS)]
)
def test_a_run_that_a_signal_stopped_goes_on_to_the_same_bytes(
    settings: dict[str, Any],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    step: int,
) -> None:
    out, told = tmp_path / "run", list[str]()
    with monkeypatch.context() as patch:
        at_step(patch, step, send(number))
        report = run(settings, out, told=told)
    assert (report.status, report.signal, report.training.steps) == ("stopped", number.name, step)
    assert f"{number.name}: stopping after this step, and saving" in told
    assert [p.name for p in (out / "resume").iterdir()] == [f"step-{step:08d}"]
    record = json.loads((out / "provenance.json").read_text())
    assert (record["status"], record["signal"], record["steps"]) == ("stopped", number.name, step)
    # What was trained so far can be used.
    assert bool(Dictionary.load(out)(torch.randn(3, 32)).isfinite().all())
    torch.manual_seed(step)
    rest = run(settings, out, resume=True, told=told)
    assert rest.status == "finished" and rest.training.steps == STEPS and f"from step {step} on" in told[-1]
    assert rest.training.resumed_at == step * BATCH
    assert held(out) == held(whole)
    record = json.loads((out / "provenance.json").read_text())
    assert (record["status"], record["resumed_at_step"]) == ("finished", step)


class Gone(BaseException):
    """Stands for the end of the process."""


def die() -> None:
    raise Gone


def test_sigusr1_saves_a_state_and_the_training_goes_on(
    settings: dict[str, Any], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rare = {**settings, "train": {**settings["train"], "checkpoint_every": 0}}
    out, told = tmp_path / "run", list[str]()
    with monkeypatch.context() as patch, pytest.raises(Gone):
        at_step(patch, 11, send(signal.SIGUSR1))
        at_step(patch, 20, die)
        run(rare, out, told=told)
    assert "SIGUSR1: saving a checkpoint after this step, and going on" in told
    assert [p.name for p in (out / "resume").iterdir()] == ["step-00000011"]
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 3
    run(rare, out, resume=True)
    assert held(out) == held(whole)


def test_a_run_that_ended_while_it_was_measured_is_only_measured_again(
    settings: dict[str, Any], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, told = tmp_path / "run", list[str]()

    def measure(*args: Any, **options: Any) -> None:
        send(signal.SIGUSR1)()
        send(signal.SIGTERM)()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("interp.train.session.evaluate_dictionaries", measure)
        report = run(settings, out, told=told)
    assert report.status == "stopped" and report.training.steps == STEPS and not report.training.stopped
    assert "SIGUSR1: the training is done and saved" in told and "SIGTERM: stopping" in told
    with monkeypatch.context() as patch:
        patch.setattr(DictionaryFit, "step", die)
        run(settings, out, resume=True)
    assert held(out) == held(whole)


def test_a_disk_that_is_full_is_named_and_the_run_goes_on_from_the_state_before(
    settings: dict[str, Any], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_the_disk() -> None:
        # The kernel itself refuses to write on, in the middle of a file.
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))

    try:
        with monkeypatch.context() as patch, pytest.raises(ArtifactError, match=r"step 18 cannot .*step 12 is whole"):
            at_step(patch, 16, fill_the_disk)
            run(settings, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in (out / "resume").iterdir()] == ["step-00000012"]
    assert json.loads((out / "provenance.json").read_text())["status"] == "failed"
    run(settings, out, resume=True)
    assert held(out) == held(whole)


@pytest.fixture
def begun(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that died after step 7."""
    out = tmp_path / "begun"
    with monkeypatch.context() as patch, pytest.raises(Gone):
        at_step(patch, 7, die)
        run(settings, out)
    return out


def changed(settings: dict[str, Any], section: str, **values: Any) -> dict[str, Any]:
    return {**settings, section: {**settings[section], **values}}


def test_settings_that_decide_the_outcome_must_be_as_they_were_and_others_need_not(
    settings: dict[str, Any], whole: Path, begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p: p.read_bytes() for p in begun.rglob("*") if p.is_file()}
    refused = [
        (changed(settings, "train", lr=1e-3), r"train\.lr was 0\.003, now 0\.001\. Resume with those"),
        (
            changed(settings, "train", tokens=10**6, batch_size=1000),
            r"train\.tokens was .*train\.batch_size was 1024, now",
        ),
        (changed(settings, "dictionary", k=3), r"dictionary\.k was 2, now 3"),
        (changed(settings, "evaluation", data=settings["data"]), r"evaluation\.data was None"),
        ({**settings, "seed": 1}, "seed was 0, now 1"),
        ({**settings, "dtype": "float32"}, "dtype was None, now 'float32'"),
    ]
    for other, message in refused:
        with pytest.raises(ConfigError, match=message):
            run(other, begun, resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 7)
        with pytest.raises(ConfigError, match="threads was 1, now 7"):
            run(settings, begun, resume=True)
    assert {p: p.read_bytes() for p in begun.rglob("*") if p.is_file()} == before
    # How often states are saved and how much is measured decides nothing of the weights.
    free = changed(changed(settings, "train", checkpoint_every=0), "evaluation", tokens=400)
    run(free, begun, resume=True)
    for name in ("sae_weights.safetensors", "metrics.jsonl"):
        assert held(begun)[name] == held(whole)[name]
    assert "checkpoint_every: 0" in (begun / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda model, text: make("Llama", seed=4).save_pretrained(model), "model_weights was"),
        (lambda model, text: text.write_text("\n".join(text.read_text().splitlines()[::-1])), "first_tokens was"),
    ],
)
def test_other_weights_or_another_text_of_the_same_name_are_refused(
    settings: dict[str, Any], begun: Path, spoil: Callable[[Path, Path], None], message: str
) -> None:
    model, text = Path(settings["model"]), Path(settings["data"])
    kept = {path: path.read_bytes() for path in [*model.iterdir(), text]}
    try:
        spoil(model, text)
        with pytest.raises(ConfigError, match=message):
            run(settings, begun, resume=True)
    finally:
        for path, data in kept.items():
            path.write_bytes(data)


def test_other_versions_are_told_and_not_refused(settings: dict[str, Any], whole: Path, begun: Path) -> None:
    path = begun / "resume" / "step-00000006" / "state.json"
    record = json.loads(path.read_text())
    record["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(record))
    told: list[str] = []
    run(settings, begun, resume=True, told=told)
    assert "other versions (torch was '1.0', now " in told[0]
    assert held(begun) == held(whole)


def test_what_cannot_be_resumed_says_why(settings: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is finished; there is nothing to resume"):
        run(settings, whole, resume=True)
    with pytest.raises(ArtifactError, match="is no folder"):
        run(settings, tmp_path / "nowhere", resume=True)
    cfg = TrainConfig.model_validate({**settings, "out": str(tmp_path / "run")})
    with pytest.raises(ConfigError, match="give one of them"):
        train_job(cfg, force=True, resume=True)


# -- processes that are killed ------------------------------------------------------------------------------------


def kill_loop(settings: dict[str, Any], folder: Path, rounds: int) -> None:
    """Run in a process of its own: in each round three children die or stop at random moments, and a fourth finishes.

    Everything that takes long to import has been imported here; no thread has been started.
    """
    make("Llama")
    for number in range(rounds):
        draw, out = random.Random(number), folder / f"run-{number}"
        stop = draw.choice([signal.SIGTERM, signal.SIGINT])
        for kill, (how, code) in enumerate([(signal.SIGPROF, -27), (stop, 143), (signal.SIGUSR1, -27), (None, 0)]):
            step, seed = 12 * kill + draw.randint(1, 8), draw.random()
            child = os.fork()
            if child == 0:
                if how is not None:
                    end_after(step, how, random.Random(seed))
                os._exit({"finished": 0, "stopped": 143}[run(settings, out, resume=kill > 0).status])
            _, status = os.waitpid(child, 0)
            ended = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
            assert ended == code, f"round {number}, child {kill} ended with {ended}, expected {code}"


def end_after(step: int, how: signal.Signals, draw: random.Random) -> None:
    """Send this process a signal at a random moment after a step, on its own clock, so that no load shifts it.

    SIGPROF, which nothing handles, ends it as SIGKILL does: at any instruction. After SIGUSR1 it ends in that way too.
    """
    plain, armed = DictionaryFit.step, list[int]()

    def stepped(self: DictionaryFit, batch: Batch) -> None:
        began = time.process_time()
        plain(self, batch)
        if self.steps >= step and not armed:
            armed.append(self.steps)
            if how == signal.SIGUSR1:
                os.kill(os.getpid(), how)
            elif how != signal.SIGPROF:
                signal.signal(signal.SIGPROF, lambda *_: os.kill(os.getpid(), how))
            signal.setitimer(signal.ITIMER_PROF, draw.uniform(1e-4, 8 * (time.process_time() - began)))

    DictionaryFit.step = stepped  # type: ignore[method-assign]


@pytest.mark.parametrize("rounds", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_processes_leave_what_another_goes_on_from_to_the_bytes_of_one_that_was_left_alone(
    settings: dict[str, Any], whole: Path, tmp_path: Path, rounds: int
) -> None:
    kill_and_compare(settings, whole, tmp_path, rounds)


def kill_and_compare(settings: dict[str, Any], whole: Path, tmp_path: Path, rounds: int) -> None:
    often = changed(settings, "train", checkpoint_every=2)
    (tmp_path / "settings.json").write_text(json.dumps(often))
    code = (
        "import json, pathlib, tests.model.test_resume as t\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        f"t.kill_loop(json.loads((folder / 'settings.json').read_text()), folder, {rounds})"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repo.REPO)}
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=repo.REPO, env=environment, capture_output=True, timeout=3000
    )
    assert process.returncode == 0, process.stderr.decode()[-2000:]
    for number in range(rounds):
        assert held(tmp_path / f"run-{number}") == held(whole), f"round {number}"


VARIANTS: dict[str, dict[str, Any]] = {
    "stored": {},
    "tuned": {
        "train": {"optimizer": "signsgd", "ema": 0.9, "normalize": "whiten", "schedule": "cosine"},
        "dictionary": {"init": "subspace"},
    },
    "behind-the-site": {"downstream": {"loss": "kl"}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_so_they_do_of_a_store_with_all_options_and_with_a_loss_behind_the_site(
    settings: dict[str, Any], tmp_path: Path, name: str
) -> None:
    variant = {**settings, **{k: {**settings.get(k, {}), **v} for k, v in VARIANTS[name].items()}}
    if name == "stored":
        line = f"capture --model {settings['model']} --sites {SITE} --data {settings['data']} --text.ctx 16".split()
        assert command([*line, "--text.part", "train", "--out", str(tmp_path / "store")]) == 0
        variant["store"] = str(tmp_path / "store")
    assert run(variant, tmp_path / "whole").status == "finished"
    kill_and_compare(variant, tmp_path / "whole", tmp_path, 7)


def test_the_comparison_of_bytes_sees_a_seed_and_a_step(settings: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    run({**settings, "seed": 1}, tmp_path / "seed")
    run(changed(settings, "train", tokens=(STEPS - 1) * BATCH), tmp_path / "step")
    name = "sae_weights.safetensors"
    assert len({held(out)[name] for out in (whole, tmp_path / "seed", tmp_path / "step")}) == 3
    one, other = (Dictionary.load(out) for out in (whole, tmp_path / "seed"))
    assert not torch.allclose(one.W_dec, other.W_dec)
