"""Repetition and compression of token rows and texts, held to counts by hand."""

import math

import pytest

from interp.core.errors import DataError
from interp.steering.evaluating.fluency import compression, distinct_n


def test_distinct_n_is_the_share_of_different_grams() -> None:
    assert distinct_n([1, 2, 3, 4], 1) == 1.0
    assert distinct_n([1, 2, 1, 2], 1) == 0.5
    # (1 2) (2 1) (1 2): two of three.
    assert distinct_n([1, 2, 1, 2], 2) == pytest.approx(2 / 3)
    assert distinct_n([7] * 10, 3) == 1 / 8


def test_rows_shorter_than_a_gram_have_no_share() -> None:
    assert math.isnan(distinct_n([1, 2], 3))
    assert math.isnan(distinct_n([], 1))
    with pytest.raises(DataError, match="at least one token"):
        distinct_n([1], 0)


def test_compression_falls_with_repetition_and_not_with_the_alphabet() -> None:
    once = "the quick brown fox jumps over the lazy dog and runs away "
    assert compression(once * 20) < 0.1 < 0.6 < compression(once)
    # An invariance: which letters a text is written in says nothing of how it repeats itself.
    shifted = "".join(chr(ord(c) + 1) for c in once)
    assert compression(shifted * 20) == pytest.approx(compression(once * 20), abs=0.02)
    assert math.isnan(compression(""))
