"""The kept table speaks of today's families, and of laws that hold."""

import re

import pytest

from tests import oracle
from tests.contract import table
from tests.contract.laws import TOLERANCE
from tests.families import FAMILIES

pytestmark = pytest.mark.contract


def test_the_kept_table_covers_every_family_and_column_within_tolerance() -> None:
    lines = [
        line.strip("| ").split(" | ") for line in table.PATH.read_text(encoding="utf-8").splitlines() if "|" in line
    ]
    head, *rows = (line for line in lines if not set("".join(line)) <= set("-| "))
    assert head == ["family", "TransformerLens", "logits", *table.COLUMNS]
    assert [row[0] for row in rows] == list(FAMILIES)
    for row in rows:
        assert len(row) == len(head)
        assert row[2] == "equal", row
        cells = [cell for cell in (row[1], *row[3:]) if cell not in ("see below", "refused")]
        assert all(float(re.split(r"[ (]", cell)[0]) <= TOLERANCE for cell in cells), row


def test_the_kept_table_gives_the_reason_of_every_known_difference() -> None:
    text = table.PATH.read_text(encoding="utf-8")
    for reason in (*oracle.KNOWN_DIFFERENCES.values(), *oracle.UNAVAILABLE.values()):
        assert reason in text
