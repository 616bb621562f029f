"""Weights per head against the activations that they make, and the folded copy against the model it came from."""

import copy
import functools
import logging
import warnings
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers.activations import ACT2FN

from interp.core.errors import InterpError, ModelError
from interp.core.fold import fold
from interp.core.manager import HookManager
from interp.core.modelmap import ModelMap
from interp.core.points import Atlas
from interp.core.weights import Weights
from tests import oracle
from tests.contract import plain
from tests.families import FAMILIES, VOCAB, make, manager, tokens, word_tokenizer

pytestmark = pytest.mark.contract
every_family = pytest.mark.parametrize("name", list(FAMILIES))
TOLERANCE = 1e-5

EXPERTS = ("Mixtral", "Qwen2Moe", "GptOss")
GATED = ("Llama", "Mistral", "Qwen", "Gemma", "Phi3", "Olmo", "Granite", "StableLm", "Cohere")
"""How the names of families with a gated MLP begin."""
LEARNED_POSITIONS = ("GPT2", "GPTNeo", "OPT", "GPTBigCode")
LAYER_NORMS = [
    name for name in FAMILIES if name.startswith(("GPT", "OPT", "Falcon", "StableLm", "Starcoder", "Cohere"))
]
LAYER_NORMS += ["Phi", "Olmo"]
"""Families whose norms are all LayerNorms, and whose stream begins without one."""
LAYER, BLOCK_WEIGHTS = 1, ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")
MLP_WEIGHTS, GATE_WEIGHTS = ("W_in", "W_out", "b_in", "b_out"), ("W_gate", "b_gate")


def off(a: Tensor, b: Tensor) -> float:
    """The largest difference; infinite where shapes differ."""
    return float((a - b).detach().abs().max()) if a.shape == b.shape else float("inf")


def activation(name: str) -> Any:
    """The MLP's activation function, by the name that the config gives it."""
    config = FAMILIES[name]().get_text_config()
    keys = ("hidden_activation", "hidden_act", "activation_function", "activation")
    found = next((getattr(config, key) for key in keys if getattr(config, key, None)), "gelu_new")  # BLOOM: always
    return ACT2FN[found]


# -- weights ------------------------------------------------------------------------------------------------------


@every_family
def test_what_attention_reads_times_the_weights_is_q_k_and_v(name: str) -> None:
    hm, w = manager(name), manager(name).weights[LAYER]
    x = hm.run(tokens(), read=[f"{LAYER}.attn.in"])[f"{LAYER}.attn.in"]
    by_hand = plain.run(name, make(name), tokens(), read=[(kind, LAYER) for kind in "qkv"]).values
    for kind, weight, bias in (("q", w.W_Q, w.b_Q), ("k", w.W_K, w.b_K), ("v", w.W_V, w.b_V)):
        assert off(torch.einsum("bpm,hmd->bphd", x, weight) + bias, by_hand[kind, LAYER]) < TOLERANCE, kind


@every_family
def test_z_times_the_output_weights_is_the_output_projection(name: str) -> None:
    hm, w = manager(name), manager(name).weights[LAYER]
    z = plain.run(name, make(name), tokens(), read=[("z", LAYER)]).values["z", LAYER]
    layout = plain.LAYOUTS[name]
    projection = hm.root.get_submodule(f"{layout.blocks}.{LAYER}.{layout.o}")
    with torch.no_grad():
        expected = projection(z.flatten(2))
    assert off(torch.einsum("bphd,hdm->bpm", z, w.W_O) + w.b_O, expected) < TOLERANCE


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in EXPERTS])
def test_the_mlp_weights_make_the_neurons_and_what_they_write(name: str) -> None:
    hm, w = manager(name), manager(name).weights[LAYER]
    entry = next(site for site in (f"{LAYER}.mlp.in", f"{LAYER}.ln2.out") if hm.atlas.has(site))
    run = hm.run(tokens(), read=[entry, f"{LAYER}.mlp_post"])
    neurons = run[entry] @ w.W_in + w.b_in
    if name.startswith(GATED):
        neurons = activation(name)(run[entry] @ w.W_gate + w.b_gate) * neurons
    else:
        neurons = activation(name)(neurons)
    assert off(neurons, run[f"{LAYER}.mlp_post"]) < TOLERANCE
    layout = plain.LAYOUTS[name]
    with torch.no_grad():
        written = hm.root.get_submodule(f"{layout.blocks}.{LAYER}.{layout.post}")(run[f"{LAYER}.mlp_post"])
    assert off(run[f"{LAYER}.mlp_post"] @ w.W_out + w.b_out, written) < TOLERANCE


@every_family
def test_embedding_and_unembedding_are_at_the_ends_of_the_model(name: str) -> None:
    hm, ids = manager(name), tokens()
    positions = ["pos_embed"] if name in LEARNED_POSITIONS else []
    run = hm.run(ids, read=["embed", "unembed.in", "unembed.out", *positions])
    scale = hm.d_model**0.5 if "Gemma" in name else 1.0
    embedded = hm.weights.W_E[ids] * scale
    if name == "Bloom":  # normalises what it embeds
        with torch.no_grad():
            embedded = hm.root.get_submodule("transformer.word_embeddings_layernorm")(embedded)
    assert off(embedded, run["embed"]) < TOLERANCE
    assert off(run["unembed.in"] @ hm.weights.W_U + hm.weights.b_U, run["unembed.out"]) < TOLERANCE
    if positions:
        assert off(hm.weights.W_pos[: ids.shape[1]].expand(2, -1, -1), run["pos_embed"]) < TOLERANCE
    else:
        with pytest.raises(ModelError, match="no position embedding"):
            _ = hm.weights.W_pos


@pytest.mark.parametrize("name", oracle.families())
def test_weights_are_those_of_transformer_lens(name: str) -> None:
    hm = manager(name)
    bridge = quiet_bridge(hm)
    checked = set()
    for weight in (*BLOCK_WEIGHTS, *MLP_WEIGHTS, "W_gate", "W_E", "W_U", "b_U"):
        try:
            theirs = getattr(bridge, weight)
        except (AttributeError, TypeError):  # experts, which it has no weights for; biases that some layer lacks
            continue
        if theirs is not None:
            ours = hm.weights.stack(weight) if weight not in ("W_E", "W_U", "b_U") else getattr(hm.weights, weight)
            assert off(ours, theirs) == 0, weight
            checked.add(weight)
    assert {"W_Q", "W_K", "W_V", "W_O", "W_E", "W_U"} <= checked
    assert name in EXPERTS or {"W_in", "W_out"} <= checked


@every_family
def test_norm_weights_give_the_norms_own_output(name: str) -> None:
    hm = manager(name)
    parts = [part for part in ("ln1", "ln1_post", "ln2", "ln2_post", "q_norm", "k_norm") if _norm_path(hm, part)]
    assert parts
    for part in [*parts, "ln_final"]:
        layer = None if part == "ln_final" else LAYER
        norm = hm.weights.norm_weights(layer, part)
        x = 2 * torch.randn(3, *norm.gain.shape) + 0.7
        centred = x - x.mean(-1, keepdim=True) if norm.kind == "LN" else x
        normalized = centred / (centred.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
        with torch.no_grad():
            expected = hm.root.get_submodule(hm.map.path(_norm_path(hm, part), layer))(x)
        assert off(normalized * norm.gain + norm.bias, expected) < TOLERANCE, part
        assert (norm.place == "post") == part.endswith("_post")


def _norm_path(hm: HookManager, part: str) -> str:
    """The part's name in the map, or "" where the model lacks it."""
    return next((p for p in (part, f"attn.{part}") if hm.map.has(p)), "")


@pytest.mark.parametrize("name", ["GPT2", "GPTNeoX", "Bloom", "Falcon", "Llama", "Phi3", "Qwen3"])
def test_weights_are_views_of_the_model(name: str) -> None:
    hm = HookManager.load(make(name), word_tokenizer())
    places = {p.untyped_storage().data_ptr() for p in hm.root.parameters()}
    for weight in ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_out"):
        value = getattr(hm.weights[0], weight)
        assert value.untyped_storage().data_ptr() in places, weight
        assert not value.requires_grad
    before = hm.run(tokens()).logits
    hm.weights[0].W_V[0] = 0
    assert off(hm.run(tokens()).logits, before) > 1e-3


@pytest.mark.parametrize("name", ["GPT2", "Falcon", "Llama", "Gemma"])
def test_the_ov_circuit_is_what_a_head_writes_at_the_only_position(name: str) -> None:
    hm, ids = manager(name), tokens(pos=1)
    run = hm.run(ids, read=[f"{LAYER}.attn.in", f"{LAYER}.result"])
    values = hm.weights[LAYER].b_V.repeat_interleave(hm.n_heads // hm.n_kv_heads, 0)
    for head in range(hm.n_heads):
        circuit = hm.weights.OV(LAYER, head)
        written = run[f"{LAYER}.attn.in"] @ circuit.product + values[head] @ hm.weights[LAYER].W_O[head]
        assert off(written, run[f"{LAYER}.result"][:, :, head]) < TOLERANCE


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Phi3", "Olmo"])
def test_the_qk_circuit_is_the_score_at_distance_zero(name: str) -> None:
    hm = manager(name)
    run = hm.run(tokens(), read=[f"{LAYER}.attn.in", f"{LAYER}.attn_scores"])
    for head in range(hm.n_heads):
        x = run[f"{LAYER}.attn.in"]
        scores = torch.einsum("bpm,mn,bpn->bp", x, hm.weights.QK(LAYER, head).product, x) / hm.d_head**0.5
        assert off(scores, run[f"{LAYER}.attn_scores"][:, head].diagonal(dim1=1, dim2=2)) < 1e-4


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_have_no_neuron_weights_and_say_why(name: str) -> None:
    for weight in (*MLP_WEIGHTS, *GATE_WEIGHTS):
        with pytest.raises(ModelError, match=r"mixture of experts.*3-D"):
            getattr(manager(name).weights[0], weight)


def test_quantised_weights_are_refused_by_name() -> None:
    model = make("Llama")
    projection = model.get_submodule("model.layers.0.self_attn.q_proj")
    projection.weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False)
    weights = Weights(model, Atlas(model, manager("Llama").map))
    with pytest.raises(ModelError, match=r"self_attn\.q_proj.*int8.*unquantised"):
        _ = weights[0].W_Q
    assert weights[0].W_K.shape == (2, 32, 8)


def test_weights_that_were_not_loaded_are_refused() -> None:
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(FAMILIES["Llama"]())
    weights = Weights(model, Atlas(model, manager("Llama").map))
    with pytest.raises(ModelError, match="meta device"):
        _ = weights[0].W_Q


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: w[3], "layers 0 to 2"),
        (lambda w: w[-1], "layers 0 to 2"),
        (lambda w: w["0"], "layers 0 to 2"),
        (lambda w: w[0].W_gate, "not gated"),
        (lambda w: w.OV(0, 4), "heads 0 to 3"),
        (lambda w: w.stack("W_q"), "'W_Q'"),
        (lambda w: w.norm_weights(0, "ln3"), "is no norm"),
        (lambda w: w.norm_weights(0, "ln1_post"), "no part 'ln1_post'"),
        (lambda w: w.norm_weights(None, "ln1"), "layers 0 to 2"),
    ],
)
def test_weights_that_are_not_there_are_refused(call: Any, message: str) -> None:
    with pytest.raises(InterpError, match=message):
        call(manager("GPT2").weights)


# -- the folded copy ----------------------------------------------------------------------------------------------


@functools.cache
def folded(name: str) -> HookManager:
    """`hm.folded()` of one family, made once."""
    return manager(name).folded()


def quiet_bridge(hm: HookManager) -> Any:
    """A TransformerBridge over the manager's weights."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return hm.to_transformer_lens()
    finally:
        logging.disable(logging.NOTSET)


@every_family
def test_the_folded_copy_predicts_the_same_and_leaves_the_model_alone(name: str) -> None:
    hm = HookManager.load(make(name), word_tokenizer())
    before = copy.deepcopy(hm.root.state_dict())
    twin = hm.folded()
    assert all(torch.equal(value, before[key]) for key, value in hm.root.state_dict().items())
    mine, theirs = (h.run(tokens()).logits.log_softmax(-1) for h in (hm, twin))
    assert off(mine, theirs) < TOLERANCE * max(1.0, float(mine.abs().max()) / 10)
    assert type(twin.root) is type(hm.root)


@every_family
def test_norms_of_the_folded_copy_only_normalise(name: str) -> None:
    hm = folded(name)
    norms = [part for part in ("ln1", "ln2") if hm.map.has(part)]
    reads = [f"*.{part}.{what}" for part in norms for what in ("out", "normalized")]
    run = hm.run(tokens(), read=[*reads, "ln_final.out", "ln_final.normalized"])
    for site in run.sites:
        if site.kind.endswith(".out"):
            assert off(run[site], run[site.short.replace(".out", ".normalized")]) < TOLERANCE, site
    capped = name == "Gemma2"
    assert (float(hm.weights.W_U.mean(1).abs().max()) < 1e-6) != capped


@pytest.mark.parametrize("name", LAYER_NORMS)
def test_the_folded_stream_has_mean_zero_where_every_norm_is_a_layer_norm(name: str) -> None:
    raw, centred = (h.run(tokens(), read=["*.resid_pre", "*.resid_post"]) for h in (manager(name), folded(name)))
    for site in centred.sites:
        assert float(centred[site].mean(-1).abs().max()) < 1e-6
        assert off(raw[site] - raw[site].mean(-1, keepdim=True), centred[site]) < TOLERANCE


@pytest.mark.parametrize(
    "name", ["GPT2", "GPTNeo", "GPTJ", "GPTNeoX", "OPT", "Bloom", "Llama", "Qwen2", "Gemma2", "StableLm"]
)
def test_the_folded_copy_is_transformer_lens_compatibility_mode(name: str) -> None:
    bridge, hm = quiet_bridge(manager(name)), folded(name)
    logging.disable(logging.WARNING)
    bridge.enable_compatibility_mode(disable_warnings=True)
    logging.disable(logging.NOTSET)
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(tokens())
    run = hm.run(
        tokens(), read=[f"*.{kind}" for kind in ("resid_pre", "q", "v", "z", "attn_out", "mlp_out")], logits="all"
    )
    assert off(run.logits, logits) < 3 * TOLERANCE
    for site in run.sites:
        assert off(run[site], cache[site.name]) < 3 * TOLERANCE, site
    for weight in ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_out"):
        assert off(hm.weights.stack(weight), getattr(bridge, weight)) < TOLERANCE, weight


@pytest.mark.parametrize("name", ["GPT2", "Gemma3Multimodal"])
def test_tied_embeddings_come_apart_in_the_copy_alone(name: str) -> None:
    hm, ids = manager(name), tokens()
    root: Any = hm.root
    twin: Any
    twin, notes = fold(hm.root, hm.atlas)
    embedding = hm.map.path("embed")
    assert root.lm_head.weight is root.get_submodule(embedding).weight
    assert twin.lm_head.weight is not twin.get_submodule(embedding).weight
    assert any("W_E and W_U" in note for note in notes)
    assert any("from_pretrained" in note for note in notes) == (twin.lm_head.bias is not None)
    for again in (True, False):
        twin.tie_weights(recompute_mapping=again)
    with torch.no_grad():
        assert off(twin(ids).logits.log_softmax(-1), root(ids).logits.log_softmax(-1)) < 3 * TOLERANCE
    assert root.config.tie_word_embeddings
    assert not twin.config.tie_word_embeddings
    assert not twin.config.get_text_config().tie_word_embeddings


def test_a_reader_that_the_map_does_not_know_is_found_by_the_predictions() -> None:
    hm = manager("GPTJ")  # its MLP reads ln1 too, which this map hides
    wrong = ModelMap(**{**vars(hm.map), "parallel": False})
    with pytest.raises(ModelError, match=r"cannot be folded.*off by"):
        fold(hm.root, Atlas(hm.root, wrong))


def test_what_cannot_be_folded_is_refused() -> None:
    config = {**FAMILIES["OPT"]().to_dict(), "do_layer_norm_before": False, "vocab_size": VOCAB}
    post = HookManager.load(tf.OPTForCausalLM(tf.OPTConfig(**config)).eval(), word_tokenizer())
    with pytest.raises(ModelError, match="do_layer_norm_before"):
        post.folded()
    training = HookManager.load(make("GPT2").train(), word_tokenizer())
    with pytest.raises(ModelError, match="eval"):
        training.folded()


def test_tied_embeddings_are_said_to_be_one_tensor() -> None:
    tied, loose = manager("GPT2").weights, manager("GPTNeoX").weights
    assert tied.tied
    assert "W_E and W_U are one tensor" in repr(tied)
    assert not loose.tied
    assert torch.equal(tied.W_E.T, tied.W_U)
