"""Direct attribution and direct effects where the answer is known: planted heads, sinks, dictionaries, pairs."""

from pathlib import Path

import pytest
import torch

from interp.core.errors import ConfigError, DataError, SiteError
from interp.core.intervention import Ablate, Replace
from interp.core.manager import HookManager
from interp.core.metrics import Metric
from interp.core.result import Result
from interp.core.site import Site
from interp.core.where import Where
from interp.data.pair_tokens import PairTokens
from interp.dictionaries.topk import TopKConfig, TopKSAE
from interp.dictionaries.topk_transcoder import TopKTranscoder, TopKTranscoderConfig
from interp.lens.attribution import DirectAttribution
from interp.lens.direct import direct_logit_attribution
from interp.lens.effect import direct_effect
from interp.testbed.nano import NanoOptions, nano
from interp.testbed.tasks import task_pairs
from tests.families import make, manager, tokens, word_tokenizer
from tests.model.test_first_hour import TEXT, induction_model

ANSWER, OTHER = torch.tensor([7, 31]), torch.tensor([52, 7])


def pairs(seed: int = 0, n: int = 4) -> PairTokens:
    draw = torch.Generator().manual_seed(seed)
    answers, foils = torch.randint(1, 60, (n,), generator=draw), torch.randint(60, 120, (n,), generator=draw)
    return PairTokens.of_ids(tokens(n, seed=seed), tokens(n, seed=seed + 50), answers, foils)


# -- planted -----------------------------------------------------------------------------------------------------


def test_the_head_that_was_built_to_copy_and_the_token_it_copies_are_found() -> None:
    hm = induction_model()
    heads = direct_logit_attribution(hm, TEXT, ("w6", "w9"), by="head")
    assert heads.by_head().argmax() == 2 and heads.labels[int(heads.mean.argmax())] == "L1H0"
    assert float(heads["L1H0"]) > 0.99 * float(heads.total)
    assert not heads["L0H1"].any() and not heads["L1H1"].any()
    source = direct_logit_attribution(hm, TEXT, ("w6", "w9"), by="token")
    assert source.source_names == [["w0", "w5", "w6", "w7", "w8", "w5"]]
    assert divmod(int(source.by_source().argmax()), 6) == (1, 2)
    assert float(source.by_source()[1, 2]) > 0.99 * float(source.total)


def test_neurons_are_their_activation_times_what_they_write() -> None:
    hm = manager("GPT2")
    found = direct_logit_attribution(hm, tokens(), (ANSWER, OTHER), by="neuron", top_k=7)
    run = hm.run(tokens(), read=["*.mlp_post", "ln_final.scale"])
    norm, unembed = hm.map.module(hm.root, "ln_final"), hm.weights.W_U
    assert isinstance(norm, torch.nn.LayerNorm)
    sizes = {}
    for layer in range(hm.n_layers):
        rows = hm.weights[layer].W_out
        written = (rows - rows.mean(1, keepdim=True)) * norm.weight.detach() @ unembed
        share = run[f"{layer}.mlp_post"][:, -1] / run["ln_final.scale"][:, -1]
        values = share * torch.stack([written[:, a] - written[:, o] for a, o in zip(ANSWER, OTHER, strict=True)])
        sizes.update({f"L{layer}N{i}": values[:, i] for i in range(values.shape[1])})
    best = sorted(sizes, key=lambda name: -float(sizes[name].abs().mean()))[:7]
    assert {label for label, kind in zip(found.labels, found.kinds, strict=True) if kind == "neuron"} == set(best)
    for name in best:
        torch.testing.assert_close(found[name], sizes[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("norm", ["layer", "rms", "none"])
def test_attention_sinks_and_models_without_mlps_or_norms(norm: str) -> None:
    options = NanoOptions(
        d_vocab=30, n_layers=2, d_mlp=0, norm=norm, sink=True, unembed_bias=True, init_std=0.3, positions="rotary"
    )
    hm = HookManager.load(nano(options, seed=1))
    with torch.no_grad():
        for name, parameter in hm.model.named_parameters():
            if name.endswith("bias") or "sink" in name:
                parameter.normal_()
    ids = torch.arange(14).reshape(2, 7)
    for way in ("component", "head", "token"):
        found = direct_logit_attribution(hm, ids, (3, 4), by=way)
        with torch.no_grad():
            logits = hm.model(ids).logits[:, -1]
        torch.testing.assert_close(found.total, logits[:, 3] - logits[:, 4], atol=1e-5, rtol=1e-5)
        assert float(found["residue"].abs().max()) < 1e-4 * float(logits.abs().max())
        assert ("sink" in found.kinds) == (way == "token") and "mlp" not in found.kinds
    assert direct_effect(hm, ids, (3, 4), value="zero", norm="frozen").nmae < 1e-4


def test_half_precision_sums_to_its_own_rounding() -> None:
    hm = HookManager.load(make("Llama").to(torch.bfloat16), word_tokenizer())
    found = direct_logit_attribution(hm, tokens(), (7, 52), by="head")
    assert float(found["residue"].abs().max()) < 0.05 * float(found.values.abs().max())


# -- dictionaries ------------------------------------------------------------------------------------------------


def dictionary(site: str, seed: int = 0) -> TopKSAE:
    cfg = TopKConfig(d_in=32, d_sae=24, k=5, metadata={"hook_name": Site(site).name})
    made = TopKSAE(cfg)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return made


@pytest.mark.parametrize("name", ["GPT2", "Gemma2", "Phi"])
@pytest.mark.parametrize("kind", ["mlp_out", "attn_out", "resid_pre", "resid_mid", "resid_post"])
def test_latents_bias_and_error_stand_for_what_the_dictionary_explains(name: str, kind: str) -> None:
    hm = manager(name)
    if not hm.atlas.has(Site(f"1.{kind}")):
        return
    sae = dictionary(f"1.{kind}")
    whole = direct_logit_attribution(hm, tokens(), (ANSWER, OTHER))
    found = direct_logit_attribution(hm, tokens(), (ANSWER, OTHER), by="latent", dictionary=sae, top_k=4)
    torch.testing.assert_close(found.total, whole.total)
    assert float(found["residue"].abs().max()) < 1e-4
    own = torch.tensor([label.startswith(f"1_{kind}") for label in found.labels])
    replaced = [label for label in whole.labels if label not in found.labels]
    torch.testing.assert_close(found.values[own].sum(0), sum(whole[label] for label in replaced), atol=1e-4, rtol=1e-4)
    assert replaced == ([f"1_{kind}"] if kind.endswith("out") else whole.labels[2 : 2 + len(replaced)])
    # A latent's term is what its removal from the reconstruction takes away, σ held.
    run = hm.run(tokens(), read=[Site(f"1.{kind}").at(pos=-1)])
    latents = sae.encode(run[f"1.{kind}"])
    best = next(label for label in found.labels if " latent " in label)
    unit = int(best.split()[-1])
    less = latents.clone()
    less[:, unit] = 0
    change = (sae.decode(latents) - sae.decode(less)).detach()
    last = f"{hm.n_layers - 1}.resid_post"
    end = hm.run(tokens(), read=[last, "ln_final.scale"])
    spec, norm = hm.atlas.norm("ln_final"), hm.map.module(hm.root, "ln_final")
    assert norm is not None
    gain = spec.gain(norm)
    through = spec.centre(change) / end["ln_final.scale"][:, -1] * (1.0 if gain is None else gain)
    logits = through @ hm.weights.W_U
    expected = torch.stack([logits[i, a] - logits[i, o] for i, (a, o) in enumerate(zip(ANSWER, OTHER, strict=True))])
    torch.testing.assert_close(found[best], expected.detach(), atol=1e-5, rtol=1e-4)


def test_a_transcoder_explains_what_the_mlp_adds() -> None:
    hm = manager("Llama")
    about = {"hook_name": Site("1.mlp.in").name, "hook_name_out": Site("1.mlp_out").name}
    cfg = TopKTranscoderConfig(d_in=32, d_out=32, d_sae=24, k=5, metadata=about)
    coder = TopKTranscoder(cfg)
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter.normal_(0, 0.3)
    found = direct_logit_attribution(hm, tokens(), 7, by="latent", dictionary=coder)
    whole = direct_logit_attribution(hm, tokens(), 7)
    own = torch.tensor([label.startswith("1_mlp_out") for label in found.labels])
    torch.testing.assert_close(found.values[own].sum(0), whole["1_mlp_out"], atol=1e-4, rtol=1e-4)
    assert float(found["residue"].abs().max()) < 1e-4


def test_a_dictionary_that_is_no_sum_in_the_raw_stream_is_refused() -> None:
    hm = manager("Llama")
    with pytest.raises(SiteError, match="no part of the stream"):
        direct_logit_attribution(hm, tokens(), 7, by="latent", dictionary=dictionary("1.ln2.out"))
    cfg = TopKConfig(
        d_in=32, d_sae=24, k=5, normalize_activations="layer_norm", metadata={"hook_name": Site("1.mlp_out").name}
    )
    with pytest.raises(ConfigError, match="no sum of its latents"):
        direct_logit_attribution(hm, tokens(), 7, by="latent", dictionary=TopKSAE(cfg))


# -- pairs -------------------------------------------------------------------------------------------------------


def test_pairs_of_the_testbed_are_attributed_with_their_own_metric(tmp_path: Path) -> None:
    hm = HookManager.load("testbed")
    data = task_pairs("ioi", 24)
    found = direct_logit_attribution(hm, data)
    held = data.tokens(hm)
    own = held.metric("logit_diff")(hm.run(held.clean, logits="last"))
    torch.testing.assert_close(found.total, own, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(found.values.sum(0), own, atol=1e-3, rtol=1e-4)
    low, high = found.intervals()
    assert bool((low <= found.mean + 1e-6).all() and (found.mean <= high + 1e-6).all() and (high > low).any())
    for kind in ("bars", "waterfall", "stack"):
        assert found.plot(kind).data and found.plot(kind, row=3).data
    assert found.plot("stack").data[-1].y[-1] == pytest.approx(float(found.total.mean()), abs=1e-3)
    assert found.plot("waterfall").data[0].y[:-1] == pytest.approx(found.plot("bars").data[0].x, abs=1e-6)
    assert "24 examples" in found.summary() and found.to_frame()["value"].sum() == pytest.approx(
        float(found.total.sum()), rel=1e-3
    )
    back = Result.load(found.save(tmp_path / "dla"))
    assert isinstance(back, DirectAttribution) and torch.equal(back.values, found.values)
    heads = direct_logit_attribution(hm, data, by="head")
    assert len(heads.plot().data[0].z) == hm.n_layers
    assert "Direct logit attribution" in heads.to_html(tmp_path / "dla.html").read_text()
    with pytest.raises(DataError, match="by='component'"):
        heads.plot("stack")
    with pytest.raises(ConfigError, match="waterfall"):
        found.plot("waterfal")


def test_a_metric_that_is_not_linear_is_refused_and_a_linear_one_of_ones_own_is_taken() -> None:
    hm, held = manager("GPT2"), pairs()
    with pytest.raises(DataError, match="not linear"):
        direct_logit_attribution(hm, held, "log_prob")
    columns, weights = torch.tensor([3, 9]), torch.tensor([[2.0, -0.5]]).expand(4, -1)
    metric = Metric("mine", lambda logits, rows: (logits * weights[rows]).sum(1), 4, columns, weights)
    found = direct_logit_attribution(hm, held, metric)
    torch.testing.assert_close(found.total, metric(hm.run(held.clean, logits="last")), atol=1e-4, rtol=1e-4)


# -- direct effects ----------------------------------------------------------------------------------------------


HELD = ("GPT2 head", "Gemma2 head", "Gemma2 component", "Olmo2 head", "Granite head", "Cohere component", "Phi head")


@pytest.mark.parametrize("case", HELD)
def test_with_sigma_held_a_direct_effect_is_the_difference_of_attributions(case: str) -> None:
    name, way = case.split()
    hm, held = manager(name), pairs()
    found = direct_effect(hm, held, by=way, norm="frozen")
    size = float(found.effect.abs().max())
    assert size > 0.05 and found.nmae < 1e-4 and found.pearson > 0.9999
    torch.testing.assert_close(found.effect, found.attribution, atol=1e-4 * max(1.0, size), rtol=1e-4)
    # And the attribution here is that of the other function, on the two sides.
    clean = direct_logit_attribution(hm, held.clean, held.metric(), by=way)
    zero = direct_effect(hm, held, by=way, norm="frozen", value="zero")
    for i, label in enumerate(zero.labels[1:], 1):
        torch.testing.assert_close(zero.effect[i], -clean[label], atol=1e-4 * max(1.0, size), rtol=1e-3)


@pytest.mark.parametrize("name", ["GPT2", "Gemma2", "Olmo2"])
def test_with_sigma_recomputed_it_is_a_forward_from_the_changed_last_stream(name: str) -> None:
    hm, held = manager(name), pairs()
    found = direct_effect(hm, held, total=True, progress=False)
    last, end = f"{hm.n_layers - 1}.resid_post", Where(pos=-1)
    reads = [last, "0.attn_out"]
    clean, other = hm.run(held.clean, read=reads), hm.run(held.corrupted, read=reads)
    stream = (clean[last] + other["0.attn_out"] - clean["0.attn_out"])[:, -1]
    out = hm.run(held.clean, write=[Replace(last, stream, where=end)], logits="last")
    i = found.labels.index("0_attn_out")
    torch.testing.assert_close(found.effect[i], held.logit_diff(out) - found.clean, atol=1e-4, rtol=1e-4)
    whole = hm.run(held.clean, write=[Replace("0.attn_out", other["0.attn_out"][:, -1], where=end)], logits="last")
    torch.testing.assert_close(found.total_effect[i], held.logit_diff(whole) - found.clean, atol=1e-4, rtol=1e-4)
    # Nothing comes after the last MLP, so nothing can repair it; what the first attention does goes on.
    assert float(found.repair[-1].abs().max()) < 1e-4 < float(found.repair[i].abs().max())
    assert found.nmae > 1e-3


def test_a_heads_direct_effect_of_nothing_and_of_the_same_are_known() -> None:
    hm, held = manager("GPT2"), pairs()
    same = PairTokens(held.clean, held.clean, held.answers, held.foils)
    null = direct_effect(hm, same, by="head", total=True, progress=False)
    assert not null.effect.any() and not null.attribution.any() and not null.total_effect.any()
    heads = direct_effect(hm, held, by="head", value="zero", total=True, progress=False)
    i = heads.labels.index("L2H3")
    out = hm.run(held.clean, write=[Ablate("2.z", "zero", where=Where(pos=-1, head=3))], logits="last")
    torch.testing.assert_close(heads.total_effect[i], held.logit_diff(out) - heads.clean, atol=1e-4, rtol=1e-4)
    mean = direct_effect(hm, held.clean, (7, 52), value="mean")
    assert mean.value == "mean" and float(mean.attribution.mean(1).abs().max()) < 1.0


def test_effects_show_themselves_and_refuse_what_they_were_not_asked(tmp_path: Path) -> None:
    hm, held = manager("GPT2"), pairs()
    found = direct_effect(hm, held)
    assert len(found.plot().data) == 2 and "NMAE" in found.summary() and len(found.to_frame()) == 7 * 4
    with pytest.raises(DataError, match="total=True"):
        found.plot(against="total_effect")
    with pytest.raises(DataError, match="no corrupted side"):
        direct_effect(hm, tokens(), 7)
    for wrong in ({"by": "neuron"}, {"value": "zeros"}, {"norm": "held"}):
        with pytest.raises(ConfigError):
            direct_effect(hm, held, **wrong)  # type: ignore[arg-type]
    back = Result.load(found.save(tmp_path / "effect"))
    assert isinstance(back, type(found)) and torch.equal(back.effect, found.effect)
