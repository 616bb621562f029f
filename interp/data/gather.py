"""`gather`: activations of the tokens that a concept's data reads, with their classes, site by site."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.errors import ConfigError, DataError, SiteError
from interp.core.site import Site
from interp.data.concept_tokens import NOT_READ, ConceptTokens

if TYPE_CHECKING:
    from interp.core.intervention import Intervention
    from interp.core.manager import HookManager

__all__ = ["POOLS", "Gathered", "gather"]

POOLS = ("each", "mean", "max", "last")
"""What one example is: each token read, or a row's tokens pooled."""


@dataclass(frozen=True, eq=False)
class Gathered:
    """Examples at one site.

    Attributes:
        x: activations, in fp32 on the CPU, in the site's features ([d_model], or [n_heads d_head], …).
        y: code of each example's class.
        row: row of the data that each is from.
        group: its group; splits keep groups whole.
        pair: its pair, -1 where it has none.
        classes: names of the codes.
    """

    x: Float[Tensor, "n *features"]
    y: Int[Tensor, " n"]
    row: Int[Tensor, " n"]
    group: Int[Tensor, " n"]
    pair: Int[Tensor, " n"]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.y)

    def of_class(self, code: int) -> Float[Tensor, "m *features"]:
        """Activations of one class."""
        return self.x[self.y == code]

    def differences(self) -> Float[Tensor, "pair *features"]:
        """Mean activation of class 1 minus that of class 0, pair by pair.

        Raises:
            DataError: the data has no pairs, or pairs that lack a class.
        """
        if bool((self.pair < 0).any()):
            raise DataError("this data has no pairs, so there are no differences of pairs; use a method of two means")
        known, at = self.pair.unique(return_inverse=True)
        flat = self.x.reshape(len(self), -1).double()
        means = []
        for code in (1, 0):
            chosen = (self.y == code).double()
            count = torch.zeros(len(known), dtype=torch.float64).index_add_(0, at, chosen)
            if not bool((count > 0).all()):
                raise DataError(f"{int((count == 0).sum())} pairs lack the class {self.classes[code]!r}")
            total = torch.zeros(len(known), flat.shape[1], dtype=torch.float64).index_add_(
                0, at, flat * chosen[:, None]
            )
            means.append(total / count[:, None])
        return (means[0] - means[1]).float().reshape(len(known), *self.x.shape[1:])

    def take(self, chosen: Bool[Tensor, " n"] | Int[Tensor, " m"]) -> "Gathered":
        """Return some of the examples."""
        parts = {name: getattr(self, name)[chosen] for name in ("x", "y", "row", "group", "pair")}
        return replace(self, **parts)


def gather(
    hm: "HookManager",
    data: ConceptTokens,
    sites: Sequence[Site | str] | Site | str,
    *,
    pool: str = "each",
    write: "Sequence[Intervention]" = (),
    batch_size: int = 32,
    progress: bool | None = None,
) -> Mapping[str, Gathered]:
    """Read the activations of labelled tokens at sites, in as few forwards as the batch size allows.

    Rows run in order of their length, so that little is padding; examples come back in the order of the data. Memory:
    4 · n · Σ features bytes on the host, and one batch's reads on the device.

    Args:
        hm: the model.
        data: which tokens, of which class.
        sites: names or globs with one vector a token.
        pool: one of `POOLS`. Pooling needs rows of one class each.
        write: edits that the activations are read under.
        batch_size: rows per forward.
        progress: show a bar; by default where more than 8 batches run.

    Returns:
        Short site name → its examples.

    Raises:
        ConfigError: an unknown pool, or no rows in a batch.
        DataError: pooling over several classes, or activations that are NaN or infinite (names the site).
        SiteError: sites that are not there, or have no vector a token.
    """
    if pool not in POOLS:
        raise ConfigError(f"pool={pool!r}: expected one of {', '.join(POOLS)}")
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}: expected at least 1 row")
    wanted = [
        site for given in ([sites] if isinstance(sites, str | Site) else sites) for site in hm.atlas.expand(given)
    ]
    if not wanted:
        raise SiteError("no site to read activations at; give names or globs such as '*.resid_post'")
    for site in wanted:
        if site.where is not None or site.axes[1] != "pos" or "src" in site.axes:
            raise SiteError(f"{site!r} has no vector of its own for each token; give a site such as '3.resid_post'")
    pooled = _pooled_labels(data) if pool != "each" else None
    order = data.tokens.lengths.argsort(stable=True)
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    parts: dict[str, list[Tensor]] = {}
    index: list[Tensor] = []
    from tqdm.auto import tqdm

    for rows in tqdm(batches, desc="activations", unit="batch", disable=_quiet(progress, len(batches))):
        part = _trimmed(data.take(rows))
        out = hm.run(part.tokens, read=wanted, write=write)
        read = part.read
        for site in out.sites:
            x = out[site]
            short = site.short
            values = _pool(x, read.to(x.device), pool) if pooled is not None else x[read.to(x.device)]
            values = values.float().cpu()
            if not bool(values.isfinite().all()):
                raise DataError(f"activations at {short} hold NaN or infinity; look at the model's dtype ({hm.dtype})")
            parts.setdefault(short, []).append(values)
        index.append(rows if pooled is not None else rows[read.nonzero()[:, 0]])
    at = torch.cat(index)
    back = at.argsort(stable=True)
    row = at[back]
    y = pooled[row] if pooled is not None else data.labels[data.read]
    pair = torch.full_like(row, -1) if data.pairs is None else data.pairs[row]
    return {
        short: Gathered(torch.cat(held)[back], y, row, data.groups[row], pair, data.classes)
        for short, held in parts.items()
    }


def _pooled_labels(data: ConceptTokens) -> Int[Tensor, " row"]:
    top = data.labels.max(1).values
    if bool((top == NOT_READ).any()):
        raise DataError(f"row {int((top == NOT_READ).nonzero()[0, 0])} has no token that is read, so nothing to pool")
    if bool((data.read & (data.labels != top[:, None])).any()):
        raise DataError("rows hold tokens of several classes, so a row has no class of its own; use pool='each'")
    return top


def _pool(x: Tensor, read: Bool[Tensor, "row pos"], pool: str) -> Tensor:
    shape = (*read.shape, *[1] * (x.ndim - 2))
    if pool == "mean":
        return (x.float() * read.reshape(shape)).sum(1) / read.sum(1).reshape(-1, *shape[2:])
    if pool == "max":
        return x.float().masked_fill(~read.reshape(shape), -torch.inf).amax(1)
    last = read.shape[1] - 1 - read.int().flip(1).argmax(1)
    return x[torch.arange(len(x), device=x.device), last]


def _trimmed(data: ConceptTokens) -> ConceptTokens:
    """The same rows without columns that are pads in all of them."""
    used = data.tokens.mask.any(0).nonzero()[:, 0]
    a, b = int(used[0]), int(used[-1]) + 1
    if (a, b) == (0, data.tokens.ids.shape[1]):
        return data
    t = data.tokens
    places = None if t.position_ids is None else t.position_ids[:, a:b]
    spans = {name: span[:, a:b] for name, span in t.spans.items()}
    tokens = replace(t, ids=t.ids[:, a:b], mask=t.mask[:, a:b], spans=spans, position_ids=places)
    return replace(data, tokens=tokens, labels=data.labels[:, a:b])


def _quiet(progress: bool | None, batches: int) -> bool | None:
    wanted = batches > 8 if progress is None else progress
    return None if wanted else True  # None: shown on a terminal alone
