"""Attribution graphs: rows are exact, brute force agrees, planted circuits come out, files are what viewers read."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from interp.core.errors import DataError
from interp.core.manager import HookManager
from interp.core.readout import Readout
from interp.core.result import Result
from interp.patching.features.attribution_graph import AttributionGraph, attribution_graph
from interp.patching.features.graph_confirm import confirm, predicted_effects
from interp.patching.features.graph_export import graph_record, to_circuit_tracer_json
from interp.patching.features.graph_scores import (
    completeness_score,
    influence_of,
    normalized_rows,
    prune,
    replacement_score,
)
from interp.testbed.tasks import task_pairs
from tests.families import LENGTH, manager, tokens
from tests.transcoders import mixed, planted, random_transcoder, trained

SOME = ("GPT2", "Llama", "Gemma2", "GPTNeoX", "Cohere", "Granite", "Olmo2")
some_families = pytest.mark.parametrize("name", SOME)


@cache
def graph(name: str) -> AttributionGraph:
    """A graph of one family, without a transcoder at the second of three layers."""
    hm = manager(name)
    return attribution_graph(hm, mixed(hm, but=(1,) if hm.n_layers > 2 else ()), tokens(1), targets=3, batch_size=50)


def off(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max()) if a.shape == b.shape else float("inf")


# -- rows -------------------------------------------------------------------------------------------------------------


@some_families
def test_every_row_sums_to_what_it_explains(name: str) -> None:
    found, hm = graph(name), manager(name)
    assert found.n_features == found.n_active and not found.left_out.any()
    assert off(found.adjacency.sum(1) + found.constant, found.value) < 1e-4
    # The logits are the model's own, before a soft-cap, less their mean.
    out = hm.run(tokens(1), read=["unembed.out"], logits="all")
    logits = out["unembed.out"][0, -1] * Readout.of(hm).scale
    ids = out.logits[0, -1].topk(len(found.target_names)).indices
    assert found.target_columns[:, 0].tolist() == ids.tolist()
    assert off(found.value[found.n_features :], logits[ids] - logits.mean()) < 1e-4
    assert off(found.target_prob, out.logits[0, -1].softmax(-1)[ids]) < 1e-5


@some_families
def test_a_feature_taken_out_of_the_held_model_takes_away_what_its_edge_says(name: str) -> None:
    """Brute force through the engine: patterns, norms' σ and MLPs held, skip paths live."""
    hm, found = manager(name), graph(name)
    done = confirm(hm, mixed(hm, but=(1,) if hm.n_layers > 2 else ()), found, features=6, controls=1, batch_size=5)
    assert off(done.held, done.direct) < 1e-3 and done.direct.abs().max() > 1e-2
    assert len(done.labels) == 12 and int(done.control.sum()) == 6
    # With nothing held the model does something else.
    assert off(done.free, done.direct) > 1e-3


def test_a_cap_keeps_the_most_influential_features_and_rows_still_sum() -> None:
    hm, whole = manager("Llama"), graph("Llama")
    held = mixed(hm, but=(1,))
    part = attribution_graph(hm, held, tokens(1), targets=3, max_features=60, batch_size=10)
    assert (part.n_features, part.n_active) == (60, whole.n_features)
    assert off(part.adjacency.sum(1) + part.constant + part.left_out, part.value) < 1e-4
    assert part.left_out.abs().max() > 1e-3
    best = {tuple(x) for x in _names(whole)[whole.influence[: whole.n_features].topk(20).indices].tolist()}
    assert len(best & {tuple(x) for x in _names(part).tolist()}) >= 18
    # The same edges as in the whole graph.
    where = [whole.find(*map(int, (layer, latent, pos))) for layer, pos, latent in _names(part).tolist()]
    assert off(part.adjacency[:60, :60], whole.adjacency[where][:, where]) < 1e-5


def _names(found: AttributionGraph) -> Tensor:
    return torch.stack([found.layer, found.pos, found.latent], 1)


def test_the_size_of_batches_changes_nothing() -> None:
    hm = manager("GPT2")
    held = mixed(hm)
    one, other = (attribution_graph(hm, held, tokens(1), targets=2, batch_size=n) for n in (60, 1000))
    assert off(one.adjacency, other.adjacency) < 1e-5 and torch.equal(one.latent, other.latent)


def test_targets_are_the_likeliest_tokens_given_ones_or_differences() -> None:
    hm = manager("GPT2")
    held = {2: random_transcoder(hm, 2)}
    logits = hm.run(tokens(1)).logits[0]
    for pos in (-1, 4):
        probs, ids = logits[pos].softmax(-1).sort(descending=True)
        enough = int((probs.cumsum(0) < 0.95).sum()) + 1
        found = attribution_graph(hm, held, tokens(1), pos=pos, max_features=5)
        assert found.target_columns[:, 0].tolist() == ids[: min(10, enough)].tolist()
        assert float(found.target_weight.sum()) == pytest.approx(1)
    given = attribution_graph(hm, held, tokens(1), targets=["w5", 9], max_features=5)
    assert given.target_columns.tolist() == [[5], [9]] and given.target_names == ["w5", "w9"]
    apart = attribution_graph(hm, held, tokens(1), targets={"5 − 9": {"w5": 1.0, "w9": -1.0}}, max_features=5)
    assert float(apart.value[-1]) == pytest.approx(float(logits[-1, 5] - logits[-1, 9]), abs=1e-4)
    assert off(apart.adjacency[-1].sum() + apart.constant[-1] + apart.left_out[-1], apart.value[-1]) < 1e-4


# -- influence, scores, pruning ---------------------------------------------------------------------------------------


def test_influence_is_the_sum_over_all_ways() -> None:
    found = graph("Llama")
    n, m = found.adjacency.shape
    n_logits = len(found.target_names)
    # As one square matrix, by its inverse: Σ_k A^k = (1 − A)^-1 − 1.
    square = torch.zeros(m + n_logits, m + n_logits, dtype=torch.float64)
    shares = normalized_rows(found.adjacency).double()
    square[: found.n_features, :m], square[m:, :m] = shares[: found.n_features], shares[found.n_features :]
    start = torch.zeros(m + n_logits, dtype=torch.float64)
    start[m:] = found.target_weight.double()
    whole = start @ (torch.linalg.inv(torch.eye(len(square)) - square) - torch.eye(len(square)))
    assert off(found.influence.double(), whole[:m]) < 1e-5 and n == found.n_features + n_logits


def test_scores_of_a_graph_made_by_hand() -> None:
    # Features a, b; one error; two tokens; one logit. a reads tokens alone, b half an error; the logit a and b alike.
    adjacency = torch.tensor([[0, 0, 0, 3.0, -1.0], [0, 0, 2.0, 2.0, 0], [-1.0, 1.0, 0, 0, 0]])
    weights = torch.tensor([1.0])
    shares = normalized_rows(adjacency)
    influence = influence_of(shares, weights, 2)
    assert influence.tolist() == pytest.approx([0.5, 0.5, 0.25, 0.625, 0.125])
    assert replacement_score(influence, 2, 2) == pytest.approx(0.75)
    # (1 · 1 + .5 · 1 + .5 · .5) / 2
    assert completeness_score(shares, influence, weights, 2) == pytest.approx(0.875)
    kept = prune(adjacency, weights, n_tokens=2, depth=2, node_share=0.6, edge_share=1.0)
    # Nodes by influence: token 0 (.625), a, b (.5 each), error (.25), token 1: .625 + .5 hold 56 %, so b stays too.
    assert kept.nodes.tolist() == [True, True, False, True, True]
    assert kept.edges.nonzero().tolist() == [[0, 3], [0, 4], [1, 3], [2, 0], [2, 1]]
    least = prune(adjacency, weights, n_tokens=2, depth=2, node_share=0.0)
    assert least.nodes.tolist() == [False, False, False, True, True] and not least.edges.any()
    assert prune(adjacency, weights, n_tokens=2, depth=2, node_share=1.0, edge_share=1.0).edges.sum() == 6
    with pytest.raises(DataError, match="shares from 0 to 1"):
        prune(adjacency, weights, n_tokens=2, depth=2, node_share=1.5)


@some_families
def test_pruning_keeps_what_it_says_and_no_loose_ends(name: str) -> None:
    found = graph(name)
    kept = found.prune()
    n, n_tokens = found.n_features, len(found.tokens)
    assert 0 < int(kept.nodes[:n].sum()) < n and bool(kept.nodes[len(kept.nodes) - n_tokens :].all())
    inner = kept.nodes[: len(kept.nodes) - n_tokens]
    assert bool(kept.edges.any(0)[: len(inner)][inner].all()), "a node that leads nowhere"
    assert bool(kept.edges.any(1)[:n][kept.nodes[:n]].all()), "a feature that comes from nowhere"
    assert not kept.edges[:, ~kept.nodes].any()
    more = found.prune(node_share=0.95)
    assert int(more.nodes.sum()) > int(kept.nodes.sum())
    # Errors have their share: the transcoders are random ones.
    assert 0 < found.replacement_score < 0.9 and 0 < found.completeness_score < 0.99


# -- a planted circuit ------------------------------------------------------------------------------------------------

TEXT = torch.tensor([[3, 5, 3, 1, 6, 2]])


def test_a_planted_circuit_is_the_whole_graph_and_its_ablation_the_answer() -> None:
    hm, held = planted()
    found = attribution_graph(hm, held, TEXT, targets={"3 − 7": {3: 1.0, 7: -1.0}}, pos=4)
    assert float(found.value[-1]) == pytest.approx(3 * 2 * 2 / 5)
    assert found.replacement_score == pytest.approx(1) and found.completeness_score == pytest.approx(1)
    kept = found.prune()
    stays = kept.nodes[: found.n_features].nonzero()[:, 0].tolist()
    assert [found.source_label(i) for i in stays] == [
        "L0 latent 3 @0 '3'", "L0 latent 3 @2 '3'", "L1 latent 3 @4 '6'",
    ]  # fmt: skip
    first, last = found.find(0, 3, 0), found.find(1, 3, 4)
    assert float(found.adjacency[last, first]) == pytest.approx(2 / 5)
    assert float(found.adjacency[-1, last]) == pytest.approx(12 / 5)
    # Where every way is linear, the graph's total is what the model does; other words do nothing.
    done = confirm(hm, held, found, features=[first, last, found.find(0, 3, 2)], controls=3)
    assert off(done.total, done.attention_held) < 1e-5 and off(done.total, done.free) < 1e-5
    assert done.total[:3, 0].tolist() == pytest.approx([6 / 5, 12 / 5, 6 / 5])
    assert int(done.control.sum()) > 3 and not done.direct[0].any() and not done.free[done.control].any()


def test_ways_through_the_graph_are_those_of_its_matrix() -> None:
    found = graph("Llama")
    chosen = torch.arange(0, found.n_features, 40)
    direct, total = predicted_effects(found, chosen)
    n = found.n_features
    passed = (found.adjacency[:, :n] / found.value[:n]).double()
    whole = torch.linalg.solve(torch.eye(n, dtype=torch.float64) - passed[:n].T, passed[n:].T).T * found.value[:n]
    assert off(direct, found.adjacency[n:, chosen].T) == 0
    assert off(total.double(), whole[:, chosen].T) < 1e-3 * float(whole.abs().max())


@pytest.mark.slow
def test_on_the_testbed_the_named_features_move_the_answer_and_others_of_their_layers_do_not() -> None:
    hm = HookManager.load("testbed")
    held = trained(hm, (0, 1))
    pairs = task_pairs("ioi", 4).tokens(hm)
    asked, others = [], []
    for row in range(4):
        prompt = pairs.clean.ids[row][pairs.clean.mask[row]]
        ends = {pairs.answers[row][0][0]: 1.0, pairs.foils[row][0][0]: -1.0}
        found = attribution_graph(hm, held, prompt, targets={"answer − foil": ends})
        assert off(found.adjacency.sum(1) + found.constant, found.value) < 1e-3
        done = confirm(hm, held, found, features=3, controls=4, seed=row)
        assert off(done.held, done.direct) < 1e-2
        asked.append(done.attention_held[~done.control].abs())
        others.append(done.attention_held[done.control].abs())
        # The features are about the names: they stand where one of the two is.
        names = {int(i) for i in ends}
        assert any(int(found.ids[found.pos[i]]) in names for i in done.feature[:3].tolist())
    assert torch.cat(asked).mean() > 4 * torch.cat(others).mean()


# -- files ------------------------------------------------------------------------------------------------------------


def test_the_file_has_the_fields_and_names_of_circuit_tracers(tmp_path: Path) -> None:
    found = graph("Llama")
    record = json.loads(to_circuit_tracer_json(found, tmp_path / "my-graph.json", scan="set").read_text())
    assert set(record) == {"metadata", "qParams", "nodes", "links"}
    assert record["metadata"]["slug"] == "my-graph" and record["metadata"]["prompt_tokens"] == found.tokens
    assert set(record["qParams"]) == {"pinnedIds", "supernodes", "linkType", "clickedId", "sg_pos"}
    kept = found.prune()
    assert len(record["nodes"]) == int(kept.nodes.sum()) + len(found.target_names)
    assert len(record["links"]) == int(kept.edges.sum())
    names = [node["node_id"] for node in record["nodes"]]
    assert len(set(names)) == len(names)
    kinds = {node["feature_type"] for node in record["nodes"]}
    assert kinds == {"cross layer transcoder", "mlp reconstruction error", "embedding", "logit"}
    feature = next(n for n in record["nodes"] if n["feature_type"] == "cross layer transcoder" and n["layer"] == "2")
    layer, latent, pos = map(int, feature["node_id"].split("_"))
    pair = (layer + latent) * (layer + latent + 1) // 2 + latent
    assert (feature["feature"], feature["ctx_idx"], feature["jsNodeId"]) == (pair, pos, f"{layer}_{latent}-0")
    assert feature["activation"] == pytest.approx(float(found.value[found.find(layer, latent, pos)]))
    # Each link is the signed entry, and both ends are there.
    by_id = {node["node_id"]: node for node in record["nodes"]}
    into = [link for link in record["links"] if link["target"] == feature["node_id"]]
    row = found.find(layer, latent, pos)
    assert into and sum(link["weight"] for link in into) == pytest.approx(
        float(found.adjacency[row][kept.edges[row]].sum()), rel=1e-4, abs=1e-5
    )
    assert all(link["source"] in by_id and link["target"] in by_id for link in record["links"])
    assert [n["is_target_logit"] for n in record["nodes"] if n["feature_type"] == "logit"] == [True, False, False]
    shares = [n["influence"] for n in record["nodes"] if n["influence"] is not None]
    assert min(shares) > 0 and max(shares) <= 1 + 1e-6


def test_a_difference_has_no_place_in_that_file() -> None:
    hm, held = planted()
    found = attribution_graph(hm, held, TEXT, targets={"3 − 7": {3: 1.0, 7: -1.0}})
    with pytest.raises(DataError, match="logits of tokens"):
        graph_record(found, slug="x", scan="y")


def test_results_show_themselves_and_come_back(tmp_path: Path) -> None:
    hm, held = planted()
    found = attribution_graph(hm, held, TEXT, targets=3, pos=4)
    done = confirm(hm, held, found, features=2, controls=1)
    for result in (found, done):
        assert len(result.to_frame()) and result.plot().data
        back = Result.load(result.save(tmp_path / type(result).__name__))
        assert back.summary() == result.summary()
    assert "replacement score 1.000" in found.summary() and "0% of the influence ends in errors" in found.summary()


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_graphed_is_refused() -> None:
    hm, held = planted()
    found = attribution_graph(hm, held, TEXT, targets=2, pos=4)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"targets": 0}, "at least one token"),
        ({"targets": [99]}, "an id from 0 to 7"),
        ({"targets": "word"}, "expected a number, tokens"),
        ({"targets": {"a": {}}}, "name → token → coefficient"),
        ({"pos": LENGTH}, "positions 0 to 5"),
        ({"max_features": 0}, "must be 1 or more"),
    ]
    for settings, message in bad:
        with pytest.raises(DataError, match=message):
            attribution_graph(hm, held, TEXT, **settings)
    with pytest.raises(DataError, match="one prompt, got 2"):
        attribution_graph(hm, held, TEXT.repeat(2, 1))
    with pytest.raises(DataError, match="not in this graph"):
        found.find(1, 7, 0)
    for features in ([99], 0, []):
        with pytest.raises(DataError, match="features="):
            confirm(hm, held, found, features=features)
    with pytest.raises(DataError, match="is not what it was"):
        confirm(hm, {1: held[1]}, found, features=[found.find(0, 3, 0)])
