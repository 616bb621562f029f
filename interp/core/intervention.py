"""Edits of activations: frozen values that say what to change, where, and by how much.

Every edit computes a new tensor for its whole site; the engine then keeps it only where `where` selects. A tensor
argument may have, for a site of features F (such as [d_model] or [n_heads, d_head]):

    F                  one value for every row and position
    [batch, *F]        one value per row
    [batch, pos, *F]   one value per position (of the run's own padded batch)
    [batch, n, *F]     one value per selected position, where `where` selects n of them in every row

With `where=Where(head=h)` the head axis may be left out of F. A mapping of sites (a `Run`) may stand for a tensor:
the value at the edit's own site is taken from it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.errors import ShapeError, SiteError, WhereError
from interp.core.place import Place
from interp.core.site import Site
from interp.core.where import Where

__all__ = [
    "Ablate",
    "Add",
    "Affine",
    "Edit",
    "FreezePattern",
    "FreezeScale",
    "Intervention",
    "Project",
    "Replace",
    "Rotate",
    "SetProjection",
    "Splice",
]


@dataclass(frozen=True, eq=False)
class Intervention:
    """An edit at a site; the base of all of them.

    Args:
        site: a site, its name, or a glob such as "*.resid_post" (the edit then happens at each).
    """

    site: Site | str

    def __post_init__(self) -> None:
        for f in fields(self):
            if f.name == "where" and not isinstance(getattr(self, f.name), Where):
                raise ShapeError(
                    f"{type(self).__name__}(where=…) needs a Where, got {type(getattr(self, f.name)).__name__}"
                )
        if not isinstance(self.site, Site | str):
            raise SiteError(f"{type(self).__name__} needs a site such as '6.resid_post', got {self.site!r}")
        if isinstance(self.site, Site) and self.site.where is not None:
            raise SiteError(
                f"{type(self).__name__}({self.site!r}): say where an edit acts with where=Where(…), not with .at(…)"
            )

    def edit(self, x: Tensor, place: Place) -> Tensor:
        """Return the site's tensor with the edit made everywhere.

        Args:
            x: the activation, in the site's axes.
            place: the site, the tokens and the selection, for edits that need them.
        """
        raise SiteError(f"{type(self).__name__} is no edit by itself; use Add, Replace, Edit, …")

    @property
    def may_do_nothing(self) -> bool:
        """Whether leaving every value as it is can be what was asked for."""
        return False

    @property
    def keeps_values(self) -> bool:
        """Whether it changes gradients alone, never a value; may be true only where `may_do_nothing` is."""
        return False

    @property
    def after_reads(self) -> bool:
        """Whether it acts on what the model goes on with, after the site has been read."""
        return False

    @property
    def needs_whole_batch(self) -> bool:
        """Whether values of one row or position depend on others, so that a batch cannot be split."""
        return False

    @property
    def selection(self) -> Where:
        """Where this edit acts."""
        return getattr(self, "where", _EVERYWHERE)

    @property
    def gates(self) -> tuple[Any, ...]:
        """The conditions that decide whether it acts; the engine reads their sites (`interp.core.gate`)."""
        return ()


_EVERYWHERE = Where()


def _tensor(owner: str, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise ShapeError(f"{owner}({name}=…) needs a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise ShapeError(f"{owner}({name}=…) needs a floating-point tensor, got {value.dtype}")
    if value.numel() == 0:
        raise ShapeError(f"{owner}({name}=…) is empty: {tuple(value.shape)}")
    if value.device.type == "meta":
        raise ShapeError(f"{owner}({name}=…) is on the meta device and has no values")
    small = value.device.type == "cpu" and value.numel() <= 1 << 20  # a GPU would have to wait, a large one takes time
    bad = value.isnan() if owner == "Replace" else ~value.isfinite()  # scores are replaced by -inf on purpose
    if small and bool(bad.any()):
        raise ShapeError(f"{owner}({name}=…) holds NaN or infinity; every logit after it would be NaN")


def _finite(owner: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
        raise ShapeError(f"{owner}({name}=…) needs a number or a tensor [batch], got {type(value).__name__}")
    if isinstance(value, int | float) and not math.isfinite(value):
        raise ShapeError(f"{owner}({name}={value}): expected a finite number")
    if isinstance(value, Tensor) and value.device.type == "cpu" and not bool(value.isfinite().all()):
        raise ShapeError(f"{owner}({name}=…) holds NaN or infinity; expected finite numbers")
    if isinstance(value, Tensor) and value.ndim > 1:
        raise ShapeError(f"{owner}({name}=…) needs a number or one per row [batch], got shape {tuple(value.shape)}")


@dataclass(frozen=True, eq=False)
class Add(Intervention):
    """Add a vector: x ← x + scale · vector.

    Args:
        vector: what to add, in the units of the activation; shapes as in the module's text.
        scale: a number, or one per row [batch].
        where: the positions, heads and rows it acts on; every non-pad position by default, BOS included.
    """

    vector: Any
    scale: float | Tensor = 1.0
    where: Where = field(default_factory=Where)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not hasattr(self.vector, "sites"):
            _tensor("Add", "vector", self.vector)
        _finite("Add", "scale", self.scale)

    def edit(self, x: Tensor, place: Place) -> Tensor:
        """Return x + scale · vector."""
        vector = place.fit(self.vector, x, "Add")
        if isinstance(self.scale, float | int) and self.scale == 1:
            return x + vector
        return x + place.per_row(self.scale, x, "Add") * vector


@dataclass(frozen=True, eq=False)
class Replace(Intervention):
    """Put a value in an activation's place: x ← value.

    Args:
        value: a tensor (shapes as in the module's text) or a `Run` that has read this site: activation patching.
        where: as for `Add`.
    """

    value: Any
    where: Where = field(default_factory=Where)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not hasattr(self.value, "sites"):
            _tensor("Replace", "value", self.value)

    def edit(self, x: Tensor, place: Place) -> Tensor:
        """Return the value, in x's shape; a copy, because some blocks (Falcon's) add to such tensors in place."""
        return place.fit(self.value, x, "Replace").expand_as(x).clone()


@dataclass(frozen=True, eq=False)
class Ablate(Intervention):
    """Take an activation's information away.

    Args:
        how: "zero"; "mean": over this batch's selected, non-pad positions; "resample": each row gets another row's
            activation at the same column, rows shuffled by `seed` without fixed points.
        where: as for `Add`.
        seed: for "resample".
    """

    how: str = "zero"
    where: Where = field(default_factory=Where)
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.how not in ("zero", "mean", "resample"):
            raise ShapeError(
                f"Ablate(how={self.how!r}): expected 'zero', 'mean' or 'resample'; for a given mean use Replace"
            )

    @property
    def needs_whole_batch(self) -> bool:
        """Means and resamples look at other rows."""
        return self.how != "zero"

    def edit(self, x: Tensor, place: Place) -> Tensor:
        """Return zeros, the mean, or other rows."""
        if self.how == "zero":
            return torch.zeros_like(x)
        if self.how == "mean":
            return place.mean(x).expand_as(x)
        if place.frame.padded:
            raise WhereError(
                f"Ablate('resample') at {place.site.short} matches rows column by column, and here pads stand beside "
                "tokens of other rows; give rows of one length, or compute the values and give Replace"
            )
        return x.index_select(0, place.derangement(self.seed).to(x.device))


@dataclass(frozen=True, eq=False)
class Project(Intervention):
    """Remove a subspace: x ← x − Q Qᵀ x, with Q an orthonormal basis of the directions.

    Args:
        directions: [d] or [k, d]; need not be orthogonal or unit.
        where: as for `Add`.
    """

    directions: Float[Tensor, "*k d"]
    where: Where = field(default_factory=Where)

    def __post_init__(self) -> None:
        super().__post_init__()
        _tensor("Project", "directions", self.directions)
        if self.directions.ndim > 2:
            raise ShapeError(f"Project(directions=…) needs [d] or [k, d], got {tuple(self.directions.shape)}")
        rows = self.directions.detach().reshape(-1, self.directions.shape[-1]).float()
        if not bool((rows.norm(dim=-1) > 0).all()):
            raise ShapeError("Project(directions=…) holds a zero vector, which spans nothing; leave it out")

    def edit(self, x: Tensor, place: Place) -> Tensor:
        """Return x without the subspace."""
        place.needs_width(self.directions, x, "Project")
        rows = self.directions.reshape(-1, x.shape[-1]).float()
        if len(rows) == 1:  # steering does this at every step, and on a GPU a decomposition waits
            u = (rows / rows.norm()).to(x.device, x.dtype)
            return x - (x @ u.T) * u[0]
        _, size, lines = torch.linalg.svd(rows, full_matrices=False)
        # Directions that depend on each other span less than their number: the rest of the basis is arbitrary.
        kept = size > size.max() * max(self.directions.shape) * torch.finfo(size.dtype).eps
        q = (lines * kept[:, None]).to(x.device, x.dtype)
        return x - (x @ q.T) @ q


@dataclass(frozen=True, eq=False)
class SetProjection(Intervention):
    """Set the coordinate along a direction: x ← x + (value − x · u) u, with u the unit direction.

    Args:
        direction: [d].
        value: the coordinate wanted, in units of the activation; a number, or one per row [batch].
        where: as for `Add`.
    """

    direction: Float[Tensor, " d"]
    value: float | Tensor = 0.0
    where: Where = field(default_factory=Where)

    def __post_init__(self) -> None:
        super().__post_init__()
        _tensor("SetProjection", "direction", self.direction)
        _finite("SetProjection", "value", self.value)
        if self.direction.ndim != 1 or not float(self.direction.detach().float().norm()) > 0:
            raise ShapeError(
                f"SetProjection(direction=…) needs a non-zero vector [d], got {tuple(self.direction.shape)}"
            )

    def edit(self, x: Tensor, place: Place) -> Tensor:
        """Return x with the coordinate set."""
        place.needs_width(self.direction, x, "SetProjection")
        u = (self.direction / self.direction.norm()).to(x.device, x.dtype)
        return x + (place.per_row(self.value, x, "SetProjection") - (x @ u)[..., None]) * u


@dataclass(frozen=True, eq=False)
class Affine(Intervention):
    """Map linearly: x ← x A + b.

    Args:
        matrix: A, [d, d] or a diagonal [d].
        bias: b, [d], or None.
        where: as for `Add`.
    """

    matrix: Float[Tensor, "*d d"]
    bias: Float[Tensor, " d"] | None = None
    where: Where = field(default_factory=Where)

    def __post_init__(self) -> None:
        super().__post_init__()
        _tensor("Affine", "matrix", self.matrix)
        if self.matrix.ndim not in (1, 2) or (self.matrix.ndim == 2 and self.matrix.shape[0] != self.matrix.shape[1]):
            raise ShapeError(f"Affine(matrix=…) needs [d, d] or a diagonal [d], got {tuple(self.matrix.shape)}")
        if self.bias is not None:
            _tensor("Affine", "bias", self.bias)

    def edit(self, x: Tensor, place: Place) -> Tensor:
        """Return x A + b."""
        place.needs_width(self.matrix, x, "Affine")
        a = self.matrix.to(x.device, x.dtype)
        y = x * a if a.ndim == 1 else x @ a
        if self.bias is None:
            return y
        place.needs_width(self.bias, x, "Affine")
        return y + self.bias.to(x.device, x.dtype)


@dataclass(frozen=True, eq=False)
class Rotate(Intervention):
    """Rotate the part of x that lies in a plane; the rest, and the norm, stay.

    Args:
        plane: [2, d]: two vectors that span it; positive angles turn the first towards the second.
        angle: radians; a number, or one per row [batch].
        where: as for `Add`.
    """

    plane: Float[Tensor, "two d"]
    angle: float | Tensor = 0.0
    where: Where = field(default_factory=Where)

    def __post_init__(self) -> None:
        super().__post_init__()
        _tensor("Rotate", "plane", self.plane)
        _finite("Rotate", "angle", self.angle)
        if self.plane.ndim != 2 or self.plane.shape[0] != 2:
            raise ShapeError(f"Rotate(plane=…) needs two vectors [2, d], got {tuple(self.plane.shape)}")
        if int(torch.linalg.matrix_rank(self.plane.detach().float().cpu())) < 2:
            raise ShapeError("Rotate(plane=…): the two vectors are parallel, so they span no plane")

    def edit(self, x: Tensor, place: Place) -> Tensor:
        """Return x rotated."""
        place.needs_width(self.plane, x, "Rotate")
        plane = self.plane.to(x.device, x.dtype)
        u = plane[0] / plane[0].norm()
        w = plane[1] - (plane[1] @ u) * u
        w = w / w.norm()
        angle = place.per_row(self.angle, x, "Rotate")
        angle = angle if isinstance(angle, Tensor) else torch.tensor(angle, device=x.device, dtype=x.dtype)
        a, b = (x @ u)[..., None], (x @ w)[..., None]
        cos, sin = angle.cos(), angle.sin()
        return x + (a * (cos - 1) - b * sin) * u + (a * sin + b * (cos - 1)) * w


@dataclass(frozen=True, eq=False)
class FreezePattern(Intervention):
    """Hold attention patterns fixed: at given values, or (by default) as constants in the backward pass.

    Args:
        site: "3.pattern", or "*.pattern" for every layer.
        value: a tensor or a `Run` that has read the patterns; None keeps this forward's own and stops gradients.
        where: as for `Add`.
    """

    site: Site | str = "*.pattern"
    value: Any = None
    where: Where = field(default_factory=Where)
    kinds = ("pattern",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.value is not None and not hasattr(self.value, "sites"):
            _tensor(type(self).__name__, "value", self.value)

    @property
    def may_do_nothing(self) -> bool:
        """Stopping gradients changes no value."""
        return self.value is None

    @property
    def keeps_values(self) -> bool:
        """Stopping gradients changes no value."""
        return self.value is None

    def edit(self, x: Tensor, place: Place) -> Tensor:
        """Return the frozen value."""
        if place.site.kind not in self.kinds and not place.site.kind.endswith(self.kinds):
            raise SiteError(f"{type(self).__name__} acts on {self.kinds[0]} sites, not on {place.site.short}")
        return x.detach() if self.value is None else place.fit(self.value, x, type(self).__name__).expand_as(x).clone()


@dataclass(frozen=True, eq=False)
class FreezeScale(FreezePattern):
    """Hold the σ of norms fixed: at given values, or (by default) as constants in the backward pass.

    Args:
        site: "3.ln1.scale", "ln_final.scale", or a glob such as "*.scale".
        value, where: as for `FreezePattern`.
    """

    site: Site | str = "*.scale"
    kinds = ("scale",)


@dataclass(frozen=True, eq=False)
class Splice(Intervention):
    """Put a dictionary's reconstruction in an activation's place: x ← decode(encode(x)).

    Args:
        dictionary: anything with `encode` and `decode`; where it has `reconstructed(latents, x)`, that is used instead
            of `decode`, for what latents stand for may depend on the activation.
        keep_error: add back x − decode(encode(x)), so that the model is unchanged until the latents are edited.
        latents: a function of the latents [batch pos d_sae] that returns edited ones.
        where: as for `Add`.
    """

    dictionary: Any
    keep_error: bool = False
    latents: Callable[[Tensor], Tensor] | None = None
    where: Where = field(default_factory=Where)

    def __post_init__(self) -> None:
        super().__post_init__()
        missing = [n for n in ("encode", "decode") if not callable(getattr(self.dictionary, n, None))]
        if missing:
            raise ShapeError(
                f"Splice needs something with encode and decode; {type(self.dictionary).__name__} lacks {missing}"
            )

    @property
    def may_do_nothing(self) -> bool:
        """A splice that keeps its error and edits no latent leaves every value as it is, on purpose."""
        return self.keep_error and self.latents is None

    def edit(self, x: Tensor, place: Place) -> Tensor:
        """Return the reconstruction."""
        latents = self.dictionary.encode(x)
        edited = latents if self.latents is None else self.latents(latents.clone())
        y = self._made(edited, x)
        if self.keep_error:
            y = x + (y - self._made(latents, x)) if self.latents is not None else x
        return y.to(x.dtype)

    def _made(self, latents: Tensor, x: Tensor) -> Tensor:
        whole = getattr(self.dictionary, "reconstructed", None)
        y = whole(latents, x) if callable(whole) else self.dictionary.decode(latents)
        if not isinstance(y, Tensor):
            raise ShapeError(f"Splice: {type(self.dictionary).__name__} decodes to {type(y).__name__}, no tensor")
        return y


@dataclass(frozen=True, eq=False)
class Edit(Intervention):
    """Apply a plain function: x ← fn(x).

    Args:
        fn: takes the activation in the site's axes (under a KV cache, of the new positions only) and returns one
            of the same shape, dtype and device. What it changes outside `where` is dropped.
        where: as for `Add`.
    """

    fn: Callable[[Tensor], Tensor]
    where: Where = field(default_factory=Where)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.fn):
            raise ShapeError(f"Edit needs a function of the activation, got {type(self.fn).__name__}")

    def edit(self, x: Tensor, place: Place) -> Tensor:
        """Return fn of a copy of x: what it does in place must not reach beyond `where`, nor its tensors the model."""
        mine = x.clone()
        new = self.fn(mine)
        return new if new is mine or not isinstance(new, Tensor) else new.clone()
