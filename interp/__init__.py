"""Read, edit and take apart the activations of any Hugging Face decoder.

Names are imported on first use (PEP 562): `import interp` loads neither torch nor transformers.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from interp.core.conditional import Gated, KeepNorm
    from interp.core.direction import Direction, Dose
    from interp.core.errors import (
        ArtifactError,
        ConfigError,
        DataError,
        HookError,
        InterpError,
        ModelError,
        ShapeError,
        SiteError,
        WhereError,
    )
    from interp.core.gate import Gate
    from interp.core.intervention import (
        Ablate,
        Add,
        Affine,
        Edit,
        FreezePattern,
        FreezeScale,
        Project,
        Replace,
        Rotate,
        SetProjection,
        Splice,
    )
    from interp.core.manager import HookManager
    from interp.core.metrics import logit_diff
    from interp.core.modelmap import ModelMap
    from interp.core.result import Result
    from interp.core.run import Run
    from interp.core.site import Site
    from interp.core.text import Tokens
    from interp.core.where import Where
    from interp.data.ab_questions import ABQuestions, ab_contrast
    from interp.data.capture import CaptureOptions, capture
    from interp.data.concept_tokens import ConceptTokens
    from interp.data.contrast import Contrast
    from interp.data.icl import FunctionTask
    from interp.data.pairs import PromptPairs
    from interp.data.statistics import activation_statistics
    from interp.data.store import ActivationStore
    from interp.data.tasks.make import make_pairs
    from interp.dictionaries.base import SAE, Transcoder
    from interp.evaluate.dark_matter import dark_matter
    from interp.evaluate.description_length import description_length
    from interp.evaluate.dictionary import evaluate_dictionary
    from interp.evaluate.every import evaluate_all
    from interp.evaluate.labels import label_scores
    from interp.evaluate.pairs import pair_accuracy
    from interp.evaluate.top_examples import top_examples
    from interp.lens.direct import direct_logit_attribution
    from interp.lens.effect import direct_effect
    from interp.lens.logit_lens import logit_lens
    from interp.lens.tuned_fit import fit_tuned_lens
    from interp.lens.tuned_lens import TunedLens, tuned_lens
    from interp.patching.activation import activation_patch
    from interp.patching.causal_trace import causal_trace
    from interp.patching.circuits.circuit import Circuit
    from interp.patching.circuits.circuit_curve import circuit_curve
    from interp.patching.circuits.faithfulness import evaluate_circuits
    from interp.patching.estimates.attribution import attribute
    from interp.patching.estimates.edges import edge_attribution
    from interp.patching.estimates.screening import screen_and_verify
    from interp.patching.features.attribution_graph import attribution_graph
    from interp.patching.features.dfa import dfa
    from interp.patching.features.transcoder_circuits import pre_activation_attribution
    from interp.patching.options import PatchOptions
    from interp.patching.path import path_patch
    from interp.patching.scrub import scrub
    from interp.patching.subspaces.das import fit_das
    from interp.patching.subspaces.illusion import illusion
    from interp.patching.subspaces.subspace import subspace_patch
    from interp.probing.detect import detect
    from interp.probing.induction import induction_scores
    from interp.probing.linear import fit_probe
    from interp.probing.sparse import sparse_probe
    from interp.report.attention import show_attention
    from interp.report.latents import show_latents
    from interp.report.statistics import show_statistics
    from interp.report.tokens import show_tokens
    from interp.steering.acting.clamp import clamp_latents
    from interp.steering.acting.gate import fit_gate
    from interp.steering.acting.rowwise import rowwise
    from interp.steering.concepts.causal import causal_concepts, causal_geometry
    from interp.steering.concepts.compare import compare_methods
    from interp.steering.concepts.observable import observable
    from interp.steering.evaluating.ab import ab_evaluation
    from interp.steering.evaluating.calibrate import calibrate
    from interp.steering.evaluating.open_ended import open_ended
    from interp.steering.evaluating.sweep import steering_sweep
    from interp.steering.evaluating.sweep_options import SweepOptions
    from interp.steering.fitting.direction_fit import fit_with_controls
    from interp.steering.fitting.fit import fit_direction
    from interp.steering.fitting.latents import best_latent, latent_direction
    from interp.steering.fitting.orthogonal import orthogonalised
    from interp.steering.fitting.refusal import fit_refusal
    from interp.steering.function_vectors.effects import head_effects
    from interp.steering.function_vectors.evaluate import evaluate_function_vector
    from interp.steering.function_vectors.vector import function_vector
    from interp.steering.trained.loreft import fit_loreft
    from interp.steering.trained.supervised import fit_reft_r1, fit_ssv
    from interp.steering.trained.transport import fit_transport
    from interp.testbed.model_tasks import model_pairs, model_tasks

__version__ = "0.1.0"

_NAMES_BY_MODULE = {
    "core.errors": (
        "ArtifactError",
        "ConfigError",
        "DataError",
        "HookError",
        "InterpError",
        "ModelError",
        "ShapeError",
        "SiteError",
        "WhereError",
    ),
    "core.intervention": (
        "Ablate",
        "Add",
        "Affine",
        "Edit",
        "FreezePattern",
        "FreezeScale",
        "Project",
        "Replace",
        "Rotate",
        "SetProjection",
        "Splice",
    ),
    "core.manager": ("HookManager",),
    "core.metrics": ("logit_diff",),
    "core.modelmap": ("ModelMap",),
    "core.result": ("Result",),
    "core.run": ("Run",),
    "core.site": ("Site",),
    "core.text": ("Tokens",),
    "core.where": ("Where",),
    "data.capture": ("CaptureOptions", "capture"),
    "data.pairs": ("PromptPairs",),
    "data.statistics": ("activation_statistics",),
    "data.store": ("ActivationStore",),
    "dictionaries.base": ("SAE", "Transcoder"),
    "evaluate.dark_matter": ("dark_matter",),
    "evaluate.description_length": ("description_length",),
    "evaluate.dictionary": ("evaluate_dictionary",),
    "evaluate.every": ("evaluate_all",),
    "evaluate.labels": ("label_scores",),
    "evaluate.pairs": ("pair_accuracy",),
    "evaluate.top_examples": ("top_examples",),
    "lens.logit_lens": ("logit_lens",),
    "patching.activation": ("activation_patch",),
    "probing.induction": ("induction_scores",),
    "report.attention": ("show_attention",),
    "report.latents": ("show_latents",),
    "report.statistics": ("show_statistics",),
    "report.tokens": ("show_tokens",),
    "data.tasks.make": ("make_pairs",),
    "testbed.model_tasks": (
        "model_pairs",
        "model_tasks",
    ),
    "lens.direct": ("direct_logit_attribution",),
    "lens.effect": ("direct_effect",),
    "lens.tuned_fit": ("fit_tuned_lens",),
    "lens.tuned_lens": (
        "TunedLens",
        "tuned_lens",
    ),
    "patching.estimates.attribution": ("attribute",),
    "patching.features.attribution_graph": ("attribution_graph",),
    "patching.causal_trace": ("causal_trace",),
    "patching.circuits.circuit": ("Circuit",),
    "patching.circuits.circuit_curve": ("circuit_curve",),
    "patching.subspaces.das": ("fit_das",),
    "patching.features.dfa": ("dfa",),
    "patching.estimates.edges": ("edge_attribution",),
    "patching.circuits.faithfulness": ("evaluate_circuits",),
    "patching.subspaces.illusion": ("illusion",),
    "patching.options": ("PatchOptions",),
    "patching.path": ("path_patch",),
    "patching.estimates.screening": ("screen_and_verify",),
    "patching.scrub": ("scrub",),
    "patching.subspaces.subspace": ("subspace_patch",),
    "patching.features.transcoder_circuits": ("pre_activation_attribution",),
    "core.conditional": (
        "Gated",
        "KeepNorm",
    ),
    "core.gate": ("Gate",),
    "core.direction": (
        "Direction",
        "Dose",
    ),
    "data.contrast": ("Contrast",),
    "data.concept_tokens": ("ConceptTokens",),
    "data.ab_questions": (
        "ABQuestions",
        "ab_contrast",
    ),
    "data.icl": ("FunctionTask",),
    "steering.acting.clamp": ("clamp_latents",),
    "steering.acting.rowwise": ("rowwise",),
    "steering.acting.gate": ("fit_gate",),
    "steering.concepts.compare": ("compare_methods",),
    "steering.concepts.causal": (
        "causal_concepts",
        "causal_geometry",
    ),
    "steering.concepts.observable": ("observable",),
    "steering.evaluating.sweep": ("steering_sweep",),
    "steering.evaluating.sweep_options": ("SweepOptions",),
    "steering.evaluating.calibrate": ("calibrate",),
    "steering.evaluating.ab": ("ab_evaluation",),
    "steering.evaluating.open_ended": ("open_ended",),
    "steering.fitting.fit": ("fit_direction",),
    "steering.fitting.direction_fit": ("fit_with_controls",),
    "steering.fitting.latents": (
        "best_latent",
        "latent_direction",
    ),
    "steering.fitting.refusal": ("fit_refusal",),
    "steering.fitting.orthogonal": ("orthogonalised",),
    "steering.function_vectors.effects": ("head_effects",),
    "steering.function_vectors.vector": ("function_vector",),
    "steering.function_vectors.evaluate": ("evaluate_function_vector",),
    "steering.trained.supervised": (
        "fit_reft_r1",
        "fit_ssv",
    ),
    "steering.trained.loreft": ("fit_loreft",),
    "steering.trained.transport": ("fit_transport",),
    "probing.linear": ("fit_probe",),
    "probing.sparse": ("sparse_probe",),
    "probing.detect": ("detect",),
}
_HOMES = {name: f"interp.{module}" for module, names in _NAMES_BY_MODULE.items() for name in names}

__all__ = [
    "SAE",
    "ABQuestions",
    "Ablate",
    "ActivationStore",
    "Add",
    "Affine",
    "ArtifactError",
    "CaptureOptions",
    "Circuit",
    "ConceptTokens",
    "ConfigError",
    "Contrast",
    "DataError",
    "Direction",
    "Dose",
    "Edit",
    "FreezePattern",
    "FreezeScale",
    "FunctionTask",
    "Gate",
    "Gated",
    "HookError",
    "HookManager",
    "InterpError",
    "KeepNorm",
    "ModelError",
    "ModelMap",
    "PatchOptions",
    "Project",
    "PromptPairs",
    "Replace",
    "Result",
    "Rotate",
    "Run",
    "SetProjection",
    "ShapeError",
    "Site",
    "SiteError",
    "Splice",
    "SweepOptions",
    "Tokens",
    "Transcoder",
    "TunedLens",
    "Where",
    "WhereError",
    "__version__",
    "ab_contrast",
    "ab_evaluation",
    "activation_patch",
    "activation_statistics",
    "attribute",
    "attribution_graph",
    "best_latent",
    "calibrate",
    "capture",
    "causal_concepts",
    "causal_geometry",
    "causal_trace",
    "circuit_curve",
    "clamp_latents",
    "compare_methods",
    "dark_matter",
    "description_length",
    "detect",
    "dfa",
    "direct_effect",
    "direct_logit_attribution",
    "edge_attribution",
    "evaluate_all",
    "evaluate_circuits",
    "evaluate_dictionary",
    "evaluate_function_vector",
    "fit_das",
    "fit_direction",
    "fit_gate",
    "fit_loreft",
    "fit_probe",
    "fit_reft_r1",
    "fit_refusal",
    "fit_ssv",
    "fit_transport",
    "fit_tuned_lens",
    "fit_with_controls",
    "function_vector",
    "head_effects",
    "illusion",
    "induction_scores",
    "label_scores",
    "latent_direction",
    "logit_diff",
    "logit_lens",
    "make_pairs",
    "model_pairs",
    "model_tasks",
    "observable",
    "open_ended",
    "orthogonalised",
    "pair_accuracy",
    "path_patch",
    "pre_activation_attribution",
    "rowwise",
    "screen_and_verify",
    "scrub",
    "show_attention",
    "show_latents",
    "show_statistics",
    "show_tokens",
    "sparse_probe",
    "steering_sweep",
    "subspace_patch",
    "top_examples",
    "tuned_lens",
]


if not TYPE_CHECKING:  # else a type checker would take every misspelt name for a lazy one

    def __getattr__(name: str) -> object:
        home = _HOMES.get(name)
        if home is None:
            from interp.core.errors import nearest

            hint = nearest(name, __all__) or "dir(interp) lists its names"
            raise AttributeError(f"module 'interp' has no name {name!r}; {hint}")
        import importlib

        value = getattr(importlib.import_module(home), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
