"""`function_vector`: the sum of what the heads of the largest effect write, and where it is added."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.direction import Direction, Dose
from interp.core.errors import ConfigError, DataError, ModelError
from interp.core.intervention import Intervention
from interp.core.manager import HookManager
from interp.core.result import Provenance, Result
from interp.core.where import Where
from interp.data.icl import icl_pairs
from interp.data.pairs import PromptPairs
from interp.steering.function_vectors.effects import head_effects, means_of
from interp.steering.function_vectors.effects_result import HeadEffects
from interp.steering.function_vectors.heads import HeadMeans, head_vectors
from interp.steering.function_vectors.options import ICLOptions, Tasks, splits_of
from interp.steering.function_vectors.screen import try_vectors

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

__all__ = ["SIZES", "FunctionVector", "compose_function_vectors", "function_vector"]

SIZES = (1, 2, 3, 5, 10, 20, 50, 100)
"""Numbers of heads that are tried where none is given: those up to a quarter of all heads."""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class FunctionVector(Result):
    """A function as one vector of the residual stream.

    Attributes:
        task: the function's name.
        heads: the heads it is made of, as (layer, head), the strongest first.
        parts: what each of them writes; their sum is `vector`.
        layer: the block after which it is added.
        n_shots: shots of the prompts that it was read from.
        written: mean outputs of all heads, from which controls are made.
        resid: the mean residual stream after each block, at the last token of in-context prompts.
        sizes: numbers of heads that were tried on validation items; empty where none were.
        layers: layers that were.
        choice: share of validation items answered right without shots, for each number of heads and layer.
        effects: the mean indirect effect of each head that ranked them; NaN where heads were named.
        seen: inputs of the items that it was read from or chosen on; none where it was composed of others.
        notes: what a reader should know.
    """

    title: ClassVar[str] = "Function vector"
    dose_per_row: ClassVar[bool] = True
    task: str
    heads: list[tuple[int, int]]
    parts: Float[Tensor, "part d_model"]
    layer: int
    n_shots: int
    written: Float[Tensor, "layer n_heads d_head"]
    resid: Float[Tensor, "layer d_model"]
    sizes: list[int] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    choice: Float[Tensor, "size place"]
    effects: Float[Tensor, "layer n_heads"]
    seen: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @cached_property
    def vector(self) -> Float[Tensor, " d_model"]:
        """The function vector."""
        return self.parts.sum(0)

    @property
    def site(self) -> str:
        """Where it is added."""
        return f"{self.layer}.resid_post"

    @property
    def direction(self) -> Direction:
        """The vector as a direction at its site; a dose of 1 is the vector itself."""
        return Direction(
            vectors={self.site: self.vector},
            method="function_vector",
            model=self.provenance,
            read_at=repr(Where(pos=-1)),
            name=self.task,
            folded=bool(self.provenance.settings.get("folded", False)),
            notes=tuple(self.notes),
        )

    def as_interventions(self, dose: float | Tensor | Dose = 1.0, *, where: Where | None = None) -> list[Intervention]:
        """Return the edit that puts the function into a prompt.

        Args:
            dose: how much of the vector; the paper's is 1.
            where: the last token of the prompt by default; `Where.last_prompt() | Where.generated()` for texts that go
                on for several tokens.
        """
        return self.direction.as_interventions(dose, where=Where.last_prompt() if where is None else where)

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per head: its effect, the length of what it writes, its cosine with the whole.

        Layer and head are −1 for what no head writes.
        """
        import pandas as pd

        whole = self.vector / self.vector.norm()
        # A rebuilt vector is of one part, which is no head's.
        heads = self.heads if len(self.heads) == len(self.parts) else [(-1, -1)] * len(self.parts)
        rows = [
            {
                "layer": layer,
                "head": head,
                "aie": float(self.effects[layer, head]) if layer >= 0 else math.nan,
                "norm": float(part.norm()),
                "cosine": float(part @ whole / part.norm()),
            }
            for (layer, head), part in zip(heads, self.parts, strict=True)
        ]
        return pd.DataFrame(rows)

    def plot(self) -> "plotly.graph_objects.Figure":
        """Draw the validation accuracy by layer, a line per number of heads; without one, what heads write."""
        from interp.report.figures import Axis, bars, line

        if not self.sizes:
            labels = Axis("head", [f"L{layer}H{head}" for layer, head in self.heads])
            return bars(self.parts.norm(dim=1), labels=labels, title=f"Heads of {self.task!r}", value="norm")
        series = {f"{size} heads": row for size, row in zip(self.sizes, self.choice, strict=True)}
        x = Axis("added after block", [str(layer) for layer in self.layers])
        return line(series, x=x, title=f"{self.task!r} without shots, validation items", value="accuracy")

    def summary(self) -> str:
        """Name the heads and the layer, and how they were chosen."""
        named = ", ".join(f"L{layer}H{head}" for layer, head in self.heads[:10])
        more = f", … ({len(self.heads)} in all)" if len(self.heads) > 10 else ""
        lines = [f"{self.task}: {named}{more}; norm {float(self.vector.norm()):.3g}, added at {self.site}"]
        if self.sizes:
            best = float(self.choice.max())
            lines.append(f"chosen on validation items without shots: {best:.2f} right there")
        return "\n".join([*lines, *self.notes])


def function_vector(
    hm: HookManager,
    task: Tasks,
    *,
    heads: int | Sequence[tuple[int, int]] | None = None,
    layer: int | None = None,
    effects: HeadEffects | None = None,
    options: ICLOptions | None = None,
    seed: int = 0,
) -> FunctionVector:
    """Make the function vector of a task: v = Σ W_O^{l,h} ā_{l,h} over the heads of the largest indirect effect.

    The bias of the output projection is no head's, and is left out. Where the number of heads or the layer is not
    given, each pair of them is tried on validation items without shots; the one with the most right answers is taken,
    and of several the one with the highest mean log-probability.

    Args:
        hm: the model.
        task: the task, or its splits; test items are not looked at.
        heads: how many heads, or which, as (layer, head).
        layer: the block after which it is added.
        effects: those of this task or of several; their mean over tasks ranks the heads. Measured on this task where
            they are needed and not given.
        options: prompts; by default with shots and corruption of the effects, where these are given.
        seed: of the prompts.

    Returns:
        The vector with what it was made of.

    Raises:
        ConfigError: a number of heads or a layer that is not there, or a head that is named twice.
        ModelError: effects of another model.
        WhereError: heads that the model does not have.
        DataError: as for `head_effects`; or no head has an effect above 0.

    Source: Todd et al. (2023), arXiv 2310.15213, §2.3, eq. 5. Departures: the number of heads and the layer are
    chosen on validation items (there: 10 to 100 heads by the model's size, layer ≈ L/3); norms behind the heads are
    applied.
    """
    splits = splits_of(task)
    name = splits.train.name
    if effects is not None:
        _same_model(hm, effects)
        options = options or ICLOptions(n_shots=effects.n_shots, corruption=effects.corruption)
    options = options or ICLOptions()
    named = _check(hm, heads, layer)
    if effects is None and named is None:
        effects = head_effects(hm, splits, options=options, seed=seed)
    if effects is not None and name in effects.tasks:
        i = effects.index(name)
        means, n_shots = HeadMeans(effects.z[i], effects.written[i], effects.resid[i]), effects.n_shots
    else:
        means, n_shots = means_of(hm, splits, options, seed), options.n_shots
    ranked = named if named is not None else _ranked(effects)
    sizes = [len(ranked)] if named is not None else _sizes(heads, len(ranked), hm)
    layers = [layer] if layer is not None else list(range(max(1, hm.n_layers - 1)))
    parts = head_vectors(hm, means.written, ranked[: max(sizes)])
    aie = torch.full((hm.n_layers, hm.n_heads), torch.nan) if effects is None else effects.aie
    settings = {**options.settings(), "heads": heads, "layer": layer, "task": name, "folded": hm.is_folded}
    made = FunctionVector(
        provenance=Provenance.of(hm, settings=settings, data=[means.z], seed=seed),
        task=name,
        heads=ranked[: sizes[0]],
        parts=parts[: sizes[0]],
        layer=layers[0],
        n_shots=n_shots,
        written=means.written,
        resid=means.resid,
        choice=torch.zeros(0, 0),
        effects=aie,
        seen=[*splits.train.inputs, *splits.validation.inputs],
        notes=_few(heads, len(ranked)),
    )
    if len(sizes) * len(layers) == 1:
        return made
    prompts = icl_pairs(splits.validation, splits.train, n_shots=0, seed=seed)
    return _chosen(hm, made, prompts, ranked, parts, sizes, layers, options)


def compose_function_vectors(ac: FunctionVector, bd: FunctionVector, bc: FunctionVector) -> FunctionVector:
    """Return the vector of a function that was not shown, from three that were: v_AD = v_AC + v_BD − v_BC.

    A function is one of two parts, such as what is done and to what: "translate verbs" = "translate nouns" + "copy
    verbs" − "copy nouns".

    Args:
        ac, bd, bc: vectors of the same heads; make them with `heads=[…]`.

    Returns:
        The vector, at the layer of the first.

    Raises:
        DataError: vectors of different heads.
        ModelError: vectors of different models.

    Source: Todd et al. (2023), arXiv 2310.15213, §3.3.
    """
    if not set(ac.heads) == set(bd.heads) == set(bc.heads):
        raise DataError("these vectors are of different heads, whose sums do not compare; make each with heads=[…]")
    if len({(one.provenance.config_hash, one.direction.folded) for one in (ac, bd, bc)}) > 1:
        raise ModelError("these vectors are of different models; make them on one")
    order = [[one.heads.index(head) for head in ac.heads] for one in (bd, bc)]
    return replace(
        ac,
        task=f"{ac.task} + {bd.task} − {bc.task}",
        parts=ac.parts + bd.parts[order[0]] - bc.parts[order[1]],
        written=ac.written + bd.written - bc.written,
        resid=ac.resid + bd.resid - bc.resid,
        sizes=[],
        layers=[],
        choice=torch.zeros(0, 0),
        seen=[],
        notes=["composed of three vectors; its layer is that of the first"],
    )


def _chosen(
    hm: HookManager,
    made: FunctionVector,
    prompts: PromptPairs,
    ranked: list[tuple[int, int]],
    parts: Float[Tensor, "part d_model"],
    sizes: list[int],
    layers: list[int],
    options: ICLOptions,
) -> FunctionVector:
    """The vector with the number of heads and the layer that answer most prompts right."""
    vectors = torch.stack([parts[:size].sum(0) for size in sizes])[:, None].expand(-1, len(layers), -1)
    tried = try_vectors(hm, prompts, vectors, layers, options=options)
    right, log_prob = tried.right.mean(-1), tried.log_prob.mean(-1)
    best = torch.where(right == right.max(), log_prob, -torch.inf).flatten().argmax()
    size, at = divmod(int(best), len(layers))
    heads, kept, layer = ranked[: sizes[size]], parts[: sizes[size]], layers[at]
    return replace(made, heads=heads, parts=kept, layer=layer, sizes=sizes, layers=layers, choice=right)


def _check(hm: HookManager, heads: Any, layer: object) -> list[tuple[int, int]] | None:
    """The heads that are named, if any are."""
    count = hm.n_layers * hm.n_heads
    if layer is not None and not (type(layer) is int and 0 <= layer < hm.n_layers):
        raise ConfigError(f"layer={layer!r}: expected 0 to {hm.n_layers - 1}, or None to choose one")
    if heads is None or (type(heads) is int and 1 <= heads <= count):
        return None
    try:
        named = [(int(a), int(b)) for a, b in heads]
    except (TypeError, ValueError):
        named = []
    if not named:
        raise ConfigError(f"heads={heads!r}: expected 1 to {count} heads, a list of (layer, head), or None")
    if len(set(named)) < len(named):
        raise ConfigError(f"heads={heads!r}: a head stands there twice, and would count twice; give each once")
    return named


def _same_model(hm: HookManager, effects: HeadEffects) -> None:
    """Refuse effects of another model, whose heads only have the same numbers."""
    own, given = effects.provenance, Provenance.of(hm)
    if own.config_hash != given.config_hash:
        raise ModelError(
            f"these effects are of {own.model!r} (config {own.config_hash}), not of {hm.name!r} (config "
            f"{given.config_hash}); measure this one"
        )


def _few(heads: object, found: int) -> list[str]:
    if not isinstance(heads, int) or heads <= found:
        return []
    return [f"{heads} heads were asked for, and only {found} have a mean effect above 0"]


def _ranked(effects: HeadEffects | None) -> list[tuple[int, int]]:
    assert effects is not None
    found = [head for head in effects.top(effects.aie.numel()) if float(effects.aie[head]) > 0]
    if not found:
        raise DataError("no head has a mean effect above 0, so nothing ranks them; see the notes of head_effects")
    return found


def _sizes(heads: object, found: int, hm: HookManager) -> list[int]:
    if isinstance(heads, int):
        return [min(heads, found)]
    most = min(found, max(1, hm.n_layers * hm.n_heads // 4))
    return [size for size in SIZES if size <= most]
