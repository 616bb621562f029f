"""Patching, attribution and circuits on an accelerator say what they say on the CPU."""

import pytest
import torch

from interp.core.manager import HookManager
from interp.patching import (
    PatchOptions,
    activation_patch,
    attribute,
    edge_attribution,
    evaluate_circuits,
    path_patch,
    top_edges,
)
from interp.testbed.model_tasks import model_pairs

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=["testbed", "testbed-llama"])
def both(request: pytest.FixtureRequest) -> tuple[HookManager, HookManager]:
    """The same model on the CPU and on the accelerator."""
    return HookManager.load(request.param), HookManager.load(request.param, device="cuda")


@pytest.mark.parametrize("by", ["head", "pos_head", "span_head"])
def test_a_sweep_is_that_of_the_cpu_and_the_naive_loop(both: tuple[HookManager, HookManager], by: str) -> None:
    pairs = model_pairs(both[0], "ioi", 6)
    options = PatchOptions(by=by, mode="both")
    here, there = (activation_patch(hm, pairs, sites="z", options=options, progress=False) for hm in both)
    torch.testing.assert_close(there.patched.cpu(), here.patched, atol=2e-3, rtol=1e-3)
    naive = activation_patch(both[1], pairs, sites="z", options=PatchOptions(by=by, engine="naive"), progress=False)
    torch.testing.assert_close(there.patched, naive.patched, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("rule", ["plain", "gim", "relp"])
def test_scores_of_nodes_and_edges_are_those_of_the_cpu(both: tuple[HookManager, HookManager], rule: str) -> None:
    pairs = model_pairs(both[0], "ioi", 6)
    nodes = [attribute(hm, pairs, nodes=["z", "mlp_out"], rule=rule).scores.cpu() for hm in both]
    torch.testing.assert_close(nodes[1], nodes[0], atol=2e-3, rtol=1e-3)
    edges = [edge_attribution(hm, pairs, rule=rule).scores.cpu() for hm in both]
    torch.testing.assert_close(edges[1], edges[0], atol=2e-3, rtol=1e-3)


def test_circuits_and_paths_are_those_of_the_cpu(both: tuple[HookManager, HookManager]) -> None:
    pairs = model_pairs(both[0], "ioi", 6)
    scores = edge_attribution(both[0], pairs)
    circuit = top_edges(scores.graph, scores.scores, 40)
    found = [evaluate_circuits(hm, pairs, [circuit, ~circuit], progress=False).faithfulness.cpu() for hm in both]
    torch.testing.assert_close(found[1], found[0], atol=1e-3, rtol=1e-3)
    paths = [path_patch(hm, pairs, senders=["a2.*"], receivers="logits").patched.cpu() for hm in both]
    torch.testing.assert_close(paths[1], paths[0], atol=2e-3, rtol=1e-3)
