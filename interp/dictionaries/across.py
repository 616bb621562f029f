"""What several processes that train one dictionary sum, gather and share.

Some have other tokens of the same batch (data parallel), some have other latents of the same dictionary (sharded).
Each one's loss is its share of the one loss: over tokens, shares add up to it; over latents, every process has the
whole of it and the gradients of its own latents. What all processes of one batch compute alike, from b_dec and W_skip,
counts with 1 / shards in each. So every gradient is a plain sum.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from interp.data.ranks import ONE, Ranks

__all__ = ["ALONE", "Across", "latent_axis"]

# Parameters and averages that no latent has to itself.
_ALIKE = {"b_dec", "W_skip", "least", "weight", "usage_weight"}


def latent_axis(name: str) -> int | None:
    """Along which axis a dictionary's tensor has its latents; None for one that all processes hold alike."""
    return None if name in _ALIKE else 1 if name == "W_enc" else 0


@dataclass(frozen=True)
class Across:
    """The processes that train one dictionary, as one of them sees the others; alone, everything is the identity.

    Attributes:
        tokens: those that hold the same latents, and see other tokens of the batch, in the order of the tokens.
        latents: those that see the same tokens, and hold other latents, in the order of the latents.
        every: all of them, by token and then by latent.
    """

    tokens: Ranks = ONE
    latents: Ranks = ONE
    every: Ranks = ONE

    @property
    def alone(self) -> bool:
        """Whether there are no others."""
        return self.every.size == 1

    def of_latents(self) -> "Across":
        """The same where every process is given the same tokens."""
        return Across(ONE, self.latents, self.latents)

    # -- of one loss ----------------------------------------------------------------------------------------------

    def count(self, n: int) -> int:
        """The number of tokens of all processes."""
        return self.tokens.count(n)

    def over_tokens(self, *shares: Float[Tensor, ""]) -> list[Float[Tensor, ""]]:
        """The sums of some numbers over all tokens, without gradients."""
        if self.tokens.size == 1:
            return [share.detach() for share in shares]
        return list(self.tokens.sum(torch.stack(shares)).unbind())

    def over_latents(self, part: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The sum of what each process made of its own latents, to which alone gradients go back."""
        if self.latents.size == 1:
            return part
        whole: Tensor = _OverLatents.apply(part, self.latents)
        return whole

    def alike(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """What every process of the same tokens computes alike, so that only a share of its gradient is of each."""
        if self.latents.size == 1:
            return x
        shared: Tensor = _Alike.apply(x, 1 / self.latents.size)
        return shared

    def any_latent(self, found: Bool[Tensor, "latent"]) -> Bool[Tensor, ""]:
        """Whether something is true of any latent."""
        return found.any() if self.latents.size == 1 else self.latents.sum(found.any().long()) > 0

    # -- choices --------------------------------------------------------------------------------------------------

    def best(self, score: Float[Tensor, "token candidate"], k: int) -> Bool[Tensor, "token candidate"]:
        """Which of a process' candidates are among the k of largest score of each token, whoever has them."""
        parts = self.latents.gather(score.T)
        return _chosen(parts, self.latents.rank, k).T

    def largest(self, score: Float[Tensor, "candidate"], n: int) -> Bool[Tensor, "candidate"]:
        """Which of a process' candidates are among the n of largest score of all tokens and latents."""
        return _chosen(self.every.gather(score), self.every.rank, n)

    # -- of one step ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sum_gradients(self, dictionary: nn.Module) -> None:
        """Make each gradient the one of the whole loss."""
        if self.alone:
            return
        for name, parameter in dictionary.named_parameters():
            if parameter.grad is not None:
                (self.every if latent_axis(name) is None else self.tokens).add(parameter.grad)

    @torch.no_grad()
    def clip(self, dictionary: nn.Module, most: float) -> None:
        """Scale gradients so that the norm of all of them, whoever has them, is at most so much."""
        if self.latents.size == 1:
            torch.nn.utils.clip_grad_norm_(dictionary.parameters(), most)
            return
        grads = {name: p.grad for name, p in dictionary.named_parameters() if p.grad is not None}
        squares = {name: grad.norm().double().square() for name, grad in grads.items()}
        own = [square for name, square in squares.items() if latent_axis(name) is not None]
        shared = [square for name, square in squares.items() if latent_axis(name) is None]
        norm = (self.latents.sum(torch.stack(own).sum()) + sum(shared)).sqrt()
        factor = (most / (norm + 1e-6)).clamp(max=1.0)
        for grad in grads.values():
            grad.mul_(factor.to(grad.dtype))

    # -- which latents are whose ----------------------------------------------------------------------------------

    def place(self, d_sae: int) -> slice:
        """Which of so many latents this process holds."""
        each = d_sae // self.latents.size
        return slice(self.latents.rank * each, (self.latents.rank + 1) * each)

    def part(self, axis: int | None, whole: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """What this process holds of a tensor that has all latents along an axis, or along none: a view."""
        if self.latents.size == 1 or axis is None:
            return whole
        mine = self.place(whole.shape[axis])
        return whole.narrow(axis, mine.start, mine.stop - mine.start)

    @torch.no_grad()
    def take(self, dictionary: nn.Module) -> None:
        """Leave of a whole dictionary, in place, what this process holds of it."""
        if self.latents.size > 1:
            for name, value in [*dictionary.named_parameters(), *dictionary.named_buffers()]:
                mine = self.part(latent_axis(name), value.data)
                value.data = mine.clone(memory_format=torch.contiguous_format)

    def whole(self, tensors: Mapping[str, tuple[int | None, Tensor]]) -> dict[str, Tensor] | None:
        """Bring tensors together in the first process, on the CPU and one at a time; None in the others.

        Args:
            tensors: by any name, each with the axis along which it has latents, None for one that all hold alike.
        """
        if self.tokens.rank > 0:
            return None  # its latents are those of a process that sees the first tokens
        found = {}
        for key, (axis, value) in tensors.items():
            if axis is None or self.latents.size == 1:
                found[key] = value.detach().cpu().contiguous()
            elif (parts := self.latents.gather_on_first(value)) is not None:
                found[key] = torch.cat(parts, axis)
        return found if self.latents.rank == 0 else None

    def dtensors(self, dictionary: nn.Module) -> dict[str, Any]:
        """A sharded dictionary's tensors as DTensors that share its memory, for tools that read those.

        A DTensor's `full_tensor` brings the whole to every process, on its device.

        Args:
            dictionary: one that `take` has been at.
        """
        import torch.distributed as dist
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

        found: dict[str, Any] = {}
        meshes: dict[str, DeviceMesh] = {}
        for name, value in dictionary.state_dict().items():
            kind, axis = value.device.type, latent_axis(name)
            if kind not in meshes:
                group = dist.group.WORLD if self.latents.group is None else self.latents.group
                assert group is not None
                meshes[kind] = DeviceMesh.from_group(group, kind)
            placed: Placement = Replicate() if axis is None else Shard(axis)
            found[name] = DTensor.from_local(value, meshes[kind], [placed], run_check=False)
        return found


ALONE = Across()
"""A process that trains a dictionary by itself."""


def _chosen(parts: list[Tensor], mine: int, n: int) -> Tensor:
    """Which of some candidates are among the n largest of all parts, along the first axis; of equal ones the first."""
    score, everything = parts[mine], torch.cat(parts)
    if n >= len(everything):
        return torch.ones_like(score, dtype=torch.bool)
    if n == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    least = everything.topk(n, dim=0, sorted=False).values.amin(0, keepdim=True)
    left = n - (everything > least).sum(0, keepdim=True)
    for before in parts[:mine]:
        left = left - (before == least).sum(0, keepdim=True)
    equal = score == least
    return (score > least) | (equal & (equal.cumsum(0) <= left))


class _OverLatents(torch.autograd.Function):
    """Sums over processes; backwards, each has the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, ranks: Ranks) -> Tensor:
        return ranks.sum(part)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Alike(torch.autograd.Function):
    """The identity; backwards, a share of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float) -> Tensor:
        ctx.share = share
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.share * grad, None
