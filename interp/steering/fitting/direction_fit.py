"""`fit_with_controls`: a direction with random and shuffled ones beside it, judged on groups that no fit has seen."""

import math
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.direction import Direction, SiteScale
from interp.core.errors import ConfigError, DataError, SiteError
from interp.core.manager import HookManager
from interp.core.result import Result
from interp.core.separation import separation
from interp.core.site import Site
from interp.core.stats import Estimate
from interp.core.where import Where
from interp.data.concept_tokens import ConceptTokens
from interp.data.contrast import Contrast
from interp.data.gather import Gathered, gather
from interp.data.pairs import PromptPairs
from interp.steering.fitting.fit import check_method, concept_tokens, direction_of, relabelled, telling
from interp.steering.fitting.methods import METHODS, PAIRED, solve

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

__all__ = ["FIGURES", "BestSite", "DirectionFit", "FitOptions", "fit_with_controls"]

FIGURES = ("auroc", "accuracy", "d")
"""What is measured on held-out groups, in the order of `DirectionFit.figures`."""

_OURS = "direction"
# What a direction is held to: no more than these reach is chance.
_RIVALS = ("random", "null")


@dataclass(frozen=True)
class FitOptions:
    """How a fit is judged; every default is the usual choice.

    Args:
        share: of the groups, held out.
        pool: what one example is, as for `gather`.
        compare: methods whose cosine with the direction is given; those that need pairs are left out where there are
            none.
        n_bootstrap: resamples of the intervals.
        batch_size: rows per forward.

    Raises:
        ConfigError: an unknown method to compare with.
    """

    share: float = 0.3
    pool: str = "each"
    compare: tuple[str, ...] = ("mean_difference", "pca", "lat", "lda")
    n_bootstrap: int = 500
    batch_size: int = 32

    def __post_init__(self) -> None:
        unknown = [method for method in self.compare if method not in METHODS]
        if unknown:
            raise ConfigError(f"compare={unknown[0]!r}: expected some of {', '.join(METHODS)}")


class BestSite(NamedTuple):
    """Where the held-out classes are furthest apart, and what the best control does there.

    Attributes:
        site: its short name.
        auroc: of the direction, with its interval.
        control: the highest AUROC there of a random direction, or of a shuffled fit under shuffled labels.
    """

    site: str
    auroc: Estimate
    control: float


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class DirectionFit(Result):
    """A direction, its controls, and how well each tells held-out examples apart.

    Attributes:
        name: the concept.
        method: how the direction was found.
        vectors: by name ("direction", "random 0", "shuffled 0", …) and site. Shuffled ones were found by the same
            method under labels that say nothing.
        scale, stats: of the direction, by site; as in `Direction`.
        kinds: names of the rows of `figures`: those of `vectors`, and "null 0", …: what a shuffled fit reaches on
            held-out examples with shuffled labels, which is chance unless something leaks.
        figures: of held-out groups: AUROC, balanced accuracy at the training threshold and Cohen's d, each with its
            95 % interval; only the direction has intervals. Random directions have the sign that the training labels
            give them. Shuffled ones keep their own: of pairs they often lie along the concept, either way round.
        cosines: of the direction with those of other methods, by method; NaN where one cannot be fitted.
        n_train, n_held: examples and groups on either side.
    """

    title: ClassVar[str] = "Direction and its controls"
    name: str
    method: str
    vectors: dict[str, dict[str, Tensor]]
    scale: dict[str, tuple[float, ...]]
    stats: dict[str, dict[str, float]]
    kinds: list[str]
    figures: Float[Tensor, "kind site figure bound"]
    cosines: dict[str, list[float]]
    n_train: tuple[int, int]
    n_held: tuple[int, int]
    read_at: str
    folded: bool
    notes: list[str]

    @property
    def sites(self) -> list[str]:
        """Short names of the sites, in order."""
        return list(self.vectors[_OURS])

    @property
    def direction(self) -> Direction:
        """The direction, fitted on the training groups alone."""
        return self._made(_OURS, self.method, {s: SiteScale(*held) for s, held in self.scale.items()}, self.stats)

    @property
    def controls(self) -> dict[str, Direction]:
        """Random and shuffled directions by name, each as long as the direction: to steer with beside it."""
        names = [name for name in self.vectors if name != _OURS]
        return {name: self._made(name, name.split()[0], {}, {}) for name in names}

    def _made(
        self, kind: str, method: str, scale: Mapping[str, SiteScale], stats: Mapping[str, Mapping[str, float]]
    ) -> Direction:
        return Direction(
            vectors=self.vectors[kind],
            method=method,
            model=self.provenance,
            read_at=self.read_at,
            scale=scale,
            stats=stats,
            name=self.name if kind == _OURS else f"{self.name}: {kind}",
            folded=self.folded,
            notes=tuple(self.notes),
        )

    def held_out(self, site: Site | str, figure: str = "auroc", kind: str = _OURS) -> Estimate:
        """Return a figure of the held-out groups.

        Args:
            site: one of `sites`.
            figure: one of `FIGURES`.
            kind: one of `kinds`.

        Raises:
            SiteError: a site without a direction.
            ConfigError: another figure or kind.
        """
        short = Site(site).short
        if short not in self.sites:
            raise SiteError(f"nothing was fitted at {short}; there is {', '.join(self.sites)}")
        if figure not in FIGURES or kind not in self.kinds:
            raise ConfigError(
                f"figure={figure!r} of kind={kind!r}: expected one of {', '.join(FIGURES)} of {', '.join(self.kinds)}"
            )
        row, column = self.kinds.index(kind), self.sites.index(short)
        return Estimate(*self.figures[row, column, FIGURES.index(figure)].tolist())

    def control_values(self, figure: str = "auroc") -> Float[Tensor, "control site"]:
        """Return a figure of the random directions, and of shuffled fits judged under shuffled labels."""
        rows = [i for i, kind in enumerate(self.kinds) if kind.split()[0] in _RIVALS]
        return self.figures[rows, :, FIGURES.index(figure), 0]

    def best_site(self) -> BestSite:
        """Return the site with the highest held-out AUROC; of equal ones that with the largest d."""
        values = self.figures[0, :, :, 0].nan_to_num(-math.inf).tolist()
        at = max(range(len(self.sites)), key=lambda i: (values[i][0], values[i][2]))
        site = self.sites[at]
        return BestSite(site, self.held_out(site), float(self.control_values()[:, at].max()))

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per direction and site: held-out figures, and of the direction itself its diagnostics."""
        import pandas as pd

        rows = []
        for i, kind in enumerate(self.kinds):
            for j, site in enumerate(self.sites):
                row: dict[str, object] = {"kind": kind, "site": site}
                for k, figure in enumerate(FIGURES):
                    value, low, high = self.figures[i, j, k].tolist()
                    row |= {figure: value, f"{figure}_low": low, f"{figure}_high": high}
                if kind == _OURS:
                    row |= dict(self.stats[site])
                    row |= {f"cosine_{method}": held[j] for method, held in self.cosines.items()}
                rows.append(row)
        return pd.DataFrame(rows)

    def plot(self) -> "plotly.graph_objects.Figure":
        """Draw the held-out AUROC of the direction over the sites, with the mean of each kind of control."""
        from interp.report.bands import band_lines
        from interp.report.figures import Axis

        series = {self.method: self.figures[0, :, 0]}
        told = {"random": "random", "shuffled": "shuffled fit", "null": "shuffled fit on shuffled labels"}
        for kind, words in told.items():
            rows = [i for i, name in enumerate(self.kinds) if name.split()[0] == kind]
            series[f"{words}, mean of {len(rows)}"] = self.figures[rows, :, 0].mean(0)
        title = f"How well a direction tells {self.name} apart, held out"
        x = Axis("site", self.sites)
        return band_lines(series, x=x, title=title, value="AUROC", reference=0.5, reference_is="chance")

    def summary(self) -> str:
        """Say what was fitted on what, and where it separates best."""
        best = self.best_site()
        head = (
            f"{self.name!r} by {self.method} at {len(self.sites)} sites, on {self.n_train[0]} examples of "
            f"{self.n_train[1]} groups; judged on {self.n_held[0]} of {self.n_held[1]}"
        )
        d, stats = self.held_out(best.site, "d"), self.stats[best.site]
        lines = [
            head,
            f"best at {best.site}: AUROC {best.auroc}, best control {best.control:.4g}; d {d}",
            f"there: consistency of pairs {stats['consistency']:.3g}, separation {stats['separation']:.3g}, length "
            f"{stats['relative_norm']:.3g} of the activation's",
        ]
        return "\n".join([*lines, *self.notes])


def fit_with_controls(
    hm: HookManager,
    data: Contrast | ConceptTokens | PromptPairs,
    sites: Sequence[Site | str] | Site | str,
    *,
    method: str = "mean_difference",
    where: Where | None = None,
    n_controls: int = 3,
    seed: int = 0,
    options: FitOptions | None = None,
) -> DirectionFit:
    """Fit a direction with its controls on some groups, and judge all of them on the others.

    Controls are random directions, and those that the same method finds under shuffled labels. All are judged with the
    true labels; shuffled fits also with shuffled ones, which shows what chance is here.

    Args:
        hm: the model.
        data: as for `fit_direction`.
        sites: names or globs.
        method: one of `interp.steering.fitting.fit.METHODS`.
        where: the token rule, as for `fit_direction`.
        n_controls: of each kind, at least one.
        seed: of the split, of methods that draw, and of the first control.
        options: how it is judged.

    Warns:
        UserWarning: at some sites a control separates held-out examples as well as the direction.

    Raises:
        ConfigError: an unknown method, or no controls.
        DataError: as for `fit_direction`, or a single group.
    """
    how = FitOptions() if options is None else options
    if n_controls < 1:
        raise ConfigError(f"n_controls={n_controls}: a fit is judged beside its controls; give at least 1")
    tokens = concept_tokens(hm, data, where=where)
    train, held = tokens.split(how.share, seed=seed)
    for part in (train, held):
        check_method(method, part)
    seen = gather(hm, train, sites, pool=how.pool, batch_size=how.batch_size)
    train, seen = telling(train, seen)
    unseen = gather(hm, held, list(seen), pool=how.pool, batch_size=how.batch_size)
    found = direction_of(hm, train, seen, method=method, where=where, pool=how.pool, seed=seed)
    vectors = {_OURS: dict(found.vectors)}
    kinds, figures = [_OURS], [[_judged(seen[s], unseen[s], v, how, seed) for s, v in found.vectors.items()]]
    for i in range(n_controls):
        blind, dark = train.shuffled(seed=seed + 1 + i), held.shuffled(seed=seed + 1001 + i)
        wrong = {site: relabelled(examples, blind, how.pool) for site, examples in seen.items()}
        drawn, shuffled, null = {}, {}, []
        for site, examples in seen.items():
            draw = torch.Generator().manual_seed(zlib.crc32(f"control {seed + 1 + i} {site}".encode()))
            drawn[site] = solve(examples, "random", draw).vector
            v = _blind(wrong[site], method, draw)
            shuffled[site] = v * found.vectors[site].norm() / v.norm()
            null.append(_judged(wrong[site], relabelled(unseen[site], dark, how.pool), v, how, None))
        vectors |= {f"random {i}": drawn, f"shuffled {i}": shuffled}
        for kind, some, labelled in ((f"random {i}", drawn, seen), (f"shuffled {i}", shuffled, wrong)):
            kinds.append(kind)
            figures.append([_judged(labelled[s], unseen[s], v, how, None) for s, v in some.items()])
        kinds.append(f"null {i}")
        figures.append(null)
    table = torch.tensor(figures, dtype=torch.float64)
    notes = [*found.notes, *_in_both(train, held), *_as_good(table, kinds, found.sites, method)]
    return DirectionFit(
        provenance=found.model,
        name=found.name,
        method=method,
        vectors=vectors,
        scale={s: tuple(v) for s, v in found.scale.items()},
        stats={s: dict(v) for s, v in found.stats.items()},
        kinds=kinds,
        figures=table,
        cosines=_cosines(found, seen, how, method),
        n_train=(len(next(iter(seen.values()))), len(train.groups.unique())),
        n_held=(len(next(iter(unseen.values()))), len(held.groups.unique())),
        read_at=found.read_at,
        folded=found.folded,
        notes=notes,
    )


def _blind(examples: Gathered, method: str, draw: torch.Generator) -> Tensor:
    """What a method finds under labels that say nothing; where they leave no difference at all, a vector at random."""
    one, zero = (examples.of_class(code).double().mean(0) for code in (1, 0))
    if bool((one == zero).all()):
        return torch.randn(one.shape, generator=draw)
    return solve(examples, method, draw).vector


def _judged(
    seen: Gathered, unseen: Gathered, vector: Tensor, how: FitOptions, seed: int | None
) -> list[tuple[float, float, float]]:
    """Held-out figures of one vector; the threshold and the sign come from the training examples."""
    v = vector.reshape(-1).double()
    v = v / v.norm()
    along, new = (part.x.reshape(len(part), -1).double() @ v for part in (seen, unseen))
    one, zero = along[seen.y == 1].mean(), along[seen.y == 0].mean()
    sign = -1.0 if float(one) < float(zero) else 1.0
    resamples = 0 if seed is None else how.n_bootstrap
    found = separation(
        sign * new,
        unseen.y == 1,
        threshold=sign * float(one + zero) / 2,
        groups=unseen.group,
        n_bootstrap=resamples,
        seed=seed or 0,
    )
    return [(e.mean, e.low, e.high) for e in found]


def _cosines(found: Direction, seen: Mapping[str, Gathered], how: FitOptions, method: str) -> dict[str, list[float]]:
    paired = all(bool((part.pair >= 0).all()) for part in seen.values())
    others = [m for m in how.compare if m != method and (paired or m not in PAIRED)]
    cosines: dict[str, list[float]] = {}
    for other in others:
        for site, examples in seen.items():
            try:
                v = solve(examples, other, torch.Generator().manual_seed(0)).vector.flatten().double()
            except DataError:  # too few examples for this one, which was not asked for
                cosines.setdefault(other, []).append(math.nan)
                continue
            cosine = torch.cosine_similarity(v, found[site].flatten().double(), dim=0)
            cosines.setdefault(other, []).append(float(cosine))
    return cosines


def _in_both(train: ConceptTokens, held: ConceptTokens) -> list[str]:
    """A note where held-out rows were fitted on as well: the split keeps groups apart, not texts."""
    known, new = ({tuple(t.ids[i, t.mask[i]].tolist()) for i in range(len(t))} for t in (train.tokens, held.tokens))
    both = len(known & new)
    if not both:
        return []
    return [f"{both} of {len(new)} held-out texts were fitted on too, in other groups; give equal texts one group"]


def _as_good(table: Tensor, kinds: list[str], sites: list[str], method: str) -> list[str]:
    """A warning, and a note, of sites where a control separates as well as the direction."""
    rows = [i for i, kind in enumerate(kinds) if kind.split()[0] in _RIVALS]
    named = []
    for i, site in enumerate(sites):
        ours, best = (float(v) for v in (table[0, i, 0, 0], table[rows, i, 0, 0].max()))
        # Where both order every pair rightly, the distance of the classes decides.
        if best > ours or (best == ours and float(table[rows, i, 2, 0].max()) >= float(table[0, i, 2, 0])):
            named.append(f"{site} ({ours:.2f}, control {best:.2f})")
    if not named:
        return []
    more = f" and {len(named) - 4} more" if len(named) > 4 else ""
    text = f"a control separates held-out examples as well as {method} at {', '.join(named[:4])}{more}"
    warnings.warn(
        f"{text}; the direction is no better than its controls there: take another site, or more data", stacklevel=3
    )
    return [text]
