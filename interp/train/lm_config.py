"""The settings of a language model's training, and the step size that follows from them."""

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["LMOptions", "lr_factor"]


class LMOptions(BaseModel):
    """How a language model is fitted: AdamW on the next-token loss."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(gt=0, description="optimiser steps, one batch each")
    lr: float = Field(default=1e-3, gt=0, description="AdamW's largest step size")
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1, description="step size at the end, as a share of lr")
    warmup_steps: int = Field(default=0, ge=0, description="steps over which the step size rises from 0 to lr")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="how the step size falls after the warmup"
    )
    betas: tuple[float, float] = Field(
        default=(0.9, 0.98), description="decay of AdamW's first and second moment, per step"
    )
    weight_decay: float = Field(
        default=0.01, ge=0, description="share of a matrix that lr = 1 takes off per step; vectors do not decay"
    )
    grad_clip: float = Field(default=1.0, gt=0, description="largest norm of the gradient of all parameters together")
    log_every: int = Field(default=50, gt=0, description="steps between two lines of metrics")
    measure_every: int = Field(
        default=0, ge=0, description="steps between two measurements, the first before step 1; 0 is only at the end"
    )
    checkpoint_every: int = Field(default=0, ge=0, description="steps between two checkpoints; 0 is none")
    checkpoints: tuple[int, ...] = Field(
        default=(), description="further steps to keep a checkpoint of; 0 is the untrained model"
    )
    resume_every: int = Field(
        default=1000, ge=0, description="steps between two states to resume from; 0 saves one only when stopped"
    )
    deterministic: bool = Field(default=True, description="same seed, same bytes; slower on a GPU")

    @model_validator(mode="after")
    def _fits(self) -> "LMOptions":
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps is {self.warmup_steps}, expected fewer than the {self.steps} steps in all")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}, expected both from 0 to below 1")
        outside = [step for step in self.checkpoints if not 0 <= step <= self.steps]
        if outside:
            raise ValueError(f"checkpoints holds {outside}, expected steps from 0 to {self.steps}")
        return self


def lr_factor(options: LMOptions, step: int) -> float:
    """Return the step size of a step, as a share of `options.lr`.

    It rises linearly, (step + 1) / (warmup_steps + 1), then falls from 1 towards `min_lr_ratio` along half a cosine or
    a line, or stays at 1. No step has a factor of 0.

    Args:
        options: the settings.
        step: steps taken before this one, from 0.
    """
    if step < options.warmup_steps:
        return (step + 1) / (options.warmup_steps + 1)
    if options.schedule == "constant":
        return 1.0
    done = (step - options.warmup_steps) / (options.steps - options.warmup_steps)
    left = 1 - done if options.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return options.min_lr_ratio + (1 - options.min_lr_ratio) * left
