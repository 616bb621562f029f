"""`interp attribute`: estimate what patching every node, or every edge, of a model does; verify the best exactly."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from interp.cli.lines import read_line, refuse, tell
from interp.cli.pairs import MetricName, PairsConfig, open_pairs
from interp.cli.results import LineFlags, ResultFolder, open_model, say, write_result
from interp.core.errors import ConfigError, InterpError

if TYPE_CHECKING:
    from interp.core.manager import HookManager
    from interp.core.result import Result
    from interp.data.pairs import PromptPairs

__all__ = ["AttributeConfig", "AttributeLine", "main"]

_STAND_IN = {"model": "-", "out": "-"}
_TOP = 10

Rule = Literal["plain", "frozen_ln", "gim", "relp", "relp_ah", "atp*"]
PathName = Literal["none", "inputs_ig", "activations_ig"]
Mode = Literal["denoise", "noise", "mean", "zero"]


class AttributeConfig(PairsConfig):
    """Score every node, or every edge, by gradients."""

    level: Literal["nodes", "edges", "flow"] = Field(
        default="nodes", description="nodes; edges between them; or flow: information-flow routes, without a gradient"
    )
    nodes: list[str] = Field(
        default=["z", "mlp_out"], min_length=1, description="kinds of site, sites or globs whose nodes are scored"
    )
    rule: Rule = Field(default="plain", description="the backward rule; atp* for nodes alone")
    path: PathName = Field(default="none", description="where gradients are taken: at one run, or along a path to it")
    steps: int = Field(default=5, gt=0, description="points on the path")
    points: Literal["midpoint", "left", "gauss"] = Field(default="midpoint", description="how the points are chosen")
    mode: Mode = Field(
        default="denoise",
        description="what is estimated: denoise (clean into corrupted), noise (the other way), or an ablation by mean "
        "(of template and position) or zero",
    )
    metric: MetricName = Field(default="logit_diff", description="what is estimated, one number per pair")
    verify: int = Field(
        default=0,
        ge=0,
        description="patch so many of the best nodes exactly, and as many others drawn at random; says how well they "
        "agree",
    )

    @model_validator(mode="after")
    def _fits_the_level(self) -> "AttributeConfig":
        if self.level != "nodes" and self.verify:
            raise ValueError("verify is for nodes; interp circuit runs edges exactly")
        if self.level == "edges" and self.rule == "atp*":
            raise ValueError("rule atp* is for nodes; edges take plain, frozen_ln, gim, relp or relp_ah")
        return self


class AttributeLine(AttributeConfig, LineFlags):
    """Estimate what patching every node, or every edge, does to a metric: two forwards and one backward for all.

    `interp attribute [CONFIG.yaml] [OPTIONS]`: settings on the line go before those of the file. Writes scores.csv, a
    page, and the result itself, which `interp circuit --scores FOLDER` reads.
    """

    def settings(self) -> AttributeConfig:
        """The configuration, without what belongs to the command line alone."""
        return AttributeConfig.model_validate({name: getattr(self, name) for name in AttributeConfig.model_fields})


def main(argv: list[str]) -> int:
    """Score a model's nodes or edges.

    Args:
        argv: The arguments after `interp attribute`.

    Returns:
        The exit code: 0 done, 2 bad usage.

    Raises:
        InterpError: The measurement failed.
    """
    try:
        line = read_line(AttributeLine, AttributeConfig, argv, prog="interp attribute", stand_in=_STAND_IN)
        cfg = line.settings()
        folder = ResultFolder(cfg.out, force=line.force)
    except ConfigError as err:
        return refuse(str(err))
    hm = open_model(cfg)
    pairs = open_pairs(hm, cfg.pairs, bos=cfg.bos)
    if line.dry_run:
        from interp.patching.graph import Graph

        graph = Graph.of(hm)
        count = f"{graph.n_edges:,} edges" if cfg.level != "nodes" else f"nodes at {', '.join(cfg.nodes)}"
        say(
            f"{cfg.to_yaml()}\n{len(pairs)} pairs of {pairs.name}; {count}",
            {"config": cfg.model_dump(mode="json"), "pairs": len(pairs), "edges": graph.n_edges},
            as_json=line.json_output,
        )
        return 0
    folder.begin(cfg)
    tell(f"{cfg.level} of {hm.name or hm.map.family} on {len(pairs)} pairs of {pairs.name}")
    try:
        found = _scored(hm, pairs, cfg)
    except InterpError:
        folder.give_up()
        raise
    files = write_result(folder, found, "scores.csv", "attribution.html")
    if cfg.verify:
        checked = _verified(hm, pairs, cfg)
        files += write_result(folder, checked, "verified.csv", "verified.html", name="verified")
        text = f"{found.summary()}\n{checked.summary()}"
    else:
        text = found.summary()
    record = {"out": cfg.out, "files": [str(f) for f in files], "top": _top(found)}
    say("\n".join([text, *map(str, files)]), record, as_json=line.json_output)
    return 0


def _scored(hm: "HookManager", pairs: "PromptPairs", cfg: AttributeConfig) -> "Result":
    from interp.core.attribute import Path as Along
    from interp.patching.estimates.attribution import attribute
    from interp.patching.estimates.edges import edge_attribution
    from interp.patching.estimates.flow import flow_routes

    if cfg.level == "flow":
        return flow_routes(hm, pairs)
    tokens = pairs.tokens(hm, bos=cfg.bos)
    path = Along(cfg.path, steps=cfg.steps, points=cfg.points)
    if cfg.level == "edges":
        return edge_attribution(hm, tokens, rule=cfg.rule, path=path, mode=cfg.mode, metric=cfg.metric)
    return attribute(hm, tokens, nodes=cfg.nodes, rule=cfg.rule, path=path, mode=cfg.mode, metric=cfg.metric)


def _verified(hm: "HookManager", pairs: "PromptPairs", cfg: AttributeConfig) -> "Result":
    from interp.patching.estimates.screening import screen_and_verify

    return screen_and_verify(
        hm,
        pairs.tokens(hm, bos=cfg.bos),
        cfg.verify,
        nodes=cfg.nodes,
        rule=cfg.rule,
        mode=cfg.mode,
        metric=cfg.metric,
        seed=cfg.pairs.seed,
    )


def _top(found: Any) -> list[dict[str, Any]]:
    n = min(_TOP, len(found.to_frame()))
    return [{"name": name, "score": score} for name, score in found.top(n)]
