"""Forwards through a frozen model whose gradient reaches what edits it, and nothing below or beside."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from interp.core.engine import Forward
from interp.core.errors import DataError, ModelError
from interp.core.intervention import Intervention
from interp.core.passes import frame_of, model_inputs, own_logits, refuse_inside_block
from interp.core.text import Tokens

if TYPE_CHECKING:
    from interp.core.manager import HookManager

__all__ = ["frozen", "next_token_losses"]

_UNCUT = ("logits", "unembed.in", "unembed.out")


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within the block no parameter of the model needs a gradient; afterwards those do that did before.

    Args:
        model: the model; its `.grad` are not touched.
    """
    held = [p for p in model.parameters() if p.requires_grad]
    for p in held:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in held:
            p.requires_grad_(True)


def next_token_losses(
    hm: "HookManager", tokens: Tokens, counts: Bool[Tensor, "batch pos"], write: Sequence[Intervention]
) -> Float[Tensor, " target"]:
    """Return the cross-entropy of some tokens under edits, on the graph of whatever in the edits needs a gradient.

    With the model `frozen` the graph begins at the first edit, so that no activation below it is kept. Memory: that
    graph, and logits of the columns in which a token counts, 3 tensors of [targets d_vocab] in fp32.

    Args:
        hm: the model, in eval mode.
        tokens: the rows.
        counts: True at the tokens whose own loss is wanted; each needs a real token before it.
        write: the edits.

    Returns:
        Losses in nats, in fp32 or better, row by row.

    Raises:
        ModelError: the model is in train mode.
        DataError: no token counts, or one has nothing before it.
    """
    if hm.model.training:
        raise ModelError("the model is in train mode, where dropout changes the loss; call hm.model.eval() first")
    refuse_inside_block(hm, "next_token_losses")
    before = torch.zeros_like(counts)
    before[:, :-1] = counts[:, 1:]
    if not bool(counts.any()) or bool(counts[:, 0].any()) or bool((before & ~tokens.mask).any()):
        raise DataError("some token must count, and each that does must follow a real token; its loss has no other")
    plan = hm._plan((), list(write))
    frame = frame_of(tokens, 0, len(tokens))
    ids, mask, positions = model_inputs(hm, tokens, frame)
    columns = before.any(0).nonzero()[:, 0]
    cut = hm.caller.takes("logits_to_keep") and not any(p.site.kind in _UNCUT for p in plan.points)
    keep = columns.to(hm.device) if cut else None
    forward = Forward(plan, frame, detach=False)
    with forward.attached(hm.model):
        output = forward.run(lambda: hm.caller(ids, mask=mask, position_ids=positions, keep=keep))
    logits = own_logits(output, lambda x: x)
    kept = before[:, columns] if cut else before
    if logits.shape[:2] != kept.shape:
        raise ModelError(f"the model gave logits {tuple(logits.shape)} for {tuple(kept.shape)} positions")
    # Whole rows are gathered, so that what stands at pads, NaN perhaps, is neither read nor differentiated.
    at = kept.flatten().nonzero()[:, 0].to(logits.device)
    chosen = logits.flatten(0, 1).index_select(0, at)
    target = tokens.ids[counts].to(logits.device)
    return nn.functional.cross_entropy(
        chosen.to(torch.promote_types(chosen.dtype, torch.float32)), target, reduction="none"
    )
