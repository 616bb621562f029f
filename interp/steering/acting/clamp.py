"""Steering by a dictionary's latents: what it reconstructs otherwise, and nothing else, is added to the activation."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from interp.core.dose import Dose
from interp.core.errors import ConfigError, ShapeError
from interp.core.intervention import Intervention, Splice
from interp.core.place import Place
from interp.core.site import Site
from interp.core.where import Where
from interp.dictionaries.base import Dictionary, Transcoder
from interp.dictionaries.processed import refuse_unbound

__all__ = ["CLAMPS", "ClampLatents", "LatentClamp", "clamp_latents"]

CLAMPS = ("set", "add", "scale", "zero")
"""z ← value; z ← z + value; z ← z · value; z ← 0."""

_Value = float | int | Tensor


@dataclass(frozen=True, eq=False)
class ClampLatents(Intervention):
    """Change some latents and keep the rest, the dictionary's error included: x ← x + decode(z′) − decode(z).

    Where a latent already has its value nothing is added, bit for bit. Where the dictionary has `reconstructed(z, x)`
    that stands for `decode(z)`. Memory: three tensors [batch pos d_sae] besides what the dictionary takes.

    Args:
        dictionary: anything with `encode` and `decode`.
        values: latent → its value, in units of the latent; a number, or one per row [batch].
        mode: one of `CLAMPS`.
        where: the positions it acts on.

    Warns:
        UserWarning: the dictionary was trained at another site.
    """

    dictionary: Any
    values: Mapping[int, _Value]
    mode: str = "set"
    where: Where = field(default_factory=Where)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in CLAMPS:
            raise ConfigError(f"mode={self.mode!r}: expected one of {', '.join(CLAMPS)}")
        if not isinstance(self.values, Mapping) or not self.values:
            raise ConfigError("give the latents that change, {latent: value}")
        width = getattr(getattr(self.dictionary, "cfg", self.dictionary), "d_sae", None)
        for latent, value in self.values.items():
            if isinstance(latent, bool) or not isinstance(latent, int) or latent < 0:
                raise ConfigError(f"latent {latent!r}: expected a whole number ≥ 0")
            if isinstance(width, int) and latent >= width:
                raise ConfigError(f"latent {latent} does not exist: this dictionary has {width} (0 to {width - 1})")
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number and not (isinstance(value, Tensor) and value.ndim == 1 and bool(value.isfinite().all())):
                raise ConfigError(
                    f"the value of latent {latent} is {value!r}: expected a number, or one per row [batch]"
                )
        Splice(self.site, self.dictionary, keep_error=True)  # refuses what has no encode and decode
        _refuse_elsewhere(self.dictionary, Site(self.site))

    @property
    def may_do_nothing(self) -> bool:
        """A latent that is off is already zero; adding 0 or scaling by 1 is where a sweep begins."""
        same = {"add": 0.0, "scale": 1.0}.get(self.mode)
        return self.mode == "zero" or all(not isinstance(v, Tensor) and v == same for v in self.values.values())

    def edit(self, x: Tensor, place: Place) -> Tensor:
        """Return x with what the latents' change reconstructs."""
        splice = Splice(self.site, self.dictionary, keep_error=True, latents=lambda z: self._changed(z, place))
        return splice.edit(x, place)

    def _changed(self, z: Float[Tensor, "batch pos d_sae"], place: Place) -> Float[Tensor, "batch pos d_sae"]:
        for latent, value in self.values.items():
            given = place.per_row(value, z[..., 0], "ClampLatents")
            old = z[..., latent]
            new = {"set": lambda: given, "add": lambda: old + given, "scale": lambda: old * given, "zero": lambda: 0.0}  # noqa: B023
            z[..., latent] = new[self.mode]()
        return z


def _refuse_elsewhere(dictionary: Any, site: Site) -> None:
    """Refuse, or warn of, latents that mean nothing at a site."""
    if isinstance(dictionary, Transcoder):
        raise ShapeError(
            "a transcoder reads one site and writes another, so its latents cannot be clamped at one; give an SAE, or "
            "add what a latent writes (interp.steering.latent_direction)"
        )
    if not isinstance(dictionary, Dictionary):
        return
    refuse_unbound(dictionary)
    known = dictionary.cfg.metadata.get("hook_name")
    if known is None:
        return
    own = Site(str(known))
    # What leaves one block enters the next.
    ends = [
        (s.layer or 0) + (s.kind == "resid_post") if s.kind in ("resid_pre", "resid_post") else s for s in (own, site)
    ]
    if own.short != site.short and ends[0] != ends[1]:
        warnings.warn(
            f"this dictionary was trained at {own.short} and is used at {site.short}, where its latents need not mean "
            "the same",
            stacklevel=5,
        )


@dataclass(frozen=True, eq=False)
class LatentClamp:
    """Latents to be clamped as something that steers: a dose multiplies their values.

    Args:
        dictionary: anything with `encode` and `decode`.
        values: latent → value at a dose of 1, such as its largest activation.
        site: where the dictionary was trained.
        mode: "set" or "add".

    Source: AxBench (Wu et al. 2025, arXiv 2501.17148, §3) clamps to factor · the latent's maximum activation.
    """

    dictionary: Any
    values: Mapping[int, float]
    site: Site | str
    mode: str = "set"

    def as_interventions(self, dose: float | Tensor | Dose = 1.0, *, where: Where | None = None) -> list[Intervention]:
        """Return the edit with every value multiplied by the dose, a number or one per row [batch].

        Raises:
            ConfigError: a unit other than "raw", or a mode that takes no value.
        """
        amount = Dose.of(dose)
        if amount.unit != "raw" or self.mode not in ("set", "add"):
            raise ConfigError(
                f"a dose of clamped latents multiplies the values of mode 'set' or 'add' and has no unit; got "
                f"unit={amount.unit!r}, mode={self.mode!r}"
            )
        values = {latent: amount.value * value for latent, value in self.values.items()}
        return clamp_latents(self.dictionary, values, self.site, mode=self.mode, where=where)


def clamp_latents(
    dictionary: Any,
    latents: Mapping[int, float | Tensor] | Sequence[int],
    site: Site | str,
    *,
    mode: str = "set",
    where: Where | None = None,
) -> list[Intervention]:
    """Return the edit that changes latents and keeps everything else of the activation.

    Args:
        dictionary: anything with `encode` and `decode` (and `reconstructed`, where what latents stand for depends on
            the activation).
        latents: latent → value, a number or one per row [batch]; for mode "zero" a list of latents will do.
        site: where the dictionary was trained.
        mode: one of `CLAMPS`.
        where: the positions it acts on; every non-pad one by default.

    Raises:
        ConfigError: latents that do not exist, values that are none, an unknown mode, or a dictionary of a processed
            model that was made for none.
        ShapeError: something without encode and decode, or a transcoder.
    """
    values = latents if isinstance(latents, Mapping) else dict.fromkeys(latents, 0.0)
    if not isinstance(latents, Mapping) and mode != "zero":
        raise ConfigError(f"mode={mode!r} needs values: give {{latent: value}}")
    return [ClampLatents(site, dictionary, values, mode, Where() if where is None else where)]
