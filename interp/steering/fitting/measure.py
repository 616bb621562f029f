"""`measure_direction`: how large activations are along a direction that was made by hand or by algebra."""

from dataclasses import replace

from interp.core.direction import Direction
from interp.core.dose import measure_scale
from interp.core.manager import HookManager
from interp.core.where import Where
from interp.data.concept_tokens import ConceptTokens
from interp.data.contrast import Contrast
from interp.data.gather import gather
from interp.data.pairs import PromptPairs
from interp.steering.fitting.fit import concept_tokens

__all__ = ["measure_direction"]


def measure_direction(
    hm: HookManager,
    direction: Direction,
    data: Contrast | ConceptTokens | PromptPairs,
    *,
    where: Where | None = None,
    pool: str = "each",
    batch_size: int = 32,
) -> Direction:
    """Return a direction with the scale of examples along it, so that doses in units of its fit can be given.

    Args:
        hm: the model.
        direction: any direction of this model.
        data: texts with and without what it stands for.
        where: the token rule, as for `Contrast.tokens`.
        pool: what one example is, as for `gather`.
        batch_size: rows per forward.

    Raises:
        ModelError: a direction of another model.
    """
    direction.check(hm)
    held = gather(hm, concept_tokens(hm, data, where=where), direction.sites, pool=pool, batch_size=batch_size)
    scale = {s: measure_scale(e.x, direction[s], positive=e.y == 1) for s, e in held.items()}
    return replace(direction, scale=scale)
