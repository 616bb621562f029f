"""Circuits that papers have published, as data: to compare a found circuit with.

The files are data/circuits/*.json; `interp.patching.circuits.build_references` holds the facts they are made of.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from interp.core.errors import ArtifactError, DataError, InterpError, nearest
from interp.core.resources import resource
from interp.core.result import Provenance
from interp.patching.circuits.circuit import Circuit
from interp.patching.graph import Graph

__all__ = ["ReferenceCircuit", "reference_circuit", "reference_names"]


@dataclass(frozen=True, eq=False)
class ReferenceCircuit:
    """A published circuit.

    Args:
        name: what it is asked for by, such as "ioi-gpt2".
        title: task and model, in words.
        model: where the model is found on the Hugging Face hub, or its usual name.
        circuit: its edges and the roles of its nodes; some sources name nodes alone, and then it has no edge.
        positions: node → where in the prompt it acts, by the paper's names.
        reported: figures of the papers, not measured again here.
        sources: authors, title and place of each.
        notes: what is convention, and where sources disagree.
        version: of the facts.
    """

    name: str
    title: str
    model: str
    circuit: Circuit
    positions: Mapping[str, tuple[str, ...]]
    reported: Mapping[str, float]
    sources: tuple[Mapping[str, str], ...]
    notes: tuple[str, ...]
    version: int

    @property
    def nodes(self) -> tuple[str, ...]:
        """Its nodes, in the order of their roles."""
        return tuple(self.circuit.roles)

    def role(self, role: str) -> tuple[str, ...]:
        """Return the nodes of one role.

        Raises:
            DataError: no node has it; the message lists the roles.
        """
        roles = self.circuit.roles
        found = tuple(node for node, is_ in roles.items() if is_ == role)
        if not found:
            known = sorted(set(roles.values()))
            raise DataError(f"{self.name} has no role {role!r}; {nearest(role, known) or ', '.join(known)}")
        return found

    def __repr__(self) -> str:
        return f"ReferenceCircuit({self.name!r}: {self.title}; {self.circuit.n_edges} edges, {len(self.nodes)} nodes)"


def reference_names() -> list[str]:
    """Return the names that `reference_circuit` knows."""
    return sorted(path.stem for path in resource("data/circuits").glob("*.json"))


def reference_circuit(name: str) -> ReferenceCircuit:
    """Return a published circuit.

    Args:
        name: one of `reference_names()`: "ioi-gpt2", "ioi-gpt2-naive", "greater-than-gpt2" (as ACDC and AutoCircuit
            list it), "greater-than-gpt2-authors", "docstring-attn-only-4l".

    Raises:
        DataError: another name.
        ArtifactError: its file is damaged.
    """
    known = reference_names()
    if name not in known:
        raise DataError(f"no reference circuit {name!r}; {nearest(name, known) or 'they are ' + ', '.join(known)}")
    path = resource(f"data/circuits/{name}.json")
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        graph = Graph(**{**record["graph"], "mlps": tuple(record["graph"]["mlps"])})
        sources = tuple(record["sources"])
        settings = {"reference": name, "version": record["version"], "sources": [s["where"] for s in sources]}
        circuit = Circuit(
            graph,
            graph.mask(record["edges"]),
            record["title"],
            Provenance(model=record["model"], settings=settings),
            roles={node["name"]: node["role"] for node in record["nodes"]},
        )
        return ReferenceCircuit(
            name=name,
            title=record["title"],
            model=record["model"],
            circuit=circuit,
            positions={node["name"]: tuple(node["positions"]) for node in record["nodes"] if node["positions"]},
            reported=record["reported"],
            sources=sources,
            notes=tuple(record["notes"]),
            version=record["version"],
        )
    except (KeyError, TypeError, ValueError, InterpError) as err:
        raise ArtifactError(f"{path} is damaged ({type(err).__name__}: {err}); reinstall the library") from err
