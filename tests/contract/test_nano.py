"""Nano models: the laws of every family, and an independent forward in TransformerLens' formulas."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from interp.core.errors import InterpError
from interp.core.intervention import Replace
from interp.core.manager import HookManager
from interp.testbed.nano import NanoOptions, nano, to_transformer_lens_names
from interp.testbed.nano_options import ACTIVATIONS
from tests.contract import laws, laws_edits
from tests.contract.nano_grid import BASE, GRID, among_the_families, every_nano, every_sink, every_sinkless, some_nanos
from tests.families import FAMILIES, make, manager, tokens, word_tokenizer

pytestmark = pytest.mark.contract
TOLERANCE = 1e-5


@pytest.fixture(autouse=True, scope="module")
def _among_the_families() -> Iterator[None]:
    with among_the_families():
        yield


# -- the laws of every family -----------------------------------------------------------------------------------------


@every_nano
def test_reads_obey_the_laws(name: str) -> None:
    found = laws.reading(name)
    assert not found.refused
    assert laws.logits_bit_equal(name)
    assert laws.against_plain(name) <= laws.TOLERANCE
    assert laws.patterns_against_eager(name) <= laws.TOLERANCE
    assert laws.padded_as_unpadded(name) <= laws.TOLERANCE
    assert laws.batched_as_single(name) <= laws.TOLERANCE


@some_nanos
def test_edits_obey_the_laws(name: str) -> None:
    assert laws_edits.edits_against_plain(name) <= laws.TOLERANCE
    assert laws_edits.reads_see_edits(name) <= laws.TOLERANCE
    inside, outside = laws_edits.touches_only_where(name)
    assert inside > 0.5
    assert outside <= 1e-5


@some_nanos
def test_edits_that_change_nothing_obey_the_laws(name: str) -> None:
    for idle in (laws_edits.clean_into_clean(name), laws_edits.zero_strength(name)):
        assert idle.same == 0
        assert idle.rounded <= laws.TOLERANCE
        assert not idle.silent


@every_nano
def test_gradients_obey_the_laws(name: str) -> None:
    assert laws_edits.gradients(name) <= laws.TOLERANCE
    assert laws_edits.pattern_gradients(name) <= laws.TOLERANCE


@every_nano
def test_generation_obeys_the_laws(name: str) -> None:
    assert laws_edits.generation(name) <= laws.TOLERANCE
    assert laws_edits.ragged_generation(name) <= laws.TOLERANCE


@every_nano
def test_the_stream_is_the_sum_of_its_parts(name: str) -> None:
    if GRID[name].d_mlp:
        assert laws.residual_identity(name) <= laws.TOLERANCE
        return
    out = laws.reading(name).run
    for layer in range(2):
        assert laws.largest(out["resid_pre", layer] + out["attn_out", layer], out["resid_post", layer]) <= TOLERANCE


@every_sinkless
def test_patterns_mix_values_and_are_the_softmax_of_scores(name: str) -> None:
    assert laws.pattern_times_v(name) <= laws.TOLERANCE
    assert laws.scores_softmax(name) <= laws.TOLERANCE
    assert laws_edits.pattern_edits(name) <= laws.TOLERANCE
    if GRID[name].positions == "rotary":
        assert laws_edits.rotary_edits(name) <= laws.TOLERANCE


@every_nano
def test_packed_documents_do_not_see_each_other(name: str) -> None:
    model, first, second = make(name), tokens(1, 5, seed=1), tokens(1, 7, seed=2)
    places = torch.cat([torch.arange(5), torch.arange(7)])[None]
    with torch.no_grad():
        both = model(torch.cat([first, second], 1), position_ids=places, use_cache=False).logits
        alone = torch.cat([model(ids, use_cache=False).logits for ids in (first, second)], 1)
    assert laws.largest(both, alone) <= TOLERANCE


@pytest.mark.parametrize("name", ["NanoGPT", "NanoLlama", "NanoBilinear", "NanoSinkGrouped", "NanoAttentionNormless"])
def test_a_folded_copy_predicts_the_same(name: str) -> None:
    hm, ids = manager(name), tokens()
    want, got = (h.run(ids).logits.log_softmax(-1) for h in (hm, hm.folded()))
    assert laws.largest(want, got) <= laws.TOLERANCE


def test_patterns_of_the_grid_are_far_from_uniform() -> None:
    for name in GRID:
        last = laws.reading(name).run["0.pattern"][:, :, -1]
        assert (last.max(-1).values / last.mean(-1)).mean() > 3, name


# -- an independent forward, in TransformerLens' formulas and names ---------------------------------------------------


def activation(name: str, x: Tensor) -> Tensor:
    cubic = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return {
        "gelu": 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
        "gelu_new": 0.5 * x * (1 + cubic.tanh()),
        "linear": x,
        "relu": x.clamp(min=0),
        "relu2": x.clamp(min=0) ** 2,
        "sigmoid": 1 / (1 + (-x).exp()),
        "silu": x / (1 + (-x).exp()),
        "tanh": x.tanh(),
    }[name]


class Oracle:
    """One forward over weights named and shaped as TransformerLens names and shapes them, all of it einsum.

    The extra slot (k′, v′) is a key and a value more, in the last place of the softmax.
    """

    def __init__(self, options: NanoOptions, state: dict[str, Tensor]) -> None:
        self.o, self.W = options, state
        self.found: dict[str, Tensor] = {}

    def bias(self, name: str) -> Tensor | float:
        return self.W.get(name, 0.0)

    def norm(self, x: Tensor, name: str) -> Tensor:
        if self.o.norm == "none":
            return x
        x = x - x.mean(-1, keepdim=True) if self.o.norm == "layer" else x
        x = x / (x.pow(2).mean(-1, keepdim=True) + self.o.norm_eps).sqrt()
        return x * self.W.get(f"{name}.w", 1.0) + self.bias(f"{name}.b")

    def turned(self, x: Tensor) -> Tensor:
        """Rotary as a product of complex numbers."""
        if self.o.positions != "rotary":
            return x
        half = x.shape[-1] // 2
        angle = torch.arange(x.shape[1])[:, None] / self.o.rotary_base ** (torch.arange(half) / half)
        z = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angle)[None, :, None]
        return torch.cat([z.real, z.imag], dim=-1)

    def heads(self, x: Tensor, at: str, letter: str) -> Tensor:
        mark = "_" if f"{at}_W_{letter}" in self.W else ""
        y = torch.einsum("bpd,hde->bphe", x, self.W[f"{at}{mark}W_{letter}"]) + self.bias(f"{at}{mark}b_{letter}")
        return self.turned(y) if letter in "QK" else y

    def attention(self, x: Tensor, at: str, layer: int) -> Tensor:
        n = x.shape[1]
        placed = x + self.W["pos_embed.W_pos"][:n] if self.o.positions == "shortformer" else x
        q, k, v = self.heads(placed, at, "Q"), self.heads(placed, at, "K"), self.heads(x, at, "V")
        if self.o.sink:
            k = torch.cat([k, self.W[f"{at}sink_K"].expand(x.shape[0], 1, -1, -1)], dim=1)
            v = torch.cat([v, self.W[f"{at}sink_V"].expand(x.shape[0], 1, -1, -1)], dim=1)
        k, v = (t.repeat_interleave(self.o.n_heads // t.shape[2], dim=2) for t in (k, v))
        scale = self.o.attention_scale or 1 / math.sqrt(q.shape[-1])
        scores = torch.einsum("bqhe,bkhe->bhqk", q, k) * scale
        hidden = torch.ones(n, k.shape[1], dtype=torch.bool).triu(1)
        hidden[:, n:] = False
        pattern = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        z = torch.einsum("bhqk,bkhe->bqhe", pattern, v)
        self.found |= {f"{layer}.pattern": pattern[..., :n], f"{layer}.z": z, f"{layer}.slot": pattern[..., n:]}
        return torch.einsum("bqhe,hed->bqd", z, self.W[f"{at}W_O"]) + self.bias(f"{at}b_O")

    def mlp(self, x: Tensor, at: str) -> Tensor:
        linear = x @ self.W[f"{at}W_in"] + self.bias(f"{at}b_in")
        if self.o.mlp == "plain":
            post = activation(self.o.act, linear)
        else:
            gate = x @ self.W[f"{at}W_gate"]
            post = linear * (gate if self.o.mlp == "bilinear" else activation(self.o.act, gate))
        return post @ self.W[f"{at}W_out"] + self.bias(f"{at}b_out")

    def logits(self, ids: Tensor) -> Tensor:
        x = self.W["embed.W_E"][ids]
        if self.o.positions == "learned":
            x = x + self.W["pos_embed.W_pos"][: ids.shape[1]]
        for layer in range(self.o.n_layers):
            at = f"blocks.{layer}."
            self.found[f"{layer}.resid_pre"] = x
            x = x + self.attention(self.norm(x, f"{at}ln1"), f"{at}attn.", layer)
            if self.o.d_mlp != 0:
                x = x + self.mlp(self.norm(x, f"{at}ln2"), f"{at}mlp.")
        return self.norm(x, "ln_final") @ self.W["unembed.W_U"] + self.bias("unembed.b_U")


def oracle(name: str) -> Oracle:
    return Oracle(GRID[name], to_transformer_lens_names(make(name)))


# Not called "name": these run under the type checker.
@pytest.mark.parametrize("kind", list(GRID))
def test_the_model_is_the_formula(kind: str) -> None:
    want, hm = oracle(kind), HookManager.load(make(kind), word_tokenizer())
    logits = want.logits(tokens())
    read = [f"{layer}.{part}" for layer in range(2) for part in ("resid_pre", "pattern", "z")]
    out = hm.run(tokens(), read=read, logits="all")
    assert laws.largest(out.logits, logits) <= 2e-5
    assert logits.std() > 0.3
    for site in read:
        assert laws.largest(out[site], want.found[site]) <= TOLERANCE, site
    if GRID[kind].sink:
        assert want.found["0.slot"].mean() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_each_activation_is_its_formula(act: str) -> None:
    model, x = nano(replace(BASE, act=act, init_std=0.5)), 3 * torch.randn(2, 3, 32)
    mlp: Any = model.model.layers[0].mlp
    want = activation(act, x @ mlp.up_proj.weight.T) @ mlp.down_proj.weight.T
    assert laws.largest(mlp(x), want) <= 1e-4


def test_the_oracle_can_disagree() -> None:
    want = oracle("NanoSink")
    logits = want.logits(tokens())
    for name in ("blocks.1.attn.sink_V", "blocks.0.attn.b_V", "pos_embed.W_pos", "blocks.1.mlp.b_in", "ln_final.b"):
        other = oracle("NanoSink")
        other.W[name] = other.W[name] + 0.1 * torch.randn_like(other.W[name])
        assert laws.largest(other.logits(tokens()), logits) > 1e-3, name


# -- what each switch means -------------------------------------------------------------------------------------------


def _with_other_positions(name: str) -> tuple[HookManager, HookManager]:
    other = make(name)
    with torch.no_grad():
        other.model.embed_positions.weight.normal_()
    return manager(name), HookManager.load(other)


def test_shortformer_positions_reach_queries_and_keys_and_neither_values_nor_the_stream() -> None:
    reads = ["0.resid_pre", "0.attn.in", "0.v", "0.q", "0.k"]
    a, b = (hm.run(tokens(), read=reads) for hm in _with_other_positions("NanoShort"))
    assert all(torch.equal(a[site], b[site]) for site in reads[:3])
    assert all(laws.largest(a[site], b[site]) > 0.5 for site in reads[3:])
    a, b = (hm.run(tokens(), read=reads) for hm in _with_other_positions("NanoGPT"))
    assert laws.largest(a["0.v"], b["0.v"]) > 0.5


def test_without_positions_the_order_of_what_came_before_does_not_matter() -> None:
    def moved(**changes: Any) -> float:
        hm = HookManager.load(nano(replace(BASE, n_layers=1, init_std=0.5, **changes)))
        ids = tokens(1, 9)
        shuffled = ids[:, [3, 1, 4, 0, 7, 2, 6, 5, 8]]
        return laws.largest(*(hm.run(x).logits[:, -1] for x in (ids, shuffled)))

    assert moved(positions="none") <= TOLERANCE
    assert moved(positions="none", sink=True) <= TOLERANCE
    for positions in ("learned", "rotary", "shortformer"):
        assert moved(positions=positions) > 1e-2


def test_rotary_attention_depends_on_distance_alone() -> None:
    model, ids = make("NanoAttentionNormless"), tokens(1, 9)
    with torch.no_grad():
        a, b = (model(ids, position_ids=torch.arange(9)[None] + start, use_cache=False).logits for start in (0, 11))
        c = model(ids, position_ids=2 * torch.arange(9)[None], use_cache=False).logits
    assert laws.largest(a, b) <= 1e-4
    assert laws.largest(a, c) > 1e-2


@torch.no_grad()
def test_a_bilinear_mlp_is_homogeneous_of_degree_two_and_a_gated_one_is_not() -> None:
    def off(kind: str) -> float:
        mlp: Any = nano(replace(BASE, mlp=kind, bias=False, init_std=0.5)).model.layers[0].mlp
        x = torch.randn(2, 3, 32)
        return laws.largest(mlp(3 * x), 9 * mlp(x))

    assert off("bilinear") <= 1e-3
    assert off("gated") > 0.1


# -- the extra slot ---------------------------------------------------------------------------------------------------


@every_sink
def test_pattern_and_slot_share_one_softmax(name: str) -> None:
    options, found = GRID[name], laws.reading(name)
    assert found.run.logits is not None
    for layer in range(2):
        pattern, v = found.run["pattern", layer], found.run["v", layer]
        value = make(name).model.layers[layer].self_attn.sink_value
        share = 1 - pattern.sum(-1)
        assert 0.01 < share.mean() < 0.99
        v = v.repeat_interleave(options.n_heads // v.shape[2], dim=2)
        extra = value.repeat_interleave(options.n_heads // value.shape[0], dim=0)
        z = torch.einsum("bhqk,bkhd->bqhd", pattern, v) + torch.einsum("bhq,hd->bqhd", share, extra.detach())
        assert laws.largest(z, found.run["z", layer]) <= TOLERANCE
        scores = found.run["attn_scores", layer]
        slot = torch.zeros_like(scores[..., :1])
        assert laws.largest(torch.cat([scores, slot], -1).softmax(-1)[..., :-1], pattern) <= TOLERANCE


@every_sink
def test_an_edited_pattern_leaves_the_slot_the_rest_and_edited_scores_compete_with_it(name: str) -> None:
    options, hm, ids = GRID[name], manager(name), tokens()
    pattern = laws_edits._random_pattern(laws.reading(name).run["0.pattern"].shape)
    value = make(name).model.layers[0].self_attn.sink_value
    extra = value.repeat_interleave(options.n_heads // value.shape[0], dim=0)
    v = laws.reading(name).run["0.v"]
    v = v.repeat_interleave(options.n_heads // v.shape[2], dim=2)
    scores = pattern.log().clamp(min=torch.finfo(torch.float32).min)
    # exp(scores) sums to 1 and the slot's score is 0: each gets half.
    for site, put, share in (
        ("0.pattern", 0.75 * pattern, 0.75),
        ("0.pattern", pattern, 1.0),
        ("0.attn_scores", scores, 0.5),
    ):
        got = hm.run(ids, read=["0.z"], write=[Replace(site, put)])["0.z"]
        want = share * torch.einsum("bhqk,bkhd->bqhd", pattern, v) + (1 - share) * extra.detach()
        assert laws.largest(got, want) <= TOLERANCE


def test_a_slot_that_every_query_looks_for_takes_everything() -> None:
    model = nano(replace(BASE, sink=True, init_std=0.1))
    attention: Any = model.model.layers[0].self_attn
    with torch.no_grad():
        attention.q_proj.bias.fill_(20.0)
        attention.sink_key.fill_(20.0)
    out = HookManager.load(model).run(tokens(), read=["0.pattern", "0.z"])
    assert out["0.pattern"].max() < 1e-6
    assert laws.largest(out["0.z"], attention.sink_value.detach().expand_as(out["0.z"])) <= 1e-6


def test_the_slot_keeps_to_eager_attention() -> None:
    assert make("NanoSink").config._attn_implementation == "eager"
    assert make("NanoGPT").config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="eager"):
        tf.AutoModelForCausalLM.from_config(FAMILIES["NanoSink"](), attn_implementation="sdpa")


# -- sites that are not there -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "site", "message"),
    [
        ("NanoAttention", "0.mlp_out", "attention-only"),
        ("NanoAttention", "0.resid_mid", "use resid_post"),
        ("NanoAttention", "0.mlp_post", "attention-only"),
        ("NanoNormless", "0.ln1.out", "no norms.*use resid_pre"),
        ("NanoNormless", "ln_final.scale", "no norms"),
        ("NanoNormless", "0.attn_in", "use resid_pre"),
        ("NanoGPT", "0.rot_q", "does not rotate"),
        ("NanoGPT", "0.mlp_pre_linear", "not gated"),
        ("NanoLlama", "pos_embed", "pos_embed"),
        ("NanoSinkGrouped", "0.rot_k", "extra key"),
    ],
)
def test_absent_sites_say_why(name: str, site: str, message: str) -> None:
    with pytest.raises(InterpError, match=message):
        manager(name).run(tokens(), read=[site])


@every_nano
def test_the_map_holds_the_settings(name: str) -> None:
    found, want = manager(name).map, GRID[name].resolved()
    sizes = ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_head", "d_vocab")
    assert all(getattr(found, size) == want[size] for size in sizes)
    assert (found.d_mlp, found.rotary) == (want["d_mlp"] or None, want["positions"] == "rotary")


def test_a_module_that_brings_its_map_needs_none_given_and_a_given_one_wins() -> None:
    model = make("NanoGPT")
    own = model.interp_map()
    assert HookManager.load(model).map == own
    assert HookManager.load(model, map=replace(own, family="mine")).map.family == "mine"
