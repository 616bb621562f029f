"""Our folders in SAELens, SAELens' objects and folders in ours: the same function both ways."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from interp.core.errors import ArtifactError
from interp.dictionaries.base import SAE
from interp.dictionaries.interop import from_sae_lens, to_sae_lens
from interp.dictionaries.topk import TopKSAE

# SAELens imports a module that TransformerLens has moved.
pytestmark = pytest.mark.filterwarnings("ignore:The 'utils' module has been deprecated:DeprecationWarning")

SETTINGS = [{}, {"apply_b_dec_to_input": False}, {"rescale_acts_by_decoder_norm": True}]

_ALONE = """
import sys
from pathlib import Path
import sae_lens
from safetensors.torch import load_file, save_file
folder = Path(sys.argv[1])
sae = sae_lens.SAE.load_from_disk(folder / "run", device="cpu")
x = load_file(folder / "x.safetensors")["x"]
latents = sae.encode(x)
save_file({"latents": latents, "out": sae.decode(latents)}, folder / "theirs.safetensors")
print(sae.cfg.architecture(), sae.cfg.metadata.hook_name, any(m.split(".")[0] == "interp" for m in sys.modules))
"""


def random_sae(settings: dict[str, bool]) -> TopKSAE:
    sae = TopKSAE.from_cfg({"architecture": "topk", "d_in": 24, "d_sae": 96, "k": 6, **settings})
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape) / 3)
    return sae.requires_grad_(False)


def test_a_process_that_never_imported_interp_loads_a_saved_sae_with_the_same_reconstruction(tmp_path: Path) -> None:
    sae, x = random_sae({}), torch.randn(2, 50, 24)
    sae.save(tmp_path / "run", notes={"hook_name": "blocks.3.hook_resid_post", "model_name": "tiny"})
    save_file({"x": x}, tmp_path / "x.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", _ALONE, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["topk", "blocks.3.hook_resid_post", "False"]
    theirs = load_file(tmp_path / "theirs.safetensors")
    torch.testing.assert_close(theirs["latents"], sae.encode(x), rtol=0, atol=1e-6)
    torch.testing.assert_close(theirs["out"], sae(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("settings", SETTINGS)
def test_objects_convert_both_ways_without_changing_the_function(settings: dict[str, bool]) -> None:
    sae, x = random_sae(settings), torch.randn(40, 24)
    theirs = to_sae_lens(sae)
    torch.testing.assert_close(theirs.encode(x), sae.encode(x), rtol=0, atol=1e-6)
    torch.testing.assert_close(theirs(x), sae(x), rtol=0, atol=1e-6)
    back = from_sae_lens(theirs)
    assert torch.equal(back(x), sae(x)) and back.cfg.model_dump(exclude={"metadata"}) == sae.cfg.model_dump(
        exclude={"metadata"}
    )
    with torch.no_grad():
        theirs.W_dec.zero_()
    assert float(back.W_dec.abs().sum()) > 0


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_folder_that_sae_lens_saved_loads_here(tmp_path: Path, settings: dict[str, bool]) -> None:
    sae, x = random_sae(settings), torch.randn(40, 24)
    to_sae_lens(sae).save_model(tmp_path)
    torch.testing.assert_close(SAE.load(tmp_path)(x), sae(x), rtol=0, atol=1e-6)


def test_the_saved_settings_are_those_that_sae_lens_writes(tmp_path: Path) -> None:
    sae = random_sae({})
    sae.save(tmp_path / "ours")
    to_sae_lens(sae).save_model(tmp_path / "theirs")
    ours, theirs = (json.loads((tmp_path / who / "cfg.json").read_text()) for who in ("ours", "theirs"))
    assert ours.pop("metadata")["sae_lens_version"] == theirs.pop("metadata")["sae_lens_version"] == version("sae-lens")
    assert ours == theirs
    weights = [load_file(tmp_path / who / "sae_weights.safetensors") for who in ("ours", "theirs")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_what_has_no_counterpart_is_refused() -> None:
    from sae_lens import MatchingPursuitSAE, MatchingPursuitSAEConfig

    with pytest.raises(ArtifactError, match="'matching_pursuit' has no counterpart"):
        from_sae_lens(MatchingPursuitSAE(MatchingPursuitSAEConfig(d_in=4, d_sae=8, residual_threshold=0.1)))
    theirs = to_sae_lens(random_sae({}))
    theirs.cfg.normalize_activations = "expected_average_only_in"
    with pytest.raises(ArtifactError, match="does not hold that factor"):
        from_sae_lens(theirs)
