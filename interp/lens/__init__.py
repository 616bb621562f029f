"""What the residual stream would say if it were read out early."""

from interp.lens.logit_lens import DirectionLogits, LogitLensResult, direction_logits, logit_lens

__all__ = ["DirectionLogits", "LogitLensResult", "direction_logits", "logit_lens"]
