"""Direct logit attribution on every family: the terms sum to the model's own logits, whatever the parts."""

from dataclasses import replace

import pytest
import torch
import transformers as tf
from torch import Tensor

from interp.core.direct import DirectPath
from interp.core.errors import ConfigError, DataError, InterpError, ModelError, SiteError
from interp.core.intervention import FreezeScale, Replace
from interp.core.manager import HookManager
from interp.core.readout import Readout
from interp.core.site import Site
from interp.core.where import Where
from interp.lens.attribution import DirectAttribution
from interp.lens.direct import direct_logit_attribution
from tests.families import FAMILIES, make, manager, paddings, tokens

pytestmark = pytest.mark.contract
every_family = pytest.mark.parametrize("name", list(FAMILIES))

ANSWER = torch.tensor([7, 31])
OTHER = torch.tensor([52, 7])
EXPERTS = ("Mixtral", "Qwen2Moe", "GptOss")
NO_PATTERN = ("Falcon", "FalconNew")


def by(name: str, way: str, **options: object) -> DirectAttribution:
    return direct_logit_attribution(manager(name), tokens(), (ANSWER, OTHER), by=way, **options)  # type: ignore[arg-type]


def own_difference(name: str, pos: int = -1) -> Tensor:
    """The logit difference by the plain model."""
    with torch.no_grad():
        logits = make(name)(tokens()).logits[:, pos]
    return (logits.gather(1, ANSWER[:, None]) - logits.gather(1, OTHER[:, None]))[:, 0]


def sums_to(found: DirectAttribution, expected: Tensor) -> None:
    torch.testing.assert_close(found.total, expected, atol=1e-4, rtol=1e-4)
    told = torch.tensor([kind != "residue" for kind in found.kinds])
    torch.testing.assert_close(found.values[told].sum(0), expected, atol=1e-4, rtol=1e-4)


@every_family
def test_components_and_heads_sum_to_the_models_own_logit_difference(name: str) -> None:
    expected = own_difference(name)
    assert float(expected.abs().min()) > 1e-3
    components, heads = by(name, "component"), by(name, "head")
    sums_to(components, expected)
    sums_to(heads, expected)
    for layer in range(manager(name).n_layers):
        own = [i for i, at in enumerate(heads.layers.tolist()) if at == layer and heads.kinds[i] != "mlp"]
        attention = heads.values[own].sum(0)
        torch.testing.assert_close(attention, components[f"{layer}_attn_out"], atol=1e-4, rtol=1e-4)


@every_family
def test_neurons_and_source_tokens_sum_to_it_too(name: str) -> None:
    expected, hm = own_difference(name), manager(name)
    if hm.d_mlp is None:
        with pytest.raises(InterpError, match="mixture of experts"):
            by(name, "neuron")
    else:
        found = by(name, "neuron", top_k=9)
        sums_to(found, expected)
        assert found.kinds.count("neuron") == 9 and found.kinds.count("rest") == hm.n_layers
    try:
        hm.run(tokens(1, 3), read=["0.pattern"])
    except InterpError:
        assert name in NO_PATTERN
        with pytest.raises(InterpError):
            by(name, "token")
        return
    found = by(name, "token")
    sums_to(found, expected)
    assert "sink" not in found.kinds


@pytest.mark.parametrize("name", ["GPT2", "Gemma2", "Gemma3Multimodal", "Olmo2", "Granite", "Cohere", "Phi", "Mixtral"])
def test_a_component_is_what_a_forward_with_everything_held_loses_without_it(name: str) -> None:
    """An oracle of its own: the model run from a last stream without that component, under the final σ of the run."""
    hm, found = manager(name), by(name, "component")
    last = f"{hm.n_layers - 1}.resid_post"
    run = hm.run(tokens(), read=[last, "0.attn_out", "ln_final.scale"], logits="last")
    less = run[last] - run["0.attn_out"]
    held = [Replace(last, less), FreezeScale("ln_final.scale", run["ln_final.scale"])]
    without = hm.run(tokens(), write=held, logits="last").logits[:, 0]
    cap = Readout.of(hm).cap
    before, after = (x if cap is None else cap * torch.atanh(x / cap) for x in (run.logits[:, 0], without))
    change = before - after
    expected = (change.gather(1, ANSWER[:, None]) - change.gather(1, OTHER[:, None]))[:, 0]
    torch.testing.assert_close(found["0_attn_out"], expected, atol=2e-3 if cap else 2e-4, rtol=2e-3)


@pytest.mark.parametrize(
    ("name", "way"),
    [("GPT2", "component"), ("Olmo2", "head"), ("GPT2", "token"), ("Gemma2", "token"), ("Bloom", "token")],
)
def test_padding_changes_no_term(name: str, way: str) -> None:
    hm, ids = manager(name), tokens()
    alone = direct_logit_attribution(hm, ids[:1, :8], (7, 52), by=way)
    for _, padded, mask in paddings(ids):
        found = direct_logit_attribution(hm, hm.to_tokens(padded, mask=mask), (7, 52), by=way)
        for label in alone.labels[:-1]:
            torch.testing.assert_close(found[label][:1], alone[label], atol=2e-4, rtol=1e-3)


def test_each_row_can_have_a_position_of_its_own() -> None:
    hm, ids = manager("Gemma2"), tokens()
    found = direct_logit_attribution(hm, ids, (7, 52), by="token", pos=torch.tensor([3, -2]))
    for row, pos in ((0, 3), (1, 10)):
        alone = direct_logit_attribution(hm, ids[row : row + 1, : pos + 1], (7, 52), by="token")
        assert float(found.total[row]) == pytest.approx(float(alone.total[0]), abs=1e-4)
        torch.testing.assert_close(found.by_source(row=row)[:, : pos + 1], alone.by_source(), atol=1e-4, rtol=1e-3)
        assert not found.by_source(row=row)[:, pos + 1 :].any()


@pytest.mark.parametrize("name", ["GPT2", "Gemma2", "Granite", "Cohere"])
def test_the_soft_cap_is_a_term_and_only_where_there_is_one(name: str) -> None:
    found = by(name, "component")
    assert ("soft_cap" in found.labels) == (name == "Gemma2")
    if name == "Gemma2":
        assert float(found["soft_cap"].abs().min()) > 1e-2


@pytest.mark.parametrize("name", ["GPT2", "GPTNeoX", "Phi", "Llama"])
def test_a_folded_model_has_the_same_difference_and_no_norm_bias(name: str) -> None:
    found = direct_logit_attribution(manager(name).folded(), tokens(), (ANSWER, OTHER), by="head")
    sums_to(found, own_difference(name))
    assert float(found["norm_bias"].abs().max()) == 0.0


def test_the_bias_of_a_norm_on_attentions_output_and_of_the_projection_are_told_from_the_heads() -> None:
    config = type(FAMILIES["Olmo2"]())(**{**FAMILIES["Olmo2"]().to_dict(), "attention_bias": True})
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            torch.nn.init.normal_(parameter)
    hm = HookManager.load(model)
    for way in ("head", "token"):
        found = direct_logit_attribution(hm, tokens(), (7, 52), by=way)
        assert "0_attn_bias" in found.labels and float(found["residue"].abs().max()) < 1e-4


def test_per_head_source_tokens_sum_to_the_heads() -> None:
    heads, apart = by("Llama", "head"), by("Llama", "token", per_head=True)
    own = [i for i, label in enumerate(apart.labels) if label.startswith("L1H2←")]
    torch.testing.assert_close(apart.values[own].sum(0), heads["L1H2"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(apart.by_head(), heads.by_head(), atol=1e-5, rtol=1e-4)


def test_the_stream_accumulates_to_the_number_and_is_the_lens_through_the_runs_sigma() -> None:
    hm = manager("GPT2")
    found = by("GPT2", "component")
    places, sums = found.accumulated()
    torch.testing.assert_close(sums[-1], found.total, atol=1e-4, rtol=1e-4)
    run = hm.run(tokens(), read=["*.resid_mid", "*.resid_post", "ln_final.scale"])
    norm, unembed = hm.map.module(hm.root, "ln_final"), hm.map.module(hm.root, "unembed")
    assert isinstance(norm, torch.nn.LayerNorm) and isinstance(unembed, torch.nn.Linear)
    for place, site in (("0_attn_out", "0.resid_mid"), ("1_mlp_out", "1.resid_post")):
        x = run[site][:, -1]
        x = (x - x.mean(-1, keepdim=True)) / run["ln_final.scale"][:, -1] * norm.weight + norm.bias
        logits = unembed(x)
        expected = (logits.gather(1, ANSWER[:, None]) - logits.gather(1, OTHER[:, None]))[:, 0]
        torch.testing.assert_close(sums[places.index(place)], expected.detach(), atol=1e-4, rtol=1e-4)


def test_a_model_that_writes_to_its_stream_in_secret_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    true = DirectPath.of

    def wrong(*args: object) -> DirectPath:
        path = true(*args)  # type: ignore[arg-type]
        return replace(path, direction=path.direction * 1.01)

    monkeypatch.setattr(DirectPath, "of", wrong)
    with pytest.raises(ModelError, match="more than rounding"):
        by("GPT2", "component")


def test_reads_are_of_one_position_but_for_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    hm, seen = manager("Gemma2"), []
    run = HookManager.run

    def spy(self: HookManager, *args: object, **options: object) -> object:
        out = run(self, *args, **options)  # type: ignore[arg-type]
        seen.append(sum(out[site].numel() for site in out))
        return out

    monkeypatch.setattr(HookManager, "run", spy)
    for way in ("component", "head", "neuron"):
        seen.clear()
        for width in (6, 12):
            direct_logit_attribution(hm, tokens(2, width), (7, 52), by=way)
        assert seen[0] == seen[1]


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_attributed_is_refused_before_anything_runs() -> None:
    hm, ids = manager("GPT2"), tokens()
    for target in (None, 500, -1, 1.5, (1, 2, 3), torch.zeros(2)):
        with pytest.raises(DataError):
            direct_logit_attribution(hm, ids, target)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="did you mean 'head'"):
        direct_logit_attribution(hm, ids, 3, by="heads")
    with pytest.raises(ConfigError, match="needs dictionary"):
        direct_logit_attribution(hm, ids, 3, by="latent")
    with pytest.raises(ConfigError, match="per_head"):
        direct_logit_attribution(hm, ids, 3, per_head=True)
    for pos in (12, -13, 1.0, torch.tensor([1])):
        with pytest.raises(DataError):
            direct_logit_attribution(hm, ids, 3, pos=pos)  # type: ignore[arg-type]
    found = by("GPT2", "component")
    with pytest.raises(SiteError, match="no term"):
        found["9_mlp_out"]
    with pytest.raises(DataError, match="by='head'"):
        found.by_head()
    assert Site("0.z", where=Where(pos=-1)).where is not None
