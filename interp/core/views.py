"""How a module's tensor and a site's tensor correspond: there (`get`) and back (`put`)."""

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interp.core.errors import HookError, ModelError

__all__ = ["Columns", "Heads", "NormHeads", "Same", "Scaled", "View", "fused_rows", "linear_weight"]


@runtime_checkable
class View(Protocol):
    """Maps a module's tensor [batch pos features] to a site's tensor and an edited one back."""

    def get(self, x: Tensor) -> Tensor:
        """Return the site's tensor."""

    def put(self, x: Tensor, new: Tensor) -> Tensor:
        """Return the module's tensor with the site's part replaced."""


@dataclass(frozen=True)
class Same:
    """The site is the module's tensor."""

    def get(self, x: Tensor) -> Tensor:
        """Return x."""
        return x

    def put(self, x: Tensor, new: Tensor) -> Tensor:
        """Return the new tensor."""
        return new


@dataclass(frozen=True)
class Scaled:
    """The site is the module's tensor times a constant (Granite's residual multiplier)."""

    factor: float

    def get(self, x: Tensor) -> Tensor:
        """Return x · factor."""
        return x * self.factor

    def put(self, x: Tensor, new: Tensor) -> Tensor:
        """Return new / factor."""
        return new / self.factor


@dataclass(frozen=True)
class Heads:
    """The site is the module's tensor cut into heads."""

    n: int
    d: int

    def get(self, x: Tensor) -> Float[Tensor, "batch pos heads d"]:
        """Return [batch pos heads d]; a tensor that already has heads passes."""
        return x if x.ndim == 4 else x.reshape(*x.shape[:-1], self.n, self.d)

    def put(self, x: Tensor, new: Float[Tensor, "batch pos heads d"]) -> Tensor:
        """Return the new tensor in the module's shape."""
        return new.reshape(x.shape)


@dataclass(frozen=True)
class NormHeads:
    """The site is the tensor inside a q- or k-norm, which families lay out in three ways.

    Args:
        n: heads.
        heads_first: [batch heads pos d] (True) or [batch pos heads d] (False) where sizes cannot tell; None: unknown.
        cut: a norm over all heads at once gives [batch pos heads·d]: cut it into heads (not so for its one σ).
    """

    n: int
    heads_first: bool | None
    cut: bool = True

    def _swapped(self, x: Tensor) -> bool:
        at_one, at_two = x.shape[1] == self.n, x.shape[2] == self.n
        if at_one and at_two:
            if self.heads_first is None:
                raise HookError(f"cannot tell heads from positions in {tuple(x.shape)}; run a batch of another length")
            return self.heads_first
        if not at_one and not at_two:
            raise HookError(f"a q/k-norm gave {tuple(x.shape)}, where one axis should be {self.n} heads")
        return at_one

    def get(self, x: Tensor) -> Float[Tensor, "batch pos heads d"]:
        """Return [batch pos heads d]; heads = 1 for the σ of a norm over all heads at once."""
        if x.ndim == 3:
            return x.unflatten(-1, (self.n if self.cut else 1, -1))
        return x.transpose(1, 2) if self._swapped(x) else x

    def put(self, x: Tensor, new: Float[Tensor, "batch pos heads d"]) -> Tensor:
        """Return the new tensor in the module's layout."""
        if x.ndim == 3:
            return new.reshape(x.shape)
        return new.transpose(1, 2) if self._swapped(x) else new


@dataclass(frozen=True, eq=False)
class Columns:
    """The site is some columns of a fused projection's output, cut into heads (or not: n = 0)."""

    index: Int[Tensor, " columns"]
    n: int
    d: int
    _copies: dict[torch.device, Tensor] = field(default_factory=dict)

    def _on(self, x: Tensor) -> Int[Tensor, " columns"]:
        if x.device not in self._copies:
            self._copies[x.device] = self.index.to(x.device)
        return self._copies[x.device]

    def get(self, x: Tensor) -> Tensor:
        """Return the chosen columns, [batch pos heads d] or [batch pos columns]."""
        first, last = int(self.index[0]), int(self.index[-1])
        whole = last - first + 1 == len(self.index)
        part = x[..., first : last + 1] if whole else x.index_select(-1, self._on(x))
        return part.reshape(*x.shape[:-1], self.n, self.d) if self.n else part

    def put(self, x: Tensor, new: Tensor) -> Tensor:
        """Return the projection's output with those columns replaced."""
        return x.index_copy(x.ndim - 1, self._on(x), new.reshape(*x.shape[:-1], len(self.index)))


def fused_rows(
    layout: str, n_heads: int, n_kv_heads: int, d_head: int
) -> tuple[Int[Tensor, " q"], Int[Tensor, " k"], Int[Tensor, " v"]]:
    """Return which output rows of a fused projection are queries, keys and values, in head order.

    Args:
        layout: "concat", "per_head" or "grouped", as in `ModelMap`.
        n_heads, n_kv_heads, d_head: sizes.
    """
    if layout == "concat":
        q, k = n_heads * d_head, n_kv_heads * d_head
        return torch.arange(q), torch.arange(q, q + k), torch.arange(q + k, q + 2 * k)
    per_group = n_heads // n_kv_heads if layout == "grouped" else 1
    groups = n_kv_heads if layout == "grouped" else n_heads
    rows = torch.arange(groups * (per_group + 2) * d_head).view(groups, per_group + 2, d_head)
    return rows[:, :-2].reshape(-1), rows[:, -2].reshape(-1), rows[:, -1].reshape(-1)


def linear_weight(module: nn.Module) -> Float[Tensor, "d_in d_out"]:
    """Return the weight of a Linear, or of a GPT-2 Conv1D, as [in, out]; a view.

    Raises:
        ModelError: the module has no floating-point matrix (quantised, or no linear layer).
    """
    weight: Any = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        kind = f"{weight.dtype} {tuple(weight.shape)}" if isinstance(weight, Tensor) else "no weight"
        raise ModelError(
            f"{type(module).__name__} holds {kind}, not a floating-point matrix (quantised?); "
            "load the model unquantised"
        )
    return weight if type(module).__name__ == "Conv1D" else weight.T
