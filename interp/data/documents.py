"""Where text comes from: lists, text files, JSON lines, folders of them, and Hugging Face datasets."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, Literal

from interp.core.errors import ConfigError, DataError, nearest

__all__ = ["Documents", "Part"]

Part = Literal["all", "train", "held_out"]

_TEXT = (".txt", ".md")
_LINES = (".jsonl", ".ndjson")
_HUB = "hf://"


@dataclass(frozen=True)
class Documents:
    """A re-readable stream of documents, each with its index in the source.

    Args:
        source: a list of texts; a path to a text file (one document), a JSON-lines file (one document a line) or a
            folder of both (in the order of their paths); "hf://owner/name" or "hf://owner/name/config" on the hub; a
            dataset whose rows are dicts; or anything that gives documents by their number, of which only those of this
            part and rank are asked for. Nothing is downloaded unless "hf://" is asked for.
        field: the key that holds the text in JSON lines and datasets.
        split: the split of a hub dataset.
        part: "all", "held_out" (every `hold_out_every`-th document: those with index ≡ −1), or "train" (the others).
        hold_out_every: distance, in documents, between two held-out ones.
        rank: which of `world_size` readers this is; each takes every `world_size`-th document of the part.
        world_size: how many readers share the source.

    Raises:
        ConfigError: a number out of range.
    """

    source: Any
    field: str = "text"
    split: str = "train"
    part: Part = "all"
    hold_out_every: int = 20
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(f"rank {self.rank} of world_size {self.world_size}: expected 0 ≤ rank < world_size")
        if self.hold_out_every < 2:
            raise ConfigError(f"hold_out_every is {self.hold_out_every}; at least 2, or nothing is left to train on")
        if self.part not in ("all", "train", "held_out"):
            raise ConfigError(f"part {self.part!r}: expected 'all', 'train' or 'held_out'")

    def read(self, start: int = 0) -> Iterator[tuple[int, str]]:
        """Yield (index, text) of this part's and this rank's documents, from index `start` on.

        Args:
            start: index of the first document that may be yielded, counted in the whole source.

        Raises:
            DataError: the source is missing, is empty, or holds something that is not text.
        """
        found = False
        for index, text in self._all(start):
            found = True
            if text is not None:
                yield index, text
        if not found and start == 0:
            raise DataError(f"{self.describe()} holds no document; give a source with at least one text")

    def describe(self) -> str:
        """A short name of the source for messages and records."""
        if isinstance(self.source, str | Path):
            return str(self.source)
        if isinstance(self.source, list | tuple):
            return f"a list of {len(self.source)} texts"
        return type(self.source).__name__

    def _mine(self, index: int) -> bool:
        held_out_before, is_held_out = index // self.hold_out_every, (index + 1) % self.hold_out_every == 0
        if self.part == "all":
            order = index
        elif (self.part == "held_out") != is_held_out:
            return False
        else:
            order = held_out_before if is_held_out else index - held_out_before
        return order % self.world_size == self.rank

    def _all(self, start: int) -> Iterator[tuple[int, str | None]]:
        """Every document from `start` on; None for the text of one that is another's."""
        source = self.source
        if isinstance(source, str) and source.startswith(_HUB):
            source = _hub_dataset(source, self.split)
        if isinstance(source, str | Path):
            rows: Iterable[Any] = islice(_from_path(Path(source), self.field), start, None)
        elif isinstance(source, Sized) and hasattr(source, "__getitem__") and not isinstance(source, Mapping):
            return self._picked(source, range(start, len(source)))
        elif hasattr(source, "__getitem__") and not isinstance(source, Iterable):
            return self._picked(source, count(start))
        elif hasattr(source, "skip") and start:
            rows = source.skip(start)
        elif isinstance(source, Iterator | Mapping) or not isinstance(source, Iterable):
            kind = type(source).__name__
            hint = f"; choose one of {list(source)}" if isinstance(source, Mapping) else ""
            raise DataError(
                f"documents come from a list, a path or a dataset, which can be read twice; got {kind}{hint}"
            )
        else:
            rows = islice(source, start, None)
        return ((i, self._text(row, i) if self._mine(i) else None) for i, row in enumerate(rows, start))

    def _picked(self, source: Any, indices: Iterable[int]) -> Iterator[tuple[int, str | None]]:
        """Of a source that gives documents by number, those of others are not even asked for."""
        return ((i, self._text(source[i], i) if self._mine(i) else None) for i in indices)

    def _text(self, row: Any, index: int) -> str:
        return row if isinstance(row, str) else _field_of(row, self.field, f"document {index} of {self.describe()}")


def _field_of(row: Any, field: str, place: str) -> str:
    if not isinstance(row, dict):
        raise DataError(f"{place} is a {type(row).__name__}; expected a text, or an object with a {field!r} field")
    if field not in row:
        there = ", ".join(map(str, row)) or "none"
        raise DataError(f"{place} has no field {field!r}; its fields are: {there}. Set the field that holds the text")
    text = row[field]
    if not isinstance(text, str):
        raise DataError(f"{place}: field {field!r} holds a {type(text).__name__}, not text; choose another field")
    return text


def _from_path(path: Path, field: str) -> Iterator[str]:
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in _TEXT + _LINES and p.is_file())
        if not files:
            raise DataError(f"folder {path} holds no {', '.join(_TEXT + _LINES)} file; give a folder of text files")
        for file in files:
            yield from _from_path(file, field)
    elif not path.exists():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = nearest(path.name, beside) or "for a dataset on the hub write hf://owner/name"
        raise DataError(f"no file or folder {path}; {hint}")
    elif path.suffix.lower() in _LINES:
        yield from _lines(path, field)
    elif path.suffix.lower() in _TEXT:
        yield _decoded(path.read_bytes(), str(path))
    else:
        kind = path.suffix or "a file without suffix"
        raise DataError(f"{path}: cannot read {kind}; expected {', '.join(_TEXT + _LINES)}")


def _lines(path: Path, field: str) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(_decoded(line, place))
            except json.JSONDecodeError as err:
                fault = f"{err.msg} at column {err.colno}"
                raise DataError(f"{place} is not JSON ({fault}); one object a line is expected") from err
            yield row if isinstance(row, str) else _field_of(row, field, place)


def _decoded(raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as err:
        raise DataError(f"{place} is not UTF-8 text (byte {err.start}: {err.reason}); convert it to UTF-8") from err


def _hub_dataset(name: str, split: str) -> Any:
    from datasets import load_dataset

    owner, _, rest = name.removeprefix(_HUB).partition("/")
    repo, _, config = rest.partition("/")
    if not owner or not repo:
        raise DataError(f"{name!r} is not a dataset on the hub; write hf://owner/name or hf://owner/name/config")
    try:
        return load_dataset(f"{owner}/{repo}", config or None, split=split, streaming=True)
    except (OSError, ValueError) as err:
        raise DataError(
            f"dataset {owner}/{repo} (split {split!r}) cannot be opened: {type(err).__name__}: {err}. "
            "Without a network, save it as a .jsonl file and give that path"
        ) from err
