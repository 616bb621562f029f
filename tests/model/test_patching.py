"""Patching sweeps: both directions, ablations, several metrics, spans, latents, stopping and going on."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from interp.core.errors import ArtifactError, ConfigError, DataError, ModelError, ShapeError, SiteError, WhereError
from interp.core.intervention import Ablate, Replace
from interp.core.manager import HookManager
from interp.core.result import Result
from interp.core.run import Run
from interp.core.site import Site
from interp.core.where import Where
from interp.data.pairs import PromptPairs
from interp.patching.ablation import mean_values
from interp.patching.activation import activation_patch
from interp.patching.estimates.attribution import attribute
from interp.patching.estimates.edges import edge_attribution
from interp.patching.optimal import optimal_values
from interp.patching.options import PatchOptions
from interp.patching.path import path_patch
from interp.patching.result import PatchResult
from interp.patching.subspaces.subspace import subspace_patch
from interp.testbed.tasks import task_pairs
from tests.families import make, manager, word_tokenizer


def ragged() -> PromptPairs:
    """Pairs of two forms and two lengths, with named places."""
    return PromptPairs.make(
        ["w1 {x:w5} w6 {y:w7}", "w1 {x:w8} w6 {y:w9}", "w3 w4 {x:w5} w2 {y:w7} w6", "w3 w4 {x:w9} w2 {y:w8} w6"],
        ["w1 {x:w9} w6 {y:w7}", "w1 {x:w5} w6 {y:w4}", "w3 w4 {x:w8} w2 {y:w7} w6", "w3 w4 {x:w2} w2 {y:w5} w6"],
        [" w10", " w11", " w12", " w13"],
        [" w11", " w10", " w13", " w12"],
        meta=[{"template": "short"}, {"template": "short"}, {"template": "long"}, {"template": "long"}],
        marked=True,
    )


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


def test_noising_is_denoising_of_the_pairs_exchanged_and_both_are_both() -> None:
    hm, pairs = manager("Llama"), ragged()
    found = activation_patch(
        hm, pairs, sites="z", metric=["logit_diff", "kl"], options=PatchOptions(by="pos_head", mode="both")
    )
    assert found.mode == "both" and found.metrics == ["logit_diff", "kl"] and found.axis == "position, head"
    assert found.patched.shape == (2, hm.n_layers, 6 * hm.n_heads, 4)
    one = activation_patch(hm, pairs, sites="z", options=PatchOptions(by="pos_head"))
    close(found["logit_diff"].patched, one.patched)
    other = activation_patch(
        hm, pairs.swap(), sites="z", metric=pairs.tokens(hm).metric(), options=PatchOptions(by="pos_head")
    )
    noise = found["logit_diff"].noise
    close(noise.patched, other.patched)
    assert torch.equal(noise.base, noise.clean) and torch.equal(
        noise.effect[noise.unchanged], torch.zeros(()).expand_as(noise.effect[noise.unchanged])
    )
    assert bool(found.unchanged.any()) and not bool(found.unchanged.all())
    close(found["kl"].clean, torch.zeros(4))
    assert bool((found["kl"].corrupted > 0).all())


def test_every_cell_is_the_edit_made_by_hand_whatever_the_padding() -> None:
    hm, pairs = manager("Gemma2"), ragged()
    tokens = pairs.tokens(hm)
    found = activation_patch(hm, pairs, sites=["1.v", "0.v"], options=PatchOptions(by="pos_head"))
    source = hm.run(tokens.clean, read=["1.v"])
    long = [2, 3]
    for pos, head, rows in ((1, 0, None), (3, 1, None), (5, 1, long)):
        where = Where(pos=pos, head=head, rows=rows)
        by_hand = tokens.logit_diff(
            hm.run(tokens.corrupted, write=[Replace("1.v", source, where=where)], logits="last")
        )
        close(found.patched[0, pos * hm.n_kv_heads + head], by_hand)
    assert torch.equal(found.effect[:, 5 * hm.n_kv_heads :, :2], torch.zeros(2, hm.n_kv_heads, 2)), (
        "no sixth token there"
    )


@pytest.mark.parametrize("by", ["site", "neuron", "span", "head", "pos"])
@pytest.mark.usefixtures("unchecked")  # a forward per neuron: the type checker would take most of the time
def test_every_kind_of_column_is_the_naive_loop(by: str) -> None:
    hm, pairs = manager("GPT2"), ragged()
    sites = {"head": ["1.q"], "neuron": ["0.mlp_post"]}.get(by, ["1.mlp_out"])
    fast, slow = (
        activation_patch(hm, pairs, sites=sites, options=PatchOptions(by=by, engine=engine))
        for engine in ("auto", "naive")
    )
    close(fast.patched, slow.patched)
    assert any(note.startswith("naive plan") for note in slow.notes) and fast.columns == slow.columns
    assert float(fast.effect.abs().max()) > 1e-3


def test_zero_and_mean_are_the_edits_made_by_hand() -> None:
    hm, pairs = manager("Llama"), ragged()
    tokens = pairs.tokens(hm)
    zero = activation_patch(hm, pairs, sites="z", options=PatchOptions(ablation="zero"))
    assert zero.mode == "noise" and "by zero" in zero.heading()
    by_hand = hm.run(tokens.clean, write=[Ablate("1.z", where=Where(head=2))], logits="last")
    close(zero.patched[1, 2], tokens.logit_diff(by_hand))
    mean = activation_patch(hm, pairs, sites=["0.mlp_out"], pos=[3], options=PatchOptions(ablation="mean"))
    there = hm.run(tokens.corrupted, read=["0.mlp_out"])["0.mlp_out"]
    value = torch.stack([there[:2, 3].mean(0)] * 2 + [there[2:, 3].mean(0)] * 2)
    edit = Replace("0.mlp_out", value[:, None], where=Where(pos=3))
    close(mean.patched[0, 0], tokens.logit_diff(hm.run(tokens.clean, write=[edit], logits="last")))


def test_a_mean_over_prompts_that_do_not_correspond_is_refused_and_spans_align_them() -> None:
    hm, pairs = manager("Llama"), ragged()
    with pytest.raises(DataError, match="4 and of 6 tokens"):
        mean_values(hm, pairs, ["0.z"], by=None)
    spans = mean_values(hm, pairs, ["0.z"], by=None, spans=["x"])
    tokens = pairs.tokens(hm)
    (value,) = spans.values()
    there = hm.run(tokens.corrupted, read=["0.z"])["0.z"]
    expected = there[tokens.corrupted.spans["x"]].mean(0)
    close(value[tokens.clean.spans["x"]], expected.expand(4, -1, -1))
    assert not bool(value[~tokens.clean.spans["x"]].any())


def test_spans_align_prompts_of_other_lengths() -> None:
    hm = manager("GPT2")
    pairs = PromptPairs.make(["w1 {x:w5 w6} w7"], ["w2 w3 {x:w8 w9} w7 w7"], [" w10"], [" w11"], marked=True)
    tokens = pairs.tokens(hm, same_length=False)
    with pytest.raises(DataError, match="4 and 6 tokens"):
        activation_patch(hm, tokens, sites="resid_pre")
    found = activation_patch(hm, pairs, sites=["1.resid_pre"], options=PatchOptions(by="span", spans=["x"]))
    source = hm.run(tokens.clean, read=["1.resid_pre"])["1.resid_pre"][:, 1:3]
    by_hand = hm.run(tokens.corrupted, write=[Replace("1.resid_pre", source, where=Where(pos=[2, 3]))], logits="last")
    close(found.patched[0, 0], tokens.logit_diff(by_hand))
    uneven = PromptPairs.make(["w1 {x:w5} w7"], ["w2 {x:w8 w9} w7"], [" w10"], [" w11"], marked=True)
    with pytest.raises(DataError, match="has 2 tokens in one prompt and 1 in the other"):
        activation_patch(hm, uneven, sites="resid_pre", options=PatchOptions(by="span", spans=["x"]))


class Identity:
    """A dictionary whose latents are the activation itself."""

    def __init__(self, d: int) -> None:
        self.W_dec = torch.eye(d)

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, latents: Tensor) -> Tensor:
        return latents + 3.0


def test_latents_of_an_identity_dictionary_are_the_entries_of_the_site() -> None:
    hm, pairs = manager("Qwen2"), ragged()
    entries = activation_patch(hm, pairs, sites=["1.mlp_out"], options=PatchOptions(by="neuron"))
    options = PatchOptions(by="latent", dictionary=Identity(hm.d_model), latents=[0, 3, 31])
    latents = activation_patch(hm, pairs, sites=["1.mlp_out"], options=options)
    assert latents.columns == ["0", "3", "31"]
    close(latents.patched[0], entries.patched[0, [0, 3, 31]])
    assert float(latents.effect.abs().max()) > 1e-3


# -- stopping and going on -----------------------------------------------------------------------------------------


class Stopping:
    """The logit difference, which somebody interrupts."""

    def __init__(self, pairs: Any, calls: int) -> None:
        self.metric, self.left = pairs.metric(), calls
        self.__name__ = "logit_diff"

    def __call__(self, out: Run) -> Tensor:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return self.metric(out)


def test_a_sweep_that_was_stopped_goes_on_from_its_file_and_gives_the_same(tmp_path: Path) -> None:
    hm, pairs = manager("GPT2"), ragged()
    tokens, file = pairs.tokens(hm), tmp_path / "sweep.safetensors"
    options = PatchOptions(resume=file, save_every=0.0, budget_bytes=1)
    whole = activation_patch(hm, pairs, sites="resid_pre", metric=Stopping(tokens, 10**6))
    with pytest.raises(KeyboardInterrupt):
        activation_patch(hm, pairs, sites="resid_pre", metric=Stopping(tokens, 8), options=options)
    assert file.exists()
    counted = Stopping(tokens, 10**6)
    resumed = activation_patch(hm, pairs, sites="resid_pre", metric=counted, options=options)
    again = Stopping(tokens, 10**6)
    activation_patch(hm, pairs, sites="resid_pre", metric=again, options=options)
    assert 10**6 - again.left < 10**6 - counted.left < int((~whole.unchanged).sum()) + 4
    close(resumed.patched, whole.patched)
    assert not bool(resumed.patched.isnan().any())
    with pytest.raises(ArtifactError, match=r"another sweep .*settings"):
        activation_patch(hm, pairs, sites="resid_mid", metric=Stopping(tokens, 10**6), options=options)
    file.write_bytes(b"no such thing")
    with pytest.raises(ArtifactError, match="cannot be read"):
        activation_patch(hm, pairs, sites="resid_pre", metric=Stopping(tokens, 10**6), options=options)


class Scaled:
    """A dictionary whose latents are the entries of the site, times a number."""

    def __init__(self, by: float) -> None:
        self.W_dec = torch.eye(32) / by
        self.by = by

    def encode(self, x: Tensor) -> Tensor:
        return (x * self.by).relu()

    def decode(self, latents: Tensor) -> Tensor:
        return latents @ self.W_dec


def test_a_file_of_other_values_places_or_latents_is_refused(tmp_path: Path) -> None:
    hm, pairs = manager("GPT2"), ragged()
    held = pairs.tokens(hm)
    moved = [replace(side, spans={**side.spans, "x": side.spans["y"]}) for side in (held.clean, held.corrupted)]
    elsewhere = replace(held, clean=moved[0], corrupted=moved[1])
    zero, one = ({"ablation": "given", "values": {"1.resid_pre": torch.full((1,), v)}} for v in (0.0, 1.0))
    forms = replace(held, meta=tuple({"template": i // 2 + 5 * (i == 1)} for i in range(4)))
    cases: list[tuple[tuple[Any, dict[str, Any]], tuple[Any, dict[str, Any]]]] = [
        ((held, zero), (held, one)),
        ((held, {"by": "span", "spans": ["x"]}), (elsewhere, {"by": "span", "spans": ["x"]})),
        ((held, {"by": "latent", "dictionary": Scaled(1.0)}), (held, {"by": "latent", "dictionary": Scaled(2.0)})),
        ((held, {"ablation": "mean"}), (forms, {"ablation": "mean"})),
    ]
    for number, (first, second) in enumerate(cases):
        file = tmp_path / f"{number}.safetensors"
        for _ in range(2):
            activation_patch(hm, first[0], sites="1.resid_pre", options=PatchOptions(resume=file, **first[1]))
        with pytest.raises(ArtifactError, match=r"differs in (edits|given)"):
            activation_patch(hm, second[0], sites="1.resid_pre", options=PatchOptions(resume=file, **second[1]))


def test_an_interrupt_without_a_file_returns_what_is_done() -> None:
    hm, pairs = manager("GPT2"), ragged()
    metric = Stopping(pairs.tokens(hm), 8)
    found = activation_patch(hm, pairs, sites="resid_pre", metric=metric, options=PatchOptions(budget_bytes=1))
    done = ~found.patched.isnan().any(-1)
    assert 0 < int(done.sum()) < done.numel() and torch.equal(
        found.patched[found.unchanged], found.corrupted.expand(int(found.unchanged.sum()), -1)
    )
    assert "the sweep was stopped" in found.summary() and "are done" in found.summary()


def test_a_model_or_a_metric_that_gives_no_numbers_is_refused_before_the_sweep() -> None:
    hm, pairs = HookManager.load(make("GPT2"), word_tokenizer()), ragged()
    with pytest.raises(DataError, match=r"clean run is NaN for example 0"):
        activation_patch(hm, pairs, sites="1.z", metric=lambda out: out.logits[:, 0, 0] * torch.nan)
    given = PatchOptions(ablation="given", values={"1.resid_pre": torch.full((1,), torch.nan)})
    told = activation_patch(hm, pairs, sites="1.resid_pre", options=given).summary()
    assert "are NaN: what was put in" in told and "stopped" not in told
    weight: Any = hm.weights[1].W_O
    with torch.no_grad():
        weight.fill_(torch.nan)
    with pytest.raises(DataError, match="NaN in the weights"):
        activation_patch(hm, pairs, sites="1.z")
    with pytest.raises(DataError, match="NaN in the weights"):
        attribute(hm, pairs, nodes="1.z")
    with pytest.raises(DataError, match="NaN in the weights"):
        path_patch(hm, pairs[[0]], senders="a0.h0")
    with pytest.raises(DataError, match="NaN in the weights"):
        subspace_patch(hm, pairs, "1.resid_pre", torch.ones(32))
    with pytest.raises(ModelError, match="activations are NaN"):
        edge_attribution(hm, pairs)


# -- results -------------------------------------------------------------------------------------------------------


def test_a_result_of_both_directions_and_metrics_survives_saving(tmp_path: Path) -> None:
    hm, pairs = manager("GPT2"), ragged()
    options = PatchOptions(by="pos_head", mode="both")
    result = activation_patch(hm, pairs, sites=["1.z"], metric=["logit_diff", "log_prob"], options=options)
    loaded = Result.load(result.save(tmp_path / "r"))
    assert isinstance(loaded, PatchResult) and loaded.summary() == result.summary()
    frame = result.to_frame()
    assert loaded.to_frame().equals(frame) and len(frame) == 2 * 2 * 24 * 4
    assert set(frame["metric"]) == {"logit_diff", "log_prob"} and set(frame["mode"]) == {"denoise", "noise"}
    assert len(result.plot().data[-1].x) == 24 and len(result.noise.plot().data[0].z) == hm.n_heads
    low, high = result["log_prob"].interval(n_bootstrap=200)
    mean = result["log_prob"].effect.mean(-1)
    assert bool(((low <= mean + 1e-6) & (mean <= high + 1e-6)).all())
    assert result["logit_diff"].p_values().shape == (1, 24)
    with pytest.raises(DataError, match="no metric 'logit_dif'"):
        result["logit_dif"]


@pytest.mark.usefixtures("unchecked")
def test_settings_that_do_not_go_together_are_refused() -> None:
    hm, pairs = manager("GPT2"), ragged()
    for wrong in (
        {"by": "heads"},
        {"mode": "back"},
        {"ablation": "zero", "mode": "denoise"},
        {"ablation": "given"},
        {"by": "latent"},
        {"spans": ["x"]},
        {"engine": "fast"},
    ):
        with pytest.raises(ConfigError, match="PatchOptions"):
            PatchOptions(**wrong)
    with pytest.raises(SiteError, match="has no heads"):
        activation_patch(hm, pairs, sites="resid_pre", options=PatchOptions(by="pos_head"))
    with pytest.raises(DataError, match="names are for PromptPairs"):
        activation_patch(hm, "w1 w2", "w1 w3", sites="resid_pre", metric="kl")
    with pytest.raises(DataError, match="two metrics are named"):
        activation_patch(hm, pairs, sites="resid_pre", metric=["kl", "kl"])
    with pytest.raises(SiteError, match="edits whole sites"):
        activation_patch(hm, pairs, sites=[Site("1.z").at(pos=-1)])
    for pos in ("end", 1.5, [True], []):
        with pytest.raises(WhereError, match="expected whole numbers"):
            activation_patch(hm, pairs, sites="resid_pre", pos=pos)  # type: ignore[arg-type]
    for value in (torch.zeros(3), torch.zeros(4, 3, 32), torch.zeros(3, 1, 32)):
        with pytest.raises(ShapeError, match=r"the value given for 1.resid_pre"):
            options = PatchOptions(ablation="given", values={"1.resid_pre": value})
            activation_patch(hm, pairs, sites="1.resid_pre", options=options)
    with pytest.raises(ShapeError, match="latents 0 … 31"):
        options = PatchOptions(by="latent", dictionary=Scaled(1.0), latents=[0.5])  # type: ignore[list-item]
        activation_patch(hm, pairs, sites="1.resid_pre", options=options)


# -- the testbed ---------------------------------------------------------------------------------------------------


@functools.cache
def small_world() -> HookManager:
    return HookManager.load("testbed")


def test_indirect_objects_are_moved_by_few_heads_and_read_at_the_end() -> None:
    hm = small_world()
    pairs = task_pairs("ioi", 12, seed=3)
    stream = activation_patch(hm, pairs, sites="resid_pre", options=PatchOptions(by="span"))
    share = stream.normalized()
    at = {name: i for i, name in enumerate(stream.columns)}
    assert stream.gap > 1 and stream.gap_is_clear
    assert float(share[0, at["end"]].abs()) < 0.1, "before the first block the last token knows nothing"
    heads = activation_patch(hm, pairs, sites="z").normalized()
    strong = heads.flatten().sort(descending=True).values
    assert float(strong[0]) > 0.2 and float(strong[len(strong) // 2].abs()) < 0.1


@pytest.mark.usefixtures("unchecked")  # a fit of many steps
def test_the_optimal_constant_hurts_less_than_the_mean_and_zero_and_is_one_per_head() -> None:
    hm, pairs = manager("GPT2"), ragged()
    tokens = pairs.tokens(hm)
    values = optimal_values(hm, pairs, ["2.z"], steps=25)
    assert [tuple(v.shape) for v in values.values()] == [(hm.n_heads, hm.d_head)]
    real = hm.run(tokens.clean, read=["2.z"])["2.z"][tokens.clean.mask]
    mean = {Site("2.z"): real.mean(0)}
    losses = {
        name: activation_patch(hm, pairs, sites=["2.z"], metric="kl", options=PatchOptions(ablation=how, values=given))
        for name, how, given in (("best", "given", values), ("mean", "given", mean), ("zero", "zero", None))
    }
    mean_of = {name: result.patched.mean(-1)[0] for name, result in losses.items()}
    assert bool((mean_of["best"] <= mean_of["mean"] + 1e-5).all()) and bool((mean_of["best"] <= mean_of["zero"]).all())
    assert float((mean_of["best"] / mean_of["mean"]).min()) < 0.9
    assert all(parameter.grad is None for parameter in hm.model.parameters())


def test_a_site_s_strip_has_every_example_of_every_head() -> None:
    hm, pairs = manager("GPT2"), ragged()
    found = activation_patch(hm, pairs, sites="z", metric=["logit_diff", "kl"], options=PatchOptions(mode="both"))
    figure = found.plot(site="1.z")
    one = found["logit_diff"]
    close(torch.tensor(figure.data[0].y).reshape(hm.n_heads, 4), one.effect[1])
    close(torch.tensor(figure.data[1].y), one.effect[1].mean(-1))
    low, high = one.interval()
    bar = figure.data[1].error_y
    mean, above, below = (torch.tensor(v) for v in (figure.data[1].y, bar.array, bar.arrayminus))
    close(mean + above, high[1].float())
    close(mean - below, low[1].float())
    back = found["kl"].noise.plot(site="2.z")
    close(torch.tensor(back.data[0].y).reshape(hm.n_heads, 4), found["kl"].noise.effect[2])
    assert "1.z" in figure.layout.xaxis.title.text and "logit_diff" in figure.layout.yaxis.title.text
    with pytest.raises(DataError, match=r"no site '3\.z' was patched"):
        found.plot(site="3.z")
    wide = activation_patch(hm, pairs, sites=["0.mlp_post"], options=PatchOptions(by="neuron"))
    with pytest.raises(DataError, match="a strip shows up to"):
        wide.plot(site="0.mlp_post")
