"""Which activations carry an answer: put those of one prompt into the run of another."""

from interp.patching.activation import PatchResult, activation_patch

__all__ = ["PatchResult", "activation_patch"]
