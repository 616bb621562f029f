"""Subspaces of an activation: put another run's value into one, keep the rest.

Source: the interchange of a subspace is Geiger et al. (2024), "Finding Alignments Between Interpretable Causal
Variables and Distributed Neural Representations" (DAS), arXiv 2303.02536, §3; one direction is k = 1.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.core.errors import DataError, ShapeError, WhereError
from interp.core.frame import Frame
from interp.core.intervention import Intervention
from interp.core.place import Place
from interp.core.run import Run
from interp.core.site import Site
from interp.core.where import Where

__all__ = ["ReplaceSubspace", "aligned", "orthonormal", "random_basis"]

# How far a basis in single precision may be from orthonormal.
_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class ReplaceSubspace(Intervention):
    """Take the part of x in a subspace from a source: x ← x + Σ_i m_i ((source − x) · q_i) q_i.

    What is orthogonal to the basis stays as it is; with a basis of all dimensions the source replaces x, up to
    rounding. Sums are in fp32 or better. At a site with heads, a basis as wide as a head acts on each selected head by
    itself, and one as wide as all heads together on all of them.

    Args:
        source: a tensor (shapes as in `interp.core.intervention`) or a `Run` that has read this site.
        basis: orthonormal rows q [k d]; `orthonormal(…)` makes them. Without rows (k = 0) nothing is replaced.
        where: as for `Add`.
        weights: m [k], from 0 (keep) to 1 (replace); 1 by default.
        source_where: which positions of a `Run` the values come from, in order; as many in each row as `where` selects
            there. The same positions by default. A `Run` knows no spans: give `pos=pairs.positions(…)`.

    Raises:
        ShapeError: a basis that is not orthonormal, weights that do not fit it, or a width that is not the site's.
        WhereError: a row where the two selections differ in number.
    """

    source: Any
    basis: Float[Tensor, "k d"]
    where: Where = field(default_factory=Where)
    weights: Float[Tensor, " k"] | None = None
    source_where: Where | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.source, Tensor) and not hasattr(self.source, "sites"):
            what = type(self.source).__name__
            raise ShapeError(f"ReplaceSubspace(source=…) needs a tensor or a Run that has read the site, got {what}")
        _check_basis(self.basis)
        weights = self.weights
        if weights is not None and (not isinstance(weights, Tensor) or weights.shape != self.basis.shape[:1]):
            got = str(tuple(weights.shape)) if isinstance(weights, Tensor) else type(weights).__name__
            raise ShapeError(f"ReplaceSubspace(weights=…) needs one per row of the basis [{len(self.basis)}]: {got}")
        if self.source_where is not None and not (
            isinstance(self.source_where, Where) and isinstance(self.source, Run) and self.source.tokens is not None
        ):
            raise ShapeError("ReplaceSubspace(source_where=…) takes a Where, and says where in a Run; give a Run")

    @property
    def may_do_nothing(self) -> bool:
        """An empty subspace is one on purpose."""
        return not len(self.basis)

    def edit(self, x: Tensor, place: Place) -> Tensor:
        """Return x with the subspace's part of the source."""
        wide = x.ndim == 4 and self.basis.shape[-1] == x.shape[-2] * x.shape[-1] != x.shape[-1]
        if wide and place.where.head is not None:
            raise ShapeError(
                f"ReplaceSubspace at {place.site.short}: a basis as wide as all heads ({self.basis.shape[-1]}) leaves "
                "no choice of heads; leave head out, or give one as wide as a head"
            )
        if not wide:
            place.needs_width(self.basis, x, "ReplaceSubspace")
        if not len(self.basis):
            return x
        source = self._value(x, place)
        apart = _precise(source) - _precise(x)
        q = self.basis.to(x.device, apart.dtype)
        part = (apart.flatten(2) if wide else apart) @ q.T
        if self.weights is not None:
            part = part * self.weights.to(x.device, apart.dtype)
        return x + (part @ q).to(x.dtype).reshape(x.shape)

    def _value(self, x: Tensor, place: Place) -> Tensor:
        """The source where x is; positions that are not selected may hold anything."""
        if self.source_where is None:
            return place.fit(self.source, x, "ReplaceSubspace")
        value: Tensor = self.source[Site(place.site.short)].to(x.device, non_blocking=True)
        frame = place.frame
        if len(value) != frame.n_rows or value.shape[2:] != x.shape[2:]:
            raise ShapeError(
                f"ReplaceSubspace at {place.site.short}: the source is {tuple(value.shape)}; the activation is "
                f"{tuple(x.shape)}, of a batch of {frame.n_rows} rows"
            )
        rows = slice(frame.row0, frame.row0 + frame.batch)
        chosen = self.source_where.columns(_frame_of(self.source))[rows]
        return aligned(value[rows], chosen, self.where.columns(frame))[:, place.columns(x.shape[1])]


def orthonormal(directions: Float[Tensor, "*k d"]) -> Float[Tensor, "k d"]:
    """Return an orthonormal basis of what the directions span, in fp32 or better.

    Args:
        directions: [d] or [k d]; a unit vector is given back as it is, up to rounding.

    Raises:
        ShapeError: no direction, a zero one, one that is not finite, or directions that depend on each other.
    """
    if not isinstance(directions, Tensor) or directions.ndim not in (1, 2) or directions.numel() == 0:
        what = tuple(directions.shape) if isinstance(directions, Tensor) else type(directions).__name__
        raise ShapeError(f"directions are a tensor [d] or [k d], got {what}")
    rows = _precise(directions.detach()).reshape(-1, directions.shape[-1])
    if not bool(rows.isfinite().all()):
        raise ShapeError("directions hold NaN or infinity; expected finite numbers")
    size = rows.norm(dim=-1, keepdim=True)
    if not bool((size > 0).all()):
        raise ShapeError("a direction is zero, which spans nothing; leave it out")
    if len(rows) > rows.shape[1]:
        raise ShapeError(f"{len(rows)} directions in {rows.shape[1]} dimensions depend on each other; give fewer")
    q, r = torch.linalg.qr((rows / size).T)
    along = r.diagonal()
    if float(along.abs().min()) < 1e-5:
        at = int(along.abs().argmin())
        raise ShapeError(f"direction {at} depends on the ones before it; leave it out")
    return (q * along.sign()).T.contiguous()


def random_basis(k: int, d: int, *, seed: int = 0) -> Float[Tensor, "k d"]:
    """Return an orthonormal basis of a subspace drawn uniformly, the same for the same seed.

    Args:
        k: its dimensions, at most d.
        d: width.
        seed: of the draw.

    Raises:
        ShapeError: k is not from 0 to d.
    """
    if not 0 <= k <= d:
        raise ShapeError(f"a subspace of {k} dimensions in {d}: expected 0 to {d}")
    drawn = torch.randn(d, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(drawn)
    return (q * r.diagonal().sign()).T.float().contiguous()


def aligned(
    values: Float[Tensor, "batch source_pos *F"],
    source: Bool[Tensor, "batch source_pos"],
    target: Bool[Tensor, "batch pos"],
) -> Float[Tensor, "batch pos *F"]:
    """Return values at the target's positions, taken in order from each row's source positions; 0 elsewhere.

    Args:
        values: activations of the source.
        source: the positions they are taken from.
        target: the positions they go to, as many in every row.

    Raises:
        WhereError: a row where the two numbers differ.
    """
    counts = source.sum(1), target.sum(1)
    if counts[0].shape != counts[1].shape or not torch.equal(*counts):
        rows = f"{len(source)} and {len(target)} rows"
        if len(source) == len(target):
            row = int((counts[0] != counts[1]).nonzero()[0])
            rows = f"{int(counts[0][row])} and {int(counts[1][row])} positions in row {row}"
        raise WhereError(f"source and target select {rows}; name as many on both sides")
    out = values.new_zeros(*target.shape, *values.shape[2:])
    out[target.to(values.device)] = values[source.to(values.device)]
    return out


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_basis(basis: Any) -> None:
    if not isinstance(basis, Tensor) or not basis.is_floating_point() or basis.ndim != 2:
        what = f"{tuple(basis.shape)} {basis.dtype}" if isinstance(basis, Tensor) else type(basis).__name__
        raise ShapeError(
            f"ReplaceSubspace(basis=…) needs orthonormal rows [k d], got {what}; orthonormal(…) makes them"
        )
    rows = _precise(basis.detach())
    apart = rows @ rows.T - torch.eye(len(rows), device=rows.device, dtype=rows.dtype)
    worst = float(apart.abs().max()) if len(rows) else 0.0
    if not worst <= (_TOLERANCE if basis.dtype in (torch.float32, torch.float64) else 30 * _TOLERANCE):
        raise ShapeError(
            f"ReplaceSubspace(basis=…) is not orthonormal: Q Qᵀ is up to {worst:.3g} from the identity; "
            "give orthonormal(directions)"
        )


def _frame_of(run: Run) -> Frame:
    ids, mask = run.tokens, run.mask
    if ids is None:
        raise DataError("this run was given embeddings, so its positions are not known; give a tensor as source")
    mask = None if mask is None else mask.cpu()
    return Frame(ids=ids, mask=mask, batch=len(ids), length=ids.shape[1], prompt_length=ids.shape[1])
