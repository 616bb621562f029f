"""The facts about published circuits, and the files under data/circuits that are made of them.

`python -c "from interp.patching.circuits.build_references import build; build('data/circuits')"` writes them again; a
test holds the files to this module. Heads are layer.head, positions are the papers' own names. Where sources disagree
there are several circuits, and each one's notes say so.

Source: named in each circuit; lists as counted in the cited repositories, typed in from their statements of fact.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from interp.core.disk import atomic_write
from interp.core.errors import ArtifactError
from interp.patching.graph import Graph

__all__ = ["VERSION", "build", "records"]

VERSION = 1
"""Of the facts; raised when one of them changes."""

_GPT2 = Graph(12, 12, 12, (True,) * 12)
_ATTN_4L = Graph(4, 8, 8, (False,) * 4)

_IOI = {
    "name_mover": ("end", "9.9 10.0 9.6"),
    "backup_name_mover": ("end", "10.10 10.6 10.2 10.1 11.2 9.7 9.0 11.9"),
    "negative_name_mover": ("end", "10.7 11.10"),
    "s_inhibition": ("end", "7.3 7.9 8.6 8.10"),
    "induction": ("S2", "5.5 5.8 5.9 6.9"),
    "duplicate_token": ("S2", "0.1 0.10 3.0"),
    "previous_token": ("S1+1", "2.2 4.11"),
}
_IOI_NAIVE = {
    "name_mover": ("end", "9.6 9.9 10.0"),
    "s_inhibition": ("end", "7.3 7.9 8.6 8.10"),
    "induction": ("S2", "5.5 5.9"),
    "duplicate_token": ("S2", "3.0 0.10"),
    "previous_token": ("S1+1", "2.2 4.11"),
}
_WRITERS = ("name_mover", "negative_name_mover", "backup_name_mover")
_IOI_LINKS = [
    ("input", "previous_token", "qkv"),
    ("input", "duplicate_token", "qkv"),
    ("input", "s_inhibition", "q"),
    *(("input", role, "kv") for role in _WRITERS),
    ("previous_token", "induction", "kv"),
    ("induction", "s_inhibition", "kv"),
    ("duplicate_token", "s_inhibition", "kv"),
    *(("s_inhibition", role, "q") for role in _WRITERS),
    *((role, "logits", "") for role in _WRITERS),
]
_EARLY, _MIDDLE = "0.1 0.3 0.5", "5.5 6.1 6.9 7.10 8.11 9.1"
_LATER = "9.1 8.11 8.8 7.10 6.9 5.5 5.1"
_DOCSTRING = {
    "0.2": ["B_doc"],
    "0.4": ["param_3"],
    "0.5": ["B_def", "C_def", "B_doc"],
    "1.2": ["A_doc", "B_doc"],
    "1.4": [",_B"],
    "2.0": ["C_def"],
    "3.0": ["param_3"],
    "3.6": ["param_3"],
}
_DOCSTRING_EDGES = {
    "input": "0.5v 1.2q 1.2k 1.4v 2.0q 2.0k 3.0v 3.6v",
    "0.5": "1.2q 1.2k 1.4v 2.0q 2.0k 3.0v 3.6v",
    "1.4": "2.0v 3.0q 3.6q",
    "2.0": "3.0k 3.6k",
    "1.2": "3.0k 3.6k",
    "3.0": "logits",
    "3.6": "logits",
}
_WANG = {
    "authors": "Wang, Variengien, Conmy, Shlegeris, Steinhardt (2022)",
    "title": "Interpretability in the Wild: a Circuit for Indirect Object Identification in GPT-2 small",
    "where": "arXiv:2211.00593",
}
_HANNA = {
    "authors": "Hanna, Liu, Variengien (2023)",
    "title": "How does GPT-2 compute greater-than?",
    "where": "arXiv:2305.00586",
}
_CONMY = {
    "authors": "Conmy, Mavor-Parker, Lynch, Heimersheim, Garriga-Alonso (2023)",
    "title": "Towards Automated Circuit Discovery for Mechanistic Interpretability",
    "where": "arXiv:2304.14997; code: github.com/ArthurConmy/Automatic-Circuit-Discovery",
}
_MILLER = {
    "authors": "Miller, Chughtai, Saunders (2024)",
    "title": "Transformer Circuit Faithfulness Metrics are not Robust",
    "where": "arXiv:2407.08734; code: github.com/UFO-101/auto-circuit",
}
_HEIMERSHEIM = {
    "authors": "Heimersheim, Janiak (2023)",
    "title": "A circuit for Python docstrings in a 4-layer attention-only transformer",
    "where": "Alignment Forum",
}
_REPORTED = "The reported figures are the papers' own; they were not measured again here."


def records() -> dict[str, dict[str, Any]]:
    """Return every reference circuit as the JSON of its file, by name.

    Raises:
        ArtifactError: a circuit has another number of edges than its sources give it.
    """
    made = [_ioi(), _ioi_naive(), _greater_than(), _greater_than_authors(), _docstring()]
    return {one["name"]: one for one in made}


def build(folder: str | Path) -> list[Path]:
    """Write one JSON file per circuit.

    Args:
        folder: where to; files of these names are replaced.
    """
    found = records().items()
    return [
        atomic_write(Path(folder) / f"{name}.json", json.dumps(one, indent=1, ensure_ascii=False) + "\n")
        for name, one in found
    ]


def _ioi() -> dict[str, Any]:
    return _record(
        "ioi-gpt2",
        "Indirect object identification, GPT-2 small",
        _GPT2,
        nodes=_role_nodes(_IOI),
        edges=_checked("ioi-gpt2", _role_edges(_IOI), 182),
        sources=[_WANG, _CONMY],
        reported={
            "logit_diff_model": 3.56,
            "io_probability_model": 0.49,
            "accuracy_model": 0.993,
            "logit_diff_share_of_circuit": 0.87,
        },
        notes=[
            "182 edges between heads, input and logits, with q, k and v apart. MLPs between two heads belong to the "
            "path by the paper's convention: they are in no edge here, so a circuit of these edges alone is not "
            "faithful under edge ablation. Compare heads with it, or edges between heads (among=…).",
            "Positions: IO, S1, S2 and end are the tokens of the prompt; S1+1 is the one after S1.",
            "The published evaluation knocks heads out at positions, with means over ABC names by template; an edge "
            "evaluation without positions is another question (Miller et al. 2024, arXiv:2407.08734).",
            "AutoCircuit's list reads the position of an edge to the output as a layer, which changes its MLP edges.",
            _REPORTED,
        ],
    )


def _ioi_naive() -> dict[str, Any]:
    return _record(
        "ioi-gpt2-naive",
        "Indirect object identification, GPT-2 small: the naive circuit",
        _GPT2,
        nodes=_role_nodes(_IOI_NAIVE),
        edges=list(_role_edges(_IOI_NAIVE)),
        sources=[_WANG],
        reported={},
        notes=["The paper's minimal list, with the links between the same roles as in ioi-gpt2."],
    )


def _greater_than() -> dict[str, Any]:
    early, middle = _EARLY.split(), _MIDDLE.split()
    first, late = range(4), range(8, 12)
    nodes = [_node(h, "early", []) for h in early] + [_node(f"m{i}", "early_mlp", []) for i in first]
    nodes += [_node(h, "middle", []) for h in middle] + [_node(f"m{i}", "late_mlp", []) for i in late]
    edges = _checked("greater-than-gpt2", _greater_than_edges(early, middle, first, late), 235)
    return _record(
        "greater-than-gpt2",
        "Greater-than, GPT-2 small, as listed by ACDC and AutoCircuit",
        _GPT2,
        nodes=nodes,
        edges=edges,
        sources=[_HANNA, _CONMY, _MILLER],
        reported={"prob_diff_model": 0.817, "prob_diff_circuit": 0.727},
        notes=[
            "235 edges, with q, k and v apart. MLPs 4 to 7 have no role, but edges: from MLP to MLP up to layer 8, and "
            "to the queries of the middle heads.",
            "Sources disagree: this list has head 6.1; the authors' own code has 5.1 and 8.8 instead "
            "(greater-than-gpt2-authors). Report against both.",
            'Prompt: "The {noun} lasted from the year 17YY to the year 17"; corrupted: YY becomes 01.',
            _REPORTED,
        ],
    )


def _greater_than_edges(early: Sequence[str], middle: Sequence[str], first: range, late: range) -> Iterator[str]:
    for head in early:
        yield from _into("input", head, "qkv")
    yield from (f"input->m{i}" for i in first)
    yield from (f"{_head('0.1')}->m{i}" for i in first)
    for head in middle:
        for sender in (*(_head(h) for h in early), *(f"m{i}" for i in first)):
            yield from _into(sender, head, "qkv")
        yield from (f"{_head(head)}->m{i}" for i in late if i >= _layer(head))
        # Every MLP before a head reaches its queries.
        for i in range(_layer(head)):
            yield from _into(f"m{i}", head, "q")
        yield f"{_head(head)}->logits"
    for group in (first, late, range(9)):
        yield from (f"m{i}->m{j}" for i in group for j in group if i < j)
    yield from (f"m{i}->logits" for i in late)


def _greater_than_authors() -> dict[str, Any]:
    return _record(
        "greater-than-gpt2-authors",
        "Greater-than, GPT-2 small: the heads of the authors' code",
        _GPT2,
        nodes=[_node(head, "attends_to_start_year", []) for head in _LATER.split()],
        edges=[],
        sources=[_HANNA],
        reported={"prob_diff_model": 0.817, "prob_diff_circuit": 0.727},
        notes=[
            "Heads alone; the code names no edges. ACDC and AutoCircuit have 6.1 instead of 5.1 and 8.8 "
            "(greater-than-gpt2).",
            _REPORTED,
        ],
    )


def _docstring() -> dict[str, Any]:
    listed = {sender: targets.split() for sender, targets in _DOCSTRING_EDGES.items()}
    edges = [e for sender, targets in listed.items() for t in targets for e in _docstring_edge(sender, t)]
    in_edges = {s for s in listed if s != "input"}
    nodes = [
        _node(head, "circuit" if head in in_edges else "listed_without_edge", where)
        for head, where in _DOCSTRING.items()
    ]
    nodes += [_node(head, "extra", []) for head in ("1.0", "0.1", "2.3")]
    return _record(
        "docstring-attn-only-4l",
        "Docstring completion, attn-only-4l (trained on C4 and code)",
        _ATTN_4L,
        nodes=nodes,
        edges=_checked("docstring-attn-only-4l", edges, 24),
        sources=[_HEIMERSHEIM, _CONMY, _MILLER],
        reported={"accuracy_model": 0.75, "accuracy_circuit": 0.42, "accuracy_circuit_with_extras": 0.58},
        notes=[
            "24 edges, as AutoCircuit counts them; ACDC's 37 add the placeholders from q, k and v to their head.",
            "0.2 and 0.4 are in the post's list of heads and in no edge; 1.0, 0.1 and 2.3 are its extras.",
            _REPORTED,
        ],
    )


def _record(
    name: str,
    title: str,
    graph: Graph,
    *,
    nodes: list[dict[str, Any]],
    edges: Sequence[str],
    sources: Sequence[Mapping[str, str]],
    reported: Mapping[str, float],
    notes: Sequence[str],
) -> dict[str, Any]:
    graph.mask(list(edges))  # every edge exists
    sizes = {"n_layers": graph.n_layers, "n_heads": graph.n_heads, "n_kv_heads": graph.n_kv_heads}
    return {
        "kind": "interp.ReferenceCircuit",
        "format": 1,
        "version": VERSION,
        "name": name,
        "title": title,
        "model": "gpt2" if graph is _GPT2 else "NeelNanda/Attn_Only_4L512W_C4_Code",
        "graph": {**sizes, "mlps": list(graph.mlps), "parallel": graph.parallel},
        "nodes": nodes,
        "edges": sorted(edges, key=lambda e: (graph.edge(e)[1], graph.edge(e)[0])),
        "reported": dict(reported),
        "sources": [dict(s) for s in sources],
        "notes": list(notes),
    }


def _checked(name: str, edges: "Iterator[str] | Sequence[str]", n: int) -> list[str]:
    found = list(dict.fromkeys(edges))
    if len(found) != n:
        raise ArtifactError(f"{name} has {len(found)} edges here and {n} in its sources; correct the facts")
    return found


def _role_nodes(roles: Mapping[str, tuple[str, str]]) -> list[dict[str, Any]]:
    return [_node(h, role, [where]) for role, (where, heads) in roles.items() for h in heads.split()]


def _role_edges(roles: Mapping[str, tuple[str, str]]) -> Iterator[str]:
    for source, target, kinds in _IOI_LINKS:
        senders = ["input"] if source == "input" else [_head(h) for h in _of(roles, source)]
        for sender in senders:
            if target == "logits":
                yield f"{sender}->logits"
            for head in _of(roles, target):
                yield from _into(sender, head, kinds)


def _of(roles: Mapping[str, tuple[str, str]], role: str) -> list[str]:
    return roles[role][1].split() if role in roles else []


def _docstring_edge(sender: str, target: str) -> Iterator[str]:
    name = sender if sender == "input" else _head(sender)
    if target == "logits":
        yield f"{name}->logits"
    else:
        yield from _into(name, target[:-1], target[-1])


def _into(sender: str, head: str, kinds: str) -> Iterator[str]:
    return (f"{sender}->{_head(head)}<{kind}>" for kind in kinds)


def _node(name: str, role: str, positions: list[str]) -> dict[str, Any]:
    return {"name": name if name.startswith("m") else _head(name), "role": role, "positions": positions}


def _head(text: str) -> str:
    """ "9.6" → "a9.h6"."""
    layer, head = text.split(".")
    return f"a{layer}.h{head}"


def _layer(head: str) -> int:
    return int(head.split(".")[0])
