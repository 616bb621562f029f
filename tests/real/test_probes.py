"""Probes on a real model of stories: whom the next pronoun means is in the stream before it is written."""

import json
import re
from functools import cache
from pathlib import Path

import pytest

import interp
from interp.core.errors import DataError
from interp.data.contrast import Contrast
from interp.probing import ProbeOptions, SparseOptions, fit_probe, sparse_probe

pytestmark = pytest.mark.usefixtures("unchecked")


@cache
def stories(folder: Path) -> interp.HookManager:
    return interp.HookManager.load(str(folder / "models" / "stories260K"))


@cache
def whom(folder: Path, n: int = 150) -> Contrast:
    """Beginnings of stories that end before a sentence with She (positive) or He; a story is a group."""
    sides: dict[str, list[tuple[str, int]]] = {"She": [], "He": []}
    with (folder / "text" / "tinystories" / "tinystories_5k.jsonl").open(encoding="utf-8") as file:
        for number, line in enumerate(file):
            text = json.loads(line)["text"]
            found = re.search(r"(?<=[.!?]) (She|He) ", text)
            if found and found.start() < 400 and len(sides[found[1]]) < n:
                sides[found[1]].append((text[: found.start()], number))
    she, he = sides["She"], sides["He"]
    groups = (tuple(i for _, i in she), tuple(i for _, i in he))
    return Contrast.make([t for t, _ in she], [t for t, _ in he], paired=False, groups=groups, name="she")


def test_whom_the_next_sentence_is_about_is_read_before_it_begins(real: Path) -> None:
    hm = stories(real)
    found = fit_probe(hm, whom(real), ["0.resid_pre", "*.resid_post"], options=ProbeOptions(n_bootstrap=200))
    # All texts end in a stop, which tells nothing; what the blocks bring there does.
    assert found.get("auroc", site="0.resid_pre").mean < 0.65
    assert found.get("auroc").low > 0.7 and found.best != "0.resid_pre"
    assert found.get("selectivity").low > 0.05
    assert abs(found.get("auroc", task="shuffled").mean - 0.5) < 0.17
    assert any("each text" in note for note in found.notes)


def test_few_neurons_tell_some_of_it(real: Path) -> None:
    hm = stories(real)
    found = sparse_probe(hm, whom(real), "*.post", k=(1, 8), options=SparseOptions(n_bootstrap=200, search="adaptive"))
    assert found.get("auroc", 8).mean > found.get("auroc", 8, task="shuffled").mean
    assert found.get("auroc", 8).low > 0.5


def test_too_few_stories_are_refused(real: Path) -> None:
    held = whom(real)
    few = Contrast.make(held.positive[:1], held.negative[:1], paired=False)
    with pytest.raises(DataError, match="groups"):
        fit_probe(stories(real), few, "0.resid_post")
