"""Contrasts and labelled tokens: what is refused and read, splits that keep groups whole, labels that say nothing."""

from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from interp.core.errors import DataError
from interp.core.text import Tokens
from interp.core.where import Where
from interp.data.concept_tokens import ConceptTokens
from interp.data.contrast import Contrast
from interp.data.pairs import PromptPairs
from interp.data.prompt import Prompt
from tests.families import word_tokenizer


def texts(n: int, word: str = "w5") -> list[str]:
    return [" ".join(["w1", *["w2"] * (i % 3), word, f"w{10 + i % 5}"]) for i in range(n)]


def contrast(n: int = 6, **more: Any) -> Contrast:
    return Contrast.make(texts(n), texts(n, "w6"), **more)


def test_lists_of_one_length_are_pairs_and_the_last_token_is_read() -> None:
    data = contrast().tokens(word_tokenizer())
    assert data.classes == ("negative", "positive") and data.pairs is not None
    assert data.pairs.tolist() == [*range(6), *range(6)] == data.groups.tolist()
    assert data.read.sum(1).tolist() == [1] * 12
    last = data.tokens.lengths - 1
    assert torch.equal(data.read.int().argmax(1), last)
    assert data.labels[data.read].tolist() == [1] * 6 + [0] * 6
    left = contrast().tokens(word_tokenizer(), side="left")
    assert bool(left.read[:, -1].all()) and int(left.read.sum()) == 12


def test_they_show_what_they_hold_and_not_every_text() -> None:
    data = contrast(groups=["a", "a", "b", "b", "c", "c"], name="five")
    assert (
        repr(data) == "Contrast('five': 6 positive, 6 negative, pairs, 3 groups; such as 'w1 w5 w10' and 'w1 w6 w10')"
    )
    shown = repr(data.tokens(word_tokenizer()))
    assert shown == "ConceptTokens('five': 12 rows, 3 groups, in pairs; read 6 negative, 6 positive)"
    assert len(data.head(2)) == 4 and data.head(2).groups == (("a", "a"), ("a", "a"))


def test_a_rule_reads_a_span_or_every_token_that_is_not_special() -> None:
    marked = Contrast.make([Prompt.parse("w1 {x:w5 w7} w2")], [Prompt.parse("w1 w2 {x:w6} w2")], paired=False)
    tokenizer = word_tokenizer()
    data = marked.tokens(tokenizer, where=Where(name="x"))
    assert [
        [tokenizer.decode(i) for i in row[m].tolist()] for row, m in zip(data.tokens.ids, data.read, strict=True)
    ] == [
        ["w5", "w7"],
        ["w6"],
    ]
    every = marked.tokens(tokenizer, where=Where(), bos=True)
    assert every.tokens.bos and every.read.sum(1).tolist() == [4, 4], "BOS is left out"
    first = marked.tokens(tokenizer, where=Where(pos=0), bos=True)
    assert bool(first.read[:, 0].all()), "a position that is named is read, special or not"


def test_groups_never_straddle_a_split() -> None:
    groups = ["a", "a", "b", "b", "c", "c"]
    data = contrast(groups=groups).tokens(word_tokenizer())
    for seed in range(5):
        fit, held = data.split(0.34, seed=seed)
        assert not set(fit.groups.tolist()) & set(held.groups.tolist())
        assert len(fit) == 8 and len(held) == 4
        assert fit.pairs is not None and fit.pairs.unique(return_counts=True)[1].tolist() == [2] * 4
    assert {tuple(data.split(0.34, seed=s)[1].groups.unique().tolist()) for s in range(12)} == {(0,), (1,), (2,)}
    with pytest.raises(DataError, match="one group"):
        contrast(groups=["a"] * 6).tokens(word_tokenizer()).split()


def test_shuffled_labels_exchange_half_of_the_pairs_and_keep_the_tokens() -> None:
    data = contrast().tokens(word_tokenizer())
    assert data.pairs is not None
    drawn = [data.shuffled(seed=s) for s in range(6)]
    for other in drawn:
        assert torch.equal(other.tokens.ids, data.tokens.ids) and torch.equal(other.read, data.read)
        changed = (other.labels != data.labels).any(1)
        assert int(changed.sum()) == 6, "three pairs of six, both rows of each"
        assert torch.equal(changed[:6], changed[6:])
    assert len({tuple(o.labels[o.read].tolist()) for o in drawn}) > 1
    assert torch.equal(data.shuffled(seed=1).labels, data.shuffled(seed=1).labels)
    alone = replace(data, pairs=None).shuffled(seed=0)
    assert sorted(alone.labels[alone.read].tolist()) == [0] * 6 + [1] * 6


def test_labels_of_tokens_are_permuted_where_a_row_has_several_classes() -> None:
    ids = torch.arange(12).reshape(2, 6) + 3
    labels = torch.tensor([[-1, 0, 1, 2, 0, -1], [1, 1, 0, -1, 2, 2]])
    data = ConceptTokens(Tokens(ids, torch.ones(2, 6, dtype=torch.bool)), labels, ("a", "b", "c"), torch.arange(2))
    other = data.shuffled(seed=3)
    assert torch.equal(other.read, data.read) and not torch.equal(other.labels, labels)
    assert sorted(other.labels[other.read].tolist()) == sorted(labels[data.read].tolist())
    one = data.binary("c")
    assert one.classes == ("other", "c") and one.labels.tolist() == [[-1, 0, 0, 1, 0, -1], [0, 0, 0, -1, 1, 1]]
    with pytest.raises(DataError, match="no class 'd'"):
        data.binary("d")


def test_pairs_give_their_clean_side_or_the_one_that_has_the_concept() -> None:
    pairs = PromptPairs.make(
        ["w1 w5", "w1 w6"], ["w1 w6", "w1 w5"], [" w7", " w8"], [" w8", " w7"], meta=[{"template": 1}] * 2
    )
    found = Contrast.of_pairs(pairs, positive=lambda e: e.answers == (" w7",))
    assert [p.text for p in found.positive] == ["w1 w5", "w1 w5"] and found.groups == ((1, 1), (1, 1))
    assert [p.text for p in Contrast.of_pairs(pairs).positive] == ["w1 w5", "w1 w6"]
    swapped = found.swap()
    assert swapped.positive == found.negative and swapped.negative == found.positive


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Contrast.make([], ["w1"]), "list of positive texts"),
        (lambda: Contrast.make(["w1"], cast(Any, [3])), "negative text of 'concept' is int"),
        (lambda: Contrast.make(["w1"], ["w2", "w3"], paired=True), "cannot be pairs"),
        (lambda: Contrast.make(["w1", "w2"], ["w2", "w3"], groups=["a"]), "one per text"),
        (lambda: contrast().tokens(word_tokenizer(), where=Where.generated()), "generated tokens"),
        (lambda: contrast().tokens(word_tokenizer(), where=Where(tokens=[40])), "reads no token of row 0"),
        (lambda: contrast().tokens(None), "tokenizer"),
    ],
)
def test_what_cannot_be_used_is_refused(make: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        make()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels": torch.zeros(1, 3, dtype=torch.long)}, "one per token"),
        ({"labels": torch.full((2, 3), 5)}, "go from 5 to 5"),
        ({"labels": torch.full((2, 3), -1)}, "no token"),
        ({"labels": torch.zeros(2, 3, dtype=torch.long)}, "a pad has a label"),
        ({"groups": torch.arange(3)}, "one per row"),
        ({"classes": ("a",)}, "at least two"),
    ],
)
def test_labels_that_do_not_line_up_are_refused(change: dict[str, Any], said: str) -> None:
    tokens = Tokens(torch.ones(2, 3, dtype=torch.long), torch.tensor([[True] * 3, [True, True, False]]))
    good: dict[str, Any] = {"labels": torch.tensor([[0, 1, 0], [1, -1, -1]]), "classes": ("a", "b")}
    good["groups"] = torch.arange(2)
    ConceptTokens(tokens, **good)
    with pytest.raises(DataError, match=said):
        ConceptTokens(tokens, **(good | change))
