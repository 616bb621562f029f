"""The words of the small world: every form of every word, and what each is.

A word's forms stand together, so that a grammatical function (plural, past tense, …) is a column of a table. Words of
the second language, Velic, are made up of syllables, by rule, from a fixed seed.
"""

import random
from dataclasses import dataclass

__all__ = [
    "ADJECTIVES",
    "CATEGORIES",
    "COLOURS",
    "COUNTRIES",
    "DAYS",
    "FEMALE",
    "JOBS",
    "LANGUAGE_OF_THE_WORLD",
    "MALE",
    "MONTHS",
    "NOUNS",
    "NUMBER_WORDS",
    "ORDINALS",
    "TOPICS",
    "VALENCED",
    "VERBS",
    "Adjective",
    "Country",
    "Noun",
    "Verb",
    "velic_words",
]

LANGUAGE_OF_THE_WORLD = "Velic"

FEMALE = tuple(
    "Mary Anna Susan Linda Emma Alice Sarah Laura Julia Helen Clara Nora Ruth Eva Rosa Lucy Jane Kate Ellen Grace "
    "Amy Diana Paula Maria Irene Vera Olga Nina Carol Judy Fiona Hannah Molly Tina Wendy Zoe Iris Mabel Stella "
    "Edith".split()
)
MALE = tuple(
    "John Peter David James Robert Thomas Paul Mark Daniel Henry George Simon Frank Arthur Oscar Victor Martin Adam "
    "Jack Tom Ben Sam Luke Max Leo Carl Eric Ivan Hugo Felix Oliver Walter Roger Kevin Brian Alan Neil Ralph Edgar "
    "Louis".split()
)


@dataclass(frozen=True)
class Noun:
    """A countable thing.

    Attributes:
        singular, plural: its forms.
        category: what it is one of; a word of `CATEGORIES`.
        topic: which topic it belongs to; a word of `TOPICS`.
    """

    singular: str
    plural: str
    category: str
    topic: str


@dataclass(frozen=True)
class Verb:
    """A regular or irregular verb in four forms."""

    base: str
    past: str
    gerund: str
    third: str


@dataclass(frozen=True)
class Adjective:
    """A gradable adjective, its comparative and its opposite."""

    base: str
    comparative: str
    antonym: str


@dataclass(frozen=True)
class Country:
    """A country with the facts that are taught about it."""

    name: str
    capital: str
    language: str
    continent: str


TOPICS = ("kitchen", "school", "garden", "music", "sport", "travel")
CATEGORIES = ("animal", "food", "tool", "vehicle", "clothing", "furniture", "plant", "instrument")

_NOUNS = """
apple apples food kitchen | cake cakes food kitchen | egg eggs food kitchen | potato potatoes food kitchen
soup soups food kitchen | knife knives tool kitchen | spoon spoons tool kitchen | plate plates tool kitchen
book books tool school | pencil pencils tool school | desk desks furniture school | chair chairs furniture school
ruler rulers tool school | shelf shelves furniture school | coat coats clothing school | map maps tool school
rose roses plant garden | tree trees plant garden | bush bushes plant garden | leaf leaves plant garden
spade spades tool garden | dog dogs animal garden | mouse mice animal garden | goose geese animal garden
drum drums instrument music | violin violins instrument music | piano pianos instrument music
flute flutes instrument music | harp harps instrument music | dress dresses clothing music | bell bells instrument music
ball balls tool sport | racket rackets tool sport | shoe shoes clothing sport | shirt shirts clothing sport
horse horses animal sport | cap caps clothing sport | boat boats vehicle sport | glove gloves clothing sport
bus buses vehicle travel | train trains vehicle travel | car cars vehicle travel | bag bags tool travel
key keys tool travel | ticket tickets tool travel | cat cats animal travel | bird birds animal garden
sheep sheep animal garden | bench benches furniture garden | table tables furniture kitchen
""".replace("\n", " | ")
NOUNS = tuple(Noun(*entry.split()) for entry in _NOUNS.split("|") if entry.strip())

_VERBS = """
walk walked walking walks | play played playing plays | open opened opening opens | clean cleaned cleaning cleans
paint painted painting paints | carry carried carrying carries | wash washed washing washes | help helped helping helps
sing sang singing sings | drink drank drinking drinks | write wrote writing writes | drive drove driving drives
take took taking takes | make made making makes | find found finding finds | keep kept keeping keeps
build built building builds | break broke breaking breaks | draw drew drawing draws | throw threw throwing throws
eat ate eating eats | see saw seeing sees | run ran running runs | swim swam swimming swims
speak spoke speaking speaks | teach taught teaching teaches | buy bought buying buys | sell sold selling sells
"""
VERBS = tuple(Verb(*entry.split()) for line in _VERBS.split("\n") for entry in line.split("|") if entry.strip())

_ADJECTIVES = """
hot hotter cold | cold colder hot | big bigger small | small smaller big | fast faster slow | slow slower fast
old older young | young younger old | dark darker light | light lighter dark | hard harder soft | soft softer hard
long longer short | short shorter long | rich richer poor | poor poorer rich | wide wider narrow | narrow narrower wide
high higher low | low lower high | strong stronger weak | weak weaker strong | clean cleaner dirty | dirty dirtier clean
loud louder quiet | quiet quieter loud | thick thicker thin | thin thinner thick
"""
ADJECTIVES = tuple(
    Adjective(*entry.split()) for line in _ADJECTIVES.split("\n") for entry in line.split("|") if entry.strip()
)

_COUNTRIES = """
France Paris French Europe | Germany Berlin German Europe | Italy Rome Italian Europe | Spain Madrid Spanish Europe
Russia Moscow Russian Europe | Poland Warsaw Polish Europe | Greece Athens Greek Europe
Sweden Stockholm Swedish Europe | Norway Oslo Norwegian Europe
Finland Helsinki Finnish Europe | Hungary Budapest Hungarian Europe
Portugal Lisbon Portuguese Europe | Denmark Copenhagen Danish Europe | Ireland Dublin Irish Europe
Japan Tokyo Japanese Asia | China Beijing Chinese Asia | Korea Seoul Korean Asia | Thailand Bangkok Thai Asia
Vietnam Hanoi Vietnamese Asia | Mongolia Ulaanbaatar Mongolian Asia | Nepal Kathmandu Nepali Asia
Iran Tehran Persian Asia | Egypt Cairo Arabic Africa | Kenya Nairobi Swahili Africa | Ghana Accra English Africa
Somalia Mogadishu Somali Africa | Rwanda Kigali Kinyarwanda Africa | Madagascar Antananarivo Malagasy Africa
"""
COUNTRIES = tuple(
    Country(*entry.split()) for line in _COUNTRIES.split("\n") for entry in line.split("|") if entry.strip()
)

JOBS = tuple("doctor teacher farmer baker pilot painter lawyer nurse singer sailor writer cook".split())
COLOURS = tuple("red blue green black white yellow brown pink".split())
DAYS = tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split())
MONTHS = tuple("January February March April May June July August September October November December".split())
NUMBER_WORDS = tuple("one two three four five six seven eight nine ten eleven twelve".split())
ORDINALS = tuple("first second third fourth fifth".split())
# Adjectives that say whether something is liked: +1 and −1. None of them has another task.
VALENCED = {
    1: tuple("wonderful excellent lovely great perfect charming brilliant delightful superb pleasant".split()),
    -1: tuple("terrible awful horrible bad dreadful boring ugly dull nasty vile".split()),
}


def velic_words() -> dict[str, str]:
    """The made-up language: every base form of a noun, verb or adjective → its Velic word, all different.

    A stem is two open syllables, drawn without replacement; nouns end in -no, verbs in -ru, adjectives in -ti.
    """
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    stems = [a + b for a in syllables for b in syllables]
    draw = random.Random("velic")
    draw.shuffle(stems)
    english = [(noun.singular, "no") for noun in NOUNS] + [(verb.base, "ru") for verb in VERBS]
    english += [(adjective.base, "ti") for adjective in ADJECTIVES]
    # "clean" is a verb and an adjective: one word, one translation, the first.
    words: dict[str, str] = {}
    for (word, ending), stem in zip(english, stems, strict=False):
        words.setdefault(word, stem + ending)
    return words
