"""Text to tokens and back: BOS, padding, single tokens, special tokens, chats and their spans."""

import functools
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from interp.core.errors import DataError
from interp.core.inputs import check_tokens, read_inputs
from interp.core.intervention import Ablate
from interp.core.text import (
    Chat,
    Tokens,
    chat_tokens,
    pad_rows,
    single_token,
    special_mask,
    str_tokens,
    tokenize,
)
from interp.core.where import Where
from tests.families import manager, word_tokenizer

CORPUS = ["Paris is the capital. Paris is old. the capital is Paris", "She said the town is old"] * 4
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
TURNS = [
    {"role": "system", "content": "w5 w6"},
    {"role": "user", "content": "w1 w2 w3"},
    {"role": "assistant", "content": "w7"},
    {"role": "user", "content": "w2 w3"},
]


def _wrapped(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@functools.cache
def byte_level() -> PreTrainedTokenizerFast:
    """A tokenizer of GPT-2's kind: byte-level BPE, no space put before a text, no BOS put in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _wrapped(tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


@functools.cache
def sentence_piece() -> PreTrainedTokenizerFast:
    """A tokenizer of Llama's kind: ▁ before every word, a BOS put in front of every text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Prepend("▁")  # before a text's own leading space too, as Llama 2's
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _wrapped(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@functools.cache
def chatty(template: str = TEMPLATE, *, habit: bool = True) -> PreTrainedTokenizerFast:
    """Words, a template, and (as Llama's) a BOS of the tokenizer's own habit beside the template's."""
    words = [f"w{i}" for i in range(12)] + ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "user", "I"]
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "?": 1} | {w: i + 2 for i, w in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if habit:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    wrapped = _wrapped(tokenizer, bos_token="<s>", eos_token="<s>", unk_token="?")
    wrapped.chat_template = template
    return wrapped


def spanned(chat: Chat, role: str) -> list[str]:
    """The text of the tokens in a role's span."""
    return [text for text, inside in zip(chat.str_tokens[0], chat.spans[role][0].tolist(), strict=True) if inside]


# -- BOS and padding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bos", "habitual", "plain"), [(None, True, False), (True, True, True), (False, False, False)], ids=str
)
def test_bos_follows_the_habit_unless_asked_for_and_never_comes_twice(
    bos: bool | None, habitual: bool, plain: bool
) -> None:
    for tokenizer, expected in ((sentence_piece(), habitual), (byte_level(), plain)):
        tokens = tokenize(tokenizer, ["Paris is", "the town is old"], bos=bos)
        bare = [tokenizer(text, add_special_tokens=False).input_ids for text in ("Paris is", "the town is old")]
        front = [tokenizer.bos_token_id] if expected else []
        assert [row[m].tolist() for row, m in zip(tokens.ids, tokens.mask, strict=True)] == [front + b for b in bare]
        assert tokens.bos is expected


def test_a_text_that_spells_out_its_bos_gets_no_second_one() -> None:
    tokens = tokenize(byte_level(), "<|endoftext|>Paris", bos=True)
    assert (tokens.ids == byte_level().bos_token_id).sum() == 1 and tokens.bos


@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_texts_are_padded_on_the_side_asked_for_and_the_mask_says_where(side: str) -> None:
    texts = ["w1 w2 w3", "w4", "w5 w6"]
    tokens = tokenize(word_tokenizer(), texts, side=side)
    assert tokens.lengths.tolist() == [3, 1, 2]
    kept = [row[m].tolist() for row, m in zip(tokens.ids, tokens.mask, strict=True)]
    assert kept == [[1, 2, 3], [4], [5, 6]]
    assert tokens.mask[1].tolist() == ([False, False, True] if side == "left" else [True, False, False])
    assert len(tokens) == 3


def test_a_real_token_of_the_pads_id_is_no_pad() -> None:
    tokens = tokenize(word_tokenizer(), ["w0 w1 w0", "w2"])  # w0 = bos = eos = pad, as in GPT-2
    assert tokens.mask.tolist() == [[True] * 3, [True, False, False]]


def test_empty_text_is_refused_unless_a_bos_makes_it_a_row() -> None:
    for text in ("", ["w1", ""]):
        with pytest.raises(DataError, match=r"has no tokens.*empty text without BOS"):
            tokenize(word_tokenizer(), text)
    assert tokenize(word_tokenizer(), "", bos=True).ids.tolist() == [[0]]
    assert tokenize(sentence_piece(), "").ids.tolist() == [[1]]


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_text_is_refused_with_what_it_is() -> None:
    no_bos = word_tokenizer()
    no_bos.bos_token = None
    rows: Any = [[[1], [2.5]], [[1], ["w2"]], ["w1", 3]]
    refused: list[tuple[Any, str]] = [
        (lambda: tokenize(no_bos, "w1", bos=True), "has no BOS token; leave bos out"),
        (lambda: tokenize(None, "w1"), r"text needs a tokenizer.*load\(model, tokenizer\)"),
        (lambda: tokenize(word_tokenizer(), []), "no text was given"),
        (lambda: tokenize(word_tokenizer(), rows[2]), "holds int: '3'"),
        (lambda: pad_rows([], 0), "no rows of tokens"),
        (lambda: pad_rows(rows[0], 0), "row 1 must be a list of whole numbers, got torch.float32"),
        (lambda: pad_rows(rows[1], 0), "row 1 holds something that is no token id"),
        (lambda: pad_rows([[True]], 0), "got torch.bool"),
        (lambda: read_inputs(None, {"ids": [1]}, bos=None, mask=None), "got dict"),
        (lambda: read_inputs(None, [], bos=None, mask=None), r"got list \(empty\)"),
        (lambda: read_inputs(word_tokenizer(), "w1", bos=None, mask=torch.ones(1, 1)), "text and lists know their own"),
        (lambda: read_inputs(None, ROW, bos=None, mask=torch.ones(1, 3)), "Tokens know their own padding"),
        (lambda: check_tokens(ROW, rows=3, longest=None), r"token id 3 is outside the vocabulary \(0 to 2\)"),
        (lambda: check_tokens(ROW, rows=9, longest=2), "3 tokens, but this model has 2 learned positions"),
    ]
    for call, message in refused:
        with pytest.raises(DataError, match=message):
            call()


def test_a_padded_batch_that_lost_its_mask_is_refused_only_where_the_pad_is_a_token_of_its_own() -> None:
    ids = torch.tensor([[5, 6, 0], [7, 8, 9]])
    assert read_inputs(word_tokenizer(), ids, bos=None, mask=None).mask.all()
    own_pad = word_tokenizer()
    own_pad.add_special_tokens({"pad_token": "<pad>"})
    ids[0, 2] = own_pad.pad_token_id
    with pytest.raises(DataError, match=r"end with the pad token \(\d+\) but there is no mask"):
        read_inputs(own_pad, ids, bos=None, mask=None)
    known = read_inputs(own_pad, ids, bos=None, mask=[[1, 1, 0], [1, 1, 1]])
    assert known.mask.tolist() == [[True, True, False], [True] * 3]


# -- tokens and their text ----------------------------------------------------------------------------------------


def test_the_text_of_tokens_shows_leading_spaces_and_joins_to_the_text() -> None:
    for tokenizer, front in ((byte_level(), ""), (sentence_piece(), " ")):
        texts = str_tokens(tokenizer, tokenize(tokenizer, "Paris is the capital", bos=False).ids)[0]
        assert "".join(texts) == f"{front}Paris is the capital"
        assert " capital" in texts


def test_str_tokens_of_a_manager_have_the_form_of_their_input() -> None:
    hm = manager("Llama")
    assert hm.to_str_tokens("w1 w2") == ["w1", "w2"]
    assert hm.to_str_tokens(torch.tensor([3, 4])) == ["w3", "w4"]
    assert hm.to_str_tokens(["w1 w2", "w3 w4"]) == [["w1", "w2"], ["w3", "w4"]]


def test_a_single_token_is_found_with_its_leading_space_in_both_kinds_of_tokenizer() -> None:
    gpt, llama = byte_level(), sentence_piece()
    assert single_token(gpt, " capital") == gpt.convert_tokens_to_ids("Ġcapital")
    assert single_token(llama, " capital") == single_token(llama, "capital") == llama.convert_tokens_to_ids("▁capital")
    assert single_token(gpt, "P") == gpt.convert_tokens_to_ids("P")
    with pytest.raises(DataError, match=r"' capital is' is 2 tokens \(' capital' \| ' is'\), not one$"):
        single_token(gpt, " capital is")
    with pytest.raises(DataError, match=r"not one; many words need a leading space"):
        single_token(gpt, "capital")  # only " capital" is one token there


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("text", ["", None, 3, ["w1"]])
def test_a_single_token_is_asked_for_by_a_string(text: Any) -> None:
    with pytest.raises(DataError, match="asked for by its text"):
        single_token(word_tokenizer(), text)


def test_special_tokens_are_known_by_the_tokenizer_in_any_shape() -> None:
    ids = torch.tensor([[1, 0, 2], [5, 1, 2]])
    assert special_mask(sentence_piece(), ids).tolist() == [[True, True, True], [False, True, True]]
    assert special_mask(byte_level(), ids).tolist() == [[False, True, False], [False] * 3]
    assert special_mask(sentence_piece(), ids[0, 0]).item() is True


# -- Tokens -------------------------------------------------------------------------------------------------------

ROW = Tokens(torch.tensor([[1, 2, 3]]), torch.ones(1, 3, dtype=torch.bool))
FLAGS = torch.tensor([[True, True, False], [True, False, False]])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask": FLAGS[:, :2]}, r"ids \(2, 3\) and mask \(2, 2\) must have one shape"),
        ({"mask": torch.tensor([[True] * 3, [False] * 3])}, "row 1 has no tokens"),
        ({"position_ids": torch.zeros(2, 3)}, r"position_ids must be whole numbers.*torch.float32"),
        ({"position_ids": [0, 1, 2]}, r"position_ids.*got list"),
        ({"spans": {"user": FLAGS[:, :2]}}, r"span 'user' must be bool \(2, 3\), got torch.bool \(2, 2\)"),
        ({"spans": {"user": FLAGS.long()}}, r"span 'user' must be bool \(2, 3\), got torch.int64"),
        ({"mask": FLAGS.long()}, "mask must be bool"),
        ({"ids": torch.ones(2, 3)}, "whole numbers"),
        ({"ids": torch.ones(3, dtype=torch.long), "mask": FLAGS[0]}, r"\[batch, pos\]"),
    ],
    ids=str,
)
def test_tokens_whose_parts_do_not_fit_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Tokens(**({"ids": torch.arange(1, 7).view(2, 3), "mask": FLAGS} | fields))


def test_left_padding_moves_ids_mask_and_spans_together() -> None:
    spans = {"user": torch.tensor([[False, True, False], [True, False, False]])}
    tokens = Tokens(torch.tensor([[1, 2, 9], [3, 9, 9]]), FLAGS, spans=spans, bos=True).left_padded(7)
    assert tokens.ids.tolist() == [[7, 1, 2], [7, 7, 3]]
    assert tokens.mask.tolist() == [[False, True, True], [False, False, True]]
    assert tokens.spans["user"].tolist() == [[False, False, True], [False, False, True]]
    assert tokens.bos
    assert tokens.left_padded(7) is tokens


def test_left_padding_moves_position_ids_with_the_tokens_they_number() -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    numbered = Tokens(torch.ones(2, 3, dtype=torch.long), mask, position_ids=torch.arange(6).view(2, 3))
    moved = numbered.left_padded(7).position_ids
    assert moved is not None
    assert moved[0, 1:].tolist() == [0, 1] and moved[1].tolist() == [3, 4, 5]


# -- chats --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("habit", [True, False])
def test_a_chat_has_one_bos_and_one_span_per_role_that_covers_exactly_its_contents(habit: bool) -> None:
    chat = chat_tokens(chatty(habit=habit), TURNS)
    assert "".join(chat.text.split()) == "".join(t for t in chat.str_tokens[0])
    assert (chat.ids == 0).sum() == 1 and chat.ids[0, 0] == 0 and chat.bos
    assert chat.mask.all() and chat.ids.shape[0] == 1
    assert set(chat.spans) == {"system", "user", "assistant"}
    assert spanned(chat, "system") == ["w5", "w6"]
    assert spanned(chat, "user") == ["w1", "w2", "w3", "w2", "w3"]
    assert spanned(chat, "assistant") == ["w7"]


def test_a_chat_ends_with_the_assistants_header_only_when_asked() -> None:
    asked, not_asked = (chat_tokens(chatty(), TURNS, add_generation_prompt=p).str_tokens[0] for p in (True, False))
    assert asked == [*not_asked, "<|assistant|>"]


def test_a_template_without_a_bos_says_so() -> None:
    chat = chat_tokens(chatty(TEMPLATE.removeprefix("{{ bos_token }}")), TURNS)
    assert not chat.bos and not bool((chat.ids == 0).any())


@pytest.mark.parametrize("content", ["user", "I"])
def test_a_content_that_a_header_also_holds_is_found_in_its_own_place(content: str) -> None:
    template = TEMPLATE.replace("<|{{ m['role'] }}|>", "w0 {{ m['role'] }} I w0")
    chat = chat_tokens(chatty(template), [{"role": "user", "content": f"{content} w9"}])
    assert spanned(chat, "user") == [content, "w9"]
    chat = chat_tokens(chatty(template), [{"role": "user", "content": content}])
    assert chat.spans["user"][0].nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("content", ["end", "nd|"])
def test_a_content_that_a_footer_also_holds_is_found_in_its_own_place(content: str) -> None:
    chat = chat_tokens(chatty(), [{"role": "user", "content": content}])
    assert chat.spans["user"][0].nonzero().flatten().tolist() == [2]


@pytest.mark.parametrize(
    "messages", ["Hello", [], [{"role": "user"}], ["Hello"], {"role": "user", "content": "w1"}, None], ids=str
)
@pytest.mark.usefixtures("unchecked")
def test_messages_of_another_form_are_refused_with_an_example(messages: Any) -> None:
    with pytest.raises(DataError, match=r"\[\{'role': 'user', 'content': 'Hello'\}\]"):
        chat_tokens(chatty(), messages)


def test_a_base_models_tokenizer_has_no_chat() -> None:
    with pytest.raises(DataError, match=r"no chat template.*plain text instead"):
        chat_tokens(word_tokenizer(), TURNS)
    with pytest.raises(DataError, match="a chat needs a tokenizer"):
        chat_tokens(None, TURNS)


def test_a_template_that_refuses_a_conversation_is_a_typed_error() -> None:
    tokenizer = chatty("{{ raise_exception('System role not supported') }}")
    with pytest.raises(DataError, match="System role not supported"):
        chat_tokens(tokenizer, TURNS)


def test_a_span_names_the_same_tokens_on_either_side_of_the_padding() -> None:
    hm, ids = manager("Llama"), torch.tensor([[5, 6, 7, 0], [8, 9, 10, 11]])
    mask = torch.tensor([[True, True, True, False], [True] * 4])
    spans = {"user": torch.tensor([[False, True, True, False], [False, False, True, False]])}
    batch = Tokens(ids, mask, spans=spans)
    for tokens in (batch, batch.left_padded(0)):
        out = hm.run(tokens, read=["0.resid_post"], write=[Ablate("0.resid_post", where=Where(name="user"))])
        zeroed = (out["0.resid_post"] == 0).all(-1)
        rows = [row[m].tolist() for row, m in zip(zeroed, tokens.mask, strict=True)]
        assert rows == [[False, True, True], [False, False, True, False]]


def test_gpt2_says_in_one_note_that_its_tokenizer_adds_no_bos() -> None:
    gpt, llama = manager("GPT2"), manager("Llama")
    notes = [note for note in gpt.run("w5 w6").notes if "BOS" in note]
    assert len(notes) == 1 and "to_tokens(…, bos=True)" in notes[0]
    assert not any("BOS" in note for note in gpt.run(gpt.to_tokens("w5 w6", bos=True)).notes)
    assert not any("BOS" in note for note in gpt.run(torch.tensor([[0, 5, 6]])).notes)
    assert not any("BOS" in note for note in llama.run("w5 w6").notes)
