"""SAELens' folders of any version, its releases, and what it loads that cannot be loaded here."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from interp.core.errors import ArtifactError, ConfigError
from interp.dictionaries.base import SAE, Dictionary
from interp.dictionaries.folder import ARCHITECTURES, why_not
from interp.dictionaries.interop import from_sae_lens, release_names
from tests.dictionaries import make

# SAELens imports a module that TransformerLens has moved.
pytestmark = pytest.mark.filterwarnings("ignore:The 'utils' module has been deprecated:DeprecationWarning")

D, F, K = 8, 24, 3
COMMIT = "c" * 40
RELEASE, ID, REPO = "gpt2-small-res-jb", "blocks.8.hook_resid_pre", "jbloom/GPT2-Small-SAEs-Reformatted"


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def old_settings(**more: Any) -> dict[str, Any]:
    """A cfg.json as SAELens 3 wrote it."""
    return {
        "architecture": "standard",
        "d_in": D,
        "d_sae": F,
        "activation_fn_str": "relu",
        "apply_b_dec_to_input": True,
        "finetuning_scaling_factor": False,
        "context_size": 128,
        "model_name": "gpt2-small",
        "hook_name": ID,
        "hook_layer": 8,
        "hook_head_index": None,
        "prepend_bos": True,
        "dataset_path": "Skylion007/openwebtext",
        "dataset_trust_remote_code": True,
        "normalize_activations": "none",
        "dtype": "torch.float32",
        "device": "cpu",
        "sae_lens_training_version": None,
        **more,
    }


def write(folder: Path, cfg: dict[str, Any], **more: Tensor) -> dict[str, Tensor]:
    folder.mkdir(parents=True, exist_ok=True)
    held = {"W_enc": draw(D, F), "b_enc": draw(F, seed=1), "W_dec": draw(F, D, seed=2), "b_dec": draw(D, seed=3)}
    held |= more
    (folder / "cfg.json").write_text(json.dumps(cfg))
    save_file(held, folder / "sae_weights.safetensors")
    return held


@pytest.mark.parametrize("version", [None, "3.20.0", "5.11.0"])
@pytest.mark.parametrize("kind", ["standard", "topk", "nameless"])
def test_a_folder_from_before_version_6_is_read_as_the_function_that_it_was(
    tmp_path: Path, kind: str, version: str | None
) -> None:
    cfg = old_settings(**({} if version is None else {"sae_lens_version": version}))
    if kind == "topk":
        cfg |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
    if kind == "nameless":
        del cfg["architecture"]
    held, x = write(tmp_path, cfg), draw(30, D, seed=9)
    got = SAE.load(tmp_path)
    pre = (x - held["b_dec"]) @ held["W_enc"] + held["b_enc"]
    latents = pre.relu()
    if kind == "topk":
        latents = torch.where(pre >= pre.sort(-1, descending=True).values[:, K - 1 : K], latents, 0)
    torch.testing.assert_close(got.encode(x), latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got(x), latents @ held["W_dec"] + held["b_dec"], rtol=1e-5, atol=1e-5)
    about = got.cfg.metadata
    assert (about["hook_name"], about["model_name"], about["context_size"]) == (ID, "gpt2-small", 128)
    assert about["loaded_format"] == f"SAELens {version or 'before 6.0'}"
    # Saved, it is of this version, and read without a conversion.
    again = SAE.load(got.save(tmp_path / "new"))
    torch.testing.assert_close(again(x), got(x), rtol=1e-5, atol=1e-5)
    assert again.cfg.metadata["hook_name"] == ID


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_fn_str": "tanh-relu"}, "activation 'tanh-relu'; only relu and topk"),
        ({"architecture": "mystery"}, "cannot be converted"),
        ({"d_sae": F + 1}, "cannot be converted"),
        ({"finetuning_scaling_factor": True}, None),
    ],
)
def test_an_old_folder_that_cannot_be_followed_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str | None
) -> None:
    held = write(tmp_path, old_settings(dtype="float32", **change))
    if message is None:  # SAELens looks for the factor among the weights, where there is none
        assert torch.equal(SAE.load(tmp_path).W_dec, held["W_dec"])
        return
    with pytest.raises(ArtifactError, match=message):
        SAE.load(tmp_path)


def test_each_architecture_that_sae_lens_loads_is_loaded_or_refused_with_its_reason(tmp_path: Path) -> None:
    from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

    others = SAE_CLASS_REGISTRY.keys() | SAE_TRAINING_CLASS_REGISTRY.keys() - ARCHITECTURES.keys()
    others -= ARCHITECTURES.keys()
    assert others == {"abstopk", "matching_pursuit", "temporal", "batchtopk", "matryoshka_batchtopk"}
    for name in others:
        reason = why_not(name)
        assert "known:" not in reason and "did you mean" not in reason
        cfg = {"architecture": name, "d_in": D, "d_sae": F, "metadata": {"sae_lens_version": "6.54.12"}}
        write(tmp_path / name, cfg)
        with pytest.raises(ArtifactError, match=f"a '{name}' dictionary, which cannot be loaded; {reason[:40]}"):
            Dictionary.load(tmp_path / name)


def test_a_signed_sae_is_refused_as_an_object_too() -> None:
    from sae_lens import AbsTopKSAE, AbsTopKSAEConfig

    theirs = AbsTopKSAE(AbsTopKSAEConfig(d_in=D, d_sae=F, k=K))
    with torch.no_grad():
        theirs.W_enc.copy_(draw(D, F))
    assert bool((theirs.encode(draw(20, D, seed=1)) < 0).any()), "which is the reason"
    with pytest.raises(ArtifactError, match="its latents may be negative"):
        from_sae_lens(theirs)


def test_a_size_beyond_all_memory_is_a_damaged_folder(tmp_path: Path) -> None:
    cfg = {"architecture": "topk", "d_in": D, "d_sae": 10**15, "k": K, "metadata": {"sae_lens_version": "6.54.12"}}
    write(tmp_path, cfg)
    with pytest.raises(ArtifactError, match="d_sae 1000000000000000, for which there is no memory"):
        SAE.load(tmp_path)


def test_other_files_of_a_folder_are_left_as_they_are(tmp_path: Path) -> None:
    made = make("topk", dtype="float32")
    made.save(tmp_path)
    save_file({"sparsity": draw(40)}, tmp_path / "sparsity.safetensors")
    before = (tmp_path / "sparsity.safetensors").read_bytes()
    SAE.load(tmp_path).save(tmp_path)
    assert (tmp_path / "sparsity.safetensors").read_bytes() == before


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """A dictionary of a release in huggingface_hub's cache, as SAELens looks for it, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    at = tmp_path / "hub" / f"models--{REPO.replace('/', '--')}"
    (at / "refs").mkdir(parents=True)
    (at / "refs" / "main").write_text(COMMIT)
    held = write(at / "snapshots" / COMMIT / ID, old_settings(dtype="float32"))
    save_file({"sparsity": draw(F)}, at / "snapshots" / COMMIT / ID / "sparsity.safetensors")
    return held


def test_a_release_of_sae_lens_is_loaded_by_its_name(release: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"center_writing_weights.*Give the model"):
        SAE.load(f"{RELEASE}/{ID}")
    got, x = SAE.load(f"{RELEASE}/{ID}", model="processed"), draw(30, D, seed=9)
    latents = ((x - release["b_dec"]) @ release["W_enc"] + release["b_enc"]).relu()
    torch.testing.assert_close(got.encode(x), latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got(x), latents @ release["W_dec"] + release["b_dec"], rtol=1e-5, atol=1e-5)
    about = got.cfg.metadata
    assert about["loaded_from"] == f"sae_lens:{RELEASE}/{ID}" and about["loaded_from_commit"] == f"{REPO}@{COMMIT}"
    assert got.neuronpedia_url(7) == "https://www.neuronpedia.org/gpt2-small/8-res-jb/7"
    again = SAE.load(got.save(tmp_path / "kept"), model="processed")
    assert again.neuronpedia_url(7) == got.neuronpedia_url(7)
    with pytest.raises(ArtifactError, match=r"has no 'blocks\.8\.hook_resid_prf'; did you mean 'blocks"):
        SAE.load(f"{RELEASE}/blocks.8.hook_resid_prf")
    with pytest.raises(ArtifactError, match="HF_HUB_OFFLINE forbids the network"):
        SAE.load(f"{RELEASE}/blocks.9.hook_resid_pre")
    with pytest.raises(ConfigError, match="names no revision"):
        SAE.load(f"{RELEASE}/{ID}", revision="v1")


def test_the_names_of_releases_are_those_of_sae_lens() -> None:
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    assert release_names() == get_pretrained_saes_directory().keys()
