"""The figures of a steering sweep, put together from its cells."""

import math
from typing import TYPE_CHECKING

import torch

from interp.core.errors import DataError, nearest
from interp.core.stats import bootstrap_bounds

if TYPE_CHECKING:
    import plotly.graph_objects

    from interp.report.steering import DoseLine
    from interp.steering.evaluating.sweep_result import SteeringSweep

__all__ = ["COSTS", "draw"]

COSTS = {
    "perplexity": "perplexity of what is generated, under the unsteered model",
    "kl": "KL from the unsteered model, nats per token",
    "loss_change": "change of the loss, nats per token",
}


def draw(sweep: "SteeringSweep", kind: str, against: str) -> "plotly.graph_objects.Figure":
    """Draw one of `FIGURES`; see `SteeringSweep.plot`.

    Raises:
        DataError: another name, or nothing measured that it shows.
    """
    from interp.steering.evaluating.sweep_result import FIGURES

    if kind not in FIGURES or against not in COSTS:
        name, known = (kind, FIGURES) if kind not in FIGURES else (against, tuple(COSTS))
        raise DataError(f"{name!r}: {nearest(name, known) or 'expected one of ' + ', '.join(known)}")
    if not sweep.effect.shape[1] and kind == "doses":
        return _costs(sweep)
    if not sweep.effect.shape[1]:
        raise DataError("this sweep was of plain prompts, so it has no effects to draw; see to_frame() and texts")
    value = f"change of {sweep.metric}"
    if kind == "sites":
        return _map(sweep, value)
    cost = against if kind == "trade_off" else None
    lines = [_line(sweep, name, site, cost) for name, site in sweep.lines]
    if kind == "doses":
        from interp.report.steering import dose_response

        # Samples of several lines over one another could not be told apart.
        alone = sum(not line.control for line in lines) == 1
        kept = [line if alone and not line.control else line._replace(samples=line.samples[:, :0]) for line in lines]
        return dose_response(kept, unit=sweep.unit, value=value, title="Mean effect of each dose")
    from interp.report.steering import trade_off

    if bool(torch.cat([line.cost for line in lines]).isnan().all()):
        raise DataError(f"{against} was not measured in this sweep; draw it against another, or generate text")
    base = float(sweep.base_perplexity.log().mean().exp()) if against == "perplexity" else 0.0
    return trade_off(
        lines,
        cost=COSTS[against],
        value=value,
        baseline=base,
        log=against == "perplexity",
        title="What the effect costs",
    )


def _costs(sweep: "SteeringSweep") -> "plotly.graph_objects.Figure":
    """What doses cost, where there are no answers that they could have an effect on."""
    from interp.report.steering import dose_response

    lines = []
    for name, site in sweep.lines:
        kl = sweep.kl[sweep.cells(name, site)]
        lines.append(_line(sweep, name, site, None)._replace(mean=kl, low=kl, high=kl))
    return dose_response(lines, unit=sweep.unit, value=COSTS["kl"], title="What the doses cost")


def _line(sweep: "SteeringSweep", name: str, site: str, cost: str | None) -> "DoseLine":
    from interp.report.steering import DoseLine

    cells = sweep.cells(name, site)
    effect = sweep.effect[cells]
    low, high = bootstrap_bounds(effect) if effect.shape[1] else (torch.full((len(cells),), math.nan),) * 2
    costs = {"perplexity": sweep.mean_perplexity, "kl": sweep.kl, "loss_change": sweep.loss_change}
    return DoseLine(
        name=name if len({s for _, s in sweep.lines}) == 1 else f"{name} at {site}",
        doses=sweep.doses[cells],
        mean=effect.mean(1),
        low=low.float(),
        high=high.float(),
        control=bool(sweep.control[cells[0]]),
        flagged=torch.tensor([bool(sweep.failed[i]) for i in cells]),
        cost=torch.zeros(0) if cost is None else costs[cost][cells],
        samples=effect,
    )


def _map(sweep: "SteeringSweep", value: str) -> "plotly.graph_objects.Figure":
    from interp.report.figures import Axis
    from interp.report.steering import marked_map

    names = list(dict.fromkeys(a for (a, b), c in zip(_pairs(sweep), sweep.control.tolist(), strict=True) if not c))
    lines = [pair for pair in sweep.lines if pair[0] in names]
    doses = sweep.doses[~sweep.control].unique().tolist()
    values = torch.full((len(lines), len(doses)), math.nan)
    flagged = torch.zeros(len(lines), len(doses), dtype=torch.bool)
    for row, line in enumerate(lines):
        for cell in sweep.cells(*line):
            column = doses.index(float(sweep.doses[cell]))
            values[row, column] = sweep.effect[cell].mean()
            flagged[row, column] = bool(sweep.failed[cell])
    labels = [site if len(names) == 1 else f"{name} at {site}" for name, site in lines]
    axis = Axis(f"dose ({sweep.unit})", [f"{dose:g}" for dose in doses])
    title = "Mean effect by site and dose; × breaks a limit"
    return marked_map(values, flagged, sites=labels, doses=axis, value=value, title=title)


def _pairs(sweep: "SteeringSweep") -> list[tuple[str, str]]:
    return list(zip(sweep.steers, sweep.sites, strict=True))
