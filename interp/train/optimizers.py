"""The optimisers that a dictionary may be fitted with, and their step sizes by default."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn

from interp.core.errors import ConfigError
from interp.train.checkpoint import moments, restore_moments

__all__ = [
    "Adam8bit",
    "OptimizerName",
    "SignSGD",
    "Stepper",
    "check_optimizer",
    "default_lr",
    "make_stepper",
    "state_bytes",
]

OptimizerName = Literal["adam", "muon", "signsgd", "adam8bit"]

# 2^14 latents are the size that the step sizes in use are quoted for.
_QUOTED, _ADAM, _MUON = 2**14, 2e-4, 2e-3
# Of Adam's step size. On planted dictionaries signs came with it to Adam's FVU: all weights move by all of lr, where
# Adam's move by a fraction.
_SIGNS = 1 / 3
_BLOCK = 256  # entries that share a scale, as bitsandbytes has it


class SignSGD(torch.optim.Optimizer):
    """Steps along the sign of a running mean of the gradient: m ← β m + (1 − β) g, w ← w − lr · sign(m).

    One number of state per parameter, where Adam has two. No library has it that steps several tensors at once.

    Source: Bernstein et al. 2018, "signSGD" (1802.04434), algorithm 2, Signum. EleutherAI's sparsify wraps it in a
    schedule-free average; here the schedule of `TrainOptions` and `TrainOptions.ema` stand for that.

    Args:
        groups: groups of parameters.
        lr: what each weight moves by in a step.
        momentum: β, the share of the mean that stays at each step.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], *, lr: float, momentum: float = 0.95) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step."""
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            if not trained:
                continue
            for p in trained:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            held = [self.state[p]["momentum"] for p in trained]
            torch._foreach_lerp_(held, [p.grad for p in trained], 1 - group["momentum"])
            torch._foreach_add_(trained, torch._foreach_sign(held), alpha=-group["lr"])


class Adam8bit(torch.optim.Optimizer):
    """Adam whose two moments are held in 8 bits each, by the kernels of bitsandbytes.

    bitsandbytes' own class waits for the GPU after each parameter; these steps wait for nothing.

    Source: Dettmers et al. 2022, "8-bit optimizers via block-wise quantization" (2110.02861): each 256 entries share a
    scale, and the codes are dense near 0.

    Args:
        groups: groups of parameters, float32.
        lr: step size.
        betas: shares of the two means that stay at each step.
        eps: what is added to the root of the second moment.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        check_optimizer("adam8bit")
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})
        from bitsandbytes import functional

        self._update = functional.optimizer_update_8bit_blockwise
        self._maps = [functional.create_dynamic_map(signed=signed) for signed in (True, False)]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step(p, group)

    def _step(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            blocks = -(-p.numel() // _BLOCK)
            state["count"] = 0  # on the host, where the kernel wants it
            state["mean"], state["square"] = (torch.zeros_like(p, dtype=torch.uint8) for _ in range(2))
            state["mean_scale"], state["square_scale"] = (torch.zeros(blocks, device=p.device) for _ in range(2))
        state["count"] += 1
        signed, unsigned = self._maps = [held.to(p.device) for held in self._maps]
        first, second = group["betas"]
        self._update(
            "adam",
            p.grad,
            p,
            state["mean"],
            state["square"],
            beta1=first,
            beta2=second,
            beta3=0.0,
            alpha=0.0,
            eps=group["eps"],
            step=state["count"],
            lr=group["lr"],
            qmap1=signed,
            qmap2=unsigned,
            absmax1=state["mean_scale"],
            absmax2=state["square_scale"],
        )


class Stepper:
    """The optimisers of one fit, which step together: each has some of the parameters.

    Args:
        parts: the optimisers.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)

    def step(self, lr: float) -> None:
        """Take one step of a size, and forget the gradients; nothing is read back from the device."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()
            part.zero_grad(set_to_none=True)

    def tensors(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the state of all of them, as `moments` does."""
        return {name: value for part in self.parts for name, value in moments(part, parameters).items()}

    def restore(self, parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` gave."""
        for part in self.parts:
            restore_moments(part, parameters, tensors)


def check_optimizer(name: OptimizerName) -> None:
    """Refuse an optimiser that this machine has not.

    Raises:
        ConfigError: names the version or the package that it needs.
    """
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        raise ConfigError(
            f"train.optimizer is muon, which torch has from 2.9 on, and this is {torch.__version__}; "
            "pip install 'torch>=2.9', or use adam"
        )
    if name == "adam8bit" and find_spec("bitsandbytes") is None:
        raise ConfigError(
            "train.optimizer is adam8bit, whose kernels are bitsandbytes', which is not installed; "
            "pip install bitsandbytes, or use adam"
        )


def default_lr(d_sae: int, optimizer: OptimizerName = "adam") -> float:
    """The step size for a dictionary of `d_sae` latents.

    For Adam, in 32 bits or in 8, 2e-4 / √(d_sae / 2^14); for signs a third of that; for Muon 2e-3, whatever the size.

    Source: Gao et al. 2024 (2406.04093), appendix A.3, which finds 1/√n; the constant is the one in common use. Muon's
    is that of EleutherAI's sparsify, with the scale of its Muon: a reproduction.
    """
    if optimizer == "muon":
        return _MUON
    adam = _ADAM / (d_sae / _QUOTED) ** 0.5
    return _SIGNS * adam if optimizer == "signsgd" else adam


def state_bytes(optimizer: OptimizerName) -> int:
    """The bytes of state that an optimiser has for each weight of a matrix."""
    return {"adam": 8, "muon": 4, "signsgd": 4, "adam8bit": 2}[optimizer]


def make_stepper(module: nn.Module, optimizer: OptimizerName, *, lr: float) -> Stepper:
    """Return an optimiser of all parameters of a dictionary.

    Muon and the 8-bit Adam have the matrices, and a plain Adam of the same lr the rest, as sparsify has it. Muon's step
    brings all singular values of a mean gradient to about 1 and multiplies by 0.2 √(the larger size), so that a weight
    moves by 0.2 lr in root mean square, whatever the shape. It takes some ten products with the matrix, in bfloat16.

    Source: Jordan et al. 2024, "Muon" (kellerjordan.github.io/posts/muon); Liu et al. 2025 (2502.16982), §2.2, for the
    0.2. A reproduction of sparsify's settings, but for its weight decay of 0.1, which would work against b_dec's mean
    and the norms of decoder rows.

    Args:
        module: the dictionary, on its device.
        optimizer: which.
        lr: the step size.

    Raises:
        ConfigError: torch or a package does not have it.
    """
    check_optimizer(optimizer)
    named = dict(module.named_parameters())
    if optimizer == "adam":
        return Stepper([_adam(list(named.values()), lr)])
    if optimizer == "signsgd":
        return Stepper([SignSGD([{"params": list(named.values())}], lr=lr)])
    others = [p for p in named.values() if p.ndim != 2]
    rest = [_adam(others, lr)] if others else []
    if optimizer == "adam8bit":
        return Stepper([Adam8bit([{"params": [p for p in named.values() if p.ndim == 2]}], lr=lr), *rest])
    return Stepper([_muon([p for p in named.values() if p.ndim == 2], lr), *rest])


def _adam(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=lr, fused=True)


def _muon(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.Muon(
        parameters, lr=lr, weight_decay=0.0, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
