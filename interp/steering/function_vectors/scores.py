"""`FunctionVectorScores`: a function vector and its controls, condition by condition and layer by layer."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.errors import DataError, nearest
from interp.core.result import Result
from interp.core.stats import Estimate, bootstrap

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

__all__ = ["FunctionVectorScores"]

_RANDOM = "random heads"


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class FunctionVectorScores(Result):
    """Right or wrong on test items.

    Attributes:
        task: the function.
        conditions: "zero_shot", "shuffled", … and other wordings by their template.
        vectors: "none", "function vector", "random heads 1" …, "layer average".
        layers: blocks after which each was added.
        layer: the vector's own.
        right: 1 where the first token of an answer was the most likely one.
        log_prob: log-probability of the answer's first token, in nats.
        full: 1 where all tokens of an answer were, at the vector's own layer.
        ceiling: 1 where the model answers right with true shots and no vector.
        inputs: the items.
    """

    title: ClassVar[str] = "Function vector on test items"
    task: str
    conditions: list[str]
    vectors: list[str]
    layers: list[int]
    layer: int
    right: Float[Tensor, "condition vector layer item"]
    log_prob: Float[Tensor, "condition vector layer item"]
    full: Float[Tensor, "condition vector item"]
    ceiling: Float[Tensor, " item"]
    inputs: list[str]

    def accuracy(
        self,
        condition: str = "zero_shot",
        vector: str = "function vector",
        *,
        layer: int | None = None,
        full: bool = False,
    ) -> Estimate:
        """Return the share of right answers with its interval over items.

        Args:
            condition: one of `conditions`.
            vector: one of `vectors`, or "random heads" for the mean over their sets.
            layer: where it was added; the vector's own by default.
            full: whole answers, at the vector's own layer.

        Raises:
            DataError: a condition, vector or layer that was not measured.
        """
        at = self.layer if layer is None else layer
        if at not in self.layers or (full and at != self.layer):
            raise DataError(f"layer {at} was not measured so; layers are {self.layers}, whole answers at {self.layer}")
        i, rows = self._condition(condition), self._rows(vector)
        values = self.full[i, rows] if full else self.right[i, rows, self.layers.index(at)]
        return bootstrap(values.mean(0))

    def by_layer(self, condition: str, vector: str) -> Float[Tensor, " layer"]:
        """Return the share of right answers for each layer; arguments as for `accuracy`."""
        return self.right[self._condition(condition), self._rows(vector)].mean((0, -1))

    def _condition(self, name: str) -> int:
        if name not in self.conditions:
            raise DataError(f"no condition {name!r}; {nearest(name, self.conditions) or ', '.join(self.conditions)}")
        return self.conditions.index(name)

    def _rows(self, name: str) -> list[int]:
        rows = [i for i, v in enumerate(self.vectors) if v == name or (name == _RANDOM and v.startswith(_RANDOM))]
        if not rows:
            raise DataError(f"no vector {name!r}; they are {', '.join(self.vectors)}")
        return rows

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per condition, vector and layer; whole answers at the vector's own layer alone."""
        import pandas as pd

        rows = []
        for c, condition in enumerate(self.conditions):
            for v, vector in enumerate(self.vectors):
                for n, layer in enumerate(self.layers):
                    rows.append(
                        {
                            "condition": condition,
                            "vector": vector,
                            "layer": layer,
                            "accuracy": float(self.right[c, v, n].mean()),
                            "log_prob": float(self.log_prob[c, v, n].mean()),
                            "full_accuracy": float(self.full[c, v].mean()) if layer == self.layer else float("nan"),
                        }
                    )
        return pd.DataFrame(rows)

    def plot(self) -> "plotly.graph_objects.Figure":
        """Draw accuracy by layer, a panel per condition: the vector and its controls."""
        from interp.report.figures import curves

        places = torch.tensor(self.layers)
        panels = {
            condition: {
                name: (places, self.by_layer(condition, name))
                for name in ("function vector", _RANDOM, "layer average", "none")
            }
            for condition in self.conditions
        }
        title = f"{self.task}: share of right answers on test items"
        return curves(panels, x="added after block", title=title).update_yaxes(range=[-0.05, 1.05])

    def summary(self) -> str:
        """Give the accuracies at the vector's own layer."""
        lines = [
            f"{self.task}: {len(self.inputs)} test items, added after block {self.layer}; with true shots the model "
            f"answers {float(self.ceiling.mean()):.2f}"
        ]
        for i, condition in enumerate(self.conditions):
            names = ("none", "function vector", _RANDOM, "layer average")
            said = ", ".join(f"{name} {self.accuracy(condition, name).mean:.2f}" for name in names)
            differ = not torch.equal(self.full[i], self.right[i, :, self.layers.index(self.layer)])
            whole = self.accuracy(condition, full=True).mean
            lines.append(f"{condition!r}: {said}" + (f"; whole answers {whole:.2f}" if differ else ""))
        return "\n".join(lines)
