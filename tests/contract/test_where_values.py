"""What a `Where` means under generation, how values line up with it, and random ones against a slow reference."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from interp.core.errors import ShapeError, SiteError, WhereError
from interp.core.intervention import Ablate, Add, FreezePattern, Replace, Rotate, SetProjection
from interp.core.manager import HookManager
from interp.core.site import Site
from interp.core.text import Tokens
from interp.core.where import Where
from tests.contract.test_where import (
    LENGTHS,
    MARK,
    POSITIONS,
    SITE,
    Batch,
    Spec,
    batch,
    cut,
    edited,
    in_parts,
    marked,
    masks,
    on_both,
    on_every_side,
    picked,
    union,
)
from tests.families import make, manager, tokens, word_tokenizer

pytestmark = pytest.mark.contract

ROWS, POS = len(LENGTHS), max(LENGTHS)


def _chatty(template: str) -> HookManager:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    return HookManager.load(make("Llama"), tokenizer)


def test_the_spans_of_a_chat_are_its_roles() -> None:
    hm = _chatty("{% for m in messages %}w1 {{ m.content }} w2 {% endfor %}{% if add_generation_prompt %}w3{% endif %}")
    said = [("user", "w7 w8"), ("assistant", "w9"), ("user", "w7 w7 w5")]
    chat = hm.chat([{"role": role, "content": content} for role, content in said])
    assert chat.ids[0].tolist() == [1, 7, 8, 2, 1, 9, 2, 1, 7, 7, 5, 2, 3]
    given = Batch(chat, [list(range(13))])
    assert edited(hm, given, Where(name="user")) == {(0, c) for c in (1, 2, 8, 9, 10)}
    assert edited(hm, given, Where(name="assistant") | Where(pos=-1)) == {(0, 5), (0, 12)}
    assert edited(hm, given, Where(name="user", tokens=7)) == {(0, c) for c in (1, 8, 9)}
    found, _ = _in_generation(hm, given, Where(name="assistant") | Where.last_prompt(), use_cache=True)
    assert found == {(0, 5), (0, 12)}
    with pytest.raises(WhereError, match="no span named 'system'; its spans are: 'user', 'assistant'"):
        hm.run(chat, write=[Ablate(SITE, where=Where(name="system"))])


NEW = 4


def _in_generation(hm: HookManager, given: Batch, where: Where, use_cache: bool) -> tuple[set[tuple[int, int]], Tensor]:
    """What an edit changes in a generation of `NEW` tokens, and the ids that come out."""
    write = Add(SITE, torch.full((hm.d_model,), MARK), where=where)
    options: dict[str, Any] = {"use_cache": use_cache, "generation_kwargs": {"eos_token_id": -1}}
    out = hm.generate(given.tokens, max_new_tokens=NEW, read=[SITE], write=[write], **options)
    assert out.tokens is not None
    mask = torch.cat([given.tokens.left_padded(0).mask, torch.ones(len(given.real), NEW - 1, dtype=torch.bool)], 1)
    before = hm.run(out.tokens[:, :-1], read=[SITE], mask=mask)[SITE]
    real = mask[..., None]
    return marked(before * real, out[SITE] * real), out.tokens


def _generation_cases(given: Batch) -> list[list[Spec]]:
    mask = masks(given)
    fixed: list[Any] = [0, -1, [0, -2], 7, 9, [3, 8, 10], POSITIONS[-1], range(4, 9)]
    cut_off = [
        slice(None),
        slice(2, None),
        slice(-2, None),
        slice(None, -1),
        slice(-3, -1),
        slice(1, 7),
        slice(1, 99, 2),
    ]
    return [
        *([{"pos": pos}] for pos in [*fixed, *cut_off]),
        [{"pos": slice(-1, 9), "rows": [1, 2]}],
        [{"mask": mask}],
        [{"mask": mask, "pos": slice(1, -1)}],
        [{"name": "user"}, {"phase": "generated", "rows": 1}],
        [{"phase": "prompt"}],
        [{"phase": "last_prompt"}],
        [{"phase": "generated"}],
        [{"phase": "last_prompt"}, {"phase": "generated"}],
        [{"pos": 1}, {"pos": slice(-1, None), "rows": 0}],
    ]


def _check_generation(name: str, given: Batch, cases: list[list[Spec]]) -> None:
    new = list(range(max(LENGTHS), max(LENGTHS) + NEW - 1))
    for specs in cases:
        cached, ids = _in_generation(manager(name), given, union(specs), use_cache=True)
        assert cached == picked(specs, given, new, ids), specs
        uncached, again = _in_generation(manager(name), given, union(specs), use_cache=False)
        assert uncached == cached, specs
        assert torch.equal(ids, again), specs


@on_both
@pytest.mark.parametrize("side", ["none", "left"])
def test_a_generation_is_edited_at_the_same_tokens_with_and_without_a_cache(name: str, side: str) -> None:
    _check_generation(name, batch(side), _generation_cases(batch(side)))


@on_both
@pytest.mark.parametrize("side", ["none", "left"])
def test_a_generation_is_edited_at_token_ids_that_it_made_itself(name: str, side: str) -> None:
    generated: Spec = {"tokens": list(range(70)), "phase": "generated"}
    _check_generation(name, batch(side), [[{"tokens": list(range(40))}], [generated], [generated, {"pos": 0}]])


def test_named_spans_move_with_their_rows_when_generation_pads_on_the_left() -> None:
    hm = manager("Llama")
    specs: list[Spec] = [{"name": "user"}, {"pos": -1}]
    found, ids = _in_generation(hm, batch("right"), union(specs), use_cache=True)
    assert found == picked(specs, batch("left"))
    assert torch.equal(ids, _in_generation(hm, batch("left"), union(specs), use_cache=True)[1])


def test_a_mask_moves_with_its_rows_when_generation_pads_on_the_left_or_is_refused() -> None:
    given = batch("right")
    mask = torch.zeros_like(given.tokens.mask)
    mask[:, 1] = True
    try:
        found, _ = _in_generation(manager("Llama"), given, Where(mask=mask), use_cache=True)
    except WhereError:
        return
    assert found == picked([{"pos": 1}], batch("left"))


Lookup = Callable[[int, int, int], Tensor]
"""What a value holds for a row, a column, and the column's rank among the row's selected ones."""


def _forms(features: tuple[int, ...], counts: set[int]) -> Iterator[tuple[Tensor, Lookup]]:
    """A value of every accepted shape, and how to look it up."""
    for lead in (
        (),
        (ROWS,),
        (1,),
        (ROWS, POS),
        (1, POS),
        (ROWS, 1),
        *([(ROWS, n) for n in counts if len(counts) == 1]),
    ):
        value = torch.randn(*lead, *features)
        if not lead:
            yield value, lambda r, c, k, v=value: v  # type: ignore[misc]
        elif len(lead) == 1:
            yield value, lambda r, c, k, v=value: v[min(r, len(v) - 1)]  # type: ignore[misc]
        elif lead[1] == POS:
            yield value, lambda r, c, k, v=value: v[min(r, len(v) - 1), c]  # type: ignore[misc]
        else:
            yield value, lambda r, c, k, v=value: v[r, min(k, v.shape[1] - 1)]  # type: ignore[misc]


def _put(before: Tensor, chosen: set[tuple[int, int]], find: Lookup, head: int | None) -> Tensor:
    want = before.clone()
    for row, column in chosen:
        rank = sorted(c for r, c in chosen if r == row).index(column)
        want[(row, column) if head is None else (row, column, head)] = find(row, column, rank)
    return want


SELECTIONS: list[Spec] = [
    {},
    *({"pos": pos} for pos in (-2, [0, -1], slice(1, 4), POSITIONS[-1])),
    *({"rows": [0, 2]}, {"pos": [1, -1], "rows": 1}, {"tokens": list(range(60))}),
]


@on_both
@on_every_side
@in_parts
@pytest.mark.parametrize(("site", "head"), [(SITE, None), ("0.z", None), ("0.z", 1), ("1.v", -1)])
def test_values_of_every_shape_line_up(name: str, side: str, size: int | None, site: str, head: int | None) -> None:
    hm, sample = manager(name), batch(side)
    before = hm.run(sample.tokens, read=[site])[site]
    features = tuple(before.shape[2:] if head is None else before.shape[3:])
    for spec in SELECTIONS:
        chosen = picked([spec], sample)
        counts = {sum(r == row for r, _ in chosen) for row in range(ROWS)}
        for value, find in _forms(features, counts):
            if head is not None and value.ndim > 1 and value.shape[-2] in (1, before.shape[2]):
                continue  # reads in two ways: they have tests of their own
            write = Replace(site, value, where=Where(**spec, head=head))
            got = hm.run(sample.tokens, read=[site], write=[write], batch_size=size)[site]
            assert torch.equal(got, _put(before, chosen, find, head)), (spec, value.shape)


@in_parts
@pytest.mark.parametrize(
    ("site", "shape", "where"),
    [
        *((SITE, shape, Where()) for shape in [(31,), (2, 32), (4, 32), (8, 32), (2, 8, 32), (4, 8, 32), (3, 7, 32)]),
        *((SITE, shape, Where()) for shape in [(3, 9, 32), (3, 8, 31), (3, 8, 1, 32)]),
        *((SITE, (3, n, 32), Where(pos=[0, 2])) for n in (3, 7)),
        (SITE, (3, 3, 32), Where(mask=masks(batch("none")))),
        *(("0.z", shape, Where(head=1)) for shape in [(7,), (2, 8), (3, 7, 8), (3, 8, 3, 8)]),
        *(("0.z", shape, Where(head=[0, 1])) for shape in [(7,), (2, 8), (3, 2, 8)]),
        *(("0.pattern", shape, Where()) for shape in [(7, 8), (8, 7), (3, 8, 8), (2, 4, 8, 8), (1, 3, 4, 8, 8)]),
        *(("0.pattern", shape, Where(head=1)) for shape in [(2, 8, 8), (4, 8, 9)]),
    ],
)
def test_values_that_do_not_fit_are_refused(site: str, shape: tuple[int, ...], where: Where, size: int | None) -> None:
    write = Replace(site, torch.rand(shape), where=where)
    with pytest.raises(ShapeError, match=rf"{site}: got (shape )?\({', '.join(map(str, shape))}"):
        manager("GPT2").run(batch("none").tokens, write=[write], batch_size=size)


@pytest.mark.parametrize(("shape", "where"), [((4, 8), Where(head=1)), ((4, 4, 8), Where(head=1, pos=slice(0, 4)))])
def test_values_that_read_in_two_ways_are_refused(shape: tuple[int, ...], where: Where) -> None:
    with pytest.raises(ShapeError, match="reads in two ways"):
        manager("GPT2").run(tokens(4, 6), write=[Replace("0.z", torch.randn(shape), where=where)])


@pytest.mark.parametrize(("rows", "shape"), [(1, (1, 8)), (2, (2, 1, 8))])
def test_values_that_read_the_same_in_two_ways_are_taken(rows: int, shape: tuple[int, ...]) -> None:
    hm, value = manager("GPT2"), torch.randn(shape)
    write = Replace("0.z", value, where=Where(head=1, pos=-1))
    got = hm.run(tokens(rows, 6), read=["0.z"], write=[write])["0.z"]
    assert torch.equal(got[:, -1, 1], value.reshape(rows, 8))


def test_a_pattern_value_that_reads_in_two_ways_is_refused() -> None:
    with pytest.raises(ShapeError, match="two ways"):
        manager("GPT2").run(tokens(4, 6), write=[Replace("0.pattern", torch.rand(4, 6, 6), where=Where(head=1))])


@on_both
@on_every_side
@in_parts
def test_values_of_patterns_line_up(name: str, side: str, size: int | None) -> None:
    hm, sample, site = manager(name), batch(side), "1.pattern"
    before = hm.run(sample.tokens, read=[site])[site]
    for spec in ({}, {"pos": [1, -1]}, {"rows": [0, 2], "pos": slice(0, 3)}):
        for lead, head in [((), None), ((4,), None), ((1, 4), None), ((ROWS, 4), None), ((ROWS, 1), None)] + [
            (lead, 2) for lead in ((), (ROWS,), (ROWS, 1), (ROWS, 4))
        ]:
            value = torch.rand(*lead, POS, POS)
            write = FreezePattern(site, value, where=Where(**spec, head=head))
            got = hm.run(sample.tokens, read=[site], write=[write], batch_size=size)[site]
            per_row = value[:, None] if head is not None and lead == (ROWS,) else value
            full, want = per_row.expand(ROWS, 4, POS, POS), before.clone()
            for row, query in picked([spec], sample):
                for each in range(4) if head is None else [head]:
                    want[row, each, query] = full[row, each, query]
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@on_both
@on_every_side
@in_parts
def test_a_coefficient_per_row_goes_to_its_row(name: str, side: str, size: int | None) -> None:
    hm, sample = manager(name), batch(side)
    before, each = hm.run(sample.tokens, read=[SITE])[SITE], torch.tensor([1.0, -2.0, 0.5])
    vector, plane = torch.randn(hm.d_model), torch.linalg.qr(torch.randn(hm.d_model, 2))[0].T
    unit, real = plane[0], sample.tokens.mask

    def run(write: Any) -> Tensor:
        return hm.run(sample.tokens, read=[SITE], write=[write], batch_size=size)[SITE]

    added = run(Add(SITE, vector, scale=each))
    torch.testing.assert_close(added - before, real[..., None] * each[:, None, None] * vector, atol=1e-5, rtol=1e-5)
    placed = run(SetProjection(SITE, 3 * unit, value=each, where=Where(pos=[0, -1])))
    for row, column in picked([{"pos": [0, -1]}], sample):
        assert float(placed[row, column] @ unit) == pytest.approx(float(each[row]), abs=1e-4)
    turned = torch.view_as_complex(run(Rotate(SITE, plane, angle=each)) @ plane.T)
    angle = torch.polar(torch.ones(3), each)[:, None]
    torch.testing.assert_close(turned[real], (torch.view_as_complex(before @ plane.T) * angle)[real])
    torch.testing.assert_close(run(Add(SITE, vector, scale=torch.tensor(2.0)))[real], (before + 2 * vector)[real])
    with pytest.raises(ShapeError, match="2 values; the batch has 3 rows"):
        run(Add(SITE, vector, scale=each[:2]))


@on_both
@on_every_side
@in_parts
def test_a_run_stands_for_the_value_at_every_site_of_a_glob(name: str, side: str, size: int | None) -> None:
    hm, sample = manager(name), batch(side)
    other = Tokens((sample.tokens.ids + 7) % 119 * sample.tokens.mask, sample.tokens.mask)
    clean = hm.run(sample.tokens, read=["*.resid_post", "*.pattern"])
    spec: Spec = {"pos": [0, -2], "rows": [0, 2]}
    read, write = ["*.resid_post", "*.pattern"], [Replace("*.resid_post", clean, where=Where(**spec))]
    got = hm.run(other, read=read, write=write, batch_size=size)
    chosen = picked([spec], sample)
    before = hm.run(other, read=["0.resid_post"])["0.resid_post"]
    want = _put(before, chosen, lambda r, c, _: clean["0.resid_post"][r, c], None)
    assert torch.equal(got["0.resid_post"], want)
    for layer in range(hm.n_layers):
        for row, column in chosen:
            assert torch.equal(got["resid_post", layer][row, column], clean["resid_post", layer][row, column])
    frozen = hm.run(other, read=read, write=[FreezePattern(value=clean, where=Where(pos=-1))], batch_size=size)
    for layer in range(hm.n_layers):
        for row, column in picked([{"pos": -1}], sample):
            assert torch.equal(frozen["pattern", layer][row, :, column], clean["pattern", layer][row, :, column])
            assert not torch.equal(got["pattern", layer][row, :, column], clean["pattern", layer][row, :, column])


def test_a_run_of_other_rows_sites_or_slices_is_refused() -> None:
    hm, ids = manager("GPT2"), tokens(3, 6)
    with pytest.raises(ShapeError, match="got shape"):
        hm.run(ids, write=[Replace(SITE, hm.run(ids[:2], read=[SITE]))])
    with pytest.raises(SiteError, match="was not read"):
        hm.run(ids, write=[Replace("1.z", hm.run(ids, read=[SITE]))])
    two = hm.run(ids, read=[Site(SITE).at(pos=0), Site(SITE).at(pos=1)])
    with pytest.raises(SiteError, match="2 slices; say which"):
        hm.run(ids, write=[Replace(SITE, two)])


@in_parts
def test_a_sliced_run_goes_back_to_the_place_that_it_was_read_at(size: int | None) -> None:
    hm, sample, other = manager("Llama"), batch("left"), tokens(ROWS, POS, seed=5)
    swapped = Tokens(other * sample.tokens.mask, sample.tokens.mask)
    for at in ({"pos": -1}, {"pos": [0, -2]}, {"pos": slice(1, 4)}, {"pos": POSITIONS[-1], "head": 2}):
        clean = hm.run(sample.tokens, read=[Site("1.z").at(**at)])
        got = hm.run(swapped, read=["1.z"], write=[Replace("1.z", clean, where=Where(**at))], batch_size=size)["1.z"]
        assert torch.equal(cut(got, Site("1.z"), at, sample.real), clean["1.z"]), at


def test_a_sliced_run_goes_back_whatever_the_order_of_its_positions() -> None:
    hm, sample = manager("Llama"), batch("left")
    for pos in ([-1, 0], torch.tensor([[2, 0], [1, 3], [-1, -2]])):
        clean = hm.run(sample.tokens, read=[Site("1.z").at(pos=pos)])
        write = [Ablate("1.z"), Replace("1.z", clean, where=Where(pos=pos))]
        got = hm.run(sample.tokens, read=["1.z"], write=write)["1.z"]
        assert torch.equal(cut(got, Site("1.z"), {"pos": pos}, sample.real), clean["1.z"])


def test_a_value_per_selected_position_may_skip_rows_that_select_none() -> None:
    hm, sample, value = manager("GPT2"), batch("right"), torch.randn(ROWS, 2, 32)
    spec: Spec = {"pos": [0, 2], "rows": [0, 2]}
    before = hm.run(sample.tokens, read=[SITE])[SITE]
    for size in (1, None):
        write = Replace(SITE, value, where=Where(**spec))
        got = hm.run(sample.tokens, read=[SITE], write=[write], batch_size=size)[SITE]
        assert torch.equal(got, _put(before, picked([spec], sample), lambda r, c, k: value[r, k], None))


def test_a_mean_is_over_the_selected_real_positions() -> None:
    hm, sample = manager("GPT2"), batch("left")
    before = hm.run(sample.tokens, read=[SITE])[SITE]
    for spec in ({}, {"pos": [0, -1]}, {"rows": [1, 2], "pos": slice(1, None)}):
        got = hm.run(sample.tokens, read=[SITE], write=[Ablate(SITE, "mean", where=Where(**spec))])[SITE]
        chosen = picked([spec], sample)
        mean = torch.stack([before[r, c] for r, c in chosen]).mean(0)
        torch.testing.assert_close(got, _put(before, chosen, lambda r, c, k, v=mean: v, None))  # type: ignore[misc]


# -- values in a generation -----------------------------------------------------------------------------------------


def _generate(value: Any, where: Where, *, use_cache: bool, side: str = "left") -> tuple[Tensor, Tensor]:
    """What a generation with a replaced stream reads there, and its ids."""
    options: dict[str, Any] = {"use_cache": use_cache, "generation_kwargs": {"eos_token_id": -1}}
    write = Replace(SITE, value, where=where)
    out = manager("Llama").generate(batch(side).tokens, max_new_tokens=NEW, read=[SITE], write=[write], **options)
    assert out.tokens is not None
    return out[SITE], out.tokens


def test_values_of_a_generation_go_to_the_same_tokens_with_and_without_a_cache() -> None:
    sample, d = batch("left"), manager("Llama").d_model
    cases: list[tuple[Tensor, Spec, Lookup]] = []
    whole, rows, two = torch.randn(ROWS, POS, d), torch.randn(ROWS, d), torch.randn(ROWS, 2, d)
    cases.append((whole, {"phase": "prompt"}, lambda r, c, k: whole[r, c]))
    cases.append((whole, {"pos": slice(None, -1)}, lambda r, c, k: whole[r, c]))
    cases.append((rows, {"phase": "generated"}, lambda r, c, k: rows[r]))
    cases.append((rows, {}, lambda r, c, k: rows[r]))
    cases.append((two, {"pos": [0, -1]}, lambda r, c, k: two[r, k]))
    for value, spec, find in cases:
        got, ids = _generate(value, Where(**spec), use_cache=True)
        chosen = picked([spec], sample, list(range(POS, POS + NEW - 1)))
        for row, column in chosen:
            rank = sorted(c for r, c in chosen if r == row).index(column)
            assert torch.equal(got[row, column], find(row, column, rank)), (spec, row, column)
        again, same = _generate(value, Where(**spec), use_cache=False)
        assert torch.equal(ids, same)
        torch.testing.assert_close(got[:, -NEW:], again[:, -NEW:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("use_cache", [True, False])
def test_values_for_the_prompt_are_refused_at_what_comes_after_it(use_cache: bool) -> None:
    with pytest.raises(ShapeError, match=r"position 8 is edited too; .*Where\.prompt\(\)"):
        _generate(torch.randn(ROWS, POS, 32), Where(), use_cache=use_cache)
    with pytest.raises(ShapeError, match="got shape"):
        _generate(torch.randn(ROWS, POS + NEW - 1, 32), Where(), use_cache=use_cache)


def test_a_value_moves_with_its_rows_when_generation_pads_on_the_left_or_is_refused() -> None:
    value = manager("Llama").run(batch("right").tokens, read=[SITE])[SITE] + 1
    try:
        got, _ = _generate(value, Where.prompt(), use_cache=True, side="right")
    except ShapeError:
        return
    assert torch.equal(got[:, :POS][batch("left").tokens.mask], value[batch("right").tokens.mask])


# -- random batches and random Where --------------------------------------------------------------------------------


def _positions(rows: int) -> st.SearchStrategy[Any]:
    number, edge = st.integers(-6, 5), st.none() | st.integers(-7, 7)
    grid = st.integers(1, 3).flatmap(
        lambda n: st.lists(st.lists(number, min_size=n, max_size=n), min_size=rows, max_size=rows)
    )
    tensors = st.lists(number, min_size=rows, max_size=rows) | grid
    slices = st.builds(slice, edge, edge, st.none() | st.integers(1, 3))
    return number | st.lists(number, min_size=1, max_size=4) | slices | tensors.map(torch.tensor)


@st.composite
def _random(draw: Any) -> tuple[Batch, list[Spec], int | None]:
    """A padded batch, a union of specs, and how to split it."""
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    rows, width, left = len(lengths), max(lengths) + draw(st.integers(0, 2)), draw(st.booleans())
    mask = torch.zeros(rows, width, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, width - length :] = left
        mask[row, :length] |= not left
        holes = draw(st.sets(st.integers(0, width - 1), max_size=2))
        if len(set(mask[row].nonzero()[:, 0].tolist()) - holes):
            mask[row, list(holes)] = False
    seed = draw(st.integers(0, 99))
    sample = Batch(Tokens(tokens(rows, width, seed) * mask, mask), [row.nonzero()[:, 0].tolist() for row in mask])
    flags = st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=rows, max_size=rows)
    index = st.integers(-rows, rows - 1)
    some = st.fixed_dictionaries(
        {},
        optional={
            "rows": index | st.lists(index, min_size=1, max_size=3) | st.builds(slice, st.integers(-2, 2), st.none()),
            "mask": flags.map(torch.tensor),
            "tokens": st.integers(0, 119) | st.just(sample.tokens.ids.flatten()[::2].tolist()),
            "pos": _positions(rows),
        },
    )
    specs = draw(st.lists(some, min_size=1, max_size=2))
    return sample, specs, draw(st.none() | st.integers(1, 3))


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(_random())
def test_random_edits_act_where_a_slow_reference_says(case: tuple[Batch, list[Spec], int | None]) -> None:
    sample, specs, size = case
    try:
        want = picked(specs, sample)
    except IndexError:  # a position that some row lacks
        want = set()
    if want:
        assert edited(manager("Llama"), sample, union(specs), size) == want
    else:
        with pytest.raises(WhereError):
            edited(manager("Llama"), sample, union(specs), size)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(_random())
def test_random_reads_are_cut_where_a_slow_reference_says(case: tuple[Batch, list[Spec], int | None]) -> None:
    sample, specs, size = case
    hm, site, at = manager("Llama"), Site("0.z"), {k: v for k, v in specs[0].items() if k == "pos"}
    whole = hm.run(sample.tokens, read=[site])[site]
    read = site.at(**at, head=[3, 1])
    try:
        want = cut(whole, site, {**at, "head": [3, 1]}, sample.real)
    except (IndexError, RuntimeError):  # a position that some row lacks, or rows of different lengths
        with pytest.raises(WhereError):
            hm.run(sample.tokens, read=[read], batch_size=size)
    else:
        torch.testing.assert_close(hm.run(sample.tokens, read=[read], batch_size=size)[site], want)
