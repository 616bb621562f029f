"""Latents of transcoders, which read one site and write another: every cell is an edit made by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor

from interp.core.errors import ConfigError
from interp.core.intervention import Add, Edit
from interp.core.where import Where
from interp.dictionaries.base import Transcoder
from interp.patching.activation import activation_patch
from interp.patching.options import PatchOptions
from tests.families import manager
from tests.model.test_patching import Identity, close, ragged
from tests.transcoders import random_transcoder


@pytest.mark.parametrize("name", ["GPT2", "Gemma2", "GPTNeoX"])
@pytest.mark.parametrize("form", ["transcoder", "skip_transcoder"])
def test_a_latent_moves_what_the_transcoder_writes_along_its_row(name: str, form: str) -> None:
    hm, pairs = manager(name), ragged()
    coder = random_transcoder(hm, 0, form=form)
    assert isinstance(coder, Transcoder)
    tokens, place = pairs.tokens(hm), str(coder.cfg.metadata["hook_name"])
    latents = [0, 7, 21]
    options = PatchOptions(by="latent", dictionary=coder, latents=latents)
    found = activation_patch(hm, pairs, sites="0.mlp_out", options=options)
    assert found.sites == ["0.mlp_out"] and found.columns == ["0", "7", "21"]
    assert found.provenance.settings["reads"] == [place]
    there, here = (coder.encode(hm.run(t, read=[place])[place]) for t in (tokens.clean, tokens.corrupted))
    for column, latent in enumerate(latents):
        change = (there - here)[..., latent, None] * coder.W_dec[latent]
        edit = Add("0.mlp_out", change)
        by_hand = tokens.logit_diff(hm.run(tokens.corrupted, write=[edit], logits="last"))
        close(found.patched[0, column], by_hand)
    assert float(found.effect.abs().max()) > 1e-3
    naive = PatchOptions(by="latent", dictionary=coder, latents=latents, engine="naive")
    close(activation_patch(hm, pairs, sites="0.mlp_out", options=naive).patched, found.patched)


class Elsewhere:
    """A dictionary without metadata, which reads the stream and writes a narrower site through fixed rows."""

    def __init__(self, d: int, out: int) -> None:
        self.W_dec = torch.randn(d, out, generator=torch.Generator().manual_seed(1))

    def encode(self, x: Tensor) -> Tensor:
        return (x - 1.5).relu()

    def decode(self, latents: Tensor) -> Tensor:
        return latents @ self.W_dec + 1.0


def test_any_dictionary_may_write_elsewhere_and_dead_latents_change_nothing() -> None:
    hm, pairs = manager("Llama"), ragged()
    tokens, coder = pairs.tokens(hm), Elsewhere(hm.d_model, 64)
    options = PatchOptions(by="latent", dictionary=coder, reads="1.resid_mid")
    found = activation_patch(hm, pairs, sites=["1.mlp_post"], options=options)
    sides = (tokens.clean, tokens.corrupted)
    there, here = (coder.encode(hm.run(t, read=["1.resid_mid"])["1.resid_mid"]) for t in sides)
    assert found.patched.shape == (1, hm.d_model, 4)
    moves = (((there - here) != 0) & tokens.corrupted.mask[..., None]).any(0).any(0)
    live = int(moves.int().argmax())
    change = (there - here)[..., live, None] * coder.W_dec[live]
    edit = Edit("1.mlp_post", lambda x: x + change, where=Where())
    close(found.patched[0, live], tokens.logit_diff(hm.run(tokens.corrupted, write=[edit], logits="last")))
    assert torch.equal(found.unchanged[0], ~moves) and bool(moves.any()) and not bool(moves.all())


@pytest.mark.usefixtures("unchecked")
def test_transcoders_that_do_not_fit_the_site_are_refused() -> None:
    hm, pairs = manager("GPT2"), ragged()
    coder: Any = random_transcoder(hm, 0)

    def patched(sites: Any, **settings: Any) -> None:
        activation_patch(hm, pairs, sites=sites, options=PatchOptions(by="latent", **settings))

    with pytest.raises(ConfigError, match=r"writes 0\.mlp_out; sites are 1\.mlp_out"):
        patched(["1.mlp_out"], dictionary=coder)
    with pytest.raises(ConfigError, match="sites are 0"):
        patched("mlp_out", dictionary=coder)
    with pytest.raises(ConfigError, match=r"reads 1\.mlp_in, which comes after"):
        patched(["0.mlp_out"], dictionary=Identity(hm.d_model), reads="1.mlp_in")
    coder.cfg.metadata.pop("hook_name")
    with pytest.raises(ConfigError, match="does not say what it reads"):
        patched(["0.mlp_out"], dictionary=coder)
    patched(["0.mlp_out"], dictionary=coder, reads="0.mlp.in", latents=[0])
    for wrong in ({"reads": "0.mlp.in"}, {"latents": [1]}):
        with pytest.raises(ConfigError, match="is for by='latent'"):
            PatchOptions(**wrong)
