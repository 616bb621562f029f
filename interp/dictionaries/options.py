"""Which dictionary to train: a kind, a form, sizes, and what it is trained to do."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from interp.core.errors import ConfigError
from interp.dictionaries.objective import Objective

if TYPE_CHECKING:
    from interp.dictionaries.base import Dictionary

__all__ = ["DictionaryOptions", "Kind"]

Kind = Literal["topk", "batchtopk", "jumprelu", "standard", "gated", "gradient_topk", "feature_choice"]


class DictionaryOptions(Objective):
    """The dictionary's architecture and size, and what it is trained to do."""

    kind: Kind = Field(default="topk", description="architecture")
    form: Literal["sae", "transcoder", "skip_transcoder"] = Field(
        default="sae", description="what it reconstructs: its input, or another site, with or without a linear bypass"
    )
    d_sae: int | None = Field(default=None, gt=0, description="latents; by default 8 · d_in, d_in the site's width")
    k: int | None = Field(
        default=None, gt=0, description="latents that may be active per token; by default a quarter of d_in, at most 32"
    )

    @model_validator(mode="after")
    def _fits(self) -> "DictionaryOptions":
        if self.k is not None and self.d_sae is not None and self.k > self.d_sae:
            raise ValueError(f"k is {self.k}, more than the {self.d_sae} latents of d_sae")
        if self.form != "sae" and self.kind not in ("standard", "jumprelu", "batchtopk"):
            raise ValueError(
                f"a {self.form} of kind {self.kind!r} has no name in SAELens, so no other tool could load it; use "
                "batchtopk, jumprelu or standard"
            )
        if self.kind == "feature_choice" and self.prefixes:
            raise ValueError("feature_choice gives latents tokens by rank of usage, prefixes by number: use batchtopk")
        return self

    @property
    def has_k(self) -> bool:
        """Whether this kind has a number of active latents that is set, rather than found."""
        return self.kind in ("topk", "batchtopk", "gradient_topk", "feature_choice")

    def sizes(self, d_in: int) -> tuple[int, int]:
        """The number of latents and of active ones, with the defaults that follow from the site's width.

        Args:
            d_in: width of the activations.

        Returns:
            (d_sae, k)

        Raises:
            ConfigError: more active latents than there are, or a subspace wider than the site.
        """
        d_sae = 8 * d_in if self.d_sae is None else self.d_sae
        k = min(32, max(1, d_in // 4), d_sae) if self.k is None else self.k
        if k > d_sae:
            raise ConfigError(f"dictionary.k is {k}, more than the {d_sae} latents that d_in {d_in} gives; set d_sae")
        if self.init_rank is not None and self.init_rank > d_in:
            raise ConfigError(f"dictionary.init_rank is {self.init_rank}, more than the {d_in} dimensions there are")
        return d_sae, k

    def make(self, d_in: int, d_out: int | None = None) -> "Dictionary":
        """An untrained dictionary.

        Args:
            d_in: width of the activations.
            d_out: width of what a transcoder reconstructs.

        Raises:
            ConfigError: sizes that do not go together.
        """
        from interp.dictionaries.batchtopk import BatchTopKSAE, BatchTopKTranscoder, FeatureChoiceSAE
        from interp.dictionaries.gated import GatedConfig, GatedSAE
        from interp.dictionaries.jumprelu import (
            JumpReLUConfig,
            JumpReLUSAE,
            JumpReLUTranscoder,
            JumpReLUTranscoderConfig,
        )
        from interp.dictionaries.standard import ReLUTranscoder, ReLUTranscoderConfig, StandardConfig, StandardSAE
        from interp.dictionaries.topk import GradientTopKSAE, TopKConfig, TopKSAE

        d_sae, k = self.sizes(d_in)
        sizes: dict[str, Any] = {"d_in": d_in, "d_sae": d_sae}
        if self.form != "sae":
            if d_out is None:
                raise ConfigError(f"a {self.form} reconstructs another site: say which, as target")
            sizes["d_out"] = d_out
            if self.kind == "standard":
                return ReLUTranscoder(ReLUTranscoderConfig(**sizes, architecture=self.form), self)
            sizes["architecture"] = f"jumprelu_{self.form}"
            jumping = JumpReLUTranscoderConfig(**sizes)
            if self.kind == "jumprelu":
                return JumpReLUTranscoder(jumping, self)
            return BatchTopKTranscoder(jumping, self, k=k)
        if self.kind in ("topk", "gradient_topk"):
            made = TopKSAE if self.kind == "topk" else GradientTopKSAE
            return made(TopKConfig(**sizes, k=k), self)
        if self.kind in ("batchtopk", "feature_choice"):
            shared = BatchTopKSAE if self.kind == "batchtopk" else FeatureChoiceSAE
            return shared(JumpReLUConfig(**sizes), self, k=k)
        if self.kind == "jumprelu":
            return JumpReLUSAE(JumpReLUConfig(**sizes), self)
        if self.kind == "gated":
            return GatedSAE(GatedConfig(**sizes), self)
        return StandardSAE(StandardConfig(**sizes), self)
