"""The first hour on a model whose mechanism is known by construction, and its laws on tiny models of many families."""

import functools

import pytest
import torch
import transformers as tf
from torch import Tensor

from interp.core.errors import ConfigError, DataError, ModelError, ShapeError, SiteError, WhereError
from interp.core.intervention import Ablate, Replace
from interp.core.manager import HookManager
from interp.core.metrics import answer_logits, logit_diff
from interp.core.result import Provenance, Result
from interp.core.run import Run
from interp.lens.logit_lens import LogitLensResult, direction_logits, logit_lens
from interp.patching.activation import activation_patch
from interp.patching.result import PatchResult
from interp.probing.induction import InductionScores, induction_scores
from interp.report.attention import show_attention
from tests.families import VOCAB, make, manager, paddings, tokens, word_tokenizer

POSITIONS = 64
LENSED = ("GPT2", "GPTNeoX", "OPT", "Llama", "Gemma", "Gemma2", "Gemma3", "Olmo2", "Granite", "Cohere", "Bloom", "Phi")


def _norm(layer_norm: torch.nn.LayerNorm, ones: int, width: int) -> None:
    """Make LayerNorm the identity up to a constant on vectors that hold this many ones."""
    mean = ones / width
    layer_norm.weight.fill_((mean - mean**2) ** 0.5)


@functools.cache
def induction_model() -> HookManager:
    """Two layers that do induction: 0.0 attends to the previous token, 1.0 to what followed an earlier occurrence.

    The residual stream holds three one-hot slots: the token, the position, and the token before, which head 0.0
    writes. Head 1.0 matches the token with the token before and copies what it finds, four-fold, into the token slot,
    from which the tied unembedding reads. Heads 0.1 and 1.1 are zero, and so are the MLPs.
    """
    width = 2 * VOCAB + POSITIONS
    config = tf.GPT2Config(
        n_embd=width,
        n_layer=2,
        n_head=2,
        n_positions=POSITIONS,
        vocab_size=VOCAB,
        n_inner=8,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = tf.GPT2LMHeadModel(config).eval()
    token, position, before = (slice(0, VOCAB), slice(VOCAB, VOCAB + POSITIONS), slice(VOCAB + POSITIONS, width))
    head, sharp = width // 2, 40.0 * (width // 2) ** 0.5
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.wte.weight[:, token] = torch.eye(VOCAB)
        model.transformer.wpe.weight[:, position] = torch.eye(POSITIONS)
        first, second = (block.attn for block in model.transformer.h)
        first.c_attn.weight[position, :POSITIONS] = sharp * torch.eye(POSITIONS).roll(-1, 1)
        first.c_attn.weight[position, width : width + POSITIONS] = torch.eye(POSITIONS)
        second.c_attn.weight[token, :VOCAB] = sharp * torch.eye(VOCAB)
        second.c_attn.weight[before, width : width + VOCAB] = torch.eye(VOCAB)
        for attention, slot, gain in ((first, before, 1.0), (second, token, 4.0)):
            attention.c_attn.weight[token, 2 * width : 2 * width + VOCAB] = torch.eye(VOCAB)
            attention.c_proj.weight[:VOCAB, slot] = gain * torch.eye(VOCAB)
        for block, ones in zip(model.transformer.h, (2, 3), strict=True):
            _norm(block.ln_1, ones, width)
        model.transformer.ln_f.weight.fill_(1.0)
    assert head >= max(VOCAB, POSITIONS)
    return HookManager.load(model, word_tokenizer())


TEXT = "w0 w5 w6 w7 w8 w5"
CORRUPTED = "w0 w5 w9 w7 w8 w5"


def w6_over_w9(out: Run) -> Tensor:
    return logit_diff(out, 6, 9)


# -- induction ---------------------------------------------------------------------------------------------------


def test_induction_scores_find_the_two_heads_that_were_built() -> None:
    scores = induction_scores(induction_model(), bos=True)
    assert scores.induction[1, 0] > 0.999 and scores.previous_token[0, 0] > 0.999
    others = scores.induction.flatten()[[0, 1, 3]]
    assert others.max() < 0.05 and scores.null.max() < 0.05 and scores.duplicate.max() < 0.05
    assert "L1H0 1.00" in scores.summary()


@pytest.mark.parametrize("bos", [True, False])
def test_a_head_of_equal_weights_scores_its_closed_form(bos: bool) -> None:
    scores = induction_scores(induction_model(), bos=bos, seq_len=9, n_seqs=3)
    b, t = int(bos), 9
    second_copy = sum(1 / (b + t + i + 1) for i in range(t)) / t
    queries = range(b + 1, b + 2 * t)
    every = sum(1 / (q + 1) for q in queries) / len(queries)
    for score, expected in (
        ("induction", second_copy),
        ("duplicate", second_copy),
        ("null", second_copy),
        ("previous_token", every),
    ):
        assert float(getattr(scores, score)[1, 1]) == pytest.approx(expected, rel=1e-5)


def _planted(distance: int, width: int, heads: int) -> Tensor:
    """Patterns in which every query attends to the key so many places before it, and to itself where there is none."""
    pattern = torch.zeros(1, heads, width, width)
    queries = torch.arange(width)
    keys = torch.where(queries >= distance, queries - distance, queries)
    pattern[:, :, queries, keys] = 1.0
    return pattern


@pytest.mark.parametrize("name", ["GPT2", "Llama", "Gemma2"])
@pytest.mark.parametrize("offset", [-1, 0, 1, 3])
def test_a_planted_pattern_scores_exactly_one_at_its_own_offset_and_zero_at_others(name: str, offset: int) -> None:
    hm, t = manager(name), 8
    plant = Replace("1.pattern", _planted(t - offset, 2 * t, hm.n_heads).expand(4, -1, -1, -1))
    scores = induction_scores(hm, seq_len=t, n_seqs=4, offset=offset, bos=False, write=[plant])
    assert torch.equal(scores.induction[1], torch.ones(hm.n_heads))
    other = induction_scores(hm, seq_len=t, n_seqs=4, offset=offset + 1, bos=False, write=[plant])
    assert torch.equal(other.induction[1], torch.zeros(hm.n_heads))
    assert torch.equal(scores.duplicate[1], torch.full((hm.n_heads,), float(offset == 0)))


def test_induction_scores_do_not_depend_on_the_batch_size_or_the_layers_held_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hm = manager("Llama")
    whole = induction_scores(hm, n_seqs=5, seq_len=7)
    monkeypatch.setattr("interp.probing.induction._PATTERN_BYTES", 1)
    split = induction_scores(hm, n_seqs=5, seq_len=7, batch_size=2)
    for score in ("induction", "duplicate", "previous_token", "null"):
        assert torch.allclose(getattr(whole, score), getattr(split, score), atol=1e-6)
    assert whole.provenance.data_hash == split.provenance.data_hash
    assert whole.provenance.data_hash != induction_scores(hm, n_seqs=5, seq_len=7, seed=1).provenance.data_hash


def test_induction_scores_refuse_what_cannot_be_scored() -> None:
    with pytest.raises(ConfigError, match="offset"):
        induction_scores(manager("GPT2"), seq_len=4, offset=4)
    with pytest.raises(DataError, match="seq_len ≤ 59"):
        induction_scores(manager("GPT2"), seq_len=60)


# -- logit lens --------------------------------------------------------------------------------------------------


def test_the_lens_sees_the_answer_appear_in_the_layer_that_copies_it() -> None:
    lens = logit_lens(induction_model(), TEXT, targets=6)
    assert lens.sites == ["0.resid_pre", "0.resid_post", "1.resid_post"]
    assert [int(i) for i in lens.top_ids[:, 0, -1, 0]] == [5, 5, 6]
    assert int(lens.target_rank[-1, 0, -1]) == 0 and int(lens.target_rank[0, 0, -1]) > 0
    assert lens.names[6] == "w6"


@pytest.mark.parametrize("name", LENSED)
def test_the_last_layer_of_the_lens_is_the_models_output(name: str) -> None:
    hm, ids = manager(name), tokens()
    lens = logit_lens(hm, ids, top_k=VOCAB)
    expected = hm.run(ids).logits.log_softmax(-1)
    assert torch.allclose(lens.top_probs[-1], expected.gather(-1, lens.top_ids[-1]).exp(), atol=1e-6)
    assert torch.equal(lens.top_ids[-1, ..., 0], expected.argmax(-1))
    assert float(lens.kl_to_final[-1].abs().max()) < 1e-5 < float(lens.kl_to_final[0].max())
    following = expected[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    assert torch.allclose(lens.target_logprob[-1, :, :-1], following, atol=1e-5)
    assert bool(lens.target_logprob[:, :, -1].isnan().all()) and bool((lens.target_rank[:, :, -1] == -1).all())


@pytest.mark.parametrize("name", ["GPT2", "Llama", "Gemma2"])
def test_the_lens_reads_padded_rows_as_it_reads_them_alone(name: str) -> None:
    hm, ids = manager(name), tokens()
    alone = logit_lens(hm, ids[:1, :8])
    for _, padded, mask in paddings(ids):
        lens = logit_lens(hm, hm.to_tokens(padded, mask=mask))
        real = mask[0]
        assert torch.equal(lens.top_ids[:, 0, real], alone.top_ids[:, 0])
        for field in ("entropy", "kl_to_final", "target_logprob"):
            ours, theirs = getattr(lens, field)[:, 0], getattr(alone, field)[:, 0]
            assert torch.allclose(ours[:, real], theirs, atol=1e-4, equal_nan=True)
            assert bool(ours[:, ~real].isnan().all())
        assert set(lens.to_frame().query("example == 0")["pos"]) == set(real.nonzero()[:, 0].tolist())


def test_the_lens_agrees_with_putting_each_residual_at_the_end_of_the_model() -> None:
    hm, ids = manager("Gemma2"), tokens()
    lens = logit_lens(hm, ids)
    for i, site in enumerate(lens.sites):
        value = hm.run(ids, read=[site])[site]
        out = (
            hm.run(ids, write=[Replace(f"{hm.n_layers - 1}.resid_post", value)])
            if i < len(lens.sites) - 1
            else hm.run(ids)
        )
        probs = out.logits.softmax(-1)
        assert torch.allclose(lens.top_probs[i], probs.topk(5).values, atol=1e-5)
        assert torch.allclose(lens.entropy[i], torch.distributions.Categorical(probs).entropy(), atol=1e-4)


def test_the_lens_refuses_sites_that_are_no_residual_stream() -> None:
    with pytest.raises(SiteError, match="direction_logits"):
        logit_lens(manager("GPT2"), tokens(), sites=["1.mlp_out"])
    with pytest.raises(DataError, match="top_k"):
        logit_lens(manager("GPT2"), tokens(), top_k=0)
    with pytest.raises(ShapeError, match="batch pos"):
        logit_lens(manager("GPT2"), tokens(), targets=torch.zeros(1, 1, dtype=torch.long))


def test_the_lens_refuses_a_model_that_makes_its_logits_in_an_unknown_way() -> None:
    model = make("Llama")
    model.lm_head.register_forward_hook(lambda module, args, out: out * (2.0 if out.shape[1] > 5 else 1.0))
    inner = model.model.norm
    inner.register_forward_hook(lambda module, args, out: out + model.training)
    hm = HookManager.load(model, word_tokenizer())
    assert torch.isfinite(logit_lens(hm, tokens()).entropy).all()
    model.config.logits_scaling = 4.0
    with pytest.raises(ModelError, match="logit lens would be wrong"):
        logit_lens(hm, tokens())


@pytest.mark.parametrize("name", LENSED)
def test_a_direction_moves_the_logits_as_the_models_own_norm_and_unembedding_do(name: str) -> None:
    """Of a residual stream ±v with |v| large, all that is left after the norm is ±v/σ ⊙ gain, and biases cancel."""
    hm = manager(name)
    direction = torch.randn(3, hm.d_model, generator=torch.Generator().manual_seed(1))
    norm, unembed = hm.map.module(hm.root, "ln_final"), hm.map.module(hm.root, "unembed")
    assert norm is not None and unembed is not None
    centred = (
        direction - direction.mean(-1, keepdim=True)
        if name in ("GPT2", "GPTNeoX", "OPT", "Bloom", "Phi", "Cohere")
        else direction
    )
    sigma = centred.pow(2).mean(-1, keepdim=True).sqrt()
    with torch.no_grad():
        half = (unembed(norm(1e4 * direction)) - unembed(norm(-1e4 * direction))) / 2 * sigma
    scale = {"Granite": 1 / 8, "Cohere": getattr(hm.config, "logit_scale", None)}.get(name, 1.0)
    expected = (half - half.mean(-1, keepdim=True)) * scale
    result = direction_logits(hm, direction)
    assert torch.allclose(result.logits, expected, atol=1e-3 * float(expected.abs().max()))
    assert torch.equal(result.top_ids[:, 0], result.logits.argmax(-1))
    assert torch.allclose(result.logits.mean(-1), torch.zeros(3), atol=1e-5)


def test_a_direction_may_come_alone_and_must_have_the_width_of_the_model() -> None:
    hm = manager("Llama")
    v = torch.randn(hm.d_model)
    one, three = direction_logits(hm, v), direction_logits(hm, torch.stack([v, -v, 2 * v]))
    assert torch.allclose(one.logits[0], three.logits[0], atol=1e-5)
    assert torch.allclose(three.logits[1], -three.logits[0], atol=1e-5)
    assert torch.equal(one.top_ids[0], three.bottom_ids[1])
    with pytest.raises(ShapeError, match="d_model last"):
        direction_logits(hm, torch.randn(hm.d_model + 1))


# -- patching ----------------------------------------------------------------------------------------------------


def test_patching_finds_where_the_answer_is_and_which_head_carries_it() -> None:
    hm = induction_model()
    grid = activation_patch(hm, TEXT, CORRUPTED, sites="resid_pre", metric=w6_over_w9)
    share = grid.normalized()
    expected = torch.zeros(2, 6)
    expected[:, 2] = 1.0
    assert torch.allclose(share, expected, atol=1e-4)
    assert grid.columns[2] == "2: w6 → w9" and grid.columns[0] == "0: w0"
    heads = activation_patch(hm, TEXT, CORRUPTED, sites="z", metric=w6_over_w9, pos=-1)
    assert heads.axis == "head" and torch.allclose(
        heads.normalized(), torch.tensor([[0.0, 0.0], [1.0, 0.0]]), atol=1e-4
    )


@pytest.mark.parametrize("kind", ["resid_pre", "mlp_out", "z", "pattern"])
def test_patching_clean_into_clean_changes_exactly_nothing(kind: str) -> None:
    result = activation_patch(manager("Llama"), tokens(), tokens(), sites=kind, metric=w6_over_w9)
    assert torch.equal(result.effect, torch.zeros_like(result.effect))
    assert bool(result.normalized().isnan().all()) and "not clear" in result.summary()


def test_patching_equals_the_edit_made_by_hand_and_the_whole_stream_restores_the_clean_run() -> None:
    hm, clean, corrupted = manager("Gemma2"), tokens(seed=1), tokens(seed=2)
    result = activation_patch(hm, clean, corrupted, sites=["1.v"], metric=w6_over_w9, pos=[2, 5])
    assert result.patched.shape == (1, hm.n_kv_heads, 2)
    value, by_hand = hm.run(clean, read=["1.v"])["1.v"], []
    for head in range(hm.n_kv_heads):

        def put(x: Tensor, head: int = head) -> Tensor:
            x = x.clone()
            x[:, [2, 5], head] = value[:, [2, 5], head]
            return x

        by_hand.append(w6_over_w9(hm.run(corrupted, write=[("1.v", put)])))
    assert torch.allclose(result.patched[0], torch.stack(by_hand), atol=1e-5)
    last = activation_patch(hm, clean, corrupted, sites=[f"{hm.n_layers - 1}.resid_post"], metric=w6_over_w9, pos=-1)
    assert torch.allclose(last.patched[0, 0], last.clean, atol=1e-5)


def test_patching_refuses_prompts_that_do_not_correspond() -> None:
    hm = induction_model()
    with pytest.raises(DataError, match=r"(?s)6 and 5 tokens.*w0 \| w5 \| w6.*w0 \| w5 \| w7"):
        activation_patch(hm, TEXT, "w0 w5 w7 w8 w5", sites="resid_pre", metric=w6_over_w9)
    with pytest.raises(DataError, match="in pairs"):
        activation_patch(hm, [TEXT, TEXT], TEXT, sites="resid_pre", metric=w6_over_w9)
    with pytest.raises(SiteError, match="two calls"):
        activation_patch(hm, TEXT, CORRUPTED, sites=["0.z", "0.resid_pre"], metric=w6_over_w9)
    with pytest.raises(ShapeError, match="one number per example"):
        activation_patch(hm, TEXT, CORRUPTED, sites="resid_pre", metric=lambda out: out.logits[:, 0])
    with pytest.raises(WhereError, match=r"0 … 5"):
        activation_patch(hm, TEXT, CORRUPTED, sites="resid_pre", metric=w6_over_w9, pos=6)


def test_a_gap_between_prompts_is_divided_by_only_where_it_is_clear() -> None:
    def result(clean: list[float], corrupted: list[float]) -> PatchResult:
        n = len(clean)
        return PatchResult(
            provenance=Provenance(model="none"),
            sites=["0.z"],
            axis="head",
            columns=["0"],
            patched=torch.zeros(1, 1, n),
            clean=torch.tensor(clean),
            corrupted=torch.tensor(corrupted),
            unchanged=torch.zeros(1, 1, dtype=torch.bool),
        )

    assert result([2.0], [1.0]).gap_is_clear and not result([1.0], [1.0]).gap_is_clear
    assert result([2.0, 2.1, 1.9], [0.0, 0.0, 0.0]).gap_is_clear
    assert not result([5.0, -5.0, 1.0], [0.0, 0.0, 0.0]).gap_is_clear


# -- metrics on runs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["GPT2", "Llama"])
def test_logit_diff_reads_the_last_real_token_of_every_row_whatever_the_padding(name: str) -> None:
    hm, ids = manager(name), tokens()
    alone = torch.cat([logit_diff(hm.run(ids[:1, :8]), 3, 4), logit_diff(hm.run(ids[1:]), 3, 4)])
    for _, padded, mask in paddings(ids):
        batch = hm.to_tokens(padded, mask=mask)
        for logits in ("all", "last"):
            assert torch.allclose(logit_diff(hm.run(batch, logits=logits), 3, 4), alone, atol=1e-4)
    with pytest.raises(DataError, match='logits="all"'):
        answer_logits(hm.run(ids, logits="last"), pos=0)


def test_logit_diff_under_grad_gives_the_gradient_of_the_plain_model() -> None:
    hm, ids = manager("Llama"), tokens()
    out = hm.run(ids, read=["0.resid_pre"], grad=lambda run: logit_diff(run, 3, 4))
    embedded = hm.model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = hm.model(inputs_embeds=embedded).logits[:, -1]
    (expected,) = torch.autograd.grad((logits[:, 3] - logits[:, 4]).sum(), embedded)
    assert torch.allclose(out.grad["0.resid_pre"], expected, atol=1e-5)


# -- results and views -------------------------------------------------------------------------------------------


@functools.cache
def _results() -> tuple[Result, ...]:
    hm = induction_model()
    return (
        logit_lens(hm, [TEXT, "w1 w2"]),
        direction_logits(hm, hm.run(TEXT, read=["1.attn_out"])["1.attn_out"][0, -1]),
        induction_scores(hm, bos=True, seq_len=6, n_seqs=2),
        activation_patch(hm, [TEXT, TEXT], [CORRUPTED, CORRUPTED], sites="resid_pre", metric=w6_over_w9),
    )


@pytest.mark.parametrize("number", range(4))
def test_every_result_survives_saving_and_shows_the_same_afterwards(number: int, tmp_path) -> None:  # type: ignore[no-untyped-def]
    result = _results()[number]
    loaded = Result.load(result.save(tmp_path / "r"))
    assert type(loaded) is type(result) and loaded.summary() == result.summary()
    assert loaded.to_frame().equals(result.to_frame()) and len(result.to_frame()) > 0
    assert loaded.plot().to_json() == result.plot().to_json()
    assert loaded.provenance == result.provenance
    page = result.to_html(tmp_path / "r.html").read_text(encoding="utf-8")
    assert result.title in page and "default-src 'none'" in page


def test_provenance_says_what_was_run_on_which_model() -> None:
    lens, _, scores, _ = _results()
    assert isinstance(lens, LogitLensResult) and isinstance(scores, InductionScores)
    here = lens.provenance
    assert (
        here.config_hash
        == scores.provenance.config_hash
        != logit_lens(manager("Llama"), tokens()).provenance.config_hash
    )
    assert scores.provenance.seed == 0 and scores.provenance.settings["seq_len"] == 6
    assert here.versions["torch"] == torch.__version__.split("+")[0] or here.versions["torch"] == torch.__version__
    assert here.data_hash != logit_lens(induction_model(), TEXT).provenance.data_hash


def test_show_attention_shows_the_previous_token_head() -> None:
    hm = induction_model()
    view = show_attention(hm, TEXT, layer=0, heads=[0])
    assert "'w5' attends most to 'w8' (1.00)" in str(view) and "hide BOS" in view.fragment
    assert "hide first token" in show_attention(hm, "w5 w6", layer=0).fragment
    with pytest.raises(DataError, match="one text"):
        show_attention(hm, [TEXT, TEXT], layer=0)
    with pytest.raises(DataError, match=r"0 … 1"):
        show_attention(hm, TEXT, layer=0, heads=[2])


def test_ablating_the_previous_token_head_ends_induction() -> None:
    hm = induction_model()
    whole = logit_diff(hm.run(TEXT), 6, 5)
    without = hm.run(TEXT, write=[Ablate("0.z")])
    assert float(whole) > 1.0 > float(logit_diff(without, 6, 5))
    assert float(induction_scores(hm, bos=True, write=[Ablate("0.z")]).induction[1, 0]) < 0.1


def test_a_model_without_a_tokenizer_is_shown_by_its_token_ids() -> None:
    hm = HookManager.load(make("Llama"))
    lens = logit_lens(hm, tokens())
    assert lens.names[int(tokens()[0, 0])] == str(int(tokens()[0, 0]))
    assert repr(str(int(tokens()[0, -1]))) in str(show_attention(hm, tokens()[:1], layer=0)) and lens.plot().data
    assert activation_patch(hm, tokens(), tokens(seed=1), sites="resid_mid", metric=w6_over_w9).columns[3] == "3"
    assert induction_scores(hm, seq_len=5, n_seqs=2).induction.shape == (3, 4)
