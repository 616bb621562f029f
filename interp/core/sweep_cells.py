"""`Cells`: many edits of one site, each of which a sweep tries on its own; and the intervention that makes them.

A cell is one edit at one site: of chosen positions, and perhaps of one head, one unit or some key positions. A *branch*
is a copy of the batch that carries one cell. Branches lie one after another along the batch axis: row b of branch n is
row n · batch + b.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp.core.errors import ShapeError, SiteError
from interp.core.intervention import Edit, Intervention
from interp.core.place import Place
from interp.core.site import Site
from interp.core.where import Where

__all__ = ["CellEdit", "Cells", "NewValues", "edits_at", "plain_edit"]

NewValues = Callable[[Tensor, Tensor, int], Tensor]
"""Gives the values of some cells: (x [n batch pos' …], which cells [n], first column) → a tensor broadcastable to x."""

_HEADS = ("n_heads", "n_kv_heads")


@dataclass(frozen=True, eq=False)
class Cells:
    """Edits of one site that a sweep tries one by one.

    `new` is asked for a slice of cells at a time, never for all at once. It gets the site's own activations of those
    branches, x [n batch pos' …], which start at column `first`; values outside a cell's columns, head, unit and keys
    are dropped.

    Args:
        site: the site.
        columns: which columns of the padded batch each cell edits, row by row; a row without any stays as it is, a
            cell without any is a patch that changes nothing and is not run. Pads are never edited.
        new: gives the new values.
        heads: for sites with heads, the one head that each cell edits; None for all.
        units: the one entry of the last axis (such as a neuron) that each cell edits; None for all.
        src: for pattern and attn_scores, the key columns that each cell edits; None for all.
        then: further edits that go with the same cells, at this block or later ones: cell i of each belongs to cell i
            here. A window of layers is patched so.

    Raises:
        ShapeError: shapes that do not fit each other.
        SiteError: heads or keys at a site that has none.
    """

    site: Site | str
    columns: Bool[Tensor, "cell batch pos"]
    new: NewValues
    heads: Int[Tensor, " cell"] | None = None
    units: Int[Tensor, " cell"] | None = None
    src: Bool[Tensor, "cell batch pos"] | None = field(default=None)
    then: "tuple[Cells, ...]" = ()

    def __post_init__(self) -> None:
        site = Site(self.site)
        if site.where is not None:
            raise SiteError(f"Cells({site!r}): say where cells edit with columns and heads, not with .at(…)")
        object.__setattr__(self, "site", site)
        if self.columns.ndim != 3 or self.columns.dtype != torch.bool:
            raise ShapeError(
                f"Cells(columns=…) at {site.short}: expected bool [cell batch pos], got {self.columns.dtype} "
                f"{tuple(self.columns.shape)}"
            )
        for name, axes in (("heads", _HEADS), ("src", ("src",))):
            if getattr(self, name) is not None and not set(axes) & set(site.axes):
                raise SiteError(f"Cells({name}=…): {site.short} has axes {' '.join(site.axes)}")
        for name in ("heads", "units", "src"):
            given = getattr(self, name)
            if given is not None and len(given) != len(self.columns):
                raise ShapeError(f"Cells({name}=…) at {site.short}: {len(given)} for {len(self.columns)} cells")

        for more in self.then:
            if len(more) != len(self) or (Site(more.site).layer or 0) < (site.layer or 0) or more.then:
                raise ShapeError(
                    f"Cells(then=…) at {site.short}: expected {len(self)} cells at this block or a later one, got "
                    f"{len(more)} at {Site(more.site).short}"
                )

    def __len__(self) -> int:
        return len(self.columns)

    @property
    def parts(self) -> "tuple[Cells, ...]":
        """This and what goes with it."""
        return (self, *self.then)

    @classmethod
    def replacing(
        cls,
        site: Site | str,
        value: Tensor,
        columns: Bool[Tensor, "cell batch pos"],
        *,
        base: Tensor | None = None,
        heads: Int[Tensor, " cell"] | None = None,
        units: Int[Tensor, " cell"] | None = None,
        src: Bool[Tensor, "cell batch pos"] | None = None,
    ) -> "Cells":
        """Return cells that put a value in the activation's place: activation patching.

        Args:
            site: the site.
            value: in the site's axes, broadcastable to the whole activation, such as that of another run.
            columns: as in the class.
            base: the activation of the run that is edited; columns where the value is the same are left out, so that
                a cell which would change nothing runs nothing.
            heads, units, src: as in the class.
        """
        axis = Site(site).axes.index("pos")

        def new(x: Tensor, pick: Tensor, first: int) -> Tensor:
            there = value if value.shape[axis] == 1 else value.narrow(axis, first, x.shape[axis + 1])
            return there.to(x.device, x.dtype).unsqueeze(0)

        cells = cls(site, columns, new, heads=heads, units=units, src=src)
        return cells if base is None else cells.where_different(base, value)

    def where_different(self, base: Tensor, value: Tensor) -> "Cells":
        """Return the cells without the columns where a value equals the base run's in all that the cell edits.

        Args:
            base: the activation, in the site's axes.
            value: the new one, broadcastable to it.
        """
        site = Site(self.site)
        axes, differs = list(site.axes), (value.to(base.device) != base).cpu()
        if "src" in axes:
            return replace(self, columns=self.columns & self._keys_differ(differs))
        keep = [a for a in axes if a in _HEADS and self.heads is not None]
        keep += [axes[-1]] if self.units is not None and axes[-1] not in keep else []
        gone = [i for i, a in enumerate(axes) if i > 1 and a not in keep]
        differs = differs.any(dim=gone) if gone else differs
        if not keep:
            return replace(self, columns=self.columns & differs[None])
        index = [at for at in (self.heads, self.units) if at is not None]
        return replace(self, columns=self.columns & differs.movedim((0, 1), (-2, -1))[tuple(index)])

    def _keys_differ(self, differs: Bool[Tensor, "batch head pos src"]) -> Bool[Tensor, "cell batch pos"]:
        found = []
        for i in range(len(self)):
            part = differs if self.heads is None else differs[:, self.heads[i]][:, None]
            part = part if self.src is None else part & self.src[i][:, None, None, :]
            found.append(part.any(-1).any(1))
        return torch.stack(found) if found else self.columns

    def chosen(self, pick: Int[Tensor, " n"], x: Tensor, first: int) -> Bool[Tensor, "..."]:
        """Return what some cells edit, broadcastable to x [n batch pos' …].

        Args:
            pick: the cells.
            x: the activation of their branches.
            first: the column that x begins at.
        """
        axes = ("cell", *Site(self.site).axes)
        axis = axes.index("pos")
        columns = self.columns[pick][:, :, first : first + x.shape[axis]]
        mask = _along(columns, x.ndim, (0, 1, axis))
        if self.heads is not None:
            at = next(i for i, a in enumerate(axes) if a in _HEADS)
            mask = mask & _one_hot(self.heads[pick], x.shape[at], x.ndim, at)
        if self.units is not None:
            mask = mask & _one_hot(self.units[pick], x.shape[-1], x.ndim, x.ndim - 1)
        if self.src is not None:
            mask = mask & _along(self.src[pick][:, :, : x.shape[-1]], x.ndim, (0, 1, x.ndim - 1))
        return mask.to(x.device, non_blocking=True)


def _along(values: Tensor, ndim: int, at: tuple[int, int, int]) -> Tensor:
    shape = [1] * ndim
    for axis, size in zip(at, values.shape, strict=True):
        shape[axis] = size
    return values.reshape(shape)


def _one_hot(index: Tensor, size: int, ndim: int, axis: int) -> Bool[Tensor, "..."]:
    shape = [1] * ndim
    shape[0], shape[axis] = len(index), size
    return (index[:, None] == torch.arange(size)).reshape(shape)


@dataclass(frozen=True, eq=False)
class CellEdit(Intervention):
    """Makes some cells of one site, each in its own branch of a batch; one operation for all of them.

    Args:
        cells: the cells.
        pick: those that are made here, in the order of their branches.
        low: the branch of the first.
        batch: rows of a branch.
        first: the column that the forward begins at.
    """

    cells: Any
    pick: Int[Tensor, " n"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    low: int = 0
    batch: int = 1
    first: int = 0

    @property
    def may_do_nothing(self) -> bool:
        """What changes nothing has been left out already."""
        return True

    def edit(self, x: Tensor, place: Place) -> Tensor:
        """Return x with the cells' branches edited."""
        whole = x.unflatten(0, (-1, self.batch))
        branches = slice(self.low, self.low + len(self.pick))
        part = whole[branches]
        new = self.cells.new(part, self.pick, self.first)
        out = whole.clone()
        out[branches] = torch.where(self.cells.chosen(self.pick, part, self.first), new, part)
        return out.flatten(0, 1)


def edits_at(sites: Sequence[tuple[Cells, Int[Tensor, " n"], int]], *, batch: int, first: int) -> tuple[CellEdit, ...]:
    """Return the edits of one block call: (cells, which of them, their first branch) for each site."""
    return tuple(
        CellEdit(cells.site, cells, pick=pick, low=low, batch=batch, first=first) for cells, pick, low in sites
    )


def plain_edit(cells: Cells, pick: Int[Tensor, " one"], mask: Bool[Tensor, "batch pos"]) -> Edit | None:
    """Return one cell as an ordinary edit of the whole batch, or None where it edits nothing: the naive loop's.

    Args:
        cells: the cells.
        pick: which one.
        mask: True where a token is real.
    """
    columns = cells.columns[pick[0]].cpu() & mask
    if not bool(columns.any()):
        return None

    def put(x: Tensor) -> Tensor:
        value = cells.new(x[None], pick, 0)[0].expand_as(x)
        if cells.units is not None:
            at = torch.arange(x.shape[-1], device=x.device) == int(cells.units[pick])
            value = torch.where(at, value, x)
        if cells.src is None:
            return value
        keys = cells.src[pick[0]].to(x.device)[:, None, None, : x.shape[-1]]
        return torch.where(keys, value, x)

    head = None if cells.heads is None else int(cells.heads[pick])
    return Edit(cells.site, put, where=Where(mask=columns, head=head))
