"""Models whose weights are written by hand, so that what each head does is known."""

import functools
from typing import Any

import torch

from interp.core.manager import HookManager
from interp.testbed.nano import NanoOptions, nano

N_TOKENS, N_POSITIONS = 12, 12
SHARP = 30.0


@functools.cache
def induction_model() -> HookManager:
    """Two layers of two heads, attention only, no norms: what followed the last token before is said again.

    The stream holds four one-hot blocks: the token, the position, the token before (written by a0.h0) and the answer
    (written by a1.h0). a0.h0 attends to the position before; a1.h0 looks for the last token among the tokens before
    and copies the token that stands there. a0.h1 copies the token it stands on into the block of the answer, with a
    small weight that no one needs; a1.h1 does nothing.
    """
    v, t = N_TOKENS, N_POSITIONS
    options = NanoOptions(
        d_vocab=v,
        n_ctx=t,
        n_layers=2,
        d_model=3 * v + t,
        n_heads=2,
        d_head=12,
        d_mlp=0,
        norm="none",
        bias=False,
        attention_scale=1.0,
    )
    model: Any = nano(options)
    token, place = torch.arange(v), v + torch.arange(t)
    before, answer = v + t + torch.arange(v), 2 * v + t + torch.arange(v)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight[token, token] = 1.0
        model.model.embed_positions.weight[torch.arange(t), place] = 1.0
        first, second = (layer.self_attn for layer in model.model.layers)
        d = torch.arange(12)
        first.q_proj.weight[d[:-1], place[1:]] = SHARP  # at position p: look for p − 1
        first.k_proj.weight[d, place] = 1.0
        first.v_proj.weight[d, token] = 1.0
        first.o_proj.weight[before, d] = 1.0
        first.q_proj.weight[12 + d, place] = SHARP  # at position p: look at p itself
        first.k_proj.weight[12 + d, place] = 1.0
        first.v_proj.weight[12 + d, token] = 1.0
        first.o_proj.weight[answer, 12 + d] = 0.1
        second.q_proj.weight[d, token] = SHARP
        second.k_proj.weight[d, before] = 1.0
        second.v_proj.weight[d, token] = 1.0
        second.o_proj.weight[answer, d] = 10.0
        model.lm_head.weight[token, answer] = 1.0
    return HookManager.load(model)
