"""A model whose residual stream is whatever a test says: each token's embedding is an example."""

from collections.abc import Sequence

import torch
from torch import Tensor

from interp.core.manager import HookManager
from interp.core.text import Tokens
from interp.data.concept_tokens import ConceptTokens
from interp.testbed.nano import NanoOptions, nano

__all__ = ["SITE", "planted", "planted_rows"]

SITE = "0.resid_pre"
"""The site whose activation is the token's embedding and nothing else."""


def planted(x: Tensor) -> HookManager:
    """A model whose residual stream before block 0 is row `token` of x [token d]."""
    n, d = x.shape
    options = NanoOptions(d_vocab=n, d_model=d, n_heads=1, n_layers=1, d_mlp=0, norm="none", positions="none")
    model = nano(options)
    embed = next(p for name, p in model.named_parameters() if "embed" in name and p.shape == (n, d))
    with torch.no_grad():
        embed.copy_(x)
    return HookManager.load(model)


def planted_rows(
    ids: Tensor, y: Tensor, groups: Tensor | None = None, classes: Sequence[str] = ("absent", "present")
) -> ConceptTokens:
    """Rows of tokens [row pos] of the classes y [row pos]; each row is a group unless it is said otherwise."""
    groups = torch.arange(len(ids)) if groups is None else groups
    return ConceptTokens(Tokens(ids, torch.ones_like(ids, dtype=torch.bool)), y, tuple(classes), groups, name="planted")
