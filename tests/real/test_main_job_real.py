"""The main job on a real language model, as a person would run it."""

import json
from pathlib import Path

import pytest
import torch

import interp
from interp.cli.main import main


def test_an_sae_of_stories260k_recovers_the_models_loss(
    real: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = ["train", "--model", str(real / "models" / "stories260K"), "--site", "blocks.3.hook_resid_post"]
    words += ["--data", str(real / "text" / "tinystories" / "tinystories_5k.jsonl"), "--out", str(out), "--json"]
    words += ["--dictionary.d-sae", "1024", "--dictionary.k", "8", "--train.tokens", "1000000"]
    assert main(words) == 0
    figures = json.loads(capfd.readouterr().out)
    assert figures["ce_recovered"] >= 0.85
    assert figures["l0"] <= 8 and figures["fvu"] < 0.25 and figures["dead"] < 0.1
    assert interp.SAE.load(out)(torch.zeros(1, 64)).shape == (1, 64)
