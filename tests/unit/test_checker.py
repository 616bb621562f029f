"""The tests' own type checker is on: a wrong shape or type is caught where it is passed."""

from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

from interp.core.metrics import loss_per_token
from interp.core.resources import resource


def test_a_wrong_type_is_caught() -> None:
    with pytest.raises(TypeCheckError):
        resource(Path("data"))  # type: ignore[arg-type]


def test_a_wrong_shape_is_caught() -> None:
    with pytest.raises(TypeCheckError):
        loss_per_token(torch.zeros(2, 5, 7), torch.zeros(3, 5, dtype=torch.long))


@pytest.mark.usefixtures("unchecked")
def test_a_test_of_wrong_arguments_can_switch_it_off() -> None:
    assert resource(Path("data")).is_dir()  # type: ignore[arg-type]
