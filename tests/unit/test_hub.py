"""Dictionaries on the hub, from huggingface_hub's own cache and without a network; and names that are nothing."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import huggingface_hub.errors
import pytest
import torch
import yaml
from torch import Tensor

from interp.core.errors import ArtifactError, ConfigError
from interp.dictionaries.base import SAE, Transcoder
from interp.dictionaries.circuit_tracer import from_circuit_tracer, to_circuit_tracer
from interp.dictionaries.hub import stage
from interp.dictionaries.jumprelu import JumpReLUTranscoder
from interp.dictionaries.sparsify import from_sparsify, to_sparsify
from interp.dictionaries.topk import TopKSAE

D, F, K = 6, 20, 4
COMMIT, OTHER = "a" * 40, "b" * 40


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """huggingface_hub's cache, empty, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def cached(cache: Path, repo: str, commit: str = COMMIT, ref: str = "main") -> Path:
    """The folder where huggingface_hub keeps a commit of a repository."""
    at = cache / f"models--{repo.replace('/', '--')}"
    (at / "refs").mkdir(parents=True, exist_ok=True)
    (at / "refs" / ref).write_text(commit)
    (at / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
    return at / "snapshots" / commit


def a_sae(seed: int) -> TopKSAE:
    sae = TopKSAE.from_cfg({"d_in": D, "d_sae": F, "k": K})
    sae.init_from(draw(50, D, seed=seed), seed=seed)
    return sae.requires_grad_(False)


def test_a_folder_on_the_hub_is_loaded_at_the_revision_that_is_asked_for(cache: Path) -> None:
    new, old, x = a_sae(0), a_sae(1), draw(20, D, seed=5)
    new.save(cached(cache, "me/saes") / "gpt2" / "layer_3")
    old.save(cached(cache, "me/saes", OTHER, "v1") / "gpt2" / "layer_3")
    name = "hf://me/saes/gpt2/layer_3"
    loads = [(SAE.load(name), new, COMMIT), (SAE.load(Path(name)), new, COMMIT), (SAE.load(f"{name}/"), new, COMMIT)]
    loads += [(SAE.load(name, revision="v1"), old, OTHER), (SAE.load(name, revision=OTHER), old, OTHER)]
    loads += [(SAE.load("hf://me/saes@v1/gpt2/layer_3"), old, OTHER)]
    for got, sae, commit in loads:
        assert torch.equal(got(x), sae(x))
        assert got.cfg.metadata["loaded_from"] == f"hf://me/saes@{commit}/gpt2/layer_3"
    # Where it came from stays with it, and loads it again.
    again = SAE.load(loads[-1][0].cfg.metadata["loaded_from"])
    assert torch.equal(again(x), old(x))


def test_other_layouts_are_recognised_on_the_hub_too(cache: Path) -> None:
    top, x = cached(cache, "them/coders"), draw(20, D, seed=5)
    place = to_sparsify(a_sae(0), top / "layers.4")
    (top / "config.json").write_text(json.dumps({"model": "some/model"}))
    got = SAE.load("hf://them/coders/layers.4")
    assert torch.equal(got(x), from_sparsify(place)(x)) and got.cfg.metadata["model_name"] == "some/model"
    assert got.cfg.metadata["loaded_from"] == f"hf://them/coders@{COMMIT}/layers.4"
    made = {layer: JumpReLUTranscoder.from_cfg({"d_in": D, "d_out": D, "d_sae": F}) for layer in range(2)}
    made[1].init_from(draw(50, D), seed=0, target=draw(50, D, seed=1))
    to_circuit_tracer(made, top / "set", feature_input_hook="mlp.hook_in", feature_output_hook="hook_mlp_out")
    one = Transcoder.load("hf://them/coders/set/layer_1.safetensors")
    assert torch.equal(one(x), from_circuit_tracer(top / "set", 1)(x)) and bool(one.encode(x).any())
    assert one.cfg.metadata["hook_name"] == "blocks.1.mlp.hook_in"
    assert one.cfg.metadata["loaded_from"] == f"hf://them/coders@{COMMIT}/set/layer_1.safetensors"
    with pytest.raises(ArtifactError, match=r"give the file of one, such as hf://them/coders@a+/set/layer_3"):
        Transcoder.load("hf://them/coders/set")


def test_without_a_network_what_is_not_in_the_cache_is_refused_with_what_to_do(cache: Path) -> None:
    cached(cache, "me/saes")
    for name in ("hf://me/saes/gpt2", "hf://nobody/nothing"):
        with pytest.raises(ArtifactError, match=r"HF_HUB_OFFLINE forbids the network.*hf download.*give that folder"):
            SAE.load(name)
    with pytest.raises(ArtifactError, match=r"holds no layer_0.safetensors in the cache"):
        SAE.load("hf://me/saes/layer_0.safetensors")
    # The settings without the weights.
    a_sae(0).save(cached(cache, "me/half"))
    next(cache.rglob("sae_weights.safetensors")).unlink()
    with pytest.raises(ArtifactError, match=r"holds no sae_weights.safetensors or sae.safetensors in the cache"):
        SAE.load("hf://me/half")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("RepositoryNotFoundError", "is not on the hub, or not open to you.*hf auth login"),
        ("GatedRepoError", "is not on the hub, or not open to you.*hf auth login"),
        ("RevisionNotFoundError", "has no revision 'v9'; give a branch, a tag or a commit"),
        ("HfHubHTTPError", "cannot be fetched: HfHubHTTPError: said the hub"),
        ("RemoteEntryNotFoundError", r"holds no cfg\.json$"),
        (
            "LocalEntryNotFoundError",
            r"holds no cfg\.json in the cache.*, and the hub cannot be reached; where there is",
        ),
    ],
)
def test_what_the_hub_refuses_is_told_in_our_words(monkeypatch: pytest.MonkeyPatch, kind: str, message: str) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        answer: Any = SimpleNamespace(headers={}, request=None)
        response = {} if kind == "LocalEntryNotFoundError" else {"response": answer}
        raise getattr(huggingface_hub.errors, kind)("said the hub", **response)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(ArtifactError, match=message):
        SAE.load("hf://me/saes/x", revision="v9")


@pytest.mark.parametrize(
    "name",
    ["hf://", "hf://me", "hf://me/", "hf://me/saes/../../x", "hf://me/saes//x", "hf://../x/y", "hf://me/sa es/x"],
)
def test_names_that_are_no_place_on_the_hub_are_refused(cache: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="no folder on the hub"):
        SAE.load(name)


def test_revisions_are_of_the_hub_alone_and_one_at_a_time(cache: Path, tmp_path: Path) -> None:
    a_sae(0).save(tmp_path / "run")
    with pytest.raises(ConfigError, match="has no revisions"):
        SAE.load(tmp_path / "run", revision="v1")
    with pytest.raises(ConfigError, match="give one of them"):
        SAE.load("hf://me/saes@v2/x", revision="v1")


def test_a_card_tells_what_is_known_and_nothing_of_it_is_markup(tmp_path: Path) -> None:
    evil = "</td><script>alert(1)</script> | [x](javascript:1) `y`\n# z"
    sae, run = a_sae(0), tmp_path / "run"
    sae.cfg.metadata.update(hook_name="blocks.3.hook_resid_post", model_name=evil)
    run.mkdir()
    (run / "evaluation.json").write_text(json.dumps({"fvu": 0.123456789, "text": evil, "intervals": {"fvu": [0, 1]}}))
    (tmp_path / "staged").mkdir()
    stage(sae, tmp_path / "staged", run=run)
    names = sorted(p.name for p in (tmp_path / "staged").iterdir())
    assert names == ["README.md", "cfg.json", "evaluation.json", "sae_weights.safetensors"]
    x = draw(5, D)
    assert torch.equal(SAE.load(tmp_path / "staged")(x), sae(x))
    card = (tmp_path / "staged" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "saelens"
    body = card.split("---\n", 2)[2]
    assert "# SAE of blocks.3.hook_resid_post in " in body and "| fvu | 0.123457 |" in body and "| d sae | 20 |" in body
    assert not set("<>[]`") & set(body.rpartition("\n\n")[0]) and body.count("\n# ") <= 1
    assert "intervals" not in body
    (run / "evaluation.json").write_text("{")
    with pytest.raises(ArtifactError, match="run `interp eval` again"):
        stage(sae, tmp_path / "staged", run=run)


def test_a_push_sends_the_staged_folder_and_says_how_to_load_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sae, x = a_sae(0), draw(20, D, seed=5)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(cache / "token"))
    with pytest.raises(ArtifactError, match="needs a token with write access: set HF_TOKEN"):
        sae.push_to_hub("me/saes")
    monkeypatch.setenv("HF_TOKEN", "hf_nothing")
    with pytest.raises(ArtifactError, match=r"could not be written: OfflineModeIsEnabled.*writes the same files"):
        sae.push_to_hub("me/saes")
    for repo, folder in (("me", ""), ("me/saes/x", ""), ("me/saes", "../x"), ("me/saes@v1", "")):
        with pytest.raises(ConfigError, match=r"no (place|folder) on the hub"):
            sae.push_to_hub(repo, folder_in_repo=folder)
    made: list[dict[str, Any]] = []

    class Sent:
        oid = COMMIT

    def create_repo(self: object, repo_id: str, **said: Any) -> None:
        made.append({"repo_id": repo_id, **said})

    def upload_folder(self: object, *, repo_id: str, folder_path: str, path_in_repo: str, **said: Any) -> Sent:
        target = cached(cache, repo_id) / path_in_repo
        target.mkdir(parents=True)
        for file in Path(folder_path).iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        made.append(said)
        return Sent()

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", create_repo)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload_folder)
    where = sae.push_to_hub("me/saes", folder_in_repo="gpt2/layer_3", message="first")
    assert where == f"hf://me/saes@{COMMIT}/gpt2/layer_3"
    assert made == [
        {"repo_id": "me/saes", "private": True, "exist_ok": True},
        {"revision": None, "commit_message": "first"},
    ]
    assert torch.equal(SAE.load(where)(x), sae(x))


# -- names ----------------------------------------------------------------------------------------------------------


def test_a_name_that_is_nothing_gets_the_nearest_thing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    a_sae(0).save("runs/first")
    for name, hint in (
        ("runs/frist", "did you mean 'first'"),
        ("runz/first", "for one on the hub write hf://runz/first"),
        ("gpt2-small-res-jbb/blocks.8.hook_resid_pre", "of SAELens' releases, did you mean .*'gpt2-small-res-jb'"),
        ("nothing", "give the folder of a finished run"),
        (str(tmp_path / "runs" / "frist"), "did you mean 'first'"),
    ):
        with pytest.raises(ArtifactError, match=f"no such folder; {hint}"):
            SAE.load(name)
    with pytest.raises(ArtifactError, match="folders that do: first; give one of them"):
        SAE.load("runs")
    with pytest.raises(ArtifactError, match="is a file; give its folder, runs/first"):
        SAE.load("runs/first/cfg.json")


def test_latents_have_pages_on_neuronpedia_where_their_dictionary_is_known(tmp_path: Path) -> None:
    sae = a_sae(0)
    with pytest.raises(ArtifactError, match="no neuronpedia_id"):
        sae.neuronpedia_url(3)
    sae.save(tmp_path, notes={"neuronpedia_id": "gpt2-small/8-res-jb"})
    kept = SAE.load(tmp_path)
    kept.save(tmp_path / "again")
    again = SAE.load(tmp_path / "again")
    assert again.neuronpedia_url(3) == "https://www.neuronpedia.org/gpt2-small/8-res-jb/3"
    for latent in (-1, F):
        with pytest.raises(ConfigError, match="there is no latent"):
            again.neuronpedia_url(latent)
    for wrong in ("gpt2-small", "a/b/c", 'a/b"><script>', "../x", 7, "a/b\n"):
        again.cfg.metadata["neuronpedia_id"] = wrong
        with pytest.raises(ArtifactError, match="expected 'model/source'"):
            again.neuronpedia_url(3)
