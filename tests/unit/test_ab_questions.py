"""A/B questions: options exchanged, files read, letters found in the text, chats without a second BOS."""

import json
import warnings
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from interp.core.errors import DataError
from interp.core.where import Where
from interp.data.ab_questions import LETTER, ABQuestion, ABQuestions, ab_contrast
from tests.families import word_tokenizer

TEXT = "Do you agree?\n\nChoices:\n (A) Yes, I do.\n (B) No (A) is wrong."


def questions(n: int = 4, matching: str = "AB") -> ABQuestions:
    """Questions in the words that the tests' tokenizer knows; their letters are words of it too."""
    held = []
    for i in range(n):
        letter = matching[i % len(matching)]
        held.append(ABQuestion(f"w1 w{i + 2}\n(A) w30\n(B) w31", letter, "B" if letter == "A" else "A"))
    return ABQuestions(held, name="habit")


def test_options_are_exchanged_and_back_and_nothing_else_changes() -> None:
    q = ABQuestion(TEXT, " (A)", "(B)")
    assert (q.matching, q.other) == ("A", "B")
    swapped = q.swapped()
    assert swapped.question == "Do you agree?\n\nChoices:\n (A) No (A) is wrong.\n (B) Yes, I do."
    assert (swapped.matching, swapped.other) == ("B", "A") and swapped.swapped() == q
    tail = ABQuestion("Which? (A) one (B) two\n\nAnswer:", "B", "A").swapped()
    assert tail.question == "Which? (A) two (B) one\n\nAnswer:"
    three = ABQuestion("Q\n (A) a\n (B) b\n (C) c", "C", "A").swapped()
    assert three.question == "Q\n (A) c\n (B) b\n (C) a" and three.matching == "A"


def test_files_of_both_forms_are_read(tmp_path: Path) -> None:
    records = [
        {"question": TEXT, "answer_matching_behavior": " (B)", "answer_not_matching_behavior": " (A)", "source": "x"},
        {"question": TEXT, "answer_matching_behavior": "(A)", "answer_not_matching_behavior": ["(B)"]},
    ]
    (tmp_path / "one.json").write_text(json.dumps(records))
    (tmp_path / "two.jsonl").write_text("\n".join(json.dumps(r) for r in records) + "\n")
    one, two = (ABQuestions.from_json(tmp_path / name) for name in ("one.json", "two.jsonl"))
    assert list(one) == list(two) and (one.name, two.name) == ("one", "two")
    assert one[0].meta == {"number": 0, "source": "x"} and one.letters == {"A": 1, "B": 1}
    assert len(one[:1]) == 1 and one[:1].name == "one"


def test_letters_are_balanced_by_swapping_and_parts_share_no_question() -> None:
    leaning = questions(10, "AAAAB")
    assert leaning.letters == {"A": 8, "B": 2}
    even = leaning.balanced(seed=1)
    assert even.letters == {"A": 5, "B": 5} and even.balanced().questions == even.questions
    kept, out = leaning.split(0.3, seed=0)
    assert (len(kept), len(out)) == (7, 3)
    assert {q.question for q in kept}.isdisjoint(q.question for q in out)


def test_the_letter_s_own_token_is_read_whatever_follows_it() -> None:
    tokenizer = word_tokenizer()
    for answer in ("w5 {letter} w9 w8", "{letter}"):
        held = ab_contrast(questions(), tokenizer, answer=answer)
        for side, letters in ((held.positive, "ABAB"), (held.negative, "BABA")):
            for prompt, letter in zip(side, letters, strict=True):
                ((begin, end),) = prompt.spans[LETTER]
                assert prompt.text[begin:end] == letter
        tokens = held.tokens(tokenizer, where=Where(name=LETTER))
        assert tokens.read.sum(1).tolist() == [1] * 8
        assert tokens.groups.tolist() == [0, 1, 2, 3] * 2 and tokens.pairs is not None
        lengths, columns = tokens.tokens.lengths, tokens.read.int().argmax(1)
        assert (lengths - columns).tolist() == [3 if answer != "{letter}" else 1] * 8


def test_leaning_letters_warn_and_swapping_cancels_them() -> None:
    with pytest.warns(UserWarning, match=r"matching letters are \{'A': 4\}"):
        ab_contrast(questions(4, "A"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both = ab_contrast(questions(4, "A"), swap=True)
    assert len(both.positive) == 8 and both.groups is not None and both.groups[0] == (0, 1, 2, 3) * 2
    said = [p.text[slice(*p.spans[LETTER][0])] for p in both.positive]
    assert said.count("A") == said.count("B") == 4


def coarse_tokenizer() -> PreTrainedTokenizerFast:
    """Words between spaces are tokens, so that "(A)" is one; it puts its BOS first by itself."""
    words = ["<s>", "<u>", "(A)", "(B)", "[sys]", "[user]", "[bot]", *(f"w{i}" for i in range(40))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<u>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<u>", pad_token="<s>")
    made.chat_template = (
        "<s> {% for m in messages %}{% if m['role'] == 'system' %}[sys] {% else %}[user] {% endif %}{{ m['content'] }} "
        "{% endfor %}{% if add_generation_prompt %}[bot] {% endif %}"
    )
    return made


def test_a_chat_template_is_used_with_one_bos_and_a_token_of_more_than_the_letter_is_taken_whole() -> None:
    tokenizer = coarse_tokenizer()
    held = ab_contrast(questions(), tokenizer, system="w3")
    assert held.positive[0].text.endswith("(B) w31 [bot] (A)") and "[sys] w3 [user] w1" in held.positive[0].text
    tokens = held.tokens(tokenizer, where=Where(name=LETTER))
    assert (tokens.tokens.ids == 0).sum(1).tolist() == [1] * 8  # and not two
    read = [row[mask].tolist() for row, mask in zip(tokens.tokens.ids, tokens.read, strict=True)]
    assert read == [[2], [3]] * 2 + [[3], [2]] * 2  # "(A)" and "(B)" of one token each
    with pytest.raises(DataError, match="needs a chat template"):
        ab_contrast(questions(), word_tokenizer(), system="w3")


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_question_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a letter"):
        ABQuestion(TEXT, "yes", "B")
    with pytest.raises(DataError, match="as the matching and as the other"):
        ABQuestion(TEXT, "A", "(A)")
    with pytest.raises(DataError, match="not empty"):
        ABQuestion(" ", "A", "B")
    with pytest.raises(DataError, match="not found once"):
        ABQuestion("No options here", "A", "B").swapped()
    with pytest.raises(DataError, match="no questions"):
        ABQuestions([])
    with pytest.raises(DataError, match="record 0 has"):
        ABQuestions.from_records([{"question": TEXT}])
    with pytest.raises(DataError, match="cannot be read"):
        ABQuestions.from_json(tmp_path / "none.json")
    with pytest.raises(DataError, match=r"expected '\{letter\}'"):
        ab_contrast(questions(), answer="(A)")
    with pytest.raises(DataError, match="several pairs"):
        ABQuestions([ABQuestion("Q\n(A) a\n(B) b\n(C) c", "C", "A"), *questions()]).balanced()
