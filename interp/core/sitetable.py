"""`SiteTable`: the sites of a model with shapes and definitions, for reading."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from interp.core.errors import SiteError
from interp.core.points import Atlas
from interp.core.site import Site

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["SiteTable"]


@dataclass(frozen=True)
class SiteTable:
    """Sites in the order of the forward pass; prints as a table with one line per kind.

    Args:
        sites: the sites.
        rows: for each, its name, short name, shape and definition.
        family: the model's family.
    """

    sites: tuple[Site, ...]
    rows: tuple[dict[str, Any], ...]
    family: str

    @staticmethod
    def of(atlas: Atlas, pattern: str = "*") -> "SiteTable":
        """Return the table of the sites that match a glob.

        Raises:
            SiteError: none does.
        """
        found = atlas.sites() if pattern == "*" else atlas.expand(pattern)
        if not found:
            raise SiteError(f"{pattern!r} matches no site of this {atlas.map.family} model")
        rows = tuple(
            {
                "site": s.name,
                "short": s.short,
                "shape": list(atlas.shape(s)),
                "axes": list(s.axes),
                "edit": not atlas.point(s).read_only,
                "definition": s.definition,
            }
            for s in found
        )
        return SiteTable(tuple(found), rows, atlas.map.family)

    def to_frame(self) -> "pd.DataFrame":
        """Return a pandas table, one row per site."""
        import pandas as pd

        return pd.DataFrame(list(self.rows))

    def __len__(self) -> int:
        return len(self.sites)

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self.sites)

    def __str__(self) -> str:
        kinds: dict[str, list[int]] = {}
        first: dict[str, dict[str, Any]] = {}
        for site, row in zip(self.sites, self.rows, strict=True):
            first.setdefault(site.kind, row)
            if site.layer is not None:
                kinds.setdefault(site.kind, []).append(site.layer)
        lines = []
        for kind, row in first.items():
            layers = kinds.get(kind)
            name = (
                row["site"]
                if layers is None
                else row["site"].replace(f"blocks.{layers[0]}.", f"blocks.{_span(layers)}.")
            )
            shape = " ".join(map(str, row["shape"]))
            lines.append((name, f"[{shape}]", row["definition"] + ("" if row["edit"] else " (read only)")))
        widths = [max(len(line[i]) for line in lines) for i in (0, 1)]
        return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in lines)

    __repr__ = __str__


def _span(layers: list[int]) -> str:
    whole = layers == list(range(layers[0], layers[-1] + 1))
    if len(layers) == 1:
        return str(layers[0])
    return f"{{{layers[0]}..{layers[-1]}}}" if whole else "{" + ",".join(map(str, layers)) + "}"
