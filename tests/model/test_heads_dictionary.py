"""Dictionaries of attention's heads: trained on z, and used wherever a dictionary is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import interp
from interp.cli.main import main as command
from interp.core.errors import ConfigError
from interp.data.tokens import TokenSource
from interp.dictionaries.base import SAE, Dictionary
from interp.dictionaries.heads import head_weights
from interp.dictionaries.topk import TopKSAE
from interp.evaluate.baseline import fit_pca
from interp.evaluate.dark_matter import dark_matter
from interp.evaluate.description_length import description_length
from interp.evaluate.dictionary import evaluate_dictionary
from interp.evaluate.top_examples import top_examples
from interp.report.latents import show_latents
from interp.train.config import TrainConfig
from interp.train.job import train_job
from tests.families import make, tokens, word_tokenizer

COMMON: dict[str, Any] = {
    "model": "testbed",
    "site": "1.z",
    "data": "testbed",
    "dictionary": {"d_sae": 96, "k": 8},
    "text": {"ctx": 32, "rows": 8},
    "train": {"tokens": 5000, "batch_size": 128, "buffer_tokens": 1024, "checkpoint_every": 5},
    "evaluation": {"tokens": 2000},
}


def source(n: int = 60) -> TokenSource:
    draw = torch.Generator().manual_seed(0)
    texts = [" ".join(f"w{i}" for i in torch.randint(1, 60, (15,), generator=draw).tolist()) for _ in range(n)]
    return TokenSource(texts, word_tokenizer(), ctx=16, rows=8, bos=True, packing="one_doc")


@pytest.fixture(scope="module")
def hm() -> interp.HookManager:
    """A tiny random Llama with fewer key/value heads than query heads."""
    found = interp.HookManager.load(make("Llama"), word_tokenizer())
    assert found.n_kv_heads < found.n_heads
    return found


def random_sae(width: int, **settings: Any) -> TopKSAE:
    made = TopKSAE.from_cfg({"architecture": "topk", "d_in": width, "d_sae": 3 * width, "k": 8, **settings})
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        made.W_dec.copy_(torch.nn.functional.normalize(torch.randn(3 * width, width, generator=draw), dim=1))
        made.W_enc.copy_(made.W_dec.T / 2)
    return made.requires_grad_(False)


def flat_of(hm: interp.HookManager, site: str) -> Tensor:
    parts = []
    for block in source().blocks():
        x = hm.run(block.inputs, read=[site])[site].flatten(2)
        parts.append(x[block.mask & ~block.special])
    return torch.cat(parts)


@pytest.mark.parametrize("normalize", ["layer_norm", "whiten"])
def test_a_dictionary_of_z_is_trained_measured_and_shown(tmp_path: Path, normalize: str, capfd: Any) -> None:
    config = {**COMMON, "out": str(tmp_path / "run"), "train": {**COMMON["train"], "normalize": normalize}}
    report = train_job(TrainConfig.model_validate(config), progress=False)
    made = SAE.load(tmp_path / "run")
    hm = interp.HookManager.load("testbed")
    assert made.cfg.d_in == hm.n_heads * hm.d_head and made.cfg.reshape_activations == "hook_z"
    assert made.cfg.metadata["hook_name"] == "blocks.1.attn.hook_z"
    assert made.cfg.normalize_activations == ("layer_norm" if normalize == "layer_norm" else "none")
    found = report.evaluation
    assert found is not None and 0 < found.fvu < 1 and found.pca_fvu is not None and 0 < found.pca_fvu < 1
    assert found.ce_recovered > 0.1 and found.l0 == pytest.approx(8, abs=0.5)
    torch.testing.assert_close(head_weights(made, hm.n_heads).sum(1), torch.ones(96, dtype=torch.float64))
    if normalize == "layer_norm":
        assert command(["eval", str(tmp_path / "run"), "--tokens", "1000"]) == 0
        assert command(["show", str(tmp_path / "run"), "--n", "4", "--tokens", "1000"]) == 0
        assert (tmp_path / "run" / "page.html").is_file()
        assert "at 1.z:" in capfd.readouterr().out


@pytest.mark.parametrize("site", ["1.q", "1.k", "1.v", "1.z"])
def test_figures_are_those_of_heads_side_by_side(hm: interp.HookManager, site: str) -> None:
    n = hm.n_kv_heads if site in ("1.k", "1.v") else hm.n_heads
    width, x = n * hm.d_head, flat_of(hm, site)
    sae = random_sae(width)  # which knows nothing of heads
    found = evaluate_dictionary(hm, sae, source(), site, pca=fit_pca(hm, source(), site, rank=4))
    wide = x.double()
    spread = (wide - wide.mean(0)).square().sum()
    assert found.fvu == pytest.approx(float((wide - sae(x).double()).square().sum() / spread), rel=1e-5)
    values = torch.linalg.svdvals(wide - wide.mean(0)).square()
    assert found.pca_fvu == pytest.approx(float(values[4:].sum() / values.sum()), rel=1e-3)
    ids = tokens(2, 9)
    spliced = hm.run(ids, write=[interp.Splice(site, sae)]).logits
    by_hand = hm.run(ids, write=[interp.Edit(site, lambda v: sae(v.flatten(2)).view_as(v))]).logits
    assert torch.equal(spliced, by_hand) and not torch.equal(spliced, hm.run(ids).logits)


def test_everything_else_reads_heads_too(hm: interp.HookManager) -> None:
    site, sae, x = "1.z", random_sae(hm.n_heads * hm.d_head, metadata={"hook_name": "1.z"}), flat_of(hm, "1.z")
    assert top_examples(hm, sae, source(), latents=5).n_tokens == len(x)
    error = dark_matter(hm, source(), sae, site, fit_share=0.5)
    assert error.n_fit + error.n_tokens == len(x)
    assert description_length(hm, source(), sae, site, sample_tokens=200).n_tokens == len(x) - 200
    assert "latent 3" in str(show_latents(hm, sae, "w1 w2 w3", [3]))
    with pytest.raises(ConfigError, match="reads one vector a token"):
        evaluate_dictionary(hm, sae, source(), "1.pattern")
    config = {**COMMON, "site": "1.pattern", "out": "nowhere"}
    with pytest.raises(ConfigError, match="reads one vector a token"):
        train_job(TrainConfig.model_validate(config), progress=False)


@pytest.mark.parametrize("how", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("site", ["1.resid_post", "1.z"])
def test_a_splice_keeps_the_error_and_edits_latents_where_tokens_are_normalised(
    hm: interp.HookManager, site: str, how: str
) -> None:
    width = hm.d_model if site == "1.resid_post" else hm.n_heads * hm.d_head
    sae: Dictionary = random_sae(width, normalize_activations=how)
    ids = tokens(2, 9)
    clean = hm.run(ids, read=[site], logits="all")
    x = clean[site]
    # An edit that does nothing leaves the model alone; one that does something adds what the decoder says, in the
    # token's own units.
    with pytest.warns(UserWarning, match="changed nothing"):
        kept = hm.run(ids, write=[interp.Splice(site, sae, keep_error=True, latents=lambda z: z)]).logits
    torch.testing.assert_close(kept, clean.logits, atol=1e-4, rtol=1e-4)

    def more(z: Tensor) -> Tensor:
        return z + torch.nn.functional.one_hot(torch.tensor(5), z.shape[-1])

    ours = hm.run(ids, write=[interp.Splice(site, sae, keep_error=True, latents=more)], read=[site])[site]
    flat = x.flatten(2)
    units = {
        "none": torch.ones(1),
        "layer_norm": flat.std(-1, keepdim=True),
        "constant_norm_rescale": flat.norm(dim=-1, keepdim=True) / width**0.5,
    }[how]
    torch.testing.assert_close(ours.flatten(2), flat + units * sae.W_dec[5], atol=1e-4, rtol=1e-4)
    # Gradients pass what normalises: those of the formula, written out.
    plain, layer = random_sae(width), "0.resid_post"

    def by_hand(v: Tensor) -> Tensor:
        f = v.flatten(2)
        if how == "none":
            return plain(f).view_as(v)
        if how == "layer_norm":
            mean, deviation = f.mean(-1, keepdim=True), f.std(-1, keepdim=True)
            return (plain((f - mean) / (deviation + 1e-5)) * deviation + mean).view_as(v)
        norm = f.norm(dim=-1, keepdim=True) / width**0.5
        return (plain(f / norm) * norm).view_as(v)

    def slope(write: Any) -> Tensor:
        out = hm.run(ids, write=[write], read=[layer], logits="all", grad=lambda out: out.logits[..., 7].sum(1))
        return out.grad[layer]

    expected = slope(interp.Edit(site, by_hand))
    torch.testing.assert_close(slope(interp.Splice(site, sae)), expected, atol=1e-5, rtol=1e-3)
    assert float(expected.abs().max()) > 1e-3
