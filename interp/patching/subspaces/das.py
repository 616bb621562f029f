"""Distributed alignment search: the subspace of one activation whose interchange gives what a causal model says."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from interp.core.errors import ConfigError, ShapeError, WhereError
from interp.core.manager import HookManager
from interp.core.result import Provenance, Result
from interp.core.site import Site
from interp.core.stats import Estimate, bootstrap
from interp.core.subspace import ReplaceSubspace
from interp.core.where import Where
from interp.data.pair_tokens import PairTokens
from interp.data.pairs import PromptPairs
from interp.patching.subspaces.fitting import Boundary, DASOptions, Fit, Rotation, controlled, split_rows
from interp.patching.subspaces.interchange import Interchange, Labels, Places, described

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

__all__ = ["DAS", "DASOptions", "fit_boundless_das", "fit_das"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class DAS(Result):
    """A subspace fitted to interchanges, with what it gives on pairs it has not seen and what the controls give.

    Attributes:
        site: Short name of the site.
        where: The positions, as text.
        span: The span that `where` named on the clean side, None where it was a `Where`.
        head: The head, None for the whole site.
        basis: Orthonormal rows that span the subspace.
        test: The pairs that were held out.
        hits: By name ("held out", "training pairs", "no patch", "whole site" and the controls), whether each pair's
            patched run gave its label; a share, where several were drawn.
        loss: The loss at each step.
        boundary: For a boundless fit the share of dimensions inside the boundary at each step; else empty.
        stopped: Whether the fit was interrupted; it then has no control that fits.
    """

    title: ClassVar[str] = "Distributed alignment search"
    site: str
    where: str
    span: str | None
    head: int | None
    basis: Float[Tensor, "k d"]
    test: Int[Tensor, " test"]
    hits: dict[str, Tensor]
    loss: list[float]
    boundary: list[float]
    stopped: bool

    @property
    def k(self) -> int:
        """Dimensions of the subspace."""
        return len(self.basis)

    @property
    def iia(self) -> dict[str, Estimate]:
        """Interchange intervention accuracy by name, with its 95 % bootstrap interval over pairs."""
        return {name: bootstrap(values) for name, values in self.hits.items()}

    def as_intervention(
        self, source: Any, *, where: Where | None = None, source_where: Where | None = None
    ) -> ReplaceSubspace:
        """Return the edit that takes this subspace from a source.

        Args:
            source: a `Run` that has read the site, or a tensor; see `ReplaceSubspace`.
            where: the positions; by default the span of the fit, which the prompts must then have.
            source_where: the positions of the source run; the same ones by default.

        Raises:
            WhereError: the fit was not at a named span, and `where` is not given.
        """
        if where is None and self.span is None:
            raise WhereError(f"this subspace was fitted at {self.where}; say where it acts with where=Where(…)")
        place = where or Where(name=self.span, head=self.head)
        return ReplaceSubspace(self.site, source, self.basis, where=place, source_where=source_where)

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per measurement."""
        import pandas as pd

        rows = [
            {"of": name, "iia": e.mean, "low": e.low, "high": e.high, "pairs": len(self.hits[name])}
            for name, e in self.iia.items()
        ]
        return pd.DataFrame(rows)

    def plot(self) -> "plotly.graph_objects.Figure":
        """Draw the interchange accuracies, the fit's and the controls', with 95 % intervals over pairs."""
        from interp.report.figures import Axis
        from interp.report.intervals import interval_bars

        iia = self.iia
        return interval_bars(
            list(iia.values()),
            labels=Axis("", list(iia)),
            title=f"{self.k} of {self.basis.shape[1]} dimensions of {self.site}",
            value="interchange accuracy",
        )

    def summary(self) -> str:
        """Give the accuracy on held-out pairs beside every control's."""
        found = "boundless, " if self.boundary else ""
        lines = [f"{self.site} at {self.where}: {found}{self.k} of {self.basis.shape[1]} dimensions"]
        lines += [f"IIA {name}: {e} ({len(self.hits[name])} pairs)" for name, e in self.iia.items()]
        if self.loss:
            lines.append(f"loss {self.loss[0]:.4g} → {self.loss[-1]:.4g} in {len(self.loss)} steps")
        if self.stopped:
            lines.append("the fit was interrupted; the controls that fit were left out")
        return "\n".join(lines)


def fit_das(
    hm: HookManager,
    pairs: PromptPairs | PairTokens,
    site: Site | str,
    *,
    k: int,
    where: Places = "end",
    labels: Int[Tensor, " pair"] | None = None,
    held_out: Sequence[int] | None = None,
    options: DASOptions | None = None,
) -> DAS:
    """Fit k directions such that the clean run with the corrupted run's part in them gives the corrupted answer.

    A large k can fit anything that the whole site carries, and a small one may use directions that the model does not
    (see `illusion`): read the held-out accuracy beside the controls, which run by default and triple the time.
    Cost: 1 forward and backward per pair and epoch, for the fit and for each control that fits. Memory: 3 d numbers per
    selected position, and a forward and backward of one batch.

    Args:
        hm: The model; its weights are never changed and get no gradients.
        pairs: Clean prompts (base) and corrupted ones (source), with answers and foils.
        site: One site with positions; where it has heads, they stand side by side unless `where` names one.
        k: Dimensions, from 1 to the site's width.
        where: As for `subspace_patch`.
        labels: What the causal model says of each pair after the interchange, as token ids; by default any of its
            foils. Where they are sometimes the clean answer, doing nothing is sometimes right: compare with
            "no patch".
        held_out: The pairs that no fit sees, such as those of other templates; a seeded quarter by default.
        options: Epochs, rates, controls.

    Returns:
        The subspace, with accuracies on held-out pairs and of every control.

    Raises:
        DataError: Pairs without foils where labels are not given, or none left to fit or to measure on.
        ShapeError: k below 1 or above the site's width.
        ModelError: The loss became NaN, or the model cannot be made anew for its control.

    Source: Geiger et al. (2024), arXiv 2303.02536, §3; controls after Hewitt and Liang (2019), arXiv 1909.03368
    (labels) and Wu et al. (2024), arXiv 2401.12631 (random weights). Departures: QR instead of a parametrised rotation
    of all dimensions; accuracy is over the answers and labels of all pairs, not over the vocabulary.
    """
    chosen = options or DASOptions()

    def make(task: Interchange) -> Callable[[], Rotation]:
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= task.width:
            raise ShapeError(f"k={k!r} at {task.site.short}: expected 1 to {task.width}, the width there")
        return lambda: Rotation(k, task.width, seed=chosen.seed, device=task.clean.device)

    return _fitted(hm, pairs, site, make, where=where, labels=labels, held_out=held_out, options=chosen)


def fit_boundless_das(
    hm: HookManager,
    pairs: PromptPairs | PairTokens,
    site: Site | str,
    *,
    where: Places = "end",
    held_out: Sequence[int] | None = None,
    options: DASOptions | None = None,
    temperature: tuple[float, float] = (50.0, 0.1),
    penalty: float = 1.0,
) -> DAS:
    """Fit a rotation together with the number of its dimensions that are interchanged.

    Row i of the d counts with σ((b d − i − ½) / τ): b is learned from ½ at rate 1e-2, τ falls linearly. Measured
    are the first round(b d) rows. Cost and memory as for `fit_das`, and a QR of [d d] per step.

    Args:
        hm: The model.
        pairs: As for `fit_das`.
        site: As for `fit_das`.
        where: As for `subspace_patch`; usually a span.
        held_out: As for `fit_das`.
        options: As for `fit_das`.
        temperature: τ at the first and at the last step, in dimensions: 50 is for widths of thousands, where at first
            all rows near the boundary count alike.
        penalty: What all dimensions together cost, in the loss's unit; 0 lets the subspace grow for nothing.

    Returns:
        The subspace, its number of dimensions learned, and `boundary`: b at each step.

    Raises:
        DataError, ModelError: As for `fit_das`.
        ConfigError: Temperatures that are not positive, or a negative penalty.

    Source: Wu et al. (2023), "Interpretability at Scale", arXiv 2305.08809, §3.
    Departure: row i is at i + ½, so that round(b d) rows weigh more than ½ at any τ.
    """
    if not min(temperature) > 0 or not penalty >= 0:
        raise ConfigError(
            f"temperature={temperature}, penalty={penalty}: expected τ above 0 and a penalty of at least 0"
        )
    chosen = options or DASOptions()

    def make(task: Interchange) -> Callable[[], Rotation]:
        return lambda: Boundary(
            task.width,
            seed=chosen.seed,
            device=task.clean.device,
            temperature=temperature,
            lr=1e-2,
            penalty=penalty,
        )

    return _fitted(hm, pairs, site, make, where=where, labels=None, held_out=held_out, options=chosen)


def _fitted(
    hm: HookManager,
    pairs: PromptPairs | PairTokens,
    site: Site | str,
    make: Callable[[Interchange], Callable[[], Rotation]],
    *,
    where: Places,
    labels: Tensor | None,
    held_out: Sequence[int] | None,
    options: DASOptions,
) -> DAS:
    task = Interchange.of(hm, pairs, site, where=where, batch_size=options.batch_size)
    wanted = Labels.of(task.pairs, labels)
    rotation = make(task)
    rows = split_rows(len(task.pairs), held_out, options)
    fit, hits = controlled(task, wanted, rotation, rows, where=where, options=options)
    base = where[0] if isinstance(where, tuple) else where
    settings = {
        "site": task.site.short,
        "where": described(where),
        "epochs": options.epochs,
        "lr": options.lr,
        "batch_size": options.batch_size,
        "loss": options.loss,
        "controls": options.controls,
    }
    data = (task.pairs.clean.ids, task.pairs.corrupted.ids)
    return DAS(
        provenance=Provenance.of(hm, settings=settings, data=data, seed=options.seed),
        site=task.site.short,
        where=described(where),
        span=base if isinstance(base, str) else None,
        head=task.head,
        basis=fit.rotation.final().cpu(),
        test=rows[1],
        hits=hits,
        loss=fit.losses,
        boundary=_boundary(fit),
        stopped=fit.stopped,
    )


def _boundary(fit: Fit) -> list[float]:
    return [float(share) for _, share in fit.rotation.history] if isinstance(fit.rotation, Boundary) else []
