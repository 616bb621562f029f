"""Pairs of the field's tasks under GPT-2's own tokenizer, and tables of pairs that other tools ship."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import transformers as tf

from interp.core.errors import DataError
from interp.data.tasks import words as lists
from interp.data.tasks.bank import Bank
from interp.data.tasks.make import TASKS, make_pairs
from interp.data.tasks.tables import pairs_from_csv
from interp.testbed.model_tasks import model_tasks


@cache
def gpt2(real: Path) -> Any:
    return tf.AutoTokenizer.from_pretrained(str(real / "models" / "tok-gpt2"))


@pytest.mark.parametrize("out", [False, True])
@pytest.mark.parametrize(("task", "way"), [(t, w) for t, spec in TASKS.items() for w in spec.corruptions])
def test_pairs_fit_the_tokenizer_of_gpt2(real: Path, task: str, way: str, out: bool) -> None:
    n = 15 if task == "greater_than" else 30
    pairs = make_pairs(task, n, hm=gpt2(real), held_out=out, corruption=way)
    remarks = pairs.check(gpt2(real))
    # A year such as 1280 is one token, so that its last digits, as an answer, are tokenized alone.
    assert not remarks or (task == "greater_than" and all("tokenized alone" in p.text for p in remarks))
    made = pairs.tokens(gpt2(real))
    assert all(len(ids) == 1 for held in (made.answers, made.foils) for row in held for ids in row)
    assert (made.clean.lengths == made.corrupted.lengths).all()
    for name, span in made.clean.spans.items():
        if name != "kind":
            assert (span.sum(1) == 1).all(), f"{task}: span {name!r} is not one token"


def test_the_traps_of_names_and_years_are_those_that_are_told(real: Path) -> None:
    bank = Bank(gpt2(real))
    kept = bank.whole([*lists.FEMALE, *lists.MALE], "names")
    assert {"Mary", "John", "Carol"} <= set(kept) and len(kept) >= 60
    assert [len(gpt2(real)(name).input_ids) for name in ("Mary", "Carol", "Judy", "Julie")] == [1, 2, 2, 2]
    with pytest.raises(DataError, match="only 0 of 1 names"):
        bank.whole(["Nebuchadnezzar"], "names")
    years = {(e.meta["century"], e.meta["start"]) for e in make_pairs("greater_than", 80, hm=gpt2(real))}
    assert (12, 80) not in years and bank.added("the year 12", ["80", "81"]) == [None, 1]
    assert list(model_tasks(gpt2(real))) == list(TASKS)


def test_the_tables_of_eap_ig_become_pairs(real: Path) -> None:
    folder = real / "tasks" / "eap_ig"

    def years(keep: Any) -> Any:
        return lambda row: [f"{y:02d}" for y in range(100) if keep(y, int(row["label"]))]

    pairs = pairs_from_csv(
        folder / "greater_than_data.csv",
        answers=years(lambda year, start: year > start),
        foils=years(lambda year, start: year <= start),
        meta=["label"],
    )[:20]
    pairs.check(gpt2(real))
    assert all(len(e.answers) + len(e.foils) == 100 for e in pairs)

    def other(row: Any) -> str:
        both = re.findall(r"([A-Z][a-z]+) and ([A-Z][a-z]+)", row["clean"])[0]
        return f" {min(both, key=row['clean'].count)}"

    ioi = pairs_from_csv(folder / "ioi_llama.csv", corrupted="corrupted_hard", answers=other)[:20]
    assert all(e.answers[0] in e.clean.text and e.clean.text.count(e.answers[0]) == 1 for e in ioi)
