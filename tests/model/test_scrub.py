"""Scrubbing: hypotheses that are true, false and empty of models whose heads are known, and a loop as the oracle."""

import functools
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from interp.core.errors import ConfigError, DataError, ShapeError, SiteError
from interp.core.intervention import Intervention, Replace
from interp.core.manager import HookManager
from interp.core.result import Result
from interp.core.where import Where
from interp.data.pair_tokens import PairTokens, with_spans
from interp.data.pairs import PromptPairs
from interp.patching.scrub import _Scrubbed, scrub
from interp.patching.scrub_result import ScrubResult
from interp.testbed.model_tasks import model_pairs
from tests.families import manager
from tests.hand_built import induction_model

N, KEYS = 60, 5


@functools.cache
def repeats() -> PairTokens:
    """x x x key answer x key → answer: the answer at column 4, the key one of 0 … 4, everything else 6 … 11."""
    draw = random.Random(1)
    rows, answers, foils, meta = [], [], [], []
    for i in range(N):
        key, (right, *others) = i % KEYS, draw.sample(range(6, 12), 5)
        rows.append([*others[:3], key, right, others[3], key])
        answers.append(right)
        foils.append(others[0])
        meta.append({"key": key, "answer": right, "foil": others[0], "coin": draw.randrange(2)})
    ids = torch.tensor(rows)
    pairs = PairTokens.of_ids(ids, ids, torch.tensor(answers), torch.tensor(foils))
    at = torch.zeros_like(ids, dtype=torch.bool)
    at[:, 4] = True
    sides = [with_spans(side, {"at": at}) for side in (pairs.clean, pairs.corrupted)]
    return replace(pairs, clean=sides[0], corrupted=sides[1], meta=tuple(meta))


def test_what_is_true_of_a_hand_built_model_recovers_all() -> None:
    hm, pairs = induction_model(), repeats()
    # Nothing matters but which token the first layer saw before the answer, and there only its previous-token head.
    first = scrub(hm, pairs, {"a0.*": None, "a1.h1": None, "a0.h0@at": "key"}, n_resamples=4)
    assert float(first.model.min()) > 9
    assert first.recovered().mean == pytest.approx(1.0, abs=1e-4) and first.recovered().low > 0.999
    # And of the second layer, what is said at the end: which token comes, whatever it followed.
    second = scrub(hm, pairs, {"heads": None, "a1.h0@end": lambda meta: (meta["answer"], meta["foil"])}, alone="keep")
    assert second.recovered().mean == pytest.approx(1.0, abs=0.02)
    assert second.kept > 0 and "for want of a partner" in second.summary()


@pytest.mark.parametrize("wrong", ["coin", "foil", "shuffled"])
def test_what_is_false_recovers_nothing(wrong: str) -> None:
    hm, pairs = induction_model(), repeats()
    order = random.Random(2).sample(range(N), N)
    claim = [pairs.meta[i]["key"] for i in order] if wrong == "shuffled" else wrong
    found = scrub(hm, pairs, {"a0.*": None, "a0.h0@at": claim}, n_resamples=12).recovered()
    assert abs(found.mean) < 0.12 and found.low < 0 < found.high
    # The head is right and the place is wrong: at "at" it is then taken from any example.
    elsewhere = scrub(hm, pairs, {"a0.*": None, "a0.h0@end": "key"}, n_resamples=12).recovered()
    assert abs(elsewhere.mean) < 0.12


def test_no_claim_recovers_exactly_nothing_and_every_claim_exactly_all() -> None:
    hm, pairs = manager("Llama"), some_pairs()
    nothing = scrub(hm, pairs, {"heads": None, "mlps": None, "input@-1": None}, n_resamples=3)
    assert torch.equal(nothing.scrubbed, nothing.baseline) and not torch.equal(nothing.baseline[0], nothing.model)
    everything = scrub(hm, pairs, {"all": list(range(len(pairs)))}, alone="keep", n_resamples=2)
    assert torch.equal(everything.scrubbed, everything.model.expand(2, -1))
    assert everything.kept == everything.partners.numel()
    # Means that are far enough apart to be divided: of the hand-built model.
    hm, pairs = induction_model(), repeats()
    assert scrub(hm, pairs, {"heads": None}, n_resamples=2).recovered() == (0.0, 0.0, 0.0)
    unique = {"a0.*": None, "heads": list(range(N))}
    assert scrub(hm, pairs, unique, alone="keep", n_resamples=2).recovered() == (1.0, 1.0, 1.0)


def some_pairs(side: str = "right") -> PairTokens:
    """Eight prompts of two lengths, with a place of one or two tokens somewhere in each."""
    draw = random.Random(5)
    texts, meta = [], []
    for i in range(8):
        words = [f"w{draw.randrange(1, 100)}" for _ in range(5 + 2 * (i % 2))]
        at = draw.randrange(1, 4)
        marked = f"{{x:{' '.join(words[at : at + 1 + i % 2])}}}"
        texts.append(" ".join([*words[:at], marked, *words[at + 1 + i % 2 :]]))
        meta.append({"kind": i // 4})
    answers = [f" w{draw.randrange(100, 110)}" for _ in range(8)]
    pairs = PromptPairs.make(texts, texts, answers, [" w119"] * 8, marked=True, meta=meta)
    return pairs.tokens(manager("Llama"), side=side)


@pytest.mark.filterwarnings("ignore:.*changed nothing")
@pytest.mark.parametrize("name", ["GPT2", "Gemma2"])
def test_values_are_those_of_the_partners_place_by_place(name: str) -> None:
    hm, pairs = manager(name), some_pairs()
    claims = {"a0.*": None, "a1.h2@x": "kind", "m0@end": None, "1.resid_pre@x": [i % 2 for i in range(8)]}
    got = scrub(hm, pairs, claims, n_resamples=2, metric="log_prob")
    lengths = pairs.clean.lengths.tolist()
    reads = ["*.z", "*.mlp_out", "1.resid_pre"]
    rows = [hm.run(pairs.clean.ids[i : i + 1, : lengths[i]], read=reads) for i in range(8)]
    spans = {"x": [row.nonzero()[:, 0].tolist() for row in pairs.clean.spans["x"]], "end": [[n - 1] for n in lengths]}
    for r in range(2):
        for i in range(8):
            writes: list[Intervention] = []
            for p, part in enumerate(got.parts):
                j = int(got.partners[r, p, i])
                node, _, place = part.partition("@")
                assert j != i and (place or lengths[i] == lengths[j])
                to, of = ([*range(lengths[i])],) * 2 if not place else (spans[place][i], spans[place][j])
                site = {"a": f"{node[1]}.z", "m": f"{node[1]}.mlp_out"}.get(node[0], node)
                head = int(node.partition(".h")[2]) if node[0] == "a" else None
                value = rows[j][site][:, of]
                value = value if head is None else value[:, :, [head]]
                writes.append(Replace(site, value, where=Where(pos=to, head=None if head is None else [head])))
                assert part != "a1.h2@x" or i // 4 == j // 4
            out = hm.run(pairs.clean.ids[i : i + 1, : lengths[i]], write=writes)
            want = out.logits[0, -1].log_softmax(-1)[pairs.answer_ids[i, 0]]
            assert float(got.scrubbed[r, i]) == pytest.approx(float(want), abs=3e-4)


def test_the_padding_and_the_budget_do_not_matter_and_the_seed_does() -> None:
    hm, claims = manager("Llama"), {"heads": None, "a1.*@x": "kind", "1.resid_mid@end": "kind"}
    whole = scrub(hm, some_pairs(), claims, n_resamples=2)
    left = scrub(hm, some_pairs("left"), claims, n_resamples=2)
    small = scrub(hm, some_pairs(), claims, n_resamples=2, max_bytes=1)
    for other in (left, small):
        assert torch.equal(other.partners, whole.partners)
        torch.testing.assert_close(other.scrubbed, whole.scrubbed, atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(other.baseline, whole.baseline, atol=2e-4, rtol=1e-4)
    assert not torch.equal(scrub(hm, some_pairs(), claims, n_resamples=2, seed=1).partners, whole.partners)
    # Every other example that agrees is drawn as often.
    mask = torch.ones(8, 2, dtype=torch.bool)
    part = _Scrubbed("a0.h0", "0.z", 0, mask, [0, 0, 0, 0, 1, 1, 1, 2], [5, 7] * 4)
    assert {tuple(part.draw(str(r), "keep").tolist()) for r in range(9)} == {(2, 3, 0, 1, 6, 5, 4, 7)}
    counts = torch.bincount(torch.stack([part.draw(str(r), "refuse", free=True)[4] for r in range(300)]), minlength=8)
    assert int(counts[[1, 3, 4, 5, 7]].sum()) == 0 and int(counts[[0, 2, 6]].min()) > 70


@pytest.mark.slow
def test_the_name_movers_of_the_testbed_depend_on_who_is_given_something() -> None:
    hm = HookManager.load("testbed")
    pairs = model_pairs(hm, "ioi", 150)
    names = [e.answers[0] for e in pairs]
    movers = {"heads": None, "a0.*": "template", "a2.h0@end": names, "a2.h2@end": names}
    assert scrub(hm, pairs, movers, alone="keep", n_resamples=4).recovered().low > 0.7
    shuffled = random.Random(0).sample(names, len(names))
    wrong = {**movers, "a2.h0@end": shuffled, "a2.h2@end": shuffled}
    assert scrub(hm, pairs, wrong, alone="keep", n_resamples=4).recovered().high < 0.4


def test_a_later_claim_overrules_an_earlier_one() -> None:
    hm, pairs = induction_model(), repeats()
    late = scrub(hm, pairs, {"a0.h0@at": "key", "a0.*": None}, n_resamples=6)
    assert abs(late.recovered().mean) < 0.2
    # The baseline is the same whatever is claimed of the parts.
    early = scrub(hm, pairs, {"a0.*": None, "a0.h0@at": "key"}, n_resamples=6)
    assert early.recovered().mean == pytest.approx(1.0, abs=1e-4)
    assert abs(float(early.baseline.mean() - late.baseline.mean())) < 1.5


def test_results_are_told_and_kept(tmp_path: Path) -> None:
    got = scrub(induction_model(), repeats(), {"a0.*": None, "a0.h0@at": "key"}, n_resamples=2)
    assert "recovered 100.0% [100.0%, 100.0%]" in got.summary() and "claim: a0.h0@at: key" in got.summary()
    loaded = Result.load(got.save(tmp_path / "r"))
    assert isinstance(loaded, ScrubResult) and loaded.summary() == got.summary()
    assert len(got.to_frame()) == 2 * N and len(got.plot().data) == 1
    assert "Scrubbing" in got.to_html(tmp_path / "p.html").read_text(encoding="utf-8")
    one = repeats().clean.ids[[0, 0, 0]]
    same = PairTokens.of_ids(one, one, torch.tensor([6, 6, 6]), torch.tensor([7, 7, 7]))
    flat = scrub(induction_model(), same, {"heads": None}, n_resamples=1)
    assert not flat.gap_is_clear and "nothing is divided" in flat.summary() and math.isnan(flat.recovered().mean)


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_scrubbed_is_refused() -> None:
    hm, pairs = manager("Llama"), some_pairs()
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"hypothesis": {}}, ConfigError, "0 claims"),
        ({"hypothesis": {"heads": None}, "alone": "self"}, ConfigError, "alone='self'"),
        ({"hypothesis": {"heads": None}, "n_resamples": 0}, ConfigError, "n_resamples=0"),
        ({"hypothesis": {"a9.h0": None}}, SiteError, "no part 'a9.h0'"),
        ({"hypothesis": {"heads@y": None}}, DataError, "no span 'y'"),
        ({"hypothesis": {"heads": "kinds"}}, DataError, "pair 0 has no fact 'kinds'; did you mean 'kind'"),
        ({"hypothesis": {"heads": [1, 2]}}, DataError, "2 labels for 8 pairs"),
        ({"hypothesis": {"heads": [[1]] * 8}}, DataError, "a label is"),
        ({"hypothesis": {"heads": list(range(8))}}, DataError, "example 0 has no partner for a0.h0"),
        ({"hypothesis": {"heads": None}, "metric": repeats().metric()}, ShapeError, "of 60 examples"),
    ]
    for given, error, text in cases:
        with pytest.raises(error, match=text):
            scrub(hm, pairs, **given)
    bare = replace(pairs, meta=())
    with pytest.raises(DataError, match="these have no meta"):
        scrub(hm, bare, {"heads": "kind"})
    three = PromptPairs.make(["w1 w2", "w3 w4", "w1 w2 w3"], ["w1 w2", "w3 w4", "w1 w2 w3"], [" w5"] * 3, [" w6"] * 3)
    with pytest.raises(DataError, match=r"example 2 has no partner .* the only one of equal length"):
        scrub(hm, three, {"heads": None})
