"""`interp show`, and what it has in common with `interp eval`: what they read, what they write, what they refuse."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from interp.cli.main import main
from interp.dictionaries.topk import TopKConfig, TopKSAE
from interp.train.config import TrainConfig
from tests.families import make, word_tokenizer

SITE = "1.resid_post"


def texts(n: int, seed: int = 0) -> str:
    draw = torch.Generator().manual_seed(seed)
    rows = (torch.randint(1, 120, (12,), generator=draw).tolist() for _ in range(n))
    return "\n".join(json.dumps({"text": " ".join(f"w{i}" for i in row)}) for row in rows)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, two texts, and a run whose dictionary was never trained."""
    folder = tmp_path_factory.mktemp("show")
    make("Llama").save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    (folder / "text.jsonl").write_text(texts(200), encoding="utf-8")
    (folder / "other.jsonl").write_text(texts(40, seed=1), encoding="utf-8")
    sae = TopKSAE(TopKConfig(d_in=32, d_sae=48, k=6))
    sae.init_from(torch.randn(500, 32, generator=torch.Generator().manual_seed(0)), seed=0)
    run = folder / "run"
    sae.save(run, notes={"hook_name": "blocks.1.hook_resid_post", "context_size": 16})
    settings: dict[str, Any] = {"model": str(folder / "model"), "site": SITE, "data": str(folder / "text.jsonl")}
    settings |= {"out": str(run), "text": {"ctx": 16, "hold_out_every": 5, "bos": True}, "evaluation": {"tokens": 300}}
    (run / "config.yaml").write_text(TrainConfig.model_validate(settings).to_yaml(), encoding="utf-8")
    lines = (json.dumps({"step": i, "tokens": 100 * i, "fvu": 1 / i, "l0": 6.0}) for i in range(1, 9))
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_show_writes_one_page_of_a_run_and_prints_where(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made / "run"
    assert main(["show", str(run), "--n", "12", "--tokens", "400", "--examples", "3", "--context", "4"]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{run / 'page.html'}\n"
    page = (run / "page.html").read_text(encoding="utf-8")
    assert "Dictionary of 1.resid_post in model" in page and "FVU in training" in page and "k 6" in page
    assert page.count('"id":') == 12


def test_show_takes_named_latents_other_text_and_another_file(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "some.html"
    other = ["--data", str(made / "other.jsonl"), "--tokens", "200", "--out", str(out), "--json"]
    assert main(["show", str(made / "run"), "--latents", "7,3", *other]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["page"] == str(out) and printed["latents"] == [7, 3] and printed["bytes"] == out.stat().st_size
    assert str(made / "other.jsonl") in out.read_text(encoding="utf-8")


def test_a_dictionary_without_a_run_is_shown_and_measured_when_told_model_and_text(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("cfg.json", "sae_weights.safetensors"):
        shutil.copy(made / "run" / name, bare / name)
    assert main(["show", str(bare)]) == 1
    assert "give --model" in capsys.readouterr().err
    model = ["--model", str(made / "model")]
    assert main(["show", str(bare), *model]) == 1
    assert "give --data" in capsys.readouterr().err
    data = ["--data", str(made / "other.jsonl"), "--tokens", "200"]
    assert main(["show", str(bare), *model, *data, "--n", "3"]) == 0
    capsys.readouterr()
    assert main(["eval", str(bare), *model, *data, "--json", "--only", "core"]) == 0
    figures = {row["figure"] for row in json.loads(capsys.readouterr().out)["rows"]}
    assert {"fvu", "pca_fvu"} <= figures and "bits" not in figures
    # Without other text to fit the PCA on, a part of this one is held out.
    assert json.loads((bare / "evaluation.json").read_text())["text"].startswith("every 20th document")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--latents", "3,x"], 2, "expected numbers with commas"),
        (["--latents", "99"], 1, "has no latent 99"),
        (["--out", "."], 2, "is a folder"),
        (["--n", "0"], 2, ""),
        (["--data", "nowhere.jsonl"], 1, "nowhere.jsonl"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_one_line(
    made: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, message: str
) -> None:
    assert main(["show", str(made / "run"), *words]) == code
    shown = capsys.readouterr()
    assert message in shown.err and "Traceback" not in shown.err and not shown.out


def test_a_folder_without_a_dictionary_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("eval", "show"):
        assert main([verb, str(tmp_path)]) == 1
        assert "holds no cfg.json" in capsys.readouterr().err
