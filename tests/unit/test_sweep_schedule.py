"""The schedule of a sweep: what runs together, how much fits, and what is left of the work."""

import itertools
from typing import Any

import pytest
import torch

from interp.core.errors import ConfigError
from interp.core.frame import Frame
from interp.core.place import Place
from interp.core.site import Site
from interp.core.sweep_cells import CellEdit, Cells
from interp.core.sweep_schedule import Sizes, Wave, block_weights, check_budget, waves
from interp.core.where import Where

SIZES = Sizes(batch=2, length=10, d_model=8, n_heads=2, n_kv_heads=1, d_head=4, d_mlp=32, n_logits=3, itemsize=4)


def test_waves_hold_every_cell_once_by_start_and_layer_and_no_more_than_fit() -> None:
    cells = list(itertools.product(range(4), range(-1, 3), range(3)))
    starts, layers = (torch.tensor([c[i] for c in cells]) for i in (0, 1))
    mixed = torch.randperm(len(cells), generator=torch.Generator().manual_seed(0))
    found = waves(starts[mixed], layers[mixed], mixed, lambda start: 5 + start)
    assert sorted(torch.cat([w.cells for w in found]).tolist()) == list(range(len(cells)))
    assert [w.start for w in found] == sorted(w.start for w in found)
    for wave in found:
        assert len(wave.cells) <= 5 + wave.start and bool((starts[wave.cells] == wave.start).all())
        assert torch.equal(layers[wave.cells], wave.layers) and wave.layers.tolist() == sorted(wave.layers.tolist())
    again = waves(starts, layers, torch.arange(len(cells)), lambda start: 5 + start)
    assert [w.cells.tolist() for w in again] == [w.cells.tolist() for w in found], "the order is that of the cells"


def test_a_wave_splits_into_halves_that_are_all_of_it() -> None:
    wave = Wave(3, torch.arange(5), torch.tensor([0, 0, 1, 2, 2]))
    one, two = wave.halves()
    assert one.cells.tolist() + two.cells.tolist() == list(range(5)) and one.start == two.start == 3
    assert (wave.first, two.first) == (0, 1) and wave.block_rows(3) == 3 + 3 + 2 + 1 + 1


def test_bytes_grow_with_the_columns_that_run_and_a_budget_holds_at_least_one() -> None:
    assert SIZES.branch_bytes(0) == 2 * 4 * (10 * (64 + 32 + 128 + 20) + 4 * 10 * 8)
    each = [SIZES.branch_bytes(p) for p in range(10)]
    assert each == sorted(each, reverse=True) and len(set(each)) == 10
    assert SIZES.most(0, 1) == 1 and SIZES.most(4, 7 * each[4]) == 7 and SIZES.most(4, 7 * each[4] - 1) == 6
    vocabulary = Sizes(**{**vars(SIZES), "n_logits": 50_000})
    assert vocabulary.branch_bytes(9) == 2 * 4 * 50_000 * 4


def test_weights_that_a_branch_passes_from_each_block_on() -> None:
    assert block_weights([5, 3, 2]).tolist() == [10, 5, 2]


@pytest.mark.usefixtures("unchecked")
def test_a_budget_is_a_number_of_bytes() -> None:
    wrongs: list[Any] = [0, -3, 1.5, True]
    for wrong in wrongs:
        with pytest.raises(ConfigError, match="whole number of bytes"):
            check_budget(wrong)
    check_budget(None)
    check_budget(1)


def test_an_edit_touches_its_own_branches_columns_heads_and_units_alone() -> None:
    columns = torch.zeros(3, 2, 6, dtype=torch.bool)
    columns[0, 0, 4], columns[1, 1, 5], columns[2, :, 4] = True, True, True
    cells = Cells(
        "0.z", columns, lambda x, pick, first: x + 1, heads=torch.tensor([0, 1, 0]), units=torch.tensor([2, 0, 1])
    )
    x = torch.zeros(4 * 2, 3, 2, 3)  # four branches of two rows, columns 3 to 5
    edit = CellEdit("0.z", cells, pick=torch.tensor([2, 1]), low=1, batch=2, first=3)
    frame = Frame(ids=None, mask=None, batch=8, length=3, prompt_length=3)
    out = edit.edit(x, Place(Site("0.z"), frame, Where()))
    expected = torch.zeros(4, 2, 3, 2, 3)
    expected[1, :, 1, 0, 1] = 1.0
    expected[2, 1, 2, 1, 0] = 1.0
    assert torch.equal(out, expected.flatten(0, 1)) and not bool(x.any())


def test_columns_where_nothing_changes_are_left_out_head_by_head_and_key_by_key() -> None:
    base = torch.zeros(2, 4, 2, 3)
    value = base.clone()
    value[0, 2, 1, 0] = 1.0
    whole = torch.ones(2, 2, 4, dtype=torch.bool)
    found = Cells.replacing("0.z", value, whole, base=base, heads=torch.tensor([0, 1]))
    assert found.columns.nonzero().tolist() == [[1, 0, 2]]
    units = Cells.replacing("0.z", value, whole, base=base, units=torch.tensor([0, 1]))
    assert units.columns.nonzero().tolist() == [[0, 0, 2]]
    pattern, other = torch.zeros(2, 2, 4, 4), torch.zeros(2, 2, 4, 4)
    other[1, 1, 3, 2] = 1.0
    src = torch.zeros(2, 2, 4, dtype=torch.bool)
    src[0, :, 2], src[1, :, 1] = True, True
    keys = Cells.replacing("0.pattern", other, whole, base=pattern, src=src)
    assert keys.columns.nonzero().tolist() == [[0, 1, 3]]
