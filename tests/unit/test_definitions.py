"""Every figure has one definition; the table's noise and joins; the page's text is inert."""

import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import interp
from interp.core.result import Provenance
from interp.evaluate.definitions import DEFINITIONS, PARTS
from interp.evaluate.evaluations import UNKNOWN_NOISE, Evaluations, Rows, joined
from interp.evaluate.matching import best_matches, best_units
from interp.evaluate.noise import reseed_noise
from interp.report.evaluation_page import evaluation_page

HOSTILE = "</title><script>alert(1)</script>\" onmouseover='alert(1)' {{ 7*7 }}"
FVU = {"a0": 0.10, "a1": 0.14, "a2": 0.12, "b0": 0.30}


def table(names: dict[str, float], *, extra: str = "") -> Evaluations:
    """Runs called by setting and seed, each with an FVU, an L0 and one figure between seeds."""
    rows = Rows()
    for run, value in names.items():
        ends = {"fvu": (value - 0.01, value + 0.02)}
        rows.add(run + extra, {"l0": 4.0, "fvu": value}, intervals=ends, n_tokens=100, unit="row")
        rows.add(run + extra, {"mmcs_seeds": value})
        rows.firing[run + extra], rows.fired_on[run + extra] = torch.tensor([0, 1, 50]), 100
        rows.nearest[run + extra] = torch.tensor([0.1, math.nan, 0.9])
        rows.labels[run + extra] = {
            **{key: [0.9, 0.5] for key in ("f1", "precision", "recall")},
            **{key: [0.8, math.nan] for key in ("low", "high")},
            **{key: [0.1, 0.2] for key in ("shuffled", "random", "pca", "tokens")},
            **{"label": ["role place", HOSTILE], "count": [5, 6], "latent": [1, 2], "found": [True, False]},
        }
    runs = [run + extra for run in names]
    settings = [f"setting {run[0]}{extra}" for run in names]
    known = Provenance(model=f"model{extra}", settings={"text": extra})
    return rows.result(runs, settings, [int(run[1]) for run in names], ["2.resid_post"] * len(runs), known)


def test_every_definition_is_one_sentence_of_a_known_part_under_a_title_of_its_own() -> None:
    for name, one in DEFINITIONS.items():
        assert one.figure == name and one.part in PARTS
        assert one.better in ("lower", "higher", "")
        assert one.meaning.endswith(".") and one.meaning[0].isprintable() and "\n" not in one.meaning
        assert one.meaning.removesuffix(" It is of the weights alone.").count(". ") == 0, name
    for part in PARTS:
        titles = [one.title for one in DEFINITIONS.values() if one.part == part]
        assert titles and len(set(titles)) == len(titles)


def test_a_figure_without_a_definition_cannot_be_written() -> None:
    rows = Rows()
    rows.add("a", {"no_such_figure": 1.0})
    with pytest.raises(KeyError, match="no_such_figure"):
        rows.result(["a"], ["a"], [-1], ["here"], Provenance(model=""))


def test_the_table_says_what_reseeding_says_and_nothing_where_there_is_one_seed() -> None:
    found = table(FVU)
    frame: Any = found.to_frame().set_index(["run", "figure"])
    known = reseed_noise([FVU[name] for name in ("a0", "a1", "a2")])
    mine = frame.loc[("a1", "fvu")]
    assert mine["seed_mean"] == float(known.mean[0]) and mine["seed_sd"] == float(known.sd[0])
    assert mine["smallest_difference"] == known.smallest_difference and mine["n_seeds"] == 3 and mine["seed"] == 1
    assert (mine["low"], mine["high"], mine["unit"], mine["n_tokens"]) == (0.13, 0.16, "row", 100)
    assert mine["definition"] == DEFINITIONS["fvu"].meaning
    assert math.isnan(frame.loc[("b0", "fvu")]["seed_sd"]) and frame.loc[("b0", "fvu")]["n_seeds"] == 1
    # Equal figures have no noise at all; figures that compare seeds have none of their own; weights have no tokens.
    assert frame.loc[("a0", "l0")]["seed_sd"] == 0
    assert math.isnan(frame.loc[("a0", "mmcs_seeds")]["seed_sd"]) and frame.loc[("a0", "mmcs_seeds")]["n_tokens"] == 0
    assert "fewer: setting a (3), setting b (1)" in found.notes[0] and len(found.notes) == 1
    assert not table({f"a{i}": i / 7 for i in range(5)}).notes
    assert "sd 0.02" in found.summary() and "3 seeds" in found.summary()
    alone = table({"a0": 0.1, "b0": 0.2})
    assert alone.notes == [UNKNOWN_NOISE] and "--sweep.seed 0 1 2 3 4" in alone.summary() and not alone.noise()


def test_evaluations_join_and_keep_themselves_on_disk(tmp_path: Path) -> None:
    one, other = table({"a0": 0.1, "b0": 0.2}), table({"a0": 0.4, "a1": 0.5}, extra="'")
    both = joined([one, other], ["a0'", "a0", "a1'", "b0"])
    assert both.runs == ["a0'", "a0", "a1'", "b0"] and both.provenance.model == "model, model'" and len(both.notes) == 1
    assert list(dict.fromkeys(both.run)) == both.runs and "5 seeds or more" in both.notes[0]
    frame: Any = both.to_frame().set_index(["run", "figure"])
    assert frame.loc[("a0'", "fvu")]["value"] == 0.4 and frame.loc[("b0", "fvu")]["value"] == 0.2
    assert joined([one], one.runs) is one
    again = interp.Result.load(both.save(tmp_path / "saved"))
    assert isinstance(again, Evaluations) and again.to_frame().equals(both.to_frame())
    assert again.records() == both.records() and again.labels_frame().equals(both.labels_frame())


class _Page(HTMLParser):
    """Tags with their attributes, and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_defines_what_it_shows_and_no_text_in_it_is_code(tmp_path: Path) -> None:
    found = table(FVU, extra=HOSTILE)
    text = evaluation_page(found)
    page = _Page(text)
    tags = [tag for tag, _ in page.tags]
    assert "script" not in tags and not {"img", "link", "iframe", "a"} & set(tags)
    assert not [attrs for _, attrs in page.tags if any(name.startswith("on") for name in attrs)]
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a) or ""
    assert policy.startswith("default-src 'none'; style-src 'sha256-") and "script-src" not in policy
    said = " ".join(page.words)
    for name in ("l0", "fvu", "mmcs_seeds"):
        assert DEFINITIONS[name].meaning in said and DEFINITIONS[name].title in said
    assert HOSTILE in said and "SCR and TPP are left out" in said and "49" not in said.split("{{")[0][-3:]
    # A dot for each dictionary and figure, with its numbers on hover; a mean where there are seeds.
    assert tags.count("circle") == 3 * len(FVU)
    assert len([a for t, a in page.tags if t == "line" and a.get("class") == "mean"]) == 3
    assert found.to_html(tmp_path / "page.html").read_text(encoding="utf-8") == text == evaluation_page(found)


def test_the_best_unit_of_a_value_is_the_one_that_counting_by_hand_gives() -> None:
    draw = torch.Generator().manual_seed(0)
    fires = torch.rand(300, 7, generator=draw) < 0.2
    codes = torch.randint(-1, 4, (300,), generator=draw)
    fires[:, 3] = codes == 2
    token, unit = fires.nonzero().T
    f1, which = best_units(token, unit, codes, n=7)
    for value in range(4):
        has = codes == value
        by_hand = [2 * int((fires[:, u] & has).sum()) / int(fires[:, u].sum() + has.sum()) for u in range(7)]
        assert float(f1[value]) == pytest.approx(max(by_hand)) and int(which[value]) == by_hand.index(max(by_hand))
    assert float(f1[2]) == 1 and int(which[2]) == 3
    found = best_matches(token, unit, {"role": codes}, n=7)
    assert int(found.value[3]) == 2 and float(found.f1[3]) == 1
