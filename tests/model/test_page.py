"""What `top_examples` finds, against planted latents and a count by hand; the evaluation's intervals; the PCA."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from interp.core.errors import ConfigError, DataError
from interp.core.site import Site
from interp.data.store import Batch
from interp.data.tokens import TokenSource
from interp.dictionaries.base import SAE, DictionaryConfig, Losses
from interp.evaluate import dictionary as evaluation
from interp.evaluate import reading
from interp.evaluate.baseline import fit_pca
from interp.evaluate.dictionary import evaluate_dictionary, place_of
from interp.evaluate.top_examples import TopExamples, top_examples
from interp.lens.logit_lens import direction_logits
from interp.report.dictionary_page import dictionary_page
from interp.report.latents import show_latents
from interp.testbed.text import LabelledTokens
from tests.families import VOCAB, make, manager, word_tokenizer

EMBEDDED = "0.resid_pre"
ORACLE_EXAMPLES, ORACLE_CONTEXT = 4, 3


class TableSAE(SAE):
    """Looks up which token an embedding is, and gives that token's row of a table: latents with a known meaning."""

    def __init__(self, table: Float[Tensor, "d_vocab d_sae"], notes: dict[str, Any] | None = None) -> None:
        self.embeddings = make("Llama").get_input_embeddings().weight.detach()
        d, d_sae = self.embeddings.shape[1], table.shape[1]
        super().__init__(
            DictionaryConfig(
                architecture="table", d_in=d, d_sae=d_sae, metadata={"hook_name": EMBEDDED} if notes is None else notes
            )
        )
        self.table = table
        draw = torch.Generator().manual_seed(3)
        self.W_enc = nn.Parameter(torch.zeros(d, d_sae))
        self.W_dec = nn.Parameter(torch.randn(d_sae, d, generator=draw))
        self.b_enc, self.b_dec = nn.Parameter(torch.zeros(d_sae)), nn.Parameter(torch.randn(d, generator=draw))

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        return self.table[torch.cdist(x.reshape(-1, x.shape[-1]), self.embeddings).argmin(-1)].view(*x.shape[:-1], -1)

    def decode(self, latents: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_out"]:
        return latents @ self.W_dec + self.b_dec

    def loss(self, batch: Batch, *, dead: Bool[Tensor, "d_sae"] | None = None) -> Losses:
        raise NotImplementedError

    def init_from(self, x: Float[Tensor, "token d_in"], *, seed: int, target: Tensor | None = None) -> None:
        raise NotImplementedError

    def fold_scale(self, scale: float, target_scale: float | None = None) -> None:
        raise NotImplementedError

    @classmethod
    def from_cfg(cls, cfg: Mapping[str, Any]) -> "TableSAE":
        raise NotImplementedError


def planted(rows: Mapping[int, Mapping[int, float]], d_sae: int) -> TableSAE:
    """Latent → {token: activation}."""
    table = torch.zeros(VOCAB, d_sae)
    for latent, tokens in rows.items():
        for token, value in tokens.items():
            table[token, latent] = value
    return TableSAE(table)


def random_table(d_sae: int, seed: int = 0, share: float = 0.15) -> TableSAE:
    """Each latent fires on some tokens, on each by another amount."""
    draw = torch.Generator().manual_seed(seed)
    table = torch.rand(VOCAB, d_sae, generator=draw) * (torch.rand(VOCAB, d_sae, generator=draw) < share)
    table[0] = 9.0  # special tokens would be the strongest of all, if they counted
    return TableSAE(table)


def texts(n: int, seed: int = 0, vocabulary: int = VOCAB) -> list[str]:
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.randint(3, 20, (n,), generator=draw).tolist()
    rows = [torch.randint(1, vocabulary, (size,), generator=draw).tolist() for size in sizes]
    return [" ".join(f"w{i}" for i in row) for row in rows]


def source(given: Sequence[str], **options: Any) -> TokenSource:
    return TokenSource(list(given), word_tokenizer(), **{"ctx": 24, "rows": 4, "bos": True, **options})


def look(sae: SAE, data: Any, **options: Any) -> TopExamples:
    return top_examples(
        manager("Llama"), sae, data, **{"n_examples": ORACLE_EXAMPLES, "context": ORACLE_CONTEXT, **options}
    )


def contexts(found: TopExamples, i: int, band: int = 0) -> list[tuple[float, tuple[int, ...]]]:
    """Activation and window of each context of one band."""
    middle = found.ids.shape[2] // 2
    return [
        (float(found.activations[i, e, middle]), tuple(found.ids[i, e].tolist()))
        for e in (found.band[i] == band).nonzero()[:, 0].tolist()
    ]


def by_hand(sae: TableSAE, tokens: TokenSource, latent: int) -> list[tuple[float, tuple[int, ...]]]:
    """Every piece's first strongest window of one latent, each window once, strongest first."""
    best: dict[tuple[int, ...], float] = {}
    for block in tokens.blocks():
        for ids, mask, special, doc in zip(block.ids, block.mask, block.special, block.doc, strict=True):
            for document in dict.fromkeys(doc[mask].tolist()):
                places = [p for p in range(len(ids)) if mask[p] and int(doc[p]) == document]
                values = {p: float(sae.table[ids[p], latent]) for p in places if not special[p]}
                if not values or max(values.values()) <= 0:
                    continue
                peak = max(values, key=lambda p: (values[p], -p))
                span = range(peak - ORACLE_CONTEXT, peak + ORACLE_CONTEXT + 1)
                window = tuple(int(ids[p]) if p in places else -1 for p in span)
                best[window] = max(values[peak], best.get(window, 0.0))
    return sorted(((value, window) for window, value in best.items()), reverse=True)


# -- contexts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["one_doc", "concat", "block_diagonal"])
def test_the_strongest_contexts_are_those_that_a_count_by_hand_finds(
    packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [text for text in texts(50) for _ in range(2)]  # each comes twice, and is shown once
    sae, tokens = random_table(7), source(given, packing=packing)
    found = look(sae, tokens, latents=list(range(7)))
    for latent in range(7):
        expected, got = by_hand(sae, tokens, latent), contexts(found, latent)
        assert [value for value, _ in got] == [value for value, _ in expected[:ORACLE_EXAMPLES]]
        # Of windows that are equally strong any may be kept.
        assert set(got) <= set(expected)
        assert len({window for _, window in got}) == len(got)
    # The same, whatever part of a block is encoded at once.
    monkeypatch.setattr(reading, "_MOST_LATENTS", 24 * 7)
    again = look(sae, tokens, latents=list(range(7)))
    for name in ("ids", "band", "doc", "pos", "firing", "histogram"):
        assert torch.equal(getattr(found, name), getattr(again, name)), name


def test_a_peak_stands_where_its_document_and_position_say() -> None:
    given = texts(50, seed=2)
    found = look(random_table(5), source(given), latents=[0, 3])
    for i in range(2):
        for e in (found.band[i] >= 0).nonzero()[:, 0].tolist():
            words = given[int(found.doc[i, e])].split()
            assert f"w{int(found.ids[i, e, ORACLE_CONTEXT])}" == words[int(found.pos[i, e])]


def test_special_tokens_are_neither_peaks_nor_counted_and_have_no_value() -> None:
    found = look(random_table(6), source(texts(40)), latents=list(range(6)))
    assert float(found.largest.max()) <= 1
    at_special = found.ids == 0
    assert bool(at_special.any()) and bool(found.activations[at_special].isnan().all())
    assert not bool((found.ids[..., ORACLE_CONTEXT] == 0).any())
    assert found.n_tokens == sum(len(text.split()) for text in texts(40))


def test_counts_means_and_histograms_are_those_of_all_tokens() -> None:
    sae, tokens = random_table(6), source(texts(40))
    ids = torch.cat([block.ids[block.mask & ~block.special] for block in tokens.blocks()])
    values = sae.table[ids]
    found = look(sae, tokens, latents=[5, 1])
    assert torch.equal(found.firing, (values > 0).sum(0))
    torch.testing.assert_close(found.density[0], (values[:, 0] > 0).double().mean())
    for i, latent in enumerate((5, 1)):
        active = values[:, latent][values[:, latent] > 0]
        assert float(found.mean_activation[i]) == pytest.approx(float(active.mean()), rel=1e-5)
        assert float(found.largest[i]) == pytest.approx(float(active.max()))
        expected = torch.histogram(active, found.edges).hist.long()
        assert torch.equal(found.histogram[i], expected)


def test_the_order_of_documents_changes_nothing_but_their_numbers() -> None:
    sae, given = random_table(8, share=0.05), texts(60, seed=5)
    order = torch.randperm(len(given), generator=torch.Generator().manual_seed(1)).tolist()
    a, b = (look(sae, source(t, packing="one_doc"), latents=list(range(8))) for t in (given, [given[i] for i in order]))
    for i in range(8):
        values = sorted(v for v, _ in contexts(a, i))
        assert values == sorted(v for v, _ in contexts(b, i))
        # What is stronger than the weakest of them is not a matter of ties.
        for band in range(3):
            sure = [{pair for pair in contexts(x, i, band) if band or pair[0] > values[0]} for x in (a, b)]
            assert band or sure[0] == sure[1]
    assert torch.equal(a.firing, b.firing) and a.label == b.label and torch.equal(a.f1, b.f1)


def test_weaker_contexts_are_near_their_quantiles_and_none_is_shown_twice() -> None:
    draw = torch.Generator().manual_seed(0)
    table = torch.zeros(VOCAB, 2)
    table[1:, 0] = torch.rand(VOCAB - 1, generator=draw)  # fires on every token, evenly from 0 to 1
    table[7, 1] = 1.0
    found = look(TableSAE(table), source(texts(300, seed=7)), latents=[0, 1])
    median, tenth = ([value for value, _ in contexts(found, 0, band)] for band in (1, 2))
    assert len(median) == len(tenth) == 3
    # Each sampled token is one of its document's tokens, drawn evenly: the quantiles are those of all tokens.
    assert all(abs(value - 0.5) < 0.25 for value in median) and all(value < 0.3 for value in tenth)
    assert median == sorted(median, reverse=True)
    windows = [window for band in range(3) for _, window in contexts(found, 0, band)]
    assert len(windows) == len(set(windows))


def test_what_is_among_the_strongest_is_not_shown_again_as_weak() -> None:
    sae, tokens = planted({0: {5: 2.0}, 1: {5: 1.0, 9: 3.0}}, 2), source(texts(60))
    found = look(sae, tokens, latents=[0, 1])
    for latent in range(2):
        got = [pair for band in range(3) for pair in contexts(found, latent, band)]
        expected = by_hand(sae, tokens, latent)
        assert len(expected) > ORACLE_EXAMPLES and len(got) == len({window for _, window in got})
        # Few enough that every one of them is shown, somewhere.
        assert len(got) == min(len(expected), ORACLE_EXAMPLES + 6)


def test_a_latent_that_never_fires_has_no_contexts_and_says_so() -> None:
    found = look(planted({1: {5: 1.0}}, 2), source(texts(30)), latents=[0, 1])
    assert not contexts(found, 0) and float(found.largest[0]) == 0 and math.isnan(float(found.mean_activation[0]))
    assert found.label[0] == "" and not bool(found.claimed[0])
    assert "It was never positive" in dictionary_page(found)


# -- choice, writes, labels -----------------------------------------------------------------------------------------


def test_a_number_of_latents_is_a_spread_of_those_that_fire_with_the_strongest_among_them() -> None:
    table = torch.zeros(VOCAB, 60)
    for latent in range(1, 60):
        table[1 : 1 + latent, latent] = 1.0  # the higher, the denser
    table[3, 10] = 50.0
    sae, tokens = TableSAE(table), source(texts(60))
    found = look(sae, tokens, latents=8)
    chosen = found.latents.tolist()
    assert len(chosen) == 8 == len(set(chosen)) and chosen == sorted(chosen)
    assert 0 not in chosen and 10 in chosen and 59 in chosen
    density = found.density[found.latents]
    assert float(density.min()) < 0.1 and float(density.max()) > 0.4
    assert look(sae, tokens, latents=8).latents.tolist() == chosen
    assert look(sae, tokens, latents=500).latents.tolist() == [i for i in range(60) if found.firing[i]]
    with pytest.raises(DataError, match="no latent of this dictionary fires"):
        look(planted({}, 3), tokens)


def test_what_a_latent_writes_is_the_logit_lens_of_its_decoder_row() -> None:
    hm, sae = manager("Llama"), random_table(70)
    found = look(sae, source(texts(20)), latents=[69, 2])
    lens = direction_logits(hm, sae.W_dec[[69, 2]])
    assert torch.equal(found.raised, lens.top_ids) and torch.equal(found.lowered, lens.bottom_ids)
    torch.testing.assert_close(found.raised_by, lens.logits.gather(1, lens.top_ids), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.lowered_by, lens.logits.gather(1, lens.bottom_ids), rtol=1e-4, atol=1e-4)
    inner = TableSAE(sae.table)
    off_stream = top_examples(hm, inner, source(texts(5)), latents=[2], site="0.ln1.out", max_tokens=50)
    assert off_stream.raised.shape == (1, 0)


def test_a_latent_of_one_token_is_found_to_be_that_tokens() -> None:
    rows = {3: {17: 2.0}, 5: {17: 1.0, 18: 1.0}}
    found = look(planted(rows, 6), source(texts(200)), latents=[3, 5])
    assert found.label[0] == "token 'w17'" and float(found.f1[0]) == 1 == float(found.recall[0])
    assert bool(found.claimed[0]) and float(found.chance[0]) < 0.3
    assert {found.names[window[ORACLE_CONTEXT]] for _, window in contexts(found, 0)} == {"w17"}
    # Two tokens, one of them at most: about two thirds of F1, and still no accident.
    assert bool(found.claimed[1]) and float(found.precision[1]) < 0.7 and float(found.recall[1]) == 1


def labelled(n: int, ctx: int, seed: int = 0) -> LabelledTokens:
    """Rows of two documents each, whose tokens have labels of the small world by rule."""
    ids = torch.randint(1, VOCAB, (n, ctx), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = ids[:, ctx // 2] = 0
    number = torch.where(ids % 5 == 0, (ids > 60).long(), -1)
    answer = torch.where(ids == 0, -1, (ids % 7 == 0).long())
    held_out = torch.where(ids == 0, -1, (ids > 100).long())
    return LabelledTokens(ids, {"number": number, "answer": answer, "held_out": held_out})


def test_labels_of_the_small_world_compete_with_tokens_and_trivial_ones_do_not() -> None:
    plural = {t: 1.0 for t in range(61, VOCAB) if t % 5 == 0}
    open_ = {t: 1.0 for t in range(1, VOCAB) if t % 7}
    drawn = dict.fromkeys(range(101, VOCAB), 1.0)
    decided = {t: 1.0 for t in range(1, VOCAB) if t % 7 == 0}
    found = look(planted({0: plural, 1: open_, 2: drawn, 3: decided}, 4), labelled(40, 24), latents=[0, 1, 2, 3])
    assert found.label[0] == "number plural" and float(found.f1[0]) == 1 and bool(found.claimed[0])
    assert found.label[3] == "answer decided" and float(found.f1[3]) == 1
    assert not bool(found.claimed[1]) and "answer" not in found.label[1]
    assert "held_out" not in found.label[2]
    # Each row's second half is a document of its own: a context never reaches across.
    assert int(found.doc.max()) > 40
    for i in range(4):
        for _, window in contexts(found, i):
            assert 0 not in window[1:] or window.index(0) < ORACLE_CONTEXT


def test_labels_that_have_nothing_to_do_with_the_text_are_not_claimed() -> None:
    text = labelled(60, 24)
    draw = torch.Generator().manual_seed(9)
    noise = torch.randint(0, 2, text.ids.shape, generator=draw).masked_fill(text.ids == 0, -1)
    rows = {i: dict.fromkeys(range(1 + i, VOCAB, 6), 1.0) for i in range(6)}
    found = look(planted(rows, 6), LabelledTokens(text.ids, {"number": noise, "gender": noise.flip(0)}), latents=6)
    assert not [
        label for label, claimed in zip(found.label, found.claimed, strict=True) if claimed and "token" not in label
    ]


# -- a prompt of one's own ------------------------------------------------------------------------------------------


def test_a_latent_is_shown_on_a_prompt_token_by_token() -> None:
    sae = planted({1: {17: 2.0, 0: 5.0}, 2: {4: 1.0}}, 3)
    view = show_latents(manager("Llama"), sae, "w3 w17 w4", [1, 2])
    lines = view.text.splitlines()
    assert lines[0] == "latent 1" and any(line.split() == ["w17", "2"] for line in lines)
    shown = [line.split() for line in lines]
    assert ["w4", "0"] in shown and ["w4", "1"] in shown
    assert view.fragment.count("latent 1") == 1 and "w17" in view.fragment
    assert show_latents(manager("Llama"), sae, "w0 w17", 1).text.splitlines()[1].split() == ["w0", "nan"]


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_looked_at_is_refused() -> None:
    hm, sae, tokens = manager("Llama"), random_table(4), source(texts(5))
    with pytest.raises(DataError, match=r"no latent 4; .* from 0 to 3"):
        look(sae, tokens, latents=[1, 4])
    with pytest.raises(DataError, match="one twice"):
        look(sae, tokens, latents=[1, 1])
    with pytest.raises(DataError, match="at least one"):
        look(sae, tokens, latents=0)
    with pytest.raises(DataError, match="n_examples=0"):
        look(sae, tokens, n_examples=0)
    with pytest.raises(DataError, match="no token that counts"):
        look(sae, source(["w0 w0"]), latents=[1])
    with pytest.raises(DataError, match="give rows"):
        look(sae, LabelledTokens(torch.arange(3), {}), latents=[1])
    with pytest.raises(DataError, match=r"latents=\[9\]"):
        show_latents(hm, sae, "w1", 9)
    unknown = TableSAE(sae.table, notes={})
    with pytest.raises(ConfigError, match="does not say where"):
        look(unknown, tokens)
    with pytest.raises(DataError, match="does not say where"):
        show_latents(hm, unknown, "w1", 1)
    with pytest.raises(ConfigError, match="one vector a token"):
        place_of(hm, sae, "1.pattern")
    with pytest.raises(ConfigError, match="another model"):
        place_of(hm, sae, "1.mlp.hook_post")
    assert place_of(hm, sae) == Site(EMBEDDED)


# -- the evaluation: intervals, special tokens, PCA -----------------------------------------------------------------


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    draw = torch.Generator().manual_seed(0)
    names = ["active", "tokens", "missed", "variance", "kl", "kl_zero", "kl_mean", "n", "clean", "sae", "zero", "mean"]
    names += ["score_everywhere", "score_sae", "score_clean"]
    held = 0
    for _ in range(400):
        size = torch.randint(5, 60, (80,), generator=draw).double()
        # Rows differ in size and in rate; the ratio of the expected sums is 3.
        total = size * (3 + torch.randn(80, generator=draw).double())
        low, high = evaluation._intervals(dict.fromkeys(names, size) | {"active": total})["l0"]
        held += low <= 3 <= high
    assert 0.91 <= held / 400 <= 0.985


def test_intervals_are_about_the_figures_and_narrow_with_more_text() -> None:
    hm, sae = manager("Llama"), random_table(40)
    few, many = (evaluate_dictionary(hm, sae, source(texts(n), rows=16), EMBEDDED) for n in (40, 400))
    for name, (low, high) in many.intervals.items():
        assert low <= getattr(many, name) <= high, name
        # Ten times the text: about a third of the width, but for ratios of differences, which few rows say little of.
        if "recovered" not in name and "score" not in name:
            assert high - low < 0.5 * (few.intervals[name][1] - few.intervals[name][0]), name
    assert many.n_rows == sum(int((b.mask & ~b.special).any(1).sum()) for b in source(texts(400)).blocks())
    one = evaluate_dictionary(hm, sae, source(texts(1)), EMBEDDED)
    assert one.n_rows == 1 and math.isnan(one.intervals["l0"][0])
    assert one.scalars()["intervals"]["l0"] == [None, None] and "±" not in one.summary()


def test_l0_is_counted_with_and_without_special_tokens() -> None:
    table = torch.zeros(VOCAB, 10)
    table[1:, :2], table[0] = 1.0, 1.0
    given = ["w1 w2 w3", "w4"]
    found = evaluate_dictionary(manager("Llama"), TableSAE(table), source(given, packing="one_doc"), EMBEDDED)
    assert found.n_tokens == 4 and found.l0 == 2
    assert found.l0_with_special == pytest.approx((4 * 2 + 2 * 10) / 6)
    assert found.density.tolist() == [1.0] * 2 + [0.0] * 8 and found.dead == pytest.approx(0.8)


def counted(tokens: TokenSource, site: str) -> Tensor:
    hm = manager("Llama")
    kept = [hm.run(b.inputs, read=[site])[site][b.mask & ~b.special] for b in tokens.blocks()]
    return torch.cat(kept).double()


def test_the_pca_is_that_of_a_singular_value_decomposition() -> None:
    tokens = source(texts(80))
    x = counted(tokens, "1.resid_post")
    pca = fit_pca(manager("Llama"), tokens, "1.resid_post", rank=5)
    _, values, rows = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    torch.testing.assert_close(pca.variances.double(), values.pow(2) / len(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((pca.components.double() @ rows[:5].T).abs(), torch.eye(5).double(), rtol=0, atol=1e-3)
    torch.testing.assert_close(pca.mean.double(), x.mean(0), rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="expected 1 … 32"):
        fit_pca(manager("Llama"), tokens, "1.resid_post", rank=33)


@pytest.mark.filterwarnings("ignore:Splice at .* changed nothing")
def test_the_pca_is_measured_on_the_same_tokens_and_misses_what_its_variances_say() -> None:
    hm, tokens, site = manager("Llama"), source(texts(40)), "0.resid_pre"
    sae = random_table(40)
    figures = {}
    for rank in (4, 20, 32):
        pca = fit_pca(hm, tokens, site, rank=rank)
        found = figures[rank] = evaluate_dictionary(hm, sae, tokens, site, pca=pca)
        assert found.pca_rank == rank
        # Fitted and measured on the same text, FVU is the share of the variances that are left over.
        left = float(pca.variances[rank:].double().sum() / pca.variances.double().sum())
        assert found.pca_fvu == pytest.approx(left, abs=1e-5)
    assert figures[32].pca_ce_recovered == pytest.approx(1, abs=1e-4)
    plain = evaluate_dictionary(hm, sae, tokens, site)
    assert plain.pca_fvu is None and plain.fvu == figures[4].fvu and plain.ce_recovered == figures[4].ce_recovered
    assert "PCA of rank 20" in figures[20].summary() and "PCA" not in plain.summary()
    assert len(figures[20].plot().data[0].y) == 5 and len(plain.plot().data[0].y) == 4
    frame = figures[20].to_frame().set_index("figure")
    assert frame.loc["pca_fvu", "value"] == figures[20].pca_fvu
    assert frame.loc["fvu", "low"] == figures[20].intervals["fvu"][0]
    assert "pca_fvu" not in set(plain.to_frame()["figure"])
