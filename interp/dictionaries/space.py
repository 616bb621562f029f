"""What a dictionary sees of a raw model's activation, and the way back from what it makes of it."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.core.errors import ConfigError, ShapeError
from interp.core.site import Site

__all__ = ["HEADED", "Context", "Normalization", "Space", "has_heads"]

HEADED = ("q", "k", "v", "z")  # sites with one vector per head, which a dictionary reads side by side

Normalization = Literal["none", "layer_norm", "constant_norm_rescale"]

_EPS = 1e-5  # added to a deviation, as in SAELens


def has_heads(site: Site) -> bool:
    """Whether a site has a vector per head that dictionaries read side by side: q, k, v or z."""
    return site.kind in HEADED


@dataclass(frozen=True)
class Context:
    """What was taken out of activations on the way to a dictionary, for the way back.

    Attributes:
        heads: (n_heads, d_head) where they came by head; else None.
        mean: what centring took off; None where nothing was centred.
        offset, divisor, factor: y = (x − offset) / divisor, and back x = y · factor + offset; None without
            normalisation at run time.
    """

    heads: tuple[int, int] | None = None
    mean: Float[Tensor, "*batch 1"] | None = None
    offset: Float[Tensor, "*batch 1"] | None = None
    divisor: Float[Tensor, "*batch 1"] | None = None
    factor: Float[Tensor, "*batch 1"] | None = None

    def normalized(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Return other activations of the same tokens as these were normalised."""
        if self.offset is None or self.divisor is None:
            return x
        return (x - self.offset) / self.divisor

    def gradient(self, grad: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Return a gradient by the activation as one by what the dictionary sees, offset and factor held."""
        return grad if self.factor is None else grad * self.factor


class Space(nn.Module):
    """How an activation of the raw model becomes what a dictionary's weights are of, and back.

    In order: heads side by side; what a processed model has at this site, which is an exact function of what the raw
    one has: less the mean over dimensions, divided by a norm's gain, less a constant; normalisation of each token.
    The first two are the dictionary's *fixed* space, in which errors are measured. Nothing of it is in a state dict.

    Source: SAELens 6.54's `reshape_activations` and `normalize_activations`. Its layer norm divides by the deviation
    (over d − 1) plus 1e-5 and multiplies by the deviation alone. Departure: a token of zeros is divided by the smallest
    number, where theirs gives NaN.

    Args:
        width: dimensions of a vector.
        headed: whether activations of two axes, n_heads · d_head = width, are expected; with four axes they are anyway.
        normalize: what is done to each token at run time.
    """

    scale: Tensor | None
    shift: Tensor | None

    def __init__(self, width: int, *, headed: bool = False, normalize: Normalization = "none") -> None:
        super().__init__()
        self.width, self.headed, self.normalize = width, headed, normalize
        self.centred = self.read_centred = False
        self.bound = ""  # "raw" or "folded": the model that the fixed part was made for
        self.register_buffer("scale", None, persistent=False)
        self.register_buffer("shift", None, persistent=False)

    def fix(
        self,
        *,
        bound: str,
        centred: bool = False,
        read_centred: bool = False,
        scale: Float[Tensor, "d"] | None = None,
        shift: Float[Tensor, "d"] | None = None,
    ) -> None:
        """Set the fixed part: y = scale · (x − mean over dimensions) + shift, of each the part that is given.

        Args:
            bound: "raw" or "folded", the kind of model that x is of.
            centred: whether the mean is taken off.
            read_centred: whether what reads the processed activation takes no notice of its mean, though what reads the
                raw one would: it is taken off a reconstruction on the way back.
            scale: without zeros; None for 1.
            shift: None for 0.
        """
        for name, value in (("scale", scale), ("shift", shift)):
            if value is not None and value.shape != (self.width,):
                raise ShapeError(f"{name} has shape {tuple(value.shape)} for activations of width {self.width}")
        self.bound, self.centred, self.read_centred = bound, centred, read_centred
        self.scale, self.shift = scale, shift

    @property
    def fixed_names(self) -> list[str]:
        """What the fixed part does, in words."""
        said = {
            "less the mean": self.centred,
            "scaled": self.scale is not None,
            "shifted": self.shift is not None,
            "less the mean on the way back": self.read_centred,
        }
        return [name for name, there in said.items() if there]

    @property
    def needs_context(self) -> bool:
        """Whether the way back depends on the activation."""
        return self.centred or self.normalize != "none"

    def extra_repr(self) -> str:
        """What differs from the activation itself."""
        parts = ["heads side by side"] * self.headed + self.fixed_names
        return ", ".join([*parts, self.normalize] if self.normalize != "none" else parts)

    def flat(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*batch d"]:
        """Return activations with their heads side by side; flat ones as they are.

        Raises:
            ShapeError: another width.
        """
        if x.shape[-1] == self.width:
            return x
        by_head = x.ndim >= (2 if self.headed else 4) and x.shape[-1] * x.shape[-2] == self.width
        if not by_head:
            raise ShapeError(f"activations of shape {tuple(x.shape)} for a dictionary of d_in {self.width}")
        return x.flatten(-2)

    def fixed(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*batch d"]:
        """Return activations in the fixed space, flat."""
        return self._fixed(self.flat(x))[0]

    def own(self, x: Float[Tensor, "*shape"]) -> tuple[Float[Tensor, "*batch d"], Context]:
        """Return what the weights are of, and what `back` needs.

        Args:
            x: activations of the raw model, flat or by head.

        Raises:
            ShapeError: another width.
        """
        flat = self.flat(x)
        heads = None if flat is x else (x.shape[-2], x.shape[-1])
        y, mean = self._fixed(flat)
        if self.normalize == "none":
            return y, Context(heads, mean)
        offset, divisor, factor = self._statistics(y)
        return (y - offset) / divisor, Context(heads, mean, offset, divisor, factor)

    def unnormalized(self, y: Float[Tensor, "*batch d"], context: Context) -> Float[Tensor, "*batch d"]:
        """Return a reconstruction in the fixed space: what was normalised at run time is undone."""
        if context.factor is None or context.offset is None:
            return y
        return y * context.factor + context.offset

    def back(self, y: Float[Tensor, "*batch d"], context: Context) -> Float[Tensor, "*shape"]:
        """Return a reconstruction as an activation of the raw model, in the shape that the activations came in.

        Args:
            y: what the weights gave.
            context: of the activations. Without their mean none is added: no norm that follows would read it.
        """
        x = self.unfixed(self.unnormalized(y, context))
        x = x if context.mean is None else x + context.mean
        return x if context.heads is None else x.unflatten(-1, context.heads)

    def unfixed(self, y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Return activations of the raw model, of mean 0 where the fixed space is centred."""
        y = y - y.mean(-1, keepdim=True) if self.read_centred else y
        y = y if self.shift is None else y - self.shift
        return y if self.scale is None else y / self.scale

    def alone(self, y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Return a reconstruction as flat activations of the raw model, where that does not depend on the activation.

        Raises:
            ConfigError: it does.
        """
        if self.needs_context:
            what = self.normalize if self.normalize != "none" else "centring"
            raise ConfigError(
                f"what latents stand for depends on the activation, for this dictionary sees it through {what}; call "
                "dictionary.reconstructed(latents, x), or dictionary(x)"
            )
        return self.unfixed(y)

    def _fixed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        mean = x.mean(-1, keepdim=True) if self.centred else None
        x = x if mean is None else x - mean
        x = x if self.scale is None else x * self.scale
        return (x if self.shift is None else x + self.shift), mean

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Offset, divisor and the factor of the way back."""
        tiny = torch.finfo(x.dtype).tiny
        if self.normalize == "layer_norm":
            offset = x.mean(-1, keepdim=True)
            # Of a constant token the root's slope would be infinite.
            deviation = (x - offset).var(-1, keepdim=True).clamp_min(tiny).sqrt()
            return offset, deviation + _EPS, deviation
        norm = x.norm(dim=-1, keepdim=True).clamp_min(tiny) / self.width**0.5
        return torch.zeros_like(norm), norm, norm
