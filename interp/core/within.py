"""`AffineWithin`: an affine map of each feature by itself, inside a range, by a share."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.errors import ShapeError
from interp.core.intervention import Intervention, _finite, _tensor
from interp.core.place import Place
from interp.core.where import Where

__all__ = ["AffineWithin"]


@dataclass(frozen=True, eq=False)
class AffineWithin(Intervention):
    """Map each feature by itself: x ← x + strength · (factor · x + shift − x) where low ≤ x ≤ high, else x.

    It is computed in fp32 or better; what lies outside the range, and everything at strength 0, keeps its bits.

    Args:
        factor: [*features], one per feature of the site ([d_model], or [n_heads d_head], …).
        shift: the same, in the units of the activation.
        low: smallest values that are mapped, [*features]; None: no bound.
        high: largest ones.
        strength: 0 changes nothing, 1 is the whole map; a number, or one per row [batch].
        where: as for `Add`.
    """

    factor: Float[Tensor, "*features"]
    shift: Float[Tensor, "*features"]
    low: Float[Tensor, "*features"] | None = None
    high: Float[Tensor, "*features"] | None = None
    strength: float | Tensor = 1.0
    where: Where = field(default_factory=Where)

    def __post_init__(self) -> None:
        super().__post_init__()
        shape = None
        for name in ("factor", "shift", "low", "high"):
            value = getattr(self, name)
            if value is None and name in ("low", "high"):
                continue
            _tensor("AffineWithin", name, value)
            shape = value.shape if shape is None else shape
            if value.shape != shape:
                raise ShapeError(
                    f"AffineWithin({name}=…) has shape {tuple(value.shape)} and the factor {tuple(shape)}; give one "
                    "number for each feature of the site"
                )
        _finite("AffineWithin", "strength", self.strength)

    @property
    def may_do_nothing(self) -> bool:
        """A strength of 0 asks for the model as it is."""
        return not isinstance(self.strength, Tensor) and self.strength == 0

    def edit(self, x: Tensor, place: Place) -> Tensor:
        """Return x mapped."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        factor, shift = (place.fit(v, wide, "AffineWithin") for v in (self.factor, self.shift))
        # One rounding at either end: at strength 1 the map itself, not x plus a difference.
        strength = place.per_row(self.strength, wide, "AffineWithin")
        mapped = (1 + strength * (factor - 1)) * wide + strength * shift
        inside = wide.isfinite()
        if self.low is not None:
            inside &= wide >= place.fit(self.low, wide, "AffineWithin")
        if self.high is not None:
            inside &= wide <= place.fit(self.high, wide, "AffineWithin")
        return torch.where(inside, mapped, wide).to(x.dtype)
