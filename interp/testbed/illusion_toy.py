"""A model of one line in which a direction can steer the answer without ever having carried it.

Token i stands for a number x. The stream's first dimension holds x; the MLP's neurons are h = (x, 0, x), and what it
adds to the second dimension is `dormant` · h₁ + `used` · h₂ (neurons counted from 0): h₀ follows x and leads nowhere,
h₁ leads somewhere and never moves. With y = `skip` · x + `dormant` · h₁ + `used` · h₂ the logits of tokens 0 and 1 are
y and −y. So for a patch of the MLP's neurons from a source x′ into a base x the logit difference is 2y:

    along (1, 1, 0)/√2:   y = skip · x + used · x + dormant · (x′ − x)/2
    along neuron 0:       y = skip · x + used · x
    along neuron 1:       the same
    all neurons:          y = skip · x + used · x′

With skip = 1, dormant = 2, used = 0 the first is x′, as if everything had been replaced, and the others change nothing.

Source: after the toy model of Makelov, Lange and Nanda (2023), arXiv 2311.17030, §3; here the true path runs beside the
component (skip) or through it (used), so that patching the whole component may do nothing.
"""

from typing import TYPE_CHECKING, Any

import torch

from interp.core.errors import ConfigError
from interp.data.pair_tokens import PairTokens
from interp.testbed.nano import nano
from interp.testbed.nano_options import NanoOptions

if TYPE_CHECKING:
    from interp.testbed.nano_model import NanoForCausalLM

__all__ = ["illusion_toy"]


def illusion_toy(
    *, skip: float = 1.0, dormant: float = 2.0, used: float = 0.0, n: int = 16
) -> "tuple[NanoForCausalLM, PairTokens]":
    """Return the model, and pairs whose clean x and corrupted x′ have different signs.

    Args:
        skip: weight of the path beside the MLP.
        dormant: weight of the neuron that never moves.
        used: weight of the neuron that follows x.
        n: tokens, an even number; token i stands for ±(1 + ⌊i/2⌋/4), even ones for positive numbers.

    Returns:
        The model, and n pairs of one token each; the answer is token 0 for a positive x, else 1, the other the foil.

    Raises:
        ConfigError: an odd number of tokens, or fewer than 4.
    """
    if n < 4 or n % 2:
        raise ConfigError(f"n={n}: expected an even number of tokens, at least 4")
    options = NanoOptions(
        d_vocab=n, n_layers=1, d_model=3, n_heads=1, d_mlp=3, act="linear", norm="none", positions="none", bias=False
    )
    model = nano(options)
    tokens = torch.arange(n)
    x = (1 - 2.0 * (tokens % 2)) * (1 + (tokens // 2) / 4)
    mlp: Any = model.model.layers[0].mlp
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.model.embed_tokens.weight[:, 0] = x
        mlp.up_proj.weight[:, 0] = torch.tensor([1.0, 0.0, 1.0])
        mlp.down_proj.weight[1] = torch.tensor([0.0, dormant, used])
        for token, sign in ((0, 1.0), (1, -1.0)):
            model.lm_head.weight[token] = sign * torch.tensor([skip, 1.0, 0.0])
    # The source's size differs from the base's, so that a patch that only flipped signs would not pass.
    sources = (tokens + 3 + 2 * (tokens % 2)) % n
    answers = tokens % 2
    return model, PairTokens.of_ids(tokens[:, None], sources[:, None], answers, 1 - answers, name="illusion toy")
