"""`sparse_probe`: how few neurons, latents or dimensions tell a class, which ones, and beside which controls."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.classify import METRICS, classify_metrics, group_draws, group_intervals
from interp.core.errors import ConfigError, DataError, nearest
from interp.core.fit import Linear, auroc
from interp.core.manager import HookManager
from interp.core.result import Provenance
from interp.core.site import Site
from interp.core.where import Where
from interp.data.concept_tokens import ConceptTokens
from interp.data.contrast import Contrast
from interp.data.gather import Gathered
from interp.data.pairs import PromptPairs
from interp.dictionaries.base import Dictionary
from interp.evaluate.place import place_of
from interp.probing.examples import FIT, TASKS, TEST, VALIDATION, Examples, Split, read_examples
from interp.probing.selection import RANKINGS, SEARCHES, Standard, choose_units, rank_units, refit
from interp.probing.sparse_result import SparseProbes

__all__ = ["SparseOptions", "sparse_probe"]

_ROWS = 4096  # examples whose latents are found at once


@dataclass(frozen=True)
class SparseOptions:
    """How units are chosen and tested; every default is the usual choice.

    Args:
        search: one of `SEARCHES`; swap fits some 3 k · prefilter sets for each task, so give it small k.
        prefilter: a search looks among so many best-ranked units.
        l2: penalty of the fit on the chosen units, in units of examples; they have variance 1.
        prune: how often the units of the smallest k are taken away and others chosen from what is left.
        stability: rankings on random halves of the groups, by whose overlap a choice is judged.
        table: units that are also probed alone, the best-ranked.
        test, validation: shares of the groups, for the scores and for `best`.
        n_bootstrap: resamples of the test's groups.
        seed: of the split, the controls, the halves and the bootstrap.
        batch_size: rows per forward.
        where: the token rule of texts, as for `Contrast.tokens`.

    Raises:
        ConfigError: an unknown search, or numbers that are too small.
    """

    search: str = "ranked"
    prefilter: int = 50
    l2: float = 1.0
    prune: int = 0
    stability: int = 5
    table: int = 10
    test: float = 0.3
    validation: float = 0.2
    n_bootstrap: int = 500
    seed: int = 0
    batch_size: int = 32
    where: Where | None = None

    def __post_init__(self) -> None:
        if self.search not in SEARCHES:
            hint = nearest(self.search, SEARCHES) or "expected one of " + ", ".join(SEARCHES)
            raise ConfigError(f"search={self.search!r}: {hint}")
        least = {"prefilter": 1, "table": 1, "prune": 0, "stability": 0, "n_bootstrap": 0}
        small = next((name for name, value in least.items() if getattr(self, name) < value), None)
        if small is not None or not self.l2 > 0:
            raise ConfigError(
                f"l2={self.l2}: expected a positive penalty"
                if small is None
                else f"{small}={getattr(self, small)}: expected at least {least[small]}"
            )


def sparse_probe(
    hm: HookManager,
    data: Contrast | ConceptTokens | PromptPairs,
    sites: Sequence[Site | str] | Site | str | None = None,
    *,
    k: Sequence[int] = (1, 2, 4, 8, 16),
    ranking: str = "mean_difference",
    dictionary: Dictionary | None = None,
    pool: str = "each",
    options: SparseOptions | None = None,
) -> SparseProbes:
    """Choose the k units of a site that tell a class, fit on these alone, and test on groups that neither saw.

    Units are the entries of a site's features: neurons of `post`, dimensions of `resid_post`; or with a dictionary its
    latents. Units are chosen on the fit part, weights fitted on it and the validation part. Beside each probe stand one
    for a random class of each kind of token and one for shuffled labels, whose units are chosen in the same way. Units
    that never change are never chosen.

    Memory in bytes: 4 · n · Σ units on the host, 16 · n · units while a site is worked on, and 2^28 for a call of the
    solver.

    Args:
        hm: the model.
        data: texts or labelled tokens of two classes; class 1 is what is looked for.
        sites: names or globs; None is where the dictionary acts.
        k: how many units.
        ranking: one of `RANKINGS`.
        dictionary: what makes latents of the one site's activations; on the model's device.
        pool: what one example is, as for `gather`.
        options: the search, penalties, resamples, seed.

    Returns:
        Chosen units and scores for every site and k.

    Raises:
        ConfigError: an unknown ranking, sizes that are not positive, or a dictionary that does not fit.
        DataError: more than two classes, too few groups, or a site whose units never change.

    Source: Gurnee et al. (2023, arXiv 2305.01610), §3. Departures: swaps in place of a cardinality-constrained solver;
    average precision from scores; the controls of Hewitt and Liang (2019, arXiv 1909.03368); groups are kept whole.
    """
    how = SparseOptions() if options is None else options
    sizes = [] if isinstance(k, int) else sorted(set(k))
    if not sizes or not all(isinstance(size, int) and size >= 1 for size in sizes):
        raise ConfigError(f"k={k}: expected a list of numbers of units, each at least 1")
    if ranking not in RANKINGS:
        raise ConfigError(f"ranking={ranking!r}: {nearest(ranking, RANKINGS) or 'one of ' + ', '.join(RANKINGS)}")
    wanted = _sites(hm, sites, dictionary)
    split = Split(how.test, how.validation, how.seed)
    read = read_examples(hm, data, wanted, where=how.where, pool=pool, split=split, batch_size=how.batch_size)
    if len(read.first.classes) != 2:
        raise DataError(
            f"{read.data.name!r} has the classes {', '.join(read.first.classes)}; choose one with .binary(…)"
        )
    if dictionary is not None:
        read = replace(read, held={site: _latents(dictionary, held, hm) for site, held in read.held.items()})
    found = {site: _site_probes(read, site, sizes, ranking, how) for site in read.held}
    return _result(hm, read, found, sizes, ranking, how, pool, dictionary)


def _sites(hm: HookManager, sites: Any, dictionary: Dictionary | None) -> Any:
    if dictionary is None:
        if sites is None:
            raise ConfigError("which sites? Give names or globs such as '*.post', or a dictionary")
        return sites
    if sites is not None and not isinstance(sites, str | Site) and len(sites) != 1:
        raise ConfigError(f"a dictionary reads one site, got {len(sites)}; leave sites out for its own")
    given = sites if sites is None or isinstance(sites, str | Site) else sites[0]
    return place_of(hm, dictionary, given)


def _latents(dictionary: Dictionary, held: Gathered, hm: HookManager) -> Gathered:
    with torch.no_grad():
        parts = [dictionary.encode(part.to(hm.device)).float().cpu() for part in held.x.split(_ROWS)]
    return replace(held, x=torch.cat(parts))


class _Found(NamedTuple):
    """What is known of one site; K sizes, at most W units each, M units probed alone, R rounds of pruning."""

    units: Int[Tensor, "K W"]
    weights: Float[Tensor, "K W"]
    biases: Float[Tensor, " K"]
    values: Float[Tensor, "K task metric 3"]
    selectivity: Float[Tensor, "K 3"]
    validation: Float[Tensor, " K"]
    stability: Float[Tensor, " K"]
    alone: Int[Tensor, " M"]
    rank_scores: Float[Tensor, " M"]
    alone_values: Float[Tensor, "M metric 3"]
    pruned: Float[Tensor, "R metric 3"]
    n_units: int
    n_dead: int


class _Task(NamedTuple):
    """Units chosen for one list of labels, and what their probes reach."""

    sets: list[Tensor]
    probes: list[Linear]
    draws: Float[Tensor, "K draw metric"]
    rank: Float[Tensor, " d"]


def _site_probes(read: Examples, site: str, sizes: list[int], ranking: str, how: SparseOptions) -> _Found:
    held = read.held[site]
    x = held.x.reshape(len(held), -1)
    fit, test = read.at(FIT), read.at(TEST)
    if not bool(Standard.of(x[fit]).alive.any()):
        raise DataError(f"no unit of {site} changes on the examples of {read.data.name!r}, so none can be chosen")
    weights = group_draws(held.group[test], n_bootstrap=how.n_bootstrap, seed=how.seed)
    made = {task: _task(x, read, labels == 1, sizes, ranking, how, weights) for task, labels in read.labels.items()}
    own, y = made["probe"], read.labels["probe"] == 1
    width = max(len(units) for units in own.sets)
    missing = torch.full_like(own.draws, torch.nan)
    draws = torch.stack([made[t].draws if t in made else missing for t in TASKS], 1)  # [K task draw metric]
    accuracy = METRICS.index("accuracy")
    gap = draws[:, 0, :, accuracy] - draws[:, TASKS.index("control"), :, accuracy]
    alone = own.rank.argsort(descending=True, stable=True)[: how.table]
    alone = alone[own.rank[alone] > -torch.inf]
    single = _probed(x, read, y, [unit[None] for unit in alone], how, weights)[1]
    return _Found(
        units=torch.stack([_padded(units, width, -1.0) for units in own.sets]),
        weights=torch.stack([_padded(p.weight[0], width, 0.0) for p in own.probes]),
        biases=torch.cat([p.bias for p in own.probes]),
        values=group_intervals(draws.permute(2, 0, 1, 3)),
        selectivity=group_intervals(gap.T),
        validation=_validated(x, read, y, own.sets, how),
        stability=_overlap(x[fit], y[fit], held.group[fit], sizes, ranking, how),
        alone=alone,
        rank_scores=own.rank[alone],
        alone_values=group_intervals(single.transpose(0, 1)),
        pruned=_pruned(x, read, y, own.rank, sizes[0], how, weights),
        n_units=x.shape[1],
        n_dead=int((own.rank == -torch.inf).sum()),
    )


def _task(
    x: Tensor,
    read: Examples,
    y: Bool[Tensor, " n"],
    sizes: list[int],
    ranking: str,
    how: SparseOptions,
    weights: Tensor,
) -> _Task:
    fit = read.at(FIT)
    rank = rank_units(x[fit], y[fit], method=ranking, seed=how.seed)
    sets = choose_units(
        Standard.of(x[fit]).x, y[fit], sizes, rank, search=how.search, prefilter=how.prefilter, l2=how.l2
    )
    probes, draws = _probed(x, read, y, sets, how, weights)
    return _Task(sets, probes, draws, rank)


def _probed(
    x: Tensor, read: Examples, y: Tensor, sets: Sequence[Tensor], how: SparseOptions, weights: Tensor
) -> tuple[list[Linear], Float[Tensor, "set draw metric"]]:
    """Fit each set on all but the test part; its weights in units of x, and what it reaches on the test part."""
    both, test = read.at(FIT, VALIDATION), read.at(TEST)
    probes, draws = [], []
    for units in sets:
        standard = Standard.of(x[both][:, units])
        found = refit(standard.x, y[both], torch.arange(len(units))[None], l2=how.l2)
        weight = found.weight / standard.std
        probe = Linear(weight, found.bias - (weight * standard.mean).sum(1))
        probes.append(probe)
        scores = probe.scores(x[test][:, units][None])[0]
        draws.append(classify_metrics(scores[:, None], y[test].long(), weights=weights))
    return probes, torch.stack(draws)


def _validated(x: Tensor, read: Examples, y: Tensor, sets: Sequence[Tensor], how: SparseOptions) -> Float[Tensor, " K"]:
    """AUROC on the validation part of fits that did not see it."""
    fit, chosen = read.at(FIT), read.at(VALIDATION)
    found = []
    for units in sets:
        standard = Standard.of(x[fit][:, units])
        probe = refit(standard.x, y[fit], torch.arange(len(units))[None], l2=how.l2)
        found.append(auroc(probe.scores(standard.again(x[chosen][:, units])[None])[0], y[chosen]))
    return torch.stack(found)


def _overlap(
    x: Tensor, y: Tensor, group: Tensor, sizes: Sequence[int], ranking: str, how: SparseOptions
) -> Float[Tensor, " K"]:
    """Mean share of units that the choices on two random halves of the groups have in common (Jaccard)."""
    draw = torch.Generator().manual_seed(how.seed)
    known, orders = group.unique(), list[Tensor]()
    for _ in range(how.stability):
        half = torch.isin(group, known[torch.randperm(len(known), generator=draw)[: max(1, len(known) // 2)]])
        if bool(y[half].any()) and not bool(y[half].all()):
            orders.append(rank_units(x[half], y[half], method=ranking, seed=how.seed).argsort(descending=True))
    pairs = [(a, b) for i, a in enumerate(orders) for b in orders[:i]]
    if not pairs:
        return torch.full((len(sizes),), torch.nan, dtype=torch.float64)
    both = torch.tensor([[float(torch.isin(a[:k], b[:k]).sum()) for a, b in pairs] for k in sizes], dtype=torch.float64)
    size = torch.tensor([[min(k, x.shape[1])] for k in sizes])
    return (both / (2 * size - both)).mean(1)


def _pruned(
    x: Tensor, read: Examples, y: Tensor, rank: Tensor, k: int, how: SparseOptions, weights: Tensor
) -> Float[Tensor, "R metric 3"]:
    """What k units reach when the best, the next best, … are gone: each round leaves out what was chosen before."""
    fit = read.at(FIT)
    rounds, left = list[Tensor](), rank.clone()
    standard = Standard.of(x[fit]).x
    for _ in range(how.prune + 1 if how.prune else 0):
        if not bool((left > -torch.inf).any()):
            break
        (units,) = choose_units(standard, y[fit], [k], left, search=how.search, prefilter=how.prefilter, l2=how.l2)
        rounds.append(group_intervals(_probed(x, read, y, [units], how, weights)[1][0]))
        left[units] = -torch.inf
    return torch.stack(rounds) if rounds else torch.zeros(0, len(METRICS), 3, dtype=torch.float64)


def _padded(values: Tensor, width: int, filler: float) -> Tensor:
    return torch.nn.functional.pad(values, (0, width - len(values)), value=filler)


def _result(
    hm: HookManager,
    read: Examples,
    found: Mapping[str, _Found],
    sizes: list[int],
    ranking: str,
    how: SparseOptions,
    pool: str,
    dictionary: Dictionary | None,
) -> SparseProbes:
    first, test, t = read.first, read.at(TEST), read.data.tokens
    common = torch.bincount(first.y[read.at(FIT)]).argmax()
    settings = {"k": sizes, "ranking": ranking, "pool": pool, "options": asdict(how) | {"where": repr(how.where)}}
    all_of = list(found.values())
    return SparseProbes(
        name=read.data.name,
        classes=first.classes,
        ranking=ranking,
        search=how.search,
        kind="unit" if dictionary is None else "latent",
        sites=list(found),
        k=sizes,
        units={site: held.units for site, held in found.items()},
        weights={site: held.weights for site, held in found.items()},
        biases={site: held.biases for site, held in found.items()},
        values=torch.stack([f.values for f in all_of]),
        selectivity=torch.stack([f.selectivity for f in all_of]),
        validation=torch.stack([f.validation for f in all_of]),
        stability=torch.stack([f.stability for f in all_of]),
        alone={site: held.alone for site, held in found.items()},
        rank_scores={site: held.rank_scores for site, held in found.items()},
        alone_values={site: held.alone_values for site, held in found.items()},
        pruned={site: held.pruned for site, held in found.items()},
        n_units=[f.n_units for f in all_of],
        n_dead=[f.n_dead for f in all_of],
        majority=float((first.y[test] == common).double().mean()),
        sizes=read.sizes,
        notes=list(read.notes),
        provenance=Provenance.of(hm, settings=settings, data=(t.ids, t.mask, read.data.labels), seed=how.seed),
    )
