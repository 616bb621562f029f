"""To and from SAELens' own objects; its folders need no conversion, since `save` writes and `load` reads them."""

from typing import TYPE_CHECKING, Any

from interp.core.errors import ArtifactError, nearest
from interp.dictionaries.base import ARCHITECTURES, Dictionary
from interp.dictionaries.topk import TopKConfig, TopKSAE

if TYPE_CHECKING:
    import sae_lens

__all__ = ["from_sae_lens", "to_sae_lens"]


def from_sae_lens(sae: "sae_lens.SAE[Any]") -> TopKSAE:
    """Turn a SAELens SAE into ours, with copied weights.

    Args:
        sae: an inference SAE of architecture "topk" that scales nothing at run time.

    Returns:
        The same function, in evaluation mode and without gradients.

    Raises:
        ArtifactError: an architecture or a run-time scaling that is not known here.
    """
    cfg = sae.cfg.to_dict()
    architecture = str(cfg["architecture"])
    if architecture not in ARCHITECTURES:
        hint = nearest(architecture, ARCHITECTURES) or f"known: {', '.join(sorted(ARCHITECTURES))}"
        raise ArtifactError(f"a SAELens SAE of architecture {architecture!r} has no counterpart here; {hint}")
    for name in ("normalize_activations", "reshape_activations"):
        if cfg[name] != "none":
            raise ArtifactError(f"this SAELens SAE has {name}={cfg[name]!r}; fold it into the weights first")
    ours = TopKSAE(TopKConfig.model_validate({name: value for name, value in cfg.items() if name != "device"}))
    ours.load_state_dict({name: value.detach().clone() for name, value in sae.state_dict().items()})
    return ours.to(sae.device).eval().requires_grad_(False)


def to_sae_lens(dictionary: Dictionary) -> "sae_lens.SAE[Any]":
    """Turn a dictionary into a SAELens SAE, with copied weights.

    Args:
        dictionary: any dictionary whose architecture SAELens knows.

    Returns:
        The same function as a SAELens object, on the same device.
    """
    from sae_lens import SAE

    device = dictionary.W_enc.device
    sae = SAE.from_dict({**dictionary.cfg.model_dump(), "device": str(device)})
    sae.load_state_dict({name: value.detach().clone() for name, value in dictionary.state_dict().items()})
    return sae
