"""`fit_gate`: where a condition is read best, and above which score it holds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.core.direction import Direction
from interp.core.errors import ConfigError, DataError
from interp.core.fit import auroc
from interp.core.gate import Gate
from interp.core.manager import HookManager
from interp.core.passes import frame_of
from interp.core.result import Provenance, Result
from interp.core.site import Site
from interp.core.where import Where
from interp.data.concept_tokens import NOT_READ, ConceptTokens
from interp.data.contrast import Contrast
from interp.data.pairs import PromptPairs
from interp.steering.fitting.fit import concept_tokens

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

__all__ = ["GateFit", "best_threshold", "fit_gate", "roc"]

_Condition = Direction | Mapping[str, Tensor] | Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class GateFit(Result):
    """How well a condition is told at each site, and the gate of the best one.

    Attributes:
        sites: where it was read.
        threshold: of best F1 on the rows fitted on, one per site.
        above: whether the condition lies above it.
        f1: on the rows fitted on, one per site.
        auroc: the same rows; above 0.5 after the side was chosen.
        held_out_f1: with the same thresholds on rows of other groups.
        held_out_auroc: of those rows.
        curves: by site, false and true positive rates of the held-out rows.
        kind, reduce, where: as for `Gate`; `where` in words.
        rows: how many rows were fitted on and held out.
    """

    title: ClassVar[str] = "Gate"
    sites: list[str]
    threshold: Float[Tensor, " site"]
    above: Bool[Tensor, " site"]
    f1: Float[Tensor, " site"]
    auroc: Float[Tensor, " site"]
    held_out_f1: Float[Tensor, " site"]
    held_out_auroc: Float[Tensor, " site"]
    curves: dict[str, Tensor]
    kind: str
    reduce: str
    where: str
    rows: tuple[int, int]

    @property
    def best(self) -> str:
        """The site of best F1 on the rows fitted on; of several the first."""
        return self.sites[int(self.f1.argmax())]

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per site."""
        import pandas

        held = ("threshold", "above", "f1", "auroc", "held_out_f1", "held_out_auroc")
        layers = [Site(s).layer for s in self.sites]
        return pandas.DataFrame(
            {"site": self.sites, "layer": layers, **{name: getattr(self, name).tolist() for name in held}}
        )

    def plot(self) -> "plotly.graph_objects.Figure":
        """Return the held-out ROC curve of the best sites, at most eight."""
        from interp.report.figures import curves

        order = self.held_out_auroc.nan_to_num(-1).argsort(descending=True, stable=True)[:8].tolist()
        series = {
            f"{self.sites[i]} ({float(self.held_out_auroc[i]):.3f})": (
                self.curves[self.sites[i]][0],
                self.curves[self.sites[i]][1],
            )
            for i in order
        }
        return curves({"held-out true positive rate": series}, x="false positive rate", title="Gate: held-out ROC")

    def summary(self) -> str:
        """Say where the condition is told best."""
        i = self.sites.index(self.best)
        side = "above" if bool(self.above[i]) else "below"
        return (
            f"{self.kind} at {self.best} {side} {float(self.threshold[i]):.4g}: F1 {float(self.f1[i]):.3f} on "
            f"{self.rows[0]} rows, {float(self.held_out_f1[i]):.3f} on {self.rows[1]} held out (AUROC "
            f"{float(self.held_out_auroc[i]):.3f})"
        )

    def gate(
        self, condition: _Condition, site: Site | str | None = None, *, where: Where | None = None, once: str = "prompt"
    ) -> Gate:
        """Return the gate at a site, by default the best.

        Args:
            condition: the one that was fitted; a result holds none.
            site: one of `sites`.
            where: the tokens that were looked at in the fit.
            once: as for `Gate`.

        Raises:
            ConfigError: a site that was not fitted, or other tokens than in the fit.
        """
        short = self.best if site is None else Site(site).short
        if short not in self.sites:
            raise ConfigError(f"{short} was not fitted; fitted are {', '.join(self.sites)}")
        rule = Where(pos=slice(1, None)) if where is None and self.where == _AFTER_BOS else where or Where()
        if repr(rule) != self.where:
            raise ConfigError(f"the threshold was fitted on {self.where}, not on {rule!r}; give where=… as it was")
        i = self.sites.index(short)
        return _gate(
            condition, short, self.kind, self.reduce, rule, threshold=float(self.threshold[i]),
            above=bool(self.above[i]), once=once,
        )  # fmt: skip


_AFTER_BOS = repr(Where(pos=slice(1, None)))


def fit_gate(
    hm: HookManager,
    data: Contrast | ConceptTokens | PromptPairs,
    condition: _Condition,
    sites: Sequence[Site | str] | Site | str | None = None,
    *,
    kind: str = "projection",
    reduce: str = "mean",
    where: Where | None = None,
    seed: int = 0,
) -> GateFit:
    """Fit the threshold of a condition at each site by F1, and measure it on rows of other groups.

    The score is that of `Gate` itself. Thresholds lie in the middle between two scores, the widest gap first among
    equals; the side is the one of AUROC ≥ 0.5. Three tenths of the groups are held out.

    Args:
        hm: the model.
        data: rows with (class 1) and without what should open the gate; each row of one class.
        condition: a direction, vectors by site, or one function of activations for all sites.
        sites: where to read; by default those of the condition.
        kind: as for `Gate`.
        reduce: as for `Gate`.
        where: the tokens that are looked at; by default all after BOS, or all where rows have none.
        seed: of the split.

    Raises:
        ConfigError: a function without sites, or no site.
        DataError: rows of several classes, or one class alone in a part.
        ModelError: a direction of another model.
    """
    tokens = concept_tokens(hm, data, where=Where() if isinstance(data, Contrast | PromptPairs) else None)
    rule = where or (Where(pos=slice(1, None)) if tokens.tokens.bos else Where())
    if sites is None:
        if callable(condition) and not isinstance(condition, Direction | Mapping):
            raise ConfigError("a function says not where it is read; give sites")
        sites = list(condition.vectors) if isinstance(condition, Direction) else list(condition)
    wanted = [sites] if isinstance(sites, str | Site) else list(sites)
    shorts = [found.short for name in wanted for found in hm.atlas.expand(name)]
    if not shorts:
        raise ConfigError("no site to read; give sites=…, such as '6.resid_post'")
    if isinstance(condition, Direction):
        condition.check(hm)
    gates = [_gate(condition, short, kind, reduce, rule) for short in shorts]
    parts = [(_scores(hm, part, gates), _labels(part)) for part in tokens.split(0.3, seed=seed)]
    (fit, y), (held, y_held) = parts
    told = auroc(fit, y.expand_as(fit))
    above = told >= 0.5
    side = torch.where(above, 1.0, -1.0)[:, None].double()
    found = [best_threshold(row, y) for row in fit * side]
    threshold = torch.tensor([t for t, _ in found], dtype=torch.float64) * side[:, 0]
    opened = (held * side) > (threshold[:, None] * side)
    settings = {"kind": kind, "reduce": reduce, "where": repr(rule), "sites": shorts}
    return GateFit(
        provenance=Provenance.of(hm, settings=settings, data=(tokens.tokens.ids, tokens.labels), seed=seed),
        sites=shorts,
        threshold=threshold.float(),
        above=above,
        f1=torch.tensor([f for _, f in found]),
        auroc=torch.where(above, told, 1 - told).float(),
        held_out_f1=torch.stack([_f1(row, y_held) for row in opened]).float(),
        held_out_auroc=auroc(held * side, y_held.expand_as(held)).float(),
        curves={s: roc(row, y_held) for s, row in zip(shorts, held * side, strict=True)},
        kind=kind,
        reduce=reduce,
        where=repr(rule),
        rows=(len(y), len(y_held)),
    )


def best_threshold(scores: Float[Tensor, " row"], truth: Bool[Tensor, " row"]) -> tuple[float, float]:
    """Return the threshold of best F1 for score > threshold, and that F1; of equals the one in the widest gap.

    Args:
        scores: one per row.
        truth: True where the condition holds.
    """
    values, order = scores.double().sort()
    y = truth[order].double()
    true_above = y.sum() - torch.cat([y.new_zeros(1), y.cumsum(0)])[:-1]  # with the threshold just below value i
    n_above = torch.arange(len(y), 0, -1, dtype=torch.float64)
    f1 = 2 * true_above / (n_above + y.sum())
    gap = torch.cat([values.new_full((1,), 1e-300), values.diff()])  # a gate that is always open loses ties
    f1 = f1.masked_fill(gap == 0, -1.0)  # no threshold lies between equal scores
    best = (f1 >= f1.max() - 1e-12).nonzero()[:, 0]
    i = int(best[gap[best].argmax()])
    below = float(values[0]) - 1.0 if i == 0 else float(values[i - 1])
    return (below + float(values[i])) / 2, float(f1[i])


def roc(scores: Float[Tensor, " row"], truth: Bool[Tensor, " row"]) -> Float[Tensor, "two point"]:
    """Return false and true positive rates as the threshold falls from above all scores to below them.

    Args:
        scores: one per row.
        truth: True where the condition holds; both kinds must be there.
    """
    values, order = scores.double().sort(descending=True)
    y = truth[order].double()
    last = torch.cat([values.diff() != 0, torch.ones(1, dtype=torch.bool)])  # equal scores are passed together
    true, false = y.cumsum(0)[last] / y.sum(), (1 - y).cumsum(0)[last] / (1 - y).sum()
    return torch.stack([torch.cat([v.new_zeros(1), v]) for v in (false, true)]).float()


def _gate(condition: Any, site: str, kind: str, reduce: str, where: Where, **more: Any) -> Gate:
    given = condition[site] if isinstance(condition, Direction | Mapping) else condition
    return Gate(site, given, kind=kind, reduce=reduce, where=where, **more)


def _scores(hm: HookManager, data: ConceptTokens, gates: Sequence[Gate]) -> Float[Tensor, "gate row"]:
    found = []
    for start in range(0, len(data), 32):
        part = data.tokens.take(torch.arange(start, min(start + 32, len(data))))
        out, frame = hm.run(part, read=[g.site for g in gates]), frame_of(part, 0, len(part))
        found.append(torch.stack([g.reduced(out[g.site], g.chosen(frame)).double().cpu() for g in gates]))
    return torch.cat(found, dim=1)


def _labels(data: ConceptTokens) -> Bool[Tensor, " row"]:
    top = data.labels.max(1).values
    read = data.labels != NOT_READ
    if bool((read & (data.labels != top[:, None])).any()) or bool((top == NOT_READ).any()):
        raise DataError(
            "a gate decides about rows, and these hold tokens of several classes, or none; give whole texts"
        )
    y = top == 1
    if bool(y.all()) or not bool(y.any()):
        raise DataError(f"all {len(y)} rows of one part are of one class; give more groups of both")
    return y


def _f1(opened: Bool[Tensor, " row"], truth: Bool[Tensor, " row"]) -> Tensor:
    return 2 * (opened & truth).sum() / (opened.sum() + truth.sum())
