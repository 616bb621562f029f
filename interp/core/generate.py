"""Generation with reads and edits at every step, under the model's own KV cache."""

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from interp.core.attention import CURRENT
from interp.core.engine import Forward
from interp.core.errors import DataError, WhereError
from interp.core.frame import Frame
from interp.core.intervention import Intervention
from interp.core.passes import (
    check_places,
    decided_before,
    frame_of,
    gates_of,
    generation_frame,
    refuse_inside_block,
    write_notes,
)
from interp.core.place import KEY_SITES
from interp.core.plan import Plan
from interp.core.run import Run
from interp.core.site import Site
from interp.core.text import Tokens, pad_id_of

if TYPE_CHECKING:
    from interp.core.manager import HookManager

__all__ = ["Generation", "generate_pass"]

_REFUSED = {
    "num_beams": "beams reorder rows between steps, so edits and reads would land in other rows",
    "assistant_model": "an assistant's forward passes are not this model's",
    "prompt_lookup_num_tokens": "tokens that are thrown away would be read and edited",
    "prefill_chunk_size": "a prefill in chunks is not supported with reads or edits",
    "num_return_sequences": "repeat the prompts yourself, so that rows keep their numbers",
}


class Generation(Run):
    """What `generate` gave: a `Run` over prompt and answer.

    `tokens` holds prompt and new tokens [batch, prompt + new]; reads cover all but the last column. `mask` is False
    at pads and after a row's end of text.
    """

    def __init__(
        self, values: Any, *, tokens: Tensor, mask: Tensor, prompt_length: int, notes: list[str], hm: "HookManager"
    ) -> None:
        super().__init__(values, tokens=tokens, mask=mask, notes=notes, hm=hm)
        self.prompt_length = prompt_length

    @property
    def new_tokens(self) -> Int[Tensor, "batch new"]:
        """The tokens that were made, padded after each row's end."""
        assert self.tokens is not None
        return self.tokens[:, self.prompt_length :]

    @property
    def text(self) -> list[str]:
        """What each row said, without the prompt and without special tokens."""
        assert self.mask is not None
        kept = self.mask[:, self.prompt_length :]
        return [
            self.hm.tokenizer.decode(row[m].tolist(), skip_special_tokens=True)
            for row, m in zip(self.new_tokens.cpu(), kept, strict=True)
        ]


def generate_pass(
    hm: "HookManager",
    tokens: Tokens,
    plan: Plan,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    use_cache: bool,
    generation_kwargs: dict[str, Any],
) -> Generation:
    """Generate under a plan; arguments as for `HookManager.generate`."""
    refuse_inside_block(hm, "generate")
    if hm.device.type != "cpu":
        plan = replace(plan, writes=tuple(_sent(edit, hm.device) for edit in plan.writes))
    _check(max_new_tokens, temperature, generation_kwargs, plan)
    if tokens.position_ids is not None:
        raise DataError("packed documents cannot be continued; give generate one prompt per row")
    shifts = tuple(tokens.trailing_pads)
    tokens = tokens.left_padded(pad_id_of(hm.tokenizer))
    prompt = frame_of(tokens, 0, len(tokens))
    prompt.shifts = shifts
    prompt.generating = True
    check_places(plan, prompt)
    forward = Forward(plan, prompt, decisions=decided_before(hm, tokens, plan, prompt))
    steps = _Steps(forward, prompt)
    arguments = _arguments(hm, tokens, max_new_tokens, temperature, use_cache) | generation_kwargs
    handles = [hm.model.register_forward_pre_hook(steps.before, with_kwargs=True)]
    try:
        with torch.no_grad(), forward.attached(hm.model), torch.random.fork_rng(_cuda_devices(hm)):
            torch.manual_seed(seed)
            handles.append(hm.model.register_forward_hook(steps.after))
            output = hm.model.generate(tokens.ids.to(hm.device), **arguments)
    except ValueError as err:
        if "are not used by the model" in str(err):  # transformers' word for an unknown argument
            raise DataError(f"generation_kwargs: {err}") from err
        raise
    finally:
        for handle in handles:
            handle.remove()
    ids = output.sequences.cpu()
    eos = arguments.get("eos_token_id", getattr(hm.model.generation_config, "eos_token_id", None))
    notes = list(hm.notes_for(tokens))
    write_notes(plan, [forward], notes)
    values = {read: steps.stacked(read) for read in plan.reads}
    made = Generation(
        values, tokens=ids, mask=_mask(tokens, ids, eos), prompt_length=tokens.ids.shape[1], notes=notes, hm=hm
    )
    made.gates = gates_of(plan, [forward], made.notes)
    return made


def _sent(edit: Intervention, device: torch.device) -> Intervention:
    """The edit with its vectors on the device, so that they are not sent there again at every step.

    Numbers per row stay: whether they are all 0 is asked of them, and a device would have to be waited for.
    """
    moved: dict[str, Any] = {}
    for entry in fields(edit):
        value = getattr(edit, entry.name)
        if isinstance(value, Intervention):
            moved[entry.name] = _sent(value, device)
        elif isinstance(value, Tensor) and entry.name not in ("scale", "angle"):
            moved[entry.name] = value.to(device)
    return replace(edit, **moved) if moved else edit


def _check(max_new_tokens: int, temperature: float, extra: dict[str, Any], plan: Plan) -> None:
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise DataError(f"max_new_tokens={max_new_tokens!r}: expected a whole number ≥ 1")
    if not isinstance(temperature, int | float) or isinstance(temperature, bool) or not 0 <= temperature < float("inf"):
        raise DataError(f"temperature={temperature!r}: expected a number ≥ 0 (0 is greedy)")
    for name, why in _REFUSED.items():
        if extra.get(name) not in (None, 1):
            raise DataError(f"generate with {name}={extra[name]!r} is refused: {why}")
    keyed = {"rot_k", "pattern", "attn_scores"}
    if extra.get("cache_implementation") is not None and any(p.site.kind in keyed for p in plan.points):
        raise DataError(
            "rot_k, pattern and attn_scores need the model's own growing cache; leave cache_implementation out"
        )
    for edit in plan.writes:
        if edit.needs_whole_batch:
            raise DataError(
                f"{type(edit).__name__}({edit.how!r}) takes values from other positions or rows of the same forward, "  # type: ignore[attr-defined]
                "which differ from step to step; compute the value first and give Replace"
            )
    for read in plan.reads:
        where = read.where
        if where is not None and (where.selects_positions or where.src is not None):
            raise WhereError(
                f"{read!r}: generate stacks every position; read them all (heads may be chosen) and slice the result"
            )


def _arguments(
    hm: "HookManager", tokens: Tokens, max_new_tokens: int, temperature: float, use_cache: bool
) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "do_sample": temperature > 0,
        "use_cache": use_cache,
        "return_dict_in_generate": True,
        "disable_compile": True,
        "pad_token_id": pad_id_of(hm.tokenizer),
        "attention_mask": tokens.mask.long().to(hm.device),
        "num_beams": 1,
    }
    if temperature > 0:
        arguments |= {"temperature": float(temperature), "top_k": 0, "top_p": 1.0}
    return arguments


def _cuda_devices(hm: "HookManager") -> list[int]:
    return [hm.device.index or 0] if hm.device.type == "cuda" else []


class _Steps:
    """Keeps the frame up to date from step to step, and stacks what the steps read."""

    def __init__(self, forward: Forward, prompt: Frame) -> None:
        self.forward = forward
        self.prompt = prompt
        self.known = prompt.ids
        self.totals: list[int] = []
        self.tokens_wanted = any(_needs_ids(e.selection) for e in forward.plan.writes)

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        if CURRENT.get() is not self.forward or kwargs is None:  # another thread's forward
            return
        ids = args[0] if args else kwargs["input_ids"]
        cache = kwargs.get("past_key_values")
        offset = int(cache.get_seq_length()) if cache is not None else 0
        if self.tokens_wanted and self.known is not None and offset + ids.shape[1] > self.known.shape[1]:
            new = ids[:, -(offset + ids.shape[1] - self.known.shape[1]) :].cpu()
            self.known = torch.cat([self.known.cpu(), new], dim=1)
        self.forward.begin(generation_frame(self.prompt, offset, ids.shape[1], self.known))
        if offset == 0:
            self.forward.results.clear()
            self.totals.clear()
        self.totals.append(self.forward.frame.total)

    def after(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        if CURRENT.get() is not self.forward:
            return
        self.forward.check_fired()

    def stacked(self, read: Site) -> Tensor:
        """Join the steps along positions; without a cache the one step that is left holds them all.

        Keys are placed by their absolute column: a sliding-window cache holds only the last of them.
        """
        parts, totals = self.forward.results[read], self.totals
        one_head, one_row = (isinstance(getattr(read.where, name, None), int) for name in ("head", "rows"))
        gone = [*(("n_heads", "n_kv_heads") if one_head else ()), *(("batch",) if one_row else ())]
        axes = [a for a in read.axes if a not in gone]
        axis = axes.index("pos")
        if read.kind in KEY_SITES:
            whole = parts[-1].new_zeros(*parts[-1].shape[:axis], totals[-1], *parts[-1].shape[axis + 1 :])
            for part, total in zip(parts, totals, strict=True):
                whole.narrow(axis, total - part.shape[axis], part.shape[axis]).copy_(part)
            return whole
        if "src" in axes:
            ends = zip(parts, totals, strict=True)
            parts = [nn.functional.pad(p, (total - p.shape[-1], totals[-1] - total)) for p, total in ends]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)


def _needs_ids(where: Any) -> bool:
    return where.tokens is not None or any(_needs_ids(w) for w in where.any_of)


def _mask(tokens: Tokens, ids: Tensor, eos: Any) -> Tensor:
    """True at real tokens: the prompt's own, and new ones up to each row's first end of text."""
    new = ids[:, tokens.ids.shape[1] :]
    if eos is None:
        alive = torch.ones_like(new, dtype=torch.bool)
    else:
        ended = torch.isin(new, torch.as_tensor(eos).reshape(-1)).int().cumsum(1)
        alive = (ended == 0) | ((ended == 1) & (ended.diff(dim=1, prepend=torch.zeros_like(ended[:, :1])) == 1))
    return torch.cat([tokens.mask, alive], dim=1)
