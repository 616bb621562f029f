"""How `run` and `hooked` carry out a plan: batches in parts, the model's arguments, logits, gradients, notes."""

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.core.attention import CURRENT
from interp.core.engine import Forward
from interp.core.errors import DataError, HookError, InterpError, ModelError, ShapeError, WhereError
from interp.core.frame import Frame
from interp.core.gate import Decision
from interp.core.intervention import Intervention
from interp.core.plan import Plan
from interp.core.run import Run
from interp.core.site import Site
from interp.core.slicing import take
from interp.core.text import Tokens

if TYPE_CHECKING:
    from interp.core.manager import HookManager

__all__ = [
    "Caller",
    "check_places",
    "decided_before",
    "frame_of",
    "gates_of",
    "generation_frame",
    "hooked_pass",
    "logits_to_keep",
    "model_inputs",
    "own_logits",
    "refuse_inside_block",
    "run_pass",
    "write_notes",
]

_AFTER_LOGITS_CUT = {"unembed.in", "unembed.out", "logits"}


class Caller:
    """Calls one model, giving its forward only the arguments that it takes."""

    def __init__(self, model: Any) -> None:
        self.model = model
        forward = model.get_base_model().forward if hasattr(model, "get_base_model") else model.forward
        parameters = inspect.signature(forward).parameters
        self.names = set(parameters)
        self.any_name = any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and hasattr(model, "config")

    def takes(self, name: str) -> bool:
        """Whether the forward takes an argument by name (through **kwargs only for Hugging Face models)."""
        return name in self.names

    def __call__(self, ids: Tensor, *, mask: Tensor | None, position_ids: Tensor | None, keep: Any) -> Any:
        """Run the model on token ids.

        Args:
            ids: [batch pos].
            mask: attention mask, or None when nothing is padded.
            position_ids: [batch pos], or None for the model's own.
            keep: which logits, as `logits_to_keep`; None for all.
        """
        arguments: dict[str, Any] = {}
        for name, value in (("attention_mask", mask), ("position_ids", position_ids)):
            if value is None:
                continue
            if not self.takes(name) and not self.any_name:
                raise ModelError(
                    f"{type(self.model).__name__}.forward takes no {name}; give it one unpadded batch at a time"
                )
            arguments[name] = value
        if self.takes("use_cache") or self.any_name:
            arguments["use_cache"] = False
        if keep is not None and self.takes("logits_to_keep"):
            arguments["logits_to_keep"] = keep
        return self.model(ids, **arguments)


def frame_of(tokens: Tokens, row0: int, rows: int) -> Frame:
    """Return the frame of some rows of a batch that is run whole."""
    part = slice(row0, row0 + rows)
    return Frame(
        ids=tokens.ids[part],
        mask=tokens.mask[part],
        batch=min(rows, len(tokens) - row0),
        length=tokens.ids.shape[1],
        prompt_length=tokens.ids.shape[1],
        row0=row0,
        n_rows=len(tokens),
        spans=tokens.spans,
    )


def model_inputs(hm: "HookManager", tokens: Tokens, frame: Frame) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the ids, mask and position ids that the model gets for a frame's rows; None for what it does not need."""
    rows = slice(frame.row0, frame.row0 + frame.batch)
    ids = tokens.ids[rows].to(hm.device, non_blocking=True)
    mask = positions = None
    if tokens.position_ids is not None:
        positions = tokens.position_ids[rows].to(hm.device)
    if frame.padded:
        mask = frame.known_mask().long().to(hm.device, non_blocking=True)
        if positions is None:
            positions = (frame.known_mask().long().cumsum(1) - 1).clamp(min=0).to(hm.device, non_blocking=True)
    return ids, mask, positions


def run_pass(
    hm: "HookManager",
    tokens: Tokens,
    plan: Plan,
    *,
    grad: Callable[[Run], Tensor] | None,
    logits: str,
    to: torch.device | None,
    batch_size: int | None,
) -> Run:
    """Run a batch, in parts if it is larger than `batch_size` or than memory, and return what was asked."""
    refuse_inside_block(hm, "run")
    n, notes, size = len(tokens), list(hm.notes_for(tokens)), batch_size or len(tokens)
    if plan.restricted or plan.gates or plan.late:
        check_places(plan, frame_of(tokens, 0, n))
    whole_batch = next((e for e in plan.writes if e.needs_whole_batch), None)
    if size < n and whole_batch is not None:
        raise DataError(
            f"{type(whole_batch).__name__}({whole_batch.site!r}) mixes rows, so the batch cannot be "
            "split; leave batch_size out"
        )
    if grad is not None and size < n:
        raise DataError(
            f"grad=… needs the whole batch in one forward; give at most {size} rows, or leave batch_size out"
        )
    while True:
        try:
            parts = [_part(hm, tokens, plan, row0, size, grad=grad, logits=logits, to=to) for row0 in range(0, n, size)]
            break
        except torch.OutOfMemoryError as err:
            if size == 1 or grad is not None or whole_batch is not None:
                raise ModelError(
                    f"out of memory with {size} row(s) of {tokens.ids.shape[1]} tokens; read less, or shorter rows"
                ) from err
            torch.cuda.empty_cache()
            size = (size + 1) // 2
            notes.append(f"out of memory: the batch was split into parts of {size} rows")
    forwards = [f for f, *_ in parts]
    for forward in forwards:
        forward.finish()
    write_notes(plan, forwards, notes)
    values = {site: _joined([f.results[site][0] for f in forwards]) for site in plan.reads}
    if len(forwards) > 1:
        one_row = {
            s for s in plan.reads if s.where is not None and isinstance(s.where.rows, int) and not s.where.flattens
        }
        values = {s: v.squeeze(0) if s in one_row else v for s, v in values.items()}
    kept = [out for _, out, _ in parts if out is not None]
    gradients, metric = None, None
    if grad is not None:
        gradients, metric, unused = parts[0][2]
        values = {s: take(v, s, forwards[0].frame).detach() for s, v in values.items()}
        notes.extend(f"the metric does not depend on {s!r}: its gradient is zero" for s in unused)
        if to is not None:
            values, gradients = ({s: v.to(to) for s, v in found.items()} for found in (values, gradients))
    run = Run(
        values,
        tokens=tokens.ids,
        mask=tokens.mask,
        logits=_joined(kept) if kept else None,
        grad=gradients,
        metric=metric,
        notes=notes,
        hm=hm,
    )
    run.gates = gates_of(plan, forwards, run.notes)
    return run


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _part(
    hm: "HookManager",
    tokens: Tokens,
    plan: Plan,
    row0: int,
    size: int,
    *,
    grad: Callable[[Run], Tensor] | None,
    logits: str,
    to: torch.device | None,
) -> tuple[Forward, Tensor | None, Any]:
    frame = frame_of(tokens, row0, size)
    ids, mask, positions = model_inputs(hm, tokens, frame)
    whole = any(p.site.kind in _AFTER_LOGITS_CUT for p in plan.points)
    keep, pick = logits_to_keep(frame, hm.caller, logits, whole)
    forward = Forward(
        plan,
        frame,
        stop=logits == "none",
        differentiate=grad is not None,
        to=to,
        embedding=hm.embedding,
        decisions=decided_before(hm, tokens, plan, frame),
    )
    with torch.set_grad_enabled(grad is not None):
        with forward.attached(hm.model):
            output = forward.run(lambda: hm.caller(ids, mask=mask, position_ids=positions, keep=keep))
        out = None if output is None or logits == "none" else own_logits(output, pick)
        found = None if grad is None else _differentiate(hm, tokens, forward, out, grad)
    if out is not None:
        out = out.detach() if to is None else out.detach().to(to)
    return forward, out, found


def decided_before(hm: "HookManager", tokens: Tokens, plan: Plan, frame: Frame) -> dict[Any, Any]:
    """Return what the gates that are read after their edits say of the prompt, from a forward without those edits."""
    if not plan.late:
        return {}
    prompt = frame if not frame.generating else frame_of(tokens, frame.row0, frame.batch)
    forward = Forward(plan.deciding(hm.atlas), prompt, stop=True)
    ids, mask, positions = model_inputs(hm, tokens, prompt)
    with torch.no_grad(), forward.attached(hm.model):
        forward.run(lambda: hm.caller(ids, mask=mask, position_ids=positions, keep=None))
    return forward.decisions


def gates_of(plan: Plan, forwards: Sequence[Forward], notes: list[str]) -> dict[Any, Decision]:
    """Return what each gate decided, the parts of a batch joined, and note in how many rows it was open."""
    found = {}
    for gate in (*plan.gates, *plan.late):
        parts = [f.decisions[gate] for f in forwards]
        columns = [p.columns() for p in parts]
        whole = Decision(_joined([p.score for p in parts]), _joined([p.open for p in parts]))
        whole.positions = _joined(columns) if columns[0] is not None else None
        found[gate] = whole
        site, n = Site(gate.site).short, len(whole.open)
        said = f"open in {int(whole.open.sum())} of {n} rows"
        if whole.positions is not None:
            said = f"open at {int(whole.positions.sum())} of {whole.positions.numel()} positions"
        notes.append(f"gate at {site} ({gate.kind}, {gate.reduce}, once a {gate.once}): {said}")
    return found


def check_places(plan: Plan, frame: Frame) -> None:
    """Refuse positions and spans that do not exist before the model runs; the frame is that of the whole batch."""
    for edit in plan.writes:
        where = edit.selection
        if where.needs_generation and not frame.generating:
            raise WhereError(
                f"{type(edit).__name__}(where={where!r}) is about generated tokens; run makes none, generate does"
            )
        if where.selects_positions or where.selects_rows:
            selected = where.columns(frame)
            if not frame.generating and not bool(selected.any()):
                raise WhereError(_selects_nothing(edit))
    for gate in (*plan.gates, *plan.late):
        gate.chosen(frame)
    for read in plan.reads:
        if read.where is not None and read.where.pos is not None and not read.where.flattens:
            read.where.read_columns(frame)


def logits_to_keep(frame: Frame, caller: Caller, logits: str, whole: bool) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """What to pass as `logits_to_keep`, and how to get [batch 1 d_vocab] from what comes back."""
    if logits != "last":
        return None, lambda x: x
    ends = frame.ends()
    if whole or not caller.takes("logits_to_keep"):
        return None, lambda x: _columns(x, ends)
    if bool((ends == frame.length - 1).all()):
        return 1, lambda x: x
    columns, place = ends.unique(return_inverse=True)
    device = next(caller.model.parameters()).device
    return columns.to(device), lambda x: _columns(x, place)


def _columns(x: Tensor, index: Tensor) -> Tensor:
    where = index.to(x.device)[:, None, None].expand(-1, 1, x.shape[-1])
    return x.gather(1, where)


def own_logits(output: Any, pick: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the logits of what a model gave, those that are wanted picked."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ModelError(f"the model returned {type(output).__name__} without logits; is it a causal LM?")
    return pick(logits)


def _differentiate(
    hm: "HookManager", tokens: Tokens, forward: Forward, logits: Tensor | None, grad: Callable[[Run], Tensor]
) -> tuple[dict[Site, Tensor], Tensor, list[Site]]:
    """Return the metric's gradient at every read, sliced like it; the metric per row; and the reads it ignores."""
    frame = forward.frame
    live = {s: take(forward.path[Site(s.short)], s, frame) for s in forward.plan.reads}
    run = Run(live, tokens=tokens.ids, mask=tokens.mask, logits=logits, hm=hm)
    metric = grad(run)
    if not isinstance(metric, Tensor) or metric.ndim > 1 or not metric.is_floating_point():
        what = f"shape {tuple(metric.shape)} {metric.dtype}" if isinstance(metric, Tensor) else type(metric).__name__
        raise ShapeError(f"the metric of grad=… must return a floating-point tensor [batch] or a scalar, got {what}")
    if not metric.requires_grad:
        raise HookError(
            "the metric of grad=… does not depend on the model's activations (was something detached inside it?)"
        )
    found = torch.autograd.grad(metric.sum(), list(forward.path.values()), allow_unused=True)
    whole = dict(zip(forward.path, found, strict=True))
    result: dict[Site, Tensor] = {}
    unused: list[Site] = []
    for read in forward.plan.reads:
        place = Site(read.short)
        gradient = whole[place]
        if gradient is None:
            unused.append(read)
            gradient = torch.zeros_like(forward.path[place])
        result[read] = take(gradient, read, frame).clone()
    return result, metric.detach(), unused


def _selects_nothing(edit: Intervention) -> str:
    return (
        f"{type(edit).__name__} at {Site(edit.site).short} selects nothing: {edit.selection!r} holds no position of "
        "this batch"
    )


def refuse_inside_block(hm: "HookManager", verb: str) -> None:
    """Refuse a run inside a `hooked` block of the same model: the block's edits would not act in it, without a word.

    Raises:
        HookError: says what to do instead.
    """
    current = CURRENT.get()
    if isinstance(current, Forward) and current.block_of is hm.model:
        raise HookError(
            f"hm.{verb} inside a hooked() block of the same model would not see the block's reads and edits; "
            f"give them to {verb} itself, or call hm.model in the block"
        )


def write_notes(plan: Plan, forwards: Sequence[Forward], notes: list[str]) -> None:
    """Say which edits changed nothing, with one wait for the device, and refuse those that selected nothing.

    Raises:
        WhereError: an edit's `where` held no position in the whole run.
    """
    for number, edit in enumerate(plan.writes):
        if not any(f.selected[number] for f in forwards):
            raise WhereError(_selects_nothing(edit))
    flags: dict[int, list[Tensor]] = {}
    for forward in forwards:
        for number, flag in enumerate(forward.changed):
            if flag is not None:
                flags.setdefault(number, []).append(flag)
    if not flags:
        return
    device = next(iter(flags.values()))[0].device
    changed = torch.stack([torch.stack([f.to(device) for f in found]).any() for found in flags.values()]).tolist()
    for number, did in zip(flags, changed, strict=True):
        if not did:
            edit = plan.writes[number]
            note = f"{type(edit).__name__} at {Site(edit.site).short} changed nothing: it already had that value"
            notes.append(note)
            warnings.warn(note, stacklevel=4)


@contextmanager
def hooked_pass(hm: "HookManager", plan: Plan) -> Iterator[Run]:
    """Attach a plan to the forwards that the caller makes; the run holds the latest one's reads."""
    if plan.late:
        raise HookError(
            f"the gate at {Site(plan.late[0].site).short} comes after its edit: the prompt has to be run before; "
            "hooked() cannot do that: use run or generate, or an earlier site"
        )
    frame = Frame(ids=None, mask=None, batch=1, length=1, prompt_length=1)
    forward = Forward(plan, frame, detach=False, block_of=hm.model)
    values: dict[Site, Tensor] = {}
    run = Run({}, tokens=None, mask=None, hm=hm)
    run._values = values

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        if CURRENT.get() is not forward or kwargs is None:
            return
        forward.begin(_foreign_frame(args, kwargs, forward.frame))
        forward.results.clear()
        run.tokens = forward.frame.ids
        check_places(plan, forward.frame)

    def after(module: Any, args: tuple[Any, ...], output: Any) -> None:
        if CURRENT.get() is not forward:
            return
        forward.check_fired()
        values.clear()
        values.update({s: forward.results[s][-1] for s in plan.reads})
        run.gates = dict(forward.decisions)
        run._logits = getattr(output, "logits", None)
        run.mask = forward.frame.known_mask() if forward.frame.lazy_mask is None else None

    handles = [hm.model.register_forward_pre_hook(before, with_kwargs=True)]
    try:
        with forward.attached(hm.model):
            handles.append(hm.model.register_forward_hook(after))
            yield run
        if any(flag is not None for flag in forward.changed) or any(forward.selected):
            write_notes(plan, [forward], run.notes)
        elif plan.writes:
            raise HookError("the edits of this hooked() block never ran: no forward of hm.model happened inside it")
    finally:
        for handle in handles:
            handle.remove()


def _foreign_frame(args: tuple[Any, ...], kwargs: dict[str, Any], last: Frame) -> Frame:
    """The frame of a forward that somebody else calls, from its own arguments; with a cache, a step after `last`."""
    ids = args[0] if args else kwargs.get("input_ids")
    shape = ids if ids is not None else kwargs.get("inputs_embeds")
    if not isinstance(shape, Tensor) or shape.ndim < 2:
        raise InterpError("hooked(): the model was called without input_ids or inputs_embeds [batch, pos]")
    cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
    offset = int(cache.get_seq_length()) if cache is not None else 0
    length = shape.shape[1]
    lazy = (lambda: mask.bool().cpu()) if isinstance(mask, Tensor) and mask.ndim == 2 else None
    return Frame(
        ids=ids if offset == 0 else None,
        mask=None,
        batch=shape.shape[0],
        length=length,
        prompt_length=last.prompt_length if offset else length,
        offset=offset,
        lazy_mask=lazy,
        generating=offset > 0,
    )


def generation_frame(prompt: Frame, offset: int, length: int, ids: Tensor | None) -> Frame:
    """Return the frame of one step of a generation."""
    return replace(prompt, offset=offset, length=length, ids=ids, generating=True)
