"""Which activations, edges and circuits carry an answer: exact edits, estimates of them, and what holds alone."""

from interp.patching.ablation import mean_values
from interp.patching.activation import activation_patch
from interp.patching.causal_trace import CausalTrace, causal_trace
from interp.patching.circuits.circuit import Circuit
from interp.patching.circuits.circuit_curve import CircuitCurve, circuit_curve
from interp.patching.circuits.circuit_files import load_eap_ig, write_eap_ig, write_graphml
from interp.patching.circuits.circuit_view import write_circuit_html
from interp.patching.circuits.compare_circuits import CircuitMatch, compare
from interp.patching.circuits.evaluate_circuit import edge_effects
from interp.patching.circuits.faithfulness import CircuitScores, evaluate_circuits
from interp.patching.circuits.knockouts import completeness, minimality
from interp.patching.circuits.reference import reference_circuit, reference_names
from interp.patching.circuits.select_edges import (
    edges_above,
    greedy_edges,
    random_edges,
    random_like,
    top_edges,
    top_nodes,
)
from interp.patching.estimates.attribution import Latents, attribute
from interp.patching.estimates.edge_scores import EdgeScores
from interp.patching.estimates.edges import edge_attribution
from interp.patching.estimates.flow import flow_routes
from interp.patching.estimates.node_scores import AttributionResult
from interp.patching.estimates.screening import ScreenResult, screen_and_verify
from interp.patching.features.attribution_graph import AttributionGraph, attribution_graph
from interp.patching.features.dfa import dfa
from interp.patching.features.graph_confirm import confirm
from interp.patching.features.graph_export import to_circuit_tracer_json
from interp.patching.features.invariant import connections, de_embedding
from interp.patching.features.rdfa import head_latents, rdfa
from interp.patching.features.transcoder_circuits import pre_activation_attribution
from interp.patching.features.transcoder_paths import find_paths
from interp.patching.graph import Graph
from interp.patching.optimal import optimal_values
from interp.patching.options import PatchOptions
from interp.patching.path import path_patch
from interp.patching.path_result import PathPatchResult
from interp.patching.result import PatchResult
from interp.patching.scrub import scrub
from interp.patching.scrub_result import ScrubResult
from interp.patching.subspaces.das import DAS, DASOptions, fit_boundless_das, fit_das
from interp.patching.subspaces.illusion import illusion
from interp.patching.subspaces.subspace import subspace_patch

__all__ = [
    "DAS",
    "AttributionGraph",
    "AttributionResult",
    "CausalTrace",
    "Circuit",
    "CircuitCurve",
    "CircuitMatch",
    "CircuitScores",
    "DASOptions",
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
    "attribution_graph",
    "causal_trace",
    "circuit_curve",
    "compare",
    "completeness",
    "confirm",
    "connections",
    "de_embedding",
    "dfa",
    "edge_attribution",
    "edge_effects",
    "edges_above",
    "evaluate_circuits",
    "find_paths",
    "fit_boundless_das",
    "fit_das",
    "flow_routes",
    "greedy_edges",
    "head_latents",
    "illusion",
    "load_eap_ig",
    "mean_values",
    "minimality",
    "optimal_values",
    "path_patch",
    "pre_activation_attribution",
    "random_edges",
    "random_like",
    "rdfa",
    "reference_circuit",
    "reference_names",
    "screen_and_verify",
    "scrub",
    "subspace_patch",
    "to_circuit_tracer_json",
    "top_edges",
    "top_nodes",
    "write_circuit_html",
    "write_eap_ig",
    "write_graphml",
]
