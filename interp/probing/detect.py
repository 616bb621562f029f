"""`detect` reads a concept out of activations; `transfer` says which data a probe's concept goes over to."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.classify import METRICS, classify_metrics, group_draws, group_intervals
from interp.core.direction import Direction
from interp.core.errors import ConfigError, DataError, ModelError, ShapeError, SiteError, nearest
from interp.core.manager import HookManager
from interp.core.result import Provenance, Result
from interp.core.site import Site
from interp.core.where import Where
from interp.data.concept_tokens import ConceptTokens
from interp.data.contrast import Contrast
from interp.data.gather import gather
from interp.data.pairs import PromptPairs
from interp.data.same_text import row_keys
from interp.probing.examples import as_tokens
from interp.probing.result import ProbeResult

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

__all__ = ["Transfer", "detect", "transfer"]


def detect(
    detector: ProbeResult | Direction, x: Float[Tensor, "..."], *, site: str | Site | None = None
) -> Float[Tensor, "..."]:
    """Return how much of a concept activations have: the score of a probe, or the projection on a direction.

    Args:
        detector: a probe (above 0 it says the concept is there) or a direction (along its unit vector, from the origin:
            it has no threshold of its own).
        x: activations [*batch *features] of the site.
        site: by default the detector's only one, or the best of several probes.

    Returns:
        Scores [*batch], or [*batch classes] of a probe of more than two classes, in fp32 on x's device.

    Raises:
        SiteError: the detector has nothing at the site.
        ConfigError: a direction at several sites, and none was given.
        ShapeError: activations of other features.
    """
    bias = torch.zeros(1)
    if isinstance(detector, Direction):
        if site is None and len(detector.sites) > 1:
            raise ConfigError(f"this direction is at several sites ({', '.join(detector.sites[:6])}); give site=…")
        weight = detector.unit(detector.sites[0] if site is None else site)[None]
    else:
        short = detector.best if site is None else Site(site).short
        if short not in detector.weights:
            raise SiteError(f"there is no probe at {short}; there are {', '.join(detector.sites)}")
        weight, bias = detector.weights[short], detector.biases[short]
    features = tuple(weight.shape[1:])
    if tuple(x.shape[-len(features) :]) != features:
        raise ShapeError(f"activations {tuple(x.shape)} do not end in the detector's features {features}")
    flat = x.reshape(*x.shape[: x.ndim - len(features)], -1).float()
    scores = flat @ weight.reshape(len(weight), -1).to(flat).T + bias.to(flat)
    return scores[..., 0] if len(weight) == 1 else scores


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Transfer(Result):
    """How well probes of some data tell the classes of other data.

    Attributes:
        sites: short names, in order.
        probes: names of the probes.
        datasets: names of the data they were tried on.
        values: estimate, lower and upper bound of each of `METRICS`.
        examples: how many examples each dataset was judged by, per probe: none of a text that the probe was fitted on.
        held_out: whether such texts were left out, as they are of a probe's own data.
    """

    title: ClassVar[str] = "Probes on other data"
    sites: list[str]
    probes: list[str]
    datasets: list[str]
    values: Float[Tensor, "site probe dataset metric 3"]
    examples: list[list[int]]
    held_out: list[list[bool]]

    def table(self, metric: str = "auroc", *, site: str | None = None) -> Float[Tensor, "probe dataset"]:
        """Return one metric of every probe on every dataset.

        Args:
            metric: one of `METRICS`.
            site: the last one by default.

        Raises:
            ConfigError: no such metric or site.
        """
        if metric not in METRICS:
            raise ConfigError(
                f"metric={metric!r}: {nearest(metric, METRICS) or 'expected one of ' + ', '.join(METRICS)}"
            )
        at = len(self.sites) - 1 if site is None else self._at(site)
        return self.values[at, :, :, METRICS.index(metric), 0]

    def _at(self, site: str) -> int:
        short = Site(site).short
        if short not in self.sites:
            raise ConfigError(f"nothing was measured at {short}; there are {', '.join(self.sites)}")
        return self.sites.index(short)

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per site, probe, dataset and metric."""
        import pandas as pd

        rows = [
            (site, probe, data, self.held_out[i][j], self.examples[i][j], name, *self.values[s, i, j, m].tolist())
            for s, site in enumerate(self.sites)
            for i, probe in enumerate(self.probes)
            for j, data in enumerate(self.datasets)
            for m, name in enumerate(METRICS)
        ]
        return pd.DataFrame(
            rows, columns=["site", "probe", "dataset", "held_out", "examples", "metric", "value", "low", "high"]
        )

    def plot(self, *, metric: str = "auroc", site: str | None = None) -> "plotly.graph_objects.Figure":
        """Return probes × datasets of one metric at one site, the last by default."""
        figures = importlib.import_module("interp.report.figures")
        values = self.table(metric, site=site)
        text = [[f"{v:.2f}" for v in row] for row in values.tolist()]
        where = self.sites[-1] if site is None else Site(site).short
        return figures.heatmap(
            values,
            rows=figures.Axis("probe of", self.probes),
            columns=figures.Axis("tried on", self.datasets),
            title=f"{self.title}: {where}",
            value=metric.replace("_", " "),
            text=text,
        )

    def summary(self) -> str:
        """Say for each probe how it does at home and elsewhere, at the last site."""
        values, lines = self.table(), [f"AUROC at {self.sites[-1]}"]
        for i, probe in enumerate(self.probes):
            cells = [
                f"{name} {values[i, j]:.2f}" + (" (held out)" if self.held_out[i][j] else "")
                for j, name in enumerate(self.datasets)
            ]
            lines.append(f"{probe} → {', '.join(cells)}")
        return "\n".join(lines)


def transfer(
    hm: HookManager,
    probes: Mapping[str, ProbeResult],
    datasets: Mapping[str, Contrast | ConceptTokens | PromptPairs],
    *,
    where: Where | None = None,
    pool: str = "each",
    n_bootstrap: int = 500,
    seed: int = 0,
    batch_size: int = 32,
) -> Transfer:
    """Try probes of two classes on data that they were not fitted on: does the concept go over, or only the data's own?

    A probe is tried on the texts that it was not fitted on, which are known by their tokens: on all of a dataset, or on
    the test part alone of its own. One pass of the model for each dataset.

    Args:
        hm: the model of the probes.
        probes: name → probes, all of which have some site in common.
        datasets: name → data of two classes; class 1 (positive) is class 1 of every probe.
        where: the token rule of texts, as the probes were fitted with.
        pool: as the probes were fitted with.
        n_bootstrap: resamples of the groups of a dataset.
        seed: of the bootstrap.
        batch_size: rows per forward.

    Returns:
        Every metric of every probe on every dataset at the sites that all probes have.

    Raises:
        DataError: nothing given, more than two classes, no site in common, or a dataset whose every text a probe was
            fitted on.
        ConfigError: a probe that was fitted with another pool.
        ModelError: a probe of another model.

    Source: generalisation across datasets as in Marks and Tegmark (2023, arXiv 2310.06824), §5.
    """
    sites = _common_sites(hm, probes)
    if not datasets:
        raise DataError("no datasets were given to try the probes on")
    for name, probe in probes.items():
        _same_reading(name, probe, pool)
    values = torch.full((len(sites), len(probes), len(datasets), len(METRICS), 3), torch.nan, dtype=torch.float64)
    examples, own = ([[0] * len(datasets) for _ in probes] for _ in range(2))
    for j, (name, data) in enumerate(datasets.items()):
        tokens = as_tokens(hm, data, where)
        if len(tokens.classes) != 2:
            raise DataError(f"{name!r} has the classes {', '.join(tokens.classes)}; choose one with .binary(…)")
        held = gather(hm, tokens, sites, pool=pool, batch_size=batch_size)
        first = next(iter(held.values()))
        group, keys = first.group, row_keys(tokens.tokens)[first.row]
        for i, (fitted, probe) in enumerate(probes.items()):
            kept = ~torch.isin(keys, probe.fitted_on)
            examples[i][j], own[i][j] = int(kept.sum()), int(not bool(kept.all()))
            if not examples[i][j]:
                raise DataError(f"the probe {fitted!r} was fitted on every text of {name!r}; try it on others")
            draws = group_draws(group[kept], n_bootstrap=n_bootstrap, seed=seed)
            for s, site in enumerate(sites):
                scores = detect(probe, held[site].x[kept], site=site)[:, None]
                values[s, i, j] = group_intervals(classify_metrics(scores, held[site].y[kept], weights=draws))
    return Transfer(
        sites=sites,
        probes=list(probes),
        datasets=list(datasets),
        values=values,
        examples=examples,
        held_out=[[bool(cell) for cell in row] for row in own],
        provenance=Provenance.of(hm, settings={"where": repr(where), "pool": pool}, seed=seed),
    )


def _same_reading(name: str, probe: ProbeResult, pool: str) -> None:
    own = probe.provenance.settings.get("pool", pool)
    if own != pool:
        raise ConfigError(f"the probe {name!r} was fitted with pool={own!r}, not pool={pool!r}; give that one")


def _common_sites(hm: HookManager, probes: Mapping[str, ProbeResult]) -> list[str]:
    if not probes:
        raise DataError("no probes were given to try on the data")
    bare = Provenance.of(hm)
    for name, probe in probes.items():
        if len(probe.classes) != 2:
            raise DataError(f"{name!r} has {len(probe.classes)} classes; fit it on data.binary(…)")
        if probe.provenance.config_hash != bare.config_hash or probe.folded != hm.is_folded:
            raise ModelError(
                f"the probe {name!r} is of {probe.provenance.model!r}, not of {hm.name!r}; fit it on this one"
            )
    first, *others = probes.values()
    common = [site for site in first.sites if all(site in other.sites for other in others)]
    if not common:
        raise DataError(f"the probes have no site in common: {[probe.sites[:4] for probe in probes.values()]}")
    return common
