"""How much of a dictionary's error is a linear function of the activation: its dark matter."""

import importlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.errors import ConfigError, DataError, ShapeError
from interp.core.result import Provenance, Result
from interp.core.site import Site
from interp.data.store import ActivationStore
from interp.data.tokens import TokenSource
from interp.dictionaries.base import Dictionary
from interp.evaluate.dictionary import place_of
from interp.evaluate.noise import ratio_interval, t_quantile
from interp.evaluate.reading import encoded_in_parts
from interp.evaluate.samples import Samples

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

    from interp.core.manager import HookManager

__all__ = ["DarkMatter", "dark_matter", "dark_matter_of"]

_GROUPS = 64  # of units, for the interval of a mean over dimensions
_FIGURES = ("fvu", "fvu_nonlinear", "linear_share", "r2", "r2_pooled", "norm_r2")


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class DarkMatter(Result):
    """How much of a dictionary's error e = x − x̂ a linear map of x predicts, on tokens that the map was not fitted on.

    ê = Wx + b is the least-squares prediction. All figures are of the tokens that were not fitted on.

    Attributes:
        site: TransformerLens' name of the site, as far as it is known.
        unit: what the independent units of `intervals` are: "row", "document", or "" where tokens came without.
        n_fit: tokens that the map was fitted on.
        n_tokens: tokens that everything else was measured on.
        n_units: units that these came in.
        rank: directions of x that the fit used; see `rcond`.
        fvu: Σ‖e‖² / Σ‖x − x̄‖².
        fvu_nonlinear: Σ‖e − ê‖² / Σ‖x − x̄‖²: what stays when the linear part of the error is added back.
        linear_share: 1 − fvu_nonlinear / fvu: the share of the squared error that is linear in x (with its mean).
        r2: mean over output dimensions of 1 − SSR / SST; the paper's figure. It depends on the basis.
        r2_pooled: 1 − ΣSSR / ΣSST, dimensions summed before dividing. It does not depend on the basis.
        norm_r2: R² of ‖e‖² as predicted linearly from x.
        r2_by_dim: 1 − SSR / SST of each dimension; NaN where the error does not vary.
        intervals: figure → 95 % interval (low, high), over units; NaN where units are not known or one only. They are
            of the map that was fitted: the best one's R² is higher, by about (1 − R²) · d / n_fit.
        notes: what is undefined, and why.
    """

    title: ClassVar[str] = "Dark matter"
    site: str
    unit: str
    n_fit: int
    n_tokens: int
    n_units: int
    rank: int
    fvu: float
    fvu_nonlinear: float
    linear_share: float
    r2: float
    r2_pooled: float
    norm_r2: float
    r2_by_dim: Float[Tensor, "d"]
    intervals: dict[str, tuple[float, float]]
    notes: list[str]

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per figure: `figure`, `value`, and the 95 % interval from `low` to `high`."""
        import pandas as pd

        low, high = zip(*(self.intervals[name] for name in _FIGURES), strict=True)
        values = [getattr(self, name) for name in _FIGURES]
        return pd.DataFrame({"figure": _FIGURES, "value": values, "low": low, "high": high})

    def plot(self) -> "plotly.graph_objects.Figure":
        """Return the error as bars: all of it, its linear part and the rest, in shares of the variance."""
        figures = importlib.import_module("interp.report.figures")
        heights = torch.tensor([self.fvu, self.fvu - self.fvu_nonlinear, self.fvu_nonlinear], dtype=torch.float64)
        labels = figures.Axis("", ["error", "linear in x", "not linear"])
        return figures.bars(heights, labels=labels, title=f"Error at {self.site}", value="share of the variance")

    def summary(self) -> str:
        """Say how much of the error is linear, with 95 % intervals."""
        lines = [
            f"{self.site}: FVU {self._said('fvu')}, not linear in x {self._said('fvu_nonlinear')}; linear share of the "
            f"error {self._said('linear_share')}",
            f"R² of the error: mean over dimensions {self._said('r2')}, pooled {self._said('r2_pooled')}; of its "
            f"squared norm {self._said('norm_r2')}",
            f"fitted on {self.n_fit:,} tokens (rank {self.rank} of {len(self.r2_by_dim)}), measured on "
            f"{self.n_tokens:,} others" + (f" in {self.n_units:,} {self.unit}s" if self.unit else ""),
        ]
        return "\n".join(lines + self.notes)

    def _said(self, name: str) -> str:
        low, high = self.intervals[name]
        margin = f" ± {(high - low) / 2:.4f}" if math.isfinite(high - low) else ""
        return f"{getattr(self, name):.4f}{margin}"


def dark_matter(
    hm: "HookManager",
    tokens: TokenSource,
    dictionary: Dictionary,
    site: str | Site | None = None,
    *,
    max_tokens: int = 300_000,
    fit_share: float = 1 / 3,
    rcond: float = 1e-12,
) -> DarkMatter:
    """Measure how much of a dictionary's error is linear in the activation, running the text through a model.

    The text is run twice, up to the site: once to fit, once to measure. Special tokens are left out. See
    `dark_matter_of` for the arguments and the source.

    Args:
        hm: the manager of the model.
        tokens: text that the dictionary was not trained on.
        dictionary: a dictionary that reconstructs what it reads, on the model's device.
        site: where it acts; None for where it was trained.
        max_tokens: how many tokens to run, special ones and pads included; whole blocks are run.
        fit_share: share of the rows that the map is fitted on.
        rcond: cut-off of the fit.

    Raises:
        ConfigError: the dictionary does not fit the site, or a share that is not between 0 and 1.
        DataError: too few tokens, or activations that are not finite.

    Source: Engels et al. 2024, "Decomposing the dark matter of sparse autoencoders" (2410.14670); see `dark_matter_of`.
    """
    place = place_of(hm, dictionary, site)
    samples = Samples.of_text(hm, tokens, place, max_tokens=max_tokens, doing="measuring dark matter")
    found = _measured(samples, dictionary, fit_share, rcond)
    settings: dict[str, Any] = {"max_tokens": max_tokens, "text": tokens.describe(), "special_tokens": "left out"}
    settings |= {"site": place.name, "fit_share": fit_share, "rcond": rcond}
    return DarkMatter(site=place.name, provenance=Provenance.of(hm, settings=settings), **found)


def dark_matter_of(
    data: ActivationStore | Float[Tensor, "*unit token d"] | Samples,
    dictionary: Dictionary,
    *,
    site: str | Site | None = None,
    max_tokens: int = 300_000,
    fit_share: float = 1 / 3,
    rcond: float = 1e-12,
) -> DarkMatter:
    """Measure how much of a dictionary's error is linear in the activation, on activations that are at hand.

    W and b minimise Σ‖e − Wx − b‖² over the tokens of the fit, through normal equations about the first part's mean,
    summed in fp64. They are solved through the eigenvalues of the covariance of x: directions whose eigenvalue is at
    most max(rcond, d · 2.2e-16) times the largest are left out. (A singular value of x is the root of an eigenvalue:
    1e-12 is 1e-6 of the largest singular value.) Memory, in bytes: 48 · d², 1536 · d for the interval of `r2`, 56 per
    unit, and about 64 MiB for latents.

    Args:
        data: a store, which is read twice; or activations [token d] or [row token d].
        dictionary: a dictionary that reconstructs what it reads.
        site: which of a store's sites.
        max_tokens: how many tokens of it.
        fit_share: share of the units that the map is fitted on: rows, documents of a stored store, or tokens where
            neither is known (then tokens of one document may be on both sides).
        rcond: cut-off of the fit; see above.

    Returns:
        The figures, of the tokens that were not fitted on. A dictionary whose error is within rounding has R² of NaN.

    Raises:
        ConfigError: a share that is not between 0 and 1, or a site that the store does not have.
        DataError: not more tokens to fit on than dimensions, too few others, or values that are not finite.
        ShapeError: a dictionary that gives something else than it reads.

    Source: Engels, Riggs, Tegmark 2024 (2410.14670) §§3, 4. Departures: whole rows or documents are on one side, not
    tokens; the cut-off is on eigenvalues, because fp64 normal equations do not resolve the paper's 1e-9 of the largest
    singular value; `r2_pooled` stands beside the mean over dimensions; positions are not dropped.
    """
    samples = Samples.of(data, site, max_tokens=max_tokens)
    settings = {"max_tokens": max_tokens, "fit_share": fit_share, "rcond": rcond}
    name, provenance = samples.origin(dictionary, site, settings)
    return DarkMatter(site=name, provenance=provenance, **_measured(samples, dictionary, fit_share, rcond))


@torch.no_grad()
def _measured(samples: Samples, dictionary: Dictionary, fit_share: float, rcond: float) -> dict[str, Any]:
    if not 0 < fit_share < 1 or not 0 <= rcond < 1:
        raise ConfigError(f"fit_share={fit_share}, rcond={rcond}: the share is between 0 and 1, rcond from 0 to 1")
    sums = _Sums()
    for x, _, mine in samples.dealt(fit_share):
        for rows, error, _ in _errors(dictionary, x[mine]):
            sums.add(rows, error)
    if sums.n <= sums.d + 1:
        raise DataError(
            f"the fit has {sums.n} tokens for {sums.d} dimensions and a bias; it needs more than {sums.d + 1}, better "
            f"ten times as many: give more text, raise max_tokens, or raise fit_share={fit_share:.3g}"
        )
    line = sums.solved(rcond)
    test = _Test(line)
    for x, unit, mine in samples.dealt(fit_share):
        number = torch.zeros(len(x), dtype=torch.long, device=x.device) if unit is None else unit
        others = number[~mine]
        for rows, error, part in _errors(dictionary, x[~mine]):
            test.add(rows, error, others[part].to(rows.device))
    if test.n < 2:
        raise DataError(f"{test.n} tokens are left to measure on; give more text, or lower fit_share={fit_share:.3g}")
    return {"unit": samples.unit, "n_fit": sums.n, "rank": line.rank, **test.figures(_rounding(dictionary))}


def _errors(dictionary: Dictionary, x: Tensor) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """A few tokens at a time: x and x − x̂ in fp64, and which tokens they are."""
    x = x.to(dictionary.W_dec.device)
    if not bool(x.isfinite().all()):
        raise DataError(f"{int((~x.isfinite()).any(-1).sum())} of {len(x)} activations are NaN or infinite; find where")
    for part, latents in encoded_in_parts(dictionary, x[:, None]):
        near = dictionary.reconstructed_seen(latents, x[part][:, None])[:, 0]
        rows = dictionary.seen(x[part])
        if near.shape != rows.shape:
            raise ShapeError(f"the dictionary reads {rows.shape[-1]} dimensions and gives {near.shape[-1]}; not an SAE")
        if not bool(near.isfinite().all()):
            raise DataError("the dictionary's reconstruction is NaN or infinite at finite activations; is it damaged?")
        yield rows.double(), rows.double() - near.double(), part


def _targets(error: Float[Tensor, "token d"]) -> Float[Tensor, "token e"]:
    """What is predicted: the error, and its squared norm in the last column."""
    return torch.cat([error, error.pow(2).sum(-1, keepdim=True)], 1)


@dataclass(frozen=True)
class _Line:
    """A linear prediction y ≈ (x − x̄) W + ȳ, with the means of the fit."""

    W: Float[Tensor, "d e"]
    x_mean: Float[Tensor, "d"]
    y_mean: Float[Tensor, "e"]
    rank: int


class _Sums:
    """The normal equations of y on x with a bias, in fp64, about the first part's means."""

    def __init__(self) -> None:
        self.n, self.d = 0, 0

    def add(self, x: Float[Tensor, "token d"], error: Float[Tensor, "token d"]) -> None:
        if not len(x):
            return
        y = _targets(error)
        if self.n == 0:
            self.d = x.shape[1]
            self.x0, self.y0 = x.mean(0), y.mean(0)
            self.sx, self.sy = torch.zeros_like(self.x0), torch.zeros_like(self.y0)
            self.xx, self.xy = x.new_zeros(self.d, self.d), x.new_zeros(self.d, self.d + 1)
        x, y = x - self.x0, y - self.y0
        self.n += len(x)
        self.sx += x.sum(0)
        self.sy += y.sum(0)
        self.xx += x.T @ x
        self.xy += x.T @ y

    def solved(self, rcond: float) -> _Line:
        x, y = self.sx / self.n, self.sy / self.n
        variances, directions = torch.linalg.eigh(self.xx / self.n - torch.outer(x, x))
        kept = variances > max(rcond, self.d * torch.finfo(torch.float64).eps) * variances[-1].clamp_min(0)
        if not bool(kept.any()):
            raise DataError(f"the activation is the same at all {self.n} tokens of the fit; give other text")
        basis = directions[:, kept]
        W = basis @ ((basis.T @ (self.xy / self.n - torch.outer(x, y))) / variances[kept, None])
        return _Line(W, self.x0 + x, self.y0 + y, int(kept.sum()))


class _Test:
    """Sums over the tokens that were not fitted on: by unit, and by dimension for groups of units."""

    def __init__(self, line: _Line) -> None:
        self.line, self.n, d = line, 0, len(line.x_mean)
        self.by_unit = line.W.new_zeros(0, 7)
        self.by_dim = line.W.new_zeros(_GROUPS, 3, d)
        self.x_off, self.power, self.norm_off = line.W.new_zeros(d), line.W.new_zeros(d), line.W.new_zeros(())

    def add(self, x: Float[Tensor, "token d"], error: Float[Tensor, "token d"], unit: Int[Tensor, "token"]) -> None:
        if not len(x):
            return
        self.n += len(x)
        y, apart = _targets(error), x - self.line.x_mean
        spread = y - self.line.y_mean
        missed = spread - apart @ self.line.W
        sums = [torch.ones_like(x[:, 0]), y[:, -1]]
        sums += [part[:, :-1].pow(2).sum(1) for part in (missed, spread)] + [apart.pow(2).sum(1)]
        sums += [part[:, -1].pow(2) for part in (missed, spread)]
        lacking = int(unit.max()) + 1 - len(self.by_unit)
        if lacking > 0:
            self.by_unit = torch.cat([self.by_unit, self.by_unit.new_zeros(max(lacking, len(self.by_unit)), 7)])
        self.by_unit.index_add_(0, unit, torch.stack(sums, 1))
        held = torch.stack([missed[:, :-1].pow(2), spread[:, :-1].pow(2), spread[:, :-1]], 1)
        self.by_dim.index_add_(0, unit % _GROUPS, held)
        self.norm_off += spread[:, -1].sum()
        self.x_off += apart.sum(0)
        self.power += x.pow(2).sum(0)

    def figures(self, floor: float) -> dict[str, Any]:
        """All figures; errors whose squares sum to no more than `floor` of those of x are rounding."""
        numbers = (self.by_unit[:, 0] > 0).nonzero()[:, 0]
        n, e, rest, spread, x, norm_rest, norm_spread = self.by_unit[numbers].T.cpu()
        # Sums about the means of the fit, moved to those of these tokens. That each unit's part moves by its share
        # makes the totals exact, and the intervals right to first order.
        off = self.by_dim[:, 2].sum(0) / self.n
        spread = spread - n * float(off.pow(2).sum())
        variance = x - n * float((self.x_off / self.n).pow(2).sum())
        norm_spread = norm_spread - n * float(self.norm_off / self.n) ** 2
        ratios = {"fvu": (e, variance), "fvu_nonlinear": (rest, variance)}
        shares = {"linear_share": (rest, e), "r2_pooled": (rest, spread), "norm_r2": (norm_rest, norm_spread)}
        found: dict[str, Any] = {name: _ratio(*pair) for name, pair in ratios.items()}
        found |= {name: 1 - _ratio(*pair) for name, pair in shares.items()}
        ends = _ends(ratios)
        ends |= {name: (1 - high, 1 - low) for name, (low, high) in _ends(shares).items()}
        counts = n.new_zeros(_GROUPS).index_add_(0, numbers.cpu() % _GROUPS, n)
        by_dim, found["r2"], ends["r2"] = _over_dims(self.by_dim.cpu(), off.cpu(), counts, floor * self.power.cpu())
        notes = []
        if float(e.sum()) <= floor * float(self.power.sum()):
            notes.append("the error is within rounding of nothing: R² and the linear share are undefined")
            by_dim = torch.full_like(by_dim, math.nan)
            found |= dict.fromkeys([*shares, "r2"], math.nan)
            ends |= dict.fromkeys([*shares, "r2"], (math.nan, math.nan))
        elif bool(by_dim.isnan().any()):
            notes.append(f"the error does not vary in {int(by_dim.isnan().sum())} dimensions, which r2 leaves out")
        if float(variance.sum()) <= 0:
            notes.append("the activation does not vary on the tokens measured: FVU is undefined")
        units = {"n_tokens": self.n, "n_units": len(numbers)}
        return {**units, **found, "r2_by_dim": by_dim, "intervals": ends, "notes": notes}


def _over_dims(
    sums: Float[Tensor, "group 3 d"], off: Float[Tensor, "d"], counts: Float[Tensor, "group"], least: Float[Tensor, "d"]
) -> tuple[Float[Tensor, "d"], float, tuple[float, float]]:
    """R² of each dimension, their mean, and its interval over groups of units (t, delta method)."""
    rest, spread = sums[:, 0], sums[:, 1] - counts[:, None] * off.pow(2)
    total = spread.sum(0)
    missed = (rest.sum(0) / total).where(total > least, math.nan)
    good, groups = ~missed.isnan(), int((counts > 0).sum())
    if not bool(good.any()):
        return missed, math.nan, (math.nan, math.nan)
    mean, half = 1 - float(missed[good].mean()), math.nan
    if groups > 1:
        pull = ((rest - missed * spread) / total)[:, good].mean(1)
        half = t_quantile(groups - 1) * math.sqrt(float(pull.pow(2).sum()) * groups / (groups - 1))
    return 1 - missed, mean, (mean - half, mean + half)


def _ratio(part: Tensor, whole: Tensor) -> float:
    total = float(whole.sum())
    return float(part.sum()) / total if total > 0 else math.nan


def _ends(pairs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[float, float]]:
    return {name: ratio_interval(*pair) for name, pair in pairs.items()}


def _rounding(dictionary: Dictionary) -> float:
    """Squared errors below this share of the squared activations may be rounding alone: 4 units in the last place of
    the result, and of each term of a sum over the width, which is kept in fp32 at least."""
    last = torch.finfo(dictionary.W_dec.dtype).eps
    inner = min(last, torch.finfo(torch.float32).eps)
    return 16 * (last**2 + dictionary.cfg.d_in * inner**2)
