"""What a stored set of activations is: the manifest that every writer and reader of its folder goes by.

manifest.json    model, sites, dtype, text, how it is cut into units: fixed when the store is begun
shards/000012/   one unit each, whole or not there
complete.json    how many units there are, when all of them are
limit.json       how many tokens are wanted
end.json         before which unit the text ends, where somebody came to its end
config.yaml      the settings of the command that began it, where there was one
"""

import json
import math
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from interp.core.disk import differences
from interp.core.errors import ArtifactError, ConfigError
from interp.core.settings import Settings, describe_faults
from interp.data.codec import codec_named
from interp.data.textloss import LossName

__all__ = [
    "COMPLETE",
    "MANIFEST",
    "SETTINGS",
    "SHARDS",
    "Manifest",
    "SiteLayout",
    "TextLayout",
    "parse_complete",
    "read_complete",
]

MANIFEST, COMPLETE, SHARDS, SETTINGS = "manifest.json", "complete.json", "shards", "config.yaml"
FORMAT = 1


class SiteLayout(Settings):
    """One site of a store."""

    name: str = Field(description="TransformerLens' name")
    shape: tuple[int, ...] = Field(description="feature axes: (d_model,), (n_heads, d_head), …")

    @property
    def width(self) -> int:
        """Numbers per row."""
        return math.prod(self.shape)


class TextLayout(Settings):
    """How text becomes rows: the same for every writer, so that the rows do not hang on how many there are."""

    source: str = Field(description="a short name of the text")
    fingerprint: str = Field(description="digest of the text's beginning and sizes")
    part: str = Field(description="all, train or held_out")
    hold_out_every: int = Field(description="every so many documents one is held out")
    ctx: int = Field(description="tokens per row, BOS included")
    rows: int = Field(description="rows per forward")
    packing: str = Field(description="how documents share rows")
    bos: bool = Field(description="whether BOS stands before each document and row")
    tokenizer: str = Field(description="digest of the tokenizer's vocabulary")
    unit_documents: int = Field(gt=0, description="documents per shard; rows never cross from one shard to the next")


class Manifest(Settings):
    """What is fixed when a store is begun."""

    format: int = Field(default=FORMAT, description="of the folder")
    writer: str = Field(description="version of interp that began it")
    model: str = Field(description="name or path")
    revision: str | None = Field(default=None, description="of the checkpoint")
    config_hash: str = Field(description="of the model's configuration")
    weights: str = Field(description="digest of a sample of the weights")
    model_dtype: str = Field(description="in which the model ran")
    sites: tuple[SiteLayout, ...] = Field(description="what was read, in order")
    dtype: str = Field(description="in which activations are kept")
    gradient: LossName | None = Field(default=None, description="what gradients beside the activations are of")
    processes: int = Field(default=1, description="that ran the model together (tensor parallelism)")
    compile: str = Field(default="off", description="torch.compile's mode for the model's blocks")
    text: TextLayout

    def check(self, now: "Manifest", folder: Path) -> None:
        """Refuse to go on with other settings than the store was begun with.

        Raises:
            ConfigError: names each difference.
        """
        apart = self.apart_from(now)
        if apart:
            raise ConfigError(
                f"the store in {folder} was begun with other settings: {'; '.join(apart)}. Go on with those it was "
                "begun with, or begin anew in another folder"
            )

    def apart_from(self, other: "Manifest") -> list[str]:
        """What tells the activations of two stores apart; the version and the name of the model do not."""
        free = {"writer", "model", "revision"}
        mine, theirs = (made.model_dump(mode="json", exclude=free) for made in (self, other))
        return list(differences(mine, theirs))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Feature axes by site."""
        return {site.name: site.shape for site in self.sites}

    @property
    def parts(self) -> tuple[str, ...]:
        """What is kept of each site."""
        return ("values",) if self.gradient is None else ("values", "gradient")

    @property
    def bytes_per_row(self) -> int:
        """What a row takes on the disk: activations, and 17 bytes of what is known of it."""
        codec = codec_named(self.dtype)
        return 17 + len(self.parts) * sum(codec.bytes_per_row(site.width) for site in self.sites)

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read the manifest of a folder.

        Raises:
            ArtifactError: there is none, or it is damaged or of a later format.
        """
        path = folder / MANIFEST
        if not path.is_file():
            what = "no such folder" if not folder.is_dir() else "it is no store of activations, or was never begun"
            raise ArtifactError(f"{folder} holds no {MANIFEST} ({what}); `interp capture` makes one")
        try:
            raw = path.read_bytes()
        except OSError as err:
            raise ArtifactError(f"{path} cannot be read: {err}") from err
        return cls.parse(raw, str(path))

    @classmethod
    def parse(cls, raw: bytes, where: str) -> "Manifest":
        """Read a manifest from its text.

        Args:
            raw: the text.
            where: its path, for errors.

        Raises:
            ArtifactError: it is damaged, or of a later format.
        """
        try:
            held: dict[str, Any] = json.loads(raw)
            if held.get("format", FORMAT) > FORMAT:
                raise ArtifactError(f"{where} has format {held['format']}, this interp reads {FORMAT}; update interp")
            return cls.model_validate(held)
        except ValidationError as err:
            raise ArtifactError(f"{where} is damaged: {describe_faults(err, cls)}") from err
        except (ValueError, AttributeError) as err:
            raise ArtifactError(f"{where} cannot be read: {err}") from err


def read_complete(folder: Path) -> dict[str, Any] | None:
    """Read how many units a store has; None while it is being written.

    Raises:
        ArtifactError: the file is damaged.
    """
    path = folder / COMPLETE
    if not path.is_file():
        return None
    try:
        return parse_complete(path.read_bytes())
    except (OSError, ValueError) as err:
        raise ArtifactError(f"{path} cannot be read: {err}; remove it and run `interp capture --resume`") from err


def parse_complete(raw: bytes) -> dict[str, Any]:
    """Read how many units a store has from the text of `complete.json`.

    Raises:
        ValueError: it does not say.
    """
    held = json.loads(raw)
    if not isinstance(held, dict) or type(held.get("units")) is not int or held["units"] < 1:
        raise ValueError("it names no number of units")
    return held
