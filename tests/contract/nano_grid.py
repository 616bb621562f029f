"""The nano models that the contract tests run, and their place among the families.

The grid covers every norm, position scheme, kind of MLP, grouping, bias and the extra slot (k′, v′), not every product.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import pytest

from interp.testbed.nano import NanoOptions, nano_config
from tests.contract import laws, laws_edits, plain
from tests.families import FAMILIES, VOCAB

BASE = NanoOptions(
    d_vocab=VOCAB, n_ctx=40, d_model=32, d_mlp=64, bos_token_id=0, eos_token_id=0, pad_token_id=0, unembed_bias=True
)
GRID: dict[str, NanoOptions] = {
    "NanoGPT": BASE,
    "NanoTied": replace(BASE, tied=True, norm_gain=False, act="gelu_new", unembed_bias=False, bias=False),
    "NanoLlama": replace(BASE, norm="rms", positions="rotary", mlp="gated", act="silu", n_kv_heads=2, bias=False),
    "NanoBilinear": replace(BASE, norm="rms", norm_gain=False, positions="rotary", mlp="bilinear", d_head=12),
    "NanoShort": replace(BASE, positions="shortformer", act="relu", n_kv_heads=1),
    "NanoNormless": replace(BASE, norm="none", act="relu", d_vocab_out=VOCAB + 3, bias=False),
    "NanoPlaceless": replace(BASE, positions="none", mlp="bilinear", attention_scale=0.5),
    "NanoAttention": replace(BASE, d_mlp=0, positions="shortformer", norm_gain=False),
    "NanoAttentionNormless": replace(BASE, d_mlp=0, norm="none", positions="rotary", n_kv_heads=2, attention_scale=1.0),
    "NanoSink": replace(BASE, sink=True),
    "NanoSinkGrouped": replace(BASE, sink=True, n_kv_heads=2, positions="rotary", norm="rms", mlp="gated", d_head=12),
    "NanoSinkAttention": replace(BASE, sink=True, d_mlp=0, norm="none", positions="shortformer", bias=False),
}
SINKS = [name for name, options in GRID.items() if options.sink]
SINKLESS = [name for name in GRID if name not in SINKS]
every_nano = pytest.mark.parametrize("name", list(GRID))
every_sinkless = pytest.mark.parametrize("name", SINKLESS)
every_sink = pytest.mark.parametrize("name", SINKS)
SOME = ("NanoGPT", "NanoBilinear", "NanoAttention", "NanoSinkGrouped")
some_nanos = pytest.mark.parametrize("name", SOME)  # for laws that cost a run per site: between them, every switch


@contextmanager
def among_the_families() -> Iterator[None]:
    """The laws look families up by name: inside the block, the grid is among them."""
    families = {name: functools.partial(nano_config, options) for name, options in GRID.items()}
    layouts = {name: replace(plain._llama(), post="mlp.down_proj" if o.d_mlp else "") for name, o in GRID.items()}
    still = tuple(name for name, o in GRID.items() if o.positions != "rotary" or o.sink)
    kinds = plain.kinds

    def without_mlp(name: str) -> list[str]:
        attention_only = name in GRID and GRID[name].d_mlp == 0
        return [kind for kind in kinds(name) if not (attention_only and kind == "mlp_out")]

    with (
        mock.patch.dict(FAMILIES, families),
        mock.patch.dict(plain.LAYOUTS, layouts),
        mock.patch.object(plain, "kinds", without_mlp),
        mock.patch.object(laws_edits, "NOT_ROTARY", (*laws.NOT_ROTARY, *still)),
    ):
        nano_config()  # transformers knows the classes from here on
        yield
