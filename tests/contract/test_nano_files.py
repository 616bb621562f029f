"""Nano models on disk, in transformers' hands and under TransformerLens' names; what is refused."""

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from interp.core.errors import ArtifactError, ConfigError, ModelError
from interp.core.manager import HookManager, sites_of
from interp.testbed.nano import (
    NanoOptions,
    from_transformer_lens,
    load_nano,
    nano,
    nano_config,
    to_transformer_lens_cfg,
    to_transformer_lens_names,
)
from tests.contract import laws
from tests.contract.nano_grid import BASE, GRID, among_the_families, every_nano
from tests.families import VOCAB, make, manager, tokens, word_tokenizer

pytestmark = pytest.mark.contract
TOLERANCE = 1e-5


@pytest.fixture(autouse=True, scope="module")
def _among_the_families() -> Iterator[None]:
    with among_the_families():
        yield


# -- transformers' side -----------------------------------------------------------------------------------------------


@every_nano
def test_save_and_load_give_the_same_model(name: str, tmp_path: Path) -> None:
    model, want = make(name), manager(name).run(tokens()).logits
    model.save_pretrained(tmp_path)
    hm = HookManager.load(tmp_path)
    assert hm.tokenizer is None
    again = load_nano(tmp_path)
    assert not again.training
    for other in (hm.model, again):
        assert torch.equal(HookManager.load(other).run(tokens()).logits, want)
        state = other.state_dict()
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
        assert other.config.to_dict().items() >= GRID[name].resolved().items()
    assert [site.short for site in sites_of(str(tmp_path))] == [site.short for site in manager(name).sites()]


def test_config_json_holds_every_setting_so_that_other_defaults_change_no_saved_model(tmp_path: Path) -> None:
    nano().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert written.items() >= NanoOptions().resolved().items()


def test_a_tied_model_has_one_matrix_on_disk_too(tmp_path: Path) -> None:
    make("NanoTied").save_pretrained(tmp_path)
    for model in (make("NanoTied"), load_nano(tmp_path), HookManager.load(tmp_path).model):
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert HookManager.load(model).weights.tied
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert not HookManager.load(make("NanoGPT")).weights.tied


def test_a_folder_with_a_tokenizer_brings_it(tmp_path: Path) -> None:
    make("NanoGPT").save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    hm = HookManager.load(tmp_path)
    assert hm.to_tokens("w5 w6").ids.tolist() == [[5, 6]]


def test_dtypes_and_copies_work() -> None:
    model = copy.deepcopy(make("NanoSinkGrouped")).to(torch.bfloat16)
    out = HookManager.load(model).run(tokens(), read=["0.pattern", "0.z"], logits="all")
    want = laws.reading("NanoSinkGrouped").run
    assert out["0.z"].dtype == out.logits.dtype == torch.bfloat16
    assert laws.largest(out["0.pattern"], want["0.pattern"]) < 0.2


def test_labels_and_kept_logits_are_the_whole_forwards() -> None:
    model, ids = make("NanoNormless"), tokens()
    with torch.no_grad():
        out = model(ids, labels=ids)
        whole = out.logits
        assert whole.shape == (2, 12, VOCAB + 3)
        want = F.cross_entropy(whole[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert torch.allclose(out.loss, want, atol=1e-6)
        assert torch.equal(model(ids, logits_to_keep=3).logits, whole[:, -3:])
        assert torch.equal(model(ids, logits_to_keep=torch.tensor([0, 5])).logits, whole[:, [0, 5]])
        embeds = model.get_input_embeddings()(ids)
        assert torch.equal(model(inputs_embeds=embeds).logits, whole)
        with pytest.raises(ValueError, match="not both"):
            model(ids, inputs_embeds=embeds)


@every_nano
def test_steps_on_a_cache_continue_where_it_ends(name: str) -> None:
    model, ids = make(name), tokens()
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        first = model(ids[:, :7], use_cache=True)
        second = model(ids[:, 7:], past_key_values=first.past_key_values, use_cache=True)
    assert laws.largest(torch.cat([first.logits, second.logits], 1), whole) <= TOLERANCE


@every_nano
def test_every_parameter_learns(name: str) -> None:
    model = copy.deepcopy(make(name)).train()
    model(tokens(), labels=tokens(), use_cache=False).loss.backward()
    still = [key for key, p in model.named_parameters() if p.grad is None or not bool(p.grad.abs().max() > 0)]
    # A key bias shifts all scores of a query alike, unless there is a slot or a rotation.
    fixed = [key for key in still if key.endswith("k_proj.bias")]
    assert still == fixed


def test_seeds_and_spreads_of_new_weights_are_those_asked_for() -> None:
    options = replace(BASE, d_model=128, d_mlp=512, init_std=0.3, embed_std=0.7, out_std=0.01, sink=True)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, same, other = nano(options, seed=1), nano(options, seed=1), nano(options, seed=2)
    assert torch.equal(torch.rand(1), expected)
    pairs = list(zip(first.state_dict().items(), same.state_dict().values(), other.state_dict().values(), strict=True))
    assert all(torch.equal(a, b) for (_, a), b, _ in pairs)
    assert not any(torch.equal(a, c) for (key, a), _, c in pairs if key.endswith("weight") and "norm" not in key)
    spread = {key: float(p.detach().std()) for key, p in first.named_parameters()}
    for part, std in (("q_proj", 0.3), ("up_proj", 0.3), ("lm_head", 0.3), ("o_proj", 0.01), ("down_proj", 0.01)):
        found = [s for key, s in spread.items() if f"{part}.weight" in key]
        assert found and found == pytest.approx([std] * len(found), rel=0.1)
    assert spread["model.embed_tokens.weight"] == pytest.approx(0.7, rel=0.1)
    assert spread["model.layers.0.self_attn.sink_key"] == pytest.approx(0.3, rel=0.3)
    assert nano_config(BASE).out_std == pytest.approx(0.01)


# -- TransformerLens' names -------------------------------------------------------------------------------------------


@every_nano
def test_weights_go_to_transformer_lens_names_and_back(name: str, tmp_path: Path) -> None:
    model = make(name)
    state, cfg = to_transformer_lens_names(model), to_transformer_lens_cfg(model)
    again = from_transformer_lens(state, cfg)
    assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())
    assert torch.equal(HookManager.load(again).run(tokens()).logits, manager(name).run(tokens()).logits)
    buffers = {"blocks.0.attn.mask": torch.ones(2, 2), "blocks.1.attn.IGNORE": torch.tensor(-torch.inf)}
    save_file({key: value.contiguous() for key, value in (state | buffers).items()}, tmp_path / "model.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps(cfg), encoding="utf-8")
    stored = from_transformer_lens(tmp_path).state_dict()
    assert all(torch.equal(stored[key], value) for key, value in again.state_dict().items())


def test_names_and_shapes_are_transformer_lens_own() -> None:
    shapes = {key: tuple(value.shape) for key, value in to_transformer_lens_names(make("NanoSinkGrouped")).items()}
    assert shapes["embed.W_E"] == (VOCAB, 32)
    assert shapes["blocks.1.attn.W_Q"] == (4, 32, 12)
    assert shapes["blocks.1.attn._W_K"] == shapes["blocks.1.attn._W_V"] == (2, 32, 12)
    assert shapes["blocks.1.attn._b_V"] == shapes["blocks.1.attn.sink_V"] == (2, 12)
    assert shapes["blocks.1.attn.W_O"] == (4, 12, 32)
    assert shapes["blocks.0.mlp.W_in"] == shapes["blocks.0.mlp.W_gate"] == (32, 64)
    assert shapes["blocks.0.mlp.W_out"] == (64, 32)
    assert shapes["unembed.W_U"] == (32, VOCAB)
    assert "ln_final.w" in shapes and "ln_final.b" not in shapes


def test_the_bias_that_transformer_lens_adds_inside_a_gated_mlp_is_kept() -> None:
    options = replace(GRID["NanoLlama"], bias=True)
    model = nano(options, seed=3)
    state = to_transformer_lens_names(model)
    inner = torch.randn(2, 64)
    given = {**state, **{f"blocks.{layer}.mlp.b_in": inner[layer] for layer in range(2)}}
    got: Any = from_transformer_lens(given, to_transformer_lens_cfg(model))
    x = torch.randn(1, 3, 32)
    for layer in range(2):
        at = f"blocks.{layer}.mlp."
        post = F.silu(x @ state[f"{at}W_gate"]) * (x @ state[f"{at}W_in"]) + inner[layer]
        want = post @ state[f"{at}W_out"] + state[f"{at}b_out"]
        assert laws.largest(got.model.layers[layer].mlp(x).detach(), want) <= TOLERANCE
    assert f"{at}b_in" in given  # the caller's weights are left as they are


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "layr"}, r"norm='layr': expected one of layer, none, rms; did you mean 'layer'"),
        ({"norm": None}, "norm=None"),
        ({"positions": "alibi"}, "positions='alibi': expected one of learned, none, rotary, shortformer"),
        ({"mlp": "moe"}, "mlp='moe'"),
        ({"act": "swiglu"}, "act='swiglu'"),
        ({"n_heads": 4, "n_kv_heads": 3}, "n_heads=4 is no multiple of n_kv_heads=3"),
        ({"d_model": 30, "n_heads": 4}, "d_model=30 is no multiple of n_heads=4"),
        ({"positions": "rotary", "d_head": 7}, "d_head=7 is odd"),
        ({"tied": True, "d_vocab_out": 7}, "one matrix has one size"),
        ({"n_layers": 0}, "n_layers=0: expected a whole number ≥ 1"),
        ({"d_mlp": -1}, "d_mlp=-1: expected a whole number ≥ 0"),
        ({"n_ctx": 12.0}, "n_ctx=12.0"),
        ({"d_model": True}, "d_model=True"),
        ({"bias": 1}, "bias=1: expected True or False"),
        ({"norm_eps": 0}, "norm_eps=0: expected a finite number > 0"),
        ({"attention_scale": float("nan")}, "attention_scale=nan"),
        ({"init_std": -0.1}, "init_std=-0.1"),
        ({"eos_token_id": VOCAB}, f"eos_token_id={VOCAB}: expected an id from 0 to {VOCAB - 1}"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(BASE, **changes)
    with pytest.raises(ConfigError, match=message):
        type(nano_config())(**{**BASE.resolved(), "d_head": None, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_fn": "solu_ln"}, "act_fn='solu_ln'"),
        ({"normalization_type": "BN"}, "normalization_type='BN'"),
        ({"positional_embedding_type": "alibi"}, "positional_embedding_type='alibi'"),
        ({"attention_dir": "bidirectional"}, "attention_dir='bidirectional'"),
        ({"parallel_attn_mlp": True}, "parallel_attn_mlp=True"),
        ({"attn_scores_soft_cap": 30.0}, r"attn_scores_soft_cap=30\.0"),
        ({"positional_embedding_type": "rotary", "rotary_dim": 4}, "rotary_dim"),
        ({"n_ctx": None}, "cfg lacks n_ctx"),
    ],
    ids=str,
)
def test_configs_of_transformer_lens_that_mean_something_else_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    model = make("NanoGPT")
    with pytest.raises(ConfigError, match=message):
        from_transformer_lens(to_transformer_lens_names(model), {**to_transformer_lens_cfg(model), **changes})


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    model = make("NanoGPT")
    state, cfg = to_transformer_lens_names(model), to_transformer_lens_cfg(model)
    with pytest.raises(ConfigError, match="weights in memory need cfg"):
        from_transformer_lens(state)
    with pytest.raises(ArtifactError, match=r"lack blocks\.1\.attn\.W_Q"):
        from_transformer_lens({key: value for key, value in state.items() if key != "blocks.1.attn.W_Q"}, cfg)
    with pytest.raises(ArtifactError, match=r"have blocks\.0\.attn\.q_norm\.w"):
        from_transformer_lens({**state, "blocks.0.attn.q_norm.w": torch.ones(8)}, cfg)
    with pytest.raises(ArtifactError, match=r"embed\.W_E is \(7, 32\), expected \(120, 32\)"):
        from_transformer_lens({**state, "embed.W_E": torch.zeros(7, 32)}, cfg)
    with pytest.raises(ArtifactError, match=r"no model\.safetensors and no cfg\.json"):
        from_transformer_lens(tmp_path)
    (tmp_path / "cfg.json").write_text("{", encoding="utf-8")
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match="cannot be read"):
        from_transformer_lens(tmp_path)


def test_folders_that_are_damaged_or_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"config\.json cannot be read.*save_pretrained"):
        load_nano(tmp_path)
    make("GPT2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ArtifactError, match="type 'gpt2', not 'interp_nano'"):
        load_nano(tmp_path / "gpt2")
    folder = tmp_path / "nano"
    make("NanoGPT").save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    lost = state.pop("model.layers.1.mlp.up_proj.weight")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"missing: .*layers\.1\.mlp\.up_proj\.weight"):
        load_nano(folder)
    save_file(
        {**state, "model.layers.1.mlp.up_proj.weight": lost[:5].clone()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(ArtifactError, match=r"mismatched: .*layers\.1\.mlp\.up_proj\.weight"):
        load_nano(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "norm": "batch"}), encoding="utf-8")
    with pytest.raises(ConfigError, match="norm='batch'"):
        load_nano(folder)
    with pytest.raises(ModelError, match="norm='batch'"):
        HookManager.load(folder)
    with pytest.raises(ModelError, match="norm='batch'"):
        sites_of(str(folder))
