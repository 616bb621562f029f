"""The direction of a behaviour: planted in a model written by hand, found, ablated, added and taken out of weights."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from interp.core.errors import ConfigError, DataError, ModelError, ShapeError, SiteError
from interp.core.intervention import Add, Project
from interp.core.manager import HookManager
from interp.core.result import Result
from interp.core.stats import pearson
from interp.steering.fitting.orthogonal import orthogonalised, stream_writers
from interp.steering.fitting.refusal import fit_refusal, instruction_tokens
from interp.steering.fitting.select import SelectOptions, select_direction, token_log_odds
from interp.testbed.nano import NanoOptions, nano
from interp.testbed.tasks import task_pairs
from tests.families import VOCAB, manager, word_tokenizer

BAD, REFUSES, TEMPLATE = range(60, 70), 100, "{% for m in messages %}w90 {{ m['content'] }} w91 w92{% endfor %}"


@functools.cache
def planted() -> tuple[HookManager, torch.Tensor]:
    """A model that says w100 where a bad word stood before: the first attention moves that along one direction.

    Bad words have a mark of their own, which only that attention reads; nothing else knows of them.
    """
    draw = torch.Generator().manual_seed(3)
    d, heads = 24, 2
    model: Any = nano(
        NanoOptions(
            d_vocab=VOCAB,
            n_ctx=32,
            n_layers=5,
            d_model=d,
            n_heads=heads,
            d_mlp=0,
            norm="none",
            positions="none",
            bias=False,
        )
    )
    basis = torch.linalg.qr(torch.randn(d, d, generator=draw))[0]
    mark, refusal, rest = basis[0], basis[1], basis[2:]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        words = 0.5 * torch.randn(VOCAB, d - 2, generator=draw) @ rest
        words[list(BAD)] += 2.0 * mark
        model.model.embed_tokens.weight.copy_(words)
        first = model.model.layers[0].self_attn
        first.v_proj.weight[0] = mark
        first.o_proj.weight[:, 0] = 14.0 * refusal
        for layer in model.model.layers[1:]:  # what else goes on, away from the direction
            layer.self_attn.v_proj.weight.copy_(0.2 * torch.randn(d, d - 2, generator=draw) @ rest)
            layer.self_attn.o_proj.weight.copy_(rest.T @ torch.randn(d - 2, d, generator=draw) * 0.2)
        model.lm_head.weight.copy_(0.3 * torch.randn(VOCAB, d - 2, generator=draw) @ rest)
        model.lm_head.weight[REFUSES] = 3.0 * refusal
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return HookManager.load(model, tokenizer), refusal


def instructions(bad: bool, seed: int, n: int = 24) -> list[str]:
    draw = torch.Generator().manual_seed(seed)
    texts = []
    for _ in range(n):
        words = torch.randint(1, 60, (4,), generator=draw).tolist()
        if bad:
            words[int(torch.randint(4, (1,), generator=draw))] = 60 + int(torch.randint(10, (1,), generator=draw))
        texts.append(" ".join(f"w{i}" for i in words))
    return texts


@functools.cache
def found(options: SelectOptions | None = None) -> Any:
    hm, _ = planted()
    sides = [instructions(bad, seed) for seed in (0, 1) for bad in (True, False)]
    return fit_refusal(hm, *sides, refuses=["w100"], options=options)


def test_the_planted_direction_is_found_and_governs_the_behaviour(tmp_path: Path) -> None:
    hm, truth = planted()
    choice = found()
    assert set(choice.labels) <= {"-2 'w91'", "-1 'w92'"}  # the template's tokens after the instruction, no others
    direction = choice.direction
    (site,) = direction.sites
    assert 1 <= int(site.split(".")[0]) < 4
    assert abs(float(direction.unit(site) @ truth)) > 0.99
    assert choice.base[0] > 3 and float(choice.bypass[choice.chosen]) < -2
    assert choice.base[1] < 0 < float(choice.induce[choice.chosen]) and float(choice.kl[choice.chosen]) < 0.1
    tokens, n = instruction_tokens(hm, instructions(True, 5))
    assert n == 2
    score = token_log_odds([REFUSES])
    plain = score(hm.run(tokens, logits="last").logits[:, 0])
    ablated = score(hm.run(tokens, write=choice.ablation.as_interventions(), logits="last").logits[:, 0])
    assert bool((plain > 0).all()) and bool((ablated < 0).all())
    # Null control: a random direction changes nothing of the kind, ablated or added.
    other = torch.randn(hm.d_model, generator=torch.Generator().manual_seed(9))
    edits = [Project(s, other) for s in stream_writers(hm)]
    assert bool((score(hm.run(tokens, write=edits, logits="last").logits[:, 0]) > 0).all())
    choice.save(tmp_path / "choice")
    again = Result.load(tmp_path / "choice")
    assert again.summary() == choice.summary() and list(again.to_frame().columns) == list(choice.to_frame().columns)
    assert len(choice.plot().data) == 6 and choice.ablation.operation == "ablate"


def test_a_behaviour_that_a_trained_model_has_is_found_and_governed_on_other_prompts() -> None:
    hm = HookManager.load("testbed")
    pairs = [p for p in task_pairs("sentiment", 200) if p.meta["variant"] == "mood"]
    turned = [p.answers[0] == " glad" for p in pairs]
    glad, sad = (
        list(dict.fromkeys((p.clean if t == up else p.corrupted).text for p, t in zip(pairs, turned, strict=True)))
        for up in (True, False)
    )
    options = SelectOptions(chat=False)
    choice = fit_refusal(
        hm, glad[:16], sad[:16], glad[16:28], sad[16:28], refuses=[" glad"], options=options, name="glad"
    )
    score = token_log_odds([hm.to_single_token(" glad")])

    def mean(texts: list[str], write: Any = ()) -> float:
        return float(score(hm.run(texts, write=write, logits="last").logits[:, 0]).mean())

    new = glad[28:44], sad[28:44]
    assert mean(new[0]) > 3 and mean(new[1]) < -3
    assert mean(new[0], choice.ablation.as_interventions()) < -1
    assert mean(new[1], choice.direction.as_interventions()) > -1
    other = torch.randn(hm.d_model, generator=torch.Generator().manual_seed(1))
    assert mean(new[0], [Project(site, other) for site in stream_writers(hm)]) > 3
    same = Add(choice.direction.sites[0], other * choice.direction[choice.direction.sites[0]].norm() / other.norm())
    assert mean(new[1], [same]) < -3
    copy = orthogonalised(hm, choice.direction)
    assert float(score(copy.run(new[0], logits="last").logits[:, 0]).mean()) < -1


def test_scores_are_those_of_each_candidate_alone() -> None:
    hm, _ = planted()
    many, few = found(), found(SelectOptions(rows=1))  # one candidate a batch
    for name in ("bypass", "induce", "kl"):
        torch.testing.assert_close(getattr(many, name), getattr(few, name), atol=1e-5, rtol=1e-5)
    assert pearson(many.bypass, many.induce) < 0  # what mediates the behaviour does so either way
    i = many.chosen
    absent = instruction_tokens(hm, instructions(False, 1))[0]
    base = hm.run(absent, logits="last").logits[:, 0].log_softmax(-1)
    edits = [Project(f"*.{kind}", many.vectors[i]) for kind in ("resid_pre", "attn_out")]
    ablated = hm.run(absent, write=edits, logits="last").logits[:, 0].log_softmax(-1)
    kl = (base.exp() * (base - ablated)).sum(-1).mean()
    assert float(many.kl[i]) == pytest.approx(float(kl), abs=1e-6)


def test_limits_leave_candidates_out_and_none_is_chosen_in_silence() -> None:
    choice = found(SelectOptions(depth=0.4))
    assert choice.sites[choice.chosen].startswith("1.")
    with pytest.warns(UserWarning, match="nothing was chosen"):
        none = found(SelectOptions(min_induce=1e6))
    assert none.chosen == -1 and "none was chosen" in none.summary()
    with pytest.raises(DataError, match="no candidate"):
        _ = none.direction


@pytest.mark.parametrize("family", ["GPT2", "Llama", "GPTJ", "Granite", "Olmo"])
def test_taking_a_direction_out_of_the_weights_is_ablating_it_everywhere(family: str) -> None:
    hm = manager(family)
    v = torch.randn(hm.d_model)
    before = {name: p.clone() for name, p in hm.model.named_parameters()}
    copy = orthogonalised(hm, v)
    ids = torch.randint(1, VOCAB, (3, 9))
    kinds = ("resid_pre", "attn_out", "mlp_out")
    wanted = hm.run(ids, write=[Project(f"*.{kind}", v) for kind in kinds]).logits
    torch.testing.assert_close(copy.run(ids).logits, wanted, atol=5e-5, rtol=5e-5)
    assert float((hm.run(ids).logits - wanted).abs().max()) > 0.1
    out = copy.run(ids, read=["*.resid_post"])
    assert max(float((out[s] @ v / v.norm()).abs().max()) for s in out.sites) < 1e-4
    assert all(torch.equal(p, before[name]) for name, p in hm.model.named_parameters())
    twice = orthogonalised(copy, v)  # idempotent
    torch.testing.assert_close(twice.run(ids).logits, wanted, atol=5e-5, rtol=5e-5)


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_done_is_refused_by_name() -> None:
    for family, reason in (("Gemma2", "ln1_post"), ("Mixtral", "mixture of experts"), ("Bloom", "embed_ln")):
        with pytest.raises(ModelError, match=reason):
            orthogonalised(manager(family), torch.ones(manager(family).d_model))
    hm, _ = planted()
    with pytest.raises(ShapeError, match="shape"):
        orthogonalised(hm, torch.ones(3))
    with pytest.raises(DataError, match="to fit on and to choose on"):
        fit_refusal(hm, ["w1"], ["w2"], ["w1"], ["w3"], refuses=["w100"])
    with pytest.raises(DataError, match="list of instructions"):
        fit_refusal(hm, [], ["w2"], ["w1"], ["w3"], refuses=["w100"])
    with pytest.raises(ConfigError, match="max_kl"):
        SelectOptions(max_kl=0.0)
    choice = found()
    tokens = instruction_tokens(hm, ["w1 w2"])[0]
    with pytest.raises(SiteError, match="residual stream"):
        select_direction(hm, [choice.ablation], token_log_odds([1]), tokens, tokens)
    with pytest.raises(ShapeError, match="one number per row"):
        select_direction(hm, [choice.direction], lambda logits: logits, tokens, tokens)
    with pytest.raises(DataError, match="no candidates"):
        select_direction(hm, [], token_log_odds([1]), tokens, tokens)
    with pytest.raises(DataError, match="no tokens"):
        token_log_odds([])
