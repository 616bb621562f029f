"""`interp circuit`: choose edges by their scores, run the model with nothing else, and say what that shows."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from pydantic import Field, model_validator

from interp.cli.attribute import PathName, Rule
from interp.cli.lines import read_line, refuse, tell
from interp.cli.pairs import MetricName, PairsConfig, PairsOptions, open_pairs
from interp.cli.results import LineFlags, ResultFolder, open_model, say, write_result
from interp.core.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from interp.core.manager import HookManager
    from interp.patching.circuits.circuit import Circuit
    from interp.patching.estimates.edge_scores import EdgeScores

__all__ = ["CircuitConfig", "CircuitLine", "main"]

_STAND_IN = {"model": "-", "out": "-"}
_ENOUGH = 0.85


class CircuitConfig(PairsConfig):
    """Find a circuit and judge it."""

    scores: str | None = Field(
        default=None,
        description="folder that interp attribute --level edges wrote; by default edges are scored here, by rule and "
        "path",
    )
    rule: Rule = Field(default="plain", description="the backward rule of the scores")
    path: PathName = Field(default="inputs_ig", description="the path of the scores: plain and inputs_ig is EAP-IG")
    steps: int = Field(default=5, gt=0, description="points on the path")
    judge: PairsOptions | None = Field(
        default=None,
        description="the prompts that circuits are judged on; by default of the same task, from what is kept apart",
    )
    edges: int | None = Field(
        default=None,
        gt=0,
        description="how many edges, before dead ends are taken away; by default the smallest share of the curve that "
        "reaches a faithfulness of 0.85",
    )
    select: Literal["top", "greedy"] = Field(
        default="top", description="the highest scores, or greedily from the logits"
    )
    ranking: Literal["absolute", "signed"] = Field(default="absolute", description="by size, or by the score itself")
    ablation: Literal["patching", "zero", "mean", "mean_positional"] = Field(
        default="patching", description="what the edges outside carry: the other prompt's, nothing, or a mean"
    )
    metric: MetricName = Field(default="logit_diff", description="what the circuit is to keep, one number per pair")
    n_random: int = Field(default=3, ge=1, description="random circuits of each size and kind beside the curve")
    knockouts: int = Field(default=20, ge=0, description="random sets of nodes for the completeness; 0 leaves it out")
    minimality: bool = Field(default=False, description="run the circuit without each of its nodes in turn")

    @model_validator(mode="after")
    def _rule_is_for_edges(self) -> "CircuitConfig":
        if self.rule == "atp*":
            raise ValueError("rule atp* is for nodes; edges take plain, frozen_ln, gim, relp or relp_ah")
        return self


class CircuitLine(CircuitConfig, LineFlags):
    """Find the edges that a task needs, and measure exactly what the model does with them alone.

    `interp circuit [CONFIG.yaml] [OPTIONS]`: settings on the line go before those of the file. Writes the circuit
    (JSON, EAP-IG's JSON, GraphML), the curve of faithfulness by size beside random circuits, and a page.
    """

    # A union of settings and nothing would be a subcommand otherwise.
    judge: tyro.conf.AvoidSubcommands[PairsOptions | None] = None

    def settings(self) -> CircuitConfig:
        """The configuration, without what belongs to the command line alone."""
        return CircuitConfig.model_validate({name: getattr(self, name) for name in CircuitConfig.model_fields})


def main(argv: list[str]) -> int:
    """Find a circuit and judge it.

    Args:
        argv: The arguments after `interp circuit`.

    Returns:
        The exit code: 0 done, 2 bad usage.

    Raises:
        InterpError: The measurement failed.
    """
    try:
        line = read_line(CircuitLine, CircuitConfig, argv, prog="interp circuit", stand_in=_STAND_IN)
        cfg = line.settings()
        folder = ResultFolder(cfg.out, force=line.force)
    except ConfigError as err:
        return refuse(str(err))
    from interp.patching.graph import Graph

    hm = open_model(cfg)
    graph = Graph.of(hm)
    if cfg.edges is not None and cfg.edges > graph.n_edges:
        return refuse(f"--edges {cfg.edges}: this model has {graph.n_edges} edges")
    if line.dry_run:
        text = f"{cfg.to_yaml()}\n{graph.n_edges:,} edges between {len(graph.senders)} senders"
        say(text, {"config": cfg.model_dump(mode="json"), "edges": graph.n_edges}, as_json=line.json_output)
        return 0
    scores = _scores(hm, cfg)
    judge = open_pairs(hm, _judge(cfg), bos=cfg.bos).tokens(hm, bos=cfg.bos)
    folder.begin(cfg)
    record, text = _judged(hm, scores, judge, cfg, folder)
    say(text, record, as_json=line.json_output)
    return 0


def _judge(cfg: CircuitConfig) -> PairsOptions:
    if cfg.judge is not None:
        return cfg.judge
    if cfg.pairs.file is not None:
        raise ConfigError("pairs of a file are judged on pairs of another: give judge.file (or judge.task)")
    return cfg.pairs.model_copy(update={"held_out": True, "seed": cfg.pairs.seed + 1})


def _scores(hm: "HookManager", cfg: CircuitConfig) -> "EdgeScores":
    from interp.core.attribute import Path as Along
    from interp.patching.estimates.edge_scores import EdgeScores
    from interp.patching.estimates.edges import edge_attribution
    from interp.patching.graph import Graph

    if cfg.scores is None:
        pairs = open_pairs(hm, cfg.pairs, bos=cfg.bos)
        tell(f"scoring edges on {len(pairs)} pairs of {pairs.name}")
        path = Along(cfg.path, steps=cfg.steps)
        return edge_attribution(hm, pairs.tokens(hm, bos=cfg.bos), rule=cfg.rule, path=path, metric=cfg.metric)
    inside = Path(cfg.scores) / "result"
    found = EdgeScores.load(inside if inside.is_dir() else cfg.scores)
    if found.graph != Graph.of(hm):
        raise ArtifactError(f"{cfg.scores} scores the edges of another model; score those of {hm.name} first")
    return found


def _judged(
    hm: "HookManager", scores: "EdgeScores", judge: Any, cfg: CircuitConfig, folder: ResultFolder
) -> tuple[dict[str, Any], str]:
    from interp.patching.circuits.circuit_curve import circuit_curve
    from interp.patching.circuits.circuit_files import write_eap_ig, write_graphml
    from interp.patching.circuits.circuit_view import write_circuit_html
    from interp.patching.circuits.faithfulness import evaluate_circuits
    from interp.patching.circuits.knockouts import completeness, minimality

    how: dict[str, Any] = {"metric": cfg.metric, "ablation": cfg.ablation}
    tell(f"running circuits of every size on {len(judge)} other pairs")
    curve = circuit_curve(hm, judge, scores.scores, n_random=cfg.n_random, seed=cfg.pairs.seed, **how)
    files = write_result(folder, curve, "curve.csv", "curve.html", name="curve")
    circuit = _chosen(hm, scores, curve, cfg)
    found = evaluate_circuits(hm, judge, circuit, progress=False, **how)
    files += [circuit.save(folder.path / "circuit.json")]
    files += [write_circuit_html(circuit, folder.path / "circuit.html", curve=curve, notes=(found.summary(),))]
    write_eap_ig(circuit, folder.path / "circuit.eap-ig.json", d_model=hm.d_model)
    write_graphml(circuit, folder.path / "circuit.graphml")
    texts = [curve.summary(), found.summary()]
    if cfg.knockouts:
        whole = completeness(hm, judge, circuit, n_knockouts=cfg.knockouts, seed=cfg.pairs.seed, **how)
        files += write_result(folder, whole, "completeness.csv", "completeness.html", name="completeness")
        texts.append(whole.summary())
    if cfg.minimality:
        least = minimality(hm, judge, circuit, **how)
        files += write_result(folder, least, "minimality.csv", "minimality.html", name="minimality")
        texts.append(least.summary())
    record = {
        "out": cfg.out,
        "edges": circuit.n_edges,
        "of": circuit.graph.n_edges,
        "nodes": list(circuit.nodes),
        "faithfulness": float(found.faithfulness[0]),
        "files": [str(f) for f in files],
    }
    return record, "\n".join([*texts, *map(str, files)])


def _chosen(hm: "HookManager", scores: "EdgeScores", curve: Any, cfg: CircuitConfig) -> "Circuit":
    from interp.patching.circuits.select_edges import counts_of, greedy_edges, top_edges
    from interp.patching.graph import Graph

    graph = Graph.of(hm)
    n = cfg.edges
    if n is None:
        share = curve.smallest(cfg.ranking, enough=_ENOUGH)
        n = graph.n_edges if math.isnan(share) else counts_of(graph, [share])[0]
    select = top_edges if cfg.select == "top" else greedy_edges
    return select(graph, scores.scores, n, absolute=cfg.ranking == "absolute")
