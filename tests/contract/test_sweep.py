"""The sweep engine is the naive loop, exactly: on every family, at every kind of site, padded on either side."""

import functools

import pytest
import torch
from torch import Tensor

from interp.core.manager import HookManager
from interp.core.metrics import Metric, kl_divergence
from interp.core.run import Run
from interp.core.site import KINDS, Site
from interp.core.sweep import SweepValues, sweep
from interp.core.sweep_cells import Cells
from tests.families import FAMILIES, manager, paddings, tokens

INSIDE = ("GPTNeo", "GPTJ", "Bloom", "Falcon", "FalconNew")
"""Families that compute attention inside their own module: layers are saved there, columns are not."""


def first_minus_second(n: int) -> Metric:
    return Metric("diff", lambda logits, rows: logits[:, 0] - logits[:, 1], n, torch.tensor([3, 7]))


def far_from(reference: Tensor) -> Metric:
    return Metric("kl", lambda logits, rows: kl_divergence(logits, reference[rows]), len(reference))


def columns_of(mask: Tensor, chosen: list[list[int]]) -> Tensor:
    """One cell for each list of positions, counted in each row's own real tokens."""
    rank = mask.long().cumsum(1) - 1
    return torch.stack([torch.isin(rank, torch.tensor(places)) & mask for places in chosen])


def cells_at(hm: HookManager, site: str, source: Run, base: Run, mask: Tensor) -> Cells:
    """Patches of some positions, and of heads or neurons where the site has them."""
    places, kind = [[0], [3], [7], [2, 5], [6]], Site(site).kind
    columns = columns_of(mask, places)
    heads = units = src = None
    if any(axis in ("n_heads", "n_kv_heads") for axis in KINDS[kind].axes):
        n = source[site].shape[KINDS[kind].axes.index("n_heads" if "n_heads" in KINDS[kind].axes else "n_kv_heads")]
        heads = torch.arange(len(places)) % n
    if kind == "mlp_post":
        units = torch.arange(len(places)) * 3
    return Cells.replacing(site, source[site], columns, base=base[site], heads=heads, units=units, src=src)


@functools.cache
def wanted(name: str) -> tuple[str, ...]:
    hm = manager(name)
    kinds = ("resid_pre", "z", "q", "k", "v", "mlp_post", "attn_out", "mlp_out", "resid_mid", "resid_post", "pattern")
    sites = [f"{layer}.{kind}" for layer in range(hm.n_layers) for kind in kinds]
    return tuple(s for s in ["embed", *sites] if hm.atlas.has(s))


def both(name: str, clean: Tensor, corrupted: Tensor, mask: Tensor | None) -> tuple[SweepValues, SweepValues]:
    hm = manager(name)
    real = torch.ones_like(clean, dtype=torch.bool) if mask is None else mask
    sites = list(wanted(name))
    source = hm.run(clean, read=sites, mask=mask, logits="last")
    base = hm.run(corrupted, read=sites, mask=mask)
    cells = [cells_at(hm, site, source, base, real) for site in sites]
    given = hm.to_tokens(corrupted, mask=mask)
    metrics = [first_minus_second(len(clean)), far_from(source.logits[:, 0])]
    fast = sweep(hm, given, cells, metrics)
    return fast, sweep(hm, given, cells, metrics, engine="naive")


@pytest.mark.parametrize("side", ["whole", "left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_sweep_is_the_naive_loop(name: str, side: str) -> None:
    clean, corrupted = tokens(seed=1), tokens(seed=2)
    mask = None
    if side != "whole":
        clean, mask = next((ids, mask) for where, ids, mask in paddings(clean) if where == side)
        corrupted = next(ids for where, ids, _ in paddings(corrupted) if where == side)
    fast, slow = both(name, clean, corrupted, mask)
    assert slow.plan == "naive" and fast.plan == ("layers" if name in INSIDE else "wavefront"), fast.notes
    tolerance = 1e-5 * max(1.0, float(slow.values.abs().max()))
    assert not bool(slow.values.isnan().any())
    assert float((fast.values - slow.values).abs().max()) <= tolerance
    moved = (slow.values - slow.base[:, None])[:, ~slow.unchanged].abs().amax((0, 2))
    assert float((moved > 1e-4).float().mean()) > 0.5, "most cells must move the metric, or this shows nothing"
