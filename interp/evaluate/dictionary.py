"""How well a dictionary stands in for the activations it was trained on: one definition of each figure.

Figures are ratios of sums over rows of tokens. Their intervals, at 95 %, are normal approximations of such a ratio
(delta method) with rows as the independent units: tokens of one row are not.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.errors import ConfigError, DataError
from interp.core.result import Provenance, Result
from interp.core.site import Site
from interp.data.tokens import TokenSource
from interp.dictionaries.base import Dictionary
from interp.evaluate.noise import NORMAL_95
from interp.evaluate.place import place_of, target_of
from interp.evaluate.reading import counted_blocks
from interp.evaluate.sums import Baseline, LossSums, MomentSums, Subject

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

    from interp.core.manager import HookManager

__all__ = [
    "Baseline",
    "DictionaryEvaluation",
    "Subject",
    "evaluate_dictionaries",
    "evaluate_dictionary",
    "place_of",
    "target_of",
]


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
        kl_recovered: 1 − kl / KL(clean ‖ with zeros).
        kl_recovered_mean: the same against mean ablation.
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
    kl_recovered: float
    kl_recovered_mean: float
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
    subject = Subject(dictionary, place, target_of(hm, dictionary, place, target), pca)
    (found,) = evaluate_dictionaries(hm, [subject], tokens, max_tokens=max_tokens, should_stop=should_stop)
    return found


def evaluate_dictionaries(
    hm: "HookManager",
    subjects: Sequence[Subject],
    tokens: TokenSource,
    *,
    max_tokens: int = 100_000,
    should_stop: Callable[[], bool] | None = None,
    progress: bool = True,
) -> list[DictionaryEvaluation]:
    """Measure several dictionaries on the same text; each gets the figures that it would get alone, to the bit.

    The model's own activations and losses are taken once for all, ablations once for each site that is reconstructed,
    and baselines once each; of each dictionary there remains one forward.
    Memory is that of `evaluate_dictionary`, and the sums by row of each.

    Args:
        hm: the manager of the model.
        subjects: the dictionaries at their sites; see `place_of` and `target_of`.
        tokens: text that none of them was trained on.
        max_tokens: how many tokens to run, special ones and pads included; whole blocks are run.
        should_stop: asked before each block; when it says True, KeyboardInterrupt is raised.
        progress: show bars on stderr when it takes more than two seconds.

    Returns:
        The figures of each, in order.

    Raises:
        ConfigError: no dictionary.
        DataError: the text has no token that counts.

    Source: as for `evaluate_dictionary`.
    """
    if not subjects:
        raise ConfigError("no dictionary was given; give at least one Subject(dictionary, reads, gives)")
    doing = ("measuring: activations", "measuring: losses") if progress else ("", "")
    moments = MomentSums(subjects, rows=tokens.rows, width=tokens.ctx)
    for block, keep in counted_blocks(tokens, max_tokens, should_stop, doing=doing[0]):
        moments.add(hm.run(block.inputs, read=list(moments.sites), logits="none"), block, keep)
    if moments.n == 0:
        raise DataError(f"{tokens.documents.describe()} has no token to measure on; give more text")
    losses = LossSums(hm, moments)
    for block, keep in counted_blocks(tokens, max_tokens, should_stop, doing=doing[1]):
        losses.add(block, keep)
    provenance = Provenance.of(
        hm, settings={"max_tokens": max_tokens, "special_tokens": "left out", "text": tokens.describe()}
    )
    return [_evaluation(moments, losses, number, provenance) for number in range(len(subjects))]


def _evaluation(moments: MomentSums, losses: LossSums, number: int, of_all: Provenance) -> DictionaryEvaluation:
    subject = moments.subjects[number]
    rows = {**moments.rows(number), **losses.rows(number)}
    firing = moments.firing[number]
    settings = {"site": subject.reads.name, "target": subject.gives.name, **of_all.settings}
    return DictionaryEvaluation(
        site=subject.reads.name,
        target=None if subject.gives == subject.reads else subject.gives.name,
        n_tokens=moments.n,
        n_predictions=int(rows["n"].sum()),
        n_rows=int((rows["tokens"] > 0).sum()),
        l0_with_special=float(rows["active_all"].sum() / rows["tokens_all"].sum()),
        dead=float((firing == 0).double().mean()),
        **_figures(rows),
        **({} if subject.pca is None else _of_pca(rows, subject.pca.rank)),
        firing=firing.cpu(),
        intervals=_intervals(rows),
        provenance=replace(of_all, settings=settings),
    )


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
        "kl_recovered": (rows["kl_zero"] - rows["kl"], rows["kl_zero"]),
        "kl_recovered_mean": (rows["kl_mean"] - rows["kl"], rows["kl_mean"]),
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
            half = NORMAL_95 * float((a - ratio * b).pow(2).sum() * counted / (counted - 1)) ** 0.5 / total
        found[name] = (ratio - half, ratio + half)
    low, high = found["fvu"]
    return {**found, "explained_variance": (1 - high, 1 - low)}


def _ratio(part: Tensor, whole: Tensor) -> float:
    total = float(whole.sum())
    return float(part.sum()) / total if total != 0 else math.nan


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
