"""Which activations carry an answer: put those of one prompt into the run of another."""

from interp.patching.activation import PatchResult, activation_patch
from interp.patching.attribution import Latents, attribute
from interp.patching.edge_scores import EdgeScores
from interp.patching.edges import edge_attribution
from interp.patching.flow import flow_routes
from interp.patching.node_scores import AttributionResult
from interp.patching.screening import ScreenResult, screen_and_verify

__all__ = [
    "AttributionResult",
    "EdgeScores",
    "Latents",
    "PatchResult",
    "ScreenResult",
    "activation_patch",
    "attribute",
    "edge_attribution",
    "flow_routes",
    "screen_and_verify",
]
