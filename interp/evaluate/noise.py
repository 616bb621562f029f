"""How far a figure can be trusted: its interval over rows of text, and the noise between seeds."""

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.errors import ConfigError, DataError
from interp.core.result import Provenance, Result

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

__all__ = ["NORMAL_95", "ReseedNoise", "ratio_interval", "reseed_noise", "t_quantile"]

NORMAL_95 = 1.959964
_FEW_SEEDS = 5


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class ReseedNoise(Result):
    """How much one figure moves when nothing but the seed changes.

    Attributes:
        figure: what the numbers are.
        settings: names of the settings, in order.
        values: setting → its figure for each seed.
        n: seeds of each setting.
        mean: mean over seeds.
        sd: standard deviation over seeds, n − 1 in the denominator; NaN for one seed.
        cv: coefficient of variation, sd / |mean|; NaN where the mean is 0.
        intervals: 95 % interval of the mean, mean ± t(0.975, n − 1) · sd / √n.
        pooled_sd: s = √(Σ (n − 1) sd² / Σ (n − 1)), over settings.
        dof: Σ (n − 1).
        n_seeds: the smallest of `n`; the number of seeds that `smallest_difference` is for.
        smallest_difference: t(0.975, dof) · s · √(2 / n_seeds): the least difference between the means of two settings,
            n_seeds seeds each, that reseeding alone reaches in 5 % of pairs; NaN where no setting has two seeds.
        notes: what a reader should know.
    """

    title: ClassVar[str] = "Noise between seeds"
    figure: str
    settings: list[str]
    values: dict[str, list[float]]
    n: Int[Tensor, "setting"]
    mean: Float[Tensor, "setting"]
    sd: Float[Tensor, "setting"]
    cv: Float[Tensor, "setting"]
    intervals: Float[Tensor, "setting 2"]
    pooled_sd: float
    dof: int
    n_seeds: int
    smallest_difference: float
    notes: list[str]

    def difference(self, a: str, b: str) -> tuple[float, float]:
        """Return mean(b) − mean(a), and how large it must be: t(0.975, dof) · s · √(1 / n_a + 1 / n_b).

        Args:
            a: name of a setting.
            b: name of another.

        Raises:
            ConfigError: a name that is not there.
        """
        unknown = [name for name in (a, b) if name not in self.settings]
        if unknown:
            raise ConfigError(f"no setting {unknown[0]!r}; there are {self.settings}")
        i, j = self.settings.index(a), self.settings.index(b)
        spread = math.sqrt(1 / int(self.n[i]) + 1 / int(self.n[j]))
        return float(self.mean[j] - self.mean[i]), _times(self.dof, self.pooled_sd * spread)

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per setting, with the smallest reliable difference beside each."""
        import pandas as pd

        columns = {name: getattr(self, name).tolist() for name in ("n", "mean", "sd", "cv")}
        low, high = self.intervals.T.tolist()
        held = {"setting": self.settings, **columns, "low": low, "high": high}
        return pd.DataFrame({**held, "smallest_difference": self.smallest_difference})

    def plot(self) -> "plotly.graph_objects.Figure":
        """Return the figure of every seed, one line per setting."""
        figures = importlib.import_module("interp.report.figures")
        most = int(self.n.max())
        series = {k: torch.tensor(v + [math.nan] * (most - len(v))) for k, v in self.values.items()}
        title = f"{self.figure} by seed (smallest reliable difference {self.smallest_difference:.3g})"
        return figures.line(series, x=figures.Axis("number of the seed"), title=title, value=self.figure)

    def summary(self) -> str:
        """Say mean and deviation of each setting, and which difference between two is more than noise."""
        lines = [
            f"{name}: {self.figure} {m:.4g}, sd {s:.2g} (cv {c:.1%}), {n} seeds"
            for name, m, s, c, n in zip(
                self.settings, self.mean.tolist(), self.sd.tolist(), self.cv.tolist(), self.n.tolist(), strict=True
            )
        ]
        least = f"differences below {self.smallest_difference:.3g} between means of {self.n_seeds} seeds are noise"
        return "\n".join([*lines, f"{least} (pooled sd {self.pooled_sd:.2g}, two-sided 95 %)", *self.notes])


def reseed_noise(figures: Mapping[str, Sequence[float]] | Sequence[float], *, figure: str = "figure") -> ReseedNoise:
    """Measure how much a figure moves between seeds, and the smallest difference that is more than that.

    Two settings that are the same differ, in mean over n seeds each, by more than t(0.975, Σ(n − 1)) · s · √(2 / n) in
    5 % of cases, if seeds are independent and the figure is about normal with one spread s under all settings. Look at
    `sd` for whether the spread is one. It is a threshold for one pair that was chosen beforehand: the largest of many
    differences passes it more often.

    Args:
        figures: setting → the figure for each seed; or the figures of one setting.
        figure: what the numbers are, for tables and figures.

    Returns:
        Spread of each setting, the pooled one, and the smallest reliable difference.

    Raises:
        DataError: no setting, a setting without a seed, or a figure that is not finite.

    Source: two-sample t test with pooled variance (Student 1908; any textbook); that such a difference should stand
    beside every score: Chanin 2026 (2605.18229).
    """
    held = {str(k): [float(v) for v in vs] for k, vs in _by_setting(figures).items()}
    for name, values in held.items():
        wrong = [v for v in values if not math.isfinite(v)]
        if not values or wrong:
            came = f"{wrong[0]} for one of its seeds" if wrong else "no seed"
            raise DataError(
                f"setting {name!r} has {came}; expected one finite number per seed: leave a failed seed out"
            )
    if not held:
        raise DataError("no setting was given; expected setting → one number per seed")
    n = torch.tensor([len(v) for v in held.values()])
    parts = [torch.tensor(v, dtype=torch.float64) for v in held.values()]
    # The mean of equal numbers need not be that number, to the last bit.
    mean = torch.stack([v.mean() if bool((v != v[0]).any()) else v[0] for v in parts])
    squares = torch.stack([(v - m).pow(2).sum() for v, m in zip(parts, mean, strict=True)])
    sd = (squares / (n - 1)).sqrt().where(n > 1, math.nan)
    half = torch.tensor([_times(int(k) - 1, float(s) / math.sqrt(int(k))) for k, s in zip(n, sd, strict=True)])
    dof, fewest = int((n - 1).sum()), int(n.min())
    pooled = math.sqrt(float(squares.sum()) / dof) if dof else math.nan
    return ReseedNoise(
        figure=figure,
        settings=list(held),
        values=held,
        n=n,
        mean=mean,
        sd=sd,
        cv=(sd / mean.abs()).where(mean != 0, math.nan),
        intervals=torch.stack([mean - half, mean + half], 1),
        pooled_sd=pooled,
        dof=dof,
        n_seeds=fewest,
        smallest_difference=_times(dof, pooled * math.sqrt(2 / fewest)),
        notes=_notes(fewest, dof, pooled),
        provenance=Provenance(model="", settings={"figure": figure, "seeds": n.tolist()}),
    )


def ratio_interval(
    part: Float[Tensor, "unit"], whole: Float[Tensor, "unit"], *, quantile: float = NORMAL_95
) -> tuple[float, float]:
    """Return the interval of Σ part / Σ whole over independent units, by the delta method.

    With r the ratio and m units: r ± quantile · √(m / (m − 1) · Σ (part − r · whole)²) / |Σ whole|.

    Args:
        part: numerators of each unit; a unit in which nothing was counted is left out beforehand.
        whole: denominators.
        quantile: how many standard errors; 1.96 for 95 % with many units.

    Returns:
        Low and high; NaN for fewer than two units, or a denominator of 0.

    Source: Cochran 1977, "Sampling Techniques", chapter 6, without the correction for a finite population.
    """
    total, count = float(whole.sum()), len(whole)
    if count < 2 or total == 0:
        return math.nan, math.nan
    ratio = float(part.sum()) / total
    half = quantile * math.sqrt(float((part - ratio * whole).pow(2).sum()) * count / (count - 1)) / abs(total)
    return ratio - half, ratio + half


def t_quantile(dof: int) -> float:
    """Return the 97.5 % point of Student's t; NaN without a degree of freedom."""
    return float(importlib.import_module("scipy.special").stdtrit(dof, 0.975)) if dof > 0 else math.nan


def _by_setting(figures: Mapping[str, Sequence[float]] | Sequence[float]) -> Mapping[str, Sequence[float]]:
    return figures if isinstance(figures, Mapping) else {"all": figures}


def _times(dof: int, error: float) -> float:
    return t_quantile(dof) * error if dof > 0 else math.nan


def _notes(fewest: int, dof: int, pooled: float) -> list[str]:
    found = []
    if dof == 0:
        found.append("no setting has two seeds, so noise is unknown; train each setting with 5 seeds or more")
    elif fewest < _FEW_SEEDS:
        found.append(f"a setting has only {fewest} seeds; 5 or more are advised")
    if pooled == 0:
        found.append("seeds of a setting agree to the last bit; was the seed used?")
    return found
