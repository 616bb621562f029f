"""Dictionaries of attention's heads, which they read side by side."""

from typing import TypeVar

from jaxtyping import Float
from torch import Tensor

from interp.core.errors import ShapeError
from interp.core.site import Site
from interp.dictionaries.base import SAE, Dictionary
from interp.dictionaries.space import has_heads

__all__ = ["head_weights", "reading"]

_TINY = 1e-12

_D = TypeVar("_D", bound=Dictionary)


def reading(dictionary: _D, site: Site) -> _D:
    """Make a dictionary one that reads a site, by head where that has heads; in place.

    Args:
        dictionary: as wide as the site, or as its heads side by side.
        site: what it reads.

    Returns:
        The same dictionary. At z the settings of an SAE say so, as in SAELens, which has no such setting at q, k and v:
        there the name of the site does.
    """
    if not has_heads(site):
        return dictionary
    change = {"metadata": {**dictionary.cfg.metadata, "hook_name": site.name}}
    by_head = {"reshape_activations": "hook_z"} if site.kind == "z" and isinstance(dictionary, SAE) else {}
    dictionary.set_cfg(dictionary.cfg.model_copy(update={**change, **by_head}))
    return dictionary


def head_weights(dictionary: Dictionary, n_heads: int) -> Float[Tensor, "d_sae n_heads"]:
    """Return how much of each latent's decoder row is of each head: ‖W_dec[i, head k]‖ / Σ_j ‖W_dec[i, head j]‖.

    Args:
        dictionary: of q, k, v or z, its decoder rows [n_heads · d_head].
        n_heads: of the site: `hm.n_heads`, or `hm.n_kv_heads` at k and v.

    Returns:
        Weights that sum to 1 over heads, in fp64; of a latent that writes nothing, 0.

    Raises:
        ShapeError: rows that are not so many heads.

    Source: Kissane et al. 2024, "Interpreting attention layer outputs with sparse autoencoders" (2406.17759), §4.1.
    """
    width = dictionary.W_dec.shape[1]
    if n_heads < 1 or width % n_heads:
        raise ShapeError(f"decoder rows of {width} dimensions are not {n_heads} heads; expected a divisor of {width}")
    norms = dictionary.W_dec.detach().double().unflatten(1, (n_heads, -1)).norm(dim=-1)
    return norms / norms.sum(1, keepdim=True).clamp_min(_TINY)
