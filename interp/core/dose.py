"""`Dose`: how much of a direction, in a unit that says what it means; and how large activations are along it."""

import math
from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from interp.core.errors import ConfigError, DataError, ShapeError, nearest
from interp.core.intervention import Intervention
from interp.core.where import Where

__all__ = ["UNITS", "Dose", "SiteScale", "Steers", "measure_scale"]

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
        if isinstance(dose.value, Tensor) and dose.value.ndim > 1:
            raise ConfigError(f"a dose is a number or one per row [batch], got shape {tuple(dose.value.shape)}")
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
        """Return what a unit vector is multiplied by for a dose of 1, NaN where it was not measured.

        Args:
            unit: one of `UNITS`.
            norm: the fitted vector's own length.

        Raises:
            ConfigError: no projection is above 0, so that "largest" would turn the direction round.
        """
        gap = abs(self.positive - self.negative)
        known = {"raw": norm, "rms": self.rms, "sigma": self.sigma, "gap": gap, "largest": self.largest}
        if unit == "largest" and self.largest <= 0:
            raise ConfigError(
                f"unit 'largest': the largest projection is {self.largest:.4g}, so a dose in it would point the other "
                "way; give the dose in another unit"
            )
        return known[unit]

    def reversed(self) -> "SiteScale":
        """Return the scale along the opposite direction; which class it points to changes with it."""
        return self._replace(positive=-self.negative, negative=-self.positive, largest=math.nan)


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
        DataError: a zero vector, which is no direction, or no activations.
    """
    if not len(x):
        raise DataError("there are no activations to measure the scale of a direction by")
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
