"""What can be run: text, texts, ids or `Tokens`, checked before the model sees them."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from interp.core.errors import DataError
from interp.core.text import Tokens, pad_id_of, pad_rows, tokenize

__all__ = ["Inputs", "check_tokens", "read_inputs"]

Inputs = Any
"""Text, a list of texts, a LongTensor [batch pos] or [pos], a list of (lists of) ids, or `Tokens`."""


def read_inputs(tokenizer: Any, inputs: Inputs, *, bos: bool | None, mask: Any) -> Tokens:
    """Return inputs of any accepted form as `Tokens`; arguments as for `HookManager.to_tokens`.

    Raises:
        DataError: another form, nothing to run, or a mask that does not fit.
    """
    if bos is not None and (isinstance(inputs, Tensor | Tokens)):
        raise DataError("bos=… is for text; put the BOS id into the ids yourself")
    if isinstance(inputs, Tensor):
        return _of_tensor(tokenizer, inputs, mask)
    if isinstance(inputs, Tokens):
        if mask is not None:
            raise DataError("mask=… is for a tensor of ids; Tokens know their own padding")
        return inputs
    if mask is not None:
        raise DataError("mask=… is for a tensor of ids; text and lists know their own padding")
    if isinstance(inputs, str):
        return tokenize(tokenizer, inputs, bos=bos)
    if isinstance(inputs, Sequence) and inputs:
        if all(isinstance(i, str) for i in inputs):
            return tokenize(tokenizer, inputs, bos=bos)
        rows = [inputs] if all(isinstance(i, int) for i in inputs) else inputs
        if all(isinstance(row, Sequence) and not isinstance(row, str) for row in rows):
            return Tokens(*pad_rows(rows, pad_id_of(tokenizer)), tokenizer=tokenizer)
    size = " (empty)" if isinstance(inputs, Sequence) and not inputs else ""
    raise DataError(
        f"inputs are text, texts, a LongTensor [batch pos], lists of ids or Tokens; got {type(inputs).__name__}{size}"
    )


def _of_tensor(tokenizer: Any, ids: Tensor, mask: Any) -> Tokens:
    if ids.is_floating_point() or ids.dtype == torch.bool or ids.is_complex():
        raise DataError(
            f"token ids are whole numbers, got {ids.dtype} {tuple(ids.shape)}; embeddings go through hm.hooked(…)"
        )
    if ids.device.type == "meta":
        raise DataError("token ids on the meta device hold no values")
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or 0 in ids.shape:
        raise DataError(f"token ids must be [batch pos] with at least one token, got {tuple(ids.shape)}")
    if mask is None:
        _refuse_hidden_pads(tokenizer, ids)
        return Tokens(ids.long(), torch.ones(ids.shape, dtype=torch.bool), tokenizer=tokenizer)
    try:
        known = torch.as_tensor(mask).cpu()
    except (TypeError, ValueError, RuntimeError) as err:
        raise DataError(f"mask must be a tensor of 0 and 1, got {type(mask).__name__}") from err
    known = known[None] if known.ndim == 1 else known
    if known.shape != ids.shape or not bool(((known == 0) | (known == 1)).all()):
        raise DataError(
            f"mask must hold 0 and 1 in the shape of the ids {tuple(ids.shape)}, got {tuple(known.shape)} {known.dtype}"
        )
    return Tokens(ids.long(), known.bool(), tokenizer=tokenizer)


def _refuse_hidden_pads(tokenizer: Any, ids: Int[Tensor, "batch pos"]) -> None:
    """A pad token of its own at a row's edge, without a mask, is a padded batch that lost its mask."""
    pad = getattr(tokenizer, "pad_token_id", None)
    others = {getattr(tokenizer, n, None) for n in ("eos_token_id", "bos_token_id", "unk_token_id")}
    if pad is None or pad in others or ids.device.type != "cpu" or ids.shape[0] == 1:
        return
    if bool((ids[:, 0] == pad).any() | (ids[:, -1] == pad).any()):
        raise DataError(
            f"rows begin or end with the pad token ({pad}) but there is no mask; give run(…, mask=…) or the texts"
        )


def check_tokens(tokens: Tokens, *, rows: int, longest: int | None) -> None:
    """Refuse ids outside the embedding's rows, and rows longer than the learned positions.

    Ids on a GPU are not looked at: that would make the host wait at every call.

    Raises:
        DataError: names the id or the length.
    """
    ids = tokens.ids
    if ids.device.type == "cpu":
        low, high = (int(v) for v in torch.aminmax(ids))
        if low < 0 or high >= rows:
            raise DataError(f"token id {low if low < 0 else high} is outside the vocabulary (0 to {rows - 1})")
    if longest is not None and ids.shape[1] > longest and int(tokens.lengths.max()) > longest:
        raise DataError(
            f"{int(tokens.lengths.max())} tokens, but this model has {longest} learned positions; cut the input"
        )
