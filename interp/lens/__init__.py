"""What the residual stream would say if it were read out early, and what wrote what it says in the end."""

from interp.lens.attribution import DirectAttribution
from interp.lens.direct import direct_logit_attribution
from interp.lens.effect import DirectEffect, direct_effect
from interp.lens.logit_lens import DirectionLogits, LogitLensResult, direction_logits, logit_lens
from interp.lens.tuned_fit import TunedLensOptions, evaluate_tuned_lens, fit_tuned_lens
from interp.lens.tuned_lens import TunedLens, tuned_lens

__all__ = [
    "DirectAttribution",
    "DirectEffect",
    "DirectionLogits",
    "LogitLensResult",
    "TunedLens",
    "TunedLensOptions",
    "direct_effect",
    "direct_logit_attribution",
    "direction_logits",
    "evaluate_tuned_lens",
    "fit_tuned_lens",
    "logit_lens",
    "tuned_lens",
]
