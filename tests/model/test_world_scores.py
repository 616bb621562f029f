"""How well a model does the small world's tasks, on models whose answers are known: uniform, told, copying, random."""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from interp.core.errors import ConfigError, DataError
from interp.core.intervention import Edit
from interp.core.manager import HookManager
from interp.core.modelmap import ModelMap
from interp.evaluate.tasks import RepeatLoss, TaskScores, check_vocabulary, repeat_loss, task_scores, text_loss
from interp.testbed.tasks import draw_cases
from interp.testbed.text import TASKS, Document, Text
from interp.testbed.tokenizer import build_tokenizer, vocabulary

V = len(vocabulary())
N = 12


class Told(nn.Module):
    """A model whose logits are a function of the tokens; its one block does nothing."""

    def __init__(self, logits: Callable[[Tensor], Tensor], d_vocab: int = V) -> None:
        super().__init__()
        self.logits, self.emb = logits, nn.Embedding(d_vocab, 2)
        self.blocks, self.norm, self.head = nn.ModuleList([nn.Identity()]), nn.Identity(), nn.Identity()
        self.config = tf.PretrainedConfig()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Logits [batch pos vocab]."""
        for block in self.blocks:
            block(self.emb(input_ids))
        return self.head(self.norm(self.logits(input_ids)))


def told(logits: Callable[[Tensor], Tensor], d_vocab: int = V) -> HookManager:
    paths = {"embed": "emb", "block": "blocks.{layer}", "ln_final": "norm", "unembed": "head"}
    sizes: dict[str, Any] = {"n_layers": 1, "d_model": 2, "n_heads": 1, "n_kv_heads": 1, "d_head": 2, "d_mlp": None}
    model = Told(logits, d_vocab).eval()
    return HookManager.load(model, map=ModelMap(family="told", d_vocab=d_vocab, paths=paths, **sizes))


def uniform(ids: Tensor) -> Tensor:
    return torch.zeros(*ids.shape, V)


def answering(pick: Callable[[Any], str], *, held_out: bool = True, n: int = N) -> HookManager:
    """A model that says one token, chosen for each case, after that case's prompt; nothing anywhere else."""
    table: dict[tuple[int, ...], int] = {}
    for task in TASKS:
        for case in draw_cases(task, n, held_out=held_out):
            said = vocabulary().index(pick(case))
            table[tuple(Document([case]).ids()[: case.answer + 1])] = said

    def logits(ids: Tensor) -> Tensor:
        out = torch.zeros(*ids.shape, V)
        for row, row_ids in enumerate(ids.tolist()):
            for end in range(1, len(row_ids) + 1):
                if (said := table.get(tuple(row_ids[:end]))) is not None:
                    out[row, end - 1, said] = 5.0
        return out

    return told(logits)


@functools.cache
def random_gpt2() -> HookManager:
    config = tf.GPT2Config(
        vocab_size=V, n_embd=32, n_layer=1, n_head=2, n_positions=128, bos_token_id=0, eos_token_id=1, pad_token_id=2
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = tf.GPT2LMHeadModel(config).eval()
        model.lm_head.weight = nn.Parameter(torch.randn(V, 32))
    return HookManager.load(model, build_tokenizer())


# -- tasks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held_out", [True, False])
def test_a_model_that_is_told_the_answers_scores_one(held_out: bool) -> None:
    hm = answering(lambda case: case.answers[-1], held_out=held_out)
    scores = task_scores(hm, n=N, held_out=held_out)
    assert scores.tasks == list(TASKS) and scores.n == N and scores.held_out == held_out
    assert torch.equal(scores.accuracy, torch.ones(len(TASKS)))
    assert torch.equal(scores.choice_accuracy, torch.ones(len(TASKS)))
    for task, diff in zip(scores.tasks, scores.logit_diff.tolist(), strict=True):
        cases = draw_cases(task, N, held_out=held_out)
        expected = sum(5.0 / len(case.answers) for case in cases) / N
        assert diff == pytest.approx(expected, rel=1e-5)


def test_a_model_that_says_a_foil_scores_nothing() -> None:
    scores = task_scores(answering(lambda case: case.foils[0]), n=N, batch_size=7)
    assert not scores.accuracy.any() and not scores.choice_accuracy.any()
    assert bool((scores.logit_diff < 0).all())


def test_a_model_that_says_something_else_prefers_nothing() -> None:
    """It neither names the answer nor prefers it: a tie with the foils is no choice."""
    hm = answering(lambda case: next(t for t in (" Monday", " red", " Tom") if t not in (*case.answers, *case.foils)))
    scores = task_scores(hm, n=N)
    assert not scores.accuracy.any() and not scores.choice_accuracy.any() and not scores.logit_diff.any()


def test_equal_logits_are_no_answer() -> None:
    scores = task_scores(told(uniform), tasks=["ioi", "years"], n=N)
    assert not scores.accuracy.any() and not scores.choice_accuracy.any()


def test_chance_is_that_of_guessing_among_answers_and_foils() -> None:
    scores = task_scores(told(uniform), n=N)
    for task, chance in zip(scores.tasks, scores.chance.tolist(), strict=True):
        cases = draw_cases(task, N)
        expected = sum(len(c.answers) / (len(c.answers) + len(c.foils)) for c in cases) / N
        assert chance == pytest.approx(expected, rel=1e-6)
    known = dict(zip(scores.tasks, scores.chance.tolist(), strict=True))
    for task in ("ioi", "pronoun", "agreement", "sentiment", "chain", "choice"):
        assert known[task] == 0.5
    assert known["brackets"] == pytest.approx(1 / 3) and 0.05 < known["calendar"] < 0.2


def test_a_random_model_is_at_chance() -> None:
    n = 100
    scores = task_scores(random_gpt2(), tasks=["ioi", "brackets", "choice", "years", "fact", "repeat"], n=n)
    assert float(scores.accuracy.sum()) < 0.3, "1 of 1,321 tokens, and up to 97 of them for years"
    found = zip(scores.tasks, scores.choice_accuracy.tolist(), scores.chance.tolist(), strict=True)
    for task, share, chance in found:
        if task in ("brackets", "choice"):
            continue  # a random model may well say one sign always; the answers' own shares bound it
        assert abs(share - chance) < 5 * (chance * (1 - chance) / n) ** 0.5 + 0.02, task


def test_batches_of_any_size_score_the_same() -> None:
    chosen = ["recall", "functions"]
    one, many = (task_scores(random_gpt2(), tasks=chosen, n=12, batch_size=size) for size in (5, 12))
    assert torch.equal(one.accuracy, many.accuracy) and torch.equal(one.choice_accuracy, many.choice_accuracy)
    torch.testing.assert_close(one.logit_diff, many.logit_diff, atol=1e-4, rtol=0)


def test_scores_are_those_of_the_edited_model() -> None:
    """One direction of the last residual stream is set so that one letter wins wherever it is asked."""
    hm = random_gpt2()
    letter = vocabulary().index(" A")
    direction = 100 * hm.model.lm_head.weight[letter].detach()
    write = [Edit("0.resid_post", lambda x: direction.expand_as(x))]
    scores = task_scores(hm, tasks=["choice"], n=60, write=write)
    share = sum(case.answers == (" A",) for case in draw_cases("choice", 60)) / 60
    assert scores.choice_accuracy.item() == pytest.approx(share) and 0.3 < share < 0.7
    assert scores.provenance.settings["write"] == ["0.resid_post"]


def test_scores_are_shown_and_saved(tmp_path: Any) -> None:
    scores = task_scores(told(uniform), tasks=["ioi", "fact"], n=4)
    frame = scores.to_frame()
    assert frame["task"].tolist() == ["ioi", "fact"] and frame["chance"].tolist() == scores.chance.tolist()
    assert "4 examples each, held out" in scores.summary() and scores.summary().count("\n") == 2
    scores.save(tmp_path / "scores")
    again = TaskScores.load(tmp_path / "scores")
    assert again.tasks == scores.tasks and torch.equal(again.chance, scores.chance)
    assert [trace.name for trace in scores.plot().data] == ["whole vocabulary", "against foils", "chance"]


# -- losses -----------------------------------------------------------------------------------------------------------


def test_a_model_that_knows_nothing_loses_the_log_of_the_vocabulary() -> None:
    hm = told(uniform)
    for held_out in (False, True):
        assert text_loss(hm, rows=3, ctx=40, held_out=held_out) == pytest.approx(math.log(V), rel=1e-6)
    found = repeat_loss(hm, period=10, n=4)
    assert found.first == pytest.approx(math.log(V), rel=1e-6) and found.ratio == pytest.approx(1)


def test_the_loss_of_text_is_that_of_its_own_rows() -> None:
    """A model that gives the next token of known rows a logit of 9 has the loss of that logit; on others it has not."""
    rows = Text("fresh 4").rows(3, 30)[0].tolist()
    table = {
        tuple(row[:end]): row[end] for row in rows for end in range(1, 30)
    }  # rows begin alike: the last one counts
    misses = sum(table[tuple(row[:end])] != row[end] for row in rows for end in range(1, 30))

    def logits(given: Tensor) -> Tensor:
        out = torch.zeros(*given.shape, V)
        for row, row_ids in enumerate(given.tolist()):
            for end in range(1, len(row_ids)):
                if (then := table.get(tuple(row_ids[:end]))) is not None:
                    out[row, end - 1, then] = 9.0
        return out

    expected = math.log(math.exp(9) + V - 1) - 9 * (1 - misses / 87)
    assert misses < 6
    assert text_loss(told(logits), rows=3, ctx=30, seed=4) == pytest.approx(expected, rel=1e-5)
    assert text_loss(told(logits), rows=3, ctx=30, seed=5) > 5


def test_a_model_that_copies_loses_only_on_the_first_copy() -> None:
    """The next token is what followed this one before: known from the second token of the second copy on."""

    def logits(ids: Tensor) -> Tensor:
        out = torch.zeros(*ids.shape, V)
        for row, row_ids in enumerate(ids.tolist()):
            for at, i in enumerate(row_ids):
                if i in row_ids[:at]:
                    out[row, at, row_ids[row_ids.index(i) + 1]] = 20.0
        return out

    found = repeat_loss(told(logits), period=25, n=5)
    assert found.first == pytest.approx(math.log(V), rel=1e-6)
    # Had the first token of the second copy been counted, it would be log V / 25.
    assert found.second < 1e-5
    assert found.ratio == found.second / found.first
    assert RepeatLoss(4.0, 1.0).ratio == 0.25


def test_segments_are_of_ordinary_tokens_without_repetition() -> None:
    seen: list[Tensor] = []

    def logits(ids: Tensor) -> Tensor:
        seen.append(ids)
        return uniform(ids)

    hm = told(logits)
    repeat_loss(hm, period=30, n=6, seed=1)
    repeat_loss(hm, period=30, n=6, seed=2)
    repeat_loss(hm, period=30, n=6, seed=1)
    first, other, again = seen
    assert first.shape == (6, 61) and bool((first[:, 0] == 0).all()) and int(first[:, 1:].min()) >= 6
    assert torch.equal(first[:, 1:31], first[:, 31:]) and all(len(set(row)) == 31 for row in first.tolist())
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_losses_are_those_of_the_edited_model() -> None:
    hm = random_gpt2()
    plain = text_loss(hm, rows=2, ctx=40)
    zero = [Edit("ln_final.hook_normalized", lambda x: torch.zeros_like(x))]
    assert text_loss(hm, rows=2, ctx=40, write=zero) == pytest.approx(math.log(V), rel=1e-5)
    assert repeat_loss(hm, period=8, n=2, write=zero).second == pytest.approx(math.log(V), rel=1e-5)
    assert abs(plain - math.log(V)) > 0.1


# -- what is refused --------------------------------------------------------------------------------------------------


def test_unknown_tasks_are_named_with_the_nearest_before_anything_runs() -> None:
    def never(ids: Tensor) -> Tensor:
        raise AssertionError("the model ran")

    with pytest.raises(ConfigError, match="no task 'brakets'; did you mean 'brackets'"):
        task_scores(told(never), tasks=["ioi", "brakets"], n=2)
    wrong: list[dict[str, Any]] = [{"tasks": []}, {"n": 0}, {"batch_size": 0}]
    for arguments in wrong:
        with pytest.raises(ConfigError, match="at least 1 of each is needed"):
            task_scores(told(never), **{"n": 2, **arguments})
    for period, n in ((1, 4), (5, 0), (V, 1)):
        with pytest.raises(ConfigError, match=f"period is {period} and n {n}; 2 to {V - 6} tokens"):
            repeat_loss(told(never), period=period, n=n)
    for rows, ctx in ((0, 9), (2, 1)):
        with pytest.raises(ConfigError, match=f"rows is {rows} and ctx {ctx}"):
            text_loss(told(never), rows=rows, ctx=ctx)


def test_a_model_with_another_vocabulary_is_refused() -> None:
    hm = told(lambda ids: torch.zeros(*ids.shape, 50), 50)
    for call in (check_vocabulary, task_scores, repeat_loss, text_loss):
        with pytest.raises(DataError, match=r"has 50 tokens and the small world 1321; load 'testbed'"):
            call(hm)
    check_vocabulary(told(uniform))
