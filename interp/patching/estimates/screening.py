"""Screen many nodes by attribution, patch the best of them exactly, and say how far the screening can be trusted."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.core.errors import ConfigError, DataError
from interp.core.manager import HookManager
from interp.core.metrics import Metric
from interp.core.result import Result
from interp.core.run import Run
from interp.core.site import Site
from interp.core.stats import pearson, spearman
from interp.core.sweep import sweep
from interp.core.sweep_cells import Cells
from interp.data.pair_tokens import PairTokens
from interp.data.pairs import PromptPairs
from interp.patching.estimates.attribution import attribute
from interp.patching.estimates.sides import Sides

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

__all__ = ["ScreenResult", "screen_and_verify"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class ScreenResult(Result):
    """Nodes that were screened, with the exact effects of those that were patched.

    Attributes:
        method: The attribution that screened, such as "relp, denoise".
        value: What an effect is, with its unit.
        names: Every node that was screened.
        estimates: Their scores.
        exact: Their mean effects; NaN where a node was not patched.
        chosen: True for those patched because of their score; the others patched are a random sample of the rest.
    """

    title: ClassVar[str] = "Screening and verification"
    method: str
    value: str
    names: list[str]
    estimates: Float[Tensor, " node"]
    exact: Float[Tensor, " node"]
    chosen: Bool[Tensor, " node"]

    @property
    def verified(self) -> Bool[Tensor, " node"]:
        """True for the nodes that were patched."""
        return ~self.exact.isnan()

    def agreement(self, which: str = "all") -> tuple[float, float]:
        """Return Pearson's and Spearman's correlation of estimates with exact effects; NaN for fewer than two nodes.

        Args:
            which: "all" that were patched, the "top" ones, or the "rest" (the random sample).

        Raises:
            DataError: another word.
        """
        parts = {"all": self.verified, "top": self.verified & self.chosen, "rest": self.verified & ~self.chosen}
        if which not in parts:
            raise DataError(f"which={which!r}: expected 'all', 'top' or 'rest'")
        estimates, exact = self.estimates[parts[which]], self.exact[parts[which]]
        return pearson(estimates, exact), spearman(estimates, exact)

    @property
    def missed(self) -> list[str]:
        """Nodes of the random sample with a larger exact effect than the weakest of the top ones."""
        top, rest = self.exact[self.chosen].abs(), self.verified & ~self.chosen
        weakest = float(top.min()) if len(top) else 0.0
        return [name for name, one, x in zip(self.names, rest, self.exact, strict=True) if one and abs(x) > weakest]

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per node, the strongest estimates first."""
        import pandas as pd

        table = pd.DataFrame({"node": self.names, "estimate": self.estimates.numpy(), "exact": self.exact.numpy()})
        table["chosen"] = self.chosen.numpy()
        return table.sort_values("estimate", key=abs, ascending=False, kind="stable", ignore_index=True)

    def plot(self) -> "plotly.graph_objects.Figure":
        """Draw estimates against exact effects of the nodes that were patched."""
        from interp.report.scatter import scatter

        kept = self.verified
        names = [name for name, one in zip(self.names, kept, strict=True) if one]
        title = f"{self.method}: r = {self.agreement()[0]:.3f} on {len(names)} nodes"
        return scatter(self.exact[kept], self.estimates[kept], names=names, x="exact effect", y="estimate", title=title)

    def summary(self) -> str:
        """Give the strongest nodes by exact effect, and the correlations as the error bar of the screening."""
        top, rest = int(self.chosen.sum()), int((self.verified & ~self.chosen).sum())
        lines = [
            f"{self.method}: {len(self.names)} nodes screened, {top} best and {rest} others patched ({self.value})"
        ]
        for which, count in (("all", top + rest), ("top", top), ("rest", rest)):
            r, rho = self.agreement(which)
            lines.append(f"estimate against exact, {which} ({count}): Pearson {r:.3f}, Spearman {rho:.3f}")
        order = self.exact.abs().nan_to_num(-1.0).argsort(descending=True)[: min(5, top + rest)].tolist()
        lines += [
            f"{self.names[i]}: {float(self.exact[i]):+.4g} (estimate {float(self.estimates[i]):+.4g})" for i in order
        ]
        if self.missed:
            lines.append(
                f"the sample holds {len(self.missed)} with more effect than the weakest of the best: verify more"
            )
        return "\n".join(lines)


def screen_and_verify(
    hm: HookManager,
    pairs: PromptPairs | PairTokens,
    k: int,
    *,
    nodes: str | list[str] = "z",
    rule: str = "relp",
    mode: str = "denoise",
    metric: str | Metric | Callable[[Run], Tensor] | None = None,
    seed: int = 0,
) -> ScreenResult:
    """Score all nodes by attribution; patch the k best, and as many of the rest at random, one by one.

    Cost: that of `attribute`, and 2k + 2 forwards. Memory: that of `attribute`, and the values of all nodes' sites.

    Args:
        hm: the model.
        pairs: clean and corrupted prompts.
        k: how many of the best to patch; of the rest as many, or all that there are.
        nodes: kinds or sites with heads or whole vectors.
        rule: the backward rule of the screening.
        mode: "denoise" or "noise".
        metric: as for `attribute`.
        seed: of the random sample.

    Raises:
        ConfigError: a mode that puts in no run.
        DataError: k is no whole number from 1 to the number of nodes, or what `attribute` refuses.
    """
    if mode not in ("denoise", "noise"):
        raise ConfigError(f"mode={mode!r}: nodes are verified by patching between two runs; 'denoise' or 'noise'")
    if type(k) is not int or k < 1:
        raise DataError(f"k={k!r}: expected a whole number ≥ 1, the nodes to verify")
    screened = attribute(hm, pairs, nodes=nodes, rule=rule, mode=mode, metric=metric)
    names, scores = screened.names, screened.scores
    if k > len(names):
        raise DataError(f"k={k}: there are {len(names)} nodes")
    order = scores.abs().argsort(descending=True, stable=True)
    rest = order[k:]
    drawn = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))[:k]]
    chosen = torch.zeros(len(names), dtype=torch.bool)
    chosen[order[:k]] = True
    exact = torch.full((len(names),), torch.nan)
    verify = torch.cat([order[:k], drawn])
    exact[verify] = _exact(hm, Sides.of(hm, pairs, metric=metric, mode=mode), screened.totals, verify)
    return ScreenResult(
        provenance=screened.provenance,
        method=screened.method,
        value=screened.value.removeprefix("estimated "),
        names=names,
        estimates=scores,
        exact=exact,
        chosen=chosen,
    )


def _exact(hm: HookManager, sides: Sides, totals: dict[str, Tensor], wanted: Tensor) -> Float[Tensor, " wanted"]:
    """The mean effects of some nodes, by their number, each patched alone at every position: one sweep."""
    units = [(place, unit) for place, values in totals.items() for unit in range(len(values))]
    rows: dict[str, list[int]] = {}
    for row, number in enumerate(wanted.tolist()):
        rows.setdefault(units[number][0], []).append(row)
    for place in rows:
        if len(totals[place]) > 1 and not _headed(place):
            raise DataError(f"{place} has {len(totals[place])} units that are no heads; verify heads or whole vectors")
    total = torch.zeros(len(wanted), dtype=torch.float64)
    for part in sides.parts(hm):
        tokens = part.side(sides.patched)
        source = hm.run(part.side(str(sides.inserted)), read=list(rows))
        base = hm.run(tokens, read=list(rows))
        cells = []
        for place, mine in rows.items():
            heads = torch.tensor([units[int(wanted[row])][1] for row in mine]) if _headed(place) else None
            columns = tokens.mask.expand(len(mine), *tokens.mask.shape)
            cells.append(Cells.replacing(place, source[place], columns, base=base[place], heads=heads))
        found = sweep(hm, tokens, cells, [part.metric])
        effects = (found.values[0] - found.base[0]).double().sum(1)
        total.index_add_(0, torch.tensor([row for mine in rows.values() for row in mine]), effects)
    return (total / len(sides)).float()


def _headed(place: str) -> bool:
    return any(axis in ("n_heads", "n_kv_heads") for axis in Site(place).axes)
