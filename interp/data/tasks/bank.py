"""`Bank`: which words a tokenizer takes whole, and which of the rest are kept for held-out prompts."""

import zlib
from collections.abc import Iterable, Sequence
from typing import Any

from interp.core.errors import DataError

__all__ = ["Bank", "is_held_out"]

_BEFORE = "the"


class Bank:
    """The words that one tokenizer knows, or all of them where there is no tokenizer.

    Args:
        hm: a `HookManager`, a tokenizer, or None.
    """

    def __init__(self, hm: Any = None) -> None:
        self.tokenizer = hm.tokenizer if hasattr(hm, "to_tokens") else hm
        if hm is not None and self.tokenizer is None:
            raise DataError("hm has no tokenizer, and these prompts are texts; load it with one, or leave hm out")

    def whole(
        self, words: Iterable[str], what: str, *, least: int = 2, held_out: bool | None = None
    ) -> tuple[str, ...]:
        """Return the words that are one known token after a space.

        Args:
            words: candidates, without the space.
            what: what they are, for the message.
            least: how many are needed.
            held_out: only those that are kept for held-out prompts, or only the others; None for both.

        Raises:
            DataError: fewer than that are.
        """
        given = tuple(w for w in dict.fromkeys(words) if held_out is None or is_held_out(w) == held_out)
        counts = self.added(_BEFORE, [f" {word}" for word in given])
        kept = tuple(word for word, n in zip(given, counts, strict=True) if n == 1)
        if len(kept) < least:
            split = [word for word in given if word not in kept][:5]
            raise DataError(
                f"only {len(kept)} of {len(given)} {what} are one token under this tokenizer and {least} are needed "
                f"(not one token: {', '.join(split)}, …); use another task, or a tokenizer of whole words"
            )
        return kept

    def added(self, prefix: str, texts: Sequence[str]) -> list[int | None]:
        """Return how many tokens each text adds to a prefix; None where it changes the prefix or is unknown.

        Without a tokenizer every text counts as one token.

        Args:
            prefix: what stands before.
            texts: what follows it, with a leading space where there is one.
        """
        if self.tokenizer is None:
            return [1] * len(texts)
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        rows = self.tokenizer([prefix, *(prefix + text for text in texts)], add_special_tokens=False).input_ids
        first = rows[0]
        found: list[int | None] = []
        for row in rows[1:]:
            new = row[len(first) :]
            found.append(len(new) if row[: len(first)] == first and unknown not in new else None)
        return found


def is_held_out(word: str) -> bool:
    """Return whether a word is kept for held-out prompts: one in four are, by a checksum of the word."""
    return zlib.crc32(word.encode()) % 4 == 0
