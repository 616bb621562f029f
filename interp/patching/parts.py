"""Parts of a computation by name: "a3.h1", "m2@s2", "a9.h9<q>@end", "8.resid_post", with globs and short words.

Names are those of `Graph`; what follows an "@" says at which positions: a span's name, or a number counted in each
row's own tokens (−1 is the last).
"""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from interp.core.errors import DataError, SiteError, nearest
from interp.core.site import Site
from interp.core.text import Tokens
from interp.patching.graph import Graph, Node

__all__ = ["Part", "Parts", "check_aligned", "named_parts", "positions", "read_receivers", "read_senders"]

_STREAM = ("resid_pre", "resid_mid", "resid_post")
_SENDERS = {"heads": "a*", "mlps": "m*", "all": "*"}
_RECEIVERS = {"q": "*<q>", "k": "*<k>", "v": "*<v>", "mlps": "m*"}

Parts = str | Sequence[str] | Mapping[str, Sequence[str] | str]
"""One name, several, or groups of them by label."""


@dataclass(frozen=True)
class Part:
    """One node, or the residual stream somewhere, at some positions.

    Attributes:
        name: as it is written, such as "a3.h1@s2".
        kind: "input", "head", "mlp", "q", "k", "v", "logits" or "stream".
        layer: its block; −1 for the input, n_layers for the logits.
        head: its head; −1 where it is none.
        place: a span, a number, or None for every position.
        site: of a stream, its short name.
    """

    name: str
    kind: str
    layer: int
    head: int = -1
    place: str | None = None
    site: str = ""

    @property
    def wrote(self) -> int:
        """When a sender writes, in half steps of a block, as `Graph` counts."""
        return 0 if self.kind == "input" else 4 * self.layer + (4 if self.kind == "mlp" else 2)

    def reads(self, *, parallel: bool) -> int:
        """When a receiver reads."""
        if self.kind == "stream":
            return 4 * self.layer + {"resid_pre": 1, "resid_mid": 3, "resid_post": 5}[self.site.partition(".")[2]]
        if self.kind == "logits":
            return 4 * self.layer + 4
        return 4 * self.layer + (3 if self.kind == "mlp" and not parallel else 1)


def read_senders(graph: Graph, given: Parts) -> dict[str, list[Part]]:
    """Return groups of senders by label: each one of a list alone, those of a mapping's entry together.

    Args:
        graph: of the model.
        given: names, globs such as "a3.*@s2", "heads", "mlps" or "all"; or a mapping of labels to them.

    Raises:
        SiteError: a name that there is not, or none at all.
    """
    if isinstance(given, Mapping) and given:
        return {str(label): named_parts(graph.senders, names, _SENDERS, "sender") for label, names in given.items()}
    return {part.name: [part] for part in named_parts(graph.senders, given, _SENDERS, "sender")}


def read_receivers(graph: Graph, given: Parts) -> dict[str, list[Part]]:
    """Return groups of receivers by label: those of a list together, and each of a mapping's entries.

    Args:
        graph: of the model.
        given: names, globs, "q", "k", "v", "mlps", "logits", or streams such as "8.resid_post"; or a mapping.

    Raises:
        SiteError: a name that there is not, none at all, or logits or a stream together with other receivers.
    """
    if not isinstance(given, Mapping) or not given:
        names = [given] if isinstance(given, str) else list(given)
        given = {" + ".join(names) if len(names) < 4 else f"{names[0]} and {len(names) - 1} more": names}
    found = {str(k): named_parts(graph.receivers, v, _RECEIVERS, "receiver", streams=graph) for k, v in given.items()}
    for label, parts in found.items():
        alone = next((p for p in parts if p.kind in ("logits", "stream")), None)
        if alone is not None and len(parts) > 1:
            raise SiteError(
                f"receivers {label!r} hold {alone.name} and others, whose effects it would overwrite; make it a group "
                f'of its own: receivers={{"direct": ["{alone.name}"], …}}'
            )
        if alone is not None and alone.kind == "logits" and alone.place is not None:
            raise SiteError(f"{alone.name}: logits are those that the metric reads; leave the place out")
    return found


def named_parts(
    nodes: Sequence[Node],
    given: str | Iterable[str],
    words: Mapping[str, str],
    what: str,
    *,
    streams: Graph | None = None,
) -> list[Part]:
    """Return the parts that names, globs and short words stand for, each once, in the order asked.

    Args:
        nodes: those that may be named.
        given: the names.
        words: short word → glob.
        what: what they are, for messages.
        streams: the graph, where sites of the residual stream may be named too.

    Raises:
        SiteError: a name that there is not, or none at all.
    """
    asked = [given] if isinstance(given, str) else list(given)
    if not asked:
        raise SiteError(f"no {what} was given; name at least one, such as {nodes[0].name!r}")
    found: dict[str, Part] = {}
    for text in asked:
        if not isinstance(text, str):
            raise SiteError(f"a {what} is a name such as {nodes[0].name!r}, got {type(text).__name__}")
        name, _, place = text.partition("@")
        for node in _matching(name.strip(), nodes, words, what, streams):
            kind, site = (node.kind, "") if node.kind != "stream" else ("stream", node.name)
            whole = f"{node.name}@{place.strip()}" if place else node.name
            found[whole] = Part(whole, kind, node.layer, node.head, place.strip() or None, site)
    return list(found.values())


def _matching(
    name: str, nodes: Sequence[Node], words: Mapping[str, str], what: str, streams: Graph | None
) -> list[Node]:
    if streams is not None and name.rpartition(".")[2] in (*_STREAM, *(f"hook_{kind}" for kind in _STREAM)):
        site = Site(name)
        layer = site.layer or 0
        if layer >= streams.n_layers or (site.kind == "resid_mid" and streams.parallel):
            raise SiteError(f"no {what} {name!r}: this model has {streams.n_layers} layers, from 0")
        return [Node(site.short, "stream", layer)]
    pattern = words.get(name, name)
    matched = [node for node in nodes if fnmatch.fnmatchcase(node.name, pattern)]
    if not matched:
        known = [node.name for node in nodes]
        hint = nearest(name, [*known, *words]) or f"they are {', '.join(known[:6])}, …, or {', '.join(words)}"
        raise SiteError(f"no {what} {name!r}; {hint}")
    return matched


def positions(tokens: Tokens, place: str | None) -> Bool[Tensor, "batch pos"]:
    """Return the columns that a place stands for.

    Args:
        tokens: a padded batch.
        place: a span, a number counted in each row's own tokens, or None for every real token.

    Raises:
        DataError: no such span, or rows without such a position.
    """
    if place is None:
        return tokens.mask
    if place.lstrip("-").isdigit():
        number = int(place)
        rank = tokens.mask.long().cumsum(1) - 1
        wanted = tokens.lengths[:, None] + number if number < 0 else torch.full_like(rank[:, :1], number)
        found = tokens.mask & (rank == wanted)
    elif place in tokens.spans:
        found = tokens.spans[place]
    else:
        hint = nearest(place, tokens.spans) or f"the spans are: {', '.join(tokens.spans) or 'none'}"
        raise DataError(f"no span {place!r} in these prompts; {hint}")
    empty = ~found.any(1)
    if bool(empty.any()):
        raise DataError(f"row {int(empty.nonzero()[0, 0])} has no position {place!r}; name one that every row has")
    return found


def check_aligned(clean: Tokens, corrupted: Tokens, places: Iterable[str | None]) -> None:
    """Refuse prompts whose positions do not correspond.

    Args:
        clean, corrupted: both sides of the pairs.
        places: the places that will be asked for.

    Raises:
        DataError: rows of different lengths or paddings, or a place that is elsewhere in the two prompts.
    """
    if clean.mask.shape != corrupted.mask.shape or not torch.equal(clean.mask, corrupted.mask):
        a, b = clean.lengths.tolist(), corrupted.lengths.tolist()
        row = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), 0)
        raise DataError(
            f"the prompts of pair {row} have {a[row]} and {b[row]} tokens, or are padded on different sides, so "
            "positions would not correspond; reword them to one length"
        )
    for place in dict.fromkeys(places):
        sides = [positions(side, place) for side in (clean, corrupted)]
        if not torch.equal(*sides):
            row = int((sides[0] != sides[1]).any(1).nonzero()[0, 0])
            raise DataError(f"place {place!r} is elsewhere in the two prompts of pair {row}; name one that corresponds")
