"""Probes: what a head or a direction responds to, and which concepts activations or few of their units tell."""

from interp.probing.detect import Transfer, detect, transfer
from interp.probing.fitters import KINDS
from interp.probing.induction import InductionScores, induction_scores
from interp.probing.linear import ProbeOptions, fit_probe
from interp.probing.result import ProbeResult
from interp.probing.selection import RANKINGS, SEARCHES
from interp.probing.sparse import SparseOptions, sparse_probe
from interp.probing.sparse_result import SparseProbes

__all__ = [
    "KINDS",
    "RANKINGS",
    "SEARCHES",
    "InductionScores",
    "ProbeOptions",
    "ProbeResult",
    "SparseOptions",
    "SparseProbes",
    "Transfer",
    "detect",
    "fit_probe",
    "induction_scores",
    "sparse_probe",
    "transfer",
]
