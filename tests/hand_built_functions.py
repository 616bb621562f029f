"""A model by hand in which one head carries which of two functions the shots show, and a task it solves."""

import functools
from typing import Any

import torch

from interp.core.manager import HookManager
from interp.data.icl import FunctionTask, with_others
from interp.testbed.nano import NanoOptions, nano
from tests.families import VOCAB, word_tokenizer

N = 12
SHARP = 30.0
GAIN = 4.0
LEAN = 0.5
CARRIER = (0, 1)
"""The head that carries the function."""

_INPUT, _CODE, _FLAG, _KIND, _SPARE = 0, N, N + 2, N + 3, N + 5
_FIRST = {"input": 10, "a": 30, "b": 50}


@functools.cache
def function_model(n_kv_heads: int = 2) -> HookManager:
    """Two layers of two heads, attention only, no norms: "w10 w30 w11 w31 … w15" is answered "w35".

    Input w(10 + i) has the output w(30 + i) under function a, w(50 + i) under b. An output's embedding says that it is
    one, and whose. L0H1 attends to all outputs alike and writes the share of a and of b as two coordinates, the code.
    The logit of a's output is GAIN · (this is its input + the code of a), that of b's alike, with LEAN more for b. L0H0
    writes to a coordinate that nothing reads; the second layer writes nothing. Output projections have a bias.
    """
    d, width = N + 6, 4
    options = NanoOptions(
        d_vocab=VOCAB,
        n_ctx=64,
        n_layers=2,
        d_model=d,
        n_heads=2,
        n_kv_heads=n_kv_heads,
        d_head=width,
        d_mlp=0,
        norm="none",
        positions="none",
        attention_scale=1.0,
    )
    model: Any = nano(options)
    i = torch.arange(N)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        embed, head = model.model.embed_tokens.weight, model.lm_head.weight
        embed[_FIRST["input"] + i, _INPUT + i] = 1.0
        for kind, name in enumerate("ab"):
            out = _FIRST[name] + i
            embed[out, _FLAG] = 1.0
            embed[out, _KIND + kind] = 1.0
            head[out, _INPUT + i] = GAIN + LEAN * kind
            head[out, _CODE + kind] = GAIN
        first, second = (layer.self_attn for layer in model.model.layers)
        own = 0 if n_kv_heads == 1 else width  # where the carrier's keys and values begin
        first.q_proj.bias[width] = SHARP
        first.k_proj.weight[own, _FLAG] = 1.0
        for kind in range(2):
            first.v_proj.weight[own + kind, _KIND + kind] = 1.0
            first.o_proj.weight[_CODE + kind, width + kind] = 1.0
        first.v_proj.weight[2, _FLAG] = 1.0
        first.o_proj.weight[_SPARE, 2] = 1.0
        for layer in (first, second):
            layer.o_proj.bias[_CODE:] = 0.7
    return HookManager.load(model, word_tokenizer())


def code_of(kind: str) -> torch.Tensor:
    """What the carrier writes where all shots are of one function."""
    vector = torch.zeros(N + 6)
    vector[_CODE + "ab".index(kind)] = 1.0
    return vector


def function_tasks() -> dict[str, FunctionTask]:
    """The two functions, each knowing the other's outputs."""
    made = {
        name: FunctionTask(name, tuple((f"w{10 + i}", f"w{_FIRST[name] + i}") for i in range(N)), "{input} {output} ")
        for name in "ab"
    }
    return with_others(made)
