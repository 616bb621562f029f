"""Probes: what a head or a direction responds to."""

from interp.probing.induction import InductionScores, induction_scores

__all__ = ["InductionScores", "induction_scores"]
