"""One forward pass with hooks: which hooks a request needs, what each does, and when the forward may stop."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from interp.core.attention import CURRENT, LayerTap
from interp.core.errors import HookError, ShapeError, SiteError, WhereError
from interp.core.frame import Frame
from interp.core.inside import InsideTap
from interp.core.intervention import Intervention
from interp.core.norms import with_values_of
from interp.core.place import Place
from interp.core.plan import Plan
from interp.core.points import Point
from interp.core.site import KINDS, Site
from interp.core.slicing import take
from interp.core.views import linear_weight

__all__ = ["Forward", "Stop"]

_RANK = {kind: i for i, kind in enumerate(KINDS)}
# A block may add into such a tensor in place (Falcon's do), and what was read for a gradient is the tensor itself.
_ADDED_TO = ("attn_out", "mlp_out")


class Stop(BaseException):
    """Ends a forward pass once everything asked for has been read; never leaves `Forward`."""


@dataclass
class _Work:
    """What one run does at one place."""

    forward: "Forward"
    point: Point
    reads: list[Site]
    edits: list[tuple[int, Intervention]]
    gates: list[Any] = field(default_factory=list)

    def query_rows(self) -> Tensor | None:
        """The columns of a pattern that are read, if only some are and nothing needs the rest."""
        wheres = {r.where for r in self.reads}
        where = next(iter(wheres), None)
        if (
            self.touches
            or len(wheres) != 1
            or where is None
            or where.pos is None
            or where.flattens
            or where.rows is not None
        ):
            return None
        return where.read_columns(self.forward.frame) - self.forward.frame.offset

    def visit(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """Make the edits in list order, then the reads; return the tensor that the model goes on with."""
        site, forward = self.point.site, self.forward
        for gate in self.gates:
            forward.decisions[gate] = gate.decide(x, forward.frame, forward.decisions.get(gate))
        x = self._edited(x, after_reads=False)
        if forward.differentiate and self.reads:
            x = forward.on_path(site, x)
        for read in self.reads:
            forward.keep(read, x, rows)
        if forward.differentiate and self.reads and site.kind in _ADDED_TO:
            x = x.clone()
        x = self._edited(x, after_reads=True)
        forward.waiting.discard(site.key)
        if forward.stop and not forward.waiting:
            raise Stop
        return x

    def _edited(self, x: Tensor, *, after_reads: bool) -> Tensor:
        site, forward = self.point.site, self.forward
        for number, edit in self.edits:
            if edit.after_reads == after_reads:
                x = forward.edit(number, edit, Place(site, forward.frame, edit.selection, forward.decisions), x)
        return x

    @property
    def touches(self) -> bool:
        """Whether the module must get the tensor back."""
        return bool(self.edits) or (self.forward.keeps_graph and bool(self.reads))


@dataclass
class Forward:
    """One forward pass under way, or a series of them (generation, or whatever happens inside `hooked`).

    Args:
        plan: what is asked for.
        frame: the tokens it looks at; replaced at every step of a generation.
        stop: end the forward once all is read.
        differentiate: keep full tensors on the autograd path, for gradients.
        detach: reads are cut from the graph and copied.
        to: device of the reads, or None to leave them.
        embedding: the token embedding, where gradients start.
        block_of: the model whose own calls a `hooked` block watches.
    """

    plan: Plan
    frame: Frame
    stop: bool = False
    differentiate: bool = False
    detach: bool = True
    to: torch.device | None = None
    embedding: nn.Module | None = None
    block_of: nn.Module | None = None
    results: dict[Site, list[Tensor]] = field(default_factory=dict, init=False)
    path: dict[Site, Tensor] = field(default_factory=dict, init=False)
    taps: dict[int, LayerTap] = field(default_factory=dict, init=False)
    changed: list[Tensor | None] = field(init=False)
    selected: list[bool] = field(init=False)
    waiting: set[tuple[str, int | None]] = field(default_factory=set, init=False)
    modes: list[InsideTap] = field(default_factory=list, init=False)
    sent: set[torch.device] = field(default_factory=set, init=False)
    decisions: dict[Any, Any] = field(default_factory=dict)
    """What each gate decided (`interp.core.gate`), the late ones beforehand."""

    def __post_init__(self) -> None:
        self.changed = [None] * len(self.plan.writes)
        self.selected = [False] * len(self.plan.writes)
        # Not a strong reference: the two would keep each other, and all that was read, until Python looks for cycles.
        me: Forward = weakref.proxy(self)
        work = {p.site.key: _Work(me, p, [], []) for p in self.plan.points}
        for read in self.plan.reads:
            work[read.key].reads.append(read)
        for number, edit in enumerate(self.plan.writes):
            work[Site(edit.site).key].edits.append((number, edit))
        for gate in self.plan.gates:
            work[Site(gate.site).key].gates.append(gate)
        self.work = work

    @property
    def keeps_graph(self) -> bool:
        """Whether what is read must lie on the path of gradients, so that they reach it."""
        return self.differentiate or (not self.detach and torch.is_grad_enabled())

    # -- at a site ----------------------------------------------------------------------------------------------

    def edit(self, number: int, edit: Intervention, place: Place, x: Tensor) -> Tensor:
        """Return x with one edit made where it selects; note whether it selected and changed anything."""
        chosen = place.select(x)
        if chosen is not None and not self._selects(place, x):
            return x
        self.selected[number] = True
        try:
            new = edit.edit(x, place)
        except (ShapeError, SiteError, WhereError):
            raise
        except Exception as err:
            err.add_note(
                f"raised inside {type(edit).__name__} at {place.site.short}, activation {tuple(x.shape)} {x.dtype}"
            )
            raise
        if type(new) is not Tensor or new.shape != x.shape or new.dtype != x.dtype or new.device != x.device:
            _check_edit(edit, place.site, x, new)
        if chosen is not None:
            new = torch.where(chosen, new, x)
        seen = self.changed[number]
        # One change is enough to know of; on a GPU nobody may wait for the answer.
        if (seen is not None and seen.device.type == "cpu" and bool(seen)) or edit.may_do_nothing:
            return new
        with torch.no_grad():
            differs = (new != x).any()
            self.changed[number] = differs if seen is None else seen | differs.to(seen.device)
        return new

    def _selects(self, place: Place, x: Tensor) -> bool:
        """Whether the selection holds anything in this forward; decided on the CPU."""
        src = place.where.src_columns(self.frame)
        return place.covered(x.shape[place.site.axes.index("pos")])[1] and (src is None or bool(src.any()))

    def on_path(self, site: Site, x: Tensor) -> Tensor:
        """Keep a full tensor that the rest of the forward depends on, so that a gradient reaches it."""
        if not x.requires_grad:
            x = x.detach().requires_grad_(True)
        self.path[Site(site.short)] = x
        return x

    def keep(self, read: Site, x: Tensor, rows: Tensor | None = None) -> None:
        """Take a read's slice and keep it."""
        if self.differentiate:
            self.results.setdefault(read, [x])  # sliced after the backward pass
            return
        part = take(x, read, self.frame, rows)
        if self.detach or not part.requires_grad:
            part = part.detach()
            if self.to is not None and self.to != part.device:
                self.sent.add(part.device)
                part = _send(part, self.to)
            elif _borrows(part, x):
                part = part.clone()
        self.results.setdefault(read, []).append(part)

    # -- hooks --------------------------------------------------------------------------------------------------

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator["Forward"]:
        """Register this run's hooks, make it the thread's current run, and take everything off again, come what may."""
        handles: list[Any] = []
        token = CURRENT.set(self)
        try:
            if self.differentiate and self.embedding is not None:
                handles.append(self.embedding.register_forward_hook(self._rooted))
            for (_, side), works in self._by_module().items():
                self._attach(works, side, handles)
            yield self
        finally:
            CURRENT.reset(token)
            while self.modes:
                self.modes.pop().__exit__(None, None, None)
            for handle in handles:
                handle.remove()

    def _rooted(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Start the graph at the embedding when all parameters are frozen: later would cut off what is before."""
        if CURRENT.get() is not self or output.requires_grad:
            return None
        return output.detach().requires_grad_(True).clone()

    def _by_module(self) -> dict[tuple[int, str], list[_Work]]:
        groups: dict[tuple[int, str], list[_Work]] = {}
        for work in self.work.values():
            groups.setdefault((id(work.point.module), work.point.side), []).append(work)
        for works in groups.values():
            works.sort(key=lambda w: _RANK[w.point.site.kind])
        return groups

    def _attach(self, works: list[_Work], side: str, handles: list[Any]) -> None:
        module = works[0].point.module
        if side == "in":
            handles.append(module.register_forward_pre_hook(self._pre_hook(works), with_kwargs=True))
        elif side == "tap":
            self.taps[id(module)] = LayerTap({w.point.site.kind: w for w in works})
        elif side == "inside":
            enter, leave = self._inside_hooks(works)
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave, always_call=True))
        else:
            handles.append(module.register_forward_hook(self._post_hook(works)))

    def _pre_hook(self, works: list[_Work]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
            # Another thread's forward can see this hook before torch has noted that it takes keywords.
            if CURRENT.get() is not self or kwargs is None:
                return None
            name = None if args else _main_argument(kwargs, works[0].point)
            x = args[0] if name is None else kwargs[name]
            original = x
            for work in works:
                x = self._through(work, x)
            if x is original:
                return None
            return ((x, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: x})

        return hook

    def _post_hook(self, works: list[_Work]) -> Callable[..., Any]:
        inside = [w for w in works if w.point.part in ("scale", "normalized")]
        outside = [w for w in works if w not in inside]

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if CURRENT.get() is not self:
                return None
            if works[0].point.part == "logits":
                return self._visit_logits(works[0], output)
            x = output[0] if isinstance(output, tuple) else output
            original = x
            if inside:
                x = self._visit_norm(inside, module, args[0], x)
            for work in outside:
                x = self._visit_result(work, args[0], x) if work.point.part == "result" else self._through(work, x)
            if x is original:
                return None
            return (x, *output[1:]) if isinstance(output, tuple) else x

        return hook

    def _inside_hooks(self, works: list[_Work]) -> tuple[Callable[..., None], Callable[..., None]]:
        """Watch torch's softmax and attention while the module runs."""
        point = works[0].point

        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            if CURRENT.get() is self:
                self.modes.append(InsideTap({w.point.site.kind: w for w in works}, module, point.n_kv_heads))
                self.modes[-1].__enter__()

        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if CURRENT.get() is self and self.modes:
                self.modes.pop().__exit__(None, None, None)

        return enter, leave

    def _through(self, work: _Work, x: Tensor) -> Tensor:
        """Take a module's tensor to the site's, visit, and take it back."""
        point, frame = work.point, self.frame
        whole = self._unflattened(x)
        if whole.shape[0] == 1 != frame.batch:
            whole = whole.expand(frame.batch, *whole.shape[1:])
        old = point.view.get(whole)
        self._check_shape(point, old)
        new = work.visit(old)
        if not work.touches:
            return x
        back = point.view.put(whole, new) if new is not whole else whole
        back = _like(back, x)
        if point.in_place and new is not old:
            return x.copy_(back)
        return back

    def _unflattened(self, x: Tensor) -> Tensor:
        """[batch pos …] of a tensor whose module sees batch and positions as one axis (OPT's MLP, routers)."""
        frame = self.frame
        flat = x.ndim == 2 and x.shape[0] == frame.batch * frame.length
        return x.unflatten(0, (frame.batch, frame.length)) if flat else x

    def _check_shape(self, point: Point, x: Tensor) -> None:
        frame = self.frame
        if x.ndim < 3 or x.shape[0] != frame.batch or x.shape[1] != frame.length:
            raise HookError(
                f"{point.site.short}: {point.path} gave {tuple(x.shape)} where [batch {frame.batch}, "
                f"pos {frame.length}, …] was expected; this module lays its tensors out in another way"
            )

    def _visit_norm(self, works: list[_Work], module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """σ and the normalised value by our formula; the module's output is replaced only if one was touched."""
        spec = works[0].point.norm
        assert spec is not None
        by_part = {w.point.part: w for w in works}
        touched = any(w.touches for w in works)
        centred = spec.centre(self._unflattened(x))
        scale = spec.scale(centred)
        if "scale" in by_part:
            scale = self._part(by_part["scale"], scale)
        normalized = centred / scale
        if "normalized" in by_part:
            normalized = self._part(by_part["normalized"], normalized)
        if not touched:
            return output
        made = _like(spec.output(normalized, module, output.dtype), x)
        # The module's own bits, where only the gradient is to go by the formula.
        keeps = all(edit.keeps_values for work in works for _, edit in work.edits)
        return with_values_of(output, made) if keeps else made

    def _part(self, work: _Work, x: Tensor) -> Tensor:
        old = work.point.view.get(x)
        new = work.visit(old)
        return x if new is old and not work.touches else work.point.view.put(x, new)

    def _visit_result(self, work: _Work, z: Tensor, output: Tensor) -> Tensor:
        """Each head's output z_h W_O^h; an edit changes the sum by what it changes here."""
        w_o = linear_weight(work.point.module)  # [n_heads · d_head, d_model]
        n = work.point.n_heads
        heads = self._unflattened(z).unflatten(-1, (n, -1))
        old = torch.einsum("bphd,hdm->bphm", heads, w_o.reshape(n, -1, w_o.shape[-1]))
        new = work.visit(old)
        if not work.touches:
            return output
        if self.keeps_graph:  # the gradient must pass through the heads' outputs, and only through them
            return output.detach() - _like(old.sum(2), z).detach() + _like(new.sum(2), z)
        return output + _like((new - old).sum(2), z)

    def _visit_logits(self, work: _Work, output: Any) -> Any:
        bare = isinstance(output, Tensor)
        logits = output if bare else output.logits
        frame, narrow = self.frame, self.frame
        if logits.shape[1] != frame.length:  # logits_to_keep: only the last columns are there
            kept = logits.shape[1]
            narrow = replace(frame, offset=frame.total - kept, length=kept)
        self.frame = narrow
        try:
            new = work.visit(logits)
        finally:
            self.frame = frame
        if bare:
            return new
        if new is not logits:
            output.logits = new
        return output

    # -- a forward ----------------------------------------------------------------------------------------------

    def begin(self, frame: Frame) -> None:
        """Turn to the next forward: every place asked for has yet to be reached."""
        self.frame = frame
        self.waiting = set(self.work)

    def run(self, call: Callable[[], Any]) -> Any:
        """Call the model; return its output, or None when it was stopped because everything had been read.

        Raises:
            HookError: a place asked for was never reached.
        """
        self.begin(self.frame)
        try:
            output = call()
        except Stop:
            return None
        self.check_fired()
        return output

    def finish(self) -> None:
        """Wait, once for the whole forward, until what was sent to another device has arrived."""
        for device in self.sent:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
        self.sent.clear()

    def check_fired(self) -> None:
        """Refuse to go on when a hook did not fire.

        Raises:
            HookError: names the sites.
        """
        if not self.waiting:
            return
        missed = [self.work[key].point for key in self.waiting]
        names = ", ".join(sorted(p.site.short for p in missed))
        why = (
            "this attention does not go through transformers' attention interface (a ModelMap with attention='inside' "
            "watches the softmax in the module itself)"
            if missed[0].side == "tap"
            else (f"the forward pass never called {missed[0].path!r}")
        )
        raise HookError(f"nothing happened at {names}: {why}; the result would have been silently wrong")


def _like(whole: Tensor, x: Tensor) -> Tensor:
    """A [batch pos …] tensor as the module had it: flattened, if x was."""
    return whole.flatten(0, 1) if x.ndim == 2 and whole.ndim == 3 else whole


def _borrows(part: Tensor, x: Tensor) -> bool:
    """Whether a read shares memory with the model's tensor (an edit could change it), or keeps more than its own."""
    storage = part.untyped_storage()
    shared = storage.data_ptr() == x.untyped_storage().data_ptr()
    return shared or storage.nbytes() > part.numel() * part.element_size()


def _send(x: Tensor, device: torch.device) -> Tensor:
    """Copy to another device; to the CPU through pinned memory without waiting (`finish` waits once)."""
    if device.type == "cpu" and x.device.type == "cuda":
        out = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        return out.copy_(x, non_blocking=True)
    return x.to(device, non_blocking=True)


def _main_argument(kwargs: dict[str, Any], point: Point) -> str:
    """The keyword under which a module gets its hidden states."""
    if "hidden_states" in kwargs:
        return "hidden_states"
    for name, value in kwargs.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2:
            return name
    raise HookError(f"{point.path} was called without a tensor among its arguments ({', '.join(kwargs)})")


def _check_edit(edit: Intervention, site: Site, old: Tensor, new: Any) -> None:
    who = f"{type(edit).__name__} at {site.short}"
    if not isinstance(new, Tensor):
        raise ShapeError(f"{who} returned {type(new).__name__}; it must return a tensor of shape {tuple(old.shape)}")
    if new.shape != old.shape or new.dtype != old.dtype or new.device != old.device:
        raise ShapeError(
            f"{who} returned {tuple(new.shape)} {new.dtype} on {new.device}; "
            f"the activation is {tuple(old.shape)} {old.dtype} on {old.device} [{' '.join(site.axes)}]"
        )
