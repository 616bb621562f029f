"""Checks of a model's own behaviour, made once per manager, when something first relies on it."""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from interp.core.errors import DataError, ModelError, SiteError
from interp.core.plan import Plan
from interp.core.text import Tokens

if TYPE_CHECKING:
    from interp.core.manager import HookManager

__all__ = ["check_positions", "check_residual", "processes_of", "refuse_split"]


def _few_ids(hm: "HookManager", n: int) -> Tensor:
    n = min(n, hm.max_positions or n)
    return torch.arange(1, n + 1, device=hm.device)[None] % max(2, hm.d_vocab - 1)


def check_residual(hm: "HookManager") -> None:
    """Check on a few tokens that resid_pre + attn_out + mlp_out = resid_post in every block.

    A family whose block adds something else (another branch, a multiplier of its own) is found here, not in a
    decomposition that quietly does not sum.

    Raises:
        ModelError: names the block and by how much it is off.
    """
    kinds = ("resid_pre", "attn_out", "mlp_out", "resid_post")
    layers = [i for i in range(hm.n_layers) if all(hm.atlas.has(f"{i}.{k}") for k in kinds)]
    out = hm.run(_few_ids(hm, 4), read=[f"{i}.{k}" for i in layers for k in kinds])
    for i in layers:
        pre, attn, mlp, post = (out[k, i].float() for k in kinds)
        off, size = float((pre + attn + mlp - post).abs().max()), float(post.abs().max())
        if size != size:
            raise ModelError(f"{hm.map.family}, block {i}: activations are NaN on plain tokens; look at the weights")
        if not off <= (1e-4 if hm.dtype in (torch.float32, torch.float64) else 5e-2) * max(1.0, size):
            raise ModelError(
                f"{hm.map.family}, block {i}: resid_pre + attn_out + mlp_out is off resid_post by {off:.1e}; this "
                "block adds something else to its stream; read attn.in, z, mlp.in or resid_post, or give a ModelMap"
            )


def check_positions(
    hm: "HookManager", tokens: Tokens, position_ids: Int[Tensor, "batch pos"], *, checked: bool
) -> bool:
    """Where positions start again (packed documents), check once that the family keeps documents apart.

    Returns:
        Whether packing is now known to be right for this model.

    Raises:
        DataError: packed rows that are padded as well.
        ModelError: packed documents see each other in this family.
    """
    if not bool((position_ids[:, 1:] < position_ids[:, :-1]).any()):
        return checked
    if not bool(tokens.mask.all()):
        raise DataError("packed rows (positions that start again) cannot be padded as well; fill the rows or cut them")
    if checked:
        return True
    n = 6
    first = torch.arange(1, n + 1, device=hm.device)[None] % max(2, hm.d_vocab - 1)
    positions = torch.arange(n, device=hm.device).repeat(2)[None]
    with torch.no_grad():
        alone = hm.caller(first, mask=None, position_ids=None, keep=None).logits
        packed = hm.caller(torch.cat([first, first], 1), mask=None, position_ids=positions, keep=None).logits[:, n:]
    off, size = float((packed - alone).abs().max()), float(alone.abs().max())
    if not off <= (1e-3 if hm.dtype == torch.float32 else 5e-2) * max(1.0, size):
        raise ModelError(
            f"{hm.map.family} lets packed documents see each other (logits off by {off:.1e}): "
            "use packing 'concat' or 'one_doc'"
        )
    return True


def processes_of(model: Any) -> int:
    """Among how many processes transformers has split a model's weights (tensor parallelism); 1 where it is whole."""
    return int(getattr(model, "_tp_size", None) or 1)


def refuse_split(model: Any, plan: Plan) -> None:
    """Refuse sites of which each process of a tensor-parallel model has only its part.

    Raises:
        SiteError: names the first; says which sites are whole.
    """
    if (n := processes_of(model)) == 1:
        return
    for point in plan.points:
        axes = point.site.axes
        if axes[2:] not in (("d_model",), ("one",), ("d_vocab",)):
            raise SiteError(
                f"{point.site.short} [{' '.join(axes)}]: this model is split among {n} processes, and each has only "
                "its part of heads, neurons and experts. Sites of the residual stream and outputs of attention and MLP "
                "are whole; for this one load the model with device_map instead of tp_plan"
            )
