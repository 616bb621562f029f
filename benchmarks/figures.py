"""What benchmarks find: figures with their intervals, whether they hold their bounds, and rounds in a drawn order."""

import os
import platform
import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

from engine import SEED, _cpu, interval, row  # sets the number of threads, so before torch


@dataclass
class Found:
    """Figures, and the lines that show them."""

    figures: dict[str, float]
    lines: list[str]

    def ratio(self, name: str, values: list[float], bound: float | None = None, *, most: bool = False) -> None:
        """Add a figure with its interval, and whether it holds its bound (at least, or at most) by its better end."""
        if not values:
            self.lines.append(f"{name}: not measured")
            return
        low, high = interval(values)
        self.figures |= {name: statistics.median(values), f"{name}_low": low, f"{name}_high": high}
        said = ""
        if bound is not None:
            held = low <= bound if most else high >= bound
            said = f" at {'most' if most else 'least'} {bound:.3g} {'held' if held else 'MISSED'}"
        self.lines.append(f"{name}:{said}\n{row('', values)}")


def interleaved(calls: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each call says, round by round, in an order drawn anew; a first round is not counted."""
    draw = random.Random(SEED)
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name in draw.sample(list(calls), len(calls)):
            found[name].append(calls[name]())
        print(f"{', '.join(calls)}: {number}/{rounds}", file=sys.stderr)
    return {name: values[1:] for name, values in found.items()}


def ratios_of(top: list[float], bottom: list[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(top, bottom, strict=True)]


def machine_and_versions(*packages: str, gpu: str = "") -> tuple[str, dict[str, str]]:
    """What it is measured on, in words, and the versions of these packages and of Python."""
    cpu = f"{_cpu()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}; one OpenMP thread"
    versions = {name: metadata.version(name) for name in packages} | {"python": platform.python_version()}
    return f"{gpu}; {cpu}" if gpu else cpu, versions
