"""The sweep engine is the naive loop, exactly: on every family, at every kind of site, padded on either side."""

import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from interp.core.attention import CURRENT
from interp.core.errors import ConfigError, ModelError, ShapeError, SiteError
from interp.core.intervention import Replace
from interp.core.manager import HookManager
from interp.core.metrics import Metric, kl_divergence
from interp.core.replay import Replay
from interp.core.run import Run
from interp.core.site import KINDS, Site
from interp.core.sweep import Sweep, sweep
from interp.core.sweep_cells import Cells
from interp.core.where import Where
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


KINDS_SWEPT = ("resid_pre", "z", "q", "k", "v", "mlp_post", "attn_out", "mlp_out", "resid_mid", "resid_post", "pattern")
PLACES = ([2, 7], [6], [3, 11])


def sites_of(hm: HookManager) -> list[str]:
    """One site of each kind, in layers that take turns, and the embedding."""
    given = [f"{(i // 2) % hm.n_layers}.{kind}" for i, kind in enumerate(KINDS_SWEPT)]
    return [s for s in ["embed", *given] if hm.atlas.has(s)]


def cells_at(site: str, source: Run, base: Run, mask: Tensor, places: Sequence[list[int]]) -> Cells:
    """Patches of some positions, and of one head or neuron each where the site has them."""
    axes = KINDS[Site(site).kind].axes
    columns = columns_of(mask, list(places))
    heads = units = None
    if "n_heads" in axes or "n_kv_heads" in axes:
        n = source[site].shape[next(i for i, axis in enumerate(axes) if axis in ("n_heads", "n_kv_heads"))]
        heads = 1 + torch.arange(len(places)) % (n - 1) if n > 1 else torch.zeros(len(places), dtype=torch.long)
    if "d_mlp" in axes:
        units = 5 + torch.arange(len(places))
    return Cells.replacing(site, source[site], columns, base=base[site], heads=heads, units=units)


def metrics_of(reference: Tensor) -> list[Metric]:
    return [first_minus_second(len(reference)), far_from(reference)]


# Each is another family here but for what a sweep does not touch: biases, the gain of a norm, the size of a window.
TWINS = ["GPTNeoXSequential", "Mistral", "Qwen2", "Gemma", "Gemma3Multimodal", "Olmo", "StableLm", "Starcoder2"]
TWINS += ["GPTBigCode", "Phi"]


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in TWINS else ()) for n in FAMILIES])
def test_a_sweep_is_the_naive_loop(name: str) -> None:
    hm = manager(name)
    sites = sites_of(hm)
    layouts: list[tuple[Tensor, Tensor, Tensor | None]] = [(tokens(seed=1), tokens(seed=2), None)]
    for (_, one, real), (_, other, _) in zip(paddings(tokens(seed=1)), paddings(tokens(seed=2)), strict=True):
        layouts.append((one, other, real))
    moved = []
    for number, (clean, corrupted, mask) in enumerate(layouts):
        real = torch.ones_like(clean, dtype=torch.bool) if mask is None else mask
        source = hm.run(clean, read=sites, mask=mask, logits="last")
        base = hm.run(corrupted, read=sites, mask=mask)
        cells = [cells_at(s, source, base, real, [PLACES[(i + number) % 3]]) for i, s in enumerate(sites)]
        given, metrics = hm.to_tokens(corrupted, mask=mask), metrics_of(source.logits[:, 0])
        fast, slow = sweep(hm, given, cells, metrics), sweep(hm, given, cells, metrics, engine="naive")
        assert slow.plan == "naive" and fast.plan == ("layers" if name in INSIDE else "wavefront"), fast.notes
        assert not bool(slow.values.isnan().any()) and torch.equal(fast.unchanged, slow.unchanged)
        logits = max(1.0, float(source.logits.abs().max()))
        assert float((fast.values - slow.values).abs().max()) <= 1e-5 * logits
        moved.append((slow.values - slow.base[:, None]).abs().amax((0, 2)) > 1e-4)
    assert float(torch.cat(moved).float().mean()) > 0.4, "most cells must move the metric, or this shows nothing"


@pytest.mark.parametrize("name", ["Gemma2", "GPT2", "Bloom", "Mixtral"])
def test_no_change_is_exactly_nothing_and_a_change_of_everything_is_the_other_run(name: str) -> None:
    hm, clean, corrupted = manager(name), tokens(seed=1), tokens(seed=2)
    site = "1.resid_pre"
    source, base = hm.run(clean, read=[site], logits="last"), hm.run(corrupted, read=[site])
    whole = torch.ones(1, *clean.shape, dtype=torch.bool)
    metric = first_minus_second(2)
    same = Cells.replacing(site, base[site], whole, base=base[site])
    other = Cells.replacing(site, source[site], whole, base=base[site])
    one_row = Cells.replacing(site, source[site], whole & torch.tensor([True, False])[None, :, None], base=base[site])
    found = sweep(hm, corrupted, [same, other, one_row], [metric])
    assert found.unchanged.tolist() == [True, False, False]
    assert torch.equal(found.values[0, 0], found.base[0]) and found.values[0, 2, 1] == found.base[0, 1]
    torch.testing.assert_close(found.values[0, 1], metric(source), atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(found.values[0, 2, 0], metric(source)[0], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("engine", ["wavefront", "layers"])
def test_a_budget_changes_nothing_but_the_size_of_the_calls(engine: str) -> None:
    hm, clean, corrupted = manager("Gemma3"), tokens(seed=1), tokens(seed=2)
    sites = ["0.z", "1.z", "1.mlp_out", "2.k"]
    source, base = hm.run(clean, read=sites), hm.run(corrupted, read=sites)
    real = torch.ones_like(clean, dtype=torch.bool)
    cells = [cells_at(site, source, base, real, [[p] for p in range(3, 7)]) for site in sites]
    runs = []
    for budget in (1, 190_000, 2**30):
        ready = Sweep(hm, corrupted, cells, [first_minus_second(2)], engine=engine, budget_bytes=budget)
        sizes, values = [], torch.zeros(1, len(ready), 2)
        for done in ready:
            sizes.append(len(done.cells))
            values[:, done.cells] = done.values
        runs.append((max(sizes), values))
        again = [done.cells.tolist() for done in ready]
        assert again == [done.cells.tolist() for done in ready] and sum(map(len, again)) == len(ready)
    assert runs[0][0] == 1 < runs[1][0] < runs[2][0]
    for _, values in runs[1:]:
        torch.testing.assert_close(values, runs[0][1], atol=2e-6, rtol=2e-6)


def test_branches_take_no_more_than_the_formula_says() -> None:
    hm, clean, corrupted = manager("Llama"), tokens(4, seed=1), tokens(4, seed=2)
    source, base = hm.run(clean, read=["0.z"]), hm.run(corrupted, read=["0.z"])
    real = torch.ones_like(clean, dtype=torch.bool)
    cells = [cells_at("0.z", source, base, real, [[3] for _ in range(40)])]
    ready = Sweep(hm, corrupted, cells, [far_from(torch.zeros(4, 120))])
    peaks = {}
    for budget in (4, 16):
        ready.budget_bytes = budget * ready.sizes.branch_bytes(3)
        with Held() as held:
            for _ in ready:
                held.settle()
        peaks[budget] = held.peak
    grown = (peaks[16] - peaks[4]) / 12
    assert grown <= ready.sizes.branch_bytes(3), "a branch takes more than it is counted for"
    assert grown >= ready.sizes.branch_bytes(3) / 8, "the formula has lost touch with what a branch takes"


class Held(TorchDispatchMode):
    """The most bytes that tensors made inside hold at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor) and (key := x.untyped_storage()._cdata) not in self.seen:
                self.seen[key] = x.untyped_storage().nbytes()
                self.now += self.seen[key]
                self.peak = max(self.peak, self.now)
                weakref.finalize(x.untyped_storage(), self._gone, key)
        return out

    def _gone(self, key: int) -> None:
        self.now -= self.seen.pop(key, 0)

    def settle(self) -> None:
        """Nothing to wait for on a CPU; named for what a GPU test would do here."""


def test_hooks_are_gone_and_the_run_is_free_after_an_error_inside() -> None:
    hm, corrupted = manager("Llama"), tokens(seed=2)
    before = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in hm.model.modules()]

    def broken(x: Tensor, pick: Tensor, first: int) -> Tensor:
        raise KeyError("no such value")

    cells = Cells("1.z", torch.ones(1, *corrupted.shape, dtype=torch.bool), broken)
    with pytest.raises(KeyError, match="no such value"):
        sweep(hm, corrupted, [cells], [first_minus_second(2)])
    assert before == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in hm.model.modules()]
    assert CURRENT.get() is None


def test_a_family_that_cannot_be_taken_apart_falls_back_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    hm, clean, corrupted = manager("Llama"), tokens(seed=1), tokens(seed=2)
    source, base = hm.run(clean, read=["1.z"]), hm.run(corrupted, read=["1.z"])
    cells = [cells_at("1.z", source, base, torch.ones_like(clean, dtype=torch.bool), [[4], [8]])]
    metric = [first_minus_second(2)]
    expected = sweep(hm, corrupted, cells, metric, engine="naive").values
    original = Replay.block

    def off_after(columns: int) -> Any:
        def block(self: Replay, layer: int, x: Tensor, *, start: int = 0, edits: Any = ()) -> Tensor:
            return original(self, layer, x, start=start, edits=edits) + (0.1 if start >= columns else 0.0)

        return block

    for columns, plan in ((1, "layers"), (0, "naive")):
        monkeypatch.setattr(Replay, "block", off_after(columns))
        found = sweep(hm, corrupted, cells, metric)
        assert found.plan == plan and any("off by" in note for note in found.notes)
        torch.testing.assert_close(found.values, expected, atol=1e-5, rtol=1e-5)
        with pytest.raises(ModelError, match="'wavefront' is not exact here"):
            sweep(hm, corrupted, cells, metric, engine="wavefront")


def test_other_functions_of_a_run_see_each_branch() -> None:
    hm, clean, corrupted = manager("Qwen2"), tokens(seed=1), tokens(seed=2)
    source, base = hm.run(clean, read=["0.z"]), hm.run(corrupted, read=["0.z"])
    cells = [cells_at("0.z", source, base, torch.ones_like(clean, dtype=torch.bool), [[4], [8], [11]])]

    def two(out: Run) -> Tensor:
        return out.logits[:, -1, 3] - out.logits[:, -1, 7]

    found = sweep(hm, corrupted, cells, [two, first_minus_second(2)])
    torch.testing.assert_close(found.values[0], found.values[1], atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("unchecked")
def test_what_a_sweep_cannot_do_is_refused_before_anything_runs() -> None:
    hm, ids = manager("Llama"), tokens()
    metric = [first_minus_second(2)]

    def zero(x: Tensor, pick: Tensor, first: int) -> Tensor:
        return torch.zeros_like(x)

    whole = torch.ones(2, *ids.shape, dtype=torch.bool)
    with pytest.raises(SiteError, match="has axes batch pos d_model"):
        Cells("0.resid_pre", whole, zero, heads=torch.tensor([0, 1]))
    with pytest.raises(ShapeError, match=r"expected bool \[cell batch pos\]"):
        Cells("0.resid_pre", whole.float(), zero)
    with pytest.raises(ShapeError, match="3 for 2 cells"):
        Cells("0.z", whole, zero, heads=torch.tensor([0, 1, 2]))
    with pytest.raises(ShapeError, match="this batch is"):
        Sweep(hm, ids, [Cells("0.z", whole[:, :, :5], zero)], metric)
    with pytest.raises(ConfigError, match="engine='fast'"):
        Sweep(hm, ids, [Cells("0.z", whole, zero)], metric, engine="fast")
    with pytest.raises(ConfigError, match="budget_bytes=0"):
        Sweep(hm, ids, [Cells("0.z", whole, zero)], metric, budget_bytes=0)
    with pytest.raises(ModelError, match="lies after the last block"):
        Sweep(hm, ids, [Cells("ln_final.out", whole, zero)], metric, engine="layers")


@pytest.mark.parametrize("name", ["GPT2", "Gemma2"])
def test_a_norm_s_scale_and_value_are_swept_as_they_are_edited_by_hand(name: str) -> None:
    hm, clean, corrupted = manager(name), tokens(seed=1), tokens(seed=2)
    sites = ["1.ln1.normalized", "1.ln1.scale", "0.ln2.normalized"]
    source, base = hm.run(clean, read=sites), hm.run(corrupted, read=sites)
    columns = columns_of(torch.ones_like(clean, dtype=torch.bool), list(PLACES))
    cells = [Cells.replacing(site, source[site], columns, base=base[site]) for site in sites]
    metric = first_minus_second(2)
    fast, slow = sweep(hm, corrupted, cells, [metric]), sweep(hm, corrupted, cells, [metric], engine="naive")
    torch.testing.assert_close(fast.values, slow.values, atol=1e-4, rtol=1e-5)
    by_hand = Replace(sites[0], source[sites[0]], where=Where(mask=columns[0]))
    torch.testing.assert_close(
        fast.values[0, 0], metric(hm.run(corrupted, write=[by_hand], logits="last")), atol=1e-4, rtol=1e-5
    )
    assert float((fast.values - fast.base[:, None]).abs().amax(2).min()) > 1e-3
