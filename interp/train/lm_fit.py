"""One step of a language model's training after the other, and all that the next one depends on."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from interp.core.errors import DataError, ModelError
from interp.core.manager import HookManager
from interp.train.checkpoint import moments, random_states, restore_moments, restore_random_states
from interp.train.common import TrainingError, own_randomness
from interp.train.lm_config import LMOptions, lr_factor
from interp.train.lm_data import LMBatch

__all__ = ["LMFit", "checked_batch", "logits_of", "next_token_loss", "own_randomness"]

_IGNORED = -100


class LMFit:
    """The model, AdamW, and sums since the last report, all on the model's device.

    Args:
        hm: the model; its parameters that require gradients are trained.
        options: how.

    Raises:
        ModelError: nothing to train, several devices, or weights of another dtype than float32.
    """

    def __init__(self, hm: HookManager, options: LMOptions) -> None:
        self.hm, self.options = hm, options
        # Each once, also where two modules share one.
        self.parameters = {name: p for name, p in hm.model.named_parameters() if p.requires_grad}
        self.device = _one_device(hm, self.parameters)
        decays, others = [p for p in self._trained if p.ndim >= 2], [p for p in self._trained if p.ndim < 2]
        groups = [{"params": decays, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=options.lr, betas=options.betas, fused=True
        )
        self.step = self.tokens = self.since = 0
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.first_bad = torch.full((), -1, dtype=torch.long, device=self.device)

    @property
    def _trained(self) -> list[torch.nn.Parameter]:
        return list(self.parameters.values())

    def take(self, batch: LMBatch) -> None:
        """Take one optimiser step; nothing is read back from the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        loss = next_token_loss(logits_of(self.hm, batch), batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self._trained, self.options.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step, self.since, self.tokens = self.step + 1, self.since + 1, self.tokens + _counted(batch)
        with torch.no_grad():
            values = torch.stack([loss.detach(), norm])
            bad = (self.first_bad < 0) & ~values.isfinite().all()
            self.first_bad = torch.where(bad, self.step, self.first_bad)
            self.sums += values

    @property
    def lr(self) -> float:
        """The step size of the next step."""
        return self.options.lr * lr_factor(self.options, self.step)

    def report(self) -> dict[str, int | float]:
        """Return a line of metrics: means over the steps since the last one.

        Raises:
            TrainingError: as for `check`.
        """
        self.check()
        loss, norm = (self.sums / self.since).tolist()
        lr = self.optimizer.param_groups[0]["lr"]
        self.sums.zero_()
        self.since = 0
        return {"step": self.step, "tokens": self.tokens, "loss": loss, "lr": lr, "grad_norm": norm}

    def check(self) -> None:
        """Refuse to go on from a loss or gradient that is not finite.

        Raises:
            TrainingError: names the first step that had one.
        """
        if (bad := int(self.first_bad)) >= 0:
            raise TrainingError(
                f"the loss or its gradient became NaN or infinite at step {bad}, with lr {self.options.lr:g}; what was "
                "saved before stays. Lower lr, lengthen warmup_steps, or look for such weights in the model"
            )

    def tensors(self) -> dict[str, Tensor]:
        """Return, on the CPU and by name, weights, buffers, moments, sums and random states."""
        found = {f"weights.{name}": value for name, value in _weights(self.hm).items()}
        found |= moments(self.optimizer, self.parameters) | random_states(self.device) | {"sums": self.sums}
        return {name: value.detach().cpu().contiguous() for name, value in found.items()}

    def record(self) -> dict[str, int]:
        """Return the counters as plain JSON."""
        return {"step": self.step, "tokens": self.tokens, "since": self.since}

    def restore(self, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go back to what `record` and `tensors` gave; their names and shapes are those of this model."""
        self.step, self.tokens, self.since = (int(record[name]) for name in ("step", "tokens", "since"))
        with torch.no_grad():
            for name, value in _weights(self.hm).items():
                value.copy_(tensors[f"weights.{name}"])
        restore_moments(self.optimizer, self.parameters, tensors)
        self.sums.copy_(tensors["sums"])
        restore_random_states(tensors, self.device)


def next_token_loss(logits: Float[Tensor, "row pos d_vocab"], batch: LMBatch) -> Float[Tensor, ""]:
    """Return the mean cross entropy of each token after the first given those before it, in nats per token.

    Σ w · nll / Σ w with the batch's weights, computed in float32.

    Args:
        logits: what the model says at each place about the next one.
        batch: the tokens, with their weights on the CPU.
    """
    targets = F.pad(batch.ids[:, 1:], (0, 1), value=_IGNORED).to(logits.device)
    flat = logits.float().flatten(0, 1)
    if batch.weight is None:
        return F.cross_entropy(flat, targets.flatten(), ignore_index=_IGNORED)
    weight = F.pad(batch.weight[:, 1:].float(), (0, 1))
    nll = F.cross_entropy(flat, targets.flatten(), ignore_index=_IGNORED, reduction="none")
    return (nll * weight.flatten().to(logits.device)).sum() / float(weight.sum())


def logits_of(hm: HookManager, batch: LMBatch) -> Float[Tensor, "row pos d_vocab"]:
    """Run the model on a batch, as it is called in training.

    Raises:
        ModelError: it returns no logits for every place.
    """
    places = None if batch.position_ids is None else batch.position_ids.to(hm.device)
    output = hm.caller(batch.ids.to(hm.device), mask=None, position_ids=places, keep=None)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.shape[:2] != batch.ids.shape:
        came = tuple(logits.shape) if isinstance(logits, Tensor) else "none"
        raise ModelError(
            f"{type(hm.model).__name__} gave logits {came} for ids {tuple(batch.ids.shape)}; a causal language model "
            "gives [row pos d_vocab]"
        )
    return logits


def checked_batch(hm: HookManager, batch: Any, step: int) -> LMBatch:
    """Return what a stream gave as an `LMBatch` whose ids, weights and positions fit the model and one another.

    Args:
        hm: the model.
        batch: an `LMBatch`, or an object with `ids` and `weight`.
        step: the step that the batch is for, for messages.

    Raises:
        DataError: they do not fit.
    """
    ids, weight = getattr(batch, "ids", None), getattr(batch, "weight", None)
    positions = getattr(batch, "position_ids", None)
    if not isinstance(ids, Tensor):
        raise DataError(
            f"step {step}: the stream gave a {type(batch).__name__} whose ids are a {type(ids).__name__}; expected a "
            "tensor [row pos] in an LMBatch"
        )
    try:
        ids = hm.to_tokens(ids, mask=torch.ones_like(ids)).ids
    except DataError as err:
        raise DataError(f"step {step}: {err}") from err
    if ids.shape[1] < 2:
        raise DataError(f"step {step}: rows of one token predict nothing; expected [row pos] with at least 2 positions")
    for name, value in (("weight", weight), ("position_ids", positions)):
        if value is not None and (not isinstance(value, Tensor) or value.shape != ids.shape):
            came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise DataError(f"step {step}: {name} is {came}; expected the shape of the ids, {tuple(ids.shape)}")
    if weight is not None:
        weight = weight.detach().cpu().float()
        if not bool((weight >= 0).all()) or not 0 < float(weight[:, 1:].sum()) < float("inf"):
            raise DataError(
                f"step {step}: weights must be finite and at least 0, with one above 0 after column 0; they go from "
                f"{float(weight.min()):g} to {float(weight.max()):g}, with a sum of {float(weight[:, 1:].sum()):g}"
            )
    return LMBatch(ids, weight, positions)


def _weights(hm: HookManager) -> dict[str, Tensor]:
    """Parameters and saved buffers by name, each once, also where two modules share one."""
    saved = set(hm.model.state_dict(keep_vars=True))
    buffers = {name: buffer for name, buffer in hm.model.named_buffers() if name in saved}
    return {**dict(hm.model.named_parameters()), **buffers}


def _counted(batch: LMBatch) -> int:
    predicted = batch.ids[:, 1:]
    return predicted.numel() if batch.weight is None else int((batch.weight[:, 1:] > 0).sum())


def _one_device(hm: HookManager, trained: Mapping[str, Tensor]) -> torch.device:
    if not trained:
        raise ModelError(f"no parameter of {hm.name} requires gradients; call hm.model.requires_grad_(True)")
    devices = {p.device for p in hm.model.parameters()}
    if len(devices) > 1 or next(iter(devices)).type not in ("cpu", "cuda"):
        found = ", ".join(sorted(map(str, devices)))
        raise ModelError(f"the model is on {found}; it is trained on one device, a CPU or a CUDA GPU: hm.model.to(…)")
    others = {p.dtype for p in trained.values()} - {torch.float32}
    if others:
        raise ModelError(
            f"the model's weights are {others.pop()}; they are trained in float32: load with dtype='float32'"
        )
    return devices.pop()
