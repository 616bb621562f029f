"""`SparseProbes`: which few units tell a class at each site, and how well, as a curve over their number."""

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from jaxtyping import Float
from torch import Tensor

from interp.core.classify import METRICS
from interp.core.errors import ConfigError, SiteError, nearest
from interp.core.result import Result
from interp.core.site import Site
from interp.core.stats import Estimate
from interp.probing.examples import TASKS

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

__all__ = ["SparseProbes"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class SparseProbes(Result):
    """Probes on few units at several sites; figures are of groups that neither the choice nor the weights saw.

    Attributes:
        name: of the concept.
        classes: names of the two codes; the second is what is looked for.
        ranking: how units were ranked.
        search: how sets were chosen.
        kind: "unit" (an entry of the site's features, such as a neuron) or "latent".
        sites: short names, in order.
        k: numbers of units, ascending.
        units: site → chosen units, [k most], −1 where there are fewer.
        weights: site → weight of each in units of its activation, [k most].
        biases: site → bias, [k].
        values: estimate, lower and upper bound of each of `METRICS` for each of `TASKS`.
        selectivity: accuracy minus that of the control task, with its interval.
        validation: AUROC on the validation part, by which `best` is chosen.
        stability: mean share of units that choices on random halves of the groups have in common; NaN for none.
        alone: site → the best-ranked units.
        rank_scores: site → their scores in the ranking.
        alone_values: site → each of `METRICS` of a probe on that unit alone, [unit metric 3].
        pruned: site → `METRICS` of the smallest k when the best units, the next best, … are gone, [round metric 3];
            round 0 is with all. A fall at once says few units hold the concept, a slow one that many do.
        n_units: units of each site.
        n_dead: of them, those that never change on the examples of the choice.
        majority: accuracy of always saying the most frequent class of the fit.
        sizes: examples to choose on, to validate on, to test on; and groups of the test.
        notes: what a reader should know.
    """

    title: ClassVar[str] = "Sparse probes"
    name: str
    classes: tuple[str, ...]
    ranking: str
    search: str
    kind: str
    sites: list[str]
    k: list[int]
    units: dict[str, Tensor]
    weights: dict[str, Tensor]
    biases: dict[str, Tensor]
    values: Float[Tensor, "site k task metric 3"]
    selectivity: Float[Tensor, "site k 3"]
    validation: Float[Tensor, "site k"]
    stability: Float[Tensor, "site k"]
    alone: dict[str, Tensor]
    rank_scores: dict[str, Tensor]
    alone_values: dict[str, Tensor]
    pruned: dict[str, Tensor]
    n_units: list[int]
    n_dead: list[int]
    majority: float
    sizes: tuple[int, int, int, int]
    notes: list[str]

    def best(self, k: int | None = None) -> str:
        """Return the site whose k units are best on the validation part.

        Args:
            k: the smallest by default.

        Raises:
            ConfigError: a number that was not tried.
        """
        return self.sites[int(self.validation[:, self._size(k)].nan_to_num(-1.0).argmax())]

    def chosen(self, k: int | None = None, *, site: str | Site | None = None) -> list[int]:
        """Return the units of one probe.

        Args:
            k: the smallest by default.
            site: the best one by default.

        Raises:
            ConfigError: a number that was not tried.
            SiteError: no such site.
        """
        held = self.units[self.sites[self._at(site, k)]][self._size(k)]
        return sorted(held[held >= 0].tolist())

    def get(
        self, metric: str = "mcc", k: int | None = None, *, site: str | Site | None = None, task: str = "probe"
    ) -> Estimate:
        """Return one figure with its interval.

        Args:
            metric: one of `METRICS`, or "selectivity".
            k: the smallest by default.
            site: the best one by default.
            task: one of `TASKS`.

        Raises:
            ConfigError: no such metric, task or number.
            SiteError: no such site.
        """
        at, size = self._at(site, k), self._size(k)
        if metric == "selectivity":
            return Estimate(*self.selectivity[at, size].tolist())
        for given, known in ((metric, METRICS), (task, TASKS)):
            if given not in known:
                raise ConfigError(f"{given!r}: {nearest(given, known) or 'expected one of ' + ', '.join(known)}")
        return Estimate(*self.values[at, size, TASKS.index(task), METRICS.index(metric)].tolist())

    def _size(self, k: int | None) -> int:
        if k is not None and k not in self.k:
            raise ConfigError(f"k={k} was not tried; there are {', '.join(map(str, self.k))}")
        return 0 if k is None else self.k.index(k)

    def _at(self, site: str | Site | None, k: int | None) -> int:
        short = self.best(k) if site is None else Site(site).short
        if short not in self.sites:
            raise SiteError(f"there is no probe at {short}; there are {', '.join(self.sites)}")
        return self.sites.index(short)

    def neurons(self) -> "pandas.DataFrame":
        """Return the best-ranked units of every site, each probed alone, by their MCC: site, layer, unit, scores."""
        import pandas as pd

        rows = []
        for site in self.sites:
            held = self.units[site]
            for i, unit in enumerate(self.alone[site].tolist()):
                smallest = next((k for k, row in zip(self.k, held, strict=True) if bool((row == unit).any())), None)
                figures = {
                    f"{name}{end}": float(self.alone_values[site][i, METRICS.index(name), j])
                    for name in ("mcc", "f1", "auroc", "average_precision")
                    for j, end in enumerate(("", "_low", "_high"))
                }
                rank = float(self.rank_scores[site][i])
                place = {"site": site, "layer": Site(site).layer, self.kind: unit, "smallest_k": smallest}
                rows.append({**place, self.ranking: rank, **figures})
        return pd.DataFrame(rows).sort_values("mcc", ascending=False, kind="stable", ignore_index=True)

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per site, k, task and metric, and the chosen units."""
        import pandas as pd

        columns = ["site", "k", "task", "metric", "value", "low", "high", "units"]
        rows = []
        for i, site in enumerate(self.sites):
            for j, k in enumerate(self.k):
                names = " ".join(map(str, self.chosen(k, site=site)))
                for t, task in enumerate(TASKS):
                    rows += [
                        (site, k, task, m, *self.values[i, j, t, n].tolist(), names) for n, m in enumerate(METRICS)
                    ]
                rows.append((site, k, "probe", "selectivity", *self.selectivity[i, j].tolist(), names))
                rows.append((site, k, "probe", "stability", float(self.stability[i, j]), None, None, names))
        return pd.DataFrame(rows, columns=columns)

    def plot(self, *, metric: str = "mcc", site: str | Site | None = None) -> "plotly.graph_objects.Figure":
        """Return a metric over the number of units, the controls beside it, at one site (the best by default).

        Args:
            metric: one of `METRICS`.
            site: which.

        Raises:
            ConfigError: no such metric.
        """
        if metric not in METRICS:
            raise ConfigError(
                f"metric={metric!r}: {nearest(metric, METRICS) or 'expected one of ' + ', '.join(METRICS)}"
            )
        figures, bands = (importlib.import_module(f"interp.report.{name}") for name in ("figures", "bands"))
        at = self._at(site, None)
        shown = {task: self.values[at, :, i, METRICS.index(metric)] for i, task in enumerate(TASKS)}
        floor = {"accuracy": self.majority, "balanced_accuracy": 0.5, "auroc": 0.5, "mcc": 0.0}
        return bands.band_lines(
            {task: held for task, held in shown.items() if not bool(held[..., 0].isnan().all())},
            x=figures.Axis(f"{self.kind}s", [str(k) for k in self.k]),
            title=f"{self.name}: probes on few {self.kind}s of {self.sites[at]}",
            value=metric.upper() if metric in ("auroc", "mcc") else metric.replace("_", " "),
            reference=floor.get(metric),
            reference_is="always the most frequent class" if metric == "accuracy" else "chance",
        )

    def summary(self) -> str:
        """Say for each k where and with which units it is best, and beside it the controls."""
        fit, chosen, test, groups = self.sizes
        lines = [
            f"{self.name} = {self.classes[1]}: probes on few {self.kind}s of {len(self.sites)} sites",
            f"ranked by {self.ranking.replace('_', ' ')}, search: {self.search}",
            f"chosen on {fit:,} examples, validated on {chosen:,}, tested on {test:,} in {groups:,} groups; "
            f"{sum(self.n_dead):,} of {sum(self.n_units):,} {self.kind}s never change",
        ]
        for k in self.k:
            site = self.best(k)
            units = self.chosen(k, site=site)
            names = ", ".join(map(str, units[:8])) + (", …" if len(units) > 8 else "")
            control = self.get("mcc", k, site=site, task="control")
            same = float(self.stability[self._at(site, k), self._size(k)])
            lines.append(
                f"k = {k}, {site} ({names}): MCC {self.get('mcc', k, site=site)}, AUROC "
                f"{self.get('auroc', k, site=site)}; control task MCC {control}, selectivity "
                f"{self.get('selectivity', k, site=site)}; {same:.0%} of the choice comes again on other halves"
            )
        return "\n".join([*lines, *self.notes])
