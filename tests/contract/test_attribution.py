"""Attribution on families of models: against finite differences, between nodes and edges, under padding."""

import functools

import pytest
import torch
import transformers as tf
from torch import Tensor

from interp.core.attribute import Interpolate, gradient_run
from interp.core.errors import ConfigError, DataError, ModelError, SiteError
from interp.core.intervention import Add, Edit
from interp.core.manager import HookManager
from interp.core.rules import RULES, rule_edits
from interp.core.run import Run
from interp.core.site import Site
from interp.core.text import Tokens
from interp.core.where import Where
from interp.data.pair_tokens import PairTokens, with_spans
from interp.patching.estimates.attribution import attribute
from interp.patching.estimates.edge_scores import EdgeScores
from interp.patching.estimates.edges import edge_attribution
from interp.patching.graph import Graph
from tests.families import FAMILIES, make, manager, tokens

pytestmark = pytest.mark.contract

MIXTURES = ("Mixtral", "Qwen2Moe", "GptOss")
SANDWICH = ("Gemma2", "Gemma3", "Gemma3Multimodal", "Olmo2")
# A learned position table; parallel blocks with one norm and with two; grouped and rotated; norms behind and q/k-norms;
# sandwich norms with soft-caps; sinks; a multiplier; blocks that add in place.
HANDFUL = ("GPT2", "GPTJ", "GPTNeoX", "Llama", "Olmo2", "Gemma2", "GptOss", "Granite", "FalconNew", "OPT")
some_families = pytest.mark.parametrize("name", HANDFUL)
# GptOss' experts work in single precision only. What OPT and Llama have, GPT2 and Granite have too.
in_double = pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in ("OPT", "Llama") else ()) for n in HANDFUL if n != "GptOss"],
)


@functools.cache
def ids() -> tuple[Tensor, Tensor]:
    """Clean and corrupted ids [3 pos]; two positions differ."""
    clean = tokens(3, 9)
    corrupted = clean.clone()
    corrupted[:, 3] = (corrupted[:, 3] + 7) % 119 + 1
    corrupted[:, 6] = (corrupted[:, 6] + 3) % 119 + 1
    return clean, corrupted


def pairs(*, same: bool = False) -> PairTokens:
    clean, corrupted = ids()
    answers = torch.tensor([3, 4, 5]), torch.tensor([6, 7, 8])
    return PairTokens.of_ids(clean, clean if same else corrupted, *answers)


@functools.cache
def double(name: str) -> HookManager:
    """A family's model in double precision; some take their softmax in single all the same, hence the steps below."""
    return HookManager.load(make(name).double())


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return a.shape == b.shape and float((a - b).abs().max()) <= tolerance * (float(b.abs().max()) + 1e-3)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_rules_change_no_value(name: str) -> None:
    for rule in RULES:
        check_values(manager(name), name, rule)


def check_values(hm: HookManager, name: str, rule: str) -> None:
    if name in MIXTURES and rule not in ("plain", "frozen_ln"):
        with pytest.raises(ModelError, match=r"frozen_ln"):
            rule_edits(hm, rule)
        return
    plain = hm.run(tokens(), logits="last").logits
    for grad in (None, lambda out: out.logits[:, 0, 3]):
        read = ["0.resid_pre"] if grad else []
        found = hm.run(tokens(), read=read, write=rule_edits(hm, rule), grad=grad, logits="last").logits
        if rule in ("plain", "frozen_ln", "relp"):
            assert torch.equal(found, plain)
        else:  # attention goes eager, which rounds otherwise
            assert float((found - plain).abs().max()) <= 1e-6 * float(plain.abs().max())


def test_what_is_read_for_a_gradient_stays_as_it_was_where_blocks_add_in_place() -> None:
    hm = manager("FalconNew")
    read = ["*.mlp_out", "*.attn_out"]
    plain = hm.run(tokens(), read=read)
    graded = hm.run(tokens(), read=read, grad=lambda out: out.logits[:, 0, 3], logits="last")
    for site in plain.sites:
        assert torch.equal(graded[site], plain[site])


@in_double
def test_attribution_is_patching_to_first_order(name: str) -> None:
    hm, held = double(name), pairs()
    kinds = [k for k in ("z", "mlp_out", "q", "v", "mlp_post") if hm.atlas.has(f"1.{k}")]
    found = attribute(hm, held, nodes=[f"1.{kind}" for kind in kinds])
    metric, step = held.metric(), 1e-3
    source = hm.run(held.clean, read=[f"1.{kind}" for kind in kinds])

    def moved(site: str, share: float, head: int | None) -> Tensor:
        where = Where() if head is None else Where(head=head)
        return metric(hm.run(held.corrupted, write=[Interpolate(site, source, share, where)], logits="last"))

    for kind in kinds:
        site = f"1.{kind}"
        heads = [0, 1] if kind in "zqv" else [None]
        for head in heads:
            slope = (moved(site, step, head) - moved(site, -step, head)) / (2 * step)
            mine = found.totals[site].sum(0) if head is None else found.totals[site][head]
            assert close(mine.double(), slope, 1e-2), (site, head)
            assert float(slope.abs().max()) > 1e-3


def adds(hm: HookManager, run: Run, name: str) -> Tensor:
    """What a sender adds to the stream in a run, by the formula: [batch pos d_model]."""
    graph = Graph.of(hm)
    node = graph.senders[graph.sender(name)]
    if node.kind == "input":
        return run["0.resid_pre"]
    if node.kind == "mlp":
        return run["mlp_out", node.layer]
    weights = hm.weights[node.layer]
    part = run["z", node.layer][:, :, node.head] @ weights.W_O[node.head]
    if hm.map.attn_out != "ln1_post":
        return part * hm.map.residual_multiplier
    whole = torch.einsum("bphd,hdm->bpm", run["z", node.layer], weights.W_O) + weights.b_O
    norm = hm.weights.norm_weights(node.layer, "ln1_post")
    assert norm.kind == "RMS"
    return part / (whole.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.gain


def through(hm: HookManager, receiver: str, stream: Tensor, delta: Tensor, share: float) -> Edit:
    """The edit that gives one receiver alone a stream with `share · delta` added."""
    graph = Graph.of(hm)
    node = graph.receivers[graph.receiver(receiver)]
    if node.kind == "logits":
        return Edit(f"{hm.n_layers - 1}.resid_post", lambda x: x + share * delta)
    before = hm.map.module(hm.root, "ln1", node.layer)
    normed = stream if before is None else before(stream)
    moved = stream + share * delta if before is None else before(stream + share * delta)
    if node.kind == "mlp":
        if hm.atlas.has(f"{node.layer}.mlp_in"):
            return Edit(f"{node.layer}.mlp_in", lambda x: x + share * delta)
        return Edit(f"{node.layer}.mlp.in", lambda x: x + moved - normed)
    weight = getattr(hm.weights[node.layer], f"W_{node.kind.upper()}")[node.head]
    return Edit(f"{node.layer}.{node.kind}", lambda x: x + (moved - normed)[:, :, None] @ weight, Where(head=node.head))


@in_double
def test_an_edge_is_the_derivative_of_moving_one_input(name: str) -> None:
    hm, held = double(name), pairs()
    found = edge_attribution(hm, held)
    metric, graph, step = held.metric(), found.graph, 1e-3
    reads = ["0.resid_pre", "*.z", "*.mlp_out", "*.attn_in"]
    run, other = (hm.run(side, read=reads) for side in (held.corrupted, held.clean))
    last = hm.n_layers - 1
    mlps = [node.name for node in graph.receivers if node.kind == "mlp"]
    for sender in ("input", "a0.h1", "m0", f"a{last}.h2"):
        delta = adds(hm, other, sender) - adds(hm, run, sender)
        for receiver in (f"a{last}.h1<q>", f"a{last}.h0<k>", f"a{last}.h1<v>", *mlps, "logits"):
            row, column = graph.sender(sender), graph.receiver(receiver)
            if not graph.allowed[row, column]:
                assert found.scores[row, column] == 0
                continue
            layer = graph.receivers[column].layer
            stream = run["attn_in", min(layer, last)]
            values = [
                metric(hm.run(held.corrupted, write=[through(hm, receiver, stream, delta, s)], logits="last"))
                for s in (step, -step)
            ]
            slope = float((values[0] - values[1]).mean() / (2 * step))
            assert found.edge(f"{sender}->{receiver}") == pytest.approx(slope, rel=1e-2, abs=1e-3), receiver


@pytest.mark.parametrize("rule", ["plain", "gim"])
@some_families
def test_a_sender_s_edges_sum_to_its_attribution(name: str, rule: str) -> None:
    if name in MIXTURES and rule == "gim":
        pytest.skip("a mixture's MLPs are out of the rule's reach, which is tested above")
    hm = manager(name)
    found = edge_attribution(hm, pairs(), rule=rule).of_senders()
    nodes = attribute(hm, pairs(), nodes=["0.resid_pre", "z", "mlp_out"], rule=rule)
    for row, node in enumerate(Graph.of(hm).senders):
        if node.kind == "head" and name in SANDWICH:
            continue  # what the norm behind a head makes of it changes with σ, which an edge holds and a node does not
        place = {"input": "0.resid_pre", "head": f"{node.layer}.z", "mlp": f"{node.layer}.mlp_out"}[node.kind]
        wanted = float(nodes.totals[place].mean(1)[max(node.head, 0)])
        assert float(found[row]) == pytest.approx(wanted, rel=1e-4, abs=2e-5), node.name


@pytest.mark.parametrize("rule", ["plain", "gim", "atp*"])
@pytest.mark.parametrize("name", ["Llama", "FalconNew"])
def test_prompts_that_are_the_same_give_exactly_nothing(name: str, rule: str) -> None:
    found = attribute(manager(name), pairs(same=True), nodes=["z", "q", "mlp_out"], rule=rule)
    assert not found.scores.any()
    if rule != "atp*":
        assert not edge_attribution(manager(name), pairs(same=True), rule=rule).scores.any()


def padded(side: str) -> PairTokens:
    """The pairs with row 0 cut short on the left of its answer, among pads; and alone."""
    held = []
    for given in ids():
        mask = torch.ones_like(given, dtype=torch.bool)
        out = given.clone()
        if side == "left":
            mask[0, :2] = False
        else:
            out[0, :-2], mask[0, -2:] = given[0, 2:], False
        out[~mask] = 0
        held.append(with_spans(Tokens(out, mask), {}))
    plain = pairs()
    return PairTokens(held[0], held[1], plain.answers, plain.foils)


def unpadded_row() -> PairTokens:
    plain = pairs()
    sides = [with_spans(Tokens(x[:1, 2:], torch.ones_like(x[:1, 2:], dtype=torch.bool)), {}) for x in ids()]
    return PairTokens(sides[0], sides[1], plain.answers[:1], plain.foils[:1])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("name", "rule"), [("GPT2", "atp*"), ("Llama", "plain"), ("Gemma2", "gim")])
def test_pads_change_nothing(name: str, side: str, rule: str) -> None:
    hm = manager(name)
    nodes = ["z", "mlp_out", "q", "k"]
    among = attribute(hm, padded(side), nodes=nodes, rule=rule)
    alone = attribute(hm, unpadded_row(), nodes=nodes, rule=rule)
    for place in among.places:
        assert torch.allclose(among.totals[place][:, :1], alone.totals[place], atol=1e-4, rtol=1e-3)
    if rule != "atp*":
        rest = PairTokens.of_ids(ids()[0][1:], ids()[1][1:], torch.tensor([4, 5]), torch.tensor([7, 8]))
        wanted = (
            edge_attribution(hm, unpadded_row(), rule=rule).scores + 2 * edge_attribution(hm, rest, rule=rule).scores
        )
        assert torch.allclose(3 * edge_attribution(hm, padded(side), rule=rule).scores, wanted, atol=2e-4, rtol=1e-3)


def ungrouped() -> HookManager:
    """The Llama of two key/value heads as one of four, each head repeated."""
    model = make("Llama")
    config = tf.LlamaConfig(**{**model.config.to_dict(), "num_key_value_heads": 4})
    twin = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    state = model.state_dict()
    for name, value in state.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            state[name] = value.unflatten(0, (2, -1)).repeat_interleave(2, 0).flatten(0, 1)
    twin.load_state_dict(state)
    return HookManager.load(twin)


def test_grouped_keys_are_the_sum_of_repeated_ones() -> None:
    grouped, repeated = manager("Llama"), ungrouped()
    few, many = edge_attribution(grouped, pairs()), edge_attribution(repeated, pairs())
    assert few.graph.n_edges_ungrouped == many.graph.n_edges
    for column, node in enumerate(few.graph.receivers):
        if node.kind in "kv":
            names = [f"a{node.layer}.h{2 * node.head + i}<{node.kind}>" for i in range(2)]
            wanted = torch.stack([many.scores[:, many.graph.receiver(name)] for name in names]).sum(0)
        else:
            wanted = many.scores[:, many.graph.receiver(node.name)]
        assert close(few.scores[:, column], wanted, 1e-4), node.name
    for kind in "kv":
        mine = attribute(grouped, pairs(), nodes=kind)
        theirs = attribute(repeated, pairs(), nodes=kind)
        for place in mine.places:
            assert close(mine.totals[place], theirs.totals[place].unflatten(0, (2, 2)).sum(1), 1e-4)


def test_scores_by_position_sum_to_the_whole() -> None:
    found = edge_attribution(manager("Llama"), pairs(), per_position=True)
    assert found.by_position is not None and found.by_position.shape[0] == 9
    assert torch.allclose(found.by_position.sum(0), found.scores, atol=1e-5)
    assert not found.by_position[:3].any(), "before the first difference there is nothing"
    assert found.by_position[3].any()


def test_what_cannot_be_is_refused_by_name() -> None:
    hm = manager("GPT2")
    with pytest.raises(ConfigError, match="plain"):
        attribute(hm, pairs(), rule="pain")
    with pytest.raises(ConfigError, match="expected"):
        edge_attribution(hm, pairs(), rule="atp*")
    with pytest.raises(ConfigError, match="leave one"):
        attribute(hm, pairs(), path="inputs_ig", at="both")
    with pytest.raises(ConfigError, match="none"):
        edge_attribution(hm, pairs(), path="inputs_ig", mode="mean")
    with pytest.raises(SiteError, match="position axis"):
        attribute(hm, pairs(), nodes="pattern")
    with pytest.raises(ModelError, match="multiple of q"):
        attribute(manager("Bloom"), pairs(), nodes="q", rule="atp*")
    uneven = PairTokens.of_ids([[1, 2, 3]], [[1, 2]], torch.tensor([3]), torch.tensor([4]))
    with pytest.raises(DataError, match="3 clean tokens and 2"):
        attribute(hm, uneven)


def test_a_family_that_does_more_before_its_heads_is_refused() -> None:
    """The check has teeth: a projection that is not the one in the weights."""
    hm = HookManager.load(make("GPT2"))
    hook = hm.model.transformer.h[1].attn.c_attn.register_forward_hook(lambda m, a, out: out * 1.01)
    with pytest.raises(ModelError, match="norm and a"):
        edge_attribution(hm, pairs())
    hook.remove()
    assert isinstance(edge_attribution(hm, pairs()), EdgeScores)


def test_a_gradient_run_is_a_run_with_the_rule() -> None:
    hm, held = manager("Llama"), pairs()
    run = gradient_run(hm, held.clean, read=["1.z"], metric=held.metric(), rule="relp")
    other = hm.run(held.clean, read=["1.z"], write=rule_edits(hm, "relp"), grad=held.metric(), logits="last")
    assert torch.equal(run.grad["1.z"], other.grad["1.z"])
    shifted = gradient_run(
        hm, held.clean, read=["1.z"], metric=held.metric(), write=[Add("0.resid_pre", torch.ones(32))]
    )
    assert not torch.equal(shifted["1.z"], run["1.z"])
    assert Site("1.z") in run
