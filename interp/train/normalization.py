"""What a training does to activations before a dictionary sees them, beside scaling: whitening, or layer norm."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.errors import ConfigError
from interp.dictionaries.base import Dictionary
from interp.train.common import TrainingError

__all__ = ["Whitening", "normalize_at_run_time"]

_EPS = 1e-4  # of the mean variance, added to each: directions without any are not blown up
_PREFIX = "input."


@dataclass(frozen=True, eq=False)
class Whitening:
    """x' = (x − mean) · V (Λ + ε)^(-1/2) Vᵀ, with the covariance V Λ Vᵀ of a sample; and x = x' · back + mean.

    The symmetric root keeps each direction as near as can be to where it was. ε is 1e-4 of the mean variance, so that a
    direction in which activations do not vary, such as the all-ones one where they are centred, is kept and small.

    Attributes:
        mean: of the sample.
        forward: V (Λ + ε)^(-1/2) Vᵀ.
        back: its inverse.
    """

    mean: Float[Tensor, "d"]
    forward: Float[Tensor, "d d"]
    back: Float[Tensor, "d d"]

    @classmethod
    def of(cls, sample: Float[Tensor, "token d"]) -> "Whitening":
        """Return the whitening of a sample; memory: 40 · d² bytes.

        Raises:
            TrainingError: the sample does not vary, or is not finite.
        """
        wide = torch.float32 if sample.device.type == "mps" else torch.float64
        x = sample.to(wide)
        mean = x.mean(0)
        covariance = (x - mean).T @ (x - mean) / max(1, len(x))
        size = float(covariance.diagonal().mean())
        if not 0 < size < float("inf"):
            raise TrainingError(f"activations have mean variance {size} in {len(x)} tokens; they cannot be whitened")
        values, V = torch.linalg.eigh(covariance)
        root = (values.clamp_min(0) + _EPS * size).sqrt()
        return cls(mean.float(), ((V / root) @ V.T).float(), ((V * root) @ V.T).float())

    def white(self, x: Float[Tensor, "token d"]) -> Float[Tensor, "token d"]:
        """Return whitened activations."""
        return (x - self.mean) @ self.forward

    def raw(self, white: Float[Tensor, "token d"]) -> Float[Tensor, "token d"]:
        """Return what some whitened activations are of."""
        return white @ self.back + self.mean

    def gradient(self, grad: Float[Tensor, "token d"]) -> Float[Tensor, "token d"]:
        """Return a gradient by the activation as one by the whitened activation."""
        return grad @ self.back.T

    def tensors(self) -> dict[str, Tensor]:
        """Return what it is made of, by name, for a checkpoint."""
        return {_PREFIX + name: getattr(self, name) for name in ("mean", "forward", "back")}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], device: torch.device) -> "Whitening | None":
        """Return what `tensors` gave; None where a checkpoint has none."""
        if _PREFIX + "mean" not in tensors:
            return None
        return cls(*(tensors[_PREFIX + name].to(device) for name in ("mean", "forward", "back")))


def normalize_at_run_time(dictionary: Dictionary, wanted: str, *, trained: bool) -> None:
    """Make the dictionary normalise tokens itself where that was asked for: it cannot be folded.

    Args:
        dictionary: about to be trained.
        wanted: `TrainOptions.normalize`.
        trained: whether it has been trained before.

    Raises:
        ConfigError: it has a bypass, normalises already in another way, or has been trained without.
    """
    has = dictionary.space.normalize
    if wanted == "layer_norm" and dictionary.has_skip:
        raise ConfigError(
            "train.normalize layer_norm: the bypass of a skip transcoder reads activations that are not normalised "
            "(SAELens defines it so); use mean_norm or whiten, or a transcoder without bypass"
        )
    if trained and wanted in ("layer_norm", "whiten") and has != wanted:
        raise ConfigError(
            f"the dictionary to go on from has normalize_activations {has!r} and train.normalize is {wanted!r}, which "
            f"would make it another function; use {'mean_norm' if has == 'none' else 'none'!r}"
        )
    if wanted == "layer_norm":
        dictionary.set_cfg(dictionary.cfg.model_copy(update={"normalize_activations": "layer_norm"}))
    elif has != "none" and wanted != "none":
        raise ConfigError(
            f"the dictionary normalises each token ({has}) and train.normalize is {wanted!r}, which cannot be folded "
            "through that; use 'none'"
        )
