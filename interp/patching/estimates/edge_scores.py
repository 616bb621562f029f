"""`EdgeScores`: one number per edge of a model's graph, from whatever method."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.core.errors import DataError
from interp.core.result import Result
from interp.patching.graph import Graph

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

__all__ = ["EdgeScores"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class EdgeScores(Result):
    """A score for every edge of a graph.

    Attributes:
        method: How they were made, such as "attribution: plain, denoise".
        value: What a score is, with its unit, such as "change of logit_diff".
        scores: Sum over positions, mean over examples; 0 where there is no edge.
        by_position: The same for each column of the padded batch; None unless asked for.
        sizes: `n_layers`, `n_heads` and `n_kv_heads` of the graph.
        mlps: Which blocks have an MLP.
        parallel: Whether attention and MLP of a block read the same stream.
        examples: How many pairs, or prompts, there were.
    """

    title: ClassVar[str] = "Edge scores"
    method: str
    value: str
    scores: Float[Tensor, "sender receiver"]
    by_position: Float[Tensor, "pos sender receiver"] | None = None
    sizes: tuple[int, int, int]
    mlps: tuple[bool, ...]
    parallel: bool
    examples: int

    @cached_property
    def graph(self) -> Graph:
        """The senders, receivers and edges."""
        return Graph(*self.sizes, self.mlps, self.parallel)

    def edge(self, name: str) -> float:
        """Return the score of one edge, such as "a0.h1->a1.h0<q>".

        Raises:
            SiteError: there is no such edge.
        """
        return float(self.scores[self.graph.edge(name)])

    def top(self, n: int, *, signed: bool = False) -> list[tuple[str, float]]:
        """Return the strongest edges and their scores, the strongest first.

        Args:
            n: how many.
            signed: by the score itself instead of its size.
        """
        rows = self._ranked(n, signed)
        return [(self._name(row, column), float(self.scores[row, column])) for row, column in rows]

    def mask(self, n: int, *, signed: bool = False) -> Bool[Tensor, "sender receiver"]:
        """Return the mask of the strongest edges; arguments as for `top`."""
        found = torch.zeros_like(self.graph.allowed)
        for row, column in self._ranked(n, signed):
            found[row, column] = True
        return found

    def of_senders(self) -> Float[Tensor, " sender"]:
        """Return the sum over each sender's edges: what the sender does through all that read it."""
        return self.scores.sum(1)

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per edge, in the order of the forward pass."""
        import pandas as pd

        row, column = self.graph.allowed.nonzero(as_tuple=True)
        names = [(self.graph.senders[i].name, self.graph.receivers[j].name) for i, j in zip(row, column, strict=True)]
        table = pd.DataFrame(names, columns=["sender", "receiver"])
        table["score"] = self.scores[row, column].double().numpy()
        return table

    def plot(self) -> "plotly.graph_objects.Figure":
        """Draw senders × receivers, the colours centred on 0."""
        from interp.report.figures import Axis, heatmap

        shown = self.scores.masked_fill(~self.graph.allowed, torch.nan)
        return heatmap(
            shown,
            rows=Axis("sender", [node.name for node in self.graph.senders]),
            columns=Axis("receiver", [node.name for node in self.graph.receivers]),
            title=f"Edges ({self.method})",
            value=self.value,
            diverging=True,
        )

    def summary(self) -> str:
        """Say what was scored and give the strongest edges."""
        lines = [f"{self.method}: {self.value}, {self.graph.n_edges} edges, {self.examples} examples"]
        lines += [f"{name}: {score:+.4g}" for name, score in self.top(5)]
        return "\n".join(lines)

    def _name(self, row: int, column: int) -> str:
        return f"{self.graph.senders[row].name}->{self.graph.receivers[column].name}"

    def _ranked(self, n: int, signed: bool) -> list[tuple[int, int]]:
        edges = self.graph.n_edges
        if type(n) is not int or not 0 <= n <= edges:
            raise DataError(f"n={n!r}: expected a whole number from 0 to {edges}, the edges of this graph")
        size = (self.scores if signed else self.scores.abs()).masked_fill(~self.graph.allowed, -torch.inf)
        # Stable: equal scores keep the order of the matrix.
        order = size.flatten().argsort(descending=True, stable=True)[:n].tolist()
        return [divmod(place, self.scores.shape[1]) for place in order]
