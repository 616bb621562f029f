"""`Graph`: the computation of a model as senders, receivers and the edges between them, all in arrays.

A sender writes into the residual stream: the embedding, every head, every MLP. A receiver reads from it: the queries,
keys and values of every head, every MLP, the logits. An edge (sender, receiver) exists where the receiver comes later.
Nothing is made per edge: scores, masks and circuits are matrices [sender receiver].

Source: nodes and edges as in Hanna et al. (2024), arXiv 2403.17806, whose names these are ("a3.h1<q>"). Departure:
under grouped queries k and v belong to key/value heads, so a3.h1<k> is key head 1 and not a copy of it for a query
head.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp.core.errors import SiteError, nearest
from interp.core.site import Site

if TYPE_CHECKING:
    from interp.core.manager import HookManager

__all__ = ["Graph", "Node"]

_QKV = ("q", "k", "v")


class Node(NamedTuple):
    """One sender or receiver.

    Attributes:
        name: such as "input", "a3.h1", "m3" (senders), "a3.h1<q>", "m3", "logits" (receivers).
        kind: "input", "head" or "mlp"; "q", "k", "v", "mlp" or "logits".
        layer: its block; −1 for the input, n_layers for the logits.
        head: query head, or key/value head of a "k" or "v"; −1 where it is none.
    """

    name: str
    kind: str
    layer: int
    head: int = -1


@dataclass(frozen=True)
class Graph:
    """The senders, receivers and possible edges of one model.

    Args:
        n_layers, n_heads, n_kv_heads: sizes.
        mlps: for each block, whether it has an MLP.
        parallel: attention and MLP of a block read the same stream, so no edge runs between them.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    mlps: tuple[bool, ...]
    parallel: bool = False

    @classmethod
    def of(cls, hm: "HookManager") -> "Graph":
        """Return the graph of a model."""
        m = hm.map
        mlps = tuple(hm.atlas.has(Site(f"{layer}.mlp_out")) for layer in range(m.n_layers))
        return cls(m.n_layers, m.n_heads, m.n_kv_heads, mlps, m.parallel)

    # -- nodes --------------------------------------------------------------------------------------------------

    @cached_property
    def senders(self) -> tuple[Node, ...]:
        """Senders in the order of the forward pass: input, then each block's heads and MLP."""
        found = [Node("input", "input", -1)]
        for layer, mlp in enumerate(self.mlps):
            found += [Node(f"a{layer}.h{h}", "head", layer, h) for h in range(self.n_heads)]
            found += [Node(f"m{layer}", "mlp", layer)] if mlp else []
        return tuple(found)

    @cached_property
    def receivers(self) -> tuple[Node, ...]:
        """Receivers in the order of the forward pass: each block's q, k and v heads and MLP, then the logits."""
        found: list[Node] = []
        for layer, mlp in enumerate(self.mlps):
            for kind in _QKV:
                heads = self.n_heads if kind == "q" else self.n_kv_heads
                found += [Node(f"a{layer}.h{h}<{kind}>", kind, layer, h) for h in range(heads)]
            found += [Node(f"m{layer}", "mlp", layer)] if mlp else []
        return (*found, Node("logits", "logits", self.n_layers))

    def sender(self, name: str) -> int:
        """Return the row of a sender.

        Raises:
            SiteError: there is none of that name.
        """
        return _find(name, self._sender_rows, "sender")

    def receiver(self, name: str) -> int:
        """Return the column of a receiver.

        Raises:
            SiteError: there is none of that name.
        """
        return _find(name, self._receiver_columns, "receiver")

    def edge(self, name: str) -> tuple[int, int]:
        """Return the row and column of an edge such as "a0.h1->a1.h0<q>".

        Raises:
            SiteError: an unknown sender or receiver, or a receiver that does not come after the sender.
        """
        parts = name.split("->")
        if len(parts) != 2:
            raise SiteError(f"{name!r} is no edge; expected 'sender->receiver', such as 'a0.h1->a1.h0<q>'")
        row, column = self.sender(parts[0].strip()), self.receiver(parts[1].strip())
        if not bool(self.allowed[row, column]):
            raise SiteError(f"no edge {name!r}: {parts[1].strip()} does not read what {parts[0].strip()} writes")
        return row, column

    @cached_property
    def _sender_rows(self) -> dict[str, int]:
        return {node.name: i for i, node in enumerate(self.senders)}

    @cached_property
    def _receiver_columns(self) -> dict[str, int]:
        return {node.name: i for i, node in enumerate(self.receivers)}

    def inputs_of(self, sender: int) -> Int[Tensor, " n"]:
        """Return the receivers that a sender computes its output from; none for the input.

        Args:
            sender: its row.
        """
        node = self.senders[sender]
        if node.kind == "input":
            return torch.zeros(0, dtype=torch.long)
        if node.kind == "mlp":
            return torch.tensor([self.receiver(node.name)])
        group = node.head // (self.n_heads // self.n_kv_heads)
        names = [f"a{node.layer}.h{node.head if kind == 'q' else group}<{kind}>" for kind in _QKV]
        return torch.tensor([self.receiver(name) for name in names])

    @cached_property
    def feeds(self) -> Bool[Tensor, "receiver sender"]:
        """True where a sender computes its output from what a receiver reads; a key head feeds its whole group."""
        found = torch.zeros(len(self.receivers), len(self.senders), dtype=torch.bool)
        for row in range(len(self.senders)):
            found[self.inputs_of(row), row] = True
        return found

    # -- edges --------------------------------------------------------------------------------------------------

    @cached_property
    def allowed(self) -> Bool[Tensor, "sender receiver"]:
        """True where there is an edge."""
        wrote = torch.tensor([_time(node, sender=True) for node in self.senders])
        reads = torch.tensor([_time(node, parallel=self.parallel) for node in self.receivers])
        return wrote[:, None] < reads[None, :]

    @property
    def n_edges(self) -> int:
        """How many edges there are."""
        return int(self.allowed.sum())

    @property
    def n_edges_ungrouped(self) -> int:
        """How many there would be if every query head had its own k and v, as other tools count them."""
        full = Graph(self.n_layers, self.n_heads, self.n_heads, self.mlps, self.parallel)
        return full.n_edges

    def edges(self, mask: Bool[Tensor, "sender receiver"]) -> list[str]:
        """Return the names of the edges of a mask, in the order of the forward pass of their receivers."""
        found = mask.T.nonzero().tolist()
        return [f"{self.senders[row].name}->{self.receivers[column].name}" for column, row in found]

    def mask(self, names: "list[str] | tuple[str, ...]") -> Bool[Tensor, "sender receiver"]:
        """Return the mask of edges given by name.

        Raises:
            SiteError: one of them does not exist.
        """
        found = torch.zeros_like(self.allowed)
        for name in names:
            found[self.edge(name)] = True
        return found


def _time(node: Node, *, sender: bool = False, parallel: bool = False) -> int:
    """When a node writes or reads, in half blocks: attention of block l reads at 4l + 1 and writes at 4l + 2."""
    if node.kind == "input":
        return 0
    if node.kind == "logits":
        return 4 * node.layer + 4
    start = 4 * node.layer + (3 if node.kind == "mlp" and not parallel else 1)
    return start + 1 if sender else start


def _find(name: str, known: dict[str, int], what: str) -> int:
    if name not in known:
        hint = nearest(name, known) or f"they are {', '.join(list(known)[:6])}, …"
        raise SiteError(f"no {what} {name!r}; {hint}")
    return known[name]
