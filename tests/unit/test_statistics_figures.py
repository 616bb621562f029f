"""Figures of activation statistics: what they draw is what was measured, and hostile names stay text."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from interp.core.errors import DataError
from interp.core.result import Provenance
from interp.data.accumulate import Statistics
from interp.data.statistics import ActivationStatistics
from interp.report.html import Section, page
from interp.report.statistics import MeasuredSite, MeasuredSites, show_dimensions, show_statistics
from tests.unit.test_report import HOSTILE, Document

SITES = ("0.resid_post", "1.resid_post")
D, N = 12, 200
MASSIVE, OUTLIER = 5, 9  # dimensions of the second site


def rows(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Activations of every site, and the class of each token: forty special ones, sixty delimiters, and others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(SITES), N, D, generator=generator, dtype=torch.float64)
    return x, torch.tensor([0] * 40 + [1] * 60 + [2] * 100)


def measured(x: Tensor, classes: Tensor, sites: tuple[str, ...] = SITES) -> ActivationStatistics:
    states = []
    for values in x:
        found = Statistics(values.shape[1])
        at = torch.arange(len(values))
        found.add(values, classes=classes, doc=at // 10, pos=at % 10 - 1, ids=at)
        states.append(found.state())
    counts = tuple(classes.bincount(minlength=3).tolist())
    return ActivationStatistics(
        sites=sites,
        shapes=((x.shape[2],),) * len(sites),
        states=tuple(states),
        n_tokens=counts,
        delimiters=(),
        provenance=Provenance(model="tiny"),
    )


def drawn(figure: Any) -> dict[tuple[int, str], Any]:
    """The series of a figure by panel, from above, and name."""
    return {(int((trace.yaxis or "y")[1:] or 1), trace.name): trace for trace in figure.data}


def values(trace: Any) -> Tensor:
    return torch.tensor([math.nan if v is None else v for v in trace.y], dtype=torch.float64)


# -- what is drawn ----------------------------------------------------------------------------------------------------


def test_every_number_of_the_overview_is_that_of_the_tokens_themselves() -> None:
    x, classes = rows()
    found = drawn(show_statistics(measured(x, classes)))
    for code, name in enumerate(("special", "delimiter", "other")):
        mine = x[:, classes == code]
        torch.testing.assert_close(values(found[1, name]), mine.pow(2).sum(-1).mean(-1).sqrt(), rtol=1e-12, atol=0)
        torch.testing.assert_close(values(found[2, name]), mine.abs().amax((1, 2)), rtol=0, atol=0)
    median = x.abs().flatten(1).quantile(0.5, dim=1, interpolation="lower")
    torch.testing.assert_close(values(found[2, "median |a|, all tokens"]), median, rtol=0.0101, atol=0)
    variance = x[:, classes > 0].var(1)
    ratio = variance.amax(1) / variance.mean(1)
    torch.testing.assert_close(values(found[3, "largest / mean"]), ratio, rtol=1e-12, atol=0)
    assert [str(box) for box in found[3, "largest / mean"].customdata] == [
        f"dimension {int(v.argmax())}" for v in variance
    ]


def test_an_offset_of_a_dimension_counts_in_the_norm_and_not_in_the_variance() -> None:
    x, classes = rows()
    plain = drawn(show_statistics(measured(x, classes)))
    x[1, :, 3] += 1e3
    moved = drawn(show_statistics(measured(x, classes)))
    assert float(values(moved[1, "other"])[1]) == pytest.approx(1e3, rel=0.02)
    assert float(values(plain[1, "other"])[1]) < 5
    before, after = (values(found[3, "largest / mean"]) for found in (plain, moved))
    torch.testing.assert_close(before, after, rtol=1e-9, atol=0)


def test_planted_massive_and_outlier_dimensions_cross_their_lines_and_nothing_else_does() -> None:
    x, classes = rows()
    nothing = drawn(show_statistics(measured(x, classes)))
    x[1, 7, MASSIVE] = -1500.0
    x[1, :, OUTLIER] *= 40
    found = drawn(show_statistics(measured(x, classes)))
    bound, line = values(found[2, "massive from here on"]), values(found[3, "outlier from here on"])
    assert (values(found[2, "special"]) > bound).tolist() == [False, True]
    assert not bool((values(found[2, "delimiter"]) > bound).any()) and line.tolist() == [5.0, 5.0]
    assert (values(found[3, "largest / mean"]) > line).tolist() == [False, True]
    assert f"dimension {MASSIVE}, token 7, position 6 of document 0" in found[2, "special"].customdata
    assert f"dimension {OUTLIER}" == found[3, "largest / mean"].customdata[1]
    for panel, name in ((2, "special"), (2, "delimiter"), (2, "other")):
        assert bool((values(nothing[panel, name]) < values(nothing[panel, "massive from here on"])).all())
    assert bool((values(nothing[3, "largest / mean"]) < 5).all())


@pytest.mark.parametrize(("scale", "bound"), [(0.01, 100.0), (1.0, 675.0)])
def test_massive_means_both_above_a_hundred_and_a_thousand_medians(scale: float, bound: float) -> None:
    x, classes = rows()
    found = drawn(show_statistics(measured(x * scale, classes)))
    # The median |a| of a Gaussian is 0.6745 σ.
    assert float(values(found[2, "massive from here on"]).mean()) == pytest.approx(bound, rel=0.05)


def test_the_dimensions_of_a_site_are_those_with_the_largest_values_in_order() -> None:
    x, classes = rows()
    x[1, 150, MASSIVE], x[1, 60, OUTLIER] = -1500.0, 900.0
    site = measured(x, classes)[SITES[1]]
    figure = show_dimensions(site, top=4)
    found, dims = drawn(figure), x[1].abs().amax(0).argsort(descending=True)[:4]
    assert figure.layout.xaxis.ticktext == tuple(str(dim) for dim in dims.tolist()) and dims[0] == MASSIVE
    for code, name in enumerate(("special", "delimiter", "other")):
        mine = x[1, classes == code].abs().amax(0)[dims]
        torch.testing.assert_close(values(found[1, name]), mine, rtol=0, atol=0)
    own = x[1].abs().quantile(0.5, dim=0, interpolation="lower")[dims]
    torch.testing.assert_close(values(found[1, "median |a| of the dimension"]), own, rtol=0.0101, atol=0)
    assert found[1, "other"].customdata[0] == f"dimension {MASSIVE}, token 150, added to document 15"
    assert len(values(drawn(show_dimensions(site, top=99))[1, "other"])) == D


def test_a_class_without_tokens_leaves_a_gap_or_no_line_at_all() -> None:
    x, classes = rows()
    found = drawn(show_statistics(measured(x, classes.clamp_min(1))))
    assert (1, "special") not in found and (1, "other") in found
    one, both = measured(x, classes.clamp_min(1)), measured(x, classes)
    mixed = ActivationStatistics(
        sites=SITES,
        shapes=one.shapes,
        states=(one.states[0], both.states[1]),
        n_tokens=one.n_tokens,
        delimiters=(),
        provenance=one.provenance,
    )
    assert values(drawn(show_statistics(mixed))[1, "special"]).isnan().tolist() == [True, False]
    # One token has a size, though no variance.
    alone = drawn(show_statistics(measured(x[:, :1], classes[:1])))
    torch.testing.assert_close(values(alone[1, "special"]), x[:, 0].norm(dim=1), rtol=1e-12, atol=0)


def test_all_of_a_class_has_one_colour_and_one_entry_in_the_legend_and_scales_are_logarithmic() -> None:
    figure = show_statistics(measured(*rows()))
    colours: dict[str, set[str]] = {}
    for trace in figure.data:
        colours.setdefault(trace.name, set()).add(trace.line.color)
    assert all(len(found) == 1 for found in colours.values())
    classes = [colours[name].pop() for name in ("special", "delimiter", "other")]
    assert len(set(classes)) == 3
    shown = [trace.name for trace in figure.data if trace.showlegend]
    assert len(shown) == len(set(shown)) == len({trace.name for trace in figure.data})
    assert {figure.layout[f"yaxis{n}"].type for n in ("", "2", "3")} == {"log"}
    assert figure.layout.xaxis3.ticktext == SITES


# -- hostile text -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hostile", HOSTILE[1:6])
def test_names_of_sites_tokens_and_titles_are_text_and_no_page_runs_them(hostile: str) -> None:
    x, classes = rows()
    stats = measured(x, classes)

    class Renamed:
        sites = (hostile, hostile + "2")

        def __getitem__(self, site: str) -> Any:
            found = stats[SITES[self.sites.index(site)]]
            found.site = site
            return found

    names = dict.fromkeys(range(N), hostile)
    figures = [
        show_statistics(Renamed(), names=names, title=hostile),
        show_dimensions(Renamed()[hostile], names=names),
    ]
    text = page("t", [Section("", figure) for figure in figures])
    document = Document(text)
    assert document.open == []
    assert not any(part.strip() == "alert(1)" for part in document.text.get("script", []))
    for figure in figures:
        said = [*figure.layout.xaxis.ticktext, figure.layout.title.text]
        said += [box for trace in figure.data for box in (trace.customdata or ())]
        assert len(said) > 10 and not any("<" in each for each in said)
    boxes = figures[1].data[0].customdata
    assert all("token" not in box for box in boxes), "the given name stands in for the number"


def test_a_page_with_gaps_is_written_whole_and_with_the_same_bytes(tmp_path: Path) -> None:
    x, classes = rows()
    x[0, :, 0] = 0.0
    last = drawn(show_dimensions(measured(x, classes)[SITES[0]]))[1, "other"]
    assert values(last).isnan().tolist() == [False] * (D - 1) + [True], "a log scale has no place for zero"
    pages = [
        page("t", [Section("", show_statistics(measured(x, classes))), Section("", show_dimensions(site))])
        for site in [measured(x, classes)[SITES[0]]] * 2
    ]
    assert pages[0] == pages[1] and Document(pages[0]).open == [] and "NaN" not in pages[0].split("Plotly.newPlot")[-1]


# -- what is refused --------------------------------------------------------------------------------------------------


def test_no_site_no_tokens_and_no_dimension_are_refused() -> None:
    x, classes = rows()
    with pytest.raises(DataError, match="no site to draw"):
        show_statistics(measured(x[:0], classes, sites=()))
    with pytest.raises(DataError, match=r"1\.resid_post has no finite activation"):
        nothing = torch.full_like(x, math.nan)
        nothing[0] = x[0]
        show_statistics(measured(nothing, classes))
    with pytest.raises(DataError, match="has no finite activation"):
        show_dimensions(measured(x * math.inf, classes)[SITES[0]])
    for top in (0, -3):
        with pytest.raises(DataError, match=f"top={top}"):
            show_dimensions(measured(x, classes)[SITES[0]], top=top)


def test_a_dimension_that_is_never_finite_in_a_class_is_named() -> None:
    x, classes = rows()
    x[1, classes == 1, 4] = math.nan
    stats = measured(x, classes)
    for draw in (lambda: show_statistics(stats), lambda: show_dimensions(stats[SITES[1]])):
        with pytest.raises(DataError, match=r"dimensions \[4\] of 1\.resid_post .* 'delimiter'"):
            draw()
    x[1, 45, 4] = 2.0
    assert float(values(drawn(show_dimensions(measured(x, classes)[SITES[1]]))[1, "delimiter"]).min()) > 0


def test_the_librarys_own_statistics_are_what_the_figures_read() -> None:
    stats = measured(*rows())
    assert isinstance(stats, MeasuredSites) and isinstance(stats[SITES[0]], MeasuredSite)
