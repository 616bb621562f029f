"""`interp export`: what it writes for whom, and what it refuses before it writes."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from interp.cli.main import main
from interp.dictionaries.base import SAE, Dictionary, Transcoder
from interp.dictionaries.circuit_tracer import from_circuit_tracer
from interp.dictionaries.jumprelu import JumpReLUTranscoder
from interp.dictionaries.topk import TopKSAE

D, F = 6, 20


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Transcoders of two layers and a TopK SAE, as runs leave them."""
    folder = tmp_path_factory.mktemp("runs")
    for layer in range(2):
        made = JumpReLUTranscoder.from_cfg({"d_in": D, "d_out": D, "d_sae": F})
        made.init_from(torch.randn(40, D), seed=layer, target=torch.randn(40, D))
        sites = {"hook_name": f"blocks.{layer}.ln2.hook_normalized", "hook_name_out": f"blocks.{layer}.hook_mlp_out"}
        made.save(folder / f"mlp{layer}", notes={**sites, "model_name": "some/model"})
    sae = TopKSAE.from_cfg({"d_in": D, "d_sae": F, "k": 3})
    sae.init_from(torch.randn(40, D), seed=0)
    sae.save(folder / "sae", notes={"hook_name": "blocks.1.hook_resid_post"})
    return folder


def export(runs: Path, names: str, to: str, out: Path, *more: str) -> int:
    return main(["export", *(str(runs / name) for name in names.split()), "--to", to, "--out", str(out), *more])


def test_transcoders_become_a_set_that_holds_the_same_functions(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, x = tmp_path / "deep" / "set", torch.randn(20, D)
    assert export(runs, "mlp1 mlp0", "circuit-tracer", out, "--scan", "mine", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"out": str(out), "format": "circuit-tracer", "dictionaries": 2}
    for layer in range(2):
        assert torch.equal(from_circuit_tracer(out, layer)(x), Transcoder.load(runs / f"mlp{layer}")(x))
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert (config["scan"], config["feature_input_hook"], config["model_name"]) == (
        "mine",
        "ln2.hook_normalized",
        "some/model",
    )


def test_a_topk_sae_goes_to_sparsify_and_back_to_sae_lens(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there, x = tmp_path / "layers.1", torch.randn(20, D)
    assert export(runs, "sae", "sparsify", there) == 0
    assert capsys.readouterr().out == f"{there}\n"
    assert export(tmp_path, "layers.1", "saelens", tmp_path / "back") == 0
    back = SAE.load(tmp_path / "back")
    assert torch.equal(back(x), SAE.load(runs / "sae")(x))
    assert back.cfg.metadata["hook_name"] == "blocks.1.hook_resid_post"
    # Several at once lie in folders of their own.
    assert export(runs, "sae mlp0", "saelens", tmp_path / "both") == 0
    both = [Dictionary.load(tmp_path / "both" / name) for name in ("sae", "mlp0")]
    assert torch.equal(both[0](x), back(x)) and torch.equal(both[1](x), Transcoder.load(runs / "mlp0")(x))


@pytest.mark.parametrize(
    ("names", "to", "message"),
    [
        ("mlp0 sae", "circuit-tracer", "is a TopKSAE; circuit-tracer takes transcoders"),
        ("mlp1", "circuit-tracer", "layers [1]; circuit-tracer replaces every MLP"),
        ("mlp0 mlp0", "circuit-tracer", "is of layer 0, and so is another"),
        ("mlp0", "sparsify", "this is a JumpReLUTranscoder"),
        ("sae mlp0", "sparsify", "this is a JumpReLUTranscoder"),
        ("sae sae", "saelens", "would be written to one folder"),
        ("nothing", "saelens", "no such folder"),
    ],
)
def test_what_cannot_be_exported_is_refused_and_leaves_nothing(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], names: str, to: str, message: str
) -> None:
    assert export(runs, names, to, tmp_path / "out") == 1
    shown = capsys.readouterr()
    assert message in shown.err and "Traceback" not in shown.err and not shown.out
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_and_the_options_are_checked(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    assert export(runs, "sae", "saelens", tmp_path / "out") == 1
    assert "nothing is overwritten" in capsys.readouterr().err
    assert export(runs, "sae", "parquet", tmp_path / "new") == 2
    assert main(["export", "--to", "saelens", "--out", str(tmp_path / "new")]) == 2
    assert not (tmp_path / "new").exists()


def test_measuring_a_dictionary_that_is_no_folder_here_needs_a_file_to_write(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(runs, "mlp0 mlp1", "circuit-tracer", tmp_path / "set") == 0
    for verb, what in (("eval", "where the table goes"), ("show", "which file to write")):
        assert main([verb, str(tmp_path / "set" / "layer_0.safetensors"), "--model", "nothing"]) == 2
        assert f"say {what} with --out" in capsys.readouterr().err
