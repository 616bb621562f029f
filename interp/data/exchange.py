"""Stores of activations as Hugging Face datasets, such as SAELens caches, and such datasets as stores."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from interp import __version__
from interp.core.disk import appear
from interp.core.errors import ArtifactError, ConfigError, DataError
from interp.core.site import Site
from interp.data.codec import codec_named
from interp.data.manifest import Manifest, SiteLayout, TextLayout
from interp.data.shard import Shard, ShardWriter
from interp.data.stored import StoredActivations
from interp.data.storefolder import StoreFolder

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["from_saelens_dataset", "to_hf_dataset"]

_UNKNOWN = "unknown"
_BATCH_BYTES = 1 << 26  # of activations that are held at once
_FILE_BYTES = 1 << 29  # of an Arrow file
_IDS, _SPECIAL, _DOCUMENT = "token_ids", "special", "document"

# Rows of a dataset before they have a form: name of the column → numbers of each token.
_Tokens = dict[str, Tensor]


def to_hf_dataset(
    store: StoredActivations,
    *,
    site: str | Site | None = None,
    rows: Literal["context", "document"] = "context",
    folder: str | Path | None = None,
) -> "Dataset":
    """Return a store as a Hugging Face dataset, with the columns that SAELens reads from a cache.

    Each site is a column of its TransformerLens name, `Array2D` [pos d] with heads flattened; beside it lie "token_ids"
    and "special" [pos]. Numbers are float32, or float16 where the store keeps that; gradients are left out.

    With "context", every row has the `ctx` tokens that the manifest names, as SAELens wants: the contexts that the
    model saw, special tokens included. What is shorter than that at the end of a shard is put together to further rows,
    and fewer than `ctx` tokens are left out at the very end; with packing "one_doc" every row is of that kind. With
    "document", every row has one document's own tokens, however many, and "document" says which it is.

    Args:
        store: local or remote.
        site: one site; by default all.
        rows: what a row is.
        folder: to write, as `Dataset.save_to_disk` would, a little at a time: SAELens takes it as
            `cached_activations_path`. By default the dataset is made in memory, `4 · n_tokens · d` bytes.

    Returns:
        The dataset.

    Raises:
        ConfigError: a site that the store does not hold, or another kind of rows.
        DataError: the store has no row of this kind.
        ArtifactError: the folder holds something.
    """
    if rows not in ("context", "document"):
        raise ConfigError(f"rows={rows!r}: expected 'context' or 'document'")
    if site is not None and Site(site) not in store.sites:
        raise ConfigError(f"{store.folder} holds {[s.short for s in store.sites]}, not {Site(site).short}")
    if folder is not None and Path(folder).exists() and (not Path(folder).is_dir() or any(Path(folder).iterdir())):
        raise ArtifactError(f"{folder} already holds something; choose another folder")
    sites = store.sites if site is None else [Site(site)]
    layouts = [layout for layout in store.manifest.sites if layout.name in {s.name for s in sites}]
    ctx = store.manifest.text.ctx
    groups = _contexts(store, layouts, ctx) if rows == "context" else _documents(store, layouts)
    features = _features(layouts, ctx if rows == "context" else None, store.manifest.dtype)
    found = _written(groups, features, None if folder is None else Path(folder))
    if not len(found):
        raise DataError(f"{store.folder} has {store.n_rows} rows, not one {rows} of tokens; capture more text")
    return found


def from_saelens_dataset(
    dataset: "str | Path | Dataset",
    folder: str | Path,
    *,
    dtype: Literal["float32", "bfloat16", "float16", "int8_row", "int8_channel"] | None = None,
    special_ids: Sequence[int] = (),
    model: str = _UNKNOWN,
    config_hash: str = _UNKNOWN,
    tokenizer: str = _UNKNOWN,
    unit_bytes: int = 2**26,
) -> StoredActivations:
    """Write a dataset of activations, such as a SAELens cache or what `to_hf_dataset` gives, as a store.

    Every `Array2D` column is a site by its name; one row is one document, by its number or by its column "document".
    Token ids are those of "token_ids", −1 where there are none. Special tokens are those of the column "special",
    else those whose id is named here: SAELens' caches do not say. Positions count a row's other tokens. Nobody can tell
    from such a dataset what the model was, so the store cannot be extended by `interp.capture`.

    Args:
        dataset: a folder of `Dataset.save_to_disk`, or the dataset itself.
        folder: to write; it must hold nothing yet.
        dtype: in which activations are kept; by default the dataset's own.
        special_ids: ids of tokens that should not count, such as BOS.
        model: its name or path.
        config_hash: of its configuration.
        tokenizer: digest of its vocabulary.
        unit_bytes: bytes that a shard should have, about; whole rows.

    Returns:
        The store.

    Raises:
        DataError: no dataset, no `Array2D` column, rows or columns that do not fit each other.
        SiteError: a column whose name is no site.
        ArtifactError: the folder holds something.
    """
    held = _opened(dataset)
    layouts, kept, ctx = _layouts(held)
    if unit_bytes < 1:
        raise ConfigError(f"unit_bytes={unit_bytes}: expected at least 1")
    text = TextLayout(
        source=str(dataset) if isinstance(dataset, str | Path) else type(dataset).__name__,
        fingerprint=str(getattr(held, "_fingerprint", _UNKNOWN)),
        part="all",
        hold_out_every=0,
        ctx=ctx,
        rows=1,
        packing=_UNKNOWN,
        bos=False,
        tokenizer=tokenizer,
        unit_documents=1,
    )
    manifest = Manifest(
        writer=__version__,
        model=model,
        revision=None,
        config_hash=config_hash,
        weights=_UNKNOWN,
        model_dtype=_UNKNOWN,
        sites=tuple(layouts),
        dtype=dtype or kept,
        gradient=None,
        text=text,
    )
    unit = max(1, round(unit_bytes / (manifest.bytes_per_row * ctx)))
    manifest = manifest.model_copy(update={"text": text.model_copy(update={"unit_documents": unit})})
    store = StoreFolder(Path(folder))
    store.begin(manifest, resume=False, free_unit=False)
    _write_units(held, store, manifest, torch.tensor(sorted(special_ids), dtype=torch.long))
    return StoredActivations(folder)


# -- a store's rows ---------------------------------------------------------------------------------------------


def _contexts(store: StoredActivations, layouts: list[SiteLayout], ctx: int) -> Iterator[list[_Tokens]]:
    """Whole contexts of each shard; then what was left of all, cut alike."""
    left: list[_Tokens] = []
    for shard in store.shards:
        whole = shard.rows - shard.rows % ctx
        yield from _batched((_columns(shard, layouts, slice(i, i + ctx)) for i in range(0, whole, ctx)), layouts)
        if whole < shard.rows:
            end = _columns(shard, layouts, slice(whole, shard.rows))
            left.append({name: column.clone() for name, column in end.items()})
            if sum(len(part[_IDS]) for part in left) >= ctx:
                joined = {name: torch.cat([part[name] for part in left]) for name in left[0]}
                yield [{name: column[:ctx] for name, column in joined.items()}]
                left = [{name: column[ctx:] for name, column in joined.items()}]


def _documents(store: StoredActivations, layouts: list[SiteLayout]) -> Iterator[list[_Tokens]]:
    """Each document's own tokens in order; a shard has whole documents."""
    for shard in store.shards:
        yield from _batched(_of_shard(shard, layouts), layouts)


def _of_shard(shard: Shard, layouts: list[SiteLayout]) -> Iterator[_Tokens]:
    position = shard.column("position").long()
    own = (position >= 0).nonzero()[:, 0]
    own = own[position[own].argsort(stable=True)]
    documents = shard.column("document")[own]
    order = documents.argsort(stable=True)
    numbers, counts = documents[order].unique_consecutive(return_counts=True)
    for number, mine in zip(numbers, own[order].split(counts.tolist()), strict=True):
        yield {**_columns(shard, layouts, mine), _DOCUMENT: number}


def _columns(shard: Shard, layouts: list[SiteLayout], index: Tensor | slice) -> _Tokens:
    found = {layout.name: shard.select(layout.name, index) for layout in layouts}
    return {**found, _IDS: shard.column("ids")[index], _SPECIAL: shard.column("special")[index] != 0}


def _batched(groups: Iterator[_Tokens], layouts: list[SiteLayout]) -> Iterator[list[_Tokens]]:
    """So many rows at once that they take a bounded memory."""
    held: list[_Tokens] = []
    tokens, most = 0, _BATCH_BYTES / (4 * sum(layout.width for layout in layouts))
    for group in groups:
        held.append(group)
        tokens += len(group[_IDS])
        if tokens >= most:
            yield held
            held, tokens = [], 0
    if held:
        yield held


# -- a dataset's files ------------------------------------------------------------------------------------------


def _features(layouts: list[SiteLayout], ctx: int | None, dtype: str) -> Any:
    from datasets import Array2D, Features, List, Value

    kind = "float16" if dtype == "float16" else "float32"
    found: dict[str, Any] = {layout.name: Array2D(shape=(ctx, layout.width), dtype=kind) for layout in layouts}
    length = -1 if ctx is None else ctx
    found[_IDS] = List(Value("int32"), length=length)
    found[_SPECIAL] = List(Value("bool"), length=length)
    if ctx is None:
        found[_DOCUMENT] = Value("int64")
    return Features(found)


def _written(groups: Iterator[list[_Tokens]], features: Any, folder: Path | None) -> "Dataset":
    from datasets import Dataset, concatenate_datasets, load_from_disk

    if folder is None:
        parts = [Dataset.from_dict(_batch(group, features), features=features) for group in groups]
        return concatenate_datasets(parts) if parts else Dataset.from_dict({name: [] for name in features}, features)
    folder.parent.mkdir(parents=True, exist_ok=True)
    appear(folder, lambda draft: _save(groups, features, draft))
    return load_from_disk(str(folder))


def _save(groups: Iterator[list[_Tokens]], features: Any, draft: Path) -> None:
    """Write Arrow files with the two records that `load_from_disk` wants."""
    from datasets import DatasetInfo
    from datasets.arrow_writer import ArrowWriter

    files: list[str] = []
    with ExitStack() as stack:
        writer, held = None, 0
        for group in groups:
            if writer is None:
                files.append(f"data-{len(files):05d}.arrow")
                writer, held = ArrowWriter(path=str(draft / files[-1]), features=features), 0
                stack.callback(writer.close)
            writer.write_batch(_batch(group, features))
            held += sum(column.nbytes for row in group for column in row.values())
            if held >= _FILE_BYTES:
                writer.finalize()
                writer = None
        if writer is not None:
            writer.finalize()
    if not files:
        raise DataError("the store has no such row; capture more text")
    DatasetInfo(features=features).write_to_directory(str(draft))
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in files],
        "_fingerprint": draft.name.split(".")[-2][:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (draft / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


def _batch(group: list[_Tokens], features: Any) -> dict[str, Any]:
    def column(name: str) -> Any:
        if name in (_IDS, _SPECIAL):
            return [row[name].numpy() for row in group]
        if name == _DOCUMENT:
            return [int(row[name]) for row in group]
        kind = getattr(torch, features[name].dtype)
        return [row[name].to(kind).numpy() for row in group]

    return {name: column(name) for name in features}


# -- a dataset's rows -------------------------------------------------------------------------------------------


def _opened(dataset: Any) -> Any:
    from datasets import Dataset, load_from_disk

    held = dataset
    if isinstance(dataset, str | Path):
        if not Path(dataset).is_dir():
            raise DataError(f"no folder {dataset}; give what `Dataset.save_to_disk` has written, or a dataset")
        try:
            held = load_from_disk(str(dataset))
        except (OSError, ValueError, KeyError) as err:
            raise DataError(f"{dataset} is no saved dataset: {err}") from err
    if not isinstance(held, Dataset):
        raise DataError(f"expected a dataset of rows, got {type(held).__name__}; of a DatasetDict give one split")
    if not len(held):
        raise DataError("the dataset has no row; give one with activations")
    return held


def _layouts(held: Any) -> tuple[list[SiteLayout], str, int]:
    """The sites of a dataset, the dtype of its numbers, and the tokens of a row (of the first, where they differ)."""
    from datasets import Array2D

    arrays = {name: feature for name, feature in held.features.items() if isinstance(feature, Array2D)}
    if not arrays:
        raise DataError(
            f"the dataset has columns {held.column_names}, none of them Array2D [pos d]; SAELens' caches have one "
            "named like 'blocks.2.hook_resid_post'"
        )
    kinds = {feature.dtype for feature in arrays.values()}
    if not kinds <= {"float16", "float32", "float64"}:
        raise DataError(f"the activations have dtypes {sorted(kinds)}; expected float16, float32 or float64")
    lengths = {feature.shape[0] for feature in arrays.values()}
    if len(lengths) > 1:
        raise DataError(
            f"the columns {list(arrays)} have rows of {sorted(map(str, lengths))} tokens; expected the same"
        )
    layouts = [SiteLayout(name=Site(name).name, shape=(int(f.shape[1]),)) for name, f in arrays.items()]
    if [layout.name for layout in layouts] != list(arrays):
        raise DataError(f"the columns {list(arrays)} must have TransformerLens' names: {[x.name for x in layouts]}")
    ctx = lengths.pop() or len(held[0][next(iter(arrays))])
    return layouts, "float16" if kinds == {"float16"} else "float32", int(ctx)


def _write_units(held: Any, store: StoreFolder, manifest: Manifest, special_ids: Tensor) -> None:
    names = [site.name for site in manifest.sites]
    columns = [name for name in (*names, _IDS, _SPECIAL, _DOCUMENT) if name in held.column_names]
    arrays = held.with_format("numpy", columns=columns)
    unit = manifest.text.unit_documents
    codec = codec_named(manifest.dtype)
    units = math.ceil(len(held) / unit)
    for number in range(units):
        first = number * unit
        batch = arrays[first : first + unit]
        known, values, documents = _unit(batch, names, first)
        if special_ids.numel() and _SPECIAL not in batch:
            known["special"] = torch.isin(known["ids"], special_ids)
        known["position"] = _positions(known["document"], known["special"])
        writer = ShardWriter(store.place(number), {("values", name): codec for name in names})
        try:
            writer.append(known, {("values", n): x if codec.scale else x.to(codec.dtype) for n, x in values.items()})
            writer.close({"first_document": min(documents), "end_document": max(documents) + 1})
        finally:
            writer.drop()
    store.ends_at(units)
    store.finish(units)


def _unit(batch: Mapping[str, Any], names: list[str], first: int) -> tuple[_Tokens, _Tokens, list[int]]:
    """The tokens of some rows, one after the other: what is known of them, activations, and the rows' documents."""
    lengths = [len(row) for row in batch[names[0]]]
    documents = [int(n) for n in batch[_DOCUMENT]] if _DOCUMENT in batch else [*range(first, first + len(lengths))]
    values = {name: torch.from_numpy(np.concatenate([np.asarray(row) for row in batch[name]])) for name in names}
    total = sum(lengths)

    def of(name: str, otherwise: int) -> Tensor:
        if name not in batch:
            return torch.full((total,), otherwise)
        rows = [np.asarray(row) for row in batch[name]]
        if [len(row) for row in rows] != lengths:
            raise DataError(f"rows {first} to {first + len(rows) - 1}: {name!r} has not one entry for each token")
        return torch.from_numpy(np.concatenate(rows)).long()

    if any(len(x) != total for x in values.values()):
        raise DataError(f"rows {first} to {first + len(lengths) - 1}: the sites have different numbers of tokens")
    document = torch.tensor(documents).repeat_interleave(torch.tensor(lengths))
    return {"ids": of(_IDS, -1), "special": of(_SPECIAL, 0) != 0, "document": document}, values, documents


def _positions(document: Tensor, special: Bool[Tensor, "row"]) -> Tensor:
    """The number of each token among its row's that count; −1 at special ones."""
    counts = (~special).long()
    before = counts.cumsum(0) - counts
    starts = torch.cat([torch.ones(1, dtype=torch.bool), document[1:] != document[:-1]])[: len(document)]
    first = before[starts.nonzero()[:, 0]][starts.long().cumsum(0) - 1]
    return torch.where(special, -1, before - first)
