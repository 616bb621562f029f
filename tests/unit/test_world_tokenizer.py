"""The small world's tokenizer: a word is a token, text and tokens give each other back, anything else is bytes."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from interp.core.errors import DataError
from interp.core.manager import HookManager
from interp.core.modelmap import ModelMap
from interp.core.text import chat_tokens, single_token
from interp.testbed import lexicon, world
from interp.testbed.text import TASKS, Document
from interp.testbed.tokenizer import build_tokenizer, vocabulary
from interp.testbed.words import SPECIAL
from tests.world_reader import drawn

CHAT = [
    {"role": "user", "content": "Where does Mary live?"},
    {"role": "assistant", "content": "Mary lives in Rome."},
    {"role": "user", "content": "What is the job of Tom?"},
]
FOREIGN = ["naïve café", "日本語", "emoji 🙂 here", "Ünïcödé", "zzyzx", "tab\there", "a  b   c", "\x00\x7f", "don't"]


@functools.cache
def tokenizer() -> Any:
    return build_tokenizer()


@functools.cache
def readable() -> tuple[Document, ...]:
    """Documents of every task from both parts of the split, but for random tokens of the whole vocabulary."""
    training = [d for d in drawn(2000) if d.cases[0].task != "repeat"]
    return (*training, *(d for task in TASKS for d in drawn(60, task, held_out=True)))


class Table(nn.Module):
    """The least that a manager wraps: an embedding and an unembedding."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.blocks = nn.Embedding(len(vocabulary()), 2), nn.ModuleList([nn.Identity()])
        self.norm, self.head = nn.Identity(), nn.Linear(2, len(vocabulary()))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[batch pos] → [batch pos vocab]."""
        return self.head(self.norm(self.emb(ids)))


def manager(given: Any) -> HookManager:
    paths = {"embed": "emb", "block": "blocks.{layer}", "ln_final": "norm", "unembed": "head"}
    sizes: dict[str, Any] = {"n_layers": 1, "d_model": 2, "n_heads": 1, "n_kv_heads": 1, "d_head": 2, "d_mlp": None}
    table = ModelMap(family="table", d_vocab=len(vocabulary()), paths=paths, **sizes)
    return HookManager.load(Table(), given, map=table)


# -- the vocabulary ---------------------------------------------------------------------------------------------------


def test_the_vocabulary_opens_with_the_special_tokens_then_the_bytes_and_names_nothing_twice() -> None:
    words = vocabulary()
    assert words[:6] == SPECIAL == ("<|bos|>", "<|eos|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>")
    assert [ord(text) for text in words[6:262]] == list(range(256))
    assert len(set(words)) == len(words) == 1321
    table = tokenizer().get_vocab()
    assert len(table) == len(tokenizer()) == 1321 and sorted(table.values()) == list(range(1321))


def test_the_tokenizer_knows_its_special_tokens() -> None:
    t = tokenizer()
    assert (t.bos_token_id, t.eos_token_id, t.pad_token_id) == (0, 1, 2)
    assert sorted(t.all_special_ids) == [0, 1, 2, 3, 4, 5]
    assert [t.convert_ids_to_tokens(i) for i in range(6)] == list(SPECIAL)
    assert t.padding_side == "right" and build_tokenizer(context=64).model_max_length == 64


def test_every_word_of_the_lexicon_is_one_token_with_its_space() -> None:
    forms = [*world.concepts(), *(n.plural for n in lexicon.NOUNS), *lexicon.velic_words().values()]
    forms += [form for v in lexicon.VERBS for form in (v.past, v.gerund, v.third)]
    forms += [a.comparative for a in lexicon.ADJECTIVES]
    ids = [single_token(tokenizer(), f" {form}") for form in dict.fromkeys(forms)]
    assert len(set(ids)) == len(ids)
    assert [vocabulary()[i] for i in ids] == [f" {form}" for form in dict.fromkeys(forms)]


def test_a_number_of_four_digits_is_two_tokens_of_two() -> None:
    shown = [tokenizer().decode([i]) for i in tokenizer()(" 1742", add_special_tokens=False).input_ids]
    assert shown == [" 17", "42"]
    for number in range(100):
        assert len(tokenizer()(f" {number}", add_special_tokens=False).input_ids) == 1
        year = tokenizer()(f" 18{number:02d}", add_special_tokens=False).input_ids
        assert [vocabulary()[i] for i in year] == [" 18", f"{number:02d}"]


def test_every_token_but_the_pad_occurs_in_training_text() -> None:
    found: set[int] = set()
    for document in (*drawn(2000), *drawn(600, "repeat")):
        found.update(document.ids())
    assert set(range(1321)) - found == {2}


# -- text to tokens and back ------------------------------------------------------------------------------------------


def test_every_word_of_every_passage_is_one_token() -> None:
    known = set(vocabulary())
    for document in readable():
        for case in document.cases:
            assert all(w.text in known for w in case.words)
            assert {*case.answers, *case.foils} <= known


def test_the_tokens_of_a_document_are_those_of_its_text() -> None:
    documents = readable()
    assert len(documents) > 2400
    assert {case.task for d in documents for case in d.cases} == set(TASKS)
    encoded = tokenizer()([d.text for d in documents]).input_ids
    assert all(d.ids() == [*ids, 1] for d, ids in zip(documents, encoded, strict=True))


def test_decoding_gives_the_text_back() -> None:
    for document in readable()[:300]:
        decoded = tokenizer().decode(document.ids()[1:-1])
        assert decoded.removeprefix(" ") == document.text


@pytest.mark.parametrize("text", FOREIGN)
def test_what_is_not_a_word_falls_back_to_bytes_and_comes_back(text: str) -> None:
    ids = tokenizer()(text).input_ids
    assert ids[0] == 0
    assert tokenizer().decode(ids, skip_special_tokens=True) == f" {text}"
    single = [i for i in ids[1:] if 6 <= i < 262]
    assert single, "some of it is no word"


def test_an_unknown_word_is_its_bytes_and_its_neighbours_stay_words() -> None:
    ids = tokenizer()("The zebra is big.", add_special_tokens=False).input_ids
    shown = [vocabulary()[i] for i in ids]
    assert shown == [" The", " ", "z", "e", "b", "r", "a", " is", " big", "."]


def test_the_empty_text_is_bos_alone() -> None:
    assert tokenizer()("").input_ids == [0]
    assert tokenizer()("", add_special_tokens=False).input_ids == []


def test_a_saved_tokenizer_reads_the_same(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    texts = [d.text for d in readable()[::20]] + FOREIGN + [""]
    assert again(texts).input_ids == tokenizer()(texts).input_ids
    assert again.get_vocab() == tokenizer().get_vocab()
    assert again.all_special_ids == tokenizer().all_special_ids and again.padding_side == "right"
    assert again.chat_template == tokenizer().chat_template
    assert again.decode(again("Where is Greece?").input_ids) == tokenizer().decode(
        tokenizer()("Where is Greece?").input_ids
    )
    hm = manager(again)
    assert [row[mask].tolist() for row, mask in _rows(hm, texts)] == tokenizer()(texts).input_ids


def _rows(hm: HookManager, texts: list[str]) -> Any:
    tokens = hm.to_tokens(texts)
    assert tokens.bos and bool((tokens.ids[~tokens.mask] == 2).all())
    return zip(tokens.ids, tokens.mask, strict=True)


# -- chats ------------------------------------------------------------------------------------------------------------


def test_a_chat_is_written_as_training_text_writes_it() -> None:
    """The passage of a fact in chat form, cut before its answer, is what the template makes of the question."""
    chats = [c for d in readable() for c in d.cases if c.task == "fact" and c.words[0].text == "<|user|>"]
    assert len(chats) > 20
    for case in chats[:20]:
        question = case.text.split("<|end|>")[0].removeprefix("<|user|> ")
        chat = chat_tokens(tokenizer(), [{"role": "user", "content": question}])
        assert chat.bos and chat.ids[0].tolist() == Document([case]).ids()[: chat.ids.shape[1]]
        assert [int(i) for i in chat.ids[0, -2:]] == [5, 4]
        shown = tokenizer().decode(chat.ids[0, chat.spans["user"][0]])
        assert shown == f" {question}"


def test_the_spans_of_a_chat_hold_what_each_role_says() -> None:
    chat = manager(tokenizer()).chat(CHAT)
    assert chat.text == (
        "<|bos|><|user|> Where does Mary live?<|end|><|assistant|> Mary lives in Rome.<|end|>"
        "<|user|> What is the job of Tom?<|end|><|assistant|>"
    )
    spans = {role: tokenizer().decode(chat.ids[0, mask[0]]) for role, mask in chat.spans.items()}
    assert spans == {"user": " Where does Mary live? What is the job of Tom?", "assistant": " Mary lives in Rome."}
    closed = chat_tokens(tokenizer(), CHAT, add_generation_prompt=False)
    assert torch.equal(closed.ids, chat.ids[:, :-1])


def test_a_chat_with_another_role_is_refused() -> None:
    with pytest.raises(DataError, match="roles are user and assistant, got system"):
        chat_tokens(tokenizer(), [{"role": "system", "content": "Be kind."}])
