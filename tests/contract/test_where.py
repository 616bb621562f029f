"""Which positions, heads, keys and rows a `Where` means: reads, edits and generation, against indexing by hand."""

import functools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from interp.core.errors import WhereError
from interp.core.intervention import Ablate, Add
from interp.core.manager import HookManager
from interp.core.site import Site
from interp.core.text import Tokens
from interp.core.where import Where
from tests.families import manager, tokens

pytestmark = pytest.mark.contract

LENGTHS = (8, 5, 6)
PADDED = ("left", "right")
SITE, MARK = "0.resid_post", 8.0
Spec = dict[str, Any]
"""The fields of a `Where`; a list of them is a union."""

on_both = pytest.mark.parametrize("name", ["GPT2", "Llama"])
on_every_side = pytest.mark.parametrize("side", ["none", *PADDED])
in_parts = pytest.mark.parametrize("size", [None, 2])


class Batch(NamedTuple):
    """A batch, and the columns of each row's real tokens."""

    tokens: Tokens
    real: list[list[int]]


@functools.cache
def batch(side: str) -> Batch:
    """Three rows, of equal length or padded on one side, with two named spans."""
    whole = tokens(len(LENGTHS), max(LENGTHS), seed=11)
    ids, mask = torch.zeros_like(whole), torch.zeros_like(whole, dtype=torch.bool)
    for row, length in enumerate(LENGTHS if side in PADDED else [max(LENGTHS)] * len(LENGTHS)):
        at = slice(max(LENGTHS) - length, None) if side == "left" else slice(length)
        ids[row, at], mask[row, at] = whole[row, :length], True
    real = [row.nonzero()[:, 0].tolist() for row in mask]
    spans = {name: torch.zeros_like(mask) for name in ("user", "last")}
    for row, columns in enumerate(real):
        spans["user"][row, columns[row : row + 3]] = True
        spans["last"][row, columns[-1]] = True
    return Batch(Tokens(ids, mask, spans=spans), real)


def places(given: Any, real: list[int], row: int, new: list[int] | None = None) -> list[int]:
    """The columns that a `pos` means in a row, by indexing the list of its real columns.

    Generated columns `new` follow the prompt's, but what is negative still counts from the prompt's end.
    """
    everything, length = [*real, *(new or [])], len(real)
    if isinstance(given, slice):
        if new is None:
            return real[given]
        start = 0 if given.start is None else given.start if given.start >= 0 else max(0, length + given.start)
        stop = len(everything) if given.stop is None else given.stop if given.stop >= 0 else length + given.stop
        return everything[start : max(0, stop) : given.step]
    if isinstance(given, Tensor):
        given = given[row].reshape(-1).tolist()
    listed = [given] if isinstance(given, int) else list(given)
    if new is not None:
        return [real[i] if i < 0 else everything[i] for i in listed if i < len(everything)]
    return [real[i] for i in listed]


def _kept(given: Any, n: int) -> list[int]:
    if isinstance(given, slice):
        return list(range(n))[given]
    return [range(n)[i] for i in ([given] if isinstance(given, int) else given)]


def cut(whole: Tensor, site: Site, at: Spec, real: list[list[int]]) -> Tensor:
    """What `site.at(**at)` must give (masks excepted), cut from the whole activation by hand."""
    axes, drop, x = list(site.axes), [], whole
    if "pos" in at:
        axis, given = axes.index("pos"), at["pos"]
        columns = [torch.tensor(places(given, real[row], row), dtype=torch.long) for row in range(len(real))]
        x = torch.stack([part.index_select(axis - 1, c) for part, c in zip(x, columns, strict=True)])
        drop += [axis] if isinstance(given, int) or (isinstance(given, Tensor) and given.ndim == 1) else []
    if "head" in at:
        axis = next(i for i, a in enumerate(axes) if "heads" in a)
        x = x.index_select(axis, torch.tensor(_kept(at["head"], x.shape[axis])))
        drop += [axis] if isinstance(at["head"], int) else []
    if "src" in at:
        given = at["src"]
        x = torch.stack([part[..., places(given, real[row], row)] for row, part in enumerate(x)])
        drop += [x.ndim - 1] if isinstance(given, int) or (isinstance(given, Tensor) and given.ndim == 1) else []
    if "rows" in at:
        x = x[_kept(at["rows"], len(real))]
        drop += [0] if isinstance(at["rows"], int) else []
    for axis in sorted(drop, reverse=True):
        x = x.squeeze(axis)
    return x


POSITIONS: list[Any] = [
    *(0, -1, 3, -4),
    *([0, 3], [-1, 0, 2], [2, 2], range(1, 4)),
    *(slice(1, 4), slice(-3, None), slice(-4, -1), slice(0, 5, 2), slice(99, None)),
    *(torch.tensor([[3, 0], [-5, 1], [2, 2]]), torch.tensor([1, 0, -2]), torch.tensor([[0, -1], [2, 3], [1, -1]])),
]
SLICES: list[tuple[str, Spec]] = [
    ("1.z", {"head": 1}),
    ("1.z", {"head": [2, 0]}),
    ("0.q", {"head": slice(1, 3)}),
    ("0.v", {"head": -1}),
    ("0.pattern", {"head": [3, 1]}),
    ("0.resid_mid", {"rows": [0, 2]}),
    ("1.z", {"rows": slice(1, None), "head": 0}),
    ("0.z", {"rows": 1}),
    ("1.q", {"rows": -1, "head": 3, "pos": 0}),
    ("0.attn_scores", {"rows": [-1], "head": -2}),
    ("1.pattern", {"rows": slice(0, 2), "pos": -1, "head": [0, 2]}),
]


def _check_reads(name: str, side: str, size: int | None, asked: list[tuple[str, Spec]]) -> None:
    hm, given = manager(name), batch(side)
    whole = hm.run(given.tokens, read=sorted({site for site, _ in asked}))
    for site, at in asked:
        got = hm.run(given.tokens, read=[Site(site).at(**at)], batch_size=size)[site]
        want = cut(whole[site], Site(site), at, given.real)
        assert got.shape == want.shape, (site, at)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5, msg=f"{site} {at}")
        assert got.untyped_storage().nbytes() == got.numel() * got.element_size(), (site, at)


@on_both
@on_every_side
@in_parts
def test_reads_of_positions_are_cut_in_each_rows_own_tokens(name: str, side: str, size: int | None) -> None:
    asked: list[tuple[str, Spec]] = [("1.resid_post", {"pos": pos}) for pos in POSITIONS]
    asked += [("1.z", {"pos": pos, "head": 1}) for pos in POSITIONS]
    asked += [("0.pattern", {"pos": pos}) for pos in POSITIONS]
    asked += [("1.pattern", {"pos": pos, "head": -1}) for pos in (-2, [0, 3], POSITIONS[-1])]
    asked += [("0.rot_k", {"pos": pos, "head": [1, 0]}) for pos in (-1, [0, 3])] if name == "Llama" else []
    _check_reads(name, side, size, asked)


@on_both
@on_every_side
@in_parts
def test_reads_of_heads_and_rows_are_cut_by_index(name: str, side: str, size: int | None) -> None:
    _check_reads(name, side, size, SLICES)


@on_both
@on_every_side
@in_parts
def test_reads_of_keys_are_cut_in_each_rows_own_tokens(name: str, side: str, size: int | None) -> None:
    asked: list[tuple[str, Spec]] = [("1.pattern", {"src": src}) for src in POSITIONS]
    asked += [("0.pattern", {"src": src, "pos": -1, "head": 2}) for src in POSITIONS]
    asked += [("0.attn_scores", {"src": 2, "pos": [4, -1], "head": [0, 1], "rows": [0, 2]})]
    _check_reads(name, side, size, asked)


@on_both
@on_every_side
@in_parts
def test_a_mask_reads_real_tokens_row_by_row_in_one_axis(name: str, side: str, size: int | None) -> None:
    hm, given = manager(name), batch(side)
    mask = torch.rand(given.tokens.ids.shape, generator=torch.Generator().manual_seed(2)) < 0.6
    for site, at in (("1.resid_post", {}), ("0.z", {"head": [1, 3]}), ("1.pattern", {"head": 2}), ("0.pattern", {})):
        whole = hm.run(given.tokens, read=[site])[site].movedim(Site(site).axes.index("pos"), 1)
        for more in ({}, {"pos": slice(1, None)}, {"rows": [0, 2]}, {"pos": [0, 2, -1], "rows": 1}):
            got = hm.run(given.tokens, read=[Site(site).at(mask=mask, **at, **more)], batch_size=size)[site]
            chosen = sorted((r, c) for r, c in picked([more], given) if mask[r, c])
            want = torch.stack([whole[r, c][at.get("head", ...)] for r, c in chosen])
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", PADDED)
@pytest.mark.parametrize("pos", [slice(None), slice(1, None), slice(None, -1)])
def test_slices_of_different_lengths_are_refused_with_the_lengths(side: str, pos: slice) -> None:
    hm, given = manager("GPT2"), batch(side)
    lengths = str([len(columns[pos]) for columns in given.real])
    for size in (None, 1):
        with pytest.raises(WhereError, match=f"different lengths.*{lengths[1:-1]}"):
            hm.run(given.tokens, read=[Site(SITE).at(pos=pos)], batch_size=size)
    assert hm.run(batch("none").tokens, read=[Site(SITE).at(pos=pos)])[SITE].shape[1] >= 7


@pytest.mark.parametrize(
    ("site", "where", "words"),
    [
        ("0.resid_post", Where(head=0), "has no heads"),
        ("0.z", Where(head=4), "head 4 does not exist"),
        ("0.z", Where(src=0), "for pattern and attn_scores"),
        ("0.z", Where(pos=5), "outside row 1, which has 5 tokens"),
        ("0.z", Where(pos=[0, -6]), "outside row 1, which has 5 tokens"),
        ("0.z", Where(pos=torch.zeros(2, dtype=torch.long)), "positions for 2 rows"),
        ("0.z", Where(rows=3), "row 3 does not exist"),
        ("0.z", Where(mask=torch.ones(3, 7, dtype=torch.bool)), "this batch is"),
        ("0.z", Where(pos=0) | Where(pos=2), "unions use mask"),
        ("0.z", Where(name="user"), "spans and unions use mask"),
    ],
)
@pytest.mark.parametrize("size", [None, 1])
def test_reads_of_what_is_not_there_are_refused(site: str, where: Where, words: str, size: int | None) -> None:
    with pytest.raises(WhereError, match=words):
        manager("GPT2").run(batch("left").tokens, read=[Site(site, where=where)], batch_size=size)


def test_a_cached_step_refuses_to_read_columns_that_it_does_not_hold() -> None:
    hm, ids = manager("Llama"), tokens(2, 6)
    with torch.no_grad():
        cache = hm.model(ids[:, :4], use_cache=True).past_key_values
        step = pytest.raises(WhereError, match="this forward holds columns 4 to 5 only")
        with step, hm.hooked(read=[Site("0.z").at(pos=0)]):
            hm.model(ids[:, 4:], past_key_values=cache)


def picked(
    specs: list[Spec], given: Batch, new: list[int] | None = None, ids: Tensor | None = None
) -> set[tuple[int, int]]:
    """The (row, column) pairs that a union of `Where(**spec)` means, one condition at a time."""
    found = set()
    for spec in specs:
        for row, real in enumerate(given.real):
            columns = {*real, *(new or [])}
            for field, value in spec.items():
                columns &= _meant(field, value, given, row, new, given.tokens.ids if ids is None else ids)
            found |= {(row, column) for column in columns}
    return found


def _meant(field: str, value: Any, given: Batch, row: int, new: list[int] | None, ids: Tensor) -> set[int]:
    real, every = given.real[row], {*given.real[row], *(new or [])}
    if field == "rows":
        return every if row in _kept(value, len(given.real)) else set()
    if field == "mask":
        return {c for c in range(value.shape[1]) if value[row, c]}
    if field == "tokens":
        return {c for c in every if int(ids[row, c]) in ([value] if isinstance(value, int) else value)}
    if field == "name":
        return {c for c in real if given.tokens.spans[value][row, c]}
    if field == "phase":
        return {"prompt": set(real), "last_prompt": {real[-1]}, "generated": set(new or [])}[value]
    return set(places(value, real, row, new))


def union(specs: list[Spec]) -> Where:
    """The `Where` of a list of specs."""
    return functools.reduce(Where.__or__, [Where(**spec) for spec in specs])


def marked(before: Tensor, after: Tensor) -> set[tuple[int, int]]:
    """Where a marker was added, everything else being what it was."""
    change = after - before
    on = change.abs().amax(-1) > MARK / 2
    torch.testing.assert_close(change, (MARK * on)[..., None].expand_as(change), atol=1e-4, rtol=0)
    return {(int(r), int(c)) for r, c in on.nonzero()}


def edited(hm: HookManager, given: Batch, where: Where, size: int | None = None) -> set[tuple[int, int]]:
    """The (row, column) pairs that an edit with this `where` changes."""
    write = Add(SITE, torch.full((hm.d_model,), MARK), where=where)
    before = hm.run(given.tokens, read=[SITE])[SITE]
    return marked(before, hm.run(given.tokens, read=[SITE], write=[write], batch_size=size)[SITE])


def masks(given: Batch) -> Tensor:
    """A random mask over a batch's columns, pads included."""
    return torch.rand(given.tokens.ids.shape, generator=torch.Generator().manual_seed(4)) < 0.5


def _cases(given: Batch) -> list[list[Spec]]:
    """Edits in every form; those of positions come from `POSITIONS`."""
    some = given.tokens.ids[given.tokens.mask][::3].tolist()
    mask = masks(given)
    return [
        [{}],
        *([{"pos": pos}] for pos in POSITIONS if pos != slice(99, None)),
        *(
            [{"pos": pos}]
            for pos in (slice(None), slice(1, None), slice(None, -1), slice(6, None), slice(None, None, 3))
        ),
        *([{"rows": rows}] for rows in (1, -1, [2, 0], slice(1, None), slice(None, -1))),
        [{"rows": [0, 1], "pos": [0, -1]}],
        [{"mask": mask}],
        [{"mask": torch.ones_like(mask)}],
        [{"mask": mask, "pos": slice(1, -1), "rows": slice(0, 2)}],
        [{"tokens": some[0]}],
        [{"tokens": some}],
        [{"tokens": some, "pos": slice(2, None)}],
        [{"name": "user"}],
        [{"name": "user", "pos": [0, 1, 2]}],
        [{"name": "user"}, {"name": "last", "rows": [0, 2]}],
        [{"pos": 0}, {"pos": -1, "rows": 1}, {"mask": mask}],
        [{"phase": "prompt"}],
        [{"phase": "last_prompt"}],
        [{"phase": "last_prompt"}, {"phase": "generated"}],
    ]


@on_both
@on_every_side
@in_parts
def test_edits_act_exactly_where_they_were_asked_to(name: str, side: str, size: int | None) -> None:
    given = batch(side)
    for specs in _cases(given):
        want = picked(specs, given)
        assert want, specs
        assert edited(manager(name), given, union(specs), size) == want, specs


@pytest.mark.parametrize("side", PADDED)
def test_pads_are_never_edited(side: str) -> None:
    hm, given = manager("Llama"), batch(side)
    real = {(row, column) for row, columns in enumerate(given.real) for column in columns}
    for where in (Where(), Where(mask=torch.ones_like(given.tokens.mask)), Where(pos=slice(None)), Where.prompt()):
        assert edited(hm, given, where) == real
    with pytest.raises(WhereError, match="selects nothing"):
        edited(hm, given, Where(tokens=0))  # pads hold this id, and nothing else does


@on_both
@on_every_side
def test_edits_of_heads_leave_the_others(name: str, side: str) -> None:
    hm, given = manager(name), batch(side)
    cases: list[tuple[str, Any, Spec]] = [("0.z", 1, {"pos": -2}), ("1.v", [-1, 0], {"rows": 0})]
    for site, head, spec in [*cases, ("0.q", slice(1, 3), {})]:
        before = hm.run(given.tokens, read=[site])[site]
        write = Add(site, torch.full(before.shape[2:], MARK), where=Where(head=head, **spec))
        after = hm.run(given.tokens, read=[site], write=[write])[site]
        on = _kept(head, before.shape[2])
        for each in range(before.shape[2]):
            want = picked([spec], given) if each in on else set()
            assert marked(before[:, :, each], after[:, :, each]) == want, (site, each)


@on_both
@on_every_side
@in_parts
def test_edits_of_keys_change_those_columns_of_real_queries(name: str, side: str, size: int | None) -> None:
    hm, given, site = manager(name), batch(side), "1.pattern"
    before = hm.run(given.tokens, read=[site])[site]
    for src in (0, -1, [0, 3], slice(1, 4), slice(-2, None), POSITIONS[-2], POSITIONS[-1]):
        for more in ({}, {"head": 2}, {"pos": [1, -1], "rows": [0, 1]}, {"head": [0, 3], "pos": slice(2, None)}):
            write = Add(site, torch.tensor([[MARK]]), where=Where(src=src, **more))
            after = hm.run(given.tokens, read=[site], write=[write], batch_size=size)[site]
            keys = picked([{"pos": src}], given)
            at = {k: v for k, v in more.items() if k != "head"}
            on = torch.zeros_like(before)
            for row, query in picked([at], given):
                for head in _kept(more.get("head", slice(None)), hm.n_heads):
                    on[row, head, query, [c for r, c in keys if r == row]] = MARK
            torch.testing.assert_close(after - before, on, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("site", "where", "words"),
    [
        ("0.z", Where(pos=0, src=1), "for pattern and attn_scores"),
        ("0.z", Where(pos=5), "outside row 1, which has 5 tokens"),
        ("0.z", Where(pos=-6), "outside row 1"),
        ("0.z", Where(rows=slice(5, 9)), "selects nothing"),
        ("0.z", Where(pos=slice(9, None)), "selects nothing"),
        ("0.pattern", Where(src=slice(9, None)), "selects nothing"),
        ("0.z", Where(mask=torch.ones(2, 8, dtype=torch.bool)), r"this batch is \(3, 8\)"),
        ("0.z", Where.generated(), "run makes none"),
        ("0.z", Where(name="nobody"), "no span named 'nobody'; its spans are: 'user', 'last'"),
    ],
)
def test_edits_of_what_is_not_there_are_refused(site: str, where: Where, words: str) -> None:
    with pytest.raises(WhereError, match=words):
        manager("GPT2").run(batch("left").tokens, write=[Ablate(site, where=where)])


def test_a_union_of_rows_edits_those_rows_only() -> None:
    for specs in ([{"rows": 0}, {"rows": 2}], [{"rows": 1}, {"rows": 0, "pos": -1}]):
        assert edited(manager("GPT2"), batch("none"), union(specs)) == picked(specs, batch("none"))


@pytest.mark.parametrize("where", [Where(src=1), Where(head=0), Where(pos=0, src=[1, 2])])
def test_heads_and_keys_are_refused_inside_a_union(where: Where) -> None:
    for left, right in ((where, Where(pos=1)), (Where(pos=1) | Where(pos=2), where)):
        with pytest.raises(WhereError, match="union"):
            manager("GPT2").run(batch("none").tokens, write=[Ablate("0.pattern", where=left | right)])


@pytest.mark.parametrize("rows", [[2, 0], [-1, 1], [1, 1]])
def test_rows_come_in_the_order_asked_and_a_split_batch_refuses_any_but_its_own(rows: list[int]) -> None:
    asked: list[tuple[str, Spec]] = [(SITE, {"rows": rows}), ("1.z", {"rows": rows, "pos": POSITIONS[-1], "head": 1})]
    _check_reads("GPT2", "left", None, asked)
    with pytest.raises(WhereError, match="order"):
        manager("GPT2").run(batch("left").tokens, read=[Site(SITE).at(rows=rows)], batch_size=1)


@pytest.mark.parametrize("side", PADDED)
def test_positions_count_real_tokens_where_a_mask_has_holes(side: str) -> None:
    hm, given = manager("GPT2"), batch(side).tokens
    mask = given.mask.clone()
    mask[0, 1] = mask[1, 3] = mask[2, 4] = False
    holed = Batch(Tokens(given.ids, mask), [row.nonzero()[:, 0].tolist() for row in mask])
    for pos in (2, -2, [0, 3], slice(1, -1), POSITIONS[-1]):
        assert edited(hm, holed, Where(pos=pos)) == picked([{"pos": pos}], holed)
    whole = hm.run(holed.tokens, read=["0.z"])["0.z"]
    for pos in (2, -2, [0, 3], POSITIONS[-1]):
        got = hm.run(holed.tokens, read=[Site("0.z").at(pos=pos)])["0.z"]
        torch.testing.assert_close(got, cut(whole, Site("0.z"), {"pos": pos}, holed.real))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "fields",
    [
        {"pos": slice("a", None)},
        {"pos": slice(None, None, 0)},
        {"src": slice(None, None, -1)},
        {"name": ["user", 3]},
        {"pos": torch.zeros(1, 1, 1, dtype=torch.long)},
        {"rows": True},
        {"head": "0"},
        {"tokens": []},
    ],
    ids=str,
)
def test_fields_of_a_wrong_type_are_refused_at_once(fields: Spec) -> None:
    with pytest.raises(WhereError, match=next(iter(fields))):
        Where(**fields)


def test_numpy_positions_are_positions() -> None:
    given = batch("left")
    found = edited(manager("GPT2"), given, Where(pos=torch.tensor([0, -1]).numpy(), rows=torch.tensor(1).numpy()))
    assert found == picked([{"pos": [0, -1], "rows": 1}], given)


@pytest.mark.parametrize("where", [Where(pos=40), Where(pos=slice(30, None)), Where(tokens=119, pos=0)])
def test_a_generation_that_never_reaches_the_edit_is_refused(where: Where) -> None:
    hm = manager("GPT2")
    with pytest.raises(WhereError, match="selects nothing"):
        hm.generate(tokens(2, 5), max_new_tokens=2, write=[Ablate(SITE, where=where)])


@pytest.mark.parametrize("where", [Where(pos=0), Where(src=0), Where(mask=torch.ones(3, 8, dtype=torch.bool))])
def test_a_generation_refuses_reads_of_some_positions(where: Where) -> None:
    with pytest.raises(WhereError, match="generate stacks every position"):
        manager("GPT2").generate(batch("none").tokens, max_new_tokens=1, read=[Site("0.pattern", where=where)])


def test_several_names_mean_any_of_their_spans() -> None:
    hm, ids = manager("GPT2"), tokens(1, 6)
    first, last = torch.zeros(1, 6, dtype=torch.bool), torch.zeros(1, 6, dtype=torch.bool)
    first[0, 1], last[0, 4] = True, True
    spanned = Tokens(ids, torch.ones(1, 6, dtype=torch.bool), spans={"first": first, "last": last})
    marked = Add("0.resid_post", torch.ones(hm.d_model), where=Where(name=["first", "last"]))
    change = hm.run(spanned, read=[SITE], write=[marked])[SITE] - hm.run(ids, read=[SITE])[SITE]
    assert change.abs().sum(-1)[0].nonzero().flatten().tolist() == [1, 4]


def test_rows_that_are_not_meant_may_be_too_short_for_the_position() -> None:
    hm = manager("GPT2")
    edit = Ablate(SITE, where=Where(pos=5, rows=0))
    got = hm.run([[1, 2, 3, 4, 5, 6], [1, 2]], read=[SITE], write=[edit])[SITE]
    assert bool((got[0, 5] == 0).all())
    assert bool((got[1, :2] != 0).all())
