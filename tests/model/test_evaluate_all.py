"""All evaluations in one call: what dictionaries share changes no bit, and labels are found where they are planted."""

import math
from typing import Any

import pytest
import torch

import interp
from interp.data.tokens import TokenSource
from interp.dictionaries.base import Dictionary
from interp.dictionaries.options import DictionaryOptions
from interp.evaluate.agreement import stability
from interp.evaluate.baseline import fit_pca
from interp.evaluate.definitions import DEFINITIONS, PARTS
from interp.evaluate.dictionary import Subject, evaluate_dictionaries, evaluate_dictionary
from interp.evaluate.evaluations import Evaluations
from interp.evaluate.every import Trained, evaluate_all, evaluate_planted
from interp.evaluate.labels import LabelScores, label_scores
from interp.evaluate.planted import PlantedWorld
from interp.evaluate.samples import Samples
from interp.testbed.text import LabelledTokens, label_values
from tests.dictionaries import make as make_dictionary
from tests.families import VOCAB, make, manager, word_tokenizer
from tests.model.test_page import EMBEDDED, TableSAE

SITE, OTHER = interp.Site("1.resid_post"), interp.Site("0.resid_post")


@pytest.fixture(scope="module")
def hm() -> interp.HookManager:
    """A tiny random Llama."""
    return interp.HookManager.load(make("Llama"), word_tokenizer())


@pytest.fixture(scope="module")
def world() -> interp.HookManager:
    """The packaged model."""
    return interp.HookManager.load("testbed")


def source(n: int = 40, seed: int = 0) -> TokenSource:
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.randint(3, 14, (n,), generator=draw).tolist()
    texts = [" ".join(f"w{i}" for i in torch.randint(1, 60, (size,), generator=draw).tolist()) for size in sizes]
    return TokenSource(texts, word_tokenizer(), ctx=16, rows=4, bos=True)


def dictionary(kind: str, d_in: int, *, seed: int = 0, site: str = SITE.name, target: str | None = None) -> Dictionary:
    options: dict[str, Any] = {"kind": kind, "d_sae": 48, "k": 6} if kind == "topk" else {"kind": kind, "d_sae": 48}
    options["form"] = "sae" if target is None else "transcoder"
    made: Dictionary = DictionaryOptions(**options).make(d_in, d_in)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        made.W_enc.copy_(torch.randn(made.W_enc.shape, generator=draw) * 0.3)
        made.W_dec.copy_(torch.randn(made.W_dec.shape, generator=draw) * 0.2)
    made.cfg.metadata["hook_name"] = site
    if target is not None:
        made.cfg.metadata["hook_name_out"] = target
    return made.requires_grad_(False)


def test_dictionaries_that_are_measured_together_get_the_bits_that_they_get_alone(
    hm: interp.HookManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    d, tokens, other_text = hm.d_model, source(), source(seed=1)
    pca = fit_pca(hm, other_text, SITE, rank=8)
    small = fit_pca(hm, other_text, SITE, rank=3)
    assert pca.truncated(3).components.equal(small.components) and pca.truncated(3).rank == 3
    normed, out = interp.Site("1.ln2.normalized"), interp.Site("1.mlp_out")
    subjects = [
        Subject(dictionary("topk", d), SITE, SITE, pca),
        Subject(dictionary("topk", d, seed=1), SITE, SITE, pca),
        Subject(dictionary("standard", d, seed=2), SITE, SITE, pca.truncated(3)),
        Subject(dictionary("topk", d, seed=3), OTHER, OTHER),
        Subject(dictionary("standard", d, target=out.name), normed, out),
    ]
    targets = [None if s.gives == s.reads else s.gives for s in subjects]
    alone = [
        evaluate_dictionary(hm, s.dictionary, tokens, s.reads, target=target, pca=s.pca)
        for s, target in zip(subjects, targets, strict=True)
    ]
    runs = 0
    plain = type(hm).run

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal runs
        runs += 1
        return plain(self, *args, **options)

    monkeypatch.setattr(type(hm), "run", counted)
    together = evaluate_dictionaries(hm, subjects, tokens)
    blocks = sum(1 for _ in tokens.blocks())
    # Of a block: activations and clean losses for all; three ablations a site; a PCA each; a dictionary each.
    assert runs == blocks * (2 + 3 * 3 + 2 + len(subjects))
    for found, one in zip(together, alone, strict=True):
        assert found.scalars() == one.scalars() and found.firing.equal(one.firing)
        assert found.provenance == one.provenance
        assert found.fvu > 0 and math.isfinite(found.kl_recovered)
    assert len({found.fvu for found in together}) == len(subjects)


def test_kl_recovered_is_one_of_a_perfect_stand_in_and_none_of_zeros(hm: interp.HookManager) -> None:
    gone = dictionary("topk", hm.d_model)
    with torch.no_grad():
        gone.W_dec.zero_()
        gone.b_dec.zero_()
    found = evaluate_dictionary(hm, gone, source(), SITE)
    assert found.kl_recovered == pytest.approx(0, abs=1e-6) and found.kl > 0
    with torch.no_grad():
        gone.b_dec.copy_(torch.stack([row.mean(0) for row in _activations(hm)]).mean(0))
    near_mean = evaluate_dictionary(hm, gone, source(), SITE)
    assert abs(near_mean.kl_recovered_mean) < 0.2


def _activations(hm: interp.HookManager) -> list[torch.Tensor]:
    samples = Samples.of_text(hm, source(), SITE, max_tokens=10_000)
    return [x for x, _ in samples.parts()]


def test_samples_that_are_remembered_are_read_once_and_the_same(hm: interp.HookManager) -> None:
    reads = 0
    plain = Samples.of_text(hm, source(), SITE, max_tokens=10_000)

    def parts() -> Any:
        nonlocal reads
        reads += 1
        yield from plain.parts()

    watched = Samples(parts, "row", "text")
    kept = watched.remembered(1 << 30)
    next(kept.parts())  # a reading that is given up is no whole one
    for _ in range(3):
        for (x, unit), (y, other) in zip(kept.parts(), plain.parts(), strict=True):
            assert x.equal(y) and unit is not None and other is not None and unit.equal(other)
    assert reads == 2
    list(watched.remembered(100).parts())
    assert [len(list(too_many.parts())) for too_many in [watched.remembered(100)]] and reads == 4


@pytest.fixture(scope="module")
def everything(world: interp.HookManager) -> Evaluations:
    from interp.train.config import TextOptions
    from interp.train.text import token_source

    options = TextOptions(ctx=32, rows=16)
    held_out, train = (token_source("testbed", options, world.tokenizer, part=p) for p in ("held_out", "train"))
    d = world.d_model
    made = {
        "s0": dictionary("topk", d, seed=0, site="blocks.2.hook_resid_post"),
        "s1": dictionary("topk", d, seed=1, site="blocks.2.hook_resid_post"),
        "t": dictionary("standard", d, site="blocks.2.ln2.hook_normalized", target="blocks.2.hook_mlp_out"),
    }
    trained = {"s0": Trained("topk", 0, 4), "s1": Trained("topk", 1, 4)}
    return evaluate_all(world, made, held_out, fit_tokens=train, trained=trained, max_tokens=2500)


def test_everything_that_applies_is_measured_and_what_does_not_is_noted(everything: Evaluations) -> None:
    frame: Any = everything.to_frame()
    together = {name for name in DEFINITIONS if name.startswith("labels_found_by_any")}
    wanted = {name for name, one in DEFINITIONS.items() if one.part != "planted"} - together
    assert set(frame[frame["run"] == "s0"]["figure"]) == wanted
    assert {DEFINITIONS[name].part for name in set(frame[frame["run"] == "t"]["figure"])} == {
        "core",
        "geometry",
        "labels",
    }
    assert [note for note in everything.notes if note.startswith("t: dark_matter")]
    # What all three find is a row of none of them, and a table that says which of them finds what.
    both = frame[frame["setting"] == "any of 3 of testbed"].set_index("figure")
    assert set(both.index) == together and both["seed"].isna().all() and everything.runs == ["s0", "s1", "t"]
    table: Any = everything.labels_frame()
    which = table[table["run"] == "any of 3 of testbed"].set_index("label")
    assert which["found"].sum() == both["value"]["labels_found_by_any"]
    for run in ("s0", "t"):
        own, taken = table[table["run"] == run].set_index("label"), which[which["dictionary"] == run]
        assert len(taken) and taken["f1"].equals(own["f1"][taken.index])
        assert (which["chosen_f1"] >= own["chosen_f1"][which.index]).all()
    assert "any of 3: " in everything.summary() and len(everything.of_any) == 1
    # At one site no dictionary has the random directions of another.
    runs = [table[table["run"] == run].set_index("label")["random"].sort_index() for run in ("s0", "s1")]
    assert not runs[0].equals(runs[1])
    core = frame[(frame["run"] == "s0") & (frame["figure"] == "l0")].iloc[0]
    assert core["value"] == 6.0 and core["n_seeds"] == 2 and core["setting"] == "topk" and core["unit"] == "row"
    assert not frame["definition"].isna().any() and (frame["n_tokens"] > 0).any()
    known = frame.dropna(subset=["low", "high"])
    assert ((known["low"] <= known["value"]) & (known["value"] <= known["high"])).all() and len(known) > 40
    assert everything.plot().data


def test_agreement_between_seeds_is_that_of_stability(everything: Evaluations, world: interp.HookManager) -> None:
    d = world.d_model
    pair = {f"s{i}": dictionary("topk", d, seed=i) for i in range(2)}
    known = stability(pair)
    frame: Any = everything.to_frame().set_index(["run", "figure"])["value"]
    assert frame["s0", "mmcs_seeds"] == pytest.approx(float(known.mmcs[0, 1]))
    assert frame["s1", "mmcs_seeds"] == pytest.approx(float(known.mmcs[1, 0]))
    assert frame["s0", "matched_cosine_seeds"] == pytest.approx(float(known.matched[0, 1]))
    assert ("t", "mmcs_seeds") not in frame


@pytest.mark.usefixtures("unchecked")
def test_a_part_that_is_not_known_is_refused_before_work_starts(hm: interp.HookManager) -> None:
    made = {"a": dictionary("topk", hm.d_model)}
    with pytest.raises(interp.ConfigError, match=r"no part 'dark'; did you mean 'dark_matter'"):
        evaluate_all(hm, made, source(), only=["dark"])
    with pytest.raises(interp.ConfigError, match="at least one"):
        evaluate_all(hm, {}, source())
    found = evaluate_all(hm, made, source(), only=["geometry", "labels"])
    assert {DEFINITIONS[name].part for name in found.figure} == {"geometry"}
    assert "labels are known of the small world alone" in found.notes[0]


def test_planted_atoms_are_found_by_their_own_dictionary_and_not_by_another() -> None:
    planted = PlantedWorld(16, 24, density=0.1)
    right, wrong = (make_dictionary("standard", dtype="float32") for _ in range(2))
    for made in (right, wrong):
        made.set_cfg(made.cfg.model_copy(update={"d_in": 24, "d_sae": 16}))
    draw = torch.randn(16, 24, generator=torch.Generator().manual_seed(5))
    for made, rows in ((right, planted.atoms), (wrong, draw / draw.norm(dim=1, keepdim=True))):
        made.W_enc, made.W_dec = torch.nn.Parameter(rows.T.clone()), torch.nn.Parameter(rows.clone())
        made.b_enc, made.b_dec = torch.nn.Parameter(torch.full((16,), -0.01)), torch.nn.Parameter(torch.zeros(24))
    found = evaluate_planted({"right": right, "wrong": wrong}, planted, n_tokens=2000)
    assert set(found.figure) == {n for n, one in DEFINITIONS.items() if one.part in ("planted", "geometry")}
    frame: Any = found.to_frame().set_index(["run", "figure"])["value"]
    for name in ("planted_f1", "planted_mmcs", "planted_precision", "planted_recall"):
        assert frame["right", name] > 0.99 > 0.7 > frame["wrong", name], name
    assert set(PARTS) >= {DEFINITIONS[name].part for name in found.figure}


# -- labels ---------------------------------------------------------------------------------------------------------


def labelled(rows: int = 60, width: int = 20, seed: int = 0) -> LabelledTokens:
    """Random tokens; "role" is the token mod 5, "gender" is whether the token before was even: context decides it."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (rows, width), generator=draw)
    before = torch.cat([torch.full((rows, 1), -1), (ids[:, :-1] % 2)], 1)
    return LabelledTokens(ids, {"role": ids % 5, "gender": before})


def scores(table: torch.Tensor, text: LabelledTokens) -> LabelScores:
    return label_scores(manager("Llama"), TableSAE(table), text, EMBEDDED)


def test_a_planted_label_is_found_with_the_f1_of_a_count_by_hand_on_the_other_rows() -> None:
    ids, text = torch.arange(VOCAB), labelled()
    table = torch.zeros(VOCAB, 3)
    table[ids % 5 == 2, 0] = 1.0
    table[(ids % 5 == 3) & (ids % 3 > 0), 1] = 1.0  # two thirds of role 3, and nothing else
    table[ids % 5 == 4, 2] = 1.0
    table[ids % 5 == 1, 2] = 0.2  # weak on role 1, which the level tells apart
    found = scores(table, text)
    at = {name: i for i, name in enumerate(found.names)}
    role = [name for name in found.names if name.startswith("role") and "," not in name]
    assert len(role) == 5 and found.n_rows == 30
    ours = text.ids[1::2].flatten()
    named = {name: label_values("role").index(name.split()[1]) for name in role}
    by_value = {value: at[name] for name, value in named.items()}
    assert float(found.f1[by_value[2]]) == 1 and int(found.latent[by_value[2]]) == 0
    assert float(found.f1[by_value[4]]) == 1 and float(found.level[by_value[4]]) in (0.25, 0.5)
    hits = int(((ours % 5 == 3) & (ours % 3 > 0)).sum())
    assert float(found.f1[by_value[3]]) == pytest.approx(2 * hits / (hits + int((ours % 5 == 3).sum())))
    assert float(found.precision[by_value[3]]) == 1 and float(found.low[by_value[3]]) < float(found.f1[by_value[3]])
    assert bool(found.found[by_value[2]]) and not bool(found.found[by_value[0]])
    # Tokens tell the role and not the gender; nobody finds what depends on the token before.
    gender = [i for name, i in at.items() if name.startswith("gender")]
    assert float(found.tokens[by_value[2]]) == 1 and not bool(found.in_context.any())
    assert len(gender) == 2 and not bool(found.found[gender].any()) and bool((found.tokens[gender] < 0.8).all())
    said = found.figures()
    wanted = {name for name, one in DEFINITIONS.items() if one.part == "labels"}
    assert set(said) == {name for name in wanted if not name.startswith("labels_found_by_any")}
    assert said["labelled_latents"] == 2 and said["labels_found_shuffled"] == 0
    assert said["labels_found"] >= 2 and f"{said['labels_found']:.0f} of" in found.summary()
    low, high = found.found_interval
    assert low <= said["labels_found"] <= high
    assert len(found.to_frame()) == len(found.names) and found.plot().data


def test_latents_without_a_meaning_find_nothing_and_are_too_good_on_the_rows_they_were_chosen_by() -> None:
    draw = torch.Generator().manual_seed(1)
    table = (torch.rand(VOCAB, 200, generator=draw) < 0.1).float()
    text = labelled(rows=24)
    shuffled = LabelledTokens(text.ids, {"role": torch.randint(0, 5, text.ids.shape, generator=draw)})
    found = scores(table, shuffled)
    assert found.figures()["labels_found"] == 0 and bool((found.shuffled < 0.5).all())
    assert float((found.chosen_f1 - found.f1).mean()) > 0.02
    # Labels of other rows do no worse here: there was nothing to find.
    assert abs(float((found.f1 - found.shuffled).mean())) < 0.1


@pytest.mark.usefixtures("unchecked")
def test_too_few_rows_or_tokens_to_match_are_refused() -> None:
    table = torch.ones(VOCAB, 2)
    with pytest.raises(interp.DataError, match="four rows"):
        scores(table, labelled(rows=3))
    with pytest.raises(interp.DataError, match="30 tokens in each half"):
        scores(table, labelled(rows=4, width=8))
