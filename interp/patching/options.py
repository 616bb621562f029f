"""`PatchOptions`: everything about a patching sweep that has a usual value."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from interp.core.errors import ConfigError, nearest
from interp.core.sweep import ENGINES
from interp.data.pair_tokens import PairTokens
from interp.data.pairs import PromptPairs

__all__ = ["ABLATIONS", "BY", "MODES", "PatchOptions"]

BY = ("pos", "head", "pos_head", "neuron", "span", "span_head", "dest_src", "dest_src_head", "latent", "site")
"""What the columns of a sweep are."""

MODES = ("denoise", "noise", "both")
"""Clean activations into the corrupted run, others into the clean run, or both sweeps."""

ABLATIONS = ("resample", "mean", "zero", "gaussian", "optimal", "given")
"""What is put in an activation's place."""

_SIGMAS, _DRAWS = 3.0, 10


@dataclass(frozen=True)
class PatchOptions:
    """How `activation_patch` patches; every default is the usual choice.

    Args:
        by: what the columns are: "pos", "head", "pos_head" (every head at every position), "neuron" (each entry of the
            last axis), "span" and "span_head" (named spans of the pairs), "dest_src" and "dest_src_head" (single
            entries of pattern or attn_scores, of all heads together or each: positions² cells; `pos` chooses the
            destinations; patterns are not normalised again, scores are), "latent" (latents of a dictionary) or "site"
            (all of it at once). None takes heads where the sites have them, else positions.
        mode: "denoise" puts clean activations into the corrupted run, "noise" others into the clean run, "both" does
            one after the other. None is "denoise", or "noise" where the ablation is no other prompt.
        ablation: "resample" (the other prompt of the pair), "mean" (over the corrupted prompts of the same template, at
            the same position), "zero", "gaussian" (the activation with noise added), "optimal" (one constant per site,
            or per head, that hurts least: `optimal_values` with its usual settings), or "given".
        values: for "given": site → a value in the site's axes [batch pos …], or broadcastable to it, such as what
            `mean_values` or `optimal_values` return.
        noise: for "gaussian": the noise's standard deviation in σ, the standard deviation of all entries of the
            activation over all tokens of the clean prompts, special ones left out; one σ per site. None is 3.
        n_draws: for "gaussian": how many draws of noise each cell is the mean of, and runs with. None is 10.
        seed: for "gaussian": of the noise. None is 0.
        fit_on: for "optimal": pairs whose clean prompts the constants are fitted on, none of which is measured.
        spans: for "span": the names; None takes all of them.
        dictionary: for "latent": anything with encode, decode and W_dec [d_sae d], which reads the sites; or a
            transcoder, with the one site that it writes: that changes by (latent there − latent here) · its row of
            W_dec.
        reads: for "latent": the site that the dictionary reads, where it writes another. None is what a transcoder
            says of itself.
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
    noise: float | None = None
    n_draws: int | None = None
    seed: int | None = None
    fit_on: Any = field(default=None, repr=False)
    spans: Sequence[str] | None = None
    dictionary: Any = field(default=None, repr=False)
    reads: Any = None
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
        self._check_ablation()
        for name in ("reads", "latents"):
            if self.by != "latent" and getattr(self, name) is not None:
                raise ConfigError(f"PatchOptions({name}=…, by={self.by!r}): {name} is for by='latent'")
        if self.by == "latent" and self.ablation != "resample":
            raise ConfigError("PatchOptions: latents are patched with the other prompt's; leave ablation out")
        if self.spans is not None and self.by not in ("span", "span_head"):
            raise ConfigError(f"PatchOptions(spans=…, by={self.by!r}): spans are for by='span' and 'span_head'")

    def _check_ablation(self) -> None:
        """Refuse settings of an ablation that is not made."""
        noisy = [name for name in ("noise", "n_draws", "seed") if getattr(self, name) is not None]
        if noisy and self.ablation != "gaussian":
            raise ConfigError(
                f"PatchOptions({noisy[0]}={getattr(self, noisy[0])!r}, ablation={self.ablation!r}): {noisy[0]} is for "
                "ablation='gaussian'"
            )
        if self.noise is not None and not (isinstance(self.noise, int | float) and 0 < self.noise < math.inf):
            raise ConfigError(f"PatchOptions(noise={self.noise!r}): expected a number above 0, in standard deviations")
        for name, least in (("n_draws", 1), ("seed", 0)):
            given = getattr(self, name)
            if given is not None and (type(given) is not int or given < least):
                raise ConfigError(f"PatchOptions({name}={given!r}): expected a whole number ≥ {least}")
        if self.ablation == "optimal" and self.fit_on is None:
            raise ConfigError(
                "PatchOptions(ablation='optimal') needs fit_on=…, other pairs than those that are measured: on prompts "
                "that it was fitted on any constant looks too good"
            )
        if self.fit_on is not None and self.ablation != "optimal":
            raise ConfigError(f"PatchOptions(fit_on=…, ablation={self.ablation!r}): fit_on is for ablation='optimal'")
        if self.fit_on is not None and not isinstance(self.fit_on, PromptPairs | PairTokens):
            raise ConfigError(f"PatchOptions(fit_on={type(self.fit_on).__name__}): expected PromptPairs or PairTokens")
        if self.ablation == "optimal" and self.by not in (None, "head", "site"):
            raise ConfigError(
                f"PatchOptions(by={self.by!r}, ablation='optimal'): a constant is fitted for all positions of a "
                "head or a site at once; use by='head' or 'site'"
            )

    @property
    def sigmas(self) -> float:
        """The noise, in standard deviations."""
        return float(self.noise or _SIGMAS)

    @property
    def draws(self) -> int:
        """How many times every cell is run: the draws of noise."""
        return 1 if self.ablation != "gaussian" else self.n_draws or _DRAWS

    @property
    def extra(self) -> dict[str, Any]:
        """The settings of the ablation, for what a result says of itself."""
        if self.ablation == "gaussian":
            return {"noise": self.sigmas, "n_draws": self.draws, "seed": self.seed or 0}
        return {}

    @property
    def modes(self) -> tuple[str, ...]:
        """The sweeps that are made, in order."""
        chosen = self.mode or ("denoise" if self.ablation == "resample" else "noise")
        return ("denoise", "noise") if chosen == "both" else (chosen,)
