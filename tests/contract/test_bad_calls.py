"""A thousand random bad calls: a typed error each, no hook left, and the next run right to the bit."""

import warnings

import pytest

from tests.contract.bad_calls import VICTIMS, failures

pytestmark = pytest.mark.contract

EACH = 125


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", VICTIMS)
def test_bad_calls_raise_typed_errors_and_leave_no_trace(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = list(failures(name, EACH, seed=VICTIMS.index(name)))
    assert not found, "\n".join(found)


def test_there_are_a_thousand_of_them() -> None:
    assert EACH * len(VICTIMS) >= 1000
