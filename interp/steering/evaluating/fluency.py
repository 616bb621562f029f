"""How fluent generated text is: perplexity under the unsteered model, repeated n-grams, compression."""

import math
import zlib
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.errors import DataError
from interp.core.generate import Generation
from interp.core.manager import HookManager
from interp.core.metrics import loss_per_token
from interp.core.text import Tokens

__all__ = ["compression", "distinct_n", "generated_ids", "generated_perplexity", "rows_within"]

# So many bytes of logits, and what is computed from them, are held at once.
_LOGIT_BYTES = 2**28
_COPIES = 4  # logits, their log-softmax, the same of a reference, and a product


def distinct_n(ids: Sequence[int], n: int = 2) -> float:
    """Return the share of different n-grams among all n-grams of a row of tokens.

    Args:
        ids: the tokens.
        n: how many tokens a gram has.

    Returns:
        1 where no n-gram comes twice; NaN where the row has fewer than n tokens.

    Raises:
        DataError: n below 1.

    Source: Li et al. (2016), "A Diversity-Promoting Objective Function", arXiv 1510.03055, §5. They divide the number
    of different n-grams by the number of tokens; here by the number of n-grams, so that the most is 1.
    """
    if n < 1:
        raise DataError(f"n={n}: an n-gram has at least one token")
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def compression(text: str) -> float:
    """Return compressed bytes / bytes of a text: the more it repeats itself the smaller; NaN for no text.

    Raw DEFLATE at level 9, without a header. Texts of a few words come near 1 or above, so compare texts of one length.

    Args:
        text: what was generated.
    """
    raw = text.encode("utf-8")
    if not raw:
        return math.nan
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return len(packer.compress(raw) + packer.flush()) / len(raw)


def generated_ids(generation: Generation) -> list[list[int]]:
    """Return the tokens that each row made, its end of text included, without what follows that."""
    assert generation.mask is not None
    new, kept = generation.new_tokens.cpu(), generation.mask[:, generation.prompt_length :].cpu()
    return [row[m].tolist() for row, m in zip(new, kept, strict=True)]


def generated_perplexity(
    hm: HookManager, generation: Generation, *, batch_size: int | None = None
) -> Float[Tensor, " row"]:
    """Return the perplexity of what was generated under the model as it is, without any edit.

    The prompt is read but not scored; a row's end of text is scored, what follows it is not. Memory: the logits of
    `batch_size` rows, 4 · batch_size · (prompt + new) · d_vocab bytes, four times over.

    Args:
        hm: the model that judges; the one that generated, or another of the same tokenizer.
        generation: what `hm.generate` gave, steered or not.
        batch_size: rows per forward; as many as fit 256 MB by default.

    Returns:
        exp of the mean loss, in nats, over each row's own generated tokens.

    Raises:
        DataError: a generation without tokens.
    """
    if generation.tokens is None or generation.mask is None:
        raise DataError("this generation holds no tokens, so nothing can be scored")
    ids, mask = generation.tokens.cpu(), generation.mask.cpu()
    first, found = generation.prompt_length - 1, []
    size = batch_size or rows_within(hm, ids.shape[1], len(ids))
    for rows in torch.arange(len(ids)).split(size):
        part = Tokens(ids[rows], mask[rows], tokenizer=hm.tokenizer)
        losses, counts = loss_per_token(hm.run(part, logits="all").logits, part.ids, part.mask)
        total = losses[:, first:].double().sum(1).cpu()
        found.append(total / counts[:, first:].sum(1).cpu())
    return torch.cat(found).exp().float()


def rows_within(hm: HookManager, width: int, most: int) -> int:
    """Return how many rows of so many tokens have logits that fit 256 MB, four times over: at least 1.

    Args:
        hm: the model.
        width: tokens per row.
        most: rows at most.
    """
    return max(1, min(most, _LOGIT_BYTES // (4 * _COPIES * width * hm.d_vocab)))
