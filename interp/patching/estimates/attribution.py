"""Attribution patching: what patching any node would do to a metric, from its gradient.

score = Σ over positions of ⟨activation put in − activation of the patched run, ∂m/∂activation⟩. Its sign is that of the
effect of patching: with "denoise", positive is what brings the corrupted run nearer to the clean one.

Source: Nanda (2023), "Attribution Patching"; Syed et al. (2023), arXiv 2310.10348; latents and error terms: Marks et
al. (2024), arXiv 2403.19647, §3.1. Departures: gradients follow a backward rule if asked (`interp.core.rules`), and the
rule "atp*" is that of Kramár et al. (2024), `interp.patching.estimates.atp`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.attribute import INPUT, Interpolate, Path, gradient_run, gradient_runs, path_of
from interp.core.errors import ConfigError, DataError, ShapeError, SiteError
from interp.core.manager import HookManager
from interp.core.metrics import Metric
from interp.core.rules import RULES, check_rule, rule_edits
from interp.core.run import Run
from interp.core.site import KINDS, Site
from interp.data.pair_tokens import PairTokens
from interp.data.pairs import PromptPairs
from interp.patching.estimates.atp import atp_star
from interp.patching.estimates.node_scores import AttributionResult
from interp.patching.estimates.sides import Part, Sides, group_means, runs_at

__all__ = ["Latents", "attribute"]

_UNITS = {"n_heads": "head", "n_kv_heads": "head", "d_mlp": "neuron"}


@dataclass(frozen=True, eq=False)
class Latents:
    """The latents of a dictionary as nodes: Δf · ∂m/∂f each, and what the dictionary leaves out as one more node.

    That node is the rest of the place's own Δx · ∂m/∂x: the reconstruction's error, and what of the reconstruction is
    no linear function of the latents (a skip connection, a normalisation per token).

    Args:
        dictionary: anything with `encode` and `decode` (or `reconstructed(latents, x)`, which is used if it is there).
        site: where it reads; "3.resid_post".
        out: where what it reconstructs is, for a transcoder; by default `site`.
    """

    dictionary: Any
    site: str
    out: str | None = None

    def __post_init__(self) -> None:
        missing = [n for n in ("encode", "decode") if not callable(getattr(self.dictionary, n, None))]
        if missing:
            raise ShapeError(f"Latents needs encode and decode; {type(self.dictionary).__name__} lacks {missing}")

    @property
    def target(self) -> str:
        """The site whose gradient is taken."""
        return Site(self.out or self.site).short


def attribute(
    hm: HookManager,
    pairs: PromptPairs | PairTokens,
    *,
    nodes: str | Latents | Sequence[str | Site | Latents] = "z",
    rule: str = "plain",
    path: str | Path = "none",
    mode: str = "denoise",
    at: str | None = None,
    metric: str | Metric | Callable[[Run], Tensor] | None = None,
) -> AttributionResult:
    """Estimate what patching each node does to the metric.

    Heads are nodes at sites with a head axis, neurons at mlp_pre and mlp_post, whole vectors elsewhere; all of them at
    every position, summed over positions, over named spans, and kept by column.

    Cost: 2 forwards and 1 backward of the pairs; 2 + m forwards and m backwards with m points on a path of inputs, m
    for each place on one of activations; n_layers more of each with "atp*". Memory: values and gradients of the places
    for a batch of rows that takes about a gibibyte; the result keeps units × (examples + positions).

    Args:
        hm: the model.
        pairs: clean and corrupted prompts, as many tokens on either side.
        nodes: kinds such as "z" or "mlp_out" (every layer), sites, globs, or `Latents`; one or several.
        rule: the backward rule, see `interp.core.rules`; or "atp*".
        path: "none", "inputs_ig", "activations_ig", or a `Path` with its steps and points.
        mode: "denoise" (the clean activation into the corrupted run), "noise" (the other way), "mean" or "zero" (into
            the clean run; means are of the corrupted prompts, by template and position).
        at: where the gradient is taken, "clean", "corrupted" or "both" (their mean); by default at the patched run.
        metric: a name as for `PairTokens.metric`, a `Metric`, or a function of a run; logit differences by default.

    Raises:
        ConfigError: an unknown rule, path or mode, or ones that exclude each other.
        DataError: prompts whose tokens do not correspond.
        SiteError: a site without positions, or none.
    """
    check_rule(rule, (*RULES, "atp*"))
    chosen, sides = path_of(path), Sides.of(hm, pairs, metric=metric, mode=mode)
    places = runs_at(sides, at, chosen.kind)
    if chosen.kind == "inputs_ig" and sides.inserted is None:
        raise ConfigError(f"path='inputs_ig' leads to the other prompts' run, and mode={mode!r} has none; use 'none'")
    if rule == "atp*" and (chosen.kind != "none" or at is not None or sides.inserted is None):
        raise ConfigError("rule 'atp*' is of one gradient at the patched run of two prompts; leave path, at and mode")
    asked = _nodes(hm, nodes)
    work = _Nodes(hm, sides, "plain" if rule == "atp*" else rule, asked)
    kept = _Kept(sides)
    means = work.means()
    for part in sides.parts(hm):
        if rule == "atp*":
            tokens = part.side(sides.patched), part.side(str(sides.inserted))
            kept.add(part, atp_star(hm, *tokens, reads=work.reads, metric=part.metric, score=work.scores))
        else:
            kept.add(part, work.estimates(part, chosen, places, None if means is None else means(part)))
    kept.check()
    return AttributionResult(
        provenance=sides.provenance(hm, {"rule": rule, "path": repr(chosen), "at": at, "nodes": list(asked)}),
        method=f"{rule}{'' if chosen.kind == 'none' else ', ' + chosen.kind}, {mode}",
        value=f"estimated {'size of the ' if rule == 'atp*' else ''}change of {sides.metric_name}",
        totals={place: torch.cat(found, dim=1) for place, found in kept.totals.items()},
        positions={place: (found / len(sides)).float() for place, found in kept.positions.items()},
        spans={
            span: {place: (found / len(sides)).float() for place, found in by_place.items()}
            for span, by_place in kept.spans.items()
        },
    )


def _nodes(hm: HookManager, nodes: Any) -> dict[str, Site | Latents]:
    """The places asked for, by name."""
    found: dict[str, Site | Latents] = {}
    for node in [nodes] if isinstance(nodes, str | Site | Latents) else list(nodes):
        if isinstance(node, Latents):
            hm.atlas.point(Site(node.site)), hm.atlas.point(Site(node.target))
            found[f"{Site(node.site).short}+latents"] = node
            continue
        name = f"*.{node}" if isinstance(node, str) and node in KINDS and KINDS[node].in_block else node
        for site in hm.atlas.expand(name):
            if site.axes[:2] != ("batch", "pos") or site.where is not None:
                raise SiteError(
                    f"{site!r} is no node of attribution: its axes are {' '.join(site.axes)}, and nodes are whole "
                    "places with a position axis"
                )
            found[site.short] = site
    if not found:
        raise SiteError("no nodes were given; give a kind such as 'z', sites, or Latents")
    return found


@dataclass(frozen=True, eq=False)
class _Nodes:
    """The runs that attribution of nodes needs, and what it makes of them."""

    hm: HookManager
    sides: Sides
    rule: str
    asked: Mapping[str, Site | Latents]

    @property
    def reads(self) -> list[str]:
        """The sites whose values and gradients are needed."""
        found: dict[str, None] = {}
        for node in self.asked.values():
            names = [node.short] if isinstance(node, Site) else [Site(node.site).short, node.target]
            found.update(dict.fromkeys(names))
        return list(found)

    def plain(self, part: Part, name: str, *, start: bool = False) -> Run:
        """The values of a side; under the rule's edits too, so that sides that are the same differ by exactly 0."""
        reads = [*self.reads, *([INPUT.short] if start and INPUT.short not in self.reads else [])]
        return self.hm.run(part.side(name), read=reads, write=rule_edits(self.hm, self.rule))

    def gradient(self, part: Part, name: str, write: Sequence[Any] = ()) -> Run:
        """The values and gradients of a side."""
        tokens = part.side(name)
        return gradient_run(self.hm, tokens, read=self.reads, metric=part.metric, rule=self.rule, write=write)

    def means(self) -> Callable[[Part], dict[str, Tensor]] | None:
        """For mode "mean", what gives each row its group's mean of every site; else None."""
        if self.sides.mode != "mean":
            return None

        def values() -> Iterator[tuple[Part, dict[str, Tensor]]]:
            for part in self.sides.parts(self.hm):
                run = self.plain(part, "corrupted")
                yield part, {name: run[name] for name in self.reads}

        return group_means(self.sides, values())

    def estimates(
        self, part: Part, path: Path, places: list[tuple[str, float]], means: Mapping[str, Tensor] | None
    ) -> dict[str, Float[Tensor, "row pos unit"]]:
        """The scores of some rows."""
        graded = {name: self.gradient(part, name) for name, _ in places} if path.kind == "none" else {}
        along = path.kind == "inputs_ig"
        runs = {n: graded.get(n) or self.plain(part, n, start=along) for n in self.sides.needed}
        now = {name: runs[self.sides.patched][name] for name in self.reads}
        there = self._inserted(runs, now, means)
        if path.kind == "activations_ig":
            mean = self._along_activations(part, path, there)
        else:
            weighted = [(weight, graded[name]) for name, weight in places] if graded else None
            steps = weighted or self._along_inputs(part, runs, path)
            mean = _weighted(((w, {name: run.grad[name] for name in self.reads}) for w, run in steps))
        return self.scores(now, there, mean)

    def _inserted(
        self, runs: Mapping[str, Run], now: Mapping[str, Tensor], means: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        if means is not None:
            return {name: means[name].to(value) for name, value in now.items()}
        if self.sides.inserted is None:
            return {name: torch.zeros_like(value) for name, value in now.items()}
        return {name: runs[self.sides.inserted][name] for name in now}

    def _along_inputs(self, part: Part, runs: Mapping[str, Run], path: Path) -> Iterator[tuple[float, Run]]:
        return gradient_runs(
            self.hm,
            part.side(self.sides.patched),
            toward=runs[str(self.sides.inserted)],
            read=self.reads,
            metric=part.metric,
            rule=self.rule,
            path=path,
        )

    def _along_activations(self, part: Part, path: Path, there: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name in self.reads:
            steps = (
                (w, self.gradient(part, self.sides.patched, [Interpolate(name, there[name], s)]))
                for s, w in path.places
            )
            found |= _weighted((w, {name: run.grad[name]}) for w, run in steps)
        return found

    def scores(
        self, now: Mapping[str, Tensor], there: Mapping[str, Tensor], gradient: Mapping[str, Tensor]
    ) -> dict[str, Float[Tensor, "row pos unit"]]:
        """Δ · gradient of every place."""
        found: dict[str, Tensor] = {}
        for place, node in self.asked.items():
            if isinstance(node, Site):
                found[place] = _dotted(node, there[place] - now[place], gradient[place])
            else:
                found[place], error = _latents(node, now, there, gradient[node.target])
                found[place.removesuffix("+latents") + "+error"] = error
        return found


def _dotted(site: Site, delta: Tensor, gradient: Tensor) -> Float[Tensor, "row pos unit"]:
    """Δ · gradient by head, by neuron, or of the whole vector."""
    product = delta.float() * gradient.float()
    if site.axes[-1] == "d_mlp":
        return product
    if any(axis in _UNITS for axis in site.axes):
        return product.sum(-1)
    return product.flatten(2).sum(-1, keepdim=True)


def _latents(
    node: Latents, now: Mapping[str, Tensor], there: Mapping[str, Tensor], gradient: Tensor
) -> tuple[Float[Tensor, "row pos d_sae"], Float[Tensor, "row pos one"]]:
    """Δf · ∂m/∂f, with ∂m/∂f pulled back through the decoder at the patched run; and the rest of Δx · ∂m/∂x."""
    site, dictionary = Site(node.site).short, node.dictionary
    whole = getattr(dictionary, "reconstructed", None)

    def decoded(latents: Tensor, x: Tensor) -> Tensor:
        return whole(latents, x) if callable(whole) else dictionary.decode(latents)

    with torch.no_grad():
        latents, other = dictionary.encode(now[site]), dictionary.encode(there[site])
    with torch.enable_grad():
        leaf = latents.detach().requires_grad_(True)
        made = decoded(leaf, now[site])
        (pulled,) = torch.autograd.grad(made, leaf, gradient.reshape(made.shape).to(made.dtype))
    scores = (other - latents).float() * pulled.float()
    whole_place = ((there[node.target] - now[node.target]).float() * gradient.float()).flatten(2).sum(-1)
    return scores, (whole_place - scores.sum(-1))[..., None]


def _weighted(parts: Iterator[tuple[float, dict[str, Tensor]]]) -> dict[str, Tensor]:
    """The weighted sum of gradients, one at a time."""
    total: dict[str, Tensor] = {}
    for weight, found in parts:
        for name, gradient in found.items():
            total[name] = gradient * weight if name not in total else total[name] + gradient * weight
    return total


@dataclass(eq=False)
class _Kept:
    """Scores added up over batches of rows."""

    sides: Sides
    totals: dict[str, list[Tensor]] = field(default_factory=dict)
    positions: dict[str, Tensor] = field(default_factory=dict)
    spans: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def check(self) -> None:
        """Refuse scores that are no numbers.

        Raises:
            DataError: names the first place.
        """
        bad = next((place for place, found in self.positions.items() if bool(found.isnan().any())), None)
        if bad is not None:
            raise DataError(
                f"the attribution of {bad} is NaN; look for NaN in the weights, an overflow of the dtype, or a metric "
                "without a finite slope"
            )

    def add(self, part: Part, scores: Mapping[str, Float[Tensor, "row pos unit"]]) -> None:
        """Take in the scores of some rows; pads count for nothing."""
        clean = part.side("clean")
        for place, found in scores.items():
            # Not a product: a pad's activation may be anything.
            real = torch.where(part.mask.to(found.device)[..., None], found, 0.0)
            self.totals.setdefault(place, []).append(real.sum(1).T.float().cpu())
            columns = real.sum(0).T.double().cpu()
            self.positions[place] = self.positions.get(place, 0) + columns
            for name, span in clean.spans.items():
                inside = torch.where(span.to(found.device)[..., None], real, 0.0).sum((0, 1)).double().cpu()
                by_place = self.spans.setdefault(name, {})
                by_place[place] = by_place.get(place, 0) + inside
