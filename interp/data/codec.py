"""How activations lie on a disk: raw numbers row by row, or eight bits with a scale."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.errors import ConfigError, nearest

__all__ = ["CODECS", "Codec", "codec_named"]

_TOP = 127


@dataclass(frozen=True)
class Codec:
    """One way to keep rows of numbers.

    Attributes:
        name: as manifests say it.
        dtype: of what is written per number.
        scale: whether each row, or each channel (over a shard), has a scale of its own in fp32; "" for neither.
    """

    name: str
    dtype: torch.dtype
    scale: Literal["", "row", "channel"] = ""

    def bytes_per_row(self, width: int) -> int:
        """What a row of `width` numbers takes, without a channel's scales."""
        return width * self.dtype.itemsize + (4 if self.scale == "row" else 0)

    @property
    def given(self) -> torch.dtype:
        """Of what is read: what is written, or fp32 where there is a scale."""
        return torch.float32 if self.scale else self.dtype

    def encode(self, x: Float[Tensor, "row d"]) -> dict[str, Tensor]:
        """Return what is written of some rows: `values`, and `scale` where there is one.

        With eight bits, x ≈ values · scale with scale = max |x| / 127 over the row or the channel, rounded to nearest:
        no number is off by more than half its scale.
        """
        if not self.scale:
            return {"values": x.to(self.dtype)}
        x = x.float()
        by_row = self.scale == "row"
        top = x.abs().amax(1 if by_row else 0) if x.numel() else x.new_zeros(len(x) if by_row else x.shape[1])
        scale = top / _TOP
        apart = scale[:, None] if self.scale == "row" else scale
        values = (x / torch.where(apart > 0, apart, 1)).round().clamp(-_TOP, _TOP)
        return {"values": values.to(torch.int8), "scale": scale}

    def decode(
        self, values: Float[Tensor, "row d"] | Int[Tensor, "row d"], scale: Float[Tensor, "n"] | None
    ) -> Float[Tensor, "row d"]:
        """Return the numbers that some rows stand for; raw ones come as they are, without a copy."""
        if scale is None:
            return values
        if not len(values):
            return values.float()
        return values.float() * (scale[:, None] if self.scale == "row" else scale)


CODECS: Mapping[str, Codec] = {
    codec.name: codec
    for codec in (
        Codec("float32", torch.float32),
        Codec("bfloat16", torch.bfloat16),
        Codec("float16", torch.float16),
        Codec("int8_row", torch.int8, "row"),
        Codec("int8_channel", torch.int8, "channel"),
    )
}


def codec_named(name: str) -> Codec:
    """Return a codec by its name.

    Raises:
        ConfigError: there is none.
    """
    if name not in CODECS:
        raise ConfigError(f"dtype {name!r}: {nearest(name, CODECS) or 'known: ' + ', '.join(CODECS)}")
    return CODECS[name]
