"""The strip: every example is a dot at its value, every group's mean and bounds are drawn, bad shapes are refused."""

import pytest
import torch

from interp.core.errors import DataError, ShapeError
from interp.report.figures import Axis
from interp.report.strip import strip


def test_dots_are_the_examples_and_diamonds_the_means_with_their_bounds() -> None:
    values = torch.tensor([[1.0, 2.0, 6.0], [0.0, -1.0, -2.0]])
    figure = strip(
        values,
        torch.tensor([1.5, -1.75]),
        torch.tensor([5.0, -0.5]),
        groups=Axis("head", ["a<b", "1"]),
        examples=["x", "y", "z"],
        value="effect",
    )
    dots, means = figure.data
    assert list(dots.y) == [1.0, 2.0, 6.0, 0.0, -1.0, -2.0]
    assert [round(x) for x in dots.x] == [0, 0, 0, 1, 1, 1] and len(set(dots.x)) == 6
    assert dots.x[0] + 1 == pytest.approx(dots.x[3]), "an example keeps its place in every group"
    assert list(means.y) == [3.0, -1.0] and list(means.x) == [0, 1]
    assert list(means.error_y.array) == [2.0, 0.5] and list(means.error_y.arrayminus) == [1.5, 0.75]
    assert "a&lt;b" in dots.customdata[0] and "<b" not in dots.customdata[0].replace("<br>", "")
    assert list(figure.layout.xaxis.ticktext) == ["a&lt;b", "1"]


def test_a_group_that_is_not_done_has_no_mean() -> None:
    values = torch.tensor([[1.0, torch.nan], [1.0, 3.0]])
    figure = strip(values, values[:, 0], values[:, 1], groups=Axis("head"))
    assert figure.data[1].y[0] != figure.data[1].y[0] and figure.data[1].y[1] == 2.0


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_refused() -> None:
    values, two = torch.zeros(2, 3), torch.zeros(2)
    with pytest.raises(ShapeError, match="low has 3 entries"):
        strip(values, torch.zeros(3), two, groups=Axis("head"))
    with pytest.raises(ShapeError, match="groups has 1 entries"):
        strip(values, two, two, groups=Axis("head", ["a"]))
    with pytest.raises(ShapeError, match="examples has 2 entries"):
        strip(values, two, two, groups=Axis("head"), examples=["a", "b"])
    with pytest.raises(DataError, match="no values"):
        strip(torch.zeros(0, 3), torch.zeros(0), torch.zeros(0), groups=Axis("head"))
