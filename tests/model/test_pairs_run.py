"""Prompt pairs run on models: scores against a planted table of bigrams, spans under edits, padding, patching."""

import functools
import itertools
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from interp.core.errors import ConfigError, DataError
from interp.core.intervention import Ablate, Replace
from interp.core.manager import HookManager
from interp.core.metrics import logit_diff
from interp.core.result import Result
from interp.core.where import Where
from interp.data.pair_tokens import PairTokens
from interp.data.pairs import PromptPairs
from interp.evaluate.pairs import PairScores, pair_accuracy
from interp.patching.activation import activation_patch
from tests.families import VOCAB, manager, word_tokenizer


def bigram_model(table: Tensor, tokenizer: Any = None) -> HookManager:
    """A GPT-2 whose logits after token t are the row `table[t]`: no attention, no MLP, no positions.

    The embedding is one-hot, and the final norm's gain and bias undo its own centring and scaling of one-hot vectors.
    """
    config = tf.GPT2Config(
        n_embd=VOCAB,
        n_layer=1,
        n_head=1,
        n_positions=32,
        vocab_size=VOCAB,
        n_inner=4,
        layer_norm_epsilon=1e-12,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = tf.GPT2LMHeadModel(config).eval()
    mean = 1 / VOCAB
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.wte.weight.copy_(torch.eye(VOCAB))
        model.transformer.ln_f.weight.fill_((mean - mean**2) ** 0.5)
        model.transformer.ln_f.bias.fill_(mean)
        model.lm_head.weight.copy_(table.T)
    return HookManager.load(model, tokenizer or word_tokenizer())


@functools.cache
def random_table() -> Tensor:
    return torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(7)) * 2


def random_pairs(n: int, *, foils: int = 3, seed: int = 0, ragged: bool = True) -> PromptPairs:
    """Pairs of random words; the two prompts of a pair end differently, pairs differ in length where ragged."""
    draw = random.Random(seed)
    columns: dict[str, Any] = {"clean": [], "corrupted": [], "answers": [], "foils": []}
    for _ in range(n):
        words = draw.sample(range(1, VOCAB), draw.randint(2, 9) if ragged else 6)
        columns["clean"].append(" ".join(f"w{w}" for w in words))
        columns["corrupted"].append(" ".join(f"w{w}" for w in [*words[:-1], words[-1] % (VOCAB - 1) + 1]))
        right, *wrong = draw.sample(range(1, VOCAB), 1 + foils)
        columns["answers"].append(f" w{right}")
        columns["foils"].append([f" w{w}" for w in wrong])
    return PromptPairs.make(**columns, name="random")


def ends(prompt: str) -> int:
    return int(prompt.split()[-1][1:])


def ids(texts: tuple[str, ...]) -> list[list[int]]:
    return [[int(w[1:]) for w in text.split()] for text in texts]


# -- scores -------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_planted_table() -> None:
    table, pairs = random_table(), random_pairs(60)
    scores = pair_accuracy(bigram_model(table), pairs)
    for side, prompts in enumerate((pairs.clean, pairs.corrupted)):
        for i, e in enumerate(pairs):
            row = table[ends(prompts[i].text)].double()
            right, wrong = row[ids(e.answers)[0][0]], row[[f[0] for f in ids(e.foils)]]
            assert float(scores.logit_diff[side, i]) == pytest.approx(float(right - wrong.mean()), abs=2e-4)
            assert bool(scores.accuracy[side, i]) == bool(right > wrong.max())
            assert float(scores.log_prob[side, i]) == pytest.approx(float(right - row.logsumexp(0)), abs=2e-4)
            assert bool(scores.top1[side, i]) == bool(right == row.max())
    assert scores.chance.tolist() == [0.25] * 60
    assert 0 < float(scores.accuracy.mean()) < 1, "the table has both outcomes"


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_fixed_winner_gives_exactly_one_and_a_fixed_loser_exactly_zero(sign: float) -> None:
    """After an odd word the logit of w2 is 3 and that of w4 −3, after an even word the other way round."""
    table = torch.zeros(VOCAB, VOCAB)
    table[1::2, 2], table[1::2, 4] = 3.0 * sign, -3.0 * sign
    table[0::2, 2], table[0::2, 4] = -3.0 * sign, 3.0 * sign
    pairs = PromptPairs.make(
        [f"w9 w{2 * i + 1}" for i in range(20)], [f"w9 w{2 * i + 2}" for i in range(20)], [" w2"] * 20, [" w4"] * 20
    )
    scores = pair_accuracy(bigram_model(table), pairs)
    wins = float(sign > 0)
    assert scores.accuracy.tolist() == scores.top1.tolist() == [[wins] * 20, [1 - wins] * 20]
    torch.testing.assert_close(scores.logit_diff, torch.tensor([[6.0], [-6.0]]).expand(2, 20) * sign, atol=1e-3, rtol=0)
    assert scores.estimate("accuracy") == (wins, wins, wins)
    swapped = pair_accuracy(bigram_model(table), pairs.swap())
    assert torch.equal(swapped.logit_diff, scores.logit_diff.flip(0))
    torch.testing.assert_close(swapped.logit_diff, -scores.logit_diff, atol=1e-3, rtol=0)
    mirrored = pair_accuracy(bigram_model(table), pairs.swap(answers=True))
    torch.testing.assert_close(mirrored.logit_diff, scores.logit_diff, atol=1e-3, rtol=0)


def test_ties_are_wrong() -> None:
    table = torch.zeros(VOCAB, VOCAB)
    scores = pair_accuracy(bigram_model(table), random_pairs(5))
    assert not scores.accuracy.any() and not scores.top1.any()
    torch.testing.assert_close(scores.log_prob, torch.full((2, 5), -math.log(VOCAB)))
    table[:, [5, 119]] = 1.0  # the first of two largest logits is the answer's
    tied = pair_accuracy(bigram_model(table), PromptPairs.make("w1", "w2", " w5", " w6"))
    assert tied.accuracy.tolist() == [[1], [1]] and tied.top1.tolist() == [[0], [0]]


@pytest.mark.parametrize("foils", [1, 3])
def test_a_random_model_is_at_chance_and_its_interval_says_so(foils: int) -> None:
    n = 200
    scores = pair_accuracy(manager("Llama"), random_pairs(n, foils=foils, seed=foils))
    chance = 1 / (1 + foils)
    error = (chance * (1 - chance) / n) ** 0.5
    found = scores.estimate("accuracy")
    assert abs(found.mean - chance) < 4 * error
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.25)
    gaps = scores.logit_diff[0] - scores.logit_diff[1]
    assert abs(scores.estimate("logit_diff", "gap").mean) < 4 * float(gaps.std()) / n**0.5


@pytest.mark.parametrize("name", ["GPT2", "Llama", "Gemma2"])
def test_neither_the_order_nor_the_batch_nor_the_padding_matters(name: str) -> None:
    hm, pairs = manager(name), random_pairs(9)
    scores = pair_accuracy(hm, pairs)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    permuted = pair_accuracy(hm, pairs[order.tolist()])
    for figure in ("logit_diff", "log_prob", "accuracy", "top1"):
        values: Tensor = getattr(scores, figure)
        torch.testing.assert_close(getattr(permuted, figure), values[:, order], atol=1e-5, rtol=1e-5)
        for batch_size in (1, 4):
            other: Tensor = getattr(pair_accuracy(hm, pairs, batch_size=batch_size), figure)
            torch.testing.assert_close(other, values, atol=1e-5, rtol=1e-5)
    for side in ("left", "right"):
        tokens = pairs.tokens(hm, side=side)
        for logits in ("last", "all"):
            for kind in ("logit_diff", "log_prob"):
                for row, prompts in enumerate((tokens.clean, tokens.corrupted)):
                    value = tokens.metric(kind)(hm.run(prompts, logits=logits))
                    torch.testing.assert_close(value, getattr(scores, kind)[row], atol=1e-4, rtol=1e-4)


def test_only_the_logits_of_one_position_are_made_for_ragged_prompts() -> None:
    hm, seen = manager("Llama"), []
    hook = hm.model.lm_head.register_forward_hook(lambda m, args, out: seen.append(tuple(out.shape)))
    try:
        pair_accuracy(hm, random_pairs(13), batch_size=8)
    finally:
        hook.remove()
    assert [s[0] for s in seen] == [8, 8, 8, 2] and {s[1:] for s in seen} == {(1, VOCAB)}


def test_whole_answers_are_scored_by_their_chain_of_tokens() -> None:
    table = random_table()
    log_probs = table.double().log_softmax(-1)
    answers, foils = [" w5 w6 w7", " w5 w8"], [" w9", " w9 w10", " w5 w11"]
    pairs = PromptPairs.make("w1 w2", "w1 w3", answers, foils)
    with pytest.raises(DataError, match="token 5 begins an answer and a foil"):
        pair_accuracy(bigram_model(table), pairs)
    scores = pair_accuracy(bigram_model(table), pairs, full=True, batch_size=2)

    def chain(prompt: int, text: str) -> float:
        path = [prompt, *ids((text,))[0]]
        return float(sum(log_probs[a, b] for a, b in itertools.pairwise(path)))

    for side, last in enumerate((2, 3)):
        right, wrong = [chain(last, a) for a in answers], [chain(last, f) for f in foils]
        assert float(scores.logit_diff[side, 0]) == pytest.approx(sum(right) / 2 - sum(wrong) / 3, abs=1e-3)
        assert float(scores.log_prob[side, 0]) == pytest.approx(math.log(sum(map(math.exp, right))), abs=1e-3)
        assert bool(scores.accuracy[side, 0]) == (max(right) > max(wrong))
    by_first = pair_accuracy(bigram_model(table), PromptPairs.make("w1 w2", "w1 w3", answers, foils[:2]))
    assert float(by_first.logit_diff[0, 0]) == pytest.approx(float(table[2, 5] - table[2, 9]), abs=2e-4)
    torch.testing.assert_close(scores.chance, torch.tensor([2 / 5]))
    assert by_first.chance.tolist() == [0.5], "two answers and two foils that begin alike are one each"
    assert any("is 3 tokens" in note for note in by_first.notes)


def test_greedy_decoding_decides_about_whole_answers() -> None:
    """w1 → w2 → w3 is what the model says; w1 → w2 → w4 begins alike and ends otherwise."""
    table = torch.zeros(VOCAB, VOCAB)
    table[1, 2] = table[2, 3] = 5.0
    pairs = PromptPairs.make(["w1"] * 2, ["w2"] * 2, [" w2 w3", " w2 w4"])
    hm = bigram_model(table)
    assert pair_accuracy(hm, pairs, full=True).top1.tolist() == [[1, 0], [0, 0]]
    assert pair_accuracy(hm, pairs).top1.tolist() == [[1, 1], [0, 0]]


@pytest.mark.parametrize("full", [False, True])
def test_single_tokens_score_alike_whole_or_by_their_first_token(full: bool) -> None:
    hm, pairs = manager("GPT2"), random_pairs(9, foils=2)
    tokens = pairs.tokens(hm)
    expected = tokens.logit_diff(hm.run(tokens.clean, logits="last"))
    torch.testing.assert_close(pair_accuracy(hm, pairs, full=full).logit_diff[0], expected, atol=1e-5, rtol=1e-5)


def test_pairs_without_foils_have_a_log_probability_and_no_accuracy(tmp_path: Path) -> None:
    pairs = PromptPairs.make(["w1 w2", "w3"], ["w1 w4", "w5"], [" w6"] * 2, [" w7", []], meta=[{"n": 1}, {"n": 2}])
    scores = pair_accuracy(bigram_model(random_table()), pairs, seed=5)
    assert scores.accuracy.isnan().tolist() == scores.logit_diff.isnan().tolist() == [[False, True]] * 2
    assert bool(scores.log_prob.isfinite().all()) and scores.chance.isnan().tolist() == [False, True]
    loaded = Result.load(scores.save(tmp_path / "r"))
    assert isinstance(loaded, PairScores) and loaded.summary() == scores.summary()
    assert loaded.provenance.seed == 5 and loaded.meta == [{"n": 1}, {"n": 2}]
    assert loaded.prompts == [["w1w2", "w3"], ["w1w4", "w5"]]
    page = scores.to_html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Prompt pairs" in page and len(scores.to_frame()) == 4


def test_a_model_without_tokenizer_takes_pairs_of_ids() -> None:
    hm = HookManager.load(bigram_model(random_table()).model)
    table = random_table()
    pairs = PairTokens.of_ids(
        torch.tensor([[1, 2], [1, 3]]), torch.tensor([[1, 4], [1, 5]]), torch.tensor([6, 6]), torch.tensor([7, 8])
    )
    scores = pair_accuracy(hm, pairs)
    expected = torch.stack([table[[2, 3], 6] - table[[2, 3], [7, 8]], table[[4, 5], 6] - table[[4, 5], [7, 8]]])
    torch.testing.assert_close(scores.logit_diff, expected, atol=2e-4, rtol=0)
    grid = activation_patch(hm, pairs, sites="resid_pre", progress=False)
    torch.testing.assert_close(grid.clean, expected[0], atol=2e-4, rtol=0)


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_scored_is_refused() -> None:
    hm, pairs = manager("GPT2"), random_pairs(3)
    for arguments in ({"batch_size": 0}, {"n_bootstrap": 1.5}):
        with pytest.raises(ConfigError, match="expected a whole number ≥ 1"):
            pair_accuracy(hm, pairs, **arguments)
    with pytest.raises(DataError, match="these pairs are tokens already"):
        pair_accuracy(hm, pairs.tokens(hm), bos=True)
    far = PairTokens.of_ids([[1, 2]], [[1, 3]], torch.tensor([VOCAB + 4]))
    with pytest.raises(DataError, match=f"token {VOCAB + 4}, outside the vocabulary"):
        pair_accuracy(hm, far)
    broken = random_table().clone()
    broken[ends(pairs[1].corrupted.text), 0] = torch.nan
    with pytest.raises(DataError, match=r"NaN after the (clean|corrupted) prompt of pair"):
        pair_accuracy(bigram_model(broken), pairs)
    long = PromptPairs.make(" ".join(["w1"] * 65), " ".join(["w2"] * 65), " w3")
    with pytest.raises(DataError, match="65 tokens, but this model has 64 learned positions"):
        long.tokens(hm)
    tiny = HookManager.load(bigram_model(random_table()).model)
    with pytest.raises(DataError, match="needs a tokenizer"):
        pair_accuracy(tiny, pairs)


# -- what methods do with pairs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_edit_by_name_acts_on_the_named_tokens_of_every_row_alone(side: str) -> None:
    hm = manager("Llama")
    pairs = PromptPairs.make(
        ["{x:w5} w6 {y:w7}", "w8 w9 {x:w5 w6} w1 {y:w2}", "w3 {x:w4}{y: w5} w6"],
        ["{x:w9} w6 {y:w7}", "w8 w9 {x:w7 w6} w1 {y:w2}", "w3 {x:w8}{y: w5} w6"],
        [" w10"] * 3,
        [" w11"] * 3,
        marked=True,
    )
    tokens = pairs.tokens(hm, side=side)
    words = {"x": [{5}, {5, 6}, {4}], "y": [{7}, {2}, {5}], "end": [{7}, {2}, {6}]}
    plain = hm.run(tokens.clean, read=["0.resid_pre"])["0.resid_pre"]
    for name, expected in words.items():
        edited = hm.run(tokens.clean, write=[Ablate("0.resid_pre", where=Where(name=name))], read=["0.resid_pre"])
        changed = (edited["0.resid_pre"] != plain).any(-1)
        assert [set(row[c].tolist()) for row, c in zip(tokens.clean.ids, changed, strict=True)] == expected
        if name != "x":  # as many tokens in every row: the same place by its number
            by_number = Where(pos=tokens.positions(name))
            again = hm.run(tokens.clean, write=[Ablate("0.resid_pre", where=by_number)], read=["0.resid_pre"])
            assert torch.equal(again["0.resid_pre"], edited["0.resid_pre"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_metric_sees_what_a_patch_at_the_end_restores(side: str) -> None:
    hm, pairs = bigram_model(random_table()), random_pairs(8, foils=2)
    tokens = pairs.tokens(hm, side=side)
    clean = hm.run(tokens.clean, read=["0.resid_pre"], logits="last")
    patch = Replace("0.resid_pre", clean["0.resid_pre"], where=Where(name="end"))
    patched = tokens.logit_diff(hm.run(tokens.corrupted, write=[patch], logits="last"))
    torch.testing.assert_close(patched, tokens.logit_diff(clean), atol=1e-5, rtol=0)
    assert not torch.allclose(patched, tokens.logit_diff(hm.run(tokens.corrupted, logits="last")), atol=0.1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_gradient_of_the_metric_lies_at_the_end_alone_in_a_model_of_bigrams(side: str) -> None:
    hm = bigram_model(random_table())
    tokens = random_pairs(6).tokens(hm, side=side)
    out = hm.run(tokens.clean, read=["0.resid_pre"], grad=tokens.metric())
    assert torch.equal((out.grad["0.resid_pre"] != 0).any(-1), tokens.clean.spans["end"])


def test_patching_takes_pairs_as_it_takes_their_two_sides() -> None:
    hm, pairs = manager("GPT2"), random_pairs(4, foils=1, ragged=False)
    tokens = pairs.tokens(hm)
    right, wrong = tokens.answer_ids[:, 0], tokens.foil_ids[:, 0]
    by_hand = activation_patch(
        hm,
        [e.clean.text for e in pairs],
        [e.corrupted.text for e in pairs],
        sites="resid_mid",
        metric=lambda out: logit_diff(out, right, wrong),
    )
    for given in (pairs, tokens):
        found = activation_patch(hm, given, sites="resid_mid")
        torch.testing.assert_close(found.patched, by_hand.patched, atol=1e-5, rtol=1e-5)
        assert found.columns == by_hand.columns
        assert torch.equal(found.clean, by_hand.clean) and torch.equal(found.corrupted, by_hand.corrupted)
    other = activation_patch(hm, pairs, sites=["1.resid_mid"], metric=tokens.metric("log_prob"), pos=-1)
    torch.testing.assert_close(other.clean, pair_accuracy(hm, pairs).log_prob[0], atol=1e-4, rtol=0)
    text = pairs[0].clean.text
    with pytest.raises(DataError, match="pairs hold their corrupted prompts"):
        activation_patch(hm, pairs, text, sites="resid_mid")
    with pytest.raises(DataError, match="no corrupted prompts given"):
        activation_patch(hm, text, sites="resid_mid", metric=tokens.logit_diff)
    with pytest.raises(DataError, match="no metric given"):
        activation_patch(hm, text, text, sites="resid_mid")
