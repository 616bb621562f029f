"""`calibrate`: the dose at which a steering changes the model's predictions by a given amount."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.direction import Direction, Dose, Steers
from interp.core.errors import ConfigError, DataError
from interp.core.inputs import Inputs
from interp.core.manager import HookManager
from interp.core.where import Where
from interp.steering.evaluating.dose_effects import TextMeasure, read_text
from interp.steering.evaluating.dose_rows import Doses

__all__ = ["calibrate", "token_kl"]

# Away from the bracket a step is at most so large, and the search at most so wide.
_STEP, _WIDEST = 16.0, 1e6


def token_kl(
    hm: HookManager,
    steers: Steers,
    prompts: Inputs,
    *,
    dose: float | Dose = 1.0,
    where: Where | None = None,
    batch_size: int = 32,
) -> Float[Tensor, " token"]:
    """Return KL(unsteered ‖ steered) of the prediction at each token, in nats.

    Memory: the logits of a forward, 4 · batch_size · pos · d_vocab bytes, four times over; fewer rows are taken where
    that is above 256 MB.

    Args:
        hm: the model.
        steers: what steers.
        prompts: texts, whatever `hm.run` takes.
        dose: how much.
        where: the positions it acts on; what steers decides by default.
        batch_size: rows per forward at most.

    Returns:
        One number per real token that is not special, row by row.

    Raises:
        ConfigError: several doses, or nothing that steers.
        ModelError: a direction of another model.
    """
    amount = Dose.of(dose)
    if isinstance(amount.value, Tensor):
        raise ConfigError("one dose is measured at a time; give a number")
    _check(hm, steers)
    measure = TextMeasure(hm, read_text(hm, prompts), where=where, batch_size=batch_size)
    doses = Doses(torch.tensor([float(amount.value)], dtype=torch.float64), amount.unit)
    return measure(steers, doses).kl[0]


def calibrate(
    hm: HookManager,
    steers: Steers,
    prompts: Inputs,
    *,
    kl: float = 0.1,
    quantile: float = 0.95,
    where: Where | None = None,
    tolerance: float = 0.02,
    batch_size: int = 32,
) -> Dose:
    """Find the raw dose whose per-token KL to the unsteered model has a given quantile.

    Doses of different methods, sites and models that are calibrated on the same text disturb the model alike, so what
    they do can be compared. The search is a secant in log dose and log KL, kept in a bracket; at small doses the KL
    grows with the square of the dose. At most 40 measurements, most often 4 to 6.

    Args:
        hm: the model.
        steers: what steers, in the direction of positive doses.
        prompts: texts that stand for what it will be used on; whatever `hm.run` takes.
        kl: the target, in nats per token.
        quantile: which quantile over tokens meets it; .5 is the median token.
        where: the positions it acts on; what steers decides by default.
        tolerance: relative error of the KL that is good enough.
        batch_size: rows per forward at most.

    Returns:
        A positive dose in units of the fitted vector.

    Raises:
        ConfigError: a target or quantile that cannot be, or nothing that steers.
        ModelError: a direction of another model.
        DataError: no dose reaches it; says what was reached.
    """
    if not 0 < kl < math.inf or not 0 < quantile < 1 or not 0 < tolerance < 1:
        raise ConfigError(f"kl={kl}, quantile={quantile}, tolerance={tolerance}: expected kl > 0, the others in (0, 1)")
    _check(hm, steers)
    measure = TextMeasure(hm, read_text(hm, prompts), where=where, batch_size=batch_size)

    def reached(dose: float) -> float:
        found = measure(steers, Doses(torch.tensor([dose], dtype=torch.float64), "raw")).kl[0]
        return float(found.double().quantile(quantile))

    return Dose(_solve(reached, kl, tolerance), "raw")


def _check(hm: HookManager, steers: Steers) -> None:
    if not callable(getattr(steers, "as_interventions", None)):
        raise ConfigError(f"{type(steers).__name__} has no as_interventions; give what steers, such as a Direction")
    if isinstance(steers, Direction):
        steers.check(hm)


def _solve(reached: Callable[[float], float], target: float, tolerance: float) -> float:
    """The dose at which `reached` is the target, for a function that grows from 0."""
    low: tuple[float, float] | None = None  # (log dose, log KL) below the target, and above it
    high: tuple[float, float] | None = None
    last: tuple[float, float] | None = None
    seen: list[tuple[float, float]] = []
    at = 0.0
    for _ in range(40):
        value = reached(math.exp(at))
        seen.append((math.exp(at), value))
        if math.isnan(value) or abs(at) > math.log(_WIDEST):
            break
        if abs(value - target) <= tolerance * target:
            return math.exp(at)
        # Rounding can leave a KL of 0 or below: far under any target, and nothing to take a logarithm of.
        point = (at, math.log(max(value, 1e-12)) - math.log(target))
        if point[1] < 0:
            low = point if low is None or point[0] > low[0] else low
        else:
            high = point if high is None or point[0] < high[0] else high
        slope = 2.0
        if last is not None and last[0] != at and value > 1e-9:
            slope = (point[1] - last[1]) / (at - last[0])
        last = point
        at = _next(at, point[1], max(slope, 0.05), low, high)
    shown = ", ".join(f"{kl:.3g} at {dose:.3g}" for dose, kl in sorted(seen)[:: max(1, len(seen) // 8)])
    raise DataError(
        f"no raw dose up to {_WIDEST:g} has a KL of {target:g} nats on this text; reached {shown}. Choose another "
        "target or quantile, more positions (where=…), or another direction"
    )


def _next(
    at: float, error: float, slope: float, low: tuple[float, float] | None, high: tuple[float, float] | None
) -> float:
    """The next log dose: the secant's, held in the bracket, or not too far where there is none."""
    step = -error / slope
    if low is None or high is None:
        return at + max(-math.log(_STEP), min(math.log(_STEP), step))
    width = high[0] - low[0]
    if abs(width) < 1e-9:
        return (low[0] + high[0]) / 2
    inside = low[0] + 0.02 * width <= at + step <= high[0] - 0.02 * width
    return at + step if inside else (low[0] + high[0]) / 2
