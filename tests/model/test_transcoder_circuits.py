"""Transcoder circuits against planted weights, against autograd through the model itself, and as exact sums."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from interp.core.errors import ConfigError, DataError, ModelError, ShapeError, WhereError
from interp.core.intervention import Edit, FreezePattern, FreezeScale
from interp.core.manager import HookManager
from interp.core.result import Result
from interp.core.run import Run
from interp.core.site import Site
from interp.core.text import Tokens
from interp.dictionaries.base import Transcoder
from interp.patching.features.freeze import freeze
from interp.patching.features.frozen import FrozenModel
from interp.patching.features.invariant import connections, de_embedding, mean_activation
from interp.patching.features.pullback import bias_of, parts_of, pullback, reader_of
from interp.patching.features.sources import KINDS, Sources, contributions
from interp.patching.features.transcoder_circuits import attribution_of, pre_activation_attribution
from interp.patching.features.transcoder_paths import PathTree, find_paths, paths_of
from interp.testbed.nano import NanoOptions, nano
from tests.families import FAMILIES, LENGTH, manager, paddings, tokens
from tests.transcoders import WIDTH, WORDS, given, mixed, placed, planted, random_transcoder

# Learned positions; rotary and grouped queries; post-norms; parallel blocks; one norm for both; multipliers.
SOME = ("GPT2", "Llama", "Gemma2", "GPTNeoX", "Cohere", "Granite", "Olmo2")
some_families = pytest.mark.parametrize("name", SOME)
# Windows, sinks, norms of queries and keys, softmax inside of the module; the rest, in the long run, adds nothing new.
QUICK = (*SOME, "GPTNeo", "OPT", "Bloom", "Qwen3", "Gemma3", "GptOss", "Mixtral")
every_family = pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
POS = LENGTH - 3


@cache
def frozen(name: str) -> FrozenModel:
    """A prompt of one family, with transcoders at every layer but the second of three."""
    hm = manager(name)
    return freeze(hm, mixed(hm, but=(1,) if hm.n_layers > 2 else ()), tokens(1))


def active(given: FrozenModel, pos: int = POS) -> tuple[int, int, int]:
    """A latent of the last layer that is active at a position."""
    layer = max(given.transcoders)
    held = given.transcoders[layer]
    return layer, int(held.latent[held.at(pos)][2]), pos


def off(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max()) if a.shape == b.shape else float("inf")


# -- exact sums -----------------------------------------------------------------------------------------------------


@every_family
def test_all_sources_and_the_constant_sum_to_every_pre_activation(name: str) -> None:
    model = frozen(name)
    for layer, held in model.transcoders.items():
        some = torch.arange(0, len(held.pos), 7)
        pos, latent = held.pos[some], held.latent[some]
        seeds = model.seed(torch.full_like(pos, model.mlp_time(layer)), pos, held.reads(latent, pos))
        found = contributions(model, seeds)
        sources = Sources.of(model)
        assert found.shape == (len(some), len(sources))
        assert off(found.sum(1) + held.constants(latent), held.value[some]) < 1e-4
        # Nothing comes from what is written later, or further right.
        late = (sources.layer[None] >= layer) & ~(sources.kind == KINDS.index("attn_bias"))
        assert not found[late.expand_as(found)].any()
        assert not found[sources.pos[None] > pos[:, None]].any()


@some_families
def test_heads_and_direct_ways_sum_too_and_each_head_is_its_own(name: str) -> None:
    found = attribution_of(frozen(name), active(frozen(name)))
    pre = torch.tensor(found.pre_activation)
    assert off(found.total.sum() + found.constant, pre) < 1e-4
    assert off(found.direct.sum() + found.by_head.sum() + found.constant, pre) < 1e-4
    assert found.activation == pytest.approx(found.pre_activation, abs=1e-4) and found.activation > 0
    # One head alone, by a second way: all sources with that head open, less those with none.
    model = frozen(name)
    layer, latent, pos = found.target
    at, which = torch.tensor([pos]), torch.tensor([latent])
    seeds = model.seed(torch.tensor([model.mlp_time(layer)]), at, model.transcoders[layer].reads(which, at))
    for number, (block, head) in enumerate(found.heads):
        open_one = torch.nn.functional.one_hot(torch.tensor(head), model.hm.n_heads).float()
        alone = contributions(model, seeds, {block: open_one})[0] - contributions(model, seeds, {})[0]
        assert off(alone, found.through[number]) < 1e-5
    assert found.through.abs().max() > 1e-3


# -- an independent oracle: autograd through the model itself ---------------------------------------------------------


@some_families
@pytest.mark.filterwarnings("ignore:.*changed nothing")  # a detached value is the value it was
def test_what_is_read_of_each_write_is_autograd_through_the_frozen_model(name: str) -> None:
    hm = manager(name)
    last = hm.n_layers - 1
    # Only the last is a transcoder, so that every earlier MLP is a constant for both.
    held = {last: random_transcoder(hm, last)}
    model = freeze(hm, held, tokens(1))
    layer, latent, pos = active(model)
    place = Site(str(held[layer].cfg.metadata["hook_name"]))

    def pre(out: Run) -> Tensor:
        return (held[layer].seen(out[place]) @ held[layer].W_enc)[:, pos, latent]

    kinds = ["mlp_out", "attn_out"] if not hm.map.parallel else ["mlp_out"]
    reads = [Site(f"{i}.{kind}") for i in range(last) for kind in kinds]
    stop = [Edit(f"{i}.mlp_out", lambda x: x.detach()) for i in range(last)]
    out = hm.run(
        tokens(1),
        read=[place, "0.resid_pre", *reads],
        write=[FreezePattern(), FreezeScale(), *stop],
        grad=pre,
        logits="none",
    )
    at, which = torch.tensor([pos]), torch.tensor([latent])
    seeds = model.seed(torch.tensor([model.mlp_time(layer)]), at, model.transcoders[layer].reads(which, at))
    ours = {(part, block): g[0] for part, block, g in model.walk(seeds)}
    size = float(out.grad["0.resid_pre"].abs().max())
    assert size > 1e-2
    assert off(ours["embed", 0], out.grad["0.resid_pre"][0]) < 1e-4 * size
    for site in reads:
        kind = str(site.kind).removesuffix("_out")
        assert off(ours[kind, int(site.layer or 0)], out.grad[site][0]) < 1e-4 * size


@some_families
def test_a_write_that_is_pushed_a_little_moves_the_pre_activation_by_what_is_said(name: str) -> None:
    """Finite differences of the frozen model run forwards, skip transcoders included."""
    model = frozen(name)
    layer, latent, pos = active(model)
    held, at, which = model.transcoders[layer], torch.tensor([pos]), torch.tensor([latent])
    seeds = model.seed(torch.tensor([model.mlp_time(layer)]), at, held.reads(which, at))
    ours = {(place, block): g[0] for place, block, g in model.walk(seeds)}
    draw = torch.Generator().manual_seed(1)
    base = forward(model, {})[layer][pos]
    for place in [("embed", 0), *(("mlp", i) for i in range(layer))]:
        push = torch.randn(model.resid.shape, generator=draw) * (torch.arange(len(model.ids)) <= pos)[:, None]
        moved = forward(model, {place: push})[layer][pos]
        got = held.reads(which, at)[0] @ (moved - base)
        assert float(got) == pytest.approx(float((ours[place] * push).sum()), rel=1e-3, abs=1e-4), place


def forward(model: FrozenModel, pushes: dict[tuple[str, int], Tensor]) -> list[Tensor]:
    """The streams that MLPs read, with something added at some places: latents, errors and patterns stay."""
    stream = sum(model.embeddings.values(), start=torch.zeros_like(model.resid)) + pushes.get(("embed", 0), 0)
    read = []
    for layer in range(model.n_layers):
        attention, out = model.attention[layer], model.mlp_out[layer]
        assert attention is not None and out is not None
        added = attention.forward(stream)
        mid = stream if model.parallel else stream + added
        read.append(mid)
        held, plain = model.transcoders.get(layer), model.streams[layer][1]
        if held is not None and held.transcoder.has_skip:
            out = out + held.skip_writes(mid) - held.skip_writes(plain)
        stream = stream + added + out + pushes.get(("mlp", layer), 0)
    return read


# -- planted weights --------------------------------------------------------------------------------------------------

TEXT = torch.tensor([[3, 5, 3, 1, 6, 2]])
PLANTED_POS = 4


def test_a_planted_circuit_is_found_exactly() -> None:
    hm, held = planted()
    found = pre_activation_attribution(hm, held, TEXT, target=(1, 3, PLANTED_POS))
    # Word 3 stands at positions 0 and 2; each gives 2 / (number of positions looked at).
    share = 2 / (PLANTED_POS + 1)
    assert found.pre_activation == pytest.approx(2 * share) and found.constant == 0
    assert found.share("latent") == pytest.approx(2 * share)
    strong = found.total.abs() > 1e-6
    assert found.kind[strong].tolist() == [KINDS.index("latent")] * 2
    assert (found.layer[strong].tolist(), found.latent[strong].tolist()) == ([0, 0], [3, 3])
    assert found.pos[strong].tolist() == [0, 2] and found.total[strong].tolist() == pytest.approx([share, share])
    assert not found.direct.any()
    assert found.heads == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert off(found.through[3], found.total) < 1e-6 and not found.through[:3].any()
    # The null control: a latent that reads what was never written.
    none = pre_activation_attribution(hm, held, TEXT, target=(1, 7, PLANTED_POS))
    assert none.pre_activation == 0 and not none.total.any()


def test_its_paths_are_pulled_back_to_the_words() -> None:
    hm, held = planted()
    tree = find_paths(hm, held, TEXT, target=(1, 3, PLANTED_POS), depth=3, branches=3)
    share = 2 / (PLANTED_POS + 1)
    strong = tree.to_frame().query("abs(contribution) > 1e-6")
    assert sorted(strong["path"]) == [
        f"embed @{p} → L0 latent 3 @{p} → L1H1 @{p} → L1 latent 3 @{PLANTED_POS}" for p in (0, 2)
    ]
    assert strong["contribution"].tolist() == pytest.approx([share, share])
    assert not tree.pruned.abs().max() > 1e-6 and not tree.bias.any()
    edges = tree.edges()
    assert len(edges[edges.weight.abs() > 1e-6]) == 6


def test_weights_alone_say_which_word_a_latent_is_about_and_what_it_is_connected_to() -> None:
    hm, held = planted()
    direct = de_embedding(hm, held[0], range(WORDS), k=1)
    assert direct.raised[:, 0].tolist() == list(range(WORDS)) and direct.raised_by.tolist() == [[1.0]] * WORDS
    # Through the first MLP's place a word is on another dimension: the head reads nothing of embeddings.
    assert not de_embedding(hm, held[1], [3], through=(1, 1)).raised_by.any()
    # Latents 8 to 15 of the first write 2.5 times as much, and never fire.
    kind = {"latents": [3], "through": (1, 1), "k": 2}
    by_weight = connections(hm, held[0], held[1], **kind)  # type: ignore[arg-type]
    assert by_weight.sources[0].tolist() == [11, 3] and by_weight.weight[0].tolist() == [5.0, 2.0]
    mean = mean_activation(hm, held[0], TEXT)
    assert mean[:WORDS].tolist() == pytest.approx([n / 6 for n in (0, 1, 1, 2, 0, 1, 1, 0)]) and not mean[WORDS:].any()
    weighted = connections(hm, held[0], held[1], mean=mean, **kind)  # type: ignore[arg-type]
    assert weighted.sources[0, 0] == 3 and weighted.score[0].tolist() == pytest.approx([2 * 2 / 6, 0.0])
    assert not connections(hm, held[0], held[1], latents=[3]).weight.any()


def test_a_large_matrix_of_connections_is_ranked_as_one() -> None:
    hm = manager("Llama")
    draw = torch.Generator().manual_seed(0)
    wide = given(torch.randn(32, 9000, generator=draw), torch.randn(9000, 32, generator=draw), 0)
    last = random_transcoder(hm, 2)
    found = connections(hm, wide, last, latents=[0, 5], k=7)
    gain = hm.weights.norm_weights(2, "ln2").gain
    plain = (last.W_enc[:, [0, 5]].T * gain) @ wide.W_dec.T
    top = plain.abs().topk(7)
    assert found.sources.tolist() == top.indices.tolist() and off(found.weight, plain.gather(1, top.indices)) < 1e-4


# -- pullbacks and paths ----------------------------------------------------------------------------------------------


@some_families
def test_a_reader_is_the_sum_of_its_parts_and_pulled_back_it_reads_what_the_part_adds(name: str) -> None:
    model = frozen(name)
    layer, latent, pos = active(model)
    reader = reader_of(model, layer, latent, pos)
    parts = list(parts_of(model, reader))
    value = reader.value(model)
    assert off(sum((p.value.sum() for p in parts), start=bias_of(model, reader)), value) < 1e-4
    tried = 0
    for part in parts:
        if part.kind not in ("latent", "head", "skip"):
            continue
        best = int(part.value.abs().argmax())
        way = (part.kind, part.layer, int(part.index[best]))
        child = pullback(model, reader, through=way, pos=int(part.pos[best]))
        assert off(child.value(model), part.value[best]) < 1e-4
        tried += 1
    assert tried >= 2


@some_families
def test_every_node_of_a_tree_is_what_is_under_it(name: str) -> None:
    tree = paths_of(frozen(name), active(frozen(name)), depth=4, branches=4, width=12)
    under = torch.zeros(len(tree.parent)).index_add_(0, tree.parent[1:], tree.contribution[1:])
    short = (under + tree.pruned + tree.bias - tree.contribution)[tree.expanded]
    assert len(short) > 3 and short.abs().max() < 1e-4
    # Leaves, pruned parts and biases are the whole pre-activation.
    leaves = tree.contribution[[n for n in tree.leaves() if not bool(tree.expanded[n])]].sum()
    assert off(leaves + tree.pruned.sum() + tree.bias.sum(), tree.contribution[0]) < 1e-4


def test_with_everything_kept_nothing_is_pruned() -> None:
    tree = paths_of(frozen("Llama"), active(frozen("Llama"), 1), depth=1, branches=10_000, width=10_000)
    assert float(tree.pruned.abs().sum()) < 1e-5


# -- invariances ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["GPT2", "Llama"])
def test_pads_change_nothing(name: str) -> None:
    hm = manager(name)
    held = mixed(hm)
    for _, ids, mask in paddings(tokens(2)):
        short = ids[0][mask[0]]
        plain = freeze(hm, held, short)
        target = active(plain, 5)
        alone = attribution_of(plain, target)
        padded = pre_activation_attribution(hm, held, Tokens(ids[:1], mask[:1]), target=target)
        assert off(alone.total, padded.total) < 1e-5


@pytest.mark.parametrize("kind", ["batchtopk", "jumprelu"])
def test_other_kinds_and_sites_add_up(kind: str) -> None:
    hm = manager("GPT2")
    sites = {0: "0.ln2.normalized", 1: "1.mlp_in", 2: "2.ln2.out"}
    held = {i: random_transcoder(hm, i, kind=kind, form="skip_transcoder", site=site) for i, site in sites.items()}
    model = freeze(hm, held, tokens(1))
    for layer in (1, 2):
        found = attribution_of(model, (layer, int(model.transcoders[layer].latent[-1]), LENGTH - 1))
        assert found.activation > 0
        assert float(found.total.sum()) + found.constant == pytest.approx(found.pre_activation, abs=1e-4)


def test_a_transcoder_of_a_processed_model_reads_through_its_space() -> None:
    hm = manager("GPT2")
    held = {1: random_transcoder(hm, 1), 2: random_transcoder(hm, 2, form="skip_transcoder")}
    for transcoder in held.values():
        scale, shift = torch.rand(32) + 0.5, torch.randn(32)
        transcoder.space.fix(bound="raw", centred=True, scale=scale, shift=shift)
        transcoder.target_space.fix(bound="raw", read_centred=True, scale=scale.flip(0), shift=shift.flip(0))
    model = freeze(hm, held, tokens(1))
    found = attribution_of(model, active(model))
    assert float(found.total.sum()) + found.constant == pytest.approx(found.pre_activation, abs=1e-4)
    assert found.share("latent") != 0


def test_attention_alone_blocks_are_passed() -> None:
    hm = HookManager.load(nano(NanoOptions(n_layers=2, d_mlp=0, d_vocab=120, d_model=32), seed=1))
    model = freeze(hm, {}, tokens(1))
    draw = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    found = contributions(model, model.seed(torch.tensor([model.last]), torch.tensor([7]), draw))
    assert off(found.sum(1), (model.resid[7] @ draw.T)) < 1e-4
    assert set(Sources.of(model).kind.tolist()) <= {KINDS.index(k) for k in ("embed", "pos_embed", "attn_bias")}


# -- results and errors -----------------------------------------------------------------------------------------------


def test_results_show_themselves_and_come_back(tmp_path: "object") -> None:
    hm, held = planted()
    results: list[Result] = [
        pre_activation_attribution(hm, held, TEXT, target=(1, 3, -2)),
        find_paths(hm, held, TEXT, target=(1, 3, -2)),
        de_embedding(hm, held[0], [1, 2]),
        connections(hm, held[0], held[1], latents=[3], through=(1, 1)),
    ]
    for number, result in enumerate(results):
        assert len(result.to_frame()) and result.plot().data and "latent" in result.summary()
        back = Result.load(result.save(f"{tmp_path}/{number}"))
        assert back.summary() == result.summary()
    assert isinstance(results[1], PathTree)
    assert "inert latents may lead" in results[3].summary()


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_frozen_or_asked_is_refused() -> None:
    hm, held = planted()
    with pytest.raises(DataError, match="one prompt, got 2"):
        freeze(hm, held, TEXT.repeat(2, 1))
    for target, error in (
        ((1, 99, 0), DataError),
        ((5, 0, 0), DataError),
        ((1, 0, 50), WhereError),
        ((1, 0), DataError),
    ):
        with pytest.raises(error, match="target"):
            pre_activation_attribution(hm, held, TEXT, target=target)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="does not say what it reads"):
        bare = given(torch.zeros(WIDTH, 3), torch.zeros(3, WIDTH), 0)
        bare.cfg.metadata.clear()
        freeze(hm, {0: bare}, TEXT)
    with pytest.raises(ConfigError, match=r"maps 1.mlp.in to 1.mlp_out; expected .* of that layer"):
        freeze(hm, {0: held[1]}, TEXT)
    with pytest.raises(ConfigError, match="layers 0 to 1"):
        freeze(hm, {7: held[1]}, TEXT)
    with pytest.raises(ConfigError, match="expected a transcoder"):
        freeze(hm, {0: "transcoder"}, TEXT)  # type: ignore[dict-item]
    with pytest.raises(DataError, match="earlier source"):
        connections(hm, held[1], held[0])
    with pytest.raises(ShapeError, match=r"expected \[16\]"):
        connections(hm, held[0], held[1], mean=torch.ones(3))
    with pytest.raises(DataError, match="expected a layer from"):
        de_embedding(hm, held[0], [0], through=(1, 0))
    with pytest.raises(DataError, match="latents=\\[99\\]"):
        de_embedding(hm, held[0], [99])
    with pytest.raises(ModelError, match="normalises its embeddings"):
        de_embedding(manager("Bloom"), random_transcoder(manager("Bloom"), 0), [0])
    model = freeze(hm, held, TEXT)
    reader = reader_of(model, 1, 3, 4)
    for through in (("latent", 0, 0), ("latent", 1, 0), ("head", 1, 9), ("skip", 0, -1), ("mlp", 0, 0)):
        with pytest.raises(DataError, match="through="):
            pullback(model, reader, through=through, pos=0)
    with pytest.raises(DataError, match="pos=None"):
        pullback(model, reader, through=("head", 1, 1))


def test_a_transcoder_that_normalises_tokens_and_attention_with_a_sink_are_refused_by_name() -> None:
    hm = manager("GPT2")
    made = random_transcoder(hm, 0)
    made.set_cfg(made.cfg.model_copy(update={"normalize_activations": "layer_norm"}))
    with pytest.raises(ConfigError, match="normalises each token"):
        freeze(hm, {0: placed(made, "0.mlp.in", 0)}, tokens(1))
    model: Any = nano(NanoOptions(sink=True, d_vocab=120), seed=0)
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.sink_value.normal_()
    with pytest.raises(ModelError, match=r"attention of block 0 .* something else stands in between"):
        freeze(HookManager.load(model), {}, tokens(1))


def test_a_latent_that_is_not_its_pre_activation_is_refused() -> None:
    hm, held = planted()

    class Doubled(type(held[0])):  # type: ignore[misc]
        def encode(self, x: Tensor) -> Tensor:
            return 2 * super().encode(x)

    odd: Transcoder = placed(Doubled(held[0].cfg), "0.mlp.in", 0)
    with torch.no_grad():
        odd.W_enc.copy_(held[0].W_enc)
    with pytest.raises(ConfigError, match="not their pre-activations"):
        freeze(hm, {0: odd}, TEXT)
