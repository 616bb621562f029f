"""Agreement in gender and number: a pronoun with a name, a verb with its subject.

Sources: pronouns as in Mathwin et al. (2023), "Identifying a preliminary circuit for predicting gendered pronouns in
GPT-2 small"; verbs, with and without an attractor, as in Linzen et al. (2016), arXiv 1611.01368. Departure: own
sentences and words.
"""

import random

from interp.core.errors import DataError
from interp.data.prompt import Pair
from interp.data.tasks.bank import Bank
from interp.data.tasks.filling import fill, split_templates
from interp.data.tasks.spec import Drawing, Maker, TaskSpec
from interp.data.tasks.words import FEMALE, MALE, PLURALS

__all__ = ["AGREEMENT", "ATTRACTOR", "PRONOUN"]

_PRONOUNS = (
    "So <name> is a really great friend, isn't",
    "I think <name> was late because",
    "We asked <name> to sing, and then",
    "Everyone likes <name> because",
    "When <name> got home,",
    "That <name> is clever, isn't",
    "Nobody believed <name> until",
    "Last night <name> was so tired that",
)
_SIMPLE = (
    "The <subject>",
    "Now the <subject>",
    "We think that the <subject>",
    "They said that the <subject>",
    "In the end the <subject>",
    "I know why the <subject>",
    "She told us that the <subject>",
    "As you can see, the <subject>",
)
_BETWEEN = (
    "The <subject> near the <attractor>",
    "We think that the <subject> behind the <attractor>",
    "Now the <subject> with the <attractor>",
    "They said that the <subject> next to the <attractor>",
    "In the end the <subject> of the <attractor>",
    "I know why the <subject> beside the <attractor>",
    "She told us that the <subject> from the <attractor>",
    "As you can see, the <subject> around the <attractor>",
)
_SINGULAR, _PLURAL = (" is", " was", " has"), (" are", " were", " have")


def _pronouns(bank: Bank, held_out: bool, corruption: str) -> Drawing:
    names = {" she": bank.whole(FEMALE, "women's names", least=1), " he": bank.whole(MALE, "men's names", least=1)}
    templates = split_templates(_PRONOUNS, held_out)

    def draw_pair(draw: random.Random) -> Pair:
        number, template = draw.choice(templates)
        right, wrong = draw.sample((" she", " he"), 2)
        sides = [fill(template, {"name": draw.choice(names[said])}) for said in (right, wrong)]
        meta = {"task": "pronoun", "template": number, "variant": right.strip()}
        meta |= {"held_out": held_out, "corruption": corruption}
        return Pair(sides[0], sides[1], (right,), (wrong,), meta)

    return draw_pair


def _verbs(templates: tuple[str, ...], task: str) -> Maker:
    def prepare(bank: Bank, held_out: bool, corruption: str) -> Drawing:
        chosen = split_templates(templates, held_out)
        known = set(bank.whole([*PLURALS, *PLURALS.values()], "nouns", least=4))
        nouns = [both for both in PLURALS.items() if known.issuperset(both)]
        if len(nouns) < 2:
            raise DataError(
                f"{task} needs two nouns with singular and plural of one token each; this tokenizer has {len(nouns)}"
            )

        def draw_pair(draw: random.Random) -> Pair:
            number, template = draw.choice(chosen)
            subject, between = draw.sample(nouns, 2)
            plural = draw.random() < 0.5
            # The attractor has the other number than the clean subject, on both sides.
            attractor = between[not plural]
            sides = [fill(template, {"subject": subject[p], "attractor": attractor}) for p in (plural, not plural)]
            right, wrong = (_PLURAL, _SINGULAR) if plural else (_SINGULAR, _PLURAL)
            meta = {"task": task, "template": number, "variant": "plural" if plural else "singular"}
            meta |= {"held_out": held_out, "corruption": corruption}
            return Pair(sides[0], sides[1], right, wrong, meta)

        return draw_pair

    return prepare


PRONOUN = TaskSpec(
    "pronoun",
    "whether a person is 'she' or 'he', by the name; corrupted: a name of the other gender",
    ("gender",),
    "sentences",
    _pronouns,
)
AGREEMENT = TaskSpec(
    "agreement",
    "whether a verb is singular or plural (is, was, has; are, were, have), by its subject; corrupted: the subject has "
    "the other number",
    ("number",),
    "sentences",
    _verbs(_SIMPLE, "agreement"),
)
ATTRACTOR = TaskSpec(
    "agreement_attractor",
    "the same with a noun of the other number between subject and verb",
    ("number",),
    "sentences",
    _verbs(_BETWEEN, "agreement_attractor"),
)
