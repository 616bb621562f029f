"""Read, edit and take apart the activations of any Hugging Face decoder.

Names are imported on first use (PEP 562): `import interp` loads neither torch nor transformers.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
    from interp.data.capture import CaptureOptions, capture
    from interp.data.pairs import PromptPairs
    from interp.data.statistics import activation_statistics
    from interp.data.store import ActivationStore
    from interp.dictionaries.base import SAE, Transcoder
    from interp.evaluate.dark_matter import dark_matter
    from interp.evaluate.description_length import description_length
    from interp.evaluate.dictionary import evaluate_dictionary
    from interp.evaluate.every import evaluate_all
    from interp.evaluate.labels import label_scores
    from interp.evaluate.pairs import pair_accuracy
    from interp.evaluate.top_examples import top_examples
    from interp.lens.logit_lens import logit_lens
    from interp.patching.activation import activation_patch
    from interp.probing.induction import induction_scores
    from interp.report.attention import show_attention
    from interp.report.latents import show_latents
    from interp.report.statistics import show_statistics
    from interp.report.tokens import show_tokens

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
}
_HOMES = {name: f"interp.{module}" for module, names in _NAMES_BY_MODULE.items() for name in names}

__all__ = [
    "SAE",
    "Ablate",
    "ActivationStore",
    "Add",
    "Affine",
    "ArtifactError",
    "CaptureOptions",
    "ConfigError",
    "DataError",
    "Edit",
    "FreezePattern",
    "FreezeScale",
    "HookError",
    "HookManager",
    "InterpError",
    "ModelError",
    "ModelMap",
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
    "Tokens",
    "Transcoder",
    "Where",
    "WhereError",
    "__version__",
    "activation_patch",
    "activation_statistics",
    "capture",
    "dark_matter",
    "description_length",
    "evaluate_all",
    "evaluate_dictionary",
    "induction_scores",
    "label_scores",
    "logit_diff",
    "logit_lens",
    "pair_accuracy",
    "show_attention",
    "show_latents",
    "show_statistics",
    "show_tokens",
    "top_examples",
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
