"""The direct effect of each part: its own path into the last stream is changed, every other path kept.

The last stream with one part's contribution replaced goes through the final norm and the unembedding again. With σ as
it was this is what direct logit attribution says; with σ recomputed it shows what that leaves out; beside the total
effect it shows what later layers do about it.

Source: direct effect as path patching into the logits, Wang et al. (2022), arXiv 2211.00593, §3.1 and appendix B; its
distance from the total effect as self-repair, McGrath et al. (2023), arXiv 2307.15771, §2. Departures: all parts of one
position from two forwards; a head's way through a norm on attention's output keeps that norm's σ.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.direct import DirectPath, head_vectors, wide
from interp.core.errors import ConfigError, DataError, nearest
from interp.core.intervention import Replace
from interp.core.manager import HookManager
from interp.core.result import Provenance, Result
from interp.core.run import Run
from interp.core.site import Site
from interp.core.stats import pearson
from interp.core.text import Tokens
from interp.core.where import Where
from interp.data.pair_tokens import PairTokens
from interp.lens.capture import checked_readout, last_stream
from interp.lens.direct_terms import Slice, Terms, reads_for
from interp.lens.target import Target, pairs_of, read_target

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

    from interp.core.readout import Readout

__all__ = ["DirectEffect", "direct_effect"]

_END = Where(pos=-1)
_WAYS, _VALUES, _NORMS = ("component", "head"), ("corrupted", "mean", "zero"), ("recomputed", "frozen")


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class DirectEffect(Result):
    """What each part's direct path does to a metric, beside what direct attribution says of it.

    Attributes:
        target: The metric.
        value: What parts were replaced by.
        norm: Whether the final norm's σ was recomputed.
        labels: The parts, such as "3_mlp_out" or "L2H1".
        layers: Their blocks, −1 for the embedding.
        heads: Their heads, −1 for none.
        effect: The metric with the part replaced on its direct path − the metric as it is.
        attribution: The same by direct attribution: the change of the part times its direction, σ held.
        total_effect: The metric of a forward with the part replaced for all that follows − the metric as it is; no
            rows where it was not asked for.
        clean: The metric as it is.
    """

    title: ClassVar[str] = "Direct effects"
    target: str
    value: str
    norm: str
    labels: list[str]
    layers: Int[Tensor, " part"]
    heads: Int[Tensor, " part"]
    effect: Float[Tensor, "part example"]
    attribution: Float[Tensor, "part example"]
    total_effect: Float[Tensor, "known example"]
    clean: Float[Tensor, " example"]

    @property
    def nmae(self) -> float:
        """Mean |effect − attribution| / mean |effect|, over parts and examples; 0 is equal."""
        return float((self.effect - self.attribution).abs().mean() / self.effect.abs().mean())

    @property
    def pearson(self) -> float:
        """Correlation of effect and attribution, over parts and examples."""
        return pearson(self.effect.flatten(), self.attribution.flatten())

    @property
    def repair(self) -> Float[Tensor, "part example"]:
        """Total − direct effect: what later parts add to, or take back from, the loss of this one.

        Raises:
            DataError: the total effects were not asked for.
        """
        if not len(self.total_effect):
            raise DataError("total effects were not measured; give total=True (one forward per part)")
        return self.total_effect - self.effect

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per part and example."""
        import pandas as pd

        n = len(self.clean)
        total = self.total_effect if len(self.total_effect) else torch.full_like(self.effect, torch.nan)
        return pd.DataFrame(
            {
                "part": [label for label in self.labels for _ in range(n)],
                "layer": self.layers.repeat_interleave(n).tolist(),
                "head": self.heads.repeat_interleave(n).tolist(),
                "example": list(range(n)) * len(self.labels),
                "effect": self.effect.flatten().tolist(),
                "attribution": self.attribution.flatten().tolist(),
                "total_effect": total.flatten().tolist(),
            }
        )

    def plot(self, *, against: str = "attribution") -> "plotly.graph_objects.Figure":
        """Draw each part's mean direct effect against its attribution, or its "total_effect".

        Args:
            against: What stands across.

        Raises:
            ConfigError: Something else.
            DataError: Total effects that were not measured.
        """
        from interp.report.scatter import scatter

        if against not in ("attribution", "total_effect"):
            raise ConfigError(f"against={against!r}: expected 'attribution' or 'total_effect'")
        other = self.attribution if against == "attribution" else self.effect + self.repair
        title = f"{self.target}: each part set to its {self.value} value, σ {self.norm}"
        return scatter(
            other.mean(1),
            self.effect.mean(1),
            names=self.labels,
            x=f"{against.replace('_', ' ')}, logits",
            y="direct effect, logits",
            title=title,
        )

    def summary(self) -> str:
        """Give the strongest effects, and how far attribution is from them."""
        mean = self.effect.mean(1)
        lines = [f"{self.target}: {float(self.clean.mean()):.4g} as it is ({len(self.clean)} examples)"]
        for i in mean.abs().topk(min(5, len(mean))).indices.tolist():
            total = f", total {float(self.total_effect[i].mean()):+.4g}" if len(self.total_effect) else ""
            lines.append(
                f"{self.labels[i]} to its {self.value} value: {float(mean[i]):+.4g} directly"
                f" (attribution {float(self.attribution[i].mean()):+.4g}{total})"
            )
        lines.append(f"σ {self.norm}: NMAE {self.nmae:.2g}, Pearson {self.pearson:.4f} with attribution")
        return "\n".join(lines)


def direct_effect(
    hm: HookManager,
    data: Any,
    target: Any = None,
    *,
    by: str = "component",
    value: str = "corrupted",
    norm: str = "recomputed",
    total: bool = False,
    progress: bool = True,
) -> DirectEffect:
    """Replace each part's direct path into the final stream, at each row's last token, and compare with attribution.

    Two forwards, and one more for each part with `total`. Memory: parts · examples · d_model for components; for heads
    z of all layers and, one layer at a time, n_heads · examples · d_model.

    Args:
        hm: The model.
        data: `PromptPairs` (or `PairTokens`), whose clean side is measured; for "mean" and "zero" also text.
        target: As for `direct_logit_attribution`: linear in the logits.
        by: "component" or "head".
        value: What a part is replaced by: its value on the "corrupted" prompt of the pair, its "mean" over the
            examples, or "zero".
        norm: "recomputed": the final norm sees the changed stream; soft-cap included. "frozen": its σ is that of the
            run, and the metric is of the logits before the soft-cap, as attribution has it.
        total: Measure total effects too: the part replaced in a forward, with all that follows from it.
        progress: Show a bar on stderr for `total` when it is a terminal.

    Returns:
        The effects per part and example, on the host.

    Raises:
        ConfigError: An unknown choice.
        DataError: No pairs where their corrupted side is wanted, or a target that is not linear.
        ModelError: The model makes its logits in an unknown way.

    Source: see the module's text.
    """
    for name, given, known in (("by", by, _WAYS), ("value", value, _VALUES), ("norm", norm, _NORMS)):
        if given not in known:
            raise ConfigError(f"{name}={given!r}: {nearest(str(given), known) or 'expected ' + ' or '.join(known)}")
    pairs = pairs_of(hm, data)
    if value == "corrupted" and pairs is None:
        raise DataError("text has no corrupted side; give PromptPairs, or value='mean' or 'zero'")
    tokens = pairs.clean if pairs is not None else hm.to_tokens(data)
    asked = read_target(hm, tokens, target, pairs)
    reads = reads_for(hm, by, _END)
    out = hm.run(tokens, read=reads, logits="last")
    readout = checked_readout(hm, out, last_stream(hm).at(pos=-1))
    clean = Slice(out, _END)
    other = _other(hm, pairs, reads) if value == "corrupted" else None
    with torch.no_grad():
        parts, effect, attribution = _effects(clean, other, asked, readout, (by, value, norm))
        base = asked.of(wide(out.logits[:, 0]).index_select(1, asked.columns.to(out.logits.device)))
        totals = _totals(tokens, clean, other, asked, base, parts, value, progress) if total else effect[:0]
    settings = {"target": asked.name, "by": by, "value": value, "norm": norm, "total": total}
    used = (tokens.ids, tokens.mask) + (() if pairs is None else (pairs.corrupted.ids, pairs.corrupted.mask))
    return DirectEffect(
        provenance=Provenance.of(hm, settings=settings, data=used),
        target=asked.name,
        value=value,
        norm=norm,
        labels=parts.labels,
        layers=torch.tensor(parts.layers),
        heads=torch.tensor(parts.heads),
        effect=effect.cpu(),
        attribution=attribution.cpu(),
        total_effect=totals.cpu(),
        clean=base.cpu(),
    )


def _other(hm: HookManager, pairs: PairTokens | None, reads: list[Site]) -> Slice:
    assert pairs is not None
    return Slice(hm.run(pairs.corrupted, read=reads), _END)


def _instead(x: Tensor, name: str, other: Slice | None, value: str) -> Tensor:
    """What stands in place of a site's value [row …]."""
    if other is not None:
        return other[name]
    return x.mean(0, keepdim=True).expand_as(x) if value == "mean" else torch.zeros_like(x)


def _effects(
    clean: Slice, other: Slice | None, asked: Target, readout: "Readout", how: tuple[str, str, str]
) -> tuple[Terms, Float[Tensor, "part row"], Float[Tensor, "part row"]]:
    (by, value, norm), hm = how, clean.hm
    final = clean[last_stream(hm).short]
    path = DirectPath.of(hm, final, asked.columns, asked.weights)
    measure = _Measure(hm, readout, asked, path, final, frozen=norm == "frozen")
    parts, attributions = Terms(), []

    def take(labels: list[str], kind: str, change: Tensor, layer: int, heads: list[int] | None = None) -> None:
        change = change.to(final)
        parts.add_all(labels, kind, measure(change), layer=layer, heads=heads)
        attributions.append(path.of_vectors(change))

    def change_of(name: str) -> Tensor:
        return _instead(clean[name], name, other, value) - clean[name]

    take(["embed"], "embed", change_of("0.resid_pre")[None], -1)
    for layer in range(hm.n_layers):
        if by == "head":
            vectors = head_vectors(hm, layer, change_of(f"{layer}.z"), clean.scale(layer, "attn"))
            heads = list(range(hm.n_heads))
            take([f"L{layer}H{head}" for head in heads], "head", vectors, layer, heads)
        else:
            take([f"{layer}_attn_out"], "attn", change_of(f"{layer}.attn_out")[None], layer)
        if hm.atlas.has(Site(f"{layer}.mlp_out")):
            take([f"{layer}_mlp_out"], "mlp", change_of(f"{layer}.mlp_out")[None], layer)
    return parts, torch.cat(parts.values), torch.cat(attributions)


@dataclass(frozen=True, eq=False)
class _Measure:
    """The change of the metric that a change of the last stream makes."""

    hm: HookManager
    readout: "Readout"
    asked: Target
    path: DirectPath
    final: Float[Tensor, "row d_model"]
    frozen: bool

    def __call__(self, change: Float[Tensor, "part row d_model"]) -> Float[Tensor, "part row"]:
        before = self.metric(self.final)
        return torch.stack([self.metric(self.final + one) - before for one in change])

    def metric(self, stream: Float[Tensor, "row d_model"]) -> Float[Tensor, " row"]:
        unembed, norm = self.readout.unembed, self.readout.norm
        if not self.frozen:
            logits = self.readout.logits(stream.to(unembed.weight.dtype), self.asked.columns)
            return self.asked.of(wide(logits))
        x = stream
        if norm is not None:
            spec = self.hm.atlas.norm("ln_final")
            x = spec.output(spec.centre(stream) / self.path.sigma[:, None], norm, stream.dtype)
        at = self.asked.columns.to(x.device)
        bias = None if unembed.bias is None else wide(unembed.bias)[at].to(x)
        logits = torch.nn.functional.linear(x, wide(unembed.weight.index_select(0, at)).to(x), bias)
        return self.asked.of(logits * self.readout.scale)


def _totals(
    tokens: Tokens,
    clean: Slice,
    other: Slice | None,
    asked: Target,
    base: Float[Tensor, " row"],
    parts: Terms,
    value: str,
    progress: bool,
) -> Float[Tensor, "part row"]:
    """One forward per part, in which all that follows sees the part replaced."""
    hm, found = clean.hm, []
    names = {"embed": "resid_pre", "attn": "attn_out", "mlp": "mlp_out", "head": "z"}
    with _bar(len(parts.labels), progress) as bar, _quiet():
        for kind, layer, head in zip(parts.kinds, parts.layers, parts.heads, strict=True):
            name = f"{max(layer, 0)}.{names[kind]}"
            # One value per selected position, all heads of it: a shape that reads in one way only.
            instead = _instead(clean[name], name, other, value)[:, None].to(hm.dtype)
            where = _END if head < 0 else Where(pos=-1, head=head)
            out = hm.run(tokens, write=[Replace(name, instead, where=where)], logits="last")
            found.append(_metric_of(out, asked) - base)
            bar.update()
    return torch.stack(found)


def _metric_of(out: Run, asked: Target) -> Float[Tensor, " row"]:
    return asked.of(wide(out.logits[:, 0]).index_select(1, asked.columns.to(out.logits.device)))


@contextmanager
def _bar(total: int, show: bool) -> Iterator[Any]:
    from tqdm import tqdm

    # None: only where stderr is a terminal.
    with tqdm(total=total, desc="total effects", unit="part", disable=None if show else True) as bar:
        yield bar


@contextmanager
def _quiet() -> Iterator[None]:
    # A part that is the same on both prompts has no effect, which is a finding and no mistake.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*changed nothing")
        yield
