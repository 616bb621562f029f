"""Circuits as sets of edges: pruning, selection, files, published circuits, comparison, areas."""

import json
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from interp.core.errors import ArtifactError, DataError, InterpError, ShapeError, SiteError
from interp.core.fit import auroc
from interp.core.resources import resource
from interp.core.result import Provenance, Result
from interp.patching.circuits import build_references
from interp.patching.circuits.circuit import Circuit, reachable
from interp.patching.circuits.circuit_curve import CircuitCurve, curve_area
from interp.patching.circuits.circuit_files import load_eap_ig, write_eap_ig, write_graphml
from interp.patching.circuits.compare_circuits import compare
from interp.patching.circuits.faithfulness import CircuitScores, faithfulness, faithfulness_bounds, gap_is_clear
from interp.patching.circuits.reference import reference_circuit, reference_names
from interp.patching.circuits.select_edges import (
    counts_of,
    edge_order,
    edges_above,
    greedy_edges,
    random_edges,
    random_like,
    top_edges,
    top_nodes,
)
from interp.patching.graph import Graph

GRAPHS = {
    "plain": Graph(3, 2, 2, (True, True, True)),
    "grouped": Graph(2, 4, 2, (True, True)),
    "parallel": Graph(2, 2, 2, (True, True), parallel=True),
    "attention only": Graph(3, 2, 1, (False, False, False)),
}
each_graph = pytest.mark.parametrize("graph", list(GRAPHS.values()), ids=list(GRAPHS))


def drawn(graph: Graph, share: float, seed: int) -> Tensor:
    coin = torch.rand(graph.allowed.shape, generator=torch.Generator().manual_seed(seed))
    return graph.allowed & (coin < share)


def scored(graph: Graph, seed: int = 0) -> Tensor:
    return torch.randn(graph.allowed.shape, generator=torch.Generator().manual_seed(seed))


def paths(graph: Graph, edges: Tensor) -> set[tuple[int, int]]:
    """The edges of every path from the input to the logits, walked one by one."""
    last = len(graph.receivers) - 1
    found: set[tuple[int, int]] = set()

    def walk(sender: int, trail: tuple[tuple[int, int], ...]) -> None:
        for receiver in edges[sender].nonzero().flatten().tolist():
            here = (*trail, (sender, receiver))
            if receiver == last:
                found.update(here)
            for after in range(len(graph.senders)):
                if receiver in graph.inputs_of(after).tolist():
                    walk(after, here)

    walk(0, ())
    return found


@each_graph
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_pruning_keeps_the_edges_of_paths_from_input_to_logits_and_no_other(graph: Graph, share: float) -> None:
    for seed in range(4):
        edges = drawn(graph, share, seed)
        kept = reachable(graph, edges)
        assert {(r, c) for r, c in kept.nonzero().tolist()} == paths(graph, edges)
        pruned = Circuit(graph, edges).pruned()
        assert torch.equal(pruned.edges, kept) and pruned.pruned() == pruned


@each_graph
def test_feeds_is_the_other_side_of_inputs_of(graph: Graph) -> None:
    for row in range(len(graph.senders)):
        assert graph.feeds[:, row].nonzero().flatten().tolist() == sorted(graph.inputs_of(row).tolist())


def test_the_whole_model_has_no_dead_end_and_the_empty_circuit_no_node() -> None:
    for graph in GRAPHS.values():
        whole = Circuit.full(graph)
        assert whole.pruned() == whole and whole.share == 1.0
        assert whole.nodes == (*(n.name for n in graph.senders), "logits")
        assert Circuit.empty(graph).nodes == () and not Circuit.empty(graph).n_edges


def test_circuits_are_sets_of_edges() -> None:
    graph = GRAPHS["plain"]
    a, b = Circuit(graph, drawn(graph, 0.4, 0), "a"), Circuit(graph, drawn(graph, 0.4, 1), "b")
    ours, theirs = set(a.names()), set(b.names())
    sets = ((a | b, ours | theirs), (a & b, ours & theirs), (a - b, ours - theirs), (a ^ b, ours ^ theirs))
    for made, wanted in sets:
        assert set(made.names()) == wanted
    assert (~a).n_edges + a.n_edges == graph.n_edges and not (~a & a).n_edges
    assert a <= (a | b) and not (a | b) <= a
    assert len({a, Circuit(graph, a.edges.clone(), "another name"), b}) == 2
    assert a.names()[0] in a and not any(name in a for name in (~a).names())
    with pytest.raises(DataError, match="different shapes"):
        a | Circuit.full(GRAPHS["parallel"])


def test_nodes_of_a_circuit_and_what_is_left_without_one() -> None:
    graph = GRAPHS["grouped"]
    circuit = Circuit.of_nodes(graph, ["a0.h1", "m1"])
    assert circuit.nodes == ("input", "a0.h0", "a0.h1", "m1", "logits")  # a0.h0 shares the key head of a0.h1
    assert circuit.heads == ((0, 0), (0, 1))
    assert set(circuit.names()) == {
        *(f"input->{r}" for r in ("a0.h1<q>", "a0.h0<k>", "a0.h0<v>", "m1", "logits")),
        *("a0.h1->m1", "a0.h1->logits", "m1->logits"),
    }
    without = Circuit.full(graph).without(["a0.h1"])
    gone = set(Circuit.full(graph).names()) - set(without.names())
    assert all("a0.h1->" in e or "->a0.h1<q>" in e for e in gone) and "input->a0.h0<k>" in without
    both = Circuit.full(graph).without(["a0.h0", "a0.h1"])
    assert "input->a0.h0<k>" not in both and "input->a0.h1<k>" in both


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_circuit_is_refused() -> None:
    graph = GRAPHS["plain"]
    with pytest.raises(SiteError, match="is read before it is written"):
        Circuit(graph, torch.ones_like(graph.allowed))
    with pytest.raises(ShapeError, match=r"\[sender receiver\]"):
        Circuit(graph, torch.zeros(2, 2, dtype=torch.bool))
    with pytest.raises(ShapeError, match=r"float32"):
        Circuit(graph, graph.allowed.float())
    with pytest.raises(SiteError, match="a9"):
        Circuit(graph, graph.allowed, roles={"a9.h9": "name_mover"})
    with pytest.raises(SiteError, match="no edge"):
        Circuit.of(graph, ["m2->m0"])


# -- selection --------------------------------------------------------------------------------------------------------


@each_graph
@pytest.mark.parametrize("absolute", [True, False])
def test_the_top_edges_are_those_of_a_sorted_list(graph: Graph, absolute: bool) -> None:
    scores = scored(graph)
    listed = sorted(
        graph.allowed.nonzero().tolist(), key=lambda e: -float(scores[*e].abs() if absolute else scores[*e])
    )
    for n in (0, 1, 7, graph.n_edges):
        found = top_edges(graph, scores, n, absolute=absolute, prune=False)
        assert {tuple(e) for e in found.edges.nonzero().tolist()} == {tuple(e) for e in listed[:n]}
        assert top_edges(graph, scores, n, absolute=absolute) == found.pruned()
    ranked = [float(scores[*e].abs() if absolute else scores[*e]) for e in listed]
    above = edges_above(graph, scores, ranked[9], absolute=absolute, prune=False)
    assert above == top_edges(graph, scores, 10, absolute=absolute, prune=False)


def test_edges_without_a_score_are_never_chosen() -> None:
    graph = GRAPHS["plain"]
    scores = scored(graph).masked_fill(drawn(graph, 0.5, 3), torch.nan)
    known = graph.allowed & ~scores.isnan()
    assert len(edge_order(graph, scores)) == int(known.sum())
    assert not bool((greedy_edges(graph, scores, 20, prune=False).edges & ~known).any())
    with pytest.raises(DataError, match="that have a score"):
        top_edges(graph, scores, int(known.sum()) + 1)


@each_graph
def test_greedy_selection_takes_the_best_edge_into_what_it_has(graph: Graph) -> None:
    scores, n = scored(graph, 5), 12
    chosen: set[tuple[int, int]] = set()
    opened = {len(graph.receivers) - 1}
    for _ in range(n):  # by its definition, without a heap
        options = [(r, c) for c in opened for r in graph.allowed[:, c].nonzero().flatten().tolist()]
        best = max((e for e in options if e not in chosen), key=lambda e: abs(float(scores[e])))
        chosen.add(best)
        opened |= set(graph.inputs_of(best[0]).tolist())
    found = greedy_edges(graph, scores, n, prune=False)
    assert {tuple(e) for e in found.edges.nonzero().tolist()} == chosen
    useful = reachable(graph, found.edges | graph.allowed & (torch.arange(len(graph.senders)) == 0)[:, None])
    assert bool((useful | ~found.edges).all()), "every edge leads to the logits"


def test_top_nodes_are_whole_nodes() -> None:
    graph = GRAPHS["plain"]
    scores = torch.zeros(len(graph.senders))
    scores[[graph.sender("a0.h1"), graph.sender("m2")]] = torch.tensor([-3.0, 2.0])
    scores[0] = 9.0  # that of the input counts for nothing
    assert top_nodes(graph, scores, 2).nodes == ("input", "a0.h1", "m2", "logits")
    assert "m2" in top_nodes(graph, scores, 1, absolute=False).nodes
    with pytest.raises(DataError, match="nodes"):
        top_nodes(graph, scores, len(scores))


def test_random_edges_are_nested_and_of_the_size_asked_for() -> None:
    graph = GRAPHS["plain"]
    small, large = random_edges(graph, 5, seed=1), random_edges(graph, 50, seed=1)
    assert (small.n_edges, large.n_edges) == (5, 50) and small <= large
    assert random_edges(graph, 5, seed=2) != small and random_edges(graph, 5, seed=1) == small
    counts = torch.stack([random_edges(graph, 10, seed=s).edges.double() for s in range(400)]).sum(0)
    assert float(counts[graph.allowed].min()) > 0, "every edge can be drawn"


@each_graph
def test_exchanged_heads_keep_every_count_by_layer_and_kind(graph: Graph) -> None:
    circuit = Circuit(graph, drawn(graph, 0.3, 2))

    def shape(of: Circuit) -> list[tuple[int, str, int, str]]:
        ends = [(graph.senders[r], graph.receivers[c]) for r, c in of.edges.nonzero().tolist()]
        return sorted((s.layer, s.kind, t.layer, t.kind) for s, t in ends)

    twins = [random_like(circuit, seed=s) for s in range(8)]
    assert all(shape(t) == shape(circuit) for t in twins) and len(set(twins)) > 1
    assert all(len(t.pruned().nodes) == len(circuit.pruned().nodes) for t in twins), "exchanging renames, no more"


# -- files ------------------------------------------------------------------------------------------------------------


@each_graph
def test_a_saved_circuit_comes_back(graph: Graph, tmp_path: Path) -> None:
    scores, roles = scored(graph), {"a0.h1": "previous <token> & more"}
    origin = Provenance(model="m", settings={"n": 3})
    circuit = Circuit(graph, drawn(graph, 0.3, 0), "mine", origin, scores, roles)
    path = circuit.save(tmp_path / "c.json")
    back = Circuit.load(path)
    assert back == circuit and (back.name, back.roles, back.provenance) == ("mine", roles, origin)
    assert back.scores is not None
    assert torch.equal(back.scores[back.edges], scores[circuit.edges]) and bool(back.scores[~back.edges].isnan().all())
    with pytest.raises(ArtifactError, match="overwrite"):
        circuit.save(path)
    record = json.loads(path.read_text())
    damaged: list[dict[str, object]] = [
        {"format": 9},
        {"kind": "x"},
        {"edges": ["m9->m1"]},
        {"graph": {}},
        {"scores": [1.0]},
    ]
    for damage in damaged:
        path.write_text(json.dumps({**record, **damage}))
        with pytest.raises(ArtifactError):
            Circuit.load(path)


@pytest.mark.parametrize("name", ["plain", "grouped", "parallel"])
def test_eap_igs_file_has_an_edge_per_query_head_and_comes_back(name: str, tmp_path: Path) -> None:
    graph = GRAPHS[name]
    circuit = Circuit(graph, drawn(graph, 0.3, 0), "c", scores=scored(graph))
    path = write_eap_ig(circuit, tmp_path / "eap.json", d_model=8)
    record = json.loads(path.read_text())
    assert set(record) == {"cfg", "nodes", "edges"} and len(record["edges"]) == graph.n_edges_ungrouped
    assert record["cfg"] == {"n_layers": graph.n_layers, "n_heads": graph.n_heads, "d_model": 8} | {
        "parallel_attn_mlp": graph.parallel
    }
    assert record["nodes"]["logits"]["in_graph"] and set(record["edges"]["input->m0"]) == {"score", "in_graph"}
    back = load_eap_ig(path, graph)
    assert back == circuit
    copies = graph.n_heads // graph.n_kv_heads
    kv = torch.tensor([copies if n.kind in ("k", "v") else 1 for n in graph.receivers])
    assert back.scores is not None and circuit.scores is not None
    torch.testing.assert_close((back.scores / kv)[graph.allowed], circuit.scores[graph.allowed])
    with pytest.raises(ArtifactError, match="this model has"):
        load_eap_ig(path, Graph(4, 2, 2, (True,) * 4))


def test_eap_igs_file_cannot_say_a_block_without_mlp(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="without an MLP"):
        write_eap_ig(Circuit.full(GRAPHS["attention only"]), tmp_path / "x.json")


def test_graphml_is_the_same_graph(tmp_path: Path) -> None:
    graph = GRAPHS["grouped"]
    roles = {"a1.h0": "in\x00duction & <b>"}
    circuit = Circuit(graph, drawn(graph, 0.3, 4), 'a "name" <x>', scores=scored(graph), roles=roles)
    root = ET.parse(write_graphml(circuit, tmp_path / "c.graphml")).getroot()
    space = "{http://graphml.graphdrawing.org/xmlns}"
    nodes = {n.attrib["id"]: {d.attrib["key"]: d.text for d in n} for n in root.iter(f"{space}node")}
    assert tuple(nodes) == circuit.nodes and nodes["a1.h0"]["role"] == "induction & <b>"
    seen = set()
    for edge in root.iter(f"{space}edge"):
        facts = {d.attrib["key"]: d.text or "" for d in edge}
        node, kind = edge.attrib["target"], facts["reads"]
        if kind in ("k", "v"):
            layer, _, head = node.partition(".h")
            node = f"{layer}.h{int(head) // 2}"
        name = f"{edge.attrib['source']}->{node}" + (f"<{kind}>" if kind in "qkv" else "")
        assert float(facts["score"]) == pytest.approx(float(circuit.scores[graph.edge(name)]))  # type: ignore[index]
        seen.add(name)
    assert seen == set(circuit.names())


def test_the_table_has_a_row_per_edge() -> None:
    graph = GRAPHS["plain"]
    circuit = Circuit(graph, drawn(graph, 0.2, 0), scores=scored(graph), roles={"m0": "early"})
    frame = circuit.to_frame()
    assert frame["edge"].tolist() == circuit.names() and set(frame[frame.receiver == "m0"].role) <= {"early"}
    assert frame["score"].tolist() == [pytest.approx(float(circuit.scores[graph.edge(e)])) for e in circuit.names()]  # type: ignore[index]
    assert not len(Circuit.empty(graph).to_frame())


# -- published circuits -----------------------------------------------------------------------------------------------


def test_the_files_of_published_circuits_are_made_of_the_facts(tmp_path: Path) -> None:
    folder = resource("data/circuits")
    made = build_references.build(tmp_path)
    assert sorted(p.name for p in made) == sorted(p.name for p in folder.iterdir())
    assert all(p.read_bytes() == (folder / p.name).read_bytes() for p in made)


def test_published_circuits_have_the_counts_of_their_sources() -> None:
    counts = {"ioi-gpt2": 182, "greater-than-gpt2": 235, "docstring-attn-only-4l": 24, "greater-than-gpt2-authors": 0}
    for name, n in counts.items():
        assert reference_circuit(name).circuit.n_edges == n
    assert reference_circuit("ioi-gpt2").circuit.graph.n_edges == 32_491
    ioi = reference_circuit("ioi-gpt2")
    assert len(ioi.nodes) == 26 and ioi.role("name_mover") == ("a9.h9", "a10.h0", "a9.h6")
    assert ioi.positions["a9.h9"] == ("end",) and ioi.positions["a3.h0"] == ("S2",)
    for name in reference_names():
        found = reference_circuit(name)
        assert found.circuit.pruned() == found.circuit, "no published edge is a dead end"
        assert found.sources and found.notes and found.version == build_references.VERSION
    assert reference_circuit("ioi-gpt2-naive").circuit <= ioi.circuit


def test_an_unknown_circuit_or_role_is_named() -> None:
    with pytest.raises(DataError, match="ioi-gpt2"):
        reference_circuit("ioi-gpt")
    with pytest.raises(DataError, match="name_mover"):
        reference_circuit("ioi-gpt2").role("name_movers")


# -- comparison -------------------------------------------------------------------------------------------------------


def test_auroc_is_the_chance_of_a_true_item_above_a_false_one() -> None:
    draw = torch.Generator().manual_seed(0)
    for seed in range(5):
        draw.manual_seed(seed)
        scores = torch.randint(0, 6, (40,), generator=draw).double()  # with ties
        truth = torch.rand(40, generator=draw) < 0.3
        pairs = [(float(a), float(b)) for a in scores[truth] for b in scores[~truth]]
        by_hand = sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)
        assert auroc(scores, truth) == pytest.approx(by_hand)
    assert auroc(torch.ones(3), torch.ones(3, dtype=torch.bool)) != auroc(torch.ones(3), torch.ones(3).bool())


def test_a_reference_finds_itself_and_noise_finds_nothing() -> None:
    reference = reference_circuit("ioi-gpt2").circuit
    perfect = reference.edges.float() + 0.1 * torch.rand(reference.edges.shape, generator=torch.Generator())
    found = compare(perfect, reference)
    assert compare(perfect, reference_circuit("ioi-gpt2")).edge_auroc == found.edge_auroc
    assert found.edge_auroc == 1.0 and found.node_jaccard == 1.0 and not found.missing
    assert all(hit == n for hit, n in found.roles.values())
    at = found.sizes.index(next(n for n in found.sizes if n >= 182))
    assert float(found.recall[at]) == 1.0 and float(found.precision[at]) == pytest.approx(182 / found.sizes[at])
    assert compare(reference, reference).node_jaccard == 1.0
    noise = [compare(scored(reference.graph, s), reference).edge_auroc for s in range(5)]
    assert abs(sum(noise) / 5 - 0.5) < 0.03
    assert compare(-perfect, reference, absolute=False).edge_auroc == 0.0


def test_a_circuit_is_ranked_by_its_scores_where_it_has_them() -> None:
    graph = GRAPHS["plain"]
    reference = top_edges(graph, scored(graph), 10, prune=False)
    wide = top_edges(graph, scored(graph), 30, prune=False)
    assert compare(wide, reference).edge_auroc == 1.0, "its first ten edges are the reference's"
    assert compare(Circuit(graph, wide.edges), reference).edge_auroc < 1.0, "without scores all thirty are alike"


def test_heads_alone_can_be_compared() -> None:
    authors = reference_circuit("greater-than-gpt2-authors").circuit
    found = compare(reference_circuit("greater-than-gpt2").circuit, authors)
    assert found.edge_auroc != found.edge_auroc and found.missing == ["a5.h1", "a8.h8"]
    assert found.roles == {"attends_to_start_year": [5, 7]}
    heads = torch.tensor([n.kind == "head" for n in authors.graph.senders])
    with pytest.raises(DataError, match="no edge to compare"):
        compare(authors, authors, among=heads[:, None] & ~authors.graph.allowed)


# -- figures of merit -------------------------------------------------------------------------------------------------


def test_the_area_of_a_curve_in_closed_form() -> None:
    share = torch.linspace(0.1, 1.0, 10)
    assert curve_area(share, 3 * share) == pytest.approx(1.5 * (1 - 0.01))
    assert curve_area(share, torch.full((10,), 0.7), log=True) == pytest.approx(0.7)
    steps = torch.logspace(-3, 0, 7)
    assert curve_area(steps, steps.log10(), log=True) == pytest.approx(-1.5)
    assert curve_area(torch.tensor([0.2, 0.2, 0.5]), torch.tensor([1.0, 9.0, 9.0])) == pytest.approx(2.7)


def test_faithfulness_is_a_ratio_of_means_with_an_interval() -> None:
    draw = torch.Generator().manual_seed(0)
    empty = torch.randn(200, generator=draw)
    clean = empty + 5 + torch.randn(200, generator=draw)
    half = empty + 0.5 * (clean - empty)
    values = torch.stack([clean, empty, half, 2 * clean - empty])
    assert faithfulness(values, clean, empty).tolist() == pytest.approx([1.0, 0.0, 0.5, 2.0], abs=1e-6)
    low, high = faithfulness_bounds(values, clean, empty)
    assert low[:3].tolist() == pytest.approx([1.0, 0.0, 0.5], abs=1e-6), "each pair keeps the same share"
    noisy = half + 3 * torch.randn(200, generator=draw)
    low, high = faithfulness_bounds(noisy, clean, empty)
    error = 3 / 200**0.5 / 5
    assert float(high - low) == pytest.approx(2 * 1.96 * error, rel=0.25) and float(low) < 0.5 < float(high)


def test_nothing_is_divided_by_a_gap_that_is_not_clear() -> None:
    draw = torch.Generator().manual_seed(0)
    clean, empty = torch.randn(30, generator=draw), torch.randn(30, generator=draw)
    assert not gap_is_clear(clean, empty) and faithfulness(clean[None], clean, empty).isnan().all()
    assert faithfulness_bounds(clean[None], clean, empty)[0].isnan().all()
    one = CircuitScores(
        provenance=Provenance(model="m"),
        names=["c"],
        n_edges=[3],
        n_graph=9,
        values=clean[None],
        clean=clean,
        empty=empty,
        metric="logit_diff",
        ablation="zero",
    )
    assert "not clear" in one.summary() and one.to_frame()["faithfulness"].isna().all()
    one.plot()


def curve() -> CircuitCurve:
    """A curve whose faithfulness is k by absolute rank and 2 k, at most 1.2, by signed rank."""
    fractions = [0.25, 0.5, 1.0]
    clean, empty = torch.full((4,), 3.0), torch.full((4,), -1.0)
    f = torch.tensor([[0.25, 0.5, 1.0], [0.5, 1.2, 1.0]])
    values = empty + f[..., None] * (clean - empty)
    return CircuitCurve(
        provenance=Provenance(model="m"),
        rankings=["absolute", "signed"],
        fractions=fractions,
        n_edges=[10, 20, 40],
        kept=torch.tensor([[4, 20, 40], [10, 10, 40]]),
        values=values,
        random=torch.zeros(2, 3, 4) - 1.0,
        random_kept=torch.tensor([[0, 3, 40], [1, 2, 40]]),
        exchanged=torch.zeros(2, 3, 4) + 1.0,
        clean=clean,
        empty=empty,
        n_graph=40,
        metric="logit_diff",
        ablation="patching",
    )


def test_cpr_and_cmd_in_closed_form(tmp_path: Path) -> None:
    found = curve()
    assert found.cpr("absolute") == pytest.approx(0.25 * 0.375 + 0.5 * 0.75)
    assert found.cmd("absolute") == pytest.approx(0.25 * 0.625 + 0.5 * 0.25)
    assert found.cpr("signed") == pytest.approx(0.25 * 0.85 + 0.5 * 1.1)
    assert found.cmd("signed") == pytest.approx(0.25 * 0.35 + 0.5 * 0.1)
    assert found.cmd("absolute", over="kept") == pytest.approx(0.4 * 0.625 + 0.5 * 0.25)
    assert found.cpr("absolute", over="log") == pytest.approx((0.375 + 0.75) / 2)
    assert found.smallest("signed") == 0.5 and found.smallest("absolute") == 1.0
    assert found.smallest("absolute", enough=1.5) != found.smallest("absolute", enough=1.5), "NaN: none is enough"
    areas = found.areas()
    assert areas["random"]["cpr_nominal"] == 0.0 and areas["exchanged"]["cmd_nominal"] == pytest.approx(0.375)
    assert "CPR 0.469" in found.summary()
    frame = found.to_frame()
    assert len(frame) == 6 * 3 and set(frame.ranking) == {
        "absolute", "signed", "random 0", "random 1", "exchanged 0", "exchanged 1"
    }  # fmt: skip
    figure = found.plot()
    named = [trace.name for trace in figure.data if trace.name]
    assert named == ["absolute", "signed", "random edges, 2 seeds", "heads exchanged in each layer, 2 seeds"]
    found.save(tmp_path / "curve")
    assert torch.equal(Result.load(tmp_path / "curve").values, found.values)  # type: ignore[attr-defined]


@pytest.mark.usefixtures("unchecked")
def test_wrong_questions_are_refused() -> None:
    found, graph = curve(), GRAPHS["plain"]
    for ask in (
        lambda: found.cpr("best"),
        lambda: found.cpr(over="edges"),
        lambda: counts_of(graph, [0.5, 0.1]),
        lambda: counts_of(graph, [0.0]),
        lambda: top_edges(graph, torch.zeros(3, 3), 1),
        lambda: top_edges(graph, scored(graph), -1),
        lambda: compare(torch.zeros(2, 2), Circuit.full(graph)),
        lambda: compare(Circuit.full(GRAPHS["parallel"]), Circuit.full(graph)),
    ):
        with pytest.raises(InterpError):
            ask()
    assert all(b > a for a, b in pairwise(counts_of(graph, [0.1, 0.2, 1.0])))
