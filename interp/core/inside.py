"""The tap for attention that computes its pattern inside its own module (GPT-Neo, GPT-J, BLOOM, MPT, Falcon).

Such modules never ask transformers for a kernel. While one of them runs, and only in a run that asks about its
pattern, torch's own softmax and scaled-dot-product attention are watched by a `TorchFunctionMode`: what goes into the
softmax are the scores (mask and ALiBi included), what comes out is the pattern; both may be edited on the way.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from interp.core.attention import LayerTap, TapSite, attention_scores

__all__ = ["InsideTap"]

_SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax}


class InsideTap(TorchFunctionMode):
    """Watches one call of one attention module.

    Args:
        sites: kind ("attn_scores", "pattern", "rot_q", "rot_k") → what to do there.
        module: the attention module.
        n_kv_heads: key/value heads; a module that has repeated its keys for each query head already is seen through.
    """

    def __init__(self, sites: Mapping[str, TapSite], module: nn.Module, n_kv_heads: int) -> None:
        super().__init__()
        self.sites, self.module, self.n_kv_heads = sites, module, n_kv_heads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let every other function of torch pass."""
        kwargs = kwargs or {}
        if func in _SOFTMAX and isinstance(args[0], Tensor) and args[0].ndim == 4:
            return self._softmax(func, args, kwargs)
        if func is F.scaled_dot_product_attention:
            return self._attend(func, args, kwargs)
        return func(*args, **kwargs)

    def _softmax(self, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        scores, pattern = self.sites.get("attn_scores"), self.sites.get("pattern")
        x = args[0]
        if scores is not None:
            # GPT-Neo's two masks add up to −inf; everywhere else a masked score is the lowest finite number.
            seen = scores.visit(x.clamp(min=torch.finfo(x.dtype).min))
            x = seen if scores.touches else x
        weights = func(x, *args[1:], **kwargs)
        return weights if pattern is None else pattern.visit(weights)

    def _attend(self, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        query, key, value = args[:3]
        mask, causal = kwargs.get("attn_mask"), bool(kwargs.get("is_causal"))

        def kernel(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, given: Any, **_: Any) -> tuple[Tensor, None]:
            return func(q, k, v, *args[3:], **kwargs).transpose(1, 2), None

        tap = LayerTap(self.sites, n_kv_heads=self.n_kv_heads)
        extra = {"is_causal": causal, "scaling": kwargs.get("scale")}
        out, _ = tap(kernel, _eager, self.module, query, key, value, mask, **extra)
        return out.transpose(1, 2).contiguous()


def _eager(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[None, Tensor]:
    """The pattern that scaled-dot-product attention has no name for."""
    return None, attention_scores(query, key, mask, kwargs).float().softmax(-1).to(query.dtype)
