"""`Direction`: a vector at one or several sites, with everything that is needed to know what adding it means."""

import html
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from interp.core.direction_file import read_direction, write_direction
from interp.core.dose import UNITS, Dose, SiteScale, Steers, measure_scale
from interp.core.errors import ConfigError, DataError, ModelError, ShapeError, SiteError
from interp.core.intervention import Add, Intervention, Project, SetProjection
from interp.core.result import Provenance
from interp.core.site import Site
from interp.core.where import Where

if TYPE_CHECKING:
    import pandas

    from interp.core.manager import HookManager

__all__ = ["OPERATIONS", "UNITS", "AddDirection", "Direction", "Dose", "SiteScale", "Steers", "measure_scale"]

OPERATIONS = ("add", "ablate", "set")
"""add: x + c · v. ablate: x without its part along v. set: x with its coordinate along v set to c."""


class AddDirection(Add):
    """Add a dose of a direction; a dose of 0 is asked for on purpose, as where a sweep of doses begins."""

    @property
    def may_do_nothing(self) -> bool:
        """Whether every row's dose is 0."""
        if isinstance(self.scale, Tensor):
            return self.scale.device.type == "cpu" and not bool(self.scale.any())  # a GPU would have to be waited for
        return self.scale == 0


def _length(v: Tensor) -> float:
    return float(v.double().norm())


@dataclass(frozen=True, eq=False, repr=False)
class Direction:
    """A direction at one or several sites of one model, and how it is meant to act.

    Args:
        vectors: short site name, such as "6.resid_post" (after block 6, counted from 0), → its vector in the site's
            features ([d_model], or [n_heads d_head], …).
        method: how it was found.
        model: provenance; a model of another configuration is refused by `check`.
        operation: one of `OPERATIONS`: what `as_interventions` does unless it is told otherwise.
        read_at: the token rule of the fit, in words.
        scale: how large activations are along it, by site; empty where nothing was measured.
        stats: figures of the fit, by site and name.
        name: what it stands for.
        folded: whether it was fitted on a folded copy of the model.
        notes: what a user should know.

    Raises:
        SiteError: no site, or names that are no sites.
        ShapeError: a vector that is NaN, infinite, zero or not floating point.
    """

    vectors: Mapping[str, Tensor]
    method: str
    model: Provenance
    operation: str = "add"
    read_at: str = ""
    scale: Mapping[str, SiteScale] = field(default_factory=dict)
    stats: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    name: str = "direction"
    folded: bool = False
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.vectors, Mapping):
            raise SiteError(f"vectors are {type(self.vectors).__name__}; expected site name → vector")
        if not self.vectors:
            raise SiteError("a direction needs a vector at one site at least")
        if self.operation not in OPERATIONS:
            raise ConfigError(f"operation={self.operation!r}: expected one of {', '.join(OPERATIONS)}")
        held = {}
        for given, vector in self.vectors.items():
            site = Site(given)
            if site.where is not None:
                raise SiteError(f"{given!r}: a direction is of a whole site; say where it acts in as_interventions")
            if site.axes[1] != "pos":
                raise SiteError(f"{site.short} has no vector a position; its axes are {' '.join(site.axes)}")
            if site.short in held:
                raise SiteError(f"two vectors are given for {site.short}; give one")
            if not isinstance(vector, Tensor) or not vector.is_floating_point():
                raise ShapeError(f"the vector at {site.short} is {type(vector).__name__}; expected a floating tensor")
            v = vector.detach().float().cpu().clone()
            if not bool(v.isfinite().all()) or not bool((v != 0).any()):
                raise ShapeError(f"the vector at {site.short} is zero, NaN or infinite, so it is no direction")
            held[site.short] = v
        object.__setattr__(self, "vectors", held)
        object.__setattr__(self, "scale", {Site(s).short: SiteScale(*v) for s, v in self.scale.items()})
        object.__setattr__(self, "stats", {Site(s).short: dict(v) for s, v in self.stats.items()})
        object.__setattr__(self, "notes", tuple(self.notes))

    @property
    def sites(self) -> list[str]:
        """Short names of its sites, in order."""
        return list(self.vectors)

    def __getitem__(self, site: Site | str) -> Tensor:
        """The vector at a site."""
        short = Site(site).short
        if short not in self.vectors:
            raise SiteError(f"this direction has no vector at {short}; it has {', '.join(self.vectors)}")
        return self.vectors[short]

    def at(self, sites: "Sequence[Site | str] | Site | str") -> "Direction":
        """Return the same direction at some of its sites."""
        wanted = [sites] if isinstance(sites, str | Site) else list(sites)
        shorts = [Site(s).short for s in wanted]
        return replace(
            self,
            vectors={s: self[s] for s in shorts},
            scale={s: v for s, v in self.scale.items() if s in shorts},
            stats={s: v for s, v in self.stats.items() if s in shorts},
        )

    def each(self) -> "Iterator[Direction]":
        """Go through the direction site by site."""
        return (self.at(site) for site in self.sites)

    # -- acting -------------------------------------------------------------------------------------------------

    def as_interventions(
        self,
        dose: float | Tensor | Dose = 1.0,
        *,
        where: Where | None = None,
        operation: str | None = None,
    ) -> list[Intervention]:
        """Return the edits that steer with this direction, one per site.

        Args:
            dose: how much; a plain number is in units of the fitted vector, `Dose(2, "sigma")` in those of its fit. One
                per row [batch] steers each row by its own. Ablation takes no dose; "set" puts the coordinate along the
                unit vector there.
            where: the positions it acts on; every non-pad position by default, prompt and generated ones alike.
            operation: one of `OPERATIONS`; the direction's own by default.

        Raises:
            ConfigError: an unknown unit or operation, a unit that the fit did not measure, or a dose of an ablation.
            SiteError: an operation that a site with heads does not have.
        """
        how = self.operation if operation is None else operation
        if how not in OPERATIONS:
            raise ConfigError(f"operation={how!r}: expected one of {', '.join(OPERATIONS)}")
        amount, place = Dose.of(dose), Where() if where is None else where
        plain = not isinstance(amount.value, Tensor) and amount == Dose()
        if how == "ablate" and not plain:
            raise ConfigError("an ablation takes the whole component away and has no dose; leave it at 1")
        made: list[Intervention] = []
        for site, v in self.vectors.items():
            if how == "add":
                raw = amount.unit == "raw"
                vector, scale = (v, amount.value) if raw else (self.unit(site), self._coefficient(site, amount))
                made.append(AddDirection(site, vector, scale=scale, where=place))
                continue
            if v.ndim != 1:
                raise SiteError(
                    f"{how} acts on one vector a position, and {site} has features {tuple(v.shape)}; use add"
                )
            if how == "ablate":
                made.append(Project(site, self.unit(site), where=place))
            else:
                made.append(SetProjection(site, self.unit(site), value=self._coefficient(site, amount), where=place))
        return made

    def _coefficient(self, site: str, dose: Dose) -> float | Tensor:
        """What the unit vector is multiplied by."""
        if dose.unit == "raw":
            factor = _length(self.vectors[site])
        else:
            if site not in self.scale:
                raise ConfigError(
                    f"unit {dose.unit!r} needs what the fit measured at {site}, and this direction has no scale there; "
                    "give a raw dose, or measure it on examples (interp.steering.measure_direction)"
                )
            factor = self.scale[site].factor(dose.unit, _length(self.vectors[site]))
            if not math.isfinite(factor):
                why = "the fit had no two classes there"
                if dose.unit == "largest":
                    why = "that was measured the other way round, if at all; see interp.steering.measure_direction"
                raise ConfigError(f"unit {dose.unit!r} is not known at {site}: {why}")
        return dose.value * factor

    def check(self, hm: "HookManager") -> None:
        """Refuse a model that this direction does not belong to.

        Raises:
            ModelError: another configuration, or a folded copy where it was fitted on the raw model.
            SiteError: sites that the model lacks.
        """
        for site, v in self.vectors.items():
            hm.atlas.point(Site(site))
            width = hm.d_model if Site(site).axes[-1] == "d_model" else None
            if width is not None and v.shape[-1] != width:
                raise ModelError(f"this direction is of width {v.shape[-1]} at {site} and {hm.name} of {width}")
        own, given = self.model.config_hash, Provenance.of(hm).config_hash
        if (own is not None and own != given) or self.folded != hm.is_folded:
            kinds = ["folded" if f else "raw" for f in (self.folded, hm.is_folded)]
            raise ModelError(
                f"this direction was fitted on {self.model.model!r} ({kinds[0]}, config {own}), not on {hm.name!r} "
                f"({kinds[1]}, config {given}); fit one on it"
            )

    # -- algebra ------------------------------------------------------------------------------------------------

    def __add__(self, other: "Direction") -> "Direction":
        return self._joined(other, 1.0) if isinstance(other, Direction) else NotImplemented

    def __sub__(self, other: "Direction") -> "Direction":
        return self._joined(other, -1.0) if isinstance(other, Direction) else NotImplemented

    def __neg__(self) -> "Direction":
        return -1.0 * self

    def __mul__(self, factor: int | float) -> "Direction":
        """Return the direction with longer or shorter vectors; a negative factor turns it round."""
        if isinstance(factor, bool) or not isinstance(factor, int | float):
            return NotImplemented
        if not math.isfinite(factor) or factor == 0:
            raise ConfigError(f"a direction times {factor} is no direction; give a finite number that is not 0")
        scale = self.scale if factor > 0 else {s: v.reversed() for s, v in self.scale.items()}
        return replace(self, vectors={s: v * factor for s, v in self.vectors.items()}, scale=scale, stats={})

    def __rmul__(self, factor: int | float) -> "Direction":
        return self.__mul__(factor)

    def __truediv__(self, factor: int | float) -> "Direction":
        if isinstance(factor, bool) or not isinstance(factor, int | float):
            return NotImplemented
        if factor == 0:
            raise ConfigError("a direction divided by 0 is no direction; give another number")
        return self.__mul__(1 / factor)

    def _joined(self, other: "Direction", sign: float) -> "Direction":
        """The sum where both have a vector; elsewhere the vector that is there."""
        self._refuse_another_model(other)
        if self.operation != other.operation:
            raise ConfigError(
                f"{self.name!r} is meant to {self.operation} and {other.name!r} to {other.operation}; make both the "
                "same with dataclasses.replace(direction, operation=…)"
            )
        turned = other if sign > 0 else -other
        vectors, scale = {**turned.vectors, **self.vectors}, {**turned.scale, **self.scale}
        for site in [s for s in self.sites if s in turned.vectors]:
            self._same_shape(turned, site)
            vectors[site] = self[site] + turned[site]
            scale.pop(site, None)  # how large activations are along the sum has not been measured
            if not bool((vectors[site] != 0).any()):
                raise DataError(
                    f"the two directions cancel at {site}, which leaves none there; leave it out with .at(…)"
                )
        ordered = sorted(vectors, key=lambda s: Site(s))
        word = "+" if sign > 0 else "-"
        return replace(
            self,
            vectors={s: vectors[s] for s in ordered},
            method=f"{self.method} {word} {other.method}",
            model=replace(self.model, data_hash=None, seed=None, settings={}),
            read_at=self.read_at if self.read_at == other.read_at else "",
            scale=scale,
            stats={},
            name=f"{self.name} {word} {other.name}",
            notes=tuple(dict.fromkeys((*self.notes, *other.notes))),
        )

    def _refuse_another_model(self, other: "Direction") -> None:
        own, theirs = self.model, other.model
        known = own.config_hash is not None and theirs.config_hash is not None
        if (known and own.config_hash != theirs.config_hash) or self.folded != other.folded:
            kinds = ["folded" if f else "raw" for f in (self.folded, other.folded)]
            raise ModelError(
                f"{self.name!r} is of {own.model!r} ({kinds[0]}) and {other.name!r} of {theirs.model!r} ({kinds[1]}): "
                "their spaces have nothing to do with each other"
            )

    def _same_shape(self, other: "Direction", site: str) -> None:
        if self[site].shape != other[site].shape:
            shapes = tuple(self[site].shape), tuple(other[site].shape)
            raise ShapeError(f"the two directions have shapes {shapes[0]} and {shapes[1]} at {site}")

    @overload
    def unit(self) -> "Direction":
        """Return the direction with vectors of length 1."""

    @overload
    def unit(self, site: Site | str) -> Tensor:
        """Return the vector at a site with length 1."""

    def unit(self, site: Site | str | None = None) -> "Direction | Tensor":
        """Return the vector at a site with length 1; without a site, the direction with such vectors."""
        if site is not None:
            v = self[site].double()  # in single precision the squares of a very large one overflow
            return (v / v.norm()).float()
        return self.matched(1.0)

    def matched(self, norm: "int | float | Direction") -> "Direction":
        """Return the direction with the lengths of another, or with one length at every site.

        Args:
            norm: a length > 0, in units of the activation, or a direction with vectors at all of these sites.

        Raises:
            ConfigError: a length that is not above 0.
            SiteError: the other one lacks a site.

        Source: CAA (Panickssery et al. 2024, arXiv 2312.06681, §3) gives the vectors of all behaviours at a layer one
        norm, so that multipliers compare.
        """
        if isinstance(norm, Direction):
            lengths = {s: _length(norm[s]) for s in self.sites}
        else:
            if isinstance(norm, bool) or not isinstance(norm, int | float) or not 0 < norm < math.inf:
                raise ConfigError(f"a length is a number above 0, got {norm!r}")
            lengths = dict.fromkeys(self.sites, float(norm))
        return replace(self, vectors={s: (self.unit(s).double() * lengths[s]).float() for s in self.sites}, stats={})

    def orthogonal_to(self, others: "Direction | Sequence[Direction]") -> "Direction":
        """Return what is left of the direction outside the span of others, site by site.

        Sites that no other has stay as they are. What was measured along a changed vector is dropped.

        Raises:
            SiteError: none of the others has one of these sites.
            DataError: nothing is left at a site.
            ModelError: directions of different models.
        """
        given = [others] if isinstance(others, Direction) else list(others)
        vectors, changed = dict(self.vectors), []
        for site, v in self.vectors.items():
            here = [o for o in given if site in o.vectors]
            if not here:
                continue
            for other in here:
                self._refuse_another_model(other)
                self._same_shape(other, site)
            span = torch.stack([o.unit(site).flatten().double() for o in here])
            _, size, rows = torch.linalg.svd(span, full_matrices=False)
            q = rows[size > size.max() * 1e-6]
            flat = v.flatten().double()
            left = flat - (flat @ q.T) @ q
            if float(left.norm()) < 1e-5 * float(flat.norm()):
                names = ", ".join(o.name for o in here)
                raise DataError(f"{self.name!r} lies in the span of {names} at {site}: nothing is left there")
            vectors[site] = left.reshape(v.shape).float()
            changed.append(site)
        if not changed:
            raise SiteError(f"none of the others has a vector at {', '.join(self.sites)}")
        note = f"without its part along {', '.join(o.name for o in given)} at {', '.join(changed)}"
        return replace(
            self,
            vectors=vectors,
            scale={s: v for s, v in self.scale.items() if s not in changed},
            stats={},
            notes=(*self.notes, note),
        )

    @classmethod
    def of(
        cls,
        hm: "HookManager",
        vectors: Mapping[str, Tensor],
        *,
        operation: str = "add",
        name: str = "direction",
        method: str = "given",
    ) -> "Direction":
        """Return a direction made of tensors that you have.

        Args:
            hm: the model that they belong to.
            vectors: site name → vector in the site's features ([d_model], or [n_heads d_head], …).
            operation: one of `OPERATIONS`.
            name: what it stands for.
            method: how it was found.

        Raises:
            SiteError: a site that the model lacks.
            ShapeError: a vector of another shape, or that is NaN, infinite or zero.
        """
        made = cls(vectors, method, Provenance.of(hm), operation=operation, name=name, folded=hm.is_folded)
        for site, v in made.vectors.items():
            expected = tuple(hm.atlas.shape(Site(site))[2:])
            if all(isinstance(n, int) for n in expected) and tuple(v.shape) != expected:
                raise ShapeError(f"the vector at {site} is {tuple(v.shape)}; this model has {expected} there")
        return made

    # -- looking ------------------------------------------------------------------------------------------------

    def cosine(self, other: "Direction") -> dict[str, float]:
        """Return the cosine with another direction at each site that both have.

        Raises:
            SiteError: no site in common.
            ModelError: directions of different models.
        """
        self._refuse_another_model(other)
        both = [s for s in self.sites if s in other.vectors]
        if not both:
            raise SiteError(f"the directions share no site: {', '.join(self.sites)} and {', '.join(other.sites)}")
        for site in both:
            self._same_shape(other, site)
        flat = {s: (self[s].flatten().double(), other[s].flatten().double()) for s in both}
        return {s: float(a @ b / (a.norm() * b.norm())) for s, (a, b) in flat.items()}

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per site: the vector's length, what was measured along it, and the figures of its fit."""
        import pandas

        rows = []
        for site, v in self.vectors.items():
            scale = self.scale.get(site, SiteScale(math.nan, math.nan))
            held = {"gap": abs(scale.positive - scale.negative), **self.stats.get(site, {})}
            rows.append({"site": site, "layer": Site(site).layer, "norm": float(v.norm()), **scale._asdict(), **held})
        return pandas.DataFrame(rows)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{s} {list(v.shape)}" for s, v in list(self.vectors.items())[:4])
        more = ", …" if len(self.vectors) > 4 else ""
        return f"Direction({self.name!r}, {self.method}, {self.operation}, {shapes}{more}; of {self.model.model!r})"

    def _repr_html_(self) -> str:
        table = self.to_frame().to_html(index=False, float_format=lambda x: f"{x:.4g}", border=0, na_rep="")
        said = "".join(f"<br>{html.escape(note)}" for note in self.notes)
        return f"<div><b>{html.escape(repr(self))}</b>{said}{table}</div>"

    # -- on disk ------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write one safetensors file: a tensor per site, and the rest as JSON in its header.

        Args:
            path: the file; it appears complete or not at all.
            overwrite: replace a file that is there.

        Raises:
            ArtifactError: a file is there.
        """
        record = {f: getattr(self, f) for f in _SAVED}
        return write_direction(Path(path), self.vectors, record, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Direction":
        """Read what `save` wrote.

        Raises:
            ArtifactError: no such file, a damaged one, or one of another kind or format.
        """
        return read_direction(path, lambda held: cls(**held))


_SAVED = ("method", "model", "operation", "read_at", "scale", "stats", "name", "folded", "notes")
