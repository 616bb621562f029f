"""Dark matter and description length on a model's activations: from text, a streamed store and a stored one."""

from pathlib import Path

import pytest
import torch

import interp
from interp.data.store import ActivationStore
from interp.data.tokens import TokenSource
from interp.dictionaries.topk import TopKSAE
from interp.evaluate.dark_matter import dark_matter, dark_matter_of
from interp.evaluate.description_length import description_length, description_length_of
from tests.families import make, word_tokenizer

SITE = "1.resid_post"
FIGURES = ("fvu", "fvu_nonlinear", "linear_share", "r2", "r2_pooled", "norm_r2")


@pytest.fixture(scope="module")
def hm() -> interp.HookManager:
    """A tiny random Llama."""
    return interp.HookManager.load(make("Llama"), word_tokenizer())


def source(n: int = 200, packing: str = "one_doc") -> TokenSource:
    draw = torch.Generator().manual_seed(0)
    sizes = torch.randint(3, 14, (n,), generator=draw).tolist()
    texts = [" ".join(f"w{i}" for i in torch.randint(1, 60, (size,), generator=draw).tolist()) for size in sizes]
    return TokenSource(texts, word_tokenizer(), ctx=16, rows=4, bos=True, packing=packing)


def random_sae(d: int) -> TopKSAE:
    sae = TopKSAE.from_cfg({"architecture": "topk", "d_in": d, "d_sae": 3 * d, "k": 8})
    with torch.no_grad():
        rows = torch.nn.functional.normalize(torch.randn(3 * d, d), dim=1)
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_(rows.T / 2)
    return sae.requires_grad_(False)


def test_text_gives_what_its_activations_give_and_a_stored_store_too(hm: interp.HookManager, tmp_path: Path) -> None:
    sae, tokens = random_sae(hm.d_model), source()
    parts = []
    for block in tokens.blocks():
        x = hm.run(block.inputs, read=[SITE])[SITE]
        keep = block.mask & ~block.special
        parts += [(row[k], row.new_full((int(k.sum()),), 0)) for row, k in zip(x, keep, strict=True)]
    flat = torch.cat([x for x, _ in parts])
    found = dark_matter(hm, tokens, sae, SITE)
    assert found.n_fit + found.n_tokens == len(flat) and found.unit == "row"
    assert found.n_units == pytest.approx(2 / 3 * 200, abs=2) and "row" in found.summary()
    error = flat.double() - sae(flat).double()
    assert found.fvu == pytest.approx(float(error.pow(2).sum() / (flat - flat.mean(0)).double().pow(2).sum()), rel=0.1)
    interp.capture(hm, tokens, SITE, tmp_path / "store", options=interp.CaptureOptions(dtype="float32"))
    stored = dark_matter_of(ActivationStore.open(tmp_path / "store", batch_size=64, buffer_tokens=128), sae)
    # One document a row: documents are dealt as rows are.
    assert stored.unit == "document" and stored.n_units == found.n_units
    for name in FIGURES:
        assert getattr(stored, name) == pytest.approx(getattr(found, name), abs=1e-6)
        assert stored.intervals[name] == pytest.approx(found.intervals[name], abs=1e-6)
    streamed = dark_matter_of(ActivationStore.stream(hm, tokens, SITE, batch_size=64, buffer_tokens=128), sae)
    assert streamed.fvu == pytest.approx(found.fvu, rel=0.1) and streamed.unit == ""
    # A store has documents of one_doc rows in another order, so another sample chooses the step: packed rows here.
    tokens = source(packing="concat")
    interp.capture(hm, tokens, SITE, tmp_path / "packed", options=interp.CaptureOptions(dtype="float32"))
    bits = description_length(hm, tokens, sae, SITE, sample_tokens=300)
    packed = ActivationStore.open(tmp_path / "packed", batch_size=64, buffer_tokens=128)
    again = description_length_of(packed, sae, sample_tokens=300)
    assert bits.n_tokens == len(flat) - 300 and bits.bits == pytest.approx(again.bits, rel=1e-4)
    assert bits.l0 == again.l0 and bits.site == "blocks.1.hook_resid_post"
