"""How well a dictionary stands in for the activations it was trained on: one definition of each figure."""

import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.errors import ConfigError, DataError
from interp.core.intervention import Ablate, Intervention, Replace, Splice
from interp.core.result import Provenance, Result
from interp.core.site import Site
from interp.core.where import Where
from interp.data.tokens import TokenBlock, TokenSource
from interp.dictionaries.base import Dictionary

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

    from interp.core.manager import HookManager

__all__ = ["DictionaryEvaluation", "evaluate_dictionary"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class DictionaryEvaluation(Result):
    """What a dictionary keeps of a model's activations and of its loss. CE and KL are in nats per token.

    Attributes:
        site: TransformerLens' name of the site.
        n_tokens: tokens that count in `l0`, `fvu` and `dead`: real and not special.
        n_predictions: predictions that count in CE and KL: from such a token, of such a token.
        l0: mean number of positive latents per token.
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
    """

    title: ClassVar[str] = "Dictionary evaluation"
    site: str
    n_tokens: int
    n_predictions: int
    l0: float
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

    def scalars(self) -> dict[str, Any]:
        """The figures alone, by name; what is undefined (a ratio to zero) is None."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("firing", "provenance")}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per figure: `figure`, `value`."""
        import pandas as pd

        held = {name: value for name, value in self.scalars().items() if name != "site"}
        return pd.DataFrame({"figure": list(held), "value": [math.nan if v is None else v for v in held.values()]})

    def plot(self) -> "plotly.graph_objects.Figure":
        """Return the four losses as bars: clean, with the reconstruction, mean- and zero-ablated."""
        figures = importlib.import_module("interp.report.figures")
        losses = {"clean": self.ce_clean, "dictionary": self.ce_sae, "mean": self.ce_mean, "zero": self.ce_zero}
        labels = figures.Axis("replaced by", list(losses))
        heights = torch.tensor(list(losses.values()))
        return figures.bars(heights, labels=labels, title=f"Loss with {self.site} replaced", value="nats per token")

    def summary(self) -> str:
        """Say the main figures in two lines."""
        return (
            f"{self.site}: L0 {self.l0:.1f}, FVU {self.fvu:.4f} (explained variance {self.explained_variance:.4f}), "
            f"dead {self.dead:.1%} of {len(self.firing)} latents, on {self.n_tokens:,} tokens (special ones left out)\n"
            f"CE recovered {self.ce_recovered:.4f} (against mean ablation {self.ce_recovered_mean:.4f}; SAELens' "
            f"ce_loss_score {self.ce_loss_score:.4f}): clean {self.ce_clean:.4f}, dictionary {self.ce_sae:.4f}, "
            f"mean {self.ce_mean:.4f}, zero {self.ce_zero:.4f} nats/token; KL {self.kl:.4f}"
        )


def evaluate_dictionary(
    hm: "HookManager",
    dictionary: Dictionary,
    tokens: TokenSource,
    site: str | Site,
    *,
    max_tokens: int = 100_000,
    should_stop: Callable[[], bool] | None = None,
) -> DictionaryEvaluation:
    """Measure a dictionary's sparsity, its reconstruction, and the model's loss when it stands in.

    The text is run twice: once up to the site for L0, FVU and the mean, once for the losses. Special tokens are left
    out: their activations are neither counted nor replaced. Sums are kept in fp64. Memory: the logits of five forwards
    of one block.

    Args:
        hm: the manager of the model.
        dictionary: a dictionary of raw activations, on the model's device.
        tokens: text that the dictionary was not trained on.
        site: where the dictionary acts, of shape [batch pos d_in].
        max_tokens: how many tokens to run, special ones and pads included; whole blocks are run.
        should_stop: asked before each block; when it says True, KeyboardInterrupt is raised.

    Returns:
        The figures, with their provenance.

    Raises:
        ConfigError: the dictionary is on another device.
        DataError: the text has no token that counts.

    Source: FVU and CE recovered as in Gao et al. 2024 (2406.04093) §3 and Karvonen et al. 2025 (2503.09532);
    `ce_loss_score` as in SAELens 6.54.
    """
    place = Site(site)
    if dictionary.W_enc.device != hm.device:
        where = f"the dictionary is on {dictionary.W_enc.device}, the model on {hm.device}"
        raise ConfigError(f"{where}; use dictionary.to(hm.device)")
    moments = _Moments(dictionary)
    for block, keep in _blocks(tokens, max_tokens, should_stop):
        run = hm.run(block.inputs, read=[place], logits="none")
        moments.add(run[place.name].flatten(0, 1).index_select(0, keep.flatten().nonzero().flatten().to(hm.device)))
    if moments.n == 0:
        raise DataError(f"{tokens.documents.describe()} has no token to measure on; give more text")
    losses = _Losses(hm, dictionary, place, moments.mean)
    for block, keep in _blocks(tokens, max_tokens, should_stop):
        losses.add(block, keep)
    settings = {"site": place.name, "max_tokens": max_tokens, "special_tokens": "left out", "text": tokens.describe()}
    return DictionaryEvaluation(
        site=place.name,
        **moments.figures(),
        **losses.figures(),
        firing=moments.firing.cpu(),
        provenance=Provenance.of(hm, settings=settings),
    )


def _blocks(
    tokens: TokenSource, max_tokens: int, should_stop: Callable[[], bool] | None
) -> Iterator[tuple[TokenBlock, Bool[Tensor, "row pos"]]]:
    """Blocks until `max_tokens` have been given, each with the tokens that count."""
    given = 0
    for block in tokens.blocks():
        if should_stop is not None and should_stop():
            raise KeyboardInterrupt
        keep = block.mask & ~block.special
        if bool(keep.any()):
            yield block, keep
        given += block.ids.numel()
        if given >= max_tokens:
            return


class _Moments:
    """Sums over tokens in fp64, on the dictionary's device."""

    def __init__(self, dictionary: Dictionary) -> None:
        self.dictionary, device = dictionary, dictionary.W_enc.device
        self.n = 0
        self.sum = torch.zeros(dictionary.cfg.d_in, dtype=torch.float64, device=device)
        self.squares, self.missed = self.sum.new_zeros(()), self.sum.new_zeros(())
        self.firing = torch.zeros(dictionary.cfg.d_sae, dtype=torch.long, device=device)

    @torch.no_grad()
    def add(self, x: Float[Tensor, "token d_in"]) -> None:
        latents = self.dictionary.encode(x)
        wide = x.double()
        self.n += len(x)
        self.sum += wide.sum(0)
        self.squares += wide.pow(2).sum()
        self.missed += (wide - self.dictionary.decode(latents).double()).pow(2).sum()
        self.firing += (latents > 0).sum(0)

    @property
    def mean(self) -> Float[Tensor, "d_in"]:
        return self.sum / self.n

    def figures(self) -> dict[str, Any]:
        variance = float(self.squares - self.n * self.mean.pow(2).sum())
        fvu = float(self.missed) / variance if variance > 0 else math.nan
        return {
            "n_tokens": self.n,
            "l0": float(self.firing.sum()) / self.n,
            "fvu": fvu,
            "explained_variance": 1 - fvu,
            "dead": float((self.firing == 0).double().mean()),
        }


class _Losses:
    """The model's loss under each replacement, summed in fp64."""

    def __init__(self, hm: "HookManager", dictionary: Dictionary, site: Site, mean: Tensor) -> None:
        self.hm, self.dictionary, self.site, self.mean = hm, dictionary, site, mean.to(hm.dtype)
        self.sums: dict[str, Tensor] = {}
        self.n, self.n_score = 0, 0

    def add(self, block: TokenBlock, keep: Bool[Tensor, "row pos"]) -> None:
        where = Where(mask=keep)
        writes: dict[str, list[Intervention]] = {
            "clean": [],
            "sae": [Splice(self.site, self.dictionary, where=where)],
            "zero": [Ablate(self.site, "zero", where=where)],
            "mean": [Replace(self.site, self.mean, where=where)],
            "everywhere": [Ablate(self.site, "zero")],
        }
        ours = (keep[:, :-1] & keep[:, 1:]).to(self.hm.device)
        score = (keep[:, :-1] & block.mask[:, 1:]).to(self.hm.device)
        targets = block.ids[:, 1:].to(self.hm.device)
        self.n, self.n_score = self.n + int(ours.sum()), self.n_score + int(score.sum())
        clean: Tensor | None = None
        for name, write in writes.items():
            logprobs = self._logprobs(block, write)
            loss = -logprobs.gather(-1, targets[..., None])[..., 0].double()
            self._sum(name, loss, ours)
            self._sum(f"score_{name}", loss, score)
            if name == "clean":
                clean = logprobs
            if name == "sae" and clean is not None:
                kl = (clean.exp() * (clean - logprobs)).sum(-1).double()
                self._sum("kl", kl, ours)

    def _logprobs(self, block: TokenBlock, write: list[Intervention]) -> Float[Tensor, "row pos d_vocab"]:
        run = self.hm.run(block.inputs, write=write, logits="all")
        return run.logits[:, :-1].float().log_softmax(-1)

    def _sum(self, name: str, values: Tensor, mask: Tensor) -> None:
        total = values.masked_fill(~mask, 0).sum()
        self.sums[name] = self.sums[name] + total if name in self.sums else total

    def figures(self) -> dict[str, Any]:
        per = {k: float(v) / max(self.n_score if k.startswith("score_") else self.n, 1) for k, v in self.sums.items()}
        return {
            "n_predictions": self.n,
            "ce_clean": per["clean"],
            "ce_sae": per["sae"],
            "ce_zero": per["zero"],
            "ce_mean": per["mean"],
            "ce_recovered": _ratio(per["zero"] - per["sae"], per["zero"] - per["clean"]),
            "ce_recovered_mean": _ratio(per["mean"] - per["sae"], per["mean"] - per["clean"]),
            "ce_loss_score": _ratio(
                per["score_everywhere"] - per["score_sae"], per["score_everywhere"] - per["score_clean"]
            ),
            "kl": per["kl"],
        }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole != 0 else math.nan
