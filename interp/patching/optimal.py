"""Optimal ablation: the one constant per component that, put in its place, hurts the model least.

Source: Li and Janson (2024), arXiv 2409.09951, §2. Departure: the constant is fitted by Adam from the mean, in units of
the activation's own spread, and the loss is the divergence from the clean run at the answer's position alone.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.errors import ConfigError, DataError
from interp.core.intervention import Replace
from interp.core.manager import HookManager
from interp.core.metrics import answer_logits, kl_divergence
from interp.core.passes import frame_of, model_inputs
from interp.core.site import Site
from interp.core.where import Where
from interp.data.pair_tokens import PairTokens
from interp.data.pairs import PromptPairs

__all__ = ["optimal_values"]

_HEADS = ("n_heads", "n_kv_heads")


def optimal_values(
    hm: HookManager,
    pairs: PromptPairs | PairTokens,
    sites: Sequence[Site | str],
    *,
    steps: int = 40,
    learning_rate: float = 0.1,
) -> dict[Site, Float[Tensor, "*feature"]]:
    """Fit one constant per site, or per head where it has heads, that replaces it at every position of clean prompts.

    Each component is fitted with the others as they are. Fit on some pairs and patch others with the values
    (`PatchOptions(ablation="given", values=…)`): on the rows it was fitted on, any constant looks too good. Cost:
    components · steps forwards and backwards of all rows.

    Args:
        hm: The model; its weights stay as they are.
        pairs: The prompts to fit on; the clean side is used.
        sites: Sites whose first axes are batch and position.
        steps: Steps of Adam, from the mean over all tokens.
        learning_rate: In standard deviations of the activation.

    Returns:
        Site → constants in the site's last axes, such as [n_heads d_head].

    Raises:
        ConfigError: Not a positive number of steps, or learning rate.
        DataError: A site without positions.

    Source: Li and Janson (2024), §2, equation of the optimal constant; see the module's text for departures.
    """
    if type(steps) is not int or steps < 1 or not learning_rate > 0:
        raise ConfigError(f"steps={steps!r}, learning_rate={learning_rate!r}: expected numbers above 0")
    tokens = (pairs.tokens(hm) if isinstance(pairs, PromptPairs) else pairs).clean
    read = [site for name in sites for site in hm.atlas.expand(name)]
    wrong = next((s for s in read if s.axes[:2] != ("batch", "pos")), None)
    if wrong is not None:
        raise DataError(f"a constant per position needs positions; {wrong.short} has axes {' '.join(wrong.axes)}")
    run = hm.run(tokens, read=read, logits="last")
    ids, mask, positions = model_inputs(hm, tokens, frame_of(tokens, 0, len(tokens)))
    reference = answer_logits(run)

    def loss(site: Site, head: int | None, value: Tensor) -> Tensor:
        with hm.hooked(write=[Replace(site, value, where=Where(head=head))]):
            out = hm.caller(ids, mask=mask, position_ids=positions, keep=None)
        return kl_divergence(answer_logits(out.logits, mask=tokens.mask), reference).mean()

    found = {}
    for site in read:
        real = run[site][tokens.mask.to(run[site].device)].float()
        mean, spread = real.mean(0), real.std(0).clamp(min=1e-6)
        heads = range(len(mean)) if site.axes[2] in _HEADS else [None]
        best = mean.clone()
        for head in heads:
            at = slice(None) if head is None else head
            best[at] = _fitted(partial(loss, site, head), mean[at], spread[at], steps, learning_rate)
        found[site] = best.to(run[site].dtype)
    return found


def _fitted(
    loss: Callable[[Tensor], Tensor], start: Tensor, spread: Tensor, steps: int, learning_rate: float
) -> Tensor:
    """The best constant that Adam passes, from the start on."""
    offset = torch.zeros_like(start, requires_grad=True)
    optimizer = torch.optim.Adam([offset], lr=learning_rate)
    best, least = start.clone(), torch.full((), torch.inf, device=start.device)
    for _ in range(steps):
        value = start + spread * offset
        now = loss(value)
        (offset.grad,) = torch.autograd.grad(now, [offset])
        with torch.no_grad():
            better = now.detach() < least
            best, least = torch.where(better, value, best), torch.where(better, now.detach(), least)
        optimizer.step()
    return best.detach()
