"""What transcoders' weights say without any prompt: which tokens a latent reads, which latents it is connected to.

σ of norms is left out, for it is a prompt's; gains and centring are in. So is nothing of patterns: through a head, what
is given is what would be read of a position that the head attends to.

Source: Dunefsky et al. (2024), arXiv 2406.11944, §4.1 (input-invariant terms) and §4.4 (de-embedding).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.errors import ConfigError, DataError, ModelError, ShapeError
from interp.core.result import Provenance, Result, token_names
from interp.core.site import Site
from interp.dictionaries.base import Dictionary, Transcoder
from interp.patching.features.frozen import FrozenAttention, FrozenNorm, read_back, write_rows

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

    from interp.core.manager import HookManager

__all__ = [
    "Connections",
    "DeEmbedding",
    "checked_latents",
    "connections",
    "de_embedding",
    "layer_of",
    "mean_activation",
    "read_static",
]

_BLOCK = 4096


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class DeEmbedding(Result):
    """Which tokens' embeddings latents read most of.

    Attributes:
        layer: of the transcoder.
        latents: which.
        through: "" for the embedding itself, or the head that it is read through, such as "L2H3".
        raised: tokens that raise each latent most.
        raised_by: by how much, at σ = 1.
        lowered, lowered_by: the same of those that lower it.
        names: text of the tokens above.
    """

    title: ClassVar[str] = "De-embedding"
    layer: int
    latents: Int[Tensor, " latent"]
    through: str
    raised: Int[Tensor, "latent k"]
    raised_by: Float[Tensor, "latent k"]
    lowered: Int[Tensor, "latent k"]
    lowered_by: Float[Tensor, "latent k"]
    names: dict[int, str]

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per latent and token."""
        import pandas as pd

        sides = (("raises", self.raised, self.raised_by), ("lowers", self.lowered, self.lowered_by))
        rows = [
            {
                "latent": latent,
                "side": side,
                "rank": rank,
                "token": self.names[int(ids[i, rank])],
                "reads": float(by[i, rank]),
            }
            for i, latent in enumerate(self.latents.tolist())
            for side, ids, by in sides
            for rank in range(ids.shape[1])
        ]
        return pd.DataFrame(rows)

    def plot(self) -> "plotly.graph_objects.Figure":
        """Draw the tokens that raise each latent most."""
        from interp.report.figures import Axis, heatmap

        words = [[self.names[i] for i in row] for row in self.raised.tolist()]
        return heatmap(
            self.raised_by,
            rows=Axis("latent", [str(i) for i in self.latents.tolist()]),
            columns=Axis("rank"),
            title=f"Tokens that latents of layer {self.layer} read"
            + (f" through {self.through}" if self.through else ""),
            value="read at σ = 1",
            text=words,
        )

    def summary(self) -> str:
        """Name the first tokens of each latent; ten latents at most."""
        by = f" through {self.through}" if self.through else ""
        lines = [f"layer {self.layer}{by}: tokens that latents read most of"]
        for i, latent in enumerate(self.latents.tolist()[:10]):
            lines.append(f"latent {latent}: " + ", ".join(repr(self.names[t]) for t in self.raised[i].tolist()[:8]))
        return "\n".join(lines)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Connections(Result):
    """Which latents of an earlier transcoder latents of a later one are connected to, by the weights.

    Attributes:
        layers: of the earlier and the later transcoder.
        through: "" for the direct connection, or the head between them.
        latents: of the later transcoder.
        sources: latents of the earlier one, those with the largest scores first.
        weight: W_dec · W_enc, with the gain of the norm between; what one unit of the source adds, at σ = 1.
        mean: mean activation of each source; 1 where none was given.
        score: |weight| · mean, by which sources are ranked.
        weighted: whether means were given.
    """

    title: ClassVar[str] = "Connections between transcoders"
    layers: tuple[int, int]
    through: str
    latents: Int[Tensor, " latent"]
    sources: Int[Tensor, "latent k"]
    weight: Float[Tensor, "latent k"]
    mean: Float[Tensor, "latent k"]
    score: Float[Tensor, "latent k"]
    weighted: bool

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per connection."""
        import pandas as pd

        n, k = self.sources.shape
        columns = {name: getattr(self, name).flatten().tolist() for name in ("weight", "mean", "score")}
        latents = self.latents[:, None].expand(n, k).flatten().tolist()
        return pd.DataFrame({"latent": latents, "source": self.sources.flatten().tolist(), **columns})

    def plot(self) -> "plotly.graph_objects.Figure":
        """Draw the scores, with the sources' numbers."""
        from interp.report.figures import Axis, heatmap

        return heatmap(
            self.score * self.weight.sign(),
            rows=Axis(f"latent of layer {self.layers[1]}", [str(i) for i in self.latents.tolist()]),
            columns=Axis("rank"),
            title=f"Sources in layer {self.layers[0]}" + (f" through {self.through}" if self.through else ""),
            value="weight · mean activation" if self.weighted else "weight",
            text=[[str(i) for i in row] for row in self.sources.tolist()],
            diverging=True,
        )

    def summary(self) -> str:
        """Name the first sources of each latent; ten latents at most."""
        how = "weight · mean activation" if self.weighted else "weight alone: inert latents may lead (give mean=…)"
        lines = [
            f"layer {self.layers[0]} → {self.layers[1]}{f' through {self.through}' * bool(self.through)}, by {how}"
        ]
        for i, latent in enumerate(self.latents.tolist()[:10]):
            pairs = zip(self.sources[i].tolist()[:5], self.weight[i].tolist(), strict=False)
            lines.append(f"latent {latent}: " + ", ".join(f"{source} ({weight:+.3g})" for source, weight in pairs))
        return "\n".join(lines)


def de_embedding(
    hm: "HookManager",
    transcoder: Transcoder,
    latents: Sequence[int] | int,
    *,
    through: tuple[int, int] | None = None,
    k: int = 10,
) -> DeEmbedding:
    """Return the tokens whose embeddings a latent's encoder reads most of: W_E · W_enc, or W_E · W_OV · W_enc.

    Memory: d_vocab · latents numbers.

    Args:
        hm: the model.
        transcoder: of one layer's MLP.
        latents: one or several.
        through: (layer, head) to read through; None for the direct way.
        k: tokens on each side.

    Raises:
        DataError: a latent or head that is not there, or a head that comes after the transcoder.
        ModelError: the family normalises its embeddings, so that a row of W_E is not what enters the stream.

    Source: Dunefsky et al. (2024), §4.4. Departures: the norms' gains are in; what the first MLP makes of a token is
    not.
    """
    if hm.map.has("embed_ln"):
        raise ModelError(f"{hm.map.family} normalises its embeddings, so W_E is not what latents read")
    layer = layer_of(hm, transcoder)
    chosen = checked_latents(transcoder, latents)
    with torch.no_grad():
        reads = read_static(hm, transcoder, layer, chosen)
        reads = reads if through is None else _through(hm, reads, through, layer)
        table = hm.weights.W_E.to(reads)
        values = reads @ table.T
        up, raised = values.topk(min(k, values.shape[1]))
        down, lowered = (-values).topk(min(k, values.shape[1]))
    shown = torch.cat([raised.flatten(), lowered.flatten()]).unique().cpu()
    return DeEmbedding(
        provenance=Provenance.of(hm, settings={"layer": layer, "through": through, "k": k}),
        layer=layer,
        latents=chosen.cpu(),
        through=_name(through),
        raised=raised.cpu(),
        raised_by=up.cpu(),
        lowered=lowered.cpu(),
        lowered_by=-down.cpu(),
        names=dict(zip(shown.tolist(), token_names(hm, shown), strict=True)),
    )


def connections(
    hm: "HookManager",
    source: Transcoder,
    target: Transcoder,
    *,
    latents: Sequence[int] | int | None = None,
    mean: Float[Tensor, " d_sae"] | None = None,
    through: tuple[int, int] | None = None,
    k: int = 10,
) -> Connections:
    """Return which latents of an earlier transcoder each latent of a later one reads most of.

    Memory: 4096 · latents numbers at a time, so that no whole matrix of the two is made.

    Args:
        hm: the model.
        source, target: transcoders of an earlier and a later layer.
        latents: of the target; None for all.
        mean: mean activation of each latent of the source, as from `mean_activation`; without it a connection that is
            strong in the weights leads even if its source never fires.
        through: (layer, head) between the two; None for the direct connection.
        k: sources of each latent.

    Raises:
        DataError: layers in another order, latents or a head that are not there.
        ShapeError: means of another length.

    Source: Dunefsky et al. (2024), §4.1. Departure: the gain of the norm that the target reads through is in.
    """
    first, last = layer_of(hm, source), layer_of(hm, target)
    if first >= last:
        raise DataError(f"the source is of layer {first} and the target of layer {last}; expected an earlier source")
    n = source.cfg.d_sae
    if mean is not None and mean.shape != (n,):
        raise ShapeError(f"mean has shape {tuple(mean.shape)}; expected [{n}], one for each latent of the source")
    chosen = checked_latents(target, range(target.cfg.d_sae) if latents is None else latents)
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    with torch.no_grad():
        reads = read_static(hm, target, last, chosen)
        reads = reads if through is None else _through(hm, reads, through, last, after=first)
        scale = reads.new_ones(n) if mean is None else mean.to(reads)
        for rows in torch.arange(n, device=reads.device).split(_BLOCK):
            weight = reads @ write_rows(source, rows, reads).T
            best, at = (weight.abs() * scale[rows]).topk(min(k, len(rows)))
            kept.append((best, rows[at], weight.gather(1, at)))
        score, which, weight = (torch.cat(part, 1) for part in zip(*kept, strict=True))
        score, at = score.topk(min(k, score.shape[1]))
        which, weight = which.gather(1, at), weight.gather(1, at)
    return Connections(
        provenance=Provenance.of(hm, settings={"layers": [first, last], "through": through, "k": k}),
        layers=(first, last),
        through=_name(through),
        latents=chosen.cpu(),
        sources=which.cpu(),
        weight=weight.cpu(),
        mean=scale[which].cpu(),
        score=score.cpu(),
        weighted=mean is not None,
    )


def mean_activation(hm: "HookManager", transcoder: Transcoder, tokens: Any) -> Float[Tensor, " d_sae"]:
    """Return the mean of each latent over the tokens of some prompts, special tokens and pads left out.

    Args:
        hm: the model.
        transcoder: of one layer's MLP.
        tokens: whatever `hm.run` takes.

    Raises:
        DataError: no token that counts.
    """
    layer_of(hm, transcoder)
    site, given = Site(str(transcoder.cfg.metadata["hook_name"])), hm.to_tokens(tokens)
    keep = given.mask & ~hm.special_mask(given.ids)
    if not bool(keep.any()):
        raise DataError("these prompts have special tokens and pads alone; give text")
    total = torch.zeros(transcoder.cfg.d_sae, device=hm.device)
    with torch.no_grad():
        x = hm.run(given, read=[site], logits="none")[site]
        for row, mine in zip(x, keep, strict=True):
            total += transcoder.encode(row[mine.to(row.device)]).float().sum(0)
    return total / int(keep.sum())


def layer_of(hm: "HookManager", transcoder: Transcoder) -> int:
    """The layer that a transcoder says it is of."""
    if not isinstance(transcoder, Transcoder) or transcoder.cfg.metadata.get("hook_name") is None:
        raise ConfigError("expected a transcoder whose metadata say what it reads (cfg.metadata['hook_name'])")
    layer = Site(str(transcoder.cfg.metadata["hook_name"])).layer
    if layer is None or layer >= hm.n_layers:
        raise ConfigError(f"the transcoder is of layer {layer}; this model has layers 0 to {hm.n_layers - 1}")
    return layer


def checked_latents(dictionary: Dictionary, latents: Any) -> Int[Tensor, " n"]:
    """Latents as a tensor on the dictionary's device."""
    chosen, d_sae = [latents] if isinstance(latents, int) else [int(i) for i in latents], dictionary.cfg.d_sae
    if not chosen or not all(0 <= i < d_sae for i in chosen):
        raise DataError(f"latents={chosen[:8]}: expected at least one, from 0 to {d_sae - 1}")
    return torch.tensor(chosen, device=dictionary.W_enc.device)


def read_static(hm: "HookManager", transcoder: Transcoder, layer: int, latents: Tensor) -> Float[Tensor, "n d_model"]:
    """What latents read of the stream at σ = 1."""
    rows = read_back(transcoder, latents, hm.weights.W_E.float())
    kind = Site(str(transcoder.cfg.metadata["hook_name"])).kind
    if kind in ("mlp_in", "resid_mid", "resid_pre"):
        return rows
    norm = _norm(hm, layer, "ln2") or (_norm(hm, layer, "ln1") if hm.map.parallel else None)
    if norm is None:
        return rows
    if kind.endswith(".normalized"):
        norm = FrozenNorm(norm.scale, torch.ones_like(norm.gain), norm.bias, norm.centred)
    return norm.back(rows[:, None])[:, 0]


def _norm(hm: "HookManager", layer: int, part: str) -> FrozenNorm | None:
    if not hm.atlas.has(f"{layer}.{part}.scale"):
        return None
    weights = hm.weights.norm_weights(layer, part)
    gain = weights.gain.float()
    return FrozenNorm(gain.new_ones(1, 1), gain, weights.bias.float(), weights.kind == "LN")


def _through(
    hm: "HookManager", reads: Tensor, through: tuple[int, int], before: int, *, after: int = -1
) -> Float[Tensor, "n d_model"]:
    """What readers of the stream read of an earlier position's stream, through a head that attends to it alone."""
    layer, head = through
    last = before - 1 if hm.map.parallel else before
    if not after < layer <= last or not 0 <= head < hm.n_heads:
        raise DataError(
            f"through={through}: expected a layer from {after + 1} to {last} and a head from 0 to {hm.n_heads - 1}"
        )
    w, group = hm.weights[layer], hm.n_heads // hm.n_kv_heads
    post = _norm(hm, layer, "ln1_post") if hm.map.attn_out == "ln1_post" else None
    key = head // group
    one = FrozenAttention(
        norm=_norm(hm, layer, "ln1"),
        post=post,
        pattern=reads.new_ones(1, 1, 1),
        W_V=w.W_V[key, None].float(),
        b_V=w.b_V[key, None].float(),
        W_O=w.W_O[head, None].float(),
        b_O=w.b_O.float(),
        factor=hm.map.residual_multiplier,
    )
    return one.back(reads[:, None])[:, 0]


def _name(through: tuple[int, int] | None) -> str:
    return "" if through is None else f"L{through[0]}H{through[1]}"
