"""All that decides the outcome of a language model's training, as plain JSON: what a resume must find unchanged."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from interp.core.checks import check_positions
from interp.core.disk import digest
from interp.core.errors import DataError
from interp.core.intervention import Intervention
from interp.core.manager import HookManager
from interp.core.result import Provenance
from interp.train.common import own_randomness
from interp.train.lm_config import LMOptions
from interp.train.lm_data import LMBatch, LMData
from interp.train.lm_fit import checked_batch, logits_of

__all__ = ["next_of", "settings_of", "try_out"]


def next_of(stream: Iterator[Any], step: int) -> tuple[Any, dict[str, Any]] | None:
    """Return the next batch and state of a stream, None at its end.

    Args:
        stream: what `LMData.batches` gave.
        step: the step that the batch is for, for messages.

    Raises:
        DataError: the stream gave something else, or a state that is not plain JSON.
    """
    held = next(stream, None)
    if held is None:
        return None
    if not isinstance(held, tuple) or len(held) != 2 or not isinstance(held[1], dict):
        raise DataError(f"step {step}: the stream gave a {type(held).__name__}; expected a batch and a dict, its state")
    return held[0], _plain(held[1], "the state of the data")


def try_out(hm: HookManager, data: LMData, edits: Sequence[Intervention], *, seed: int) -> LMBatch:
    """Run the first batch once, without gradients, so that what does not fit is known before anything is written.

    Args:
        hm: the model; left in eval mode.
        data: the stream.
        edits: what is to act in training.
        seed: of what the edits may draw.

    Returns:
        The first batch.

    Raises:
        InterpError: of the kind that fits.
    """
    held = next_of(iter(data.batches(None)), 1)
    if held is None:
        raise DataError("the data holds no batch; give a stream with at least one")
    batch = checked_batch(hm, held[0], 1)
    hm.model.eval()
    if batch.position_ids is not None:
        again = torch.tensor([[0, 1, 0, 1]])
        check_positions(hm, hm.to_tokens(torch.zeros_like(again)), again, checked=False)
    with torch.no_grad(), own_randomness(hm.device, seed), hm.hooked(write=edits) if edits else nullcontext():
        logits_of(hm, batch)
    return batch


def settings_of(
    hm: HookManager,
    data: LMData,
    options: LMOptions,
    *,
    first: LMBatch,
    seed: int,
    measures: Sequence[str],
    edits: Sequence[Intervention],
) -> dict[str, Any]:
    """Return all that decides the outcome, as plain JSON.

    Args:
        hm, data, options, seed, edits: as for `train_lm`.
        first: the first batch, by which data is known that describes itself like other data.
        measures: their names.

    Raises:
        DataError: what the data says of itself is not plain JSON.
    """
    tensors = [t for t in (first.ids, first.weight, first.position_ids) if t is not None]
    parameters = {name: [*p.shape, p.requires_grad] for name, p in hm.model.named_parameters()}
    return {
        "options": options.model_dump(mode="json"),
        "seed": seed,
        "data": _plain(data.describe(), "describe() of the data"),
        "first_batch": digest(*tensors),
        "model": Provenance.of(hm).config_hash,
        "parameters": digest(json.dumps(parameters)),
        "write": [_described(edit) for edit in edits],
        "measures": list(measures),
        "device": hm.device.type,
        "threads": torch.get_num_threads(),
    }


def _plain(record: Any, what: str) -> Any:
    """A record as it comes back from JSON."""
    try:
        return json.loads(json.dumps(record, allow_nan=False))
    except (TypeError, ValueError) as err:
        raise DataError(f"{what} must be plain JSON, which it is not: {err}") from err


def _described(edit: Intervention) -> dict[str, str]:
    """An edit's fields as short strings that are the same in every process."""
    values = {field.name: _short(getattr(edit, field.name)) for field in dataclasses.fields(edit)}
    return {"kind": type(edit).__name__, **values}


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {digest(value)}"
    shown = str(getattr(value, "__qualname__", "")) or repr(value)
    return type(value).__qualname__ if " at 0x" in shown else shown
