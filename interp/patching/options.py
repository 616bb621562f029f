"""`PatchOptions`: everything about a patching sweep that has a usual value."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from interp.core.errors import ConfigError, nearest
from interp.core.sweep import ENGINES

__all__ = ["ABLATIONS", "BY", "MODES", "PatchOptions"]

BY = ("pos", "head", "pos_head", "neuron", "span", "span_head", "latent", "site")
"""What the columns of a sweep are."""

MODES = ("denoise", "noise", "both")
"""Clean activations into the corrupted run, others into the clean run, or both sweeps."""

ABLATIONS = ("resample", "mean", "zero", "given")
"""What is put in an activation's place."""


@dataclass(frozen=True)
class PatchOptions:
    """How `activation_patch` patches; every default is the usual choice.

    Args:
        by: what the columns are: "pos", "head", "pos_head" (every head at every position), "neuron" (each entry of the
            last axis), "span" and "span_head" (named spans of the pairs), "latent" (latents of a dictionary) or "site"
            (all of it at once). None takes heads where the sites have them, else positions.
        mode: "denoise" puts clean activations into the corrupted run, "noise" others into the clean run, "both" does
            one after the other. None is "denoise", or "noise" where the ablation is no other prompt.
        ablation: "resample" (the other prompt of the pair), "mean" (over the corrupted prompts of the same template, at
            the same position), "zero", or "given".
        values: for "given": site → a value in the site's axes [batch pos …], or broadcastable to it, such as what
            `mean_values` or `optimal_values` return.
        spans: for "span": the names; None takes all of them.
        dictionary: for "latent": anything with encode and W_dec [d_sae d], which reads the sites.
        latents: for "latent": which; None takes all.
        engine: as for `interp.core.sweep.Sweep`.
        budget_bytes: as for `Sweep`.
        resume: a file that keeps what is done: a sweep that was stopped goes on from it.
        save_every: seconds between two writes of that file.

    Raises:
        ConfigError: an unknown name, or settings that do not go together.
    """

    by: str | None = None
    mode: str | None = None
    ablation: str = "resample"
    values: Mapping[Any, Any] | None = None
    spans: Sequence[str] | None = None
    dictionary: Any = field(default=None, repr=False)
    latents: Sequence[int] | None = None
    engine: str = "auto"
    budget_bytes: int | None = None
    resume: str | os.PathLike[str] | None = None
    save_every: float = 10.0

    def __post_init__(self) -> None:
        named = {"by": BY, "mode": MODES, "ablation": ABLATIONS, "engine": ENGINES}
        for name, known in named.items():
            given = getattr(self, name)
            if given is None and name in ("by", "mode"):
                continue
            if given not in known:
                hint = nearest(str(given), known) or f"expected one of {', '.join(known)}"
                raise ConfigError(f"PatchOptions({name}={given!r}): {hint}")
        if self.ablation != "resample" and self.mode not in (None, "noise"):
            raise ConfigError(
                f"PatchOptions(mode={self.mode!r}, ablation={self.ablation!r}): only the other prompt's activations "
                "can be put into the corrupted run; use mode='noise'"
            )
        if (self.ablation == "given") != (self.values is not None):
            raise ConfigError("PatchOptions: ablation='given' and values=… go together")
        if (self.by == "latent") != (self.dictionary is not None):
            raise ConfigError("PatchOptions: by='latent' and dictionary=… go together")
        if self.by == "latent" and self.ablation != "resample":
            raise ConfigError("PatchOptions: latents are patched with the other prompt's; leave ablation out")
        if self.spans is not None and self.by not in ("span", "span_head"):
            raise ConfigError(f"PatchOptions(spans=…, by={self.by!r}): spans are for by='span' and 'span_head'")

    @property
    def modes(self) -> tuple[str, ...]:
        """The sweeps that are made, in order."""
        chosen = self.mode or ("denoise" if self.ablation == "resample" else "noise")
        return ("denoise", "noise") if chosen == "both" else (chosen,)
