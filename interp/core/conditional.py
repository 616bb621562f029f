"""Edits of edits: `KeepNorm` puts each position's norm back, `Gated` lets an edit act only where a gate is open."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from interp.core.errors import ConfigError, HookError, ShapeError
from interp.core.gate import Decision, Gate
from interp.core.intervention import Intervention
from interp.core.place import Place
from interp.core.site import Site
from interp.core.where import Where

__all__ = ["Gated", "KeepNorm"]


@dataclass(frozen=True, eq=False, init=False)
class _Wrapper(Intervention):
    """An edit around another: it acts at the same site and positions, under the same conditions."""

    inner: Intervention

    def __init__(self, inner: Intervention, *, site: Site | str | None = None) -> None:
        if not isinstance(inner, Intervention):
            raise ShapeError(f"{type(self).__name__} wraps an edit such as Add(…), got {type(inner).__name__}")
        held = inner if site is None else replace(inner, site=site)
        object.__setattr__(self, "site", held.site)
        object.__setattr__(self, "inner", held)

    @property
    def may_do_nothing(self) -> bool:
        """As the edit inside."""
        return self.inner.may_do_nothing

    @property
    def keeps_values(self) -> bool:
        """As the edit inside."""
        return self.inner.keeps_values

    @property
    def after_reads(self) -> bool:
        """As the edit inside."""
        return self.inner.after_reads

    @property
    def needs_whole_batch(self) -> bool:
        """As the edit inside."""
        return self.inner.needs_whole_batch

    @property
    def selection(self) -> Where:
        """As the edit inside."""
        return self.inner.selection

    @property
    def gates(self) -> tuple[Gate, ...]:
        """Those of the edit inside."""
        return self.inner.gates


@dataclass(frozen=True, eq=False, init=False)
class KeepNorm(_Wrapper):
    """Turn an activation as an edit does, and give it its length back: x ← ‖x‖ · y / ‖y‖ with y the edited x.

    Each position has its own norm, at sites with heads each head at each position. An edit that leaves zeros leaves
    zeros: they have no direction that a length could be given to.

    Args:
        inner: any edit.

    Source: the `normalize` option of repeng's control vectors (github.com/vgel/repeng), written from its description.
    """

    def edit(self, x: Tensor, place: Place) -> Tensor:
        """Return the edited activation in its old length."""
        new = self.inner.edit(x, place)
        if not isinstance(new, Tensor) or new.shape != x.shape:
            return new  # the engine says what is wrong with it
        before, after = (torch.linalg.vector_norm(v, dim=-1, keepdim=True, dtype=_wide(v)) for v in (x, new))
        return (new * torch.where(after > 0, before / after, 1.0)).to(x.dtype)


@dataclass(frozen=True, eq=False, init=False)
class Gated(_Wrapper):
    """Make an edit only where a gate is open; everything else stays as it is, bit for bit.

    What was decided is in `out.gates` and `out.notes`. A closed gate is no mistake, so nothing is warned of.

    Args:
        inner: any edit.
        gate: one gate or several.
        when: of several: "all" must be open, or "any".

    Raises:
        ConfigError: no gate, or an unknown rule.
    """

    gate: tuple[Gate, ...]
    when: str = "all"

    def __init__(
        self,
        inner: Intervention,
        gate: Gate | Sequence[Gate],
        *,
        when: str = "all",
        site: Site | str | None = None,
    ) -> None:
        super().__init__(inner, site=site)
        given = (gate,) if isinstance(gate, Gate) else tuple(gate)
        wrong = next((type(g).__name__ for g in given if not isinstance(g, Gate)), None)
        if not given or wrong is not None:
            raise ConfigError(f"Gated(gate=…) needs a Gate, or several, got {wrong or 'none'}")
        if when not in ("all", "any"):
            raise ConfigError(f"Gated(when={when!r}): expected 'all' or 'any'")
        object.__setattr__(self, "gate", given)
        object.__setattr__(self, "when", when)

    @property
    def may_do_nothing(self) -> bool:
        """A closed gate leaves everything as it is."""
        return True

    @property
    def gates(self) -> tuple[Gate, ...]:
        """Its own, and those of the edit inside."""
        return (*self.inner.gates, *self.gate)

    def edit(self, x: Tensor, place: Place) -> Tensor:
        """Return the edited activation where the gates are open."""
        votes = [self._open(place, gate, x) for gate in self.gate]
        on = votes[0]
        for vote in votes[1:]:
            on = on & vote if self.when == "all" else on | vote
        if on.device.type == "cpu" and not bool(on.any()):
            return x
        new = self.inner.edit(x, place)
        return torch.where(on, new, x) if isinstance(new, Tensor) and new.shape == x.shape else new

    def _open(self, place: Place, gate: Gate, x: Tensor) -> Tensor:
        """Where one gate is open, broadcastable to x."""
        decision: Any = place.decisions.get(gate)
        if not isinstance(decision, Decision):
            raise HookError(
                f"the gate at {Site(gate.site).short} had not been read when the edit at {place.site.short} ran; in "
                "this model that site comes later: read an earlier layer"
            )
        axis = place.site.axes.index("pos")
        chosen = decision.open[:, None]
        if decision.positions is not None:
            columns = place.columns(x.shape[axis])
            chosen = decision.positions[:, columns.start - decision.first : columns.stop - decision.first]
        shape = [1] * x.ndim
        shape[0], shape[axis] = chosen.shape
        return chosen.reshape(shape).to(x.device)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
