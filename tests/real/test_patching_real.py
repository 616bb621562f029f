"""Patching, attribution and circuits on real models whose tasks are known: where answers are made, and controls."""

import itertools
from functools import cache

import pytest
import torch
from torch import Tensor

import interp
from interp.data.pair_tokens import PairTokens
from interp.data.pairs import PromptPairs
from interp.patching import (
    Circuit,
    Graph,
    PatchOptions,
    attribute,
    circuit_curve,
    edge_attribution,
    evaluate_circuits,
    top_edges,
)
from interp.testbed.nano import from_transformer_lens
from tests import source

MODELS = source.REPO.parent / "shared" / "real" / "models"
P = 113
pytestmark = pytest.mark.usefixtures("unchecked")


@cache
def stories() -> interp.HookManager:
    return interp.HookManager.load(str(MODELS / "stories260K"))


def pronouns(endings: list[str]) -> PromptPairs:
    """She after Lily, He after Tim: the two names are one token each."""
    lily, tim = ([f"{{name:{name}}}{end}" for end in endings] for name in ("Lily", "Tim"))
    n = len(endings)
    answers = [" She"] * n + [" He"] * n
    meta = [{"template": end} for end in endings * 2]
    foils = answers[n:] + answers[:n]
    return PromptPairs.make(lily + tim, tim + lily, answers, foils, marked=True, meta=meta, name="pronoun")


SEEN = [" went to the park.", " was very happy.", " played with a ball.", " had a big dog."]
HELD_OUT = [" saw a little cat.", " loved to play.", " found a toy.", " wanted to go home."]
NOUNS = ["ball", "cat", "dog", "toy", "hat", "bear"]  # two tokens each, which begin with different ones
COPYING = [
    "Tom had a big {noun:N}. He liked to play with the",
    "Lily saw a {noun:N} in the park. She wanted to touch the",
    "One day, there was a {noun:N}. Tim was happy to see the",
    "Lily had a {noun:N}. She loved her",
]


def copying(templates: list[str]) -> PromptPairs:
    """The noun that was named before, against the next one of the list."""
    rows = [(t, a, NOUNS[(i + 1) % len(NOUNS)]) for t in templates for i, a in enumerate(NOUNS)]
    clean, corrupted = ([t.replace("N}", f"{row[side]}}}") for t, *row in rows] for side in (0, 1))
    meta = [{"template": t} for t, *_ in rows]
    answers, foils = [f" {a}" for _, a, _ in rows], [f" {b}" for *_, b in rows]
    return PromptPairs.make(clean, corrupted, answers, foils, marked=True, meta=meta, name="copying")


def by_head(pairs: PromptPairs, options: PatchOptions | None = None) -> Tensor:
    return interp.activation_patch(stories(), pairs, sites="z", options=options, progress=False).normalized()


def strongest(share: Tensor, n: int) -> set[tuple[int, int]]:
    return {divmod(i, share.shape[1]) for i in share.abs().flatten().topk(n).indices.tolist()}


@pytest.mark.parametrize(
    ("seen", "held_out", "heads"),
    [
        (pronouns(SEEN), pronouns(HELD_OUT), {(4, 2), (2, 6)}),
        (copying(COPYING[:2]), copying(COPYING[2:]), {(4, 4)}),
    ],
    ids=["pronoun", "copying"],
)
def test_heads_found_on_some_prompts_are_needed_on_others_and_their_neighbours_are_not(
    seen: PromptPairs, held_out: PromptPairs, heads: set[tuple[int, int]]
) -> None:
    hm = stories()
    assert interp.pair_accuracy(hm, held_out).estimate("accuracy").mean > 0.95
    assert strongest(by_head(seen), len(heads)) == heads
    # Confirmed by another edit, on prompts with other words: the mean over prompts of the same form.
    lost = by_head(held_out, PatchOptions(ablation="mean"))
    found = torch.tensor([float(lost[layer, head]) for layer, head in heads])
    others = [lost[layer, h] for layer, head in heads for h in range(hm.n_heads) if (layer, h) not in heads]
    assert float(found.abs().min()) > 2.5 * float(torch.stack(others).abs().median()) + 0.05
    assert float(found.abs().min()) > float(torch.stack(others).abs().mean())


@pytest.mark.parametrize(
    ("pairs", "span"), [(pronouns(SEEN), "name"), (copying(COPYING), "noun")], ids=["name", "noun"]
)
def test_the_word_is_carried_at_its_own_place_until_the_last_blocks(pairs: PromptPairs, span: str) -> None:
    found = interp.activation_patch(
        stories(), pairs, sites="resid_pre", options=PatchOptions(by="span"), progress=False
    )
    share = found.normalized()
    at, end = found.columns.index(span), found.columns.index("end")
    assert float(share[:3, at].min()) > 0.9 and float(share[:2, end].abs().max()) < 0.05


def test_estimates_go_with_exact_effects_under_every_rule() -> None:
    pairs = pronouns(SEEN)
    exact = interp.activation_patch(stories(), pairs, sites="z", progress=False)
    found = {rule: attribute(stories(), pairs, rule=rule).agreement(exact)[0] for rule in ("plain", "gim", "relp")}
    assert min(found.values()) > 0.8, found


@cache
def adder() -> interp.HookManager:
    return interp.HookManager.load(from_transformer_lens(MODELS / "toy-modadd-rib0"))


def sums(n: int, seed: int) -> PairTokens:
    """a + b =, against another a."""
    g = torch.Generator().manual_seed(seed)
    a, b, shift = (torch.randint(int(low), P, (n,), generator=g) for low in (0, 0, 1))
    c, equals = (a + shift) % P, torch.full((n,), P)
    clean, corrupted = (torch.stack([x, b, equals], 1) for x in (a, c))
    return PairTokens.of_ids(clean, corrupted, (a + b) % P, (c + b) % P)


def test_the_adder_reads_its_numbers_by_all_heads_and_adds_them_in_the_mlp() -> None:
    hm, pairs = adder(), sums(64, 0)
    places = interp.activation_patch(hm, pairs, sites="mlp_out", progress=False).normalized()[0]
    assert float(places[2]) > 0.9 and float(places[:2].abs().max()) == 0.0
    scores = edge_attribution(hm, sums(64, 1), path="inputs_ig")
    graph = scores.graph
    known = ["m0->logits", *(f"{a}->{b}" for h in range(4) for a, b in [(f"a0.h{h}", "m0"), ("input", f"a0.h{h}<v>")])]
    known += [f"input->a0.h{h}<k>" for h in range(4)]
    # What the equals sign is stays the same, so queries carry nothing; and heads do not speak to the logits.
    circuit = Circuit(graph, graph.mask(known))
    random = [top_edges(graph, torch.rand_like(scores.scores), len(known), prune=False) for _ in range(5)]
    found = evaluate_circuits(hm, pairs, [circuit, *random], progress=False).faithfulness
    assert float(found[0]) > 0.9 and float(found[1:].max()) < 0.75
    chosen = top_edges(graph, scores.scores, len(known))
    assert len(set(chosen.names()) & set(known)) >= len(known) - 2


@cache
def sorter() -> interp.HookManager:
    return interp.HookManager.load(str(MODELS / "toy-gptnano-sort"))


def lists(n: int, seed: int, *, at: int = 3) -> PairTokens:
    """Six letters and the first sorted ones, against others whose sorted list goes on in another way."""
    g = torch.Generator().manual_seed(seed)
    given = torch.tensor(list(itertools.product(range(3), repeat=6)))
    right = given.sort(1).values
    rows: list[tuple[int, int]] = []
    for i in torch.randperm(len(given), generator=g).tolist():
        fits = (right[:, :at] == right[i, :at]).all(1) & (right[:, at] != right[i, at])
        if bool(fits.any()) and len(rows) < n:
            options = fits.nonzero()[:, 0]
            rows.append((i, int(options[torch.randint(len(options), (1,), generator=g)])))
    a, b = (torch.tensor(column) for column in zip(*rows, strict=True))
    clean, corrupted = (torch.cat([given[x], right[x, :at]], 1) for x in (a, b))
    return PairTokens.of_ids(clean, corrupted, right[a, at], right[b, at])


def test_half_of_the_sorters_edges_sort_and_a_random_half_does_not() -> None:
    hm = sorter()
    scores = edge_attribution(hm, lists(48, 0), path="inputs_ig")
    graph = Graph.of(hm)
    judged = lists(48, 1)
    curve = circuit_curve(hm, judged, scores.scores, n_random=3)
    areas = curve.areas()
    assert curve.smallest() <= 0.5
    half = top_edges(graph, scores.scores, graph.n_edges // 2)
    random = top_edges(graph, torch.rand_like(scores.scores), graph.n_edges // 2)
    found = evaluate_circuits(hm, judged, [half, random], progress=False).faithfulness
    assert float(found[0]) > 0.95 and float(found[1]) < 0.6, areas
    # The counts of letters come in as values at the letters, and the last MLP writes the answer.
    assert {name for name, _ in scores.top(6)} >= {"m2->logits", "input->a0.h0<v>", "input->a0.h1<v>"}
