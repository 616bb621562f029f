"""Stored activations: what lies on the disk is what the model gives, and each way of reading gives all of it."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tests.source as repo
from interp.core.errors import ConfigError, DataError, InterpError
from interp.core.run import Run
from interp.data.capture import CaptureOptions, plan_capture
from interp.data.documents import Documents
from interp.data.store import ActivationStore, Batch, Rows, StreamState
from interp.data.stored import StoredActivations
from interp.data.tokens import TokenBlock, TokenSource
from tests.families import manager
from tests.store_faults import NAMES, SITES, expected, nothing_left, planted, random_texts, source, take, tree, within

PACKINGS = ["concat", "block_diagonal", "one_doc"]
# Texts that are awkward: empty, longer than a row, with words that are special tokens.
TEXTS = [*random_texts(20), "", " ".join(f"w{i}" for i in range(1, 41)), "w7 w0 w8 w0", "", *random_texts(17, seed=1)]
UNIT = 7


def open_(folder: Path, **options: Any) -> StoredActivations:
    return ActivationStore.open(folder, **{"batch_size": 32, "buffer_tokens": 4096, **options})


# -- what is written --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("packing", "bos", "part"),
    [
        *itertools.product(PACKINGS, [True, False], ["all"]),
        *(("concat", True, "train"), ("concat", True, "held_out"), ("one_doc", True, "held_out")),
        ("block_diagonal", False, "train"),
    ],
)
def test_rows_are_what_run_gives_and_every_token_is_there_once(
    packing: str, bos: bool, part: Any, tmp_path: Path
) -> None:
    tokens = source(Documents(TEXTS, part=part, hold_out_every=3), packing=packing, bos=bos)
    with nothing_left(tmp_path):
        captured = take(tmp_path / "store", tokens, unit_documents=UNIT)
    store, wanted = open_(tmp_path / "store"), expected(manager("Llama"), tokens, UNIT, SITES)
    rows = store.rows(slice(None))
    for site, found in zip(SITES, rows.values, strict=True):
        assert found.dtype == torch.float32 and torch.equal(found, wanted[site])
    assert torch.equal(rows.tokens, wanted["ids"]) and torch.equal(rows.positions, wanted["position"])
    for name in ("ids", "document", "position", "special"):
        assert torch.equal(store.column(name).long(), wanted[name].long()), name
    own = [store.column(name).tolist() for name in ("document", "position", "ids")]
    there = [row for row in zip(*own, strict=True) if row[1] >= 0]
    # Where each document has its row, the rows of a unit may come in any order.
    ordered = sorted(there) if packing == "one_doc" else there
    assert ordered == planted(tokens.documents, 16 - bos if packing == "one_doc" else None)
    assert store.n_rows == captured.rows == len(rows) and store.complete and captured.status == "complete"
    counted = int((store.column("ids") != 0).sum())
    assert store.n_tokens == captured.tokens == counted < store.n_rows
    complete = json.loads((tmp_path / "store" / "complete.json").read_text())
    assert complete["units"] == -(-len(TEXTS) // UNIT) and (complete["rows"], complete["tokens"]) == (
        store.n_rows,
        counted,
    )


def test_the_oracle_of_rows_sees_where_a_unit_is_cut() -> None:
    hm, tokens = manager("Llama"), source(TEXTS)
    one, other = expected(hm, tokens, 7, SITES), expected(hm, tokens, 8, SITES)
    assert one["ids"].shape != other["ids"].shape or not torch.equal(one[SITES[0]], other[SITES[0]])


@pytest.mark.parametrize("packing", ["concat", "one_doc"])
def test_a_document_is_its_tokens_with_heads_as_axes(packing: str, tmp_path: Path) -> None:
    tokens = source(TEXTS, packing=packing)
    take(tmp_path / "store", tokens, unit_documents=UNIT)
    store, wanted = open_(tmp_path / "store"), expected(manager("Llama"), tokens, UNIT, SITES)
    for index, text in enumerate(TEXTS):
        if not text:
            with pytest.raises(DataError, match=f"holds no document {index}"):
                store.document(index)
            continue
        document, words = store.document(index), text.split()[: 15 if packing == "one_doc" else None]
        assert document.ids.tolist() == [int(w[1:]) for w in words]
        assert document.positions.tolist() == list(range(len(words)))
        mine = (wanted["document"] == index) & (wanted["position"] >= 0)
        assert set(document.values) == set(NAMES)
        for name, site, shape in zip(NAMES, SITES, [(32,), (4, 8)], strict=True):
            assert document.values[name].shape == (len(words), *shape)
            assert torch.equal(document.values[name].flatten(1), wanted[site][mine])
    with pytest.raises(DataError, match="holds no document"):
        store.document(len(TEXTS))


def own_loss(block: TokenBlock) -> Callable[[Run], Tensor]:
    """Each row's summed loss of real tokens from real ones, by our own arithmetic."""

    def loss(run: Run) -> Tensor:
        ids, real = block.ids, block.mask[:, :-1] & block.mask[:, 1:]
        logits = run.logits[:, :-1].double()
        picked = logits.gather(2, ids[:, 1:, None])[..., 0] - logits.logsumexp(2)
        return -torch.where(real, picked, 0.0).sum(1)

    return loss


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("dtype", ["float32", "int8_row"])
def test_gradients_are_those_of_the_texts_summed_loss(packing: str, dtype: str, tmp_path: Path) -> None:
    hm, tokens = manager("Llama"), source(TEXTS[:20], packing=packing)
    take(tmp_path / "store", tokens, unit_documents=UNIT, gradient="loss", dtype=dtype)
    store = open_(tmp_path / "store")
    wanted: dict[str, list[Tensor]] = {site: [] for site in SITES}
    padded = 0
    for first in range(0, 20, UNIT):
        for block in tokens.pack([(i, TEXTS[i]) for i in range(first, min(first + UNIT, 20))]):
            run = hm.run(block.inputs, read=SITES, grad=own_loss(block))
            padded += int((~block.mask).sum())
            for site in SITES:
                wanted[site].append(run.grad[site][block.mask].flatten(1))
    assert padded > 0
    rows = store.rows(slice(None))
    assert rows.gradients is not None
    for site, found in zip(SITES, rows.gradients, strict=True):
        x = torch.cat(wanted[site])
        assert float(x.abs().max()) > 0.1
        room = 1e-5 if dtype == "float32" else x.abs().amax(1, keepdim=True) / 250
        assert bool(((found - x).abs() <= 1e-5 + room).all()), float((found - x).abs().max())
    # They stay with their activations, however the rows are read.
    counts = store.column("special") == 0
    plain = Counter(keys(torch.cat([rows.values[0], rows.gradients[0]], 1)[counts], rows.tokens[counts], None))
    given: Counter[bytes] = Counter()
    for batch in store.batches(x=SITES[0]):
        assert batch.grad is not None
        given.update(keys(torch.cat([batch.x, batch.grad], 1), batch.tokens, None))
    assert given == plain
    some = store.rows(torch.tensor([9, 2, 30]))
    assert some.gradients is not None and torch.equal(some.gradients[1], rows.gradients[1][[9, 2, 30]])


@pytest.mark.parametrize("name", ["entropy", "top_logit"])
def test_gradients_can_be_of_something_else_than_the_loss(name: Any, tmp_path: Path) -> None:
    hm, tokens = manager("Llama"), source(TEXTS[:6], packing="one_doc")
    take(tmp_path / "store", tokens, unit_documents=6, gradient=name, dtype="float32")
    wanted: dict[str, list[Tensor]] = {site: [] for site in SITES}
    for block in tokens.pack(list(enumerate(TEXTS[:6]))):

        def own(run: Run, real: Tensor = block.mask) -> Tensor:
            logits = run.logits.double()
            p = logits.softmax(-1)
            each = logits.max(-1).values if name == "top_logit" else torch.special.entr(p).sum(-1)
            return (each * real).sum(-1)

        run = hm.run(block.inputs, read=SITES, grad=own)
        for site in SITES:
            wanted[site].append(run.grad[site][block.mask].flatten(1))
    rows = open_(tmp_path / "store").rows(slice(None))
    assert rows.gradients is not None
    for site, found in zip(SITES, rows.gradients, strict=True):
        x = torch.cat(wanted[site])
        assert float(x.abs().max()) > 1e-3
        torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-6)


def test_bf16_is_the_default_and_eight_bits_are_within_their_bound(tmp_path: Path) -> None:
    hm, tokens = manager("Llama"), source(TEXTS)
    assert CaptureOptions().dtype == "bfloat16"
    wanted = expected(hm, tokens, UNIT, SITES)
    for dtype in ("bfloat16", "int8_row", "int8_channel"):
        take(tmp_path / dtype, tokens, unit_documents=UNIT, dtype=dtype)
        store = open_(tmp_path / dtype)
        for i, (name, site) in enumerate(zip(NAMES, SITES, strict=True)):
            found, x = store.rows(slice(None)).values[i], wanted[site]
            if dtype == "bfloat16":
                assert found.dtype == torch.bfloat16 and torch.equal(found, x.bfloat16())
                continue
            if dtype == "int8_row":
                bound = x.abs().amax(1, keepdim=True).expand_as(x) / 254
            else:
                pieces = zip(x.split([s.rows for s in store.shards]), strict=True)
                bound = torch.cat([piece.abs().amax(0).expand_as(piece) / 254 for (piece,) in pieces])
            assert bool(((found - x).abs() <= bound * (1 + 1e-4)).all())
            largest = max(shard.record["error"][f"values.{name}"]["largest"] for shard in store.shards)
            assert largest == pytest.approx(float((found - x).abs().max()), rel=1e-6)


def test_the_plan_says_what_is_written(tmp_path: Path) -> None:
    hm, tokens = manager("Llama"), source(random_texts(120))
    for dtype in ("float32", "bfloat16", "int8_row"):
        options = CaptureOptions.model_validate({"dtype": dtype, "unit_bytes": 20_000})
        plan = plan_capture(hm, tokens, SITES, options)
        assert not (tmp_path / dtype).exists()
        captured = take(tmp_path / dtype, tokens, dtype=dtype, unit_bytes=20_000)
        store = open_(tmp_path / dtype)
        assert store.manifest == plan.manifest
        sizes = [sum(held["bytes"] for held in shard.record["files"].values()) for shard in store.shards]
        assert sum(sizes) == plan.bytes_per_token * store.n_rows == captured.bytes
        assert sum(path.stat().st_size for path in (tmp_path / dtype).rglob("*.*") if path.suffix != ".json") == sum(
            sizes
        )
        assert all(10_000 < size < 40_000 for size in sizes[:-1]) and len(sizes) > 3


def test_the_same_call_gives_the_same_bytes_and_another_text_others(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        take(tmp_path / name, source(random_texts(30, seed)), unit_documents=UNIT)
    assert tree(tmp_path / "a") == tree(tmp_path / "b") != tree(tmp_path / "c")


def in_a_process(call: str) -> None:
    """Run a call of `tests.store_faults` in a process that has a single thread, so that it can fork."""
    code = f"import pathlib, tests.store_faults as t\nt.{call}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repo.REPO)}
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", code],
        cwd=repo.REPO,
        env=environment,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]


@pytest.mark.parametrize(
    ("processes", "unit", "max_tokens"), [(2, 2, None), pytest.param(4, 1, 700, marks=pytest.mark.slow)]
)
def test_processes_at_once_leave_the_bytes_of_one(
    processes: int, unit: int, max_tokens: int | None, tmp_path: Path
) -> None:
    take(tmp_path / "one", source(random_texts(120)), unit_documents=unit, max_tokens=max_tokens)
    folder = f"pathlib.Path({str(tmp_path / 'many')!r})"
    in_a_process(f"at_once({folder}, {processes}, {unit}, 120, {max_tokens})")
    assert tree(tmp_path / "many") == tree(tmp_path / "one")


# -- how much is written ----------------------------------------------------------------------------------------


def test_a_limit_is_met_within_a_unit_and_a_store_grows_but_never_shrinks(tmp_path: Path) -> None:
    tokens, whole = source(random_texts(60)), tmp_path / "whole"
    take(whole, tokens, unit_documents=3)
    limits = [100, 200, 203, 500]
    for limit in limits:
        captured = take(tmp_path / "store", tokens, unit_documents=3, max_tokens=limit, resume=True)
        store = open_(tmp_path / "store")
        assert captured.status == "complete" and store.complete
        assert store.n_tokens >= limit > store.n_tokens - store.shards[-1].tokens
        take(tmp_path / f"at-{limit}", tokens, unit_documents=3, max_tokens=limit)
        assert tree(tmp_path / "store") == tree(tmp_path / f"at-{limit}")
    before = tree(tmp_path / "store", locks=True)
    with pytest.raises(ConfigError, match=r"was begun for .* tokens, more than 100"):
        take(tmp_path / "store", tokens, unit_documents=3, max_tokens=100, resume=True)
    assert tree(tmp_path / "store", locks=True) == before
    # Without a limit, and with one that the text does not reach, it is all of the text; again, nothing is done.
    for limit_now in (None, 10**6, None):
        again = take(tmp_path / "store", tokens, unit_documents=3, max_tokens=limit_now, resume=True)
        assert again.status == "complete" and tree(tmp_path / "store") == tree(whole)
    assert again.rows == again.tokens == 0


def test_the_documents_per_unit_are_those_the_store_was_begun_with(tmp_path: Path) -> None:
    tokens = source(random_texts(60))
    take(tmp_path / "store", tokens, unit_documents=3, max_tokens=100)
    with pytest.raises(ConfigError, match=r"text\.unit_documents was 3, now 4"):
        take(tmp_path / "store", tokens, unit_documents=4, resume=True)
    take(tmp_path / "store", tokens, resume=True)
    assert open_(tmp_path / "store").manifest.text.unit_documents == 3
    take(tmp_path / "whole", tokens, unit_documents=3)
    assert tree(tmp_path / "store") == tree(tmp_path / "whole")


def test_units_without_a_token_are_shards_too(tmp_path: Path) -> None:
    texts = ["", "", "w1 w2", "", "", "", "w3", ""]
    tokens = source(texts)
    for dtype in ("float32", "int8_channel", "int8_row"):
        take(tmp_path / dtype, tokens, unit_documents=2, dtype=dtype)
        store = open_(tmp_path / dtype)
        assert [shard.rows for shard in store.shards] == [0, 3, 0, 2]
        assert store.column("ids").tolist() == [0, 1, 2, 0, 3]
        rows = store.rows(slice(None))
        assert store.rows(torch.tensor([4, 1])).tokens.tolist() == [3, 1] and rows.tokens.tolist() == [0, 1, 2, 0, 3]
        assert len(store.rows(torch.tensor([], dtype=torch.long))) == len(store.rows(slice(3, 3))) == 0
        assert store.rows(slice(3, 3)).values[0].shape == (0, 32)
        assert sorted(torch.cat([b.tokens for b in store.batches(x=SITES[0])]).tolist()) == [1, 2, 3]  # type: ignore[misc]
        assert [r.tokens.tolist() for r in store.sequential()] == [[1, 2, 3]]


# -- what is refused, before anything is written ----------------------------------------------------------------


@pytest.mark.parametrize("unit", [None, 2])
@pytest.mark.parametrize(
    ("texts", "kind"),
    [
        ([], "no document"),
        (["", ""], "without a token|no tokens|holds no"),
        (["w1"] * 5, "part"),
        (Path("nowhere.jsonl"), "no file or folder"),
        ([3], "expected a text"),
    ],
)
def test_text_that_gives_nothing_is_refused_before_a_file_is_written(
    texts: Any, kind: str, unit: int | None, tmp_path: Path
) -> None:
    part: Any = "held_out" if kind == "part" else "all"
    with nothing_left(tmp_path), pytest.raises(InterpError, match=kind) as caught:
        take(tmp_path / "store", source(Documents(texts, part=part)), unit_documents=unit)
    assert isinstance(caught.value, DataError)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("sites", ["1.pattern", "9.resid_post", "1.residpost", [], ["1.z", "blocks.1.attn.hook_z"]])
def test_sites_that_cannot_be_stored_are_refused_before_a_file_is_written(sites: Any, tmp_path: Path) -> None:
    with pytest.raises(InterpError):
        take(tmp_path / "store", source(TEXTS), sites=sites)
    assert not (tmp_path / "store").exists()


def test_rows_longer_than_the_model_can_take_are_refused_before_a_file_is_written(tmp_path: Path) -> None:
    with pytest.raises(InterpError, match="64"):
        take(tmp_path / "store", source([" ".join(["w1"] * 200)], ctx=100), hm=manager("GPT2"))
    assert not (tmp_path / "store").exists()


def test_a_store_of_special_tokens_alone_says_so_and_does_not_hang(tmp_path: Path) -> None:
    take(tmp_path / "store", source(["w0 w0", "w0", "w0 w0 w0"], bos=False), sites=SITES[0], unit_documents=1)
    for repeat in (False, True):
        store = open_(tmp_path / "store", batch_size=1, buffer_tokens=2, repeat=repeat)
        assert store.n_tokens == 0 < store.n_rows and not list(store.sequential())
        with within(2), pytest.raises(DataError, match="only special tokens"):
            next(store.batches())


# -- reading ----------------------------------------------------------------------------------------------------

BATCH = 64


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 10,000 rows in eight shards, of a block and a bit each; every row is unlike every other."""
    folder = tmp_path_factory.mktemp("big") / "store"
    take(folder, source(random_texts(800), ctx=1000), unit_documents=100)
    return folder


@pytest.fixture(scope="module")
def rows_of(big: Path) -> dict[bytes, int]:
    """The number of each row that counts, by what it holds."""
    store = open_(big)
    rows, special = store.rows(slice(None)), store.column("special")
    found = {key: i for i, key in enumerate(keys(rows.values[0], rows.tokens, rows.positions)) if not special[i]}
    assert len(found) == store.n_tokens > 8000 and len(store.shards) == 8
    return found


def keys(x: Tensor, tokens: Tensor | None, positions: Tensor | None) -> list[bytes]:
    assert tokens is not None
    known = torch.stack([tokens.int(), tokens.int() if positions is None else positions.int()], 1).numpy()
    return [a.tobytes() + b.tobytes() for a, b in zip(known, x.contiguous().numpy(), strict=True)]


def numbers(batch: Batch, rows_of: dict[bytes, int]) -> list[int]:
    return [rows_of[key] for key in keys(batch.x, batch.tokens, batch.positions)]


def epoch(folder: Path, rows_of: dict[bytes, int], **options: Any) -> list[list[int]]:
    store = open_(folder, **{"batch_size": BATCH, "buffer_tokens": 8192, **options})
    return [numbers(batch, rows_of) for batch in store.batches(x=SITES[0])]


@pytest.mark.parametrize(("batch", "buffer"), [(64, 8192), (1000, 2000), (31, 62), (4096, 131072)])
def test_a_shuffled_epoch_gives_every_row_that_counts_once(
    batch: int, buffer: int, big: Path, rows_of: dict[bytes, int]
) -> None:
    batches = epoch(big, rows_of, batch_size=batch, buffer_tokens=buffer)
    given = [number for numbers in batches for number in numbers]
    assert sorted(given) == sorted(rows_of.values())
    assert {len(numbers) for numbers in batches[:-1]} <= {batch} and 0 < len(batches[-1]) <= batch


def test_the_order_follows_from_the_seed(big: Path, rows_of: dict[bytes, int]) -> None:
    one = epoch(big, rows_of, seed=1)
    assert one == epoch(big, rows_of, seed=1)
    other = epoch(big, rows_of, seed=2)
    # Which rows come together is drawn too, not only their order.
    assert not {frozenset(numbers) for numbers in one[:-1]} & {frozenset(numbers) for numbers in other[:-1]}


def blocks_met(batches: list[list[int]], folder: Path) -> float:
    """How many stretches of 1,024 rows, none across shards, a batch has rows of, on average."""
    ends = open_(folder).offsets.tolist()
    place = {
        n: (s, (n - low) // 1024) for s, (low, high) in enumerate(itertools.pairwise(ends)) for n in range(low, high)
    }
    return sum(len({place[n] for n in numbers}) for numbers in batches) / len(batches)


def test_a_batch_mixes_many_blocks_where_reading_in_order_does_not(big: Path, rows_of: dict[bytes, int]) -> None:
    ordered = [
        [rows_of[key] for key in keys(rows.values[0], rows.tokens, rows.positions)]
        for rows in open_(big, batch_size=BATCH).sequential()
    ]
    shuffled = epoch(big, rows_of, buffer_tokens=131072)
    assert blocks_met(ordered, big) < 1.2
    # 64 rows drawn from some 16 blocks, of which the eight ends of shards are short.
    assert blocks_met(shuffled, big) > 7
    # Eight blocks at a time, and no more.
    assert 3 < blocks_met(epoch(big, rows_of, buffer_tokens=8192), big) <= 9
    # Neighbours in the store are no longer neighbours.
    near = [abs(a - b) < 20 for numbers in shuffled for a, b in itertools.pairwise(numbers)]
    assert sum(near) < 0.2 * len(near) < sum(n >= 0 for n in near)


def through_json(state: StreamState) -> StreamState:
    return StreamState(json.loads(json.dumps(state.record)), {k: v.clone() for k, v in state.tensors.items()})


def same(a: Batch, b: Batch) -> bool:
    pairs = [(a.x, b.x), (a.target, b.target), (a.grad, b.grad), (a.tokens, b.tokens), (a.positions, b.positions)]
    return all(x is y is None or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs)


@pytest.mark.parametrize(
    ("taken", "options"),
    [
        (60, {"batch_size": 300, "buffer_tokens": 2048, "repeat": True}),
        (60, {"batch_size": 300, "buffer_tokens": 2048}),
        (30, {"batch_size": 300, "buffer_tokens": 4096, "repeat": True, "share": (1, 3), "seed": 5}),
        (9, {"batch_size": 5000, "buffer_tokens": 10_000, "repeat": True}),
    ],
)
def test_a_stream_goes_on_from_any_batch_to_the_same_bits(taken: int, options: dict[str, Any], big: Path) -> None:
    def stream(state: StreamState | None = None) -> Any:
        return open_(big, **options).batches(x=SITES[0], target=SITES[1], state=state)

    made, states, batches = stream(), list[StreamState](), list[Batch]()
    states.append(through_json(made.state()))
    for batch in itertools.islice(made, taken):
        batches.append(batch)
        states.append(through_json(made.state()))
        size = sum(t.numel() * t.element_size() for t in states[-1].tensors.values())
        assert size <= 8 * options["batch_size"]
    rounds = sum(len(b.x) for b in batches) * options.get("share", (0, 1))[1] / open_(big).n_tokens
    assert rounds > 1.9 if options.get("repeat") else rounds == 1
    for at, state in list(enumerate(states))[::5]:
        rest = list(itertools.islice(stream(state), taken - at))
        assert len(rest) == len(batches) - at and all(map(same, rest, batches[at:])), f"after batch {at}"
    # One batch off is seen.
    assert not same(next(stream(states[1])), batches[0])


def test_a_stream_that_is_asked_to_stop_goes_on_from_there(big: Path) -> None:
    whole = list(itertools.islice(open_(big).batches(x=SITES[0]), 12))
    for allowed in range(4):
        asked = iter([False] * allowed)
        stopping = open_(big).batches(x=SITES[0], should_stop=lambda asked=asked: next(asked, True))  # type: ignore[misc]
        given = list(stopping)
        rest = open_(big).batches(x=SITES[0], state=through_json(stopping.state()))
        assert len(given) == allowed and all(map(same, [*given, *itertools.islice(rest, 12 - allowed)], whole))


def test_a_state_of_another_stream_is_refused(big: Path, tmp_path: Path) -> None:
    stream = open_(big).batches(x=SITES[0])
    next(stream)
    state = through_json(stream.state())
    for changes in ({"batch_size": 33}, {"buffer_tokens": 4097}, {"seed": 1}, {"share": (0, 2)}):
        with pytest.raises(ConfigError, match="this state is of a store with"):
            open_(big, **changes).batches(x=SITES[0], state=state)
    take(tmp_path / "other", source(random_texts(56)), unit_documents=7)
    assert len(open_(tmp_path / "other").shards) == 8
    with pytest.raises(ConfigError, match="this state is of a store with"):
        open_(tmp_path / "other").batches(x=SITES[0], state=state)


@pytest.mark.parametrize("world", [2, 3])
def test_shares_are_disjoint_and_together_everything(world: int, big: Path, rows_of: dict[bytes, int]) -> None:
    whole = epoch(big, rows_of)
    shares = [epoch(big, rows_of, share=(rank, world)) for rank in range(world)]
    together = [number for share in shares for numbers in share for number in numbers]
    assert sorted(together) == sorted(rows_of.values())
    assert [share[i] for i in range(10) for share in shares] == whole[: 10 * world]


def test_repeating_gives_epoch_after_epoch_in_other_orders(big: Path, rows_of: dict[bytes, int]) -> None:
    n = len(rows_of)
    store = open_(big, batch_size=BATCH, buffer_tokens=8192, repeat=True)
    batches = list(itertools.islice(store.batches(x=SITES[0]), 3 * n // BATCH + 1))
    counts = Counter(number for batch in batches for number in numbers(batch, rows_of))
    assert all(len(batch.x) == BATCH for batch in batches)
    assert len(counts) == n and set(counts.values()) <= {2, 3, 4}
    assert sum(count == 3 for count in counts.values()) > n - 3 * BATCH
    first, second = (
        [number for batch in batches[k * n // BATCH : (k + 1) * n // BATCH] for number in numbers(batch, rows_of)]
        for k in (0, 1)
    )
    assert first[:500] != second[:500]
    # Blocks come in another order too: two at a time, the first two of an epoch are not those of the one before.
    small = open_(big, batch_size=BATCH, buffer_tokens=2048, repeat=True).batches(x=SITES[0])
    served = [number for batch in itertools.islice(small, 2 * n // BATCH) for number in numbers(batch, rows_of)]
    assert len(set(served[:500]) & set(served[n : n + 500])) < 100


@pytest.mark.parametrize("start", [0, 1, 1500])
def test_reading_in_order_gives_the_rows_in_order_and_without_a_copy(start: int, big: Path) -> None:
    store = open_(big, batch_size=500)
    whole, special = store.rows(slice(None)), store.column("special") == 1
    plain = list(store.sequential(counted=False, start=start))
    for i in range(2):
        assert torch.equal(torch.cat([rows.values[i] for rows in plain]), whole.values[i][start:])
    own = {shard.raw(NAMES[0]).untyped_storage().data_ptr() for shard in store.shards}
    views = sum(rows.values[0].untyped_storage().data_ptr() in own for rows in plain)
    # Those across two shards are put together.
    assert len(plain) - len(store.shards) <= views < len(plain)
    counted = list(store.sequential(start=start))
    assert torch.equal(torch.cat([rows.values[1] for rows in counted]), whole.values[1][start:][~special[start:]])
    assert torch.equal(torch.cat([rows.positions for rows in counted]), whole.positions[start:][~special[start:]])
    assert torch.equal(store.counted(start, 3000), (~special[start:3000]).nonzero()[:, 0] + start)


def test_rows_by_number_are_those_of_direct_indexing(big: Path) -> None:
    store, n = open_(big), open_(big).n_rows
    whole = store.rows(slice(None))

    def check(found: Rows, index: Any) -> None:
        assert torch.equal(found.tokens, whole.tokens[index]) and torch.equal(found.positions, whole.positions[index])
        assert all(torch.equal(a, b[index]) for a, b in zip(found.values, whole.values, strict=True))

    generator = torch.Generator().manual_seed(0)
    for index in (
        torch.randperm(n, generator=generator)[:500],
        torch.randint(0, n, (500,), generator=generator),
        torch.tensor([n - 1, 0, 0, n - 1]),
        torch.arange(n),
        torch.tensor([], dtype=torch.long),
    ):
        check(store.rows(index), index)
    for piece in (slice(3, 40), slice(1200, 1400), slice(-5, None), slice(0, 3000, 7), slice(5, 5), slice(9, 3)):
        check(store.rows(piece), torch.arange(n)[piece])
    for piece in (slice(None, None, -1), slice(2, 9, -1), slice(9, 2, 3)):
        check(store.rows(piece), torch.tensor(range(n)[piece], dtype=torch.long))
    for bad in (torch.tensor([0, n]), torch.tensor([-1])):
        with pytest.raises(DataError, match=f"the store has {n}"):
            store.rows(bad)


def test_a_transcoders_pairs_are_of_the_same_token(big: Path) -> None:
    store = open_(big)
    rows = store.rows(slice(None))
    other = dict(zip(keys(rows.values[0], rows.tokens, rows.positions), rows.values[1], strict=True))
    batches = list(itertools.islice(store.batches(x=SITES[0], target=SITES[1]), 20))
    for batch, by_site in zip(batches, store.batches_by_site(), strict=False):
        assert batch.target is not None and batch.mask is None
        assert torch.equal(torch.stack([other[k] for k in keys(batch.x, batch.tokens, batch.positions)]), batch.target)
        assert torch.equal(by_site[SITES[0]].x, batch.x) and torch.equal(by_site[SITES[1]].x, batch.target)
    assert next(store.batches(x=SITES[0])).target is None
    with pytest.raises(ConfigError, match="say which one is x"):
        store.batches()
    with pytest.raises(ConfigError, match=r"not 2\.resid_post"):
        store.batches(x="2.resid_post")


def test_a_reader_whose_sizes_or_share_cannot_be_is_refused(big: Path) -> None:
    for options in ({"share": (2, 2)}, {"share": (-1, 2)}, {"share": (0, 0)}, {"buffer_tokens": 63}, {"batch_size": 0}):
        with pytest.raises(ConfigError):
            open_(big, **options)


@pytest.mark.parametrize("late", [[7], [3], [0, 4]])
def test_a_reader_takes_in_what_becomes_whole_and_a_stream_goes_on_without(
    late: list[int], big: Path, tmp_path: Path, rows_of: dict[bytes, int]
) -> None:
    whole, folder = open_(big), tmp_path / "store"
    hidden = shutil.ignore_patterns("complete.json", "end.json", *(f"{number:06d}" for number in late))
    shutil.copytree(big, folder, ignore=hidden)
    alone = [numbers(batch, rows_of) for batch in open_(folder).batches(x=SITES[0])]
    store = open_(folder)
    assert not store.complete and store.refresh() == 0 and store.n_rows < whole.n_rows
    stream = store.batches(x=SITES[0])
    begun = [numbers(next(stream), rows_of) for _ in range(5)]
    state = through_json(stream.state())
    for number in late:
        shutil.copytree(big / "shards" / f"{number:06d}", folder / "shards" / f"{number:06d}")
    assert store.refresh() == len(late) and store.refresh() == 0 and not store.complete
    assert begun + [numbers(batch, rows_of) for batch in stream] == alone
    assert sorted(n for batch in store.batches(x=SITES[0]) for n in numbers(batch, rows_of)) == sorted(rows_of.values())
    for name in ("complete.json", "end.json"):
        shutil.copy(big / name, folder / name)
    assert store.complete and torch.equal(store.rows(slice(None)).values[1], whole.rows(slice(None)).values[1])
    with pytest.raises(ConfigError, match="shards"):
        store.batches(x=SITES[0], state=state)


# -- stored and streamed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("packing", "unit"), [("concat", 1000), ("block_diagonal", 1000), ("one_doc", 8)])
def test_streamed_and_stored_rows_are_the_same(packing: str, unit: int, tmp_path: Path) -> None:
    # Where documents share rows: the same forwards, as one unit is everything. Where they do not, forwards may be
    # laid out otherwise, and rows are the same but for rounding.
    tokens: TokenSource = source(random_texts(60), packing=packing)
    take(tmp_path / "store", tokens, unit_documents=unit)
    sizes = {"batch_size": 30, "buffer_tokens": 100}
    stored = ActivationStore.open(tmp_path / "store", **sizes)  # type: ignore[arg-type]
    streamed = ActivationStore.stream(manager("Llama"), tokens, SITES, **sizes)  # type: ignore[arg-type]
    found = []
    for store in (stored, streamed):
        served: dict[tuple[int, int], list[Tensor]] = {}
        for batch in store.batches(x=SITES[0], target=SITES[1]):
            assert batch.target is not None and batch.tokens is not None and batch.positions is not None
            rows = torch.cat([batch.x, batch.target], 1)
            for key, row in zip(zip(batch.tokens.tolist(), batch.positions.tolist(), strict=True), rows, strict=True):
                served.setdefault(key, []).append(row)
        found.append(served)
    one, other = found
    assert one.keys() == other.keys() and sum(map(len, one.values())) == stored.n_tokens > 600
    for key, rows_here in one.items():
        a, b = (
            torch.stack(sorted(rows, key=lambda row: row.round(decimals=3).tolist()))
            for rows in (rows_here, other[key])
        )
        assert torch.equal(a, b) if packing != "one_doc" else torch.allclose(a, b, atol=1e-4), key
