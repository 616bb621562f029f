"""Backward rules: edits that change what a gradient is, and no value of the forward pass.

A gradient says what an infinitesimal patch does; a patch is not infinitesimal. Each rule puts another slope in the
place of a derivative that is known to mislead. They are ordinary interventions, so that any run takes them:
`hm.run(text, read=[…], write=rule_edits(hm, "relp"), grad=metric)`.

- "plain": the derivative.
- "frozen_ln": σ of every norm is a constant.
- "gim": σ is a constant; the softmax's backward is that of temperature 2; the gradient is shared out between the
  factors of each product (q and k get a quarter, v a half, the two halves of a gated MLP a half each).
- "relp": σ is a constant; an activation function's slope is f(x) / x; the halves of a gated MLP get a half each.
- "relp_ah": the same, and the pattern is a constant, so that nothing reaches q and k.

A gradient read at a site is what flows on from there to whatever came before: at q, k, v and mlp_pre it has the rule
in it, at pattern and mlp_post not yet.

Source: "gim": Edin et al. (2025), arXiv 2505.17630, in the constants of the authors' release (gim-explain), where the
temperature's backward has no factor 1/T and gated MLPs are halved too. "relp": Jafari et al. (2025), arXiv 2508.21258;
the authors' release and its IOI table use the LN, identity and half rules, with the AH rule (Ali et al. 2022) as an
option, which is "relp_ah" here. Departures: one rule for each product here stands for the scales at q and k there; the
two agree because all between the projections and the scores is linear, up to a soft-cap through which a factor passes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.core.errors import ConfigError, ModelError, nearest
from interp.core.intervention import FreezePattern, FreezeScale, Intervention
from interp.core.place import Place
from interp.core.site import Site

if TYPE_CHECKING:
    from interp.core.manager import HookManager

__all__ = [
    "RULES",
    "BackwardRule",
    "Fork",
    "GradientScale",
    "SoftenedPattern",
    "StopGradient",
    "check_rule",
    "holds_scales",
    "rule_edits",
]

RULES = ("plain", "frozen_ln", "gim", "relp", "relp_ah")

_GIM_TEMPERATURE, _GIM_SCORES, _HALF = 2.0, 0.25, 0.5
# Keeps f(x) / x finite at 0, in the units of x; RelP's own.
_STABLE = 1e-6
_NORMS = ("ln1", "ln1_post", "ln2", "ln2_post", "q_norm", "k_norm")


@dataclass(frozen=True, eq=False)
class BackwardRule(Intervention):
    """An edit of gradients alone; the base of the rules.

    Args:
        site: as for every intervention.
    """

    @property
    def may_do_nothing(self) -> bool:
        """Values stay as they are, on purpose."""
        return True

    @property
    def keeps_values(self) -> bool:
        """A rule is about gradients alone."""
        return True


@dataclass(frozen=True, eq=False)
class Fork(BackwardRule):
    """Give a branch its own copy of what it reads, so that a gradient read there is the branch's alone.

    Args:
        site: "3.attn_in", "3.mlp_in" or "3.mlp.in".
    """

    def edit(self, x: Tensor, place: Place) -> Tensor:
        """Return a copy."""
        return x.clone()


@dataclass(frozen=True, eq=False)
class StopGradient(BackwardRule):
    """Let no gradient through to what came before; one read at the site itself is zero.

    Args:
        site: as for every intervention.
    """

    @property
    def after_reads(self) -> bool:
        """The read stands before the cut."""
        return True

    def edit(self, x: Tensor, place: Place) -> Tensor:
        """Return x, cut off."""
        return x.detach()


@dataclass(frozen=True, eq=False)
class GradientScale(BackwardRule):
    """Multiply the gradient on its way back.

    Args:
        site: as for every intervention.
        factor: what it is multiplied by.
        read_first: whether a gradient read at the site has the factor in it.
    """

    factor: float = 1.0
    read_first: bool = False

    @property
    def after_reads(self) -> bool:
        """Whether the read stands before it."""
        return self.read_first

    def edit(self, x: Tensor, place: Place) -> Tensor:
        """Return x."""
        return _Scaled.apply(x, self.factor)


@dataclass(frozen=True, eq=False)
class SoftenedPattern(BackwardRule):
    """Take the softmax's backward at another temperature: with s = softmax(scores / T), s ⊙ (g − ⟨g, s⟩) · factor.

    The softened pattern comes from the pattern p itself, s ∝ p^(1/T); an attention sink's share is 1 − Σ p.

    Args:
        site: "3.pattern" or "*.pattern".
        temperature: T; 1 is the derivative.
        factor: what the gradient of the scores is multiplied by.
    """

    temperature: float = 1.0
    factor: float = 1.0

    def edit(self, x: Tensor, place: Place) -> Tensor:
        """Return x."""
        return _Softened.apply(x, self.temperature, self.factor)


@dataclass(frozen=True, eq=False)
class _HeldInput(BackwardRule):
    """Keep an activation function's input for `_InputRatio`, and cut the derivative's own way to it."""

    held: dict[int | None, Tensor] = field(default_factory=dict)

    @property
    def after_reads(self) -> bool:
        return True

    def edit(self, x: Tensor, place: Place) -> Tensor:
        self.held[place.site.layer] = x
        return x.detach()


@dataclass(frozen=True, eq=False)
class _InputRatio(BackwardRule):
    """Let y = f(x) · u have the slope y / x to x, all times a factor."""

    held: dict[int | None, Tensor] = field(default_factory=dict)
    factor: float = 1.0

    def edit(self, x: Tensor, place: Place) -> Tensor:
        return _Ratio.apply(x, self.held.pop(place.site.layer), self.factor)


def check_rule(rule: str, known: tuple[str, ...] = RULES) -> None:
    """Refuse a rule that does not exist.

    Raises:
        ConfigError: names those that do.
    """
    if rule not in known:
        hint = nearest(str(rule), known) or f"expected one of {', '.join(known)}"
        raise ConfigError(f"rule={rule!r}: {hint}")


def holds_scales(rule: str) -> bool:
    """Whether a rule takes σ of the norms for constants."""
    return rule != "plain"


def rule_edits(hm: "HookManager", rule: str) -> list[Intervention]:
    """Return the edits that make a run's gradients those of a rule; for one run, make them anew for the next.

    "gim" and "relp_ah" put attention on its eager form; every rule but "plain" computes norms by their formula: values
    stay within rounding.

    Args:
        hm: the model.
        rule: one of `RULES`.

    Raises:
        ConfigError: no such rule.
        ModelError: a norm or an MLP that the rule cannot reach (a mixture of experts), so that it would be half done.
    """
    check_rule(rule)
    edits: list[Intervention] = []
    if holds_scales(rule):
        edits += [FreezeScale(site) for site in _scales(hm)]
    if rule == "gim":
        edits.append(SoftenedPattern("*.pattern", _GIM_TEMPERATURE, _GIM_SCORES))
        edits.append(GradientScale("*.v", _HALF, read_first=True))
        edits += [GradientScale(f"{layer}.mlp_post", _HALF) for layer, gated in _mlps(hm, rule) if gated]
    if rule in ("relp", "relp_ah"):
        held: dict[int | None, Tensor] = {}
        for layer, gated in _mlps(hm, rule):
            edits.append(_HeldInput(f"{layer}.mlp_pre", held))
            edits.append(_InputRatio(f"{layer}.mlp_post", held, _HALF if gated else 1.0))
    if rule == "relp_ah":
        edits.append(FreezePattern())
    return edits


def _scales(hm: "HookManager") -> Iterator[Site]:
    """σ of every norm; one that follows no known formula is refused here, not left out."""
    for layer in range(hm.n_layers):
        for norm in _NORMS:
            part = f"attn.{norm}" if norm in ("q_norm", "k_norm") else norm
            if hm.map.module(hm.root, part, layer) is not None:
                site = Site(f"{layer}.{norm}.scale")
                hm.atlas.point(site)
                yield site
    if hm.map.module(hm.root, "ln_final") is not None:
        yield Site("ln_final.scale")


def _mlps(hm: "HookManager", rule: str) -> Iterator[tuple[int, bool]]:
    """The layers that have an MLP, and whether it is gated."""
    for layer in range(hm.n_layers):
        if not hm.atlas.has(f"{layer}.mlp_out"):
            continue
        lacking = [kind for kind in ("mlp_pre", "mlp_post") if not hm.atlas.has(f"{layer}.{kind}")]
        if lacking:
            raise ModelError(
                f"rule {rule!r} changes the backward pass inside each MLP, and {hm.map.family} has no "
                f"{layer}.{lacking[0]} to do it at ({hm.map.reasons.get(lacking[0], 'no such part')}); use 'frozen_ln'"
            )
        yield layer, hm.atlas.has(f"{layer}.mlp_pre_linear")


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


class _Softened(torch.autograd.Function):
    """Turns a pattern's gradient g into one g′ whose plain softmax backward is the softened one's.

    The plain backward of g′ is p ⊙ (g′ − ⟨p, g′⟩). What it should be is w = s ⊙ (g − ⟨g, s⟩). With g′ = w / p + c this
    holds if c = ⟨p, g′⟩ = Σw + c Σp: c = Σw / (1 − Σp), and c = 0 without a sink, where Σp = 1 and Σw = 0.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, temperature: float, factor: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.temperature, ctx.factor = temperature, factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        p, g = x.float(), grads[0].float()
        rest = 1.0 - p.sum(-1, keepdim=True)
        rest = torch.where(rest > 1e-5, rest, 0.0)
        soft = p ** (1.0 / ctx.temperature)
        soft = soft / (soft.sum(-1, keepdim=True) + rest ** (1.0 / ctx.temperature)).clamp(min=1e-30)
        wanted = soft * (g - (g * soft).sum(-1, keepdim=True))
        shift = torch.where(rest > 0, wanted.sum(-1, keepdim=True) / rest.clamp(min=1e-5), 0.0)
        found = torch.where(p > 0, wanted / p.clamp(min=torch.finfo(torch.float32).tiny), 0.0) + shift
        return (found * ctx.factor).to(grads[0].dtype), None, None


class _Ratio(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(y, x)
        ctx.factor = factor
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        y, x = ctx.saved_tensors
        g = grads[0] * ctx.factor
        away = torch.where(x < 0, -_STABLE, _STABLE)
        return g, g * y / (x + away), None
