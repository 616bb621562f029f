"""DFA carried on through the stream: which latents of a residual dictionary make one of an attention dictionary.

Source: Kissane et al. (2024), arXiv 2406.17759, appendix B; each head's share of a dictionary's latents, §4.1–4.2.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.errors import ConfigError, DataError
from interp.core.result import Provenance, Result, token_names
from interp.core.site import Site
from interp.dictionaries.base import Dictionary, Transcoder
from interp.dictionaries.heads import head_weights
from interp.evaluate.place import place_of
from interp.evaluate.top_examples import TopExamples
from interp.patching.features.dfa import attention_dictionary, encoder_constants, refuse_bent
from interp.patching.features.frozen import read_back, write_rows
from interp.patching.features.frozen_parts import attention_sites, frozen_attention, wide
from interp.patching.features.invariant import checked_latents

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

    from interp.core.manager import HookManager

__all__ = ["RDFA", "HeadLatents", "head_latents", "rdfa"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class RDFA(Result):
    """Which latents of the stream, at which positions, make one latent of attention; all terms sum to it.

    Attributes:
        layer: of both dictionaries.
        latent, pos: of the attention dictionary.
        src, feature, activation: place, number and activation of each active latent of the residual dictionary.
        by_head: what each adds, by the head that carries it.
        error: what the residual dictionary misses, per source position.
        bias: its b_dec (and what its space adds) per source position.
        constant: b_enc − b_dec · W_enc of the attention dictionary, biases of the norm and of values.
        pre_activation: in the model's run.
        tokens: text of each position.
    """

    title: ClassVar[str] = "Recursive direct feature attribution"
    layer: int
    latent: int
    pos: int
    src: Int[Tensor, " active"]
    feature: Int[Tensor, " active"]
    activation: Float[Tensor, " active"]
    by_head: Float[Tensor, "n_heads active"]
    error: Float[Tensor, " pos"]
    bias: Float[Tensor, " pos"]
    constant: float
    pre_activation: float
    tokens: list[str]

    @property
    def total(self) -> Float[Tensor, " active"]:
        """What each active latent adds, by all heads."""
        return self.by_head.sum(0)

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per active latent of the stream, the largest first."""
        import pandas as pd

        order = self.total.abs().argsort(descending=True, stable=True)
        columns = {"src": self.src, "feature": self.feature, "activation": self.activation, "attribution": self.total}
        frame = pd.DataFrame({name: column[order].tolist() for name, column in columns.items()})
        frame.insert(1, "token", [self.tokens[s] for s in frame["src"]])
        frame["head"] = self.by_head.abs().argmax(0)[order].tolist()
        return frame

    def plot(self) -> "plotly.graph_objects.Figure":
        """Draw what latents, errors and biases add, by source position."""
        from interp.report.figures import Axis, heatmap

        from_latents = torch.zeros_like(self.error).index_add_(0, self.src, self.total)
        return heatmap(
            torch.stack([self.bias, self.error, from_latents]),
            rows=Axis("", ["b_dec", "error", "latents"]),
            columns=Axis("position", [f"{i}: {t}" for i, t in enumerate(self.tokens)]),
            title=f"What makes latent {self.latent} of layer {self.layer} at {self.pos}",
            value="added to the pre-activation",
            diverging=True,
        )

    def summary(self) -> str:
        """Give the strongest latents of the stream, and what errors and biases add."""
        lines = [f"layer {self.layer} latent {self.latent} @{self.pos}: pre-activation {self.pre_activation:.4g}"]
        for i in self.total.abs().topk(min(5, len(self.src))).indices.tolist():
            where = f"@{int(self.src[i])} {self.tokens[int(self.src[i])]!r}"
            head = int(self.by_head[:, i].abs().argmax())
            lines.append(f"{float(self.total[i]):+.4g} latent {int(self.feature[i])} {where}, most by head {head}")
        biases = float(self.bias.sum()) + self.constant
        lines.append(f"errors {float(self.error.sum()):+.4g}, biases {biases:+.4g}")
        return "\n".join(lines)


def rdfa(
    hm: "HookManager", dictionary: Dictionary, residual: Dictionary, inputs: Any, *, latent: int, pos: int = -1
) -> RDFA:
    """Split DFA further, through a dictionary of the stream that attention reads: a_m W_dec^m W_V^k W_enc[slice k].

    σ of the norm and the pattern are held. Memory, in numbers: n_heads · (pos · d_model + active latents).

    Args:
        hm: the model.
        dictionary: an SAE of z.
        residual: an SAE of the same layer's `resid_pre` (or the `resid_post` before it).
        inputs: one prompt.
        latent: of the attention dictionary.
        pos: from the first token, or back from the last.

    Raises:
        ConfigError: dictionaries of other sites, or that normalise each token.
        DataError: several prompts, or a latent or position that is not there.
        ModelError: attention that does something else between stream and z; it is named.

    Source: Kissane et al. (2024), arXiv 2406.17759, appendix B. Departure: errors and biases are terms of their own, so
    that all sum to the pre-activation.
    """
    place = attention_dictionary(hm, dictionary)
    layer, start = int(place.layer or 0), place_of(hm, residual)
    reads = (layer, "resid_pre") if start.kind == "resid_pre" else (layer - 1, "resid_post")
    if isinstance(residual, Transcoder) or (start.layer, start.kind) != reads:
        raise ConfigError(f"the residual dictionary reads {start.short}; expected an SAE of {layer}.resid_pre")
    refuse_bent(residual)
    which = checked_latents(dictionary, latent)
    given = hm.to_tokens(inputs)
    if len(given.ids) != 1:
        raise DataError(f"rdfa takes one prompt, got {len(given.ids)}; give them one at a time")
    ids = given.ids[0][given.mask[0]]
    if not -len(ids) <= pos < len(ids):
        raise DataError(f"pos={pos}: the prompt has positions 0 to {len(ids) - 1} (or −{len(ids)} to −1)")
    pos = pos % len(ids)
    with torch.no_grad():
        run = hm.run(ids[None], read=[*attention_sites(hm, layer), f"{layer}.z"], logits="none")
        values = {site.short: wide(run[site][0]) for site in run}
        attention = frozen_attention(hm, layer, values)
        assert attention is not None
        z, x = values[f"{layer}.z"], values[f"{layer}.resid_pre"]
        columns = read_back(dictionary, which, z)[0].unflatten(0, (hm.n_heads, -1))
        # What the latent reads of each head's values, then of the stream at each source position.
        carried = attention.pattern[:, pos, :, None] * columns[:, None]
        read = torch.einsum("hsd,hmd->hsm", carried, attention.W_V.repeat_interleave(attention.group, 0))
        constant = encoder_constants(dictionary, which, z)[0] + (carried * attention.values(torch.zeros_like(x))).sum()
        read = read if attention.norm is None else attention.norm.back(read)
        codes = residual.encode(x)
        src, feature = (codes != 0).nonzero().T
        activation = wide(codes)[src, feature]
        by_head = _by_head(residual, read, src, feature) * activation
        made = wide(residual.reconstructed(codes, x))
        linear = torch.zeros_like(x).index_add_(0, src, write_rows(residual, feature, x) * activation[:, None])
        field = read.sum(0)
        pre = (columns * z[pos]).sum() + encoder_constants(dictionary, which, z)[0]
    settings = {"site": place.short, "residual": start.short, "latent": latent, "pos": pos}
    return RDFA(
        provenance=Provenance.of(hm, settings=settings, data=(ids,)),
        layer=layer,
        latent=latent,
        pos=pos,
        src=src.cpu(),
        feature=feature.cpu(),
        activation=activation.cpu(),
        by_head=by_head.cpu(),
        error=((x - made) * field).sum(-1).cpu(),
        bias=((made - linear) * field).sum(-1).cpu(),
        constant=float(constant),
        pre_activation=float(pre),
        tokens=token_names(hm, ids),
    )


def _by_head(residual: Dictionary, read: Tensor, src: Tensor, feature: Tensor) -> Float[Tensor, "n_heads active"]:
    """What one unit of each active latent adds by each head; source by source, which keeps memory down."""
    counts = torch.bincount(src, minlength=read.shape[1]).tolist()
    parts = [
        read[:, s] @ write_rows(residual, rows, read).T if len(rows) else read.new_zeros(len(read), 0)
        for s, rows in enumerate(feature.split(counts))
    ]
    return torch.cat(parts, 1)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class HeadLatents(Result):
    """The latents of an attention dictionary that are most of each head: what a head is for, in how many ways.

    Attributes:
        site: of the dictionary.
        latents: of each head, those with the largest share first.
        share: ‖W_dec[i, head]‖ / Σ ‖W_dec[i, ·]‖.
        labels: what each latent fires on, where examples were given; else "".
        density: share of tokens that each fires on; NaN where no examples were given.
    """

    title: ClassVar[str] = "Latents of each head"
    site: str
    latents: Int[Tensor, "n_heads k"]
    share: Float[Tensor, "n_heads k"]
    labels: dict[int, str]
    density: Float[Tensor, "n_heads k"]

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per head and latent."""
        import pandas as pd

        n, k = self.latents.shape
        columns = {name: getattr(self, name).flatten().tolist() for name in ("latents", "share", "density")}
        frame = pd.DataFrame({"head": torch.arange(n).repeat_interleave(k).tolist(), **columns})
        frame["label"] = [self.labels.get(i, "") for i in frame["latents"]]
        return frame.rename(columns={"latents": "latent"})

    def plot(self) -> "plotly.graph_objects.Figure":
        """Draw the shares, with the latents' numbers."""
        from interp.report.figures import Axis, heatmap

        return heatmap(
            self.share.float(),
            rows=Axis("head", [str(h) for h in range(len(self.latents))]),
            columns=Axis("rank"),
            title=f"Latents of {self.site} that are most of each head",
            value="share of the decoder row",
            text=[[str(i) for i in row] for row in self.latents.tolist()],
        )

    def summary(self) -> str:
        """Name each head's first latents."""
        lines = [f"{self.site}: latents that are most of each head"]
        for head, row in enumerate(self.latents.tolist()):
            shares = self.share[head].tolist()
            named = [
                f"{i}{' ' + self.labels[i] if self.labels.get(i) else ''} ({s:.0%})"
                for i, s in zip(row, shares, strict=True)
            ]
            lines.append(f"head {head}: " + ", ".join(named[:5]))
        return "\n".join(lines)


def head_latents(
    hm: "HookManager", dictionary: Dictionary, *, k: int = 10, examples: TopExamples | None = None
) -> HeadLatents:
    """Return each head's latents by their share of the decoder row: the table that polysemanticity is read off.

    Args:
        hm: the model.
        dictionary: an SAE of z.
        k: latents of each head.
        examples: contexts of the dictionary's latents, from `top_examples`: latents that never fired are left out, and
            the names of tokens or labels that latents match are given beside.

    Raises:
        ConfigError: a dictionary of another site.
        DataError: fewer latents than k, or examples of another dictionary.

    Source: Kissane et al. (2024), arXiv 2406.17759, §4.2: a head is looked at by its ten latents of the
    largest share.
    """
    place = attention_dictionary(hm, dictionary)
    share = head_weights(dictionary, hm.n_heads).T.cpu()
    density = torch.full(share.shape[1:], torch.nan, dtype=torch.float64)
    labels: dict[int, str] = {}
    if examples is not None:
        if len(examples.firing) != share.shape[1]:
            raise DataError(f"examples are of {len(examples.firing)} latents; this dictionary has {share.shape[1]}")
        density = examples.density
        share = share.masked_fill(examples.firing == 0, 0)
        pairs = zip(examples.latents.tolist(), examples.label, examples.claimed.tolist(), strict=True)
        labels = {latent: label for latent, label, claimed in pairs if claimed}
    if not 1 <= k <= share.shape[1]:
        raise DataError(f"k={k}: the dictionary has {share.shape[1]} latents")
    top = share.topk(k)
    return HeadLatents(
        provenance=Provenance.of(hm, settings={"site": place.short, "k": k}),
        site=Site(place.name).short,
        latents=top.indices,
        share=top.values,
        labels=labels,
        density=density[top.indices],
    )
