"""Circuits on models whose edges are known: an induction model set by hand, a trained one, and the testbed."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import interp
from interp.core.errors import DataError
from interp.core.manager import HookManager
from interp.core.result import Result
from interp.data.pair_tokens import PairTokens
from interp.patching.circuits.circuit import Circuit
from interp.patching.circuits.circuit_curve import CircuitCurve, circuit_curve
from interp.patching.circuits.compare_circuits import compare
from interp.patching.circuits.evaluate_circuit import CircuitRuns, edge_effects
from interp.patching.circuits.faithfulness import evaluate_circuits
from interp.patching.circuits.knockouts import completeness, minimality
from interp.patching.circuits.select_edges import greedy_edges, random_like, top_edges
from interp.patching.graph import Graph
from interp.testbed.nano import NanoOptions, nano
from interp.testbed.tasks import task_pairs

pytestmark = pytest.mark.model

VOCAB, WIDTH, SURE = 16, 10, 30.0
INDUCTION = ("input->a0.h0<v>", "a0.h0->a1.h0<k>", "input->a1.h0<q>", "input->a1.h0<v>", "a1.h0->logits")
BY_POSITION = ("input->a0.h0<q>", "input->a0.h0<k>")


def place(matrix: Tensor, row: int, column: int, scale: float = 1.0, n: int = VOCAB) -> None:
    """Copy n coordinates that begin at a column to those that begin at a row; matrix is [out in]."""
    matrix[range(row, row + n), range(column, column + n)] = scale


@functools.cache
def by_hand() -> HookManager:
    """Two layers of attention that do induction, head 0 of each; head 1 of each writes what nobody reads.

    The stream holds the token (one-hot), the position (one-hot), the token before it, the answer, and waste.
    """
    token, pos, before, answer, waste = 0, VOCAB, VOCAB + WIDTH, 2 * VOCAB + WIDTH, 3 * VOCAB + WIDTH
    options = NanoOptions(
        d_vocab=VOCAB,
        n_ctx=WIDTH,
        n_layers=2,
        d_model=4 * VOCAB + WIDTH,
        n_heads=2,
        d_head=VOCAB,
        d_mlp=0,
        norm="none",
        bias=False,
        attention_scale=1.0,
    )
    model: Any = nano(options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        place(model.model.embed_tokens.weight.T, token, 0)
        place(model.model.embed_positions.weight.T, pos, 0, n=WIDTH)
        first, second = (layer.self_attn for layer in model.model.layers)
        # Layer 0: position p asks for position p − 1; the value is the token, written as "the token before".
        place(first.q_proj.weight, 0, pos + 1, SURE, WIDTH - 1)
        place(first.k_proj.weight, 0, pos, 1.0, WIDTH)
        place(first.v_proj.weight, 0, token)
        place(first.o_proj.weight, before, 0)
        # Layer 1: a token asks for a position whose token before it is the same; the value is the token there.
        place(second.q_proj.weight, 0, token, SURE)
        place(second.k_proj.weight, 0, before)
        place(second.v_proj.weight, 0, token)
        place(second.o_proj.weight, answer, 0, 5.0)
        for attention in (first, second):
            attention.v_proj.weight[VOCAB:, token : token + VOCAB] = torch.randn(VOCAB, VOCAB)
            place(attention.o_proj.weight, waste, VOCAB)
        place(model.lm_head.weight, 0, answer)
    return HookManager.load(model)


def repeats(n: int, seed: int = 0, *, vocab: int = VOCAB, width: int = WIDTH) -> PairTokens:
    """Different tokens, then one of them again; the answer is what came after it.

    The corrupted row has other tokens everywhere, and repeats that of another position: with the same one its queries
    and keys together would find the right place.
    """
    draw = torch.Generator().manual_seed(seed)
    clean = torch.stack([torch.randperm(vocab, generator=draw)[:width] for _ in range(n)])
    corrupted = torch.stack([torch.randperm(vocab, generator=draw)[:width] for _ in range(n)])
    rows, (at, other) = torch.arange(n), torch.rand(n, width - 4, generator=draw).argsort(1)[:, :2].T + 1
    for side, where in ((clean, at), (corrupted, other)):
        side[:, -1] = side[rows, where]
    answers, foils = clean[rows, at + 1], corrupted[rows, other + 1]
    keep = (answers != foils) & (clean != corrupted).all(1)
    return PairTokens.of_ids(clean[keep], corrupted[keep], answers[keep], foils[keep], name="repeats")


@functools.cache
def runs(ablation: str = "patching") -> CircuitRuns:
    return CircuitRuns(by_hand(), repeats(200), ablation=ablation)


def known(graph: Graph) -> Circuit:
    return Circuit.of(graph, [*INDUCTION, *BY_POSITION], name="induction")


def test_the_model_set_by_hand_does_induction() -> None:
    held = repeats(200)
    out = by_hand().run(held.clean)
    assert len(held) > 50 and torch.equal(out.logits[:, -1].argmax(-1), held.answer_ids[:, 0])
    assert float(runs().clean.min()) > 4.9 and float(runs().empty.max()) < -4.9


def test_each_known_edge_is_needed_and_no_other_does_anything() -> None:
    effects = edge_effects(runs())
    graph = runs().graph
    needed = graph.mask(list(INDUCTION))
    assert float(effects[needed].min()) > 1.0, "each loses at least a tenth of the gap of 10"
    assert float(effects[graph.allowed & ~needed].abs().max()) < 1e-4
    found = top_edges(graph, effects, len(INDUCTION))
    assert not found.n_edges or set(found.names()) <= set(INDUCTION)
    # What reads positions alone is the same on both prompts; without it nothing leads to head a0.h0's queries, and yet
    # the five edges are a path from the input to the logits.
    assert found == Circuit.of(graph, INDUCTION)


def test_under_zero_ablation_the_positions_are_needed_too() -> None:
    effects = edge_effects(runs("zero"))
    graph = runs("zero").graph
    wanted = known(graph)
    assert set(top_edges(graph, effects, 7, absolute=False).names()) == set(wanted.names())
    assert float(effects[graph.allowed & ~wanted.edges].abs().max()) < 1e-4


def test_the_known_circuit_is_the_model_and_its_rest_is_nothing() -> None:
    hm, held = by_hand(), repeats(200)
    circuit = known(runs().graph)
    rest, none = ~circuit, Circuit.empty(circuit.graph)
    five = Circuit.of(circuit.graph, INDUCTION, name="five edges")
    found = evaluate_circuits(hm, held, [circuit, five, rest, none, circuit - Circuit.of(circuit.graph, INDUCTION[:1])])
    assert found.faithfulness[:4].tolist() == pytest.approx([1.0, 1.0, 0.0, 0.0], abs=1e-5)
    assert float(found.faithfulness[4]) < 0.9
    low, high = found.bounds()
    assert float(high[0] - low[0]) < 1e-5 and "faithfulness 1.000" in found.summary()
    whole = completeness(hm, held, five, n_knockouts=6, seed=1)
    assert abs(whole.rest_faithfulness) < 1e-5 and float(whole.incompleteness.max()) < 1e-5
    partial = completeness(hm, held, Circuit.of(circuit.graph, ["input->logits"]), n_knockouts=2)
    assert partial.rest_faithfulness == pytest.approx(1.0, abs=1e-5), (
        "a circuit that does nothing leaves the model whole"
    )


def test_minimality_finds_what_is_idle() -> None:
    hm, held = by_hand(), repeats(100)
    graph = runs().graph
    padded = known(graph) | Circuit.of(graph, ["input->a1.h1<v>", "a1.h1->logits"])
    edges = minimality(hm, held, padded, by="edge")
    assert set(edges.useless()) == {*BY_POSITION, "input->a1.h1<v>", "a1.h1->logits"}
    nodes = minimality(hm, held, padded)
    assert nodes.useless() == ["a1.h1"] and nodes.gap == pytest.approx(10.0, abs=0.1)
    with pytest.raises(DataError, match="'node' or 'edge'"):
        minimality(hm, held, padded, by="head")


def test_the_curve_of_true_scores_is_whole_at_five_edges_and_that_of_noise_is_not() -> None:
    hm, held = by_hand(), repeats(100, seed=1)
    graph = runs().graph
    effects = edge_effects(runs())
    share = 5 / graph.n_edges
    found = circuit_curve(hm, held, effects, fractions=(share / 2, share, 0.5, 1.0), n_random=4)
    assert found.n_edges[1] == 5 and found.smallest() == pytest.approx(share)
    assert found.faithfulness[0, 1:].tolist() == pytest.approx([1.0, 1.0, 1.0], abs=1e-5)
    assert float(found.faithfulness[0, 0]) < 0.8, "two of five edges are not enough"
    assert found.cmd() < 0.1 and float(found.random_faithfulness[:, 1].max()) < 0.5
    harmful = effects.clone()
    harmful[graph.edge("input->logits")] = -100.0
    both = circuit_curve(hm, held, harmful, fractions=(share, 1.0), n_random=0)
    assert float(both.faithfulness[1, 0]) == pytest.approx(1.0, abs=1e-5), "signed ranks an edge that hurts last"
    assert float(both.faithfulness[0, 0]) < 0.9, "absolute takes it first"
    noise = circuit_curve(hm, held, torch.randn(graph.allowed.shape), fractions=(share, 0.5, 1.0), n_random=1)
    assert noise.cmd() > found.cmd() + 0.2
    reference = Circuit.of(graph, INDUCTION)
    assert compare(effects, reference).edge_auroc == 1.0 and compare(found_top(effects), reference).node_jaccard == 1.0


def found_top(effects: Tensor) -> Circuit:
    return top_edges(runs().graph, effects, 5)


# -- the testbed ------------------------------------------------------------------------------------------------------


@functools.cache
def world() -> HookManager:
    return interp.HookManager.load("testbed")


@functools.cache
def world_effects() -> Tensor:
    """Effects of the edges into two receivers and of a sample of the others, on a few pairs."""
    measured = CircuitRuns(world(), task_pairs("ioi", 4))
    return edge_effects(measured, progress=False)


@pytest.mark.slow
def test_on_the_testbed_a_tenth_of_the_edges_does_the_task(tmp_path: Path) -> None:
    hm, held = world(), task_pairs("ioi", 24, seed=1)
    effects = world_effects()
    found = circuit_curve(hm, held, effects, n_random=2)
    assert found.smallest() <= 0.1 and found.cmd() < 0.06 < 0.5 < found.areas()["random"]["cmd_nominal"]
    found.save(tmp_path / "curve")
    back = Result.load(tmp_path / "curve")
    assert isinstance(back, CircuitCurve) and back.areas() == found.areas()
    page = found.to_html(tmp_path / "curve.html")
    assert "Faithfulness by circuit size" in page.read_text()
    graph = CircuitRuns(hm, held).graph
    best, greedy = top_edges(graph, effects, 40), greedy_edges(graph, effects, 40)
    scores = evaluate_circuits(hm, held, [best, greedy, random_like(best), ~best])
    assert float(scores.faithfulness[0]) > 0.9 and float(scores.faithfulness[1]) > 0.9
    assert float(scores.faithfulness[2]) < 0.8 and float(scores.faithfulness[3]) < 0.1
    kl = evaluate_circuits(hm, held, [best], metric="kl")
    assert float(kl.faithfulness[0]) > 0.8


def test_every_ablation_leaves_the_testbed_whole_with_all_edges_and_lost_with_none() -> None:
    hm, held = world(), task_pairs("ioi", 12)
    for ablation in ("patching", "zero", "mean", "mean_positional"):
        found = CircuitRuns(hm, held, ablation=ablation)
        assert torch.equal(found.values([Circuit.full(found.graph)])[0], found.clean)
        assert float(found.empty.mean()) < 0.5 * float(found.clean.mean())


# -- a trained one ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_in_a_trained_model_the_edges_of_induction_are_the_largest() -> None:
    hm = HookManager.load(trained())
    measured = CircuitRuns(hm, repeats(300, seed=9, vocab=40, width=16))
    assert float((measured.clean > 0).float().mean()) > 0.98, "it does induction"
    graph, effects = measured.graph, edge_effects(measured, progress=False)
    gap = float(measured.clean.mean() - measured.empty.mean())
    # Heads by what they attend to: the token before; and the logits' own readers.
    pattern = hm.run(measured.pairs.clean, read=["0.pattern"])["0.pattern"]
    before = pattern.diagonal(offset=-1, dim1=2, dim2=3).mean((0, 2))
    previous = f"a0.h{int(before.argmax())}"
    readers = [f"a1.h{h}" for h in range(2) if float(effects[graph.edge(f"a1.h{h}->logits")]) > 0.1 * gap]
    wanted = [f"input->{previous}<v>"]
    wanted += [
        edge.format(head=head, previous=previous)
        for head in readers
        for edge in ("{previous}->{head}<k>", "input->{head}<q>", "input->{head}<v>", "{head}->logits")
    ]
    reference = Circuit.of(graph, wanted)
    assert float(before.max()) > 0.9 and readers
    assert float(effects[reference.edges].min()) > 0.05 * gap
    assert float(effects[graph.allowed & ~reference.edges].abs().max()) < 0.02 * gap
    assert compare(effects, reference).edge_auroc == 1.0
    assert float(evaluate_circuits(hm, measured.pairs, reference).faithfulness) > 0.95


def trained() -> torch.nn.Module:
    """Two layers of attention, trained for half a minute on random tokens that repeat."""
    torch.manual_seed(0)
    options = NanoOptions(d_vocab=40, n_ctx=32, n_layers=2, d_model=64, n_heads=2, d_mlp=0, norm="layer")
    model = nano(options, seed=0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01, betas=(0.9, 0.98))
    draw = torch.Generator().manual_seed(0)
    for step in range(600):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 50)
        period = int(torch.randint(5, 16, (1,), generator=draw))
        part = torch.stack([torch.randperm(40, generator=draw)[:period] for _ in range(64)])
        ids = part.repeat(1, 7)[:, :32]
        logits = model(ids).logits[:, period:-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, period + 1 :].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()
