"""`DirectAttribution`: the terms of a logit, per example, with their figures."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.errors import ConfigError, DataError, SiteError, nearest
from interp.core.result import Result
from interp.core.stats import bootstrap, bootstrap_bounds

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

__all__ = ["DirectAttribution"]

_FIGURES = ("bars", "heatmap", "stack", "waterfall")
_UNIT = "logits"


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class DirectAttribution(Result):
    """What each part of a model adds directly to a number that is linear in its logits; the sum is that number.

    Attributes:
        by: How the stream was taken apart.
        target: What was asked about.
        labels: One per term, such as "embed", "3_mlp_out", "L2H1", "L2N77", "L2←5"; last "residue".
            A head's term holds its share of the value bias, which is the same whatever it attends to (`hm.folded()`
            moves it into the bias).
        kinds: "embed", "attn", "mlp", "head", "neuron", "latent", "rest", "token", "sink" (what a head writes that no
            token's value holds), "bias", "skip", "error", "cap" or "residue".
        layers: The block of each term, −1 for none.
        heads: The head, −1 for none.
        sources: The source position in each row's own tokens, −1 for none; zeros stand where a row has fewer tokens.
        values: The terms, in logits.
        total: The model's own number, in logits; each example's terms sum to it.
        sigma: σ of the final norm.
        lengths: Tokens of each example.
        source_names: By "token", the text of each example's tokens; else empty.
        notes: What a reader should know.
    """

    title: ClassVar[str] = "Direct logit attribution"
    by: str
    target: str
    labels: list[str]
    kinds: list[str]
    layers: Int[Tensor, " term"]
    heads: Int[Tensor, " term"]
    sources: Int[Tensor, " term"]
    values: Float[Tensor, "term example"]
    total: Float[Tensor, " example"]
    sigma: Float[Tensor, " example"]
    lengths: Int[Tensor, " example"]
    source_names: list[list[str]]
    notes: list[str]

    def __getitem__(self, label: str) -> Float[Tensor, " example"]:
        """Return one term.

        Raises:
            SiteError: there is none of that label.
        """
        if label not in self.labels:
            hint = nearest(label, self.labels) or f"the labels are {', '.join(self.labels[:8])}, …"
            raise SiteError(f"no term {label!r}; {hint}")
        return self.values[self.labels.index(label)]

    @property
    def mean(self) -> Float[Tensor, " term"]:
        """Each term's mean over the examples."""
        return self.values.mean(1)

    def intervals(self, *, seed: int = 0) -> tuple[Float[Tensor, " term"], Float[Tensor, " term"]]:
        """Return the 95 % bootstrap interval of each mean, every term with the same resamples.

        Args:
            seed: of the resampling.
        """
        low, high = bootstrap_bounds(self.values, seed=seed)
        return low.to(self.values), high.to(self.values)

    def by_head(self) -> Float[Tensor, "layer head"]:
        """Return the mean of every head's terms, by layer and head.

        Raises:
            DataError: the heads were not told apart.
        """
        known = self.heads >= 0
        if not known.any():
            raise DataError(f"by={self.by!r} does not tell heads apart; attribute by='head'")
        grid = torch.zeros(int(self.layers.max()) + 1, int(self.heads.max()) + 1)
        return grid.index_put((self.layers[known], self.heads[known]), self.mean[known].to(grid), accumulate=True)

    def by_source(self, *, row: int = 0) -> Float[Tensor, "layer src"]:
        """Return one example's terms by layer and source position, summed over heads.

        Args:
            row: which example.

        Raises:
            DataError: the source tokens were not told apart, or there is no such example.
        """
        known = self.sources >= 0
        if not known.any():
            raise DataError(f"by={self.by!r} does not tell source tokens apart; attribute by='token'")
        self._check_row(row)
        grid = torch.zeros(int(self.layers.max()) + 1, int(self.sources.max()) + 1)
        values = self.values[known, row].to(grid)
        return grid.index_put((self.layers[known], self.sources[known]), values, accumulate=True)

    def accumulated(self) -> tuple[list[str], Float[Tensor, "place example"]]:
        """Return the number read off the stream at each place through the final norm's σ, and the places' names.

        Each value is the sum of the constants and of all terms that come before; the step from one to the next is a
        term. The last is the number before the soft-cap.

        Raises:
            DataError: the terms are not whole components.
        """
        if self.by != "component":
            raise DataError(f"the stream is accumulated over components, not by {self.by!r}; use by='component'")
        constant = torch.tensor([kind == "bias" for kind in self.kinds])
        parts = [i for i, kind in enumerate(self.kinds) if kind in ("embed", "attn", "mlp")]
        sums = self.values[constant].sum(0) + self.values[parts].cumsum(0)
        return [self.labels[i] for i in parts], sums

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per term and example."""
        import pandas as pd

        n = self.values.shape[1]
        places = {"layer": self.layers, "head": self.heads, "source": self.sources}
        columns: dict[str, Any] = {
            "term": [label for label in self.labels for _ in range(n)],
            "kind": [kind for kind in self.kinds for _ in range(n)],
        }
        columns |= {name: place.repeat_interleave(n).tolist() for name, place in places.items()}
        columns |= {"example": list(range(n)) * len(self.labels), "value": self.values.flatten().tolist()}
        frame = pd.DataFrame(columns)
        for name in places:
            frame[name] = frame[name].astype("Int64").mask(frame[name] < 0)
        return frame

    def plot(self, kind: str | None = None, *, top: int = 24, row: int | None = None) -> "plotly.graph_objects.Figure":
        """Draw the terms.

        Args:
            kind: "bars" (the largest terms, with their intervals), "heatmap" (layer × head, or layer × source token),
                "stack" (the number along the stream, with each step), "waterfall" (all components as steps to the
                sum). By default the heat map where there is one, else the bars.
            top: Terms shown; the others are summed up.
            row: One example; by default the mean, and by "token" example 0.

        Raises:
            ConfigError: An unknown kind.
            DataError: The terms do not give that figure.
        """
        if kind is not None and kind not in _FIGURES:
            raise ConfigError(f"plot({kind!r}): {nearest(kind, _FIGURES) or 'expected one of ' + ', '.join(_FIGURES)}")
        if row is not None:
            self._check_row(row)
        chosen = kind or ("heatmap" if self.by in ("head", "token") else "bars")
        if chosen == "heatmap":
            return self._heatmap(row)
        return self._stack(row) if chosen == "stack" else self._steps(chosen, top, row)

    def _steps(self, kind: str, top: int, row: int | None) -> "plotly.graph_objects.Figure":
        from interp.report.attribution import contributions, waterfall
        from interp.report.figures import Axis

        values = self.mean if row is None else self.values[:, row]
        shown = values.abs().topk(min(top, len(values))).indices.sort().values
        labels = [self.labels[i] for i in shown.tolist()]
        rest = (values.sum() - values[shown].sum())[None]
        other = [f"{len(values) - len(shown)} others"] if len(shown) < len(values) else []
        heights = torch.cat([values[shown], rest]) if other else values[shown]
        heading = f"{self.target}: {self._of(row)}"
        if kind == "waterfall":
            return waterfall(heights, labels=Axis("", labels + other), title=heading, value=_UNIT, total="sum")
        bounds = None
        if row is None and self.values.shape[1] > 1:
            low, high = self.intervals()
            pad = rest if other else rest[:0]
            bounds = torch.cat([low[shown], pad]), torch.cat([high[shown], pad])
        return contributions(heights, labels=Axis("", labels + other), title=heading, value=_UNIT, bounds=bounds)

    def _heatmap(self, row: int | None) -> "plotly.graph_objects.Figure":
        from interp.report.figures import Axis, heatmap

        if self.by == "token":
            grid = self.by_source(row=row or 0)[:, : int(self.lengths[row or 0])]
            columns = Axis("source token", self.source_names[row or 0])
            title = f"{self.target}, example {row or 0}: what each token gives through attention"
        elif row is not None:
            grid = torch.zeros_like(self.by_head())
            known = self.heads >= 0
            grid = grid.index_put((self.layers[known], self.heads[known]), self.values[known, row], accumulate=True)
            columns, title = Axis("head"), f"{self.target}: {self._of(row)}"
        else:
            grid, columns, title = self.by_head(), Axis("head"), f"{self.target}: {self._of(None)}"
        layers = Axis("layer", [str(i) for i in range(len(grid))])
        return heatmap(grid, rows=layers, columns=columns, title=title, value=_UNIT, diverging=True)

    def _stack(self, row: int | None) -> "plotly.graph_objects.Figure":
        from interp.report.attribution import stack
        from interp.report.figures import Axis

        places, sums = self.accumulated()
        steps = torch.stack([self[label] for label in places])
        bounds = None
        if row is None and sums.shape[1] > 1:
            low, high = bootstrap_bounds(sums)
            bounds = low, high
        mean, step = (sums.mean(1), steps.mean(1)) if row is None else (sums[:, row], steps[:, row])
        title = f"{self.target} along the stream: {self._of(row)}"
        return stack(mean, step, labels=Axis("read after", places), title=title, value=_UNIT, bounds=bounds)

    def _of(self, row: int | None) -> str:
        n = len(self.total)
        if row is not None or n == 1:
            return f"example {row or 0}, {float(self.total[row or 0]):+.3f} in all"
        return f"mean of {n} examples, {float(self.total.mean()):+.3f} in all"

    def _check_row(self, row: int) -> None:
        if not 0 <= row < len(self.total):
            raise DataError(f"row={row}: the result has examples 0 … {len(self.total) - 1}")

    def summary(self) -> str:
        """Give the number, the largest terms and what rounding left."""
        mean, n = self.mean, len(self.total)
        head = f"{self.target}: {bootstrap(self.total) if n > 1 else f'{float(self.total[0]):.4g}'} ({n} examples)"
        largest = mean.abs().topk(min(6, len(mean))).indices.tolist()
        lines = [f"{self.labels[i]}: {float(mean[i]):+.4g}" for i in largest]
        lines.append(f"{len(mean)} terms; rounding leaves at most {float(self['residue'].abs().max()):.1e}")
        return "\n".join([head, *lines, *self.notes])
