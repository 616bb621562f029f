"""The logit lens: the model's own final norm and unembedding, applied to the residual stream of every layer.

Source: nostalgebraist (2020), "interpreting GPT: the logit lens". Departures: the model's final soft-cap and logit
scale are applied too, so that the last layer is the model's own output (this is checked at every call); a *direction*
is read without soft-cap and norm statistics, which are no property of a direction.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.decompose import effect_on_logits
from interp.core.errors import DataError, ShapeError
from interp.core.manager import HookManager
from interp.core.metrics import kl_divergence
from interp.core.result import Provenance, Result, token_names
from interp.core.site import Site
from interp.lens.capture import Streams, capture_streams

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

__all__ = ["DirectionLogits", "LogitLensResult", "direction_logits", "logit_lens", "read_early"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class LogitLensResult(Result):
    """What the logit lens, or a tuned lens, reads at every residual site and position.

    Attributes:
        reader: "logit lens" or "tuned lens".
        sites: Short names of the sites, in order.
        tokens: The input's ids at the positions read.
        columns: Those positions, as columns of the padded batch.
        mask: True where a token is real; the floats below are NaN elsewhere.
        special: True where a token is special; `summary` leaves those out.
        top_ids: The k likeliest next tokens, likeliest first.
        top_probs: Their probabilities.
        entropy: Entropy of the lens' distribution, in nats.
        kl_to_final: KL(model's output ‖ lens), in nats.
        target_ids: The token that is asked about at each position, −1 where there is none.
        target_logprob: Its log-probability in nats, NaN where there is none.
        target_rank: How many tokens the lens finds likelier than it, −1 where there is none.
        names: Text of every token id above.
    """

    title: ClassVar[str] = "Logit lens"
    reader: str
    sites: list[str]
    tokens: Int[Tensor, "batch pos"]
    columns: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    special: Bool[Tensor, "batch pos"]
    top_ids: Int[Tensor, "site batch pos k"]
    top_probs: Float[Tensor, "site batch pos k"]
    entropy: Float[Tensor, "site batch pos"]
    kl_to_final: Float[Tensor, "site batch pos"]
    target_ids: Int[Tensor, "batch pos"]
    target_logprob: Float[Tensor, "site batch pos"]
    target_rank: Int[Tensor, "site batch pos"]
    names: dict[int, str]

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per site, example and position."""
        import pandas as pd

        rows = []
        for example, pos in self.mask.nonzero().tolist():
            target = int(self.target_ids[example, pos])
            for i, site in enumerate(self.sites):
                at = (i, example, pos)
                rows.append(
                    {
                        "site": site,
                        "example": example,
                        "pos": int(self.columns[example, pos]),
                        "token": self.names[int(self.tokens[example, pos])],
                        "top_token": self.names[int(self.top_ids[at][0])],
                        "top_prob": float(self.top_probs[at][0]),
                        "entropy": float(self.entropy[at]),
                        "kl_to_final": float(self.kl_to_final[at]),
                        "target": self.names[target] if target >= 0 else None,
                        "target_logprob": float(self.target_logprob[at]),
                        "target_rank": int(self.target_rank[at]) if target >= 0 else None,
                    }
                )
        return pd.DataFrame(rows).astype({"target_rank": "Int64"})

    def plot(self, *, row: int = 0) -> "plotly.graph_objects.Figure":
        """Draw sites × positions of one example: the likeliest next token in each cell, coloured by its probability.

        Args:
            row: Which example of the batch.
        """
        from interp.report.figures import Axis, heatmap

        if not 0 <= row < len(self.tokens):
            raise DataError(f"row={row}: the result has examples 0 … {len(self.tokens) - 1}")
        real = self.mask[row].nonzero()[:, 0].tolist()
        text = [[self.names[int(self.top_ids[s, row, p, 0])] for p in real] for s in range(len(self.sites))]
        hover = [[self._hover(s, row, p) for p in real] for s in range(len(self.sites))]
        return heatmap(
            self.top_probs[:, row, real, 0],
            rows=Axis("", self.sites),
            columns=Axis("token that was read", [self.names[int(self.tokens[row, p])] for p in real]),
            title=f"Likeliest next token, read out early by the {self.reader}",
            value="probability",
            text=text,
            hover=hover,
        )

    def _hover(self, site: int, row: int, pos: int) -> str:
        at = (site, row, pos)
        best = zip(self.top_ids[at].tolist(), self.top_probs[at].tolist(), strict=True)
        lines = [f"{self.names[i]!r}  {p:.3f}" for i, p in best]
        lines.append(f"entropy {float(self.entropy[at]):.2f} nats, KL to final {float(self.kl_to_final[at]):.2f} nats")
        target = int(self.target_ids[row, pos])
        if target >= 0:
            lines.append(f"target {self.names[target]!r}: rank {int(self.target_rank[at])}")
        return "\n".join(lines)

    def summary(self) -> str:
        """Say, per site, how close the lens is to the model's output; special tokens are left out."""
        counted = self.mask & ~self.special
        if not counted.any():
            counted = self.mask
        agree = (self.top_ids[..., 0] == self.top_ids[-1, ..., 0])[:, counted].float().mean(1).tolist()
        far = self.kl_to_final[:, counted].mean(1).tolist()
        head = f"{int(counted.sum())} positions (special tokens left out); last site: {self.sites[-1]}"
        rows = [
            f"{s}: same top token {a:.0%}, KL to output {k:.3f} nats"
            for s, a, k in zip(self.sites, agree, far, strict=True)
        ]
        return "\n".join([head, *rows])


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class DirectionLogits(Result):
    """Which tokens directions of the residual stream write towards.

    Attributes:
        logits: Effect of each direction on the logits at σ = 1, centred over the vocabulary.
        top_ids: Tokens raised most, first the strongest.
        bottom_ids: Tokens lowered most, first the strongest.
        names: Text of those tokens.
    """

    title: ClassVar[str] = "Logits of a direction"
    logits: Float[Tensor, "n d_vocab"]
    top_ids: Int[Tensor, "n k"]
    bottom_ids: Int[Tensor, "n k"]
    names: dict[int, str]

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per direction and listed token."""
        import pandas as pd

        rows = [
            {
                "direction": d,
                "end": end,
                "rank": rank,
                "token": self.names[token],
                "id": token,
                "logit": float(self.logits[d, token]),
            }
            for end, ids in (("top", self.top_ids), ("bottom", self.bottom_ids))
            for d, listed in enumerate(ids.tolist())
            for rank, token in enumerate(listed)
        ]
        return pd.DataFrame(rows)

    def plot(self, *, direction: int = 0) -> "plotly.graph_objects.Figure":
        """Draw the tokens that one direction raises and lowers most.

        Args:
            direction: Which of the directions.
        """
        from interp.report.figures import Axis, bars

        ids = self.top_ids[direction].tolist() + self.bottom_ids[direction].flip(0).tolist()
        labels = Axis("", [self.names[i] for i in ids])
        return bars(self.logits[direction, ids], labels=labels, title=f"Direction {direction}", value="logit at σ = 1")

    def summary(self) -> str:
        """List the tokens at both ends of each direction."""
        lines = []
        for d, (top, bottom) in enumerate(zip(self.top_ids.tolist(), self.bottom_ids.tolist(), strict=True)):
            up, down = (", ".join(repr(self.names[i]) for i in ids[:5]) for ids in (top, bottom))
            lines.append(f"direction {d}: raises {up}; lowers {down}")
        return "\n".join(lines)


def logit_lens(
    hm: HookManager,
    text: Any,
    *,
    sites: Sequence[Site | str] | None = None,
    top_k: int = 5,
    targets: int | Int[Tensor, "rows columns"] | None = None,
    pos: "int | Sequence[int] | Int[Tensor, 'rows *n'] | None" = None,
) -> LogitLensResult:
    """Read every residual site as the model reads its last one: final norm, unembedding, logit scale, soft-cap.

    Memory: the residuals, and four tensors [batch pos d_vocab] at a time, whatever the number of sites; with `pos`, of
    so many positions alone.

    Args:
        hm: The model.
        text: Whatever `hm.run` takes; or a `Run` that read residual sites, the last `resid_post` among them, whole or
            all at the same positions: then nothing is run again (but one row, to check the readout, where that run has
            no logits of these positions).
        sites: Residual sites or globs; None takes `0.resid_pre` and every `resid_post` (of a `Run`, all it has).
        top_k: How many of the likeliest tokens to keep.
        targets: The token asked about: one id everywhere, ids [batch pos] (−1 for none), or None for the text's own
            next token.
        pos: Positions to read, in each row's own tokens: one, several, or a tensor [batch] or [batch n]; None for all.

    Returns:
        The readings; tensors are on the host.

    Raises:
        SiteError: A site that is no residual stream, or one that a `Run` lacks.
        DataError: `top_k` or `targets` out of range.
        ModelError: The model makes its logits in a way this lens does not know.

    Source: nostalgebraist (2020); see the module's text for departures.
    """
    return read_early(hm, text, sites=sites, top_k=top_k, targets=targets, pos=pos)


def read_early(
    hm: HookManager,
    text: Any,
    *,
    sites: Sequence[Site | str] | None = None,
    top_k: int = 5,
    targets: int | Int[Tensor, "rows columns"] | None = None,
    pos: "int | Sequence[int] | Int[Tensor, 'rows *n'] | None" = None,
    translate: "Callable[[Site, Tensor], Tensor] | None" = None,
    reader: str = "logit lens",
) -> LogitLensResult:
    """Read residual sites early, each translated first: what the logit lens and the tuned lens have in common.

    Args:
        hm, text, sites, top_k, targets, pos: As for `logit_lens`.
        translate: Maps a site and its stream [batch pos d_model] to the stream that is read out; None for none.
        reader: What the result calls the lens.
    """
    if not 1 <= top_k <= hm.d_vocab:
        raise DataError(f"top_k={top_k}: expected 1 … {hm.d_vocab}, the size of the vocabulary")
    seen = capture_streams(hm, text, sites, pos)
    wanted = _targets(targets, seen, hm.d_vocab)
    with torch.no_grad():
        readings = []
        for site, stream in zip(seen.sites, seen.streams, strict=True):
            made = stream if translate is None else translate(site, stream)
            readings.append(_read(seen.readout.logits(made), seen.final, wanted, top_k))
    top_ids, top_probs, entropy, kl, logprob, rank = (
        torch.stack(column).cpu() for column in zip(*readings, strict=True)
    )
    tokens, missing, none = seen.tokens, ~seen.mask, (wanted < 0) | ~seen.mask
    shown = torch.cat([tokens.reshape(-1), top_ids.reshape(-1), wanted[wanted >= 0]]).unique()
    names = [site.short for site in seen.sites]
    data = (seen.all_tokens, seen.all_mask)
    return LogitLensResult(
        provenance=Provenance.of(hm, settings={"sites": names, "top_k": top_k, "reader": reader}, data=data),
        reader=reader,
        sites=names,
        tokens=tokens,
        columns=seen.columns,
        mask=seen.mask,
        special=hm.special_mask(tokens),
        top_ids=top_ids,
        top_probs=top_probs,
        entropy=entropy.masked_fill(missing, torch.nan),
        kl_to_final=kl.masked_fill(missing, torch.nan),
        target_ids=wanted.masked_fill(missing, -1),
        target_logprob=logprob.masked_fill(none, torch.nan),
        target_rank=rank.masked_fill(none, -1),
        names=dict(zip(shown.tolist(), token_names(hm, shown), strict=True)),
    )


def direction_logits(
    hm: HookManager, direction: Float[Tensor, " d_model"] | Float[Tensor, "n d_model"], *, top_k: int = 10
) -> DirectionLogits:
    """Say which tokens a direction of the residual stream raises and lowers, through the final norm's gain.

    The result is (direction − its mean, under LayerNorm) ⊙ gain @ W_U × logit scale, minus its mean over the
    vocabulary; the gain is 1 + weight where the family says so. No soft-cap, no bias, no σ: divide by the σ of a run
    for its logits there.

    Args:
        hm: The model.
        direction: One direction [d_model] or several [n d_model], of any length.
        top_k: How many tokens to list at each end.

    Returns:
        The effects and the listed tokens, on the host.

    Raises:
        ShapeError: A direction of another width.
        DataError: `top_k` out of range.
    """
    if not 1 <= top_k <= hm.d_vocab:
        raise DataError(f"top_k={top_k}: expected 1 … {hm.d_vocab}, the size of the vocabulary")
    logits = effect_on_logits(hm, direction).reshape(-1, hm.d_vocab).cpu()
    top, bottom = logits.topk(top_k).indices, (-logits).topk(top_k).indices
    shown = torch.cat([top.reshape(-1), bottom.reshape(-1)]).unique()
    return DirectionLogits(
        provenance=Provenance.of(hm, settings={"top_k": top_k}, data=(direction,)),
        logits=logits,
        top_ids=top,
        bottom_ids=bottom,
        names=dict(zip(shown.tolist(), token_names(hm, shown), strict=True)),
    )


def _targets(
    targets: int | Int[Tensor, "rows columns"] | None, seen: Streams, d_vocab: int
) -> Int[Tensor, "batch pos"]:
    if targets is None:
        tokens, mask = seen.all_tokens, seen.all_mask
        following = torch.full_like(tokens, -1)
        following[:, :-1] = torch.where(mask[:, 1:], tokens[:, 1:], -1)
        return following.gather(1, seen.columns)
    shape = seen.tokens.shape
    wanted = torch.full(shape, targets) if isinstance(targets, int) else targets.detach().cpu().long()
    if wanted.shape != shape:
        raise ShapeError(f"targets {tuple(wanted.shape)} do not fit the tokens {tuple(shape)}; give ids [batch pos]")
    if int(wanted.min()) < -1 or int(wanted.max()) >= d_vocab:
        raise DataError(
            f"targets hold {int(wanted.min())} … {int(wanted.max())}; expected ids 0 … {d_vocab - 1}, or −1 for none"
        )
    return wanted


def _read(logits: Tensor, final: Tensor, wanted: Tensor, top_k: int) -> tuple[Tensor, ...]:
    """Reduce one site's logits to top ids, their probabilities, entropy, KL, and the target's log-prob and rank."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logprobs = logits.log_softmax(-1)
    probs = logprobs.exp()
    best = logits.topk(top_k, dim=-1).indices
    entropy = -(probs * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(-1)
    index = wanted.clamp(min=0).to(logits.device)[..., None]
    rank = (logits > logits.gather(-1, index)).sum(-1)
    kl = kl_divergence(logits, final.to(logits.device))
    return best, probs.gather(-1, best), entropy, kl, logprobs.gather(-1, index)[..., 0], rank
