"""Normalisation and heads as SAELens has them, and dictionaries of models that TransformerLens processed."""

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import interp
from interp.core.errors import ConfigError
from interp.data.tokens import TokenSource
from interp.dictionaries.base import SAE, Dictionary
from interp.dictionaries.interop import from_sae_lens, to_sae_lens
from interp.dictionaries.processed import for_model
from interp.evaluate.dictionary import evaluate_dictionary
from tests.dictionaries import D_IN, make
from tests.families import make as make_model
from tests.families import tokens, word_tokenizer

pytestmark = [
    # SAELens imports a module that TransformerLens has moved, and says how the model should be loaded.
    pytest.mark.filterwarnings("ignore:The 'utils' module has been deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:\\s*This SAE has non-empty model_from_pretrained_kwargs:UserWarning"),
]

NAMES = [("topk", "sae"), ("standard", "sae"), ("gated", "sae"), ("jumprelu-l0", "sae"), ("standard", "transcoder")]
NAMES += [("standard", "skip_transcoder"), ("jumprelu-l0", "transcoder"), ("jumprelu-l0", "skip_transcoder")]
ALL = {"fold_ln": True, "center_writing_weights": True, "center_unembed": True, "fold_value_biases": True}
CENTRED = {"center_writing_weights": True}
SITES = {
    "0.resid_pre": "hook_resid_pre",
    "1.resid_mid": "hook_resid_mid",
    "1.resid_post": "hook_resid_post",
    "1.mlp_out": "hook_mlp_out",
    "1.attn_out": "hook_attn_out",
    "1.z": "attn.hook_z",
    "1.v": "attn.hook_v",
    "1.ln2.normalized": "ln2.hook_normalized",
    "1.mlp_post": "mlp.hook_post",
}


@pytest.mark.parametrize("how", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize(("kind", "form"), NAMES)
def test_what_is_normalised_at_run_time_is_what_sae_lens_does(tmp_path: Path, kind: str, form: str, how: str) -> None:
    import sae_lens

    made = make(kind, form, dtype="float32").frozen()
    by_head = form == "sae"
    change = {"reshape_activations": "hook_z", "metadata": {"hook_name": "blocks.0.attn.hook_z"}} if by_head else {}
    made.set_cfg(made.cfg.model_copy(update={"normalize_activations": how, **change}))
    made = made.frozen()
    made.requires_grad_(False)
    theirs = sae_lens.SAE.load_from_disk(made.save(tmp_path / "ours"))
    x = torch.randn(2, 9, D_IN, generator=torch.Generator().manual_seed(4)) * 3 + 1
    x = x.unflatten(-1, (3, -1)) if by_head else x
    torch.testing.assert_close(made.encode(x), theirs.encode(x), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(made(x), theirs(x), atol=5e-6, rtol=1e-5)
    assert made(x).shape[:2] == x.shape[:2]
    theirs.save_model(tmp_path / "theirs")
    assert torch.equal(Dictionary.load(tmp_path / "theirs")(x), made(x))
    assert torch.equal(from_sae_lens(to_sae_lens(made))(x), made(x))


def hooked(model: Any, flags: dict[str, bool]) -> Any:
    """TransformerLens' own model of the same weights, processed as the flags say."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    c = model.config
    cfg = HookedTransformerConfig(
        n_layers=c.n_layer,
        d_model=c.n_embd,
        n_ctx=c.n_positions,
        d_head=c.n_embd // c.n_head,
        n_heads=c.n_head,
        d_mlp=c.n_inner or 4 * c.n_embd,
        d_vocab=c.vocab_size,
        act_fn="gelu_new",
        eps=c.layer_norm_epsilon,
        normalization_type="LNPre" if flags.get("fold_ln") else "LN",
        device="cpu",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it goes in TransformerLens 4, which SAELens does not take yet
        made = HookedTransformer(cfg)
    state = {name: value.detach().clone() for name, value in convert_gpt2_weights(model, cfg).items()}
    made.load_and_process_state_dict(state, **{name: bool(flags.get(name)) for name in ALL})
    return made


@pytest.fixture(scope="module")
def hm() -> Iterator[interp.HookManager]:
    """A random GPT-2 whose norms have gains and biases, and whose weights write a mean."""
    model = make_model("GPT2")
    before = copy.deepcopy(model.state_dict())
    yield interp.HookManager.load(model, word_tokenizer())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.fixture(scope="module")
def processed(hm: interp.HookManager) -> dict[str, Any]:
    return {"all": hooked(hm.model, ALL), "centred": hooked(hm.model, CENTRED)}


def text(hm: interp.HookManager) -> TokenSource:
    draw = torch.Generator().manual_seed(0)
    texts = [" ".join(f"w{i}" for i in torch.randint(1, 60, (15,), generator=draw).tolist()) for _ in range(24)]
    return TokenSource(texts, hm.tokenizer, ctx=16, rows=8, bos=True, packing="one_doc")


def random_sae(width: int, hook: str, flags: dict[str, bool], **settings: Any) -> Dictionary:
    """A SAELens TopK SAE whose reconstruction is far from perfect, and the same as ours, not made for any model yet."""
    cfg = {"architecture": "topk", "d_in": width, "d_sae": 3 * width, "k": 6, **settings}
    cfg["metadata"] = {
        "hook_name": hook,
        "model_from_pretrained_kwargs": flags,
        "model_class_name": "HookedTransformer",
    }
    from interp.dictionaries.topk import TopKSAE

    sae = TopKSAE.from_cfg(cfg)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(3 * width, width, generator=draw), dim=1))
        sae.W_enc.copy_(sae.W_dec.T / 2)
        # What the processed activations do not have, so that it matters where they are taken from.
        sae.b_dec.copy_(torch.randn(width, generator=draw) / 3)
    return sae.requires_grad_(False)


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
@pytest.mark.parametrize("which", ["all", "centred"])
@pytest.mark.parametrize("short", SITES)
def test_a_dictionary_of_a_processed_model_does_on_the_raw_one_what_it_did_there(
    hm: interp.HookManager, processed: dict[str, Any], tmp_path: Path, short: str, which: str, normalize: str
) -> None:
    flags, theirs = {"all": ALL, "centred": CENTRED}[which], processed[which]
    layer, _, _ = short.partition(".")
    hook = f"blocks.{layer}.{SITES[short]}"
    by_head = short.endswith((".z", ".v"))
    settings: dict[str, Any] = {"normalize_activations": normalize}
    if short.endswith(".z"):
        settings["reshape_activations"] = "hook_z"
    width = int(torch.tensor(hm.atlas.shape(interp.Site(short))[2:]).prod())
    folder = random_sae(width, hook, flags, **settings).save(tmp_path)
    ours = Dictionary.load(folder, model=hm)
    sae: Any = to_sae_lens(Dictionary.load(folder, model="processed"))
    ids = tokens(3, 12)
    with torch.no_grad():
        _, cache = theirs.run_with_cache(ids)
        x, raw = cache[hook], hm.run(ids, read=[short])[short]
        seen = x.flatten(2) if short.endswith(".v") else x  # SAELens has no heads but at z
        torch.testing.assert_close(ours.seen(raw), x.flatten(2), atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(ours.encode(raw), sae.encode(seen), atol=2e-4, rtol=1e-3)
        made = ours.reconstructed_seen(ours.encode(raw), raw)
        torch.testing.assert_close(made, sae(seen).flatten(2), atol=2e-4, rtol=1e-3)

        def put(value: Tensor, hook: Any) -> Tensor:
            return sae(value.flatten(2) if short.endswith(".v") else value).view_as(value)

        expected = theirs.run_with_hooks(ids, fwd_hooks=[(hook, put)]).log_softmax(-1)
        clean = theirs(ids).log_softmax(-1)
    spliced = hm.run(ids, write=[interp.Splice(short, ours)]).logits.log_softmax(-1)
    torch.testing.assert_close(hm.run(ids).logits.log_softmax(-1), clean, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(spliced, expected, atol=1e-3, rtol=1e-3)
    assert float((expected - clean).abs().max()) > 0.05, "the splice changes something"
    assert by_head == (raw.ndim == 4)


@pytest.mark.parametrize("short", ["0.resid_pre", "1.mlp_out", "1.attn_out", "1.z", "1.ln2.normalized"])
def test_figures_are_those_of_the_processed_activations(
    hm: interp.HookManager, processed: dict[str, Any], tmp_path: Path, short: str
) -> None:
    theirs, hook = processed["all"], f"blocks.{short[0]}.{SITES[short]}"
    width = int(torch.tensor(hm.atlas.shape(interp.Site(short))[2:]).prod())
    more = {"reshape_activations": "hook_z"} if short.endswith(".z") else {}
    folder = random_sae(width, hook, ALL, **more).save(tmp_path)
    ours = SAE.load(folder, model=hm)
    found = evaluate_dictionary(hm, ours, text(hm), short)
    sae: Any = to_sae_lens(SAE.load(folder, model="processed"))
    x, near, loss, cut = [], [], [], []
    with torch.no_grad():
        for block in text(hm).blocks():
            keep = block.mask & ~block.special
            assert bool(block.mask.all()), "so that no mask is needed"
            value = theirs.run_with_cache(block.ids)[1][hook]
            x.append(value[keep].flatten(1))
            near.append(sae(value)[keep].flatten(1))

            def put(value: Tensor, hook: Any, keep: Tensor = keep, zero: bool = False) -> Tensor:
                return torch.where(keep.view(*keep.shape, *[1] * (value.ndim - 2)), 0 if zero else sae(value), value)

            def cross_entropy(change: Any, block: Any = block, keep: Tensor = keep) -> Tensor:
                logits = theirs.run_with_hooks(block.ids, fwd_hooks=[(hook, change)])
                losses = -logits[:, :-1].log_softmax(-1).gather(-1, block.ids[:, 1:, None])[..., 0]
                return losses[keep[:, :-1] & keep[:, 1:]]

            loss.append(cross_entropy(put))
            cut.append(cross_entropy(lambda v, hook, put=put: put(v, hook, zero=True)))
    flat, made = torch.cat(x).double(), torch.cat(near).double()
    fvu = float((flat - made).square().sum() / (flat - flat.mean(0)).square().sum())
    assert found.fvu == pytest.approx(fvu, rel=1e-4)
    assert found.ce_sae == pytest.approx(float(torch.cat(loss).mean()), rel=1e-4)
    assert found.ce_zero == pytest.approx(float(torch.cat(cut).mean()), rel=1e-4)
    # Without what processing does, the figure is another one.
    if short != "1.ln2.normalized":
        wrong = evaluate_dictionary(hm, random_sae(width, hook, {}, **more), text(hm), short)
        assert wrong.fvu != pytest.approx(fvu, rel=1e-3)


def test_a_folded_manager_needs_nothing_done_and_another_folding_is_refused(
    hm: interp.HookManager, tmp_path: Path
) -> None:
    folded, ids = hm.folded(), tokens(2, 9)
    for short in ("1.resid_post", "1.z", "1.ln2.out"):
        site = interp.Site(short)
        width = int(torch.tensor(hm.atlas.shape(site)[2:]).prod())
        folder = random_sae(width, site.name, ALL).save(tmp_path / short)
        raw, there = Dictionary.load(folder, model=hm), Dictionary.load(folder, model=folded)
        assert raw.space.fixed_names and not there.space.fixed_names
        a = raw.encode(hm.run(ids, read=[short])[short])
        b = there.encode(folded.run(ids, read=[short])[short])
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)
        fed = Dictionary.load(folder, model="processed")
        evaluate_dictionary(folded, fed, text(hm), short, max_tokens=32)
        for manager, wrong in ((hm, fed), (hm, there), (folded, raw)):
            with pytest.raises(ConfigError, match=r"for_model\(dictionary, hm\)"):
                evaluate_dictionary(manager, wrong, text(hm), short, max_tokens=32)
    only = random_sae(hm.d_model, "blocks.1.attn.hook_z", {"fold_ln": True, "center_writing_weights": True})
    with pytest.raises(ConfigError, match=r"has fold_value_biases done to 1\.z"):
        for_model(only, folded)


def test_a_transcoder_of_a_processed_model_gives_the_same_predictions(
    hm: interp.HookManager, processed: dict[str, Any]
) -> None:
    theirs, ids = processed["all"], tokens(2, 12)
    hooks = {"hook_name": "blocks.1.ln2.hook_normalized", "hook_name_out": "blocks.1.hook_mlp_out"}
    from interp.dictionaries.standard import ReLUTranscoder

    d = hm.d_model
    made = ReLUTranscoder.from_cfg(
        {
            "architecture": "skip_transcoder",
            "d_in": d,
            "d_out": d,
            "d_sae": 2 * d,
            "normalize_activations": "layer_norm",
            "apply_b_dec_to_input": False,
            "metadata": {**hooks, "model_from_pretrained_kwargs": ALL},
        }
    )
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) / 4)
    made.requires_grad_(False)
    sae: Any = to_sae_lens(made)
    ours = for_model(made, hm)
    x = hm.run(ids, read=["1.ln2.normalized"])["1.ln2.normalized"]
    ours_out = hm.run(ids, write=[interp.Replace("1.mlp_out", ours(x))]).logits.log_softmax(-1)
    with torch.no_grad():
        _, cache = theirs.run_with_cache(ids)
        value = sae(cache["blocks.1.ln2.hook_normalized"])
        expected = theirs.run_with_hooks(ids, fwd_hooks=[("blocks.1.hook_mlp_out", lambda v, hook: value)])
    torch.testing.assert_close(ours_out, expected.log_softmax(-1), atol=1e-3, rtol=1e-3)
    target = hm.run(ids, read=["1.mlp_out"])["1.mlp_out"]
    torch.testing.assert_close(ours.target_seen(target), cache["blocks.1.hook_mlp_out"], atol=2e-5, rtol=1e-4)


def test_a_model_of_rms_norms_is_not_centred_and_its_gains_are_undone() -> None:
    hm = interp.HookManager.load(make_model("Llama"), word_tokenizer())
    flags = {"fold_ln": True, "center_writing_weights": True, "fold_value_biases": True}
    stream = for_model(random_sae(hm.d_model, "blocks.1.hook_resid_post", flags), hm)
    assert stream.space.bound == "raw" and not stream.space.fixed_names
    after = for_model(random_sae(hm.d_model, "blocks.1.ln2.hook_out", flags), hm)
    out = hm.run(tokens(2, 9), read=["1.ln2.out", "1.ln2.normalized"])
    torch.testing.assert_close(after.seen(out["1.ln2.out"]), out["1.ln2.normalized"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["GPT2", "Starcoder2", "Qwen2"])
def test_value_biases_are_taken_out_of_z_and_v_for_grouped_heads_too(family: str) -> None:
    hm = interp.HookManager.load(make_model(family), word_tokenizer())
    flags = {"fold_ln": True, "fold_value_biases": True}
    out = hm.run(tokens(2, 9), read=["1.z", "1.v", "1.pattern", "1.ln1.normalized"])
    gain, W_V = hm.weights.norm_weights(1, "ln1").gain, hm.weights[1].W_V
    # What no bias has been added to, neither the norm's nor the projection's.
    v = torch.einsum("bpm,hmd->bphd", out["1.ln1.normalized"] * gain, W_V)
    of_query = v.repeat_interleave(hm.n_heads // hm.n_kv_heads, dim=2)
    z = torch.einsum("bhqk,bkhd->bqhd", out["1.pattern"], of_query)
    for site, expected in (("1.v", v), ("1.z", z)):
        sae = for_model(random_sae(expected[0, 0].numel(), interp.Site(site).name, flags), hm)
        assert sae.space.fixed_names == ["shifted"]
        torch.testing.assert_close(sae.seen(out[site]), expected.flatten(2), atol=2e-5, rtol=1e-4)
        assert float((out[site] - expected).abs().max()) > 0.1


@pytest.mark.parametrize(
    ("family", "site", "flag", "why"),
    [
        ("GptOss", "1.attn.hook_z", "fold_value_biases", "has sinks"),
        ("Bloom", "1.hook_resid_post", "center_writing_weights", "normalises its embeddings"),
    ],
)
def test_what_is_no_function_of_the_raw_activation_is_refused(family: str, site: str, flag: str, why: str) -> None:
    hm = interp.HookManager.load(make_model(family), word_tokenizer())
    with pytest.raises(ConfigError, match=why):
        for_model(random_sae(8, f"blocks.{site}", {flag: True}), hm)
