"""How many bits a token's activation takes when a dictionary's latents are written down: minimum description length."""

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

__all__ = ["DescriptionLength", "description_length", "description_length_of"]

_GROUPS = 16  # of units, for intervals
_PENDING = 1 << 21  # firings that are held before they are counted
_CELL_BITS = 39  # of a key; the rest is for the group and the latent
_MIDDLE = 1 << (_CELL_BITS - 1)
_HALVINGS, _BISECTIONS = 36, 6
_BITS = ("bits", "bits_firing", "bits_values", "bits_joint", "dense_bits", "dense_bits_matched", "one_hot_bits")
_FIGURES = (*_BITS, "l0", "fvu", "extra_fvu")


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class DescriptionLength(Result):
    """Bits per token for the latents of a dictionary, and for what one would write down instead.

    Latent f has value a; where a ≠ 0 it fires, and its value is written as the number ⌊a / Δ_f⌋ of a cell of width
    Δ_f = step / ‖W_dec[f]‖, and read as the middle of the cell. Zeros are in no cell; no value is clamped.

    Attributes:
        site: TransformerLens' name of the site, as far as it is known.
        unit: what the tokens came in: "row", "document", or "" where that is not known.
        n_tokens: tokens that were counted; those by which the step was chosen come on top.
        n_units: units that these came in.
        epsilon: how much FVU writing down the values may cost.
        step: the cell's width, in units of the activation; NaN where nothing fired when it was chosen.
        l0: mean number of latents that fire per token.
        fvu: Σ‖x − x̂‖² / Σ‖x − x̄‖² before values are written down.
        extra_fvu: how much is added by that, on the tokens counted; about `epsilon`, which held on other tokens.
        bits: Σ_f [H_b(p_f) + p_f · H(cell | f fires)], latents coded independently; the description length.
        bits_firing: its part Σ_f H_b(p_f): which latents fire.
        bits_values: its part Σ_f p_f · H(cell | f fires).
        bits_joint: l0 · bits_per_value + log2 C(d_sae, l0): the set of those that fire coded as one, its size known,
            and values with one fixed length; no statistics of single latents are used.
        bits_per_value: log2 of the number of cells from the lowest to the highest in use.
        undersampling: by about how many bits `bits` is too low because few firings fill many cells (Miller-Madow).
        dense_bits: Σ over dimensions of the entropy of x in cells of the width that costs an FVU of `epsilon`.
        dense_bits_matched: the same at the dictionary's own total error, an FVU of `fvu` + `epsilon`.
        one_hot_bits: log2 n_tokens + dense_bits: each token its own atom, which is named and, since no other token
            shares it, written down.
        firing: on how many tokens each latent fired.
        latent_bits: what each latent adds to `bits`.
        intervals: figure → 95 % interval (low, high) over units, t with up to 15 degrees of freedom; NaN where units
            are not known.
        notes: what is undefined, and why.
    """

    title: ClassVar[str] = "Description length"
    site: str
    unit: str
    n_tokens: int
    n_units: int
    epsilon: float
    step: float
    l0: float
    fvu: float
    extra_fvu: float
    bits: float
    bits_firing: float
    bits_values: float
    bits_joint: float
    bits_per_value: float
    undersampling: float
    dense_bits: float
    dense_bits_matched: float
    one_hot_bits: float
    firing: Int[Tensor, "d_sae"]
    latent_bits: Float[Tensor, "d_sae"]
    intervals: dict[str, tuple[float, float]]
    notes: list[str]

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per figure: `figure`, `value`, and the 95 % interval from `low` to `high`."""
        import pandas as pd

        ends = [self.intervals.get(name, (math.nan, math.nan)) for name in _FIGURES]
        low, high = zip(*ends, strict=True)
        values = [getattr(self, name) for name in _FIGURES]
        return pd.DataFrame({"figure": _FIGURES, "value": values, "low": low, "high": high})

    def plot(self) -> "plotly.graph_objects.Figure":
        """Return the bits of the dictionary beside those of the other ways to write a token down."""
        figures = importlib.import_module("interp.report.figures")
        bars = {
            "latents": self.bits,
            "latents, joint": self.bits_joint,
            "dense": self.dense_bits,
            "dense, same error": self.dense_bits_matched,
            "one-hot": self.one_hot_bits,
        }
        title = f"Description length at {self.site} (values at {self.epsilon:g} of the variance)"
        heights = torch.tensor(list(bars.values()), dtype=torch.float64)
        return figures.bars(heights, labels=figures.Axis("", list(bars)), title=title, value="bits per token")

    def summary(self) -> str:
        """Say the description length, what it is made of, and what it stands beside."""
        low, high = self.intervals["bits"]
        margin = f" ± {(high - low) / 2:.2f}" if math.isfinite(high - low) else ""
        lines = [
            f"{self.site}: {self.bits:.2f}{margin} bits per token ({self.bits_firing:.2f} which latents fire, "
            f"{self.bits_values:.2f} their values; latents coded independently); {self.bits_joint:.2f} with the set "
            "coded as one and values at fixed length",
            f"dense {self.dense_bits:.2f}, at the same error {self.dense_bits_matched:.2f}, one-hot "
            f"{self.one_hot_bits:.2f}",
            f"L0 {self.l0:.2f}, FVU {self.fvu:.4f}; cells of {self.step:.3g} add {self.extra_fvu:.4f} (asked: "
            f"{self.epsilon:g}); {self.n_tokens:,} tokens; too low by about {self.undersampling:.2f} bits for want of "
            "more",
        ]
        return "\n".join(lines + self.notes)


def description_length(
    hm: "HookManager",
    tokens: TokenSource,
    dictionary: Dictionary,
    site: str | Site | None = None,
    *,
    max_tokens: int = 100_000,
    epsilon: float = 0.01,
    sample_tokens: int = 4096,
) -> DescriptionLength:
    """Measure how many bits a token takes in a dictionary's latents, running the text through a model.

    The text is run once, and its beginning twice, up to the site. Special tokens are left out. See
    `description_length_of` for the rest.

    Args:
        hm: the manager of the model.
        tokens: text that the dictionary was not trained on.
        dictionary: a dictionary that reconstructs what it reads, on the model's device.
        site: where it acts; None for where it was trained.
        max_tokens: how many tokens to run, special ones and pads included; whole blocks are run.
        epsilon: how much FVU writing down the values may cost.
        sample_tokens: tokens by which the step is chosen; the others are counted.

    Raises:
        ConfigError: the dictionary does not fit the site, or an epsilon that is not above 0.
        DataError: too few tokens, or activations that are not finite.

    Source: Ayonrinde et al. 2024, "Interpretability as compression" (2410.11179); see `description_length_of`.
    """
    place = place_of(hm, dictionary, site)
    samples = Samples.of_text(hm, tokens, place, max_tokens=max_tokens, doing="measuring description length")
    found = _measured(samples, dictionary, epsilon, sample_tokens)
    settings: dict[str, Any] = {"site": place.name, "max_tokens": max_tokens, "text": tokens.describe()}
    settings |= {"epsilon": epsilon, "sample_tokens": sample_tokens, "special_tokens": "left out"}
    return DescriptionLength(site=place.name, provenance=Provenance.of(hm, settings=settings), **found)


def description_length_of(
    data: ActivationStore | Float[Tensor, "*unit token d"] | Samples,
    dictionary: Dictionary,
    *,
    site: str | Site | None = None,
    max_tokens: int = 100_000,
    epsilon: float = 0.01,
    sample_tokens: int = 4096,
) -> DescriptionLength:
    """Measure how many bits a token takes in a dictionary's latents, on activations that are at hand.

    The step: on the first `sample_tokens` tokens, twice the largest |a| ‖W_dec[f]‖ (any more is worse) is halved until
    writing down the values adds at most `epsilon` · Σ‖x − x̄‖² to the squared error, and then bisected six times
    between that and its double, on a log scale. The dense baselines' steps are found and counted on these tokens
    alike. All other tokens are counted. `bits` is what a code made for these tokens takes on them, without the
    code itself and without the dictionary; see `undersampling`.

    Memory, in bytes: 8 · sample_tokens · d; 16 for each (latent, cell) in use, for each of 16 groups of units in which
    it is, and 128 MiB; 64 MiB for latents.

    Args:
        data: a store, which is read twice; or activations [token d] or [row token d].
        dictionary: a dictionary that reconstructs what it reads.
        site: which of a store's sites.
        max_tokens: how many tokens of it, those for the step included.
        epsilon: how much FVU writing down the values may cost.
        sample_tokens: tokens by which the step is chosen.

    Returns:
        The description length, its parts, and the baselines.

    Raises:
        ConfigError: an epsilon that is not above 0 or that no step meets, or a site that the store does not have.
        DataError: not more tokens than `sample_tokens`, or values that are not finite.
        ShapeError: a dictionary that gives something else than it reads.

    Source: Ayonrinde, Pearce, Sharkey 2024 (2410.11179) §3. Departures: cells have one width in units of the
    activation, so that scaling a latent against its decoder row changes nothing; epsilon is a share of the variance;
    the one-hot baseline pays for its atoms. SAEBench's histogram, which counts zeros and clamps, is not followed.
    """
    samples = Samples.of(data, site, max_tokens=max_tokens)
    settings = {"max_tokens": max_tokens, "epsilon": epsilon, "sample_tokens": sample_tokens}
    name, provenance = samples.origin(dictionary, site, settings)
    return DescriptionLength(site=name, provenance=provenance, **_measured(samples, dictionary, epsilon, sample_tokens))


@torch.no_grad()
def _measured(samples: Samples, dictionary: Dictionary, epsilon: float, sample_tokens: int) -> dict[str, Any]:
    if not (0 < epsilon < math.inf) or sample_tokens < 2:
        raise ConfigError(f"epsilon={epsilon}, sample_tokens={sample_tokens}: expected more than 0, and 2 or more")
    if dictionary.cfg.d_sae * _GROUPS >= 1 << (63 - _CELL_BITS):
        raise ConfigError(f"d_sae={dictionary.cfg.d_sae}: at most {(1 << (63 - _CELL_BITS)) // _GROUPS} are counted")
    quantiser = _Quantiser(dictionary)
    sample = torch.cat([x.to(dictionary.W_dec.device) for x, _ in _first(samples, sample_tokens)])
    quantiser.choose(sample, epsilon)
    count = _Count(dictionary.cfg.d_sae)
    seen = dictionary.seen(sample).double()
    sums = _Sums(seen.mean(0))
    for x, unit in _after(samples, sample_tokens):
        number = torch.zeros(len(x), dtype=torch.long) if unit is None else unit.cpu()
        for raw, latents, part in quantiser.encoded(x):
            cells, rows = quantiser.cells(latents), dictionary.seen(raw).double()
            near, after = (dictionary.reconstructed_seen(z, raw) for z in (latents, quantiser.values(latents, cells)))
            sums.add(rows, near, after, (latents != 0).sum(1), number[part])
            count.add(latents != 0, cells, number[part])
    if not sums.n:
        raise DataError(
            f"the data has {len(sample)} tokens, all of which went to choosing the step; give more, or lower "
            f"sample_tokens={sample_tokens}"
        )
    _, _, missed, added, spread = sums.groups().sum(0).tolist()
    fvu, extra = missed / spread, added / spread
    wide = seen - seen.mean(0)
    dense = _dense_bits(wide, epsilon)
    found = {"epsilon": epsilon, "step": quantiser.step, "unit": samples.unit, "fvu": fvu, "extra_fvu": extra}
    found |= {"dense_bits": dense, "dense_bits_matched": _dense_bits(wide, fvu + epsilon)}
    found |= {"one_hot_bits": math.log2(sums.n) + dense, "n_tokens": sums.n, "notes": quantiser.notes}
    return found | count.figures(sums)


def _first(samples: Samples, n: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    for x, unit in samples.parts():
        yield x[:n], unit
        n -= len(x)
        if n <= 0:
            return


def _after(samples: Samples, n: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    for x, unit in samples.parts():
        if len(x) > n:
            yield x[n:], None if unit is None else unit[n:]
        n = max(0, n - len(x))


class _Quantiser:
    """Latents to numbers of cells and back; the cells' width is chosen on a sample."""

    def __init__(self, dictionary: Dictionary) -> None:
        self.dictionary, self.step = dictionary, math.nan
        self.norms = dictionary.W_dec.double().norm(dim=1)
        self.notes: list[str] = []

    def encoded(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor, slice]]:
        """A few tokens at a time: x, latents, and which tokens they are."""
        x = x.to(self.dictionary.W_dec.device)
        if not bool(x.isfinite().all()):
            raise DataError(f"{int((~x.isfinite()).any(-1).sum())} of {len(x)} activations are NaN or infinite")
        for part, latents in encoded_in_parts(self.dictionary, x[:, None]):
            if not bool(latents.isfinite().all()):
                raise DataError("latents are NaN or infinite at finite activations; is the dictionary damaged?")
            yield x[part], latents[:, 0], part

    def cells(self, latents: Float[Tensor, "token d_sae"]) -> Int[Tensor, "token d_sae"]:
        """The cell of each latent; meaningless where it is 0. A latent that writes nothing has one cell."""
        cells = (latents.double() * (self.norms / self.step)).floor() if self.step > 0 else latents.double() * 0
        if float(cells.abs().max()) >= _MIDDLE:
            raise DataError(f"a latent of {float(latents.abs().max()):.3g} spans more than 2^{_CELL_BITS - 1} cells")
        return cells.long()

    def values(self, latents: Tensor, cells: Tensor) -> Tensor:
        """What the cells are read as; zeros stay."""
        width = self.step / self.norms.where(self.norms > 0, math.inf)
        return ((cells + 0.5) * width).where(latents != 0, 0).to(latents.dtype)

    def choose(self, x: Float[Tensor, "token d"], epsilon: float) -> None:
        """Set the coarsest step that adds at most epsilon of the variance; see `description_length_of`."""
        seen = self.dictionary.seen(x).double()
        spread = float((seen - seen.mean(0)).pow(2).sum())
        if not spread > 0:
            raise DataError(f"the activation is the same at all {len(x)} tokens of the sample; give other text")
        largest = max(float((z.double().abs() * self.norms).max()) for _, z, _ in self.encoded(x))
        if largest == 0:
            self.notes.append("no latent fired on the sample: there was nothing to choose a step by, values cost 0")
            return

        def fits(step: float) -> bool:
            self.step = step
            return self._added(x) <= epsilon * spread

        self.step = _coarsest(2 * largest, fits, epsilon)

    def _added(self, x: Tensor) -> float:
        total = 0.0
        for raw, latents, _ in self.encoded(x):
            rows = self.dictionary.seen(raw).double()
            plain = self.dictionary.reconstructed_seen(latents, raw)
            near = self.dictionary.reconstructed_seen(self.values(latents, self.cells(latents)), raw)
            total += float((rows - near).pow(2).sum() - (rows - plain).pow(2).sum())
        return total


def _coarsest(step: float, fits: Any, epsilon: float) -> float:
    """Halve a step until it fits, then bisect between that and the last that did not, on a log scale."""
    if fits(step):
        return step
    for _ in range(_HALVINGS):
        step /= 2
        if fits(step):
            break
    else:
        raise ConfigError(f"epsilon={epsilon}: no step down to {step:.3g} adds as little; ask for more")
    low, high = math.log2(step), math.log2(step) + 1
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(2**middle) else (low, middle)
    return float(2**low)


class _Sums:
    """Tokens, latents that fire, squared errors before and after values are written down: by group of units."""

    def __init__(self, about: Float[Tensor, "d"]) -> None:
        self.about, self.n, self.off = about, 0, torch.zeros_like(about)
        self.by_group = torch.zeros(_GROUPS, 5, dtype=torch.float64)
        self.seen: set[int] = set()

    def add(
        self, x: Float[Tensor, "token d"], near: Tensor, after: Tensor, active: Tensor, unit: Int[Tensor, "token"]
    ) -> None:
        if near.shape != x.shape:
            raise ShapeError(f"the dictionary reads {x.shape[1]} dimensions and gives {near.shape[1]}; not an SAE")
        self.n += len(x)
        self.off += (x - self.about).sum(0)
        spread, missed, later = ((x - other).pow(2).sum(1) for other in (self.about, near, after))
        sums = torch.stack([torch.ones_like(spread), active.double(), missed, later - missed, spread], 1)
        self.by_group.index_add_(0, unit % _GROUPS, sums.cpu())
        self.seen.update(unit.unique().tolist())

    def groups(self) -> Float[Tensor, "group 5"]:
        """The groups that have tokens; the last column is moved from the sample's mean to that of these tokens."""
        found = self.by_group[self.by_group[:, 0] > 0]
        found[:, 4] -= found[:, 0] * float((self.off / self.n).pow(2).sum())
        if not float(found[:, 4].sum()) > 0:
            raise DataError(f"the activation is the same at all {self.n} tokens that were counted; give other text")
        return found


class _Count:
    """How often each latent fell into each cell, by group of units: a sorted table of what occurred, no more."""

    def __init__(self, d_sae: int) -> None:
        self.d_sae = d_sae
        self.keys, self.counts = (torch.empty(0, dtype=torch.long) for _ in range(2))
        self.pending: list[Tensor] = []
        self.held = 0

    def add(self, fires: Tensor, cells: Int[Tensor, "token d_sae"], unit: Int[Tensor, "token"]) -> None:
        token, latent = fires.nonzero().T
        column = (unit[token.cpu()] % _GROUPS) * self.d_sae + latent.cpu()
        self.pending.append((column << _CELL_BITS) + cells[token, latent].cpu() + _MIDDLE)
        self.held += len(token)
        if self.held >= _PENDING:
            self._merge()

    def _merge(self) -> None:
        fresh, many = torch.cat([*self.pending, self.keys[:0]]).unique(return_counts=True)
        keys, place = torch.cat([self.keys, fresh]).unique(return_inverse=True)
        self.counts = torch.zeros(len(keys), dtype=torch.long).index_add_(0, place, torch.cat([self.counts, many]))
        self.keys, self.pending, self.held = keys, [], 0

    def figures(self, sums: _Sums) -> dict[str, Any]:
        """Entropies in bits per token, the joint code, and intervals."""
        self._merge()
        n, d_sae, group = sums.n, self.d_sae, self.keys >> _CELL_BITS
        latent, cell = group % d_sae, self.keys & ((1 << _CELL_BITS) - 1)
        group = group // d_sae
        table, place = ((latent << _CELL_BITS) + cell).unique(return_inverse=True)
        counts = torch.zeros(len(table), dtype=torch.float64).index_add_(0, place, self.counts.double())
        owner = table >> _CELL_BITS
        firing = torch.zeros(d_sae, dtype=torch.float64).index_add_(0, owner, counts)
        p = firing / n
        value = (firing[owner] / counts).log2()  # bits of a cell, given that its latent fires
        values = torch.zeros(d_sae, dtype=torch.float64).index_add_(0, owner, counts * value) / n
        on, off = (-torch.log2(q).where(q > 0, 0.0) for q in (p, 1 - p))
        fires = p * on + (1 - p) * off
        l0, levels = float(p.sum()), int(cell.max() - cell.min()) + 1 if len(cell) else 1
        free = len(table) - int((firing > 0).sum()) + int(((firing > 0) & (firing < n)).sum())
        # What every group's tokens cost in the code made for all: its mean is `bits`, its spread that of the figure.
        each = torch.zeros(_GROUPS, dtype=torch.float64)
        cost = torch.stack([each.index_add(0, group, self.counts * x) for x in ((on - off)[latent], value[place])], 1)
        tokens, active, missed, added, spread = sums.groups().T
        cost = cost[sums.by_group[:, 0] > 0] + torch.stack([tokens * off.sum(), torch.zeros_like(tokens)], 1)
        parts = {"bits": cost.sum(1), "bits_firing": cost[:, 0], "bits_values": cost[:, 1], "l0": active}
        pairs = {name: (part, tokens) for name, part in parts.items()}
        pairs |= {"fvu": (missed, spread), "extra_fvu": (added, spread)}
        quantile = t_quantile(len(tokens) - 1)
        return {
            "l0": l0,
            "bits": float((fires + values).sum()),
            "bits_firing": float(fires.sum()),
            "bits_values": float(values.sum()),
            "bits_joint": l0 * math.log2(levels) + _log2_choose(d_sae, l0),
            "bits_per_value": math.log2(levels),
            "undersampling": free / (2 * n * math.log(2)),
            "firing": firing.long(),
            "latent_bits": fires + values,
            "n_units": len(sums.seen),
            "intervals": {name: ratio_interval(*pair, quantile=quantile) for name, pair in pairs.items()},
        }


def _log2_choose(n: int, k: float) -> float:
    """log2 of n over k, by the gamma function for a k that is not whole."""
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)


def _dense_bits(x: Float[Tensor, "token d"], share: float) -> float:
    """Σ over dimensions of the entropy of centred x, in cells of the coarsest width that misses this share of it.

    One cell has the mean in its middle: a dimension that hardly varies costs nothing.
    """
    spread = float(x.pow(2).sum())
    if share >= 1:
        return 0.0  # the mean alone is as good

    def missed(step: float) -> float:
        return float((x - (x / step).round() * step).pow(2).sum())

    step = _coarsest(2 * float(x.abs().max()), lambda s: missed(s) <= share * spread, share)
    bits = 0.0
    for column in (x / step).round().T:
        counts = column.unique(return_counts=True)[1].double()
        bits -= float((counts * (counts / len(x)).log2()).sum()) / len(x)
    return bits
