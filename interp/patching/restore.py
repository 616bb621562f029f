"""The restored cells of a causal trace: one state, or a window of layers, put back into a noised run."""

from collections.abc import Mapping
from dataclasses import replace

from jaxtyping import Bool
from torch import Tensor

from interp.core.site import Site
from interp.core.sweep_cells import Cells

__all__ = ["restoring_cells"]


def restoring_cells(
    kind: str, layer: int, clean: Mapping[Site, Tensor], columns: Bool[Tensor, "cell batch pos"], *, window: int
) -> Cells:
    """Return cells that restore a kind of state at each place, in a window of layers around one.

    Args:
        kind: "resid_post", which is restored at its layer alone, or "mlp_out" or "attn_out".
        layer: the centre.
        clean: the clean activations of all layers.
        columns: the places.
        window: layers from layer − window // 2 on, cut off at the ends of the model.
    """
    n_layers = len([site for site in clean if site.kind == kind])
    width = 1 if kind == "resid_post" else window
    low = max(0, layer - width // 2)
    high = min(n_layers, layer - width // 2 + width)
    sites = [Site(f"{at}.{kind}") for at in range(low, high)]
    first, *others = (Cells.replacing(site, clean[site], columns) for site in sites)
    return replace(first, then=tuple(others))
