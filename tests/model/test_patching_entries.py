"""Single entries of patterns and scores: every cell is an edit made by hand, whatever the padding."""

import pytest
import torch
from torch import Tensor

from interp.core.errors import DataError, SiteError
from interp.core.intervention import Edit
from interp.core.result import Result
from interp.core.where import Where
from interp.data.pairs import PromptPairs
from interp.patching.activation import activation_patch
from interp.patching.options import PatchOptions
from interp.patching.result import PatchResult
from tests.families import manager
from tests.model.test_patching import close, ragged


def by_hand(pairs: PromptPairs, name: str, entry: tuple[int, int], head: int | None, site: str, side: str) -> Tensor:
    """The logit difference with one entry, counted in tokens, put in with a plain edit."""
    hm, (dest, src) = manager(name), entry
    tokens = pairs.tokens(hm, side=side)
    there = hm.run(tokens.clean, read=[site])[site]
    first = tokens.clean.mask.int().argmax(1)

    def put(x: Tensor) -> Tensor:
        out = x.clone()
        for row, start in enumerate(first.tolist()):
            heads = slice(None) if head is None else head
            out[row, heads, start + dest, start + src] = there[row, heads, start + dest, start + src]
        return out

    return tokens.logit_diff(hm.run(tokens.corrupted, write=[Edit(site, put, where=Where(pos=dest))], logits="last"))


@pytest.mark.parametrize("name", ["GPT2", "Gemma2", "Llama"])
@pytest.mark.parametrize("site", ["1.pattern", "0.attn_scores"])
def test_an_entry_of_one_head_is_the_edit_made_by_hand(name: str, site: str) -> None:
    hm, pairs = manager(name), ragged()
    found = activation_patch(hm, pairs.tokens(hm), sites=[site], options=PatchOptions(by="dest_src_head"))
    n = hm.n_heads
    assert found.axis == "dest, src, head" and found.heads == n and len(found.keys) == 6
    grid = found.patched.unflatten(1, (6, 6, n))[0]
    for dest, src, head in ((3, 1, 1), (3, 3, n - 1), (3, 0, 0)):
        close(grid[dest, src, head], by_hand(pairs, name, (dest, src), head, site, "right"))
    assert float((grid[3] - found.corrupted).abs().max()) > 1e-3
    later = torch.triu(torch.ones(6, 6, dtype=torch.bool), 1)
    still = found.unchanged.unflatten(1, (6, 6, n))[0]
    assert bool(still[later].all()) and torch.equal(
        found.effect[found.unchanged], torch.zeros_like(found.effect[found.unchanged])
    )
    assert not bool(still[3, :4].all())


@pytest.mark.parametrize("side", ["left", "right"])
def test_all_heads_together_whatever_the_padding(side: str) -> None:
    hm, pairs = manager("Qwen2"), ragged()
    options = PatchOptions(by="dest_src")
    found = activation_patch(hm, pairs.tokens(hm, side=side), sites=["1.pattern"], pos=[2, 3], options=options)
    assert found.axis == "dest, src" and found.patched.shape == (1, 12, 4)
    close(found.patched[0, 6 + 1], by_hand(pairs, "Qwen2", (3, 1), None, "1.pattern", side))
    naive = PatchOptions(by="dest_src", engine="naive")
    slow = activation_patch(hm, pairs.tokens(hm, side=side), sites=["1.pattern"], pos=[2, 3], options=naive)
    close(found.patched, slow.patched)
    assert bool(found.unchanged[0, 3:6].all()), "the third token sees no later ones"
    assert float(found.effect[0, :9].abs().max()) > 1e-4


def test_sides_padded_apart_are_aligned_by_token() -> None:
    hm, pairs = manager("Llama"), ragged()
    left, right = pairs.tokens(hm, side="left"), pairs.tokens(hm)
    options = PatchOptions(by="dest_src")
    mixed = activation_patch(
        hm, left.clean, right.corrupted, metric=right.metric(), sites=["1.pattern"], options=options
    )
    close(mixed.patched, activation_patch(hm, right, sites=["1.pattern"], options=options).patched)
    heads = PatchOptions(by="head")
    mixed = activation_patch(hm, left.clean, right.corrupted, metric=right.metric(), sites=["1.pattern"], options=heads)
    close(mixed.patched, activation_patch(hm, right, sites=["1.pattern"], options=heads).patched)


def test_zero_of_an_entry_is_noising_and_the_maps_survive_saving(tmp_path: object) -> None:
    hm, pairs = manager("GPT2"), ragged()
    found = activation_patch(
        hm,
        pairs,
        sites="pattern",
        metric=["logit_diff", "kl"],
        options=PatchOptions(by="dest_src_head", ablation="zero"),
    )
    tokens = pairs.tokens(hm)

    def put(x: Tensor) -> Tensor:
        out = x.clone()
        out[:, 2, 3, 0] = 0
        return out

    run = hm.run(tokens.clean, write=[Edit("1.pattern", put, where=Where(pos=3))], logits="last")
    n = hm.n_heads
    close(found["logit_diff"].patched[1, (3 * 6 + 0) * n + 2], tokens.logit_diff(run))
    loaded = Result.load(found.save(f"{tmp_path}/r"))
    assert isinstance(loaded, PatchResult) and loaded.keys == found.keys and loaded.to_frame().equals(found.to_frame())
    assert "dest_src_head" in loaded.to_frame().columns
    figure = found.plot()
    assert len(figure.data) == 6 and len(figure.data[0].z) == len(figure.data[0].z[0]) == 6
    assert "of 12 with the strongest entry" in figure.layout.title.text or hm.n_layers * n == 6
    one = found.plot(site="1.pattern")
    assert {a.text.split()[0] for a in one.layout.annotations} == {"1.pattern"}
    values = found._first.normalized() if found.gap_is_clear else found["logit_diff"].effect.mean(-1)
    panel = [a.text for a in one.layout.annotations].index("1.pattern 2")
    drawn = torch.tensor(one.data[panel].z)
    close(drawn, values[1].unflatten(0, (6, 6, n))[:, :, 2])


@pytest.mark.usefixtures("unchecked")
def test_what_entries_cannot_be_of_is_refused() -> None:
    hm, pairs = manager("GPT2"), ragged()
    with pytest.raises(SiteError, match=r"0\.z has axes .*use it at pattern or attn_scores"):
        activation_patch(hm, pairs, sites="z", options=PatchOptions(by="dest_src"))
    with pytest.raises(DataError, match="puts it on masked tokens"):
        activation_patch(hm, pairs, sites="attn_scores", options=PatchOptions(ablation="zero"))
    uneven = PromptPairs.make(["w1 {x:w5 w6} w7"], ["w2 w3 {x:w8 w9} w7 w7"], [" w10"], [" w11"], marked=True)
    with pytest.raises(DataError, match=r"differ in length \(6 and 4 tokens\)"):
        activation_patch(hm, uneven, sites=["1.pattern"], options=PatchOptions(by="span", spans=["x"]))
