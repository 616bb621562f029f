"""The packaged models can do what their cards say, by heads of known kinds, and load without a network."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import interp
from interp.core.loading import PACKAGED
from interp.core.resources import resource
from interp.evaluate.tasks import repeat_loss, task_scores, text_loss
from interp.probing.card import WorldCard, world_card
from interp.testbed.tasks import task_pairs
from interp.testbed.text import Text
from interp.testbed.tokenizer import vocabulary

MUST = ("ioi", "fact", "functions", "agreement", "sentiment", "pronoun")
each_model = pytest.mark.parametrize("name", PACKAGED)


@pytest.fixture(scope="module")
def managers() -> dict[str, interp.HookManager]:
    return {name: interp.HookManager.load(name) for name in PACKAGED}


@pytest.fixture(scope="module")
def cards(managers: dict[str, interp.HookManager]) -> dict[str, WorldCard]:
    return {name: world_card(hm) for name, hm in managers.items()}


@each_model
def test_the_weights_are_small_and_plain(name: str, managers: dict[str, interp.HookManager]) -> None:
    folder = resource(PACKAGED[name])
    assert sum(p.numel() for p in managers[name].model.parameters()) <= 4_000_000
    assert (folder / "model.safetensors").stat().st_size <= 16 * 2**20
    assert {p.dtype for p in managers[name].model.parameters()} == {torch.float32}
    assert not [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pkl", ".py")]


def test_the_two_models_are_of_two_families(managers: dict[str, interp.HookManager]) -> None:
    one, two = (managers[name] for name in PACKAGED)
    assert (one.map.rotary, two.map.rotary) == (False, True)
    assert one.n_kv_heads == one.n_heads and two.n_kv_heads < two.n_heads
    assert one.d_vocab == two.d_vocab == len(vocabulary())


@each_model
def test_what_must_be_known_is_known_on_held_out_combinations(name: str, cards: dict[str, WorldCard]) -> None:
    scores = cards[name].scores
    found = dict(zip(scores.tasks, scores.accuracy.tolist(), strict=True))
    assert {task: found[task] for task in MUST if found[task] < 0.9} == {}
    # Null control: guessing would not do it.
    chance = dict(zip(scores.tasks, scores.chance.tolist(), strict=True))
    assert max(chance[task] for task in MUST) <= 0.51


@each_model
def test_repeats_are_copied_by_induction_heads(name: str, cards: dict[str, WorldCard]) -> None:
    card = cards[name]
    assert card.repeat_second < card.repeat_first / 3
    assert float(card.heads.induction.max()) >= 0.5 and float(card.heads.null.max()) < 0.2
    assert card.ablated and card.repeat_ablated >= 0.8 * card.repeat_first


@each_model
def test_other_heads_matter_less_for_repeats(
    name: str, managers: dict[str, interp.HookManager], cards: dict[str, WorldCard]
) -> None:
    """The control of the ablation: as many heads that neither match nor attend to the previous token."""
    hm, card = managers[name], cards[name]
    kinds = torch.stack([card.heads.induction, card.heads.previous_token]).amax(0)
    others = kinds.flatten().argsort()[: len(card.ablated)].tolist()
    write = [interp.Ablate(f"{i // hm.n_heads}.z", "mean", where=interp.Where(head=i % hm.n_heads)) for i in others]
    assert repeat_loss(hm, n=30, write=write).second < 0.5 * card.repeat_ablated


@each_model
def test_the_card_in_its_folder_is_what_is_measured(name: str, cards: dict[str, WorldCard]) -> None:
    """Numbers may differ in the last digit between processors, words may not."""
    written = (resource(PACKAGED[name]) / "README.md").read_text(encoding="utf-8")
    now = cards[name].to_markdown() + "\n"
    assert _words(written) == _words(now)
    for one, other in zip(_numbers(written), _numbers(now), strict=True):
        assert abs(one - other) <= max(0.0151, 0.01 * abs(other)), (one, other)


def _words(text: str) -> list[str]:
    return [piece for piece in text.replace("|", " ").split() if not _is_number(piece)]


def _numbers(text: str) -> list[float]:
    return [float(piece.strip("();,.")) for piece in text.replace("|", " ").split() if _is_number(piece)]


def _is_number(piece: str) -> bool:
    return piece.strip("();,.").replace(".", "", 1).replace("-", "", 1).isdigit()


@each_model
def test_training_text_is_no_surprise_and_nonsense_is(name: str, managers: dict[str, interp.HookManager]) -> None:
    hm = managers[name]
    plain = text_loss(hm, rows=10)
    ids, _, _ = Text("fresh 0").rows(10, 128)
    shuffled = ids[:, torch.randperm(128, generator=torch.Generator().manual_seed(0))]
    logits = hm.run(shuffled, logits="all").logits
    assert logits is not None
    nonsense = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), shuffled[:, 1:].flatten())
    assert plain < 3 < float(nonsense)


@each_model
def test_held_out_is_not_much_worse_than_training(name: str, managers: dict[str, interp.HookManager]) -> None:
    tasks = ["ioi", "pronoun", "agreement"]
    seen, unseen = (task_scores(managers[name], tasks=tasks, n=60, held_out=part) for part in (False, True))
    assert (seen.accuracy - unseen.accuracy).abs().max() < 0.15


@each_model
def test_both_families_answer_padded_on_either_side_alike(name: str, managers: dict[str, interp.HookManager]) -> None:
    hm, pairs = managers[name], task_pairs("ioi", 12)
    left, right = (pairs.tokens(hm, side=side) for side in ("left", "right"))
    one = hm.run(left.clean, logits="last").logits
    other = hm.run(right.clean, logits="last").logits
    assert one is not None and other is not None
    torch.testing.assert_close(one.reshape(12, -1), other.reshape(12, -1), atol=1e-4, rtol=1e-4)


def test_the_bytes_of_a_model_are_reached_by_its_name_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert interp.HookManager.load("testbed").name == "testbed"
    with pytest.raises(interp.ModelError, match="testbed-llama"):
        interp.HookManager.load("testbed-lama")


def test_it_loads_in_half_a_second_and_asks_no_network(repo: Path) -> None:
    """Once torch, transformers and the map are imported; a socket would raise."""
    code = (
        "import socket, time\n"
        "def no(*a, **k): raise OSError('no network here')\n"
        "import torch, transformers, interp\n"
        "import interp.core.manager, interp.core.bridge\n"
        "hm = interp.HookManager.load('testbed-llama')\n"
        "socket.socket.connect = no\n"
        "began = time.process_time(); interp.HookManager.load('testbed'); print(time.process_time() - began)\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=repo, env=env, check=True)
    # Generous: a slow machine is no defect; the figure itself is in the note.
    assert float(done.stdout) < 2
