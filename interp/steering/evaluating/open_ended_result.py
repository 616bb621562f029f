"""`OpenEnded`: scores of what was generated at each dose, and the dose that half of the prompts choose."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.core.errors import DataError, nearest
from interp.core.result import Result
from interp.core.stats import Estimate, bootstrap
from interp.steering.evaluating.judges import harmonic_mean

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

__all__ = ["ChosenDose", "OpenEnded"]


class ChosenDose(NamedTuple):
    """The cell that one half of the prompts chose, and how the other half scores there.

    Attributes:
        steers: what steers.
        site: where.
        dose: how much.
        score: on the prompts that did not choose.
        chosen_score: on those that did, which is too high.
        missing: prompts without a score among the scoring half.
    """

    steers: str
    site: str
    dose: float
    score: Estimate
    chosen_score: Estimate
    missing: int


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class OpenEnded(Result):
    """Scores of generated texts; a cell is one steering with one dose, the first is the model alone.

    Attributes:
        steers: name of what steers, by cell.
        sites: where it acts.
        doses: how much.
        unit: of the doses.
        control: whether the cell is of a random direction.
        aspects: what was judged.
        scores: of each text; NaN where the judge gave none.
        missing: how many scores are missing, by "aspect: reason".
        chooses: the prompts that choose a dose; the others score it.
        perplexity: of each text under the unsteered model.
        prompts: the prompts.
        texts: what was generated, by cell and prompt.
        notes: what a reader should know.
    """

    title: ClassVar[str] = "Open-ended generation"
    steers: list[str]
    sites: list[str]
    doses: Float[Tensor, " cell"]
    unit: str
    control: Bool[Tensor, " cell"]
    aspects: list[str]
    scores: Float[Tensor, "aspect cell prompt"]
    missing: dict[str, int]
    chooses: Bool[Tensor, " prompt"]
    perplexity: Float[Tensor, "cell prompt"]
    prompts: list[str]
    texts: list[list[str]]
    notes: list[str] = field(default_factory=list)

    @property
    def overall(self) -> Float[Tensor, "cell prompt"]:
        """Harmonic mean of the aspects: 0 where one is 0, NaN where one is missing."""
        return harmonic_mean(self.scores)

    def chosen(self, steers: str | None = None) -> ChosenDose:
        """Return the site and dose that the choosing half of the prompts scores highest, as the other half scores it.

        Args:
            steers: among the cells of this one; may be left out where there is one apart from controls.

        Raises:
            DataError: no such cells, no half to choose, or no score on it.

        Source: Wu et al. (2025), arXiv 2501.17148, §4.2. Departure: the half that chooses is drawn, not the first.
        """
        names = list(dict.fromkeys(self.steers[1:]))
        random = {name for name, control in zip(self.steers, self.control.tolist(), strict=True) if control}
        own = [name for name in names if name not in random] if steers is None else [steers]
        if len(own) != 1 or own[0] not in names:
            hint = nearest(steers or "", names) or f"they are {', '.join(names) or 'none'}"
            raise DataError(f"steers={steers!r}: name one of what steers; {hint}")
        if not bool(self.chooses.any()) or bool(self.chooses.all()):
            raise DataError("one prompt cannot both choose a dose and score it; give two at least")
        cells = [i for i in range(1, len(self.steers)) if self.steers[i] == own[0]]
        overall = self.overall
        means = overall[cells][:, self.chooses].nanmean(1)
        if bool(means.isnan().all()):
            raise DataError(f"no text of {own[0]!r} has a score on the half that chooses; see missing")
        at = cells[int(means.nan_to_num(-1.0).argmax())]
        rest = overall[at, ~self.chooses]
        return ChosenDose(
            own[0],
            self.sites[at],
            float(self.doses[at]),
            bootstrap(rest),
            bootstrap(overall[at, self.chooses]),
            int(rest.isnan().sum()),
        )

    def records(self) -> list[dict[str, Any]]:
        """Return one record per cell: mean scores over the prompts that have one, and how many have none."""
        overall, found = self.overall, []
        for i, (name, site, dose) in enumerate(zip(self.steers, self.sites, self.doses.tolist(), strict=True)):
            estimate = bootstrap(overall[i])
            record: dict[str, Any] = {"steers": name, "site": site, "dose": dose, "unit": self.unit}
            record |= {"score": estimate.mean, "score_low": estimate.low, "score_high": estimate.high}
            if len(self.aspects) > 1:
                record |= {a: float(self.scores[j, i].nanmean()) for j, a in enumerate(self.aspects)}
            record["missing"] = int(overall[i].isnan().sum())
            record["perplexity"] = float(self.perplexity[i].log().mean().exp())
            found.append(record)
        return found

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per cell."""
        import pandas as pd

        return pd.DataFrame(self.records())

    def plot(self) -> "plotly.graph_objects.Figure":
        """Draw the mean score against dose with 95 % intervals over prompts, missing ones left out.

        The unsteered model's score stands at dose 0 of every line.
        """
        from interp.report.steering import DoseLine, dose_response

        overall, lines = self.overall, []
        for name, site in dict.fromkeys(zip(self.steers[1:], self.sites[1:], strict=True)):
            cells = [i for i in range(1, len(self.steers)) if (self.steers[i], self.sites[i]) == (name, site)]
            cells += [] if bool((self.doses[cells] == 0).any()) else [0]
            cells.sort(key=lambda i: float(self.doses[i]))
            known = [bootstrap(overall[i]) for i in cells]
            mean, low, high = (torch.tensor([e[j] for e in known]) for j in range(3))
            lines.append(
                DoseLine(
                    name=f"{name} at {site}",
                    doses=self.doses[cells],
                    mean=mean,
                    low=low,
                    high=high,
                    control=bool(self.control[cells].any()),
                    flagged=torch.zeros(len(cells), dtype=torch.bool),
                    cost=torch.zeros(0),
                    samples=overall[cells][:, :0],
                )
            )
        return dose_response(lines, unit=self.unit, value="mean score", title=self.title)

    def summary(self) -> str:
        """Give the unsteered score, each chosen dose with its score, and the missing scores."""
        base = bootstrap(self.overall[0])
        lines = [f"{len(self.prompts)} prompts, judged for {', '.join(self.aspects)}; unsteered {base}"]
        for name in dict.fromkeys(self.steers[1:]):
            if len(self.prompts) > 1 and not bool(self.overall[:, self.chooses].isnan().all()):
                best = self.chosen(name)
                lines.append(f"{name} at {best.site}, dose {best.dose:g} {self.unit} (chosen): score {best.score}")
        total = self.scores.numel()
        for reason, count in self.missing.items():
            lines.append(f"missing: {count} of {total} scores, {reason}")
        return "\n".join([*lines, *self.notes])
