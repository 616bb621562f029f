"""What is compared: each method as a function of a concept's texts that returns what steers and what detects."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.direction import Direction, Dose, Steers
from interp.core.errors import ConfigError, nearest
from interp.core.manager import HookManager
from interp.core.site import Site
from interp.data.concept_tokens import ConceptTokens
from interp.dictionaries.base import Dictionary
from interp.steering.fitting.fit import fit_direction
from interp.steering.fitting.latents import best_latent, latent_direction
from interp.steering.trained.supervised import TrainedOptions, fit_reft_r1, fit_ssv
from interp.steering.trained.transport import fit_transport

__all__ = ["CONTROLS", "METHODS", "Contender", "Fit", "along", "of_direction", "sae_contender", "trained_contender"]

CONTROLS = ("random", "shuffled")
"""Methods that know nothing of the concept: what every other one is held to."""

Detect = Callable[[Float[Tensor, "n d"]], Float[Tensor, " n"]]


class Contender(NamedTuple):
    """A method fitted on one concept.

    Attributes:
        steers: what steers; None for a method that only detects.
        detect: activations at the site → a score each, the higher the likelier; None for one that only steers.
        doses: those it is tried at; None for the comparison's own.
    """

    steers: Steers | None
    detect: Detect | None
    doses: tuple[Dose, ...] | None = None


Fit = Callable[[HookManager, ConceptTokens, Site, int], Contender]
"""(model, labelled tokens to fit on, site, seed) → what it made of them. Yours may be any function like this."""


def along(direction: Direction) -> Detect:
    """Return the detector of a direction: the projection of an activation on it."""
    unit = direction.unit(direction.sites[0]).flatten()
    return lambda x: x @ unit.to(x)


def of_direction(method: str) -> Fit:
    """Return a method of `fit_direction` as a contender.

    Args:
        method: its name.
    """

    def fit(hm: HookManager, data: ConceptTokens, site: Site, seed: int) -> Contender:
        direction = fit_direction(hm, data, site, method=method, seed=seed)
        return Contender(direction, along(direction))

    return fit


def trained_contender(method: str, options: TrainedOptions | None = None, *, start: str | None = None) -> Fit:
    """Return "ssv" or "reft_r1" as a contender.

    Args:
        method: which.
        options: of the training; AxBench's by default.
        start: a method of `fit_direction` that ReFT-r1 starts from; by default what the options say.

    Raises:
        ConfigError: another method.
    """
    trainers = {"ssv": fit_ssv, "reft_r1": fit_reft_r1}
    if method not in trainers:
        raise ConfigError(f"method={method!r}: {nearest(method, trainers) or 'expected ssv or reft_r1'}")

    def fit(hm: HookManager, data: ConceptTokens, site: Site, seed: int) -> Contender:
        chosen = options or TrainedOptions(progress=False)
        if start is not None:
            chosen = replace(chosen, start=fit_direction(hm, data, site, method=start, seed=seed))
        direction = trainers[method](hm, data, site, options=chosen, seed=seed)
        return Contender(direction, along(direction))

    return fit


def sae_contender(dictionary: Dictionary) -> Fit:
    """Return the latent of a dictionary that tells the concept best on the texts of the fit, as a contender.

    Args:
        dictionary: an SAE at the site of the comparison.
    """

    def fit(hm: HookManager, data: ConceptTokens, site: Site, seed: int) -> Contender:
        found = best_latent(hm, dictionary, data, site, n=1, seed=seed)
        direction = latent_direction(hm, dictionary, found.best, site=site, data=data)

        def detect(x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
            with torch.no_grad():
                return dictionary.encode(x.to(dictionary.W_dec))[:, found.best].float().cpu()

        return Contender(direction, detect)

    return fit


def _linear_act(hm: HookManager, data: ConceptTokens, site: Site, seed: int) -> Contender:
    """Linear activation transport, which steers by a share of its map and detects nothing."""
    return Contender(fit_transport(hm, data, site), None, tuple(Dose(s) for s in (0.25, 0.5, 0.75, 1.0)))


METHODS: Mapping[str, Fit] = {
    **{name: of_direction(name) for name in ("mean_difference", "lat", "logistic", "mass_mean", "lda")},
    "ssv": trained_contender("ssv"),
    "reft_r1": trained_contender("reft_r1"),
    "linear_act": _linear_act,
    **{name: of_direction(name) for name in CONTROLS},
}
"""The methods by name; `{**METHODS, "mine": my_fit, "sae": sae_contender(sae)}` adds to them."""
