"""Which activations carry an answer: put those of one prompt into the run of another."""

from interp.patching.activation import PatchResult, activation_patch
from interp.patching.path import path_patch
from interp.patching.path_result import PathPatchResult
from interp.patching.scrub import scrub
from interp.patching.scrub_result import ScrubResult

__all__ = ["PatchResult", "PathPatchResult", "ScrubResult", "activation_patch", "path_patch", "scrub"]
