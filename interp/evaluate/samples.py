"""Activations to measure on, from text, from a tensor or from a store: readable any number of times, in one order."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.errors import ConfigError, ShapeError
from interp.core.result import Provenance
from interp.core.site import Site
from interp.data.store import ActivationStore
from interp.data.stored import StoredActivations
from interp.data.tokens import TokenSource
from interp.dictionaries.base import Dictionary
from interp.evaluate.reading import counted_blocks

if TYPE_CHECKING:
    from interp.core.manager import HookManager

__all__ = ["Samples"]

_GOLDEN = (math.sqrt(5) - 1) / 2
_PART = 4096  # tokens of a tensor that are looked at together


@dataclass(frozen=True)
class Samples:
    """Activations that can be read any number of times, in the same order, and what they came in.

    Attributes:
        parts: begins a reading: parts of x [token d], each with the number of the unit that every token came in, or
            None where that is not known.
        unit: what tokens that are not independent came in: "row" or "document"; "" where it is not known.
        described: what they are, for provenance.
    """

    parts: Callable[[], Iterator[tuple[Float[Tensor, "token d"], Int[Tensor, "token"] | None]]]
    unit: str
    described: str

    @staticmethod
    def of_text(hm: "HookManager", tokens: TokenSource, place: Site, *, max_tokens: int, doing: str = "") -> "Samples":
        """Return a site's activations as the model gives them; special tokens are left out, units are rows."""

        def parts() -> Iterator[tuple[Tensor, Tensor | None]]:
            rows = 0
            for block, keep in counted_blocks(tokens, max_tokens, doing=doing):
                x = hm.run(block.inputs, read=[place], logits="none")[place.name]
                at = keep.flatten().nonzero()[:, 0].to(x.device)
                yield x.flatten(0, 1).index_select(0, at).flatten(1), at // keep.shape[1] + rows
                rows += len(keep)

        return Samples(parts, "row", str(tokens.documents.describe()))

    @staticmethod
    def of_store(store: ActivationStore, site: str | Site | None, *, max_tokens: int) -> "Samples":
        """Return what a store holds: in its order and by document from a folder; shuffled, without units, from a model.

        Raises:
            ConfigError: a site that the store does not have, or a stream that never ends.
        """
        names = [s.short for s in store.sites]
        if (site is None and len(names) > 1) or (site is not None and Site(site) not in store.sites):
            raise ConfigError(f"site={site}: this store has {names}; say which one")
        place = store.sites[0] if site is None else Site(site)
        if isinstance(store, StoredActivations):
            return Samples(lambda: _stored(store, store.sites.index(place), max_tokens), "document", str(store.folder))
        if getattr(store, "repeat", False):
            raise ConfigError(
                "this store repeats its text, so that tokens would count twice; make it with repeat=False"
            )
        return Samples(lambda: _streamed(store, place, max_tokens), "", "an activation store")

    @staticmethod
    def of_tensor(x: Float[Tensor, "*unit token d"], *, max_tokens: int | None = None) -> "Samples":
        """Return activations that are at hand: [token d] without units, or [row token d] with rows as units."""
        if x.ndim not in (2, 3):
            raise ShapeError(f"activations of shape {tuple(x.shape)}; expected [token d] or [row token d]")
        flat = x.flatten(0, -2)[:max_tokens]
        unit = torch.arange(len(flat), device=x.device) // x.shape[-2] if x.ndim == 3 else None

        def parts() -> Iterator[tuple[Tensor, Tensor | None]]:
            for at in range(0, len(flat), _PART):
                yield flat[at : at + _PART], None if unit is None else unit[at : at + _PART]

        return Samples(parts, "row" if x.ndim == 3 else "", f"a tensor of shape {list(x.shape)}")

    @staticmethod
    def of(data: "ActivationStore | Tensor | Samples", site: str | Site | None, *, max_tokens: int) -> "Samples":
        """Return samples of a store or a tensor; samples as they are."""
        if isinstance(data, Samples):
            return data
        if isinstance(data, Tensor):
            return Samples.of_tensor(data, max_tokens=max_tokens)
        return Samples.of_store(data, site, max_tokens=max_tokens)

    def remembered(self, most_bytes: int) -> "Samples":
        """Return the same, kept in memory from the first whole reading on, unless they take more than `most_bytes`."""
        kept: list[tuple[Tensor, Tensor | None]] = []
        state = {"bytes": 0, "whole": 0}

        def parts() -> Iterator[tuple[Tensor, Tensor | None]]:
            if state["whole"]:
                yield from kept
                return
            kept.clear()
            state["bytes"] = 0
            for x, unit in self.parts():
                state["bytes"] += x.numel() * x.element_size()
                if state["bytes"] <= most_bytes:
                    kept.append((x, unit))
                else:
                    kept.clear()
                yield x, unit
            state["whole"] = int(state["bytes"] <= most_bytes)

        return Samples(parts, self.unit, self.described)

    def origin(
        self, dictionary: Dictionary, site: str | Site | None, settings: Mapping[str, Any]
    ) -> tuple[str, Provenance]:
        """Return the name of the site that a dictionary was measured at, and the provenance of what was measured."""
        known = dictionary.cfg.metadata
        name = str(known.get("hook_name", "")) if site is None else Site(site).name
        said = {"data": self.described, **settings}
        return name or "activations", Provenance(model=str(known.get("model_name", "")), settings=said)

    def dealt(self, share: float) -> Iterator[tuple[Tensor, Tensor | None, Bool[Tensor, "token"]]]:
        """Yield the parts, and which tokens belong to the first of two sets, which gets this share of the units.

        Unit i, or token i where units are not known, goes there if the fractional part of (i + 1)(√5 − 1)/2 is below
        the share: evenly through the text, and the same in every reading.
        """
        seen = 0
        for x, unit in self.parts():
            number = torch.arange(seen, seen + len(x), device=x.device) if unit is None else unit
            yield x, unit, ((number + 1).double() * _GOLDEN).frac() < share
            seen += len(x)


def _stored(store: StoredActivations, place: int, max_tokens: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    documents = store.column("document").unique(return_inverse=True)[1]
    left = max_tokens
    for low in range(0, store.n_rows, store.batch_size):
        index = store.counted(low, min(low + store.batch_size, store.n_rows))[:left]
        if len(index):
            yield store.gather(index).values[place], documents[index]
        left -= len(index)
        if left <= 0:
            return


def _streamed(store: ActivationStore, place: Site, max_tokens: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    left = max_tokens
    for batch in store.batches(x=place):
        x = batch.x if batch.mask is None else batch.x[batch.mask]
        yield x[:left], None
        left -= len(x)
        if left <= 0:
            return
