"""Subspaces under interchange: against patching by hand, at matching positions, exact at both ends of k."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from interp.core.errors import ConfigError, ShapeError, WhereError
from interp.core.intervention import Replace
from interp.core.manager import HookManager
from interp.core.site import Site
from interp.core.subspace import ReplaceSubspace, aligned, orthonormal, random_basis
from interp.core.text import Tokens, pad_rows
from interp.core.where import Where
from interp.data.pair_tokens import PairTokens, with_spans
from interp.patching.subspaces.interchange import Interchange, Labels
from interp.patching.subspaces.subspace import SubspaceResult, fldd, subspace_patch
from interp.testbed.nano import NanoOptions, nano

ROWS = ([5, 9, 3, 7, 2], [4, 6, 8], [1, 2, 3, 4, 5, 6, 7])
SOURCES = ([8, 1, 4, 4], [9, 9, 2, 6, 1, 3], [7, 2, 5])
PLACES = ([1, 3], [0], [2, 3, 5]), ([0, 2], [4], [0, 1, 2])


def small() -> HookManager:
    """A random model with grouped keys."""
    options = NanoOptions(d_vocab=12, d_model=16, n_heads=4, n_kv_heads=2, init_std=0.4, embed_std=1.0)
    return HookManager.load(nano(options, seed=1))


def side(rows: Any, places: Any, padding: str) -> Tokens:
    """Rows of unequal length with a span "spot" of one to three tokens in each."""
    ids, mask = pad_rows(rows, 0, side=padding)
    spot = torch.zeros_like(mask)
    for row, (tokens_of, chosen) in enumerate(zip(rows, places, strict=True)):
        shift = 0 if padding == "right" else ids.shape[1] - len(tokens_of)
        spot[row, [p + shift for p in chosen]] = True
    return with_spans(Tokens(ids, mask), {"spot": spot})


def ragged(clean: str = "right", corrupted: str = "right") -> PairTokens:
    """Three pairs of unequal lengths, whose spans lie at other places on the other side."""
    sides = side(ROWS, PLACES[0], clean), side(SOURCES, PLACES[1], corrupted)
    return PairTokens(*sides, answers=(((1,),), ((2,),), ((3,),)), foils=(((4,),), ((5,),), ((6,),)))


def by_hand(hm: HookManager, site: str, basis: Tensor, head: int | None = None) -> Tensor:
    """Logit differences with each pair run alone, unpadded, the activation edited by a plain function."""
    found = []
    for row in range(3):
        source = hm.run(torch.tensor([SOURCES[row]]), read=[site])[site][0]

        def edit(x: Tensor, row: int = row, source: Tensor = source) -> Tensor:
            for here, there in zip(PLACES[0][row], PLACES[1][row], strict=True):
                part = x[0, here] if head is None else x[0, here, head]
                value = source[there] if head is None else source[there, head]
                flat = (value - part).flatten()
                part += sum((flat @ q) * q for q in basis).reshape(part.shape)
            return x

        logits = hm.run(torch.tensor([ROWS[row]]), write=[(site, edit)]).logits[0, -1]
        found.append(logits[row + 1] - logits[row + 4])
    return torch.stack(found)


@pytest.mark.parametrize("padding", [("right", "right"), ("left", "right"), ("left", "left")])
@pytest.mark.parametrize("site", ["0.resid_post", "0.mlp_post", "0.z", "1.k"])
def test_a_patch_is_the_one_by_hand_whatever_the_lengths_places_and_padding(
    site: str, padding: tuple[str, str]
) -> None:
    hm = small()
    width = math.prod(hm.atlas.shape(Site(site))[2:])
    basis = random_basis(3, width, seed=2)
    found = subspace_patch(hm, ragged(*padding), site, basis, where="spot", batch_size=2)
    torch.testing.assert_close(found.patched, by_hand(hm, site, basis), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found.patched, found.clean, atol=1e-3)


def test_one_head_can_be_meant() -> None:
    hm, basis = small(), random_basis(2, 4, seed=3)
    found = subspace_patch(hm, ragged(), "0.z", basis, where=Where(name="spot", head=2))
    torch.testing.assert_close(found.patched, by_hand(hm, "0.z", basis, head=2), atol=1e-4, rtol=1e-4)


def test_the_sides_may_name_their_own_places() -> None:
    hm, pairs, basis = small(), ragged(), random_basis(2, 16)
    both = Where(pos=torch.tensor([[1], [0], [3]])), Where(pos=torch.tensor([[2], [4], [-1]]))
    found = subspace_patch(hm, pairs, "0.resid_post", basis, where=both)
    one = hm.run(pairs.corrupted, read=["0.resid_post"])
    edit = ReplaceSubspace("0.resid_post", one, basis, where=both[0], source_where=both[1])
    again = pairs.metric()(hm.run(pairs.clean, write=[edit], logits="last"))
    torch.testing.assert_close(found.patched, again)
    split = pairs.metric()(hm.run(pairs.clean, write=[edit], logits="last", batch_size=2))
    torch.testing.assert_close(split, again, atol=1e-5, rtol=1e-5)


def test_no_dimension_changes_no_bit_and_all_dimensions_are_the_whole_site() -> None:
    hm, pairs = small(), ragged()
    plain, source = hm.run(pairs.clean).logits, torch.randn(16)
    where = Where(name="spot")
    empty = hm.run(pairs.clean, write=[ReplaceSubspace("0.resid_post", source, torch.zeros(0, 16), where=where)])
    assert torch.equal(empty.logits, plain) and not [n for n in empty.notes if "nothing" in n]
    silent = ReplaceSubspace("0.resid_post", source, random_basis(4, 16), where=where, weights=torch.zeros(4))
    with pytest.warns(UserWarning, match="changed nothing"):
        masked = hm.run(pairs.clean, write=[silent])
    assert torch.equal(masked.logits, plain)
    everything = subspace_patch(hm, pairs, "0.resid_post", torch.eye(16), where="spot")
    torch.testing.assert_close(everything.patched, everything.whole, atol=1e-4, rtol=1e-4)
    value = hm.run(pairs.clean, write=[Replace("0.resid_post", source, where=where)]).logits
    full = ReplaceSubspace("0.resid_post", source, random_basis(16, 16), where=where)
    torch.testing.assert_close(hm.run(pairs.clean, write=[full]).logits, value, atol=1e-4, rtol=1e-4)


def test_the_same_subspace_is_the_same_patch_and_a_prompt_into_itself_is_none() -> None:
    hm, pairs, rows = small(), ragged(), torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    mixed = torch.tensor([[2.0, 1, 0], [0, 1, 0], [1, 0, -3]]) @ rows
    a, b = (subspace_patch(hm, pairs, "0.resid_post", d, where="spot") for d in (rows, mixed))
    torch.testing.assert_close(a.patched, b.patched, atol=1e-4, rtol=1e-4)
    same = PairTokens(pairs.clean, pairs.clean, pairs.answers, pairs.foils)
    assert torch.equal(subspace_patch(hm, same, "0.resid_post", rows, where="spot").effect, torch.zeros(3))


def test_gradients_through_the_edit_are_finite_differences() -> None:
    hm = HookManager.load(nano(NanoOptions(d_vocab=12, d_model=8, init_std=0.4, embed_std=1.0)).double())
    ids, source = torch.tensor([[1, 2, 3, 4]]), torch.randn(8, dtype=torch.float64)
    basis = random_basis(2, 8).double().requires_grad_(True)
    weights = torch.tensor([0.3, 0.8], dtype=torch.float64, requires_grad=True)

    def loss(q: Tensor, m: Tensor) -> Tensor:
        edit = ReplaceSubspace("0.resid_post", source, q, where=Where(pos=1), weights=m)
        with hm.hooked(write=[edit]):
            return hm.model(ids).logits[0, -1, :5].softmax(-1)[0]

    found = torch.autograd.grad(loss(basis, weights), [basis, weights])
    step = 1e-5
    for given, gradient in zip((basis, weights), found, strict=True):
        for at in range(given.numel()):
            moved = []
            for sign in (1, -1):
                shift = torch.zeros(given.numel(), dtype=torch.float64).index_fill(0, torch.tensor(at), sign * step)
                changed = [g.detach() + shift.reshape(g.shape) if g is given else g.detach() for g in (basis, weights)]
                with torch.no_grad():
                    moved.append(float(loss(changed[0], changed[1])))
            assert (moved[0] - moved[1]) / (2 * step) == pytest.approx(float(gradient.flatten()[at]), abs=1e-7)


def test_generation_patches_the_prompt_once() -> None:
    hm, pairs = small(), ragged("left", "right")
    edit = ReplaceSubspace(
        "0.resid_post",
        hm.run(pairs.corrupted, read=["0.resid_post"]),
        random_basis(8, 16),
        where=Where(pos=torch.tensor([[1], [0], [3]])),
        source_where=Where(pos=torch.tensor([[2], [4], [-1]])),
    )
    made = [hm.generate(pairs.clean, max_new_tokens=4, write=[edit], use_cache=cache).tokens for cache in (True, False)]
    assert made[0] is not None and made[1] is not None and torch.equal(made[0], made[1])


# -- the parts ----------------------------------------------------------------------------------------------------


def test_aligned_takes_each_rows_values_in_order() -> None:
    values = torch.arange(10.0).reshape(2, 5)
    source = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 1, 1, 1]]).bool()
    target = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 1]]).bool()
    assert aligned(values, source, target).tolist() == [[0, 0, 3, 0], [7, 8, 0, 9]]
    with pytest.raises(WhereError, match="2 and 3 positions in row 0"):
        aligned(values, source, target.flip(0))


def test_orthonormal_rows_span_the_directions_and_keep_a_unit_vector() -> None:
    rows = torch.randn(4, 9, generator=torch.Generator().manual_seed(1))
    q = orthonormal(rows)
    torch.testing.assert_close(q @ q.T, torch.eye(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(rows @ q.T @ q, rows, atol=1e-5, rtol=0)
    torch.testing.assert_close(orthonormal(5 * rows[0])[0], rows[0] / rows[0].norm())
    assert torch.equal(random_basis(3, 9, seed=4), random_basis(3, 9, seed=4))
    assert not torch.equal(random_basis(3, 9, seed=4), random_basis(3, 9, seed=5))
    half = orthonormal(rows.bfloat16())
    assert half.dtype == torch.float32


def test_fldd_is_a_ratio_of_means() -> None:
    clean, patched = torch.tensor([4.0, 2.0, 3.0]), torch.tensor([2.0, -2.0, 3.0])
    assert fldd(patched, clean).mean == pytest.approx(1 - 1 / 3)
    assert fldd(clean, clean).mean == 0 == fldd(clean, clean).high
    assert math.isnan(fldd(patched, torch.tensor([1.0, -1.0, 0.1])).mean)


def test_labels_choose_among_answers_and_count_any_foil() -> None:
    pairs = PairTokens.of_ids(
        torch.tensor([[1], [2]]), torch.tensor([[2], [1]]), torch.tensor([5, 6]), torch.tensor([[6, 7], [5, 8]])
    )
    labels = Labels.of(pairs)
    assert labels.columns.tolist() == [5, 6, 7, 8]
    logits = torch.zeros(2, 12)
    logits[:, 0] = 9.0  # no answer of any pair: it is not among those chosen from
    logits[0, 7] = logits[1, 8] = 1.0
    assert labels.hit(logits, torch.arange(2)).tolist() == [True, True]
    assert labels.hit(logits, torch.tensor([1, 0])).tolist() == [False, False]
    expected = -(logits.softmax(-1)[0, 6] + logits.softmax(-1)[0, 7]).log()
    torch.testing.assert_close(labels.cross_entropy(logits, torch.arange(2))[0], expected)
    torch.testing.assert_close(labels.logit_diff(logits, torch.arange(2)), pairs.metric()(logits[:, None]))
    assert torch.equal(labels.shuffled().wanted, labels.wanted.flip(0))
    assert Labels.of(pairs, torch.tensor([5, 5])).hit(logits, torch.arange(2)).tolist() == [False, False]


def test_a_placebo_moves_as_far_as_it_is_told_in_its_own_subspace() -> None:
    task = Interchange.of(small(), ragged(), "0.resid_post", where="spot")
    torch.testing.assert_close(task.shift, task.corrupted - task.clean)
    assert task.pair_of.tolist() == [0, 0, 1, 2, 2, 2] and task.held(torch.tensor([2, 0])).tolist() == [3, 4, 5, 0, 1]
    basis, size = random_basis(3, 16, seed=6), torch.linspace(0.5, 3, 6)
    moved = task.same_size(basis, size)
    torch.testing.assert_close(moved.norm(dim=-1), size)
    torch.testing.assert_close(moved @ basis.T @ basis, moved, atol=1e-5, rtol=0)
    assert bool(((moved * task.shift).sum(-1) > 0).all())  # towards the source, not away from it
    placed = task.spread(moved, torch.tensor([1, 2]))
    assert torch.equal(placed[0, 0], moved[2]) and torch.equal(placed[1, 5], moved[5]) and placed.any(-1).sum() == 4


def test_results_are_tables_pages_and_files(tmp_path: Any) -> None:
    found = subspace_patch(small(), ragged(), "0.resid_post", torch.randn(16), where="spot")
    again = SubspaceResult.load(found.save(tmp_path / "it"))
    assert torch.equal(again.patched, found.patched) and again.fldd == found.fldd
    assert len(found.to_frame()) == 3 and "whole site: FLDD" in found.summary()
    assert "interchange accuracy" in found.to_html(tmp_path / "it.html").read_text()


@pytest.mark.usefixtures("unchecked")
def test_bad_subspaces_are_refused_with_what_to_do() -> None:
    hm, pairs, ids = small(), ragged(), torch.tensor([[1, 2, 3]])
    with pytest.raises(ShapeError, match=r"not orthonormal.*orthonormal\(directions\)"):
        ReplaceSubspace("0.resid_post", torch.zeros(16), 2 * random_basis(2, 16))
    with pytest.raises(ShapeError, match="one per row of the basis"):
        ReplaceSubspace("0.resid_post", torch.zeros(16), random_basis(2, 16), weights=torch.ones(3))
    with pytest.raises(ShapeError, match="give a Run"):
        ReplaceSubspace("0.resid_post", torch.zeros(16), random_basis(2, 16), source_where=Where(pos=1))
    with pytest.raises(ShapeError, match="needs a tensor or a Run"):
        ReplaceSubspace("0.resid_post", [1.0], random_basis(2, 16))
    with pytest.raises(ShapeError, match="width 8"):
        hm.run(ids, write=[ReplaceSubspace("0.resid_post", torch.zeros(16), random_basis(2, 8))])
    with pytest.raises(ShapeError, match="leaves no choice of heads"):
        hm.run(ids, write=[ReplaceSubspace("0.z", torch.zeros(16), random_basis(2, 16), where=Where(head=1))])
    for directions, why in ((torch.zeros(16), "zero"), (torch.ones(2, 16), "depends on"), (torch.ones(3, 2), "fewer")):
        with pytest.raises(ShapeError, match=why):
            orthonormal(directions)
    with pytest.raises(ShapeError, match="is 16 wide"):
        subspace_patch(hm, pairs, "0.resid_post", torch.ones(15), where="spot")
    with pytest.raises(WhereError, match="2 positions of the clean prompt of pair 0 and 1"):
        subspace_patch(hm, pairs, "0.resid_post", torch.ones(16), where=("spot", "end"))
    with pytest.raises(WhereError, match="selects nothing in the clean prompt of pair 1"):
        subspace_patch(hm, pairs, "0.resid_post", torch.ones(16), where=Where(rows=0, pos=0))
    with pytest.raises(ValueError, match="one site with positions"):
        subspace_patch(hm, pairs, "*.resid_post", torch.ones(16), where="spot")
    with pytest.raises(ConfigError, match="batch_size=0"):
        subspace_patch(hm, pairs, "0.resid_post", torch.ones(16), where="spot", batch_size=0)
    with pytest.raises(WhereError, match="one head, or all"):
        Interchange.of(hm, pairs, "0.z", where=Where(name="spot", head=[0, 1]))
