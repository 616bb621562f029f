"""The engine on real models and text: bits, losses, and heads whose work is known."""

import itertools
import json
from functools import cache

import pytest
import torch
from torch import Tensor

import interp
from tests import source

REAL = source.REPO.parent / "shared" / "real"
pytestmark = pytest.mark.usefixtures("unchecked")


@cache
def load(name: str) -> interp.HookManager:
    return interp.HookManager.load(str(REAL / "models" / name))


@cache
def stories(n: int) -> list[str]:
    """Clean stories: single newlines, no mojibake, as the models' own text was."""
    lines = (REAL / "text" / "tinystories" / "tinystories_5k.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    return [text.replace("\n\n", "\n").strip() for text in texts if text.isascii()][:n]


def nats(hm: interp.HookManager, texts: list[str], longest: int) -> float:
    """Mean next-token loss."""
    total, count = 0.0, 0
    for text in texts:
        ids = hm.to_tokens(text).ids[:, :longest]
        loss = hm.run(ids).loss_per_token()
        total, count = total + float(loss.double().sum()), count + ids.shape[1] - 1
    return total / count


@pytest.mark.parametrize("name", ["stories260K", "babyllama-105", "toy-slm4096"])
def test_logits_are_bit_equal_with_every_residual_and_pattern_read(name: str) -> None:
    hm = load(name)
    ids = hm.to_tokens("Once upon a time, there was a little girl. She was happy.").ids
    with torch.no_grad():
        plain = hm.model(ids, use_cache=False).logits
    assert torch.equal(hm.run(ids).logits, plain)
    assert torch.equal(hm.run(ids, read=["*.resid_post", "*.pattern"], logits="all").logits, plain)


def test_stories_loss_is_the_published_one() -> None:
    assert nats(load("stories260K"), stories(200), 512) == pytest.approx(1.33, abs=0.02)


def test_the_character_models_loss_is_the_published_one() -> None:
    assert nats(load("babyllama-105"), stories(60), 256) == pytest.approx(0.656, abs=0.02)


def test_pronouns_follow_the_name() -> None:
    hm = load("stories260K")
    she, he = hm.to_single_token(" She"), hm.to_single_token(" He")
    out = hm.run(["Lily went to the park.", "Tom went to the park."], logits="last")
    lily, tom = interp.logit_diff(out, she, he).tolist()
    assert lily > 2
    assert tom < -2


def test_previous_token_heads_are_where_they_are_known_to_be() -> None:
    hm = load("stories260K")
    eager = interp.HookManager.load(str(REAL / "models" / "stories260K"), model_kwargs={"attn_implementation": "eager"})
    scores = torch.zeros(hm.n_layers, hm.n_heads)
    texts = stories(20)
    for text in texts:
        ids = hm.to_tokens(text).ids[:, :64]
        pattern = hm.run(ids, read=["*.pattern"]).stack("pattern")[:, 0]
        with torch.no_grad():
            theirs = torch.stack(eager.model(ids, output_attentions=True).attentions)[:, 0]
        assert float((pattern - theirs).abs().max()) <= 1e-5
        scores += previous(pattern) / len(texts)
    known = {(3, 6), (1, 3), (1, 6)}
    strongest = scores.flatten().argsort(descending=True)[:3].tolist()
    assert {divmod(i, hm.n_heads) for i in strongest} == known
    assert scores[1, 3] == pytest.approx(0.63, abs=0.03)
    assert scores[1, 6] == pytest.approx(0.51, abs=0.03)
    assert scores[2, 0] == pytest.approx(0.46, abs=0.05)


def previous(pattern: Tensor) -> Tensor:
    """Mean attention to the token before, over all positions that have one: [layer, head]."""
    return torch.diagonal(pattern, -1, -2, -1)[..., 1:].mean(-1)


def test_the_sorter_sorts_all_inputs() -> None:
    hm = load("toy-gptnano-sort")
    given = torch.tensor(list(itertools.product(range(3), repeat=6)))
    out = hm.generate(given, max_new_tokens=6, generation_kwargs={"eos_token_id": -1})
    assert torch.equal(out.new_tokens, given.sort(dim=1).values)


def test_a_steered_story_differs_from_the_plain_one_and_caching_does_not_matter() -> None:
    hm = load("stories260K")
    texts = ["Lily went to the park. She", "Tom had a big red ball and he"]
    vector = hm.run(texts, read=["3.resid_post"])["3.resid_post"][:, -1].mean(0)
    write = [interp.Add("3.resid_post", vector, scale=2.0, where=interp.Where.last_prompt() | interp.Where.generated())]
    plain = hm.generate(texts, max_new_tokens=12)
    steered = hm.generate(texts, max_new_tokens=12, write=write)
    whole = hm.generate(texts, max_new_tokens=12, write=write, use_cache=False)
    assert steered.text != plain.text
    assert steered.text == whole.text
