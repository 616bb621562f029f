"""Steering by a careless hand: what gave a number that was wrong, or an error of Python's own, is refused by name."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from interp.core.direction import Direction, Dose, SiteScale
from interp.core.errors import (
    ArtifactError,
    ConfigError,
    DataError,
    InterpError,
    ModelError,
    ShapeError,
    SiteError,
    WhereError,
)
from interp.core.gate import Gate
from interp.core.manager import HookManager
from interp.core.site import Site
from interp.data.ab_questions import ABQuestion
from interp.data.concept_tokens import ConceptTokens
from interp.data.contrast import Contrast
from interp.data.gather import gather
from interp.dictionaries.standard import ReLUTranscoder, ReLUTranscoderConfig, StandardConfig, StandardSAE
from interp.steering.acting.clamp import clamp_latents
from interp.steering.acting.exchange import from_tensors, from_torch, to_gguf
from interp.steering.acting.gate import fit_gate
from interp.steering.acting.rowwise import rowwise
from interp.steering.evaluating import ab
from interp.steering.evaluating.ab import ab_evaluation
from interp.steering.evaluating.calibrate import calibrate, token_kl
from interp.steering.evaluating.judges import CachedJudge, Judged, LocalJudge, WordJudge, judged
from interp.steering.evaluating.sweep import steering_sweep
from interp.steering.evaluating.sweep_options import SweepOptions
from interp.steering.fitting.direction_fit import FitOptions, fit_with_controls
from interp.steering.fitting.fit import fit_direction
from interp.steering.fitting.orthogonal import orthogonalised
from interp.steering.fitting.refusal import fit_refusal
from interp.steering.fitting.select import SelectOptions, select_direction, token_log_odds
from interp.testbed.tasks import task_pairs
from tests.families import manager

SITE = "1.resid_post"
HM = manager("Llama")
GOOD = [f"w{i} w60" for i in range(1, 9)]
BAD = [f"w{i} w70" for i in range(1, 9)]
DATA = Contrast.make(GOOD, BAD)
# Of the same widths, and another model.
OTHER = Direction.of(manager("Mistral"), {SITE: torch.ones(HM.d_model)})


def direction(scale: bool = False) -> Direction:
    made = Direction.of(HM, {SITE: torch.randn(HM.d_model, generator=torch.Generator().manual_seed(0))})
    return dataclasses.replace(made, scale={SITE: SiteScale(1.0, 1.0, largest=2.0)}) if scale else made


# -- numbers that were wrong without an error -----------------------------------------------------------------------


def test_a_direction_of_another_model_is_refused_wherever_a_model_is_given() -> None:
    calls: list[Any] = [
        lambda: calibrate(HM, OTHER, GOOD),
        lambda: token_kl(HM, OTHER, GOOD),
        lambda: orthogonalised(HM, OTHER),
        lambda: fit_gate(HM, Contrast.make(GOOD, BAD, paired=False), OTHER),
    ]
    for call in calls:
        with pytest.raises(ModelError, match="fit one on it"):
            call()


def test_both_bases_of_a_choice_are_scored_on_logits() -> None:
    """Once one was of logits and the other of log-probabilities: a score that is no difference told them apart."""
    good, bad = HM.to_tokens(GOOD), HM.to_tokens(BAD)
    loose = SelectOptions(max_kl=1e9, min_induce=-1e9, depth=1.0)
    found = select_direction(HM, [direction()], lambda logits: logits[:, 5], good, bad, options=loose)
    for value, tokens in zip(found.base, (good, bad), strict=True):
        wanted = torch.stack([HM.run(tokens.take(torch.tensor([i]))).logits[0, -1, 5] for i in range(8)]).mean()
        assert value == pytest.approx(float(wanted), abs=1e-5)


def test_one_text_for_what_refuses_is_not_read_letter_by_letter() -> None:
    with pytest.raises(DataError, match="letter by letter"):
        fit_refusal(HM, GOOD[:4], BAD[:4], GOOD[4:], BAD[4:], refuses="w1")
    with pytest.raises(DataError, match="whole numbers"):
        token_log_odds([-1])
    with pytest.raises(DataError, match="vocabulary of 120"):
        token_log_odds([120])(torch.zeros(2, 120))


def test_the_labels_of_one_pair_cannot_be_shuffled() -> None:
    """Exchanged or not, their difference is the true one: a control that is the direction itself."""
    one = Contrast.make(GOOD[:1], BAD[:1])
    with pytest.raises(DataError, match="two pairs at least"):
        fit_direction(HM, one, SITE, method="shuffled")


def test_predictions_that_are_not_numbers_keep_to_no_limit() -> None:
    options = SweepOptions(n_generated=0, controls=0, progress=False)
    found = steering_sweep(HM, direction(), GOOD, doses=[0.0, 3e38], options=options)
    assert bool(found.kl[1].isnan()) and found.failed == ["", "kl"]


def test_texts_on_both_sides_of_the_split_are_named() -> None:
    repeated = Contrast.make(GOOD[:2] * 4, BAD[:2] * 4)
    options = FitOptions(n_bootstrap=20)
    with pytest.warns(UserWarning, match="a control separates"):
        found = fit_with_controls(HM, repeated, SITE, options=options)
    assert any("held-out texts were fitted on too" in note for note in found.notes), found.notes
    apart = fit_with_controls(HM, DATA, SITE, options=options)
    assert not any("fitted on too" in note for note in apart.notes)


def test_words_are_matched_as_they_are_meant() -> None:
    def score(judge: WordJudge, text: str) -> Any:
        return judge([Judged("", text)])[0]

    assert score(WordJudge(["C++"]), "I like C++ a lot") == 2.0
    assert score(WordJudge([" glad"]), "glad, and gladly") == 2.0
    assert score(WordJudge([" glad"]), "gladly") == 0.0
    for words in ([""], ["glad", " "], "a*", []):
        with pytest.raises(ConfigError, match=r"not empty|empty text"):
            WordJudge(words)
    with pytest.raises(ConfigError, match="one token"):
        LocalJudge(HM, "{text}", yes="w1", no="w1")


@pytest.mark.parametrize("below", ["\nAnswer:", "\nThink first."])
def test_a_line_below_the_last_option_does_not_move_with_it(below: str) -> None:
    with pytest.raises(DataError, match="an empty line before what follows"):
        ABQuestion(f"Well?\n (A) yes\n (B) no{below}", "A", "B").swapped()
    assert ABQuestion(f"Well?\n (A) yes\n (B) no\n{below}", "A", "B").swapped().question == (
        f"Well?\n (A) no\n (B) yes\n{below}"
    )
    long = ABQuestion("Well?\n (A) yes\n  indeed\n (B) no\n  never", "A", "B").swapped()
    assert long.question == "Well?\n (A) no\n  never\n (B) yes\n  indeed"


def test_half_precision_may_round_what_hardly_ever_comes_next() -> None:
    hm = HookManager.load("testbed", dtype="bfloat16")
    good = ["i loved the film", "she was glad today", "a great success", "he felt happy"]
    bad = ["i hated the film", "she was sad today", "a great failure", "he felt awful"]
    made = fit_direction(hm, Contrast.make(good, bad), "2.resid_post")
    assert orthogonalised(hm, made).name.endswith("(orthogonalised)")


def test_latents_are_clamped_where_they_were_trained() -> None:
    def sae(**metadata: Any) -> StandardSAE:
        return StandardSAE(StandardConfig(d_in=HM.d_model, d_sae=64, metadata=metadata))

    transcoder = ReLUTranscoder(ReLUTranscoderConfig(d_in=HM.d_model, d_out=HM.d_model, d_sae=64))
    with pytest.raises(ShapeError, match="reads one site and writes another"):
        clamp_latents(transcoder, {3: 1.0}, "1.mlp_out")
    processed = sae(hook_name=SITE, model_from_pretrained_kwargs={"center_writing_weights": True})
    with pytest.raises(ConfigError, match="not the raw model's"):
        clamp_latents(processed, {3: 1.0}, SITE)
    with pytest.warns(UserWarning, match=r"trained at 1\.resid_post and is used at 0\.resid_post"):
        clamp_latents(sae(hook_name=SITE), {3: 1.0}, "0.resid_post")
    for same in (SITE, "2.resid_pre"):
        assert clamp_latents(sae(hook_name=SITE), {3: 1.0}, same)


@pytest.mark.parametrize("factor", [1e25, 1e-25])
def test_the_length_of_a_very_long_or_short_vector_is_its_own(factor: float) -> None:
    """In single precision its square is infinite, or 0: the unit vector was zero without a word."""
    d = direction(scale=True)
    far = d * factor
    torch.testing.assert_close(far.unit(SITE), d.unit(SITE))
    torch.testing.assert_close(far.matched(d)[SITE], d[SITE])
    (edit,) = far.as_interventions(Dose(1.0, "sigma"))
    torch.testing.assert_close(edit.vector, d.unit(SITE))  # type: ignore[attr-defined]
    (put,) = far.as_interventions(1.0, operation="set")
    assert put.value == pytest.approx(factor * float(d[SITE].norm()), rel=1e-5)  # type: ignore[attr-defined]


# -- errors of Python's own -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_is_refused_by_name(tmp_path: Path) -> None:
    d: Any = direction()
    wrong: Any = None
    v = torch.ones(HM.d_model)
    claims = tmp_path / "claims_layer_1.pt"
    torch.save(torch.zeros(1).expand(10**12), claims)  # a few bytes that say they are 4 TB
    calls: list[tuple[type[InterpError], str, Any]] = [
        (SiteError, "vector of its own", lambda: gather(HM, DATA.tokens(HM), "0.pattern")),
        (SiteError, "vector of its own", lambda: gather(HM, DATA.tokens(HM), Site(SITE).at(pos=0))),
        (DataError, "give a Contrast", lambda: fit_direction(HM, [GOOD, BAD], SITE)),  # type: ignore[arg-type]
        (DataError, "NoneType", lambda: Contrast.make([wrong], ["w1"])),
        (DataError, "got NoneType", lambda: Contrast.make(wrong, ["w1"])),
        (ConfigError, "a list of numbers", lambda: steering_sweep(HM, d, GOOD, doses=1.0)),  # type: ignore[arg-type]
        (ConfigError, "no as_interventions", lambda: calibrate(HM, wrong, GOOD)),
        (WhereError, "expected a Where", lambda: fit_direction(HM, DATA, SITE, where="last")),  # type: ignore[arg-type]
        (WhereError, "expected a Where", lambda: calibrate(HM, d, GOOD, where=-1)),  # type: ignore[arg-type]
        (WhereError, "expected a Where", lambda: SweepOptions(where="last")),  # type: ignore[arg-type]
        (ConfigError, "expected a Where", lambda: rowwise([d], where="last")),  # type: ignore[arg-type]
        (SiteError, "site name → vector", lambda: Direction.of(HM, v)),  # type: ignore[arg-type]
        (ArtifactError, "cannot be written", lambda: d.save("/proc/no.safetensors")),
        (ArtifactError, "cannot be written", lambda: to_gguf(d, "/proc/no.gguf", model_hint="llama")),
        (ConfigError, "one thing steers all", lambda: rowwise(d)),
        (ConfigError, "row 0 holds str", lambda: rowwise(["x"])),  # type: ignore[list-item]
        (ConfigError, "no site", lambda: fit_gate(HM, Contrast.make(GOOD, BAD, paired=False), d, [])),
        (ConfigError, "threshold=None", lambda: Gate(SITE, v, wrong)),
        (ConfigError, "threshold=nan", lambda: Gate(SITE, v, float("nan"))),
        (ShapeError, "NaN or infinity", lambda: Gate(SITE, v * float("nan"))),
        (ShapeError, "ndarray", lambda: from_tensors(HM, {1: v.numpy()})),  # type: ignore[dict-item]
        (ArtifactError, "give a dict", lambda: from_tensors(HM, [v])),  # type: ignore[arg-type]
        (ShapeError, "plain values", lambda: from_tensors(HM, {1: v.to_sparse()})),
        (ShapeError, "plain values", lambda: from_tensors(HM, {1: v.to("meta")})),
        (ShapeError, "plain values", lambda: from_torch(HM, claims)),
        (ArtifactError, "is a folder", lambda: to_gguf(d, tmp_path, model_hint="llama", overwrite=True)),
        (ArtifactError, "model_hint=None", lambda: to_gguf(d, tmp_path / "x.gguf", model_hint=wrong)),
        (ConfigError, "the other way round", lambda: (-direction(scale=True)).as_interventions(Dose(1.0, "largest"))),
        (DataError, "expected a list of scores", lambda: judged(lambda items: wrong, [Judged("", "")])),
        (ArtifactError, "is a folder", lambda: CachedJudge(WordJudge(["a"]), tmp_path, name="a")),
    ]
    for kind, said, call in calls:
        with pytest.raises(kind, match=said):
            call()


@pytest.mark.usefixtures("unchecked")
def test_a_cache_refuses_a_judge_that_leaves_texts_out_and_keeps_no_truth_value(tmp_path: Path) -> None:
    items = [Judged("", "a"), Judged("", "b")]
    with pytest.raises(DataError, match="1 scores for 2 texts"):
        CachedJudge(lambda some: [1.0], tmp_path / "a.jsonl", name="a")(items)
    truth = CachedJudge(lambda some: [True] * len(some), tmp_path / "b.jsonl", name="b")
    with pytest.raises(DataError, match="gave True"):
        judged(truth, items)
    assert not (tmp_path / "b.jsonl").exists()


def test_a_method_to_compare_with_that_cannot_be_fitted_leaves_the_fit_whole() -> None:
    few = Contrast.make(GOOD[:3], BAD[:3])
    options = FitOptions(n_bootstrap=0, share=0.34, compare=("lda", "pca"))
    blocked = dataclasses.replace(few.tokens(HM), pairs=None)
    # All texts of a class alike: no variance within the classes.
    same = ConceptTokens(
        blocked.tokens.take(torch.tensor([0, 0, 0, 3, 3, 3])),
        blocked.labels[torch.tensor([0, 0, 0, 3, 3, 3])],
        blocked.classes,
        torch.tensor([0, 1, 2, 0, 1, 2]),
    )
    with pytest.warns(UserWarning, match="a control separates"):
        found = fit_with_controls(HM, same, SITE, options=options)
    assert list(found.cosines) == ["lda"] and torch.tensor(found.cosines["lda"]).isnan().all()


def test_answers_that_were_measured_are_kept_when_the_work_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    hm = HookManager.load("testbed")
    v = torch.randn(hm.d_model, generator=torch.Generator().manual_seed(0))
    both = {name: Direction.of(hm, {"2.resid_post": sign * v}) for name, sign in (("one", 1.0), ("two", -1.0))}
    real, calls = ab._measure, []

    def stopping(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 6:  # two of the base, two of the first line, in the second line
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(ab, "_measure", stopping)
    found = ab_evaluation(hm, task_pairs("choice", 4), both)
    assert found.steers == ["unsteered", "one"] and "stopped: 1 of 2" in found.notes[-1]
