"""What a name or a folder holds: SAELens' layout, sparsify's, circuit-tracer's, on disk, on the hub or in a release."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from interp.core.errors import ArtifactError, ConfigError, nearest
from interp.dictionaries.base import Dictionary
from interp.dictionaries.circuit_tracer import CONFIG, from_circuit_tracer, layers_in
from interp.dictionaries.folder import CFG, WEIGHTS
from interp.dictionaries.foreign import read_settings
from interp.dictionaries.hub import HubFolder
from interp.dictionaries.interop import from_old_folder, from_release, release_names
from interp.dictionaries.sparsify import SPARSIFY_WEIGHTS, from_sparsify

__all__ = ["Place", "find"]


@dataclass(frozen=True)
class Place:
    """Where a dictionary is.

    Attributes:
        folder: on disk.
        read: what reads it; None where it is SAELens' layout of version 6 or later, which `Dictionary.load` reads.
        notes: metadata to add: where it came from.
    """

    folder: Path
    read: Callable[[], Dictionary] | None = None
    notes: dict[str, Any] = field(default_factory=dict)


def find(name: str | Path, *, revision: str | None = None) -> Place:
    """Find a dictionary and what reads it.

    Args:
        name: a folder; `hf://owner/repo/folder`, which is fetched; or `release/id` of SAELens' directory.
        revision: of what is on the hub.

    Raises:
        ArtifactError: there is none, or in a layout that is not known.
        ConfigError: a revision of what has none.
    """
    if (on_hub := HubFolder.named(str(name), revision)) is not None:
        return _fetched(on_hub)
    path = Path(name)
    if path.exists():
        if revision is not None:
            raise ConfigError(f"{path} is on this machine and has no revisions; leave revision={revision!r} out")
        return _on_disk(path)
    release, _, sae_id = str(name).partition("/")
    if sae_id and release in (known := release_names()):
        if revision is not None:
            raise ConfigError(
                f"SAELens' release {release!r} names no revision; load its hf://owner/repo@{revision}/folder"
            )
        return Place(path, lambda: from_release(release, sae_id))
    # "runs/x" is looked for in runs; only where there is no such folder may a release be meant.
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = nearest(path.name, beside)
    if not hint and sae_id and not Path(release).exists():
        hint = nearest(release, known)
        hint = f"of SAELens' releases, {hint}" if hint else f"for one on the hub write hf://{name}"
    raise ArtifactError(f"{name}: no such folder; {hint or 'give the folder of a finished run'}")


def _on_disk(path: Path) -> Place:
    if path.is_file():
        if path.suffix == ".safetensors" and path.name not in (WEIGHTS, SPARSIFY_WEIGHTS):
            return Place(path, lambda: from_circuit_tracer(path))
        raise ArtifactError(f"{path} is a file; give its folder, {path.parent}")
    if (path / CFG).is_file():
        return _with_cfg(path)
    if layers_in(path) or _is_set(path):
        return Place(path, lambda: from_circuit_tracer(path))
    if next(path.glob("W_enc_*.safetensors"), None) is not None:
        raise ArtifactError(
            f"{path} holds a cross-layer transcoder of circuit-tracer's layout, which reads and writes many sites at "
            "once; read its tensors with interp.dictionaries.cross_layer_files.read_cross_layer"
        )
    if inside := sorted(found.parent.name for found in path.glob(f"*/{CFG}")):
        some = f"{', '.join(inside[:6])}{', …' if len(inside) > 6 else ''}"
        raise ArtifactError(f"{path} holds no {CFG}, but folders that do: {some}; give one of them")
    return Place(path)


def _with_cfg(path: Path) -> Place:
    try:
        cfg = json.loads((path / CFG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return Place(path)  # load says what is wrong with it
    if not isinstance(cfg, dict):
        return Place(path)
    sparsify = "architecture" not in cfg and "k" in cfg and cfg.keys() & {"num_latents", "expansion_factor"}
    if sparsify or ((path / SPARSIFY_WEIGHTS).is_file() and not (path / WEIGHTS).is_file()):
        return Place(path, lambda: from_sparsify(path))
    if _is_old(cfg):
        return Place(path, lambda: from_old_folder(path))
    return Place(path)


def _is_old(cfg: dict[str, Any]) -> bool:
    """Whether SAELens wrote it before version 6, with all settings at the top."""
    about = cfg.get("metadata")
    version = cfg.get("sae_lens_version") or (about.get("sae_lens_version") if isinstance(about, dict) else None)
    if version:
        major = str(version).partition(".")[0]
        return major.isdecimal() and int(major) < 6
    return not isinstance(about, dict) and bool(cfg.keys() & {"hook_name", "hook_point", "activation_fn_str"})


def _is_set(path: Path) -> bool:
    return (path / CONFIG).is_file() and read_settings(path / CONFIG).get("model_kind") == "transcoder_set"


def _fetched(place: HubFolder) -> Place:
    """Fetch what a folder on the hub needs, whichever layout it has."""
    if place.folder.endswith(".safetensors"):
        place.folder, _, name = place.folder.rpartition("/")
        file = place.need(name)
        place.get(CONFIG)
        return Place(file, _noting(lambda: from_circuit_tracer(file), {"loaded_from": f"{place}/{name}"}))
    cfg = place.get(CFG)
    if cfg is None:
        if place.get(CONFIG) is not None:
            raise ArtifactError(
                f"{place} holds a {CONFIG} and no {CFG}: transcoders of several layers in circuit-tracer's layout; "
                f"give the file of one, such as {place}/layer_3.safetensors"
            )
        raise place.lacks(CFG)
    weights = place.need(WEIGHTS, SPARSIFY_WEIGHTS)
    if weights.name == SPARSIFY_WEIGHTS and place.folder:
        place.get("config.json", beside=True)
    found, notes = _on_disk(cfg.parent), {"loaded_from": str(place)}
    return Place(cfg.parent, None if found.read is None else _noting(found.read, notes), notes)


def _noting(read: Callable[[], Dictionary], notes: dict[str, Any]) -> Callable[[], Dictionary]:
    """The same reading, with where it was from in the metadata."""

    def noted() -> Dictionary:
        dictionary = read()
        dictionary.cfg.metadata.update(notes)
        return dictionary

    return noted
