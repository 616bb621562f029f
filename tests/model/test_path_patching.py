"""Path patching: its three definitions against a naive loop, closed forms and a model whose only path is known."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from interp.core.errors import ConfigError, DataError, ShapeError, SiteError
from interp.core.intervention import FreezeScale, Intervention, Replace
from interp.core.manager import HookManager
from interp.core.result import Result
from interp.core.run import Run
from interp.core.site import Site
from interp.core.where import Where
from interp.data.pair_tokens import PairTokens, with_spans
from interp.data.pairs import PromptPairs
from interp.patching.graph import Graph, Node
from interp.patching.path import path_patch
from interp.patching.path_result import DIRECT, PathPatchResult
from interp.testbed.model_tasks import model_pairs
from tests.families import VOCAB, manager
from tests.hand_built import induction_model

FAMILIES = ("GPT2", "Llama", "GPTNeoX", "Gemma2", "Olmo2")
_QUICK = (("Llama", "all_frozen"), ("GPTNeoX", "heads_frozen"), ("Gemma2", "linear"))
slow = pytest.mark.slow


@functools.cache
def some_pairs(n: int = 3, length: int = 7) -> PairTokens:
    """Pairs that differ at positions 2 and 4, and begin and end alike."""
    draw = torch.Generator().manual_seed(3)
    clean = torch.randint(1, VOCAB, (n, length), generator=draw)
    corrupted = clean.clone()
    corrupted[:, [2, 4]] = torch.randint(1, VOCAB, (n, 2), generator=draw)
    answers = torch.randperm(VOCAB - 1, generator=draw)[: 2 * n].reshape(2, n) + 1
    return PairTokens.of_ids(clean, corrupted, answers[0], answers[1])


def sites_of(hm: HookManager) -> list[str]:
    kinds = ("z", "mlp_out", "resid_pre", "ln1.scale", "ln1_post.scale", "ln2.scale", "ln2_post.scale")
    names = [f"{layer}.{kind}" for layer in range(hm.n_layers) for kind in kinds]
    return [name for name in [*names, "ln_final.scale"] if hm.atlas.has(name)]


@functools.cache
def both_runs(hm: HookManager, pairs: PairTokens) -> tuple[Run, Run]:
    """The clean and the corrupted run, with all that the oracle reads."""
    return hm.run(pairs.clean, read=sites_of(hm)), hm.run(pairs.corrupted, read=sites_of(hm))


def naive(hm: HookManager, pairs: PairTokens, sender: Node, receiver: Node, direct: str) -> Tensor:
    """One forward for one sender into one receiver, and one more for the receiver."""
    names = sites_of(hm)
    base, source = both_runs(hm, pairs)
    writes: list[Intervention] = []
    for name in names:
        kind, layer = Site(name).kind, Site(name).layer
        held = kind == "z" or (kind == "mlp_out" and direct != "heads_frozen")
        held |= kind.endswith("scale") and direct == "linear"
        value = base[name].clone()
        mine = sender.layer == layer and kind == {"head": "z", "mlp": "mlp_out"}.get(sender.kind, "")
        if sender.kind == "input" and name == "0.resid_pre":
            mine = True
        if mine and sender.kind == "head":
            value[:, :, sender.head] = source[name][:, :, sender.head]
        elif mine:
            value = source[name]
        if held or mine:
            writes.append((FreezeScale if kind.endswith("scale") else Replace)(name, value))
    if receiver.kind == "logits":
        return pairs.metric()(hm.run(pairs.clean, write=writes))
    site = f"{receiver.layer}.{'mlp.in' if receiver.kind == 'mlp' else receiver.kind}"
    seen = hm.run(pairs.clean, read=[site], write=writes)
    where = Where() if receiver.kind == "mlp" else Where(head=[receiver.head])
    return pairs.metric()(hm.run(pairs.clean, write=[Replace(site, seen[site], where=where)]))


@pytest.mark.filterwarnings("ignore:.*changed nothing")
@pytest.mark.parametrize(
    ("name", "direct"), [pytest.param(n, d, marks=() if (n, d) in _QUICK else slow) for n in FAMILIES for d in DIRECT]
)
def test_all_cells_are_those_of_a_loop_over_senders_and_receivers(name: str, direct: str) -> None:
    hm, pairs = manager(name), some_pairs()
    graph, last = Graph.of(hm), hm.n_layers - 1
    senders = ["input", "a0.h1", "m0"] + [f"a{last - 1}.h3"] * (last > 1)
    receivers = [f"a{last}.h2<q>", f"a{last}.h{hm.n_kv_heads - 1}<k>", "a1.h1<v>", f"m{last}", "logits"]
    got = path_patch(hm, pairs, senders=senders, receivers={r: [r] for r in receivers}, direct=direct)
    assert got.senders == senders and got.receivers == receivers and got.direct == direct
    assert int(got.blocked.sum()) == (last > 1) and float(got.effect.abs().max()) > 0.05
    for s, sender in enumerate(senders):
        for r, receiver in enumerate(receivers):
            nodes = graph.senders[graph.sender(sender)], graph.receivers[graph.receiver(receiver)]
            want = naive(hm, pairs, *nodes, direct)
            torch.testing.assert_close(got.patched[s, r], want, atol=2e-4, rtol=1e-3, msg=f"{sender} → {receiver}")


@pytest.mark.parametrize(
    "name", [*FAMILIES, *(pytest.param(n, marks=slow) for n in ("Granite", "GPTJ", "FalconNew", "OPT"))]
)
def test_every_sender_at_once_into_the_logits_is_the_other_run(name: str) -> None:
    hm, pairs = manager(name), some_pairs()
    for direct in ("heads_frozen", "all_frozen"):
        for mode in ("noise", "denoise"):
            got = path_patch(hm, pairs, senders={"all": "all"}, direct=direct, mode=mode)
            torch.testing.assert_close(got.patched[0, 0], got.source, atol=2e-4, rtol=1e-3)
    assert float((got.source - got.base).abs().max()) > 0.05 and got.layers == [-2]


@pytest.mark.parametrize("name", ["GPT2", "Llama", "GPTNeoX", "Gemma2", "Granite"])
def test_every_sender_into_every_receiver_is_the_other_run_where_prompts_end_alike(name: str) -> None:
    hm, pairs = manager(name), some_pairs()
    everything = ["q", "k", "v", "mlps"]
    got = path_patch(hm, pairs, senders={"all": "all"}, receivers=everything, direct="all_frozen")
    torch.testing.assert_close(got.patched[0, 0], got.source, atol=2e-4, rtol=1e-3)


def contribution(hm: HookManager, run: Run, sender: str) -> Tensor:
    """What a sender writes at the last position, by the weights."""
    if sender == "input":
        return run["0.resid_pre"][:, -1]
    layer = int(sender[1])
    if sender[0] == "m":
        return run[f"{layer}.mlp_out"][:, -1]
    head = int(sender.partition(".h")[2])
    return run[f"{layer}.z"][:, -1, head] @ hm.weights[layer].W_O[head] * hm.map.residual_multiplier


@pytest.mark.parametrize("name", ["GPT2", "Llama", "GPTNeoX", "Gemma", "Granite"])
def test_linear_paths_into_the_logits_are_direct_logit_attributions_and_add_up(name: str) -> None:
    hm, pairs = manager(name), some_pairs()
    got = path_patch(hm, pairs, senders="all", direct="linear")
    base, source = both_runs(hm, pairs)
    weights = hm.weights
    norm = weights.norm_weights(None, "ln_final")
    for s, sender in enumerate(got.senders):
        delta = contribution(hm, source, sender) - contribution(hm, base, sender)
        delta = delta - delta.mean(-1, keepdim=True) if norm.kind == "LN" else delta
        logits = (delta / base["ln_final.scale"][:, -1] * norm.gain) @ weights.W_U
        logits = logits / float(getattr(hm.config, "logits_scaling", None) or 1.0)
        row = torch.arange(len(pairs))
        want = logits[row, pairs.answer_ids[:, 0]] - logits[row, pairs.foil_ids[:, 0]]
        torch.testing.assert_close(got.effect[s, 0], want, atol=2e-4, rtol=1e-3, msg=sender)
    joint = path_patch(hm, pairs, senders={"all": "all"}, direct="linear")
    torch.testing.assert_close(got.effect.sum(0), joint.effect[0], atol=5e-4, rtol=1e-3)
    assert float((joint.patched[0, 0] - joint.source).abs().max()) > 0.01, "σ is held, so it is not the other run"


def test_what_cannot_arrive_is_exactly_nothing() -> None:
    hm, pairs = manager("Llama"), some_pairs()
    late = path_patch(hm, pairs, senders=["a2.h0", "m2", "a1.h0", "m0"], receivers="a1.h0<q>")
    assert late.blocked[:, 0].tolist() == [True, True, True, False]
    assert torch.equal(late.effect[:3], torch.zeros(3, 1, 3)) and bool(late.effect[3].any())
    # Before the first difference both runs are equal.
    early = path_patch(hm, pairs, senders=["all@0", "all@1"], receivers={"q": "q", "direct": "logits"})
    assert early.blocked.all() and torch.equal(early.effect, torch.zeros_like(early.effect))
    # Only the changed rows have effects.
    clean, corrupted = pairs.clean.ids.clone(), pairs.corrupted.ids.clone()
    corrupted[1] = clean[1]
    one = PairTokens.of_ids(clean, corrupted, pairs.answer_ids[:, 0], pairs.foil_ids[:, 0])
    some = path_patch(hm, one, senders="heads", receivers="logits")
    assert torch.equal(some.effect[:, 0, 1], torch.zeros(len(some.senders))) and bool(some.effect[:, 0, 0].any())
    same = path_patch(hm, PairTokens.of_ids(clean, clean, one.answer_ids[:, 0], one.foil_ids[:, 0]), senders="all")
    assert same.blocked.all() and not same.effect.any() and same.normalized().isnan().all()


@pytest.mark.parametrize(
    "direct", ["heads_frozen", pytest.param("all_frozen", marks=slow), pytest.param("linear", marks=slow)]
)
def test_the_budget_of_a_forward_and_the_padding_do_not_matter(direct: str) -> None:
    hm = manager("Llama")
    pairs = PromptPairs.make(
        ["w5 {x:w6} w7 w8", "w9 {x:w10} w3", "w1 w2 {x:w4} w8 w9"],
        ["w5 {x:w16} w7 w8", "w9 {x:w20} w3", "w1 w2 {x:w14} w8 w9"],
        [" w30", " w31", " w32"],
        [" w40", " w41", " w42"],
        marked=True,
    )
    receivers = {"k": "a2.*<k>", "stream": "1.resid_mid@end", "m": "m2@end", "direct": "logits"}

    def found(**given: Any) -> PathPatchResult:
        return path_patch(hm, side, senders=["a1.*@x", "m0@end"], receivers=receivers, direct=direct, **given)

    side = pairs.tokens(hm)
    whole = found()
    for max_bytes in (1, 120_000):
        torch.testing.assert_close(found(max_bytes=max_bytes).patched, whole.patched, atol=1e-5, rtol=1e-4)
    side = pairs.tokens(hm, side="left")
    torch.testing.assert_close(found().patched, whole.patched, atol=1e-4, rtol=1e-4)
    for row in (1, 2):
        side = pairs[[row]].tokens(hm)
        torch.testing.assert_close(found().patched[..., 0], whole.patched[..., row], atol=1e-4, rtol=1e-4)
    assert float(whole.effect.abs().max()) > 0.01


def test_without_mlps_and_norms_the_definitions_are_one() -> None:
    hm, pairs = induction_model(), repeats()
    results = [path_patch(hm, pairs, senders="all", receivers={"k": "k", "d": "logits"}, direct=d) for d in DIRECT]
    for other in results[1:]:
        torch.testing.assert_close(other.patched, results[0].patched, atol=1e-4, rtol=1e-4)


def repeats() -> PairTokens:
    """… 3 7 … 3 → 7; corrupted: another token stands before the 7, so that nothing says what follows 3."""
    clean = torch.tensor([[1, 2, 3, 7, 4, 5, 3], [6, 3, 9, 1, 2, 4, 3], [8, 2, 5, 10, 11, 1, 2]])
    corrupted = clean.clone()
    for row, (column, token) in enumerate([(2, 9), (1, 8), (1, 4)]):
        corrupted[row, column] = token
    return PairTokens.of_ids(clean, corrupted, torch.tensor([7, 9, 5]), torch.tensor([4, 1, 10]))


@pytest.mark.parametrize("direct", list(DIRECT))
def test_the_only_path_of_a_hand_built_induction_model_is_the_one_it_was_given(direct: str) -> None:
    hm, pairs = induction_model(), repeats()
    out = hm.run(pairs.clean, logits="last").logits[:, 0]
    assert out.argmax(-1).tolist() == [7, 9, 5] and float(pairs.metric()(hm.run(pairs.clean)).min()) > 9
    receivers = {f"a1.h{h}<{kind}>": [f"a1.h{h}<{kind}>"] for h in (0, 1) for kind in "qkv"} | {"logits": ["logits"]}
    got = path_patch(hm, pairs, senders=["a0.h0", "a0.h1"], receivers=receivers, direct=direct)
    mean = dict(zip(got.receivers, got.effect[0].mean(-1).tolist(), strict=True))
    assert mean.pop("a1.h0<k>") < -8
    assert all(abs(value) < 1e-4 for value in mean.values()), mean
    # The other head writes of the last token alone, and that is the same.
    assert float(got.effect[1].abs().max()) < 1e-4
    back = path_patch(hm, pairs, senders="heads", receivers="a1.h0<k>", direct=direct, mode="denoise")
    assert back.senders[int(back.normalized()[:, 0].argmax())] == "a0.h0"
    assert float(back.normalized()[0, 0]) == pytest.approx(1.0, abs=0.05)
    place = torch.tensor([3, 2, 2])  # where the answer stands: the key that must change
    spans = {"at": torch.nn.functional.one_hot(place, 7).bool()}
    sides = [with_spans(side, spans) for side in (pairs.clean, pairs.corrupted)]
    named = PairTokens(sides[0], sides[1], pairs.answers, pairs.foils)
    placed = path_patch(hm, named, senders=["a0.h0@at", "a0.h0@end"], receivers="a1.h0<k>@at", direct=direct)
    torch.testing.assert_close(placed.effect[0, 0], got.effect[0, 1], atol=1e-4, rtol=1e-4)
    assert float(placed.effect[1].abs().max()) < 1e-4


@slow
def test_heads_found_on_some_prompts_of_the_testbed_are_found_on_others() -> None:
    hm = HookManager.load("testbed")
    found = []
    for out in (False, True):
        pairs = model_pairs(hm, "ioi", 30, held_out=out)
        direct = path_patch(hm, pairs, senders="heads", direct="all_frozen").effect[:, 0].mean(-1)
        into = {f"{head}<q>@end": [f"{head}<q>@end"] for head in ("a2.h2", "a2.h0")}
        early = path_patch(hm, pairs, senders="heads", receivers=into).effect.sum(1).mean(-1)
        found.append((set(direct.argsort()[:2].tolist()), set(early.argsort()[:2].tolist())))
    assert found[0] == found[1] == ({8, 10}, {2, 3})  # a2.h0 and a2.h2 say the name; a0.h2 and a0.h3 tell them which


def test_results_say_which_definition_and_survive_a_folder(tmp_path: Path) -> None:
    hm, pairs = manager("GPT2"), some_pairs()
    got = path_patch(hm, pairs, senders=["heads", "mlps"], direct="all_frozen", metric="log_prob")
    assert "direct = all_frozen: all heads and MLPs held" in got.summary() and "log_prob" in got.summary()
    figure = got.plot()
    assert "all_frozen" in figure.layout.title.text and len(figure.data[0].z) == hm.n_layers
    loaded = Result.load(got.save(tmp_path / "r"))
    assert isinstance(loaded, PathPatchResult) and loaded.summary() == got.summary()
    assert len(got.to_frame()) == len(got.senders) * 3 and "Path patching" in got.to_html(tmp_path / "p").read_text()
    several = path_patch(hm, pairs, senders=["input", "a0.h0"], receivers={"a": "q", "b": "m2"})
    assert len(several.plot().data[0].z) == 2 and several.p_values().shape == (2, 2)
    low, high = several.interval()
    assert bool((low <= several.effect.mean(-1)).all() and (several.effect.mean(-1) <= high).all())


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_patched_is_refused() -> None:
    hm, pairs = manager("GPT2"), some_pairs()
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"senders": "a0.h9"}, SiteError, "no sender 'a0.h9'"),
        ({"senders": []}, SiteError, "no sender was given"),
        ({"senders": {}}, SiteError, "no sender was given"),
        ({"senders": "heads", "receivers": {}}, SiteError, "no receiver was given"),
        ({"senders": "heads", "metric": lambda out: out.logits[:, 0, 0]}, DataError, "by a name or a Metric"),
        ({"senders": "heads@s2"}, DataError, "no span 's2'"),
        ({"senders": "heads@30"}, DataError, "row 0 has no position '30'"),
        ({"senders": "heads", "receivers": "a0.h0<x>"}, SiteError, "no receiver 'a0.h0<x>'"),
        ({"senders": "heads", "receivers": ["logits", "m2"]}, SiteError, "a group of its own"),
        ({"senders": "heads", "receivers": ["2.resid_pre", "m2"]}, SiteError, "a group of its own"),
        ({"senders": "heads", "receivers": "9.resid_pre"}, SiteError, "this model has 3 layers"),
        ({"senders": "heads", "receivers": "logits@end"}, SiteError, "leave the place out"),
        ({"senders": "heads", "direct": "frozen"}, ConfigError, "did you mean 'all_frozen'"),
        ({"senders": "heads", "mode": "both"}, ConfigError, "expected 'noise'"),
        ({"senders": "heads", "metric": "loss"}, DataError, "metric 'loss'"),
        ({"senders": "heads", "metric": some_pairs(4).metric()}, ShapeError, "of 4 examples and these are 3 pairs"),
    ]
    for given, error, text in cases:
        with pytest.raises(error, match=text):
            path_patch(hm, pairs, **given)
    ragged = PairTokens.of_ids([[1, 2, 3]], [[1, 2]], torch.tensor([4]), torch.tensor([5]))
    with pytest.raises(DataError, match="have 3 and 2 tokens"):
        path_patch(hm, ragged, senders="heads")
