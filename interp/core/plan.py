"""`Plan`: what a run asks for, validated against the model before anything runs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from interp.core.errors import ShapeError, SiteError, WhereError
from interp.core.intervention import Edit, Intervention
from interp.core.points import Atlas, Point
from interp.core.site import Site
from interp.core.where import Where

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """What a run asks for: reads and edits by place, validated against the model.

    Args:
        reads: the sites to read, slices included, in the order asked.
        writes: the edits with globs expanded, in list order.
        points: where each place is.
        gates: the conditions that the forward decides on its way.
        late: conditions read at or after what they decide about: one more forward of the prompt decides them.
    """

    reads: tuple[Site, ...]
    writes: tuple[Intervention, ...]
    points: tuple[Point, ...]
    gates: tuple[Any, ...] = ()
    late: tuple[Any, ...] = ()

    @cached_property
    def restricted(self) -> bool:
        """Whether any read or edit is about some positions, rows or heads only."""
        wheres = [r.where for r in self.reads] + [w.selection for w in self.writes]
        return any(w is not None and not w.is_all for w in wheres)

    @property
    def needs_residual_identity(self) -> bool:
        """Whether something asked for is defined as what is added to the residual stream."""
        return any(p.site.kind in ("attn_out", "mlp_out") for p in self.points)

    @staticmethod
    def make(atlas: Atlas, read: Sequence[Any], write: Sequence[Any]) -> "Plan":
        """Validate a request and find its places.

        Raises:
            SiteError: an unknown or absent site, or an edit at a site that can only be read.
            ShapeError: something in `write` that is no edit.
        """
        reads: dict[Site, None] = {}
        for name in _listed(read, "read"):
            for site in atlas.expand(name):
                if site.where is not None:
                    _check_heads(atlas, site, site.where)
                reads.setdefault(site)
        writes = []
        for edit in _listed(write, "write"):
            if isinstance(edit, tuple) and len(edit) == 2 and callable(edit[1]):
                edit = Edit(*edit)
            if not isinstance(edit, Intervention):
                raise ShapeError(
                    f"write=[…] takes edits such as interp.Add(site, vector) or (site, function), "
                    f"got {type(edit).__name__}"
                )
            for site in atlas.expand(edit.site):
                point = atlas.point(site)
                if point.read_only:
                    raise SiteError(
                        f"{site.short!r} of {atlas.map.family} can be read but not edited: {point.read_only}"
                    )
                _check_heads(atlas, site, edit.selection)
                writes.append(replace(edit, site=site))
        gates, late = _gates(atlas, writes)
        sites = [*reads, *(Site(w.site) for w in writes), *(Site(g.site) for g in gates)]
        places = {s.key: atlas.point(s) for s in sites}
        return Plan(tuple(reads), tuple(writes), tuple(places.values()), gates, late)

    def deciding(self, atlas: Atlas) -> "Plan":
        """Return the plan of the forward that decides the late gates: without the edits that wait for a gate."""
        writes = tuple(w for w in self.writes if not w.gates)
        places = {s.key: atlas.point(s) for s in [*(Site(w.site) for w in writes), *(Site(g.site) for g in self.late)]}
        return Plan((), writes, tuple(places.values()), self.late)


def _gates(atlas: Atlas, writes: Sequence[Intervention]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The gates of some edits: those read on the way, and those read after what they decide about.

    Raises:
        SiteError: a gate that decides step by step about something earlier, or about keys of earlier steps.
    """
    found: dict[Any, bool] = {}
    for edit in writes:
        for gate in edit.gates:
            place, acts = Site(gate.site), Site(edit.site)
            atlas.point(place)
            order = atlas.sites()
            after = order.index(Site(place.short)) > order.index(Site(acts.short))
            if after and gate.once != "prompt":
                raise SiteError(
                    f"a gate at {place.short} comes after the edit at {acts.short}, which it should decide about; give "
                    "an earlier site, or once='prompt', which decides in one more forward of the prompt"
                )
            if gate.once != "prompt" and acts.kind == "rot_k":
                raise SiteError(
                    f"{acts.short} holds keys of earlier steps, which a gate of each step cannot decide about"
                )
            found[gate] = found.get(gate, False) or after
    return tuple(g for g, after in found.items() if not after), tuple(g for g, after in found.items() if after)


def _check_heads(atlas: Atlas, site: Site, where: Where) -> None:
    """Refuse heads that the site does not have, before anything runs."""
    if any(part.head is not None or part.src is not None for part in where.any_of):
        raise WhereError(f"{where!r}: a union cannot restrict heads or keys in its parts; make one edit for each")
    if where.head is None:
        return
    for axis, size in zip(site.axes, atlas.shape(site), strict=True):
        if axis in ("n_heads", "n_kv_heads"):
            kind = "key/value" if axis == "n_kv_heads" else "query"
            where.heads(int(size), f"{site.short}, which counts {kind} heads")
            return
    raise WhereError(f"head={where.head!r}: {site.short} has no heads; its axes are {' '.join(site.axes)}")


def _listed(value: Any, name: str) -> Sequence[Any]:
    if value is None:
        return ()
    if isinstance(value, str | Site | Intervention):
        return (value,)
    if isinstance(value, Sequence):
        return value
    raise SiteError(f"{name}=… takes a list, got {type(value).__name__}")
