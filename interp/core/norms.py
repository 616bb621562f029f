"""The norm tap: σ and the normalised value of every norm, by our own formula, checked against the module.

On an untouched model they exist only inside `norm.forward`. The module's output is replaced only where the scale or
the normalised value is edited, frozen or differentiated.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.core.errors import ModelError

__all__ = ["NormSpec", "identify_norm", "with_values_of"]


@dataclass(frozen=True)
class NormSpec:
    """What a norm computes: y = (x − μ)/σ · gain + bias, with σ = √(mean((x − μ)²) + eps).

    Args:
        kind: "LN" (centred) or "RMS" (μ = 0).
        eps: added to the mean square, in squared units of the residual stream.
        plus_one: the gain is 1 + weight (Gemma).
        dim: length of the normalised axis.
    """

    kind: str
    eps: float
    plus_one: bool
    dim: int

    @property
    def centred(self) -> bool:
        """Whether the mean is taken off first."""
        return self.kind == "LN"

    def centre(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """Return x − μ in fp32 (or x itself for an RMS norm)."""
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def scale(self, centred: Float[Tensor, "*n d"]) -> Float[Tensor, "*n 1"]:
        """Return σ of a centred input."""
        return (centred.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    def gain(self, module: nn.Module) -> Float[Tensor, "*heads d"] | None:
        """Return what the normalised value is multiplied by, or None for a norm without weights."""
        weight: Any = getattr(module, "weight", None)
        return None if weight is None else 1.0 + weight.float() if self.plus_one else weight

    def bias(self, module: nn.Module) -> Float[Tensor, "*heads d"] | None:
        """Return what is added at the end, or None."""
        bias: Any = getattr(module, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    def output(self, normalized: Float[Tensor, "*n d"], module: nn.Module, dtype: torch.dtype) -> Float[Tensor, "*n d"]:
        """Return the module's output for a normalised value."""
        gain, bias = self.gain(module), self.bias(module)
        y = normalized if gain is None else normalized * gain.to(normalized.dtype)
        return (y if bias is None else y + bias.to(y.dtype)).to(dtype)


def with_values_of(output: Float[Tensor, "*n d"], formula: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
    """Return a module's output with the gradient of our formula for it, which differs from it by rounding.

    Args:
        output: what the module gave.
        formula: what the formula gave, on the graph.
    """
    return _Values.apply(formula, output.detach())


class _Values(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, formula: Tensor, output: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def identify_norm(module: nn.Module, path: str, width: int) -> NormSpec:
    """Return the formula that a norm module follows, found by trying each on the module itself.

    Args:
        module: the norm.
        path: its module path, for the message.
        width: length of the axis that it normalises, where the module has no weight to tell.

    Raises:
        ModelError: none of LayerNorm, RMSNorm and RMSNorm with (1 + weight) gives the module's output.
    """
    weight: Any = getattr(module, "weight", None)
    like = weight if isinstance(weight, Tensor) else next(iter(module.parameters()), torch.zeros(1))
    dim = int(weight.shape[-1]) if isinstance(weight, Tensor) else width
    eps = next((float(getattr(module, n)) for n in ("eps", "variance_epsilon", "norm_eps") if hasattr(module, n)), 1e-5)
    candidates = [NormSpec(kind, eps, plus, dim) for kind, plus in (("RMS", False), ("LN", False), ("RMS", True))]
    if like.device.type == "meta" and hasattr(module, "_hf_hook"):
        raise ModelError(
            f"the norm {path!r} is offloaded, so its formula cannot be checked; give a device_map that keeps norms "
            "on a device, or read its output ('.out')"
        )
    if like.device.type == "meta":
        return candidates[_guess(module)]
    heads = tuple(weight.shape[:-1]) if isinstance(weight, Tensor) else ()
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(1, 3, *heads, dim, generator=generator) * 2 + 0.7).to(device=like.device, dtype=like.dtype)
    with torch.no_grad():
        expected = module(x)
        errors = []
        for spec in candidates:
            centred = spec.centre(x)
            ours = spec.output(centred / spec.scale(centred), module, x.dtype)
            errors.append(float((ours - expected).abs().max()) if ours.shape == expected.shape else float("inf"))
    best = min(range(len(candidates)), key=errors.__getitem__)
    tolerance = 1e-4 if x.dtype in (torch.float32, torch.float64) else 5e-2
    size = max(1.0, float(expected.abs().max()))
    if not errors[best] <= tolerance * size:
        raise ModelError(
            f"the norm {path!r} ({type(module).__name__}) follows none of LayerNorm, RMSNorm, RMSNorm with "
            "(1 + weight) "
            f"(closest: off by {errors[best]:.1e}); its scale and normalised value are not "
            "offered; its output ('.out') is"
        )
    return candidates[best]


def _guess(module: nn.Module) -> int:
    """Index of the likely formula of a norm without numbers (on the meta device), from its class."""
    name = type(module).__name__
    if isinstance(module, nn.LayerNorm) or ("LayerNorm" in name and hasattr(module, "bias")):
        return 1
    return 2 if "Gemma" in name else 0
