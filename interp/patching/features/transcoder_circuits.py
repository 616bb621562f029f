"""What makes a transcoder's latent active, on one prompt: an exact sum over everything that was written before it.

Source: Dunefsky, Chlenski and Nanda (2024), "Transcoders find interpretable LLM feature circuits", arXiv 2406.11944,
§4: z_i(x_s) [of the input] · (W_dec^i · W_enc^j) [of the weights], directly and through attention heads.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.errors import DataError, WhereError
from interp.core.result import Provenance, Result, token_names
from interp.dictionaries.base import Transcoder
from interp.patching.features.freeze import freeze
from interp.patching.features.frozen import FrozenModel
from interp.patching.features.sources import KINDS, Sources, contributions

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

    from interp.core.manager import HookManager

__all__ = ["TranscoderAttribution", "attribution_of", "check_target", "pre_activation_attribution"]

_SHOWN = 5


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class TranscoderAttribution(Result):
    """What one pre-activation is made of; `total` and `constant` sum to it.

    Attributes:
        target: (layer, latent, pos).
        pre_activation: of the target, in the model's run.
        activation: the latent itself: the pre-activation, or 0 where it is not active.
        constant: what it would be of a stream of zeros: b_enc, and the bias of the norm before it.
        kind: of each source, an index into `kinds`.
        layer, pos, latent: where each source writes; layer −1 of embeddings, latent −1 of all but latents.
        value: activation of a latent; 1 of everything else.
        total: what each source adds, by all ways.
        direct: what it adds without passing attention (skip paths are passed).
        heads: (layer, head) of every head before the target.
        through: what each source adds by way of one head alone. What is left of `total` takes several heads.
        by_head: what each head carries to the target from each position, whatever it comes from; with the sources'
            `direct` and `constant` it sums to the pre-activation too.
        tokens: text of each position.
    """

    title: ClassVar[str] = "Attribution of a transcoder's latent"
    kinds: ClassVar[tuple[str, ...]] = KINDS
    target: tuple[int, int, int]
    pre_activation: float
    activation: float
    constant: float
    kind: Int[Tensor, " source"]
    layer: Int[Tensor, " source"]
    pos: Int[Tensor, " source"]
    latent: Int[Tensor, " source"]
    value: Float[Tensor, " source"]
    total: Float[Tensor, " source"]
    direct: Float[Tensor, " source"]
    heads: list[tuple[int, int]]
    through: Float[Tensor, "head source"]
    by_head: Float[Tensor, "head pos"]
    tokens: list[str]

    @property
    def weight(self) -> Float[Tensor, " source"]:
        """What one unit of each source adds: the factor that depends on the activations only by σ and the patterns."""
        return self.total / self.value

    def share(self, kind: str) -> float:
        """Return what all sources of a kind add together.

        Raises:
            DataError: no such kind.
        """
        if kind not in KINDS:
            raise DataError(f"no kind {kind!r}; they are {', '.join(KINDS)}")
        return float(self.total[self.kind == KINDS.index(kind)].sum())

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per source, the largest first; `best_head` is the head that carries most of it."""
        import pandas as pd

        order = self.total.abs().argsort(descending=True, stable=True)
        some = self.through if len(self.heads) else self.total.new_zeros(1, len(self.total))
        best = some.abs().argmax(0)
        return pd.DataFrame(
            {
                "source": [KINDS[k] for k in self.kind[order].tolist()],
                "layer": self.layer[order].tolist(),
                "pos": self.pos[order].tolist(),
                "token": [self.tokens[p] for p in self.pos[order].tolist()],
                "latent": self.latent[order].tolist(),
                "value": self.value[order].tolist(),
                "total": self.total[order].tolist(),
                "direct": self.direct[order].tolist(),
                "one_head": self.through.sum(0)[order].tolist(),
                "several_heads": (self.total - self.direct - self.through.sum(0))[order].tolist(),
                "best_head": [
                    f"L{self.heads[h][0]}H{self.heads[h][1]}" if self.heads else "" for h in best[order].tolist()
                ],
            }
        )

    def plot(self) -> "plotly.graph_objects.Figure":
        """Draw what each position adds, by kind of source and layer."""
        from interp.report.figures import Axis, heatmap

        keys = sorted({(layer, kind) for layer, kind in zip(self.layer.tolist(), self.kind.tolist(), strict=True)})
        rows = torch.zeros(len(keys), len(self.tokens))
        for i, (layer, kind) in enumerate(keys):
            mine = (self.layer == layer) & (self.kind == kind)
            rows[i].index_add_(0, self.pos[mine], self.total[mine].float())
        names = [KINDS[k] if layer < 0 else f"L{layer} {KINDS[k]}" for layer, k in keys]
        return heatmap(
            rows,
            rows=Axis("", names),
            columns=Axis("position", [f"{i}: {t}" for i, t in enumerate(self.tokens)]),
            title=f"What makes {self._name()}: {self.pre_activation:.3g}",
            value="added to the pre-activation",
            diverging=True,
        )

    def summary(self) -> str:
        """Give the pre-activation, its largest sources, and how much errors and biases make of it."""
        lines = [f"{self._name()}: pre-activation {self.pre_activation:.4g}"]
        for i in self.total.abs().topk(min(_SHOWN, len(self.total))).indices.tolist():
            kind, layer, latent = KINDS[int(self.kind[i])], int(self.layer[i]), int(self.latent[i])
            name = kind if layer < 0 else f"L{layer} {kind}" + (f" {latent}" if latent >= 0 else "")
            where = f"@{int(self.pos[i])} {self.tokens[int(self.pos[i])]!r}"
            lines.append(f"{float(self.total[i]):+.4g} {name} {where} (direct {float(self.direct[i]):+.4g})")
        rest = {"errors": self.share("error"), "MLPs without a transcoder": self.share("mlp")}
        rest["biases"] = self.share("attn_bias") + self.share("b_dec") + self.constant
        lines.append("of it " + ", ".join(f"{name} {value:+.4g}" for name, value in rest.items()))
        return "\n".join(lines)

    def _name(self) -> str:
        layer, latent, pos = self.target
        return f"L{layer} latent {latent} @{pos} {self.tokens[pos]!r}"


def pre_activation_attribution(
    hm: "HookManager", transcoders: Mapping[int, Transcoder], tokens: Any, *, target: tuple[int, int, int]
) -> TranscoderAttribution:
    """Split the pre-activation of one latent into everything that was written into the stream before it.

    Sources are active latents of earlier transcoders, embeddings, what transcoders miss, MLPs without a transcoder, and
    biases; each with what it adds by all ways, directly, and through each head alone. σ of norms and attention
    patterns are held at the prompt's values; the sum is then exact, for LayerNorm and RMSNorm, grouped queries, rotary
    positions, post-norms and parallel blocks. What a skip transcoder passes on counts for whoever wrote it.

    Memory, in numbers: heads · sources, and n_heads · pos · n_heads · d_head for a layer at a time, besides what
    `freeze` takes. Cost: one forward, and one backward of attention alone per layer of heads.

    Args:
        hm: the model.
        transcoders: layer → transcoder of its MLP, plain or skip, ours or loaded; layers may be missing.
        tokens: one prompt; whatever `hm.run` takes.
        target: (layer, latent, pos); pos from the first token, or back from the last.

    Raises:
        DataError: several prompts, or a target that does not exist.
        ConfigError: a transcoder of another place, or one that is not linear where it is active.
        ModelError: a family whose blocks do something else; it is named.

    Source: Dunefsky et al. (2024), arXiv 2406.11944, §4.1–4.2. Departures: ways through any number of heads are summed
    exactly, one head's way is given beside; what the transcoders miss is a source of its own.
    """
    return attribution_of(freeze(hm, transcoders, tokens), target)


def attribution_of(frozen: FrozenModel, target: tuple[int, int, int]) -> TranscoderAttribution:
    """Return the same of a prompt that is frozen already.

    Args:
        frozen: from `freeze`.
        target: (layer, latent, pos).

    Raises:
        DataError: a target that does not exist.
    """
    layer, latent, pos = check_target(frozen, target)
    held, sources = frozen.transcoders[layer], Sources.of(frozen)
    device = frozen.resid.device
    at, which = torch.tensor([pos], device=device), torch.tensor([latent], device=device)
    with torch.no_grad():
        seeds = frozen.seed(torch.tensor([frozen.mlp_time(layer)]), at, held.reads(which, at))
        total, direct = contributions(frozen, seeds)[0], contributions(frozen, seeds, {})[0]
        heads, through, carried = _through_heads(frozen, seeds, frozen.mlp_time(layer))
        pre = held.pre_activation(latent, pos)
        active = held.value[held.at(pos)][held.latent[held.at(pos)] == latent].sum()
        constant = held.constants(which)[0]
    none = total.new_zeros(0, len(total))
    by_source = torch.cat(through) if through else none
    by_head = torch.cat(carried) if carried else total.new_zeros(0, len(frozen.ids))
    return TranscoderAttribution(
        provenance=Provenance.of(frozen.hm, settings=_settings(frozen, (layer, latent, pos)), data=(frozen.ids,)),
        target=(layer, latent, pos),
        pre_activation=float(pre),
        activation=float(active),
        constant=float(constant),
        heads=heads,
        tokens=token_names(frozen.hm, frozen.ids),
        **{name: getattr(sources, name).cpu() for name in ("kind", "layer", "pos", "latent", "value")},
        **{n: x.cpu() for n, x in (("total", total), ("direct", direct), ("through", by_source), ("by_head", by_head))},
    )


def _through_heads(
    frozen: FrozenModel, seeds: dict[int, Tensor], time: int
) -> tuple[list[tuple[int, int]], list[Tensor], list[Tensor]]:
    """What comes by way of each head last, from each source and from each position, block by block from the first."""
    heads, through, carried = [], [], []
    reads = {layer: g[0] for place, layer, g in frozen.walk(seeds, {}) if place == "attn" and 2 * layer + 1 < time}
    for layer in sorted(reads):
        attention = frozen.attention[layer]
        assert attention is not None
        fields = attention.back_by_head(reads[layer])
        heads += [(layer, head) for head in range(len(fields))]
        through.append(contributions(frozen, {2 * layer + 1: fields}, {}))
        carried.append((fields * frozen.stream(2 * layer + 1)).sum(-1))
    return heads, through, carried


def check_target(frozen: FrozenModel, target: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return a target with its position counted from the first token.

    Raises:
        DataError: no such layer or latent.
        WhereError: no such position.
    """
    if len(target) != 3 or not all(isinstance(i, int) and not isinstance(i, bool) for i in target):
        raise DataError(f"target={target!r}: expected (layer, latent, pos), such as (3, 17, -1)")
    layer, latent, pos = target
    if layer not in frozen.transcoders:
        raise DataError(f"target has layer {layer}; there are transcoders of layers {sorted(frozen.transcoders)}")
    d_sae, n = frozen.transcoders[layer].transcoder.cfg.d_sae, len(frozen.ids)
    if not 0 <= latent < d_sae:
        raise DataError(f"target has latent {latent}; the transcoder of layer {layer} has latents 0 to {d_sae - 1}")
    if not -n <= pos < n:
        raise WhereError(f"target has position {pos}; the prompt has positions 0 to {n - 1} (or −{n} to −1)")
    return layer, latent, pos % n


def _settings(frozen: FrozenModel, target: tuple[int, int, int]) -> dict[str, Any]:
    known = {layer: held.transcoder.cfg.metadata.get("hook_name") for layer, held in frozen.transcoders.items()}
    return {"target": list(target), "transcoders": {str(layer): site for layer, site in sorted(known.items())}}
