"""What figures are held against: the best reconstruction by as many numbers a token."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.errors import ConfigError, DataError
from interp.core.site import Site
from interp.data.tokens import TokenSource
from interp.evaluate.reading import counted_blocks, side_by_side, site_width

if TYPE_CHECKING:
    from interp.core.manager import HookManager

__all__ = ["PCA", "fit_pca"]


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

    def truncated(self, rank: int) -> "PCA":
        """Return the same with fewer components: what a fit of that rank gives, to the bit."""
        return PCA(mean=self.mean, components=self.components[:rank].contiguous(), variances=self.variances)

    def encode(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*batch rank"]:
        """Return the coordinates of some activations along the components, signed; heads are taken side by side."""
        x = x if x.shape[-1] == len(self.mean) else x.flatten(-2)
        return (x.to(self.mean.dtype) - self.mean) @ self.components.T

    def decode(self, latents: Float[Tensor, "*batch rank"]) -> Float[Tensor, "*batch d"]:
        """Return the activations that some coordinates stand for."""
        return latents @ self.components + self.mean

    def reconstructed(
        self, latents: Float[Tensor, "*batch rank"], x: Float[Tensor, "*shape"]
    ) -> Float[Tensor, "*shape"]:
        """Return the activations that some coordinates stand for, in the shape of x."""
        return self.decode(latents).view_as(x)


def fit_pca(
    hm: "HookManager",
    tokens: TokenSource,
    site: str | Site,
    *,
    rank: int,
    max_tokens: int = 100_000,
    should_stop: Callable[[], bool] | None = None,
    progress: bool = True,
) -> PCA:
    """Find the principal components of a site's activations; special tokens are left out.

    The covariance is summed in fp64 about the first block's mean, in one pass up to the site. Memory: 24 · d² bytes.

    Args:
        hm: the manager of the model.
        tokens: text to fit on; not the text that the figures are measured on.
        site: a site of shape [batch pos d], or q, k, v or z, whose heads are taken side by side.
        rank: numbers per token, such as the k of a TopK dictionary.
        max_tokens: how many tokens to run, special ones and pads included; whole blocks are run.
        should_stop: asked before each block; when it says True, KeyboardInterrupt is raised.
        progress: show a bar on stderr when it takes more than two seconds.

    Returns:
        The components in fp32, on the model's device.

    Raises:
        ConfigError: a rank that the site does not have.
        DataError: the text has fewer than two tokens that count.
    """
    place = Site(site)
    d = site_width(hm, place)
    if not 1 <= rank <= d:
        raise ConfigError(f"rank={rank}: {place.short} has {d} dimensions, so expected 1 … {d}")
    total = torch.zeros(d, dtype=torch.float64, device=hm.device)
    squares = torch.zeros(d, d, dtype=torch.float64, device=hm.device)
    shift, n = torch.zeros_like(total), 0
    for block, keep in counted_blocks(tokens, max_tokens, should_stop, doing="fitting a PCA" if progress else ""):
        x = side_by_side(hm.run(block.inputs, read=[place], logits="none")[place.name], place)
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
