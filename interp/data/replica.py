"""Processes that run one model together, each with a part of its weights: one of them leads, the others run along."""

from typing import TYPE_CHECKING, Any

from interp.core.checks import processes_of
from interp.core.errors import ConfigError
from interp.data.tokens import TokenBlock

if TYPE_CHECKING:
    from interp.core.manager import HookManager

__all__ = ["Replica"]


class Replica:
    """The processes that hold one tensor-parallel model between them.

    Every one of them must make each forward, for each has a part of it; the one that leads decides which, and keeps
    what comes of it. What they tell each other goes over gloo, apart from the model's own channel.

    Args:
        size: how many they are; neighbours by rank.

    Raises:
        ConfigError: torch.distributed is not running, or has no whole number of such groups.
    """

    def __init__(self, size: int) -> None:
        import torch.distributed as dist

        if not dist.is_initialized() or dist.get_world_size() % size:
            raise ConfigError(
                f"this model is split among {size} processes; start them all with torchrun, a multiple of {size}"
            )
        self.size = size
        self.group, _ = dist.new_subgroups(group_size=size, backend="gloo")
        self._first = dist.get_rank() // size * size
        self.leads = dist.get_rank() == self._first

    @staticmethod
    def of(hm: "HookManager") -> "Replica | None":
        """The processes that run a manager's model together; None where it is whole in this one."""
        size = processes_of(hm.model)
        return Replica(size) if size > 1 else None

    def lead(self, block: TokenBlock | None, ended: Any = None) -> None:
        """Tell the others what the next forward reads, or, without a block, how it has ended."""
        self._share([block, ended])

    def follow(self) -> tuple[TokenBlock | None, Any]:
        """Wait for what `lead` says."""
        told: list[Any] = [None, None]
        self._share(told)
        return told[0], told[1]

    def _share(self, told: list[Any]) -> None:
        import torch.distributed as dist

        dist.broadcast_object_list(told, src=self._first, group=self.group)
