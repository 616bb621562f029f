"""Text to blocks of tokens: BOS, packing, and beside every token its document, position and whether it is special."""

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm import tqdm

from interp.core.errors import ConfigError, DataError
from interp.core.text import Tokens, pad_id_of, special_mask
from interp.data.documents import Documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Cursor", "Packing", "TokenBlock", "TokenSource", "token_bar", "watched_blocks"]

Packing = Literal["concat", "block_diagonal", "one_doc"]

_SOON = 2.0  # seconds before a bar comes up
_CHUNK = 64  # documents tokenized at once: the most that is held in memory


class Cursor(NamedTuple):
    """Where a stream of tokens stands: the next one is token `offset` of document `document`."""

    document: int = 0
    offset: int = 0


@dataclass(frozen=True)
class TokenBlock:
    """Rows of tokens, ready for `hm.run`, and what each token is.

    Attributes:
        ids: token ids.
        mask: True at real tokens, False at pads.
        special: True at BOS, EOS, pads and every other special token.
        doc: index of each token's document in the source; −1 at pads.
        pos: position among its document's own tokens; −1 at added special tokens and pads.
        position_ids: reset at each document for packing "block_diagonal", else None.
        cursor: where to go on after this block.
    """

    ids: Int[Tensor, "row pos"]
    mask: Bool[Tensor, "row pos"]
    special: Bool[Tensor, "row pos"]
    doc: Int[Tensor, "row pos"]
    pos: Int[Tensor, "row pos"]
    position_ids: Int[Tensor, "row pos"] | None
    cursor: Cursor

    @property
    def inputs(self) -> Tokens:
        """The block as `hm.run` takes it; under "block_diagonal" pads are one more document, not masked."""
        mask = self.mask if self.position_ids is None else torch.ones_like(self.mask)
        return Tokens(self.ids, mask, position_ids=self.position_ids)


@dataclass
class _Row:
    """One row while it is filled: four columns of equal length."""

    ids: list[int] = field(default_factory=list)
    doc: list[int] = field(default_factory=list)
    pos: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)

    def add(self, ids: list[int], doc: int, pos: int | None, *, restart: bool) -> None:
        """Append tokens of one document; `pos` is the first one's, None for an added special token."""
        first = 0 if restart or not self.ids else self.position_ids[-1] + 1
        self.position_ids.extend(range(first, first + len(ids)))
        self.ids.extend(ids)
        self.doc.extend([doc] * len(ids))
        self.pos.extend([-1] * len(ids) if pos is None else range(pos, pos + len(ids)))


class TokenSource:
    """Documents as rows of exactly `ctx` tokens; deterministic, streaming, and resumable at a cursor.

    * "concat": documents one after the other, BOS before each and at the start of each row.
    * "block_diagonal": the same rows with `position_ids` that restart at each document, by which transformers keeps
      attention inside documents.
    * "one_doc": one document a row, cut at `ctx` or padded on the right.

    Without BOS, packed documents are separated by the tokenizer's EOS, where it has one. The last row is padded.
    At most 64 documents are held in memory at once.

    Args:
        documents: a `Documents`, or anything that it takes as a source.
        tokenizer: a Hugging Face tokenizer.
        ctx: tokens per row, BOS included.
        rows: rows per block; the last block may have fewer.
        packing: see above.
        bos: True or False; None is the tokenizer's own habit.

    Raises:
        ConfigError: an unknown packing, a `ctx` that holds no text, or BOS asked of a tokenizer that has none.
    """

    def __init__(
        self,
        documents: Any,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        ctx: int = 128,
        rows: int = 32,
        packing: str = "concat",
        bos: bool | None = None,
    ) -> None:
        self.documents = documents if isinstance(documents, Documents) else Documents(documents)
        self.tokenizer, self.ctx, self.rows, self.packing = tokenizer, ctx, rows, packing
        if packing not in ("concat", "block_diagonal", "one_doc"):
            raise ConfigError(f"packing {packing!r}: expected 'concat', 'block_diagonal' or 'one_doc'")
        if ctx < 2 or rows < 1:
            raise ConfigError(f"ctx is {ctx} tokens and rows {rows}; at least 2 tokens and 1 row are needed")
        self.bos = _bos_habit(tokenizer) if bos is None else bos
        if self.bos and tokenizer.bos_token_id is None:
            raise ConfigError("bos=True, but this tokenizer has no BOS token; pass bos=False or set its bos_token")
        self._first = [int(tokenizer.bos_token_id)] if self.bos else []
        between = None if self.bos else tokenizer.eos_token_id
        self._between = [] if between is None else [int(between)]
        self._pad = pad_id_of(tokenizer)

    def pack(self, documents: Iterable[tuple[int, str]]) -> Iterator[TokenBlock]:
        """Yield some documents, by (index, text), as blocks of their own; none where they hold no token.

        With packing "one_doc" rows of like length come together, the longest first, and blocks are no wider than their
        longest row; so all rows of these documents are held at once.

        Args:
            documents: of any source, in the order of their indices.
        """
        rows = self._rows(Cursor(), self._tokenized(iter(documents)))
        if self.packing != "one_doc":
            yield from self._blocks(rows)
            return
        by_length = sorted(rows, key=lambda row: -len(row[0].ids))
        for chunk in (by_length[i : i + self.rows] for i in range(0, len(by_length), self.rows)):
            yield self._block([row for row, _ in chunk], chunk[-1][1], len(chunk[0][0].ids))

    def blocks(self, cursor: Cursor | None = None) -> Iterator[TokenBlock]:
        """Yield blocks of tokens, from the start or from where an earlier block's `cursor` points.

        Raises:
            DataError: the source is missing, holds no text, or holds something else than text.
        """
        at, empty = cursor or Cursor(), cursor is None
        for block in self._blocks(self._rows(at, self._tokenized(self.documents.read(at.document)))):
            empty = False
            yield block
        if empty:
            part = "" if self.documents.part == "all" else f" in its {self.documents.part!r} part"
            raise DataError(
                f"{self.documents.describe()} gives no tokens{part}: its documents are empty, or too few for this "
                f"part (every {self.documents.hold_out_every}th is held out); give more text"
            )

    def describe(self) -> dict[str, Any]:
        """What was decided about tokens, for a run's record."""
        documents = self.documents
        between = self.tokenizer.convert_ids_to_tokens(self._between)
        return {
            "source": documents.describe(),
            "part": documents.part,
            "hold_out_every": documents.hold_out_every,
            "ctx": self.ctx,
            "packing": self.packing,
            "bos": self.bos,
            "separator": between[0] if between else None,
        }

    def _blocks(self, rows: Iterator[tuple[_Row, Cursor]]) -> Iterator[TokenBlock]:
        while chunk := list(islice(rows, self.rows)):
            yield self._block([row for row, _ in chunk], chunk[-1][1])

    def _rows(self, cursor: Cursor, documents: Iterator[tuple[int, list[int]]]) -> Iterator[tuple[_Row, Cursor]]:
        row, at = _Row(), cursor
        for index, ids in documents:
            offset = cursor.offset if index == cursor.document else 0
            if self.packing == "one_doc":
                if ids and not offset:
                    row.add(self._first, index, None, restart=True)
                    row.add(ids[: self.ctx - len(row.ids)], index, 0, restart=False)
                    yield row, Cursor(index, len(ids))
                    row = _Row()
                continue
            while offset < len(ids):
                self._open(row, index, starts=offset == 0)
                taken = ids[offset : offset + self.ctx - len(row.ids)]
                row.add(taken, index, offset, restart=not self.bos and offset == 0)
                offset += len(taken)
                at = Cursor(index, offset)
                if len(row.ids) == self.ctx:
                    yield row, at
                    row = _Row()
        if row.ids:
            yield row, at

    def _open(self, row: _Row, index: int, *, starts: bool) -> None:
        """Put what belongs before a piece of a document into its row."""
        if not row.ids:
            row.add(self._first, index, None, restart=True)
        elif starts and len(row.ids) < self.ctx:
            if self.bos:
                row.add(self._first, index, None, restart=True)
            else:
                row.add(self._between, row.doc[-1], None, restart=False)

    def _tokenized(self, documents: Iterator[tuple[int, str]]) -> Iterator[tuple[int, list[int]]]:
        while chunk := list(islice(documents, _CHUNK)):
            texts = [text for _, text in chunk]
            coded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
            for (index, _), row in zip(chunk, coded["input_ids"], strict=True):
                yield index, row

    def _block(self, rows: list[_Row], cursor: Cursor, width: int | None = None) -> TokenBlock:
        width = self.ctx if width is None else width
        ids = _padded([row.ids for row in rows], self._pad, width)
        mask = torch.arange(width) < torch.tensor([len(row.ids) for row in rows])[:, None]
        position_ids = None
        if self.packing == "block_diagonal":
            spare = [list(range(width - len(row.ids))) for row in rows]
            position_ids = torch.tensor([row.position_ids + more for row, more in zip(rows, spare, strict=True)])
        return TokenBlock(
            ids=ids,
            mask=mask,
            special=special_mask(self.tokenizer, ids) | ~mask,
            doc=_padded([row.doc for row in rows], -1, width),
            pos=_padded([row.pos for row in rows], -1, width),
            position_ids=position_ids,
            cursor=cursor,
        )


def watched_blocks(
    tokens: TokenSource, max_tokens: int, should_stop: Callable[[], bool] | None = None, *, doing: str
) -> Iterator[TokenBlock]:
    """Yield blocks until `max_tokens` have been given; a bar comes up on stderr when that takes more than two seconds.

    Args:
        tokens: the text.
        max_tokens: special tokens and pads included; the block that reaches it is the last, and whole.
        should_stop: asked before each block; when it says True, KeyboardInterrupt is raised.
        doing: what the bar says; nothing for no bar.
    """
    with token_bar(max_tokens, doing) as bar:
        given = 0
        for block in tokens.blocks():
            if should_stop is not None and should_stop():
                raise KeyboardInterrupt
            yield block
            given += block.ids.numel()
            bar.update(min(block.ids.numel(), max_tokens - bar.n))
            if given >= max_tokens:
                return


def token_bar(total: int, doing: str) -> "tqdm[Any]":
    """A bar on stderr for work on so many tokens, which comes up when it takes more than two seconds; "" has none."""
    shown: dict[str, Any] = {"unit": "tok", "unit_scale": True, "delay": _SOON, "leave": False, "file": sys.stderr}
    return tqdm(total=total, desc=doing, disable=not doing, **shown)


def _padded(rows: list[list[int]], fill: int, width: int) -> Int[Tensor, "row pos"]:
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


def _bos_habit(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the tokenizer itself begins a text with BOS."""
    plain, own = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (False, True))
    return tokenizer.bos_token_id is not None and len(own) > len(plain) and own[0] == tokenizer.bos_token_id
