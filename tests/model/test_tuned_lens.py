"""The tuned lens: a planted map is found, an unfitted lens is the logit lens, and a fit is the same every time."""

import dataclasses
import functools
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from interp.core.errors import ArtifactError, ConfigError, DataError, ModelError, SiteError
from interp.core.manager import HookManager
from interp.core.result import Result
from interp.core.site import Site
from interp.data.tokens import TokenBlock, TokenSource
from interp.lens.logit_lens import LogitLensResult, logit_lens
from interp.lens.tuned_fit import TunedLensOptions, evaluate_tuned_lens, fit_tuned_lens
from interp.lens.tuned_lens import TunedLens, tuned_lens
from interp.testbed.nano import NanoOptions, nano
from interp.train.common import TrainingError
from tests.families import VOCAB, make, manager, paddings, tokens, word_tokenizer

WIDTH = 8
FEW = TunedLensOptions(steps=8, rows=4)


@functools.cache
def planted() -> tuple[HookManager, Tensor]:
    """Two blocks without norms, the second of which adds exactly x A: what block 0 leaves is one map from the end."""
    model = nano(
        NanoOptions(
            d_vocab=40, n_layers=2, d_model=WIDTH, n_heads=2, d_mlp=2 * WIDTH, act="linear", norm="none", bias=False,
            positions="none", init_std=0.3, embed_std=1.0, out_std=0.3,
        ),
        seed=3,
    )  # fmt: skip
    hm = HookManager.load(model)
    with torch.no_grad():
        hm.weights[1].W_O.zero_()
        hm.weights[0].W_out.zero_()  # else one direction of the stream is hardly ever used, and so hardly fitted
        matrix = hm.weights[1].W_in @ hm.weights[1].W_out
    return hm, matrix.detach()


def some_ids(rows: int, seed: int = 0, length: int = 16, vocab: int = 40) -> Tensor:
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_a_planted_linear_map_is_found_and_its_kl_goes_to_zero() -> None:
    hm, matrix = planted()
    options = TunedLensOptions(steps=200, optimizer="adam", lr=0.08, weight_decay=0.0)
    lens = fit_tuned_lens(hm, some_ids(64), options=options, held_out=some_ids(8, seed=1))
    assert lens.sites == ["0.resid_pre", "0.resid_post"] and lens.final == "1.resid_post"
    before, after = lens.kl_logit_lens.mean(1), lens.kl.mean(1)
    assert float(before[1]) > 0.3 and float(after[1]) < 1e-6
    assert float((lens.weight[1] - matrix).abs().max()) < 0.01 * float(matrix.abs().max())
    assert float(lens.bias[1].abs().max()) < 0.01
    # Attention comes between the embedding and the end, which no map of one position can know.
    assert float(after[0]) > 20 * float(after[1])


def test_the_authors_settings_find_it_too_and_held_out_text_is_read_better_at_every_layer() -> None:
    hm, _ = planted()
    lens = fit_tuned_lens(hm, some_ids(64), options=TunedLensOptions(steps=100), held_out=some_ids(8, seed=1))
    assert bool((lens.kl.mean(1) <= lens.kl_logit_lens.mean(1)).all())
    assert float(lens.kl[1].mean()) < 0.2 * float(lens.kl_logit_lens[1].mean())
    assert bool((lens.losses[-1] < lens.losses[0]).all())


def test_the_last_layer_is_exactly_the_output() -> None:
    for name in ("GPT2", "Gemma2"):
        hm = manager(name)
        lens = evaluate_tuned_lens(hm, tokens(3), TunedLens.identity(hm))
        assert not lens.kl[-1].any() and bool((lens.kl[:-1] > 0.01).all())
        assert torch.equal(lens.kl, lens.kl_logit_lens)


@pytest.mark.parametrize("name", ["GPT2", "Gemma2", "Olmo2", "Granite"])
def test_an_unfitted_lens_is_the_logit_lens_to_the_bit(name: str) -> None:
    hm = manager(name)
    ours, theirs = tuned_lens(hm, tokens(), TunedLens.identity(hm)), logit_lens(hm, tokens())
    assert ours.sites == theirs.sites and (ours.reader, theirs.reader) == ("tuned lens", "logit lens")
    for field in dataclasses.fields(LogitLensResult):
        mine, other = getattr(ours, field.name), getattr(theirs, field.name)
        if isinstance(mine, Tensor):
            assert torch.equal(mine.nan_to_num(), other.nan_to_num()), field.name


def test_a_step_is_the_optimisers_own_on_the_gradient_of_the_mean_kl() -> None:
    """An oracle of its own: one step by torch's SGD on the loss written out in one piece, from the plain model."""
    model, ids = make("Gemma2"), tokens(4)
    lens = fit_tuned_lens(manager("Gemma2"), ids, options=TunedLensOptions(steps=1, rows=4), sites=["0.resid_post"])
    found: list[Tensor] = []
    handle = model.model.layers[0].register_forward_hook(lambda m, a, out: found.append(out))
    with torch.no_grad():
        final = model(ids).logits
    handle.remove()
    h = found[0][0] if isinstance(found[0], tuple) else found[0]
    weight, bias = torch.zeros(32, 32, requires_grad=True), torch.zeros(32, requires_grad=True)
    raw = model.lm_head(model.model.norm(h + h @ weight + bias))
    cap = model.config.final_logit_softcapping
    logits = cap * torch.tanh(raw / cap)
    p, q = final.log_softmax(-1), logits.log_softmax(-1)
    loss = (p.exp() * (p - q)).sum(-1).mean()
    loss.backward()
    assert float(lens.losses[0, 0]) == pytest.approx(float(loss.detach()), rel=1e-4)
    torch.nn.utils.clip_grad_norm_([weight, bias], 1.0)
    torch.optim.SGD([weight, bias], lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3).step()
    torch.testing.assert_close(lens.weight[0], weight.detach(), atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(lens.bias[0], bias.detach(), atol=1e-6, rtol=1e-3)


def test_a_layers_map_does_not_depend_on_which_others_are_fitted() -> None:
    hm = manager("Llama")
    alone = fit_tuned_lens(hm, tokens(8), options=FEW, sites=["1.resid_post"])
    among = fit_tuned_lens(hm, tokens(8), options=FEW)
    assert torch.equal(among.weight[among.sites.index("1.resid_post")], alone.weight[0])
    assert float(alone.weight.abs().max()) > 0


def test_chunks_of_logits_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    hm = manager("GPT2")
    whole = fit_tuned_lens(hm, tokens(8), options=FEW, held_out=tokens(3, seed=5))
    monkeypatch.setattr("interp.lens.tuned_fit._LOGITS_AT_ONCE", 7 * VOCAB)
    split = fit_tuned_lens(hm, tokens(8), options=FEW, held_out=tokens(3, seed=5))
    torch.testing.assert_close(whole.weight, split.weight, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(whole.kl, split.kl, atol=1e-4, rtol=1e-3)


def test_pads_and_special_tokens_do_not_count() -> None:
    hm, ids = manager("GPT2"), tokens(1, 8)
    alone = fit_tuned_lens(hm, ids, options=FEW)
    for _, padded, mask in paddings(tokens(2)):
        batch = hm.to_tokens(padded[:1], mask=mask[:1])
        lens = fit_tuned_lens(hm, batch, options=FEW)
        # Row 0 of the padded batch holds other tokens than `ids` where those differ: the same text, read alone.
        own = fit_tuned_lens(hm, padded[:1][mask[:1]][None], options=FEW)
        torch.testing.assert_close(lens.weight, own.weight, atol=1e-4, rtol=1e-2)
        assert lens.tokens == own.tokens == 8 * 8
    with_bos = torch.cat([torch.zeros(1, 1, dtype=torch.long), ids], 1)
    assert fit_tuned_lens(hm, with_bos, options=FEW).tokens == alone.tokens
    with pytest.raises(DataError, match="no token counts"):
        fit_tuned_lens(hm, torch.zeros(2, 4, dtype=torch.long), options=FEW)


def test_the_same_seed_gives_the_same_bytes_and_another_another_order(tmp_path: Path) -> None:
    hm, ids = manager("GPT2"), tokens(9)
    made = [fit_tuned_lens(hm, ids, options=FEW) for _ in range(2)]
    for i, lens in enumerate(made):
        lens.save(tmp_path / str(i))
    files = [(tmp_path / str(i) / "tensors.safetensors").read_bytes() for i in range(2)]
    assert files[0] == files[1]
    other = fit_tuned_lens(hm, ids, options=FEW.model_copy(update={"seed": 1}))
    assert not torch.equal(other.weight, made[0].weight)
    back = TunedLens.load(tmp_path / "0")
    assert torch.equal(back.weight, made[0].weight) and back.provenance == made[0].provenance
    assert torch.equal(tuned_lens(hm, ids, back).top_probs, tuned_lens(hm, ids, made[0]).top_probs)
    assert isinstance(Result.load(tmp_path / "0"), TunedLens)
    (tmp_path / "0" / "tensors.safetensors").write_bytes(b"x")
    with pytest.raises(ArtifactError):
        TunedLens.load(tmp_path / "0")


class Interrupting(TokenSource):
    """Text that sends this process a signal when its third block is asked for."""

    def blocks(self, cursor: Any = None) -> Iterator[TokenBlock]:
        for i, block in enumerate(super().blocks(cursor)):
            if i == 2:
                os.kill(os.getpid(), signal.SIGINT)
            yield block


def words(n: int) -> list[str]:
    ids = some_ids(n, seed=4, length=20, vocab=VOCAB - 1) + 1
    return [" ".join(f"w{i}" for i in row) for row in ids.tolist()]


def test_streamed_text_is_begun_again_and_ctrl_c_gives_what_was_fitted() -> None:
    hm, handler = manager("GPT2"), signal.getsignal(signal.SIGINT)
    text = TokenSource(words(12), word_tokenizer(), ctx=21, rows=2, packing="one_doc")
    lens = fit_tuned_lens(hm, text, options=TunedLensOptions(steps=9), held_out=text)
    assert lens.steps == 9 and not lens.stopped and lens.tokens == 9 * 2 * 20
    assert lens.kl.shape == (4, 12)
    cut = Interrupting(words(12), word_tokenizer(), ctx=21, rows=2, packing="one_doc")
    part = fit_tuned_lens(hm, cut, options=TunedLensOptions(steps=9))
    assert part.stopped and part.steps == 3 and part.losses.shape == (3, 3)
    torch.testing.assert_close(part.losses, lens.losses[:3])
    assert signal.getsignal(signal.SIGINT) is handler
    more = fit_tuned_lens(hm, text, options=TunedLensOptions(steps=2), start=part)
    assert more.steps == 5 and bool((more.losses[3] < part.losses[0]).all())


def test_a_loss_that_is_no_number_stops_the_fit_and_names_site_and_step() -> None:
    hm = manager("GPT2")
    broken = TunedLens.identity(hm)
    weight = broken.weight.clone()
    weight[1, 0, 0] = torch.nan
    with pytest.raises(TrainingError, match=r"0\.resid_post is nan at step 1;"):
        fit_tuned_lens(hm, tokens(), options=FEW, start=dataclasses.replace(broken, weight=weight))


def test_a_lens_of_another_model_is_refused() -> None:
    lens = TunedLens.identity(manager("GPT2"))
    with pytest.raises(ModelError, match="fitted on"):
        tuned_lens(manager("Llama"), tokens(), lens)
    with pytest.raises(ModelError, match="width 32"):
        tuned_lens(planted()[0], some_ids(1), lens)
    with pytest.raises(ModelError, match="folded"):
        # Nothing was tied here, so the folded copy has the same configuration.
        tuned_lens(manager("Llama").folded(), tokens(), TunedLens.identity(manager("Llama")))
    with pytest.warns(UserWarning, match="other weights of the same"):
        tuned_lens(HookManager.load(make("GPT2", seed=1), word_tokenizer()), tokens(), lens)


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_fitted_or_read_is_refused() -> None:
    hm = manager("GPT2")
    with pytest.raises(DataError, match="lens is a NoneType"):
        tuned_lens(hm, tokens(), None)  # type: ignore[arg-type]
    with pytest.raises(SiteError, match="nothing to fit"):
        TunedLens.identity(hm, ["2.resid_post"])
    with pytest.raises(SiteError, match="logit lens reads"):
        fit_tuned_lens(hm, tokens(), sites=["1.mlp_out"], options=FEW)
    lens = TunedLens.identity(hm, ["0.resid_post"])
    with pytest.raises(SiteError, match=r"no map of 1\.resid_post"):
        tuned_lens(hm, tokens(), lens, sites=["1.resid_post"])
    with pytest.raises(SiteError, match="no map"):
        lens.translate("1.resid_mid", torch.zeros(1, 32))
    with pytest.raises(ConfigError, match="own sites"):
        fit_tuned_lens(hm, tokens(), sites=["0.resid_post"], start=lens, options=FEW)
    assert tuned_lens(hm, tokens(), lens).sites == ["0.resid_post", "2.resid_post"]


def test_the_model_is_left_as_it_was() -> None:
    hm = manager("GPT2")
    before = {name: p.clone() for name, p in hm.model.named_parameters()}
    flags = [p.requires_grad for p in hm.model.parameters()]
    fit_tuned_lens(hm, tokens(), options=FEW)
    assert all(torch.equal(before[name], p) for name, p in hm.model.named_parameters())
    assert [p.requires_grad for p in hm.model.parameters()] == flags
    assert all(p.grad is None for p in hm.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in hm.root.modules())


def test_the_page_and_the_figure_show_both_lenses(tmp_path: Path) -> None:
    hm = manager("GPT2")
    lens = fit_tuned_lens(hm, tokens(8), options=FEW, held_out=tokens(3, seed=2))
    assert [trace.name for trace in lens.plot().data] == ["logit lens", "tuned lens"]
    assert list(lens.to_frame()["site"]) == lens.places
    assert "held-out rows" in lens.summary() and "steps on" in fit_tuned_lens(hm, tokens(), options=FEW).summary()
    page = lens.to_html(tmp_path / "lens.html").read_text()
    assert "Tuned lens" in page


# -- reading chosen positions, for both lenses --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["GPT2", "Gemma2"])
def test_chosen_positions_read_as_they_do_among_all(name: str) -> None:
    hm, ids = manager(name), tokens()
    for _, padded, mask in paddings(ids):
        batch = hm.to_tokens(padded, mask=mask)
        whole = logit_lens(hm, batch)
        for pos, columns in _choices(mask):
            part = logit_lens(hm, batch, pos=pos)
            assert torch.equal(part.columns, columns) and torch.equal(part.tokens, padded.gather(1, columns))
            for field in ("entropy", "kl_to_final", "target_logprob"):
                expected = getattr(whole, field).gather(2, columns.expand(len(whole.sites), -1, -1))
                torch.testing.assert_close(getattr(part, field), expected, atol=1e-4, rtol=1e-4, equal_nan=True)
            assert torch.equal(part.top_ids, whole.top_ids.gather(2, columns[None, :, :, None].expand_as(part.top_ids)))
    assert set(logit_lens(hm, ids, pos=[2, 5]).to_frame()["pos"]) == {2, 5}


def _choices(mask: Tensor) -> Iterator[tuple[Any, Tensor]]:
    own = [row.nonzero()[:, 0] for row in mask]
    yield -1, torch.stack([c[-1:] for c in own])
    yield [0, 3, -2], torch.stack([c[[0, 3, -2]] for c in own])
    yield torch.tensor([1, -3]), torch.stack([own[0][1:2], own[1][-3:-2]])
    yield torch.tensor([[1, 2], [4, 3]]), torch.stack([own[0][[1, 2]], own[1][[4, 3]]])


def test_chosen_positions_hold_no_more_than_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    hm, seen = manager("GPT2"), []
    run = HookManager.run

    def spy(self: HookManager, *args: Any, **options: Any) -> Any:
        out = run(self, *args, **options)
        seen.append((sum(out[site].numel() for site in out), out.logits.numel()))
        return out

    monkeypatch.setattr(HookManager, "run", spy)
    logit_lens(hm, tokens(2, 6), pos=-1)
    logit_lens(hm, tokens(2, 12), pos=-1)
    assert seen[0] == seen[1]


def test_a_run_that_is_there_is_read_without_another_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    hm, ids = manager("Gemma2"), tokens()
    whole, end = logit_lens(hm, ids), logit_lens(hm, ids, pos=[-2])
    full = hm.run(ids, read=["0.resid_pre", "*.resid_post"], logits="all")
    cut = hm.run(ids, read=[Site(name).at(pos=-2) for name in ("0.resid_pre", "0.resid_post", "1.resid_post")])
    rows: list[int] = []
    run = HookManager.run

    def spy(self: HookManager, inputs: Any, **options: Any) -> Any:
        rows.append(len(inputs))
        return run(self, inputs, **options)

    monkeypatch.setattr(HookManager, "run", spy)
    assert torch.equal(logit_lens(hm, full).top_probs, whole.top_probs) and not rows
    sliced = logit_lens(hm, cut)
    torch.testing.assert_close(sliced.kl_to_final, end.kl_to_final, atol=1e-5, rtol=1e-4)
    assert torch.equal(sliced.columns, end.columns) and rows == [1]
    with pytest.raises(SiteError, match=r"add to read=.*'1\.resid_post'"):
        logit_lens(hm, hm.run(ids, read=["0.resid_post"]))
    with pytest.raises(SiteError, match="all sliced by one"):
        logit_lens(hm, hm.run(ids, read=[Site("0.resid_post").at(pos=-1), "1.resid_post"]))
    with pytest.raises(DataError, match="leave pos"):
        logit_lens(hm, full, pos=1)
