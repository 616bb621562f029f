"""The processes of one training under torchrun: who is who, what they agree on, and what the first alone does."""

import atexit
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from interp.core.errors import ConfigError, InterpError
from interp.data.ranks import ONE, Ranks
from interp.dictionaries.across import ALONE, Across, latent_axis
from interp.train.checkpoint import SavedState
from interp.train.config import TrainOptions
from interp.train.runfolder import RunFolder
from interp.train.signals import StopSignals

__all__ = [
    "Agreed",
    "ElsewhereError",
    "LostProcessError",
    "World",
    "check_processes",
    "follows",
    "gathered",
    "own_part",
    "started",
]

_T = TypeVar("_T")
# The others wait for the first while it measures, saves or loads, however long that takes.
_PATIENCE = timedelta(days=365)


class ElsewhereError(InterpError):
    """Something is wrong that another process of the same training says."""


class LostProcessError(InterpError, RuntimeError):
    """Another process of the same training is gone."""


@dataclass(frozen=True)
class World:
    """The processes of one training; alone, there is nobody to agree with.

    Attributes:
        across: how they share one dictionary's training.
        control: all of them, over a channel of its own that waits for ever and that no GPU waits for.
    """

    across: Across = ALONE
    control: Ranks = ONE

    @property
    def first(self) -> bool:
        """Whether this is the process that speaks, writes and measures."""
        return self.control.rank == 0

    @property
    def size(self) -> int:
        """How many they are."""
        return self.control.size

    @staticmethod
    @contextmanager
    def joined(options: TrainOptions, device: str | None = None) -> Iterator["World"]:
        """Find the other processes that torchrun has started.

        Args:
            options: of the fit, with its shards.
            device: as configured; "cpu" keeps off GPUs.

        Raises:
            ConfigError: shards or batches do not go with so many processes, or they cannot be found.
            LostProcessError: inside the block, another of them has ended.
        """
        size = started()
        try:
            check_processes(size, options)
        except ConfigError as err:
            if follows():
                raise ElsewhereError(str(err)) from err
            raise
        if size == 1:
            yield World()
            return
        import torch.distributed as dist

        owned = not dist.is_initialized()
        if owned:
            _begin(device)
        try:
            yield _world(options.shards)
        except (RuntimeError, ValueError) as err:
            if isinstance(err, InterpError) or not _is_lost(err):
                raise
            raise LostProcessError(
                "another process of this training has ended, so this one cannot go on; what was wrong stands in its "
                f"own message or torchrun's ({str(err).splitlines()[0][:200]})"
            ) from err
        if owned:
            # Not now: the next training of this process finds the same others, whom torchrun brings together once.
            atexit.register(dist.destroy_process_group)

    def device(self, wanted: str | None) -> str | None:
        """The device of this process: of several on one machine, each has the GPU of its number.

        Raises:
            ConfigError: one GPU is named for several processes.
        """
        if self.size == 1 or wanted == "cpu":
            return wanted
        if wanted is not None and wanted.startswith("cuda:") and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
            raise ConfigError(f"device {wanted!r} is one GPU for several processes; leave it out: each takes its own")
        return f"cuda:{_local()}" if wanted in (None, "cuda") and torch.cuda.is_available() else wanted

    def folder(self, path: str | Path) -> RunFolder:
        """The folder of a run, in which the first process alone writes."""
        return RunFolder(path) if self.first else _Reader(path)

    def together(self, work: Callable[[], _T]) -> _T:
        """Do something in every process; what goes wrong in one ends all, and the first of those says it.

        Raises:
            ElsewhereError: it went wrong in another process.
        """
        if self.size == 1:
            return work()
        fault, made = None, None
        try:
            made = work()
        except InterpError as err:
            fault = err
        failed = [bool(told) for told in self.control.gather(torch.tensor([fault is not None]).long())]
        if True not in failed:
            return made  # type: ignore[return-value]
        if fault is not None and failed.index(True) == self.control.rank:
            raise fault
        raise ElsewhereError(f"process {failed.index(True)} says what is wrong")

    def told(self, value: bool) -> bool:
        """What the first process says."""
        return bool(self.control.give(torch.tensor([int(value)]), 0))


class Agreed:
    """What signals have asked any of the processes for: all find the same, between the same two steps.

    Every process must ask at the same points. It costs a message between hosts, and no GPU waits for it.

    Args:
        signals: of this process.
        control: all of them.
    """

    def __init__(self, signals: StopSignals, control: Ranks) -> None:
        self.signals, self._control = signals, control
        self._name: str | None = None
        self._save = False

    @property
    def name(self) -> str | None:
        """The signal that asked to stop."""
        # Not written into `signals`: this process' own one may still be on its way, and would count as the second.
        return self._name or self.signals.name

    def __call__(self) -> bool:
        if self._control.size == 1:
            return self.signals()
        own = 0 if self.signals.name is None else int(signal.Signals[self.signals.name])
        number, save = self._control.most(torch.tensor([own, int(self.signals.save_wanted())])).tolist()
        self._save = self._save or bool(save)
        if number and self._name is None:
            self._name = signal.Signals(number).name
        return self._name is not None

    def save_wanted(self) -> bool:
        """Whether a state is to be saved, which whoever was asked for it had said when all last agreed."""
        if self._control.size == 1:
            return self.signals.save_wanted()
        wanted, self._save = self._save, False
        return wanted


def started() -> int:
    """How many processes torchrun has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def follows() -> bool:
    """Whether this is one of them, and not the first."""
    return started() > 1 and int(os.environ.get("RANK", "0")) > 0


def check_processes(size: int, options: TrainOptions) -> None:
    """Refuse a number of processes that shards or batches cannot be split among.

    Raises:
        ConfigError: says how to start them, or which batches would do.
    """
    shards = options.shards
    if shards > 1 and options.optimizer in ("muon", "adam8bit"):
        raise ConfigError(
            f"train.shards is {shards}, and {options.optimizer} takes the matrices of a dictionary as wholes; use adam "
            "or signsgd"
        )
    if size % shards == 0 and options.batch_size % (size // shards):
        parts = size // shards
        near = max(1, round(options.batch_size / parts)) * parts
        raise ConfigError(
            f"train.batch_size is {options.batch_size}, which {parts} processes cannot share alike; give {near}"
        )
    if size % shards:
        raise ConfigError(
            f"train.shards is {shards}, and the number of processes, {size}, is no multiple of it; start so many: "
            f"`torchrun --nproc-per-node {shards} --no-python interp train …`"
        )


def gathered(across: Across, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a fit is made of, on the CPU and whole, in the first process; nothing in the others where it is split."""
    return across.whole({key: (_axis(key), value) for key, value in tensors.items()}) or {}


def own_part(across: Across, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What this process holds of a whole fit: views."""
    return {key: across.part(_axis(key), value) for key, value in tensors.items()}


def _axis(key: str) -> int | None:
    """Along which axis a tensor of a fit has latents."""
    kind, _, name = key.partition(".")
    if kind in ("weights", "average", "exp_avg", "exp_avg_sq", "momentum"):
        return latent_axis(name)
    return 0 if key == "last_fired" else None


def _begin(device: str | None) -> None:
    import torch.distributed as dist

    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(_local())
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    except (RuntimeError, ValueError) as err:
        raise ConfigError(f"WORLD_SIZE is {started()}, but the processes do not find each other: {err}") from err


def _world(shards: int) -> World:
    import torch.distributed as dist

    rank, size = dist.get_rank(), dist.get_world_size()
    control = Ranks(rank, size, dist.new_group(backend="gloo", timeout=_PATIENCE))
    every = Ranks(rank, size)
    if shards == 1:
        return World(Across(every, ONE, every), control)
    row, column = divmod(rank, shards)
    rows = size // shards
    # Everyone makes every group, in the same order. Neighbours by rank hold one dictionary: they talk most.
    of_latents = [dist.new_group([r * shards + c for c in range(shards)]) for r in range(rows)]
    of_tokens = [dist.new_group([r * shards + c for r in range(rows)]) for c in range(shards)]
    tokens = Ranks(row, rows, of_tokens[column]) if rows > 1 else ONE
    return World(Across(tokens, Ranks(column, shards, of_latents[row]), every), control)


def _local() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def _is_lost(err: BaseException) -> bool:
    import torch.distributed as dist

    said = str(err).lower()
    return isinstance(err, dist.DistError) or any(word in said for word in ("gloo", "nccl", "connection"))


class _Reader(RunFolder):
    """The folder of a run for processes that write nothing."""

    def check(self, *, force: bool = False) -> None:
        pass

    def check_resume(self) -> int:
        return 0

    def begin(self, state: SavedState, config: str, *, force: bool = False) -> None:
        pass

    def begin_in(self, config: str) -> None:
        pass

    def cut_back(self, step: int, metrics_bytes: int, config: str) -> None:
        pass

    def go_on(self, step: int, config: str) -> None:
        pass

    def save_state(self, state: SavedState) -> None:
        pass

    def write(self, name: str, text: str) -> None:
        pass

    def finish(self, record: Mapping[str, Any]) -> None:
        pass

    def config(self, text: str) -> None:
        pass

    def provenance(self, record: Mapping[str, Any]) -> None:
        pass

    def evaluation(self, record: Mapping[str, Any]) -> None:
        pass

    def log(self, line: Mapping[str, int | float]) -> None:
        pass
