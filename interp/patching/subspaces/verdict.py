"""What the effects of a direction and of its parts support, in words, and never more than that."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from interp.patching.subspaces.subspace import fldd

__all__ = ["CARRIED", "CONSISTENT", "NOTHING", "NO_SPLIT", "UNDECIDED", "Evidence", "Share", "share_of", "weighed"]

CONSISTENT = "all signs of an illusion are there"
CARRIED = "the part that is read and the whole component have the effect too: not the pattern of an illusion"
NOTHING = "the direction has no clear effect, so there is nothing to explain"
NO_SPLIT = "every dimension is read, so a split into read and unread says nothing"
UNDECIDED = "the evidence does not decide"
_RESAMPLES = 1000


@dataclass(frozen=True, eq=False)
class Evidence:
    """What was measured.

    Args:
        clean: logit differences without a patch.
        patched: logit differences per patch; "direction", "placebo" and "whole component" are always there.
        placebos: FLDD of each placebo.
        moved: per direction, how far it moves between the prompts of a pair, 1 being a random direction.
        explained: per direction, the share of its variance that labels explain.
    """

    clean: Float[Tensor, " pair"]
    patched: dict[str, Tensor]
    placebos: list[float]
    moved: dict[str, float]
    explained: dict[str, float]


class Share(NamedTuple):
    """A part's effect as a share of the direction's, with its 95 % interval over pairs."""

    value: float
    low: float
    high: float

    def silent(self, bound: float) -> bool:
        """Whether the interval lies below a bound."""
        return self.high <= bound

    def __str__(self) -> str:
        value, low, high = (round(v, 2) + 0.0 for v in self)  # no −0 %
        return f"{value:.0%} [{low:.0%}, {high:.0%}]"


def share_of(
    part: Float[Tensor, " pair"], direction: Float[Tensor, " pair"], clean: Float[Tensor, " pair"], *, seed: int = 0
) -> Share:
    """Return (mean clean − mean part) / (mean clean − mean direction), resampled over pairs.

    Args:
        part: logit differences with a part patched.
        direction: those with the direction patched.
        clean: those without a patch.
        seed: of the resampling.
    """
    p, d = (clean - part).double(), (clean - direction).double()
    drawn = torch.randint(len(p), (_RESAMPLES, len(p)), generator=torch.Generator().manual_seed(seed))
    shares = p[drawn].mean(1) / d[drawn].mean(1)
    low, high = shares.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Share(float(p.mean() / d.mean()), low, high)


def weighed(evidence: Evidence, *, min_effect: float, silent: float, dormant: float) -> tuple[str, list[str]]:
    """Return what the evidence supports, and the findings in words.

    Args:
        evidence: what was measured.
        min_effect, silent, dormant: as in `IllusionOptions`.
    """
    whole = fldd(evidence.patched["direction"], evidence.clean)
    placebo, largest = fldd(evidence.patched["placebo"], evidence.clean), max(evidence.placebos)
    drawn = f"{len(evidence.placebos)} random directions moved as far: mean {placebo}, largest {largest:.3g}"
    lines = [f"the direction: FLDD {whole}; {drawn}"]
    if not whole.low >= min_effect or whole.low <= placebo.high:
        why = f"an effect is FLDD ≥ {min_effect:g}, and more than random directions have"
        return NOTHING, [*lines, f"{why}: the lower bound {whole.low:.3g} is not"]
    shares: dict[str, Share] = {
        name: share_of(evidence.patched[name], evidence.patched["direction"], evidence.clean)
        for name in ("read part", "unread part", "whole component")
        if name in evidence.patched
    }
    for name, share in shares.items():
        word = "does nothing" if share.silent(silent) else "has an effect" if share.low > silent else "is not clear"
        lines.append(f"{name} alone: {share} of the direction's effect, it {word} (bound {silent:.0%})")
    resting = "read part" in shares and shares["read part"].silent(silent) and evidence.moved["read part"] <= dormant
    lines += _movements(evidence, resting)
    return _verdict(shares, silent, resting), lines


def _movements(evidence: Evidence, resting: bool) -> list[str]:
    lines = []
    for name in ("read part", "unread part"):
        if name not in evidence.moved:
            lines.append(f"{name}: there is none")
            continue
        moved, told = evidence.moved[name], evidence.explained[name]
        word = " (dormant)" if name == "read part" and resting else ""
        known = "does not vary" if told != told else f"labels explain {told:.0%} of its variance"
        lines.append(
            f"{name}: moves {moved:.2g} times as much as a random direction between the prompts{word}; {known}"
        )
    return lines


def _verdict(shares: Mapping[str, Share], silent: float, resting: bool) -> str:
    if "unread part" not in shares:
        return NO_SPLIT
    read = shares.get("read part")
    if read is not None and read.low > silent and shares["whole component"].low > silent:
        return CARRIED
    if resting and all(share.silent(silent) for share in shares.values()):
        return CONSISTENT
    return UNDECIDED
