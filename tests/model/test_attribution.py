"""Attribution on models whose truth is known: linear ones, a hand-split GPT-2, the testbed; results and screening."""

import functools
import warnings
from dataclasses import replace
from pathlib import Path as File
from typing import Any

import pytest
import torch
from torch import Tensor

import interp.patching.estimates.sides as sides_module
from interp.core.attribute import Path
from interp.core.errors import ConfigError, DataError, SiteError
from interp.core.intervention import FreezePattern, Replace
from interp.core.manager import HookManager
from interp.core.result import Result
from interp.core.stats import pearson
from interp.core.where import Where
from interp.data.pair_tokens import PairTokens
from interp.dictionaries.standard import StandardConfig, StandardSAE
from interp.patching.activation import activation_patch
from interp.patching.estimates.attribution import Latents, attribute
from interp.patching.estimates.edge_scores import EdgeScores
from interp.patching.estimates.edges import edge_attribution
from interp.patching.estimates.flow import flow_routes
from interp.patching.estimates.node_scores import AttributionResult
from interp.patching.estimates.screening import ScreenResult, screen_and_verify
from interp.patching.graph import Graph
from interp.patching.options import PatchOptions
from interp.testbed.nano import NanoOptions, nano
from interp.testbed.tasks import task_pairs
from tests.families import make

pytestmark = pytest.mark.model


def id_pairs(n: int = 3, *, vocab: int = 20, pos: int = 7, first: int = 2) -> PairTokens:
    generator = torch.Generator().manual_seed(5)
    clean = torch.randint(1, vocab, (n, pos), generator=generator)
    corrupted = clean.clone()
    corrupted[:, first] = clean[:, first] % (vocab - 2) + 1
    return PairTokens.of_ids(clean, corrupted, torch.arange(1, n + 1), torch.arange(n + 1, 2 * n + 1))


def perturbed(options: NanoOptions, *, size: float = 0.3) -> HookManager:
    model = nano(options, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return HookManager.load(model)


@functools.cache
def linear() -> HookManager:
    """Attention alone, no norm, and queries of 0: uniform patterns, so that the logits are linear in everything."""
    hm = perturbed(NanoOptions(d_vocab=20, n_layers=3, d_model=12, n_heads=3, d_mlp=0, norm="none"))
    with torch.no_grad():
        for block in hm.model.model.layers:
            block.self_attn.q_proj.weight.zero_()
            block.self_attn.q_proj.bias.zero_()
    return hm


@functools.cache
def ioi() -> PairTokens:
    pairs = task_pairs("ioi", 30).group("template")
    largest = max(pairs.values(), key=len)
    return largest[:4].tokens(small())


@functools.cache
def small() -> HookManager:
    return HookManager.load("testbed")


@pytest.mark.parametrize("rule", ["plain", "frozen_ln", "relp", "relp_ah"])
@pytest.mark.parametrize("path", ["none", "inputs_ig", "activations_ig"])
def test_on_a_linear_model_attribution_is_patching(rule: str, path: str) -> None:
    hm, pairs = linear(), id_pairs()
    for kind in ("z", "v"):
        found = attribute(hm, pairs, nodes=kind, rule=rule, path=Path(path, 2))
        exact = activation_patch(hm, pairs, sites=kind, progress=False)
        estimates, effects = found.beside(exact)
        assert float(effects.abs().max()) > 0.1 and torch.allclose(estimates, effects, atol=1e-4)
    noise = attribute(hm, pairs, rule=rule, mode="noise")
    assert torch.allclose(noise.scores, -attribute(hm, pairs, rule=rule).scores, atol=1e-4)


def test_on_a_linear_model_edges_are_what_the_paths_carry() -> None:
    """In a linear model the effect of a sender is the product of matrices along its edges."""
    hm, pairs = linear(), id_pairs()
    found, graph = edge_attribution(hm, pairs, rule="relp"), Graph.of(linear())
    for name in ("a1.h0", "a1.h2"):
        node = graph.senders[graph.sender(name)]
        source = hm.run(pairs.clean, read=["1.z"])
        edit = Replace("1.z", source, where=Where(head=node.head))
        effect = pairs.metric()(hm.run(pairs.corrupted, write=[edit])) - pairs.metric()(hm.run(pairs.corrupted))
        assert float(found.of_senders()[graph.sender(name)]) == pytest.approx(float(effect.mean()), abs=1e-4)
        queries = [found.edge(f"{name}->a2.h{h}<{kind}>") for h in range(3) for kind in "qk"]
        assert queries == pytest.approx([0.0] * 6, abs=1e-7)
        assert any(abs(found.edge(f"{name}->a2.h{h}<v>")) > 1e-2 for h in range(3))


def test_with_patterns_held_the_ah_rule_is_exact_without_norms() -> None:
    hm = perturbed(NanoOptions(d_vocab=20, n_layers=2, d_model=12, n_heads=3, d_mlp=0, norm="none"))
    pairs = id_pairs()
    held = hm.run(pairs.corrupted, read=["*.pattern"])
    source = hm.run(pairs.clean, read=["*.z"])
    found = attribute(hm, pairs, nodes="z", rule="relp_ah")
    base = pairs.metric()(hm.run(pairs.corrupted))
    for layer in range(2):
        for head in range(3):
            edits = [Replace(f"{layer}.z", source, where=Where(head=head)), FreezePattern(value=held)]
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*changed nothing")
                effect = pairs.metric()(hm.run(pairs.corrupted, write=edits)) - base
            assert torch.allclose(found.totals[f"{layer}.z"][head], effect, atol=1e-4)
    plain = attribute(hm, pairs, nodes="0.z")
    assert not torch.allclose(plain.totals["0.z"], found.totals["0.z"], atol=1e-2)


def test_the_qk_fix_is_exact_where_the_rest_is_linear() -> None:
    """Queries and keys of the last layer of a model without norms, patched at one position alone."""
    hm = perturbed(
        NanoOptions(d_vocab=20, n_layers=2, d_model=12, n_heads=4, n_kv_heads=2, d_mlp=0, norm="none"), size=0.5
    )
    pairs = id_pairs(2)
    source = hm.run(pairs.clean, read=["1.q", "1.k"])
    base = pairs.metric()(hm.run(pairs.corrupted))
    fixed = attribute(hm, pairs, nodes=["1.q", "1.k"], rule="atp*")
    plain = attribute(hm, pairs, nodes=["1.q", "1.k"])
    for site, heads in (("1.q", 4), ("1.k", 2)):
        exact = torch.zeros(heads, 2)
        for pos in range(7):
            for head in range(heads):
                edit = Replace(site, source, where=Where(pos=pos, head=head))
                with pytest.warns(UserWarning, match="changed nothing") if pos < 2 else _nothing():
                    exact[head] += (pairs.metric()(hm.run(pairs.corrupted, write=[edit])) - base).abs()
        assert float(exact.max()) > 0.05
        assert torch.allclose(fixed.totals[site], exact, atol=1e-4)
        assert not torch.allclose(plain.totals[site].abs(), exact, atol=1e-2)


def _nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()


def test_grad_drop_averages_the_sizes_with_each_layer_cut_off() -> None:
    hm, pairs = linear(), id_pairs()
    found = attribute(hm, pairs, nodes=["z"], rule="atp*")
    plain = attribute(hm, pairs, nodes=["z"])
    # The last layer's heads reach the logits alone: cutting any other layer leaves them, cutting theirs leaves nothing.
    assert torch.allclose(found.positions["2.z"], plain_sizes(pairs, hm, "2.z"), atol=1e-5)
    last = found.totals["2.z"]
    assert bool((last >= plain.totals["2.z"].abs() - 1e-6).all())
    # Middle layer, by hand: both ways, the direct way alone, and nothing; three layers, so half of the sum.
    source, run = hm.run(pairs.clean, read=["1.z"]), hm.run(pairs.corrupted, read=["1.z"])
    delta = source["1.z"] - run["1.z"]
    weights, columns = hm.weights, pairs.metric()
    straight = torch.einsum("bphd,hdm->bphm", delta, weights[1].W_O) @ weights.W_U
    logits = torch.zeros(3, 7, 3, 20)
    logits[:, -1] = straight[:, -1]
    direct = torch.stack([columns(logits[:, :, head]) for head in range(3)])
    both = attribute(hm, pairs, nodes=["1.z"])
    middle = (both_sizes(hm, pairs) + direct_sizes(direct)) / 2
    assert torch.allclose(found.totals["1.z"], middle, atol=1e-4)
    assert not torch.allclose(found.totals["1.z"], both.totals["1.z"].abs(), atol=1e-3)


def plain_sizes(pairs: PairTokens, hm: HookManager, place: str) -> Tensor:
    """Mean size per position: single pairs have no mean to cancel in."""
    rows = [
        PairTokens.of_ids(
            pairs.clean.ids[i : i + 1], pairs.corrupted.ids[i : i + 1], pairs.answer_ids[i], pairs.foil_ids[i]
        )
        for i in range(len(pairs))
    ]
    return torch.stack([attribute(hm, row, nodes=[place]).positions[place].abs() for row in rows]).mean(0)


def both_sizes(hm: HookManager, pairs: PairTokens) -> Tensor:
    rows = [
        PairTokens.of_ids(
            pairs.clean.ids[i : i + 1], pairs.corrupted.ids[i : i + 1], pairs.answer_ids[i], pairs.foil_ids[i]
        )
        for i in range(len(pairs))
    ]
    return torch.stack([attribute(hm, row, nodes=["1.z"]).positions["1.z"].abs().sum(1) for row in rows], dim=1)


def direct_sizes(direct: Tensor) -> Tensor:
    """Only the last position has a direct way, so its size is that of the sum."""
    return direct.abs()


@pytest.mark.usefixtures("unchecked")  # many gradients
def test_integrated_gradients_of_the_inputs_are_complete() -> None:
    hm, pairs = small(), ioi()
    gap = pairs.metric()(hm.run(pairs.clean, logits="last")) - pairs.metric()(hm.run(pairs.corrupted, logits="last"))
    offs = {}
    for steps in (2, 12):
        found = attribute(hm, pairs, nodes="0.resid_pre", path=Path("inputs_ig", steps, "gauss"))
        offs[steps] = float((found.totals["0.resid_pre"][0] - gap).abs().max())
    assert offs[12] < 1e-2 * float(gap.abs().max()) and offs[12] < offs[2]
    noise = attribute(hm, pairs, nodes="0.resid_pre", path=Path("inputs_ig", 12, "gauss"), mode="noise")
    assert torch.allclose(noise.totals["0.resid_pre"][0], -gap, atol=1e-2 * float(gap.abs().max()))
    # Edges out of the input carry all of it.
    edges = edge_attribution(hm, pairs, path=Path("inputs_ig", 12, "gauss"))
    assert float(edges.of_senders()[0]) == pytest.approx(float(gap.mean()), rel=1e-2)


# -- a GPT-2 split by hand -------------------------------------------------------------------------------------------


class Split:
    """GPT-2 from its formula, with an input of its own for every q, k and v head, every MLP and the logits."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config
        self.receivers: list[Tensor] = []
        self.senders: list[Tensor] = []

    def _input(self, stream: Tensor) -> Tensor:
        own = stream.clone()
        own.retain_grad()
        self.receivers.append(own)
        return own

    def __call__(self, embedded: Tensor) -> Tensor:
        self.receivers, self.senders = [], [embedded]
        n, d = self.config.n_head, self.config.n_embd // self.config.n_head
        x = embedded
        for block in self.model.transformer.h:
            weight, bias = block.attn.c_attn.weight, block.attn.c_attn.bias
            parts = []
            for kind in range(3):
                heads = []
                for h in range(n):
                    at = slice(kind * n * d + h * d, kind * n * d + (h + 1) * d)
                    heads.append(block.ln_1(self._input(x)) @ weight[:, at] + bias[at])
                parts.append(torch.stack(heads, dim=1))
            q, k, v = parts
            scores = (q @ k.transpose(2, 3)) / d**0.5
            scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
            z = scores.softmax(-1) @ v
            rows = block.attn.c_proj.weight.unflatten(0, (n, d))
            added = [z[:, h] @ rows[h] for h in range(n)]
            self.senders += added
            x = x + torch.stack(added).sum(0) + block.attn.c_proj.bias
            out = block.mlp(block.ln_2(self._input(x)))
            self.senders.append(out)
            x = x + out
        return self.model.lm_head(self.model.transformer.ln_f(self._input(x)))


def split_scores(hm: HookManager, pairs: PairTokens, *, steps: int, at_clean: bool) -> Tensor:
    """EAP (gradient at the clean run) or EAP-IG (left points from the corrupted embedding), summed as published."""
    split, table = Split(hm.model), hm.model.transformer
    embed = {
        name: (table.wte(side.ids) + table.wpe(torch.arange(side.ids.shape[1]))).detach().requires_grad_(True)
        for name, side in (("clean", pairs.clean), ("corrupted", pairs.corrupted))
    }
    metric, held = pairs.metric(), {}
    for name, start in embed.items():
        split(start)
        held[name] = torch.stack(split.senders).detach()
    delta = held["clean"] - held["corrupted"]
    shares = [1.0] if at_clean else [k / steps for k in range(steps)]
    total = torch.zeros(1)
    for share in shares:
        start = (embed["corrupted"] + share * (embed["clean"] - embed["corrupted"])).detach().requires_grad_(True)
        metric(split(start)).sum().backward()
        gradients = torch.stack([receiver.grad for receiver in split.receivers if receiver.grad is not None])
        total = total + torch.einsum("sbpd,rbpd->sr", delta, gradients) / len(shares)
    return total / len(pairs)


@pytest.mark.parametrize("method", ["EAP", "EAP-IG"])
def test_edge_scores_are_those_of_a_gpt2_with_split_inputs(method: str) -> None:
    hm = HookManager.load(make("GPT2"))
    pairs = id_pairs(2, vocab=100)
    if method == "EAP":
        mine = edge_attribution(hm, pairs, at="clean")
        wanted = split_scores(hm, pairs, steps=1, at_clean=True)
    else:
        mine = edge_attribution(hm, pairs, path=Path("inputs_ig", 4, "left"))
        wanted = split_scores(hm, pairs, steps=4, at_clean=False)
    allowed = mine.graph.allowed
    assert float(wanted.abs().max()) > 0.1
    assert float((mine.scores - wanted.where(allowed, torch.zeros(()))).abs().max()) < 2e-5
    assert mine.mask(20).sum() == 20 and mine.top(1)[0][0] in mine.graph.edges(mine.mask(1))


def test_paths_of_activations_move_one_group_of_senders_at_a_time() -> None:
    hm, pairs = perturbed(NanoOptions(d_vocab=20, n_layers=2, d_model=12, n_heads=3, mlp="gated")), id_pairs()
    path = Path("activations_ig", 2)
    edges = edge_attribution(hm, pairs, path=path)
    nodes = attribute(hm, pairs, nodes=["0.resid_pre", "z", "mlp_out"], path=path)
    assert not torch.allclose(nodes.scores, attribute(hm, pairs, nodes=nodes.places).scores, atol=1e-2)
    wanted = torch.cat([nodes.totals[place].mean(1) for place in _in_order(nodes.places)])
    assert torch.allclose(edges.of_senders(), wanted, atol=1e-3 * float(wanted.abs().max()))


def _in_order(places: list[str]) -> list[str]:
    return sorted(places, key=lambda p: (int(p.split(".")[0]), ["resid_pre", "z", "mlp_out"].index(p.split(".")[1])))


# -- means, latents, flow --------------------------------------------------------------------------------------------


def test_means_are_by_template_and_position() -> None:
    hm, pairs = linear(), id_pairs(4)
    templates = ("a", "a", "b", "b")
    held = replace(pairs, meta=tuple({"template": name} for name in templates))
    found = attribute(hm, held, nodes=["1.z"], mode="mean")
    run = hm.run(pairs.clean, read=["1.z"], grad=held.metric(), logits="last")
    z, g = run["1.z"], run.grad["1.z"]
    other = hm.run(pairs.corrupted, read=["1.z"])["1.z"]
    mean = torch.stack([other[:2].mean(0), other[:2].mean(0), other[2:].mean(0), other[2:].mean(0)])
    assert torch.allclose(found.totals["1.z"], ((mean - z) * g).sum((1, 3)).T, atol=1e-5)
    # The same mean as the exact ablation's: on a linear model the estimate is the effect.
    exact = activation_patch(hm, held, sites=["1.z"], options=PatchOptions(ablation="mean"), progress=False)
    assert torch.allclose(found.totals["1.z"], exact.effect[0], atol=1e-4)
    whole = attribute(hm, pairs, nodes=["1.z"], mode="mean")
    assert not torch.allclose(whole.totals["1.z"], found.totals["1.z"], atol=1e-3)
    zero = attribute(hm, pairs, nodes=["1.z"], mode="zero")
    assert torch.allclose(zero.totals["1.z"], -(z * g).sum((1, 3)).T, atol=1e-5)
    edges = edge_attribution(hm, held, mode="mean", rule="frozen_ln")
    row = edges.graph.sender("a1.h0")
    assert float(edges.of_senders()[row]) == pytest.approx(float(found.totals["1.z"][0].mean()), abs=1e-4)


def dictionary(d_in: int) -> StandardSAE:
    torch.manual_seed(7)
    sae = StandardSAE(StandardConfig(d_in=d_in, d_sae=3 * d_in))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return sae


def test_latents_and_their_error_split_what_the_place_has() -> None:
    hm, pairs = small(), ioi()
    sae = dictionary(hm.d_model)
    found = attribute(hm, pairs, nodes=["2.resid_post", Latents(sae, "2.resid_post")])
    latents, error = found.totals["2.resid_post+latents"], found.totals["2.resid_post+error"]
    assert torch.allclose(latents.sum(0) + error[0], found.totals["2.resid_post"][0], atol=1e-3)
    run = hm.run(pairs.corrupted, read=["2.resid_post"], grad=pairs.metric(), logits="last")
    other = hm.run(pairs.clean, read=["2.resid_post"])
    x, y, g = run["2.resid_post"], other["2.resid_post"], run.grad["2.resid_post"]
    with torch.no_grad():
        wanted = ((sae.encode(y) - sae.encode(x)) * (g @ sae.W_dec.T)).sum(1).T
        left = (((y - sae(y)) - (x - sae(x))) * g).sum((1, 2))
    assert torch.allclose(latents, wanted, atol=1e-3) and torch.allclose(error[0], left, atol=1e-3)
    assert found.top(1)[0][0] in found.names


def test_flow_routes_are_the_shares_of_what_is_read() -> None:
    hm, pairs = small(), ioi()
    found = flow_routes(hm, pairs)
    allowed = found.graph.allowed
    assert torch.allclose(found.scores.sum(0), torch.ones(len(found.graph.receivers)), atol=1e-5)
    assert not found.scores[~allowed].any() and float(found.scores.min()) >= 0
    run = hm.run(pairs.clean, read=["0.resid_pre", "0.z", "0.resid_mid"])
    parts = [run["0.resid_pre"], *(run["0.z"][:, :, h] @ hm.weights[0].W_O[h] for h in range(hm.n_heads))]
    stream = run["0.resid_mid"]
    near = torch.stack([(stream.abs().sum(-1) - (stream - part).abs().sum(-1)).clamp(min=0) for part in parts])
    wanted = (near / near.sum(0)).mean((1, 2))
    assert torch.allclose(found.scores[: len(parts), found.graph.receiver("m0")], wanted, atol=1e-5)
    assert found.scores[0, 0] == 1, "the first block reads the input alone"


# -- results ---------------------------------------------------------------------------------------------------------


def test_rows_run_in_batches_give_what_they_give_together(monkeypatch: pytest.MonkeyPatch) -> None:
    hm, pairs = small(), ioi()
    whole, edges = attribute(hm, pairs), edge_attribution(hm, pairs)
    monkeypatch.setattr(sides_module, "_BYTES", 1)
    apart, other = attribute(hm, pairs), edge_attribution(hm, pairs)
    for place in whole.places:
        assert torch.allclose(whole.totals[place], apart.totals[place], atol=1e-4)
    assert torch.allclose(edges.scores, other.scores, atol=1e-4)


def test_screening_verifies_the_best_and_a_sample_of_the_rest() -> None:
    hm, pairs = small(), ioi()
    found = screen_and_verify(hm, pairs, 4, nodes="z", rule="plain")
    exact = activation_patch(hm, pairs, sites="z", progress=False)
    flat = exact.effect.mean(-1).flatten()
    assert int(found.verified.sum()) == 8 and int(found.chosen.sum()) == 4
    assert torch.allclose(found.exact[found.verified], flat[found.verified], atol=1e-4)
    assert found.agreement()[0] == pytest.approx(
        pearson(found.estimates[found.verified], flat[found.verified]), abs=1e-4
    )
    assert found.agreement()[0] > 0.9 and "Pearson" in found.summary()
    again = screen_and_verify(hm, pairs, 4, nodes="z", rule="plain", seed=1)
    assert not torch.equal(again.verified, found.verified)
    with pytest.raises(DataError, match="there are 16 nodes"):
        screen_and_verify(hm, pairs, 17)
    with pytest.raises(ConfigError, match="denoise"):
        screen_and_verify(hm, pairs, 2, mode="zero")


def test_results_have_tables_figures_and_files(tmp_path: File) -> None:
    hm, pairs = small(), ioi()
    nodes = attribute(hm, pairs)
    exact = activation_patch(hm, pairs, sites="z", progress=False)
    edges = edge_attribution(hm, pairs)
    screened = screen_and_verify(hm, pairs, 2)
    for number, result in enumerate((nodes, edges, screened)):
        back = Result.load(result.save(tmp_path / str(number)))
        assert back.summary() == result.summary() and len(back.to_frame()) == len(result.to_frame()) > 0
        assert result.plot().data
        assert result.to_html(tmp_path / f"{number}.html").stat().st_size > 1000
    assert isinstance(AttributionResult.load(tmp_path / "0"), AttributionResult)
    assert torch.equal(EdgeScores.load(tmp_path / "1").scores, edges.scores)
    assert torch.equal(ScreenResult.load(tmp_path / "2").exact.isnan(), screened.exact.isnan())
    assert len(nodes.scatter(exact).data[1].x) == 16 and nodes.agreement(exact)[0] > 0.9
    with pytest.warns(UserWarning, match="estimates of mode 'noise' and patches of mode 'denoise'"):
        attribute(hm, pairs, mode="noise").agreement(exact)
    table = nodes.to_frame()
    assert list(table.node[:2]) == ["0.z[0]", "0.z[1]"] and "span end" in table
    spans = torch.stack([nodes.spans["end"][place] for place in nodes.places])
    last = torch.stack([nodes.positions[place][:, -1] for place in nodes.places])
    assert torch.allclose(spans, last, atol=1e-5), "these prompts have one length: the end is the last column"
    assert nodes.of("z").shape == (4, 4) and nodes.score("0.z[1]") == pytest.approx(float(nodes.of("z")[0, 1]))
    with pytest.raises(SiteError, match="no node"):
        nodes.score("0.zz")
    with pytest.raises(DataError, match="edges of this graph"):
        edges.top(10**6)
    by_position = attribute(hm, pairs, nodes="mlp_out")
    grid = activation_patch(hm, pairs, sites="mlp_out", progress=False)
    assert len(by_position.beside(grid)[0]) == 4 * pairs.clean.ids.shape[1] and by_position.plot().data
    assert attribute(hm, pairs, nodes="1.mlp_post").plot().data
