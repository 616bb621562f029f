"""Which activations, edges and circuits carry an answer: exact edits, estimates of them, and what holds alone."""

from interp.patching.ablation import mean_values
from interp.patching.activation import activation_patch
from interp.patching.attribution import Latents, attribute
from interp.patching.causal_trace import CausalTrace, causal_trace
from interp.patching.circuit import Circuit
from interp.patching.circuit_curve import CircuitCurve, circuit_curve
from interp.patching.compare_circuits import CircuitMatch, compare
from interp.patching.edge_scores import EdgeScores
from interp.patching.edges import edge_attribution
from interp.patching.faithfulness import CircuitScores, evaluate_circuits
from interp.patching.flow import flow_routes
from interp.patching.graph import Graph
from interp.patching.knockouts import completeness, minimality
from interp.patching.node_scores import AttributionResult
from interp.patching.options import PatchOptions
from interp.patching.path import path_patch
from interp.patching.path_result import PathPatchResult
from interp.patching.reference import reference_circuit, reference_names
from interp.patching.result import PatchResult
from interp.patching.screening import ScreenResult, screen_and_verify
from interp.patching.scrub import scrub
from interp.patching.scrub_result import ScrubResult
from interp.patching.select_edges import edges_above, greedy_edges, top_edges, top_nodes

__all__ = [
    "AttributionResult",
    "CausalTrace",
    "Circuit",
    "CircuitCurve",
    "CircuitMatch",
    "CircuitScores",
    "EdgeScores",
    "Graph",
    "Latents",
    "PatchOptions",
    "PatchResult",
    "PathPatchResult",
    "ScreenResult",
    "ScrubResult",
    "activation_patch",
    "attribute",
    "causal_trace",
    "circuit_curve",
    "compare",
    "completeness",
    "edge_attribution",
    "edges_above",
    "evaluate_circuits",
    "flow_routes",
    "greedy_edges",
    "mean_values",
    "minimality",
    "path_patch",
    "reference_circuit",
    "reference_names",
    "screen_and_verify",
    "scrub",
    "top_edges",
    "top_nodes",
]
