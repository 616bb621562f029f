"""Figures of several dictionaries in one tidy table, each with its definition, its interval and its noise."""

import importlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.result import Provenance, Result
from interp.evaluate.definitions import DEFINITIONS, LEFT_OUT, PARTS, Definition
from interp.evaluate.labels_any import LabelsOfAny
from interp.evaluate.noise import ReseedNoise, reseed_noise

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

__all__ = ["UNKNOWN_NOISE", "Evaluations", "Rows"]

UNKNOWN_NOISE = "noise between seeds is unknown: train with --sweep.seed 0 1 2 3 4 (5 or more are advised)"
_COLUMNS = (
    *("run", "setting", "seed", "figure", "value", "low", "high", "n_tokens", "unit"),
    *("n_seeds", "seed_mean", "seed_sd", "seed_cv", "smallest_difference", "definition"),
)
_MAIN = (
    "l0",
    "fvu",
    "ce_recovered",
    "kl",
    "dead",
    "pca_fvu",
    "pca_ce_recovered",
    "mmcs_seeds",
    "linear_share",
    "bits",
    "labels_found",
    "planted_f1",
)
_DRAWN = ("fvu", "ce_recovered", "bits", "labels_found", "planted_f1")
# They compare seeds with one another: they have no noise between seeds of their own.
_OF_PAIRS = "seeds"
_FEW_SEEDS = 5


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Evaluations(Result):
    """Figures of several dictionaries, a row for each dictionary and figure.

    SCR and TPP are left out: a reliability audit (Chanin 2026, 2605.18229) found them unfit at canonical settings.

    Attributes:
        runs: names of the dictionaries.
        settings: of each, what it was trained with, seed apart; those with the same are reseeds of one another.
        seeds: the seed of each; −1 where it is not known.
        sites: where each acts.
        run: of each row, the dictionary; or a name such as "any of 4 of testbed", for what is of several together.
        figure: of each row, the figure; `interp.evaluate.definitions.DEFINITIONS` says what it is.
        value: of each row, the figure's value; NaN where it is undefined.
        low, high: 95 % interval of each over independent units of text; NaN where there is none.
        n_tokens: tokens that each was measured on; 0 for figures of the weights alone.
        unit: the independent units of the interval: "row", "document", "token", or "" for none.
        firing: dictionary → on how many tokens each latent was positive.
        fired_on: dictionary → how many tokens these are of.
        nearest: dictionary → largest cosine of each decoder row with another.
        labels: dictionary → the table of labels of the small world, by column; see `LabelScores`.
        core: dictionary → the figures of `evaluate_dictionary` by name, with their intervals.
        of_any: a sentence for each count of what several dictionaries find together.
        notes: what was not measured, and why.
    """

    title: ClassVar[str] = "Evaluation"
    parts: ClassVar[Mapping[str, str]] = PARTS
    definitions: ClassVar[Mapping[str, Definition]] = DEFINITIONS
    left_out: ClassVar[str] = LEFT_OUT
    runs: list[str]
    settings: list[str]
    seeds: list[int]
    sites: list[str]
    run: list[str]
    figure: list[str]
    value: Float[Tensor, "row"]
    low: Float[Tensor, "row"]
    high: Float[Tensor, "row"]
    n_tokens: Int[Tensor, "row"]
    unit: list[str]
    firing: dict[str, Int[Tensor, "_"]]
    fired_on: dict[str, int]
    nearest: dict[str, Float[Tensor, "_"]]
    labels: dict[str, dict[str, Any]]
    core: dict[str, dict[str, Any]]
    of_any: list[str]
    notes: list[str]

    def noise(self) -> dict[tuple[str, str], ReseedNoise]:
        """(setting, figure) → how much it moves between seeds, where at least two seeds have it.

        The smallest reliable difference is that of one setting's own spread, for means of as many seeds as it has.
        """
        of, values = dict(zip(self.runs, self.settings, strict=True)), dict[tuple[str, str], list[float]]()
        for run, figure, value in zip(self.run, self.figure, self.value.tolist(), strict=True):
            if run in of and DEFINITIONS[figure].part != _OF_PAIRS and math.isfinite(value):
                values.setdefault((of[run], figure), []).append(value)
        return {key: reseed_noise(found, figure=key[1]) for key, found in values.items() if len(found) > 1}

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per dictionary and figure.

        Columns: `run`, `setting`, `seed`, `figure`, `value`, `low`, `high`, `n_tokens`, `unit` (of independence),
        `n_seeds`, `seed_mean`, `seed_sd`, `seed_cv`, `smallest_difference`, `definition`.
        """
        import pandas as pd

        noise, at = self.noise(), {run: i for i, run in enumerate(self.runs)}
        rows, ends = [], zip(self.value.tolist(), self.low.tolist(), self.high.tolist(), strict=True)
        others = zip(self.run, self.figure, ends, self.n_tokens.tolist(), self.unit, strict=True)
        for run, figure, (value, low, high), n_tokens, unit in others:
            setting, seed = (self.settings[at[run]], self.seeds[at[run]]) if run in at else (run, -1)
            found = noise.get((setting, figure))
            rows.append(
                {
                    "run": run,
                    "setting": setting,
                    "seed": None if seed < 0 else seed,
                    "figure": figure,
                    "value": value,
                    "low": low,
                    "high": high,
                    "n_tokens": n_tokens,
                    "unit": unit,
                    "n_seeds": 1 if found is None else found.n_seeds,
                    "seed_mean": math.nan if found is None else float(found.mean[0]),
                    "seed_sd": math.nan if found is None else float(found.sd[0]),
                    "seed_cv": math.nan if found is None else float(found.cv[0]),
                    "smallest_difference": math.nan if found is None else found.smallest_difference,
                    "definition": DEFINITIONS[figure].meaning,
                }
            )
        return pd.DataFrame(rows, columns=list(_COLUMNS)).astype({"seed": "Int64"})

    def labels_frame(self) -> "pandas.DataFrame":
        """Return one row per dictionary and value of a label of the small world; empty where none was measured."""
        import pandas as pd

        parts = [pd.DataFrame({"run": run, **columns}) for run, columns in self.labels.items()]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()

    def records(self) -> dict[str, Any]:
        """The tables as plain JSON values; what is undefined is None."""
        frames = {"rows": self.to_frame(), "labels": self.labels_frame()}
        held = {name: [_plain(row) for row in frame.to_dict("records")] for name, frame in frames.items()}
        known = {"model": self.provenance.model, **self.provenance.settings}
        return {**held, "notes": self.notes, "left_out": LEFT_OUT, "provenance": known}

    def plot(self) -> "plotly.graph_objects.Figure":
        """Return the main figures, a point per dictionary with its 95 % interval, seeds of a setting in one column."""
        points = importlib.import_module("interp.report.evaluation_page").points
        return points(self.to_frame(), figures=[name for name in _DRAWN if name in self.figure])

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write a page that holds everything it shows: every figure with its definition, interval and noise.

        Args:
            path: file to write; parent folders are made, an existing file is replaced in one step.

        Returns:
            The path written.
        """
        write = importlib.import_module("interp.report.evaluation_page").write_evaluation_page
        return Path(write(path, self))

    def summary(self) -> str:
        """Say the main figures of each setting, with their noise where it is known."""
        noise, found = (
            self.noise(),
            dict(zip(zip(self.run, self.figure, strict=True), self.value.tolist(), strict=True)),
        )
        lines = []
        for setting in dict.fromkeys(self.settings):
            mine = [run for run, its in zip(self.runs, self.settings, strict=True) if its == setting]
            said = []
            for name in _MAIN:
                values = [found[run, name] for run in mine if math.isfinite(found.get((run, name), math.nan))]
                if values:
                    one, spread = DEFINITIONS[name], noise.get((setting, name))
                    text = f"{one.title} {sum(values) / len(values):.{one.digits}f}"
                    said.append(text if spread is None else f"{text} (sd {float(spread.sd[0]):.2g})")
            seeds = f", {len(mine)} seeds" if len(mine) > 1 else ""
            lines.append(f"{setting}{seeds}: {', '.join(said) or 'nothing that was asked for applies'}")
        return "\n".join([*lines, *self.of_any, *self.notes])


@dataclass
class Rows:
    """Rows of the table while they are made."""

    run: list[str] = field(default_factory=list)
    figure: list[str] = field(default_factory=list)
    value: list[float] = field(default_factory=list)
    ends: list[tuple[float, float]] = field(default_factory=list)
    n_tokens: list[int] = field(default_factory=list)
    unit: list[str] = field(default_factory=list)
    firing: dict[str, Tensor] = field(default_factory=dict)
    fired_on: dict[str, int] = field(default_factory=dict)
    nearest: dict[str, Tensor] = field(default_factory=dict)
    labels: dict[str, dict[str, Any]] = field(default_factory=dict)
    core: dict[str, dict[str, Any]] = field(default_factory=dict)
    together: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(
        self,
        run: str,
        figures: Mapping[str, float],
        *,
        intervals: Mapping[str, tuple[float, float]] | None = None,
        n_tokens: int = 0,
        unit: str = "",
    ) -> None:
        """Append figures of one dictionary.

        Args:
            run: its name.
            figures: name → value.
            intervals: name → 95 % interval, where there is one.
            n_tokens: tokens that all of them were measured on.
            unit: the independent units of the intervals.
        """
        for name, value in figures.items():
            low, high = (intervals or {}).get(name, (math.nan, math.nan))
            self.run.append(run)
            self.figure.append(name)
            self.value.append(float(value))
            self.ends.append((low, high))
            self.n_tokens.append(n_tokens)
            self.unit.append(unit if math.isfinite(high - low) else "")

    def of_any(self, run: str, found: LabelsOfAny) -> None:
        """Append what several dictionaries find together.

        Args:
            run: a name for them together, which no dictionary has.
            found: by any of them.
        """
        ends = {"labels_found_by_any": found.found_interval}
        self.add(run, found.figures(), intervals=ends, n_tokens=found.n_tokens, unit="row")
        self.labels[run] = {str(k): v for k, v in found.to_frame().to_dict("list").items()}
        self.together.append(found.summary())

    def result(
        self, runs: Sequence[str], settings: Sequence[str], seeds: Sequence[int], sites: Sequence[str], of: Provenance
    ) -> Evaluations:
        """The rows as a result, in the order of the dictionaries and of the definitions.

        Args:
            runs: names of the dictionaries.
            settings: of each.
            seeds: of each.
            sites: of each.
            of: provenance of all.
        """
        place = {name: i for i, name in enumerate(DEFINITIONS)}
        at = {name: i for i, name in enumerate(runs)}
        order = sorted(range(len(self.run)), key=lambda i: (at.get(self.run[i], len(at)), place[self.figure[i]]))
        ends = torch.tensor([self.ends[i] for i in order], dtype=torch.float64).reshape(-1, 2)
        return Evaluations(
            runs=list(runs),
            settings=list(settings),
            seeds=list(seeds),
            sites=list(sites),
            run=[self.run[i] for i in order],
            figure=[self.figure[i] for i in order],
            value=torch.tensor([self.value[i] for i in order], dtype=torch.float64),
            low=ends[:, 0].clone(),
            high=ends[:, 1].clone(),
            n_tokens=torch.tensor([self.n_tokens[i] for i in order], dtype=torch.long),
            unit=[self.unit[i] for i in order],
            firing=self.firing,
            fired_on=self.fired_on,
            nearest=self.nearest,
            labels=self.labels,
            core=self.core,
            of_any=self.together,
            notes=[*self.notes, *_unknown(settings)],
            provenance=of,
        )


def joined(parts: Sequence[Evaluations], runs: Sequence[str]) -> Evaluations:
    """Return several evaluations as one.

    Args:
        parts: of different dictionaries, such as those of different models.
        runs: names of all of them, in the order that the table is to have.
    """
    if len(parts) == 1:
        return parts[0]
    rows, known, first = Rows(), dict[str, tuple[str, int, str]](), parts[0].provenance
    for part in parts:
        known |= dict(zip(part.runs, zip(part.settings, part.seeds, part.sites, strict=True), strict=True))
        rows.run += part.run
        rows.figure += part.figure
        rows.value += part.value.tolist()
        rows.ends += list(zip(part.low.tolist(), part.high.tolist(), strict=True))
        rows.n_tokens += part.n_tokens.tolist()
        rows.unit += part.unit
        for name in ("firing", "fired_on", "nearest", "labels", "core"):
            getattr(rows, name).update(getattr(part, name))
        rows.together += part.of_any
        rows.notes += [note for note in part.notes if note not in (*rows.notes, *_unknown(part.settings))]
    settings, seeds, sites = zip(*(known[name] for name in runs), strict=True)
    models = ", ".join(dict.fromkeys(part.provenance.model for part in parts))
    each = {", ".join(part.runs): part.provenance.settings for part in parts}
    return rows.result(runs, settings, seeds, sites, replace(first, model=models, config_hash=None, settings=each))


def _unknown(settings: Sequence[str]) -> list[str]:
    """What a reader should know of the noise between seeds."""
    counts = {setting: list(settings).count(setting) for setting in settings}
    if max(counts.values(), default=1) == 1:
        return [UNKNOWN_NOISE]
    few = {setting: n for setting, n in counts.items() if n < _FEW_SEEDS}
    said = ", ".join(f"{setting} ({n})" for setting, n in few.items())
    return [f"{_FEW_SEEDS} seeds or more are advised for the noise between them; fewer: {said}"] if few else []


def _plain(row: Mapping[Any, Any]) -> dict[str, Any]:
    import pandas as pd

    return {str(name): None if pd.isna(value) else value for name, value in row.items()}
