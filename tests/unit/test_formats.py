"""Other libraries' folders: written here by plain safetensors and read by ours, and the other way round."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from interp.core.errors import ArtifactError, ConfigError, ShapeError
from interp.data.store import Batch
from interp.dictionaries.base import SAE, Dictionary, Transcoder
from interp.dictionaries.circuit_tracer import from_circuit_tracer, to_circuit_tracer
from interp.dictionaries.cross_layer_files import CrossLayerWeights, read_cross_layer, write_cross_layer
from interp.dictionaries.jumprelu import JumpReLUTranscoder
from interp.dictionaries.options import DictionaryOptions
from interp.dictionaries.sparsify import from_sparsify, to_sparsify
from interp.dictionaries.standard import ReLUTranscoder
from interp.dictionaries.topk import TopKSAE
from interp.dictionaries.topk_transcoder import TopKTranscoder
from tests.dictionaries import make

# So many of so few that some of the k largest are negative.
D, F, K, LAYERS = 6, 20, 12, 3
COMMIT, OTHER = "a" * 40, "b" * 40
LAYER = "activation_function.threshold"


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def k_largest(pre: Tensor, k: int) -> Tensor:
    """ReLU of the k largest of each row, by sorting."""
    kept = pre.relu()
    return torch.where(pre >= pre.sort(-1, descending=True).values[:, k - 1 : k], kept, 0)


# -- sparsify -------------------------------------------------------------------------------------------------------


def sparsify_tensors(skip: bool = False) -> dict[str, Tensor]:
    held = {"encoder.weight": draw(F, D), "encoder.bias": draw(F, seed=1), "W_dec": draw(F, D, seed=2)}
    return {**held, "b_dec": draw(D, seed=3), **({"W_skip": draw(D, D, seed=4)} if skip else {})}


def sparsify_folder(folder: Path, held: dict[str, Tensor], settings: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True)
    cfg = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": F, "k": K}
    cfg |= {"multi_topk": False, "skip_connection": "W_skip" in held, "transcode": False, "d_in": D}
    (folder / "cfg.json").write_text(json.dumps({**cfg, **(settings or {})}))
    save_file(held, folder / "sae.safetensors")
    return folder


def sparsify_formula(held: dict[str, Tensor], x: Tensor, transcode: bool) -> tuple[Tensor, Tensor]:
    pre = (x if transcode else x - held["b_dec"]) @ held["encoder.weight"].T + held["encoder.bias"]
    latents = k_largest(pre, K)
    out = latents @ held["W_dec"] + held["b_dec"]
    return latents, out + x @ held["W_skip"].T if "W_skip" in held else out


@pytest.mark.parametrize(("transcode", "skip"), [(False, False), (True, False), (True, True)])
def test_a_sparsify_folder_is_read_as_the_same_function(tmp_path: Path, transcode: bool, skip: bool) -> None:
    held, x = sparsify_tensors(skip), draw(50, D, seed=9) * 2
    place = sparsify_folder(tmp_path / "run" / "layers.2.mlp", held, {"transcode": transcode})
    (tmp_path / "run" / "config.json").write_text(json.dumps({"model": "some/model", "ctx_len": 64, "sae": {}}))
    got: Dictionary = Dictionary.load(place)
    latents, out = sparsify_formula(held, x, transcode)
    assert isinstance(got, TopKTranscoder if transcode else TopKSAE)
    torch.testing.assert_close(got.encode(x), latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got(x), out, rtol=1e-5, atol=1e-5)
    about = got.cfg.metadata
    assert about["loaded_format"] == "sparsify" and about["sparsify_hookpoint"] == "layers.2.mlp"
    assert (about["model_name"], about["context_size"]) == ("some/model", 64)
    sites = (about["hook_name"], about.get("hook_name_out"))
    assert sites == (
        ("blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out") if transcode else ("blocks.2.hook_mlp_out", None)
    )


@pytest.mark.parametrize(
    ("hookpoint", "site"),
    [
        ("layers.5", "blocks.5.hook_resid_post"),
        ("transformer.h.11", "blocks.11.hook_resid_post"),
        ("gpt_neox.layers.3.attention", "blocks.3.hook_attn_out"),
        ("embed_tokens", "hook_embed"),
        ("vision.stage1", None),
    ],
)
def test_the_site_follows_from_the_hookpoint_where_it_is_known(
    tmp_path: Path, hookpoint: str, site: str | None
) -> None:
    settings = {"num_latents": 0, "expansion_factor": 2}
    held = {name: value[: 2 * D] if len(value) == F else value for name, value in sparsify_tensors().items()}
    got = from_sparsify(sparsify_folder(tmp_path / hookpoint, held, settings))
    assert got.cfg.metadata.get("hook_name") == site and got.cfg.d_sae == 2 * D


@pytest.mark.parametrize("settings", [{}, {"apply_b_dec_to_input": False}, {"rescale_acts_by_decoder_norm": True}])
def test_a_topk_sae_is_written_as_sparsify_computes_it(tmp_path: Path, settings: dict[str, bool]) -> None:
    sae = TopKSAE.from_cfg({"d_in": D, "d_sae": F, "k": K, **settings})
    with torch.no_grad():
        for seed, parameter in enumerate(sae.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=seed))
    x = draw(50, D, seed=9)
    place = to_sparsify(sae, tmp_path / "deep" / "layers.0")
    held = load_file(place / "sae.safetensors")
    cfg = json.loads((place / "cfg.json").read_text())
    assert cfg["activation"] == "topk" and (cfg["num_latents"], cfg["k"], cfg["d_in"]) == (F, K, D)
    latents, out = sparsify_formula(held, x, cfg["transcode"])
    torch.testing.assert_close(latents, sae.encode(x).detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out, sae(x).detach(), rtol=1e-5, atol=1e-5)
    if not settings:  # else biases or norms are folded
        back = SAE.load(place)
        assert all(torch.equal(value, sae.state_dict()[name]) for name, value in back.state_dict().items())


@pytest.mark.parametrize("skip", [False, True])
def test_a_topk_transcoder_goes_there_and_back_and_nowhere_else(tmp_path: Path, skip: bool) -> None:
    held = sparsify_tensors(skip)
    got = from_sparsify(sparsify_folder(tmp_path / "layers.2.mlp", held, {"transcode": True}))
    again = load_file(to_sparsify(got, tmp_path / "back") / "sae.safetensors")
    assert again.keys() == held.keys() and all(torch.equal(again[name], held[name]) for name in held)
    with pytest.raises(ArtifactError, match="SAELens has no name for a TopK transcoder"):
        got.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(ArtifactError, match=r"use TopKTranscoder.load"):
        SAE.load(tmp_path / "layers.2.mlp")


def test_a_topk_transcoder_has_the_gradients_of_its_formula() -> None:
    settings = {"architecture": "topk_skip_transcoder", "d_in": D, "d_out": D + 1, "d_sae": F, "k": K}
    made = TopKTranscoder.from_cfg({**settings, "dtype": "float64"})
    with torch.no_grad():
        for seed, parameter in enumerate(made.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=seed))
    x, y = draw(30, D, seed=8).double(), draw(30, D + 1, seed=9).double()
    names = [name for name, _ in made.named_parameters()]
    got = torch.autograd.grad(made.loss(Batch(x, target=y)).total, list(made.parameters()))
    latents = k_largest(x @ made.W_enc + made.b_enc, K)
    error = y - (latents @ made.W_dec + made.b_dec + x @ made.W_skip.T)
    fvu = error.pow(2).sum() / (y - y.mean(0)).pow(2).sum()
    for name, ours, theirs in zip(names, got, torch.autograd.grad(fvu, list(made.parameters())), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12, msg=name)


BAD_SPARSIFY: dict[str, tuple[dict[str, Any], Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "another activation": ({"activation": "groupmax"}, dict, "groupmax"),
    "signed": ({"signed": True}, dict, "may be negative"),
    "an SAE that skips": ({"skip_connection": True}, dict, "only transcoders"),
    "no k": ({"k": None}, dict, "k=None"),
    "k of the wrong kind": ({"k": True}, dict, "k=True"),
    "k too large": ({"k": F + 1}, dict, "more than the 20 latents"),
    "no width": ({"d_in": "6"}, dict, "d_in='6'"),
    "another size": ({"num_latents": F + 1}, dict, r"encoder.weight \[20, 6\]; expected \[21, 6\]"),
    "an absurd size": ({"num_latents": 10**15}, dict, "encoder.weight"),
    "a missing tensor": ({}, lambda held: {"W_dec": held["W_dec"]}, "lacks b_dec, encoder.bias, encoder.weight"),
    "a wrong axis": ({}, lambda held: {**held, "W_dec": held["W_dec"].T.contiguous()}, r"W_dec \[6, 20\]"),
    "whole numbers": ({}, lambda held: {**held, "b_dec": torch.ones(D, dtype=torch.int64)}, "int64"),
    "an unknown tensor": ({}, lambda held: {**held, "b_pre": draw(D)}, "b_pre, whose part"),
}


@pytest.mark.parametrize("fault", BAD_SPARSIFY)
def test_a_sparsify_folder_that_cannot_be_followed_is_refused(tmp_path: Path, fault: str) -> None:
    settings, change, message = BAD_SPARSIFY[fault]
    place = sparsify_folder(tmp_path / "layers.0", change(sparsify_tensors()), settings)
    with pytest.raises(ArtifactError, match=message):
        SAE.load(place)


def test_damaged_files_are_refused_before_anything_is_made_of_them(tmp_path: Path) -> None:
    place = sparsify_folder(tmp_path / "layers.0", sparsify_tensors())
    whole = (place / "sae.safetensors").read_bytes()
    huge = (2**40).to_bytes(8, "little") + b"{}"
    lying = json.dumps({"W_dec": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}).encode()
    for raw in (b"", whole[:100], whole[:-1], huge, len(lying).to_bytes(8, "little") + lying, b"\x80\x04K\x01."):
        (place / "sae.safetensors").write_bytes(raw)
        with pytest.raises(ArtifactError, match=r"sae\.safetensors cannot be read"):
            SAE.load(place)
    (place / "sae.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"sae\.safetensors cannot be read"):
        SAE.load(place)
    cfg = (place / "cfg.json").read_text()
    large = f'{cfg[:-1]}, "more": "{"y" * 2**20}"}}'
    for text, why in (
        ("[1]", "holds a list"),
        ("", "cannot be read"),
        ("{" * 10_000, "cannot be read"),
        (large, "bytes; settings"),
    ):
        (place / "cfg.json").write_text(text)
        with pytest.raises(ArtifactError, match=rf"cfg\.json.* {why}"):
            from_sparsify(place)


def test_what_sparsify_does_not_know_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="this is a GatedSAE"):
        to_sparsify(make("gated", dtype="float32"), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("keep")
    with pytest.raises(ArtifactError, match="nothing is overwritten"):
        to_sparsify(make("topk", dtype="float32"), tmp_path / "used")
    assert (tmp_path / "used" / "mine.txt").read_text() == "keep"


# -- circuit-tracer, layer by layer ---------------------------------------------------------------------------------

CONFIG = {"model_name": "some/model", "model_kind": "transcoder_set", "scan": "some-set"}
CONFIG |= {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}


def traced_tensors(jumps: bool, skip: bool, seed: int = 0) -> dict[str, Tensor]:
    held = {"W_enc": draw(F, D, seed=seed), "W_dec": draw(F, D, seed=seed + 1), "b_enc": draw(F, seed=seed + 2)}
    held |= {"b_dec": draw(D, seed=seed + 3)}
    held |= {LAYER: draw(F, seed=seed + 4).abs()} if jumps else {}
    return {**held, **({"W_skip": draw(D, D, seed=seed + 5)} if skip else {})}


def traced_folder(
    folder: Path, jumps: bool, skip: bool, config: dict[str, Any] | None = None
) -> list[dict[str, Tensor]]:
    folder.mkdir(parents=True)
    held = [traced_tensors(jumps, skip, seed=10 * layer) for layer in range(LAYERS)]
    for layer, tensors in enumerate(held):
        save_file(tensors, folder / f"layer_{layer}.safetensors")
    (folder / "config.yaml").write_text(yaml.safe_dump({**CONFIG, **(config or {})}))
    return held


def traced_formula(held: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    pre = x @ held["W_enc"].T + held["b_enc"]
    latents = pre * (pre > held[LAYER]) if LAYER in held else pre.relu()
    out = latents @ held["W_dec"] + held["b_dec"]
    return latents, out + x @ held["W_skip"].T if "W_skip" in held else out


@pytest.mark.parametrize("jumps", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_transcoders_of_circuit_tracer_are_read_as_the_same_functions_and_written_back(
    tmp_path: Path, jumps: bool, skip: bool
) -> None:
    held, x = traced_folder(tmp_path / "theirs", jumps, skip), draw(40, D, seed=99)
    got = {layer: from_circuit_tracer(tmp_path / "theirs", layer) for layer in range(LAYERS)}
    for layer, transcoder in got.items():
        latents, out = traced_formula(held[layer], x)
        assert isinstance(transcoder, JumpReLUTranscoder if jumps else ReLUTranscoder)
        torch.testing.assert_close(transcoder.encode(x), latents, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(transcoder(x), out, rtol=1e-5, atol=1e-5)
        about = transcoder.cfg.metadata
        sites = (f"blocks.{layer}.mlp.hook_in", f"blocks.{layer}.hook_mlp_out")
        assert (about["hook_name"], about["hook_name_out"]) == sites
        assert about["model_name"] == "some/model" and about["model_from_pretrained_kwargs"]["fold_ln"] is False
    # The file itself, too, and SAELens' layout in between.
    by_file = Transcoder.load(tmp_path / "theirs" / "layer_2.safetensors")
    assert torch.equal(by_file(x), got[2](x)) and by_file.cfg == got[2].cfg
    by_file.save(tmp_path / "saved")
    torch.testing.assert_close(Transcoder.load(tmp_path / "saved")(x), got[2](x), rtol=1e-5, atol=1e-5)
    # And back, bit for bit.
    place = to_circuit_tracer(got, tmp_path / "ours", scan="some-set")
    assert yaml.safe_load((place / "config.yaml").read_text()) == CONFIG
    assert sorted(p.name for p in place.iterdir()) == [
        "config.yaml",
        *(f"layer_{i}.safetensors" for i in range(LAYERS)),
    ]
    for layer in range(LAYERS):
        again = load_file(place / f"layer_{layer}.safetensors")
        assert again.keys() == held[layer].keys()
        assert all(torch.equal(again[name], value) for name, value in held[layer].items())


@pytest.mark.parametrize("kind", ["batchtopk", "jumprelu"])
def test_what_is_written_keeps_the_function_also_where_thresholds_are_below_zero(tmp_path: Path, kind: Any) -> None:
    made: Any = DictionaryOptions(kind=kind, form="transcoder", d_sae=F, k=K).make(D, D)
    with torch.no_grad():
        for seed, parameter in enumerate(made.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=seed))
    hooks = {"feature_input_hook": "ln2.hook_normalized", "feature_output_hook": "hook_mlp_out"}
    place, x = to_circuit_tracer({0: made}, tmp_path / "out", **hooks), draw(40, D, seed=9)
    held = load_file(place / "layer_0.safetensors")
    # At inference it is JumpReLU, where ours keeps positive latents alone, and theirs those above the threshold.
    frozen = made.frozen()
    assert float(held[LAYER].min()) >= 0 and (kind == "batchtopk" or float(frozen.threshold.detach().min()) < 0)
    torch.testing.assert_close(traced_formula(held, x)[1], frozen(x).detach(), rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match=r"of one width, the model's; got \[10, 12\]"):
        to_circuit_tracer({0: make("batchtopk", "transcoder", dtype="float32")}, tmp_path / "wide", **hooks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"W_enc": draw(F, D + 1)}, r"W_dec \[20, 6\]; expected \[20, 7\]"),
        ({"W_enc": draw(F)}, "no W_enc of two axes"),
        ({"b_dec": None}, "lacks b_dec"),
        ({"k": torch.tensor(4)}, "TopK transcoder"),
        ({LAYER: -draw(F).abs()}, "thresholds below 0"),
        ({"W_skip": draw(D, D - 1)}, "W_skip"),
        ({"extra": draw(3)}, "extra, whose part"),
    ],
)
def test_a_layer_that_cannot_be_followed_is_refused(
    tmp_path: Path, change: dict[str, Tensor | None], message: str
) -> None:
    held = {name: value for name, value in {**traced_tensors(False, False), **change}.items() if value is not None}
    save_file(held, tmp_path / "layer_0.safetensors")
    with pytest.raises(ArtifactError, match=message):
        Transcoder.load(tmp_path)


def test_a_set_needs_its_layer_and_follows_no_name_out_of_its_folder(tmp_path: Path) -> None:
    traced_folder(tmp_path / "set", False, False)
    traced_folder(tmp_path / "elsewhere", False, False)
    with pytest.raises(ArtifactError, match="holds layers 0, 1, 2, which one is not said"):
        Transcoder.load(tmp_path / "set")
    with pytest.raises(ArtifactError, match="not 7"):
        from_circuit_tracer(tmp_path / "set", 7)
    with pytest.raises(ArtifactError, match=r"use ReLUTranscoder.load"):
        SAE.load(tmp_path / "set" / "layer_0.safetensors")
    config = tmp_path / "set" / "config.yaml"
    secret = tmp_path / "elsewhere" / "layer_0.safetensors"
    for name in (
        "../elsewhere/layer_0.safetensors",
        str(secret),
        f"hf://a/b/{secret.name}",
        "sub/../../elsewhere/x.safetensors",
    ):
        config.write_text(yaml.safe_dump({**CONFIG, "transcoders": [name]}))
        with pytest.raises(ArtifactError, match="outside the folder"):
            from_circuit_tracer(tmp_path / "set", 0)
    config.write_text(yaml.safe_dump({**CONFIG, "transcoders": ["params.npz"]}))
    with pytest.raises(ArtifactError, match="only safetensors"):
        from_circuit_tracer(tmp_path / "set", 0)
    config.write_text(yaml.safe_dump({**CONFIG, "transcoders": ["layer_1.safetensors", "layer_0.safetensors"]}))
    x = draw(5, D)
    listed, named = from_circuit_tracer(tmp_path / "set", 0), Transcoder.load(tmp_path / "set" / "layer_1.safetensors")
    assert torch.equal(listed(x), named(x)) and listed.cfg.metadata["hook_name"] == "blocks.0.mlp.hook_in"
    config.write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(ArtifactError, match=r"config\.yaml cannot be read"):
        from_circuit_tracer(tmp_path / "set", 0)


def test_a_set_that_circuit_tracer_could_not_load_is_not_written(tmp_path: Path) -> None:
    traced_folder(tmp_path / "set", True, False)
    traced_folder(tmp_path / "skip", True, True)
    got = {layer: from_circuit_tracer(tmp_path / "set", layer) for layer in range(LAYERS)}
    skipping, out = from_circuit_tracer(tmp_path / "skip", 1), tmp_path / "out"
    topk = from_sparsify(sparsify_folder(tmp_path / "layers.0.mlp", sparsify_tensors(), {"transcode": True}))
    assert isinstance(topk, TopKTranscoder)
    wrong: list[tuple[dict[int, Transcoder], str]] = [
        ({}, "got transcoders of layers"),
        ({1: got[1], 2: got[2]}, r"layers \[1, 2\]"),
        ({0: got[0], 1: skipping}, "in every layer, or in none"),
        ({0: got[1], 1: got[0]}, "give each its own layer"),
        ({0: topk}, "would be another function"),
    ]
    for transcoders, message in wrong:
        with pytest.raises((ArtifactError, ConfigError), match=message):
            to_circuit_tracer(transcoders, out)
    got[0].cfg.metadata["hook_name"] = "blocks.0.hook_resid_mid"
    with pytest.raises(ConfigError, match="give feature_input_hook"):
        to_circuit_tracer(got, out)
    assert not out.exists() and not list(tmp_path.glob(".*"))
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(ArtifactError, match="nothing is overwritten"):
        to_circuit_tracer(got, out, feature_input_hook="mlp.hook_in")


# -- circuit-tracer, across layers ----------------------------------------------------------------------------------


def cross_layer(jumps: bool) -> CrossLayerWeights:
    return CrossLayerWeights(
        W_enc=[draw(D, F, seed=i) for i in range(LAYERS)],
        b_enc=[draw(F, seed=10 + i) for i in range(LAYERS)],
        W_dec=[draw(F, LAYERS - i, D, seed=20 + i) for i in range(LAYERS)],
        b_dec=[draw(D, seed=30 + i) for i in range(LAYERS)],
        threshold=[draw(F, seed=40 + i).abs() for i in range(LAYERS)] if jumps else None,
    )


@pytest.mark.parametrize("jumps", [False, True])
def test_a_cross_layer_transcoder_is_written_as_circuit_tracer_computes_it_and_read_back(
    tmp_path: Path, jumps: bool
) -> None:
    weights, x = cross_layer(jumps), draw(LAYERS, 30, D, seed=99)
    hooks = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}
    place = write_cross_layer(weights, tmp_path / "clt", **hooks, model="some/model")
    config = yaml.safe_load((place / "config.yaml").read_text())
    assert config == {**hooks, "model_kind": "cross_layer_transcoder", "model_name": "some/model", "scan": "clt"}
    # Theirs: all decoders of all latents, each added where it writes.
    out = torch.zeros(LAYERS, 30, D)
    for i in range(LAYERS):
        enc, dec = load_file(place / f"W_enc_{i}.safetensors"), load_file(place / f"W_dec_{i}.safetensors")
        assert set(enc) == {f"W_enc_{i}", f"b_enc_{i}", f"b_dec_{i}"} | ({f"threshold_{i}"} if jumps else set())
        pre = x[i] @ enc[f"W_enc_{i}"].T + enc[f"b_enc_{i}"]
        latents = pre * (pre > enc[f"threshold_{i}"]) if jumps else pre.relu()
        out[i:] += torch.einsum("tf,fjd->jtd", latents, dec[f"W_dec_{i}"])
        out[i] += enc[f"b_dec_{i}"]
    ours = weights.decode([weights.encode(i, x[i]) for i in range(LAYERS)])
    torch.testing.assert_close(torch.stack(ours), out, rtol=1e-5, atol=1e-4)
    back = read_cross_layer(place)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"):
        mine, again = getattr(weights, name), getattr(back, name)
        assert (mine is None) == (again is None)
        assert mine is None or all(torch.equal(a, b) for a, b in zip(mine, again, strict=True))
    with pytest.raises(ArtifactError, match="read_cross_layer"):
        Transcoder.load(place)


@pytest.mark.parametrize("jumps", [False, True])
def test_transcoders_layer_by_layer_are_a_cross_layer_one_whose_other_blocks_are_zero(
    tmp_path: Path, jumps: bool
) -> None:
    traced_folder(tmp_path / "set", jumps, False)
    got, x = {layer: from_circuit_tracer(tmp_path / "set", layer) for layer in range(LAYERS)}, draw(LAYERS, 30, D)
    weights = CrossLayerWeights.of(got)
    hooks = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
    back = read_cross_layer(write_cross_layer(weights, tmp_path / "clt", **hooks))
    for layer, out in enumerate(back.decode([back.encode(i, x[i]) for i in range(LAYERS)])):
        torch.testing.assert_close(out, got[layer](x[layer]), rtol=1e-5, atol=1e-5)
    # The control: with one block off the diagonal they differ.
    back.W_dec[0][:, 1] += 1
    out = back.decode([back.encode(i, x[i]) for i in range(LAYERS)])[1]
    assert float((out - got[1](x[1])).abs().max()) > 0.1


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda p: (p / "W_enc_1.safetensors").unlink(), r"layers \[0, 2\]"),
        (lambda p: (p / "W_dec_1.safetensors").unlink(), "W_dec_1.safetensors cannot be read"),
        (lambda p: save_file({"W_dec_1": draw(F, 1, D)}, p / "W_dec_1.safetensors"), r"W_dec_1 \[20, 1, 6\]"),
        (lambda p: save_file({"W_enc_0": draw(F)}, p / "W_enc_0.safetensors"), "two axes"),
        (lambda p: (p / "W_enc_2.safetensors").write_bytes(b"\xff" * 8), "cannot be read"),
    ],
)
def test_a_damaged_cross_layer_folder_is_refused(tmp_path: Path, fault: Callable[[Path], Any], message: str) -> None:
    hooks = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}
    fault(place := write_cross_layer(cross_layer(False), tmp_path / "clt", **hooks))
    with pytest.raises(ArtifactError, match=message):
        read_cross_layer(place)
    with pytest.raises(ArtifactError):
        read_cross_layer(tmp_path / "nowhere")


@pytest.mark.usefixtures("unchecked")
def test_tensors_that_are_no_cross_layer_transcoder_are_refused() -> None:
    good = cross_layer(True)
    whole = {name: getattr(good, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
    for change, message in (
        ({"W_dec": good.W_dec[:2]}, "of 3 layers"),
        ({"W_dec": list(reversed(good.W_dec))}, "layer 0 has"),
        ({"threshold": [-t for t in good.threshold or ()]}, "below 0"),
    ):
        with pytest.raises(ShapeError, match=message):
            CrossLayerWeights(**{**whole, **change})
