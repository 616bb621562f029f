"""The laws of reading, as numbers: each function measures one family and returns by how much a law is broken.

The tests assert on these numbers, and `table.py` prints them.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from interp.core.errors import InterpError
from interp.core.run import Run
from interp.core.site import Site
from tests import oracle
from tests.contract import plain
from tests.families import make, manager, paddings, tokens

TOLERANCE = 1e-4
"""fp32, on activations of unit scale."""

OWN_ATTENTION = ("GPTNeo", "GPTJ", "Bloom", "Falcon", "FalconNew")
"""Families whose attention module asks transformers for no kernel and calls softmax or SDPA itself."""

ROTATED_INSIDE = ("GPTJ",)
"""Families that rotate queries and keys where no hook reaches: post-rotary values are refused."""

NOT_ROTARY = ("GPT2", "OPT", "GPTBigCode", "GPTNeo", "Bloom")
"""Families without rotary position embeddings."""


class Compared(NamedTuple):
    """One site beside TransformerLens: the largest difference, and the known difference that covers it."""

    site: Site
    delta: float
    known: tuple[str, str] | None


class Reading(NamedTuple):
    """What one family lets itself be read, and what it refuses and why."""

    run: Run
    sites: list[Site]
    refused: dict[str, str]


def listed(name: str) -> list[Site]:
    """Every site that `hm.sites()` lists for a family."""
    return [Site(row["site"]) for row in manager(name).sites().rows]


@functools.cache
def reading(name: str) -> Reading:
    """Every readable site of a family in one run over `tokens()`, with the message of each typed refusal."""
    hm, refused, readable = manager(name), {}, []
    for site in listed(name):
        try:
            hm.run(tokens(1, 3), read=[site])
        except InterpError as err:
            refused[site.short] = f"{type(err).__name__}: {err}"
        else:
            readable.append(site)
    return Reading(hm.run(tokens(), read=readable, logits="all"), readable, refused)


def largest(a: Tensor, b: Tensor, keep: Tensor | None = None) -> float:
    """The largest absolute difference, at `keep` only if given; NaN or a shape mismatch is infinitely wrong."""
    if a.shape != b.shape:
        return float("inf")
    delta = (a.float() - b.float()).abs()
    if keep is not None:
        delta = delta[keep.expand_as(delta)]
    return float(torch.nan_to_num(delta, nan=float("inf")).max()) if delta.numel() else 0.0


def _theirs(name: str, site: Site) -> Tensor | None:
    """TransformerLens' tensor of a site, its axes brought into our order, or None where it has none."""
    cache, ours = oracle.family_cache(name), reading(name).run[site.name]
    theirs = cache.get(oracle.their_name(name, site.name))
    if theirs is None:
        return None
    if site.kind == "attn_in" and theirs.ndim == 4:
        return theirs[:, :, 0]  # every head gets a copy of its own there
    if site.kind.startswith(("q_norm", "k_norm")) and theirs.ndim == 4:
        return theirs.transpose(1, 2)  # [batch head pos d_head] there
    if theirs.ndim != ours.ndim and theirs.numel() == ours.numel():
        return theirs.reshape(ours.shape)  # OPT's MLP runs on [batch * pos, d], OLMo 2 normalises all heads at once
    return theirs


def against_transformer_lens(name: str) -> list[Compared]:
    """Compare every site that both sides read, masked scores excluded."""
    found = []
    for site in reading(name).sites:
        if (theirs := _theirs(name, site)) is None:
            continue
        keep = None
        if site.kind == "attn_scores":
            keep = plain.eager_attentions(name, tokens())[site.layer or 0] > 0
        delta = largest(reading(name).run[site.name], theirs, keep)
        found.append(Compared(site, delta, oracle.difference(name, site.kind)))
    return found


def logits_bit_equal(name: str) -> bool:
    """Whether runs without writes have the plain model's bits: with no reads, all reads, and padded on either side."""
    hm, model, ids = manager(name), make(name), tokens()
    with torch.no_grad():
        want = model(**plain.model_inputs(model, ids, None)).logits
        same = [torch.equal(hm.run(ids).logits, want), torch.equal(reading(name).run.logits, want)]
        for _, padded, mask in paddings(ids):
            want = model(**plain.model_inputs(model, padded, mask)).logits
            same.append(torch.equal(hm.run(padded, mask=mask).logits, want))
    return all(same)


def residual_identity(name: str) -> float:
    """resid_pre + attn_out + mlp_out = resid_post, and through resid_mid where there is one."""
    out, hm = reading(name).run, manager(name)
    short, worst = {site.short for site in reading(name).sites}, 0.0
    for layer in range(hm.n_layers):
        pre, post = out["resid_pre", layer], out["resid_post", layer]
        attn, mlp = out["attn_out", layer], out["mlp_out", layer]
        worst = max(worst, largest(pre + attn + mlp, post))
        if f"{layer}.resid_mid" in short:
            worst = max(worst, largest(pre + attn, out["resid_mid", layer]))
        if layer + 1 < hm.n_layers:
            worst = max(worst, largest(post, out["resid_pre", layer + 1]))
    return worst


def pattern_times_v(name: str) -> float:
    """pattern @ v = z, key-value heads repeated over their queries."""
    out, hm, worst = reading(name).run, manager(name), 0.0
    for layer in range(hm.n_layers):
        v = out["v", layer].repeat_interleave(hm.n_heads // hm.n_kv_heads, dim=2)
        z = torch.einsum("bhqk,bkhd->bqhd", out["pattern", layer], v)
        worst = max(worst, largest(z, out["z", layer]))
    return worst


def scores_softmax(name: str) -> float:
    """softmax(attn_scores) = pattern, up to the share that sinks take."""
    out, hm, worst = reading(name).run, manager(name), 0.0
    for layer in range(hm.n_layers):
        pattern = out["pattern", layer]
        share = pattern.sum(-1, keepdim=True) if name == "GptOss" else 1.0
        worst = max(worst, largest(out["attn_scores", layer].softmax(-1) * share, pattern))
    return worst


def patterns_against_eager(name: str) -> float:
    """Patterns equal the model's own eager attention: unpadded, left- and right-padded, real query rows."""
    hm, ids = manager(name), tokens()
    sites = [f"{layer}.pattern" for layer in range(hm.n_layers)]
    cases = [(ids, None), *((padded, mask) for _, padded, mask in paddings(ids))]
    worst = 0.0
    for batch, mask in cases:
        out = hm.run(batch, read=sites, mask=mask)
        keep = None if mask is None else mask[:, None, :, None]
        for layer, eager in enumerate(plain.eager_attentions(name, batch, mask)):
            worst = max(worst, largest(out["pattern", layer], eager, keep))
    return worst


def against_plain(name: str) -> float:
    """Reads equal hand-made hooks on the plain model: unpadded, left- and right-padded, real tokens."""
    hm, model, ids = manager(name), make(name), tokens()
    read = [(kind, layer) for kind in plain.kinds(name) for layer in range(hm.n_layers)]
    cases = [(ids, None), *((padded, mask) for _, padded, mask in paddings(ids))]
    worst = 0.0
    for batch, mask in cases:
        ours = hm.run(batch, read=[f"{layer}.{kind}" for kind, layer in read], mask=mask)
        theirs = plain.run(name, model, batch, read=read, mask=mask).values
        for kind, layer in read:
            worst = max(worst, _real(ours[kind, layer], theirs[kind, layer], mask))
    return worst


def _real(a: Tensor, b: Tensor, mask: Tensor | None) -> float:
    return largest(a, b) if mask is None else largest(a[mask], b[mask])


def padded_as_unpadded(name: str) -> float:
    """A row among pads reads as the row alone, on either side, at every site that has a position axis."""
    hm, ids, pads = manager(name), tokens(), 4
    sites = [site for site in reading(name).sites if site.axes[:2] == ("batch", "pos")]
    alone = hm.run(ids[:1, : ids.shape[1] - pads], read=sites, logits="all")
    worst = 0.0
    for _, padded, mask in paddings(ids, pads):
        out = hm.run(padded, read=sites, mask=mask, logits="all")
        worst = max(worst, largest(out.logits[:1][mask[:1]], alone.logits[0]))
        for site in sites:
            worst = max(worst, largest(out[site.name][:1][mask[:1]], alone[site.name][0]))
    return worst


def batched_as_single(name: str) -> float:
    """Every row of a batch reads as that row alone, and a split batch as the whole."""
    hm, ids = manager(name), tokens()
    whole, worst = reading(name), 0.0
    split = hm.run(ids, read=whole.sites, logits="all", batch_size=1)
    rows = [hm.run(ids[row : row + 1], read=whole.sites, logits="all") for row in range(len(ids))]
    for site in whole.sites:
        value = whole.run[site.name]
        # A mixture's router may see [batch * pos, experts]; the library gives it back with its batch axis.
        worst = max(worst, largest(split[site.name], value))
        worst = max(worst, largest(torch.cat([row[site.name] for row in rows]), value))
    return max(worst, largest(split.logits, whole.run.logits))
