"""`fit_probe`: linear probes at every site of one pass, with the controls that say what they are worth."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.classify import METRICS, classify_metrics, group_draws, group_intervals
from interp.core.direction import SiteScale, measure_scale
from interp.core.errors import ConfigError, nearest
from interp.core.fit import Linear, auroc
from interp.core.manager import HookManager
from interp.core.result import Provenance
from interp.core.site import Site
from interp.core.where import Where
from interp.data.concept_tokens import ConceptTokens
from interp.data.contrast import Contrast
from interp.data.pairs import PromptPairs
from interp.data.same_text import row_keys
from interp.probing.examples import FIT, TASKS, TEST, VALIDATION, Examples, Split, read_examples
from interp.probing.fitters import KINDS, balanced_loss, fit_kind
from interp.probing.result import ProbeResult

__all__ = ["ProbeOptions", "fit_probe"]


@dataclass(frozen=True)
class ProbeOptions:
    """How probes are fitted and tested; every default is the usual choice.

    Args:
        test: share of the groups held out for the scores.
        validation: share of the groups that the penalty is chosen on; the probe is then fitted on both.
        l2: penalties to choose from, for logistic and ridge, in units of examples: x is centred and divided by its root
            mean square.
        n_bootstrap: resamples of the test's groups.
        seed: of the split, the controls and the bootstrap.
        batch_size: rows per forward.

    Raises:
        ConfigError: no penalty, one that is not positive, or too few resamples.
    """

    test: float = 0.3
    validation: float = 0.2
    l2: tuple[float, ...] = (1000.0, 100.0, 10.0, 1.0, 0.1)
    n_bootstrap: int = 500
    seed: int = 0
    batch_size: int = 32

    def __post_init__(self) -> None:
        if not isinstance(self.l2, tuple | list) or not self.l2 or not all(0 < v < math.inf for v in self.l2):
            raise ConfigError(f"l2={self.l2}: expected a list of positive penalties to choose from")
        if self.n_bootstrap < 0:
            raise ConfigError(f"n_bootstrap={self.n_bootstrap}: expected 0 or more resamples")

    @property
    def split(self) -> Split:
        """The shares, and the seed of the draw."""
        return Split(self.test, self.validation, self.seed)


def fit_probe(
    hm: HookManager,
    data: Contrast | ConceptTokens | PromptPairs,
    sites: Sequence[Site | str] | Site | str,
    *,
    kind: str = "logistic",
    where: Where | None = None,
    pool: str = "each",
    options: ProbeOptions | None = None,
) -> ProbeResult:
    """Fit a linear probe at every site, choose its penalty, and test it on groups that neither saw.

    Beside each probe two others are fitted in the same way: one of a control task, where each kind of token (or each
    text, where all examples end in a few tokens) has a random class, and one of shuffled labels. A probe that is no
    better than its control reads what the token is, not the concept.

    One pass of the model reads all sites. Several classes are told by one score each, class against the others, the
    largest says which. Memory in bytes: 4 · n · Σ features for the activations, and 2^28 for a call of the solver (one
    fit at least: 32 · n · d). Time of a site: tasks · classes · penalties fits of n · d² a step of Newton's method.

    Args:
        hm: the model.
        data: texts or labelled tokens; a split keeps their groups whole. Of prompt pairs the clean ones have the
            concept.
        sites: names or globs; each gets a probe of its own.
        kind: one of `KINDS`.
        where: the token rule of texts, as for `Contrast.tokens`.
        pool: what one example is, as for `gather`.
        options: shares, penalties, resamples, seed.

    Returns:
        The probes with their scores; `direction()` gives what they read.

    Raises:
        ConfigError: an unknown kind, or shares that leave a part empty.
        DataError: too few groups for three parts with every class in each.

    Source: control tasks and selectivity of Hewitt and Liang (2019, arXiv 1909.03368), §2. Departures: classes of the
    control are drawn at the shares of the concept's; selectivity has an interval.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind={kind!r}: {nearest(kind, KINDS) or 'expected one of ' + ', '.join(KINDS)}")
    how = ProbeOptions() if options is None else options
    read = read_examples(hm, data, sites, where=where, pool=pool, split=how.split, batch_size=how.batch_size)
    found = {site: _Site.fitted(read, site, kind, how) for site in read.held}
    first, test = read.first, read.at(TEST)
    common = torch.bincount(first.y[read.at(FIT)]).argmax()
    t = read.data.tokens
    settings: dict[str, Any] = {"kind": kind, "where": repr(where), "pool": pool, "options": asdict(how)}
    return ProbeResult(
        name=read.data.name,
        kind=kind,
        sites=list(found),
        classes=first.classes,
        values=torch.stack([s.values for s in found.values()]),
        selectivity=torch.stack([s.selectivity for s in found.values()]),
        validation=torch.tensor([s.validation for s in found.values()]),
        majority=float((first.y[test] == common).double().mean()),
        weights={site: s.probe.weight.reshape(-1, *read.held[site].x.shape[1:]) for site, s in found.items()},
        biases={site: s.probe.bias for site, s in found.items()},
        penalties=torch.stack([s.penalties for s in found.values()]),
        scales={site: s.scales for site, s in found.items()},
        sizes=read.sizes,
        test_groups=first.group[test].unique(),
        fitted_on=row_keys(t)[first.row[read.at(FIT, VALIDATION)].unique()].unique(),
        folded=hm.is_folded,
        read_at=_read_at(data, where),
        notes=list(read.notes),
        provenance=Provenance.of(hm, settings=settings, data=(t.ids, t.mask, read.data.labels), seed=how.seed),
    )


def _read_at(data: Contrast | ConceptTokens | PromptPairs, where: Where | None) -> str:
    if isinstance(data, ConceptTokens):
        return "labelled tokens"
    return repr(Where(pos=-1) if where is None else where)


@dataclass(frozen=True, eq=False)
class _Site:
    """What is known of the probes of one site."""

    probe: Linear
    values: Float[Tensor, "task metric 3"]
    selectivity: Float[Tensor, " 3"]
    validation: float
    penalties: Float[Tensor, " task"]
    scales: Float[Tensor, "score 5"]

    @classmethod
    def fitted(cls, read: Examples, site: str, kind: str, how: ProbeOptions) -> "_Site":
        """Fit the probes of every task at one site, and score them."""
        held = read.held[site]
        x = held.x.reshape(len(held), -1)
        tasks = list(read.labels)
        y = torch.stack([_one_hot(read.labels[task], len(held.classes)) for task in tasks])  # [task score n]
        fit, chosen, test = (read.at(part) for part in (FIT, VALIDATION, TEST))
        probes, penalties, validated = _chosen(kind, x, y, (fit, chosen), how)
        draws = group_draws(held.group[test], n_bootstrap=how.n_bootstrap, seed=how.seed)
        scores = torch.einsum("tsd,nd->tns", probes.weight, x[test].double()) + probes.bias[:, None]
        figures = {
            task: classify_metrics(scores[i], read.labels[task][test], weights=draws) for i, task in enumerate(tasks)
        }
        missing = torch.full_like(figures["probe"], torch.nan)
        accuracy = METRICS.index("accuracy")
        gap = figures["probe"][:, accuracy] - figures.get("control", missing)[:, accuracy]
        of_task = dict(zip(tasks, penalties.tolist(), strict=True))
        both = torch.cat([fit, chosen])
        return cls(
            probe=Linear(probes.weight[0], probes.bias[0]),
            values=torch.stack([group_intervals(figures.get(task, missing)) for task in TASKS]),
            selectivity=group_intervals(gap),
            validation=validated,
            penalties=torch.tensor([of_task.get(task, torch.nan) for task in TASKS], dtype=torch.float64),
            scales=_scales(x[both], probes.weight[0], y[0][:, both]),
        )


def _chosen(
    kind: str,
    x: Float[Tensor, "n d"],
    y: Bool[Tensor, "task score n"],
    parts: tuple[Int[Tensor, " fit"], Int[Tensor, " chosen"]],
    how: ProbeOptions,
) -> tuple[Linear, Float[Tensor, " task"], float]:
    """The probes of each task and score at the best penalty of their task, that penalty, and the first's AUROC.

    Weights come from all examples but those of the test; the AUROC is of what was fitted without the validation part.
    """
    penalties = torch.tensor(KINDS[kind].penalties or tuple(sorted(how.l2, reverse=True)), dtype=torch.float64)
    n_tasks, n_scores = y.shape[:2]
    fit, chosen = parts
    flat = y.flatten(0, 1)
    tried = fit_kind(kind, x[fit], flat[:, fit], penalties)
    losses = balanced_loss(kind, tried, x[chosen], flat[:, chosen])
    best = losses.reshape(n_tasks, n_scores, -1).mean(1).argmin(-1)  # the strongest of equal ones
    own = tried.weight.reshape(n_tasks, n_scores, len(penalties), -1)[0, :, best[0]]  # the bias moves no rank
    validated = auroc(own @ x[chosen].double().T, y[0][:, chosen]).mean()
    both = torch.cat([fit, chosen])
    refit = [fit_kind(kind, x[both], rows[:, both], penalties[i : i + 1]) for rows, i in zip(y, best, strict=True)]
    weight, bias = torch.stack([f.weight[:, 0] for f in refit]), torch.stack([f.bias[:, 0] for f in refit])
    return Linear(weight, bias), penalties[best], float(validated)


def _scales(
    x: Float[Tensor, "n d"], weight: Float[Tensor, "score d"], y: Bool[Tensor, "score n"]
) -> Float[Tensor, "score 5"]:
    """How large the examples are along each score's weights; NaN where those are all zero."""
    nothing = SiteScale(math.nan, math.nan)
    return torch.tensor(
        [
            measure_scale(x, w, positive=truth) if bool((w != 0).any()) else nothing
            for w, truth in zip(weight, y, strict=True)
        ],
        dtype=torch.float64,
    )


def _one_hot(codes: Int[Tensor, " n"], n_classes: int) -> Bool[Tensor, "score n"]:
    """True where an example is of a score's class: one score for two classes."""
    wanted = torch.tensor([1]) if n_classes == 2 else torch.arange(n_classes)
    return codes == wanted[:, None]
