"""Methods compared: what is known beforehand, and what the small world's concepts show."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from interp.core.direction import Direction
from interp.core.errors import ConfigError, DataError
from interp.core.manager import HookManager
from interp.core.result import Provenance, Result
from interp.core.site import Site
from interp.core.where import Where
from interp.data.concept import Concept
from interp.data.concept_tokens import ConceptTokens
from interp.data.contrast import Contrast
from interp.data.gather import Gathered
from interp.dictionaries.topk import TopKConfig, TopKSAE
from interp.steering.concepts.compare import CompareOptions, WordShare, compare_methods, detection_scores
from interp.steering.concepts.contenders import METHODS, Contender, Fit, along, of_direction, sae_contender
from interp.steering.concepts.methods_table import MethodsTable
from interp.steering.concepts.observable import observable
from interp.steering.evaluating.judges import Judged
from interp.testbed.concept_texts import WORLD_CONCEPTS, world_concepts, world_openings
from tests.families import manager

SITE = "2.resid_post"
BLIND = ("random", "shuffled")


def concept(name: str = "five", word: str = "w5", other: str = "w6", **more: Any) -> Concept:
    def texts(w: str, first: int) -> list[str]:
        return [f"w{10 + i} w{30 + i % 7} {w} w{50 + i % 5}" for i in range(first, first + 12)]

    fit = Contrast.make(texts(word, 0), texts(other, 20), paired=False, name=name)
    held = Contrast.make(texts(word, 12), texts(other, 40), paired=False, name=name)
    # Read at the word itself.
    return Concept(
        name, fit, held, where=Where(pos=2), words=more.pop("words", (word, "w7")), opposite=(other,), **more
    )


def oracle(hm: HookManager, data: ConceptTokens, site: Site, seed: int) -> Contender:
    """Steers by the very logits of the concept's words; detects nothing."""
    return Contender(observable(hm, ["w5", "w7"], ["w6"]).direction(), None)


def blind(hm: HookManager, data: ConceptTokens, site: Site, seed: int) -> Contender:
    return Contender(None, lambda x: torch.zeros(len(x)))


def broken(hm: HookManager, data: ConceptTokens, site: Site, seed: int) -> Contender:
    raise DataError("it needs pairs")


PROMPTS = [f"w{i} w{i + 3}" for i in range(20, 28)]
OPTIONS = CompareOptions(factors=(0.01, 30.0), unit="raw", max_new_tokens=4)


@pytest.fixture(scope="module")
def planted() -> MethodsTable:
    mine: dict[str, Fit] = {"oracle": oracle, "blind": blind, "broken": broken, "random": METHODS["random"]}
    mine["mean_difference"] = METHODS["mean_difference"]
    concepts = [concept(), concept("again", words=("w5", "w7"))]
    return compare_methods(manager("GPT2"), concepts, SITE, prompts=PROMPTS, methods=mine, options=OPTIONS)


def test_what_a_method_of_the_user_raises_is_named_and_the_others_are_kept() -> None:
    def raises(hm: HookManager, data: ConceptTokens, site: Site, seed: int) -> Contender:
        raise ZeroDivisionError("mine")

    given = concept()
    assert isinstance(given.fit, Contrast) and isinstance(given.held_out, Contrast)
    held = Contrast.make([*given.fit.positive[:3], *given.held_out.positive], given.held_out.negative, paired=False)
    leaking = Concept("five", given.fit, held, where=given.where)
    methods: dict[str, Fit] = {"mine": raises, "mean_difference": METHODS["mean_difference"]}
    found = compare_methods(manager("GPT2"), [leaking], SITE, methods=methods)
    assert found.failed == {"five / mine": "ZeroDivisionError: mine"} and float(found.detection[1, 0]) > 0.9
    assert found.notes == ("five: 3 of 27 held-out texts are also fitted on",)
    clean = compare_methods(manager("GPT2"), [given], SITE, methods={"random": METHODS["random"]})
    assert not clean.notes


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "wrong", [{"factors": (math.nan,)}, {"factors": 1.0}, {"temperature": -1.0}, {"batch_size": 0}]
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        CompareOptions(**wrong)
    with pytest.raises(ConfigError, match="expected a list of texts"):
        compare_methods(manager("GPT2"), [concept()], SITE, prompts="w5 w6")


# -- planted -----------------------------------------------------------------------------------------------------


def test_what_steers_by_the_words_themselves_says_them_and_beats_its_control(planted: MethodsTable) -> None:
    assert planted.site == SITE and planted.controls == ["random"]
    assert float(planted.concept_score[0].min()) == 2.0 and planted.factor[0].tolist() == [30.0, 30.0]
    assert planted["oracle", "steering"].mean > float(planted.unsteered.max()) + 0.1
    assert planted.beats_control("oracle") and planted.beats_control("random") is None
    assert "w5" in planted.examples["five / oracle"] or "w7" in planted.examples["five / oracle"]


def test_a_detector_that_says_nothing_is_at_chance_and_a_linear_concept_is_found(planted: MethodsTable) -> None:
    assert planted.detection[planted.methods.index("blind")].tolist() == [0.5, 0.5]
    assert planted["mean_difference", "detection"].low > 0.95 and math.isnan(planted["oracle", "detection"].mean)
    assert (
        planted.beats_control("mean_difference", "detection") and planted.beats_control("oracle", "detection") is None
    )


def test_a_method_that_fails_is_empty_and_named(planted: MethodsTable) -> None:
    assert planted.failed == {"five / broken": "it needs pairs", "again / broken": "it needs pairs"}
    assert math.isnan(planted["broken", "steering"].mean)
    frame = planted.to_frame().set_index("method")
    assert frame.loc["broken", "failed"] == 2 and frame.loc["oracle", "failed"] == 0
    assert "not fitted: five / broken" in planted.summary()


def test_the_factor_is_chosen_without_the_prompts_that_score() -> None:
    order = torch.randperm(len(PROMPTS), generator=torch.Generator().manual_seed(0))
    scoring = [PROMPTS[i] for i in order[len(order) // 2 :].tolist()]

    def judge_of(given: Concept) -> Any:
        def score(item: Judged) -> float:
            steered = "w7 w7" in item.text
            return 2.0 * steered if item.prompt in scoring else 0.001 * (not steered)

        return lambda items: [score(item) for item in items]

    only = {"oracle": oracle}
    found = compare_methods(
        manager("GPT2"), [concept()], SITE, prompts=PROMPTS, methods=only, options=OPTIONS, judge=judge_of
    )
    # Over all prompts the large factor is by far the better one; on those that choose, the small one is.
    assert float(found.factor) == 0.01 and float(found.steering) < 0.5


def test_one_seed_gives_one_table(planted: MethodsTable) -> None:
    again = compare_methods(
        manager("GPT2"), [concept()], SITE, prompts=PROMPTS, methods={"random": METHODS["random"]}, options=OPTIONS
    )
    row = planted.methods.index("random")
    assert float(again.detection) == float(planted.detection[row, 0])
    assert float(again.steering) == float(planted.steering[row, 0])


def test_a_judge_takes_the_place_of_words_and_a_second_one_adds_an_aspect() -> None:
    seen: list[Judged] = []

    def judge_of(given: Concept) -> Any:
        def judge(items: Any) -> list[float | None]:
            seen.extend(items)
            return [2.0 if "w5" in item.prompt else None for item in items]

        return judge

    bare = concept(words=())
    options = CompareOptions(factors=(0.5,), max_new_tokens=2, instruction=lambda items: [0.0] * len(items))
    prompts = ["w1 w5", "w2 w5", "w3 w5", "w4 w5"]
    only = {"random": METHODS["random"]}
    found = compare_methods(
        manager("GPT2"), [bare], SITE, prompts=prompts, methods=only, options=options, judge=judge_of
    )
    assert seen and float(found.concept_score) == 2.0 and float(found.steering) == 0.0, "an aspect of 0 makes 0"
    with pytest.raises(DataError, match="nothing says whether a text shows 'five'"):
        compare_methods(manager("GPT2"), [bare], SITE, prompts=prompts, methods=only)


def test_the_latent_that_was_planted_is_chosen_and_detects() -> None:
    hm, given = manager("GPT2"), concept()
    plain = of_direction("logistic")(hm, given.tokens(hm), Site(SITE), 0)
    assert isinstance(plain.steers, Direction)
    sae = TopKSAE(TopKConfig(d_in=hm.d_model, d_sae=64, k=64))
    with torch.no_grad():
        sae.W_enc.normal_(std=1e-3)
        sae.W_enc[:, 11] = plain.steers.unit(SITE)
        sae.W_dec[11] = plain.steers.unit(SITE)
        for name, bias in sae.named_parameters():
            if name.startswith("b_"):
                bias.zero_()
    made = sae_contender(sae)(hm, given.tokens(hm), Site(SITE), 0)
    assert isinstance(made.steers, Direction) and made.steers.name == "latent 11"
    table = compare_methods(hm, [given], SITE, methods={"sae": sae_contender(sae), "random": METHODS["random"]})
    assert table["sae", "detection"].mean > 0.95


# -- closed form -------------------------------------------------------------------------------------------------


def test_a_text_is_scored_by_its_largest_token() -> None:
    rows = torch.tensor([0, 0, 1, 1, 2, 2, 3])
    x = torch.tensor([[0.0], [9.0], [1.0], [1.0], [2.0], [8.0], [3.0]])
    y = torch.tensor([1, 1, 1, 1, 0, 0, 0])
    held = Gathered(x, y, rows, rows, torch.full((7,), -1), ("negative", "positive"))
    # Largest: 9 and 1 with the concept, 8 and 3 without it: two of four pairs are in order. Of −x: 0, −1, −2, −3.
    assert detection_scores(held, lambda v: v[:, 0]) == 0.5
    assert detection_scores(held, lambda v: -v[:, 0]) == 1.0


def test_words_of_a_concept_count_against_those_of_its_opposite() -> None:
    share = WordShare(("good", "fine"), ("bad",))
    items = [Judged("", t) for t in ("Good and FINE", "good bad", "good good bad", "bad", "goodness", "")]
    assert share(items) == [2.0, 0.0, pytest.approx(2 / 3), 0.0, 0.0, 0.0]
    assert WordShare(("good",), enough=4)(items[:1]) == [0.5]


def table_of(detection: list[list[float]], controls: list[str]) -> MethodsTable:
    values = torch.tensor(detection, dtype=torch.float64)
    empty = torch.full_like(values, math.nan)
    return MethodsTable(
        provenance=Provenance("made"),
        site=SITE,
        methods=["a", "b", "random", "shuffled"],
        concepts=["x", "y", "z"],
        controls=controls,
        detection=values,
        hard=empty,
        steering=values - 0.5,
        concept_score=empty,
        fluency=empty,
        factor=empty,
        unsteered=empty[0],
        failed={"z / a": "no"},
        examples={},
    )


def test_a_method_is_held_to_the_better_control_of_each_concept(tmp_path: Path) -> None:
    scores = [[0.9, 0.9, math.nan], [0.9, 0.6, 0.9], [0.5, 0.8, 0.5], [0.7, 0.5, 0.5]]
    table = table_of(scores, list(BLIND))
    lead = table.over_control("a", "detection")
    assert lead.mean == pytest.approx(0.15) and table.beats_control("a", "detection")
    assert table.over_control("b", "detection").mean == pytest.approx((0.2 - 0.2 + 0.4) / 3)
    assert not table.beats_control("b", "detection"), "one concept in three is lost"
    assert "no better than a control: b" in table.summary()
    again = Result.load(table.save(tmp_path / "t"))
    assert isinstance(again, MethodsTable) and again.failed == table.failed
    assert len(table.by_concept()) == 12 and len(table.to_frame()) == 4
    assert len(table.plot().data) == 4
    alone = table_of(scores, [])
    assert alone.beats_control("a") is None
    with pytest.raises(ConfigError, match="no method of this table is a control"):
        alone.over_control("a")


# -- the small world ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world() -> list[Concept]:
    return world_concepts(("liking", "plural"), n=40, n_held_out=20)


def test_texts_of_the_small_world_have_their_concept_or_lack_it(world: list[Concept]) -> None:
    liking, plural = world
    for part in (liking.fit, liking.held_out):
        assert isinstance(part, Contrast)
        for side, good, bad in (
            (part.positive, liking.words, liking.opposite),
            (part.negative, liking.opposite, liking.words),
        ):
            said = [set(p.text.replace(".", "").replace(",", "").split()) for p in side]
            assert all(s & set(good) and not s & set(bad) for s in said)
    assert len(plural.hard) == 20 and isinstance(plural.fit, Contrast) and isinstance(plural.held_out, Contrast)
    fitted = {p.text for p in (*plural.fit.positive, *plural.fit.negative)}
    held = {p.text for p in (*plural.held_out.positive, *plural.held_out.negative)}
    assert not fitted & held and not held & {p.text for p in plural.hard}
    assert set(WORLD_CONCEPTS) == {"liking", "female", "plural", "Velic", "music"}
    openings = world_openings(12)
    assert len(set(openings)) == 12 and openings == world_openings(12)
    with pytest.raises(ConfigError, match="no concept 'likng'"):
        world_concepts(("likng",))


def test_probes_detect_the_concepts_of_the_small_world_and_controls_do_not(world: list[Concept]) -> None:
    methods = {name: METHODS[name] for name in ("logistic", "lda", *BLIND)}
    found = compare_methods(HookManager.load("testbed"), world, SITE, methods=methods)
    assert float(found.detection[:2].min()) > 0.9 and float(found.hard[:2, 1].min()) > 0.9
    assert bool(found.hard[:, 0].isnan().all()) and bool(found.steering.isnan().all())
    assert 0.2 < float(found.detection[2:].mean()) < 0.8
    assert found.beats_control("logistic", "detection") and found.plot().data


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:method='lat' found something else:UserWarning")
def test_every_method_runs_on_the_small_world(world: list[Concept]) -> None:
    hm = HookManager.load("testbed")
    given = world_concepts(("female", "Velic"))
    found = compare_methods(hm, given, SITE, prompts=world_openings(16))
    assert not found.failed and found.methods == list(METHODS)
    assert bool(found.steering.isfinite().all()) and float(found.fluency.max()) <= 2.0
    female = found.steering[:, 0]
    best = found.methods.index("logistic")
    assert float(female[best]) > float(found.unsteered[0]) and float(found.detection[best].min()) > 0.95


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_is_refused() -> None:
    hm = manager("GPT2")
    with pytest.raises(ConfigError, match="0 concepts"):
        compare_methods(hm, [], SITE)
    with pytest.raises(ConfigError, match="two concepts are called 'five'"):
        compare_methods(hm, [concept(), concept()], SITE)
    with pytest.raises(ConfigError, match="at least two"):
        compare_methods(hm, [concept()], SITE, prompts=["w1"])
    with pytest.raises(ConfigError, match="expected one of raw"):
        CompareOptions(unit="metres")
    with pytest.raises(ConfigError, match="no method 'c'"):
        table_of([[0.5] * 3] * 4, [])["c", "steering"]
    assert along(Direction({SITE: torch.eye(32)[0]}, "x", Provenance("y")))(torch.eye(32))[0] == 1
