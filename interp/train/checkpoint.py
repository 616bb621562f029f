"""States to resume a training from: each is there whole or not at all, and goes only when a later one is there.

    resume/step-00000100/state.json         counters, settings, where the data stands
    resume/step-00000100/state.safetensors  weights, moments, random states, what the data holds

A state is written beside its place, synced to the disk and renamed. So a process that is killed, a disk that is full
or a machine that loses power leaves the state before it. For that moment the disk holds two.
"""

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interp.core.disk import appear, sync
from interp.core.errors import ArtifactError

__all__ = [
    "RESUME",
    "STEP_NAMES",
    "SavedState",
    "StateFolder",
    "moments",
    "random_states",
    "restore_moments",
    "restore_random_states",
    "step_folders",
    "step_name",
]

RESUME = "resume"
_STATE, _TENSORS = "state.json", "state.safetensors"
STEP_NAMES = r"step-\d+"  # a regular expression of what steps' folders are called
_STEP = re.compile(r"step-(\d{8,})")
# What else a state has by kind and parameter; all other kinds are the optimiser's.
_OTHERS = ("weights", "average")


@dataclass(frozen=True)
class SavedState:
    """What a training goes on from.

    Attributes:
        record: plain JSON: the step, the state of the data, what the run is.
        tensors: weights, moments and random states by name.
    """

    record: dict[str, Any]
    tensors: dict[str, Tensor]


class StateFolder:
    """The states in the folder of one training, of which at most one outlives a save.

    Args:
        run: the training's folder; the states lie in `resume/` in it. Nothing is touched before `save`.
        held: names that the record of every state has, "step" among them.
        anew: what to do where there is none, for messages.
    """

    def __init__(self, run: Path, *, held: Iterable[str], anew: str) -> None:
        self.run, self.path, self._held, self._anew = run, run / RESUME, frozenset(held), anew

    def check(self) -> int:
        """Return the step of the latest state, which is not read.

        Raises:
            ArtifactError: there is none.
        """
        if not (steps := self.steps()):
            lack = "holds no state to resume from" if self.run.is_dir() else "is no folder, so nothing can resume"
            raise ArtifactError(f"{self.run} {lack}; {self._anew}")
        return max(steps)

    def latest(self) -> SavedState:
        """Read the latest state.

        Raises:
            ArtifactError: there is none, or it is damaged or of another version.
        """
        folder = self.path / step_name(self.check())
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            record = json.loads((folder / _STATE).read_text(encoding="utf-8"))
            if missing := self._held - record.keys():
                raise ValueError(f"it lacks {', '.join(sorted(missing))}: another version wrote it")
            return SavedState(record, load_file(folder / _TENSORS))
        except (OSError, ValueError, SafetensorError) as err:
            raise ArtifactError(f"{folder} cannot be read ({err}); begin the training anew in another folder") from err

    def save(self, state: SavedState) -> None:
        """Save a state, then remove those before it; one of a step that is there already is left as it is.

        Raises:
            ArtifactError: it cannot be written; says which state is still there.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        before, step = dict(step_folders(self.path)), state.record["step"]
        if step in before:
            return

        def write(draft: Path) -> None:
            (draft / _STATE).write_text(json.dumps(state.record, indent=1), encoding="utf-8")
            save_file(state.tensors, draft / _TENSORS)
            for file in draft.iterdir():
                sync(file)

        try:
            self.path.mkdir(exist_ok=True)
            appear(self.path / step_name(step), write)
            sync(self.path)
        except (OSError, SafetensorError) as err:
            fault = (isinstance(err, OSError) and err.strerror) or str(err)
            left = f"that of step {max(before)} is whole: make room, then resume" if before else "there is no other"
            raise ArtifactError(f"the state of step {step} cannot be written in {self.path} ({fault}); {left}") from err
        for folder in before.values():
            shutil.rmtree(folder)

    def steps(self) -> list[int]:
        """The steps whose states are there and whole."""
        return [step for step, _ in step_folders(self.path)]

    def keep(self, step: int) -> None:
        """Remove every state but that of a step."""
        for at, folder in step_folders(self.path):
            if at != step:
                shutil.rmtree(folder, ignore_errors=True)

    def clear(self) -> None:
        """Remove every state, and what was begun of one."""
        shutil.rmtree(self.path, ignore_errors=True)

    def only_begun(self) -> bool:
        """Whether all that the training's folder holds is what a kill left before its first state was whole."""
        held = {p.name for p in self.run.iterdir()} if self.run.is_dir() else set()
        return held == {RESUME} and not step_folders(self.path)


def step_folders(folder: Path) -> list[tuple[int, Path]]:
    """Return the whole `step-…` folders in a folder with their steps, in order; none if it is not there."""
    held = folder.iterdir() if folder.is_dir() else ()
    return sorted((int(match[1]), path) for path in held if (match := _STEP.fullmatch(path.name)))


def step_name(step: int) -> str:
    """The name of a step's folder."""
    return f"step-{step:08d}"


def moments(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return all that an optimiser keeps, by kind and parameter; a parameter that no loss has reached has nothing.

    Args:
        optimizer: what it keeps of a parameter are tensors, such as Adam's moments, and whole numbers.
        parameters: what it fits, by name; those that it does not fit are passed over.
    """
    found = {}
    for name, parameter in parameters.items():
        for kind, value in optimizer.state.get(parameter, {}).items():
            found[f"{kind}.{name}"] = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.long)
    return found


def restore_moments(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `moments` gave.

    Args:
        optimizer: a new one of the same parameters.
        parameters: what it fits, by name.
        tensors: the moments, among others; each is moved to its parameter's device.
    """
    fitted = {p for group in optimizer.param_groups for p in group["params"]}
    for key, value in tensors.items():
        kind, _, name = key.partition(".")
        if kind in _OTHERS or (parameter := parameters.get(name)) is None or parameter not in fitted:
            continue
        # A count is the host's. Copies: what was read from a file is its memory map, and two trainings may go on from
        # one state.
        count = value.ndim == 0 and value.dtype == torch.long
        optimizer.state[parameter][kind] = int(value) if count else value.to(parameter.device, copy=True)


def random_states(device: torch.device) -> dict[str, Tensor]:
    """Return the states of the CPU's random generator and, for a GPU, of its own."""
    found = {"rng.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        found["rng.cuda"] = torch.cuda.get_rng_state(device)
    return found


def restore_random_states(tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Put back what `random_states` gave."""
    torch.set_rng_state(tensors["rng.cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(tensors["rng.cuda"], device)
