"""The residual stream as a sum of terms, on every family; the loss per token."""

import functools
import re
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor
from torch.nn import functional as F

from interp.core.decompose import Decomposition
from interp.core.errors import DataError, InterpError, SiteError
from interp.core.intervention import Ablate, Add, Replace
from interp.core.manager import HookManager
from interp.core.run import Run
from interp.core.site import Site
from interp.core.where import Where
from tests.contract import plain
from tests.contract.test_weights import quiet_bridge
from tests.families import FAMILIES, make, manager, paddings, tokens

pytestmark = pytest.mark.contract
every_family = pytest.mark.parametrize("name", list(FAMILIES))
TOLERANCE = 1e-5

PARALLEL = ("GPTJ", "GPTNeoX", "Falcon", "FalconNew", "Phi", "Cohere")
SANDWICH = ("Gemma2", "Gemma3", "Gemma3Multimodal", "Olmo2")
LEARNED_POSITIONS = ("GPT2", "GPTNeo", "OPT", "GPTBigCode")


def off(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max()) if a.shape == b.shape else float("inf")


@functools.cache
def parts(name: str) -> Run:
    """A run that read what the terms need, and not the sums."""
    scales = ["*.ln1_post.scale"] if name in SANDWICH else []
    return manager(name).run(tokens(), read=["0.resid_pre", "*.attn_out", "*.mlp_out", "*.z", *scales])


@functools.cache
def stream(name: str) -> dict[tuple[str, int], Tensor]:
    """The residual stream by hand-made hooks on the plain model."""
    layers = range(manager(name).n_layers)
    reads = [(kind, layer) for layer in layers for kind in ("resid_pre", "resid_post")]
    return plain.run(name, make(name), tokens(), read=reads).values


@every_family
def test_the_terms_sum_to_the_stream_at_every_layer(name: str) -> None:
    n = manager(name).n_layers
    assert off(parts(name).decompose_resid().total(), stream(name)["resid_post", n - 1]) < TOLERANCE
    for layer in range(n):
        found = parts(name).decompose_resid(layer)
        assert off(found.total(), stream(name)["resid_pre", layer]) < TOLERANCE
        assert len(found) == 1 + 2 * layer


@every_family
def test_the_stream_in_the_middle_of_a_block_is_a_sum_too(name: str) -> None:
    if name in PARALLEL:
        with pytest.raises(SiteError, match="parallel"):
            parts(name).decompose_resid(1, mid=True)
        return
    middle = manager(name).run(tokens(), read=["1.resid_mid"])["1.resid_mid"]
    assert off(parts(name).decompose_resid(1, mid=True).total(), middle) < TOLERANCE


@every_family
def test_heads_and_bias_sum_to_what_attention_adds(name: str) -> None:
    hm, run = manager(name), parts(name)
    found = run.stack_head_results()
    for layer in range(hm.n_layers):
        own = [label for label in found.labels if label.startswith(f"L{layer}")]
        assert own[: hm.n_heads] == [f"L{layer}H{head}" for head in range(hm.n_heads)]
        total = sum((found[label] for label in own), torch.zeros(()))
        assert off(total, run[f"{layer}.attn_out"]) < TOLERANCE
    assert len(run.stack_head_results(1)) == len(found) // hm.n_layers


@pytest.mark.parametrize("name", ["Granite", "Olmo2"])
def test_the_bias_goes_the_way_of_the_heads(name: str) -> None:
    config = type(FAMILIES[name]())(**{**FAMILIES[name]().to_dict(), "attention_bias": True})
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            torch.nn.init.normal_(parameter)
    scales = ["*.ln1_post.scale"] if name in SANDWICH else []
    run = HookManager.load(model).run(tokens(), read=["*.z", "*.attn_out", *scales])
    found = run.stack_head_results(1)
    assert found.labels[-1] == "L0_bias"
    assert off(found.total(), run["0.attn_out"]) < TOLERANCE


@pytest.mark.parametrize("name", ["GPT2", "Falcon", "Gemma2", "Granite"])
def test_a_heads_term_is_what_its_removal_takes_away(name: str) -> None:
    hm, run = manager(name), parts(name)
    site, where = Site("0.z"), Where(head=2)
    # With σ of the norm after attention held (where there is one), removing a head is linear.
    held = [Replace("0.ln1_post.scale", run["0.ln1_post.scale"])] if name in SANDWICH else []
    without = hm.run(tokens(), read=["0.attn_out"], write=[Ablate(site, "zero", where=where), *held])
    change = run["0.attn_out"] - without["0.attn_out"]
    assert off(run.stack_head_results()["L0H2"], change) < TOLERANCE


@every_family
def test_accumulated_streams_are_the_streams(name: str) -> None:
    hm = manager(name)
    n = hm.n_layers
    run = hm.run(tokens(), read=["0.resid_pre", "*.resid_post"])
    found = run.accumulated_resid()
    assert found.labels == [f"{layer}_pre" for layer in range(n)] + ["final_post"]
    for layer in range(n):
        assert off(found[f"{layer}_pre"], stream(name)["resid_pre", layer]) < TOLERANCE
    assert off(found["final_post"], stream(name)["resid_post", n - 1]) < TOLERANCE
    assert run.accumulated_resid(1).labels == ["0_pre", "1_pre"]


def test_the_middle_of_blocks_is_accumulated_where_it_was_read() -> None:
    run = manager("Llama").run(tokens(), read=["*.resid_pre", "0.resid_mid", "2.resid_mid", "2.resid_post"])
    found = run.accumulated_resid()
    assert found.labels == ["0_pre", "0_mid", "1_pre", "2_pre", "2_mid", "final_post"]
    assert torch.equal(found["2_mid"], run["2.resid_mid"])
    assert run.accumulated_resid(2).labels == ["0_pre", "0_mid", "1_pre", "2_pre"]


@pytest.mark.parametrize("name", ["GPT2", "Llama", "Qwen2", "GPTNeoX"])
def test_terms_and_labels_are_those_of_transformer_lens(name: str) -> None:
    hm = manager(name)
    positions = ["pos_embed"] if name in LEARNED_POSITIONS else []
    run = hm.run(tokens(), read=["embed", *positions, "*.resid_pre", "*.attn_out", "*.mlp_out", "*.z", "*.resid_post"])
    with torch.no_grad():
        _, cache = quiet_bridge(hm).run_with_cache(tokens())
    heads = run.stack_head_results()
    only = [i for i, label in enumerate(heads.labels) if "bias" not in label]
    ours = {
        "decompose_resid": run.decompose_resid(),
        "accumulated_resid": run.accumulated_resid(),
        "stack_head_results": Decomposition([heads.labels[i] for i in only], heads.terms[only]),
    }
    for method, found in ours.items():
        theirs, labels = getattr(cache, method)(layer=-1, return_labels=True)
        assert found.labels == list(labels), method
        assert off(found.terms, theirs) < TOLERANCE, method


@pytest.mark.parametrize("name", LEARNED_POSITIONS)
def test_the_embedding_is_split_only_when_both_halves_were_read(name: str) -> None:
    assert parts(name).decompose_resid(1).labels[0] == "embed+pos_embed"
    run = manager(name).run(tokens(), read=["0.resid_pre", "embed", "pos_embed"])
    found = run.decompose_resid(0)
    assert found.labels == ["embed", "pos_embed"]
    assert off(found.total(), run["0.resid_pre"]) < TOLERANCE


@pytest.mark.parametrize("where", [{"pos": -1}, {"pos": [0, 3]}, {"pos": slice(2, 5)}, {"rows": [1]}])
def test_slices_of_the_reads_are_slices_of_the_terms(where: dict[str, Any]) -> None:
    hm = manager("Gemma2")
    names = [
        "0.resid_pre",
        *(f"{b}.{kind}" for b in range(2) for kind in ("attn_out", "mlp_out", "z", "ln1_post.scale")),
    ]
    whole = hm.run(tokens(), read=names)
    some = hm.run(tokens(), read=[Site(name).at(**where) for name in names])
    rows, pos = where.get("rows", slice(None)), where.get("pos", slice(None))
    for method in ("decompose_resid", "stack_head_results"):
        a, b = getattr(whole, method)(), getattr(some, method)()
        assert a.labels == b.labels
        assert off(a.terms[:, rows][..., pos, :], b.terms) < TOLERANCE


def test_differently_sliced_reads_are_refused() -> None:
    hm = manager("GPT2")
    run = hm.run(tokens(), read=["0.resid_pre", Site("0.attn_out").at(pos=-1), "0.mlp_out"])
    with pytest.raises(SiteError, match="sliced in different ways"):
        run.decompose_resid(1)
    with pytest.raises(SiteError, match="all heads"):
        hm.run(tokens(), read=[Site("0.z").at(head=1)]).stack_head_results(1)


@every_family
@pytest.mark.parametrize("method", ["decompose_resid", "accumulated_resid", "stack_head_results"])
def test_a_missing_read_is_named_so_that_reading_it_helps(name: str, method: str) -> None:
    hm = manager(name)
    have = ["0.mlp_out"]
    with pytest.raises(SiteError, match=method) as caught:
        getattr(hm.run(tokens(), read=have), method)()
    named = re.findall(r"'([^']+)'", str(caught.value).partition("read=[…]:")[2])
    assert named
    assert len(getattr(hm.run(tokens(), read=[*have, *named]), method)()) > 0


def test_an_edit_of_the_stream_itself_is_noticed_where_the_sum_was_read() -> None:
    hm, v = manager("Llama"), torch.ones(32)
    reads = ["0.resid_pre", "*.attn_out", "*.mlp_out", "2.resid_post"]
    edited = hm.run(tokens(), read=reads, write=[Add("1.resid_post", v)])
    with pytest.raises(DataError, match="an edit of this run"):
        edited.decompose_resid()
    through = hm.run(tokens(), read=reads, write=[Add("1.attn_out", v)])
    assert off(through.decompose_resid().total(), through["2.resid_post"]) < TOLERANCE


def test_terms_are_differentiable_inside_a_metric() -> None:
    hm, v = manager("GPT2"), torch.randn(32)
    reads = ["0.resid_pre", "0.attn_out", "0.mlp_out"]
    out = hm.run(tokens(), read=reads, grad=lambda run: (run.decompose_resid(1)["0_mlp_out"] @ v).sum(-1))
    assert off(out.grad["0.mlp_out"], v.expand(2, tokens().shape[1], -1)) < TOLERANCE


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("layer", [3, -1, True, "1"])
@pytest.mark.parametrize("method", ["decompose_resid", "accumulated_resid", "stack_head_results"])
def test_a_layer_that_is_not_there_is_refused(method: str, layer: Any) -> None:
    with pytest.raises(InterpError, match="expected 0 to 2"):
        getattr(parts("GPT2"), method)(layer)


@pytest.mark.parametrize("name", ["GPT2", "Gemma2", "Granite", "Cohere"])
def test_the_loss_per_token_averages_to_the_models_own_loss(name: str) -> None:
    ids = tokens()
    losses = manager(name).run(ids).loss_per_token()
    assert losses.shape == (2, ids.shape[1] - 1)
    with torch.no_grad():
        own = make(name)(ids, labels=ids).loss
    assert off(losses.mean(), own) < TOLERANCE


def test_pads_have_no_loss() -> None:
    hm = manager("GPT2")
    whole = tokens()
    for side, padded, mask in paddings(whole):
        losses = hm.run(padded, mask=mask).loss_per_token()
        real = mask[:, 1:] & mask[:, :-1]
        assert torch.equal(losses.isnan(), ~real), side
        alone = hm.run(whole[:1, : int(mask[0].sum())]).logits
        expected = F.cross_entropy(alone[0, :-1], whole[0, 1 : alone.shape[1]], reduction="none")
        assert off(losses[0][real[0]], expected) < 1e-4, side


def test_a_loss_needs_the_logits_of_every_position() -> None:
    hm = manager("GPT2")
    with pytest.raises(DataError, match="logits='all'"):
        hm.run(tokens(), logits="last").loss_per_token()
    with pytest.raises(DataError, match="no logits"):
        hm.run(tokens(), read=["0.z"]).loss_per_token()


@pytest.mark.parametrize("positions", ["learned", "shortformer", "rotary"])
def test_attention_only_models_decompose_into_embedding_and_attention(positions: str) -> None:
    from interp.testbed.nano import NanoOptions, nano

    hm = HookManager.load(nano(NanoOptions(d_vocab=30, n_layers=2, d_mlp=0, norm="none", positions=positions)))
    reads = ["*.attn_out", "0.resid_pre", "1.resid_post", "embed"]
    out = hm.run(torch.arange(14).reshape(2, 7), read=reads)
    found = out.decompose_resid()
    start = "embed+pos_embed" if positions == "learned" else "embed"
    assert found.labels == [start, "0_attn_out", "1_attn_out"]
    torch.testing.assert_close(found.terms.sum(0), out["1.resid_post"])
    with pytest.raises(SiteError, match=r"\*.attn_out"):
        hm.run(torch.arange(14).reshape(2, 7), read=["0.resid_pre"]).decompose_resid()
