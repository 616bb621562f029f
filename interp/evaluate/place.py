"""Where a dictionary reads and what it reconstructs, checked against the model."""

from typing import TYPE_CHECKING

from interp.core.errors import ConfigError
from interp.core.site import Site
from interp.dictionaries.base import Dictionary, Transcoder
from interp.dictionaries.processed import check_bound
from interp.dictionaries.space import has_heads
from interp.evaluate.reading import site_width

if TYPE_CHECKING:
    from interp.core.manager import HookManager

__all__ = ["place_of", "target_of"]


def place_of(hm: "HookManager", dictionary: Dictionary, site: str | Site | None = None) -> Site:
    """Return the site that a dictionary acts on, checked against the model.

    Args:
        hm: the manager of the model.
        dictionary: a dictionary.
        site: None takes the one it was trained on, from its metadata.

    Raises:
        ConfigError: no site is known, it has no vector per token or another width, the dictionary is on another device,
            or it is of a processed model and was not made for this one.
    """
    known = site if site is not None else dictionary.cfg.metadata.get("hook_name")
    if known is None:
        raise ConfigError("the dictionary does not say where it was trained; give site='3.resid_post', or another")
    place, d_in = Site(known), dictionary.cfg.d_in
    if (len(place.axes) != 3 and not has_heads(place)) or place.where is not None:
        raise ConfigError(f"{place} has axes {place.axes}; a dictionary reads one vector a token: try 3.resid_post")
    check_bound(dictionary, hm)
    width = site_width(hm, place)
    if width != d_in:
        raise ConfigError(f"the dictionary has d_in {d_in}, {place.short} of {hm.name} is {width} wide; another model?")
    if dictionary.W_enc.device != hm.device:
        where = f"the dictionary is on {dictionary.W_enc.device}, the model on {hm.device}"
        raise ConfigError(f"{where}; use dictionary.to(hm.device)")
    return place


def target_of(hm: "HookManager", dictionary: Dictionary, place: Site, target: str | Site | None = None) -> Site:
    """Return the site that a dictionary reconstructs: that of an SAE is its own.

    Args:
        hm: the manager of the model.
        dictionary: a dictionary.
        place: what it reads.
        target: None takes the one it was trained on, from its metadata.

    Raises:
        ConfigError: a transcoder's is not known, has another width, or is given for an SAE.
    """
    if not isinstance(dictionary, Transcoder):
        if target is not None and Site(target) != place:
            raise ConfigError(
                f"{type(dictionary).__name__} reconstructs what it reads, {place.short}; leave target out"
            )
        return place
    known = target if target is not None else dictionary.cfg.metadata.get("hook_name_out")
    if known is None:
        raise ConfigError("the transcoder does not say what it reconstructs; give target='3.mlp_out', or another")
    gives = Site(known)
    if (len(gives.axes) != 3 and not has_heads(gives)) or site_width(hm, gives) != dictionary.d_out:
        raise ConfigError(
            f"the transcoder gives {dictionary.d_out} dimensions, {gives.short} of {hm.name} is "
            f"{' × '.join(map(str, hm.atlas.shape(gives)[2:]))}; another site or model?"
        )
    return gives
