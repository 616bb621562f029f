"""`Graph`: counts known from the papers, order of the forward pass, names."""

import pytest
import torch

from interp.core.errors import SiteError
from interp.patching.graph import Graph

GPT2_SMALL = Graph(12, 12, 12, (True,) * 12)


@pytest.mark.parametrize(
    ("shape", "edges"),
    [
        ((12, 12, 12, (True,) * 12), 32_491),  # GPT-2 small
        ((48, 25, 25, (True,) * 48), 2_235_025),  # GPT-2 XL
        ((32, 32, 8, (True,) * 32), 1_592_881),  # Llama-3-8B
        ((26, 8, 4, (True,) * 26), 74_218),  # Gemma-2-2B
        ((24, 14, 2, (True,) * 24), 179_749),  # Qwen2.5-0.5B
        ((6, 8, 8, (True,) * 6, True), 3_580),  # Pythia-70m: attention and MLP in parallel
    ],
)
def test_edges_are_as_many_as_other_tools_count(shape: tuple, edges: int) -> None:
    graph = Graph(*shape)
    assert graph.n_edges_ungrouped == edges
    assert (graph.n_edges == edges) == (graph.n_heads == graph.n_kv_heads)


def test_an_edge_runs_from_what_is_written_to_what_reads_it_later() -> None:
    graph = Graph(2, 2, 1, (True, True))
    assert [n.name for n in graph.senders] == ["input", "a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1"]
    names = ["a0.h0<q>", "a0.h1<q>", "a0.h0<k>", "a0.h0<v>", "m0"]
    assert [n.name for n in graph.receivers] == [*names, *(n.replace("0", "1", 1) for n in names), "logits"]
    into = {
        r.name: {graph.senders[s].name for s in graph.allowed[:, c].nonzero()[:, 0].tolist()}
        for c, r in enumerate(graph.receivers)
    }
    assert into["a0.h1<q>"] == {"input"}
    assert into["m0"] == {"input", "a0.h0", "a0.h1"}
    assert into["a1.h0<k>"] == {"input", "a0.h0", "a0.h1", "m0"}
    assert into["logits"] == {n.name for n in graph.senders}


def test_blocks_in_parallel_and_blocks_without_mlp_have_fewer_edges() -> None:
    parallel = Graph(2, 2, 2, (True, True), parallel=True)
    assert not bool(parallel.allowed[parallel.sender("a0.h0"), parallel.receiver("m0")])
    assert bool(parallel.allowed[parallel.sender("m0"), parallel.receiver("a1.h0<v>")])
    bare = Graph(2, 2, 2, (False, False))
    assert len(bare.senders) == 5 and "m0" not in [n.name for n in bare.receivers]
    # input to both layers' six, two heads to the second layer's six, all five to the logits
    assert bare.n_edges == 6 + 18 + 5


def test_names_and_masks_go_back_and_forth() -> None:
    names = ["input->a0.h1<k>", "m2->a5.h0<q>", "a3.h4->m3", "a11.h11->logits"]
    mask = GPT2_SMALL.mask(names)
    assert int(mask.sum()) == 4 and bool((mask <= GPT2_SMALL.allowed).all())
    assert sorted(GPT2_SMALL.edges(mask)) == sorted(names)
    assert GPT2_SMALL.edges(torch.zeros_like(mask)) == []


def test_a_heads_inputs_are_its_own_query_and_its_groups_key_and_value() -> None:
    graph = Graph(2, 4, 2, (True, True))
    read = [graph.receivers[c].name for c in graph.inputs_of(graph.sender("a1.h3")).tolist()]
    assert read == ["a1.h3<q>", "a1.h1<k>", "a1.h1<v>"]
    assert [graph.receivers[c].name for c in graph.inputs_of(graph.sender("m0")).tolist()] == ["m0"]
    assert len(graph.inputs_of(0)) == 0


def test_wrong_names_and_impossible_edges_are_refused_with_a_hint() -> None:
    with pytest.raises(SiteError, match=r"did you mean 'a0\.h1'"):
        GPT2_SMALL.sender("a0.h1 ")
    with pytest.raises(SiteError, match=r"a3\.h0 writes"):
        GPT2_SMALL.edge("a3.h0->a3.h1<q>")
    with pytest.raises(SiteError, match="is no edge; expected 'sender->receiver'"):
        GPT2_SMALL.mask(["a0.h1"])
