"""How well a dictionary stands in for the activations it was trained on: one definition of each figure.

Figures are ratios of sums over rows of tokens. Their intervals, at 95 %, are normal approximations of such a ratio
(delta method) with rows as the independent units: tokens of one row are not.
"""

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.errors import ConfigError, DataError
from interp.core.intervention import Intervention, Replace, Splice
from interp.core.result import Provenance, Result
from interp.core.site import Site
from interp.core.where import Where
from interp.data.tokens import TokenBlock, TokenSource
from interp.dictionaries.base import Dictionary, Transcoder
from interp.dictionaries.processed import check_bound
from interp.dictionaries.space import has_heads
from interp.evaluate.reading import counted_blocks, encoded_in_parts, side_by_side, site_width

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

    from interp.core.manager import HookManager

__all__ = ["Baseline", "DictionaryEvaluation", "evaluate_dictionary", "place_of", "target_of"]

_NORMAL_95 = 1.959964


@runtime_checkable
class Baseline(Protocol):
    """A reconstruction to hold a dictionary against, of as many numbers per token, such as `PCA`."""

    @property
    def rank(self) -> int:
        """Numbers per token."""

    def encode(self, x: Tensor) -> Tensor:
        """Return the numbers of some activations."""

    def decode(self, latents: Tensor) -> Tensor:
        """Return the activations that they stand for."""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class DictionaryEvaluation(Result):
    """What a dictionary keeps of a model's activations and of its loss. CE and KL are in nats per token.

    Attributes:
        site: TransformerLens' name of the site.
        n_tokens: tokens that count in `l0`, `fvu` and `dead`: real and not special.
        n_predictions: predictions that count in CE and KL: from such a token, of such a token.
        n_rows: rows that such tokens came in; the independent units of `intervals`.
        l0: mean number of positive latents per token.
        l0_with_special: the same with special tokens counted too.
        fvu: Σ‖x − x̂‖² / Σ‖x − x̄‖², each summed over all tokens before dividing.
        explained_variance: 1 − fvu.
        ce_clean: the model's own loss.
        ce_sae: with the reconstruction in place of the activation, at the tokens that count.
        ce_zero: with zeros in their place.
        ce_mean: with their mean in their place.
        ce_recovered: (ce_zero − ce_sae) / (ce_zero − ce_clean).
        ce_recovered_mean: the same against mean ablation.
        ce_loss_score: SAELens' figure of that name: zeros at every token, special ones included, and predictions of
            special tokens counted.
        kl: KL(clean ‖ with reconstruction).
        dead: share of latents that were never positive on these tokens.
        firing: on how many tokens each latent was positive.
        intervals: figure → 95 % interval (low, high), over rows; NaN where there is one row only.
        pca_rank: rank of the PCA that was measured on the same tokens; None, like the next three, without one.
        pca_fvu: its FVU.
        pca_ce: loss with its reconstruction in place of the activation.
        pca_ce_recovered: its `ce_recovered`.
        target: what a transcoder reconstructs, which is then what is missed, replaced and ablated; None for an SAE.
    """

    title: ClassVar[str] = "Dictionary evaluation"
    site: str
    n_tokens: int
    n_predictions: int
    n_rows: int
    l0: float
    l0_with_special: float
    fvu: float
    explained_variance: float
    ce_clean: float
    ce_sae: float
    ce_zero: float
    ce_mean: float
    ce_recovered: float
    ce_recovered_mean: float
    ce_loss_score: float
    kl: float
    dead: float
    firing: Int[Tensor, "d_sae"]
    intervals: dict[str, tuple[float, float]]
    pca_rank: int | None = None
    pca_fvu: float | None = None
    pca_ce: float | None = None
    pca_ce_recovered: float | None = None
    target: str | None = None

    @property
    def density(self) -> Float[Tensor, "d_sae"]:
        """Share of tokens on which each latent was positive."""
        return self.firing.double() / self.n_tokens

    def scalars(self) -> dict[str, Any]:
        """The figures alone, by name, with their intervals; what is undefined (a ratio to zero) is None."""
        left_out = ("firing", "intervals", "provenance")
        values = {f.name: _finite(getattr(self, f.name)) for f in fields(self) if f.name not in left_out}
        return {**values, "intervals": {k: [_finite(v) for v in pair] for k, pair in self.intervals.items()}}

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per figure: `figure`, `value`, and the 95 % interval from `low` to `high`."""
        import pandas as pd

        held = {k: v for k, v in self.scalars().items() if k not in ("site", "target", "intervals")}
        held = {k: v for k, v in held.items() if v is not None or not k.startswith("pca_")}
        values = [math.nan if v is None else v for v in held.values()]
        ends = [self.intervals.get(k, (math.nan, math.nan)) for k in held]
        low, high = ([pair[i] for pair in ends] for i in (0, 1))
        return pd.DataFrame({"figure": list(held), "value": values, "low": low, "high": high})

    def plot(self) -> "plotly.graph_objects.Figure":
        """Return the losses as bars: clean, with the reconstruction, mean- and zero-ablated."""
        figures = importlib.import_module("interp.report.figures")
        losses = {"clean": self.ce_clean, "dictionary": self.ce_sae, "mean": self.ce_mean, "zero": self.ce_zero}
        if self.pca_ce is not None:
            losses[f"PCA, rank {self.pca_rank}"] = self.pca_ce
        labels = figures.Axis("replaced by", list(losses))
        heights = torch.tensor(list(losses.values()))
        return figures.bars(
            heights, labels=labels, title=f"Loss with {self.target or self.site} replaced", value="nats per token"
        )

    def summary(self) -> str:
        """Say the main figures, with their 95 % intervals, in a few lines."""
        where = self.site if self.target is None else f"{self.site} → {self.target}"
        lines = [
            f"{where}: L0 {self._with_margin('l0', 1)}, FVU {self._with_margin('fvu')} (explained variance "
            f"{self.explained_variance:.4f}), dead {self.dead:.1%} of {len(self.firing)} latents, on "
            f"{self.n_tokens:,} tokens (special ones left out) in {self.n_rows:,} rows",
            f"CE recovered {self._with_margin('ce_recovered')} (against mean ablation {self.ce_recovered_mean:.4f}; "
            f"SAELens' ce_loss_score {self.ce_loss_score:.4f}): clean {self.ce_clean:.4f}, dictionary "
            f"{self.ce_sae:.4f}, mean {self.ce_mean:.4f}, zero {self.ce_zero:.4f} nats/token; "
            f"KL {self._with_margin('kl')}",
        ]
        if self.pca_fvu is not None and self.pca_ce_recovered is not None:
            lines.append(
                f"PCA of rank {self.pca_rank} on the same tokens: FVU {self.pca_fvu:.4f}, CE recovered "
                f"{self.pca_ce_recovered:.4f}"
            )
        return "\n".join(lines)

    def _with_margin(self, name: str, digits: int = 4) -> str:
        low, high = self.intervals[name]
        value = f"{getattr(self, name):.{digits}f}"
        return f"{value} ± {(high - low) / 2:.{digits}f}" if math.isfinite(high - low) else value


def evaluate_dictionary(
    hm: "HookManager",
    dictionary: Dictionary,
    tokens: TokenSource,
    site: str | Site,
    *,
    target: str | Site | None = None,
    max_tokens: int = 100_000,
    pca: Baseline | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> DictionaryEvaluation:
    """Measure a dictionary's sparsity, its reconstruction, and the model's loss when it stands in.

    The text is run twice: once up to the site for L0, what is missed and the mean, once for the variance and the
    losses. Of a transcoder, what is missed, replaced and ablated is its target. Special tokens are left out: their
    activations are neither counted nor replaced. Sums are kept in fp64. Of a dictionary of a processed model, errors
    and zeros are those of the processed activation, as SAELens has them; the losses are the raw model's, which are the
    same.
    Memory, in bytes: the logits of two forwards of one block, about 256 MiB for the latents of a part of it and what
    is made of them, and 150 for each row of text.

    Args:
        hm: the manager of the model.
        dictionary: a dictionary of raw activations, on the model's device.
        tokens: text that the dictionary was not trained on.
        site: what the dictionary reads, of shape [batch pos d_in], or q, k, v or z, [batch pos n_heads d_head].
        target: what a transcoder reconstructs, [batch pos d_out]; None takes the one it was trained on.
        max_tokens: how many tokens to run, special ones and pads included; whole blocks are run.
        pca: a baseline of an SAE that is measured on the same tokens (see `fit_pca`), for one more forward per block.
        should_stop: asked before each block; when it says True, KeyboardInterrupt is raised.

    Returns:
        The figures, with their provenance.

    Raises:
        ConfigError: the dictionary is on another device, or does not fit the site.
        DataError: the text has no token that counts.

    Source: FVU and CE recovered as in Gao et al. 2024 (2406.04093) §3 and Karvonen et al. 2025 (2503.09532);
    `ce_loss_score` as in SAELens 6.54. Interval of a ratio of sums: Cochran 1977, "Sampling Techniques", chapter 6,
    without the correction for a finite population.
    """
    place = place_of(hm, dictionary, site)
    gives = target_of(hm, dictionary, place, target)
    moments = _Moments(dictionary, pca)
    for block, keep in counted_blocks(tokens, max_tokens, should_stop, doing="measuring: activations"):
        run = hm.run(block.inputs, read=[place, gives], logits="none")
        moments.add(side_by_side(run[place.name], place), side_by_side(run[gives.name], gives), block.mask, keep)
    if moments.n == 0:
        raise DataError(f"{tokens.documents.describe()} has no token to measure on; give more text")
    losses = _Losses(hm, dictionary, place, gives, moments, pca)
    for block, keep in counted_blocks(tokens, max_tokens, should_stop, doing="measuring: losses"):
        losses.add(block, keep)
    settings = {
        "site": place.name,
        "target": gives.name,
        "max_tokens": max_tokens,
        "special_tokens": "left out",
        "text": tokens.describe(),
    }
    rows = {**moments.rows.joined(), **losses.rows.joined()}
    return DictionaryEvaluation(
        site=place.name,
        target=None if gives == place else gives.name,
        n_tokens=moments.n,
        n_predictions=int(rows["n"].sum()),
        n_rows=int((rows["tokens"] > 0).sum()),
        l0_with_special=float(rows["active_all"].sum() / rows["tokens_all"].sum()),
        dead=float((moments.firing == 0).double().mean()),
        **_figures(rows),
        **({} if pca is None else _of_pca(rows, pca.rank)),
        firing=moments.firing.cpu(),
        intervals=_intervals(rows),
        provenance=Provenance.of(hm, settings=settings),
    )


def place_of(hm: "HookManager", dictionary: Dictionary, site: str | Site | None = None) -> Site:
    """Return the site that a dictionary acts on, checked against the model.

    Args:
        hm: the manager of the model.
        dictionary: a dictionary.
        site: None takes the one it was trained on, from its metadata.

    Raises:
        ConfigError: no site is known, it has no vector per token or another width, the dictionary is on another device,
            or it is of a processed model and was not made for this one.
    """
    known = site if site is not None else dictionary.cfg.metadata.get("hook_name")
    if known is None:
        raise ConfigError("the dictionary does not say where it was trained; give site='3.resid_post', or another")
    place, d_in = Site(known), dictionary.cfg.d_in
    if (len(place.axes) != 3 and not has_heads(place)) or place.where is not None:
        raise ConfigError(f"{place} has axes {place.axes}; a dictionary reads one vector a token: try 3.resid_post")
    check_bound(dictionary, hm)
    width = site_width(hm, place)
    if width != d_in:
        raise ConfigError(f"the dictionary has d_in {d_in}, {place.short} of {hm.name} is {width} wide; another model?")
    if dictionary.W_enc.device != hm.device:
        where = f"the dictionary is on {dictionary.W_enc.device}, the model on {hm.device}"
        raise ConfigError(f"{where}; use dictionary.to(hm.device)")
    return place


def target_of(hm: "HookManager", dictionary: Dictionary, place: Site, target: str | Site | None = None) -> Site:
    """Return the site that a dictionary reconstructs: that of an SAE is its own.

    Args:
        hm: the manager of the model.
        dictionary: a dictionary.
        place: what it reads.
        target: None takes the one it was trained on, from its metadata.

    Raises:
        ConfigError: a transcoder's is not known, has another width, or is given for an SAE.
    """
    if not isinstance(dictionary, Transcoder):
        if target is not None and Site(target) != place:
            raise ConfigError(
                f"{type(dictionary).__name__} reconstructs what it reads, {place.short}; leave target out"
            )
        return place
    known = target if target is not None else dictionary.cfg.metadata.get("hook_name_out")
    if known is None:
        raise ConfigError("the transcoder does not say what it reconstructs; give target='3.mlp_out', or another")
    gives = Site(known)
    if (len(gives.axes) != 3 and not has_heads(gives)) or site_width(hm, gives) != dictionary.d_out:
        raise ConfigError(
            f"the transcoder gives {dictionary.d_out} dimensions, {gives.short} of {hm.name} is "
            f"{' × '.join(map(str, hm.atlas.shape(gives)[2:]))}; another site or model?"
        )
    return gives


class _Rows:
    """Sums of every row of text, in fp64 on the host."""

    def __init__(self) -> None:
        self.parts: dict[str, list[Tensor]] = {}

    def add(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Append the sums over the positions of one block that the mask counts."""
        self.parts.setdefault(name, []).append(values.double().masked_fill(~mask, 0).sum(-1).cpu())

    def joined(self) -> dict[str, Float[Tensor, "row"]]:
        return {name: torch.cat(parts) for name, parts in self.parts.items()}


class _Moments:
    """What needs no logits: sums over tokens in fp64, on the dictionary's device, and over rows."""

    def __init__(self, dictionary: Dictionary, pca: Baseline | None) -> None:
        self.dictionary, self.pca, device = dictionary, pca, dictionary.W_enc.device
        self.n, self.rows = 0, _Rows()
        self.sum = torch.zeros(dictionary.d_out, dtype=torch.float64, device=device)
        self.seen = torch.zeros_like(self.sum)
        self.firing = torch.zeros(dictionary.cfg.d_sae, dtype=torch.long, device=device)

    @torch.no_grad()
    def add(
        self,
        x: Float[Tensor, "row pos d_in"],
        target: Float[Tensor, "row pos d_out"],
        real: Bool[Tensor, "row pos"],
        keep: Bool[Tensor, "row pos"],
    ) -> None:
        self.n += int(keep.sum())
        real, keep = real.to(x.device), keep.to(x.device)
        seen = self.dictionary.target_seen(target.double())
        self.sum += target.double().masked_fill(~keep[..., None], 0).sum((0, 1))
        self.seen += seen.masked_fill(~keep[..., None], 0).sum((0, 1))
        for part, latents in encoded_in_parts(self.dictionary, x):
            mine, counted, active = seen[part], keep[part], latents > 0
            self.firing += (active & counted[..., None]).sum((0, 1))
            one = torch.ones_like(counted, dtype=torch.float64)
            self.rows.add("tokens", one, counted)
            self.rows.add("tokens_all", one, real[part])
            self.rows.add("active", active.sum(-1), counted)
            self.rows.add("active_all", active.sum(-1), real[part])
            made = self.dictionary.reconstructed_seen(latents, x[part]).double()
            self.rows.add("missed", (mine - made).pow(2).sum(-1), counted)
            if self.pca is not None:
                near = self.dictionary.target_seen(self.pca.decode(self.pca.encode(x[part])).double())
                self.rows.add("missed_pca", (mine - near).pow(2).sum(-1), counted)

    @property
    def mean(self) -> Float[Tensor, "d_in"]:
        """Of the activation itself."""
        return self.sum / self.n

    @property
    def mean_seen(self) -> Float[Tensor, "d_in"]:
        """Of what errors are measured in."""
        return self.seen / self.n


class _Losses:
    """The model's loss under each replacement, and the variance about the mean, summed by row."""

    def __init__(
        self,
        hm: "HookManager",
        dictionary: Dictionary,
        reads: Site,
        site: Site,
        moments: _Moments,
        pca: Baseline | None,
    ) -> None:
        self.hm, self.dictionary, self.reads, self.site, self.pca = hm, dictionary, reads, site, pca
        self.rows, self.mean_seen = _Rows(), moments.mean_seen
        features = hm.atlas.shape(site)[2:]
        zero = dictionary.target_space.unfixed(torch.zeros_like(moments.mean))
        self.mean, self.zero = (x.view(*features).to(hm.dtype) for x in (moments.mean, zero))

    def add(self, block: TokenBlock, keep: Bool[Tensor, "row pos"]) -> None:
        where = Where(mask=keep)
        clean = self.hm.run(block.inputs, read=list({self.reads, self.site}), logits="all")
        x = clean[self.site.name]
        seen = self.dictionary.target_seen(side_by_side(x, self.site).double())
        self.rows.add("variance", (seen - self.mean_seen).pow(2).sum(-1), keep.to(x.device))
        stands_in: Intervention = Splice(self.site, self.dictionary, where=where)
        if self.reads != self.site:
            made = torch.no_grad()(self.dictionary)(clean[self.reads.name])
            stands_in = Replace(self.site, made.to(x.dtype).view_as(x), where=where)
        writes: dict[str, Intervention | None] = {
            "clean": None,
            "sae": stands_in,
            "zero": Replace(self.site, self.zero, where=where),
            "mean": Replace(self.site, self.mean, where=where),
            "everywhere": Replace(self.site, self.zero),
        }
        if self.pca is not None:
            writes["pca"] = Splice(self.site, self.pca, where=where)
        ours = (keep[:, :-1] & keep[:, 1:]).to(self.hm.device)
        score = (keep[:, :-1] & block.mask[:, 1:]).to(self.hm.device)
        targets = block.ids[:, 1:].to(self.hm.device)
        self.rows.add("n", torch.ones_like(ours, dtype=torch.float64), ours)
        self.rows.add("n_score", torch.ones_like(ours, dtype=torch.float64), score)
        known = _logprobs(clean.logits)
        for name, write in writes.items():
            logprobs = known
            if write is not None:
                logprobs = _logprobs(self.hm.run(block.inputs, write=[write], logits="all").logits)
            loss = -logprobs.gather(-1, targets[..., None])[..., 0]
            self.rows.add(name, loss, ours)
            self.rows.add(f"score_{name}", loss, score)
            if name == "sae":
                self.rows.add("kl", (known.exp() * (known - logprobs)).sum(-1), ours)


def _logprobs(logits: Float[Tensor, "row pos d_vocab"]) -> Float[Tensor, "row next d_vocab"]:
    return logits[:, :-1].float().log_softmax(-1)


def _ratios(rows: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Each figure as the two columns whose sums it is the ratio of."""
    found = {"l0": ("active", "tokens"), "fvu": ("missed", "variance"), "kl": ("kl", "n")}
    found |= {f"ce_{name}": (name, "n") for name in ("clean", "sae", "zero", "mean")}
    plain = {name: (rows[a], rows[b]) for name, (a, b) in found.items()}
    zero, mean, score = rows["zero"], rows["mean"], rows["score_everywhere"]
    return {
        **plain,
        "ce_recovered": (zero - rows["sae"], zero - rows["clean"]),
        "ce_recovered_mean": (mean - rows["sae"], mean - rows["clean"]),
        "ce_loss_score": (score - rows["score_sae"], score - rows["score_clean"]),
    }


def _figures(rows: dict[str, Tensor]) -> dict[str, Any]:
    figures = {name: _ratio(a, b) for name, (a, b) in _ratios(rows).items()}
    return {**figures, "explained_variance": 1 - figures["fvu"]}


def _of_pca(rows: dict[str, Tensor], rank: int) -> dict[str, Any]:
    return {
        "pca_rank": rank,
        "pca_fvu": _ratio(rows["missed_pca"], rows["variance"]),
        "pca_ce": _ratio(rows["pca"], rows["n"]),
        "pca_ce_recovered": _ratio(rows["zero"] - rows["pca"], rows["zero"] - rows["clean"]),
    }


def _intervals(rows: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """95 % intervals of ratios of sums, with rows as the units."""
    counted = int((rows["tokens"] > 0).sum())
    found = {}
    for name, (a, b) in _ratios(rows).items():
        ratio, total = _ratio(a, b), float(b.sum().abs())
        half = math.nan
        if counted > 1 and total > 0:
            half = _NORMAL_95 * float((a - ratio * b).pow(2).sum() * counted / (counted - 1)) ** 0.5 / total
        found[name] = (ratio - half, ratio + half)
    low, high = found["fvu"]
    return {**found, "explained_variance": (1 - high, 1 - low)}


def _ratio(part: Tensor, whole: Tensor) -> float:
    total = float(whole.sum())
    return float(part.sum()) / total if total != 0 else math.nan


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
