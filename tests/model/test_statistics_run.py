"""Statistics of a model's activations: against plain forwards, whatever the padding, the packing and the blocks."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import interp
from interp.core.errors import ConfigError, DataError, SiteError
from interp.data.statistics import CLASSES, ActivationStatistics, activation_statistics
from interp.data.tokens import Cursor, Packing, TokenBlock, TokenSource
from interp.testbed.text import Text
from tests.families import make, word_tokenizer

DELIMITERS = [5, 6, 7]
SITE = "1.resid_post"


@pytest.fixture(scope="module")
def hm() -> interp.HookManager:
    """A tiny random Llama in fp64, so that padding and batching change nothing that is looked at."""
    return interp.HookManager.load(make("Llama").double(), word_tokenizer())


@pytest.fixture(scope="module")
def testbed() -> interp.HookManager:
    return interp.HookManager.load("testbed", dtype=torch.float64)


def texts(n: int = 20) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(3, 14, (n,), generator=generator).tolist()
    return [" ".join(f"w{i}" for i in torch.randint(1, 30, (size,), generator=generator).tolist()) for size in sizes]


def source(**options: Any) -> TokenSource:
    settings = {"ctx": 16, "rows": 4, "bos": True, "packing": "one_doc", **options}
    return TokenSource(texts(), word_tokenizer(), **settings)


class LeftPadded(TokenSource):
    """The same rows with their pads in front."""

    def blocks(self, cursor: Cursor | None = None) -> Iterator[TokenBlock]:
        for block in super().blocks(cursor):
            shifts = (~block.mask).sum(1).tolist()

            def moved(values: Tensor, shifts: list[int] = shifts) -> Tensor:
                return torch.stack([row.roll(n) for row, n in zip(values, shifts, strict=True)])

            ids, mask, special = moved(block.ids), moved(block.mask), moved(block.special)
            yield replace(block, ids=ids, mask=mask, special=special, doc=moved(block.doc), pos=moved(block.pos))


def by_hand(model: Any) -> tuple[Tensor, Tensor, list[tuple[int, int, int]]]:
    """Activations of every token of every document alone, its class, and its place: by a hook of our own."""
    kept: list[Tensor] = []
    layer = model.model.layers[1]
    handle = layer.register_forward_hook(lambda _m, _a, out: kept.append(out[0] if isinstance(out, tuple) else out))
    classes, places = [], []
    for doc, text in enumerate(texts()):
        ids = [0, *(int(word[1:]) for word in text.split())]
        with torch.no_grad():
            model(torch.tensor([ids]), use_cache=False)
        classes += [0 if i == 0 else 1 if i in DELIMITERS else 2 for i in ids]
        places += [(doc, pos, i) for pos, i in enumerate(ids, -1)]
    handle.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in kept]), torch.tensor(classes), places


def same(a: ActivationStatistics, b: ActivationStatistics, tolerance: float = 1e-10) -> None:
    assert a.sites == b.sites and a.n_tokens == b.n_tokens
    for site in a.sites:
        for name in (*CLASSES, "text", "all"):
            one, other = a[site].of(name), b[site].of(name)
            assert torch.equal(one.n, other.n) and torch.equal(one.n_bad, other.n_bad)
            for figure in ("mean", "variance", "skewness", "kurtosis", "largest", "top"):
                values = getattr(one, figure)
                torch.testing.assert_close(
                    getattr(other, figure), values, rtol=tolerance, atol=tolerance * 10, equal_nan=True
                )
            for q in (0.01, 0.5, 0.99):
                assert torch.equal(one.quantile(q).nan_to_num(9e9), other.quantile(q).nan_to_num(9e9))


# -- which tokens count, and as what ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TokenSource, LeftPadded])
def test_every_token_is_counted_in_its_class_and_pads_never(hm: interp.HookManager, kind: type[TokenSource]) -> None:
    tokens = kind(texts(), word_tokenizer(), ctx=16, rows=4, bos=True, packing="one_doc")
    assert any(bool((~block.mask).any()) for block in tokens.blocks())
    stats = activation_statistics(hm, tokens, SITE, delimiters=DELIMITERS, covariance=True)
    x, classes, places = by_hand(hm.model)
    assert stats.n_tokens == tuple(classes.bincount(minlength=3).tolist()) and stats.delimiters == (5, 6, 7)
    for name, chosen in {"special": [0], "delimiter": [1], "other": [2], "text": [1, 2], "all": [0, 1, 2]}.items():
        found, rows = stats[SITE].of(name), torch.isin(classes, torch.tensor(chosen)).nonzero().flatten()
        mine = x[rows]
        torch.testing.assert_close(found.mean, mine.mean(0), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found.covariance, torch.cov(mine.T), rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(found.largest.abs(), mine.abs().amax(0), rtol=1e-10, atol=0)
        if name != "special":  # every BOS gives the same but for rounding
            where = [places[int(rows[i])] for i in mine.abs().argmax(0)]
            assert found.largest_at.tolist() == [list(place) for place in where]
            flat = int(mine.abs().argmax())
            assert found.top_at[0].tolist() == [*places[int(rows[flat // mine.shape[1]])], flat % mine.shape[1]]


@pytest.mark.parametrize("packing", ["concat", "block_diagonal", "one_doc"])
@pytest.mark.parametrize("bos", [True, False])
def test_packed_rows_are_counted_token_by_token(hm: interp.HookManager, packing: Packing, bos: bool) -> None:
    tokens, expected, total = source(packing=packing, bos=bos), dict.fromkeys(CLASSES, 0), torch.zeros(1)
    for block in tokens.blocks():
        x = hm.run(block.inputs, read=[SITE], logits="none")[SITE]
        for row in range(len(block.ids)):
            for pos in range(block.ids.shape[1]):
                if block.mask[row, pos]:
                    i = int(block.ids[row, pos])
                    expected["special" if i == 0 else "delimiter" if i in DELIMITERS else "other"] += 1
                    total = total + (x[row, pos] if i != 0 else 0)
    stats = activation_statistics(hm, tokens, SITE, delimiters=DELIMITERS)
    assert stats.n_tokens == tuple(expected.values())
    words = sum(len(text.split()) for text in texts())
    assert expected["delimiter"] + expected["other"] == words and (bos or packing == "one_doc" or expected["special"])
    torch.testing.assert_close(stats[SITE].mean, total / words, rtol=1e-10, atol=1e-10)
    assert set(stats[SITE].largest_at[:, 0].tolist()) <= set(range(20))


def test_without_delimiters_in_the_vocabulary_that_class_is_empty(hm: interp.HookManager) -> None:
    stats = activation_statistics(hm, source(), [SITE])
    assert stats.delimiters == () and stats.n_tokens[1] == 0
    nothing = stats[SITE].of("delimiter")
    assert bool(nothing.mean.isnan().all()) and len(nothing.top) == 0 and not nothing.n.any()
    torch.testing.assert_close(stats[SITE].mean, stats[SITE].of("other").mean, rtol=0, atol=0)
    assert "delimiter: " not in stats.summary() and len(stats.to_frame()) == 3 * hm.d_model


def test_sites_with_heads_are_flattened_and_globs_give_every_layer(hm: interp.HookManager) -> None:
    stats = activation_statistics(hm, source(), ["*.z", SITE, "1.z"], delimiters=[])
    assert stats.sites == (*(f"{layer}.z" for layer in range(hm.n_layers)), SITE)
    found = stats["z", 1].of("all")
    assert found.shape == (hm.n_heads, hm.d_head) and stats[SITE].shape == (hm.d_model,)
    blocks = list(source().blocks())
    z = torch.cat([hm.run(block.inputs, read=["1.z"])["1.z"][block.mask] for block in blocks])
    torch.testing.assert_close(found.mean.view(found.shape), z.mean(0), rtol=1e-10, atol=1e-12)


# -- on the testbed ---------------------------------------------------------------------------------------------------


def world(hm: interp.HookManager, *, rows: int, n: int = 40) -> TokenSource:
    given = [document.text for document in Text(seed=1).documents(n)]
    return TokenSource(given, hm.tokenizer, ctx=48, rows=rows, packing="concat")


def test_the_size_of_blocks_changes_nothing(testbed: interp.HookManager) -> None:
    few, many = (
        activation_statistics(testbed, world(testbed, rows=rows), ["*.resid_post", "2.z", "1.mlp_post"])
        for rows in (4, 16)
    )
    same(few, many)
    assert min(few.n_tokens) > 20


def test_the_largest_activations_are_found_again_where_they_are_said_to_be(testbed: interp.HookManager) -> None:
    given = [document.text for document in Text(seed=1).documents(40) if len(document.ids()) < 120]
    tokens = TokenSource(given, testbed.tokenizer, ctx=128, rows=8, packing="one_doc")
    stats = activation_statistics(testbed, tokens, "3.resid_post")
    found = stats["3.resid_post"]
    for value, (doc, pos, token, dim) in zip(found.top.tolist(), found.top_at.tolist(), strict=True):
        one = testbed.run(testbed.to_tokens(given[doc], bos=True), read=["3.resid_post"])
        assert one.tokens is not None and int(one.tokens[0, pos + 1]) == token
        assert float(one["3.resid_post"][0, pos + 1, dim]) == pytest.approx(value, rel=1e-9)
    x = testbed.run(testbed.to_tokens(given[3], bos=True), read=["3.resid_post"])["3.resid_post"]
    assert float(x[0, 1:].abs().max()) <= abs(float(found.top[0])) * (1 + 1e-9)


def test_delimiters_of_the_small_world_are_its_punctuation(testbed: interp.HookManager) -> None:
    stats = activation_statistics(testbed, world(testbed, rows=8, n=5), "0.resid_pre")
    said = {testbed.tokenizer.decode([i]).strip(" ") for i in stats.delimiters}
    assert {".", ",", "?", "!", "\n"} <= said <= {".", ",", ";", ":", "!", "?", "\n"}
    ids = torch.cat([block.ids[block.mask & ~block.special] for block in world(testbed, rows=8, n=5).blocks()])
    assert stats.n_tokens[1] == int(torch.isin(ids, torch.tensor(stats.delimiters)).sum()) > 0


# -- how much, and bad calls ------------------------------------------------------------------------------------------


def test_whole_blocks_are_run_until_there_are_enough_tokens(hm: interp.HookManager) -> None:
    first, second = (int(block.mask.sum()) for _, block in zip(range(2), source().blocks(), strict=False))
    for max_tokens, expected in ((1, first), (64, first), (65, first + second)):
        assert sum(activation_statistics(hm, source(), SITE, max_tokens=max_tokens).n_tokens) == expected


def test_it_stops_when_it_is_asked_to(hm: interp.HookManager) -> None:
    asked = iter([False, False, True])
    with pytest.raises(KeyboardInterrupt):
        activation_statistics(hm, source(), SITE, should_stop=lambda: next(asked))
    assert next(asked, None) is None


@pytest.mark.parametrize(
    ("sites", "options", "error", "says"),
    [
        ([], {}, ConfigError, "at least one"),
        ("1.pattern", {}, ConfigError, "whole sites"),
        (interp.Site(SITE).at(pos=-1), {}, ConfigError, "whole sites"),
        (SITE, {"max_tokens": 0}, ConfigError, "max_tokens=0"),
        ("9.resid_post", {}, SiteError, "9"),
        ("1.resid_pots", {}, SiteError, "resid_post"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(
    hm: interp.HookManager, sites: Any, options: dict[str, int], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        activation_statistics(hm, source(), sites, should_stop=lambda: pytest.fail("it ran"), **options)  # type: ignore[arg-type]


def test_text_without_tokens_is_an_error(hm: interp.HookManager) -> None:
    with pytest.raises(DataError, match="no tokens"):
        activation_statistics(hm, TokenSource([""], word_tokenizer(), ctx=8, bos=True), SITE)


def test_the_record_says_what_was_measured_and_comes_back_from_disk(hm: interp.HookManager, tmp_path: Any) -> None:
    stats = activation_statistics(hm, source(), [SITE, "0.z"], covariance=True, delimiters=DELIMITERS)
    settings = stats.provenance.settings
    assert settings["sites"] == ["blocks.1.hook_resid_post", "blocks.0.attn.hook_z"] and settings["covariance"] is True
    assert settings["text"]["packing"] == "one_doc"
    again = ActivationStatistics.load(stats.save(tmp_path / "stats"))
    same(stats, again, tolerance=0)
    assert torch.equal(again[SITE].covariance, stats[SITE].covariance) and not math.isnan(float(again[SITE].mean[0]))
