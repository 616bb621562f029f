"""Edges replaced in one forward, on many families: against runs of the model itself and against loops over heads."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from interp.core.errors import DataError, ModelError, ShapeError
from interp.core.intervention import Replace
from interp.core.manager import HookManager
from interp.core.run import Run
from interp.core.text import Tokens
from interp.core.where import Where
from interp.data.pair_tokens import PairTokens
from interp.patching.circuits.circuit import Circuit
from interp.patching.circuits.circuit_curve import circuit_curve
from interp.patching.circuits.edge_forward import EdgeModel, EdgePass
from interp.patching.circuits.evaluate_circuit import ABLATIONS, CircuitRuns, EdgeAblation, edge_effects
from interp.patching.circuits.faithfulness import evaluate_circuits
from interp.patching.graph import Graph
from interp.testbed.nano import NanoOptions, nano
from tests.families import FAMILIES, make, manager, paddings, tokens

pytestmark = pytest.mark.contract
TOLERANCE = 1e-5
BY_HAND = 5e-5  # loops round otherwise than the model's kernels do; logits are of size 20

# Fused and plain projections, grouped queries, parallel blocks with one norm and with two, norms after the heads,
# q/k-norms, residual multipliers, soft-caps, MLPs that see batch and positions as one axis. The rest is slow.
DEFAULT = ("GPT2", "GPTJ", "OPT", "FalconNew", "Llama", "Qwen3", "Gemma2", "Olmo2", "Granite")
MIXTURES = ("Mixtral", "Qwen2Moe", "GptOss")  # what a row gets rounds with the number of rows
SANDWICH = ("Gemma2", "Gemma3", "Gemma3Multimodal", "Olmo2")
families = pytest.mark.parametrize(
    "name", [n if n in DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES]
)
ROWS, WIDTH = 2, 8


def off(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max()) if a.shape == b.shape else float("inf")


@functools.cache
def parts(name: str) -> EdgeModel:
    found = EdgeModel(manager(name))
    found.check(manager(name).to_tokens(tokens(ROWS, WIDTH)))
    return found


@functools.cache
def other(name: str) -> Run:
    """The corrupted run: everything that an edge may carry, and what the laws are held against."""
    hm = manager(name)
    kinds = [f"{layer}.{kind}" for layer in range(hm.n_layers) for kind in ("q", "k", "v")]
    return hm.run(tokens(ROWS, WIDTH, seed=1), read=[*parts(name).reads, *kinds], logits="all")


def logits(name: str, removed: Tensor) -> Tensor:
    """The logits of the clean tokens with edges removed [circuit sender receiver], circuit by circuit."""
    model, carried = parts(name), other(name)
    one = EdgePass(model, removed, {site: carried[site] for site in model.reads}, ROWS)
    out = manager(name).run(tokens(ROWS, WIDTH).repeat(len(removed), 1), write=one.edits(), logits="all")
    return out.logits.unflatten(0, (len(removed), ROWS))


def into(graph: Graph, receiver: str) -> Tensor:
    mask = torch.zeros_like(graph.allowed)
    mask[:, graph.receiver(receiver)] = True
    return mask & graph.allowed


def out_of(graph: Graph, sender: str) -> Tensor:
    mask = torch.zeros_like(graph.allowed)
    mask[graph.sender(sender)] = True
    return mask & graph.allowed


@families
def test_no_edge_is_the_other_run_and_every_edge_the_clean_one(name: str) -> None:
    graph = parts(name).graph
    clean = manager(name).run(tokens(ROWS, WIDTH)).logits
    half = graph.allowed & (torch.rand(graph.allowed.shape) < 0.5)
    nothing = torch.zeros_like(graph.allowed)
    empty, some, full, again = logits(name, torch.stack([graph.allowed, half, nothing, graph.allowed]))
    assert off(empty, other(name).logits) < TOLERANCE and off(full, clean) < TOLERANCE
    assert off(again, empty) < TOLERANCE, "circuits do not see each other"
    assert off(some, logits(name, half[None])[0]) < TOLERANCE, "nor the batch they are in"
    assert off(some, clean) > 1e-2 and off(some, empty) > 1e-2


@families
def test_every_edge_into_a_receiver_is_that_receiver_from_the_other_run(name: str) -> None:
    hm, graph, carried = manager(name), parts(name).graph, other(name)
    last = hm.n_layers - 1
    heads = {"q": 1, "k": hm.n_kv_heads - 1, "v": hm.n_kv_heads - 1}
    cases = [(f"a{last}.h{h}<{kind}>", f"{last}.{kind}", Where(head=h)) for kind, h in heads.items()]
    cases += [("a0.h0<v>", "0.v", Where(head=0)), (f"m{last}", f"{last}.mlp_out", Where())]
    found = logits(name, torch.stack([into(graph, receiver) for receiver, _, _ in cases]))
    for one, (receiver, site, where) in zip(found, cases, strict=True):
        value = carried[site]
        wanted = hm.run(tokens(ROWS, WIDTH), write=[Replace(site, value, where=where)]).logits
        assert off(one, wanted) < TOLERANCE, receiver
    whole = logits(name, into(graph, "logits")[None])[0]
    assert off(whole, carried.logits) < TOLERANCE


@families
def test_every_edge_out_of_a_node_is_that_node_patched(name: str) -> None:
    hm, graph, carried = manager(name), parts(name).graph, other(name)
    cases = [("m0", "0.mlp_out", Where()), ("input", "0.resid_pre", Where())]
    if name not in SANDWICH:  # there σ after the heads would change with the head
        cases += [("a0.h1", "0.z", Where(head=1)), (f"a{hm.n_layers - 1}.h0", f"{hm.n_layers - 1}.z", Where(head=0))]
    found = logits(name, torch.stack([out_of(graph, sender) for sender, _, _ in cases]))
    for one, (sender, site, where) in zip(found, cases, strict=True):
        wanted = hm.run(tokens(ROWS, WIDTH), write=[Replace(site, carried[site], where=where)]).logits
        assert off(one, wanted) < (3 if name in MIXTURES else 1) * TOLERANCE, sender


# -- an independent oracle: loops over heads --------------------------------------------------------------------------

Wrote = dict[str, Tensor]
Removed = set[tuple[str, str]]


class Loops:
    """A model written out head by head, each of its q, k and v reading a sum of its own."""

    def __init__(self, name: str) -> None:
        self.model: Any = make(name)
        self.config = self.model.config

    def run(self, ids: Tensor, carried: Wrote | None = None, removed: Removed | None = None) -> tuple[Tensor, Wrote]:
        wrote, constant = {"input": self.embed(ids)}, torch.zeros(())
        cut = removed or set()

        def read(receiver: str) -> Tensor:
            total = constant
            for sender, value in wrote.items():
                if (sender, receiver) in cut:
                    assert carried is not None
                    value = carried[sender]
                total = total + value
            return total

        for layer in range(self.config.num_hidden_layers):
            heads = {f"a{layer}.h{h}": self.head(layer, h, read) for h in range(self.config.num_attention_heads)}
            wrote.update(heads)
            constant = constant + self.bias(layer)
            wrote[f"m{layer}"] = self.mlp(layer, read(f"m{layer}"))
        return self.unembed(read("logits")), wrote

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[1]
        scores = (q @ k.transpose(1, 2)) / q.shape[-1] ** 0.5
        return scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1) @ v

    embed: Callable[[Tensor], Tensor]
    head: Callable[[int, int, Callable[[str], Tensor]], Tensor]
    bias: Callable[[int], Tensor]
    mlp: Callable[[int, Tensor], Tensor]
    unembed: Callable[[Tensor], Tensor]


class GPT2Loops(Loops):
    def embed(self, ids: Tensor) -> Tensor:
        t = self.model.transformer
        return t.wte(ids) + t.wpe(torch.arange(ids.shape[1]))

    def head(self, layer: int, h: int, read: Callable[[str], Tensor]) -> Tensor:
        block = self.model.transformer.h[layer]
        d, w = self.config.n_embd, self.config.n_embd // self.config.n_head
        made = []
        for i, kind in enumerate("qkv"):
            columns = slice(i * d + h * w, i * d + (h + 1) * w)
            x = block.ln_1(read(f"a{layer}.h{h}<{kind}>"))
            made.append(x @ block.attn.c_attn.weight[:, columns] + block.attn.c_attn.bias[columns])
        return self.attend(*made) @ block.attn.c_proj.weight[h * w : (h + 1) * w]

    def bias(self, layer: int) -> Tensor:
        return self.model.transformer.h[layer].attn.c_proj.bias

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        block = self.model.transformer.h[layer]
        return block.mlp(block.ln_2(x))

    def unembed(self, x: Tensor) -> Tensor:
        return self.model.lm_head(self.model.transformer.ln_f(x))


class LlamaLoops(Loops):
    def embed(self, ids: Tensor) -> Tensor:
        return self.model.model.embed_tokens(ids)

    def head(self, layer: int, h: int, read: Callable[[str], Tensor]) -> Tensor:
        block, c = self.model.model.layers[layer], self.config
        w, attn = c.hidden_size // c.num_attention_heads, block.self_attn
        group = h // (c.num_attention_heads // c.num_key_value_heads)
        made = []
        for kind, at in (("q", h), ("k", group), ("v", group)):
            x = block.input_layernorm(read(f"a{layer}.h{at}<{kind}>"))
            made.append(x @ getattr(attn, f"{kind}_proj").weight[at * w : (at + 1) * w].T)
        q, k, v = made
        return self.attend(self.turned(q), self.turned(k), v) @ attn.o_proj.weight[:, h * w : (h + 1) * w].T

    def turned(self, x: Tensor) -> Tensor:
        """Rotary positions in complex numbers: pair (i, i + w/2) of position p is turned by p θ^(−2i/w)."""
        half = x.shape[-1] // 2
        speed = 10_000.0 ** (-torch.arange(half) / half)
        turn = torch.polar(torch.ones(()), torch.arange(x.shape[1])[:, None] * speed)
        z = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat([z.real, z.imag], -1)

    def bias(self, layer: int) -> Tensor:
        return torch.zeros(())

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        block = self.model.model.layers[layer]
        return block.mlp(block.post_attention_layernorm(x))

    def unembed(self, x: Tensor) -> Tensor:
        return self.model.lm_head(self.model.model.norm(x))


ORACLES = {"GPT2": GPT2Loops, "Llama": LlamaLoops}


@pytest.mark.parametrize("name", list(ORACLES))
def test_one_removed_edge_is_that_path_patched_by_hand(name: str) -> None:
    loops, graph = ORACLES[name](name), parts(name).graph
    with torch.no_grad():
        plain, _ = loops.run(tokens(ROWS, WIDTH))
        _, carried = loops.run(tokens(ROWS, WIDTH, seed=1))
        assert off(plain, manager(name).run(tokens(ROWS, WIDTH)).logits) < BY_HAND, "the oracle is the model"
        places = graph.allowed.nonzero().tolist()
        chosen = [places[i] for i in torch.randperm(len(places))[:24].tolist()]
        masks = torch.zeros(len(chosen), *graph.allowed.shape, dtype=torch.bool)
        for i, (row, column) in enumerate(chosen):
            masks[i, row, column] = True
        found, moved = logits(name, masks), []
        for (row, column), one in zip(chosen, found, strict=True):
            edge = (graph.senders[row].name, graph.receivers[column].name)
            wanted, _ = loops.run(tokens(ROWS, WIDTH), carried, {edge})
            assert off(one, wanted) < BY_HAND, edge
            moved.append(off(one, plain))
        assert sum(m > 100 * BY_HAND for m in moved) > 18, "edges that do nothing would show no mistake"


@pytest.mark.parametrize("name", list(ORACLES))
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_any_set_of_removed_edges_is_what_the_loops_make_of_it(name: str, share: float) -> None:
    loops, graph = ORACLES[name](name), parts(name).graph
    removed = graph.allowed & (torch.rand(3, *graph.allowed.shape) < share)
    with torch.no_grad():
        _, carried = loops.run(tokens(ROWS, WIDTH, seed=1))
        for one, mask in zip(logits(name, removed), removed, strict=True):
            cut = {(graph.senders[r].name, graph.receivers[c].name) for r, c in mask.nonzero().tolist()}
            assert off(one, loops.run(tokens(ROWS, WIDTH), carried, cut)[0]) < BY_HAND


# -- runs over pairs --------------------------------------------------------------------------------------------------


def pairs(name: str, rows: int = 4) -> PairTokens:
    answers = torch.arange(1, rows + 1)
    made = PairTokens.of_ids(tokens(rows, WIDTH), tokens(rows, WIDTH, seed=1), answers, answers + 10)
    return replace(made, meta=tuple({"template": "abb"[i % 3]} for i in range(rows)))


def some_circuits(graph: Graph, n: int = 5) -> list[Circuit]:
    return [Circuit(graph, graph.allowed & (torch.rand(graph.allowed.shape) < 0.2 * i)) for i in range(1, n + 1)]


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_values_do_not_depend_on_how_the_work_is_cut(ablation: str) -> None:
    hm, held = manager("Llama"), pairs("Llama")
    whole = CircuitRuns(hm, held, ablation=ablation)
    circuits = some_circuits(whole.graph, 3)
    wanted = whole.values(circuits)
    for size, most in ((3, 1), (None, 200_000)):
        cut = CircuitRuns(hm, held, ablation=EdgeAblation(ablation, batch_size=size, max_bytes=most))
        assert off(cut.values(circuits), wanted) < TOLERANCE
    assert float((wanted[0] - wanted[-1]).abs().max()) > 1e-2


def test_the_ends_are_the_clean_and_the_corrupted_run() -> None:
    hm, held = manager("GPT2"), pairs("GPT2")
    runs = CircuitRuns(hm, held)
    for tokens_, found in ((held.clean, runs.clean), (held.corrupted, runs.empty)):
        assert off(found, held.logit_diff(hm.run(tokens_, logits="last"))) < TOLERANCE
    full, empty = runs.values([Circuit.full(runs.graph), Circuit.empty(runs.graph)])
    assert torch.equal(full, runs.clean) and off(empty, runs.empty) < TOLERANCE
    same = CircuitRuns(hm, PairTokens.of_ids(held.clean.ids, held.clean.ids, torch.arange(1, 5), torch.arange(11, 15)))
    assert off(same.values(some_circuits(same.graph)), same.clean.expand(5, -1)) < TOLERANCE, "nothing to carry"


@pytest.mark.parametrize("name", ["GPT2", "Llama"])
def test_pads_change_nothing(name: str) -> None:
    hm = manager(name)
    clean, corrupted = tokens(2, 10), tokens(2, 10, seed=1)
    alone = [
        PairTokens.of_ids(c[:1, :6], x[:1, :6], torch.tensor([5]), torch.tensor([7])) for c, x in ((clean, corrupted),)
    ]
    for ablation in ("patching", "zero", "mean_positional"):
        wanted = CircuitRuns(hm, alone[0], ablation=ablation)
        circuits = some_circuits(wanted.graph, 3)
        values = wanted.values(circuits)[:, 0]
        for (_, a, mask), (_, b, _) in zip(paddings(clean), paddings(corrupted), strict=True):
            both = torch.tensor([5, 5]), torch.tensor([7, 7])
            padded = PairTokens.of_ids(Tokens(a, mask), Tokens(b, mask), *both)
            found = CircuitRuns(hm, padded, ablation=ablation).values(circuits)[:, 0]
            if ablation != "mean_positional":  # there the other row has a part in the mean
                assert off(found, values) < 1e-4


def test_means_are_by_template_and_position() -> None:
    hm = manager("GPT2")
    held = pairs("GPT2", 6)
    meta = tuple({"template": "ab"[i % 2]} for i in range(6))
    made = PairTokens(held.clean, held.corrupted, held.answers, held.foils, meta=meta)
    runs = CircuitRuns(hm, made, ablation="mean")
    carried = runs._carries(made.clean, made.corrupted, range(6))
    z = hm.run(made.corrupted, read=["1.z"])["1.z"]
    assert (
        off(carried["1.z"][0], z[[0, 2, 4]].mean(0)) < TOLERANCE
        and off(carried["1.z"][3], z[[1, 3, 5]].mean(0)) < TOLERANCE
    )
    flat = CircuitRuns(hm, made, ablation="mean_positional")._carries(made.clean, made.corrupted, range(6))
    assert off(flat["1.z"][1], z.mean(0)) < TOLERANCE
    # One prompt per template is its own mean: patching.
    each = tuple({"template": i} for i in range(6))
    alone = PairTokens(held.clean, held.corrupted, held.answers, held.foils, meta=each)
    circuits = some_circuits(runs.graph, 3)
    patched = CircuitRuns(hm, alone).values(circuits)
    assert off(CircuitRuns(hm, alone, ablation="mean").values(circuits), patched) < TOLERANCE
    assert off(runs.values(circuits), patched) > 1e-2


def test_means_of_heads_before_a_norm_are_means_of_what_they_write() -> None:
    hm, held = manager("Gemma2"), pairs("Gemma2")
    runs = CircuitRuns(hm, held, ablation="mean_positional")
    carried = runs._carries(held.clean, held.corrupted, range(4))
    out = hm.run(held.corrupted, read=["*.z", "*.ln1_post.scale"])
    whole = out.stack_head_results(1).terms[:4]
    assert "0.z" not in carried and off(carried["0.heads"][2].movedim(1, 0), whole.mean(1)) < TOLERANCE


def test_zero_ablation_of_a_node_is_its_activation_set_to_zero() -> None:
    hm, held = manager("Llama"), pairs("Llama")
    runs = CircuitRuns(hm, held, ablation="zero")
    for node, site, where in (("a1.h2", "1.z", Where(head=2)), ("m0", "0.mlp_out", Where())):
        found = runs.values([~Circuit(runs.graph, out_of(runs.graph, node))])[0]
        zeros = torch.zeros(hm.atlas.shape(hm.atlas.expand(site)[0])[2:])
        wanted = held.logit_diff(hm.run(held.clean, write=[Replace(site, zeros, where=where)], logits="last"))
        assert off(found, wanted) < TOLERANCE


def test_effects_of_edges_are_what_each_costs() -> None:
    hm, held = manager("GPT2"), pairs("GPT2", 2)
    runs = CircuitRuns(hm, held)
    circuit = some_circuits(runs.graph, 3)[-1]
    asked = torch.zeros_like(runs.graph.allowed)
    asked[:, 5] = asked[3] = True
    found = edge_effects(runs, circuit, edges=asked)
    known = ~found.isnan()
    assert torch.equal(known, circuit.edges & asked) and bool(known.any())
    for row, column in known.nonzero().tolist()[:5]:
        name = f"{runs.graph.senders[row].name}->{runs.graph.receivers[column].name}"
        pair = runs.values([circuit, circuit - Circuit.of(runs.graph, [name])]).mean(1)
        assert float(found[row, column]) == pytest.approx(float(pair[0] - pair[1]), abs=1e-5)


def test_other_metrics_are_measured_on_the_same_run() -> None:
    hm, held = manager("GPT2"), pairs("GPT2")
    kl = CircuitRuns(hm, held, metric="kl", ablation=EdgeAblation(batch_size=3))
    assert off(kl.clean, torch.zeros(4)) < TOLERANCE and float(kl.empty.min()) > 0.1
    p = hm.run(held.clean, logits="last").logits[:, 0].log_softmax(-1)
    q = hm.run(held.corrupted, logits="last").logits[:, 0].log_softmax(-1)
    assert off(kl.empty, (p.exp() * (p - q)).sum(-1)) < 1e-4, "summed over the vocabulary"
    custom = held.metric("log_prob")
    assert off(CircuitRuns(hm, held, metric=custom).clean, custom(hm.run(held.clean))) < TOLERANCE


def test_no_hook_stays_and_nothing_is_changed() -> None:
    hm, held = manager("GPT2"), pairs("GPT2")
    before = hm.run(held.clean).logits
    runs = CircuitRuns(hm, held)
    runs.values(some_circuits(runs.graph))
    assert torch.equal(hm.run(held.clean).logits, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in hm.model.modules())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_is_refused_with_the_reason() -> None:
    hm, held = manager("GPT2"), pairs("GPT2")
    runs = CircuitRuns(hm, held)
    with pytest.raises(ShapeError, match="another shape"):
        runs.values([Circuit.full(Graph(2, 4, 4, (True, True)))])
    with pytest.raises(ShapeError, match="True and False"):
        runs.values([torch.ones(3, 3)])
    with pytest.raises(ShapeError, match="True and False"):
        edge_effects(runs, edges=torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(ShapeError, match="another shape"):
        edge_effects(runs, Circuit.full(Graph(2, 4, 4, (True, True))))
    with pytest.raises(DataError, match="by a name or a Metric"):
        CircuitRuns(hm, held, metric=lambda out: out.logits[:, 0, 0])  # type: ignore[arg-type]
    with pytest.raises(DataError, match="Tensor is no Circuit"):
        evaluate_circuits(hm, held, runs.graph.allowed)  # type: ignore[arg-type]
    for fractions in ([], [0.5], [0.5, 0.1], "x"):
        with pytest.raises(DataError, match="fractions"):
            circuit_curve(hm, held, torch.zeros(runs.graph.allowed.shape), fractions=fractions)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="did you mean 'patching'"):
        CircuitRuns(hm, held, ablation="patch")
    with pytest.raises(DataError, match="pair 0 says none"):
        CircuitRuns(hm, replace(held, meta=()), ablation="mean")
    with pytest.raises(DataError, match="batch_size"):
        EdgeAblation(batch_size=0)
    with pytest.raises(ShapeError, match="4 pairs"):
        CircuitRuns(hm, pairs("GPT2", 3), metric=held.metric())
    short = Tokens(held.corrupted.ids, torch.arange(WIDTH)[None] < torch.tensor([WIDTH, WIDTH, WIDTH, 5])[:, None])
    uneven = PairTokens.of_ids(held.clean, short, torch.arange(1, 5), torch.arange(11, 15))
    with pytest.raises(DataError, match=r"pair 3 differ in length, 8 and 5"):
        CircuitRuns(hm, uneven)
    with pytest.raises(DataError, match="no corrupted prompt"):
        runs = CircuitRuns(
            hm,
            PairTokens.of_ids(held.clean, held.corrupted.ids[:, :5], torch.arange(1, 5), torch.arange(11, 15)),
            ablation="mean_positional",
        )
        runs.values(some_circuits(runs.graph, 1))


def test_a_model_whose_heads_read_something_else_is_refused_by_name() -> None:
    options = NanoOptions(d_vocab=20, d_model=8, n_heads=2, n_layers=1, d_mlp=0, norm="none", positions="shortformer")
    hm = HookManager.load(nano(options, seed=1))
    with torch.no_grad():
        for parameter in hm.model.parameters():
            parameter.normal_()
    held = PairTokens.of_ids(torch.arange(1, 7)[None], torch.arange(2, 8)[None], torch.tensor([1]), torch.tensor([2]))
    with pytest.raises(ModelError, match=r"interp_nano computes 0\.q otherwise"):
        CircuitRuns(hm, held)
