"""Run folders as a command line names them: a dictionary with its model and its text, or the sweep that holds it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from pydantic import BaseModel, ConfigDict, Field

from interp.core.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from interp.core.manager import HookManager
    from interp.core.site import Site
    from interp.data.documents import Part
    from interp.data.tokens import TokenSource
    from interp.dictionaries.base import Dictionary
    from interp.train.config import TextOptions, TrainConfig

__all__ = ["OpenRun", "RunOptions", "TextChoice", "expanded", "is_elsewhere", "open_run", "settings_of"]

_NO_SETTING = {"seed", "out", "sweep", "device", "store_cache", "store_cache_bytes"}


class TextChoice(BaseModel):
    """What `eval` and `show` both take."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(default=None, description="a folder or name; by default the one it was trained on")
    data: str | None = Field(
        default=None, description="text: a file, a folder, hf://owner/name, or testbed; by default that of the run"
    )
    device: str | None = Field(default=None, description="cpu, cuda, cuda:1, …; by default as in the run")
    site: str | None = Field(
        default=None,
        description="the site that it reads, where it does not say so; by default the one it was trained on",
    )
    json_output: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = Field(
        default=False, description="print one JSON object on stdout, and nothing else there"
    )


class RunOptions(TextChoice):
    """One run."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = Field(
        description="the folder of a run, or any dictionary that interp.SAE.load reads, such as hf://owner/repo/folder"
    )
    out: Path | None = Field(default=None, description="file to write; by default in the run's folder")


@dataclass(frozen=True)
class OpenRun:
    """A dictionary with its model, and where its text is.

    Attributes:
        folder: of the run.
        hm: the model.
        dictionary: on the model's device.
        site: where it acts.
        cfg: the run's settings; None where the folder has none.
        text: how text becomes rows.
        data: text that was asked for on the command line, instead of the run's own.
    """

    folder: Path
    hm: "HookManager"
    dictionary: "Dictionary"
    site: "Site"
    cfg: "TrainConfig | None"
    text: "TextOptions"
    data: str | None

    def tokens(self, part: "Part") -> "TokenSource":
        """Text to fit on ("train") or to measure on ("held_out"), parted as the run parted it.

        Raises:
            ConfigError: no text is known.
        """
        from interp.train.text import token_source

        own = None if self.cfg is None else self.cfg.data
        apart = self.data if self.data is not None else self.cfg.evaluation.data if self.cfg is not None else None
        named = apart if apart is not None and (part == "held_out" or own is None) else own
        if named is None:
            raise ConfigError(f"{self.folder} does not say what text it was trained on; give --data")
        # Text of its own for the measurement needs no holding out, unless there is no other to fit on.
        whole = apart is not None and own is not None
        return token_source(named, self.text, self.hm.tokenizer, part="all" if whole else part)


def open_run(
    folder: Path,
    options: TextChoice,
    tell: Callable[[str], None],
    *,
    models: "dict[tuple[Any, ...], HookManager] | None" = None,
) -> OpenRun:
    """Load a run's dictionary and its model.

    Args:
        folder: of the run.
        options: what to take instead of what it says.
        tell: called with what is being done.
        models: those that are loaded already, to which one that is loaded is added.

    Raises:
        ArtifactError: there is no dictionary.
        ConfigError: no model is known, or the dictionary does not fit it.
    """
    from interp.core.manager import HookManager
    from interp.dictionaries.base import Dictionary
    from interp.dictionaries.processed import for_model
    from interp.evaluate.place import place_of
    from interp.train.config import TextOptions, TrainConfig

    dictionary: Dictionary = Dictionary.load(folder, model="processed")  # its model comes later
    settings = folder / "config.yaml"
    cfg = TrainConfig.from_yaml(settings) if settings.is_file() else None
    known = dictionary.cfg.metadata
    name = options.model or (cfg.model if cfg is not None else known.get("model_name"))
    if name is None:
        raise ConfigError(f"{folder} does not say what model it was trained on; give --model")
    device, loaded = options.device or (cfg.device if cfg is not None else None), {} if models is None else models
    key = (str(name), None if cfg is None else cfg.dtype, device)
    if key not in loaded:
        tell(f"loading {name}")
        loaded[key] = HookManager.load(key[0], dtype=key[1], device=device)
    hm = loaded[key]
    read = options.site or (None if cfg is None else cfg.site)
    dictionary = for_model(dictionary.to(hm.device), hm, site=read)
    if cfg is not None:
        text = cfg.text
    else:
        usual = TextOptions().ctx
        text = TextOptions(ctx=int(known.get("context_size") or min(usual, hm.max_positions or usual)))
    site = place_of(hm, dictionary, read)
    return OpenRun(folder, hm, dictionary, site, cfg, text, options.data)


def is_elsewhere(run: Path) -> bool:
    """Whether what is named is a dictionary, but no folder to write to: a file, or something on the hub."""
    return run.is_file() or str(run).startswith("hf:")


def expanded(folders: Sequence[Path]) -> list[Path]:
    """The folders of runs, with those of sweeps replaced by those of their dictionaries.

    Args:
        folders: as they were given.

    Raises:
        ArtifactError: a sweep without one finished dictionary.
        ConfigError: a folder is named twice.
    """
    from interp.dictionaries.folder import CFG
    from interp.train.config import TrainConfig

    found: list[Path] = []
    for folder in folders:
        settings = folder / "config.yaml"
        cfg = TrainConfig.from_yaml(settings) if settings.is_file() and not (folder / CFG).is_file() else None
        if cfg is None or not cfg.sweep.any:
            found.append(folder)
            continue
        members = [folder / name for name in cfg.members()]
        missing = [one.name for one in members if not (one / CFG).is_file()]
        if missing:
            way = f"interp train --resume --out {folder}, or name the dictionaries that are whole"
            raise ArtifactError(f"the sweep in {folder} has not finished {', '.join(missing[:4])}; {way}")
        found += members
    twice = [str(one) for i, one in enumerate(found) if one.resolve() in {other.resolve() for other in found[:i]}]
    if twice:
        raise ConfigError(f"{twice[0]} is named twice; give each run once")
    return found


def settings_of(runs: Mapping[str, OpenRun]) -> dict[str, tuple[str, int]]:
    """Say of each run what it was trained with, seed apart, in as few words as tell its setting from the others.

    Runs whose settings differ in the seed and the folder alone have the same; a run that does not say what it was
    trained with is a setting of its own.

    Args:
        runs: by name.

    Returns:
        Name → setting and seed; −1 for a seed that is not known.
    """
    known = {name: run.cfg.model_dump(mode="json", exclude=_NO_SETTING) for name, run in runs.items() if run.cfg}
    flat = {name: _flat(settings) for name, settings in known.items()}
    keys = dict.fromkeys(key for settings in flat.values() for key in settings)
    apart = [key for key in keys if len({settings.get(key) for settings in flat.values()}) > 1]
    found: dict[str, tuple[str, int]] = {}
    for name, run in runs.items():
        if run.cfg is None:
            found[name] = (name, -1)
            continue
        differs = ", ".join(f"{key.rpartition('.')[2]} {flat[name].get(key)}" for key in apart)
        found[name] = (differs or _in_words(run), run.cfg.seed)
    return found


def _in_words(run: OpenRun) -> str:
    sizes, k = run.dictionary.cfg, getattr(run.dictionary.cfg, "k", None)
    kind = run.cfg.dictionary.kind if run.cfg is not None else sizes.architecture
    return f"{kind}, {sizes.d_sae} latents" + (f", k {k}" if k else "") + f", at {run.site.short}"


def _flat(settings: Mapping[str, Any], path: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in settings.items():
        found |= _flat(value, f"{path}{name}.") if isinstance(value, Mapping) else {path + name: str(value)}
    return found
