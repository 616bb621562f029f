"""What a language model's training hands back: its losses and measures by step."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.result import Result

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

__all__ = ["LINE_FIELDS", "LMTraining", "columns"]

LINE_FIELDS = ("step", "tokens", "loss", "lr", "grad_norm")
"""What a line of metrics says of the training itself; a measure has another name."""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class LMTraining(Result):
    """The course of a training.

    Attributes:
        steps: Optimiser steps taken, those before a resume included.
        tokens: Tokens predicted in them, with a weight above 0.
        stopped: True when a signal ended it early; its name is in `signal`.
        signal: "SIGINT" or "SIGTERM", None when there was none.
        losses: Mean loss, in nats per token, over the steps since the one before.
        loss_steps: The step of each loss.
        measures: The values of each measure; NaN where it gave none.
        measure_steps: The step of each value.
        seconds: Wall time of this call.
    """

    title: ClassVar[str] = "Training of a language model"
    steps: int
    tokens: int
    stopped: bool
    signal: str | None
    losses: Float[Tensor, " n"]
    loss_steps: Int[Tensor, " n"]
    measures: dict[str, Float[Tensor, " m"]]
    measure_steps: Int[Tensor, " m"]
    seconds: float

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per value: step, name ("loss" or a measure's), value."""
        import pandas as pd

        rows = [
            (name, step, value) for name, (at, values) in self._series().items() for step, value in _pairs(at, values)
        ]
        return pd.DataFrame(rows, columns=["name", "step", "value"])[["step", "name", "value"]]

    def plot(self) -> "plotly.graph_objects.Figure":
        """Draw the loss, and below it a panel for each measure; what one measure gave shares its panel."""
        from interp.report.figures import curves

        panels: dict[str, dict[str, Any]] = {}
        for name, series in self._series().items():
            panel = "loss (nats per token)" if name == "loss" else name.partition(".")[0]
            panels.setdefault(panel, {})[name] = series
        return curves(panels, x="step", title=self.title)

    def summary(self) -> str:
        """Say how far it went, what became of the loss, and the last measures."""
        end = f", stopped by {self.signal}" if self.stopped else ""
        lines = [f"{self.steps:,} steps, {self.tokens:,} tokens predicted, {self.seconds:,.0f} s{end}"]
        if len(self.losses):
            first, last = float(self.losses[0]), float(self.losses[-1])
            lines.append(f"loss {first:.3f} → {last:.3f} nats per token")
        lines += [f"{name}: {float(v[0]):.4g} → {float(v[-1]):.4g}" for name, v in self.measures.items()]
        return "\n".join(lines)

    def _series(self) -> dict[str, tuple[Int[Tensor, " n"], Float[Tensor, " n"]]]:
        found = {name: (self.measure_steps, values) for name, values in self.measures.items()}
        return {"loss": (self.loss_steps, self.losses), **found}


def columns(lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the fields of an `LMTraining` that lines of metrics hold.

    Args:
        lines: lines with a "loss", and lines of measures; None stands for a number that is not finite.
    """
    held = list(lines)
    losses = [line for line in held if "loss" in line]
    measured = [line for line in held if "loss" not in line]
    names = dict.fromkeys(name for line in measured for name in line if name != "step")
    values = {name: [_number(line.get(name)) for line in measured] for name in names}
    return {
        "losses": torch.tensor([line["loss"] for line in losses], dtype=torch.float64),
        "loss_steps": torch.tensor([line["step"] for line in losses], dtype=torch.long),
        "measures": {name: torch.tensor(column, dtype=torch.float64) for name, column in values.items()},
        "measure_steps": torch.tensor([line["step"] for line in measured], dtype=torch.long),
    }


def _pairs(at: Int[Tensor, " n"], values: Float[Tensor, " n"]) -> Iterable[tuple[int, float]]:
    return zip(at.tolist(), values.tolist(), strict=True)


def _number(value: float | int | None) -> float:
    return math.nan if value is None else float(value)
