"""`AttributionResult`: estimated effects of patching nodes, per unit, position, span and example."""

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.errors import DataError, SiteError, nearest
from interp.core.result import Result
from interp.core.site import KINDS, Site
from interp.core.stats import pearson, spearman
from interp.patching.result import PatchResult

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

__all__ = ["AttributionResult"]

_MOST_BARS = 40


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class AttributionResult(Result):
    """What patching each node is estimated to do to a metric.

    A node is a unit of a place: a head, a neuron, a latent, or the whole place where it has one unit. Places are named
    by their sites ("3.z", "3.mlp_out"), latents' places with "+latents", their error terms with "+error".

    Attributes:
        method: How it was made, such as "relp, denoise".
        value: What a score is, with its unit.
        totals: Place → sums over positions, per example.
        positions: Place → means over examples, per column of the padded batch.
        spans: Span → place → means over examples of the sum over the span's positions.
    """

    title: ClassVar[str] = "Attribution"
    method: str
    value: str
    totals: dict[str, Float[Tensor, "unit example"]]
    positions: dict[str, Float[Tensor, "unit pos"]]
    spans: dict[str, dict[str, Float[Tensor, " unit"]]]

    @property
    def places(self) -> list[str]:
        """The places, in the order asked."""
        return list(self.totals)

    @property
    def names(self) -> list[str]:
        """The nodes: "3.z[1]" for a unit of several, "3.mlp_out" for a whole place."""
        return [name for place, units in self.totals.items() for name in _names(place, len(units))]

    @property
    def scores(self) -> Float[Tensor, " node"]:
        """The mean over examples of every node, in the order of `names`."""
        return torch.cat([values.mean(1) for values in self.totals.values()])

    def score(self, name: str) -> float:
        """Return the score of one node.

        Raises:
            SiteError: there is none of that name.
        """
        names = self.names
        if name not in names:
            raise SiteError(f"no node {name!r}; {nearest(name, names) or 'they are ' + ', '.join(names[:6]) + ', …'}")
        return float(self.scores[names.index(name)])

    def of(self, kind: str) -> Float[Tensor, "layer unit"]:
        """Return the scores of one kind of site in layer order, such as `of("z")` [layer head].

        Raises:
            SiteError: nothing of that kind, or layers with different numbers of units.
        """
        found = [values.mean(1) for place, values in self.totals.items() if place.partition(".")[2] == kind]
        if not found or len({len(values) for values in found}) > 1:
            kinds = sorted({place.partition(".")[2] for place in self.places})
            raise SiteError(f"no single grid of {kind!r} here; the kinds are {', '.join(kinds)}")
        return torch.stack(found)

    def top(self, n: int, *, signed: bool = False) -> list[tuple[str, float]]:
        """Return the strongest nodes and their scores, the strongest first.

        Args:
            n: how many.
            signed: by the score itself instead of its size.

        Raises:
            DataError: more than there are.
        """
        scores = self.scores
        if type(n) is not int or not 0 <= n <= len(scores):
            raise DataError(f"n={n!r}: expected a whole number from 0 to {len(scores)}, the nodes of this result")
        order = (scores if signed else scores.abs()).argsort(descending=True, stable=True)[:n].tolist()
        names = self.names
        return [(names[i], float(scores[i])) for i in order]

    def beside(self, exact: PatchResult) -> tuple[Float[Tensor, " node"], Float[Tensor, " node"]]:
        """Return estimates and exact mean effects of the nodes that both have.

        Args:
            exact: patches of the same pairs: head by head over all positions, or position by position.

        Warns:
            that one estimates the corrupted run mended and the other patches the clean one, or the other way round.

        Raises:
            SiteError: they have no place in common.
        """
        mode = self.method.rpartition(", ")[2]
        swept = "noise" if exact.mode == "noise" else "denoise"
        if mode in ("denoise", "noise") and mode != swept:
            warnings.warn(
                f"these are estimates of mode {mode!r} and patches of mode {swept!r}, which differ by more than the "
                f"estimate's error; estimate with mode={swept!r}, or patch with PatchOptions(mode={mode!r})",
                stacklevel=3,
            )
        mean, estimates, effects = exact.effect.mean(-1), [], []
        for row, site in enumerate(exact.sites):
            if site not in self.totals:
                continue
            mine = self.totals[site].mean(1) if exact.axis == "head" else self.positions[site][0]
            if mine.shape != mean[row].shape:
                raise SiteError(f"{site} was patched at {len(mean[row])} places and is estimated at {len(mine)}")
            estimates.append(mine)
            effects.append(mean[row])
        if not estimates:
            raise SiteError(f"nothing in common: patched {exact.sites[:4]}, estimated {self.places[:4]}")
        return torch.cat(estimates), torch.cat(effects)

    def agreement(self, exact: PatchResult) -> tuple[float, float]:
        """Return Pearson's and Spearman's correlation of the estimates with exact effects; `exact` as for `beside`."""
        estimates, effects = self.beside(exact)
        return pearson(estimates, effects), spearman(estimates, effects)

    def scatter(self, exact: PatchResult) -> "plotly.graph_objects.Figure":
        """Draw estimates against exact effects; `exact` as for `beside`."""
        from interp.report.scatter import scatter

        estimates, effects = self.beside(exact)
        r, rho = pearson(estimates, effects), spearman(estimates, effects)
        names = [
            name
            for site in exact.sites
            if site in self.totals
            for name in (
                _names(site, len(self.totals[site]))
                if exact.axis == "head"
                else [f"{site}, {column}" for column in exact.columns]
            )
        ]
        title = f"{self.method}: r = {r:.3f}, ρ = {rho:.3f}"
        return scatter(effects, estimates, names=names, x="exact effect", y="estimate", title=title)

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per node: mean over examples, its standard error, and the span sums."""
        import pandas as pd

        parts = []
        for place, values in self.totals.items():
            n = values.shape[1]
            error = values.std(1) / n**0.5 if n > 1 else torch.full((len(values),), torch.nan)
            table = pd.DataFrame({"node": _names(place, len(values)), "place": place, "unit": range(len(values))})
            table["score"], table["standard_error"] = values.mean(1).numpy(), error.numpy()
            for span, found in self.spans.items():
                table[f"span {span}"] = found[place].numpy()
            parts.append(table)
        return pd.concat(parts, ignore_index=True)

    def plot(self) -> "plotly.graph_objects.Figure":
        """Draw layers × heads where the places are heads of every layer, positions where they are whole, else bars."""
        from interp.report.figures import Axis, bars, heatmap

        title = f"Attribution ({self.method})"
        units = {len(values) for values in self.totals.values()}
        kinds = {place.partition(".")[2] for place in self.places}
        if len(units) == 1 and len(kinds) == 1 and units != {1} and _is_headed(next(iter(kinds))):
            grid, axis = self.of(next(iter(kinds))), Axis("head")
        elif units == {1}:
            grid, axis = torch.cat(list(self.positions.values())), Axis("position")
        else:
            best = self.top(min(_MOST_BARS, len(self.scores)))
            values = torch.tensor([score for _, score in best])
            return bars(values, labels=Axis("", [name for name, _ in best]), title=title, value=self.value)
        return heatmap(grid, rows=Axis("", self.places), columns=axis, title=title, value=self.value, diverging=True)

    def summary(self) -> str:
        """Say what was estimated and give the strongest nodes."""
        n = next(iter(self.totals.values())).shape[1]
        lines = [f"{self.method}: {self.value}, {len(self.scores)} nodes, {n} examples"]
        lines += [f"{name}: {score:+.4g}" for name, score in self.top(min(5, len(self.scores)))]
        return "\n".join(lines)


def _names(place: str, units: int) -> list[str]:
    return [place] if units == 1 else [f"{place}[{unit}]" for unit in range(units)]


def _is_headed(kind: str) -> bool:
    return kind in KINDS and any(axis in ("n_heads", "n_kv_heads") for axis in Site(f"0.{kind}").axes)
