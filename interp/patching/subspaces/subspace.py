"""Subspace patching: how much of an answer goes with a few directions of one activation."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.core.errors import ShapeError
from interp.core.manager import HookManager
from interp.core.metrics import refuse_nan
from interp.core.result import Provenance, Result
from interp.core.site import Site
from interp.core.stats import Estimate, bootstrap
from interp.core.subspace import orthonormal
from interp.data.pair_tokens import PairTokens
from interp.data.pairs import PromptPairs
from interp.patching.subspaces.interchange import Interchange, Labels, Places, described

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

__all__ = ["SubspaceResult", "fldd", "subspace_patch"]

_RESAMPLES = 1000


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class SubspaceResult(Result):
    """What it does to the clean prompts to take a subspace of one activation from the corrupted ones, per pair.

    Attributes:
        site: Short name of the patched site.
        where: The patched positions, as text.
        basis: Orthonormal rows that span the subspace.
        clean: Logit difference (answers − foils) of the clean prompts.
        corrupted: The same of the corrupted prompts.
        patched: The same of the clean prompts with the subspace replaced.
        whole: The same with the whole activation replaced.
        hit: Whether the patched run's likeliest token, among all answers and foils, is the corrupted prompt's.
        hit_whole: The same with the whole activation replaced.
    """

    title: ClassVar[str] = "Subspace patching"
    site: str
    where: str
    basis: Float[Tensor, "k d"]
    clean: Float[Tensor, " pair"]
    corrupted: Float[Tensor, " pair"]
    patched: Float[Tensor, " pair"]
    whole: Float[Tensor, " pair"]
    hit: Bool[Tensor, " pair"]
    hit_whole: Bool[Tensor, " pair"]

    @property
    def effect(self) -> Float[Tensor, " pair"]:
        """Patched − clean logit difference: negative where the patch moves the answer."""
        return self.patched - self.clean

    @property
    def fldd(self) -> Estimate:
        """Fractional logit difference decrease of the subspace; see `fldd`."""
        return fldd(self.patched, self.clean)

    @property
    def flipped(self) -> Estimate:
        """Share of pairs whose logit difference the patch makes negative."""
        return bootstrap((self.patched < 0).float())

    @property
    def accuracy(self) -> Estimate:
        """Interchange accuracy: share of pairs where the corrupted prompt's answer is the likeliest of all."""
        return bootstrap(self.hit.float())

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per pair."""
        import pandas as pd

        names = ("clean", "corrupted", "patched", "whole", "effect", "hit", "hit_whole")
        return pd.DataFrame({"pair": range(len(self.clean)), **{n: getattr(self, n).tolist() for n in names}})

    def plot(self) -> "plotly.graph_objects.Figure":
        """Draw the mean logit differences, with 95 % intervals over pairs."""
        from interp.report.figures import Axis
        from interp.report.intervals import interval_bars

        names = {"clean": self.clean, "subspace": self.patched, "whole site": self.whole, "corrupted": self.corrupted}
        return interval_bars(
            [bootstrap(values) for values in names.values()],
            labels=Axis("", list(names)),
            title=f"{len(self.basis)} of {self.basis.shape[1]} dimensions of {self.site}, from the corrupted prompt",
            value="logit difference",
        )

    def summary(self) -> str:
        """Give the effects of the subspace and of the whole site."""
        share, every = self.fldd, fldd(self.whole, self.clean)
        accuracy = bootstrap(self.hit_whole.float())
        return "\n".join(
            [
                f"{self.site} at {self.where}: {len(self.basis)} of {self.basis.shape[1]} dimensions, "
                f"{len(self.clean)} pairs",
                f"logit difference: clean {float(self.clean.mean()):.4g}, corrupted {float(self.corrupted.mean()):.4g}",
                f"subspace: FLDD {share}, interchange accuracy {self.accuracy}, sign flipped {self.flipped}",
                f"whole site: FLDD {every}, interchange accuracy {accuracy}",
            ]
        )


def fldd(patched: Float[Tensor, " pair"], clean: Float[Tensor, " pair"], *, seed: int = 0) -> Estimate:
    """Return 1 − mean(patched) / mean(clean) with its 95 % bootstrap interval over pairs: 0 no effect, 1 undecided.

    NaN where the clean mean is within 3 standard errors of zero, for then nothing is divided by it.

    Args:
        patched: logit differences of the patched runs.
        clean: those of the clean runs, of the same pairs.
        seed: of the resampling.

    Source: "fractional logit difference decrease" of Makelov, Lange and Nanda (2023), arXiv 2311.17030, §4.
    """
    p, c = patched.double(), clean.double()
    error = float(c.std() / len(c) ** 0.5) if len(c) > 1 else 0.0
    if not abs(float(c.mean())) > max(3 * error, 1e-6):
        return Estimate(torch.nan, torch.nan, torch.nan)
    drawn = torch.randint(len(c), (_RESAMPLES, len(c)), generator=torch.Generator().manual_seed(seed))
    shares = 1 - p[drawn].mean(1) / c[drawn].mean(1)
    low, high = shares.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(float(1 - p.mean() / c.mean()), low, high)


def subspace_patch(
    hm: HookManager,
    pairs: PromptPairs | PairTokens,
    site: Site | str,
    directions: Float[Tensor, "*k d"],
    *,
    where: Places = "end",
    batch_size: int = 64,
) -> SubspaceResult:
    """Put a subspace of the corrupted prompts' activation into the runs of the clean ones.

    Cost: 3 forwards per clean prompt, 1 per corrupted one, and both up to the site. Memory: 2 d
    numbers per patched position, and one batch.

    Args:
        hm: The model.
        pairs: Clean and corrupted prompts with answers and foils; their lengths may differ.
        site: One site with positions. Where it has heads, they stand side by side (d = n_heads · d_head), unless
            `where` names one.
        directions: [d] or [k d], independent of each other; they need not be orthogonal or unit.
        where: Which positions: the name of a span of both sides, a `Where`, or one for (clean, corrupted). The k-th
            position selected in one side's row corresponds to the k-th of the other's.
        batch_size: Pairs per forward.

    Returns:
        Logit differences per pair with nothing, the subspace and everything replaced.

    Raises:
        DataError: Pairs without foils.
        ShapeError: Directions that are not d wide, or depend on each other.
        SiteError, WhereError: No such place, or another number of positions on the other side.

    Source: Geiger et al. (2024), arXiv 2303.02536, §3, and Makelov, Lange and Nanda (2023), arXiv 2311.17030, §2.
    Departure: interchange accuracy is over the answers and foils of all pairs, not over the vocabulary.
    """
    task = Interchange.of(hm, pairs, site, where=where, batch_size=batch_size)
    labels = Labels.of(task.pairs)
    basis = orthonormal(directions)
    if basis.shape[1] != task.width:
        raise ShapeError(f"directions are {basis.shape[1]} wide; {task.site.short} there is {task.width} wide")
    clean, corrupted = task.outcome(None, labels), task.corrupted_outcome(labels)
    for name, side in (("clean", clean), ("corrupted", corrupted)):
        refuse_nan(side.logit_diff, "the logit difference", name)
    patched, whole = task.outcome(task.subspace(basis), labels), task.outcome(task.whole(), labels)
    settings = {"site": task.site.short, "where": described(where), "k": len(basis)}
    return SubspaceResult(
        provenance=Provenance.of(hm, settings=settings, data=(task.pairs.clean.ids, task.pairs.corrupted.ids)),
        site=task.site.short,
        where=described(where),
        basis=basis.cpu(),
        clean=clean.logit_diff,
        corrupted=corrupted.logit_diff,
        patched=patched.logit_diff,
        whole=whole.logit_diff,
        hit=patched.hit,
        hit_whole=whole.hit,
    )
