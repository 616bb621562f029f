"""To and from SAELens' own objects; its folders need no conversion, since `save` writes and `load` reads them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from interp.core.errors import ArtifactError, nearest
from interp.dictionaries.base import ARCHITECTURES, Dictionary
from interp.dictionaries.processed import for_model, refuse_unbound

if TYPE_CHECKING:
    import sae_lens

    from interp.core.manager import HookManager

__all__ = ["from_sae_lens", "to_sae_lens"]


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
        hint = nearest(architecture, ARCHITECTURES) or f"known: {', '.join(sorted(ARCHITECTURES))}"
        raise ArtifactError(f"a SAELens SAE of architecture {architecture!r} has no counterpart here; {hint}")
    module, name = ARCHITECTURES[architecture]
    made: type[Dictionary] = getattr(import_module(module), name)
    try:
        ours = made.from_cfg({name: value for name, value in cfg.items() if name != "device"})
    except ValidationError as err:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in err.errors())
        raise ArtifactError(f"this SAELens SAE has settings that cannot be followed: {faults}") from err
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
