"""Description length: codes whose entropy is known, and what must not change it."""

import math

import pytest
import torch
from torch import Tensor

from interp.core.errors import ConfigError, DataError
from interp.core.result import Result
from interp.dictionaries.topk import TopKSAE
from interp.evaluate import description_length as home
from interp.evaluate.description_length import DescriptionLength, description_length_of
from interp.evaluate.samples import Samples


def identity(d: int, *, scale: Tensor | None = None) -> TopKSAE:
    """x̂ = ReLU(x): one latent a dimension, `scale` times the coordinate, decoded by 1 / scale."""
    found = TopKSAE.from_cfg({"architecture": "topk", "d_in": d, "d_sae": d, "k": d, "dtype": "float64"})
    scale = torch.ones(d) if scale is None else scale
    with torch.no_grad():
        found.W_enc.copy_(torch.diag(scale))
        found.W_dec.copy_(torch.diag(1 / scale))
    return found.requires_grad_(False)


def measured(x: Tensor, *, sample: int = 64, sae: TopKSAE | None = None, epsilon: float = 1e-3) -> DescriptionLength:
    """Of codes that are the activations themselves; the sample comes on top, so that all of x is counted."""
    whole = torch.cat([x[:sample], x]).double()
    sae = identity(x.shape[1]) if sae is None else sae
    return description_length_of(whole, sae, epsilon=epsilon, sample_tokens=sample)


def test_a_latent_that_is_always_on_at_one_value_costs_nothing() -> None:
    levels = torch.tensor([0.0, 1.0]).repeat(500)
    found = measured(torch.stack([torch.full((1000,), 3.0), levels], 1))
    assert float(found.latent_bits[0]) == 0 and found.firing.tolist() == [1000, 500]
    # The other: on at one value half of the time.
    assert float(found.latent_bits[1]) == pytest.approx(1) and found.bits == pytest.approx(1)
    assert found.fvu == 0 and found.l0 == 1.5


def test_a_fair_coin_with_two_even_levels_costs_a_bit_and_a_half() -> None:
    values = torch.tensor([0.0, 0.0, 1.0, 2.0]).repeat(250)
    found = measured(torch.stack([values, values.flip(0)], 1))
    assert torch.allclose(found.latent_bits, torch.full((2,), 1.5).double())
    assert found.bits_firing == pytest.approx(2) and found.bits_values == pytest.approx(1)
    # Miller-Madow: a probability of firing and one of two levels, for each.
    assert found.undersampling == pytest.approx(4 / (2 * 1000 * math.log(2)))


@pytest.mark.parametrize("n", [4, 7])
def test_a_one_hot_code_costs_n_and_log2_e_bits_independently_and_n_jointly(n: int) -> None:
    many = 2**n
    found = measured(torch.eye(many).repeat(4, 1), sample=many)
    # F · H_b(1 / F) exactly; n + log2 e in the limit.
    assert found.bits == pytest.approx(n + (many - 1) * math.log2(many / (many - 1)))
    assert found.bits == pytest.approx(n + math.log2(math.e), abs=1.5 / many)
    assert found.bits_joint == pytest.approx(n) and found.bits_per_value == 0
    assert found.l0 == 1 and found.bits_values == 0


def test_zeros_are_in_no_cell_and_large_values_are_not_clamped() -> None:
    # SAEBench's histogram counts zeros and clamps at its range: both would change these counts.
    values = torch.zeros(4000)
    values[:40] = torch.tensor([1.0, 1e3, 2e3, 5e5]).repeat(10)
    found = measured(values[torch.randperm(4000)][:, None], sample=4000, epsilon=1e-9)
    p = 0.01
    entropy = -p * math.log2(p) - (1 - p) * math.log2(1 - p)
    assert found.bits_firing == pytest.approx(entropy) and found.bits_values == pytest.approx(p * 2)
    assert found.extra_fvu <= 1e-9
    # The lowest and the highest cell in use are as far apart as the values.
    assert 2**found.bits_per_value == pytest.approx((5e5 - 1) / found.step, rel=0.01)


@pytest.mark.parametrize("epsilon", [0.1, 1e-2, 1e-4])
def test_the_step_is_the_coarsest_that_costs_no_more_than_asked(epsilon: float) -> None:
    x = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = measured(x, sample=4000, epsilon=epsilon)
    assert found.extra_fvu <= epsilon
    spread = (x - x.mean(0)).pow(2).sum()

    def added(step: float) -> float:
        return float((x - ((x / step).floor() + 0.5) * step).pow(2).sum() / spread)

    assert added(found.step) == pytest.approx(found.extra_fvu) and added(found.step * 2 ** (1 / 32)) > epsilon
    # Uniform values: cells of width Δ miss Δ² / 12 of a variance of 1 / 12.
    assert found.step == pytest.approx(math.sqrt(epsilon), rel=0.12)
    assert float(found.latent_bits.mean()) == pytest.approx(-math.log2(found.step), abs=0.2)


def sparse(n: int, d: int = 6, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    on = torch.rand(n, d, generator=draw) < 0.3
    return on * (torch.rand(n, d, generator=draw, dtype=torch.float64) + 0.5)


def test_scaling_a_latent_against_its_decoder_row_changes_nothing() -> None:
    x, scale = sparse(3000), torch.tensor([0.25, 2.0, 8.0, 1.0, 0.5, 64.0])
    plain, scaled = measured(x), measured(x, sae=identity(6, scale=scale))
    assert scaled.bits == pytest.approx(plain.bits, abs=1e-12) and scaled.step == pytest.approx(plain.step)
    assert scaled.bits_joint == pytest.approx(plain.bits_joint) and scaled.dense_bits == plain.dense_bits
    # Nor does scaling activations and all.
    bias = identity(6)
    larger = measured(8 * x, sae=bias)
    assert larger.bits == pytest.approx(plain.bits) and larger.step == pytest.approx(8 * plain.step)


def test_a_latent_that_writes_nothing_costs_only_its_firing() -> None:
    x = sparse(2000, 3)
    sae = identity(3)
    with torch.no_grad():
        sae.W_dec[2] = 0
    found = measured(x, sae=sae)
    p = float(found.firing[2]) / 2000
    assert float(found.latent_bits[2]) == pytest.approx(-p * math.log2(p) - (1 - p) * math.log2(1 - p))
    assert 0 < found.fvu < 1


@pytest.mark.parametrize(("part", "pending"), [(4096, 1 << 21), (37, 50)])
def test_counting_by_hand_gives_the_same_whatever_the_parts(
    part: int, pending: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import interp.evaluate.samples as reading

    monkeypatch.setattr(reading, "_PART", part)
    monkeypatch.setattr(home, "_PENDING", pending)
    x = sparse(1200)
    found = description_length_of(x, identity(6), epsilon=0.01, sample_tokens=200)
    counted, expected = x[200:], 0.0
    for column in counted.T:
        fired = column[column > 0]
        share = len(fired) / 1000
        cells = (fired / found.step).floor().unique(return_counts=True)[1].double() / len(fired)
        expected += -share * math.log2(share) - (1 - share) * math.log2(1 - share)
        expected += share * float(-(cells * cells.log2()).sum())
    assert found.bits == pytest.approx(expected) and found.n_tokens == 1000
    assert float(found.latent_bits.sum()) == pytest.approx(found.bits)
    assert found.firing.tolist() == (counted > 0).sum(0).tolist()
    k = float((counted > 0).sum()) / 1000
    choose = (math.lgamma(7) - math.lgamma(k + 1) - math.lgamma(7 - k)) / math.log(2)
    assert found.bits_joint == pytest.approx(choose + k * found.bits_per_value)


def test_the_interval_is_of_rows_and_holds_what_other_text_costs() -> None:
    truth = measured(sparse(100_000, seed=100), epsilon=0.02)
    held = 0
    for seed in range(40):
        samples = Samples.of_tensor(sparse(4064, seed=seed)[:, None])
        found = description_length_of(samples, identity(6), epsilon=0.02, sample_tokens=64)
        low, high = found.intervals["bits_firing"]
        held += low <= truth.bits_firing <= high
        assert found.intervals["bits"][0] < found.bits < found.intervals["bits"][1]
    assert held >= 33  # 38 are expected, with a standard deviation of 1.4
    once = sparse(1000)
    rows = description_length_of(once[:, None].expand(-1, 6, -1), identity(6), sample_tokens=60)
    single = description_length_of(once[:, None], identity(6), sample_tokens=10)
    assert rows.bits == pytest.approx(single.bits) and rows.step == pytest.approx(single.step)
    assert rows.intervals["bits"] == pytest.approx(single.intervals["bits"])
    assert rows.intervals["l0"] == pytest.approx(single.intervals["l0"]) and rows.n_units == single.n_units == 990
    unknown = description_length_of(once, identity(6), sample_tokens=60)
    assert all(math.isnan(end) for pair in unknown.intervals.values() for end in pair)


def test_independent_coding_pays_for_what_is_known_and_sparse_latents_beat_the_dense_code() -> None:
    # Eight atoms, one on at a time, in a space that they do not stand along: dense cells pay for every dimension.
    draw = torch.Generator().manual_seed(3)
    atoms = torch.linalg.qr(torch.randn(8, 8, generator=draw, dtype=torch.float64)).Q
    codes = torch.nn.functional.one_hot(torch.randint(8, (4000,), generator=draw)).double()
    x = codes @ atoms
    sae = identity(8)
    with torch.no_grad():
        sae.W_enc.copy_(atoms.T)
        sae.W_dec.copy_(atoms)
        sae.b_enc.fill_(-1e-9)  # else rounding fires
    found = measured(x, sample=2000, sae=sae, epsilon=0.01)
    assert found.bits == pytest.approx(8 * 0.5436, abs=0.05) and found.bits_joint == pytest.approx(3, abs=0.01)
    assert found.dense_bits > 2 * found.bits and found.dense_bits_matched == pytest.approx(found.dense_bits, abs=0.5)
    assert found.one_hot_bits == pytest.approx(found.dense_bits + math.log2(4000))
    assert found.dense_bits > found.bits > found.bits_joint


def test_dense_bits_are_those_of_uniform_values_and_a_dimension_that_hardly_varies_is_free() -> None:
    x = torch.rand(20_000, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.5
    x[:, 1] *= 1e-4
    found = measured(x + 5, sample=20_000, epsilon=0.01)
    # Cells of Δ miss Δ² of the variance: Δ is about 0.1, and ten cells are log2 10 bits.
    assert found.dense_bits == pytest.approx(math.log2(10), abs=0.15)


def test_a_dictionary_in_which_nothing_fires_costs_nothing_and_says_so() -> None:
    found = measured(-sparse(500) - 0.1)
    assert found.bits == 0 and found.l0 == 0 and math.isnan(found.step) and "no latent fired" in found.summary()
    assert found.dense_bits_matched == 0 and found.fvu > 1


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_measured_is_refused_with_the_cure() -> None:
    x, sae = sparse(100), identity(6)
    with pytest.raises(DataError, match="all of which went to choosing the step"):
        description_length_of(x, sae, sample_tokens=100)
    with pytest.raises(ConfigError, match="epsilon=0"):
        description_length_of(x, sae, epsilon=0)
    with pytest.raises(DataError, match="the same at all 40 tokens"):
        description_length_of(torch.ones(80, 6).double(), sae, sample_tokens=40)
    x[70, 1] = math.inf
    with pytest.raises(DataError, match="NaN or infinite"):
        description_length_of(x, sae, sample_tokens=40)


def test_the_table_the_picture_and_the_folder_hold_it_all(tmp_path) -> None:  # type: ignore[no-untyped-def]
    found = description_length_of(sparse(900).view(90, 10, 6), identity(6), sample_tokens=100)
    frame = found.to_frame().set_index("figure")
    assert frame.loc["bits", "value"] == found.bits and frame.loc["bits", "low"] == found.intervals["bits"][0]
    assert found.plot().data[0].y[0] == found.bits and found.unit == "row" and found.n_units == 80
    loaded = Result.load(found.save(tmp_path / "bits"))
    assert loaded.summary() == found.summary() and "±" in found.summary()
