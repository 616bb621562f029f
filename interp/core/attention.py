"""The attention tap: post-rotary q and k, scores and patterns of an untouched model, whatever kernel it uses.

transformers asks `AttentionInterface.get_interface(name, default)` for its kernel at every attention call. That one
method is wrapped, once per process: outside a run of ours it returns exactly what it returned before; inside one, a
layer that the run asks about gets a function that calls the original kernel and looks at what goes in. Wrapping the
question rather than registering over each kernel's name keeps the mapping, the config and the mask interface as they
are, and keeps the eager function that each model passes itself (several models pass one of another name).

Departure from the plan in `design`: the plan registered over the kernel names; "eager" has no entry there, and an
entry for it would replace the model's own default for every model of the process.
"""

import functools
import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.core.errors import HookError

__all__ = ["CURRENT", "LayerTap", "TapSite", "attention_scores", "install_tap", "scores_to_pattern"]


class _State(Protocol):
    taps: dict[int, "LayerTap"]


CURRENT: ContextVar[_State | None] = ContextVar("interp_run", default=None)
"""The run whose forward is under way in this thread; every hook of a run asks it before it acts."""


def install_tap() -> None:
    """Wrap transformers' choice of attention kernel, once per process; harmless to call again."""
    from transformers.modeling_utils import AttentionInterface

    original = AttentionInterface.get_interface
    if getattr(original, "_interp_tap", False):
        return

    @functools.wraps(original)
    def get_interface(self: Any, attn_implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        kernel = original(self, attn_implementation, default)
        if torch.compiler.is_compiling():  # asked first: Dynamo cannot trace a ContextVar
            return kernel
        state = CURRENT.get()
        if state is None or not state.taps:
            return kernel
        return functools.partial(_tapped, state, kernel, default)

    get_interface._interp_tap = True  # type: ignore[attr-defined]
    AttentionInterface.get_interface = get_interface  # type: ignore[method-assign]


def _tapped(state: _State, kernel: Callable[..., Any], default: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    tap = state.taps.get(id(module))
    if tap is None:
        return kernel(module, *args, **kwargs)
    return tap(kernel, default, module, *args, **kwargs)


class TapSite(Protocol):
    """What a run does at one tapped site: edits in order, then reads."""

    differentiated: bool
    edited: bool

    def visit(self, x: Tensor) -> Tensor:
        """Return the site's tensor after its edits; it has been read."""


class LayerTap:
    """What one run does inside one attention layer.

    Args:
        sites: kind ("rot_q", "rot_k", "attn_scores", "pattern") → what to do there.
        path: the attention module's path, for messages.
        checked: modules' classes whose score formula has been checked in this process.
    """

    checked: set[tuple[type, str]] = set()

    def __init__(self, sites: dict[str, TapSite], path: str) -> None:
        self.sites = sites
        self.path = path

    def __call__(
        self,
        kernel: Callable[..., Any],
        default: Callable[..., Any],
        module: nn.Module,
        query: Float[Tensor, "batch n_heads pos d_head"],
        key: Float[Tensor, "batch n_kv_heads src d_head"],
        value: Float[Tensor, "batch n_kv_heads src d_v"],
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Call the kernel as the model would, with this run's edits and reads around it."""
        query = self._visit_heads("rot_q", query)
        key = self._visit_heads("rot_k", key)
        scores_site, pattern_site = self.sites.get("attn_scores"), self.sites.get("pattern")
        wanted = [s for s in (scores_site, pattern_site) if s is not None]
        if not wanted:
            return kernel(module, query, key, value, attention_mask, **kwargs)
        mask = additive_mask(attention_mask, query, key, kwargs)
        if any(s.edited or s.differentiated for s in wanted):
            return self._own_path(default, module, query, key, value, mask, kwargs)
        out = kernel(module, query, key, value, attention_mask, **kwargs)
        if scores_site is not None:
            scores_site.visit(self._scores(default, module, query, key, value, mask, kwargs))
        if pattern_site is not None:
            pattern_site.visit(self._eager(default, module, query, key, value, mask, kwargs))
        return out

    def _visit_heads(self, kind: str, x: Tensor) -> Tensor:
        site = self.sites.get(kind)
        return x if site is None else site.visit(x.transpose(1, 2)).transpose(1, 2)

    def _own_path(
        self, default: Callable[..., Any], module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Attention by our own formula, for a layer whose scores or pattern are edited or differentiated."""
        scores_site, pattern_site = self.sites.get("attn_scores"), self.sites.get("pattern")
        if scores_site is not None:
            scores = scores_site.visit(self._scores(default, module, query, key, value, mask, kwargs))
            pattern = scores_to_pattern(scores, module, kwargs).to(query.dtype)
        else:
            pattern = self._eager(default, module, query, key, value, mask, kwargs)
        if pattern_site is not None:
            pattern = pattern_site.visit(pattern)
        weights = nn.functional.dropout(pattern, p=kwargs.get("dropout") or 0.0, training=module.training)
        repeat = query.shape[1] // value.shape[1]
        z = torch.matmul(weights.to(value.dtype), value.repeat_interleave(repeat, dim=1))
        return z.transpose(1, 2).contiguous(), pattern

    def _eager(
        self, default: Callable[..., Any], module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kwargs: Any
    ) -> Tensor:
        """The pattern by the model's own eager function: its soft-cap, sinks and upcasting are the model's."""
        eager = default if default is not None else _eager_of(module)
        weights = eager(module, query, key, value, mask, **{**kwargs, "dropout": 0.0})[1]
        if weights is None:
            raise HookError(f"the eager attention of {self.path} ({type(module).__name__}) gave no weights; read z instead")
        return weights

    def _scores(
        self, default: Callable[..., Any], module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kwargs: Any
    ) -> Tensor:
        scores = attention_scores(query, key, mask, module, kwargs)
        seen = (type(module), str(query.dtype))
        if seen not in LayerTap.checked:
            with torch.no_grad():
                ours = scores_to_pattern(scores, module, kwargs).float()
                theirs = self._eager(default, module, query, key, value, mask, kwargs).float()
                off = float((ours - theirs).abs().max())
            if not off <= (1e-4 if query.dtype in (torch.float32, torch.float64) else 2e-2):
                raise HookError(
                    f"attn_scores of {self.path} ({type(module).__name__}): softmax(scores) is off the model's own "
                    f"pattern by {off:.1e}, so this attention computes scores in another way; read pattern instead"
                )
            LayerTap.checked.add(seen)
        return scores


def _eager_of(module: nn.Module) -> Callable[..., Any]:
    """The `eager_attention_forward` of the module that defines the attention class or one of its bases."""
    for cls in type(module).__mro__:
        found = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    raise HookError(f"{type(module).__name__} has no eager attention function to recompute its pattern with; read z instead")


def additive_mask(mask: Tensor | None, query: Tensor, key: Tensor, kwargs: Any) -> Tensor | None:
    """Return a kernel's mask in the additive form that eager attention wants.

    SDPA's `None` means causal, its bool masks mean "may attend"; flash kernels take the window as an argument and
    padding as a [batch, src] mask. Giving any of these to an eager function is silently wrong.

    Args:
        mask: what the kernel was given.
        query: [batch n_heads pos d_head].
        key: [batch n_kv_heads src d_head].
        kwargs: the kernel's other arguments.
    """
    n_query, n_key = query.shape[2], key.shape[2]
    if mask is not None and mask.is_floating_point():
        return mask[..., :n_key]
    if mask is not None and mask.ndim == 4:
        allowed = mask[..., :n_key].bool()
    else:
        column = torch.arange(n_key, device=query.device)
        row = torch.arange(n_key - n_query, n_key, device=query.device)[:, None]
        allowed = column <= row if kwargs.get("is_causal") is not False else torch.ones_like(column <= row)
        if kwargs.get("sliding_window"):
            allowed = allowed & (column > row - kwargs["sliding_window"])
        allowed = allowed[None, None]
        if mask is not None:  # flash attention's padding mask
            allowed = allowed & mask[:, None, None, :].bool()
    zero = torch.zeros(allowed.shape, dtype=query.dtype, device=query.device)
    return zero.masked_fill(~allowed, torch.finfo(query.dtype).min)


def attention_scores(query: Tensor, key: Tensor, mask: Tensor | None, module: nn.Module, kwargs: Any) -> Tensor:
    """Return softcap(q kᵀ · scale) + mask, [batch n_heads pos src].

    Args:
        query: [batch n_heads pos d_head], after rotary.
        key: [batch n_kv_heads src d_head], after rotary; repeated over each group of query heads.
        mask: additive.
        module: the attention module.
        kwargs: the kernel's arguments; `scaling` and `softcap` are read.
    """
    scale = kwargs.get("scaling")
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * (query.shape[-1] ** -0.5 if scale is None else scale)
    cap = kwargs.get("softcap")
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    return scores if mask is None else scores + mask


def scores_to_pattern(scores: Float[Tensor, "batch n_heads pos src"], module: nn.Module, kwargs: Any) -> Float[Tensor, "batch n_heads pos src"]:
    """Return softmax(scores) in fp32; attention sinks (GPT-OSS) take their share, so rows then sum to less than 1."""
    sinks = kwargs.get("s_aux")
    if sinks is None:
        sinks = getattr(module, "sinks", None)
    wide = scores.float()
    if sinks is None:
        return wide.softmax(-1).to(scores.dtype)
    column = sinks.float().reshape(1, -1, 1, 1).expand(*wide.shape[:3], 1)
    return torch.cat([wide, column], dim=-1).softmax(-1)[..., :-1].to(scores.dtype)
