"""What tells one text, or one tokenizer, from another."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.core.disk import digest
from interp.data.documents import Documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["text_digest", "tokenizer_digest"]

_END = 1 << 16  # bytes of a file's beginning and end that are looked at
_FIRST = 16  # documents that are, of what is no file


def text_digest(documents: Documents) -> str:
    """Digest what a text is: of files the sizes, beginnings and ends; else a list's texts, or the first documents.

    So a change in the middle of a large file that leaves its size alone is not seen.

    Args:
        documents: the text; its part does not matter.
    """
    source, how = documents.source, json.dumps([documents.field, documents.split, documents.rank, documents.world_size])
    if isinstance(source, str | Path) and Path(source).exists():
        root = Path(source)
        files = sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]
        return digest(how, *(part for file in files for part in _of_file(file, root)))
    if isinstance(source, Sequence) and not isinstance(source, str):
        return digest(how, *map(_plain, source))
    known = getattr(source, "_fingerprint", None)
    first = Documents(source, field=documents.field, split=documents.split).read()
    texts = [_plain(text) for _, text in islice(first, _FIRST)]
    return digest(how, str(source) if isinstance(source, str) else type(source).__name__, str(known), *texts)


def tokenizer_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Digest a tokenizer's vocabulary and special tokens."""
    vocab = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return digest(vocab, json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str))


def _of_file(file: Path, root: Path) -> Iterable[str]:
    size = file.stat().st_size
    ends = hashlib.sha256()
    with file.open("rb") as held:
        ends.update(held.read(_END))
        if size > _END:
            held.seek(max(_END, size - _END))
            ends.update(held.read())
    return str(file.relative_to(root)), str(size), ends.hexdigest()


def _plain(row: Any) -> str:
    text = row if isinstance(row, str) else json.dumps(row, sort_keys=True, default=str)
    # With its length: else it would not show where one document ends.
    return f"{len(text)}:{text}"
