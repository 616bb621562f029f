"""Activation transport: maps that take the activations of one set of texts to those of another, feature by feature."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from interp.core.direction import Dose
from interp.core.errors import ConfigError, DataError, ModelError, SiteError
from interp.core.intervention import Intervention
from interp.core.manager import HookManager
from interp.core.result import Provenance, Result
from interp.core.site import Site
from interp.core.where import Where
from interp.core.within import AffineWithin
from interp.data.concept_tokens import ConceptTokens
from interp.data.contrast import Contrast
from interp.data.gather import Gathered, gather
from interp.data.pairs import PromptPairs
from interp.steering.fitting.fit import concept_tokens
from interp.steering.trained.maps import fit_maps, gap

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

__all__ = ["Transport", "fit_transport"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Transport(Result):
    """One affine map a feature at each of some sites: x ← x + λ (factor · x + shift − x) inside the support.

    Attributes:
        kind: One of `interp.steering.trained.maps.KINDS`.
        incremental: Whether each site was fitted under the maps of the sites before it.
        factor: Short site name → what each feature is multiplied by [*features].
        shift: The same, what is added, in units of the activation.
        low: Smallest activations that are mapped; no entry where there is no bound.
        high: Largest ones.
        before: How far source and target were apart at each site when its map was fitted: √(Σ W₂² / Σ var target)
            over the features, 0 where they agree.
        after: The same, once the map has acted on the source.
        examples: Source and target examples of the fit.
        name: What the concept is called.
        folded: Whether it was fitted on a folded copy of the model.
        notes: What a user should know.
    """

    title: ClassVar[str] = "Activation transport"
    dose_per_row: ClassVar[bool] = True
    kind: str
    incremental: bool
    factor: dict[str, Tensor]
    shift: dict[str, Tensor]
    low: dict[str, Tensor]
    high: dict[str, Tensor]
    before: dict[str, float]
    after: dict[str, float]
    examples: tuple[int, int]
    name: str = "concept"
    folded: bool = False
    notes: tuple[str, ...] = ()

    @property
    def sites(self) -> list[str]:
        """Short names of its sites, in the order of the forward pass."""
        return list(self.factor)

    def as_interventions(self, dose: float | Tensor | Dose = 1.0, *, where: Where | None = None) -> list[Intervention]:
        """Return the edits that carry activations to the target by a share, one per site.

        Args:
            dose: the strength λ: 0 leaves the model as it is, 1 is the whole map; one per row [batch] steers each row
                by its own. Beyond 1 the maps are extrapolated, which is warned of.
            where: the positions; every non-pad position by default, as in the fit.

        Raises:
            ConfigError: a unit other than raw; a map has none of the others.
        """
        given = Dose.of(dose)
        if given.unit != "raw":
            raise ConfigError(f"unit={given.unit!r}: a map takes a share from 0 to 1; give a plain number")
        ends = [float(v) for v in torch.as_tensor(given.value, dtype=torch.float64).aminmax()]
        if not 0 <= ends[0] <= ends[1] <= 1:
            warnings.warn(
                f"strength {given.value} is outside 0 … 1: the maps of {self.name!r} are extrapolated", stacklevel=2
            )
        place = Where() if where is None else where
        return [
            AffineWithin(
                site, v, self.shift[site], self.low.get(site), self.high.get(site), strength=given.value, where=place
            )
            for site, v in self.factor.items()
        ]

    def at(self, sites: Sequence[Site | str] | Site | str) -> "Transport":
        """Return the maps of some of the sites alone.

        Raises:
            SiteError: a site that it has no map at.
        """
        shorts = [Site(s).short for s in ([sites] if isinstance(sites, str | Site) else sites)]
        missing = [s for s in shorts if s not in self.factor]
        if missing or not shorts:
            raise SiteError(f"no map at {', '.join(missing) or 'no site'}; there are maps at {', '.join(self.sites)}")
        # In the order of the forward, whatever the order asked.
        held: dict[str, Any] = {n: {s: v for s, v in getattr(self, n).items() if s in shorts} for n in _BY_SITE}
        return replace(self, **held)

    def check(self, hm: HookManager) -> None:
        """Refuse a model that these maps do not belong to.

        Raises:
            ModelError: another configuration, or a folded copy where they were fitted on the raw model.
            SiteError: sites that the model lacks.
        """
        for site in self.factor:
            hm.atlas.point(Site(site))
        own, given = self.provenance.config_hash, Provenance.of(hm).config_hash
        if own != given or self.folded != hm.is_folded:
            kinds = ["folded" if f else "raw" for f in (self.folded, hm.is_folded)]
            raise ModelError(
                f"these maps were fitted on {self.provenance.model!r} ({kinds[0]}, config {own}), not on {hm.name!r} "
                f"({kinds[1]}, config {given}); fit them on it"
            )

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per site."""
        import pandas as pd

        rows = [
            {
                "site": site,
                "features": factor.numel(),
                "before": self.before[site],
                "after": self.after[site],
                "mean factor": float(factor.mean()),
                "rms shift": float(self.shift[site].square().mean().sqrt()),
                "left alone": int(((factor == 1) & (self.shift[site] == 0)).sum()),
            }
            for site, factor in self.factor.items()
        ]
        return pd.DataFrame(rows)

    def plot(self) -> "plotly.graph_objects.Figure":
        """Draw how far source and target are apart at each site, before and after its map."""
        from interp.report.figures import Axis, line

        series = {name: torch.tensor(list(getattr(self, name).values())) for name in ("before", "after")}
        return line(
            series,
            x=Axis("site", self.sites),
            title=f"Transport of {self.name} ({self.kind})",
            value="distance of source and target, in standard deviations of the target",
        )

    def summary(self) -> str:
        """Say what was mapped, and how near the source came to the target."""
        n, m = self.examples
        how = "each site under the maps before it" if self.incremental else "all sites at once"
        lines = [
            f"{self.kind} maps of {self.name!r} at {len(self.factor)} sites, {how}; {n} source, {m} target examples"
        ]
        lines += [f"{s}: distance {self.before[s]:.3g} → {self.after[s]:.3g}" for s in self.sites[:8]]
        if len(self.sites) > 8:
            lines.append("…")
        return "\n".join([*lines, *self.notes])


_BY_SITE = ("factor", "shift", "low", "high", "before", "after")


def fit_transport(
    hm: HookManager,
    data: Contrast | ConceptTokens | PromptPairs,
    sites: Sequence[Site | str] | Site | str,
    *,
    kind: str = "linear",
    incremental: bool = True,
    pool: str | None = None,
    support: tuple[float, float] | None = (0.0, 1.0),
    batch_size: int = 32,
) -> Transport:
    """Fit maps that take the activations of negative texts to those of positive ones, feature by feature, site by site.

    Cost: one forward of the target texts, and one of the source texts for each site (one in all where not incremental).
    Memory: 4 · (n_source + n_target) · Σ features bytes on the host, and 32 bytes per number of one site for its fit.

    Args:
        hm: The model.
        data: Source (negative, class 0) and target (positive, class 1) texts, not necessarily as many; `swap()` turns
            them round. A contrast is read at every token that is not special; for another rule give
            `contrast.tokens(hm, where=…)`.
        sites: Names or globs with one vector a token; the authors' are "*.mlp_out", "*.attn_out" and the post-norms.
        kind: "linear", "mean", "gaussian" or "aura"; see `interp.steering.trained.maps.KINDS`.
        incremental: Fit each site under the maps of the sites before it, as they will act; else all sites on the model
            as it is, where each corrects again what those before it have corrected.
        pool: What one example is, as for `gather`; by default a text's mean ("aura": its largest value of a feature).
        support: Quantiles of the source between which a "linear" map acts; None everywhere. The source is pooled, so a
            token's own activation may lie outside where a mean never does: None or pool="each" reach those.
        batch_size: Rows per forward.

    Returns:
        The maps. An interrupted fit returns those of the sites that it had reached, and says so.

    Raises:
        ConfigError: An unknown kind or pool, or quantiles that are no range.
        DataError: Fewer than two examples of a side.
        SiteError: Sites that have no vector a token, or cannot be edited.

    Source: Rodriguez et al. (2025), arXiv 2410.23054, §3 (linear, mean, support, incremental fits); Suau et al. (2024),
    arXiv 2407.12824 (aura). Departures: any numbers of texts (the exact optimal coupling of unequal shares); target
    texts run on the model as it is, where the authors' program runs them under the maps too; constant features are
    left alone; bounds a thousandth wider; fits in double precision.
    """
    fit_maps(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [1.0]]), kind=kind, support=support)  # refuses early
    pooling = pool or ("max" if kind == "aura" else "mean")
    tokens = concept_tokens(hm, data, where=None if isinstance(data, ConceptTokens) else Where())
    places = _places(hm, sites)
    sides = [tokens.take((tokens.labels == code).any(1).nonzero()[:, 0]) for code in (0, 1)]
    reading: dict[str, Any] = {"pool": pooling, "batch_size": batch_size}
    fitted, examples = _fit_sites(hm, sides, places, reading, kind=kind, support=support, incremental=incremental)
    reached = len(fitted["factor"])
    notes = [f"interrupted: {reached} of {len(places)} sites have a map"] if reached < len(places) else []
    settings = {"kind": kind, "incremental": incremental, "pool": pooling, "support": support, "sites": places}
    data_of = (tokens.tokens.ids, tokens.tokens.mask, tokens.labels)
    return Transport(
        provenance=Provenance.of(hm, settings=settings, data=data_of),
        kind=kind,
        incremental=incremental,
        examples=examples,
        name=tokens.name,
        folded=hm.is_folded,
        notes=(*tokens.notes, *notes),
        **fitted,
    )


def _fit_sites(
    hm: HookManager,
    sides: Sequence[ConceptTokens],
    places: Sequence[str],
    reading: Mapping[str, Any],
    *,
    kind: str,
    support: tuple[float, float] | None,
    incremental: bool,
) -> tuple[dict[str, Any], tuple[int, int]]:
    """The maps site by site, by field of `Transport`, and how many examples of either side there were."""
    from tqdm.auto import tqdm

    targets = gather(hm, sides[1], places, **reading)
    sources = None if incremental else gather(hm, sides[0], places, **reading)
    fitted: dict[str, Any] = {name: {} for name in _BY_SITE}
    edits: list[Intervention] = []
    examples = (0, 0)
    try:
        for site in tqdm(places, desc="maps", unit="site", disable=None if len(places) > 1 else True):
            if sources is None:
                source = gather(hm, sides[0], site, write=edits, progress=False, **reading)[site]
            else:
                source = sources[site]
            examples = _fit_site(fitted, site, source, targets[site], kind=kind, support=support)
            bounds = (fitted["low"].get(site), fitted["high"].get(site))
            edits.append(AffineWithin(site, fitted["factor"][site], fitted["shift"][site], *bounds))
    except KeyboardInterrupt:
        if not edits:
            raise
    return fitted, examples


def _fit_site(
    fitted: Mapping[str, dict[str, Any]],
    site: str,
    source: Gathered,
    target: Gathered,
    *,
    kind: str,
    support: tuple[float, float] | None,
) -> tuple[int, int]:
    """Put one site's map beside the others; return how many examples of either side there were."""
    shape = source.x.shape[1:]
    x, y = (held.of_class(code).flatten(1).double() for code, held in enumerate((source, target)))
    if min(len(x), len(y)) < 2:
        raise DataError(f"{len(x)} source and {len(y)} target examples: each side needs two at least")
    maps = fit_maps(x, y, kind=kind, support=support)
    fitted["before"][site], fitted["after"][site] = gap(x, y), gap(maps(x), y)
    for name, value in maps._asdict().items():
        if value is not None:
            fitted[name][site] = value.float().reshape(shape)
    return len(x), len(y)


def _places(hm: HookManager, sites: Sequence[Site | str] | Site | str) -> list[str]:
    """Short names in the order of the forward pass, each once."""
    order = {site.short: n for n, site in enumerate(hm.atlas.sites())}
    found: dict[str, None] = {}
    for given in [sites] if isinstance(sites, str | Site) else sites:
        for site in hm.atlas.expand(given):
            if site.where is not None or site.axes[1] != "pos" or "src" in site.axes:
                raise SiteError(f"{site!r} has no vector of its own for each token; give a site such as '3.mlp_out'")
            point = hm.atlas.point(site)
            if point.read_only:
                raise SiteError(f"{site.short!r} can be read but not edited: {point.read_only}")
            found[site.short] = None
    if not found:
        raise SiteError("no site to fit a map at; give a name or a glob such as '*.mlp_out'")
    return sorted(found, key=lambda s: order[s])
