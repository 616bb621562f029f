"""The functions of the small world as tasks in context: every input has several, so that shots must say which."""

from interp.data.icl import FunctionTask, with_others
from interp.testbed.lists import FORMATS, functions

__all__ = ["DOMAINS", "world_functions", "world_templates"]

DOMAINS = ("noun", "verb", "adjective", "country", "person", "velic")
"""The kinds of input."""


def world_templates() -> tuple[str, ...]:
    """Return the wordings that lists of the world have, each as the text of one shot."""
    made = []
    for before, between, after in FORMATS:
        gap = "" if after.endswith("\n") else " "
        made.append(f"{before + ' ' if before else ''}{{input}}{between} {{output}}{after}{gap}")
    return tuple(made)


def world_functions(template: int = 2) -> dict[str, FunctionTask]:
    """Return every function of the world: "noun_plural", "country_capital", …; one word in, one word out.

    Args:
        template: which of `world_templates()`; by default "in: {input} out: {output}".

    Returns:
        The tasks by name; each knows the outputs of the others over its own inputs.
    """
    text = world_templates()[template]
    made: dict[str, FunctionTask] = {}
    for domain in DOMAINS:
        tables = functions(domain)
        held = {
            f"{domain}_{name}": FunctionTask(
                f"{domain}_{name}", tuple((x, word.text.strip()) for x, word in table.items()), text
            )
            for name, table in tables.items()
        }
        made |= with_others(held)
    return made
