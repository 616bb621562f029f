"""The tasks that are written in words, in the order in which the card lists them."""

from interp.testbed.knowledge import CALENDAR, CHOICE, FACT, TWO_HOP, VELIC, YEARS
from interp.testbed.lists import BRACKETS, FUNCTIONS
from interp.testbed.prose import AGREEMENT, CHAIN, IOI, PRONOUN, RECALL, SENTIMENT
from interp.testbed.words import Task

__all__ = ["WORDED"]

WORDED: dict[str, Task] = {
    task.name: task
    for task in (
        IOI,
        FACT,
        FUNCTIONS,
        AGREEMENT,
        SENTIMENT,
        PRONOUN,
        YEARS,
        RECALL,
        CHAIN,
        CHOICE,
        VELIC,
        CALENDAR,
        TWO_HOP,
        BRACKETS,
    )
}
