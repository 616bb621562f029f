"""Building a testbed model: same bytes, same text, resumable, packaged whole."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import interp
from interp.core.resources import resource
from interp.train.build_testbed import BuildConfig, WorldData, build_testbed, new_model, package

TINY = {
    "model": {"family": "gpt2", "n_layers": 1, "d_model": 16, "n_heads": 2, "d_mlp": 32, "ctx": 128},
    "rows": 2,
    "train": {"steps": 4, "log_every": 2, "resume_every": 2, "checkpoints": [0, 2]},
}
LLAMA = {**TINY, "model": {**TINY["model"], "family": "llama", "n_kv_heads": 1}}  # type: ignore[dict-item]


def weights_of(folder: Path) -> str:
    return hashlib.sha256((folder / "final" / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("settings", [TINY, LLAMA], ids=["gpt2", "llama"])
def test_the_same_configuration_gives_the_same_bytes(settings: dict[str, object], tmp_path: Path, repo: Path) -> None:
    cfg = BuildConfig.model_validate(settings)
    build_testbed(cfg, tmp_path / "here")
    code = (
        "import json, sys\n"
        "from interp.train.build_testbed import BuildConfig, build_testbed\n"
        "build_testbed(BuildConfig.model_validate(json.loads(sys.argv[1])), sys.argv[2])\n"
    )
    env = {**os.environ, "PYTHONHASHSEED": "77"}
    there = tmp_path / "there"
    subprocess.run(
        [sys.executable, "-c", code, json.dumps(settings), str(there)], cwd=repo, env=env, check=True, timeout=240
    )
    assert weights_of(tmp_path / "here") == weights_of(there)
    other = BuildConfig.model_validate({**settings, "seed": 1})
    build_testbed(other, tmp_path / "other")
    assert weights_of(tmp_path / "here") != weights_of(tmp_path / "other")


def test_what_was_built_loads_like_any_model_and_is_packaged_whole(tmp_path: Path) -> None:
    build_testbed(BuildConfig.model_validate(TINY), tmp_path / "run")
    folder = package(tmp_path / "run", tmp_path / "packaged")
    hm = interp.HookManager.load(folder)
    assert hm.run("Mary lives in", read=["0.resid_post"])["0.resid_post"].shape == (1, 4, 16)
    assert {"metrics.jsonl", "provenance.json", "tokenizer.json"} <= {p.name for p in folder.iterdir()}
    assert "task.ioi" in (folder / "metrics.jsonl").read_text()
    steps = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert steps == ["step-00000000", "step-00000002"]


def test_the_packaged_configurations_are_those_of_the_packaged_models() -> None:
    for name in ("testbed", "testbed-llama"):
        cfg = BuildConfig.packaged(name)
        record = json.loads((resource(f"data/{name}") / "provenance.json").read_text())
        assert record["settings"]["options"] == cfg.train.model_dump(mode="json")
        assert record["settings"]["data"]["seed"] == cfg.text_seed and record["seed"] == cfg.seed
        fresh = new_model(cfg.model, seed=cfg.seed)
        held = interp.HookManager.load(name).model
        assert {n: p.shape for n, p in fresh.named_parameters()} == {n: p.shape for n, p in held.named_parameters()}


def test_weights_of_open_tokens_change_what_is_learnt_from_and_nothing_else() -> None:
    plain, weighed = (WorldData(2, 32, seed=5, open_weight=w) for w in (1.0, 0.2))
    (one, state), (two, same) = (next(iter(data.batches(None))) for data in (plain, weighed))
    assert torch.equal(one.ids, two.ids) and state == same and one.weight is None
    assert two.weight is not None and two.weight.unique().tolist() == pytest.approx([0.2, 1.0])


def test_the_stream_goes_on_where_it_stood() -> None:
    data = WorldData(2, 32, seed=5)
    whole = [batch.ids for (batch, _), _ in zip(data.batches(None), range(4), strict=False)]
    stream = data.batches(None)
    next(stream)
    _, state = next(stream)
    again = [batch.ids for (batch, _), _ in zip(data.batches(state), range(2), strict=False)]
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], again, strict=True))


def test_a_shortened_schedule_keeps_what_fits() -> None:
    short = BuildConfig.packaged("testbed").shortened(300)
    assert short.train.steps == 300 and max(short.train.checkpoints) <= 300 and short.train.warmup_steps < 300
    assert BuildConfig.packaged("testbed").shortened(1).train.warmup_steps == 0


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("model", "message"),
    [({"d_model": 15}, "n_heads"), ({"n_kv_heads": 2}, "llama"), ({"family": "bert"}, "gpt2"), ({"ctx": 64}, "128")],
    ids=["width", "kv", "family", "context"],
)
def test_shapes_that_cannot_be_are_refused(model: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BuildConfig.model_validate({**TINY, "model": {**TINY["model"], **model}})  # type: ignore[dict-item]
