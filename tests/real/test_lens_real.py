"""Lenses and direct attribution on real models and text."""

import json
from functools import cache

import pytest
import torch

import interp
from interp.data.documents import Documents
from interp.data.tokens import TokenSource
from interp.lens.direct import direct_logit_attribution
from interp.lens.tuned_fit import TunedLensOptions, fit_tuned_lens
from tests import source

REAL = source.REPO.parent / "shared" / "real"
pytestmark = pytest.mark.usefixtures("unchecked")


@cache
def load(name: str) -> interp.HookManager:
    return interp.HookManager.load(str(REAL / "models" / name))


@cache
def stories(n: int) -> list[str]:
    lines = (REAL / "text" / "tinystories" / "tinystories_5k.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    return [text.replace("\n\n", "\n").strip() for text in texts if text.isascii()][:n]


@pytest.mark.parametrize("name", ["stories260K", "babyllama-105", "toy-slm4096"])
@pytest.mark.parametrize("way", ["component", "head", "neuron", "token"])
def test_terms_sum_to_the_likeliest_tokens_logit(name: str, way: str) -> None:
    hm = load(name)
    ids = hm.to_tokens("Once upon a time, there was a little girl. She was happy.").ids
    with torch.no_grad():
        logits = hm.model(ids, use_cache=False).logits[0, -1]
    found = direct_logit_attribution(hm, ids, int(logits.argmax()), by=way)
    told = torch.tensor([kind != "residue" for kind in found.kinds])
    assert float(found.values[told].sum()) == pytest.approx(float(logits.max()), rel=1e-4)


def test_a_tuned_lens_reads_every_layer_better_than_the_logit_lens() -> None:
    hm, texts = load("stories260K"), stories(400)
    made = {
        part: TokenSource(Documents(texts, part=part), hm.tokenizer, ctx=128, rows=8) for part in ("train", "held_out")
    }
    lens = fit_tuned_lens(hm, made["train"], options=TunedLensOptions(steps=80), held_out=made["held_out"])
    tuned, plain = lens.kl.mean(1), lens.kl_logit_lens.mean(1)
    assert bool((tuned[:-1] < plain[:-1]).all()) and not lens.kl[-1].any()
    assert bool((tuned[:-1] > tuned[1:]).all()), "later layers know more"
