"""Backward rules against a hand-written model with detached terms; paths; the softmaxes of AtP*."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from interp.core.attribute import POINTS, Path, gradient_run, path_of
from interp.core.errors import ConfigError
from interp.core.frame import Frame
from interp.core.intervention import FreezePattern
from interp.core.manager import HookManager
from interp.core.place import Place
from interp.core.rules import RULES, Fork, SoftenedPattern, StopGradient, check_rule, rule_edits
from interp.core.run import Run
from interp.core.site import Site
from interp.core.where import Where
from interp.patching.estimates.atp import key_effect, query_effect
from interp.testbed.nano import NanoOptions, nano

pytestmark = pytest.mark.unit

D, HEADS, KV, HEAD, LAYERS = 12, 4, 2, 5, 2


def model_of(mlp: str, norm: str = "layer", act: str = "gelu") -> HookManager:
    """Two layers with grouped keys, every weight and gain away from its default."""
    options = NanoOptions(
        d_vocab=20, n_layers=LAYERS, d_model=D, n_heads=HEADS, n_kv_heads=KV, d_head=HEAD, mlp=mlp, norm=norm, act=act
    )
    model = nano(options, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.4 * torch.randn(parameter.shape, generator=generator)
    return HookManager.load(model)


IDS = torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(0))


def metric(out: Run) -> Tensor:
    return out.logits[:, 0, 3] - out.logits[:, 0, 7]


def scaled(x: Tensor, factor: float) -> Tensor:
    """x with its gradient multiplied."""
    return factor * x + ((1 - factor) * x).detach()


def by_hand(hm: HookManager, rule: str, start: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The nano model from its embeddings, each rule written with detached terms; its tensors and the metric."""
    model: Any = hm.model
    kept: dict[str, Tensor] = {}
    frozen, gim, relp = rule != "plain", rule == "gim", rule.startswith("relp")

    def norm(x: Tensor, module: Any) -> Tensor:
        centred = x - x.mean(-1, keepdim=True) if isinstance(module, torch.nn.LayerNorm) else x
        sigma = (centred.pow(2).mean(-1, keepdim=True) + module.eps).sqrt()
        y = centred / (sigma.detach() if frozen else sigma) * module.weight
        return y + module.bias if getattr(module, "bias", None) is not None else y

    def attention(x: Tensor, layer: int, module: Any) -> Tensor:
        q, k, v = (getattr(module, f"{name}_proj")(x).unflatten(-1, (-1, HEAD)) for name in "qkv")
        kept.update({f"{layer}.q": q, f"{layer}.k": k, f"{layer}.v": v})
        if gim:
            q, k, v = scaled(q, 0.25), scaled(k, 0.25), scaled(v, 0.5)
        k, v = k.repeat_interleave(HEADS // KV, 2), v.repeat_interleave(HEADS // KV, 2)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * HEAD**-0.5
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
        pattern = scores.softmax(-1)
        if gim:  # softmax(s / 2) has the derivative of temperature 2, times 1/2
            soft = (scores / 2).softmax(-1) * 2
            pattern = pattern.detach() + soft - soft.detach()
        pattern = pattern.detach() if rule == "relp_ah" else pattern
        z = torch.einsum("bhij,bjhd->bihd", pattern, v)
        kept[f"{layer}.z"] = z
        return module.o_proj(z.flatten(2))

    def mlp(x: Tensor, layer: int, module: Any) -> Tensor:
        gate = module.up_proj(x) if module.gate_proj is None else module.gate_proj(x)
        kept[f"{layer}.mlp_pre"] = gate
        f = module.act_fn(gate)
        if relp:
            f = gate * (f / (gate + torch.where(gate < 0, -1e-6, 1e-6))).detach()
        post = f if module.gate_proj is None else f * module.up_proj(x)
        post = scaled(post, 0.5) if module.gate_proj is not None and (gim or relp) else post
        kept[f"{layer}.mlp_post"] = post
        return module.down_proj(post)

    x = start
    for layer, block in enumerate(model.model.layers):
        x = x + attention(norm(x, block.input_layernorm), layer, block.self_attn)
        x = x + mlp(norm(x, block.post_attention_layernorm), layer, block.mlp)
    logits = model.lm_head(norm(x, model.model.norm))[:, -1]
    return kept, logits[:, 3] - logits[:, 7]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("mlp", "norm"), [("plain", "layer"), ("gated", "rms"), ("bilinear", "layer")])
def test_a_rule_is_the_hand_written_model_with_its_terms_detached(rule: str, mlp: str, norm: str) -> None:
    hm = model_of(mlp, norm)
    kinds = ("q", "k", "v", "z", "mlp_pre", "mlp_post")
    reads = ["0.resid_pre", *(f"{layer}.{kind}" for layer in range(LAYERS) for kind in kinds)]
    run = gradient_run(hm, hm.to_tokens(IDS), read=reads, metric=metric, rule=rule)
    start = run["0.resid_pre"].clone().requires_grad_(True)
    kept, value = by_hand(hm, rule, start)
    assert run.metric is not None and torch.allclose(run.metric, value, atol=1e-5)
    names = [name for name in reads if name in kept]
    found = torch.autograd.grad(value.sum(), [start, *(kept[name] for name in names)], allow_unused=True)
    for name, gradient in zip(["0.resid_pre", *names], found, strict=True):
        wanted = torch.zeros_like(run[name]) if gradient is None else gradient
        size = float(wanted.abs().max()) + 1e-3
        assert float((run.grad[name] - wanted).abs().max()) < 1e-4 * size, name
    if rule != "plain":
        other = by_hand(hm, "plain", start)[1]
        (plain,) = torch.autograd.grad(other.sum(), start)
        assert float((plain - found[0]).abs().max()) > 1e-2, "the rule says something else than the derivative"


def test_the_slope_of_an_activation_function_is_finite_at_zero() -> None:
    hm = model_of("plain")
    model: Any = hm.model
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.up_proj.weight.zero_()
            block.mlp.up_proj.bias.zero_()
    run = gradient_run(hm, hm.to_tokens(IDS), read=["0.mlp_pre"], metric=metric, rule="relp")
    assert torch.equal(run["0.mlp_pre"], torch.zeros_like(run["0.mlp_pre"]))
    assert torch.equal(run.grad["0.mlp_pre"], torch.zeros_like(run["0.mlp_pre"]))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("sink", [False, True])
def test_a_softened_pattern_has_the_backward_of_that_temperature(temperature: float, sink: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    scores = (3 * torch.randn(2, 5, 7, generator=generator)).requires_grad_(True)
    g = torch.randn(2, 5, 7, generator=generator)
    mask = torch.ones(5, 7, dtype=torch.bool).tril(2)
    masked = scores.masked_fill(~mask, torch.finfo(torch.float32).min)
    column = torch.full((2, 5, 1), 0.8)

    def pattern(x: Tensor) -> Tensor:
        return (torch.cat([x, column / (1 if x is masked else temperature)], -1) if sink else x).softmax(-1)[..., :7]

    frame = Frame(ids=None, mask=None, batch=2, length=5, prompt_length=5)
    place = Place(Site("0.pattern"), frame, Where())
    edited = SoftenedPattern("0.pattern", temperature, 0.25).edit(pattern(masked), place)
    assert torch.equal(edited, pattern(masked))
    (found,) = torch.autograd.grad((edited * g).sum(), scores)
    soft = pattern(masked / temperature) if temperature > 1 else pattern(masked)
    wanted = torch.where(mask, soft * (g - (soft * g).sum(-1, keepdim=True)), 0.0) * 0.25
    assert torch.allclose(found, wanted, atol=1e-6)


def test_rules_leave_nothing_behind_and_are_made_for_one_run() -> None:
    hm = model_of("gated")
    edits = rule_edits(hm, "relp")
    hm.run(IDS, read=["0.z"], write=edits, grad=metric, logits="last")
    held = [edit.held for edit in edits if hasattr(edit, "held")]
    assert held and not any(held)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in hm.model.modules()]
    assert not any(hooks)


def test_a_fork_has_the_branch_s_gradient_and_the_stream_keeps_its_own() -> None:
    hm = model_of("plain")
    tokens = hm.to_tokens(IDS)
    whole = gradient_run(hm, tokens, read=["1.resid_pre", "1.resid_mid"], metric=metric)
    forked = gradient_run(hm, tokens, read=["1.attn_in"], metric=metric, write=[Fork("1.attn_in")])
    branch = whole.grad["1.resid_pre"] - whole.grad["1.resid_mid"]
    assert float(branch.abs().max()) > 1e-2
    assert torch.allclose(forked.grad["1.attn_in"], branch, atol=1e-5)


def test_a_stopped_gradient_is_zero_at_the_site_and_what_comes_before_has_the_other_ways() -> None:
    hm = model_of("plain")
    tokens = hm.to_tokens(IDS)
    cut = [StopGradient("0.attn_out"), StopGradient("0.mlp_out")]
    run = gradient_run(hm, tokens, read=["0.attn_out", "0.z", "0.resid_pre", "1.resid_pre"], metric=metric, write=cut)
    assert not run.grad["0.attn_out"].any() and not run.grad["0.z"].any()
    assert torch.allclose(run.grad["0.resid_pre"], run.grad["1.resid_pre"], atol=1e-6)


def test_the_ah_rule_is_frozen_patterns() -> None:
    hm = model_of("gated")
    tokens = hm.to_tokens(IDS)
    ah = gradient_run(hm, tokens, read=["0.resid_pre"], metric=metric, rule="relp_ah")
    same = gradient_run(hm, tokens, read=["0.resid_pre"], metric=metric, rule="relp", write=[FreezePattern()])
    assert torch.allclose(ah.grad["0.resid_pre"], same.grad["0.resid_pre"], atol=1e-6)


@pytest.mark.parametrize("points", POINTS)
def test_the_points_of_a_path_weigh_one_and_integrate_what_they_should(points: str) -> None:
    for steps in (1, 3, 8):
        places = Path("inputs_ig", steps, points).places
        assert len(places) == steps and sum(w for _, w in places) == pytest.approx(1)
        degree = {"midpoint": 1, "left": 0, "gauss": 2 * steps - 1}[points]
        for power in range(degree + 1):
            assert sum(w * x**power for x, w in places) == pytest.approx(1 / (power + 1)), power
        wrong = sum(w * x ** (degree + 1) for x, w in places)
        assert wrong != pytest.approx(1 / (degree + 2), rel=1e-12)
    assert Path().places == [(0.0, 1.0)] and path_of("inputs_ig") == Path("inputs_ig")


@pytest.mark.usefixtures("unchecked")
def test_unknown_rules_and_paths_are_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="relp"):
        check_rule("relpp")
    with pytest.raises(ConfigError, match="inputs_ig"):
        Path("input_ig")
    with pytest.raises(ConfigError, match="midpoint"):
        Path("inputs_ig", points="midpoints")
    with pytest.raises(ConfigError, match="≥ 1"):
        Path("inputs_ig", steps=0)


@pytest.mark.parametrize("sink", [0.0, 30.0])
def test_exact_softmax_changes_of_queries_and_keys(sink: float) -> None:
    generator = torch.Generator().manual_seed(4)
    scores = 4 * torch.randn(3, 6, 6, generator=generator)
    shift = 8 * torch.randn(3, 6, 6, generator=generator)
    shift[0] *= 1 if sink else 20  # a patch that turns the pattern over, past what exp can hold
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    scores, shift = scores.masked_fill(~mask, -1e30), shift * mask
    g = torch.randn(3, 6, 6, generator=generator)

    def pattern(x: Tensor) -> Tensor:
        wide = F.pad(x.double(), (0, 1), value=torch.tensor(sink).log().item() if sink else -torch.inf)
        return wide.softmax(-1)[..., :6]

    p, logs = pattern(scores), pattern(scores).log().float()
    rows = ((pattern(scores + shift) - p) * g).sum(-1)
    assert torch.allclose(query_effect(logs, shift, g).double(), rows, atol=1e-5)
    keys = torch.zeros(3, 6, dtype=torch.float64)
    for key in range(6):
        one = torch.zeros_like(shift)
        one[..., key] = shift[..., key]
        keys[:, key] = ((pattern(scores + one) - p) * g).sum((-1, -2))
    assert torch.allclose(key_effect(logs, shift, g).double(), keys, atol=1e-5)
    slope = (p * (g - (p * g).sum(-1, keepdim=True)) * shift).sum(-2)
    assert torch.allclose(key_effect(p.log(), 1e-6 * shift.double(), g.double()) * 1e6, slope, atol=1e-2)
