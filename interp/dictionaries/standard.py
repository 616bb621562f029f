"""Dictionaries whose latents are all positive pre-activations, held down by an L1 penalty."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from interp.data.store import Batch
from interp.dictionaries.base import SAE, Dictionary, DictionaryConfig, Transcoder, TranscoderConfig
from interp.dictionaries.kernels import Codes, Entries, encode_dense
from interp.dictionaries.objective import Objective, Terms
from interp.dictionaries.select import Encoder, pre_activations
from interp.dictionaries.sparse import Activity, SparseDictionary

__all__ = ["ReLUDictionary", "ReLUTranscoder", "StandardConfig", "StandardSAE", "above"]

# On a CPU products over entries cost less than dense ones below this share of active latents.
_SPARSE = 0.05
_SPARSITY = 5 / 4096**0.5  # λ = 5 in the source, here taken for activations of width 4096 and norm √4096


def above(x: Tensor, encoder: Encoder, threshold: Tensor | float) -> tuple[Tensor, Codes | None]:
    """Return the pre-activations of a batch that may lie above a threshold, with their gradients.

    Args:
        x: activations.
        encoder: what makes pre-activations of them.
        threshold: of each latent, or of all.

    Returns:
        The values at the entries above it, with the entries; or, where there are too many of them for that to pay, and
        on a GPU, which would have to wait for their number, all pre-activations and None.
    """
    pre = pre_activations(x, encoder)
    if pre.device.type == "cpu":
        active = pre > threshold
        if int(active.sum()) <= _SPARSE * active.numel():
            token, latent = active.nonzero(as_tuple=True)
            entries = Entries(latent, encoder.d_sae, tokens=token, n_tokens=len(x))
            codes = encoder.codes(x, pre[token, latent], entries)
            return codes.values, codes
    return encode_dense(x, encoder.W_enc, encoder.b_enc, encoder.centre, pre), None


class StandardConfig(DictionaryConfig):
    """SAELens' settings of a standard SAE."""

    architecture: Literal["standard"] = Field(default="standard", description="SAELens' name of the architecture")


class ReLUTranscoderConfig(TranscoderConfig):
    """SAELens' settings of a transcoder with or without a skip connection."""

    architecture: Literal["transcoder", "skip_transcoder"] = Field(
        default="transcoder", description="SAELens' name of the architecture"
    )


class ReLUDictionary(SparseDictionary):
    """Latents are z = ReLU((x − centre) W_enc + b_enc); the penalty is Σ_n z_n ‖W_dec[n]‖, mean over tokens.

    The norm in the penalty takes away the gain of small latents with long decoder rows, so that rows need no
    constraint; they are brought to norm 1 when the dictionary is saved. By default λ = 5 √(d_in / 4096).

    Source: Conerly et al. 2024, "Circuits updates: April 2024" (transformer-circuits.pub), training SAEs.
    """

    # Squared error, free decoder norms, no AuxK.
    defaults: ClassVar[Terms] = Terms(loss="mse", aux_coef=0.0, unit_norm=False)

    def __init__(self, cfg: DictionaryConfig, objective: Objective | None = None) -> None:
        super().__init__(cfg, objective)
        if self.objective.sparsity is None:
            # The error grows with ‖x‖², latents with ‖x‖: this weighs them alike at every width.
            self.terms = replace(self.terms, sparsity=_SPARSITY * cfg.d_in**0.5)

    def encode(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the latents of some activations."""
        return self._pre(self._check_input(x)).relu()

    def _activity(self, x: Tensor, batch: Batch, dead: Tensor | None) -> Activity:
        values, codes = above(x, self._encoder(), 0.0)
        return Activity(values.relu(), codes)

    def _penalty(self, activity: Activity, n_tokens: int) -> Tensor:
        return activity.total(self.W_dec.norm(dim=-1)) / max(1, n_tokens)

    def frozen(self) -> Dictionary:
        """Return the same with decoder rows of norm 1; itself where they have it up to rounding."""
        norm = self.W_dec.detach().norm(dim=-1)
        if bool(((norm - 1).abs() <= 8 * torch.finfo(norm.dtype).eps).all()):
            return self
        made = deepcopy(self)
        made.fold_decoder_norm()
        return made


class StandardSAE(ReLUDictionary, SAE):
    """Keeps all positive pre-activations, held down by an L1 penalty that weighs each latent with its decoder's norm.

    Source: Conerly et al. 2024, "Circuits updates: April 2024" (transformer-circuits.pub), as in `ReLUDictionary`.
    """

    cfg: StandardConfig

    @classmethod
    def from_cfg(cls, cfg: Mapping[str, Any]) -> "StandardSAE":
        """Make an untrained SAE from the settings in a `cfg.json`."""
        return cls(StandardConfig.model_validate(dict(cfg)))


class ReLUTranscoder(ReLUDictionary, Transcoder):
    """A transcoder with ReLU and an L1 penalty, with or without a skip connection.

    Source: Dunefsky, Chlenski & Nanda 2024 (2406.11944), §3; Paulo, Shabalin & Belrose 2025 (2501.18823) for W_skip.
    """

    cfg: ReLUTranscoderConfig

    @classmethod
    def from_cfg(cls, cfg: Mapping[str, Any]) -> "ReLUTranscoder":
        """Make an untrained transcoder from the settings in a `cfg.json`."""
        return cls(ReLUTranscoderConfig.model_validate(dict(cfg)))
