"""The residual stream as a sum: of what each sublayer adds, of what each head adds; and what it says of tokens.

Those that work on a `Run` need reads that it holds, and say which are missing. `Run` has them as methods.

Source: Elhage et al. (2021), "A Mathematical Framework for Transformer Circuits"; names and order of terms are
those of TransformerLens' `ActivationCache`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core import metrics
from interp.core.errors import DataError, ShapeError, SiteError
from interp.core.readout import Readout
from interp.core.run import Run
from interp.core.site import Site

if TYPE_CHECKING:
    from interp.core.manager import HookManager

__all__ = [
    "Decomposition",
    "accumulated_resid",
    "decompose_resid",
    "effect_on_logits",
    "embedding_terms",
    "loss_per_token",
    "needed_for_decompose",
    "needed_for_heads",
    "stack_head_results",
]


@dataclass(frozen=True, eq=False)
class Decomposition:
    """Vectors of the residual stream with a label each.

    Args:
        labels: one per term, such as "embed", "0_attn_out", "L0H3".
        terms: [term batch pos d_model]; the axes after the first are those of the reads, which may be slices.
    """

    labels: list[str]
    terms: Float[Tensor, "term *rest d_model"]

    def __getitem__(self, label: str) -> Float[Tensor, "*rest d_model"]:
        """Return one term.

        Raises:
            SiteError: there is none of that label.
        """
        if label not in self.labels:
            shown = ", ".join(self.labels[:8]) + (", …" if len(self.labels) > 8 else "")
            raise SiteError(f"no term {label!r}; the labels are {shown}")
        return self.terms[self.labels.index(label)]

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(zip(self.labels, self.terms, strict=True))

    def total(self) -> Float[Tensor, "*rest d_model"]:
        """Return the sum of the terms."""
        return self.terms.sum(0)

    def __repr__(self) -> str:
        shape = "×".join(map(str, self.terms.shape))
        return f"Decomposition({shape}: {', '.join(self.labels[:6])}{', …' if len(self) > 6 else ''})"


def decompose_resid(run: Run, layer: int | None = None, *, mid: bool = False) -> Decomposition:
    """Return the terms that sum to the residual stream at one place.

    Args:
        run: a run that read `0.resid_pre` and, of every block before the place, `attn_out` and `mlp_out`; with
            `embed` (and `pos_embed`, where there is one) read too, the first term is split into those.
        layer: the block that the stream enters; None for the stream after the last block.
        mid: the stream between that block's attention and MLP instead.

    Returns:
        Terms [term batch pos d_model], in the order of the forward pass: the embedding, then each block's attn_out and
        mlp_out. They sum to resid_pre of the layer (resid_mid with `mid`; the last resid_post without a layer).

    Raises:
        SiteError: a read is missing (the message lists what to read), or the reads are sliced in different ways.
        DataError: the stream itself was read too and is not the sum, because an edit changed it.
    """
    target = _target(run, layer, mid)
    parts = [(f"{site.layer}_{site.kind}", site) for site in _writers(run, layer, mid)]
    _require(run, needed_for_decompose(run, layer, mid=mid), "decompose_resid")
    terms = embedding_terms(run) + [(label, run[site]) for label, site in parts]
    found = _stacked(run, terms, [Site("0.resid_pre"), *(site for _, site in parts)])
    _check_sum(run, found, target)
    return found


def accumulated_resid(run: Run, layer: int | None = None) -> Decomposition:
    """Return the residual stream at every place up to one, as the logit lens reads it.

    Args:
        run: a run that read `resid_pre` of the blocks (or the `resid_post` of those before them) and, without a layer,
            the last `resid_post`; `resid_mid` is taken in where it was read.
        layer: the last block to enter; None for the stream after the last block.

    Returns:
        Terms [term batch pos d_model] labelled 0_pre, 0_mid, 1_pre, …, final_post. They are the stream itself, each
        holding the one before: not terms of a sum.

    Raises:
        SiteError: a read is missing (the message lists what to read), or the reads are sliced in different ways.
    """
    n = run.hm.n_layers
    _target(run, layer, False)
    sites: list[tuple[str, Site]] = []
    missing: list[str] = []
    for block in range(n + 1 if layer is None else layer + 1):
        last = layer is None and block == n
        either = [Site(f"{block}.resid_pre")] if block < n else []
        either += [Site(f"{block - 1}.resid_post")] if block else []
        found = next((s for s in either if s in run), None)
        if found is None:
            missing.append(either[0].short)
        else:
            sites.append(("final_post" if last else f"{block}_pre", found))
        middle = Site(f"{block}.resid_mid")
        if block < (n if layer is None else layer) and middle in run:
            sites.append((f"{block}_mid", middle))
    _require(run, missing, "accumulated_resid")
    return _stacked(run, [(label, run[site]) for label, site in sites], [site for _, site in sites])


def stack_head_results(run: Run, layer: int | None = None) -> Decomposition:
    """Return what each head adds to the residual stream, for every block before one.

    Args:
        run: a run that read `z` of those blocks, with all heads; and `ln1_post.scale`, where a norm stands between the
            heads and the stream (Gemma 2, OLMo 2): its σ is then held as it was, which leaves a linear map.
        layer: the block that the stream enters; None for all blocks.

    Returns:
        Terms [term batch pos d_model] labelled L0H0, L0H1, …, and L0_bias after a block's heads where its output
        projection (or the norm after it) has a bias. A block's terms sum to its attn_out. Memory: n_heads times the
        stream per block.

    Raises:
        SiteError: a read is missing (the message lists what to read), or holds some heads only.
        DataError: attn_out was read too and is not the sum, because an edit changed it.
    """
    n = run.hm.n_layers if layer is None else layer
    _target(run, layer, False)
    _require(run, needed_for_heads(run, layer), "stack_head_results")
    labels: list[str] = []
    terms: list[Tensor] = []
    for block in range(n):
        results, bias = _heads(run, block)
        names = [f"L{block}H{head}" for head in range(len(results))] + ([f"L{block}_bias"] if bias is not None else [])
        part = torch.cat([results, bias.expand_as(results[:1])]) if bias is not None else results
        _check_sum(run, Decomposition(names, part), Site(f"{block}.attn_out"))
        labels += names
        terms.append(part)
    if not terms:
        raise SiteError("no block comes before layer 0, so there are no heads; give a layer ≥ 1, or None for all")
    _same_slices(run, [Site(f"{block}.z") for block in range(n)])
    return Decomposition(labels, torch.cat(terms))


def loss_per_token(run: Run) -> Float[Tensor, "batch next"]:
    """Return the cross-entropy of every next token.

    Args:
        run: a run with logits="all".

    Returns:
        Losses in nats [batch pos−1]: entry i is that of token i + 1. NaN where either token is a pad.

    Raises:
        DataError: the run has no logits, or not those of every position, or no tokens.
    """
    if run.tokens is None:
        raise DataError("loss_per_token: this forward was given embeddings, so there are no tokens to predict")
    logits = run.logits
    if logits.shape[1] != run.tokens.shape[1]:
        raise DataError(
            f"loss_per_token: the run kept logits of {logits.shape[1]} of {run.tokens.shape[1]} positions; "
            "run with logits='all'"
        )
    losses, counts = metrics.loss_per_token(logits, run.tokens, run.mask)
    return torch.where(counts, losses, torch.nan)


def effect_on_logits(hm: "HookManager", directions: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n d_vocab"]:
    """Return what directions of the residual stream add to the logits, through the final norm's gain, at σ = 1.

    (direction − its mean, under LayerNorm) ⊙ gain @ W_U × logit scale, minus its mean over the vocabulary; the gain is
    1 + weight where the family says so. No soft-cap, no bias, no σ: divide by the σ of a run for its logits there.

    Args:
        hm: the model.
        directions: directions of any length, d_model last.

    Returns:
        The effects in fp32, on the unembedding's device.

    Raises:
        ShapeError: directions of another width.
        ModelError: the family's unembedding is not linear.
    """
    if directions.shape[-1] != hm.d_model:
        raise ShapeError(
            f"direction has shape {tuple(directions.shape)}; expected [{hm.d_model}] or [n, {hm.d_model}]: d_model last"
        )
    with torch.no_grad():
        read = Readout.of(hm)
        rows = directions.detach().float().to(read.unembed.weight.device)
        if read.norm is not None:
            spec = hm.atlas.norm("ln_final")
            gain = spec.gain(read.norm)
            rows = spec.centre(rows)
            rows = rows if gain is None else rows * gain.float().to(rows.device)
        logits = torch.nn.functional.linear(rows, read.unembed.weight.float()) * read.scale
        return logits - logits.mean(-1, keepdim=True)


def embedding_terms(run: Run) -> list[tuple[str, Float[Tensor, "*rest d_model"]]]:
    """Return what the stream is when it enters the first block: token and position embedding, where it is their sum.

    Args:
        run: a run that read `0.resid_pre`; and `embed` and `pos_embed`, for the two terms.
    """
    start = run["0.resid_pre"]
    tables = [name for name in ("embed", "pos_embed") if run.hm.atlas.has(Site(name))]
    # Positions that are added to queries and keys alone are in the table and not in the stream.
    if len(tables) == 1 or ("embed" in run and torch.equal(run["embed"], start)):
        return [("embed", start)]
    if all(name in run for name in tables):
        parts = [run[name] for name in tables]
        if all(p.shape == start.shape for p in parts) and _close(parts[0] + parts[1], start):
            return list(zip(tables, parts, strict=True))
    return [("embed+pos_embed", start)]


def needed_for_decompose(run: Run, layer: int | None = None, *, mid: bool = False) -> list[str]:
    """Return the reads that `decompose_resid` needs and a run lacks.

    Args:
        run: the run.
        layer, mid: as for `decompose_resid`.
    """
    needed = [Site("0.resid_pre"), *_writers(run, layer, mid)]
    return [site.short for site in needed if site not in run]


def _writers(run: Run, layer: int | None, mid: bool) -> list[Site]:
    """What each sublayer before a place adds to the stream; attention-only blocks have no MLP that does."""
    n = run.hm.n_layers if layer is None else layer
    sites = [Site(f"{block}.{part}") for block in range(n) for part in ("attn_out", "mlp_out")]
    sites += [Site(f"{layer}.attn_out")] if mid else []
    return [site for site in sites if run.hm.atlas.has(site)]


def needed_for_heads(run: Run, layer: int | None = None) -> list[str]:
    """Return the reads that `stack_head_results` needs and a run lacks.

    Args:
        run: the run.
        layer: as for `stack_head_results`.
    """
    m = run.hm.map
    kinds = ("z", "ln1_post.scale") if m.attn_out == "ln1_post" else ("z",)
    needed = [f"{b}.{kind}" for b in range(m.n_layers if layer is None else layer) for kind in kinds]
    return [name for name in needed if Site(name) not in run]


def _target(run: Run, layer: int | None, mid: bool) -> Site:
    """The place whose stream is asked about; refuses one that the model does not have."""
    n = run.hm.n_layers
    if layer is None:
        if mid:
            raise SiteError("mid=True needs a layer: the stream between which block's attention and MLP?")
        return Site(f"{n - 1}.resid_post")
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < n:
        raise SiteError(f"layer={layer!r}: expected 0 to {n - 1}, or None for the stream after the last block")
    site = Site(f"{layer}.{'resid_mid' if mid else 'resid_pre'}")
    run.hm.atlas.point(site)
    return site


def _require(run: Run, missing: Sequence[str], who: str) -> None:
    if not missing:
        return
    n = run.hm.n_layers
    reads: dict[str, None] = {}
    for name in missing:
        kind = name.partition(".")[2]
        whole = n > 1 and sum(m.partition(".")[2] == kind for m in missing) == n
        reads.setdefault(f"*.{kind}" if whole else name)
    raise SiteError(
        f"{who}: this run lacks {len(missing)} of the activations it needs; add to read=[…]: "
        + ", ".join(repr(name) for name in reads)
    )


def _stacked(run: Run, terms: list[tuple[str, Tensor]], sites: Sequence[Site]) -> Decomposition:
    _same_slices(run, sites)
    device = terms[-1][1].device
    return Decomposition([label for label, _ in terms], torch.stack([x.to(device) for _, x in terms]))


def _same_slices(run: Run, sites: Sequence[Site]) -> None:
    wheres = {run.find(site).where for site in sites}
    if len(wheres) > 1:
        raise SiteError(
            "the reads are sliced in different ways: "
            + ", ".join(repr(run.find(site)) for site in sites[:4])
            + ", …; give each the same .at(…)"
        )


def _heads(
    run: Run, block: int
) -> tuple[Float[Tensor, "n_heads *rest d_model"], Float[Tensor, "*bias d_model"] | None]:
    """What each head of a block adds to the stream, and what comes on top of them all."""
    hm = run.hm
    m, weights = hm.map, hm.weights[block]
    z = run[f"{block}.z"]
    where = run.find(f"{block}.z").where
    if where is not None and where.head is not None:
        raise SiteError(f"stack_head_results needs all heads of {block}.z; read it without head={where.head!r}")
    w_o, b_o = weights.W_O.to(z), weights.b_O.to(z)
    results = torch.einsum("...hd,hdm->h...m", z, w_o)
    if m.attn_out == "ln1_post":
        scale = run[f"{block}.ln1_post.scale"]
        _same_slices(run, [Site(f"{block}.z"), Site(f"{block}.ln1_post.scale")])
        norm, spec = hm.weights.norm_weights(block, "ln1_post"), hm.atlas.norm("ln1_post", block)
        results = (spec.centre(results) / scale * norm.gain.to(scale)).to(z.dtype)
        constant = spec.centre(b_o) / scale * norm.gain.to(scale) + norm.bias.to(scale)
        return results, constant.to(z.dtype) if bool(b_o.any() or norm.bias.any()) else None
    factor = m.residual_multiplier
    return results * factor, b_o * factor if bool(b_o.any()) else None


def _check_sum(run: Run, found: Decomposition, target: Site) -> None:
    """Where the sum was read as well, hold the terms against it."""
    if target not in run:
        return
    total, seen = found.total(), run[target]
    if total.shape == seen.shape and not _close(total, seen):
        off = float((total.float() - seen.to(total.device).float()).abs().max())
        raise DataError(
            f"the terms do not sum to {target.short} (off by {off:.1e}): an edit of this run changed the stream "
            "itself, or something between; decompose a run without it"
        )


def _close(a: Tensor, b: Tensor) -> bool:
    tolerance = 1e-4 if a.dtype in (torch.float32, torch.float64) else 5e-2
    a, b = a.detach().float(), b.detach().to(a.device).float()
    return bool((a - b).abs().max() <= tolerance * (1.0 + b.abs().max()))
