"""`PatchResult`: what each patch of a sweep does to each metric, per example."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.core.errors import DataError, nearest
from interp.core.result import Result
from interp.core.stats import bootstrap_bounds, sign_flip_p

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

__all__ = ["PatchResult"]

# Below so many standard errors, the gap between the prompts is not told from nothing.
_MIN_ERRORS = 3.0
_TITLES = {
    "denoise": "Clean activation into the corrupted run",
    "noise": "Clean run, one activation replaced",
}
_PUT_IN = {
    "resample": "by the other prompt's",
    "mean": "by its mean",
    "zero": "by zero",
    "gaussian": "by itself with noise added",
    "optimal": "by its optimal constant",
    "given": "by a given value",
}


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class PatchResult(Result):
    """What each patch does to a metric, per example; with several metrics, `result["kl"]` is that of one.

    Attributes:
        sites: Short names of the patched sites: the rows.
        axis: What the columns are, such as "position", "head", "position, head", "neuron" or "span".
        columns: Labels of the columns.
        patched: The metric with one cell patched; NaN where a sweep was stopped before.
        clean: The metric on the clean prompt.
        corrupted: The metric on the corrupted prompt.
        unchanged: Cells whose patch changes no activation at all; their effect is exactly 0.
        metrics: Names of the metrics. With more than one, or a list of one, values have them in a first axis.
        mode: "denoise", "noise" or "both": `patched` holds the first sweep made.
        ablation: What is put in an activation's place.
        noised: With mode "both", the metric of the clean run with one cell replaced.
        heads: For columns of positions and heads, how many heads each position has; else 1.
        keys: For columns of destinations and sources, the labels of the sources, which run faster; else none.
        notes: Which plan the sweep ran by, what was left out, and what a reader should know.
    """

    title: ClassVar[str] = "Activation patching"
    sites: list[str]
    axis: str
    columns: list[str]
    patched: Float[Tensor, "*metric site column batch"]
    clean: Float[Tensor, "*metric batch"]
    corrupted: Float[Tensor, "*metric batch"]
    unchanged: Bool[Tensor, "site column"]
    metrics: list[str] = field(default_factory=lambda: ["metric"])
    mode: str = "denoise"
    ablation: str = "resample"
    noised: Float[Tensor, "*metric site column batch"] | None = None
    heads: int = 1
    keys: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    # -- one metric, one direction ------------------------------------------------------------------------------

    def __getitem__(self, metric: str) -> "PatchResult":
        """Return the result of one metric.

        Raises:
            DataError: it was not measured.
        """
        if metric not in self.metrics:
            hint = nearest(metric, self.metrics) or f"they are {', '.join(self.metrics)}"
            raise DataError(f"no metric {metric!r} was measured; {hint}")
        if self.patched.ndim == 3:
            return self
        at = self.metrics.index(metric)
        return replace(
            self,
            metrics=[metric],
            patched=self.patched[at],
            clean=self.clean[at],
            corrupted=self.corrupted[at],
            noised=None if self.noised is None else self.noised[at],
        )

    @property
    def noise(self) -> "PatchResult":
        """The noising half of a result of both modes.

        Raises:
            DataError: only one direction was swept.
        """
        if self.noised is None:
            raise DataError(f"this sweep has mode {self.mode!r}; run it with PatchOptions(mode='both')")
        return replace(self, patched=self.noised, noised=None, mode="noise")

    @property
    def base(self) -> Float[Tensor, "*metric batch"]:
        """The metric of the run that is patched."""
        return self.clean if self.mode == "noise" else self.corrupted

    # -- values -------------------------------------------------------------------------------------------------

    @property
    def effect(self) -> Float[Tensor, "*metric site column batch"]:
        """Patched − unpatched (the corrupted run, or under noise the clean one), in the metric's units, per example."""
        return self.patched - self.base[..., None, None, :]

    @property
    def gap(self) -> float:
        """Mean of clean − corrupted of the first metric, in its units."""
        one = self._first
        return float((one.clean - one.corrupted).mean())

    @property
    def gap_is_clear(self) -> bool:
        """Whether the first metric's gap can be divided by: above rounding and above 3 standard errors."""
        one = self._first
        gaps = (one.clean - one.corrupted).double()
        size = max(float(one.clean.abs().max()), float(one.corrupted.abs().max()), 1.0)
        error = float(gaps.std() / len(gaps) ** 0.5) if len(gaps) > 1 else 0.0
        return abs(float(gaps.mean())) > max(1e-5 * size, _MIN_ERRORS * error)

    def normalized(self) -> Float[Tensor, "*metric site column"]:
        """Return the ratio of means, mean effect / mean gap, where the gap is clear, else NaN.

        0 is the run as it was, 1 the other prompt: for denoising the share of the gap that is restored, for noising the
        share that is lost. It is not clipped: a patch can overshoot.
        """
        if self.patched.ndim == 4:
            return torch.stack([self[m].normalized() for m in self.metrics])
        mean = self.effect.mean(-1)
        if not self.gap_is_clear:
            return torch.full_like(mean, torch.nan)
        return mean / (-self.gap if self.mode == "noise" else self.gap)

    def interval(
        self, *, n_bootstrap: int = 1000, seed: int = 0
    ) -> tuple[Float[Tensor, "*metric site column"], Float[Tensor, "*metric site column"]]:
        """Return the 95 % bootstrap interval of each mean effect, over the examples."""
        return bootstrap_bounds(self.effect, n_bootstrap=n_bootstrap, seed=seed)

    def p_values(self, *, n_flips: int = 9999, seed: int = 0) -> Float[Tensor, "*metric site column"]:
        """Return the two-sided p of each mean effect being zero, by flipping signs; see `sign_flip_p`."""
        return sign_flip_p(self.effect, n_flips=n_flips, seed=seed)

    # -- how it shows -------------------------------------------------------------------------------------------

    @property
    def _first(self) -> "PatchResult":
        return self if self.patched.ndim == 3 else self[self.metrics[0]]

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per metric, direction, site, column and example."""
        import pandas as pd

        parts = [r for name in self.metrics for r in self[name]._directions()]
        frames = [part._one_frame(several=len(parts) > 1) for part in parts]
        return pd.concat(frames, ignore_index=True) if len(frames) > 1 else frames[0]

    def _directions(self) -> "list[PatchResult]":
        return [self] if self.noised is None else [replace(self, noised=None, mode="denoise"), self.noise]

    def _one_frame(self, *, several: bool) -> "pandas.DataFrame":
        import pandas as pd

        n_sites, n_columns, n = self.patched.shape
        site, column, example = (
            g.flatten() for g in torch.meshgrid(*map(torch.arange, self.patched.shape), indexing="ij")
        )
        share = self.normalized()[..., None].expand(n_sites, n_columns, n)
        name = self.axis.replace(", ", "_")
        extra = {"metric": self.metrics[0], "mode": self.mode} if several else {}
        return pd.DataFrame(
            {
                **extra,
                "site": [self.sites[i] for i in site.tolist()],
                name: column.tolist(),
                "label": [self.columns[i] for i in column.tolist()],
                "example": example.tolist(),
                "patched": self.patched.flatten().tolist(),
                "effect": self.effect.flatten().tolist(),
                "normalized_mean": share.flatten().tolist(),
            }
        )

    def plot(self, *, site: str | None = None) -> "plotly.graph_objects.Figure":
        """Draw the first metric: sites × columns, with heads in rows of their own where positions have heads.

        The share of the gap, or the raw effect where the gap is not clear. With both modes, the two effects of every
        cell against each other. Entries of patterns are destinations × sources, one panel for each site, or head of
        one: the strongest few.

        Args:
            site: One of `sites`: draw it alone, and every example of it: a dot for each beside the mean of each column
                and its 95 % interval. Of entries of patterns, the panels of that site.

        Raises:
            DataError: No such site was patched.
        """
        from interp.patching import patch_figures

        one = self._first
        if site is not None:
            one = one._at_site(site)
        if one.keys:
            return patch_figures.entry_maps(one._directions()[0])
        if site is not None:
            return patch_figures.example_strip(one._directions()[0])
        return one._scatter() if one.noised is not None else one._grid()

    def _at_site(self, site: str) -> "PatchResult":
        if site not in self.sites:
            hint = nearest(site, self.sites) or f"they are {', '.join(self.sites)}"
            raise DataError(f"no site {site!r} was patched; {hint}")
        at = self.sites.index(site)
        noised = None if self.noised is None else self.noised[at : at + 1]
        patched, unchanged = self.patched[at : at + 1], self.unchanged[at : at + 1]
        return replace(self, sites=[site], patched=patched, unchanged=unchanged, noised=noised)

    def _grid(self) -> "plotly.graph_objects.Figure":
        from interp.report.figures import Axis, heatmap

        clear = self.gap_is_clear
        values, rows, columns, axis = (
            self.normalized() if clear else self.effect.mean(-1),
            self.sites,
            self.columns,
            self.axis,
        )
        if self.heads > 1 and ", " in self.axis:
            places = len(columns) // self.heads
            values = values.unflatten(1, (places, self.heads)).transpose(1, 2).flatten(0, 1)
            rows = [f"{site} {h}" for site in self.sites for h in range(self.heads)]
            columns = [label.rpartition(" · ")[0] for label in columns[:: self.heads]]
            axis = self.axis.split(", ")[0]
        share = "share of the gap lost" if self.mode == "noise" else "share of the gap restored"
        return heatmap(
            values,
            rows=Axis("", rows),
            columns=Axis(axis, columns),
            title=self.heading(),
            value=share if clear else f"mean effect on {self.metrics[0]}",
            diverging=True,
        )

    def heading(self) -> str:
        """Return what was done, as a figure's heading."""
        if self.mode == "denoise":
            return _TITLES["denoise"]
        return f"{_TITLES['noise']} {_PUT_IN[self.ablation]}"

    def _scatter(self) -> "plotly.graph_objects.Figure":
        from interp.report.scatter import scatter

        there, back = self._directions()
        names = [f"{site} · {column}" for site in self.sites for column in self.columns]
        return scatter(
            there.effect.mean(-1).flatten(),
            -back.effect.mean(-1).flatten(),
            names=names,
            x=f"denoising: mean effect on {self.metrics[0]}",
            y=f"noising: mean effect on {self.metrics[0]}, sign reversed",
            title="Is it enough (denoising), is it needed (noising)?",
        )

    def summary(self) -> str:
        """Give both baselines, the strongest cells and the notes, for each metric."""
        lines = [line for name in self.metrics for part in self[name]._directions() for line in part._lines()]
        if self.unchanged.any():
            lines.append(f"{int(self.unchanged.sum())} of {self.unchanged.numel()} patches changed no activation")
        return "\n".join([*lines, *self.notes])

    def _lines(self) -> list[str]:
        mean = self.effect.mean(-1)
        best = mean.nan_to_num(0.0).abs().flatten().topk(min(3, mean.numel())).indices.tolist()
        share, clear = self.normalized(), self.gap_is_clear
        clean, corrupted = float(self.clean.mean()), float(self.corrupted.mean())
        name = self.metrics[0]
        how = "" if self.mode == "denoise" else f", clean run with cells replaced {_PUT_IN[self.ablation]}"
        lines = [f"{name}: clean {clean:.4g}, corrupted {corrupted:.4g} ({len(self.clean)} examples{how})"]
        for cell in best:
            s, c = divmod(cell, len(self.columns))
            if not float(mean[s, c].nan_to_num(0.0)):
                continue
            part = f", {float(share[s, c]):.0%} of the gap" if clear else ""
            axes = self.axis.split(", ")
            words = zip(axes, self.columns[c].rsplit(" · ", len(axes) - 1), strict=True)
            place = ", ".join(f"{axis} {label}" for axis, label in words)
            lines.append(f"{self.sites[s]}, {place}: {float(mean[s, c]):+.4g}{part}")
        if not clear:
            lines.append("the gap between the prompts is not clear of zero, so nothing is divided by it")
        missing = int(mean.isnan().sum())
        if missing:
            stopped = any(note.startswith("stopped: ") for note in self.notes)
            why = "not done: the sweep was stopped" if stopped else "NaN: what was put in, or the metric, is no number"
            lines.append(f"{missing} of {mean.numel()} cells are {why}")
        return lines
