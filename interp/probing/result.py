"""`ProbeResult`: linear probes at several sites, how good they are on held-out groups, and beside which controls."""

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from interp.core.classify import METRICS
from interp.core.direction import Direction, SiteScale
from interp.core.errors import ConfigError, DataError, SiteError, nearest
from interp.core.result import Result
from interp.core.site import Site
from interp.core.stats import Estimate
from interp.probing.examples import TASKS

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

__all__ = ["ProbeResult"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class ProbeResult(Result):
    """Linear probes of one concept, one at each site.

    Every figure is of the test part, whose groups neither the weights nor the penalty saw; intervals are of 95 %, from
    a bootstrap over its groups.

    Attributes:
        name: of the concept.
        kind: how the probes were fitted.
        sites: short names, in order.
        classes: names of the codes.
        values: estimate, lower and upper bound of each of `METRICS` for each of `TASKS`; NaN where a control could not
            be made.
        selectivity: accuracy minus that of the control task, with its interval.
        validation: AUROC on the validation part, by which `best` is chosen.
        majority: accuracy on the test part of always saying the most frequent class of the fit.
        weights: site → weights, [score *features]: one score for two classes, else one for each class.
        biases: site → [score].
        penalties: the penalty that was chosen: [site task].
        scales: site → figures of `SiteScale`, [score 5].
        sizes: examples to fit on, to choose on, to test on; and groups of the test.
        test_groups: numbers of the groups of the test.
        fitted_on: `row_keys` of the texts that the weights saw.
        folded: whether the model was a folded copy.
        read_at: which tokens were read, in words.
        notes: what a reader should know.
    """

    title: ClassVar[str] = "Linear probes"
    name: str
    kind: str
    sites: list[str]
    classes: tuple[str, ...]
    values: Float[Tensor, "site task metric 3"]
    selectivity: Float[Tensor, "site 3"]
    validation: Float[Tensor, " site"]
    majority: float
    weights: dict[str, Tensor]
    biases: dict[str, Tensor]
    penalties: Float[Tensor, "site task"]
    scales: dict[str, Tensor]
    sizes: tuple[int, int, int, int]
    test_groups: Int[Tensor, " group"]
    fitted_on: Int[Tensor, " text"]
    folded: bool
    read_at: str
    notes: list[str]

    @property
    def best(self) -> str:
        """The site that is best on the validation part: the test part may then say how good it is."""
        return self.sites[int(self.validation.nan_to_num(-1.0).argmax())]

    def get(self, metric: str = "auroc", *, site: str | Site | None = None, task: str = "probe") -> Estimate:
        """Return one figure with its interval.

        Args:
            metric: one of `METRICS`, or "selectivity".
            site: the best one by default.
            task: one of `TASKS`.

        Raises:
            ConfigError: no such metric or task.
            SiteError: no such site.
        """
        at = self._at(site)
        if metric == "selectivity":
            return Estimate(*self.selectivity[at].tolist())
        for given, known in ((metric, METRICS), (task, TASKS)):
            if given not in known:
                raise ConfigError(f"{given!r}: {nearest(given, known) or 'expected one of ' + ', '.join(known)}")
        return Estimate(*self.values[at, TASKS.index(task), METRICS.index(metric)].tolist())

    def direction(self, of: str | None = None) -> Direction:
        """Return what the probes read as a direction that can steer, with its dose in units of the fit's examples.

        What reads a concept best need not be what writes it: the weights of lda and mass_mean turn away from what else
        varies, and the difference of means does not.

        Args:
            of: the class that the direction points to; needed where there are more than two.

        Raises:
            DataError: a class that is not there, or none given where it is needed.
            ShapeError: a probe whose weights are all zero.
        """
        row, sign = self._row(of)
        vectors = {site: sign * self.weights[site][row] for site in self.sites}
        stats = {
            site: {name: float(self.values[i, 0, j, 0]) for j, name in enumerate(METRICS)}
            | {"selectivity": float(self.selectivity[i, 0])}
            for i, site in enumerate(self.sites)
        }
        return Direction(
            vectors=vectors,
            method=f"probe: {self.kind}",
            model=self.provenance,
            read_at=self.read_at,
            scale={site: _turned(SiteScale(*self.scales[site][row].tolist()), sign) for site in self.sites},
            stats=stats,
            name=self.name if of is None else f"{self.name} = {of}",
            folded=self.folded,
            notes=tuple(self.notes),
        )

    def _row(self, of: str | None) -> tuple[int, float]:
        if of is not None and of not in self.classes:
            raise DataError(f"there is no class {of!r}; there are {', '.join(self.classes)}")
        if len(self.classes) == 2:
            return 0, -1.0 if of == self.classes[0] else 1.0
        if of is None:
            raise DataError(f"of which class? Give one of {', '.join(self.classes)}")
        return self.classes.index(of), 1.0

    def _at(self, site: str | Site | None) -> int:
        short = self.best if site is None else Site(site).short
        if short not in self.sites:
            raise SiteError(f"there is no probe at {short}; there are {', '.join(self.sites)}")
        return self.sites.index(short)

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per site, task and metric."""
        import pandas as pd

        rows = [
            (site, task, metric, *self.values[i, j, k].tolist())
            for i, site in enumerate(self.sites)
            for j, task in enumerate(TASKS)
            for k, metric in enumerate(METRICS)
        ]
        rows += [(site, "probe", "selectivity", *self.selectivity[i].tolist()) for i, site in enumerate(self.sites)]
        return pd.DataFrame(rows, columns=["site", "task", "metric", "value", "low", "high"])

    def plot(self, *, metric: str = "accuracy") -> "plotly.graph_objects.Figure":
        """Return one metric over the sites, the controls beside it; dotted is what needs no probe.

        Args:
            metric: one of `METRICS`.

        Raises:
            ConfigError: no such metric.
        """
        if metric not in METRICS:
            raise ConfigError(
                f"metric={metric!r}: {nearest(metric, METRICS) or 'expected one of ' + ', '.join(METRICS)}"
            )
        figures, bands = (importlib.import_module(f"interp.report.{name}") for name in ("figures", "bands"))
        shown = {task: self.values[:, i, METRICS.index(metric)] for i, task in enumerate(TASKS)}
        floor = {"accuracy": self.majority, "balanced_accuracy": 1 / len(self.classes), "auroc": 0.5, "mcc": 0.0}
        return bands.band_lines(
            {task: held for task, held in shown.items() if not bool(held[:, 0].isnan().all())},
            x=figures.Axis("site", self.sites),
            title=f"{self.name}: {self.kind} probes",
            value=metric.upper() if metric in ("auroc", "mcc") else metric.replace("_", " "),
            reference=floor.get(metric),
            reference_is="always the most frequent class" if metric == "accuracy" else "chance",
        )

    def summary(self) -> str:
        """Say how good the best probe is, and beside it the controls."""
        site = self.best
        fit, chosen, test, groups = self.sizes
        shown = ", ".join(self.classes[:8]) + (", …" if len(self.classes) > 8 else "")
        figures = ", ".join(
            f"{said} {self.get(metric, site=site)}"
            for said, metric in (("accuracy", "accuracy"), ("AUROC", "auroc"), ("MCC", "mcc"))
        )
        lines = [
            f"{self.name} ({shown}): {self.kind} probes at {len(self.sites)} sites; fitted on {fit:,} examples, chosen "
            f"on {chosen:,}, tested on {test:,} in {groups:,} groups",
            f"{site}, the best on the validation part: {figures}; always the most frequent class: accuracy "
            f"{self.majority:.4g}",
            f"controls: accuracy on the control task {self.get('accuracy', site=site, task='control')}, selectivity "
            f"{self.get('selectivity', site=site)}; AUROC of shuffled labels "
            f"{self.get('auroc', site=site, task='shuffled')}",
        ]
        return "\n".join([*lines, *self.notes])


def _turned(scale: SiteScale, sign: float) -> SiteScale:
    """The same seen along the opposite direction; how far it goes there was not kept."""
    if sign > 0:
        return scale
    return SiteScale(scale.rms, scale.sigma, -scale.negative, -scale.positive)
