"""What figures are held against: the best reconstruction by as many numbers a token, the best match that luck gives."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.errors import ConfigError, DataError
from interp.core.site import Site
from interp.data.tokens import TokenSource
from interp.evaluate.dictionary import counted_blocks

if TYPE_CHECKING:
    from interp.core.manager import HookManager

__all__ = ["PCA", "Matches", "best_matches", "fit_pca"]

_ABOVE_CHANCE = 0.2
_TABLE = 1 << 24  # entries of a table of latents and values that is held at once: 128 MiB


@dataclass(frozen=True, eq=False)
class PCA:
    """The leading principal components of an activation, as something with `encode` and `decode`.

    Attributes:
        mean: the mean activation.
        components: orthonormal directions, largest variance first.
        variances: variance along every direction of the space, largest first; those beyond the rank are what it misses.
    """

    mean: Float[Tensor, "d"]
    components: Float[Tensor, "rank d"]
    variances: Float[Tensor, "d"]

    @property
    def rank(self) -> int:
        """Numbers per token."""
        return len(self.components)

    def encode(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch rank"]:
        """Return the coordinates of some activations along the components, signed."""
        return (x.to(self.mean.dtype) - self.mean) @ self.components.T

    def decode(self, latents: Float[Tensor, "*batch rank"]) -> Float[Tensor, "*batch d"]:
        """Return the activations that some coordinates stand for."""
        return latents @ self.components + self.mean


def fit_pca(
    hm: "HookManager",
    tokens: TokenSource,
    site: str | Site,
    *,
    rank: int,
    max_tokens: int = 100_000,
    should_stop: Callable[[], bool] | None = None,
) -> PCA:
    """Find the principal components of a site's activations; special tokens are left out.

    The covariance is summed in fp64 about the first block's mean, in one pass up to the site. Memory: 24 · d² bytes.

    Args:
        hm: the manager of the model.
        tokens: text to fit on; not the text that the figures are measured on.
        site: a site of shape [batch pos d].
        rank: numbers per token, such as the k of a TopK dictionary.
        max_tokens: how many tokens to run, special ones and pads included; whole blocks are run.
        should_stop: asked before each block; when it says True, KeyboardInterrupt is raised.

    Returns:
        The components in fp32, on the model's device.

    Raises:
        ConfigError: a rank that the site does not have.
        DataError: the text has fewer than two tokens that count.
    """
    place = Site(site)
    d = int(hm.atlas.shape(place)[-1])
    if not 1 <= rank <= d:
        raise ConfigError(f"rank={rank}: {place.short} has {d} dimensions, so expected 1 … {d}")
    total = torch.zeros(d, dtype=torch.float64, device=hm.device)
    squares = torch.zeros(d, d, dtype=torch.float64, device=hm.device)
    shift, n = torch.zeros_like(total), 0
    for block, keep in counted_blocks(tokens, max_tokens, should_stop):
        x = hm.run(block.inputs, read=[place], logits="none")[place.name]
        rows = x.flatten(0, 1).index_select(0, keep.flatten().nonzero().flatten().to(x.device)).double()
        shift = rows.mean(0) if n == 0 else shift
        rows = rows - shift
        n += len(rows)
        total += rows.sum(0)
        squares += rows.T @ rows
    if n < 2:
        raise DataError(f"{tokens.documents.describe()} gives {n} tokens that count; a covariance needs at least 2")
    offset = total / n
    variances, directions = torch.linalg.eigh(squares / n - torch.outer(offset, offset))
    return PCA(
        mean=(shift + offset).float(),
        components=directions.flip(1).T[:rank].contiguous().float(),
        variances=variances.flip(0).clamp_min(0).float(),
    )


@dataclass(frozen=True, eq=False)
class Matches:
    """What each of `n` units matches best.

    Attributes:
        column: index of the column of labels; −1 for a unit that matches nothing at all.
        value: the code in that column; −1 likewise.
        f1: 2 · hits / (tokens on which the unit fires + tokens that have the value).
        precision: hits / tokens on which the unit fires.
        recall: hits / tokens that have the value.
        chance: the largest F1 of any column and value in any of the shuffles.
    """

    column: Int[Tensor, "n"]
    value: Int[Tensor, "n"]
    f1: Float[Tensor, "n"]
    precision: Float[Tensor, "n"]
    recall: Float[Tensor, "n"]
    chance: Float[Tensor, "n"]

    @property
    def claimed(self) -> Bool[Tensor, "n"]:
        """Whether (f1 − chance) / (1 − chance) ≥ 0.2: only then is a match more than luck."""
        return (self.f1 > self.chance) & (self.f1 - self.chance >= _ABOVE_CHANCE * (1 - self.chance))

    def places(self) -> tuple[list[int], list[int]]:
        """`column` and `value` as plain numbers."""
        return self.column.tolist(), self.value.tolist()


def best_matches(
    token: Int[Tensor, "firing"],
    unit: Int[Tensor, "firing"],
    columns: Mapping[str, Int[Tensor, "token"]],
    *,
    n: int,
    shuffles: int = 20,
    seed: int = 0,
) -> Matches:
    """Find, for each unit that fires or does not, the label and value that says best when; and what luck would find.

    Luck is the same search after the tokens' labels were permuted, all columns alike: frequencies and what labels
    have to do with each other stay as they are, what they have to do with the units is gone.

    Args:
        token: on which token, of those that count, each firing was.
        unit: of which unit it was, from 0 to n − 1.
        columns: name → code of every token that counts, −1 where the label does not apply. Of equal F1, the earlier
            column and the smaller code are taken.
        n: number of units.
        shuffles: permutations.
        seed: of the permutations.

    Returns:
        The best match of each unit, on the host.

    Source: F1 between a latent's active set and an attribute as in Makelov et al. 2024 (2405.08366). Departure: it is
    told apart from what shuffled labels reach.
    """
    order = unit.argsort(stable=True)
    token, unit = token[order], unit[order]
    fired = torch.bincount(unit, minlength=n)
    found = [_best(token, unit, fired, codes) for codes in columns.values()]
    f1, value, hits, total = (torch.stack(part) for part in zip(*found, strict=True))
    column = f1.argmax(0, keepdim=True)
    f1, value, hits, total = (part.gather(0, column)[0] for part in (f1, value, hits, total))
    chance, draw = torch.zeros(n), torch.Generator().manual_seed(seed)
    for _ in range(shuffles):
        moved = torch.randperm(len(next(iter(columns.values()))), generator=draw)[token]
        for codes in columns.values():
            chance = torch.maximum(chance, _best(moved, unit, fired, codes)[0])
    none = f1 == 0
    return Matches(
        column=column[0].masked_fill(none, -1),
        value=value.masked_fill(none, -1),
        f1=f1,
        precision=hits / fired.clamp_min(1),
        recall=hits / total.clamp_min(1),
        chance=chance,
    )


def _best(token: Tensor, unit: Tensor, fired: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of one column: each unit's best F1, the value that has it, hits, and tokens with that value."""
    # Column 0 of a table is for tokens that have no value; every code stands one further on.
    width = max(int(codes.max()), 0) + 2
    total = torch.bincount(codes + 1, minlength=width)[1:]
    step, parts = max(1, _TABLE // width), []
    for first in range(0, len(fired), step):
        count = min(step, len(fired) - first)
        mine = slice(*torch.searchsorted(unit, torch.tensor([first, first + count])).tolist())
        places = (unit[mine] - first) * width + codes[token[mine]] + 1
        hits = torch.bincount(places, minlength=count * width).view(count, width)[:, 1:]
        best = (2 * hits / (fired[first : first + count, None] + total).clamp_min(1)).max(1)
        parts.append((best.values, best.indices, hits.gather(1, best.indices[:, None])[:, 0], total[best.indices]))
    f1, value, hits, totals = (torch.cat(part) for part in zip(*parts, strict=True))
    return f1, value, hits, totals
