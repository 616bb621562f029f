"""A running average of a dictionary's weights, which is what is kept of a training."""

from collections.abc import Mapping

import torch
from torch import Tensor

from interp.dictionaries.base import Dictionary

__all__ = ["WeightAverage"]


class WeightAverage:
    """The exponential moving average of the parameters after each step; 4 bytes a parameter, on their device.

    After step t, counted from 0, the share d_t = min(decay, (1 + t) / (10 + t)) of the average stays; after the first
    none does. So the first weights have no part in it, and early ones little, without a division for the bias.

    Source: Gao et al. 2024 (2406.04093), appendix A.3, has 0.999. Departure: the warm-up of d_t, where they have none;
    it is that of TensorFlow's `ExponentialMovingAverage`.

    Args:
        decay: the share that stays at each step, once there have been enough of them; with 0 the average is the last
            weights, to the bit.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.held: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, dictionary: Dictionary, step: int) -> None:
        """Take in the weights after a step; nothing is read back from the device.

        Args:
            dictionary: what is trained.
            step: how many steps there had been before it.
        """
        named = dict(dictionary.named_parameters())
        if not self.held:
            self.held = {name: p.detach().clone() for name, p in named.items()}
            return
        stays = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_([self.held[name] for name in named], [p.detach() for p in named.values()], 1 - stays)

    @torch.no_grad()
    def give(self, dictionary: Dictionary) -> None:
        """Make a dictionary the average, within its constraints; its buffers, such as thresholds, stay as they are.

        Args:
            dictionary: what was trained; a mean of decoder rows of norm 1 is shorter, and is brought back to 1.
        """
        named = dict(dictionary.named_parameters())
        if all(torch.equal(named[name], value) for name, value in self.held.items()):
            return  # bringing back to norm 1 what has it but for rounding would change bits
        for name, value in self.held.items():
            named[name].copy_(value)
        dictionary.after_step()

    def tensors(self) -> dict[str, Tensor]:
        """Return the average by name, for a state to resume from; nothing before the first step."""
        return {f"average.{name}": value for name, value in self.held.items()}

    def restore(self, dictionary: Dictionary, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` gave, among others."""
        named = {name: tensors.get(f"average.{name}") for name, _ in dictionary.named_parameters()}
        device = dictionary.W_enc.device
        # Copies: what was read from a file is its memory map.
        self.held = {name: value.to(device, copy=True) for name, value in named.items() if value is not None}
