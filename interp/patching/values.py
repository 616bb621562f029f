"""What a patching sweep puts in an activation's place, in the columns of the run that is edited."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from interp.core.errors import ConfigError, DataError, ShapeError
from interp.core.manager import HookManager
from interp.core.run import BySite, Run
from interp.core.site import Site
from interp.core.text import Tokens
from interp.data.pair_tokens import PairTokens
from interp.data.pairs import PromptPairs
from interp.patching.ablation import mean_values
from interp.patching.optimal import optimal_values
from interp.patching.options import PatchOptions
from interp.patching.places import Places

__all__ = ["PatchData", "replacements"]


@dataclass(frozen=True, eq=False)
class PatchData:
    """Both sides of the pairs, and the pairs themselves where they were given."""

    clean: Tokens
    corrupted: Tokens
    pairs: PairTokens | None


def replacements(
    hm: HookManager,
    data: PatchData,
    sites: list[Site],
    places: Places,
    by: str,
    runs: tuple[Run, Run],
    options: PatchOptions,
) -> Mapping[Site, Tensor]:
    """Return, for each site, a value broadcastable to the activation of the run that is edited.

    Args:
        hm: the model.
        data: the prompts.
        sites: the sites.
        places: where the sweep's places lie in both runs.
        by: one of `interp.patching.options.BY`.
        runs: that which is edited and that of the other side, with the sites read.
        options: which ablation, and its settings; not "gaussian", which adds to the activation.

    Raises:
        DataError: a mean without pairs, zero for scores, or constants fitted on the prompts that are measured.
        ShapeError: a given value that does not fit its site.
    """
    base, source = runs
    if options.ablation == "resample":
        return {s: places.from_other(source[s], s.axes.index("pos")) for s in sites}
    if options.ablation == "zero":
        scores = next((s for s in sites if s.kind == "attn_scores"), None)
        if scores is not None:
            raise DataError(
                f"ablation='zero' at {scores.short}: a score of 0 takes no attention away, and puts it on masked "
                "tokens too; use ablation='zero' at pattern"
            )
        return {s: torch.zeros_like(source[s][:1, :1]) if s.axes[1] == "pos" else source[s][:1] * 0 for s in sites}
    if options.ablation == "mean":
        if data.pairs is None:
            raise DataError("ablation='mean' is over the pairs of a template; give PromptPairs")
        spans = places.labels if by in ("span", "span_head") else None
        return mean_values(hm, data.pairs, sites, spans=spans)
    given = _optimal(hm, data, sites, by, options) if options.ablation == "optimal" else options.values
    assert given is not None
    by_site = BySite({Site(k): v for k, v in given.items()}) if not isinstance(given, BySite) else given
    return {s: _fitted(by_site[s], s, base[s].shape) for s in sites}


def _optimal(
    hm: HookManager, data: PatchData, sites: list[Site], by: str, options: PatchOptions
) -> Mapping[Site, Tensor]:
    """Constants fitted on other pairs than those that are measured."""
    if by not in ("head", "site"):
        raise ConfigError(
            f"ablation='optimal' with by={by!r}: one constant is fitted for all positions of a site, or of a head, at "
            "once; use by='site' (or 'head'), or give your own with ablation='given', values=…"
        )
    other = options.fit_on
    tokens = other.tokens(hm) if isinstance(other, PromptPairs) else other
    assert isinstance(tokens, PairTokens)
    seen = {_ids(tokens.clean, row) for row in range(len(tokens.clean))}
    both = [row for row in range(len(data.clean)) if _ids(data.clean, row) in seen]
    if both:
        raise DataError(
            f"ablation='optimal': clean prompt {both[0]} (and {len(both) - 1} more) is also in fit_on; on prompts that "
            "it was fitted on any constant looks too good, so fit on others"
        )
    return optimal_values(hm, tokens, sites)


def _ids(tokens: Tokens, row: int) -> tuple[int, ...]:
    real: Bool[Tensor, " pos"] = tokens.mask[row]
    return tuple(tokens.ids[row][real].tolist())


def _fitted(value: Any, site: Site, shape: Sequence[int]) -> Tensor:
    """A given value with as many axes as its site: leading ones are added."""
    given = torch.as_tensor(value)
    found = given[(None,) * max(0, len(shape) - given.ndim)]
    if found.ndim > len(shape) or any(n not in (1, want) for n, want in zip(found.shape, shape, strict=True)):
        raise ShapeError(
            f"the value given for {site.short} has shape {tuple(given.shape)}; expected one that fits "
            f"[{' '.join(site.axes)}] = {tuple(shape)}, each axis whole or 1"
        )
    return found
