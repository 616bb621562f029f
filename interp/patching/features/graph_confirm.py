"""Does the model do what its attribution graph says: take features out, one at a time, and look at the logits.

Source: Ameisen et al. (2025), "Circuit Tracing", on interventions; zero ablation of a feature. Departure: the same
feature is taken out with everything held (which must give the graph's own number), with attention patterns held, and
with nothing held; beside each stand other active features of its layer.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.errors import DataError
from interp.core.intervention import Edit, FreezePattern, FreezeScale, Intervention
from interp.core.readout import Readout
from interp.core.result import Provenance, Result
from interp.core.site import Site
from interp.dictionaries.base import Transcoder
from interp.patching.features.attribution_graph import AttributionGraph
from interp.patching.features.freeze import freeze
from interp.patching.features.frozen import FrozenModel, FrozenTranscoder

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

    from interp.core.manager import HookManager
    from interp.core.run import Run

__all__ = ["Confirmation", "confirm", "predicted_effects"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Confirmation(Result):
    """What taking features out does to the logits, as the graph says and as the model does.

    Effects are changes: with the feature − without it, in logits.

    Attributes:
        labels: of each feature.
        feature: its number in the graph.
        control: whether it is a control: another active feature of the layer of one that was asked for.
        names: of the logits.
        direct: what the graph's edges to the logits say.
        total: what all ways through the graph say, active features answering linearly.
        held: in the model, with patterns, σ and all MLPs held; equal to `direct`.
        attention_held: in the model, with patterns held and MLPs free.
        free: in the model, with nothing held.
    """

    title: ClassVar[str] = "Features taken out"
    labels: list[str]
    feature: Int[Tensor, " row"]
    control: Bool[Tensor, " row"]
    names: list[str]
    direct: Float[Tensor, "row logit"]
    total: Float[Tensor, "row logit"]
    held: Float[Tensor, "row logit"]
    attention_held: Float[Tensor, "row logit"]
    free: Float[Tensor, "row logit"]

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per feature and logit."""
        import pandas as pd

        kinds = ("direct", "total", "held", "attention_held", "free")
        rows = [
            {
                "feature": label,
                "control": bool(self.control[i]),
                "logit": name,
                **{kind: float(getattr(self, kind)[i, k]) for kind in kinds},
            }
            for i, label in enumerate(self.labels)
            for k, name in enumerate(self.names)
        ]
        return pd.DataFrame(rows)

    def plot(self) -> "plotly.graph_objects.Figure":
        """Draw what the graph says and what the model does, for the first logit."""
        from interp.report.figures import Axis, heatmap

        kinds = {
            "graph, direct": self.direct,
            "graph, all ways": self.total,
            "model, attention held": self.attention_held,
        }
        kinds["model, free"] = self.free
        names = [f"control: {n}" if c else n for n, c in zip(self.labels, self.control.tolist(), strict=True)]
        return heatmap(
            torch.stack([values[:, 0] for values in kinds.values()]).T.flip(0),
            rows=Axis("", names[::-1]),
            columns=Axis("", list(kinds)),
            title=f"What each feature adds to {self.names[0]!r}",
            value="logits",
            diverging=True,
        )

    def summary(self) -> str:
        """Say what each feature does to the first logit, and what controls do."""
        lines = [f"{self.names[0]!r}: what taking a feature out takes away (graph, all ways / model, attention held)"]
        mine = (~self.control).nonzero()[:, 0].tolist()
        for i in mine[:8]:
            lines.append(f"{float(self.total[i, 0]):+.3f} / {float(self.attention_held[i, 0]):+.3f} {self.labels[i]}")
        if bool(self.control.any()):
            size = float(self.attention_held[self.control][:, 0].abs().mean())
            asked = float(self.attention_held[~self.control][:, 0].abs().mean())
            lines.append(
                f"mean size {asked:.3f}; of {int(self.control.sum())} other features of their layers {size:.3f}"
            )
        return "\n".join(lines)


def confirm(
    hm: "HookManager",
    transcoders: Mapping[int, Transcoder],
    graph: AttributionGraph,
    features: Sequence[int] | int = 5,
    *,
    controls: int = 0,
    seed: int = 0,
    batch_size: int = 16,
) -> Confirmation:
    """Take features of a graph out of the model, one at a time, and compare with what the graph says.

    A feature is taken out by taking its activation times its decoder row off what its MLP writes at its position.
    Memory: that of a forward of `batch_size` copies of the prompt, with its patterns. Cost: three such forwards for
    each batch.

    Args:
        hm: the model.
        transcoders: those that the graph was made with.
        graph: the graph.
        features: numbers in the graph (see `AttributionGraph.find`); or how many of the most influential ones.
        controls: for each of them, so many other features of its layer, drawn.
        seed: of the draw.
        batch_size: features taken out in one forward.

    Raises:
        DataError: features that are not there, or a graph of another model or other transcoders.
    """
    chosen, control = _chosen(graph, features, controls, seed)
    frozen = freeze(hm, transcoders, graph.ids)
    values = _values_now(frozen, graph, chosen)
    direct, total = predicted_effects(graph, chosen)
    parts = [_measured(frozen, graph, rows, values[i]) for i, rows in _batches(chosen, batch_size)]
    held, attention_held, free = (torch.cat(part) for part in zip(*parts, strict=True))
    return Confirmation(
        provenance=Provenance.of(
            hm, settings={"features": chosen.tolist(), "controls": controls}, data=(graph.ids,), seed=seed
        ),
        labels=[graph.source_label(i) for i in chosen.tolist()],
        feature=chosen,
        control=control,
        names=list(graph.target_names),
        direct=direct,
        total=total,
        held=held,
        attention_held=attention_held,
        free=free,
    )


def predicted_effects(
    graph: AttributionGraph, features: Int[Tensor, " row"]
) -> tuple[Float[Tensor, "row logit"], Float[Tensor, "row logit"]]:
    """Return what each feature adds to the logits: directly, and by all ways through the graph.

    On a way, a feature that gets a share more or less passes that share on, as it does while it is active.

    Args:
        graph: the graph.
        features: which.
    """
    n = graph.n_features
    edges = graph.adjacency[:, :n]
    passed = edges[:n] / graph.value[:n].clamp_min(1e-10)  # per unit of the source
    direct = edges[n:, features].T
    # What is gone from each feature, over ways of every length.
    gone = edges[:n, features].T
    step = gone
    for _ in range(graph.n_layers + 1):
        step = step @ passed.T
        gone = gone + step
    return direct, direct + gone @ (edges[n:] / graph.value[:n].clamp_min(1e-10)).T


def _chosen(
    graph: AttributionGraph, features: Any, controls: int, seed: int
) -> tuple[Int[Tensor, " row"], Bool[Tensor, " row"]]:
    n = graph.n_features
    if isinstance(features, int) and not isinstance(features, bool):
        if not 1 <= features <= n:
            raise DataError(f"features={features}: this graph has {n} features")
        asked = graph.influence[:n].topk(features).indices.tolist()
    else:
        asked = [int(i) for i in features]
        if not asked or not all(0 <= i < n for i in asked):
            raise DataError(f"features={asked[:8]}: expected numbers from 0 to {n - 1}")
    generator = torch.Generator().manual_seed(seed)
    drawn: list[int] = []
    for i in asked:
        others = [j for j in (graph.layer == graph.layer[i]).nonzero()[:, 0].tolist() if j not in (*asked, *drawn)]
        drawn += [others[k] for k in torch.randperm(len(others), generator=generator)[:controls].tolist()]
    return torch.tensor(asked + drawn), torch.tensor([False] * len(asked) + [True] * len(drawn))


def _batches(chosen: Int[Tensor, " row"], size: int) -> list[tuple[slice, Tensor]]:
    return [(slice(i, i + size), chosen[i : i + size]) for i in range(0, len(chosen), max(1, size))]


def _values_now(frozen: FrozenModel, graph: AttributionGraph, chosen: Tensor) -> Float[Tensor, "row d_model"]:
    """What each feature writes; refuses a graph that was made of something else."""
    rows = []
    for i in chosen.tolist():
        layer, pos, latent = int(graph.layer[i]), int(graph.pos[i]), int(graph.latent[i])
        held = frozen.transcoders.get(layer)
        now = None if held is None else held.value[held.at(pos)][held.latent[held.at(pos)] == latent]
        if (
            held is None
            or now is None
            or len(now) != 1
            or abs(float(now[0]) - float(graph.value[i])) > 1e-3 * max(1.0, abs(float(graph.value[i])))
        ):
            raise DataError(f"{graph.source_label(i)} is not what it was; give the model and transcoders of the graph")
        rows.append(held.writes(torch.tensor([latent], device=held.pos.device))[0] * now[0])
    return torch.stack(rows)


def _measured(
    frozen: FrozenModel, graph: AttributionGraph, rows: Tensor, writes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Changes of the logits with everything held, with attention held, with nothing held: [row logit] each."""
    hm, n, length = frozen.hm, len(rows), len(frozen.ids)
    device, dtype = frozen.resid.device, hm.dtype
    deltas: dict[int, Tensor] = {}
    for row, i in enumerate(rows.tolist()):
        layer = int(graph.layer[i])
        held = deltas.setdefault(layer, torch.zeros(n, length, hm.d_model, device=device))
        held[row, int(graph.pos[i])] -= writes[row]
    many = frozen.ids.expand(n, -1)
    taken: list[Intervention] = [Edit(f"{layer}.mlp_out", _adding(delta.to(dtype))) for layer, delta in deltas.items()]
    sites = [s for s in hm.atlas.sites() if s.kind == "pattern" or s.kind.endswith(".scale")]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*changed nothing")
        base = hm.run(frozen.ids[None], read=[*sites, "unembed.out"])
        patterns = [_held(FreezePattern, base, s, n) for s in sites if s.kind == "pattern"]
        scales = [_held(FreezeScale, base, s, n) for s in sites if s.kind != "pattern"]
        start = _value(hm, graph, base)
        everything = [*_mlps_held(frozen, deltas, n), *patterns, *scales]
        ends = [
            _value(hm, graph, hm.run(many, read=["unembed.out"], write=edits))
            for edits in (everything, [*taken, *patterns], taken)
        ]
    held_all, attention, free = (start - end for end in ends)
    return held_all, attention, free


def _held(kind: type[FreezePattern], base: "Run", site: Site, n: int) -> Intervention:
    return kind(site.short, base[site].expand(n, *base[site].shape[1:]))


def _adding(delta: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: x + delta


def _mlps_held(frozen: FrozenModel, deltas: Mapping[int, Tensor], n: int) -> list[Intervention]:
    """Every MLP writes what it wrote, less the feature; what a skip transcoder passes on is passed on."""
    edits: list[Intervention] = []
    for layer, out in enumerate(frozen.mlp_out):
        if out is None:
            continue
        held = frozen.transcoders.get(layer)
        mlp = _HeldMLP(out.expand(n, *out.shape) + deltas.get(layer, 0), held)
        if held is not None and held.transcoder.has_skip:
            edits.append(Edit(str(held.transcoder.cfg.metadata["hook_name"]), mlp.reads))
        edits.append(Edit(f"{layer}.mlp_out", mlp.writes))
    return edits


class _HeldMLP:
    """An MLP that writes what it is told, and what a skip path makes of a stream that changed."""

    def __init__(self, out: Float[Tensor, "row pos d_model"], held: FrozenTranscoder | None) -> None:
        self.out, self.held = out, held
        self.seen: Tensor | None = None

    def reads(self, x: Tensor) -> Tensor:
        """Note what goes in."""
        self.seen = x
        return x

    def writes(self, x: Tensor) -> Tensor:
        """Return what comes out instead."""
        passed = 0.0 if self.seen is None or self.held is None else self.held.skip_change(self.seen)
        return (self.out + passed).to(x.dtype)


def _value(hm: "HookManager", graph: AttributionGraph, out: "Run") -> Float[Tensor, "row logit"]:
    logits = out["unembed.out"][:, graph.target_pos].float()
    return (graph.targets.value(logits) * Readout.of(hm).scale).cpu()
