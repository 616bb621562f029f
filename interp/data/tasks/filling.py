"""Templates with slots, such as "When <A> and <B> met": filled with words, whose places become spans."""

import re
from collections.abc import Mapping, Sequence

from interp.data.prompt import Prompt

__all__ = ["fill", "following", "split_templates"]

_SLOT = re.compile(r"<(\w+)>")
_NEXT = re.compile(r"\s*(\w+|[^\w\s])")


def fill(template: str, words: Mapping[str, str], names: Mapping[str, str | None] | None = None) -> Prompt:
    """Return a template with its slots filled, each slot's places as a span.

    Args:
        template: a text with slots `<slot>`; a slot may stand in it several times.
        words: slot → the text put there.
        names: slot → name of its span, or None for no span; a slot that is not in it names its span itself.
    """
    named = names or {}
    text, at = "", 0
    spans: dict[str, list[tuple[int, int]]] = {}
    for slot in _SLOT.finditer(template):
        text += template[at : slot.start()]
        word = words[slot[1]]
        name = named.get(slot[1], slot[1])
        if name is not None:
            spans.setdefault(name, []).append((len(text), len(text) + len(word)))
        text += word
        at = slot.end()
    return Prompt(text + template[at:], spans)


def following(prompt: Prompt, name: str, new: str) -> Prompt:
    """Return the prompt with one more span: the word or sign that follows a span's first place.

    Args:
        prompt: the prompt.
        name: a span of it, after which something stands.
        new: name of the new span.
    """
    place = _NEXT.match(prompt.text, prompt.spans[name][0][1])
    assert place is not None, f"nothing follows {name!r}"  # a template's fault, not a caller's
    return Prompt(prompt.text, {**prompt.spans, new: place.span(1)})


def split_templates(templates: Sequence[str], held_out: bool) -> list[tuple[int, str]]:
    """Return a task's templates with their numbers: every fourth for held-out prompts, the others for the rest."""
    return [(i, text) for i, text in enumerate(templates) if (i % 4 == 3) == held_out]
