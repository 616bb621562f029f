"""Transcoders for tests: random ones for any family, and a small model whose circuit is known by hand."""

from typing import Any

import torch
from torch import Tensor

from interp.core.manager import HookManager
from interp.data.store import Batch
from interp.dictionaries.base import Transcoder
from interp.dictionaries.options import DictionaryOptions
from interp.testbed.nano import NanoOptions, nano
from interp.testbed.text import Text
from interp.train.config import TrainOptions
from interp.train.trainer import train_dictionary

WORDS = 8
WIDTH = 24


def random_transcoder(
    hm: HookManager, layer: int, *, form: str = "transcoder", kind: str = "standard", site: str | None = None
) -> Transcoder:
    """A transcoder of one layer's MLP with random weights, about half of whose latents are active."""
    place = site or next(s for s in (f"{layer}.mlp.in", f"{layer}.ln2.out") if hm.atlas.has(s))
    options: Any = {"kind": kind, "form": form, "d_sae": 40, "k": 6}
    made: Any = DictionaryOptions(**options).make(hm.d_model, hm.d_model)
    generator = torch.Generator().manual_seed(layer)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        if hasattr(made, "threshold"):
            made.threshold.abs_()
    return placed(made, place, layer)


def placed(made: Any, place: str, layer: int) -> Transcoder:
    """A transcoder that says what it reads and writes."""
    made.cfg.metadata.update(hook_name=place, hook_name_out=f"{layer}.mlp_out")
    return made.eval().requires_grad_(False)


def mixed(hm: HookManager, *, but: tuple[int, ...] = ()) -> dict[int, Transcoder]:
    """Random transcoders of every layer but some, skip ones on even layers."""
    layers = [layer for layer in range(hm.n_layers) if layer not in but]
    return {i: random_transcoder(hm, i, form="transcoder" if i % 2 else "skip_transcoder") for i in layers}


def given(W_enc: Tensor, W_dec: Tensor, layer: int) -> Transcoder:
    """A ReLU transcoder of these weights, without biases, at `mlp.in`."""
    d_in, d_sae = W_enc.shape
    options: Any = {"kind": "standard", "form": "transcoder", "d_sae": d_sae}
    made: Any = DictionaryOptions(**options).make(d_in, W_dec.shape[1])
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
        made.W_enc.copy_(W_enc)
        made.W_dec.copy_(W_dec)
    return placed(made, f"{layer}.mlp.in", layer)


def planted() -> tuple[HookManager, dict[int, Transcoder]]:
    """A model of two blocks that says which words came, by a way that is known.

    Word i is dimension i. The first MLP writes 2 on dimension 16 + i where it stands; head 1 of block 1 looks at every
    position alike and moves dimensions 16… to 8…; the second MLP reads dimension 8 + i and writes 3 on dimension i,
    which is the logit of word i. Each MLP is exactly its transcoder: latent i is about word i, and latents 8 to 15 read
    dimensions that nothing writes.
    """
    options = NanoOptions(
        d_vocab=WORDS, n_layers=2, d_model=WIDTH, n_heads=2, d_head=WORDS, d_mlp=2 * WORDS, act="relu", norm="none",
        positions="none", bias=False,
    )  # fmt: skip
    model: Any = nano(options)
    eye = torch.eye(WIDTH)
    word, moved, made = eye[:WORDS], eye[WORDS : 2 * WORDS], eye[2 * WORDS :]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(word)
        model.lm_head.weight.copy_(word)
        attention = model.model.layers[1].self_attn
        attention.v_proj.weight[WORDS:] = made
        attention.o_proj.weight[:, WORDS:] = moved.T
        for block, reads, writes in ((0, word, 2 * made), (1, moved, 3 * word)):
            mlp = model.model.layers[block].mlp
            mlp.up_proj.weight[:WORDS] = reads
            mlp.down_proj.weight[:, :WORDS] = writes.T
    hm = HookManager.load(model)
    inert = torch.zeros(WIDTH, WORDS)
    silent = 5 * torch.cat([made, made])[:WORDS]
    first = given(torch.cat([word.T, inert - 0.5 * moved.T], 1), torch.cat([2 * made, silent]), 0)
    last = given(torch.cat([moved.T, inert - 0.5 * moved.T], 1), torch.cat([3 * word, word]), 1)
    return hm, {0: first, 1: last}


def trained(hm: HookManager, layers: tuple[int, ...], *, tokens: int = 100_000) -> dict[int, Transcoder]:
    """Small transcoders of some of the testbed's MLPs."""
    ids = Text(0).rows(400, 64)[0]
    run = hm.run(
        ids, read=[f"{i}.{kind}" for i in layers for kind in ("mlp.in", "mlp_out")], logits="none", batch_size=80
    )
    keep = ~hm.special_mask(ids).flatten()
    found = {}
    for layer in layers:
        x, y = (run[f"{layer}.{kind}"].flatten(0, 1)[keep] for kind in ("mlp.in", "mlp_out"))
        options: Any = {"kind": "batchtopk", "form": "transcoder", "d_sae": 256, "k": 12}
        made: Any = DictionaryOptions(**options).make(hm.d_model, hm.d_model)
        order = torch.Generator().manual_seed(0)
        parts = (i for _ in range(1000) for i in torch.randperm(len(x), generator=order).split(1024)[:-1])
        run_as = TrainOptions(tokens=tokens, batch_size=1024, buffer_tokens=2048, lr=5e-3)
        train_dictionary((Batch(x[i], y[i]) for i in parts), made, run_as, progress=False)
        found[layer] = placed(made, f"{layer}.mlp.in", layer)
    return found
