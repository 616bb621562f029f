"""What verbs that write results have in common: a model, a folder, what belongs to the line alone."""

import json
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from pydantic import BaseModel, ConfigDict, Field

from interp.core.errors import ArtifactError, ConfigError
from interp.core.settings import Settings, read_yaml

if TYPE_CHECKING:
    from interp.core.manager import HookManager
    from interp.core.result import Result

__all__ = [
    "LineFlags",
    "ModelConfig",
    "ResultFolder",
    "open_model",
    "say",
    "settings_in",
    "term_interrupts",
    "write_result",
]

_SETTINGS = "settings.yaml"


class ModelConfig(Settings):
    """A model, and where results go."""

    model: str = Field(description="a folder, testbed or testbed-llama, or a name on the Hugging Face hub")
    out: str = Field(description="folder to write")
    bos: bool | None = Field(default=None, description="BOS before each prompt; by default the tokenizer's habit")
    device: str | None = Field(default=None, description="cpu, cuda, cuda:1, …; by default where the model loads")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None, description="of the model; by default the checkpoint's"
    )


class LineFlags(BaseModel):
    """What belongs to the command line alone."""

    model_config = ConfigDict(extra="forbid")

    config: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = Field(
        default=None, description="YAML file with any of these settings; the word --config may be left out"
    )
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = Field(
        default=False, description="print the settings and what the work would be, and stop"
    )
    json_output: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = Field(
        default=False, description="print one JSON object on stdout, and nothing else there"
    )
    force: Annotated[bool, tyro.conf.FlagCreatePairsOff] = Field(
        default=False, description="replace the results in --out"
    )


def open_model(cfg: ModelConfig) -> "HookManager":
    """Load the model of a configuration."""
    from interp.core.manager import HookManager

    return HookManager.load(cfg.model, dtype=cfg.dtype, device=cfg.device)


class ResultFolder:
    """A folder that results are written to: new, or replaced on request.

    Args:
        path: the folder.
        force: replace what an earlier run of one of these commands left there.
        resume: go on with it.

    Raises:
        ConfigError: it holds something, and is not to be replaced, or is not ours to replace.
    """

    def __init__(self, path: str, *, force: bool = False, resume: bool = False) -> None:
        self.path = Path(path)
        self._resumes = resume
        if self.path.is_file():
            raise ConfigError(f"--out {path} is a file; give a folder")
        held = sorted(p.name for p in self.path.iterdir()) if self.path.is_dir() else []
        if resume and _SETTINGS not in held:
            raise ConfigError(f"--resume: nothing was begun in --out {path} (no {_SETTINGS}); leave --resume out")
        if held and not force and not resume:
            raise ConfigError(f"--out {path} holds {held[0]!r} already; give another folder, or --force to replace it")
        if held and _SETTINGS not in held:
            raise ConfigError(f"--out {path} was not written by this command (no {_SETTINGS}); give another folder")
        self._replaces = bool(held)

    def begin(self, cfg: ModelConfig) -> None:
        """Make the folder, with the settings in it.

        Raises:
            ArtifactError: it cannot be written.
        """
        from interp.core.disk import atomic_write

        if self._resumes:
            return
        try:
            if self._replaces:
                shutil.rmtree(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            atomic_write(self.path / _SETTINGS, cfg.to_yaml())
        except OSError as err:
            raise ArtifactError(
                f"{self.path} cannot be written: {err.strerror}; make room, or choose another folder"
            ) from err

    def give_up(self) -> None:
        """Take away what `begin` made, where nothing was measured yet: the next try needs no --force."""
        if not self._resumes and {p.name for p in self.path.iterdir()} <= {_SETTINGS}:
            shutil.rmtree(self.path)

    def write(self, name: str, text: str) -> Path:
        """Write one file whole.

        Raises:
            ArtifactError: it cannot be written.
        """
        from interp.core.disk import atomic_write

        try:
            return atomic_write(self.path / name, text)
        except OSError as err:
            raise ArtifactError(
                f"{self.path / name} cannot be written: {err.strerror}; make room and run again"
            ) from err


def settings_in(path: str) -> dict[str, Any]:
    """Return the settings of what was begun in a folder.

    Raises:
        ConfigError: nothing was.
    """
    file = Path(path) / _SETTINGS
    if not file.is_file():
        raise ConfigError(f"--resume: nothing was begun in --out {path} (no {_SETTINGS}); leave --resume out")
    return read_yaml(file)


def say(text: str, record: dict[str, Any], *, as_json: bool) -> None:
    """Print a result on stdout, for people or for machines."""
    sys.stdout.write(f"{json.dumps(record, indent=1) if as_json else text}\n")


def write_result(folder: ResultFolder, found: "Result", table: str, page: str, *, name: str = "result") -> list[Path]:
    """Write a result as a table, a page and the folder that `Result.load` reads.

    Args:
        folder: where to.
        found: the result.
        table, page, name: what the files and the folder are called.

    Raises:
        ArtifactError: they cannot be written.
    """
    try:
        return [
            folder.write(table, found.to_frame().to_csv(index=False)),
            found.to_html(folder.path / page),
            found.save(folder.path / name, overwrite=True),  # the folder is new, emptied, or gone on with
        ]
    except OSError as err:
        raise ArtifactError(f"{folder.path} cannot be written: {err.strerror}; make room and run again") from err


@contextmanager
def term_interrupts() -> Iterator[None]:
    """Within this, SIGTERM ends work as Ctrl-C does."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
