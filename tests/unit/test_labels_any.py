"""Which labels any of several dictionaries finds: the choice is made on the rows to choose by, for controls too."""

from typing import Any

import pytest
import torch
from torch import Tensor

import interp
from interp.core.result import Provenance
from interp.evaluate.labels import LabelScores
from interp.evaluate.labels_any import LabelsOfAny, labels_found_by_any

ROWS, HAS = 20, 10


def scores(
    chosen: list[float],
    hits: list[list[int]],
    *,
    shuffles: Any = None,
    control: tuple[list[float], list[float]],
    n: int,
) -> LabelScores:
    """A dictionary that fires as often as each value is there, with so many hits in each scored row of HAS tokens."""
    values = len(chosen)
    hit = torch.tensor(hits, dtype=torch.int32)
    whole = torch.full((values, ROWS), HAS, dtype=torch.int32)
    f1 = hit.sum(1).double() / (ROWS * HAS)
    moved = torch.zeros(2, 2, values, dtype=torch.float64) if shuffles is None else torch.tensor(shuffles).double()
    one = torch.zeros(values, dtype=torch.float64)
    return LabelScores(
        site="blocks.0.hook_resid_post" if n < 10 else "blocks.1.hook_resid_post",
        n_fit=ROWS * HAS,
        n_tokens=ROWS * HAS,
        n_rows=ROWS,
        names=[f"role {i}" for i in range(values)],
        pair=torch.zeros(values, dtype=torch.bool),
        count=whole.sum(1).long(),
        latent=torch.arange(values) + n,
        level=torch.full((values,), n / 100),
        f1=f1,
        precision=f1,
        recall=f1,
        low=one,
        high=one,
        chosen_f1=torch.tensor(chosen),
        shuffled=moved[:, 1].amax(0),
        random=torch.tensor(control[1]),
        pca=torch.tensor(control[1]),
        tokens=torch.tensor([0.9] + [0.1] * (values - 1)),
        found_interval=(0.0, 0.0),
        by_row=torch.stack([hit, whole, whole]),
        shuffles=moved,
        chosen_random=torch.tensor(control[0]),
        chosen_pca=torch.tensor(control[0]),
        provenance=Provenance(model="m", settings={"rows": [2 * ROWS, HAS]}),
    )


def flat(*shares: float) -> list[list[int]]:
    return [[round(HAS * share)] * ROWS for share in shares]


def two() -> dict[str, LabelScores]:
    """Of four values, "a" is better to choose by at the first two, and worse on the scored rows at the second."""
    a = scores(
        [0.9, 0.9, 0.2, 0.5], flat(0.9, 0.3, 0.1, 0.5), control=([0.7, 0.1, 0.0, 0.0], [0.2, 0.9, 0.0, 0.0]), n=1
    )
    b = scores(
        [0.8, 0.8, 0.9, 0.4], flat(1.0, 1.0, 0.8, 0.9), control=([0.6, 0.5, 0.0, 0.0], [0.9, 0.1, 0.0, 0.0]), n=11
    )
    return {"a": a, "b": b}


def test_the_dictionary_is_chosen_where_its_latent_was_and_scored_on_the_other_rows() -> None:
    found = labels_found_by_any(two())
    assert found.dictionary.tolist() == [0, 0, 1, 0]
    # The best on the scored rows would be 1, 1, 0.8 and 0.9: no look at them is taken.
    assert found.f1.tolist() == pytest.approx([0.9, 0.3, 0.8, 0.5])
    assert found.latent.tolist() == [1, 2, 13, 4] and found.level.tolist() == pytest.approx([0.01, 0.01, 0.11, 0.01])
    assert found.found.tolist() == [True, False, True, False] and found.in_context.tolist() == [
        False,
        False,
        True,
        False,
    ]
    # So are directions: the first of "a" and the second of "b", though the others score better.
    assert found.random.tolist() == pytest.approx([0.2, 0.1, 0.0, 0.0]) and found.pca.equal(found.random)
    said = found.figures()
    assert said["labels_found_by_any"] == 2 and said["labels_found_by_any_in_context"] == 1
    assert said["labels_found_by_any_random"] == 0 and said["labels_found_by_any_tokens"] == 1
    frame = found.to_frame()
    assert frame["label"].tolist() == ["role 0", "role 2", "role 3", "role 1"]
    assert frame["dictionary"].tolist() == ["a", "b", "a", "a"]
    assert found.site == "blocks.0.hook_resid_post, blocks.1.hook_resid_post"
    assert "any of 2: 2 of 4 label values" in found.summary() and "1 of them no set of tokens" in found.summary()


def test_every_repetition_of_other_rows_labels_has_a_choice_of_its_own() -> None:
    none = {"control": ([0.0], [0.0])}
    # [repetition, (to choose by, scored), value]: in the first "b" is chosen, in the second "a".
    a = scores([0.5], flat(0.9), shuffles=[[[0.1], [0.8]], [[0.6], [0.3]]], n=1, **none)
    b = scores([0.4], flat(1.0), shuffles=[[[0.2], [0.1]], [[0.5], [0.7]]], n=2, **none)
    found = labels_found_by_any({"a": a, "b": b})
    assert found.shuffled.tolist() == pytest.approx([0.3]) and bool(found.found)
    # What labels of other rows nearly reach is not found, though 0.9 is enough in itself.
    again = labels_found_by_any({"a": a, "b": scores([0.4], flat(1.0), shuffles=[[[0.2], [0.88]]] * 2, n=2, **none)})
    assert again.shuffled.tolist() == pytest.approx([0.88]) and not bool(again.found)


def test_one_dictionary_and_the_same_twice_find_what_it_finds_and_order_matters_to_nothing() -> None:
    made = two()
    alone, twice = labels_found_by_any({"a": made["a"]}), labels_found_by_any({"a": made["a"], "c": made["a"]})
    for name in ("f1", "random", "shuffled", "latent"):
        assert getattr(alone, name).equal(getattr(made["a"], name).to(getattr(alone, name).dtype)), name
        assert getattr(alone, name).equal(getattr(twice, name)), name
    turned = labels_found_by_any(dict(reversed(made.items())))
    straight = labels_found_by_any(made)
    assert turned.f1.equal(straight.f1) and turned.found_interval == straight.found_interval
    assert straight.figures() == turned.figures()


def test_the_interval_is_of_the_chosen_and_covers_what_rows_change() -> None:
    torn = (torch.arange(ROWS)[None] < 16).int() * HAS  # F1 is 0.8, by whole rows
    sure = torch.full((1, ROWS), HAS, dtype=torch.int32)
    none = ([0.0, 0.0], [0.0, 0.0])
    a = scores([0.9, 0.9], torch.cat([sure, torn]).tolist(), control=none, n=1)
    found = labels_found_by_any({"a": a, "b": scores([0.1, 0.1], flat(0.0, 0.0), control=none, n=2)})
    assert found.found_interval == (1.0, 2.0)
    rows = torn[0].double() / HAS
    half = 1.959964 * float(rows.var() / ROWS) ** 0.5  # firings and tokens are as many in each row: F1 is a mean
    assert float(found.high[1] - found.low[1]) == pytest.approx(2 * half) and float(found.low[0]) == 1


def test_what_was_scored_apart_is_refused(tmp_path: Any) -> None:
    made = two()
    other = scores([0.9], flat(0.9), control=([0.0], [0.0]), n=1)
    with pytest.raises(interp.DataError, match="c was scored on other rows than a: 1 values"):
        labels_found_by_any({**made, "c": other})
    with pytest.raises(interp.ConfigError, match="at least one"):
        labels_found_by_any({})
    found = labels_found_by_any(made)
    again = interp.Result.load(found.save(tmp_path / "saved"))
    assert isinstance(again, LabelsOfAny) and again.to_frame().equals(found.to_frame())


def test_many_dictionaries_without_a_meaning_find_nothing_together() -> None:
    draw = torch.Generator().manual_seed(1)
    none = ([0.0] * 8, [0.0] * 8)

    def blind(n: int) -> LabelScores:
        hits: Tensor = torch.randint(0, HAS + 1, (8, ROWS), generator=draw)
        return scores(torch.rand(8, generator=draw).tolist(), hits.tolist(), control=none, n=n)

    many = {str(n): blind(n) for n in range(50)}
    found = labels_found_by_any(many)
    # What is chosen on other rows has the mean of all; the largest of fifty would be well above it.
    assert abs(float(found.f1.mean()) - 0.5) < 0.06
    best = torch.stack([one.f1 for one in many.values()]).amax(0)
    assert float(best.mean()) > 0.6 and found.figures()["labels_found_by_any"] == 0
