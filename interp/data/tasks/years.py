"""Greater-than: "The war lasted from the year 1732 to the year 17" → any of "33" … "99".

Source: Hanna et al. (2023), arXiv 2305.00586, §2: prompt, years and the corruption to 01. Departure: own nouns, and
centuries 11 to 17.
"""

import random

from interp.core.errors import DataError
from interp.data.prompt import Pair, Prompt
from interp.data.tasks.bank import Bank
from interp.data.tasks.filling import fill
from interp.data.tasks.spec import Drawing, TaskSpec
from interp.data.tasks.words import EVENTS

__all__ = ["GREATER_THAN"]

_TEMPLATE = "The <noun> lasted from the year <century><start> to the year <again>"
_FIRST = "01"


def _prepare(bank: Bank, held_out: bool, corruption: str) -> Drawing:
    nouns = bank.whole(EVENTS, "events", least=1, held_out=held_out)
    years = _years(bank)
    centuries = sorted(years)

    def draw_pair(draw: random.Random) -> Pair:
        noun, century = draw.choice(nouns), draw.choice(centuries)
        start = draw.choice(years[century])
        after = tuple(f"{year:02d}" for year in range(int(start) + 1, 100))
        before = tuple(f"{year:02d}" for year in range(int(start) + 1))
        meta = {"task": "greater_than", "noun": noun, "century": century, "start": int(start)}
        meta |= {"held_out": held_out, "corruption": corruption}
        return Pair(_prompt(noun, century, start), _prompt(noun, century, _FIRST), after, before, meta)

    return draw_pair


def _years(bank: Bank) -> dict[int, list[str]]:
    """Century → the years of it that are its number's token and one more, where the first one is too."""
    found: dict[int, list[str]] = {}
    years = [f"{year:02d}" for year in range(1, 99)]
    for century in range(11, 18):
        counts = bank.added(f"the year {century}", years)
        kept = [year for year, n in zip(years, counts, strict=True) if n == 1]
        if kept[:1] == [_FIRST] and len(kept) > 1:
            found[century] = kept[1:]
    if not found:
        raise DataError(
            "this tokenizer splits no year from 1101 to 1798 into its century and two digits, which greater_than "
            "needs; use another task"
        )
    return found


def _prompt(noun: str, century: int, start: str) -> Prompt:
    words = {"noun": noun, "century": str(century), "start": start, "again": str(century)}
    return fill(_TEMPLATE, words, {"start": "year", "again": None})


GREATER_THAN = TaskSpec(
    "greater_than",
    "in which year something that began in 17YY ended: later; answers are all years after YY, foils 00 to YY; "
    "corrupted: it began in 1701",
    ("first_year",),
    "nouns",
    _prepare,
)
