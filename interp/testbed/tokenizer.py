"""The tokenizer of the small world: byte-level BPE in which every word is one token, its leading space included."""

from functools import cache
from typing import TYPE_CHECKING, Any

from interp.testbed import lexicon, world
from interp.testbed.worded import WORDED
from interp.testbed.words import SPECIAL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CHAT_TEMPLATE", "build_tokenizer", "vocabulary"]

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('roles are user and assistant, got ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|> ' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# In byte-level letters (Ġ is the space): a word with its space, a number of two digits at most, a sign, or a byte.
_SPLIT = r"Ġ?[A-Za-z]+|Ġ?[0-9]{1,2}|Ġ?[!-/:-@\[-`{-~]|."


def _byte_letters() -> list[str]:
    """Byte → the printable letter that byte-level BPE writes for it (the table of GPT-2: Radford et al. 2019)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in shown}
    hidden = [byte for byte in range(256) if byte not in letters]
    return [letters.get(byte) or chr(256 + hidden.index(byte)) for byte in range(256)]


def _written(text: str) -> str:
    """Text as the vocabulary writes it."""
    letters = _byte_letters()
    return "".join(letters[byte] for byte in text.encode("utf-8"))


@cache
def vocabulary() -> tuple[str, ...]:
    """Every token by id: special tokens, the 256 bytes, numbers, then the world's words in order of the lexicon.

    Numbers are " 0" to " 99", and "00" to "99" for what follows the first two digits of a year.
    """
    words = [f" {i}" for i in range(100)] + [f"{i:02d}" for i in range(100)]
    words += [f" {w}" for w in world.concepts()]
    for noun in lexicon.NOUNS:
        words.append(f" {noun.plural}")
    for verb in lexicon.VERBS:
        words += [f" {form}" for form in (verb.past, verb.gerund, verb.third)]
    words += [f" {adjective.comparative}" for adjective in lexicon.ADJECTIVES]
    words += [f" {w}" for w in lexicon.velic_words().values()]
    words += [text for task in WORDED.values() for text in task.vocabulary]
    kept = dict.fromkeys(w for w in words if len(w.encode()) > 1 and w not in SPECIAL)
    return (*SPECIAL, *(bytes([byte]).decode("latin-1") for byte in range(256)), *kept)


@cache
def _token_strings() -> tuple[str, ...]:
    letters, first = _byte_letters(), len(SPECIAL) + 256
    return (*SPECIAL, *letters, *(_written(text) for text in vocabulary()[first:]))


def build_tokenizer(*, context: int = 128) -> "PreTrainedTokenizerBase":
    """Make the tokenizer: every word of the world is one token, anything else falls back to its bytes.

    A text begins with BOS; a first word gets the leading space that it would have inside a sentence. There are no
    merges to learn: a word in the vocabulary is taken whole, and no piece of a word has an entry of its own, so that
    every token of the vocabulary occurs in training text.

    Args:
        context: tokens that the model can take, for the tokenizer's own warning.

    Returns:
        A fast Hugging Face tokenizer with BOS, EOS, pad, a chat template, and right padding.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    strings = _token_strings()
    core = Tokenizer(models.BPE({s: i for i, s in enumerate(strings)}, [], ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False),
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL])
    bos = SPECIAL[0]
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, 0)]
    )
    roles: dict[str, Any] = {"bos_token": bos, "eos_token": SPECIAL[1], "pad_token": SPECIAL[2]}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        **roles,
        additional_special_tokens=list(SPECIAL[3:]),
        model_max_length=context,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
