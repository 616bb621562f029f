"""Every architecture that SAELens knows: our folders there, its folders and objects here, and its training losses."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from interp.core.errors import ArtifactError
from interp.data.store import Batch
from interp.dictionaries.base import Dictionary
from interp.dictionaries.folder import ARCHITECTURES
from interp.dictionaries.interop import from_sae_lens, to_sae_lens
from tests.dictionaries import D_IN, D_SAE, batch_for, gradients, make, off

# SAELens imports a module that TransformerLens has moved.
pytestmark = pytest.mark.filterwarnings("ignore:The 'utils' module has been deprecated:DeprecationWarning")

# SAELens' name → what we train under ours.
TRAINED = {
    "topk": ("topk", "sae"),
    "standard": ("standard", "sae"),
    "gated": ("gated", "sae"),
    "jumprelu": ("jumprelu-l0", "sae"),
    "transcoder": ("standard", "transcoder"),
    "skip_transcoder": ("standard", "skip_transcoder"),
    "jumprelu_transcoder": ("jumprelu-l0", "transcoder"),
    "jumprelu_skip_transcoder": ("jumprelu-l0", "skip_transcoder"),
}
# What we train has no name there, and is saved as something that has.
SAVED_AS = {
    "batchtopk": ("batchtopk", "sae"),
    "batchtopk transcoder": ("batchtopk", "skip_transcoder"),
    "gradient_topk": ("gradient_topk", "sae"),
    "feature_choice": ("feature_choice", "sae"),
}

_ALONE = """
import sys
from pathlib import Path
import sae_lens
from safetensors.torch import load_file, save_file
folder = Path(sys.argv[1])
x = load_file(folder / "x.safetensors")["x"]
found = {}
for run in sorted((folder / "ours").iterdir()):
    sae = sae_lens.SAE.load_from_disk(run, device="cpu").eval()
    latents = sae.encode(x)
    parts = {"latents": latents, "decoded": sae.decode(latents), "out": sae(x)}
    found |= {f"{run.name}.{name}": value.detach().contiguous() for name, value in parts.items()}
    sae.save_model(folder / "theirs" / run.name)
    print(run.name, "=", sae.cfg.architecture(), sae.cfg.metadata.hook_name)
save_file(found, folder / "theirs.safetensors")
print("interp imported:", any(name.split(".")[0] == "interp" for name in sys.modules))
"""


def trained(kind: str, form: str) -> Any:
    """A dictionary of ours after a batch, in float32, its rows of norm 1 where the kind keeps them so."""
    made = make(kind, form, dtype="float32")
    made.loss(batch_for(made))
    made.after_step()
    return made


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Tensor, dict[str, Tensor], str]:
    """Ours saved; read, run and saved again by a process that knows SAELens alone."""
    folder, x = tmp_path_factory.mktemp("exchange"), torch.randn(50, D_IN, generator=torch.Generator().manual_seed(8))
    ours = {name: trained(*what) for name, what in {**TRAINED, **SAVED_AS}.items()}
    for name, made in ours.items():
        made.save(folder / "ours" / name, notes={"hook_name": "blocks.3.hook_resid_post"})
    save_file({"x": x}, folder / "x.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", _ALONE, str(folder)], cwd=folder, capture_output=True, text=True, check=True
    )
    return folder, ours, x, load_file(folder / "theirs.safetensors"), done.stdout


def test_all_architectures_are_exchanged() -> None:
    assert TRAINED.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("name", [*TRAINED, *SAVED_AS])
def test_a_process_that_never_imported_interp_gets_the_same_from_what_we_saved(exchanged: Any, name: str) -> None:
    folder, ours, x, theirs, said = exchanged
    made = ours[name]
    assert "interp imported: False" in said
    assert f"{name} = {made.frozen().cfg.architecture} blocks.3.hook_resid_post" in said
    assert name not in TRAINED or made.cfg.architecture == name
    # Its own rows were brought to norm 1 when it was saved.
    saved = made.frozen()
    latents = saved.encode(x)
    assert bool(latents.any())
    for what, value in (("latents", latents), ("decoded", saved.decode(latents)), ("out", saved(x))):
        torch.testing.assert_close(theirs[f"{name}.{what}"], value, rtol=1e-6, atol=1e-6, msg=what)
    torch.testing.assert_close(saved(x), made(x), rtol=1e-5, atol=1e-5)
    again = Dictionary.load(folder / "theirs" / name)
    assert type(again) is type(saved) and torch.equal(again(x), saved(x))


@pytest.mark.parametrize("name", [*TRAINED, *SAVED_AS])
def test_objects_convert_both_ways_without_changing_the_function(name: str) -> None:
    made = trained(*{**TRAINED, **SAVED_AS}[name])
    saved, theirs, x = made.frozen(), to_sae_lens(made), torch.randn(40, D_IN)
    torch.testing.assert_close(theirs.encode(x), saved.encode(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(theirs(x), saved(x), rtol=1e-6, atol=1e-6)
    back = from_sae_lens(theirs)
    assert type(back) is type(saved) and not back(x).requires_grad
    assert all(torch.equal(value, saved.state_dict()[n]) for n, value in back.state_dict().items())
    assert back.cfg.model_dump(exclude={"metadata"}) == saved.cfg.model_dump(exclude={"metadata"})
    with torch.no_grad():
        theirs.W_dec.zero_()
    assert bool(back.W_dec.any()) and bool(made.W_dec.any())


@pytest.mark.parametrize("name", TRAINED)
def test_settings_and_tensors_are_those_that_sae_lens_writes(tmp_path: Path, name: str) -> None:
    made = trained(*TRAINED[name])
    made.save(tmp_path / "ours")
    to_sae_lens(made).save_model(tmp_path / "theirs")
    ours, theirs = (json.loads((tmp_path / who / "cfg.json").read_text()) for who in ("ours", "theirs"))
    assert ours.pop("metadata")["sae_lens_version"] == theirs.pop("metadata")["sae_lens_version"]
    assert ours == theirs
    weights = [load_file(tmp_path / who / "sae_weights.safetensors") for who in ("ours", "theirs")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][n]) for n, value in weights[0].items())


def test_what_has_no_counterpart_is_refused() -> None:
    from sae_lens import (
        AbsTopKSAE,
        AbsTopKSAEConfig,
        StandardSAE,
        StandardSAEConfig,
        StandardTrainingSAE,
        StandardTrainingSAEConfig,
    )

    with pytest.raises(ArtifactError, match=r"'abstopk' has no counterpart here; its latents may be negative"):
        from_sae_lens(AbsTopKSAE(AbsTopKSAEConfig(d_in=8, d_sae=16, k=2)))
    with pytest.raises(ArtifactError, match="StandardTrainingSAE is still in training"):
        from_sae_lens(StandardTrainingSAE(StandardTrainingSAEConfig(d_in=4, d_sae=8)))
    with pytest.raises(ArtifactError, match="does not hold the whitening"):
        from_sae_lens(StandardSAE(StandardSAEConfig(d_in=4, d_sae=8, normalize_activations="covariance_whitening")))


# -- training losses --------------------------------------------------------------------------------------------------


def their_loss(sae: Any, made: Any, x: Tensor, dead: Tensor | None = None, **coefficients: float) -> Any:
    """What a training SAE of SAELens gives for a batch, on our weights."""
    from sae_lens.saes.sae import TrainStepInput

    with torch.no_grad():
        for name, parameter in made.named_parameters():
            getattr(sae, name).data = parameter.detach().clone()
    return sae.training_forward_pass(
        TrainStepInput(
            sae_in=x, coefficients=coefficients, dead_neuron_mask=dead, n_training_steps=0, is_logging_step=False
        )
    )


def compare(sae: Any, made: Any, total: Tensor, ours: Tensor, apart: tuple[str, ...] = ()) -> None:
    """The two losses are the same, and so are the gradients of all weights but those set apart."""
    assert off(ours, total) <= 1e-6
    theirs = dict(sae.named_parameters())
    names = [name for name, _ in made.named_parameters()]
    wanted = torch.autograd.grad(total, [theirs[name] for name in names])
    found = gradients(made, ours)
    for name, value in zip(names, wanted, strict=True):
        assert (off(found[name], value) <= 1e-5) != (name in apart), name


SIZES: dict[str, Any] = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float64"}


def test_the_standard_loss_is_that_of_sae_lens() -> None:
    from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig

    made = make("standard", sparsity=1.3)
    sae, x = StandardTrainingSAE(StandardTrainingSAEConfig(**SIZES)), batch_for(made).x
    compare(sae, made, their_loss(sae, made, x, l1=1.3).loss, made.loss(Batch(x=x)).total)


@pytest.mark.parametrize("penalty", ["l0", "tanh"])
def test_the_jumprelu_loss_is_that_of_sae_lens(penalty: str) -> None:
    from sae_lens import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig

    made = make(f"jumprelu-{penalty}", sparsity=0.7, pre_act=0.1)
    # Its thresholds are float32 whatever the rest is, so that they have to be numbers which float32 holds.
    with torch.no_grad():
        made.threshold.copy_(made.threshold.float())
    sae = JumpReLUTrainingSAE(
        JumpReLUTrainingSAEConfig(
            **SIZES,
            jumprelu_bandwidth=0.6,
            jumprelu_sparsity_loss_mode="step" if penalty == "l0" else "tanh",
            jumprelu_ste_to_input=penalty == "tanh",
            jumprelu_tanh_scale=4.0,
            pre_act_loss_coefficient=0.1,
        )
    )
    x, dead = batch_for(made).x, torch.arange(D_SAE) < 9
    for given in (None, dead):
        compare(sae, made, their_loss(sae, made, x, given, l0=0.7).loss, made.loss(Batch(x=x), dead=given).total)


def test_the_gated_loss_is_that_of_sae_lens_but_for_who_learns_from_the_gates_guess() -> None:
    from sae_lens import GatedTrainingSAE, GatedTrainingSAEConfig

    made = make("gated", sparsity=1.3)
    sae, x = GatedTrainingSAE(GatedTrainingSAEConfig(**SIZES)), batch_for(made).x
    theirs = their_loss(sae, made, x, l1=1.3)
    # Departure: the paper keeps the decoder from learning from the gate's guess; SAELens does not.
    compare(sae, made, theirs.loss, made.loss(Batch(x=x)).total, apart=("W_dec", "b_dec"))
    pre = (x - made.b_dec) @ made.W_enc + made.b_gate
    free = (x - made.b_dec - pre.relu() @ made.W_dec).square().sum() / len(x)
    kept = (x - made.b_dec.detach() - pre.relu() @ made.W_dec.detach()).square().sum() / len(x)
    compare(sae, made, their_loss(sae, made, x, l1=1.3).loss, made.loss(Batch(x=x)).total + free - kept)


@pytest.mark.parametrize("kind", ["batchtopk", "topk"])
def test_the_loss_of_topk_and_batchtopk_is_that_of_sae_lens(kind: str) -> None:
    from sae_lens import (
        BatchTopKTrainingSAE,
        BatchTopKTrainingSAEConfig,
        TopKTrainingSAE,
        TopKTrainingSAEConfig,
    )

    # Departures: their AuxK has another scale and takes the error to be that of the summed squares; ours is a share.
    made = make(kind, loss="mse")
    sae: Any
    if kind == "topk":
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(**SIZES, k=4, rescale_acts_by_decoder_norm=False))
    else:
        sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**SIZES, k=4.0, rescale_acts_by_decoder_norm=False))
    x = batch_for(made).x
    theirs, ours = their_loss(sae, made, x), made.loss(Batch(x=x, grad=x))
    assert torch.equal((theirs.feature_acts > 0).sum(0), ours.fired)
    compare(sae, made, theirs.loss, ours.total)
    if kind == "batchtopk":
        # After one batch theirs holds a hundredth of its smallest choice; ours, the average, is the smallest itself.
        made.after_step()
        assert float(sae.topk_threshold) == pytest.approx(0.01 * float(made.threshold), rel=1e-6)
