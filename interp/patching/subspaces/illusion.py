"""Does a direction that steers an answer carry it? The checks that tell a steered path from one that was used.

Source: Makelov, Lange and Nanda (2023), "Is This the Subspace You Are Looking for? An Interpretability Illusion for
Subspace Activation Patching", arXiv 2311.17030, and the answer to it, Wu et al. (2024), arXiv 2401.12631, "A Reply".
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.errors import ConfigError, ShapeError, SiteError
from interp.core.manager import HookManager
from interp.core.result import Provenance, Result
from interp.core.site import Site
from interp.core.stats import Estimate, bootstrap
from interp.core.subspace import orthonormal, random_basis
from interp.data.pair_tokens import PairTokens
from interp.data.pairs import PromptPairs
from interp.patching.subspaces.das import DAS
from interp.patching.subspaces.interchange import Interchange, Labels, Outcome, Places, described
from interp.patching.subspaces.subspace import fldd
from interp.patching.subspaces.verdict import CONSISTENT, Evidence, weighed

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

__all__ = ["IllusionOptions", "IllusionReport", "illusion"]

_WHOLE = "whole component"


@dataclass(frozen=True, kw_only=True)
class IllusionOptions:
    """What counts as an effect, as silence and as dormant, and how many placebos are drawn.

    Args:
        min_effect: the FLDD from which on the direction has an effect at all.
        silent: the share of the direction's FLDD up to which a part, or the whole component, does nothing.
        dormant: how far a part that is read and does nothing moves between clean and corrupted prompts, at most, to be
            called dormant; 1 is what a random direction moves.
        rank_tol: singular values of the reading weights below this share of the largest count as 0.
        n_placebo: random directions.
        batch_size: pairs per forward.
        seed: of the placebos.

    Raises:
        ConfigError: a number out of range.
    """

    min_effect: float = 0.1
    silent: float = 1 / 3
    dormant: float = 0.5
    rank_tol: float = 1e-5
    n_placebo: int = 8
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("min_effect", "silent", "dormant", "rank_tol"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected a number above 0")
        for name in ("n_placebo", "batch_size"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected a whole number ≥ 1")


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class IllusionReport(Result):
    """The effects of a direction, of its parts, of placebos and of the whole component, and what they support.

    Attributes:
        site: Short name of the site.
        where: The positions, as text.
        direction: The unit direction.
        read_share: |read part|² of it: 1 if downstream weights read all of it, 0 if nothing.
        read_rank: How many of the d dimensions are read.
        clean: Logit difference of the clean prompts.
        corrupted: That of the corrupted prompts.
        patched: Per patch ("direction", "read part", "unread part", "placebo", "whole component"), the logit difference
            of the clean prompts; for placebos their mean. Parts that are zero are left out.
        hits: Per patch, whether the corrupted prompt's answer became the likeliest.
        placebos: FLDD of each placebo.
        moved: Per direction, how far it moves between the prompts of a pair (root mean square), 1 being a random
            direction.
        spread: Per direction, its standard deviation over all prompts, 1 being a random direction.
        explained: Per direction, the share of its variance over prompts that labels explain (ε², about 0 by chance).
        controls: Where the direction came from `fit_das`, its accuracies and its controls'.
        verdict: What the evidence supports, in one phrase.
        evidence: The findings behind it.
    """

    title: ClassVar[str] = "Does a direction carry the answer?"
    site: str
    where: str
    direction: Float[Tensor, " d"]
    read_share: float
    read_rank: int
    clean: Float[Tensor, " pair"]
    corrupted: Float[Tensor, " pair"]
    patched: dict[str, Tensor]
    hits: dict[str, Tensor]
    placebos: list[float]
    moved: dict[str, float]
    spread: dict[str, float]
    explained: dict[str, float]
    controls: dict[str, Tensor]
    verdict: str
    evidence: list[str]

    @property
    def fldd(self) -> dict[str, Estimate]:
        """Fractional logit difference decrease per patch, with its 95 % interval over pairs."""
        return {name: fldd(values, self.clean) for name, values in self.patched.items()}

    @property
    def flagged(self) -> bool:
        """Whether all signs of an illusion are there; that is no proof of one."""
        return self.verdict == CONSISTENT

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per patch."""
        import pandas as pd

        nothing = float("nan")
        rows = []
        for name, e in self.fldd.items():
            row = {"patch": name, "fldd": e.mean, "low": e.low, "high": e.high}
            row["accuracy"] = float(self.hits[name].mean())
            for what in ("moved", "spread", "explained"):
                row[what] = getattr(self, what).get(name, nothing)
            rows.append(row)
        return pd.DataFrame(rows)

    def plot(self) -> "plotly.graph_objects.Figure":
        """Draw the effect of each patch, with 95 % intervals over pairs."""
        from interp.report.figures import Axis
        from interp.report.intervals import interval_bars

        found = self.fldd
        return interval_bars(
            list(found.values()),
            labels=Axis("", list(found)),
            title=f"One direction of {self.site}, and its parts",
            value="FLDD (1: undecided, 2: flipped)",
        )

    def summary(self) -> str:
        """Say what the evidence supports, then the findings."""
        lines = [f"{self.site} at {self.where}, {len(self.clean)} pairs: {self.verdict}"]
        lines += [f"- {text}" for text in self.evidence]
        lines += [f"- fit, {name}: IIA {bootstrap(values)}" for name, values in self.controls.items()]
        return "\n".join(lines)


def illusion(
    hm: HookManager,
    pairs: PromptPairs | PairTokens,
    site: Site | str,
    direction: Float[Tensor, "*one d"] | DAS,
    *,
    reads: Float[Tensor, "d m"] | None = None,
    where: Places = "end",
    labels: Int[Tensor, "pair two"] | None = None,
    options: IllusionOptions | None = None,
) -> IllusionReport:
    """Split a direction into what downstream weights read and what they do not, and patch each part alone.

    An illusion in the sense of the paper: the unread part follows the variable but leads nowhere; the read part leads
    to the answer but does not move on this data (it is dormant); patched together the first pushes the second. Then
    each part alone does nothing, and so does the whole component. The report says which of these signs are there. Wu et
    al. argue that they can also come with representations that are in use, so all of them together are consistent with
    an illusion and prove none. Cost: 5 + n_placebo forwards per clean prompt, 1 per corrupted one, and both up to the
    site. Memory: 3 d numbers per selected position, and one batch.

    Args:
        hm: The model.
        pairs: Clean and corrupted prompts with answers and foils.
        site: One site with positions.
        direction: A vector as wide as the site (or the head), or what `fit_das` gave with k = 1, whose own controls
            then stand in the report.
        reads: The weights through which the rest of the model reads the site, x @ reads. By default W_out for mlp_post
            and W_O for z; elsewhere you have to say, such as the W_Q of the heads that matter side by side. What is
            read through other weights counts as unread.
        where: As for `subspace_patch`.
        labels: A category of each pair's clean and corrupted prompt, to see what follows it; by default the first
            answer and the first foil.
        options: The thresholds.

    Returns:
        The effects, and the evidence in words.

    Raises:
        DataError: Pairs without foils.
        ShapeError: A direction or weights that do not fit the site, or more than one direction.
        SiteError: A site whose reading weights are not known, and none given.

    Source: Makelov, Lange and Nanda (2023), §3 and §5. Departures: parts are patched as unit directions; thresholds are
    on bootstrap bounds; "dormant" is measured against random directions of the same site.
    """
    chosen = options or IllusionOptions()
    task = Interchange.of(hm, pairs, site, where=where, batch_size=chosen.batch_size)
    v = _direction(direction, task)
    read = _read_basis(hm, task, reads, chosen.rank_tol)
    sides, wanted, parts = _labels(task, labels), Labels.of(task.pairs), _parts(v, read)
    found, placebos = _effects(task, parts, wanted, chosen)
    clean = task.outcome(None, wanted).logit_diff
    evidence = Evidence(
        clean=clean,
        patched={name: logit_diff for name, (logit_diff, _) in found.items()},
        placebos=[fldd(logit_diff, clean).mean for logit_diff, _ in placebos],
        moved={name: _moved(task, u) for name, u in parts.items()},
        explained={name: _explained(task, u, sides) for name, u in parts.items()},
    )
    verdict, lines = weighed(evidence, min_effect=chosen.min_effect, silent=chosen.silent, dormant=chosen.dormant)
    return IllusionReport(
        provenance=_provenance(task, where, reads, chosen),
        site=task.site.short,
        where=described(where),
        direction=v.cpu(),
        read_share=float((read @ v).square().sum()),
        read_rank=len(read),
        clean=clean,
        corrupted=task.corrupted_outcome(wanted).logit_diff,
        patched=evidence.patched,
        hits={name: hits for name, (_, hits) in found.items()},
        placebos=evidence.placebos,
        moved=evidence.moved,
        spread={name: _spread(task, u) for name, u in parts.items()},
        explained=evidence.explained,
        controls=dict(direction.hits) if isinstance(direction, DAS) else {},
        verdict=verdict,
        evidence=lines,
    )


_Effect = tuple[Tensor, Tensor]
"""Logit differences and hits per pair."""


def _effects(
    task: Interchange, parts: dict[str, Tensor], labels: Labels, options: IllusionOptions
) -> tuple[dict[str, _Effect], list[_Effect]]:
    """Patch each part alone, random directions moved as far as the direction, and the whole component."""
    size = (task.shift @ parts["direction"]).abs()
    drawn = [random_basis(1, task.width, seed=1000 * (options.seed + 1) + n) for n in range(options.n_placebo)]
    placebos = [_effect(task.outcome(task.added(task.same_size(u, size)), labels)) for u in drawn]
    found = {name: _effect(task.outcome(task.subspace(u[None]), labels)) for name, u in parts.items()}
    means = [torch.stack([p[at] for p in placebos]).mean(0) for at in (0, 1)]
    return found | {"placebo": (means[0], means[1]), _WHOLE: _effect(task.outcome(task.whole(), labels))}, placebos


def _provenance(task: Interchange, where: Places, reads: Tensor | None, options: IllusionOptions) -> Provenance:
    settings = {"site": task.site.short, "where": described(where), "reads": "default" if reads is None else "given"}
    settings |= {name: getattr(options, name) for name in ("min_effect", "silent", "dormant", "rank_tol", "n_placebo")}
    data = (task.pairs.clean.ids, task.pairs.corrupted.ids)
    return Provenance.of(task.hm, settings=settings, data=data, seed=options.seed)


def _effect(outcome: Outcome) -> _Effect:
    return outcome.logit_diff, outcome.hit.float()


def _direction(given: Tensor | DAS, task: Interchange) -> Float[Tensor, " d"]:
    rows = orthonormal(given.basis if isinstance(given, DAS) else given)
    if rows.shape != (1, task.width):
        raise ShapeError(f"got directions {tuple(rows.shape)}; {task.site.short} there needs one, {task.width} wide")
    return rows[0].to(task.shift)


def _parts(v: Tensor, read: Tensor) -> dict[str, Tensor]:
    """The direction and the parts of it, as unit vectors; a part that is zero is left out."""
    seen = (v @ read.T) @ read
    named = {"direction": v, "read part": seen, "unread part": v - seen}
    return {name: part / part.norm() for name, part in named.items() if float(part.norm()) > 1e-3}


def _read_basis(hm: HookManager, task: Interchange, reads: Tensor | None, tol: float) -> Float[Tensor, "rank d"]:
    """Orthonormal rows that span the directions in which the weights see a difference."""
    kind, layer = task.site.kind, task.site.layer
    if reads is not None:
        weight = reads
    elif kind == "mlp_post" and layer is not None:
        weight = hm.weights[layer].W_out
    elif kind == "z" and layer is not None:
        heads = hm.weights[layer].W_O
        weight = heads.flatten(0, 1) if task.head is None else heads[task.head]
    else:
        raise SiteError(
            f"what reads {task.site.short} is not one weight; give reads=[d m] (x @ reads), such as the W_Q of the "
            "heads that matter side by side"
        )
    if weight.ndim != 2 or len(weight) != task.width:
        raise ShapeError(f"reads has shape {tuple(weight.shape)}; expected [d m] with d = {task.width}, for x @ reads")
    u, size, _ = torch.linalg.svd(weight.detach().to(task.shift), full_matrices=False)
    return u[:, size > tol * size.max()].T


def _moved(task: Interchange, u: Tensor) -> float:
    typical = task.shift.square().sum(1).mean() / task.width
    return float(((task.shift @ u).square().mean() / typical.clamp(min=1e-30)).sqrt())


def _spread(task: Interchange, u: Tensor) -> float:
    x = torch.cat([task.clean, task.corrupted]).to(task.shift)
    centred = x - x.mean(0)
    typical = centred.square().sum(1).mean() / task.width
    return float(((centred @ u).square().mean() / typical.clamp(min=1e-30)).sqrt())


def _labels(task: Interchange, given: Tensor | None) -> Int[Tensor, " two_n"]:
    """The category of each selected position, the clean side's first."""
    both = torch.stack([task.pairs.answer_ids[:, 0], task.pairs.foil_ids[:, 0]], 1) if given is None else given
    if both.shape != (len(task.pairs), 2) or both.is_floating_point():
        raise ShapeError(f"labels {tuple(both.shape)} {both.dtype}: expected categories [pair 2] for {len(task.pairs)}")
    return torch.cat([both[task.pair_of, side] for side in (0, 1)]).cpu()


def _explained(task: Interchange, u: Tensor, labels: Tensor) -> float:
    """ε²: the share of the variance that lies between categories, less what chance gives; NaN where nothing varies."""
    x = (torch.cat([task.clean, task.corrupted]).to(task.shift) @ u).double().cpu()
    _, group = labels.unique(return_inverse=True)
    counts = torch.bincount(group).double()
    means = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, group, x) / counts
    total, within = float((x - x.mean()).square().sum()), float((x - means[group]).square().sum())
    if len(x) <= len(counts) or total <= 1e-12 * float(x.square().sum()):
        return float("nan")
    return 1 - (within / (len(x) - len(counts))) / (total / (len(x) - 1))
