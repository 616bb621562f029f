"""Stores as datasets and datasets as stores, token by token; captures that are sent while they run."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from interp.core.errors import ArtifactError, ConfigError, DataError, SiteError
from interp.data.capture import CaptureOptions, capture
from interp.data.exchange import from_saelens_dataset, to_hf_dataset
from interp.data.remote import Uploader, open_remote, upload_store
from interp.data.stored import StoredActivations
from interp.data.tokens import TokenSource
from tests.families import manager, word_tokenizer

SITES = ["0.resid_post", "1.z"]
NAMES = ["blocks.0.hook_resid_post", "blocks.1.attn.hook_z"]
CTX = 8
SMALL: dict[str, Any] = {"batch_size": 16, "buffer_tokens": 32}


def texts(n: int = 30) -> list[str]:
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(1, 20, (n,), generator=generator).tolist()
    return [" ".join(f"w{i}" for i in torch.randint(1, 120, (k,), generator=generator).tolist()) for k in sizes]


def tokens(**options: Any) -> TokenSource:
    return TokenSource(texts(), word_tokenizer(), **{"ctx": CTX, "rows": 4, "bos": True, **options})


def captured(folder: Path, *, dtype: Any = "float32", unit: int = 7, **options: Any) -> StoredActivations:
    plan = CaptureOptions(dtype=dtype, unit_documents=unit)
    assert capture(manager("Llama"), tokens(**options), SITES, folder, plan, progress=False).status == "complete"
    return StoredActivations(folder, **SMALL)


def values(store: StoredActivations, site: int) -> Tensor:
    return store.rows(slice(0, store.n_rows)).values[site].float()


def column(dataset: Any, name: str) -> Tensor:
    """A dataset's column with the tokens of all rows one after the other."""
    return torch.cat([torch.as_tensor(row) for row in dataset.with_format("numpy")[name][:]])


# -- to a dataset -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8_row"])
@pytest.mark.parametrize("on_disk", [False, True])
def test_contexts_are_the_models_own_rows(tmp_path: Path, dtype: str, on_disk: bool) -> None:
    store = captured(tmp_path / "store", dtype=dtype, unit=3)
    dataset = to_hf_dataset(store, folder=tmp_path / "hf" if on_disk else None)
    assert dataset.column_names == [*NAMES, "token_ids", "special"]
    assert dataset.features[NAMES[1]].shape == (CTX, 32)  # heads flattened, as SAELens does
    # The contexts that the text's blocks have, unit by unit; short ones come joined at the end.
    source = tokens()
    whole: list[Tensor] = []
    short: list[Tensor] = []
    for first in range(0, 30, 3):
        for block in source.pack([(i, t) for i, t in source.documents.read() if first <= i < first + 3]):
            for ids, mask in zip(block.ids, block.mask, strict=True):
                (whole if bool(mask.all()) else short).append(ids[mask])
    got = [torch.as_tensor(row) for row in dataset["token_ids"]]
    rows = sum(len(ids) for ids in short) // CTX
    assert rows > 2 and len(dataset) == len(whole) + rows == store.n_rows // CTX
    joined = list(torch.cat(short)[: rows * CTX].split(CTX))
    assert sorted(row.tolist() for row in got) == sorted(row.tolist() for row in [*whole, *joined])
    assert torch.equal(column(dataset, "special"), column(dataset, "token_ids") == word_tokenizer().bos_token_id)
    # Every row of numbers is the store's, at its token.
    where: list[int] = []
    left: list[int] = []
    for low, high in itertools.pairwise(store.offsets.tolist()):
        end = high - (high - low) % CTX
        where, left = where + list(range(low, end)), left + list(range(end, high))
        if len(left) >= CTX:
            where, left = where + left[:CTX], left[CTX:]
    assert torch.equal(column(dataset, "token_ids"), store.column("ids")[where])
    for site, name in enumerate(NAMES):
        assert torch.equal(column(dataset, name).float(), values(store, site)[where])


def test_documents_are_the_stores_documents(tmp_path: Path) -> None:
    store = captured(tmp_path / "store")
    dataset = to_hf_dataset(store, rows="document", site="1.z", folder=tmp_path / "hf")
    assert dataset.column_names == [NAMES[1], "token_ids", "special", "document"]
    assert dataset["document"][:] == list(range(30))
    assert sum(len(ids) for ids in dataset["token_ids"]) == store.n_tokens
    for row in dataset.with_format("numpy"):
        document = store.document(int(row["document"]))
        assert document.ids.tolist() == list(row["token_ids"])
        assert torch.equal(document.values[NAMES[1]].flatten(1), torch.as_tensor(row[NAMES[1]]))


def test_one_doc_rows_lose_fewer_tokens_than_a_context(tmp_path: Path) -> None:
    store = captured(tmp_path / "store", packing="one_doc")
    dataset = to_hf_dataset(store)
    assert len(dataset) == store.n_rows // CTX
    assert torch.equal(column(dataset, "token_ids").long().sort().values[-5:], store.column("ids").sort().values[-5:])


def test_a_large_store_is_cut_into_batches_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = captured(tmp_path / "store")
    whole = to_hf_dataset(store)
    monkeypatch.setattr("interp.data.exchange._BATCH_BYTES", 3 * CTX * 64 * 4)
    monkeypatch.setattr("interp.data.exchange._FILE_BYTES", 8 * CTX * 64 * 4)
    cut = to_hf_dataset(store, folder=tmp_path / "hf")
    assert len(list((tmp_path / "hf").glob("*.arrow"))) > 3
    for name in whole.column_names:
        assert torch.equal(column(whole, name), column(cut, name))


def test_a_remote_store_gives_the_same_dataset(tmp_path: Path) -> None:
    store = captured(tmp_path / "store")
    upload_store(tmp_path / "store", tmp_path / "there", progress=False)
    one, other = to_hf_dataset(store), to_hf_dataset(open_remote(tmp_path / "there", tmp_path / "cache", **SMALL))
    for name in one.column_names:
        assert torch.equal(column(one, name), column(other, name))


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_a_dataset_is_refused(tmp_path: Path) -> None:
    store = captured(tmp_path / "store")
    with pytest.raises(ConfigError, match=r"not 1\.resid_post"):
        to_hf_dataset(store, site="1.resid_post")
    with pytest.raises(ConfigError, match="rows='tokens'"):
        to_hf_dataset(store, rows="tokens")  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match="already holds something"):
        to_hf_dataset(store, folder=tmp_path / "store")
    capture(
        manager("Llama"), TokenSource(["w1 w2"], word_tokenizer(), ctx=CTX), SITES, tmp_path / "tiny", progress=False
    )
    for folder in (None, tmp_path / "none"):
        with pytest.raises(DataError, match="capture more text"):
            to_hf_dataset(StoredActivations(tmp_path / "tiny", **SMALL), folder=folder)
    assert not (tmp_path / "none").exists()


# -- from a dataset ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_documents_come_back_as_they_were(tmp_path: Path, dtype: Any) -> None:
    store = captured(tmp_path / "store", dtype=dtype)
    to_hf_dataset(store, rows="document", folder=tmp_path / "hf")
    back = from_saelens_dataset(tmp_path / "hf", tmp_path / "back", dtype=dtype, unit_bytes=4000, model="tiny")
    assert back.complete and len(back.shards) > 3 and back.n_tokens == store.n_tokens == back.n_rows
    assert (back.manifest.model, back.manifest.dtype, back.manifest.config_hash) == ("tiny", dtype, "unknown")
    assert not [fault for shard in back.shards for fault in shard.check()]
    for index in range(30):
        one, other = store.document(index), back.document(index)
        assert torch.equal(one.ids, other.ids) and torch.equal(one.positions, other.positions)
        for name in NAMES:
            assert torch.equal(one.values[name].flatten(1), other.values[name])


def test_contexts_come_back_in_order_and_special_tokens_stay_out(tmp_path: Path) -> None:
    store = captured(tmp_path / "store")
    dataset = to_hf_dataset(store)
    back = from_saelens_dataset(dataset, tmp_path / "back")
    assert torch.equal(values(back, 0), column(dataset, NAMES[0]))
    assert torch.equal(back.column("ids"), column(dataset, "token_ids"))
    assert torch.equal(back.column("special") != 0, column(dataset, "special"))
    assert torch.equal(back.column("document"), torch.arange(len(dataset)).repeat_interleave(CTX))
    served = torch.cat([batch.tokens for batch in back.batches(x=SITES[0]) if batch.tokens is not None])
    counted = column(dataset, "token_ids")[~column(dataset, "special")]
    assert torch.equal(served.sort().values, counted.long().sort().values)
    again = to_hf_dataset(back)
    for name in dataset.column_names:
        assert torch.equal(column(again, name), column(dataset, name))


def test_positions_count_the_tokens_of_a_row_that_count(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {NAMES[0]: datasets.Array2D((4, 2), "float32"), "token_ids": datasets.Sequence(datasets.Value("int32"), 4)}
    )
    x = torch.arange(24.0).view(3, 4, 2)
    ids = [[0, 5, 0, 6], [7, 8, 9, 0], [0, 0, 1, 2]]
    dataset = datasets.Dataset.from_dict({NAMES[0]: x.numpy(), "token_ids": ids}, features=features)
    back = from_saelens_dataset(dataset, tmp_path / "back", special_ids=[0], unit_bytes=1)
    assert len(back.shards) == 3 and back.n_tokens == 7
    assert back.column("position").tolist() == [-1, 0, -1, 1, 0, 1, 2, -1, -1, -1, 0, 1]
    assert back.column("special").tolist() == [1, 0, 1, 0, 0, 0, 0, 1, 1, 1, 0, 0]
    assert torch.equal(back.document(2).values[NAMES[0]], x[2, 2:]) and back.document(1).ids.tolist() == [7, 8, 9]
    bare = from_saelens_dataset(dataset.remove_columns("token_ids"), tmp_path / "bare")
    assert bare.column("ids").tolist() == [-1] * 12 and bare.n_tokens == 12
    assert torch.equal(values(bare, 0), x.flatten(0, 1))


def test_a_dataset_that_is_none_of_activations_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    import datasets

    good = to_hf_dataset(captured(tmp_path / "store"))
    with pytest.raises(DataError, match="none of them Array2D"):
        from_saelens_dataset(datasets.Dataset.from_dict({"text": ["a"]}), tmp_path / "new")
    with pytest.raises(DataError, match="no folder"):
        from_saelens_dataset(tmp_path / "nowhere", tmp_path / "new")
    with pytest.raises(DataError, match="is no saved dataset"):
        from_saelens_dataset(tmp_path / "store", tmp_path / "new")
    with pytest.raises(DataError, match="no row"):
        from_saelens_dataset(good.select([]), tmp_path / "new")
    with pytest.raises(SiteError, match="unknown site"):
        from_saelens_dataset(good.rename_column(NAMES[0], "my_activations"), tmp_path / "new")
    with pytest.raises(DataError, match="must have TransformerLens' names"):
        from_saelens_dataset(good.rename_column(NAMES[0], "0.resid_post"), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ArtifactError, match="already holds"):
        from_saelens_dataset(good, tmp_path / "store")


# -- beside a capture -------------------------------------------------------------------------------------------


def test_a_capture_is_sent_while_it_runs_and_read_from_there_to_the_bit(tmp_path: Path) -> None:
    reference, folder, there = captured(tmp_path / "reference"), tmp_path / "store", tmp_path / "there"
    options = CaptureOptions(dtype="float32", unit_documents=7)
    with Uploader(folder, there, keep_local=False) as uploader:
        done = capture(manager("Llama"), tokens(), SITES, folder, options, progress=False)
    assert done.status == "complete" and uploader.finish().status == "complete"
    assert {p.name for p in (folder / "shards").rglob("*.*") if p.is_file()} == {"shard.json"}
    far = open_remote(there, tmp_path / "cache", **SMALL)
    for one, other in zip(reference.batches(x=SITES[0]), far.batches(x=SITES[0]), strict=True):
        assert torch.equal(one.x, other.x)
    # What was made is known as made.
    again = capture(manager("Llama"), tokens(), SITES, folder, options, resume=True, progress=False)
    assert again.status == "complete" and again.rows == 0
