"""Values that take an activation's information away: means over prompts of one form, and fitted constants."""

from collections.abc import Hashable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.errors import DataError
from interp.core.manager import HookManager
from interp.core.site import Site
from interp.core.text import Tokens
from interp.data.pair_tokens import PairTokens
from interp.data.pairs import PromptPairs

__all__ = ["mean_values"]


def mean_values(
    hm: HookManager,
    pairs: PromptPairs | PairTokens,
    sites: Sequence[Site | str],
    *,
    by: str | None = "template",
    over: str = "corrupted",
    spans: Sequence[str] | None = None,
) -> dict[Site, Float[Tensor, "batch pos *feature"]]:
    """Return, for each clean prompt, the mean activation of all prompts of its form at the same position.

    A mean over prompts of other forms, or over positions, would mix what a position is for with what it says; so rows
    are grouped by a fact of the pairs, and aligned token by token. Memory: the activations of all sites.

    Args:
        hm: The model.
        pairs: The pairs.
        sites: Sites with batch and position as their first axes.
        by: The fact in `meta` that says a prompt's form; None, or pairs without that fact, take all as one.
        over: The prompts whose mean is taken, "corrupted" or "clean".
        spans: Align these spans alone, token by token, for forms whose prompts differ in length; the rest is zero.

    Returns:
        Site → values in the columns of the clean prompts.

    Raises:
        DataError: Prompts of one form that differ in length, where nothing says which tokens correspond; a span with
            more tokens in one prompt than in another of its form.

    Source: Wang et al. (2022), arXiv 2211.00593, §2.1 (mean over prompts of the same template).
    """
    if over not in ("clean", "corrupted"):
        raise DataError(f"over={over!r}: expected 'clean' or 'corrupted'")
    tokens = pairs.tokens(hm) if isinstance(pairs, PromptPairs) else pairs
    read = [site for name in sites for site in hm.atlas.expand(name)]
    wrong = next((s for s in read if s.axes[:2] != ("batch", "pos")), None)
    if wrong is not None:
        raise DataError(f"a mean over prompts is per position, but {wrong.short} has axes {' '.join(wrong.axes)}")
    source: Tokens = getattr(tokens, over)
    forms = tokens.forms(by)
    run = hm.run(source, read=read, logits="none")
    result = {site: run[site].new_zeros(*tokens.clean.ids.shape, *run[site].shape[2:]) for site in read}
    for form in range(int(forms.max()) + 1):
        rows = (forms == form).nonzero()[:, 0].tolist()
        name = (tokens.meta[rows[0]] if tokens.meta else {}).get(by or "", "all")
        for span in [None] if spans is None else spans:
            here, there = (_places(t, rows, span, name) for t in (tokens.clean, source))
            if here.shape[1] != there.shape[1]:
                raise DataError(
                    f"form {name!r}: {here.shape[1]} tokens in the clean prompts and {there.shape[1]} in the {over} "
                    "ones, so their positions do not correspond; give spans=[…], or patch by='span'"
                )
            for site in read:
                at = torch.tensor(rows, device=run[site].device)[:, None]
                mean = run[site][at, there.to(at.device)].mean(0)
                result[site][at, here.to(at.device)] = mean
    return result


def _places(tokens: Tokens, rows: Sequence[int], span: str | None, name: Hashable) -> Tensor:
    """The columns [row n] of the tokens that correspond in all rows of a form."""
    if span is not None and span not in tokens.spans:
        raise DataError(f"the prompts have no span {span!r}; they have {', '.join(tokens.spans) or 'none'}")
    mask = (tokens.mask if span is None else tokens.spans[span]).cpu()[list(rows)]
    counts = mask.sum(1)
    if int(counts.min()) != int(counts.max()):
        what = "prompts" if span is None else f"spans {span!r}"
        hint = "give spans=[…], or patch by='span'" if span is None else "leave that span out"
        raise DataError(
            f"form {name!r} has {what} of {int(counts.min())} and of {int(counts.max())} tokens, so which tokens "
            f"correspond is not known; {hint}"
        )
    return mask.nonzero()[:, 1].reshape(len(rows), -1)
