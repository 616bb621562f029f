"""Text to tokens and back: `Tokens` is a padded batch that knows its pads, its special tokens and its named spans."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp.core.errors import DataError

__all__ = ["Chat", "Tokens", "chat_tokens", "pad_rows", "single_token", "special_mask", "str_tokens", "tokenize"]


@dataclass(frozen=True)
class Tokens:
    """A batch of token ids with its padding known.

    Args:
        ids: token ids.
        mask: True where a column holds a real token.
        spans: named positions, such as "user"; True where the span is.
        bos: whether rows begin with the tokenizer's BOS.
        position_ids: positions that start again where packed documents begin; None for the usual ones.
    """

    ids: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    spans: Mapping[str, Bool[Tensor, "batch pos"]] = field(default_factory=dict)
    bos: bool = False
    tokenizer: Any = field(default=None, repr=False, compare=False)
    position_ids: Int[Tensor, "batch pos"] | None = None

    def __post_init__(self) -> None:
        if self.ids.dtype not in (torch.int32, torch.int64) or self.ids.ndim != 2:
            raise DataError(f"ids are whole numbers [batch, pos], got {self.ids.dtype} {tuple(self.ids.shape)}")
        if self.mask.dtype != torch.bool:
            raise DataError(f"mask must be bool (True at real tokens), got {self.mask.dtype}; give mask.bool()")
        if self.ids.shape != self.mask.shape:
            raise DataError(
                f"ids {tuple(self.ids.shape)} and mask {tuple(self.mask.shape)} must have one shape [batch, pos]"
            )
        given = self.position_ids
        whole = isinstance(given, Tensor) and given.dtype in (torch.int32, torch.int64)
        if given is not None and (not whole or given.shape != self.ids.shape):
            what = f"{tuple(given.shape)} {given.dtype}" if isinstance(given, Tensor) else type(given).__name__
            raise DataError(
                f"position_ids must be whole numbers in the shape of the ids {tuple(self.ids.shape)}, got {what}"
            )
        for name, span in self.spans.items():
            if span.shape != self.ids.shape or span.dtype != torch.bool:
                raise DataError(
                    f"span {name!r} must be bool {tuple(self.ids.shape)}, got {span.dtype} {tuple(span.shape)}"
                )
        if not bool(self.mask.any(dim=1).all()):
            row = int((~self.mask.any(dim=1)).nonzero()[0, 0])
            raise DataError(f"row {row} has no tokens; every row needs at least one (empty text without BOS?)")

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def str_tokens(self) -> list[list[str]]:
        """The text of each token, row by row, pads included as they decode."""
        return str_tokens(self.tokenizer, self.ids)

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Real tokens per row."""
        return self.mask.sum(dim=1)

    @property
    def trailing_pads(self) -> list[int]:
        """Pads after each row's last real token: how far right padding on the left would move it."""
        return [int(row.flip(0).int().argmax()) for row in self.mask]

    def take(self, rows: Int[Tensor, " n"]) -> "Tokens":
        """Return some of the rows, in this order, with the columns of the whole batch."""
        spans = {name: span[rows] for name, span in self.spans.items()}
        positions = None if self.position_ids is None else self.position_ids[rows]
        return replace(self, ids=self.ids[rows], mask=self.mask[rows], spans=spans, position_ids=positions)

    def left_padded(self, pad_id: int) -> "Tokens":
        """Return the same rows with their pads in front (what generation needs)."""
        shift = self.trailing_pads
        if not any(shift):
            return self
        spans = {n: _roll(s, shift) for n, s in self.spans.items()}
        mask = _roll(self.mask, shift)
        ids = _roll(self.ids, shift).masked_fill(~mask, pad_id)
        positions = None if self.position_ids is None else _roll(self.position_ids, shift)
        return replace(self, ids=ids, mask=mask, spans=spans, position_ids=positions)


def _roll(x: Tensor, shifts: Sequence[int]) -> Tensor:
    return torch.stack([row.roll(s) for row, s in zip(x, shifts, strict=True)])


@dataclass(frozen=True)
class Chat(Tokens):
    """A conversation in the model's chat template; `spans` hold one entry per role ("user", "assistant", …)."""

    text: str = ""


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int, *, side: str = "right") -> tuple[Tensor, Tensor]:
    """Return ids [batch pos] and mask of ragged rows.

    Raises:
        DataError: no rows, an empty row, or something that is no whole number.
    """
    if not rows:
        raise DataError("no rows of tokens were given")
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        if not row:
            raise DataError(f"row {i} has no tokens; every row needs at least one (empty text without BOS?)")
        try:
            values = torch.tensor(row)
        except (TypeError, ValueError) as err:
            raise DataError(f"row {i} holds something that is no token id: {str(err)[:100]}") from None
        if values.ndim != 1 or values.dtype.is_floating_point or values.dtype == torch.bool:
            raise DataError(f"row {i} must be a list of whole numbers, got {values.dtype} {tuple(values.shape)}")
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, place] = values
        mask[i, place] = True
    return ids, mask


def _need(tokenizer: Any, what: str) -> Any:
    if tokenizer is None:
        raise DataError(f"{what} needs a tokenizer, and this model was loaded without one; give load(model, tokenizer)")
    return tokenizer


def pad_id_of(tokenizer: Any) -> int:
    """The id that fills pads; which one does not matter, the mask says where they are."""
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        value = getattr(tokenizer, name, None)
        if isinstance(value, int):
            return value
    return 0


def tokenize(tokenizer: Any, text: "str | Sequence[str]", *, bos: bool | None = None, side: str = "right") -> Tokens:
    """Return the tokens of one text or several.

    Args:
        tokenizer: a Hugging Face tokenizer.
        text: a string, or a list of strings (padded to one length).
        bos: None follows the tokenizer's own habit; True puts its BOS first; False leaves special tokens out.
        side: where pads go.

    Raises:
        DataError: no tokenizer, no text, or a BOS asked of a tokenizer that has none.
    """
    _need(tokenizer, "text")
    texts = [text] if isinstance(text, str) else list(text)
    wrong = next((t for t in texts if not isinstance(t, str)), None)
    if wrong is not None:
        raise DataError(f"a list of texts holds {type(wrong).__name__}: {str(wrong)[:60]!r}")
    if not texts:
        raise DataError("no text was given")
    bos_id = getattr(tokenizer, "bos_token_id", None)
    if bos and bos_id is None:
        raise DataError(f"bos=True, but this tokenizer ({type(tokenizer).__name__}) has no BOS token; leave bos out")
    rows = [list(tokenizer(t, add_special_tokens=bos is not False).input_ids) for t in texts]
    if bos:
        rows = [row if row[:1] == [bos_id] else [bos_id, *row] for row in rows]
    ids, mask = pad_rows(rows, pad_id_of(tokenizer), side=side)
    return Tokens(ids, mask, bos=bos_id is not None and all(row[:1] == [bos_id] for row in rows), tokenizer=tokenizer)


def chat_tokens(tokenizer: Any, messages: Any, *, add_generation_prompt: bool = True) -> Chat:
    """Return a conversation in the tokenizer's chat template, without a second BOS, with one span per role.

    Args:
        tokenizer: a tokenizer with a chat template.
        messages: a list of {"role": …, "content": …}.
        add_generation_prompt: end with the header of the assistant's turn.

    Raises:
        DataError: no template, or messages of another form.
    """
    _need(tokenizer, "a chat")
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("this tokenizer has no chat template (a base model?); give run and generate plain text instead")
    good = (
        isinstance(messages, Sequence)
        and bool(messages)
        and all(isinstance(m, Mapping) and {"role", "content"} <= set(m) for m in messages)
    )
    if not good:
        raise DataError("chat takes a list of messages such as [{'role': 'user', 'content': 'Hello'}]")
    text = _rendered(tokenizer, messages, add_generation_prompt)
    encoded = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=bool(getattr(tokenizer, "is_fast", False))
    )
    ids = torch.tensor([encoded.input_ids])
    spans: dict[str, Tensor] = {}
    offsets = encoded.get("offset_mapping") or []
    for message, (begin, end) in zip(messages, _contents(tokenizer, messages, text), strict=True):
        inside = torch.tensor([[a < end and b > begin and b > a for a, b in offsets]], dtype=torch.bool)
        if offsets and end > begin:
            role = message["role"]
            spans[role] = spans[role] | inside if role in spans else inside
    bos_id = getattr(tokenizer, "bos_token_id", None)
    has_bos = bos_id is not None and encoded.input_ids[:1] == [bos_id]
    return Chat(ids, torch.ones_like(ids, dtype=torch.bool), spans=spans, bos=has_bos, tokenizer=tokenizer, text=text)


def _rendered(tokenizer: Any, messages: Any, add_generation_prompt: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
    except Exception as err:  # a template is a program of the model's makers, and raises what it likes
        raise DataError(f"the chat template refuses this conversation: {err}") from err


def _contents(tokenizer: Any, messages: Any, text: str) -> list[tuple[int, int]]:
    """Where each message's content stands in the rendered text; (0, 0) for all where that cannot be told.

    The conversation is rendered once more with a mark for each content: what then stands before the marks is the
    template's own, and cannot be taken for a content.
    """
    places, at = [], 0
    for message, header in zip(messages, _headers(tokenizer, messages), strict=False):
        begin, content = at + len(header), str(message["content"])
        content = content if text.startswith(content, begin) else content.strip()
        if not (text.startswith(header, at) and text.startswith(content, begin)):
            break
        at = begin + len(content)
        places.append((begin, at))
    return places if len(places) == len(messages) else [(0, 0)] * len(messages)


def _headers(tokenizer: Any, messages: Any) -> list[str]:
    """What the template puts before each content; nothing where it does not show every content once and in order."""
    marks = [f"\ue000{i}\ue001" for i in range(len(messages))]
    try:
        rest = _rendered(tokenizer, [{**m, "content": mark} for m, mark in zip(messages, marks, strict=True)], False)
    except DataError:
        return []
    headers = []
    for mark in marks:
        header, found, rest = rest.partition(mark)
        if not found:
            return []
        headers.append(header)
    return headers


def str_tokens(tokenizer: Any, ids: Int[Tensor, "batch pos"]) -> list[list[str]]:
    """Return the text of every token, leading spaces shown (a lone SentencePiece token loses its own when decoded)."""
    _need(tokenizer, "str_tokens")
    known: dict[int, str] = {}

    def text(i: int) -> str:
        if i not in known:
            piece, decoded = tokenizer.convert_ids_to_tokens(i), tokenizer.decode([i])
            hidden = isinstance(piece, str) and piece.startswith("▁") and not decoded.startswith(" ")
            known[i] = f" {decoded}" if hidden else decoded
        return known[i]

    return [[text(i) for i in row] for row in ids.tolist()]


def single_token(tokenizer: Any, text: str) -> int:
    """Return the id of a string that is exactly one token, its leading space included.

    SentencePiece puts a space before every text, so " She" is looked up there as "She" too.

    Raises:
        DataError: it is several tokens (they are shown), or none.
    """
    if not isinstance(text, str) or not text:
        raise DataError(f"a single token is asked for by its text, got {text!r}")
    tried = [tokenize(tokenizer, t, bos=False).ids for t in (text, text.removeprefix(" ")) if t]
    for ids in tried:
        if ids.shape[1] == 1 and (ids is tried[0] or str_tokens(tokenizer, ids)[0][0] == text):
            return int(ids[0, 0])
    shown = " | ".join(repr(t) for t in str_tokens(tokenizer, tried[0])[0])
    hint = "" if text.startswith(" ") else "; many words need a leading space"
    raise DataError(f"{text!r} is {tried[0].shape[1]} tokens ({shown}), not one{hint}")


def special_mask(tokenizer: Any, ids: Int[Tensor, "*n"]) -> Bool[Tensor, "*n"]:
    """Return True where a token is one of the tokenizer's special tokens (BOS, EOS, pad, …).

    Without a tokenizer nothing is known to be special, and nothing is left out.
    """
    special = torch.tensor(sorted(getattr(tokenizer, "all_special_ids", []) or []), dtype=ids.dtype, device=ids.device)
    return torch.isin(ids, special)
