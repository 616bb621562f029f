"""Batches of tokens for a language model's training: streams that go on from a state that is plain JSON."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.data.tokens import Cursor, TokenBlock, TokenSource

__all__ = ["LMBatch", "LMData", "TextData"]


@dataclass(frozen=True)
class LMBatch:
    """Rows of tokens for one step, on the CPU.

    Attributes:
        ids: token ids.
        weight: weight, in the loss, of predicting the token at this place; at least 0. Column 0 is predicted from
            nothing and never counts. None weighs all others alike.
        position_ids: for rows of several documents that do not see each other; None is 0, 1, 2, …
    """

    ids: Int[Tensor, "row pos"]
    weight: Float[Tensor, "row pos"] | None = None
    position_ids: Int[Tensor, "row pos"] | None = None


@runtime_checkable
class LMData(Protocol):
    """A stream of batches that is a pure function of its state: from the same state come the same batches.

    A batch is an `LMBatch`, or any object with its attributes `ids` and `weight`.
    """

    def batches(self, state: Mapping[str, Any] | None) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Yield batches, each with the state to go on after it.

        Args:
            state: plain JSON that an earlier batch came with; None starts anew.
        """

    def describe(self) -> dict[str, Any]:
        """What the stream is, as plain JSON, for a run's record; the same in every process."""


class TextData:
    """The rows of a `TokenSource`, one block a step, over and over.

    Pads weigh 0, and so does a document's first token where documents do not see each other (packing
    "block_diagonal"), as it cannot be predicted from another document. The order is that of the source.

    Args:
        tokens: the source; its `rows` is the batch size.
        repeat: start again at the end of the text; else the stream ends there.
    """

    def __init__(self, tokens: TokenSource, *, repeat: bool = True) -> None:
        self.tokens, self.repeat = tokens, repeat

    def batches(self, state: Mapping[str, Any] | None) -> Iterator[tuple[LMBatch, dict[str, Any]]]:
        """Yield blocks of the text; the state is the epoch and the cursor after the block.

        Raises:
            DataError: the source is missing, or holds no text.
        """
        epoch = 0 if state is None else int(state["epoch"])
        cursor = None if state is None else Cursor(int(state["document"]), int(state["offset"]))
        while True:
            for block in self.tokens.blocks(cursor):
                at = block.cursor
                yield _batch(block), {"epoch": epoch, "document": at.document, "offset": at.offset}
            if not self.repeat:
                return
            epoch, cursor = epoch + 1, None

    def describe(self) -> dict[str, Any]:
        """What the source says of itself, with the rows of a batch."""
        return {"kind": "text", **self.tokens.describe(), "rows": self.tokens.rows, "repeat": self.repeat}


def _batch(block: TokenBlock) -> LMBatch:
    counts = block.mask.clone()
    if block.position_ids is not None:
        counts &= block.position_ids > 0
    whole = bool(counts[:, 1:].all())
    return LMBatch(block.ids, None if whole else counts.to(torch.float32), block.position_ids)
