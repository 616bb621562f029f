"""Paths into a transcoder's latent: pulled back greedily, with everything that is left out counted.

Source: Dunefsky et al. (2024), arXiv 2406.11944, §4.3 (greedy computational-path finding) and appendix E. Departure:
what is pruned, errors and biases stay in the tree as numbers, so that each node equals the sum of what is under it.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.errors import DataError
from interp.core.result import Provenance, Result, token_names
from interp.dictionaries.base import Transcoder
from interp.patching.features.freeze import freeze
from interp.patching.features.frozen import FrozenModel
from interp.patching.features.pullback import PATH_KINDS, Reader, bias_of, parts_of, pullback, reader_of
from interp.patching.features.transcoder_circuits import check_target

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

    from interp.core.manager import HookManager

__all__ = ["PathTree", "find_paths", "paths_of"]

_OPEN = PATH_KINDS[:3]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class PathTree(Result):
    """A tree of what makes a latent active; node 0 is the latent, a node's parent comes before it.

    Attributes:
        target: (layer, latent, pos).
        parent: of each node; −1 of the first.
        kind: index into `kinds`.
        layer, index, pos: block, latent or head (else −1), and position; a head's is where it looks.
        contribution: what each adds to the target's pre-activation, along its path. That of an expanded node is the sum
            of its children's, `pruned` and `bias`.
        expanded: whether it was pulled back further.
        pruned: of an expanded node, what was found under it and not kept.
        bias: of an expanded node, what biases add.
        tokens: text of each position.
    """

    title: ClassVar[str] = "Paths into a transcoder's latent"
    kinds: ClassVar[tuple[str, ...]] = PATH_KINDS
    target: tuple[int, int, int]
    parent: Int[Tensor, " node"]
    kind: Int[Tensor, " node"]
    layer: Int[Tensor, " node"]
    index: Int[Tensor, " node"]
    pos: Int[Tensor, " node"]
    contribution: Float[Tensor, " node"]
    expanded: Bool[Tensor, " node"]
    pruned: Float[Tensor, " node"]
    bias: Float[Tensor, " node"]
    tokens: list[str]

    def label(self, node: int) -> str:
        """Return what a node is, such as "L1 latent 7 @3"."""
        kind, layer, index, pos = (int(x[node]) for x in (self.kind, self.layer, self.index, self.pos))
        name = PATH_KINDS[kind]
        if name == "head":
            return f"L{layer}H{index} @{pos}"
        return f"{name} @{pos}" if layer < 0 else f"L{layer} {name}{f' {index}' if index >= 0 else ''} @{pos}"

    def leaves(self) -> list[int]:
        """Return the nodes without children, the largest contribution first."""
        inner = set(self.parent.tolist())
        order = self.contribution.abs().argsort(descending=True, stable=True).tolist()
        return [node for node in order if node not in inner]

    def path(self, node: int) -> list[int]:
        """Return the nodes from one to the target."""
        found = [node]
        while int(self.parent[found[-1]]) >= 0:
            found.append(int(self.parent[found[-1]]))
        return found

    def edges(self) -> "pandas.DataFrame":
        """Return the tree as a graph: nodes that are the same thing on several paths are one, their edges summed."""
        import pandas as pd

        total: dict[tuple[str, str], float] = defaultdict(float)
        for node, parent in enumerate(self.parent.tolist()):
            if parent >= 0:
                total[self.label(node), self.label(parent)] += float(self.contribution[node])
        rows = [{"source": a, "target": b, "weight": w} for (a, b), w in total.items()]
        rows.sort(key=lambda row: -abs(float(row["weight"])))  # type: ignore[arg-type]
        return pd.DataFrame(rows, columns=["source", "target", "weight"])

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per path, from its source to the target."""
        import pandas as pd

        rows = [
            {
                "path": " → ".join(self.label(n) for n in self.path(node)),
                "source": self.label(node),
                "token": self.tokens[int(self.pos[node])],
                "contribution": float(self.contribution[node]),
                "steps": len(self.path(node)) - 1,
            }
            for node in self.leaves()
        ]
        return pd.DataFrame(rows)

    def plot(self) -> "plotly.graph_objects.Figure":
        """Draw the contributions of the strongest paths."""
        from interp.report.figures import Axis, bars

        shown = self.leaves()[:20]
        names = [" → ".join(self.label(n) for n in self.path(node)[:-1]) for node in shown]
        title = f"Paths into {self.label(0)}"
        return bars(self.contribution[shown], labels=Axis("", names), title=title, value="added to the pre-activation")

    def summary(self) -> str:
        """Give the strongest paths, and what was pruned or is of biases."""
        lines = [f"{self.label(0)} {self.tokens[self.target[2]]!r}: pre-activation {float(self.contribution[0]):.4g}"]
        for node in self.leaves()[:5]:
            way = " → ".join(self.label(n) for n in self.path(node))
            lines.append(f"{float(self.contribution[node]):+.4g} {way} {self.tokens[int(self.pos[node])]!r}")
        lines.append(
            f"{len(self.parent)} nodes; pruned {float(self.pruned.sum()):+.4g}, biases {float(self.bias.sum()):+.4g}"
        )
        return "\n".join(lines)


def find_paths(
    hm: "HookManager",
    transcoders: Mapping[int, Transcoder],
    tokens: Any,
    *,
    target: tuple[int, int, int],
    depth: int = 3,
    branches: int = 5,
    width: int = 20,
) -> PathTree:
    """Find the paths that make a latent active, by pulling back its strongest sources again and again.

    Args:
        hm: the model.
        transcoders: layer → transcoder of its MLP.
        tokens: one prompt.
        target: (layer, latent, pos).
        depth: how often to pull back.
        branches: parts kept of each node.
        width: parts kept at each step, of all nodes together.

    Raises:
        DataError: several prompts, no such target, or numbers below 1.
        ConfigError, ModelError: as for `pre_activation_attribution`.

    Source: Dunefsky et al. (2024), §4.3. Departure: errors, pruned parts and biases are kept as numbers.
    """
    return paths_of(freeze(hm, transcoders, tokens), target, depth=depth, branches=branches, width=width)


def paths_of(
    frozen: FrozenModel, target: tuple[int, int, int], *, depth: int = 3, branches: int = 5, width: int = 20
) -> PathTree:
    """Find the same on a prompt that is frozen already; arguments as for `find_paths`."""
    if min(depth, branches, width) < 1:
        raise DataError(f"depth={depth}, branches={branches}, width={width}: each must be 1 or more")
    layer, latent, pos = check_target(frozen, target)
    root = reader_of(frozen, layer, latent, pos)
    rows = [_Node(-1, "latent", layer, latent, pos, float(root.value(frozen)), root)]
    frontier = [0]
    with torch.no_grad():
        for _ in range(depth):
            found = [part for node in frontier for part in _expand(frozen, rows, node, branches)]
            found.sort(key=lambda row: -abs(row.value))
            for cut in found[width:]:
                rows[cut.parent].pruned += cut.value
            frontier = []
            for row in found[:width]:
                if row.kind in _OPEN:
                    row.reader = _pulled(frozen, rows[row.parent], row)
                    frontier.append(len(rows))
                rows.append(row)
    return PathTree(
        provenance=Provenance.of(
            frozen.hm,
            settings={"target": [layer, latent, pos], "depth": depth, "branches": branches, "width": width},
            data=(frozen.ids,),
        ),
        target=(layer, latent, pos),
        parent=torch.tensor([r.parent for r in rows]),
        kind=torch.tensor([PATH_KINDS.index(r.kind) for r in rows]),
        layer=torch.tensor([r.layer for r in rows]),
        index=torch.tensor([r.index for r in rows]),
        pos=torch.tensor([r.pos for r in rows]),
        contribution=torch.tensor([r.value for r in rows]),
        expanded=torch.tensor([r.expanded for r in rows]),
        pruned=torch.tensor([r.pruned for r in rows]),
        bias=torch.tensor([r.bias for r in rows]),
        tokens=token_names(frozen.hm, frozen.ids),
    )


@dataclass
class _Node:
    """A node of the tree while it grows."""

    parent: int
    kind: str
    layer: int
    index: int
    pos: int
    value: float
    reader: Reader | None = None
    expanded: bool = False
    pruned: float = 0.0
    bias: float = 0.0


def _expand(frozen: FrozenModel, rows: list[_Node], node: int, branches: int) -> list[_Node]:
    """The largest parts of a node; what is not among them is counted as pruned."""
    reader = rows[node].reader
    assert reader is not None
    parts = list(parts_of(frozen, reader))
    values = torch.cat([part.value for part in parts])
    index, pos = torch.cat([part.index for part in parts]).tolist(), torch.cat([part.pos for part in parts]).tolist()
    owner = [part for part in parts for _ in range(len(part.value))]
    best = values.abs().topk(min(branches, len(values))).indices
    rows[node].expanded, rows[node].bias = True, float(bias_of(frozen, reader))
    rows[node].pruned = float(values.sum() - values[best].sum())
    kept = zip(best.tolist(), values[best].tolist(), strict=True)
    return [_Node(node, owner[i].kind, owner[i].layer, index[i], pos[i], value) for i, value in kept]


def _pulled(frozen: FrozenModel, parent: _Node, row: _Node) -> Reader:
    assert parent.reader is not None
    return pullback(frozen, parent.reader, through=(row.kind, row.layer, row.index), pos=row.pos)
