"""Direct feature attribution: which head and which earlier position make a latent of an attention SAE active.

A dictionary of z reads the heads side by side, z_k = Σ_s A^k_ts v^k_s, so that its pre-activation is a sum over heads
and source positions; values are linear in the stream once σ is held, so that a dictionary of the stream splits it
further.

Source: Kissane, Krzyzanowski, Bloom, Conmy and Nanda (2024), "Interpreting attention layer outputs with sparse
autoencoders", arXiv 2406.17759, §2.2 (DFA), §4.1 (heads' weights) and appendix B (RDFA).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.errors import ConfigError, DataError, WhereError
from interp.core.result import Provenance, Result, token_names
from interp.core.site import Site
from interp.dictionaries.base import Dictionary, Transcoder
from interp.evaluate.place import place_of
from interp.patching.features.frozen import read_back
from interp.patching.features.frozen_parts import wide
from interp.patching.features.invariant import checked_latents

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

    from interp.core.manager import HookManager
    from interp.core.run import Run

__all__ = ["DFA", "attention_dictionary", "dfa", "encoder_constants"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class DFA(Result):
    """Where latents of an attention dictionary come from, exactly.

    `by_source`, `rest` and `constant` sum to the pre-activation; so do `by_head` and `constant`.

    Attributes:
        layer: of the dictionary.
        latents: which.
        pos: column of the position looked at, per row of the padded batch.
        by_head: z_k · W_enc[slice k, i].
        by_source: A^k_ts · (v^k_s · W_enc[slice k, i]); 0 at pads and to the right.
        rest: what z holds and pattern × value does not, as with an attention sink that has a value; else rounding.
        constant: b_enc − b_dec · W_enc.
        pre_activation, activation: of the latents in the model's run.
        mask: True where a token is real.
        tokens: text of each position, row by row, pads included.
    """

    title: ClassVar[str] = "Direct feature attribution"
    layer: int
    latents: Int[Tensor, " latent"]
    pos: Int[Tensor, " batch"]
    by_head: Float[Tensor, "batch latent n_heads"]
    by_source: Float[Tensor, "batch latent n_heads src"]
    rest: Float[Tensor, "batch latent n_heads"]
    constant: Float[Tensor, " latent"]
    pre_activation: Float[Tensor, "batch latent"]
    activation: Float[Tensor, "batch latent"]
    mask: Bool[Tensor, "batch src"]
    tokens: list[list[str]]

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per prompt, latent, head and source position up to the one looked at."""
        import pandas as pd

        columns = torch.arange(self.mask.shape[1])
        keep = self.mask & (columns <= self.pos[:, None])
        keep = keep[:, None, None].expand(self.by_source.shape)
        row, latent, head, src = keep.nonzero().T
        return pd.DataFrame(
            {
                "prompt": row.tolist(),
                "latent": self.latents[latent].tolist(),
                "head": head.tolist(),
                "src": src.tolist(),
                "token": [self.tokens[r][s] for r, s in zip(row.tolist(), src.tolist(), strict=True)],
                "attribution": self.by_source[keep].tolist(),
            }
        )

    def plot(self) -> "plotly.graph_objects.Figure":
        """Draw heads × source positions, for the first prompt and latent."""
        from interp.report.figures import Axis, heatmap

        last = int(self.pos[0]) + 1
        shown = [s for s in range(last) if bool(self.mask[0, s])]
        return heatmap(
            self.by_source[0, 0][:, shown],
            rows=Axis("head", [str(h) for h in range(self.by_head.shape[2])]),
            columns=Axis("position", [f"{s}: {self.tokens[0][s]}" for s in shown]),
            title=f"What makes latent {int(self.latents[0])} of layer {self.layer}",
            value="added to the pre-activation",
            diverging=True,
        )

    def summary(self) -> str:
        """Name the strongest head and source of each prompt and latent; ten at most."""
        lines = [f"layer {self.layer}: {len(self.latents)} latents on {len(self.pos)} prompts"]
        for row in range(len(self.pos)):
            for i, latent in enumerate(self.latents.tolist()):
                best = int(self.by_source[row, i].sum(0).abs().argmax())
                head = int(self.by_head[row, i].abs().argmax())
                pre = float(self.pre_activation[row, i])
                lines.append(
                    f"prompt {row}, latent {latent}: pre-activation {pre:.4g}; head {head} "
                    f"{float(self.by_head[row, i, head]):+.4g}; position {best} {self.tokens[row][best]!r} "
                    f"{float(self.by_source[row, i, :, best].sum()):+.4g}"
                )
        return "\n".join(lines[:11] + ["…"] * (len(lines) > 11))


def dfa(
    hm: "HookManager",
    dictionary: Dictionary,
    inputs: Any,
    *,
    latents: Sequence[int] | int,
    pos: int = -1,
    site: str | Site | None = None,
) -> DFA:
    """Split pre-activations of a dictionary of z by head and by source position.

    Under grouped queries a value head serves several heads, each with its own slice of W_enc; the value's bias is in
    the value. Memory, in numbers: batch · n_heads · pos for the pattern's rows, batch · latents · n_heads · pos for the
    result.

    Args:
        hm: the model.
        dictionary: an SAE trained on the heads side by side (`3.z`).
        inputs: prompts; whatever `hm.run` takes.
        latents: one or several.
        pos: from each row's first token, or back from its last.
        site: where the dictionary acts; None for where it was trained.

    Raises:
        ConfigError: a dictionary of another site, or one that normalises each token.
        DataError: latents that are not there.
        WhereError: a position that a row lacks.

    Source: Kissane et al. (2024), arXiv 2406.17759, §2.2. Departure: what pattern × value does not hold (sinks) is
    given, not left out.
    """
    place = attention_dictionary(hm, dictionary, site)
    chosen, layer = checked_latents(dictionary, latents), int(place.layer or 0)
    tokens = hm.to_tokens(inputs)
    _check_pos(tokens.lengths, pos)
    reads = [Site(f"{layer}.z").at(pos=pos), Site(f"{layer}.pattern").at(pos=pos), Site(f"{layer}.v")]
    with torch.no_grad():
        run = hm.run(tokens, read=reads, logits="none")
        z, pattern, v = (wide(run[site]) for site in reads)
        columns = read_back(dictionary, chosen, z).unflatten(1, z.shape[1:])  # [latent n_heads d_head]
        group = hm.n_heads // hm.n_kv_heads
        by_head = torch.einsum("bhd,ihd->bih", z, columns)
        read = torch.einsum("bskd,ikgd->bikgs", v, columns.unflatten(1, (-1, group))).flatten(2, 3)
        by_source = pattern.reshape(len(z), 1, hm.n_heads, -1) * read
        by_source = by_source.masked_fill(~tokens.mask.to(z.device)[:, None, None], 0)
        encoded = dictionary.encode(z.flatten(1))[:, chosen]
        constant = encoder_constants(dictionary, chosen, z)
    pre = by_head.sum(-1) + constant
    return DFA(
        provenance=_provenance(hm, run, {"site": place.short, "latents": chosen.tolist(), "pos": pos}),
        layer=layer,
        latents=chosen.cpu(),
        pos=_columns(tokens.mask.cpu(), pos),
        by_head=by_head.cpu(),
        by_source=by_source.cpu(),
        rest=(by_head - by_source.sum(-1)).cpu(),
        constant=constant.cpu(),
        pre_activation=pre.cpu(),
        activation=wide(encoded).cpu(),
        mask=tokens.mask.cpu(),
        tokens=[token_names(hm, row) for row in tokens.ids],
    )


def attention_dictionary(hm: "HookManager", dictionary: Dictionary, site: str | Site | None = None) -> Site:
    """Return the z that a dictionary reads, after checks.

    Args:
        hm: the model.
        dictionary: the dictionary.
        site: where it acts; None for where it was trained.

    Raises:
        ConfigError: it reads something else, normalises each token, or has an encoder that is not one linear map.
    """
    place = place_of(hm, dictionary, site)
    if place.kind != "z" or isinstance(dictionary, Transcoder):
        raise ConfigError(
            f"{type(dictionary).__name__} reads {place.short}; DFA takes an SAE of the heads, such as 3.z"
        )
    refuse_bent(dictionary)
    return place


def refuse_bent(dictionary: Dictionary) -> None:
    """Refuse a dictionary whose pre-activations are no linear function of what it reads."""
    if dictionary.space.normalize != "none":
        raise ConfigError(
            f"the dictionary normalises each token ({dictionary.space.normalize}), so its pre-activations are no sum; "
            "use one that was trained without"
        )


def encoder_constants(
    dictionary: Dictionary, latents: Int[Tensor, " n"], like: Float[Tensor, "..."]
) -> Float[Tensor, " n"]:
    """Return pre-activations of an activation of zeros: b_enc − b_dec · W_enc, and what the space adds.

    Args:
        dictionary: the dictionary; of a gated one the gate's.
        latents: which.
        like: whose dtype and device are wanted.
    """
    bias = getattr(dictionary, "b_gate", None) if hasattr(dictionary, "b_gate") else dictionary.b_enc
    assert isinstance(bias, Tensor)
    seen = dictionary.space.fixed(like.new_zeros(dictionary.cfg.d_in))
    if dictionary.cfg.apply_b_dec_to_input:
        seen = seen - dictionary.b_dec.detach().to(like)
    columns = dictionary.W_enc.detach().index_select(1, latents).to(like)
    return seen @ columns + bias.detach()[latents].to(like)


def _check_pos(lengths: Int[Tensor, " batch"], pos: int) -> None:
    shortest = int(lengths.min())
    if not -shortest <= pos < shortest:
        raise WhereError(f"pos={pos}: the shortest prompt has positions 0 to {shortest - 1} (or −{shortest} to −1)")


def _columns(mask: Bool[Tensor, "batch width"], pos: int) -> Int[Tensor, " batch"]:
    """The column of a position of each row, pads counted."""
    rank = mask.long().cumsum(1) - 1
    wanted = rank[:, -1:] + 1 + pos if pos < 0 else torch.full_like(rank[:, :1], pos)
    return ((rank == wanted) & mask).long().argmax(1)


def _provenance(hm: "HookManager", run: "Run", settings: dict[str, Any]) -> Provenance:
    if run.tokens is None or run.mask is None:
        raise DataError("this forward was given embeddings, so there are no tokens; give text or tokens")
    return Provenance.of(hm, settings=settings, data=(run.tokens, run.mask))
