"""Sums over activations that are the same however the rows were split: moments, extremes, sketches, co-moments.

Source: moments are merged by the pairwise formulas of Chan, Golub and LeVeque 1979 and Pébay 2008 (SAND2008-6212), the
mean as a sum of two fp64 numbers. Quantiles: DDSketch, Masson, Rim and Lee 2019 (1908.10693), §2, with a fixed range of
buckets that never collapse, so that a merge is exact.
"""

import math
from collections.abc import Sequence
from typing import Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.errors import ArtifactError, ConfigError, DataError, ShapeError

__all__ = ["NOWHERE", "Buckets", "Part", "State", "Statistics"]

_SMALLEST, _LARGEST = 1e-6, 1e6  # the magnitudes that the sketch tells apart
_CHUNK = 1 << 20  # numbers of one site that are worked on at once
_MOST_ROWS = 2**31 - 1  # the counts of the sketch are int32
NOWHERE = 2**63 - 1  # the place of what is not there: after every real one
_MOMENTS, _ROWS = ("n", "mean", "mean_low"), ("rows", "center", "center_low")
_Column = Int[Tensor, "n"]
State = dict[str, Tensor]


class Buckets:
    """The buckets of a sketch in rising order: negative magnitudes (γ^(i−1), γ^i], zero, positive ones."""

    def __init__(self, accuracy: float) -> None:
        if not 0 < accuracy < 1:
            raise ConfigError(f"relative_accuracy={accuracy}: expected a share between 0 and 1, such as 0.01")
        self.accuracy, self.step = accuracy, math.log1p(accuracy) - math.log1p(-accuracy)
        self.first, self.last = (math.ceil(math.log(end) / self.step) for end in (_SMALLEST, _LARGEST))
        self.half = self.last - self.first + 1
        self.size = 2 * self.half + 1

    def index(self, x: Float[Tensor, "n d"]) -> Int[Tensor, "n d"]:
        """The bucket of each number; what lies beyond the range goes to the outermost ones, or to zero."""
        below = self.first - 1
        far = (x.abs().log() / self.step).ceil_().clamp_(below, self.last).sub_(below)
        return (far * x.sign()).long() + self.half

    def values(self, device: torch.device) -> Float[Tensor, "bucket"]:
        """What a number of each bucket is taken for: 2 γ^i / (γ + 1), at most `accuracy` of its value away."""
        i = torch.arange(self.first, self.last + 1, dtype=torch.float64, device=device)
        positive = (i * self.step).exp() * (1 - self.accuracy)
        return torch.cat([-positive.flip(0), positive.new_zeros(1), positive])


class Part(State):
    """What is kept of one site in one class of tokens, by name.

    Of each dimension: n finite and n_bad other values; mean + mean_low (what rounding took from it); m2, m3, m4, which
    are Σ(x − mean)^p; peak, the value of largest |a|, and peak_at (document, position, token id); counts, the sketch.
    Of the site: top and top_at (with the dimension); with covariance, of the rows that are finite throughout: rows,
    center + center_low (their mean) and comoment, Σ(x − mean)(x − mean)ᵀ.
    """

    @staticmethod
    def empty(d: int, top: int, covariance: bool, buckets: Buckets) -> "Part":
        """The sums of no rows: of width `d`, with room for `top` extremes and, if wanted, for the co-moments."""
        w, whole = d if covariance else 0, ("n", "n_bad", "peak_at", "top_at", "rows")
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("mean", "mean_low", "m2", "m3", "m4", "peak"), (d,))
        shapes |= {"n": (d,), "n_bad": (d,), "peak_at": (d, 3), "top": (top,), "top_at": (top, 4), "rows": (1,)}
        shapes |= {"center": (w,), "center_low": (w,), "comoment": (w, w), "counts": (d, buckets.size)}
        kinds = dict.fromkeys(whole, torch.long) | {"counts": torch.int32}
        made = {name: torch.zeros(shape, dtype=kinds.get(name, torch.float64)) for name, shape in shapes.items()}
        return Part({k: value.fill_(NOWHERE) if k.endswith("_at") else value for k, value in made.items()})

    def add(self, x: Float[Tensor, "n d"], at: Int[Tensor, "n 3"], buckets: Buckets) -> None:
        """Take in rows in fp64, in the order of their places (document, position, token id)."""
        good = x.isfinite()
        x = x.where(good, 0)
        *means, dev = _centred(x, good)
        square = dev * dev
        new = dict(zip(_MOMENTS, means, strict=True), n_bad=(~good).sum(0), m2=square.sum(0))
        new |= {"m3": (square * dev).sum(0), "m4": (square * square).sum(0)}
        # Of equal values these give the first row, which is the first place.
        ends = (x.masked_fill(~good, -math.inf).max(0), x.masked_fill(~good, math.inf).min(0))
        some = good.any(0)
        found = [(value.where(some, 0), at[row].where(some[:, None], NOWHERE)) for value, row in ends]
        new["peak"], new["peak_at"] = _first(*found)
        new["top"], new["top_at"] = _highest(x, at, good, len(self["top"]))
        if self["comoment"].numel():
            *means, dev = _centred(x, good.all(1, keepdim=True))
            new |= {**dict(zip(_ROWS, means, strict=True)), "comoment": dev.T @ dev}
        self.merge(new)
        flat = (buckets.index(x) + torch.arange(x.shape[1], device=x.device) * buckets.size).flatten()
        self["counts"].view(-1).index_add_(0, flat, good.flatten().int())

    def merge(self, other: State) -> None:
        """Take in what another one, of the same layout and device, has seen; its sketch may be left out."""
        (delta, p, q, weight), (mean, low) = _joined(*([s[name] for name in _MOMENTS] for s in (self, other)))
        (m2, m3, m4), (o2, o3, o4) = ([s[name] for name in ("m2", "m3", "m4")] for s in (self, other))
        square = delta * delta
        self["m2"] = m2 + o2 + square * weight
        self["m3"] = m3 + o3 + square * delta * weight * (p - q) + 3 * delta * (p * o2 - q * m2)
        crossed = 6 * square * (p * p * o2 + q * q * m2) + 4 * delta * (p * o3 - q * m3)
        self["m4"] = m4 + o4 + square * square * weight * (1 - 3 * p * q) + crossed
        self |= {"mean": mean, "mean_low": low, "n": self["n"] + other["n"], "n_bad": self["n_bad"] + other["n_bad"]}
        self["peak"], self["peak_at"] = _first(*((s["peak"], s["peak_at"]) for s in (self, other)))
        top, at = (torch.cat([self[name], other[name]]) for name in ("top", "top_at"))
        order = _order(_keys(top, at))[: len(self["top"])]
        self |= {"top": top[order], "top_at": at[order]}
        if self["comoment"].numel():
            (delta, _, _, weight), (mean, low) = _joined(*([s[name] for name in _ROWS] for s in (self, other)))
            step = delta * weight.sqrt()
            self["comoment"].add_(other["comoment"]).addr_(step, step)
            self |= {"center": mean, "center_low": low, "rows": self["rows"] + other["rows"]}
        if "counts" in other:
            self["counts"] += other["counts"]


def _centred(x: Tensor, counted: Bool[Tensor, "n _"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Count, mean (as two numbers) and deviations of the entries that count; others deviate by 0."""
    n = counted.sum(0)
    size = n.clamp_min(1)
    mean = x.where(counted, 0).sum(0) / size
    dev = (x - mean).where(counted, 0)
    low = dev.sum(0) / size
    return n, mean, low, (dev - low).where(counted, 0)


def _joined(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor]]:
    """Of two (count, mean, low): difference of the means, shares p and q, n p q; and the joint mean and low."""
    (n, mean, low), (m, other, other_low) = a, b
    total = (n + m).clamp_min(1).double()
    p, q = n / total, m / total
    delta = ((other - mean) + (other_low - low)).where((n > 0) & (m > 0), 0)
    low = low + delta * q
    high = mean + low
    back = high - mean
    rest = (mean - (high - back)) + (low - back)  # two-sum: exactly what rounding took from `high`
    return (delta, p, q, n * q), (high.where(n > 0, other), rest.where(n > 0, other_low))


def _keys(value: Tensor, at: Tensor) -> list[Tensor]:
    """What orders values: magnitude, document, position, dimension, token id, sign."""
    columns = (0, 1, 2) if at.shape[-1] == 3 else (0, 1, 3, 2)
    return [-value.abs(), *(at[..., i] for i in columns), -value]


def _first(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Of two values and their places, dimension by dimension, what comes first."""
    first, tie = torch.zeros_like(a[0], dtype=torch.bool), torch.ones_like(a[0], dtype=torch.bool)
    for mine, other in zip(_keys(*a), _keys(*b), strict=True):
        first, tie = first | (tie & (mine < other)), tie & (mine == other)
    return a[0].where(first, b[0]), a[1].where(first[:, None], b[1])


def _order(keys: Sequence[Tensor]) -> Int[Tensor, "n"]:
    """Indices that sort by the first key, then by the second, and so on."""
    order = keys[-1].argsort(stable=True)
    for key in reversed(keys[:-1]):
        order = order[key[order].argsort(stable=True)]
    return order


def _highest(x: Tensor, at: Tensor, good: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and places among which the k largest |a| are: the first k of each of the k rows with the first maxima."""
    size = x.abs().masked_fill(~good, -1)
    most, dim = size.max(1)  # the first dimension of equal ones
    keys = _keys(x.gather(1, dim[:, None])[:, 0], torch.cat([at, dim[:, None]], 1))
    rows = _order([-most, *keys[1:]])[:k]
    dims = size[rows].sort(dim=1, descending=True, stable=True).indices[:, :k]
    place = torch.cat([at[rows][:, None].expand(-1, dims.shape[1], -1), dims[..., None]], 2)
    place = place.where(good[rows].gather(1, dims)[..., None], NOWHERE)
    return x[rows].gather(1, dims).flatten(), place.flatten(0, 1)


class Statistics:
    """Accumulates the statistics of one site, class by class, and merges them with those of other text.

    Of each class and dimension it keeps count, mean, second to fourth central moment (fp64), largest |a| with its place
    and a quantile sketch; of each class the `top` largest |a| with their places. Of equal |a| the first document comes
    first, then the first position, then the first dimension, in whatever order things are added and merged. A NaN or
    infinite value is counted in `n_bad` and left out of all else; the covariance leaves out its row. The sketch tells
    magnitudes from 1e-6 to 1e6 apart: smaller ones count as zero, larger ones lie in the outermost bucket of their
    sign. `SiteStatistics(statistics.state())` reads it.

    Memory, in bytes, for C classes and B = 2 (⌈ln 1e6 / s⌉ − ⌈ln 1e-6 / s⌉ + 1) + 1 buckets of width
    s = ln((1 + α) / (1 − α)), 2765 of them for α = 0.01: C (d (4 B + 88) + 40 top + 8), with covariance C (8 d² + 16 d)
    more; 8 more in `state()`. While adding, 150 MiB or 150 d if that is more; with covariance 8 d² more.

    Args:
        d: width of the site; sites with heads are flattened.
        n_classes: classes of tokens, C.
        top: how many of the largest |a| of each class are kept.
        covariance: whether to keep the covariance of each class.
        relative_accuracy: α, the most that a quantile may be off, as a share of its value.

    Raises:
        ConfigError: a size below one, or an accuracy that is not between 0 and 1.
    """

    def __init__(
        self, d: int, *, n_classes: int = 3, top: int = 20, covariance: bool = False, relative_accuracy: float = 0.01
    ) -> None:
        if min(d, n_classes, top) < 1:
            raise ConfigError(f"d={d}, n_classes={n_classes}, top={top}: expected whole numbers ≥ 1")
        self.d, self.n_classes, self._rows, self._buckets = d, n_classes, 0, Buckets(relative_accuracy)
        self._settings = (d, n_classes, top, covariance, relative_accuracy)
        self._parts = [Part.empty(d, top, covariance, self._buckets) for _ in range(n_classes)]

    @torch.no_grad()
    def add(self, x: Float[Tensor, "n d"], *, classes: _Column, doc: _Column, pos: _Column, ids: _Column) -> None:
        """Take in some tokens' activations; with all but `x` on the CPU, nothing waits for the device.

        Args:
            x: activations of any float dtype; the first ones decide on which device the statistics are kept.
            classes, doc, pos, ids: each token's class, from 0, its document, its position there, and its token id.

        Raises:
            ShapeError: a tensor of another shape or dtype.
            DataError: a class that is not there, or more than 2³¹ − 1 rows in all.
        """
        columns = {"classes": classes, "doc": doc, "pos": pos, "ids": ids}
        bad = [name for name, c in columns.items() if c.shape != x.shape[:1] or c.is_floating_point()]
        if bad or x.shape[1:] != (self.d,) or not x.is_floating_point():
            came = ", ".join(f"{k} {c.dtype} {tuple(c.shape)}" for k, c in {"x": x, **columns}.items())
            raise ShapeError(f"expected floats x [n {self.d}], whole numbers {list(columns)} [n]; got {came}")
        host = [column.long().cpu() for column in columns.values()]
        odd = host[0][(host[0] < 0) | (host[0] >= self.n_classes)].unique().tolist()
        if odd:
            raise DataError(f"classes {odd[:8]}: expected 0 … {self.n_classes - 1}; leave other rows out")
        x = x.to(self._expect(len(x), x.device))
        order, step = _order(host), max(1, _CHUNK // self.d)
        sizes = host[0].bincount(minlength=self.n_classes).tolist()
        rows, at = (t.to(x.device, non_blocking=True) for t in (order, torch.stack(host[1:], 1)[order]))
        for part, mine, places in zip(self._parts, rows.split(sizes), at.split(sizes), strict=True):
            for chunk in (slice(begin, begin + step) for begin in range(0, len(mine), step)):
                part.add(x.index_select(0, mine[chunk]).double(), places[chunk], self._buckets)

    @torch.no_grad()
    def merge(self, other: "Statistics") -> None:
        """Take in all that another accumulator has seen, which stays as it is; ConfigError if it has other settings."""
        if self._settings != other._settings:
            what = f"(d, n_classes, top, covariance, accuracy) are {self._settings} here and {other._settings} there"
            raise ConfigError(f"statistics of other settings cannot be merged: {what}; make both alike")
        device = self._expect(other._rows, other._parts[0]["n"].device)
        for part, more in zip(self._parts, other._parts, strict=True):
            part.merge({name: value.to(device) for name, value in more.items()})

    def state(self) -> dict[str, Tensor]:
        """Return a copy of all that is kept, as plain tensors with the classes along the first axis."""
        stacked = {name: torch.stack([part[name] for part in self._parts]) for name in self._parts[0]}
        return {**stacked, "relative_accuracy": torch.tensor(self._buckets.accuracy, dtype=torch.float64)}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Self:
        """Return an accumulator that goes on from a copy of a state, on its device; ArtifactError if it is none."""
        try:
            (n_classes, d), (_, top), accuracy = state["n"].shape, state["top"].shape, float(state["relative_accuracy"])
            wide = state["comoment"].numel() > 0
            made = cls(d, n_classes=n_classes, top=top, covariance=wide, relative_accuracy=accuracy)
            for name, zeros in made._parts[0].items():
                if state[name].dtype != zeros.dtype or state[name].shape != (n_classes, *zeros.shape):
                    raise ValueError(f"{name} is {state[name].dtype} {tuple(state[name].shape)}")
        except (KeyError, ValueError) as err:
            raise ArtifactError(f"this is no state of statistics ({err}); give what state() returned") from err
        made._parts = [Part({name: state[name][c].clone() for name in made._parts[0]}) for c in range(n_classes)]
        made._rows = int((state["n"] + state["n_bad"])[:, 0].sum())
        return made

    def _expect(self, rows: int, device: torch.device) -> torch.device:
        """Make room for rows from a device; the answer is where all is kept."""
        if self._rows + rows > _MOST_ROWS:
            raise DataError(f"{self._rows + rows:,} rows; the sketch counts to {_MOST_ROWS:,}: keep several of fewer")
        device = torch.device("cpu") if device.type == "mps" else device  # which has no fp64
        if not self._rows:
            self._parts = [Part({name: value.to(device) for name, value in part.items()}) for part in self._parts]
        self._rows += rows
        return self._parts[0]["n"].device
