"""The TopK transcoder, which other libraries train and SAELens has no name for."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from interp.core.errors import ArtifactError
from interp.data.store import Batch
from interp.dictionaries.base import Dictionary, Transcoder, TranscoderConfig
from interp.dictionaries.select import encode_topk
from interp.dictionaries.sparse import Activity, SparseDictionary

__all__ = ["TopKTranscoder", "TopKTranscoderConfig"]


class TopKTranscoderConfig(TranscoderConfig):
    """Settings of a TopK transcoder with or without a skip connection, whose names are not SAELens'."""

    architecture: Literal["topk_transcoder", "topk_skip_transcoder"] = Field(
        default="topk_transcoder", description="our name of the architecture; SAELens has none"
    )
    k: int = Field(gt=0, description="latents that may be active per token")

    @model_validator(mode="after")
    def _k_fits(self) -> "TopKTranscoderConfig":
        if self.k > self.d_sae:
            raise ValueError(f"k is {self.k}, more than the {self.d_sae} latents of d_sae")
        return self


class TopKTranscoder(SparseDictionary, Transcoder):
    """Keeps the k largest pre-activations of each token, at least zero, and reconstructs another site from them.

    Read from sparsify's folders and written there with `to_sparsify`. It is not saved in SAELens' format, which has no
    such architecture: under another's name it would be another function.

    Source: Paulo, Shabalin & Belrose 2025, "Transcoders beat sparse autoencoders for interpretability" (2501.18823).
    """

    cfg: TopKTranscoderConfig

    @classmethod
    def from_cfg(cls, cfg: Mapping[str, Any]) -> "TopKTranscoder":
        """Make an untrained transcoder from its settings."""
        return cls(TopKTranscoderConfig.model_validate(dict(cfg)))

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the latents of some activations; at most k are positive, the others are 0."""
        pre = self._pre(self._check_input(x))
        values, index = pre.topk(self.cfg.k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter(-1, index, values.relu())

    def _activity(self, x: Tensor, batch: Batch, dead: Tensor | None) -> Activity:
        codes, revived = encode_topk(x, self._encoder(dead=dead), k=self.cfg.k)
        return Activity(codes.values.relu(), codes, revived)

    def frozen(self) -> Dictionary:
        """Refuse to become what SAELens knows.

        Raises:
            ArtifactError: always.
        """
        raise ArtifactError(
            "SAELens has no name for a TopK transcoder, so its folders cannot hold one; write sparsify's with "
            "interp.dictionaries.sparsify.to_sparsify"
        )
