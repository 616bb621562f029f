"""How alike two sets of directions are, such as decoders of two seeds; and the shape of one decoder."""

import importlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.errors import ConfigError, DataError, ShapeError
from interp.core.result import Provenance, Result
from interp.dictionaries.base import Dictionary

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

__all__ = [
    "DecoderGeometry",
    "Matching",
    "Mmcs",
    "Stability",
    "best_cosines",
    "decoder_geometry",
    "matched_cosine",
    "mmcs",
    "stability",
    "uniqueness",
]

_MOST_COSINES = 1 << 24  # cosines that are held at once: 128 MiB in fp64
_MOST_MATCHED = 1 << 26  # cosines that a matching may look at: 512 MiB in fp64, such as 8192 × 8192
_FIGURES = ("mmcs", "matched", "uniqueness")
_BINS = 40


class Mmcs(NamedTuple):
    """Mean over the rows of one set of the largest cosine with a row of the other.

    Attributes:
        forward: over the rows of the first set: how well the second covers the first.
        backward: over the rows of the second.
    """

    forward: float
    backward: float


class Matching(NamedTuple):
    """The one-to-one matching of two sets with the largest sum of cosines; min(n, m) pairs.

    Attributes:
        mean: mean cosine of the pairs.
        a: their rows in the first set, rising.
        b: their rows in the second.
        cosine: of each pair, with its sign.
    """

    mean: float
    a: Int[Tensor, "pair"]
    b: Int[Tensor, "pair"]
    cosine: Float[Tensor, "pair"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Stability(Result):
    """How alike the decoders of several dictionaries are, such as those of one setting under several seeds.

    Attributes:
        names: of the dictionaries.
        mmcs: row i, column j: mean over latents of i of the largest cosine with a latent of j.
        matched: mean cosine of one-to-one matched latents; NaN throughout where that was not asked for.
        uniqueness: row i, column j: distinct latents of j that are nearest to a latent of i, over the latents of i.
        absolute: whether a direction and its opposite count as one.
        n_zero: decoder rows of norm 0 in each; they have cosine 0 with everything.
    """

    title: ClassVar[str] = "Stability"
    names: list[str]
    mmcs: Float[Tensor, "one other"]
    matched: Float[Tensor, "one other"]
    uniqueness: Float[Tensor, "one other"]
    absolute: bool
    n_zero: list[int]

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per ordered pair of different dictionaries."""
        import pandas as pd

        pairs = [(i, j) for i in range(len(self.names)) for j in range(len(self.names)) if i != j]
        rows = [{"one": self.names[i], "other": self.names[j]} | self._of(i, j) for i, j in pairs]
        return pd.DataFrame(rows)

    def plot(self) -> "plotly.graph_objects.Figure":
        """Return a grid of the MMCS of every pair."""
        figures = importlib.import_module("interp.report.figures")
        rows, columns = (figures.Axis(title, self.names) for title in ("latents of", "nearest in"))
        return figures.heatmap(self.mmcs, rows=rows, columns=columns, title=self.title, value="mean max cosine")

    def summary(self) -> str:
        """Say the mean of each figure over pairs, and the least."""
        others = ~torch.eye(len(self.names), dtype=torch.bool)
        said = []
        for name in _FIGURES:
            values = getattr(self, name)[others]
            if not bool(values.isnan().any()):
                said.append(f"{name} {float(values.mean()):.4f} (least {float(values.min()):.4f})")
        zero = f"; rows of norm 0: {self.n_zero}" if any(self.n_zero) else ""
        return f"{len(self.names)} dictionaries, mean over pairs: {', '.join(said)}{zero}"

    def _of(self, i: int, j: int) -> dict[str, float]:
        return {name: float(getattr(self, name)[i, j]) for name in _FIGURES}


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class DecoderGeometry(Result):
    """The shape of a dictionary's decoder.

    Attributes:
        norms: norm of each decoder row.
        nearest: largest cosine of each row with another; NaN for rows of norm 0, and where there is no other.
        nearest_at: which row that is; −1 likewise.
        encoder_cosine: cosine of each latent's encoder column and decoder row; NaN where either is 0.
        effective_rank: exp of the entropy (nats) of the decoder's singular values σ / Σσ, rows at norm 1.
        participation: (Σσ²)² / Σσ⁴ of the same; both lie between 1 and min(d_sae, d_in).
        n_zero: decoder rows of norm 0; they are left out of all else.
    """

    title: ClassVar[str] = "Decoder geometry"
    norms: Float[Tensor, "d_sae"]
    nearest: Float[Tensor, "d_sae"]
    nearest_at: Int[Tensor, "d_sae"]
    encoder_cosine: Float[Tensor, "d_sae"]
    effective_rank: float
    participation: float
    n_zero: int

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per latent."""
        import pandas as pd

        names = ("norms", "nearest", "nearest_at", "encoder_cosine")
        return pd.DataFrame({"latent": range(len(self.norms)), **{k: getattr(self, k).tolist() for k in names}})

    def plot(self) -> "plotly.graph_objects.Figure":
        """Return how the latents' cosines with their nearest neighbours are distributed."""
        figures = importlib.import_module("interp.report.figures")
        known = self.nearest[~self.nearest.isnan()]
        counts = torch.histc(known, _BINS, -1, 1)
        labels = figures.Axis("largest cosine with another latent", [f"{2 * i / _BINS - 1:g}" for i in range(_BINS)])
        return figures.bars(counts, labels=labels, title=self.title, value="latents")

    def summary(self) -> str:
        """Say the medians and the rank."""
        near, encoder, norms = (x.nanmedian() for x in (self.nearest, self.encoder_cosine, self.norms))
        twins = int((self.nearest > 0.9).sum())
        return (
            f"{len(self.norms)} latents, {self.n_zero} of norm 0: median norm {norms:.3g}, median nearest cosine "
            f"{near:.3f} ({twins} above 0.9), median encoder-decoder cosine {encoder:.3f}, effective rank "
            f"{self.effective_rank:.1f} (participation {self.participation:.1f})"
        )


def best_cosines(
    a: Dictionary | Float[Tensor, "n d"], b: Dictionary | Float[Tensor, "m d"], *, absolute: bool = False
) -> tuple[Float[Tensor, "n"], Int[Tensor, "n"]]:
    """Return, for each row of one set, its largest cosine with a row of another, and which row that is.

    Rows of norm 0 have cosine 0 with everything. Of equals the earlier is taken. Sums are in fp64; cosines are made for
    some rows at a time. Memory, in bytes: 8 · (n + m) · d and 128 MiB (or 8 · m, where that is more).

    Args:
        a: a dictionary, whose decoder is meant, or directions.
        b: another.
        absolute: take |cos|, so that a direction and its opposite are one.

    Raises:
        ShapeError: another width, or no rows.
        DataError: values that are not finite.
    """
    ours, theirs = _unit_pair(a, b)
    found = [part.max(1) for _, part in _cosines(ours, theirs, absolute)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def mmcs(a: Dictionary | Float[Tensor, "n d"], b: Dictionary | Float[Tensor, "m d"], *, absolute: bool = False) -> Mmcs:
    """Return the mean max cosine similarity of two sets of directions, in both directions; see `best_cosines`.

    Source: Sharkey, Braun, Millidge 2022, "Taking features out of superposition with sparse autoencoders".
    """
    forward, backward = (best_cosines(*pair, absolute=absolute)[0] for pair in ((a, b), (b, a)))
    return Mmcs(float(forward.mean()), float(backward.mean()))


def uniqueness(
    a: Dictionary | Float[Tensor, "n d"], b: Dictionary | Float[Tensor, "m d"], *, absolute: bool = True
) -> float:
    """Return how many distinct rows of `b` are nearest to some row of `a`, over the rows of `a`; see `best_cosines`.

    Source: SAELens 6.54, `sae_lens.synthetic.feature_uniqueness`, which takes |cos|.
    """
    at = best_cosines(a, b, absolute=absolute)[1]
    return len(at.unique()) / len(at)


def matched_cosine(
    a: Dictionary | Float[Tensor, "n d"], b: Dictionary | Float[Tensor, "m d"], *, absolute: bool = False
) -> Matching:
    """Return the one-to-one matching of two sets of directions with the largest sum of cosines, and its mean.

    With `absolute` the mean is that of |cos|: SAELens' and others' MCC. Every row of the smaller set has a pair.
    Memory, in bytes: 16 · n · m. The time grows as min(n, m)² · max(n, m), at worst.

    Args:
        a: a dictionary, whose decoder is meant, or directions.
        b: another.
        absolute: match by |cos|.

    Raises:
        ConfigError: n · m above 2²⁶ (such as 8192 × 8192).
        ShapeError: another width, or no rows.
        DataError: values that are not finite.

    Source: Hungarian matching, here `scipy.optimize.linear_sum_assignment` (Crouse 2016); MCC: Song et al. 2025
    (2505.20254).
    """
    ours, theirs = _unit_pair(a, b)
    if len(ours) * len(theirs) > _MOST_MATCHED:
        raise ConfigError(
            f"matching {len(ours)} with {len(theirs)} directions looks at more than {_MOST_MATCHED} cosines; match the "
            "latents that fire, or a sample: matched_cosine(W_dec[some], …); or take mmcs, which has no limit"
        )
    cosines = torch.cat([part for _, part in _cosines(ours, theirs, absolute)]).cpu()
    solve = importlib.import_module("scipy.optimize").linear_sum_assignment
    rows, columns = (torch.as_tensor(x) for x in solve(cosines.numpy(), maximize=True))
    cosine = (ours.cpu()[rows] * theirs.cpu()[columns]).sum(1)
    return Matching(float(cosines[rows, columns].mean()), rows, columns, cosine)


def stability(
    dictionaries: Mapping[str, Dictionary | Tensor], *, absolute: bool = False, match: bool = True
) -> Stability:
    """Compare every two of some dictionaries, such as one setting trained with several seeds.

    Args:
        dictionaries: name → a dictionary, whose decoder is meant, or directions; at least two.
        absolute: take |cos|.
        match: match latents one to one as well, for which `matched_cosine` has a limit.

    Returns:
        MMCS, matched cosine and uniqueness of every ordered pair.

    Raises:
        ConfigError: fewer than two dictionaries, or too large ones to match.
        ShapeError: dictionaries of different widths.

    Source: MMCS between seeds as in Cunningham et al. 2023 (2309.08600) §4; matched as in Paulo and Belrose 2025
    (2501.16615).
    """
    names = list(dictionaries)
    if len(names) < 2:
        raise ConfigError(f"{len(names)} dictionary was given; stability compares at least two seeds")
    tables = {name: torch.ones(len(names), len(names), dtype=torch.float64) for name in _FIGURES}
    for i, one in enumerate(dictionaries.values()):
        for j, other in enumerate(dictionaries.values()):
            best, at = best_cosines(one, other, absolute=absolute)
            tables["mmcs"][i, j], tables["uniqueness"][i, j] = best.mean().cpu(), len(at.unique()) / len(at)
            if i < j:
                mean = matched_cosine(one, other, absolute=absolute).mean if match else math.nan
                tables["matched"][i, j] = tables["matched"][j, i] = mean
    if not match:
        tables["matched"].fill_(math.nan)
    zero = [int((_rows(d).norm(dim=1) == 0).sum()) for d in dictionaries.values()]
    settings = {"absolute": absolute, "names": names}
    return Stability(
        names=names, absolute=absolute, n_zero=zero, provenance=Provenance(model="", settings=settings), **tables
    )


@torch.no_grad()
def decoder_geometry(dictionary: Dictionary) -> DecoderGeometry:
    """Describe a decoder: norms, nearest neighbours, effective rank, and how encoder and decoder agree.

    Memory, in bytes: 24 · d_sae · d_in and 128 MiB.

    Args:
        dictionary: any dictionary; of one that gives another width than it reads, `encoder_cosine` is NaN.

    Raises:
        DataError: weights that are not finite.

    Source: effective rank: Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality".
    Departure: decoder rows are brought to norm 1 first, so that how latents are scaled does not matter.
    """
    rows = _rows(dictionary)
    norms, unit = rows.norm(dim=1), _unit(rows)
    alive = norms > 0
    nearest, at = torch.full_like(norms, math.nan), torch.full_like(norms, -1, dtype=torch.long)
    if int(alive.sum()) > 1:
        for first, part in _cosines(unit, unit, False):
            mine = torch.arange(first, first + len(part), device=part.device)
            part[:, ~alive] = -math.inf
            part[torch.arange(len(part), device=part.device), mine] = -math.inf
            nearest[mine], at[mine] = part.max(1)
        nearest[~alive], at[~alive] = math.nan, -1
    encoder = torch.full_like(norms, math.nan)
    if dictionary.W_enc.shape == rows.T.shape:
        columns = _finite(dictionary.W_enc.double().T)
        known = alive & (columns.norm(dim=1) > 0)
        encoder = (_unit(columns) * unit).sum(1).where(known, math.nan)
    # From the smaller Gram matrix, whose eigenvalues are the squares of the singular values.
    gram = unit.T @ unit if unit.shape[1] <= len(unit) else unit @ unit.T
    squares = torch.linalg.eigvalsh(gram).clamp_min(0)
    share = squares.sqrt() / squares.sqrt().sum()
    metadata = dictionary.cfg.metadata
    return DecoderGeometry(
        norms=norms.cpu(),
        nearest=nearest.cpu(),
        nearest_at=at.cpu(),
        encoder_cosine=encoder.cpu(),
        effective_rank=float(torch.special.entr(share).sum().exp()) if bool(alive.any()) else math.nan,
        participation=float(squares.sum() ** 2 / squares.pow(2).sum()),
        n_zero=int((~alive).sum()),
        provenance=Provenance(model=str(metadata.get("model_name", "")), settings={"site": metadata.get("hook_name")}),
    )


def _rows(given: Dictionary | Tensor) -> Float[Tensor, "n d"]:
    rows = given if isinstance(given, Tensor) else given.W_dec
    if rows.ndim != 2 or not rows.numel():
        raise ShapeError(f"directions of shape {tuple(rows.shape)}; expected [n d] with at least one row")
    return _finite(rows.detach().double())


def _finite(rows: Tensor) -> Tensor:
    if not bool(rows.isfinite().all()):
        wrong = (~rows.isfinite()).any(-1).nonzero()[:, 0].tolist()
        raise DataError(
            f"{len(wrong)} of {len(rows)} directions are NaN or infinite, the first is {wrong[0]}; fix them"
        )
    return rows


def _unit(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    norms = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(norms > 0, norms, 1)


def _unit_pair(a: Dictionary | Tensor, b: Dictionary | Tensor) -> tuple[Float[Tensor, "n d"], Float[Tensor, "m d"]]:
    ours, theirs = _rows(a), _rows(b)
    if ours.shape[1] != theirs.shape[1]:
        raise ShapeError(f"directions of {ours.shape[1]} and {theirs.shape[1]} dimensions; expected one width")
    return _unit(ours), _unit(theirs.to(ours.device))


def _cosines(
    a: Float[Tensor, "n d"], b: Float[Tensor, "m d"], absolute: bool
) -> Iterator[tuple[int, Float[Tensor, "part m"]]]:
    """Cosines of some rows of one set with all of the other, and the first of these rows."""
    step = max(1, _MOST_COSINES // len(b))
    for first in range(0, len(a), step):
        part = a[first : first + step] @ b.T
        yield first, part.abs_() if absolute else part
