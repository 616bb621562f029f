"""Which activations carry an answer: put those of one prompt into the run of another."""

from interp.patching.ablation import mean_values
from interp.patching.activation import activation_patch
from interp.patching.causal_trace import CausalTrace, causal_trace
from interp.patching.optimal import optimal_values
from interp.patching.options import PatchOptions
from interp.patching.result import PatchResult

__all__ = [
    "CausalTrace",
    "PatchOptions",
    "PatchResult",
    "activation_patch",
    "causal_trace",
    "mean_values",
    "optimal_values",
]
