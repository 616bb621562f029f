"""Observables: what reaches the logits by each way sums to the logits, head by head and family by family."""

import itertools
from typing import Any

import pytest
import torch

from interp.core.direct import DirectPath
from interp.core.errors import ConfigError, DataError, SiteError
from interp.core.intervention import Add
from interp.core.manager import HookManager
from interp.core.where import Where
from interp.steering.concepts.observable import coupling, observable
from interp.testbed.nano import NanoOptions, nano
from tests.families import manager, tokens
from tests.hand_built import N_POSITIONS, N_TOKENS, induction_model

POSITIVE, NEGATIVE = [5, 17], [40]


def small(seed: int = 0, **options: Any) -> HookManager:
    held = {"d_vocab": 50, "d_model": 24, "n_heads": 4, "n_kv_heads": 2, "d_head": 6, "init_std": 0.3, **options}
    return HookManager.load(nano(NanoOptions(**held), seed=seed))


def ids(batch: int = 3, pos: int = 7) -> torch.Tensor:
    return torch.randint(1, 50, (batch, pos), generator=torch.Generator().manual_seed(4))


# -- planted and closed form -------------------------------------------------------------------------------------


def test_the_head_that_copies_reads_the_very_tokens_of_the_observable() -> None:
    hm = induction_model()
    seen = observable(hm, [7], [3])
    through = seen.through(head=(1, 0))
    expected = torch.zeros(hm.d_model, dtype=torch.float64)
    expected[7], expected[3] = 10.0, -10.0  # the block of the token, times what the head copies with
    torch.testing.assert_close(through.vector, expected)
    assert through.site == "1.resid_pre" and through.steps[0].label == "L1H0"
    assert not seen.through(head=(1, 1)).vector.any(), "the head that does nothing reads nothing"
    back = through.through(
        head=(0, 0)
    ).vector  # a0.h0 writes to the block of the token before, which a1.h0's values lack
    assert not back.any()
    assert N_TOKENS == N_POSITIONS == 12


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_all_ways_of_an_attention_only_model_without_norms_sum_to_the_logits(positions: str) -> None:
    hm = small(norm="none", d_mlp=0, positions=positions, unembed_bias=True)
    with torch.no_grad():
        for name, parameter in hm.model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    seen = observable(hm, POSITIVE, NEGATIVE)
    heads = range(hm.n_heads)
    ways = [seen] + [seen.through((layer, h)) for layer in (0, 1) for h in heads]
    ways += [seen.through(path=[(1, a), (0, b)]) for a, b in itertools.product(heads, heads)]
    run = hm.run(ids(), read=[name for way in ways for name in way.needed(0)], logits="last")
    total = torch.stack([way.estimate(run, layer=0) for way in ways]).sum(0)
    # Biases of output projections are no head's: they go to the logits straight, or through a later head.
    first = hm.weights[0].b_O.double()
    total += sum(float(hm.weights[layer].b_O.double() @ seen.vector) for layer in (0, 1))
    total += sum(float(first @ seen.through((1, h)).vector) for h in heads)
    torch.testing.assert_close(total, seen.value(run), atol=1e-5, rtol=1e-5)
    assert float(seen.value(run).std()) > 0.1
    assert min(float(way.estimate(run, layer=0).abs().max()) for way in ways) > 1e-4, "each way counts"


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_a_norm_leaves_the_direction_as_it_is_wherever_the_point_lies(norm: str) -> None:
    hm = small(norm=norm, unembed_bias=True)
    with torch.no_grad():
        for parameter in hm.model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    seen = observable(hm, POSITIVE, NEGATIVE)
    site = seen.site
    run = hm.run(ids(), read=[site, "ln_final.scale"], logits="last", grad=seen_of(seen))
    sigma, spec = run["ln_final.scale"][:, -1].double(), hm.atlas.norm("ln_final")
    exact = seen.vector / sigma
    for row, gradient in enumerate(run.grad[site][:, -1].double()):
        rest = exact[row] - gradient
        point = spec.centre(run[site][row, -1].double())
        off = rest - point * (rest @ point) / (point @ point)
        assert float(off.norm()) < 1e-4 * float(exact[row].norm()), "what differs lies along the point alone"
    torch.testing.assert_close(seen.estimate(run), seen.value(run), atol=1e-5, rtol=1e-4)
    mean = seen.estimate(run, scales="mean")
    assert 0 < float((mean - seen.value(run)).abs().max()) < 0.6 * float(seen.value(run).abs().max())


def seen_of(seen: Any) -> Any:
    def metric(run: Any) -> torch.Tensor:
        return (run.logits[:, -1][:, seen.columns] * seen.weights.to(run.logits)).sum(-1)

    return metric


@pytest.mark.parametrize("mlp", ["plain", "gated"])
def test_an_mlp_is_its_gradient_at_the_point_and_exact_where_it_is_linear(mlp: str) -> None:
    hm = small(norm="layer", mlp=mlp, d_mlp=32)
    seen = observable(hm, POSITIVE, NEGATIVE)
    point = ids(1)
    way = seen.through(mlp=1, at=point)
    assert way.site == "1.resid_mid"
    step = torch.randn(hm.d_model) / hm.d_model**0.5

    def given(size: float) -> float:
        edit = [Add("1.resid_mid", step * size, where=Where(pos=-1))]
        return float(hm.run(point, read=["1.mlp_out"], write=edit)["1.mlp_out"][0, -1].double() @ seen.vector)

    slope = (given(1e-2) - given(-1e-2)) / 2e-2
    assert slope == pytest.approx(float(way.vector @ step.double()), rel=2e-2, abs=1e-4)
    linear = small(norm="none", act="linear", d_mlp=32)
    seen = observable(linear, POSITIVE, NEGATIVE)
    way = seen.through(mlp=0, at=ids(1, 4))
    run = linear.run(ids(), read=["0.resid_mid", "0.mlp_out"])
    expected = run["0.mlp_out"][:, -1].double() @ seen.vector
    torch.testing.assert_close(way.estimate(run), expected, atol=1e-5, rtol=1e-4)
    both = way.through(head=(0, 1))
    assert [s.label for s in both.steps] == ["0_mlp", "L0H1"] and both.site == "0.resid_pre"


# -- families ----------------------------------------------------------------------------------------------------

FAMILIES = ["GPT2", "Llama", "Gemma2", "Olmo2", "Granite", "GPTNeoX", "FalconNew", "Cohere"]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_head_passes_on_is_its_direct_attribution(family: str) -> None:
    hm = manager(family)
    last, first = hm.n_layers - 1, hm.n_layers - 2
    seen = observable(hm, POSITIVE, NEGATIVE)
    ways = {f"L{last}H{h}": seen.through((last, h)) for h in range(hm.n_heads)}
    chain = ways[f"L{last}H3"].through((first, 1))
    reads = [*seen.needed(), *chain.needed(), *(f"{i}.z" for i in range(hm.n_layers))]
    reads += [name for way in ways.values() for name in way.needed()]
    if hm.map.attn_out == "ln1_post":
        reads += ["*.ln1_post.scale"]
    run = hm.run(tokens(), read=list(dict.fromkeys(reads)), logits="last")
    torch.testing.assert_close(seen.estimate(run), seen.value(run), atol=2e-5, rtol=1e-4)
    heads = run.stack_head_results()
    path = DirectPath.of(hm, run[seen.site][:, -1], seen.columns, seen.weights[None].expand(2, -1))
    for label, way in ways.items():
        expected = path.of_vectors(heads[label][:, -1]).double()
        torch.testing.assert_close(way.estimate(run), expected, atol=2e-5, rtol=1e-3)
    # The chain passes on what the earlier head writes, as the later one reads it: the same sum with that head's output.
    written = heads[f"L{first}H1"].double()
    way = ways[f"L{last}H3"]
    weight = run[f"{last}.pattern"][:, 3, -1].double() / path.sigma[:, None]
    for name in [n for n in way.needed() if n.endswith("ln1.scale")]:
        weight = weight / run[name][..., 0].double()
    if hm.map.attn_out == "ln1_post":
        weight = weight / run[f"{last}.ln1_post.scale"][:, -1].double()
    expected = (weight * (written @ way.vector)).sum(1)
    assert float(expected.abs().min()) > 1e-3
    torch.testing.assert_close(chain.estimate(run), expected, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side: str) -> None:
    hm = manager("Llama")
    way = observable(hm, POSITIVE, NEGATIVE).through((2, 1))
    short = tokens(1, 8)
    alone = way.estimate(hm.run(short, read=way.needed()))
    padded, mask = torch.zeros(2, 12, dtype=torch.long), torch.ones(2, 12, dtype=torch.bool)
    span = slice(4, 12) if side == "left" else slice(0, 8)
    padded[0, span], mask[0], padded[1] = short[0], False, tokens(1, 12, seed=3)[0]
    mask[0, span] = True
    both = way.estimate(hm.run(hm.to_tokens(padded, mask=mask), read=way.needed()))
    torch.testing.assert_close(both[:1], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["GPT2", "Llama"])
def test_a_folded_copy_has_the_same_observables(family: str) -> None:
    hm = manager(family)
    twin = hm.folded()
    for way in ([], [(1, 2)], [(2, 0), (0, 3)]):
        raw, folded = (observable(h, POSITIVE, NEGATIVE).through(path=way).vector for h in (hm, twin))
        cosine = float(raw @ folded / raw.norm() / folded.norm())
        assert cosine == pytest.approx(1.0, abs=1e-6) and float(folded.norm() / raw.norm()) == pytest.approx(
            1, rel=1e-4
        )


# -- using -------------------------------------------------------------------------------------------------------


def test_steering_along_an_observable_raises_it_by_its_length_squared() -> None:
    hm = small(norm="none", d_mlp=0)
    seen = observable(hm, POSITIVE, NEGATIVE, name="five")
    direction = seen.direction()
    assert direction.sites == ["1.resid_post"] and direction.method == "observable" and direction.name == "five"
    before = seen.value(hm.run(ids(), logits="last"))
    after = seen.value(hm.run(ids(), write=direction.as_interventions(0.5), logits="last"))
    expected = torch.full_like(before, 0.5 * float(seen.vector @ seen.vector))
    torch.testing.assert_close(after - before, expected, atol=1e-5, rtol=1e-4)
    other = observable(hm, [9], NEGATIVE)
    moved = other.value(hm.run(ids(), write=direction.as_interventions(0.5), logits="last"))
    moved -= other.value(hm.run(ids(), logits="last"))
    torch.testing.assert_close(moved, expected * seen.coupling(other), atol=1e-5, rtol=1e-4)


def test_coupling_and_cosine() -> None:
    hm = small()
    a, b = observable(hm, [5], [6]), observable(hm, [6], [5])
    assert a.cosine(b) == pytest.approx(-1) and a.coupling(b) == pytest.approx(-1)
    first, second = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 5.0])
    assert coupling(first, second) == 0.5 and coupling(second, first) == pytest.approx(2 / 26)


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_is_refused() -> None:
    hm = small()
    seen = observable(hm, POSITIVE, NEGATIVE)
    with pytest.raises(DataError, match="expected each once"):
        observable(hm, [5], [5])
    with pytest.raises(DataError, match="token 50 is outside"):
        observable(hm, [50])
    with pytest.raises(SiteError, match=r"does not write before 0\.resid_pre"):
        seen.through((0, 1)).through((1, 1))
    with pytest.raises(SiteError, match=r"does not write before 1\.resid_pre"):
        seen.through((1, 1)).through(mlp=1, at=ids(1))
    with pytest.raises(ConfigError, match="give at="):
        seen.through(mlp=1)
    with pytest.raises(ConfigError, match="give one of head"):
        seen.through()
    with pytest.raises(SiteError, match=r"add to read=\[…\] of the run: '1.resid_pre'"):
        seen.through((1, 1)).estimate(hm.run(ids(), read=["1.z"]))
    with pytest.raises(ConfigError, match="expected one of own, mean"):
        seen.estimate(hm.run(ids(), read=seen.needed()), scales="none")
