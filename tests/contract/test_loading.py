"""Loading from a folder, by name and from memory; what is refused, and what loading leaves as it was."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from interp.core.errors import ModelError
from interp.core.intervention import Add
from interp.core.manager import HookManager, sites_of
from tests.contract.bad_calls import hooks_on
from tests.contract.laws import largest
from tests.families import make, manager, tokens, word_tokenizer

READ = ["0.resid_post", "1.z", "1.pattern"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama and its tokenizer, as Hugging Face saves them."""
    return saved("Llama", tmp_path / "tiny")


def saved(name: str, path: Path) -> Path:
    """Save a family's tiny model with the tokenizer of words."""
    make(name).save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return path


def logits_of(model: Any, ids: Tensor) -> Tensor:
    """Logits of a plain call."""
    with torch.no_grad():
        return model(ids, use_cache=False).logits


# -- folders and names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Gemma3Multimodal"])
def test_a_folder_gives_the_model_that_was_saved_with_its_tokenizer(name: str, tmp_path: Path) -> None:
    path, want = saved(name, tmp_path / "tiny"), manager(name).run(tokens(), read=["1.resid_post"], logits="all")
    for source in (path, str(path)):
        hm = HookManager.load(source)
        out = hm.run(tokens(), read=["1.resid_post"], logits="all")
        assert torch.equal(out.logits, want.logits) and torch.equal(out["1.resid_post"], want["1.resid_post"])
        assert hm.to_tokens("w5 w6").ids.tolist() == [[5, 6]]
        assert hm.name == str(path)
        assert not hm.model.training


def test_the_dtype_is_the_checkpoints_unless_one_is_named(tmp_path: Path) -> None:
    make("Llama").bfloat16().save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    for dtype, expected in (
        (None, torch.bfloat16),
        ("float32", torch.float32),
        ("fp32", torch.float32),
        ("half", torch.float16),
        (torch.float64, torch.float64),
    ):
        hm = HookManager.load(tmp_path, dtype=dtype)
        assert hm.dtype == expected
        assert {p.dtype for p in hm.model.parameters()} == {expected}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ("float31", "dtype 'float31' is unknown; use 'float32', 'bfloat16' or 'float16'"),
        ("relu", "dtype 'relu' is unknown"),
        (32, "dtype 32 is unknown"),
        ("int8", "dtype int8 is not floating-point"),
        (torch.long, "dtype torch.int64 is not floating-point"),
    ],
    ids=str,
)
def test_a_dtype_that_cannot_be_is_refused_before_anything_is_loaded(dtype: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        HookManager.load("no/such-model-anywhere", dtype=dtype)


def test_a_missing_folder_and_one_without_a_config_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no folder '.*/tinny'"):
        HookManager.load(tmp_path / "tinny")
    (folder / "config.json").unlink()
    for load in (HookManager.load, lambda f: sites_of(str(f))):
        with pytest.raises(ModelError, match=r"holds no config\.json; .*save_pretrained"):
            load(folder)


def test_a_folder_with_a_damaged_config_or_without_weights_is_a_typed_error(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot load"):
        HookManager.load(folder)
    (folder / "config.json").write_text("{not json", encoding="utf-8")
    with pytest.raises(ModelError, match="cannot load"):
        HookManager.load(folder)


@pytest.mark.parametrize("name", ["nobody-interp/no-such-model", "no-such-model-of-interp", "runs/tiny"])
def test_an_unknown_name_without_network_tells_the_way_by_a_folder(name: str) -> None:
    message = r"cannot load '" + name + r"': .*HookManager\.load\('path/to/folder'\).*save_pretrained\(folder\)"
    with pytest.raises(ModelError, match=message):
        HookManager.load(name)
    with pytest.raises(ModelError, match=r"save_pretrained\(folder\)"):
        sites_of(name)


def test_a_folder_without_a_tokenizer_does_not_get_an_empty_one(tmp_path: Path) -> None:
    make("GPT2").save_pretrained(tmp_path)
    hm = HookManager.load(tmp_path)
    assert hm.tokenizer is None


def test_a_tokenizer_that_is_given_stands_in_for_the_folders_own(tmp_path: Path) -> None:
    make("Llama").save_pretrained(tmp_path)
    tokenizer = word_tokenizer()
    assert HookManager.load(tmp_path, tokenizer).tokenizer is tokenizer
    with pytest.raises(ModelError, match="cannot load"):
        HookManager.load(tmp_path)


def test_another_attention_kernel_gives_the_same_reads(folder: Path) -> None:
    usual = HookManager.load(folder)
    eager = HookManager.load(folder, model_kwargs={"attn_implementation": "eager"})
    kernels = [hm.model.config._attn_implementation for hm in (usual, eager)]
    assert kernels == ["sdpa", "eager"]
    padding = torch.ones(2, 12, dtype=torch.bool)
    padding[0, :4] = False
    for mask in (None, padding):
        first, second = (hm.run(tokens(), read=READ, mask=mask, logits="all") for hm in (usual, eager))
        real = padding if mask is not None else torch.ones_like(padding)
        for site in ("0.resid_post", "1.z"):
            assert largest(first[site][real], second[site][real]) <= 2e-5
        assert largest(first["1.pattern"].transpose(1, 2)[real], second["1.pattern"].transpose(1, 2)[real]) <= 2e-5
        assert largest(first.logits[real], second.logits[real]) <= 5e-5


def test_code_that_comes_with_a_model_is_not_run_unless_it_is_asked_for(folder: Path) -> None:
    ran = folder / "ran"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config["model_type"] = "own"
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "own.py").write_text(f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n", encoding="utf-8")
    advice = r"It runs code of its own; read that code, then give trust_remote_code=True"
    with pytest.raises(ModelError, match=advice):
        HookManager.load(folder)
    with pytest.raises(ModelError, match=advice):
        sites_of(str(folder))
    assert not ran.exists()


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Gemma2", "Mixtral"])
def test_the_sites_of_a_folder_are_the_models_own_without_its_weights(name: str, tmp_path: Path) -> None:
    path = saved(name, tmp_path / "tiny")
    want = HookManager.load(path).sites()
    (path / "model.safetensors").unlink()
    found = sites_of(str(path))
    assert found.rows == want.rows and found.sites == want.sites
    assert found.family == want.family
    some = sites_of(str(path), pattern="*.resid_post")
    assert [site.short for site in some] == [s.short for s in want.sites if s.kind == "resid_post"]


# -- models in memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat16"}, r"in memory as torch\.float32; convert it with model\.to\(torch\.bfloat16\)"),
        ({"device": "meta"}, r"this model is on cpu; move it yourself with model\.to\('meta'\)"),
        ({"device_map": "auto"}, "this model is in memory already"),
        ({"revision": "main"}, "this model is in memory already"),
        ({"model_kwargs": {"attn_implementation": "eager"}}, "this model is in memory already"),
        ({"device": "nowhere"}, "nowhere"),
    ],
    ids=str,
)
def test_a_model_in_memory_is_not_converted_behind_its_owners_back(options: dict[str, Any], message: str) -> None:
    model = make("Llama")
    with pytest.raises(ModelError, match=message):
        HookManager.load(model, **options)
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.float32, "cpu")}


@pytest.mark.parametrize("options", [{"dtype": "float32"}, {"device": "cpu"}], ids=str)
def test_a_module_without_parameters_is_a_typed_error(options: dict[str, Any]) -> None:
    with pytest.raises(ModelError):
        HookManager.load(nn.Sequential(), **options)


def test_a_device_by_folder_is_checked_too(folder: Path) -> None:
    assert HookManager.load(folder, device="cpu", dtype="float32").device.type == "cpu"
    assert HookManager.load(make("Llama"), device="cpu", dtype="float32").device.type == "cpu"
    with pytest.raises(ModelError, match=r"cannot move the model to 'nowhere'"):
        HookManager.load(folder, device="nowhere")
    with pytest.raises(ModelError, match="give device or device_map, not both"):
        HookManager.load(folder, device="cpu", device_map="cpu")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "load takes a model name, a folder or a model, got NoneType"),
        (3, "got int"),
        (nn.Linear(2, 2), r"Linear is no Hugging Face model; give load\(module, map=interp\.ModelMap"),
    ],
    ids=str,
)
def test_what_is_no_model_is_refused(source: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        HookManager.load(source)


def _compiled_in_place() -> nn.Module:
    model = make("Llama")
    model.compile(backend="eager")
    return model


def _compiled_block() -> nn.Module:
    model = make("Llama")
    model.model.layers[1].compile(backend="eager")
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: torch.compile(make("Llama"), backend="eager"), r"compiled model's inner hooks.*model\._orig_mod"),
        (_compiled_in_place, "compiled model's inner hooks would not fire"),
        (lambda: nn.DataParallel(make("Llama")), r"DataParallel runs copies.*model\.module"),
        (_compiled_block, "compiled"),
    ],
    ids=["compiled", "compiled in place", "DataParallel", "a compiled block"],
)
def test_a_wrapper_in_which_hooks_would_not_fire_is_refused(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        HookManager.load(build())


# -- train mode ---------------------------------------------------------------------------------------------------


def test_train_mode_is_refused_by_run_and_generate_and_left_on() -> None:
    hm = HookManager.load(make("GPT2").train(), word_tokenizer())
    for call in (lambda: hm.run(tokens()), lambda: hm.generate(tokens(), max_new_tokens=2)):
        with pytest.raises(ModelError, match=r"train mode.*hm\.model\.eval\(\).*hm\.hooked"):
            call()
    assert hm.model.training
    hm.model.eval()
    assert torch.equal(hm.run(tokens()).logits, logits_of(make("GPT2"), tokens()))


@pytest.mark.parametrize("name", ["GPT2", "Llama"])
def test_training_inside_a_block_has_the_gradients_of_the_plain_model(name: str) -> None:
    def trained(model: Any) -> list[Tensor]:
        torch.manual_seed(3)  # GPT-2's dropout is on
        model(tokens(), labels=tokens(), use_cache=False).loss.backward()
        return [p.grad for p in model.parameters()]

    want, model = trained(make(name).train()), make(name).train()
    hm = HookManager.load(model, word_tokenizer())
    with hm.hooked(read=["0.resid_post", "1.z"]) as live:
        found = trained(model)
    assert live["0.resid_post"].shape == (2, 12, hm.d_model)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    assert any(float(g.abs().max()) > 0 for g in want)


# -- nothing is changed -------------------------------------------------------------------------------------------


def test_loading_and_running_leave_keys_files_and_flags_as_they_were(tmp_path: Path) -> None:
    model, untouched = make("Gemma2"), make("Gemma2")
    untouched.save_pretrained(tmp_path / "before")
    hm = HookManager.load(model, word_tokenizer())
    hm.run(tokens(), read=READ, write=[Add("0.z", torch.ones(hm.n_heads, hm.d_head))], logits="all")
    model.save_pretrained(tmp_path / "after")
    assert list(model.state_dict()) == list(untouched.state_dict())
    names = {path.name for path in (tmp_path / "before").iterdir()}
    assert {path.name for path in (tmp_path / "after").iterdir()} == names
    for name in names:
        assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()
    assert hooks_on(model) == hooks_on(untouched)
    assert all(p.requires_grad for p in model.parameters())


def test_two_managers_of_one_model_see_the_same_and_do_not_add_up() -> None:
    model, ids = make("Llama"), tokens()
    first, second = HookManager.load(model, word_tokenizer()), HookManager.load(model, word_tokenizer())
    vector = torch.ones(first.d_model)
    want = first.run(ids, read=READ, write=[Add("0.resid_post", vector)], logits="all")
    got = second.run(ids, read=READ, write=[Add("0.resid_post", vector)], logits="all")
    assert torch.equal(got.logits, want.logits)
    assert all(torch.equal(got[site], want[site]) for site in READ)
    assert torch.equal(first.run(ids).logits, logits_of(model, ids))


def test_a_deep_copy_of_a_manager_or_its_model_is_on_its_own() -> None:
    ids = tokens()
    hm = HookManager.load(make("Llama"), word_tokenizer())
    want = hm.run(ids, read=READ, logits="all")
    copies = [copy.deepcopy(hm), HookManager.load(copy.deepcopy(hm.model), word_tokenizer())]
    for twin in copies:
        out = twin.run(ids, read=READ, logits="all")
        assert torch.equal(out.logits, want.logits) and torch.equal(out["1.pattern"], want["1.pattern"])
        with torch.no_grad():
            twin.model.model.layers[0].mlp.down_proj.weight.zero_()
        assert largest(twin.run(ids, read=READ)["0.resid_post"], want["0.resid_post"]) > 0.1
        assert torch.equal(hm.run(ids, read=READ)["0.resid_post"], want["0.resid_post"])
