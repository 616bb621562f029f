"""The same architecture with new random weights: the control that says what training had to do with a finding."""

from copy import deepcopy
from typing import Any

import torch

from interp.core.errors import ModelError
from interp.core.manager import HookManager

__all__ = ["reinitialised"]


def reinitialised(hm: HookManager, *, seed: int = 0) -> HookManager:
    """Return a manager over a new model of the same config, its weights drawn as the model's own code draws them.

    Memory: a second model.

    Args:
        hm: the manager; its model is left as it is.
        seed: of the weights; torch's own generator is left as it was.

    Raises:
        ModelError: the model has no config that it can be made from.
    """
    made: Any = type(hm.root)
    config: Any = getattr(hm.root, "config", None)
    if config is None:
        raise ModelError(f"{made.__name__} has no config, so it cannot be made anew with random weights")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = made(deepcopy(config))
        except (TypeError, ValueError, AttributeError) as err:
            raise ModelError(f"{made.__name__}(config) cannot be made anew with random weights: {err}") from err
    model = model.to(device=hm.device, dtype=hm.dtype).eval()
    return HookManager(model, hm.tokenizer, hm.map, name=f"{hm.name} (random weights, seed {seed})")
