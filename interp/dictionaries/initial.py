"""The directions that latents begin with."""

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.errors import ConfigError
from interp.dictionaries.objective import Objective

__all__ = ["active_subspace", "first_directions"]

_TINY = 1e-12
_HELD = 0.99  # of the variance, in the active subspace
_OUTLIERS = 4  # components that are not counted, at most
_DRAWN = 4096  # rows drawn at a time; torch draws normal numbers in sixteens, of which only the last may be cut


def first_directions(
    x: Float[Tensor, "token d_in"],
    n: int,
    objective: Objective,
    generator: torch.Generator,
    *,
    place: slice | None = None,
) -> Float[Tensor, "some d_in"]:
    """Return directions of norm 1 to begin with, as `objective.init` says.

    `random`: uniform among all. `subspace`: uniform among those in the active subspace, so that no latent begins where
    there are no activations, to die there. `data`: those of random tokens of the sample, each once, less their mean;
    and where there are more latents than tokens, of differences of two.

    Source: Gao et al. 2024 (2406.04093), appendix A.1, for random ones; Wang et al. 2025 (2508.16929), active subspace
    initialisation, for `subspace`: a reproduction, as `active_subspace` says.

    Args:
        x: a sample of the activations.
        n: how many.
        objective: `init`, and `init_rank` of the subspace.
        generator: what they are drawn with, on the CPU.
        place: which of them; by default all. Random ones are never held all at once.

    Raises:
        ConfigError: `init_rank` is more than the width.
    """
    width = x.shape[1]
    if objective.init == "subspace":
        basis = active_subspace(x, objective.init_rank)
        drawn = torch.randn(n, len(basis), generator=generator)[place or slice(None)].to(basis) @ basis
        return drawn / drawn.norm(dim=-1, keepdim=True)
    if objective.init == "data":
        return _of_tokens(x, n, generator)[place or slice(None)]
    rows = _random_rows(n, width, generator, place or slice(0, n))
    return rows / rows.norm(dim=-1, keepdim=True)


def active_subspace(x: Float[Tensor, "token d_in"], rank: int | None = None) -> Float[Tensor, "rank d_in"]:
    """Return an orthonormal basis of the subspace that activations lie in: their top principal components.

    Source: Wang et al. 2025 (2508.16929), where the rank is set by hand. Departure: by default it is the smallest for
    which 99 % of the variance lies in the subspace, which is what the paper calls low-rank by. Some sites have outlier
    dimensions that hold nearly all of the variance, and would be the whole subspace: so of the first components, up to
    four that each hold more than half of what is left are in it and not counted. Where that errs, the subspace is too
    wide, and at most what `random` has.

    Args:
        x: activations.
        rank: how many components.

    Raises:
        ConfigError: `rank` is more than the width.
    """
    width = x.shape[1]
    if rank is not None and rank > width:
        raise ConfigError(f"dictionary.init_rank is {rank}, more than the {width} dimensions there are")
    centred = x.double() - x.double().mean(0)
    variance, vectors = torch.linalg.eigh(centred.T @ centred)
    variance, vectors = variance.flip(0).clamp_min(0), vectors.flip(1)
    if rank is None:
        rank = _rank(variance.tolist())
    return vectors.T[: min(rank, width)]


def _rank(variance: list[float]) -> int:
    """How many components hold nearly all of the variance but for outliers'."""
    aside = 0
    while aside < _OUTLIERS and variance[aside:] and variance[aside] > sum(variance[aside:]) / 2:
        aside += 1
    wanted, held, rank = _HELD * sum(variance[aside:]), 0.0, aside
    while held < wanted:
        held += variance[rank]
        rank += 1
    return max(rank, 1)


def _of_tokens(x: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Directions of tokens, each once, and where they do not suffice of differences of two."""
    # Tokens that come often have the same activation at some sites, and latents that begin alike stay alike.
    tokens = x.double().unique(dim=0) - x.double().mean(0)
    order = torch.randperm(len(tokens), generator=generator)[:n].to(x.device)
    rows = tokens[order]
    if (more := n - len(rows)) > 0:
        first = torch.randint(len(tokens), (more,), generator=generator)
        second = (first + torch.randint(1, max(2, len(tokens)), (more,), generator=generator)) % len(tokens)
        rows = torch.cat([rows, tokens[first.to(x.device)] - tokens[second.to(x.device)]])
    norm = rows.norm(dim=-1, keepdim=True)
    # A token at the mean has no direction.
    spare = torch.randn(n, x.shape[1], generator=generator, dtype=torch.float64).to(x.device)
    rows = torch.where(norm > _TINY, rows, spare)
    return rows / rows.norm(dim=-1, keepdim=True)


def _random_rows(n: int, d: int, generator: torch.Generator, place: slice) -> Tensor:
    """Some of n random rows: the same whichever are wanted, and never all of them at once."""
    rows = torch.empty(place.stop - place.start, d)
    for low in range(0, n, _DRAWN):
        # A block of so many rows, or a last one of at most twice as many, is drawn as it would be among all.
        if n - low < _DRAWN and low > 0:
            break
        high = n if n - low < 2 * _DRAWN else low + _DRAWN
        drawn = torch.randn(high - low, d, generator=generator)
        first, last = max(low, place.start), min(high, place.stop)
        if first < last:
            rows[first - place.start : last - place.start] = drawn[first - low : last - low]
    return rows
