"""Dark matter: closed forms of an error that is partly linear, least squares beside, and what must not matter."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from interp.core.errors import ConfigError, DataError
from interp.core.result import Result
from interp.core.site import Site
from interp.data.store import ActivationStore, Rows, StreamState
from interp.dictionaries.topk import TopKSAE
from interp.evaluate import samples as home
from interp.evaluate.dark_matter import DarkMatter, dark_matter_of
from interp.evaluate.samples import Samples

THETA, DENSE = 0.4, 0.7
FIGURES = ("fvu", "fvu_nonlinear", "linear_share", "r2_pooled", "norm_r2")


def thresholded(turn: Tensor, kept: int, *, theta: float = THETA) -> TopKSAE:
    """Latent i is ReLU(v_i − theta) of coordinate i along `turn` [d d]; the other coordinates are not read at all."""
    d = len(turn)
    cfg = {"architecture": "topk", "d_in": d, "d_sae": kept, "k": kept, "dtype": "float64"}
    found = TopKSAE.from_cfg(cfg)
    with torch.no_grad():
        found.W_enc.copy_(turn[:, :kept])
        found.W_dec.copy_(turn[:, :kept].T)
        found.b_enc.fill_(-theta)
    return found.requires_grad_(False)


def world(n: int, kept: int = 4, dense: int = 2, seed: int = 0) -> Tensor:
    """Coordinates: `kept` uniform on [0, 1], then `dense` Gaussian ones, which stand for a dense low-rank part."""
    draw = torch.Generator().manual_seed(seed)
    uniform = torch.rand(n, kept, generator=draw, dtype=torch.float64)
    return torch.cat([uniform, DENSE * torch.randn(n, dense, generator=draw, dtype=torch.float64)], 1)


def closed_form(kept: int, dense: int) -> dict[str, float]:
    """The figures of e_i = min(v_i, θ), v uniform, beside dense coordinates that are error altogether."""
    t, rest = THETA, 1 - THETA
    mean = t - t**2 / 2
    second, fourth = t**3 / 3 + t**2 * rest, t**5 / 5 + t**4 * rest
    var, cov = second - mean**2, t**3 / 3 + t * (1 - t**2) / 2 - mean / 2
    cov_square = t**4 / 4 + t**2 * (1 - t**2) / 2 - second / 2
    r2 = cov**2 * 12 / var
    lost, spread, variance = kept * var * (1 - r2), kept * var + dense * DENSE**2, kept / 12 + dense * DENSE**2
    power = kept * second + dense * DENSE**2
    # A square of a Gaussian is not linear in it: var(g²) = 2 σ⁴, all of it missed.
    square = kept * (fourth - second**2)
    return {
        "fvu": power / variance,
        "fvu_nonlinear": lost / variance,
        "linear_share": 1 - lost / power,
        "r2": (kept * r2 + dense) / (kept + dense),
        "r2_pooled": 1 - lost / spread,
        "norm_r2": kept * cov_square**2 * 12 / (square + dense * 2 * DENSE**4),
    }


def rotation(d: int) -> Tensor:
    return torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q


@pytest.mark.parametrize("dense", [0, 2])
def test_a_threshold_and_a_dense_part_give_their_closed_form(dense: int) -> None:
    x = world(60_000, dense=dense)
    found = dark_matter_of(x[:, None], thresholded(torch.eye(4 + dense).double(), 4))
    for name, expected in closed_form(4, dense).items():
        low, high = found.intervals[name]
        assert getattr(found, name) == pytest.approx(expected, abs=0.01), name
        assert low < getattr(found, name) < high and high - low < 0.03
        # The truth lies within twice the interval: four standard errors.
        assert abs(getattr(found, name) - expected) < high - low, name
    assert found.n_fit + found.n_tokens == 60_000 and found.n_fit == pytest.approx(20_000, abs=2)
    assert found.n_units == found.n_tokens and found.unit == "row" and found.rank == 4 + dense


def test_the_figures_are_those_of_least_squares_on_the_same_split() -> None:
    turn, far = rotation(6), torch.tensor([0.0, 0, 0, 0, 1e5, 1e5]).double()  # far from the origin: nothing may cancel
    x, sae = (world(3000) + far) @ turn.T, thresholded(turn, 4)
    found = dark_matter_of(x, sae, fit_share=0.4)
    mine = torch.cat([part for _, _, part in Samples.of_tensor(x).dealt(0.4)])
    error = x - sae(x)
    targets = torch.cat([error, error.pow(2).sum(1, keepdim=True)], 1)
    ones = torch.ones(len(x), 1, dtype=torch.float64)
    design = torch.cat([x - far @ turn.T, ones], 1)
    guess = design @ torch.linalg.lstsq(design[mine], targets[mine]).solution
    missed, test = (targets - guess)[~mine], targets[~mine]
    r2 = 1 - missed.pow(2).sum(0) / (test - test.mean(0)).pow(2).sum(0)
    variance = (x[~mine] - x[~mine].mean(0)).pow(2).sum()
    assert torch.allclose(found.r2_by_dim, r2[:-1], atol=1e-8) and found.norm_r2 == pytest.approx(float(r2[-1]))
    assert found.r2 == pytest.approx(float(r2[:-1].mean()), abs=1e-9)
    spread = (test[:, :-1] - test[:, :-1].mean(0)).pow(2).sum()
    assert found.r2_pooled == pytest.approx(1 - float(missed[:, :-1].pow(2).sum() / spread), abs=1e-9)
    assert found.fvu == pytest.approx(float(error[~mine].pow(2).sum() / variance), rel=1e-9)
    assert found.fvu_nonlinear == pytest.approx(float(missed[:, :-1].pow(2).sum() / variance), rel=1e-7)
    assert found.linear_share == pytest.approx(1 - found.fvu_nonlinear / found.fvu, rel=1e-9)


def test_turning_the_space_and_the_dictionary_with_it_changes_nothing_but_the_mean_over_dimensions() -> None:
    x, turn = world(4000), rotation(6)
    plain = dark_matter_of(x[:, None], thresholded(torch.eye(6).double(), 4))
    turned = dark_matter_of((x @ turn.T)[:, None], thresholded(turn, 4))
    for name in FIGURES:
        assert getattr(turned, name) == pytest.approx(getattr(plain, name), abs=1e-9)
        assert turned.intervals[name] == pytest.approx(plain.intervals[name], abs=1e-9)
    assert abs(turned.r2 - plain.r2) > 0.01


def test_writing_every_token_five_times_in_its_row_changes_neither_figures_nor_intervals() -> None:
    x, sae = world(3000), thresholded(torch.eye(6).double(), 4)
    once, often = dark_matter_of(x[:, None], sae), dark_matter_of(x[:, None].expand(-1, 5, -1), sae)
    for name in (*FIGURES, "r2"):
        assert getattr(often, name) == pytest.approx(getattr(once, name), abs=1e-9)
        assert often.intervals[name] == pytest.approx(once.intervals[name], abs=1e-9)
    assert often.n_tokens == 5 * once.n_tokens and often.n_units == once.n_units


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    truth, held, sae = closed_form(4, 2), dict.fromkeys((*FIGURES, "r2"), 0), thresholded(torch.eye(6).double(), 4)
    for seed in range(60):
        found = dark_matter_of(world(30_000, seed=seed)[:, None], sae)
        for name in held:
            low, high = found.intervals[name]
            held[name] += low <= truth[name] <= high
    # 57 of 60 are expected, with a standard deviation of 1.7; the fit's own error is not in them.
    assert min(held.values()) >= 51, held
    assert sum(held.values()) < 60 * len(held)  # nor are they so wide that they say nothing


@pytest.mark.parametrize("part", [7, 4096])
def test_the_parts_in_which_it_is_read_do_not_matter(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, sae = world(2000).view(100, 20, 6), thresholded(torch.eye(6).double(), 4)
    expected = dark_matter_of(x, sae)
    monkeypatch.setattr(home, "_PART", part)
    found = dark_matter_of(x, sae)
    for name in (*FIGURES, "r2"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), abs=1e-9)
        assert found.intervals[name] == pytest.approx(expected.intervals[name], abs=1e-9)


def test_an_error_that_is_nearly_all_of_x_is_linear_and_one_of_nothing_is_undefined() -> None:
    d = 5
    cfg = {"architecture": "topk", "d_in": d, "d_sae": 2 * d, "k": 2 * d}
    sae = TopKSAE.from_cfg(cfg)
    both = torch.cat([rotation(d), rotation(d)], 1).float()
    x = torch.randn(4000, d)
    with torch.no_grad():
        sae.W_enc.copy_(both)
        sae.W_dec.copy_(0.01 * torch.randn(2 * d, d))
    random = dark_matter_of(x, sae.requires_grad_(False))
    assert min(random.r2, random.r2_pooled, random.linear_share) > 0.999 and random.fvu == pytest.approx(1, abs=0.02)
    with torch.no_grad():
        turn = both[:, :d]
        sae.W_enc.copy_(torch.cat([turn, -turn], 1))
        sae.W_dec.copy_(torch.cat([turn.T, -turn.T]))
    perfect = dark_matter_of(x, sae)
    for name in ("r2", "r2_pooled", "linear_share", "norm_r2"):
        assert math.isnan(getattr(perfect, name)), name
    assert perfect.fvu < 1e-12 and "within rounding" in perfect.summary() and bool(perfect.r2_by_dim.isnan().all())


def test_an_error_that_has_nothing_to_do_with_x_is_not_linear() -> None:
    # v is ±1 evenly, |v| is always 1; the error of v = ±1 ± 2 under a threshold is even about 0.
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(20_000, 1, generator=draw, dtype=torch.float64)
    cfg = {"architecture": "topk", "d_in": 1, "d_sae": 2, "k": 2, "dtype": "float64"}
    sae = TopKSAE.from_cfg(cfg)
    with torch.no_grad():
        # x̂ = x − |x|: twice the negative part.
        sae.W_enc.copy_(torch.tensor([[-1.0, 0.0]]))
        sae.W_dec.copy_(torch.tensor([[-2.0], [0.0]]))
    found = dark_matter_of(x[:, None], sae.requires_grad_(False))
    low, high = found.intervals["r2"]
    assert abs(found.r2) < 0.002 and low < 0 < high
    # e = |x|: mean √(2/π), which a bias takes, 2/π of the square.
    assert found.linear_share == pytest.approx(2 / math.pi, abs=0.02)


def test_constant_dimensions_are_left_out_and_counted() -> None:
    x = torch.cat([world(2000), torch.full((2000, 1), 3.0, dtype=torch.float64)], 1)
    found = dark_matter_of(x, thresholded(torch.eye(7).double(), 4))
    assert found.rank == 6 and bool(found.r2_by_dim[6].isnan()) and not bool(found.r2_by_dim[:6].isnan().any())
    assert found.r2 == pytest.approx(float(found.r2_by_dim[:6].mean())) and "in 1 dimensions" in found.summary()


class Listed(ActivationStore):
    """A store of some batches at hand."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.sites, self.batch_size, self.seed, self.held = [Site("1.resid_post")], 10, 0, batches

    def describe(self) -> dict[str, object]:
        return {}

    def _stream(self, should_stop: Callable[[], bool], state: StreamState | None) -> "ListedRows":
        return ListedRows(iter(self.held))


class ListedRows:
    def __init__(self, batches: Iterator[Tensor]) -> None:
        self.batches = batches

    def __iter__(self) -> "ListedRows":
        return self

    def __next__(self) -> Rows:
        x = next(self.batches)
        return Rows([x], torch.zeros(len(x), dtype=torch.long), torch.zeros(len(x), dtype=torch.long))

    def state(self) -> StreamState:
        return StreamState({}, {})


def test_a_store_gives_what_its_tensor_gives_but_no_intervals() -> None:
    x, sae = world(2000), thresholded(torch.eye(6).double(), 4)
    found = dark_matter_of(Listed(list(x.split(300))), sae, site="1.resid_post", max_tokens=1500)
    expected = dark_matter_of(x[:1500], sae)
    assert found.n_fit + found.n_tokens == 1500 and found.site == "blocks.1.hook_resid_post" and found.unit == ""
    for name in (*FIGURES, "r2"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), abs=1e-9)
        assert all(math.isnan(end) for end in found.intervals[name])
    with pytest.raises(ConfigError, match=r"this store has \['1.resid_post'\]"):
        dark_matter_of(Listed([x]), sae, site="0.resid_post")


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_measured_is_refused_with_the_cure() -> None:
    sae = thresholded(torch.eye(6).double(), 4)
    with pytest.raises(DataError, match=r"7 tokens for 6 dimensions and a bias; it needs more than 7"):
        dark_matter_of(world(20), sae)
    x = world(200)
    x[150, 2] = math.nan
    with pytest.raises(DataError, match="activations are NaN or infinite"):
        dark_matter_of(x, sae)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        dark_matter_of(world(200), sae, fit_share=1.0)
    with pytest.raises(DataError, match="the same at all"):
        dark_matter_of(torch.ones(200, 6).double(), sae)


def test_the_table_the_picture_and_the_folder_hold_it_all(tmp_path) -> None:  # type: ignore[no-untyped-def]
    found = dark_matter_of(world(900).view(90, 10, 6), thresholded(torch.eye(6).double(), 4))
    frame = found.to_frame().set_index("figure")
    assert frame.loc["fvu", "value"] == found.fvu and frame.loc["r2", "high"] == found.intervals["r2"][1]
    heights = list(found.plot().data[0].y)
    assert heights[0] == pytest.approx(heights[1] + heights[2]) and heights[2] == found.fvu_nonlinear
    loaded = Result.load(found.save(tmp_path / "dark"))
    assert isinstance(loaded, DarkMatter) and loaded.summary() == found.summary() and "±" in found.summary()
