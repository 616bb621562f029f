"""Gradients for attribution: at many sites, under a backward rule, at a run or along a path between two runs.

    for weight, run in gradient_runs(hm, corrupted, toward=clean, read=["*.z"], metric=metric, rule="relp"):
        run["3.z"], run.grad["3.z"]

Source: integrated gradients: Sundararajan et al. (2017), arXiv 1703.01365; of inputs and of activations as in Hanna et
al. (2024), arXiv 2403.17806. Departure: the points are midpoints by default; "left" are theirs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from interp.core.errors import ConfigError, nearest
from interp.core.intervention import Intervention
from interp.core.place import Place
from interp.core.rules import rule_edits
from interp.core.run import Run
from interp.core.site import Site
from interp.core.text import Tokens
from interp.core.where import Where

if TYPE_CHECKING:
    from interp.core.manager import HookManager

__all__ = ["PATHS", "POINTS", "Interpolate", "Path", "gradient_run", "gradient_runs", "path_of"]

PATHS = ("none", "inputs_ig", "activations_ig")
POINTS = ("midpoint", "left", "gauss")

INPUT = Site("0.resid_pre")


@dataclass(frozen=True)
class Path:
    """Where gradients are taken: at one run, or at points between two and averaged.

    Args:
        kind: "none"; "inputs_ig": between the two embeddings, the model running on from each point; "activations_ig":
            between the two values of each site on its own, the rest of the run as it was.
        steps: how many points; not for "none".
        points: "midpoint", "left" (0, 1/steps, …: where the path begins counts and its end does not) or "gauss"
            (Gauss-Legendre).

    Raises:
        ConfigError: an unknown kind or rule for the points, or no steps.
    """

    kind: str = "none"
    steps: int = 5
    points: str = "midpoint"

    def __post_init__(self) -> None:
        for name, known in (("kind", PATHS), ("points", POINTS)):
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(f"Path({name}={value!r}): {nearest(str(value), known) or f'one of {known}'}")
        if type(self.steps) is not int or self.steps < 1:
            raise ConfigError(f"Path(steps={self.steps!r}): expected a whole number ≥ 1")

    @property
    def places(self) -> list[tuple[float, float]]:
        """The points as shares of the way, and their weights, which sum to 1; one at 0 for "none"."""
        n = self.steps
        if self.kind == "none":
            return [(0.0, 1.0)]
        if self.points == "gauss":
            from numpy.polynomial.legendre import leggauss

            at, weight = leggauss(n)
            return [((float(a) + 1) / 2, float(w) / 2) for a, w in zip(at, weight, strict=True)]
        shift = 0.5 if self.points == "midpoint" else 0.0
        return [((k + shift) / n, 1.0 / n) for k in range(n)]


def path_of(path: str | Path) -> Path:
    """Return a path given by name, with the usual steps.

    Raises:
        ConfigError: no such path.
    """
    return path if isinstance(path, Path) else Path(path)


@dataclass(frozen=True, eq=False)
class Interpolate(Intervention):
    """Go part of the way from an activation to another value: x ← x + share · (value − x).

    Args:
        site: as for every intervention.
        value: a tensor in the shapes that `Replace` takes, or a `Run` that has read the site.
        share: 0 is x, 1 is the value.
        where: as for `Add`.
    """

    value: Any
    share: float = 1.0
    where: Where = field(default_factory=Where)

    @property
    def may_do_nothing(self) -> bool:
        """The two may be the same, and the share 0."""
        return True

    def edit(self, x: Tensor, place: Place) -> Tensor:
        """Return the point between."""
        return x + self.share * (place.fit(self.value, x, "Interpolate") - x)


def gradient_run(
    hm: "HookManager",
    tokens: Tokens,
    *,
    read: Sequence[Site | str],
    metric: Callable[[Run], Float[Tensor, " batch"]],
    rule: str = "plain",
    write: Sequence[Intervention] = (),
) -> Run:
    """Return a run with its values and the metric's gradients at many sites, under a backward rule.

    Cost: one forward and one backward. Memory: twice the reads, plus the model's own graph.

    Args:
        hm: the model.
        tokens: the rows.
        read: the sites.
        metric: maps a run to one number per row; sees the last token's logits.
        rule: one of `interp.core.rules.RULES`.
        write: further edits, made before the rule's.
    """
    return hm.run(tokens, read=list(read), write=[*write, *rule_edits(hm, rule)], grad=metric, logits="last")


def gradient_runs(
    hm: "HookManager",
    tokens: Tokens,
    *,
    toward: Mapping[Site, Tensor] | Run | None,
    read: Sequence[Site | str],
    metric: Callable[[Run], Float[Tensor, " batch"]],
    rule: str = "plain",
    path: Path | None = None,
    write: Sequence[Intervention] = (),
) -> Iterator[tuple[float, Run]]:
    """Yield the runs whose gradients, weighted and summed, are those of a path, one at a time.

    Cost: a forward and a backward per point. Memory: that of one `gradient_run`.

    Args:
        hm: the model.
        tokens: the rows where the path begins.
        toward: a run of as many rows with the same positions that has read 0.resid_pre, where the path ends; needed
            for "inputs_ig" alone.
        read, metric, rule, write: as for `gradient_run`.
        path: "none" or "inputs_ig"; the first by default.

    Raises:
        ConfigError: a path of activations, whose points differ from site to site, or one without an end.
    """
    path = path or Path()
    if path.kind == "activations_ig" or (path.kind != "none" and toward is None):
        raise ConfigError(f"gradient_runs takes path 'none', or 'inputs_ig' with toward=…; got {path.kind!r}")
    for share, weight in path.places:
        between = [Interpolate(INPUT, toward, share)] if share else []
        yield weight, gradient_run(hm, tokens, read=read, metric=metric, rule=rule, write=[*write, *between])
