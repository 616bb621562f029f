"""Prompt pairs: marks to spans, spans to tokens, answers in their context, metrics on planted logits, files."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from interp.core.errors import ArtifactError, ConfigError, DataError, ShapeError
from interp.core.result import Provenance, Result
from interp.core.text import single_token, str_tokens, tokenize
from interp.data.pair_tokens import PairTokens
from interp.data.pairs import FORMAT, PromptPairs
from interp.data.prompt import Pair, Prompt
from interp.evaluate.pairs import PairScores
from tests.families import word_tokenizer
from tests.unit.test_text import byte_level, sentence_piece

WORDS = ("Paris", "is", "the", "capital", "town", "old", "She", "said", "é", "日本", "🙂", "naïve")


def two(**changes: Any) -> PromptPairs:
    """Two pairs of words w0 … w119, of 3 and 5 tokens."""
    given: dict[str, Any] = {
        "clean": ["{a:w1} w2 {b:w3}", "w9 {a:w1 w2} w4 {b:w5}"],
        "corrupted": ["{a:w1} w2 {b:w6}", "w9 {a:w1 w2} w4 {b:w7}"],
        "answers": [" w10", [" w11", " w12"]],
        "foils": [" w20", [" w21", " w22"]],
        "meta": [{"template": "ABBA", "n": 1}, {"template": "BABA", "n": 2}],
        "marked": True,
    }
    return PromptPairs.make(**{**given, **changes})


# -- marks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("marked", "text", "spans"),
    [
        ("plain", "plain", {}),
        (
            "When {io:Mary} and {s:John}, {s:John} gave",
            "When Mary and John, John gave",
            {"io": ["Mary"], "s": ["John"] * 2},
        ),
        ("{S1+1: went}", " went", {"S1+1": [" went"]}),
        ("{{x}}", "{x}", {}),
        ('{{"n": {x:1}}}', '{"n": 1}', {"x": ["1"]}),
        ("{{{x:1}}}}}", "{1}}", {"x": ["1"]}),
        ("{x:a{{b}}c}", "a{b}c", {"x": ["a{b}c"]}),
        ("{x:12:30} é {y:日本}", "12:30 é 日本", {"x": ["12:30"], "y": ["日本"]}),
    ],
)
def test_marks_become_spans_over_the_text_without_them(marked: str, text: str, spans: dict[str, list[str]]) -> None:
    prompt = Prompt.parse(marked)
    assert prompt.text == text
    assert {name: [text[a:b] for a, b in places] for name, places in prompt.spans.items()} == spans


@pytest.mark.parametrize(
    ("marked", "why"),
    [
        ("a {x:b", "'x' is not closed"),
        ("a b} c", r"at character 3, between 'a b' and '} c': a brace closes nothing"),
        ("a {b} c", r"expected \{name:text\}; a brace of the text is '\{\{'"),
        ("{x:a {y:b} c}", "'x' is still open, and marks do not nest"),
        ("a{x:}", r"span 'x' \(1 to 1\) is empty"),
        ("{end:a} b", "'end' names the last token of every prompt already"),
        ("", "must be a text that is not empty, got ''"),
    ],
)
def test_marks_that_cannot_be_read_are_refused_with_the_place(marked: str, why: str) -> None:
    with pytest.raises(DataError, match=why):
        Prompt.parse(marked)


def test_text_that_is_not_marked_keeps_its_braces() -> None:
    pairs = PromptPairs.make("{a:b}", "{a:c}", " d")
    assert pairs[0].clean == Prompt("{a:b}") and not pairs[0].clean.spans


# -- spans under a tokenizer --------------------------------------------------------------------------------------


def _random_prompt(seed: int) -> tuple[str, dict[str, tuple[int, int]]]:
    """Random words and random runs of them, named; each run as characters of the text, without its leading space."""
    draw = random.Random(seed)
    words = [draw.choice(WORDS) for _ in range(draw.randint(2, 9))]
    starts = [len(" ".join(words[:i])) + bool(i) for i in range(len(words))]
    spans = {}
    for name in "abc":
        first = draw.randrange(len(words))
        last = draw.randrange(first, len(words))
        spans[name] = (starts[first], starts[last] + len(words[last]))
    return " ".join(words), spans


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("bos", [None, True, False], ids=str)
@pytest.mark.parametrize("kind", [byte_level, sentence_piece])
def test_the_tokens_under_a_span_decode_to_its_text_whatever_the_bos_and_the_padding(
    kind: Any, bos: bool | None, side: str
) -> None:
    tokenizer, drawn = kind(), [_random_prompt(seed) for seed in range(25)]
    known = [text.isascii() for text, _ in drawn]
    if kind is sentence_piece:  # it has no bytes to fall back on: a word it does not know is <unk>
        drawn = [d for d, k in zip(drawn, known, strict=True) if k]
    assert len(drawn) >= 4 and (kind is sentence_piece or not all(known))
    prompts = [Prompt(text, spans) for text, spans in drawn]
    tokens = PromptPairs.make(prompts, prompts, [" the"] * len(prompts)).tokens(tokenizer, side=side, bos=bos)
    plain = tokenize(tokenizer, [p.text for p in prompts], side=side, bos=bos)
    for held in (tokens.clean, tokens.corrupted):
        assert torch.equal(held.ids, plain.ids) and torch.equal(held.mask, plain.mask)
    assert not bool(tokens.clean.mask.all()), "the batch has pads"
    for row, prompt in enumerate(prompts):
        for name, places in prompt.spans.items():
            inside = tokens.clean.ids[row][tokens.clean.spans[name][row]]
            begin, end = places[0]
            assert tokenizer.decode(inside).strip() == prompt.text[begin:end]


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_prompt_has_its_end_and_positions_are_counted_in_the_rows_own_tokens(side: str) -> None:
    tokens = two().tokens(word_tokenizer(), side=side, bos=True)
    assert tokens.positions("end").tolist() == [[3], [5]]
    assert tokens.positions("b").tolist() == [[3], [5]]
    assert tokens.clean.spans["a"].sum(1).tolist() == [1, 2]
    ids = tokens.corrupted.ids
    assert ids[tokens.corrupted.spans["b"]].tolist() == [6, 7] == ids[tokens.corrupted.spans["end"]].tolist()
    assert tokens.clean.bos
    with pytest.raises(DataError, match="'a' has 1 tokens in pair 0 and 2 in pair 1"):
        tokens.positions("a")
    with pytest.raises(DataError, match="no span 'c'; the spans are: a, b, end"):
        tokens.positions("c")
    assert two()[:1].tokens(word_tokenizer()).positions("a", side="corrupted").tolist() == [[0]]


def test_a_name_that_a_row_lacks_selects_nothing_there() -> None:
    pairs = PromptPairs.make(["{x:w1} w2", "w3 w4"], ["w5 w2", "w6 w4"], [" w9"] * 2, marked=True)
    tokens = pairs.tokens(word_tokenizer())
    assert tokens.clean.spans["x"].tolist() == [[True, False], [False, False]]
    assert "x" not in tokens.corrupted.spans
    assert [str(p) for p in pairs.check(word_tokenizer())] == ["pair 0: span 'x' is in the clean prompt only"]


@pytest.mark.parametrize(
    ("marked", "why"),
    [
        ("Paris{x: is} the {y:cap}ital", r"span 'y' of the clean prompt \(13 to 16, 'cap'\) cuts the token ' capital'"),
        ("Paris {x:is the} c{y:apital}", "span 'y' .* cuts the token ' capital' of Paris|  is|  the|  capital"),
        ("Paris is{x: }the capital", "span 'x' .* cuts the token ' the'"),
    ],
)
def test_a_span_that_does_not_hold_whole_tokens_is_refused_with_the_tokens(marked: str, why: str) -> None:
    pairs = PromptPairs.make(marked, "Paris is the capital", " is", marked=True)
    with pytest.raises(DataError, match=why):
        pairs.tokens(byte_level())
    fatal = [p for p in pairs.problems(byte_level()) if p.fatal]
    assert [p.kind for p in fatal] == ["span"], "the other span of the prompt is whole"


def test_a_span_between_tokens_and_a_slow_tokenizer_are_refused() -> None:
    with pytest.raises(DataError, match=r"span 'x' .* holds no token: w1 \| w2"):
        PromptPairs.make("w1{x: }w2", "w1 w2", " w3", marked=True).tokens(word_tokenizer())

    class Slow:
        is_fast, bos_token_id, unk_token_id = False, None, None

        def __call__(self, text: str, **_: Any) -> Any:
            return type("Encoded", (), {"input_ids": [len(w) for w in text.split()]})

        def convert_ids_to_tokens(self, i: int) -> str:
            return str(i)

        def decode(self, ids: list[int]) -> str:
            return str(ids[0])

    with pytest.raises(DataError, match="Slow does not say where its tokens stand in the text"):
        two().tokens(Slow())
    assert PromptPairs.make("a bb", "a cc", " ddd").tokens(Slow()).answers == (((3,),),)


# -- what is wrong with a pair ------------------------------------------------------------------------------------


def test_prompts_of_different_length_are_refused_with_both_tokenisations() -> None:
    pairs = two(corrupted=["w1 w2 w6 w8", "w9 w1 w2 w4 w7"])
    rows = r"\n  clean:     w1 \| w2 \| w3\n  corrupted: w1 \| w2 \| w6 \| w8"
    shown = rf"pair 0: 3 tokens \(clean\) and 4 \(corrupted\){rows}"
    with pytest.raises(DataError, match=rf"(?s)1 of 2 pairs.*{shown}"):
        pairs.check(word_tokenizer())
    assert pairs.tokens(word_tokenizer(), same_length=False).corrupted.lengths.tolist() == [4, 5]
    with pytest.raises(DataError, match="4 \\(corrupted\\)"):
        two(corrupted=["w1 w2 w6 w8", "w9 w1 w2 w4 w7"], hm=word_tokenizer())
    kept = [i for i in range(2) if i not in {p.pair for p in pairs.problems(word_tokenizer()) if p.fatal}]
    assert pairs[kept].check(word_tokenizer()) == [
        p for p in pairs[1:].problems(word_tokenizer()) if p.kind == "span"
    ], "what is left is usable"


def test_many_bad_pairs_are_counted_and_three_shown() -> None:
    pairs = PromptPairs.make(["w1"] * 5, ["w1 w2"] * 5, [" w3"] * 5)
    with pytest.raises(DataError) as refused:
        pairs.check(word_tokenizer())
    text = str(refused.value)
    assert "5 of 5 pairs" in text and "pair 2" in text and "pair 3" not in text and "and 2 more" in text


@pytest.mark.parametrize(
    ("prompt", "answers", "foils", "why"),
    [
        (
            "Paris is the ",
            "old",
            None,
            r"'old' joins the space that the prompt ends in \(Paris \|  is \|  the \|  old\)",
        ),
        ("w1 w2", " w3  w4", " w3 w4", r"answer ' w3  w4' and foil ' w3 w4' are the same tokens \(w3 \| w4\)"),
    ],
)
def test_answers_that_metrics_would_misread_are_refused(prompt: str, answers: str, foils: Any, why: str) -> None:
    pairs = PromptPairs.make(prompt, prompt, answers, foils)
    with pytest.raises(DataError, match=why):
        pairs.tokens(word_tokenizer() if prompt.startswith("w") else byte_level())


def test_answers_and_foils_that_begin_alike_are_refused_by_metrics_of_first_tokens_alone() -> None:
    pairs = PromptPairs.make(["w1", "w1"], ["w2", "w2"], [" w3", " w5 w6"], [" w4", " w5 w7"])
    (remark,) = (p for p in pairs.check(word_tokenizer()) if "begin with one token ('w5')" in p.text)
    assert remark.pair == 1 and not remark.fatal
    tokens = pairs.tokens(word_tokenizer())
    for call in (tokens.metric, lambda: tokens.metric("prob_diff"), lambda: tokens.logit_diff(torch.zeros(2, 1, 120))):
        with pytest.raises(DataError, match="pair 1: token 5 begins an answer and a foil"):
            call()
    assert tokens.metric("log_prob")(torch.zeros(2, 1, 120)).shape == (2,)


@pytest.mark.parametrize(("answer", "why"), [("zz", "does not know 'zz': w0; a leading space"), (" ", "adds no token")])
def test_answers_without_a_token_of_their_own_are_refused(answer: str, why: str) -> None:
    with pytest.raises(DataError, match=why):
        PromptPairs.make("w1 w2", "w1 w3", answer).tokens(word_tokenizer())


def test_an_answers_tokens_are_those_that_it_adds_to_its_prompt() -> None:
    for tokenizer in (byte_level(), sentence_piece()):
        tokens = PromptPairs.make("Paris is the", "She is the", [" capital", " old town"], " Paris").tokens(tokenizer)
        assert tokens.answers[0][0] == (single_token(tokenizer, " capital"),)
        assert tokens.foils[0] == ((single_token(tokenizer, " Paris"),),)
        assert [t.strip() for t in str_tokens(tokenizer, torch.tensor([tokens.answers[0][1]]))[0]] == ["old", "town"]
        assert any("' old town' is 2 tokens" in note for note in tokens.notes)
    # Without its space the same word is another token: said, for it is what was asked.
    bare = PromptPairs.make("Paris is the", "She is the", "Paris", " old").problems(byte_level())
    assert [p.text for p in bare] == [
        "'Paris' goes on in the last word of its prompt, 'Paris is theParis'; is its leading space missing?"
    ]


def test_an_answer_that_would_change_its_prompts_tokens_is_tokenized_alone_and_that_is_said() -> None:
    pairs = PromptPairs.make("w1 w2", "w1 w3", "w4")  # "w2w4" is one unknown word
    assert pairs.tokens(word_tokenizer()).answers == (((4,),),)
    assert ["so it is tokenized alone: w4" in p.text for p in pairs.problems(word_tokenizer())] == [True]
    # "capi" is letters, "capital" one token: what follows it must not be read off by counting.
    long = "tal" + " is the town" * 5
    (found,) = PromptPairs.make("Paris is the capi", "She is the capi", long).tokens(byte_level()).answers
    assert found == (tuple(byte_level()(long, add_special_tokens=False).input_ids),)


def test_what_is_odd_but_usable_is_said() -> None:
    found = PromptPairs.make("{x:w1 w2} w3", "{x:w1} w2 w3", " w4", marked=True).check(word_tokenizer())
    assert [p.text for p in found] == [
        "the clean and the corrupted prompt are the same tokens",
        "span 'x' has 2 tokens in the clean prompt and 1 in the corrupted one, so what is in it does not correspond",
    ]
    assert not any(p.fatal for p in found)
    unknown = PromptPairs.make("zz w2", "w1 w2", " w4").problems(word_tokenizer())
    assert [p.text for p in unknown] == ["the clean prompt has tokens that are unknown: w0 | w2"]
    assert not two()[:1].problems(word_tokenizer()), "and nothing where nothing is odd"


@pytest.mark.usefixtures("unchecked")
def test_bad_pairs_are_refused_before_any_tokenizer_sees_them() -> None:
    make: Any = PromptPairs.make
    refused: list[tuple[Any, str]] = [
        (lambda: make(["a", "b"], ["c"], [" d"] * 2), "2 clean, 1 corrupted, 2 answers, 2 foils, 2 meta"),
        (lambda: make(["a", "b"], ["c", "d"], " e"), "answers=' e': expected one text, or several, for each of 2"),
        (lambda: make("a", ["b"], " c"), "must both be one prompt, or both be lists"),
        (lambda: make("a", "b", [" c", " c"]), "hold one text twice"),
        (lambda: make("a", "b", " c", " c"), "pair 0: ' c' is an answer and a foil of 'a'"),
        (lambda: make("a", "b", []), "no answer was given for 'a'"),
        (lambda: make("a", "b", ""), "an answer must be a text that is not empty, got ''"),
        (lambda: make("a", "b", 7), "answers are a tuple of texts, got int"),
        (lambda: make("", "b", " c"), "a prompt must be a text that is not empty"),
        (lambda: make("a\ud800", "b", " c"), "half a surrogate pair at 1"),
        (lambda: make("a", "b", " c", meta={"x": [1]}), r"meta\['x'\] is \[1\] \(list\)"),
        (lambda: make("a", "b", " c", meta={"x": math.nan}), r"meta\['x'\] is nan"),
        (lambda: make([], [], []), "'pairs' holds no pair"),
        (lambda: Prompt("abc", {"x": (2, 5)}), r"span 'x' \(2 to 5\) is empty or outside a text of 3 characters"),
        (lambda: Prompt("abc", {"x": (2, 2)}), "is empty or outside"),
        (lambda: Prompt("abc", {"x": [(0, 1), (-1, 2)]}), r"\(-1 to 2\)"),
        (lambda: Prompt("abc", {"x": "ab"}), r"span 'x' must be \(begin, end\)"),
        (lambda: Prompt("abc", {"x": (0.0, 1)}), r"span 'x' must be \(begin, end\)"),
        (lambda: Prompt("abc", {"": (0, 1)}), "a span is named by a text"),
        (lambda: Prompt("abc", [(0, 1)]), "spans map names to"),  # type: ignore[arg-type]
        (lambda: PromptPairs(("a",)), "holds str: expected Pair"),  # type: ignore[arg-type]
        (lambda: two().tokens(word_tokenizer(), side="middle"), "side='middle'"),
        (lambda: two().tokens(None), "needs a tokenizer"),
        (lambda: two().metric(word_tokenizer(), "logit_dif"), "did you mean 'logit_diff'"),
    ]
    for call, why in refused:
        with pytest.raises(DataError, match=why):
            call()


# -- a sequence ---------------------------------------------------------------------------------------------------


def test_pairs_are_a_sequence_that_is_cut_and_joined() -> None:
    pairs = two()
    assert len(pairs) == 2 and list(pairs) == [pairs[0], pairs[1]] and pairs[-1].meta["n"] == 2
    assert pairs[[1, 0]] == pairs[1:] + pairs[:1] and pairs[::-1] == pairs[[1, 0]] and pairs != pairs[::-1]
    assert (pairs + PromptPairs((pairs[0],), "more")).name == "pairs + more"
    assert pairs.filter(lambda e: e.meta["n"] == 2) == pairs[1:]
    assert pairs.group("template") == {"ABBA": pairs[:1], "BABA": pairs[1:]}
    with pytest.raises(DataError, match="keeps none of the 2 pairs"):
        pairs.filter(lambda e: False)
    with pytest.raises(DataError, match="no fact 'templat'; did you mean 'template'"):
        pairs.group("templat")
    with pytest.raises(DataError, match="holds no pair"):
        pairs[2:]


def test_swapping_twice_changes_nothing_and_swapping_answers_too_exchanges_all() -> None:
    pairs = two()
    assert (
        pairs.swap() != pairs and pairs.swap().swap() == pairs and pairs.swap(answers=True).swap(answers=True) == pairs
    )
    assert (pairs.swap()[0].clean, pairs.swap()[0].answers) == (pairs[0].corrupted, (" w10",))
    assert (pairs.swap(answers=True)[0].clean, pairs.swap(answers=True)[0].answers) == (pairs[0].corrupted, (" w20",))
    with pytest.raises(DataError, match="no answer was given"):
        two(foils=None).swap(answers=True)


def test_a_sample_is_of_different_pairs_and_the_same_for_the_same_seed() -> None:
    pairs = PromptPairs.make([f"w{i}" for i in range(40)], ["w1"] * 40, [" w50"] * 40)
    drawn = pairs.sample(10, seed=3)
    assert len({e.clean.text for e in drawn}) == 10 and drawn == pairs.sample(10, seed=3) != pairs.sample(10, seed=4)
    assert sorted(e.clean.text for e in pairs.sample(40)) == sorted(e.clean.text for e in pairs)
    for n in (0, 41):
        with pytest.raises(DataError, match="of 40 pairs: expected 1 to 40"):
            pairs.sample(n)


# -- files --------------------------------------------------------------------------------------------------------


def test_what_is_saved_comes_back_exactly(tmp_path: Path) -> None:
    odd = 'é {x} {{}} "\\ \n\r\n\t\u2028 日本 🙂 \x00'
    spans = {"é {": [(0, 3), (5, 6)], "x": (1, 2)}
    meta = {"ü": "ÿ", "n": 2**70, "f": 0.1, "t": True, "none": None}
    pair = Pair(Prompt(odd, spans), Prompt("{io:x}"), (" a", "\n"), (" b",), meta)
    pairs = PromptPairs((pair, *two()), "näme")
    loaded = PromptPairs.load(pairs.save(tmp_path / "deep" / "pairs.json"))
    assert loaded == pairs and type(loaded[0].meta["t"]) is bool and loaded[0].clean.spans["x"] == ((1, 2),)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["pairs.json"], "no draft is left"
    again = loaded.save(tmp_path / "again.json")
    assert again.read_bytes() == (tmp_path / "deep" / "pairs.json").read_bytes()


def test_a_file_is_not_overwritten_unless_asked(tmp_path: Path) -> None:
    path = two().save(tmp_path / "p.json")
    with pytest.raises(ArtifactError, match="overwrite=True"):
        two()[:1].save(path)
    assert len(PromptPairs.load(path)) == 2
    assert len(PromptPairs.load(two()[:1].save(path, overwrite=True))) == 1


def test_files_of_another_kind_format_or_state_are_refused(tmp_path: Path) -> None:
    path = two().save(tmp_path / "p.json")
    good = json.loads(path.read_text(encoding="utf-8"))
    for change, why in (
        ({"format": FORMAT + 1}, f"format {FORMAT + 1} and this version reads {FORMAT}"),
        ({"kind": "other"}, "holds no prompt pairs"),
        ({"pairs": [{"clean": {"text": "a"}}]}, "is damaged .KeyError"),
        ({"pairs": [{**good["pairs"][0], "answers": []}]}, "is damaged .*no answer"),
        ({"pairs": []}, "is damaged .*holds no pair"),
    ):
        path.write_text(json.dumps({**good, **change}), encoding="utf-8")
        with pytest.raises(ArtifactError, match=why):
            PromptPairs.load(path)
    path.write_text(json.dumps(good)[:-40], encoding="utf-8")
    with pytest.raises(ArtifactError, match="cannot be read as JSON"):
        PromptPairs.load(path)
    with pytest.raises(ArtifactError, match="cannot be read"):
        PromptPairs.load(tmp_path / "none.json")


# -- metrics ------------------------------------------------------------------------------------------------------


def planted() -> tuple[PairTokens, Tensor]:
    """Two pairs of 3 and 5 tokens, and random logits for their padded batch [2 5 120]."""
    tokens = two().tokens(word_tokenizer())
    return tokens, torch.randn(2, 5, 120, dtype=torch.float64, requires_grad=True)


def test_metrics_are_their_formulas_at_each_rows_last_real_token() -> None:
    tokens, logits = planted()
    first, second = logits[0, 2], logits[1, 4]
    expected = {
        "logit_diff": [
            first[10] - first[20],
            (second[11] + second[12]) / 2 - (second[21] + second[22]) / 2,
        ],
        "prob_diff": [
            (first[10].exp() - first[20].exp()) / first.exp().sum(),
            (second[[11, 12]].exp().sum() - second[[21, 22]].exp().sum()) / second.exp().sum(),
        ],
        "log_prob": [
            first[10] - first.exp().sum().log(),
            (second[[11, 12]].exp().sum() / second.exp().sum()).log(),
        ],
    }
    for kind, values in expected.items():
        found = tokens.metric(kind)(logits, mask=tokens.clean.mask)
        torch.testing.assert_close(found, torch.stack(values), rtol=1e-9, atol=1e-12)
    tokens.logit_diff(logits, mask=tokens.clean.mask).sum().backward()
    grad = logits.grad
    assert grad is not None
    assert grad.nonzero().tolist() == [[0, 2, 10], [0, 2, 20], [1, 4, 11], [1, 4, 12], [1, 4, 21], [1, 4, 22]]


def test_metrics_do_not_depend_on_the_side_of_the_padding() -> None:
    tokens, logits = planted()
    left = two().tokens(word_tokenizer(), side="left")
    moved = torch.stack([logits[0].roll(2, 0), logits[1]])
    for kind in ("logit_diff", "prob_diff", "log_prob"):
        right_value = tokens.metric(kind)(logits, mask=tokens.clean.mask)
        assert torch.equal(right_value, left.metric(kind)(moved, mask=left.clean.mask))
    last = torch.stack([logits[0, 2], logits[1, 4]])[:, None]
    assert torch.equal(tokens.logit_diff(last), tokens.logit_diff(logits, mask=tokens.clean.mask))
    assert torch.equal(two().metric(word_tokenizer())(last), tokens.logit_diff(last))


def test_exchanging_answers_and_foils_negates_differences() -> None:
    tokens, logits = planted()
    swapped = two().swap(answers=True).tokens(word_tokenizer())
    for kind in ("logit_diff", "prob_diff"):
        assert torch.equal(swapped.metric(kind)(logits[:, -1:]), -tokens.metric(kind)(logits[:, -1:]))


def test_answers_that_begin_with_one_token_count_once() -> None:
    pairs = PromptPairs.make("w1", "w2", [" w3 w4", " w3 w5", " w6"], " w7")
    tokens = pairs.tokens(word_tokenizer())
    logits = torch.randn(1, 1, 120)
    assert tokens.answers == (((3, 4), (3, 5), (6,)),) and tokens.answer_ids.tolist() == [[3, 6]]
    torch.testing.assert_close(tokens.logit_diff(logits), (logits[:, 0, 3] + logits[:, 0, 6]) / 2 - logits[:, 0, 7])


def test_a_ruled_out_answer_gives_minus_infinity_and_finite_gradients_elsewhere() -> None:
    tokens, logits = planted()
    held = logits.detach().clone()
    held[0, -1, 10] = -torch.inf
    held.requires_grad_()
    assert tokens.metric("log_prob")(held[:, -1:])[0] == -torch.inf
    value = tokens.metric("prob_diff")(held[:, -1:])
    value.sum().backward()
    assert bool(value.isfinite().all()) and held.grad is not None and bool(held.grad.isfinite().all())


@pytest.mark.usefixtures("unchecked")
def test_metrics_refuse_what_is_not_of_these_pairs() -> None:
    tokens, logits = planted()
    with pytest.raises(ShapeError, match="the run has 3 rows and these are 2 pairs"):
        tokens.logit_diff(torch.zeros(3, 1, 120))
    with pytest.raises(DataError, match="is token 22, outside the vocabulary 0 … 21"):
        tokens.logit_diff(logits[:, -1:, :22])
    without = two(foils=[" w20", []]).tokens(word_tokenizer())
    for kind in ("logit_diff", "prob_diff"):
        with pytest.raises(DataError, match="pair 1 has no foils"):
            without.metric(kind)(logits[:, -1:])
    assert without.metric("log_prob")(logits[:, -1:]).shape == (2,)


def test_pairs_of_ids_need_no_tokenizer() -> None:
    pairs = PairTokens.of_ids(
        torch.tensor([[1, 2], [3, 4]]), [[5, 6], [7, 8]], torch.tensor([9, 10]), torch.tensor([[1, 2]] * 2)
    )
    assert pairs.answers == (((9,),), ((10,),)) and pairs.foil_ids.tolist() == [[1, 2]] * 2
    assert pairs.positions("end", side="corrupted").tolist() == [[1], [1]]
    logits = torch.arange(24.0).reshape(2, 1, 12)
    assert pairs.logit_diff(logits).tolist() == [9 - 1.5, 10 - 1.5]
    assert not PairTokens.of_ids([[1]], [[2]], torch.tensor([3])).foil_mask.any()
    with pytest.raises(DataError, match="2 clean, 1 corrupted, 2 answers"):
        PairTokens.of_ids([[1], [2]], [[1]], torch.tensor([3, 4]))
    with pytest.raises(DataError, match=r"pair 1: \(4,\) is an answer and a foil"):
        PairTokens.of_ids([[1], [2]], [[1], [2]], torch.tensor([3, 4]), torch.tensor([5, 4]))


# -- scores -------------------------------------------------------------------------------------------------------


def scores(clean: Tensor, corrupted: Tensor, **changes: Any) -> PairScores:
    n, values = len(clean), torch.stack([clean, corrupted])
    held: dict[str, Any] = {
        "provenance": Provenance(model="none", seed=1),
        "data": "planted",
        **dict.fromkeys(("logit_diff", "accuracy", "top1", "log_prob"), values),
        "chance": torch.full((n,), 0.5),
        "full": False,
        "n_bootstrap": 2000,
        "prompts": [["a"] * n, ["b"] * n],
        "meta": [{"template": str(i)} for i in range(n)],
        "notes": [],
    }
    return PairScores(**{**held, **changes})


def test_the_interval_is_that_of_a_mean() -> None:
    values = torch.randn(400) * 3 + 1
    found = scores(values, values - 2).estimate("logit_diff")
    assert found.mean == pytest.approx(float(values.mean()), abs=1e-6)
    width = 2 * 1.96 * float(values.std()) / 20
    assert found.high - found.low == pytest.approx(width, rel=0.1) and found.low < found.mean < found.high
    # One resampling serves both sides: a gap that is the same in every pair is known exactly.
    gap = scores(values, values - 2).estimate("logit_diff", "gap")
    assert gap == pytest.approx((2, 2, 2), abs=1e-6)
    assert found == scores(values, values).estimate("logit_diff")
    assert found != scores(values, values, provenance=Provenance(model="none", seed=2)).estimate("logit_diff")


def test_intervals_hold_the_true_mean_about_as_often_as_they_say() -> None:
    hits = 0
    for i in range(100):
        values = torch.randn(60, generator=torch.Generator().manual_seed(i))
        found = scores(values, values, n_bootstrap=200).estimate("accuracy")
        hits += found.low <= 0 <= found.high
    assert 88 <= hits <= 99


def test_pairs_without_the_figure_are_left_out_and_none_gives_nan() -> None:
    values = torch.tensor([1.0, torch.nan, 3.0])
    assert scores(values, values).estimate("accuracy").mean == 2.0
    nothing = torch.full((2,), torch.nan)
    found = scores(nothing, nothing, log_prob=torch.zeros(2, 2), top1=torch.zeros(2, 2), chance=nothing)
    assert all(math.isnan(v) for v in found.estimate("accuracy"))
    assert "no foils" in found.summary() and "accuracy" not in found.summary()
    assert len(found.plot().data) == 2
    for figure, side in (("accurate", "clean"), ("accuracy", "both")):
        with pytest.raises(ConfigError, match="expected one of accuracy"):
            found.estimate(figure, side)


def test_scores_come_back_from_disk_and_tell_themselves(tmp_path: Path) -> None:
    made = scores(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0.0, 0.0, 1.0]), notes=["mind this"])
    loaded = Result.load(made.save(tmp_path / "r"))
    assert isinstance(loaded, PairScores) and loaded.summary() == made.summary() and "mind this" in made.summary()
    assert "clean: accuracy 66.7%" in made.summary() and "chance 50.0%" in made.summary()
    frame = made.to_frame()
    assert len(frame) == 6 and frame[frame.side == "clean"].accuracy.tolist() == [1, 0, 1]
    assert frame.template.tolist() == ["0", "1", "2"] * 2
    drawn = {line.name: list(line.y) for line in made.plot().data}
    assert drawn == {"clean": [0.0, 1.0, 1.0], "corrupted": [0.0, 0.0, 1.0]}
