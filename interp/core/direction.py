"""`Direction`: a vector at one or several sites, with everything that is needed to know what adding it means."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from interp.core.disk import atomic_write
from interp.core.errors import ArtifactError, ConfigError, DataError, ModelError, ShapeError, SiteError, nearest
from interp.core.intervention import Add, Intervention, Project, SetProjection
from interp.core.result import Provenance
from interp.core.site import Site
from interp.core.where import Where

if TYPE_CHECKING:
    from interp.core.manager import HookManager

__all__ = ["FORMAT", "OPERATIONS", "UNITS", "Direction", "Dose", "SiteScale", "Steers", "measure_scale"]

FORMAT = 1
OPERATIONS = ("add", "ablate", "set")
"""add: x + c · v. ablate: x without its part along v. set: x with its coordinate along v set to c."""

UNITS = ("raw", "rms", "sigma", "gap", "largest")
"""What a dose of 1 is: the vector as fitted; or along the unit vector, the root mean square norm of the activation, the
standard deviation of its projection, the distance between the projections' means of the two classes, or the largest
projection (the max-activation of AxBench)."""


class Dose(NamedTuple):
    """How much of a direction: a number, or one per row [batch], in a unit of `UNITS`."""

    value: float | Tensor = 1.0
    unit: str = "raw"

    @classmethod
    def of(cls, given: "float | Tensor | Dose") -> "Dose":
        """Return a dose; plain numbers are raw."""
        dose = given if isinstance(given, Dose) else cls(given)
        if dose.unit not in UNITS:
            raise ConfigError(
                f"unit={dose.unit!r}: {nearest(dose.unit, UNITS) or 'expected one of ' + ', '.join(UNITS)}"
            )
        if isinstance(dose.value, bool) or not isinstance(dose.value, int | float | Tensor):
            raise ConfigError(f"a dose is a number or one per row [batch], got {type(dose.value).__name__}")
        return dose


@runtime_checkable
class Steers(Protocol):
    """Whatever steers a model: a direction, a map, a clamped latent; one loop compares them all."""

    def as_interventions(
        self, dose: "float | Tensor | Dose" = 1.0, *, where: Where | None = None
    ) -> list[Intervention]:
        """Return the edits that steer with this dose."""
        ...


class SiteScale(NamedTuple):
    """How large activations are along a direction, over the examples of its fit.

    Attributes:
        rms: root mean square norm of the activation.
        sigma: standard deviation of its projection on the unit vector.
        positive: mean projection of the examples with the concept; NaN where there are no classes.
        negative: the same of those without it.
        largest: largest projection.
    """

    rms: float
    sigma: float
    positive: float = math.nan
    negative: float = math.nan
    largest: float = math.nan

    def factor(self, unit: str, norm: float) -> float:
        """Return what a unit vector is multiplied by for a dose of 1; `norm` is the fitted vector's own."""
        gap = self.positive - self.negative
        known = {"raw": norm, "rms": self.rms, "sigma": self.sigma, "gap": gap, "largest": self.largest}
        return known[unit]


def measure_scale(
    x: Float[Tensor, "n *features"],
    vector: Float[Tensor, "*features"],
    *,
    positive: Tensor | None = None,
) -> SiteScale:
    """Return the scale of activations along a vector.

    Args:
        x: activations of the fit.
        vector: the direction; its length does not matter.
        positive: bool [n], which examples have the concept; None where there are no classes.

    Raises:
        ShapeError: a vector of another shape.
        DataError: a zero vector, which is no direction.
    """
    if x.shape[1:] != vector.shape:
        raise ShapeError(f"activations {tuple(x.shape)} and vector {tuple(vector.shape)} have different features")
    flat, v = x.reshape(len(x), -1).double(), vector.reshape(-1).double().to(x.device)
    if not float(v.norm()) > 0:
        raise DataError("the vector is zero, so it is no direction")
    along = flat @ (v / v.norm())
    ends = [math.nan, math.nan]
    if positive is not None and bool(positive.any()) and not bool(positive.all()):
        ends = [float(along[positive].mean()), float(along[~positive].mean())]
    return SiteScale(
        rms=float(flat.square().sum(1).mean().sqrt()),
        sigma=float(along.std(unbiased=False)),
        positive=ends[0],
        negative=ends[1],
        largest=float(along.max()),
    )


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
        if not self.vectors:
            raise SiteError("a direction needs a vector at one site at least")
        if self.operation not in OPERATIONS:
            raise ConfigError(f"operation={self.operation!r}: expected one of {', '.join(OPERATIONS)}")
        held = {}
        for given, vector in self.vectors.items():
            site = Site(given)
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
                per row [batch] steers each row by its own. Ablation takes no dose.
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
                made.append(Add(site, self.unit(site), scale=self._coefficient(site, amount), where=place))
                continue
            if v.ndim != 1:
                raise SiteError(
                    f"{how} acts on one vector a position, and {site} has features {tuple(v.shape)}; use add"
                )
            if how == "ablate":
                made.append(Project(site, v, where=place))
            else:
                made.append(SetProjection(site, v, value=self._coefficient(site, amount), where=place))
        return made

    def unit(self, site: Site | str) -> Tensor:
        """Return the vector at a site with length 1."""
        v = self[site]
        return v / v.norm()

    def _coefficient(self, site: str, dose: Dose) -> float | Tensor:
        """What the unit vector is multiplied by."""
        if dose.unit == "raw":
            factor = float(self.vectors[site].norm())
        else:
            if site not in self.scale:
                raise ConfigError(
                    f"unit {dose.unit!r} needs what the fit measured at {site}, and this direction has no scale there; "
                    "give a raw dose, or fit it on examples"
                )
            factor = self.scale[site].factor(dose.unit, float(self.vectors[site].norm()))
            if not math.isfinite(factor):
                raise ConfigError(f"unit {dose.unit!r} is not known at {site}: the fit had no two classes there")
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

    # -- comparing ----------------------------------------------------------------------------------------------

    def cosine(self, other: "Direction") -> dict[str, float]:
        """Return the cosine with another direction at each site that both have.

        Raises:
            SiteError: no site in common.
        """
        both = [s for s in self.sites if s in other.vectors]
        if not both:
            raise SiteError(f"the directions share no site: {', '.join(self.sites)} and {', '.join(other.sites)}")
        return {s: float(self.unit(s).flatten().double() @ other.unit(s).flatten().double()) for s in both}

    def __repr__(self) -> str:
        shapes = ", ".join(f"{s} {list(v.shape)}" for s, v in list(self.vectors.items())[:4])
        more = ", …" if len(self.vectors) > 4 else ""
        return f"Direction({self.name!r}, {self.method}, {self.operation}, {shapes}{more}; of {self.model.model!r})"

    # -- on disk ------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write one safetensors file: a tensor per site, and the rest as JSON in its header.

        Args:
            path: the file; it appears complete or not at all.
            overwrite: replace a file that is there.

        Raises:
            ArtifactError: a file is there.
        """
        from safetensors.torch import save

        target = Path(path)
        if target.exists() and not overwrite:
            raise ArtifactError(f"{target} is there already; pass overwrite=True to replace it, or choose another path")
        record = {
            "format": FORMAT,
            "method": self.method,
            "model": asdict(self.model),
            "operation": self.operation,
            "read_at": self.read_at,
            "scale": {s: [None if math.isnan(v) else v for v in scale] for s, scale in self.scale.items()},
            "stats": {
                s: {k: (None if math.isnan(v) else v) for k, v in held.items()} for s, held in self.stats.items()
            },
            "name": self.name,
            "folded": self.folded,
            "notes": list(self.notes),
            "sites": list(self.vectors),
        }
        text = json.dumps(record, ensure_ascii=False, allow_nan=False)
        return atomic_write(
            target, save({s: v.contiguous() for s, v in self.vectors.items()}, {"interp.direction": text})
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Direction":
        """Read what `save` wrote.

        Raises:
            ArtifactError: no such file, a damaged one, or one of another kind or format.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "pt") as file:
                record = json.loads((file.metadata() or {}).get("interp.direction", "null"))
                if not isinstance(record, dict) or record.get("format") != FORMAT:
                    raise ArtifactError(
                        f"{path} holds no direction of format {FORMAT}; give the file that save() wrote"
                    )
                vectors = {site: file.get_tensor(site) for site in record["sites"]}
            nan = math.nan
            return cls(
                vectors=vectors,
                method=record["method"],
                model=Provenance(**record["model"]),
                operation=record["operation"],
                read_at=record["read_at"],
                scale={s: SiteScale(*(nan if v is None else v for v in held)) for s, held in record["scale"].items()},
                stats={s: {k: nan if v is None else v for k, v in held.items()} for s, held in record["stats"].items()},
                name=record["name"],
                folded=record["folded"],
                notes=tuple(record["notes"]),
            )
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as err:
            raise ArtifactError(
                f"{path} cannot be read as a direction ({err}); give the file that save() wrote"
            ) from err
