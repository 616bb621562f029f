"""AtP*: attribution patching with exact softmaxes for queries and keys, and with gradients that cannot cancel.

QK fix: a patched query or key moves its pattern so far that a slope says little; the pattern is worked out exactly and
its change dotted with ∂m/∂pattern. GradDrop: a gradient that comes through several layers may cancel; it is taken once
for each layer ℓ with what ℓ adds cut off, and the sizes are averaged.

Source: Kramár et al. (2024), arXiv 2403.00745, §3.1 and §3.2. Departure: each backward of GradDrop has a forward of its
own.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from interp.core.attribute import gradient_run
from interp.core.errors import ModelError
from interp.core.rules import StopGradient
from interp.core.run import Run
from interp.core.site import Site
from interp.core.text import Tokens

if TYPE_CHECKING:
    from interp.core.manager import HookManager

__all__ = ["atp_star", "key_effect", "query_effect"]

_SIDES = {"q": "q", "k": "k", "rot_q": "q", "rot_k": "k"}
Scores = Callable[[Mapping[str, Tensor], Mapping[str, Tensor], Mapping[str, Tensor]], dict[str, Tensor]]


def atp_star(
    hm: "HookManager",
    patched: Tokens,
    other: Tokens,
    *,
    reads: Sequence[str],
    metric: Callable[[Run], Float[Tensor, " row"]],
    score: Scores,
) -> dict[str, Float[Tensor, "row pos unit"]]:
    """Return the sizes of effects, one place at a time: Σ_ℓ |effect with layer ℓ cut off| / (n_layers − 1).

    Cost: n_layers forwards and backwards more than plain attribution. Memory: the patterns of the layers whose q or k
    are asked, and their gradients.

    Args:
        hm: the model.
        patched: the rows that a patch acts on.
        other: the rows whose activations are put in.
        reads: the places.
        metric: of a run of the rows.
        score: maps values, values put in and gradients by place to scores by place.

    Raises:
        ModelError: a model of one layer, or scores that are no multiple of q · k.
    """
    if hm.n_layers < 2:
        raise ModelError("rule 'atp*' leaves out each layer in turn and this model has one; use 'plain'")
    fixed = [name for name in reads if Site(name).kind in _SIDES]
    pair = {name: _pair_of(hm, Site(name)) for name in fixed}
    extra = list(dict.fromkeys(site for names in pair.values() for site in names))
    patterns = list(dict.fromkeys(f"{Site(name).layer}.pattern" for name in fixed))
    squares = [*patterns, *(name.replace("pattern", "attn_scores") for name in patterns)]
    run = hm.run(patched, read=list(dict.fromkeys([*reads, *extra, *squares])))
    there = hm.run(other, read=list(dict.fromkeys([*reads, *extra])))
    values = ({name: run[name] for name in reads}, {name: there[name] for name in reads})
    total: dict[str, Tensor] = {}
    for layer in range(hm.n_layers):
        cut = [StopGradient(f"{layer}.{k}") for k in ("attn_out", "mlp_out") if hm.atlas.has(f"{layer}.{k}")]
        graded = gradient_run(hm, patched, read=[*reads, *patterns], metric=metric, write=cut)
        found = score(*values, {name: graded.grad[name] for name in reads})
        for name in fixed:
            found[name] = _exact(hm, name, pair[name], run, there, graded.grad[f"{Site(name).layer}.pattern"])
        for place, part in found.items():
            total[place] = total.get(place, 0) + part.abs()
    return {place: value / (hm.n_layers - 1) for place, value in total.items()}


def query_effect(
    log_pattern: Float[Tensor, "*n pos src"], shift: Float[Tensor, "*n pos src"], gradient: Float[Tensor, "*n pos src"]
) -> Float[Tensor, "*n pos"]:
    """Return (p′ − p) · g of rows whose scores all change: what patching each query does.

    Args:
        log_pattern: log p, −∞ where masked; rows of p may sum to less than 1, where a sink takes a share.
        shift: change of the scores.
        gradient: g = ∂m/∂p.
    """
    rest = _rest(log_pattern.exp()).log()
    # Both by one formula: no shift is exactly no effect.
    new, old = (torch.cat([logs, rest], dim=-1).softmax(-1) for logs in (log_pattern + shift, log_pattern))
    return ((new - old)[..., :-1] * gradient).sum(-1)


def key_effect(
    log_pattern: Float[Tensor, "*n pos src"], shift: Float[Tensor, "*n pos src"], gradient: Float[Tensor, "*n pos src"]
) -> Float[Tensor, "*n src"]:
    """Return Σ over queries of (p′ − p) · g where one key at a time changes its scores; arguments as for queries.

    With the other keys' share o and their mean gradient ḡ: (p′ − p)(g − ḡ), where p′ / (1 − p′) = e^δ p / o.
    """
    pattern = log_pattern.exp()
    others = _all_but_one(pattern) + _rest(pattern)
    mean = _all_but_one(pattern * gradient) / others.clamp(min=torch.finfo(others.dtype).tiny)
    odds = log_pattern - others.log()
    change = torch.where(others > 0, torch.sigmoid(odds + shift) - torch.sigmoid(odds), 0.0)
    return (change * (gradient - mean)).sum(-2)


def _rest(pattern: Float[Tensor, "*n pos src"]) -> Float[Tensor, "*n pos one"]:
    """What a sink takes of each row; less than rounding explains is none."""
    rest = 1.0 - pattern.sum(-1, keepdim=True)
    return torch.where(rest > 1e-5, rest, 0.0)


def _all_but_one(x: Float[Tensor, "*n src"]) -> Float[Tensor, "*n src"]:
    """The sum of all entries but each one, without taking it from the whole: that would leave rounding alone."""
    before = F.pad(x.cumsum(-1)[..., :-1], (1, 0))
    after = F.pad(x.flip(-1).cumsum(-1).flip(-1)[..., 1:], (0, 1))
    return before + after


def _pair_of(hm: "HookManager", site: Site) -> tuple[str, str]:
    """The queries and keys that the scores of a layer are made from."""
    kinds = ("rot_q", "rot_k") if hm.map.rotary else ("q", "k")
    names = (f"{site.layer}.{kinds[0]}", f"{site.layer}.{kinds[1]}")
    for name in names:
        hm.atlas.point(Site(name))
    return names


def _exact(
    hm: "HookManager", name: str, pair: tuple[str, str], run: Run, there: Run, gradient: Tensor
) -> Float[Tensor, "row pos unit"]:
    """The effect of a layer's queries or keys, each put in alone."""
    layer, kind = Site(name).layer, _SIDES[Site(name).kind]
    pattern, scores = run[f"{layer}.pattern"].float(), run[f"{layer}.attn_scores"].float()
    q, k = (run[site].float() for site in pair)
    new_q, new_k = (there[site].float() for site in pair)
    cap = getattr(hm.config, "attn_logit_softcapping", None)
    seen = scores > torch.finfo(torch.float16).min
    raw = torch.where(seen, scores, 0.0)
    raw = raw if not cap else torch.atanh((raw / cap).clamp(-1 + 1e-6, 1 - 1e-6)) * cap
    factor = _factor(hm, raw, torch.where(seen, _products(q, k), 0.0))
    products = _products(new_q, k) if kind == "q" else _products(q, new_k)
    now = products * factor if not cap else torch.tanh(products * factor / cap) * cap
    old = _products(q, k) * factor
    old = old if not cap else torch.tanh(old / cap) * cap
    shift = torch.where(seen, now - old, 0.0)
    # A row that sees nothing is a pad's; nothing depends on it.
    real = seen.any(-1, keepdim=True)
    whole = pattern.sum(-1, keepdim=True)
    logs = torch.where(seen, scores, -torch.inf).masked_fill(~real, 0.0).log_softmax(-1)
    logs = logs + torch.where(whole < 1 - 1e-5, whole, 1.0).log()
    g = torch.where(real, gradient.float(), 0.0)
    if kind == "q":
        return query_effect(logs, shift, g).transpose(1, 2)
    found = key_effect(logs, shift, g).transpose(1, 2)
    return found.unflatten(2, (k.shape[2], -1)).sum(-1)


def _products(
    q: Float[Tensor, "row pos n_heads d_head"], k: Float[Tensor, "row src n_kv_heads d_head"]
) -> Float[Tensor, "row n_heads pos src"]:
    groups = q.shape[2] // k.shape[2]
    return torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(groups, dim=2))


def _factor(hm: "HookManager", raw: Tensor, products: Tensor) -> Tensor:
    """What the model multiplies q · k by, found by least squares and checked."""
    factor = (raw * products).sum() / (products * products).sum().clamp(min=1e-12)
    off, size = float((raw - factor * products).abs().max()), float(raw.abs().max())
    if not off <= (1e-3 if hm.dtype in (torch.float32, torch.float64) else 5e-2) * max(1.0, size):
        raise ModelError(
            f"{hm.map.family}'s attention scores are no multiple of q · k (off by {off:.1e}; position terms?), so the "
            "QK fix of 'atp*' does not hold there; use 'plain' for q and k"
        )
    return factor
