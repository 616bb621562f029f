"""The picture of a sweep: fronts by site, nothing drawn that was not measured, names as text."""

import pandas as pd
import pytest

from interp.core.errors import DataError
from interp.report.sweep import pareto, sweep_page

TABLE = pd.DataFrame(
    {
        "name": ["a", "b", "c", "d", "<img src=x onerror=alert(1)>"],
        "site": ["1", "1", "1", "1", "2"],
        "l0": [4.0, 8.0, 8.0, 16.0, 8.0],
        "fvu": [0.5, 0.3, 0.4, 0.35, 0.9],
        "ce_recovered": [0.8, 0.9, 0.85, 0.95, 0.1],
    }
)
TABLE = TABLE.assign(
    **{f"{n}_{end}": TABLE[n] + s for n in ("fvu", "ce_recovered") for end, s in (("low", -0.01), ("high", 0.02))}
)


def test_a_front_joins_what_no_other_of_its_site_beats() -> None:
    fronts = [trace for trace in pareto(TABLE).data if trace.mode == "lines"]
    found = [(list(trace.x), list(trace.y)) for trace in fronts]
    assert found == [
        ([4.0, 8.0], [0.5, 0.3]),  # d has more latents and a worse FVU than b
        ([8.0], [0.9]),
        ([4.0, 8.0, 16.0], [0.8, 0.9, 0.95]),  # and the best CE of all
        ([8.0], [0.1]),
    ]


def test_points_have_their_own_values_and_intervals() -> None:
    points = [trace for trace in pareto(TABLE).data if trace.mode == "markers"]
    assert list(points[0].y) == [0.5, 0.3, 0.4, 0.35]
    assert list(points[0].error_y.array) == pytest.approx([0.02] * 4)
    assert list(points[0].error_y.arrayminus) == pytest.approx([0.01] * 4)
    assert [trace.marker.color for trace in points[:2]] == [trace.marker.color for trace in points[2:]]


def test_names_are_text_and_an_empty_sweep_is_refused() -> None:
    assert "<img src=x" not in sweep_page(TABLE)
    with pytest.raises(DataError, match="nothing to draw"):
        pareto(TABLE.iloc[:0])
