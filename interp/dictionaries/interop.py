"""To and from SAELens' own objects; its folders need no conversion, since `save` writes and `load` reads them."""

import json
import re
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from interp.core.errors import ArtifactError, nearest
from interp.dictionaries.base import Dictionary
from interp.dictionaries.folder import ARCHITECTURES, CFG, class_of, not_followed, why_not
from interp.dictionaries.processed import for_model, refuse_unbound

if TYPE_CHECKING:
    import sae_lens

    from interp.core.manager import HookManager

__all__ = ["from_old_folder", "from_release", "from_sae_lens", "release_names", "to_sae_lens"]


def from_sae_lens(sae: "sae_lens.SAE[Any]", *, model: "HookManager | Literal['processed'] | None" = None) -> Dictionary:
    """Turn a SAELens SAE or transcoder into ours, with copied weights.

    Args:
        sae: an inference SAE or transcoder of an architecture that is known here.
        model: as for `Dictionary.load`: the manager whose activations it will read, where it was trained on a model
            that TransformerLens processed.

    Returns:
        The same function (of the processed model's activations, where it was trained on those), in evaluation mode and
        without gradients.

    Raises:
        ArtifactError: an architecture or a scaling that is not known here, or an SAE in training.
        ConfigError: it needs a model, or another one than was given.
    """
    from sae_lens import TrainingSAE

    cfg = sae.cfg.to_dict()
    architecture = str(cfg["architecture"])
    if isinstance(sae, TrainingSAE):
        raise ArtifactError(f"a {type(sae).__name__} is still in training; give what its save_inference_model wrote")
    if architecture not in ARCHITECTURES:
        hint = why_not(architecture)
        raise ArtifactError(f"a SAELens SAE of architecture {architecture!r} has no counterpart here; {hint}")
    try:
        ours = class_of(architecture).from_cfg({name: value for name, value in cfg.items() if name != "device"})
    except ValidationError as err:
        raise ArtifactError(f"this SAELens SAE has {not_followed(err)}") from err
    if model is None:
        refuse_unbound(ours)
    ours.load_state_dict({name: value.detach().clone() for name, value in sae.state_dict().items()})
    ours = ours.to(sae.device).eval().requires_grad_(False)
    return ours if model is None or model == "processed" else for_model(ours, model)


def to_sae_lens(dictionary: Dictionary) -> "sae_lens.SAE[Any]":
    """Turn a dictionary into a SAELens SAE or transcoder, with copied weights.

    Args:
        dictionary: any dictionary; of one that is still in training, what `save` would write.

    Returns:
        The same function as a SAELens object, on the same device.
    """
    from sae_lens import SAE

    made = dictionary.frozen()
    sae = SAE.from_dict({**made.cfg.model_dump(), "device": str(made.W_enc.device)})
    sae.load_state_dict({name: value.detach().clone() for name, value in made.state_dict().items()})
    return sae


def release_names() -> set[str]:
    """The releases in SAELens' directory, read without importing it, which would take seconds."""
    spec = find_spec("sae_lens")
    listed = Path(str(spec.origin)).parent / "pretrained_saes.yaml" if spec is not None else None
    if listed is None or not listed.is_file():
        return set()
    return set(re.findall(r"^([\w.-]+):", listed.read_text(encoding="utf-8"), re.MULTILINE))


def from_release(release: str, sae_id: str) -> Dictionary:
    """Load a dictionary of SAELens' directory, which SAELens fetches and converts.

    Args:
        release: its name there.
        sae_id: of a dictionary in it.

    Returns:
        The dictionary, with the release and the commit in its metadata.

    Raises:
        ArtifactError: no such dictionary, no network, or one that cannot be followed here.
    """
    from huggingface_hub import constants, try_to_load_from_cache
    from sae_lens import SAE
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    listed = get_pretrained_saes_directory()[release]
    if sae_id not in listed.saes_map:
        some = ", ".join(list(listed.saes_map)[:4])
        hint = nearest(sae_id, listed.saes_map) or f"it has {len(listed.saes_map)}, such as {some}"
        raise ArtifactError(f"SAELens' release {release!r} has no {sae_id!r}; {hint}")
    at = f"{listed.repo_id}, {listed.saes_map[sae_id]}"
    try:
        with warnings.catch_warnings():
            # What it says of the model's processing is in the metadata.
            warnings.filterwarnings("ignore", r"\s*This SAE has non-empty model_from_pretrained_kwargs")
            theirs = SAE.from_pretrained(release, sae_id)
    except Exception as err:  # each of its loaders raises what it likes
        why = ", and HF_HUB_OFFLINE forbids the network" if constants.HF_HUB_OFFLINE else ""
        said = f"{type(err).__name__}: {' '.join(str(err).split())[:300]}"
        raise ArtifactError(
            f"{release}/{sae_id} ({at}) cannot be loaded{why}: {said}. "
            "Where there is a network, fetch and save it, and give that folder"
        ) from err
    ours = from_sae_lens(theirs, model="processed")  # whoever loads it says of which
    ours.cfg.metadata["loaded_from"] = f"sae_lens:{release}/{sae_id}"
    held = try_to_load_from_cache(listed.repo_id, f"{listed.saes_map[sae_id]}/{CFG}")
    if isinstance(held, str) and "snapshots" in (parts := Path(held).parts):
        commit = parts[parts.index("snapshots") + 1]
        ours.cfg.metadata["loaded_from_commit"] = f"{listed.repo_id}@{commit}"
    return ours


def from_old_folder(folder: str | Path) -> Dictionary:
    """Read a folder that SAELens wrote before version 6, which SAELens converts.

    Args:
        folder: with `cfg.json` and `sae_weights.safetensors`.

    Raises:
        ArtifactError: it is damaged, or holds what cannot be followed here.
    """
    from sae_lens import SAE

    path = Path(folder)
    cfg = json.loads((path / CFG).read_text(encoding="utf-8"))
    activation = cfg.get("activation_fn_str") or cfg.get("activation_fn") or "relu"
    # Its conversion would take any other for ReLU.
    if activation not in ("relu", "topk"):
        raise ArtifactError(f"{path} holds an SAE with activation {activation!r}; only relu and topk can be loaded")
    try:
        theirs = SAE.load_from_disk(path)
    except Exception as err:  # whatever its conversion trips over
        raise ArtifactError(f"{path} was written by SAELens before 6.0 and cannot be converted: {err}") from err
    theirs.cfg.dtype = theirs.cfg.dtype.removeprefix("torch.")
    ours = from_sae_lens(theirs, model="processed")  # whoever loads it says of which
    ours.cfg.metadata["loaded_format"] = f"SAELens {cfg.get('sae_lens_version') or 'before 6.0'}"
    return ours
