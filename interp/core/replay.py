"""One run of a model, remembered so that single blocks of it can be run again on many variants of the batch.

A block of the unmodified model is called as the model called it: with the arguments of the base run, cut to the
columns that are wanted and repeated for the branches. Attention over earlier columns takes the base run's keys and
values, which no edit at a later column can change. The model's own code does the rest, so parallel blocks, post-norms,
multipliers, mixtures of experts and soft-caps are the model's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interp.core.attention import CURRENT, LayerTap, additive_mask
from interp.core.engine import Forward
from interp.core.errors import HookError
from interp.core.frame import Frame
from interp.core.intervention import Intervention
from interp.core.passes import frame_of, logits_to_keep, model_inputs, own_logits
from interp.core.plan import Plan
from interp.core.site import Site
from interp.core.sweep_cells import CellEdit
from interp.core.text import Tokens

if TYPE_CHECKING:
    from interp.core.manager import HookManager

__all__ = ["BlockCall", "Replay", "answer_stream"]

_JOINABLE = ("sdpa", "eager")


@dataclass
class BlockCall:
    """How the model called one block: its module and arguments, without the hidden states."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: str | None


@dataclass
class _Attention:
    """What one attention layer of the base run attended to."""

    module: nn.Module
    key: Float[Tensor, "batch kv pos d"]
    value: Float[Tensor, "batch kv pos d_v"]
    mask: Tensor | None

    def joined(self, key: Tensor, value: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Branches' keys and values of the columns from `start` on, with the base run's before them, and the mask."""
        mask = None if self.mask is None else self.mask[..., start:, :]
        if mask is not None and mask.shape[0] not in (1, key.shape[0]):
            mask = mask.repeat(key.shape[0] // mask.shape[0], *[1] * (mask.ndim - 1))
        return _before(self.key, key, start), _before(self.value, value, start), mask


def _before(base: Tensor, own: Tensor, start: int) -> Tensor:
    out = own.new_empty(own.shape[0], own.shape[1], start + own.shape[2], own.shape[3])
    out[:, :, start:] = own
    out.unflatten(0, (-1, base.shape[0]))[:, :, :, :start] = base[:, :, :start]
    return out


class _Seen(LayerTap):
    """Notes what an attention layer of the base run is given; changes nothing."""

    def __init__(self, keep: Callable[[_Attention], None]) -> None:
        super().__init__({})
        self.keep = keep

    def _attend(
        self,
        kernel: Callable[..., Any],
        default: Any,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        mask = additive_mask(attention_mask, query, key, kwargs)
        self.keep(_Attention(module, key.detach().contiguous(), value.detach().contiguous(), _shared(mask)))
        return kernel(module, query, key, value, attention_mask, **kwargs)


class _Joined(LayerTap):
    """Puts the base run's keys and values before those of the branches."""

    def __init__(self, inner: LayerTap, past: _Attention, start: int) -> None:
        super().__init__(inner.sites, n_kv_heads=inner.n_kv_heads)
        self.past, self.start = past, start

    def _attend(
        self,
        kernel: Callable[..., Any],
        default: Any,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        key, value, mask = self.past.joined(key, value, self.start)
        return super()._attend(kernel, default, module, query, key, value, mask, **kwargs)


class Replay:
    """A base run whose blocks can be run again.

    Memory: per layer the stream [batch pos d_model], keys and values [batch n_kv_heads pos d_head] and, where the model
    makes one, a mask [pos pos] (per row where rows differ).

    Args:
        hm: the model.
        tokens: the batch.
        write: edits of the embeddings that the base run itself is made with.

    Attributes:
        resid: the residual stream before each block, and after the last: n_layers + 1 of [batch pos d_model].
        logits: the model's own logits at each row's last real token, [batch 1 d_vocab].
        why_whole: why columns before an edit cannot be left out, or "".
    """

    def __init__(self, hm: "HookManager", tokens: Tokens, write: Sequence[Intervention] = ()) -> None:
        self.hm, self.tokens, self.write = hm, tokens, tuple(write)
        self.batch, self.length = tokens.ids.shape
        self.frame = frame_of(tokens, 0, self.batch)
        self.resid: list[Tensor] = []
        self._calls: list[BlockCall] = []
        self._attention: dict[int, list[_Attention]] = {}
        self._blocks = [hm.map.module(hm.root, "block", layer) for layer in range(hm.n_layers)]
        self._attends = [hm.map.module(hm.root, "attn", layer) for layer in range(hm.n_layers)]
        self.logits = self._base_run()
        self.why_whole = self._why_whole()

    def _base_run(self) -> Float[Tensor, "batch 1 d_vocab"]:
        ids, mask, positions = model_inputs(self.hm, self.tokens, self.frame)
        keep, pick = logits_to_keep(self.frame, self.hm.caller, "last", False)
        state, handles = Forward(Plan.make(self.hm.atlas, (), self.write), self.frame), []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
            if CURRENT.get() is state and kwargs is not None:
                self._note(module, args, kwargs)

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if CURRENT.get() is state:
                self.resid.append(_hidden(output))

        try:
            for block in self._blocks:
                assert block is not None
                handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
            assert block is not None
            handles.append(block.register_forward_hook(after))
            with torch.no_grad(), state.attached(self.hm.model):
                for layer, module in enumerate(self._attends):
                    if module is not None:
                        state.taps[id(module)] = _Seen(self._attention.setdefault(layer, []).append)
                return own_logits(
                    state.run(lambda: self.hm.caller(ids, mask=mask, position_ids=positions, keep=keep)), pick
                )
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keyword = None if args else "hidden_states"
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden, Tensor):
            raise HookError(f"{type(module).__name__} was called without hidden states ({', '.join(kwargs)})")
        self.resid.append(hidden.detach().clone())
        others = {k: _shared(v) for k, v in kwargs.items() if k != keyword}
        self._calls.append(BlockCall(module, tuple(_shared(a) for a in args[1:]), others, keyword))

    def _why_whole(self) -> str:
        """Why keys and values of earlier columns cannot be taken from the base run."""
        if [id(call.module) for call in self._calls] != [id(block) for block in self._blocks]:
            raise HookError(f"{self.hm.map.family} does not call its blocks once each in order")
        if self.hm.map.attention != "tap":
            return f"attention of {self.hm.map.family} is computed inside its own module"
        for layer, module in enumerate(self._attends):
            seen = self._attention.get(layer, [])
            if module is None or len(seen) != 1 or seen[0].key.shape[2] != self.length:
                return f"block {layer} has no attention whose keys and values are seen"
            kernel = getattr(getattr(seen[0].module, "config", None), "_attn_implementation", None)
            if kernel not in _JOINABLE:
                return f"the attention kernel {kernel!r} takes no mask for some of the queries"
        return ""

    # -- blocks -------------------------------------------------------------------------------------------------

    def block(
        self, layer: int, x: Float[Tensor, "rows pos d"], *, start: int = 0, edits: Sequence[CellEdit] = ()
    ) -> Float[Tensor, "rows pos d"]:
        """Run one block on branches and return the stream that leaves it.

        Args:
            layer: the block.
            x: the stream that enters it, columns `start` and later, branch after branch.
            start: the first column; earlier ones are the base run's.
            edits: what to change inside.
        """
        branches = x.shape[0] // self.batch
        call = self._calls[layer]
        cut = _Cut(self.batch, branches, self.length, start)
        args, kwargs = cut(call.args), {k: cut(v, k) for k, v in call.kwargs.items()}
        if call.keyword is None:
            args = (x, *args)
        else:
            kwargs[call.keyword] = x
        points = {Site(e.site).key: self.hm.atlas.point(Site(e.site)) for e in edits}
        frame = Frame(ids=None, mask=None, batch=x.shape[0], length=x.shape[1], prompt_length=x.shape[1])
        forward = Forward(Plan((), tuple(edits), tuple(points.values())), frame)
        with torch.no_grad(), forward.attached(self.hm.model):
            if start:
                past = self._attention[layer][0]
                inner = forward.taps.get(id(past.module), LayerTap({}))
                forward.taps[id(past.module)] = _Joined(inner, past, start)
            return _hidden(forward.run(lambda: call.module(*args, **kwargs)))

    def front(self, branches: int, edits: Sequence[CellEdit], *, start: int = 0) -> Float[Tensor, "rows pos d"]:
        """Return the stream that enters the first block when the embedding is edited, columns `start` and later."""
        given = self.tokens
        places = None if given.position_ids is None else given.position_ids.repeat(branches, 1)
        ids, mask = given.ids.repeat(branches, 1), given.mask.repeat(branches, 1)
        tokens = replace(given, ids=ids, mask=mask, position_ids=places, spans={})
        whole = [replace(edit, first=0) for edit in edits]
        if self.write:
            raise HookError("a sweep whose base run has edits at the embedding cannot try further ones there")
        return self.hm.run(tokens, read=["0.resid_pre"], write=whole)["0.resid_pre"][:, start:]

    def off(self, start: int) -> float:
        """Return by how much replayed blocks are off the base run, relative to the stream, on two branches of it.

        Args:
            start: the first column that is replayed.
        """
        keep = self.tokens.mask[:, start:].repeat(2, 1)
        worst = 0.0
        for layer, (x, expected) in enumerate(zip(self.resid[:-1], self.resid[1:], strict=True)):
            both, want = (t[:, start:].repeat(2, 1, 1) for t in (x, expected))
            found = self.block(layer, both, start=start)
            real = keep.to(found.device)
            delta = (found - want).float()[real]
            off = float(delta.abs().max()) / max(1.0, float(want[real].float().abs().max()))
            worst = max(worst, off if off == off else float("inf"))
        return worst


class _Cut:
    """Arguments of a block, cut to the columns from `start` on and repeated for each branch."""

    def __init__(self, batch: int, branches: int, length: int, start: int) -> None:
        self.batch, self.branches, self.length, self.start = batch, branches, length, start

    def __call__(self, value: Any, name: str = "") -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, dict):
            return {k: self(v, k) for k, v in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self(v) for v in value)
        return value

    def _tensor(self, x: Tensor) -> Tensor:
        axis = {1: 0, 2: 1, 3: 1, 4: 2}.get(x.ndim)
        if axis is not None and x.shape[axis] == self.length and self.start:
            x = x.narrow(axis, self.start, self.length - self.start)
        if x.ndim < 2 or x.shape[0] % self.batch or (x.shape[0] == 1 != self.batch):
            return x
        if x.shape[0] == 1:
            return x.expand(self.branches, *x.shape[1:])
        return x.repeat(self.branches, *[1] * (x.ndim - 1))


def _shared(value: Any) -> Any:
    """A mask that is the same for every row, once: it need not be repeated for the branches."""
    if not isinstance(value, Tensor) or value.ndim != 4 or value.shape[0] == 1:
        return value
    return value[:1] if bool((value == value[:1]).all()) else value


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def answer_stream(x: Float[Tensor, "n batch pos d"], ends: Int[Tensor, " batch"]) -> Float[Tensor, "n batch d"]:
    """Return each row's column `ends`, the same in every branch; columns before the first are clamped to it."""
    at = ends.clamp(min=0).to(x.device)[None, :, None, None].expand(x.shape[0], -1, 1, x.shape[3])
    return x.gather(2, at)[:, :, 0]
