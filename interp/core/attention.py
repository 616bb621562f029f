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
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interp.core.errors import HookError

__all__ = ["CURRENT", "LayerTap", "TapSite", "additive_mask", "attention_scores", "install_tap"]


@runtime_checkable
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
    AttentionInterface.get_interface = get_interface


def _tapped(
    state: _State, kernel: Callable[..., Any], default: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any
) -> Any:
    tap = state.taps.get(id(module))
    if tap is None:
        return kernel(module, *args, **kwargs)
    return tap(kernel, default, module, *args, **kwargs)


@runtime_checkable
class TapSite(Protocol):
    """What a run does at one tapped site: edits in order, then reads."""

    @property
    def touches(self) -> bool:
        """Whether the layer must go on with what `visit` returns."""

    def query_rows(self) -> Int[Tensor, "batch n"] | None:
        """Which query positions are read, if only some are."""

    def visit(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return the site's tensor after its edits; it has been read. With `rows`, x holds only those positions."""


@dataclass(frozen=True)
class _Call:
    """One call of an attention kernel: queries and keys after rotary, the mask in additive form."""

    module: nn.Module
    default: Callable[..., Any] | None
    query: Float[Tensor, "batch n_heads pos d_head"]
    key: Float[Tensor, "batch n_kv_heads src d_head"]
    value: Float[Tensor, "batch n_kv_heads src d_v"]
    mask: Tensor | None
    kwargs: dict[str, Any]

    def at_rows(self, rows: Int[Tensor, "batch n"] | None) -> "_Call":
        """The same call for some query positions only: n/pos of the scores' memory and work."""
        if rows is None:
            return self
        query = self.query.gather(2, _spread(rows.to(self.query.device), self.query))
        mask = self.mask
        if mask is not None:
            mask = mask.expand(query.shape[0], *mask.shape[1:])
            mask = mask.gather(2, _spread(rows.to(mask.device), mask))
        return replace(self, query=query, mask=mask)

    def pattern(self) -> Float[Tensor, "batch n_heads pos src"]:
        """The pattern by the model's own eager function: its soft-cap, sinks and upcasting are the model's."""
        eager = self.default if self.default is not None else _eager_of(self.module)
        arguments = {**self.kwargs, "dropout": 0.0}
        weights = eager(self.module, self.query, self.key, self.value, self.mask, **arguments)[1]
        if weights is None:
            raise HookError(f"the eager attention of {type(self.module).__name__} gave no weights; read z instead")
        return weights

    def scores(self) -> Float[Tensor, "batch n_heads pos src"]:
        """Scores by our formula, which is compared with the model's own pattern once per class and dtype."""
        scores = attention_scores(self.query, self.key, self.mask, self.kwargs)
        seen = (type(self.module), self.query.dtype)
        if seen not in _CHECKED:
            with torch.no_grad():
                off = float((self.softmax(scores).float() - self.pattern().float()).abs().max())
            if not off <= (1e-4 if self.query.dtype in (torch.float32, torch.float64) else 2e-2):
                raise HookError(
                    f"attn_scores of {type(self.module).__name__}: softmax(scores) is off the model's own pattern by "
                    f"{off:.1e}, so this attention computes scores in another way; read pattern instead"
                )
            _CHECKED.add(seen)
        return scores

    def softmax(self, scores: Float[Tensor, "batch n_heads pos src"]) -> Float[Tensor, "batch n_heads pos src"]:
        """The pattern of scores, in fp32; attention sinks (GPT-OSS) take a share, so rows sum to less than 1."""
        sinks = self.kwargs.get("s_aux")
        if sinks is None:
            sinks = getattr(self.module, "sinks", None)
        wide = scores.float()
        if sinks is None:
            return wide.softmax(-1).to(self.query.dtype)
        column = sinks.float().reshape(1, -1, 1, 1).expand(*wide.shape[:3], 1)
        return torch.cat([wide, column], dim=-1).softmax(-1)[..., :-1].to(self.query.dtype)

    def output(self, pattern: Float[Tensor, "batch n_heads pos src"]) -> Float[Tensor, "batch pos n_heads d_v"]:
        """The heads' outputs of a pattern."""
        dropout = self.kwargs.get("dropout") or 0.0
        weights = nn.functional.dropout(pattern, p=dropout, training=self.module.training).to(self.value.dtype)
        repeat = self.query.shape[1] // self.value.shape[1]
        return torch.matmul(weights, self.value.repeat_interleave(repeat, dim=1)).transpose(1, 2).contiguous()


def _spread(rows: Int[Tensor, "batch n"], like: Tensor) -> Tensor:
    """An index for `gather` along axis 2 of a [batch heads pos width] tensor."""
    return rows[:, None, :, None].expand(rows.shape[0], like.shape[1], rows.shape[1], like.shape[3])


_CHECKED: set[tuple[type, torch.dtype]] = set()
"""Attention classes whose score formula has been compared with their own pattern in this process."""


class LayerTap:
    """What one run does inside one attention layer.

    Args:
        sites: kind ("rot_q", "rot_k", "attn_scores", "pattern") → what to do there.
        n_kv_heads: key/value heads, where the keys may come repeated for each query head; None where they do not.
    """

    def __init__(self, sites: Mapping[str, TapSite], *, n_kv_heads: int | None = None) -> None:
        self.sites = sites
        self.n_kv_heads = n_kv_heads

    def __call__(
        self,
        kernel: Callable[..., Any],
        default: Callable[..., Any] | None,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Call the kernel as the model would, with this run's edits and reads around it."""
        query, key = self._rotated(query, key)
        return self._attend(kernel, default, module, query, key, value, attention_mask, **kwargs)

    def _rotated(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys after the edits at rot_q and rot_k; they have been read."""
        return self._heads("rot_q", query), self._keys(key)

    def _attend(
        self,
        kernel: Callable[..., Any],
        default: Callable[..., Any] | None,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Call the kernel on these queries and keys, with the edits and reads of scores and patterns around it."""
        scores, pattern = self.sites.get("attn_scores"), self.sites.get("pattern")
        if scores is None and pattern is None:
            return kernel(module, query, key, value, attention_mask, **kwargs)
        call = _Call(module, default, query, key, value, additive_mask(attention_mask, query, key, kwargs), kwargs)
        if any(site is not None and site.touches for site in (scores, pattern)):
            weights = call.softmax(scores.visit(call.scores())) if scores is not None else call.pattern()
            weights = weights if pattern is None else pattern.visit(weights)
            return call.output(weights), weights
        # Reads come first: the run may be over with them, and then the kernel need not run.
        if scores is not None:
            rows = scores.query_rows()
            scores.visit(call.at_rows(rows).scores(), rows)
        if pattern is not None:
            rows = pattern.query_rows()
            pattern.visit(call.at_rows(rows).pattern(), rows)
        return kernel(module, query, key, value, attention_mask, **kwargs)

    def _keys(self, key: Tensor) -> Tensor:
        copies = 1 if self.n_kv_heads is None else key.shape[1] // self.n_kv_heads
        if copies == 1 or "rot_k" not in self.sites:
            return self._heads("rot_k", key)
        own = key[:, ::copies]
        new = self._heads("rot_k", own)
        return new.repeat_interleave(copies, dim=1) if self.sites["rot_k"].touches else key

    def _heads(self, kind: str, x: Tensor) -> Tensor:
        site = self.sites.get(kind)
        return x if site is None else site.visit(x.transpose(1, 2)).transpose(1, 2)


def _eager_of(module: nn.Module) -> Callable[..., Any]:
    """The `eager_attention_forward` of the module that defines the attention class or one of its bases."""
    for cls in type(module).__mro__:
        found = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    raise HookError(
        f"{type(module).__name__} has no eager attention function to recompute its pattern with; read z instead"
    )


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


def attention_scores(query: Tensor, key: Tensor, mask: Tensor | None, kwargs: Any) -> Tensor:
    """Return softcap(q kᵀ · scale) + mask, [batch n_heads pos src].

    Args:
        query: [batch n_heads pos d_head], after rotary.
        key: [batch n_kv_heads src d_head], after rotary; repeated over each group of query heads.
        mask: additive.
        kwargs: the kernel's arguments; `scaling` and `softcap` are read.
    """
    scale = kwargs.get("scaling")
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * (query.shape[-1] ** -0.5 if scale is None else scale)
    cap = kwargs.get("softcap")
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    return scores if mask is None else scores + mask
