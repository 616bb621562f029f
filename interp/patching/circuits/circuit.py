"""`Circuit`: some of the edges of a model's graph, with what can be said of them without running the model.

A circuit is a matrix [sender receiver] of True and False; its nodes follow from its edges. `circuit | other`, `&`, `-`
and `^` are sets of edges; `~circuit` is the rest of the model. Files: `save` and `load` (this library's JSON),
`interp.patching.circuits.circuit_files` (EAP-IG's JSON, GraphML).

Source: circuits as edges, and what pruning takes away, as in Hanna et al. (2024), arXiv 2403.17806, §2.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.core.disk import atomic_write
from interp.core.errors import ArtifactError, DataError, InterpError, ShapeError, SiteError, nearest
from interp.core.result import Provenance
from interp.patching.graph import Graph

if TYPE_CHECKING:
    import pandas

__all__ = ["FORMAT", "Circuit", "reachable"]

FORMAT = 1
_KIND = "interp.Circuit"


@dataclass(frozen=True, eq=False)
class Circuit:
    """A set of edges of a model's graph.

    Args:
        graph: the graph.
        edges: True where an edge is in the circuit.
        name: what results and pages call it.
        provenance: where it came from; None where nobody said.
        scores: a number per edge, in whatever unit the method that chose them has; None without.
        roles: node → what it is said to do, such as "a9.h9" → "name_mover".

    Raises:
        ShapeError: a matrix that is not [sender receiver] of this graph.
        SiteError: an edge that the graph does not have, or a role of a node that it does not have.
    """

    graph: Graph
    edges: Bool[Tensor, "sender receiver"]
    name: str = "circuit"
    provenance: Provenance | None = None
    scores: Float[Tensor, "sender receiver"] | None = None
    roles: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (len(self.graph.senders), len(self.graph.receivers))
        for what, matrix in (("edges", self.edges), ("scores", self.scores)):
            if matrix is not None and tuple(matrix.shape) != shape:
                raise ShapeError(f"{what} {tuple(matrix.shape)}: this graph has [sender receiver] = {list(shape)}")
        if self.edges.dtype != torch.bool:
            raise ShapeError(f"edges are {self.edges.dtype}: expected True where an edge is in the circuit")
        object.__setattr__(self, "edges", self.edges.detach().cpu())
        if self.scores is not None:
            object.__setattr__(self, "scores", self.scores.detach().cpu())
        wrong = (self.edges & ~self.graph.allowed).nonzero()
        if len(wrong):
            sender, receiver = self.graph.senders[int(wrong[0, 0])], self.graph.receivers[int(wrong[0, 1])]
            raise SiteError(f"{sender.name}->{receiver.name} is no edge: {receiver.name} is read before it is written")
        for node in self.roles:
            if node not in self._known:
                raise SiteError(f"a role for {node!r}, which is no node; {nearest(node, self._known) or 'see graph'}")

    # -- making one ---------------------------------------------------------------------------------------------

    @classmethod
    def of(cls, graph: Graph, names: Iterable[str], *, name: str = "circuit") -> "Circuit":
        """Return the circuit of some edges.

        Args:
            graph: the graph.
            names: edges such as "a0.h1->a1.h0<q>".
            name: what to call it.

        Raises:
            SiteError: one of them does not exist.
        """
        return cls(graph, graph.mask(list(names)), name)

    @classmethod
    def of_nodes(cls, graph: Graph, nodes: Iterable[str], *, name: str = "circuit") -> "Circuit":
        """Return every edge between some nodes; the input and the logits are always among them.

        Args:
            graph: the graph.
            nodes: nodes such as "a0.h1" and "m3".
            name: what to call it.

        Raises:
            SiteError: one of them does not exist.
        """
        kept = torch.zeros(len(graph.senders), dtype=torch.bool)
        kept[0] = True
        for node in nodes:
            if node not in ("input", "logits"):
                kept[graph.sender(node)] = True
        reads = (graph.feeds & kept).any(1)
        reads[-1] = True
        return cls(graph, graph.allowed & kept[:, None] & reads[None, :], name)

    @classmethod
    def full(cls, graph: Graph) -> "Circuit":
        """Return the circuit of every edge: the whole model."""
        return cls(graph, graph.allowed.clone(), "whole model")

    @classmethod
    def empty(cls, graph: Graph) -> "Circuit":
        """Return the circuit without an edge."""
        return cls(graph, torch.zeros_like(graph.allowed), "no edge")

    # -- what is in it ------------------------------------------------------------------------------------------

    @property
    def n_edges(self) -> int:
        """How many edges it has."""
        return int(self.edges.sum())

    @property
    def share(self) -> float:
        """How many of the graph's edges it has, 0 to 1."""
        return self.n_edges / self.graph.n_edges

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        """The nodes that an edge of it touches, in the order of the forward pass; the input and the logits too."""
        sends = self.edges.any(1) | (self.graph.feeds & self.edges.any(0)[:, None]).any(0)
        found = [node.name for node, on in zip(self.graph.senders, sends.tolist(), strict=True) if on]
        return (*found, "logits") if bool(self.edges[:, -1].any()) else tuple(found)

    @cached_property
    def heads(self) -> tuple[tuple[int, int], ...]:
        """The heads among its nodes, as (layer, head)."""
        chosen = set(self.nodes)
        return tuple((n.layer, n.head) for n in self.graph.senders if n.kind == "head" and n.name in chosen)

    def names(self) -> list[str]:
        """Return the names of its edges, in the order of the forward pass of their receivers."""
        return self.graph.edges(self.edges)

    def __contains__(self, edge: object) -> bool:
        return isinstance(edge, str) and bool(self.edges[self.graph.edge(edge)])

    def pruned(self) -> "Circuit":
        """Return it without dead ends: the edges that lie on no path from the input to the logits."""
        return replace(self, edges=reachable(self.graph, self.edges))

    def without(self, nodes: Iterable[str]) -> "Circuit":
        """Return it without the edges into and out of some nodes.

        Args:
            nodes: nodes such as "a9.h9"; under grouped queries a key head goes with the last head of its group.

        Raises:
            SiteError: one of them does not exist.
        """
        gone = torch.zeros(len(self.graph.senders), dtype=torch.bool)
        for node in nodes:
            gone[self.graph.sender(node)] = True
        feeds = self.graph.feeds
        idle = feeds.any(1) & ~(feeds & ~gone).any(1)
        return replace(self, edges=self.edges & ~gone[:, None] & ~idle[None, :])

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per edge: sender, receiver, where they are, the score and the roles, where there are any."""
        import pandas as pd

        rows = []
        for column, row in self.edges.T.nonzero().tolist():
            sender, receiver = self.graph.senders[row], self.graph.receivers[column]
            target = receiver.name.partition("<")[0]
            one = {"edge": f"{sender.name}->{receiver.name}", "sender": sender.name, "receiver": receiver.name}
            one |= {"sender_layer": sender.layer, "receiver_layer": receiver.layer, "reads": receiver.kind}
            one |= {"score": float("nan") if self.scores is None else float(self.scores[row, column])}
            rows.append(one | {"sender_role": self.roles.get(sender.name, ""), "role": self.roles.get(target, "")})
        columns = ["edge", "sender", "receiver", "sender_layer", "receiver_layer", "reads", "score", "sender_role"]
        return pd.DataFrame(rows, columns=[*columns, "role"])

    def __repr__(self) -> str:
        return f"Circuit({self.name!r}: {self.n_edges:,} of {self.graph.n_edges:,} edges, {len(self.nodes)} nodes)"

    # -- as a set of edges --------------------------------------------------------------------------------------

    def __or__(self, other: "Circuit") -> "Circuit":
        return self._with(other, torch.logical_or, "|")

    def __and__(self, other: "Circuit") -> "Circuit":
        return self._with(other, torch.logical_and, "&")

    def __sub__(self, other: "Circuit") -> "Circuit":
        return self._with(other, lambda a, b: a & ~b, "−")

    def __xor__(self, other: "Circuit") -> "Circuit":
        return self._with(other, torch.logical_xor, "^")

    def __invert__(self) -> "Circuit":
        return replace(self, edges=self.graph.allowed & ~self.edges, name=f"all but {self.name}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Circuit) and self.graph == other.graph and torch.equal(self.edges, other.edges)

    def __hash__(self) -> int:
        return hash((self.graph, self.edges.numpy().tobytes()))

    def __le__(self, other: "Circuit") -> bool:
        return not (self - other).n_edges

    def _with(self, other: "Circuit", how: Callable[[Tensor, Tensor], Tensor], sign: str) -> "Circuit":
        if not isinstance(other, Circuit):
            return NotImplemented
        if self.graph != other.graph:
            raise DataError(f"{self.name!r} and {other.name!r} are circuits of models of different shapes")
        both = {**other.roles, **self.roles}
        return replace(self, edges=how(self.edges, other.edges), name=f"{self.name} {sign} {other.name}", roles=both)

    @cached_property
    def _known(self) -> set[str]:
        return {node.name for node in self.graph.senders} | {"logits"}

    # -- on disk ------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON: sizes of the graph, names of the edges with their scores, roles, provenance."""
        scores = self.scores
        at = self.edges.T.nonzero().tolist()
        return {
            "kind": _KIND,
            "format": FORMAT,
            "name": self.name,
            "graph": {**asdict(self.graph), "mlps": list(self.graph.mlps)},
            "edges": self.names(),
            "scores": None if scores is None else [_number(float(scores[row, column])) for column, row in at],
            "roles": dict(self.roles),
            "provenance": None if self.provenance is None else asdict(self.provenance),
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any], *, source: str = "this record") -> "Circuit":
        """Return the circuit of what `to_dict` made; edges outside it have no score (NaN).

        Raises:
            ArtifactError: it is of another kind or format, or damaged.
        """
        if record.get("kind") != _KIND:
            raise ArtifactError(f"{source} is no circuit (its kind is not {_KIND!r}); give what Circuit.save wrote")
        if record.get("format") != FORMAT:
            raise ArtifactError(f"{source} has format {record.get('format')!r} and this version reads {FORMAT}")
        try:
            graph = Graph(**{**record["graph"], "mlps": tuple(record["graph"]["mlps"])})
            where = [graph.edge(name) for name in record["edges"]]
            edges, scores = torch.zeros_like(graph.allowed), None
            for place in where:
                edges[place] = True
            if record["scores"] is not None:
                scores = torch.full(edges.shape, torch.nan)
                for place, value in zip(where, record["scores"], strict=True):
                    scores[place] = torch.nan if value is None else float(value)
            origin = None if record["provenance"] is None else Provenance(**record["provenance"])
            return cls(graph, edges, record["name"], origin, scores, dict(record["roles"]))
        except (KeyError, TypeError, ValueError, InterpError) as err:
            raise ArtifactError(f"{source} is damaged ({type(err).__name__}: {err}); save the circuit again") from err

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write it as one JSON file, with the scores of its edges; it appears complete or not at all.

        Args:
            path: the file.
            overwrite: replace a file that is there.

        Raises:
            ArtifactError: a file is there.
        """
        if Path(path).exists() and not overwrite:
            raise ArtifactError(f"{path} is there already; pass overwrite=True to replace it, or choose another path")
        return atomic_write(path, json.dumps(self.to_dict(), ensure_ascii=False, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Circuit":
        """Read what `save` wrote.

        Raises:
            ArtifactError: no such file, a damaged one, or one of another kind.
        """
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as err:
            raise ArtifactError(f"{path} cannot be read as JSON ({err}); give the file that save() wrote") from err
        if not isinstance(record, dict):
            raise ArtifactError(f"{path} is no circuit; give the file that save() wrote")
        return cls.from_dict(record, source=str(path))


def reachable(graph: Graph, edges: Bool[Tensor, "sender receiver"]) -> Bool[Tensor, "sender receiver"]:
    """Return the edges that lie on a path from the input to the logits.

    A head is on a path when one of its q, k and v is, as in EAP-IG.

    Args:
        graph: the graph.
        edges: the edges; on any device.
    """
    feeds = graph.feeds.to(edges.device)
    alive = torch.zeros(len(graph.senders), dtype=torch.bool, device=edges.device)
    alive[0] = True
    useful = torch.zeros(len(graph.receivers), dtype=torch.bool, device=edges.device)
    useful[-1] = True
    while True:  # once per layer of the longest path, at most
        reads = (edges & alive[:, None]).any(0)
        grown = alive | (feeds & reads[:, None]).any(0)
        if torch.equal(grown, alive):
            break
        alive = grown
    while True:
        sends = (edges & useful[None, :]).any(1)
        grown = useful | (feeds & sends[None, :]).any(1)
        if torch.equal(grown, useful):
            break
        useful = grown
    return edges & alive[:, None] & useful[None, :]


def _number(value: float) -> float | None:
    return value if value == value and abs(value) != float("inf") else None
