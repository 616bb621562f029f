"""The text that a dictionary is trained and measured on: what settings name, as rows of tokens."""

from typing import TYPE_CHECKING

from interp.data.documents import Documents, Part
from interp.data.tokens import TokenSource
from interp.testbed.text import WORLD_TASKS, Text
from interp.train.config import TextOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["WORLD_TASKS", "WorldTexts", "token_source"]


class WorldTexts:
    """The small world's training text as documents by number, without end; `data: testbed` stands for it.

    Document `i` is a function of `i` alone; see `WORLD_TASKS`.
    """

    def __init__(self) -> None:
        self._text = Text("dictionary", tasks=WORLD_TASKS)

    def __getitem__(self, index: int) -> str:
        return self._text.document(index).text


def token_source(
    named: str, text: TextOptions, tokenizer: "PreTrainedTokenizerBase", *, part: Part = "all"
) -> TokenSource:
    """Return text as rows of tokens.

    Args:
        named: a file, a folder, hf://owner/name, or "testbed" for the small world's text.
        text: how it becomes rows.
        tokenizer: the model's.
        part: all of it, or what is left after documents were held out, or those.
    """
    documents = Documents(
        WorldTexts() if named == "testbed" else named,
        field=text.field,
        split=text.split,
        part=part,
        hold_out_every=text.hold_out_every,
    )
    return TokenSource(documents, tokenizer, ctx=text.ctx, rows=text.rows, packing=text.packing, bos=text.bos)
